"""The picture of table1.py: gradients and memory over kappa, gradients and memory over log(1/eps)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

GRID = "#d8dee4"
SERIES = (("#1f2328", "o", "-"), ("#d1622b", "s", "--"), ("#8250a8", "D", ":"), ("#1a6fb5", "^", "-"))


def draw(by_kappa: Sequence[dict[str, Any]], by_eps: Sequence[dict[str, Any]], path: Path) -> None:
    """Four panels; over kappa both axes are logarithmic: a straight line is a power."""
    figure, axes = plt.subplots(2, 2, figsize=(9, 7))
    columns = (("compute", "gradients"), ("memory", "peak memory over that of a gradient"))
    for row, (column, words) in zip(axes, columns, strict=True):
        for axis, data, variable in ((row[0], by_kappa, "kappa"), (row[1], by_eps, "eps")):
            for name, (colour, marker, line) in zip(data[0], SERIES, strict=True):
                rows = [entry[name] for entry in data]
                x = [r["kappa"] if variable == "kappa" else math.log(1 / r["eps"]) for r in rows]
                y = [r[column] for r in rows]
                axis.plot(x, y, color=colour, marker=marker, markersize=4, linestyle=line, linewidth=1.5, label=name)
            axis.set(xscale="log" if variable == "kappa" else "linear", yscale="log", ylabel=words)
            axis.set_xlabel("condition number κ" if variable == "kappa" else "log(1/ε)")
            axis.grid(color=GRID, linewidth=0.6, which="both")
            axis.spines[["top", "right"]].set_visible(False)
    fixed_eps, fixed_kappa = by_kappa[0]["implicit MAML"]["eps"], by_eps[0]["implicit MAML"]["kappa"]
    axes[0][0].set_title(f"ε = {fixed_eps:g}", loc="left", fontsize=10)
    axes[0][1].set_title(f"κ = {fixed_kappa:g}", loc="left", fontsize=10)
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)
