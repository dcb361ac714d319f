"""Regression tasks: one sine curve each, seen at a few points."""

# B: tasks, K: support points, Q: query points

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from implicitlayer.base._tree import check_integer
from implicitlayer.fewshot._episodes import TaskStream, on_device

Points = tuple[Tensor, Tensor]


class Sinusoids(TaskStream[tuple[Points, Points]]):
    """Draws regression tasks ``y = A sin(x - p)``: the amplitude A and the phase p differ between tasks.

    A, p and all x are uniform in their intervals. A batch of B tasks is a pair (support, query) of pairs (x, y) of
    float32 tensors: ``[B, K, 1]`` each in the support, ``[B, Q, 1]`` in the query. Task number i depends on the seed
    and i alone, as in :class:`EpisodeSampler`.

    Args:
        num_shots, num_query: K and Q, support and query points of a task, at least 1.
        amplitude, phase, interval: smallest and largest A, p (in radians) and x.
        seed: integer of 0 or more.
        device: where the tasks are returned; they are drawn on the host.

    Raises:
        ValueError: a number out of range, or an interval whose ends are not finite and in order.

    Source: Finn, Abbeel, Levine, Model-Agnostic Meta-Learning (ICML 2017), section 5.1, from which the defaults are;
    its networks are ``mlp()``.
    """

    def __init__(
        self,
        *,
        num_shots: int = 10,
        num_query: int = 10,
        amplitude: tuple[float, float] = (0.1, 5.0),
        phase: tuple[float, float] = (0.0, math.pi),
        interval: tuple[float, float] = (-5.0, 5.0),
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        check_integer("num_shots", num_shots, 1)
        check_integer("num_query", num_query, 1)
        super().__init__(seed)
        self.num_shots, self.num_query = num_shots, num_query
        self.amplitude = _interval("amplitude", amplitude)
        self.phase = _interval("phase", phase)
        self.interval = _interval("interval", interval)
        self.device = torch.device(device)

    def __repr__(self) -> str:
        listed = ", ".join(f"{name}={value!r}" for name, value in self._settings().items())
        return f"Sinusoids({listed}, seed={self.seed})"

    def _settings(self) -> dict[str, Any]:
        ranges = {name: list(getattr(self, name)) for name in ("amplitude", "phase", "interval")}
        return {"num_shots": self.num_shots, "num_query": self.num_query, **ranges}

    def _draw(self, random: np.random.Generator, num_tasks: int) -> tuple[Points, Points]:
        draws = random.random((num_tasks, 2 + self.num_shots + self.num_query))
        amplitude, phase, x = np.split(draws, (1, 2), axis=1)
        x = _scaled(x, self.interval)
        y = _scaled(amplitude, self.amplitude) * np.sin(x - _scaled(phase, self.phase))
        points = np.stack([x, y])[..., None].astype(np.float32)  # [2, B, K + Q, 1]
        inputs, targets = on_device(points, self.device)
        shots = self.num_shots
        return (inputs[:, :shots], targets[:, :shots]), (inputs[:, shots:], targets[:, shots:])


def _interval(name: str, ends: tuple[float, float]) -> tuple[float, float]:
    try:
        low, high = (float(end) for end in ends)
    except (TypeError, ValueError):  # no sequence, not two, no numbers
        low = high = math.nan
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise ValueError(f"{name}={ends!r} must be two finite numbers, the smaller first.")
    return low, high


def _scaled(uniform: Any, ends: tuple[float, float]) -> Any:
    return ends[0] + (ends[1] - ends[0]) * uniform
