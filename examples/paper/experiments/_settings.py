"""All that a meta-learning experiment can be told, as frozen dataclasses; the command line and config.json follow."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from implicitlayer.meta import save_json

from ._fields import Checked, from_json, number

DatasetName = Literal["glyphs", "omniglot", "miniimagenet"]
MethodName = Literal["imaml-gd", "imaml-hf", "maml", "fomaml", "reptile", "truncated", "anil", "protonet"]
IMPLICIT = ("imaml-gd", "imaml-hf")


@dataclass(frozen=True)
class Data(Checked):
    """What the tasks are made of.

    Args:
        dataset: glyphs needs no download; omniglot and miniimagenet are read from dir.
        dir: folder of the dataset; none looks in $IMPLICITLAYER_DATA and then in the cache folder.
        num_ways: classes in a task.
        num_shots: support pictures of each class.
        num_query: query pictures of each class.
        train_shots: support pictures in training where they differ from num_shots.
        rotations: what quarter turns do in training; validation and test tasks are never turned.
        image_size: pixels.
    """

    dataset: DatasetName = "glyphs"
    dir: str | None = None
    num_ways: int = number(5, least=2)
    num_shots: int = number(1, least=1)
    num_query: int = number(15, least=1)
    train_shots: int | None = number(None, least=1)
    rotations: Literal["none", "augment", "classes"] = "augment"
    image_size: int = number(28, least=8)


@dataclass(frozen=True)
class Network(Checked):
    """The classifier: four convolutions and a linear head.

    Args:
        num_filters: channels of each convolution.
        downsample: stride (Omniglot) or max_pool (mini-ImageNet).
        zero_head: start the head at zero, since labels are drawn at random for every task; else Xavier-uniform.
    """

    num_filters: int = number(64, least=1)
    downsample: Literal["stride", "max_pool"] = "stride"
    zero_head: bool = True


@dataclass(frozen=True)
class Method(Checked):
    """How a task is adapted to, and how the meta-gradient is made.

    Args:
        name: imaml-gd and imaml-hf differ in the inner solver only: gradient descent, or Newton-CG with line search.
        inner_steps: steps of the inner solver, or their limit where inner_rtol is positive; protonet makes none.
        inner_step_size: of gradient descent, its first trial with a line search; imaml-hf searches its own.
        line_search: armijo shortens a step until the inner objective falls (imaml-gd, fomaml, reptile); none keeps
            inner_step_size, which diverges once meta-training has sharpened the support loss (docs/paper.md).
        inner_rtol: the inner solver stops at this share of the first gradient norm; 0 makes all inner_steps.
        strength: weight of the proximal term; 0 leaves it out.
        inner_momentum: of maml: Nesterov's accelerated gradient in place of gradient descent where it is not 0.
        cg_steps: conjugate gradient steps for the meta-gradient of imaml-*.
        curvature: matrix of the meta-gradient of imaml-*: the hessian, or gauss_newton, never negative, not exact.
        newton_cg_steps: curvature products for each direction of imaml-hf.
        newton_curvature: matrix of the directions of imaml-hf.
        backward_steps: inner steps that truncated back-propagates through.
    """

    name: MethodName = "imaml-gd"
    inner_steps: int = number(16, least=1)
    inner_step_size: float = number(0.1, above=0)
    line_search: Literal["none", "armijo"] = "none"
    inner_rtol: float = number(0.0, least=0, below=1)
    strength: float = number(2.0, least=0)
    inner_momentum: float = number(0.0, least=0, below=1)
    cg_steps: int = number(5, least=0)
    curvature: Literal["hessian", "gauss_newton"] = "hessian"
    newton_cg_steps: int = number(5, least=1)
    newton_curvature: Literal["hessian", "gauss_newton"] = "hessian"
    backward_steps: int = number(2, least=1)


@dataclass(frozen=True)
class Outer(Checked):
    """The outer optimisation.

    Args:
        optimizer: of the meta-parameters.
        learning_rate: of that optimizer.
        adam_epsilon: added to the denominator of Adam.
        decay: cosine lets the learning rate fall to a hundredth along the budget.
        tasks_per_step: meta-batch.
        max_gradient_norm: the meta-gradient is clipped at this norm; none never clips.
    """

    optimizer: Literal["adam", "sgd"] = "adam"
    learning_rate: float = number(1e-3, above=0)
    adam_epsilon: float = number(1e-8, above=0)
    decay: Literal["none", "cosine"] = "none"
    tasks_per_step: int = number(32, least=1)
    max_gradient_norm: float | None = number(None, above=0)


@dataclass(frozen=True)
class Evaluation(Checked):
    """How the result is measured.

    Args:
        validation_tasks: tasks from validation classes; they choose the best checkpoint.
        num_validations: times along the way.
        test_tasks: tasks from test classes, used once, at the end.
        inner_steps: steps of the inner solver in the test, where they differ from training.
        checkpoint: best on the validation tasks, or last.
        transductive: query pictures of a test task share batch statistics, as is the habit of MAML's code and of the
            paper's released code (the paper does not say); no: one at a time.
        batch_size: tasks evaluated at once.
        seed: of the validation and test tasks; not the run's, so that all runs are measured on the same tasks.
    """

    validation_tasks: int = number(200, least=2)
    num_validations: int = number(20, least=1)
    test_tasks: int = number(1000, least=2)
    inner_steps: int | None = number(None, least=1)
    checkpoint: Literal["best", "last"] = "best"
    transductive: bool = True
    batch_size: int = number(20, least=1)
    seed: int = number(2024, least=0)


@dataclass(frozen=True)
class Run(Checked):
    """How long, where, and what is kept.

    Args:
        dir: run folder; none makes a new one in runs/.
        seed: of the start and of the training tasks.
        max_steps: budget in meta-steps.
        minutes: budget in minutes of training; the first budget reached ends the run.
        device: cpu, cuda or cuda:1; under torchrun each process takes its own GPU.
        capture: on CUDA, record the inner steps and Hessian products of imaml-* as graphs (see il.meta.iMAML).
        tf32: matrix products with 10-bit mantissas on CUDA, after a check on the meta-gradient.
        tf32_tolerance: largest relative difference that the check lets pass.
        tasks_per_chunk: tasks computed at once; none takes all of them.
        memory_budget: MiB that the meta-gradient may take; the largest chunk that fits is found.
        checkpoint_seconds: at most this long between checkpoints.
        on_collapse: what a run does that loses what it has learned: warn, rollback to the best validation, or stop.
        tensorboard: write event files too (needs the extra implicitlayer[examples]).
        progress: show a bar.
    """

    dir: str | None = None
    seed: int = number(0, least=0)
    max_steps: int | None = number(None, least=1)
    minutes: float | None = number(None, above=0)
    device: str = "cpu"
    capture: bool = True
    tf32: bool = False
    tf32_tolerance: float = number(0.01, above=0)
    tasks_per_chunk: int | None = number(None, least=1)
    memory_budget: int | None = number(None, least=1)
    checkpoint_seconds: float = number(20.0, above=0)
    on_collapse: Literal["warn", "rollback", "stop"] = "warn"
    tensorboard: bool = False
    progress: bool = True


@dataclass(frozen=True)
class Experiment(Checked):
    """One meta-learning experiment: data, network, method, outer optimisation, evaluation, run.

    The settings are written to ``config.json`` of the run folder, and read from there when a run goes on.

    Args:
        preset: name of the preset it was made from.
        setting: ``"paper"``, ``"cpu"`` (the paper's network, data and inner problem, with the meta-batch and the
            outer rate that a few hours of one CPU core allow), ``"released"`` (the settings of the authors' released
            code) or ``"reduced"``.
        notes: what the source leaves open and was chosen here, or what departs from it; one sentence each.
        data, network, method, outer, evaluation, run: the sections.

    Raises:
        ValueError: a value of the wrong type or out of its range, or two that do not go together.

    Example:
        >>> experiment = Experiment(run=Run(max_steps=10), method=Method(name="fomaml"))
        >>> Experiment.from_dict(experiment.to_dict()) == experiment
        True
        >>> Experiment.from_dict({"run": {"max_steps": "ten"}})
        Traceback (most recent call last):
            ...
        ValueError: run.max_steps='ten' must be an integer or none.
    """

    preset: str = "custom"
    setting: Literal["paper", "cpu", "released", "reduced"] = "reduced"
    notes: tuple[str, ...] = ()
    data: Data = field(default_factory=Data)
    network: Network = field(default_factory=Network)
    method: Method = field(default_factory=Method)
    outer: Outer = field(default_factory=Outer)
    evaluation: Evaluation = field(default_factory=Evaluation)
    run: Run = field(default_factory=lambda: Run(max_steps=1000))

    def __post_init__(self) -> None:
        super().__post_init__()
        method = self.method
        if self.run.max_steps is None and self.run.minutes is None:
            raise ValueError("run.max_steps and run.minutes are both none: give one budget, or both.")
        if method.name in (*IMPLICIT, "truncated") and method.strength == 0:
            raise ValueError(
                f"method.strength=0 must be positive for {method.name}: theta acts through the proximal term alone."
            )
        if method.inner_momentum and method.name != "maml":
            raise ValueError(
                f"method.inner_momentum={method.inner_momentum} must be 0 for {method.name}: only maml "
                "back-propagates through accelerated steps here."
            )
        if method.line_search == "armijo" and method.name in ("maml", "truncated", "anil"):
            raise ValueError(
                f"method.line_search=armijo must be none for {method.name}: back-propagation through the path needs "
                "steps of a fixed size. imaml-gd takes any."
            )
        if method.name == "truncated" and method.backward_steps > method.inner_steps:
            raise ValueError(
                f"method.backward_steps={method.backward_steps} must not exceed method.inner_steps="
                f"{method.inner_steps}. All of them are MAML's."
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and strings."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, value: Any) -> Experiment:
        """The experiment that :meth:`to_dict` wrote; fields that are left out keep their defaults."""
        return from_json(cls, value)

    def save(self, path: str | Path) -> None:
        """Write the settings as JSON, in one step."""
        save_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Experiment:
        """Read what :meth:`save` wrote; an error names the file."""
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
