"""What does one meta-step of iMAML's trainer cost, in time and memory, against an earlier commit?

    python examples/benchmarks/training_step.py [--against COMMIT] [--smoke] [--rounds 5] [--output FILE.json]

Meta-steps of the paper's problem: Omniglot's sizes (embedded glyphs), 5-way 1-shot, 64 filters, strength 2, 16 inner
steps, 5 conjugate gradient steps, SGD outside, accuracy of the training tasks. Two meta-batches, each with a fixed
inner step size and with an Armijo line search. The earlier commit is read from this repository's history and run in
processes of its own, which take turns with those of the present code; both do the same work with fixed steps (checked
in float64 on a small case), while the searches of two commits may make different trials. One thread. Times are CPU
times, of which the least of all rounds counts; memory is what the largest resident set grows by once the data is there.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import implicitlayer as il

ROOT = Path(__file__).resolve().parents[2]
CASES = {
    "16 tasks x 5, fixed": {"tasks": 16, "query": 5, "search": None},
    "16 tasks x 5, Armijo": {"tasks": 16, "query": 5, "search": "armijo"},
    "32 tasks x 15, fixed": {"tasks": 32, "query": 15, "search": None},
    "32 tasks x 15, Armijo": {"tasks": 32, "query": 15, "search": "armijo"},
}
CHECK = {"tasks": 2, "query": 2, "search": None, "filters": 16, "steps": 2, "dtype": "float64"}


def cpu_name() -> str:
    """Of this machine; asked for here, as an earlier commit cannot run the experiments of today."""
    sys.path.append(str(ROOT / "examples" / "paper"))
    import experiments

    return str(experiments.machine()["cpu"])


class Tasks:
    """Glyphs in another precision."""

    def __init__(self, num_query: int, dtype: torch.dtype) -> None:
        self.sampler = il.fewshot.EpisodeSampler(il.fewshot.Glyphs(), num_query=num_query, seed=0)
        self.dtype = dtype

    def sample(self, num_tasks: int) -> Any:
        (images, labels), (query_images, query_labels) = il.meta.as_support_query(self.sampler.sample(num_tasks))
        return (images.to(self.dtype), labels), (query_images.to(self.dtype), query_labels)

    def state_dict(self) -> dict[str, Any]:
        return self.sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sampler.load_state_dict(state)


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Seconds of every meta-step but the first, MiB, and where the parameters ended. Any commit can run this."""
    torch.set_num_threads(1)
    dtype = getattr(torch, case.get("dtype", "float32"))
    network = il.fewshot.conv4(5, num_filters=case.get("filters", 64))

    def by_hand(params: Any, batch: Any) -> torch.Tensor:
        images, labels = batch
        return il.fewshot.task_cross_entropy(network(params, images), labels)

    def accuracy(params: Any, batch: Any) -> torch.Tensor:
        images, labels = batch
        return il.fewshot.task_accuracy(network(params, images), labels)

    known = getattr(il.fewshot, "ClassificationLoss", None)
    task_loss = by_hand if known is None else known(network)
    theta = network.init(torch.Generator().manual_seed(0), dtype=dtype)
    theta = {name: leaf.requires_grad_() for name, leaf in theta.items()}
    solver = il.solvers.GradientDescent(step_size=0.1, max_steps=16, line_search=case["search"])
    method = il.meta.iMAML(task_loss, solver, strength=2.0, linear_solver=il.ConjugateGradient(max_steps=5))
    sampler = Tasks(case["query"], dtype)
    sampler.sample(case["tasks"])  # fonts and pictures are read here
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times: list[float] = []
    trainer = il.meta.Trainer(
        method,
        theta,
        sampler,
        torch.optim.SGD(theta.values(), lr=0.1),
        tasks_per_step=case["tasks"],
        max_steps=case.get("steps", 4),
        metric=getattr(task_loss, "accuracy", accuracy),
        learning_rate=lambda done: times.append(time.process_time()) or 1.0,  # asked once in every step
        show_progress=False,
    )
    trainer.fit()
    steps = [after - start for start, after in zip(times[1:], [*times[2:], time.process_time()], strict=True)]
    mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    ended = torch.cat([leaf.detach().flatten() for leaf in theta.values()]).tolist() if "dtype" in case else None
    return {"seconds": min(steps), "mib": mib, "ended": ended}


