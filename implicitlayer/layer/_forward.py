"""The forward solve: the black box behind a wall, the checks on its answer, and the record."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from implicitlayer._errors import ImplicitLayerError, NonFiniteError, ObjectiveError, SolverOutputError
from implicitlayer.base._failures import FAILURES, FailedResult, marking, marks, refuse, replaced
from implicitlayer.base._records import ForwardRecord, emit, listening_in_depth
from implicitlayer.base._sharding import WHOLE, gathered
from implicitlayer.base._solution import ActiveSet, RecordingSolver, SolverResult
from implicitlayer.base._status import Status
from implicitlayer.base._surroundings import out_of_inference, plain_surroundings, saves_by_hooks, unread
from implicitlayer.base._tree import flatten, flatten_with_names, leaves_in_order, name_lanes, ravel, unflatten
from implicitlayer.base._types import FlatFunction, Leaves, OnFailure
from implicitlayer.equation._capture import plainly_impossible
from implicitlayer.equation._distance import AnswerCheck, Found, Stationarity, stationarity
from implicitlayer.equation._residual import Attached, Residual
from implicitlayer.equation._state import Run
from implicitlayer.layer._polish import Polish, SeenFunction, polish, summed
from implicitlayer.layer._roles import tell_solver
from implicitlayer.layer._verdict import judge_answer, refuse_coupled

if TYPE_CHECKING:
    from implicitlayer.base._tree import TreeSpec
    from implicitlayer.layer._function import LayerSpec

_REQUIRES_GRAD = attrgetter("requires_grad")


@dataclass(frozen=True, eq=False)
class Calling:
    """How the user's solver is called: the structures that flat lists of tensors stand for.

    ``rebuild_theta`` turns theta leaves into the user's arguments (closed-over ones at the end are left out);
    ``flatten_theta`` is its inverse, with the given closed-over leaves appended. ``gives_value``: the solver sees an
    objective, one number per lane, not a residual or a map. ``constraints``: of a layer over a set.
    """

    solver: Callable[..., Any]
    solver_has_aux: bool
    x_spec: TreeSpec
    x_names: list[str]
    rebuild_theta: Callable[[Leaves], tuple[Any, ...]]
    flatten_theta: Callable[[tuple[Any, ...], Leaves], Leaves]
    num_theta: int
    flat_function: FlatFunction
    user_function: Callable[..., Any] | None
    gives_value: bool = True
    constraints: Constraints | None = None


@dataclass(frozen=True, eq=False)
class Constraints:
    """What a layer over a set, or with a regulariser, adds to the forward solve.

    Attributes:
        terms: the user's set or regulariser, to be recognised by a solver that was given the same.
        prox: ``([*y leaves, step], theta leaves) -> leaves``, for one lane of every level.
        examine: ``(residual, x leaves, F there) -> ActiveSet``, of all lanes.
        judge: applies the failure policy to what was found, and to whether the solver stopped at its step limit;
            returns what the derivatives are to check of the answer, where the layer does not measure it otherwise.
    """

    terms: Any
    prox: FlatFunction
    examine: Callable[[Residual, Leaves, Attached | None], ActiveSet]
    judge: Callable[[ActiveSet, OnFailure, bool], AnswerCheck | None]


def solve_forward(spec: LayerSpec, init: Leaves, theta: Leaves) -> tuple[Leaves, Found]:
    """x leaves, new and detached, from the user's solver; checked, polished and recorded. And what was found."""
    hooked = saves_by_hooks()
    with plain_surroundings([*init, *theta]), unread(), torch.inference_mode(False):
        given = out_of_inference([*init, *theta])
        init, theta = given[: len(init)], given[len(init) :]
        if spec.masks or marks.failed is not None:  # by a layer around this one, whose lanes are others
            with marking(spec.masks, init[0].shape[: spec.residual.lane_dims], init[0]) as failed:
                x, found = _solved(spec, init, theta, failed)
                x = x if failed is None else replaced(failed, x, math.nan)
        else:
            x, found = _solved(spec, init, theta, None)
    if hooked:  # they say what becomes of memory until backward (a checkpoint, offloading), and cannot see this graph
        found = replace(found, graph=None)
    return x, found


