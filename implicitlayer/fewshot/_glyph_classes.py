"""How the classes of :class:`Glyphs` are drawn: faces of the fonts that matplotlib ships, and a letter's ink in them.

Which letters are classes, and in which split each is, is stored in ``splits/glyphs.json``.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from implicitlayer.base._optional import extra

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


def descriptor(codepoint: int, face: str, side: int = 24) -> NDArray[np.float32] | None:
    """A blurred picture ``[side + 4, side + 4]`` of unit norm: equal letters have equal ones, whatever their size."""
    picture = ink(codepoint, face)
    if picture is None:
        return None
    from PIL import Image

    small = np.asarray(picture.resize((side, side), Image.Resampling.BOX), dtype=np.float32)
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
