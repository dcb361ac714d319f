"""The command ``implicitlayer info``: what a bug report needs to say about an installation, and whether it works."""

from __future__ import annotations

import argparse
import platform
import re
from collections.abc import Sequence
from importlib import metadata

import numpy
import torch

import implicitlayer as il
from implicitlayer.compiled._layer import cpp_compiler

_WORKS = 1e-6  # relative error of the small layer's gradient; both its solves end below


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="implicitlayer", description=il.__doc__)
    parser.add_argument("--version", action="version", version=f"implicitlayer {il.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, extras, devices, and one gradient as a check: paste it in a bug report")
    parser.parse_args(arguments)
    error = gradient_error()
    rows = {
        "implicitlayer": f"{il.__version__}, {il.__path__[0]}",
        "Python": f"{platform.python_version()}, {platform.platform()}",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "CUDA": ", ".join(map(torch.cuda.get_device_name, range(torch.cuda.device_count()))) or "no device",
        "NumPy": numpy.__version__,
        **extras(),
        "C++ compiler": cpp_compiler() or "none: il.compile calls the layer as it is",
        "gradient": f"{'right' if error < _WORKS else 'WRONG'}, relative error {error:.1e}",
    }
    for name, value in rows.items():
        print(f"{name:<14} {value}")
    return int(not error < _WORKS)


def extras() -> dict[str, str]:
    """The packages of the extras for users, by whether they are installed."""
    try:
        required = metadata.requires("implicitlayer") or []
    except metadata.PackageNotFoundError:
        return {"extras": "unknown: run from a source tree that is not installed"}
    found, missing = [], []
    lines = [line for line in required if "extra ==" in line and not re.search("extra == .(bench|dev|docs)", line)]
    names = {re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in lines}
    for name in sorted(names - {"implicitlayer"}, key=str.lower):
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            missing.append(name)
    return {"extras": ", ".join(found) or "none", "not installed": ", ".join(missing) or "none"}


def gradient_error() -> float:
    """Of x = argmin |x - b|^2 + t |x|^2 = b / (1 + t), whose derivative in t is -b / (1 + t)^2."""
    b = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    t = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    layer = il.argmin(lambda x, t: ((x - b) ** 2).sum() + t * (x**2).sum(), il.solvers.LBFGS())
    layer(torch.zeros_like(b), t)[0].backward()
    right = -1 / (1 + 0.5) ** 2
    return abs(float(t.grad) - right) / abs(right) if t.grad is not None else float("inf")


if __name__ == "__main__":
    raise SystemExit(main())
