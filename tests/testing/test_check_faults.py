"""check_argmin_gradients on layers that are wrong: every seeded fault is caught, at the right leaf."""

# Two kinds of fault: in the user's objective (its derivatives lie), and in the package (a rule is replaced by a wrong
# one for the time of a test). The problems are those that pass without a fault, in test_check.py.

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from references import F64, newton, newton_root, randn, smooth_objective
from torch import Tensor

import implicitlayer as il
from implicitlayer.api import _argmin
from implicitlayer.equation import _rules
from implicitlayer.layer import _function
from implicitlayer.testing._check import check_argmin_gradients
from implicitlayer.testing._report import GradientCheckError, GradientReport

ZEROS = torch.zeros(3, dtype=F64)
THETA = (randn(5, 3, seed=1), randn(5, seed=2), torch.tensor(0.5, dtype=F64))
W, B = 0.6 * randn(3, 3, seed=3), randn(3, seed=4)


def residual(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return 2 * x + w @ torch.tanh(x) - b


def of_argmin(**settings: Any) -> GradientReport:
    return check_argmin_gradients(smooth_objective, newton, ZEROS, *THETA, **settings)


def of_root(**settings: Any) -> GradientReport:
    return check_argmin_gradients(residual, newton_root, ZEROS, W, B, kind="root", **settings)


def caught(run: Callable[..., GradientReport], **settings: Any) -> GradientReport:
    with pytest.raises(GradientCheckError) as error:
        run(**settings)
    report = error.value.report
    assert report.verdict == "failed" and report.worst is not None and report.worst.status == "failed"
    return report


def failed(report: GradientReport) -> set[tuple[str, str]]:
    return {(row.leaf, row.mode) for row in report.failures}


Gradients = list[Tensor | None]


def changed(change: Callable[[Gradients], Gradients]) -> Callable[..., Gradients]:
    true_rule = _rules.implicit_vjp
    return lambda *args, **how: change(true_rule(*args, **how))


def each(change: Callable[[Tensor], Tensor], only: int | None = None) -> Callable[[Gradients], Gradients]:
    return lambda gradients: [change(g) if g is not None and only in (None, j) else g for j, g in enumerate(gradients)]


REVERSE: dict[str, tuple[Callable[[Gradients], Gradients], set[str]]] = {
    "wrong sign": (each(lambda g: -g), {"theta[0]", "theta[1]", "theta[2]"}),
    "wrong sign of one leaf": (each(lambda g: -g, only=1), {"theta[1]"}),
    "one leaf zero": (each(lambda g: 0 * g, only=2), {"theta[2]"}),
    "one leaf None": (lambda gradients: [gradients[0], None, gradients[2]], {"theta[1]"}),
    "a factor of 2": (each(lambda g: 2 * g, only=0), {"theta[0]"}),
    "six digits right": (each(lambda g: (1 + 1e-6) * g, only=0), {"theta[0]"}),
    "one entry wrong": (
        each(lambda g: g.index_fill(-1, torch.tensor([4]), 0.0) if g.shape[-1:] == (5,) else g, only=1),
        {"theta[1]"},
    ),
    "transposed leaf": (
        each(lambda g: g.flip(-1) if g.shape[-1:] == (3,) else g, only=0),
        {"theta[0]"},
    ),
    "NaN": (each(lambda g: g * torch.nan, only=2), {"theta[2]"}),
}


@pytest.mark.parametrize("name", REVERSE)
def test_a_wrong_reverse_rule_is_caught_at_its_leaf(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, leaves = REVERSE[name]
    monkeypatch.setattr(_function, "implicit_vjp", changed(change))
    report = caught(of_argmin, modes=("vjp",))
    assert {leaf for leaf, _ in failed(report)} == leaves
    assert report.worst is not None and report.worst.leaf in leaves
    assert report.worst.dominating == "the gradient itself"
    if name == "one entry wrong":
        assert all(row.entry.endswith("[4]") for row in report.failures if row.reference == "dense")


def test_a_wrong_forward_rule_is_caught_wherever_it_is_used_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    true_rule = _rules.implicit_jvp
    monkeypatch.setattr(
        _function, "implicit_jvp", lambda *args, **how: [-t for t in true_rule(*args, **how) or []] or None
    )
    report = caught(of_argmin)
    assert {mode for _, mode in failed(report)} == {"jvp", "double", "vmap"}
    assert all("forward over reverse" in row.entry for row in report.failures if row.mode == "double")
    assert all("vmap(jvp)" in row.entry for row in report.failures if row.mode == "vmap")


def test_the_adjoint_identity_fails_when_one_mode_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    true_rule = _rules.implicit_jvp
    monkeypatch.setattr(
        _function, "implicit_jvp", lambda *args, **how: [t * 1.01 for t in true_rule(*args, **how) or []] or None
    )
    assert any(row.reference == "adjoint" for row in caught(of_argmin, modes=("vjp", "jvp")).failures)


def test_a_missing_mixed_term_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def zeros(function: Any, theta: list[Tensor], needed: tuple[bool, ...], u: list[Tensor]) -> Gradients:
        return [torch.zeros_like(t) if n else None for t, n in zip(theta, needed, strict=True)]

    monkeypatch.setattr(_rules, "pull_tensors", zeros)
    assert {leaf for leaf, _ in failed(caught(of_argmin, modes=("vjp",)))} == {"theta[0]", "theta[1]", "theta[2]"}


def test_a_jacobian_that_is_not_transposed_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    true = _rules.Jacobian
    monkeypatch.setattr(_rules, "Jacobian", lambda r, n, transposed, *rest: true(r, n, False, *rest))
    assert {mode for _, mode in failed(caught(of_root, modes=("vjp", "jvp")))} >= {"vjp"}


def test_a_jacobian_that_is_transposed_in_forward_mode_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    true = _rules.Jacobian
    monkeypatch.setattr(_rules, "Jacobian", lambda r, n, transposed, *rest: true(r, n, True, *rest))
    assert {mode for _, mode in failed(caught(of_root, modes=("vjp", "jvp")))} == {"jvp"}


def test_a_solve_that_was_left_out_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_rules, "solve", lambda spec, rhs, tensors: list(rhs))
    assert {mode for _, mode in failed(caught(of_argmin, modes=("vjp", "jvp")))} >= {"vjp", "jvp"}


def test_conjugate_gradients_that_stop_after_one_step_are_blamed_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_argmin, "ConjugateGradient", lambda: il.ConjugateGradient(max_steps=1))
    report = caught(of_argmin, modes=("vjp",))
    assert report.worst is not None and report.worst.dominating == "linear solve"


