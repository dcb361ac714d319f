"""Sets and regularisers at NaN, Inf and extreme magnitudes: nothing disappears, nothing over- or underflows."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from references import F64, randn
from torch import Tensor

import implicitlayer as il
from implicitlayer.sets import Affine, Ball, Box, NonNegative, Simplex
from implicitlayer.sets._set import norm_of
from implicitlayer.sets._term import PerPart, ProximalTerm, resolve

NAN, INF = math.nan, math.inf
TERMS: dict[str, ProximalTerm] = {
    "box": Box(-0.3, 0.7),
    "one-sided box": Box(upper=0.2),
    "non-negative": NonNegative(),
    "simplex": Simplex(1.5),
    "ball": Ball(0.7, 0.1),
    "affine": Affine(randn(2, 3, seed=1), randn(2, seed=2)),
    "l1": il.L1(0.6),
    "l1 of zero": il.L1(0.0),
    "l1 that excludes": il.L1(INF),
    "elastic net": il.ElasticNet(0.4, 0.3),
    "one group": il.GroupL1(0.8),
    "groups": il.GroupL1(0.8, dim=-1),
}
EACH = pytest.mark.parametrize("name", list(TERMS))
# what clamps an infinite entry to a bound is right to do so
CLAMPS = ("box", "one-sided box", "non-negative")
# one number of data each, and a set or regulariser made of it
MADE_OF: dict[str, Callable[[Tensor], ProximalTerm]] = {
    "lower": lambda d: Box(d, 9.0),
    "upper": lambda d: Box(-9.0, d),
    "total": lambda d: Simplex(d),
    "radius": lambda d: Ball(d),
    "center": lambda d: Ball(1.0, d),
    "matrix": lambda d: Affine(d * torch.ones(1, 3, dtype=F64), torch.ones(1, dtype=F64)),
    "rhs": lambda d: Affine(torch.ones(1, 3, dtype=F64), d.reshape(1)),
    "l1": il.L1,
    "l1 of the net": lambda d: il.ElasticNet(d, 0.5),
    "l2 of the net": lambda d: il.ElasticNet(0.5, d),
    "group": il.GroupL1,
}


@EACH
@pytest.mark.parametrize("where", [0, 1, 2])
def test_nan_in_a_point_stays(name: str, where: int) -> None:
    y = torch.tensor([1.0, -3.0, 0.1], dtype=F64)
    y[where] = NAN
    assert TERMS[name].prox(y, 0.5)[where].isnan()
    lanes = torch.stack([y, torch.ones(3, dtype=F64)])
    together = torch.vmap(lambda lane: TERMS[name].prox(lane, 0.5))(lanes)
    assert together[0, where].isnan()
    assert together[1].isfinite().all()  # the other lane knows nothing of it
    assert TERMS[name].prox(lanes, torch.tensor([0.5, 0.5], dtype=F64), 1)[0, where].isnan()


@EACH
@pytest.mark.parametrize("value", [INF, -INF])
def test_an_infinite_entry_is_clamped_to_a_bound_or_stays(name: str, value: float) -> None:
    p = TERMS[name].prox(torch.tensor([1.0, value, 0.1], dtype=F64), 0.5)
    if name in CLAMPS:
        bound = TERMS[name].prox(torch.tensor([1.0, math.copysign(1e300, value), 0.1], dtype=F64))[1]
        assert torch.equal(p[1], bound if bound.abs() < 1e299 else torch.tensor(value, dtype=F64))
    elif name == "simplex" and value < 0:  # an entry at minus infinity is never in the support
        torch.testing.assert_close(p, torch.tensor([1.2, 0.0, 0.3], dtype=F64), rtol=0, atol=1e-15)
    else:
        assert not p.isfinite().all()


@pytest.mark.parametrize("name", list(MADE_OF))
def test_nan_in_the_data_is_refused_and_stays_where_a_transform_hides_it(name: str) -> None:
    nan = torch.tensor(NAN, dtype=F64)
    with pytest.raises(ValueError, match=r"=nan"):
        MADE_OF[name](nan)
    y = torch.tensor([1.0, -3.0, 0.1], dtype=F64)
    data = torch.stack([nan, torch.ones((), dtype=F64)])
    together = torch.func.vmap(lambda d: MADE_OF[name](d).prox(y, 0.5))(data)
    assert together[0].isnan().all()
    assert torch.equal(together[1], MADE_OF[name](data[1]).prox(y, 0.5))


@pytest.mark.parametrize("name", list(MADE_OF))
def test_a_layer_with_nan_in_one_lane_of_the_data_names_it(name: str) -> None:
    layer = il.argmin(
        lambda x, d: 0.5 * ((x - torch.tensor([1.0, -3.0, 0.1], dtype=F64)) ** 2).sum(),
        il.solvers.ProximalGradient(rtol=1e-10),
        regularizer=lambda d: MADE_OF[name](d),
    )
    data = torch.tensor([1.0, NAN], dtype=F64)
    with pytest.raises(il.NonFiniteError, match=r"in lane 1 of \(2,\)"):
        torch.func.vmap(lambda d: layer(torch.zeros(3, dtype=F64), d))(data)


def layer_over(name: str, **settings: Any) -> Callable[..., Tensor]:
    solver = il.solvers.ProximalGradient(rtol=1e-10, max_steps=50)
    return il.argmin(lambda x, t: 0.5 * ((x - t) ** 2).sum(), solver, regularizer=TERMS[name], **settings)


@EACH
@pytest.mark.parametrize("on_failure", ["warn", "ignore"])
def test_nan_in_theta_is_an_error_that_names_the_lane(name: str, on_failure: str) -> None:
    t = torch.tensor([[1.0, 2.0, 3.0], [1.0, NAN, 3.0]], dtype=F64)
    layer = layer_over(name, on_failure=on_failure)
    with pytest.raises(il.NonFiniteError, match=r"NaN or Inf in x in lane 1 of \(2,\)"):
        torch.func.vmap(lambda t: layer(torch.zeros(3, dtype=F64), t))(t)
    with pytest.raises(il.NonFiniteError, match="NaN or Inf in x"):
        layer(torch.zeros(3, dtype=F64), t[1].clone().requires_grad_())


# ------------------------------------------------------------------------------------------------------------ magnitude


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e20), (torch.float32, 3e38), (F64, 1e200), (F64, 1e-200)])
def test_a_ball_far_away_or_tiny_has_its_closed_form(dtype: torch.dtype, size: float) -> None:
    # squares of these overflow or vanish; for 3e38 the norm itself does
    radius = 1.0 if size > 1 else 1e-3 * size
    p = Ball(radius).prox(torch.tensor([size, size], dtype=dtype))
    expected = torch.full((2,), radius * math.sqrt(0.5), dtype=dtype)
    torch.testing.assert_close(p, expected, rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("size", [1e200, 1e-200])
def test_groups_far_away_or_tiny_are_shortened_by_the_strength(size: float) -> None:
    y = torch.tensor([3.0, 4.0], dtype=F64) * size
    torch.testing.assert_close(il.GroupL1(2.5 * size).prox(y), y / 2, rtol=1e-15, atol=0)


def test_the_norm_has_the_derivatives_of_the_norm_at_any_scale_and_zero_at_zero() -> None:
    for size in (1e-200, 1.0, 1e200):
        v = (size * randn(4, seed=3)).requires_grad_()
        (slope,) = torch.autograd.grad(norm_of(v), v)
        unit = v.detach() / size
        torch.testing.assert_close(slope, unit / unit.norm(), rtol=1e-14, atol=0)
    assert torch.autograd.gradgradcheck(norm_of, randn(4, seed=3).requires_grad_())
    zero = torch.zeros(3, dtype=F64, requires_grad=True)
    assert torch.autograd.grad(norm_of(zero), zero)[0].tolist() == [0.0] * 3
    assert norm_of(torch.zeros(2, 0, dtype=F64)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("y", "expected"),
    [
        (torch.tensor([1e8, 1e8 - 8]), [1.0, 0.0]),
        (torch.tensor([1e16, 1e16 - 2], dtype=F64), [1.0, 0.0]),
        (torch.tensor([0.25, -0.25], dtype=F64) + 2.0**40, [0.75, 0.25]),
    ],
)
def test_an_offset_common_to_all_entries_does_not_change_the_projection_on_a_simplex(
    y: Tensor, expected: list[float]
) -> None:
    assert Simplex().prox(y).tolist() == expected  # the differences of these numbers are exact


def test_the_sum_over_a_long_simplex_is_its_total_whatever_the_offset() -> None:
    y = torch.full((1000,), 1e6) + torch.arange(1000) / 1e3
    # entries near 1 in float32, each to eps / 2, and a tau that all share
    assert float(Simplex().prox(y).double().sum()) == pytest.approx(1.0, abs=1e-4)


def test_the_magnitude_of_a_simplex_leaves_out_what_is_common() -> None:
    y = torch.tensor([1.0, 0.5, -1.0], dtype=F64)  # y - tau = (0.75, 0.25, -1.25)
    assert float(Simplex().magnitude(y + 2.0**30)) == 1.25
    assert float(NonNegative().magnitude(-5 * y)) == 5.0
    parts = resolve({"a": Simplex(), "b": None}, ())
    assert isinstance(parts, PerPart)
    assert float(parts.magnitude({"a": y + 2.0**30, "b": 3 * y})) == 3.0


@pytest.mark.parametrize(("dtype", "offset"), [(torch.float32, 1e2), (torch.float32, 1e5), (F64, 1e12)])
def test_a_common_offset_of_the_costs_makes_no_kink_and_no_error(dtype: torch.dtype, offset: float) -> None:
    # x = (0.3, 0.6, 0.1) without the offset: a tenth from the nearest kink. The solver stops at 2 eps times the
    # gradient, of norm sqrt(3) offset, and costs and sums are rounded to eps * offset.
    c = (torch.tensor([0.3, 0.0, 0.5], dtype=dtype) + offset).requires_grad_()
    solver = il.solvers.ProjectedGradient(rtol=2 * torch.finfo(dtype).eps)
    layer = il.argmin(lambda x, c: 0.5 * x @ x + c @ x, solver, constraint=Simplex())
    x = layer(torch.full((3,), 1 / 3, dtype=dtype), c)  # a KinkWarning would be an error here
    torch.testing.assert_close(
        x.detach(), torch.tensor([0.3, 0.6, 0.1], dtype=dtype), rtol=0, atol=6 * offset * torch.finfo(dtype).eps
    )
    (slope,) = torch.autograd.grad(x[0], c)
    # d x_0 = -(I - 1 1' / 3); GMRES stops at 1e-5 in float32
    torch.testing.assert_close(slope, torch.tensor([-2.0, 1.0, 1.0], dtype=dtype) / 3, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ball(1.0, INF), r"center=inf must be finite"),
        (lambda: Affine(torch.tensor([[1.0, INF]]), torch.ones(1)), r"A=inf \(an entry of it\) must be finite"),
        (lambda: Affine(torch.ones(1, 2), torch.tensor([NAN])), r"b=nan \(an entry of it\) must be finite"),
    ],
)
def test_data_that_are_not_finite_are_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
