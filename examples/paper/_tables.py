"""What tables 2 and 3 share: any cell by any method, each in its own run folder, and the table of what there is."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import experiments
import torch
from _results import OUTPUT_DIR, device_option, load_result, save_result

import implicitlayer as il

METHODS = {
    "imaml-gd": "iMAML, GD",
    "imaml-hf": "iMAML, Hessian-free",
    "maml": "MAML",
    "fomaml": "first-order MAML",
    "reptile": "Reptile",
    "anil": "ANIL",
    "protonet": "ProtoNet",
}
DATASETS = {"omniglot": "Omniglot", "miniimagenet": "mini-ImageNet", "glyphs": "Glyphs"}


@dataclasses.dataclass(frozen=True)
class Table:
    name: str
    title: str
    dataset: str
    cells: tuple[str, ...]
    stand_in: str  # a sentence on the characters that take the dataset's place where no folder is given
    paper: dict[str, dict[str, str]]  # method -> cell -> accuracy ± 95 %, both in per cent, as it is printed there


def main(table: Table, about: str) -> None:
    options = read_arguments(table, about)
    wanted = [(cell, method) for cell in options.cells for method in options.methods]
    started, budgets = time.perf_counter(), []
    for number, (cell, method) in enumerate(wanted, start=1):
        experiment = experiment_for(table, cell, method, options)
        before = time.perf_counter()
        found = run_cell(table, cell, method, experiment, options)
        budgets.append(time.perf_counter() - before)
        print(
            f"[{number}/{len(wanted)}] {cell} {METHODS[method]}: {in_words(found['results'])}"
            f"{eta(budgets, experiment, len(wanted) - number)}",
            flush=True,
        )
    try:
        lines = markdown(table, load_results(options.output_dir, table))
    except ValueError as error:
        raise SystemExit(f"error: {error} The cells of this call are finished and kept.") from None
    print("\n".join(["", *lines, "", f"{len(wanted)} cells in {(time.perf_counter() - started) / 60:.1f} minutes"]))
    (options.run_dir / f"{table.name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def experiment_for(table: Table, cell: str, method: str, options: Any) -> experiments.Experiment:
    """The preset of this cell, with what the command line changes."""
    replace = dataclasses.replace
    experiment = experiments.preset(f"{options.setting}-{table.dataset}-{cell}-{method}")
    if options.setting == "reduced" and options.data_dir is None:
        experiment = replace(experiment, data=replace(experiment.data, dataset="glyphs"))
    if options.smoke:
        experiment = experiments.smoke(experiment)
    minutes = options.minutes_per_cell or experiment.run.minutes
    folder = options.run_dir / f"{result_name(table, cell, method, experiment)}-seed{options.seed}"
    run = replace(experiment.run, dir=str(folder), seed=options.seed, minutes=minutes, device=options.device)
    return replace(experiment, data=replace(experiment.data, dir=options.data_dir), run=run)


def result_name(table: Table, cell: str, method: str, experiment: experiments.Experiment) -> str:
    dataset = "" if experiment.data.dataset == table.dataset else f"-{experiment.data.dataset}"
    return f"{table.name}-{cell}-{method}-{experiment.setting}{dataset}"


def run_cell(table: Table, cell: str, method: str, experiment: experiments.Experiment, options: Any) -> dict[str, Any]:
    """Run the cell, or go on with it, or take what is there; and write its result file."""
    name = result_name(table, cell, method, experiment)
    try:
        results = experiments.run(experiment, resume=True)
    except il.NonFiniteError as error:
        results = {"failed": str(error), "command": experiments.command_of(experiment), "split": None}
        results["dataset"] = experiment.data.dataset
    except (experiments.RunFolderError, experiments.PrecisionError, il.fewshot.DatasetError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("\nStopped; no finished cell is lost. The same command goes on.") from None
    keys = (
        *("accuracy", "interval", "num_tasks", "transductive", "dataset", "meta_steps", "seconds", "checkpoint"),
        *("validation_accuracy", "validation_step", "changed_from_preset", "processes", "peak_memory_bytes"),
        *("tf32_difference", "notes", "failed"),
    )
    kept = {key: results[key] for key in keys if key in results}
    attached = keep_training(experiment, options.output_dir, name) if experiment.setting == "cpu" else []
    path = save_result(
        options.output_dir,
        name,
        setting="paper" if experiment.setting == "paper" and not options.smoke else words_of(experiment, options),
        command=results["command"],
        seed=options.seed,
        split=results["split"],
        figures=attached[:1],
        results={
            "table": table.name,
            "cell": cell,
            "method": method,
            "planned_meta_steps": experiment.run.max_steps,
            **kept,
        },
        computed_on=None if "failed" in results else {key: results[key] for key in ("machine", "versions")},
    )
    written: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return written


def keep_training(experiment: experiments.Experiment, folder: Path, name: str) -> list[Path]:
    """Put the learning curve and the weights of the best validation, a plain state dict, beside the result file."""
    folder.mkdir(parents=True, exist_ok=True)
    run = Path(str(experiment.run.dir))
    curve, weights = folder / f"{name}.png", folder / f"{name}.pt"
    shutil.copyfile(run / "curves.png", curve)
    names = il.fewshot.conv4(experiment.data.num_ways).shapes  # in the order in which a trainer keeps them
    leaves = il.meta.load_checkpoint(run / "best.pt")["theta"]
    torch.save(dict(zip(names, leaves, strict=True)), weights)
    return [curve, weights]


def words_of(experiment: experiments.Experiment, options: Any) -> str:
    if options.smoke:
        return "reduced: a smoke run, one meta-step"
    if experiment.setting == "cpu":
        outer, data = experiment.outer, experiment.data
        shots = f" and {data.train_shots} training shots" if data.train_shots else ""
        same = "network and data" if experiment.method.name == "reptile" else "network, data and inner problem"
        return (
            f"cpu: the paper's {same}; {outer.tasks_per_step} tasks with {data.num_query} query pictures{shots} of "
            f"each class in a meta-step, outer rate {outer.learning_rate:g}, {experiment.run.minutes:g} minutes of "
            "training on one CPU core"
        )
    words = f"{experiment.network.num_filters} filters, meta-batch {experiment.outer.tasks_per_step}"
    words += f", {experiment.data.num_query} query pictures of each class, {experiment.method.inner_steps} inner steps"
    return f"reduced: {words}, {experiment.run.minutes:g} minutes of training"


def in_words(results: dict[str, Any]) -> str:
    if "failed" in results:
        return "diverged"
    return (
        f"{results['accuracy']:.2f} ± {results['interval']:.2f} % on {results['num_tasks']} test tasks "
        f"({DATASETS[results['dataset']]}), {meta_steps(results['meta_steps'])}"
    )


def eta(budgets: Sequence[float], experiment: experiments.Experiment, left: int) -> str:
    """Minutes left: what a cell took so far on average, or its budget where nothing was computed yet."""
    computed = [seconds for seconds in budgets if seconds > 1]  # a finished cell takes no time
    each = sum(computed) / len(computed) / 60 if computed else experiment.run.minutes
    return f"; {left} to go, about {left * each:.0f} minutes" if left and each is not None else ""


def load_results(folder: Path, table: Table) -> list[dict[str, Any]]:
    """All result files of the table in ``folder``; those of the table's own dataset first."""
    found = [load_result(path) for path in sorted(folder.glob(f"{table.name}-*.json"))]
    return sorted(found, key=lambda result: result["results"].get("dataset") != table.dataset)


