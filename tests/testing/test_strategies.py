"""The strategies of il.testing: what they draw, how failures shrink and print, and what they refuse."""

import importlib
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument
from references import F64, relative_error
from torch import Tensor
from torch.utils import _pytree as pytree

import implicitlayer as il
from implicitlayer import testing

MATRICES: dict[str, tuple[Callable[..., Any], Callable[..., Tensor]]] = {
    "spd": (testing.spd_matrices, testing.spd_matrix),
    "indefinite": (testing.indefinite_matrices, testing.indefinite_matrix),
    "general": (testing.general_matrices, testing.general_matrix),
}
PROBLEMS: dict[str, Callable[..., Any]] = {
    "quadratic": testing.quadratic_problems,
    "smooth convex": testing.smooth_convex_problems,
    "nonconvex": testing.nonconvex_problems,
    "root": testing.root_problems,
}
dtypes = st.sampled_from([torch.float64, torch.float32])
QUICK = settings(derandomize=True, database=None, max_examples=2000, phases=[Phase.generate, Phase.shrink])


# -------------------------------------------------------------------------------------------------- matrices, problems


@pytest.mark.parametrize("kind", MATRICES)
@given(data=st.data(), n=st.integers(1, 5), log10_cond=st.integers(0, 3), dtype=dtypes)
def test_plain_numbers_and_strategies_are_both_taken(
    kind: str, data: st.DataObject, n: int, log10_cond: int, dtype: torch.dtype
) -> None:
    make = MATRICES[kind][0]
    plain = data.draw(make(n=n, log10_cond=log10_cond, log10_scale=2, dtype=dtype))
    drawn = data.draw(make(n=st.just(n), log10_cond=st.just(log10_cond), log10_scale=st.just(2), dtype=st.just(dtype)))
    for matrix in (plain, drawn):
        assert matrix.shape == (n, n) and matrix.dtype == dtype
        values = torch.linalg.svdvals(matrix.double()) / 100
        # eps n of the dtype, relative to the smallest value 1e-3
        assert float(values[0] / values[-1]) == pytest.approx(10.0**log10_cond if n > 1 else 1, rel=5e-3)


@pytest.mark.parametrize("kind", MATRICES)
def test_a_failing_matrix_shrinks_to_the_smallest_size_and_round_exponents(kind: str) -> None:
    strategy, builder = MATRICES[kind]
    matrices = strategy(log10_scale=st.integers(-12, 12), dtype=dtypes)
    found = find(matrices, lambda m: len(m) >= 3, settings=QUICK)
    assert torch.equal(found, builder(3, log10_cond=0, log10_scale=0, seed=0))


@pytest.mark.parametrize("kind", PROBLEMS)
def test_a_failing_problem_shrinks_and_prints_the_integers_it_was_made_from(kind: str) -> None:
    found = find(
        PROBLEMS[kind](log10_scale=st.integers(-12, 12), dtype=dtypes),
        lambda p: len(p.init) >= 2,
        settings=QUICK,
    )
    assert (
        repr(found) == f"{kind.replace(' ', '_')}_problem(2, log10_cond=0, log10_scale=0, seed=0, dtype=torch.float64)"
    )


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Hypothesis prints to stdout where exceptions have no notes")
def test_a_failing_test_prints_a_call_that_can_be_pasted() -> None:
    @settings(derandomize=True, database=None, max_examples=50)
    @given(testing.spd_matrices(log10_cond=2))
    def false_claim(matrix: Tensor) -> None:
        assert len(matrix) < 2

    with pytest.raises(AssertionError) as caught:
        false_claim()
    text = "".join("".join(caught.value.__notes__).split())
    assert "matrix=spd_matrix(n=2,log10_cond=2,log10_scale=0,seed=0" in text


