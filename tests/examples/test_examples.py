"""Every script of examples/ runs to its end in the smoke setting; each checks its own numbers. Times are not tested."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
# a file of benchopt/ is no script, but a solver that another suite runs
FILES = (p for p in EXAMPLES.rglob("*.py") if not p.name.startswith("_") and p.parent.name != "benchopt")
SCRIPTS = sorted(p.relative_to(EXAMPLES).as_posix() for p in FILES)
# tests/meta/test_demo.py and tests/examples/test_*.py run these and look at all that they write
ELSEWHERE = {"demo.py", *(script for script in SCRIPTS if script.startswith("paper/"))}


def run(script: str, *arguments: str, cwd: Path) -> str:
    """What the script prints; run from another folder, so that no path in it may lean on the current one."""
    environment = {name: value for name, value in os.environ.items() if name != "IMPLICITLAYER_DATA"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(EXAMPLES / script), "--smoke", *arguments]
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("script", [s for s in SCRIPTS if s not in ELSEWHERE])
def test_the_script_runs_to_its_end_and_prints_something(script: str, tmp_path: Path) -> None:
    if script == "benchmarks/meta_gradient.py":
        pytest.importorskip("matplotlib")  # renders glyphs
        pytest.importorskip("PIL")
    if script == "theory.py":
        pytest.importorskip("matplotlib")
        pytest.importorskip("tqdm")
    if script.startswith("gallery/"):
        pytest.importorskip("matplotlib")
    shown = run(script, cwd=tmp_path)
    assert shown.strip()
    if script == "theory.py":
        written = json.loads((tmp_path / "runs" / "theory" / "results.json").read_text())
        assert "\n".join(written["table"]) in shown and (tmp_path / "runs" / "theory" / "theory.png").exists()
    if script.startswith("gallery/"):
        assert (tmp_path / "runs" / script).with_suffix(".png").stat().st_size > 0
    if script == "benchmarks/meta_gradient.py":  # without its rival the table goes on, and says so
        installed = importlib.util.find_spec("torchopt") is not None
        assert ("left out: not installed" in shown) is not installed
        assert ("\nTorchOpt " in shown) is installed


def test_the_page_of_faults_shows_the_committed_answers_and_no_fault_is_silent_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = EXAMPLES / "benchmarks" / "peers_faults.py"
    spec = importlib.util.spec_from_file_location("peers_faults", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.syspath_prepend(str(script.parent))  # it imports the files beside it
    spec.loader.exec_module(module)
    answers = json.loads(script.with_suffix(".json").read_text())
    assert (ROOT / "docs" / "peers_faults.md").read_text() == module.page(answers)
    for name in ("il.qp", "il.argmin"):
        verdicts = {fault: row["verdict"] for fault, row in answers[name]["faults"].items()}
        assert set(verdicts.values()) == {"right", "told"}, verdicts


def test_the_page_on_the_theory_shows_the_numbers_of_the_committed_run() -> None:
    results = json.loads((EXAMPLES / "theory" / "results.json").read_text())
    page = (ROOT / "docs" / "theory.md").read_text()
    assert results["about"]["smoke"] is False
    assert "\n".join(results["table"]) in page  # as the script printed it
    prose = " ".join(page.split())  # the page breaks lines where it likes
    assert all(f"* {remark}" in prose for remark in results["remarks"])


def test_every_script_is_run_by_this_file_or_named_as_run_elsewhere() -> None:
    assert "demo.py" in SCRIPTS and "benchmarks/vmapped_layer.py" in SCRIPTS
    tests = ROOT / "tests"
    assert "examples/demo.py" in (tests / "meta" / "test_demo.py").read_text()
    words = "".join(path.read_text() for path in tests.glob("examples/test_*.py"))
    assert all(f'"{Path(script).stem}' in words for script in ELSEWHERE if script != "demo.py")
