"""A layer through the whole compiler: its numbers, and what is found on disk."""

from functools import partial
from pathlib import Path

import pytest
import torch
from references import F64
from torch._dynamo.utils import counters

import implicitlayer as il
from implicitlayer import _torch
from implicitlayer.compiled._layer import cpp_compiler

needs_compiler = pytest.mark.skipif(cpp_compiler() is None, reason="no C++ compiler")


@needs_compiler
def test_a_loop_that_ends_before_its_first_round_keeps_what_it_was_given() -> None:
    """torch's own loop gives its memory away there, to t, u and v below (pytorch #146213)."""

    def function(a: torch.Tensor, x: torch.Tensor, rounds: torch.Tensor) -> tuple[torch.Tensor, ...]:
        def body(k: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return k + 1, torch.where(k < rounds, s * 0.5, s)

        _, s = _torch.while_loop(lambda k, s: k < rounds, body, (torch.zeros((), dtype=torch.int64), a @ x))
        t = a @ (s + 1)
        u = a @ (t * 2)
        v = a @ (u - s.sin())
        return t, u, v, s + v

    torch.manual_seed(0)
    a, x = torch.randn(4, 4, dtype=F64), torch.randn(4, dtype=F64)
    backend = partial(_torch.inductor(), config_patches={"cpp_wrapper": True})
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    for rounds in map(torch.tensor, (0, 1, 3)):
        torch.testing.assert_close(compiled(a, x, rounds), function(a, x, rounds), rtol=1e-13, atol=1e-13)


@needs_compiler
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
