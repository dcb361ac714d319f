"""Programs whose equations depend on each other, and lanes that fail under ``on_failure="mask"``."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch

import implicitlayer as il
from tests.thorough._family import DrawnFamily
from tests.thorough._quadratics import SEEDS
from tests.thorough._reference import F64, Tensor
from tests.thorough._trial import Trial


def work_dependent(trial: Trial, *, n: int, rank: int, extra: int, seed: int, single: int, batch: int) -> None:
    """min |x|^2 / 2 + p'x with A x = b, A = M R for R of full rank: x = -p + R'(R R')^-1 (R x0 + R p).

    Rounding of A and b, eps each, acts like a change of R by eps times the condition of M R in the rows kept; a change
    of R by d moves x by cond(R)^2 d. 16 for the sums of length n.
    """
    dtype = torch.float32 if single else F64
    trial.kind = "f32" if single else "f64"
    rank = min(rank, n - 1)
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=F64)  # noqa: E731
    R, x0, p = draw(rank, n), draw(n), draw(n)
    M = torch.cat([torch.eye(rank, dtype=F64), draw(extra, rank)])[torch.randperm(rank + extra, generator=generator)]
    A, b = (M @ R).to(dtype), (M @ (R @ x0)).to(dtype)
    given = p.to(dtype).requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", il.KinkWarning)  # dependent equations are told by one, as they should be
        x = il.qp(torch.eye(n, dtype=dtype), given.expand(batch, n) if batch > 1 else given, A, b)
    w = draw(n)
    (found,) = torch.autograd.grad((x * w.to(dtype)).sum() / batch, given)
    project = torch.eye(n, dtype=F64) - R.mT @ torch.linalg.solve(R @ R.mT, R)
    expected = -project @ p + R.mT @ torch.linalg.solve(R @ R.mT, R @ x0)
    condition = float(torch.linalg.cond(R)) ** 2 * float(torch.linalg.cond(M))
    size = float(1 + x0.norm() + p.norm()) / float(expected.norm())
    allowed = 16 * n * torch.finfo(dtype).eps * condition
    trial.compare("x", [x.reshape(-1, n)[0]], [expected], allowed * size)
    trial.compare("gradient", [found], [-project @ w], allowed * float(w.norm() / (project @ w).norm()))


KINDS = ("argmin", "root", "fixed_point", "box")
FAULTS = ("NaN in theta", "NaN from the solver", "off")


class _Solver:
    batched = True

    def __init__(self, off: Tensor) -> None:
        self.off = off

    def __call__(self, f: Any, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return (t / s) ** 0.5 + self.off


def work_lanes(trial: Trial, *, kind: int, fault: int, lanes: int, n: int, bad: int, seed: int) -> None:
    """s x^2 = t by lane: with the fault in one lane all others have the bits that they have without it."""
    trial.kind, bad = KINDS[kind], bad % lanes
    generator = torch.Generator().manual_seed(seed)
    init, good = torch.ones(lanes, n, dtype=F64), 0.5 + torch.rand(lanes, n, generator=generator, dtype=F64)
    keep, results = torch.arange(lanes) != bad, []
    objective = lambda x, t, s: (s * x**3 / 3 - t * x).sum(-1)  # noqa: E731
    for spoiled in (False, True):
        t, off = good.clone(), torch.zeros(lanes, 1, dtype=F64)
        if spoiled and fault == 0:
            t[bad, 0] = math.nan
        if spoiled and fault > 0:
            off[bad] = math.nan if fault == 1 else 1.0
        t, s = t.requires_grad_(), torch.tensor(1.5, dtype=F64, requires_grad=True)
        options: dict[str, Any] = {"batch_dims": 1, "on_failure": "mask"}
        if kind == 1:
            layer = il.root(lambda x, t, s: s * x**2 - t, _Solver(off), **options)
        elif kind == 2:
            layer = il.fixed_point(lambda x, t, s: 0.5 * (x + t / (s * x)), _Solver(off), **options)
        else:
            constraint = il.sets.Box(0.01, 9.0) if kind == 3 else None
            layer = il.argmin(objective, _Solver(off), constraint=constraint, **options)
        with il.diagnostics() as records:
            x = layer(init, t, s)
        gradients = torch.autograd.grad((x * x)[keep].sum() + 0 * s, (t, s))
        failed = records[0].failed  # type: ignore[union-attr]
        wanted = [spoiled and lane == bad for lane in range(lanes)]
        trial.claim(failed is not None and failed.tolist() == wanted, "another lane than the bad one is masked")
        results.append((x.detach(), *gradients))
    (x0, t0, s0), (x1, t1, s1) = results
    same = torch.equal(x0[keep], x1[keep]) and torch.equal(t0[keep], t1[keep]) and torch.equal(s0, s1)
    trial.claim(same, "a lane without a fault is not bitwise what it was")
    trial.claim(bool(x1[bad].isnan().all()) and not bool(t1[bad].any()), "the bad lane is not NaN with zero gradient")
    exact = (good / 1.5) ** 0.5  # x = sqrt(t / s), d x^2 / dt = 1 / s; CG and GMRES to 1e-10, condition below 2
    trial.compare("x", [x1[keep]], [exact[keep]], 1e-13)
    trial.compare("gradient", [t1[keep]], [torch.full_like(t1[keep], 1 / 1.5)], 1e-8)


FAMILIES = [
    DrawnFamily("dependent rows", "quadratic programs with equations that depend on each other", 600,
                {"n": (3, 8), "rank": (1, 4), "extra": (1, 3), "seed": SEEDS, "single": (0, 1), "batch": (1, 3)},
                work_dependent),
    DrawnFamily("masked lanes", "lanes that fail under on_failure='mask' cost no other lane", 600,
                {"kind": (0, 3), "fault": (0, 2), "lanes": (2, 6), "n": (1, 5), "bad": (0, 5), "seed": SEEDS},
                work_lanes),
]  # fmt: skip
