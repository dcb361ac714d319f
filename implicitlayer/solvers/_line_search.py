"""Line search for many problems at once: every lane is a small state machine that is told one trial at a time."""

# Along one direction d: phi(a) = f(x + a d), value phi(a), slope phi'(a) = grad f(x + a d)'d; phi'(0) < 0.
# All tensors are float64 [*lanes].

from __future__ import annotations

import math

import torch

from implicitlayer.solvers._outcome import NOISE

Numbers = tuple[torch.Tensor, ...]
Pair = tuple[torch.Tensor, torch.Tensor]

DECREASE = 1e-4  # c1 of the sufficient decrease: the usual choice, Nocedal & Wright, section 3.1
MAX_TRIALS = 30  # objectives met in one search; a search that works takes one to five
_UNMOVED = 0.9  # of the slope at 0
_GROWTH = 4.0  # largest growth of a trial, to the power of the number of trials made: 4, 16, 64, ...
# The value of a quadratic changes by the mean of both slopes times the step. A function is taken for one where that
# holds to a millionth, which the last steps to a smooth minimum do not, and what rounding hides is not asked.
_QUADRATIC, _ROUNDING, _TOLD = 1e-6, 16, 1e-3
_FAR = 100.0  # the minimum of such a quadratic, in units of the trial, is still believed
_EXACT = 0.1  # of the slope at 0: what is left of it is worth no further trial


