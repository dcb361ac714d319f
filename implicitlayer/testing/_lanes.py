"""Batches in a gradient check: vmap of the layer and of its derivatives against a loop over the lanes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from implicitlayer.testing._modes import Check, filled, prefixed, push
from implicitlayer.testing._references import ROUNDINGS, DenseSystem, Leaves, flat
from implicitlayer.testing._report import COARSE, LINEAR, ROUNDING, Place, compare, entry_of

_NUM_LANES = 3
_LANE_SPREAD = 0.03
_SAFE = 10.0

Expected = tuple[torch.Tensor, torch.Tensor]  # a derivative, and what a linear solve may do to it


def _pulled(check: Check, system: DenseSystem | None, theta: Leaves, v: torch.Tensor) -> list[Expected]:
    """J'v per leaf of theta: by H, or by the layer alone."""
    if system is not None:
        return [(system.vjp(j, v), system.vjp_error(j, v, check.rtol)) for j in range(len(theta))]
    return [(g, check.fuzzy(float(g.norm()))) for g in check.gradients(theta, v)]


@dataclass(frozen=True, eq=False)
class _Lane:
    """theta of one lane, a cotangent and a direction there, and the dense system, if there is one."""

    check: Check
    theta: Leaves
    v: torch.Tensor
    direction: dict[int, torch.Tensor]
    system: DenseSystem | None

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
        lanes.append(_Lane(check, theta, v, direction, system))
    cotangents = [torch.stack(column) for column in zip(*(equation.split(lane.v) for lane in lanes), strict=True)]
    expected = [_pulled(check, lane.system, lane.theta, lane.v) for lane in lanes]
    points = [t.detach() for t in stacked]
    for how, gradients in (
        ("", lambda: check.pull(list(x), stacked, cotangents)),
        ("vmap(grad) ", lambda: torch.func.vmap(torch.func.grad(check.product))(points, cotangents)),
    ):
        found = gradients()
        for k, lane in enumerate(lanes):
            got = filled([None if g is None else g[k] for g in found], lane.theta)
            for j, (value, linear) in enumerate(expected[k]):
                _add(check, j, f"{how}lane {k} ", value, got[j], {LINEAR: linear}, check.natural(j, lane.v))
    _check_vmap_of_jvp(check, points, lanes)
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


def _check_vmap_of_jvp(check: Check, points: Leaves, lanes: list[_Lane]) -> None:
    tangents = tuple(
        torch.stack([lane.direction[j].reshape(t.shape).to(t) for lane in lanes])
        for j, t in enumerate(check.equation.theta)
    )

    def pushed(leaves: tuple[torch.Tensor, ...], moved: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        result: tuple[torch.Tensor, ...] = torch.func.jvp(lambda *t: tuple(check.call(list(t))), leaves, moved)[1]
        return result

    got = torch.func.vmap(pushed)(tuple(points), tangents)
    for k, lane in enumerate(lanes):
        value, linear = lane.pushed()
        own = flat([leaf[k] for leaf in got])
        _add(check, "all leaves", f"vmap(jvp) lane {k} ", value, own, {LINEAR: linear}, check.accuracy.size)


def _check_shared(check: Check, cotangents: Leaves, vectors: list[torch.Tensor]) -> None:
    """theta shared by all lanes, whose gradients add up; then many cotangents of one answer at once."""
    equation = check.equation
    points = [t.clone().requires_grad_() for t in equation.theta]
    alone = check.call(points)
    expected = [_pulled(check, check.system, equation.theta, v) for v in vectors]
    starts = [t.expand(len(vectors), *t.shape).clone() for t in equation.init]
    x = torch.func.vmap(lambda *leaves: tuple(check.call(points, list(leaves))))(*starts)
    pulled = filled(check.pull(list(x), points, cotangents), points)
    together = check.pull(alone, points, cotangents, is_grads_batched=True)
    for j, gradient in enumerate(together):
        value, linear = (torch.stack([one[j][part] for one in expected]).sum(0) for part in (0, 1))
        natural = check.natural(j, torch.stack(vectors).norm(dim=0))
        _add(check, j, "shared ", value, pulled[j], {LINEAR: linear}, natural)
        for k, one in enumerate(expected):
            got = filled([None if gradient is None else gradient[k]], [points[j]])[0]
            _add(check, j, f"cotangent {k} ", one[j][0], got, {LINEAR: one[j][1]}, check.natural(j, vectors[k]))


def _add(
    check: Check,
    leaf: int | str,
    label: str,
    expected: torch.Tensor,
    got: torch.Tensor,
    parts: dict[str, torch.Tensor],
    natural: float,
) -> None:
    """The row of a leaf of theta, by its number, or of entries of x under a name."""
    name = leaf if isinstance(leaf, str) else check.equation.names[leaf]
    entry = prefixed(
        label, check.equation.entry if isinstance(leaf, str) else entry_of(check.equation.theta[leaf].shape)
    )
    check.rows.append(compare(Place(name, entry, "vmap", "loop"), expected, got, parts, natural))