def _solved(spec: LayerSpec, init: Leaves, theta: Leaves, failed: torch.Tensor | None) -> tuple[Leaves, Found]:
    """x leaves, and what was found; lanes that have failed hold anything finite."""
    given, init, theta = theta, [t.detach() for t in init], [t.detach() for t in theta]
    versions = [t._version for t in theta]
    accumulated = spec.accumulated if spec.closed else []
    try:
        with torch.enable_grad():
            results, lanes = _call_solver(spec, init, spec.seen(theta))
    except FAILURES as error:
        if failed is None or not failed.ndim or isinstance(error, ImplicitLayerError):
            raise
        raise SolverOutputError(
            f'the solver of {failed.numel()} lanes raised {type(error).__name__}: {error}. on_failure="mask" masks '
            "lanes, and an exception does not say which of them it was about. Return NaN in the lanes that fail, or "
            "map over the lanes with torch.vmap in place of batch_dims: then it is called for one lane at a time."
        ) from error
    if spec.closed and spec.accumulated != accumulated:
        raise SolverOutputError(
            "the solver has added to .grad of a tensor that the objective closes over (by .backward()): its gradient "
            "would be wrong. Take torch.autograd.grad(value, x) in the solver, or pass the tensor as one more theta."
        )
    for i, version in enumerate(versions):
        if theta[i]._version != version:
            raise _changed_in_place(spec.residual, init, theta, i)
    theta = [t.detach() for t in theta]  # a solver may have made them require a gradient
    checked = [_check_answer(result.value, spec.calling, like) for result, like in results]
    _check_finite(checked, spec, init)
    ended = results[0][0] if len(results) == 1 else _overall([result for result, _ in results])
    if failed is not None:
        _mark_nonfinite([result for result, _ in results], failed, bool(getattr(spec.calling.solver, "batched", False)))
    elif ended.status is Status.NONFINITE:
        words = f" {ended.message}" if ended.message else ""
        raise NonFiniteError(
            "the solver met NaN or Inf and says so, although the point that it returned is finite. Check theta for "
            f"NaN, and that the objective is finite and differentiable at init and where a step leads.{words}"
        )
    x = checked[0]
    if lanes:
        x = [torch.stack([lane[i] for lane in checked]).reshape(leaf.shape) for i, leaf in enumerate(init)]
    if failed is not None:
        x = replaced(failed, x, init)

    with plain_surroundings(theta, derivatives=True):
        plain = spec.needs_derivative and not plainly_impossible()
        mark = Run()
        reaching = spec.reaching(given, [t.requires_grad for t in given], mark)[0] if plain else theta
        try:
            x, found = _checked(spec, x, spec.seen(theta), init, ended, failed, reaching)
        finally:
            mark.over = True
    return x, replace(found, aux=tuple([result.aux for result, _ in results]))


def _checked(
    spec: LayerSpec,
    x: Leaves,
    theta: Leaves,
    init: Leaves,
    ended: SolverResult,
    failed: torch.Tensor | None,
    reaching: Leaves,
) -> tuple[Leaves, Found]:
    """The answer x, polished, judged and recorded; ``reaching``: theta, for the graph that derivatives are made of."""
    residual, flaw = spec.residual, ""
    answer: AnswerCheck | None = None
    measures = spec.stationarity_rtol is not None or spec.polish > 0 or (spec.needs_derivative and listening_in_depth())
    keeps = spec.closed is not None and any(map(_REQUIRES_GRAD, reaching))
    at = residual.attached(x, reaching) if measures or keeps else None  # one run for all
    if spec.closed is not None:
        run = at if at is not None else residual.run(x, reaching)
        keeps = residual.refuse_hidden(x, reaching, run, spec.closed) and keeps and not spec.closed.borrows
        flaw = run.ends[1]
        spec.closed.confirm(reaching, run.edges)
        del run

    measured: Stationarity | None = None
    polished: Polish | None = None
    constraints = spec.calling.constraints
    if at is not None and residual.lane_dims_of_function and (measures or constraints or spec.looks_at_lanes):
        refuse_coupled(residual, x, at)
    if measures:
        measured = stationarity(residual, x, theta, init, at)
        if spec.polish:
            rtol = math.inf if spec.stationarity_rtol is None else spec.stationarity_rtol
            polished = polish(residual, x, theta, init, measured, spec.settings.solver, spec.polish, rtol)
            x, measured = polished.x, polished.at
    kept = 0 if polished is None else polished.kept
    if kept:
        at = residual.attached(x, reaching) if keeps or constraints is not None else None
    active_set = None if constraints is None or not spec.needs_derivative else constraints.examine(residual, x, at)
    if failed is None:
        _record(spec, ended, measured, kept, active_set, None)
    limited = not kept and ended.status is Status.MAX_STEPS_REACHED
    if constraints is not None and active_set is not None:
        check = constraints.judge(active_set, spec.settings.on_failure, limited)
        answer = None if failed is not None and bool(failed.any()) else check
    if measured is not None and spec.stationarity_rtol is not None:
        rtol, nearest = spec.stationarity_rtol, getattr(active_set, "nearest", None)
        judge_answer(spec, measured, x, theta, limited, polished)
        if failed is None or not bool(failed.any()):
            answer = AnswerCheck.of(measured, rtol, spec.settings.on_failure, spec.settings.solver, nearest)
    if failed is not None:  # what the judges find belongs to the record
        _record(spec, ended, measured, kept, active_set, failed.clone())
    return x, Found(answer, flaw, at if keeps and failed is None else None)


