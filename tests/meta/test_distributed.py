"""Several processes on one meta-step: the numbers of one process, and a clear end when a worker is lost."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import torch.distributed as dist
from meta.lines import Lines, comparable, make_trainer, tensors
from processes import free_port, results

import implicitlayer as il
from implicitlayer.meta._distributed import launch_command
from implicitlayer.meta._settings import fingerprint

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available() or not hasattr(os, "fork"), reason="needs gloo and fork"
)
SCRIPT = Path(__file__).with_name("parallel_run.py")
COMMON: dict[str, Any] = {"max_steps": 10, "tasks_per_step": 5, "num_validations": 5, "report_steps": 4}

# Gradients are sums over tasks in another order, a few ulp (1e-15) apart. Ten steps of Adam divide by the root of the
# second moment, which is no smaller than 1e-2 here, so the parameters agree to 1e-12.
TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}


def launch(how: list[str], folder: Path, *scenarios: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    return processes.launch([*how, str(folder), *(json.dumps(scenario) for scenario in scenarios)])


def torchrun(num_processes: int, folder: Path, *scenarios: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    agent = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    return launch([*agent, str(SCRIPT)], folder, *scenarios)


def fork(num_processes: int, folder: Path, *scenarios: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    return launch([str(SCRIPT), "--fork", str(num_processes)], folder, *scenarios)


def alone(**settings: Any) -> il.meta.Trainer:
    """The same run in this process."""
    trainer = make_trainer(None, **(COMMON | settings))
    trainer.fit()
    return trainer


def assert_same_run(result: dict[str, Any], reference: il.meta.Trainer) -> None:
    learned = torch.tensor(result["learned"], dtype=torch.float64)
    torch.testing.assert_close(learned, tensors(reference), **TOLERANCE)
    assert len(result["history"]) == len(reference.history)
    for record, wanted in zip(result["history"], comparable(reference.history), strict=True):
        assert record.keys() == wanted.keys()
        for name, value in wanted.items():
            # the residual of a solve that is exact to rounding is rounding; float32 numbers of the validation
            tolerance = {"cg_residual": 1e-12, "validation": 1e-6, "validation_interval": 1e-6}.get(name, 0.0)
            assert record[name] == pytest.approx(value, rel=1e-11, abs=tolerance), name
    test = reference.evaluate([Lines(3).sample(7), Lines(4).sample(1)])
    torch.testing.assert_close(torch.tensor(result["test"]), test.values)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """One start of torchrun: a run to the end, then one whose second process is killed in step 8."""
    folder = tmp_path_factory.mktemp("two")
    whole = COMMON | {"run": "whole", "tasks_per_chunk": 2, "checkpoint_steps": 3}
    killed = COMMON | {"run": "killed", "die": 7, "checkpoint_steps": 100, "timeout": 30}
    return folder, torchrun(2, folder, whole, killed)


def test_two_processes_under_torchrun_go_through_the_numbers_of_one(two_processes: Any) -> None:
    folder, process = two_processes
    found = results(folder / "whole", 2)
    assert found[0] == found[1], process.stderr  # every process holds the same, to the last bit
    assert_same_run(found[0], alone())
    files = sorted(path.name for path in (folder / "whole").iterdir())
    assert files == ["0.json", "1.json", "best.pt", "checkpoint.pt", "metrics.jsonl"]  # written by one process only


def test_a_killed_worker_ends_the_run_with_a_message_and_a_checkpoint(two_processes: Any, tmp_path: Path) -> None:
    folder, process = two_processes
    assert process.returncode != 0
    path = folder / "killed" / "checkpoint.pt"
    for words in ("A worker was lost", "The last finished step is 7.", f"{path} holds step 7", "--nproc-per-node 2"):
        assert words in process.stderr
    assert not (folder / "killed" / "0.json").exists()
    shutil.copytree(folder / "killed", tmp_path / "run")
    resumed = make_trainer(tmp_path / "run", **COMMON)
    assert resumed.resume() and resumed.step == 7
    resumed.fit()
    reference = alone()
    torch.testing.assert_close(tensors(resumed), tensors(reference), **TOLERANCE)
    assert len(resumed.history) == len(reference.history)
    # one more batch from both: the sampler stands where it would have
    assert fingerprint(resumed.sampler.sample(2)) == fingerprint(reference.sampler.sample(2))


FEW = COMMON | {"tasks_per_step": 3}  # on four processes: one of them has nothing to differentiate


@pytest.fixture(scope="module")
def four_processes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Runs one after the other in the same four processes."""
    folder = tmp_path_factory.mktemp("four")
    (folder / "damaged").mkdir()
    (folder / "damaged" / "checkpoint.pt").write_bytes(b"no checkpoint")
    scenarios = [
        FEW | {"run": "few"},
        COMMON | {"run": "budget", "memory_budget": 2**30},
        FEW | {"run": "stopped", "stop": 4, "out": "before"},
        FEW | {"run": "stopped"},
        COMMON | {"run": "other", "seed": 5},
        COMMON | {"run": "damaged"},
        COMMON | {"run": "stalled", "stall": 3, "timeout": 8, "checkpoint_steps": 100},
    ]
    return folder, fork(4, folder, *scenarios)


