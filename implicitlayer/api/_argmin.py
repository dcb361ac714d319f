"""``il.argmin``, ``il.root``, ``il.fixed_point``: differentiable layers around any solver."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from implicitlayer.base._types import OnFailure
from implicitlayer.constrained._constrained import ProxLayer
from implicitlayer.equation._certificate import Assumptions
from implicitlayer.equation._jacobian import Curvature
from implicitlayer.equation._repair import NegativeCurvature
from implicitlayer.layer._layer import ImplicitLayer
from implicitlayer.layer._roles import check_roles
from implicitlayer.linear._cg import ConjugateGradient
from implicitlayer.linear._gmres import Gmres


def argmin(
    objective: Callable[..., Any],
    solver: Callable[..., Any],
    *,
    linear_solver: Callable[..., Any] | None = None,
    solver_has_aux: bool = False,
    objective_has_aux: bool = False,
    on_failure: OnFailure = "warn",
    stationarity_rtol: float | None = 1e-3,
    polish: int = 0,
    batch_dims: int = 0,
    curvature: Curvature = "hessian",
    damping: float = 0.0,
    negative_curvature: NegativeCurvature = "raise",
    assumptions: Assumptions | None = None,
    constraint: Any = None,
    regularizer: Any = None,
    step_size: float | None = None,
) -> ImplicitLayer:
    """A differentiable layer ``(init, *theta) -> argmin_x objective(x, *theta)`` around any solver.

    The gradient needs the solution only, never the solver's path: with H the Hessian of the objective in x at the
    solution and v the cotangent, one linear solve H u = v gives theta_bar = -(d^2 f / dtheta dx) u (implicit function
    theorem). Memory is that of about two gradients of the objective, whatever the solver did.

    Args:
        objective: ``objective(x, *theta) -> 0-d tensor``, plain torch code; x and every theta are pytrees. Tensors
            that it closes over (module weights too) and that need a gradient are found and differentiated. It is run
            once more per call for that.
        solver: any callable ``solver(objective, init, *theta) -> x``. It runs on detached data with grad mode on, may
            use autograd, NumPy or a subprocess, and may return NumPy arrays.
        linear_solver: ``(operator, rhs) -> LinearSolution``; default :class:`ConjugateGradient` with its defaults.
        solver_has_aux: the solver returns ``(x, aux)``, and so does the layer (under vmap: a list, one aux per lane).
        objective_has_aux: the objective returns ``(value, aux)``; nobody gets its aux, for which it is called at x.
        on_failure: what numerical trouble gets. ``"warn"``: a warning where the gradient is still an approximation,
            an error where it is none (negative curvature, singular, diverged). ``"raise"``: always an error.
            ``"ignore"``: neither. ``"mask"``: what ``"raise"`` refuses makes its lane NaN with a zero gradient, all
            other lanes untouched; ``record.failed`` says which. NaN and Inf are an error under every other policy.
        stationarity_rtol: allowed distance from the returned x to the solution, relative to
            ``max(||x||, ||x - init||)``, before the answer counts as not stationary. It is estimated from below by one
            gradient and one product, and from the other side by the solves behind derivatives; where these disagree a
            Newton step decides. None switches the checks off (for early stopping by intention).
        polish: Newton steps after the solver, damped where they lead off, each with one linear solve or two; near a
            solution an error of delta becomes delta^2. The best point is kept.
        batch_dims: leading dimensions of every leaf of x that enumerate independent problems; the objective then
            returns one value per lane, [*lanes], and everything is solved lane by lane in one go. A theta may have
            lanes of its own or be shared. A solver without ``batched = True`` sees the sum over the lanes.
        curvature: the matrix of the linear solve: ``"hessian"``, or ``"gauss_newton"`` for an objective made by
            :func:`composite` or :func:`least_squares` (see there for what that costs in exactness).
        damping: added to the diagonal of that matrix, in units of curvature; biases the gradient towards zero, and
            second derivatives likewise: they are not those of the biased gradient.
        negative_curvature: what conjugate gradients do where they meet negative curvature. ``"raise"``: a failure, as
            ``on_failure`` says. ``"truncate"``: keep the iterate before it (Steihaug). ``"damp"``: solve again with
            twice the magnitude of the smallest Ritz value on the diagonal. ``"minres"``: solve again with
            :class:`Minres`, exact. ``"gauss_newton"``: solve again with the Gauss-Newton matrix. The record says
            what was done; a second derivative through what solved another system is an error.
        assumptions: constants of the problem that make ``record.gradient_error`` a rigorous bound.
        constraint: a set that x is confined to (``il.sets``), a pytree of sets, or a function of theta that returns
            one. The solver still sees the objective alone, and knows the set by itself. Its data are differentiated.
        regularizer: a convex term r(x) that is added to the objective and need not be smooth (:class:`L1`,
            :class:`GroupL1`, :class:`ElasticNet`, :class:`Prox`), in the same forms.
        step_size: eta of the equation ``x = prox(x - eta grad f(x))`` that a layer with either of these differentiates;
            in units of 1 / curvature, None estimates it. No derivative depends on it, the linear solve's speed does.

    Returns:
        The layer, a callable. The result is differentiable in every floating tensor of every theta; ``init`` gets no
        gradient.

    Raises:
        ObjectiveError, SolverOutputError, NonFiniteError: misuse or broken numbers, at the call.
        StationarityError, LinearSolveError: see ``on_failure``.

    Source: implicit function theorem; for the proximal objective, Rajeswaran et al. 2019 (arXiv:1909.04630), Lemma 1.

    Example:
        >>> import torch, implicitlayer as il
        >>> layer = il.argmin(lambda x, t: (torch.exp(x) - t * x).sum(), lambda f, x, t: torch.log(t))
        >>> t = torch.tensor([2.0, 4.0], dtype=torch.float64, requires_grad=True)
        >>> layer(torch.zeros(2, dtype=torch.float64), t).sum().backward()  # x = log t, dx/dt = 1/t
        >>> t.grad.tolist()
        [0.5, 0.25]
    """
    check_roles("argmin", objective, solver, "objective")
    checks = solver_has_aux, objective_has_aux, on_failure, stationarity_rtol, polish, batch_dims
    system = curvature, damping, negative_curvature, assumptions
    if constraint is None and regularizer is None:
        if step_size is not None:
            raise ValueError(f"step_size={step_size} needs a constraint or a regularizer: nothing else uses it.")
        return ImplicitLayer(objective, solver, linear_solver or ConjugateGradient(), "argmin", *checks, *system)
    if constraint is not None and regularizer is not None:
        raise ValueError(
            "constraint and regularizer cannot be given together: the proximal operator of a sum is not made of "
            "those of its parts. Give a pytree of both kinds for different parts of x, or il.Prox of the sum."
        )
    terms, name = (regularizer, "regularizer") if constraint is None else (constraint, "constraint")
    by = linear_solver or Gmres()
    return ProxLayer(objective, solver, by, "argmin", *checks, *system, terms, name, step_size)


def root(
    residual: Callable[..., Any],
    solver: Callable[..., Any],
    *,
    linear_solver: Callable[..., Any] | None = None,
    solver_has_aux: bool = False,
    objective_has_aux: bool = False,
    on_failure: OnFailure = "warn",
    stationarity_rtol: float | None = 1e-3,
    polish: int = 0,
    batch_dims: int = 0,
    assumptions: Assumptions | None = None,
) -> ImplicitLayer:
    """A differentiable layer ``(init, *theta) -> x`` with ``residual(x, *theta) = 0``.

    With J = d residual / dx at the solution: reverse mode solves J' u = v and gives -(d residual / d theta)' u,
    forward mode solves J dx = -(d residual / d theta) d theta. J need not be symmetric.

    Args:
        residual: ``residual(x, *theta)`` in plain torch code, one equation per unknown, in the structure of x.
        solver: any callable ``solver(residual, init, *theta) -> x``.
        linear_solver: for systems that need not be symmetric; default :class:`Gmres`.
        solver_has_aux, objective_has_aux, on_failure, stationarity_rtol, polish, batch_dims, assumptions: as in
            :func:`argmin` ("objective" is the residual; with ``batch_dims`` it returns leaves with the lanes of x).

    Example:
        >>> import torch, implicitlayer as il
        >>> layer = il.root(lambda x, a: x**3 - a, lambda r, x, a: a ** (1 / 3))
        >>> a = torch.tensor(8.0, dtype=torch.float64, requires_grad=True)
        >>> layer(torch.ones((), dtype=torch.float64), a).backward()  # d a^(1/3) / da = 1/12
        >>> round(a.grad.item(), 12)
        0.083333333333
    """
    check_roles("root", residual, solver, "residual")
    settings = solver_has_aux, objective_has_aux, on_failure, stationarity_rtol, polish, batch_dims
    return ImplicitLayer(residual, solver, linear_solver or Gmres(), "root", *settings, assumptions=assumptions)


def fixed_point(
    map: Callable[..., Any],
    solver: Callable[..., Any],
    *,
    linear_solver: Callable[..., Any] | None = None,
    solver_has_aux: bool = False,
    objective_has_aux: bool = False,
    on_failure: OnFailure = "warn",
    stationarity_rtol: float | None = 1e-3,
    polish: int = 0,
    batch_dims: int = 0,
    assumptions: Assumptions | None = None,
) -> ImplicitLayer:
    """A differentiable layer ``(init, *theta) -> x`` with ``x = map(x, *theta)``.

    Reverse mode solves (I - J)' u = v with J = d map / dx and gives (d map / d theta)' u: a :func:`root` layer of the
    residual ``x - map(x)`` whose solver sees the map. :class:`Neumann` as ``linear_solver`` sums the series
    v + J'v + J'J'v + ..., the reverse of unrolling the last iterations.

    Args:
        map: ``map(x, *theta)`` in plain torch code, in the structure of x.
        solver: any callable ``solver(map, init, *theta) -> x``.
        linear_solver: default :class:`Gmres`.
        solver_has_aux, objective_has_aux, on_failure, stationarity_rtol, polish, batch_dims, assumptions: as in
            :func:`argmin`.

    Example:
        >>> import torch, implicitlayer as il
        >>> solver = il.solvers.AndersonAcceleration(rtol=1e-12)
        >>> layer = il.fixed_point(lambda x, a: 0.5 * (x + a / x), solver)  # Heron: the square root of a
        >>> a = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
        >>> layer(torch.ones((), dtype=torch.float64), a).backward()
        >>> round(a.grad.item(), 12)
        0.25
    """
    check_roles("fixed_point", map, solver, "map")
    settings = solver_has_aux, objective_has_aux, on_failure, stationarity_rtol, polish, batch_dims
    return ImplicitLayer(map, solver, linear_solver or Gmres(), "fixed_point", *settings, assumptions=assumptions)
