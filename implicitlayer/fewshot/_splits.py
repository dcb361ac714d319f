"""Which class belongs to which split: stored by name in this package, fixed before any example or task is drawn.

NOTE [splits]: a class's place is decided by its name alone. Names are ordered by the SHA-256 of ``"<seed>/<name>"`` and
cut into runs: no file-system order, no library's shuffle and no other part of a program can change it, and any language
can check it. The lists are stored all the same, because a list can be read, compared and cited. (mini-ImageNet's is not
made here: it is the one of Ravi and Larochelle, by WordNet id.)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources

SPLIT_NAMES = ("train", "val", "test")
OMNIGLOT_SIZES = {"train": 1100, "val": 100, "test": 423}
SEED = 0


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


def load_splits(dataset: str) -> dict[str, list[str]]:
    """The stored class names of each split of ``"omniglot"``, ``"glyphs"`` or ``"mini_imagenet"``."""
    folder = resources.files("implicitlayer.fewshot") / "splits"
    stored = json.loads((folder / f"{dataset}.json").read_text(encoding="utf-8"))
    return {split: list(stored[split]) for split in SPLIT_NAMES}


def names_of(splits: Mapping[str, Sequence[str]], split: str) -> list[str]:
    """The names of one split, after a check that no class is in two of them."""
    if split not in splits:
        raise ValueError(f"split={split!r} must be one of {', '.join(map(repr, splits))}.")
    place: dict[str, str] = {}
    for key, names in splits.items():
        for name in names:
            if name in place:
                raise ValueError(
                    f"Class {name!r} is in split {place[name]!r} and again in {key!r}. A class may occur only once: "
                    "what a method was trained on says nothing about new classes."
                )
            place[name] = key
    return list(splits[split])
