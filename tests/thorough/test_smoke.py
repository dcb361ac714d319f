"""The thorough run itself: a few problems of every family, and that what is wrong is called so."""

import json
import math
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import implicitlayer as il
from tests.thorough import __main__ as command
from tests.thorough._family import DrawnFamily, Family, StrategyFamily
from tests.thorough._figures import figures_of, rows_of
from tests.thorough._quadratics import exact_residual
from tests.thorough._reference import newton_traced
from tests.thorough._report import Report
from tests.thorough._run import FAMILIES, chunks_of, counts_of
from tests.thorough._trial import (
    CRASHED,
    FAILURES,
    FALSE_ALARM,
    REFUSED,
    RIGHT,
    SILENT,
    WARNED,
    Outcome,
    Trial,
    relative_error,
    run_trial,
)

F64 = torch.float64
QUADRATIC = next(family for family in FAMILIES if family.name == "quadratic")


def names(family: Family) -> str:
    return family.name


@pytest.mark.parametrize("family", FAMILIES, ids=names)
def test_a_few_problems_of_every_family_hold(family: Family) -> None:
    outcomes = list(family.outcomes(seed=0, first=0, count=4))
    assert outcomes and not [o for o in outcomes if o.verdict in FAILURES]


@pytest.mark.parametrize(
    "case",
    [
        "n=5,rows=6,first=9,second=6,form=0,seed=60992",
        "n=9,rows=9,first=8,second=6,form=0,seed=74413",
        "n=5,rows=4,first=6,second=9,form=0,seed=97834",
    ],
)
def test_programs_whose_curvatures_are_far_apart_by_themselves_have_right_gradients(case: str) -> None:
    """Where a dense solve in units made of these curvatures was off by 1e-8 to 3e-5, without a word."""
    family = next(family for family in FAMILIES if family.name == "programs")
    assert isinstance(family, DrawnFamily)
    assert family.one(family.integers(case)).verdict == RIGHT


def test_which_problems_are_drawn_depends_on_seed_and_number_only() -> None:
    together = list(QUADRATIC.outcomes(5, 0, 4))
    assert together == [*QUADRATIC.outcomes(5, 0, 1), *QUADRATIC.outcomes(5, 1, 3)]
    assert [o.case for o in together] != [o.case for o in QUADRATIC.outcomes(6, 0, 4)]


def test_a_biased_gradient_is_found_and_shrunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Damping of 1 per cent, which nothing warns about, in the layer that the family makes."""
    argmin: Callable[..., Any] = il.argmin
    monkeypatch.setattr(il, "argmin", lambda *args, **settings: argmin(*args, damping=0.01, **settings))
    outcomes = list(QUADRATIC.outcomes(0, 0, 2))
    assert {o.verdict for o in outcomes} == {SILENT}
    assert "n=1,tenths=0,seed=0,hard=0,single=0" in {o.case for o in outcomes}
    assert "relative error 9.9" in outcomes[0].note  # 1 - 1/1.01


def test_a_program_solved_to_nine_digits_or_with_a_row_left_out_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Among programs without kinks, of conditions below 1e6, where 1e-11 of the terms is all that may be missing."""
    programs, qp = next(family for family in FAMILIES if family.name == "programs"), il.qp
    integers = {"n": 4, "rows": 4, "first": 0, "second": 0, "form": 0}
    cases = [f"{','.join(f'{k}={v}' for k, v in integers.items())},seed={seed}" for seed in range(6)]
    assert isinstance(programs, DrawnFamily)

    def verdicts(wrong: Callable[..., Any]) -> set[str]:
        monkeypatch.setattr(il, "qp", wrong)
        return {programs.one(programs.integers(case)).verdict for case in cases}

    assert verdicts(qp) == {RIGHT}
    assert verdicts(lambda **data: qp(**data) + 1e-6) == {SILENT}
    assert SILENT in verdicts(lambda h=None, G=None, **data: qp(**data) + 0 * h.sum())


def verdict(work: Callable[[Trial], None]) -> str:
    return run_trial("family", "case", work).verdict


