"""A stream of tasks: task i depends on the seed and on i alone, and the stream can be stopped and continued."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from implicitlayer.base._numbers import check_integer

Batch = TypeVar("Batch")


class TaskStream(abc.ABC, Generic[Batch]):
    """What all samplers of tasks share; a subclass says what a task is made of.

    NOTE [task numbers]: every task takes the same count of random numbers, one row of them, from the sampler's own
    generator (NumPy PCG64). That makes task number i independent of the batch it comes in, so ``sample(4)`` and two
    times ``sample(2)`` give the same four tasks. The global generators are neither read nor changed.

    A worker process of a ``torch.utils.data.DataLoader`` holds a copy of the sampler, and draws from a stream of its
    own: that of the sampler's position and of the worker's seed, which the loader's ``generator`` (or torch's global
    one) draws anew for every epoch.
    """

    def __init__(self, seed: int) -> None:
        check_integer("seed", seed, 0)
        self.seed = seed
        self._random = np.random.Generator(np.random.PCG64(seed))
        self._worker: int | None = None  # seed of the worker process whose stream this is

    @abc.abstractmethod
    def _draw(self, random: np.random.Generator, num_tasks: int) -> Batch:
        """The next tasks of ``random``; NOTE [task numbers]."""

    @abc.abstractmethod
    def _settings(self) -> dict[str, Any]:
        """What the tasks depend on beside the random numbers, JSON-serialisable."""

    def sample(self, num_tasks: int) -> Batch:
        """The next ``num_tasks`` tasks."""
        check_integer("num_tasks", num_tasks, 1)
        worker = _worker_seed()
        if worker is not None and worker != self._worker:
            entropy = [int(self._random.integers(2**63)), worker]
            self._random, self._worker = np.random.Generator(np.random.PCG64(entropy)), worker
        return self._draw(self._random, num_tasks)

    def fixed(self, num_tasks: int, *, batch_size: int = 50) -> Iterator[Batch]:
        """The first ``num_tasks`` tasks of this seed, in batches: always the same, for evaluation.

        The sampler itself does not move on. The last batch may be smaller.
        """
        check_integer("num_tasks", num_tasks, 1)
        check_integer("batch_size", batch_size, 1)
        random = np.random.Generator(np.random.PCG64(self.seed))
        for start in range(0, num_tasks, batch_size):
            yield self._draw(random, min(batch_size, num_tasks - start))

    def state_dict(self) -> dict[str, Any]:
        """Where the random stream stands, and what it is drawn for: plain numbers, strings and dicts."""
        return {"settings": self._settings(), "random": self._random.bit_generator.state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken: the following tasks are the same bit for bit.

        Raises:
            ValueError: the state belongs to a sampler with other settings or another dataset.
        """
        ours, theirs = self._settings(), dict(state["settings"])
        differing = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
        if differing:
            listed = ", ".join(f"{name}: {theirs.get(name)!r} there, {ours.get(name)!r} here" for name in differing)
            raise ValueError(
                f"The state was taken from another sampler ({listed}), so its tasks cannot be continued. "
                "Make the sampler with the same settings and dataset."
            )
        self._random.bit_generator.state = state["random"]
        self._worker = _worker_seed()


def _worker_seed() -> int | None:
    """That of the DataLoader's worker that this process is."""
    info = torch.utils.data.get_worker_info()
    return None if info is None else info.seed


def on_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """The array as a tensor there; to a GPU from pinned memory, so that the host does not wait for the device.

    PyTorch keeps the pinned block until the copy is done, so it may go out of scope here.
    """
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
