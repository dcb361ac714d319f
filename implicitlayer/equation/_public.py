"""``il.linear_solve``, ``il.hessian_operator`` and ``il.hvp``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from implicitlayer.base._divided import Divided
from implicitlayer.base._parts import patternless
from implicitlayer.base._sharding import Sharding, mesh_of, whole
from implicitlayer.base._surroundings import out_of_inference, outside_compiled_code, plain_surroundings
from implicitlayer.base._tree import TreeSpec, flatten, leaves_like, like_x, name_lanes, ravel, unflatten, unravel
from implicitlayer.base._types import FlatFunction, Leaves, OnFailure, check_one_of
from implicitlayer.equation._capture import find_closed_over
from implicitlayer.equation._flat import Signature, flat_function, flat_parts, refuse_not_differentiated
from implicitlayer.equation._jacobian import Curvature, Jacobian, OperatorFamily
from implicitlayer.equation._repair import POLICIES, NegativeCurvature
from implicitlayer.equation._residual import Residual, check_value, pullback
from implicitlayer.equation._solve import Settings, SolveSpec, refuse_forward_over_forward, solve
from implicitlayer.linear._cg import ConjugateGradient
from implicitlayer.linear._operator import FlatOperator, Product, default_rtol, is_for_symmetric, tell_unknowns


@outside_compiled_code
def hvp(objective: Callable[..., torch.Tensor], x: Any, vector: Any, *theta: Any) -> Any:
    """Hessian-vector product ``d^2 objective / dx^2 (x, *theta) vector``, differentiable in everything.

    Args:
        objective: ``objective(x, *theta) -> 0-d tensor``.
        x, vector: pytrees of the same structure and shapes.
        theta: pytrees passed through.

    Returns:
        A pytree like ``x``. Reverse over reverse: about 2.5 gradients on a convolutional network.

    Example:
        >>> import torch, implicitlayer as il
        >>> il.hvp(lambda x: (x**3).sum(), torch.tensor([1.0, 2.0]), torch.ones(2)).tolist()
        [6.0, 12.0]
    """
    return hessian_operator(objective, x, *theta)(vector)


@dataclass(frozen=True, eq=False)
class HessianOperator:
    """A matrix-free matrix that depends on tensors; made by :func:`hessian_operator`.

    Call it on a pytree like x for one product. :func:`linear_solve` takes it as it is.
    """

    family: OperatorFamily
    tensors: Leaves
    structure: TreeSpec
    sharding: Sharding | None = None  # of x, where that holds DTensors: all else is of what is inside
    whole: Callable[[], HessianOperator] | None = None  # the same of whole tensors, where all else is of parts

    def check(self, vector: Any, name: str) -> Leaves:
        """The leaves of ``vector`` in the dtypes of x; an error where structure or shapes are others."""
        like = unflatten(self.tensors[: self.structure.num_leaves], self.structure)
        leaves = leaves_like(vector, like, f"{name} must have the structure of x")
        _refuse_not_real(name, leaves)
        shapes, expected = [tuple(v.shape) for v in leaves], [tuple(t.shape) for t in self.tensors[: len(leaves)]]
        if shapes != expected:
            raise ValueError(f"{name} must have the shapes of x: expected {expected}, got {shapes}.")
        return [v.to(t.dtype) for v, t in zip(leaves, self.tensors, strict=False)]

    @outside_compiled_code
    def __call__(self, vector: Any) -> Any:
        if self.sharding is not None:
            return self.sharding.outside(replace(self, sharding=None)(self.sharding.inside(vector)))
        leaves = self.check(vector, "the vector")
        with plain_surroundings(leaves):
            return unflatten(self.family.product(leaves, self.tensors), self.structure)


@outside_compiled_code
def hessian_operator(
    objective: Callable[..., torch.Tensor], x: Any, *theta: Any, curvature: Curvature = "hessian", damping: float = 0.0
) -> HessianOperator:
    """The Hessian of ``objective`` in x at (x, *theta), known by its products.

    Args:
        objective: ``objective(x, *theta) -> 0-d tensor``.
        x, theta: pytrees; solutions of systems with the operator are differentiable in all their floating tensors.
        curvature: ``"gauss_newton"`` for an objective made by :func:`composite` or :func:`least_squares`.
        damping: added to the diagonal.

    Example:
        >>> import torch, implicitlayer as il
        >>> operator = il.hessian_operator(lambda x, a: 0.5 * a * (x**2).sum(), torch.ones(2), torch.tensor(3.0))
        >>> operator(torch.tensor([1.0, 2.0])).tolist()
        [3.0, 6.0]
    """
    leaves, x_spec = flatten(x)
    if mesh_of(leaves) is not None:

        def of(sharding: Sharding) -> HessianOperator:
            how: dict[str, Any] = {"curvature": curvature, "damping": damping}
            inner = hessian_operator(sharding.seen(objective, Divided.or_whole), sharding.inside(x), *theta, **how)
            return replace(inner, sharding=sharding)

        made = partial(of, Sharding(x))
        return replace(of(Divided(x)), whole=made) if Divided.possible(x) else made()
    hidden = find_closed_over(objective, (x, *theta), lambda value: check_value(value, torch.Size(), False))
    hidden.first = None  # there is no solution, whose run would be compared
    signature = Signature.of(theta)
    refuse_not_differentiated([*signature.leaves, *hidden])
    residual = Residual(
        flat_function(objective, x_spec, signature, hidden, True),
        is_gradient=True,
        parts=flat_parts(objective, x_spec, signature, hidden),
    )
    family = Jacobian(residual, len(leaves), True, curvature, damping)
    return HessianOperator(family, [*leaves, *signature.tensors, *hidden], x_spec)


def _refuse_not_real(name: str, leaves: Sequence[Any]) -> None:
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor) and not leaf.is_floating_point():
            raise TypeError(
                f"{name} has dtype {leaf.dtype}; systems are real and floating. Use .double(); of complex data stack "
                "real and imaginary parts with torch.view_as_real, a matrix R + iS as [[R, -S], [S, R]]."
            )


@dataclass(frozen=True)
class _Form:
    """Shape, dtype and device of a leaf; a tensor in its place would belong to the transform that made it."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def with_lanes(self, lanes: torch.Size) -> torch.Tensor:
        return torch.empty((), dtype=self.dtype, device=self.device).expand((*lanes, *self.shape))


