"""The arrows of the house: which package may import which, and who may know aiohttp, torch and the environment."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

from tests.support.modules import MODULES, imports, imports_at_start, of, reached, tree
from tests.support.paths import ROOT

# Room -> the rooms that it may import, beside itself. A module that is named has rules of its own; the longest name counts.
ARROWS: dict[str, str] = {
    "app": "",
    "app.__main__": "app",
    "app.main": "app.http app.dialects app.engine app.lifecycle app.settings",
    "app.settings": "",
    "app.process": "",
    "app.lifecycle": "scheduler.errors",
    "app.logs": "",
    "app.errors": "app.dialects.contract app.engine app.media models.base scheduler.errors",
    "app.http": "app app.logs app.dialects app.engine app.openapi app.settings app.lifecycle app.errors scheduler models.base",
    "app.dialects": "models.base",
    "app.media": "",
    "app.engine": "app.dialects.contract app.media app.settings app.process scheduler models.base models.vectors",
    "app.engine.loading": "app.lifecycle app.settings models",
    "app.openapi": "app.dialects",
    "app.commands.configure": "",
    "app.commands.demo": "app.http app.main app.lifecycle app.settings scheduler",
    "app.commands.verify": "app.engine app.settings models.base",
    "app.bulk": "app.dialects app.engine app.errors app.lifecycle app.process app.settings models.base",
    "scheduler": "models.base",
    "models": "models",
    "models.base": "",
    "models.registry": "models.base models.devices",
    "models.base_preparer": "models.base",
    "models.tokenizer": "models.base",
    "models.checkpoints": "models.base",
    "models.packed": "models.base models.vectors",
}
# Families of models: neither knows the other.
FAMILIES = ("models.qwen3_vl", "models.text_encoder")
# Who may import aiohttp.web. Nothing else reaches it, by whatever way.
WEB = ("app.http", "app.main", "app.commands.demo")
# Libraries that one room alone imports.
OWNED = {
    "prometheus_client": ("app.engine.metrics", "app.http"),
    "pyarrow": ("app.bulk",),
    "tqdm": ("app.bulk",),
    "torch": ("models",),
    "transformers": ("models",),
    "huggingface_hub": ("models.checkpoints",),
    "environs": ("app.settings",),
    "asyncio": ("app", "scheduler"),
    "aiohttp": ("app",),
}


def room(module: str) -> str:
    """The longest name in ARROWS that a module is, or lies in."""
    return max((name for name in ARROWS if of(name, {module})), key=len)


def test_imports_are_read_where_they_are() -> None:
    assert "models.devices" in imports("app.engine.loading") - imports_at_start("app.engine.loading")
    assert "app.engine.service" in imports("app.http.keys") - imports_at_start("app.http.keys")
    assert "aiohttp.web" in imports_at_start("app.main")
    assert "scheduler.scheduler" in reached("app.main") - imports_at_start("app.main")
    assert "models.devices" in imports("models.registry")
    assert len(MODULES) > 30


def test_imports_follow_the_arrows() -> None:
    against = []
    for module in MODULES:
        here = room(module)
        allowed = [here, *ARROWS[here].split()]
        ours = [name for name in imports(module) if name.partition(".")[0] in ("app", "scheduler", "models", "tests")]
        against += [f"{module} -> {name}" for name in ours if not any(of(package, {name}) for package in allowed)]
    assert not against


def test_imports_of_families_do_not_cross() -> None:
    pairs = [(module, name) for module in MODULES for name in imports(module)]
    assert not [
        pair for pair in pairs for one, other in (FAMILIES, FAMILIES[::-1]) if of(one, {pair[0]}) and of(other, {pair[1]})
    ]
    shared = {"models.packed", "models.checkpoints"}
    packages = {".".join(module.split(".")[:2]) for module in MODULES if module.startswith("models.") and module.count(".") > 1}
    assert packages == {*FAMILIES, *shared}


def test_aiohttp_web_is_reached_by_the_edge_alone() -> None:
    # The command line imports what a command needs when it is given.
    others = [module for module in MODULES if not any(of(name, {module}) for name in WEB)]
    assert not [module for module in others if of("aiohttp.web", reached(module))]
    assert not [module for module in others if of("aiohttp.web", imports(module))]


def test_aiohttp_web_is_not_loaded_with_the_engine() -> None:
    code = "import sys, app.engine.engine, app.bulk.run, app.dialects.registry; print('aiohttp.web' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_libraries_are_imported_by_their_owners_alone() -> None:
    wrong = [
        f"{module} -> {library}"
        for library, owners in OWNED.items()
        for module in MODULES
        if of(library, imports(module)) and not any(of(owner, {module}) for owner in owners)
    ]
    assert not wrong


def test_the_seam_needs_no_torch() -> None:
    assert not of("torch", reached("models.base")) and not of("models", reached("models.base"))
    assert not of("torch", reached("app.main")) and not of("torch", reached("scheduler.scheduler"))


def test_the_environment_is_read_by_settings_and_process_alone() -> None:
    readers = {
        module
        for module in MODULES
        if module.startswith(("app", "scheduler"))
        for node in ast.walk(tree(module))
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
    }
    assert readers == {"app.settings", "app.process"}


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [("app.__main__", "aiohttp torch numpy"), ("app.main, app.http.server", "torch transformers qwen_vl_utils")],
)
def test_what_is_heavy_is_not_imported_with_it(module: str, unwanted: str) -> None:
    code = f"import sys, {module}; print(*(name for name in {unwanted.split()} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_every_module_says_what_it_is() -> None:
    assert not [module for module in MODULES if tree(module).body and not ast.get_docstring(tree(module))]
