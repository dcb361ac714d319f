"""Newton's and Broyden's methods: roots with closed forms, their rates, lanes, trouble, and layers on top."""

import itertools
from typing import Any

import pytest
import torch
from references import F64, randn
from torch import Tensor

import implicitlayer as il
from implicitlayer import Status
from implicitlayer.solvers import Broyden, Newton

SOLVERS: dict[str, Any] = {
    "dense Newton": Newton,
    "Krylov Newton": lambda **s: Newton(linear_solver=il.Gmres(), **s),
    "Broyden": Broyden,
}
EACH = pytest.mark.parametrize("name", list(SOLVERS))


def coupled(x: Tensor, a: Tensor) -> Tensor:
    """Roots at x = (1, 1) for a = (2, 1)."""
    return torch.stack([x[..., 0] ** 2 + x[..., 1] - a[..., 0], x[..., 1] ** 3 - x[..., 0] * a[..., 1]], -1)


@EACH
def test_a_system_with_a_known_root(name: str) -> None:
    result = SOLVERS[name]().run(coupled, torch.full((2,), 2.0, dtype=F64), torch.tensor([2.0, 1.0], dtype=F64))
    assert result.status is Status.CONVERGED
    torch.testing.assert_close(result.value, torch.ones(2, dtype=F64), rtol=0, atol=1e-11)


def test_newton_is_quadratic_and_broyden_superlinear_with_one_jacobian() -> None:
    seen: list[float] = []
    Newton(callback=lambda i: seen.append(float(i.value)))(
        coupled, torch.full((2,), 1.5).double(), torch.tensor([2.0, 1.0]).double()
    )
    late = [n for n in seen if 1e-13 < n < 1e-2]
    assert len(late) >= 2
    assert all(b <= 10 * a**2 for a, b in itertools.pairwise(late))
    assert seen[0] > 1.0

    calls = 0

    def counted(x: Tensor, a: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return coupled(x, a)

    result = Broyden().run(counted, torch.full((2,), 1.5, dtype=F64), torch.tensor([2.0, 1.0], dtype=F64))
    assert result.num_steps is not None
    # one evaluation per step and the first one, two Jacobian products of up to two evaluations each, a few halvings
    assert calls <= result.num_steps + 1 + 6 + 3


@EACH
def test_the_scale_of_the_residual_does_not_matter(name: str) -> None:
    for scale in (1e-12, 1e12):
        x = SOLVERS[name]()(lambda x, s=scale: s * (x**3 - 8), torch.full((2,), 3.0, dtype=F64))
        torch.testing.assert_close(x, torch.full((2,), 2.0, dtype=F64), rtol=0, atol=1e-10)


def test_the_line_search_saves_newton_from_divergence() -> None:
    # from 2 the full steps of arctan grow without bound
    result = Newton().run(torch.atan, torch.full((1,), 2.0, dtype=F64))
    assert result.status is Status.CONVERGED
    assert result.value.item() == pytest.approx(0.0, abs=1e-12)


@EACH
def test_a_pytree_of_unknowns(name: str) -> None:
    def residual(x: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"a": x["a"] ** 2 - x["b"], "b": x["b"] + x["a"].sum() - 3}

    x = SOLVERS[name]()(residual, {"a": torch.full((2,), 1.2, dtype=F64), "b": torch.ones((), dtype=F64)})
    # a^2 = b for both entries and b + 2a = 3: a = b = 1
    torch.testing.assert_close(x["a"], torch.ones(2, dtype=F64), rtol=0, atol=1e-11)
    assert float(x["b"]) == pytest.approx(1.0, abs=1e-11)


@EACH
def test_lanes_do_not_see_each_other(name: str) -> None:
    a = torch.tensor([[2.0, 1.0], [3.0, 0.5], [float("nan"), 1.0], [2.0, 4.0]], dtype=F64)
    start = torch.full((4, 2), 1.5, dtype=F64)
    together = SOLVERS[name](batch_dims=1)(coupled, start, a)
    for lane in (0, 1, 3):
        alone = SOLVERS[name]()(coupled, start[lane], a[lane])
        torch.testing.assert_close(together[lane], alone, rtol=0, atol=1e-10)
        assert float(coupled(together[lane], a[lane]).norm()) <= 1e-11


@EACH
def test_a_root_layer_gets_its_gradient_under_vmap(name: str) -> None:
    layer = il.root(coupled, SOLVERS[name](rtol=1e-13))
    a = torch.tensor([[2.0, 1.0], [2.2, 1.1]], dtype=F64)
    jacobians = torch.func.vmap(torch.func.jacrev(lambda a: layer(torch.ones(2, dtype=F64) * 1.2, a)))(a)
    # (dF/dx) dx = -(dF/da) da with dF/dx = [[2, 1], [-1, 3]], dF/da = -identity at the first point
    expected = torch.linalg.inv(torch.tensor([[2.0, 1.0], [-1.0, 3.0]], dtype=F64))
    torch.testing.assert_close(jacobians[0], expected, rtol=0, atol=1e-8)


@EACH
def test_an_equation_without_a_root_is_told(name: str) -> None:
    result = SOLVERS[name]().run(lambda x: x**2 + 1, torch.full((1,), 0.7, dtype=F64))
    assert result.status in (Status.STAGNATED, Status.MAX_STEPS_REACHED)
    assert abs(result.value.item()) < 0.7  # it went downhill


@EACH
def test_nan_and_too_few_steps_are_told(name: str) -> None:
    result = SOLVERS[name]().run(lambda x: x * float("nan"), torch.ones(1, dtype=F64))
    assert result.status is Status.NONFINITE
    result = SOLVERS[name](max_steps=1).run(lambda x: x**3 - 8, torch.full((1,), 9.0, dtype=F64))
    assert (result.status, result.num_steps) == (Status.MAX_STEPS_REACHED, 1)


def test_broyden_renews_a_jacobian_that_leads_nowhere() -> None:
    # a sharp bend: the secants from the flat side are useless on the steep one
    def bent(x: Tensor) -> Tensor:
        return torch.where(x > 1, 0.01 * (x - 1) + 1, 100 * (x - 1) + 1)

    result = Broyden().run(bent, torch.full((1,), 50.0, dtype=F64))
    assert result.status is Status.CONVERGED
    assert result.value.item() == pytest.approx(0.99, abs=1e-12)


def test_many_unknowns_by_a_krylov_solver() -> None:
    b = randn(200, seed=1)
    x = Newton(linear_solver=il.Gmres(rtol=1e-6), rtol=1e-11)(lambda x: x + 0.1 * x**3 + 0.1 * x.roll(1) - b, 0 * b)
    assert float((x + 0.1 * x**3 + 0.1 * x.roll(1) - b).norm()) <= 1e-11 * float(b.norm())


@pytest.mark.parametrize("solver", [Newton, Broyden])
@pytest.mark.parametrize("name", ["rtol", "atol", "max_steps", "batch_dims"])
def test_wrong_settings_are_named(solver: Any, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=-1 must be non-negative"):
        solver(**{name: -1})


def test_a_linear_solver_that_is_none_is_refused() -> None:
    with pytest.raises(TypeError, match="linear_solver must be callable, got int"):
        Newton(linear_solver=3)  # type: ignore[arg-type]
