"""One problem: what came out, what is right, what was said about it; and the verdict."""

# NOTE [verdicts]: a problem is
#     right          every number within its tolerance, nothing said
#     warned         a named warning was given, or the record's status is not ok: the caller knows
#     refused        a named error was raised
#     false alarm    warned or refused, where the promise is a right answer
#     silent wrong   a number beyond its tolerance, or a fault that had to be reported and was not, and no word about it
#     crashed        an error that is not one of the library's
# The tolerance of every number is derived where it is compared, from the condition of its problem, never tuned.

from __future__ import annotations

import math
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import implicitlayer as il

RIGHT, WARNED, REFUSED = "right", "warned", "refused"
FALSE_ALARM, SILENT, CRASHED = "false alarm", "silent wrong", "crashed"
VERDICTS = (RIGHT, WARNED, REFUSED, FALSE_ALARM, SILENT, CRASHED)
FAILURES = (FALSE_ALARM, SILENT, CRASHED)

# A solve counts as converged while its true residual is at most this factor above the tolerance: what is promised.
SLACK = 10.0

Tensors = Sequence[torch.Tensor]


@dataclass(frozen=True)
class Outcome:
    """What one problem came to; plain data, sent between processes.

    Attributes:
        family: its family.
        case: the integers that make it again.
        kind: a part of the family with figures of its own, such as "f64, random b".
        verdict: one of :data:`VERDICTS`.
        error: largest relative error that was compared; NaN where none was.
        note: what was raised or warned, or what is wrong.
        numbers: further measurements, by name.
    """

    family: str
    case: str
    kind: str
    verdict: str
    error: float
    note: str
    numbers: dict[str, float]


@dataclass
class Trial:
    """Collects what is known of one problem while it is worked on.

    Attributes:
        kind: see :class:`Outcome`.
        must: ``"right"``: a report is a false alarm; ``"report"``: silence is wrong; ``"either"``.
    """

    kind: str = ""
    must: str = "right"
    allowed_errors: tuple[type[Exception], ...] = ()
    errors: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    reports: list[str] = field(default_factory=list)
    numbers: dict[str, float] = field(default_factory=dict)

    def compare(self, what: str, got: Tensors, expected: Tensors, allowed: float) -> float:
        """Note the relative error of ``got``, all tensors together; wrong where it is above ``allowed``."""
        error = relative_error(got, expected)
        self.errors.append(error)
        self.claim(error <= allowed, f"{what}: relative error {error:.2e}, allowed {allowed:.2e}")
        return error

    def claim(self, holds: bool, text: str) -> None:
        """Note as wrong what does not hold."""
        if not holds:
            self.wrong.append(text)

    def look_at(self, record: Any) -> None:
        """Take the steps, and a status that is not ok, from a record of a linear solve."""
        solution = record.solution
        if not solution.status.ok:
            self.reports.append(f"status {solution.status.name}")
        self.numbers["steps"] = self.numbers.get("steps", 0.0) + solution.num_steps

    def judge(self, work: Callable[[Trial], None]) -> tuple[str, str]:
        """Do the work; the verdict and its note, see NOTE [verdicts]."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                work(self)
            except (il.ImplicitLayerError, *self.allowed_errors) as error:
                return (FALSE_ALARM if self.must == "right" else REFUSED), f"{type(error).__name__}: {error}"
            except Exception as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                return CRASHED, f"{type(error).__name__} at {where.name}:{where.lineno}: {error}"
        self.reports += [w.category.__name__ for w in caught if issubclass(w.category, il.ImplicitLayerWarning)]
        if self.reports:
            return (FALSE_ALARM if self.must == "right" else WARNED), ", ".join(dict.fromkeys(self.reports))
        if self.must == "report":
            self.wrong.append("nothing was said")
        return (SILENT, "; ".join(self.wrong)) if self.wrong else (RIGHT, "")


def run_trial(family: str, case: str, work: Callable[[Trial], None]) -> Outcome:
    """One problem from start to verdict."""
    trial = Trial()
    verdict, note = trial.judge(work)
    error = max(trial.errors, key=lambda e: math.inf if math.isnan(e) else e, default=math.nan)
    return Outcome(family, case, trial.kind, verdict, error, note[:500], trial.numbers)


def relative_error(got: Tensors, expected: Tensors) -> float:
    """``||got - expected|| / ||expected||`` over all tensors; no square overflows; 0 for two zeros, inf for NaN."""
    left = torch.cat([t.detach().double().reshape(-1) for t in got] or [torch.zeros(0)])
    right = torch.cat([t.detach().double().reshape(-1) for t in expected] or [torch.zeros(0)])
    if not right.numel():
        return 0.0
    unit = float(right.abs().max())
    if unit == 0:
        return 0.0 if not bool(left.any()) else math.inf
    error = float((left / unit - right / unit).norm() / (right / unit).norm())
    return math.inf if math.isnan(error) else error


def default_rtol(dtype: torch.dtype) -> float:
    """The documented default of every linear solver."""
    return 1e-10 if dtype == torch.float64 else 1e-5


def residual_allowed(dtype: torch.dtype, n: int, rtol: float | None = None) -> float:
    """Relative residual that a converged solve may have: ten times its tolerance, and the rounding of A itself.

    The products are made in the dtype of A: their rounding, at most n eps ||A|| ||u||, acts like a change of A by
    n eps.
    """
    return SLACK * (default_rtol(dtype) if rtol is None else rtol) + 8 * n * torch.finfo(dtype).eps
