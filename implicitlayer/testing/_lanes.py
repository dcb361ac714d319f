"""Batches in a gradient check: vmap of the layer and of its derivatives against a loop over the lanes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from implicitlayer.testing._modes import Check, filled, prefixed, push
from implicitlayer.testing._references import ROUNDINGS, DenseSystem, Leaves, flat
from implicitlayer.testing._report import COARSE, LINEAR, ROUNDING, Place, entry_of

_NUM_LANES = 3
_LANE_SPREAD = 0.03
_SAFE = 10.0

Expected = tuple[torch.Tensor, torch.Tensor]  # a derivative, and what a linear solve may do to it


@dataclass(frozen=True, eq=False)
class _Lane:
    """theta of one lane, the answer there, a cotangent, a direction; derivatives by H, or by the layer alone."""

    check: Check
    theta: Leaves
    x: Leaves
    v: torch.Tensor
    direction: dict[int, torch.Tensor]
    system: DenseSystem | None

    def pulled(self) -> list[Expected]:
        """J'v per leaf."""
        check, numbers = self.check, range(len(self.theta))
        if self.system is not None:
            return [(self.system.vjp(j, self.v), self.system.vjp_error(j, self.v, check.rtol)) for j in numbers]
        points = [t.clone().requires_grad_() for t in self.theta]
        alone = filled(check.pull(check.call(points), points, check.equation.split(self.v)), points)
        return [(g, check.fuzzy(float(g.norm()))) for g in alone]

    def pushed(self) -> Expected:
        """J d."""
        if self.system is None:
            alone = push(self.check, self.direction, self.theta)
            return alone, self.check.fuzzy(float(alone.norm()))
        values = [self.system.jacobian(j) @ d for j, d in self.direction.items()]
        errors = [self.system.jvp_error(j, d, self.check.rtol) for j, d in self.direction.items()]
        return torch.stack(values).sum(0), torch.stack(errors).sum(0)


def check_vmap(check: Check) -> None:
    """Lanes of nearby theta: answers, backward of vmap, vmap of grad, vmap of jvp; then what all lanes share."""
    equation = check.equation
    size = (_NUM_LANES, len(equation.theta))
    factors = 1 + _LANE_SPREAD * torch.randn(size, dtype=torch.float64, generator=check.generator)
    thetas = [[(t * float(f)).to(t.dtype) for t, f in zip(equation.theta, row, strict=True)] for row in factors]
    stacked = [torch.stack(column).requires_grad_() for column in zip(*thetas, strict=True)]
    x = torch.func.vmap(lambda *leaves: tuple(check.call(list(leaves))))(*stacked)
    lanes = []
    for k, theta in enumerate(thetas):
        own = [leaf[k].detach() for leaf in x]
        _check_answer(check, k, own, theta)  # before any derivative, which may raise
        v = flat(equation.split(check.random(equation.num_unknowns)))
        direction = {j: chosen[0][1] * (1 - 0.1 * k) for j, chosen in enumerate(check.directions)}
        system = None if check.system is None else DenseSystem.at(equation, own, theta)
        lanes.append(_Lane(check, theta, own, v, direction, system))
    cotangents = [torch.stack(column) for column in zip(*(equation.split(lane.v) for lane in lanes), strict=True)]
    expected = [lane.pulled() for lane in lanes]
    _compare_lanes(check, "", check.pull(list(x), stacked, cotangents), lanes, expected)
    _compare_lanes(check, "vmap(grad) ", _vmap_of_grad(check, stacked, cotangents), lanes, expected)
    _check_vmap_of_jvp(check, stacked, lanes)
    _check_shared(check, cotangents, [lane.v for lane in lanes])


def _check_answer(check: Check, k: int, x: Leaves, theta: Leaves) -> None:
    if check.layer.polish:
        return
    equation, system = check.equation, check.system
    alone = check.answer(theta)
    # in a batch a solver may stop elsewhere, but about as near to the solution as alone
    distance = check.accuracy.error
    if system is not None:
        distance += float((system.inverse @ equation.residual_at(alone, theta)).norm())
    rounding = ROUNDINGS * equation.eps * check.accuracy.size
    parts = {COARSE: torch.tensor(_SAFE * distance), ROUNDING: torch.tensor(rounding)}
    _add(check, "x", f"lane {k} ", flat(alone), flat(x), parts, check.accuracy.size)


