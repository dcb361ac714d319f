"""What a run leaves in its folder, and what is refused when it is read again."""

import errno
import fcntl
import json
import os
import random
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from meta.lines import Lines, comparable, make_trainer, task_loss, tensors

import implicitlayer as il
from implicitlayer.meta import _monitor
from implicitlayer.meta._settings import differences, plain
from implicitlayer.meta._trainer_state import random_state, set_random_state


def noisy_sampler(trainer: il.meta.Trainer) -> None:
    """Make the tasks depend on all the global generators."""
    sample = trainer.sampler.sample

    def with_noise(num_tasks: int) -> Any:
        (x, y), query = sample(num_tasks)
        noise = torch.rand(()).double() + random.random() + np.random.rand()  # noqa: NPY002 - it is what is tested
        return (x, y + 0.1 * noise), query

    trainer.sampler.sample = with_noise  # type: ignore[method-assign]


def test_all_global_generators_are_resumed(tmp_path: Path) -> None:
    runs = []
    for stop_at in (None, 0.5):
        trainer = make_trainer(tmp_path / str(stop_at), max_steps=6)
        noisy_sampler(trainer)
        torch.manual_seed(1), random.seed(2), np.random.seed(3)  # noqa: NPY002
        random.gauss(0.0, 1.0), np.random.randn()  # noqa: NPY002 - each keeps half of a pair of normal numbers
        if stop_at is not None:
            trainer.fit(until=stop_at)
            trainer = make_trainer(tmp_path / str(stop_at), max_steps=6)
            noisy_sampler(trainer)
            torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002
            assert trainer.resume()
        trainer.fit()
        runs.append((comparable(trainer.history), tensors(trainer).tolist(), random.gauss(0.0, 1.0), np.random.randn()))  # noqa: NPY002
    assert runs[0] == runs[1]


def test_the_random_state_is_plain_data(tmp_path: Path) -> None:
    il.meta.save_checkpoint(tmp_path / "state.pt", random_state())
    drawn = [float(torch.rand(())), random.random(), float(np.random.rand())]  # noqa: NPY002
    set_random_state(il.meta.load_checkpoint(tmp_path / "state.pt"))
    assert drawn == [float(torch.rand(())), random.random(), float(np.random.rand())]  # noqa: NPY002


def test_the_gpu_generator_is_kept_where_a_gpu_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = torch.arange(16, dtype=torch.uint8)
    restored = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: kept)
    monkeypatch.setattr(torch.cuda, "set_rng_state", restored.append)
    set_random_state(random_state())
    assert len(restored) == 1 and torch.equal(restored[0], kept)


def test_best_holds_the_state_with_the_best_validation(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=10, num_validations=10)
    seen: dict[int, torch.Tensor] = {}
    validate = trainer._validate

    def remember() -> None:
        validate()
        seen[trainer.step] = tensors(trainer).clone()

    trainer._validate = remember  # type: ignore[method-assign]
    history = trainer.fit()
    values = [record["validation"] for record in history]
    best = values.index(max(values))
    assert best < 9  # the last state is another one
    assert trainer.load_best() == {
        "step": best + 1,
        "validation": values[best],
        "interval": history[best]["validation_interval"],
    }
    assert torch.equal(tensors(trainer), seen[best + 1])
    assert trainer.evaluate(trainer.validation).mean == values[best]
    with pytest.raises(RuntimeError, match=r"\(load_best\)\. Call resume\(\) before fit\(\)"):
        trainer.fit()
    with pytest.raises(RuntimeError, match="saved together they are no state of this run"):
        trainer.save()
    assert trainer.resume() and torch.equal(tensors(trainer), seen[10])
    trainer.save()


def test_lower_is_better_where_it_is_said(tmp_path: Path) -> None:
    def distance(params: dict[str, torch.Tensor], batch: Any) -> torch.Tensor:
        return (params["w"].unsqueeze(-1) * batch[0] + params["b"].unsqueeze(-1) - batch[1]).square().mean(-1)

    trainer = make_trainer(tmp_path, max_steps=10, num_validations=5, metric=distance, better="lower")
    values = [record["validation"] for record in trainer.fit() if "validation" in record]
    assert trainer.load_best()["validation"] == min(values) < max(values)


