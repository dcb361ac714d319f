"""How ``il.constrained_argmin`` calls the user's solver, and what it reads from the answer: x and multipliers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from implicitlayer._errors import NonFiniteError, SolverOutputError
from implicitlayer.base._failures import FailedResult, marks, refuse, replaced
from implicitlayer.base._solution import SolverResult
from implicitlayer.base._status import Status
from implicitlayer.base._tree import TreeSpec, flatten, flatten_with_names, name_lanes
from implicitlayer.base._types import Leaves
from implicitlayer.constrained._kkt_lagrangian import ConstrainedProblem, Form
from implicitlayer.layer._forward import _check_leaf, called
from implicitlayer.programs._kkt_multipliers import Known


@dataclass(frozen=True, eq=False)
class Answer:
    """What a solver returned.

    Attributes:
        x: leaves, with all lanes.
        known: its own multipliers of each lane, in the order of the lanes; None for what it did not give.
        results: how its calls ended, as it says itself.
    """

    x: Leaves
    known: list[Known]
    results: list[SolverResult]

    def result(self, value: Any) -> SolverResult:
        """``value``, with the worst status and the largest number of steps of all calls."""
        worst = max(self.results, key=lambda result: int(result.status or 0), default=SolverResult(None))
        counts = [result.num_steps for result in self.results if result.num_steps is not None]
        lanes = torch.tensor([result.status is Status.NONFINITE for result in self.results])
        nonfinite = lanes if len(lanes) > 1 else worst.nonfinite
        return SolverResult(value, worst.status, max(counts) if counts else None, worst.message, nonfinite=nonfinite)


@dataclass(frozen=True, eq=False)
class Caller:
    """Calls the user's solver: once with all lanes if it is batched, else lane by lane.

    Args:
        solver: the user's.
        forms: of equations and inequalities.
        names: of the leaves of x.
        returns_multipliers: whether the solver returns ``(x, (lambda, mu))``.
    """

    solver: Callable[..., Any]
    forms: tuple[Form, Form]
    names: list[str]
    returns_multipliers: bool

    @property
    def batched(self) -> bool:
        """Whether the user's solver takes all lanes at once."""
        return bool(getattr(self.solver, "batched", False))

    def __call__(
        self, problem: ConstrainedProblem, init: Leaves, spec: TreeSpec, theta: tuple[Any, ...], lanes: torch.Size
    ) -> Answer:
        """The answer for leaves of init [*lanes, ...]."""
        if self.batched or not lanes:
            found = self._call(problem, init, spec, theta, lanes)
        else:
            every = list(itertools.product(*(range(size) for size in lanes)))
            one = torch.Size()
            parts = [self._call(problem.of_lane(lane), [t[lane] for t in init], spec, theta, one) for lane in every]
            x = [
                torch.stack([part.x[i] for part in parts]).reshape(like.shape) if parts else like
                for i, like in enumerate(init)
            ]
            found = Answer(x, [part.known[0] for part in parts], [part.results[0] for part in parts])
        return self._finite(found, init, lanes)

    def _call(
        self, problem: ConstrainedProblem, init: Leaves, spec: TreeSpec, theta: tuple[Any, ...], lanes: torch.Size
    ) -> Answer:
        answer = called(self.solver, problem, init, spec, theta, masks=not lanes and marks.failed is not None)
        if isinstance(answer, FailedResult):
            none = [self._vectors(None, form, lanes, init[0].device)[0] for form in self.forms]
            return Answer(flatten(answer.value)[0], [(none[0], none[1])], [answer])
        result = answer if isinstance(answer, SolverResult) else SolverResult(answer)
        try:
            x, given = self._read(result.value, init)
            known = [self._vectors(given[i], form, lanes, init[0].device) for i, form in enumerate(self.forms)]
        except SolverOutputError as error:
            if not problem.lane:
                raise
            raise SolverOutputError(
                f"{error} It is called lane by lane, here for lane {problem.lane}: theta comes whole, and "
                "t[problem.lane] is the part of this lane. A solver of all lanes says so by an attribute batched = "
                "True."
            ) from error
        return Answer(x, list(zip(*known, strict=True)), [result])

    def _read(self, answer: Any, like: Leaves) -> tuple[Leaves, tuple[Any, Any]]:
        """x leaves and what the solver gave as multipliers."""
        given: tuple[Any, Any] = (None, None)
        if self.returns_multipliers or getattr(self.solver, "returns_multipliers", False):
            if not isinstance(answer, tuple) or len(answer) != 2 or not isinstance(answer[1], tuple | list):
                raise SolverOutputError(
                    "with solver_returns_multipliers=True the solver must return (x, (lambda, mu)), got "
                    f"{type(answer).__name__}. Give None for multipliers that it does not know."
                )
            answer, pair = answer
            if len(pair) != 2:
                raise SolverOutputError(f"the solver must return two multipliers, (lambda, mu), got {len(pair)}.")
            given = (pair[0], pair[1])
        leaves, names = flatten_with_names(answer, "x")
        if names != self.names:
            raise SolverOutputError(
                f"the solver must return the structure of init: expected leaves {self.names}, got {names}. If it "
                "returns multipliers too, pass solver_returns_multipliers=True."
            )
        return [_check_leaf(leaf, name, t) for leaf, name, t in zip(leaves, names, like, strict=True)], given

    def _vectors(
        self, value: Any, form: Form, lanes: torch.Size, device: torch.device
    ) -> Sequence[torch.Tensor | None]:
        """Multipliers of each lane, [size]; None where the solver gave none."""
        if form.spec is None or value is None:
            none = torch.zeros(0, dtype=torch.float64, device=device) if form.spec is None else None
            return [none] * lanes.numel()
        parts = [torch.as_tensor(leaf).detach().to(device, torch.float64) for leaf in flatten(value)[0]]
        for part in parts:
            if part.shape[: len(lanes)] != lanes:
                raise SolverOutputError(
                    f"the solver returned multipliers of shape {tuple(part.shape)} for {form.name}; a batched solver "
                    f"returns them with the lanes {tuple(lanes)} in front."
                )
        flat = [part.reshape(lanes.numel(), part.shape[len(lanes) :].numel()) for part in parts]
        vectors = torch.cat(flat, -1) if flat else torch.zeros(lanes.numel(), 0, dtype=torch.float64, device=device)
        if vectors.shape[-1] != form.size:
            raise SolverOutputError(
                f"the solver returned {vectors.shape[-1]} multipliers for {form.name}, which has {form.size} entries."
            )
        return vectors.unbind(0)

    def _finite(self, found: Answer, init: Leaves, lanes: torch.Size) -> Answer:
        """The answer, with init in the place of what is not finite in masked lanes."""
        x = found.x
        for leaf, name in zip(found.x, self.names, strict=True):
            finite = leaf.isfinite().reshape(*lanes, leaf.shape[len(lanes) :].numel()).all(-1)
            if not bool(finite.all()):
                error = NonFiniteError(
                    f"the solver returned NaN or Inf in {name}{name_lanes(~finite)}: it diverged or failed."
                )
                refuse(~finite, error)
                x = replaced(~finite, x, init)
        for which, form in enumerate(self.forms):
            vectors = [pair[which] for pair in found.known]
            finite = torch.tensor([v is None or bool(v.isfinite().all()) for v in vectors], dtype=torch.bool)
            if not bool(finite.all()):
                where = name_lanes(~finite.reshape(lanes))
                raise NonFiniteError(f"the solver returned NaN or Inf in the multipliers of {form.name}{where}.")
        return replace(found, x=x)
