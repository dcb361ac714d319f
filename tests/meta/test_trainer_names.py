"""A checkpoint's tensors are found by their names."""

from pathlib import Path
from typing import Any

import pytest
import torch
from meta.lines import comparable, make_trainer, tensors

import implicitlayer as il


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("by", ["resume", "load_state_dict", "load_best"])
def test_tensors_and_their_steps_are_resumed_by_name_in_whatever_order(tmp_path: Path, optimizer: Any, by: str) -> None:
    settings: dict[str, Any] = {"max_steps": 8, "num_validations": 8, "optimizer": optimizer}
    straight = make_trainer(tmp_path / "straight", **settings)
    straight.fit()
    make_trainer(tmp_path / "cut", **settings).fit(until=0.5)
    resumed = make_trainer(tmp_path / "cut", names=("b", "w"), **settings)
    if by == "load_best":
        assert resumed.load_best()["step"] <= 4
        saved = il.meta.load_checkpoint(tmp_path / "cut" / "best.pt")
        named = dict(zip(saved["names"]["theta"], saved["theta"], strict=True))
        assert named == {f"theta[{name!r}]": leaf for name, leaf in resumed.theta.items()}
        return
    if by == "resume":
        assert resumed.resume()
    else:
        resumed.load_state_dict(il.meta.load_checkpoint(tmp_path / "cut" / "checkpoint.pt"))
        resumed._owns_folder = True
    resumed.fit()
    assert comparable(resumed.history) == comparable(straight.history)
    assert {n: leaf.item() for n, leaf in resumed.theta.items()} == {
        n: leaf.item() for n, leaf in straight.theta.items()
    }


def test_tensors_of_other_names_and_a_history_in_another_order_are_refused(tmp_path: Path) -> None:
    make_trainer(tmp_path / "adam", max_steps=2).fit()
    with pytest.raises(il.meta.CheckpointError, match=r"in theta: \[\"theta\['b'\]\"\] only there, .*'c'.* only here"):
        make_trainer(tmp_path / "adam", names=("w", "c"), max_steps=2).resume()
    make_trainer(tmp_path / "lbfgs", max_steps=2, optimizer=torch.optim.LBFGS).fit()
    other = make_trainer(tmp_path / "lbfgs", max_steps=2, optimizer=torch.optim.LBFGS, names=("b", "w"))
    with pytest.raises(il.meta.CheckpointError, match=r"LBFGS: in its order, too"):
        other.resume()


def test_a_checkpoint_without_names_is_resumed_in_its_order(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.fit()
    state = il.meta.load_checkpoint(tmp_path / "checkpoint.pt")
    del state["names"]
    il.meta.save_checkpoint(tmp_path / "checkpoint.pt", state)
    resumed = make_trainer(tmp_path, max_steps=4)
    assert resumed.resume() and torch.equal(tensors(resumed), tensors(trainer))
