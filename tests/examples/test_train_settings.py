"""Settings: JSON and back, errors that name the field, and presets that say what the paper says."""

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import experiments as ex
import pytest
from experiments._command_line import parse


@pytest.mark.parametrize("name", ex.PRESETS)
def test_a_preset_comes_back_from_json_as_it_was(name: str, tmp_path: Path) -> None:
    experiment = ex.preset(name)
    experiment.save(tmp_path / "config.json")
    assert ex.Experiment.load(tmp_path / "config.json") == experiment
    assert experiment.preset == name


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            {"data": {"num_way": 5}},
            r"data\.num_way is no field of the configuration. Fields there: dataset, dir, num_ways",
        ),
        ({"nothing": 1}, r"nothing is no field of the configuration. Fields there: preset, setting"),
        ({"data": {"num_ways": "five"}}, r"data\.num_ways='five' must be an integer\."),
        ({"data": {"num_ways": True}}, r"data\.num_ways=True must be an integer\."),
        ({"data": {"num_ways": 5.0}}, r"data\.num_ways=5\.0 must be an integer\."),
        ({"run": {"minutes": "5"}}, r"run\.minutes='5' must be a number or none\."),
        ({"network": {"zero_head": 1}}, r"network\.zero_head=1 must be true or false\."),
        (
            {"data": {"dataset": "mnist"}},
            r"data\.dataset='mnist' must be one of 'glyphs', 'omniglot', 'miniimagenet'\.",
        ),
        ({"notes": "one"}, r"notes='one' must be a list of a string\."),
        ({"data": 3}, r"data=3 must be an object with named fields\."),
        ([], r"the configuration=\[\] must be an object with named fields\."),
        ({"data": {"num_ways": 1}}, r"data\.num_ways=1 must be at least 2\."),
        ({"outer": {"learning_rate": 0}}, r"outer\.learning_rate=0 must be more than 0\."),
        ({"method": {"strength": float("nan")}}, r"method\.strength=nan must be a finite number\."),
        ({"run": {"minutes": float("inf")}}, r"run\.minutes=inf must be a finite number\."),
        ({"method": {"inner_momentum": 1}}, r"method\.inner_momentum=1 must be at least 0 and less than 1\."),
        ({"method": {"inner_momentum": 0.5}}, r"method\.inner_momentum=0\.5 must be 0 for imaml-gd: only maml"),
        ({"run": {"max_steps": None}}, r"run\.max_steps and run\.minutes are both none: give one budget, or both\."),
        ({"method": {"strength": 0}}, r"method\.strength=0 must be positive for imaml-gd: theta acts through the"),
        (
            {"method": {"name": "truncated", "inner_steps": 3, "backward_steps": 4}},
            r"method\.backward_steps=4 must not exceed method\.inner_steps=3\. All of them are MAML's\.",
        ),
    ],
)
def test_a_wrong_configuration_is_refused_with_the_path_of_the_field(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ex.Experiment.from_dict(value)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"data": ')
    with pytest.raises(ValueError, match=r"config\.json: Expecting value"):
        ex.Experiment.load(path)
    path.write_text(json.dumps({"seed": 1}))
    with pytest.raises(ValueError, match=r"config\.json: seed is no field"):
        ex.Experiment.load(path)


def test_a_section_checks_itself_without_json() -> None:
    with pytest.raises(ValueError, match="num_shots=0 must be at least 1"):
        ex.Data(num_shots=0)


def test_an_unknown_preset_names_the_closest_ones() -> None:
    with pytest.raises(ValueError, match=r"none of the \d+ presets\. Did you mean .*paper-omniglot-5w1s-maml"):
        ex.preset("paper-omniglot-5w1s-mmaml")
    with pytest.raises(ValueError, match=r"presets\.  ?--help lists them"):
        ex.preset("?")


METHODS = ("imaml-gd", "imaml-hf", "maml", "fomaml", "reptile", "truncated")
TODAY = ("anil", "protonet")  # not in the paper
CELLS = {"5w1s": (5, 1), "5w5s": (5, 5), "20w1s": (20, 1), "20w5s": (20, 5)}


def test_there_is_a_preset_for_every_cell_of_the_paper() -> None:
    wanted = {f"paper-omniglot-{cell}-{m}" for cell in CELLS for m in METHODS}
    wanted |= {f"cpu-miniimagenet-5w1s-{m}" for m in ("imaml-gd", "maml")}
    wanted |= {f"cpu-omniglot-{cell}-{m}" for cell in CELLS for m in (*METHODS, *TODAY) if m != "truncated"}
    wanted |= {f"paper-miniimagenet-5w1s-{m}" for m in METHODS}
    for data, cells in {"omniglot": CELLS, "glyphs": CELLS, "miniimagenet": {"5w1s"}}.items():
        wanted |= {f"reduced-{data}-{cell}-{m}" for cell in cells for m in (*METHODS, *TODAY)}
    wanted |= {f"released-omniglot-{cell}-imaml-gd" for cell in CELLS}
    assert set(ex.PRESETS) == wanted | {"glyphs"}


@pytest.mark.parametrize("name", [name for name in ex.PRESETS if name != "glyphs"])
def test_a_preset_is_what_its_name_says(name: str) -> None:
    experiment = ex.preset(name)
    setting, dataset, cell, method = name.split("-", 3)
    assert (experiment.data.num_ways, experiment.data.num_shots) == CELLS[cell]
    assert (experiment.setting, experiment.data.dataset, experiment.method.name) == (setting, dataset, method)
    assert experiment.notes, "what was chosen or departs from the source is not said"


# (inner steps, lambda, CG steps) of the captions of tables 2 and 3; the number of Newton steps is not given there
@pytest.mark.parametrize(
    ("name", "steps", "strength"),
    [
        ("paper-omniglot-5w1s-imaml-gd", 16, 2.0),
        ("paper-omniglot-20w5s-imaml-gd", 25, 2.0),
        ("released-omniglot-20w1s-imaml-gd", 25, 2.0),
        ("paper-omniglot-5w5s-imaml-hf", None, 2.0),
        ("paper-miniimagenet-5w1s-imaml-gd", 10, 0.5),
        ("paper-miniimagenet-5w1s-imaml-hf", None, 0.5),
    ],
)
def test_the_papers_numbers_are_in_the_presets(name: str, steps: int | None, strength: float) -> None:
    method = ex.preset(name).method
    assert method.strength == strength and method.cg_steps == 5 and method.newton_cg_steps == 5
    assert method.inner_steps == steps or steps is None


def test_the_command_of_an_experiment_names_what_differs_from_its_preset() -> None:
    experiment = ex.preset("reduced-glyphs-5w1s-imaml-gd")
    changed = dataclasses.replace(
        experiment,
        network=dataclasses.replace(experiment.network, zero_head=False),
        run=dataclasses.replace(experiment.run, minutes=2.0, dir="/somewhere", tensorboard=True),
    )
    assert ex.command_of(changed) == (
        "python examples/paper/train.py reduced-glyphs-5w1s-imaml-gd --network.no-zero-head --run.minutes 2.0 "
        "--run.tensorboard"
    )
    assert ex.changes_from_preset(experiment) == []
    own = dataclasses.replace(experiment, preset="mine")
    assert ex.changes_from_preset(own) == ["no preset"] and "config.json" in ex.command_of(own)


COMMITTED = sorted((Path(__file__).resolve().parents[2] / "examples" / "paper" / "results").glob("table*-*.json"))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_the_command_of_a_committed_result_gives_its_experiment(path: Path) -> None:
    pytest.importorskip("tyro")
    result = json.loads(path.read_text(encoding="utf-8"))
    experiment, _ = parse(shlex.split(result["command"])[2:])
    assert ex.command_of(experiment) == result["command"]
    assert ex.changes_from_preset(experiment) == result["results"]["changed_from_preset"]


def test_a_preset_names_the_budget_that_it_has() -> None:
    for name, minutes, words in (
        ("glyphs", 3.0, "a budget of 3 minutes."),
        ("reduced-glyphs-5w1s-maml", 0.35, "a budget of 21 seconds."),
        ("reduced-miniimagenet-5w1s-maml", 0.6, "a budget of 36 seconds."),
    ):
        experiment = ex.preset(name)
        assert experiment.run.minutes == minutes and words in experiment.notes[0]
