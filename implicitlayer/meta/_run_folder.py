"""The files of a run; of a state that holds DTensors, their parts in a folder beside the file."""

# NOTE [parts]: theta, learned tensors of the method and optimizer may hold DTensors. Every process writes its parts of
# them into a new folder (torch.distributed.checkpoint). When all have, the first process writes the file: the rest of
# the state, with tensors without memory in the places of the DTensors, the name of the folder and the checksums of what
# is in it. Folders that the file does not name are removed after that. So a kill at any moment leaves a file whose
# folder is whole.

from __future__ import annotations

import re
import shutil
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from implicitlayer.base._sharding import beside, is_sharded, layout_of, recut
from implicitlayer.base._tree import flatten, flatten_with_names, unflatten
from implicitlayer.meta._checkpoint import (
    CheckpointError,
    load_checkpoint,
    plain_data,
    remove_unfinished,
    replace_file,
    save_checkpoint,
    save_json_lines,
)
from implicitlayer.meta._distributed import WorkerGroup

_WITH_PARTS = ("theta", "method", "optimizer")  # entries of a state
_BLOCK = 2**24  # bytes of a file that are read at a time


class RunFolder:
    """``checkpoint.pt``, ``best.pt`` and ``metrics.jsonl`` in one folder, each of them whole at any moment.

    The first process writes them; all processes make the calls. See NOTE [parts].
    """

    def __init__(self, folder: Path, group: WorkerGroup) -> None:
        self.folder = folder
        self.last = folder / "checkpoint.pt"
        self.best = folder / "best.pt"
        self._group = group

    def check(self, state: dict[str, Any]) -> None:
        """Raise now, and not at the first checkpoint, if nothing can be written here or the state cannot be kept."""
        plain_data(_without_parts(state)[0])
        remove_unfinished(self.folder)
        for path in (self.last, self.best):
            if self._folders(path):
                with suppress(CheckpointError, FileNotFoundError):  # a damaged file is told by who reads it
                    self._remove_folders(path, load_checkpoint(path))
        probe = self.folder / ".writable"
        replace_file(probe, lambda file: None)
        probe.unlink()

    def save(self, state: dict[str, Any]) -> None:
        self.write(self.last, state)
        if self._group.is_first:
            save_json_lines(self.folder / "metrics.jsonl", state["history"])

    def with_parts(self, state: dict[str, Any], likes: dict[str, Any]) -> dict[str, Any]:
        """The state of a file with all of its tensors.

        ``likes``: trees of tensors that are placed as those of the state shall be, None for what is kept as it is.

        Raises:
            CheckpointError: the folder is not there, or not what was written.
        """
        some = {name: state[name] for name in likes}
        leaves, names = flatten_with_names(some, "")
        rooms = {}
        for i, (leaf, name, like) in enumerate(zip(leaves, names, flatten(likes)[0], strict=True)):
            if isinstance(leaf, torch.Tensor) and leaf.is_meta:
                rooms[name] = leaves[i] = _room(leaf, like)
            elif isinstance(leaf, torch.Tensor) and like is not None and leaf.shape == like.shape:
                leaves[i] = recut(leaf, layout_of(like))
        if "parts" in state:
            self._fill(rooms, **state["parts"])
        whole: dict[str, Any] = unflatten(leaves, flatten(some)[1])
        return state | whole

    def _fill(self, rooms: dict[str, torch.Tensor], folder: str, checksums: dict[str, int]) -> None:
        from torch.distributed.checkpoint.state_dict_loader import load

        path = self.folder / folder
        if not path.is_dir() or self._checksums(path) != checksums:
            raise CheckpointError(
                f"{path} is not what the checkpoint beside it says (a file is missing or damaged). Put another one in "
                "its place, such as best.pt of the same run with its folder, or move all away and start again."
            )
        with _told(path, "read"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # it says what is meant: one process
            load(rooms, checkpoint_id=path, no_dist=not dist.is_initialized())

    def write(self, path: Path, state: dict[str, Any]) -> None:
        """Write a state to ``last`` or ``best``."""
        if self._group.copies is not None:
            state = self._with_parts_saved(path, state)
        if self._group.is_first:
            save_checkpoint(path, state)
            self._remove_folders(path, state)

    def _with_parts_saved(self, path: Path, state: dict[str, Any]) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict_saver import save

        small, parts = _without_parts(state)

        def unused() -> dict[str, Any]:
            plain_data(small)  # before anything is written
            names = [f"{path.stem}-{state['step']}", *(f"{path.stem}-{state['step']}-{n}" for n in range(2, 100))]
            return {"folder": next(name for name in names if not (self.folder / name).exists())}

        found = self._group.from_first(unused)
        assert found is not None
        folder = self.folder / found["folder"]
        with _told(folder, "written"):
            save(parts, checkpoint_id=folder)
        return small | {"parts": found | {"checksums": self._checksums(folder)}}

    def _checksums(self, folder: Path) -> dict[str, int]:
        """Those of the files in ``folder``, of which every process reads some."""
        files, group = sorted(folder.iterdir()), self._group
        mine = [_checksum(file) if i % group.size == group.rank else 0 for i, file in enumerate(files)]
        return dict(zip([file.name for file in files], group.sum_small(torch.tensor(mine)).tolist(), strict=True))

    def _remove_folders(self, path: Path, state: dict[str, Any]) -> None:
        """Remove the folders of ``path`` that its state does not name."""
        for folder in self._folders(path):
            if folder.name != state.get("parts", {}).get("folder"):
                shutil.rmtree(folder, ignore_errors=True)

    def _folders(self, path: Path) -> list[Path]:
        """Those that were made for ``path``."""
        name = re.compile(rf"{path.stem}-\d+(-\d+)?")
        return [folder for folder in self.folder.glob(f"{path.stem}-*") if name.fullmatch(folder.name)]


def _without_parts(state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The state with tensors without memory in the places of its DTensors, and these."""
    some = {name: state[name] for name in _WITH_PARTS}
    leaves, spec = flatten(some)
    if not any(map(is_sharded, leaves)):
        return state, {}
    names = flatten_with_names(some, "")[1]
    parts = {name: leaf for name, leaf in zip(names, leaves, strict=True) if is_sharded(leaf)}
    empty = [torch.empty(t.shape, dtype=t.dtype, device="meta") if is_sharded(t) else t for t in leaves]
    return state | unflatten(empty, spec), parts


def _room(saved: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A new tensor in the shape and dtype of ``saved``, which lies as ``like`` does."""
    if saved.shape == like.shape:
        return torch.zeros_like(like.detach(), dtype=saved.dtype)
    room: torch.Tensor = beside(torch.zeros(saved.shape, dtype=saved.dtype, device=like.device), like)
    return room


def _checksum(path: Path) -> int:
    found = 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            found = zlib.crc32(block, found)
    return found


@contextmanager
def _told(folder: Path, what: str) -> Iterator[None]:
    """Errors of torch.distributed.checkpoint, which are no ``Exception``, as ours."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
        words = f"{folder} could not be {what} ({reason}); the checkpoint that was there is as it was"
        if isinstance(reason, OSError):
            raise OSError(reason.errno, f"{words}. Free some space, or give a folder that can be written") from error
        raise CheckpointError(f"{words}.") from error
