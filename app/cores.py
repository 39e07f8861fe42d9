"""The processor cores that this process may use, which may be fewer than the machine has."""

from __future__ import annotations

import os
from pathlib import Path

# "max" or microseconds, and the period in which they may be used: the second version of Linux control groups, seen from inside a
# container.
QUOTA = Path("/sys/fs/cgroup/cpu.max")


def usable_cores() -> int:
    """Those that it may run on, or as many as a container's quota comes to, if that is less."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = map(int, QUOTA.read_text().split())
    except (OSError, ValueError):
        return cores
    return max(1, min(cores, quota // period))
