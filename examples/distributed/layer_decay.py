"""One network on several processes: a weight decay for each layer, learned through the solution it leads to.

    for P in 1 2 4; do torchrun --nproc-per-node $P examples/distributed/layer_decay.py; done

The inner problem is to fit a wide network with the decays given, the outer one to choose decays whose network is right
on other data. Columns of the first matrix and rows of the second lie on one process ("tensor parallel"), so no process
ever holds all weights: neither for the network, nor for Newton's steps, nor for the linear solve behind the derivative.

Every run asserts the numbers of one process with plain tensors to 1e-12, and prints the peak memory of the solve and of
its derivative beside theirs: bytes of live tensors on one process, made since the start. Beside the weights themselves
these are their vectors and the activations, of which the narrow ones (inputs and outputs) are whole everywhere. All
steps but the last, in which memory is counted, are timed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

import implicitlayer as il

INPUTS, WIDTH, OUTPUTS = 64, 2048, 4  # 140,000 weights
NUM_DATA = 24  # half of them for the decays
OUTER_STEPS, OUTER_RATE = 3, 1.0
RTOL = 1e-13  # at 1e-10 the linear solves of two runs may stop one step apart, and 7e-11 was seen between them
SOLVER = il.solvers.NewtonCG(rtol=RTOL)
LINEAR = il.ConjugateGradient(rtol=RTOL)
F64 = torch.float64
Tree = dict[str, torch.Tensor]

# Solutions to RTOL, which differ by the order of sums of 10,000 terms besides: a few hundred eps of the largest.
TOLERANCE = 1e-12


def problem(width: int) -> tuple[Tree, Tree, list[torch.Tensor]]:
    """Initial weights, logarithms of the decays, and data: two noisy waves of a projection of the inputs."""
    draw = torch.Generator().manual_seed(0)
    weights = {
        "first": torch.randn(INPUTS, width, generator=draw, dtype=F64) / INPUTS**0.5,
        "second": torch.randn(width, OUTPUTS, generator=draw, dtype=F64) / width**0.5,
    }
    inputs = torch.randn(NUM_DATA, INPUTS, generator=draw, dtype=F64)
    waves = torch.sin(inputs @ torch.randn(INPUTS, OUTPUTS, generator=draw, dtype=F64) / 4)
    targets = waves + 0.1 * torch.randn(NUM_DATA, OUTPUTS, generator=draw, dtype=F64)
    half = NUM_DATA // 2
    decays = {name: torch.tensor(0.0, dtype=F64) for name in weights}
    return weights, decays, [inputs[:half], targets[:half], inputs[half:], targets[half:]]


def misfit(x: Tree, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return ((torch.tanh(inputs @ x["first"]) @ x["second"] - targets) ** 2).sum()


def objective(x: Tree, decays: Tree, start: Tree, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The fit, and how far the weights went from where they started."""
    near = [decays[name].exp() * ((x[name] - start[name]) ** 2).sum() for name in x]
    return 0.1 * misfit(x, inputs, targets) + near[0] + near[1]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(start: Tree, decays: Tree, data: list[torch.Tensor], outer_steps: int) -> dict[str, Any]:
    """A few outer steps: losses on the other data, decays, and the peak memory of the last of them."""
    layer = il.argmin(objective, SOLVER, linear_solver=LINEAR)
    losses, clocks = [], []
    for step in range(outer_steps):
        decays = {name: leaf.detach().requires_grad_() for name, leaf in decays.items()}
        memory = il.meta.PeakMemory()
        clocks.append((time.perf_counter(), time.process_time()))
        with memory if step == outer_steps - 1 else contextlib.nullcontext():  # counting takes time
            loss = misfit(layer(start, decays, start, *data[:2]), *data[2:])
            gradient = torch.autograd.grad(loss, list(decays.values()))
        losses.append(whole(loss).item())
        steps = zip(decays.items(), gradient, strict=True)
        decays = {name: leaf.detach() - OUTER_RATE * slope for (name, leaf), slope in steps}
    found = {name: whole(leaf).item() for name, leaf in decays.items()}
    times = [(after - before) / max(outer_steps - 1, 1) for before, after in zip(clocks[0], clocks[-1], strict=True)]
    spent = dict(zip(("seconds_per_step", "cpu_seconds_per_step"), times, strict=True))  # of all steps but the last
    return {"losses": losses, "decays": found, "peak_bytes": memory.peak} | spent


def cut(width: int, mesh: Any) -> tuple[Tree, Tree, list[torch.Tensor]]:
    weights, decays, data = problem(width)
    placed = {"first": Shard(1), "second": Shard(0)}
    everywhere = [distribute_tensor(t, mesh, [Replicate()]) for t in (*decays.values(), *data)]
    parts = {name: distribute_tensor(leaf, mesh, [placed[name]]) for name, leaf in weights.items()}
    return parts, dict(zip(decays, everywhere[:2], strict=True)), everywhere[2:]


def compare(found: dict[str, Any], wanted: dict[str, Any]) -> float:
    """The largest difference of two runs, relative to the number."""
    pairs = [*zip(found["losses"], wanted["losses"], strict=True)]
    pairs += [(found["decays"][name], wanted["decays"][name]) for name in wanted["decays"]]
    return max(abs(a - b) / max(abs(b), 1.0) for a, b in pairs)


def run(width: int, outer_steps: int) -> dict[str, Any]:
    """The same problem on the processes of the group and on one, and what is asserted of it."""
    size = dist.get_world_size()
    found = train(*cut(width, init_device_mesh("cpu", (size,))), outer_steps)
    alone = train(*problem(width), outer_steps)
    found |= {"difference": compare(found, alone), "of_plain_memory": found["peak_bytes"] / alone["peak_bytes"]}
    found["plain_seconds_per_step"] = alone["seconds_per_step"]
    assert found["difference"] < TOLERANCE, (found, alone)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--smoke", action="store_true", help="a small network, and nothing is written")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    else:  # not under torchrun: one process
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if arguments.smoke:
        print(run(16, 1))
        dist.destroy_process_group()
        return
    found, rank, size = run(WIDTH, OUTER_STEPS), dist.get_rank(), dist.get_world_size()
    assert found["losses"][-1] < found["losses"][0], "learned decays are better on other data"
    peaks: list[Any] = [None] * size
    dist.all_gather_object(peaks, found["peak_bytes"])
    if rank == 0:
        everything = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
        versions = {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()}
        everything[str(size)] = found | {"peak_bytes": peaks, "rtol": RTOL, "versions": versions}
        everything = dict(sorted(everything.items(), key=lambda item: int(item[0])))
        arguments.output.write_text(json.dumps(everything, indent=2) + "\n")
        print(
            "processes | peak MB of one | of plain tensors | seconds a step (of CPU) | loss before, after | difference"
        )
        for processes, entry in everything.items():
            print(
                f"{processes:>9} | {max(entry['peak_bytes']) / 1e6:14.2f} | {entry['of_plain_memory']:16.3f} | "
                f"{entry['seconds_per_step']:14.2f} ({entry['cpu_seconds_per_step']:6.2f}) | "
                f"{entry['losses'][0]:8.5f}, {entry['losses'][-1]:.5f} | {entry['difference']:.1e}"
            )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
