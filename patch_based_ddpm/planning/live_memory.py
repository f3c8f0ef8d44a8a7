"""Tracks peak tensor memory by kind.

The storages of tensors are counted as they are created and freed. So the count is the same in every run, on every
device, and under fake tensors, which occupy nothing. It leaves out the memory that a kernel allocates inside itself,
the allocator's rounding and the libraries; `peak_memory` includes them.
"""

from __future__ import annotations

import re
import sys
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MIB = 2**20
KIB = 2**10
KINDS = ("weights", "gradients", "optimizer", "buffers", "activations")


@dataclass(frozen=True)
class Peak:
    """Peak bytes of live tensors, of each kind and of all together.

    Attributes:
        weights: parameters, and their copies in another precision.
        gradients: of parameters, before and after they are added to `.grad`.
        optimizer: the optimizer's state.
        buffers: the module's buffers.
        activations: all other tensors: images, features, tensors saved for the backward pass.
        total: of all kinds at one time; at most the sum of the others, which peak at different times.
    """

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    activations: int
    total: int


class LiveMemory:
    """Counts live tensors while its context is open; `peak()` returns the result afterwards.

    Of the tensors that exist before, those of the module and the optimizer count.
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        self.module = module
        self.optimizer = optimizer
        self._mode = _CountingMode(self)
        self._numbers: dict[int, int] = {}  # address of a live storage -> its number
        self._references: list[weakref.ref] = []
        self._kinds: dict[int, str] = {}  # number -> kind, known at the latest when the context closes
        self.copies: list[tuple[int, int]] = []  # numbers of a tensor and of its copy in another precision
        self._events: list[tuple[int, int]] = []  # (number, bytes allocated or freed), in the order of time
        self._hooks: list[Any] = []

    def __enter__(self) -> LiveMemory:
        self._classify_owned()
        for parameter in self.module.parameters():
            if parameter.requires_grad:
                self._hooks += [
                    parameter.register_hook(lambda gradient: self._classify(gradient, "gradients")),
                    parameter.register_post_accumulate_grad_hook(lambda owner: self._classify(owner.grad, "gradients")),
                ]
        self._mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._mode.__exit__(*error)
        for hook in self._hooks:
            hook.remove()
        self._classify_owned()
        self._numbers.clear()  # later frees do not count

    def peak(self) -> Peak:
        """The peak while the context was open."""
        for pair in self.copies * 2:  # a gradient's copy may itself be copied
            for one, other in (pair, pair[::-1]):
                if one in self._kinds and other not in self._kinds:
                    self._kinds[other] = self._kinds[one]
        live = dict.fromkeys(KINDS, 0)
        peaks, total = dict(live), 0
        for number, size in self._events:
            kind = self._kinds.get(number, "activations")
            live[kind] += size
            peaks[kind] = max(peaks[kind], live[kind])
            total = max(total, sum(live.values()))
        return Peak(**peaks, total=total)

    def number(self, tensor: Tensor) -> int:
        """The number of a tensor's storage, which is counted from its first appearance on."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address not in self._numbers:
            number = len(self._references)
            size = storage.nbytes()
            self._numbers[address] = number
            self._references.append(weakref.ref(storage, lambda _: self._freed(address, number, size)))
            self._events.append((number, size))
        return self._numbers[address]

    def _freed(self, address: int, number: int, size: int) -> None:
        if self._numbers.get(address) == number:
            del self._numbers[address]
            self._events.append((number, -size))

    def _classify(self, tensor: Tensor, kind: str) -> None:
        self._kinds[self.number(tensor)] = kind

    def _classify_owned(self) -> None:
        for parameter in self.module.parameters():
            self._classify(parameter, "weights")
            if parameter.grad is not None:
                self._classify(parameter.grad, "gradients")
        for buffer in self.module.buffers():
            self._classify(buffer, "buffers")
        for value in tree_leaves(dict(self.optimizer.state) if self.optimizer else {}):
            if isinstance(value, Tensor):
                self._classify(value, "optimizer")


class _CountingMode(TorchDispatchMode):
    """Numbers every tensor that an operator returns, and notes copies in another precision."""

    def __init__(self, memory: LiveMemory) -> None:
        super().__init__()
        self.memory = memory

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function.namespace == "aten":
            # A composite operator may arrive as a whole, as under inference mode; its intermediate tensors count too.
            with self:
                result = function.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = function(*args, **kwargs)
        numbers = [self.memory.number(leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if function is torch.ops.aten._to_copy.default:
            self.memory.copies.append((self.memory.number(args[0]), *numbers))
        return result


def reset_peak_memory(device: torch.device) -> None:
    """Start `peak_memory` of a GPU anew; that of a process cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Peak bytes so far: on a GPU those that PyTorch allocated, on a CPU the process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":  # has no `resource`
        import psutil

        return psutil.Process().memory_info().peak_wset
    if sys.platform == "linux":  # where ru_maxrss of a new process starts at the memory of its parent
        peak = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        if peak is not None:
            return int(peak[1]) * KIB
    import resource

    occupied = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return occupied if sys.platform == "darwin" else occupied * KIB
