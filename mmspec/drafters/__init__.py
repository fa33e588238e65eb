"""Ways of guessing ahead, one file each, found by name in a table of strings."""

import importlib
from collections.abc import Mapping
from typing import Any

from torch import nn

from mmspec.checks import require_known
from mmspec.drafters.sight import sights_of, views_of
from mmspec.forward import PromptExtras
from mmspec.rows import TokenRows
from mmspec.sampling import Law

#: Name -> (module, class). Imported on demand; importing this package imports none of them.
TABLE = {
    "none": ("mmspec.drafters.plain", "PlainDrafter"),
    "ngram": ("mmspec.drafters.ngram", "NgramDrafter"),
    "reference": ("mmspec.drafters.reference", "ReferenceDrafter"),
    "model": ("mmspec.drafters.model", "ModelDrafter"),
    "mixed": ("mmspec.drafters.mixed", "MixedDrafter"),
    "cross_tokenizer": ("mmspec.drafters.cross_tokenizer", "CrossTokenizerDrafter"),
    "early_exit": ("mmspec.drafters.model", "EarlyExitDrafter"),
    "jacobi": ("mmspec.drafters.jacobi", "JacobiDrafter"),
    "denoise": ("mmspec.drafters.denoise", "DenoiseDrafter"),
}

#: The `model` drafter where the model is the target.
OWN_CACHE = ("mmspec.drafters.own_cache", "OwnCacheDrafter")

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
    sights_of(name, options)
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
    if name == "denoise" and "denoiser" not in options:
        raise ValueError(
            "the 'denoise' drafter needs the denoiser of a fine-tuned image model; use "
            "decoder='jacobi-denoise' of SpeculativeImagePipeline"
        )
    extras: PromptExtras | None = getattr(target, "extras", None)
    placeholders = () if extras is None else extras.placeholders
    arguments: tuple[Any, ...] = (rows, target.vocab_size)
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
        arguments = (target.forward, *arguments, law)
        options = {"num_layers": max(1, depth // 3), "shared_noise": shared_noise} | options
    else:
        return _with_model(name, options, target, rows, law, shared_noise)
    return _made(name, TABLE[name], arguments, options)


def _with_model(
    name: str,
    options: dict[str, Any],
    target: Any,
    rows: TokenRows,
    law: Law,
    shared_noise: bool,
) -> Any:
    """A drafter with a model of its own, or with the target as that."""
    sights = sights_of(name, options)
    options = {"shared_noise": shared_noise} | options
    extras: PromptExtras | None = getattr(target, "extras", None)
    placeholders = () if extras is None else extras.placeholders
    if any(sight.choice == "self" for sight in sights):
        (sight,) = sights
        del options["visual_tokens"]
        options |= {"sight": sight, "placeholders": placeholders}
        return _made(name, OWN_CACHE, (target.forward, rows, target.vocab_size, law), options)
    if "model" not in options:
        raise ValueError(
            f"the {name!r} drafter needs a loaded model: {{'name': {name!r}, 'model': m, ...}}"
        )
    model = options.pop("model")
    if name == "cross_tokenizer":
        options["placeholders"] = placeholders
    elif name == "mixed":
        options.pop("members", None)
        options |= {"views": views_of(sights, model, target, rows), "num_views": len(sights)}
    else:
        options.pop("visual_tokens", None)
        views = views_of(sights, model, target, rows)
        options["view"] = lambda: views()[0]
    return _made(name, TABLE[name], (model, rows, target.vocab_size, law), options)


def _made(
    name: str, where: tuple[str, str], arguments: tuple[Any, ...], options: dict[str, Any]
) -> Any:
    """The drafter of a module, with its options.

    Raises:
        ValueError: On an option that it does not take.
    """
    module, class_name = where
    try:
        return getattr(importlib.import_module(module), class_name)(*arguments, **options)
    except TypeError as error:
        raise ValueError(f"drafter {name!r} does not take these options: {error}") from error
