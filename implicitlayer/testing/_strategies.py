"""Hypothesis strategies: they draw small integers and build everything from them, so failures shrink and print well."""

# A failing example is printed as the call that makes it, such as `spd_matrix(n=2, log10_cond=1, ..., seed=0)`: paste
# it into a test of its own. Sizes shrink to 1, exponents to 0, seeds to 0.

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument

from implicitlayer.base._tree import flatten, unflatten, unravel
from implicitlayer.base._types import check_one_of
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
    kinds = as_strategy(kind, lambda value: check_one_of("kind", value, arrays.SINGULAR_KINDS))
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


# The small shapes first: a failure shrinks towards the front of the list.
SHAPES: tuple[tuple[int, ...], ...] = ((), (1,), (2,), (0,), (2, 3), (1, 1), (2, 0))
LAYOUTS = ("contiguous", "offset", "strided", "transposed", "expanded")
FACTORS = st.integers(-12, 12)
COTANGENTS = ("normal", "zero", "unit", "hard")


class Pair(NamedTuple):
    """The named tuple that :func:`pytrees` draws beside tuples, lists and dicts."""

    first: Any
    second: Any


CONTAINERS: dict[str, Callable[[list[Any]], Any]] = {
    "list": list,
    "tuple": tuple,
    "dict": lambda parts: dict(zip("abc", parts, strict=False)),
    "pair": lambda parts: Pair(*parts),
}


def pytrees(
    max_leaves: int = 5,
    *,
    shapes: Sequence[Sequence[int]] = SHAPES,
    dtype: Dtypes = torch.float64,
) -> st.SearchStrategy[Any]:
    """Strategy of nested lists, tuples, named tuples and dicts of standard normal tensors, or one bare tensor.

    Args:
        max_leaves: most tensors in a tree, at least 1; every tree has one at least.
        shapes: shapes of the tensors; the default has ``()``, ``(1,)`` and ``(0,)`` among them. The first is the
            simplest, to which failures shrink.
        dtype: float32 or float64, or a strategy of the two: leaves then may differ.

    Raises:
        hypothesis.errors.InvalidArgument: an argument outside its range.
    """
    checked(lambda value: arrays.check_integer("max_leaves", value, 1, "A pytree needs a tensor."), max_leaves)
    tuples, dtypes = st.sampled_from(_shape_tuples(shapes)), as_strategy(dtype, arrays.check_dtype)
    leaves = st.builds(arrays.normal_tensor, tuples, seed=SEEDS, dtype=dtypes)
    wraps = st.lists(st.tuples(st.sampled_from(list(CONTAINERS)), st.integers(1, 3)), max_size=4)

    @st.composite
    def tree(draw: st.DrawFn) -> Any:  # not st.builds: a failure then prints the tree itself
        return _nest(draw(st.lists(leaves, min_size=1, max_size=max_leaves)), draw(wraps))

    return tree()


def _nest(items: list[Any], wraps: list[tuple[str, int]]) -> Any:
    """One tree of all items: each wrap puts the first so many of them into a container, at the end of the line.

    The draws are two flat lists, which shrink far faster than recursive ones.
    """
    line = list(items)
    for kind, size in wraps:
        size = 2 if kind == "pair" else size
        if size <= len(line):
            parts = line[:size]
            line = [*line[size:], CONTAINERS[kind](parts)]
    return line[0] if len(line) == 1 else line


