"""Meta-learn to tell five characters apart from one picture each, with implicit MAML, and say how well it went.

    python examples/demo.py                        Glyphs: characters rendered from fonts, nothing is downloaded
    python examples/demo.py --data-dir <omniglot>  real handwriting (or set IMPLICITLAYER_DATA)
    python examples/demo.py --resume <run folder>  go on after Ctrl-C, a crash, or with more --minutes
    python examples/demo.py --smoke                everything in seconds, to see that it runs

Trains iMAML, and the same code with 0 CG steps, which is first-order MAML: same seeds, same minutes, each in a process
of its own with half of the cores.
"""

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

# Threads that wait shall sleep: by default they spin, and beside other work a step then takes up to ten times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

import implicitlayer as il


@dataclasses.dataclass(frozen=True)
class Settings:
    """All there is to set; chosen on the validation classes of Omniglot (docs/meta_learning.md)."""

    num_ways: int = 5  # classes in a task
    num_shots: int = 1  # labelled pictures of each
    num_queries: int = 5  # pictures of each class that the meta-loss and the accuracy are measured on
    num_filters: int = 32  # channels of each of the four convolutions
    strength: float = 0.2  # λ of the proximal term
    inner_step_size: float = 0.2  # α of gradient descent on the support loss plus the proximal term
    inner_steps: int = 5
    cg_steps: int = 2  # of (I + H/λ) g = v
    tasks_per_step: int = 8
    learning_rate: float = 6e-3  # of Adam; falls along a half cosine over the budget
    max_gradient_norm: float = 0.5  # few inner steps stop short of a minimum, and some meta-gradients are wild there
    minutes: float = 6.0  # of training; the two methods train at the same time
    validation_tasks: int = 100  # from classes of their own, for the curves
    test_tasks: int = 600  # from classes that neither training nor validation saw
    seed: int = 0
    data_dir: str | None = None
    max_steps: int | None = None


SMOKE = {"num_filters": 8, "minutes": 0.2, "max_steps": 4, "tasks_per_step": 2, "validation_tasks": 4, "test_tasks": 8}
METHODS = ("iMAML", "FOMAML")


def main() -> None:
    settings, run_dir = read_arguments()
    try:
        run(settings, run_dir)
    except KeyboardInterrupt:
        raise SystemExit(f"\nStopped; no finished step is lost. Go on with:\n    {resume_command(run_dir)}") from None


def run(settings: Settings, run_dir: Path) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    il.meta.save_json(run_dir / "config.json", dataclasses.asdict(settings))
    il.meta.save_json(run_dir / "versions.json", versions())

    data = load_data(settings)
    test = fixed_episodes(data["test"], settings, settings.test_tasks)
    dataset = type(data["train"]).__name__
    counts = ", ".join(f"{classes.num_classes} {split}" for split, classes in data.items())
    print(f"{dataset} ({counts} classes), {settings.num_ways}-way {settings.num_shots}-shot; kept in {run_dir}")

    trainers = {name: make_trainer(name, data, settings, run_dir) for name in METHODS}
    untrained = trainers["iMAML"].evaluate(test)
    for name, trainer in trainers.items():
        if trainer.resume():
            print(f"{name}: resumed at step {trainer.step}, {trainer.seconds / 60:.1f} minutes of training")
    train_both(trainers, settings, run_dir)
    rows = [(name, trainer.step, trainer.evaluate(test)) for name, trainer in trainers.items()]
    rows.append(("untrained start", 0, untrained))

    print(table(rows, settings))
    accuracy = {name: {"steps": steps, "mean": r.mean, "interval": r.interval} for name, steps, r in rows}
    results = {"dataset": dataset, "test_tasks": settings.test_tasks, "accuracy": accuracy}
    il.meta.save_json(run_dir / "results.json", results)
    draw(trainers, test, settings, run_dir / "demo.png")
    print(f"picture     {run_dir / 'demo.png'}\ncheckpoint  {trainers['iMAML'].checkpoint_path}")
    print(f"Go on, here for twice as long:\n    {resume_command(run_dir)} --minutes {2 * settings.minutes:g}")


def train_both(trainers: dict[str, Any], settings: Settings, run_dir: Path) -> None:
    """iMAML in this process, whose bar is shown, and FOMAML beside it."""
    beside = multiprocessing.get_context("spawn").Process(target=train_fomaml, args=(settings, run_dir))
    beside.start()
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // 2))
    try:
        trainers["iMAML"].fit()
    except BaseException:
        beside.join(10)  # Ctrl-C in a terminal is for both; what comes by another way is passed on
        beside.terminate()
        raise
    finally:
        beside.join()
    torch.set_num_threads(threads)
    if beside.exitcode:
        raise SystemExit(f"The training of FOMAML failed, see above. Go on with:\n    {resume_command(run_dir)}")
    trainers["FOMAML"].resume()


