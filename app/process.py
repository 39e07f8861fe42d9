"""The process: its cores, how its threads share the interpreter, how many connections it may have, and what its garbage collector
need not look at.

For a process that does nothing but serve; an application inside another process leaves it as it is.
"""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import sys
from pathlib import Path

# A thread that computes in Python keeps the interpreter for so long when another asks for it. The event loop asks after every
# wait; with the default of 5 ms a few threads that tokenise would cost each of its turns as many milliseconds.
SWITCH_INTERVAL_S = 5e-4
# "max" or microseconds, and the period in which they may be used: the second version of Linux control groups, seen from inside a
# container.
QUOTA = Path("/sys/fs/cgroup/cpu.max")


def usable_cores() -> int:
    """Counts the cores that the process may run on, or that a container's quota comes to, if that is less."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = map(int, QUOTA.read_text().split())
    except (OSError, ValueError):
        return cores
    return max(1, min(cores, quota // period))


def tame_threads() -> None:
    """Keeps the libraries' own threads from holding the cores that others need, unless the environment says how.

    GNU OpenMP, which torch brings, lets a thread that waits spin for some 16 ms; on a machine with no core to spare its partner
    cannot go on meanwhile. Half a millisecond loses nothing where cores are free. It is read when torch is imported.
    It also starts a thread for every core that the process may run on, and knows nothing of a container's quota, beyond which all
    of them are stopped. Tokenizers spread one call over all cores; texts are tokenised on threads of ours, beside a forward pass
    that has the cores.
    """
    if (cores := usable_cores()) < len(os.sched_getaffinity(0)):
        os.environ.setdefault("OMP_NUM_THREADS", str(cores))
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def share_interpreter() -> None:
    """Shortens the interpreter's switch interval; call once at startup."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)


def allow_connections() -> None:
    """Raises the limit of open descriptors as far as the system lets this user; call once at startup. The usual 1,024 are fewer
    than one queue's callers."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def freeze_heap() -> None:
    """Exempts what is there from garbage collection; call once the model is ready. Modules and weights, by the hundred thousand
    objects, stay to the end, and every full collection would go through all of them with all threads stopped."""
    gc.collect()
    gc.freeze()
