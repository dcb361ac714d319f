"""``il.from_cvxpy``: a problem of CVXPY that is a quadratic program, or one over cones, as a layer."""

# NOTE [parameters]: for a problem that follows CVXPY's rules of parametrised programming (DPP), the data of its
# canonical form  minimise 1/2 x'Px + q'x,  A_0 x + b_0 = 0,  A_1 x + b_1 >= 0  are affine functions of its parameters.
# CVXPY keeps them as sparse matrices that act on the vector of all parameters, each in column order, and a one. They
# are applied here in torch: the rest is il.qp. With A_1 x + b_1 in a product of cones it is a cone program.

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch

from implicitlayer import _torch
from implicitlayer._errors import extra
from implicitlayer.base._sharding import on_whole_tensors
from implicitlayer.constrained._cones import Cones
from implicitlayer.constrained._conic import cone_program
from implicitlayer.constrained._qp import program_solution, settings_of
from implicitlayer.constrained._qp_arguments import Entries

_LARGE = 300  # unknowns from which on a single program is faster with sparse matrices
_DATA = ("Q", "p", "A", "b", "G", "h")
_SETTINGS = {"solver", "linear_solver", "on_failure", "active_rtol", "at_kink"}


def from_cvxpy(problem: Any, parameters: Sequence[Any], variables: Sequence[Any], **settings: Any) -> CvxpyLayer:
    """A layer ``layer(*values of the parameters) -> tuple of the variables`` of a problem written in CVXPY.

    CVXPY brings the problem into the form of :func:`qp` once; every call applies the parameters and solves it there, so
    that its checks, batches, transforms and derivatives of every order are those of :func:`qp`. One with norms,
    semidefinite matrices, exponentials, logarithms or entropies becomes a cone program: Clarabel solves it, Newton's
    method makes the answer exact, and the equation of its optimality conditions is differentiated, to the third order.

    Args:
        problem: a ``cvxpy.Problem`` that follows the rules of parametrised programming (``problem.is_dpp()``) and has
            no power cones. It may hold complex numbers and variables, but those that are wanted are real.
        parameters: its ``cvxpy.Parameter``s, all of them, in the order of the layer's arguments.
        variables: the ``cvxpy.Variable``s that are wanted.
        settings: keyword arguments of :func:`qp`, such as ``on_failure`` and ``solver``; with cones ``on_failure``,
            ``active_rtol`` and ``linear_solver`` (default :class:`Dense`).

    Returns:
        A module. Its arguments are tensors of one dtype and device, each of the shape of its parameter after
        dimensions of a batch, which are broadcast; the results have these too.

    Raises:
        ImportError: CVXPY, OSQP by which it knows quadratic programs, or Clarabel for cones, is missing.
        ValueError: not DPP, other cones, integers, parameters or variables that are missing, complex ones, attributes
            other than signs; in a call a value of another shape, or against the sign of its parameter.

    Source: Agrawal et al., Differentiable convex optimization layers, NeurIPS 2019 (arXiv:1910.12430), and
    Differentiating through a cone program, J. Appl. Numer. Optim. 1 (2019). Difference to CVXPYlayers: quadratic
    programs by their active set, cone programs by the natural residual without a homogeneous form.
    """
    unknown = sorted(set(settings) - _SETTINGS)
    if unknown:
        raise TypeError(f"settings {unknown} must be among {sorted(_SETTINGS)}, which are passed on to il.qp.")
    for package in ("osqp", "cvxpy"):
        with extra("solvers", f"il.from_cvxpy needs {package}"):
            cp: Any = import_module(package)
    _check(problem, parameters, variables)
    # a variable with an attribute is replaced by others; a plain copy is not
    copies = [v if not _attributes(v) else cp.Variable(v.shape) for v in variables]
    equal = [copy == v for copy, v in zip(copies, variables, strict=True) if copy is not v]
    whole = cp.Problem(problem.objective, [*problem.constraints, *equal])
    try:
        return CvxpyLayer(whole.get_problem_data(cp.OSQP)[0]["param_prob"], parameters, copies, settings)
    except cp.error.SolverError as error:
        program = _cone_program(cp, whole, error)
    own = sorted(set(settings) & {"solver", "at_kink"})
    if own:
        raise TypeError(f"settings {own} are those of quadratic programs; this problem has cones. Leave them out.")
    return CvxpyLayer(program, parameters, copies, settings)


