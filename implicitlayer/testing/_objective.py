"""Whether autograd's derivatives of the objective are those of its values: no solver, no layer."""

# A custom autograd.Function with a wrong backward, a detached theta, a value that goes through NumPy: the layer then
# differentiates another objective than the one the solver minimises. Three differences tell, each with a step of
# eps^(1/3), since there is only rounding to compete with:
#     f along a direction in x, away from the solution (at the solution the gradient is zero, with either sign)
#     F along a direction in x, against H
#     F along a direction in every theta leaf, against B

from __future__ import annotations

import math
from dataclasses import replace

import torch

from implicitlayer.testing import _differences as differences
from implicitlayer.testing._modes import RANDOM, Check
from implicitlayer.testing._references import ROUNDINGS, plain
from implicitlayer.testing._report import ROUNDING, GradientRow, Place, compare

DOMAIN = "the step leaves the domain"
_RETRIES = 5
_SHORTER = 32.0
# A tenth of a difference is what its own truncation may be; a third is no straight line.
_BEND = 0.3


def check_objective(check: Check) -> None:
    """Rows of mode "objective"; none above the limit of unknowns."""
    equation, system, accuracy = check.equation, check.system, check.accuracy
    if system is None:
        return
    step = equation.eps ** (1 / 3)
    direction = check.random(equation.num_unknowns) * accuracy.size / equation.num_unknowns**0.5
    small = ROUNDINGS * equation.eps
    theta_terms = [
        m.abs() @ plain(t).reshape(-1).abs() for m, t in zip(system.mixed, equation.theta, strict=True) if m is not None
    ]
    terms = torch.stack([system.matrix.abs() @ accuracy.x.abs() + system.matrix.abs() @ direction.abs(), *theta_terms])
    noise = small * terms.sum(0)

    def equation_along_x(h: float) -> tuple[torch.Tensor, torch.Tensor]:
        return equation.residual_at(equation.split(accuracy.x + h * direction), equation.theta), noise

    _add(check, "x", equation_along_x, system.matrix @ direction, step)
    for j, name in enumerate(equation.names):
        d = check.directions[j][0][1]

        def equation_along_theta(h: float, j: int = j, d: torch.Tensor = d) -> tuple[torch.Tensor, torch.Tensor]:
            return equation.residual_at(accuracy.leaves, check.moved({j: d}, h)), noise

        mixed = system.mixed[j]
        _add(check, name, equation_along_theta, torch.zeros_like(noise) if mixed is None else mixed @ d, step)
    if equation.kind == "argmin":
        away = accuracy.x + 0.1 * direction
        quadratic = float(away.abs() @ system.matrix.abs() @ away.abs())  # terms that may cancel in f

        def value_along_x(h: float) -> tuple[torch.Tensor, torch.Tensor]:
            x = equation.tree(equation.split(away + h * direction))
            with torch.no_grad():
                value = plain(equation.function(x, *equation.arguments(equation.theta))).sum()
            return value[None], small * (value.abs()[None] + quadratic)

        try:
            slope = torch.dot(equation.residual_at(equation.split(away), equation.theta), direction)
        except Exception:  # as in _add
            check.rows.append(_outside("x (value)"))
        else:
            _add(check, "x (value)", value_along_x, slope[None], step)


def _add(check: Check, name: str, sample: differences.Sample, autograd: torch.Tensor, step: float) -> None:
    """The row of one comparison; a failure is believed where the sample is straight between the steps.

    NOTE [domain] A step across a pole or a barrier gives a difference of two branches, which can be finite and agree
    with that of twice the step. But then the forward and the backward difference do not agree at all. Smaller steps
    are tried; where none stays inside, or rounding comes first, the row is inconclusive.
    """
    if not bool(autograd.isfinite().all()):
        return
    row = _outside(name)
    left = False
    for _ in range(_RETRIES):
        try:
            found = differences.central(sample, step, check.equation.eps, rounds=3)
        except Exception:  # an objective may refuse what is outside its domain, with any error
            found = None
        if found is not None:
            row = _row(name, found, autograd)
            if row.status != "failed" or _straight(sample, found):
                break
        left, step = True, (step if found is None else found.step) / _SHORTER
    else:
        row = replace(row, status="inconclusive")
    if left and row.status == "inconclusive":
        row = replace(row, dominating=DOMAIN)
    elif row.status == "inconclusive":  # a derivative too small for the rounding of its values says nothing
        return
    check.rows.append(row)


def _outside(name: str) -> GradientRow:
    nan = math.nan
    return GradientRow(name, RANDOM, "objective", "differences", nan, nan, 0.0, nan, "inconclusive", DOMAIN)


def _row(name: str, found: differences.Difference, autograd: torch.Tensor) -> GradientRow:
    parts = differences.difference_errors(found.truncation, found.noise, ROUNDING)
    place, natural = Place(name, lambda i: RANDOM, "objective", "differences"), autograd.norm() + found.value.norm()
    return compare(place, found.value, autograd, parts, float(natural), resolved=found.resolved)


def _straight(sample: differences.Sample, found: differences.Difference) -> bool:
    """Whether the forward and the backward difference agree, up to what rounding does (its bound has room of 10)."""
    before, here, after = (sample(h)[0] for h in (-found.step, 0.0, found.step))
    ahead, behind = (after - here) / found.step, (here - before) / found.step
    bend = float((ahead - behind).norm())
    return bend <= max(_BEND * float(ahead.norm() + behind.norm()), 0.1 * float(found.noise.norm()))
