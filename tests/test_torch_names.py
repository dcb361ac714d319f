"""What the package relies on of names of torch that are not public: each test says what breaks when one changes."""

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from implicitlayer import _torch

PACKAGE = Path(_torch.__file__).parent
X = torch.tensor([1.0, 2.0], dtype=torch.float64)


def private_names(path: Path) -> list[str]:
    """Where a file imports a private module of torch, or reads ``torch._x``, ``torch.a._x`` or ``forward_ad._x``."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.Attribute):
            parts, inner = [node.attr], node.value
            while isinstance(inner, ast.Attribute):
                parts, inner = [inner.attr, *parts], inner.value
            if isinstance(inner, ast.Name) and inner.id in ("torch", "forward_ad"):
                names.append(".".join(["torch", *parts]))
        for name in names:
            private = any(part.startswith("_") and not part.startswith("__") for part in name.split(".")[1:])
            if name.split(".")[0] == "torch" and private:
                found.append(f"{path.name}:{node.lineno} {name}")
    return found


def test_one_file_alone_touches_names_of_torch_that_are_not_public() -> None:
    found = [name for path in sorted(PACKAGE.rglob("*.py")) if path.name != "_torch.py" for name in private_names(path)]
    assert found == []
    assert len(private_names(PACKAGE / "_torch.py")) > 10  # the search sees them where they are


def test_transforms_and_the_wrappers_of_their_tensors_are_seen() -> None:
    """Breaks: which tensors of a call need a derivative, and every choice between the plain and the general path."""
    seen: list[Any] = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(
            (_torch.transforms_active(), _torch.is_wrapped(x), _torch.is_mapped(x), _torch.current_level() or 0)
        )
        seen.append((_torch.level_of(x), _torch.is_wrapped(_torch.unwrapped(x))))
        return x.sin()

    torch.vmap(look)(X)
    torch.func.vjp(look, X)
    assert seen == [(True, True, True, 1), (1, False), (True, True, False, 1), (1, False)]
    assert not _torch.transforms_active() and not _torch.is_wrapped(X)
    assert (_torch.current_level(), _torch.level_of(X) <= 0) == (None, True)


def test_a_wrapper_that_outlives_its_level_is_taken_off() -> None:
    """Breaks: graphs that are kept beyond the transform that made them (a layer inside the objective of a layer)."""
    kept: list[torch.Tensor] = []
    torch.func.vjp(lambda x: (kept.append(x), x.sin())[1], X)
    assert _torch.is_wrapped(kept[0]) and not _torch.is_wrapped(_torch.unwrapped_if_over(kept[0]))
    assert _torch.unwrapped_if_over(X) is X


def test_forward_mode_is_seen_and_its_levels_are_counted() -> None:
    """Breaks: forward over forward is silently zero in torch itself, and is refused by this count."""
    counts: list[tuple[bool, int]] = []

    def look(x: torch.Tensor) -> torch.Tensor:
        counts.append((_torch.forward_mode_active(), _torch.num_forward_levels()))
        return x.sin()

    torch.func.jvp(look, (X,), (X,))
    torch.func.jvp(lambda x: torch.func.jvp(look, (x,), (x,))[1], (X,), (X,))
    assert counts == [(True, 1), (True, 2)]
    assert (_torch.forward_mode_active(), _torch.num_forward_levels()) == (False, 0)
    with forward_ad.dual_level():
        assert _torch.forward_mode_active()


def test_levels_of_vmap_are_counted() -> None:
    """Breaks: a mapped layer of DTensors ends in an error of torch's own."""
    counts: list[int] = []
    torch.vmap(torch.vmap(lambda x: (counts.append(_torch.num_map_levels()), x)[1]))(X[None])
    torch.func.grad(lambda x: (counts.append(_torch.num_map_levels()), x.sum())[1])(X)
    assert counts == [2, 0]


