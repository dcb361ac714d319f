"""Runs: what the folder holds, what is refused, and that a killed run ends as one that was not."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")  # draws the pictures of Glyphs
pytest.importorskip("PIL")

import experiments as ex
from experiments import _device as device_module
from experiments._figures import draw

from implicitlayer.meta import CheckpointError, load_checkpoint, save_checkpoint

ROOT = Path(__file__).resolve().parents[2]


def tiny(folder: Path | None, name: str = "reduced-glyphs-5w1s-imaml-gd", **run: Any) -> ex.Experiment:
    experiment = ex.smoke(ex.preset(name))
    place = None if folder is None else str(folder)
    return dataclasses.replace(experiment, run=dataclasses.replace(experiment.run, dir=place, **run))


def unlike() -> list[str]:
    """The presets that smoke() leaves different: Omniglot's and Glyphs' are one where only the pictures differ."""
    found = {
        dataclasses.replace(ex.smoke(e), preset="", setting="paper", notes=()): name for name, e in ex.PRESETS.items()
    }
    return sorted(found.values())


@pytest.mark.parametrize("name", unlike())
def test_every_preset_takes_a_step_at_smoke_size(name: str) -> None:
    experiment = ex.smoke(ex.preset(name))
    # the picture size and the way down are the preset's: mini-ImageNet's network is another one
    experiment = dataclasses.replace(
        experiment, evaluation=dataclasses.replace(experiment.evaluation, num_validations=1, validation_tasks=2)
    )
    trainer = ex.build_trainer(experiment)
    before = [value.detach().clone() for value in trainer.theta.values()]
    (record,) = trainer.fit()
    assert record["gradient_norm"] > 0 and 0 <= record["validation"] <= 1
    assert any(not torch.equal(old, new) for old, new in zip(before, trainer.theta.values(), strict=True))


def test_a_finished_run_goes_on_with_a_larger_budget(tmp_path: Path) -> None:
    def of(folder: str, steps: int) -> ex.Experiment:
        return tiny(tmp_path / folder, "paper-omniglot-5w1s-maml", max_steps=steps)  # a rate that never falls

    first = ex.run(of("run", 2))
    longer = ex.run(of("run", 4), resume=True)
    assert (first["meta_steps"], longer["meta_steps"]) == (2, 4)
    assert ex.Experiment.load(tmp_path / "run" / "config.json").run.max_steps == 4
    assert json.loads((tmp_path / "run" / "results-2.json").read_text()) == first  # nothing is lost
    assert ex.run(of("run", 4), resume=True) == longer  # finished again
    ex.run(of("other", 4))
    theta, unbroken = (load_checkpoint(tmp_path / name / "checkpoint.pt")["theta"] for name in ("run", "other"))
    assert all(torch.equal(a, b) for a, b in zip(theta, unbroken, strict=True))


def test_a_run_of_before_the_task_loss_had_a_class_goes_on(tmp_path: Path) -> None:
    """Its checkpoints say of the loss what iMAML's own description of a composite is."""

    def of(steps: int) -> ex.Experiment:
        return tiny(tmp_path, "reduced-glyphs-5w1s-imaml-gd", max_steps=steps)

    ex.run(of(2))
    for name in ("checkpoint.pt", "best.pt"):
        state = load_checkpoint(tmp_path / name)
        assert state["settings"]["method"]["task_loss"] == "TaskLoss"
        state["settings"]["method"]["task_loss"] = {"class": "Composite", "loss": "function", "model": "function"}
        save_checkpoint(tmp_path / name, state)
    assert ex.run(of(3), resume=True)["meta_steps"] == 3
    state["settings"]["method"]["task_loss"] = "AnotherLoss"
    save_checkpoint(tmp_path / "checkpoint.pt", state)
    with pytest.raises(CheckpointError, match=r"method\.task_loss: 'AnotherLoss' there, 'TaskLoss' here"):
        ex.run(of(4), resume=True)


def test_a_run_leaves_its_folder(tmp_path: Path) -> None:
    experiment = tiny(tmp_path / "run", max_steps=3)
    results = ex.run(experiment)
    names = {"config.json", "versions.json", "metrics.jsonl", "checkpoint.pt", "best.pt", "results.json"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == names | {"curves.png", "episode.png"}
    assert ex.Experiment.load(tmp_path / "run" / "config.json") == experiment
    assert results == json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["meta_steps"], results["num_tasks"], results["transductive"]) == (3, 3, True)
    assert 0 <= results["accuracy"] <= 100 and results["seed"] == 0 and results["processes"] == 1
    assert results["machine"] == ex.machine() and results["versions"] == ex.versions()
    assert "run.max_steps: None there, 3 here" in results["changed_from_preset"]
    assert str(tmp_path) not in json.dumps(results), "a folder of this machine is in the results"
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]


def test_a_finished_run_is_not_computed_again(tmp_path: Path) -> None:
    experiment = tiny(tmp_path)
    first = ex.run(experiment)
    written = (tmp_path / "checkpoint.pt").stat().st_mtime_ns
    assert ex.run(experiment, resume=True) == first
    assert (tmp_path / "checkpoint.pt").stat().st_mtime_ns == written
    assert len(json.loads((tmp_path / "versions.json").read_text())["starts"]) == 1


