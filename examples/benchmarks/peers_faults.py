"""How do other layers answer the same faults? One table of faults, run on every library that is installed.

    python examples/benchmarks/peers_faults.py [--smoke] [--output FILE] [--page FILE]

Programs: il.qp, CVXPYlayers, Moreau, ProxQP (QPLayer of proxsuite) and qpth. Layers around a solver: il.argmin, and
``custom_root`` of TorchOpt and of JAXopt. Each runs at its defaults, except that no message is switched off. A library
that is not installed is left out; what it answered where it was installed stays in FILE, so that one run in each
environment makes the whole table. FILE is examples/benchmarks/peers_faults.json by default (with --smoke: none), and
--page writes the Markdown page made of it.

An answer is "right" (x and the gradient within 1e-4 of a closed form), "told" (an error or a warning; its text is
kept), "silent" (a number and no word), or "not offered" (an error that says that a transform is not supported).
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from _peers_faults_programs import PROGRAM_FAULTS, PROGRAMS, SOUND, Answer
from _peers_faults_roots import ROOT_FAULTS, ROOTS

import implicitlayer as il

NEAR = 1e-4  # of an answer that counts as right, relative
SECONDS = 60  # for one answer
HERE = Path(__file__).resolve().parent
TRANSFORMS = ("vmap", "forward mode", "second derivative")


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"no answer after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def answer_of(ask: Callable[[], Answer], fault: str, usual: list[str]) -> dict[str, Any]:
    """What a layer does: the verdict, the numbers, and the words; those are not counted that it ``usual``ly says."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with limited(SECONDS):
                found, right = ask()
        except Exception as error:
            verdict = "not offered" if fault in TRANSFORMS or isinstance(error, NotImplementedError) else "told"
            return {"verdict": verdict, "text": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]}
    ignored = (DeprecationWarning, PendingDeprecationWarning, FutureWarning, ResourceWarning)
    words = [f"{w.category.__name__}: {' '.join(str(w.message).split())}" for w in caught]
    words = [text for w, text in zip(caught, words, strict=True) if not issubclass(w.category, ignored)]
    if fault == SOUND:  # a note on how the library works, for example
        usual += words
    words = [text for text in words if text not in usual]
    result: dict[str, Any] = {"numbers": [float(f"{v:.6g}") for v in found]}
    if right is not None:
        size = max(1.0, math.dist(right, [0.0] * len(right)))
        error = math.dist(found, right) / size
        result["error"] = error if math.isfinite(error) else None
        if error <= NEAR and not words:
            return result | {"verdict": "right"}
    return result | ({"verdict": "told", "text": words[0][:300]} if words else {"verdict": "silent"})


def answers(smoke: bool) -> dict[str, Any]:
    """Of every library that is installed."""
    found: dict[str, Any] = {}
    groups = (("programs", PROGRAMS, PROGRAM_FAULTS), ("layers around a solver", ROOTS, ROOT_FAULTS))
    for group, libraries, faults in groups:
        for name, (package, make) in libraries.items():
            if find_spec(package) is None:
                print(f"{name} is left out: {package} is not installed", file=sys.stderr)
                continue
            asked = dict(list(faults.items())[:2]) if smoke else faults
            # a layer around a solver is made once
            of = make if group == "programs" else make()  # type: ignore[operator, call-arg]
            rows, usual = {}, list[str]()
            for fault, ask in asked.items():
                rows[fault] = answer_of(lambda ask=ask, of=of: ask(of), fault, usual)  # type: ignore[misc]
            number = il.__version__ if package == "implicitlayer" else version(package)
            where = {"python": platform.python_version(), "torch": torch.__version__}
            found[name] = {"group": group, "package": package, "version": number, **where, "faults": rows}
            for fault, row in rows.items():
                print(f"{name:22} {fault:40} {row['verdict']:12} {row.get('text', row.get('numbers'))}"[:200])
    return found


def cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    if row["verdict"] == "told":
        kind = row["text"].split(":")[0]
        return f"{'warning' if kind.endswith('Warning') else 'error'}: `{kind}`"
    if row["verdict"] == "silent":
        if "error" in row:
            return f"no word, off by {row['error']:.0e}" if row["error"] is not None else "no word, NaN"
        finite = all(math.isfinite(v) for v in row["numbers"])
        return "no word, finite numbers" if finite else "no word, NaN or Inf"
    return str(row["verdict"])


def page(found: dict[str, Any]) -> str:
    lines = [
        "# How other layers answer the same faults",
        "",
        "Written by `python examples/benchmarks/peers_faults.py --page docs/peers_faults.md`, run once in each",
        "environment that holds some of these libraries; the numbers and the words of every answer are in",
        "`examples/benchmarks/peers_faults.json`.",
        "",
        "Each library runs at its defaults with no message switched off, on problems of two unknowns whose answer",
        "is known in closed form, or that have none. *Right*: within 1e-4 of the closed form, and nothing was said.",
        "*Error*, *warning*: by that name. *No word*: a number came back, and nothing was said; where an answer",
        "exists, how far it is off. *Not offered*: an error that says that this transform, or this problem, is not",
        "supported.",
        "",
        "Some of these libraries return a status beside x that a caller may look at, and some have options for a",
        "fault (`structural_feasibility=False` of ProxQP's layer solves the closest feasible program, as does",
        '`il.qp(infeasible="closest")`); what is looked at here is what a training loop sees at the defaults. An',
        "objective of `il.argmin` that caches is an error because it cannot be right. None of this says which is",
        "faster, or better at what it was made for: [the benchmarks](benchmarks.md) measure that.",
    ]
    for group, title in (("programs", "Quadratic programs"), ("layers around a solver", "Layers around a solver")):
        some = {name: entry for name, entry in found.items() if entry["group"] == group}
        lines += ["", f"## {title}", ""]
        lines += [f"| fault | {' | '.join(n + ' ' + e['version'] for n, e in some.items())} |"]
        lines += ["|---|" + "---|" * len(some)]
        for fault in next(iter(some.values()))["faults"]:
            lines.append(f"| {fault} | {' | '.join(cell(e['faults'].get(fault)) for e in some.values())} |")
    return "\n".join([*lines, ""])


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="two faults of each; nothing is written")
    parser.add_argument("--output", type=Path, default=HERE / "peers_faults.json")
    parser.add_argument("--page", type=Path, help="where to write the Markdown page")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = answers(options.smoke)
    if options.smoke:
        return found
    known = json.loads(options.output.read_text()) if options.output.exists() else {}
    order = [*PROGRAMS, *ROOTS]
    whole = {name: (known | found)[name] for name in order if name in known | found}
    options.output.write_text(json.dumps(whole, indent=1) + "\n")
    if options.page:
        options.page.write_text(page(whole), encoding="utf-8")
    return found


if __name__ == "__main__":
    main()
