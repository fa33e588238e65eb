"""Files and folders that appear whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name to write to, moved to its place if all goes well; makes the folder if needed."""
    building = _building(path)
    try:
        yield building
        building.replace(path)
    finally:
        building.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """An empty folder to fill, moved to its place if all goes well.

    Raises:
        OSError: If something is at its place; of a folder, if it is not empty.
    """
    if path.is_dir():
        path.rmdir()
    elif path.exists():
        raise FileExistsError(f"{path} is there and is no folder")
    building = _building(path)
    # In a container a run that was killed may have had the same process number.
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    try:
        yield building
        building.rename(path)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def remove_partial(path: Path) -> None:
    """Removes what runs that were killed have left of a file or a folder."""
    for left in path.parent.glob(f".{path.name}.*.part"):
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()


def _building(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{os.getpid()}.part")
