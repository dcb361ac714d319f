"""How does the time of a layer grow, forward and gradient, with everything that there may be many of?

    python examples/benchmarks/scaling.py [--smoke] [--axes "leaves,theta"] [--seed 0] [--output FILE.json]

One axis at a time, float64: unknowns, lanes of ten unknowns (batch_dims and vmap), tensors in theta, leaves of x (and
the same evaluations written by hand, with torch alone), tensors that the objective closes over, steps of conjugate
gradients, rows of a quadratic program. The solver knows the answer, so what is measured is the layer; the objective has
a diagonal Hessian, and ten steps of conjugate gradients solve the backward system unless their number is the axis. Of
each axis: the time, its slope in a log-log fit over the larger half (1 is linear), and the time of one more. Times are
the least of three rounds, of the processor: other programs may run. Of the largest number of unknowns also the memory,
as copies of x: the peak of live tensor storage made by a call, beside that of the same computation written by hand.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import implicitlayer as il

F64 = torch.float64
CG = il.ConjugateGradient(max_steps=10)
SIZES = {
    "unknowns": [100, 1_000, 10_000, 100_000, 1_000_000, 10_000_000],
    "lanes, batch_dims": [1, 10, 100, 1_000, 10_000, 100_000],
    "lanes, vmap": [1, 10, 100, 1_000, 10_000, 100_000],
    "theta tensors": [1, 10, 100, 1_000, 4_000],
    "leaves of x": [1, 10, 100, 1_000],
    "leaves of x, by hand": [1, 10, 100, 1_000],
    "closed-over tensors": [1, 10, 100, 1_000],
    "CG steps": [5, 50, 500, 2_000],
    "rows of a program": [10, 30, 100, 300],
}
LINEAR = 1.15  # a slope up to this is that of what grows with the axis


def diagonal(n: int, lanes: tuple[int, ...] = ()) -> Callable[[], None]:
    """x = t / d by (x, d x) / 2 - (t, x), of n unknowns."""
    d = torch.linspace(1.0, 2.0, n, dtype=F64)
    layer = il.argmin(
        lambda x, t: (0.5 * d * x * x - t * x).sum(-1),
        Known(lambda t: t / d),
        linear_solver=CG,
        batch_dims=len(lanes),
    )
    t = torch.ones(*lanes, n, dtype=F64, requires_grad=True)
    init = torch.zeros(*lanes, n, dtype=F64)
    return lambda: torch.autograd.grad(layer(init, t).sum(), t)[0].sum()


def by_hand(n: int) -> Callable[[], torch.Tensor]:
    """What the layer of :func:`diagonal` computes, without it."""
    d = torch.linspace(1.0, 2.0, n, dtype=F64)
    leaf = torch.ones(n, dtype=F64, requires_grad=True)

    def call() -> torch.Tensor:
        x, t = (leaf.detach() / d).requires_grad_(), leaf.detach().requires_grad_()
        (gradient,) = torch.autograd.grad((0.5 * d * x * x - t * x).sum(-1), x, create_graph=True)
        u, r = torch.zeros_like(x), torch.ones_like(x)
        p, size = r.clone(), r @ r
        for _ in range(10):
            (product,) = torch.autograd.grad(gradient, x, p, retain_graph=True)
            step = size / (p @ product)
            u, r = u + step * p, r - step * product
            size, before = r @ r, size
            p = r + size / before * p
        return -torch.autograd.grad(gradient, t, u)[0].sum()

    return call


def copies_of_x(call: Callable[[], Any], n: int) -> float:
    """The most that a call holds at a time, in vectors of n numbers."""
    call()
    with il.meta.PeakMemory() as memory:
        call()
    return memory.peak / (8 * n)


class Known:
    """A solver that knows the answer, for all lanes at once."""

    batched = True

    def __init__(self, answer: Callable[..., Any]) -> None:
        self.answer = answer

    def __call__(self, objective: Any, init: Any, *theta: Any) -> Any:
        return self.answer(*theta)


def vmapped(lanes: int) -> Callable[[], None]:
    d = torch.linspace(1.0, 2.0, 10, dtype=F64)
    layer = il.argmin(lambda x, t: (0.5 * d * x * x - t * x).sum(), Known(lambda t: t / d), linear_solver=CG)
    t = torch.ones(lanes, 10, dtype=F64, requires_grad=True)
    run = torch.vmap(lambda t: layer(torch.zeros(10, dtype=F64), t))
    return lambda: torch.autograd.grad(run(t).sum(), t)[0].sum()


def of_tensors(where: str, count: int) -> Callable[[], None]:
    """``count`` tensors of three entries as theta, as x, or closed over; the objective reads them in one stack."""
    parts = [torch.full((3,), 1.0 + i / count, dtype=F64, requires_grad=True) for i in range(count)]
    x0 = torch.zeros(3, dtype=F64)
    if where == "theta":
        layer = il.argmin(
            lambda x, t: 0.5 * ((x - torch.stack(t).mean(0)) ** 2).sum(),
            Known(lambda t: torch.stack(t).mean(0)),
            linear_solver=CG,
        )
        return lambda: torch.autograd.grad(layer(x0, parts).sum(), parts)[0].sum()
    if where == "closed":
        layer = il.argmin(
            lambda x: 0.5 * ((x - torch.stack(parts).mean(0)) ** 2).sum(),
            Known(lambda: torch.stack(parts).mean(0)),
            linear_solver=CG,
        )
        return lambda: torch.autograd.grad(layer(x0).sum(), parts)[0].sum()
    t = torch.ones(3, dtype=F64, requires_grad=True)
    layer = il.argmin(
        lambda x, t: 0.5 * ((torch.stack(x) - t) ** 2).sum(),
        Known(lambda t: [t.clone() for _ in parts]),
        linear_solver=CG,
    )
    init = [torch.zeros(3, dtype=F64) for _ in parts]
    return lambda: torch.autograd.grad(torch.stack(layer(init, t)).sum(), t)[0].sum()


def leaves_by_hand(count: int) -> Callable[[], torch.Tensor]:
    """What the layer of ``of_tensors("x", count)`` evaluates, without it: autograd's own time for each leaf."""
    leaf = torch.ones(3, dtype=F64, requires_grad=True)

    def objective(x: list[torch.Tensor], t: torch.Tensor) -> torch.Tensor:
        return 0.5 * ((torch.stack(x) - t) ** 2).sum()

    def call() -> torch.Tensor:
        t = leaf.detach().requires_grad_()
        x = [leaf.detach().clone().requires_grad_() for _ in range(count)]
        objective(x, t)  # a first run, which shows what is read
        gradient = torch.autograd.grad(objective(x, t), x, create_graph=True)

        def product(vector: torch.Tensor) -> torch.Tensor:
            return torch.cat(torch.autograd.grad(gradient, x, vector.split(3), retain_graph=True))

        product(torch.cat(gradient).detach())  # how far the answer is
        r = torch.ones(3 * count, dtype=F64)
        u = r * (r @ r) / (r @ product(r))  # the Hessian is the identity: one step ends at the solution
        return -torch.autograd.grad(gradient, t, u.split(3))[0].sum()

    return call


