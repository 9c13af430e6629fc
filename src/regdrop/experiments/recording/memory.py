"""The highest memory of a run: on a GPU what torch allocated, else what the process held."""

from pathlib import Path

import torch

# The high-water mark just after a reset may be this much above what is in use.
_RESET_TOLERANCE_MIB = 32


def reset_peak_memory() -> bool:
    """Begin a new measurement of the highest memory; return whether the system allows it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return True
    try:  # Linux alone lets a process reset its own high-water mark, and not in every container.
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    peak, now = _memory_mib("VmHWM"), _memory_mib("VmRSS")
    return peak is not None and now is not None and peak - now < _RESET_TOLERANCE_MIB


def peak_memory_mib() -> float | None:
    """Return the highest memory since the last reset, in MiB; None where it cannot be read.

    Where no reset is possible, it is the highest since the process began.
    """
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated()) / 2**20
    return _memory_mib("VmHWM")


def _memory_mib(name: str) -> float | None:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    values = [line.split()[1] for line in status.splitlines() if line.startswith(f"{name}:")]
    return int(values[0]) / 1024 if values else None
