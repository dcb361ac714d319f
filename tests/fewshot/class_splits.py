"""How the stored splits of Omniglot and Glyphs were made: the rule by which they can be checked, and made anew.

NOTE [splits]: a class's place is decided by its name alone. Names are ordered by the SHA-256 of ``"<seed>/<name>"`` and
cut into runs: no file-system order, no library's shuffle and no other part of a program can change it, and any language
can check it. The lists are stored all the same, because a list can be read, compared and cited. (mini-ImageNet's is not
made here: it is the one of Ravi and Larochelle, by WordNet id.)

NOTE [look-alikes]: Latin A, Greek Alpha and Cyrillic A are three code points and one picture. Were they in different
splits, a "new" class would be an old one. So characters are compared as pictures before anything is split: ink cropped
and scaled to one size (o is O), slightly blurred (a pixel's shift does not count), in each regular face that has both,
and in all four quarter turns (turned classes are used in training). In the order of their code points, a character is
kept only if its cosine similarity to every one kept so far stays below MAX_SIMILARITY.

``write_splits()`` writes ``splits/glyphs.json`` anew; the stored file is what users get.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import implicitlayer.fewshot
from implicitlayer.fewshot._glyphs import REGULAR_FACES, coverage, descriptor, faces_of

SEED = 0
OMNIGLOT_SIZES = {"train": 1100, "val": 100, "test": 423}
MAX_SIMILARITY = 0.88  # chosen by eye on pairs of pictures: above it mostly one letter in two scripts, below it two
NUM_VAL, NUM_TEST = 80, 150
SCRIPTS = {"CANADIAN": "CanadianSyllabics", "OLD": "OldItalic", "TURNED": "Latin", "ROMAN": "Latin"}


def hash_split(names: Iterable[str], sizes: Mapping[str, int], *, seed: int = SEED) -> dict[str, list[str]]:
    """Distribute class names over splits by a stable hash (NOTE [splits]): for each split its names, sorted.

    ``sizes`` says how many classes each split gets; they add up to the number of names, which are distinct.

    >>> hash_split(["a", "b", "c", "d"], {"train": 3, "test": 1})
    {'train': ['b', 'c', 'd'], 'test': ['a']}
    """
    order = sorted(names, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())
    if len(set(order)) != len(order):
        raise ValueError(f"names has {len(order) - len(set(order))} repeated entries and must be distinct.")
    if sum(sizes.values()) != len(order):
        raise ValueError(f"sizes={dict(sizes)} add up to {sum(sizes.values())} and must add up to {len(order)} names.")
    result, start = {}, 0
    for split, size in sizes.items():
        result[split] = sorted(order[start : start + size])
        start += size
    return result


def class_name(codepoint: int) -> str:
    """``"<Script>/U+XXXX"``, as in ``"Greek/U+03B1"``."""
    first = unicodedata.name(chr(codepoint)).split()[0]
    return f"{SCRIPTS.get(first, first.title())}/U+{codepoint:04X}"


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
        f"first {sizes['train']} train, the next {NUM_VAL} val, the last {NUM_TEST} test "
        "(tests/fewshot/class_splits.py)"
    )
    return {"dataset": "glyphs", "seed": SEED, "rule": rule, **hash_split(names, sizes)}


def write_splits() -> None:
    """Write ``splits/glyphs.json``; a change of it changes the dataset and is an entry in the changelog."""
    target = Path(implicitlayer.fewshot.__file__).parent / "splits" / "glyphs.json"
    target.write_text(json.dumps(make_splits(), indent=1) + "\n", encoding="utf-8")
