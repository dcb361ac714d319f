"""Vectors of which every process holds a part: only what all processes find the same can be asked of them.

Here one process plays every one: a vector in parts without process groups is whole, and a part of it may count for
nothing. ``tests/distributed`` has several.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import implicitlayer as il
from implicitlayer.base._parts import Cut, Parts, numbers, products
from implicitlayer.linear._operator import FlatOperator


def parts(values: torch.Tensor, *counted: tuple[int, int]) -> Parts:
    n = values.shape[-1]
    return Parts(values, Cut(n, counted or ((0, n),), (), (n,)))


def alike(values: torch.Tensor, like: Parts) -> Parts:
    return Parts(values, like.cut)


X = torch.tensor([[1.0, -4.0, 2.0], [3.0, 0.5, -1.0]], dtype=torch.float64)

SUMS: dict[str, Callable[[Any], Any]] = {
    "sum": lambda x: x.sum(),
    "sum(-1)": lambda x: x.sum(-1),
    "sum(-1, keepdim)": lambda x: x.sum(-1, keepdim=True),
    "product": lambda x: (x * x).sum(-1),
    "vecdot": lambda x: torch.linalg.vecdot(x, x),
    "largest": lambda x: x.abs().amax(-1),
    "least": lambda x: x.amin(-1, keepdim=True),
    "norm": lambda x: torch.linalg.vector_norm(x, dim=-1),
    "norm in float64": lambda x: torch.linalg.vector_norm(x.float(), dim=-1, dtype=torch.float64),
    "finite": lambda x: x.isfinite().all(-1),
    "any": lambda x: (x > 2).any(),
    "none": lambda x: (x > 8).any(-1),
}


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("x", [X, X[0]], ids=["two vectors", "one"])
def test_sums_over_parts_are_whole_tensors_with_the_value_of_the_whole(name: str, x: torch.Tensor) -> None:
    found, wanted = SUMS[name](parts(x)), SUMS[name](x)
    assert type(found) is torch.Tensor and found.dtype is wanted.dtype
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


BY_ENTRY: dict[str, Callable[[Any], Any]] = {
    "arithmetic": lambda x: 2 * x - x / 3 + torch.tensor([5.0], dtype=torch.float64),
    "a number per vector": lambda x: x * torch.tensor([[2.0], [3.0]], dtype=torch.float64),
    "chosen": lambda x: torch.where(torch.tensor([[True], [False]]), x, torch.zeros_like(x)),
    "an expanded number": lambda x: x * torch.tensor(2.0, dtype=torch.float64).expand(2, 3),
    "sum over vectors": lambda x: x.sum(0),
    "one of them": lambda x: x[1],
    "some of them": lambda x: x[:1],
    "all entries": lambda x: x[..., :3],
    "more of them": lambda x: torch.cat([x, x]),
    "in place": lambda x: x.clone().mul_(2).add_(x, alpha=3),
    "new": lambda x: x.new_zeros(4, 3),
    "reshaped": lambda x: x.reshape(2, 1, 3),
}


@pytest.mark.parametrize("name", BY_ENTRY)
def test_operations_by_entry_give_the_parts_of_their_value(name: str) -> None:
    found = BY_ENTRY[name](parts(X))
    assert type(found) is Parts
    torch.testing.assert_close(found.local, BY_ENTRY[name](X), rtol=0, atol=0)


READS: dict[str, Callable[[Any], Any]] = {
    "item": lambda x: x[:1].sum(0)[0].item(),
    "bool": lambda x: bool(parts(x.local[0, :1]) > 0),
    "one entry": lambda x: x[0].squeeze(),
    "entry": lambda x: x[0, 0],
    "some entries": lambda x: x[..., 1:],
    "sort": lambda x: x.sort(-1),
    "cumulative": lambda x: x.cumsum(-1),
    "matrix": lambda x: x.mT @ x,
    "matrix times": lambda x: torch.eye(3, dtype=torch.float64) @ x[0],
    "behind each other": lambda x: torch.cat([x, x], -1),
    "reshape": lambda x: x.reshape(6),
    "behind the last": lambda x: x.unsqueeze(-1),
    "another whole tensor": lambda x: x + X,
    "cut otherwise": lambda x: x + parts(X, ((0, 1),)),
}


def test_vectors_that_are_cut_alike_go_together() -> None:
    # what a linear solver keeps from one call of a layer to the next
    assert torch.equal((parts(X) + parts(2 * X)).local, 3 * X)


@pytest.mark.parametrize("name", READS)
def test_nothing_that_processes_would_see_differently_can_be_asked(name: str) -> None:
    with pytest.raises(NotImplementedError, match=r"in parts|in two different ways"):
        READS[name](parts(X))


def test_what_is_not_counted_here_adds_nothing_to_sums_and_an_empty_part_nothing_to_extremes() -> None:
    x = parts(X[0], (0, 1), (2, 3))
    assert x.sum().item() == 3.0 and torch.dot(x, x).item() == 5.0
    assert torch.linalg.vector_norm(x).item() == 5.0**0.5 and x.abs().amax().item() == 4.0
    assert parts(X[0], (0, 0)).sum().item() == 0.0
    none = Parts(X[0, :0], Cut(3, (), ()))
    assert none.sum().item() == 0.0 and none.amax(-1).item() == -torch.inf and none.amin(-1).item() == torch.inf
    assert bool((none > 0).all()) and not bool((none > 0).any()) and torch.dot(none, none).item() == 0.0


def test_inner_products_of_rows_are_those_of_the_whole_and_count_every_entry_once() -> None:
    rows, others = torch.stack([X, 2 * X]), torch.stack([X[:1], X[1:]])
    assert torch.equal(products(parts(rows), parts(others)), rows @ others.mT)
    counted = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    found = products(parts(rows, (0, 1), (2, 3)), parts(others, (0, 1), (2, 3)))
    torch.testing.assert_close(found, (rows * counted) @ others.mT, rtol=0, atol=0)
    assert torch.equal(products(parts(rows, (0, 0)), parts(others, (0, 0))), torch.zeros(2, 2, 1, dtype=torch.float64))


def test_entries_are_numbered_leaf_by_leaf_so_that_all_that_hold_one_give_it_the_same_number() -> None:
    here = Parts(X[0], Cut(7, ((0, 3),), (), (2, 1)))  # two leaves of six entries and of one, which all processes hold
    assert numbers(here).local.tolist() == [0, 1, 0] and numbers(here).shape == (7,)
    assert numbers(X).tolist() == [0, 1, 2]


def test_an_error_names_the_remedy_and_a_vector_can_be_shown() -> None:
    with pytest.raises(NotImplementedError, match="Set in_parts = False on the solver: it then gets whole vectors"):
        parts(X).cumsum(-1)
    assert repr(parts(X[0])) == f"Parts({X[0]!r} of 3)"


T = torch.linspace(-1, 2, 40, dtype=torch.float64)


class Here(torch.autograd.Function):
    """The plain tensor of a vector in parts, as an objective sees one."""

    @staticmethod
    def forward(ctx: Any, x: Parts) -> torch.Tensor:
        ctx.like = x
        return x.local.clone()

    @staticmethod
    def backward(ctx: Any, cotangent: torch.Tensor) -> Any:
        return There.apply(cotangent, ctx.like)


class There(torch.autograd.Function):
    """The inverse."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, like: Parts) -> torch.Tensor:
        return alike(x.clone(), like)

    @staticmethod
    def backward(ctx: Any, cotangent: torch.Tensor) -> Any:
        return Here.apply(cotangent), None


