"""The build map names every package and ships every bundled file."""

import re
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

from mmspec.assets import bundled_names, bundled_path

ROOT = Path(__file__).resolve().parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
PACKAGE_ROOTS = ("mmspec", "pipelines", "routers", "assets")
MAX_ASSET_BYTES = 48 * 2**20
NOT_SHIPPED = {"forge", "__pycache__"}


def folder_of(package: str) -> Path:
    """Map an import name to its folder, by the longest prefix in the build map."""
    mapping = SETUPTOOLS["package-dir"]
    parts = package.split(".")
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        if prefix in mapping:
            return ROOT.joinpath(mapping[prefix], *parts[length:])
    raise AssertionError(f"{package} is not under any mapped package")


def asset_files() -> list[Path]:
    """Every file under assets/ that is not code and not a recipe."""
    root = ROOT / "assets"
    return [
        path
        for path in sorted(root.rglob("*"))
        if path.is_file()
        and path.parent != root
        and not NOT_SHIPPED & set(path.relative_to(root).parts)
    ]


def matches(pattern: str, name: str) -> bool:
    """Whether setuptools' glob takes the file: `**` crosses folders, `*` does not."""
    tokens = {"**": ".*", "*": "[^/]*"}
    expression = re.sub(r"\*\*|\*|[^*]+", lambda m: tokens.get(m[0], re.escape(m[0])), pattern)
    return re.fullmatch(expression, name) is not None


def test_every_package_folder_is_in_the_build_map():
    found = {
        path.parent
        for root in PACKAGE_ROOTS
        for path in (ROOT / root).rglob("__init__.py")
        if "forge" not in path.parts
    }
    listed = {folder_of(package) for package in SETUPTOOLS["packages"]}
    assert found == listed


@pytest.mark.parametrize("package", SETUPTOOLS["packages"])
def test_listed_package_is_found_in_its_folder(package):
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    # Run from a wheel, the origin is in site-packages; the folder keeps the import name there.
    in_wheel = Path(*package.split("."))
    folder = Path(spec.origin).parent
    assert folder == folder_of(package) or folder.parts[-len(in_wheel.parts) :] == in_wheel.parts


def test_every_bundled_file_is_package_data():
    patterns = SETUPTOOLS["package-data"]["mmspec.assets"]
    names = [path.relative_to(ROOT / "assets").as_posix() for path in asset_files()]
    assert names, "no assets found"
    assert [n for n in names if not any(matches(p, n) for p in patterns)] == []


def test_recipes_are_not_package_data():
    patterns = SETUPTOOLS["package-data"]["mmspec.assets"]
    assert not any(matches(p, "forge/recipe.py") for p in patterns)
    assert not any("forge" in package for package in SETUPTOOLS["packages"])


def test_assets_stay_small():
    total = sum(path.stat().st_size for path in (ROOT / "assets").rglob("*") if path.is_file())
    assert total <= MAX_ASSET_BYTES, f"assets/ is {total / 2**20:.1f} MB"


def test_bundled_path_takes_the_name_with_and_without_prefix():
    assert "prompts" in bundled_names()
    assert bundled_path("bundled:prompts") == bundled_path("prompts")
    assert bundled_path("prompts").is_dir()


@pytest.mark.parametrize("name", ["nothing", "forge", "", "..", "bundled:prompts/chat.jsonl"])
def test_unknown_bundled_name_lists_the_known_ones(name):
    with pytest.raises(ValueError, match=r"known: .*prompts"):
        bundled_path(name)
