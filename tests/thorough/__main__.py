"""The thorough run: random problems of every kind, no silent wrong result, and the figures as a table at the end.

python -m tests.thorough                                   all families
python -m tests.thorough --problems 500 --minutes 2        a short look
python -m tests.thorough --family root --problems 200      one family
python -m tests.thorough --family root --case n=3,tenths=10,seed=7,solver=0,single=0     one problem, with its traceback
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from tests.thorough._family import DrawnFamily
from tests.thorough._report import Report
from tests.thorough._run import FAMILIES, one_thread, run
from tests.thorough._trial import FAILURES


def main(arguments: list[str] | None = None) -> int:
    names = [family.name for family in FAMILIES]
    parser = argparse.ArgumentParser(
        prog="python -m tests.thorough",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="families:\n" + "\n".join(f"  {f.name:16}{f.question}" for f in FAMILIES),
    )
    everything = sum(family.share for family in FAMILIES)
    parser.add_argument("--problems", type=int, default=everything, help=f"how many in all, default {everything}")
    parser.add_argument("--minutes", type=float, default=None, help="stop after so many; the rest is left out")
    parser.add_argument("--seed", type=int, default=0, help="of the whole run")
    parser.add_argument("--family", action="append", choices=names, help="this one only; may be repeated")
    parser.add_argument("--case", help="one problem of the one --family, by its integers")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--out", type=Path, default=Path("runs/thorough"), help="folder of thorough.md, thorough.json")
    given = parser.parse_args(arguments)
    families = [family for family in FAMILIES if given.family is None or family.name in given.family]
    if given.problems < 1 or given.processes < 1:
        parser.error("--problems and --processes must be at least 1.")
    if given.case is not None:
        if len(families) != 1 or not isinstance(families[0], DrawnFamily):
            parser.error("--case needs exactly one --family, one whose problems are drawn from integers.")
        one_thread()
        outcome = families[0].one(families[0].integers(given.case))
        print(outcome)
        return int(outcome.verdict in FAILURES)
    start = time.monotonic()
    outcomes = run(families, given.problems, seed=given.seed, minutes=given.minutes, processes=given.processes)
    command = " ".join(["python -m tests.thorough", *(sys.argv[1:] if arguments is None else arguments)])
    report = Report(outcomes, families, command, given.problems, time.monotonic() - start, given.seed)
    report.write(given.out)
    print(report.markdown())
    print(f"written to {given.out}")
    return int(not report.passed)


if __name__ == "__main__":
    sys.exit(main())