def markdown(table: Table, found: Iterable[dict[str, Any]]) -> list[str]:
    """The table as lines of Markdown; what was not run says so, and other settings have columns of their own."""
    kept: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for result in found:
        key = (result["results"]["cell"], result["results"]["method"], result["setting"].split(":")[0])
        kept.setdefault(key, []).append(result)
    lines = [
        "| | | paper, % | here, the paper's setting, % | gap | here, the paper's problem in hours of one CPU core, % "
        "| here, reduced (another setting: not comparable), % |",
        "|---|---|---|---|---|---|---|",
    ]
    for cell in table.cells:
        for method, words in METHODS.items():
            printed = table.paper[method][cell] if method in table.paper else "not in the paper"
            full, hours, reduced = (kept.get((cell, method, which), []) for which in ("paper", "cpu", "reduced"))
            lines.append(
                f"| {cell} | {words} | {printed} | "
                f"{', '.join(map(shown, full)) or ('not run' if method in table.paper else '-')} | "
                f"{gap(full, printed)} | {', '.join(map(shown, hours)) or 'not run'} | "
                f"{', '.join(map(shown, reduced)) or 'not run'} |"
            )
    return lines


def shown(result: dict[str, Any]) -> str:
    results = result["results"]
    if "failed" in results:
        return f"diverged ({DATASETS[results['dataset']]})"
    where = f"{DATASETS[results['dataset']]}, {steps_of(result)}, {results['seconds'] / 60:.1f} min"
    how = "" if results["transductive"] else ", not transductive"
    changed = [line.split(":")[0] for line in results["changed_from_preset"]]
    if changed and result["setting"] == "paper":
        how += f"; changed: {', '.join(changed)}"
    return f"{results['accuracy']:.2f} ± {results['interval']:.2f} ({where}{how})"


