"""The outer loop: sample tasks, take the meta-gradient, step, and be able to stop at any moment without losing it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

import torch

from implicitlayer._errors import NonFiniteError
from implicitlayer._records import collect
from implicitlayer._tree import flatten
from implicitlayer._types import PyTree
from implicitlayer.meta._checkpoint import load_checkpoint, save_checkpoint, save_json_lines
from implicitlayer.meta._interrupt import StopRequest
from implicitlayer.meta._method import MetaMethod, Metric
from implicitlayer.meta._monitor import Progress, curvature_numbers, inner_progress
from implicitlayer.meta._statistics import Evaluation, evaluate
from implicitlayer.meta._tasks import Episode, TaskSampler, as_support_query


@dataclass(eq=False)
class Trainer:
    """Meta-training within a budget of steps or minutes, with checkpoints that resume bit for bit.

    A run that is stopped and resumed goes through the same numbers as one that is not, on the same machine and
    versions: meta-parameters, optimizer, sampler, random state, step, training seconds and history are all in the
    checkpoint. (With a budget in minutes and a decaying learning rate the rate follows the clock, and no two runs are
    the same to the bit.)

    Args:
        method: a method of :mod:`implicitlayer.meta`.
        theta: meta-parameters, a pytree of leaf tensors that require gradients; changed in place.
        sampler: source of training tasks.
        optimizer: any ``torch.optim`` optimizer over the leaves of theta (and ``method.parameters()``).
        tasks_per_step: meta-batch size.
        max_steps: budget in meta-steps.
        max_minutes: budget in minutes of training; sampling counts, evaluation and checkpoints do not.
        metric: ``metric(phi, query) -> [B]``, shown and recorded.
        learning_rate: factor on the optimizer's rates as a function of the share of the budget used, 0...1.
        max_gradient_norm: clip the meta-gradient at this Euclidean norm.
        split: turns a sample into (support, query).
        validation: fixed episodes, evaluated ``num_validations`` times along the way.
        num_validations: how often.
        run_dir: folder for ``checkpoint.pt`` and ``metrics.jsonl``; None keeps nothing.
        checkpoint_seconds: at most this long between checkpoints ...
        checkpoint_steps: ... or this many steps, whichever comes first.
        report_steps: every so many steps the inner problem is looked at (two forward passes).
        name: shown in front of the progress bar.
        show_progress: False keeps silent.
    """

    method: MetaMethod
    theta: PyTree
    sampler: TaskSampler
    optimizer: torch.optim.Optimizer
    _: KW_ONLY
    tasks_per_step: int = 4
    max_steps: int | None = None
    max_minutes: float | None = None
    metric: Metric | None = None
    learning_rate: Callable[[float], float] | None = None
    max_gradient_norm: float | None = None
    split: Callable[[Any], Episode] = as_support_query
    validation: Sequence[Episode] = ()
    num_validations: int = 10
    run_dir: str | Path | None = None
    checkpoint_seconds: float = 20.0
    checkpoint_steps: int | None = None
    report_steps: int = 20
    name: str = ""
    show_progress: bool = True
    step: int = field(default=0, init=False)
    seconds: float = field(default=0.0, init=False)
    history: list[dict[str, Any]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if self.max_steps is None and self.max_minutes is None:
            raise ValueError("Give a budget: max_steps, max_minutes, or both (the first one reached ends the run).")
        if self.tasks_per_step < 1:
            raise ValueError(f"tasks_per_step={self.tasks_per_step} must be positive.")
        missing = [name for name in ("sample", "state_dict", "load_state_dict") if not hasattr(self.sampler, name)]
        if missing:
            raise TypeError(f"the sampler needs the methods {missing}: a checkpoint keeps its position.")
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        learned = [p for p in [*flatten(self.theta)[0], *self.method.parameters()] if p.requires_grad]
        left_out = sum(id(p) not in held for p in learned)
        if left_out:
            raise ValueError(
                f"the optimizer does not hold {left_out} of the {len(learned)} tensors that require a gradient. Build "
                "it from the leaves of theta and method.parameters(), or freeze what is not to be learned."
            )
        self._rates = [group["lr"] for group in self.optimizer.param_groups]

    @property
    def done(self) -> float:
        """Share of the budget that is used, 0...1."""
        shares = [self.step / self.max_steps] if self.max_steps else []
        if self.max_minutes:
            shares.append(self.seconds / (60 * self.max_minutes))
        return min(1.0, max(shares, default=1.0))

    @property
    def checkpoint_path(self) -> Path | None:
        """Where the checkpoint is written."""
        return None if self.run_dir is None else Path(self.run_dir) / "checkpoint.pt"

    def state_dict(self) -> dict[str, Any]:
        """Everything the rest of the run depends on."""
        return {
            "theta": [leaf.detach() for leaf in flatten(self.theta)[0]],
            "method": [leaf.detach() for leaf in self.method.parameters()],
            "optimizer": self.optimizer.state_dict(),
            "sampler": self.sampler.state_dict(),
            "random": torch.get_rng_state(),
            "step": self.step,
            "seconds": self.seconds,
            "history": self.history,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        leaves = [*flatten(self.theta)[0], *self.method.parameters()]
        saved = [*state["theta"], *state["method"]]
        shapes, saved_shapes = [tuple(leaf.shape) for leaf in leaves], [tuple(leaf.shape) for leaf in saved]
        if shapes != saved_shapes:
            raise ValueError(
                f"The checkpoint holds tensors of shapes {saved_shapes}, this run has {shapes}: other settings?"
            )
        with torch.no_grad():
            for leaf, value in zip(leaves, saved, strict=True):
                leaf.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        self.sampler.load_state_dict(state["sampler"])
        torch.set_rng_state(state["random"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.history = list(state["history"])

    def save(self) -> None:
        """Write the checkpoint and the metrics, each in one step."""
        if self.checkpoint_path is not None:
            save_checkpoint(self.checkpoint_path, self.state_dict())
            save_json_lines(self.checkpoint_path.with_name("metrics.jsonl"), self.history)

    def resume(self) -> bool:
        """Load the checkpoint of ``run_dir`` if there is one; whether there was."""
        if self.checkpoint_path is None or not self.checkpoint_path.exists():
            return False
        self.load_state_dict(load_checkpoint(self.checkpoint_path))
        return True

    def fit(self, *, until: float = 1.0) -> list[dict[str, Any]]:
        """Train until the budget is used; Ctrl-C finishes the step, saves, and raises ``KeyboardInterrupt``.

        Args:
            until: stop (and save) at this share of the budget, 0...1; a later call goes on. So several trainers can
                take turns, and whatever else slows the machine down slows them all.

        Returns:
            The history, one record per step: loss, accuracy, gradient norm, seconds, and now and then the state of the
            inner problem and the validation accuracy.
        """
        if self.step == 0 and self.checkpoint_path is not None and self.checkpoint_path.exists():
            raise FileExistsError(
                f"{self.checkpoint_path} holds a run already. Call resume() before fit() to go on with it, or give "
                "another run_dir."
            )
        progress = Progress(self.done, name=self.name, show=self.show_progress, leave=until >= 1.0)
        saved_at, saved_step = time.perf_counter(), self.step
        try:
            with StopRequest() as stop:
                while self.done < until:
                    record = self._train_step()
                    progress.update(self.done, record)
                    late = time.perf_counter() - saved_at >= self.checkpoint_seconds
                    if (
                        late
                        or stop.asked
                        or (self.checkpoint_steps and self.step - saved_step >= self.checkpoint_steps)
                    ):
                        self.save()
                        saved_at, saved_step = time.perf_counter(), self.step
                    if stop.asked:
                        raise KeyboardInterrupt(f"stopped after step {self.step}; the checkpoint holds it")
                self.save()
        finally:
            progress.close()
        return self.history

    def evaluate(self, episodes: Iterable[Episode]) -> Evaluation:
        """The metric on ``episodes`` after adaptation from the present theta."""
        if self.metric is None:
            raise ValueError("metric=None: give the trainer a metric to evaluate.")
        return evaluate(self.method, self.theta, episodes, self.metric)

    def _train_step(self) -> dict[str, Any]:
        started, done_before = time.perf_counter(), self.done
        if self.learning_rate is not None:
            for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate * self.learning_rate(done_before)
        support, query = self.split(self.sampler.sample(self.tasks_per_step))
        with collect(in_depth=False) as records:
            self.optimizer.zero_grad(set_to_none=True)
            phi = self.method.adapt(self.theta, support)
            losses = self.method.query_losses(self.theta, phi, query)
            losses.mean().backward()
        record: dict[str, Any] = {"step": self.step + 1, "seconds": 0.0, "loss": float(losses.detach().mean())}
        record["gradient_norm"] = self._gradient_norm(record["loss"])
        if self.metric is not None:
            with torch.no_grad():
                record["accuracy"] = float(self.metric(phi, query).mean())
        if self.step % self.report_steps == 0:
            record |= curvature_numbers(records) | inner_progress(self.method, self.theta, phi, support)
        self.optimizer.step()
        self.step += 1
        self.seconds += time.perf_counter() - started
        record["seconds"] = self.seconds
        if self._validation_is_due(done_before):
            result = self.evaluate(self.validation)
            record |= {"validation": result.mean, "validation_interval": result.interval}
        self.history.append(record)
        return record

    def _gradient_norm(self, loss: float) -> float:
        """The norm of the meta-gradient, which is clipped if that was asked for; an error if it is not finite."""
        leaves = [leaf for group in self.optimizer.param_groups for leaf in group["params"] if leaf.grad is not None]
        total = torch.nn.utils.get_total_norm([leaf.grad for leaf in leaves])
        norm = float(total)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NonFiniteError(
                f"The query loss is {loss} and the meta-gradient norm {norm} at step {self.step + 1}: the inner "
                "problem has diverged. Lower the inner step size or raise the strength; theta is that of the last step."
            )
        if self.max_gradient_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(leaves, self.max_gradient_norm, total)
        return norm

    def _validation_is_due(self, done_before: float) -> bool:
        passed = int(self.done * self.num_validations) > int(done_before * self.num_validations)
        return passed and len(self.validation) > 0 and self.metric is not None
