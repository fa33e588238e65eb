"""Image models to measure, the captions that they are given, and who judges their pictures.

Bundled models come with held-out captions, some also with a module that reads off a picture what
its caption states. Two models have random weights and borrow captions: a tiny one, for the cost of
the loop alone, and one of middle size, whose forward costs about as much as that of a small real
model.
"""

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mmspec.adapters.token_image import TokenImageTarget, image_family
from mmspec.assets import bundled_names, bundled_path
from mmspec.bench.measure import Sample
from mmspec.bench.quality import Judge
from mmspec.bench.setups import CARD_WIDTHS, DTYPES, MID_SIZES, seeded, static_card
from mmspec.drafters.jacobi import JacobiDrafter
from mmspec.drafters.plain import PlainDrafter
from mmspec.engine import Engine
from mmspec.law_config import LawConfig
from mmspec.noise import row_keys
from mmspec.pipelines.image import SpeculativeImagePipeline
from mmspec.rows import TokenRows
from mmspec.sampling import Law, build_law
from mmspec.schedule import FixedSchedule
from mmspec.verify import SeededMatch

RANDOM_MODELS = ("tiny-image", "mid-image")
#: Whose captions a model is given that has none: one of random weights, or of the same data.
_LENDER = "avatars"
#: How much the mid-size model's head listens to the context: some four tokens per forward.
_MID_CONTEXT = 0.2

_VQ = {
    "embed_dim": 8,
    "latent_channels": 8,
    "base_channels": 32,
    "channel_multiplier": [1, 1],
    "num_res_blocks": 1,
}
_VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "patch_size": 4,
    "mlp_ratio": 2,
}


def image_models() -> tuple[str, ...]:
    """The models that `load_image` knows: the bundled ones and those of random weights."""
    return (*filter(_draws, bundled_names()), *RANDOM_MODELS)


def _draws(name: str) -> bool:
    """Whether a bundled folder holds a model that makes images."""
    config = bundled_path(name) / "config.json"
    return config.exists() and json.loads(config.read_text())["model_type"] == "janus"


def bundle_of(name: str) -> str:
    """The bundled folder whose files a model reads."""
    return _LENDER if name in RANDOM_MODELS else name.removeprefix("bundled:")


def load_image(name: str, dtype: str, device: str = "cpu") -> SpeculativeImagePipeline:
    """Loads an image pipeline by name, without a progress bar.

    Args:
        name: One of `image_models`, a bundled one with or without the prefix ``bundled:``.
        dtype: A name of `DTYPES`.
        device: Where to.

    Raises:
        ValueError: If a name is unknown.
    """
    name = name.removeprefix("bundled:")
    if name not in image_models() or dtype not in DTYPES:
        raise ValueError(
            f"unknown model {name!r} or dtype {dtype!r}; known: {', '.join(image_models())}; "
            f"{', '.join(DTYPES)}"
        )
    if name in RANDOM_MODELS:
        make = {"tiny-image": _tiny_janus, "mid-image": _mid_janus}[name]
        model = make().to(dtype=DTYPES[dtype])
        pipe = SpeculativeImagePipeline.from_model(model, _WordLengths())
    else:
        pipe = SpeculativeImagePipeline.from_pretrained(f"bundled:{name}", dtype=DTYPES[dtype])
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_captions(
    limit: int, name: str = _LENDER, *, is_fresh: bool = False
) -> list[dict[str, Any]]:
    """Held-out captions of a model, with what they state where that is known.

    Args:
        limit: How many at most.
        name: The model.
        is_fresh: Those that no decision about the model has looked at, if it has such.
    """
    paths = sorted(bundled_path(_captioned(name)).glob("heldout*.jsonl"))
    path = next((p for p in paths if is_fresh and p.stem == "heldout_fresh"), paths[0])
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()][:limit]


def _captioned(name: str) -> str:
    """The bundled folder whose captions a model is given."""
    folder = bundle_of(name)
    return folder if any(bundled_path(folder).glob("heldout*.jsonl")) else _LENDER


def judge_of(name: str) -> Judge | None:
    """Reads off pictures what captions state; None for models whose pictures nothing can judge."""
    folder = _captioned(name)
    if name in RANDOM_MODELS or not (bundled_path(folder) / "scoring.py").exists():
        return None
    module = importlib.import_module(f"mmspec.assets.{folder}.scoring")
    judge: Judge = module.attribute_accuracy
    return judge


