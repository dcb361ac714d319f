"""How do other layers answer the same faults? One table of faults, run on every library that is installed.

    python examples/benchmarks/peers_faults.py [--smoke] [--output FILE] [--page FILE]

Programs: il.qp, CVXPYlayers, Moreau, ProxQP (QPLayer of proxsuite) and qpth. Layers around a solver: il.argmin, and
``custom_root`` of TorchOpt and of JAXopt. Each runs at its defaults, except that no message is switched off. A library
that is not installed is left out; what it answered where it was installed stays in FILE, so that one run in each
environment makes the whole table. FILE is examples/benchmarks/peers_faults.json by default (with --smoke: none), and
--page writes the Markdown page made of it.

An answer is "right" (x and the gradient within 1e-4 of a closed form), "told" (an error or a warning; its text is
kept), "silent" (a number and no word), or "not offered" (an error that says that a transform is not supported).
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import implicitlayer as il

F64 = torch.float64
NEAR = 1e-4  # of an answer that counts as right, relative
SECONDS = 60  # for one answer
HERE = Path(__file__).resolve().parent
Tensor = torch.Tensor
Layer = Callable[..., Tensor]
# what a fault gives: numbers, and what is right (None where no number is)
Answer = tuple[list[float], list[float] | None]


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=F64)


# ------------------------------------------------------------------------------------------------- quadratic programs


def il_qp(n: int, e: int, m: int, lanes: int) -> Layer:
    return il.qp


def cvxpylayers(n: int, e: int, m: int, lanes: int) -> Layer:
    import cvxpy
    from cvxpylayers.torch import CvxpyLayer

    x, root, p = cvxpy.Variable(n), cvxpy.Parameter((n, n)), cvxpy.Parameter(n)
    G, h = cvxpy.Parameter((m, n)), cvxpy.Parameter(m)
    value = cvxpy.Minimize(0.5 * cvxpy.sum_squares(root @ x) + p @ x)
    layer = CvxpyLayer(cvxpy.Problem(value, [G @ x <= h]), [root, p, G, h], [x])

    def solve(Q: Tensor, p: Tensor, A: Tensor, b: Tensor, G: Tensor, h: Tensor) -> Tensor:
        # it wants a root of Q, which an indefinite matrix has not
        values, vectors = torch.linalg.eigh(Q)
        if bool((values < 0).any()):
            raise NotImplementedError("an indefinite Q cannot be written down: CVXPY's rules admit sums of squares")
        return layer(values.sqrt()[..., None] * vectors.mT, p, G, h)[0]

    return solve


def moreau(n: int, e: int, m: int, lanes: int) -> Layer:
    import moreau
    from moreau.torch import Solver

    index = [(n * torch.arange(k + 1), torch.arange(n).repeat(k)) for k in (n, e + m)]
    cones = moreau.Cones(num_zero_cones=e, num_nonneg_cones=m)
    how = moreau.Settings(device="cpu", batch_size=lanes, enable_grad=True)
    solver = Solver(n, e + m, *index[0], *index[1], cones, how)

    def solve(Q: Tensor, p: Tensor, A: Tensor, b: Tensor, G: Tensor, h: Tensor) -> Tensor:
        single = p.ndim == 1
        Q, p, A, b, G, h = (t[None] if single else t for t in (Q, p, A, b, G, h))
        rows = torch.cat([A, G], -2).expand(len(p), e + m, n).reshape(len(p), -1)
        sides = torch.cat([b, h], -1).expand(len(p), e + m)
        x: Tensor = solver.solve(Q.expand(len(p), n, n).reshape(len(p), -1), rows, p, sides).x
        return x[0] if single else x

    return solve


def proxqp(n: int, e: int, m: int, lanes: int) -> Layer:
    from proxsuite.torch.qplayer import QPFunction

    function = QPFunction()

    def solve(Q: Tensor, p: Tensor, A: Tensor, b: Tensor, G: Tensor, h: Tensor) -> Tensor:
        single = p.ndim == 1
        Q, p, A, b, G, h = (t[None] if single else t for t in (Q, p, A, b, G, h))
        x: Tensor = function(Q, p, A, b, G, torch.full_like(h, -1e20), h)[0]
        return x[0] if single else x

    return solve


def qpth(n: int, e: int, m: int, lanes: int) -> Layer:
    from qpth.qp import QPFunction

    def solve(Q: Tensor, p: Tensor, A: Tensor, b: Tensor, G: Tensor, h: Tensor) -> Tensor:
        single = p.ndim == 1
        Q, p, A, b, G, h = (t[None] if single else t for t in (Q, p, A, b, G, h))
        x: Tensor = QPFunction()(Q, p, G, h, A, b)
        return x[0] if single else x

    return solve


PROGRAMS: dict[str, tuple[str, Callable[[int, int, int, int], Layer]]] = {
    "il.qp": ("implicitlayer", il_qp),
    "CVXPYlayers": ("cvxpylayers", cvxpylayers),
    "Moreau": ("moreau", moreau),
    "ProxQP": ("proxsuite", proxqp),
    "qpth": ("qpth", qpth),
}


def program(
    make: Callable[..., Layer], Q: Any, p: Any, G: Any, h: Any, right: list[float] | None, *, by: str = "p"
) -> Answer:
    """x and the gradient of its sum in p or in h."""
    data = {"Q": tensor(Q), "p": tensor(p), "G": tensor(G), "h": tensor(h)}
    n, m = data["p"].shape[-1], data["h"].shape[-1]
    lanes = len(data["p"]) if data["p"].ndim > 1 else 1
    leading = data["p"].shape[:-1]
    data["A"], data["b"] = torch.zeros(*leading, 0, n, dtype=F64), torch.zeros(*leading, 0, dtype=F64)
    leaf = data[by].requires_grad_()
    x = make(n, 0, m, lanes)(*(data[name] for name in ("Q", "p", "A", "b", "G", "h")))
    (gradient,) = torch.autograd.grad(x.sum(), leaf)
    return [*x.detach().reshape(-1).tolist(), *gradient.reshape(-1).tolist()], right


EYE = [[1.0, 0.0], [0.0, 1.0]]
ZERO = [[0.0, 0.0], [0.0, 0.0]]
# x[0] >= 1 and x[0] <= 0
OPPOSED = {"G": [[-1.0, 0.0], [1.0, 0.0]], "h": [-1.0, 0.0]}
BOX = {"G": [*EYE, [-1.0, 0.0], [0.0, -1.0]], "h": [1.0, 1.0, 1.0, 1.0]}


def transformed(make: Callable[..., Layer], how: str) -> Answer:
    """min |x|^2 / 2 + p'x with x <= 1/2: x = min(-p, 1/2), so dx/dp is -1 where -p < 1/2 and 0 elsewhere."""
    p, G, h = tensor([0.3, -0.9]), tensor(EYE), tensor([0.5, 0.5])
    none, empty = torch.zeros(0, 2, dtype=F64), torch.zeros(0, dtype=F64)
    layer = make(2, 0, 2, 1)
    solve = lambda p: layer(tensor(EYE), p, none, empty, G, h)  # noqa: E731
    if how == "vmap":
        return torch.vmap(solve)(torch.stack([p, -p])).reshape(-1).tolist(), [-0.3, 0.5, 0.3, -0.9]
    if how == "jvp":
        x, moved = torch.func.jvp(solve, (p,), (torch.ones_like(p),))
        return [*x.tolist(), *moved.tolist()], [-0.3, 0.5, -1.0, 0.0]
    leaf = p.requires_grad_()
    # of sum x^3: 3 x^2 dx, and again 6 x dx^2
    (first,) = torch.autograd.grad((solve(leaf) ** 3).sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), leaf)
    return [*first.tolist(), *second.tolist()], [-0.27, 0.0, -1.8, 0.0]


