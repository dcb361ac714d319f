"""``il.compile``: a layer whose solver and derivative are two compiled functions, with the layer itself behind them."""

# NOTE [the layer behind]: a compiled function cannot raise, and knows no transform. It ends in one bool, whether all
# checks pass. Where it is false the layer itself, not compiled, is called with the answer that was found: it judges it,
# and tells what it tells of any answer. The first call of every signature is the layer's own too, with the checks that
# need a run of the objective in Python (closed-over tensors, caches, random numbers), and so is every call and every
# derivative under torch.func, forward mode, il.diagnostics(), and at second order.

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch

from implicitlayer import _torch
from implicitlayer._errors import ImplicitLayerError, ImplicitLayerWarning, ObjectiveError, warn
from implicitlayer.base._records import Record, listening
from implicitlayer.base._solution import SolverResult
from implicitlayer.base._status import Status
from implicitlayer.base._surroundings import plain_surroundings, saves_by_hooks
from implicitlayer.base._tree import flatten, unflatten
from implicitlayer.base._types import Leaves
from implicitlayer.compiled._over_sets import ProxProblem, with_terms
from implicitlayer.compiled._program import Problem, Program, closed_over
from implicitlayer.constrained._constrained import ProxLayer
from implicitlayer.equation._capture import ClosedOver, find_closed_over, plainly_impossible
from implicitlayer.equation._flat import Signature, flat_function, flat_parts
from implicitlayer.layer._layer import ImplicitLayer, without_aux
from implicitlayer.linear._gmres import Gmres


def compile(
    layer: ImplicitLayer, *, backend: Literal["inductor", "eager"] = "inductor", options: dict[str, Any] | None = None
) -> CompiledLayer:
    """The same layer with its solver, its checks and its derivative as two compiled functions, for many small calls.

    One problem of 20 unknowns takes a twentieth to a fifth of the time. The answers are those of the layer, to
    rounding; its errors and warnings too, for the layer itself judges whatever the compiled checks do not pass. The
    first call of each signature (structure, shapes, dtypes, devices, what requires a gradient) is made by the layer
    itself; the second one compiles, for some ten seconds or more. Under ``torch.func``, forward mode and
    ``il.diagnostics()``, and at second order, the layer itself is called. Inside ``torch.compile(..., fullgraph=True)``
    a compiled layer is one operator, without a graph break.

    Args:
        layer: made by :func:`argmin`, of an objective in torch operations without data-dependent Python control flow,
            that closes over nothing that requires a gradient. Its solver is :class:`solvers.GradientDescent`,
            :class:`solvers.LBFGS` or :class:`solvers.NewtonCG`, its linear solver :class:`ConjugateGradient`,
            :class:`Gmres` or :class:`Dense` (or one with a method ``traced`` like theirs). With ``constraint=`` or
            ``regularizer=`` the solver is :class:`solvers.ProximalGradient` or :class:`solvers.ProjectedGradient`, and
            the term acts on every entry by itself: :class:`sets.Box`, :class:`sets.NonNegative`, :class:`L1`,
            :class:`ElasticNet`, pytrees of them, or a function of theta that returns one.
        backend: ``"eager"`` traces and runs without a compiler: for tests, and to see what the compiler changes.
        options: of ``torch.compile``'s inductor; default ``{"cpp_wrapper": True}``.

    Returns:
        The compiled layer, called as the layer is.

    Raises:
        TypeError: a solver, linear solver or layer that has no compiled form.
        ValueError: a setting that has none (``polish``, ``curvature``, ``solver_has_aux``, callbacks).
        ClosureError: at the call, an objective that closes over what requires a gradient.
        ObjectiveError: at the call, an objective that the compiler cannot follow, or that draws random numbers.

    Example:
        >>> import torch, implicitlayer as il
        >>> solver = il.solvers.NewtonCG(rtol=1e-12)
        >>> layer = il.compile(il.argmin(lambda x, t: (torch.exp(x) - t * x).sum(), solver))
        >>> t = torch.tensor([2.0, 4.0], dtype=torch.float64, requires_grad=True)
        >>> layer(torch.zeros(2, dtype=torch.float64), t).sum().backward()  # x = log t, dx/dt = 1/t
        >>> [round(value, 9) for value in t.grad.tolist()]
        [0.5, 0.25]
    """
    over_sets = isinstance(layer, ProxLayer)
    if type(layer) not in (ImplicitLayer, ProxLayer) or layer.kind != "argmin":
        raise TypeError(
            f"layer={type(layer).__name__} has no compiled form: give what il.argmin returns. Layers of il.root, "
            "il.fixed_point and of programs are used as they are."
        )
    solvers = "ProximalGradient, ProjectedGradient" if over_sets else "GradientDescent, LBFGS, NewtonCG"
    for name, known in (("solver", solvers), ("linear_solver", "ConjugateGradient, Gmres, Dense")):
        value = getattr(layer, name)
        fits = hasattr(value, "traced") and getattr(value, "preconditioner", None) is None
        if not fits or (name == "solver" and hasattr(value, "regularizer") is not over_sets):
            raise TypeError(
                f"{name}={value!r} has no compiled form here: {known} have one, without preconditioner. A black-box "
                "solver cannot be compiled; the layer itself takes any."
            )
    if isinstance(layer, ProxLayer) and getattr(layer.solver, "regularizer", None) not in (None, layer.terms):
        raise ValueError("a solver with a term of its own has no compiled form: leave it out, it takes the layer's.")
    if isinstance(layer.linear_solver, Gmres) and not layer.linear_solver.limits.has_tolerance:
        raise ValueError(f"linear_solver={layer.linear_solver!r} has no compiled form without a tolerance: give rtol.")
    for name in ("polish", "solver_has_aux", "assumptions"):
        if getattr(layer, name):
            raise ValueError(f"{name}={getattr(layer, name)!r} has no compiled form: leave it out, or use the layer.")
    if layer.curvature != "hessian":
        raise ValueError(f"curvature={layer.curvature!r} has no compiled form: use 'hessian', or the layer itself.")
    for name in ("callback", "progress"):
        if getattr(layer.solver, name, None):
            raise ValueError(f"{name}= of the solver cannot be called from compiled code: leave it out.")
    if backend not in ("inductor", "eager"):
        raise ValueError(f"backend={backend!r} must be 'inductor' or 'eager'.")
    return CompiledLayer(layer, backend, {"cpp_wrapper": True} if options is None else options)