class CvxpyLayer(torch.nn.Module):
    """A quadratic program of CVXPY, or one over cones, as a layer; made by :func:`from_cvxpy`."""

    _added: torch.Tensor

    def __init__(
        self, program: Any, parameters: Sequence[Any], variables: Sequence[Any], settings: dict[str, Any]
    ) -> None:
        super().__init__()
        if program.lower_bounds is not None or program.upper_bounds is not None:
            raise ValueError("this version of CVXPY keeps bounds of variables apart. Write them as constraints.")
        self._parameters_of, self._settings = list(parameters), settings
        order, at = program.param_id_to_col, program.var_id_to_col
        self._order = sorted(range(len(parameters)), key=lambda i: order[parameters[i].id])
        self._variables = [(at[v.id], v.size, v.shape) for v in variables]
        n, e, dims = program.x.size, program.cone_dims.zero, program.cone_dims
        self._cones = Cones(dims.nonneg, tuple(dims.soc), tuple(dims.psd), dims.exp)
        m, num = program.A.shape[0] // (n + 1), program.q.shape[1]
        self._conic = bool(dims.soc or dims.psd or dims.exp)
        self._large = n >= _LARGE and not self._conic
        entries = {name: _entries(getattr(program, name), n if name == "P" else m) for name in ("P", "A")}
        (i, j, values, k), of_q = entries["A"], _entries(program.q, n + 1)
        first = i < e
        self.Q = _Affine((n, n, num), *entries["P"])
        self.p = _Affine((n, 1, num), *(t[of_q[0] < n] for t in of_q))
        for name, rows, side in (("A", first, 1.0), ("G", ~first, -1.0)):
            # A_0 x = -b_0 and -A_1 x <= b_1
            inside, shift = rows & (j < n), rows & (j == n)
            size, r = (e, i) if name == "A" else (m - e, i - e)
            self.add_module(name, _Affine((size, n, num), r[inside], j[inside], side * values[inside], k[inside]))
            zero = torch.zeros_like(j[shift])
            part = _Affine((size, 1, num), r[shift], zero, -side * values[shift], k[shift])
            self.add_module("b" if name == "A" else "h", part)
        added = torch.ones(n, dtype=torch.bool)
        for start, size, _ in self._variables:
            added[start : start + size] = False
        self.register_buffer("_added", added, persistent=False)
        # the variables that CVXPY adds may be some of many, and constraints may repeat one another: that matters only
        # where parameters can change it
        for name in () if self._large else _DATA:
            mask = getattr(self, name).varying()
            self.register_buffer(f"_varies_{name}", mask if name in "QAG" else mask[:, 0], persistent=False)

    @on_whole_tensors
    def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The variables at the solution for these values of the parameters."""
        vector = self._vector(values)
        batch = vector.shape[:-1]
        sparse = self._large and not batch and not _torch.transforms_active() and vector.device.type == "cpu"
        matrices = {name: getattr(self, name)(vector, sparse) for name in ("Q", "A", "G")}
        vectors = {name: getattr(self, name)(vector, False)[..., 0] for name in ("p", "b", "h")}
        varying = None if self._large else [getattr(self, f"_varies_{name}") for name in _DATA]
        if self._conic:
            data = (matrices["Q"], vectors["p"], matrices["A"], vectors["b"], matrices["G"], vectors["h"])
            derivative = vector.requires_grad or _torch.transforms_active()
            settings = {"on_failure": "warn", "active_rtol": 1e-8, "linear_solver": None, **self._settings}
            x = cone_program(data, self._cones, derivative=derivative, varying=varying, **settings)
        else:
            none = dict.fromkeys(("lower", "lb", "ub"))
            how = settings_of(varying=varying, added=self._added, **self._settings)
            x = program_solution({**matrices, **vectors, **none}, how)[0]
        # CVXPY's vectors are in column order
        parts = [(x[..., start : start + size], shape) for start, size, shape in self._variables]
        return tuple(_reversed(part.reshape((*batch, *reversed(shape))), len(shape)) for part, shape in parts)

    def _vector(self, values: Sequence[torch.Tensor]) -> torch.Tensor:
        """[*batch, number of entries and a one], in CVXPY's order."""
        if len(values) != len(self._parameters_of):
            raise ValueError(f"the layer has {len(self._parameters_of)} parameters, got {len(values)} values.")
        batches = [_batch(value, of) for value, of in zip(values, self._parameters_of, strict=True)]
        try:
            batch = torch.broadcast_shapes(*batches)
        except RuntimeError:
            shapes = {str(of): tuple(b) for of, b in zip(self._parameters_of, batches, strict=True)}
            raise ValueError(f"the batch dimensions do not fit together: {shapes}. They are broadcast.") from None
        parts = []
        for i in self._order:
            shape, value = self._parameters_of[i].shape, values[i]
            flat = _reversed(value, len(shape)).reshape((*batches[i], math.prod(shape)))
            parts.append(flat.expand(*batch, flat.shape[-1]))
        like = parts[0] if parts else self.p.weights
        return torch.cat([*parts, like.new_ones(*batch, 1)], -1)