def test_a_folder_that_holds_this_or_another_experiment_is_refused(tmp_path: Path) -> None:
    ex.run(tiny(tmp_path))
    with pytest.raises(ex.RunFolderError, match=r"holds this experiment already\. Go on with --resume"):
        ex.run(tiny(tmp_path))
    with pytest.raises(
        ex.RunFolderError, match=r"run\.seed: 0 there, 1 here; .*run\.max_steps|run\.seed: 0 there, 1 here"
    ):
        ex.run(tiny(tmp_path, seed=1), resume=True)
    # where it computes and what it shows may change
    ex.run(tiny(tmp_path, progress=True, checkpoint_seconds=1.0), resume=True)


def test_a_run_without_a_folder_makes_one_and_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("experiments._folder.time.strftime", lambda form: "20200101-000000")
    for number, name in enumerate(["20200101-000000", "20200101-000000-2"], start=1):  # within one second
        ex.run(tiny(None, "reduced-glyphs-5w1s-reptile"))
        assert len(list((tmp_path / "runs").iterdir())) == number
        assert (tmp_path / "runs" / f"reduced-glyphs-5w1s-reptile-{name}" / "results.json").exists()
        assert capsys.readouterr().out == f"run folder: runs/reduced-glyphs-5w1s-reptile-{name}\n"


def test_a_mistaken_data_folder_can_be_corrected(tmp_path: Path) -> None:
    """A run that finds no data leaves nothing, so that the same folder can be named again."""
    experiment = tiny(tmp_path / "run")
    data = dataclasses.replace(experiment.data, dataset="omniglot", dir=str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="No Omniglot in"):
        ex.run(dataclasses.replace(experiment, data=data))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ['{"accuracy": 9', "3"])
def test_damaged_results_are_named(text: str, tmp_path: Path) -> None:
    first = ex.run(tiny(tmp_path))
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ex.RunFolderError, match=r"results\.json is damaged .* Remove this one file; the run goes on"):
        ex.run(tiny(tmp_path), resume=True)
    (tmp_path / "results.json").unlink()
    assert ex.run(tiny(tmp_path), resume=True)["accuracy"] == first["accuracy"]


def test_a_gpu_that_is_not_used_is_not_in_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"a card, {device}")
    assert ex.machine()["gpu"] is None and ex.machine("cuda:1")["gpu"] == "a card, cuda:1"


def test_maml_can_take_accelerated_steps() -> None:
    gradients = []
    for momentum in (0.0, 0.5):
        experiment = tiny(None, "reduced-glyphs-5w1s-maml")
        method = dataclasses.replace(experiment.method, inner_momentum=momentum, inner_steps=3)
        trainer = ex.build_trainer(dataclasses.replace(experiment, method=method))
        assert trainer.method.momentum == momentum  # type: ignore[attr-defined]
        gradients.append(trainer.fit()[0]["gradient_norm"])
    assert gradients[0] != gradients[1]


# A run of 120 steps of some 5 ms; killed at its first checkpoint, after 0.05 s, it is far from its end.
KILLED = """
import dataclasses, sys
import experiments as ex
ex.run(ex.Experiment.load(sys.argv[1]))
"""


def test_a_killed_run_ends_as_one_that_was_not(tmp_path: Path) -> None:
    name, steps = "reduced-glyphs-5w1s-fomaml", 120
    unbroken = ex.run(tiny(tmp_path / "unbroken", name, max_steps=steps))
    experiment = tiny(tmp_path / "killed", name, max_steps=steps)
    tiny(tmp_path / "killed", name, max_steps=steps, checkpoint_seconds=0.05).save(tmp_path / "config.json")
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'examples' / 'paper'}",
    }
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "config.json")], env=environment)
    checkpoint = tmp_path / "killed" / "checkpoint.pt"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 0 < load_checkpoint(checkpoint)["step"] < steps and not (tmp_path / "killed" / "results.json").exists()

    resumed = ex.run(experiment, resume=True)
    same = ("accuracy", "interval", "meta_steps", "validation_accuracy", "validation_step")
    assert [resumed[key] for key in same] == [unbroken[key] for key in same]
    there, here = (load_checkpoint(tmp_path / name / "checkpoint.pt")["theta"] for name in ("unbroken", "killed"))
    assert all(torch.equal(a, b) for a, b in zip(there, here, strict=True))  # bit for bit
    assert len(json.loads((tmp_path / "killed" / "versions.json").read_text())["starts"]) == 2


def test_a_test_without_transduction_is_stated_and_differs(tmp_path: Path) -> None:
    accuracies = {}
    for transductive in (True, False):
        experiment = tiny(tmp_path / str(transductive))
        evaluation = dataclasses.replace(experiment.evaluation, transductive=transductive, test_tasks=40)
        results = ex.run(dataclasses.replace(experiment, evaluation=evaluation))
        assert results["transductive"] is transductive
        accuracies[transductive] = results["accuracy"]
    assert accuracies[True] != accuracies[False]  # the same theta, the same 40 tasks


