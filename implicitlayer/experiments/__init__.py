"""Experiments: typed settings, presets for every cell of the paper, and runs that can be killed at any moment.

On the command line: ``python -m implicitlayer.experiments --help``. In Python: ``run(preset("glyphs"))``.
"""

from implicitlayer.experiments._build import build_trainer, smoke
from implicitlayer.experiments._command import changes_from_preset, command_of
from implicitlayer.experiments._device import PrecisionError
from implicitlayer.experiments._environment import machine, versions
from implicitlayer.experiments._folder import RunFolderError
from implicitlayer.experiments._presets import PRESETS, preset
from implicitlayer.experiments._run import run
from implicitlayer.experiments._settings import Data, Evaluation, Experiment, Method, Network, Outer, Run

__all__ = [
    "PRESETS",
    "Data",
    "Evaluation",
    "Experiment",
    "Method",
    "Network",
    "Outer",
    "PrecisionError",
    "Run",
    "RunFolderError",
    "build_trainer",
    "changes_from_preset",
    "command_of",
    "machine",
    "preset",
    "run",
    "smoke",
    "versions",
]