class _Affine(torch.nn.Module):
    """A matrix whose entries are linear in a vector: weights_t vector_(of_t) is a term of entry (rows_t, columns_t)."""

    weights: torch.Tensor
    of: torch.Tensor
    places: torch.Tensor
    terms: torch.Tensor

    def __init__(self, sizes: tuple[int, int, int], *given: torch.Tensor) -> None:
        super().__init__()
        rows, columns, weights, of = given
        self._shape, self._num = torch.Size(sizes[:2]), sizes[2]
        places, terms = torch.unique(rows * sizes[1] + columns, return_inverse=True)
        tensors = {"places": places, "terms": terms, "of": of, "weights": weights}
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    def varying(self) -> torch.Tensor:
        """Mask of the entries that have a parameter in them."""
        mask = torch.zeros(self._shape.numel(), dtype=torch.bool)
        mask[self.places[self.terms[(self.of < self._num - 1) & (self.weights != 0)]]] = True
        return mask.reshape(self._shape)

    def forward(self, vector: torch.Tensor, sparse: bool) -> torch.Tensor:
        """The matrix for a vector [*batch, num], with these dimensions in front if it is not sparse."""
        places, shape, weights = self.places, self._shape, self.weights.to(vector.dtype)
        values = Entries(weights, self.terms, self.of, torch.Size((len(places), self._num))).times(vector)
        if sparse:
            index = torch.stack([places // shape[1], places % shape[1]])
            with torch.sparse.check_sparse_tensor_invariants(enable=False):  # as an argument, torch 2.11 warns of it
                return torch.sparse_coo_tensor(index, values, shape, is_coalesced=True)
        flat = values.new_zeros(*vector.shape[:-1], shape.numel()).index_add(-1, places, values)
        return flat.reshape(*vector.shape[:-1], *shape)


def _entries(matrix: Any, height: int) -> tuple[torch.Tensor, ...]:
    """The terms of a matrix that CVXPY keeps as [entries in column order, parameters and a one].

    Rows, columns, weights, and the entry of the vector of parameters that each belongs to; None: no terms.
    """
    if matrix is None:
        none = torch.zeros(0, dtype=torch.int64)
        return none, none, none.double(), none
    coo = matrix.tocoo()
    at, of = (torch.as_tensor(index, dtype=torch.int64) for index in (coo.row, coo.col))
    height = max(height, 1)
    return at % height, at // height, torch.as_tensor(coo.data, dtype=torch.float64), of


def _reversed(tensor: torch.Tensor, ndim: int) -> torch.Tensor:
    """With its last ``ndim`` dimensions in reverse order."""
    first = tensor.ndim - ndim
    return tensor.permute((*range(first), *reversed(range(first, tensor.ndim))))


def _batch(value: Any, parameter: Any) -> torch.Size:
    """The dimensions in front of those of the parameter; an error where it does not fit."""
    shape = parameter.shape
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        kind = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
        raise TypeError(f"the value of {parameter} must be a real floating tensor, got {kind}.")
    k = value.ndim - len(shape)
    if k < 0 or value.shape[k:] != shape:
        raise ValueError(
            f"the value of {parameter} must end in its shape {tuple(shape)}, after the dimensions of a batch if there "
            f"are any, got {tuple(value.shape)}."
        )
    signs = {"nonneg": 1, "pos": 1, "nonpos": -1, "neg": -1}
    for name in _attributes(parameter):
        if name in signs and not _torch.is_wrapped(value) and bool((signs[name] * value.detach() < 0).any()):
            raise ValueError(
                f"the value of {parameter} has entries against its attribute {name}=True, on which the convexity of "
                "the problem rests. Clamp it, or parametrise it by softplus."
            )
    return value.shape[:k]


def _attributes(leaf: Any) -> list[str]:
    """The attributes that a variable or parameter has."""
    return [name for name, value in leaf.attributes.items() if value is not None and value is not False]


def _check(problem: Any, parameters: Sequence[Any], variables: Sequence[Any]) -> None:
    """Refuse, by name, what is no parametrised convex program with these parameters and variables."""
    for kind, given, known in (
        ("parameter", parameters, problem.parameters()),
        ("variable", variables, problem.variables()),
    ):
        ids = [leaf.id for leaf in known]
        unknown = [str(leaf) for leaf in given if getattr(leaf, "id", None) not in ids]
        if unknown:
            raise ValueError(f"the problem has no {kind} {unknown}: its {kind}s are {[str(leaf) for leaf in known]}.")
    twice = [str(p) for p, count in Counter(parameters).items() if count > 1]
    if twice:
        raise ValueError(f"parameters={twice} are given twice: the layer takes one value of each.")
    missing = [str(leaf) for leaf in problem.parameters() if leaf.id not in [p.id for p in parameters]]
    if missing:
        raise ValueError(f"parameters={missing} of the problem are missing: the layer needs the value of each.")
    for parameter in parameters:
        others = set(_attributes(parameter)) - {"nonneg", "nonpos", "pos", "neg"}
        if others:
            raise ValueError(
                f"the parameter {parameter} has attributes {sorted(others)}, of which only signs are known here. Leave "
                "them out, and pass values that have them."
            )
    complex_ones = [str(variable) for variable in variables if variable.is_complex()]
    if complex_ones:
        raise ValueError(
            f"variables={complex_ones} are complex, and the layer returns real tensors. Ask for two real variables in "
            "place of each, re and im, with the constraints re == cp.real(x) and im == cp.imag(x)."
        )
    if problem.is_mixed_integer():
        raise ValueError("the problem has integer or boolean variables: its solution does not change smoothly.")
    if not problem.is_dcp():
        raise ValueError("the problem does not follow CVXPY's rules of convex programming: problem.is_dcp() is False.")
    if not problem.is_dpp():
        raise ValueError(
            "the problem does not follow CVXPY's rules of parametrised programming: problem.is_dpp() is False. A "
            "parameter may only multiply what has no parameter: in place of cp.quad_form(x, P) write "
            "cp.sum_squares(F @ x) with F'F = P, and make a product of two parameters one parameter of its own."
        )


def _cone_program(cp: Any, problem: Any, error: Exception) -> Any:
    """The program over cones that are known here; an error that names the others."""
    if "CLARABEL" not in cp.installed_solvers():
        raise ImportError("il.from_cvxpy needs clarabel for cones: pip install 'implicitlayer[solvers]'.") from error
    try:
        data = problem.get_problem_data(cp.CLARABEL)[0]
    except cp.error.SolverError:
        raise ValueError(f"the problem needs cones that Clarabel does not have: {error}") from error
    if data["dims"].p3d or data["dims"].pnd:
        raise ValueError(
            "the problem needs power cones, which have no derivative here. Write powers by products and norms "
            "(cp.power and cp.geo_mean with approx=True), or take CVXPY as the solver of il.constrained_argmin."
        ) from error
    return data["param_prob"]
