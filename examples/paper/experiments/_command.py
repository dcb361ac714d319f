"""The command that repeats an experiment: its preset, and what differs from it."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any

from ._fields import differences
from ._presets import PRESETS
from ._settings import Experiment

PROGRAM = "python examples/paper/train.py"
# Folders are a machine's own; whether a bar is shown changes nothing.
_LEFT_OUT = ("data.dir", "run.dir", "run.progress", "notes", "preset", "setting")


def changes_from_preset(experiment: Experiment) -> list[str]:
    """The settings that are not the preset's, ``"run.minutes: None there, 5.0 here"``; "no preset" where there is none.

    Example:
        >>> import dataclasses
        >>> from experiments import preset
        >>> experiment = preset("reduced-glyphs-5w1s-maml")
        >>> changes_from_preset(dataclasses.replace(experiment, run=dataclasses.replace(experiment.run, seed=7)))
        ['run.seed: 0 there, 7 here']
    """
    if experiment.preset not in PRESETS:
        return ["no preset"]
    return differences(PRESETS[experiment.preset], experiment, ignore=_LEFT_OUT)


def command_of(experiment: Experiment) -> str:
    """The command that repeats ``experiment``, with ``<folder>`` for the data; without a preset, its name only.

    Example:
        >>> from experiments import preset
        >>> command_of(preset("paper-omniglot-5w1s-imaml-gd"))
        'python examples/paper/train.py paper-omniglot-5w1s-imaml-gd --data.dir <folder>'
    """
    if experiment.preset not in PRESETS:
        return f"{PROGRAM} --resume <a folder with this config.json>"
    words = [PROGRAM, experiment.preset]
    original = PRESETS[experiment.preset]
    for section in ("data", "network", "method", "outer", "evaluation", "run"):
        here, there = getattr(experiment, section), getattr(original, section)
        for entry in dataclasses.fields(here):
            name, value = f"{section}.{entry.name}", getattr(here, entry.name)
            if name not in _LEFT_OUT and value != getattr(there, entry.name):
                words.append(_option(name, value))
    if experiment.data.dataset != "glyphs":
        words.append("--data.dir <folder>")
    return " ".join(words)


def resume_command(folder: str | Path) -> str:
    """What goes on with a run folder.

    Example:
        >>> resume_command("runs/my run")
        "python examples/paper/train.py --resume 'runs/my run'"
    """
    return f"{PROGRAM} --resume {shlex.quote(str(folder))}"


def _option(name: str, value: Any) -> str:
    name = name.replace("_", "-")
    if isinstance(value, bool):
        section, _, last = name.partition(".")
        return f"--{name}" if value else f"--{section}.no-{last}"
    return f"--{name} {shlex.quote(str(value))}"
