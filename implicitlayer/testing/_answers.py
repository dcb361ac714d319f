"""Whether the solver solves the problem that is stated: it follows theta, and its answer is no other problem's."""

# NOTE [follows] N(h) = H^-1 F(x(h), theta + h d) is to first order the distance from the answer at theta + h d to the
# solution there. A solver that ignores d returns x(h) = x and has N(h) = -h J d: its error grows with h from nothing.
# A coarse solver looks the same where it is exact by chance, so three more things are asked:
#     exact at theta    its error e there is far below |h J d|
#     not by its init   it is as exact from another init, at the same theta
#     not by a grid     the answer stays where it is from |h| = 0.001 to |h| = 0.1
# An answer that moves, but with N(h) above a fiftieth of h J d at all these h, is that of another problem, or of one
# that is stated on fewer theta (symmetric matrices): inconclusive.
#
# NOTE [another problem] The answer x is off by H^-1 F; Newton's method from there leads to s, a solution of the problem
# as it is stated. Started at s,
#     a coarse solver        stays nearby: nothing is left to do
#     that of another one    comes back to x
#     one without a start    returns x to the bit, whatever it solves
# In the last case F decides. A coarse answer leaves something in all entries of F. One with another strength is
# stationary with other numbers for that theta, F(x, theta_j + delta) = 0: many equations, few numbers. One with a term
# in one unknown too many (the penalty of an intercept) leaves F in that entry alone.

from __future__ import annotations

import math

import torch

from implicitlayer.testing._differences import SAFE_NOISE
from implicitlayer.testing._modes import Check, entry_along
from implicitlayer.testing._references import DenseSystem, Leaves, flat, plain, scales
from implicitlayer.testing._report import GradientRow, Status, entry_of

_STEPS = (1e-3, -1e-3, 0.1, -0.1)
_FAR = 100.0  # what "far below" means
_ASTRAY = 0.02
_STUCK = 0.1  # of h J d: at h = 0.1 terms of second order take some of N away
_STILL = 1e-6  # in units of h J d: the movement of an answer that does not move
_RESTART = 0.1
_MAX_ENTRIES = 32
_MAX_ROWS = 4


def check_followed(check: Check) -> list[str]:
    """Rows of mode "solver" for leaves that the solver does not follow, and notes that name them. See NOTE [follows].

    Costs no solve unless the differences of the solver are as uncertain as the derivative itself.
    """
    system, notes = check.system, []
    if system is None or not system.condition < 0.1 / check.equation.eps:
        return []
    error: float | None = None
    for j, name in enumerate(check.equation.names):
        chosen = zip(check.directions[j], check.quotients[j], strict=True)
        speeds = [(q, float((system.jacobian(j) @ d).norm())) for (_, d), q in chosen if q is not None]
        if not any(speed > 0 and float(q.noise.norm()) >= _ASTRAY * speed for q, speed in speeds):
            continue
        error = _error_at_theta(check, system) if error is None else error
        whole = _follow(check, system, j, error, *check.directions[j][0])
        rows, labels = [] if whole is None else [whole], []
        if whole is None or whole.status == "inconclusive":
            single = [(label, _follow(check, system, j, error, label, d)) for label, d in _entries(check, j)]
            failed = [(label, row) for label, row in single if row is not None and row.status == "failed"][:_MAX_ROWS]
            labels, rows = [label for label, _ in failed], [row for _, row in failed] or rows
        check.rows += rows
        if any(row.status == "failed" for row in rows):
            where = f" in {', '.join(labels)}" if labels else ""
            notes.append(
                f"The solver does not follow {name}{where}: its answer is exact at theta, and stays the same where "
                "theta moves and it is a solution no more. The solver ignores that argument, closes over a value of "
                "it, or reads a part of it only, such as one triangle of a symmetric matrix (let it symmetrise)."
            )
    return notes


def _entries(check: Check, j: int) -> list[tuple[str, torch.Tensor]]:
    """All entries of a small leaf, one at a time; of a large one those that were chosen."""
    size = scales(check.equation.theta[j])
    if not 1 < len(size) <= _MAX_ENTRIES:
        return check.directions[j][1:]
    name = entry_of(check.equation.theta[j].shape)
    return [(name(i), row) for i, row in enumerate(torch.diag(size))]


def _distance(check: Check, system: DenseSystem, x: Leaves, theta: Leaves) -> torch.Tensor:
    return system.inverse @ check.equation.residual_at(x, theta)


def _error_at_theta(check: Check, system: DenseSystem) -> float:
    """The larger of the errors from init and from another one, in units of x; infinite where the solver fails there."""
    accuracy, equation = check.accuracy, check.equation
    shift = _RESTART * accuracy.size * check.random(equation.num_unknowns) / equation.num_unknowns**0.5
    for start in (flat(equation.init) + shift, flat(equation.init) - shift, flat(equation.init) + shift.abs()):
        try:
            error = float(_distance(check, system, check.restarted(equation.split(start)), equation.theta).norm())
        except Exception:  # the start may be outside the domain of the objective: another one is tried
            continue
        if math.isfinite(error):
            return max(error, accuracy.error)
    return math.inf


def _follow(check: Check, system: DenseSystem, j: int, known: float, label: str, d: torch.Tensor) -> GradientRow | None:
    """What is wrong along d, of the entry of x that should move most, given the error at theta.

    None where nothing is wrong, or where nothing can be said.
    """
    accuracy, velocity = check.accuracy, system.jacobian(j) @ d
    speed = float(velocity.norm())
    unit = 1 / max(speed / accuracy.size, 1.0)  # x moves by a tenth of its size at most, see NOTE [step]
    if not _FAR * known <= min(abs(h) for h in _STEPS) * unit * speed:
        return None
    entry = int(velocity.abs().argmax())
    moved, still = 0.0, True
    for h in _STEPS:
        theta, expected = check.moved({j: d}, h * unit), abs(h) * unit * speed
        try:
            leaves = check.answer(theta)
            error = float(_distance(check, system, leaves, theta).norm())
        except Exception:  # any solver may refuse a theta nearby, with any error
            return None
        change = flat(leaves) - accuracy.x
        if not error >= _ASTRAY * expected:
            return None
        still = still and error >= _STUCK * expected and float(change.norm()) <= _STILL * expected + 2 * known
        if h == _STEPS[0]:
            moved = float(change[entry]) / (h * unit)
    tolerance = SAFE_NOISE * known / (_STEPS[0] * unit)
    name, expected = check.equation.names[j], float(velocity[entry])
    status: Status = "failed" if still else "inconclusive"
    why = f"the solver does not follow {name}" if still else "the solver follows another problem"
    place = (name, entry_along(check, label)(entry), "solver", "dense")
    return GradientRow(*place, expected, moved, abs(moved - expected), tolerance, status, why)


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
        if _FEW * mixed.shape[1] > len(residual):
            continue
        delta = torch.linalg.lstsq(mixed, -residual[:, None], driver="gelsd").solution[:, 0]
        moved = check.moved({j: delta}, 1.0)
        if float(equation.residual_at(check.accuracy.leaves, moved).norm()) <= allowed:
            numbers = ", ".join(f"{number:.4g}" for number in plain(moved[j]).reshape(-1)[:4].tolist())
            return f"the answer is stationary with {name} = {numbers}{', ...' if len(delta) > 4 else ''} instead"
    return None
