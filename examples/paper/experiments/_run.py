"""Run an experiment: train, measure once on test classes, and leave a folder that says how."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from implicitlayer.meta import Evaluation, Trainer, WorkerGroup, distributed, evaluate

from ._build import (
    accuracy_of,
    build_method,
    build_network,
    build_trainer,
    inductive_accuracy_of,
    load_classes,
    test_episodes,
)
from ._command import changes_from_preset, command_of, resume_command
from ._device import allow_tf32, pick_device, set_tf32
from ._environment import machine, versions
from ._figures import draw
from ._folder import (
    check_folder,
    finished,
    new_folder,
    open_folder,
    renew,
    save_results,
    without_folders,
)
from ._settings import Experiment


def run(experiment: Experiment, *, resume: bool = False) -> dict[str, Any]:
    """Train, evaluate on test classes, and write the run folder; killed at any moment, it can go on.

    The folder holds ``config.json``, ``versions.json``, ``metrics.jsonl``, ``checkpoint.pt``, ``best.pt``,
    ``results.json`` (at the end, in one step) and pictures. Under ``torchrun`` the tasks of a meta-step are shared
    among the processes, and the first one writes.

    Args:
        experiment: the settings; ``run.dir`` names the folder, else a new one is made in ``runs/``.
        resume: go on with what the folder holds, also with a larger budget (a decaying rate then follows the new one);
            a run that has used its budget is returned as it is. An empty folder is a start.

    Returns:
        What ``results.json`` holds: test accuracy in per cent with its 95 % interval, whether it is transductive,
        meta-steps, seconds of training, split, seed, machine, versions, and the command that repeats it.

    Raises:
        RunFolderError: the folder holds another experiment, or this one and ``resume`` is false.
        ValueError: no such device.
        PrecisionError: TF32 was asked for and changes the meta-gradient too much.
        NonFiniteError: the inner problem has diverged; the checkpoint holds the last good step.
        KeyboardInterrupt: after Ctrl-C; the message says what the checkpoint holds, and how to go on.

    Example:
        >>> import tempfile, dataclasses
        >>> from experiments import preset, smoke
        >>> experiment = smoke(preset("reduced-glyphs-5w1s-fomaml"))
        >>> folder = tempfile.mkdtemp()
        >>> experiment = dataclasses.replace(experiment, run=dataclasses.replace(experiment.run, dir=folder))
        >>> results = run(experiment)
        >>> results["meta_steps"], results["num_tasks"], results["transductive"]
        (1, 3, True)
        >>> run(experiment, resume=True) == results  # finished: nothing is computed
        True
    """
    with distributed(device=pick_device(experiment.run.device).type) as group:
        device = group.device if group.size > 1 else pick_device(experiment.run.device)
        # The first process's clock names a new folder.
        agreed = group.from_first(lambda: {"folder": str(new_folder(experiment))}) or {}
        folder = Path(agreed["folder"])
        check_folder(folder, experiment, resume=resume)
        done = finished(folder, experiment)
        _wait(group)  # no process may find the results or settings that another one writes below
        if done is not None:
            return done
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)  # of this run, not of one before it in this process
        # Data that is not there is found out before anything is written.
        trainer = build_trainer(experiment, run_dir=folder, device=device)
        if group.is_first:
            open_folder(folder, experiment, device, group.size)
            renew(folder)
            if experiment.run.dir is None:
                print(f"run folder: {folder}", flush=True)
        _wait(group)  # until the checkpoints are those of now
        try:
            return _run(experiment, trainer, folder, device, group)
        except KeyboardInterrupt as stopped:
            kept = str(stopped) or "stopped; the checkpoint holds what was trained until then"
            raise KeyboardInterrupt(f"{kept}. Go on with: {resume_command(folder)}") from None


def _run(
    experiment: Experiment, trainer: Trainer, folder: Path, device: torch.device, group: WorkerGroup
) -> dict[str, Any]:
    set_tf32(False)
    difference = None
    if experiment.run.tf32 and device.type == "cuda":
        difference = allow_tf32(trainer, experiment.run.tf32_tolerance)
        if group.is_first:
            print(f"TF32 changes the meta-gradient by {difference:.1e} (relative); it is on.")
    trainer.resume()
    trainer.fit()
    if experiment.evaluation.checkpoint == "best":
        trainer.load_best()
    tested = _test(experiment, trainer, device, group)
    results = _results(experiment, trainer, tested, device, group) | {"tf32_difference": difference}
    if group.is_first:
        results["figures"] = _draw(experiment, trainer, folder, device)
        save_results(folder, results)
    _wait(group)
    return finished(folder, experiment) or results


def _test(experiment: Experiment, trainer: Trainer, device: torch.device, group: WorkerGroup) -> Evaluation:
    network, settings = build_network(experiment), experiment.evaluation
    return evaluate(
        build_method(experiment, network, inner_steps=settings.inner_steps),
        trainer.theta,
        shown(
            test_episodes(experiment, "test", settings.test_tasks, device),
            settings.test_tasks,
            name=f"{experiment.preset}, test",
            show=experiment.run.progress and group.is_first,
        ),
        accuracy_of(network) if settings.transductive else inductive_accuracy_of(network),
        transductive=settings.transductive,
        group=group,
    )


def shown(episodes: Iterable[Any], total: int, *, name: str, show: bool) -> Iterator[Any]:
    """``episodes``, with a bar that says how many of ``total`` tasks are done."""
    with tqdm(
        total=total,
        desc=name,
        disable=not show,
        bar_format="{desc} {percentage:3.0f}% |{bar}| ETA {remaining}, {n_fmt} of {total_fmt} tasks",
        mininterval=0.2 if sys.stderr.isatty() else 15.0,  # a log file gets a line now and then
        dynamic_ncols=True,
    ) as bar:
        for episode in episodes:
            yield episode
            bar.update(len(episode[0][0]))


def _results(
    experiment: Experiment, trainer: Trainer, tested: Evaluation, device: torch.device, group: WorkerGroup
) -> dict[str, Any]:
    best = trainer.best or {}
    made = sum("validation" in record for record in trainer.history)
    return {
        "preset": experiment.preset,
        "setting": experiment.setting,
        "changed_from_preset": changes_from_preset(experiment),
        "command": command_of(experiment),
        "dataset": experiment.data.dataset,
        "split": f"{experiment.data.dataset} test, {load_classes(experiment.data, 'test').num_classes} classes",
        "seed": experiment.run.seed,
        "accuracy": 100 * tested.mean,
        "interval": 100 * tested.interval,
        "num_tasks": tested.num_tasks,
        "transductive": tested.transductive,
        "checkpoint": f"{experiment.evaluation.checkpoint} of {made} validation{'' if made == 1 else 's'}",
        "validation_accuracy": 100 * best["validation"] if best else None,
        "validation_step": best["step"] if best else None,
        "meta_steps": trainer.step,
        "seconds": trainer.seconds,
        "processes": group.size,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "machine": machine(device),
        "versions": versions(),
        "notes": list(experiment.notes),
        "config": without_folders(experiment),
    }


def _draw(experiment: Experiment, trainer: Trainer, folder: Path, device: torch.device) -> list[str]:
    support, query = next(test_episodes(experiment, "test", 1, device))
    network = build_network(experiment)
    method = build_method(experiment, network, inner_steps=experiment.evaluation.inner_steps)
    with torch.no_grad():
        logits = network(method.adapt(trainer.theta, support), query[0])[0]
    first = ((support[0][0], support[1][0]), (query[0][0], query[1][0]))
    return draw(folder, {experiment.method.name: trainer.history}, first, logits)


def _wait(group: WorkerGroup) -> None:
    """Until all processes are here."""
    group.sum_numbers([0.0])
