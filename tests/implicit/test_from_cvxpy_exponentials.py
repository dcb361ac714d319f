"""``il.from_cvxpy`` of programs with exponentials, logarithms and entropies; the nearest point of their cone."""

import itertools
import math
from typing import Any

import pytest
import torch
from references import F64, central_differences, randn, relative_error
from torch import Tensor

import implicitlayer as il
from implicitlayer.constrained._exponential_cone import distance_to_kinks, nearest

EXACT = 1e-11  # as of other cones: Newton's steps end at the rounding of small matrices


def on_rays(k: Tensor) -> Tensor:
    """Directions [*k, 3] of the curved border of the cone, at ratios k, and those of its edge."""
    rays = torch.stack([k * (-k.abs()).exp(), (-k.abs()).exp(), (k - k.abs()).exp()], -1)
    edge = torch.tensor([[-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]], dtype=F64)
    return torch.nn.functional.normalize(torch.cat([rays, edge]), dim=-1)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (100, 1, 1), (1, 100, 1), (1, 1, 1e6), (1e-8, 1, 1), (1, 1e-8, 1)])
def test_the_nearest_point_satisfies_what_proves_it(sizes: tuple[float, ...]) -> None:
    """s in K, s - w in the dual cone and orthogonal to s: then no point is nearer (Moreau)."""
    w = randn(4000, 3, seed=1) * torch.tensor(sizes, dtype=F64)
    s, length = nearest(w, 0), w.norm(dim=-1)
    x, y, z = s.unbind(-1)
    curved = y > 1e-200
    # y exp(x / y) <= z by logarithms, which keep the digits where z / y is large
    above = x - y * (z.clamp(min=1e-300) / y.clamp(min=1e-300)).log()
    outside = torch.where(curved, above, torch.maximum(x, -z))
    assert (outside <= 1e-14 * length).all() and (y >= 0).all()
    products = (s - w) @ on_rays(torch.linspace(-40, 40, 4001, dtype=F64)).T
    assert (products.amin(-1) >= -1e-14 * length).all()  # the dual cone: no angle with a ray of K is obtuse
    assert ((s * (s - w)).sum(-1).abs() <= 1e-14 * length**2).all()


def test_derivatives_of_the_nearest_point_are_right_to_third_order() -> None:
    """Against finite differences of the derivative of one order less, on all sides of the cone."""
    w = 2 * randn(300, 3, seed=2)
    w = w[distance_to_kinks(w, nearest(w, 0)) > 0.1]
    one = lambda w: nearest(w, 3)  # noqa: E731
    orders = [one, torch.func.jacrev(one)]
    orders += [torch.func.jacfwd(orders[1]), torch.func.jacrev(torch.func.jacfwd(orders[1]))]
    step = 1e-4
    for lower, upper in itertools.pairwise(orders):
        lower, upper = torch.func.vmap(lower), torch.func.vmap(upper)
        ends = [(lower(w + step * e) - lower(w - step * e)) / (2 * step) for e in torch.eye(3, dtype=F64)]
        found, expected = upper(w), torch.stack(ends, -1)
        # differences are off by step^2 of two orders more (up to 1e3 here), and rounding over the step
        assert ((found - expected).abs() <= 1e-5 * (1 + found.abs())).all()
    assert torch.func.vmap(orders[1])(w).isfinite().all()


def test_a_kink_is_where_two_sides_of_the_cone_meet() -> None:
    on_border = torch.tensor([1.0, 1.0, math.e], dtype=F64)
    normal = torch.tensor([math.e, 0.0, -1.0], dtype=F64)
    points = torch.stack([on_border, on_border - 0.1 * normal, on_border + 0.1 * normal, normal, 1.1 * normal])
    points = torch.cat([points, torch.tensor([[-1.0, 0.0, 2.0], [-1.0, -1.0, 2.0], [0.0, 0.0, -1.0]], dtype=F64)])
    points[4, 2] -= 0.5  # inside of the polar cone
    found = distance_to_kinks(points, nearest(points, 0))
    assert (found[[0, 3, 5, 7]] < 1e-12).all()
    assert (found[[1, 2, 4, 6]] > 0.05).all()
    assert found[1] == pytest.approx(0.1 * normal.norm().item(), rel=0.2)


