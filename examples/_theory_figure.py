"""The figure of examples/theory.py: one panel for each claim."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Okabe and Ito's colours, told apart by the colour-blind; every series also has a marker or a dash of its own
BLUE, ORANGE, GREEN, PINK, GREY, INK = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8c959f", "#1f2328"


def draw(results: dict[str, Any], path: Path) -> None:
    with plt.rc_context({"font.size": 9.5, "axes.titlesize": 11, "axes.titlelocation": "left"}):
        figure = _figure(results)
        figure.savefig(path, dpi=130)
        plt.close(figure)


def _figure(results: dict[str, Any]) -> Any:
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    panels = (lemma_3, gradients, memory, outer)
    for axis, panel, name in zip(axes.flat, panels, ("lemma_3", "gradients", "memory", "outer"), strict=True):
        panel(axis, results[name])
        axis.grid(color="#e3e7eb", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def lemma_3(axis: Any, result: dict[str, Any]) -> None:
    series = [
        ("random problems, worst direction", [r for r in result["grid"] if r["kind"] == "random"], BLUE, "o", 9),
        ("early stopping and truncated CG", result["natural"], GREEN, "^", 11),
        ("problem made for the bound", [r for r in result["grid"] if r["kind"] == "aligned"], ORANGE, "s", 16),
    ]
    everything = [x for _, rows, *_ in series for r in rows for x in (r["bound"], r["error"])]
    low, high = min(everything) / 2, max(everything) * 2
    axis.fill_between([low, high], [low, high], [high, high], color=GREY, alpha=0.18, linewidth=0)
    axis.plot([low, high], [low, high], color=INK, linewidth=1)
    axis.text(0.30, 0.62, "the lemma forbids this side", transform=axis.transAxes, ha="center", color=INK)
    for label, rows, colour, marker, size in series:
        axis.scatter(
            [r["bound"] for r in rows], [r["error"] for r in rows], s=size, color=colour, marker=marker, alpha=0.7,
            linewidths=0, label=label,
        )  # fmt: skip
    axis.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    axis.set(xlabel="bound (2λρB/μ² + λL/μ) δ + δ′", ylabel="measured error of the meta-gradient")
    axis.set_title("(a) Lemma 3: the error stays below its bound")
    axis.legend(loc="lower right", frameon=False)


def gradients(axis: Any, result: dict[str, Any]) -> None:
    looks = {
        "plain": ("gradient descent + CG", ORANGE, "s"),
        "restarts": ("accelerated with μ unknown + CG", PINK, "^"),
        "accelerated": ("accelerated + CG", BLUE, "o"),
    }
    for name, (label, colour, marker) in looks.items():
        rows = result["counts"][name]
        slope, error = result["exponents"][f"{name} gradients"]
        text = f"{label}: exponent {slope:.3f} ± {error:.3f}"
        x, y = [r["kappa"] for r in rows], [r["gradients"] for r in rows]
        axis.plot(x, y, color=colour, marker=marker, markersize=5, linewidth=1.5, label=text)
    rows = result["counts"]["accelerated"]
    x = [rows[0]["kappa"], rows[-1]["kappa"]]
    start = rows[0]["gradients"] / 2
    axis.plot(x, [start, start * (x[1] / x[0]) ** 0.5], color=INK, linewidth=1, linestyle=":", label="slope 1/2")
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="condition number κ",
        ylabel=f"gradients for relative error {result['accuracy']:g}",
    )
    axis.set_ylim(top=40 * axis.get_ylim()[1])  # room for the legend
    axis.set_title("(b) Theorem 1: gradients grow like √κ")
    axis.legend(loc="upper left", frameon=False)


def memory(axis: Any, result: dict[str, Any]) -> None:
    for name, label, colour, marker, width in (
        ("back-propagated", "back-propagation, over inner steps", ORANGE, "s", 1.5),
        ("implicit", "implicit, over inner steps (5 CG steps)", BLUE, "o", 3.0),
        ("implicit, CG", "implicit, over CG steps (10 inner steps)", PINK, "^", 1.5),
    ):
        steps = result[name]
        axis.plot(
            list(steps), list(steps.values()), color=colour, marker=marker, markersize=5, linewidth=width, label=label
        )
    axis.axhline(
        result["one product"], color=GREEN, linewidth=1, linestyle="--", label="one Hessian-vector product of the loss"
    )
    axis.axhline(result["one gradient"], color=INK, linewidth=1, linestyle=":", label="one gradient of the loss")
    axis.set(xscale="log", yscale="log", xlabel="steps", ylabel="peak memory, KiB")
    axis.set_title("(c) Memory of a meta-gradient does not see the steps")
    axis.legend(loc="upper left", frameon=False)


def outer(axis: Any, result: dict[str, Any]) -> None:
    colours = dict(zip(sorted({r["eps"] for r in result["runs"]}, reverse=True), (ORANGE, GREEN, BLUE), strict=False))
    for run in result["runs"]:
        colour = colours[run["eps"]]
        label = f"ε = {run['eps']:g}" if not run["adversary"] else None
        axis.plot(run["norms"], color=colour, linewidth=1.8, linestyle="--" if run["adversary"] else "-", label=label)
        if not run["adversary"]:
            axis.axhline(run["eps"], color=colour, linewidth=1, linestyle=":")
            axis.text(len(run["norms"]), run["eps"] * 1.12, f"ε = {run['eps']:g}", ha="right", color=colour)
    axis.plot([], [], color=INK, linewidth=1.8, label="errors as the layer makes them")
    axis.plot([], [], color=INK, linewidth=1.8, linestyle="--", label="worst error allowed, ε/2")
    axis.set(yscale="log", xlabel="outer steps", ylabel="‖∇F(θ)‖, exact")
    axis.set_ylim(top=30 * max(max(run["norms"]) for run in result["runs"]))  # room for the legend
    axis.set_title("(d) Corollary 1: the gradient of F falls below ε")
    axis.legend(loc="upper right", frameon=False, ncols=1)
