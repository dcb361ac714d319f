"""The conformance checks: right solvers pass all of them, and each seeded fault is caught by the check for it."""

import importlib
import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from references import F64
from torch import Tensor
from torch.utils import _pytree as pytree
from user_solvers import (
    TextbookCG,
    as_numpy,
    claim,
    dense,
    dense_newton,
    keeps_init,
)

import implicitlayer as il
from implicitlayer import testing

# ----------------------------------------------------------------------------------------- right solvers from elsewhere


@testing.parametrize_with_solver_checks([testing.linear(dense, "general"), dense_newton])
def test_right_solvers_of_users_conform(solver: Any, check: Callable[[Any], None]) -> None:
    check(solver)


def test_numpy_arrays_are_answers_of_an_inner_solver() -> None:
    def in_numpy(objective: Any, init: Any, *theta: Any) -> Any:
        return pytree.tree_map(lambda leaf: leaf.numpy(), dense_newton(objective, init, *theta))

    for _, check in testing.solver_checks(in_numpy):
        check()


# ------------------------------------------------------------------------------------------------------- what is tested


def names(*arguments: Any, **claims: Any) -> list[str]:
    return [name for name, _ in testing.solver_checks(*arguments, **claims)]


def test_checks_that_are_not_claimed_are_left_out() -> None:
    everything = names(il.Gmres())
    assert {"batch_equals_loop", "status_tells_the_truth", "a_step_limit_is_no_success"} <= set(everything)
    assert "a_step_limit_is_no_success" not in names(il.Dense())  # it has no max_steps
    bare = names(dense)
    assert not {"batch_equals_loop", "status_tells_the_truth", "a_step_limit_is_no_success"} & set(bare)
    assert "scale_of_the_matrix" not in names(il.Neumann(9))  # a scaled contraction is none
    assert not {n for n in names(testing.linear(dense, log10_scale=0)) if n.startswith("scale")}
    assert "solves_in_float32" not in names(testing.linear(dense, dtypes=[torch.float64]))
    assert "batch_equals_loop" not in names(testing.linear(il.Gmres(), batched=False))
    assert "a_step_limit_is_no_success" in names(
        testing.linear(il.Dense(), limited=il.ConjugateGradient(1e-9, max_steps=1))
    )
    lanes = {"repeats_are_bitwise_equal", "a_finished_lane_is_frozen"}
    assert lanes <= set(everything) and not lanes & set(names(testing.linear(il.Gmres(), deterministic=False)))
    assert "a_finished_lane_is_frozen" not in names(testing.linear(il.Gmres(), batched=False))
    definite = "an_indefinite_system_is_no_success"
    assert definite in names(il.ConjugateGradient()) and definite not in everything and definite not in bare
    descent = il.solvers.GradientDescent(1.0)
    inner = names(descent)
    assert "batch_equals_loop" in inner and "batch_equals_loop" not in names(dense_newton)
    assert lanes <= set(inner) and not lanes & set(names(testing.inner(descent, deterministic=False)))
    assert "minimises_in_float32" not in names(testing.inner(dense_newton, dtypes=[torch.float64]))


def test_a_preconditioner_is_tried_where_there_is_a_field_for_one_that_is_empty() -> None:
    name = "solves_with_a_preconditioner"
    assert name in names(il.Gmres()) and name not in names(il.Dense()) and name not in names(dense)
    assert name not in names(il.Gmres(preconditioner=il.Jacobi()))
    made = testing.linear(il.Minres()).preconditioned
    assert isinstance(made, il.Minres) and made.preconditioner is not None
    halves = made.preconditioner(torch.ones(4, dtype=F64))  # type: ignore[operator]
    assert halves.tolist() == [0.5, 1.0, 1.5, 2.0]


def test_the_kind_of_a_bare_solver_is_told_from_its_class_or_arguments() -> None:
    linear, inner = names(il.Minres()), names(dense_newton)
    assert names(dense)[0] == linear[0] and names(il.solvers.SciPyMinimize())[0] == inner[0]
    assert names(lambda objective, init, t: init)[0] == inner[0]
    assert names(dense, kind="linear", systems="general")[0] == linear[0]
    assert names(lambda anything: anything, kind="inner", accuracy=1e-3)[0] == inner[0]
    with pytest.raises(TypeError, match=r"takes neither \(operator, rhs\) nor \(objective, init, \*theta\)\. Say what"):
        testing.solver_checks(lambda one: one)
    with pytest.raises(TypeError, match=r"solver=3 must be callable: solver\(operator, rhs\) or solver\(objective"):
        testing.solver_checks(3)


