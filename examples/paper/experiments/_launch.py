"""One process for each core: started by the program itself, as torchrun would."""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from ._settings import Experiment

_MOST = 8  # processes that are started without being asked for
_PATIENCE = 30.0  # seconds in which a process may notice that another one is gone


def take_processes(words: Sequence[str]) -> tuple[list[str], int | None]:
    """The words without ``--processes N``, and N; None where it is not among them.

    Raises:
        ValueError: N is no positive number.
    """
    rest = list(words)
    if "--processes" not in rest:
        return rest, None
    at = rest.index("--processes")
    given = rest[at + 1] if at + 1 < len(rest) else ""
    if not (given.isdecimal() and int(given) > 0):
        raise ValueError(f"--processes {given}: must be a number of processes, at least 1.")
    return rest[:at] + rest[at + 2 :], int(given)


def num_processes(experiment: Experiment) -> int:
    """How many processes share the tasks of a meta-step where nobody says: one for each core that torch would use.

    One on a GPU, and in the settings ``"cpu"``, which are those of one core. The matrix products of a task are too
    small for several threads to gain much.
    """
    if experiment.setting == "cpu" or experiment.run.device != "cpu":
        return 1
    return min(torch.get_num_threads(), experiment.outer.tasks_per_step, _MOST)


def start(count: int, words: Sequence[str]) -> int:
    """This program with these words, ``count`` times; the exit code of the first process, or of one that failed.

    Ctrl-C in a terminal reaches all of them, and SIGTERM is passed on: each ends after its step.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    threads = max(1, torch.get_num_threads() // count)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    shared |= {"LOCAL_WORLD_SIZE": str(count), "OMP_NUM_THREADS": str(threads)}
    command, processes = [sys.executable, sys.argv[0], *words], list[subprocess.Popen[bytes]]()

    def pass_on(number: int, frame: Any) -> None:
        for process in processes:
            process.send_signal(number)

    previous = {signal.SIGTERM: signal.signal(signal.SIGTERM, pass_on)}
    previous[signal.SIGINT] = signal.signal(signal.SIGINT, lambda *_: None)  # the others hear it from the terminal
    try:
        for rank in range(count):
            environment = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(subprocess.Popen(command, env=environment))
        return _wait(processes)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(processes: list[subprocess.Popen[bytes]]) -> int:
    """The exit code of the first process that fails, or zero; the others end soon after it, or are ended."""
    failed, deadline = 0, math.inf
    while None in (codes := [process.poll() for process in processes]):
        if any(codes) and not failed:
            failed, deadline = next(filter(None, codes)), time.monotonic() + _PATIENCE
        if time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(0.05)
    return failed or next(filter(None, codes), 0)
