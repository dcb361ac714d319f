"""What the trainer tells while it trains: numbers, memory, trouble of the inner problem, a collapse, TensorBoard."""

from __future__ import annotations

import importlib.util
import math
import statistics
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from implicitlayer._errors import ImplicitLayerError, ImplicitLayerWarning
from implicitlayer._torch import TorchDispatchMode, pytree
from implicitlayer.base._parts import Parts
from implicitlayer.base._records import BackwardRecord, Record
from implicitlayer.base._types import PyTree
from implicitlayer.meta._method import MetaMethod, num_tasks, one_per_task


def curvature_sums(records: Iterable[Record]) -> dict[str, torch.Tensor]:
    """From the diagnostics of a meta-gradient, per solve: 1, whether it met negative curvature, and its CG residual.

    Nothing for a method without Hessian-vector products.
    """
    solutions = [record.solution for record in records if isinstance(record, BackwardRecord)]
    seen = [solution.smallest_curvature.detach().flatten() for solution in solutions]
    if not any(values.numel() and torch.isfinite(values).any() for values in seen):
        return {}
    curvature = torch.cat(seen)
    return {
        "solves": torch.ones_like(curvature),
        "negative_curvature": curvature <= 0,
        "cg_residual": torch.cat([solution.relative_residual.detach().flatten() for solution in solutions]),
    }


def inner_sums(method: MetaMethod, theta: PyTree, phi: PyTree, support: PyTree) -> dict[str, torch.Tensor]:
    """How adaptation went, per task: 1, the inner objective before and after, and whether it rose."""
    with torch.no_grad():
        before = method.inner_objective(one_per_task(theta, num_tasks(support)), theta, support)
        after = method.inner_objective(phi, theta, support)
    return {
        "looked_at": torch.ones_like(before),
        "inner_before": before,
        "inner_after": after,
        "inner_diverged": ~(after <= before),  # also true for NaN
    }


def trouble(numbers: dict[str, Any]) -> str:
    """A few words for the progress bar when the inner problem misbehaves, else nothing."""
    words = []
    if (share := numbers.get("inner_diverged", 0.0)) > 0:
        words.append(f"inner problem diverges on {share:.0%} of tasks: lower its step size")
    if (share := numbers.get("negative_curvature", 0.0)) > 0.5:
        words.append(f"negative curvature on {share:.0%} of tasks: raise the strength")
    return "; ".join(words)


_BAR = "{desc} {percentage:3.0f}% |{bar}|"


