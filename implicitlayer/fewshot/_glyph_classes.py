"""Which characters are classes of :class:`Glyphs`: letters of many scripts, with everything that looks alike merged.

``write_splits()`` writes ``splits/glyphs.json`` anew; the stored file is what users get.

NOTE [look-alikes]: Latin A, Greek Alpha and Cyrillic A are three code points and one picture. Were they in different
splits, a "new" class would be an old one. So characters are compared as pictures before anything is split: ink cropped
and scaled to one size (o is O), slightly blurred (a pixel's shift does not count), in each regular face that has both,
and in all four quarter turns (turned classes are used in training). In the order of their code points, a character is
kept only if its cosine similarity to every one kept so far stays below MAX_SIMILARITY.
"""

from __future__ import annotations

import functools
import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from implicitlayer.base._optional import extra
from implicitlayer.fewshot._splits import SEED, hash_split

# Regular and bold of each family. Italics are left out: their cursive forms (Cyrillic te as m) are other characters'.
REGULAR_FACES = ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono", "STIXGeneral")
FACES = (*REGULAR_FACES, "DejaVuSans-Bold", "DejaVuSerif-Bold", "DejaVuSansMono-Bold", "STIXGeneralBol")
FONT_SIZE = 96  # pixels to the em
MAX_SIMILARITY = 0.88  # chosen by eye on pairs of pictures: above it mostly one letter in two scripts, below it two
MIN_FACE_SIMILARITY = 0.5  # a face whose picture of a letter differs more than this from DejaVu Sans' draws another one
NUM_VAL, NUM_TEST = 80, 150
SCRIPTS = {"CANADIAN": "CanadianSyllabics", "OLD": "OldItalic", "TURNED": "Latin", "ROMAN": "Latin"}


def class_name(codepoint: int) -> str:
    """``"<Script>/U+XXXX"``, as in ``"Greek/U+03B1"``."""
    first = unicodedata.name(chr(codepoint)).split()[0]
    return f"{SCRIPTS.get(first, first.title())}/U+{codepoint:04X}"


def codepoint_of(name: str) -> int:
    """The code point in a class name."""
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


def similarity(codepoints: Sequence[int]) -> NDArray[np.float32]:
    """``[n, n]``: largest cosine over regular faces and quarter turns (NOTE [look-alikes]); 0 on the diagonal."""
    result = np.zeros((len(codepoints),) * 2, dtype=np.float32)
    for face in REGULAR_FACES:
        drawn = [(i, descriptor(c, face)) for i, c in enumerate(codepoints) if face in faces_of(c)]
        rows = np.array([i for i, d in drawn if d is not None])
        units = np.stack([d for _, d in drawn if d is not None])
        flat = units.reshape(len(units), -1)
        for quarter in range(4):
            turned = np.rot90(units, quarter, (1, 2)).reshape(len(units), -1)
            cosine = flat @ turned.T
            result[np.ix_(rows, rows)] = np.maximum(result[np.ix_(rows, rows)], np.maximum(cosine, cosine.T))
    np.fill_diagonal(result, 0)
    return result


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


def candidates() -> list[int]:
    """Letters in the regular and bold sans faces, without composed ones (é is e and an accent) and formula letters."""
    found = []
    for codepoint in sorted(coverage("DejaVuSans") & coverage("DejaVuSans-Bold")):
        character = chr(codepoint)
        if (
            unicodedata.category(character) in ("Lu", "Ll", "Lo")
            and unicodedata.normalize("NFKD", character) == character
            and not unicodedata.name(character, "MATHEMATICAL").startswith("MATHEMATICAL")
            and len(faces_of(codepoint)) >= 2
        ):
            found.append(codepoint)
    return found


def select_classes() -> list[int]:
    """The code points kept when look-alikes are merged."""
    codepoints = candidates()
    close = similarity(codepoints) >= MAX_SIMILARITY
    kept: list[int] = []
    for index in range(len(codepoints)):
        if not close[index, kept].any():
            kept.append(index)
    return [codepoints[index] for index in kept]


def make_splits() -> dict[str, Any]:
    """The content of ``splits/glyphs.json``."""
    names = [class_name(codepoint) for codepoint in select_classes()]
    sizes = {"train": len(names) - NUM_VAL - NUM_TEST, "val": NUM_VAL, "test": NUM_TEST}
    rule = (
        f"look-alikes merged at a similarity of {MAX_SIMILARITY}; then names sorted by SHA-256 of '<seed>/<name>': the "
        f"first {sizes['train']} train, the next {NUM_VAL} val, the last {NUM_TEST} test (_glyph_classes.py)"
    )
    return {"dataset": "glyphs", "seed": SEED, "rule": rule, **hash_split(names, sizes)}


def write_splits() -> None:
    """Write ``splits/glyphs.json``; a change of it changes the dataset and is an entry in the changelog."""
    target = Path(__file__).parent / "splits" / "glyphs.json"
    target.write_text(json.dumps(make_splits(), indent=1) + "\n", encoding="utf-8")
