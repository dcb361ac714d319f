"""Tables 2 and 3: a cell is a run that can go on, results of unlike settings are kept apart, the page is generated."""

import dataclasses
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("PIL")

import experiments

import implicitlayer as il

ROOT = Path(__file__).resolve().parents[2]
PAPER = ROOT / "examples" / "paper"


@pytest.fixture
def paper(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports the scripts of examples/paper, which import each other by name."""
    monkeypatch.syspath_prepend(PAPER)

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def result(cell: str = "5w1s", method: str = "imaml-gd", setting: str = "paper", **changes: Any) -> dict[str, Any]:
    results = {"table": "table2", "cell": cell, "method": method, "accuracy": 99.0, "interval": 0.12}
    results |= {"num_tasks": 1000, "transductive": True, "dataset": "omniglot", "meta_steps": 20000, "seconds": 300.0}
    results |= {"changed_from_preset": [], **changes}
    machine = {"cpu": "a CPU", "cores": 2, "threads": 2, "gpu": None}
    versions = {"implicitlayer": "0.1.0", "torch": "2", "python": "3", "platform": "Linux"}
    about = {
        "name": f"table2-{cell}-{method}",
        "setting": setting,
        "command": "python x",
        "seed": 3,
        "split": "a split",
    }
    return {**about, "machine": machine, "versions": versions, "figures": [], "results": results}


FAILED = {"failed": "the loss is nan", "dataset": "omniglot"}


def row(lines: list[str], start: str) -> list[str]:
    (line,) = (line for line in lines if line.startswith(start))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_paper_result_has_a_gap_and_a_reduced_one_has_none(paper: Any) -> None:
    table, markdown = paper("table2").TABLE, paper("_tables").markdown
    lines = markdown(table, [result(), result("20w1s", setting="reduced: less", dataset="glyphs", accuracy=90.0)])
    full, reduced = row(lines, "| 5w1s | iMAML, GD"), row(lines, "| 20w1s | iMAML, GD")
    # 99.0 - 99.16, and sqrt(0.12² + 0.35²) = 0.37
    assert full[2:] == [
        "99.16 ± 0.35",
        "99.00 ± 0.12 (Omniglot, 20,000 meta-steps, 5.0 min)",
        "-0.16 ± 0.37",
        "not run",
        "not run",
    ]
    assert reduced[3:] == ["not run", "not run", "not run", "90.00 ± 0.12 (Glyphs, 20,000 meta-steps, 5.0 min)"]
    # four columns of 20 cells of the paper, and two of the 8 of methods that it does not have
    assert sum(line.count("not run") for line in lines) == 4 * 20 + 2 * 8 - 3


def test_hours_of_a_cpu_stand_in_a_column_of_their_own(paper: Any) -> None:
    table, markdown = paper("table2").TABLE, paper("_tables").markdown
    (cells,) = [row(markdown(table, [result(setting="cpu: 16 tasks")]), "| 5w1s | iMAML, GD")]
    assert cells[3:] == ["not run", "not run", "99.00 ± 0.12 (Omniglot, 20,000 meta-steps, 5.0 min)", "not run"]


def test_a_run_of_hours_keeps_its_curve_and_its_weights(paper: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    words = "table2.py --smoke --setting cpu --cells 5w1s --methods imaml-gd --output-dir out --run-dir runs"
    monkeypatch.setattr(sys, "argv", words.split())
    paper("_tables").main(paper("table2").TABLE, "")
    (path,) = (tmp_path / "out" / "smoke").glob("*.json")
    assert path.stem == "table2-5w1s-imaml-gd-cpu-glyphs"
    assert json.loads(path.read_text())["figures"] == [f"{path.stem}.png"] and path.with_suffix(".png").exists()
    weights = torch.load(path.with_suffix(".pt"), weights_only=True)
    network = il.fewshot.conv4(5, num_filters=4)  # of the smoke setting
    assert {name: tuple(value.shape) for name, value in weights.items()} == network.shapes
    assert torch.isfinite(network(weights, torch.rand(5, 1, 28, 28))).all()


def test_what_was_changed_or_diverged_or_is_not_transductive_is_said(paper: Any) -> None:
    table, markdown = paper("table2").TABLE, paper("_tables").markdown
    changed = ["run.minutes: None there, 5.0 here"]
    lines = markdown(
        table,
        [
            result(changed_from_preset=changed, transductive=False),
            {**result(method="maml"), "results": {**FAILED, "cell": "5w1s", "method": "maml"}},
        ],
    )
    assert "5.0 min, not transductive; changed: run.minutes)" in row(lines, "| 5w1s | iMAML, GD")[3]
    assert row(lines, "| 5w1s | MAML")[3:5] == ["diverged (Omniglot)", "not run"]


def test_the_papers_numbers_are_those_of_its_tables(paper: Any) -> None:
    two, three = paper("table2").TABLE.paper, paper("table3").TABLE.paper
    assert [[*two[method].values()] for method in ("maml", "fomaml", "reptile", "imaml-gd", "imaml-hf")] == [
        ["98.7 ± 0.4", "99.9 ± 0.1", "95.8 ± 0.3", "98.9 ± 0.2"],
        ["98.3 ± 0.5", "99.2 ± 0.2", "89.4 ± 0.5", "97.9 ± 0.1"],
        ["97.68 ± 0.04", "99.48 ± 0.06", "89.43 ± 0.14", "97.12 ± 0.32"],
        ["99.16 ± 0.35", "99.67 ± 0.12", "94.46 ± 0.42", "98.69 ± 0.1"],
        ["99.50 ± 0.26", "99.74 ± 0.11", "96.18 ± 0.36", "99.14 ± 0.1"],
    ]
    assert all([*cells] == ["5w1s", "5w5s", "20w1s", "20w5s"] for cells in two.values())
    wanted = {"maml": "48.70 ± 1.84", "fomaml": "48.07 ± 1.75", "reptile": "49.97 ± 0.32"}
    wanted |= {"imaml-gd": "48.96 ± 1.84", "imaml-hf": "49.30 ± 1.88"}
    assert {method: cells["5w1s"] for method, cells in three.items()} == wanted


def test_a_result_file_says_where_it_is_from(paper: Any, tmp_path: Path) -> None:
    results = paper("_results")
    path = results.save_result(
        *(tmp_path, "one"),
        setting="reduced: less of it",
        command="python a.py --data-dir /somewhere/data --seed 1",
        seed=1,
        results={"x": float("nan"), 2: (1, float("-inf"))},
        figures=[tmp_path / "one.png"],
    )
    written = json.loads(path.read_text())
    assert written["command"] == "python a.py --data-dir <folder> --seed 1" and written["figures"] == ["one.png"]
    assert written["results"] == {"x": "nan", "2": [1, "-inf"]}
    assert set(written["machine"]) == {"cpu", "cores", "threads", "gpu"} and "torch" in written["versions"]
    for setting in ("small", "reduced: ", "ours"):
        with pytest.raises(
            ValueError, match=f"setting='{setting}' must be 'paper', or 'cpu: ', 'reduced: ' or 'ours: '"
        ):
            results.save_result(tmp_path, "two", setting=setting, command="", seed=0, results={})


@pytest.fixture
def tiny_table(paper: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``main`` of table 2 for one cell of six meta-steps, with the preset at smoke size, in an empty folder."""
    tables = paper("_tables")
    monkeypatch.chdir(tmp_path)
    original = experiments.smoke(experiments.preset("reduced-omniglot-5w1s-fomaml"))
    small = dataclasses.replace(original, run=dataclasses.replace(original.run, max_steps=6, minutes=9.0))
    monkeypatch.setattr(tables.experiments, "preset", lambda name: small)

    def main(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["table2.py", "--cells", "5w1s", "--methods", "fomaml", *arguments])
        tables.main(paper("table2").TABLE, "")

    return main


CELL = "table2-5w1s-fomaml-reduced-glyphs"


def test_a_finished_cell_is_not_run_again(tiny_table: Any, tmp_path: Path, capsys: Any) -> None:
    tiny_table()
    path = tmp_path / "runs" / "paper" / f"{CELL}.json"
    written = json.loads(path.read_text())
    assert written["results"]["meta_steps"] == 6 and written["results"]["transductive"] is True
    assert written["setting"].startswith("reduced: 4 filters") and written["split"] == "glyphs test, 150 classes"
    assert "reduced-omniglot-5w1s-fomaml --data.dataset glyphs" in written["command"]
    checkpoint = tmp_path / "runs" / "paper" / "cells" / f"{CELL}-seed0" / "checkpoint.pt"
    when = checkpoint.stat().st_mtime_ns
    capsys.readouterr()
    tiny_table()
    assert checkpoint.stat().st_mtime_ns == when and json.loads(path.read_text()) == written
    assert (tmp_path / "runs" / "paper" / "cells" / "table2.md").read_text() in capsys.readouterr().out
    tiny_table("--seed", "1")  # another run folder
    tiny_table("--minutes-per-cell", "8")  # a budget may change; here six meta-steps are the first to be used up
    assert json.loads((checkpoint.parent / "config.json").read_text())["run"]["minutes"] == 8.0
    assert json.loads(path.read_text())["results"]["meta_steps"] == 6


def test_an_unfinished_cell_goes_on(tiny_table: Any, paper: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """What a killed run leaves is made by hand here: config.json and the checkpoint of its third step."""
    tables = paper("_tables")
    monkeypatch.setattr(sys, "argv", ["table2.py"])
    options = tables.read_arguments(paper("table2").TABLE, "")
    experiment = tables.experiment_for(paper("table2").TABLE, "5w1s", "fomaml", options)
    folder = Path(experiment.run.dir)
    experiment.save(folder / "config.json")
    experiments.build_trainer(experiment, run_dir=folder).fit(until=0.5)
    tiny_table()
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6] and (folder / "results.json").exists()


def test_ctrl_c_ends_with_a_sentence(tiny_table: Any, paper: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt("stopped after step 2")

    monkeypatch.setattr(paper("_tables").experiments, "run", stop)
    with pytest.raises(SystemExit, match=r"no finished cell is lost\. The same command goes on"):
        tiny_table()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cells", "6w1s"], "'6w1s' is none of 5w1s, 20w1s, 5w5s, 20w5s"),
        (["--methods", "maml,sgd"], "'sgd' is none of imaml-gd"),
        (["--minutes-per-cell", "0"], "0 must be positive and finite"),
        (["--minutes-per-cell", "inf"], "inf must be positive and finite"),
        (["--seed", "-1"], "-1 must be at least 0"),
        (["--device", "tpu"], "'tpu' must be cpu, cuda or cuda:<number>"),
        (["--data-dir", "nowhere"], "error: No Omniglot in nowhere"),
    ],
)
def test_wrong_arguments_are_refused(
    arguments: list[str], message: str, paper: Any, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["table2.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        paper("_tables").main(paper("table2").TABLE, "")
    assert message in capsys.readouterr().err + str(stopped.value)


@pytest.mark.parametrize("script", ["_tables", "fig2b"])
def test_a_gpu_that_is_not_there_is_refused(script: str, paper: Any, monkeypatch: Any, capsys: Any) -> None:
    module = paper(script)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["script", "--device", "cuda"])
    arguments = (paper("table2").TABLE, "") if script == "_tables" else ()
    with pytest.raises(SystemExit):
        module.read_arguments(*arguments)
    assert "sees no GPU here. Leave the option out" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(sys, "argv", ["script", "--device", "cuda:1"])
    assert module.read_arguments(*arguments).setting == "paper"
    monkeypatch.setattr(sys, "argv", ["script", "--device", "cuda:2"])
    with pytest.raises(SystemExit):
        module.read_arguments(*arguments)
    assert "cuda:2: there are 2 GPUs, numbered from 0" in capsys.readouterr().err


def test_data_that_fig2b_does_not_find_is_one_line(paper: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["fig2b.py", "--data-dir", "nowhere"])
    with pytest.raises(SystemExit, match=r"^error: No Omniglot in nowhere"):
        paper("fig2b").main()


def test_a_run_stopped_short_of_the_papers_setting_says_how_far_it_got(paper: Any) -> None:
    table, markdown = paper("table2").TABLE, paper("_tables").markdown
    lines = markdown(table, [result(meta_steps=3, planned_meta_steps=20_000, changed_from_preset=["run.minutes: x"])])
    assert "(Omniglot, 3 of 20,000 meta-steps, 5.0 min; changed: run.minutes)" in row(lines, "| 5w1s | iMAML, GD")[3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"name": ', r"table2-x\.json is no JSON \(.*\)\. Remove it, or make it anew"),
        ("[]", r"table2-x\.json is no result file: it has no name, setting, "),
        ('{"name": "x", "setting": "paper"}', r"table2-x\.json is no result file: it has no command, seed, "),
    ],
)
def test_a_damaged_result_file_is_named(
    text: str, message: str, paper: Any, tiny_table: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "runs" / "paper"
    folder.mkdir(parents=True)
    (folder / "table2-x.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        paper("_results").load_result(folder / "table2-x.json")
    monkeypatch.setattr(sys, "argv", ["report.py", "--results", str(folder)])
    with pytest.raises(SystemExit, match=rf"^error: .*{message}"):
        paper("report").main()
    with pytest.raises(SystemExit, match=rf"^error: .*{message}.* The cells of this call are finished and kept"):
        tiny_table()


def test_a_cell_that_diverges_is_a_result(paper: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = paper("_tables")
    monkeypatch.setattr(sys, "argv", ["table2.py", "--smoke", "--output-dir", str(tmp_path)])
    options = tables.read_arguments(paper("table2").TABLE, "")
    options.run_dir = tmp_path / "cells"
    experiment = tables.experiment_for(paper("table2").TABLE, "5w1s", "maml", options)

    def diverge(*_: Any, **__: Any) -> None:
        raise tables.il.NonFiniteError("the query loss is nan")

    monkeypatch.setattr(tables.experiments, "run", diverge)
    written = tables.run_cell(paper("table2").TABLE, "5w1s", "maml", experiment, options)
    assert written["results"]["failed"] == "the query loss is nan" and tables.in_words(written["results"]) == "diverged"
    page = paper("report").page(options.output_dir, "figures")
    assert "| diverged (Glyphs) |" in page and "| 0 |\n" in page  # the seed, and no split


@pytest.mark.slow
def test_all_of_it_runs_in_the_smoke_setting(paper: Any, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fig2b.py", "--smoke", "--output-dir", "out"])
    paper("fig2b").main()
    for script in ("table2", "table3"):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", "--smoke", "--output-dir", "out", "--run-dir", "runs"])
        paper("_tables").main(paper(script).TABLE, "")
    folder = tmp_path / "out"
    fig2b = json.loads((folder / "fig2b.json").read_text())
    assert fig2b["setting"] == "reduced: a smoke run" and (folder / "fig2b.png").stat().st_size > 10_000
    assert fig2b["results"]["fits"]["iMAML"]["memory_growth"] < 1.05 < fig2b["results"]["fits"]["MAML"]["memory_growth"]
    assert "\n".join(fig2b["results"]["table"]) in capsys.readouterr().out
    for table in ("table2", "table3"):
        written = [json.loads(path.read_text()) for path in (folder / "smoke").glob(f"{table}-*.json")]
        assert sorted(found["results"]["method"] for found in written) == sorted(paper("_tables").METHODS)
        assert {found["setting"] for found in written} == {"reduced: a smoke run, one meta-step"}
    monkeypatch.setattr(sys, "argv", ["report.py", "--results", "out/smoke", "--output", "out/page.md"])
    paper("report").main()
    page = (folder / "page.md").read_text()
    assert page.count("(Glyphs, 1 meta-step,") == 14 and "this is not mini-ImageNet" in page


def test_the_lines_of_fig2b_are_least_squares(paper: Any) -> None:
    exact = paper("fig2b").line([1, 2, 4], [5.0, 7.0, 11.0])
    assert exact == pytest.approx({"constant": 3, "slope": 2, "r2": 1}, abs=1e-12)  # some roundings of numbers below 11
    # y = 0, 1, 0 at x = 0, 1, 2: the best line is flat at 1/3 and explains nothing
    assert paper("fig2b").line([0, 1, 2], [0, 1, 0]) == pytest.approx(
        {"constant": 1 / 3, "slope": 0, "r2": 0}, abs=1e-12
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"iMAML": [10, 11]}, "iMAML's memory is not flat: it varies by a factor of 1.100"),
        ({"FOMAML": [10, 12]}, "FOMAML's memory is not flat"),
        ({"MAML": [10, 10]}, "MAML's memory does not grow"),
        ({"MAML": [10, 20, 60]}, "MAML's memory is not linear"),
        ({"slow": True}, "MAML's time does not grow fastest"),
    ],
)
def test_fig2b_fails_where_a_claim_fails(changes: dict[str, Any], message: str, paper: Any) -> None:
    fig2b = paper("fig2b")
    memory = {"iMAML": [10, 10], "FOMAML": [10, 10], "MAML": [10, 20], **changes}
    seconds = {"iMAML": 3.0 if changes.get("slow") else 1.0, "FOMAML": 0.5, "MAML": 2.0}  # for each step
    rows = [
        {"method": name, "steps": 1 + step, "peak_bytes": peak, "least": seconds[name] * (1 + step)}
        for name in seconds
        for step, peak in enumerate(memory[name])
    ]
    with pytest.raises(AssertionError, match=message):
        fig2b.check(rows, fig2b.fit_all(rows), fig2b.REDUCED)


def test_the_committed_page_is_what_the_committed_results_give(paper: Any) -> None:
    made = paper("report").page(PAPER / "results", "../examples/paper/results")
    assert made == (ROOT / "docs" / "paper.md").read_text(encoding="utf-8"), (
        "docs/paper.md has drifted: python examples/paper/report.py --output docs/paper.md"
    )


def test_the_page_shows_every_result_with_its_command(paper: Any, tmp_path: Path) -> None:
    report = paper("report")
    empty = report.page(tmp_path, "figures")
    assert empty.count("Not run.") == 4 and "No results are committed yet." in empty
    figure = {
        **result(setting="ours: the paper names none"),
        "name": "fig2a",
        "figures": ["fig2a.png"],
        "split": None,
        "results": {
            "table": ["| a | b |", "|---|---|", "| 1 | 2 |"],
            "claims": [{"claim": "It falls", "unknowns": 5, "holds": False, "measured": "it rises"}],
            "remarks": ["A remark."],
        },
    }
    (tmp_path / "fig2a.json").write_text(json.dumps(figure))
    (tmp_path / "table2-a.json").write_text(json.dumps(result()))
    (tmp_path / "table2-c.json").write_text(json.dumps(result("20w1s", setting="cpu: 16 tasks")))
    (tmp_path / "table2-b.json").write_text(json.dumps(result("5w5s", setting="reduced: x", dataset="glyphs")))
    page = report.page(tmp_path, "figures")
    for words in (
        *("Ours: the paper names none.", "![fig2a](figures/fig2a.png)", "| 1 | 2 |", "* A remark."),
        "| It falls | 5 unknowns | **no** | it rises |",
        "The reduced column is on Glyphs",
        "table2-20w1s-imaml-gd: 16 tasks; 20,000 meta-steps; weights of the best validation: ",
        "| table2-5w1s-imaml-gd | `python x` | paper | a CPU, 2 threads; implicitlayer 0.1.0, torch 2, Python 3; ",
        "| 3, a split |",
        "99.00 ± 0.12 (Omniglot, 20,000 meta-steps, 5.0 min)",
    ):
        assert words in page, words
    assert page.count("Not run.") == 3
