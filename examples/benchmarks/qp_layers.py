"""Is il.qp the fastest right layer of dense quadratic programs? Against Moreau, ProxQP, qpth and CVXPYlayers.

    python examples/benchmarks/qp_layers.py [--smoke] [--output FILE]

Random strongly convex programs with n = 10 to 200 unknowns, n inequalities and n / 10 equations, and support vector
machines of 50 and 200 points in their dual form; one or 64 at a time, float64; forward and backward to all six
arguments. Every rival at the best settings found for it: Moreau its active-set method, compiled once for the shape;
ProxQP tolerances of 1e-12 forward and backward and proximal parameters of 1e-9 (with its defaults its gradients are
good to 1e-5); CVXPYlayers the dense solve of its backward (its default can be far off without a word). il.qp runs at
its defaults, and with ``solver="auto"`` where DAQP is installed.

All of them take turns, in an order that changes, in one process on one core; the numbers are processor times, the
medians of the rounds, of data that change from call to call. Ratios are rival / il.qp within a round (above 1: il.qp is
faster). Right means: all gradients of the first lane within 1e-6 of one dense solve by hand with the active set of the
solution. A rival that is not installed is left out with a message.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
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


def machine(num: int, n: int, seed: int = 0) -> list[torch.Tensor]:
    """The dual of a support vector machine with a quadratic slack, so that Q is well conditioned."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(num, n, 2, dtype=torch.float64, generator=generator)
    noise = 0.3 * torch.randn(num, n, dtype=torch.float64, generator=generator)
    y = torch.where(points.square().sum(-1) + noise > 1.4, 1.0, -1.0).double()
    eye = torch.eye(n, dtype=torch.float64)
    Q = y[:, :, None] * (torch.exp(-2 * torch.cdist(points, points).square()) + 0.1 * eye) * y[:, None, :]
    ones = torch.ones(num, n, dtype=torch.float64)
    G = torch.cat([-eye, eye]).expand(num, 2 * n, n).contiguous()
    return [Q, -ones, y[:, None, :], 0 * ones[:, :1], G, torch.cat([0 * ones, 2 * ones], -1)]


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


def rivals() -> dict[str, Callable[[list[torch.Tensor]], Layer]]:
    """What is installed: name -> what builds a layer for data of this shape."""
    found: dict[str, Callable[[list[torch.Tensor]], Layer]] = {}
    if find_spec("daqp"):
        found["il.qp, auto"] = lambda data: lambda *data: il.qp(*data, solver="auto")
    else:
        print("il.qp with solver='auto' is left out: daqp is not installed", file=sys.stderr)
    try:
        import moreau
        from moreau.torch import Solver

        def compiled(data: list[torch.Tensor]) -> Layer:
            num, n = data[1].shape
            e, m = data[3].shape[-1], data[5].shape[-1]
            index = [(n * torch.arange(k + 1), torch.arange(n).repeat(k)) for k in (n, e + m)]
            cones = moreau.Cones(num_zero_cones=e, num_nonneg_cones=m)
            how = moreau.Settings(solver="active_set", device="cpu", batch_size=num, enable_grad=True)
            solver = Solver(n, e + m, *index[0], *index[1], cones, how)

            def solve(
                Q: torch.Tensor, p: torch.Tensor, A: torch.Tensor, b: torch.Tensor, G: torch.Tensor, h: torch.Tensor
            ) -> torch.Tensor:
                rows = torch.cat([A, G], -2).reshape(num, -1)
                return solver.solve(Q.reshape(num, -1), rows, p, torch.cat([b, h], -1)).x

            return solve

        found["moreau"] = compiled
    except ImportError as error:
        print(f"moreau is left out: {error}", file=sys.stderr)
    try:
        from proxsuite.torch.qplayer import QPFunction as ProxQP

        tight = {"eps": 1e-12, "eps_backward": 1e-12, "rho_backward": 1e-9, "mu_backward": 1e-9}

        def proximal(data: list[torch.Tensor]) -> Layer:
            function = ProxQP(**tight)
            return lambda Q, p, A, b, G, h: function(Q, p, A, b, G, torch.full_like(h, -1e20), h)[0]

        found["proxqp"] = proximal
    except ImportError as error:
        print(f"proxqp is left out: {error}", file=sys.stderr)
    try:
        from qpth.qp import QPFunction

        # qpth has another order of arguments: equations last
        found["qpth"] = lambda data: lambda Q, p, A, b, G, h: QPFunction(verbose=-1)(Q, p, G, h, A, b)
    except ImportError as error:
        print(f"qpth is left out: {error}", file=sys.stderr)
    try:
        import cvxpy
        from cvxpylayers.torch import CvxpyLayer

        def build(data: list[torch.Tensor]) -> Layer:
            n, e, m = (data[k].shape[-1] for k in (1, 3, 5))
            x, root, p = cvxpy.Variable(n), cvxpy.Parameter((n, n)), cvxpy.Parameter(n)
            A, b, G, h = (cvxpy.Parameter(shape) for shape in ((e, n), e, (m, n), m))
            value = cvxpy.Minimize(0.5 * cvxpy.sum_squares(root @ x) + p @ x)
            layer = CvxpyLayer(cvxpy.Problem(value, [A @ x == b, G @ x <= h]), [root, p, A, b, G, h], [x])

            def solve(Q: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
                # it wants a root of Q: x'Qx = ||root x||^2
                return layer(torch.linalg.cholesky(Q).mT, *rest, solver_args={"mode": "dense"})[0]

            return solve

        found["cvxpylayers, dense"] = build  # how its backward solves: direct, not LSQR
    except ImportError as error:
        print(f"cvxpylayers is left out: {error}", file=sys.stderr)
    return found


def seconds_of(function: Callable[[], object]) -> float:
    """Processor time of one call; the mean of some where one is too short for the clock."""
    start, calls = time.process_time(), 0
    while calls == 0 or time.process_time() - start < 5e-3:
        function()
        calls += 1
    return (time.process_time() - start) / calls


def measure(layers: dict[str, Layer], sets: list[list[torch.Tensor]], rounds: int) -> list[dict[str, object]]:
    """One row for each layer; they take turns. ``sets``: data of one shape, one after the other."""
    rows: dict[str, dict[str, object]] = {}
    x = il.qp(*sets[0])
    for name, layer in layers.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                first = gradients(layer, sets[0])
            rows[name] = {"layer": name, "gradient_error": error_of(first, reference(sets[0], x))}
        except Exception as error:  # a rival's failure is a result
            rows[name] = {"layer": name, "failed": f"{type(error).__name__}: {error}"[:200]}
    running = {name: layer for name, layer in layers.items() if "failed" not in rows[name]}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in running}
    turn, order = itertools.cycle(sets), list(running.items())
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)  # who comes after whom matters to the caches
        for name, layer in order:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                both = seconds_of(lambda layer=layer: gradients(layer, next(turn)))  # type: ignore[misc]
                forward = seconds_of(
                    lambda layer=layer: layer(*(t.detach().requires_grad_() for t in next(turn)))  # type: ignore[misc]
                )
            times[name].append((both, forward))
    for name, found in times.items():
        both, forward = ([pair[k] for pair in found] for k in (0, 1))
        ratios = [mine / own for mine, (own, _) in zip(both, times["il.qp"], strict=True)]
        rows[name] |= {"seconds": statistics.median(both), "forward": statistics.median(forward)}
        rows[name] |= {"ratio": statistics.median(ratios), "lowest_ratio": min(ratios), "highest_ratio": max(ratios)}
    return list(rows.values())


