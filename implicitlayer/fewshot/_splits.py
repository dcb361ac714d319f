"""Which class belongs to which split: stored by name in this package, fixed before any example or task is drawn."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources

SPLIT_NAMES = ("train", "val", "test")


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