def test_a_validation_that_is_not_a_number_is_never_the_best(tmp_path: Path) -> None:
    def nothing(params: dict[str, torch.Tensor], batch: Any) -> torch.Tensor:
        return torch.full_like(params["w"], torch.nan)

    trainer = make_trainer(tmp_path, max_steps=2, num_validations=2, metric=nothing)
    trainer.fit()
    assert trainer.best is None and not (tmp_path / "best.pt").exists()
    with pytest.raises(FileNotFoundError, match="no best state is kept there"):
        trainer.load_best()


def test_a_validation_that_was_due_is_made_after_a_resume(tmp_path: Path) -> None:
    straight = make_trainer(None, max_steps=6, num_validations=3)
    straight.fit()
    killed = make_trainer(tmp_path, max_steps=6, num_validations=3)
    killed.fit(until=1 / 6)
    killed._train_step()
    killed.save()  # between the step and its validation
    resumed = make_trainer(tmp_path, max_steps=6, num_validations=3)
    resumed.resume()
    resumed.fit()
    assert comparable(resumed.history) == comparable(straight.history)


def test_a_checkpoint_of_other_settings_is_refused_by_name(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 2, "config": {"seed": 1, "data": {"ways": 5}}}
    make_trainer(tmp_path, **settings).fit()

    def refusal(**changes: Any) -> str:
        with pytest.raises(il.meta.CheckpointError, match="is of a run with other settings") as caught:
            make_trainer(tmp_path, **(settings | changes)).resume()
        return str(caught.value)

    assert "config.data.ways: 5 there, 20 here" in refusal(config={"seed": 1, "data": {"ways": 20}})
    assert "config.seed: 1 there, 'absent' here" in refusal(config={"data": {"ways": 5}})
    assert "tasks_per_step: 4 there, 5 here" in refusal(tasks_per_step=5)
    assert "method.inner_solver.step_size: 0.1 there, 0.2 here" in refusal(step_size=0.2)
    assert "outer.optimizer: 'Adam' there, 'AdamW' here" in refusal(optimizer=torch.optim.AdamW)
    assert "outer.max_gradient_norm: None there, 1.0 here" in refusal(max_gradient_norm=1.0)
    # the best of one metric would never be met by another; the other split makes other tasks
    assert "validation.better: 'higher' there, 'lower' here" in refusal(better="lower")
    assert "validation.metric: 'hit_rate' there, 'task_loss' here" in refusal(metric=task_loss)
    assert "validation.transductive: None there, True here" in refusal(transductive=True)
    assert "split: 'as_support_query' there, 'tuple' here" in refusal(split=tuple)
    # what may differ: budgets, reports, chunks
    resumed = make_trainer(tmp_path, **(settings | {"max_steps": 4, "tasks_per_chunk": 1, "report_steps": 3}))
    assert resumed.resume() and len(resumed.fit()) == 4
    # and a run that measures nothing, or whose checkpoint does not say by what it did
    assert make_trainer(tmp_path, **(settings | {"metric": None, "better": "lower"})).resume()
    state = il.meta.load_checkpoint(tmp_path / "checkpoint.pt")
    del state["settings"]["validation"], state["settings"]["split"]
    il.meta.save_checkpoint(tmp_path / "checkpoint.pt", state)
    assert make_trainer(tmp_path, **(settings | {"better": "lower"})).resume()


def test_settings_are_compared_by_value() -> None:
    solver = il.solvers.GradientDescent(step_size=0.1, max_steps=3)
    assert plain({"a": (1, float("nan")), "t": torch.zeros(2, 3), "f": len}) == {
        "a": {"0": 1, "1": pytest.approx(float("nan"), nan_ok=True)},
        "t": "tensor (2, 3)",
        "f": "builtin_function_or_method",
    }
    assert differences(plain(solver), plain(il.solvers.GradientDescent(step_size=0.1, max_steps=3))) == []
    assert differences({"a": float("nan")}, {"a": float("nan")}) == []
    assert differences({"a": 1}, {"a": True}) == ["a: 1 there, True here"]


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped bit", "no checkpoint", "another version"])
def test_a_damaged_checkpoint_is_an_error_that_names_it(tmp_path: Path, damage: str) -> None:
    make_trainer(tmp_path, max_steps=2).fit()
    path = tmp_path / "checkpoint.pt"
    content = bytearray(path.read_bytes())
    expected = f"{path} cannot be read as a checkpoint"
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped bit":  # in the middle of a tensor, which torch.load itself does not notice
        with torch.no_grad():
            marker = il.meta.load_checkpoint(path)["random"]["torch"][100:140].numpy().tobytes()
        content[content.index(marker)] ^= 1
        path.write_bytes(content)
    elif damage == "no checkpoint":
        torch.save([1, 2], path)
        expected = f"{path} holds a list, a checkpoint is a dict"
    else:
        il.meta.save_checkpoint(path, {"step": 2, "theta": []})
        expected = f"{path} was not written by this version of the trainer"
    with pytest.raises(il.meta.CheckpointError) as caught:
        make_trainer(tmp_path, max_steps=2).resume()
    assert str(caught.value).startswith(expected)


