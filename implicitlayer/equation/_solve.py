"""The differentiable linear solve: a Function whose derivatives are solves again."""

# NOTE [derivatives of a solve]: A(t) u = b. Differentiating, A du + (dA) u = db, hence
#     forward:  du = A^-1 (db - dA u)
#     reverse:  b_bar = A^-T u_bar,   t_bar = -(d/dt <A(t) u, b_bar>)
# No step of the iteration is ever differentiated: a truncated solve has the derivatives of the system it truncates.
#
# NOTE [explicit tensors]: the Function carries plain functions and explicit tensors only. A closure that held a
# tensor would hide it from the transforms: under vmap(grad) its lanes and its gradient would be lost in silence.

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from implicitlayer import _torch
from implicitlayer._errors import NonFiniteError, NotRecordedError, UnsupportedTransformError
from implicitlayer.base._failures import replaced
from implicitlayer.base._parts import patternless
from implicitlayer.base._records import AnswerDistance, BackwardRecord, GradientError, Record, emit, listening_in_depth
from implicitlayer.base._solution import LinearSolution
from implicitlayer.base._status import Status
from implicitlayer.base._surroundings import plain_surroundings
from implicitlayer.base._tree import name_lanes, ravel, unravel
from implicitlayer.base._types import Leaves, OnFailure
from implicitlayer.equation._certificate import Assumptions
from implicitlayer.equation._jacobian import Curvature, Jacobian, OneGraph, OperatorFamily, pull_tensors, push_tensors
from implicitlayer.equation._repair import CHANGES_THE_SYSTEM, NegativeCurvature, repair
from implicitlayer.linear._cg import ConjugateGradient
from implicitlayer.linear._common import lane_norm, rounding_of, select
from implicitlayer.linear._operator import FlatOperator, LinearSolver, default_rtol, wrap_value
from implicitlayer.linear._warm_start import WarmStart

# (operator family, its tensors, u leaves, right-hand side leaves) -> how far the derivative made of u is from exact
Certify = Callable[[OperatorFamily, Leaves, Leaves, Leaves], GradientError]
# (operator family, its tensors, operator, flat right-hand side, solution) -> how far the point of the tensors is off
Judge = Callable[[OperatorFamily, Leaves, FlatOperator, torch.Tensor, LinearSolution], AnswerDistance | None]
# (operator family, its tensors, operator, solution of a singular system): tells where the derivative may not exist
Doubt = Callable[[OperatorFamily, Leaves, FlatOperator, LinearSolution], None]


_HIGHER = "higher-order"
_OTHER_SYSTEM = (
    "the {kind} solve {what}: what was asked for there solves another system, and a derivative through it would not be "
    'that of the gradient. For second derivatives use a fixed damping=, curvature=, or negative_curvature="minres".'
)


Varying = Sequence[torch.Tensor] | None


@dataclass(frozen=True, eq=False)
class Settings:
    """How a linear solve behind a derivative is made, as the user of a layer has chosen.

    Attributes:
        solver: the linear solver.
        on_failure: the failure policy.
        curvature, damping: the matrix that stands for dF/dx: the Hessian or the Gauss-Newton matrix, plus a multiple of
            the identity.
        negative_curvature: what is done where it is met.
        assumptions: what the user knows of the problem, for error bounds.
        listener: who gets the record.
        damps: whether damping= and curvature= are arguments of the layer, to be advised.
        varying: masks of the entries of each theta leaf that change with the user's parameters; None: all do.
    """

    solver: Callable[[FlatOperator, torch.Tensor], LinearSolution]
    on_failure: OnFailure = "warn"
    curvature: Curvature = "hessian"
    damping: float = 0.0
    negative_curvature: NegativeCurvature = "raise"
    assumptions: Assumptions | None = None
    listener: Callable[[Record], None] | None = None
    damps: bool = True
    varying: Varying = None


