"""The cache takes an array part by part, whole or not at all, and does not hide an error of the source."""

import io
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import implicitlayer as il
from implicitlayer.fewshot import _cache
from implicitlayer.fewshot._cache import cached_images

SHAPE = (3, 4, 5)
WHOLE = np.arange(60, dtype=np.uint8).reshape(SHAPE)


def test_parts_are_joined_in_a_file_that_numpy_reads(tmp_path: Path) -> None:
    found = cached_images("name", ["key"], SHAPE, lambda: iter(WHOLE), cache_dir=tmp_path)
    assert isinstance(found, np.memmap) and np.array_equal(found, WHOLE)
    (file,) = tmp_path.iterdir()
    assert np.array_equal(np.load(file), WHOLE)


def test_an_error_of_the_source_is_passed_on_and_leaves_nothing_behind(tmp_path: Path) -> None:
    def parts() -> Iterator[NDArray[np.uint8]]:
        yield WHOLE[0]
        raise FileNotFoundError("picture 1 is gone")  # an OSError, as those of a full disk are

    with pytest.raises(FileNotFoundError, match="picture 1 is gone"):
        cached_images("name", ["key"], SHAPE, parts, cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_is_a_warning_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FullAfterTheFirstPart(io.FileIO):
        parts = 0

        def write(self, data: object) -> int:
            self.parts += len(data) == WHOLE[0].size  # type: ignore[arg-type]
            if self.parts > 1:
                raise OSError(28, "No space left on device")
            return super().write(data)  # type: ignore[arg-type]

    monkeypatch.setattr(_cache.os, "fdopen", FullAfterTheFirstPart)
    with pytest.warns(il.ImplicitLayerWarning, match=r"could not be kept in .*No space left.*cache_dir="):
        found = cached_images("name", ["key"], SHAPE, lambda: WHOLE, cache_dir=tmp_path)
    assert np.array_equal(found, WHOLE)
    assert os.listdir(tmp_path) == []