@dataclass(frozen=True, eq=False)
class _LinearFunction:
    """The family u -> function(u, tensors), linear in u."""

    function: FlatFunction
    like: tuple[_Form, ...]
    transposed: bool = False
    symmetric: bool = False
    assumed: bool = False  # the solver is for symmetric systems: nobody has said of A that it is
    adjoint: FlatFunction | None = None  # the same of A', where that is known
    levels: tuple[tuple[tuple[bool, ...], str], ...] = ()

    @property
    def lane_dims(self) -> int:
        return len(self.levels)

    def transpose(self) -> _LinearFunction:
        return replace(self, transposed=not self.transposed)

    def with_level(self, has_lanes: tuple[bool, ...], randomness: str) -> _LinearFunction:
        return replace(self, levels=((has_lanes, randomness), *self.levels))

    def always_has_lanes(self, index: int) -> bool:
        return False

    def product(self, u: Leaves, tensors: Leaves) -> Leaves:
        # assumed of A(tensors), not of its derivatives
        real = self.transposed and (self.assumed or not self.symmetric)
        function = (self.adjoint or self._pull) if real else self.function
        for has_lanes, randomness in reversed(self.levels):
            dims = 0, [0 if has else None for has in has_lanes]
            function = torch.vmap(function, in_dims=dims, randomness=randomness)
        return list(function(list(u), list(tensors)))

    def _pull(self, u: Leaves, tensors: Leaves) -> Leaves:
        zeros = [torch.zeros_like(v) for v in u]
        return pullback(lambda u_: list(self.function(u_, tensors)), zeros, u)

    def gauss_newton(self, tensors: Leaves) -> FlatOperator:
        raise ValueError(
            'negative_curvature="gauss_newton" needs il.hessian_operator of an objective made by il.composite or '
            "il.least_squares; a matrix or linear function has no Gauss-Newton matrix."
        )

    def linearize(self, tensors: Leaves) -> FlatOperator:
        def product_of(family: _LinearFunction) -> Callable[[torch.Tensor], torch.Tensor]:
            def matvec(vector: torch.Tensor) -> torch.Tensor:
                like = [form.with_lanes(vector.shape[:-1]) for form in self.like]
                with torch.no_grad():
                    return ravel(family.product(unravel(vector, like, self.lane_dims), tensors), self.lane_dims)

            return matvec

        product = product_of(replace(self, transposed=self.transposed and not self.symmetric))
        other = product_of(replace(self, transposed=self.symmetric or not self.transposed, symmetric=False))
        if self.transposed and self.symmetric and self.assumed:
            product = _tested(product, other)
        return FlatOperator(product, other, symmetric=self.symmetric or self.assumed)


