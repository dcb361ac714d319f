"""Where a number was measured: the machine and the versions, written beside every result."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """The machine that this process computes on, for a result file.

    Args:
        device: where it computes. A GPU that is there and not used has no part in the result.

    Returns:
        ``cpu`` (its model, or what is known of it), ``cores`` (that this process may use), ``threads`` (of torch) and
        ``gpu`` (the name of ``device``; None where that is the CPU).

    Example:
        >>> sorted(machine())
        ['cores', 'cpu', 'gpu', 'threads']
        >>> machine("cpu")["gpu"] is None
        True
    """
    return {
        "cpu": _cpu_model(Path("/proc/cpuinfo")),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None,
    }


def versions() -> dict[str, str]:
    """The versions of what computed a result.

    Returns:
        ``implicitlayer``, ``torch``, ``python`` and ``platform``.

    Example:
        >>> versions()["torch"] == torch.__version__
        True
    """
    return {
        "implicitlayer": sys.modules["implicitlayer"].__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def _cpu_model(cpuinfo: Path) -> str:
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
