"""Glyphs: an embedded few-shot dataset that needs no download, rendered from the fonts that matplotlib ships."""

# P: pictures of one class, M: side of the picture the glyph is taken from, S: side of the picture made

from __future__ import annotations

import functools
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from implicitlayer._errors import extra
from implicitlayer.base._tree import check_integer
from implicitlayer.fewshot._cache import cached_images
from implicitlayer.fewshot._dataset import ImageClasses, check_image_size, load_splits, names_of

# Regular and bold of each family. Italics are left out: their cursive forms (Cyrillic te as m) are other characters'.
REGULAR_FACES = ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono", "STIXGeneral")
FACES = (*REGULAR_FACES, "DejaVuSans-Bold", "DejaVuSerif-Bold", "DejaVuSansMono-Bold", "STIXGeneralBol")
FONT_SIZE = 96  # pixels to the em
MIN_FACE_SIMILARITY = 0.5  # a face whose picture of a letter differs more than this from DejaVu Sans' draws another one


def codepoint_of(name: str) -> int:
    return int(name.rpartition("U+")[2], 16)


@functools.cache
def coverage(face: str) -> frozenset[int]:
    """The code points for which a face has a picture of its own; any other would be drawn as an empty box."""
    with extra("fewshot", "Rendering glyphs needs matplotlib"):
        from matplotlib.ft2font import FT2Font
    return frozenset(FT2Font(str(_font_file(face))).get_charmap())


@functools.cache
def _font(face: str) -> Any:
    with extra("fewshot", "Rendering glyphs needs pillow"):
        from PIL import ImageFont
    # The basic layout engine is in every Pillow; the other is not, and may pick other forms of a letter.
    return ImageFont.truetype(str(_font_file(face)), FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)


def _font_file(face: str) -> Path:
    with extra("fewshot", "Rendering glyphs needs matplotlib"):
        import matplotlib
    path = Path(matplotlib.get_data_path(), "fonts", "ttf", f"{face}.ttf")
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: matplotlib is installed without its fonts. Install matplotlib from PyPI."
        )
    return path


