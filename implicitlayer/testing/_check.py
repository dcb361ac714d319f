"""``check_argmin_gradients``: every derivative of a layer against references that share nothing with it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from implicitlayer._errors import ImplicitLayerWarning, LinearSolveError, StationarityError, StationarityWarning
from implicitlayer.base._solution import SolverResult
from implicitlayer.base._types import check_one_of
from implicitlayer.layer._layer import ImplicitLayer
from implicitlayer.testing._answers import another_problem, check_followed
from implicitlayer.testing._differences import DENSE_LIMIT, Accuracy
from implicitlayer.testing._lanes import check_double, check_vmap
from implicitlayer.testing._modes import LAYERS, SAFE_RTOL, Check, check_jvp, check_objective, check_vjp
from implicitlayer.testing._references import Equation, Leaves, Wall
from implicitlayer.testing._report import COARSE, GradientCheckError, GradientReport, GradientRow, worst_first

_MODES = {"vjp": check_vjp, "jvp": check_jvp, "double": check_double, "vmap": check_vmap}
_DIFFERENCES = {"vjp", "jvp", "double"}  # the modes that need differences of the solver
_MAX_NOTES = 8


def check_argmin_gradients(
    objective: Callable[..., Any],
    solver: Callable[..., Any],
    init: Any,
    *theta: Any,
    modes: Sequence[str] = ("vjp", "jvp", "double", "vmap"),
    kind: str = "argmin",
    rtol: float | None = None,
    seed: int = 0,
    **settings: Any,
) -> GradientReport:
    """Check the derivatives of the layer around ``objective`` and ``solver`` in every floating leaf of theta.

    The references: the dense implicit gradient -B'H^-T v at the solver's own answer, by plain autograd loops (up to
    200 unknowns); central differences of the solver, whose step follows from its measured error; the adjoint identity;
    a loop over the lanes of a batch; and differences of the objective itself. No tolerance is guessed: that of a
    difference is 3 times its measured truncation plus twice the measured error of the solver over the step, that of a
    dense comparison is what a linear solve with ``rtol`` can do to the gradient of this problem, plus rounding. An
    answer that is off by a thousandth (1.001 lambda) widens them and may pass: compare it with another solver's.

    Args:
        objective, solver, init, theta: as for ``il.argmin`` and the layer that it makes. Integer and bool tensors,
            numbers and other objects are passed through; what the objective closes over is not checked. theta must not
            be on the edge of its domain: differences move every entry by up to a tenth of its size.
        modes: ``"vjp"`` (reverse), ``"jvp"`` (forward), ``"double"`` (gradient of a gradient), ``"vmap"``.
        kind: ``"argmin"``, ``"root"`` or ``"fixed_point"``; which layer, and what ``objective`` means.
        rtol: relative residual that the layer's linear solves are allowed; default: that of ``linear_solver``, or
            1e-10 (float64), 1e-5 (float32).
        seed: of the random cotangents and directions.
        settings: further arguments of ``il.argmin`` (``linear_solver``, ``solver_has_aux``, ...), except
            ``constraint`` and ``regularizer``: the references are those of grad f = 0.

    Returns:
        The report, with verdict ``"passed"``, or ``"inconclusive"`` where the solver is too coarse for a comparison to
        have a digit, or its answer is not stationary. Print it: it says what to do. Warnings become notes of it.

    Raises:
        GradientCheckError: a derivative is wrong or raised, or the solver does not follow a theta; an AssertionError
            that carries the report.
        Exception: what the call of the layer itself raises: a solver's own error, an answer of the wrong shape, NaN.
        ValueError: an unknown mode or kind, a theta without floating leaves, an init without entries, a constraint or
            a regularizer.

    Source: the rule for the step is the classical one for differences of noisy functions; J. J. Moré and S. M. Wild,
    ACM Trans. Math. Softw. 38 (2012), doi:10.1145/2168773.2168777. Unlike torch.autograd.gradcheck, whose step and
    tolerance are fixed, both are computed here from what the solver delivers.

    Example:
        >>> import torch, implicitlayer as il
        >>> t = torch.tensor([2.0, 4.0], dtype=torch.float64)
        >>> report = il.testing.check_argmin_gradients(
        ...     lambda x, t: (torch.exp(x) - t * x).sum(), lambda f, x, t: torch.log(t), torch.zeros_like(t), t
        ... )
        >>> report.verdict
        'passed'
    """
    function = (lambda x, *theta: objective(x, *theta)[0]) if settings.get("objective_has_aux") else objective
    _check_arguments(modes, kind, rtol, settings)
    equation = Equation.of(function, kind, init, theta)
    if not equation.theta:
        raise ValueError(
            "theta has no floating tensor with entries: there is no derivative to check. Pass what the objective is to "
            "be differentiated in as theta."
        )
    if not equation.num_unknowns:
        raise ValueError("init has no entries: there is nothing to solve for.")
    wall = Wall(solver)
    layer = LAYERS[kind](objective, wall, **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check = _prepared(equation, layer, wall, rtol, seed)
        cause = None
        for mode in (mode for mode in _MODES if mode in modes):
            cause = _run(check, mode) or cause
        followed = check_followed(check) if set(modes) & _DIFFERENCES else []
        said = isinstance(cause, StationarityError) or any(issubclass(w.category, StationarityWarning) for w in caught)
        stationary = not said and check.accuracy.relative <= max(layer.stationarity_rtol or 0.0, 1e-3)
        coarse = any(row.status == "inconclusive" and row.dominating == COARSE for row in check.rows)
        another = another_problem(check, stationary) if coarse or not stationary else None
    notes = [*followed, *_notes(check, stationary, settings, another), *check.notes, *_warned(caught)]
    return _judge(check, stationary, notes, cause, COARSE if another is None else another[0])


def _prepared(equation: Equation, layer: ImplicitLayer, wall: Wall, rtol: float | None, seed: int) -> Check:
    """The check before its first mode, the objective looked at; what is misuse raises here, as at any call."""
    seen = equation.function
    if not wall.batched and equation.kind == "argmin":  # with one value per lane, such a solver sees their sum
        seen = lambda x, *theta: equation.function(x, *theta).sum()  # noqa: E731

    def solved(run: Callable[..., Any], start: Leaves, at: Leaves) -> Leaves:
        tree, arguments = equation.tree(start), equation.arguments(at)
        # what is differentiated is the polished answer
        answer = layer(tree, *arguments) if layer.polish else run(seen, tree, *arguments)
        if isinstance(answer, SolverResult):
            return equation.leaves(answer.value)
        return equation.leaves(answer[0] if layer.solver_has_aux else answer)

    def restarted(start: Leaves) -> Leaves:
        return solved(wall, start, equation.theta)

    with torch.no_grad():
        layer(equation.tree(equation.init), *equation.arguments(equation.theta))
    accuracy = Accuracy.measure(equation, restarted, lambda start: solved(wall.solve, start, equation.theta))
    rtol = getattr(layer.linear_solver, "rtol", None) if rtol is None else rtol
    allowed = SAFE_RTOL * float((1e-10 if equation.eps < 1e-12 else 1e-5) if rtol is None else rtol)
    answer, generator = lambda at: solved(wall, equation.init, at), torch.Generator().manual_seed(seed)
    check = Check(equation, answer, accuracy, layer, restarted, allowed, generator)
    check_objective(check)
    return check


def _check_arguments(modes: Sequence[str], kind: str, rtol: float | None, settings: dict[str, Any]) -> None:
    if isinstance(modes, str) or not modes or not set(modes) <= set(_MODES):
        raise ValueError(f"modes={modes!r} must be a non-empty tuple out of {tuple(_MODES)}.")
    check_one_of("kind", kind, tuple(LAYERS))
    if rtol is not None and not rtol > 0:
        raise ValueError(f"rtol={rtol} must be positive. For the tolerance of the linear solver leave it out.")
    for name in ("constraint", "regularizer"):
        if settings.get(name) is not None:
            raise ValueError(
                f"{name}={settings[name]!r} cannot be checked here: the references are those of grad f(x) = 0, which "
                "does not hold at a kink or on an edge. For the layer itself use il.testing.check_adjoint, "
                "il.testing.check_linear_in_cotangent and il.testing.check_batch_equals_loop; without the "
                f"{name} this function checks the smooth objective."
            )


def _run(check: Check, mode: str) -> Exception | None:
    """One mode; what it raises becomes a failed row."""
    try:
        _MODES[mode](check)
    except Exception as error:  # whatever the layer raises is part of the result
        kind, nan, inf = type(error).__name__, float("nan"), float("inf")
        why = f"the layer raised {kind}"
        check.rows.append(GradientRow("all leaves", "", mode, "-", nan, nan, inf, 0.0, "failed", why))
        check.notes.append(f"{mode}: {kind}: {error}")
        return error
    return None


def _judge(check: Check, stationary: bool, notes: list[str], cause: Exception | None, coarse: str) -> GradientReport:
    singular = check.system is not None and not check.system.condition < 0.1 / check.equation.eps
    rows = []
    for row in check.rows:
        excused = not stationary and row.reference in ("differences", "solver") and row.mode != "objective"
        refused = row.reference == "-" and isinstance(cause, (LinearSolveError, StationarityError))
        if row.status == "failed" and (excused or (refused and (singular or not stationary))):
            row = replace(row, status="inconclusive", dominating=COARSE if excused else row.dominating)
        if row.status == "inconclusive" and row.dominating == COARSE:
            row = replace(row, dominating=coarse)
        rows.append(row)
    open_groups = _groups_without_digit(rows)
    verdict = "passed" if stationary and not open_groups else "inconclusive"
    if any(row.status == "failed" for row in rows):
        verdict = "failed"
    elif open_groups and stationary and coarse == COARSE:
        notes.insert(0, _advice(open_groups, rows))
    accuracy, equation = check.accuracy, check.equation
    of = (equation.kind, equation.num_unknowns, accuracy.norm, accuracy.error, accuracy.relative)
    report = GradientReport(verdict, worst_first(rows), tuple(notes), *of)  # type: ignore[arg-type]
    if verdict == "failed":
        raise GradientCheckError(report) from cause
    return report


def _groups_without_digit(rows: list[GradientRow]) -> list[tuple[str, str, str]]:
    """(leaf, mode, reference) of which every comparison is without a digit."""
    groups: dict[tuple[str, str, str], bool] = {}
    for row in rows:
        key = (row.leaf, row.mode, row.reference)
        if row.mode == "objective":  # the objective is checked where it can be; the layer has rows of its own
            continue
        groups[key] = groups.get(key, True) and row.status == "inconclusive"
    return [key for key, empty in groups.items() if empty]


def _advice(groups: list[tuple[str, str, str]], rows: list[GradientRow]) -> str:
    reasons = {row.dominating for row in rows if (row.leaf, row.mode, row.reference) in groups}
    names = ", ".join(sorted({f"{leaf} ({mode}, {reference})" for leaf, mode, reference in groups})[:4])
    return (
        f"No digit in {names}{', ...' if len(groups) > 4 else ''}: {', '.join(sorted(reasons))}. A tighter solver, "
        "polish=1, or float64 makes the comparison sharper."
    )


def _notes(check: Check, stationary: bool, settings: dict[str, Any], another: tuple[str, str] | None) -> list[str]:
    equation, accuracy, notes = check.equation, check.accuracy, []
    if another is not None:
        notes.append(another[1])
    elif not stationary:
        notes.append(
            f"The solver's answer is not stationary (‖F‖ = {accuracy.norm:.2e}): the gradient there is that of no "
            "solution. Solve more tightly, pass polish=1, or check that solver and objective belong together."
        )
    if check.system is None:
        notes.append(
            f"{equation.num_unknowns} unknowns, more than {DENSE_LIMIT}: no dense reference, and wider tolerances."
        )
    elif not check.system.condition < 0.1 / equation.eps:
        notes.append(
            "The Jacobian of the stationarity is singular to working precision: x may not be a function of theta."
        )
    else:
        offenders = {row.leaf for row in check.rows if row.status == "failed"}
        for j, (name, read) in enumerate(zip(equation.names, check.system.read, strict=True)):
            if not read and name not in offenders:
                none = "None, read as " if j in check.none else ""
                notes.append(f"{name} is not used by the objective: its gradient is {none}zero.")
    if any(row.status == "failed" and row.mode == "objective" for row in check.rows):
        notes.append(
            "Autograd's derivatives of the objective are not those of its values: look for .detach(), .item(), NumPy, "
            "or a custom autograd.Function. The layer can only be as right as they are."
        )
    if settings.get("damping") or settings.get("curvature", "hessian") != "hessian":
        notes.append("damping and Gauss-Newton curvature change the gradient on purpose: a failure may be just that.")
    return notes


def _warned(caught: list[warnings.WarningMessage]) -> list[str]:
    messages = dict.fromkeys(
        f"{w.category.__name__}: {w.message}" for w in caught if not issubclass(w.category, DeprecationWarning)
    )
    ours = [m for m in messages if any(m.startswith(c.__name__) for c in ImplicitLayerWarning.__subclasses__())]
    others = [m for m in messages if m not in ours]
    return [f"warned: {m}" for m in [*ours, *others][:_MAX_NOTES]]
