"""A server without one of its guards, for the proof that a check fails where its guard is missing.

WITHOUT names the function that takes the guard away, as MODULE:FUNCTION; SERVED the module that is run then, "app" or
"tests.fakes". Only tests.hardening starts it.
"""

from __future__ import annotations

import importlib
import os
import runpy

if __name__ == "__main__":
    module, _, name = os.environ.pop("WITHOUT").partition(":")
    getattr(importlib.import_module(module), name)()
    runpy.run_module(os.environ.pop("SERVED"), run_name="__main__", alter_sys=True)
