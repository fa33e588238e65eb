"""Tiny random transformers, and engines wired around them."""

import torch
import transformers
from supported import Supported

from mmspec.adapters.causal_lm import CausalTarget
from mmspec.drafters.jacobi import JacobiDrafter
from mmspec.drafters.model import EarlyExitDrafter, ModelDrafter
from mmspec.drafters.plain import PlainDrafter
from mmspec.engine import Engine
from mmspec.law_config import LawConfig
from mmspec.noise import row_keys
from mmspec.rows import TokenRows
from mmspec.sampling import build_law
from mmspec.schedule import FixedSchedule
from mmspec.verify import build_rule

VOCAB = 61
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def tiny_model(family: str = "Llama", *, dtype=torch.float64, attention="sdpa", seed=0, **changes):
    """A random decoder whose next tokens are far from uniform."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**(SHAPE | changes))
    config._attn_implementation = attention
    return getattr(transformers, f"{family}ForCausalLM")(config).to(dtype).eval()


def causal(family: str, class_name: str | None = None) -> Supported:
    """A family of plain decoders."""
    return Supported(
        family=family,
        class_name=class_name or f"{family}ForCausalLM",
        adapter="causal_lm",
        pipeline="SpeculativeTextPipeline",
    )


def make_rows(prompts, budgets, *, seed=1, **options) -> TokenRows:
    keys = row_keys(torch.Generator().manual_seed(seed), len(prompts))
    return TokenRows(prompts, max_new_tokens=budgets, keys_B=keys, **options)


def make_engine(
    rows: TokenRows,
    model,
    make_drafter="none",
    *,
    small=None,
    config: LawConfig | None = None,
    width: int = 4,
    rule: str = "exact",
    **target_options,
) -> Engine:
    """Wires an engine; ``make_drafter`` is a name or a function of (target, rows, law)."""
    config = config or LawConfig(temperature=0.0)
    law = build_law(config)
    target = CausalTarget(model, rows, **target_options)
    shared = rule == "exact"
    vocab = target.vocab_size
    table = {
        "none": lambda: PlainDrafter(rows, vocab),
        "jacobi": lambda: JacobiDrafter(
            rows,
            vocab,
            max_width=width,
            is_greedy=config.is_greedy,
            shared_noise=shared,
            keep_laws=not shared,
        ),
        "model": lambda: ModelDrafter(small, rows, vocab, law, shared_noise=shared),
        "clone": lambda: ModelDrafter(model, rows, vocab, law, shared_noise=shared),
        "early_exit": lambda: EarlyExitDrafter(
            target.forward, rows, vocab, law, num_layers=1, shared_noise=shared
        ),
    }
    drafter = make_drafter(target, rows, law) if callable(make_drafter) else table[make_drafter]()
    schedule = FixedSchedule(width, lambda: rows.max_remaining)
    return Engine(target, drafter, build_rule(rule, law, rows), schedule)
