"""The equation behind a layer, the user's solver behind a wall, and dense derivatives by plain autograd loops."""

# Shares no derivative code with the package: what is checked must not check itself.
# n: entries of x, m: entries of one theta leaf.
#
# With F(x, theta) = 0 the optimality condition, H = dF/dx and B = dF/dtheta: dx/dtheta = J = -H^-1 B.

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from implicitlayer.base._solution import SolverResult
from implicitlayer.base._tree import TreeSpec, flatten, flatten_with_names, tree_map, unflatten, unravel
from implicitlayer.testing._report import entry_of

Leaves = list[torch.Tensor]
F64 = torch.float64
# Rounding errors of sums and products of some hundred numbers, in eps; a bound with room, not an estimate.
ROUNDINGS = 100.0
# The same for the few terms of one entry of B.
FEW_ROUNDINGS = 10.0


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """Detached, float64, on the CPU: where all numbers are compared."""
    return tensor.detach().cpu().to(F64)


def scales(leaf: torch.Tensor) -> torch.Tensor:
    """The size of each entry of theta, flat: |theta|, not below a hundredth of the leaf's own; 1 for a zero leaf."""
    values = plain(leaf).reshape(-1).abs()
    size = float(values.square().mean().sqrt())
    return values.clamp_min(0.01 * size) if size > 0 else torch.ones_like(values)