def test_verdicts() -> None:
    right, wrong, nan = torch.ones(2), torch.tensor([1.0, 1.1]), torch.tensor([1.0, math.nan])

    def work(got: Tensor, must: str = "right", report: str = "", raised: Exception | None = None) -> str:
        def one(trial: Trial) -> None:
            trial.must = must
            trial.compare("x", [got], [right], 1e-3)
            if report == "warning":
                warnings.warn("text", il.ConvergenceWarning, stacklevel=1)
            elif report == "foreign warning":
                warnings.warn("text", UserWarning, stacklevel=1)
            elif report:
                trial.reports.append(report)
            if raised is not None:
                raise raised

        return verdict(one)

    assert work(right) == RIGHT and work(wrong) == SILENT and work(nan) == SILENT
    assert work(wrong, "either", "status") == WARNED and work(wrong, "either", "warning") == WARNED
    assert work(wrong, "either", "foreign warning") == SILENT
    assert work(right, "right", "warning") == FALSE_ALARM and work(right, "report") == SILENT
    assert work(wrong, "either", raised=il.SingularError("text")) == REFUSED
    assert work(right, "right", raised=il.SingularError("text")) == FALSE_ALARM
    assert work(right, "either", raised=ZeroDivisionError()) == CRASHED


def test_a_failure_is_shrunk_to_the_smallest_integers_that_fail() -> None:
    def work(trial: Trial, n: int, seed: int) -> None:
        trial.claim(n < 7, "n is large")

    family = DrawnFamily("toy", "?", 1, {"n": (1, 60), "seed": (0, 10_000)}, work)
    failed = [o for o in family.outcomes(0, 0, 20) if o.verdict == SILENT]
    assert failed and {o.case for o in failed} == {"n=7,seed=0"}
    assert family.reproduction(failed[0]) == 'python -m tests.thorough --family "toy" --case n=7,seed=0'


def test_a_failure_of_a_strategy_is_shrunk_by_hypothesis() -> None:
    def work(trial: Trial, n: int) -> None:
        trial.claim(n < 7, "n is large")

    family = StrategyFamily("toy", "?", 1, lambda: st.integers(0, 1000), work)
    failed = [o for o in family.outcomes(0, 0, 20) if o.verdict == SILENT]
    assert [o.case for o in failed] == ["7"]


def test_a_case_with_other_integers_is_an_error_that_names_them() -> None:
    assert isinstance(QUADRATIC, DrawnFamily)
    with pytest.raises(
        ValueError, match=r"case='n=3' must give n, tenths, seed, hard, single for the family 'quadratic'"
    ):
        QUADRATIC.integers("n=3")


def outcome(family: str, kind: str, error: float, verdict: str = RIGHT, **numbers: float) -> Outcome:
    return Outcome(family, "n=1", kind, verdict, error, "", numbers)


def report(*outcomes: Outcome) -> Report:
    return Report(outcomes, FAMILIES, "command", len(outcomes), 60.0, 0)


def test_a_missed_figure_is_told_and_fails_the_run(tmp_path: Path) -> None:
    good = outcome("quadratic", "f64, random b", 1e-9)
    assert report(good).passed
    missed = report(good, outcome("quadratic", "f64, random b", 2e-8))
    assert not missed.passed
    assert "| quadratics f64, random b: worst error | <= 1e-08 | 2e-08 | 2 | **MISSED** |" in missed.markdown()
    missed.write(tmp_path)
    data = json.loads((tmp_path / "thorough.json").read_text())
    held = {figure["name"]: figure["held"] for figure in data["figures"]}
    assert held["quadratics f64, random b: worst error"] is False and data["passed"] is False
    assert held["second order: worst error"] is None  # nothing was measured: neither held nor missed
    assert (tmp_path / "thorough.md").read_text() == missed.markdown()


@pytest.mark.parametrize("verdict", FAILURES)
def test_every_failure_fails_the_run_and_names_its_case(verdict: str) -> None:
    failed = report(outcome("quadratic", "f64, random b", 1e-9, verdict))
    assert not failed.passed and f"{verdict}: {QUADRATIC.reproduction(failed.outcomes[0])}" in failed.markdown()


def test_a_run_cut_short_has_missed_its_number_of_problems() -> None:
    done = [outcome("quadratic", "f64, random b", 1e-9)]
    assert [f.held for f in figures_of(done, 2) if f.name == "problems"] == [False]


def test_figures_of_answers_count_the_warned_ones_and_residuals_the_silent_ones() -> None:
    outcomes = [
        outcome("quadratic", "f32, random b", 1.0, WARNED, **{"residual / rtol": 100.0}),
        outcome("quadratic", "f32, random b", 1e-6, RIGHT, **{"residual / rtol": 2.0}),
    ]
    measured = {f.name: f.measured for f in figures_of(outcomes, 2)}
    assert measured["quadratics f32, random b: worst error"] == 1.0
    assert measured["quadratics f32: true residual / rtol, unreported"] == 2.0
    (row, *_) = rows_of(outcomes, ["quadratic"])
    assert row.problems == 2 and row.verdicts[WARNED] == 1 and row.worst_error == 1e-6