def test_the_test_may_take_other_inner_steps_than_training(tmp_path: Path) -> None:
    accuracies = {}
    for steps in (1, 10):
        experiment = tiny(tmp_path / str(steps), "reduced-glyphs-5w1s-fomaml")
        evaluation = dataclasses.replace(experiment.evaluation, inner_steps=steps, test_tasks=40)
        accuracies[steps] = ex.run(dataclasses.replace(experiment, evaluation=evaluation))["accuracy"]
    assert accuracies[1] != accuracies[10]


def test_the_last_checkpoint_can_be_tested_in_place_of_the_best(tmp_path: Path) -> None:
    experiment = tiny(tmp_path)
    evaluation = dataclasses.replace(experiment.evaluation, checkpoint="last")
    assert ex.run(dataclasses.replace(experiment, evaluation=evaluation))["checkpoint"].startswith("last of")


@pytest.mark.parametrize(
    ("name", "message"),
    [("tpu", "run.device='tpu' must be cpu, cuda or cuda:<number>"), ("meta", "run.device='meta' must be cpu, cuda")],
)
def test_another_device_is_refused(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        ex.run(tiny(tmp_path, device=name))


def test_a_gpu_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"run\.device='cuda': torch .* sees no GPU here\. Take --run\.device cpu"):
        ex.run(tiny(tmp_path, device="cuda"))
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"run\.device='cuda:2': there are 2 GPUs, numbered from 0"):
        device_module.pick_device("cuda:2")


def test_tf32_is_let_on_by_a_small_difference_only() -> None:
    """The switch is a stand-in that moves theta by a known relative error, as rounding to 10 bits would."""
    trainer = ex.build_trainer(tiny(None))
    state = trainer.sampler.state_dict()
    calls: list[bool] = []
    exact = trainer.theta["norm4.weight"].detach().clone()

    def switch(allowed: bool) -> None:
        calls.append(allowed)
        with torch.no_grad():
            trainer.theta["norm4.weight"].copy_(exact * (1 + 1e-3) if allowed else exact)

    difference = device_module.tf32_difference(trainer, switch)
    assert 0 < difference < 0.5 and calls == [True, False, False]
    assert trainer.sampler.state_dict() == state and all(value.grad is None for value in trainer.theta.values())
    calls.clear()
    with pytest.raises(
        ex.PrecisionError, match=r"TF32 changes the meta-gradient by .* more than run.tf32_tolerance=1e-12"
    ):
        device_module.allow_tf32(trainer, 1e-12, switch)
    assert calls[-1] is False
    calls.clear()
    device_module.allow_tf32(trainer, 0.5, switch)
    assert calls == [True, False, False, True]


def test_torch_obeys_the_switch_of_tf32() -> None:
    for allowed in (True, False):
        device_module.set_tf32(allowed)
        assert torch.backends.cuda.matmul.allow_tf32 is allowed and torch.backends.cudnn.allow_tf32 is allowed


def test_tensorboard_files_are_written_where_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    ex.run(tiny(tmp_path / "with", tensorboard=True))
    ex.run(tiny(tmp_path / "without"))
    assert list((tmp_path / "with").glob("**/events.out.tfevents.*"))
    assert not list((tmp_path / "without").glob("**/events.out.tfevents.*"))


def test_memory_settings_reach_the_trainer_and_change_nothing_else(tmp_path: Path) -> None:
    thetas = {}
    for name, settings in {"whole": {}, "parts": {"tasks_per_chunk": 1}, "budget": {"memory_budget": 64}}.items():
        trainer = ex.build_trainer(tiny(None, **settings))
        trainer.fit()
        thetas[name] = torch.cat([value.detach().flatten() for value in trainer.theta.values()])
    # one step of Adam: a sum in another order moves float32 by rounding; the division by |g| + eps may enlarge that
    # where a gradient is near zero, so the median is looked at
    assert (thetas["whole"] - thetas["parts"]).abs().median() < 1e-6
    assert torch.equal(thetas["whole"], thetas["budget"])  # 64 MiB hold both tasks


def test_colour_episodes_can_be_drawn(tmp_path: Path) -> None:
    support, query = torch.rand(5, 3, 12, 12), torch.rand(10, 3, 12, 12)
    labels = torch.arange(5).repeat_interleave(2)
    history = [{"step": 1, "seconds": 1.0, "loss": 1.0, "accuracy": 0.2}]
    names = draw(tmp_path, {"imaml-gd": history}, ((support, torch.arange(5)), (query, labels)), torch.randn(10, 5))
    assert names == ["curves.png", "episode.png"] and all((tmp_path / name).stat().st_size > 1000 for name in names)


def test_without_matplotlib_there_are_no_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert draw(tmp_path, {}, ((torch.zeros(1), None), (torch.zeros(1), None)), torch.zeros(1, 5)) == []


def test_a_test_evaluation_shows_how_many_tasks_are_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ex.run(tiny(tmp_path, progress=True))
    shown = capsys.readouterr().err
    assert ", test" in shown and "ETA 00:00, 3 of 3 tasks" in shown
