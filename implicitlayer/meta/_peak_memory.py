"""How much memory a computation takes at its highest: counted on the CPU, asked of the allocator on a GPU."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

from implicitlayer._torch import TorchDispatchMode, pytree
from implicitlayer.base._parts import Parts


class PeakMemory(TorchDispatchMode):
    """Bytes of tensor storage that are made inside the ``with`` block and alive, ``now``, and their ``peak``.

    Storages are counted once, after every operator, wherever they live; views and tensors from outside cost nothing.
    Of a DTensor the part on this process counts.
    What an operator takes and frees inside itself (a workspace) is not seen.

    Example:
        >>> import torch, implicitlayer as il
        >>> x = torch.zeros(1000)
        >>> with il.meta.PeakMemory() as memory:
        ...     y = (x + 1).exp()                        # two results of 4000 bytes, the first is freed
        >>> memory.peak, memory.now
        (8000, 4000)
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and count the storages it made."""
        if any(kind is Parts or hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # a DTensor: it comes here again with what lies on this process
        given = {t.untyped_storage()._cdata for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if not isinstance(tensor, torch.Tensor) or (storage := tensor.untyped_storage()).device.type == "meta":
                continue
            key, size = storage._cdata, storage.nbytes()
            if key not in self._alive and key not in given:
                self._alive.add(key)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, key, size)
        return result

    def _free(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


def peak_memory(function: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Most bytes that one call of ``function`` holds at a time, beyond what is held before it. The result counts.

    On "cuda" the number is the allocator's (workspaces included); elsewhere :class:`PeakMemory` counts. Where
    ``function`` keeps something for later calls, run it once before.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = function()
        torch.cuda.synchronize(device)
        del result
        return int(torch.cuda.max_memory_allocated(device)) - before
    memory = PeakMemory()
    with memory:
        result = function()
        del result
    return memory.peak
