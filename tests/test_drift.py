"""What nobody would notice drifting: every exception has its row in the error table."""

from __future__ import annotations

import ast
import builtins
import importlib

import pytest

from app.errors import TABLE
from tests.support.modules import MODULES, tree


def exceptions() -> dict[str, str]:
    """Every exception class of ours: name -> module."""
    found: dict[str, str] = {}
    classes = [(module, node) for module in MODULES for node in ast.walk(tree(module)) if isinstance(node, ast.ClassDef)]
    known = {name for name, value in vars(builtins).items() if isinstance(value, type) and issubclass(value, BaseException)}
    while True:
        new = {
            node.name: module
            for module, node in classes
            if node.name not in found and any(getattr(base, "id", getattr(base, "attr", "")) in known for base in node.bases)
        }
        if not new:
            return found
        found |= new
        known |= set(new)


# Never seen by the error middleware, and why.
NEVER_AT_THE_EDGE = {
    "SettingsError": "ends the start",
    "ModelLoadError": "ends the start",
    "DeviceUnavailable": "ends the start",
    "SchedulerError": "a base that nothing raises",
    "OutOfDeviceMemory": "the device's thread halves the batch",
    "DeviceLost": "the device's thread turns it into WorkerDied",
    "Stopped": "ends python -m app embed",
    "BadRow": "a row of its input",
    "LineTooLong": "a row of its input",
    "Away": "it waits",
    "Refused": "its refusal has the row",
}


@pytest.mark.parametrize(("name", "module"), exceptions().items())
def test_every_exception_has_a_row(name: str, module: str) -> None:
    if name in NEVER_AT_THE_EDGE or name.startswith("_"):  # a private one does not leave its module
        return
    kind = getattr(importlib.import_module(module), name)
    row = next(parent for parent in kind.__mro__ if parent in TABLE)
    assert row is not Exception


def test_the_list_of_exceptions_is_up_to_date() -> None:
    found = exceptions()
    assert set(NEVER_AT_THE_EDGE) <= set(found)
    assert {kind.__name__ for kind in TABLE} - {"Exception"} <= set(found)
    assert {"Overloaded", "InputTooLong", "BodyTimeout", "ImageInvalid", "ModelNotFound"} <= set(found)