def cg_steps(steps: int) -> Callable[[], None]:
    n = 4_000
    d = torch.logspace(0, 6, n, dtype=F64)  # so ill-conditioned that every step is made
    layer = il.argmin(
        lambda x, t: (0.5 * d * x * x - t * x).sum(),
        Known(lambda t: t / d),
        linear_solver=il.ConjugateGradient(max_steps=steps),
    )
    t = torch.ones(n, dtype=F64, requires_grad=True)
    return lambda: torch.autograd.grad(layer(torch.zeros(n, dtype=F64), t).sum(), t)[0].sum()


def program(rows: int) -> Callable[[], None]:
    generator = torch.Generator().manual_seed(rows)
    n = 10
    G = torch.randn(rows, n, dtype=F64, generator=generator)
    p = torch.randn(n, dtype=F64, generator=generator).requires_grad_()
    h = torch.ones(rows, dtype=F64)
    return lambda: torch.autograd.grad(il.qp(torch.eye(n, dtype=F64), p, G=G, h=h).sum(), p)[0].sum()


MAKERS: dict[str, Callable[[int], Callable[[], Any]]] = {
    "unknowns": diagonal,
    "lanes, batch_dims": lambda lanes: diagonal(10, (lanes,)),
    "lanes, vmap": vmapped,
    "theta tensors": lambda count: of_tensors("theta", count),
    "leaves of x": lambda count: of_tensors("x", count),
    "leaves of x, by hand": leaves_by_hand,
    "closed-over tensors": lambda count: of_tensors("closed", count),
    "CG steps": cg_steps,
    "rows of a program": program,
}