def steps_of(result: dict[str, Any]) -> str:
    """Meta-steps made; where the paper's setting was stopped short of those of its preset, of how many."""
    made, planned = result["results"]["meta_steps"], result["results"].get("planned_meta_steps")
    short = result["setting"] == "paper" and planned is not None and made < planned
    return f"{made:,} of {planned:,} meta-steps" if short else meta_steps(made)


def meta_steps(count: int) -> str:
    return f"{count:,} meta-step{'' if count == 1 else 's'}"


def gap(full: Sequence[dict[str, Any]], printed: str) -> str:
    """Ours minus the paper's, with the interval of a difference of two independent means."""
    if " ± " not in printed:
        return "-"
    value, interval = map(float, printed.split(" ± "))
    parts = []
    for result in full:
        if "failed" not in result["results"]:
            ours, own = result["results"]["accuracy"], result["results"]["interval"]
            parts.append(f"{ours - value:+.2f} ± {math.hypot(own, interval):.2f}")
    return ", ".join(parts) or "not run"


def read_arguments(table: Table, about: str) -> Any:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)

    def several(allowed: Iterable[str]) -> Any:
        known = list(allowed)

        def read(text: str) -> list[str]:
            unknown = [word for word in text.split(",") if word not in known]
            if unknown:
                raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
            return text.split(",")

        return read

    def minutes(text: str) -> float:
        if not 0 < float(text) < math.inf:
            raise argparse.ArgumentTypeError(f"{text} must be positive and finite")
        return float(text)

    def seed(text: str) -> int:
        if int(text) < 0:
            raise argparse.ArgumentTypeError(f"{text} must be at least 0")
        return int(text)

    parser.add_argument("--cells", type=several(table.cells), help=f"of {','.join(table.cells)} (default all)")
    parser.add_argument("--methods", type=several(METHODS), help=f"of {','.join(METHODS)}")
    parser.add_argument("--setting", choices=["paper", "cpu", "reduced"], help="default: paper on cuda, reduced on cpu")
    parser.add_argument("--minutes-per-cell", type=minutes, help="of training; default: the preset's budget")
    parser.add_argument("--device", type=device_option, default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--data-dir", help=f"folder of {DATASETS[table.dataset]}; without it, Glyphs. {table.stand_in}")
    parser.add_argument("--output-dir", type=Path, default=OUTPUT_DIR, help=f"result files (default {OUTPUT_DIR})")
    parser.add_argument("--run-dir", type=Path, default=OUTPUT_DIR / "cells", help="run folders, for going on")
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--smoke", action="store_true", help="one meta-step of one cell, to see that it runs")
    options = parser.parse_args()
    options.setting = options.setting or ("reduced" if options.device == "cpu" else "paper")
    if options.cells is None:
        options.cells = list(table.cells[:1] if options.smoke else table.cells)
    if options.methods is None:
        options.methods = list(table.paper if options.setting == "paper" else METHODS)
    if options.smoke:  # beside the real ones, so that it neither overwrites them nor is taken for one
        options.data_dir = None
        options.output_dir, options.run_dir = options.output_dir / "smoke", options.run_dir / "smoke"
    return options
