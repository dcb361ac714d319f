"""What plain autograd can do an objective may do, with its weights as a theta and closed over alike."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from references import F64, cdist_has_second_derivatives, randn, relative_error
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import implicitlayer as il

Term = Callable[[Tensor, Tensor], Tensor]
KEYS, INDEX = randn(3, 4, seed=1), torch.tensor([[0, 1], [2, 2]])


class Old(torch.autograd.Function):
    """x^2 w^2, without setup_context, as Functions were written before torch.func."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x**2 * w**2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return 2 * x * w * w * g, 2 * w * x * x * g


def hooked() -> Term:
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double()
    net[0].register_full_backward_hook(lambda *_: None)
    return lambda x, w: torch.func.functional_call(net, {"0.weight": w}, (KEYS + x,)).square().sum()


def attention(x: Tensor, w: Tensor) -> Tensor:
    return F.scaled_dot_product_attention((KEYS * x)[None], (KEYS @ w)[None], KEYS[None]).square().sum()


def derivative(x: Tensor, w: Tensor) -> Tensor:
    points = torch.linspace(0, 1, 4, dtype=F64).requires_grad_()
    u = torch.tanh(points[:, None] * (w * x)).sum(1)
    return torch.autograd.grad(u.sum(), points, create_graph=True)[0].square().sum()


def written_to(x: Tensor, w: Tensor) -> Tensor:
    made = torch.zeros(4, dtype=F64)
    made[:2] = (w * x)[:2]
    return made.add_(x * w).mul_(w).square().sum()


def normalised_checkpoint(x: Tensor, w: Tensor) -> Tensor:
    return checkpoint(lambda a: F.layer_norm(torch.tanh(w @ a), (4,)).square()[:2].sum(), x, use_reentrant=False)


PROGRAMS: dict[str, tuple[Term, tuple[int, ...]]] = {
    "an old Function": (lambda x, w: Old.apply(x, w).sum(), (4,)),
    "a full backward hook": (hooked(), (4, 4)),
    "attention": (attention, (4, 4)),
    "a derivative": (derivative, (4,)),
    "cdist": (lambda x, w: torch.cdist(KEYS * x, w, compute_mode="use_mm_for_euclid_dist").sum(), (3, 4)),
    "cdist of data": (lambda x, w: (x * torch.cdist(w, KEYS[:1])[:, 0]).sum(), (4, 4)),
    "EmbeddingBag": (lambda x, w: (F.embedding_bag(INDEX, w) * x).tanh().sum(), (3, 4)),
    "a checkpoint": (lambda x, w: checkpoint(lambda a: (w @ a).tanh().square().sum(), x, use_reentrant=False), (4, 4)),
    "a checkpoint of a normalisation": (normalised_checkpoint, (4, 4)),
    "a checkpoint of an old Function": (
        lambda x, w: checkpoint(lambda a: Old.apply(a, w).sum(), x, use_reentrant=False),
        (4,),
    ),
    "writing in place": (written_to, (4,)),
}
START, WEIGHTS = torch.zeros(4, dtype=F64), randn(4, seed=2)
SOLVER = il.solvers.LBFGS(rtol=1e-12, max_steps=1000)


def objective(term: Term) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda x, t, w: 0.5 * ((x - t) ** 2).sum() + 0.1 * term(x, w)


