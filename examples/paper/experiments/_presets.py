"""Named settings for every cell of the paper's tables, at its scale and at that of two CPU cores.

Where a source is silent, or these settings depart from it, the preset's ``notes`` say so; they are written to
``config.json`` and shown in ``--help`` of a preset.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator
from typing import Any

from ._settings import (
    IMPLICIT,
    Data,
    Evaluation,
    Experiment,
    Method,
    MethodName,
    Network,
    Outer,
    Run,
)

METHODS: tuple[MethodName, ...] = ("imaml-gd", "imaml-hf", "maml", "fomaml", "reptile", "truncated")
TODAY: tuple[MethodName, ...] = ("anil", "protonet")  # not in the paper
OMNIGLOT_CELLS = ("5w1s", "5w5s", "20w1s", "20w5s")
_HEAD = "The head starts at zero: labels are drawn at random for every task, so no output should start out special."
_TURNS = "Training classes of a task are turned by random multiples of 90 degrees; validation and test classes are not."
_CHOSEN = (
    "The paper does not say, and these were chosen here: 15 query pictures of each class, 32 tasks in a meta-step, "
    "Adam with rate 1e-3 falling along a half cosine, a meta-gradient clipped at norm 0.5 (iMAML), 20,000 meta-steps, "
    "inner step size 0.1 (with a line search, its first trial)."
)
_NEWTON_STEPS = (
    "The paper does not say how many Newton-CG steps are made: as many as lower the gradient of the inner objective to "
    "a tenth, at most 8, was chosen here."
)
_REPTILE = (
    "Reptile's own inner solver is Adam on mini-batches of 10 training shots; here it is gradient descent on all of "
    "them, and the outer rate of 1 falls along a half cosine, not along a line."
)
_TRUNCATED = "The paper's tables have no such row: iMAML-GD's settings, back-propagated through the last quarter."
_SEARCHED = (
    "Inner steps are found by an Armijo line search: meta-training sharpens the support loss until steps of a fixed "
    "size diverge and the gradient is that of no minimum (docs/paper.md). --method.line-search none keeps them."
)
_GAUSS_NEWTON = (
    "Directions come from Gauss-Newton products: the Hessian is indefinite away from the solution, and truncated "
    "directions make little of it there. The meta-gradient uses the Hessian."
)
_HEAD_ONLY = "Not a method of the paper: only the head is adapted, which is what the field would try first today."
_NOT_RUN = "This preset has not been run at its full length."
_CPU = (
    "The paper's network, data, inner problem, strength and CG steps; the rest is what fits one CPU core: 16 tasks of "
    "5 query pictures of each class in a meta-step, Adam with rate 2e-3 falling along a half cosine, the meta-gradient "
    "clipped at norm 0.5, a budget in minutes. Chosen on validation classes."
)
_CPU_REPTILE = (
    "The settings of Reptile's own paper (5 tasks in a meta-step, 10 training shots, an outer rate of 1) on the "
    "network and data of iMAML's; what fits one CPU core is the budget in minutes, and 5 query pictures of each class."
)
_CPU_MINIIMAGENET = (
    "The paper's network, data and inner problem (iMAML's first trial step, 0.1, was chosen here); the rest is what "
    "fits one CPU core: 4 tasks of 5 query pictures of each class in a meta-step, Adam with rate 1e-3 falling along a "
    "half cosine, the meta-gradient clipped at norm 0.5, a budget in minutes."
)
_RELEASED = (
    "Departure: the released code solves (2I + H/12) g = v, here it is (I + H/2) g = v, the paper's system.",
    "Departure: its inner loop is plain SGD and one proximal step at the end; here every step has the proximal term.",
    "Departure: its test classes overlap its training classes; here the classes are split by stored names first.",
    "Departure: it pre-draws 200,000 tasks; here tasks are drawn as they are needed. Adam's epsilon of 1e-3 is kept.",
    "15 query pictures of each class were chosen here.",
)


def cell_of(name: str) -> tuple[int, int]:
    """(num_ways, num_shots) of a cell such as ``"20w5s"``."""
    ways, shots = name.removesuffix("s").split("w")
    return int(ways), int(shots)


def _inner(method: MethodName, steps: int, strength: float = 2.0) -> Method:
    """The inner solver of iMAML-GD or -HF that stays stable over a long training."""
    if method == "imaml-hf":
        return Method(method, inner_steps=8, inner_rtol=0.1, strength=strength, newton_curvature="gauss_newton")
    return Method(method, inner_steps=steps, line_search="armijo", strength=strength)


def _paper_omniglot(cell: str, method: MethodName) -> Experiment:
    ways, shots = cell_of(cell)
    steps = 16 if ways == 5 else 25
    data = Data("omniglot", num_ways=ways, num_shots=shots)
    outer, run = Outer(decay="cosine"), Run(max_steps=20_000)
    evaluation, notes = Evaluation(), [_NOT_RUN, _HEAD, _TURNS]
    settings = Method(method, inner_steps=steps)
    if method in IMPLICIT:
        settings = _inner(method, steps)
        outer = dataclasses.replace(outer, max_gradient_norm=0.5)
        notes += [_CHOSEN, *_notes_of(method)]
    if method == "truncated":
        settings = Method(method, inner_steps=steps, backward_steps=steps // 4)
        notes += [_TRUNCATED, _CHOSEN]
    if method in ("maml", "fomaml"):
        # Finn, Abbeel, Levine 2017, appendix A.1
        steps, size = (1, 0.4) if ways == 5 else (5, 0.1)
        settings = Method(method, inner_steps=steps, inner_step_size=size, strength=0.0)
        evaluation = Evaluation(inner_steps=3 if ways == 5 else None)
        outer, run = Outer(tasks_per_step=32 if ways == 5 else 16), Run(max_steps=60_000)
        notes.append("Settings of Finn, Abbeel, Levine 2017, appendix A.1; 15 query pictures of each class instead.")
    if method == "reptile":
        # Nichol, Achiam, Schulman 2018, appendix A
        settings = Method(method, inner_steps=5 if ways == 5 else 10, strength=0.0)
        data = dataclasses.replace(data, train_shots=10, num_query=10)
        evaluation = Evaluation(inner_steps=50)
        outer = Outer("sgd", learning_rate=1.0, decay="cosine", tasks_per_step=5)
        run = Run(max_steps=100_000 if ways == 5 else 200_000)
        notes += [_REPTILE, "The inner step size 0.1 was chosen here."]
    return Experiment(
        f"paper-omniglot-{cell}-{method}",
        "paper",
        tuple(notes),
        data,
        Network(),
        settings,
        outer,
        evaluation,
        run,
    )


def _head_only(method: MethodName) -> Method:
    """ANIL with five steps of the head, or a prototypical network, which makes none."""
    return Method(method, inner_steps=5, inner_step_size=0.1, strength=0.0)


def _notes_of(method: MethodName) -> list[str]:
    return [_SEARCHED] if method == "imaml-gd" else [_GAUSS_NEWTON, _NEWTON_STEPS]


def _cpu_omniglot(cell: str, method: MethodName) -> Experiment:
    """The paper's cell with the meta-batch and the outer rate that hours of one core allow."""
    paper = _paper_omniglot(cell, method)
    settings, outer = paper.method, paper.outer
    notes = [_CPU, *(note for note in paper.notes if note not in (_NOT_RUN, _CHOSEN))]
    if method == "fomaml":
        settings = dataclasses.replace(
            _inner("imaml-gd", _paper_omniglot(cell, "imaml-gd").method.inner_steps), name=method
        )
        notes = [_CPU, _HEAD, _TURNS, _SEARCHED, "This is iMAML-GD with no CG steps: first-order MAML on its problem."]
    if method in TODAY:
        same = _CPU.replace(", data, inner problem, strength and CG steps", " and data")
        settings, notes = _head_only(method), [_HEAD_ONLY, same, _HEAD, _TURNS]
    if method == "reptile":
        notes[0] = _CPU_REPTILE
    else:
        outer = Outer(learning_rate=2e-3, decay="cosine", tasks_per_step=16, max_gradient_norm=0.5)
    return Experiment(
        f"cpu-omniglot-{cell}-{method}",
        "cpu",
        tuple(notes),
        dataclasses.replace(paper.data, num_query=5),
        paper.network,
        settings,
        outer,
        dataclasses.replace(paper.evaluation, num_validations=10, batch_size=16),
        Run(minutes=90.0 if cell.endswith("1s") else 60.0),
    )


