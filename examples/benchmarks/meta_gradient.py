"""What does one implicit meta-gradient of conv4 cost, in time and memory, against a hand-written loop and TorchOpt?

    python examples/benchmarks/meta_gradient.py [--smoke] [--repeats 7] [--seed 0] [--output FILE.json]

One meta-gradient: 16 tasks of embedded glyphs, 5-way 1-shot with 15 query images of a class, 64 filters; 16 steps of
gradient descent (0.02) on the true proximal objective (strength 2), the query gradient, 5 conjugate gradient steps.
Everybody computes the same numbers (checked in float64 on a small case first), on one thread, in rounds that run every
method once. Times are CPU times, which a shared machine disturbs less; ratios are taken within a round. The loop builds
its gradient graph once per task and differentiates it once per CG step. TorchOpt: `custom_root` with `solve_cg` and
five steps, in a loop over tasks because it has no batches. Both also run in PyTorch's channels-last layout.

Memory is the peak of live tensor storage made by a call, counted after every operator; what an operator uses inside
itself is not seen. "MAML" differentiates through the inner steps.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from _meta_gradient_rivals import (
    Gradient,
    Params,
    Settings,
    batch_without_layer,
    conv4,
    flat,
    loop,
    maml,
    torchopt,
    torchopt_loop,
)

import implicitlayer as il

sys.path.append(str(Path(__file__).resolve().parents[1] / "paper"))
import experiments


def library(theta: Params, tasks: Any, s: Settings) -> Gradient:
    images, labels, query_images, query_labels = tasks
    network = conv4(s)
    layer = il.argmin(
        il.proximal(network.cross_entropy, s.strength),
        il.solvers.GradientDescent(step_size=s.step_size, max_steps=s.inner_steps),
        linear_solver=il.ConjugateGradient(max_steps=s.cg_steps),
        batch_dims=1,
        on_failure="ignore",
        stationarity_rtol=None,  # sixteen steps are a choice, not a failure to converge
    )
    leaves = {name: p.detach().requires_grad_() for name, p in theta.items()}
    init = {name: p.expand(len(images), *p.shape) for name, p in theta.items()}
    phi = layer(init, leaves, images, labels)
    loss = network.cross_entropy(phi, query_images, query_labels).mean()
    return loss.item(), dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def peak_mib(function: Callable[[], object]) -> float:
    function()  # what is made once and kept shall not count
    return il.meta.peak_memory(function) / 2**20


def problem(s: Settings, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Params, Any]:
    data = il.fewshot.EpisodeSampler(il.fewshot.Glyphs(), num_query=s.num_query, seed=seed).sample(s.num_tasks)
    theta = conv4(s).init(torch.Generator().manual_seed(seed), dtype=dtype)
    images, query_images = data.support_images.to(dtype), data.query_images.to(dtype)
    return theta, (images, data.support_labels, query_images, data.query_labels)


def methods() -> dict[str, Callable[[Params, Any, Settings], Gradient]]:
    last = torch.channels_last
    table: dict[str, Callable] = {"loop": loop, "loop, channels last": lambda t, d, s: loop(t, d, s, last)}
    if torchopt is not None:
        table["TorchOpt"] = lambda t, d, s: torchopt_loop(t, d, s, torch.contiguous_format)
        table["TorchOpt, channels last"] = lambda t, d, s: torchopt_loop(t, d, s, last)
    return {**table, "implicitlayer": library, "its conv4 without the layer": batch_without_layer}


def disagreement(seed: int) -> dict[str, float]:
    """Difference from the loop's gradient, relative to its norm, in float64 on a small case.

    The case has positive curvature throughout (as have the tasks that are timed): where it is negative the library
    ends conjugate gradients and says so, the loop goes on into a direction without meaning.
    """
    small = Settings(num_tasks=2, num_filters=32, num_query=2, inner_steps=8)
    theta, tasks = problem(small, seed, torch.float64)
    gradients = {name: method(theta, tasks, small)[1] for name, method in methods().items()}
    return {name: relative_difference(g, gradients["loop"]) for name, g in gradients.items()}


def relative_difference(gradient: Params, expected: Params) -> float:
    one, other = flat(gradient.values()), flat(expected.values())
    return float((one - other).norm() / other.norm())


def timings(s: Settings, seed: int, repeats: int) -> dict[str, dict[str, float]]:
    theta, tasks = problem(s, seed)
    seconds: dict[str, list[float]] = {name: [] for name in methods()}
    losses, gradients = {}, {}
    for round_ in range(repeats + 1):
        for name, method in methods().items():
            start = time.process_time()
            losses[name], gradients[name] = method(theta, tasks, s)
            if round_:  # the first is the warm-up
                seconds[name].append(time.process_time() - start)
    rows = {}
    for name, times in seconds.items():
        ratios = sorted(t / base for t, base in zip(times, seconds["loop"], strict=True))
        rows[name] = {
            "seconds": statistics.median(times),
            "ratio": statistics.median(ratios),
            "lowest_ratio": ratios[0],
            "highest_ratio": ratios[-1],
            "query_loss": losses[name],
            "float32_difference": relative_difference(gradients[name], gradients["loop"]),
            "peak_mib": peak_mib(lambda name=name: methods()[name](theta, tasks, s)),
        }
    return rows


def memory_against_steps(s: Settings, seed: int, steps: tuple[int, ...]) -> dict[str, Any]:
    """One task; MiB for every number of inner steps, and those of one gradient and of one copy of the parameters."""
    one = Settings(num_tasks=1, num_filters=s.num_filters)
    theta, tasks = problem(one, seed)

    def with_steps(num_steps: int) -> Settings:
        return Settings(num_tasks=1, num_filters=s.num_filters, inner_steps=num_steps)

    def inner_gradient() -> Any:
        leaves = {name: p.detach().requires_grad_() for name, p in theta.items()}
        loss = il.fewshot.task_cross_entropy(conv4(s)(leaves, tasks[0][0]), tasks[1][0])
        return torch.autograd.grad(loss, list(leaves.values()))

    return {
        "implicitlayer": {n: peak_mib(lambda n=n: library(theta, tasks, with_steps(n))) for n in steps},
        "MAML": {n: peak_mib(lambda n=n: maml(theta, tasks, with_steps(n))) for n in steps},
        "one inner gradient": peak_mib(inner_gradient),
        "parameters": sum(p.numel() * p.element_size() for p in theta.values()) / 2**20,
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="seconds in place of minutes; the times mean nothing")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="where to write the numbers as JSON")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    s = Settings(num_tasks=2, num_filters=32, num_query=2, inner_steps=8) if options.smoke else Settings()
    repeats = 1 if options.smoke else options.repeats
    steps = (1, 4, 16) if options.smoke else (1, 4, 16, 64, 256, 1000)

    differences = disagreement(options.seed)
    rows = timings(s, options.seed, repeats)
    memory = memory_against_steps(s, options.seed, steps)
    with il.diagnostics() as records:
        library(*problem(s, options.seed), s)

    about = {
        "command": " ".join(["python", *sys.argv]),
        "machine": f"{platform.machine()}, {experiments.machine()['cpu']}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchopt": metadata.version("torchopt") if torchopt is not None else "left out: not installed",
        "threads": 1,
        "seed": options.seed,
        "repeats": repeats,
    }
    print("\n".join(f"{key:9} {value}" for key, value in about.items()))
    columns = f"{'ratio':>6} {'(spread)':>13} {'seconds':>8} {'MiB':>7} {'loss':>7}"
    print(f"\n{'one meta-gradient':27} {columns} {'float32':>8} {'float64':>8}")
    for name, r in rows.items():
        spread = f"({r['lowest_ratio']:.2f}-{r['highest_ratio']:.2f})"
        numbers = f"{r['ratio']:6.2f} {spread:>13} {r['seconds']:8.3f} {r['peak_mib']:7.1f} {r['query_loss']:7.4f}"
        print(f"{name:27} {numbers} {r['float32_difference']:8.0e} {differences[name]:8.0e}")
    print("float32, float64: difference from the loop's gradient, of the timed case and of a small one")
    print(f"the library's record of its solve: {records[-1]}")
    print(f"\n{'MiB, one task; inner steps:':28} " + " ".join(f"{n:>7}" for n in steps))
    for name in ("implicitlayer", "MAML"):
        print(f"{name:28} " + " ".join(f"{mib:7.1f}" for mib in memory[name].values()))
    print(f"one inner gradient {memory['one inner gradient']:.2f} MiB, the parameters {memory['parameters']:.2f} MiB")

    results = {"about": about, "meta_gradient": rows, "float64_difference": differences, "memory_mib": memory}
    if options.output:
        options.output.write_text(json.dumps(results, indent=1) + "\n")
    # 16 gradients, each good to some 1e-14
    assert max(differences.values()) < 1e-10, differences
    flat_memory = list(memory["implicitlayer"].values())
    assert max(flat_memory) <= 1.01 * min(flat_memory), flat_memory
    return results


if __name__ == "__main__":
    main()
