"""The numbers of a run as TensorBoard event files."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any


def require_tensorboard() -> None:
    """Raise, with the extra to install, where TensorBoard is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ImportError(
            "tensorboard=True needs the package tensorboard: pip install 'implicitlayer[examples]'. metrics.jsonl "
            "holds the same numbers without it."
        )


class EventLog:
    """Event files in ``run_dir``, one value for every number of a training record.

    What earlier files of the folder hold from ``first_step`` on is of steps that a killed process did not save: it is
    marked as void, and TensorBoard shows each step once.
    """

    def __init__(self, run_dir: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_dir), purge_step=first_step)

    def write(self, record: dict[str, Any]) -> None:
        """Write the numbers of one record at its step."""
        for name, value in record.items():
            if name != "step":
                self._writer.add_scalar(name, value, record["step"])

    def flush(self) -> None:
        """Put all that was written on the disk."""
        self._writer.flush()

    def close(self) -> None:
        """Flush and end the file."""
        self._writer.close()
