"""Training runs of several processes, for test_distributed.

    torchrun --nproc-per-node 2 parallel_run.py FOLDER SCENARIO SCENARIO ...
    python parallel_run.py --fork 4 FOLDER SCENARIO

The first form is the real thing. The second imports torch once and forks into processes with the variables that
torchrun sets, which is several times faster.

A scenario is JSON: settings of ``make_trainer`` and of this script: "run" (folder inside FOLDER), "timeout", and a step
at which process 1 shall "die", "stall" or be asked to "stop"; "seed": draw other tasks on every process. Each process
leaves ``FOLDER/<run>/<rank>.json`` (or ``<out>-<rank>.json``): what it learned and measured.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from meta.lines import Lines, comparable, make_trainer, tensors
from processes import fork

import implicitlayer as il


def train(folder: Path, settings: dict[str, Any], group: il.meta.WorkerGroup) -> None:
    trouble = {name: settings.pop(name, None) for name in ("die", "stall", "stop", "seed")}
    out = f"{settings.pop('out')}-{group.rank}.json" if "out" in settings else f"{group.rank}.json"
    trainer = make_trainer(folder, **settings)
    sample = trainer.sampler.sample

    def sample_with_trouble(num_tasks: int) -> Any:
        if group.rank == 1 and trainer.step == trouble["die"]:
            os.kill(os.getpid(), signal.SIGKILL)
        if group.rank == 1 and trainer.step == trouble["stall"]:
            time.sleep(60)
        if group.rank == 1 and trainer.step == trouble["stop"]:
            os.kill(os.getpid(), signal.SIGINT)
        return sample(num_tasks)

    trainer.sampler.sample = sample_with_trouble  # type: ignore[method-assign]
    if trouble["seed"] is not None:
        trainer.sampler.generator.manual_seed(trouble["seed"] + group.rank)
    resumed, outcome = False, ""
    try:
        resumed = trainer.resume()
    except (ValueError, il.meta.WorkerLostError) as error:
        outcome = f"{type(error).__name__}: {error}"
    try:
        if not outcome:
            trainer.fit()
    except (KeyboardInterrupt, ValueError) as error:
        outcome = f"{type(error).__name__}: {error}"
    episodes = [Lines(3).sample(7), Lines(4).sample(1)]
    result = {
        "resumed": resumed,
        "outcome": outcome,
        "step": trainer.step,
        "learned": tensors(trainer).tolist(),
        "history": comparable(trainer.history),
        "test": trainer.evaluate(episodes).values.tolist(),
    }
    folder.mkdir(exist_ok=True)
    (folder / out).write_text(json.dumps(result))


def main(folder: Path, scenarios: list[str]) -> None:
    torch.set_num_threads(1)
    settings = [json.loads(scenario) for scenario in scenarios]
    with il.meta.distributed(device="cpu", timeout=min(s.pop("timeout", 60.0) for s in settings)) as group:
        for each in settings:
            train(folder / each.pop("run"), each, group)


if __name__ == "__main__":
    if sys.argv[1] == "--fork":
        make_trainer(None, max_steps=1).fit()  # what torch loads at first use is loaded once
        sys.exit(fork(int(sys.argv[2]), lambda: main(Path(sys.argv[3]), sys.argv[4:])))
    main(Path(sys.argv[1]), sys.argv[2:])
