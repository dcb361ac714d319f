"""The theory of implicit MAML in numbers: each claim is computed, compared with what is measured, and asserted.

    python examples/theory.py [--smoke] [--json FILE] [--figure FILE]

Claims of Rajeswaran, Finn, Kakade, Levine 2019 (arXiv:1909.04630), on inner problems whose constants are known exactly:

(a) Lemma 3: with phi off by delta and the linear solve by delta', the meta-gradient is off by at most
    (2 lambda rho B / mu^2 + lambda L / mu) delta + delta'.
(b) Theorem 1: the gradients needed for an error eps grow like sqrt(kappa).
(c) Theorem 1: the memory does not depend on the inner or the CG steps.
(d) Corollary 1: gradient descent on F with meta-gradients that are off by eps reaches a gradient of norm eps.

Prints a table, draws a figure of four panels, and says what does not hold or is looser than hoped.
"""

# d: unknowns, M: tasks; delta, delta' the errors of the inner and of the linear solve.

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from _theory_figure import draw
from _theory_problems import (
    F64,
    Problem,
    aligned_problem,
    fit_exponent,
    ill_conditioned,
    peak_kib,
    random_problem,
    through_the_layer,
)
from _theory_report import caveats, rounded, table
from torch import Tensor
from tqdm import tqdm

import implicitlayer as il


@dataclasses.dataclass(frozen=True)
class Settings:
    """All there is to set."""

    seed: int = 0
    # (a)
    num_problems: int = 20  # drawn at random, besides the one made to be as bad as the lemma allows
    num_unknowns: int = 20
    deltas: Sequence[float] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 0.9)  # in units of mu / (2 rho), the lemma's limit
    delta_primes: Sequence[float] = (0.0, 0.1, 1.0, 10.0)  # in units of the part of the bound that delta makes
    inner_rtols: Sequence[float] = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
    cg_steps: Sequence[int] = (1, 2, 4, 8, 16)
    # (b)
    num_eigenvalues: int = 6000  # more than CG makes steps, so that it cannot end by running out of eigenvalues
    few_eigenvalues: int = 50  # where it does
    conditions: Sequence[float] = (1e1, 1e2, 1e3, 1e4, 1e5, 1e6)
    plain_conditions: Sequence[float] = (1e1, 1e2, 1e3, 1e4)  # for gradient descent, as far as it is affordable
    accuracy: float = 1e-3  # eps, relative to the norm of the meta-gradient
    # (c)
    inner_steps: Sequence[int] = (1, 3, 10, 30, 100, 300, 1000)
    memory_cg_steps: Sequence[int] = (1, 5, 20, 50)
    # (d)
    num_tasks: int = 5
    outer_steps: int = 400
    outer_accuracies: Sequence[float] = (1e-1, 1e-2, 1e-3)


SMOKE = Settings(
    num_problems=2,
    deltas=(1e-3, 0.9),
    inner_rtols=(1e-1, 1e-3),
    cg_steps=(1, 8),
    num_eigenvalues=600,
    conditions=(1e1, 1e2, 1e3, 1e4),
    plain_conditions=(1e1, 1e2, 1e3),
    inner_steps=(1, 10, 100),
    memory_cg_steps=(1, 50),
    outer_steps=150,
    outer_accuracies=(1e-1, 1e-2),
)


# ------------------------------------------------------------------------------------------------------ (a) Lemma 3