@dataclass(frozen=True, eq=False)
class Equation:
    """F(x, theta) = 0 in terms of flat lists: the leaves of x, and the floating leaves of theta that are checked."""

    function: Callable[..., Any]
    kind: str
    init: Leaves
    x_spec: TreeSpec
    x_names: list[str]
    theta: Leaves
    names: list[str]
    all_leaves: list[Any]
    theta_spec: TreeSpec
    where: list[int]

    @classmethod
    def of(cls, function: Callable[..., Any], kind: str, init: Any, theta: tuple[Any, ...]) -> Equation:
        x, x_names = flatten_with_names(init, "x")
        leaves, names = flatten_with_names(theta, "theta")
        leaves = [leaf.detach() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        where = [i for i, t in enumerate(leaves) if isinstance(t, torch.Tensor) and t.is_floating_point() and t.numel()]
        unknowns = ([t.detach() for t in x], flatten(init)[1], x_names)
        checked = ([leaves[i] for i in where], [names[i] for i in where])
        return cls(function, kind, *unknowns, *checked, leaves, flatten(theta)[1], where)

    @property
    def num_unknowns(self) -> int:
        return sum(t.numel() for t in self.init)

    @property
    def eps(self) -> float:
        """The coarsest rounding among x and theta."""
        return max(torch.finfo(t.dtype).eps for t in [*self.init, *self.theta])

    def arguments(self, theta: Sequence[torch.Tensor]) -> tuple[Any, ...]:
        """The user's theta with its floating leaves replaced."""
        leaves = list(self.all_leaves)
        for i, leaf in zip(self.where, theta, strict=True):
            leaves[i] = leaf
        rebuilt: tuple[Any, ...] = unflatten(leaves, self.theta_spec)
        return rebuilt

    def tree(self, x: Sequence[torch.Tensor]) -> Any:
        return unflatten(list(x), self.x_spec)

    def ordered(self, tree: Any) -> list[Any]:
        """Leaves of a tree like x in the order of x, whatever the order of dictionary keys."""
        values, names = flatten_with_names(tree, "x")
        by_name = dict(zip(names, values, strict=True))
        return [by_name[name] for name in self.x_names]

    def leaves(self, answer: Any) -> Leaves:
        """The solver's answer as detached leaves like x."""
        return [
            torch.as_tensor(value).detach().to(device=like.device, dtype=like.dtype).reshape(like.shape)
            for value, like in zip(self.ordered(answer), self.init, strict=True)
        ]

    def split(self, flat: torch.Tensor) -> Leaves:
        """A float64 vector [n] as leaves like x."""
        return unravel(flat, self.init, 0)

    def entry(self, i: int) -> str:
        for name, leaf in zip(self.x_names, self.init, strict=True):
            if i < leaf.numel():
                return name + entry_of(leaf.shape)(i)
            i -= leaf.numel()
        raise IndexError(i)

    def residual(self, x: Leaves, theta: Leaves) -> torch.Tensor:
        """F, [n] in the dtype of x, with its graph; x must require a gradient."""
        value = self.function(self.tree(x), *self.arguments(theta))
        if self.kind == "argmin":
            total = value.sum()
            if not total.requires_grad:
                return torch.cat([torch.zeros_like(t).reshape(-1) for t in x])
            parts = torch.autograd.grad(total, x, create_graph=True, materialize_grads=True)
        else:
            parts = tuple(self.ordered(value))
            if self.kind == "fixed_point":
                parts = tuple(a - b for a, b in zip(x, parts, strict=True))
        return torch.cat([p.reshape(-1) for p in parts])

    def residual_at(self, x: Leaves, theta: Leaves) -> torch.Tensor:
        """F in float64, without a graph."""
        with torch.enable_grad():
            return plain(self.residual([t.detach().requires_grad_() for t in x], theta))


def flat(leaves: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([plain(t).reshape(-1) for t in leaves])


def pull(x: Leaves, points: Leaves, cotangents: Leaves, **how: Any) -> list[torch.Tensor | None]:
    """Gradients of the points; None where x has none."""
    attached = [(leaf, c) for leaf, c in zip(x, cotangents, strict=True) if leaf.requires_grad]
    if not attached:
        return [None] * len(points)
    outputs, vectors = zip(*attached, strict=True)
    return list(torch.autograd.grad(outputs, points, vectors, allow_unused=True, **how))


def filled(gradients: Sequence[torch.Tensor | None], like: Leaves) -> list[torch.Tensor]:
    """Flat float64 gradients; None counts as zero."""
    return [plain(torch.zeros_like(t) if g is None else g).reshape(-1) for g, t in zip(gradients, like, strict=True)]


class Wall:
    """The user's solver on detached copies, its answer detached: nothing can be differentiated through it.

    Answers are kept by the values of init and theta, so a layer and its reference share one solve.
    """

    def __init__(self, solver: Callable[..., Any]) -> None:
        self.solver = solver
        self.batched = bool(getattr(solver, "batched", False))
        self.num_solves = 0
        self._kept: dict[tuple[Any, ...], Any] = {}

    def __call__(self, objective: Callable[..., Any], init: Any, *theta: Any) -> Any:
        key = _key((init, theta))
        if key not in self._kept:
            self._kept[key] = self.solve(objective, init, *theta)
        return _cut_answer(self._kept[key])

    def solve(self, objective: Callable[..., Any], init: Any, *theta: Any) -> Any:
        """One more run of the solver, whatever is kept."""
        self.num_solves += 1
        with torch.enable_grad():
            answer = self.solver(objective, tree_map(_cut, init), *tree_map(_cut, theta))
        return _cut_answer(answer)


def _cut(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf


def _cut_answer(answer: Any) -> Any:
    """A solver's answer with its tensors detached; a SolverResult is no pytree, so its parts are."""
    if isinstance(answer, SolverResult):
        return replace(answer, value=tree_map(_cut, answer.value), aux=tree_map(_cut, answer.aux))
    return tree_map(_cut, answer)


def _key(tree: Any) -> tuple[Any, ...]:
    tensors = [leaf.detach() for leaf in flatten(tree)[0] if isinstance(leaf, torch.Tensor)]
    return tuple(
        (t.dtype, t.shape, t.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()) for t in tensors
    )


@dataclass(frozen=True, eq=False)
class DenseSystem:
    """F, H and every B at one point, float64; H inverted once.

    Attributes:
        residual: F, [n].
        matrix: H, [n, n].
        inverse: its inverse, or pseudo-inverse where it is singular to working precision.
        mixed: B per theta leaf, [n, m].
        read: whether F reads that leaf; if not, its B is zero.
        condition: of H, in the 2-norm.
        terms: per theta leaf the size of the terms that B is the sum of, see NOTE [cancelled terms].
        eps: rounding of the dtype that F was computed in.
    """

    residual: torch.Tensor
    matrix: torch.Tensor
    inverse: torch.Tensor
    mixed: list[torch.Tensor]
    read: list[bool]
    norm: float
    condition: float
    eps: float
    terms: list[float]

    @classmethod
    def at(cls, equation: Equation, x: Leaves, theta: Leaves, mixed: bool = True) -> DenseSystem:
        """Row by row: one backward per unknown."""
        x = [t.detach().requires_grad_() for t in x]
        points = [t.detach().requires_grad_() for t in theta] if mixed else []
        with torch.enable_grad():
            residual = equation.residual(x, points if mixed else theta)
        rows = []
        read = [False] * len(points)
        for value in residual:
            grads: Sequence[torch.Tensor | None] = [None] * (len(x) + len(points))
            if value.requires_grad:
                grads = torch.autograd.grad(value, [*x, *points], retain_graph=True, allow_unused=True)
            read = [r or g is not None for r, g in zip(read, grads[len(x) :], strict=True)]
            rows.append(filled(grads, [*x, *points]))
        matrix = torch.stack([torch.cat(row[: len(x)]) for row in rows])
        parts = [torch.stack([row[len(x) + j] for row in rows]) for j in range(len(points))]
        values = torch.linalg.svdvals(matrix) if bool(matrix.isfinite().all()) else matrix.new_full((1,), torch.nan)
        low, high = float(values[-1]), float(values[0])
        condition = high / low if low > 0 else torch.inf
        good = condition < 0.1 / torch.finfo(F64).eps
        inverse = torch.linalg.inv(matrix) if good else torch.linalg.pinv(matrix.nan_to_num(), rtol=1e-12)
        start, end = flat(equation.init), flat(x)
        size = max(float(end.norm()), float((end - start).norm())) or 1.0
        largest = [float(scales(t).square().mean().sqrt()) for t in points]
        terms = [high * size / at if r else 0.0 for at, r in zip(largest, read, strict=True)]
        return cls(plain(residual), matrix, inverse, parts, read, high, condition, equation.eps, terms)

    @property
    def newton_step(self) -> torch.Tensor:
        """H^-1 F, [n]: to first order the distance to the solution."""
        return self.inverse @ self.residual

    def jacobian(self, j: int) -> torch.Tensor:
        """J of leaf j, [n, m]."""
        return -self.inverse @ self.mixed[j]

    def vjp(self, j: int, cotangent: torch.Tensor) -> torch.Tensor:
        """J'v of leaf j, [m]."""
        return -self.mixed[j].T @ (self.inverse.T @ cotangent)

    # A solve H'u = v of residual r gives J'v + J'r, |r| <= rtol |v|. Rounding adds eps |H| |u| to r, and eps |B| |u| to
    # the product with B', of which the largest column stands for all (a sum may cancel in a small one).
    #
    # NOTE [cancelled terms] All of B may be zero by cancellation: scaling the objective moves no minimiser. Its entries
    # are then what rounding has left of their terms. These are about |H| |x| / |theta|, the change of F when x moves
    # by its own size where theta does.

    def vjp_error(self, j: int, cotangent: torch.Tensor, rtol: float, rounding: bool = True) -> torch.Tensor:
        """What the solve may do to J'v, [m]."""
        u = float((self.inverse.T @ cotangent).norm())
        small = ROUNDINGS * self.eps if rounding else 0.0
        residual = rtol * float(cotangent.norm()) + small * self.norm * u
        cancelled = FEW_ROUNDINGS * self.eps * self.terms[j] if rounding else 0.0
        product = max(small * float(self.mixed[j].norm(dim=0).max()), cancelled) * u
        error: torch.Tensor = self.jacobian(j).norm(dim=0) * residual + product
        return error

    # Forward: H dx = -B t with a residual r, |r| <= rtol |B t|, gives an error of H^-1 r.

    def jvp_error(self, j: int, tangent: torch.Tensor, rtol: float, rounding: bool = True) -> torch.Tensor:
        """What the solve may do to J t, [n]."""
        change = self.mixed[j] @ tangent
        small = ROUNDINGS * self.eps if rounding else 0.0
        terms = self.mixed[j].abs() @ tangent.abs()
        cancelled = FEW_ROUNDINGS * self.eps * self.terms[j] * float(tangent.norm()) if rounding else 0.0
        dx = float((self.inverse @ change).norm())
        product = max(small * float(terms.norm()), cancelled)
        residual = rtol * float(change.norm()) + small * self.norm * dx + product
        error: torch.Tensor = self.inverse.norm(dim=1) * residual
        return error
