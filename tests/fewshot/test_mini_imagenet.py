"""mini-ImageNet is read whole and right from each of its layouts, or refused with the file's name and a remedy."""

import csv
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from fewshot.mini_imagenet_files import SPLITS, colours, write_list, write_sheets, write_tree
from PIL import Image

from implicitlayer.fewshot import DatasetError, EpisodeSampler, MiniImageNet, _mini_imagenet
from implicitlayer.fewshot._dataset import load_splits
from implicitlayer.fewshot._mini_imagenet import SUBFOLDERS

REAL = next(
    (
        folder
        for subfolder in SUBFOLDERS
        if "IMPLICITLAYER_DATA" in os.environ
        and (folder := Path(os.environ["IMPLICITLAYER_DATA"]) / subfolder / "sheets").is_dir()
    ),
    None,
)
needs_data = pytest.mark.skipif(
    REAL is None, reason="real mini-ImageNet: set IMPLICITLAYER_DATA to a folder that has mini_imagenet/sheets"
)


@pytest.fixture(autouse=True)
def _own_cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if "real" not in request.node.name:
        monkeypatch.delenv("IMPLICITLAYER_DATA", raising=False)


def write_stored_tree(root: Path, number: int) -> Path:
    """Folders with the names of the stored validation split, of ``number`` pictures each."""
    for name in load_splits("mini_imagenet")["val"]:
        (root / name).mkdir(parents=True)
        for picture in range(number):
            Image.new("RGB", (8, 8), (picture, 0, 0)).save(root / name / f"{picture:03d}.png")
    return root


def test_stored_split_is_64_16_20_and_no_class_is_in_two() -> None:
    stored = load_splits("mini_imagenet")
    assert {split: len(names) for split, names in stored.items()} == {"train": 64, "val": 16, "test": 20}
    names = [name for split in stored.values() for name in split]
    assert len(set(names)) == 100 and all(len(name) == 9 and name[0] == "n" and name[1:].isdigit() for name in names)


def test_sheets_are_cut_into_their_pictures_and_other_splits_need_not_be_there(tmp_path: Path) -> None:
    root = write_sheets(tmp_path / "root", "train")
    data = MiniImageNet(root, "train", splits=SPLITS)
    assert data.images.shape == (2, 600, 84, 84, 3) and data.class_names == SPLITS["train"]
    for images, name in zip(data.images, SPLITS["train"], strict=True):
        expected = torch.from_numpy(colours(name)).double()
        inner = images[:, 20:64, 20:64].double()
        # Neighbours differ by 8 levels. JPEG at quality 90 quantises the mean of an 8 x 8 block, which is 1/8 of its
        # first coefficient, in steps of 3/8 (light) and 3/8 (colour, which counts up to 1.8 times): 2 levels at most.
        assert (inner - expected[:, None, None]).abs().max() <= 2
    batch = EpisodeSampler(data, num_ways=2, rotations="augment").sample(1)
    assert batch.query_images.shape == (1, 30, 3, 84, 84)
    with pytest.raises(FileNotFoundError, match=r"None of the 1 classes .*root.*meta-learning-lstm.*sheets/<split>"):
        MiniImageNet(root, "test", splits=SPLITS)


@pytest.mark.parametrize("pattern", ["{name}", "{split}/{name}", "images/{name}"])
def test_trees_are_read_in_the_order_of_names(pattern: str, tmp_path: Path) -> None:
    data = MiniImageNet(write_tree(tmp_path / "root", pattern), "train", splits=SPLITS, image_size=12)
    assert data.images.shape == (2, 600, 12, 12, 3)
    for images, name in zip(data.images, SPLITS["train"], strict=True):  # one colour stays itself when it is reduced
        assert torch.equal(images, torch.from_numpy(colours(name))[:, None, None].expand_as(images))


def test_lists_are_read_in_their_own_order(tmp_path: Path) -> None:
    root = write_list(tmp_path / "root")
    (root / "test.csv").unlink()  # what another split would need
    data = MiniImageNet(root, "train", splits=SPLITS, image_size=12)
    for images, name in zip(data.images, SPLITS["train"], strict=True):
        assert torch.equal(images[:, 5, 5], torch.from_numpy(colours(name)).flip(0))
    (root / "images" / "n0000000100000007.png").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"images/n0000000100000007\.png is named in the lists and is not there"
    ):
        MiniImageNet(root, "train", splits=SPLITS, image_size=12)
    (root / "train.csv").write_text("picture;class\n")
    with pytest.raises(DatasetError, match=r"train\.csv must begin with the line filename,label"):
        MiniImageNet(root, "train", splits=SPLITS, image_size=12)


