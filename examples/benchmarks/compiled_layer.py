"""What does a compiled layer cost, forward and gradient, against the layer itself and against JAX?

    python examples/benchmarks/compiled_layer.py [--smoke] [--repeats 7] [--seed 0] [--output FILE.json]

Ridge and logistic regression and the lasso as in `layers.py`, whose problems, methods of JAX, rounds and checks are
used; every method is asked for 1e-10. "direct" is a solver written for the problem; the step size of the lasso is told
to everybody. Compilation is in no time: what the first two
calls of a compiled layer take (its own first call, and the compiler) is shown as first_s, with an empty cache of the
compiler; `--again` keeps the cache of the run before, as a second process does.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

CASES = {"ridge": [(20, 1), (20, 64), (500, 1)], "logistic": [(20, 1), (20, 64)], "lasso": [(20, 1), (20, 64)]}
CACHE = Path(tempfile.gettempdir()) / "implicitlayer_compiled_layer"


def own_makers(first_s: dict[str, float], backend: str) -> dict[str, Any]:
    from _layers_problems import Problem
    from _layers_rivals import OBJECTIVES, RTOL, Call, by_autograd, step_of
    from layers import ByHand, direct

    import implicitlayer as il

    def layer(problem: Problem, solver: Callable[..., Any], compiled: bool, **settings: Any) -> Call:
        start = torch.zeros(problem.lanes, problem.n, dtype=torch.float64)
        single = problem.lanes == 1
        made: Any = il.argmin(OBJECTIVES[problem.kind], solver, batch_dims=0 if single else 1, **settings)
        made = il.compile(made, backend=backend) if compiled else made
        if single:
            call = by_autograd(problem, lambda *t: made(start[0], *(v[0] for v in t), *problem.constants)[None])
        else:
            call = by_autograd(problem, lambda *t: made(start, *t, *problem.constants))
        if compiled:
            begin = time.perf_counter()
            call()
            call()
            first_s[f"{problem.name}: {type(solver).__name__}"] = time.perf_counter() - begin
        return call

    def lasso(problem: Problem, compiled: bool) -> Call:
        step = step_of(problem)
        strength = (lambda t, b, A: il.L1(t)) if problem.lanes == 1 else lambda t, b, A: il.L1(t[:, None])
        solver = il.solvers.ProximalGradient(step_size=step, rtol=RTOL, max_steps=5000)
        return layer(problem, solver, compiled, regularizer=strength, step_size=step)

    makers: dict[str, Any] = {
        f"lasso: il.{how}, ProximalGradient": partial(lasso, compiled=how == "compile") for how in ("argmin", "compile")
    }
    for kind in ("ridge", "logistic"):
        by_hand = lambda p: layer(p, ByHand(p, lambda _, *thetas: direct(p, *thetas)), False)  # noqa: E731
        makers[f"{kind}: il.argmin, direct + CG"] = by_hand
        for name, solver in (("NewtonCG", il.solvers.NewtonCG(rtol=RTOL)), ("LBFGS", il.solvers.LBFGS(rtol=RTOL))):
            makers[f"{kind}: il.argmin, {name} + CG"] = partial(layer, solver=solver, compiled=False)
            makers[f"{kind}: il.compile, {name} + CG"] = partial(layer, solver=solver, compiled=True)
    return makers


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="one tiny problem, traced only; the times mean nothing")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(CASES), help="of " + ", ".join(CASES))
    parser.add_argument("--again", action="store_true", help="keep the compiler's cache of the run before")
    parser.add_argument("--output", type=Path, help="where to write the numbers as JSON")
    options = parser.parse_args(argv)
    if not options.again:
        shutil.rmtree(CACHE, ignore_errors=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(CACHE)
    sys.path.insert(0, str(Path(__file__).parent))
    from layers import all_makers, environment, measure, one_core, table, too_long

    one_core()
    signal.signal(signal.SIGALRM, too_long)
    repeats = 1 if options.smoke else options.repeats
    about = environment(options.seed, repeats)
    about["command"] = " ".join(["python", "examples/benchmarks/compiled_layer.py", *(argv or sys.argv[1:])])
    print(f"{about['machine']}, one core, {about['versions']}, seed {options.seed}, {repeats} rounds\n")
    rows: list[dict[str, Any]] = []
    first_s: dict[str, float] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the rivals
        foreign, left_out = all_makers()
        makers = own_makers(first_s, "eager" if options.smoke else "inductor")
        makers |= {name: maker for name, maker in foreign.items() if "JAX" in name or "Optimistix" in name}
        for kind in options.kinds.split(","):
            for n, lanes in [(4, 2)] if options.smoke else CASES[kind]:
                found = measure(problem_of(kind, n, lanes, options.seed), makers, repeats)
                print("\n".join(table(found)[0 if not rows else 2 :]), flush=True)
                rows += found
            if options.smoke:
                break
    print("", *(f"first two calls, {name}: {seconds:.1f} s" for name, seconds in first_s.items()), sep="\n")
    if options.output:
        result = {**about, "left_out": left_out, "first_s": first_s, "cache_kept": options.again, "results": rows}
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    assert all(row["right"] for row in rows if "il." in row["method"]), "a gradient is off by more than 1e-6"
    return rows


def problem_of(kind: str, n: int, lanes: int, seed: int) -> Any:
    from _layers_problems import make

    return make(kind, n, lanes, seed)


if __name__ == "__main__":
    main()
