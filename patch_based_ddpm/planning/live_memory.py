"""Counting live tensors: what a piece of code holds at most, told apart by what it is for.

The count follows the storages of tensors as they are created and freed, so it is the same in every run, on every
device, and under fake tensors, which hold nothing at all. What a kernel allocates inside itself, an allocator's
rounding and what the libraries occupy are not tensors; `peak_memory` tells those in a live process.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MIB = 2**20
KIB = 2**10


@dataclass(frozen=True)
class Peak:
    """The most bytes of live tensors, each kind for itself, and the most that all of them held together.

    Attributes:
        weights: parameters, and their copies in another precision.
        gradients: what ends up in a parameter's `.grad`, before and after it is added there.
        optimizer: the optimizer's moments.
        buffers: the module's buffers.
        activations: everything else: images, features, what is kept for the backward pass.
        total: of all kinds at one time; at most the sum of the others, which peak at different times.
    """

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    activations: int
    total: int


KINDS = ("weights", "gradients", "optimizer", "buffers", "activations")


class LiveMemory:
    """Counts the tensors that live while its context is open; `peak()` tells afterwards what they held.

    Tensors made before count if they belong to the module or the optimizer.

    Args:
        module: whose parameters and buffers are told apart.
        optimizer: whose state is told apart.
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        self.module = module
        self.optimizer = optimizer
        self._watch = _Watch(self._number, self._copied)
        self._numbers: dict[int, int] = {}  # address of a live storage -> its number
        self._references: list[weakref.ref] = []
        self._kinds: dict[int, str] = {}  # number -> kind, known at the latest when the context closes
        self._copies: list[tuple[int, int]] = []  # numbers of a tensor and of its copy in another precision
        self._events: list[tuple[int, int]] = []  # (number, bytes gained or lost), in the order of time
        self._hooks: list[Any] = []

    def __enter__(self) -> LiveMemory:
        self._name_what_is_there()
        for parameter in self.module.parameters():
            if parameter.requires_grad:
                self._hooks.append(parameter.register_hook(lambda gradient: self._name(gradient, "gradients")))
        self._watch.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._watch.__exit__(*error)
        for hook in self._hooks:
            hook.remove()
        self._name_what_is_there()
        self._numbers.clear()  # what is freed from now on is not counted

    def peak(self) -> Peak:
        """What the closed context held at most."""
        for pair in self._copies * 2:  # a gradient's copy may itself be copied
            for one, other in (pair, pair[::-1]):
                if one in self._kinds and other not in self._kinds:
                    self._kinds[other] = self._kinds[one]
        held = dict.fromkeys(KINDS, 0)
        most, total = dict(held), 0
        for number, size in self._events:
            kind = self._kinds.get(number, "activations")
            held[kind] += size
            most[kind] = max(most[kind], held[kind])
            total = max(total, sum(held.values()))
        return Peak(**most, total=total)

    def _number(self, tensor: Tensor) -> int:
        """The number of a tensor's storage; one not seen before starts to count."""
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

    def _copied(self, tensor: Tensor, copy: Tensor) -> None:
        self._copies.append((self._number(tensor), self._number(copy)))

    def _name(self, tensor: Tensor, kind: str) -> None:
        self._kinds[self._number(tensor)] = kind

    def _name_what_is_there(self) -> None:
        for parameter in self.module.parameters():
            self._name(parameter, "weights")
            if parameter.grad is not None:
                self._name(parameter.grad, "gradients")
        for buffer in self.module.buffers():
            self._name(buffer, "buffers")
        for value in _tensors_of(self.optimizer):
            self._name(value, "optimizer")


class _Watch(TorchDispatchMode):
    """Tells of every tensor that an operator returns, and of every copy in another precision."""

    def __init__(self, seen: Callable[[Tensor], Any], copied: Callable[[Tensor, Tensor], None]) -> None:
        super().__init__()
        self.seen = seen
        self.copied = copied

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function.namespace == "aten":
            # Under inference mode an operator made of others arrives whole; what they pass to each other counts too.
            with self:
                result = function.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = function(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.seen(leaf)
        if function is torch.ops.aten._to_copy.default:
            self.copied(args[0], result)
        return result


def _tensors_of(optimizer: torch.optim.Optimizer | None) -> Iterable[Tensor]:
    states = [] if optimizer is None else optimizer.state.values()
    return [value for state in states for value in state.values() if isinstance(value, Tensor)]


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory` of a GPU count from now on; what a process occupied at most is never forgotten."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """The most bytes held so far: on a GPU what PyTorch allocated there, on a CPU what the process occupied."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":  # has no `resource`
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    occupied = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return occupied if sys.platform == "darwin" else occupied * KIB
