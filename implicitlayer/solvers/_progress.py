"""Watching a solver: a callback once per iteration, and a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from implicitlayer._errors import extra
from implicitlayer.base._solution import RecordingSolver
from implicitlayer.solvers._leaves import check_limits

Report = Callable[["Iteration"], None]


@dataclass(frozen=True, eq=False)
class Iteration:
    """What a solver's ``callback`` is given: the point reached after ``step`` steps; step 0 is the start.

    Args:
        step: steps made; of a batch, those of the lane that is furthest ahead, so a number may come twice.
        value: the objective there, [*lanes].
        gradient_norm: Euclidean norm of its gradient there, float64 [*lanes]; NaN where a solver uses none.
        x: the unknowns, in the structure of ``init``; tensors that may be kept, not changed.

    Example:
        >>> import torch, implicitlayer as il
        >>> values = []
        >>> solver = il.solvers.GradientDescent(0.5, max_steps=2, callback=lambda i: values.append(i.value.item()))
        >>> _ = solver(lambda x: 0.5 * ((x - 4) ** 2).sum(), torch.zeros(1, dtype=torch.float64))
        >>> values
        [8.0, 2.0, 0.5]
    """

    step: int
    value: torch.Tensor
    gradient_norm: torch.Tensor
    x: Any


@dataclass(frozen=True, kw_only=True)
class Settings(RecordingSolver):
    """Settings that the own solvers have in common; see their docstrings."""

    max_steps: int = 1000
    rtol: float = 0.0
    atol: float = 0.0
    callback: Callable[[Iteration], None] | None = None
    progress: bool = False

    finds: ClassVar[Literal["minimum", "root", "fixed point"]] = "minimum"
    batched: ClassVar[Any] = True

    def __post_init__(self) -> None:
        check_limits(self)

    @property
    def has_tolerance(self) -> bool:
        """Whether there is a test besides the number of steps."""
        return self.rtol > 0 or self.atol > 0


@contextmanager
def reporting(
    callback: Callable[[Iteration], None] | None, progress: bool, max_steps: int | None
) -> Iterator[Report | None]:
    """What a solver calls at every iteration: its user's callback, its bar, or both; None where neither is wanted.

    The bar shows the largest gradient norm of a batch and closes when the solver returns or raises.
    """
    if not progress:
        yield callback
        return
    with extra("progress", "progress=True needs tqdm"):
        from tqdm import tqdm
    with tqdm(total=max_steps, unit="step", leave=False) as bar:

        def report(iteration: Iteration) -> None:
            norm = iteration.gradient_norm
            bar.set_postfix_str(f"gradient norm {float(norm.max()) if norm.numel() else 0.0:.2e}", refresh=False)
            bar.update(iteration.step - bar.n)
            if callback is not None:
                callback(iteration)

        yield report
