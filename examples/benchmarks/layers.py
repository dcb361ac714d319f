"""What do five layers cost, forward and gradient, against cvxpylayers, qpth, TorchOpt, JAXopt and Optimistix?

    python examples/benchmarks/layers.py [--smoke] [--repeats 7] [--seed 0] [--kinds ridge,lasso] [--output FILE.json]

Ridge and logistic regression (gradient in the log-penalties; of ridge in the targets too), the lasso (in the strengths
and targets), the dual of a support vector machine (one equation, a box; in log C and log gamma of its kernel) and dense
quadratic programs (in all six arguments), float64, one problem or 64 together. Iterative solvers start at zero and are
asked for 1e-10; "direct", "FISTA by hand" and "active set by hand" are solvers written for the problem, which TorchOpt
and il.argmin both get; "unchecked" is il.argmin without its check of the answer, which the others do not have;
"lanes as one" is one problem of all lanes, as TorchOpt has them.

Everybody computes the same numbers: the errors shown are the largest relative distances of any lane to a reference by
dense linear algebra (`_layers_problems.py`), of x and of the gradients. Every round runs each method for a tenth of a
second (one call at least, 20 at most; the mean counts), in an order that turns; times are wall times on one core,
medians over the rounds; ratios are taken within a round, to the fastest layer of this library. A method above 1e-6 in
its gradient is shown, and is no peer. Compilation (JAX) and the building of a problem (cvxpylayers) are in no time. A
method that takes more than two seconds is measured once.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from _layers_jax import jaxopt_makers, optimistix_makers
from _layers_problems import Problem, errors, make
from _layers_rivals import (
    OBJECTIVES,
    RTOL,
    Call,
    Makers,
    Solver,
    active_set,
    by_autograd,
    by_program,
    cvxpylayers_makers,
    cvxpylayers_qp_makers,
    direct,
    fista,
    qpth_makers,
    step_of,
    torchopt_makers,
)

import implicitlayer as il

CASES = {
    "ridge": [(20, 1), (20, 64), (100, 64), (500, 1)],
    "logistic": [(20, 1), (20, 64), (64, 64), (500, 1)],
    "lasso": [(20, 1), (20, 64), (100, 64), (500, 1)],
    "svm": [(50, 1), (50, 64), (200, 1)],
    "qp": [(10, 1), (10, 64), (50, 64), (100, 1), (200, 1)],
}
SMOKE = {kind: [(8, 2)] for kind in CASES}
TIE = 0.05  # a method against itself differs by that much from one run to the next
LIMIT = 1e-6  # of a gradient that counts as right
PATIENCE = 60  # seconds; a rival whose first call takes longer is left out
ENOUGH, CALLS = 0.1, 20  # seconds and calls, the most of one method in one round
SLOW = 2.0  # seconds; a method whose second call takes longer gets one round
RIVALS = (
    torchopt_makers,
    cvxpylayers_makers,
    cvxpylayers_qp_makers,
    qpth_makers,
    jaxopt_makers,
    optimistix_makers,
)
PACKAGES = ("torchopt", "cvxpylayers", "cvxpy", "diffcp", "scs", "qpth", "jax", "jaxopt", "optimistix", "lineax")


def own_makers() -> Makers:
    def layer(problem: Problem, solver: Callable[..., Any], **settings: Any) -> Call:
        start = torch.zeros(problem.lanes, problem.n, dtype=torch.float64)
        if problem.lanes == 1:  # one problem needs no dimension of lanes
            single = il.argmin(OBJECTIVES[problem.kind], solver, **settings)
            return by_autograd(problem, lambda *t: single(start[0], *(v[0] for v in t), *problem.constants)[None])
        argmin = il.argmin(OBJECTIVES[problem.kind], solver, batch_dims=1, **settings)
        return by_autograd(problem, lambda *t: argmin(start, *t, *problem.constants))  # data as thetas

    def lasso(problem: Problem, by_hand: Callable[[Problem], Solver] | None = None, **settings: Any) -> Call:
        step = step_of(problem)
        solver: Any = il.solvers.ProximalGradient(step_size=step, rtol=RTOL, max_steps=5000)
        if by_hand is not None:
            solver = ByHand(problem, by_hand(problem))
        strength = (lambda t, b, A: il.L1(t)) if problem.lanes == 1 else lambda t, b, A: il.L1(t[:, None])
        return layer(problem, solver, regularizer=strength, step_size=step, **settings)

    def smooth(problem: Problem, **settings: Any) -> Call:
        return layer(problem, ByHand(problem, lambda _, *thetas: direct(problem, *thetas)), **settings)

    def as_one(problem: Problem) -> Call:
        """All lanes as one problem, as TorchOpt has them: one tolerance and one number of steps for all."""
        start = torch.zeros(problem.lanes, problem.n, dtype=torch.float64)
        total = lambda x, *thetas: OBJECTIVES[problem.kind](x, *thetas).sum()  # noqa: E731
        solver = ByHand(problem, lambda _, *thetas: direct(problem, *thetas))
        argmin = il.argmin(total, solver, linear_solver=il.ConjugateGradient(rtol=RTOL), stationarity_rtol=None)
        return by_autograd(problem, lambda *thetas: argmin(start, *thetas, *problem.constants))

    makers: Makers = {}
    for kind in ("ridge", "logistic"):
        makers[f"{kind}: il.argmin, LBFGS + CG"] = lambda p: layer(p, il.solvers.LBFGS(rtol=RTOL, max_steps=2000))
        makers[f"{kind}: il.argmin, NewtonCG + CG"] = lambda p: layer(p, il.solvers.NewtonCG(rtol=RTOL))
        makers[f"{kind}: il.argmin, direct + CG"] = smooth
        makers[f"{kind}: il.argmin, direct + Dense"] = partial(smooth, linear_solver=il.Dense())
        unchecked = partial(smooth, stationarity_rtol=None)
        makers[f"{kind}: il.argmin, direct + CG, unchecked"] = unchecked
        makers[f"{kind}: il.argmin, direct + Dense, unchecked"] = partial(unchecked, linear_solver=il.Dense())
        makers[f"{kind}: il.argmin, direct + CG, unchecked, lanes as one"] = as_one
    for name, solver in (("ProximalGradient", None), ("FISTA by hand", fista), ("active set by hand", active_set)):
        makers[f"lasso: il.argmin, {name} + GMRES"] = partial(lasso, by_hand=solver)
        makers[f"lasso: il.argmin, {name} + Dense"] = partial(lasso, by_hand=solver, linear_solver=il.Dense())
        unchecked = partial(lasso, by_hand=solver, stationarity_rtol=None)
        makers[f"lasso: il.argmin, {name} + GMRES, unchecked"] = unchecked
        makers[f"lasso: il.argmin, {name} + Dense, unchecked"] = partial(unchecked, linear_solver=il.Dense())
    return makers | {f"{kind}: il.qp": lambda p: by_program(p, il.qp) for kind in ("svm", "qp")}


class ByHand:
    """A solver that takes all lanes at once and needs no objective: it knows its problem."""

    batched = True

    def __init__(self, problem: Problem, solve: Solver) -> None:
        self.count, self.solve = len(problem.thetas), solve

    def __call__(self, objective: Callable[..., Any], start: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
        thetas = given[: self.count]  # after them come the data
        if start.ndim == 2:
            return self.solve(start, *thetas)
        return self.solve(start[None], *(t[None] for t in thetas))[0]


def all_makers() -> tuple[Makers, list[str]]:
    """Ours and those of the rivals that are installed, and what is not."""
    found, left_out = own_makers(), []
    for source in RIVALS:
        try:
            found |= source()
        except ImportError as error:
            name = source.__name__.removesuffix("_makers").removesuffix("_qp")
            left_out.append(f"{name} left out: not installed ({error})")
    return found, list(dict.fromkeys(left_out))


def is_peer(name: str) -> bool:
    """A PyTorch layer of somebody else."""
    return not any(own in name for own in ("il.", "JAXopt", "Optimistix"))


def first_calls(problem: Problem, makers: Makers) -> tuple[dict[str, Call], dict[str, dict[str, Any]]]:
    """The methods that can do the problem, and a row for each: errors, or why it failed."""
    calls: dict[str, Call] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, maker in makers.items():
        kind, _, method = name.partition(": ")
        if kind != problem.kind:
            continue
        row: dict[str, Any] = {"problem": problem.name, "method": method}
        try:
            signal.alarm(0 if "il." in name else PATIENCE)
            start = time.perf_counter()
            call = maker(problem)
            solved = call()
            row["first_call_s"] = time.perf_counter() - start
            row["x_error"], row["gradient_error"] = errors(solved, problem.expected)
            calls[method] = call
        except Exception as error:
            if "il." in name:
                raise
            row["failed"] = f"{type(error).__name__}: {error}"[:160]  # a rival's failure is a result
        finally:
            signal.alarm(0)
        rows[method] = row
    return calls, rows


def too_long(*_: object) -> None:
    raise TimeoutError(f"no answer within {PATIENCE} s")


def seconds_of(call: Call) -> float:
    """Mean seconds of a call, over as many in a row as fit: a layer is called again and again, so caches are warm."""
    start, count = time.perf_counter(), 0
    while count < CALLS and (not count or time.perf_counter() - start < ENOUGH):
        call()
        count += 1
    return (time.perf_counter() - start) / count


def measure(problem: Problem, makers: Makers, repeats: int) -> list[dict[str, Any]]:
    calls, rows = first_calls(problem, makers)
    times: dict[str, list[float]] = {method: [] for method in calls}
    order = list(calls)
    for k in range(repeats):
        for method in order[k % len(order) :] + order[: k % len(order)]:
            if times[method] and times[method][0] > SLOW:
                times[method].append(times[method][0])
                continue
            times[method].append(seconds_of(calls[method]))
    own = [method for method in calls if "il." in method and rows[method]["gradient_error"] < LIMIT]
    best = min(own, key=lambda method: statistics.median(times[method]))
    for method, seconds in times.items():
        ratios = [a / b for a, b in zip(seconds, times[best], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4) if repeats > 1 else (ratios[0],) * 3
        spread = {"seconds": statistics.median(seconds), "fastest_s": min(seconds), "slowest_s": max(seconds)}
        ratio = {"ratio": statistics.median(ratios), "ratio_low": low, "ratio_high": high}
        rows[method] |= {**spread, **ratio, "right": rows[method]["gradient_error"] < LIMIT, "best_own": method == best}
    return list(rows.values())


def table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| problem | method | time | / il | quartiles | error of x | of gradient |",
        "|---|---|---:|---:|---|---|---|",
    ]
    for r in rows:
        if "failed" in r:
            lines.append(f"| {r['problem']} | {r['method']} | - | - | {r['failed'].replace('|', '/')} | | |")
            continue
        quartiles = f"{r['ratio_low']:.2f}-{r['ratio_high']:.2f}"
        ratio = "**1**" if r["best_own"] else f"{r['ratio']:.2f}"
        wrong = "" if r["right"] else ": not right"
        lines.append(
            f"| {r['problem']} | {r['method']} | {1e3 * r['seconds']:.2f} ms | {ratio} | {quartiles} "
            f"| {r['x_error']:.0e} | {r['gradient_error']:.0e}{wrong} |"
        )
    return lines


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """Per problem the fastest right rival against the fastest of ours, and PyTorch layers that win by being wrong."""
    lines = ["| problem | best of il | best PyTorch peer / il | faster, not right | best in JAX / il |"]
    lines.append("|---|---|---|---|---|")
    for name in dict.fromkeys(r["problem"] for r in rows):
        timed = [r for r in rows if r["problem"] == name and "ratio" in r]
        own = next(r for r in timed if r["best_own"])
        peers = [r for r in timed if is_peer(r["method"])]
        in_jax = [r for r in timed if "il." not in r["method"] and not is_peer(r["method"])]
        texts = []
        for group in (peers, in_jax):
            right = [r for r in group if r["right"]]
            best = min(right, key=lambda r: r["ratio"], default=None)
            texts.append("none" if best is None else f"{best['ratio']:.2f}{_mark(best['ratio'])} ({best['method']})")
        wrong = [r for r in peers if not r["right"] and r["ratio"] < 1]
        inexact = ", ".join(f"{r['ratio']:.2f} ({r['method']}: {r['gradient_error']:.0e})" for r in wrong)
        lines.append(
            f"| {name} | {1e3 * own['seconds']:.1f} ms ({own['method'].removeprefix('il.argmin, ')}) "
            f"| {texts[0]} | {inexact} | {texts[1]} |"
        )
    return lines


def _mark(ratio: float) -> str:
    return " **loss**" if ratio < 1 - TIE else " tie" if ratio < 1 + TIE else ""


def accuracy(rows: list[dict[str, Any]]) -> list[str]:
    """Per method: how many problems it was given, on how many it was right, its worst errors."""
    lines = [
        "| method | problems | right to 1e-6 | worst error of x | worst error of a gradient |",
        "|---|---:|---:|---|---|",
    ]
    for method in dict.fromkeys(r["method"] for r in rows):
        mine = [r for r in rows if r["method"] == method]
        done = [r for r in mine if "failed" not in r]
        worst = [max((r[name] for r in done), default=float("nan")) for name in ("x_error", "gradient_error")]
        right = sum(r["right"] for r in done)
        lines.append(f"| {method} | {len(mine)} | {right} | {worst[0]:.0e} | {worst[1]:.0e} |")
    return lines


def one_core() -> None:
    """Every thread of every library, those that run already too, on one core."""
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        core = max(os.sched_getaffinity(0))
        for thread in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(thread), {core})


def environment(seed: int, repeats: int) -> dict[str, Any]:
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "-"
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    command = " ".join(["python", "examples/benchmarks/layers.py", *sys.argv[1:]])
    where = names[0] if names else platform.processor()
    return {"machine": where, "versions": versions, "seed": seed, "rounds": repeats, "command": command}


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny problems, one round; the times mean nothing")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(CASES), help="which layers, separated by commas")
    parser.add_argument("--output", type=Path, help="where to write the numbers as JSON")
    parser.add_argument("--show", type=Path, help="measure nothing, print the tables of such a file")
    options = parser.parse_args(argv)
    if options.show:
        rows = json.loads(options.show.read_text())["results"]
        print(*table(rows), "", *verdicts(rows), "", *accuracy(rows), sep="\n")
        return rows
    one_core()
    signal.signal(signal.SIGALRM, too_long)
    repeats = 1 if options.smoke else options.repeats
    about = environment(options.seed, repeats)
    rows: list[dict[str, Any]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the rivals; ours are errors
        warnings.simplefilter("error", il.ImplicitLayerWarning)
        makers, left_out = all_makers()
        print(f"{about['machine']}, one core, {about['versions']}, seed {options.seed}, {repeats} rounds")
        print(about["command"], *left_out, "", sep="\n")
        for kind in options.kinds.split(","):
            for n, lanes in (SMOKE if options.smoke else CASES)[kind]:
                found = measure(make(kind, n, lanes, options.seed), makers, repeats)
                print("\n".join(table(found)[0 if not rows else 2 :]), flush=True)
                rows += found
    print("", *verdicts(rows), "", *accuracy(rows), sep="\n")
    if options.output:
        options.output.write_text(json.dumps({**about, "left_out": left_out, "results": rows}, indent=1) + "\n")
    assert all(r["right"] for r in rows if "il." in r["method"]), "a gradient of this library is off by more than 1e-6"
    return rows


if __name__ == "__main__":
    main()
