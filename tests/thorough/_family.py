"""Families of problems: drawn from integers, so that a failure has a name and shrinks."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as hypothesis_seed
from hypothesis import strategies as st

from tests.thorough._trial import CRASHED, SILENT, Outcome, Trial, run_trial


@dataclass(frozen=True)
class Family:
    """A question asked of many problems.

    Attributes:
        name: for ``--family``.
        question: in one line.
        share: how many of 10,000 problems are its own.
    """

    name: str
    question: str
    share: int

    def outcomes(self, seed: int, first: int, count: int) -> Iterator[Outcome]:
        """The problems number ``first`` to ``first + count - 1`` of the run with this seed."""
        raise NotImplementedError

    def reproduction(self, outcome: Outcome) -> str:
        """How to see it again."""
        raise NotImplementedError


@dataclass(frozen=True)
class DrawnFamily(Family):
    """Problems of independent uniform integers: what figures (medians, shares) are taken over.

    Attributes:
        ranges: ``{name: (low, high)}``, both ends drawn; a failure is shrunk towards low.
        work: ``work(trial, **integers)``.
    """

    ranges: Mapping[str, tuple[int, int]]
    work: Callable[..., None] = field(repr=False)

    def one(self, integers: Mapping[str, int]) -> Outcome:
        """The problem of these integers."""
        case = ",".join(f"{name}={value}" for name, value in integers.items())
        return run_trial(self.name, case, lambda trial: self.work(trial, **integers))

    def outcomes(self, seed: int, first: int, count: int) -> Iterator[Outcome]:
        for index in range(first, first + count):
            draw = random.Random(zlib.crc32(f"{seed} {self.name} {index}".encode()))
            outcome = self.one({name: draw.randint(low, high) for name, (low, high) in self.ranges.items()})
            yield self.shrunk(outcome) if outcome.verdict in (SILENT, CRASHED) else outcome

    def shrunk(self, outcome: Outcome, budget: int = 60) -> Outcome:
        """The same failure with smaller integers, found greedily; the first one if nothing smaller fails."""
        best, integers = outcome, self.integers(outcome.case)
        improved = True
        while improved and budget > 0:
            improved = False
            for name, (low, _) in self.ranges.items():
                value = integers[name]
                for smaller in dict.fromkeys((low, (low + value) // 2, value - 1)):
                    if not low <= smaller < value or budget <= 0:
                        continue
                    budget -= 1
                    candidate = {**integers, name: smaller}
                    found = self.one(candidate)
                    if found.verdict == outcome.verdict:
                        best, integers, improved = found, candidate, True
                        break
        return best

    def integers(self, case: str) -> dict[str, int]:
        """``"n=3,seed=4"`` as a dict."""
        pairs = [part.split("=") for part in case.split(",") if part]
        found = {name.strip(): int(value) for name, value in pairs}
        if set(found) != set(self.ranges):
            raise ValueError(f"case={case!r} must give {', '.join(self.ranges)} for the family {self.name!r}.")
        return found

    def reproduction(self, outcome: Outcome) -> str:
        return f'python -m tests.thorough --family "{self.name}" --case {outcome.case}'


@dataclass(frozen=True)
class StrategyFamily(Family):
    """Problems of a Hypothesis strategy (trees, layouts, roles), which also shrinks a failure.

    Attributes:
        strategy: makes the strategy of one problem's arguments.
        work: ``work(trial, arguments)``.
    """

    strategy: Callable[[], st.SearchStrategy[Any]] = field(repr=False)
    work: Callable[[Trial, Any], None] = field(repr=False)

    def outcomes(self, seed: int, first: int, count: int) -> Iterator[Outcome]:
        found: list[Outcome] = []
        failed: list[Outcome] = []

        @hypothesis_seed(zlib.crc32(f"{seed} {self.name} {first}".encode()))
        @settings(
            max_examples=count,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink],
            report_multiple_bugs=False,
            print_blob=False,
        )
        @given(self.strategy())
        def all_hold(arguments: Any) -> None:
            outcome = run_trial(self.name, f"{arguments!r}"[:400], lambda trial: self.work(trial, arguments))
            if failed or outcome.verdict in (SILENT, CRASHED):  # from here on Hypothesis shrinks
                if outcome.verdict in (SILENT, CRASHED):
                    failed.append(outcome)
                    raise AssertionError(outcome.note)
                return
            found.append(outcome)

        try:
            all_hold()
        except AssertionError:
            yield failed[-1]  # the smallest; the rest of this chunk was not drawn
        yield from found

    def reproduction(self, outcome: Outcome) -> str:
        return f'python -m tests.thorough --family "{self.name}" (arguments {outcome.case})'