class Progress:
    """A bar with loss, accuracy and time left: tqdm where it is installed, a line now and then where it is not.

    ``done`` is the share of the budget that is already used, 0...1 (after a resume).
    """

    _UNITS = 1000

    def __init__(self, done: float, *, name: str = "", show: bool = True, leave: bool = True) -> None:
        self._bar: Any = None
        self._line_at, self._name, self._show, self._trouble = done, name, show, ""
        if not show:
            return
        try:
            from tqdm import tqdm
        except ImportError:
            return
        interval = 0.2 if sys.stderr.isatty() else 15.0  # a log file gets a line now and then
        how = {"bar_format": _BAR, "mininterval": interval, "dynamic_ncols": True, "leave": leave}
        self._bar = tqdm(total=self._UNITS, initial=int(done * self._UNITS), desc=name, **how)

    def update(self, done: float, record: dict[str, Any]) -> None:
        """Show the record of a training step; ``done`` is the share of the budget used."""
        if "inner_diverged" in record:
            self._trouble = trouble(record)
        words = f"step {record['step']}, loss {record['loss']:.3f}"
        words += f", accuracy {record['accuracy']:.1%}" if "accuracy" in record else ""
        self.show(done, record["seconds"], words + (f" [{self._trouble}]" if self._trouble else ""))

    def show(self, done: float, seconds: float, words: str) -> None:
        """Show ``words`` and the time left, when ``seconds`` were spent on the share ``done``."""
        if not self._show:
            return
        left = round(seconds * (1 - done) / max(done, 1e-9))
        words = f"ETA {left // 60}:{left % 60:02d}, {words}"
        if self._bar is not None:
            self._bar.bar_format = f"{_BAR} {words}"
            self._bar.update(min(self._UNITS, int(done * self._UNITS)) - self._bar.n)
        elif done - self._line_at >= 0.05 or done >= 1.0:
            self._line_at = done
            print(f"{self._name} {done:4.0%} {words}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.refresh()
            self._bar.close()


def require_tensorboard() -> None:
    """Raise, with the extra to install, where TensorBoard is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ImportError(
            "tensorboard=True needs the package tensorboard: pip install 'implicitlayer[examples]'. metrics.jsonl "
            "holds the same numbers without it."
        )


def event_writer(run_dir: Path, first_step: int) -> Any:
    """TensorBoard's writer of event files in ``run_dir``.

    What earlier files of the folder hold from ``first_step`` on is of steps that a killed process did not save: it is
    marked as void, and TensorBoard shows each step once.
    """
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(run_dir), purge_step=first_step)


def write_event(writer: Any, record: dict[str, Any]) -> None:
    """One value at the step of the record for every number of it."""
    for name, value in record.items():
        if name != "step":
            writer.add_scalar(name, value, record["step"])


OnCollapse = Literal["warn", "rollback", "stop"]
ON_COLLAPSE = get_args(OnCollapse)

# NOTE [collapse]: meta-training sharpens the support loss. Once its largest curvature passes 2 / step - strength, inner
# gradient descent with a fixed step raises its own objective, the point that it ends at is no minimum, and the implicit
# gradient there is that of none: the meta-loss climbs back to where it began. So a run has collapsed
#   - where the mean loss of the last WINDOW steps has lost half of what the best WINDOW steps had won over the first,
#     and is above theirs by SURE standard errors of the two means (the best of many is best by chance, too), or
#   - where the metric has lost a third in this way: first-order meta-gradients leave curvature out, and fit support
#     sets ever better and queries worse at a standing loss (Omniglot 20-way 1-shot: 81 % to 60 %), or
#   - where the inner objective rose, or negative curvature was met, in most tasks of the last LOOKS looks.
WINDOW = 20
LOOKS = 3
MOST = 0.5
LOST = {"loss": 1 / 2, "accuracy": 1 / 3}  # of what was won
SURE = 6.0
MAX_ROLLBACKS = 3


class CollapseWarning(ImplicitLayerWarning):
    """Training loses what it has learned; the message says by what numbers, and what helps."""


class CollapseError(ImplicitLayerError, RuntimeError):
    """The same where ``on_collapse`` ends the run; the checkpoints hold the last and the best state."""


def collapse(history: Sequence[dict[str, Any]], better: str = "higher") -> str:
    """What is wrong with a run since its last return to an earlier state, in a sentence; empty where nothing is.

    ``better``: whether a higher or a lower metric is the better one.

    >>> falling = [{"step": k + 1, "loss": 1.6 - 0.02 * k} for k in range(60)]
    >>> rising = [{"step": k + 61, "loss": 0.42 + 0.05 * k} for k in range(30)]
    >>> collapse(falling), bool(collapse(falling + rising))
    ('', True)
    """
    starts = [i for i, record in enumerate(history) if record.get("rolled_back")]
    recent = history[starts[-1] + 1 :] if starts else history
    sign = -1.0 if better == "higher" else 1.0
    found = [*_of_inner_problem(recent), *_of_series(recent, "loss", "meta-loss", 1.0)]
    return "; ".join([*found, *_of_series(recent, "accuracy", "metric of the training tasks", sign)])


def _of_series(history: Sequence[dict[str, Any]], name: str, what: str, sign: float) -> list[str]:
    """Whether the numbers ``name``, which fall in a good run once they have been given ``sign``, have climbed back."""
    values = [sign * record[name] for record in history if math.isfinite(record.get(name, math.nan))]
    if len(values) < 2 * WINDOW:
        return []
    means = np.lib.stride_tricks.sliding_window_view(values, WINDOW).mean(-1)
    first, best, last = means[0], means.min(), means[-1]
    at = int(means.argmin())
    spread = math.hypot(statistics.stdev(values[at : at + WINDOW]), statistics.stdev(values[-WINDOW:]))
    lost = best < first and last - best > max(LOST[name] * (first - best), SURE * spread / math.sqrt(WINDOW))
    last, best, first = sign * last, sign * best, sign * first
    return [f"the {what} is {last:.3g} after {best:.3g} at its best and {first:.3g} at the start"] if lost else []


def _of_inner_problem(history: Sequence[dict[str, Any]]) -> list[str]:
    words = []
    for name, what in (
        ("inner_diverged", "the inner solver raised its own objective"),
        ("negative_curvature", "the meta-gradient's matrix was indefinite"),
    ):
        shares = [record[name] for record in history if name in record][-LOOKS:]
        if len(shares) == LOOKS and min(shares) > MOST:
            words.append(f"{what} in {sum(shares) / LOOKS:.0%} of the tasks")
    return words


def advice(found: str, step: int) -> str:
    return (
        f"training collapses at meta-step {step}: {found}. A fixed inner step diverges once meta-training has "
        "sharpened the support loss: search it (GradientDescent(..., line_search='armijo')), or lower it, or raise the "
        "strength. A first-order meta-gradient leaves curvature out: il.meta.iMAML with some conjugate gradient steps "
        "has it. A lower outer rate and max_gradient_norm help too."
    )


class PeakMemory(TorchDispatchMode):
    """Bytes of tensor storage that are made inside the ``with`` block and alive, ``now``, and their ``peak``.

    Storages are counted once, after every operator, wherever they live; views and tensors from outside cost nothing.
    Of a DTensor the part on this process counts.
    What an operator takes and frees inside itself (a workspace) is not seen.

    Example:
        >>> import torch, implicitlayer as il
        >>> x = torch.zeros(1000)
        >>> with il.meta.PeakMemory() as memory:
        ...     y = (x + 1).exp()                        # two results of 4000 bytes, the first is freed
        >>> memory.peak, memory.now
        (8000, 4000)
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and count the storages it made."""
        if any(kind is Parts or hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # a DTensor: it comes here again with what lies on this process
        given = {t.untyped_storage()._cdata for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if not isinstance(tensor, torch.Tensor) or (storage := tensor.untyped_storage()).device.type == "meta":
                continue
            key, size = storage._cdata, storage.nbytes()
            if key not in self._alive and key not in given:
                self._alive.add(key)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, key, size)
        return result

    def _free(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


def peak_memory(function: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Most bytes that one call of ``function`` holds at a time, beyond what is held before it. The result counts.

    On "cuda" the number is the allocator's (workspaces included); elsewhere :class:`PeakMemory` counts. Where
    ``function`` keeps something for later calls, run it once before.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = function()
        torch.cuda.synchronize(device)
        del result
        return int(torch.cuda.max_memory_allocated(device)) - before
    memory = PeakMemory()
    with memory:
        result = function()
        del result
    return memory.peak
