"""The properties that need no reference: right layers have them, wrong ones do not, and the message has the numbers."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from references import F64, newton, newton_root, randn, smooth_objective
from torch import Tensor

import implicitlayer as il
from implicitlayer.testing._properties import (
    check_adjoint,
    check_batch_equals_loop,
    check_dict_order,
    check_linear_in_cotangent,
    check_repeatable,
    check_rotated_unknowns,
    check_scaled_objective,
)

ZEROS = torch.zeros(3, dtype=F64)
THETA = (randn(5, 3, seed=1), randn(5, seed=2), torch.tensor(0.5, dtype=F64))
W, B = 0.6 * randn(3, 3, seed=3), randn(3, seed=4)
SMOOTH = il.argmin(smooth_objective, newton)


def residual(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return 2 * x + w @ torch.tanh(x) - b


ROOT = il.root(residual, newton_root)


class Bent(torch.autograd.Function):
    """The identity with reverse and forward rules of one's choice."""

    reverse: Callable[[Tensor], Tensor] = staticmethod(lambda v: v)

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Tensor:
        return Bent.reverse(v)

    @staticmethod
    def jvp(ctx: Any, t: Tensor) -> Tensor:
        return t.clone()

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor) -> Any:
        return Bent.apply(x), in_dims[0]


def bent(monkeypatch: pytest.MonkeyPatch, reverse: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """A layer x = theta with a reverse rule that is wrong."""
    monkeypatch.setattr(Bent, "reverse", staticmethod(reverse))
    return lambda init, t: Bent.apply(t)


@pytest.mark.parametrize(("layer", "theta"), [(SMOOTH, THETA), (ROOT, (W, B))], ids=["argmin", "root"])
@pytest.mark.parametrize("check", [check_adjoint, check_linear_in_cotangent, check_batch_equals_loop, check_repeatable])
def test_right_layers_have_the_properties(check: Callable[..., None], layer: Any, theta: Any) -> None:
    check(layer, ZEROS, *theta)


def test_right_objectives_may_be_scaled_and_rotated() -> None:
    for factor in (1e-6, 1e6):
        check_scaled_objective(smooth_objective, newton, ZEROS, *THETA, factor=factor)
        check_scaled_objective(residual, newton_root, ZEROS, W, B, factor=factor, kind="root")
    check_rotated_unknowns(smooth_objective, newton, ZEROS, *THETA)
    check_rotated_unknowns(residual, newton_root, ZEROS, W, B, kind="root")
    check_rotated_unknowns(
        lambda x, w, b: residual(x, w, b) + x,
        lambda f, x, *t: newton_root(residual, x, *t),
        ZEROS,
        W,
        B,
        kind="fixed_point",
    )


def test_pytrees_and_aux_may_be_scaled_and_rotated() -> None:
    def objective(x: dict[str, Tensor], t: Tensor) -> tuple[Tensor, None]:
        return ((x["a"] - t) ** 2).sum() + (x["b"] - x["a"].sum()) ** 2, None

    def solver(f: Any, x: Any, t: Tensor) -> tuple[dict[str, Tensor], int]:
        return {"b": t.sum(), "a": t}, 7

    init = {"a": torch.zeros(2, dtype=F64), "b": torch.zeros((), dtype=F64)}
    t = torch.tensor([1.0, 2.0], dtype=F64)
    check_scaled_objective(objective, solver, init, t, solver_has_aux=True, objective_has_aux=True)
    check_rotated_unknowns(lambda x, t: objective(x, t)[0], solver, init, t, solver_has_aux=True)


def test_the_order_of_keys_does_not_matter() -> None:
    def objective(x: dict[str, Tensor], t: dict[str, Any]) -> Tensor:
        return ((x["a"] - t["p"]["u"]) ** 2).sum() + 3 * (x["b"] - x["a"].sum() * t["p"]["v"]) ** 2 + 0 * t["q"].sum()

    def solver(f: Any, x: Any, t: Any) -> dict[str, Tensor]:
        return {"a": t["p"]["u"], "b": t["p"]["u"].sum() * t["p"]["v"]}

    init = {"a": torch.zeros(2, dtype=F64), "b": torch.zeros((), dtype=F64)}
    theta = {"p": {"u": randn(2, seed=1), "v": torch.tensor(0.3, dtype=F64)}, "q": randn(2, seed=2)}
    check_dict_order(il.argmin(objective, solver), init, theta)


def test_a_layer_that_depends_on_the_order_of_keys_is_caught() -> None:
    def layer(init: Tensor, t: dict[str, Tensor]) -> Tensor:
        first, second = t.values()
        return first + 2 * second

    with pytest.raises(AssertionError, match=r"solutions of two orders of keys: x differs, most at entry \d"):
        check_dict_order(layer, torch.zeros(2, dtype=F64), {"a": randn(2, seed=1), "b": randn(2, seed=2)})


def test_modes_that_are_not_adjoint_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match=r"<v, J t> = <J'v, t> does not hold: -?\d.* tolerance"):
        check_adjoint(bent(monkeypatch, lambda v: 1.001 * v), ZEROS, B)


