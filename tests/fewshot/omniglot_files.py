"""A small Omniglot of straight strokes, as folders or as the two zips: layout and formats of the real one."""

import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

SPLITS = {"train": ["Aa/character01", "Aa/character02", "Zz_(y)/character01"], "test": ["Zz_(y)/character02"]}
PART_OF = {"Aa": "images_background", "Zz_(y)": "images_evaluation"}


def write_tree(root: Path, num_drawers: int = 20) -> Path:
    """images_background/Aa and images_evaluation/Zz_(y), two characters each; a stroke's row tells the drawing."""
    number = 0
    for names in SPLITS.values():
        for name in names:
            number += 1
            folder = root / PART_OF[name.split("/")[0]] / name
            folder.mkdir(parents=True)
            for drawer in range(num_drawers):
                paper = np.ones((105, 105), dtype=bool)
                paper[4 * drawer + 2 : 4 * drawer + 8, 20 * number : 20 * number + 15] = False  # ink is 0, as upstream
                Image.fromarray(paper).save(folder / f"{number:04d}_{drawer + 1:02d}.png")
    return root


def write_zips(root: Path, tree: Path) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for part in set(PART_OF.values()):
        with zipfile.ZipFile(root / f"{part}.zip", "w") as archive:
            for file in sorted((tree / part).rglob("*.png")):
                archive.write(file, file.relative_to(tree).as_posix())
            archive.writestr(f"__MACOSX/{part}/Aa/character01/._0001_01.png", b"no picture")
    return root
