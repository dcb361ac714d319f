"""LBFGS inside a box: beside SciPy's L-BFGS-B and ``il.qp``, every point inside, derivatives through a layer."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from bounded_problems import PROBLEMS
from references import F64, randn, relative_error, spd_matrix
from torch import Tensor

import implicitlayer as il
from implicitlayer import Status
from implicitlayer.solvers import LBFGS
from implicitlayer.solvers._bounded import _Model

optimize = pytest.importorskip("scipy.optimize")

RTOL = 1e-6


class Watched:
    """A function in a box: at every evaluation its value, and the gradient of entries that do not press on a bound."""

    def __init__(self, function: Callable[[Tensor], Tensor], lower: Tensor, upper: Tensor) -> None:
        self.function, self.lower, self.upper = function, lower, upper
        self.values: list[float] = []
        self.norms: list[float] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.gradient_at(x.detach())
        return self.function(x)

    def gradient_at(self, x: Tensor) -> tuple[float, Any]:
        point = x.clone().requires_grad_()
        with torch.enable_grad():
            value = self.function(point)
            (g,) = torch.autograd.grad(value, point)
        held = ((x <= self.lower) & (g > 0)) | ((x >= self.upper) & (g < 0))
        self.values.append(value.item())
        self.norms.append(float(torch.where(held, 0.0, g).norm()))
        return value.item(), g.numpy()

    @property
    def needed(self) -> int | None:
        """Evaluations until the first point whose gradient is RTOL of that at the start."""
        return next((i + 1 for i, norm in enumerate(self.norms) if norm <= RTOL * self.norms[0]), None)


def both(name: str) -> tuple[Watched, Watched]:
    function, start, lower, upper = PROBLEMS[name]
    ours, theirs = (Watched(function, lower, upper) for _ in range(2))
    LBFGS(max_steps=1000, rtol=RTOL, bounds=il.sets.Box(lower, upper))(ours, start)
    limits = {"ftol": 0.0, "gtol": 0.0, "maxiter": 1000, "maxfun": 3000}
    at = lambda x: theirs.gradient_at(torch.tensor(x))  # noqa: E731
    pairs = list(zip(lower.tolist(), upper.tolist(), strict=True))
    begin = start.clamp(lower, upper).numpy()
    optimize.minimize(at, begin, jac=True, method="L-BFGS-B", bounds=pairs, options=limits)
    return ours, theirs


def test_twenty_functions_in_boxes_take_at_most_1_2_times_the_evaluations_of_scipy() -> None:
    """Solved: a gradient of 1e-6 of that at the start. Measured: 20 of 20 beside 19, 1.10 times the evaluations."""
    solved, evaluations, lines = [0, 0], [0, 0], []
    for name in PROBLEMS:
        counts = [watched.needed for watched in both(name)]
        solved = [n + (count is not None) for n, count in zip(solved, counts, strict=True)]
        if None not in counts:
            evaluations = [n + (count or 0) for n, count in zip(evaluations, counts, strict=True)]
        lines.append(f"{name:22} {counts}")
    table = "\n".join(lines)
    assert solved[0] >= solved[1], table
    assert evaluations[0] <= 1.2 * evaluations[1], table


@pytest.mark.parametrize("seed", range(12))
def test_box_programs_have_the_solution_of_the_active_set_method(seed: int) -> None:
    """Curvatures over 1e4, bounds that are infinite, and entries that are fixed."""
    n = 3 + 3 * seed
    Q, p = spd_matrix(n, 4, seed=seed), randn(n, seed=seed + 1)
    lower, upper = -0.3 * randn(n, seed=seed + 2).abs(), 0.3 * randn(n, seed=seed + 3).abs()
    lower[::4], upper[1::5] = -torch.inf, torch.inf
    lower[2] = upper[2] = 0.1
    found = LBFGS(rtol=1e-10, bounds=il.sets.Box(lower, upper)).run(lambda x: 0.5 * x @ Q @ x + p @ x, randn(n, seed=9))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", il.KinkWarning)
        right = il.qp(Q, p, lb=lower, ub=upper)
    # a gradient of 1e-10 of its first size, over the least curvature: 1e-10 times the condition, and its first size
    assert found.status is Status.CONVERGED and relative_error(found.value, right) < 1e-5
    assert bool((found.value >= lower).all()) and bool((found.value <= upper).all())
    assert float(found.value[2]) == 0.1


def test_no_point_is_evaluated_outside_of_the_box() -> None:
    lower, upper = torch.tensor([0.0, -0.5], dtype=F64), torch.tensor([torch.inf, 0.3], dtype=F64)
    seen: list[Tensor] = []

    def logarithm(x: Tensor) -> Tensor:  # not a number below -0.1
        seen.append(x.detach().clone())
        return -torch.log(x[0] + 0.1) + 3 * x[0] + (x[1] - x[0] - 2) ** 2

    x = LBFGS(rtol=1e-9, bounds=il.sets.Box(lower, upper))(logarithm, torch.tensor([-5.0, 9.0], dtype=F64))
    assert all(bool((at >= lower).all()) and bool((at <= upper).all()) for at in seen)
    # x[1] at 0.3; -1/(a + 0.1) + 3 - 2 (0.3 - a - 2) = 0 has no root a >= 0 but presses on 0 for 3 + 3.4 < 10: a root
    slope = lambda a: -1 / (a + 0.1) + 3 + 2 * (a + 1.7)  # noqa: E731
    right = optimize.brentq(slope, 0.0, 1.0, xtol=1e-15)
    assert abs(float(x[0]) - right) < 1e-8 and float(x[1]) == 0.3


def test_a_box_that_is_infinite_changes_no_minimum() -> None:
    Q, p = spd_matrix(7, 2, seed=1), randn(7, seed=2)
    objective = lambda x: 0.5 * x @ Q @ x + p @ x  # noqa: E731
    x = LBFGS(rtol=1e-11, bounds=il.sets.Box())(objective, torch.zeros(7, dtype=F64))
    assert relative_error(x, -torch.linalg.solve(Q, p)) < 1e-8  # 1e-11 times the condition of 1e2


def program(lanes: int, n: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    Q = torch.stack([spd_matrix(n, 2, seed=i) for i in range(lanes)])
    p = (0.2 * randn(lanes, n, seed=50)).requires_grad_()
    lower, upper = (torch.full((n,), v, dtype=F64, requires_grad=True) for v in (-0.2, 0.3))
    return Q, p, lower, upper


def value_of(x: Tensor, Q: Tensor, p: Tensor, *_: Tensor) -> Tensor:
    value: Tensor = (x * (0.5 * (Q @ x[..., None])[..., 0] + p)).sum(-1)
    return value


def test_a_layer_over_a_box_takes_its_bounds_from_the_layer_and_agrees_with_the_program_and_differences() -> None:
    Q, p, lower, upper = program(4)
    layer = il.argmin(value_of, LBFGS(rtol=1e-12), constraint=lambda Q, p, lo, hi: il.sets.Box(lo, hi), batch_dims=1)
    v = randn(4, 5, seed=7)
    x = layer(torch.zeros(4, 5, dtype=F64), Q, p, lower, upper)
    gradients = torch.autograd.grad((x * v).sum(), (p, lower, upper))
    y = il.qp(Q, p, lb=lower, ub=upper)
    free = ((y > lower) & (y < upper)).sum(-1)
    assert free.unique().numel() > 1 and bool((free > 0).any()) and bool((free < 5).any())
    # both to 1e-12 and 1e-10 of the residual, at conditions of 1e2
    assert relative_error(x, y) < 1e-9
    for mine, theirs in zip(gradients, torch.autograd.grad((y * v).sum(), (p, lower, upper)), strict=True):
        assert relative_error(mine, theirs) < 1e-7
    # x is linear between kinks: differences err by the solver's 1e-10 over the step
    h, direction = 1e-4, randn(4, 5, seed=8)
    ends = [layer(torch.zeros(4, 5, dtype=F64), Q, (p + s * h * direction).detach(), lower, upper) for s in (1, -1)]
    difference = ((ends[0] - ends[1]).detach() * v).sum() / (2 * h)
    assert abs(float(difference - (gradients[0] * direction).sum())) < 1e-5 * float(gradients[0].norm())


def test_lanes_are_solved_as_if_they_were_alone() -> None:
    Q, p, lower, upper = (t.detach() for t in program(6))
    box = LBFGS(rtol=1e-11, bounds=il.sets.Box(lower, upper))
    together = box(lambda x: value_of(x, Q, p), torch.zeros(6, 5, dtype=F64))
    apart = [box(lambda x, i=i: value_of(x, Q[i], p[i]), torch.zeros(5, dtype=F64)) for i in range(6)]
    assert relative_error(together, torch.stack(apart)) < 1e-8  # 1e-11 times the condition, in each of both
    layer = il.argmin(value_of, LBFGS(rtol=1e-11), constraint=il.sets.Box(-0.2, 0.3))
    mapped = torch.vmap(lambda Q, p: layer(torch.zeros(5, dtype=F64), Q, p))(Q, p)
    assert relative_error(mapped, torch.stack(apart)) < 1e-8


def test_pytrees_float32_and_a_box_for_one_part() -> None:
    init = {"a": torch.zeros(2, 2), "b": torch.zeros(3)}
    bounds = {"a": il.sets.NonNegative(), "b": None}
    target = {"a": torch.tensor([[1.0, -1.0], [2.0, -0.5]]), "b": torch.tensor([-1.0, 0.5, 3.0])}
    distance = lambda x: sum(((x[k] - target[k]) ** 2).sum() for k in x)  # noqa: E731
    x = LBFGS(rtol=1e-6, bounds=bounds)(distance, init)
    assert torch.allclose(x["a"], target["a"].clamp(min=0)) and torch.allclose(x["b"], target["b"])


def test_a_start_that_is_the_solution_and_one_that_is_not_finite() -> None:
    box = LBFGS(atol=1e-9, bounds=il.sets.Box(1.0, 2.0))
    found = box.run(lambda x: (x**2).sum(), torch.zeros(3, dtype=F64))
    assert found.status is Status.CONVERGED and found.num_steps == 0 and bool((found.value == 1).all())
    spoiled = box.run(lambda x: (x.log() * torch.tensor([1.0, torch.nan], dtype=F64)).sum(), torch.ones(2, dtype=F64))
    assert spoiled.status is Status.NONFINITE


def test_the_inverse_in_the_free_entries_is_that_of_the_dense_matrix() -> None:
    """B <- B - B s s'B / s'B s + y y'/y's from the scaled identity; one lane has two pairs less than the other."""
    n, pairs = 6, 4
    A, S = spd_matrix(n, 1, seed=1), randn(2, pairs, n, seed=2)
    Y = S @ A
    root = (S * Y).sum(-1, keepdim=True).sqrt()
    S, Y = S / root, Y / root
    S[1, :2], Y[1, :2] = 0, 0
    t = (Y[:, -1] ** 2).sum(-1)
    free, r = randn(2, n, seed=3) > -0.5, randn(2, n, seed=4)
    model = _Model(S, Y, t)
    products, inverses = model.times(r), model.free_inverse(free, r)
    for lane in range(2):
        B = t[lane] * torch.eye(n, dtype=F64)
        for s, y in zip(S[lane], Y[lane], strict=True):
            if bool(s.any()):
                B = B - torch.outer(B @ s, B @ s) / (s @ B @ s) + torch.outer(y, y) / (y @ s)
        part = free[lane]
        assert relative_error(products[lane], B @ r[lane]) < 1e-12
        assert relative_error(inverses[lane][part], torch.linalg.solve(B[part][:, part], r[lane][part])) < 1e-12
        assert not bool(inverses[lane][~part].any())


def test_what_is_no_box_is_refused_with_the_remedy() -> None:
    distance = lambda x, *_: (x**2).sum()  # noqa: E731
    init = torch.zeros(3, dtype=F64)
    with pytest.raises(TypeError, match=r"LBFGS stays inside il.sets.Box and il.sets.NonNegative only, got Simplex"):
        LBFGS(bounds=il.sets.Simplex())
    with pytest.raises(TypeError, match=r"got Simplex. Use il.solvers.ProximalGradient\(\)"):
        il.argmin(distance, LBFGS(), constraint=il.sets.Simplex())(init)
    with pytest.raises(ValueError, match=r"bounds= of LBFGS beside constraint= of the layer: which one\?"):
        il.argmin(distance, LBFGS(bounds=il.sets.Box(0, 1)), constraint=il.sets.Box(0, 2))(init)


def test_bounds_that_the_layer_does_not_know_are_told() -> None:
    t = torch.ones(3, dtype=F64, requires_grad=True)
    layer = il.argmin(lambda x, t: ((x - t) ** 2).sum(), LBFGS(rtol=1e-9, bounds=il.sets.Box(0, 0.5)))
    with pytest.warns(il.StationarityWarning, match="not stationary"):
        layer(torch.zeros(3, dtype=F64), t)


def test_every_step_is_reported_with_the_gradient_that_counts() -> None:
    seen: list[il.solvers.Iteration] = []
    solver = LBFGS(rtol=1e-9, bounds=il.sets.Box(-1.0, 1.0), callback=seen.append)
    found = solver.run(lambda x: ((x - torch.tensor([3.0, 0.5])) ** 2).sum(), torch.zeros(2, dtype=F64))
    values = [float(one.value) for one in seen]
    assert values == sorted(values, reverse=True) and float(seen[-1].gradient_norm) <= 1e-9 * np.hypot(6, 1)
    assert seen[-1].step == found.num_steps and float(found.value[0]) == 1.0