@pytest.mark.parametrize(
    "reverse",
    [lambda v: v + 1e-3, lambda v: v * v, lambda v: torch.where(v.abs() < 1e-3, 0, v), lambda v: v.clamp(-100, 100)],
    ids=["affine", "square", "small lost", "large clipped"],
)
def test_a_gradient_that_is_not_linear_is_caught(reverse: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match=r"J'\(3 a - b\) = 3 J'a - J'b with \|b\| = .*: theta\[0\] differs"):
        check_linear_in_cotangent(bent(monkeypatch, reverse), ZEROS, B)


def test_a_gradient_that_depends_on_the_scale_of_the_objective_is_caught() -> None:
    """Damping is in units of the curvature: scaled objectives need scaled damping."""
    with pytest.raises(AssertionError, match=r"f and 1e-06 f \+ 7: theta\[\d\] differs"):
        check_scaled_objective(smooth_objective, newton, ZEROS, *THETA, factor=1e-6, damping=1e-3)


def test_a_linear_solver_that_knows_the_axes_is_caught() -> None:
    """The diagonal of the matrix in place of the matrix: right where the unknowns are the axes, wrong when turned."""

    def objective(x: Tensor, t: Tensor) -> Tensor:
        return (torch.tensor([1.0, 2.0, 5.0], dtype=F64) * (x - t) ** 2).sum()

    def diagonal(operator: Any, rhs: Tensor) -> il.LinearSolution:
        n = rhs.shape[-1]
        columns = [operator(unit.expand(rhs.shape))[..., i] for i, unit in enumerate(torch.eye(n, dtype=rhs.dtype))]
        exact = il.Dense()(operator, rhs)
        return replace(exact, value=rhs / torch.stack(columns, -1))

    with pytest.raises(AssertionError, match=r"x and y = Q x: theta\[0\] differs"):
        check_rotated_unknowns(objective, lambda f, x, t: t, ZEROS, B, linear_solver=diagonal)


def test_a_batch_that_is_not_its_loop_is_caught() -> None:
    def leaky(init: Tensor, t: Tensor) -> Tensor:
        inside = torch._C._functorch.is_batchedtensor(t)
        return t * (1.01 if inside else 1.0)

    with pytest.raises(AssertionError, match="solutions of vmap and loop: x differs"):
        check_batch_equals_loop(leaky, ZEROS, B)


def test_a_layer_that_does_not_repeat_is_caught() -> None:
    turn = [0.0]

    def drifting(init: Tensor, t: Tensor) -> Tensor:
        turn[0] += 1e-15
        return t + turn[0]

    with pytest.raises(AssertionError, match=r"two calls: solution of x differs by .*; no bit may"):
        check_repeatable(drifting, ZEROS, B)


def test_a_backward_that_does_not_repeat_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    turn = [1.0]

    def reverse(v: Tensor) -> Tensor:
        turn[0] += 1e-12
        return turn[0] * v

    with pytest.raises(AssertionError, match=r"gradient of theta\[0\] differs"):
        check_repeatable(bent(monkeypatch, reverse), ZEROS, B)


def test_float32_has_its_own_tolerance() -> None:
    theta = [t.float() for t in THETA]
    single = il.argmin(smooth_objective, lambda f, x, *t: newton(f, x.double(), *(s.double() for s in t)))
    for check in (check_adjoint, check_linear_in_cotangent, check_batch_equals_loop, check_repeatable):
        check(single, ZEROS.float(), *theta)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: check_adjoint(SMOOTH, ZEROS, 3), "theta has no floating tensor"),
        (lambda: check_scaled_objective(smooth_objective, newton, ZEROS, *THETA, factor=-1.0), "factor=-1.0 must be"),
        (lambda: check_scaled_objective(residual, newton, ZEROS, B, kind="fixed_point"), "kind='fixed_point' must"),
        (lambda: check_rotated_unknowns(smooth_objective, newton, ZEROS, *THETA, batch_dims=1), "batch_dims must be 0"),
        (lambda: check_rotated_unknowns(residual, newton, [ZEROS, ZEROS.float()], B), "leaves of several dtypes"),
        (lambda: check_batch_equals_loop(SMOOTH, ZEROS, *THETA, lanes=()), r"lanes=\(\) must hold at least one"),
        (lambda: check_dict_order(SMOOTH, ZEROS, *THETA), "hold no dictionary with two keys"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(call: Callable[[], None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