def in_process(package: Path, case: dict[str, Any]) -> dict[str, Any]:
    """:func:`measure` with the package found in the folder ``package``."""
    environment = os.environ | {"PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--measure", json.dumps(case)]
    shown = subprocess.run(command, env=environment, cwd=package, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, Any] = json.loads(shown)
    return found


def unpack(commit: str, folder: Path) -> str:
    """The package as it was at ``commit``; returns the commit's full name."""
    name = subprocess.run(
        ["git", "rev-parse", f"{commit}^{{commit}}"], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    ).stdout.strip()
    archive = subprocess.run(
        ["git", "archive", name, "implicitlayer"], cwd=ROOT, check=True, stdout=subprocess.PIPE
    ).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    return name


def relative_difference(one: list[float], other: list[float]) -> float:
    a, b = torch.tensor(one, dtype=torch.float64), torch.tensor(other, dtype=torch.float64)
    return float((a - b).norm() / b.norm())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="COMMIT", help="of this repository; without it, the present code alone")
    parser.add_argument("--smoke", action="store_true", help="seconds in place of minutes; the times mean nothing")
    parser.add_argument("--rounds", type=int, default=5, help="turns of every case (default 5)")
    parser.add_argument("--output", type=Path, help="where to write the numbers as JSON")
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.measure is not None:
        print(json.dumps(measure(options.measure)))
        return
    cases, rounds = CASES, options.rounds
    if options.smoke:
        small = {"tasks": 2, "query": 2, "filters": 8, "steps": 2}
        cases, rounds = {name: case | small for name, case in CASES.items() if name.startswith("16")}, 1

    with tempfile.TemporaryDirectory() as folder:
        packages = {"present": ROOT}
        commit = None
        if options.against:
            commit = unpack(options.against, Path(folder))
            packages["earlier"] = Path(folder)
        difference = None
        if commit:
            ended = {name: in_process(package, CHECK)["ended"] for name, package in packages.items()}
            difference = relative_difference(ended["present"], ended["earlier"])
        rows: dict[str, dict[str, float]] = {}
        for case, settings in cases.items():
            found: dict[str, list[dict[str, Any]]] = {name: [] for name in packages}
            for _ in range(rounds):
                for name, package in packages.items():
                    found[name].append(in_process(package, settings))
            rows[case] = {
                f"{name} {what}": min(result[what] for result in results)
                for name, results in found.items()
                for what in ("seconds", "mib")
            }
            print(row(case, rows[case]), flush=True)

    about = {
        "command": " ".join(["python", *sys.argv]),
        "machine": f"{platform.machine()}, {cpu_name()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": 1,
        "rounds": rounds,
        "against": commit,
    }
    if difference is not None:
        print(f"parameters after two meta-steps in float64, relative difference: {difference:.0e}")
        # gradients are good to 1e-14 of their size, and two steps of 0.1 move the parameters by less than theirs
        assert difference < 1e-12, difference
    if options.output:
        options.output.write_text(
            json.dumps({"about": about, "steps": rows, "difference": difference}, indent=1) + "\n"
        )


def row(case: str, numbers: dict[str, float]) -> str:
    words = f"{case:22} {numbers['present seconds']:6.2f} s {numbers['present mib']:6.0f} MiB"
    if "earlier seconds" in numbers:
        words += f"   earlier {numbers['earlier seconds']:6.2f} s {numbers['earlier mib']:6.0f} MiB"
        words += f"   ratio {numbers['present seconds'] / numbers['earlier seconds']:.2f}"
    return words


if __name__ == "__main__":
    main()