def _changed_in_place(residual: Residual, init: Leaves, theta: Leaves, index: int) -> ImplicitLayerError:
    """The error for theta[index]; one more evaluation tells whether it is the function that changes it."""
    changed = theta[index]
    version = changed._version
    with torch.no_grad():
        residual.over_lanes(residual.function)(init, theta)
    what = f"a theta of shape {tuple(changed.shape)} in place; its gradient would be that of another problem."
    if changed._version == version:
        return SolverOutputError(f"the solver changed {what} Clone theta inside the solver before changing it.")
    return ObjectiveError(
        f"the objective (residual, map) itself changes {what} Write it without in-place operations: an embedding with "
        "max_norm rescales its weight whenever it is read (leave max_norm out and divide by the norm in the objective)."
    )


def _call_solver(spec: LayerSpec, init: Leaves, theta: Leaves) -> tuple[list[tuple[SolverResult, Leaves]], bool]:
    """Results with the shape they must have; True where there is one result per lane."""
    calling, residual = spec.calling, spec.residual
    explicit, hidden = theta[: calling.num_theta], theta[calling.num_theta :]
    batched = bool(getattr(calling.solver, "batched", False))
    lanes_inside = residual.lane_dims_of_function > 0
    alone = spec.masks and residual.lane_dims == 0  # a solver of several lanes does not say which of them failed
    # the values of an objective show its lanes; those of an equation do not, and a batched solver is told them
    told = batched and not calling.gives_value and lanes_inside
    if not residual.levels and not hidden and calling.user_function is not None and not told:
        objective = calling.user_function
        if calling.gives_value and residual.lane_dims_of_function and not batched:
            objective = summed(objective)
        return [(_run(calling, objective, init, explicit, alone), init)], False
    if not residual.levels or batched:
        objective = SeenFunction(calling, residual, hidden, batched)
        try:
            return [(_run(calling, objective, init, explicit, alone), init)], False
        except FAILURES:
            if not (spec.masks and residual.levels):
                raise
    # NOTE [lane by lane]: a black box sees one problem at a time, as it would in a Python loop. A batched one that has
    # raised sees one at a time too, with lanes of size one, where a failure is to cost no other lane.
    single = residual
    if not batched:
        single = Residual(residual.function, residual.is_gradient, residual.lane_dims_of_function, parts=residual.parts)
    results = []
    for lane in np.ndindex(init[0].shape[: len(residual.levels)]):
        at = [slice(index, index + 1) if batched else index for index in lane]
        lane_theta = []
        for i, tensor in enumerate(theta):
            picks = tuple(index for index, (has, _) in zip(at, residual.levels, strict=True) if has[i])
            lane_theta.append(tensor[picks])
        lane_init = [t[tuple(at)] for t in init]
        explicit, hidden = lane_theta[: calling.num_theta], lane_theta[calling.num_theta :]
        objective = SeenFunction(calling, single, hidden, batched)
        results.append((_run(calling, objective, lane_init, explicit, spec.masks and not lanes_inside), lane_init))
    return results, True


def _run(calling: Calling, objective: Callable[..., Any], init: Leaves, theta: Leaves, masks: bool) -> SolverResult:
    """The result of the solver."""
    answer = called(calling.solver, objective, init, calling.x_spec, calling.rebuild_theta(theta), masks)
    aux = None
    if calling.solver_has_aux and not isinstance(answer, SolverResult):
        if not isinstance(answer, tuple) or len(answer) != 2:
            raise SolverOutputError(
                f"with solver_has_aux=True the solver must return (x, aux), got {type(answer).__name__}. "
                "If the auxiliary output belongs to the objective, pass objective_has_aux=True instead."
            )
        answer, aux = answer
    return answer if isinstance(answer, SolverResult) else SolverResult(answer, aux=aux)


def called(
    solver: Callable[..., Any], problem: Any, init: Leaves, x_spec: TreeSpec, theta: tuple[Any, ...], masks: bool
) -> Any:
    """What a solver of the user's returns; where it raises and ``masks``, a :class:`FailedResult`.

    Copies of ``init`` protect the caller's tensors from solvers that work in place.
    """
    run = solver.run if isinstance(solver, RecordingSolver) else solver
    try:
        return run(problem, unflatten([t.clone() for t in init], x_spec), *theta)
    except TypeError as error:
        tell_solver(error, solver, len(theta))
        raise
    except FAILURES as error:
        if not masks:
            raise
        nothing = unflatten([torch.full_like(t, math.nan) for t in init], x_spec)
        return FailedResult(nothing, Status.NONFINITE, message=f"the solver raised {type(error).__name__}: {error}")


