"""How much faster is one vmapped implicit layer than a Python loop over independent problems?

    python examples/benchmarks/vmapped_layer.py [--smoke]

Two cases, forward and gradient: ridge-penalised logistic regression in d = 20 unknowns (1, 16 and 256 problems,
gradient descent to 1e-6, conjugate gradients to 1e-8), and the conv4 network of few-shot learning (16 tasks, 5 inner
steps, 5 CG steps). Both sides run the same layer, the same solver and the same tolerances in the same process; the loop
calls it once per problem. Times are medians after a warm-up, ratios are loop / vmap.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

import implicitlayer as il

DIMENSION, NUM_POINTS = 20, 30


def median_seconds(function: Callable[[], object], repeats: int) -> float:
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def logistic(x, penalty, data, signs):
    """x: [d], penalty: [], data: [points, d], signs: [points]."""
    return F.softplus(-signs * (data @ x)).mean() + 0.5 * penalty * (x @ x)


def compare(gradient: Callable[..., torch.Tensor], args: tuple[torch.Tensor, ...], repeats: int) -> dict[str, float]:
    """Seconds of both ways and their largest difference relative to the largest gradient entry."""

    def loop() -> torch.Tensor:
        return torch.stack([gradient(*lane) for lane in zip(*args, strict=True)])

    def vmapped() -> torch.Tensor:
        return torch.func.vmap(gradient)(*args)

    one_by_one, together = loop(), vmapped()
    difference = float((one_by_one - together).abs().max() / one_by_one.abs().max())
    seconds = {"loop_s": median_seconds(loop, repeats), "vmap_s": median_seconds(vmapped, repeats)}
    return {**seconds, "ratio": seconds["loop_s"] / seconds["vmap_s"], "difference": difference}


def small_problems(num_problems: int, repeats: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(num_problems, NUM_POINTS, DIMENSION, dtype=torch.float64, generator=generator)
    signs = torch.randn(num_problems, NUM_POINTS, dtype=torch.float64, generator=generator).sign()
    penalty = torch.logspace(-1, 0, num_problems, dtype=torch.float64)
    layer = il.argmin(
        logistic,
        il.solvers.GradientDescent(step_size=1.0, max_steps=1000, rtol=1e-6),
        linear_solver=il.ConjugateGradient(rtol=1e-8),
    )
    init = torch.zeros(DIMENSION, dtype=torch.float64)
    outer = torch.func.grad(lambda p, x, y: (layer(init, p, x, y) ** 2).sum())
    return compare(outer, (penalty, data, signs), repeats)


def conv4_tasks(num_tasks: int, repeats: int, num_filters: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    network = il.fewshot.conv4(num_ways=5, num_filters=num_filters)
    theta = network.init(generator)
    images = torch.rand(num_tasks, 5, 1, 28, 28, generator=generator)
    labels = torch.arange(5).expand(num_tasks, 5)
    layer = il.argmin(
        il.proximal(lambda phi, x, y: F.cross_entropy(network(phi, x), y), 2.0),
        il.solvers.GradientDescent(step_size=0.1, max_steps=5),
        linear_solver=il.ConjugateGradient(max_steps=5),
        on_failure="ignore",
        stationarity_rtol=None,
    )

    def head_gradient(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        def loss(start: dict[str, torch.Tensor]) -> torch.Tensor:
            return F.cross_entropy(network(layer(start, start, x, y), x), y)

        return torch.func.grad(loss)(theta)["head.weight"]

    return compare(head_gradient, (images, labels), repeats)


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="seconds in place of minutes; the numbers mean nothing")
    parser.add_argument("--output", type=Path, help="where to write the numbers as JSON")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    repeats = 1 if options.smoke else 7
    sizes = (1, 4) if options.smoke else (1, 16, 256)
    results = {f"logistic d={DIMENSION}, {n} problems": small_problems(n, repeats) for n in sizes}
    tasks, filters = (2, 8) if options.smoke else (16, 64)
    results[f"conv4, {filters} filters, {tasks} tasks"] = conv4_tasks(tasks, repeats, filters)

    machine = {"machine": platform.machine(), "python": platform.python_version(), "torch": torch.__version__}
    print(f"{machine}, 1 thread, {repeats} repeats, {' '.join(['python', *sys.argv])}")
    print(f"{'case':36} {'loop':>9} {'vmap':>9} {'loop/vmap':>10} {'difference':>11}")
    for case, r in results.items():
        print(f"{case:36} {r['loop_s']:8.3f}s {r['vmap_s']:8.3f}s {r['ratio']:10.2f} {r['difference']:11.1e}")
    if options.output:
        options.output.write_text(json.dumps({**machine, "results": results}, indent=1) + "\n")
    # lanes of float64 agree to the tolerances asked for; conv4 is float32, where sums in another order part
    assert all(r["difference"] < (1e-4 if "logistic" in case else 5e-2) for case, r in results.items())
    return results


if __name__ == "__main__":
    main()