_MANY = 32  # signatures of one layer, after which a word is due


def cpp_compiler() -> str | None:
    """Where the C++ compiler is, None without one."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++", "cl"))), None)


def _can_compile(tensors: Leaves) -> bool:
    """Whether there is a compiler for the devices of these; a warning, once, where there is none."""
    if any(t.device.type != "cpu" for t in tensors):
        return True  # torch brings its own
    if cpp_compiler():
        return True
    warn(
        "il.compile needs a C++ compiler (g++ or clang++, or $CXX), and there is none: the layer is called as it is.",
        RuntimeWarning,
        "no compiler",
    )
    return False


@dataclass(eq=False)
class CompiledLayer:
    """A layer made by :func:`compile`; called as the layer itself.

    Attributes:
        layer: the layer that was compiled.
        backend, options: of the compiler.
    """

    layer: ImplicitLayer
    backend: str
    options: dict[str, Any]
    _programs: dict[Any, Program | None] = field(default_factory=dict, init=False, repr=False)
    _one_at_a_time: Any = field(default_factory=threading.RLock, init=False, repr=False)

    def __post_init__(self) -> None:
        from implicitlayer.compiled._in_graph import number_of  # registers operators: 15 ms that others need not pay

        self.number = number_of(self)

    def __getstate__(self) -> dict[str, Any]:
        return {"layer": self.layer, "backend": self.backend, "options": self.options}  # a copy compiles for itself

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @property
    def records(self) -> list[Record]:
        """Diagnostics of the latest call that the layer itself has made or judged; the compiled ones leave none."""
        return self.layer.records

    @property
    def num_compilations(self) -> int:
        """How often the compiler has been asked: twice for each signature, for the solver and for the derivative."""
        return sum(program.num_compilations for program in self._programs.values() if program is not None)

    def __call__(self, init: Any, *theta: Any) -> Any:
        """Solve from ``init`` at ``theta``, as :class:`ImplicitLayer` does."""
        if torch.compiler.is_dynamo_compiling():  # is_compiling() is also true while another thread compiles
            from implicitlayer.compiled._in_graph import call_in_graph

            return call_in_graph(self, init, theta)
        if plainly_impossible() or _torch.num_modes() or listening() or torch.is_inference_mode_enabled():
            return self.layer(init, *theta)
        if saves_by_hooks():  # a checkpoint runs it again, and what the first and the second call save must be the same
            return self.layer(init, *theta)
        leaves, spec = flatten(init)
        if leaves and isinstance(leaves[0], torch.Tensor) and torch.is_autocast_enabled(leaves[0].device.type):
            return self.layer(init, *theta)  # which solves without it
        signature = Signature.of(theta)
        tensors = signature.tensors
        needed = [t.requires_grad for t in tensors] if torch.is_grad_enabled() else [False] * len(tensors)
        key, slots = _key(spec, leaves, signature, needed)
        if key not in self._programs:
            return self._first(key, init, theta, signature, needed)
        program = self._programs[key]
        if program is not None and not program.has_solved and self.backend != "eager" and not _can_compile(leaves):
            program = self._programs[key] = None
        if program is None:
            return self.layer(init, *theta)
        call = Call(self.layer, program, spec, slots, len(leaves))
        return unflatten(_Compiled.apply(call, *map(torch.Tensor.detach, leaves), *tensors), spec)

    def prepared(self, init: Any, theta: tuple[Any, ...], needed: list[bool]) -> tuple[Program, Signature]:
        """The program for these arguments, and theta without its tensors."""
        leaves, spec = flatten(init)
        signature = Signature.of(theta)
        key, slots = _key(spec, leaves, signature, needed)
        if key not in self._programs:
            self._first(key, init, theta, signature, needed)
        program = self._programs[key]
        assert program is not None
        return program, slots

    def _first(self, key: Any, init: Any, theta: Any, signature: Signature, needed: list[bool]) -> Any:
        """The layer's own answer, and what the next call is to run."""
        tensors = signature.tensors
        if len(self._programs) == _MANY:
            warn(
                f"a compiled layer has been called with {_MANY} signatures, each compiled apart. Shapes that change "
                "are better padded, and Python numbers among the thetas that change are better passed as tensors.",
                ImplicitLayerWarning,
                "many signatures",
            )
        function = without_aux(self.layer.function) if self.layer.objective_has_aux else self.layer.function
        with torch.enable_grad():
            read = self.layer._read(function)[0]
            hidden, again = (find_closed_over(read, (init, *theta), lambda value: None) for _ in range(2))
        if hidden:
            raise closed_over(len(hidden))
        answer = self.layer(init, *theta)
        if hidden.draws:
            raise ObjectiveError(
                "the objective draws random numbers, which compiled code would draw anew in every evaluation. Draw "
                "once, before the layer, and pass the draw as one more theta (dropout: call .eval() on its module)."
            )
        leaves, spec = flatten(init)
        parts = flat_parts(self.layer.function, spec, signature, [], self.layer.batch_dims)
        if parts.metric_matrix is not None and parts.metric_matrix(leaves, tensors):
            raise TypeError("an objective with a matrix for its curvature (MatrixStrength) has no compiled form.")
        more = with_terms(self.layer, init, theta) if isinstance(self.layer, ProxLayer) else {}
        problem = (ProxProblem if more else Problem)(
            function=flat_function(function, spec, signature, [], True),
            parts=parts,
            lane_dims=self.layer.batch_dims,
            solver=self.layer.solver,
            linear_solver=self.layer.linear_solver,
            damping=float(self.layer.damping),
            rtol=self.layer.stationarity_rtol,
            needed=tuple(needed),
            **more,
        )
        plain = all(type(t) in (torch.Tensor, torch.nn.Parameter) for t in (*leaves, *tensors))
        hidden.first = None  # the layer's own call has compared
        hidden.settle({id(tensor) for tensor, _ in again.constants})  # what it makes itself is another one each time
        shapes = [t.shape for t in leaves], [t.shape for t in tensors]
        made = None
        if plain:
            made = Program(problem, shapes, self.backend, self.options, self._one_at_a_time, hidden.constants)
        self._programs.setdefault(key, made)
        return answer