def lemma_3(s: Settings, progress: tqdm) -> dict[str, Any]:
    """phi exactly delta away, g exactly delta' away, in the worst of several directions; then real solvers."""
    generator = torch.Generator().manual_seed(s.seed)
    d = s.num_unknowns
    problems = [
        (random_problem(d, generator), torch.randn(d, dtype=F64, generator=generator)) for _ in range(s.num_problems)
    ]
    problems.append(aligned_problem(d, generator))
    rows, natural = [], []
    for number, (p, theta) in enumerate(problems):
        phi, exact = p.solution(theta), p.meta_gradient(p.solution(theta))
        assert p.basis is not None
        # In the basis U the Jacobian of the meta-gradient in phi is diagonal: to first order the worst directions
        # are among +-u_i; some random ones beside them.
        others = torch.nn.functional.normalize(torch.randn(10, d, dtype=F64, generator=generator), dim=1)
        directions = torch.cat([p.basis.T, -p.basis.T, others])
        for fraction in s.deltas:
            delta = fraction * p.mu / (2 * p.rho)
            shifted = phi + delta * directions
            gradients, _, _ = through_the_layer(
                p, theta.expand_as(shifted), lambda f, x, t, at=shifted: at, il.ConjugateGradient(rtol=1e-13)
            )
            errors = (gradients - exact).norm(dim=1)
            worst = gradients[errors.argmax()] - exact
            slope = p.lemma_3(p.outer_gradient_bound(phi, delta))
            sharper = p.lemma_3(p.outer_gradient_bound(phi, delta), factor=1)
            for share in s.delta_primes:
                delta_prime = share * slope * delta
                # the worst error of the linear solve points the way of the error that is there already
                error = float((worst + delta_prime * worst / worst.norm()).norm())
                row = {"kind": "aligned" if number == s.num_problems else "random", "share": share, "error": error}
                bounds = {"bound": slope * delta + delta_prime, "sharper": sharper * delta + delta_prime}
                rows.append({**row, **bounds, "delta": delta, "delta_prime": delta_prime})
        if number < s.num_problems:
            natural += errors_as_they_arise(s, p, theta)
        progress.update()
    for row in [*rows, *natural]:
        # never above, not even without the factor 2; 1e-7: the solve of rtol 1e-13 against the smallest error
        assert row["error"] <= row["sharper"] * (1 + 1e-7), row
    return {"grid": rows, "natural": natural}


def errors_as_they_arise(s: Settings, p: Problem, theta: Tensor) -> list[dict[str, float]]:
    """An inner solver stopped early and CG cut short; delta and delta' bounded by what a user can compute.

    delta <= ||grad G|| / mu (strong convexity) and delta' <= lambda ||r|| / mu, with r the residual of
    (I + H/lambda) g = v, which is the residual v - (lambda + H) u of the library's system, u = g / lambda.
    """
    phi_exact = p.solution(theta)
    exact, rows = p.meta_gradient(phi_exact), []
    for rtol in s.inner_rtols:
        inner = il.solvers.AcceleratedGradient(p.beta, strong_convexity=p.mu, rtol=rtol, max_steps=10_000)
        for steps in s.cg_steps:
            gradient, phi, records = through_the_layer(p, theta, inner, il.ConjugateGradient(max_steps=steps))
            delta = float(records[0].stationarity_norm) / p.mu
            delta_prime = p.strength * float(records[1].solution.residual_norm) / p.mu
            true_delta, at_phi = float((phi - phi_exact).norm()), p.meta_gradient(phi)
            true_delta_prime = float((gradient - at_phi).norm())
            # 1e-9: rounding of residuals that a recursion carries
            assert true_delta <= delta * (1 + 1e-9) and true_delta_prime <= delta_prime * (1 + 1e-9) + 1e-13
            outer_bound = p.outer_gradient_bound(phi, 2 * delta)  # phi* is within delta, its ball within 2 delta
            row = {"error": float((gradient - exact).norm()), "bound": p.lemma_3(outer_bound) * delta + delta_prime}
            row["sharper"] = p.lemma_3(outer_bound, factor=1) * delta + delta_prime
            rows.append({**row, "within_limit": delta < p.mu / (2 * p.rho)})
    return rows


# --------------------------------------------------------------------------------------------- (b) gradients for eps


