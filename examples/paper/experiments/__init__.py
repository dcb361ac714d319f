"""Experiments: typed settings, presets for every cell of the paper, and runs that can be killed at any moment.

On the command line: ``python examples/paper/train.py --help``. In Python: ``run(preset("glyphs"))``.
"""

from ._build import build_trainer, smoke
from ._command import changes_from_preset, command_of
from ._device import PrecisionError
from ._environment import machine, versions
from ._folder import RunFolderError
from ._presets import PRESETS, preset
from ._run import run
from ._settings import Data, Evaluation, Experiment, Method, Network, Outer, Run

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