def seconds_of(call: Callable[[], Any]) -> float:
    call()
    best = math.inf
    for _ in range(3):
        count, begin = 0, time.process_time()
        while count < 20 and (not count or time.process_time() - begin < 0.1):
            call()
            count += 1
        best = min(best, (time.process_time() - begin) / count)
    return best


def slope(sizes: list[int], seconds: list[float]) -> float:
    """Of log time over log size, least squares over the larger half."""
    half = len(sizes) // 2
    x, y = (torch.tensor(v[half - 1 :], dtype=F64).log() for v in (sizes, seconds))
    x = x - x.mean()
    return float((x * (y - y.mean())).sum() / (x * x).sum())


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="the three smallest sizes; the slopes mean nothing")
    parser.add_argument(
        "--axes", default="", help="only those whose name holds one of these words, with commas between"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="where to write the numbers as JSON")
    options = parser.parse_args(argv)
    torch.manual_seed(options.seed)
    torch.set_num_threads(1)
    axes: dict[str, Any] = {}
    print("| axis | sizes | time of the least and the largest | slope | one more |\n|---|---|---|---|---|")
    with warnings.catch_warnings():
        warnings.simplefilter("error", il.ImplicitLayerWarning)
        for name, sizes in SIZES.items():
            if not any(word in name for word in options.axes.split(",")):
                continue
            sizes = sizes[:3] if options.smoke else sizes
            seconds = [seconds_of(MAKERS[name](size)) for size in sizes]
            more = (seconds[-1] - seconds[-2]) / (sizes[-1] - sizes[-2])
            axes[name] = {"sizes": sizes, "seconds": seconds, "slope": slope(sizes, seconds), "one_more_s": more}
            ends = f"{1e3 * seconds[0]:.2f} ms, {1e3 * seconds[-1]:.0f} ms"
            growth = f"{axes[name]['slope']:.2f}"
            print(f"| {name} | {sizes[0]:,} to {sizes[-1]:,} | {ends} | {growth} | {1e6 * more:.2f} µs |", flush=True)
    copies: dict[str, float] = {}
    if "unknowns" in axes:
        most = axes["unknowns"]["sizes"][-1]
        makers = {"layer": diagonal, "by hand": by_hand}
        copies = {"unknowns": most, **{name: copies_of_x(make(most), most) for name, make in makers.items()}}
        print("\ncopies of x held at a time: " + ", ".join(f"{name} {value:,.1f}" for name, value in copies.items()))
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    result = {
        "machine": names[0] if names else platform.machine(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "implicitlayer": il.__version__},
        "command": " ".join(
            ["python", "examples/benchmarks/scaling.py", *(argv if argv is not None else sys.argv[1:])]
        ),
        "seed": options.seed,
        "axes": axes,
        "copies_of_x": copies,
    }
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    if not options.smoke:
        above = {name: axis["slope"] for name, axis in axes.items() if axis["slope"] > LINEAR}
        print("\ngrows faster than linearly: " + (", ".join(f"{k} ({v:.2f})" for k, v in above.items()) or "nothing"))
    return result


if __name__ == "__main__":
    main()
