"""Deliberately broken solvers: each is caught by the check that is for it."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor
from user_solvers import (
    ANSWERS,
    CallsItemOnLanes,
    KeepsItsFactors,
    MixesLanes,
    NeverFreezes,
    PreconditionsTheAnswer,
    WarmStarts,
    a_column,
    adds_all_lanes,
    as_numpy,
    batched_mean,
    cg,
    claim,
    damped,
    dense_newton,
    double_only,
    flattens,
    in_place,
    keeps_init,
    loses_its_last_leaf,
    nan_on_zero,
    needs_a_leaf,
    never_content,
    never_empty,
    only_the_first_theta,
    overwrites_init,
    overwrites_theta,
    pinv_converged,
    reads_the_graph,
    says_converged,
    squares_overflow,
    stops_early,
    thresholded,
    touches_rhs,
    touches_theta,
    transposed,
    twice_a_scalar,
    with_a_graph,
    with_noise,
)

import implicitlayer as il
from implicitlayer import testing

# ------------------------------------------------------------------------------------------ deliberately broken: linear


@testing.parametrize_with_solver_checks([cg()])
def test_textbook_cg_conforms_in_exact_scaling(solver: Any, check: Callable[[Any], None]) -> None:
    """The fault injection below starts from a solver without fault."""
    check(solver)


BROKEN_LINEAR: list[tuple[str, Any, str, str]] = [
    ("CG with the old residual", cg(old_residual=True), "solves_random_systems", "left a relative residual of"),
    ("CG returns the iterate before the last", cg(one_behind=True), "solves_random_systems", r"residual of 1\.00e\+00"),
    ("CG that always says CONVERGED", cg(always_converged=True), "status_tells_the_truth", "says CONVERGED at"),
    (
        "CG that says CONVERGED after one step",
        cg(always_converged=True),
        "a_step_limit_is_no_success",
        "after one step",
    ),
    ("CG that says CONVERGED at NaN", cg(always_converged=True), "nan_is_no_success", "products hold NaN"),
    ("CG with an absolute tolerance", cg(rtol=None, atol=1e-10), "scale_of_the_right_hand_side", "scaled by 1e-"),
    (
        "CG with one step length for all lanes",
        cg(lanes_together=True),
        "a_lane_in_trouble_leaves_the_others",
        "beside a lane with NaN in its matrix",
    ),
    ("CG that stops with its first lane", cg(first_lane_stops=True), "batch_equals_loop", "in a batch otherwise"),
    (
        "CG that goes on with finished lanes",
        cg(moves_finished=True),
        "a_finished_lane_is_frozen",
        "gave one lane of a batch two answers, .* apart, as its neighbours finished early or late",
    ),
    (
        "CG that does not look at the curvature",
        cg(ignores_curvature=True),
        "an_indefinite_system_is_no_success",
        r"says CONVERGED for -4 u = 2\. If it is for such systems too, say so: systems='symmetric' or 'general'",
    ),
    (
        "a preconditioner applied to the answer",
        claim(PreconditionsTheAnswer(), "general"),
        "solves_with_a_preconditioner",
        "PreconditionsTheAnswer with a preconditioner left a relative residual",
    ),
    (
        "every lane gets the mean",
        claim(batched_mean, batched=True),
        "batch_equals_loop",
        "solves lane 0 in a batch otherwise than alone",
    ),
    (
        "NaN of one lane in all",
        claim(adds_all_lanes, batched=True),
        "a_lane_in_trouble_leaves_the_others",
        "beside a lane with NaN in its right-hand side",
    ),
    (
        "a success whatever happens",
        claim(says_converged),
        "status_tells_the_truth",
        "an indefinite matrix|says CONVERGED",
    ),
    ("never a success", claim(never_content, "general"), "an_easy_system_is_a_success", "says STAGNATED for an easy"),
    ("least squares as a success", claim(pinv_converged), "a_singular_system_is_no_success", "for a singular matrix"),
    ("solves with the transpose", claim(transposed, "general"), "solves_random_systems", "left a relative residual"),
    (
        "solves with the transpose",
        claim(transposed, "general"),
        "gradients_of_a_linear_solve",
        "failed inside il.linear_solve: linear solve: function ended with status diverged",
    ),
    (
        "forgets the transpose",
        claim(KeepsItsFactors(True), "general"),
        "gradients_of_a_linear_solve",
        "gradient in the",
    ),
    (
        "writes into the right-hand side",
        claim(in_place),
        "inputs_are_left_alone",
        "changed the right-hand side in place",
    ),
    ("touches the right-hand side", claim(touches_rhs), "inputs_are_left_alone", "wrote to its inputs in place"),
    ("an answer with a graph", claim(with_a_graph), "shape_and_dtype", "returned a tensor that requires grad"),
    (
        "wrong for 4 u = 2",
        claim(twice_a_scalar),
        "small_right_hand_sides",
        r"failed inside il.linear_solve|4.0 u = 2 with a relative residual of 1.00e\+00",
    ),
    ("NaN for zero", claim(nan_on_zero), "zero_right_hand_side", r"answered a zero right-hand side by \[nan"),
    ("squares that overflow", claim(squares_overflow), "scale_of_the_right_hand_side", "b scaled by 1e-?200"),
    (
        "float64 for float32",
        claim(double_only),
        "shape_and_dtype",
        "returned dtype torch.float64 for a .* torch.float32",
    ),
    ("a column", claim(a_column), "shape_and_dtype", r"returned shape \(1, 1\) for a right-hand side of shape \(1,\)"),
    ("a NumPy array", claim(as_numpy), "shape_and_dtype", "returned ndarray: a tensor is needed"),
    ("hidden damping", claim(damped), "solves_random_systems", "left a relative residual of 1.00e-06"),
    (
        "pulls every entry towards zero",
        claim(thresholded),
        "linear_in_the_right_hand_side",
        "not linear in the right-hand side",
    ),
    ("random rounding", claim(with_noise), "repeats_are_bitwise_equal", "gave two answers to one system"),
    ("stale factors", claim(KeepsItsFactors()), "solves_random_systems", "left a relative residual"),
    ("stale factors", claim(KeepsItsFactors()), "scale_of_the_matrix", "A scaled by"),
]


@pytest.mark.parametrize(
    ("solver", "check", "message"), [b[1:] for b in BROKEN_LINEAR], ids=[f"{b[0]}-{b[2]}" for b in BROKEN_LINEAR]
)
def test_a_broken_linear_solver_is_caught(solver: Any, check: str, message: str) -> None:
    checks = dict(testing.solver_checks(solver))
    with pytest.raises(AssertionError, match=message):
        checks[check]()


def test_a_solver_that_fails_without_unknowns_is_caught() -> None:
    with pytest.raises(RuntimeError, match="amax"):  # its own exception, untouched
        dict(testing.solver_checks(claim(never_empty)))["small_right_hand_sides"]()


def test_negative_curvature_that_only_lanes_overlook_is_caught() -> None:
    one, many = cg().solver, cg(ignores_curvature=True).solver
    mixed = claim(lambda operator, rhs: (one if rhs.ndim == 1 else many)(operator, rhs), batched=True)
    with pytest.raises(AssertionError, match="says CONVERGED for a negative definite matrix in lane 1 of a batch"):
        dict(testing.solver_checks(mixed))["an_indefinite_system_is_no_success"]()


def test_a_singular_system_with_a_false_status_is_caught() -> None:
    with pytest.raises(AssertionError, match=r"says CONVERGED for a singular matrix \(n=1, rank=0\)"):
        dict(testing.solver_checks(claim(says_converged)))["a_singular_system_is_no_success"]()


# ------------------------------------------------------------------------------------------- deliberately broken: inner


BROKEN_INNER: list[tuple[Any, str, str]] = [
    (keeps_init, "minimises_quadratics", "away from the minimiser, 1.0e-06 is promised"),
    (stops_early, "minimises_smooth_convex_functions", "away from the minimiser"),
    (only_the_first_theta, "minimises_smooth_convex_functions", "away from the minimiser"),
    (loses_its_last_leaf, "structure_of_init", r"returned the leaves \['x'\], but init has"),
    (flattens, "a_scalar_unknown", r"returned x with shape \(1,\), but init has shape \(\)"),
    (flattens, "structure_of_init", r"with shape"),
    (overwrites_init, "init_and_theta_are_left_alone", "changed init in place"),
    (overwrites_theta, "init_and_theta_are_left_alone", r"changed theta\[0\] in place"),
    (touches_theta, "init_and_theta_are_left_alone", r"theta\[0\] in place"),
    (WarmStarts(), "repeats_are_bitwise_equal", "gave two answers to one problem"),
    (needs_a_leaf, "the_graph_of_init_is_ignored", "left a gradient behind in the tensor that init was made from"),
    (reads_the_graph, "the_graph_of_init_is_ignored", "gives another answer"),
    (NeverFreezes(), "a_finished_lane_is_frozen", "gave one lane of a batch two answers, .* neighbours finished"),
    (MixesLanes(), "batch_equals_loop", "of a batch otherwise than alone"),
    (MixesLanes(), "a_layer_under_vmap", "lane 0|away from the minimiser"),
]


@pytest.mark.parametrize(
    ("solver", "check", "message"),
    BROKEN_INNER,
    ids=[f"{getattr(s, '__name__', type(s).__name__)}-{c}" for s, c, _ in BROKEN_INNER],
)
@pytest.mark.filterwarnings("ignore::implicitlayer.StationarityWarning")
def test_a_broken_inner_solver_is_caught(solver: Any, check: str, message: str) -> None:
    ANSWERS.clear()
    checks = dict(testing.solver_checks(testing.inner(solver)))
    with pytest.raises(AssertionError, match=message):
        checks[check]()


def test_a_solver_that_takes_lanes_for_a_number_is_caught() -> None:
    with pytest.raises(RuntimeError, match="cannot be converted to Scalar"):  # its own exception, untouched
        dict(testing.solver_checks(CallsItemOnLanes()))["batch_equals_loop"]()


def test_a_wrong_answer_gives_a_wrong_gradient_of_the_layer() -> None:
    """Promised 1e-6, delivered 1e-2: the gradient of a nonlinear problem shows it."""

    def coarse(objective: Any, init: Tensor, *theta: Any) -> Tensor:
        return dense_newton(objective, init, *theta) + 1e-2

    checks = dict(testing.solver_checks(coarse))
    with (
        pytest.raises(AssertionError, match=r"gradient in theta\[0\] that is off by"),
        pytest.warns(il.StationarityWarning),
    ):
        checks["gradients_of_an_argmin_layer"]()
