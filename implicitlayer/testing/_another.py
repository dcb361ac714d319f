"""Whether an answer that is not stationary is a coarse one, or a solution of another problem."""

# NOTE [another problem] The answer x is off by H^-1 F; Newton's method from there leads to s, a solution of the problem
# as it is stated. Started at s,
#     a coarse solver        stays nearby: nothing is left to do
#     that of another one    comes back to x
#     one without a start    returns x to the bit, whatever it solves
# In the last case F decides. A coarse answer leaves something in all entries of F. One with another strength is
# stationary with other numbers for that theta, F(x, theta_j + delta) = 0: many equations, few numbers. One with a term
# in one unknown too many (the penalty of an intercept) leaves F in that entry alone.

from __future__ import annotations

import torch

from implicitlayer.testing._modes import Check
from implicitlayer.testing._references import DenseSystem, Leaves, flat, plain

ANOTHER = "another problem"
UNKNOWN = "coarse solver or another problem"
_LOOK = (
    "Look for what one of them has and the other has not: a penalised intercept, another strength or scaling, a "
    "forgotten nonlinearity. More steps, a smaller tolerance or polish= do not cure that."
)
_CLEAR = 100.0  # roundings of x: an error below says nothing
_NEWTON_STEPS = 30
_SOLVED = 1e-6  # of F at x
_BACK = 0.1  # of the way from x to s
_FORM = 1e-4  # of F may be outside of its form
_FEW = 3  # equations for each number that is fitted


def another_problem(check: Check, stationary: bool) -> tuple[str, str] | None:
    """What the answer is if not, or not surely, a coarse one: in two words for a row, and in a note; else None.

    Costs one solve. See NOTE [another problem].
    """
    accuracy, system, eps = check.accuracy, check.system, check.equation.eps
    if system is None or not system.condition < 0.1 / eps or not accuracy.relative > _CLEAR * eps:
        return None
    solution = _solution(check)
    if solution is None:
        return None
    try:
        again = flat(check.restarted(check.equation.split(solution)))
    except Exception:  # a solver may refuse any start, with any error
        return None
    off = float((again - accuracy.x).norm())
    if not off <= _BACK * float((solution - accuracy.x).norm()):
        return None
    how = "started at a solution of it, it comes back to this answer" if off > 0 else _form(check, system)
    if how is not None:
        return ANOTHER, f"The solver solves another problem than the objective states: {how}. {_LOOK}"
    if stationary:
        return None
    return UNKNOWN, (
        f"The solver's answer is not stationary (‖F‖ = {accuracy.norm:.2e}), and it is the same from every start, a "
        "solution of the stated problem among them. Ask the solver for more (steps, a smaller tolerance): if the "
        f"answer stays where it is, it is that of another problem than the objective states. {_LOOK}"
    )


def _solution(check: Check) -> torch.Tensor | None:
    """A solution near the answer by Newton's method, [n]; None where that does not get there."""
    equation, x, system = check.equation, check.accuracy.x, check.system
    for _ in range(_NEWTON_STEPS):
        if system is None or not bool(system.residual.isfinite().all()):
            return None
        if float(system.residual.norm()) <= _SOLVED * check.accuracy.norm:
            return x
        x = x - system.newton_step
        system = DenseSystem.at(equation, equation.split(x), equation.theta, mixed=False)
    return None


def _form(check: Check, system: DenseSystem) -> str | None:
    equation, residual = check.equation, system.residual
    allowed = _FORM * check.accuracy.norm
    if len(residual) < _FEW:
        return None
    largest = int(residual.abs().argmax())
    if float(torch.cat([residual[:largest], residual[largest + 1 :]]).norm()) <= allowed:
        return f"its gradient there is zero but for the entry of {equation.entry(largest)}"
    for j, (name, mixed) in enumerate(zip(equation.names, system.mixed, strict=True)):
        if mixed is None or _FEW * mixed.shape[1] > len(residual):
            continue
        delta = torch.linalg.lstsq(mixed, -residual[:, None], driver="gelsd").solution[:, 0]
        moved: Leaves = list(equation.theta)
        like = moved[j]
        moved[j] = (plain(like) + delta.reshape(like.shape)).to(like)
        if float(equation.residual_at(check.accuracy.leaves, moved).norm()) <= allowed:
            numbers = ", ".join(f"{number:.4g}" for number in plain(moved[j]).reshape(-1)[:4].tolist())
            return f"the answer is stationary with {name} = {numbers}{', ...' if len(delta) > 4 else ''} instead"
    return None