def _cpu_miniimagenet(method: MethodName) -> Experiment:
    paper = _paper_miniimagenet(method)
    gone = ("The paper does not say", *([_NOT_RUN] if method == "imaml-gd" else []))
    return dataclasses.replace(
        paper,
        preset=f"cpu-miniimagenet-5w1s-{method}",
        setting="cpu",
        notes=(_CPU_MINIIMAGENET, *(note for note in paper.notes if not note.startswith(gone))),
        data=dataclasses.replace(paper.data, num_query=5),
        outer=Outer(decay="cosine", tasks_per_step=4, max_gradient_norm=0.5),
        evaluation=dataclasses.replace(paper.evaluation, num_validations=10, batch_size=10),
        run=Run(minutes=90.0),
    )


def _paper_miniimagenet(method: MethodName) -> Experiment:
    data = Data("miniimagenet", rotations="none", image_size=84)
    network = Network(num_filters=32, downsample="max_pool")
    # Meta-batch, rate and number of meta-steps: Finn, Abbeel, Levine 2017, appendix A.1; the paper names none.
    outer, run = Outer(tasks_per_step=4), Run(max_steps=60_000)
    evaluation, notes = Evaluation(test_tasks=600), [_NOT_RUN, _HEAD]
    settings = Method(method, inner_steps=10, strength=0.5)
    chosen = "The paper does not say: meta-batch, Adam's rate and meta-steps are those of MAML; inner step size 0.1."
    if method in IMPLICIT:
        settings = _inner(method, 10, strength=0.5)
        outer = dataclasses.replace(outer, max_gradient_norm=0.5)
        notes += [chosen, *_notes_of(method)]
    if method == "truncated":
        settings = Method(method, inner_steps=10, strength=0.5, backward_steps=2)
        notes += [_TRUNCATED, chosen]
    if method in ("maml", "fomaml"):
        settings = Method(method, inner_steps=5, inner_step_size=0.01, strength=0.0)
        evaluation = Evaluation(test_tasks=600, inner_steps=10)
        notes.append("Settings of Finn, Abbeel, Levine 2017, appendix A.1.")
    if method == "reptile":
        settings = Method(method, inner_steps=8, inner_step_size=0.01, strength=0.0)
        data = dataclasses.replace(data, train_shots=15)
        evaluation = Evaluation(test_tasks=600, inner_steps=50)
        outer = Outer("sgd", learning_rate=1.0, decay="cosine", tasks_per_step=5)
        run = Run(max_steps=100_000)
        notes += [_REPTILE, "The inner step size 0.01 was chosen here; training shots are 15."]
    return Experiment(
        f"paper-miniimagenet-5w1s-{method}",
        "paper",
        tuple(notes),
        data,
        network,
        settings,
        outer,
        evaluation,
        run,
    )


