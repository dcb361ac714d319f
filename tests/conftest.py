"""Settings of the whole test suite: Hypothesis profiles, one torch thread per process, a fixed seed for every test."""

import os

os.environ.setdefault("MPLBACKEND", "Agg")

import hypothesis
import pytest
import torch

# Examples come in a fixed order, so that a red run is red again; no deadline, because a shared machine pauses at will.
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, max_examples=25, print_blob=True)
# HYPOTHESIS_PROFILE=thorough: new random examples on every run, many of them.
hypothesis.settings.register_profile("thorough", derandomize=False, deadline=None, max_examples=1000, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

torch.set_num_threads(1)  # the suite runs in several processes


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
