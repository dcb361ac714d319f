"""What every script of this folder writes: one JSON file a result, with all that is needed to believe or repeat it."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import implicitlayer as il
from implicitlayer.experiments import machine, versions

# Not the folder of the committed results: those are refreshed on purpose, with --output-dir examples/paper/results.
OUTPUT_DIR = Path("runs") / "paper"
COMMITTED = Path(__file__).resolve().parent / "results"


def save_result(
    output_dir: str | Path,
    name: str,
    *,
    setting: str,
    command: str,
    seed: int,
    results: Any,
    figures: Sequence[str | Path] = (),
    split: str | None = None,
    computed_on: dict[str, Any] | None = None,
) -> Path:
    """Write ``<output_dir>/<name>.json`` in one step: a killed process leaves the old file or the new one.

    Args:
        output_dir: folder, made where it is missing.
        name: of the file, without ``.json``.
        setting: ``"paper"``, or ``"reduced: "`` and what is reduced, in words.
        command: what repeats it, such as :func:`command_line` gives; absolute paths in it become ``<folder>``.
        seed: of everything random.
        results: numbers, strings, lists and dicts; NaN and infinities become the strings "nan", "inf" and "-inf".
        figures: pictures that belong to it; their names, relative to ``output_dir``, are kept.
        split: what classes the numbers are from, such as ``"omniglot test, 423 classes"``; None where there are none.
        computed_on: ``machine`` and ``versions`` of an earlier process that computed the results; None: this one's.

    Returns:
        The file.

    Raises:
        ValueError: ``setting`` is neither of the two.
    """
    if setting != "paper" and not (setting.startswith("reduced: ") and len(setting) > len("reduced: ")):
        raise ValueError(f"setting={setting!r} must be 'paper', or 'reduced: ' and in words what is reduced.")
    folder = Path(output_dir)
    value = {
        "name": name,
        "setting": setting,
        "command": portable(command),
        "seed": seed,
        "split": split,
        **({"machine": machine(), "versions": versions()} if computed_on is None else computed_on),
        "figures": [Path(figure).name for figure in figures],
        "results": readable(results),
    }
    path = folder / f"{name}.json"
    il.meta.save_json(path, value)
    return path


def command_line() -> str:
    """The command of this process as a reader would type it at the top of the project, without a machine's folders."""
    script = Path(sys.argv[0]).resolve()
    root = Path(__file__).resolve().parents[2]
    name = script.relative_to(root).as_posix() if script.is_relative_to(root) else script.name
    return portable(shlex.join(["python", name, *sys.argv[1:]]))


def portable(command: str) -> str:
    """``command`` with ``<folder>`` in place of every absolute path.

    >>> portable("python fig2b.py --data-dir /a/b --output-dir=/c --seed 1")
    'python fig2b.py --data-dir <folder> --output-dir=<folder> --seed 1'
    """
    words = []
    for word in command.split(" "):
        option, equals, value = word.partition("=")
        absolute = word.strip("'\"").startswith(("/", "~"))
        words.append("<folder>" if absolute else f"{option}=<folder>" if equals and value[:1] in "/~" else word)
    return " ".join(words)


def readable(value: Any) -> Any:
    """``value`` for JSON: keys become strings, and numbers that JSON does not have become words."""
    if isinstance(value, dict):
        return {str(key): readable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [readable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
