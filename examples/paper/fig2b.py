"""Figure 2(b): memory and time of one meta-gradient against the number of inner gradient steps.

    python examples/paper/fig2b.py                  reduced for a CPU: fewer filters and tasks; some 30 seconds
    python examples/paper/fig2b.py --device cuda    the paper's setting: conv4 with 64 filters, Omniglot 20-way 5-shot
    python examples/paper/fig2b.py --smoke          everything in seconds

The claims: memory of iMAML and first-order MAML is flat, MAML's grows linearly; iMAML takes the time of first-order
MAML and a constant, MAML's grows faster. Each is asserted, times only where they are long enough to be measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from _results import OUTPUT_DIR, command_line, device_option, save_result

import implicitlayer as il


@dataclasses.dataclass(frozen=True)
class Settings:
    num_filters: int = 64
    num_tasks: int = 16  # of one meta-gradient, computed at once
    num_query: int = 5  # pictures of each class
    inner_steps: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    repeats: int = 7  # of each time, in turns, after one call that warms up
    num_ways: int = 20
    num_shots: int = 5
    step_size: float = 0.1
    strength: float = 2.0  # λ
    cg_steps: int = 5
    assert_times: bool = True


PAPER = Settings()
REDUCED = Settings(num_filters=32, num_tasks=2, num_query=1, inner_steps=(1, 2, 4, 8, 16), repeats=5)
SMOKE = Settings(num_filters=4, num_tasks=1, num_query=1, inner_steps=(1, 2, 4), repeats=1, assert_times=False)
WORDS = (
    f"{REDUCED.num_filters} filters instead of {PAPER.num_filters}, {REDUCED.num_tasks} tasks at once instead of "
    f"{PAPER.num_tasks}, {REDUCED.num_query} query picture of each class instead of {PAPER.num_query}"
)

FLAT = 1.05  # most that a flat memory may vary: buffers that the allocator or a kernel takes beside
LINEAR = 0.999  # least R² of a straight line through MAML's memory; the graph of a step has the same size each time


def main() -> None:
    options = read_arguments()
    setting = SMOKE if options.smoke else PAPER if options.setting == "paper" else REDUCED
    try:
        classes = load(options.data_dir)
    except (il.fewshot.DatasetError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    # float32 throughout: torch lets convolutions round to TF32 on a GPU if nobody says no
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    episode = draw_tasks(classes, setting, options.seed, options.device)
    rows = measure(setting, episode, options.device, options.seed)
    fits = fit_all(rows)
    print(table(rows, setting))
    print("\n".join(remarks(rows, fits)))
    check(rows, fits, setting)
    figure = draw(rows, setting, options.output_dir / "fig2b.png")
    words = "paper" if setting is PAPER else f"reduced: {'a smoke run' if options.smoke else WORDS}"
    results = {"settings": dataclasses.asdict(setting), "rows": rows, "fits": fits, "remarks": remarks(rows, fits)}
    path = save_result(
        options.output_dir,
        "fig2b",
        setting=words,
        command=command_line(),
        seed=options.seed,
        split=f"{type(classes).__name__} train, {classes.num_classes} classes",
        results=results | {"table": table(rows, setting).splitlines(), "device": options.device},
        figures=[figure],
        device=options.device,
    )
    print(f"{path}, {figure}")


def load(data_dir: str | None) -> Any:
    """Omniglot where a folder was named, else characters that are made here: the numbers do not depend on it."""
    return il.fewshot.Glyphs("train") if data_dir is None else il.fewshot.Omniglot(data_dir, "train")


def draw_tasks(classes: Any, s: Settings, seed: int, device: str) -> Any:
    sampler = il.fewshot.EpisodeSampler(
        classes, num_ways=s.num_ways, num_shots=s.num_shots, num_query=s.num_query, seed=seed, device=device
    )
    return il.meta.as_support_query(sampler.sample(s.num_tasks))


def methods(s: Settings, steps: int) -> dict[str, Any]:
    network = il.fewshot.conv4(s.num_ways, num_filters=s.num_filters)

    def loss(params: Any, batch: Any) -> torch.Tensor:
        images, labels = batch
        return network.cross_entropy(params, images, labels)

    descent = il.solvers.GradientDescent(step_size=s.step_size, max_steps=steps)
    cg = il.ConjugateGradient(max_steps=s.cg_steps)
    return {
        "iMAML": il.meta.iMAML(loss, descent, strength=s.strength, linear_solver=cg),
        "MAML": il.meta.MAML(loss, step_size=s.step_size, num_steps=steps),
        "FOMAML": il.meta.FirstOrderMAML(loss, descent),
    }


def measure(s: Settings, episode: Any, device: str, seed: int) -> list[dict[str, Any]]:
    """One row for each method and number of inner steps: peak bytes, and seconds (median, least, most)."""
    start = il.fewshot.conv4(s.num_ways, num_filters=s.num_filters).init(
        torch.Generator().manual_seed(seed), device=device
    )
    theta = {name: value.requires_grad_() for name, value in start.items()}
    calls = {
        (name, steps): meta_gradient(method, theta, episode)
        for steps in s.inner_steps
        for name, method in methods(s, steps).items()
    }
    peaks: dict[Any, int] = {}
    for key, call in calls.items():
        call()  # what is made once is made here
        peaks[key] = il.meta.peak_memory(call, device)
    seconds: dict[Any, list[float]] = {key: [] for key in calls}
    for _ in range(s.repeats):  # in turns: what else the machine does slows all down alike
        for key, call in calls.items():
            seconds[key].append(timed(call, device))
    return [
        {
            "method": name,
            "steps": steps,
            "peak_bytes": peaks[name, steps],
            "seconds": statistics.median(times),
            "least": min(times),
            "most": max(times),
        }
        for (name, steps), times in seconds.items()
    ]


def meta_gradient(method: Any, theta: dict[str, torch.Tensor], episode: Any) -> Callable[[], Any]:
    support, query = episode
    return lambda: torch.autograd.grad(method(theta, support, query).mean(), list(theta.values()))


def timed(call: Callable[[], Any], device: str) -> float:
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    call()
    if cuda:
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def fit_all(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Straight lines through each method's memory and least time (load only adds to it): constant, slope, R²."""
    fits = {}
    for name in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == name]
        steps = [row["steps"] for row in own]
        memory, seconds = [row["peak_bytes"] for row in own], [row["least"] for row in own]
        fits[name] = {
            "memory": line(steps, memory),
            "seconds": line(steps, seconds),
            "memory_growth": max(memory) / min(memory),
        }
    return fits


