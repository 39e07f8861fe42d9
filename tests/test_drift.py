"""What nobody would notice drifting: the direction of imports, and that every exception has its row in the error table."""

from __future__ import annotations

import ast
import builtins
import importlib
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from app.errors import TABLE, InputError

ROOT = Path(__file__).parent.parent
OURS = ("app", "scheduler", "models")
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in OURS
    for path in sorted((ROOT / package).rglob("*.py"))
}


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_bytes())


def imported(node: ast.AST) -> Iterator[str]:
    """The modules that an import names, `from package import module` among them."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert not node.level, "no relative imports here"
        assert node.module is not None
        names = [f"{node.module}.{alias.name}" for alias in node.names]
        modules = [name for name in names if name in MODULES]
        yield from modules
        # Only modules out of a package: the package itself is empty.
        if not modules or len(modules) < len(names):
            yield node.module


def imports(module: str) -> set[str]:
    """All that a module imports, anywhere in it."""
    return {name for node in ast.walk(tree(module)) for name in imported(node)}


def imports_at_start(module: str) -> set[str]:
    """What is imported with it: neither within functions nor for type checking."""
    found: set[str] = set()
    nodes: list[ast.AST] = list(tree(module).body)
    while nodes:
        node = nodes.pop()
        found.update(imported(node))
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            nodes.extend(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            nodes.extend(ast.iter_child_nodes(node))
    return found


def of(package: str, names: set[str]) -> set[str]:
    return {name for name in names if name == package or name.startswith(f"{package}.")}


def test_the_reading_of_imports() -> None:
    assert "models.devices" in imports("app.main")
    assert "models.devices" not in imports_at_start("app.main")
    assert "aiohttp" in imports_at_start("app.main")
    assert "app.embedding_service" in imports("app.keys")
    assert "app.embedding_service" not in imports_at_start("app.keys")
    assert "models.devices" in imports("models.registry")
    assert len(MODULES) > 30


@pytest.mark.parametrize("module", [module for module in MODULES if module.startswith("scheduler")])
def test_the_scheduler_knows_no_http_and_no_torch(module: str) -> None:
    names = imports(module)
    assert not of("aiohttp", names)
    assert not of("torch", names)
    assert not of("app", names)
    assert of("models", names) <= {"models.base"}


@pytest.mark.parametrize("module", [module for module in MODULES if module.startswith("models")])
def test_the_models_know_no_http_and_no_asyncio(module: str) -> None:
    names = imports(module)
    for package in ("aiohttp", "asyncio", "app", "scheduler"):
        assert not of(package, names)


def test_the_seam_needs_no_torch() -> None:
    assert not of("torch", imports("models.base"))
    assert not of("models", imports("models.base"))


# What they share is in none of them.
FAMILIES = ("models.qwen3_vl", "models.text_encoder")


def family_of(module: str) -> str:
    """The family that a module of models belongs to, "" for what they share."""
    return next((family for family in FAMILIES if of(family, {module})), "")


def test_every_package_of_models_is_a_family_or_shared() -> None:
    packages = {".".join(module.split(".")[:2]) for module in MODULES if module.startswith("models.") and module.count(".") > 1}
    assert packages == {*FAMILIES, "models.packed"}


@pytest.mark.parametrize("module", [module for module in MODULES if module.startswith("models.")])
def test_families_of_models_do_not_know_each_other(module: str) -> None:
    known = {family_of(name) for name in imports(module)} - {""}
    assert known <= {family_of(module)}
    # The device's work is shared, and knows neither checkpoints nor where models come from.
    if of("models.packed", {module}):
        assert all(
            name.startswith("models.packed.") or name in ("models.base", "models.pooling")
            for name in of("models", imports(module))
        )


ARROWS = {
    "app.embedding_service": {"models.base", "models.pooling"},
    # The composition root.
    "app.main": {"models.base", "models.devices", "models.registry", "models.weights"},
}


@pytest.mark.parametrize("module", [module for module in MODULES if module.startswith("app")])
def test_the_edge_knows_the_seam_alone(module: str) -> None:
    names = imports(module)
    assert of("models", names) <= ARROWS.get(module, {"models.base"})
    assert not of("torch", names)
    assert not of("transformers", names)
    assert not of("prometheus_client", names) or module == "app.metrics"
    assert of("models", imports_at_start(module)) <= {"models.base", "models.pooling"}


def test_only_the_edge_speaks_http() -> None:
    assert {module.partition(".")[0] for module in MODULES if of("aiohttp", imports(module))} == {"app"}
    # These two are about requests and images; a server is none of their business.
    for module in ("app.dialects", "app.dialect_items", "app.image_decode", "app.settings", "app.lifecycle", "app.metrics"):
        assert not of("aiohttp", imports(module))
    assert "aiohttp.web" not in imports("app.image_fetch")


def test_only_the_settings_read_the_environment() -> None:
    readers = {
        module
        for module in MODULES
        if module.startswith(("app", "scheduler"))
        for node in ast.walk(tree(module))
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
    }
    assert readers == {"app.settings"}


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [("app.__main__", "aiohttp torch numpy"), ("app.main, app.server", "torch transformers qwen_vl_utils")],
)
def test_what_is_heavy_is_not_imported_with_it(module: str, unwanted: str) -> None:
    code = f"import sys, {module}; print(*(name for name in {unwanted.split()} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("module", MODULES)
def test_every_module_says_what_it_is(module: str) -> None:
    assert ast.get_docstring(tree(module)) or not tree(module).body


# Errors


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
    "InputError": "unwrapped: its cause has the row",
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
    assert InputError.__name__ in found
    assert {"Overloaded", "InputTooLong", "BodyTimeout", "ImageInvalid", "ModelNotFound"} <= set(found)