def ink(codepoint: int, face: str) -> Any:
    """A grey Pillow picture of one character, cropped to its ink and padded to a square; None when there is no ink."""
    font = _font(face)
    from PIL import Image, ImageDraw

    side = 3 * FONT_SIZE
    picture = Image.new("L", (side, side))
    ImageDraw.Draw(picture).text((side // 2, side // 2), chr(codepoint), font=font, fill=255, anchor="mm")
    box = picture.getbbox()
    if box is None:
        return None
    width, height = box[2] - box[0], box[3] - box[1]
    square = Image.new("L", (max(width, height),) * 2)
    square.paste(picture.crop(box), ((square.width - width) // 2, (square.width - height) // 2))
    return square


def descriptor(codepoint: int, face: str) -> NDArray[np.float32] | None:
    """A blurred picture ``[28, 28]`` of unit norm: equal letters have equal ones, whatever their size."""
    picture = ink(codepoint, face)
    if picture is None:
        return None
    from PIL import Image

    small = np.asarray(picture.resize((24, 24), Image.Resampling.BOX), dtype=np.float32)
    blurred = np.pad(small, 2)
    for axis in (0, 1):
        blurred = 0.25 * np.roll(blurred, 1, axis) + 0.5 * blurred + 0.25 * np.roll(blurred, -1, axis)
    unit: NDArray[np.float32] = blurred / np.linalg.norm(blurred)
    return unit


@functools.cache
def faces_of(codepoint: int) -> tuple[str, ...]:
    """The faces that draw this character, and draw it as DejaVu Sans does."""
    reference = descriptor(codepoint, FACES[0])
    found = []
    for face in FACES:
        drawn = descriptor(codepoint, face) if codepoint in coverage(face) else None
        if drawn is not None and reference is not None and float((drawn * reference).sum()) >= MIN_FACE_SIMILARITY:
            found.append(face)
    return tuple(found)


RECIPE = 2  # raise it whenever the pictures change
CANVAS, GLYPH = 96, 68  # M, and the longer side of the ink in it, pixels


class Glyphs(ImageClasses):
    """Letters of fifteen scripts, drawn by 20 synthetic "drawers": the default dataset, made on the machine itself.

    A drawer has a hand of its own for all letters (slant, width, stroke weight), and each letter it draws gets a font
    face (sans, serif, mono, STIX; regular or bold, where the face has the letter), a small turn, scale and shift, and
    a smooth bend of its strokes. Letters that look alike in any quarter turn are one class, decided before classes
    were split; the lists are stored by name in this package. It is easier than Omniglot: people differ more than these
    drawers do. Accuracies on the two are not comparable. The same seed gives the same bytes with the same versions of
    matplotlib, Pillow and torch; with others a few grey levels may differ, classes and splits never do.

    Args:
        split: ``"train"``, ``"val"`` or ``"test"``.
        image_size: side of the pictures in pixels, at least 8.
        num_examples: drawers, at least 2. A drawer's pictures are the same whatever their number is.
        seed: other drawers, the same classes and splits.
        cache_dir: as in :class:`Omniglot`. The first call renders (some seconds), later ones read.

    Attributes:
        images: uint8, ``[num_classes, num_examples, image_size, image_size]``; ink is high, paper is 0.
        class_names: ``"<Script>/U+XXXX"``, sorted.

    Raises:
        ImportError: matplotlib or Pillow is missing (``pip install 'implicitlayer[fewshot]'``).
        ValueError: unknown split or a number out of range.

    Example:
        >>> Glyphs("val")
        Glyphs(split='val', num_classes=80, num_examples=20, image_size=28x28)
    """

    def __init__(
        self,
        split: str = "train",
        *,
        image_size: int = 28,
        num_examples: int = 20,
        seed: int = 0,
        cache_dir: str | Path | None = None,
    ) -> None:
        check_image_size(image_size)
        check_integer("num_examples", num_examples, 2)
        check_integer("seed", seed, 0)
        names = names_of(load_splits("glyphs"), split)
        key = ["glyphs", RECIPE, image_size, num_examples, seed, names, _versions()]
        name, shape = f"glyphs-{split}-{image_size}", (len(names), num_examples, image_size, image_size)
        codepoints = [codepoint_of(name) for name in names]
        images = cached_images(name, key, shape, lambda: render(codepoints, image_size, num_examples, seed), cache_dir)
        super().__init__(torch.from_numpy(images), names, split=split)


def _versions() -> list[str]:
    found = []
    for package in ("matplotlib", "pillow", "torch"):
        with extra("fewshot", f"Rendering glyphs needs {package}"):
            found.append(metadata.version(package))
    return found


@torch.no_grad()
def render(codepoints: Sequence[int], image_size: int, num_examples: int, seed: int) -> NDArray[np.uint8]:
    """Pictures ``[len(codepoints), num_examples, image_size, image_size]``: each character in every drawer's hand."""
    # a drawer's slant (shear), log of width over height, and stroke weight, each in [-1, 1]
    hands = np.stack([np.random.default_rng((seed, 0, drawer)).uniform(-1, 1, 3) for drawer in range(num_examples)])
    images = np.empty((len(codepoints), num_examples, image_size, image_size), dtype=np.uint8)
    for row, codepoint in enumerate(codepoints):
        faces = faces_of(codepoint)
        source = torch.stack([_canvas(codepoint, face) for face in faces])
        # Which face comes first differs between letters, so that a face does not give a drawer away.
        start = int(np.random.default_rng((seed, codepoint)).integers(len(faces)))
        drawn_from = source[[(start + drawer) % len(faces) for drawer in range(num_examples)]]
        streams = (np.random.default_rng((seed, codepoint, 1 + drawer)) for drawer in range(num_examples))
        draws = np.stack([stream.uniform(-1, 1, 38) for stream in streams])
        images[row] = _draw(drawn_from, hands, draws, image_size).numpy()
    return images


def _canvas(codepoint: int, face: str) -> Tensor:
    """The character in the middle of a canvas, float32 in [0, 1], ``[M, M]``."""
    from PIL import Image

    picture = ink(codepoint, face).resize((GLYPH, GLYPH), Image.Resampling.BOX)
    margin = (CANVAS - GLYPH) // 2
    return F.pad(torch.from_numpy(np.array(picture)).to(torch.float32) / 255, (margin,) * 4)


def _draw(source: Tensor, hands: NDArray[np.float64], draws: NDArray[np.float64], image_size: int) -> Tensor:
    """uint8 ``[P, S, S]``: ``source`` ``[P, M, M]`` warped, its strokes made thinner or bolder, and reduced.

    ``hands`` is ``[P, 3]``; ``draws`` is ``[P, 38]`` in [-1, 1]: turn, 2 scales, 2 shifts, weight, 2 × 16 bends.
    """
    slant, width, weight = hands.T
    turn, scale_x, scale_y, shift_x, shift_y, press = draws[:, :6].T
    angle = np.deg2rad(12) * turn
    # From a place in the new picture to the place in the old one: turn, then slant, then scale.
    along = np.exp(0.12 * width + 0.08 * scale_x)
    down = np.exp(-0.12 * width + 0.08 * scale_y)
    shear = 0.22 * slant
    cos, sin = np.cos(angle), np.sin(angle)
    across = np.stack([along * (cos + shear * sin), along * (shear * cos - sin), 0.12 * shift_x], -1)
    matrix = np.stack([across, np.stack([down * sin, down * cos, 0.12 * shift_y], -1)], 1)
    fine = 2 * image_size  # warped at twice the size, so that edges stay smooth when reduced
    grid = F.affine_grid(torch.from_numpy(matrix).to(torch.float32), [len(source), 1, fine, fine], align_corners=False)
    coarse = torch.from_numpy(draws[:, 6:].reshape(-1, 2, 4, 4)).to(torch.float32)
    bend = F.interpolate(coarse, size=(fine, fine), mode="bicubic", align_corners=True)
    grid = grid + 0.08 * bend.permute(0, 2, 3, 1)
    warped = F.grid_sample(source.unsqueeze(1), grid, mode="bilinear", align_corners=False)
    # Blur, then a soft threshold: a low one keeps the blurred rim as ink (bold), a high one cuts into it (thin).
    soft = warped
    for _ in range(max(1, round(fine / 28))):
        for shifts in ((1, 0), (0, 1)):
            soft = 0.5 * soft + 0.25 * (soft.roll(shifts, (2, 3)) + soft.roll((-shifts[0], -shifts[1]), (2, 3)))
    threshold = torch.from_numpy(0.49 + 0.10 * weight + 0.06 * press).to(torch.float32).view(-1, 1, 1, 1)
    drawn = ((soft - threshold) * 4 + 0.5).clamp_(0, 1)
    return (F.avg_pool2d(drawn, 2).squeeze(1) * 255).round_().to(torch.uint8)
