"""From labelled pictures one by one to one block, grouped by class."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from implicitlayer._errors import extra
from implicitlayer.base._tree import check_integer
from implicitlayer.fewshot._dataset import NUM_COLOURS, DatasetError, check_image_size

Names = Mapping[Any, str] | Sequence[str] | None


def group_by_label(
    dataset: Any, class_names: Names, image_size: int | None, min_examples: int
) -> tuple[Tensor, list[str], list[int]]:
    """Block ``[C, E, H, W]`` or ``[C, E, H, W, 3]``, names and counts; see ``ImageClasses.from_dataset``.

    E is the largest count; the places of a smaller class that are left over hold zeros.
    """
    _check_arguments(dataset, class_names, image_size, min_examples)
    by_label: dict[str | int, list[NDArray[np.uint8]]] = {}
    for label, picture in _items(dataset, image_size):
        by_label.setdefault(label, []).append(picture)
    num_classes = len(by_label)
    for label in [label for label, pictures in by_label.items() if len(pictures) < min_examples]:
        del by_label[label]
    if not by_label:
        raise ValueError(
            f"None of the {num_classes} classes in the {len(dataset)} items of dataset has "
            f"min_examples={min_examples} pictures. Lower it or give more pictures."
        )
    labels = sorted(by_label, key=lambda label: (isinstance(label, str), label))
    names, counts = _names(labels, class_names), [len(by_label[label]) for label in labels]
    images = np.zeros((len(labels), max(counts), *picture.shape), dtype=np.uint8)
    for row, label in enumerate(labels):
        images[row, : counts[row]] = by_label.pop(label)  # a class's pictures are freed once they are in the block
    return torch.from_numpy(images), names, counts


def _check_arguments(dataset: Any, class_names: Names, image_size: int | None, min_examples: int) -> None:
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise TypeError(
            f"dataset of type {type(dataset).__name__} must have a length and items by number. An iterable dataset has "
            "neither: put its items into a list first."
        )
    check_integer("min_examples", min_examples, 1)
    if image_size is not None:
        check_image_size(image_size)
    if not isinstance(class_names, Mapping | Sequence | None) or isinstance(class_names, str):
        raise TypeError(
            f"class_names of type {type(class_names).__name__} must be a mapping from labels to names, or a list with "
            "integer labels as positions."
        )


def _items(dataset: Any, image_size: int | None) -> Iterator[tuple[str | int, NDArray[np.uint8]]]:
    """Label and picture of every item; all pictures have one shape."""
    shape: tuple[int, ...] | None = None
    for index in range(len(dataset)):
        item: Any = (None, None)
        try:
            item = dataset[index]
            if not isinstance(item, tuple | list) or len(item) != 2:
                raise TypeError(
                    f"dataset[{index}] is a {type(item).__name__} and must be a pair (picture, label). "
                    "Wrap the dataset in one whose items are such pairs."
                )
            picture = _as_bytes(item[0], index)  # a lazy Pillow image is read here
        except OSError as error:
            name = getattr(item[0], "filename", "") or getattr(error, "filename", None) or ""
            where = f"dataset[{index}]{f' ({name})' if name else ''} cannot be read: {error}."
            raise DatasetError(f"{where} Get the file again, or leave the item out.") from error
        if image_size is not None:
            picture = _resized(picture, image_size)
        if shape not in (None, picture.shape):
            raise ValueError(
                f"dataset[{index}] has a picture of shape {picture.shape}, those before have {shape}; all must "
                "have one. Pass image_size= for one size, and convert all pictures to grey or all to colour."
            )
        shape = picture.shape
        yield _as_label(item[1], index), picture


def _as_bytes(picture: Any, index: int) -> NDArray[np.uint8]:
    """uint8 ``[H, W]`` or ``[H, W, 3]`` from a tensor (channels first), an array (channels last) or a Pillow image."""
    if isinstance(picture, Tensor):
        values = picture.detach().cpu()
        values = values.float() if values.is_floating_point() else values  # NumPy has no bfloat16
        array = np.asarray(values.permute(1, 2, 0) if values.ndim == 3 else values)
        layout = "a tensor [H, W], [1, H, W] or [3, H, W]"
    else:
        mode = getattr(picture, "mode", None)
        if mode is not None and picture.has_transparency_data:
            picture = _on_white(picture, index)
            mode = picture.mode
        if mode is not None and not mode.startswith(("I", "F")):  # these have more levels: a conversion would clip them
            picture = picture.convert("L" if mode in ("1", "L", "LA") else "RGB")
        array = np.asarray(picture)
        layout = "an array [H, W], [H, W, 1] or [H, W, 3], or a Pillow image"
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if (array.ndim != 2 and (array.ndim != 3 or array.shape[2] != NUM_COLOURS)) or 0 in array.shape:
        shape = tuple(picture.shape) if isinstance(picture, Tensor) else np.asarray(picture).shape
        raise ValueError(f"dataset[{index}] has a picture of shape {shape} and must have {layout}.")
    if array.dtype == np.uint8:
        return np.asarray(array, dtype=np.uint8)
    least, most = float(array.min()), float(array.max())
    if not np.issubdtype(array.dtype, np.floating) or not (least >= 0 and most <= 1):  # written so that NaN is refused
        raise ValueError(
            f"dataset[{index}] has a picture of {array.dtype} with values in [{least:.4g}, {most:.4g}] "
            "and must be uint8, or floating in [0, 1]. Leave normalisation to the network's input."
        )
    levels: NDArray[np.uint8] = np.rint(array * 255).astype(np.uint8)
    return levels


def _on_white(picture: Any, index: int) -> Any:
    """The Pillow image on white paper, grey where it was; colours alone are arbitrary where nothing is to be seen."""
    from PIL import Image

    layers = picture.convert("RGBA")
    paper = Image.new("RGBA", layers.size, (255, 255, 255, 255))
    seen = Image.alpha_composite(paper, layers).convert("L" if picture.mode in ("1", "L", "LA") else "RGB")
    flat = np.asarray(seen)
    if flat.size and flat.min() == 255 and np.asarray(layers)[..., 3].any():
        raise ValueError(
            f"dataset[{index}] has a picture in white on transparent, of which nothing is left on white paper. "
            "Put it on dark paper in the dataset."
        )
    return seen


def _resized(picture: NDArray[np.uint8], image_size: int) -> NDArray[np.uint8]:
    with extra("fewshot", "Changing the size of pictures needs pillow"):
        from PIL import Image
    if picture.shape[:2] == (image_size, image_size):
        return picture
    resized = Image.fromarray(picture).resize((image_size, image_size), Image.Resampling.LANCZOS)
    return np.asarray(resized, dtype=np.uint8)


def _as_label(label: Any, index: int) -> str | int:
    if isinstance(label, Tensor | np.generic | np.ndarray) and np.ndim(label) == 0:
        label = label.item()
    if not isinstance(label, str | int):
        raise TypeError(f"dataset[{index}] has the label {label!r} and must have an integer or a string.")
    return label


def _names(labels: Sequence[str | int], class_names: Names) -> list[str]:
    """The name of each label, each its own."""
    found: dict[str, str | int] = {}
    for label in labels:
        name: str | None = str(label)
        if isinstance(class_names, Mapping):
            name = class_names.get(label)
        elif class_names is not None:
            name = class_names[label] if isinstance(label, int) and 0 <= label < len(class_names) else None
        if name is None:
            raise ValueError(
                f"class_names has no name for the label {label!r}. Give a mapping from labels to names, or a sequence "
                "with integer labels as positions."
            )
        if name in found:
            raise ValueError(
                f"The labels {[found[name], label]} have the name {name!r} each, and every class needs its own. Give "
                "class_names without repetition, or labels of one type."
            )
        found[name] = label
    return list(found)