def _tested(product: Product, transposed: Product) -> Product:
    """The product with A in place of that with A': the first call makes sure that they are the same.

    Both are made once with a vector that has no pattern, whose part in the range of A - A' is zero by accident only.
    They may differ by ten times the residual that a default solve leaves: so much is told of residuals, too.
    """
    probes: list[torch.Tensor] = []

    def of_both(vector: torch.Tensor) -> torch.Tensor:
        if not probes and vector.shape[-1]:
            probes.append(patternless(vector))
            got, wanted = product(probes[0]), transposed(probes[0])
            gap = (got - wanted).abs().amax(-1) / got.abs().amax(-1)
            bad = gap > min(10 * default_rtol(vector.dtype), math.sqrt(torch.finfo(vector.dtype).eps))
            if bool(bad.any()):
                raise ValueError(
                    f"the operator A of il.linear_solve is not symmetric{name_lanes(bad)}: A v and A'v differ by "
                    f"{float(gap[bad].max()):.2g} of their size. Its solver is for symmetric systems, and the gradient "
                    "would be that of another one. Pass il.Gmres(), il.Bicgstab() or il.Dense() as the solver; where "
                    "A - A' is rounding, symmetric=True."
                )
        return product(vector)

    return of_both


@outside_compiled_code
def linear_solve(
    operator: Any,
    rhs: Any,
    solver: Callable[..., Any] | None = None,
    *tensors: Any,
    symmetric: bool | None = None,
    on_failure: OnFailure = "warn",
    negative_curvature: NegativeCurvature = "raise",
) -> Any:
    """u with ``operator u = rhs``, differentiable in both, to every order, in reverse and forward mode.

    Forward mode over forward mode, which torch answers with zeros, is an error. The derivative of a solve is a solve:
    no step of the iteration is differentiated, and a truncated one has the derivatives of the system it truncates.

    Args:
        operator: a tensor [n, n]; a :class:`HessianOperator`; or a function ``(u, *tensors) -> A(tensors) u``, linear
            in u; tensors that it closes over and that need a gradient are found and differentiated.
        rhs: tensor [n], or a pytree for a function.
        solver: a linear solver; default :class:`ConjugateGradient`, which needs a symmetric positive-definite system.
        tensors: pytrees that the function depends on.
        symmetric: whether A = A'. False makes reverse mode solve with the transpose, which is right for every A.
            Default: False, but for a function with a solver of symmetric systems, such as
            :class:`ConjugateGradient`: A is symmetric at these values of the tensors, which reverse mode tests by one
            product with A and one with A'. True is taken at your word, and second derivatives need it beside them, too.
        on_failure, negative_curvature: as in :func:`argmin`.

    Raises:
        UnsupportedTransformError: forward mode over forward mode.
        ValueError: a matrix does not fit; in reverse mode, a function that the solver needs symmetric is not.

    Example:
        >>> import torch, implicitlayer as il
        >>> a = torch.tensor([2.0, 4.0], dtype=torch.float64, requires_grad=True)
        >>> u = il.linear_solve(lambda u, a: a * u, torch.ones(2, dtype=torch.float64), il.ConjugateGradient(), a)
        >>> u.sum().backward()
        >>> a.grad.tolist()  # d(1/a)/da = -1/a^2
        [-0.25, -0.0625]
    """
    check_one_of("negative_curvature", negative_curvature, POLICIES)
    refuse_forward_over_forward()
    solver = solver if solver is not None else ConjugateGradient()
    leaves, spec = flatten(rhs)
    _refuse_not_real("a matrix or right-hand side", [operator, *leaves])
    if mesh_of((operator, *leaves)) is not None or getattr(operator, "sharding", None) is not None:
        how: dict[str, Any] = {"symmetric": symmetric, "on_failure": on_failure}
        return _solved_sharded(operator, rhs, solver, *tensors, **how, negative_curvature=negative_curvature)
    like = tuple(_Form(leaf.shape, leaf.dtype, leaf.device) for leaf in leaves)
    assumed = symmetric is None and is_for_symmetric(solver)
    family: OperatorFamily
    if isinstance(operator, HessianOperator):
        leaves, spec = operator.check(rhs, "rhs"), operator.structure
        family, parameters = operator.family, operator.tensors
    elif isinstance(operator, torch.Tensor):
        square = operator.ndim == 2 and operator.shape[0] == operator.shape[1] and operator.dtype == leaves[0].dtype
        if not square or operator.shape[:1] != leaves[0].shape:
            raise ValueError(
                f"a matrix [n, n] needs a right-hand side [n] of its dtype, got {tuple(operator.shape)} "
                f"{operator.dtype} and {tuple(leaves[0].shape)} {leaves[0].dtype}. Map over batches with "
                "torch.func.vmap."
            )
        matrix = _LinearFunction(lambda u, t: [t[0] @ u[0]], like, symmetric=bool(symmetric), assumed=assumed)
        family, parameters = replace(matrix, adjoint=lambda u, t: [t[0].mT @ u[0]]), [operator]
    else:
        with tell_unknowns(leaves):
            hidden = find_closed_over(operator, (rhs, *tensors), lambda value: like_x(value, leaves, spec))
        hidden.first = None  # as above
        signature = Signature.of(tensors)
        parameters = [*signature.tensors, *hidden]
        refuse_not_differentiated([*signature.leaves, *hidden])
        flat = flat_function(operator, spec, signature, hidden, False)
        family = _LinearFunction(_in_dtypes_of(like, flat), like, symmetric=bool(symmetric) or assumed, assumed=assumed)
    settings = Settings(solver, on_failure, negative_curvature=negative_curvature)
    solved = SolveSpec(family, len(leaves), settings, "linear")
    if torch.is_inference_mode_enabled():  # where torch 2.11 records nothing, not even inside torch.func
        with torch.inference_mode(False), torch.no_grad():
            return unflatten(solve(solved, out_of_inference(leaves), out_of_inference(parameters)), spec)
    return unflatten(solve(solved, leaves, parameters), spec)


