"""The files of a run: the last state, the best one, and the metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from implicitlayer.meta._checkpoint import (
    plain_data,
    remove_unfinished,
    replace_file,
    save_checkpoint,
    save_json_lines,
)


class RunFolder:
    """``checkpoint.pt``, ``best.pt`` and ``metrics.jsonl`` in one folder, each of them whole at any moment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.last = folder / "checkpoint.pt"
        self.best = folder / "best.pt"

    def check(self, state: dict[str, Any]) -> None:
        """Raise now, and not at the first checkpoint, if nothing can be written here or the state cannot be kept."""
        plain_data(state)
        remove_unfinished(self.folder)
        probe = self.folder / ".writable"
        replace_file(probe, lambda file: None)
        probe.unlink()

    def save(self, state: dict[str, Any]) -> None:
        """Write the last state and its history."""
        save_checkpoint(self.last, state)
        save_json_lines(self.folder / "metrics.jsonl", state["history"])

    def save_best(self, state: dict[str, Any]) -> None:
        """Write the best state."""
        save_checkpoint(self.best, state)
