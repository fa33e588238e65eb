"""What every test can rely on: no network, one thread, a fixed seed."""

import os

# Set before a hub client is imported: it reads the variable once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from supported import SupportPlugin


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds what `make support` asks for."""
    parser.addoption(
        "--write-support",
        action="store_true",
        help="write mmspec/support.json and docs/support.md if all tests marked `supports` pass",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Collects the table of supported models."""
    plugin = SupportPlugin(writes=config.getoption("write_support"))
    config.pluginmanager.register(plugin, "support")


@pytest.fixture(scope="session", autouse=True)
def single_thread() -> None:
    """One thread: reductions keep one order, and two test processes keep off each other's core."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Start every test from one seed, whatever ran before it in this process."""
    torch.manual_seed(0)
