"""Hypothesis strategies: they draw small integers and build everything from them, so failures shrink and print well."""

# A failing example is printed as the call that makes it, such as `spd_matrix(n=2, log10_cond=1, ..., seed=0)`: paste
# it into a test of its own. Sizes shrink to 1, exponents to 0, seeds to 0.

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument

from implicitlayer.testing import _arrays as arrays
from implicitlayer.testing import _families as families
from implicitlayer.testing._families import ArgminProblem, RootProblem

T = TypeVar("T")
F64 = torch.float64
Ints = int | st.SearchStrategy[int]
Numbers = float | st.SearchStrategy[int] | st.SearchStrategy[float]
Dtypes = torch.dtype | st.SearchStrategy[torch.dtype]

SIZES = st.integers(1, 12)
SMALL_SIZES = st.integers(1, 6)
CONDITIONS = st.integers(0, 6)
MILD_CONDITIONS = st.integers(0, 3)
SEEDS = st.integers(0, 9999)


def spd_matrices(
    *, n: Ints = SIZES, log10_cond: Numbers = CONDITIONS, log10_scale: Numbers = 0, dtype: Dtypes = F64
) -> st.SearchStrategy[torch.Tensor]:
    """Strategy of symmetric positive definite matrices with a known spectrum, see :func:`spd_matrix`.

    Each argument is a value or a strategy of values; one outside its range is hypothesis's InvalidArgument at once.

    Args:
        n: sizes, at least 1; default 1 to 12.
        log10_cond: logarithms of the condition number, from 0 to 20; default 0 to 6.
        log10_scale: logarithms of the largest eigenvalue, within 200 of zero (float64) or 25 (float32).
        dtype: float32 or float64.

    Example:
        >>> import torch, implicitlayer as il
        >>> from hypothesis import given, strategies as st
        >>> @given(il.testing.spd_matrices(n=st.integers(1, 5), log10_cond=2))
        ... def eigenvalues_are_positive(matrix):
        ...     assert torch.linalg.eigvalsh(matrix).min() > 0
        >>> eigenvalues_are_positive()
    """
    return _square(arrays.spd_matrix, n, log10_cond, log10_scale, dtype)


def indefinite_matrices(
    *, n: Ints = SIZES, log10_cond: Numbers = CONDITIONS, log10_scale: Numbers = 0, dtype: Dtypes = F64
) -> st.SearchStrategy[torch.Tensor]:
    """Strategy of :func:`indefinite_matrix`, symmetric with eigenvalues of both signs, as :func:`spd_matrices`."""
    return _square(arrays.indefinite_matrix, n, log10_cond, log10_scale, dtype)


def general_matrices(
    *, n: Ints = SIZES, log10_cond: Numbers = CONDITIONS, log10_scale: Numbers = 0, dtype: Dtypes = F64
) -> st.SearchStrategy[torch.Tensor]:
    """Strategy of :func:`general_matrix`, matrices that are not symmetric, as :func:`spd_matrices`."""
    return _square(arrays.general_matrix, n, log10_cond, log10_scale, dtype)


def singular_matrices(
    rank: Ints | None = None,
    *,
    n: Ints | None = None,
    kind: str | st.SearchStrategy[str] = "symmetric",
    log10_scale: Numbers = 0,
    dtype: Dtypes = F64,
) -> st.SearchStrategy[torch.Tensor]:
    """Strategy of :func:`singular_matrix`, of deficient rank; of drawn pairs, those with a rank below n are kept.

    Args:
        rank: ranks, at least 0; default any below n.
        n: sizes, above the rank; default up to 12 more than the rank.
        kind: ``"positive semidefinite"``, ``"symmetric"`` or ``"general"``.
        log10_scale, dtype: as in :func:`spd_matrices`.
    """
    ranks = st.integers(0, 11) if rank is None else as_strategy(rank, arrays.check_rank)
    if isinstance(rank, int) and isinstance(n, int):
        checked(lambda value: arrays.check_rank(value, n), rank)
    sizes = None if n is None else as_strategy(n, arrays.check_size)
    kinds = as_strategy(kind, lambda value: arrays.check_one_of("kind", value, arrays.SINGULAR_KINDS))
    scales, dtypes = _scales_and_dtypes(log10_scale, dtype)

    def of_rank(rank: int) -> st.SearchStrategy[torch.Tensor]:
        larger = st.integers(rank + 1, rank + 12) if sizes is None else sizes.filter(lambda n: n > rank)
        size_and_kind = {"kind": kinds, "log10_scale": scales, "seed": SEEDS, "dtype": dtypes}
        return st.builds(arrays.singular_matrix, larger, st.just(rank), **size_and_kind)

    if isinstance(n, int):  # no filter, so that n = 1 finds its only rank at once
        ranks = st.integers(0, n - 1) if rank is None else ranks.filter(lambda rank: rank < n)
    return ranks.flatmap(of_rank)


