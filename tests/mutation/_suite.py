"""The conformance suite that every mutant is put through: problems and checks of ``il.testing``, cheap ones first."""

# Everything is reached through the two modules that are handed in, so that it belongs to the package under test. All
# problems are solved to rounding and well-conditioned: "inconclusive" counts as a failure here.

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from mutation._layers import F64, NamedCheck, passes, settings_of_layers, structures
from torch import Tensor

MODES = ("vjp", "jvp", "double", "vmap")


def suite(il: Any, testing: Any) -> Iterator[NamedCheck]:
    """Pairs (name, check) in their order; ``check()`` raises where the package is wrong."""
    smooth = testing.smooth_convex_problem(3, log10_cond=1)
    root = testing.root_problem(3, log10_cond=1)
    for mode in MODES:
        yield f"argmin, {mode}", partial(passes, testing, smooth.objective, smooth, modes=(mode,))
        yield f"root, {mode}", partial(passes, testing, root.residual, root, modes=(mode,), kind="root")
    yield from roles_and_faults(il, testing)
    yield from structures(il, testing)
    yield from settings_of_layers(il, testing)
    yield from properties(il, testing)
    yield from details(il, testing)
    yield from solvers(il, testing)
    yield "status, worst lane", partial(a_batch_has_the_status_of_its_worst_lane, il)
    yield "constraints, small force", partial(a_force_below_its_tolerance_is_that_of_a_kink, il)


def a_batch_has_the_status_of_its_worst_lane(il: Any) -> None:
    # two steps of CG solve with the identity, and not with three distinct eigenvalues
    entries = torch.tensor([[1.0, 1.0, 1.0], [1.0, 2.0, 3.0]], dtype=F64)
    solution = il.ConjugateGradient(rtol=1e-10, max_steps=2)(
        il.FlatOperator(lambda v: entries * v), torch.ones_like(entries)
    )
    assert solution.status is il.Status.MAX_STEPS_REACHED, (
        f"status {solution.status} of lanes {solution.codes.tolist()}"
    )


def a_force_below_its_tolerance_is_that_of_a_kink(il: Any) -> None:
    # x <= 1 at t = 1, where the multiplier is 0; the solver's 1e-9 is below 1e-6 of the terms, whose size is 2
    layer = il.constrained_argmin(
        lambda x, t: ((x - t) ** 2).sum(),
        lambda problem, init, t: (t.detach().clone(), (None, torch.full((1,), 1e-9, dtype=F64))),
        inequality=lambda x, t: x - 1,
        solver_returns_multipliers=True,
        on_failure="ignore",
    )
    layer(torch.zeros(1, dtype=F64), torch.ones(1, dtype=F64, requires_grad=True))
    assert int(layer.active_set.num_kinks) == 1, f"{layer.active_set} in place of one kink"


# ------------------------------------------------------------------------------------------------- what a user may do


def roles_and_faults(il: Any, testing: Any) -> Iterator[NamedCheck]:
    """Ways to give a theta, and all ways in which a solver misbehaves."""
    for role in testing.roles():
        yield f"theta role, {role.name}", partial(right_in_role, il, testing, role)
    # the minimum of |x - t|^2 is a theta, so that a solver may return theta itself
    for fault in testing.faults(lambda f, x, t: t.clone()):
        yield f"solver that {fault.name}", partial(fault_is_treated_as_said, il, testing, fault)


def right_in_role(il: Any, testing: Any, role: Any) -> None:
    case = role(testing.quadratic_problem(2, log10_cond=1))
    v = testing.normal_tensor((2,), seed=1)
    x = il.argmin(case.objective, case.solver)(case.init, *case.theta)
    got = iter(torch.autograd.grad(x, [t for t in case.inputs if t.requires_grad], v, allow_unused=True))
    for tensor, right in zip(case.inputs, case.expected(v), strict=True):
        gradient = next(got) if tensor.requires_grad else None
        if right is None:
            assert gradient is None or not gradient.any(), f"{role}: a gradient of {gradient} in place of none"
        else:
            # CG to 1e-10 on a condition of 10
            assert gradient is not None and torch.allclose(gradient, right, rtol=1e-8), f"{role}: {gradient}, {right}"