@pytest.mark.parametrize(("run", "num_tasks"), [("few", 3), ("budget", 5)])
def test_four_processes_go_through_the_numbers_of_one(four_processes: Any, run: str, num_tasks: int) -> None:
    folder, process = four_processes
    found = results(folder / run, 4)
    assert all(result == found[0] for result in found), process.stderr
    assert_same_run(found[0], alone(tasks_per_step=num_tasks))


def test_a_request_to_stop_one_process_stops_all_after_the_same_step(four_processes: Any) -> None:
    folder, _ = four_processes
    for rank in range(4):
        before = json.loads((folder / "stopped" / f"before-{rank}.json").read_text())
        assert before["outcome"].startswith("KeyboardInterrupt: stopped after step 5")
    found = results(folder / "stopped", 4)
    assert found[0]["resumed"] and all(result == found[0] for result in found)
    assert_same_run(found[0], alone(tasks_per_step=3))


def test_processes_with_other_tasks_refuse_to_start(four_processes: Any) -> None:
    folder, _ = four_processes
    for result in results(folder / "other", 4):
        assert "sampler of process 1 is not that of process 0" in result["outcome"] and result["step"] == 0


def test_a_damaged_checkpoint_ends_every_process(four_processes: Any) -> None:
    folder, _ = four_processes
    first, *others = [result["outcome"] for result in results(folder / "damaged", 4)]
    assert first.startswith("CheckpointError") and "cannot be read as a checkpoint" in first
    assert all(other.startswith("WorkerLostError: The first process failed") for other in others)


def test_a_worker_that_does_not_answer_in_time_is_lost(four_processes: Any, tmp_path: Path) -> None:
    folder, process = four_processes
    assert process.returncode != 0
    assert "Timed out waiting 8000ms" in process.stderr and "The last finished step is 3." in process.stderr
    shutil.copytree(folder / "stalled", tmp_path / "run")
    resumed = make_trainer(tmp_path / "run", **COMMON)
    assert resumed.resume() and resumed.step == 3
    resumed.fit()
    torch.testing.assert_close(tensors(resumed), tensors(alone()), **TOLERANCE)


