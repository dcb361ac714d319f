"""``il.qp(infeasible="closest")``: the solution under constraints moved by as little as makes them hold together."""

# NOTE [closest feasible program]: with all rows J = [A; G] and sides g = (b, h), the shift of least norm under which
# some x satisfies them is the solution of
#     min 1/2 |s|^2   under   A x = b + s_e,  G x <= h + s_i,
# whose dual is strictly convex: s is its own multiplier,
#     min 1/2 |s|^2 + g's   under   J's = 0,  s_i >= 0.
# Let W be the equations and the inequalities with s > 0. Under the moved sides all of W hold as equations at every
# feasible x, so that (with x0 the least-squares solution of J_W x = g_W)
#     s_W = J_W x0 - g_W,   x0 = J_W^+ g_W,   and   x minimises the objective under J_W x = J_W x0,  G x <= h elsewhere.
# The rows of J_W depend on each other (J_W's_W = 0): with J_W = U S V' of rank r, r independent equations
# T J_W x = T J_W x0, T = S^-1 U', have the same solutions. Where W and r stay the same near by, all of this is smooth,
# and T may be a constant: autograd through J_W, x0 and the program that is left gives every derivative. An inequality
# whose slack is zero at all of these x without being moved depends on J_W, and is told as that.
#
# Sources: A. Chiche and J. Ch. Gilbert, J. Convex Anal. 23 (2016), section 2 (smallest feasible shift); A. Bambade et
# al., Leveraging augmented-Lagrangian techniques for differentiating over infeasible quadratic programs in machine
# learning, ICLR 2024 (what ProxQP and QPLayer return). Difference: solved exactly, not in the limit of a method.

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from implicitlayer._errors import InfeasibleError, NotConvergedError, tell_kink
from implicitlayer.base._types import OnFailure
from implicitlayer.linear._common import NOISE

# a contradiction too small for a certificate keeps the interior point from an answer
UNSOLVED = (InfeasibleError, NotConvergedError)

Program = tuple[torch.Tensor, ...]
Solution = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
# (data, how far rows were moved, on_failure where that is another one than the call's) -> x, y, z
Solve = Callable[[Program, torch.Tensor | None, bool], Solution]

_MOVED = 1e-9  # of the largest shift: less is none


def closest(data: Program, batch: torch.Size, solve: Solve, on_failure: OnFailure) -> Solution:
    """x and the multipliers [*batch, ...] of programs some of which have no feasible point, one after the other.

    ``solve(data, shift, quietly)`` solves one program.

    Warns (or raises, by ``on_failure``): KinkWarning where a change of the rows that contradict each other changes
    their rank, and x by a jump.
    """
    found = []
    for lane in np.ndindex(batch):
        one = tuple(t.expand(*batch, *t.shape[len(batch) :])[lane] for t in data) if batch else data
        try:
            found.append(solve(one, None, False))
        except UNSOLVED as error:
            found.append(_moved(one, solve, on_failure, error))
    x, y, z = (torch.stack(parts).reshape(*batch, -1) for parts in zip(*found, strict=True))
    return x, y, z


def _moved(data: Program, solve: Solve, on_failure: OnFailure, error: Exception) -> Solution:
    """The solution under the moved sides; see NOTE [closest feasible program]."""
    Q, p, A, b, G, h = data
    e, rows, sides = len(b), torch.cat([A, G]), torch.cat([b, h])
    with torch.no_grad():
        eye = torch.eye(len(sides), dtype=p.dtype, device=p.device)
        dual = eye, sides, rows.mT, torch.zeros_like(p), -eye[e:], torch.zeros_like(h)
        shift = solve(tuple(t.detach() for t in dual), None, True)[0]
        if not float(shift.abs().max()) > NOISE * torch.finfo(p.dtype).eps * float(sides.abs().max()):
            raise error  # all rows hold together, to rounding: nothing to move
        moved = shift[e:] > _MOVED * shift.abs().max()
        held = torch.cat([torch.ones_like(b, dtype=torch.bool), moved])
        left, values, _ = torch.linalg.svd(rows[held], full_matrices=False)
        rtol = (sum(rows.shape) + NOISE) * torch.finfo(p.dtype).eps
        kept = values > rtol * values.max()
        T = left[:, kept].mT / values[kept, None]
    if rows.requires_grad and torch.is_grad_enabled() and len(T) < min(rows[held].shape) and on_failure != "ignore":
        message = (
            f"the {len(left)} rows that were moved to the closest feasible program have rank {len(T)}, which almost "
            "every change of A and G raises: then x jumps. The derivative is that for changes that keep the rank; "
            "those in p, b, h and Q are not concerned. Detach A and G if they are constants."
        )
        tell_kink(message, "dependent", on_failure)
    of_all = rows[held] @ (torch.linalg.pinv(rows[held], rtol=rtol) @ sides[held])
    shift = torch.zeros_like(sides).masked_scatter(held, (of_all - sides[held]).detach())
    if not bool((shift[e:] >= 0).all()):
        raise error
    rest = torch.where(moved[:, None], 0.0, G), torch.where(moved, 1.0, h)
    x, y, z = solve((Q, p, T @ rows[held], T @ of_all, *rest), shift, False)
    multipliers = torch.zeros_like(sides).masked_scatter(held, T.mT @ y)
    return x, multipliers[:e], z + multipliers[e:]
