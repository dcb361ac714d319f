"""Episodes: disjoint support and query, right labels, one stream of tasks whatever the batches."""

import io
import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from implicitlayer.fewshot import EpisodeBatch, EpisodeSampler, ImageClasses, Sinusoids


def coded(num_classes: int, num_examples: int, side: int = 3) -> ImageClasses:
    """Pictures that say what they are: two corners hold class and example, their place tells the rotation."""
    images = torch.zeros(num_classes, num_examples, side, side, dtype=torch.uint8)
    images[:, :, 0, 0] = 100 + torch.arange(num_classes)[:, None]
    images[:, :, 1, 1] = 100 + torch.arange(num_examples)
    return ImageClasses(images, [f"class {c}" for c in range(num_classes)])


def decode(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(class, example, quarter turns counter-clockwise) of float pictures [..., 1, 3, 3] made by `coded`."""
    grey = (images * 255).round().long().squeeze(-3)
    # Turning counter-clockwise brings the upper left corner to the lower left, lower right, upper right.
    corners = torch.stack([grey[..., 0, 0], grey[..., 2, 0], grey[..., 2, 2], grey[..., 0, 2]], -1)
    value, turns = corners.max(-1)
    return value - 100, grey[..., 1, 1] - 100, turns


def all_of(batch: EpisodeBatch) -> list[Tensor]:
    return [
        batch.support_images,
        batch.support_labels,
        batch.query_images,
        batch.query_labels,
        batch.classes,
        batch.rotations,
    ]


def equal(a: EpisodeBatch, b: EpisodeBatch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(all_of(a), all_of(b), strict=True))


settings = st.fixed_dictionaries(
    {
        "num_ways": st.integers(2, 6),
        "num_shots": st.integers(1, 3),
        "num_query": st.integers(1, 4),
        "rotations": st.sampled_from(["none", "augment", "classes"]),
        "seed": st.integers(0, 2**32),
    }
)


@given(settings, st.integers(1, 5))
def test_every_episode_is_what_its_labels_say(kwargs: dict, num_tasks: int) -> None:
    ways, shots, query = kwargs["num_ways"], kwargs["num_shots"], kwargs["num_query"]
    batch = EpisodeSampler(coded(7, 7), **kwargs).sample(num_tasks)
    assert batch.support_images.shape == (num_tasks, ways * shots, 1, 3, 3)
    assert batch.query_images.shape == (num_tasks, ways * query, 1, 3, 3)
    assert batch.support_images.dtype == batch.query_images.dtype == torch.float32
    assert batch.support_labels.dtype == batch.query_labels.dtype == torch.int64
    examples = []
    for images, labels, count in (
        (batch.support_images, batch.support_labels, shots),
        (batch.query_images, batch.query_labels, query),
    ):
        which, example, turns = decode(images)
        assert torch.equal(which, batch.classes.gather(1, labels))
        assert torch.equal(turns, batch.rotations.gather(1, labels))
        assert all(task.bincount(minlength=ways).tolist() == [count] * ways for task in labels)
        examples.append(example.view(num_tasks, ways, count))
    for task in torch.cat(examples, 2).flatten(0, 1):  # support and query share no example
        assert len(task.unique()) == shots + query
    identity = 4 * batch.classes + (batch.rotations if kwargs["rotations"] == "classes" else 0)
    assert all(len(task.unique()) == ways for task in identity)
    if kwargs["rotations"] == "none":
        assert not batch.rotations.any()


@given(settings, st.integers(1, 4), st.integers(1, 4))
def test_tasks_do_not_depend_on_how_they_are_batched(kwargs: dict, first: int, second: int) -> None:
    data = coded(7, 7)
    whole = EpisodeSampler(data, **kwargs).sample(first + second)
    parts = EpisodeSampler(data, **kwargs)
    assert equal(parts.sample(first), whole[:first]) and equal(parts.sample(second), whole[first:])
    fixed = list(parts.fixed(first + second, batch_size=2))
    joined = EpisodeBatch(*(torch.cat(x) for x in zip(*map(all_of, fixed), strict=True)))
    assert equal(joined, whole)


@given(settings, st.integers(0, 3))
def test_resuming_gives_the_same_following_tasks(kwargs: dict, before: int) -> None:
    data = coded(7, 7)
    sampler = EpisodeSampler(data, **kwargs)
    for _ in range(before):
        sampler.sample(3)
    file = io.BytesIO()
    torch.save(sampler.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert json.loads(json.dumps(state)) == state
    expected = sampler.sample(4)
    other = EpisodeSampler(data, **{**kwargs, "seed": 99})
    other.sample(1)
    other.load_state_dict(state)
    assert equal(other.sample(4), expected)


def test_saved_state_does_not_move_with_the_sampler() -> None:
    sampler = EpisodeSampler(coded(6, 6), num_query=2)
    state = sampler.state_dict()
    first = sampler.sample(2)
    sampler.load_state_dict(state)
    assert equal(sampler.sample(2), first)


def test_state_of_another_sampler_is_refused_by_name() -> None:
    state = EpisodeSampler(coded(6, 6), num_ways=3, num_query=2).state_dict()
    with pytest.raises(ValueError, match=r"num_ways: 3 there, 4 here.*cannot be continued"):
        EpisodeSampler(coded(6, 6), num_ways=4, num_query=2).load_state_dict(state)
    with pytest.raises(ValueError, match="class_names"):
        EpisodeSampler(coded(7, 6), num_ways=3, num_query=2).load_state_dict(state)


def test_fixed_episodes_leave_the_stream_where_it_is() -> None:
    sampler, untouched = (EpisodeSampler(coded(6, 6), num_query=2, seed=5) for _ in range(2))
    sampler.sample(3), untouched.sample(3)
    assert [len(batch) for batch in sampler.fixed(7, batch_size=3)] == [3, 3, 1]
    assert equal(sampler.sample(2), untouched.sample(2))


def test_global_generators_are_neither_read_nor_changed() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002 - the global state is the subject
    first = EpisodeSampler(coded(6, 6), num_query=2).sample(2)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    torch.manual_seed(123)
    assert equal(EpisodeSampler(coded(6, 6), num_query=2).sample(2), first)


def test_classes_examples_and_rotations_are_drawn_evenly() -> None:
    sampler = EpisodeSampler(coded(6, 4), num_ways=3, num_shots=1, num_query=1, rotations="augment")
    batch = sampler.sample(8000)
    _, example, turns = decode(batch.support_images)
    # 24,000 draws: a share p has a standard deviation of at most sqrt(p (1 - p) / 24,000) = 0.0028; five of them.
    for values, count in ((batch.classes, 6), (example, 4), (turns, 4)):
        share = values.flatten().bincount(minlength=count) / values.numel()
        torch.testing.assert_close(share, torch.full((count,), 1 / count), atol=0.014, rtol=0)
    # A class is as likely to be label 0 as any other label.
    share = batch.classes[:, 0].bincount(minlength=6) / 8000
    torch.testing.assert_close(share, torch.full((6,), 1 / 6), atol=0.021, rtol=0)


def test_to_and_slices_keep_every_field() -> None:
    batch = EpisodeSampler(coded(6, 6), num_query=2).sample(4)
    assert equal(batch.to("cpu"), batch)
    assert batch.to("meta").query_labels.device.type == "meta"
    assert len(batch[1:3]) == 2 and equal(batch[1:3], batch[1:3])
    with pytest.raises(TypeError, match=r"must be a slice; for one task write batch\[i : i \+ 1\]"):
        batch[0]  # type: ignore[index]


def test_only_copies_towards_a_device_may_run_ahead() -> None:
    # A copy from a GPU to the host that does not block may be read before it has arrived.
    asked = []

    class Recorded(Tensor):
        def to(self, device: object, *, non_blocking: bool) -> Tensor:  # type: ignore[override]
            asked.append((str(device), non_blocking))
            return self

    batch = EpisodeBatch(*[torch.zeros(1).as_subclass(Recorded)] * 6)
    batch.to("cpu"), batch.to("cuda:1"), batch.to(torch.device("cpu"))
    assert asked == [("cpu", False)] * 6 + [("cuda:1", True)] * 6 + [("cpu", False)] * 6


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_ways": 7}, "num_ways=7 must not exceed the 6 classes"),
        ({"num_ways": 1}, "num_ways=1 must be an integer of at least 2"),
        ({"num_shots": 0}, "num_shots=0 must be an integer of at least 1"),
        ({"num_query": 2.0}, r"num_query=2\.0 must be an integer"),
        ({"num_shots": 3, "num_query": 4}, "num_shots=3 plus num_query=4 must not exceed the 6 .*most .* is 3"),
        ({"rotations": "all"}, "rotations='all' must be one of 'none', 'augment', 'classes'"),
        ({"seed": -1}, "seed=-1 must be an integer of at least 0"),
    ],
)
def test_bad_arguments_are_refused_with_the_rule(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EpisodeSampler(coded(6, 6), **{"num_query": 2, **kwargs})


def test_more_arguments_are_refused_with_the_rule() -> None:
    with pytest.raises(ValueError, match="num_tasks=0 must be an integer of at least 1"):
        EpisodeSampler(coded(6, 6), num_query=2).sample(0)
    oblong = ImageClasses(torch.zeros(6, 6, 4, 5, dtype=torch.uint8), list("abcdef"))
    with pytest.raises(ValueError, match="rotations='augment' needs square pictures, these are 4x5"):
        EpisodeSampler(oblong, num_query=2, rotations="augment")
    assert EpisodeSampler(oblong, num_query=2).sample(1).query_images.shape[-2:] == (4, 5)
    with pytest.raises(ValueError, match="must be uint8 of shape"):
        ImageClasses(torch.zeros(2, 2, 3, 3), ["a", "b"])
    with pytest.raises(ValueError, match="class_names has 2 entries, 1 of them distinct"):
        ImageClasses(torch.zeros(2, 2, 3, 3, dtype=torch.uint8), ["a", "a"])


class Tasks(torch.utils.data.IterableDataset[Any]):
    """Four tasks for each worker."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def __iter__(self) -> Any:
        return (self.sampler.sample(1)[1][0] for _ in range(4))


def drawn(num_workers: int, seed: int, sampler_seed: int = 0, epochs: int = 1) -> list[list[float]]:
    generator = torch.Generator().manual_seed(seed)
    loader = torch.utils.data.DataLoader(
        Tasks(Sinusoids(num_query=1, seed=sampler_seed)), batch_size=None, num_workers=num_workers, generator=generator
    )
    return [[float(x) for x in loader] for _ in range(epochs)]


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # on a machine with one core
def test_workers_of_a_loader_draw_different_tasks_and_the_same_again_from_the_same_seeds() -> None:
    first, second = drawn(2, seed=3, epochs=2)
    assert len(set(first + second)) == 16  # of two workers and two epochs
    assert drawn(2, seed=3, epochs=2) == [first, second]
    assert not set(first) & set(drawn(2, seed=4)[0]) and not set(first) & set(drawn(2, seed=3, sampler_seed=1)[0])


def test_without_workers_the_tasks_are_those_of_the_sampler() -> None:
    sampler = Sinusoids(num_query=1)
    assert drawn(0, seed=3) == [[float(sampler.sample(1)[1][0]) for _ in range(4)]]
