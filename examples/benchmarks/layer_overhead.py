"""What does the general layer cost on problems so small that Python dominates, against a loop written by hand?

    python examples/benchmarks/layer_overhead.py [--smoke] [--output FILE.json]

A quadratic loss in d unknowns, 20 steps of gradient descent on the proximal objective (strength 2) and 5 conjugate
gradient steps, float64, one thread. The loop builds the gradient graph once and writes every step out. Both compute the
same numbers (asserted). Rounds run both ways in turn; ratios are taken within a round, median and quartiles shown.
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

import implicitlayer as il

STRENGTH, STEP_SIZE, INNER_STEPS, CG_STEPS = 2.0, 0.1, 20, 5


def by_hand(loss: Callable[[torch.Tensor], torch.Tensor], theta: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    start = theta.detach()
    x = start.clone()
    for _ in range(INNER_STEPS):
        x.requires_grad_()
        value = loss(x) + 0.5 * STRENGTH * ((x - start) ** 2).sum()
        x = x.detach() - STEP_SIZE * torch.autograd.grad(value, x)[0]
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x), x, create_graph=True)
    g, r, p, rr = torch.zeros_like(v), v.clone(), v.clone(), v @ v  # (I + H/strength) g = v
    for _ in range(CG_STEPS):
        ap = torch.autograd.grad(gradient, x, p, retain_graph=True)[0] / STRENGTH + p
        alpha = rr / (p @ ap)
        g, r = g + alpha * p, r - alpha * ap
        rr_new = r @ r
        p, rr = r + rr_new / rr * p, rr_new
    return g


def compare(d: int, rounds: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    a, b, start, v = (torch.randn(*s, dtype=torch.float64, generator=generator) for s in ((d, d), (d,), (d,), (d,)))
    matrix = a @ a.T / d + torch.eye(d, dtype=torch.float64)
    theta = start.requires_grad_()

    def loss(x: torch.Tensor) -> torch.Tensor:
        return 0.5 * x @ (matrix @ x) - b @ x

    layer = il.argmin(
        il.proximal(loss, STRENGTH),
        il.solvers.GradientDescent(step_size=STEP_SIZE, max_steps=INNER_STEPS),
        linear_solver=il.ConjugateGradient(max_steps=CG_STEPS),
        stationarity_rtol=None,
    )

    def library() -> torch.Tensor:
        return torch.autograd.grad(layer(theta, theta), theta, v)[0]

    def hand() -> torch.Tensor:
        return by_hand(loss, theta, v)

    torch.testing.assert_close(library(), hand(), rtol=1e-10, atol=1e-12)
    ratios, seconds = [], []
    for _ in range(rounds):
        times = []
        for way in (hand, library):
            start_time = time.perf_counter()
            way()
            times.append(time.perf_counter() - start_time)
        seconds.append(times[0])
        ratios.append(times[1] / times[0])
    low, _, high = statistics.quantiles(ratios, n=4)
    return {"loop_s": statistics.median(seconds), "ratio": statistics.median(ratios), "low": low, "high": high}


def main(argv: list[str] | None = None) -> dict[int, dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few rounds; the numbers mean nothing")
    parser.add_argument("--output", type=Path, help="where to write the numbers as JSON")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    results = {d: compare(d, 5 if options.smoke else 200) for d in (50, 500, 2000)}
    machine = {"machine": platform.machine(), "python": platform.python_version(), "torch": torch.__version__}
    print(f"{machine}, 1 thread, {' '.join(['python', *sys.argv])}")
    for d, r in results.items():
        print(f"d = {d:5}: loop {1e3 * r['loop_s']:8.2f} ms, layer {r['ratio']:.2f} x ({r['low']:.2f}-{r['high']:.2f})")
    if options.output:
        options.output.write_text(json.dumps({**machine, "results": results}, indent=1) + "\n")
    return results


if __name__ == "__main__":
    main()