def quadratic_problems(
    *, n: Ints = SMALL_SIZES, log10_cond: Numbers = CONDITIONS, log10_scale: Numbers = 0, dtype: Dtypes = F64
) -> st.SearchStrategy[ArgminProblem]:
    """Strategy of strongly convex quadratics with theta = (A, b), see :func:`quadratic_problem`.

    Arguments as in :func:`spd_matrices`, with sizes from 1 to 6; the scale is that of the objective.
    """
    return _square(families.quadratic_problem, n, log10_cond, log10_scale, dtype)


def smooth_convex_problems(
    *, n: Ints = SMALL_SIZES, log10_cond: Numbers = MILD_CONDITIONS, log10_scale: Numbers = 0, dtype: Dtypes = F64
) -> st.SearchStrategy[ArgminProblem]:
    """Strategy of :func:`smooth_convex_problem`, softplus losses, theta = (W, o, s), as :func:`quadratic_problems`."""
    return _square(families.smooth_convex_problem, n, log10_cond, log10_scale, dtype)


def nonconvex_problems(
    *, n: Ints = SMALL_SIZES, log10_cond: Numbers = MILD_CONDITIONS, log10_scale: Numbers = 0, dtype: Dtypes = F64
) -> st.SearchStrategy[ArgminProblem]:
    """Strategy of :func:`nonconvex_problem`, tilted wells, theta = (M, d, t), as :func:`quadratic_problems`."""
    return _square(families.nonconvex_problem, n, log10_cond, log10_scale, dtype)


def root_problems(
    *, n: Ints = SMALL_SIZES, log10_cond: Numbers = MILD_CONDITIONS, log10_scale: Numbers = 0, dtype: Dtypes = F64
) -> st.SearchStrategy[RootProblem]:
    """Strategy of :func:`root_problem`, residuals, theta = (A, b, s), as :func:`quadratic_problems`."""
    return _square(families.root_problem, n, log10_cond, log10_scale, dtype)


def _square(
    build: Callable[..., T], n: Ints, log10_cond: Numbers, log10_scale: Numbers, dtype: Dtypes
) -> st.SearchStrategy[T]:
    """The strategy of what ``build(n=, log10_cond=, log10_scale=, seed=, dtype=)`` returns, arguments checked now."""
    sizes, conditions = as_strategy(n, arrays.check_size), as_strategy(log10_cond, arrays.check_log10_cond)
    scales, dtypes = _scales_and_dtypes(log10_scale, dtype)
    return st.builds(build, n=sizes, log10_cond=conditions, log10_scale=scales, seed=SEEDS, dtype=dtypes)


def _scales_and_dtypes(log10_scale: Numbers, dtype: Dtypes) -> tuple[st.SearchStrategy[Any], st.SearchStrategy[Any]]:
    dtypes = as_strategy(dtype, arrays.check_dtype)
    known = dtype if isinstance(dtype, torch.dtype) else None
    return as_strategy(log10_scale, lambda value: arrays.check_log10_scale(value, known)), dtypes


def as_strategy(value: Any, check: Callable[[Any], None]) -> st.SearchStrategy[Any]:
    """A strategy as it is; a plain value as the strategy of this value, checked when the strategy is made."""
    if isinstance(value, st.SearchStrategy):
        return value
    checked(check, value)
    return st.just(value)


def checked(check: Callable[[Any], None], value: Any) -> None:
    try:
        check(value)
    except ValueError as error:
        raise InvalidArgument(str(error)) from None