SOUND = "nothing wrong"
WEAK = 1e-7  # the curvature of a coordinate whose border pushes with 0.8 of it
PROGRAM_FAULTS: dict[str, Callable[[Callable[..., Layer]], Answer]] = {
    SOUND: lambda make: program(make, EYE, [-0.9, 0.3], **BOX, right=[0.9, -0.3, -1.0, -1.0]),
    "no feasible point": lambda make: program(make, EYE, [0.0, 0.0], **OPPOSED, right=None),
    "unbounded": lambda make: program(make, ZERO, [-1.0, 0.0], [[0.0, 1.0], [0.0, -1.0]], [1.0, 1.0], None),
    "Q indefinite": lambda make: program(make, [[1.0, 0.0], [0.0, -1.0]], [0.1, 0.1], **BOX, right=None),
    "NaN in p": lambda make: program(make, EYE, [math.nan, 0.0], **BOX, right=None),
    "one lane of two has no feasible point": lambda make: program(
        make,
        [EYE, EYE],
        [[0.0, 0.0], [0.0, 0.0]],
        [OPPOSED["G"], OPPOSED["G"]],
        [OPPOSED["h"], [1.0, 1.0]],
        None,
    ),
    # x = (0.5, 0.2): both borders are active, the second with a force of 8e-8; x moves with h and not with p
    "border under a curvature of 1e-7": lambda make: program(
        make, [[1.0, 0.0], [0.0, WEAK]], [-1.0, -WEAK], EYE, [0.5, 0.2], [0.5, 0.2, 1.0, 1.0], by="h"
    ),
    # x = 0 with a multiplier of zero: dx/dp is -1 on one side and 0 on the other
    "kink": lambda make: program(make, EYE, [0.0, 0.3], [[-1.0, 0.0]], [0.0], None),
    "vmap": lambda make: transformed(make, "vmap"),
    "forward mode": lambda make: transformed(make, "jvp"),
    "second derivative": lambda make: transformed(make, "double"),
}


