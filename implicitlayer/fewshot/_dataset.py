"""What every few-shot image dataset is: one block of pictures, grouped by class, and a name for each class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from implicitlayer._errors import ImplicitLayerError
from implicitlayer.fewshot._cache import cached_images


class DatasetError(ImplicitLayerError, RuntimeError):
    """Files of a dataset are damaged, incomplete or could not be fetched; the message names the file."""


class ImageClasses:
    """Pictures grouped by class, in memory as one block; what :class:`EpisodeSampler` draws from.

    Args:
        images: uint8, ``[num_classes, num_examples, H, W]``; ink is high, paper is 0.
        class_names: one distinct name for each class, in the order of ``images``.
        split: what the classes are for, such as ``"train"``.

    Raises:
        ValueError: ``images`` has another dtype or rank, or the names do not fit it.

    Example:
        >>> classes = ImageClasses(torch.zeros(3, 20, 28, 28, dtype=torch.uint8), ["a", "b", "c"], split="val")
        >>> classes
        ImageClasses(split='val', num_classes=3, num_examples=20, image_size=28x28)
    """

    def __init__(self, images: Tensor, class_names: Sequence[str], *, split: str = "all") -> None:
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ValueError(
                f"images with dtype {images.dtype} and shape {tuple(images.shape)} must be uint8 of shape "
                "[num_classes, num_examples, H, W]. Group the pictures by class and scale ink to 255, paper to 0."
            )
        if len(class_names) != images.shape[0] or len(set(class_names)) != len(class_names):
            raise ValueError(
                f"class_names has {len(class_names)} entries, {len(set(class_names))} of them distinct, and must give "
                f"each of the {images.shape[0]} classes its own name."
            )
        self.images = images
        self.class_names = list(class_names)
        self.split = split

    @property
    def num_classes(self) -> int:
        """How many classes this split has."""
        return self.images.shape[0]

    @property
    def num_examples(self) -> int:
        """How many pictures each class has."""
        return self.images.shape[1]

    def __len__(self) -> int:
        return self.num_classes

    def __repr__(self) -> str:
        height, width = self.images.shape[2:]
        return (
            f"{type(self).__name__}(split={self.split!r}, num_classes={self.num_classes}, "
            f"num_examples={self.num_examples}, image_size={height}x{width})"
        )


def load_block(
    name: str,
    key: Sequence[object],
    shape: tuple[int, int, int, int],
    build: Callable[[], Any],
    cache_dir: str | Path | None,
) -> Tensor:
    """The cached block of pictures as a tensor; it shares the pages of the cache file, and writes stay private."""
    return torch.from_numpy(cached_images(name, key, shape, build, cache_dir=cache_dir))


def check_image_size(image_size: int) -> None:
    """Refuse what is no picture size."""
    if isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < 8:
        raise ValueError(f"image_size={image_size!r} must be an integer of at least 8 pixels. Omniglot papers use 28.")


def need_extra(package: str, purpose: str) -> ImportError:
    """The error for an optional package that is not installed."""
    return ImportError(f"{purpose} needs {package}, which is not installed: pip install 'implicitlayer[fewshot]'")