@dataclass(frozen=True, eq=False)
class SolveSpec:
    """Everything about a solve that is not a tensor."""

    operator: OperatorFamily
    num_rhs: int
    settings: Settings
    kind: str = "backward"
    certify: Certify | None = None
    judge: Judge | None = None
    doubt: Doubt | None = None
    flaw: str = ""  # why derivatives in the tensors of the operator would be wrong
    of_derivative: bool = False  # whether this is the solve behind a derivative of a solve

    def derivative(self, transposed: bool, of_operator: bool, changed: str) -> SolveSpec:
        """The spec of the solve behind a derivative of this one.

        ``of_operator``: in its tensors too; ``changed``: what a remedy has made of the system.
        """
        if self.flaw and of_operator:
            raise UnsupportedTransformError(self.flaw)
        if changed:
            raise UnsupportedTransformError(_OTHER_SYSTEM.format(kind=self.kind, what=f"was {changed}"))
        order = _HIGHER if self.kind != "linear" else "backward" if transposed else "forward-mode"
        kind = self.kind if self.kind.startswith(_HIGHER) else f"{order} {self.kind}"
        operator = self.operator.transpose() if transposed else self.operator
        behind = replace(self, operator=operator, kind=kind, of_derivative=True)
        return replace(behind, certify=None, judge=None, doubt=None)


def solve(spec: SolveSpec, rhs: Leaves, tensors: Leaves) -> Leaves:
    """u with A(tensors) u = rhs, differentiable in rhs and tensors to every order.

    Except for the operator of a plain backward, :class:`OneGraph`: nobody differentiates that.
    """
    if isinstance(spec.operator, OneGraph):
        return list(LinearSolve.plainly(spec, *rhs, *tensors)[:-1])
    return list(LinearSolve.apply(spec, *rhs, *tensors)[:-1])


