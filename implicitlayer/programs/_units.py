"""Units of the unknowns of a program in which its numbers are near one."""

# NOTE [units of unknowns]: with x = D u, D diagonal, a program of x is one of u with D Q D, D p, A D and G D; sides and
# multipliers stay. Where unknowns have units far apart (money and shares of it), what is rounding beside the largest
# entry of Q is all there is of another; so solves, tests of rank and distances are those of u. D makes the largest
# entries of rows and columns equal (D. Ruiz, A scaling algorithm to equilibrate both rows and columns norms in
# matrices, 2001); rows with one entry, such as bounds, know no units. What stands in no other row has the unit of its
# curvature. All factors are powers of two: nothing is rounded by them.

from __future__ import annotations

from collections.abc import Callable

import torch

_SCALINGS = 4  # after which rows and columns are of one size, to a factor of two or so
_APART = 1e6  # curvatures further apart than this have their units looked at
_LEAST = 1e-16  # curvature that makes a unit by itself, over the largest
_FEW = 64  # units no further apart than this stay


def above_zero(size: torch.Tensor) -> torch.Tensor:
    """``size``, one where that is no number to divide by."""
    return torch.where((size > 0) & size.isfinite(), size, 1.0)


def power_of_two(size: torch.Tensor) -> torch.Tensor:
    """The nearest one."""
    return size.log2().round().exp2()


def units_by_curvature(curvatures: torch.Tensor) -> torch.Tensor | None:
    """Units [*lanes, n] in which curvatures that are all positive, and far apart, are near one; else ones, or None."""
    if not curvatures.shape[-1]:
        return None
    low, high = curvatures.amin(-1, keepdim=True), curvatures.amax(-1, keepdim=True)
    apart = (low > 0) & (high > _APART * low) & high.isfinite()
    if not bool(apart.any()):
        return None
    return torch.where(apart, power_of_two(torch.maximum(curvatures, _LEAST * high).rsqrt()), 1.0)


def equilibrated(
    rows: torch.Tensor, together: Callable[[torch.Tensor], torch.Tensor] = lambda sizes: sizes
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positive factors of columns and of rows [*lanes, c, n] that make their largest entries about one.

    ``together``: gives rows that have one factor the same size.
    """
    of_columns, of_rows = torch.ones_like(rows[..., 0, :]), torch.ones_like(rows[..., 0])
    for _ in range(_SCALINGS):
        scaled = rows * of_rows.unsqueeze(-1) * of_columns.unsqueeze(-2)
        of_columns = of_columns / above_zero(scaled.amax(-2)).sqrt()
        of_rows = of_rows / above_zero(together(scaled.amax(-1))).sqrt()
    return of_columns, of_rows


def unit_of_unknowns(Q: torch.Tensor, A: torch.Tensor, G: torch.Tensor, readable: bool) -> torch.Tensor | None:
    """The diagonal of D, [*lanes, n], of the lanes that these matrices have; None where there is nothing to gain.

    ``readable``: whether the numbers can be looked at; if not, D is the identity there.
    """
    curvatures = Q.detach().diagonal(dim1=-2, dim2=-1)
    if not curvatures.numel():
        return None
    if readable:
        low, high = curvatures.aminmax()
        if float(low) > 0 and float(high) <= _APART * float(low):
            return None
    lanes = torch.broadcast_shapes(Q.shape[:-2], A.shape[:-2], G.shape[:-2])
    none = torch.zeros_like(Q[..., :1, :])  # a row for programs without any
    rows = torch.cat([t.detach().abs().expand(*lanes, -1, -1) for t in (A, G, none)], -2)
    rows = rows * ((rows > 0).sum(-1, keepdim=True) > 1)
    of_rows, of_curvature = equilibrated(rows)[0], above_zero(curvatures).rsqrt().expand(*lanes, -1)
    in_rows, curved = rows.amax(-2) > 0, (curvatures > 0).expand(*lanes, -1)
    both = (in_rows & curved).to(rows.dtype)
    apart = (both * (of_rows / of_curvature).log2()).sum(-1, keepdim=True) / both.sum(-1, keepdim=True).clamp(min=1)
    unit = torch.where(in_rows, of_rows, torch.where(curved, of_curvature * apart.exp2(), 1.0))
    unit = power_of_two(unit / unit.log2().mean(-1, keepdim=True).exp2())
    far = unit.amax(-1, keepdim=True) > _FEW * unit.amin(-1, keepdim=True)
    return None if readable and not bool(far.any()) else torch.where(far, unit, 1.0)
