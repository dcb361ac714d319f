"""The paper's experiments: ``python examples/paper/train.py --help`` lists the presets and says how."""

import os
import sys

# Threads that wait shall sleep: by default they spin, and beside other work a step then takes up to ten times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from experiments._command_line import main

if __name__ == "__main__":
    main()
    if "RANK" in os.environ:
        # One of several processes. Everything is written and the process group is gone, but where Python's shutdown
        # meets a thread of torch's communication that is not done yet, the process aborts ("terminate called without
        # an active exception", one run in ten on a busy machine with torch 2.13), and torchrun calls the run failed.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