def _key(spec: Any, leaves: Leaves, signature: Signature, needed: list[bool]) -> tuple[Any, Signature]:
    """What a program is for, and the arguments without their tensors."""
    slots = signature.slots
    shapes = [(t.shape, t.stride(), t.dtype, t.device) for t in (*leaves, *signature.tensors)]
    plain = (bool, int, float, str)
    others = tuple([(type(leaf), repr(leaf) if isinstance(leaf, plain) else id(leaf)) for leaf in slots.leaves])
    return (spec, signature.spec, tuple(shapes), tuple(needed), others, torch.get_default_dtype()), slots


@dataclass(frozen=True, eq=False)
class Call:
    """What a compiled call needs when it is judged, or differentiated, by the layer itself."""

    layer: ImplicitLayer
    program: Program
    spec: Any
    slots: Signature
    num_x: int

    def solve(
        self, init: Leaves, theta: Leaves, judge: Callable[[Leaves, torch.Tensor], Leaves]
    ) -> tuple[torch.Tensor, ...]:
        """(*x leaves, measured); ``judge(x, status per lane)`` gives x where the compiled checks do not pass."""
        with nullcontext() if self.program.has_solved else self.program.one_at_a_time:
            x, fine, codes, measured = run(self.program.solve, *apart(init, theta))
        self.program.has_solved = True
        return (*(x if fine else judge(x, codes)), measured)

    def judged(self, init: Leaves, theta: Leaves, x: Leaves, codes: torch.Tensor) -> Leaves:
        """x as the layer itself leaves it; theta with what requires a gradient."""
        with torch.enable_grad():
            return [t.detach() for t in self.by_layer(x, init, theta, codes)]

    def pull(self, x: Leaves, theta: Leaves, v: Leaves, measured: torch.Tensor) -> Leaves | None:
        """The gradients of the needed theta leaves; None where the layer itself is to be asked."""
        plain = apart(x, theta, [t.contiguous() for t in v])
        with nullcontext() if self.program.has_pulled else self.program.one_at_a_time:
            found, fine = run(self.program.pull, *plain, measured.detach())
        self.program.has_pulled = True
        return list(found) if fine else None

    def pull_by_layer(self, x: Leaves, init: Leaves, theta: Leaves, v: Leaves, attached: bool) -> Leaves:
        """The same by the layer itself; differentiable if ``attached``."""
        wanted = [t for t, need in zip(theta, self.program.problem.needed, strict=True) if need]
        with torch.enable_grad():
            answer = self.by_layer(x, init, theta)
            return list(torch.autograd.grad(answer, wanted, v, create_graph=attached, materialize_grads=True))

    def by_layer(self, x: Leaves, init: Leaves, theta: Leaves, codes: torch.Tensor | None = None) -> Leaves:
        """The layer's own answer where its solver returns x, and says a :class:`Status` for each lane."""
        given = SolverResult(unflatten([t.detach() for t in x], self.spec))
        if codes is not None and codes.numel():
            given = replace(given, status=Status(int(codes.max())), nonfinite=codes == int(Status.NONFINITE))
        layer = replace(self.layer, solver=lambda *_: given)
        answer = flatten(layer(unflatten(init, self.spec), *self.slots.rebuild(theta)))[0]
        self.layer.records = layer.records
        return answer


