"""Cone programs as layers: Clarabel finds the solution, the equation of its optimality conditions is differentiated."""

# Legend: minimise 1/2 x'Q x + p'x  subject to  A x = b,  h - G x in K, a product of cones (m rows); multipliers y of
# the equations and z in the dual cone K*.
#
# NOTE [natural residual]: s = h - G x in K, z in K* and s'z = 0 say that s and -z are the projections of w = s - z onto
# K and its polar cone (Moreau). So with s = P(w) and z = P(w) - w the conditions of optimality are the square equation
#     F(x, y, w) = (Q x + p + A'y + G'z,  A x - b,  G x + s - h) = 0
# (the residual map of Agrawal et al. 2019 with the scaling of the homogeneous form taken out): whatever w is, s and z
# are in their cones and complementary. F is smooth where P is; what is differentiated is a layer of its root.
#
# NOTE [units]: w = s - z adds what has the unit of the constraints to what has that of the objective, and Clarabel
# takes tolerances and claims of infeasibility absolutely. So unknowns, rows (those of a cone together), sides and
# objective are multiplied by powers of two until their largest entries are about one (see ``programs/_units``). The
# side of a half line, which may be a large number that means none, counts where there is no other.

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, ClassVar

import torch

from implicitlayer._errors import InfeasibleError, NotConvergedError, UnboundedError, tell_kink
from implicitlayer.base._failures import refuse, standing
from implicitlayer.base._solution import SolverResult
from implicitlayer.base._status import Status
from implicitlayer.base._tree import name_lanes
from implicitlayer.base._types import Leaves, OnFailure
from implicitlayer.constrained._cones import ORDERS, Cones
from implicitlayer.constrained._qp_solve import full_data
from implicitlayer.equation._solve import Varying
from implicitlayer.layer._layer import ImplicitLayer
from implicitlayer.linear._dense import Dense
from implicitlayer.programs._backends import by_clarabel
from implicitlayer.programs._interior_point_step import Data, flat_lanes, norm_of, times
from implicitlayer.programs._units import above_zero, equilibrated, power_of_two

_ROUNDED = 16  # times eps of the data: what their rounding makes of a zero
_ENOUGH = 1e-6  # conditions that hold to this, relative to their terms, are those of a solution
_SMALL = 1e-6  # terms below this, relative to the largest of the program, count as this much
_FAR = 1e4  # a feasible point further away than this, in units of its program, is none
_EXACT = 1e-15  # not improved
_NEWTON = 4  # steps after Clarabel, at least two, while they halve what is left
_SETTINGS = {"verbose": False, "tol_gap_abs": 1e-11, "tol_gap_rel": 1e-11, "tol_feas": 1e-11}
_ERRORS: dict[str, tuple[type[Exception], str]] = {
    "PrimalInfeasible": (InfeasibleError, "has no feasible point. Loosen its constraints"),
    "DualInfeasible": (UnboundedError, "is unbounded: its objective falls without end. Bound its variables"),
}


def cone_program(
    data: Data,
    cones: Cones,
    *,
    derivative: bool,
    on_failure: OnFailure,
    active_rtol: float,
    linear_solver: Any,
    varying: Varying = None,
) -> torch.Tensor:
    """x [*lanes, n] of the programs Q, p, A, b, G, h, whose dimensions in front are lanes.

    Solved and differentiated in float64, whatever the dtype of the data.

    Args:
        derivative: whether one is wanted: then kinks are told.
        on_failure: as of :func:`qp`.
        active_rtol: a distance of w to a kink below this, relative to the terms of s or z there, counts as zero.
        linear_solver: for the Jacobian of F; None for a dense one.
        varying: of :class:`Settings`.
    """
    dtype = data[1].dtype
    active_rtol = max(active_rtol, _ROUNDED * torch.finfo(dtype).eps)
    exact, of_x = _in_own_units([t.double() for t in data], cones)
    p, b, h = exact[1], exact[3], exact[5]
    sizes = p.shape[-1], b.shape[-1], h.shape[-1]
    solver = _Clarabel(cones, on_failure, active_rtol if derivative else None)
    linear = Dense() if linear_solver is None else linear_solver
    layer = _ConeLayer(
        partial(_conditions, cones=cones), solver, linear, "root", False, False, on_failure, None, 0, p.ndim - 1
    )
    layer.varying = varying
    u: torch.Tensor = layer(p.new_zeros(*p.shape[:-1], sum(sizes)), *exact)
    return (of_x * u[..., : sizes[0]]).to(dtype)