def fault_is_treated_as_said(il: Any, testing: Any, fault: Any) -> None:
    t = testing.normal_tensor((3,), seed=2).requires_grad_()
    init, v = torch.zeros(3, dtype=F64), testing.normal_tensor((3,), seed=3)
    with fault.expected():
        x = il.argmin(lambda x, t: ((x - t) ** 2).sum(), fault)(init, t)
        if fault.raises is None and fault.warns is None:  # x = t, so that the gradient is v itself
            (gradient,) = torch.autograd.grad(x, t, v)
            assert torch.allclose(gradient, v, rtol=1e-9), f"{fault!r}: gradient {gradient}, right {v}"
            assert torch.allclose(x, t, rtol=1e-12 + fault.error), f"{fault!r}: {x} in place of {t}"
            assert x.data_ptr() != t.data_ptr() and not init.any(), f"{fault!r}: shares memory with what was given"


# --------------------------------------------------------------------------------------------- properties and solvers


def properties(il: Any, testing: Any) -> Iterator[NamedCheck]:
    """What needs no reference."""
    smooth = testing.smooth_convex_problem(4, log10_cond=1, seed=1)
    layer = il.argmin(smooth.objective, smooth.solver)
    for name in ("adjoint", "linear_in_cotangent", "repeatable", "batch_equals_loop"):
        yield f"property, {name}", partial(getattr(testing, f"check_{name}"), layer, smooth.init, *smooth.theta)
    target = testing.normal_tensor((3,), seed=14)
    gradient = torch.func.grad(lambda t: wells(torch.zeros(3, dtype=F64), t).pow(3).sum())
    wells = il.argmin(lambda x, t: (torch.cosh(x) - t * x).sum() + 0.5 * x.sum() ** 2, newton)
    yield (
        "forward over reverse",
        partial(testing.check_adjoint, lambda init, t: gradient(t), torch.zeros(3, dtype=F64), target),
    )
    for name in ("scaled_objective", "rotated_unknowns"):
        check = getattr(testing, f"check_{name}")
        yield f"property, {name}", partial(check, smooth.objective, smooth.solver, smooth.init, *smooth.theta)


def newton(f: Any, x: Tensor, t: Tensor) -> Tensor:
    """Newton steps for cosh(x) - t x + (sum x)^2 / 2, Hessian diag(cosh x) + 1 1'."""
    for _ in range(20):
        gradient = torch.sinh(x) - t + x.sum()
        x = x - torch.linalg.solve(torch.diag(torch.cosh(x)) + torch.ones(len(x), len(x), dtype=F64), gradient)
    return x


def solvers(il: Any, testing: Any) -> Iterator[NamedCheck]:
    """The package's own solvers against the conformance checks; those that solve many hard systems last."""
    descent = il.solvers.GradientDescent(step_size=1.0, max_steps=300, atol=1e-6)  # mu >= 1/20: 1e-6 / mu from x*
    accelerated = il.solvers.AcceleratedGradient(1.0, strong_convexity=0.05, max_steps=200, atol=1e-6)
    claims = {
        "ConjugateGradient": il.ConjugateGradient(),
        "GradientDescent": testing.inner(descent, accuracy=1e-4, dtypes=(F64,)),
        "AcceleratedGradient": testing.inner(accelerated, accuracy=1e-4, dtypes=(F64,)),
        "LBFGS": testing.inner(il.solvers.LBFGS(max_steps=50, atol=1e-6), accuracy=1e-4, dtypes=(F64,)),
        "NewtonCG": testing.inner(il.solvers.NewtonCG(max_steps=20, atol=1e-6), accuracy=1e-4, dtypes=(F64,)),
        "Dense": il.Dense(),
        "NormalEquations": il.NormalEquations(),
        "Gmres": il.Gmres(),
        "Minres": il.Minres(),
        "Bicgstab": il.Bicgstab(),
        "Neumann": il.Neumann(60),
        "WarmStart": testing.linear(il.WarmStart(il.ConjugateGradient()), "positive definite", deterministic=False),
    }
    # contractions are too easy for a wrong direction to matter
    hard = testing.linear(il.Bicgstab(), "positive definite")
    yield "Bicgstab, positive definite", dict(testing.solver_checks(hard))["solves_random_systems"]
    # with a tolerance, Ritz values tell of negative curvature where the check of each step is gone
    truncated = testing.linear(il.ConjugateGradient(max_steps=8), "positive definite")
    name = "an_indefinite_system_is_no_success"
    yield f"truncated ConjugateGradient, {name}", dict(testing.solver_checks(truncated))[name]
    slow = []
    for solver, claim in claims.items():
        for name, check in testing.solver_checks(claim):
            entry = (f"{solver}, {name}", check)
            if name == "status_tells_the_truth":
                slow.append(entry)
            else:
                yield entry
    yield from slow