# ------------------------------------------------------------------------------------------- layers around a solver


class Layers:
    """One library's layer around ``solver(init, theta)``, for an objective, in float64.

    ``layer(objective, solver)`` is ``theta -> x``; ``gradient(function, at)`` of a number; and the mathematics that
    objectives are written with.
    """

    def __init__(self, layer: Callable[..., Any], gradient: Callable[..., Any], maths: Any, array: Any) -> None:
        self.layer, self.gradient, self.maths, self.array = layer, gradient, maths, array
        self.vmap: Callable[..., Any] = torch.vmap
        self.jvp: Callable[..., Any] = torch.func.jvp


def torch_gradient(function: Callable[..., Any], at: Tensor) -> Any:
    leaf = at.detach().clone().requires_grad_()
    return torch.autograd.grad(function(leaf), leaf, create_graph=True)[0]


def il_argmin() -> Layers:
    def layer(objective: Any, solver: Any) -> Any:
        made = il.argmin(objective, lambda f, x, t: solver(x, t))
        return lambda t: made(torch.zeros_like(t), t)

    return Layers(layer, torch_gradient, torch, tensor)


def torchopt_root() -> Layers:
    import torchopt

    def layer(objective: Any, solver: Any) -> Any:
        optimality = torch.func.grad(objective)
        made = torchopt.diff.implicit.custom_root(optimality, argnums=1)(lambda x, t: solver(x, t).detach())
        return lambda t: made(torch.zeros_like(t), t)

    return Layers(layer, torch_gradient, torch, tensor)


def jaxopt_root() -> Layers:
    import jax

    jax.config.update("jax_enable_x64", True)
    import jax.numpy as jnp
    import jaxopt

    def layer(objective: Any, solver: Any) -> Any:
        made = jaxopt.implicit_diff.custom_root(jax.grad(objective))(lambda x, t: solver(x, t))
        return lambda t: made(jnp.zeros_like(t), t)

    found = Layers(layer, lambda f, at: jax.grad(f)(at), jnp, jnp.array)
    found.vmap, found.jvp = jax.vmap, jax.jvp
    return found