def test_a_folder_that_cannot_be_written_is_told_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    trainer = make_trainer(tmp_path / "file" / "run", max_steps=2)
    with pytest.raises(OSError, match=r"file/run/\.writable could not be written .*give a folder that can be written"):
        trainer.fit()
    assert trainer.step == 0


def test_a_full_disk_is_told_with_the_file_and_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_trainer(tmp_path, max_steps=2).fit()
    before = (tmp_path / "checkpoint.pt").read_bytes()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    resumed = make_trainer(tmp_path, max_steps=4)
    resumed.resume()
    monkeypatch.setattr(torch, "save", full)
    expected = r"checkpoint\.pt could not be written \(No space left on device\); a file that was there is as it was"
    with pytest.raises(OSError, match=expected) as caught:
        resumed.fit()
    assert caught.value.errno == errno.ENOSPC
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert {entry.name for entry in tmp_path.iterdir()} == {"checkpoint.pt", "best.pt", "metrics.jsonl"}


def test_a_missing_checkpoint_is_no_damaged_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        il.meta.load_checkpoint(tmp_path / "checkpoint.pt")


class Growing(Lines):
    """Its state holds ``what`` after so many tasks."""

    def __init__(self, what: Any, after: int) -> None:
        super().__init__(1)
        self.what, self.after, self.drawn = what, after, 0

    def sample(self, num_tasks: int) -> Any:
        self.drawn += 1
        return super().sample(num_tasks)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"seen": [{"where": self.what if self.drawn >= self.after else 0}]}


