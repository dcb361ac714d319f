"""From settings to objects: data, network, method, trainer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from implicitlayer import Composite, ConjugateGradient, composite
from implicitlayer.fewshot import (
    ClassificationLoss,
    Conv4,
    EpisodeSampler,
    Glyphs,
    MiniImageNet,
    Omniglot,
    conv4,
    inductive_logits,
    task_accuracy,
    task_cross_entropy,
)
from implicitlayer.meta import (
    ANIL,
    MAML,
    FirstOrderMAML,
    MetaMethod,
    ProtoNet,
    Reptile,
    Trainer,
    TruncatedMAML,
    as_support_query,
    cosine_decay,
    iMAML,
)
from implicitlayer.solvers import GradientDescent, NewtonCG

from ._command import resume_command
from ._settings import Data, Experiment

Episode = tuple[Any, Any]


def load_classes(data: Data, split: str) -> Any:
    """The pictures of one split, grouped by class.

    Raises:
        FileNotFoundError: a dataset that is not there; where no folder was named, with the setting that names one.
    """
    if data.dataset == "glyphs":
        return Glyphs(split, image_size=data.image_size)
    source = {"omniglot": Omniglot, "miniimagenet": MiniImageNet}[data.dataset]
    try:
        return source(data.dir, split, image_size=data.image_size)
    except FileNotFoundError as error:
        if data.dir is not None:
            raise
        # the datasets' own words are for Python: what they call root= has another name here
        where = "root= is data.dir of the experiment: --data.dir FOLDER on the command line of examples/paper/train.py."
        raise FileNotFoundError(f"{error} Here {where}") from None


def build_network(experiment: Experiment) -> Conv4:
    """The classifier, a pure function of its parameters."""
    return conv4(
        experiment.data.num_ways,
        in_channels=3 if experiment.data.dataset == "miniimagenet" else 1,
        num_filters=experiment.network.num_filters,
        image_size=experiment.data.image_size,
        downsample=experiment.network.downsample,
    )


def build_theta(experiment: Experiment, network: Conv4, device: torch.device) -> dict[str, torch.Tensor]:
    """The start: the same numbers on every device, from the run's seed."""
    theta = network.init(torch.Generator().manual_seed(experiment.run.seed), device=device)
    if experiment.network.zero_head:
        theta |= {name: torch.zeros_like(theta[name]) for name in ("head.weight", "head.bias")}
    return {name: value.requires_grad_() for name, value in theta.items()}


class TaskLoss(ClassificationLoss):
    """The cross-entropy of a network on ``batch = (images, labels)``, [B], with the parts that Gauss-Newton needs."""

    def as_composite(self) -> Composite:
        """Softmax cross-entropy, convex, of the network's logits."""
        return composite(
            lambda logits, batch: task_cross_entropy(logits, batch[1]),
            lambda params, batch: self.network(params, batch[0]),
        )


def build_method(
    experiment: Experiment, network: Conv4, *, inner_steps: int | None = None, capture: bool = False
) -> MetaMethod:
    """The method, with the inner steps of training or, for the test, with others; ``capture`` is for imaml-* only."""
    settings = experiment.method
    steps = settings.inner_steps if inner_steps is None else inner_steps
    strength, step_size = settings.strength, settings.inner_step_size

    task_loss = TaskLoss(network)

    if settings.name == "maml":
        return MAML(
            task_loss, step_size=step_size, num_steps=steps, strength=strength, momentum=settings.inner_momentum
        )
    if settings.name == "truncated":
        back = min(settings.backward_steps, steps)
        return TruncatedMAML(
            task_loss, step_size=step_size, num_steps=steps, strength=strength, num_backward_steps=back
        )
    if settings.name == "anil":
        return ANIL(network.features, task_cross_entropy, step_size=step_size, num_steps=steps)
    if settings.name == "protonet":
        return ProtoNet(network.features, task_cross_entropy)
    descent = GradientDescent(
        step_size=step_size,
        max_steps=steps,
        rtol=settings.inner_rtol,
        line_search=None if settings.line_search == "none" else "armijo",
    )
    if settings.name == "fomaml":
        return FirstOrderMAML(task_loss, descent, strength=strength)
    if settings.name == "reptile":
        return Reptile(task_loss, descent, strength=strength)
    newton = NewtonCG(
        max_steps=steps,
        rtol=settings.inner_rtol,
        cg_steps=settings.newton_cg_steps,
        curvature=settings.newton_curvature,
    )
    return iMAML(
        task_loss,
        descent if settings.name == "imaml-gd" else newton,
        strength=strength,
        linear_solver=ConjugateGradient(max_steps=settings.cg_steps),
        curvature=settings.curvature,
        negative_curvature="truncate",
        capture=capture,
    )


def accuracy_of(network: Conv4) -> Callable[[Any, Any], torch.Tensor]:
    """The metric: share of right answers in each task's query set."""

    def accuracy(params: Any, batch: Any) -> torch.Tensor:
        images, labels = batch
        return task_accuracy(network(params, images), labels)

    return accuracy


