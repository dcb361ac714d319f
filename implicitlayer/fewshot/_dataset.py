"""What every few-shot image dataset is: one block of pictures, grouped by class, and a name for each class."""

# C: classes, E: examples of each, H, W: pixels

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from implicitlayer._errors import ImplicitLayerError

NUM_COLOURS = 3


class DatasetError(ImplicitLayerError, RuntimeError):
    """Files of a dataset are damaged, incomplete or could not be fetched; the message names the file."""


class ImageClasses:
    """Pictures grouped by class, in memory as one block; what :class:`EpisodeSampler` draws from.

    Args:
        images: uint8; grey pictures ``[C, E, H, W]``, where ink is high and paper is 0, or colour pictures
            ``[C, E, H, W, 3]``, red, green, blue.
        class_names: one distinct name for each class, in the order of ``images``.
        split: what the classes are for, such as ``"train"``.
        counts: how many pictures each class has, 1 to E, where they differ; those beyond are filling and never drawn.
            ``None``: E of every class. As an attribute: int64 ``[C]``.

    Raises:
        ValueError: ``images`` has another dtype or rank, or the names or counts do not fit it.

    Example:
        >>> ImageClasses(torch.zeros(2, 9, 84, 84, 3, dtype=torch.uint8), ["a", "b"], counts=[9, 4])
        ImageClasses(split='all', num_classes=2, num_examples=4...9, image_size=84x84, colour)
    """

    def __init__(
        self,
        images: Tensor,
        class_names: Sequence[str],
        *,
        split: str = "all",
        counts: Sequence[int] | None = None,
    ) -> None:
        colour = images.ndim == 5 and images.shape[4] == NUM_COLOURS
        if images.dtype != torch.uint8 or not (images.ndim == 4 or colour):
            raise ValueError(
                f"images with dtype {images.dtype} and shape {tuple(images.shape)} must be uint8 of shape "
                "[num_classes, num_examples, H, W], or [num_classes, num_examples, H, W, 3] for colour. Group the "
                "pictures by class and scale ink to 255, paper to 0."
            )
        if len(class_names) != images.shape[0] or len(set(class_names)) != len(class_names):
            raise ValueError(
                f"class_names has {len(class_names)} entries, {len(set(class_names))} of them distinct, and must give "
                f"each of the {images.shape[0]} classes its own name."
            )
        most = images.shape[1]
        if counts is not None and (len(counts) != len(images) or not all(1 <= count <= most for count in counts)):
            raise ValueError(
                f"counts={list(counts)} must give each of the {images.shape[0]} classes a number from 1 to {most}. "
                "Leave out classes without pictures."
            )
        self.images = images
        self.class_names = list(class_names)
        self.split = split
        given = [most] * len(images) if counts is None else list(counts)
        self.counts = torch.tensor(given, dtype=torch.int64, device="cpu")

    @staticmethod
    def from_dataset(
        dataset: Any,
        *,
        class_names: Mapping[Any, str] | Sequence[str] | None = None,
        split: str = "all",
        image_size: int | None = None,
        min_examples: int = 1,
    ) -> ImageClasses:
        """Group the pictures of any labelled ``torch.utils.data.Dataset`` by class.

        Reads every item once, in order, and keeps all pictures in memory as bytes. Classes are ordered by label. They
        may have different numbers of pictures: a task draws from those that are there.

        Args:
            dataset: has ``len(dataset)`` and ``dataset[i]`` = (picture, label). The picture is a tensor ``[H, W]``,
                ``[1, H, W]`` or ``[3, H, W]``, an array ``[H, W]``, ``[H, W, 1]`` or ``[H, W, 3]``, or a Pillow image;
                numbers are uint8, or floating in [0, 1]. A Pillow image with transparency is put on white paper, as a
                scan would be. The label is an integer or a string. Random transforms of the dataset act once, here.
            class_names: name of each label, as a mapping or as a sequence with integer labels as positions;
                ``None`` takes ``str(label)``.
            split: what the classes are for.
            image_size: bring all pictures to this side in pixels with Pillow's Lanczos filter, at least 8;
                ``None`` leaves them as they are, and then all must have one size.
            min_examples: leave out classes with fewer pictures.

        Raises:
            TypeError: no map-style dataset, an item is no pair of picture and label, or names are no mapping or list.
            ValueError: a picture has other numbers or another size; a label has no name, or two have one; no class is
                left. The message names the item.
            DatasetError: an item cannot be read (a truncated file, say); the message names it.
            ImportError: ``image_size`` is given and Pillow is missing.
        """
        from implicitlayer.fewshot._from_dataset import group_by_label

        images, names, counts = group_by_label(dataset, class_names, image_size, min_examples)
        return ImageClasses(images, names, split=split, counts=counts)

    @property
    def num_classes(self) -> int:
        """How many classes this split has."""
        return self.images.shape[0]

    @property
    def num_examples(self) -> int:
        """How many pictures each class has; the fewest that one has, where they differ."""
        return int(self.counts.min()) if len(self) else 0

    @property
    def num_channels(self) -> int:
        """1 for grey pictures, 3 for colour: the ``in_channels`` of a network."""
        return NUM_COLOURS if self.images.ndim == 5 else 1

    def __len__(self) -> int:
        return self.num_classes

    def __repr__(self) -> str:
        height, width = self.images.shape[2:4]
        least, most = self.num_examples, int(self.counts.max()) if len(self) else 0
        return (
            f"{type(self).__name__}(split={self.split!r}, num_classes={self.num_classes}, "
            f"num_examples={least if least == most else f'{least}...{most}'}, image_size={height}x{width}"
            f"{', colour' if self.num_channels > 1 else ''})"
        )


def check_image_size(image_size: int) -> None:
    if isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < 8:
        raise ValueError(
            f"image_size={image_size!r} must be an integer of at least 8 pixels. Omniglot papers use 28, "
            "mini-ImageNet papers 84."
        )


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
