"""Solvers as users write them: three right ones, and many that are each broken in one way."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from references import F64, newton
from torch import Tensor
from torch.utils import _pytree as pytree

import implicitlayer as il
from implicitlayer import testing

# --------------------------------------------------------------------------------------------------------------- right


def matrix_of(operator: Any, rhs: Tensor) -> Tensor:
    columns = [operator(unit) for unit in torch.eye(rhs.shape[-1], dtype=rhs.dtype)]
    return torch.stack(columns, -1) if columns else rhs.new_zeros(0, 0)


def dense(operator: Any, rhs: Tensor) -> Tensor:
    """The shortest right solver: LU, a bare tensor, one system at a time."""
    matrix, size = matrix_of(operator, rhs), rhs.abs().max() if rhs.numel() else 1.0
    if not size:
        return torch.zeros_like(rhs)
    unit = matrix.abs().max() if rhs.numel() else 1.0
    return torch.linalg.solve(matrix / unit, rhs / size) * (size / unit)


def dense_newton(objective: Callable[..., Tensor], init: Any, *theta: Any) -> Any:
    """Newton's method on any pytree, which it flattens."""
    leaves, spec = pytree.tree_flatten(init)
    shapes = [leaf.shape for leaf in leaves]

    def flat(x: Tensor) -> Tensor:
        parts = x.split([shape.numel() for shape in shapes])
        return objective(pytree.tree_unflatten([p.view(s) for p, s in zip(parts, shapes, strict=True)], spec), *theta)

    x = newton(flat, torch.cat([leaf.detach().reshape(-1) for leaf in leaves]))
    parts = x.split([shape.numel() for shape in shapes])
    return pytree.tree_unflatten([p.view(s) for p, s in zip(parts, shapes, strict=True)], spec)


@dataclass(frozen=True)
class TextbookCG:
    """Conjugate gradients as in a textbook, batched, with a status; every field is a way to get it wrong."""

    rtol: float | None = 1e-10
    atol: float = 0.0
    max_steps: int | None = None
    old_residual: bool = False  # p <- r_old + beta p
    one_behind: bool = False  # returns the iterate before the last
    always_converged: bool = False
    lanes_together: bool = False  # one step length for all lanes
    first_lane_stops: bool = False
    moves_finished: bool = False  # lanes go on as long as any lane runs
    ignores_curvature: bool = False
    method: ClassVar[str] = "textbook CG"

    def __call__(self, operator: il.FlatOperator, rhs: Tensor) -> il.LinearSolution:
        scale = rhs.abs().amax(-1, keepdim=True) if rhs.numel() and not self.atol else torch.ones(1, dtype=rhs.dtype)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        b = rhs / scale
        x = before = torch.zeros_like(b)
        r = p = b

        def dot(a: Tensor, c: Tensor) -> Tensor:
            per_lane = (a * c).sum(-1, keepdim=True)
            return per_lane.sum().expand(per_lane.shape) if self.lanes_together else per_lane

        norm = dot(b, b).sqrt()
        rtol = max(self.rtol or 0.0, 0.0 if rhs.dtype == F64 else 1e-5)
        goal = torch.maximum(rtol * norm, torch.tensor(self.atol, dtype=b.dtype))
        indefinite = torch.zeros_like(norm, dtype=torch.bool)
        for _ in range(self.max_steps or 10 * b.shape[-1]):
            running = (dot(r, r).sqrt() > goal) & ~indefinite
            if not running.any() or (self.first_lane_stops and not running.reshape(-1)[0]):
                break
            q = operator(p)
            if not self.ignores_curvature:
                indefinite = indefinite | (running & (dot(p, q) <= 0))
            running = (dot(r, r) > 0 if self.moves_finished else running) & ~indefinite
            alpha = torch.where(running, dot(r, r) / dot(p, q), 0.0)
            before, x = x, torch.where(running, x + alpha * p, x)
            r_new = torch.where(running, r - alpha * q, r)
            beta = dot(r_new, r_new) / dot(r, r)
            p = torch.where(running, (r if self.old_residual else r_new) + beta * p, p)
            r = r_new
        x = before if self.one_behind else x
        true = (b - operator(x)).norm(dim=-1) if b.numel() else norm[..., 0]
        fine = true <= 10 * goal[..., 0] if not self.always_converged else torch.ones(true.shape, dtype=torch.bool)
        codes = torch.where(fine, int(il.Status.CONVERGED), int(il.Status.MAX_STEPS_REACHED))
        codes = torch.where(true.isfinite() | self.always_converged, codes, int(il.Status.NONFINITE))
        codes = torch.where(indefinite[..., 0] & ~fine, int(il.Status.INDEFINITE), codes)
        residual = true * scale[..., 0]
        return il.LinearSolution(
            x * scale,
            codes,
            torch.zeros_like(codes),
            residual,
            true,
            torch.full_like(true, math.inf),
            True,
            self.method,
        )