def test_root_comes_before_the_variable_and_the_variable_before_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileNotFoundError, match=r"cache/implicitlayer\. mini-ImageNet may .*IMPLICITLAYER_DATA"):
        MiniImageNet(split="val")
    write_stored_tree(tmp_path / "cache" / "implicitlayer" / "miniimagenet", 1)
    with pytest.raises(
        DatasetError, match=r"implicitlayer/miniimagenet: class n01855672 has 1 pictures and must have 600"
    ):
        MiniImageNet(split="val")
    write_stored_tree(tmp_path / "data" / "mini-imagenet", 2)
    monkeypatch.setenv("IMPLICITLAYER_DATA", str(tmp_path / "data"))
    with pytest.raises(DatasetError, match="data/mini-imagenet: class n01855672 has 2 pictures"):
        MiniImageNet(split="val")
    write_stored_tree(tmp_path / "root" / "mini_imagenet", 3)
    with pytest.raises(DatasetError, match="root/mini_imagenet: class n01855672 has 3 pictures"):
        MiniImageNet(tmp_path / "root", split="val")


def test_missing_classes_are_named(tmp_path: Path) -> None:
    root = write_sheets(tmp_path / "root", "train")
    (root / "sheets/train/n00000001.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 2 classes are not in .*root/sheets, the first is n00000001"):
        MiniImageNet(root, splits=SPLITS)


def test_damaged_and_too_small_pictures_are_named(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "root")
    with pytest.raises(DatasetError, match=r"n0000000200000000\.png holds a picture of 20x16 pixels, less than .*=84"):
        MiniImageNet(root, splits=SPLITS)
    (root / "n00000002" / "n0000000200000005.png").write_bytes(b"no picture")
    with pytest.raises(DatasetError, match=r"n0000000200000005\.png is damaged .*Get it again"):
        MiniImageNet(root, splits=SPLITS, image_size=12)
    assert list((tmp_path / "cache").rglob("*.*")) == []  # neither a part of a file nor a whole one


def test_sheets_with_another_geometry_are_refused(tmp_path: Path) -> None:
    root = write_sheets(tmp_path / "root", "train")
    path = root / "sheets/train/n00000002.jpg"
    whole = path.read_bytes()
    with pytest.raises(DatasetError, match=r"holds a picture of 84x84 pixels, less than image_size=96"):
        MiniImageNet(root, splits=SPLITS, image_size=96)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DatasetError, match=r"n00000002\.jpg is damaged .*Get it again"):
        MiniImageNet(root, splits=SPLITS)
    Image.new("RGB", (1680, 2520)).save(path)
    with pytest.raises(
        DatasetError, match=r"n00000002\.jpg has 1680x2520 pixels and must have 1920x2880: 30 rows of 20"
    ):
        MiniImageNet(root, splits=SPLITS)
    for axis in (0, 1):  # tiles that repeat no edge: the right size, but other pictures in it
        stripes = np.zeros((2880, 1920, 3), dtype=np.uint8)
        np.moveaxis(stripes, axis, 0)[83::96] = 90  # the last line of every picture
        Image.fromarray(stripes).save(path)
        with pytest.raises(
            DatasetError, match=r"n00000002\.jpg: beyond 84x84 the tiles must repeat the edge .*\d+ grey"
        ):
            MiniImageNet(root, splits=SPLITS)


def test_cache_is_read_again_and_a_changed_source_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_tree(tmp_path / "root")
    first = MiniImageNet(root, "test", splits=SPLITS, image_size=12).images
    decode = _mini_imagenet.decode
    monkeypatch.setattr(_mini_imagenet, "decode", lambda *_: pytest.fail("decoded although it was cached"))
    cached = MiniImageNet(root, "test", splits=SPLITS, image_size=12).images
    assert torch.equal(first, cached)
    monkeypatch.setattr(_mini_imagenet, "decode", decode)
    shutil.copy(root / "n00000003/n0000000300000000.png", root / "n00000003/n0000000300000599.png")
    changed = MiniImageNet(root, "test", splits=SPLITS, image_size=12).images
    assert torch.equal(changed[0, 599], first[0, 0]) and not torch.equal(first[0, 599], first[0, 0])


@needs_data
def test_real_mini_imagenet_is_complete_and_right(tmp_path: Path) -> None:
    assert REAL is not None
    data = MiniImageNet(split="val", cache_dir=tmp_path)
    assert data.images.shape == (16, 600, 84, 84, 3)
    for split, names in load_splits("mini_imagenet").items():
        with (REAL.parent / f"{split}.csv").open(newline="") as file:
            assert sorted({row["label"] for row in csv.DictReader(file)}) == names
        assert {sheet.stem for sheet in (REAL / split).iterdir()} == set(names)
    images = data.images.float()
    assert images.std((2, 3, 4)).min() > 2  # no blank picture
    digests = {picture.tobytes() for picture in data.images.flatten(0, 1).numpy()}
    assert len(digests) == 16 * 600  # no picture twice
