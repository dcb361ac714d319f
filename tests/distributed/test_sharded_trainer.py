"""il.meta.Trainer with theta on several processes: the numbers of one, in checkpoints that any number can read."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import processes
import pytest
import torch.distributed as dist

import implicitlayer as il

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available() or not hasattr(os, "fork"), reason="needs gloo and fork"
)
SCRIPT = str(Path(__file__).with_name("trainer_run.py"))
PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"

# A few steps of Adam on numbers of order 1: sums of gradients in another order differ by a few ulp (1e-15), and the
# root of the second moment that they are divided by is no smaller than 1e-3.
TOLERANCE = 1e-11


def launch(*command: object) -> subprocess.CompletedProcess[str]:
    return processes.launch([str(part) for part in command], timeout=300)  # 20 s of CPU


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Runs of four, two, one and two processes, each of which goes on with what the one before it left."""
    folder = tmp_path_factory.mktemp("trainer")
    found: dict[str, Any] = {}
    for size, stage in ((4, "four"), (2, "two"), (1, "one"), (2, "again")):
        process = launch(SCRIPT, folder, size, stage)
        assert process.returncode == 0, process.stderr
        first, *others = processes.results(folder / stage, size)
        assert all(other == first for other in others)  # every process holds the same, to the last bit
        found |= {f"resumed by {stage}" if name == "resumed" else name: value for name, value in first.items()}
    return found


LAYOUTS = ["parts, iMAML", "parts, MAML", "one leaf in parts, MAML", "copies, MAML", "tasks x parts, MAML"]
LAYOUTS += ["parts x tasks, MAML", "a mesh of two of four, MAML"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_with_theta_on_several_processes_goes_through_the_numbers_of_one(
    found: dict[str, Any], layout: str
) -> None:
    assert found[layout] < TOLERANCE


@pytest.mark.parametrize("setting", ["clipped", "memory budget", "momentum"])
def test_settings_of_the_trainer_and_its_best_state_are_those_of_one_process(
    found: dict[str, Any], setting: str
) -> None:
    assert found[setting] < TOLERANCE


@pytest.mark.parametrize(("stage", "step"), [("two", 2), ("one", 4), ("again", 6)])
def test_another_number_of_processes_reads_theta_and_optimizer_to_the_bit(
    found: dict[str, Any], stage: str, step: int
) -> None:
    assert found[f"resumed by {stage}"] == f"step {step}, the same bits"


def test_a_run_of_changing_numbers_of_processes_ends_at_the_numbers_of_one(found: dict[str, Any]) -> None:
    assert found["after four, two, one and two processes"] < TOLERANCE


def test_the_same_number_of_processes_goes_on_bit_for_bit(found: dict[str, Any]) -> None:
    assert found["a stop in between"] == "the same bits"


def test_a_kill_at_any_moment_of_a_save_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    process = launch(SCRIPT, tmp_path, 1, "kills")
    assert process.returncode == 0, process.stderr
    counts = json.loads(process.stdout.splitlines()[-1])
    assert counts["before"] > 5 and counts["after"] > 5  # while parts and file are written; while old parts are removed
    folders = {path.name for path in (tmp_path / "0").iterdir() if path.is_dir()}
    assert len(folders) == 1  # nothing was written by the first kill


def test_a_killed_process_ends_the_others_with_the_last_checkpoint_and_the_command(tmp_path: Path) -> None:
    process = processes.torchrun(2, [SCRIPT, str(tmp_path), "2", "killed"], timeout=300)
    assert process.returncode != 0
    path = tmp_path / "killed" / "checkpoint.pt"
    for words in ("A worker was lost", "The last finished step is 5.", f"{path} holds step 4", "--nproc-per-node 2"):
        assert words in process.stderr, process.stderr
    assert il.meta.load_checkpoint(path)["step"] == 4


def test_a_damaged_or_missing_part_of_a_checkpoint_is_told(found: dict[str, Any]) -> None:
    for name in ("a flipped bit", "a missing file", "a missing folder"):
        error, words = "CheckpointError: ", "is not what the checkpoint beside it says"
        assert found[name].startswith(error) and words in found[name]


def test_theta_on_two_meshes_is_refused(found: dict[str, Any]) -> None:
    error, words = "ValueError: theta['w'] lies on ", "must be Shard or Replicate on one mesh"
    assert found["another mesh"].startswith(error) and words in found["another mesh"]


@pytest.mark.parametrize("size", [1, 4])
def test_the_program_of_the_page_runs_under_torchrun(tmp_path: Path, size: int) -> None:
    section = PAGE.read_text(encoding="utf-8").split("## Training")[1]
    program = section.split("```py\n")[1].split("```")[0].replace('"sharded-run"', repr(str(tmp_path / "run")))
    (tmp_path / "sharded_meta.py").write_text(program)
    process = processes.torchrun(size, [str(tmp_path / "sharded_meta.py")], timeout=300)
    assert process.returncode == 0, process.stderr
    assert il.meta.load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 20


def test_the_page_lists_the_layouts_that_were_run(found: dict[str, Any]) -> None:
    section = PAGE.read_text(encoding="utf-8").split("## Training")[1].split("\n## ")[0]
    rows = [line.split("|")[1].strip(" `") for line in section.splitlines() if line.startswith("| `")]
    assert set(rows) == {name for name, value in found.items() if isinstance(value, float)}
