"""The state of the global random generators: what a resumed run needs to draw the same numbers."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """States of the global generators of torch (CPU, and the current GPU where one is in use), Python and NumPy.

    Plain data and tensors, so that a checkpoint that holds it can be read without running code.
    """
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002 - what users of the old interface draw from
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": [version, list(words), gauss],
        "numpy": [str(name), torch.tensor(np.asarray(keys, dtype=np.int64)), int(position), int(has_gauss), cached],
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Put the generators back where :func:`random_state` found them.

    A GPU's state is left out where there is no GPU: nothing draws from it there.
    """
    torch.set_rng_state(state["torch"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    array = keys.numpy().astype(np.uint32)
    np.random.set_state((name, array, position, has_gauss, cached))  # noqa: NPY002 - the same
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
