"""Models to measure, and the same job given to transformers and to us.

Tiny random models stand for the case where the model costs nothing and the loop is everything;
they need no download, so every benchmark also runs on them. Random models of middle size have
forwards of about 30 ms. Image models are in `mmspec.bench.image_setups`.
"""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from mmspec.adapters.causal_lm import CausalTarget
from mmspec.assets import bundled_path
from mmspec.bench.measure import Sample, timed
from mmspec.engine import Engine
from mmspec.law_config import LawConfig
from mmspec.noise import row_keys
from mmspec.records import Generation
from mmspec.rows import TokenRows
from mmspec.sampling import build_law
from mmspec.speculation import Settings, build_engine
from mmspec.tree import pack_chain

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
TEXT_MODELS = ("smollm2", "tiny", "mid")
CARD_WIDTHS = (1, 2, 4, 8, 16, 32, 64)

#: Layers whose weights take about 30 ms to read on two cores: a small model, yet a real one.
MID_SIZES = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "initializer_range": 0.05,
}
_RANDOM: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
    },
    "mid": {"vocab_size": 32000, "tie_word_embeddings": True, **MID_SIZES},
}


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
        name: One of `TEXT_MODELS`.
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
    if name in _RANDOM:
        model: Any = _random_llama(name).to(dtype=DTYPES[dtype])

        def encode(text: str) -> list[int]:
            return list(text.encode())[:256]
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


def _random_llama(name: str) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**_RANDOM[name], max_position_embeddings=1024)
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
    return generate_rows(
        loaded.model,
        {"input_ids": ids.to(loaded.device), "attention_mask": mask.to(loaded.device)},
        eos_token_ids=loaded.eos_token_ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        **options,
    )


def generate_rows(
    model: Any,
    inputs: Mapping[str, Any],
    *,
    eos_token_ids: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    seed: int,
    **options: object,
) -> list[list[int]]:
    """As `generate_text`, with whatever inputs the model takes; ``input_ids`` among them."""
    sampling: dict[str, object] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        torch.manual_seed(seed)
    output = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        **sampling,
        **options,
    )
    new = output[:, inputs["input_ids"].shape[1] :].tolist()
    return [_until_end(row, eos_token_ids) for row in new]


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


# --------------------------------------------------------------------------- both


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
