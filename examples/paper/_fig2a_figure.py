"""The picture of fig2a.py: error of the meta-gradient over inner steps, one panel a problem."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch

mpl.use("Agg")
import matplotlib.pyplot as plt

INK, GRID = "#1f2328", "#d8dee4"
SERIES = (("#1f2328", "o", "-"), ("#d1622b", "s", "--"), ("#1a6fb5", "^", "-"), ("#5b8c3e", "D", "-."))


def draw(results: dict[str, Any], s: Any, path: Path) -> None:
    """Medians over tasks as lines, the range over tasks as bands."""
    panels = list(results["errors"].items())
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4), sharey=True, squeeze=False)
    for axis, (d, errors) in zip(axes[0], panels, strict=True):
        for (name, rows), (colour, marker, line) in zip(errors.items(), SERIES, strict=False):
            values = torch.tensor(rows, dtype=torch.float64)  # [steps, tasks]
            axis.fill_between(s.inner_steps, values.amin(1), values.amax(1), color=colour, alpha=0.12, linewidth=0)
            axis.plot(
                s.inner_steps,
                values.median(1).values,
                color=colour,
                marker=marker,
                markersize=4,
                linestyle=line,
                linewidth=1.5,
                label=name,
            )
        axis.set(xscale="log", yscale="log", xlabel="inner steps of gradient descent")
        axis.set_title(f"{d} unknowns, κ = {s.condition:g}", loc="left", fontsize=10, color=INK)
        axis.grid(color=GRID, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("error of the meta-gradient, relative")
    title = f"median of {s.num_tasks} tasks; band: all of them"
    axes[0][0].legend(frameon=False, fontsize=8, loc="lower left", title=title, title_fontsize=8, alignment="left")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