# ------------------------------------------------------------------------------------------------------------- details


def details(il: Any, testing: Any) -> Iterator[NamedCheck]:
    """What no property above can see: numbers that are promised, and what is kept of two points."""
    for name in ("ConjugateGradient", "Minres", "Gmres", "Bicgstab"):
        yield f"zero steps, {name}", partial(zero_steps_keep_the_scale, il, name)
        yield f"default tolerance, {name}", partial(default_tolerance_is_kept, il, testing, name)
    yield "damping mirrors the smallest eigenvalue", partial(damping_is_twice_the_smallest, il)
    yield "a polish step that leads off", partial(polish_keeps_the_better_point, il)
    yield "an answer that is far along a flat direction", partial(a_hidden_distance_is_told, il)


def zero_steps_keep_the_scale(il: Any, name: str) -> None:
    rhs = torch.tensor([2.0**40, -3.0], dtype=F64)
    value = getattr(il, name)(max_steps=0)(torch.eye(2, dtype=F64), rhs).value
    assert torch.equal(value, rhs), f"zero steps of {name} return {value} for {rhs}"


def default_tolerance_is_kept(il: Any, testing: Any, name: str) -> None:
    for dtype, rtol in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        matrix = testing.spd_matrix(12, log10_cond=2, seed=3).to(dtype)
        solution = getattr(il, name)()(matrix, testing.normal_tensor((12,), seed=4).to(dtype))
        assert solution.rtol == rtol, f"{name} takes rtol={solution.rtol} for {dtype}, documented is {rtol}"


def damping_is_twice_the_smallest(il: Any) -> None:
    matrix, v = (
        torch.diag(torch.tensor([-1.0, 0.5, 2.0, 5.0], dtype=F64)),
        torch.tensor([0.1, 1.0, 1.0, 1.0], dtype=F64),
    )
    layer = il.argmin(
        lambda x, b: 0.5 * x @ matrix @ x - b @ x,
        lambda f, x, b: torch.linalg.solve(matrix, b),
        negative_curvature="damp",
    )
    layer(torch.zeros(4, dtype=F64), torch.ones(4, dtype=F64, requires_grad=True)).backward(v)
    damping = float(layer.last_record.solution.damping)
    assert abs(damping - 2) < 5e-3, f"damped by {damping}, twice the smallest eigenvalue is 2"


def polish_keeps_the_better_point(il: Any) -> None:
    # sqrt(1e-12 + x^2): a Newton step from 10 is 1e15 long, and no part of it leads to a smaller slope
    layer = il.argmin(
        lambda x, t: torch.sqrt(1e-12 + (x - t) ** 2).sum(),
        lambda f, x, t: t + 10.0,
        polish=2,
        stationarity_rtol=None,
    )
    x = layer(torch.zeros(1, dtype=F64), torch.zeros(1, dtype=F64, requires_grad=True))
    assert x.item() == 10.0, f"a polish step led from 10 to {x.item()}"


def a_hidden_distance_is_told(il: Any) -> None:
    # 5 per cent off along the flat direction; a part in 1e3 of it along the steep one makes all of the gradient
    curvatures = torch.tensor([1.0, 1e-6], dtype=F64)
    layer = il.argmin(
        lambda x, b: 0.5 * (curvatures * x) @ x - b @ x,
        lambda f, x, b: b / curvatures * 1.05 + 50 * torch.tensor([1.0, 0.0], dtype=F64),
        on_failure="raise",
    )
    x = layer(torch.zeros(2, dtype=F64), torch.ones(2, dtype=F64, requires_grad=True))
    try:
        x.sum().backward()
    except il.StationarityError:
        return
    raise AssertionError("an answer 5 per cent of its size away passes for a solution")