def _released_omniglot(cell: str) -> Experiment:
    ways, shots = cell_of(cell)
    return Experiment(
        f"released-omniglot-{cell}-imaml-gd",
        "released",
        _RELEASED,
        Data("omniglot", num_ways=ways, num_shots=shots),
        Network(zero_head=False),
        Method("imaml-gd", inner_steps=16 if ways == 5 else 25),
        Outer(adam_epsilon=1e-3),
        Evaluation(),
        Run(max_steps=20_000),
    )


# What two CPU cores can do in the budget, chosen on validation classes only (Omniglot's, mini-ImageNet's).
_REDUCED = (
    "The inner problem is reduced too (a lower strength, few steps): with so little training, the paper's learns less.",
    "Validation chose these settings; no test class was looked at.",
    _HEAD,
)


def _reduced(dataset: Any, cell: str, method: MethodName, minutes: float = 0.35) -> Experiment:
    ways, shots = cell_of(cell)
    few = ways == 20
    notes: tuple[str, ...] = (
        "Reduced for a CPU: 32 filters, a few query pictures, small meta-batches, and a budget of "
        f"{f'{60 * minutes:.0f} seconds' if minutes < 1 else f'{minutes:g} minutes'}.",
        *_REDUCED,
    )
    data = Data(dataset, num_ways=ways, num_shots=shots, num_query=2 if few else 5)
    network = Network(num_filters=32)
    outer = Outer(
        learning_rate=6e-3, decay="cosine", tasks_per_step=4 if few else 8, max_gradient_norm=0.5
    )  # few inner steps stop short of a minimum, and some meta-gradients are wild there
    settings = Method(method, inner_steps=5, inner_step_size=0.2, strength=0.2, cg_steps=2, backward_steps=2)
    # Evaluation shall take less time than training; a 20-way task takes that of four 5-way ones.
    evaluation = Evaluation(
        validation_tasks=20 if few else 40, num_validations=3, test_tasks=150 if few else 300, batch_size=10
    )
    if dataset == "miniimagenet":
        data = dataclasses.replace(data, rotations="none")
        network = Network(num_filters=32, downsample="max_pool")
        outer = dataclasses.replace(outer, learning_rate=3e-3, tasks_per_step=4)
        notes = (*notes, "The colour pictures are 28 x 28 instead of 84 x 84.")
    if method == "imaml-hf":
        settings = dataclasses.replace(settings, inner_steps=2, strength=0.5)
    if method in ("maml", "fomaml", "reptile"):
        settings = dataclasses.replace(settings, strength=0.0)
    if method in TODAY:
        settings, notes = _head_only(method), (*notes, _HEAD_ONLY)
    if method == "reptile":
        data = dataclasses.replace(data, train_shots=max(5, shots))
        outer = dataclasses.replace(outer, learning_rate=2e-3)
    return Experiment(
        f"reduced-{dataset}-{cell}-{method}",
        "reduced",
        notes,
        data,
        network,
        settings,
        outer,
        evaluation,
        Run(minutes=minutes),
    )


