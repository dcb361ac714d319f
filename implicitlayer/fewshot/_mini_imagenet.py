"""mini-ImageNet, read from class sheets or from a tree of pictures, in the layouts in which it lies on disks."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from implicitlayer._errors import extra
from implicitlayer.fewshot._cache import Files, cached_images, fingerprint, places_of
from implicitlayer.fewshot._dataset import DatasetError, ImageClasses, check_image_size, load_splits, names_of

# S: side of the pictures made

NUM_PICTURES = 600
SUBFOLDERS = ("", "mini_imagenet", "mini-imagenet", "miniimagenet")
SPLIT_FOLDERS = ("train", "val", "test")
SUFFIXES = (".jpg", ".jpeg", ".png")
SIDE, TILE, ROWS, COLUMNS = 84, 96, 30, 20  # of a sheet: pixels of a picture and of its tile, tiles down and across
# Largest mean difference, in grey levels, between the edge of a picture and its repetition in the rest of the tile.
# JPEG makes it 1 to 3 over a sheet; a sheet that was scaled or has other tiles shows 25 or more.
EDGE_TOLERANCE = 8.0
DAMAGE = (OSError, EOFError, SyntaxError, ValueError)  # what Pillow raises for damaged bytes
SOURCE = (
    "mini-ImageNet may be used for non-commercial research only and is never downloaded. Take the pictures from "
    "ImageNet (ILSVRC 2012, https://image-net.org/download) after the lists in data/miniImagenet of "
    "https://github.com/twitter-research/meta-learning-lstm, and put them there as <wnid>/*.jpg, images/*.jpg with "
    "train.csv, val.csv and test.csv, or sheets/<split>/<wnid>.jpg."
)

# A layout has `files(names)`, the files of each class that is there, in the order of its pictures, and
# `pictures(files)`, the pictures of one class with the files they are from.


class Sheets:
    """``sheets/<split>/<wnid>.jpg``; picture k is tile k, row by row."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "sheets"

    def files(self, names: Sequence[str]) -> dict[str, list[Path]]:
        sheets = {sheet.stem: [sheet] for split in SPLIT_FOLDERS for sheet in (self.folder / split).glob("*.jpg")}
        return {name: sheets[name] for name in names if name in sheets}

    def pictures(self, files: Sequence[Path]) -> Iterator[tuple[Path, Any]]:
        from PIL import Image

        (path,) = files
        sheet = np.asarray(_open(path))
        if sheet.shape != (ROWS * TILE, COLUMNS * TILE, 3):
            raise DatasetError(
                f"{path} has {sheet.shape[1]}x{sheet.shape[0]} pixels and must have {COLUMNS * TILE}x{ROWS * TILE}: "
                f"{ROWS} rows of {COLUMNS} tiles of {TILE}x{TILE}. Get the original sheet again."
            )
        tiles = sheet.reshape(ROWS, TILE, COLUMNS, TILE, 3).swapaxes(1, 2).reshape(-1, TILE, TILE, 3)
        pictures = tiles[:, :SIDE, :SIDE]
        for edge, rest in (
            (pictures[:, :, -1:], tiles[:, :SIDE, SIDE:]),
            (pictures[:, -1:], tiles[:, SIDE:, :SIDE]),
        ):
            difference = float(np.abs(rest.astype(np.int16) - edge).mean())
            if difference > EDGE_TOLERANCE:
                raise DatasetError(
                    f"{path}: beyond {SIDE}x{SIDE} the tiles must repeat the edge of their picture, and differ from it "
                    f"by {difference:.0f} grey levels (at most {EDGE_TOLERANCE:.0f} allowed), so the tiles are not "
                    "where they should be. Get the original sheet again."
                )
        for picture in pictures:
            yield path, Image.fromarray(picture)


class _SeparatePictures:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def pictures(self, files: Sequence[Path]) -> Iterator[tuple[Path, Any]]:
        for path in files:
            yield path, _open(path)


class Tree(_SeparatePictures):
    """``<wnid>/*``, also below ``<split>`` or ``images``."""

    def files(self, names: Sequence[str]) -> dict[str, list[Path]]:
        found = {}
        for name in names:
            for place in ("", *SPLIT_FOLDERS, "images"):
                folder = self.folder / place / name
                if folder.is_dir():
                    names_there = sorted(os.listdir(folder))
                    pictures = [n for n in names_there if n.lower().endswith(SUFFIXES) and not n.startswith(".")]
                    found[name] = [folder / picture for picture in pictures]
                    break
        return found


class List(_SeparatePictures):
    """``images/<filename>``, where ``<split>.csv`` gives the label of every file name."""

    def files(self, names: Sequence[str]) -> dict[str, list[Path]]:
        found: dict[str, list[Path]] = {}
        wanted = set(names)
        for listing in self.listings():
            with listing.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                if not {"filename", "label"} <= set(reader.fieldnames or ()):
                    raise DatasetError(f"{listing} must begin with the line filename,label. Get the original list.")
                for row in reader:
                    if row["label"] in wanted:
                        found.setdefault(row["label"], []).append(self.folder / "images" / str(row["filename"]))
        return found

    def listings(self) -> list[Path]:
        return [path for split in SPLIT_FOLDERS if (path := self.folder / f"{split}.csv").is_file()]


Layout = Sheets | Tree | List