cp: Any = pytest.importorskip("cvxpy", reason="cvxpy is not installed")
if not {"OSQP", "CLARABEL"} <= set(cp.installed_solvers()):
    pytest.skip("osqp or clarabel is not installed", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:cvxpy", "ignore::DeprecationWarning:cvxpy")


def softmax(n: int = 4) -> Any:
    """The weights of largest entropy and return: exp(p) / sum exp(p)."""
    x, p = cp.Variable(n), cp.Parameter(n)
    layer = il.from_cvxpy(cp.Problem(cp.Maximize(p @ x + cp.sum(cp.entr(x))), [cp.sum(x) == 1]), [p], [x])
    return lambda p: layer(p)[0]


def test_the_largest_entropy_is_a_softmax_with_its_derivatives() -> None:
    found, closed, p = softmax(), lambda p: p.softmax(-1), randn(4, seed=3)
    assert relative_error(found(p), closed(p)) < EXACT
    for mode in (torch.func.jacrev, torch.func.jacfwd):
        assert relative_error(mode(found)(p), mode(closed)(p)) < EXACT
    weights = randn(4, seed=4)
    second = [torch.func.hessian(lambda p, f=f: weights @ f(p))(p) for f in (found, closed)]
    assert relative_error(*second) < EXACT
    many = 5 * randn(6, 4, seed=5)
    assert relative_error(found(many), closed(many)) < EXACT
    assert relative_error(torch.func.vmap(found)(many), closed(many)) < EXACT
    single = found(p.float())
    assert single.dtype == torch.float32 and relative_error(single, closed(p).float()) < 1e-6


def test_a_logistic_regression_is_that_of_newton() -> None:
    w, X, strength = cp.Variable(3), cp.Parameter((12, 3)), cp.Parameter(nonneg=True)
    cost = cp.sum(cp.logistic(X @ w)) + strength * cp.sum_squares(w) + cp.norm(w)  # with a second-order cone beside
    layer = il.from_cvxpy(cp.Problem(cp.Minimize(cost)), [X, strength], [w])

    def loss(w: Tensor, X: Tensor, strength: Tensor) -> Tensor:
        return torch.nn.functional.softplus(X @ w).sum() + strength * (w**2).sum() + w.norm()

    X_, strength_ = randn(12, 3, seed=6) + 0.5, torch.tensor(0.7, dtype=F64)
    newton = il.argmin(loss, il.solvers.NewtonCG(rtol=1e-13))
    answers, gradients = [], []
    for solve in (lambda *data: layer(*data)[0], lambda *data: newton(-torch.ones(3, dtype=F64), *data)):
        data = [t.clone().requires_grad_() for t in (X_, strength_)]
        answers.append(solve(*data))
        gradients.append(torch.autograd.grad((answers[-1] ** 2).sum(), data))
    assert relative_error(*(a.detach() for a in answers)) < 1e-10
    assert all(relative_error(a, b) < 1e-9 for a, b in zip(*gradients, strict=True))


def test_logarithms_and_relative_entropies_have_their_closed_forms() -> None:
    x, t = cp.Variable(3), cp.Parameter(3, pos=True)
    logs = il.from_cvxpy(cp.Problem(cp.Maximize(cp.sum(cp.log(x)) - t @ x)), [t], [x])
    value = torch.tensor([0.5, 2.0, 30.0], dtype=F64, requires_grad=True)
    (found,) = logs(value)
    assert relative_error(found.detach(), 1 / value.detach()) < EXACT
    (gradient,) = torch.autograd.grad(found.sum(), value)
    assert relative_error(gradient, -1 / value.detach() ** 2) < EXACT
    # the nearest distribution in relative entropy with a given mean: an exponential tilt
    p, q, c, m = cp.Variable(4), cp.Parameter(4, pos=True), torch.arange(4, dtype=F64), cp.Parameter()
    tilt = il.from_cvxpy(
        cp.Problem(cp.Minimize(cp.sum(cp.rel_entr(p, q))), [cp.sum(p) == 1, c.numpy() @ p == m]), [q, m], [p]
    )
    prior, mean = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=F64), torch.tensor(1.7, dtype=F64)
    (p_,) = tilt(prior, mean)
    slope = (p_ / prior).log().diff()
    assert (slope - slope.mean()).abs().max() < EXACT
    assert abs(p_.sum() - 1) < EXACT and abs(p_ @ c - mean) < EXACT
    (by_mean,) = torch.autograd.grad(tilt(prior, mean.requires_grad_())[0].square().sum(), mean)
    expected = central_differences(lambda m: tilt(prior, m)[0].square().sum(), mean.detach(), 1e-5)
    assert relative_error(by_mean, expected) < 1e-8


def test_trouble_is_told_lane_by_lane() -> None:
    x, b = cp.Variable(), cp.Parameter()
    problem = cp.Problem(cp.Minimize(cp.square(x - 3)), [cp.exp(x) <= b])
    values = torch.tensor([2.0, -1.0], dtype=F64, requires_grad=True)
    with pytest.raises(il.InfeasibleError, match=r"in lane 1 of \(2,\)"):
        il.from_cvxpy(problem, [b], [x])(values)
    (found,) = il.from_cvxpy(problem, [b], [x], on_failure="mask")(values)
    assert relative_error(found[0], values[0].log()) < EXACT and found[1].isnan()
    (gradient,) = torch.autograd.grad(found[0], values)
    assert relative_error(gradient, torch.tensor([0.5, 0.0], dtype=F64)) < EXACT
    with pytest.raises(il.UnboundedError):
        il.from_cvxpy(cp.Problem(cp.Maximize(cp.log(x) + x + b)), [b], [x])(torch.tensor(0.0, dtype=F64))
    with pytest.warns(il.KinkWarning, match="sits at a kink"):  # exp(3) <= exp(3) holds, and nothing pulls
        il.from_cvxpy(problem, [b], [x])(torch.tensor(math.exp(3.0), dtype=F64, requires_grad=True))
