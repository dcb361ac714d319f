"""Decoded pictures kept on disk: written whole or not at all, memory-mapped, found by a digest of what made them."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from implicitlayer._errors import ImplicitLayerWarning, extra

FORMAT = 1  # raise it when the meaning of a cached block changes, so that old files are left alone

Files = Mapping[str, Sequence[Path]]  # of each class


def cache_folder() -> Path:
    """The system's folder for caches: on Linux ``$XDG_CACHE_HOME/implicitlayer``, or ``~/.cache/implicitlayer``."""
    with extra("fewshot", "Finding the cache folder needs platformdirs"):
        from platformdirs import user_cache_path
    return user_cache_path("implicitlayer", appauthor=False)


def places_of(root: str | os.PathLike[str] | None, subfolder: str = "") -> tuple[list[Path], str]:
    """Where a dataset is looked for, and the end of the message where it is not there."""
    if root is not None:
        return [Path(root).expanduser()], ""
    data = os.environ.get("IMPLICITLAYER_DATA")
    places = [*([Path(data).expanduser()] if data else []), cache_folder() / subfolder]
    return places, " Or say where it is with root= or the variable IMPLICITLAYER_DATA."


def fingerprint(files: Files) -> str:
    """Changes when a file's name, size or time does."""
    digest = hashlib.sha256()
    for name, paths in files.items():
        for path in paths:
            status = path.stat()
            digest.update(f"{name}/{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def cached_images(
    name: str,
    key: Sequence[object],
    shape: tuple[int, ...],
    build: Callable[[], Iterable[NDArray[np.uint8]]],
    cache_dir: str | Path | None,
) -> NDArray[np.uint8]:
    """The uint8 array that ``build()`` makes, from disk when it was made before from the same ``key``.

    It is a copy-on-write memory map (mode ``"c"``): processes share its pages, and writes never reach the disk. Where
    the folder cannot be written, it is the array itself, after an :class:`ImplicitLayerWarning`.

    Args:
        name: start of the file's name.
        key: everything the array depends on (digest of the source, size, versions), JSON-serialisable.
        shape: what the array must have; a file with another shape or a shortened file is made anew.
        build: makes the parts of the array along its first axis, one after another, so that a large array is never in
            memory as a whole; called only when no good file is there.
        cache_dir: folder of the file; ``None`` means :func:`cache_folder`.
    """
    folder = cache_folder() if cache_dir is None else Path(cache_dir)
    digest = hashlib.sha256(json.dumps([FORMAT, *key]).encode()).hexdigest()[:16]
    path = folder / f"{name}-{digest}.npy"
    found = _load(path, shape)
    if found is None:
        try:
            _save(path, shape, build)
            found = _load(path, shape)
        except _CannotWrite as error:
            warnings.warn(
                f"Decoded pictures could not be kept in {folder} ({error}); they will be made again next time. "
                "Give a folder that can be written with cache_dir= or the variable XDG_CACHE_HOME.",
                ImplicitLayerWarning,
                stacklevel=3,
            )
    if found is not None:
        return found
    images = np.empty(shape, dtype=np.uint8)
    for index, part in enumerate(build()):
        images[index] = part
    return images


class _CannotWrite(Exception):
    """The cache folder refused; not to be mistaken for an OSError of the source, which is the caller's to see."""


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _CannotWrite(str(error)) from error


def _load(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8] | None:
    try:
        images: NDArray[np.uint8] = np.load(path, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, EOFError):  # absent, shortened (the map would pass the end), or no .npy file
        return None
    return images if images.dtype == np.uint8 and images.shape == shape else None


def _save(path: Path, shape: tuple[int, ...], build: Callable[[], Iterable[NDArray[np.uint8]]]) -> None:
    with _writing():
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            _write_parts(file, shape, build)
        with _writing():
            os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _write_parts(file: BinaryIO, shape: tuple[int, ...], build: Callable[[], Iterable[NDArray[np.uint8]]]) -> None:
    header = {"descr": np.dtype(np.uint8).str, "fortran_order": False, "shape": shape}
    with _writing():
        np.lib.format.write_array_header_1_0(file, header)
    for part in build():
        assert part.shape == shape[1:] and part.dtype == np.uint8
        with _writing():  # plain writes: a full disk is an error here, and a crash through a writable memory map
            file.write(part.tobytes())
    with _writing():
        file.flush()
        os.fsync(file.fileno())  # the name must not appear before the bytes are there
