"""Several processes on this machine for one test: scripts that fork, and how tests start them.

A script calls ``fork``; torch is imported once, which is several times faster than torchrun. A process that outlives
the first one that ends by 20 seconds is killed, and so is the script after the time limit of ``launch``.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

OUTSIDE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE")


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def launch(command: list[str], timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """``python command...`` with one thread per process and the import path of the tests.

    A segmentation fault is none of the package, which is Python: torch's threads of gloo had one, once in some fifty
    starts of four processes. It is printed with its stacks, and the script is started once more.
    """
    environment = {name: value for name, value in os.environ.items() if name not in OUTSIDE}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONFAULTHANDLER": "1"}
    for _ in range(2):
        process = subprocess.run(
            [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=timeout
        )
        if abs(process.returncode) != signal.SIGSEGV and "(SIGSEGV)" not in process.stderr:  # torchrun's word for it
            break
        print(f"segmentation fault in {command}:\n{process.stderr}")
    return process


def torchrun(num_processes: int, command: list[str], timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """``torchrun command...``, as users start their programs."""
    agent = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    return launch([*agent, *command], timeout)


def results(folder: Path, num_processes: int) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(num_processes)]


def fork(num_processes: int, function: Callable[[], object]) -> int:
    """``function()`` in as many processes, with the variables that torchrun sets; the largest exit code."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(num_processes)}
    children = {}
    for rank in range(num_processes):
        pid = os.fork()
        if pid == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(num_processes)}
            status = 0
            try:
                function()
            except BaseException:
                traceback.print_exc()
                status = 1
            sys.stderr.flush()
            os._exit(status)
        children[pid] = rank
    codes, deadline = [], None
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            del children[pid]
            codes.append(os.waitstatus_to_exitcode(status))
            # after a failure there is nothing more to wait for
            deadline = deadline or time.monotonic() + 20 * (codes[-1] == 0)
        elif deadline is not None and time.monotonic() > deadline:
            for pid in children:
                os.kill(pid, signal.SIGKILL)
            deadline = None
        else:
            time.sleep(0.02)
    return max(abs(code) for code in codes)
