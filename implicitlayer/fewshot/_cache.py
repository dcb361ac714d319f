"""Decoded pictures kept on disk: written whole or not at all, memory-mapped, found by a digest of what made them."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from implicitlayer._errors import ImplicitLayerWarning

FORMAT = 1  # raise it when the meaning of a cached block changes, so that old files are left alone


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/implicitlayer``, or ``~/.cache/implicitlayer`` where that variable is not set."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "implicitlayer"


def cached_images(
    name: str,
    key: Sequence[object],
    shape: tuple[int, ...],
    build: Callable[[], NDArray[np.uint8]],
    *,
    cache_dir: str | Path | None = None,
) -> NDArray[np.uint8]:
    """The uint8 array that ``build()`` makes, from disk when it was made before from the same ``key``.

    Args:
        name: start of the file's name.
        key: everything the array depends on (digest of the source, size, versions), JSON-serialisable.
        shape: what the array must have; a file with another shape or a shortened file is made anew.
        build: makes the array, called only when no good file is there.
        cache_dir: folder of the file; ``None`` means :func:`cache_folder`.

    Returns:
        A copy-on-write memory map (mode ``"c"``): processes share its pages, and writing to it never reaches the disk.
        Where the folder cannot be written, the array itself, after an :class:`ImplicitLayerWarning`.
    """
    folder = cache_folder() if cache_dir is None else Path(cache_dir)
    digest = hashlib.sha256(json.dumps([FORMAT, *key]).encode()).hexdigest()[:16]
    path = folder / f"{name}-{digest}.npy"
    found = _load(path, shape)
    if found is not None:
        return found
    images = build()
    try:
        _save(path, images)
    except OSError as error:
        warnings.warn(
            f"Decoded pictures could not be kept in {folder} ({error}); they will be made again next time. "
            "Give a folder that can be written with cache_dir= or the variable XDG_CACHE_HOME.",
            ImplicitLayerWarning,
            stacklevel=4,
        )
        return images
    found = _load(path, shape)
    return images if found is None else found


def _load(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8] | None:
    try:
        images: NDArray[np.uint8] = np.load(path, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, EOFError):  # absent, shortened (the map would pass the end), or no .npy file
        return None
    return images if images.dtype == np.uint8 and images.shape == shape else None


def _save(path: Path, images: NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            np.save(file, images)
            file.flush()
            os.fsync(file.fileno())  # the name must not appear before the bytes are there
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
