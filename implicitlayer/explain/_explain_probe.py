"""What derivatives say about an objective near ``init``: which tensors reach its value and its gradient in x."""

# F(x, theta) = 0 is the equation behind the layer: F = grad_x f for an argmin, the residual for a root. A theta gets
# the gradient -(dF/dtheta)' u, so what counts is whether dF/dtheta is there, is zero, or is not: the gradient of
# <F, r> in theta, with a random r, at random points near init. Every tensor is replaced by an alias that requires a
# gradient, one for each role it plays, so the answer holds for tensors that require none, and for each role alone.
#
# NOTE [conditions]: which entries a set or regulariser holds is known at the solution only. Elsewhere a theta counts as
# reaching F where it reaches the gradient of the objective, or a proximal point of some point near or far. Where init
# is the solution, the layer's own equation has the last word.

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch

from implicitlayer._errors import ClosureError
from implicitlayer.base._surroundings import out_of_inference, plain_surroundings
from implicitlayer.base._tree import TreeSpec, flatten, ravel, unflatten
from implicitlayer.base._types import Leaves
from implicitlayer.constrained._prox_equation import At
from implicitlayer.equation._capture import ClosedOver, find_closed_over
from implicitlayer.equation._flat import Signature, call_with
from implicitlayer.equation._jacobian import pull_tensors
from implicitlayer.equation._residual import Attached, inner
from implicitlayer.explain._explain_trace import Call, Tracer
from implicitlayer.layer._layer import ImplicitLayer, without_aux

Reach = Literal["none", "zero", "nonzero"]  # of a derivative: no graph, zero at every point tried, neither
_ORDER: tuple[Reach, ...] = ("none", "zero", "nonzero")
_NUM_POINTS = 2
_STEP = 1e-2  # of the points tried from init, relative to the largest entry of x or 1
_NEAR = 1e-3  # ||F|| over the size of x and of what a set or regulariser makes of it, below which init is a solution


@dataclass(frozen=True, eq=False)
class Problem:
    """A call of a layer, without its solver.

    Attributes:
        layer: it, with the function as the user wrote it.
        parts: what the user wrote, by its name in the layer's arguments.
        function: ``(x, *theta) -> value, conditions``; see NOTE [conditions].
        tensors: theta leaves that are tensors, then the closed-over ones.
        closed: the closed-over ones, whether or not they require a gradient.
    """

    layer: ImplicitLayer
    parts: dict[str, Any]
    function: Callable[..., Any]
    init: Any
    theta: tuple[Any, ...]
    x: Leaves
    x_spec: TreeSpec
    signature: Signature
    tensors: Leaves
    closed: Leaves

    def outputs(self, x: Leaves, tensors: Leaves) -> Leaves:
        """What the function returns, as leaves; closed-over tensors are read from ``tensors``."""
        args = (unflatten(x, self.x_spec), *self.signature.rebuild(tensors))
        originals = ClosedOver(self.closed)
        originals.normalises = True
        return flatten(call_with(self.function, originals, tensors[len(tensors) - len(self.closed) :], args))[0]


@dataclass(eq=False)
class Facts:
    """What was found out about one tensor in one role.

    Attributes:
        value_path, path: its way to the value of the objective, and to F.
        first_read: the first call that reads it.
        matters: whether F changes with its value; None if not asked (there is a derivative), or not a number.
        cuts: calls where it leaves its graph, and a derivative is missing as far as differences tell.
        vanishes: the call whose result no longer changes with it to first order.
        numpy: the call by which NumPy reads it.
        failure: what the layer's own backward raises for it.
    """

    value_path: Reach = "none"
    path: Reach = "none"
    first_read: Call | None = None
    matters: bool | None = None
    cuts: list[Call] = field(default_factory=list)
    vanishes: Call | None = None
    numpy: Call | None = None
    failure: Exception | None = None


def closed_over_tensors(function: Callable[..., Any], args: tuple[Any, ...]) -> Leaves:
    """Every tensor that ``function(*args)`` reads from outside, needing a derivative or not.

    What two runs do not both meet was made inside, by a call that no TorchFunctionMode sees.
    """
    runs = [find_closed_over(function, args) for _ in range(2)]
    first, second = ([*found, *(tensor for tensor, _ in found.constants)] for found in runs)
    again = {id(tensor) for tensor in second}
    return [tensor for tensor in first if id(tensor) in again]