def test_a_state_that_no_checkpoint_can_hold_is_told_by_its_path_before_the_first_step(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.sampler = Growing(Path("somewhere"), 0)
    message = r"^sampler\.seen\[0\]\.where is a pathlib\.[\w.]+, which a checkpoint cannot hold"
    with pytest.raises(il.meta.CheckpointError, match=message):
        trainer.fit()
    assert trainer.step == 0 and not (tmp_path / "checkpoint.pt").exists()


def test_what_no_checkpoint_can_hold_costs_no_step_that_was_saved_before_it_came(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 6, "checkpoint_steps": 2}
    trainer = make_trainer(tmp_path, **settings)
    trainer.sampler = Growing(Path("somewhere"), 3)
    with pytest.raises(il.meta.CheckpointError, match=r"^sampler\.seen\[0\]\.where is"):
        trainer.fit()
    straight, resumed = make_trainer(None, **settings), make_trainer(tmp_path, **settings)
    assert resumed.resume() and resumed.step == 2
    assert comparable(resumed.fit()) == comparable(straight.fit())


def test_a_schedule_in_numpy_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    def scheduler(optimizer: torch.optim.Optimizer) -> Any:  # NumPy's number comes in the fourth step
        rate = lambda k: (k + 1) / 3 if k < 3 else 0.5 * (1 + np.cos(k / 10))  # noqa: E731
        return torch.optim.lr_scheduler.LambdaLR(optimizer, rate)

    runs = []
    for stop_at in (None, 0.75):
        trainer = make_trainer(tmp_path / str(stop_at), max_steps=8, checkpoint_steps=1, scheduler=scheduler)
        if stop_at is not None:
            trainer.fit(until=stop_at)
            trainer = make_trainer(tmp_path / str(stop_at), max_steps=8, scheduler=scheduler)
            assert trainer.resume() and trainer.step == 6
        runs.append((comparable(trainer.fit()), tensors(trainer).tolist()))
    assert runs[0] == runs[1]


def test_numpy_settings_are_those_that_a_resumed_run_has(tmp_path: Path) -> None:
    config = {"rate": np.float64(0.1), "width": np.int64(3), "kind": np.float32(0.5)}
    make_trainer(tmp_path, max_steps=1, config=config).fit()
    assert make_trainer(tmp_path, max_steps=1, config=config).resume()
    with pytest.raises(il.meta.CheckpointError, match=r"config\.kind: 0\.5 there, 0\.25 here"):
        make_trainer(tmp_path, max_steps=1, config=config | {"kind": np.float32(0.25)}).resume()


def test_a_checkpoint_gives_numpy_back_as_plain_data(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    given = {np.int64(3): [np.float32(0.5), (np.bool_(True), np.str_("a"))], "dtype": torch.float64, "set": {1, 2}}
    il.meta.save_checkpoint(path, given | {"array": np.arange(3), "reversed": np.arange(3.0)[::-1]})
    found = il.meta.load_checkpoint(path)
    assert torch.equal(found.pop("array"), torch.arange(3))
    assert torch.equal(found.pop("reversed"), torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64))
    assert repr(found) == "{3: [0.5, (True, 'a')], 'dtype': torch.float64, 'set': {1, 2}}"


@pytest.mark.parametrize(
    "odd", [np.array([None]), np.datetime64("2020-01-01"), len, il.Status.CONVERGED, {1: object()}]
)
def test_what_cannot_be_saved_leaves_the_file_that_was_there(tmp_path: Path, odd: Any) -> None:
    path = tmp_path / "state.pt"
    il.meta.save_checkpoint(path, {"step": 3})
    with pytest.raises(il.meta.CheckpointError, match=r"^a\[1\](\.1)? is a .*, which a checkpoint cannot hold"):
        il.meta.save_checkpoint(path, {"a": [0, odd]})
    assert il.meta.load_checkpoint(path) == {"step": 3} and list(tmp_path.iterdir()) == [path]


def test_a_start_removes_what_dead_processes_left_half_written_and_nothing_else(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    alive = subprocess.Popen(["sleep", "60"])
    left = [f".checkpoint.pt.{ended.pid}.tmp", f".metrics.jsonl.{ended.pid}.tmp", f".best.pt.{os.getpid()}.tmp"]
    kept = [f".best.pt.{alive.pid}.tmp", ".notes.tmp", f"mine.{ended.pid}.tmp", f"deeper/.best.pt.{ended.pid}.tmp"]
    (tmp_path / "deeper").mkdir()
    for name in left + kept:
        (tmp_path / name).write_bytes(b"half")
    try:
        with open(tmp_path / f".elsewhere.pt.{ended.pid}.tmp", "wb") as written:  # by a process on another machine
            fcntl.flock(written, fcntl.LOCK_EX)
            make_trainer(tmp_path, max_steps=1).fit()
            assert Path(written.name).exists()
    finally:
        alive.kill()
        alive.wait()
    assert not any((tmp_path / name).exists() for name in left)
    assert all((tmp_path / name).exists() for name in kept)


def test_tensorboard_shows_every_step_once_after_a_crash(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings: dict[str, Any] = {"max_steps": 12, "num_validations": 3, "checkpoint_steps": 4, "tensorboard": True}
    broken = make_trainer(tmp_path, **settings)
    sample = broken.sampler.sample

    def crash(num_tasks: int) -> Any:
        if broken.step == 7:
            raise OSError("power failure")
        return sample(num_tasks)

    broken.sampler.sample = crash  # type: ignore[method-assign]
    with pytest.raises(OSError, match="power failure"):
        broken.fit()
    resumed = make_trainer(tmp_path, **settings)
    assert resumed.resume() and resumed.step == 4
    history = resumed.fit()
    events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0})
    events.Reload()
    for name in ("loss", "accuracy", "gradient_norm", "validation"):
        wanted = [(record["step"], record[name]) for record in history if name in record]
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in found] == [step for step, _ in wanted]
        assert [value for _, value in found] == pytest.approx([value for _, value in wanted], rel=1e-6)  # float32


def test_tensorboard_without_what_it_needs_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="tensorboard=True writes into the run folder"):
        make_trainer(None, tensorboard=True)
    monkeypatch.setattr(_monitor.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'implicitlayer\[examples\]'"):
        make_trainer(tmp_path, tensorboard=True)


def test_metrics_hold_what_the_checkpoint_holds(tmp_path: Path) -> None:
    make_trainer(tmp_path, max_steps=3).fit()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == il.meta.load_checkpoint(tmp_path / "checkpoint.pt")["history"]
