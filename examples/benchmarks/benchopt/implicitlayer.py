"""il.bilevel as a solver of benchopt's suite for bilevel problems, https://github.com/benchopt/benchmark_bilevel.

    cp examples/benchmarks/benchopt/implicitlayer.py <suite>/solvers/
    benchopt run <suite> -s implicitlayer -d simulated

The suite's functions are written in JAX. The layer differentiates its objective twice, so a function of JAX becomes
three autograd Functions of torch: value, gradient and Hessian product, each the derivative of the one before.
"""

from benchopt import BaseSolver, safe_import_context
from benchopt.stopping_criterion import SufficientProgressCriterion

with safe_import_context() as import_ctx:
    from functools import partial

    import jax
    import numpy as np
    import torch
    from benchmark_utils import constants
    from jax.flatten_util import ravel_pytree

    import implicitlayer as il


class Solver(BaseSolver):
    """Hypergradients with an error estimate: both inner solves are as accurate as the outer step needs them."""

    name = "implicitlayer"
    requirements = ["pip::implicitlayer", "pip::torch"]  # noqa: RUF012 (as benchopt wants it)
    stopping_criterion = SufficientProgressCriterion(patience=constants.PATIENCE, strategy="callback")
    parameters = {"step_size_outer": [1.0]}  # noqa: RUF012

    @staticmethod
    def get_next(stop_val):
        return stop_val + 1

    def set_objective(self, f_inner, f_outer, n_inner_samples, n_outer_samples, inner_var0, outer_var0):
        z, self.inner_tree = ravel_pytree(inner_var0)
        x, self.outer_tree = ravel_pytree(outer_var0)
        self.start = as_torch(z), as_torch(x)
        inner, outer = (
            in_torch(lambda z, x, f=f: f(self.inner_tree(z), self.outer_tree(x)))
            for f in (
                partial(f_inner, start=0, batch_size=n_inner_samples),
                partial(f_outer, start=0, batch_size=n_outer_samples),
            )
        )
        self.layer, self.outer = il.argmin(inner, il.solvers.LBFGS()), outer
        self.run_once(2)  # compiles

    def run(self, callback):
        self.z, self.x = self.start

        def outer(z, x):
            self.z = z.detach()
            return self.outer(z, x)

        def look(iteration):
            self.x = iteration.x
            if not callback():
                raise EnoughError

        optimizer = partial(torch.optim.SGD, lr=self.step_size_outer)
        try:
            settings = {"init": self.start[0], "optimizer": optimizer, "max_steps": 10**6, "rtol": 1e-6}
            result = il.bilevel(outer, self.layer, self.start[1], callback=look, **settings)
        except EnoughError:
            return
        self.z, self.x = result.x, result.theta
        while callback():
            pass  # it is as small as asked for: nothing changes any more

    def get_result(self):
        return {"inner_var": self.inner_tree(as_jax(self.z)), "outer_var": self.outer_tree(as_jax(self.x))}


class EnoughError(Exception):
    """Benchopt has seen enough."""


def as_torch(array):
    return torch.from_numpy(np.array(array))


def as_jax(tensor):
    return jax.dlpack.from_dlpack(tensor.detach().contiguous())


def in_torch(function):
    """A function of JAX of two vectors for torch, twice differentiable."""
    value, gradient = jax.jit(function), jax.jit(jax.grad(function, argnums=(0, 1)))
    # H (u, v); the Hessian is symmetric, so this is both its product and the transposed one
    product = jax.jit(lambda z, x, u, v: jax.jvp(gradient, (z, x), (u, v))[1])

    class Kept(torch.autograd.Function):
        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

    class Product(Kept):
        @staticmethod
        def forward(z, x, u, v):
            return tuple(map(as_torch, product(*map(as_jax, (z, x, u, v)))))

    class Gradient(Kept):
        @staticmethod
        def forward(z, x):
            return tuple(map(as_torch, gradient(as_jax(z), as_jax(x))))

        @staticmethod
        def backward(ctx, u, v):
            return Product.apply(*ctx.saved_tensors, u, v)

    class Value(Kept):
        @staticmethod
        def forward(z, x):
            return as_torch(value(as_jax(z), as_jax(x)))

        @staticmethod
        def backward(ctx, cotangent):
            return tuple(cotangent * part for part in Gradient.apply(*ctx.saved_tensors))

    return Value.apply
