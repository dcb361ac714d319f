"""The problems of `layers.py` in JAXopt and Optimistix: compiled whole, from the data to the gradients.

Not PyTorch, hence no peer of a PyTorch layer, but the other way to have such layers. Compilation is not in the times.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import numpy as np
import torch
from _layers_problems import Problem, Solved
from _layers_rivals import RTOL, Call, Makers, step_of


def start_jax() -> Any:
    # one thread, before it starts
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax

    jax.config.update("jax_enable_x64", True)
    return jax


def compiled(problem: Problem, solve: Any) -> Call:
    """``solve(*theta) -> x [n]`` of one lane; all lanes by vmap, gradient and all in one compiled function."""
    jax = start_jax()
    import jax.numpy as jnp

    def loss(thetas: Any) -> Any:
        x = jax.vmap(solve)(*thetas)
        return (x * x).sum(), x

    run = jax.jit(jax.grad(loss, has_aux=True))
    thetas = tuple(jnp.asarray(t.numpy()) for t in problem.thetas)

    def call() -> Solved:
        gradients, x = jax.block_until_ready(run(thetas))
        return torch.from_numpy(np.array(x)), [torch.from_numpy(np.array(g)) for g in gradients]

    return call


def objective_of(problem: Problem) -> Any:
    """The objective of one lane, with the largest gradient at zero to measure tolerances by."""
    jax = start_jax()
    import jax.numpy as jnp

    A = jnp.asarray(problem.constants[0].numpy())
    if problem.kind == "logistic":
        y = jnp.asarray(problem.constants[1].numpy())
        return lambda x, s: jax.nn.softplus(-y * (A @ x)).mean() + 0.5 * jnp.exp(s) * (x @ x)
    if problem.kind == "ridge":
        return lambda x, s, b: 0.5 * ((A @ x - b) ** 2).mean() + 0.5 * jnp.exp(s) * (x @ x)
    return lambda x, t, b: 0.5 * ((A @ x - b) ** 2).mean()


def start_norm(problem: Problem) -> float:
    """The smallest over the lanes of the gradient's norm at the start, which tolerances are relative to."""
    A = problem.constants[0]
    if problem.kind == "logistic":
        return float((problem.constants[1] @ A / len(A) / 2).norm())
    return float((problem.thetas[1] @ A / len(A)).norm(dim=1).min())


def jaxopt_makers() -> Makers:
    start_jax()
    import jax.numpy as jnp
    import jaxopt

    def lbfgs(problem: Problem) -> Call:
        fun = objective_of(problem)
        # the iterations it takes at 1e-10 relative are spent by its line search failing: 1e-9 is what it reaches
        settings = {"maxiter": 2000, "implicit_diff_solve": partial(jaxopt.linear_solve.solve_cg, tol=RTOL)}
        solver = jaxopt.LBFGS(fun, tol=10 * RTOL * start_norm(problem), **settings)
        zero = jnp.zeros(problem.n)
        return compiled(problem, lambda *theta: solver.run(zero, *theta).params)

    def proximal(problem: Problem) -> Call:
        fun = objective_of(problem)
        solver = jaxopt.ProximalGradient(
            lambda x, theta: fun(x, *theta),
            jaxopt.prox.prox_lasso,
            stepsize=step_of(problem),
            tol=RTOL * start_norm(problem),
            maxiter=20_000,
            implicit_diff_solve=partial(jaxopt.linear_solve.solve_normal_cg, tol=RTOL),  # its own tolerance is 1e-6
        )
        zero = jnp.zeros(problem.n)
        return compiled(problem, lambda t, b: solver.run(zero, t, (t, b)).params)

    def osqp(problem: Problem) -> Call:
        # with the default tolerance of this solve gradients are off by 1e-2
        solve_linear = partial(jaxopt.linear_solve.solve_normal_cg, tol=1e-12, maxiter=20_000)
        settings = {"eq_qp_solve": "lu", "implicit_diff_solve": solve_linear}
        solver = jaxopt.OSQP(tol=RTOL, maxiter=20_000, **settings)
        if problem.kind == "qp":

            def solve(Q: Any, p: Any, A: Any, b: Any, G: Any, h: Any) -> Any:
                return solver.run(None, (Q, p), (A, b), (G, h)).params.primal

            return compiled(problem, solve)
        D, y = (jnp.asarray(t.numpy()) for t in problem.constants)
        eye, ones, n = jnp.eye(problem.n), jnp.ones(problem.n), problem.n

        def machine(log_c: Any, log_gamma: Any) -> Any:
            Q = (jnp.exp(-jnp.exp(log_gamma) * D) + 0.1 * eye) * jnp.outer(y, y)
            h = jnp.concatenate([jnp.zeros(n), jnp.exp(log_c) * ones])
            rows = jnp.concatenate([-eye, eye])
            return solver.run(None, (Q, -ones), (y[None], jnp.zeros(1)), (rows, h)).params.primal

        return compiled(problem, machine)

    makers: Makers = {f"{k}: JAXopt LBFGS": lbfgs for k in ("ridge", "logistic")}
    makers |= {"lasso: JAXopt ProximalGradient": proximal}
    return makers | {f"{k}: JAXopt OSQP": osqp for k in ("svm", "qp")}


def optimistix_makers() -> Makers:
    jax = start_jax()
    import jax.numpy as jnp
    import lineax
    import optimistix

    adjoint = optimistix.ImplicitAdjoint(linear_solver=lineax.Cholesky())
    tags = frozenset({lineax.symmetric_tag, lineax.positive_semidefinite_tag})

    def layer(problem: Problem, find: Any, function: Any, solver: Any, max_steps: int) -> Call:
        zero = jnp.zeros(problem.n)
        settings = {"max_steps": max_steps, "adjoint": adjoint, "tags": tags}
        of_x = lambda x, theta: function(x, *theta)  # noqa: E731
        return compiled(problem, lambda *theta: find(of_x, solver, zero, theta, **settings).value)

    def newton(problem: Problem) -> Call:
        solver = optimistix.Newton(rtol=1e-8, atol=1e-8, linear_solver=lineax.Cholesky())
        return layer(problem, optimistix.root_find, jax.grad(objective_of(problem)), solver, max_steps=100)

    def bfgs(problem: Problem) -> Call:
        solver = optimistix.BFGS(rtol=RTOL, atol=RTOL)
        return layer(problem, optimistix.minimise, objective_of(problem), solver, max_steps=2000)

    makers: Makers = {f"{k}: Optimistix Newton": newton for k in ("ridge", "logistic")}
    return makers | {f"{k}: Optimistix BFGS": bfgs for k in ("ridge", "logistic")}
