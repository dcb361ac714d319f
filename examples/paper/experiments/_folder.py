"""The run folder: which experiment it holds, whether that is finished, and where and by what it was computed."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

import torch

from implicitlayer import ImplicitLayerError
from implicitlayer.meta import CheckpointError, load_checkpoint, save_checkpoint, save_json

from ._environment import machine, versions
from ._fields import differences
from ._settings import Experiment

BUDGETS = ("max_steps", "minutes")
# What may change between the parts of one run: how long it is, where data and folder are, what is shown, memory.
CIRCUMSTANCES = (
    *(f"run.{name}" for name in BUDGETS),
    "notes",
    "data.dir",
    "run.dir",
    "run.device",
    "run.progress",
    "run.tensorboard",
    "run.checkpoint_seconds",
    "run.tasks_per_chunk",
    "run.memory_budget",
)

_COMPOSITE = {"class": "Composite", "loss": "function", "model": "function"}


class RunFolderError(ImplicitLayerError, ValueError):
    """A run folder that holds another experiment, or holds one already."""


def without_folders(experiment: Experiment) -> dict[str, Any]:
    """The settings as plain data, without the folders of this machine."""
    settings = experiment.to_dict()
    settings["data"]["dir"] = settings["run"]["dir"] = None
    return settings


def new_folder(experiment: Experiment) -> Path:
    """``run.dir``, or a new name in ``runs/``."""
    if experiment.run.dir is not None:
        return Path(experiment.run.dir)
    name = f"{experiment.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    # two runs that start in one second get two folders
    free = (name if number == 1 else f"{name}-{number}" for number in itertools.count(1))
    return next(folder for word in free if not (folder := Path("runs") / word).exists())


def finished(folder: Path, experiment: Experiment) -> dict[str, Any] | None:
    """The results of a run that has come to its end; None where there are none, or those of another budget."""
    path = folder / "results.json"
    if not path.exists():
        return None
    results: dict[str, Any] = _read(path)
    then, now = results.get("config", {}).get("run", {}), experiment.to_dict()["run"]
    return results if all(then.get(name) == now[name] for name in BUDGETS) else None


def save_results(folder: Path, results: dict[str, Any]) -> None:
    """Write ``results.json`` in one step; those of a smaller budget stay as ``results-<meta-steps>.json``."""
    path = folder / "results.json"
    if path.exists():
        path.replace(folder / f"results-{_read(path).get('meta_steps', 'earlier')}.json")
    save_json(path, results)


def check_folder(folder: Path, experiment: Experiment, *, resume: bool) -> None:
    """Refuse a folder that holds another experiment, or this one where ``resume`` is false; nothing is written.

    Raises:
        RunFolderError: the message names what differs, and what to do.
    """
    path = folder / "config.json"
    if not path.exists():
        return
    changed = differences(Experiment.load(path), experiment, ignore=CIRCUMSTANCES)
    if changed:
        raise RunFolderError(
            f"{folder} holds another experiment ({'; '.join(changed)}), which cannot be continued as this one. Give "
            "another run.dir, or go on with the one that is there: --resume " + str(folder)
        )
    if not resume:
        raise RunFolderError(
            f"{folder} holds this experiment already. Go on with --resume {folder}, or give another run.dir."
        )


def open_folder(folder: Path, experiment: Experiment, device: torch.device, num_processes: int) -> None:
    """Write ``config.json`` (again where the budget changed) and add this process to ``versions.json``."""
    config = folder / "config.json"
    if not config.exists() or any(
        getattr(Experiment.load(config).run, name) != getattr(experiment.run, name) for name in BUDGETS
    ):
        experiment.save(config)
    path = folder / "versions.json"
    # One entry for every start: a run that went on elsewhere, or with another torch, shows it.
    starts = _read(path).get("starts", []) if path.exists() else []
    start = {"machine": machine(device), "versions": versions(), "processes": num_processes}
    save_json(path, {"starts": [*starts, start]})


def renew(folder: Path) -> None:
    """Rename the task loss in checkpoints of runs that were begun when it was a composite and not yet a ``TaskLoss``.

    It is the same loss: :meth:`TaskLoss.as_composite` is what it was.
    """
    for path in (folder / "checkpoint.pt", folder / "best.pt"):
        if not path.exists():
            continue
        try:
            state = load_checkpoint(path)
        except CheckpointError:  # the trainer says so, and what to do
            return
        method = state.get("settings", {}).get("method", {})
        if method.get("task_loss") == _COMPOSITE:
            method["task_loss"] = "TaskLoss"
            save_checkpoint(path, state)


def _read(path: Path) -> dict[str, Any]:
    """A JSON file of the folder; one that was damaged from outside is an error that names it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(value, dict):
            return value
        problem = "no object"
    except ValueError as error:
        problem = str(error)
    raise RunFolderError(f"{path} is damaged ({problem}). Remove this one file; the run goes on from its checkpoint.")
