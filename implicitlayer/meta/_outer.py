"""The outer optimizer and what steers it: learning rates, clipping, the closure of quasi-Newton methods."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from implicitlayer.base._sharding import gathered, is_sharded
from implicitlayer.meta._settings import plain

Better = Literal["higher", "lower"]


@dataclass(eq=False)
class OuterStep:
    """One step of the outer problem, from the gradients in ``.grad``; the arguments are those of the trainer."""

    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler | None
    learning_rate: Callable[[float], float] | None
    max_gradient_norm: float | None

    def __post_init__(self) -> None:
        if self.scheduler is not None and self.learning_rate is not None:
            raise ValueError("learning_rate and scheduler both set the optimizer's rates. Give one of the two.")
        if self.scheduler is not None and self.scheduler.optimizer is not self.optimizer:
            raise ValueError("scheduler steers another optimizer. Make it with the optimizer of this trainer.")
        if self.max_gradient_norm is not None and not self.max_gradient_norm > 0:
            raise ValueError(f"max_gradient_norm={self.max_gradient_norm} must be positive. None does not clip.")
        if self.max_gradient_norm is not None and self.needs_closure:
            raise ValueError(
                "max_gradient_norm cannot go with LBFGS: it compares losses along the gradient, and a clipped one is "
                "that of another function. Leave it out, or take another optimizer."
            )
        groups = [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups]
        self._rates = [group["lr"] for group in groups]
        self.settings = plain({"optimizer": type(self.optimizer).__name__, "groups": groups})
        self.settings |= {"scheduler": _scheduler_settings(self.scheduler), "max_gradient_norm": self.max_gradient_norm}

    @property
    def needs_closure(self) -> bool:
        """Whether the optimizer evaluates the gradient of the same tasks several times in one step."""
        return isinstance(self.optimizer, torch.optim.LBFGS)

    @property
    def follows_validation(self) -> bool:
        return isinstance(self.scheduler, ReduceLROnPlateau)

    def check_direction(self, better: Better) -> None:
        """Raise if a scheduler that follows the metric waits for it to go the wrong way."""
        wanted = "max" if better == "higher" else "min"
        if isinstance(self.scheduler, ReduceLROnPlateau) and self.scheduler.mode != wanted:
            raise ValueError(
                f"ReduceLROnPlateau(mode={self.scheduler.mode!r}) and better={better!r} contradict each other: it "
                f"would lower the rate while the metric improves. Make it with mode={wanted!r}."
            )

    @property
    def leaves(self) -> list[torch.Tensor]:
        return [leaf for group in self.optimizer.param_groups for leaf in group["params"]]

    def set_rates(self, done: float) -> None:
        """Put the rates where the share of the budget used, 0...1, wants them."""
        if self.learning_rate is not None:
            for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate * self.learning_rate(done)

    def gradient_norm(self) -> torch.Tensor:
        """Euclidean norm of the whole gradient, 0-d."""
        gradients = [leaf.grad for leaf in self.leaves if leaf.grad is not None]
        if any(map(is_sharded, gradients)):  # a number of each, as they may lie on other processes than one another
            gradients = [gathered(torch.linalg.vector_norm(gradient)) for gradient in gradients]
        return torch.nn.utils.get_total_norm(gradients)

    def clip(self, norm: torch.Tensor) -> None:
        if self.max_gradient_norm is not None:
            leaves = [leaf for leaf in self.leaves if leaf.grad is not None]
            torch.nn.utils.clip_grads_with_norm_(leaves, self.max_gradient_norm, norm)

    def step(self, loss: float, again: Callable[[], float]) -> None:
        """Step with the gradient in ``.grad``; ``again()`` makes it anew elsewhere and returns the loss there."""
        if self.needs_closure:
            known = [loss]  # the first evaluation is the one that has been made
            self.optimizer.step(lambda: known.pop() if known else again())
        else:
            self.optimizer.step()
        if self.scheduler is not None and not self.follows_validation:
            self.scheduler.step()

    def after_validation(self, value: float) -> None:
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(value)

    def state_dict(self) -> dict[str, Any]:
        scheduler = None if self.scheduler is None else self.scheduler.state_dict()
        return {"optimizer": self.optimizer.state_dict(), "scheduler": scheduler}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None and state["scheduler"] is not None:
            self.scheduler.load_state_dict(state["scheduler"])


def _scheduler_settings(scheduler: LRScheduler | None) -> Any:
    """The class of a new scheduler and its plain numbers.

    Loading a state would put back the numbers of the run that saved it, whatever this program asks for; so they are
    compared before that. Those with an underscore are torch's own and differ between its versions.
    """
    if scheduler is None:
        return "NoneType"  # what checkpoints have said so far
    numbers = {name: value for name, value in scheduler.state_dict().items() if name[0] != "_"}
    return {"class": type(scheduler).__name__} | plain(numbers)