class LinearSolve(torch.autograd.Function):
    """``apply(spec, *rhs, *tensors) -> (*u leaves, what a remedy has made of the system)``.

    See NOTE [derivatives of a solve].
    """

    @staticmethod
    def forward(spec: SolveSpec, *tensors: torch.Tensor) -> tuple[Any, ...]:
        with plain_surroundings(tensors, derivatives=True):
            return LinearSolve.plainly(spec, *tensors)

    @staticmethod
    def plainly(spec: SolveSpec, *tensors: torch.Tensor) -> tuple[Any, ...]:
        rhs, parameters = tensors[: spec.num_rhs], list(tensors[spec.num_rhs :])
        lane_dims = spec.operator.lane_dims
        flat = ravel(rhs, lane_dims)
        finite = flat.isfinite().all(-1)
        if not bool(finite.all()):
            raise NonFiniteError(
                f"the right-hand side of the {spec.kind} solve (the cotangent or tangent that reached the layer) "
                f"holds NaN or Inf{name_lanes(~finite)}. Look for its source in the code that uses the layer's output."
            )
        settings = spec.settings
        solver, policy = settings.solver, settings.negative_curvature
        operator = spec.operator.linearize(parameters)
        solution = solver(operator, flat)
        if not isinstance(solver, LinearSolver):  # a function of the user's
            solution = wrap_value(operator, flat, solution, type(solver).__name__)
        if policy != "raise" and bool((solution.codes == int(Status.INDEFINITE)).any()):
            if spec.of_derivative and policy in CHANGES_THE_SYSTEM:
                raise UnsupportedTransformError(_OTHER_SYSTEM.format(kind=spec.kind, what="met negative curvature"))
            solution = repair(policy, solver, operator, lambda: spec.operator.gauss_newton(parameters), flat, solution)
        if solution.status is Status.STAGNATED:
            solution = _as_exact_as_products(solver, operator, flat, solution)
        if not settings.damps:
            solution = replace(solution, damps=False)
        changed = solution.remedy if policy in CHANGES_THE_SYSTEM else ""
        u = unravel(solution.value, rhs, lane_dims)
        certificate = None
        if spec.certify is not None and listening_in_depth():  # it holds tensors, for as long as the record is held
            free, b = ([t.detach() for t in part] for part in (parameters, rhs))  # no record holds a graph
            certificate = _while_unchanged(free, partial(spec.certify, spec.operator, free, u, b))
        answer = None if spec.judge is None else spec.judge(spec.operator, parameters, operator, flat, solution)
        record = BackwardRecord(spec.kind, replace(solution, value=None), certificate, answer)
        emit(record)
        if settings.listener is not None:
            settings.listener(record)
        if not solution.status.ok:
            _refuse_not_linear(spec, operator, flat)
            where = _at_maximum(spec, operator, flat, solution) if solution.status is Status.INDEFINITE else ""
            solution.enforce(settings.on_failure, f"{spec.kind} solve{where}: ")
        if answer is not None and answer.message:
            answer.enforce(settings.on_failure)
        if solution.singular is not None and spec.doubt is not None:
            spec.doubt(spec.operator, parameters, operator, solution)
        if settings.on_failure == "mask":
            lost = solution.codes > int(Status.TRUNCATED)
            if answer is not None and answer.lost is not None:
                lost = lost | answer.lost
            if bool(lost.any()):
                u = replaced(lost, u, 0.0)
        return (*u, changed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        spec, *tensors = inputs
        *u, ctx.changed = output
        ctx.spec = spec
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*u, *tensors[spec.num_rhs :])
        ctx.save_for_forward(*u, *tensors[spec.num_rhs :])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        spec: SolveSpec = ctx.spec
        k, cotangents = spec.num_rhs, grads[:-1]
        saved = alive(ctx.saved_tensors)
        u, tensors = list(saved[:k]), list(saved[k:])
        if all(c is None for c in cotangents):
            return (None,) * (1 + k + len(tensors))
        needed = ctx.needs_input_grad[1 + k :]
        transposed = spec.derivative(True, any(needed), ctx.changed)

        cotangents = alive(cotangents)

        def rule(u_bar: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
            b_bar = solve(transposed, fill(u_bar, u), tensors)
            t_bar = pull_tensors(lambda t: spec.operator.product(u, t), tensors, needed, b_bar)
            return [*b_bar, *(None if t is None else -t for t in t_bar)]

        with plain_surroundings(tensors, derivatives=True):
            return (None, *over_batched_vectors(rule, cotangents))

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        spec: SolveSpec = ctx.spec
        k = spec.num_rhs
        saved = alive(ctx.saved_tensors)
        u, tensors = list(saved[:k]), list(saved[k:])

        def rule(vectors: list[torch.Tensor | None]) -> Leaves:
            rhs = fill(vectors[:k], u)
            change = push_tensors(lambda t: spec.operator.product(u, t), tensors, vectors[k:], like=u)
            if change is not None:
                rhs = [b - c for b, c in zip(rhs, change, strict=True)]
            return solve(spec.derivative(False, change is not None, ctx.changed), rhs, tensors)

        with plain_surroundings(tensors, derivatives=True):
            return (*over_batched_vectors(rule, tangents), None)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], spec: SolveSpec, *tensors: torch.Tensor) -> tuple[Any, Any]:
        k = spec.num_rhs
        dims = in_dims[1:]
        forced = [i < k or spec.operator.always_has_lanes(i - k) for i in range(len(tensors))]
        moved, has = lanes_first(tensors, dims, forced, info.batch_size)
        lifted = replace(spec, operator=spec.operator.with_level(has[k:], info.randomness))
        return LinearSolve.apply(lifted, *moved), (*[0] * k, None)