def _compare_lanes(
    check: Check,
    how: str,
    gradients: list[torch.Tensor | None],
    lanes: list[_Lane],
    expected: list[list[Expected]],
) -> None:
    for k, (lane, wanted) in enumerate(zip(lanes, expected, strict=True)):
        got = filled([None if g is None else g[k] for g in gradients], lane.theta)
        for j, name in enumerate(check.equation.names):
            value, linear = wanted[j]
            _add(check, name, f"{how}lane {k} ", value, got[j], {LINEAR: linear}, check.natural(j, lane.v), leaf=j)


def _vmap_of_grad(check: Check, stacked: Leaves, cotangents: Leaves) -> list[torch.Tensor | None]:
    def product(leaves: Leaves, v: Leaves) -> torch.Tensor:
        return torch.stack([(a * b).sum() for a, b in zip(check.call(leaves), v, strict=True)]).sum()

    points = [t.detach() for t in stacked]
    gradients: list[torch.Tensor | None] = torch.func.vmap(torch.func.grad(product))(points, cotangents)
    return gradients


def _check_vmap_of_jvp(check: Check, stacked: Leaves, lanes: list[_Lane]) -> None:
    points = tuple(t.detach() for t in stacked)
    tangents = tuple(
        torch.stack([lane.direction[j].reshape(t.shape).to(t) for lane in lanes])
        for j, t in enumerate(check.equation.theta)
    )

    def pushed(leaves: tuple[torch.Tensor, ...], moved: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        result: tuple[torch.Tensor, ...] = torch.func.jvp(lambda *t: tuple(check.call(list(t))), leaves, moved)[1]
        return result

    got = torch.func.vmap(pushed)(points, tangents)
    for k, lane in enumerate(lanes):
        value, linear = lane.pushed()
        own = flat([leaf[k] for leaf in got])
        name = f"vmap(jvp) lane {k} "
        _add(check, "all leaves", name, value, own, {LINEAR: linear}, check.accuracy.size)


def _check_shared(check: Check, cotangents: Leaves, vectors: list[torch.Tensor]) -> None:
    """theta shared by all lanes, whose gradients add up; then many cotangents of one answer at once."""
    equation, system = check.equation, check.system
    points = [t.clone().requires_grad_() for t in equation.theta]
    alone = check.call(points)
    if system is None:
        rows = [filled(check.pull(alone, points, equation.split(v), retain_graph=True), points) for v in vectors]
        expected = [[(g, check.fuzzy(float(g.norm()))) for g in row] for row in rows]
    else:
        numbers = range(len(points))
        expected = [[(system.vjp(j, v), system.vjp_error(j, v, check.rtol)) for j in numbers] for v in vectors]
    starts = [t.expand(len(vectors), *t.shape).clone() for t in equation.init]
    x = torch.func.vmap(lambda *leaves: tuple(check.call(points, list(leaves))))(*starts)
    pulled = filled(check.pull(list(x), points, cotangents), points)
    together = check.pull(alone, points, cotangents, is_grads_batched=True)
    for j, name in enumerate(equation.names):
        value = torch.stack([wanted[j][0] for wanted in expected]).sum(0)
        linear = torch.stack([wanted[j][1] for wanted in expected]).sum(0)
        natural = check.natural(j, torch.stack(vectors).norm(dim=0))
        _add(check, name, "shared ", value, pulled[j], {LINEAR: linear}, natural, leaf=j)
        for k, wanted in enumerate(expected):
            gradient = together[j]
            got = filled([None if gradient is None else gradient[k]], [points[j]])[0]
            parts = {LINEAR: wanted[j][1]}
            _add(check, name, f"cotangent {k} ", wanted[j][0], got, parts, check.natural(j, vectors[k]), leaf=j)


def _add(
    check: Check,
    name: str,
    label: str,
    expected: torch.Tensor,
    got: torch.Tensor,
    parts: dict[str, torch.Tensor],
    natural: float,
    leaf: int | None = None,
) -> None:
    inside = check.equation.entry if leaf is None else entry_of(check.equation.theta[leaf].shape)
    check.add(Place(name, prefixed(label, inside), "vmap", "loop"), expected, got, parts, natural)
