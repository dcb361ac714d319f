"""fig2a.py and table1.py: they run in the smoke setting, keep their own claims, and their closed forms are right."""

import importlib.util
import json
import sys
import types
from pathlib import Path

import pytest
import torch

PAPER = Path(__file__).resolve().parents[2] / "examples" / "paper"
F64 = torch.float64


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A script of the folder as a module; its neighbours are found as when it is run."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("tqdm")
    monkeypatch.syspath_prepend(str(PAPER))
    spec = importlib.util.spec_from_file_location(f"paper_{name}", PAPER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fig2a", "table1"])
def test_the_script_ends_well_and_writes_what_it_shows(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = load(name, monkeypatch)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)  # this process goes on
    script.main(["--smoke", "--output-dir", str(tmp_path)])
    shown = capsys.readouterr().out
    written = json.loads((tmp_path / f"{name}.json").read_text())
    assert written["setting"].startswith("reduced: ") and written["seed"] == 0
    assert "\n".join(written["results"]["table"]) in shown
    assert (tmp_path / written["figures"][0]).stat().st_size > 10_000
    claims = written["results"]["claims" if name == "fig2a" else "exponents"]
    assert any(claim["holds"] for claim in claims)
    assert all(remark in shown for remark in written["results"]["remarks"])
    assert ("DOES NOT HOLD" in shown) is any(not claim["holds"] for claim in claims)


def test_the_exact_meta_gradient_of_fig2a_is_the_derivative_of_the_solution(monkeypatch: pytest.MonkeyPatch) -> None:
    fig2a = load("fig2a", monkeypatch)
    settings = fig2a.Settings(condition=50.0)
    task = fig2a.Regression.draw(5, settings, torch.Generator().manual_seed(4))
    x, y = task.support[0][0], task.support[1][0]
    eigenvalues = torch.linalg.eigvalsh(x.mT @ x) + 1
    # rounding of the smallest eigenvalue: eps times the largest, 50, of 5 rotations
    torch.testing.assert_close(eigenvalues[-1] / eigenvalues[0], torch.tensor(50.0, dtype=F64), rtol=1e-12, atol=0)

    def outer(theta: torch.Tensor) -> torch.Tensor:
        phi = torch.linalg.solve(x.mT @ x + torch.eye(5, dtype=F64), x.mT @ y + theta)
        return fig2a.task_loss(phi[None], task.query)[0]

    expected = torch.autograd.functional.jacobian(outer, task.theta)
    torch.testing.assert_close(task.exact(), expected, rtol=1e-11, atol=1e-13)


def test_the_closed_forms_of_table1_are_those_of_the_dense_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    table1 = load("table1", monkeypatch)
    p = table1.Regression.draw(8, 20.0, torch.Generator().manual_seed(4))
    x = torch.block_diag(*p.support[0][0])
    identity = torch.eye(8, dtype=F64)
    matrix = x.mT @ x + identity
    torch.testing.assert_close(torch.linalg.eigvalsh(matrix), p.eigenvalues.sort().values, rtol=1e-12, atol=1e-13)
    solution = torch.linalg.solve(matrix, x.mT @ p.support[1][0] + p.theta)
    torch.testing.assert_close(p.solution, solution, rtol=1e-12, atol=1e-13)
    v = solution - p.query[1][0]
    exact = p.in_eigenbasis(torch.linalg.solve(matrix, v))
    torch.testing.assert_close(p.exact_in_eigenbasis, exact, rtol=1e-11, atol=1e-12)
    for point in (p.theta, solution):  # the loss of blocks is the loss of the dense design
        dense = 0.5 * (x @ point - p.support[1][0]).square().sum()
        torch.testing.assert_close(table1.task_loss(point[None], p.support)[0], dense, rtol=1e-13, atol=0)


def test_products_are_two_for_a_gradient_and_two_more_for_a_hessian_vector_product(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table1 = load("table1", monkeypatch)
    p = table1.Regression.draw(8, 20.0, torch.Generator().manual_seed(4))
    phi = p.theta[None].clone().requires_grad_()
    with table1.Products() as products:
        (gradient,) = torch.autograd.grad(table1.task_loss(phi, p.support).sum(), phi, create_graph=True)
        assert products.count == 2
        torch.autograd.grad(gradient, phi, torch.ones_like(phi))
        assert products.count == 4


def test_the_fewest_steps_and_the_fitted_exponent_are_exact_where_they_are_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table1 = load("table1", monkeypatch)
    for k in (1, 2, 3, 64, 65, 1000):
        assert table1.fewest(lambda n, k=k: n >= k) == k
    assert table1.fewest(lambda n: False, limit=10) == 10
    slope, error = table1.fit_exponent([1.0, 10.0, 100.0], [3.0, 3 * 10**0.5, 30.0])
    assert abs(slope - 0.5) < 1e-14 and error < 1e-13
    # residuals of log y: the slope 1/2, in units of log 10, and residuals (1, -2, 1)/6, by hand
    slope, error = table1.fit_exponent([1.0, 10.0, 100.0], [1.0, 1.0, 10.0])
    assert abs(slope - 0.5) < 1e-14 and abs(error - (1 / 12) ** 0.5) < 1e-14


@pytest.mark.slow
def test_stability_runs_and_its_curvatures_are_eigenvalues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = load("stability", monkeypatch)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)  # this process goes on
    # eigenvalues -1, 0.01 ... 0.5, 7 of a Hessian: those at the ends stand apart, so 20 steps find them to rounding
    values = torch.cat([torch.tensor([-1.0]), torch.linspace(0.01, 0.5, 60), torch.tensor([7.0])])
    turned = torch.linalg.qr(torch.randn(62, 62, generator=torch.Generator().manual_seed(1)))[0]
    matrix = turned @ (values[:, None] * turned.T)
    ends = script.extreme_curvatures(lambda p: 0.5 * p["x"] @ matrix @ p["x"], {"x": torch.ones(62)})
    assert ends == pytest.approx((-1.0, 7.0), rel=1e-4)
    script.main(["--smoke", "--output-dir", str(tmp_path)])
    written = json.loads((tmp_path / "stability.json").read_text())
    assert written["setting"].startswith("reduced: a tiny network") and set(written["results"]["curves"]) == {
        "fixed step",
        "Armijo",
    }
    assert (tmp_path / "stability.png").stat().st_size > 10_000
