"""The demo, end to end in its smoke setting: every file it promises, and the command that resumes it."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
ROOT = Path(__file__).resolve().parents[2]


def run(*command: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "IMPLICITLAYER_DATA"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_demo_ends_with_its_table_picture_checkpoint_and_resume_command(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shown = run(sys.executable, "examples/demo.py", "--smoke", "--run-dir", str(run_dir))
    for words in ("iMAML, ", "0 CG steps", "untrained start", "chance", "20.0 %", "±"):
        assert words in shown
    assert (run_dir / "demo.png").stat().st_size > 10_000
    assert json.loads((run_dir / "config.json").read_text())["num_shots"] == 1
    results = json.loads((run_dir / "results.json").read_text())
    assert results["dataset"] == "Glyphs"
    assert {name: row["steps"] for name, row in results["accuracy"].items()} == {
        "iMAML": 4,
        "FOMAML": 4,
        "untrained start": 0,
    }
    command = shlex.split(shown.strip().splitlines()[-1])
    assert "--resume" in command
    again = run(*command)
    assert "iMAML: resumed at step 4" in again
    assert json.loads((run_dir / "results.json").read_text()) == results
