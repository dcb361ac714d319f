"""Data and objectives that are broken: NaN, Inf, no second derivative, no value, no graph."""

from __future__ import annotations

import math
from typing import Any

import torch

import implicitlayer as il
from implicitlayer import testing
from implicitlayer.base._types import OnFailure
from tests.thorough._family import DrawnFamily
from tests.thorough._quadratics import SEEDS
from tests.thorough._reference import F64, Tensor
from tests.thorough._trial import Trial

BREAKS = (
    "NaN in theta",
    "Inf in theta",
    "NaN in a closed-over tensor",
    "NaN in the cotangent",
    "Inf in the cotangent",
    "second derivative infinite",
    "not scalar",
    "detached from x",
    "a Python number",
    "complex",
    "linear in x",
)


def work_broken(trial: Trial, what: int, n: int, seed: int, lanes: int, policy: int) -> None:
    """A named error or warning under every policy but "ignore", where NaN and Inf still are errors."""
    name = trial.kind = BREAKS[what]
    trial.must = "report"
    t, c = testing.normal_tensor((n,), seed=seed), testing.normal_tensor((n,), seed=seed + 1)
    v = testing.normal_tensor((n,), seed=seed + 2)
    matrix = testing.spd_matrix(n, log10_cond=1, seed=seed)
    bad = math.nan if "NaN" in name else math.inf
    if "in theta" in name:
        t[seed % n] = bad
    elif "closed-over" in name:
        c[seed % n] = bad
        c.requires_grad_(bool(seed % 2))
    elif "cotangent" in name:
        v[seed % n] = bad

    def objective(x: Tensor, t: Tensor) -> Any:
        d = x - t
        value = 0.5 * d @ (matrix @ d) + 0.25 * ((x - c) ** 4).sum()
        return {
            "second derivative infinite": (d.abs() ** 1.5).sum(),  # 0.75 |d|^-1/2, at d = 0
            "not scalar": d**2,
            "detached from x": ((x.detach() - t) ** 2).sum(),
            "a Python number": value.item() if name == "a Python number" else None,
            "complex": value + 0j,
            "linear in x": t @ x,  # no minimum: H = 0
        }.get(name, value)

    # an answer that is finite whatever the data are, so that nothing but the data can be what is complained of
    answer = t.nan_to_num(0.0, 0.0, 0.0)
    kinds: tuple[OnFailure, ...] = ("warn", "raise", "ignore")
    kind = kinds[policy]
    if kind == "ignore" and name == "linear in x":
        kind = "warn"  # "ignore" asks for silence about a singular matrix
    layer = il.argmin(objective, lambda f, x, t: answer.clone(), on_failure=kind)
    theta = t.requires_grad_()
    if lanes > 1 and "closed-over" not in name and name != "a Python number":  # vmap itself refuses .item()
        stacked = torch.stack([theta.detach()] * lanes).requires_grad_()
        x = torch.func.vmap(lambda t: layer(torch.zeros(n, dtype=F64), t))(stacked)
        torch.autograd.grad(x, stacked, torch.stack([v] * lanes))
    else:
        x = layer(torch.zeros(n, dtype=F64), theta)
        torch.autograd.grad(x, theta, v)


FAMILIES = [
    DrawnFamily("broken", "NaN, Inf, objectives without value, graph or second derivative", 300,
                {"what": (0, len(BREAKS) - 1), "n": (1, 6), "seed": SEEDS, "lanes": (1, 3), "policy": (0, 2)},
                work_broken),
]  # fmt: skip