def closing(term: Term, w: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, t: objective(term)(x, t, w)


USES: dict[str, Callable[[Term, Tensor, Tensor], Tensor]] = {
    "as theta": lambda term, t, w: il.argmin(objective(term), SOLVER)(START, t, w),
    "closed over": lambda term, t, w: il.argmin(closing(term, w), SOLVER)(START, t),
    "closed over in a module": lambda term, t, w: il.ArgminLayer(Holder(term, w), SOLVER, init=torch.zeros_like)(t),
    "closed over in a box": lambda term, t, w: il.argmin(closing(term, w), SOLVER, constraint=il.sets.Box(-50.0, 50.0))(
        START, t
    ),
}


class Holder(nn.Module):
    def __init__(self, term: Term, w: Tensor) -> None:
        super().__init__()
        self.term, self.weight = term, w  # a plain tensor: the test differentiates it

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return objective(self.term)(x, t, self.weight)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", PROGRAMS)
def test_gradients_in_weights_and_theta_are_differences_of_the_solution(name: str, use: str) -> None:
    term, shape = PROGRAMS[name]
    w, t = randn(*shape, seed=3).requires_grad_(), randn(4, seed=4).requires_grad_()
    found = torch.autograd.grad(USES[use](term, t, w) @ WEIGHTS, (t, w))
    # solutions to 1e-12 over a step of 2e-5 leave 1e-7, the truncation is of the order of 1e-10
    h = 1e-5
    for seed in (5, 6):
        moves = randn(4, seed=seed), randn(*shape, seed=10 + seed)
        ends = [
            SOLVER(objective(term), START, *(v.detach() + s * h * d for v, d in zip((t, w), moves, strict=True)))
            for s in (1, -1)
        ]
        expected = (ends[0] - ends[1]) @ WEIGHTS / (2 * h)
        along = sum((g * d).sum() for g, d in zip(found, moves, strict=True))
        torch.testing.assert_close(along, expected, rtol=1e-6, atol=1e-6)


LIMITS: dict[str, tuple[Term, str]] = {
    "reentrant": (lambda x, w: checkpoint(lambda a: (w * a).sum(), x, use_reentrant=True), "Pass use_reentrant=False"),
    "cdist": (lambda x, w: torch.cdist(KEYS * x, KEYS * w).sum(), r"linalg\.vector_norm"),
    "EmbeddingBag": (lambda x, w: (F.embedding_bag(INDEX, (KEYS * x)) * w).square().sum(), r"functional\.embedding"),
}


@pytest.mark.parametrize("use", ["as theta", "closed over"])
@pytest.mark.parametrize("name", LIMITS)
def test_what_torch_has_no_second_derivative_of_is_said_with_the_remedy(name: str, use: str) -> None:
    if name == "cdist" and cdist_has_second_derivatives():
        pytest.skip("this torch has them")
    term, remedy = LIMITS[name]
    w, t = randn(4, seed=3).requires_grad_(), randn(4, seed=4).requires_grad_()
    with pytest.raises(il.ObjectiveError, match=remedy):
        USES[use](term, t, w)


@pytest.mark.parametrize(
    "name", ["an old Function", "a full backward hook", "a checkpoint", "a checkpoint of an old Function"]
)
def test_second_derivatives_and_other_closed_over_tensors_are_right_or_refused_in_one_sentence(name: str) -> None:
    term, shape = PROGRAMS[name]
    w, t = randn(*shape, seed=3).requires_grad_(), randn(4, seed=4).requires_grad_()
    refused = (il.ObjectiveError, il.ClosureError)
    for use in ("as theta", "closed over"):
        with pytest.raises(refused, match=r"torch\.func"):
            torch.autograd.grad(USES[use](term, t, w) @ WEIGHTS, w, create_graph=True)
    (expected,) = torch.autograd.grad(USES["as theta"](term, t, w) @ WEIGHTS, w)
    if name == "a full backward hook":  # it is told of what depends on x only
        (found,) = torch.autograd.grad(USES["closed over"](term, t, 1 * w) @ WEIGHTS, w)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)  # linear solves at rtol 1e-10
        return
    with pytest.raises(refused, match=r"torch\.func"):
        torch.autograd.grad(USES["closed over"](term, t, 1 * w) @ WEIGHTS, w)


