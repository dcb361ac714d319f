"""What does a training step of a deep equilibrium model cost, against the same written by hand?

By hand: Anderson's acceleration, and a backward hook that solves for the gradient by the same routine, as in the
tutorial on deep implicit layers (Kolter, Duvenaud, Johnson, NeurIPS 2020). Both solve to the same tolerances; gradients
are compared. Times are CPU seconds of one process, in turns: the least of the rounds, and the median of the ratios.

    python examples/benchmarks/deq_step.py            # a minute on one core
    python examples/benchmarks/deq_step.py --smoke    # few rounds
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

import implicitlayer as il

CASES = ((32, 16, 200), (256, 64, 60), (512, 256, 25))  # batch, width, rounds
FORWARD, BACKWARD, MEMORY = 1e-4, 1e-4, 5


class Cell(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(width, width)

    def forward(self, z: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(z) + u)


def anderson(f, start: torch.Tensor, rtol: float, max_steps: int = 60) -> torch.Tensor:
    """The tutorial's routine: batched least squares over the last points; relative residual over the whole batch."""
    batch, width = start.shape
    X = torch.zeros(batch, MEMORY, width)
    F = torch.zeros(batch, MEMORY, width)
    X[:, 0], F[:, 0] = start, f(start)
    X[:, 1], F[:, 1] = F[:, 0], f(F[:, 0])
    H = torch.zeros(batch, MEMORY + 1, MEMORY + 1)
    H[:, 0, 1:] = H[:, 1:, 0] = 1
    y = torch.zeros(batch, MEMORY + 1, 1)
    y[:, 0] = 1
    first = float((F[:, 0] - start).norm())
    for k in range(2, max_steps):
        n = min(k, MEMORY)
        G = F[:, :n] - X[:, :n]
        H[:, 1 : n + 1, 1 : n + 1] = torch.bmm(G, G.transpose(1, 2)) + 1e-6 * torch.eye(n)[None]
        alpha = torch.linalg.solve(H[:, : n + 1, : n + 1], y[:, : n + 1])[:, 1 : n + 1, 0]
        X[:, k % MEMORY] = (alpha[:, None] @ F[:, :n])[:, 0]
        F[:, k % MEMORY] = f(X[:, k % MEMORY])
        if float((F[:, k % MEMORY] - X[:, k % MEMORY]).norm()) <= rtol * first:
            break
    return X[:, k % MEMORY]


def by_hand(cell: Cell, u: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        z = anderson(lambda z: cell(z, u), torch.zeros_like(u), FORWARD)
    z = cell(z, u)
    there = z.clone().detach().requires_grad_()
    image = cell(there, u)

    def backward(v: torch.Tensor) -> torch.Tensor:
        return anderson(lambda g: torch.autograd.grad(image, there, g, retain_graph=True)[0] + v, v, BACKWARD)

    z.register_hook(backward)
    return z


def step(equilibrium, cell: Cell, u: torch.Tensor) -> torch.Tensor:
    cell.zero_grad(set_to_none=True)
    (equilibrium(u) ** 2).mean().backward()
    return cell.linear.weight.grad.clone()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="few rounds")
    options = parser.parse_args()
    torch.set_num_threads(1)

    rows = []
    for batch, width, rounds in CASES[: 1 if options.smoke else None]:
        torch.manual_seed(0)
        cell, u = Cell(width), torch.randn(batch, width)
        layer = il.DeepEquilibrium(
            cell,
            solver=il.solvers.AndersonAcceleration(rtol=FORWARD, max_steps=60),
            linear_solver=il.Bicgstab(rtol=BACKWARD),
        )
        ways = {"layer": layer, "by hand": lambda u, cell=cell: by_hand(cell, u)}
        gradients = {name: step(way, cell, u) for name, way in ways.items()}
        apart = float((gradients["layer"] - gradients["by hand"]).norm() / gradients["layer"].norm())
        seconds = {name: [] for name in ways}
        for _ in range(2 if options.smoke else rounds):
            for name, way in ways.items():
                started = time.process_time()
                step(way, cell, u)
                seconds[name].append(time.process_time() - started)
        ratios = [a / b for a, b in zip(seconds["layer"], seconds["by hand"], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        rows.append(
            {
                "batch": batch,
                "width": width,
                "rounds": len(ratios),
                "layer_ms": 1e3 * min(seconds["layer"]),
                "by_hand_ms": 1e3 * min(seconds["by hand"]),
                "ratio_of_least": min(seconds["layer"]) / min(seconds["by hand"]),
                "ratio": statistics.median(ratios),
                "quartiles": [low, high],
                "gradients_apart": apart,
            }
        )
        times = f"{rows[-1]['layer_ms']:.1f} ms, by hand {rows[-1]['by_hand_ms']:.1f} ms"
        print(f"batch {batch}, width {width}: {times}, ", end="")
        ratios = f"{rows[-1]['ratio_of_least']:.2f}, median {rows[-1]['ratio']:.2f}"
        print(f"ratio {ratios} ({low:.2f}-{high:.2f}); gradients differ by {apart:.1e}")
        assert apart < 1e-2  # both to a residual of 1e-4, and the Jacobian is no contraction by much
    Path("runs").mkdir(exist_ok=True)
    about = {"torch": torch.__version__, "threads": 1, "smoke": options.smoke}
    Path("runs/deq_step.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
