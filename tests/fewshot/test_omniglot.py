"""Omniglot is read whole and right, from zips and folders alike, or refused with the file's name and a remedy."""

import hashlib
import os
import shutil
import socket
import sys
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from fewshot.class_splits import OMNIGLOT_SIZES, SEED, hash_split
from fewshot.omniglot_files import SPLITS, write_tree, write_zips

import implicitlayer as il
from implicitlayer.fewshot import DatasetError, Omniglot, _omniglot
from implicitlayer.fewshot._dataset import load_splits

needs_data = pytest.mark.skipif(
    not os.environ.get("IMPLICITLAYER_DATA"), reason="real Omniglot: set IMPLICITLAYER_DATA to the folder with its zips"
)


@pytest.fixture(autouse=True)
def _own_cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if "real" not in request.node.name:
        monkeypatch.delenv("IMPLICITLAYER_DATA", raising=False)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "tree")


@pytest.fixture
def zips(tmp_path: Path, tree: Path) -> Path:
    return write_zips(tmp_path / "zips", tree)


def test_zips_and_folders_give_the_same_pictures(tree: Path, zips: Path) -> None:
    from_tree = Omniglot(tree, "train", splits=SPLITS)
    from_zips = Omniglot(zips, "train", splits=SPLITS)
    assert from_tree.class_names == from_zips.class_names == SPLITS["train"]
    assert from_tree.images.shape == (3, 20, 28, 28) and from_tree.images.dtype == torch.uint8
    assert torch.equal(from_tree.images, from_zips.images)


def test_ink_is_high_and_drawings_keep_their_order(tree: Path) -> None:
    images = Omniglot(tree, "test", splits=SPLITS).images[0].float()
    # The stroke of drawer d lies on rows 4 d + 2 … 4 d + 7 of 105, so its centre is row (4 d + 5) * 28 / 105 of 28.
    centre = (images.sum(2) * (torch.arange(28) + 0.5)).sum(1) / images.sum((1, 2))
    torch.testing.assert_close(centre, (4 * torch.arange(20) + 5) * 28 / 105, atol=0.1, rtol=0)
    # 6 x 15 pixels of ink keep their share of the area; Lanczos lobes below paper and above ink are cut off: 10 %.
    torch.testing.assert_close(images.mean((1, 2)) / 255, torch.full((20,), 6 * 15 / 105**2), rtol=0.1, atol=0)


def test_image_size_is_free(tree: Path) -> None:
    assert Omniglot(tree, "test", splits=SPLITS, image_size=105).images.unique().tolist() == [0, 255]
    with pytest.raises(ValueError, match="image_size=0 must be an integer of at least 8"):
        Omniglot(tree, splits=SPLITS, image_size=0)


@pytest.mark.parametrize("layout", ["doubled", "no parts", "omniglot", "python", "one zip, one folder"])
def test_other_layouts_are_found(layout: str, tmp_path: Path, tree: Path, zips: Path) -> None:
    root = tmp_path / "root"
    if layout == "doubled":
        for part in _omniglot.PARTS:
            shutil.copytree(tree / part, root / part / part)
    elif layout == "no parts":
        for part in _omniglot.PARTS:
            shutil.copytree(tree / part, root, dirs_exist_ok=True)
    elif layout == "one zip, one folder":
        shutil.copytree(tree / "images_background", root / "images_background")
        shutil.copy(zips / "images_evaluation.zip", root)
    else:
        shutil.copytree(zips, root / layout)
    expected = Omniglot(tree, splits=SPLITS).images
    assert torch.equal(Omniglot(root, splits=SPLITS).images, expected)


def test_root_comes_before_the_variable_and_the_variable_before_the_cache(
    tmp_path: Path, tree: Path, zips: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"cache/implicitlayer/omniglot.*Omniglot\(download=True\).*IMPLICITLAYER_DATA"
    ):
        Omniglot(splits=SPLITS)
    shutil.copytree(zips, il.fewshot._cache.cache_folder() / "omniglot")
    assert Omniglot(splits=SPLITS).num_classes == 3
    monkeypatch.setenv("IMPLICITLAYER_DATA", str(tree))
    (tree / "images_background/Aa/character01/0001_01.png").unlink()
    with pytest.raises(DatasetError, match=f"{tree}.*Aa/character01 has 19 drawings and must have 20.*Extract"):
        Omniglot(splits=SPLITS)
    assert Omniglot(zips, splits=SPLITS).num_classes == 3


