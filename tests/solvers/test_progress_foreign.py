"""Callbacks and bars of torch's optimizers and of SciPy's methods: the protocol of the own solvers."""

import contextlib
import math
from typing import Any

import pytest
import torch
from references import F64, randn, spd_matrix
from solvers.test_interior_point import programs
from torch import Tensor

from implicitlayer.solvers import InteriorPoint, Iteration, SciPyMinimize, TorchOptimizer

METHODS = ["BFGS", "L-BFGS-B", "CG", "Newton-CG", "TNC", "SLSQP", "trust-ncg", "trust-constr"]
WITHOUT_GRADIENTS = ["Nelder-Mead", "Powell", "COBYLA", "COBYQA"]


def quadratic(x: Tensor, matrix: Tensor, b: Tensor) -> Tensor:
    return 0.5 * (x * (matrix @ x.unsqueeze(-1)).squeeze(-1)).sum(-1) - (b * x).sum(-1)


def theta() -> tuple[Tensor, Tensor]:
    return spd_matrix(4, 1, seed=1), randn(4, seed=2)


@pytest.mark.parametrize("settings", [{}, {"rtol": 1e-2}])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.LBFGS])
def test_torch_tells_every_step_from_the_start_to_the_answer(optimizer: Any, settings: dict[str, Any]) -> None:
    matrix, b = theta()
    seen: list[Iteration] = []
    solver = TorchOptimizer(optimizer, max_steps=6, lr=0.2, callback=seen.append, **settings)
    result = solver.run(quadratic, torch.zeros(4, dtype=F64), matrix, b)
    plain = TorchOptimizer(optimizer, max_steps=6, lr=0.2, **settings)
    assert torch.equal(result.value, plain(quadratic, torch.zeros(4, dtype=F64), matrix, b))
    assert [i.step for i in seen] == list(range(result.num_steps + 1))
    assert torch.equal(seen[0].x, torch.zeros(4, dtype=F64)) and torch.equal(seen[-1].x, result.value)
    for i in seen:
        assert float(i.value) == pytest.approx(float(quadratic(i.x, matrix, b)), rel=1e-12)
        assert float(i.gradient_norm) == pytest.approx(float((matrix @ i.x - b).norm()), rel=1e-12)


def test_a_batch_of_torch_has_numbers_for_every_lane() -> None:
    matrix, b = spd_matrix(4, 1, seed=1), randn(3, 4, seed=2)
    seen: list[Iteration] = []
    TorchOptimizer(torch.optim.SGD, max_steps=2, lr=0.1, callback=seen.append)(
        quadratic, torch.zeros(3, 4, dtype=F64), matrix, b
    )
    assert all(i.value.shape == (3,) and i.gradient_norm.shape == (3,) for i in seen) and len(seen) == 3


@pytest.mark.parametrize("method", [*METHODS, *WITHOUT_GRADIENTS])
def test_scipy_tells_its_points(method: str) -> None:
    pytest.importorskip("scipy")
    matrix, b = theta()
    seen: list[Iteration] = []
    options = {"maxfun" if method == "TNC" else "maxiter": 40}
    result = SciPyMinimize(method, callback=seen.append, options=options).run(quadratic, 0 * b, matrix, b)
    assert torch.equal(result.value, SciPyMinimize(method, options=options)(quadratic, 0 * b, matrix, b))
    assert [i.step for i in seen] == list(range(len(seen))) and len(seen) > 2
    assert torch.equal(seen[0].x, torch.zeros(4, dtype=F64))
    for i in seen:
        assert float(i.value) == pytest.approx(float(quadratic(i.x, matrix, b)), rel=1e-12)
        if method in WITHOUT_GRADIENTS:
            assert math.isnan(float(i.gradient_norm))
        else:
            assert float(i.gradient_norm) == pytest.approx(float((matrix @ i.x - b).norm()), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("error", [KeyError, StopIteration])
@pytest.mark.parametrize("method", ["torch", *METHODS, *WITHOUT_GRADIENTS])
def test_an_error_in_the_callback_ends_the_solve_and_reaches_the_caller(method: str, error: type[Exception]) -> None:
    pytest.importorskip("scipy")
    steps: list[int] = []

    def stop(iteration: Iteration) -> None:
        steps.append(iteration.step)
        if iteration.step == 1:
            raise error("enough")

    solver: Any = SciPyMinimize(method, callback=stop)
    if method == "torch":
        solver = TorchOptimizer(torch.optim.SGD, max_steps=5, lr=0.1, callback=stop)
    with pytest.raises(error, match="enough"):
        solver(quadratic, torch.zeros(4, dtype=F64), *theta())
    assert steps == [0, 1]


@pytest.mark.parametrize("kind", ["torch", "scipy"])
def test_the_bar_needs_tqdm_and_shows_steps(kind: str, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    pytest.importorskip("tqdm")
    pytest.importorskip("scipy")

    def make() -> Any:
        if kind == "torch":
            return TorchOptimizer(torch.optim.SGD, max_steps=3, lr=0.1, progress=True)
        return SciPyMinimize("BFGS", progress=True)

    make()(quadratic, torch.zeros(4, dtype=F64), *theta())
    assert "step" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with contextlib.ExitStack() as stack:
        stack.enter_context(pytest.raises(ImportError, match=r"progress=True needs tqdm"))
        make()(quadratic, torch.zeros(4, dtype=F64), *theta())


@pytest.mark.parametrize("lanes", [(), (1,), (4,), (2, 3)])
def test_the_interior_point_tells_every_step_and_ends_near_its_answer(lanes: tuple[int, ...]) -> None:
    data = tuple(t.reshape(*lanes, *t.shape[1:]) for t in programs(math.prod(lanes), 5, 1, 6, seed=3))
    seen: list[Iteration] = []
    watched = InteriorPoint(callback=seen.append)(*data)
    plain = InteriorPoint()(*data)
    assert torch.equal(watched.x, plain.x) and torch.equal(watched.steps, plain.steps)
    assert [i.step for i in seen] == list(range(int(plain.steps.max()) + 1))
    for i in seen:
        value = (i.x * (0.5 * (data[0] @ i.x[..., None])[..., 0] + data[1])).sum(-1)
        assert i.x.shape == plain.x.shape and torch.equal(i.value, value) and i.gradient_norm.shape == lanes
    if math.prod(lanes) == 1:  # the best point of all is the last
        assert torch.equal(seen[-1].x, plain.x) and torch.equal(seen[-1].gradient_norm, plain.error)
    assert float(seen[-1].gradient_norm.max()) < 1e-6 < float(seen[0].gradient_norm.max())


def test_an_exception_of_the_interior_point_s_callback_reaches_the_caller() -> None:
    def stop(iteration: Iteration) -> None:
        raise StopIteration("enough")

    with pytest.raises(StopIteration, match="enough"):
        InteriorPoint(callback=stop, progress=True)(*programs(2, 3, 0, 4, seed=1))
