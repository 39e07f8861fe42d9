"""The product's modules, and what each of them imports, read from its source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache

from tests.support.paths import ROOT

PACKAGES = ("app", "scheduler", "models")
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}


@cache
def tree(module: str) -> ast.Module:
    """The syntax tree of a module of ours."""
    return ast.parse(MODULES[module].read_bytes())


def imported(node: ast.AST) -> Iterator[str]:
    """The modules that an import names, `from package import module` among them."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert not node.level, "no relative imports here"
        assert node.module is not None
        names = [f"{node.module}.{alias.name}" for alias in node.names]
        # A name of aiohttp's is a module too, such as `from aiohttp import web`.
        modules = [name for name in names if name in MODULES or name == "aiohttp.web"]
        yield from modules
        # Only modules out of a package: the package itself is empty.
        if not modules or len(modules) < len(names):
            yield node.module


def imports(module: str) -> set[str]:
    """All that a module imports, anywhere in it."""
    return {name for node in ast.walk(tree(module)) for name in imported(node)}


def imports_at_start(module: str) -> set[str]:
    """What is imported with a module: neither within functions nor for type checking."""
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


@cache
def reached(module: str) -> frozenset[str]:
    """What the import of a module loads, followed from module to module of ours."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        new = imports_at_start(waiting.pop()) - found
        found |= new
        waiting += [name for name in new if name in MODULES]
    return frozenset(found)


def of(package: str, names: set[str] | frozenset[str]) -> set[str]:
    """Those of the names that are a package or lie in it."""
    return {name for name in names if name == package or name.startswith(f"{package}.")}