@pytest.mark.parametrize("use", ["as theta", "closed over"])
def test_under_vmap_writing_in_place_is_right_or_names_the_remedy(use: str) -> None:
    w, t = randn(4, seed=3).requires_grad_(), randn(3, 4, seed=4).requires_grad_()

    def gradient(term: Term, batched: bool) -> Tensor:
        single = lambda t: USES[use](term, t, w)  # noqa: E731
        x = torch.vmap(single)(t) if batched else torch.stack([single(lane) for lane in t])
        return torch.autograd.grad((x @ WEIGHTS).sum(), w)[0]

    def of_x(x: Tensor, w: Tensor) -> Tensor:
        made = torch.zeros_like(x)
        made[:2] = (w * x)[:2]
        return made.add_(x * w).mul_(w).square().sum()

    torch.testing.assert_close(gradient(of_x, True), gradient(of_x, False), rtol=1e-8, atol=1e-10)
    for term in (written_to, lambda x, w: torch.zeros(4, dtype=F64).add_(w * x).square().sum()):
        with pytest.raises(il.ObjectiveError, match=r"in place .*zeros_like"):
            gradient(term, True)


def test_a_hook_on_a_closed_over_weight_runs_once_on_its_gradient() -> None:
    w, t = randn(4, seed=3).requires_grad_(), randn(4, seed=4).requires_grad_()
    seen: list[Tensor] = []
    (expected,) = torch.autograd.grad((USES["closed over"](lambda x, w: (w * x**2).sum(), t, w) @ WEIGHTS), w)
    w.register_hook(lambda g: seen.append(g))
    (USES["closed over"](lambda x, w: (w * x**2).sum(), t, w) @ WEIGHTS).backward()
    assert len(seen) == 1 and w.grad is not None
    torch.testing.assert_close(w.grad, expected, rtol=1e-8, atol=1e-12)  # linear solves at rtol 1e-10


def test_two_closed_over_tensors_of_which_one_is_made_of_the_other_are_counted_once() -> None:
    w = randn(4, seed=3).requires_grad_()
    made = w**2  # x = t + w + w^2
    x = il.argmin(lambda x, t: ((x - t - w - made) ** 2).sum(), lambda f, x, t: t + w.detach() + made.detach())(
        START, START
    )
    (found,) = torch.autograd.grad(x.sum(), w)
    torch.testing.assert_close(found, 1 + 2 * w.detach(), rtol=1e-9, atol=0)


def test_a_solver_that_adds_to_the_gradient_of_a_closed_over_weight_is_an_error() -> None:
    def backing(f: Callable[..., Tensor], x: Tensor, t: Tensor) -> Tensor:
        x = x.requires_grad_()
        f(x, t).backward()
        return t.clone()

    w, t = randn(4, seed=3).requires_grad_(), randn(4, seed=4)
    closed = lambda x, t: ((x - t) ** 2).sum() + 0 * checkpoint(lambda a: (a * w).sum(), x, use_reentrant=False)  # noqa: E731
    with pytest.raises(il.SolverOutputError, match=r"added to \.grad .*torch\.autograd\.grad"):
        il.argmin(closed, backing)(START, t)


def product(backward: Any) -> Any:
    """The Function x * w with this backward."""

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
            ctx.save_for_backward(x, w)
            return x * w

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Any:
            return backward(gradients[0], *ctx.saved_tensors)

    return Product


