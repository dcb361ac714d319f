"""The table at the end: Markdown to read and print, JSON to keep."""

from __future__ import annotations

import json
import math
import os
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import implicitlayer as il
from tests.thorough._family import Family
from tests.thorough._figures import Figure, Row, figures_of, rows_of
from tests.thorough._trial import FAILURES, VERDICTS, Outcome

_MOST_KINDS = 5  # a family with more is one row of the Markdown table; the JSON has them all


@dataclass(frozen=True)
class Report:
    """All outcomes of a run and how they were got.

    Attributes:
        outcomes: of every problem that was done.
        families: those that were asked.
        command: as it was called.
        asked: number of problems that were wanted.
        seconds: of wall time.
        seed: of the run.
    """

    outcomes: Sequence[Outcome]
    families: Sequence[Family]
    command: str
    asked: int
    seconds: float
    seed: int

    @property
    def rows(self) -> list[Row]:
        return rows_of(self.outcomes, [family.name for family in self.families])

    @property
    def figures(self) -> list[Figure]:
        return figures_of(self.outcomes, self.asked)

    @property
    def failures(self) -> list[Outcome]:
        """Each case once: many problems may shrink to one."""
        return list({(o.family, o.case): o for o in self.outcomes if o.verdict in FAILURES}.values())

    @property
    def passed(self) -> bool:
        """No silent wrong result, no crash, no false alarm, no figure missed."""
        return not self.failures and all(figure.held is not False for figure in self.figures)

    def machine(self) -> dict[str, Any]:
        """Where it ran."""
        model = platform.processor() or platform.machine()
        try:
            lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
        except (OSError, StopIteration):
            pass
        versions = {"python": platform.python_version(), "torch": torch.__version__, "implicitlayer": il.__version__}
        return {"cpu": model, "cores": os.cpu_count(), **versions}

    def markdown(self) -> str:
        """Both tables, and what failed with the way to see it again."""
        machine = self.machine()
        lines = [
            f"`{self.command}`: {len(self.outcomes)} problems in {self.seconds / 60:.1f} minutes, seed {self.seed}; "
            f"{machine['cpu']} ({machine['cores']} cores), Python {machine['python']}, torch {machine['torch']}.",
            "",
            "| figure | target | measured | over | held |",
            "|---|---|---|---|---|",
        ]
        answers = {True: "yes", False: "**MISSED**", None: "-"}
        for f in self.figures:
            lines.append(f"| {f.name} | {f.target or '-'} | {_number(f.measured)} | {f.problems} | {answers[f.held]} |")
        lines += [
            "",
            f"| family | problems | {' | '.join(VERDICTS)} | median error | worst error | median HVPs |",
            "|---|---|" + "---|" * (len(VERDICTS) + 3),
        ]
        kinds = Counter(r.family for r in self.rows if r.kind)
        for r in self.rows:
            if r.kind and kinds[r.family] > _MOST_KINDS:
                continue
            name = f"**{r.family}**" if not r.kind else f"- {r.kind}"
            counts = " | ".join(str(r.verdicts[v]) for v in VERDICTS)
            errors = f"{_number(r.median_error)} | {_number(r.worst_error)} | {_number(r.median_steps)}"
            lines.append(f"| {name} | {r.problems} | {counts} | {errors} |")
        by_name = {family.name: family for family in self.families}
        if self.failures:
            lines += ["", f"{len(self.failures)} failures:", ""]
        lines += [f"- {o.verdict}: {by_name[o.family].reproduction(o)}\n  {o.note}" for o in self.failures[:40]]
        return "\n".join(lines) + "\n"

    def write(self, folder: Path) -> None:
        """``thorough.md`` and ``thorough.json`` in ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "thorough.md").write_text(self.markdown(), encoding="utf-8")
        data = {
            "command": self.command,
            "seed": self.seed,
            "seconds": self.seconds,
            "problems": len(self.outcomes),
            "machine": self.machine(),
            "passed": self.passed,
            "figures": [asdict(f) for f in self.figures],
            "families": [asdict(r) for r in self.rows],
            "failures": [asdict(o) for o in self.failures],
        }
        (folder / "thorough.json").write_text(json.dumps(_finite(data), indent=1) + "\n", encoding="utf-8")


def _number(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.0f}" if value == int(min(value, 1e9)) and value < 1e6 else f"{value:.3g}"


def _finite(data: Any) -> Any:
    """The same with NaN and infinity as None and text, which JSON has no sign for."""
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_finite(value) for value in data]
    if isinstance(data, float) and not math.isfinite(data):
        return None if math.isnan(data) else str(data)
    return data