def relayout(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values in another memory layout, without a graph; requires grad where ``tensor`` does.

    Args:
        tensor: any shape.
        layout: ``"contiguous"``; ``"offset"``: behind other numbers in a larger storage; ``"strided"``: every second
            number of a storage (those in between are NaN); ``"transposed"``: the last two dimensions swapped in memory
            (where there are two); ``"expanded"``: dimensions along which the values repeat have stride 0.

    Raises:
        ValueError: an unknown layout.

    Example:
        >>> import torch, implicitlayer as il
        >>> ones = torch.ones(2, 3)
        >>> il.testing.relayout(ones, "strided").stride(), il.testing.relayout(ones, "expanded").stride()
        ((6, 2), (0, 0))
    """
    check_one_of("layout", layout, LAYOUTS)
    values = tensor.detach()
    if layout == "offset":
        storage = torch.full((values.numel() + 7,), torch.nan).to(values.dtype)
        storage[7:] = values.reshape(-1)
        result = storage[7:].reshape(values.shape)
    elif layout == "strided":
        storage = torch.full((2 * values.numel(),), torch.nan).to(values.dtype)
        storage[::2] = values.reshape(-1)
        result = storage[::2].view(values.shape)
    elif layout == "transposed" and values.ndim >= 2:
        result = values.mT.clone(memory_format=torch.contiguous_format).mT
    else:
        result = values.clone(memory_format=torch.contiguous_format)
        for dim in range(values.ndim if layout == "expanded" else 0):
            first = result.narrow(dim, 0, min(1, result.shape[dim]))
            if result.shape[dim] and bool((result == first).all()):
                result = first.expand(values.shape)
    return result.requires_grad_(tensor.requires_grad)


def layouts(tensor: torch.Tensor | st.SearchStrategy[torch.Tensor]) -> st.SearchStrategy[torch.Tensor]:
    """Strategy of tensors equal to ``tensor``, or to those of a strategy, in the memory layouts of :func:`relayout`.

    "transposed" needs two dimensions at least, "expanded" values that repeat along one.
    """
    if isinstance(tensor, st.SearchStrategy):
        return tensor.flatmap(layouts)
    if not isinstance(tensor, torch.Tensor):
        raise InvalidArgument(f"tensor={tensor!r} must be a torch.Tensor, or a strategy of tensors.")
    possible = ["contiguous", "offset", "strided"] + ["transposed"] * (tensor.ndim >= 2)
    if 0 in relayout(tensor, "expanded").stride():
        possible.append("expanded")
    return st.builds(relayout, st.just(tensor), st.sampled_from(possible))


def cotangent(
    like: Any, kind: str = "normal", *, seed: int = 0, log10_scale: float = 0, matrix: torch.Tensor | None = None
) -> Any:
    """A cotangent for ``like``, in its structure and without a graph.

    Args:
        like: pytree of tensors; n is the number of all their entries.
        kind: ``"normal"``: standard normal; ``"zero"``; ``"unit"``: one at one entry, zero elsewhere; ``"hard"``:
            A z for a normal z, of norm sqrt(n). A normal cotangent has its share of all eigenvectors and
            flatters conjugate gradients; a hard one makes the small eigenvalues of A matter as much in the solution as
            the large ones.
        seed: at least 0.
        log10_scale: logarithm of a factor, within 200 of zero (25 where a leaf is float32).
        matrix: A [n, n], needed for ``"hard"``.

    Raises:
        ValueError: an argument outside its range.

    Example:
        >>> import torch, implicitlayer as il
        >>> il.testing.cotangent({"a": torch.zeros(2), "b": torch.zeros(())}, "unit", seed=1, log10_scale=3)
        {'a': tensor([   0., 1000.]), 'b': tensor(0.)}
    """
    check_one_of("kind", kind, COTANGENTS)
    arrays.check_seed(seed)
    leaves, spec = flatten(like)
    short = any(leaf.dtype == torch.float32 for leaf in leaves)
    arrays.check_log10_scale(log10_scale, torch.float32 if short else None)
    n = sum(leaf.numel() for leaf in leaves)
    flat = arrays.normal_tensor((n,), seed=seed) if kind in ("normal", "hard") else torch.zeros(n, dtype=torch.float64)
    if kind == "unit" and n:
        flat[seed % n] = 1
    if kind == "hard":
        if matrix is None or matrix.shape != (n, n):
            shape = None if matrix is None else tuple(matrix.shape)
            raise ValueError(f"matrix must be the [n, n] = {(n, n)} matrix of the solve for kind='hard', got {shape}.")
        unit = matrix.detach().double().abs().max().clamp_min(1e-300) if n else 1.0
        flat = (matrix.detach().double() / unit) @ flat
        flat = flat * (n**0.5 / flat.norm().clamp_min(1e-300))
    plain = [torch.empty(leaf.shape, dtype=torch.float64) for leaf in leaves]
    parts = unravel(flat * 10.0**log10_scale, plain, 0) if leaves else []
    return unflatten([part.to(leaf.dtype) for part, leaf in zip(parts, leaves, strict=True)], spec)


def cotangents(
    like: Any, *, matrix: torch.Tensor | None = None, log10_scale: Numbers = FACTORS
) -> st.SearchStrategy[Any]:
    """Strategy of :func:`cotangent`: normal, zero, unit vectors and, with a matrix, hard ones; scaled.

    Args:
        like: pytree of tensors, or a strategy of pytrees.
        matrix: A [n, n], the matrix of the linear solve; adds the kind ``"hard"``.
        log10_scale: logarithms of the factor, within 200 of zero (float64) or 25 (float32); default -12 to 12.
    """
    if isinstance(like, st.SearchStrategy):
        return like.flatmap(lambda drawn: cotangents(drawn, matrix=matrix, log10_scale=log10_scale))
    leaves = flatten(like)[0]
    if not leaves or not all(isinstance(leaf, torch.Tensor) for leaf in leaves):
        raise InvalidArgument(f"like={like!r} must be a pytree of tensors, or a strategy of such pytrees.")
    n, short = sum(leaf.numel() for leaf in leaves), any(leaf.dtype == torch.float32 for leaf in leaves)
    if matrix is not None and matrix.shape != (n, n):
        raise InvalidArgument(
            f"matrix of shape {tuple(matrix.shape)} must be [n, n] = {(n, n)}, as like has n entries."
        )

    kinds = st.sampled_from(COTANGENTS if matrix is not None else COTANGENTS[:-1])
    check = partial(arrays.check_log10_scale, dtype=torch.float32 if short else None)
    drawn = {"seed": SEEDS, "log10_scale": as_strategy(log10_scale, check), "matrix": st.just(matrix)}
    return st.builds(cotangent, st.just(like), kinds, **drawn)


def _shape_tuples(shapes: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    rule = f"shapes={shapes!r} must hold one shape at least, of sizes from 0, such as [(), (1,), (2, 3)]."
    try:
        tuples = [tuple(shape) for shape in shapes]
    except TypeError:
        raise InvalidArgument(rule) from None
    if not tuples or not all(isinstance(size, int) and size >= 0 for shape in tuples for size in shape):
        raise InvalidArgument(rule)
    return tuples