def line(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """Least squares: ``y ≈ constant + slope x``; R² is 1 where y does not vary at all."""
    slope, constant = statistics.linear_regression(x, y)
    mean = statistics.fmean(y)
    total = sum((b - mean) ** 2 for b in y)
    rest = sum((b - constant - slope * a) ** 2 for a, b in zip(x, y, strict=True))
    return {"constant": constant, "slope": slope, "r2": 1 - rest / total if total else 1.0}


def check(rows: Sequence[dict[str, Any]], fits: dict[str, Any], s: Settings) -> None:
    for name in ("iMAML", "FOMAML"):
        growth = fits[name]["memory_growth"]
        assert growth <= FLAT, f"{name}'s memory is not flat: it varies by a factor of {growth:.3f}"
    assert fits["MAML"]["memory"]["r2"] >= LINEAR, f"MAML's memory is not linear: {fits['MAML']['memory']}"
    assert fits["MAML"]["memory_growth"] > 1.5, f"MAML's memory does not grow: {fits['MAML']}"
    if s.assert_times:
        slopes = {name: fit["seconds"]["slope"] for name, fit in fits.items()}
        assert slopes["MAML"] > max(slopes["iMAML"], slopes["FOMAML"]), f"MAML's time does not grow fastest: {slopes}"


def remarks(rows: Sequence[dict[str, Any]], fits: dict[str, Any]) -> list[str]:
    """What the numbers say, claim by claim."""
    slope = {name: 1e3 * fit["seconds"]["slope"] for name, fit in fits.items()}
    constant = {name: 1e3 * fit["seconds"]["constant"] for name, fit in fits.items()}
    memory, largest = fits["MAML"]["memory"], max(row["steps"] for row in rows)
    per_step, start = memory["slope"] / 2**20, memory["constant"] / 2**20
    peak = {name: max(row["peak_bytes"] for row in rows if row["method"] == name) for name in ("iMAML", "FOMAML")}
    share = peak["iMAML"] / peak["FOMAML"]
    reach = (12 * 2**10 - start) / per_step
    return [
        f"Memory over 1 to {largest} inner steps grows by the factor {fits['iMAML']['memory_growth']:.3f} (iMAML), "
        f"{fits['FOMAML']['memory_growth']:.3f} (FOMAML), {fits['MAML']['memory_growth']:.1f} (MAML).",
        f"iMAML takes {share:.1f} times the memory of FOMAML, which is that of one gradient of each loss (Theorem 1: "
        "at most 2; copies of the parameters and the vectors of CG come on top).",
        f"MAML takes {per_step:.1f} MiB for each step (R² of the line {memory['r2']:.5f}): 12 GB would be full at "
        f"{reach:.0f} steps in this setting (the paper says about 16 in its own, whose meta-batch it does not give).",
        f"Least time for each inner step: MAML {slope['MAML']:.2f} ms, iMAML {slope['iMAML']:.2f} ms, FOMAML "
        f"{slope['FOMAML']:.2f} ms; the constants are {constant['MAML']:.1f}, {constant['iMAML']:.1f} and "
        f"{constant['FOMAML']:.1f} ms.",
    ]


def table(rows: Sequence[dict[str, Any]], s: Settings) -> str:
    names = list(dict.fromkeys(row["method"] for row in rows))
    cells = {(row["method"], row["steps"]): row for row in rows}
    heads = [f"{name}, MiB" for name in names] + [f"{name}, ms" for name in names]
    lines = ["| inner steps | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|"]
    for steps in s.inner_steps:
        memory = [f"{cells[name, steps]['peak_bytes'] / 2**20:.1f}" for name in names]
        seconds = [f"{1e3 * cells[name, steps]['seconds']:.1f}" for name in names]
        lines.append("| " + " | ".join([str(steps), *memory, *seconds]) + " |")
    return "\n".join(lines)


def draw(rows: Sequence[dict[str, Any]], s: Settings, path: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    colours = {"iMAML": "#1a6fb5", "MAML": "#d1622b", "FOMAML": "#5b8c3e"}
    for name, colour in colours.items():
        own = [row for row in rows if row["method"] == name]
        steps = [row["steps"] for row in own]
        style = {"color": colour, "marker": "o", "markersize": 4, "label": name}
        left.plot(steps, [row["peak_bytes"] / 2**20 for row in own], **style)
        middle = [1e3 * row["seconds"] for row in own]
        around = [[1e3 * abs(row["seconds"] - row[end]) for row in own] for end in ("least", "most")]
        right.errorbar(steps, middle, yerr=around, capsize=2, **style)
    left.set(xlabel="inner gradient steps", ylabel="peak memory, MiB", ylim=(0, None))
    right.set(xlabel="inner gradient steps", ylabel="time, ms (median, least, most)", ylim=(0, None))
    for axes in (left, right):
        axes.grid(color="#d8dee4", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    title = f"{s.num_ways}-way {s.num_shots}-shot, {s.num_filters} filters, {s.num_tasks} tasks at once"
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def read_arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=device_option, default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--setting", choices=["paper", "reduced"], help="default: paper on cuda, reduced on cpu")
    parser.add_argument("--data-dir", help="folder with Omniglot; without it, pictures made here")
    parser.add_argument("--output-dir", type=Path, default=OUTPUT_DIR, help=f"default {OUTPUT_DIR}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it runs")
    options = parser.parse_args()
    options.setting = options.setting or ("reduced" if options.device == "cpu" else "paper")
    return options


if __name__ == "__main__":
    main()
