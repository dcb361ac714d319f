"""docs/any_solver.md: each layer checked by differences of its own solver; the table is written here.

IMPLICITLAYER_WRITE_DOCS=1 python -m pytest tests/third_party/test_gallery.py    # after a change of the page
"""

import functools
import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from implicitlayer.testing import check_argmin_gradients

PAGE = Path(__file__).parents[2] / "docs" / "any_solver.md"
SECTION = re.compile(r"^## (?P<name>.+?)\n.*?^```python\n(?P<source>.*?)^```$", flags=re.MULTILINE | re.DOTALL)
TABLE = re.compile(r"(?<=<!-- table -->\n).*?(?=<!-- end of table -->)", flags=re.DOTALL)

# heading on the page: (class of problems, package of the solver)
EXAMPLES: dict[str, tuple[str, str]] = {
    "scipy.optimize.minimize": ("smooth, unconstrained", "scipy"),
    "scipy.optimize.minimize with bounds": ("smooth, in a box", "scipy"),
    "scipy.optimize.root": ("system of equations", "scipy"),
    "scipy.optimize.least_squares": ("nonlinear least squares", "scipy"),
    "OSQP": ("quadratic program with equalities", "osqp"),
    "Clarabel": ("quadratic program on a simplex", "clarabel"),
    "CVXPY": ("cone program with equalities", "cvxpy"),
    "scikit-learn: LogisticRegression": ("classifier, hyperparameters", "scikit-learn"),
    "scikit-learn: Ridge": ("linear regression, hyperparameters", "scikit-learn"),
    "scikit-learn: LinearSVC": ("support vector machine, squared hinge", "scikit-learn"),
    "scikit-learn: SVC": ("quadratic program with box and equality", "scikit-learn"),
    "scikit-learn: SVR": ("quadratic program with box and equality", "scikit-learn"),
    "torch.optim.Adam": ("smooth, stochastic optimizer", "torch"),
    "torch.optim.LBFGS": ("smooth, quasi-Newton", "torch"),
    "pytorch-minimize": ("smooth, Newton", "pytorch-minimize"),
    "CMA-ES": ("values only, by sampling", "cma"),
    "A program in another process": ("a subprocess, JSON both ways", "none"),
    "A library in single precision": ("smooth, float32 in a float64 layer", "numpy"),
}
# A measured error may be this many times that of the page (another machine, another version), and rounding is free.
SLACK, ROUNDING = 100, 1e-12


@dataclass(frozen=True)
class Measured:
    """Relative errors of a gradient: against differences of the same solver, and against the closed form if any."""

    differences: float
    closed_form: float | None
    polish: int

    def row(self, name: str) -> str:
        exact = "none" if self.closed_form is None else f"{self.closed_form:.0e}".replace("0e+00", "0")
        problem, package = EXAMPLES[name]
        return f"| {name} | {problem} | {package} | {self.polish or ''} | {exact} | {self.differences:.0e} |"


@functools.cache
def page() -> tuple[dict[str, Any], dict[str, str]]:
    """What the page's first block defines, and the block of every section."""
    text = PAGE.read_text(encoding="utf-8")
    first = re.search(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    assert first is not None
    start: dict[str, Any] = {"__name__": "__gallery__"}
    exec(compile(first.group(1), str(PAGE), "exec"), start)
    return start, {match["name"]: match["source"] for match in SECTION.finditer(text[first.end() :])}


def example(name: str) -> dict[str, Any]:
    """Names that the block of a section leaves behind: each section stands on the page's first block alone."""
    start, sources = page()
    needs = re.match(r"# needs: (.+)\n", sources[name])
    missing = [n for n in needs.group(1).split(", ") if importlib.util.find_spec(n) is None] if needs else []
    if missing:
        pytest.skip(f'needs {", ".join(missing)}: pip install "implicitlayer[solvers]"')
    namespace = dict(start)
    exec(compile(sources[name], f"{PAGE}, {name}", "exec"), namespace)
    return namespace


@functools.cache
def measured(name: str) -> Measured:
    found = example(name)
    layer, theta = found.get("layer"), found["theta"]
    closed_form = found["error"](found["answer"], found["exact"], *theta) if "exact" in found else None
    if layer is None or getattr(layer, "terms", None) is not None:
        # programs and layers with a constraint are quadratic here: piecewise smooth in theta, with differences to match
        return Measured(difference_error(found["answer"], theta, 1e-3), closed_form, 0)
    settings = {"linear_solver": layer.linear_solver, "polish": layer.polish}
    report = check_argmin_gradients(
        layer.function, layer.solver, found["init"], *theta, modes=("vjp",), kind=layer.kind, **settings
    )
    assert report.verdict == "passed", str(report)
    rows = [row for row in report.rows if row.reference == "differences"]
    assert rows
    return Measured(max(row.error for row in rows) / max(abs(row.expected) for row in rows), closed_form, layer.polish)


def difference_error(answer: Any, theta: tuple[torch.Tensor, ...], h: float) -> float:
    """The derivative along all ones in every theta, by the layer and by a difference: their relative distance."""
    ones = tuple(torch.ones_like(t) for t in theta)
    _, got = torch.func.jvp(answer, theta, ones)
    ahead, behind = (answer(*(t + sign * h for t in theta)) for sign in (1, -1))
    expected = (ahead - behind) / (2 * h)
    return float((got - expected).norm() / expected.norm())


def rows_of_page() -> dict[str, list[str]]:
    table = TABLE.search(PAGE.read_text(encoding="utf-8"))
    assert table is not None
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.group().splitlines() if line]
    return {row[0]: row for row in cells[2:]}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_gradient_is_that_of_the_very_same_solver_and_the_table_says_how_well(name: str) -> None:
    result = measured(name)
    # what the page promises: three digits of any solver, eight where a closed form tells
    assert result.differences < 1e-3
    assert result.closed_form is None or result.closed_form < 1e-8
    if not os.environ.get("IMPLICITLAYER_WRITE_DOCS"):
        shown = rows_of_page()[name]
        now = [cell.strip() for cell in result.row(name).strip("|").split("|")]
        assert shown[:4] == now[:4]
        for old, new in zip(shown[4:], now[4:], strict=True):
            assert (old == "none") == (new == "none")
            if old != "none":
                assert float(new) <= SLACK * float(old) + ROUNDING


def test_the_table_has_a_row_for_every_section_of_the_page() -> None:
    if os.environ.get("IMPLICITLAYER_WRITE_DOCS"):
        head = ("solver", "problem", "package", "`polish`", "error, closed form", "error, differences of the solver")
        lines = [f"| {' | '.join(head)} |", "|" + "|".join(["---"] * len(head)) + "|"]
        table = "\n".join([*lines, *(measured(name).row(name) for name in EXAMPLES)])
        text = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(TABLE.sub(lambda _: table + "\n", text), encoding="utf-8")
    assert list(rows_of_page()) == list(EXAMPLES) == list(page()[1])