def test_missing_files_are_named_with_a_remedy(tmp_path: Path, zips: Path) -> None:
    with pytest.raises(
        FileNotFoundError,
        match=r"No Omniglot in .*nowhere.*images_background\.zip.*Omniglot\('.*nowhere', download=True\)",
    ):
        Omniglot(tmp_path / "nowhere")
    (zips / "images_evaluation.zip").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 3 classes are not in .*the first is Zz_\(y\)/character01"):
        Omniglot(zips, splits=SPLITS)
    with pytest.raises(FileNotFoundError, match=r"1,09\d of 1,100 classes|1,100 of 1,100 classes"):
        Omniglot(zips)


def test_damaged_archive_is_named(zips: Path) -> None:
    path = zips / "images_background.zip"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        DatasetError, match=r"images_background\.zip is no complete zip archive.*get it again, from http"
    ):
        Omniglot(zips, splits=SPLITS)
    spoiled = bytearray(whole)
    spoiled[60:90] = bytes(30)  # inside the first picture
    path.write_bytes(spoiled)
    with pytest.raises(DatasetError, match=r"images_background\.zip: .*character01/0001_01\.png is damaged"):
        Omniglot(zips, splits=SPLITS)


def test_damaged_and_resized_pictures_are_named(tree: Path) -> None:
    path = tree / "images_background/Aa/character02/0002_07.png"
    whole = path.read_bytes()
    for content in (whole[: len(whole) - 40], b"", b"no picture at all"):
        path.write_bytes(content)
        with pytest.raises(DatasetError, match=r"Aa/character02/0002_07\.png is damaged .*Extract the archive again"):
            Omniglot(tree, splits=SPLITS)
    from PIL import Image

    Image.new("1", (28, 28)).save(path)
    with pytest.raises(DatasetError, match=r"0002_07\.png has 28x28 pixels and must have 105x105"):
        Omniglot(tree, splits=SPLITS)


