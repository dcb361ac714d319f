"""The result of a gradient check: rows of comparisons, the verdict, and the text that names the biggest offender."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch

Status = Literal["ok", "inconclusive", "failed"]
TRUNCATION = "truncation of the difference"
COARSE = "coarse solver"
LINEAR = "linear solve"
ROUNDING = "rounding"
GRADIENT = "the gradient itself"

# A comparison whose tolerance is a tenth of the number itself has no digit.
_NO_DIGIT = 0.1
# Where both numbers vanish within the tolerance, it must be this small against the natural size of the derivative.
_ZERO_DIGITS = 1e-4
_SEVERITY: dict[str, int] = {"failed": 0, "inconclusive": 1, "ok": 2}
_SHOWN = 12


@dataclass(frozen=True)
class GradientRow:
    """One comparison: the worst entry of one leaf, in one mode, against one reference.

    Attributes:
        leaf: name of the theta leaf, such as ``theta[1]['w']``.
        entry: which entry of it (reverse mode) or of x (forward mode), or the direction of a difference.
        mode: ``"vjp"``, ``"jvp"``, ``"double"``, ``"vmap"``; ``"value"`` for the answer itself, ``"objective"`` for
            autograd's derivatives of the objective, ``"solver"`` for an answer that does not follow theta.
        reference: ``"dense"``, ``"differences"``, ``"adjoint"``, ``"loop"`` or ``"solver"``.
        expected, got: the two numbers, in units of x over theta.
        error: ``|got - expected|``.
        tolerance: sum of the errors that the comparison itself may have; computed, see :func:`check_argmin_gradients`.
        status: ``"ok"``, ``"failed"``, or ``"inconclusive"`` where the tolerance leaves no digit.
        dominating: the largest part of the tolerance; for a failed row what the error comes from.
    """

    leaf: str
    entry: str
    mode: str
    reference: str
    expected: float
    got: float
    error: float
    tolerance: float
    status: Status
    dominating: str

    @property
    def ratio(self) -> float:
        """Error over tolerance; above 1 is a failure, infinite for NaN."""
        if self.error == 0:
            return 0.0
        ratio = self.error / self.tolerance if self.tolerance > 0 else math.inf
        return math.inf if math.isnan(ratio) else ratio


@dataclass(frozen=True)
class GradientReport:
    """What :func:`check_argmin_gradients` found; ``str(report)`` is a table with the biggest offender first.

    Attributes:
        verdict: ``"passed"``, ``"inconclusive"``, or, in a :class:`GradientCheckError` only, ``"failed"``.
        rows: all comparisons, worst first.
        notes: what else is to be known: unused leaves, warnings of the layer, what to do.
        kind: ``"argmin"``, ``"root"`` or ``"fixed_point"``.
        num_unknowns: entries of x.
        stationarity_norm: norm of the gradient of the objective (of the residual) at the solver's answer.
        solver_error: measured distance of the solver's answer from the solution, in units of x.
        relative_error: the same over ``max(||x||, ||x - init||)``.
    """

    verdict: Literal["passed", "inconclusive", "failed"]
    rows: tuple[GradientRow, ...]
    notes: tuple[str, ...]
    kind: str
    num_unknowns: int
    stationarity_norm: float
    solver_error: float
    relative_error: float

    @property
    def failures(self) -> tuple[GradientRow, ...]:
        """The failed rows, worst first."""
        return tuple(row for row in self.rows if row.status == "failed")

    @property
    def worst(self) -> GradientRow | None:
        """The biggest offender; None if nothing was compared."""
        return self.rows[0] if self.rows else None

    def __str__(self) -> str:
        norm = "‖∇f‖" if self.kind == "argmin" else "‖residual‖"
        accuracy = (
            f"{norm} = {self.stationarity_norm:.2e} at the solver's answer, which is about {self.solver_error:.1e} "
            f"({self.relative_error:.1e} of its size) from the solution."
        )
        counts = [sum(row.status == s for row in self.rows) for s in ("ok", "inconclusive", "failed")]
        what = "an argmin" if self.kind == "argmin" else f"a {self.kind.replace('_', ' ')}"
        summary = (
            f"Gradient check of {what} of {self.num_unknowns} unknowns: {self.verdict} "
            f"({counts[0]} of {len(self.rows)} comparisons agree, {counts[1]} have no digit, {counts[2]} failed)."
        )
        lines = [accuracy, summary] if self.verdict == "inconclusive" else [summary, accuracy]
        if self.rows:
            lines += ["", *_table(self.rows)]
        if self.notes:
            lines += ["", *(f"- {note}" for note in self.notes)]
        return "\n".join(lines)


class GradientCheckError(AssertionError):
    """A derivative of the layer is wrong, or the layer raised; ``report`` holds all comparisons."""

    def __init__(self, report: GradientReport) -> None:
        super().__init__(report)
        self.report = report

    def __str__(self) -> str:
        return str(self.report)


def worst_first(rows: list[GradientRow]) -> tuple[GradientRow, ...]:
    """Failed rows, then inconclusive ones, then the rest; causes first, then by error over tolerance.

    A wrong objective or solver is why the other rows fail. That the layer raised is the last thing to look at: its
    message, torch's as a rule, speaks of where it broke and not of why.
    """

    def key(row: GradientRow) -> tuple[int, int, float]:
        cause = row.status == "failed" and row.mode in ("objective", "solver")
        return _SEVERITY[row.status], 0 if cause else 1 + (row.reference == "-"), -row.ratio

    return tuple(sorted(rows, key=key))


class Place(NamedTuple):
    """What a row is about: see :class:`GradientRow`; ``entry`` names entry i."""

    leaf: str
    entry: Callable[[int], str]
    mode: str
    reference: str


def compare(
    place: Place,
    expected: torch.Tensor,
    got: torch.Tensor,
    parts: Mapping[str, torch.Tensor],
    natural: float,
    explained: torch.Tensor | None = None,
    resolved: bool = True,
) -> GradientRow:
    """The row of the worst entry.

    Args:
        place: what is compared, with what.
        expected, got: float64, [k].
        parts: what the tolerance is made of, each [k] or 0-d.
        natural: size of such a derivative where x and theta have their own sizes; a zero is only judged against it.
        resolved: whether the reference can be believed within its tolerance; if not, nothing can fail.
        explained: [k], error that a linear solve with the recorded residual can have; tells the reason of a failure.
    """
    tolerance = torch.stack([part.expand_as(expected) for part in parts.values()]).sum(0)
    error = (got - expected).abs()
    ratio = torch.where(error == 0, 0.0, error / tolerance).nan_to_num(nan=math.inf, posinf=math.inf)
    i = int(ratio.argmax())
    size = float(torch.maximum(expected.norm(), got.norm()))
    known = float(tolerance.norm())
    status: Status = "ok"
    dominating = max(parts, key=lambda name: float(parts[name].expand_as(expected)[i]))
    if not resolved:
        status, dominating = "inconclusive", TRUNCATION
    elif float(ratio[i]) > 1:
        status = "failed"
        solve = explained is not None and 2 * float(explained.expand_as(expected)[i]) >= float(error[i])
        dominating = LINEAR if solve else GRADIENT
    elif known > _NO_DIGIT * size and not known <= _ZERO_DIGITS * natural:
        status = "inconclusive"
    numbers = (float(expected[i]), float(got[i]), float(error[i]), float(tolerance[i]))
    return GradientRow(place.leaf, place.entry(i), place.mode, place.reference, *numbers, status, dominating)


def entry_of(shape: torch.Size) -> Callable[[int], str]:
    """Names entry i of a tensor: ``[1, 2]``, nothing for a 0-d one."""
    return lambda i: str([int(k) for k in np.unravel_index(i, shape)]) if shape else ""


def _table(rows: tuple[GradientRow, ...]) -> list[str]:
    head = ("leaf", "entry", "mode", "reference", "expected", "got", "error", "tolerance", "status", "dominated by")
    shown = rows[: max(_SHOWN, min(2 * _SHOWN, sum(row.status == "failed" for row in rows)))]
    cells = [head]
    for row in shown:
        numbers = (f"{row.expected:.6g}", f"{row.got:.6g}", f"{row.error:.1e}", f"{row.tolerance:.1e}")
        cells.append((row.leaf, row.entry, row.mode, row.reference, *numbers, row.status, row.dominating))
    widths = [max(len(line[k]) for line in cells) for k in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    if len(rows) > len(shown):
        lines.append(f"... and {len(rows) - len(shown)} more")
    return lines