class Fragile(il.meta.WorkerGroup):
    """Two processes of which the other one has no tasks, and is lost at a given message."""

    def __init__(self, lost_at: int) -> None:
        super().__init__(0, 2)
        object.__setattr__(self, "left", [lost_at])

    def share(self, num_tasks: int) -> slice:
        return slice(0, num_tasks)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        self.left[0] -= 1  # type: ignore[attr-defined]
        if self.left[0] < 0:  # type: ignore[attr-defined]
            raise il.meta.WorkerLostError("A worker was lost.")
        return values.clone()

    def sum_small(self, values: torch.Tensor) -> torch.Tensor:
        return self.sum(values)

    def require_same(self, values: Any) -> None:
        self.sum(torch.zeros(1))


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.LBFGS])
def test_whatever_message_is_the_last_the_checkpoint_holds_a_finished_step(optimizer: Any, tmp_path: Path) -> None:
    settings = COMMON | {"max_steps": 2, "num_validations": 2, "optimizer": optimizer}
    settings |= {"learning_rate": None, "checkpoint_steps": 100}
    reference = make_trainer(None, **settings)
    reference.fit()
    lost_steps = set()
    for lost_at in range(2, 60):  # the first two are those of the start
        trainer = make_trainer(tmp_path / str(lost_at), **settings)
        trainer._group = Fragile(lost_at)
        try:
            trainer.fit()
            break
        except il.meta.WorkerLostError as error:
            message = str(error)
        assert f"holds step {trainer.step}." in message
        lost_steps.add(trainer.step)
        resumed = make_trainer(tmp_path / str(lost_at), **settings)
        assert resumed.resume()
        resumed.fit()
        assert torch.equal(tensors(resumed), tensors(reference))
        assert comparable(resumed.history) == comparable(reference.history)
    else:
        pytest.fail("the run has more messages than were tried")
    assert lost_steps == {0, 1, 2}


def test_a_worker_lost_at_the_start_costs_no_other_run_its_checkpoint(tmp_path: Path) -> None:
    make_trainer(tmp_path, max_steps=2).fit()
    before = (tmp_path / "checkpoint.pt").read_bytes()
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer._group = Fragile(0)
    with pytest.raises(il.meta.WorkerLostError, match="Nothing was saved: no step was begun"):
        trainer.fit()
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    nowhere = make_trainer(None, max_steps=2)
    nowhere._group = Fragile(4)
    with pytest.raises(il.meta.WorkerLostError, match="Nothing was saved: run_dir=None"):
        nowhere.fit()


def test_shares_are_contiguous_and_cover_all_tasks_once() -> None:
    for size in (1, 2, 3, 7):
        for num_tasks in (0, 1, 5, 16):
            parts = [list(range(num_tasks))[il.meta.WorkerGroup(rank, size).share(num_tasks)] for rank in range(size)]
            assert [task for part in parts for task in part] == list(range(num_tasks))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_without_torchrun_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with il.meta.distributed(device="cpu") as group:
        assert (group.rank, group.size, group.device) == (0, 1, torch.device("cpu")) and group.is_first
        assert not dist.is_initialized()
        assert group.sum_numbers([1.5, 2.0]) == [1.5, 2.0]
        assert group.from_first(lambda: {"a": 1}) == {"a": 1} and group.from_first(lambda: None) is None
        group.require_same({"theta": torch.zeros(1)})


def test_a_group_of_one_process_is_made_used_and_taken_down(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    with il.meta.distributed(device="cpu", timeout=20) as group:
        assert dist.is_initialized() and group.size == 1
        with pytest.raises(RuntimeError, match="A process group exists already"), il.meta.distributed(device="cpu"):
            pass
    assert not dist.is_initialized()


def test_what_distributed_cannot_do_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="timeout=0 must be a positive number"), il.meta.distributed(timeout=0):
        pass
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device='cuda' needs a CUDA device"), il.meta.distributed(device="cuda"):
        pass
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="Process 2 of this machine has no GPU of its own: there are 2"):
        il.meta.distributed(device="cuda").__enter__()
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.delenv("RANK", raising=False)
    with il.meta.distributed(device="cuda") as group:
        assert group.device == torch.device("cuda", 1)


def test_a_worker_that_never_comes_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    match = r"Process 0 of 2 could not join the others within 0\.5 seconds"
    with pytest.raises(il.meta.WorkerLostError, match=match):
        il.meta.distributed(device="cpu", timeout=0.5).__enter__()


def test_the_command_to_go_on_with_is_that_of_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--name", "two words"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert launch_command() == "python train.py --name 'two words'"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert launch_command() == "torchrun --nproc-per-node 4 train.py --name 'two words'"
