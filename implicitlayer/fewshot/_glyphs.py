"""Glyphs: an embedded few-shot dataset that needs no download, rendered from the fonts that matplotlib ships."""

# P: pictures of one class, M: side of the picture the glyph is taken from, S: side of the picture made

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from implicitlayer.base._numbers import check_integer
from implicitlayer.base._optional import extra
from implicitlayer.fewshot._cache import cached_images
from implicitlayer.fewshot._dataset import ImageClasses, check_image_size
from implicitlayer.fewshot._glyph_classes import codepoint_of, faces_of, ink
from implicitlayer.fewshot._splits import load_splits, names_of

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
