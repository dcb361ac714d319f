"""What test_sharded_trainer runs in several processes: ``python trainer_run.py FOLDER PROCESSES STAGE``.

Each process leaves ``FOLDER/<stage>/<rank>.json``: for every case the largest difference to one process with plain
tensors, or what was found. The stages "four", "two", "one" and "again" take turns in one run folder, each with another
number of processes.
"""

import json
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import torch
import torch.distributed as dist
from meta_problem import task_loss
from processes import fork
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.utils._pytree import tree_leaves, tree_map

import implicitlayer as il
from implicitlayer import _torch

Tree = dict[str, torch.Tensor]
STEPS = 8
UNTIL = {"four": 0.25, "two": 0.5, "one": 0.75, "again": 1.0}  # of the run that the stages share
FEW = {"max_steps": 3, "num_validations": 1}  # of other runs
CUT = {"u": Shard(0), "w": Shard(1)}  # u [3], w [3, 2]


class Tasks:
    """Points of random planes."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def sample(self, num_tasks: int) -> Any:
        x = torch.randn(2, num_tasks, 4, 2, generator=self.generator, dtype=torch.float64)
        plane = torch.randn(num_tasks, 1, 2, generator=self.generator, dtype=torch.float64)
        y = (x * plane).sum(-1)
        return (x[0], y[0]), (x[1], y[1])

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])


def start() -> Tree:
    draw = torch.Generator().manual_seed(3)
    return {name: torch.randn(*shape, generator=draw).double() for name, shape in (("u", (3,)), ("w", (3, 2)))}


def method_of(name: str, strength: torch.Tensor) -> il.meta.MetaMethod:
    if name == "MAML":
        return il.meta.MAML(task_loss, step_size=0.1, num_steps=2, strength=strength)
    return il.meta.iMAML(task_loss, il.solvers.GradientDescent(0.1, max_steps=3), strength=strength)


def make(theta: Tree, run_dir: Path | None, **settings: Any) -> il.meta.Trainer:
    theta = {name: leaf.detach().clone().requires_grad_() for name, leaf in theta.items()}
    device = next(iter(theta.values())).device
    strength = torch.tensor(1.0, dtype=torch.float64, device=device, requires_grad=True)
    method = method_of(settings.pop("method", "iMAML"), strength)
    leaves = [*theta.values(), strength]
    optimizer = settings.pop("optimizer", torch.optim.Adam)(leaves, lr=0.05)
    defaults: dict[str, Any] = {
        "tasks_per_step": 3,
        "max_steps": STEPS,
        "metric": task_loss,
        "better": "lower",
        "validation": [Tasks(9).sample(5)],
        "num_validations": 2,
        "run_dir": run_dir,
        "checkpoint_steps": 3,
        "checkpoint_seconds": 1e9,
        "report_steps": 4,
        "show_progress": False,
    }
    return il.meta.Trainer(method, theta, Tasks(1), optimizer, **(defaults | settings))


def momentum(leaves: list[torch.Tensor], lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(leaves, lr=lr, momentum=0.9)


def whole(tree: Any) -> Any:
    return tree_map(lambda t: t.full_tensor().detach() if isinstance(t, DTensor) else t, tree)


def state_of(trainer: il.meta.Trainer) -> list[torch.Tensor]:
    """Theta, the learned strength and the state of the optimizer, as whole tensors, in the order of names."""
    leaves = [*(trainer.theta[name] for name in sorted(trainer.theta)), *trainer.method.parameters()]
    state = whole([*leaves, [trainer.optimizer.state[leaf] for leaf in leaves]])
    return [t.detach().clone() for t in tree_leaves(state) if isinstance(t, torch.Tensor)]


def numbers_of(trainer: il.meta.Trainer) -> list[torch.Tensor]:
    """All that a run went through."""
    history = [list(record.values()) for record in ({**r, "seconds": 0.0} for r in trainer.history)]
    test = trainer.evaluate([Tasks(4).sample(5)]).values
    return [*state_of(trainer), *map(torch.tensor, history), test]


def difference(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    pairs = list(zip(found, wanted, strict=True))
    assert all(a.shape == b.shape for a, b in pairs)
    return max(((a - b).abs() / b.abs().clamp_min(1)).max().item() for a, b in pairs)


def cut(device: str = "cpu") -> Tree:
    """Theta in parts on all processes."""
    row = init_device_mesh(device, (dist.get_world_size(),))
    return {name: distribute_tensor(leaf, row, [CUT[name]]) for name, leaf in start().items()}


def layouts() -> dict[str, Tree]:
    """Theta cut in every way that this number of processes allows."""
    plain = start()
    if dist.get_world_size() == 2:
        row = init_device_mesh("cpu", (2,))
        copies = {name: distribute_tensor(leaf, row, [Replicate()]) for name, leaf in plain.items()}
        return {"parts": cut(), "copies": copies, "one leaf in parts": cut() | {"u": copies["u"]}}
    square, named = init_device_mesh("cpu", (2, 2)), init_device_mesh("cpu", (2, 2), mesh_dim_names=("parts", "tasks"))
    ways = {
        "tasks x parts": (square, lambda cut: [Replicate(), cut]),
        "parts x tasks": (named, lambda cut: [cut, Replicate()]),
        "a mesh of two of four": (named["parts"], lambda cut: [cut]),
    }
    return {
        title: {name: distribute_tensor(leaf, mesh, way(CUT[name])) for name, leaf in plain.items()}
        for title, (mesh, way) in ways.items()
    }


def runs(wanted: dict[str, Any]) -> dict[str, Any]:
    """Whole runs in every layout."""
    found = {}
    for title, theta in layouts().items():
        for method in ("iMAML", "MAML") if title == "parts" else ("MAML",):
            trainer = make(theta, None, method=method, **FEW)
            trainer.fit()
            pairs = zip(trainer.theta.values(), theta.values(), strict=True)
            assert all(a.placements == b.placements for a, b in pairs)
            found[f"{title}, {method}"] = difference(numbers_of(trainer), wanted[method])
    return found


def settings(wanted: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Other settings of the trainer, on two processes."""
    found = {}
    for title, changed in CHANGED.items():
        trainer = make(cut(), folder / title, **changed)
        trainer.fit()
        best = trainer.load_best()
        found[title] = difference([*state_of(trainer), torch.tensor(best["validation"])], wanted[title])
    return found