_RESULT_OBJECT = " It has an attribute x: if that is the solution (as in SciPy's OptimizeResult), return .x of it."


def _check_answer(answer: Any, calling: Calling, like: Leaves) -> Leaves:
    """The solver's answer as new tensors like ``like``, or an error that names the leaf and both shapes."""
    found, spec = flatten(answer)
    leaves = found if spec == calling.x_spec else leaves_in_order(answer, unflatten(like, calling.x_spec))
    if leaves is None:
        hint = ""
        if isinstance(answer, tuple) and len(answer) == 2 and not calling.solver_has_aux:
            hint = " If the solver returns (x, aux), pass solver_has_aux=True."
        elif hasattr(answer, "x"):
            hint = _RESULT_OBJECT
        raise SolverOutputError(
            f"the solver must return the structure of init: expected leaves {calling.x_names}, got "
            f"{flatten_with_names(answer, 'x')[1]}.{hint}"
        )
    return list(map(_check_leaf, leaves, calling.x_names, like))


def _check_leaf(value: Any, name: str, like: torch.Tensor) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        value = value if value.__class__ in WHOLE else gathered(value)
        if value.device != like.device:
            raise SolverOutputError(
                f"the solver returned {name} on {value.device}, but init is on {like.device}. Move it there."
            )
    elif isinstance(value, (np.ndarray, np.generic, int, float, complex)):
        value = torch.as_tensor(value).to(like.device)
    else:
        hint = _RESULT_OBJECT if hasattr(value, "x") else ""
        raise SolverOutputError(
            f"the solver returned {type(value).__name__} for {name}; a tensor or array is needed.{hint}"
        )
    if value.shape != like.shape:
        raise SolverOutputError(
            f"the solver returned {name} with shape {tuple(value.shape)}, but init has shape {tuple(like.shape)}."
        )
    if value.is_complex():
        raise SolverOutputError(f"the solver returned complex {name}; the unknowns are real ({like.dtype}).")
    same = value.dtype is like.dtype
    copied: torch.Tensor = value.detach().clone() if same else value.detach().to(like.dtype)
    return copied


def _check_finite(answers: list[Leaves], spec: LayerSpec, init: Leaves) -> None:
    """Row "solver returns NaN or Inf": name the leaf and the lane."""
    lane_dims = spec.residual.lane_dims - (init[0].ndim - answers[0][0].ndim)  # less what was solved lane by lane
    if bool(ravel([*itertools.chain(*answers)], lane_dims).isfinite().all()):
        return
    for i, name in enumerate(spec.calling.x_names):
        leaf = torch.stack([answer[i] for answer in answers]) if len(answers) > 1 else answers[0][i]
        lanes, size = init[i].shape[: spec.residual.lane_dims], init[i].shape[spec.residual.lane_dims :].numel()
        finite = leaf.isfinite().reshape((*lanes, size)).all(-1)
        if not bool(finite.all()):
            error = NonFiniteError(
                f"the solver returned NaN or Inf in {name}{name_lanes(~finite)}: it diverged or failed. Check its step "
                "size, its own messages and that init and theta are finite."
            )
            refuse(~finite, error)


def _mark_nonfinite(results: list[SolverResult], failed: torch.Tensor, batched: bool) -> None:
    """Mark the lanes in which a solver says that it met NaN: those it names, those of NaN in its answer, or all."""
    for result, lanes in zip(results, failed.reshape(len(results), -1), strict=True):  # a view
        if result.status is Status.NONFINITE:
            told = result.nonfinite
            if told is not None and told.numel() == lanes.numel():
                lanes |= told.reshape(-1).to(lanes.device)
            elif not (batched and bool(lanes.any())):
                lanes.fill_(True)


def _record(
    spec: LayerSpec,
    ended: SolverResult,
    measured: Stationarity | None,
    polished: int,
    active_set: ActiveSet | None,
    failed: torch.Tensor | None,
) -> None:
    """Emit the record."""
    record = ForwardRecord(
        stationarity_norm=None if measured is None else measured.norm,
        estimated_distance=None if measured is None else measured.distance,
        relative_distance=None if measured is None else measured.relative,
        solver_status=ended.status,
        num_steps=ended.num_steps,
        num_polish_steps=polished,
        rtol=spec.stationarity_rtol,
        active_set=active_set,
        failed=failed,
    )
    emit(record)
    if spec.settings.listener is not None:
        spec.settings.listener(record)


def _overall(results: list[SolverResult]) -> SolverResult:
    """How the solver ended, by the worst of its runs."""
    status = max([r.status for r in results if r.status is not None], default=None)
    words = next((r.message for r in results if r.status is status), "")
    return SolverResult(
        None, status, max([r.num_steps for r in results if r.num_steps is not None], default=None), words
    )