def softened(x: Any, t: Any) -> Any:
    """A strictly convex function whose Hessian changes: 1 + 3 x^2 on the diagonal, plus a matrix of ones."""
    return (x**2 / 2 + x**4 / 4 - t * x).sum() + x.sum() ** 2 / 2


SOLVERS = [
    il.solvers.GradientDescent(0.02, max_steps=20),
    il.solvers.GradientDescent(0.02, max_steps=5000, rtol=1e-12),
    il.solvers.GradientDescent(1.0, rtol=1e-10, line_search="armijo"),
    il.solvers.NewtonCG(rtol=1e-12),
    il.solvers.NewtonCG(cg_steps=3, damping=0.1, line_search="wolfe"),
    il.solvers.LBFGS(rtol=1e-10),
    il.solvers.LBFGS(memory=2, rtol=1e-10),
]


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_solvers_that_take_parts_find_the_same_numbers(solver: Any) -> None:
    assert solver.in_parts
    found = solver(lambda x, t: softened(Here.apply(x), t), parts(0 * T), T)
    wanted = solver(softened, 0 * T, T)
    assert type(found) is Parts
    # the same operations on the same numbers; BLAS and torch sum in their own order, which the last steps magnify
    torch.testing.assert_close(found.local, wanted, rtol=0, atol=1e-9)


def test_gauss_newton_products_of_parts_are_those_of_the_whole() -> None:
    def residuals(x: Any, t: Any) -> Any:
        return [x + x**3 / 9 - t, x.sum() / 9, torch.tanh(2 * x)]

    def in_parts(x: Any, t: Any) -> Any:
        return [There.apply(residual, x) if residual.ndim else residual for residual in residuals(Here.apply(x), t)]

    solver = il.solvers.NewtonCG(rtol=1e-12, curvature="gauss_newton")
    whole = il.least_squares(residuals)
    found = solver(
        il.composite(lambda o, t: whole.loss([Here.apply(o[0]), o[1], Here.apply(o[2])]), in_parts), parts(0 * T), T
    )
    assert type(found) is Parts
    # as above
    torch.testing.assert_close(found.local, solver(whole, 0 * T, T), rtol=0, atol=1e-9)


