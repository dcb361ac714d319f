"""``il.qp(init=...)``: where the search begins is a matter of time, never of the answer."""

from typing import Any

import numpy as np
import pytest
import torch
from references import F64, randn, relative_error, spd_matrix
from torch import Tensor

import implicitlayer as il
from implicitlayer.programs._qp_single import exact_cold
from implicitlayer.programs._qp_terms import SingleProgram

N, M = 12, 20


def program(seed: int, lanes: tuple[int, ...] = (), semidefinite: bool = False) -> dict[str, Tensor]:
    Q = spd_matrix(N, 1, seed=seed)
    if semidefinite:
        Q[:3], Q[:, :3] = 0.0, 0.0
    return {
        "Q": Q,
        "p": 3 * randn(*lanes, N, seed=seed + 1),
        "A": randn(1, N, seed=seed + 2),
        "b": torch.zeros(1, dtype=F64),
        "G": randn(M, N, seed=seed + 3),
        "h": randn(M, seed=seed + 4).abs(),
        "lb": torch.full((N,), -0.5, dtype=F64),
        "ub": torch.full((N,), 0.5, dtype=F64),
    }


def all_of(data: dict[str, Tensor], **settings: Any) -> Tensor:
    """x, multipliers, and a gradient."""
    p = data["p"].clone().requires_grad_()
    x, found = il.qp(**{**data, "p": p}, return_multipliers=True, **settings)
    weights = randn(N, seed=100)
    (gradient,) = torch.autograd.grad((x * weights).sum(), p)
    parts = [x, found.equality, *found.inequality, gradient]
    return torch.cat([part.detach().reshape(-1) for part in parts])


@pytest.mark.parametrize("kind", ["single", "lanes", "semidefinite", "sparse"])
@pytest.mark.parametrize("change", [0.0, 0.05, 10.0])
def test_a_start_changes_no_number(kind: str, change: float) -> None:
    data = program(1, (5,) if kind == "lanes" else (), kind == "semidefinite")
    start = il.qp(**data, return_multipliers=True)
    data["p"] = data["p"] + change * randn(*data["p"].shape, seed=50)
    data["h"] = data["h"] * (1 + 0.1 * change)
    expected = all_of(data)
    if kind == "sparse":
        pytest.importorskip("scipy")
        data = {name: t.to_sparse_coo() if name in ("Q", "A", "G") else t for name, t in data.items()}
    for init in (start, start[1]):
        assert relative_error(all_of(data, init=init), expected) < 1e-9  # proofs of 1e-11, and the program's condition


@pytest.mark.parametrize("kind", ["single", "lanes", "semidefinite"])
def test_a_start_that_cannot_be_is_left(kind: str) -> None:
    """More constraints than unknowns, and both sides of every bound."""
    data = program(2, (3,) if kind == "lanes" else (), kind == "semidefinite")
    ones = torch.ones(M, dtype=F64)
    wrong = il.Multipliers(torch.ones(1, dtype=F64), (ones, ones[:N]))
    assert relative_error(all_of(data, init=wrong), all_of(data)) < 1e-9


def test_the_search_ends_after_one_round_from_the_active_set_of_the_solution() -> None:
    data = program(8)
    G = torch.cat([data["G"], torch.eye(N, dtype=F64), -torch.eye(N, dtype=F64)])
    h = torch.cat([data["h"], data["ub"], -data["lb"]])
    one = SingleProgram((data["Q"], 0.3 * data["p"], data["A"], data["b"], G, h))
    cold = exact_cold(one)
    assert cold is not None and cold.steps > 2
    warm = exact_cold(one, cold.held)
    assert warm is not None and warm.steps == 1 and np.array_equal(warm.held, cold.held)


def test_a_start_under_a_transform_is_not_used() -> None:
    data = program(4)
    start = il.qp(**data, return_multipliers=True)
    ps = torch.stack([data["p"], -data["p"]])
    mapped = torch.func.vmap(lambda p: il.qp(**{**data, "p": p}, init=start))(ps)
    assert relative_error(mapped, il.qp(**{**data, "p": ps})) < 1e-10


def test_starts_of_more_programs_than_there_are_do_not_fit() -> None:
    data = program(5)
    three, two = (torch.stack([data["p"]] * k) for k in (3, 2))
    start = il.qp(**{**data, "p": three}, return_multipliers=True)
    for p, batch in ((two, r"\(2,\)"), (data["p"], r"\(\)")):
        with pytest.raises(ValueError, match=rf"init has multipliers of programs \(3,\), which do not fit.* {batch}"):
            il.qp(**{**data, "p": p}, init=start)


def test_a_start_of_another_program_or_for_another_search_is_refused() -> None:
    data = program(5)
    for wrong in (data["p"], il.qp(torch.eye(3, dtype=F64), torch.ones(3, dtype=F64), return_multipliers=True)):
        with pytest.raises(ValueError, match=r"init must be what il.qp\(..., return_multipliers=True\) has returned"):
            il.qp(**data, init=wrong)
    start = il.qp(**data, return_multipliers=True)
    with pytest.raises(ValueError, match="init is where the library's own search begins"):
        il.qp(**data, init=start, solver=lambda *program: data["p"])
