"""Multipliers of a solution that came without them: least squares on the stationarity condition, some non-negative."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

Known = tuple[torch.Tensor | None, torch.Tensor | None]  # (lambda [e], mu [m]) of one problem, None where not known


def multipliers_of_lanes(
    gradient: torch.Tensor, rows_h: torch.Tensor, rows_g: torch.Tensor, near: torch.Tensor, known: Sequence[Known]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(lambda [*lanes, e], mu [*lanes, m]): those ``known``, one pair per lane, and fitted ones where they are not.

    gradient [*lanes, n], rows_h [*lanes, e, n], rows_g [*lanes, m, n], near bool [*lanes, m].
    """
    lanes = itertools.product(*(range(size) for size in near.shape[:-1]))
    y, z = torch.zeros_like(rows_h[..., 0]), torch.zeros_like(rows_g[..., 0])
    for lane, (known_y, known_z) in zip(lanes, known, strict=True):
        slope, equations, border = gradient[lane], rows_h[lane], near[lane]
        if known_y is not None:
            slope, equations, y[lane] = slope + equations.mT @ known_y, equations[:0], known_y
        if known_z is not None:
            slope, border, z[lane] = slope + rows_g[lane].mT @ known_z, torch.zeros_like(border), known_z
        fit_y, fit_z = multipliers(slope, equations, rows_g[lane], border)
        if known_y is None:
            y[lane] = fit_y
        if known_z is None:
            z[lane] = fit_z
    return y, z


def multipliers(
    gradient: torch.Tensor, rows_h: torch.Tensor, rows_g: torch.Tensor, near: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(lambda, mu) minimising ``||gradient + rows_h' lambda + rows_g' mu||`` with mu >= 0, and mu = 0 unless near.

    One problem: gradient [n], rows_h [e, n], rows_g [m, n], near bool [m]. Of several lambda the smallest is taken.
    """
    # Rows of length one: what is fitted does not depend on the units of a constraint.
    h_norms, g_norms = (torch.linalg.vector_norm(rows, dim=-1) for rows in (rows_h, rows_g))
    h_norms, g_norms = torch.where(h_norms > 0, h_norms, 1.0), torch.where(g_norms > 0, g_norms, 1.0)
    equations = (rows_h / h_norms[:, None]).mT
    forces = (rows_g / g_norms[:, None])[near].mT
    inverse = torch.linalg.pinv(equations) if equations.shape[-1] else equations.mT
    project = lambda v: v - equations @ (inverse @ v)  # noqa: E731  (the part that no lambda can balance)
    mu = torch.zeros_like(g_norms)
    mu[near] = nonnegative_least_squares(project(forces), -project(gradient))
    lam = -inverse @ (gradient + forces @ mu[near])
    return lam / h_norms, mu / g_norms


def nonnegative_least_squares(matrix: torch.Tensor, rhs: torch.Tensor) -> torch.Tensor:
    """u >= 0 minimising ``||matrix u - rhs||``; matrix [n, k], rhs [n].

    Source: C. L. Lawson and R. J. Hanson, Solving Least Squares Problems (1974), chapter 23. A column whose entry comes
    out non-positive when it is let in is left out for good: rounding would let it in again and again.
    """
    k = matrix.shape[-1]
    u = rhs.new_zeros(k)
    if not k:
        return u
    inside = torch.zeros(k, dtype=torch.bool, device=rhs.device)
    barred = torch.zeros_like(inside)
    noise = 16 * (k + matrix.shape[0]) * torch.finfo(rhs.dtype).eps * torch.linalg.vector_norm(rhs)
    for _ in range(3 * k):
        pull = torch.where(inside | barred, -torch.inf, matrix.mT @ (rhs - matrix @ u))
        newest = int(pull.argmax())
        if not pull[newest] > noise:
            break
        inside[newest] = True
        for _ in range(k):
            fit = torch.zeros_like(u)
            fit[inside] = torch.linalg.pinv(matrix[:, inside]) @ rhs
            negative = inside & (fit <= 0)
            if not bool(negative.any()):
                u = fit
                break
            if bool(negative[newest]) and u[newest] == 0:
                inside[newest], barred[newest] = False, True
                break
            part = (u[negative] / (u[negative] - fit[negative])).min()
            u = u + part * (fit - u)
            inside &= u > noise * torch.finfo(rhs.dtype).eps
            u = torch.where(inside, u, 0.0)
    return u