def _in_own_units(data: Leaves, cones: Cones) -> tuple[Leaves, torch.Tensor]:
    """The same programs of other unknowns, and what takes these to x, [*lanes, n]: NOTE [units]."""
    Q, p, A, b, G, h = data
    e, m, sizes = b.shape[-1], h.shape[-1], [t.detach().abs() for t in data]
    rows, sides = torch.cat([sizes[2], sizes[4]], -2), torch.cat([sizes[3], sizes[5]], -1)
    rows, sides = (
        torch.cat([t, torch.zeros_like(like)], d) for t, like, d in ((rows, Q[..., :1, :], -2), (sides, p[..., :1], -1))
    )
    of_x, of_rows = map(
        power_of_two,
        equilibrated(rows, lambda t: torch.cat([t[..., :e], cones.largest(t[..., e : e + m]), t[..., e + m :]], -1)),
    )
    near = (
        (of_rows * sides).index_fill(-1, torch.arange(e, e + cones.lines, device=p.device), 0.0).amax(-1, keepdim=True)
    )
    far = (of_rows * sides).amax(-1, keepdim=True)
    length = power_of_two(above_zero(torch.where(near > 0, near, far)))
    of_x, of_b, of_h = of_x * length, of_rows[..., :e] / length, of_rows[..., e : e + m] / length
    Q, p, columns = of_x.unsqueeze(-1) * Q * of_x.unsqueeze(-2), of_x * p, of_x.unsqueeze(-2)
    largest = torch.maximum(Q.detach().abs().amax((-2, -1)), p.detach().abs().amax(-1)).unsqueeze(-1)
    cost = power_of_two(above_zero(largest))
    A, G = of_b.unsqueeze(-1) * A * columns, of_h.unsqueeze(-1) * G * columns
    return [Q / cost.unsqueeze(-1), p / cost, A, of_b * b, G, of_h * h], of_x


def _largest(sizes: torch.Tensor) -> torch.Tensor:
    """The largest of the last dimension, zero of none."""
    return sizes.amax(-1) if sizes.shape[-1] else sizes.sum(-1)


class _ConeLayer(ImplicitLayer):
    """The layer of :func:`_conditions`."""

    own_function: ClassVar[bool] = True


def _conditions(u: torch.Tensor, *data: torch.Tensor, cones: Cones, num_orders: int = ORDERS) -> torch.Tensor:
    """F of NOTE [natural residual], [*lanes, n + e + m]."""
    Q, p, A, b, G, h = data
    x, y, w = u.split([p.shape[-1], b.shape[-1], h.shape[-1]], -1)
    s = cones.project(w, num_orders)
    slope = times(Q, x) + p + times(A.mT, y) + times(G.mT, s - w)
    return torch.cat([slope, times(A, x) - b, times(G, x) + s - h], -1)