def gradients_for_accuracy(s: Settings, progress: tqdm) -> dict[str, Any]:
    """Inner gradients plus twice the Hessian-vector products, until Lemma 3 certifies eps; eps/2 for each part."""
    counts: dict[str, list[dict[str, float]]] = {"accelerated": [], "restarts": [], "plain": [], "few eigenvalues": []}
    for kappa in s.conditions:
        methods = ["accelerated", "restarts"] + ["plain"] * (kappa in s.plain_conditions)
        for name, row in count_gradients(s, kappa, s.num_eigenvalues, methods).items():
            counts[name].append(row)
        counts["few eigenvalues"].append(count_gradients(s, kappa, s.few_eigenvalues, ["accelerated"])["accelerated"])
        progress.update()
    exponents = {
        f"{name} {what}": fit_exponent([row["kappa"] for row in rows], [row[what] for row in rows])
        for name, rows in counts.items()
        for what in ("gradients", "inner", "products")
    }
    for name in ("accelerated gradients", "accelerated inner", "accelerated products", "restarts gradients"):
        assert 0.4 <= exponents[name][0] <= 0.6, exponents
    assert 0.85 <= exponents["plain inner"][0] <= 1.15, exponents
    return {"counts": counts, "exponents": exponents, "accuracy": s.accuracy}


def count_gradients(s: Settings, kappa: float, num_eigenvalues: int, methods: Sequence[str]) -> dict[str, Any]:
    """One row for each method, on the same problem."""
    p, theta = ill_conditioned(kappa, num_eigenvalues, torch.Generator().manual_seed(s.seed))
    phi = p.solution(theta)
    exact = p.meta_gradient(phi)
    eps = s.accuracy * float(exact.norm())
    delta = eps / 2 / p.lemma_3(p.outer_gradient_bound(phi, 0.1))
    assert delta < 0.1 and delta < p.mu / (2 * p.rho)
    limits: dict[str, Any] = {"atol": p.mu * delta, "max_steps": 10**6}
    solvers = {
        "accelerated": il.solvers.AcceleratedGradient(p.beta, strong_convexity=p.mu, **limits),
        "restarts": il.solvers.AcceleratedGradient(p.beta, **limits),
        "plain": il.solvers.GradientDescent(2 / (p.mu + p.beta), **limits),
    }
    # ||g - (I + H/lambda)^-1 v|| <= lambda ||r|| / mu, to be eps/2
    linear_solver = il.ConjugateGradient(rtol=0.0, atol=p.mu * eps / 2 / p.strength, max_steps=10**6)
    rows = {}
    for name in methods:
        gradient, _, (forward, backward) = through_the_layer(p, theta, solvers[name], linear_solver)
        error = float((gradient - exact).norm())
        assert forward.solver_status.ok and backward.status.ok and error <= eps, (name, kappa, error, eps)
        inner, products = forward.num_steps + 1, backward.solution.num_steps
        gradients = inner + 2 * products
        rows[name] = {"kappa": kappa, "num_eigenvalues": num_eigenvalues, "inner": inner, "products": products}
        rows[name] |= {"gradients": gradients, "error": error / eps}
    if "accelerated" in methods:
        # Lemma 2 for a gradient of mu delta where it speaks of a distance delta: that is at most delta / kappa, and the
        # extrapolated point y = x + m (x - x_old), where the gradient is taken, at most three times as far as the x
        distance = float((phi - theta).norm())
        assert rows["accelerated"]["inner"] <= 2 * kappa**0.5 * math.log(2 * kappa * distance / (delta / 3 / kappa))
    return rows


# -------------------------------------------------------------------------------------------------------- (c) memory


