"""How exact the solver is, and central differences of it with a step and a tolerance that follow from that."""

# NOTE [step] With e the error of the solver's answer relative to its size and a relative step h in theta, a central
# difference errs by about h^2 (truncation) plus e / h (the solver). The sum is least near h = e^(1/3). From there the
# step moves until neither part is far above the other. Both are measured, not assumed:
#     truncation   D(2h) - D(h) = 3 c h^2 + O(h^4), so c h^2 = (D(2h) - D(h)) / 3
#     the solver   at each displaced answer, H^-1 F: to first order its distance from the solution there
# gradcheck's h = 1e-6 with a solver good to 1e-8 leaves two digits of noise; h = 2e-3 leaves five of signal.

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from implicitlayer.testing._references import DenseSystem, Equation, Leaves, flat, plain
from implicitlayer.testing._report import TRUNCATION

DENSE_LIMIT = 200
_LARGEST_STEP = 0.1
_ROUNDS = 5
_RESOLVED = 0.03
_GOOD = 1e-6
# Safety factors on the two measured parts of the error.
SAFE_TRUNCATION, SAFE_NOISE = 3.0, 2.0


@dataclass(frozen=True, eq=False)
class Accuracy:
    """The solver's answer and how far it is from the solution.

    Attributes:
        leaves: x as the solver returned it.
        x: the same, flat, float64.
        system: dense F, H and B there; None above the limit of unknowns.
        corrected: the same one Newton step closer to the solution; None where that is no other point.
        norm: of F.
        spread: [n], difference of two runs.
        error: distance to the solution, in units of x.
        size: max(||x||, ||x - init||).
    """

    leaves: Leaves
    x: torch.Tensor
    system: DenseSystem | None
    corrected: DenseSystem | None
    norm: float
    spread: torch.Tensor
    error: float
    size: float

    @property
    def relative(self) -> float:
        return self.error / self.size

    @classmethod
    def measure(
        cls, equation: Equation, answer: Callable[[Leaves], Leaves], again: Callable[[Leaves], Leaves]
    ) -> Accuracy:
        """``again`` solves once more, for n above the limit from a slightly different start."""
        leaves = answer(equation.init)
        x, start = flat(leaves), flat(equation.init)
        size = max(float(x.norm()), float((x - start).norm())) or 1.0
        dense = equation.num_unknowns <= DENSE_LIMIT
        if dense:
            spread = (flat(again(equation.init)) - x).abs()
        else:
            moved = start + 1e-3 * size / len(x) ** 0.5 * torch.cos(torch.arange(len(x), dtype=x.dtype))
            spread = (flat(again(equation.split(moved))) - x).abs()
        system = corrected = None
        if dense:
            system = DenseSystem.at(equation, leaves, equation.theta)
            step = system.newton_step
            norm, distance = float(system.residual.norm()), float(step.norm())
            if distance > 1e-14 * size and bool(step.isfinite().all()):
                corrected = DenseSystem.at(equation, equation.split(x - step), equation.theta)
        else:
            norm, distance = _lower_bound(equation, leaves)
        error = max(distance, float(spread.norm()), equation.eps * size)
        return cls(leaves, x, system, corrected, norm, spread, error, size)

    # The layer differentiates at the answer, a difference at the solution. What lies between is measured by J at the
    # answer against J one Newton step on.

    def coarse_vjp(self, j: int, cotangent: torch.Tensor) -> torch.Tensor:
        """What the distance from the solution does to J'v, [m]."""
        if self.system is None:
            return torch.zeros(())
        if self.corrected is None:
            return cotangent.new_zeros(self.system.mixed[j].shape[1])
        return (self.system.vjp(j, cotangent) - self.corrected.vjp(j, cotangent)).abs()

    def coarse_jvp(self, j: int, tangent: torch.Tensor) -> torch.Tensor:
        """What the distance from the solution does to J t, [n]."""
        if self.system is None or self.corrected is None:
            return torch.zeros_like(self.x)
        return ((self.system.jacobian(j) - self.corrected.jacobian(j)) @ tangent).abs()


def _lower_bound(equation: Equation, leaves: Leaves) -> tuple[float, float]:
    """||F|| and ||F||^2 / ||H'F||, below the distance to the solution; from one more backward."""
    x = [t.detach().requires_grad_() for t in leaves]
    with torch.enable_grad():
        residual = equation.residual(x, equation.theta)
    norm = float(plain(residual).norm())
    if not residual.requires_grad or norm == 0:
        return norm, 0.0
    product = flat(torch.autograd.grad(residual, x, residual.detach(), materialize_grads=True))
    return norm, norm**2 / max(float(product.norm()), 1e-300)


