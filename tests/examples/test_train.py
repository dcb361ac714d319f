"""The command line: presets and overrides, errors in one line, going on, and several processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tyro")
pytest.importorskip("matplotlib")
pytest.importorskip("PIL")

import experiments as ex
from experiments._command_line import main, parse

from implicitlayer.meta import Trainer

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    *("--network.num-filters", "4", "--outer.tasks-per-step", "3", "--run.max-steps", "2", "--run.minutes", "None"),
    *("--evaluation.validation-tasks", "2", "--evaluation.test-tasks", "5", "--evaluation.num-validations", "1"),
    *("--method.inner-steps", "2", "--data.num-query", "1", "--run.no-progress"),
]


def test_help_lists_every_preset(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--help"]):
        main(words)
        shown = capsys.readouterr().out
        assert all(f"    {name}\n" in shown for name in ex.PRESETS)


def test_settings_override_a_preset() -> None:
    words = ["--run.minutes", "5", "--run.device", "cuda", "--data.dir", "somewhere", "--outer.max-gradient-norm", "2"]
    experiment, resume = parse(["paper-omniglot-5w1s-imaml-gd", *words])
    assert (experiment.run.minutes, experiment.run.device, experiment.data.dir) == (5.0, "cuda", "somewhere")
    assert experiment.outer.max_gradient_norm == 2.0 and not resume
    assert experiment.method == ex.preset("paper-omniglot-5w1s-imaml-gd").method
    assert experiment.notes == ex.preset("paper-omniglot-5w1s-imaml-gd").notes


def test_the_command_of_a_changed_experiment_gives_it_back() -> None:
    words = ["glyphs", "--run.minutes", "1.5", "--evaluation.no-transductive", "--outer.max-gradient-norm", "None"]
    experiment, _ = parse(words)
    again, _ = parse(ex.command_of(experiment).split()[2:])
    assert again == experiment and again != ex.preset("glyphs")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing"], "preset='nothing' is none of the"),
        (["--run.minutes", "5"], "--run.minutes: a preset comes first, then its settings"),
        (["--resume"], "--resume takes a run folder: --resume RUN"),
        (["--resume", "--run.minutes", "5"], "--resume takes a run folder: --resume RUN"),
        (["--resume", "nowhere"], "--resume nowhere: there is no config.json, so this is no run folder"),
        (["paper-omniglot-5w1s-maml", "--data.dir", "nowhere"], "No Omniglot in nowhere"),
        (["glyphs", "--data.num-ways", "99"], "num_ways=99 must not exceed the 80 classes"),
        (["glyphs", "--run.dir", "a-file"], "a-file.config.json could not be written"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a-file").touch()
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        main(words)
    assert [path.name for path in tmp_path.iterdir()] == ["a-file"], "a run folder was made for a run that never began"


@pytest.mark.parametrize("name", ["omniglot", "miniimagenet"])
def test_a_missing_dataset_comes_with_the_option_that_names_its_folder(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("IMPLICITLAYER_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(
        SystemExit, match=r"^error: .* IMPLICITLAYER_DATA\. Here root= is data\.dir .* --data\.dir FOLDER"
    ):
        main([f"reduced-{name}-5w1s-maml", "--run.dir", str(tmp_path / "run")])


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["--data.num-ways", "five"], "five"),
        (["--data.dataset", "mnist"], "mnist"),
        (["--data.nothing", "1"], "data.nothing"),
        (["--data.num-ways", "1"], "num_ways=1 must be at least 2"),
    ],
)
def test_what_the_parser_refuses_is_named(words: list[str], shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(["glyphs", *words])
    assert stopped.value.code == 2 and shown in capsys.readouterr().err


def test_help_of_a_preset_shows_its_notes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(["released-omniglot-5w1s-imaml-gd", "--help"])
    assert stopped.value.code == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "the released code solves (2I + H/12)" in shown and "--method.strength" in shown


def test_without_tyro_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tyro", None)
    with pytest.raises(ImportError, match=r"pip install 'implicitlayer\[examples\]'"):
        parse(["glyphs"])


def test_a_run_goes_on_by_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    main(["reduced-glyphs-5w1s-fomaml", *TINY, "--run.dir", str(folder)])
    first = capsys.readouterr().out
    assert "on 5 tasks (glyphs test, 150 classes; transductive), after 2 meta-steps" in first
    folder = folder.rename(tmp_path / "moved")  # the folder is what it is called now
    main(["--resume", str(folder)])
    assert capsys.readouterr().out == first
    (folder / "results.json").unlink()
    main(["--resume", str(folder), "--run.tasks-per-chunk", "1"])  # how memory is used changes no result
    assert "after 2 meta-steps" in capsys.readouterr().out and (folder / "results.json").exists()
    with pytest.raises(SystemExit, match=r"^error: .*another experiment \(run\.seed: 0 there, 1 here\)"):
        main(["--resume", str(folder), "--run.seed", "1"])


@pytest.mark.parametrize("said", ["stopped after step 7; the checkpoint holds it", ""])
def test_ctrl_c_says_how_to_go_on(said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In training the trainer says what it kept; an interrupt elsewhere, in the test say, comes without a word."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt(*[said] if said else [])

    monkeypatch.setattr(Trainer, "fit", stop)
    with pytest.raises(
        SystemExit, match=rf"^\n{said or 'stopped; the checkpoint holds'}.*\. Go on with: .* --resume '.*a run'$"
    ):
        main(["reduced-glyphs-5w1s-fomaml", *TINY, "--run.dir", str(tmp_path / "a run")])


def test_ctrl_c_before_the_run_has_nothing_to_go_on_with(monkeypatch: pytest.MonkeyPatch) -> None:
    from experiments import _command_line

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_command_line, "run", stop)
    with pytest.raises(SystemExit, match=r"^\nstopped before anything was computed$"):
        main(["glyphs"])


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.mark.parametrize(("launcher", "threads"), [(TORCHRUN, "1"), ([], "2")])
def test_two_processes_share_a_run(tmp_path: Path, launcher: list[str], threads: str) -> None:
    """Without a folder, by torchrun or by itself: one is made, written once, and the result is that of one process."""
    words = ["reduced-glyphs-5w1s-imaml-gd", *TINY]
    environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, *launcher, str(ROOT / "examples" / "paper" / "train.py"), *words],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("after 2 meta-steps") == 1
    (folder,) = (tmp_path / "runs").iterdir()
    assert result.stdout.count(f"run folder: runs/{folder.name}\n") == 1
    (start,) = json.loads((folder / "versions.json").read_text())["starts"]
    assert start["processes"] == 2
    shared = json.loads((folder / "results.json").read_text())
    main([*words, "--run.dir", str(tmp_path / "alone")])
    alone = json.loads((tmp_path / "alone" / "results.json").read_text())
    assert (shared["processes"], alone["processes"]) == (2, 1)
    # float32 sums in another order move theta by rounding; of 25 query pictures none lies so near a boundary
    assert shared["accuracy"] == alone["accuracy"] and shared["config"] == alone["config"]


def test_a_process_that_fails_ends_the_others_and_the_command(tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text(
        "import os, sys, time\n"
        "from experiments._launch import start\n"
        "if 'RANK' not in os.environ: sys.exit(start(2, sys.argv[1:]))\n"
        "if os.environ['RANK'] == '1': sys.exit(3)\n"
        "time.sleep(300)\n"
    )
    quick = "import experiments._launch as launch, runpy, sys; launch._PATIENCE = 0.1; sys.argv = sys.argv[1:]; "
    path = os.pathsep.join([str(ROOT), str(ROOT / "examples" / "paper")])
    started = subprocess.run(
        [sys.executable, "-c", quick + "runpy.run_path(sys.argv[0], run_name='__main__')", str(script)],
        env=os.environ | {"PYTHONPATH": path},
        timeout=120,
    )
    assert started.returncode == 3


@pytest.mark.parametrize("given", [["--processes"], ["--processes", "0"], ["--processes", "two"]])
def test_a_wrong_number_of_processes_is_told(given: list[str]) -> None:
    with pytest.raises(SystemExit, match=r"error: --processes .*at least 1"):
        main(["glyphs", *given])
