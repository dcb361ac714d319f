"""Tensors made from small integers: size, exponents and seed name a matrix, and make it again."""

# n: unknowns. Everything is computed in float64 and rounded once, at the end, to the dtype asked for.
# Messages: argument, value, rule, remedy; the same rules hold for the strategies that draw the arguments.

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from numbers import Real
from typing import Any

import torch

from implicitlayer.base._types import check_one_of

# A scale up to here leaves room for conditions up to 1e20 below it and for products of a few factors above.
MAX_LOG10_SCALE = {torch.float64: 200, torch.float32: 25}
SINGULAR_KINDS = ("positive semidefinite", "symmetric", "general")


def normal_tensor(shape: Sequence[int], *, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """A CPU tensor of independent standard normal numbers, the same for the same arguments (float32: rounded)."""
    check_seed(seed)
    check_dtype(dtype)
    return _randn(tuple(shape), seed).to(dtype)


def spd_matrix(
    n: int, *, log10_cond: float = 0, log10_scale: float = 0, seed: int = 0, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """An exactly symmetric positive definite matrix [n, n] with a known spectrum.

    The eigenvalues are spread log-uniformly over ``10^log10_scale [10^-log10_cond, 1]``, both ends taken where n > 1;
    the eigenvectors are random. Beyond a condition of about ``1 / (n eps)`` rounding decides the smallest ones.

    Args:
        n: size, at least 1.
        log10_cond: logarithm of the condition number, from 0 to 20.
        log10_scale: logarithm of the largest eigenvalue, within 200 of zero (float64) or 25 (float32).
        seed: at least 0.
        dtype: float32 or float64.

    Raises:
        ValueError: an argument outside its range.

    Example:
        >>> import torch, implicitlayer as il
        >>> values = torch.linalg.eigvalsh(il.testing.spd_matrix(5, log10_cond=3, log10_scale=2, seed=1))
        >>> bool(torch.allclose(values[[0, -1]], torch.tensor([0.1, 100.0]).double(), rtol=1e-9))
        True
    """
    check_matrix(n, log10_cond, log10_scale, seed, dtype)
    return _from_spectrum(_magnitudes(n, log10_cond, seed), log10_scale, seed, dtype)


def indefinite_matrix(
    n: int, *, log10_cond: float = 0, log10_scale: float = 0, seed: int = 0, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """A symmetric, nonsingular matrix that is not positive definite; arguments as in :func:`spd_matrix`.

    Its eigenvalues have those magnitudes and random signs: the largest is negative, the smallest positive where n > 1.
    """
    check_matrix(n, log10_cond, log10_scale, seed, dtype)
    return _from_spectrum(_magnitudes(n, log10_cond, seed) * _signs(n, seed), log10_scale, seed, dtype)


def general_matrix(
    n: int, *, log10_cond: float = 0, log10_scale: float = 0, seed: int = 0, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """A nonsingular matrix, not symmetric where n > 1; arguments as in :func:`spd_matrix`.

    Its singular values are the eigenvalues there, with independent random singular vectors on both sides.
    """
    check_matrix(n, log10_cond, log10_scale, seed, dtype)
    return _from_singular_values(_magnitudes(n, log10_cond, seed), log10_scale, seed, dtype)


def singular_matrix(
    n: int,
    rank: int,
    *,
    kind: str = "symmetric",
    log10_scale: float = 0,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """A matrix [n, n] of deficient rank, up to rounding. Its nonzero singular values are 0.1 to 1 times the scale.

    Args:
        n, log10_scale, seed, dtype: as in :func:`spd_matrix`.
        rank: from 0 to n - 1.
        kind: ``"positive semidefinite"``, ``"symmetric"`` (random signs) or ``"general"`` (range and null space of
            the transpose are other ones).

    Raises:
        ValueError: an argument outside its range.
    """
    check_matrix(n, 0, log10_scale, seed, dtype)
    check_rank(rank, n)
    check_one_of("kind", kind, SINGULAR_KINDS)
    values = 0.1 + 0.9 * torch.rand(n, dtype=torch.float64, generator=_generator(seed))
    values[rank:] = 0
    if kind == "general":
        return _from_singular_values(values, log10_scale, seed, dtype)
    return _from_spectrum(values * _signs(n, seed) if kind == "symmetric" else values, log10_scale, seed, dtype)


def orthogonal(n: int, seed: int) -> torch.Tensor:
    """A random orthogonal matrix [n, n] in float64."""
    basis: torch.Tensor = torch.linalg.qr(_randn((n, n), seed))[0]
    return basis


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _randn(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=_generator(seed))


def _magnitudes(n: int, log10_cond: float, seed: int) -> torch.Tensor:
    exponents = torch.rand(n, dtype=torch.float64, generator=_generator(seed))
    exponents[-1], exponents[0] = 1, 0
    return 10.0 ** (-log10_cond * exponents)


def _signs(n: int, seed: int) -> torch.Tensor:
    signs = _randn((n,), seed + 5).sign()
    signs[-1], signs[0] = 1, -1
    return signs


def _from_spectrum(values: torch.Tensor, log10_scale: float, seed: int, dtype: torch.dtype) -> torch.Tensor:
    basis = orthogonal(len(values), seed + 1)
    matrix = (basis * values) @ basis.T
    return ((matrix + matrix.T) / 2 * ten_to(log10_scale)).to(dtype)


def _from_singular_values(values: torch.Tensor, log10_scale: float, seed: int, dtype: torch.dtype) -> torch.Tensor:
    left, right = (orthogonal(len(values), seed + side) for side in (2, 3))
    return ((left * values) @ right.T * ten_to(log10_scale)).to(dtype)


def ten_to(exponent: float) -> float:
    return float(10.0**exponent)


def check_integer(name: str, value: Any, least: int, remedy: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r} must be an int of at least {least}. {remedy}")


def check_number(name: str, value: Any, low: float, high: float, remedy: str) -> None:
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low <= value <= high:
        raise ValueError(f"{name}={value!r} must be a number from {low} to {high}. {remedy}")


_COUNTS = "It counts the unknowns; pass an int, or a strategy such as st.integers(1, 12)."
_EXPONENT = "It is the exponent: 3 is a condition number of 1000."
check_size = partial(check_integer, "n", least=1, remedy=_COUNTS)
check_seed = partial(check_integer, "seed", least=0, remedy="Any int that torch.Generator.manual_seed takes will do.")
check_log10_cond = partial(check_number, "log10_cond", low=0, high=20, remedy=_EXPONENT)


def check_rank(rank: Any, n: int | None = None) -> None:
    """Refuse what is no rank of a singular matrix of size ``n`` (any size if None)."""
    check_integer("rank", rank, 0, "A zero matrix has rank 0.")
    if n is not None and rank >= n:
        raise ValueError(f"rank={rank} must be below n={n}. For a nonsingular matrix use il.testing.general_matrix.")


def check_dtype(dtype: Any) -> None:
    if dtype not in MAX_LOG10_SCALE:
        raise ValueError(
            f"dtype={dtype!r} must be torch.float32 or torch.float64. Cast what was drawn if you need more."
        )


def check_log10_scale(log10_scale: Any, dtype: torch.dtype | None = None) -> None:
    """Refuse a scale whose products would leave the range of the dtype (of float64 if None)."""
    limit = MAX_LOG10_SCALE[torch.float64 if dtype is None else dtype]
    remedy = f"It is the exponent: -3 is a thousandth; {dtype or torch.float64} overflows or vanishes beyond."
    check_number("log10_scale", log10_scale, -limit, limit, remedy)


def check_matrix(n: Any, log10_cond: Any, log10_scale: Any, seed: Any, dtype: Any) -> None:
    check_size(n)
    check_dtype(dtype)
    check_log10_cond(log10_cond)
    check_log10_scale(log10_scale, dtype)
    check_seed(seed)