def probe(problem: Problem) -> tuple[list[Facts], list[Facts]]:
    """Facts of the leaves of x, and of ``problem.tensors``."""
    x_facts, facts = [Facts() for _ in problem.x], [Facts() for _ in problem.tensors]
    every = [*x_facts, *facts]
    walks = [walk for start in _starts(problem.x) if (walk := _Walk(problem, start, problem.tensors)).finite]
    walks = walks[:_NUM_POINTS] or [_Walk(problem, problem.x, problem.tensors)]
    for walk in walks:
        ways = (walk.reach(walk.outputs), walk.reach(walk.equations))
        for fact, value_path, path in zip(every, *ways, strict=True):
            fact.value_path = max(fact.value_path, value_path, key=_ORDER.index)
            fact.path = max(fact.path, path, key=_ORDER.index)
    tracer = walks[0].tracer
    for i, fact in enumerate(every):
        fact.first_read = tracer.first_reads.get(i)
        fact.cuts = [cut for cut in tracer.cuts if i in cut.sources]
        fact.numpy = tracer.numpy.get(i)
        if fact.path != "nonzero" and walks[0].roots[i].requires_grad:
            fact.matters = walks[0].changes_with(i)
            if fact.path == "zero":
                fact.vanishes = walks[0].vanishing_call(i)
        reached = fact.path == "nonzero" or (i < len(x_facts) and fact.value_path == "nonzero")
        if reached and fact.cuts and walks[0].finite and walks[0].agrees_with_differences(i):
            fact.cuts = []  # they take no derivative away: a constant, or a function with its own derivative
    return x_facts, facts


class _Walk:
    """One evaluation of the objective and of F, with its graph."""

    def __init__(self, problem: Problem, x: Leaves, tensors: Leaves) -> None:
        self.problem = problem
        self.num_x = len(x)
        self.roots = [_alias(t) for t in [*x, *tensors]]
        copies = [root.clone() for root in self.roots]  # no leaves: the objective may write into them
        self.tracer = Tracer(copies, self.roots)
        x, tensors = copies[: self.num_x], copies[self.num_x :]
        with quietly():
            self.outputs = self.tracer.run(lambda: problem.outputs(x, tensors))
        self.equations = self._equations(x)
        self.finite = all(bool(t.isfinite().all()) for t in [*self.outputs, *self.equations])

    def _equations(self, x: Leaves) -> Leaves:
        """F, zero where autograd sees no dependence."""
        kind = self.problem.layer.kind
        if kind == "root":
            return self.outputs
        if kind == "fixed_point":
            return [a - b for a, b in zip(x, self.outputs, strict=True)]
        value, conditions = self.outputs[0].sum(), self.outputs[1:]
        if not value.requires_grad:
            return [*(torch.zeros_like(t) for t in x), *conditions]
        return [*torch.autograd.grad(value, x, create_graph=True, materialize_grads=True), *conditions]

    def reach(self, values: Leaves) -> list[Reach]:
        """Of every root: its way to the outputs, or to the equations."""
        chosen = [i for i, root in enumerate(self.roots) if root.requires_grad]
        combined = self._combine(values)
        result: list[Reach] = ["none"] * len(self.roots)
        if combined is None:
            return result
        found = torch.autograd.grad(combined, [self.roots[i] for i in chosen], retain_graph=True, allow_unused=True)
        for i, gradient in zip(chosen, found, strict=True):
            if gradient is not None:
                result[i] = "nonzero" if bool((gradient != 0).any()) else "zero"
        return result

    def _combine(self, values: Leaves) -> torch.Tensor | None:
        """<values, r> with a random r; None if no value has a graph."""
        attached = [value for value in values if value.requires_grad]
        return inner(attached, [_randn(value, 100 + i) for i, value in enumerate(attached)]) if attached else None

    def changes_with(self, i: int) -> bool | None:
        """Whether F is another one, to the bit, when root ``i`` has other values of the same sign; None: no telling.

        Asked of x, it is the value of the objective (or the residual) that counts.
        """
        if not self.finite:
            return None
        root = self.roots[i].detach()
        try:
            other = self._moved(i, torch.where(root < 0, -1, 1) * (root.abs() + 1))
        except Exception:  # the objective refuses the value: it reads it
            return True
        before, after = (w.outputs if i < self.num_x else w.equations for w in (self, other))
        return any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))

    def _moved(self, i: int, step: torch.Tensor) -> _Walk:
        """The same with other values of root ``i``."""
        values = [root.detach() for root in self.roots]
        values[i] = values[i] + step
        return _Walk(self.problem, values[: self.num_x], values[self.num_x :])

    def agrees_with_differences(self, i: int) -> bool:
        """Whether the derivatives of F in root ``i``, for x also of the objective, are those of the values.

        Of <v, r> for every tensor v on its own, by central differences over a random step of eps^(1/3): they are good
        to eps^(2/3) of the slope where that bends as it is large, and to eps |v| by rounding.
        """
        root, eps = self.roots[i], torch.finfo(self.roots[i].dtype).eps
        step = eps ** (1 / 3) * (1 + root.detach().abs()) * _randn(root, 300)
        try:
            ends = [self._moved(i, step), self._moved(i, -step)]
        except Exception:  # no telling where the objective refuses a value
            return False
        for values in zip(*([*w.outputs[: i < self.num_x], *w.equations] for w in (self, *ends)), strict=True):
            here, above, below = (inner([value], [_randn(value, 100)]) for value in values)
            slope = torch.zeros_like(root)
            if here.requires_grad:
                (slope,) = torch.autograd.grad(here, root, retain_graph=True, materialize_grads=True)
            change, rounding = (slope * step).sum(), 4 * eps * inner([values[0].abs()], [_randn(values[0], 100).abs()])
            if not abs(float(change - (above - below) / 2)) <= eps**0.25 * abs(float(change)) + float(rounding):
                return False
        return True

    def vanishing_call(self, i: int) -> Call | None:
        """The first call on the way from root ``i`` to F whose result has derivative zero in it."""
        combined = self._combine(self.equations)
        for output, call in self.tracer.outputs:
            if i not in call.sources or combined is None or not output.requires_grad:
                continue
            grad = partial(torch.autograd.grad, retain_graph=True, allow_unused=True)
            (slope,) = grad((output * _randn(output, 200)).sum(), self.roots[i])
            (used,) = grad(combined, output)
            if used is not None and (slope is None or not bool((slope != 0).any())):
                return call
        return None


