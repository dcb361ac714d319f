"""A run that loses what it has learned says so, and stops or goes back where it was asked to."""

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import implicitlayer as il
from implicitlayer.meta._monitor import WINDOW, collapse

F64 = torch.float64
SHARP_AT = 45  # meta-steps


class Sharpening:
    """Tasks ½ a (w - y)², y near 3, whose support curvature a jumps from 1 to 50: a step of 0.1 diverges from then on.

    One step multiplies w - w* by 1 - 0.1 (50 + 1) = -4.1; the query loss keeps a = 1.
    """

    def __init__(self) -> None:
        self.num_samples = 0

    def sample(self, num_tasks: int) -> Any:
        generator = torch.Generator().manual_seed(self.num_samples)
        self.num_samples += 1
        y = 3 + 0.1 * torch.randn(num_tasks, generator=generator, dtype=F64)
        a = torch.full((num_tasks,), 50.0 if self.num_samples > SHARP_AT else 1.0, dtype=F64)
        return (a, y), (torch.ones_like(a), y)

    def state_dict(self) -> dict[str, Any]:
        return {"num_samples": self.num_samples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_samples = state["num_samples"]


def task_loss(params: Any, batch: Any) -> torch.Tensor:
    a, y = batch
    return 0.5 * a * (params["w"] - y) ** 2


def trainer(run_dir: Path | None = None, line_search: Any = None, **settings: Any) -> il.meta.Trainer:
    theta = {"w": torch.zeros((), dtype=F64, requires_grad=True)}
    solver = il.solvers.GradientDescent(0.1, max_steps=6, line_search=line_search)
    validation = [((torch.ones(4, dtype=F64), torch.full((4,), 3.0, dtype=F64)),) * 2]
    return il.meta.Trainer(
        il.meta.iMAML(task_loss, solver, strength=1.0),
        theta,
        Sharpening(),
        torch.optim.SGD(theta.values(), lr=0.1),
        split=lambda sample: sample,
        max_steps=80,
        report_steps=1,
        metric=task_loss,
        better="lower",
        validation=validation,
        num_validations=8,
        run_dir=run_dir,
        show_progress=False,
        **settings,
    )


def test_a_fixed_step_that_diverges_is_told_once_with_the_remedy() -> None:
    run = trainer()
    with pytest.warns(
        il.meta.CollapseWarning, match=r"raised its own objective in 100% .*line_search='armijo'"
    ) as found:
        run.fit()
    assert len(found) == 1
    (told,) = [record["step"] for record in run.history if "collapsed" in record]
    assert told == SHARP_AT + 3  # of three looks, all of them
    assert run.step == 80


def test_a_searched_step_on_the_same_tasks_is_no_collapse() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = trainer(line_search="armijo")
        run.fit()
    assert run.history[-1]["loss"] < 0.1 * run.history[0]["loss"]


def test_stop_ends_the_run_and_keeps_its_state(tmp_path: Path) -> None:
    run = trainer(tmp_path, on_collapse="stop")
    with pytest.raises(il.meta.CollapseError, match=r"collapses at meta-step 48: .* The run ends here\. .*holds it"):
        run.fit()
    again = trainer(tmp_path, on_collapse="stop")
    assert again.resume() and again.step == run.step == SHARP_AT + 3
    assert torch.equal(again.theta["w"], run.theta["w"])


def test_rollback_goes_back_to_the_best_validation_three_times(tmp_path: Path) -> None:
    run = trainer(tmp_path, on_collapse="rollback")
    with (
        pytest.warns(il.meta.CollapseWarning, match="those of the best validation, at meta-step 40"),
        pytest.raises(il.meta.CollapseError),
    ):
        run.fit()
    back = [record["step"] for record in run.history if "rolled_back" in record]
    assert back == [SHARP_AT + 3, SHARP_AT + 6, SHARP_AT + 9] and run.step == SHARP_AT + 12


def test_rollback_puts_theta_where_it_was(tmp_path: Path) -> None:
    run = trainer(tmp_path, on_collapse="rollback")
    run.fit(until=0.5)
    best = run.theta["w"].detach().clone()
    assert run.best is not None and run.best["step"] == 40
    with pytest.warns(il.meta.CollapseWarning):
        run.fit(until=(SHARP_AT + 3) / 80)
    assert torch.equal(run.theta["w"], best)


def test_a_loss_that_climbs_back_is_a_collapse_and_noise_is_none() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = (0.1 * torch.randn(400, generator=generator)).tolist()

    def history(losses: Any) -> list[dict[str, Any]]:
        return [{"step": k + 1, "loss": loss} for k, loss in enumerate(losses)]

    falling = [1.6 - min(k, 100) * 0.01 + e for k, e in enumerate(noise[:150])]
    flat = [0.5 + e for e in noise]
    assert not any(collapse(history(falling[:k])) for k in range(1, 151))
    assert not any(collapse(history(flat[:k])) for k in range(1, 401))  # half of nothing is lost by chance
    climbing = [0.6 + 0.02 * k for k in range(WINDOW + 40)]
    assert "the meta-loss is" in collapse(history(falling + climbing))


@pytest.mark.parametrize(("better", "sign"), [("higher", 1), ("lower", -1)])
def test_a_metric_that_falls_back_at_a_standing_loss_is_a_collapse(better: str, sign: int) -> None:
    noise = (0.02 * torch.randn(400, generator=torch.Generator().manual_seed(0))).tolist()

    def history(metric: list[float]) -> list[dict[str, Any]]:
        pairs = zip(metric, noise, strict=False)
        return [{"step": k + 1, "loss": 1.3, "accuracy": sign * (m + e)} for k, (m, e) in enumerate(pairs)]

    rising = [0.4 + 0.004 * min(k, 100) for k in range(150)]
    assert not any(collapse(history(rising[:k]), better) for k in range(1, 151))
    a_little, much = ([0.8 - 0.002 * k for k in range(steps)] for steps in (50, 120))
    assert not collapse(history(rising + a_little), better)
    for number in (float("nan"), float("inf")):
        assert not collapse(history([*rising, number]), better)
    told = re.match(r"the metric of the training tasks is (-?[\d.]+) after", collapse(history(rising + much), better))
    assert told is not None and float(told[1]) == pytest.approx(sign * 0.581, abs=0.02)  # mean of the last 20


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"on_collapse": "ignore"}, "on_collapse='ignore' must be one of 'warn', 'rollback', 'stop'"),
        ({"on_collapse": "rollback"}, "needs run_dir, metric and validation"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(**settings)