@given(testing.singular_matrices(n=st.integers(1, 6)), testing.singular_matrices(2), testing.singular_matrices(1, n=4))
def test_singular_matrices_have_deficient_rank(any_rank: Tensor, rank_2: Tensor, rank_1: Tensor) -> None:
    assert int(torch.linalg.matrix_rank(any_rank)) < len(any_rank) <= 6
    assert int(torch.linalg.matrix_rank(rank_2)) == 2
    assert int(torch.linalg.matrix_rank(rank_1)) == 1 and len(rank_1) == 4


@given(testing.singular_matrices(st.integers(0, 5), n=st.integers(1, 4), kind="general"))
def test_of_drawn_ranks_those_below_the_size_are_kept(matrix: Tensor) -> None:
    assert int(torch.linalg.matrix_rank(matrix)) < len(matrix) <= 4


@pytest.mark.parametrize("kind", PROBLEMS)
@settings(max_examples=10)
@given(data=st.data(), dtype=dtypes)
def test_drawn_problems_have_the_arguments_asked_for(kind: str, data: st.DataObject, dtype: torch.dtype) -> None:
    problem = data.draw(PROBLEMS[kind](n=3, log10_cond=1, log10_scale=4, dtype=dtype))
    assert problem.init.shape == (3,) and problem.init.dtype == dtype
    assert f"_problem(3, log10_cond=1, log10_scale=4, seed={problem.recipe.split('seed=')[1]}" in repr(problem)


BAD: list[tuple[Callable[[], Any], str]] = [
    (
        lambda: testing.spd_matrices(n=0),
        r"n=0 must be an int of at least 1\. It counts the unknowns; pass an int, or a",
    ),
    (lambda: testing.indefinite_matrices(n="3"), r"n='3' must be an int of at least 1"),
    (lambda: testing.general_matrices(log10_cond=-1), r"log10_cond=-1 must be a number from 0 to 20"),
    (
        lambda: testing.spd_matrices(dtype=torch.float16),
        r"dtype=torch\.float16 must be torch\.float32 or torch\.float64",
    ),
    (lambda: testing.spd_matrices(log10_scale=300), r"log10_scale=300 must be a number from -200 to 200"),
    (
        lambda: testing.quadratic_problems(log10_scale=30, dtype=torch.float32),
        r"log10_scale=30 must be a number from -25 to 25\. It is the exponent: .* torch\.float32 overflows",
    ),
    (lambda: testing.singular_matrices(-1), r"rank=-1 must be an int of at least 0"),
    (lambda: testing.singular_matrices(4, n=4), r"rank=4 must be below n=4"),
    (lambda: testing.singular_matrices(kind="spd"), r"kind='spd' must be one of"),
    (lambda: testing.smooth_convex_problems(n=1.5), r"n=1\.5 must be an int"),
    (lambda: testing.nonconvex_problems(log10_cond=None), r"log10_cond=None must be a number"),
    (lambda: testing.root_problems(n=-2), r"n=-2 must be an int"),
    (lambda: testing.pytrees(0), r"max_leaves=0 must be an int of at least 1\. A pytree needs a tensor"),
    (lambda: testing.pytrees(shapes=[]), r"shapes=\[\] must hold one shape at least"),
    (lambda: testing.pytrees(shapes=[(2, -1)]), r"shapes=\[\(2, -1\)\] must hold one shape at least, of sizes from 0"),
    (lambda: testing.pytrees(shapes=[3]), r"shapes=\[3\] must hold one shape at least"),  # type: ignore[list-item]
    (lambda: testing.layouts([1.0]), r"tensor=\[1\.0\] must be a torch\.Tensor, or a strategy of tensors"),  # type: ignore[arg-type]
    (lambda: testing.cotangents([1.0]), r"like=\[1\.0\] must be a pytree of tensors"),
    (lambda: testing.cotangents({}), r"like=\{\} must be a pytree of tensors"),
    (
        lambda: testing.cotangents(torch.zeros(3), matrix=torch.eye(2)),
        r"matrix of shape \(2, 2\) must be \[n, n\] = \(3, 3\), as like has n entries",
    ),
    (lambda: testing.cotangents(torch.zeros(3), log10_scale=26), r"log10_scale=26 must be a number from -25 to 25"),
    (lambda: testing.faulty_solvers(None), r"solver=None must be callable: solver\(objective, init, \*theta\) -> x"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[message[:24] for _, message in BAD])
def test_bad_arguments_are_refused_when_the_strategy_is_made(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        make()


# ----------------------------------------------------------------------------------------- pytrees, layouts, cotangents


@given(data=st.data(), most=st.integers(1, 6), dtype=dtypes)
def test_pytrees_have_at_most_so_many_leaves_of_the_shapes_asked_for(
    data: st.DataObject, most: int, dtype: torch.dtype
) -> None:
    leaves = pytree.tree_leaves(data.draw(testing.pytrees(most, shapes=[(), (2, 3)], dtype=dtype)))
    assert 1 <= len(leaves) <= most
    assert all(leaf.shape in ((), (2, 3)) and leaf.dtype == dtype for leaf in leaves)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 3)])
