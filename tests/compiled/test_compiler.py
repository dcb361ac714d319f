"""A layer through the whole compiler: its numbers, and what is found on disk."""

import shutil
from pathlib import Path

import pytest
import torch
from references import F64
from torch._dynamo.utils import counters

import implicitlayer as il


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="no C++ compiler")
def test_by_the_compiler_itself_the_numbers_are_the_same_and_are_found_on_disk_when_compiled_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One solver through the whole compiler: closed form x = log t."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    t = torch.tensor([2.0, 4.0], dtype=F64, requires_grad=True)
    for hits in (0, 2):  # one for the solver, one for the gradient
        counters.clear()
        layer = il.compile(
            il.argmin(lambda x, t: (x.exp() - t * x).sum(), il.solvers.GradientDescent(0.2, 200, rtol=1e-12))
        )
        for _ in range(2):
            x = layer(torch.zeros(2, dtype=F64), t)
            (gradient,) = torch.autograd.grad(x.sum(), t)
        torch.testing.assert_close(x.detach(), t.detach().log(), rtol=1e-11, atol=0)
        torch.testing.assert_close(gradient, 1 / t.detach(), rtol=1e-10, atol=0)
        assert counters["inductor"]["fxgraph_cache_hit"] == hits
