"""Second derivatives in a gradient check: the gradient of a gradient against differences of the dense formula."""

# s(theta) = sum over leaves of <w, J'v>. Its derivative along d is taken twice over reverse mode, and forward over
# reverse, which use different rules: both must be the difference of s, where s comes from dense H and B at the
# solver's answers (above the limit of unknowns, from the layer's first derivative).

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from implicitlayer.testing import _differences as differences
from implicitlayer.testing._differences import Difference
from implicitlayer.testing._modes import RANDOM, SAFE_RTOL, Check, add_quotient, filled, total
from implicitlayer.testing._references import ROUNDINGS, DenseSystem, Leaves, flat, plain, scales
from implicitlayer.testing._report import COARSE, LINEAR, Place, compare

_SECOND_ORDER_LEAVES = 8
_DRAWS = 3
_ROUNDING_FLOOR = 10.0


@dataclass(frozen=True, eq=False)
class _Slope:
    """s for a fixed v and w, the sizes of its terms, added and in the 2-norm, and what rounding does to it."""

    check: Check
    v: torch.Tensor
    weights: list[torch.Tensor]
    size: float
    norm: float
    rounding: float = 0.0

    def dense(self, system: DenseSystem) -> torch.Tensor:
        return total(torch.dot(system.vjp(j, self.v), w) for j, w in enumerate(self.weights))

    def at(self, theta: Leaves) -> tuple[torch.Tensor, torch.Tensor]:
        """s and how far it may be off."""
        check, equation = self.check, self.check.equation
        if check.system is None:
            gradients = check.gradients(theta, self.v)
            value = total(torch.dot(g, w) for g, w in zip(gradients, self.weights, strict=True))
            # the signs of w are random: errors of the terms, which know nothing of them, add up in squares
            return value, 3 * check.fuzzy(self.norm) + 10 * check.accuracy.relative * self.norm
        leaves = check.answer(theta)
        system = DenseSystem.at(equation, leaves, theta)
        value, noise = self.dense(system), torch.tensor(self.rounding, dtype=self.v.dtype)
        step = system.newton_step
        if float(step.norm()) > 1e-14 * check.accuracy.size:
            nearer = DenseSystem.at(equation, equation.split(flat(leaves) - step), theta)
            noise = noise + (self.dense(nearer) - value).abs()
        return value, noise

    def along(self, direction: dict[int, torch.Tensor]) -> Difference | None:
        """Difference of s; None where the solver fails nearby."""
        check = self.check
        known = check.quotients[next(iter(direction))][0]
        step = check.first_step(direction) if known is None else known.step
        if check.system is None:
            step = max(step, float(check.fuzzy(1.0)) ** (1 / 3))  # the linear solves are the noise

        def sample(h: float) -> tuple[torch.Tensor, torch.Tensor]:
            try:
                return self.at(check.moved(direction, h))
            except Exception:  # as for first differences: a smaller step is tried
                return torch.tensor(torch.nan, dtype=self.v.dtype), torch.zeros((), dtype=self.v.dtype)

        return differences.central(sample, step, check.equation.eps)

    def measured_rounding(self) -> float:
        """The largest change of s in a few draws of x and theta changed by eps."""
        check = self.check
        if check.system is None:
            return 0.0
        base, changes, eps = self.dense(check.system), [0.0], 2 * check.equation.eps
        for _ in range(_DRAWS):
            x, theta = (
                [(plain(t) * (1 + eps * check.random(t.numel()).reshape(t.shape))).to(t) for t in leaves]
                for leaves in (check.accuracy.leaves, check.equation.theta)
            )
            changes.append(abs(float(self.dense(DenseSystem.at(check.equation, x, theta)) - base)))
        return 2 * max(changes) + _ROUNDING_FLOOR * check.equation.eps * self.size