def test_pytrees_reach_the_small_shapes(shape: tuple[int, ...]) -> None:
    found = find(testing.pytrees(3), lambda t: any(x.shape == shape for x in pytree.tree_leaves(t)), settings=QUICK)
    assert isinstance(found, Tensor) and found.shape == shape  # shrunk to a bare tensor


@pytest.mark.parametrize("container", [list, tuple, dict, testing.Pair])
def test_pytrees_reach_every_container_and_all_their_leaves(container: type) -> None:
    found = find(testing.pytrees(6), lambda t: type(t) is container and len(t) == 2, settings=QUICK)
    assert type(found) is container and len(found) == 2
    if container is list:  # whatever is not wrapped ends in a list
        most = find(testing.pytrees(6), lambda t: len(pytree.tree_leaves(t)) == 6, settings=QUICK)
        assert type(most) is list


def test_an_argmin_layer_takes_every_pytree() -> None:
    @given(testing.pytrees(4))
    def takes(tree: Any) -> None:
        def objective(x: Any, t: Any) -> Tensor:
            parts = zip(pytree.tree_leaves(x), pytree.tree_leaves(t), strict=True)
            return torch.stack([((a - b) ** 2).sum() for a, b in parts]).sum()

        leaves, spec = pytree.tree_flatten(tree)
        theta = [leaf.clone().requires_grad_() for leaf in leaves]
        init = pytree.tree_map(torch.zeros_like, tree)
        x = il.argmin(objective, lambda f, x, t: t)(init, pytree.tree_unflatten(theta, spec))
        assert pytree.tree_structure(x) == spec
        total = torch.stack([leaf.sum() for leaf in pytree.tree_leaves(x)]).sum()
        for gradient in torch.autograd.grad(total, theta):
            assert torch.allclose(gradient, torch.ones_like(gradient), rtol=1e-12)

    takes()


TENSORS = st.builds(testing.normal_tensor, st.sampled_from([(), (1,), (0,), (4,), (2, 3), (3, 1, 2)]), dtype=dtypes)


@given(data=st.data(), tensor=TENSORS)
def test_layouts_hold_the_same_values(data: st.DataObject, tensor: Tensor) -> None:
    for original in (tensor, tensor.clone().requires_grad_()):
        view = data.draw(testing.layouts(original))
        assert torch.equal(view, original) and view.dtype == original.dtype
        assert view.requires_grad == original.requires_grad and view.is_leaf
        assert view.numel() == 0 or view.data_ptr() != original.data_ptr()


EXPECTED_LAYOUTS: dict[str, Callable[[Tensor], bool]] = {
    "offset": lambda t: t.storage_offset() > 0,
    "strided": lambda t: t.stride() == (6, 2),
    "transposed": lambda t: t.stride() == (1, 2),
    "contiguous": lambda t: t.stride() == (3, 1) and t.storage_offset() == 0,
}


@pytest.mark.parametrize("layout", EXPECTED_LAYOUTS)
def test_every_layout_is_drawn(layout: str) -> None:
    find(testing.layouts(torch.arange(6.0).reshape(2, 3)), EXPECTED_LAYOUTS[layout], settings=QUICK)