class LineSearch:
    """Steps a > 0 with ``phi(a) <= phi(0) + c1 a phi'(0)`` and ``|phi'(a)| <= curvature |phi'(0)|``, lane by lane.

    With ``curvature`` infinite the first test alone counts (Armijo: the step is cut back, never lengthened); with
    0 < c1 < curvature < 1 these are the strong Wolfe conditions, and the step is also lengthened.

    Near a minimum both sides of the first test differ by rounding errors only. A trial whose value lies within those
    of phi(0) passes by its slope: ``phi'(a) <= (2 c1 - 1) phi'(0)``, the same test where phi is a quadratic. Once a
    search has been cut back the slope must also have changed, or a step that changes nothing would pass.

    Each search keeps a best trial ``low`` and, once one is known, the other end ``high`` of an interval that holds
    acceptable steps; the next trial is the minimum of the cubic through both, or longer while there is no ``high``.
    After ``MAX_TRIALS`` it takes ``low``, and fails where that is still 0.

    With ``exact_on_quadratics``, a first trial that would do but leaves more than a tenth of the slope is followed by
    one at the minimum, where the values show that phi is a quadratic: a method of conjugate directions then ends after
    as many steps as there are unknowns.

    Source: Nocedal & Wright, Numerical Optimization, 2006, algorithms 3.5 and 3.6, merged into one rule (no interval
    yet is an interval that ends at infinity); the test at rounding level: Hager & Zhang 2005 (SIAM J. Optim. 16).
    """

    STATE: tuple[str, ...] = ("quadratic", "step", "trials", "value", "slope", "low", "high", "settling")

    def __init__(self, like: torch.Tensor, eps: float, curvature: float, *, exact_on_quadratics: bool = False) -> None:
        zero, never = torch.zeros_like(like), torch.zeros_like(like, dtype=torch.bool)
        self.eps, self.curvature, self.exact_on_quadratics = eps, curvature, exact_on_quadratics
        self.quadratic = never  # as far as the last search could tell
        self.step = zero  # the trial to be evaluated next; in an accepted lane, the step that was accepted
        self.trials = zero  # trials evaluated in the current search
        self.value, self.slope = zero, zero  # at 0
        self.low: Numbers = (zero, zero, zero)  # step, value, slope
        self.high: Numbers = (zero, zero, zero)
        self.settling = never  # the next trial is low again, to be taken whatever it is
        self.longest: torch.Tensor | None = None  # no step is longer; one of this length need not lose its slope

    def start(self, lanes: torch.Tensor, value: torch.Tensor, slope: torch.Tensor, step: torch.Tensor) -> None:
        """Begin a new search in some lanes: value and slope at 0, first trial."""
        zero = torch.zeros_like(step)
        unknown = torch.full_like(step, math.inf)
        self.step = torch.where(lanes, step, self.step)
        self.trials = torch.where(lanes, zero, self.trials)
        self.value = torch.where(lanes, value, self.value)
        self.slope = torch.where(lanes, slope, self.slope)
        self.low = _where(lanes, (zero, value, slope), self.low)
        self.high = _where(lanes, (unknown, unknown, unknown), self.high)
        self.settling = self.settling & ~lanes

    def limit(self, longest: torch.Tensor) -> None:
        """No step of the searches that go on is longer."""
        self.longest, self.step = longest, torch.minimum(self.step, longest)

    def advance(self, value: torch.Tensor, slope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Value and slope at the trial ``step``; returns the lanes that accept it and those that give up, [*lanes].

        In all others ``step`` is the next trial.
        """
        trial = (self.step, value, slope)
        low, high = self.low, self.high
        self.trials = self.trials + 1
        finite = value.isfinite() & slope.isfinite()
        noise = NOISE * self.eps * self.value.abs()  # what rounding may do to a value of this size
        by_value = (value < self.value) & (value <= self.value + DECREASE * self.step * self.slope)
        by_slope = ((value - self.value).abs() <= noise) & (slope <= (2 * DECREASE - 1) * self.slope)
        # a step cut back until nothing changes proves nothing: its slope must have moved, too
        by_slope = by_slope & (high[0].isinf() | (slope >= _UNMOVED * self.slope))
        better = finite & (by_value | by_slope) & (value <= low[1] + noise)
        accepted = (better & (slope.abs() <= self.curvature * self.slope.abs())) | self.settling
        # phi rises from the better trial towards high: the minimum lies between it and the old low
        turned = better & (slope * (high[0] - low[0]) >= 0)
        self.high = _where(better, _where(turned, low, high), trial)
        self.low = _where(better, trial, low)
        following = torch.where(self.high[0].isfinite(), self._inside(noise), self._beyond(low, trial))
        if self.longest is not None:
            accepted = accepted | (better & (trial[0] >= self.longest))
            following = torch.minimum(following, self.longest)
        exhausted = ~accepted & (self.trials >= MAX_TRIALS)
        failed = exhausted & (self.low[0] == 0)
        self.settling = exhausted & ~failed
        following = torch.where(self.settling, self.low[0], following)
        if self.exact_on_quadratics:
            first = (self.trials == 1) & finite
            self.quadratic = torch.where(first, self._is_quadratic(trial), self.quadratic)
            # slopes of a quadratic change evenly, so their root is known
            root = trial[0] * self.slope / (self.slope - slope)
            again = first & self.quadratic & (slope.abs() > _EXACT * self.slope.abs())
            again = again & (root > 0) & (root <= _FAR * trial[0])
            following = torch.where(again, root, following)
            accepted = accepted & ~again
        self.step = torch.where(accepted, self.step, following)
        return accepted, failed

    def _is_quadratic(self, trial: Numbers) -> torch.Tensor:
        """Whether a first trial looks like that; where rounding hides it, as before."""
        change = trial[0] * self.slope
        rounding = _ROUNDING * self.eps * (self.value.abs() + trial[1].abs() + change.abs())
        difference = (trial[1] - self.value - 0.5 * trial[0] * (self.slope + trial[2])).abs()
        even = difference <= _QUADRATIC * change.abs() + rounding
        return torch.where(rounding <= _TOLD * change.abs(), even, self.quadratic & even)

    def _beyond(self, previous: Numbers, trial: Numbers) -> torch.Tensor:
        """A longer trial: where the slope would vanish if it went on changing as between the last two trials."""
        change = trial[2] - previous[2]
        root = trial[0] - trial[2] * (trial[0] - previous[0]) / change
        root = torch.where(change > 0, root, math.inf)
        return torch.minimum(torch.maximum(root, 2 * trial[0]), _GROWTH**self.trials * trial[0])

    def _inside(self, noise: torch.Tensor) -> torch.Tensor:
        """A trial between low and high, from the cubic through both where it can be trusted."""
        (a, f_a, s_a), (b, f_b, s_b) = self.low, self.high
        h = b - a
        # t in (0, 1) is the share of the way from low to high. The cubic: Nocedal & Wright, equation (3.59).
        d1 = s_a + s_b - 3 * (f_b - f_a) / h
        d2 = torch.sign(h) * (d1 * d1 - s_a * s_b).sqrt()
        cubic = 1 - (s_b + d2 - d1) / (s_b - s_a + 2 * d2)
        quadratic = -s_a * h / (2 * (f_b - f_a - s_a * h))
        t = torch.where((cubic > 0) & (cubic < 1), cubic, quadratic)
        secant = s_a / (s_a - s_b)  # values that differ by rounding say nothing, slopes still do
        t = torch.where(((f_b - f_a).abs() <= noise) & (s_a * s_b < 0), secant, t)
        least = torch.where(a == 0, 0.1 ** (self.trials + 1), 0.1)  # a first trial may be too long by any factor
        t = torch.minimum(torch.maximum(t, least), torch.full_like(t, 0.9))
        t = torch.where(f_b.isfinite() & (t > 0) & (t < 1), t, torch.where(a == 0, 0.1**self.trials, 0.5))
        return a + t * h


def _where(lanes: torch.Tensor, new: Numbers, old: Numbers) -> Numbers:
    return tuple(torch.where(lanes, n, o) for n, o in zip(new, old, strict=True))
