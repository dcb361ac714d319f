"""The outer loop: sample tasks, take the meta-gradient, step, and be able to stop at any moment without losing it."""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch

from implicitlayer._errors import NonFiniteError, warn
from implicitlayer.base._types import PyTree
from implicitlayer.meta._callbacks import StopRequest
from implicitlayer.meta._distributed import WorkerLostError, launch_command
from implicitlayer.meta._meta_gradient import ChunkMetric, Totals, accumulate, means
from implicitlayer.meta._method import num_tasks
from implicitlayer.meta._monitor import (
    MAX_ROLLBACKS,
    CollapseError,
    CollapseWarning,
    Progress,
    advice,
    collapse,
    event_writer,
    peak_memory,
    write_event,
)
from implicitlayer.meta._statistics import Evaluation, evaluate
from implicitlayer.meta._tasks import Episode, largest_chunk, take_tasks
from implicitlayer.meta._trainer_state import TrainerState, random_state, set_random_state


class Trainer(TrainerState):
    """Meta-training within a budget of steps or minutes, with checkpoints that resume bit for bit.

    A run that is killed at any moment and resumed goes through the same numbers as one that is not, on the same machine
    and versions: meta-parameters, optimizer, scheduler, sampler, the global random states of torch, the current GPU,
    Python and NumPy, step, training seconds, history and the size of chunks are all in the checkpoint. (With a budget
    in minutes and a decaying learning rate the rate follows the clock, and no two runs are the same to the bit.)

    Where ``torch.distributed`` is initialised, see :func:`distributed`, every process makes the same trainer, draws the
    same tasks and takes its share of them; the gradients are summed, so that the step is that of one process to
    rounding. The first process writes the files. A process that is lost ends the others with :class:`WorkerLostError`,
    after the last finished step was saved.

    Theta may be DTensors. Processes that hold one copy of it together then work on the same tasks, copies share them,
    and every process writes its parts of a checkpoint; see ``docs/distributed.md``.

    Args:
        method: a method of :mod:`implicitlayer.meta`.
        theta: meta-parameters, a pytree of leaf tensors that require gradients; changed in place.
        sampler: source of training tasks.
        optimizer: any ``torch.optim`` optimizer over the leaves of theta (and ``method.parameters()``). LBFGS makes all
            evaluations of one step on the tasks of that step.
        tasks_per_step: meta-batch size, over all processes.
        tasks_per_chunk: tasks that a process differentiates at a time, at least 1; the gradients of chunks add up to
            that of the whole. None takes all of them.
        memory_budget: in place of ``tasks_per_chunk``: bytes that a meta-gradient may take beyond what is held anyway
            (theta, optimizer, data). The largest chunk that fits is found by measurements in the first step.
        max_steps: budget in meta-steps, at least 0.
        max_minutes: budget in minutes of training, at least 0; sampling counts, evaluation and checkpoints do not.
        metric: ``metric(phi, query) -> [B]``, shown and recorded; see ``transductive``. Where it is the method
            ``accuracy`` of the task loss, and that has ``scored(phi, query) -> (losses, accuracies)`` too, as
            :class:`il.fewshot.ClassificationLoss` has, training takes it from the forward pass of the query losses.
        transductive: the protocol of ``metric``, see :func:`evaluate`: with False it gets ``(phi, query, support)``.
        learning_rate: factor on the optimizer's rates as a function of the share of the budget used, 0...1.
        scheduler: in place of ``learning_rate``: a ``torch.optim`` scheduler, stepped after every meta-step, or
            ``ReduceLROnPlateau``, stepped with the validation metric.
        max_gradient_norm: clip the meta-gradient at this Euclidean norm, > 0.
        split: turns a sample into (support, query).
        validation: a list of fixed episodes, evaluated ``num_validations`` times along the way.
        num_validations: how often, at least 0.
        better: whether a "higher" or a "lower" validation metric is the better one.
        config: plain data that the run was made from; a checkpoint of another config is refused by :meth:`resume`.
        run_dir: folder for ``checkpoint.pt``, ``best.pt`` (the state with the best validation metric) and
            ``metrics.jsonl``; None keeps nothing.
        tensorboard: also write TensorBoard event files into ``run_dir``.
        callbacks: objects like :class:`Callback`, told of start, steps, validations, checkpoints and end.
        checkpoint_seconds: at most this long between checkpoints ...
        checkpoint_steps: ... or this many steps, at least 1, whichever comes first.
        report_steps: every so many steps, at least 1, the inner problem is looked at (two forward passes).
        on_collapse: what happens when the run loses what it has learned (half of what the meta-loss had won is lost
            again, or a third of what the metric of the training tasks had, or the inner solver raises its own
            objective, or negative curvature is met, in most tasks). "warn": a :class:`CollapseWarning` that says why
            and what helps, once; "stop": the same as a
            :class:`CollapseError`, after a checkpoint; "rollback": theta and the optimizer go back to the best
            validation, with a warning, at most three times, then as "stop".
        resume_command: what a message says to go on with; None takes the command this program was started with.
        name: shown in front of the progress bar.
        show_progress: False keeps silent.

    Raises:
        ValueError, TypeError: settings that contradict each other or are out of range; the message says which.
        ImportError: ``tensorboard=True`` without TensorBoard.
    """

    _events: Any = None  # a SummaryWriter of TensorBoard
    _stop: StopRequest | None = None
    _first_of_fit = False
    _saved_at = math.inf  # by the clock of time.perf_counter

    def fit(self, *, until: float = 1.0) -> list[dict[str, Any]]:
        """Train until the budget is used; Ctrl-C finishes the step, saves, and raises ``KeyboardInterrupt``.

        Args:
            until: stop (and save) at this share of the budget, 0...1; a later call goes on. So several trainers can
                take turns, and whatever else slows the machine down slows them all.

        Returns:
            The history, one record per step: loss, accuracy, gradient norm, seconds, and now and then the state of the
            inner problem and the validation accuracy.

        Raises:
            KeyboardInterrupt: any process was asked to stop; all of them stop after the same step.
            NonFiniteError: the loss or the meta-gradient is not finite.
            CollapseError: see ``on_collapse``.
            WorkerLostError: another process died; the message says what was saved and how to go on.
            FileExistsError: ``run_dir`` holds a run that was not resumed.
            OSError: ``run_dir`` cannot be written; the message says what is kept.
            CheckpointError: the state holds something that no checkpoint can, named by its path; told before the first
                step where it is there from the start. The last checkpoint stays.
            ValueError: ``until`` is out of range; the processes did not start out with the same theta, optimizer or
                tasks; or one task does not fit into ``memory_budget``.
        """
        if not 0.0 <= until <= 1.0:
            raise ValueError(
                f"until={until} must lie in 0...1, a share of the budget. For longer runs raise the budget."
            )
        with StopRequest() as self._stop:
            try:
                self._begin()
                self._tell("on_start")
                try:
                    self._loop(until)
                finally:
                    self._tell("on_end")
            except RuntimeError as error:
                lost = self._worker_lost(self._group.lost(error))
                # also printed: the launcher ends this process by a signal, maybe before Python shows its error
                print(lost, file=sys.stderr, flush=True)
                raise lost from error
            finally:
                self._stop = None
                if self._events is not None:
                    self._events.close()
                    self._events = None
        return self.history

    def evaluate(self, episodes: Iterable[Episode]) -> Evaluation:
        """The metric on ``episodes`` after adaptation from the present theta; every process of a group must call it.

        Tasks are taken in chunks as in training (whole batches before ``memory_budget`` was measured).
        """
        if self.metric is None:
            raise ValueError("metric=None: give the trainer a metric to evaluate.")
        how: dict[str, Any] = {"transductive": self.transductive, "tasks_per_chunk": self._chunk, "group": self._group}
        return evaluate(self.method, self.theta, episodes, self.metric, **how)

    def save(self) -> None:
        """Write the checkpoint and the metrics, each in one step; only the first process of a group writes."""
        if self._events is not None:
            self._events.flush()  # first, so that no step of the checkpoint can be missing there
        super().save()
        if self._folder is not None:
            self._tell("on_checkpoint", self.checkpoint_path)

    def _tell(self, event: str, *about: Any) -> None:
        for callback in self.callbacks if self._group.is_first else ():
            if hasattr(callback, event):
                getattr(callback, event)(self, *about)

    def _begin(self) -> None:
        """Refuse to start where the result would not be this run's."""
        if self._at_best:
            raise RuntimeError("theta is that of the best validation (load_best). Call resume() before fit().")
        folder = self._folder if self._group.is_first else None  # which this process writes
        occupied = folder is not None and self.step == 0 and not self._owns_folder and folder.last.exists()
        if any(self._group.sum_numbers([occupied])):
            raise FileExistsError(
                f"{self.checkpoint_path} holds a run already. Call resume() before fit() to go on with it, or give "
                "another run_dir."
            )
        if folder is not None:
            folder.check(self.state_dict())
        self._owns_folder = True
        state = self.state_dict() if self._group.size > 1 else {}
        self._group.require_same({name: state[name] for name in ("theta", "method", "optimizer", "sampler") if state})
        self._first_of_fit = True
        if self.tensorboard and folder is not None:
            self._events = event_writer(folder.folder, self.step)
            if self.history:
                write_event(self._events, self.history[-1])

    def _loop(self, until: float) -> None:
        assert self._stop is not None
        self._saved_at, saved_step = time.perf_counter(), self.step
        show = self.show_progress and self._group.is_first
        progress = Progress(self.done, name=self.name, show=show, leave=until >= 1.0)
        try:
            if self._validation_is_due:  # a lost process came between the step and its validation
                self._validate()
            while self.done < until:
                stopped, late = self._train_step()
                self._tell("on_step", self.history[-1])
                if self._validation_is_due:
                    self._validate()
                self._watch_for_collapse()
                if self._events is not None:
                    write_event(self._events, self.history[-1])
                progress.update(self.done, self.history[-1])
                if late or stopped or (self.checkpoint_steps and self.step - saved_step >= self.checkpoint_steps):
                    self.save()
                    self._saved_at, saved_step = time.perf_counter(), self.step
                if stopped:
                    raise KeyboardInterrupt(f"stopped after step {self.step}; the checkpoint holds it")
            self.save()
        finally:
            progress.close()

    def _watch_for_collapse(self) -> None:
        """Apply ``on_collapse``; all processes come to the same end, by the history that they share."""
        record = self.history[-1]
        if (self.step - 1) % self.report_steps:  # at the steps that looked at the inner problem
            return
        told = any("collapsed" in past for past in self.history) and self.on_collapse == "warn"
        found = "" if told else collapse(self.history, self.better)
        if not found:
            return
        record["collapsed"] = found
        message = advice(found, self.step)
        rollbacks = sum("rolled_back" in past for past in self.history)
        if self.on_collapse == "rollback" and self.best is not None and rollbacks < MAX_ROLLBACKS:
            state = self._read_best()
            self._outer.load_state_dict(state)
            record["rolled_back"] = state["best"]["step"]
            message += (
                f" Theta and the optimizer are those of the best validation, at meta-step {state['best']['step']}."
            )
        elif self.on_collapse != "warn":
            self.save()
            kept = "Nothing was saved: run_dir=None." if self._folder is None else f"{self.checkpoint_path} holds it."
            raise CollapseError(f"{message} The run ends here. {kept}")
        if self._group.is_first:
            warn(message, CollapseWarning, "collapse")

    def _train_step(self) -> tuple[bool, bool]:
        """One meta-step on all processes; whether any of them was asked to stop, and whether to save."""
        started, done_before = time.perf_counter(), self.done
        self._remember()
        self._outer.set_rates(done_before)
        episode = self.split(self.sampler.sample(self.tasks_per_step))
        if self._first_of_fit:
            self._group.require_same({"the batch of tasks": episode})
            self._first_of_fit = False
        if self.memory_budget is not None and self._chunk is None:
            self._chunk = self._find_chunk(episode)
        record: dict[str, Any] = {"step": self.step + 1, "seconds": 0.0}
        record |= self._gradient(episode, look=self.step % self.report_steps == 0)
        self._outer.step(record["loss"], lambda: self._gradient(episode, look=False)["loss"])
        # from here on the step is made; whatever happens below, a checkpoint holds it
        self.step += 1
        self.history.append(record)
        self._before_step = {}
        self.seconds += time.perf_counter() - started
        self._mark(record, done_before)
        asked = self._stop is not None and self._stop.asked
        late = time.perf_counter() - self._saved_at >= self.checkpoint_seconds
        if self._group.size > 1:  # the clock of the first process counts
            own = (self.seconds, late) if self._group.is_first else (0.0, False)
            self.seconds, num_late, num_asked = self._group.sum_numbers([*own, asked])
            self._mark(record, done_before)
            asked, late = num_asked > 0, num_late > 0
        return asked, late

    def _remember(self) -> None:
        """Keep what a step changes before it is finished: if a process is lost meanwhile, the step is undone."""
        if self._group.size > 1 and self._group.copies is None:  # else nothing is saved then
            self._before_step = {}
            state = self.state_dict()
            names = ["sampler", "random"]
            if self._outer.needs_closure:  # the processes meet while the optimizer is at work
                names += ["theta", "method", "optimizer", "scheduler"]
            self._before_step = {name: copy.deepcopy(state[name]) for name in names}

    def _mark(self, record: dict[str, Any], done_before: float) -> None:
        record["seconds"] = self.seconds
        passed = int(self.done * self.num_validations) > int(done_before * self.num_validations)
        self._validation_is_due = passed and self._validates

    def _accumulate(
        self, episode: Episode, tasks: slice, total: int, tasks_per_chunk: int | None, look: bool
    ) -> Totals:
        self.optimizer.zero_grad(set_to_none=True)
        metric = None if self.metric is None else ChunkMetric(self._measure, self._scored_by_loss)
        mine, theta = take_tasks(episode, tasks), self._group.seen(self.theta)
        return accumulate(self.method, theta, mine, total, tasks_per_chunk, metric, look)

    @property
    def _scored_by_loss(self) -> bool:
        """Whether the metric is the task loss's own accuracy, which comes with the query losses."""
        known = getattr(self.method.task_loss, "accuracy", None)
        return known is not None and self.metric == known and self.transductive is not False

    def _measure(self, phi: PyTree, query: PyTree, support: PyTree) -> torch.Tensor:
        assert self.metric is not None
        return self.metric(phi, query, support) if self.transductive is False else self.metric(phi, query)

    def _gradient(self, episode: Episode, look: bool) -> dict[str, Any]:
        """Leave the meta-gradient of all processes' tasks in ``.grad``, clipped; the numbers of the record.

        Two messages between processes: first a few sums and which leaves have a gradient at all, then the gradients.
        """
        group, total = self._group, num_tasks(episode)
        numbers = self._accumulate(episode, group.share(total), total, self._chunk, look).numbers()
        leaves = self._outer.leaves
        if group.size > 1 or group.copies is not None:
            own = torch.tensor([*numbers, *(leaf.grad is not None for leaf in leaves)], dtype=torch.float64)
            sums = group.sum_of_tasks(own).tolist()
            group.sum_gradients(leaves, [count > 0 for count in sums[len(numbers) :]])
            numbers = sums[: len(numbers)]
        record: dict[str, Any] = means(numbers, with_metric=self.metric is not None)
        norm = self._outer.gradient_norm()
        record["gradient_norm"] = float(norm)
        if not (math.isfinite(record["loss"]) and math.isfinite(record["gradient_norm"])):
            raise NonFiniteError(
                f"The query loss is {record['loss']} and the meta-gradient norm {record['gradient_norm']} at step "
                f"{self.step + 1}: the inner problem has diverged. Lower the inner step size or raise the strength; "
                "theta is that of the last step."
            )
        self._outer.clip(norm)
        return record

    def _find_chunk(self, episode: Episode) -> int:
        """Tasks at a time that fit into the memory budget on every process; draws no random number of the run."""
        assert self.memory_budget is not None
        total = num_tasks(episode)
        share = self._group.share(total)
        state = random_state()

        def peak_of(size: int) -> int:
            tasks = slice(share.start, share.start + size)
            run = partial(self._accumulate, episode, tasks, total, None, look=True)
            return int(self._group.largest_of_copy(peak_memory(run, self._leaves[0].device)))

        chunk = total
        if share.stop > share.start:
            peak_of(1)  # what is made once and kept shall not count
            chunk = largest_chunk(peak_of, self.memory_budget, share.stop - share.start)
        set_random_state(state)
        ranks = range(self._group.size)
        return int(min(self._group.sum_numbers([chunk if rank == self._group.rank else 0 for rank in ranks])))

    def _validate(self) -> None:
        result = self.evaluate(self.validation)
        self.history[-1] |= {"validation": result.mean, "validation_interval": result.interval}
        self._outer.after_validation(result.mean)
        self._validation_is_due = False
        self._tell("on_validation", self.history[-1])
        sign = 1 if self.better == "higher" else -1
        best = -math.inf if self.best is None else sign * self.best["validation"]
        if sign * result.mean > best:  # never true of NaN
            self.best = {"step": self.step, "validation": result.mean, "interval": result.interval}
            if self._folder is not None:
                self._folder.write(self._folder.best, self.state_dict())
                self.save()

    def _worker_lost(self, error: WorkerLostError) -> WorkerLostError:
        """Save the last finished step, and say so."""
        path, first = self.checkpoint_path, self._group.is_first
        if path is None:
            kept = "Nothing was saved: run_dir=None"
        elif not self._owns_folder:  # lost before it was clear that no other run lies there
            kept = "Nothing was saved: no step was begun"
        elif self._group.copies is not None:
            held = "holds nothing yet" if self._saved_step is None else f"holds step {self._saved_step}"
            kept = f"{path} {held}: what lay on the lost process cannot be saved"
        elif first:
            self.save()
            kept = f"{path} holds step {self.step}"
        else:
            kept = f"{path} holds step {self.step}, or an earlier one if it is process 0 that was lost"
        how = self.resume_command or launch_command()
        return WorkerLostError(
            f"{error} The last finished step is {self.step}. {kept}. Any number of processes can go on from there, in "
            f"a program that calls resume():\n    {how}"
        )