def test_values_that_repeat_are_also_drawn_expanded() -> None:
    rows = torch.arange(3.0).expand(4, 3).clone()
    assert find(testing.layouts(rows), lambda t: 0 in t.stride(), settings=QUICK).stride() == (0, 1)
    assert testing.relayout(rows.T.contiguous(), "expanded").stride()[1] == 0
    assert testing.relayout(torch.ones(2, 3), "expanded").stride() == (0, 0)
    strategy = st.just(torch.ones(2))
    assert torch.equal(find(testing.layouts(strategy), lambda t: True, settings=QUICK), torch.ones(2))


def test_an_unknown_layout_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layout='fortran' must be one of \('contiguous', 'offset'"):
        testing.relayout(torch.ones(2), "fortran")


LIKE = {"a": torch.zeros(2, 2, dtype=F64), "b": [torch.zeros((), dtype=F64), torch.zeros(0, dtype=F64)]}


@given(testing.cotangents(LIKE, matrix=testing.spd_matrix(5, log10_cond=3)))
def test_cotangents_have_the_structure_and_dtypes_of_what_they_belong_to(v: Any) -> None:
    leaves, spec = pytree.tree_flatten(v)
    expected, expected_spec = pytree.tree_flatten(LIKE)
    assert spec == expected_spec and [t.shape for t in leaves] == [t.shape for t in expected]
    assert all(t.dtype == F64 and bool(t.isfinite().all()) for t in leaves)


COTANGENTS: dict[str, Callable[[Tensor], bool]] = {
    "zero": lambda v: not v.any(),
    "unit vector": lambda v: int((v != 0).sum()) == 1 and float(v.sum()) == 1,
    "large": lambda v: float(v.abs().max()) > 1e9,
    "small": lambda v: 0 < float(v.abs().max()) < 1e-9,
}


@pytest.mark.parametrize("kind", COTANGENTS)
def test_every_kind_of_cotangent_is_drawn(kind: str) -> None:
    find(testing.cotangents(torch.zeros(3, dtype=F64)), COTANGENTS[kind], settings=QUICK)


def test_hard_cotangents_are_a_z_and_come_only_with_a_matrix() -> None:
    matrix = testing.spd_matrix(20, log10_cond=6, seed=1)
    v = testing.cotangent(torch.zeros(20, dtype=F64), "hard", seed=2, matrix=matrix)
    z = torch.linalg.solve(matrix, v)
    right = testing.normal_tensor((20,), seed=2)
    assert relative_error(z / z.norm(), right / right.norm()) < 1e-9  # eps times the condition 1e6
    assert float(v.norm()) == pytest.approx(20**0.5)
    scaled = testing.cotangent(torch.zeros(20, dtype=F64), "hard", seed=2, matrix=matrix * 1e200)
    assert relative_error(scaled, v) < 1e-12
    with pytest.raises(ValueError, match=r"matrix must be the \[n, n\] = \(3, 3\) matrix .* for kind='hard', got None"):
        testing.cotangent(torch.zeros(3), "hard")
    with pytest.raises(ValueError, match=r"kind='random' must be one of \('normal', 'zero', 'unit', 'hard'\)"):
        testing.cotangent(torch.zeros(3), "random")


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(testing.cotangents(TENSORS, log10_scale=25))
def test_cotangents_of_drawn_tensors_reach_the_ends_of_float32(v: Tensor) -> None:
    assert bool(v.isfinite().all()) and (v.numel() == 0 or not v.any() or float(v.abs().max()) > 1e22)


# ------------------------------------------------------------------------------------------------------------- extras


def test_without_hypothesis_the_import_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("implicitlayer.testing")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(il, "testing", testing, raising=False)  # restored with the modules
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    with pytest.raises(ImportError, match=r"il\.testing needs Hypothesis.*pip install 'implicitlayer\[testing\]'"):
        importlib.import_module("implicitlayer.testing")
