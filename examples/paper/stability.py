"""Why a fixed inner step fails in the end: meta-training sharpens the support loss until gradient descent diverges.

    python examples/paper/stability.py [--smoke] [--output-dir DIR] [--seed N]

iMAML on Glyphs, the same network, tasks and outer steps with two inner solvers: gradient descent with a fixed step, and
gradient descent with an Armijo line search that first tries that step.
Along the way it measures, for tasks of validation classes, the largest curvature of the support loss at theta, where
the inner solver starts, and the smallest curvature of the inner objective where it ends. A fixed step a of gradient
descent diverges on loss + strength/2 |phi - theta|^2 where the largest curvature of the loss passes 2/a - strength.

Asserts: the curvature passes that limit; from there the fixed step ends, in some tasks, where the inner objective
curves downwards, so that the implicit gradient is that of no minimum, and accuracy falls behind its own best; the
searched steps never raise their objective, end at points of positive curvature, and with the higher accuracy.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from _results import read_options, save_with_picture

import implicitlayer as il

mpl.use("Agg")
import matplotlib.pyplot as plt


@dataclasses.dataclass(frozen=True)
class Settings:
    """All there is to set."""

    num_filters: int = 16
    strength: float = 2.0  # the paper's
    inner_steps: int = 16  # the paper's
    step_size: float = 0.2  # of the fixed step, and the first trial of the searched one
    tasks_per_step: int = 8
    meta_steps: int = 300
    learning_rate: float = 4e-3
    probes: int = 15  # how often the curvatures are measured
    probed_tasks: int = 3
    validation_tasks: int = 64


SMOKE = Settings(num_filters=4, tasks_per_step=2, meta_steps=4, probes=2, probed_tasks=1, validation_tasks=4)
COLOURS = {"fixed step": "#d1622b", "Armijo": "#1a6fb5"}


def solvers(s: Settings) -> dict[str, Any]:
    descent = il.solvers.GradientDescent(s.step_size, max_steps=s.inner_steps)
    return {
        "fixed step": descent,
        "Armijo": dataclasses.replace(descent, line_search="armijo"),
    }


def extreme_curvatures(function: Any, params: dict[str, torch.Tensor], num_steps: int = 20) -> tuple[float, float]:
    """The smallest and the largest Ritz value of the Hessian of ``function`` at ``params`` after steps of Lanczos.

    They lie between the extreme eigenvalues, and reach those that stand apart from the rest within a few steps.
    """
    leaves = [p.detach().requires_grad_() for p in params.values()]
    gradient = torch.autograd.grad(function(dict(zip(params, leaves, strict=True))), leaves, create_graph=True)
    sizes = [p.numel() for p in leaves]
    q = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(0))
    basis = [q / q.norm()]
    products = []
    for _ in range(num_steps):
        shaped = [part.view_as(p) for part, p in zip(basis[-1].split(sizes), leaves, strict=True)]
        found = torch.autograd.grad(gradient, leaves, shaped, retain_graph=True)
        products.append(torch.cat([part.flatten() for part in found]))
        rest = products[-1]
        for _ in range(2):  # orthogonal to all before, and once more for what rounding left
            known = torch.stack(basis)
            rest = rest - known.T @ (known @ rest)
        basis.append(rest / rest.norm())
    known = torch.stack(basis[:-1])
    ends = torch.linalg.eigvalsh((known @ torch.stack(products).T).double())
    return float(ends[0]), float(ends[-1])


def train(name: str, s: Settings, seed: int) -> dict[str, Any]:
    """Curves of one inner solver."""
    network = il.fewshot.conv4(5, num_filters=s.num_filters)
    theta = network.init(torch.Generator().manual_seed(seed))
    theta = {k: torch.zeros_like(v) if k.startswith("head") else v for k, v in theta.items()}
    theta = {k: v.requires_grad_() for k, v in theta.items()}

    def loss(params: Any, batch: Any) -> torch.Tensor:
        return network.cross_entropy(params, *batch)

    method = il.meta.iMAML(
        loss,
        solvers(s)[name],
        strength=s.strength,
        linear_solver=il.ConjugateGradient(max_steps=5),
        negative_curvature="truncate",
    )

    def episodes(count: int, split: str) -> list[Any]:
        sampler = il.fewshot.EpisodeSampler(il.fewshot.Glyphs(split), num_query=5, seed=2024)
        return [il.meta.as_support_query(b) for b in sampler.fixed(count, batch_size=16)]

    trainer = il.meta.Trainer(
        method,
        theta,
        il.fewshot.EpisodeSampler(il.fewshot.Glyphs("train"), num_query=5, rotations="augment", seed=seed),
        torch.optim.Adam(theta.values(), lr=s.learning_rate),
        tasks_per_step=s.tasks_per_step,
        max_steps=s.meta_steps,
        metric=lambda params, batch: il.fewshot.task_accuracy(network(params, batch[0]), batch[1]),
        validation=episodes(s.validation_tasks, "val"),
        num_validations=s.probes,
        report_steps=1,
        show_progress=True,
        name=name,
    )
    (support, _), *_ = episodes(s.probed_tasks, "val")
    curves: dict[str, Any] = {"step": [], "largest": [], "smallest": []}
    for probe in range(s.probes + 1):
        try:
            trainer.fit(until=probe / s.probes)
        except il.NonFiniteError as error:  # diverged for good; the curves end here
            curves["ended"] = str(error)
            break
        start = {k: v.detach() for k, v in theta.items()}
        with torch.no_grad():
            phi = method.adapt(theta, support)
        above, below = [], []
        for i in range(s.probed_tasks):
            batch = tuple(part[i] for part in support)
            one = lambda params, batch=batch: network.cross_entropy(params, *batch)  # noqa: E731
            above.append(extreme_curvatures(one, start)[1])
            below.append(extreme_curvatures(one, {k: v[i] for k, v in phi.items()})[0] + s.strength)
        curves["step"].append(trainer.step)
        curves["largest"].append(max(above))
        curves["smallest"].append(min(below))
    history = trainer.history
    curves["diverged"] = [row["inner_diverged"] for row in history]
    curves["negative_curvature"] = [row["negative_curvature"] for row in history]
    curves["accuracy"] = [row["accuracy"] for row in history]
    curves["validation"] = [(row["step"], row["validation"]) for row in history if "validation" in row]
    return curves


def draw(results: dict[str, Any], s: Settings, path: Path) -> None:
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.4))
    limit = 2 / s.step_size - s.strength
    for name, curves in results["curves"].items():
        style = {"color": COLOURS[name], "linewidth": 1.5, "label": name}
        axes[0, 0].plot(*zip(*curves["validation"], strict=True), marker="o", markersize=3, **style)
        shares = running_mean(curves["negative_curvature"])
        axes[0, 1].plot(np.arange(1, len(shares) + 1), shares, **style)
        axes[1, 0].plot(curves["step"], curves["largest"], marker="o", markersize=3, **style)
        axes[1, 1].plot(curves["step"], curves["smallest"], marker="o", markersize=3, **style)
    axes[1, 0].axhline(limit, color="#1f2328", linestyle="--", linewidth=1)
    axes[1, 0].text(0, limit, f" 2/α − λ = {limit:g}", va="bottom", fontsize=8)
    axes[1, 1].axhline(0, color="#1f2328", linestyle="--", linewidth=1)
    titles = (
        "accuracy on validation tasks",
        "share of tasks with negative curvature (CG)",
        "largest curvature of the support loss at θ",
        "smallest curvature of the inner objective at φ",
    )
    for axis, title in zip(axes.flat, titles, strict=True):
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xlabel("meta-steps")
        axis.grid(color="#d8dee4", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    axes[1, 0].set_yscale("log")
    axes[1, 1].set_yscale("symlog", linthresh=1)
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def running_mean(values: list[float], width: int = 10) -> list[float]:
    return [float(np.mean(values[max(0, i - width + 1) : i + 1])) for i in range(len(values))]


def table(results: dict[str, Any], s: Settings) -> list[str]:
    lines = [
        "| inner solver | last validation | best | inner objective rose (last tenth) | negative curvature (last tenth) "
        "| largest curvature met |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, c in results["curves"].items():
        last = max(1, len(c["diverged"]) // 10)
        shares = [float(np.mean(c[key][-last:])) for key in ("diverged", "negative_curvature")]
        values = [value for _, value in c["validation"]]
        lines.append(
            f"| {name} | {values[-1]:.1%} | {max(values):.1%} | {shares[0]:.0%} | {shares[1]:.0%} "
            f"| {max(c['largest']):.0f} |"
        )
    return lines


def main(argv: list[str] | None = None) -> None:
    options = read_options(__doc__, argv, smoke="a tiny network and four meta-steps: seconds, and no claim")
    s = SMOKE if options.smoke else Settings()
    torch.set_num_threads(1)
    curves = {name: train(name, s, options.seed) for name in solvers(s)}
    results: dict[str, Any] = {"settings": dataclasses.asdict(s), "curves": curves}
    results["table"] = table(results, s)
    print("\n".join(results["table"]))
    fixed, searched = curves["fixed step"], curves["Armijo"]
    limit = 2 / s.step_size - s.strength
    results["remarks"] = [
        f"Gradient descent with a fixed step of {s.step_size:g} settles only where no curvature of the support loss "
        f"passes 2/α - λ = {limit:g}; the largest met was {max(fixed['largest']):.0f} with the fixed step and "
        f"{max(searched['largest']):.0f} with searched ones."
    ]
    print(results["remarks"][0])
    save_with_picture(
        "stability",
        options,
        setting="reduced: "
        + ("a tiny network and four meta-steps (--smoke)" if options.smoke else "16 filters, Glyphs"),
        results=results,
        draw=lambda path: draw(results, s, path),
    )
    if not options.smoke:
        last = len(fixed["diverged"]) // 10
        assert fixed["largest"][-1] > limit, (fixed["largest"], limit)
        assert np.mean(fixed["negative_curvature"][-last:]) > 0.05, (
            "the fixed step was to end at no minimum in some tasks"
        )
        values = [value for _, value in fixed["validation"]]
        assert values[-1] < max(values) - 0.02, "it was to fall behind its own best"
        assert max(searched["diverged"]) == 0, "searched steps were never to raise their objective"
        assert np.mean(searched["negative_curvature"][-last:]) == 0, "they were to end at positive curvature"
        assert searched["validation"][-1][1] > values[-1] + 0.1, "the searched step was to win"


if __name__ == "__main__":
    main()
