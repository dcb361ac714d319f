"""The callbacks of the trainer: what they are told and when; the recipes of docs/tools.md with stand-ins."""

import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from meta.lines import comparable, make_trainer

import implicitlayer as il


class Listener(il.meta.Callback):
    def __init__(self) -> None:
        self.heard: list[tuple[str, int]] = []
        self.records: list[dict[str, Any]] = []
        self.paths: list[Path] = []

    def on_start(self, trainer: il.meta.Trainer) -> None:
        self.heard.append(("start", trainer.step))

    def on_step(self, trainer: il.meta.Trainer, record: dict[str, Any]) -> None:
        self.heard.append(("step", record["step"]))
        self.records.append(record)

    def on_validation(self, trainer: il.meta.Trainer, record: dict[str, Any]) -> None:
        assert record["validation"] == trainer.history[-1]["validation"]
        self.heard.append(("validation", record["step"]))

    def on_checkpoint(self, trainer: il.meta.Trainer, path: Path) -> None:
        assert path.exists()
        self.heard.append(("checkpoint", trainer.step))
        self.paths.append(path)

    def on_end(self, trainer: il.meta.Trainer) -> None:
        self.heard.append(("end", trainer.step))


def test_every_event_is_told_once_and_in_order(tmp_path: Path) -> None:
    listener = Listener()
    trainer = make_trainer(tmp_path, callbacks=[listener])
    history = trainer.fit()
    assert listener.heard[0] == ("start", 0) and listener.heard[-1] == ("end", 60)
    assert [step for event, step in listener.heard if event == "step"] == list(range(1, 61))
    assert listener.records == history
    validated = [record["step"] for record in history if "validation" in record]
    assert [step for event, step in listener.heard if event == "validation"] == validated
    assert all(listener.heard.index(("step", k)) < listener.heard.index(("validation", k)) for k in validated)
    assert ("checkpoint", 60) in listener.heard and set(listener.paths) == {trainer.checkpoint_path}


def test_a_resumed_run_with_a_callback_is_told_where_it_goes_on_and_has_the_same_numbers(tmp_path: Path) -> None:
    straight = make_trainer(None)
    straight.fit()
    make_trainer(tmp_path, callbacks=[Listener()]).fit(until=0.5)
    listener = Listener()
    resumed = make_trainer(tmp_path, callbacks=[listener])
    resumed.resume()
    resumed.fit()
    assert listener.heard[0] == ("start", 30)
    assert comparable(resumed.history) == comparable(straight.history)


def test_an_exception_in_a_callback_ends_the_run_and_the_end_is_told(tmp_path: Path) -> None:
    class Stop(Listener):
        def on_step(self, trainer: il.meta.Trainer, record: dict[str, Any]) -> None:
            if record["step"] == 3:
                raise KeyboardInterrupt

    stop = Stop()
    trainer = make_trainer(tmp_path, callbacks=[stop])
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert trainer.step == 3 and stop.heard[-1] == ("end", 3)


def test_an_object_with_one_event_is_a_callback() -> None:
    ends: list[int] = []
    make_trainer(None, callbacks=[types.SimpleNamespace(on_end=lambda trainer: ends.append(trainer.step))]).fit()
    assert ends == [60]


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (
            types.SimpleNamespace(on_epoch=print),
            "SimpleNamespace: no event is called on_epoch. The events are on_start",
        ),
        (print, "builtin_function_or_method: it hears no event"),
        (Listener, "the class Listener: make one"),
    ],
)
def test_what_would_never_be_called_is_refused(callback: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make_trainer(None, callbacks=[callback])


PAGE = (Path(__file__).parents[2] / "docs" / "tools.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


class Recorder(types.ModuleType):
    """A module whose functions keep what they are called with, also as methods of what they return."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def function(*args: Any, **settings: Any) -> Any:
            self.calls.append((name, args, settings))
            return self

        return function

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: Any) -> None:
        self.calls.append(("end_run", (), {}))


def run_blocks(*needles: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "__docs__"}
    for needle in ("def train(log)", *needles):
        (block,) = [block for block in BLOCKS if needle in block]
        exec(block, names)
    return names


@pytest.mark.parametrize(("package", "log"), [("mlflow", "log_metrics"), ("wandb", "log")])
def test_the_recipe_logs_every_step(package: str, log: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Recorder(package)
    monkeypatch.setitem(sys.modules, package, fake)
    run_blocks(f"# needs: {package}")
    logged = [(args[0], settings["step"]) for name, args, settings in fake.calls if name == log]
    assert [step for _, step in logged] == [0, 1, 2, 3, 4]
    assert all({"loss", "layer/relative_distance"} <= set(numbers) for numbers, _ in logged)


def test_the_recipe_of_the_trainer_logs_steps_validations_and_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Recorder("mlflow")
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    callback = run_blocks("class ToMLflow")["ToMLflow"]()
    make_trainer(tmp_path, callbacks=[callback]).fit()
    names = [name for name, _, _ in fake.calls]
    assert names[0] == "start_run" and names[-1] == "end_run" and "log_artifact" in names
    assert names.count("log_metrics") == 60 + 10  # steps and validations