def test_default_systems_are_those_that_the_solvers_of_the_package_are_for() -> None:
    expected = {
        il.ConjugateGradient(): "positive definite",
        il.Minres(): "symmetric",
        il.Gmres(): "general",
        il.Bicgstab(): "contraction",
        il.Neumann(3): "contraction",
        TextbookCG(): "positive definite",
    }
    for solver, systems in expected.items():
        made = testing.linear(solver)
        assert made.systems == systems and made.rtol == pytest.approx(1e-9)
    assert testing.linear(TextbookCG()).limited == TextbookCG(rtol=1e-9, max_steps=1)


def test_bad_claims_are_refused() -> None:
    for make, message in (
        (lambda: testing.linear(dense, "spd"), r"systems='spd' must be one of \('positive definite', 'symmetric'"),
        (
            lambda: testing.linear(dense, rtol=0.0),
            r"rtol=0\.0 must be positive and finite\. It is the relative residual",
        ),
        (lambda: testing.linear(dense, log10_cond=13), r"log10_cond=13 must be from 0 to 12\. It is an exponent"),
        (
            lambda: testing.linear(dense, log10_scale=300),
            r"log10_scale=300 must be from 0 to 200\. 0 leaves the checks",
        ),
        (lambda: testing.linear(dense, dtypes=[torch.float32]), r"dtypes=\[torch\.float32\] must hold torch\.float64"),
        (lambda: testing.inner(dense_newton, accuracy=math.inf), r"accuracy=inf must be positive and finite"),
        (lambda: testing.inner(dense_newton, log10_cond=-1), r"log10_cond=-1 must be from 0 to 12"),
        (lambda: testing.solver_checks(dense, kind="outer"), r"kind='outer' must be 'linear', 'inner' or None"),  # type: ignore[arg-type]
        (lambda: testing.solver_checks(dense, rtol=1e-3), r"\['rtol'\] need kind='linear' or kind='inner'"),
        (lambda: testing.solver_checks(claim(dense), kind="linear"), r"kind must be left out for what il\.testing"),
        (lambda: testing.parametrize_with_solver_checks([]), r"solvers must hold one solver at least"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    for make in (testing.linear, testing.inner):
        with pytest.raises(TypeError, match=r"solver=None must be callable: solver\("):
            make(None)  # type: ignore[operator]


def test_a_claim_is_called_as_its_solver_and_says_what_it_promises() -> None:
    made = testing.linear(dense, "general", rtol=1e-8, name="LU")
    assert made(lambda v: 2 * v, torch.ones(2, dtype=F64)).tolist() == [0.5, 0.5]
    assert repr(made) == "testing.linear(LU, systems='general', rtol=1e-08)"
    inner = testing.inner(keeps_init, accuracy=1e-3)
    assert inner(None, 5) == 5 and repr(inner) == "testing.inner(keeps_init, accuracy=0.001)"


def test_a_solver_that_fails_on_the_smallest_system_gets_all_checks() -> None:
    def fails(operator: Any, rhs: Tensor) -> Tensor:
        raise ZeroDivisionError

    assert "status_tells_the_truth" in names(fails)
    with pytest.raises(AssertionError, match=r"as_numpy returned ndarray"):
        dict(testing.solver_checks(testing.linear(as_numpy)))["shape_and_dtype"]()


def test_test_ids_name_solver_and_check() -> None:
    mark = testing.parametrize_with_solver_checks([il.Minres(), testing.inner(dense_newton, name="my Newton")]).mark
    ids = [case.id for case in mark.args[1]]
    assert ids[0] == "Minres-shape_and_dtype" and ids[-1] == "my Newton-a_layer_under_vmap"


def test_a_status_is_demanded_where_one_was_returned_before() -> None:
    calls: list[int] = []

    def moody(operator: Any, rhs: Tensor) -> Any:
        calls.append(1)
        return il.Dense()(operator, rhs) if len(calls) == 1 else dense(operator, rhs)

    with pytest.raises(AssertionError, match=r"moody returned Tensor in place of il\.LinearSolution"):
        dict(testing.solver_checks(moody))["nan_is_no_success"]()


def test_without_pytest_the_decorator_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytest", None)
    with pytest.raises(ImportError, match=r"parametrize_with_solver_checks needs pytest.*pip install 'implicitlayer\["):
        testing.parametrize_with_solver_checks([il.Minres()])


def test_the_testing_module_itself_needs_no_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("implicitlayer.testing")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(il, "testing", testing, raising=False)  # restored with the modules
    monkeypatch.setitem(sys.modules, "pytest", None)
    assert importlib.import_module("implicitlayer.testing").solver_checks is not testing.solver_checks


def test_answers_may_be_numpy_scalars() -> None:
    def scalar(objective: Any, init: Any, *theta: Any) -> Any:
        answer = dense_newton(objective, init, *theta)
        return np.float64(answer) if isinstance(answer, Tensor) and answer.ndim == 0 else answer

    dict(testing.solver_checks(scalar))["a_scalar_unknown"]()
