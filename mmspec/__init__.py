"""mmspec: speculative decoding with one draft/verify core.

    model.generate(**inputs, custom_generate=mmspec.speculate(drafter="ngram"))

Pipelines are in `mmspec.pipelines`; the loop is in `mmspec.engine`, the file to open first.
"""

from importlib import import_module, metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmspec.speculation import Speculation, speculate

__all__ = ["Speculation", "__version__", "speculate"]


def __getattr__(name: str) -> object:
    """Imports on first use: `import mmspec` alone loads neither torch nor transformers."""
    if name == "__version__":
        return metadata.version("mmspec")
    if name not in __all__:
        raise AttributeError(f"module 'mmspec' has no attribute {name!r}")
    return getattr(import_module("mmspec.speculation"), name)


def __dir__() -> list[str]:
    """Lists the public names, loaded or not."""
    return sorted({*globals(), *__all__})
