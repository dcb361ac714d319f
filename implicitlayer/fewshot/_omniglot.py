"""Omniglot, read from its two zip archives or from the extracted folders."""

from __future__ import annotations

import hashlib
import io
import os
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from implicitlayer._errors import extra
from implicitlayer.fewshot._cache import cached_images, fingerprint, places_of
from implicitlayer.fewshot._dataset import DatasetError, ImageClasses, check_image_size, load_splits, names_of

# The MD5 sums are those that torchvision.datasets.Omniglot checks; the authors publish none.
PARTS = {
    "images_background": "md5:68d2efa1b9178cc56df9314c21c6e718",
    "images_evaluation": "md5:6b91aef0f799c5bb55b94e3f2daec811",
}
NUM_DRAWERS = 20  # each character was drawn once by each of 20 people
SIDE = 105  # pixels
URL = "https://github.com/brendenlake/omniglot/raw/master/python/"
RETRIES = 2  # of a download, after 1 and 2 seconds
# "python" is where a clone of the authors' repository has the archives, "omniglot-py" where torchvision puts them.
SUBFOLDERS = ("", "omniglot", "python", "omniglot-py")
# What zipfile, zlib and Pillow raise for damaged bytes; a bad PNG chunk is a SyntaxError to Pillow.
DAMAGE = (OSError, EOFError, SyntaxError, zipfile.BadZipFile, zlib.error)
REMEDY = (
    "Put images_background.zip and images_evaluation.zip (or the extracted folders) there, or fetch them, 15 MB, by "
    "il.fewshot.Omniglot({root}download=True) in Python."
)


class Omniglot(ImageClasses):
    """Handwritten characters of 50 alphabets, 20 drawings each: 1,623 classes, split 1100 / 100 / 423 by stored names.

    Pictures are inverted (ink 255, paper 0) and brought from 105 × 105 to ``image_size`` with Pillow's Lanczos filter,
    widened to the reduction so that no stroke falls between samples: the filter of the MAML and iMAML releases, so
    that figures stay comparable. They are decoded once for each split and kept in the cache folder; a changed source
    is noticed (by SHA-256 of an archive; by names, sizes and times of extracted files).

    Args:
        root: folder with ``images_background.zip`` and ``images_evaluation.zip``, or with the same folders extracted
            (``images_background/<Alphabet>/characterNN/*.png``; alphabets directly in ``root`` are found too).
            ``None`` looks in ``$IMPLICITLAYER_DATA`` and then in the cache folder's ``omniglot``. In each place the
            subfolders ``omniglot``, ``python`` and ``omniglot-py`` are tried as well.
        split: ``"train"``, ``"val"`` or ``"test"``, or a key of ``splits``.
        image_size: side of the pictures in pixels, at least 8.
        splits: your own lists of class names (``"Greek/character01"``) in place of the stored ones.
        download: fetch archives that are missing, 15 MB, from the authors' repository. Never done unasked.
        cache_dir: folder for the decoded pictures; default: that of the system for caches,
            on Linux ``$XDG_CACHE_HOME/implicitlayer`` or ``~/.cache/implicitlayer``.

    Attributes:
        images: uint8, ``[num_classes, 20, image_size, image_size]``.
        class_names: ``"<Alphabet>/characterNN"``, sorted for the stored splits.

    Raises:
        FileNotFoundError: no Omniglot in any of the places, or classes are missing.
        DatasetError: an archive or a picture is damaged, a class has not 20 drawings, or a download failed.
        ValueError: unknown split, a class in two splits, bad ``image_size``.

    Source: Lake, Salakhutdinov, Tenenbaum, Human-level concept learning through probabilistic program induction,
    Science 350 (2015), doi:10.1126/science.aab3050. MAML's 1,100 / 100 / 423 counts; its own lists depend on the order
    of a file system, so they are not used.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        split: str = "train",
        *,
        image_size: int = 28,
        splits: Mapping[str, Sequence[str]] | None = None,
        download: bool = False,
        cache_dir: str | Path | None = None,
    ) -> None:
        check_image_size(image_size)
        names = names_of(load_splits("omniglot") if splits is None else splits, split)
        sources = _find_sources(root, download=download)
        key = ["omniglot", image_size, names, [source.fingerprint(names) for source in sources]]
        shape = (len(names), NUM_DRAWERS, image_size, image_size)
        name = f"omniglot-{split}-{image_size}"
        images = cached_images(name, key, shape, lambda: _decode(sources, names, image_size), cache_dir)
        super().__init__(torch.from_numpy(images), names, split=split)


class _Archive:
    """One zip; entries are ``images_background/<Alphabet>/characterNN/NNNN_MM.png``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._zip: zipfile.ZipFile | None = None

    def fingerprint(self, names: Sequence[str]) -> str:
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    def drawings(self) -> dict[str, list[str]]:
        try:
            self._zip = zipfile.ZipFile(io.BytesIO(self.path.read_bytes()))
        except zipfile.BadZipFile as error:
            raise DatasetError(f"{self.path} is no complete zip archive ({error}). {_again(self.path)}") from error
        found: dict[str, list[str]] = {}
        for entry in self._zip.namelist():
            match = re.search(r"([^/]+/character\d+)/(?!\.)[^/]+\.png$", entry)  # "._x.png" are macOS leftovers
            if match and not entry.startswith("__MACOSX"):
                found.setdefault(match[1], []).append(entry)
        return found

    def read(self, entry: str) -> bytes:
        assert self._zip is not None
        return self._zip.read(entry)