def _in_dtypes_of(like: Sequence[_Form], function: FlatFunction) -> FlatFunction:
    """The function, its values in the dtypes of the unknowns: a part of it may work in another one."""
    return lambda u, t: [value.to(form.dtype) for value, form in zip(function(u, t), like, strict=True)]


def _solved_sharded(operator: Any, rhs: Any, solver: Any, *tensors: Any, **settings: Any) -> Any:
    """The same of what the solver can work with, NOTE [sharded objectives].

    The solution lies as ``rhs`` does, that of a system with the Hessian as its unknowns do.
    """
    sharding = Sharding(rhs) if mesh_of(flatten(rhs)[0]) is not None else None
    stays = getattr(solver, "in_parts", False)
    if isinstance(operator, HessianOperator):
        operator = operator if stays or operator.whole is None else operator.whole()
        inside, operator = operator.sharding or sharding, replace(operator, sharding=None)
    elif isinstance(operator, torch.Tensor):
        inside, operator = sharding, whole(operator)
    else:
        inside = Divided.or_whole(rhs, gives_value=False) if sharding and stays else sharding
        operator = operator if inside is None else inside.seen(operator)
    if inside is None:
        return linear_solve(operator, rhs, solver, *tensors, **settings)
    return inside.outside(linear_solve(operator, inside.inside(rhs), solver, *tensors, **settings))
