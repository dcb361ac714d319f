"""``il.qp`` with sparse matrices: the numbers of the dense program, gradients of the entries that are stored."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from references import F64, randn, relative_error
from torch import Tensor

import implicitlayer as il
from implicitlayer.constrained import _qp as qp_module

pytest.importorskip("scipy")
pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),  # torch, when a sparse tensor is made
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning"),
]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "coo": lambda t: t.to_sparse_coo(),
    "csr": lambda t: t.to_sparse_csr(),
    "dense": lambda t: t.clone(),
}


def banded(n: int) -> Tensor:
    off = torch.full((n - 1,), -1.0, dtype=F64)
    return torch.diag(torch.full((n,), 2.1, dtype=F64)) + torch.diag(off, 1) + torch.diag(off, -1)


def program(n: int = 12) -> dict[str, Tensor]:
    """Two equations, three rows with two sides (one long, one of two entries, one whose sides are equal), a box."""
    A = torch.zeros(2, n, dtype=F64)
    A[0], A[1, 0], A[1, 3] = 1.0, 1.0, -2.0
    G = torch.zeros(3, n, dtype=F64)
    G[0, ::2], G[1, 1], G[1, 4], G[2, 5], G[2, 6] = 0.5, 1.0, 3.0, 1.0, 1.0
    return {
        "Q": banded(n),
        "p": randn(n, seed=1),
        "A": A,
        "b": torch.tensor([0.5, 0.1], dtype=F64),
        "G": G,
        "lower": torch.tensor([-0.1, -torch.inf, 0.05], dtype=F64),
        "h": torch.tensor([0.2, 0.3, 0.05], dtype=F64),
        "lb": torch.full((n,), -0.3, dtype=F64),
        "ub": torch.full((n,), 0.4, dtype=F64),
    }


def sides(data: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t for name, t in data.items() if name not in ("Q", "A", "G")}


def solved(data: dict[str, Tensor], layouts: dict[str, str]) -> tuple[Tensor, dict[str, Tensor]]:
    """x, and the gradients of a weighed sum of x and all multipliers."""
    leaves = {k: LAYOUTS[layouts.get(k, "dense")](t).detach().requires_grad_() for k, t in data.items()}
    x, found = il.qp(**leaves, return_multipliers=True)
    multipliers = torch.cat([found.equality, *found.inequality])
    ((x * randn(len(x), seed=2)).sum() + (multipliers * randn(len(multipliers), seed=3)).sum()).backward()
    return torch.cat([x, multipliers]).detach(), {k: t.grad for k, t in leaves.items() if t.grad is not None}


@pytest.mark.parametrize(
    "layouts",
    [
        {"Q": "coo", "A": "coo", "G": "coo"},
        {"Q": "csr", "A": "csr", "G": "csr"},
        {"Q": "coo"},
        {"A": "csr"},
        {"G": "coo"},
    ],
    ids=str,
)
def test_solution_multipliers_and_gradients_are_those_of_the_dense_program(layouts: dict[str, str]) -> None:
    data = program()
    dense_x, dense = solved(data, {})
    x, gradients = solved(data, layouts)
    assert relative_error(x, dense_x) < 1e-10  # both are proved to 1e-11 of the terms
    for name, gradient in gradients.items():
        expected, layout = dense[name], layouts.get(name, "dense")
        if layout != "dense":
            assert gradient.layout is LAYOUTS[layout](data[name]).layout
            stored = (data[name] != 0).to(F64)
            gradient, expected = gradient.to_dense(), expected * stored
        assert relative_error(gradient, expected) < 1e-9, name
    assert set(gradients) == set(dense)


def without_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Any) -> None:
        raise AssertionError("made dense")

    monkeypatch.setattr(qp_module, "made_dense", refuse)


def test_gradients_of_the_values_agree_with_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    data, places = program(), {}
    for name in ("Q", "A", "G"):
        places[name] = data[name].to_sparse_coo().indices()

    def solution(q: Tensor, a: Tensor, g: Tensor, *others: Tensor) -> Tensor:
        made = {
            name: torch.sparse_coo_tensor(places[name], values, data[name].shape)
            for name, values in zip(("Q", "A", "G"), (q, a, g), strict=True)
        }
        x: Tensor = il.qp(**made, **dict(zip(sides(data), others, strict=True)))
        return x

    without_dense(monkeypatch)
    values = [data[name].to_sparse_coo().values() for name in places]
    inputs = [t.clone().requires_grad_() for t in (*values, *sides(data).values())]
    inputs[-4].requires_grad_(False)  # equal sides move together only: one of them alone is no feasible change
    inputs[-3].requires_grad_(False)
    assert torch.autograd.gradcheck(solution, inputs, eps=1e-6, atol=1e-7)  # eps^2, and 1e-14 / eps


@pytest.mark.parametrize("seed", range(4))
def test_random_programs_are_proved_without_dense_matrices(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    n, m = 30, 12
    mask = (randn(n, n, seed=seed) > 1.2).to(F64)
    half = randn(n, n, seed=seed + 10) * mask + torch.eye(n, dtype=F64)
    G = randn(m, n, seed=seed + 20) * (randn(m, n, seed=seed + 30) > 1.0).to(F64)
    data = {"Q": half @ half.T, "p": randn(n, seed=seed + 40), "G": G, "h": randn(m, seed=seed + 50).abs()}
    expected = il.qp(**data)
    without_dense(monkeypatch)
    x = il.qp(data["Q"].to_sparse_coo(), data["p"], G=G.to_sparse_csr(), h=data["h"])
    assert relative_error(x, expected) < 1e-9


def test_a_semidefinite_program_with_one_solution_is_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    """A linear program in a box: every unknown is at the side that its coefficient points to."""
    without_dense(monkeypatch)
    p = randn(50, seed=4).requires_grad_()
    ub = torch.ones(50, dtype=F64, requires_grad=True)
    x = il.qp(torch.zeros(50, 50, dtype=F64).to_sparse_coo(), p, lb=torch.zeros(50, dtype=F64), ub=ub)
    assert torch.allclose(x, (p < 0).to(F64), atol=1e-12)
    x.sum().backward()
    assert torch.allclose(ub.grad, (p < 0).to(F64), atol=1e-12) and torch.equal(p.grad, torch.zeros_like(p))


def large(n: int) -> Tensor:
    at = torch.arange(n)
    rows, columns = torch.cat([at, at[1:], at[:-1]]), torch.cat([at, at[:-1], at[1:]])
    values = torch.cat([torch.full((n,), 2.1, dtype=F64), torch.full((2 * n - 2,), -1.0, dtype=F64)])
    return torch.sparse_coo_tensor(torch.stack([rows, columns]), values, (n, n))


def test_programs_too_large_to_be_dense_are_solved() -> None:
    n = 10_000  # the dense matrix of the active set would have some 5 GB
    Q, p = large(n), randn(n, seed=5)
    ones = torch.ones(n, dtype=F64)
    x, found = il.qp(Q, p, ones[None], ones[:1], lb=-0.3 * ones, ub=0.4 * ones, return_multipliers=True)
    force = found.inequality[1] if isinstance(found.inequality, tuple) else found.inequality
    gradient = Q @ x + p + found.equality * ones + force
    assert float(gradient.abs().max()) < 1e-10 and abs(float(x.sum()) - 1) < 1e-10
    assert float(x.max()) <= 0.4 + 1e-12 and float(x.min()) >= -0.3 - 1e-12
    assert bool((force[x < 0.4 - 1e-9] <= 1e-12).all() and (force[x > -0.3 + 1e-9] >= -1e-12).all())


def test_a_large_program_without_a_proof_says_why_it_is_not_made_dense() -> None:
    n = 10_000
    ones = torch.ones(n, dtype=F64)
    with pytest.raises(il.NotConvergedError, match=r"\(10000, 10000\).* are too large to be made dense.*none at all"):
        il.qp(large(n), ones, ones[None], ones[:1], ub=-ones)  # the sum of negative numbers is not 1


def test_what_is_wrong_with_a_program_is_told_as_for_dense_matrices() -> None:
    eye, zero, ones = torch.eye(3, dtype=F64), torch.zeros(3, dtype=F64), torch.ones(3, dtype=F64)
    with pytest.raises(il.InfeasibleError, match="infeasible"):
        il.qp(eye.to_sparse_coo(), ones, G=torch.cat([eye, -eye]).to_sparse_coo(), h=-torch.ones(6, dtype=F64))
    with pytest.raises(il.UnboundedError, match="unbounded"):
        il.qp((0 * eye).to_sparse_coo(), ones, ub=ones)
    with pytest.raises(il.IndefiniteError, match="Q is not positive semidefinite"):
        il.qp((-eye).to_sparse_coo(), ones, lb=-ones, ub=ones)
    with pytest.raises(il.NonFiniteError):
        il.qp(eye.to_sparse_coo(), torch.full((3,), torch.nan, dtype=F64))
    with pytest.warns(il.KinkWarning, match="the solution sits at a kink"):
        x = il.qp(eye.to_sparse_coo(), zero, ub=zero.clone().requires_grad_())
    assert torch.equal(x, zero)
    twice = torch.tensor([[1.0, 1, 1], [2, 2, 2]], dtype=F64)
    sides = torch.tensor([3.0, 6.0], dtype=F64, requires_grad=True)
    with pytest.warns(il.KinkWarning, match="linearly dependent"):
        x = il.qp(eye.to_sparse_coo(), zero, twice.to_sparse_coo(), sides)
    assert torch.allclose(x, ones)


def test_second_derivatives_and_transforms_are_those_of_the_dense_program() -> None:
    data = program()
    places, values = data["Q"].to_sparse_coo().indices(), data["Q"].to_sparse_coo().values()
    data = {name: t[:2] if name in ("G", "lower", "h") else t for name, t in data.items()}  # without equal sides
    others = {name: t for name, t in data.items() if name not in ("Q", "p")}

    def solution(q: Tensor, p: Tensor) -> Tensor:
        x: Tensor = il.qp(torch.sparse_coo_tensor(places, q, data["Q"].shape), p, **others)
        return x

    p = data["p"].clone().requires_grad_()
    assert torch.autograd.gradgradcheck(solution, (values.clone().requires_grad_(), p), eps=1e-6, atol=1e-6)
    dense = lambda p: il.qp(data["Q"], p, **others)  # noqa: E731
    sparse = lambda p: il.qp(data["Q"].to_sparse_coo(), p, **others)  # noqa: E731
    jacobian = torch.autograd.functional.jacobian(dense, data["p"])
    assert relative_error(torch.func.jacrev(sparse)(data["p"]), jacobian) < 1e-9
    assert relative_error(torch.func.jacfwd(sparse)(data["p"]), jacobian) < 1e-9
    assert relative_error(torch.autograd.functional.jacobian(sparse, data["p"], vectorize=True), jacobian) < 1e-9
    ps = torch.stack([data["p"], 0.5 * data["p"]])
    assert relative_error(torch.func.vmap(sparse)(ps), torch.stack([dense(p) for p in ps])) < 1e-9
    assert relative_error(sparse(ps), torch.stack([dense(p) for p in ps])) < 1e-9  # leading dimensions are lanes


def test_records_tell_of_a_sparse_program_what_they_tell_of_a_dense_one() -> None:
    data = program()
    data["p"].requires_grad_()
    with il.diagnostics() as records:
        il.qp(**{k: t.to_sparse_coo() if k in "QAG" else t for k, t in data.items()})
    with il.diagnostics() as expected:
        il.qp(**data)
    active = records[0].active_set
    assert active is not None and bool(active.active.any())
    assert torch.equal(active.active, expected[0].active_set.active)


def test_the_value_of_a_sparse_program_has_the_gradient_of_the_dense_one() -> None:
    data = program()
    found = []
    for Q in (data["Q"].to_sparse_coo(), data["Q"].clone()):
        Q.requires_grad_()
        value = il.value(il.qp)(**{**data, "Q": Q})
        value.backward()
        found.append((value.detach(), Q.grad.to_dense()))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-12)
    assert relative_error(found[0][1], found[1][1] * (data["Q"] != 0)) < 1e-9


def test_float32_programs_are_solved_to_their_rounding() -> None:
    data = program()
    expected = il.qp(**data)
    x = il.qp(**{k: t.float().to_sparse_coo() if k in "QAG" else t.float() for k, t in data.items()})
    assert x.dtype == torch.float32
    assert relative_error(x.double(), expected) < 1e-5  # 100 eps: the condition of the program


def test_repeated_indices_are_summed() -> None:
    twice = torch.sparse_coo_tensor(torch.tensor([[0, 0, 1], [0, 0, 1]]), torch.ones(3, dtype=F64), (2, 2))
    values = torch.ones(2, dtype=F64)
    assert torch.allclose(il.qp(twice, -values), torch.tensor([0.5, 1.0], dtype=F64))


def test_other_layouts_are_refused_with_the_remedy() -> None:
    eye = torch.eye(2, dtype=F64)
    with pytest.raises(TypeError, match=r"sparse_csc is not for il.qp, which takes COO and CSR. Use .to_sparse_coo"):
        il.qp(eye.to_sparse_csc(), eye[0])
    with pytest.raises(TypeError, match=r"whose entries are tensors \(dense_dim=1\).*Use .to_dense\(\).to_sparse\(\)"):
        il.qp(eye.to_sparse(1), eye[0])
    for name in ("p", "ub"):
        with pytest.raises(TypeError, match=rf"{name} is sparse .*; only Q, A and G may be. Pass {name}.to_dense\(\)"):
            il.qp(**{"Q": eye.to_sparse(), "p": eye[0], "ub": eye[1], name: eye[0].to_sparse()})


def test_without_scipy_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(importlib.import_module("implicitlayer.programs._sparse_program"), "import_module", missing)
    eye = torch.eye(2, dtype=F64)
    with pytest.raises(ImportError, match=r"needs SciPy .*to_dense.*pip install 'implicitlayer\[solvers\]'"):
        il.qp(eye.to_sparse_coo(), eye[0])
