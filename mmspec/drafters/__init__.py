"""Ways of guessing ahead, one file each, found by name in a table of strings."""

import importlib
from collections.abc import Mapping
from typing import Any

from torch import nn

from mmspec.checks import require_known
from mmspec.forward import PromptExtras
from mmspec.rows import TokenRows
from mmspec.sampling import Law

#: Name -> (module, class). Imported on demand; importing this package imports none of them.
TABLE = {
    "none": ("mmspec.drafters.plain", "PlainDrafter"),
    "ngram": ("mmspec.drafters.ngram", "NgramDrafter"),
    "reference": ("mmspec.drafters.reference", "ReferenceDrafter"),
    "model": ("mmspec.drafters.model", "ModelDrafter"),
    "cross_tokenizer": ("mmspec.drafters.cross_tokenizer", "CrossTokenizerDrafter"),
    "early_exit": ("mmspec.drafters.model", "EarlyExitDrafter"),
    "jacobi": ("mmspec.drafters.jacobi", "JacobiDrafter"),
    "denoise": ("mmspec.drafters.denoise", "DenoiseDrafter"),
}

#: How much of an image a smaller model is shown.
VISUAL_TOKENS = ("none", "all")

DrafterSpec = str | Mapping[str, Any] | nn.Module | None


def parse_spec(spec: DrafterSpec) -> tuple[str, dict[str, Any]]:
    """Splits what a user passes as ``drafter=`` into a name and its options.

    Args:
        spec: A name, a mapping with ``name`` and options, a loaded smaller model (the ``model``
            drafter), or None for plain decoding.

    Raises:
        ValueError: If the name is unknown (the message lists the known ones), or nothing else fits.
    """
    if spec is None:
        return "none", {}
    if isinstance(spec, nn.Module):
        return "model", {"model": spec}
    if isinstance(spec, str):
        name, options = spec, {}
    elif isinstance(spec, Mapping) and "name" in spec:
        options = dict(spec)
        name = options.pop("name")
    else:
        raise ValueError(
            f"drafter must be a name, a mapping with a 'name', or a model; got {spec!r}"
        )
    require_known("drafter", name, sorted(TABLE))
    return name, options


def build_drafter(
    spec: DrafterSpec,
    *,
    target: Any,
    rows: TokenRows,
    law: Law,
    max_width: int,
    shared_noise: bool,
) -> Any:
    """Makes a drafter for token rows.

    Args:
        spec: As in `parse_spec`.
        target: The target adapter; gives ``vocab_size`` and ``forward``, and ``extras`` where
            prompts have more than token ids.
        rows: The rows to draft for.
        law: The target's law.
        max_width: Largest width of a step, root included.
        shared_noise: The rule is seeded match, so drafts use the target's own noise.

    Raises:
        ValueError: On an unknown name or an option that the drafter does not take.
    """
    name, options = parse_spec(spec)
    module, class_name = TABLE[name]
    cls = getattr(importlib.import_module(module), class_name)
    vocab_size = target.vocab_size
    if name == "denoise" and "denoiser" not in options:
        raise ValueError(
            "the 'denoise' drafter needs the denoiser of a fine-tuned image model; use "
            "decoder='jacobi-denoise' of SpeculativeImagePipeline"
        )
    extras: PromptExtras | None = getattr(target, "extras", None)
    placeholders = () if extras is None else extras.placeholders
    arguments: tuple[Any, ...] = (rows, vocab_size)
    if name == "none":
        pass
    elif name in ("ngram", "reference"):
        options = {"placeholders": placeholders} | options
    elif name in ("jacobi", "denoise"):
        options = {
            "max_width": max_width,
            "is_greedy": law.is_greedy,
            "shared_noise": shared_noise,
            "keep_laws": not shared_noise,
            "allowed": law.allowed,
        } | options
    elif name == "early_exit":
        depth = target.forward.model.config.get_text_config(decoder=True).num_hidden_layers
        arguments = (target.forward, rows, vocab_size, law)
        options = {"num_layers": max(1, depth // 3), "shared_noise": shared_noise} | options
    else:
        if "model" not in options:
            raise ValueError(
                f"the {name!r} drafter needs a loaded model: {{'name': {name!r}, 'model': m, ...}}"
            )
        model = options.pop("model")
        arguments = (model, rows, vocab_size, law)
        options = {"shared_noise": shared_noise} | options
        if name == "model" and extras is not None:
            options |= _sight(options.pop("visual_tokens", "none"), model, extras)
        elif name == "cross_tokenizer":
            options["placeholders"] = placeholders
    try:
        return cls(*arguments, **options)
    except TypeError as error:
        raise ValueError(f"drafter {name!r} does not take these options: {error}") from error


def _sight(visual_tokens: str, model: Any, extras: PromptExtras) -> dict[str, Any]:
    """Options of the model drafter for prompts with images."""
    require_known("visual_tokens", visual_tokens, VISUAL_TOKENS)
    if visual_tokens == "none":
        return {"placeholders": extras.placeholders}
    if extras.seen_by is None:
        raise ValueError("visual_tokens='all' needs the pixel_values of images, and none are given")
    return {"extras": extras.seen_by(model)}
