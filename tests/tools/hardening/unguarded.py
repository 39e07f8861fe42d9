"""A server that is changed before it starts: one of its guards is taken away, for the proof that a check fails where its guard
is missing, or it is told of another machine than there is.

CHANGED names the functions that do so, as MODULE:FUNCTION, with spaces between; SERVED the module that is run then, "app" or
"tests.support.fakes". Only tests.tools.hardening starts it. It ends with UNCHANGEABLE where a function fails.
"""

from __future__ import annotations

import importlib
import os
import runpy
import sys
import traceback

UNCHANGEABLE = 97

if __name__ == "__main__":
    for change in os.environ.pop("CHANGED").split():
        module, _, name = change.partition(":")
        try:
            getattr(importlib.import_module(module), name)()
        except Exception:
            traceback.print_exc()
            sys.exit(UNCHANGEABLE)
    runpy.run_module(os.environ.pop("SERVED"), run_name="__main__", alter_sys=True)