def _at_maximum(spec: SolveSpec, operator: FlatOperator, rhs: torch.Tensor, solution: LinearSolution) -> str:
    """Words for a Hessian that is negative definite in a lane that met negative curvature, else none.

    Conjugate gradients on -A from a vector with a part in every eigenspace converge only where no curvature of A that
    they meet is positive; at a saddle they stop at the first that is.
    """
    solver = getattr(spec.settings.solver, "solver", spec.settings.solver)  # inside a warm start
    gradient = isinstance(spec.operator, Jacobian) and spec.operator.residual.is_gradient
    if not gradient or spec.settings.on_failure not in ("warn", "raise") or not isinstance(solver, ConjugateGradient):
        return ""
    failed = solution.codes == int(Status.INDEFINITE)
    negated = FlatOperator(lambda vector: -operator(vector))
    found = ConjugateGradient()(negated, select(failed, patternless(rhs)))
    maximum = failed & (found.codes == int(Status.CONVERGED))
    if not bool(maximum.any()):
        return ""
    return (
        f" at a maximum of the objective{name_lanes(maximum)} (all curvature is negative there: the solver went up, "
        "or the objective has the wrong sign; to maximise f, pass -f as the objective)"
    )


# NOTE [shorter products]: products with float64 vectors may be made in float32, in a model or by a leaf of x, and no
# residual then falls to the default tolerance of float64. Where their rounding is that of float32, the default
# tolerance of float32 holds, as long as the error of u is below a tenth of its square root: NOTE [a small residual is
# no small error] has the same bound. What tells the error is one more solve, A e = b - A u: that residual is made anew,
# of rounding that has a part in every direction, flat ones too.
def _as_exact_as_products(
    solver: Callable[..., Any], operator: FlatOperator, rhs: torch.Tensor, solution: LinearSolution
) -> LinearSolution:
    """The solution, converged in the lanes that have stagnated above the rounding of float32 products only."""
    solver = solver.solver if isinstance(solver, WarmStart) else solver  # its warm starts are for cotangents
    inner = getattr(solver, "solver", solver)  # of normal equations
    if getattr(inner, "rtol", 0.0) is not None or getattr(inner, "atol", 0.0) > 0:  # asked for
        return solution
    vector, rtol = patternless(rhs), default_rtol(torch.float32)
    noise = rounding_of(operator, vector)
    short = (noise > 1e3 * torch.finfo(rhs.dtype).eps) & (noise < 32 * torch.finfo(torch.float32).eps)
    short = short & (solution.codes == int(Status.STAGNATED)) & (solution.relative_residual <= rtol)
    if not bool(short.any()):
        return solution
    left = select(short, rhs - operator(solution.value))
    more = wrap_value(operator, left, solver(operator, left), type(solver).__name__)
    small = lane_norm(more.value) <= 0.1 * math.sqrt(rtol) * lane_norm(solution.value)
    short = short & small & (more.relative_residual <= math.sqrt(rtol))
    codes, steps = torch.where(short, int(Status.CONVERGED), solution.codes), solution.steps + more.steps
    return replace(solution, codes=codes, steps=steps, rtol=rtol if bool(short.any()) else solution.rtol)


def _refuse_not_linear(spec: SolveSpec, operator: FlatOperator, vector: torch.Tensor) -> None:
    """An error where A(2 v) is not 2 A v, which a factor of two rounds nothing of; Jacobians are linear."""
    if isinstance(spec.operator, Jacobian):
        return
    once = operator(vector)
    gap, size = (part.abs().amax(-1) for part in (operator(2 * vector) / 2 - once, once))
    bad = gap > math.sqrt(torch.finfo(vector.dtype).eps) * size
    if bool(bad.any()):
        raise ValueError(
            f"the operator A of the {spec.kind} solve is not linear{name_lanes(bad)}: A(2 v) / 2 and A v differ by "
            f"{(gap / size)[bad].max().item():.2g} of their size. Of a function u -> B u + c give u -> B u, and b - c "
            "as the right-hand side."
        )


