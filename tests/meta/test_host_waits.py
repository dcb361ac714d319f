"""How often the host waits for the device: a fixed number of times in an adaptation, not once in every step.

On a GPU each number that Python reads of a tensor stops the host until all kernels before it are done. The reads go
through ``aten::_local_scalar_dense``, on a CPU as well, so that they can be counted here.
"""

from typing import Any

import pytest
import torch
from meta.lines import Lines, task_loss
from torch.utils._python_dispatch import TorchDispatchMode

import implicitlayer as il


class Reads(TorchDispatchMode):
    """Counts the numbers that are read from tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def reads(method: il.meta.MetaMethod, *, backward: bool) -> int:
    """Reads of one adaptation, and of its meta-gradient."""
    theta = {name: torch.zeros((), dtype=torch.float64, requires_grad=True) for name in ("w", "b")}
    support, query = Lines(0).sample(3)
    with Reads() as counted:
        phi = method.adapt(theta, support)
        if backward:
            method.query_losses(theta, phi, query).mean().backward()
    return counted.count


def test_the_counter_sees_what_reads_a_number() -> None:
    value = torch.ones(())
    with Reads() as counted:
        _ = value + 1
        assert counted.count == 0
        value.item(), bool(value > 0), float(value), int(value)
    assert counted.count == 4


def step_sizes() -> dict[str, Any]:
    return {
        "number": 0.1,
        "learned": il.LearnedStrength(0.1),
        "per tensor": {"w": torch.tensor(0.1, dtype=torch.float64), "b": 0.2},
    }


@pytest.mark.parametrize("form", list(step_sizes()))
def test_reads_of_an_adaptation_do_not_grow_with_the_inner_steps(form: str) -> None:
    step_size = step_sizes()[form]
    mode = "last_step" if form == "learned" else None

    def imaml(num_steps: int) -> il.meta.iMAML:
        solver = il.solvers.GradientDescent(step_size=step_size, max_steps=num_steps)
        return il.meta.iMAML(task_loss, solver, strength=il.LearnedStrength(1.0), step_size_gradient=mode)  # type: ignore[arg-type]

    counts = [reads(imaml(num_steps), backward=False) for num_steps in (2, 5, 50)]
    assert counts[0] == counts[1] == counts[2]


@pytest.mark.parametrize("momentum", [0.0, "nesterov"])
def test_reads_of_a_back_propagated_adaptation_do_not_grow_with_the_inner_steps(momentum: Any) -> None:
    counts = [
        reads(il.meta.MAML(task_loss, step_size=0.1, num_steps=num_steps, momentum=momentum), backward=True)
        for num_steps in (2, 5, 50)
    ]
    assert counts[0] == counts[1] == counts[2]
