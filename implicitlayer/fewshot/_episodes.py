"""Few-shot tasks, all of a batch at once, task i by the seed and i alone: drawn from a dataset, or from sinusoids."""

# C: classes, E: examples of each, B: tasks, N: ways, K: shots, Q: query examples of each class, H, W: pixels

from __future__ import annotations

import abc
import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Generic, Literal, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from implicitlayer.base._tree import check_integer

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


Rotations = Literal["none", "augment", "classes"]
ROTATIONS: tuple[Rotations, ...] = ("none", "augment", "classes")


class ImageSource(Protocol):
    """What a sampler needs of a dataset: :class:`ImageClasses`, or anything with these two.

    A third attribute, ``counts`` ``[C]``, says how many pictures each class has where they differ.
    """

    images: Tensor
    class_names: list[str]


@dataclass(frozen=True)
class EpisodeBatch:
    """B few-shot tasks; examples are ordered by label, so labels repeat 0…0, 1…1, and so on.

    Attributes:
        support_images, query_images: float32 in [0, 1], ``[B, N*K, C, H, W]`` and ``[B, N*Q, C, H, W]``; C is 1, or 3
            for colour pictures.
        support_labels, query_labels: int64 in [0, N), ``[B, N*K]`` and ``[B, N*Q]``.
        classes: int64, ``[B, N]``; which class of the dataset each label stands for.
        rotations: int64 in {0, 1, 2, 3}, ``[B, N]``; quarter turns, counter-clockwise, of all pictures of that label.
    """

    support_images: Tensor
    support_labels: Tensor
    query_images: Tensor
    query_labels: Tensor
    classes: Tensor
    rotations: Tensor

    def to(self, device: torch.device | str) -> EpisodeBatch:
        """The same tasks on ``device``."""
        # A copy towards the host must have arrived before anybody reads it; towards a GPU the stream keeps the order.
        ahead = torch.device(device).type != "cpu"
        return EpisodeBatch(*(getattr(self, f.name).to(device, non_blocking=ahead) for f in fields(self)))

    def __len__(self) -> int:
        return self.classes.shape[0]

    def __getitem__(self, tasks: slice) -> EpisodeBatch:
        """Some of the tasks, ``batch[4:8]``: views, no copy."""
        if not isinstance(tasks, slice):
            raise TypeError(f"tasks={tasks!r} must be a slice; for one task write batch[i : i + 1].")
        return EpisodeBatch(*(getattr(self, f.name)[tasks] for f in fields(self)))


