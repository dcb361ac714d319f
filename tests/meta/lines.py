"""A meta-learning problem of two unknowns that trains in milliseconds, for the tests of the trainer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import implicitlayer as il

# Tasks: lines a·x + c with (a, c) near (2, -1); the model is w·x + b. B: tasks, K: points.


class Lines:
    """A task sampler with its own generator."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def sample(self, num_tasks: int) -> Any:
        def points(a: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x = torch.randn(num_tasks, 5, generator=self.generator, dtype=torch.float64)
            return x, a * x + c

        line = [value + 0.3 * torch.randn(num_tasks, 1, generator=self.generator).double() for value in (2.0, -1.0)]
        return points(*line), points(*line)

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])


def task_loss(params: dict[str, torch.Tensor], batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    x, y = batch
    return (params["w"].unsqueeze(-1) * x + params["b"].unsqueeze(-1) - y).square().mean(-1)


def hit_rate(params: dict[str, torch.Tensor], batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    x, y = batch
    return ((params["w"].unsqueeze(-1) * x + params["b"].unsqueeze(-1) - y).abs() < 0.3).double().mean(-1)


def make_trainer(
    run_dir: Path | None,
    *,
    step_size: float = 0.1,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
    names: tuple[str, ...] = ("w", "b"),
    **settings: Any,
) -> il.meta.Trainer:
    """A trainer of lines with a learned strength; ``settings`` are the trainer's."""
    theta = {name: torch.zeros((), dtype=torch.float64, requires_grad=True) for name in names}
    # quasi-Newton steps on the few tasks of one step would make a learned strength negative, which is an error
    learned = optimizer is not torch.optim.LBFGS
    strength = torch.tensor(1.0, dtype=torch.float64, requires_grad=learned)
    method = il.meta.iMAML(task_loss, il.solvers.GradientDescent(step_size=step_size, max_steps=5), strength=strength)
    if learned:
        outer = optimizer([{"params": list(theta.values())}, {"params": [strength], "lr": 0.01}], lr=0.05)
    else:
        outer = optimizer(theta.values(), lr=0.3, max_iter=3)
    defaults: dict[str, Any] = {
        "max_steps": 60,
        "metric": hit_rate,
        "learning_rate": il.meta.cosine_decay if scheduler is None else None,
        "scheduler": None if scheduler is None else scheduler(outer),
        "validation": [Lines(9).sample(20)],
        "run_dir": run_dir,
        "checkpoint_steps": 10,
        "show_progress": False,
    }
    return il.meta.Trainer(method, theta, Lines(1), outer, **(defaults | settings))


def tensors(trainer: il.meta.Trainer) -> torch.Tensor:
    """All that was learned, in one vector."""
    return torch.stack([*trainer.theta.values(), *trainer.method.parameters()]).detach()


def comparable(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A history without its clock."""
    return [{name: value for name, value in record.items() if name != "seconds"} for record in history]
