"""The served process: how its threads share the interpreter, how many connections it may have, and what its garbage collector
need not look at.

For a process that does nothing but serve; an application inside another process leaves both alone.
"""

from __future__ import annotations

import contextlib
import gc
import resource
import sys

# A thread that computes in Python keeps the interpreter for so long when another asks for it. The event loop asks after every
# wait; with the default of 5 ms a few threads that tokenise would cost each of its turns as many milliseconds.
SWITCH_INTERVAL_S = 5e-4


def share_interpreter() -> None:
    """At the start."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)


def allow_connections() -> None:
    """At the start: as many descriptors as the system lets this user have. The usual 1,024 are fewer than one queue's callers."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def freeze_heap() -> None:
    """Once the model is ready: what is there by now stays to the end, modules and weights by the hundred thousand objects, and
    every full collection would go through all of it, with all threads stopped."""
    gc.collect()
    gc.freeze()
