"""Callbacks and progress bars of the own inner solvers."""

import itertools
import math
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from references import F64, randn, spd_matrix
from torch import Tensor

import implicitlayer as il
from implicitlayer.solvers import LBFGS, GradientDescent, Iteration, NewtonCG

MAKERS: dict[str, Any] = {
    "lbfgs": LBFGS,
    "newton": NewtonCG,
    "fixed step": lambda **settings: GradientDescent(1.0, **settings),
    "armijo": lambda **settings: GradientDescent(1.0, line_search="armijo", **settings),
}
ALL = pytest.mark.parametrize("kind", MAKERS)


def quadratics(x: Tensor, matrices: Tensor, b: Tensor) -> Tensor:
    return 0.5 * (x * (matrices @ x.unsqueeze(-1)).squeeze(-1)).sum(-1) - (b * x).sum(-1)


def batch() -> tuple[Tensor, Tensor]:
    return torch.stack([spd_matrix(4, c, seed=1) for c in (0.0, 0.5, 1.0)]), randn(3, 4, seed=2)


@ALL
@pytest.mark.parametrize("settings", [{"max_steps": 3}, {"max_steps": 100, "rtol": 1e-6}])
def test_the_callback_sees_every_step_from_the_start_to_the_answer(kind: str, settings: dict[str, Any]) -> None:
    matrix, b = spd_matrix(4, 1, seed=1), 1e3 * randn(4, seed=2)
    seen: list[Iteration] = []
    init = torch.zeros(4, dtype=F64)
    result = MAKERS[kind](callback=seen.append, **settings).run(quadratics, init, matrix, b)
    assert [i.step for i in seen] == list(range(result.num_steps + 1))
    assert torch.equal(seen[0].x, init) and torch.equal(seen[-1].x, result.value)
    for i in seen:  # the tensors are kept, not overwritten by later steps; condition 10, a few operations
        assert float(i.value) == pytest.approx(float(quadratics(i.x, matrix, b)), rel=1e-12)
        assert i.value.shape == () and i.gradient_norm.shape == ()
        assert float(i.gradient_norm) == pytest.approx(float((matrix @ i.x - b).norm()), rel=1e-9, abs=1e-12)


@ALL
def test_the_callback_changes_nothing(kind: str) -> None:
    matrix, b = spd_matrix(4, 1, seed=1), randn(4, seed=2)
    for settings in ({"max_steps": 5}, {"rtol": 1e-8}):
        plain = MAKERS[kind](**settings)(quadratics, torch.zeros(4, dtype=F64), matrix, b)
        watched = MAKERS[kind](callback=lambda i: None, **settings)(quadratics, torch.zeros(4, dtype=F64), matrix, b)
        assert torch.equal(plain, watched)


@ALL
def test_a_batch_is_one_iteration_with_numbers_for_every_lane(kind: str) -> None:
    seen: list[Iteration] = []
    matrices, b = batch()
    init = {"x": torch.zeros(3, 4, dtype=F64)}
    result = MAKERS[kind](callback=seen.append, rtol=1e-6).run(lambda x: quadratics(x["x"], matrices, b), init)
    assert seen[0].step == 0 and seen[-1].step == result.num_steps
    assert all(a.step <= b.step for a, b in itertools.pairwise(seen))
    for i in seen:
        assert i.value.shape == (3,) and i.gradient_norm.shape == (3,) and i.x["x"].shape == (3, 4)
        assert torch.allclose(i.value, quadratics(i.x["x"], matrices, b), rtol=1e-12, atol=1e-14)
    assert torch.equal(seen[-1].x["x"], result.value["x"])


def test_values_keep_the_dtype_and_the_units_of_the_objective() -> None:
    for kind in MAKERS:
        seen: list[Iteration] = []
        MAKERS[kind](callback=seen.append, max_steps=1)(lambda x: 0.5 * ((x - 1e12) ** 2).sum(), torch.zeros(1))
        assert seen[0].value.dtype == torch.float32
        # 1e12 is rounded to float32, its square once more
        assert float(seen[0].value) == pytest.approx(5e23, rel=1e-6)
        assert float(seen[0].gradient_norm) == pytest.approx(1e12, rel=1e-6)


@ALL
def test_an_error_in_the_callback_ends_the_solve(kind: str) -> None:
    def stop(iteration: Iteration) -> None:
        if iteration.step == 1:
            raise KeyError("enough")

    for progress in (False, True):
        with pytest.raises(KeyError, match="enough"):
            MAKERS[kind](callback=stop, max_steps=5, progress=progress)(
                quadratics, torch.zeros(3, 4, dtype=F64), *batch()
            )


@ALL
def test_the_bar_shows_steps_and_the_largest_gradient(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    seen: list[int] = []
    solver = MAKERS[kind](max_steps=2, progress=True, callback=lambda i: seen.append(i.step))
    plain = MAKERS[kind](max_steps=2)(quadratics, torch.zeros(3, 4, dtype=F64), *batch())
    assert torch.equal(solver(quadratics, torch.zeros(3, 4, dtype=F64), *batch()), plain)
    text = capsys.readouterr().err
    assert "0/2" in text and "step" in text and seen[-1] == 2  # tqdm itself decides which steps it draws


@ALL
def test_the_bar_moves_by_the_steps_made_and_is_closed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[Any] = []

    class Bar:
        def __init__(self, total: int, **settings: Any) -> None:
            self.total, self.n, self.words, self.closed = total, 0, "", False
            bars.append(self)

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *error: Any) -> None:
            self.closed = True

        def update(self, steps: int) -> None:
            self.n += steps

        def set_postfix_str(self, words: str, refresh: bool) -> None:
            self.words = words

    monkeypatch.setitem(sys.modules, "tqdm", SimpleNamespace(tqdm=Bar))
    result = MAKERS[kind](rtol=1e-4, max_steps=50, progress=True).run(
        quadratics, torch.zeros(3, 4, dtype=F64), *batch()
    )
    (bar,) = bars
    assert bar.total == 50 and bar.n == result.num_steps and bar.closed and bar.words.startswith("gradient norm ")


def test_the_bar_survives_a_batch_of_nothing() -> None:
    pytest.importorskip("tqdm")
    x = LBFGS(progress=True, max_steps=2)(lambda x: (x * x).sum(-1), torch.zeros(0, 3, dtype=F64))
    assert x.shape == (0, 3)


@ALL
def test_without_tqdm_the_error_names_the_extra(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match=r"progress=True needs tqdm.*pip install 'implicitlayer\[progress\]'"):
        MAKERS[kind](progress=True)(lambda x: (x * x).sum(), torch.ones(2, dtype=F64))
    assert MAKERS[kind](max_steps=1)(lambda x: (x * x).sum(), torch.ones(2, dtype=F64)).shape == (2,)


def test_an_iteration_reaches_the_user_through_a_layer() -> None:
    norms: list[float] = []
    solver = LBFGS(rtol=1e-10, callback=lambda i: norms.append(float(i.gradient_norm.max())))
    t = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=F64)
    layer = il.argmin(lambda x, t: (torch.exp(x) - t * x).sum(), solver)
    torch.func.vmap(lambda t: layer(torch.zeros(2, dtype=F64), t))(t)
    assert len(norms) > 2 and norms[-1] <= 1e-10 * norms[0] * math.sqrt(2)  # each lane relative to its own first