def contracted(x: Any, t: Any) -> Any:
    """A contraction whose derivative is not symmetric."""
    return 0.7 * torch.tanh(torch.linspace(-1, 1, 40, dtype=torch.float64) * x + t) + (x * t).sum(-1, keepdim=True) / 99


ROOTS = [
    il.solvers.AndersonAcceleration(rtol=1e-12),
    il.solvers.AndersonAcceleration(memory=2, mixing=0.5, rtol=1e-12),
    il.solvers.AndersonAcceleration(rtol=0.0),
    il.solvers.Newton(linear_solver=il.Gmres()),
    il.solvers.Newton(linear_solver=il.Bicgstab(rtol=1e-3), rtol=1e-12),
]


@pytest.mark.parametrize("solver", ROOTS, ids=repr)
def test_solvers_of_equations_that_take_parts_find_the_same_numbers(solver: Any) -> None:
    assert solver.in_parts
    function = contracted if solver.finds == "fixed point" else lambda x, t: x - contracted(x, t)
    found = solver.run(lambda x, t: There.apply(function(Here.apply(x), t), x), parts(0 * T), T)
    wanted = solver.run(function, 0 * T, T)
    assert type(found.value) is Parts and found.status is wanted.status
    torch.testing.assert_close(found.value.local, wanted.value, rtol=0, atol=1e-11)


LINEAR = [
    il.NormalEquations(il.ConjugateGradient()),
    il.Neumann(60, step_size=0.4),
    il.ConjugateGradient(),
    il.ConjugateGradient(max_steps=3),
    il.Minres(),
    il.Gmres(),
    il.Gmres(restart=3, max_steps=200, rtol=1e-12),
    il.Bicgstab(),
]


@pytest.mark.parametrize("solver", LINEAR, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_linear_solvers_that_take_parts_find_the_same_numbers(solver: Any, dtype: torch.dtype) -> None:
    assert solver.in_parts
    diagonal = torch.linspace(1, 3, 40, dtype=dtype)
    cut = parts(diagonal)

    def product(v: Any) -> Any:
        d = cut if type(v) is Parts else diagonal
        return d * v + v.sum(-1, keepdim=True) / 40

    rhs = T.to(dtype)
    found, wanted = (
        solver(FlatOperator(product, product, symmetric=False), b)  # it is symmetric, and NormalEquations is not told
        for b in (alike(rhs, cut), rhs)
    )
    assert found.status is wanted.status
    torch.testing.assert_close(found.value.local, wanted.value, rtol=0, atol=100 * torch.finfo(dtype).eps ** 0.75)


WHOLE = [
    il.Dense(),
    il.NormalEquations(il.Gmres(preconditioner=il.Jacobi())),
    il.ConjugateGradient(preconditioner=lambda v: v),
    il.Gmres(preconditioner=il.Jacobi()),
    il.solvers.GradientDescent(T.abs()),
    il.solvers.LevenbergMarquardt(),
    il.solvers.LBFGS(bounds=il.sets.Box(0, 1)),
    il.solvers.SciPyMinimize("BFGS"),
    il.solvers.Newton(),
    il.solvers.Broyden(),
]


@pytest.mark.parametrize("solver", WHOLE, ids=lambda solver: type(solver).__name__)
def test_solvers_that_look_at_entries_get_whole_vectors(solver: Any) -> None:
    assert not solver.in_parts


@pytest.mark.parametrize("y", ["normal", "geometric", "ties", "equal"])
@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_the_simplex_of_parts_is_that_of_the_whole(y: str, scale: float) -> None:
    draw = torch.Generator().manual_seed(0)
    values = {
        "normal": torch.randn(2, 300, dtype=torch.float64, generator=draw),
        "geometric": -(1.7 ** torch.arange(300, dtype=torch.float64)).expand(2, 300),
        "ties": torch.randint(0, 3, (2, 300), generator=draw).double(),
        "equal": torch.full((2, 300), 0.1, dtype=torch.float64),
    }[y] * scale
    simplex = il.sets.Simplex(torch.tensor([2.5, 0.1], dtype=torch.float64))
    assert simplex.in_parts
    wanted = simplex.project(values, 1)
    # an entry is a number of the size of the total less tau: their rounding, over sums of 300
    torch.testing.assert_close(simplex.project(parts(values), 1).local, wanted, rtol=0, atol=1e-12)
    held = simplex.activity(parts(values), 1.0, 1)[0].local
    assert torch.equal(held, simplex.activity(values, 1.0, 1)[0])


def test_a_number_that_is_none_stays_in_the_simplex_of_parts() -> None:
    values = torch.tensor([1.0, torch.nan, 0.2], dtype=torch.float64)
    assert bool(il.sets.Simplex().project(parts(values)).local.isnan().all())


def test_peak_memory_counts_the_entries_that_are_here() -> None:
    x = Parts(torch.zeros(1000, dtype=torch.float64), Cut(4000, ((0, 1000),), ()))
    with il.meta.PeakMemory() as memory:
        y = x + 1
    assert y.shape == (4000,) and memory.peak == 8000
