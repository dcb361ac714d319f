"""mini-ImageNet, read from class sheets or from a tree of pictures; see `_mini_imagenet_files` for the layouts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from implicitlayer.fewshot._cache import cached_images, fingerprint
from implicitlayer.fewshot._dataset import ImageClasses, check_image_size
from implicitlayer.fewshot._mini_imagenet_files import NUM_PICTURES, decode, locate
from implicitlayer.fewshot._splits import load_splits, names_of


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