CHANGED: dict[str, dict[str, Any]] = {
    "clipped": {"max_gradient_norm": 0.1, **FEW},
    "memory budget": {"memory_budget": 2**30, **FEW},
    "momentum": {"optimizer": momentum, **FEW},
}


def shared_run(folder: Path, stage: str, wanted: dict[str, Any]) -> dict[str, Any]:
    """The next part of the run that was begun with another number of processes."""
    kept = folder / "kept.pt"
    theta = cut()
    if stage == "one":  # its keys come in another order than in the runs before and after
        theta = {name: theta[name] for name in reversed(theta)}
    trainer = make(theta, folder / "run", method="MAML")
    resumed = trainer.resume()
    found: dict[str, Any] = {}
    if resumed:
        same = all(map(torch.equal, state_of(trainer), torch.load(kept)))
        found["resumed"] = f"step {trainer.step}, {'the same bits' if same else 'other bits'}"
    trainer.fit(until=UNTIL[stage])
    if stage == "two":  # once more, with a stop in between
        if dist.get_rank() == 0:
            shutil.copytree(folder / "before", folder / "twice")
        dist.barrier()
        for until in (0.375, 0.5):
            other = make(cut(), folder / "twice", method="MAML")
            other.resume()
            other.fit(until=until)
        same = all(map(torch.equal, numbers_of(other), numbers_of(trainer)))
        found["a stop in between"] = "the same bits" if same else "other bits"
    if stage == "again":
        found["after four, two, one and two processes"] = difference(numbers_of(trainer), wanted["MAML"])
    state = state_of(trainer)
    if dist.get_rank() == 0:
        torch.save(state, kept)
        shutil.copytree(folder / "run", folder / "before", dirs_exist_ok=True)
    return found


def killed(folder: Path) -> dict[str, Any]:
    """Process 1 dies in step 6, while process 0 waits for its part of the losses."""

    def with_trouble(phi: Any, query: Any) -> torch.Tensor:
        if dist.get_rank() == 1 and trainer.step == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return task_loss(phi, query)

    trainer = make(cut(), folder / "killed", method="MAML", metric=with_trouble)
    trainer.fit()
    return {}


def kills(folder: Path) -> dict[str, Any]:
    """One process that is killed at each event of the file system that a save makes, in a copy of the same folder.

    Found: at how many events, and how often the folder held the run before and after the save, all that belongs to it.
    """
    begun = folder / "begun"
    assert fork(1, lambda: alone_in_parts(begun, lambda trainer: trainer.fit(until=0.25))) == 0
    found, outcome = {"before": 0, "after": 0}, 9
    before = state_in(begun)
    while outcome:
        event = sum(found.values())
        copy = shutil.copytree(begun, folder / str(event))
        outcome = fork(
            1, lambda copy=copy, event=event: alone_in_parts(copy, lambda trainer: save_until(trainer, event))
        )
        state = state_in(copy)
        held = {"before": before, "after": [2 * b for b in before]}
        (which,) = [name for name, wanted in held.items() if all(map(torch.equal, state, wanted))]
        found[which] += 1
    return found


