"""``il.qp``: closed forms, finite differences, transforms, shared arguments, black boxes, kinks and errors."""

import itertools
import warnings
from typing import Any

import pytest
import torch
from references import F64, central_differences, randn, relative_error
from torch.func import grad, hessian, jacfwd, jacrev, vmap

import implicitlayer as il
from implicitlayer._errors import InfeasibleError, KinkError, KinkWarning
from implicitlayer.solvers import OSQP, Clarabel, InteriorPoint

# The last step solves the equations of the active set: rounding times condition numbers of at most about 1e3.
TIGHT = 1e-10
N = 4
EYE = torch.eye(N, dtype=F64)


def program(seed: int = 0, lanes: tuple[int, ...] = (), e: int = 1, m: int = 6) -> list[torch.Tensor]:
    """Strongly convex, feasible, and (checked by the tests that need it) without a kink."""
    root, inside = randn(*lanes, N, N, seed=seed), randn(*lanes, N, 1, seed=seed + 1)
    A, G = randn(*lanes, e, N, seed=seed + 2), randn(*lanes, m, N, seed=seed + 3)
    h = (G @ inside)[..., 0] + 0.3 * randn(*lanes, m, seed=seed + 4).abs()
    return [root @ root.mT + EYE, 3 * randn(*lanes, N, seed=seed + 5), A, (A @ inside)[..., 0], G, h]


