"""What the outcomes amount to: one row per part of a family, and the figures with their targets."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from tests.thorough._trial import CRASHED, FALSE_ALARM, RIGHT, SILENT, VERDICTS, WARNED, Outcome


@dataclass(frozen=True)
class Row:
    """One family, or one kind of its problems.

    Attributes:
        family, kind: which; an empty kind is the whole family.
        problems: how many.
        verdicts: how many of each of :data:`VERDICTS`.
        median_error, worst_error: of the answers that nothing was said about; NaN where nothing was compared.
        median_steps: products of the linear solves per problem (per unknown in the family "quadratic").
    """

    family: str
    kind: str
    problems: int
    verdicts: dict[str, int]
    median_error: float
    worst_error: float
    median_steps: float


@dataclass(frozen=True)
class Figure:
    """A number that must hold; without a target it is only told.

    Attributes:
        name: what is measured.
        target: the rule, as text; empty where there is none.
        measured: the number, NaN where no problem gave one.
        held: whether the rule holds; None without a target or without a number.
        problems: how many problems it is taken over.
    """

    name: str
    target: str
    measured: float
    held: bool | None
    problems: int


def rows_of(outcomes: Sequence[Outcome], names: Sequence[str]) -> list[Row]:
    """A row per family and, where it has several kinds, one per kind."""
    rows = []
    for name in names:
        own = [o for o in outcomes if o.family == name]
        if not own:
            continue
        rows.append(_row(name, "", own))
        kinds = sorted({o.kind for o in own})
        if len(kinds) > 1:
            rows += [_row(name, kind, [o for o in own if o.kind == kind]) for kind in kinds]
    return rows


def _row(family: str, kind: str, outcomes: Sequence[Outcome]) -> Row:
    counts = Counter(o.verdict for o in outcomes)
    errors = [o.error for o in outcomes if o.verdict in (RIGHT, SILENT) and not math.isnan(o.error)]
    steps = [s for o in outcomes for name, s in o.numbers.items() if name in ("steps", "steps per unknown")]
    return Row(
        family,
        kind,
        len(outcomes),
        {verdict: counts.get(verdict, 0) for verdict in VERDICTS},
        _median(errors),
        max(errors, default=math.nan),
        _median(steps),
    )


def figures_of(outcomes: Sequence[Outcome], asked: int) -> list[Figure]:
    """The figures to hold. A missing measurement (a family left out) is neither held nor missed."""
    counts = Counter(o.verdict for o in outcomes)
    total = len(outcomes)

    def errors(family: str, *kinds: str) -> list[float]:
        """Of every problem that gave an answer, a warning with it or not."""
        answered = (RIGHT, WARNED, SILENT)
        return [
            o.error
            for o in outcomes
            if o.family == family and o.kind.startswith(kinds or ("",)) and o.verdict in answered and o.error == o.error
        ]

    def numbers(name: str, families: Iterable[str], kind: str = "") -> list[float]:
        return [
            o.numbers[name] for o in outcomes if o.family in families and name in o.numbers and o.kind.startswith(kind)
        ]

    silent = [o for o in outcomes if o.verdict in (RIGHT, SILENT)]
    quadratics = ("quadratic", "ill-conditioned")
    unreported = [
        o.numbers["residual / rtol"] for o in silent if o.family in quadratics and "residual / rtol" in o.numbers
    ]
    unreported32 = [
        o.numbers["residual / rtol"]
        for o in silent
        if o.family == "quadratic" and o.kind.startswith("f32") and "residual / rtol" in o.numbers
    ]
    ratios = numbers("estimate / error", ["certificate"])
    within = [float(0.1 <= r <= 10) for r in ratios]
    return [
        _at_least("problems", asked, [total], sum, total),
        _at_most("silent wrong results", 0, [counts.get(SILENT, 0)] * bool(total), max, total),
        _at_most("errors that are not named", 0, [counts.get(CRASHED, 0)] * bool(total), max, total),
        _at_most("false alarms", 0, [counts.get(FALSE_ALARM, 0)] * bool(total), max, total),
        _at_most("quadratics f64, random b: worst error", 1e-8, errors("quadratic", "f64, random")),
        _at_most("quadratics f64, b = A z: worst error", 1e-5, errors("quadratic", "f64, b")),
        _at_most("quadratics f32, random b: median error", 1e-5, errors("quadratic", "f32, random"), statistics.median),
        _at_most("quadratics f32, random b: worst error", 3e-2, errors("quadratic", "f32, random")),
        _at_most("quadratics f32: true residual / rtol, unreported", 10, unreported32),
        _at_most("the same with every condition, both dtypes", 10, unreported),
        _at_most(
            "HVPs per solve / n, median (f64)", 2, numbers("steps per unknown", ["quadratic"], "f64"), statistics.median
        ),
        _at_most("closed forms f64: worst error", 1e-7, errors("closed form", "f64")),
        _at_most("closed forms f32: worst error", 1e-4, errors("closed form", "f32")),
        _at_most("second order: worst error", 1e-6, errors("second order")),
        _at_least(
            "lanes beside one in trouble: share with the same bits",
            1,
            numbers("same bits", ["batch"]),
            statistics.fmean,
        ),
        _at_least("certificate: smallest bound / error", 1, numbers("bound / error", ["certificate"]), min),
        _at_least("certificate: estimates within 10 x", 0.95, within, statistics.fmean),
        _told("programs: worst error, unreported", _silent_errors(silent, "programs", ""), max),
        _told("quadratics f32, b = A z: median error", errors("quadratic", "f32, b"), statistics.median),
        _told("quadratics f32, b = A z: worst error, unreported", _silent_errors(silent, "quadratic", "f32, b"), max),
        _told(
            "quadratics, errors above 3 %: share where record.solution_error has at least a tenth of it",
            [float(r >= 0.1) for r in numbers("estimate / large error", ["quadratic"])],
            statistics.fmean,
        ),
        _told(
            "condition 1e7 to 1e13, f64: worst error, unreported", _silent_errors(silent, "ill-conditioned", "f64"), max
        ),
        _told(
            "condition 1e5 to 1e12, f32: worst error, unreported", _silent_errors(silent, "ill-conditioned", "f32"), max
        ),
    ]


def _silent_errors(silent: Sequence[Outcome], family: str, kind: str) -> list[float]:
    return [o.error for o in silent if o.family == family and o.kind.startswith(kind) and o.error == o.error]


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else math.nan


Measure = Callable[[Sequence[float]], float]


def _at_most(
    name: str, limit: float, values: Sequence[float], take: Measure = max, problems: int | None = None
) -> Figure:
    measured = float(take(values)) if values else math.nan
    held = measured <= limit if values else None
    return Figure(name, f"<= {limit:g}", measured, held, len(values) if problems is None else problems)


def _at_least(name: str, limit: float, values: Sequence[float], take: Measure, problems: int | None = None) -> Figure:
    measured = float(take(values)) if values else math.nan
    held = measured >= limit if values else None
    return Figure(name, f">= {limit:g}", measured, held, len(values) if problems is None else problems)


def _told(name: str, values: Sequence[float], take: Measure) -> Figure:
    return Figure(name, "", float(take(values)) if values else math.nan, None, len(values))
