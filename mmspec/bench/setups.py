"""Models to measure, and the same job given to transformers and to us.

Tiny random models stand for the case where the model costs nothing and the loop is everything;
they need no download, so every benchmark also runs on them.
"""

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from mmspec.adapters.causal_lm import CausalTarget
from mmspec.adapters.token_image import TokenImageTarget, image_family
from mmspec.assets import bundled_path
from mmspec.bench.measure import Sample, timed
from mmspec.drafters.jacobi import JacobiDrafter
from mmspec.drafters.plain import PlainDrafter
from mmspec.engine import Engine
from mmspec.law_config import LawConfig
from mmspec.noise import row_keys
from mmspec.pipelines.image import SpeculativeImagePipeline
from mmspec.records import Generation
from mmspec.rows import TokenRows
from mmspec.sampling import Law, build_law
from mmspec.schedule import FixedSchedule
from mmspec.speculation import Settings, build_engine
from mmspec.tree import pack_chain
from mmspec.verify import SeededMatch

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
TEXT_MODELS = ("smollm2", "tiny")
IMAGE_MODELS = ("avatars", "tiny-image")
CARD_WIDTHS = (1, 2, 4, 8, 16, 32, 64)

_TINY_VOCAB = 256
_TINY_CODES = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class TextModel:
    """A causal language model and how to talk to it.

    Attributes:
        name: For tables.
        model: The model, in evaluation mode.
        encode: One user turn to token ids.
        eos_token_ids: What ends an answer.
    """

    name: str
    model: Any
    encode: Callable[[str], list[int]]
    eos_token_ids: tuple[int, ...]

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return self.model.get_input_embeddings().weight.device

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.model.get_output_embeddings().weight.shape[0]


def load_text(name: str, dtype: str, device: str = "cpu", *, ends: bool = True) -> TextModel:
    """Loads a text model by name.

    Args:
        name: "smollm2" or "tiny".
        dtype: A name of `DTYPES`.
        device: Where to.
        ends: False makes every answer as long as allowed.

    Raises:
        ValueError: If a name is unknown.
    """
    if name not in TEXT_MODELS or dtype not in DTYPES:
        raise ValueError(
            f"unknown model {name!r} or dtype {dtype!r}; known: {', '.join(TEXT_MODELS)}; "
            f"{', '.join(DTYPES)}"
        )
    if name == "tiny":
        model: Any = _tiny_llama().to(dtype=DTYPES[dtype])

        def encode(text: str) -> list[int]:
            return [byte % _TINY_VOCAB for byte in text.encode()][:256]
    else:
        from mmspec.adapters.smollm2 import load_smollm2

        model, tokenizer = load_smollm2(DTYPES[dtype])

        def encode(text: str) -> list[int]:
            turn = [{"role": "user", "content": text}]
            ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"]
            return list(ids)

    model = model.to(device).eval()
    if not ends:
        model.generation_config.eos_token_id = None
    eos = model.generation_config.eos_token_id
    eos_ids = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
    return TextModel(name=name, model=model, encode=encode, eos_token_ids=eos_ids)


def _tiny_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=_TINY_VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


# --------------------------------------------------------------------------- text