class _WordLengths:
    """Words to ids, for a model that has learned none."""

    unk_token_id = None

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [1, *(5 + len(word) for word in text.split()), 98]}


def _tiny_janus() -> nn.Module:
    text = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "initializer_range": 0.3,
    }
    return _random_janus(text, num_codes=40, grid=8)


def _mid_janus() -> nn.Module:
    """The backbone of the mid-size text model, with codebook and grid of the published Janus.

    What the head says hardly depends on what came before, so that a share of the guesses holds, as
    with a trained model: a step that accepts nothing would have less to do.
    """
    model: Any = _random_janus(MID_SIZES, num_codes=16384, grid=24)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        head = model.model.generation_head.vision_head
        nn.init.normal_(head.weight, std=_MID_CONTEXT * head.in_features**-0.5)
        nn.init.normal_(head.bias, std=1.0)
    return model


def _random_janus(text: Mapping[str, Any], num_codes: int, grid: int) -> nn.Module:
    from transformers import JanusConfig, JanusForConditionalGeneration

    hidden = text["hidden_size"]
    config = JanusConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": 99,
            "max_position_embeddings": 1024,
            **text,
        },
        vision_config={
            **_VISION,
            "image_size": 4 * grid,
            "num_image_tokens": grid * grid,
            "projection_dim": hidden,
        },
        vq_config={
            **_VQ,
            "num_embeddings": num_codes,
            "num_patches": grid,
            "projection_dim": hidden,
            "hidden_size": hidden,
            "image_token_embed_dim": hidden,
        },
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = JanusForConditionalGeneration(config)
    model.generation_config.generation_kwargs = {"boi_token_id": 98}
    model.generation_config.pad_token_id = 0
    model.generation_config.bos_token_id = 1
    return model.eval()


# --------------------------------------------------------------------------- the same job


def image_rows(pipe: SpeculativeImagePipeline, captions: Sequence[str], seed: int) -> TokenRows:
    """Rows for these captions; row i draws with the generator of ``seed + 1000 * i``."""
    layout = image_family(pipe.model).layout(None, None)
    return TokenRows(
        [pipe._prompt_ids(text) for text in captions],
        max_new_tokens=[layout.num_tokens] * len(captions),
        keys_B=row_keys(seeded(seed, len(captions)), len(captions)),
        device=pipe.device,
    )


def image_engine(
    pipe: SpeculativeImagePipeline,
    captions: Sequence[str],
    *,
    width: int,
    guidance: float,
    temperature: float,
    seed: int,
    rule: Callable[[Law, TokenRows], Any] = SeededMatch,
    drafter: Callable[..., Any] = JacobiDrafter,
    **options: Any,
) -> Engine:
    """The exact decoder as the pipeline wires it; width 1 is plain decoding.

    Other decoders by what makes their rule and their window, with options of the window.
    """
    family = image_family(pipe.model)
    rows = image_rows(pipe, captions, seed)
    law = build_law(LawConfig(temperature=temperature))
    target = TokenImageTarget(family, rows, guidance_scale=guidance)
    window: Any = PlainDrafter(rows, target.vocab_size)
    if width > 1:
        stride = family.layout(None, None).stride
        options = {"stride": stride, "is_greedy": law.is_greedy, "mend": True} | options
        window = drafter(rows, target.vocab_size, max_width=width, **options)
    schedule = FixedSchedule(width, lambda: rows.max_remaining)
    return Engine(target, window, rule(law, rows), schedule)


def image_card(
    pipe: SpeculativeImagePipeline, name: str, batch: int, guidance: float
) -> list[Sample]:
    """The static card of an image model behind its captions."""
    captions = [entry["caption"] for entry in load_captions(batch, name)]
    rows = image_rows(pipe, captions, 0)
    target = TokenImageTarget(image_family(pipe.model), rows, guidance_scale=guidance)
    with torch.no_grad():
        target.prefill()
    widths = (*CARD_WIDTHS, 128) if rows.max_remaining >= 128 else CARD_WIDTHS
    return static_card(target, widths)
