"""Exchanges between the CPUs of a command's processes, which may take as long as one process works while others wait.

The accelerator's own collectives run on the GPUs where there are any, and time out soon, so that a hung GPU is noticed.
"""

import functools
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import distributed
from torch.distributed import ProcessGroup

from patch_based_ddpm.errors import InputError

LONG_WAIT = timedelta(days=1)


@functools.cache
def cpu_group(world: ProcessGroup) -> ProcessGroup:
    """Collective: the gloo group of all processes in `torch.distributed.group.WORLD`, made at the first call."""
    return distributed.new_group(backend="gloo", timeout=LONG_WAIT)


def gather(value: Any) -> list[Any]:
    """Collective: the value of each process, in their order; `value` can be pickled."""
    if not distributed.is_initialized():
        return [value]
    values = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value, group=cpu_group(distributed.group.WORLD))
    return values


def from_main(value: Any) -> Any:
    """Collective: the value of the main process; `value` can be pickled."""
    return gather(value)[0]


def run_on_main(work: Callable[[], Any]) -> Any:
    """Collective: call `work` in the main process; every process returns its value or raises its `InputError`."""
    result = None
    if not distributed.is_initialized() or distributed.get_rank() == 0:
        try:
            result = work()
        except InputError as error:
            result = error
    result = from_main(result)
    if isinstance(result, InputError):
        raise result
    return result


def maximum(value: int) -> int:
    """Collective: the largest value of any process."""
    if not distributed.is_initialized():
        return value
    largest = torch.tensor(value)
    distributed.all_reduce(largest, distributed.ReduceOp.MAX, cpu_group(distributed.group.WORLD))
    return int(largest)