def _while_unchanged(tensors: Leaves, certify: Callable[[], GradientError]) -> Callable[[], GradientError]:
    """``certify``, as long as nobody has written into the tensors that it reads."""
    versions = [None if t.is_inference() else t._version for t in tensors]

    def checked() -> GradientError:
        for tensor, version in zip(tensors, versions, strict=True):
            if version is not None and tensor._version != version:
                raise NotRecordedError(
                    f"a tensor of shape {tuple(tensor.shape)} was changed in place since the solve (an optimizer "
                    "step?): the gradient's error would be that of another problem. Read record.gradient_error before."
                )
        return certify()

    return checked


def refuse_forward_over_forward() -> None:
    """torch answers jvp(jvp(f)) of every custom Function with a silent zero; an error is better."""
    if _torch.num_forward_levels() > 1:
        raise UnsupportedTransformError(
            "forward mode over forward mode (jvp of jvp, jacfwd of jacfwd) through an implicit layer or a linear solve "
            "is not possible: torch returns zero for it in silence. Use torch.func.hessian (forward over reverse) or "
            "jacfwd(jacrev)."
        )


def alive(tensors: Sequence[Any]) -> tuple[Any, ...]:
    """The tensors freed of wrappers whose level is over.

    A graph that is kept beyond the torch.func level that built it (a layer inside the objective of a layer) hands its
    saved tensors back in such wrappers, which torch does not accept in a new level.
    """
    return tuple([_torch.unwrapped_if_over(t) if isinstance(t, torch.Tensor) else t for t in tensors])


def fill(leaves: Sequence[torch.Tensor | None], like: Leaves) -> Leaves:
    """Zeros in place of None."""
    return [torch.zeros_like(x) if leaf is None else leaf for leaf, x in zip(leaves, like, strict=True)]


def lanes_first(
    tensors: tuple[torch.Tensor, ...], dims: tuple[int | None, ...], forced: list[bool], size: int
) -> tuple[list[torch.Tensor], tuple[bool, ...]]:
    """Move each vmapped dimension to the front; ``forced`` tensors without lanes get copies of their own.

    Copies, not views: forward mode writes tangents in place, which an expanded tensor refuses.
    """
    moved = []
    for tensor, dim, force in zip(tensors, dims, forced, strict=True):
        if dim is not None:
            tensor = tensor.movedim(dim, 0)
        elif force:
            tensor = tensor.expand(size, *tensor.shape).clone(memory_format=torch.contiguous_format)
        moved.append(tensor)
    return moved, tuple(dim is not None or force for dim, force in zip(dims, forced, strict=True))


def over_batched_vectors(
    rule: Callable[[list[torch.Tensor | None]], Sequence[torch.Tensor | None]], vectors: Sequence[torch.Tensor | None]
) -> list[torch.Tensor | None]:
    """``rule`` of cotangents or tangents, under ``is_grads_batched=True`` and its relatives too.

    That option of torch.autograd.grad hands a backward vectors wrapped by an older batching mechanism, which custom
    Functions do not see; here they are unwrapped, mapped over by ``torch.func.vmap``, and wrapped again.
    """
    wrapped = [v for v in vectors if v is not None and _torch.is_batched_by_grad(v)]
    if not wrapped:
        return list(rule(list(vectors)))
    level = _torch.batch_level()
    # the size asked for is used only for tensors that are not wrapped: a wrapped one comes back with its own
    size = _torch.remove_batch(wrapped[0], level, 1, 0).shape[0]
    slots = [i for i, v in enumerate(vectors) if v is not None]
    plain = [_torch.remove_batch(v, level, size, 0).clone() for v in vectors if v is not None]
    present: list[bool] = []

    def some(*lane: torch.Tensor) -> tuple[torch.Tensor, ...]:
        filled: list[torch.Tensor | None] = [None] * len(vectors)
        for i, vector in zip(slots, lane, strict=True):
            filled[i] = vector
        result = rule(filled)
        present[:] = [t is not None for t in result]
        return tuple(t for t in result if t is not None)

    values = iter(torch.vmap(some)(*plain))
    return [_torch.add_batch(next(values), 0, level) if there else None for there in present]