@dataclass(frozen=True, eq=False)
class _Clarabel:
    """The solver of F = 0, one program at a time; ``active_rtol`` is None where kinks do not matter."""

    cones: Cones
    on_failure: OnFailure
    active_rtol: float | None
    batched: ClassVar[bool] = True

    def __call__(self, residual: Any, init: torch.Tensor, *data: torch.Tensor) -> SolverResult:
        lanes = init.shape[:-1]
        flat = flat_lanes(full_data(data, lanes))
        answers = [self._one(*(t[i] for t in flat)) for i in range(lanes.numel())]
        found = [u for u, _, _ in answers]
        u = torch.stack(found) if found else init.reshape(0, init.shape[-1]).double()
        for status, (error, words) in _ERRORS.items():
            bad = torch.tensor([said == status for _, said, _ in answers], dtype=torch.bool).reshape(lanes)
            if bool(bad.any()):
                refuse(bad, error(f"the cone program {words}{name_lanes(bad)}."))
        known = torch.tensor([said in _ERRORS for _, said, _ in answers], dtype=torch.bool)
        u, left = self._polished(u, flat, known)
        self._judge(left.reshape(lanes), [said for _, said, _ in answers])
        if self.active_rtol is not None and u.shape[0]:
            self._judge_kinks(u, flat, left, lanes)
        steps = max((count for _, _, count in answers), default=0)
        return SolverResult(u.reshape(init.shape).to(init), Status.CONVERGED, steps)

    def _one(self, *data: torch.Tensor) -> tuple[torch.Tensor, str, int]:
        """u, Clarabel's word for how it ended, and its iterations."""
        Q, p, A, b, G, h = data
        clarabel = import_module("clarabel")
        zero = [clarabel.ZeroConeT(len(b))] if len(b) else []
        program = [t.cpu().numpy() for t in (Q, p, torch.cat([A, G]), torch.cat([b, h]))]
        found = by_clarabel(clarabel, program, [*zero, *self.cones.for_clarabel(clarabel)], _SETTINGS)
        x, z, s = (torch.tensor(part, dtype=p.dtype, device=p.device) for part in (found.x, found.z, found.s))
        u, said = torch.cat([x, z[: len(b)], (s - z)[len(b) :]]), str(found.status)
        if said in _ERRORS and not self._proves(said, x, z, data):
            said += " without a proof of it"
        return u.nan_to_num(0.0, 0.0, 0.0), said, int(found.iterations)

    def _proves(self, said: str, x: torch.Tensor, z: torch.Tensor, data: tuple[torch.Tensor, ...]) -> bool:
        """Whether x is a direction in which the objective falls without end, or z a proof that no point is feasible.

        For multipliers z with (b, h)'z < 0 a feasible x has |x| at least -(b, h)'z / |(A, G)'z|.
        """
        Q, p, A, b, G, h = data
        if said == "PrimalInfeasible":
            gain, off = -torch.cat([b, h]).dot(z), torch.cat([A, G]).mT @ z
        else:
            gain, slack = -p.dot(x), -(G @ x)
            off = torch.cat([Q @ x, A @ x, self.cones.project(slack, 0) - slack])
        return bool(gain > _FAR * norm_of(off))

    def _polished(self, u: torch.Tensor, data: Data, failed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """u after steps of Newton's method where they help, and what is left of F relative to its terms, [B]."""
        conditions = partial(_conditions, cones=self.cones, num_orders=1)
        value = conditions(u, *data)
        jacobian = torch.func.vmap(torch.func.jacrev(conditions))
        best, at_best = u, value
        for count in range(_NEWTON if u.numel() else 0):
            step = torch.linalg.pinv(jacobian(u, *data)) @ value.unsqueeze(-1)
            moved = u - step.squeeze(-1)
            after, least = conditions(moved, *data), norm_of(at_best)
            # a step over a kink leaves as much as there was, and the next one nothing
            better, usable = ((norm_of(after) < k * least).unsqueeze(-1) for k in (0.5, 10))
            best, at_best = torch.where(better, moved, best), torch.where(better, after, at_best)
            u, value = torch.where(usable, moved, best), torch.where(usable, after, at_best)
            if (count and not bool(better.any())) or bool((self._left(best, at_best, data) <= _EXACT).all()):
                break
        return best, torch.where(failed, 0.0, self._left(best, at_best, data))

    def _left(self, u: torch.Tensor, value: torch.Tensor, data: Data) -> torch.Tensor:
        """The largest part of F relative to its own terms, those of a cone together, [B]."""
        of_slope, of_rows, of_s, _ = self._terms(u, data)
        terms = torch.cat([of_slope, of_rows, of_s], -1)
        # where all terms are rounding of others, so is what is left
        return _largest(value.abs() / above_zero(torch.maximum(terms, _SMALL * terms.amax(-1, keepdim=True))))

    def _terms(self, u: torch.Tensor, data: Data) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sizes of the terms of F's three parts, the last one by cones, and of z, also by cones."""
        Q, p, A, b, G, h = (t.abs() for t in data)
        x, y, w = u.split([p.shape[-1], b.shape[-1], h.shape[-1]], -1)
        forces = times(G.mT, (self.cones.project(w, 0) - w).abs())
        slope, x = times(Q, x.abs()) + p + times(A.mT, y.abs()) + forces, x.abs()
        of_z = times(G, slope) / above_zero((G * G).sum(-1))
        return slope, times(A, x) + b, self.cones.largest(times(G, x) + h), self.cones.largest(of_z)

    def _judge(self, left: torch.Tensor, words: list[str]) -> None:
        """An answer that is none is an error."""
        bad = ~(left <= _ENOUGH)
        if self.on_failure != "ignore" and bool(bad.any()):
            said = sorted({word for word, is_bad in zip(words, bad.flatten().tolist(), strict=True) if is_bad})
            refuse(
                bad,
                NotConvergedError(
                    f"the cone program was not solved{name_lanes(bad)}: Clarabel ended with {', '.join(said)}, and a "
                    f"condition of optimality is violated by {float(left[bad].max()):.1e} of its terms (allowed "
                    f"{_ENOUGH:.0e}). Scale the data, or write the problem with fewer redundant constraints.",
                    None,
                ),
            )

    def _judge_kinks(self, u: torch.Tensor, data: Data, left: torch.Tensor, lanes: torch.Size) -> None:
        assert self.active_rtol is not None
        w = u[..., u.shape[-1] - data[5].shape[-1] :]
        values = self.cones.to_kinks(w, *map(above_zero, self._terms(u, data)[2:]))
        if self.on_failure == "ignore" or not values.shape[-1]:
            return
        rtol = torch.maximum(2 * left, torch.full_like(left, self.active_rtol))
        bent = standing((values.amin(-1) <= rtol).reshape(lanes))
        if bool(bent.any()):
            message = (
                f"the solution of the cone program sits at a kink{name_lanes(bent)}: a constraint holds with equality "
                "and has a multiplier of zero. The solution bends there, and its derivative is that of one side."
            )
            tell_kink(message, "kink", self.on_failure)
