"""How a solve ended. Each status carries its help text; the order is the order of severity."""

from __future__ import annotations

import enum


class Status(enum.IntEnum):
    """How a linear or inner solve ended; ``help`` says what to do about it.

    Attributes:
        ok: whether this is success. What was asked for is a choice, not a failure: a step limit, a truncation.
        usable: whether the value is still an approximation of the answer (with a known residual).
    """

    ok: bool
    usable: bool

    CONVERGED = 0
    STEP_LIMIT = 1
    TRUNCATED = 2
    MAX_STEPS_REACHED = 3
    ILL_CONDITIONED = 4
    STAGNATED = 5
    SINGULAR = 6
    INDEFINITE = 7
    DIVERGED = 8
    NONFINITE = 9

    def __str__(self) -> str:
        return self.name

    __format__ = enum.Enum.__format__  # by str(), where Python 3.11 would give the number

    @property
    def help(self) -> str:
        """One or two sentences: what happened and what to do."""
        return self.advice(True)

    def advice(self, damps: bool) -> str:
        """The same; ``damps``: whether damping= and curvature= are arguments of what is at hand."""
        words = {"damping": ", or add damping", "damp": "add damping, ", "gauss": ", or Gauss-Newton curvature"}
        return _HELP[self].format(**{key: word * damps for key, word in words.items()})


_HELP = {
    Status.CONVERGED: "The requested tolerance was reached.",
    Status.STEP_LIMIT: "All requested steps were made; no tolerance was asked for.",
    Status.TRUNCATED: "Negative curvature was met, and the iteration was cut off before it, as asked for.",
    Status.MAX_STEPS_REACHED: (
        "The step limit came before the tolerance. Raise max_steps, loosen rtol, precondition, or ask for a fixed "
        "number of steps (max_steps alone) if a truncated solve is what you want."
    ),
    Status.ILL_CONDITIONED: (
        "The tolerance was reached, but the matrix is so ill-conditioned (by its Ritz values) that a residual this "
        "small still leaves an error above 10 %. Use float64 or a smaller rtol, or precondition{damping}."
    ),
    Status.STAGNATED: (
        "The true residual stopped falling above the tolerance: the problem is too ill-conditioned for this dtype, "
        "or a part of it works in a shorter one. Use float64 throughout, or loosen rtol{damping}."
    ),
    Status.SINGULAR: (
        "The matrix is singular to working precision and the right-hand side has a part outside its range (or the "
        "iteration broke down on it), so the solution is not a differentiable function of theta. Add regularisation, "
        "or remove the free direction from the unknowns{damping}."
    ),
    Status.INDEFINITE: (
        "The matrix is not positive definite here. Solve the inner problem more tightly (a minimum has no negative "
        "curvature), {damp}or use il.Minres() if a saddle point is intended{gauss}."
    ),
    Status.DIVERGED: (
        "The residual did not fall below that of the zero vector. The matrix is not positive definite or not "
        "symmetric, or far too ill-conditioned for this dtype: use another linear solver, or float64{damping}."
    ),
    Status.NONFINITE: (
        "A product with the matrix returned NaN or Inf. The objective is not twice differentiable at the solution, "
        "or a theta is not finite."
    ),
}
for _status in Status:
    _status.ok, _status.usable = _status <= Status.TRUNCATED, _status <= Status.STAGNATED
