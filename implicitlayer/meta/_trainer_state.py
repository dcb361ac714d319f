"""What a trainer is given, what of it is checked, and the state that a checkpoint keeps."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim.lr_scheduler import LRScheduler

from implicitlayer.base._tree import check_integer, flatten, flatten_with_names, tree_map
from implicitlayer.base._types import PyTree, name_of
from implicitlayer.meta._callbacks import check_callbacks
from implicitlayer.meta._checkpoint import CheckpointError, load_checkpoint
from implicitlayer.meta._distributed import WorkerGroup
from implicitlayer.meta._method import MetaMethod, check_number
from implicitlayer.meta._monitor import ON_COLLAPSE, OnCollapse, require_tensorboard
from implicitlayer.meta._outer import Better, OuterStep
from implicitlayer.meta._run_folder import RunFolder
from implicitlayer.meta._settings import differences, plain
from implicitlayer.meta._statistics import AnyMetric
from implicitlayer.meta._tasks import Episode, TaskSampler, as_support_query

_POSITIVE = ("tasks_per_step", "tasks_per_chunk", "memory_budget", "checkpoint_steps", "report_steps")
_FORMAT = 2  # of the checkpoints; raised when a trainer could not go on from an older one


@dataclass(eq=False, repr=False)
class TrainerState:
    """The settings and the state of a :class:`Trainer`, which documents them."""

    method: MetaMethod
    theta: PyTree
    sampler: TaskSampler
    optimizer: torch.optim.Optimizer
    _: KW_ONLY
    tasks_per_step: int = 4
    tasks_per_chunk: int | None = None
    memory_budget: int | None = None
    max_steps: int | None = None
    max_minutes: float | None = None
    metric: AnyMetric | None = None
    transductive: bool | None = None
    learning_rate: Callable[[float], float] | None = None
    scheduler: LRScheduler | None = None
    max_gradient_norm: float | None = None
    split: Callable[[Any], Episode] = as_support_query
    validation: Sequence[Episode] = ()
    num_validations: int = 10
    better: Better = "higher"
    config: Mapping[str, Any] | None = None
    run_dir: str | Path | None = None
    tensorboard: bool = False
    callbacks: Sequence[Any] = ()
    checkpoint_seconds: float = 20.0
    checkpoint_steps: int | None = None
    report_steps: int = 20
    on_collapse: OnCollapse = "warn"
    resume_command: str | None = None
    name: str = ""
    show_progress: bool = True
    step: int = field(default=0, init=False)
    seconds: float = field(default=0.0, init=False)
    history: list[dict[str, Any]] = field(default_factory=list, init=False)
    best: dict[str, Any] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._check_numbers()
        check_callbacks(self.callbacks)
        missing = [name for name in ("sample", "state_dict", "load_state_dict") if not hasattr(self.sampler, name)]
        if missing:
            raise TypeError(f"the sampler needs the methods {missing}: a checkpoint keeps its position.")
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        learned = [p for p in self._leaves if p.requires_grad]
        if not learned:
            raise ValueError(
                "no tensor of theta requires a gradient, so nothing would be learned. Call requires_grad_() on its "
                "leaves."
            )
        left_out = sum(id(p) not in held for p in learned)
        if left_out:
            raise ValueError(
                f"the optimizer does not hold {left_out} of the {len(learned)} tensors that require a gradient. Build "
                "it from the leaves of theta and method.parameters(), or freeze what is not to be learned."
            )
        self._outer = OuterStep(self.optimizer, self.scheduler, self.learning_rate, self.max_gradient_norm)
        self._outer.check_direction(self.better)
        if self._outer.follows_validation and not self._validates:
            raise ValueError("ReduceLROnPlateau is stepped with the validation metric: give metric and validation.")
        if self.tensorboard:
            require_tensorboard()
            if self.run_dir is None:
                raise ValueError("tensorboard=True writes into the run folder. Give run_dir.")
        self._group = WorkerGroup.current(self._leaves[0].device, self.theta, self.method.parameters())
        self._folder = None if self.run_dir is None else RunFolder(Path(self.run_dir), self._group)
        self._chunk = self.tasks_per_chunk
        self._validation_is_due = False
        self._at_best = False
        self._saved_step: int | None = None  # of the last checkpoint of this run
        self._owns_folder = False  # whether the checkpoint there is one of this run
        # During a step of several processes: the entries of the state that it has changed already, as they were.
        self._before_step: dict[str, Any] = {}

    def _check_numbers(self) -> None:
        if self.max_steps is None and self.max_minutes is None:
            raise ValueError("Give a budget: max_steps, max_minutes, or both (the first one reached ends the run).")
        for name in (*_POSITIVE, "max_steps", "num_validations"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), int(name in _POSITIVE))
        for name in ("max_minutes", "checkpoint_seconds"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), 0.0)
        if not hasattr(self.validation, "__len__"):
            raise TypeError(
                f"validation is a {type(self.validation).__name__} and must be a list: it is read many times. Write "
                "validation=list(...)."
            )
        if self.tasks_per_chunk is not None and self.memory_budget is not None:
            raise ValueError("tasks_per_chunk and memory_budget both set the size of chunks. Give one of the two.")
        if self.on_collapse not in ON_COLLAPSE:
            raise ValueError(f"on_collapse={self.on_collapse!r} must be one of {', '.join(map(repr, ON_COLLAPSE))}.")
        if self.on_collapse == "rollback" and (self.run_dir is None or not self._validates):
            raise ValueError(
                "on_collapse='rollback' goes back to the best validation, so it needs run_dir, metric and validation. "
                "Give them, or take 'stop' or 'warn'."
            )
        if self.better not in ("higher", "lower"):
            raise ValueError(f"better={self.better!r} must be 'higher' or 'lower'.")

    @property
    def done(self) -> float:
        """Share of the budget that is used, 0...1."""
        used = [(self.step, self.max_steps), (self.seconds / 60, self.max_minutes)]
        return min(1.0, max(spent / budget if budget else 1.0 for spent, budget in used if budget is not None))

    @property
    def checkpoint_path(self) -> Path | None:
        """Where the last state is written."""
        return None if self._folder is None else self._folder.last

    @property
    def best_path(self) -> Path | None:
        """Where the state with the best validation metric is written."""
        return None if self._folder is None else self._folder.best

    def state_dict(self) -> dict[str, Any]:
        """Everything the rest of the run depends on; tensors are not copied."""
        state = {
            "settings": self._settings(),
            "theta": [leaf.detach() for leaf in flatten(self.theta)[0]],
            "method": [leaf.detach() for leaf in self.method.parameters()],
            "names": self._names(),
            **self._outer.state_dict(),
            "sampler": self.sampler.state_dict(),
            "random": random_state(),
            **{name: getattr(self, name) for name in ("step", "seconds", "history", "best")},
            "validation_is_due": self._validation_is_due,
            "chunk": {"memory_budget": self.memory_budget, "tasks": self._chunk},
        }
        return state | self._before_step

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state. Settings are not compared, as :meth:`resume` does; names and shapes are."""
        state = self._in_order(state)
        self._set_leaves(state)
        self._outer.load_state_dict(state)
        self.sampler.load_state_dict(state["sampler"])
        set_random_state(state["random"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.history = list(state["history"])
        self.best = state["best"]
        self._validation_is_due = state["validation_is_due"]
        if self.memory_budget is not None and state["chunk"]["memory_budget"] == self.memory_budget:
            self._chunk = state["chunk"]["tasks"]  # another chunk would round differently
        self._at_best = False
        self._before_step = {}

    def save(self) -> None:
        """Write the checkpoint and the metrics, each in one step; every process of a group must call it."""
        if self._at_best:
            raise RuntimeError(
                "theta is that of the best validation (load_best), the rest of the state is not: saved together they "
                "are no state of this run. Call resume() first."
            )
        if self._folder is not None:
            self._folder.save(self.state_dict())
            self._saved_step = self.step
        self._owns_folder = True

    def resume(self) -> bool:
        """Load the checkpoint of ``run_dir`` if there is one; whether there was.

        Budgets may differ from those of the run that is resumed, and so may the number of processes. CheckpointError
        where the file is damaged, or of a run with other settings.
        """
        state = self._read(self.checkpoint_path)
        if state is not None:
            self.load_state_dict(state)
            self._owns_folder = True
            self._saved_step = self.step
        return state is not None

    def load_best(self) -> dict[str, Any]:
        """Put theta (and the method's learned tensors) where the validation metric was best, to evaluate it.

        Returns that ``{"step": ..., "validation": ..., "interval": ...}``. FileNotFoundError where no validation was
        made in ``run_dir`` yet, CheckpointError as in :meth:`resume`.
        """
        best: dict[str, Any] = self._read_best()["best"]
        self._at_best = True
        return best

    def _read_best(self) -> dict[str, Any]:
        """The state of the best validation, its tensors put in place."""
        state = self._read(self.best_path)
        if state is None:
            raise FileNotFoundError(
                f"{self.best_path or 'run_dir=None'}: no best state is kept there. It is written at the first "
                "validation of a trainer with run_dir, metric and validation."
            )
        self._set_leaves(state)
        return state

    def _read(self, path: Path | None) -> dict[str, Any] | None:
        """The state in a file, the same on every process, with DTensors placed as they are here."""
        state = self._group.from_first(lambda: self._load(path))
        if state is None:
            return None
        assert self._folder is not None
        self._check_shapes(self._in_order(state))
        own = self._names()
        saved = state.get("names", own)  # what the file has of every process is read in its order
        theta = dict(zip(own["theta"], flatten(self.theta)[0], strict=True))
        held = dict(zip(own["optimizer"], self._outer.leaves, strict=True))
        likes = {name: tree_map(lambda _: None, state[name]) for name in ("theta", "method", "optimizer")}
        likes["theta"], likes["method"] = [theta[name] for name in saved["theta"]], self.method.parameters()
        for index, values in likes["optimizer"]["state"].items():
            leaf = held[saved["optimizer"][index]]
            # the number of steps is no tensor for each entry
            like = {
                name: None if name == "step" else tree_map(lambda _, own=leaf: own, v) for name, v in values.items()
            }
            likes["optimizer"]["state"][index] = like
        return self._in_order(self._folder.with_parts(state, likes))

    @property
    def _leaves(self) -> list[torch.Tensor]:
        return [*flatten(self.theta)[0], *self.method.parameters()]

    @property
    def _validates(self) -> bool:
        return self.metric is not None and len(self.validation) > 0

    def _names(self) -> dict[str, list[str]]:
        """Of the tensors of theta, and of those that the optimizer holds, in its order."""
        leaves, names = flatten_with_names(self.theta, "theta")
        of = {id(leaf): f"method.parameters()[{i}]" for i, leaf in enumerate(self.method.parameters())}
        pairs = sorted(zip(names, leaves, strict=True), key=itemgetter(0), reverse=True)
        of |= {id(leaf): name for name, leaf in pairs}  # of one that is there twice the first by the alphabet
        held = [of.get(id(leaf), f"optimizer[{i}]") for i, leaf in enumerate(self._outer.leaves)]
        return {"theta": names, "optimizer": held}

    def _in_order(self, state: dict[str, Any]) -> dict[str, Any]:
        """A saved state with its tensors in the order of this run, by their names.

        Keys of dictionaries may come in another order there; checkpoints without names are taken to be in this one.
        """
        own = self._names()
        saved = state.get("names", own)
        if saved == own:
            return state
        for kind, names in own.items():
            one_vector = kind == "optimizer" and self._outer.needs_closure  # LBFGS keeps steps of all tensors at once
            if sorted(names) != sorted(saved[kind]) or (one_vector and names != saved[kind]):
                there, here = sorted(set(saved[kind]) - set(names)), sorted(set(names) - set(saved[kind]))
                raise CheckpointError(
                    f"the checkpoint is of a run with other tensors in {kind}: {there} only there, {here} only here. "
                    "Name them as in that run (LBFGS: in its order, too), or give another run_dir for a new one."
                )
        theta = dict(zip(saved["theta"], state["theta"], strict=True))
        moved = {index: own["optimizer"].index(name) for index, name in enumerate(saved["optimizer"])}
        kept = {moved[index]: values for index, values in state["optimizer"]["state"].items()}
        placed = {"theta": [theta[name] for name in own["theta"]], "names": own}
        return state | placed | {"optimizer": state["optimizer"] | {"state": kept}}

    def _check_shapes(self, state: dict[str, Any]) -> None:
        saved, names = [*state["theta"], *state["method"]], self._names()["theta"]
        names = [*names, *(f"method.parameters()[{i}]" for i in range(len(self._leaves) - len(names)))]
        if len(saved) != len(self._leaves):
            raise CheckpointError(
                f"the checkpoint holds {len(saved)} tensors, this run {len(self._leaves)}, {names}: other settings?"
            )
        for name, leaf, there in zip(names, self._leaves, saved, strict=True):
            if leaf.shape != there.shape or leaf.dtype != there.dtype:
                raise CheckpointError(
                    f"the checkpoint holds a {name} of shape {tuple(there.shape)} and {there.dtype}, this run one of "
                    f"{tuple(leaf.shape)} and {leaf.dtype}: other settings? Make it as in that run, or give another "
                    "run_dir for a new one."
                )

    def _set_leaves(self, state: dict[str, Any]) -> None:
        self._check_shapes(state)
        with torch.no_grad():
            for leaf, value in zip(self._leaves, [*state["theta"], *state["method"]], strict=True):
                leaf.copy_(value)

    def _settings(self) -> dict[str, Any]:
        """What makes another run of it; budgets, files and reports do not."""
        return {
            "format": _FORMAT,
            "method": plain(self.method),
            "outer": self._outer.settings,
            "tasks_per_step": self.tasks_per_step,
            "config": plain(self.config),
            "split": name_of(self.split),
            "validation": {"metric": name_of(self.metric), "better": self.better, "transductive": self.transductive}
            if self._validates
            else None,
        }

    def _load(self, path: Path | None) -> dict[str, Any] | None:
        if path is None or not path.exists():
            return None
        state = load_checkpoint(path)
        saved = state.get("settings")
        if not isinstance(saved, dict) or saved.get("format") != _FORMAT:
            raise CheckpointError(
                f"{path} was not written by this version of the trainer. Use the version that did, or another run_dir."
            )
        here = self._settings()
        # not compared: what older checkpoints do not say, and the best of a run that measures nothing
        unsaid = [name for name in ("split", "validation") if saved.get(name) is None or here[name] is None]
        differing = differences(saved | dict.fromkeys(unsaid), here | dict.fromkeys(unsaid))
        if differing:
            raise CheckpointError(
                f"{path} is of a run with other settings ({'; '.join(differing)}). Resume with the settings of that "
                "run, or give another run_dir for a new one."
            )
        return state


def random_state() -> dict[str, Any]:
    """States of the global generators of torch (CPU, and the current GPU where one is in use), Python and NumPy.

    Plain data and tensors, so that a checkpoint that holds it can be read without running code.
    """
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002 - what users of the old interface draw from
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": [version, list(words), gauss],
        "numpy": [str(name), torch.tensor(np.asarray(keys, dtype=np.int64)), int(position), int(has_gauss), cached],
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Put the generators back where :func:`random_state` found them.

    A GPU's state is left out where there is no GPU: nothing draws from it there.
    """
    torch.set_rng_state(state["torch"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    array = keys.numpy().astype(np.uint32)
    np.random.set_state((name, array, position, has_gauss, cached))  # noqa: NPY002 - the same
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