def memory(s: Settings, progress: tqdm) -> dict[str, Any]:
    """Logistic regression, 8000 points in 60 dimensions, one task; back-propagated MAML takes as many inner steps."""
    generator = torch.Generator().manual_seed(s.seed)
    scales = torch.logspace(0, -2, 60, dtype=F64)  # so that 50 CG steps are not yet the end
    x = torch.randn(1, 8000, 60, dtype=F64, generator=generator) * scales
    batch = (x, (torch.rand(1, 8000, generator=generator) < 0.5).to(F64))
    theta = torch.zeros(60, dtype=F64, requires_grad=True)

    def task_loss(phi: Tensor, batch: Any) -> Tensor:
        logits = (batch[0] @ phi.unsqueeze(-1)).squeeze(-1)
        return torch.nn.functional.softplus(logits).sum(-1) - (batch[1] * logits).sum(-1)

    lam = 1e-2
    beta = lam + float(torch.linalg.matrix_norm(x[0], 2)) ** 2 / 4

    def implicit(inner_steps: int, cg_steps: int) -> Callable[[], Any]:
        solver = il.solvers.AcceleratedGradient(beta, strong_convexity=lam, max_steps=inner_steps)
        method = il.meta.iMAML(task_loss, solver, strength=lam, linear_solver=il.ConjugateGradient(max_steps=cg_steps))
        return lambda: torch.autograd.grad(method(theta, batch, batch).mean(), theta)

    def unrolled(inner_steps: int) -> Callable[[], Any]:
        method = il.meta.MAML(task_loss, step_size=1 / beta, num_steps=inner_steps, strength=lam)
        return lambda: torch.autograd.grad(method(theta, batch, batch).mean(), theta)

    by_inner, by_cg, by_maml = {}, {}, {}
    for steps in s.inner_steps:
        by_inner[steps] = peak_kib(implicit(steps, 5))
        by_maml[steps] = peak_kib(unrolled(steps))
        progress.update()
    for steps in s.memory_cg_steps:
        with il.diagnostics() as records:
            by_cg[steps] = peak_kib(implicit(10, steps))
        assert records[-1].solution.num_steps == steps  # all of them were made
    one = peak_kib(lambda: torch.autograd.grad(task_loss(theta[None], batch).sum(), theta))

    def hessian_vector_product() -> Any:
        phi = theta[None]
        (gradient,) = torch.autograd.grad(task_loss(phi, batch).sum(), phi, create_graph=True)
        return torch.autograd.grad(gradient, phi, torch.ones_like(phi))

    product = peak_kib(hessian_vector_product)
    everything = [*by_inner.values(), *by_cg.values()]
    assert max(everything) <= 1.05 * product, (everything, product)
    assert max(everything) <= 1.01 * min(everything), everything
    # back-propagation keeps the same for every step: the last interval costs as much per step as all together
    first, *_, before, last = s.inner_steps
    slope = (by_maml[last] - by_maml[first]) / (last - first)
    assert abs((by_maml[last] - by_maml[before]) / (last - before) / slope - 1) < 0.01, by_maml
    return {
        "implicit": by_inner,
        "implicit, CG": by_cg,
        "back-propagated": by_maml,
        "one gradient": one,
        "one product": product,
    }


# --------------------------------------------------------------------------------------------------- (d) Corollary 1

# F(theta) = mean_i L_i(phi_i*(theta)). phi* is lambda/mu-Lipschitz in theta, and the argument of Lemma 3 without its
# factor 2 (mu holds everywhere) makes grad F Lipschitz with l_F = (lambda rho B / mu^2 + lambda L / mu) lambda / mu.
# For a step 1/l_F along g = grad F + e:  F(new) <= F - (||grad F||^2 - ||e||^2) / (2 l_F).
# With ||e|| <= eps/2, F falls while ||grad F|| > eps, by at least 3 eps^2 / (8 l_F) each step. As F falls, no outer
# loss exceeds M F(theta_0), so that B = sqrt(2 ell M F(theta_0)) holds all the way.


