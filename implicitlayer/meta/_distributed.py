"""Tasks in parallel over processes: the group, its few collective operations, and what is said when one is lost."""

# W: processes of the group ("workers"), B: tasks of a batch, all workers together

# NOTE [tasks and parts]: a process that holds all of theta takes tasks of its own. Processes that hold the parts of one
# copy of theta (DTensors) work on the same tasks together, and copies share the tasks. So numbers of a task, which are
# the same on every process of a copy, count once for each copy; and a part of the gradient is summed over the processes
# that hold the same part of other copies.

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from implicitlayer._errors import ImplicitLayerError
from implicitlayer.base._tree import tree_map
from implicitlayer.base._types import PyTree
from implicitlayer.meta._copies import Copies
from implicitlayer.meta._settings import fingerprint, parts_of


class WorkerLostError(ImplicitLayerError, RuntimeError):
    """Another process of the group died, stopped answering or failed: this one cannot go on without it."""


@dataclass(frozen=True)
class WorkerGroup:
    """This process among those that share the tasks of every meta-step.

    Attributes:
        rank: number of this process, 0...size - 1.
        size: number of processes.
        device: where this process computes.
        copies: how the processes hold copies of theta together, NOTE [tasks and parts]; None: each holds all of it.

    Example:
        >>> import torch, implicitlayer as il
        >>> group = il.meta.WorkerGroup(rank=1, size=3)
        >>> group.is_first, group.share(8)               # 8 tasks over 3 processes: 2, 3 and 3
        (False, slice(2, 5, None))
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    copies: Copies | None = None

    @staticmethod
    def current(
        device: torch.device | str = "cpu", theta: PyTree = (), own: Sequence[torch.Tensor] = ()
    ) -> WorkerGroup:
        """The default group of ``torch.distributed`` if one is initialised, else this process alone.

        All processes make this call if ``theta``, or the ``own`` parameters of a method, hold DTensors.
        """
        if dist.is_available() and dist.is_initialized():
            return WorkerGroup(dist.get_rank(), dist.get_world_size(), torch.device(device), Copies.of(theta, own))
        return WorkerGroup(device=torch.device(device))

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and shows progress."""
        return self.rank == 0

    def share(self, num_tasks: int) -> slice:
        """Which of ``num_tasks`` tasks are this process's: contiguous parts whose sizes differ by one at most."""
        index, count = (self.rank, self.size) if self.copies is None else (self.copies.index, self.copies.count)
        return slice(index * num_tasks // count, (index + 1) * num_tasks // count)

    def seen(self, theta: PyTree) -> PyTree:
        """Theta as the tasks of this process see it: the copy that lies on this process and those beside it."""
        return theta if self.copies is None else tree_map(self.copies.seen, theta)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """``values`` summed over all processes, the same bits on each; a new tensor."""
        if self.size == 1:
            return values
        total = values.detach().clone()
        self._collective(lambda: dist.all_reduce(total))
        return total

    def sum_small(self, values: torch.Tensor) -> torch.Tensor:
        """The same for a small tensor on the CPU."""
        return self.sum(values.to(self._control())).cpu() if self.size > 1 else values

    def sum_numbers(self, numbers: Sequence[float]) -> list[float]:
        """A few numbers summed over all processes in float64."""
        total: list[float] = self.sum_small(torch.tensor(numbers, dtype=torch.float64)).tolist()
        return total

    def sum_of_tasks(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all tasks of a small tensor about those of this process, on the CPU."""
        counts = self.copies is None or self.copies.is_first
        return self.sum_small(values if counts else torch.zeros_like(values))

    def largest_of_copy(self, number: float) -> float:
        """The largest ``number`` of the processes that hold one copy of theta."""
        if self.copies is None:
            return number
        largest = torch.tensor(number, dtype=torch.float64, device=self._control())
        mesh = self.copies.mesh
        for dim in range(1, mesh.ndim):
            self._collective(partial(dist.all_reduce, largest, dist.ReduceOp.MAX, mesh.get_group(dim)))
        return largest.item()

    def sum_gradients(self, leaves: Sequence[torch.Tensor], present: Sequence[bool]) -> None:
        """Replace every ``leaf.grad`` by its sum over all processes: one flat all-reduce for each dtype and device.

        ``leaves`` are in the same order everywhere; ``present`` says which of them have a gradient on any process.
        """
        if self.size == 1 and self.copies is None:
            return
        buckets: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
        for leaf, has_gradient in zip(leaves, present, strict=True):
            if has_gradient:
                leaf.grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
                buckets.setdefault((leaf.dtype, leaf.device), []).append(leaf)
        for bucket in buckets.values():
            gradients: list[Any] = [leaf.grad for leaf in bucket]
            if self.copies is not None:
                gradients = [self.copies.part_of_gradient(leaf) for leaf in bucket]
            total = torch.cat([gradient.reshape(-1) for gradient in gradients])
            if self.copies is None:
                total = self.sum(total)
            elif self.copies.count > 1:
                self._collective(partial(dist.all_reduce, total, group=self.copies.mesh.get_group("copies")))
            parts = total.split([gradient.numel() for gradient in gradients])
            for leaf, gradient, part in zip(bucket, gradients, parts, strict=True):
                if self.copies is None:
                    gradient.copy_(part.view_as(gradient))
                else:
                    leaf.grad = self.copies.whole_gradient(leaf, part.view_as(gradient))

    def from_first(self, make: Callable[[], Mapping[str, Any] | None]) -> dict[str, Any] | None:
        """What ``make()`` gives on the first process, on every process: a dict of tensors and plain data, or None."""
        if self.size == 1:
            made = make()
            return None if made is None else dict(made)
        sent: list[Any] = [None, False]  # what was made, and whether making it failed
        failure = None
        if self.is_first:
            try:
                sent = [make(), False]
            except Exception as error:
                sent, failure = [None, True], error
        self._collective(lambda: dist.broadcast_object_list(sent, 0, device=self._control()))
        if failure is not None:
            raise failure
        if sent[1]:
            raise WorkerLostError("The first process failed while the others waited for it; its own message says why.")
        return None if sent[0] is None else dict(sent[0])

    def require_same(self, values: Mapping[str, Any]) -> None:
        """Raise on every process unless each of ``values`` (name -> pytree) is bitwise the same on all."""
        if self.size == 1:
            return
        prints = [[fingerprint(value), fingerprint(parts_of(value))] for value in values.values()]
        mine = torch.tensor(prints, device=self._control())
        everybody = [torch.empty_like(mine) for _ in range(self.size)]
        self._collective(lambda: dist.all_gather(everybody, mine))
        alike = [0] * self.size if self.copies is None else self.copies.alike()
        for index, name in enumerate(values):
            wanted = [(everybody[0][index, 0], everybody[first][index, 1]) for first in alike]
            others = [rank for rank, theirs in enumerate(everybody) if tuple(theirs[index]) != wanted[rank]]
            if others:
                raise ValueError(
                    f"{name} of process {others[0]} is not that of process 0, but every process must have the same and "
                    "then takes its own tasks. Make it with the same seed on each, or from the same checkpoint."
                )

    def _control(self) -> torch.device:
        """Where small messages lie: on the CPU if the group has a backend for it."""
        return torch.device("cpu") if "cpu:" in dist.get_backend_config() else self.device

    def lost(self, error: RuntimeError) -> WorkerLostError:
        """``error`` as :class:`WorkerLostError` where it is one, or comes from torch's messages between processes.

        Any other is raised.
        """
        if isinstance(error, WorkerLostError):
            return error
        if self.copies is None or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise error
        return self._lost(error)

    def _collective(self, operation: Callable[[], object]) -> None:
        try:
            operation()
        except RuntimeError as error:  # gloo and nccl have no class of their own for a peer that is gone
            raise self._lost(error) from error

    def _lost(self, error: RuntimeError) -> WorkerLostError:
        return WorkerLostError(
            f"A worker was lost: process {self.rank} of {self.size} waited for the others in vain ({_first(error)})."
        )


@contextmanager
def distributed(*, device: torch.device | str | None = None, timeout: float = 300.0) -> Iterator[WorkerGroup]:
    """Join the processes that ``torchrun`` started, for the length of the ``with`` block, which gives the group.

    Without ``torchrun`` there is one process and nothing is set up. At the end of the block the processes wait for each
    other. On CPUs the processes talk through gloo; on GPUs gradients go through nccl and everything small through gloo,
    which notices a lost process at once. Each process of a machine takes a GPU of its own, ``group.device``.

    Args:
        device: "cpu" or "cuda"; None takes GPUs where there are any.
        timeout: seconds that a process waits for the others before it gives up with :class:`WorkerLostError`, more than
            0. Longer than anything that one process does while the others wait.

    Raises:
        ValueError: there is no GPU, or there are fewer than processes; a time-out that is not positive.
        RuntimeError: a process group exists already.
        WorkerLostError: not all processes came.
    """
    if not timeout > 0:
        raise ValueError(f"timeout={timeout} must be a positive number of seconds.")
    mine = _own_device(device)
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield WorkerGroup(device=mine)
        return
    if dist.is_initialized():
        raise RuntimeError(
            "A process group exists already: leave il.meta.distributed() out, the trainer uses that group."
        )
    gpu = mine.type == "cuda"
    if gpu:
        torch.cuda.set_device(mine)
        # a lost process then shows as an exception; without this nccl ends the program without a word of ours
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=timedelta(seconds=timeout))
    except RuntimeError as error:
        raise WorkerLostError(
            f"Process {os.environ['RANK']} of {os.environ['WORLD_SIZE']} could not join the others within {timeout:g} "
            f"seconds ({_first(error)}). Start all of them, or give a longer timeout."
        ) from error
    try:
        group = WorkerGroup.current(mine)
        yield group
        # A process that leaves while another one still works may be aborted by torch while Python shuts down (3 of 21
        # runs on a busy machine with torch 2.13, 0 of 21 with this), so all leave together. Whoever is gone by now, or
        # takes longer than the time-out, is not waited for: the work of this process is done.
        with suppress(WorkerLostError):
            group.sum_numbers([1.0])
    finally:
        lost = isinstance(sys.exc_info()[1], WorkerLostError)
        if not (gpu and lost):  # nccl would wait for the lost process
            dist.destroy_process_group()


def _first(error: Exception) -> str:
    """The first sentence of a message of gloo's or nccl's, without the place in their source."""
    return re.sub(r"^\[[^\]]*\]\s*", "", str(error).strip()).split("\n")[0].split(". ")[0]


def _own_device(device: torch.device | str | None) -> torch.device:
    available = torch.cuda.is_available()
    kind = torch.device(device).type if device is not None else ("cuda" if available else "cpu")
    if kind != "cuda":
        return torch.device(kind)
    if not available:
        raise ValueError(f"device={str(device)!r} needs a CUDA device, and torch sees none here. Pass device='cpu'.")
    index = int(os.environ.get("LOCAL_RANK", "0"))
    if index >= torch.cuda.device_count():
        raise ValueError(
            f"Process {index} of this machine has no GPU of its own: there are {torch.cuda.device_count()}. Start "
            f"torchrun with --nproc-per-node {torch.cuda.device_count()}."
        )
    return torch.device("cuda", index)


def launch_command() -> str:
    """The command that starts this program again, under torchrun with as many processes if it runs under it."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    module = spec.name.removesuffix(".__main__") if spec is not None else None
    what = ["-m", module, *sys.argv[1:]] if module else sys.argv
    per_node = os.environ.get("LOCAL_WORLD_SIZE")
    return shlex.join(["torchrun", "--nproc-per-node", per_node, *what] if per_node else ["python", *what])
