"""The report of a gradient check: what its rows, its verdict and its text say."""

import math
import pickle

import pytest
import torch
from references import F64
from torch import Tensor

from implicitlayer.testing._check import check_argmin_gradients
from implicitlayer.testing._report import (
    COARSE,
    GRADIENT,
    LINEAR,
    TRUNCATION,
    GradientCheckError,
    GradientReport,
    GradientRow,
    Place,
    compare,
    entry_of,
    worst_first,
)


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


def row(expected: Tensor, got: Tensor, tolerance: Tensor, natural: float = 1.0, **more: object) -> GradientRow:
    parts = {TRUNCATION: tolerance, COARSE: tolerance / 10}
    place = Place("theta[0]", lambda i: f"[{i}]", "vjp", "dense")
    return compare(place, expected, got, parts, natural, **more)  # type: ignore[arg-type]


def test_the_worst_entry_stands_for_the_row() -> None:
    found = row(vector(1, 2, 3), vector(1, 2.5, 3.1), vector(1, 1e-3, 1e-3))
    assert (found.entry, found.expected, found.got, found.error) == ("[1]", 2.0, 2.5, 0.5)
    assert found.tolerance == pytest.approx(1.1e-3) and found.ratio == pytest.approx(0.5 / 1.1e-3)
    assert found.status == "failed" and found.dominating == GRADIENT


def test_a_good_row_names_the_largest_part_of_its_tolerance() -> None:
    found = row(vector(1, 2), vector(1, 2.0001), vector(1e-3, 1e-3))
    assert found.status == "ok" and found.dominating == TRUNCATION


def test_a_tolerance_of_a_tenth_leaves_no_digit() -> None:
    assert row(vector(1.0), vector(1.01), vector(0.5)).status == "inconclusive"
    assert row(vector(1.0), vector(1.01), vector(0.05)).status == "ok"


def test_zero_against_zero_is_judged_by_the_natural_size() -> None:
    assert row(vector(0.0), vector(0.0), vector(1e-9), natural=1.0).status == "ok"
    assert row(vector(0.0), vector(0.0), vector(1e-2), natural=1.0).status == "inconclusive"
    assert row(vector(0.0), vector(0.0), vector(0.0), natural=1.0).status == "ok"
    assert row(vector(0.0), vector(1e-3), vector(0.0), natural=1.0).ratio == math.inf


def test_nan_is_the_worst_of_all() -> None:
    found = row(vector(1.0, 1.0), vector(5.0, torch.nan), vector(1e-9, 1e-9))
    assert found.status == "failed" and found.entry == "[1]" and found.ratio == math.inf


def test_an_error_that_the_recorded_residual_explains_is_the_linear_solves() -> None:
    assert row(vector(1.0), vector(1.5), vector(1e-9), explained=vector(0.4)).dominating == LINEAR
    assert row(vector(1.0), vector(1.5), vector(1e-9), explained=vector(0.1)).dominating == GRADIENT


def test_a_reference_that_cannot_be_believed_fails_nothing() -> None:
    assert row(vector(1.0), vector(9.0), vector(1e-9), resolved=False).status == "inconclusive"


def test_rows_are_sorted_by_what_they_are_and_how_far_they_are_off() -> None:
    bad, worse = row(vector(1), vector(2), vector(1e-3)), row(vector(1), vector(9), vector(1e-3))
    fine, vague = row(vector(1), vector(1), vector(1e-3)), row(vector(1), vector(1.1), vector(9))
    assert worst_first([fine, vague, bad, worse]) == (worse, bad, vague, fine)


def test_entries_are_named_like_indices() -> None:
    assert [entry_of(torch.Size((2, 3)))(i) for i in (0, 4, 5)] == ["[0, 0]", "[1, 1]", "[1, 2]"]
    assert entry_of(torch.Size(()))(0) == ""


def of(verdict: str, rows: tuple[GradientRow, ...], notes: tuple[str, ...] = ()) -> GradientReport:
    return GradientReport(verdict, rows, notes, "argmin", 3, 1.5e-3, 2e-2, 1e-2)  # type: ignore[arg-type]


def test_an_inconclusive_report_shows_the_stationarity_first() -> None:
    assert str(of("inconclusive", ())).startswith(
        "‖∇f‖ = 1.50e-03 at the solver's answer, which is about 2.0e-02 (1.0e-02"
    )
    assert str(of("passed", ())).startswith("Gradient check of an argmin of 3 unknowns: passed (0 of 0")


def test_the_table_has_the_offender_first_and_every_number() -> None:
    bad, fine = row(vector(1), vector(-1), vector(1e-3)), row(vector(1), vector(1), vector(1e-3))
    report = of("failed", worst_first([fine, bad]), ("theta[1] is not used.",))
    lines = str(report).splitlines()
    head, first = next((lines[i], lines[i + 1]) for i, line in enumerate(lines) if line.startswith("leaf"))
    assert head.split() == [
        *(["leaf", "entry", "mode", "reference", "expected", "got", "error", "tolerance", "status"]),
        *("dominated", "by"),
    ]
    assert first.split()[:9] == ["theta[0]", "[0]", "vjp", "dense", "1", "-1", "2.0e+00", "1.1e-03", "failed"]
    assert first.endswith("the gradient itself") and lines[-1] == "- theta[1] is not used."
    assert report.worst == bad and report.failures == (bad,)


def test_a_long_table_is_cut() -> None:
    rows = tuple(row(vector(1), vector(1), vector(1e-3)) for _ in range(30))
    assert "... and 18 more" in str(of("passed", rows))


def test_the_error_is_an_assertion_error_with_the_report() -> None:
    report = of("failed", (row(vector(1), vector(2), vector(1e-3)),))
    error = GradientCheckError(report)
    assert isinstance(error, AssertionError) and error.report is report and str(error) == str(report)
    assert pickle.loads(pickle.dumps(error)).report == report


def test_reports_are_frozen() -> None:
    with pytest.raises(AttributeError):
        of("passed", ()).verdict = "failed"  # type: ignore[misc]


def test_a_real_failure_reads_from_top_to_bottom() -> None:
    """f = (x - w)^2 / 2 + b x with b cut off: x = w - b, dx/db = -1 by the solver and 0 by autograd."""

    def objective(x: Tensor, theta: dict[str, Tensor]) -> Tensor:
        return 0.5 * ((x - theta["w"]) ** 2).sum() + (theta["b"].detach() * x).sum()

    theta = {"w": torch.ones(2, dtype=F64), "b": torch.ones(2, dtype=F64)}
    with pytest.raises(GradientCheckError) as error:
        check_argmin_gradients(
            objective, lambda f, x, theta: theta["w"] - theta["b"], torch.zeros(2, dtype=F64), theta, modes=("vjp",)
        )
    report = error.value.report
    assert report.worst is not None and report.worst.leaf == "theta[0]['b']" and report.worst.got == 0.0
    single = [r for r in report.failures if r.mode == "vjp" and r.entry.startswith("[")]
    v = {abs(r.expected) for r in single}
    assert single and all(0.5 <= value <= 1 for value in v)  # -v_i with 1/2 <= |v_i| <= 1
    text = str(report)
    assert text.index("failed (") < text.index("theta[0]['b']") < text.index("look for .detach()")
