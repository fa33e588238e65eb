"""Every family decodes greedily to the tokens of transformers' own `generate`, ragged or not."""

import accelerate
import pytest
import torch
import transformers
from tiny import SHAPE, VOCAB, causal

import mmspec
from mmspec.adapters.causal_lm import CausalTarget
from mmspec.forward import text_device
from mmspec.noise import row_keys
from mmspec.rows import TokenRows

NUM_NEW = 18
PAD = VOCAB - 1

# What a family needs besides the common shape; windows are far shorter than the rows. Eager
# attention and grouped experts compute in float32, so those models are float32: in float64
# transformers' eager attention returns NaN for left-padded rows.
FLOAT32 = {"attention": "eager", "dtype": torch.float32}
FAMILIES = {
    "Llama": {},
    "Llama-eager": {} | FLOAT32,
    "Qwen2": {},
    "Qwen2-sliding": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "Qwen3": {},
    "Gemma2": {"sliding_window": 5, "query_pre_attn_scalar": 8} | FLOAT32,
    "Gemma3": {"sliding_window": 5, "query_pre_attn_scalar": 8, "sliding_window_pattern": 2},
    "Mistral": {"sliding_window": 5},
    "Mistral-full": {"sliding_window": None},
    "GPTNeoX": {"rotary_pct": 0.5},
    "GPT2": {},
    "Phi3": {"sliding_window": 6},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "dtype": torch.float32},
    "Qwen2Moe": {"num_experts": 4, "moe_intermediate_size": 16, "dtype": torch.float32},
}
CLASSES = {"GPT2": "GPT2LMHeadModel"}
TITLES = {"GPTNeoX": "GPT-NeoX", "GPT2": "GPT-2", "Qwen2Moe": "Qwen2-MoE"}
SUPPORTED = {
    name: causal(TITLES.get(key, key), CLASSES.get(key, f"{key}ForCausalLM"))
    for name in FAMILIES
    for key in [name.split("-")[0]]
}
SLIDING = {
    name: SUPPORTED[name]
    for name, changes in FAMILIES.items()
    if changes.get("sliding_window") is not None
}
DRAFTERS = {
    "jacobi": "jacobi",
    "early_exit": {"name": "early_exit", "num_layers": 1},
    "ngram": "ngram",
    "ngram tree": {"name": "ngram", "branching": 3},
    "clone": None,
}


def family_model(name: str):
    changes = dict(FAMILIES[name])
    family = name.split("-")[0]
    config_name = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
    attention, dtype = changes.pop("attention", "sdpa"), changes.pop("dtype", torch.float64)
    # Tied embeddings would make a random model repeat its input.
    changes |= {"pad_token_id": PAD, "tie_word_embeddings": False}
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(**(SHAPE | changes))
    config._attn_implementation = attention
    return getattr(transformers, SUPPORTED[name].class_name)(config).to(dtype).eval()


def batch(num_rows: int, longest: int = 12) -> dict:
    """Left-padded prompts of different lengths, the longest in the middle."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(0, PAD, (num_rows, longest), generator=generator)
    # The second half repeats the first, so that retrieval finds something.
    ids[:, longest // 2 :] = ids[:, : longest - longest // 2]
    mask = torch.ones_like(ids)
    for row in range(num_rows):
        mask[row, : (row * 5) % longest if row != num_rows // 2 else 0] = 0
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}


def greedy(model, inputs, custom_generate=None, **options):
    return model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=NUM_NEW,
        custom_generate=custom_generate,
        **options,
    )


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return family_model(request.param)


@pytest.mark.supports("greedy", SUPPORTED)
@pytest.mark.supports("sliding windows", SLIDING)
@pytest.mark.parametrize(
    "num_rows", [1, pytest.param(5, marks=pytest.mark.supports("batches", SUPPORTED))]
)
def test_greedy_equals_generate(model, num_rows):
    inputs = batch(num_rows)
    expected = greedy(model, inputs)
    assert len(set(expected[0, 12:].tolist())) > 2, "a constant output would prove little"
    for name, drafter in DRAFTERS.items():
        spec = model if name == "clone" else drafter
        fast = mmspec.speculate(spec, width=8, schedule="fixed")
        assert torch.equal(greedy(model, inputs, fast), expected), name
        if name == "clone":
            assert fast.stats.tau > 4


def test_a_tree_is_accepted_off_its_first_branch():
    """Trees move keys when they commit; make sure that happened in the test above."""
    model = family_model("Mistral")
    fast = mmspec.speculate({"name": "ngram", "branching": 3}, width=8, schedule="fixed")
    inputs = batch(5)
    options = {"max_new_tokens": 60, "do_sample": False}
    expected = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, **options, custom_generate=fast), expected)
    assert fast.stats.num_accepted > 5


OFFLOADED = ["jacobi", "ngram", "early_exit"]


@pytest.mark.parametrize("drafter", OFFLOADED)
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_weights(tmp_path, drafter, where):
    model = family_model("Llama")
    inputs = batch(3)
    expected = greedy(model, inputs)
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    assert model.get_input_embeddings().weight.device.type == "meta"
    assert text_device(model).type == "cpu"
    fast = mmspec.speculate(drafter, width=4, schedule="fixed")
    assert torch.equal(greedy(model, inputs, fast), expected)
    if drafter == "early_exit":
        assert 0 < fast.stats.num_accepted < fast.stats.num_drafted


@pytest.mark.parametrize("drafter", OFFLOADED)
def test_a_dispatched_model(tmp_path, drafter):
    model = family_model("Qwen3")
    inputs = batch(3)
    expected = greedy(model, inputs)
    names = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    device_map = names | {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = accelerate.dispatch_model(
        model, device_map, main_device="cpu", offload_dir=tmp_path, force_hooks=True
    )
    fast = mmspec.speculate(drafter, width=4, schedule="fixed")
    assert torch.equal(greedy(model, inputs, fast), expected)


def test_a_row_longer_than_the_context_is_refused():
    model = family_model("Llama")
    rows = TokenRows([[1] * 250], max_new_tokens=[10], keys_B=row_keys(None, 1))
    with pytest.raises(ValueError, match=r"260 in all; LlamaForCausalLM has a context of 256"):
        CausalTarget(model, rows)
