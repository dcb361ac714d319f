"""``il.qp`` with other searches for the active set: the same answers, and the same checks."""

import warnings
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from references import F64, randn, relative_error
from solvers.test_interior_point import programs

import implicitlayer as il
from implicitlayer._errors import InfeasibleError, KinkWarning
from implicitlayer.programs import _backends
from implicitlayer.solvers import DAQP, OSQP, ActiveSet, Clarabel, Moreau, ProxQP, QPSolvers

ROUNDING = 1e-9  # of solves with the matrix of a random program, condition below 1e5


def needs(package: str) -> Any:
    return pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is not installed")


SEARCHES = [
    pytest.param(ActiveSet(), id="ActiveSet"),
    pytest.param(DAQP(), id="DAQP", marks=needs("daqp")),
    pytest.param(ProxQP(), id="ProxQP", marks=needs("proxsuite")),
    pytest.param(Moreau(), id="Moreau", marks=needs("moreau")),
    pytest.param(QPSolvers("piqp"), id="piqp", marks=[needs("qpsolvers"), needs("piqp")]),
    pytest.param(QPSolvers("quadprog"), id="quadprog", marks=[needs("qpsolvers"), needs("quadprog")]),
    pytest.param(OSQP(), id="OSQP", marks=needs("osqp")),
    pytest.param(Clarabel(), id="Clarabel", marks=needs("clarabel")),
    pytest.param("auto", id="auto"),
]
EYE, ONES = torch.eye(2, dtype=F64), torch.ones(2, dtype=F64)
BOX = {"G": torch.cat([EYE, -EYE]), "h": torch.ones(4, dtype=F64)}


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize(("lanes", "n", "e", "m"), [(0, 10, 2, 10), (6, 10, 1, 12), (3, 5, 0, 0), (2, 20, 0, 30)])
def test_solution_and_gradients_are_those_of_the_librarys_own_search(
    search: Any, lanes: int, n: int, e: int, m: int
) -> None:
    leaves = [(t if lanes else t[0]).requires_grad_() for t in programs(max(lanes, 1), n, e, m, seed=n + e)]
    copies = [t.detach().clone() for t in leaves]
    v = randn(n, seed=1)
    expected, found = il.qp(*leaves), il.qp(*leaves, solver=search)
    assert relative_error(found, expected) < ROUNDING
    pairs = zip(
        torch.autograd.grad(found @ v, leaves, v.new_ones(found.shape[:-1])),
        torch.autograd.grad(expected @ v, leaves, v.new_ones(found.shape[:-1])),
        strict=True,
    )
    for got, want in pairs:
        assert float((got - want).norm()) < ROUNDING * (1 + float(want.norm()))
    for leaf, copy in zip(leaves, copies, strict=True):
        assert torch.equal(leaf, copy)  # nobody has written to the data


