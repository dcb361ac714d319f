"""A mini-ImageNet of plain colours in each of its layouts: red tells the class, green and blue the picture."""

import csv
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SPLITS = {"train": ["n00000002", "n00000001"], "test": ["n00000003"]}
CLASS_OF = {name: number for number, name in enumerate(["n00000001", "n00000002", "n00000003"])}


def colours(name: str) -> NDArray[np.uint8]:
    """``[600, 3]``, far enough apart to survive JPEG: neighbours differ by 8 in green or in blue."""
    picture = np.arange(600)
    return np.stack(
        [np.full(600, 60 + 60 * CLASS_OF[name]), 20 + 8 * (picture % 25), 20 + 8 * (picture // 25)], 1
    ).astype(np.uint8)


def write_sheets(root: Path, *splits: str) -> Path:
    """``sheets/<split>/<wnid>.jpg``, of one colour per tile: its edges are repeated by themselves."""
    for split in splits:
        folder = root / "sheets" / split
        folder.mkdir(parents=True)
        for name in SPLITS[split]:
            tiles = colours(name).reshape(30, 20, 3).repeat(96, 0).repeat(96, 1)
            Image.fromarray(tiles).save(folder / f"{name}.jpg", quality=90)
    return root


def write_tree(root: Path, pattern: str = "{name}", *, size: int = 16) -> Path:
    """One folder for each class; ``pattern`` may have ``{split}`` and ``{name}``."""
    for split, names in SPLITS.items():
        for name in names:
            folder = root / pattern.format(split=split, name=name)
            folder.mkdir(parents=True)
            _write_pictures(folder, name, size)
    return root


def write_list(root: Path, *, size: int = 16) -> Path:
    """``images/<filename>`` and one list for each split, in an order that is not that of the names."""
    (root / "images").mkdir(parents=True)
    for split, names in SPLITS.items():
        with (root / f"{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["filename", "label"])
            for name in names:
                written = _write_pictures(root / "images", name, size)
                writer.writerows((filename, name) for filename in reversed(written))
    return root


def _write_pictures(folder: Path, name: str, size: int) -> list[str]:
    filenames = [f"{name}{number:08d}.png" for number in range(600)]
    for filename, colour in zip(filenames, colours(name), strict=True):
        Image.new("RGB", (size + 4, size), tuple(int(level) for level in colour)).save(folder / filename)
    return filenames