def alone_in_parts(run_dir: Path, act: Callable[[il.meta.Trainer], object]) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    trainer = make(cut(), run_dir, method="MAML")
    trainer.resume()
    act(trainer)


def save_until(trainer: il.meta.Trainer, event: int) -> None:
    """Double all that is learned, and save it, unless ``event`` events of the file system come before."""
    with torch.no_grad():
        for tensor in [*trainer._leaves, *tree_leaves(trainer.optimizer.state_dict()["state"])]:
            tensor.mul_(2)
    left = [event]

    def hook(name: str, arguments: Any) -> None:
        if arguments and str(trainer.run_dir) in str(arguments[0]):
            left[0] -= 1
            if left[0] < 0:
                os._exit(9)

    sys.addaudithook(hook)
    trainer.save()


def state_in(run_dir: Path) -> list[torch.Tensor]:
    """What a run of plain tensors finds there."""
    trainer = make(start(), run_dir, method="MAML")
    assert trainer.resume()
    return state_of(trainer)


def damaged(folder: Path) -> dict[str, Any]:
    """What is said of a checkpoint whose parts are not what was written, and of theta on two meshes."""
    whole = folder / "whole"
    make(cut(), whole, method="MAML").fit(until=0.25)
    found = {}

    def told(name: str, run: Callable[[], object]) -> None:
        try:
            run()
            found[name] = "no error"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"

    def flip(part: Path) -> None:
        bits = bytearray(part.read_bytes())
        bits[len(bits) // 2] ^= 1
        part.write_bytes(bits)

    damages = {
        "a flipped bit": lambda parts: flip(next(parts.glob("*.distcp"))),
        "a missing file": lambda parts: (parts / ".metadata").unlink(),
        "a missing folder": shutil.rmtree,
    }
    for name, damage in damages.items():
        copy = shutil.copytree(whole, folder / name)
        damage(next(copy.glob("checkpoint-*")))
        told(name, make(cut(), copy, method="MAML").resume)
    other = init_device_mesh("cpu", (1, 1))
    told(
        "another mesh", lambda: make(cut() | {"u": distribute_tensor(start()["u"], other, [Shard(0), Shard(0)])}, None)
    )
    return found


STAGES = {
    "four": lambda folder, wanted: runs(wanted) | shared_run(folder, "four", wanted),
    "two": lambda folder, wanted: runs(wanted) | settings(wanted, folder) | shared_run(folder, "two", wanted),
    "one": lambda folder, wanted: shared_run(folder, "one", wanted) | damaged(folder),
    "again": lambda folder, wanted: shared_run(folder, "again", wanted),
    "killed": lambda folder, wanted: killed(folder),
}


def alone(folder: Path, stage: str) -> dict[str, Any]:
    """What one process with plain tensors finds."""
    wanted: dict[str, Any] = {}
    for method in ("iMAML", "MAML") if stage == "two" else ("MAML",) if stage in ("four", "again") else ():
        trainer = make(start(), None, method=method, **({} if stage == "again" else FEW))
        trainer.fit()
        wanted[method] = numbers_of(trainer)
    for title, changed in CHANGED.items() if stage == "two" else ():
        trainer = make(start(), folder / f"plain {title} {os.environ['RANK']}", **changed)
        trainer.fit()
        best = trainer.load_best()
        wanted[title] = [*state_of(trainer), torch.tensor(best["validation"])]
    return wanted


def main(folder: Path, stage: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", module="torch")
    if not _torch.SHARDS_HAVE_SECOND_DERIVATIVES:
        warnings.filterwarnings("ignore", message="torch .* has no second derivatives of DTensor.to_local")
    wanted = alone(folder, stage)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    found = STAGES[stage](folder, wanted)
    (folder / stage).mkdir(exist_ok=True)
    (folder / stage / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    run_folder, num_processes, stage = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    if stage == "kills":
        print(json.dumps(kills(run_folder)))
    elif "RANK" in os.environ:  # under torchrun
        main(run_folder, stage)
    else:
        sys.exit(fork(num_processes, lambda: main(run_folder, stage)))