def train_fomaml(settings: Settings, run_dir: Path) -> None:
    torch.set_num_threads(max(1, torch.get_num_threads() // 2))
    trainer = make_trainer("FOMAML", load_data(settings), settings, run_dir, show_progress=False)
    trainer.resume()
    with contextlib.suppress(KeyboardInterrupt):  # no finished step is lost, and the other process says how to go on
        trainer.fit()


def make_method(network: Any, settings: Settings, cg_steps: int) -> Any:
    """The whole method: a loss per task, an inner solver, a strength, and so many CG steps for the meta-gradient."""
    return il.meta.iMAML(
        il.fewshot.ClassificationLoss(network),
        il.solvers.GradientDescent(step_size=settings.inner_step_size, max_steps=settings.inner_steps),
        strength=settings.strength,
        linear_solver=il.ConjugateGradient(max_steps=cg_steps),
    )


def make_trainer(name: str, data: dict[str, Any], settings: Settings, run_dir: Path, show_progress: bool = True) -> Any:
    network = il.fewshot.conv4(settings.num_ways, num_filters=settings.num_filters)
    theta = network.init(torch.Generator().manual_seed(settings.seed))
    # Labels are drawn at random for every task, so no output should start out special: the head begins at zero.
    theta |= {key: torch.zeros_like(theta[key]) for key in ("head.weight", "head.bias")}
    theta = {key: value.requires_grad_() for key, value in theta.items()}

    method = make_method(network, settings, settings.cg_steps if name == "iMAML" else 0)
    return il.meta.Trainer(
        method,
        theta,
        make_sampler(data["train"], settings, rotations="augment", seed=settings.seed),
        torch.optim.Adam(theta.values(), lr=settings.learning_rate),
        tasks_per_step=settings.tasks_per_step,
        max_minutes=settings.minutes,
        max_steps=settings.max_steps,
        learning_rate=il.meta.cosine_decay,
        max_gradient_norm=settings.max_gradient_norm,
        metric=method.task_loss.accuracy,
        validation=fixed_episodes(data["val"], settings, settings.validation_tasks),
        run_dir=run_dir / name.lower(),
        name=name,
        show_progress=show_progress,
    )


def load_data(settings: Settings) -> dict[str, Any]:
    """Three sets of classes that have none in common."""
    if settings.data_dir is None:
        return {split: il.fewshot.Glyphs(split) for split in ("train", "val", "test")}
    return {split: il.fewshot.Omniglot(settings.data_dir, split) for split in ("train", "val", "test")}


def make_sampler(classes: Any, settings: Settings, *, rotations: str = "none", seed: int = 2024) -> Any:
    return il.fewshot.EpisodeSampler(
        classes,
        num_ways=settings.num_ways,
        num_shots=settings.num_shots,
        num_query=settings.num_queries,
        rotations=rotations,
        seed=seed,
    )


def fixed_episodes(classes: Any, settings: Settings, num_tasks: int) -> list[Any]:
    """The same tasks for every method and every run."""
    batches = make_sampler(classes, settings).fixed(num_tasks, batch_size=20)
    return [il.meta.as_support_query(batch) for batch in batches]


def table(rows: list[Any], settings: Settings) -> str:
    """The result, one row for each way to start the adaptation."""
    what = {
        "iMAML": f"iMAML, {settings.cg_steps} CG steps",
        "FOMAML": "first-order MAML: the same with 0 CG steps",
        "untrained start": "no meta-learning: adapted from the untrained start",
    }
    num_tasks = rows[0][2].num_tasks
    lines = ["", f"{'':52} meta-steps   accuracy on {num_tasks} tasks of held-out classes (± 95 %)"]
    lines += [f"{what[name]:52} {steps:10}   {result}" for name, steps, result in rows]
    return "\n".join([*lines, f"{'chance':52} {'':10}   {100 / settings.num_ways:.1f} %", ""])


def draw(trainers: dict[str, Any], test: list[Any], settings: Settings, path: Path) -> None:
    """Learning curves beside the first test task and what the adapted network says of it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    support, query = (tuple(part[:1] for part in batch) for batch in test[0])
    trainer = trainers["iMAML"]
    with torch.no_grad():
        phi = trainer.method.adapt(trainer.theta, support)
        logits = trainer.method.task_loss.network(phi, query[0])[0]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), width_ratios=(1.25, 1), layout="constrained")
    histories = {name: trainer.history for name, trainer in trainers.items()}
    il.meta.plot_learning_curves(left, histories, chance=1 / settings.num_ways)
    il.meta.plot_episode(right, support[0][0], query[0][0], query[1][0], logits.softmax(-1))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def versions() -> dict[str, Any]:
    return {
        "implicitlayer": il.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
    }


def resume_command(run_dir: Path) -> str:
    here = Path.cwd()
    python = Path(sys.executable)
    python = python.relative_to(here) if python.is_relative_to(here) else python
    return f"{python} {sys.argv[0]} --resume {run_dir}"


def read_arguments() -> tuple[Settings, Path]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data-dir", default=os.environ.get("IMPLICITLAYER_DATA"), help="folder with the Omniglot zips"
    )
    parser.add_argument("--resume", type=Path, metavar="RUN", help="go on with a run folder")
    parser.add_argument("--run-dir", type=Path, help="where to keep the run (default: a new folder in runs/)")
    parser.add_argument("--minutes", type=float, help=f"training time per method (default {Settings.minutes:g})")
    parser.add_argument("--seed", type=int, help=f"of the start and the tasks (default {Settings.seed})")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything")
    arguments = parser.parse_args()
    changes = {key: getattr(arguments, key) for key in ("minutes", "seed") if getattr(arguments, key) is not None}
    if arguments.resume is not None:
        saved = json.loads((arguments.resume / "config.json").read_text())
        return Settings(**(saved | changes)), arguments.resume
    data_dir = str(Path(arguments.data_dir).resolve()) if arguments.data_dir else None
    changes = (SMOKE if arguments.smoke else {}) | changes | {"data_dir": data_dir}
    name = ("omniglot" if arguments.data_dir else "glyphs") + time.strftime("-%Y%m%d-%H%M%S")
    return Settings(**changes), arguments.run_dir or Path("runs") / name


if __name__ == "__main__":
    main()