def test_chunks_cover_every_problem_once_and_mix_the_families() -> None:
    chunks = chunks_of(FAMILIES, 5000, seed=3)
    counts = dict(zip([family.name for family in FAMILIES], counts_of(FAMILIES, 5000), strict=True))
    assert sum(counts.values()) >= 5000
    for name, count in counts.items():
        drawn = sorted(i for n, _, first, size in chunks if n == name for i in range(first, first + size))
        assert drawn == list(range(count))
    half = {name for name, *_ in chunks[: len(chunks) // 2]}
    assert half == set(counts)


def test_the_thorough_profile_has_ten_thousand_problems_and_a_thousand_quadratics_of_each_kind() -> None:
    assert sum(family.share for family in FAMILIES) >= 10_000
    assert QUADRATIC.share >= 4 * 1000  # two dtypes, random and hard b


def test_one_case_can_be_run_again_and_bad_settings_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    case = ["--family", "quadratic", "--case", "n=3,tenths=10,seed=1,hard=0,single=0"]
    assert command.main(case) == 0
    assert "verdict='right'" in capsys.readouterr().out
    for arguments, message in (
        (["--problems", "0"], "--problems and --processes must be at least 1"),
        (["--case", "n=1"], "--case needs exactly one --family"),
    ):
        with pytest.raises(SystemExit):
            command.main(arguments)
        assert message in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- references


def test_two_traced_newton_steps_have_the_second_derivative_of_the_logarithm() -> None:
    t = torch.tensor([0.5, 2.0], dtype=F64, requires_grad=True)
    x = newton_traced(lambda x, t: x.exp() - t, t.detach().log(), [t])
    (first,) = torch.autograd.grad(x.sum(), t, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), t)
    assert torch.allclose(first, 1 / t, rtol=1e-14) and torch.allclose(second, -1 / t**2, rtol=1e-14)


def test_the_exact_residual_has_no_rounding_of_its_own() -> None:
    matrix = torch.tensor([[1.0, 1.0], [1.0, 1.0 + 2.0**-52]], dtype=F64)
    u = torch.tensor([1.0, -1.0], dtype=F64)  # A u = (0, -2^-52), exactly
    v = torch.tensor([1.0, 0.0], dtype=F64)
    assert exact_residual(matrix, u, v) == pytest.approx(math.hypot(1, 2.0**-52), rel=1e-15)
    assert exact_residual(matrix, u, torch.tensor([0.0, -(2.0**-52)], dtype=F64)) == 0.0
    scaled = exact_residual(matrix * 2.0**500, u * 2.0**-400, torch.tensor([0.0, -(2.0**48)], dtype=F64))
    assert scaled == 0.0


def test_relative_errors_do_not_overflow() -> None:
    huge = torch.full((3,), 1e200, dtype=F64)
    assert relative_error([huge * 1.5], [huge]) == pytest.approx(0.5)
    assert relative_error([torch.zeros(2)], [torch.zeros(2)]) == 0 and relative_error([huge], [0 * huge]) == math.inf
    assert relative_error([], []) == 0
    assert relative_error([torch.tensor([math.nan])], [torch.ones(1)]) == math.inf


def test_outcomes_travel_between_processes() -> None:
    one = outcome("quadratic", "f64", 1e-9, steps=3.0)
    assert pickle.loads(pickle.dumps(one)) == one


# ---------------------------------------------------------------------------------------------------------- the page


def test_the_page_of_promises_names_tests_that_exist_for_every_row() -> None:
    root = Path(__file__).resolve().parents[2]
    page = (root / "docs" / "reliability.md").read_text(encoding="utf-8")
    written = "".join(path.read_text(encoding="utf-8") for path in (root / "tests").rglob("test_*.py"))
    existing = set(re.findall(r"^def (test_\w+)", written, flags=re.MULTILINE))
    rows = re.findall(r"^\| (\d+)(?: ⇄)? \|(.*)$", page, flags=re.MULTILINE)
    assert sorted({int(number) for number, _ in rows}) == list(range(1, 39))
    for number, text in rows:
        named = re.findall(r"`(test_\w+)`", text)
        files = re.findall(r"`(tests/[\w/]+\.py)`", text)
        assert named or files
        assert set(named) <= existing and all((root / file).exists() for file in files), number
        rows_named = [name for name in named if name.startswith("test_row_")]
        assert all(name.startswith(f"test_row_{int(number):02}_") for name in rows_named)
        assert rows_named or int(number) > 28 or number == "5", number