def by_numpy(g: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    g, x, w = (t.detach() for t in (g, x, w))
    return torch.from_numpy(g.numpy() * w.numpy()), torch.from_numpy(g.numpy() * x.numpy())


@pytest.mark.parametrize("kind", ["argmin", "box", "constrained", "root", "right"])
def test_a_function_whose_backward_leaves_no_graph_is_refused_where_it_is_differentiated_twice(kind: str) -> None:
    """Torch takes the second derivative as zero: dx/dt came back as zero, without a word."""
    function = product(by_numpy if kind != "right" else lambda g, x, w: (g * w, g * x))
    w, t = torch.tensor([0.7, 1.3], dtype=F64, requires_grad=True), torch.ones(2, dtype=F64, requires_grad=True)

    def objective(x: Tensor, t: Tensor) -> Tensor:
        return torch.cosh(function.apply(x, w) - t).sum() + 0.5 * (x**2).sum()

    solver, zeros = il.solvers.LBFGS(rtol=1e-12), torch.zeros(2, dtype=F64)
    layers: dict[str, Callable[[], Any]] = {
        "argmin": lambda: il.argmin(objective, solver),
        "box": lambda: il.argmin(objective, il.solvers.ProjectedGradient(), constraint=il.sets.Box(-9.0, 9.0)),
        "constrained": lambda: il.constrained_argmin(objective, il.solvers.SQP(), inequality=lambda x, t: x - 9),
        "root": lambda: il.root(lambda x, t: function.apply(x, w) + x - t, il.solvers.Newton(rtol=1e-12)),
        "right": lambda: il.argmin(objective, solver),
    }
    if kind not in ("root", "right"):
        with pytest.raises(il.ObjectiveError, match="Product, whose backward leaves no graph"):
            layers[kind]()(zeros, t)
        return
    x = layers[kind]()(zeros, t)
    gradient, by_w = torch.autograd.grad(x.sum(), (t, w))
    if kind == "root":  # x = t / (1 + w)
        expected, expected_w = 1 / (1 + w), -t / (1 + w) ** 2
    else:  # w sinh(w x - t) + x = 0
        high, low = w * torch.cosh(w * x - t), torch.sinh(w * x - t)
        expected, expected_w = high / (w * high + 1), -(low + x * high) / (w * high + 1)
    assert relative_error(gradient, expected.detach()) < 1e-9 and relative_error(by_w, expected_w.detach()) < 1e-9


COMPILED: Any = torch.compile(nn.Linear(3, 3, dtype=F64), backend="aot_eager")
OF_THE_COMPILER = r"uses code of torch's compiler \(torch.compile, torch.cond, .*Give what is not compiled.*torch.where"


def branching(x: Tensor, t: Tensor) -> Any:
    return torch.cond(x.sum() > 9, lambda x, t: (x * t).sum(), lambda x, t: ((x - t) ** 2).sum(), (x, t))


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch's compiler, on what it cannot trace
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_code_that_a_layer_cannot_follow_is_refused_with_what_to_do() -> None:
    start, t = torch.zeros(2, 3, dtype=F64), torch.ones(2, 3, dtype=F64, requires_grad=True)
    for objective in (branching, lambda x, t: ((x - t) ** 2).sum() + torch.tanh(COMPILED(x)).sum()):
        with pytest.raises(il.ObjectiveError, match=OF_THE_COMPILER):
            il.argmin(objective, lambda f, x, t: t.clone())(start, t).sum().backward()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_network_in_a_fixed_point_is_right_or_refused_with_what_to_do() -> None:
    """Whether a run can be followed depends on what torch has compiled before it."""
    net, u = nn.Linear(3, 3, dtype=F64), torch.ones(2, 3, dtype=F64)
    compiled: Any = torch.compile(net, backend="aot_eager")
    layer = il.DeepEquilibrium(lambda z, u: torch.tanh(0.1 * compiled(z) + u), linear_solver=il.Dense())
    z = torch.zeros_like(u)
    for _ in range(60):
        z = torch.tanh(0.1 * net(z) + u)
    (right,) = torch.autograd.grad(z.sum(), net.weight)
    told = []
    for _ in range(2):
        try:
            (g,) = torch.autograd.grad(layer(u).sum(), net.weight)
            assert relative_error(g, right) < 1e-3  # rtol 1e-4 of the solver
        except il.ClosureError as error:
            told.append(str(error))
    assert all("torch.compile: then give the function or module that is not compiled" in m for m in told)


def test_a_closed_over_tensor_of_inference_mode_is_refused_with_what_to_do() -> None:
    with torch.inference_mode():
        a = torch.ones(3, dtype=F64)
    layer = il.argmin(lambda x, t: ((x * a - t) ** 2).sum(), lambda f, x, t: t.clone())
    with pytest.raises(il.ObjectiveError, match=r"closed-over tensor that was made in inference mode\. Pass it"):
        layer(torch.zeros(3, dtype=F64), torch.ones(3, dtype=F64, requires_grad=True))
