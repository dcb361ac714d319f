"""Colour pictures, classes of different sizes, and any labelled dataset as a source of tasks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, TensorDataset

from implicitlayer.fewshot import DatasetError, EpisodeSampler, ImageClasses

Pictures = list[tuple[object, object]]


def coloured(num_classes: int, num_examples: int, counts: list[int] | None = None) -> ImageClasses:
    """Red holds the class and green the example, on the whole picture; blue marks the upper left corner."""
    images = torch.zeros(num_classes, num_examples, 2, 2, 3, dtype=torch.uint8)
    images[..., 0] = torch.arange(num_classes)[:, None, None, None]
    images[..., 1] = torch.arange(num_examples)[:, None, None]
    images[:, :, 0, 0, 2] = 255
    return ImageClasses(images, [f"class {c}" for c in range(num_classes)], counts=counts)


@pytest.mark.parametrize("rotations", ["none", "augment", "classes"])
def test_colour_pictures_keep_their_channels_and_turn_as_a_whole(rotations: str) -> None:
    data = coloured(5, 6)
    assert data.num_channels == 3 and ImageClasses(data.images[..., 0], data.class_names).num_channels == 1
    batch = EpisodeSampler(data, num_ways=3, num_shots=2, num_query=3, rotations=rotations, seed=1).sample(8)
    assert batch.support_images.shape == (8, 6, 3, 2, 2) and batch.query_images.shape == (8, 9, 3, 2, 2)
    assert batch.support_images.dtype == torch.float32 and batch.support_images.is_contiguous()
    for images, labels in ((batch.support_images, batch.support_labels), (batch.query_images, batch.query_labels)):
        levels = (images * 255).round().long()
        assert torch.equal(levels[:, :, 0], batch.classes.gather(1, labels)[..., None, None].expand(-1, -1, 2, 2))
        assert (levels[:, :, 1] == levels[:, :, 1, :1, :1]).all()
        # Counter-clockwise turns bring the upper left corner to the lower left, lower right, upper right.
        corner = torch.tensor([[0, 3], [1, 2]])
        marked = torch.where(levels[:, :, 2] == 255, corner, 0).sum((2, 3))
        assert torch.equal(marked, batch.rotations.gather(1, labels))
    assert bool(batch.rotations.any()) == (rotations != "none")


@given(st.lists(st.integers(3, 7), min_size=4, max_size=6), st.integers(0, 999))
def test_classes_of_different_sizes_give_existing_and_distinct_examples(counts: list[int], seed: int) -> None:
    data = coloured(len(counts), 7, counts)
    assert data.num_examples == min(counts)
    sampler = EpisodeSampler(data, num_ways=3, num_shots=1, num_query=2, rotations="classes", seed=seed)
    batch = sampler.sample(4)
    example = (torch.cat([batch.support_images, batch.query_images], 1)[:, :, 1, 0, 0] * 255).round().long()
    labels = torch.cat([batch.support_labels, batch.query_labels], 1)
    assert (example < torch.tensor(counts)[batch.classes.gather(1, labels)]).all()
    for task, label in zip(example, labels, strict=True):
        assert all(len(task[label == way].unique()) == 3 for way in range(3))
    again = EpisodeSampler(data, num_ways=3, num_shots=1, num_query=2, rotations="classes", seed=seed)
    assert torch.equal(torch.cat([again.sample(1).query_images for _ in range(4)]), batch.query_images)


def test_every_example_of_a_small_and_a_large_class_is_drawn_evenly() -> None:
    data = coloured(2, 6, [6, 3])
    batch = EpisodeSampler(data, num_ways=2, num_shots=1, num_query=1).sample(6000)
    example = (batch.support_images[:, :, 1, 0, 0] * 255).round().long()
    for which, count in ((0, 6), (1, 3)):
        share = example[batch.classes == which].bincount(minlength=6) / 6000
        expected = torch.where(torch.arange(6) < count, 1 / count, 0.0)
        # A share p of 6,000 draws has a standard deviation of at most sqrt(p (1 - p) / 6000) = 0.0061; five of them.
        torch.testing.assert_close(share, expected, atol=0.03, rtol=0)


def test_equal_counts_change_no_task_and_other_counts_are_another_dataset() -> None:
    plain, told, ragged = coloured(4, 5), coloured(4, 5, [5] * 4), coloured(4, 5, [5, 5, 5, 4])
    samplers = [EpisodeSampler(data, num_ways=2, num_query=2) for data in (plain, told, ragged)]
    state = samplers[0].state_dict()
    samplers[1].load_state_dict(state)
    assert torch.equal(samplers[1].sample(3).query_images, samplers[0].sample(3).query_images)
    with pytest.raises(ValueError, match=r"counts: None there.*cannot be continued"):
        samplers[2].load_state_dict(state)
    with pytest.raises(ValueError, match=r"counts: .* there, None here"):
        samplers[0].load_state_dict(samplers[2].state_dict())


def test_too_small_classes_are_named() -> None:
    with pytest.raises(
        ValueError, match=r"must not exceed the 3 examples of a class \('class 1'\).*num_query is 2; or"
    ):
        EpisodeSampler(coloured(3, 6, [6, 3, 5]), num_ways=2, num_shots=1, num_query=3)


@pytest.mark.parametrize("counts", [[3, 3], [3, 0, 1], [3, 4, 1]])
def test_counts_that_do_not_fit_are_refused(counts: list[int]) -> None:
    with pytest.raises(ValueError, match=r"counts=\[3, .*must give each of the 3 classes a number from 1 to 3"):
        coloured(3, 3, counts)


def test_other_numbers_of_channels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 3, 4, 4, 2\) must be uint8 of shape .*, H, W, 3\] for colour"):
        ImageClasses(torch.zeros(2, 3, 4, 4, 2, dtype=torch.uint8), ["a", "b"])


def test_tensor_dataset_is_grouped_by_label() -> None:
    pictures = torch.randint(256, (7, 3, 5, 6), dtype=torch.uint8)
    labels = torch.tensor([30, 4, 30, 4, 30, 11, 30])
    classes = ImageClasses.from_dataset(TensorDataset(pictures, labels), class_names={4: "d", 11: "k", 30: "x"})
    assert type(classes) is ImageClasses and classes.class_names == ["d", "k", "x"]
    assert classes.counts.tolist() == [2, 1, 4] and classes.images.shape == (3, 4, 5, 6, 3)
    assert torch.equal(classes.images[2], pictures[labels == 30].permute(0, 2, 3, 1))
    assert torch.equal(classes.images[0, :2], pictures[labels == 4].permute(0, 2, 3, 1))
    fewer = ImageClasses.from_dataset(TensorDataset(pictures, labels), min_examples=2, split="val")
    assert fewer.class_names == ["4", "30"] and fewer.split == "val"
    batch = EpisodeSampler(fewer, num_ways=2, num_shots=1, num_query=1).sample(2)
    assert batch.query_images.shape == (2, 2, 3, 5, 6)


def test_floating_pictures_keep_their_levels() -> None:
    levels = torch.arange(256).reshape(1, 1, 16, 16)
    for dtype in (torch.float32, torch.float64):
        classes = ImageClasses.from_dataset([(picture, 0) for picture in levels.to(dtype) / 255])
        assert torch.equal(classes.images[0], levels[0].to(torch.uint8))
    half = ImageClasses.from_dataset([(torch.full((2, 2), 0.5, dtype=torch.bfloat16), 0)])
    assert half.images.unique().tolist() == [128]  # 127.5, and halves go to the even number


def test_pillow_pictures_of_any_size_and_mode_become_one_size() -> None:
    red = Image.new("RGB", (40, 30), (200, 10, 0))
    items: Pictures = [(red, "a"), (red.convert("P"), "b"), (red.convert("RGBA").resize((9, 9)), "a")]
    colour = ImageClasses.from_dataset(items, image_size=12)
    assert colour.images.shape == (2, 2, 12, 12, 3) and colour.counts.tolist() == [2, 1]
    assert (colour.images[0] == torch.tensor([200, 10, 0])).all()
    paper = Image.new("1", (10, 10), 1)
    grey = ImageClasses.from_dataset([(paper, np.int64(1)), (Image.new("L", (20, 8), 7), np.array(0))], image_size=8)
    assert grey.images.shape == (2, 1, 8, 8) and grey.images.flatten(1).unique(dim=1).tolist() == [[7], [255]]


def test_names_may_be_a_sequence_and_arrays_are_channels_last() -> None:
    array = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    classes = ImageClasses.from_dataset([(array, 2), [array, 0]], class_names=["zero", "one", "two"])
    assert classes.class_names == ["zero", "two"]
    assert np.array_equal(classes.images[1, 0].numpy(), array)
    assert ImageClasses.from_dataset([(array[:, :, :1], 0)]).images.shape == (1, 1, 4, 5)


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> object:
        return iter(())


SMALL = torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("dataset", "kwargs", "error", "message"),
    [
        (Stream(), {}, TypeError, "dataset of type Stream must have a length and items by number.*into a list"),
        ([SMALL], {}, TypeError, r"dataset\[0\] is a Tensor and must be a pair \(picture, label\)"),
        ([(SMALL, 0), (SMALL, 0.5)], {}, TypeError, r"dataset\[1\] has the label 0\.5 .*an integer or a string"),
        ([(SMALL, torch.zeros(2))], {}, TypeError, r"dataset\[0\] has the label tensor"),
        (
            [(SMALL, 0), (SMALL.T, 0)],
            {},
            ValueError,
            r"dataset\[1\] .*\(4, 3\), those before have \(3, 4\).*image_size=",
        ),
        ([(torch.zeros(2, 3, 4), 0)], {}, ValueError, r"shape \(2, 3, 4\) and must have a tensor \[H, W\], \[1, H"),
        ([(np.zeros((3, 4, 5)), 0)], {}, ValueError, r"shape \(3, 4, 5\) and must have an array \[H, W\]"),
        ([(SMALL[:0], 0)], {}, ValueError, r"shape \(0, 4\) and must have"),
        ([(SMALL - 1, 0)], {}, ValueError, r"float32 with values in \[-1, -1\] and must be uint8, or floating"),
        ([(SMALL + torch.nan, 0)], {}, ValueError, r"values in \[nan, nan\]"),
        ([(SMALL.long(), 0)], {}, ValueError, "a picture of int64"),
        ([(Image.new("I;16", (4, 4)), 0)], {}, ValueError, "a picture of uint16"),
        ([(SMALL, 3)], {"class_names": ["a", "b"]}, ValueError, "class_names has no name for the label 3"),
        ([(SMALL, "c")], {"class_names": ["a", "b"]}, ValueError, "class_names has no name for the label 'c'"),
        ([(SMALL, 3)], {"class_names": {1: "a"}}, ValueError, "class_names has no name for the label 3"),
        ([(SMALL, 3)], {"class_names": {"a", "b"}}, TypeError, "class_names of type set must be a mapping"),
        ([(SMALL, 1), (SMALL, "1"), (SMALL, 2)], {}, ValueError, r"The labels \[1, '1'\] have the name '1' each"),
        (
            [(SMALL, 0), (SMALL, 1)],
            {"class_names": ["a", "a"]},
            ValueError,
            r"The labels \[0, 1\] have the name 'a' each.*class_names without repetition",
        ),
        ([(SMALL, 3)], {"min_examples": 2}, ValueError, "None of the 1 classes in the 1 items .*min_examples=2"),
        ([], {}, ValueError, "None of the 0 classes in the 0 items"),
        ([(SMALL, 3)], {"min_examples": 0}, ValueError, "min_examples=0 must be an integer of at least 1"),
        ([(SMALL, 3)], {"image_size": 4}, ValueError, "image_size=4 must be an integer of at least 8"),
    ],
)
def test_what_is_no_labelled_picture_is_refused_by_number(
    dataset: object, kwargs: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ImageClasses.from_dataset(dataset, **kwargs)


def drawing(mode: str, ink: int, size: int = 8) -> Any:
    """A square of ink in the middle of a transparent picture."""
    image = pytest.importorskip("PIL.Image")
    alpha = np.zeros((size, size), np.uint8)
    alpha[2:6, 2:6] = 255
    layers = [np.where(alpha > 0, ink, 0).astype(np.uint8)] * (1 if mode == "LA" else 3)
    return image.fromarray(np.stack([*layers, alpha], -1), mode)


@pytest.mark.parametrize("mode", ["LA", "RGBA", "PA", "P"])
@pytest.mark.filterwarnings("ignore:.*mode.*:DeprecationWarning")
def test_a_drawing_on_transparent_is_one_on_white_paper(mode: str) -> None:
    picture = drawing("LA" if mode == "LA" else "RGBA", 0)
    if mode in ("P", "PA"):
        palette = pytest.importorskip("PIL.Image").new("P", picture.size, 1)
        palette.putpalette([0, 0, 0, 0, 0, 0])  # ink, and a transparent black
        palette.paste(0, (2, 2, 6, 6))
        palette.info["transparency"] = 1
        picture = palette
    images = ImageClasses.from_dataset([(picture, 0), (picture, 0)]).images[0, 0]
    grey = images.float().mean(-1) if images.ndim == 3 else images.float()
    expected = torch.full((8, 8), 255.0)
    expected[2:6, 2:6] = 0
    assert torch.equal(grey, expected)


@pytest.mark.filterwarnings("ignore:.*mode.*:DeprecationWarning")
def test_a_drawing_that_white_paper_would_hide_is_refused_by_its_number() -> None:
    with pytest.raises(ValueError, match=r"^dataset\[1\] has a picture in white on transparent"):
        ImageClasses.from_dataset([(drawing("RGBA", 0), 0), (drawing("RGBA", 255), 0)])


def test_a_truncated_picture_is_named(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    whole = tmp_path / "whole.png"
    image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)).save(whole)
    cut = tmp_path / "cut.png"
    cut.write_bytes(whole.read_bytes()[:1000])
    with (
        pytest.raises(DatasetError, match=r"^dataset\[1\] \(.*cut\.png\) cannot be read: "),
        image.open(whole) as first,
        image.open(cut) as second,
    ):
        ImageClasses.from_dataset([(first, 0), (second, 0)])

    class Lazy:
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> Any:
            with image.open([whole, cut][index]) as picture:
                return picture.convert("RGB"), 0

    with pytest.raises(DatasetError, match=r"^dataset\[1\].* cannot be read: "):
        ImageClasses.from_dataset(Lazy())