ROOTS: dict[str, tuple[str, Callable[[], Layers]]] = {
    "il.argmin": ("implicitlayer", il_argmin),
    "TorchOpt custom_root": ("torchopt", torchopt_root),
    "JAXopt custom_root": ("jaxopt", jaxopt_root),
}


def numbers(value: Any) -> list[float]:
    value = value.detach() if isinstance(value, Tensor) else value
    return [float(v) for v in value.reshape(-1)]


def square(x: Any, t: Any) -> Any:
    """1/2 |x - t|^2 + 1/4 sum x^4 has no closed form; with t = x + x^3 it has: dx/dt = 1 / (1 + 3 x^2)."""
    return 0.5 * ((x - t) ** 2).sum() + 0.25 * (x**4).sum()


def cardano(of: Layers) -> Callable[[Any, Any], Any]:
    """The x with x + x^3 = t, by Newton steps."""

    def solve(x: Any, t: Any) -> Any:
        for _ in range(60):
            x = x - (x + x**3 - t) / (1 + 3 * x**2)
        return x

    return solve


SOLUTION = [1.0, -0.5]
THETA = [2.0, -0.625]
SLOPES = [1 / 4, 1 / 1.75]


def stopped(of: Layers) -> Answer:
    """Gradient descent that stops after three of the hundred steps that it needs."""

    def solve(x: Any, t: Any) -> Any:
        for _ in range(3):
            x = x - 0.05 * (x - t + x**3)
        return x

    layer = of.layer(square, solve)
    return numbers(of.gradient(lambda t: layer(t).sum(), of.array(THETA))), SLOPES


def cached(of: Layers) -> Answer:
    """1/2 |x - t^2|^2 whose t^2 is kept in a dict: dx/dt = 2 t."""
    kept: dict[int, Any] = {}

    def objective(x: Any, t: Any) -> Any:
        if 0 not in kept:
            kept[0] = t * t
        return 0.5 * ((x - kept[0]) ** 2).sum()

    layer = of.layer(objective, lambda x, t: t * t)
    return numbers(of.gradient(lambda t: layer(t).sum(), of.array([3.0, 1.0]))), [6.0, 2.0]


def not_a_minimum(of: Layers) -> Answer:
    """1/4 x^4 - 1/2 x^2 + t x with a solver that stops at the maximum near 0."""

    def solve(x: Any, t: Any) -> Any:
        for _ in range(60):
            x = x - (x**3 - x + t) / (3 * x**2 - 1)
        return x

    layer = of.layer(lambda x, t: (0.25 * x**4 - 0.5 * x**2 + t * x).sum(), solve)
    return numbers(of.gradient(lambda t: layer(t).sum(), of.array([0.1, 0.2]))), None


def nan_from_solver(of: Layers) -> Answer:
    layer = of.layer(square, lambda x, t: t * math.nan)
    gradient = numbers(of.gradient(lambda t: layer(t).sum(), of.array(THETA)))
    return [*numbers(layer(of.array(THETA))), *gradient], None


def closed_over(of: Layers) -> Answer:
    """1/2 |x - w|^2 + t |x|^2 / 2 with a w that the objective closes over: dx/dw = 1 / (1 + t)."""
    t = of.array([1.0, 3.0])

    def value(w: Any) -> Any:
        objective = lambda x, t: 0.5 * ((x - w) ** 2).sum() + 0.5 * (t * x**2).sum()  # noqa: E731
        layer = of.layer(objective, lambda x, t: w / (1 + t))
        return layer(t if not isinstance(t, Tensor) else t.clone().requires_grad_()).sum()

    return numbers(of.gradient(value, of.array([1.0, 2.0]))), [0.5, 0.25]