class EpisodeSampler(TaskStream[EpisodeBatch]):
    """Draws N-way K-shot tasks; the same seed gives the same tasks, in whatever batches they are asked for.

    A task takes N distinct classes, in random order, and of each K + Q distinct examples: the first K are its support,
    the others its query. Task number i depends on the seed and i alone, never on the batch it comes in, so
    ``sample(4)`` and two times ``sample(2)`` give the same four tasks. Random numbers come from the sampler's own
    generator (NumPy PCG64); the global ones are neither read nor changed.

    Args:
        dataset: ``images`` uint8 ``[C, E, H, W]``, or ``[C, E, H, W, 3]`` for colour, and ``class_names``; classes
            may have different numbers of examples, as told by ``counts``.
        num_ways: N, classes in a task, at least 2.
        num_shots: K, support examples of each class.
        num_query: Q, query examples of each class; K + Q may not exceed the smallest class.
        rotations: ``"none"``; ``"augment"``: each class of each task is turned by a random multiple of 90°, the same
            for all its support and query pictures (what the MAML and iMAML releases do in training; leave it out when
            testing); ``"classes"``: a class turned by each multiple of 90° is four classes, 4 C in all, and a task
            may hold several of them with different labels (as in Reptile).
        seed: integer of 0 or more.
        device: where pictures are gathered and tasks are returned; the dataset is copied there once.

    Raises:
        ValueError: a number out of range or an unknown ``rotations``; the message gives the limit.

    Source: episodes as in Vinyals et al., Matching Networks (NeurIPS 2016), section 4.1.

    Example:
        >>> from implicitlayer.fewshot import ImageClasses
        >>> images = torch.arange(6 * 4, dtype=torch.uint8).view(6, 4, 1, 1)  # class c, example e: grey 4 c + e
        >>> sampler = EpisodeSampler(ImageClasses(images, list("abcdef")), num_ways=3, num_shots=1, num_query=2)
        >>> batch = sampler.sample(2)
        >>> batch.query_images.shape, batch.query_labels[0]
        (torch.Size([2, 6, 1, 1, 1]), tensor([0, 0, 1, 1, 2, 2]))
        >>> grey = (batch.support_images * 255).round().long().flatten(1)
        >>> torch.equal(grey // 4, batch.classes)
        True
    """

    def __init__(
        self,
        dataset: ImageSource,
        *,
        num_ways: int = 5,
        num_shots: int = 1,
        num_query: int = 15,
        rotations: Rotations = "none",
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        num_classes, most, height, width = dataset.images.shape[:4]
        counts: Tensor | None = getattr(dataset, "counts", None)
        self._counts = np.full(num_classes, most) if counts is None else np.asarray(counts.cpu())
        if rotations not in ROTATIONS:
            raise ValueError(f"rotations={rotations!r} must be one of {', '.join(map(repr, ROTATIONS))}.")
        if rotations != "none" and height != width:
            raise ValueError(f"rotations={rotations!r} needs square pictures, these are {height}x{width}. Pass 'none'.")
        available = num_classes * (4 if rotations == "classes" else 1)
        check_integer("num_ways", num_ways, 2)
        check_integer("num_shots", num_shots, 1)
        check_integer("num_query", num_query, 1)
        super().__init__(seed)
        if num_ways > available:
            raise ValueError(
                f"num_ways={num_ways} must not exceed the {available} classes of the dataset. "
                "Take fewer ways or a split with more classes."
            )
        smallest = int(self._counts.argmin())
        num_examples = int(self._counts[smallest])
        if num_shots + num_query > num_examples:
            raise ValueError(
                f"num_shots={num_shots} plus num_query={num_query} must not exceed the {num_examples} examples of a "
                f"class ({dataset.class_names[smallest]!r}), because support and query share none. The most for "
                f"num_query is {num_examples - num_shots}; or leave out small classes."
            )
        self.dataset = dataset
        self.num_ways, self.num_shots, self.num_query = num_ways, num_shots, num_query
        self.rotations: Rotations = rotations
        self._num_available = available
        self._images = dataset.images.to(device)

    def __repr__(self) -> str:
        return (
            f"EpisodeSampler({self.dataset!r}, num_ways={self.num_ways}, num_shots={self.num_shots}, "
            f"num_query={self.num_query}, rotations={self.rotations!r}, seed={self.seed})"
        )

    def _settings(self) -> dict[str, Any]:
        settings = {name: getattr(self, name) for name in ("num_ways", "num_shots", "num_query", "rotations")}
        settings["num_examples"] = self._images.shape[1]
        settings["class_names"] = _digest("\n".join(self.dataset.class_names))
        return settings | ({"counts": _digest(str(self._counts.tolist()))} if self._ragged else {})

    @property
    def _ragged(self) -> bool:
        return bool((self._counts < self._images.shape[1]).any())

    def _draw(self, random: np.random.Generator, num_tasks: int) -> EpisodeBatch:
        # One row of numbers for each task: NOTE [task numbers] at :class:`TaskStream`.
        ways, examples = self.num_ways, self._images.shape[1]
        parts = np.cumsum([self._num_available, ways * examples])
        by_class, by_example, by_turn = np.split(random.random((num_tasks, int(parts[-1]) + ways)), parts, axis=1)
        # The N smallest of C uniform numbers are a uniform subset, and their order is a uniform order.
        smallest = np.argpartition(by_class, ways - 1, axis=1)[:, :ways]
        order = np.take_along_axis(by_class, smallest, axis=1).argsort(axis=1)
        classes = np.take_along_axis(smallest, order, axis=1)
        turns = np.zeros_like(classes)
        if self.rotations == "classes":
            classes, turns = classes // 4, classes % 4
        elif self.rotations == "augment":
            turns = (4 * by_turn).astype(np.int64)
        by_example = by_example.reshape(num_tasks, ways, examples)
        if self._ragged:  # filling comes last in the order, so it is never among the first K + Q
            by_example[np.arange(examples) >= self._counts[classes][:, :, None]] = np.inf
        chosen = by_example.argsort(axis=2)[..., : self.num_shots + self.num_query]
        return self._gather(classes, chosen, turns)

    def _gather(self, classes: NDArray[np.int64], chosen: NDArray[np.int64], turns: NDArray[np.int64]) -> EpisodeBatch:
        device = self._images.device
        tasks, ways = classes.shape
        which = on_device(classes, device)
        pictures = self._images[which[:, :, None], on_device(chosen, device)]  # [B, N, K + Q, H, W], or [..., H, W, 3]
        # Turned classes are found on the host, where the numbers are: a mask on the device would wait for it each time.
        for quarter in (1, 2, 3):
            task, way = (on_device(index, device) for index in np.nonzero(turns == quarter))
            if task.numel():
                pictures[task, way] = torch.rot90(pictures[task, way], quarter, (2, 3))
        shots, query = self.num_shots, self.num_query
        label = torch.arange(ways, device=device)
        support = _as_input(pictures[:, :, :shots]), label.repeat_interleave(shots).repeat(tasks, 1)
        asked = _as_input(pictures[:, :, shots:]), label.repeat_interleave(query).repeat(tasks, 1)
        return EpisodeBatch(*support, *asked, which, on_device(turns, device))


def _as_input(pictures: Tensor) -> Tensor:
    """uint8 ``[B, N, M, H, W]`` to float32 ``[B, N*M, 1, H, W]`` in [0, 1]; ``[..., H, W, 3]`` to 3 channels."""
    flat = pictures.flatten(1, 2)
    flat = flat.movedim(4, 2) if flat.ndim == 5 else flat.unsqueeze(2)
    return flat.to(torch.float32, memory_format=torch.contiguous_format).div_(255)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# B: tasks, K: support points, Q: query points

Points = tuple[Tensor, Tensor]


class Sinusoids(TaskStream[tuple[Points, Points]]):
    """Draws regression tasks ``y = A sin(x - p)``: the amplitude A and the phase p differ between tasks.

    A, p and all x are uniform in their intervals. A batch of B tasks is a pair (support, query) of pairs (x, y) of
    float32 tensors: ``[B, K, 1]`` each in the support, ``[B, Q, 1]`` in the query. Task number i depends on the seed
    and i alone, as in :class:`EpisodeSampler`.

    Args:
        num_shots, num_query: K and Q, support and query points of a task, at least 1.
        amplitude, phase, interval: smallest and largest A, p (in radians) and x.
        seed: integer of 0 or more.
        device: where the tasks are returned; they are drawn on the host.

    Raises:
        ValueError: a number out of range, or an interval whose ends are not finite and in order.

    Source: Finn, Abbeel, Levine, Model-Agnostic Meta-Learning (ICML 2017), section 5.1, from which the defaults are;
    its networks are ``mlp()``.
    """

    def __init__(
        self,
        *,
        num_shots: int = 10,
        num_query: int = 10,
        amplitude: tuple[float, float] = (0.1, 5.0),
        phase: tuple[float, float] = (0.0, math.pi),
        interval: tuple[float, float] = (-5.0, 5.0),
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        check_integer("num_shots", num_shots, 1)
        check_integer("num_query", num_query, 1)
        super().__init__(seed)
        self.num_shots, self.num_query = num_shots, num_query
        self.amplitude = _interval("amplitude", amplitude)
        self.phase = _interval("phase", phase)
        self.interval = _interval("interval", interval)
        self.device = torch.device(device)

    def __repr__(self) -> str:
        listed = ", ".join(f"{name}={value!r}" for name, value in self._settings().items())
        return f"Sinusoids({listed}, seed={self.seed})"

    def _settings(self) -> dict[str, Any]:
        ranges = {name: list(getattr(self, name)) for name in ("amplitude", "phase", "interval")}
        return {"num_shots": self.num_shots, "num_query": self.num_query, **ranges}

    def _draw(self, random: np.random.Generator, num_tasks: int) -> tuple[Points, Points]:
        draws = random.random((num_tasks, 2 + self.num_shots + self.num_query))
        amplitude, phase, x = np.split(draws, (1, 2), axis=1)
        x = _scaled(x, self.interval)
        y = _scaled(amplitude, self.amplitude) * np.sin(x - _scaled(phase, self.phase))
        points = np.stack([x, y])[..., None].astype(np.float32)  # [2, B, K + Q, 1]
        inputs, targets = on_device(points, self.device)
        shots = self.num_shots
        return (inputs[:, :shots], targets[:, :shots]), (inputs[:, shots:], targets[:, shots:])


def _interval(name: str, ends: tuple[float, float]) -> tuple[float, float]:
    try:
        low, high = (float(end) for end in ends)
    except (TypeError, ValueError):  # no sequence, not two, no numbers
        low = high = math.nan
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise ValueError(f"{name}={ends!r} must be two finite numbers, the smaller first.")
    return low, high


def _scaled(uniform: Any, ends: tuple[float, float]) -> Any:
    return ends[0] + (ends[1] - ends[0]) * uniform
