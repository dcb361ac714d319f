"""What test_nccl runs: ``torchrun --nproc-per-node 1 nccl_run.py FOLDER``, a process for each GPU."""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import torch
from sharded_problem import LINEAR, SOLVERS, Cases, objective
from torch.distributed.tensor import Replicate, Shard
from trainer_run import FEW, Tasks, cut, make, start, state_of
from trainer_run import difference as of_runs

import implicitlayer as il


class TasksOnDevice(Tasks):
    """The same tasks, on this process's GPU."""

    def sample(self, num_tasks: int) -> Any:
        return torch.utils._pytree.tree_map(torch.Tensor.cuda, super().sample(num_tasks))


def layers(cases: Cases) -> None:
    """Sharded weights with rows of the data shared, and a quadratic program."""
    for inner, linear in (("NewtonCG", "ConjugateGradient"), ("LBFGS", "Gmres"), ("GradientDescent", "Dense")):
        layer = il.argmin(objective, SOLVERS[inner], linear_solver=LINEAR[linear])
        wanted = cases.alone(layer)
        for placed in ("Shard(0)", "Shard(1)", "Replicate"):
            cases.agree(f"{inner} {linear} {placed}", layer, placed, Shard(0), wanted)
    Q, p = cases.data[0].mT @ cases.data[0] + torch.eye(3), cases.data[0][0]
    x = il.qp(cases.put(Q, Shard(0)), cases.put(p, Replicate()), ub=cases.put(p * 0, Replicate()))
    cases.found["qp"] = (x.full_tensor().cpu() - il.qp(Q, p, ub=p * 0)).abs().max().item()


def training(cases: Cases) -> None:
    """A few steps with theta in parts, and what another trainer reads of them."""
    alone = make(start(), None, method="MAML", **FEW, validation=())
    alone.fit()
    trainers = []
    for _ in range(2):
        trainer = make(cut("cuda"), cases.folder / "run", method="MAML", **FEW, validation=())
        trainer.sampler = TasksOnDevice(1)
        trainers.append(trainer)
    trainers[0].fit()
    cases.found["Trainer"] = of_runs([t.cpu() for t in state_of(trainers[0])], state_of(alone))
    assert trainers[1].resume()
    same = all(map(torch.equal, state_of(trainers[0]), state_of(trainers[1])))
    cases.found["Trainer, read again"] = 0.0 if same else 1.0


if __name__ == "__main__":
    torch.set_num_threads(1)
    with il.meta.distributed(device="cuda", timeout=60) as group:
        cases = Cases(Path(sys.argv[1]), "cuda")
        layers(cases)
        training(cases)
        (cases.folder / f"{group.rank}.json").write_text(json.dumps(cases.found))