def check_double(check: Check) -> None:
    """Reverse over reverse and forward over reverse, along one direction per leaf."""
    equation, v = check.equation, check.cotangents[0][1]
    weights = [check.random(t.numel()) * scales(t) for t in equation.theta]
    got, size, norm = _reverse_over_reverse(check, v, weights)
    slope = _Slope(check, v, weights, size, norm)
    slope = replace(slope, rounding=slope.measured_rounding())
    condition = 1.0 if check.system is None else check.system.condition
    # two solves, one inside the other; the condition number is room enough, so rtol is that of the solver itself
    small = (2 * check.rtol / SAFE_RTOL + ROUNDINGS * equation.eps) * condition
    groups = [(name, {j: check.directions[j][0][1]}) for j, name in enumerate(equation.names)]
    if len(groups) > _SECOND_ORDER_LEAVES:
        rest = {j: check.directions[j][0][1] for j in range(_SECOND_ORDER_LEAVES, len(groups))}
        groups = [*groups[:_SECOND_ORDER_LEAVES], ("the other leaves", rest)]
    for name, direction in groups:
        reverse = total(torch.dot(got[j], d) for j, d in direction.items())
        scale = size + sum(float((got[j] * d).abs().sum()) for j, d in direction.items())
        quotient = slope.along(direction)
        if quotient is None:
            add_quotient(check, name, RANDOM, "double", None, reverse, v, (reverse, reverse))
            continue
        parts = differences.difference_errors(quotient.truncation, quotient.noise, COARSE)
        parts[LINEAR] = torch.tensor(small * scale, dtype=v.dtype)
        random = f" along {RANDOM}" if sum(len(d) for d in direction.values()) > 1 else ""
        for how, value in (("reverse", reverse), ("forward", _forward_over_reverse(check, v, weights, direction))):
            if value is None:
                continue
            label = f"{how} over reverse{random}"
            place = Place(name, lambda i, s=label: s, "double", "differences")  # type: ignore[misc]
            check.rows.append(
                compare(place, quotient.value[None], value[None], parts, size, resolved=quotient.resolved)
            )


def _reverse_over_reverse(
    check: Check, v: torch.Tensor, weights: list[torch.Tensor]
) -> tuple[list[torch.Tensor], float, float]:
    """The gradient of s per leaf, and the size of the terms of s, added and in the 2-norm."""
    points = [t.clone().requires_grad_() for t in check.equation.theta]
    first = check.pull(check.call(points), points, check.equation.split(v), create_graph=True)
    terms = [
        (g.cpu().double().reshape(-1) * w).sum()
        for g, w in zip(first, weights, strict=True)
        if g is not None and g.requires_grad
    ]
    second: list[torch.Tensor | None] = [None] * len(points)
    if terms:
        second = list(torch.autograd.grad(torch.stack(terms).sum(), points, allow_unused=True))
    products = torch.cat([g * w for g, w in zip(filled(first, points), weights, strict=True)])
    return filled(second, points), float(products.abs().sum()), float(products.norm())


def _forward_over_reverse(
    check: Check, v: torch.Tensor, weights: list[torch.Tensor], direction: dict[int, torch.Tensor]
) -> torch.Tensor | None:
    """The same number by ``jvp`` of ``grad``; None where an operation of the objective has no forward mode."""
    theta, slope = [t.clone() for t in check.equation.theta], torch.func.grad(check.product)
    zeros = {j: torch.zeros_like(t) for j, t in enumerate(theta)}
    tangents = [(zeros | direction)[j].reshape(t.shape).to(t) for j, t in enumerate(theta)]
    try:
        moved = torch.func.jvp(lambda leaves: slope(leaves, check.equation.split(v)), (theta,), (tangents,))[1]
    except (NotImplementedError, RuntimeError) as error:
        if "forward" in str(error).lower() or "jvp" in str(error):
            check.notes.append(f"double: forward over reverse was not checked: {error}")
            return None
        raise
    return total(torch.dot(plain(m).reshape(-1), w) for m, w in zip(moved, weights, strict=True))