@pytest.mark.parametrize("search", SEARCHES)
def test_the_record_says_who_has_found_the_active_set(search: Any) -> None:
    leaves = [t.requires_grad_() for t in programs(3, 6, 1, 8, seed=2)]
    with il.diagnostics() as records:
        il.qp(*leaves, solver=search).sum().backward()
    name = "DAQP" if search == "auto" and find_spec("daqp") else getattr(search, "name", "ActiveSet")
    assert records[0].active_set.found_by == {"ActiveSet": "active set"}.get(name, name)  # type: ignore[union-attr]


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("lanes", [(), (1,)])
def test_what_is_wrong_with_a_program_is_told_as_ever(search: Any, lanes: tuple[int, ...]) -> None:
    def solve(Q: torch.Tensor, p: torch.Tensor, G: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        data = (t.expand(*lanes, *t.shape) for t in (Q, p))
        found: torch.Tensor = il.qp(*data, G=G, h=h, solver=search)
        return found

    with pytest.raises(InfeasibleError, match="infeasible"):
        solve(EYE, ONES, torch.cat([EYE, -EYE]), torch.tensor([1.0, 1.0, -2.0, 0.0], dtype=F64))
    with pytest.raises(il.UnboundedError, match="unbounded"):
        solve(torch.diag(torch.tensor([1.0, 0.0], dtype=F64)), ONES, EYE, ONES)
    with pytest.raises(il.IndefiniteError, match="smallest eigenvalue is -1"):
        solve(torch.diag(torch.tensor([1.0, -1.0], dtype=F64)), ONES, **BOX)
    with pytest.raises(il.NonFiniteError, match="not finite"):
        solve(EYE, ONES * torch.nan, **BOX)
    with pytest.warns(KinkWarning, match="sits at a kink"):
        solve(EYE, torch.tensor([-1.0, 0.0], dtype=F64).requires_grad_(), **BOX)


@pytest.mark.parametrize("search", SEARCHES)
def test_one_bad_lane_is_named_or_masked_and_the_others_keep_their_numbers(search: Any) -> None:
    p = -torch.tensor([[2.0, 0.3], [0.2, 0.1], [0.5, -3.0]], dtype=F64)
    h = BOX["h"].repeat(3, 1)
    h[1, 2] = -2.0
    with pytest.raises(InfeasibleError, match=r"infeasible in lane 1 of \(3,\)"):
        il.qp(EYE, p, G=BOX["G"], h=h, solver=search)
    masked = il.qp(EYE, p.clone().requires_grad_(), G=BOX["G"], h=h, solver=search, on_failure="mask")
    assert bool(masked[1].isnan().all())
    assert torch.allclose(masked[[0, 2]], -p[[0, 2]].clamp(-1, 1), atol=1e-12)


@pytest.mark.parametrize("search", SEARCHES)
def test_a_border_with_a_weak_force_is_active(search: Any) -> None:
    for curvature in (1e-3, 1e-7):
        Q, p = torch.diag(torch.tensor([1.0, curvature], dtype=F64)), torch.tensor([-1.0, -curvature], dtype=F64)
        h = torch.tensor([0.5, 0.2], dtype=F64, requires_grad=True)
        x = il.qp(Q, p, G=EYE, h=h, solver=search)
        assert torch.allclose(x, h) and torch.autograd.grad(x[1], h)[0].tolist() == [0.0, 1.0]


@pytest.mark.parametrize("search", SEARCHES)
def test_transforms_and_second_derivatives_go_through_any_search(search: Any) -> None:
    data = programs(1, 3, 1, 3, seed=3)
    Q, p, A, b, G, h = (t[0] for t in data)
    points = torch.stack([p, 0.5 * p])
    found = torch.func.vmap(lambda p: il.qp(Q, p, A, b, G, h, solver=search))(points)
    assert relative_error(found, torch.stack([il.qp(Q, p, A, b, G, h) for p in points])) < ROUNDING
    cube = lambda p: (il.qp(Q, p, A, b, G, h, solver=search) ** 3).sum()  # noqa: E731
    assert torch.autograd.gradgradcheck(cube, p.clone().requires_grad_())


class Nonsense(_backends.Search):
    """A search whose every answer is far from the solution, or NaN, or missing."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def one(self, *data: Any) -> Any:
        return self.answer


@pytest.mark.parametrize("lanes", [1, 3])
@pytest.mark.parametrize("answer", [None, ([9.0, -9.0], [], [0.0] * 4), ([torch.nan] * 2, [], [0.0] * 4)])
def test_a_search_that_fails_costs_time_and_nothing_else(lanes: int, answer: Any) -> None:
    p = torch.tensor([[-3.0, 0.5]], dtype=F64).repeat(lanes, 1).requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = il.qp(EYE, p, **BOX, solver=Nonsense(answer))
    assert torch.allclose(x, torch.tensor([1.0, -0.5], dtype=F64), atol=1e-12)
    (got,) = torch.autograd.grad(x.sum(), p)
    assert torch.allclose(got, torch.tensor([0.0, -1.0], dtype=F64), atol=1e-12)


@pytest.mark.parametrize("lanes", [1, 3])
def test_an_answer_that_is_nearly_exact_is_made_exact(lanes: int) -> None:
    # x = 0 by an equation: 3e-11 is rounding beside the length of the program, 3 / 0.5, and everything beside x
    p = torch.full((lanes, 1), -3.0, dtype=F64, requires_grad=True)
    data = torch.tensor([[0.5]], dtype=F64), p, torch.tensor([[3.0]], dtype=F64), torch.zeros(1, dtype=F64)
    x, found = il.qp(*data, solver=Nonsense(([3e-11], [1.0], [])), return_multipliers=True)
    assert float(x.detach().abs().max()) < 1e-20 and torch.allclose(found.equality, torch.ones(lanes, 1, dtype=F64))


def test_a_missing_package_is_named_with_the_extra_and_a_wrong_name_with_the_right_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(_backends, "import_module", missing)
    for search in (DAQP(), ProxQP(), Moreau(), QPSolvers("piqp"), OSQP(), Clarabel()):
        words = rf"{type(search).__name__} needs {search.package}, which .*pip install .*\[{search.extra}\]"
        with pytest.raises(ImportError, match=words):
            il.qp(EYE, ONES, **BOX, solver=search)
    with pytest.raises(ValueError, match="solver='fastest' must be 'auto'"):
        il.qp(EYE, ONES, solver="fastest")  # type: ignore[arg-type]


@needs("qpsolvers")
def test_a_solver_that_qpsolvers_does_not_find_is_named() -> None:
    with pytest.raises(ValueError, match="solver='none' must be one of"):
        il.qp(EYE, ONES, **BOX, solver=QPSolvers("none"))
