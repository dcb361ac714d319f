"""Files that are either the old one or the new one, never half of each."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

from implicitlayer._errors import ImplicitLayerError


class CheckpointError(ImplicitLayerError, ValueError):
    """A checkpoint that cannot be used: damaged, of another program, or of a run with other settings."""


def replace_file(path: Path, write: Callable[[IO[bytes]], None]) -> None:
    """Write beside ``path``, flush to the disk, then take its place in one step.

    A process killed at any point leaves either the old file or the new one.

    Raises:
        OSError: the folder cannot be written, or the disk is full; the message says which file is concerned.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
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


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Save ``state`` (tensors, numbers, strings, lists, dicts) in one step: the file is the old one or the new one.

    Example:
        >>> import tempfile, pathlib, implicitlayer as il
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "checkpoint.pt"
        >>> il.meta.save_checkpoint(path, {"step": 3})
        >>> il.meta.load_checkpoint(path)
        {'step': 3}
    """
    replace_file(path, lambda file: torch.save(state, file))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state saved at ``path``, on the CPU. Only data is read: a checkpoint cannot run code.

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
    """Write ``value`` as readable JSON in one step."""
    text = json.dumps(value, indent=2, default=str) + "\n"
    replace_file(path, lambda file: _write_text(file, text))


def save_json_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """Write one JSON object per line in one step."""
    text = "".join(json.dumps(record) + "\n" for record in records)
    replace_file(path, lambda file: _write_text(file, text))


def _write_text(file: IO[bytes], text: str) -> None:
    file.write(text.encode())