def inductive_accuracy_of(network: Conv4) -> Callable[[Any, Any, Any], torch.Tensor]:
    """The same with each query picture judged beside the support alone."""

    def accuracy(params: Any, query: Any, support: Any) -> torch.Tensor:
        return task_accuracy(inductive_logits(network, params, support[0], query[0]), query[1])

    return accuracy


def test_episodes(experiment: Experiment, split: str, num_tasks: int, device: torch.device) -> Iterator[Episode]:
    """Tasks that are the same in every run, never turned, from classes of ``split``."""
    data, evaluation = experiment.data, experiment.evaluation
    sampler = EpisodeSampler(
        load_classes(data, split),
        num_ways=data.num_ways,
        num_shots=data.num_shots,
        num_query=data.num_query,
        seed=evaluation.seed,
        device=device,
    )
    for batch in sampler.fixed(num_tasks, batch_size=evaluation.batch_size):
        yield as_support_query(batch)


def build_sampler(experiment: Experiment, device: torch.device) -> EpisodeSampler:
    """The source of training tasks."""
    data = experiment.data
    return EpisodeSampler(
        load_classes(data, "train"),
        num_ways=data.num_ways,
        num_shots=data.num_shots if data.train_shots is None else data.train_shots,
        num_query=data.num_query,
        rotations=data.rotations,
        seed=experiment.run.seed,
        device=device,
    )


def build_optimizer(experiment: Experiment, leaves: list[torch.Tensor]) -> torch.optim.Optimizer:
    """The outer optimizer over ``leaves``."""
    outer = experiment.outer
    if outer.optimizer == "sgd":
        return torch.optim.SGD(leaves, lr=outer.learning_rate)
    return torch.optim.Adam(leaves, lr=outer.learning_rate, eps=outer.adam_epsilon)


def build_trainer(
    experiment: Experiment, *, run_dir: str | Path | None = None, device: torch.device | str = "cpu"
) -> Trainer:
    """The trainer of an experiment, at its start.

    Args:
        experiment: the settings.
        run_dir: folder of the checkpoints; None keeps nothing.
        device: where to compute.

    Example:
        >>> from experiments import preset, smoke
        >>> trainer = build_trainer(smoke(preset("reduced-glyphs-5w1s-imaml-gd")))
        >>> len(trainer.fit())
        1
    """
    device = torch.device(device)
    network = build_network(experiment)
    method = build_method(experiment, network, capture=experiment.run.capture and device.type == "cuda")
    theta = build_theta(experiment, network, device)
    outer, evaluation, run = experiment.outer, experiment.evaluation, experiment.run
    return Trainer(
        method,
        theta,
        build_sampler(experiment, device),
        build_optimizer(experiment, [*theta.values(), *method.parameters()]),
        tasks_per_step=outer.tasks_per_step,
        tasks_per_chunk=run.tasks_per_chunk,
        memory_budget=None if run.memory_budget is None else run.memory_budget * 2**20,
        max_steps=run.max_steps,
        max_minutes=run.minutes,
        metric=getattr(method.task_loss, "accuracy", accuracy_of(network)),
        transductive=True,  # the curves; the test can be the other
        learning_rate=cosine_decay if outer.decay == "cosine" else None,
        max_gradient_norm=outer.max_gradient_norm,
        validation=list(test_episodes(experiment, "val", evaluation.validation_tasks, device)),
        num_validations=evaluation.num_validations,
        run_dir=run_dir,
        resume_command=None if run_dir is None else resume_command(run_dir),
        checkpoint_seconds=run.checkpoint_seconds,
        on_collapse=run.on_collapse,
        tensorboard=run.tensorboard,
        show_progress=run.progress,
        name=experiment.preset,
    )


def smoke(experiment: Experiment) -> Experiment:
    """The same experiment in a second: Glyphs, four filters, one meta-step, few inner steps, tasks and pictures.

    Example:
        >>> from experiments import preset
        >>> smoke(preset("paper-omniglot-20w5s-maml")).data.dataset
        'glyphs'
    """
    replace = dataclasses.replace
    data, method, evaluation = experiment.data, experiment.method, experiment.evaluation
    few = min(method.inner_steps, 2)
    return replace(
        experiment,
        data=replace(data, dataset="glyphs", dir=None, num_query=1, image_size=28),
        network=replace(experiment.network, num_filters=4),
        method=replace(method, inner_steps=few, backward_steps=min(method.backward_steps, few)),
        outer=replace(experiment.outer, tasks_per_step=2),
        evaluation=replace(
            evaluation,
            validation_tasks=2,
            num_validations=1,
            test_tasks=3,
            batch_size=2,
            inner_steps=None if evaluation.inner_steps is None else 3,
        ),
        run=replace(experiment.run, max_steps=1, minutes=None, progress=False),
    )
