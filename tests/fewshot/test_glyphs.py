"""Glyphs: enough classes, none blank, none twice, the same each time."""

import json
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from fewshot.class_splits import MAX_SIMILARITY, SEED, class_name, hash_split, select_classes, similarity

from implicitlayer.fewshot import Glyphs, _cache, _glyphs
from implicitlayer.fewshot._dataset import load_splits
from implicitlayer.fewshot._glyphs import codepoint_of, render


@pytest.fixture(scope="module")
def glyphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Glyphs]:
    folder = tmp_path_factory.mktemp("glyphs")
    return {split: Glyphs(split, cache_dir=folder) for split in ("train", "val", "test")}


def test_there_are_more_than_500_classes_of_20(glyphs: dict[str, Glyphs]) -> None:
    assert glyphs["train"].num_classes >= 500 and glyphs["val"].num_classes == 80 and glyphs["test"].num_classes == 150
    for data in glyphs.values():
        assert data.images.shape == (data.num_classes, 20, 28, 28) and data.images.dtype == torch.uint8
        assert data.images.is_contiguous() and len(data.class_names) == data.num_classes == len(data)


def test_no_class_is_in_two_splits_and_the_stored_lists_follow_their_rule(glyphs: dict[str, Glyphs]) -> None:
    stored = load_splits("glyphs")
    assert {split: data.class_names for split, data in glyphs.items()} == stored
    names = [name for split in stored.values() for name in split]
    assert len(names) == len(set(names))
    assert hash_split(names, {split: len(part) for split, part in stored.items()}, seed=SEED) == stored
    # The text beside the lists says what was done.
    text = json.loads(resources.files("implicitlayer.fewshot").joinpath("splits/glyphs.json").read_text())
    assert text["seed"] == SEED and str(MAX_SIMILARITY) in text["rule"]


def test_names_say_script_and_code_point() -> None:
    assert class_name(ord("α")) == "Greek/U+03B1" and chr(codepoint_of("Greek/U+03B1")) == "α"


def test_no_two_classes_look_alike_in_any_quarter_turn() -> None:
    names = [name for split in load_splits("glyphs").values() for name in split]
    # The threshold of the selection; 0.01 more for another version of FreeType.
    assert similarity([codepoint_of(name) for name in names]).max() < MAX_SIMILARITY + 0.01


def test_look_alikes_across_scripts_are_one_class() -> None:
    kept = {chr(codepoint) for codepoint in select_classes()}
    for group in ("AΑА", "OΟОoοо", "BΒВ", "HΗН", "cсC", "ᐁᐃᐅᐊΔ"):  # the last: one triangle, turned
        assert len(kept.intersection(group)) <= 1, group
    assert {"A", "Ж", "ש", "ξ"} <= kept


def test_no_picture_is_blank_full_or_shown_twice(glyphs: dict[str, Glyphs]) -> None:
    seen: set[bytes] = set()
    for data in glyphs.values():
        ink = data.images.float().mean((2, 3)) / 255
        assert ink.min() > 0.008 and ink.max() < 0.6
        assert (data.images.flatten(2).amax(2) > 128).all()
        seen.update(picture.numpy().tobytes() for picture in data.images.flatten(0, 1))
    assert len(seen) == sum(data.num_classes * data.num_examples for data in glyphs.values())


def test_pictures_of_a_class_resemble_each_other_more_than_those_of_others(glyphs: dict[str, Glyphs]) -> None:
    """Raw pixels, one shot, all 80 classes: far above chance (1/80), far below solved: a task, not a lookup."""
    images = glyphs["val"].images.float().flatten(2)
    images = images / images.norm(dim=2, keepdim=True)
    support, query = images[:, 0], images[:, 1:]
    accuracy = ((query @ support.T).argmax(2) == torch.arange(len(images))[:, None]).float().mean().item()
    assert 0.2 < accuracy < 0.95


def test_rendering_is_deterministic_and_each_class_is_independent_of_the_others() -> None:
    codepoints = [ord("A"), ord("ж"), ord("ש")]
    pictures = render(codepoints, 28, 6, seed=3)
    assert np.array_equal(pictures, render(codepoints, 28, 6, seed=3))
    assert np.array_equal(pictures[1:2], render(codepoints[1:2], 28, 6, seed=3))
    assert np.array_equal(pictures[:, :4], render(codepoints, 28, 4, seed=3))
    assert not np.array_equal(pictures, render(codepoints, 28, 6, seed=4))


def test_size_and_number_of_drawers_are_free(tmp_path: Path) -> None:
    data = Glyphs("val", image_size=20, num_examples=3, seed=1, cache_dir=tmp_path)
    assert data.images.shape == (80, 3, 20, 20)
    assert repr(data) == "Glyphs(split='val', num_classes=80, num_examples=3, image_size=20x20)"


def test_bad_arguments_are_refused_with_the_rule(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="split='dev' must be one of 'train', 'val', 'test'"):
        Glyphs("dev")
    with pytest.raises(ValueError, match="num_examples=1 must be an integer of at least 2"):
        Glyphs(num_examples=1)
    with pytest.raises(ValueError, match="seed=-1 must be an integer of at least 0"):
        Glyphs(seed=-1)
    with pytest.raises(ValueError, match="image_size=True must be an integer"):
        Glyphs(image_size=True)


def test_missing_extras_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    def absent(package: str) -> str:
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "version", absent)
    with pytest.raises(ImportError, match=r"needs matplotlib.*pip install 'implicitlayer\[fewshot\]'"):
        Glyphs()


def test_fonts_that_are_not_there_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib

    monkeypatch.setattr(matplotlib, "get_data_path", lambda: str(tmp_path))
    with pytest.raises(
        FileNotFoundError, match=r"DejaVuSans\.ttf is missing: matplotlib is installed without its fonts"
    ):
        _glyphs._font_file("DejaVuSans")


def test_default_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert _cache.cache_folder() == tmp_path / "implicitlayer"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _cache.cache_folder() == tmp_path / ".cache" / "implicitlayer"
