"""What a run was set up with, as plain data: a checkpoint remembers it, and a run with other settings is refused."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from implicitlayer.base._sharding import is_sharded
from implicitlayer.base._tree import flatten

# Metadata of a dataclass field that says how numbers are computed, not which: a run may go on with another value.
EXECUTION = {"execution": True}
_PLAIN = (bool, int, float, str, type(None))


def plain(value: Any) -> Any:
    """``value`` as nested dicts of numbers and strings: what two runs can be compared by.

    Dataclasses and containers are looked into. Of a tensor the shape counts (its value may be learned), of any other
    object, functions among them, the name of its class.
    """
    if isinstance(value, np.generic):
        value = value.item()  # a checkpoint gives it back like this
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, torch.Tensor):
        return f"tensor {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return {str(index): plain(entry) for index, entry in enumerate(value)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        # fields that begin with an underscore are the object's own business
        counted = [f for f in dataclasses.fields(value) if f.name[0] != "_" and not f.metadata.get("execution")]
        fields = {f.name: plain(getattr(value, f.name)) for f in counted}
        return {"class": type(value).__name__} | fields
    return type(value).__name__


def differences(saved: Any, present: Any) -> list[str]:
    """One line for every setting that is not the same: ``"inner_solver.max_steps: 5 there, 6 here"``."""
    there, here = _flat(saved), _flat(present)
    return [
        f"{name}: {there.get(name, 'absent')!r} there, {here.get(name, 'absent')!r} here"
        for name in sorted({*there, *here})
        if repr(there.get(name, "absent")) != repr(here.get(name, "absent"))  # repr: NaN equals NaN
    ]


def parts_of(tree: Any) -> list[torch.Tensor]:
    """What lies on this process of every DTensor."""
    return [leaf.detach().to_local() for leaf in flatten(tree)[0] if is_sharded(leaf)]


def fingerprint(tree: Any) -> int:
    """63 bits of a SHA-256 over every tensor's bytes and every other leaf's repr; of a DTensor over its layout."""
    digest = hashlib.sha256()
    for leaf in flatten(tree)[0]:
        if is_sharded(leaf):
            digest.update(f"{leaf.dtype}{tuple(leaf.shape)}{leaf.placements}".encode())
        elif isinstance(leaf, torch.Tensor):
            digest.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
            digest.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(leaf).encode())
    return int.from_bytes(digest.digest()[:8], "big") >> 1


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {name: value}
    parts = [_flat(entry, f"{name}.{key}" if name else str(key)) for key, entry in value.items()]
    return {key: entry for part in parts for key, entry in part.items()}
