"""How much memory a process has held at most."""

import sys

import torch

KIB = 1024


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
