"""Imports go one way, files stay short, and only `mmspec.*` names are imported."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES = 500

# Where each folder's files live in the import tree.
FOLDERS = {
    "mmspec": "mmspec",
    "pipelines": "mmspec.pipelines",
    "routers": "mmspec.routers",
    "assets": "mmspec.assets",
}

# What each room may import, itself included. A file of mmspec/ without a room of its own is a
# part of the core.
CORE = {"records", "protocols", "part", "engine"}
ALLOWED = {
    "assets": {"assets"},
    "records": {"records"},
    "protocols": {"records", "protocols"},
    "part": {"records", "protocols", "part"},
    "engine": CORE,
    "drafters": CORE | {"drafters"},
    "adapters": CORE | {"adapters"},
    "training": CORE | {"drafters", "adapters", "training"},
    "facade": CORE | {"drafters", "adapters", "facade"},
    "routers": CORE | {"routers"},
    "pipelines": CORE | {"drafters", "adapters", "facade", "routers", "assets", "pipelines"},
}
BELOW_CLI = set().union(*ALLOWED.values())
ALLOWED["jobs"] = BELOW_CLI | {"jobs"}
ALLOWED["bench"] = BELOW_CLI | {"jobs", "bench"}
ALLOWED["cli"] = BELOW_CLI | {"jobs", "bench", "cli"}

# `mmspec` itself and what it re-exports: it stands on the core, which must not look up to it.
FACADE = {"mmspec", "mmspec.speculation"}
CLI_FILES = ("cli", "cli_common", "cli_documents", "cli_video", "demo", "__main__")
CLI = {f"mmspec.{name}" for name in CLI_FILES}


def modules() -> dict[str, Path]:
    """Import name -> file, for every file of the installed packages."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if "forge" in parts:
                continue
            found[".".join([package, *(p for p in parts if p != "__init__")])] = path
    return found


MODULES = modules()


def room_of(module: str) -> str:
    """Name the room of a module."""
    if module in FACADE:
        return "facade"
    if module in CLI:
        return "cli"
    first = module.split(".")[1]
    return first if first in ALLOWED else "part"


def own_target(module: str, name: str) -> str:
    """Resolve `from module import name` to the submodule when there is one."""
    return f"{module}.{name}" if f"{module}.{name}" in MODULES else module


def absolute(node: ast.ImportFrom, module: str) -> str:
    """Spell out a relative import."""
    if not node.level:
        return node.module or ""
    package = module.split(".")
    drop = node.level - (MODULES[module].name == "__init__.py")
    return ".".join([*package[: len(package) - drop], *filter(None, [node.module])])


def imports_of(module: str) -> set[str]:
    """Every name a module imports, inside functions and `TYPE_CHECKING` blocks too."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = absolute(node, module)
            found.update(own_target(source, alias.name) for alias in node.names)
    return found


def own_imports_of(module: str) -> set[str]:
    """The imports of a module that stay within mmspec."""
    return {name for name in imports_of(module) if name.split(".")[0] == "mmspec"} - {module}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_one_way(module):
    room = room_of(module)
    upward = {
        target: room_of(target)
        for target in own_imports_of(module)
        if room_of(target) not in ALLOWED[room]
    }
    assert not upward, f"{module} ({room}) may import {sorted(ALLOWED[room])}, not {upward}"


def test_no_import_cycle():
    remaining = {module: own_imports_of(module) & set(MODULES) for module in MODULES}
    # A package's __init__ may name its own submodules (tables, type-checking imports), and they
    # do not look back at it.
    while remaining:
        leaves = {m for m, targets in remaining.items() if not targets & set(remaining)}
        assert leaves, f"import cycle among {sorted(remaining)}"
        remaining = {m: t for m, t in remaining.items() if m not in leaves}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_bare_folder_names_are_not_imported(module):
    tops = {name.split(".")[0] for name in imports_of(module)}
    assert not tops & {"pipelines", "routers", "assets"}


def test_files_stay_short():
    folders = [*FOLDERS, "tests", "benchmarks"]
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    lengths = {p.relative_to(ROOT): len(p.read_text("utf-8").splitlines()) for p in files}
    assert {path: n for path, n in lengths.items() if n > MAX_LINES} == {}


def test_a_relative_import_is_spelled_out():
    node = ast.parse("from .base import X").body[0]
    assert isinstance(node, ast.ImportFrom)
    assert absolute(node, "mmspec.pipelines") == "mmspec.pipelines.base"
