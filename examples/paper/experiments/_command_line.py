"""The command line: a preset, then any of its settings; or a run folder to go on with."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import implicitlayer as il

from ._command import PROGRAM
from ._launch import num_processes, start, take_processes
from ._presets import PRESETS, preset
from ._run import run
from ._settings import Data, Evaluation, Experiment, Method, Network, Outer, Run

_SECTIONS = {"data": Data, "network": Network, "method": Method, "outer": Outer, "evaluation": Evaluation, "run": Run}
_USAGE = f"""Meta-learning experiments: every cell of the iMAML paper, and the same reduced to a CPU.

    {PROGRAM} PRESET [--SECTION.SETTING VALUE ...]   a new run, for example
    {PROGRAM} glyphs --run.minutes 1                 on pictures that need no download
    {PROGRAM} paper-omniglot-5w1s-imaml-gd --data.dir <folder> --run.device cuda --run.minutes 5
    {PROGRAM} PRESET --help                          its settings, and what was chosen where its source is silent
    {PROGRAM} --resume RUN                           go on with a run folder (--data.dir, --run.device and what else
                                                     changes no result may follow)
    {PROGRAM} --resume RUN --run.minutes 30          go on with a larger budget, also after the end
    {PROGRAM} PRESET --processes 1                   on a CPU the tasks are shared among processes, one for each core,
                                                     unless OMP_NUM_THREADS allows fewer; a preset cpu-... takes one
    torchrun --nproc-per-node 4 examples/paper/train.py PRESET ...   the same with GPUs, or on several machines

Presets:
"""


def usage() -> str:
    """What ``--help`` prints."""
    return _USAGE + "".join(f"    {name}\n" for name in sorted(PRESETS))


def parse(arguments: Sequence[str]) -> tuple[Experiment, bool]:
    """The experiment that a command line asks for, and whether it goes on with a folder.

    Args:
        arguments: the words after the program's name.

    Raises:
        SystemExit: a setting that tyro refuses (its message names it), or ``PRESET --help``.
        ValueError: an unknown preset, a value out of its range, or a folder that holds no run.
        ImportError: tyro is missing.
    """
    if arguments[0] == "--resume":
        if len(arguments) < 2 or arguments[1].startswith("-"):
            raise ValueError("--resume takes a run folder: --resume RUN.")
        folder = Path(arguments[1])
        if not (folder / "config.json").exists():
            raise ValueError(f"--resume {folder}: there is no config.json, so this is no run folder.")
        experiment = Experiment.load(folder / "config.json")
        changed = _overridden(experiment, arguments[2:]) if arguments[2:] else experiment
        return dataclasses.replace(changed, run=dataclasses.replace(changed.run, dir=str(folder))), True
    if arguments[0].startswith("-"):
        raise ValueError(f"{arguments[0]}: a preset comes first, then its settings. --help lists the presets.")
    return _overridden(preset(arguments[0]), arguments[1:]), False


def _overridden(experiment: Experiment, arguments: Sequence[str]) -> Experiment:
    try:
        import tyro
    except ImportError as error:
        raise ImportError(
            "the command line needs tyro, which is not installed: pip install 'implicitlayer[examples]'. In Python, "
            "experiments.run(experiments.preset(...)) does without."
        ) from error
    fields = [(name, kind, dataclasses.field(default=getattr(experiment, name))) for name, kind in _SECTIONS.items()]
    sections = dataclasses.make_dataclass("Settings", fields, frozen=True)
    given: Any = tyro.cli(
        sections,
        args=list(arguments),
        prog=f"{PROGRAM} {experiment.preset}",
        description="\n\n".join([f"The preset {experiment.preset}.", *experiment.notes]),
    )
    return dataclasses.replace(experiment, **{name: getattr(given, name) for name in _SECTIONS})


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for; errors of the settings, data and device are one line, not a traceback."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(usage(), end="")
        return
    try:
        words, asked = take_processes(words)
        experiment, resume = parse(words)
        if arguments is None and "RANK" not in os.environ:
            count = num_processes(experiment) if asked is None else asked
            if count > 1:
                sys.exit(start(count, words))
        results = run(experiment, resume=resume)
    except (ValueError, il.ImplicitLayerError, OSError, ImportError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt as stopped:
        raise SystemExit(f"\n{str(stopped) or 'stopped before anything was computed'}") from None
    if os.environ.get("RANK", "0") != "0":  # one of several processes that torchrun started: the first one tells
        return
    print(
        f"{results['preset']}: {results['accuracy']:.2f} ± {results['interval']:.2f} % on {results['num_tasks']} tasks "
        f"({results['split']}; {'' if results['transductive'] else 'not '}transductive), after "
        f"{results['meta_steps']} meta-step{'' if results['meta_steps'] == 1 else 's'} in {results['seconds']:.0f} s"
    )
