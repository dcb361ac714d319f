"""What do 256 curve fits cost in one batched call, against a loop over SciPy's least squares?

    python examples/benchmarks/curve_fits.py [--smoke] [--output FILE.json]

Exponential decays with an offset (three parameters, 50 noisy points), float64, one core. SciPy fits a NumPy function,
with the Jacobian written by hand or by its own differences (its default), or the torch function that the layer has. All
find the same parameters (asserted). CPU times, medians over the rounds; ratios to the batched call, taken in a round.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy
import torch
from scipy import optimize

import implicitlayer as il

TIME = torch.linspace(0, 5, 50, dtype=torch.float64)
ACCURACY = 1e-5  # SciPy's default tolerances are 1e-8 on the sum of squares, whose root that is, with some to spare


def residuals(b: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return b[0] * torch.exp(-b[1] * TIME) + b[2] - y


def ways(targets: torch.Tensor) -> dict[str, Callable[[], np.ndarray]]:
    time_, ys, init = TIME.numpy(), targets.numpy(), np.ones(3)
    layer = il.argmin(il.least_squares(residuals), il.solvers.LevenbergMarquardt(rtol=1e-8))
    fits = torch.func.vmap(lambda y: layer(torch.ones(3, dtype=torch.float64), y))

    def by_numpy(b: np.ndarray, y: np.ndarray) -> np.ndarray:
        return b[0] * np.exp(-b[1] * time_) + b[2] - y

    def by_torch(b: np.ndarray, y: np.ndarray) -> np.ndarray:
        return residuals(torch.from_numpy(b), torch.from_numpy(y)).numpy()

    def slopes(b: np.ndarray, y: np.ndarray) -> np.ndarray:
        e = np.exp(-b[1] * time_)
        return np.stack([e, -b[0] * time_ * e, np.ones_like(e)], 1)

    def loop(function: Callable[..., np.ndarray], jacobian: object, method: str) -> Callable[[], np.ndarray]:
        fit = optimize.least_squares
        return lambda: np.stack([fit(function, init, jacobian, method=method, args=(y,)).x for y in ys])

    return {
        "LevenbergMarquardt, batched": lambda: fits(targets).numpy(),
        "least_squares, lm, Jacobian by hand": loop(by_numpy, slopes, "lm"),
        "least_squares, trf, Jacobian by hand": loop(by_numpy, slopes, "trf"),
        "least_squares, trf, differences": loop(by_numpy, "2-point", "trf"),
        "least_squares, trf, differences of the torch function": loop(by_torch, "2-point", "trf"),
        "leastsq, Jacobian by hand": lambda: np.stack(
            [optimize.leastsq(by_numpy, init, args=(y,), Dfun=slopes)[0] for y in ys]
        ),
    }


def compare(count: int, rounds: int) -> dict[str, dict[str, float]]:
    generator = torch.Generator().manual_seed(0)
    random = torch.rand(count, 3, dtype=torch.float64, generator=generator) * torch.tensor([2.0, 1.0, 0.5]) + 0.3
    noise = torch.randn(count, len(TIME), dtype=torch.float64, generator=generator)
    targets = random[:, :1] * torch.exp(-random[:, 1:2] * TIME) + random[:, 2:] + 0.02 * noise
    seconds: dict[str, list[float]] = {}
    methods = ways(targets)
    answers = {name: way() for name, way in methods.items()}
    reference = next(iter(answers.values()))
    for name, answer in answers.items():
        assert np.abs(answer - reference).max() < ACCURACY, name
    for _ in range(rounds):
        for name, way in methods.items():
            start = time.process_time()
            way()
            seconds.setdefault(name, []).append(time.process_time() - start)
    own = seconds["LevenbergMarquardt, batched"]
    ratio = {name: statistics.median(t / o for t, o in zip(times, own, strict=True)) for name, times in seconds.items()}
    return {name: {"s": statistics.median(times), "ratio": ratio[name]} for name, times in seconds.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="few fits and rounds; the numbers mean nothing")
    parser.add_argument("--output", type=Path, help="where to write the numbers as JSON")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    results = compare(*((8, 1) if options.smoke else (256, 7)))
    about = {"machine": platform.machine(), "python": platform.python_version(), "torch": torch.__version__}
    about["scipy"] = scipy.__version__
    print(f"{about}, 1 thread, {' '.join(['python', *sys.argv])}")
    for name, r in results.items():
        print(f"{name:54} {1e3 * r['s']:8.1f} ms {r['ratio']:6.1f} x")
    if options.output:
        options.output.write_text(json.dumps({**about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
