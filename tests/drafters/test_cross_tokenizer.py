"""Drafters with another tokenizer: never wrong, and right where the two models agree."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mmspec.adapters.causal_lm import CausalTarget
from mmspec.drafters import build_drafter
from mmspec.drafters.cross_tokenizer import shared_vocabulary
from mmspec.engine import Engine
from mmspec.law_config import LawConfig
from mmspec.noise import row_keys
from mmspec.rows import TokenRows
from mmspec.sampling import build_law
from mmspec.schedule import FixedSchedule
from mmspec.verify import build_rule

CORPUS = [
    "the cat sat on the mat and the dog sat on the cat",
    "a picture of a red cat and a blue dog on a mat",
    "def add(a, b): return a + b",
]
PROMPTS = ["the cat sat on", "a picture of a red dog and a blue", "def"]


def byte_bpe(vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def tiny_llama(vocab_size: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        initializer_range=0.15,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


@pytest.fixture(scope="module")
def target_tokenizer():
    return byte_bpe(330)


def generate(target_tokenizer, spec, *, temperature=0.0, rule="exact", width=6):
    model = tiny_llama(len(target_tokenizer), seed=0)
    rows = TokenRows(
        [target_tokenizer.encode(text) for text in PROMPTS],
        max_new_tokens=[14, 10, 18],
        keys_B=row_keys(torch.Generator().manual_seed(3), len(PROMPTS)),
    )
    law = build_law(LawConfig(temperature=temperature))
    target = CausalTarget(model, rows)
    drafter = build_drafter(
        spec, target=target, rows=rows, law=law, max_width=width, shared_noise=rule == "exact"
    )
    schedule = FixedSchedule(width, lambda: rows.max_remaining)
    return Engine(target, drafter, build_rule(rule, law, rows), schedule).run()


def spec_of(target_tokenizer, method, *, same_model=False):
    tokenizer = target_tokenizer if same_model else byte_bpe(280)
    model = tiny_llama(len(tokenizer), seed=0 if same_model else 1)
    return {
        "name": "cross_tokenizer",
        "model": model,
        "tokenizer": tokenizer,
        "target_tokenizer": target_tokenizer,
        "method": method,
    }


@pytest.mark.parametrize("method", ["string", "shared"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_output_is_that_of_plain_decoding(target_tokenizer, method, temperature):
    plain = generate(target_tokenizer, "none", temperature=temperature, width=1)
    drafted = generate(target_tokenizer, spec_of(target_tokenizer, method), temperature=temperature)
    assert drafted.units == plain.units
    assert drafted.stats.num_drafted > 0


@pytest.mark.parametrize("method", ["string", "shared"])
def test_a_clone_is_accepted_wholly(monkeypatch, method):
    # Without merges every text has one encoding, so a clone reads exactly what the target reads.
    letters = byte_bpe(256)
    cycle = letters.encode("the cat sod")  # every letter is followed by the next of these
    monkeypatch.setattr(f"{__name__}.tiny_llama", lambda size, seed: bigram_llama(size, cycle))
    drafted = generate(letters, spec_of(letters, method, same_model=True))
    # 18 tokens: one from the prefill, then 5 drafts and a bonus per step.
    assert drafted.stats.num_target_forwards == 1 + 3
    assert drafted.units == generate(letters, "none", width=1).units


def bigram_llama(vocab_size: int, cycle: list[int]) -> LlamaForCausalLM:
    """A Llama whose layers add nothing, so that the next token depends on the last alone."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size, hidden_size=256, intermediate_size=16, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=512,
        )
    ).double().eval()  # fmt: skip
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(256)[:vocab_size])
        model.lm_head.weight.zero_()
        unique = list(dict.fromkeys(cycle))
        model.lm_head.weight[unique[0]] = 0.1  # after any other token the cycle starts
        for token, following in zip(unique, unique[1:] + unique[:1], strict=True):
            model.lm_head.weight[following, token] = 1.0
    return model


@pytest.mark.parametrize("rule", ["speculative", "block"])
def test_shared_vocabulary_reports_its_law(target_tokenizer, rule):
    spec = spec_of(target_tokenizer, "shared", same_model=True)
    result = generate(target_tokenizer, spec, temperature=1.0, rule=rule)
    assert result.stats.tau > 2.0


def test_vocabularies_are_matched_by_spelling(target_tokenizer):
    own = byte_bpe(280)
    for target_id, own_id in shared_vocabulary(target_tokenizer, own):
        assert target_tokenizer.convert_ids_to_tokens(target_id) == own.convert_ids_to_tokens(
            own_id
        )


def test_unknown_method_is_refused(target_tokenizer):
    with pytest.raises(ValueError, match="method must be one of"):
        generate(target_tokenizer, spec_of(target_tokenizer, "telepathy"))
