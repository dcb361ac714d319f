"""All families over several processes, with a budget in minutes."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence

import torch
from tqdm import tqdm

from tests.thorough import (
    _broken,
    _closed_forms,
    _inexact,
    _lanes,
    _linear,
    _nonlinear,
    _programs,
    _quadratics,
    _rough,
    _structures,
    _transforms,
)
from tests.thorough._family import Family
from tests.thorough._trial import FAILURES, Outcome

FAMILIES: tuple[Family, ...] = (
    *_quadratics.FAMILIES,
    *_closed_forms.FAMILIES,
    *_nonlinear.FAMILIES,
    *_transforms.FAMILIES,
    *_linear.FAMILIES,
    *_structures.FAMILIES,
    *_inexact.FAMILIES,
    *_rough.FAMILIES,
    *_broken.FAMILIES,
    *_lanes.FAMILIES,
    *_programs.FAMILIES,
)
_CHUNK = 25


def counts_of(families: Sequence[Family], problems: int) -> list[int]:
    """How many problems each family gets; their sum is at least ``problems``."""
    total = sum(family.share for family in families)
    return [-(-problems * family.share // total) for family in families]


def chunks_of(families: Sequence[Family], problems: int, seed: int) -> list[tuple[str, int, int, int]]:
    """``(family, seed, first, count)``, the families mixed evenly: a run cut short has seen a part of each."""
    found = []
    for family, count in zip(families, counts_of(families, problems), strict=True):
        starts = range(0, count, _CHUNK)
        found += [((i + 0.5) / len(starts), family.name, s, min(_CHUNK, count - s)) for i, s in enumerate(starts)]
    return [(name, seed, first, count) for _, name, first, count in sorted(found)]


def one_thread() -> None:
    """Each process computes on one core: the problems are small, and their number is what is parallel."""
    torch.set_num_threads(1)


def do_chunk(chunk: tuple[str, int, int, int]) -> list[Outcome]:
    """The outcomes of one chunk, in whichever process."""
    name, seed, first, count = chunk
    family = next(family for family in FAMILIES if family.name == name)
    return list(family.outcomes(seed, first, count))


def run(
    families: Sequence[Family], problems: int, *, seed: int, minutes: float | None, processes: int, quiet: bool = False
) -> list[Outcome]:
    """Outcomes of about ``problems`` problems, fewer where the minutes are over.

    Which problems a seed stands for does not depend on the number of processes.
    """
    chunks = chunks_of(families, problems, seed)
    outcomes: list[Outcome] = []
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    context = multiprocessing.get_context("spawn")  # a fork of a process that has used torch's threads may hang
    bar = tqdm(total=sum(c[3] for c in chunks), unit=" problems", disable=quiet, mininterval=1, smoothing=0.05)
    with context.Pool(processes, one_thread) as pool, bar:
        for done in pool.imap_unordered(do_chunk, chunks):
            outcomes += done
            bar.update(len(done))
            for outcome in done:
                if outcome.verdict in FAILURES:
                    family = next(family for family in families if family.name == outcome.family)
                    bar.write(f"{outcome.verdict}: {family.reproduction(outcome)}\n    {outcome.note}")
            if deadline is not None and time.monotonic() > deadline:
                bar.write("the minutes are over: the rest is left out")
                break
    return outcomes