def test_cache_is_read_again_and_a_changed_source_is_noticed(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Omniglot(tree, splits=SPLITS).images
    decode = _omniglot._decode
    monkeypatch.setattr(_omniglot, "_decode", lambda *_: pytest.fail("decoded although it was cached"))
    cached = Omniglot(tree, splits=SPLITS).images
    assert torch.equal(first, cached)
    cached.zero_()  # a private page: the file does not change
    assert torch.equal(first, Omniglot(tree, splits=SPLITS).images)
    monkeypatch.setattr(_omniglot, "_decode", decode)
    shutil.copy(
        tree / "images_background/Aa/character01/0001_01.png", tree / "images_background/Aa/character01/0001_20.png"
    )
    assert torch.equal(Omniglot(tree, splits=SPLITS).images[0, 19], first[0, 0])


def test_shortened_cache_file_is_made_anew(tree: Path, tmp_path: Path) -> None:
    first = Omniglot(tree, splits=SPLITS, cache_dir=tmp_path / "own").images.clone()
    (file,) = (tmp_path / "own").iterdir()
    for content in (file.read_bytes()[:1000], b""):
        file.write_bytes(content)
        assert torch.equal(Omniglot(tree, splits=SPLITS, cache_dir=tmp_path / "own").images, first)


def test_cache_that_cannot_be_written_is_a_warning_only(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.warns(il.ImplicitLayerWarning, match=r"could not be kept in .*file/below.*cache_dir="):
        assert Omniglot(tree, splits=SPLITS, cache_dir=tmp_path / "file" / "below").num_classes == 3


@dataclass
class Server:
    """The folder it serves over HTTP on this machine, what was asked for, and how many answers are still refused."""

    folder: Path
    asked: list[str]
    refusals: int = 0


@pytest.fixture
def server(zips: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    pytest.importorskip("pooch")
    state = Server(zips, [])

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(state.folder))

        def do_GET(self) -> None:
            state.asked.append(self.path)
            if state.refusals:
                state.refusals -= 1
                self.send_error(503)
            else:
                super().do_GET()

        def log_message(self, *_: Any) -> None:
            pass

    sums = {part: f"md5:{hashlib.md5((zips / f'{part}.zip').read_bytes()).hexdigest()}" for part in _omniglot.PARTS}
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        monkeypatch.setattr(_omniglot, "URL", f"http://127.0.0.1:{http.server_port}/")
        monkeypatch.setattr(_omniglot, "PARTS", sums)
        monkeypatch.setattr("pooch.core.time.sleep", lambda seconds: None)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield state
        http.shutdown()


def test_download_fetches_what_is_missing_and_only_when_asked(
    tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "fetched"
    with pytest.raises(FileNotFoundError):
        Omniglot(root, splits=SPLITS)
    assert not root.exists() and server.asked == []
    expected = Omniglot(server.folder, splits=SPLITS).images
    assert torch.equal(Omniglot(root, splits=SPLITS, download=True).images, expected)
    assert "100%" in capsys.readouterr().err  # the bar
    (root / "images_evaluation.zip").unlink()
    assert torch.equal(Omniglot(root, splits=SPLITS, download=True).images, expected)
    assert server.asked == ["/images_background.zip", "/images_evaluation.zip", "/images_evaluation.zip"]
    assert sorted(path.name for path in root.iterdir()) == ["images_background.zip", "images_evaluation.zip"]


def test_a_download_that_breaks_off_is_tried_again(tmp_path: Path, server: Server) -> None:
    server.refusals = _omniglot.RETRIES
    assert Omniglot(tmp_path / "fetched", splits=SPLITS, download=True).num_classes == 3


def test_failed_download_leaves_nothing_behind_and_says_where_to_put_the_file(tmp_path: Path, server: Server) -> None:
    root = tmp_path / "fetched"
    server.refusals = _omniglot.RETRIES + 1
    with pytest.raises(
        DatasetError, match=r"http.*images_background\.zip could not be downloaded .*503.*put it into .*fetched"
    ):
        Omniglot(root, splits=SPLITS, download=True)
    (server.folder / "images_background.zip").write_bytes(b"<html>not found</html>")
    with pytest.raises(DatasetError, match=r"could not be downloaded .*hash.*images_background\.zip.*put it into"):
        Omniglot(root, splits=SPLITS, download=True)
    assert list(root.iterdir()) == []


def test_an_archive_that_is_there_is_never_replaced(tmp_path: Path, server: Server) -> None:
    root = tmp_path / "fetched"
    root.mkdir()
    with (
        zipfile.ZipFile(server.folder / "images_background.zip") as archive,
        zipfile.ZipFile(root / "images_background.zip", "w", zipfile.ZIP_DEFLATED) as packed_again,
    ):
        for entry in archive.namelist():
            packed_again.writestr(entry, archive.read(entry))
    mine = (root / "images_background.zip").read_bytes()
    assert Omniglot(root, splits=SPLITS, download=True).num_classes == 3
    assert (root / "images_background.zip").read_bytes() == mine and server.asked == ["/images_evaluation.zip"]


def test_without_a_network_the_error_says_where_to_put_the_files(tmp_path: Path, server: Server) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_omniglot, "URL", f"http://127.0.0.1:{closed}/")
        with pytest.raises(DatasetError, match=r"could not be downloaded .*Get it where there is a network and put it"):
            Omniglot(tmp_path / "fetched", splits=SPLITS, download=True)


def test_without_pooch_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(ImportError, match=r"Downloading Omniglot needs pooch.*pip install 'implicitlayer\[fewshot\]'"):
        Omniglot(tmp_path, splits=SPLITS, download=True)


def test_splits_are_checked(tree: Path) -> None:
    with pytest.raises(ValueError, match="split='validation' must be one of 'train', 'val', 'test'"):
        Omniglot(tree, "validation")
    with pytest.raises(ValueError, match="'Aa/character01' is in split 'train' and again in 'test'"):
        Omniglot(tree, splits={"train": ["Aa/character01"], "test": ["Aa/character01"]})
    with pytest.raises(ValueError, match="add up to 3 and must add up to 2"):
        hash_split(["a", "b"], {"train": 3})
    with pytest.raises(ValueError, match="1 repeated entries"):
        hash_split(["a", "a"], {"train": 2})


def test_no_class_is_in_two_stored_splits_and_the_stored_lists_follow_their_rule() -> None:
    stored = load_splits("omniglot")
    names = [name for split in stored.values() for name in split]
    assert len(names) == len(set(names)) == 1623
    assert hash_split(names, OMNIGLOT_SIZES, seed=SEED) == stored
    assert len({name.split("/")[0] for name in names}) == 50


@needs_data
def test_real_omniglot_is_complete_and_right() -> None:
    splits = {split: Omniglot(split=split) for split in ("train", "val", "test")}
    assert [data.num_classes for data in splits.values()] == [1100, 100, 423]
    for data in splits.values():
        images = data.images.float() / 255
        assert (
            images.mean((2, 3)).min() > 0.002 and images.mean((2, 3)).max() < 0.3
        )  # blank: 0; one dot of Braille: 0.0025
    # No drawing of a class in one split is a drawing of another split, byte for byte.
    digests = [{drawing.numpy().tobytes() for drawing in data.images.flatten(0, 1)} for data in splits.values()]
    assert digests[0].isdisjoint(digests[2]) and digests[1].isdisjoint(digests[2]) and digests[0].isdisjoint(digests[1])


def test_archives_are_zip_files_to_the_standard_library(zips: Path) -> None:
    assert all(zipfile.is_zipfile(zips / f"{part}.zip") for part in _omniglot.PARTS)