def test_a_function_is_mapped_over_vectors_as_by_vmap_and_the_level_ends_with_an_error() -> None:
    """Breaks: dense matrices of an operator."""
    matrix = torch.tensor([[2.0, 1.0], [0.0, 3.0]], dtype=torch.float64)
    assert torch.equal(_torch.mapped_over(lambda v: matrix @ v, torch.eye(2, dtype=torch.float64)), matrix.T)
    with pytest.raises(ZeroDivisionError):
        _torch.mapped_over(lambda v: v * (1 // 0), X)
    assert _torch.current_level() is None


def test_operations_without_a_rule_of_vmap_are_mapped_without_a_warning() -> None:
    """Breaks: NewtonCG and il.Dense() for an objective with such an operation."""
    x = torch.tensor([3.0, 1.0, 2.0], requires_grad=True)
    y = x.cummax(0)[0]
    rows = _torch.mapped_over(lambda v: torch.autograd.grad(y, x, v, retain_graph=True)[0], torch.eye(3))
    assert rows.tolist() == [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]
    with pytest.warns(UserWarning, match="performance drop"):  # of the user's own vmap torch still says it
        torch.vmap(lambda v: torch.autograd.grad(y, x, v, retain_graph=True)[0])(torch.eye(3))


def test_batches_of_cotangents_are_unwrapped_and_wrapped_again() -> None:
    """Breaks: ``torch.autograd.grad(is_grads_batched=True)`` through a layer."""
    seen: list[Any] = []

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(x: torch.Tensor) -> torch.Tensor:
            return 2 * x

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            level = _torch.batch_level()
            plain = _torch.remove_batch(g, level, 3, 0)
            seen.append((_torch.is_batched_by_grad(g), _torch.is_batched_by_grad(plain), tuple(plain.shape)))
            return _torch.add_batch(2 * plain, 0, level)

    x = X.clone().requires_grad_()
    cotangents = torch.arange(6, dtype=torch.float64).reshape(3, 2)
    (found,) = torch.autograd.grad(Twice.apply(x), x, cotangents, is_grads_batched=True)
    assert torch.equal(found, 2 * cotangents) and seen == [(True, False, (3, 2))]


def test_modes_are_counted_taken_off_put_back_and_switched_off() -> None:
    """Breaks: what an objective reads is watched by such modes; a solver inside it must run past them."""
    seen = []

    class Counting(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Counting() as mode:
        assert _torch.num_modes() == 1
        with _torch.without_modes():
            X.sin()
        assert seen == []
        assert _torch.pop_mode() is mode
        X.sin()
        assert seen == []
        _torch.push_mode(mode)
        X.sin()
        assert len(seen) == 1


def test_hooks_on_saved_tensors_are_taken_off_and_put_back() -> None:
    """Breaks: layers under activation checkpointing or offloading."""
    assert _torch.saving_hooks(False) is None
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (packed.append(t), t)[1], lambda t: t):
        pair = _torch.saving_hooks(False)
        assert pair is not None and _torch.saving_hooks(True) is not None
        _torch.pop_saving_hooks()
        X.clone().requires_grad_().sin()
        assert packed == []
        _torch.push_saving_hooks(*pair)
        X.clone().requires_grad_().sin()
        assert len(packed) == 1


@pytest.mark.parametrize("retain", [False, True])
def test_a_backward_tells_whether_its_graph_is_kept(retain: bool) -> None:
    """Breaks: the graph of a call goes with the first backward, unless that is told to retain it."""
    asked = []
    x = X.clone().requires_grad_()
    y = x.sin()
    y.register_hook(lambda g: asked.append(_torch.keeps_graph()))
    y.sum().backward(retain_graph=retain)
    assert asked == [retain]


def test_a_function_that_is_not_compiled_runs_as_it_is() -> None:
    """Breaks: layers inside code compiled by torch.compile; that the compiler is not imported is what it is for."""
    assert _torch.not_compiled(lambda x: x + 1)(1) == 2


def test_an_operator_may_record_and_transform_as_outside() -> None:
    """Breaks: a compiled layer inside of a compiled model; what is compiled for it is not found, or cannot be made."""
    keys: list[Any] = []

    def body(x: torch.Tensor) -> torch.Tensor:
        keys.append(str(torch._C._dispatch_tls_local_exclude_set()))
        with _torch.as_in_a_new_thread():
            keys.append(str(torch._C._dispatch_tls_local_exclude_set()))
            return torch.func.grad(lambda y: y.sin().sum())(x.detach())

    schema = "(Tensor x) -> Tensor"
    operator = torch.library.custom_op("implicitlayer_test::cosine", body, mutates_args=(), schema=schema)
    torch.testing.assert_close(operator(X.clone().requires_grad_()), X.cos())
    outside = str(torch._C._dispatch_tls_local_exclude_set())
    assert keys[0] != outside and keys[1] == outside


def test_lists_of_tensors_are_added_subtracted_and_multiplied_in_one_call() -> None:
    """Breaks: the steps of gradient descent."""
    x = [X.clone(), 3 * X]
    for found, expected in (
        (_torch.foreach_add(x, [X, X], alpha=2.0), [3 * X, 5 * X]),
        (_torch.foreach_sub(x, [X, X]), [0 * X, 2 * X]),
        (_torch.foreach_mul(x, 0.5), [0.5 * X, 1.5 * X]),
    ):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    _torch.foreach_add_(x, [X, X], alpha=-1.0)
    _torch.foreach_sub_(x, [X, X])
    assert torch.equal(x[0], -X) and torch.equal(x[1], X)


def test_a_dispatch_mode_sees_every_operator() -> None:
    """Breaks: ``il.meta.peak_memory``; and trees of tensors, everywhere."""
    seen = []

    class Seeing(_torch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Seeing():
        X.sin()
    assert len(seen) == 1 and _torch.pytree.tree_leaves({"a": [1, (2,)]}) == [1, 2]


def test_a_class_of_tensors_without_memory_sees_operators_and_no_functions() -> None:
    seen: list[str] = []

    class Kind(torch.Tensor):
        __torch_function__ = _torch.no_torch_function

        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return torch.ones(())

    made = _torch.wrapper_of(Kind, (3, 2), torch.zeros(1, dtype=torch.float64))
    assert type(made) is Kind and made.shape == (3, 2) and made.dtype is torch.float64
    assert type(made.sum()) is torch.Tensor and seen == ["aten.sum.default"]
