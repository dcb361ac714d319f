"""Properties of a layer that need no reference, one function each, to be called in one's own tests."""

# A layer here is any callable (init, *theta) -> x that is differentiable in theta: one of il.argmin, il.root,
# il.fixed_point, or a function that uses one. All comparisons are relative to the norm of what is compared over all
# leaves together, since one leaf may vanish by chance.

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from implicitlayer.base._tree import tree_map
from implicitlayer.testing._modes import LAYERS
from implicitlayer.testing._references import F64, Equation, Leaves, filled, flat, plain, pull

Layer = Callable[..., Any]


class _Case:
    """A layer as a function of the floating leaves of theta."""

    def __init__(self, layer: Layer, init: Any, theta: tuple[Any, ...], rtol: float | None, seed: int) -> None:
        self.layer = layer
        self.equation = Equation.of(layer, "argmin", init, theta)
        if not self.equation.theta:
            raise ValueError("theta has no floating tensor with entries: there is no derivative to check.")
        self.rtol = rtol if rtol is not None else (1e-7 if self.equation.eps < 1e-12 else 1e-3)
        self.generator = torch.Generator().manual_seed(seed)
        self.solution: Leaves = []

    def call(self, *leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        start = self.equation.tree([t.clone() for t in self.equation.init])
        return tuple(self.equation.ordered(self.layer(start, *self.equation.arguments(leaves))))

    def random(self, like: Leaves) -> Leaves:
        return [torch.randn(t.shape, dtype=F64, generator=self.generator).to(t) for t in like]

    def gradients(self, v: Leaves) -> Leaves:
        points = [t.clone().requires_grad_() for t in self.equation.theta]
        x = list(self.call(*points))
        self.solution = [t.detach() for t in x]
        return _pull(x, points, v)

    def compare(self, got: Leaves, expected: Leaves, size: float, rule: str, names: list[str] | None = None) -> None:
        for name, g, e in zip(names or self.equation.names, got, expected, strict=True):
            difference = (plain(g).reshape(-1) - plain(e).reshape(-1)).abs()
            if not difference.numel() or float(difference.norm()) <= self.rtol * size:
                continue
            i = int(difference.nan_to_num(nan=torch.inf).argmax())
            numbers = f"{float(plain(e).reshape(-1)[i]):.9g} and {float(plain(g).reshape(-1)[i]):.9g}"
            raise AssertionError(
                f"{rule}: {name} differs, most at entry {i}: {numbers}, error {float(difference[i]):.2e}, tolerance "
                f"{self.rtol * size:.2e}."
            )


def _pull(x: Leaves, points: Leaves, v: Leaves) -> Leaves:
    return filled(pull(x, points, v, retain_graph=True), points)


def _dot(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> float:
    return float(torch.dot(flat(a), flat(b)))


def check_adjoint(layer: Layer, init: Any, *theta: Any, rtol: float | None = None, seed: int = 0) -> None:
    """Forward and reverse mode are adjoint: <v, J t> = <J'v, t> for random v and t.

    Args:
        layer: ``(init, *theta) -> x``.
        init, theta: what it is called with.
        rtol: allowed difference over ``|v| |J t|``; default 1e-7 (float64), 1e-3 (float32).
        seed: of v and t.

    Raises:
        AssertionError: naming the leaf where there is one, with the numbers.
        ValueError: a theta without floating tensors.

    Example:
        >>> import torch, implicitlayer as il
        >>> layer = il.argmin(lambda x, t: ((x - t) ** 2).sum(), lambda f, x, t: t)
        >>> il.testing.check_adjoint(layer, torch.zeros(3), torch.ones(3))
    """
    case = _Case(layer, init, theta, rtol, seed)
    v, tangents = case.random(case.equation.init), case.random(case.equation.theta)
    pulled = case.gradients(v)
    pushed = torch.func.jvp(case.call, tuple(case.equation.theta), tuple(tangents))[1]
    left, right = _dot(v, pushed), _dot(pulled, tangents)
    allowed = case.rtol * float(flat(v).norm() * flat(pushed).norm())
    if not abs(left - right) <= allowed:
        rule = "<v, J t> = <J'v, t> does not hold"
        raise AssertionError(f"{rule}: {left:.9g} and {right:.9g}, tolerance {allowed:.2e}.")


def check_linear_in_cotangent(layer: Layer, init: Any, *theta: Any, rtol: float | None = None, seed: int = 0) -> None:
    """The gradient is linear in the cotangent: J'(3 a - b) = 3 J'a - J'b, also for b a million times a.

    Arguments and errors as in :func:`check_adjoint`; rtol over ``3 |J'a| + |J'b|``.
    """
    case = _Case(layer, init, theta, rtol, seed)
    for factor in (1.0, 1e6, 1e-6):
        a = case.random(case.equation.init)
        b = [factor * t for t in case.random(case.equation.init)]
        first, second = case.gradients(a), case.gradients(b)
        together = case.gradients([3 * s - t for s, t in zip(a, b, strict=True)])
        apart = [3 * s - t for s, t in zip(first, second, strict=True)]
        size = 3 * float(flat(first).norm()) + float(flat(second).norm())
        case.compare(together, apart, size, f"J'(3 a - b) = 3 J'a - J'b with |b| = {factor:g} |a|")


def check_scaled_objective(
    objective: Callable[..., Any],
    solver: Callable[..., Any],
    init: Any,
    *theta: Any,
    factor: float = 1e6,
    shift: float = 7.0,
    kind: str = "argmin",
    rtol: float | None = None,
    seed: int = 0,
    **settings: Any,
) -> None:
    """``factor * f + shift`` has the same solution as f, and the same gradient of it.

    The solver runs once, on f itself; both layers differentiate its answer. With ``kind="root"`` the residual is
    multiplied (a shift would move the root).

    Args:
        objective, solver, init, theta, kind, settings: see :func:`check_argmin_gradients`; no ``kind="fixed_point"``.
        factor: positive.
        shift: added to the value.
        rtol, seed: see :func:`check_adjoint`, also for the errors; rtol over the norm of the gradient.
    """
    if not factor > 0:
        raise ValueError(f"factor={factor} must be positive: a negative one turns minima into maxima.")
    if kind not in ("argmin", "root"):
        raise ValueError(f"kind={kind!r} must be 'argmin' or 'root': a scaled map has other fixed points.")
    found = _solve(objective, solver, kind, init, theta, settings)

    def scaled(x: Any, *args: Any) -> Any:
        value = objective(x, *args)
        if kind == "root":
            return tree_map(lambda leaf: factor * leaf, value)
        if settings.get("objective_has_aux"):
            return factor * value[0] + shift, value[1]
        return factor * value + shift

    plain_case = _Case(_at(objective, found, kind, settings), init, theta, rtol, seed)
    scaled_case = _Case(_at(scaled, found, kind, settings), init, theta, rtol, seed)
    v = plain_case.random(plain_case.equation.init)
    expected = plain_case.gradients(v)
    got, size = scaled_case.gradients(v), float(flat(expected).norm())
    plain_case.compare(got, expected, size, f"f and {factor:g} f + {shift:g}")


def check_rotated_unknowns(
    objective: Callable[..., Any],
    solver: Callable[..., Any],
    init: Any,
    *theta: Any,
    kind: str = "argmin",
    rtol: float | None = None,
    seed: int = 0,
    **settings: Any,
) -> None:
    """Unknowns y = Q x with a random orthogonal Q: the gradient for the cotangent Q v is that of x for v.

    The solver runs once, on f itself; both layers differentiate its answer.

    Args:
        objective, solver, init, theta, kind, settings: see :func:`check_argmin_gradients`. All leaves of init need one
            dtype; ``batch_dims`` and an objective with aux are not taken.
        rtol, seed: see :func:`check_adjoint`, also for the errors; rtol over the norm of the gradient.
    """
    equation = Equation.of(objective, kind, init, theta)
    if settings.get("batch_dims"):
        raise ValueError("batch_dims must be 0: a rotation mixes the lanes, which are independent problems.")
    if len({t.dtype for t in equation.init}) != 1:
        raise ValueError("init has leaves of several dtypes; a rotation mixes them. Cast them to one.")
    found = _solve(objective, solver, kind, init, theta, settings)
    dtype, sizes = equation.init[0].dtype, [t.numel() for t in equation.init]
    draw = torch.randn(sum(sizes), sum(sizes), dtype=F64, generator=torch.Generator().manual_seed(seed))
    q = torch.linalg.qr(draw)[0].to(equation.init[0])

    def turned_back(y: torch.Tensor) -> Any:
        parts = torch.split(q.T @ y, sizes)
        return equation.tree([p.reshape(t.shape) for p, t in zip(parts, equation.init, strict=True)])

    def turn(tree: Any) -> torch.Tensor:
        values = equation.ordered(tree)
        turned: torch.Tensor = q @ torch.cat([t.reshape(-1) for t in values])
        return turned

    def rotated(y: torch.Tensor, *args: Any) -> Any:
        value = objective(turned_back(y), *args)
        return value if kind == "argmin" else turn(value)

    v = _Case(_at(objective, found, kind, settings), init, theta, rtol, seed)
    cotangent = v.random(equation.init)
    expected = v.gradients(cotangent)
    start = torch.zeros(sum(sizes), dtype=dtype, device=q.device)
    other = _Case(_at(rotated, turn(found), kind, settings), start, theta, rtol, seed)
    got = other.gradients([turn(equation.tree(cotangent))])
    v.compare(got, expected, float(flat(expected).norm()), "x and y = Q x")


def check_batch_equals_loop(
    layer: Layer,
    init: Any,
    *theta: Any,
    lanes: Sequence[float] = (1.0, 0.98, 1.03),
    rtol: float | None = None,
    seed: int = 0,
) -> None:
    """vmap over lanes of theta gives the solutions and gradients of a Python loop over them.

    Args:
        layer, init, theta: see :func:`check_adjoint`, also for the errors.
        lanes: factors on every floating theta leaf, one per lane.
        rtol, seed: see :func:`check_adjoint`; rtol over the norm of all solutions, of all gradients. A solver that
            declares ``batched = True`` may stop a lane elsewhere than alone: give its accuracy.
    """
    if not lanes:
        raise ValueError("lanes=() must hold at least one factor: without lanes there is nothing to compare.")
    case = _Case(layer, init, theta, rtol, seed)
    equation = case.equation
    stacked = [torch.stack([t * factor for factor in lanes]).requires_grad_() for t in equation.theta]
    cotangents = [case.random(equation.init) for _ in lanes]
    batch = list(torch.func.vmap(case.call)(*stacked))
    vectors = [torch.stack([v[i] for v in cotangents]) for i in range(len(equation.init))]
    got = _pull(batch, stacked, vectors)
    solutions, expected = [], []
    for factor, v in zip(lanes, cotangents, strict=True):
        points = [(t * factor).requires_grad_() for t in equation.theta]
        x = list(case.call(*points))
        solutions.append([t.detach() for t in x])
        expected.append(_pull(x, points, v))
    alone = [torch.stack([s[i] for s in solutions]) for i in range(len(equation.init))]
    case.compare(batch, alone, float(flat(alone).norm()), "solutions of vmap and loop", equation.x_names)
    loop = [torch.stack([g[j] for g in expected]) for j in range(len(equation.theta))]
    case.compare(got, loop, float(flat(loop).norm()), "gradients of vmap and loop")


def check_repeatable(layer: Layer, init: Any, *theta: Any, seed: int = 0) -> None:
    """The same call gives the same bits, solution and gradient, and so does a second backward of one call.

    Arguments and errors as in :func:`check_adjoint`. On an accelerator sums may not be repeatable: this is a property
    of the CPU.
    """
    case = _Case(layer, init, theta, None, seed)
    v = case.random(case.equation.init)
    runs = []
    for _ in range(2):
        points = [t.clone().requires_grad_() for t in case.equation.theta]
        x = list(case.call(*points))
        runs.append((x, _pull(x, points, v), _pull(x, points, v)))
    (x, first, again), (other, second, _) = runs
    for what, names, left, right in (
        ("two calls: solution", case.equation.x_names, x, other),
        ("two calls: gradient", case.equation.names, first, second),
        ("two backwards of one call", case.equation.names, first, again),
    ):
        for name, a, b in zip(names, left, right, strict=True):
            if not torch.equal(a, b):
                raise AssertionError(
                    f"{what} of {name} differs by {float((a - b).detach().abs().max()):.3g}; no bit may."
                )


def check_dict_order(layer: Layer, init: Any, *theta: Any, rtol: float | None = None, seed: int = 0) -> None:
    """The order of keys in the dictionaries of init and theta does not matter.

    Arguments and errors as in :func:`check_adjoint`, rtol over the norm of the solution, of the gradient; a ValueError
    too where no dictionary has two keys.
    """
    other_init, *other_theta = _reversed((init, *theta))
    names = Equation.of(layer, "argmin", init, theta)
    reordered = Equation.of(layer, "argmin", other_init, tuple(other_theta))
    if (names.x_names, names.names) == (reordered.x_names, reordered.names):
        raise ValueError("init and theta hold no dictionary with two keys: there is no order to change.")
    case, other = _Case(layer, init, theta, rtol, seed), _Case(layer, other_init, tuple(other_theta), rtol, seed)
    v = case.random(case.equation.init)
    by_name = dict(zip(case.equation.x_names, v, strict=True))
    expected, x = case.gradients(v), case.solution
    got = other.gradients([by_name[name] for name in other.equation.x_names])
    solutions = dict(zip(other.equation.x_names, other.solution, strict=True))
    gradients = dict(zip(other.equation.names, got, strict=True))
    swapped = [solutions[name] for name in case.equation.x_names]
    case.compare(swapped, x, float(flat(x).norm()), "solutions of two orders of keys", case.equation.x_names)
    in_order = [gradients[name] for name in case.equation.names]
    case.compare(in_order, expected, float(flat(expected).norm()), "gradients of two orders of keys")


def _solve(
    objective: Callable[..., Any],
    solver: Callable[..., Any],
    kind: str,
    init: Any,
    theta: Any,
    settings: dict[str, Any],
) -> Any:
    with torch.no_grad():
        found = LAYERS[kind](objective, solver, **settings)(init, *theta)
    return found[0] if settings.get("solver_has_aux") else found


def _at(function: Callable[..., Any], found: Any, kind: str, settings: dict[str, Any]) -> Layer:
    """The layer whose solver returns ``found``."""
    kept = {name: value for name, value in settings.items() if name != "solver_has_aux"}
    layer: Layer = LAYERS[kind](function, lambda f, init, *theta: found, **kept)
    return layer


def _reversed(tree: Any) -> Any:
    """The same with the keys of every dictionary in reverse order."""
    if type(tree) is dict:
        return {key: _reversed(tree[key]) for key in reversed(tree)}
    if isinstance(tree, torch.Tensor) or not isinstance(tree, (list, tuple)):
        return tree
    if hasattr(tree, "_fields"):
        return type(tree)(*map(_reversed, tree))
    return type(tree)(map(_reversed, tree))
