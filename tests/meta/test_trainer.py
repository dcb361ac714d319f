"""The trainer: it learns, it resumes bit for bit, and a killed process loses at most one checkpoint interval."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from meta.lines import comparable, hit_rate, make_trainer

import implicitlayer as il
from implicitlayer.meta._monitor import Progress, trouble


def test_training_learns_and_leaves_its_records(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    history = trainer.fit()
    assert trainer.done == 1.0 and trainer.step == 60 == len(history)
    assert history[-1]["loss"] < 0.2 * history[0]["loss"]
    assert history[-1]["validation"] > 0.5
    assert sum("validation" in record for record in history) == 10
    assert history[0]["inner_diverged"] == 0.0 and history[0]["negative_curvature"] == 0.0
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == history
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "checkpoint.pt", "metrics.jsonl"]


def test_a_resumed_run_equals_one_that_was_never_stopped(tmp_path: Path) -> None:
    straight = make_trainer(tmp_path / "straight")
    straight.fit()

    class Crash(Exception):
        pass

    broken = make_trainer(tmp_path / "broken")
    sample = broken.sampler.sample

    def sample_or_crash(num_tasks: int) -> Any:
        if broken.step == 37:
            raise Crash
        return sample(num_tasks)

    broken.sampler.sample = sample_or_crash  # type: ignore[method-assign]
    with pytest.raises(Crash):
        broken.fit()
    torch.rand(3)  # whatever happens to the random state in between
    resumed = make_trainer(tmp_path / "broken")
    assert resumed.resume() and 30 <= resumed.step < 37  # saved every 10 steps, and when a validation was the best
    resumed.fit()
    assert comparable(resumed.history) == comparable(straight.history)
    for name, leaf in straight.theta.items():
        assert torch.equal(leaf, resumed.theta[name])
    for a, b in zip(straight.method.parameters(), resumed.method.parameters(), strict=True):
        assert torch.equal(a, b)


def few_shot_trainer(run_dir: Path) -> il.meta.Trainer:
    images = torch.randint(256, (12, 6, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    classes = il.fewshot.ImageClasses(images, [f"class {k}" for k in range(12)])
    sampler = il.fewshot.EpisodeSampler(classes, num_ways=3, num_query=2, rotations="augment", seed=4)
    network = il.fewshot.conv4(3, num_filters=4)
    theta = {name: leaf.requires_grad_() for name, leaf in network.init(torch.Generator().manual_seed(0)).items()}

    def task_loss(params: Any, batch: Any) -> torch.Tensor:
        return il.fewshot.task_cross_entropy(network(params, batch[0]), batch[1])

    method = il.meta.iMAML(task_loss, il.solvers.GradientDescent(step_size=0.1, max_steps=2), strength=0.5)
    optimizer = torch.optim.Adam(theta.values(), lr=1e-2)
    return il.meta.Trainer(
        method, theta, sampler, optimizer, max_steps=8, run_dir=run_dir, checkpoint_steps=3, show_progress=False
    )


@pytest.mark.parametrize("name", ["iMAML", "MAML", "FirstOrderMAML", "Reptile"])
def test_the_accuracy_of_the_loss_comes_from_its_own_forward_pass(name: str) -> None:
    network = il.fewshot.conv4(3, num_filters=4)
    images = torch.randint(256, (12, 6, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    classes = il.fewshot.ImageClasses(images, [f"class {k}" for k in range(12)])
    calls = 0

    class Counted(il.fewshot.ClassificationLoss):
        def accuracy(self, params: Any, batch: Any) -> torch.Tensor:
            nonlocal calls
            calls += 1
            return super().accuracy(params, batch)

    def history(own: bool) -> list[float]:
        theta = {key: leaf.requires_grad_() for key, leaf in network.init(torch.Generator().manual_seed(0)).items()}
        loss, descent = Counted(network), il.solvers.GradientDescent(step_size=0.1, max_steps=2)
        method = {
            "iMAML": lambda: il.meta.iMAML(loss, descent, strength=0.5),
            "MAML": lambda: il.meta.MAML(loss, step_size=0.1, num_steps=2),
            "FirstOrderMAML": lambda: il.meta.FirstOrderMAML(loss, descent, strength=0.5),
            "Reptile": lambda: il.meta.Reptile(loss, descent, strength=0.5),
        }[name]()
        sampler = il.fewshot.EpisodeSampler(classes, num_ways=3, num_query=2, seed=4)
        metric = loss.accuracy if own else lambda phi, query: loss.accuracy(phi, query)
        optimizer = torch.optim.Adam(theta.values(), lr=1e-2)
        trainer = il.meta.Trainer(
            method, theta, sampler, optimizer, max_steps=4, tasks_per_step=3, metric=metric, show_progress=False
        )
        return [record[key] for record in trainer.fit() for key in ("loss", "accuracy")]

    measured = history(own=False)
    asked, calls = calls, 0
    assert history(own=True) == pytest.approx(measured, rel=1e-5)
    assert asked == 4 and calls == (4 if name == "Reptile" else 0)  # whose outer loss is not the query loss


def test_few_shot_training_resumes_bit_for_bit(tmp_path: Path) -> None:
    straight = few_shot_trainer(tmp_path / "straight")
    straight.fit()
    part = few_shot_trainer(tmp_path / "part")
    while part.step < 3:
        part._train_step()
    part.save()
    part._train_step()  # lost
    resumed = few_shot_trainer(tmp_path / "part")
    assert resumed.resume() and resumed.step == 3
    resumed.fit()
    assert comparable(resumed.history) == comparable(straight.history)
    assert all(torch.equal(leaf, resumed.theta[name]) for name, leaf in straight.theta.items())


KILLED_RUN = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from meta.lines import make_trainer
trainer = make_trainer(Path(sys.argv[2]), checkpoint_steps=5)
sample = trainer.sampler.sample
def slow(num_tasks):
    time.sleep(0.02)
    print(trainer.step, flush=True)
    return sample(num_tasks)
trainer.sampler.sample = slow
trainer.resume()
trainer.fit()
"""