def locate(root: str | os.PathLike[str] | None, names: Sequence[str]) -> tuple[Layout, Files]:
    """The first place that has some of the classes, and the files of each; an error where one is missing."""
    places, hint = places_of(root)
    for place in places:
        for folder in (place / subfolder for subfolder in SUBFOLDERS):
            for layout in _layouts(folder):
                files = layout.files(names)
                if files:
                    return layout, _checked(layout, files, names)
    listed = " or ".join(str(place) for place in places)
    raise FileNotFoundError(f"None of the {len(names)} classes of mini-ImageNet is in {listed}. {SOURCE}{hint}")


def decode(layout: Layout, files: Files, image_size: int) -> Iterator[NDArray[np.uint8]]:
    """The pictures of one class after another, uint8 ``[600, S, S, 3]``."""
    with extra("fewshot", "Reading mini-ImageNet needs pillow"):
        from PIL import Image
    for paths in files.values():
        images = np.empty((NUM_PICTURES, image_size, image_size, 3), dtype=np.uint8)
        for index, (path, picture) in enumerate(layout.pictures(paths)):
            if min(picture.size) < image_size:
                raise DatasetError(
                    f"{path} holds a picture of {picture.size[0]}x{picture.size[1]} pixels, less than "
                    f"image_size={image_size}. Give larger pictures or a smaller image_size: none is enlarged."
                )
            if picture.size != (image_size, image_size):
                picture = picture.resize((image_size, image_size), Image.Resampling.LANCZOS)
            images[index] = np.asarray(picture)
        yield images


def _layouts(folder: Path) -> list[Layout]:
    layouts: list[Layout] = [Sheets(folder)] if (folder / "sheets").is_dir() else []
    if (folder / "images").is_dir() and (listed := List(folder)).listings():
        layouts.append(listed)
    return [*layouts, Tree(folder)]


def _checked(layout: Layout, files: Files, names: Sequence[str]) -> Files:
    missing = [name for name in names if name not in files]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(names)} classes are not in {layout.folder}, the first is {missing[0]}. {SOURCE}"
        )
    for name in names:
        if not isinstance(layout, Sheets) and len(files[name]) != NUM_PICTURES:
            raise DatasetError(
                f"{layout.folder}: class {name} has {len(files[name])} pictures and must have {NUM_PICTURES}. "
                "Complete it from where it was taken."
            )
        for path in files[name]:
            if not path.is_file():
                raise FileNotFoundError(f"{path} is named in the lists and is not there. {SOURCE}")
    return {name: files[name] for name in names}


def _open(path: Path) -> Any:
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except DAMAGE as error:
        raise DatasetError(f"{path} is damaged ({error}). Get it again from where it was taken.") from error


class MiniImageNet(ImageClasses):
    """A hundred classes of ImageNet, 600 colour pictures each, in the split of Ravi and Larochelle: 64 / 16 / 20.

    Pictures of another size are brought to ``image_size`` with Pillow's Lanczos filter, whatever their proportions, as
    in MAML's release; none is enlarged. They are decoded once for each split and kept in the cache folder (the
    training split takes 813 MB there and is never in memory as a whole); a changed source is noticed by names, sizes
    and times of the files. Nothing is downloaded: ImageNet's terms allow non-commercial research and teaching only,
    and you must have agreed to them.

    Args:
        root: folder in one of these layouts; only the classes of the split need to be there.
            Sheets: ``sheets/<split>/<wnid>.jpg``, a class as 30 rows and 20 columns of 96 × 96 tiles, each with an
            84 × 84 picture in its upper left corner and that picture's edges repeated in the rest.
            A tree: ``<wnid>/*.jpg``, ``<split>/<wnid>/*.jpg`` or ``images/<wnid>/*.jpg``, ordered by name.
            A list: ``images/<filename>`` with ``train.csv``, ``val.csv``, ``test.csv`` (``filename,label``) beside it.
            ``None`` looks in ``$IMPLICITLAYER_DATA`` and then in the cache folder. In each place the subfolders
            ``mini_imagenet``, ``mini-imagenet`` and ``miniimagenet`` are tried as well.
        split, cache_dir: as in :class:`Omniglot`.
        image_size: side of the pictures in pixels, at least 8; with sheets at most 84.
        splits: your own lists of WordNet ids (``"n01532829"``) in place of the stored ones.

    Attributes:
        images: uint8, ``[num_classes, 600, image_size, image_size, 3]``.
        class_names: WordNet ids, sorted for the stored splits.

    Raises:
        FileNotFoundError: no mini-ImageNet in any of the places, or classes or pictures are missing.
        DatasetError: a file is damaged, a class has not 600 pictures, a picture is too small, or a sheet has not the
            stated geometry.
        ValueError: unknown split, a class in two splits, bad ``image_size``.
        ImportError: Pillow is missing.

    Source: Vinyals et al., Matching Networks (NeurIPS 2016); the split of Ravi and Larochelle, Optimization as a Model
    for Few-Shot Learning (ICLR 2017), which all later papers use.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        split: str = "train",
        *,
        image_size: int = 84,
        splits: Mapping[str, Sequence[str]] | None = None,
        cache_dir: str | Path | None = None,
    ) -> None:
        check_image_size(image_size)
        names = names_of(load_splits("mini_imagenet") if splits is None else splits, split)
        layout, files = locate(root, names)
        key = ["mini_imagenet", image_size, names, fingerprint(files)]
        name, shape = f"mini_imagenet-{split}-{image_size}", (len(names), NUM_PICTURES, image_size, image_size, 3)
        images = cached_images(name, key, shape, lambda: decode(layout, files, image_size), cache_dir)
        super().__init__(torch.from_numpy(images), names, split=split)