def apart(*parts: Leaves) -> list[Leaves]:
    """The tensors without their graphs, and a copy of what shares its memory with another: no compiler follows that.

    Numbers become tensors of one entry: what is 0-d the tracer (2.13) takes for a Python number first, and then begins
    again.
    """
    met: set[int] = set()
    plain: list[Leaves] = []
    for leaves in parts:
        plain.append([])
        for leaf in leaves:
            place = leaf.untyped_storage().data_ptr()
            own = leaf.detach().clone() if place in met else leaf.detach()
            plain[-1].append(own if own.ndim else own.reshape(1))
            met.add(place)
    return plain


def run(function: Any, *args: Any) -> Any:
    """What a compiled function returns; an error that says what the compiler could not follow."""
    try:
        with torch.no_grad(), plain_surroundings([]):
            return function(*args)
    except _torch.compiler_errors() as error:
        inner = getattr(error, "inner_exception", None)
        if isinstance(inner, ImplicitLayerError):
            raise inner from None
        said = str(error if inner is None else inner).strip()
        first = said.splitlines()[0] if said else type(error).__name__
        raise ObjectiveError(
            f"the compiler of torch cannot follow the objective: {first} Write it in torch operations, without "
            ".item(), NumPy or a branch on values; or use the layer itself, not compiled."
        ) from error


class _Compiled(torch.autograd.Function):
    """``apply(call, *init leaves, *theta leaves) -> x leaves``."""

    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        k = call.num_x
        init, theta = list(tensors[:k]), list(tensors[k:])
        *x, measured = call.solve(init, theta, partial(call.judged, init, theta))
        ctx.call = call
        ctx.outside = ClosedOver()
        ctx.outside.constants = tuple([(t, t._version) for t, _ in call.program.outside])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*x, *tensors, measured)
        return tuple(x)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor | None) -> tuple[Any, ...]:
        call: Call = ctx.call
        ctx.outside.refuse_changed()
        k = call.num_x
        *saved, measured = ctx.saved_tensors
        x, init, theta = saved[:k], saved[k : 2 * k], saved[2 * k :]
        if all(c is None for c in cotangents):
            return (None,) * (1 + k + len(theta))
        v = [torch.zeros_like(leaf) if c is None else c for c, leaf in zip(cotangents, x, strict=True)]
        attached = torch.is_grad_enabled()
        special = attached or plainly_impossible() or listening() or any(map(_torch.is_batched_by_grad, v))
        found = None if special else call.pull(x, theta, v, measured)
        if found is None:
            found = call.pull_by_layer(x, init, theta, v, attached)
        rest = iter(found)
        needed = call.program.problem.needed
        return (None, *(None,) * k, *(next(rest) if need else None for need in needed))