def start_run(run_dir: Path, until_step: int) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", KILLED_RUN, str(Path(__file__).parents[1]), str(run_dir)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= until_step:
            break
    return process


def finish(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    process.stdout.close()
    return process.wait(timeout=60)


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_kill_9_loses_at_most_one_checkpoint_interval(tmp_path: Path) -> None:
    torch.set_num_threads(1)  # as in the other process: sums over threads differ in the last bit
    straight = make_trainer(tmp_path / "straight")
    straight.fit()
    for until_step in (13, 28):  # killed twice, at arbitrary moments
        process = start_run(tmp_path / "killed", until_step)
        process.kill()
        assert finish(process) == -signal.SIGKILL
        resumed = make_trainer(tmp_path / "killed")
        assert resumed.resume()
        assert resumed.step >= until_step - 5
    resumed.fit()
    assert comparable(resumed.history) == comparable(straight.history)
    assert all(torch.equal(leaf, resumed.theta[name]) for name, leaf in straight.theta.items())


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_ctrl_c_loses_no_finished_step(tmp_path: Path) -> None:
    process = start_run(tmp_path, 7)
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    last_step = max([7, *map(int, process.stdout)])  # the steps that were begun
    assert finish(process) != 0
    resumed = make_trainer(tmp_path)
    assert resumed.resume()
    assert resumed.step == last_step + 1


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    il.meta.save_checkpoint(path, {"step": 1})
    with pytest.raises(il.meta.CheckpointError, match=r"^step is a builtins\.function, which a checkpoint cannot hold"):
        il.meta.save_checkpoint(path, {"step": lambda: None})
    assert il.meta.load_checkpoint(path) == {"step": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_budget_in_minutes_ends_the_run() -> None:
    trainer = make_trainer(None, max_steps=None, max_minutes=0.005)
    trainer.fit()
    assert trainer.done == 1.0 and trainer.seconds >= 0.3
    assert trainer.history[-1]["seconds"] == trainer.seconds


def test_a_diverging_inner_problem_is_shown() -> None:
    trainer = make_trainer(None, step_size=1.5, max_steps=1)
    (record,) = trainer.fit()
    assert record["inner_diverged"] > 0.5
    assert "inner problem diverges" in trouble(record)
    assert "negative curvature on 75% of tasks" in trouble({"negative_curvature": 0.75})
    assert trouble({"inner_diverged": 0.0, "negative_curvature": 0.2}) == ""


def test_a_meta_gradient_that_is_not_finite_stops_the_run() -> None:
    trainer = make_trainer(None, step_size=1e200, max_steps=3)
    with pytest.raises(il.NonFiniteError):
        trainer.fit()
    assert trainer.step == 0


def test_progress_shows_loss_accuracy_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(0.0, name="iMAML")
    progress.update(0.25, {"step": 5, "seconds": 30.0, "loss": 0.25, "accuracy": 0.5, "inner_diverged": 0.5})
    progress.close()
    shown = capsys.readouterr().err
    for words in ("iMAML", "ETA 1:30", "25%", "step 5, loss 0.250, accuracy 50.0%", "inner problem diverges on 50%"):
        assert words in shown


def test_evaluation_reports_a_95_percent_interval() -> None:
    result = il.meta.Evaluation(torch.tensor([0.0, 1.0, 1.0, 0.0]))
    assert result.mean == 0.5 and result.num_tasks == 4
    # s² = 1/3 and 1.96 · sqrt(1/3) / 2
    assert result.interval == pytest.approx(1.959964 * (1 / 3) ** 0.5 / 2)
    with pytest.raises(ValueError, match="episodes is empty"):
        il.meta.evaluate(make_trainer(None).method, {}, [], hit_rate)


def test_misuse_is_told_with_its_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Give a budget"):
        make_trainer(None, max_steps=None)
    with pytest.raises(ValueError, match="tasks_per_step=0 must be an integer of at least 1"):
        make_trainer(None, tasks_per_step=0)
    trainer = make_trainer(tmp_path)
    state = trainer.state_dict() | {"theta": [torch.zeros(2)]}
    with pytest.raises(il.meta.CheckpointError, match="other settings"):
        trainer.load_state_dict(state)
    own = trainer.state_dict()["theta"]
    for other in (own[0].half(), own[0][None]):
        with pytest.raises(il.meta.CheckpointError, match=r"holds a theta\[.*other settings"):
            trainer.load_state_dict(trainer.state_dict() | {"theta": [other, *own[1:]]})
    assert not trainer.resume()


def test_a_run_folder_that_holds_a_run_is_not_overwritten(tmp_path: Path) -> None:
    make_trainer(tmp_path, max_steps=3).fit()
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(FileExistsError, match=r"Call resume\(\) before fit\(\)"):
        make_trainer(tmp_path, max_steps=3).fit()
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_an_optimizer_of_other_tensors_is_refused() -> None:
    trainer = make_trainer(None, max_steps=1)
    other = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    with pytest.raises(ValueError, match="the optimizer does not hold"):
        il.meta.Trainer(trainer.method, trainer.theta, trainer.sampler, other, max_steps=1)


def test_a_sampler_that_cannot_be_resumed_is_refused_at_the_start() -> None:
    trainer = make_trainer(None, max_steps=1)
    with pytest.raises(TypeError, match="the sampler needs the methods"):
        il.meta.Trainer(trainer.method, trainer.theta, object(), trainer.optimizer, max_steps=1)