def text_engine(
    loaded: TextModel,
    prompts: Sequence[Sequence[int]],
    *,
    drafter: str,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> Engine:
    """Our engine as `mmspec.speculate` wires it, with the exact rule.

    Row i of a seed draws with the generator of ``seed + 1000 * i``, whatever the drafter.
    """
    rows = TokenRows(
        prompts,
        max_new_tokens=[max_new_tokens] * len(prompts),
        keys_B=row_keys(seeded(seed, len(prompts)), len(prompts)),
        eos_token_ids=loaded.eos_token_ids,
        device=loaded.device,
    )
    law = build_law(LawConfig(temperature=temperature))
    return build_engine(loaded.model, rows, law, Settings(drafter=drafter))


def generate_text(
    loaded: TextModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    **options: object,
) -> list[list[int]]:
    """The same job for transformers' ``generate``; rows end with their first end token.

    Args:
        loaded: The model.
        prompts: Token ids; padded on the left for a batch.
        max_new_tokens: For every row.
        temperature: 0 is greedy; else the whole vocabulary is sampled.
        seed: For torch's global generator.
        **options: Such as ``prompt_lookup_num_tokens=10``.
    """
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    sampling: dict[str, object] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        torch.manual_seed(seed)
    output = loaded.model.generate(
        ids.to(loaded.device),
        attention_mask=mask.to(loaded.device),
        max_new_tokens=max_new_tokens,
        **sampling,
        **options,
    )
    return [_until_end(row, loaded.eos_token_ids) for row in output[:, longest:].tolist()]


def _until_end(tokens: list[int], eos_token_ids: Sequence[int]) -> list[int]:
    for index, token in enumerate(tokens):
        if token in eos_token_ids:
            return tokens[: index + 1]
    return tokens


def load_prompts(kinds: Sequence[str], limit: int | None = None) -> list[dict[str, Any]]:
    """The bundled prompts of these kinds, ``limit`` of each, in the order of the files."""
    found = []
    for kind in kinds:
        path = bundled_path("prompts") / f"{kind}.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines()
        found += [json.loads(line) for line in lines][:limit]
    return found


# --------------------------------------------------------------------------- images


def load_image(name: str, dtype: str, device: str = "cpu") -> SpeculativeImagePipeline:
    """Loads an image pipeline by name, without a progress bar.

    Args:
        name: "avatars" (bundled) or "tiny-image" (random weights).
        dtype: A name of `DTYPES`.
        device: Where to.

    Raises:
        ValueError: If a name is unknown.
    """
    if name not in IMAGE_MODELS or dtype not in DTYPES:
        raise ValueError(
            f"unknown model {name!r} or dtype {dtype!r}; known: {', '.join(IMAGE_MODELS)}; "
            f"{', '.join(DTYPES)}"
        )
    if name == "avatars":
        pipe = SpeculativeImagePipeline.from_pretrained("bundled:avatars", dtype=DTYPES[dtype])
    else:
        model = _tiny_janus().to(dtype=DTYPES[dtype])
        pipe = SpeculativeImagePipeline.from_model(model, _TinyProcessor())
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class _TinyProcessor:
    """Words to ids, for a model that has learned none."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [1, *(5 + len(word) for word in text.split()), 98]}


def _tiny_janus() -> nn.Module:
    from transformers import JanusConfig, JanusForConditionalGeneration

    config = JanusConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": 99,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 256,
            "initializer_range": 0.3,
        },
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 4,
            "projection_dim": 32,
            "num_image_tokens": 64,
            "mlp_ratio": 2,
        },
        vq_config={
            "embed_dim": 8,
            "num_embeddings": _TINY_CODES,
            "latent_channels": 8,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "projection_dim": 32,
            "num_patches": 8,
            "hidden_size": 32,
            "image_token_embed_dim": 32,
        },
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = JanusForConditionalGeneration(config)
    model.generation_config.generation_kwargs = {"boi_token_id": 98}
    model.generation_config.pad_token_id = 0
    model.generation_config.bos_token_id = 1
    return model


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
        options = {"stride": family.layout(None, None).stride, "is_greedy": law.is_greedy} | options
        window = drafter(rows, target.vocab_size, max_width=width, **options)
    schedule = FixedSchedule(width, lambda: rows.max_remaining)
    return Engine(target, window, rule(law, rows), schedule)


def load_captions(limit: int, *, is_fresh: bool = False) -> list[dict[str, Any]]:
    """Held-out captions of the avatars, with the attributes they state.

    Args:
        limit: How many at most.
        is_fresh: Those that no decision about the model has looked at.
    """
    path = bundled_path("avatars") / ("heldout_fresh.jsonl" if is_fresh else "heldout.jsonl")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()][:limit]


def seeded(seed: int, count: int) -> list[torch.Generator]:
    """One generator per row."""
    return [torch.Generator().manual_seed(seed + 1000 * row) for row in range(count)]


# --------------------------------------------------------------------------- the ceiling


@torch.no_grad()
def static_card(target: Any, widths: Sequence[int] = CARD_WIDTHS, repeats: int = 7) -> list[Sample]:
    """What a forward of N tokens per row costs, which bounds every speed-up.

    Args:
        target: A prefilled target; nothing is committed.
        widths: The N.
        repeats: Forwards of each N, taken in turn; the median counts.

    Returns:
        For each N ``width``, ``time_ms``, ``relative`` (cost over that of one token) and
        ``ceiling``: the speed-up if every draft of every step were accepted.
    """
    rows = target.rows
    device = rows.tokens_BT.device
    generator = torch.Generator().manual_seed(0)
    times: dict[int, list[float]] = {width: [] for width in widths}
    for repeat in range(repeats + 1):
        for width in widths:
            tokens = torch.randint(target.vocab_size, (rows.num_rows, width), generator=generator)
            tokens = tokens.to(device)
            tokens[:, 0] = rows.roots_B()
            proposal = pack_chain(tokens, [width - 1] * rows.num_rows, target.vocab_size)
            _, elapsed_s = timed(partial(target.score, proposal), device)
            if repeat:  # the first round warms up
                times[width].append(elapsed_s)
    one = statistics.median(times[widths[0]])
    card = []
    for width in widths:
        cost = statistics.median(times[width])
        card.append(
            {
                "width": width,
                "time_ms": 1e3 * cost,
                "relative": cost / one,
                "ceiling": width * one / cost,
            }
        )
    return card


def text_card(loaded: TextModel, batch: int) -> list[Sample]:
    """The static card of a text model behind a prompt of the bundled set."""
    prompts = [loaded.encode(entry["prompt"]) for entry in load_prompts(["edit"], batch)]
    rows = TokenRows(
        (prompts * batch)[:batch],
        max_new_tokens=[128] * batch,
        keys_B=torch.zeros(batch, dtype=torch.long),
        device=loaded.device,
    )
    target = CausalTarget(loaded.model, rows)
    with torch.no_grad():
        target.prefill()
    return static_card(target)


def image_card(pipe: SpeculativeImagePipeline, batch: int, guidance: float) -> list[Sample]:
    """The static card of an image model behind its captions."""
    captions = [entry["caption"] for entry in load_captions(batch)]
    rows = image_rows(pipe, captions, 0)
    target = TokenImageTarget(image_family(pipe.model), rows, guidance_scale=guidance)
    with torch.no_grad():
        target.prefill()
    widths = (*CARD_WIDTHS, 128) if rows.max_remaining >= 128 else CARD_WIDTHS
    return static_card(target, widths)


def step_figures(result: Generation) -> Sample:
    """What a sample keeps of a generation: counts that can be added up over samples."""
    pairs = [
        (accepted, levels)
        for step in result.steps
        for accepted, levels, active in zip(
            step.num_accepted, step.num_levels, step.was_active, strict=True
        )
        if active
    ]
    deepest = max((levels for _, levels in pairs), default=0)
    stats = result.stats
    return {
        "guarantee": str(stats.guarantee),
        "num_steps": stats.num_target_forwards,
        "num_row_steps": len(pairs),
        "num_drafted": stats.num_drafted,
        "num_accepted": stats.num_accepted,
        "tau": stats.tau,
        "tried_at": [sum(n > d and a >= d for a, n in pairs) for d in range(deepest)],
        "held_at": [sum(n > d and a > d for a, n in pairs) for d in range(deepest)],
        "prefill_time_s": stats.prefill_time_s,
        "draft_time_s": stats.draft_time_s,
        "verify_time_s": stats.verify_time_s,
        "other_time_s": stats.other_time_s,
    }
