"""What users call: one pipeline per job. Import name `mmspec.pipelines`.

The classes are found in a table of strings and imported on first use, so naming one pipeline
does not load the libraries of the others.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmspec.pipelines.document import SpeculativeDocumentPipeline
    from mmspec.pipelines.glm_image import accelerate
    from mmspec.pipelines.image import SpeculativeImagePipeline
    from mmspec.pipelines.text import SpeculativeTextPipeline
    from mmspec.pipelines.video import SpeculativeVideoPipeline
    from mmspec.pipelines.vlm import SpeculativeVLMPipeline

__all__ = [
    "SpeculativeDocumentPipeline",
    "SpeculativeImagePipeline",
    "SpeculativeTextPipeline",
    "SpeculativeVLMPipeline",
    "SpeculativeVideoPipeline",
    "accelerate",
]

# Public name -> "module:name", the module relative to this package.
PIPELINES = {
    "SpeculativeDocumentPipeline": ".document:SpeculativeDocumentPipeline",
    "SpeculativeImagePipeline": ".image:SpeculativeImagePipeline",
    "SpeculativeTextPipeline": ".text:SpeculativeTextPipeline",
    "SpeculativeVLMPipeline": ".vlm:SpeculativeVLMPipeline",
    "SpeculativeVideoPipeline": ".video:SpeculativeVideoPipeline",
    "accelerate": ".glm_image:accelerate",
}


def __getattr__(name: str) -> object:
    """Import a pipeline the first time somebody asks for it."""
    if name not in PIPELINES:
        known = ", ".join(sorted(PIPELINES))
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; known: {known}")
    module, _, attribute = PIPELINES[name].partition(":")
    return getattr(import_module(module, __name__), attribute)


def __dir__() -> list[str]:
    """List the pipelines for completion, loaded or not."""
    return sorted([*globals(), *PIPELINES])