def test_a_loose_linear_solver_is_wrong_only_against_a_tighter_tolerance() -> None:
    loose = il.ConjugateGradient(rtol=0.3)
    assert not of_argmin(linear_solver=loose, modes=("vjp",)).failures
    assert caught(of_argmin, linear_solver=loose, modes=("vjp",), rtol=1e-12).worst is not None


def test_damping_is_caught_and_explained() -> None:
    report = caught(of_argmin, damping=1e-2, modes=("vjp",))
    assert any(note.startswith("damping and Gauss-Newton curvature change the gradient") for note in report.notes)


def test_a_second_derivative_that_forgets_the_first_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_function, "implicit_vjp", changed(each(lambda g: g.detach())))
    assert {mode for _, mode in failed(caught(of_argmin, modes=("vjp", "double")))} == {"double"}


def test_a_second_derivative_without_the_path_through_x_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    true_rule = _rules.implicit_vjp
    monkeypatch.setattr(
        _function, "implicit_vjp", lambda r, x, *args, **how: true_rule(r, [t.detach() for t in x], *args, **how)
    )
    assert {mode for _, mode in failed(caught(of_argmin, modes=("vjp", "double")))} == {"double"}


def test_a_shared_theta_averaged_over_the_batch_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    true_rule = _rules.implicit_vjp

    def averaged(
        r: Any, x: list[Tensor], theta: list[Tensor], v: Any, needed: Any, *rest: Any, **how: Any
    ) -> Gradients:
        gradients = true_rule(r, x, theta, v, needed, *rest, **how)
        if not r.levels:
            return gradients
        lanes = r.levels[0][0]
        return [g if has or g is None else g / len(x[0]) for g, has in zip(gradients, lanes, strict=True)]

    monkeypatch.setattr(_function, "implicit_vjp", averaged)
    report = caught(of_argmin, modes=("vjp", "vmap"))
    assert {mode for _, mode in failed(report)} == {"vmap"}
    assert all(row.entry.startswith("shared") for row in report.failures)


def test_lanes_that_are_mixed_up_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    true = _function.solve_forward
    monkeypatch.setattr(
        _function,
        "solve_forward",
        lambda *call: changed_answer(true, lambda spec, x: x.flip(0) if spec.residual.levels else x, *call),
    )
    report = caught(of_argmin, modes=("vmap",))
    assert ("x", "vmap") in failed(report)


def changed_answer(
    true: Callable[..., Any],
    change: Callable[[Any, Tensor], Tensor],
    spec: Any,
    init: list[Tensor],
    theta: list[Tensor],
) -> tuple[list[Tensor], Any]:
    x, found = true(spec, init, theta)
    return [change(spec, leaf) for leaf in x], found


def test_an_answer_changed_on_its_way_out_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    true = _function.solve_forward
    monkeypatch.setattr(
        _function, "solve_forward", lambda *call: changed_answer(true, lambda spec, x: x * (1 + 1e-9), *call)
    )
    assert ("x", "value") in failed(caught(of_argmin, modes=("vjp",)))


