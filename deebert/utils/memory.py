"""Peak memory of a part of a program."""

import sys
from contextlib import suppress
from pathlib import Path

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None


def reset_peak_memory(device: torch.device) -> None:
    """Starts a new measurement. On a CPU only Linux can; elsewhere the peak is that of the process since its start."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM


def peak_memory(device: torch.device) -> int:
    """Peak bytes since the last reset: allocated on the GPU, else resident in this process; 0: not known (Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        if resource is None:
            return 0
        unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes on macOS, KiB elsewhere
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