class _Tree:
    """One folder of alphabets: ``<Alphabet>/characterNN/NNNN_MM.png``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def fingerprint(self, names: Sequence[str]) -> str:
        return fingerprint({name: sorted((self.path / name).glob("*")) for name in names})

    def drawings(self) -> dict[str, list[str]]:
        found = {}
        for folder in sorted(self.path.glob("*/character*")):
            name = f"{folder.parent.name}/{folder.name}"
            found[name] = [f"{name}/{file.name}" for file in folder.glob("*.png") if not file.name.startswith(".")]
        return found

    def read(self, entry: str) -> bytes:
        return (self.path / entry).read_bytes()


_Source = _Archive | _Tree


def _find_sources(root: str | os.PathLike[str] | None, *, download: bool) -> list[_Source]:
    places, hint = places_of(root, "omniglot")
    for place in places:
        for folder in (place / subfolder for subfolder in SUBFOLDERS):
            sources = _sources_in(folder)
            if not sources:
                continue
            if download and len(sources) < len(PARTS) and sources[0].path != folder:
                _download(folder)  # the other part, beside the one that is there
                return _sources_in(folder)
            return sources
    if download:
        _download(places[0])
        return _sources_in(places[0])
    listed = " or ".join(str(place) for place in places)
    remedy = REMEDY.format(root="" if root is None else f"{str(root)!r}, ")
    raise FileNotFoundError(f"No Omniglot in {listed}. {remedy}{hint}")


def _sources_in(folder: Path) -> list[_Source]:
    sources: list[_Source] = []
    for part in PARTS:
        trees = [folder / part / part, folder / part]  # some unzip programs add a folder of the archive's name
        tree = next((tree for tree in trees if next(tree.glob("*/character*"), None)), None)
        if tree is not None:
            sources.append(_Tree(tree))
        elif (folder / f"{part}.zip").is_file():
            sources.append(_Archive(folder / f"{part}.zip"))
    if not sources and next(folder.glob("*/character*"), None):
        sources.append(_Tree(folder))
    return sources


def _decode(sources: Sequence[_Source], names: Sequence[str], image_size: int) -> NDArray[np.uint8]:
    with extra("fewshot", "Reading Omniglot needs pillow"):
        from PIL import Image
    place: dict[str, tuple[_Source, list[str]]] = {}
    for source in sources:
        for name, entries in source.drawings().items():
            place.setdefault(name, (source, sorted(entries)))
    missing = [name for name in names if name not in place]
    if missing:
        where = ", ".join(str(source.path) for source in sources)
        raise FileNotFoundError(
            f"{len(missing):,} of {len(names):,} classes are not in {where}, the first is {missing[0]}. "
            f"Both {' and '.join(PARTS)} are needed. {REMEDY.format(root='root, ')}"
        )
    images = np.empty((len(names), NUM_DRAWERS, image_size, image_size), dtype=np.uint8)
    for index, name in enumerate(names):
        source, entries = place[name]
        if len(entries) != NUM_DRAWERS:
            raise DatasetError(
                f"{source.path}: class {name} has {len(entries)} drawings and must have {NUM_DRAWERS}. "
                f"{_again(source.path)}"
            )
        for drawer, entry in enumerate(entries):
            try:
                # A 1-bit picture must become grey first: Pillow resizes mode "1" by taking the nearest pixel.
                picture = Image.open(io.BytesIO(source.read(entry))).convert("L")
            except DAMAGE as error:
                raise DatasetError(f"{source.path}: {entry} is damaged ({error}). {_again(source.path)}") from error
            if picture.size != (SIDE, SIDE):
                raise DatasetError(
                    f"{source.path}: {entry} has {picture.size[0]}x{picture.size[1]} pixels and must have "
                    f"{SIDE}x{SIDE}: give the original pictures, they are resized here."
                )
            small = picture.resize((image_size, image_size), Image.Resampling.LANCZOS)
            images[index, drawer] = 255 - np.asarray(small)
    return images


def _again(path: Path) -> str:
    if path.suffix == ".zip":
        return f"Delete {path.name} and get it again, from {URL}{path.name} or with download=True."
    return "Extract the archive again."


def _download(target: Path) -> None:
    with extra("fewshot", "Downloading Omniglot needs pooch"):
        import pooch
    files = {f"{part}.zip": md5 for part, md5 in PARTS.items() if not (target / part).is_dir()}
    server = pooch.create(target, URL, registry=files, retry_if_failed=RETRIES)
    for file in files:
        if not (target / file).exists():
            try:
                server.fetch(file, progressbar=True)
            except (OSError, ValueError) as error:  # requests' errors are OSErrors; a wrong sum is a ValueError
                raise DatasetError(
                    f"{URL}{file} could not be downloaded ({error}). Get it where there is a network and put it into "
                    f"{target}."
                ) from error