def _all() -> Iterator[Experiment]:
    for method in (*METHODS, *TODAY):
        for cell in OMNIGLOT_CELLS:
            if method in METHODS:
                yield _paper_omniglot(cell, method)
            if method != "truncated":
                yield _cpu_omniglot(cell, method)
            yield _reduced("omniglot", cell, method)
            yield _reduced("glyphs", cell, method)
        if method in METHODS:
            yield _paper_miniimagenet(method)
            if method in ("imaml-gd", "maml"):
                yield _cpu_miniimagenet(method)
        yield _reduced("miniimagenet", "5w1s", method, minutes=0.6)
    for cell in OMNIGLOT_CELLS:
        yield _released_omniglot(cell)
    yield dataclasses.replace(_reduced("glyphs", "5w1s", "imaml-gd", minutes=3.0), preset="glyphs")


PRESETS: dict[str, Experiment] = {experiment.preset: experiment for experiment in _all()}


def preset(name: str) -> Experiment:
    """The experiment of this name.

    Args:
        name: ``<setting>-<dataset>-<cell>-<method>``, such as ``"paper-omniglot-5w1s-imaml-gd"``, or ``"glyphs"``, the
            default that needs no download.

    Raises:
        ValueError: there is no such preset; the message names the closest ones.

    Example:
        >>> experiment = preset("paper-omniglot-20w1s-imaml-gd")
        >>> experiment.method.inner_steps, experiment.method.strength, experiment.method.cg_steps
        (25, 2.0, 5)
    """
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=3, cutoff=0.3)
        hint = f"Did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(f"preset={name!r} is none of the {len(PRESETS)} presets. {hint} --help lists them.")
    return PRESETS[name]
