"""Is il.qp faster than qpth and CVXPYlayers on batches of dense quadratic programs, and as accurate?

    python examples/benchmarks/qp_layers.py [--smoke] [--output FILE]

Random strongly convex programs with n = 10, 50, 100 unknowns, n inequalities and n / 10 equations, in batches of 1 and
64, float64; forward and backward to all six arguments. Every layer runs at its default settings in the same process
(CVXPYlayers also with the dense solve of its backward pass, for its default one can be far off without a word);
times are medians after a warm-up, ratios are rival / il.qp (above 1: il.qp is faster). The reference of the accuracy is
one dense solve by hand with the active set of the solution. A rival that is not installed is left out with a message.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

import implicitlayer as il

Layer = Callable[..., torch.Tensor]


def program(num: int, n: int, seed: int = 0) -> list[torch.Tensor]:
    """Q, p, A, b, G, h with ``num`` lanes, feasible by construction."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(num, *shape, dtype=torch.float64, generator=generator)  # noqa: E731
    root, inside, A, G = draw(n, n), draw(n, 1), draw(max(n // 10, 1), n), draw(n, n)
    Q = root @ root.mT / n + 0.1 * torch.eye(n, dtype=torch.float64)
    return [Q, draw(n), A, (A @ inside)[..., 0], G, (G @ inside)[..., 0] + draw(n).abs()]


def gradients(layer: Layer, data: list[torch.Tensor]) -> list[torch.Tensor]:
    """x and the gradients of the sum of its squares in all six."""
    leaves = [t.detach().requires_grad_() for t in data]
    x = layer(*leaves)
    return [x.detach(), *torch.autograd.grad((x * x).sum(), leaves)]


def reference(data: list[torch.Tensor], x: torch.Tensor) -> list[torch.Tensor]:
    """The gradients of the first lane, by one dense solve with the rows that are active at x."""
    Q, p, A, b, G, h = (t[0] for t in data)
    active = (G @ x[0] - h).abs() < 1e-7
    rows, e, n = torch.cat([A, G[active]]), len(b), len(p)
    matrix = torch.zeros(n + len(rows), n + len(rows), dtype=torch.float64)
    matrix[:n, :n], matrix[:n, n:], matrix[n:, :n] = Q, rows.T, rows
    point = torch.linalg.solve(matrix, torch.cat([-p, b, h[active]]))
    u = torch.linalg.solve(matrix, torch.cat([2 * point[:n], torch.zeros(len(rows), dtype=torch.float64)]))
    d, solution, w, force = u[:n], point[:n], u[n:], point[n:]
    by_rows = -(torch.outer(force, d) + torch.outer(w, solution))
    by_g, by_h = torch.zeros_like(G), torch.zeros_like(h)
    by_g[active], by_h[active] = by_rows[e:], w[e:]
    return [-(torch.outer(d, solution) + torch.outer(solution, d)) / 2, -d, by_rows[:e], w[:e], by_g, by_h]


def error_of(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Largest error of a gradient of the first lane, relative to that gradient's norm (or to 1 where it is small)."""
    pairs = zip(found[1:], expected, strict=True)
    return max(float((got[0] - right).norm() / (1 + right.norm())) for got, right in pairs)


def rivals() -> dict[str, Callable[[int], Layer]]:
    """What is installed: name -> layer for programs with n unknowns."""
    found: dict[str, Callable[[int], Layer]] = {}
    try:
        from qpth.qp import QPFunction

        # qpth has another order of arguments: equations last
        found["qpth"] = lambda n: lambda Q, p, A, b, G, h: QPFunction(verbose=-1)(Q, p, G, h, A, b)
    except ImportError as error:
        print(f"qpth is left out: {error}", file=sys.stderr)
    try:
        import cvxpy
        from cvxpylayers.torch import CvxpyLayer

        def build(n: int, mode: str) -> Layer:
            e = max(n // 10, 1)
            x, root, p = cvxpy.Variable(n), cvxpy.Parameter((n, n)), cvxpy.Parameter(n)
            A, b, G, h = (cvxpy.Parameter(shape) for shape in ((e, n), e, (n, n), n))
            value = cvxpy.Minimize(0.5 * cvxpy.sum_squares(root @ x) + p @ x)
            layer = CvxpyLayer(cvxpy.Problem(value, [A @ x == b, G @ x <= h]), [root, p, A, b, G, h], [x])

            def solve(Q: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
                # it wants a root of Q: x'Qx = ||root x||^2
                return layer(torch.linalg.cholesky(Q).mT, *rest, solver_args={"mode": mode})[0]

            return solve

        found["cvxpylayers"] = lambda n: build(n, "lsqr")
        found["cvxpylayers, dense"] = lambda n: build(n, "dense")  # how its backward solves: direct, not LSQR
    except ImportError as error:
        print(f"cvxpylayers is left out: {error}", file=sys.stderr)
    return found


def median_seconds(function: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median, and the spread from the fastest to the slowest."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times), max(times) - min(times)


def measure(name: str, layer: Layer, data: list[torch.Tensor], repeats: int) -> dict[str, object]:
    try:
        first = gradients(layer, data)
    except Exception as error:  # a rival's failure is a result
        return {"layer": name, "failed": f"{type(error).__name__}: {error}"[:200]}
    seconds, spread = median_seconds(lambda: gradients(layer, data), repeats)
    leaves = [t.detach().requires_grad_() for t in data]
    forward, _ = median_seconds(lambda: layer(*leaves), repeats)
    accurate = error_of(first, reference(data, gradients(il.qp, data)[0]))
    return {"layer": name, "seconds": seconds, "spread": spread, "forward": forward, "gradient_error": accurate}


def main(argv: list[str] | None = None) -> list[dict[str, object]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="seconds in place of minutes; the numbers mean nothing")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="where to write the numbers as JSON")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    sizes, batches, repeats = ((10,), (1, 4), 1) if options.smoke else ((10, 50, 100), (1, 64), options.repeats)
    others = rivals()
    rows: list[dict[str, object]] = []
    machine = {"machine": platform.machine(), "python": platform.python_version(), "torch": torch.__version__}
    print(f"{machine}, 1 thread, {repeats} repeats, seed 0, {' '.join(['python', *sys.argv])}")
    print(f"{'n':>4} {'batch':>5} {'layer':18} {'forward':>9} {'both':>9} {'spread':>9} {'/ il.qp':>8} {'error':>8}")
    for n in sizes:
        for num in batches:
            data = program(num, n)
            own = measure("il.qp", il.qp, data, repeats)
            found = [own]
            for name, build in others.items():
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    found.append(measure(name, build(n), data, repeats))
            for row in found:
                row |= {"n": n, "batch": num}
                if "failed" in row:
                    print(f"{n:4} {num:5} {row['layer']:18} {row['failed']}")
                    continue
                row["ratio"] = float(row["seconds"]) / float(own["seconds"])  # type: ignore[arg-type]
                print(
                    f"{n:4} {num:5} {row['layer']:18} {row['forward']:8.4f}s {row['seconds']:8.4f}s "
                    f"{row['spread']:8.4f}s {row['ratio']:8.2f} {row['gradient_error']:8.1e}"
                )
            rows += found
    if options.output:
        options.output.write_text(json.dumps({**machine, "results": rows}, indent=1) + "\n")
    assert all(float(row["gradient_error"]) < 1e-6 for row in rows if row["layer"] == "il.qp")  # type: ignore[arg-type]
    return rows


if __name__ == "__main__":
    main()
