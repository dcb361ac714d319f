"""Files that are either the old one or the new one, never half of each."""

from __future__ import annotations

import io
import json
import os
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from implicitlayer._errors import ImplicitLayerError
from implicitlayer.base._sharding import is_sharded

try:
    import fcntl
except ImportError:  # Windows: there the number of the process alone tells who writes a file
    fcntl = None  # type: ignore[assignment]

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.Tensor, torch.nn.Parameter)
_TEMPORARY = re.compile(r"\..+\.(\d+)\.tmp")


class CheckpointError(ImplicitLayerError, ValueError):
    """A checkpoint that cannot be used: damaged, of another program, of other settings, or not plain data."""


def replace_file(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write beside ``path``, flush, then take its place in one step: a kill leaves the old file or the new one.

    Raises:
        OSError: the folder cannot be written, or the disk is full; the message says which file is concerned.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                _lock(file)
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(
            error.errno,
            f"{path} could not be written ({error.strerror or error}); a file that was there is as it was. Free some "
            "space, or give a folder that can be written",
        ) from error


def remove_unfinished(folder: Path) -> None:
    """Remove what killed processes left of :func:`replace_file` in ``folder``; what a live one writes stays.

    A process here is known by its number, and one on another machine that shares the folder by its lock on the file.
    """
    for path in folder.glob(".*.tmp"):
        found = _TEMPORARY.fullmatch(path.name)
        if found is None or not path.is_file() or _is_another_process(int(found[1])):
            continue
        try:
            with open(path, "rb+") as file:
                _lock(file, wait=False)
                path.unlink()
        except OSError:  # locked, or removed by another process
            continue


def _lock(file: IO[bytes], wait: bool = True) -> None:
    """Hold ``file`` until it is closed, or the process ends; OSError where another process holds it."""
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError:  # a file system without locks
        return


def _is_another_process(number: int) -> bool:
    if number == os.getpid():
        return False
    try:
        os.kill(number, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # somebody else's, or Windows: leave it alone
        return True
    return True


def plain_data(value: Any, path: str = "") -> Any:
    """``value`` with NumPy's numbers as Python's and its arrays as tensors: what a checkpoint can hold.

    Raises:
        CheckpointError: anything else that would not be read back, named by its path, such as ``scheduler.x[0]``.
    """
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind in (dict, OrderedDict):
        entries = ((plain_data(key, f"{path} (a key)"), key, entry) for key, entry in value.items())
        return kind((plain, plain_data(entry, f"{path}.{key}" if path else str(key))) for plain, key, entry in entries)
    if kind in (list, tuple):
        return kind(plain_data(entry, f"{path}[{index}]") for index, entry in enumerate(value))
    if isinstance(value, np.generic) and type(value.item()) in _PLAIN:
        return value.item()
    if kind is np.ndarray and value.dtype.kind in "biufc":
        try:
            return torch.from_numpy(value.astype(value.dtype.newbyteorder("="), order="C"))
        except (TypeError, ValueError):  # a dtype that torch does not have, such as longdouble
            pass
    elif not is_sharded(value) and _is_read_back(value):  # of a DTensor a file would hold one process's part
        return value
    raise CheckpointError(
        f"{path or 'the state'} is a {kind.__module__}.{kind.__qualname__}, which a checkpoint cannot hold: only "
        "numbers, strings, tensors, NumPy's numbers and arrays, lists and dicts are read back. Let state_dict() of "
        "its owner give it as one of these, or leave it out."
    )


def _is_read_back(value: Any) -> bool:
    """Whether torch reads it as data: sets, dtypes, devices, and classes that the user declared safe."""
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # pickle, torch and the object itself each have their own
        return False
    return True


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Save ``state`` (tensors, numbers, strings, lists, dicts) in one step: the file is the old one or the new one.

    NumPy's numbers are saved as Python's, and its arrays as tensors.

    Raises:
        CheckpointError: the state holds something that would not be read back; the message gives its path, and no file
            was written.
        OSError: the file cannot be written.

    Example:
        >>> import tempfile, pathlib, implicitlayer as il
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "checkpoint.pt"
        >>> il.meta.save_checkpoint(path, {"step": 3})
        >>> il.meta.load_checkpoint(path)
        {'step': 3}
    """
    plain = plain_data(state)
    replace_file(path, lambda file: torch.save(plain, file))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state saved by :func:`save_checkpoint`, on the CPU. Only data is read: a checkpoint cannot run code.

    Raises:
        CheckpointError: the file is damaged or no checkpoint.
        FileNotFoundError: there is none.
    """
    try:
        # torch's reader does not look at the checksums of a zip archive; zipfile does
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # zipfile, pickle, torch and the operating system each have their own
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint ({reason}). Put another one in its place, such as best.pt of the "
            "same run, or move the folder away and start again."
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, a checkpoint is a dict. Is it another file?")
    return state


def save_json(path: Path, value: Any) -> None:
    """Write ``value`` as readable JSON in one step; what JSON does not know is written as its ``str``."""
    text = json.dumps(value, indent=2, default=str) + "\n"
    replace_file(path, lambda file: file.write(text.encode()))


def save_json_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """Write one JSON object per line in one step; numbers may be NumPy's, or tensors of one."""
    text = "".join(json.dumps(record, default=lambda number: number.item()) + "\n" for record in records)
    replace_file(path, lambda file: file.write(text.encode()))
