"""Write the page "Reproducing the paper" from result files; no number on it is typed by hand.

python examples/paper/report.py                                   from the committed results to runs/paper/paper.md
python examples/paper/report.py --results runs/paper              from those of `make paper-cpu`
python examples/paper/report.py --output docs/paper.md            refresh the committed page
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from _results import COMMITTED, OUTPUT_DIR, load_result
from _tables import DATASETS, METHODS, Table, load_results, markdown, meta_steps
from table2 import TABLE as TABLE_2
from table3 import TABLE as TABLE_3

HEAD = """# Reproducing the paper

[Rajeswaran, Finn, Kakade, Levine, *Meta-Learning with Implicit Gradients*, NeurIPS 2019](https://arxiv.org/abs/1909.04630):
its figures and tables, one command each. This page is written by `examples/paper/report.py` from the result files in
`examples/paper/results/`; a test compares the two. What was not run says "not run"; what was run in a reduced setting
stands in a column of its own and is not compared with the paper's numbers.

```text
make paper-cpu                     all of it on a CPU, reduced, at most 25 minutes on two cores; results in runs/paper/
make paper-cpu DATA=<folder>       on real data: a folder with omniglot/ and mini_imagenet/ (docs/data.md says how)
make paper-cpu REFRESH=1           into examples/paper/results/, and this page anew
```

Every cell of the tables has presets, `paper-...` (the paper's setting), `reduced-...` and, on Omniglot, `cpu-...` (the
paper's network, data and inner problem, with the meta-batch and the outer rate that hours of one CPU core allow) and,
for iMAML with gradient descent, `released-...` (the settings of the authors' code, but solving the paper's system):

```text
python examples/paper/train.py --help                               all presets
python examples/paper/train.py paper-omniglot-5w1s-imaml-gd --help  its settings, and what the paper leaves open
python examples/paper/train.py paper-omniglot-5w1s-imaml-gd --data.dir <folder> --run.device cuda --run.minutes 5
python examples/paper/train.py --resume <run folder>                go on after Ctrl-C, a crash or a power cut
torchrun --nproc-per-node 4 examples/paper/train.py ...             tasks shared among processes
```

MAML with Nesterov's steps is `--method.inner-momentum 0.9` (say) on a preset of maml; truncated back-propagation has
presets of its own, since the paper's tables have no such row.

A run leaves a folder: `config.json`, `versions.json`, `metrics.jsonl`, `checkpoint.pt`, `best.pt`, `results.json` and
two pictures. Accuracies are means over test tasks, ± 1.96 standard errors; classes are split by stored names before
anything is drawn, and no test class is looked at before the one evaluation at the end. They are transductive, like
those of the authors' released code (the paper does not say): the query pictures of a task share batch statistics.
`--evaluation.no-transductive` takes one at a time. A gap's ± is that of the difference of two independent means.
"""
SMALL = {
    "fig2a": ("Figure 2(a): accuracy of the meta-gradient", "examples/paper/fig2a.py"),
    "fig2b": ("Figure 2(b): memory and time", "examples/paper/fig2b.py"),
    "table1": ("Table 1: growth of compute, memory and error", "examples/paper/table1.py"),
    "stability": ("Why the inner step is searched", "examples/paper/stability.py"),
}
LARGE = {
    "table2": (TABLE_2, "Table 2: Omniglot", "examples/paper/table2.py"),
    "table3": (TABLE_3, "Table 3: mini-ImageNet", "examples/paper/table3.py"),
}


def page(results: Path, figures: str) -> str:
    """The page.

    Args:
        results: folder of the result files.
        figures: where the page finds the pictures: a path from its own folder to ``results``.
    """
    parts, sources = [HEAD], []
    for name, (title, script) in SMALL.items():
        path = results / f"{name}.json"
        found = load_result(path) if path.exists() else None
        parts.append("\n".join([f"## {title}", "", f"`python {script}`", "", *small(found, figures)]))
        sources += [found] if found else []
    for table, title, script in LARGE.values():
        parts.append("\n".join([f"## {title}", "", f"`python {script}`", "", *large(table, results, figures)]))
        sources += load_results(results, table)
    parts.append("\n".join(["## Where the numbers are from", "", *origins(sources)]))
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def small(found: dict[str, Any] | None, figures: str) -> list[str]:
    """A figure or Table 1: setting, picture, table, what holds and what does not."""
    if found is None:
        return ["Not run."]
    results, setting = found["results"], found["setting"]
    lines = ["The paper's setting." if setting == "paper" else f"{setting[:1].upper()}{setting[1:]}.", ""]
    lines += [f"![{found['name']}]({figures}/{figure})" for figure in found["figures"]]
    lines += ["", *results.get("table", []), ""]
    if "claims" in results:
        lines += ["| claim | | holds | measured |", "|---|---|---|---|"]
        lines += [
            f"| {row['claim']} | {row['unknowns']} unknowns | {verdict} | {row['measured']} |"
            for row in results["claims"]
            for verdict in ["yes" if row["holds"] else "**no**"]
        ]
    lines += ["", *(f"* {remark}" for remark in results.get("remarks", []))]
    return tidy(lines)


def large(table: Table, results: Path, figures: str) -> list[str]:
    """Table 2 or 3, and what its reduced column is."""
    found = load_results(results, table)
    lines = [*markdown(table, found), ""]
    reduced = sorted({entry["results"].get("dataset", "") for entry in found if is_reduced(entry)} - {""})
    if reduced:
        where = " and ".join(DATASETS[name] for name in reduced)
        lines.append(f"The reduced column is on {where}, with settings that the list below names.")
    if "glyphs" in reduced:
        lines.append(table.stand_in)
    for entry in found:
        if entry["setting"].startswith("cpu"):
            lines += ["", *long_run(entry, figures)]
    lines += [order(found, name) for name in reduced]
    return tidy(lines)


def long_run(entry: dict[str, Any], figures: str) -> list[str]:
    """A run of hours on a CPU: how long, its curve, and where its weights are."""
    results, name = entry["results"], entry["name"]
    words = f"{name}: {entry['setting'].removeprefix('cpu: ')}; {meta_steps(results['meta_steps'])}"
    weights = f"weights of the best validation: `examples/paper/results/{name}.pt`, a plain state dict."
    return [f"{words}; {weights}", "", *(f"![{name}]({figures}/{figure})" for figure in entry["figures"])]


def is_reduced(result: dict[str, Any]) -> bool:
    return str(result["setting"]).startswith("reduced")


def order(found: list[dict[str, Any]], dataset: str) -> str:
    """Which method is ahead in each cell of the reduced setting: a small budget says little of the paper's."""
    best: dict[str, dict[str, Any]] = {}
    for result in (entry["results"] for entry in found if is_reduced(entry)):
        known = best.get(result["cell"])
        if result["dataset"] == dataset and (known is None or result["accuracy"] > known["accuracy"]):
            best[result["cell"]] = result
    ahead = ", ".join(f"{METHODS[result['method']]} at {cell}" for cell, result in sorted(best.items()))
    return f"Ahead within so small a budget, on {DATASETS[dataset]}: {ahead}."


def origins(sources: list[dict[str, Any]]) -> list[str]:
    """One row for each result file: its command, setting, machine, versions, seed and split."""
    if not sources:
        return ["No results are committed yet."]
    lines = ["| result | command | setting | machine, versions | seed, split |", "|---|---|---|---|---|"]
    for found in sources:
        machine, versions = found["machine"], found["versions"]
        processes = found["results"].get("processes", 1)
        where = f"{machine['gpu'] or machine['cpu']}, {several(machine['threads'], 'thread')}"
        where = f"{several(processes, 'process')} on {where}" if processes > 1 else where
        code = f"implicitlayer {versions['implicitlayer']}, torch {versions['torch']}, Python {versions['python']}"
        split = f", {found['split']}" if found["split"] else ""
        cells = [found["name"], f"`{found['command']}`", found["setting"], f"{where}; {code}; {versions['platform']}"]
        lines.append("| " + " | ".join([*cells, f"{found['seed']}{split}"]) + " |")
    return lines


def several(number: int, word: str) -> str:
    """``"1 thread"``, ``"2 threads"``, ``"2 processes"``."""
    plural = f"{word}es" if word.endswith("s") else f"{word}s"
    return f"{number} {word if number == 1 else plural}"


def tidy(lines: list[str]) -> list[str]:
    """Without blank lines at the end or one after another."""
    kept = [line for i, line in enumerate(lines) if line or (i and lines[i - 1])]
    return kept[:-1] if kept and not kept[-1] else kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--results", type=Path, default=COMMITTED, help="folder of result files (default: the committed)"
    )
    parser.add_argument("--output", type=Path, default=OUTPUT_DIR / "paper.md", help="default runs/paper/paper.md")
    parser.add_argument("--smoke", action="store_true", help="the same: it takes no time")
    options = parser.parse_args()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    figures = Path(os.path.relpath(options.results.resolve(), options.output.resolve().parent)).as_posix()
    try:
        text = page(options.results, figures)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    options.output.write_text(text, encoding="utf-8")
    print(f"{options.output}: {text.count('| not run |')} entries not run")


if __name__ == "__main__":
    main()
