"""Problems whose solution is a formula; the right gradient is autograd's own, of that formula."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

import implicitlayer as il
from implicitlayer import testing
from tests.thorough._family import DrawnFamily
from tests.thorough._quadratics import DTYPES, SEEDS
from tests.thorough._reference import F64, Tensor
from tests.thorough._trial import Trial


@dataclass(frozen=True)
class Form:
    """``function(x, *theta)`` with the solution ``x(*theta)``; ``theta(n, seed)`` makes well-conditioned data."""

    name: str
    kind: str
    function: Callable[..., Tensor]
    x: Callable[..., Tensor]
    theta: Callable[[int, int], list[Tensor]]
    smooth_everywhere: bool = True  # else an iteration from zero may leave the domain


def positive(n: int, seed: int) -> Tensor:
    """Entries between 1/2 and 2: every second derivative below is then between 1/4 and 9."""
    return 2.0 ** torch.tanh(testing.normal_tensor((n,), seed=seed))


def vectors(n: int, seed: int) -> list[Tensor]:
    return [positive(n, seed)]


def rotation(n: int, seed: int) -> Tensor:
    basis: Tensor = torch.linalg.qr(testing.normal_tensor((n, n), seed=seed))[0]
    return basis


def ridge(n: int, seed: int) -> list[Tensor]:
    return [
        testing.general_matrix(n, log10_cond=1, seed=seed),
        testing.normal_tensor((n,), seed=seed + 5),
        positive(1, seed)[0],
    ]


def contraction(n: int, seed: int) -> list[Tensor]:
    return [0.5 * testing.general_matrix(n, log10_cond=1, seed=seed), testing.normal_tensor((n,), seed=seed + 5)]


def probabilities(n: int, seed: int) -> list[Tensor]:
    return [0.5 + 0.4 * torch.tanh(testing.normal_tensor((n,), seed=seed))]


def rotated(n: int, seed: int) -> list[Tensor]:
    return [rotation(n, seed + 1), positive(n, seed)]


FORMS = (
    Form("log t", "argmin", lambda x, t: (x.exp() - t * x).sum(), torch.log, vectors),
    Form("asinh t", "argmin", lambda x, t: (x.cosh() - t * x).sum(), torch.asinh, vectors),
    Form("cube root of t", "argmin", lambda x, t: (x**4 / 4 - t * x).sum(), lambda t: t ** (1 / 3), vectors, False),
    Form("exp t", "argmin", lambda x, t: (x * x.log() - x - t * x).sum(), torch.exp, vectors, False),
    Form("logit t", "argmin", lambda x, t: torch.nn.functional.softplus(x).sum() - t @ x, torch.logit, probabilities),
    # M is a theta like any other: d/dM sum exp(Mx) - s'Mx vanishes at x = M^-1 log s up to (exp(Mx) - s) x' = 0
    Form("M^-1 log s", "argmin", lambda x, m, s: (m @ x).exp().sum() - s @ (m @ x),
         lambda m, s: torch.linalg.solve(m, s.log()), rotated),
    Form("ridge", "argmin", lambda x, a, b, s: ((a @ x - b) ** 2).sum() + s * (x @ x),
         lambda a, b, s: torch.linalg.solve(a.T @ a + s * torch.eye(len(b), dtype=b.dtype), a.T @ b), ridge),
    Form("x^3 + x = t^3 + t", "root", lambda x, t: x**3 + x - t**3 - t, lambda t: 1 * t, vectors),
    Form("x e^x = t e^t", "root", lambda x, t: x * x.exp() - t * t.exp(), lambda t: 1 * t, vectors),
    Form("square root of t", "fixed_point", lambda x, t: 0.5 * (x + t / x), torch.sqrt, vectors, False),
    Form("(I - M)^-1 t", "fixed_point", lambda x, m, t: m @ x + t,
         lambda m, t: torch.linalg.solve(torch.eye(len(t), dtype=t.dtype) - m, t), contraction),
)  # fmt: skip

# The largest relative errors that are promised. Derivation: every matrix here has a condition below 100 and the
# gradient does not cancel, so that default tolerances (1e-10, 1e-5) leave at most 100 * 10 rtol = 1e-7 in float64; in
# float32 (1e-2 by the same rule) the promise is stricter than the rule.
PROMISED = {torch.float64: 1e-7, torch.float32: 1e-4}


def work_closed_form(trial: Trial, form: int, n: int, seed: int, how: int) -> None:
    """Exact solver; a perturbed one with Newton steps after it; a real iteration; float32; under vmap."""
    case = FORMS[form]
    method = ("exact", "float32", "polished", "iterated", "lanes")[how]
    if method == "iterated" and (case.kind != "argmin" or not case.smooth_everywhere):
        method = "exact"
    dtype = DTYPES[method == "float32"]
    trial.kind = "f32" if method == "float32" else "f64"
    theta = [t.to(dtype).requires_grad_() for t in case.theta(n, seed)]

    def solver(f: object, x: Tensor, *theta: Tensor) -> Tensor:
        # an error of 1e-3 becomes 1e-6 and 1e-12 in two Newton steps, 1e-24 in three
        return case.x(*theta) * (1 + 1e-3 * (method == "polished"))

    iterate = il.solvers.AcceleratedGradient(rtol=1e-13, max_steps=4000)
    make = {"argmin": il.argmin, "root": il.root, "fixed_point": il.fixed_point}[case.kind]
    layer = make(case.function, iterate if method == "iterated" else solver, polish=3 * (method == "polished"))
    start = torch.full((n,), 0.0 if case.smooth_everywhere else 1.0, dtype=dtype)
    if method == "lanes":
        stacked = [
            torch.stack([t.detach(), other]).requires_grad_()
            for t, other in zip(theta, case.theta(n, seed + 50), strict=True)
        ]
        v = testing.normal_tensor((2, n), seed=seed + 11)
        got = torch.autograd.grad(torch.func.vmap(lambda *t: layer(start, *t))(*stacked), stacked, v)
        exact = torch.stack([case.x(*[t[lane] for t in stacked]) for lane in range(2)])
        expected = torch.autograd.grad(exact, stacked, v)
    else:
        v = testing.normal_tensor((n,), seed=seed + 11, dtype=dtype)
        got = torch.autograd.grad(layer(start, *theta), theta, v)
        leaves = [t.detach().to(F64).requires_grad_() for t in theta]
        expected = torch.autograd.grad(case.x(*leaves), leaves, v.to(F64))
    trial.look_at(layer.last_record)
    trial.compare(f"{case.name}, {method}", got, expected, PROMISED[dtype])


FAMILIES = [
    DrawnFamily("closed form", "nonlinear problems whose solution is a formula", 700,
                {"form": (0, len(FORMS) - 1), "n": (1, 8), "seed": SEEDS, "how": (0, 4)}, work_closed_form),
]  # fmt: skip
