"""What ships with mmspec: tiny models, their cards, prompt sets. Import name `mmspec.assets`.

`bundled:avatars` in a `from_pretrained` call means `bundled_path("avatars")`. The path is a real
folder in a checkout, in an editable install and in an installed wheel; read from it, never write.
"""

from pathlib import Path

__all__ = ["bundled_names", "bundled_path"]

_ROOT = Path(__file__).resolve().parent

# The recipes that trained the models live beside them in a checkout and are not shipped.
_NOT_BUNDLED = frozenset({"forge"})


def bundled_names() -> tuple[str, ...]:
    """Name every bundled folder, in alphabetical order.

    Returns:
        The names that `bundled_path` knows, e.g. `("avatars", "emoji", "prompts")`.
    """
    return tuple(
        sorted(
            path.name
            for path in _ROOT.iterdir()
            if path.is_dir() and path.name not in _NOT_BUNDLED and path.name[0] not in "._"
        )
    )


def bundled_path(name: str) -> Path:
    """Find a bundled folder.

    Args:
        name: One of `bundled_names()`, with or without the prefix `bundled:`.

    Returns:
        The absolute path of the folder.

    Raises:
        ValueError: If nothing of that name is bundled; the message lists what is.
    """
    folder = name.removeprefix("bundled:")
    known = bundled_names()
    if folder not in known:
        raise ValueError(f"nothing bundled is called {folder!r}; known: {', '.join(known)}")
    return _ROOT / folder