@dataclass(frozen=True, eq=False)
class Difference:
    """D, its truncation and the solver's part, each [n] (or 0-d), in units of x; the direction carries theta's."""

    value: torch.Tensor
    truncation: torch.Tensor
    noise: torch.Tensor
    step: float

    @property
    def uncertainty(self) -> float:
        """The error that it may have, over its size."""
        error = SAFE_TRUNCATION * self.truncation + SAFE_NOISE * self.noise
        return float(error.norm()) / max(float(self.value.norm()), 1e-300)

    @property
    def resolved(self) -> bool:
        """Whether D(h) and D(2h) agree to a tenth, up to noise; else the steps are too long for their own estimate.

        Beyond a singularity two differences can agree far better with each other than with the derivative.
        """
        truncation, noise = float(self.truncation.norm()), float(self.noise.norm())
        return truncation <= _RESOLVED * float(self.value.norm()) or truncation <= 4 * noise


def difference_errors(truncation: torch.Tensor, noise: torch.Tensor, noise_name: str) -> dict[str, torch.Tensor]:
    """What a difference may be off by its two parts, with room."""
    return {TRUNCATION: SAFE_TRUNCATION * truncation, noise_name: SAFE_NOISE * noise}


Sample = Callable[[float], tuple[torch.Tensor, torch.Tensor]]


def central(sample: Sample, step: float, eps: float, rounds: int = _ROUNDS) -> Difference | None:
    """The derivative of ``sample`` at 0, at the best of a few steps; None where it cannot be evaluated.

    ``sample(h)`` returns the value at h and the uncertainty of that value, both of one shape. See NOTE [step].
    """
    best: Difference | None = None
    tried: set[float] = set()
    for _ in range(rounds):
        tried.add(step)
        found = _at_step(sample, step, eps)
        if found is None:
            step /= 8
            continue
        if best is None or (found.resolved, -found.uncertainty) > (best.resolved, -best.uncertainty):
            best = found
        if best.resolved and best.uncertainty <= _GOOD:
            break
        truncation, noise = found.truncation.norm(), found.noise.norm()
        if truncation > 4 * noise:
            step /= 4 if found.resolved else 32
        elif noise > 30 * truncation and 4 * step <= _LARGEST_STEP:
            step *= 4
        else:
            break
        if step in tried:
            break
    return best


def _at_step(sample: Sample, h: float, eps: float) -> Difference | None:
    values = {}
    for at in (h, -h, 2 * h, -2 * h):
        value, noise = sample(at)
        if not bool(value.isfinite().all()):
            return None
        values[at] = value, noise
    near = (values[h][0] - values[-h][0]) / (2 * h)
    far = (values[2 * h][0] - values[-2 * h][0]) / (4 * h)
    # theta + h d is rounded, and so is x
    rounding = 2 * eps / h * (near.abs() + values[h][0].abs())
    return Difference(near, (far - near).abs() / 3, (values[h][1] + values[-h][1]) / (2 * h) + rounding, h)


@dataclass(eq=False)
class SolverDifferences:
    equation: Equation
    answer: Callable[[Leaves], Leaves]
    accuracy: Accuracy

    def first_step(self, direction: dict[int, torch.Tensor]) -> float:
        """e^(1/3), relative to theta, or to x where x moves faster than theta."""
        accuracy, system = self.accuracy, self.accuracy.system
        step: float = min(max(accuracy.relative, self.equation.eps) ** (1 / 3), _LARGEST_STEP)
        if system is None:
            return step
        moved = torch.stack([system.jacobian(j) @ d for j, d in direction.items()]).sum(0)
        speed = float(moved.norm()) / accuracy.size
        return step / max(speed, 1.0) if math.isfinite(speed) else step

    def moved(self, direction: dict[int, torch.Tensor], h: float) -> Leaves:
        """theta + h d; ``direction`` maps leaf numbers to flat float64 tensors."""
        theta = list(self.equation.theta)
        for j, d in direction.items():
            like = theta[j]
            theta[j] = (plain(like) + h * d.reshape(like.shape)).to(like)
        return theta

    def along(self, direction: dict[int, torch.Tensor]) -> Difference | None:
        """D of the solver's answer; None where the solver fails nearby."""
        accuracy = self.accuracy
        floor = accuracy.spread if accuracy.system is not None else torch.full_like(accuracy.x, accuracy.error)

        def sample(h: float) -> tuple[torch.Tensor, torch.Tensor]:
            theta = self.moved(direction, h)
            try:
                leaves = self.answer(theta)
            except Exception:  # any solver may refuse a theta nearby, with any error: a smaller step is tried then
                return accuracy.x * torch.nan, floor
            if accuracy.system is None:
                return flat(leaves), floor
            newton = accuracy.system.inverse @ self.equation.residual_at(leaves, theta)
            return flat(leaves), newton.abs() + floor

        return central(sample, self.first_step(direction), self.equation.eps)