def ask_layer(problem: Problem, facts: list[Facts]) -> None:
    """What the layer's own checks, equation and backward say at init, of each of ``problem.tensors``.

    The checks concern all tensors; a failing backward is tried for each tensor alone to see which one it is.

    Raises:
        ObjectiveError: the function returns something that no layer accepts.
    """
    try:
        hidden = find_closed_over(problem.function, (problem.init, *problem.theta), lambda value: None)
    except ClosureError as refused:
        return _tell(refused, problem, facts)
    explicit, layer = problem.signature.tensors, problem.layer
    known = {id(t): i for i, t in enumerate(problem.closed, start=len(explicit))}
    places = [*range(len(explicit)), *(known[id(t)] for t in hidden)]
    value_of = without_aux(layer.function) if layer.objective_has_aux else layer.function
    residual = layer._equation(value_of, problem.x_spec, problem.signature, hidden)[1]
    x, tensors = [t.detach() for t in out_of_inference(problem.x)], out_of_inference([*explicit, *hidden])
    needed = [t.requires_grad and t.is_floating_point() for t in tensors]

    def attached(wanted: Sequence[bool]) -> Attached:
        point = [t.detach().requires_grad_(need) for t, need in zip(tensors, wanted, strict=True)]
        return residual.restricted_to(wanted).attached(x, point)

    def backward_of(wanted: Sequence[bool]) -> Exception | None:
        ones = [torch.ones_like(t) for t in x]
        if not hidden:  # the layer's backward is one of plain autograd
            return _raised(lambda: attached(wanted).pull_theta(ones, wanted))
        source, point = residual.restricted_to(wanted), [t.detach() for t in tensors]
        return _raised(lambda: pull_tensors(lambda t: source(x, t), point, tuple(wanted), ones))

    def checks() -> None:
        point = [t.detach() for t in tensors]
        residual.refuse_hidden(x, point, residual.run(x, point), hidden)
        residual.kept_graph_gradient([t.clone().requires_grad_() for t in x], point)

    with plain_surroundings(problem.x):
        residual.outputs([t.clone() for t in x], [t.detach() for t in tensors])  # misuse is an error here as well
        if (failure := _raised(checks)) is not None:
            return _tell(failure, problem, facts)
        if any(needed) and backward_of(needed) is not None:
            for i, place in enumerate(places):
                if needed[i]:
                    facts[place].failure = backward_of([j == i for j in range(len(tensors))])
        elif any(needed) and isinstance(at := attached(needed), At):
            error = ravel(at.value, layer.batch_dims).norm(dim=-1)
            if bool((error <= _NEAR * at.size).all()):
                for place, slope in zip(places, at.pull_theta([_randn(t, 400) for t in x], needed), strict=True):
                    if slope is not None and not bool((slope != 0).any()):
                        facts[place].path = "zero"


def _tell(failure: Exception, problem: Problem, facts: list[Facts]) -> None:
    for tensor, fact in zip(problem.tensors, facts, strict=True):
        fact.failure = failure if tensor.requires_grad else None


def _raised(function: Callable[[], Any]) -> Exception | None:
    try:
        function()
    except Exception as error:
        return error
    return None


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of its own with the same values, requiring a gradient if it can."""
    alias = tensor.detach().clone()
    return alias.requires_grad_() if alias.is_floating_point() else alias


def _starts(x: Leaves) -> Iterator[Leaves]:
    """Points near ``x``: absolute steps first, then relative ones (a logarithm at small x), then x itself."""
    seeds = range(len(x))
    for seed in (1000, 2000):
        sizes = [max(1.0, float(t.abs().max())) if t.numel() else 1.0 for t in x]
        yield [t + _STEP * size * _randn(t, seed + i) for i, size, t in zip(seeds, sizes, x, strict=True)]
    for seed in (3000, 4000):
        yield [t * (1 + _STEP * _randn(t, seed + i)) for i, t in zip(seeds, x, strict=True)]
    yield x


def _randn(like: torch.Tensor, seed: int) -> torch.Tensor:
    """Standard normal numbers that leave the caller's generators alone."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, dtype=torch.float64, generator=generator).to(like)


@contextmanager
def quietly() -> Iterator[None]:
    """No warnings, the same random numbers every time, and the caller's as before: an explanation leaves no trace."""
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        yield
