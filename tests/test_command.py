"""The command `implicitlayer info`: what it prints, and what its exit code says."""

import importlib
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy
import pytest
import torch

import implicitlayer as il
from implicitlayer import __main__ as command
from tests.test_structure import BARE

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: str, before: str = "") -> "subprocess.CompletedProcess[str]":
    start = "runpy.run_module('implicitlayer', run_name='__main__')"
    code = f"{before}\nimport runpy, sys\nsys.argv[1:] = {arguments!r}\n{start}"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("before", ["", BARE], ids=["as it is", "torch and NumPy alone"])
def test_info_says_what_runs_here_and_that_a_gradient_is_right(before: str) -> None:
    result = run("info", before=before)
    assert result.returncode == 0, result.stderr
    rows = dict(line.split(None, 1) for line in result.stdout.splitlines())
    assert rows["implicitlayer"].startswith(il.__version__) and rows["torch"].startswith(torch.__version__)
    assert rows["NumPy"] == numpy.__version__ and rows["gradient"].startswith("right, relative error")


def test_a_wrong_gradient_is_told_and_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for error in (1e-3, float("nan")):
        monkeypatch.setattr(command, "gradient_error", lambda error=error: error)
        assert command.main(["info"]) == 1
        assert re.search(r"^gradient +WRONG, relative error", capsys.readouterr().out, flags=re.MULTILINE)


def test_extras_are_told_apart_by_whether_they_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    required = [
        "numpy",
        "hypothesis; extra == 'testing'",
        "never.heard-of[it]>=1.0; extra == 'odd'",
        "implicitlayer[x]; extra == 'y'",
        "tool-of-developers; python_version >= '3.11' and extra == 'dev'",
    ]
    monkeypatch.setattr(metadata, "requires", lambda _: required)
    version = metadata.version("hypothesis")
    assert command.extras() == {"extras": f"hypothesis {version}", "not installed": "never.heard-of"}


def test_a_tree_that_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", requires)
    assert command.extras() == {"extras": "unknown: run from a source tree that is not installed"}


def test_without_a_command_the_commands_are_named() -> None:
    result = run()
    assert result.returncode == 2 and "{info}" in result.stderr


def test_the_command_of_the_wheel_is_this_function() -> None:
    section = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[project.scripts]\n")[1]
    module, _, name = re.match(r'implicitlayer = "(.+)"\n', section)[1].partition(":")
    assert getattr(importlib.import_module(module), name) is command.main
