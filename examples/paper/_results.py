"""What every script of this folder writes: one JSON file a result, with all that is needed to believe or repeat it."""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from experiments import machine, versions

import implicitlayer as il

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
    device: str = "cpu",
    computed_on: dict[str, Any] | None = None,
) -> Path:
    """Write ``<output_dir>/<name>.json`` in one step: a killed process leaves the old file or the new one.

    Args:
        output_dir: folder, made where it is missing.
        name: of the file, without ``.json``.
        setting: ``"paper"``; ``"reduced: "`` and what is reduced, in words; or, where the paper states none,
            ``"ours: "`` and what was chosen.
        command: what repeats it, such as :func:`command_line` gives; absolute paths in it become ``<folder>``.
        seed: of everything random.
        results: numbers, strings, lists and dicts; NaN and infinities become the strings "nan", "inf" and "-inf".
        figures: pictures that belong to it; their names, relative to ``output_dir``, are kept.
        split: what classes the numbers are from, such as ``"omniglot test, 423 classes"``; None where there are none.
        device: where they were computed.
        computed_on: ``machine`` and ``versions`` of an earlier process that computed the results; None: this one's.

    Returns:
        The file.

    Raises:
        ValueError: ``setting`` is none of these.
    """
    if setting != "paper" and not re.fullmatch(r"(cpu|reduced|ours): .+", setting):
        raise ValueError(
            f"setting={setting!r} must be 'paper', or 'cpu: ', 'reduced: ' or 'ours: ' and in words what that is."
        )
    folder = Path(output_dir)
    value = {
        "name": name,
        "setting": setting,
        "command": portable(command),
        "seed": seed,
        "split": split,
        **({"machine": machine(device), "versions": versions()} if computed_on is None else computed_on),
        "figures": [Path(figure).name for figure in figures],
        "results": readable(results),
    }
    path = folder / f"{name}.json"
    il.meta.save_json(path, value)
    return path


def load_result(path: Path) -> dict[str, Any]:
    """What :func:`save_result` wrote.

    Raises:
        ValueError: the file is no such result; the message names it.
    """
    remedy = "Remove it, or make it anew by the script that writes it."
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}). {remedy}") from None
    needed = ("name", "setting", "command", "seed", "split", "machine", "versions", "figures", "results")
    missing = [key for key in needed if not isinstance(found, dict) or key not in found]
    if missing:
        raise ValueError(f"{path} is no result file: it has no {', '.join(missing)}. {remedy}")
    result: dict[str, Any] = found
    return result


def read_options(description: str | None, argv: Sequence[str] | None, *, smoke: str) -> argparse.Namespace:
    """The command line of a script that needs no data and no device: smoke, output_dir, seed, and when it began.

    Args:
        description: the script's docstring.
        argv: the options; None: those of this process.
        smoke: what ``--smoke`` makes smaller, for ``--help``.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help=smoke)
    parser.add_argument("--output-dir", type=Path, default=OUTPUT_DIR, help="where numbers and picture go")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(began=time.perf_counter())
    return parser.parse_args(argv)


def save_with_picture(
    name: str, options: argparse.Namespace, *, setting: str, results: Any, draw: Callable[[Path], object]
) -> None:
    """Write ``<name>.png`` by ``draw(path)`` and ``<name>.json``, and say where they are and how long it took.

    Args:
        name: of both files, without ending.
        options: of :func:`read_options`.
        setting, results: as in :func:`save_result`.
        draw: writes the picture to a path.
    """
    options.output_dir.mkdir(parents=True, exist_ok=True)
    figure = options.output_dir / f"{name}.png"
    draw(figure)
    path = save_result(
        options.output_dir,
        name,
        setting=setting,
        command=command_line(),
        seed=options.seed,
        results=results,
        figures=[figure],
    )
    print(f"\n{time.perf_counter() - options.began:.0f} s; numbers in {path}, picture in {figure}")


def device_option(text: str) -> str:
    """The value of ``--device``, for argparse: cpu, or a GPU that torch sees here."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} must be cpu, cuda or cuda:<number>")
    if text != "cpu" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(
            f"{text}: torch {torch.__version__} sees no GPU here. Leave the option out, or give --device cpu"
        )
    number = int(text.partition(":")[2] or 0)
    if text != "cpu" and number >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"{text}: there are {torch.cuda.device_count()} GPUs, numbered from 0")
    return text


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
