"""Compiled layers over sets and with regularisers: the numbers, warnings and errors of the layer that they compile."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from references import F64, randn
from torch import Tensor

import implicitlayer as il
from implicitlayer.compiled._layer import Call

STEPS = il.solvers.ProximalGradient(rtol=1e-12, max_steps=20_000)
TERMS: dict[str, tuple[str, Any]] = {
    "L1": ("regularizer", lambda s, a, b: il.L1(s)),
    "L1, a number": ("regularizer", il.L1(0.8)),
    "L1, one strength per entry": ("regularizer", lambda s, a, b: il.L1(s * torch.linspace(0, 2, 5, dtype=s.dtype))),
    "ElasticNet": ("regularizer", lambda s, a, b: il.ElasticNet(s, 0.5 * s)),
    "Box": ("constraint", lambda s, a, b: il.sets.Box(-0.1 * s, 0.2 * s)),
    "NonNegative": ("constraint", il.sets.NonNegative()),
}
SOLVERS: dict[str, Any] = {
    "accelerated": STEPS,
    "plain": il.solvers.ProximalGradient(accelerated=False, rtol=1e-12, max_steps=20_000),
    "steps of one size": il.solvers.ProximalGradient(step_size=0.02, rtol=1e-12, max_steps=20_000),
    "projected": il.solvers.ProjectedGradient(rtol=1e-12, max_steps=20_000),
}


def squares(x: Tensor, s: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return 0.5 * ((a @ x.unsqueeze(-1))[..., 0] - b).square().sum(-1)


def data(lanes: tuple[int, ...] = (), dtype: torch.dtype = F64) -> tuple[Tensor, ...]:
    s = torch.tensor(0.9, dtype=dtype, requires_grad=True)
    b = randn(*lanes, 8, seed=3).to(dtype).requires_grad_()
    return torch.zeros(*lanes, 5, dtype=dtype), s, randn(8, 5, seed=4).to(dtype), b


def traced(layer: Any) -> Any:
    """Compiled as far as the tracing: what the solvers and checks compute is decided by then."""
    return il.compile(layer, backend="eager")


def answers(layer: Callable[..., Tensor], init: Tensor, *theta: Tensor) -> list[Tensor]:
    x = layer(init, *theta)
    needed = [t for t in theta if t.requires_grad]
    weights = torch.arange(1.0, x.shape[-1] + 1, dtype=x.dtype)
    found = torch.autograd.grad((x * weights).sum(), needed, materialize_grads=True, allow_unused=True)
    return [x.detach(), *found]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the layer behind was asked for."""
    calls: list[str] = []
    for name in ("judged", "pull_by_layer"):
        before = getattr(Call, name)
        told = lambda *args, name=name, before=before: (calls.append(name), before(*args))[1]  # noqa: E731
        monkeypatch.setattr(Call, name, told)
    return calls


@pytest.mark.parametrize(
    ("term", "solver", "lanes"),
    [
        *((term, "accelerated", (3,)) for term in TERMS),
        ("L1", "plain", ()),
        ("L1", "steps of one size", (3,)),
        ("Box", "projected", ()),
    ],
)
def test_the_traced_layer_is_the_layer(term: str, solver: str, lanes: tuple[int, ...], asked: list[str]) -> None:
    kind, made = TERMS[term]
    layer = il.argmin(squares, SOLVERS[solver], batch_dims=len(lanes), **{kind: made})
    compiled = traced(layer)
    args = data(lanes)
    expected = answers(layer, *args)
    active = layer.records[0].active_set.num_active
    assert 0 < int(active.sum()) < expected[0].numel()  # some entries are held, some are free
    for _ in range(2):
        found = answers(compiled, *args)
    assert compiled.num_compilations == 2 and not asked  # no check has failed, so nothing was judged again
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-11, atol=1e-12)


