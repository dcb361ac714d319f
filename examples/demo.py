"""Meta-learn to tell five characters apart from one picture each, with implicit MAML, and say how well it went.

    python examples/demo.py                        Glyphs: characters rendered from fonts, nothing is downloaded
    python examples/demo.py --data-dir <omniglot>  real handwriting (or set IMPLICITLAYER_DATA)
    python examples/demo.py --resume <run folder>  go on after Ctrl-C, a crash, or with more --minutes
    python examples/demo.py --smoke                everything in seconds, to see that it runs

Trains twice with the same seeds and the same minutes: iMAML, and the same code with 0 CG steps, which is first-order MAML.
"""

import argparse
import dataclasses
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

import implicitlayer as il


@dataclasses.dataclass(frozen=True)
class Settings:
    """All there is to set; tuned on the validation classes of Omniglot, the test classes were never looked at."""

    num_ways: int = 5  # classes in a task
    num_shots: int = 1  # labelled pictures of each
    num_queries: int = 5  # pictures of each class that the meta-loss and the accuracy are measured on
    num_filters: int = 32  # channels of each of the four convolutions
    strength: float = 0.2  # λ of the proximal term; the paper's 2.0 adapts little in few steps
    inner_step_size: float = 0.4  # α; with λ = 2 this diverges
    inner_steps: int = 5
    cg_steps: int = 2  # of (I + H/λ) g = v
    tasks_per_step: int = 8
    learning_rate: float = 5e-3  # of Adam; falls along a half cosine over the budget
    max_gradient_norm: float = 10.0
    minutes: float = 3.0  # of training, for each of the two methods
    validation_tasks: int = 100  # from classes of their own, for the curves
    test_tasks: int = 600  # from classes that neither training nor validation saw
    seed: int = 0
    data_dir: str | None = None
    max_steps: int | None = None


SMOKE = {"num_filters": 8, "minutes": 0.2, "max_steps": 4, "tasks_per_step": 2, "validation_tasks": 4, "test_tasks": 8}
METHODS = {"iMAML": "cg_steps", "FOMAML": 0}


def main() -> None:
    settings, run_dir = read_arguments()
    run_dir.mkdir(parents=True, exist_ok=True)
    il.meta.save_json(run_dir / "config.json", dataclasses.asdict(settings))
    il.meta.save_json(run_dir / "versions.json", versions())

    data = il.fewshot.Omniglot(settings.data_dir) if settings.data_dir else il.fewshot.Glyphs()
    validation = episodes(data, "validation", settings, settings.validation_tasks)
    test = episodes(data, "test", settings, settings.test_tasks)
    network = il.fewshot.conv4(settings.num_ways, num_filters=settings.num_filters)
    print(f"{type(data).__name__}, {settings.num_ways}-way {settings.num_shots}-shot; the run is kept in {run_dir}")

    start = network.init(torch.Generator().manual_seed(settings.seed))
    rows = [("no meta-learning: adapt from the untrained start", 0, evaluate(make_method(network, settings, 0), start, test))]
    trainers = {}
    try:
        for name in METHODS:
            trainers[name] = trainer = make_trainer(name, network, data, validation, settings, run_dir / name.lower())
            if trainer.resume():
                print(f"{name}: resumed at step {trainer.step}, {trainer.seconds / 60:.1f} minutes of training")
            trainer.fit()
            rows.insert(-1, (label(name, settings), trainer.step, evaluate(trainer.method, trainer.theta, test)))
    except KeyboardInterrupt:
        raise SystemExit(f"\nStopped; nothing is lost. Go on with:\n    {resume_command(run_dir)}") from None

    print(table(rows, settings))
    results = {name: dict(steps=steps, mean=r.mean, interval=r.interval, tasks=r.num_tasks) for name, steps, r in rows}
    il.meta.save_json(run_dir / "results.json", results)
    draw(trainers, network, test, settings, run_dir / "demo.png")
    print(f"Picture: {run_dir / 'demo.png'}    checkpoint: {trainers['iMAML'].checkpoint_path}")
    print(f"Train on, for twice as long:\n    {resume_command(run_dir)} --minutes {2 * settings.minutes:g}")


def make_method(network: Any, settings: Settings, cg_steps: int) -> il.meta.iMAML:
    """The whole method: a loss per task, an inner solver, a strength, and so many CG steps for the meta-gradient."""

    def task_loss(params: Any, batch: Any) -> torch.Tensor:
        images, labels = batch
        return il.fewshot.task_cross_entropy(network(params, images), labels)

    return il.meta.iMAML(
        task_loss,
        il.solvers.GradientDescent(step_size=settings.inner_step_size, max_steps=settings.inner_steps),
        strength=settings.strength,
        linear_solver=il.ConjugateGradient(max_steps=cg_steps),
    )


def make_trainer(name: str, network: Any, data: Any, validation: Any, settings: Settings, run_dir: Path) -> Any:
    theta = network.init(torch.Generator().manual_seed(settings.seed))
    theta = {key: value.requires_grad_() for key, value in theta.items()}

    def accuracy(params: Any, batch: Any) -> torch.Tensor:
        images, labels = batch
        return il.fewshot.task_accuracy(network(params, images), labels)

    return il.meta.Trainer(
        make_method(network, settings, settings.cg_steps if name == "iMAML" else 0),
        theta,
        sampler(data, "train", settings, settings.seed),
        torch.optim.Adam(theta.values(), lr=settings.learning_rate),
        tasks_per_step=settings.tasks_per_step,
        max_minutes=settings.minutes,
        max_steps=settings.max_steps,
        learning_rate=il.meta.cosine_decay,
        max_gradient_norm=settings.max_gradient_norm,
        metric=accuracy,
        validation=validation,
        run_dir=run_dir,
        name=f"{name:6}",
    )


def sampler(data: Any, split: str, settings: Settings, seed: int) -> Any:
    raise NotImplementedError


def episodes(data: Any, split: str, settings: Settings, num_tasks: int) -> list[Any]:
    """A fixed list of tasks: the same for every method and every run."""
    source = sampler(data, split, settings, seed=2024)
    return [il.meta.as_support_query(source.sample(min(20, num_tasks))) for _ in range(-(-num_tasks // 20))]