def kkt_gradients(data: list[torch.Tensor], x: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
    """Gradients of <v, x> by one dense solve by hand; Amos & Kolter 2017, equations 6 to 8, on the active rows."""
    Q, p, A, b, G, h = data
    active = (G @ x - h).abs() < 1e-8
    rows = torch.cat([A, G[active]])
    k = len(rows)
    matrix = torch.cat([torch.cat([Q, rows.T], 1), torch.cat([rows, torch.zeros(k, k, dtype=F64)], 1)])
    force = torch.linalg.solve(matrix, torch.cat([-p, b, h[active]]))[N:]
    u = torch.linalg.solve(matrix, torch.cat([v, torch.zeros(k, dtype=F64)]))
    d, w, z = u[:N], torch.zeros(len(b) + len(h), dtype=F64), torch.zeros(len(b) + len(h), dtype=F64)
    where = torch.cat([torch.ones(len(b), dtype=torch.bool), active])
    w[where], z[where] = u[N:], force
    dA = -(torch.outer(z, d) + torch.outer(w, x))
    e = len(b)
    return [-(torch.outer(d, x) + torch.outer(x, d)) / 2, -d, dA[:e], w[:e], dA[e:], w[e:]]


@pytest.mark.parametrize("seed", [0, 10, 20, 30])
def test_gradients_in_all_six_are_those_of_a_dense_solve_by_hand(seed: int) -> None:
    data = [t.requires_grad_() for t in program(seed)]
    x, v = il.qp(*data), randn(N, seed=seed + 7)
    got = torch.autograd.grad(x, data, v)
    expected = kkt_gradients([t.detach() for t in data], x.detach(), v)
    for one, other in zip(got, expected, strict=True):
        assert float((one - other).norm()) < TIGHT * (1 + float(other.norm()))


@pytest.mark.parametrize("which", range(6))
def test_gradients_are_the_differences_of_the_solver(which: int) -> None:
    data, v = program(10), randn(N, seed=1)

    def value(changed: torch.Tensor) -> torch.Tensor:
        args = [*data[:which], changed, *data[which + 1 :]]
        return (il.qp(*args) * v).sum()

    got = grad(value)(data[which])
    with torch.no_grad():
        # steps of 1e-5: truncation about 1e-10 times third derivatives, rounding 1e-15 / 1e-5
        expected = central_differences(value, data[which], 1e-5)
    assert float((got - expected).norm()) < 1e-7 * (1 + float(expected.norm()))


def test_projection_onto_the_simplex() -> None:
    point = torch.tensor([0.9, 0.7, -2.0, 0.1], dtype=F64)
    ones = torch.ones(1, N, dtype=F64)

    def project(t: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = il.qp(EYE, -t, ones, ones[0, :1], -EYE, torch.zeros(N, dtype=F64))
        return result

    # support {0, 1}: x = t - mean + 1/2 there; the entry 0.1 is below the threshold 0.3
    assert torch.allclose(project(point), torch.tensor([0.6, 0.4, 0.0, 0.0], dtype=F64), atol=TIGHT)
    expected = torch.zeros(N, N, dtype=F64)
    expected[:2, :2] = torch.tensor([[0.5, -0.5], [-0.5, 0.5]])
    for jacobian in (jacrev(project)(point), jacfwd(project)(point)):
        assert torch.allclose(jacobian, expected, atol=TIGHT)


def test_box_constrained_least_squares_in_the_bounds() -> None:
    # separable: x = clamp(t, low, high), so that d x / d bound = 1 where it is active
    t = torch.tensor([-3.0, -0.2, 0.3, 4.0], dtype=F64)
    low, high = -torch.ones(N, dtype=F64), 2 * torch.ones(N, dtype=F64)
    bounds = torch.cat([high, -low]).requires_grad_()
    x = il.qp(EYE, -t, G=torch.cat([EYE, -EYE]), h=bounds)
    assert torch.allclose(x, t.clamp(-1, 2), atol=TIGHT)
    (got,) = torch.autograd.grad(x.sum(), bounds)
    assert torch.allclose(got, torch.tensor([0, 0, 0, 1, -1, 0, 0, 0], dtype=F64), atol=TIGHT)


def test_equality_constrained_least_squares() -> None:
    Q, p, A, b, _, _ = program(3, e=2)
    inverse = torch.linalg.inv(Q)

    def closed(b: torch.Tensor) -> torch.Tensor:
        lam = -torch.linalg.inv(A @ inverse @ A.T) @ (b + A @ inverse @ p)
        return -inverse @ (p + A.T @ lam)

    assert relative_error(il.qp(Q, p, A, b), closed(b)) < TIGHT
    assert relative_error(jacrev(lambda b: il.qp(Q, p, A, b))(b), jacrev(closed)(b)) < TIGHT


def test_second_derivatives_are_differences_of_first_ones() -> None:
    data = program(10)

    def value(p: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = il.qp(data[0] + torch.outer(p, p), p, data[2], data[3], data[4], h)
        return (x**3).sum()

    got = hessian(value, argnums=1)(data[1], data[5])
    mixed = jacfwd(grad(value, 0), 1)(data[1], data[5])
    step = 1e-5
    for i in range(3):
        shift = torch.zeros_like(data[5])
        shift[i] = step
        for order, analytic in ((1, got[i]), (0, mixed[:, i])):
            up, down = (grad(value, order)(data[1], data[5] + s * shift) for s in (1, -1))
            assert torch.allclose(analytic, (up - down) / (2 * step), atol=1e-6)


def test_a_batch_is_a_loop_and_shared_arguments_sum_their_gradients() -> None:
    Q, p, _, _, G, h = program(40, lanes=(5,))
    shared_q, shared_g = Q[0].clone().requires_grad_(), G[0].clone().requires_grad_()
    lanes_p, lanes_h = p.requires_grad_(), h.abs().requires_grad_()
    leaves = (shared_q, lanes_p, shared_g, lanes_h)
    x = il.qp(shared_q, lanes_p, G=shared_g, h=lanes_h)
    v = randn(5, N, seed=1)
    got = torch.autograd.grad(x, leaves, v)
    loop = torch.stack([il.qp(shared_q, lanes_p[i], G=shared_g, h=lanes_h[i]) for i in range(5)])
    assert relative_error(x, loop) < TIGHT
    for one, other in zip(got, torch.autograd.grad(loop, leaves, v), strict=True):
        assert relative_error(one, other) < TIGHT


@pytest.mark.parametrize("lanes", [(2, 3), (3, 1), (2, 1, 2)])
def test_a_batch_of_several_dimensions_is_a_loop(lanes: tuple[int, ...]) -> None:
    """Every argument has all of the batch, its last dimension, or none."""
    Q, p, A, b, G, h = program(41, lanes=lanes)
    leaves = [Q[(0,) * len(lanes)], p, A[0], b, G, h.abs()[(0,) * (len(lanes) - 1)]]
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    full = [t.expand(*lanes, *t.shape[t.ndim - k :]) for t, k in zip(leaves, (2, 1, 2, 1, 2, 1), strict=True)]
    x, v = il.qp(*leaves), randn(*lanes, N, seed=1)
    loop = torch.stack([il.qp(*(t[at] for t in full)) for at in itertools.product(*map(range, lanes))]).reshape(x.shape)
    assert relative_error(x, loop) < TIGHT
    for one, other in zip(*(torch.autograd.grad(value, leaves, v) for value in (x, loop)), strict=True):
        assert relative_error(one, other) < TIGHT


def test_vmap_in_some_arguments_and_levels_equals_a_loop() -> None:
    Q, _, _, _, G, _ = program(50)
    p, h = (
        2 * randn(2, 3, N, seed=51),
        0.5 + randn(3, 6, seed=52).abs(),
    )  # p has lanes of both levels, h of the inner one
    solve = lambda p, h: grad(lambda p: (il.qp(Q, p, G=G, h=h) ** 2).sum())(p)  # noqa: E731
    got = vmap(vmap(solve), in_dims=(0, None))(p, h)
    expected = torch.stack([torch.stack([solve(p[i, j], h[j]) for j in range(3)]) for i in range(2)])
    assert relative_error(got, expected) < TIGHT


@pytest.mark.parametrize("lanes", [4, N])
@pytest.mark.parametrize(
    "derivative", [torch.func.jacrev, torch.func.jacfwd, torch.func.hessian], ids=lambda f: f.__name__
)
def test_vmap_over_derivatives_equals_a_loop(derivative: Any, lanes: int) -> None:
    Q, p, _, _, G, h = program(44, lanes=(lanes,))
    solve = lambda Q, p: il.qp(Q, p, G=G[0], h=h[0].abs()).sin()  # noqa: E731
    got = vmap(derivative(solve, 1))(Q, p)
    expected = torch.stack([derivative(solve, 1)(*lane) for lane in zip(Q, p, strict=True)])
    assert got.abs().max() > 0.01 and relative_error(got, expected) < TIGHT


def test_vmap_over_programs_that_are_a_batch_already() -> None:
    Q, p, _, _, G, h = program(60, lanes=(2,))
    points = torch.stack([p, 0.5 * p, -p])
    got = vmap(lambda p: il.qp(Q[0], p, G=G, h=h.abs()))(points)
    assert relative_error(got, torch.stack([il.qp(Q[0], p, G=G, h=h.abs()) for p in points])) < TIGHT


def test_jacobians_of_as_many_lanes_as_unknowns_equal_a_loop() -> None:
    # lanes and rows of the Jacobian have one size, so factors of one in the place of the other would fit
    Q, _, _, _, G, h = program(60)
    points = 2 * randn(N, N, seed=61)
    for transform in (jacrev, jacfwd):
        one = transform(lambda p: il.qp(Q, p, G=G, h=h.abs()))
        assert relative_error(vmap(one)(points), torch.stack([one(p) for p in points])) < TIGHT
        inside = transform(lambda p: il.qp(Q, p, G=G, h=h.abs()))(points)
        assert relative_error(torch.einsum("iaib->iab", inside), vmap(one)(points)) < TIGHT


def test_repeats_are_bitwise_equal_and_backward_can_be_run_twice() -> None:
    data = [t.requires_grad_() for t in program(10, lanes=(3,))]
    x, again = il.qp(*data), il.qp(*data)
    assert torch.equal(x, again)
    first, second = (torch.autograd.grad(x.sum(), data, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_multipliers_are_the_slope_of_the_smallest_value() -> None:
    Q, p, A, b, G, h = program(10)
    _, multipliers = il.qp(Q, p, A, b, G, h, return_multipliers=True)

    def smallest(b: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        x = il.qp(Q, p, A, b, G, h)
        return 0.5 * x @ Q @ x + p @ x

    by_b, by_h = grad(smallest, argnums=(0, 1))(b, h)
    assert torch.allclose(multipliers.equality, -by_b, atol=TIGHT)
    assert torch.allclose(multipliers.inequality, -by_h, atol=TIGHT) and bool((multipliers.inequality >= 0).all())


def test_the_record_says_what_is_active() -> None:
    t = torch.tensor([[2.0, 0.0], [0.5, -3.0]], dtype=F64, requires_grad=True)
    eye = torch.eye(2, dtype=F64)
    with il.diagnostics() as records:
        il.qp(eye, -t, G=torch.cat([eye, -eye]), h=torch.ones(4, dtype=F64)).sum().backward()
    found = records[0].active_set
    assert found.active.tolist() == [[True, False, False, False], [False, False, False, True]]
    assert found.num_active.tolist() == [1, 1] and found.num_kinks.tolist() == [0, 0]


KINK = {
    "G": torch.eye(2, dtype=F64),
    "h": torch.tensor([1.0, 5.0], dtype=F64),
}  # x = t = (1, 0): at its border, no force


def test_at_a_kink_the_derivative_is_that_of_the_chosen_side_with_a_warning() -> None:
    t = torch.tensor([1.0, 0.0], dtype=F64, requires_grad=True)
    sides: list[Any] = []
    for side in ("inactive", "active"):
        with pytest.warns(KinkWarning, match="1 inequalities are at their border with a multiplier of zero"):
            x = il.qp(torch.eye(2, dtype=F64), -t, **KINK, at_kink=side)  # type: ignore[arg-type]
        sides.append(torch.autograd.grad(x.sum(), t)[0].tolist())
    assert sides == [[1.0, 1.0], [0.0, 1.0]]


def test_kinks_follow_the_failure_policy() -> None:
    t = torch.tensor([1.0, 0.0], dtype=F64, requires_grad=True)
    with pytest.raises(KinkError, match="sits at a kink"):
        il.qp(torch.eye(2, dtype=F64), -t, **KINK, on_failure="raise")  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        il.qp(torch.eye(2, dtype=F64), -t, **KINK, on_failure="ignore")  # type: ignore[arg-type]


def test_redundant_equations_are_told_and_consistent_changes_have_their_derivative() -> None:
    A = torch.tensor([[1.0, 1.0], [2.0, 2.0]], dtype=F64)
    p = torch.tensor([0.3, -0.2], dtype=F64, requires_grad=True)
    with pytest.warns(KinkWarning, match="linearly dependent"):
        x = il.qp(torch.eye(2, dtype=F64), p, A, torch.tensor([1.0, 2.0], dtype=F64))
    (got,) = torch.autograd.grad(x[0], p)  # projection onto the line: x = -p + (1 + sum p) / 2
    assert torch.allclose(got, torch.tensor([-0.5, 0.5], dtype=F64), atol=TIGHT)


def test_a_flat_direction_with_a_cotangent_along_it_is_singular() -> None:
    Q = torch.diag(torch.tensor([1.0, 0.0], dtype=F64))
    p = torch.tensor([1.0, 0.0], dtype=F64, requires_grad=True)
    box = {"G": torch.cat([torch.eye(2, dtype=F64), -torch.eye(2, dtype=F64)]), "h": torch.full((4,), 9.0, dtype=F64)}
    x = il.qp(Q, p, **box)
    assert x[0].item() == pytest.approx(-1, abs=1e-8)
    with pytest.raises(il.SingularError):
        x[1].backward(retain_graph=True)
    with pytest.warns(il.KinkWarning, match="theta tensor 1 pushes along it"):  # p[1] would move x[1] to a border
        x[0].backward()
    assert p.grad is not None and p.grad[0].item() == pytest.approx(-1, abs=1e-8)


@pytest.mark.parametrize("solver", [InteriorPoint(), OSQP(), Clarabel()], ids=lambda s: type(s).__name__)
def test_black_boxes_give_the_same_solution_and_gradient(solver: Any) -> None:
    if not isinstance(solver, InteriorPoint):
        pytest.importorskip(type(solver).__name__.lower())
    data = [t.requires_grad_() for t in program(10, lanes=(2,))]
    v = randn(2, N, seed=3)
    own, other = il.qp(*data), il.qp(*data, solver=solver)
    assert relative_error(other, own) < TIGHT
    for one, two in zip(torch.autograd.grad(other, data, v), torch.autograd.grad(own, data, v), strict=True):
        assert relative_error(one, two) < 1e-8


def test_a_black_box_may_return_x_alone() -> None:
    data = [t.requires_grad_() for t in program(10, lanes=(2,))]
    own = il.qp(*data)
    other = il.qp(*data, solver=lambda *one: InteriorPoint()(*one).x.numpy())
    v = randn(2, N, seed=3)
    for one, two in zip(torch.autograd.grad(other, data, v), torch.autograd.grad(own, data, v), strict=True):
        assert relative_error(one, two) < 1e-8


def test_programs_without_a_solution_are_named_errors_with_their_lanes() -> None:
    eye, ones = torch.eye(2, dtype=F64), torch.ones(2, dtype=F64)
    G = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=F64)
    h = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [1.0, -3.0]], dtype=F64)
    with pytest.raises(InfeasibleError, match=r"infeasible in lane 1, 2 of \(3,\)"):
        il.qp(eye, ones, G=G, h=torch.where(h == -1.0, -2.0, h))
    with pytest.raises(il.UnboundedError, match=r"unbounded in lane 1 of \(2,\)"):
        il.qp(torch.stack([eye, 0 * eye]), ones, G=G, h=ones)
    with pytest.raises(il.NonFiniteError, match="not finite"):
        il.qp(eye, ones, G=G, h=ones * torch.nan)  # inf is no bound
    with pytest.raises(il.IndefiniteError, match="smallest eigenvalue is -1"):
        il.qp(torch.stack([eye, -eye]), ones)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"p": torch.ones(0, dtype=F64)}, ValueError, "at least one entry"),
        ({"p": [1.0]}, TypeError, "p must be a real floating tensor, got list"),
        ({"A": torch.ones(1, N, dtype=F64)}, ValueError, "A and b belong together"),
        ({"Q": torch.eye(3, dtype=F64)}, ValueError, r"Q must end in dimensions \(4, 4\)"),
        ({"Q": torch.ones(N, dtype=F64)}, ValueError, "Q needs 2 dimensions after those of the batch"),
        ({"Q": torch.eye(N)}, ValueError, "Bring all arguments to one dtype"),
        ({"p": torch.ones(2, N, dtype=F64), "Q": torch.ones(3, N, N, dtype=F64)}, ValueError, "do not fit together"),
        ({"at_kink": "left"}, ValueError, "at_kink='left' must be one of"),
        ({"on_failure": "stop"}, ValueError, "on_failure='stop' must be one of"),
        ({"active_rtol": -1.0}, ValueError, "active_rtol=-1.0 must be at least 0"),
        ({"solver": lambda *data: (data[1], 1)}, il.SolverOutputError, r"must return x or \(x, \(y, z\)\)"),
        ({"solver": lambda *data: data[0]}, il.SolverOutputError, "x with shape"),
        ({"solver": lambda *data: data[1] * torch.nan}, il.NonFiniteError, "NaN or Inf in x"),
        ({"solver": InteriorPoint(max_steps=1)}, InfeasibleError, "does not satisfy the constraints"),
        ({"solver": InteriorPoint(max_steps=3), "on_failure": "raise"}, il.StationarityError, "optimality conditions"),
    ],
)
def test_misuse_is_an_error_that_says_so(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    args: dict[str, Any] = {"Q": EYE, "p": torch.ones(N, dtype=F64, requires_grad=True), **changed}
    if isinstance(args.get("solver"), InteriorPoint):
        Q, p, _, _, G, h = program(10, m=12)
        args = {"Q": Q, "p": (10 * p).requires_grad_(), "G": G, "h": h, **changed}
    with pytest.raises(error, match=message):
        il.qp(**args)


def test_float32_programs_are_solved_in_float64() -> None:
    data = program(10)
    x = il.qp(*(t.float() for t in data))
    assert x.dtype == torch.float32
    assert (
        relative_error(x.double(), il.qp(*data)) < 1e-5
    )  # rounding of the data, 6e-8, times condition numbers of about 10


def test_nothing_survives_the_graph() -> None:
    import gc
    import weakref

    data = [t.requires_grad_() for t in program(10)]
    x = il.qp(*data)
    x.sum().backward()
    alive = weakref.ref(data[0])
    del data, x
    gc.collect()
    assert alive() is None