def singular(of: Layers) -> Answer:
    """1/2 (x_0 + x_1 - t_0)^2 does not say what x_0 - x_1 is: the gradient of x_0 is that of no function."""
    layer = of.layer(lambda x, t: 0.5 * (x[0] + x[1] - t[0]) ** 2 + 0.0 * t[1], lambda x, t: 0.5 * t[0] + 0.0 * x)
    return numbers(of.gradient(lambda t: layer(t)[0], of.array([1.0, 1.0]))), None


def as_it_should_be(of: Layers) -> Answer:
    layer = of.layer(square, cardano(of))
    return numbers(of.gradient(lambda t: layer(t).sum(), of.array(THETA))), SLOPES


def mapped(of: Layers) -> Answer:
    layer = of.layer(square, cardano(of))
    theta = of.array([THETA, [0.0, 2.0]])
    return numbers(of.vmap(layer)(theta)), [*SOLUTION, 0.0, 1.0]


def pushed(of: Layers) -> Answer:
    layer = of.layer(square, cardano(of))
    return numbers(of.jvp(layer, (of.array(THETA),), (of.array([1.0, 1.0]),))[1]), SLOPES


def twice(of: Layers) -> Answer:
    """d^2 x / dt^2 = -6 x / (1 + 3 x^2)^3."""
    layer = of.layer(square, cardano(of))
    slope = lambda t: of.gradient(lambda s: layer(s).sum(), t).sum()  # noqa: E731
    if of.maths is torch:
        leaf = of.array(THETA).requires_grad_()
        (first,) = torch.autograd.grad(layer(leaf).sum(), leaf, create_graph=True)
        found = torch.autograd.grad(first.sum(), leaf)[0]
    else:
        found = of.gradient(slope, of.array(THETA))
    return numbers(found), [-6 * x * d**3 for x, d in zip(SOLUTION, SLOPES, strict=True)]


ROOT_FAULTS: dict[str, Callable[[Layers], Answer]] = {
    SOUND: as_it_should_be,
    "solver stopped after 3 steps": stopped,
    "NaN from the solver": nan_from_solver,
    "the answer is a maximum": not_a_minimum,
    "singular Hessian": singular,
    "closed-over weight": closed_over,
    "theta cached by the objective": cached,
    "vmap": mapped,
    "forward mode": pushed,
    "second derivative": twice,
}
TRANSFORMS = ("vmap", "forward mode", "second derivative")