# ------------------------------------------------------------------------------------------------------ broken: linear


def transposed(operator: Any, rhs: Tensor) -> Tensor:
    return torch.linalg.solve(matrix_of(operator, rhs).T, rhs)


def in_place(operator: Any, rhs: Tensor) -> Tensor:
    answer = dense(operator, rhs)
    return rhs.copy_(answer)


def nan_on_zero(operator: Any, rhs: Tensor) -> Tensor:
    unit = rhs / rhs.norm()
    return torch.linalg.solve(matrix_of(operator, rhs), unit) * rhs.norm()


def squares_overflow(operator: Any, rhs: Tensor) -> Tensor:
    norm = (rhs * rhs).sum().sqrt()
    return dense(operator, rhs / norm) * norm if norm else torch.zeros_like(rhs)


def double_only(operator: Any, rhs: Tensor) -> Tensor:
    return dense(operator, rhs).double()


def a_column(operator: Any, rhs: Tensor) -> Tensor:
    return dense(operator, rhs)[:, None]


def as_numpy(operator: Any, rhs: Tensor) -> Any:
    return dense(operator, rhs).numpy()


def damped(operator: Any, rhs: Tensor) -> Tensor:
    return torch.linalg.solve(matrix_of(operator, rhs) + 1e-6 * torch.eye(len(rhs), dtype=rhs.dtype), rhs)


def thresholded(operator: Any, rhs: Tensor) -> Tensor:
    return torch.nn.functional.softshrink(dense(operator, rhs), 1e-3)


def with_noise(operator: Any, rhs: Tensor) -> Tensor:
    return dense(operator, rhs) * (1 + 1e-13 * torch.randn(rhs.shape).to(rhs.dtype))


def with_a_graph(operator: Any, rhs: Tensor) -> Tensor:
    return dense(operator, rhs).requires_grad_()


def touches_rhs(operator: Any, rhs: Tensor) -> Tensor:
    rhs.mul_(2).div_(2)  # the same bits, but not the same version
    return dense(operator, rhs)


def twice_a_scalar(operator: Any, rhs: Tensor) -> Tensor:
    return dense(operator, rhs) * (2 if float(rhs.sum()) == 2 else 1)


def never_empty(operator: Any, rhs: Tensor) -> Tensor:
    return dense(operator, rhs) if rhs.amax() > -math.inf else rhs


@dataclass(frozen=True)
class PreconditionsTheAnswer:
    """Returns M^-1 u in place of u."""

    preconditioner: Callable[[Tensor], Tensor] | None = None

    def __call__(self, operator: Any, rhs: Tensor) -> Tensor:
        answer = dense(operator, rhs)
        return self.preconditioner(answer) if self.preconditioner else answer


class KeepsItsFactors:
    """Factorises the first matrix of each size that it meets, and uses the factors for ever."""

    def __init__(self, says_converged: bool = False) -> None:
        self.inverses: dict[Any, Tensor] = {}
        self.says_converged = says_converged

    def __call__(self, operator: Any, rhs: Tensor) -> Any:
        key = (len(rhs), rhs.dtype)
        if key not in self.inverses:
            self.inverses[key] = torch.linalg.inv(matrix_of(operator, rhs)) if len(rhs) else rhs.new_zeros(0, 0)
        value = self.inverses[key] @ rhs
        return replace(says_converged(operator, rhs), value=value) if self.says_converged else value


def batched_mean(operator: Any, rhs: Tensor) -> il.LinearSolution:
    """Right for one system; for many, each gets the mean of the answers."""
    solution = il.ConjugateGradient()(operator, rhs)
    if rhs.ndim == 1:
        return solution
    return replace(solution, value=solution.value.mean(0).expand(rhs.shape))


def adds_all_lanes(operator: Any, rhs: Tensor) -> il.LinearSolution:
    solution = il.ConjugateGradient()(operator, rhs)
    return replace(solution, value=solution.value + 0 * rhs.sum())


def says_converged(operator: Any, rhs: Tensor) -> il.LinearSolution:
    solution = il.ConjugateGradient()(operator, rhs)
    return replace(solution, codes=torch.zeros_like(solution.codes))


def never_content(operator: Any, rhs: Tensor) -> il.LinearSolution:
    solution = il.Dense()(operator, rhs)
    return replace(solution, codes=torch.full_like(solution.codes, int(il.Status.STAGNATED)))


def pinv_converged(operator: Any, rhs: Tensor) -> il.LinearSolution:
    """Least squares, called a success."""
    matrix = matrix_of(operator, rhs)
    if not bool(matrix.isfinite().all()):
        return il.ConjugateGradient()(operator, rhs)
    value = torch.linalg.pinv(matrix) @ rhs
    return replace(says_converged(operator, rhs), value=value)