def test_one_lane_that_is_zero_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    true = _rules.solve

    def last_lane_zero(spec: Any, rhs: list[Tensor], tensors: list[Tensor]) -> list[Tensor]:
        found = true(spec, rhs, tensors)
        if not spec.operator.residual.levels:
            return found
        keep = torch.ones(len(found[0]), dtype=F64)
        keep[-1] = 0
        return [leaf * keep.reshape(-1, *[1] * (leaf.ndim - 1)) for leaf in found]

    monkeypatch.setattr(_rules, "solve", last_lane_zero)
    report = caught(of_argmin, modes=("vmap",))
    assert {row.entry.split(" [")[0] for row in report.failures} == {"lane 2", "shared"}


# Faults of the user's objective: the layer and the dense reference believe autograd, the solver does not.


def detached(x: Tensor, weight: Tensor, offset: Tensor, log_strength: Tensor) -> Tensor:
    return smooth_objective(x, weight, offset.detach(), log_strength)


def through_a_number(x: Tensor, weight: Tensor, offset: Tensor, log_strength: Tensor) -> Tensor:
    return smooth_objective(x, weight, offset, torch.tensor(log_strength.item(), dtype=F64))


def exact(f: Any, x: Tensor, *theta: Tensor) -> Tensor:
    return newton(smooth_objective, x, *theta)


def test_a_theta_that_the_objective_cuts_off_is_named() -> None:
    report = caught(lambda: check_argmin_gradients(detached, exact, ZEROS, *THETA, modes=("vjp",)))
    assert {row.leaf for row in report.failures} == {"theta[1]"}
    assert ("theta[1]", "objective") in failed(report) and ("theta[1]", "vjp") in failed(report)
    assert any("look for .detach()" in note for note in report.notes)
    assert {row.got for row in report.failures} == {0.0}


def test_a_theta_that_becomes_a_number_is_named_by_the_check_and_by_the_layer() -> None:
    report = caught(lambda: check_argmin_gradients(through_a_number, exact, ZEROS, *THETA, modes=("vjp",)))
    assert failed(report) == {("theta[2]", "objective"), ("all leaves", "vjp")}
    assert any("takes a Python number out of theta[2]" in note for note in report.notes)


class Doubled(torch.autograd.Function):
    """Sum of x^3 with the right gradient, but a second derivative twice too large."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return (x**3).sum()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return v * (3 * x**2 + 6 * x.detach() * (x - x.detach()))


def test_a_custom_function_with_a_wrong_second_derivative_is_caught() -> None:
    def cubic(x: Tensor, t: Tensor) -> Tensor:
        return Doubled.apply(x) - (t * x).sum()

    report = caught(
        lambda: check_argmin_gradients(
            cubic, lambda f, x, t: (t / 3).sqrt(), ZEROS + 1, torch.tensor([1.0, 2.0, 3.0], dtype=F64), modes=("vjp",)
        )
    )
    assert ("x", "objective") in failed(report)
    assert ("theta[0]", "vjp") in failed(report)  # 1 / (12 x) in place of 1 / (6 x)


class Flipped(torch.autograd.Function):
    """t, with the wrong sign in its gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(t: Tensor) -> Tensor:
        return t.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Tensor:
        return -v


def test_a_custom_function_with_a_wrong_sign_is_caught_at_its_leaf() -> None:
    def objective(x: Tensor, good: Tensor, bad: Tensor) -> Tensor:
        return 0.5 * (x * x).sum() - ((good + Flipped.apply(bad)) * x).sum()

    report = caught(
        lambda: check_argmin_gradients(objective, lambda f, x, s, t: s + t, ZEROS, B, 2 * B, modes=("vjp",))
    )
    assert {row.leaf for row in report.failures} == {"theta[1]"}


def test_a_solver_of_another_problem_that_happens_to_be_stationary_is_caught() -> None:
    """x = t at theta = t, but it moves half as fast: stationary at this theta alone."""
    here = B.clone()

    def solver(f: Any, x: Tensor, t: Tensor) -> Tensor:
        return here + 0.5 * (t - here)

    report = check_argmin_gradients(lambda x, t: ((x - t) ** 2).sum(), solver, ZEROS, B, modes=("vjp",))
    rows = [row for row in report.rows if row.reference == "differences" and row.mode == "vjp"]
    assert all(row.status != "ok" for row in rows)
    assert report.verdict == "inconclusive"  # the displaced answers are measured as not stationary: no digit


def test_a_layer_that_raises_is_a_failure_with_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **how: Any) -> Gradients:
        raise RuntimeError("no gradient today")

    monkeypatch.setattr(_function, "implicit_vjp", broken)
    with pytest.raises(GradientCheckError, match="no gradient today") as error:
        of_argmin(modes=("vjp", "jvp"))
    assert isinstance(error.value.__cause__, RuntimeError)
    assert {(row.mode, row.dominating) for row in error.value.report.failures} == {
        ("vjp", "the layer raised RuntimeError")
    }


def test_every_problem_here_passes_without_a_fault() -> None:
    report = of_argmin()
    assert report.verdict == of_root().verdict == "passed"
    report = replace(report, verdict="failed")
    assert str(GradientCheckError(report)) == str(report)