# --------------------------------------------------------------------------------------------------------- the table


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"no answer after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def answer_of(ask: Callable[[], Answer], fault: str, usual: list[str]) -> dict[str, Any]:
    """What a layer does: the verdict, the numbers, and the words; those are not counted that it ``usual``ly says."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with limited(SECONDS):
                found, right = ask()
        except Exception as error:
            verdict = "not offered" if fault in TRANSFORMS or isinstance(error, NotImplementedError) else "told"
            return {"verdict": verdict, "text": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]}
    ignored = (DeprecationWarning, PendingDeprecationWarning, FutureWarning, ResourceWarning)
    words = [f"{w.category.__name__}: {' '.join(str(w.message).split())}" for w in caught]
    words = [text for w, text in zip(caught, words, strict=True) if not issubclass(w.category, ignored)]
    if fault == SOUND:  # a note on how the library works, for example
        usual += words
    words = [text for text in words if text not in usual]
    result: dict[str, Any] = {"numbers": [float(f"{v:.6g}") for v in found]}
    if right is not None:
        size = max(1.0, math.dist(right, [0.0] * len(right)))
        error = math.dist(found, right) / size
        result["error"] = error if math.isfinite(error) else None
        if error <= NEAR and not words:
            return result | {"verdict": "right"}
    return result | ({"verdict": "told", "text": words[0][:300]} if words else {"verdict": "silent"})


def answers(smoke: bool) -> dict[str, Any]:
    """Of every library that is installed."""
    found: dict[str, Any] = {}
    groups = (("programs", PROGRAMS, PROGRAM_FAULTS), ("layers around a solver", ROOTS, ROOT_FAULTS))
    for group, libraries, faults in groups:
        for name, (package, make) in libraries.items():
            if find_spec(package) is None:
                print(f"{name} is left out: {package} is not installed", file=sys.stderr)
                continue
            asked = dict(list(faults.items())[:2]) if smoke else faults
            # a layer around a solver is made once
            of = make if group == "programs" else make()  # type: ignore[operator, call-arg]
            rows, usual = {}, list[str]()
            for fault, ask in asked.items():
                rows[fault] = answer_of(lambda ask=ask, of=of: ask(of), fault, usual)  # type: ignore[misc]
            number = il.__version__ if package == "implicitlayer" else version(package)
            where = {"python": platform.python_version(), "torch": torch.__version__}
            found[name] = {"group": group, "package": package, "version": number, **where, "faults": rows}
            for fault, row in rows.items():
                print(f"{name:22} {fault:40} {row['verdict']:12} {row.get('text', row.get('numbers'))}"[:200])
    return found


def cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    if row["verdict"] == "told":
        kind = row["text"].split(":")[0]
        return f"{'warning' if kind.endswith('Warning') else 'error'}: `{kind}`"
    if row["verdict"] == "silent":
        if "error" in row:
            return f"no word, off by {row['error']:.0e}" if row["error"] is not None else "no word, NaN"
        finite = all(math.isfinite(v) for v in row["numbers"])
        return "no word, finite numbers" if finite else "no word, NaN or Inf"
    return str(row["verdict"])


def page(found: dict[str, Any]) -> str:
    lines = [
        "# How other layers answer the same faults",
        "",
        "Written by `python examples/benchmarks/peers_faults.py --page docs/peers_faults.md`, run once in each",
        "environment that holds some of these libraries; the numbers and the words of every answer are in",
        "`examples/benchmarks/peers_faults.json`.",
        "",
        "Each library runs at its defaults with no message switched off, on problems of two unknowns whose answer",
        "is known in closed form, or that have none. *Right*: within 1e-4 of the closed form, and nothing was said.",
        "*Error*, *warning*: by that name. *No word*: a number came back, and nothing was said; where an answer",
        "exists, how far it is off. *Not offered*: an error that says that this transform, or this problem, is not",
        "supported.",
        "",
        "Some of these libraries return a status beside x that a caller may look at, and some have options for a",
        "fault (`structural_feasibility=False` of ProxQP's layer solves the closest feasible program, as does",
        '`il.qp(infeasible="closest")`); what is looked at here is what a training loop sees at the defaults. An',
        "objective of `il.argmin` that caches is an error because it cannot be right. None of this says which is",
        "faster, or better at what it was made for: [the benchmarks](benchmarks.md) measure that.",
    ]
    for group, title in (("programs", "Quadratic programs"), ("layers around a solver", "Layers around a solver")):
        some = {name: entry for name, entry in found.items() if entry["group"] == group}
        lines += ["", f"## {title}", ""]
        lines += [f"| fault | {' | '.join(n + ' ' + e['version'] for n, e in some.items())} |"]
        lines += ["|---|" + "---|" * len(some)]
        for fault in next(iter(some.values()))["faults"]:
            lines.append(f"| {fault} | {' | '.join(cell(e['faults'].get(fault)) for e in some.values())} |")
    return "\n".join([*lines, ""])


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="two faults of each; nothing is written")
    parser.add_argument("--output", type=Path, default=HERE / "peers_faults.json")
    parser.add_argument("--page", type=Path, help="where to write the Markdown page")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = answers(options.smoke)
    if options.smoke:
        return found
    known = json.loads(options.output.read_text()) if options.output.exists() else {}
    order = [*PROGRAMS, *ROOTS]
    whole = {name: (known | found)[name] for name in order if name in known | found}
    options.output.write_text(json.dumps(whole, indent=1) + "\n")
    if options.page:
        options.page.write_text(page(whole), encoding="utf-8")
    return found


if __name__ == "__main__":
    main()