def outer_descent(s: Settings, progress: tqdm) -> dict[str, Any]:
    """Gradient descent on F, with the layer's errors and with the worst that are allowed."""
    generator = torch.Generator().manual_seed(s.seed)
    num_tasks, d = s.num_tasks, 10
    shift, target = (torch.randn(num_tasks, d, dtype=F64, generator=generator) for _ in range(2))
    p = Problem(
        torch.logspace(-1, 1, d, dtype=F64) - 0.1, torch.full((d,), 2.0, dtype=F64), shift, target, strength=2.0
    )
    start = torch.full((d,), 3.0, dtype=F64)

    def exact(theta: Tensor) -> tuple[float, Tensor]:
        phi = p.solution(theta)
        return float(p.outer(phi).mean()), p.meta_gradient(phi).mean(0)

    first_value = exact(start)[0]
    bound = math.sqrt(2 * p.outer_smoothness * num_tasks * first_value)
    slope = p.lemma_3(bound + p.outer_smoothness * 0.1)  # on balls of radius 0.1, far more than any delta below
    lipschitz = (p.strength * p.rho * bound / p.mu**2 + p.strength * p.outer_smoothness / p.mu) * p.strength / p.mu
    runs = []
    for eps in s.outer_accuracies:
        delta = eps / 4 / slope
        assert delta < 0.1
        inner = il.solvers.AcceleratedGradient(p.beta, strong_convexity=p.mu, atol=p.mu * delta, max_steps=10_000)
        linear_solver = il.ConjugateGradient(rtol=0.0, atol=p.mu * eps / 4 / p.strength)
        for adversary in (False, True):
            theta, values, norms, errors = start, [], [], []
            for _ in range(s.outer_steps):
                value, gradient = exact(theta)
                values.append(value)
                norms.append(float(gradient.norm()))
                if adversary:  # the worst error that is allowed, against the gradient
                    g = gradient - eps / 2 * gradient / gradient.norm()
                else:
                    g = through_the_layer(p, theta.expand(num_tasks, d), inner, linear_solver)[0].mean(0)
                errors.append(float((g - gradient).norm()))
                theta = theta - g / lipschitz
            progress.update()
            reached = next(k for k, norm in enumerate(norms) if norm <= eps)
            budget = math.ceil(8 * lipschitz * first_value / (3 * eps**2))
            assert max(errors) <= eps / 2 * (1 + 1e-9) and reached <= budget and max(norms[reached:]) <= eps
            assert all(values[k + 1] < values[k] for k in range(reached)), "F must fall until the gradient is eps"
            run = {"eps": eps, "adversary": adversary, "reached": reached, "budget": budget, "floor": min(norms)}
            runs.append({**run, "largest_error": max(errors), "first_value": values[0], "norms": norms})
    return {"runs": runs, "lipschitz": lipschitz}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="small settings: seconds")
    parser.add_argument("--json", type=Path, default=Path("runs/theory/results.json"), help="where the numbers go")
    parser.add_argument("--figure", type=Path, default=Path("runs/theory/theory.png"), help="where the picture goes")
    options = parser.parse_args(argv)
    s = SMOKE if options.smoke else Settings()
    torch.set_num_threads(1)  # all tensors are small
    parts = {"lemma_3": lemma_3, "gradients": gradients_for_accuracy, "memory": memory, "outer": outer_descent}
    ticks = s.num_problems + 1 + len(s.conditions) + len(s.inner_steps) + 2 * len(s.outer_accuracies)
    results: dict[str, Any] = {}
    start = time.perf_counter()
    with tqdm(total=ticks, bar_format="{desc:18} {percentage:3.0f}% |{bar:40}| {elapsed}") as progress:
        for name, part in parts.items():
            progress.set_description(name.replace("_", " "))
            results[name] = part(s, progress)
    lines, remarks = table(results, s), caveats(results)
    print("\n".join(lines))
    print("\nWhat does not hold, or is looser than hoped:\n" + "\n".join(f"* {remark}" for remark in remarks))

    for path in (options.json, options.figure):
        path.parent.mkdir(parents=True, exist_ok=True)
    draw(results, options.figure)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "implicitlayer": il.__version__}
    about = {**versions, "machine": platform.machine(), "smoke": options.smoke, "settings": dataclasses.asdict(s)}
    for run in results["outer"]["runs"]:
        del run["norms"]  # they are in the picture
    del results["lemma_3"]
    options.json.write_text(
        json.dumps(rounded({"about": about, "table": lines, "remarks": remarks, **results}), indent=1) + "\n"
    )
    print(f"\n{time.perf_counter() - start:.0f} s; numbers in {options.json}, picture in {options.figure}")


if __name__ == "__main__":
    main()