# ------------------------------------------------------------------------------------------------------- broken: inner

ANSWERS: dict[Any, Any] = {}


def keeps_init(objective: Any, init: Any, *theta: Any) -> Any:
    return init


def stops_early(objective: Any, init: Any, *theta: Any) -> Any:
    answer = dense_newton(objective, init, *theta)
    return pytree.tree_map(lambda a, b: a + 0.999 * (b - a), init, answer)


def loses_its_last_leaf(objective: Any, init: Any, *theta: Any) -> Any:
    return pytree.tree_leaves(dense_newton(objective, init, *theta))[0]


def flattens(objective: Any, init: Any, *theta: Any) -> Any:
    return pytree.tree_map(lambda x: x.reshape(-1), dense_newton(objective, init, *theta))


def overwrites_init(objective: Any, init: Any, *theta: Any) -> Any:
    answer = dense_newton(objective, init, *theta)
    return pytree.tree_map(lambda start, x: start.data.copy_(x), init, answer)


def overwrites_theta(objective: Any, init: Any, *theta: Any) -> Any:
    answer = dense_newton(objective, init, *theta)
    for leaf in pytree.tree_leaves(theta):
        leaf.mul_(1.5)
    return answer


def touches_theta(objective: Any, init: Any, *theta: Any) -> Any:
    for leaf in pytree.tree_leaves(theta):
        leaf.add_(1).sub_(1)
    return dense_newton(objective, init, *theta)


class WarmStarts:
    """Begins where the last solve ended."""

    def __init__(self) -> None:
        self.last: Any = None

    def __call__(self, objective: Any, init: Any, *theta: Any) -> Any:
        same = self.last is not None and pytree.tree_structure(self.last) == pytree.tree_structure(init)
        shapes = same and [x.shape for x in pytree.tree_leaves(self.last)] == [
            x.shape for x in pytree.tree_leaves(init)
        ]
        start = pytree.tree_map(lambda x, like: x.to(like.dtype), self.last, init) if shapes else init
        self.last = il.solvers.GradientDescent(1.0, max_steps=300)(objective, start, *theta)
        return self.last


def needs_a_leaf(objective: Any, init: Any, *theta: Any) -> Any:
    """Backward through the objective into init itself: leaves gradients where init came from."""
    points = pytree.tree_map(lambda x: x if x.requires_grad else x.detach().requires_grad_(), init)
    objective(points, *theta).backward()
    return dense_newton(objective, init, *theta)


def reads_the_graph(objective: Any, init: Any, *theta: Any) -> Any:
    answer = dense_newton(objective, init, *theta)
    return answer + 1 if isinstance(init, Tensor) and init.requires_grad else answer


class MixesLanes:
    """Batched gradient descent with one direction for all lanes."""

    batched = True

    def __call__(self, objective: Any, init: Any, *theta: Any) -> Any:
        x = pytree.tree_map(lambda leaf: leaf.detach().clone(), init)
        for _ in range(600):
            leaves, spec = pytree.tree_flatten(x)
            leaves = [leaf.requires_grad_() for leaf in leaves]
            value = objective(pytree.tree_unflatten(leaves, spec), *theta)
            gradients = torch.autograd.grad(value.sum(), leaves)
            if value.ndim:
                gradients = tuple(g.mean(0, keepdim=True).expand(g.shape) for g in gradients)
            x = pytree.tree_unflatten([a.detach() - g for a, g in zip(leaves, gradients, strict=True)], spec)
        return x


class NeverFreezes:
    """Gradient descent on many problems, all of which go on until the last has finished."""

    batched = True

    def __call__(self, objective: Callable[..., Tensor], init: Tensor, *theta: Any) -> Tensor:
        gradient, x = torch.func.grad(lambda x: objective(x, *theta).sum()), init
        for _ in range(400):
            g = gradient(x)
            if bool((g.norm(dim=-1) <= 1e-8).all()):
                break
            x = x - g
        return x


class CallsItemOnLanes:
    """Says that it is batched, but takes the objective for a number."""

    batched = True

    def __call__(self, objective: Any, init: Any, *theta: Any) -> Any:
        objective(init, *theta).item()
        return dense_newton(objective, init, *theta)


def only_the_first_theta(objective: Any, init: Any, *theta: Any) -> Any:
    """Solves the problem that it met first, for ever: what a solver does that captured theta in a closure."""
    key = tuple(leaf.shape for leaf in pytree.tree_leaves(init))
    ANSWERS.setdefault(key, dense_newton(objective, init, *theta))
    return ANSWERS[key]


# -------------------------------------------------------------------------------------------------------------- claims


def claim(solver: Any, systems: str = "positive definite", **claims: Any) -> Any:
    return testing.linear(solver, systems, **claims)


def cg(**faults: Any) -> Any:
    return claim(TextbookCG(**faults), batched=True)
