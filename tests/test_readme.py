"""The README's commands run, and its examples give what it says."""

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from mmspec.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```console\n(.*?)```", README, flags=re.DOTALL)
    for line in block.splitlines()
    if line.strip() and not line.strip().startswith("#")
]
MMSPEC = [line for line in COMMANDS if line.startswith("mmspec ")]
#: These take minutes; their options are checked and nothing is run.
LONG = ("mmspec demo", "mmspec bench", "mmspec text")


def test_there_are_commands():
    assert any(line == "make demo" for line in COMMANDS)
    assert any(line == "make test" for line in COMMANDS)
    assert MMSPEC


@pytest.mark.parametrize("line", [c for c in COMMANDS if c.startswith("make ")])
def test_make_targets_exist(line):
    target = shlex.split(line)[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("line", [c for c in MMSPEC if c.startswith(LONG)])
def test_long_commands_parse(line):
    name, *arguments = shlex.split(line, comments=True)[1:]
    command = get_command(app).commands[name]  # type: ignore[attr-defined]
    while hasattr(command, "get_command"):
        name = arguments.pop(0)
        command = command.get_command(None, name)
        assert command is not None, f"{line}: no such command"
    command.make_context(name, arguments, resilient_parsing=False)


@pytest.mark.parametrize("line", [c for c in MMSPEC if not c.startswith(LONG)])
def test_short_commands_run(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Commands are those of someone who stands in the checkout, but write elsewhere.
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    arguments = shlex.split(line, comments=True)[1:]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    if "--out" in arguments:
        assert Path(arguments[arguments.index("--out") + 1]).exists()


def test_linked_files_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