def main(argv: list[str] | None = None) -> list[dict[str, object]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="seconds in place of minutes; the numbers mean nothing")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, help="where to write the numbers as JSON")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    cases = [("qp", program, n, num) for n, num in ((10, 1), (10, 64), (50, 1), (50, 64), (100, 1), (200, 1))]
    cases += [("svm", machine, n, num) for n, num in ((50, 1), (50, 64), (200, 1))]
    if options.smoke:
        cases = [("qp", program, 10, 1), ("svm", machine, 10, 4)]
    rounds = 1 if options.smoke else options.rounds
    others = rivals()
    rows: list[dict[str, object]] = []
    versions = {"machine": platform.machine(), "python": platform.python_version(), "torch": torch.__version__}
    packages = [name for name in ("moreau", "proxsuite", "daqp", "qpth", "cvxpylayers") if find_spec(name)]
    versions |= {name: version(name) for name in packages}
    versions["load"] = " ".join(f"{load:.1f}" for load in os.getloadavg())
    print(f"{versions}, 1 thread, {rounds} rounds, {' '.join(['python', *sys.argv])}")
    print(
        f"{'case':14} {'layer':18} {'forward':>9} {'both':>9} {'/ il.qp':>8} {'lowest':>7} {'highest':>7} {'error':>8}"
    )
    for kind, make, n, num in cases:
        sets = [make(num, n, seed) for seed in range(3)]
        layers: dict[str, Layer] = {"il.qp": il.qp} | {name: build(sets[0]) for name, build in others.items()}
        for row in measure(layers, sets, rounds):
            row |= {"kind": kind, "n": n, "batch": num}
            rows.append(row)
            case = f"{kind} n={n} x{num}"
            if "failed" in row:
                print(f"{case:14} {row['layer']:18} {row['failed']}")
                continue
            print(
                f"{case:14} {row['layer']:18} {row['forward']:8.5f}s {row['seconds']:8.5f}s {row['ratio']:8.2f} "
                f"{row['lowest_ratio']:7.2f} {row['highest_ratio']:7.2f} {row['gradient_error']:8.1e}"
            )
    if options.output:
        options.output.write_text(json.dumps({**versions, "results": rows}, indent=1) + "\n")
    own = [row for row in rows if str(row["layer"]).startswith("il.qp")]
    assert all(float(row["gradient_error"]) < 1e-6 for row in own)  # type: ignore[arg-type]
    return rows


if __name__ == "__main__":
    main()