def test_parts_of_a_pytree_and_float32(asked: list[str]) -> None:
    def objective(x: dict[str, Tensor], s: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return squares(x["w"], s, a, b - x["shift"])

    terms = lambda s, a, b: {"shift": None, "w": il.L1(s)}  # noqa: E731
    _, *theta = data(dtype=torch.float32)
    init = {"shift": torch.zeros(()), "w": torch.zeros(5)}
    layer = il.argmin(objective, il.solvers.ProximalGradient(rtol=1e-5, max_steps=5000), regularizer=terms)
    compiled = traced(layer)
    both = []
    for one in (layer, compiled, compiled):
        x = one(init, *theta)
        both.append([x["w"].detach(), *torch.autograd.grad(x["w"].sum() + x["shift"], (theta[0], theta[2]))])
    assert compiled.num_compilations == 2 and not asked
    for value, wanted in zip(both[2], both[0], strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("linear_solver", [il.Gmres(rtol=1e-10), il.Dense()], ids=repr)
def test_linear_solvers_see_the_free_entries(linear_solver: Any, asked: list[str]) -> None:
    layer = il.argmin(squares, STEPS, regularizer=TERMS["L1"][1], linear_solver=linear_solver, batch_dims=1)
    compiled, args = traced(layer), data((3,))
    for _ in range(2):
        found = answers(compiled, *args)
    assert not asked
    for value, wanted in zip(found, answers(layer, *args), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-8, atol=1e-9)


def test_gradients_of_the_lasso_in_closed_form() -> None:
    """With the signs of x_S known, x_S = C_SS^-1 (A_S'b - s sign), dx_S/ds = -C_SS^-1 sign."""
    init, s, a, b = data()
    compiled = traced(il.argmin(squares, STEPS, regularizer=TERMS["L1"][1]))
    for _ in range(2):
        x = compiled(init, s, a, b)
        gradient, of_b = torch.autograd.grad(x.sum(), (s, b))
    free = x.detach() != 0
    inverse = torch.linalg.inv(a[:, free].mT @ a[:, free])
    torch.testing.assert_close(gradient, -(inverse @ x.detach()[free].sign()).sum(), rtol=1e-10, atol=0)
    torch.testing.assert_close(of_b, a[:, free] @ inverse.sum(0), rtol=1e-10, atol=1e-12)


def told(layer: Callable[..., Tensor], *args: Tensor) -> tuple[set[tuple[type, str]], list[Tensor]]:
    """Kinds and texts of the warnings or of the error, and the numbers."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            found = answers(layer, *args)
        except (il.ImplicitLayerError, ValueError) as error:
            return {(type(error), str(error).split(":")[0])}, []
    return {(w.category, str(w.message).split(":")[0]) for w in seen}, found


def with_a_kink(x: Tensor, t: Tensor) -> Tensor:
    """Over x >= 0 the minimum is at max(t, 0): a kink where an entry of t is zero."""
    return 0.5 * ((x - t) ** 2).sum(-1)


def saddle(x: Tensor, t: Tensor) -> Tensor:
    """Bends down in x[1], whose gradient is zero at zero."""
    return 0.5 * (x[..., 0] - t[..., 0]) ** 2 - 3 * x[..., 1] ** 2


@pytest.mark.parametrize(
    ("objective", "numbers", "terms", "solver"),
    [
        (with_a_kink, [1.0, 0.0], {"constraint": il.sets.NonNegative()}, STEPS),
        (saddle, [1.0, 0.0], {"constraint": il.sets.Box(-2.0, 2.0)}, STEPS),
        (with_a_kink, [1.0, 2.0], {"regularizer": lambda t: il.L1(-t[0])}, STEPS),
        (with_a_kink, [1.0, torch.nan], {"constraint": il.sets.NonNegative()}, STEPS),
        (
            lambda x, t: (0.5 * torch.tensor([1.0, 300.0], dtype=F64) * (x - t) ** 2).sum(-1),
            [1.0, 2.0],
            {"regularizer": il.L1(0.1)},
            il.solvers.ProximalGradient(rtol=1e-12, max_steps=3),
        ),
    ],
    ids=["kink", "saddle", "negative strength", "NaN", "not solved"],
)
def test_what_the_layer_tells_the_compiled_one_tells(
    objective: Any, numbers: list[float], terms: dict[str, Any], solver: Any, asked: list[str]
) -> None:
    init = torch.zeros(2, dtype=F64)
    plain = il.argmin(objective, solver, **terms)
    compiled = traced(il.argmin(objective, solver, **terms))
    fine = torch.tensor(
        [-1.0, -2.0] if "regularizer" in terms and callable(terms["regularizer"]) else [1.0, 2.0]
    ).double()
    for _ in range(2):
        told(compiled, init, fine.requires_grad_())  # what is compiled is compiled for a problem without trouble
    asked.clear()
    t = torch.tensor(numbers, dtype=F64, requires_grad=True)
    expected, wanted = told(plain, init, t)
    found, values = told(compiled, init, t)
    assert found == expected and expected
    assert "judged" in asked
    for value, right in zip(values, wanted, strict=True):
        torch.testing.assert_close(value, right, rtol=1e-9, atol=1e-12)


def test_transforms_and_second_derivatives_are_those_of_the_layer() -> None:
    layer = il.argmin(lambda x, t: (x.exp() - t * x).sum(), STEPS, constraint=il.sets.Box(0.0, 1.0))
    compiled = traced(layer)
    t, zeros = torch.tensor([2.0, 4.0], dtype=F64), torch.zeros(2, dtype=F64)  # x = (log 2, 1)
    for _ in range(2):
        compiled(zeros, t.clone().requires_grad_()).sum().backward()
    solve = lambda t: compiled(zeros, t)  # noqa: E731
    expected = torch.tensor([[0.5, 0.0], [0.0, 0.0]], dtype=F64)
    torch.testing.assert_close(torch.func.jacrev(solve)(t), expected)
    torch.testing.assert_close(torch.func.jacfwd(solve)(t), expected)
    hessian = torch.func.hessian(lambda t: solve(t).sum())(t)
    torch.testing.assert_close(hessian, torch.tensor([[-0.25, 0.0], [0.0, 0.0]], dtype=F64))


def test_inside_a_compiled_model() -> None:
    layer = il.argmin(squares, STEPS, regularizer=TERMS["L1"][1])
    compiled, (init, *theta) = traced(layer), data()
    model = torch.compile(
        lambda s, b: compiled(init, s.exp().log(), theta[1], b).sin(), backend="aot_eager", fullgraph=True
    )
    s, b = theta[0].detach().requires_grad_(), theta[2]
    for run in (model, lambda s, b: layer(init, s, theta[1], b).sin()):
        gradients = torch.autograd.grad(run(s, b).sum(), (s, b))
        if run is model:
            found = gradients
    for value, wanted in zip(found, gradients, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: il.argmin(squares, il.solvers.NewtonCG(), constraint=il.sets.NonNegative()), TypeError, "Proximal"),
        (lambda: il.argmin(squares, il.solvers.ProximalGradient(il.L1(1.0))), TypeError, "NewtonCG"),
        (
            lambda: il.argmin(squares, il.solvers.ProximalGradient(il.L1(1.0)), regularizer=il.L1(1.0)),
            ValueError,
            "term of its own",
        ),
        (
            lambda: il.argmin(squares, STEPS, regularizer=il.L1(1.0), linear_solver=il.Gmres(max_steps=3)),
            ValueError,
            "tolerance",
        ),
        (
            lambda: il.argmin(squares, STEPS, regularizer=il.L1(1.0), linear_solver=il.Bicgstab()),
            TypeError,
            "linear_solver=",
        ),
    ],
)
def test_what_has_no_compiled_form_is_refused(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        il.compile(make())


@pytest.mark.parametrize("term", [il.sets.Simplex(), il.sets.Ball(1.0)], ids=lambda term: type(term).__name__)
def test_a_set_that_looks_at_all_entries_together_is_refused_at_the_call(term: Any) -> None:
    compiled = traced(il.argmin(squares, STEPS, constraint=term))
    with pytest.raises(TypeError, match="every entry by"):
        compiled(*data())
