"""A table at the end of a verbose run: which check found which seeded fault."""

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if terminalreporter.verbosity < 1:
        return
    found = [
        (report.nodeid.split("[", 1)[1].removesuffix("]"), str(value))
        for report in terminalreporter.getreports("passed")
        for name, value in getattr(report, "user_properties", [])
        if name == "caught by" and report.when == "call"
    ]
    if found:
        terminalreporter.section("seeded faults and the checks that found them")
        width = max(len(name) for name, _ in found)
        for name, check in sorted(found):
            terminalreporter.write_line(f"{name:{width}}  {check}")
