"""A server that is changed before it starts: one of its guards is taken away, for the proof that a check fails where its guard
is missing, or it is told of another machine than there is.

CHANGED names the functions that do so, as MODULE:FUNCTION, with spaces between; SERVED the module that is run then, "app" or
"tests.fakes". Only tests.hardening starts it.
"""

from __future__ import annotations

import importlib
import os
import runpy

if __name__ == "__main__":
    for change in os.environ.pop("CHANGED").split():
        module, _, name = change.partition(":")
        getattr(importlib.import_module(module), name)()
    runpy.run_module(os.environ.pop("SERVED"), run_name="__main__", alter_sys=True)
