"""Where transformers alone is wrong or crashes on image models, and this library is not.

A test here that fails after an update of transformers may be good news: then the note about it in
the documentation goes. Defects of GLM-Image between and inside requests are named in
`tests/adapters/test_image_glm.py`, those of diffusers in `tests/pipelines/test_glm_image.py`.
"""

import pytest
import torch
from chameleon import BOI, BOS, NUM_CODES, PROMPTS, SIDE, tiny_chameleon
from chameleon import tiny_processor as chameleon_processor
from emu3 import tiny_emu3
from glm import START, glm_model
from saved import save_janus
from transformers import AutoTokenizer, JanusForConditionalGeneration

import mmspec
from mmspec.pipelines import SpeculativeImagePipeline

TOKENS = 16
BEGIN_OF_IMAGE = 60


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


# ------------------------------------------------------------------------------------- Janus
@pytest.fixture(scope="module")
def janus(tmp_path_factory):
    folder = save_janus(tmp_path_factory.mktemp("janus"), num_codes=64)
    model = JanusForConditionalGeneration.from_pretrained(folder, dtype=torch.float64)
    pipe = quiet(SpeculativeImagePipeline.from_model(model, AutoTokenizer.from_pretrained(folder)))
    ids = torch.tensor([[*pipe.processor("a red hair")["input_ids"], BEGIN_OF_IMAGE]])

    def theirs(**options):
        options = {"attention_mask": torch.ones_like(ids), "do_sample": False} | options
        return model.generate(ids, generation_mode="image", **options)

    def ours(**options):
        return pipe("a red hair", output_type="tokens", **options).tokens

    return theirs, ours


def test_janus_needs_a_mask_and_does_not_say_so(janus):
    theirs, ours = janus
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'repeat'"):
        theirs(attention_mask=None)
    assert ours(temperature=0.0).shape == (1, TOKENS)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_janus_crashes_at_and_below_guidance_1(janus, scale):
    theirs, ours = janus
    with pytest.raises(RuntimeError):
        theirs(guidance_scale=scale)
    plain, fast = (ours(guidance_scale=scale, decoder=d, temperature=0.0)
                   for d in ("sequential", "exact"))  # fmt: skip
    assert torch.equal(plain, fast)


def test_janus_ignores_max_new_tokens(janus):
    theirs, _ = janus
    assert theirs(max_new_tokens=3, guidance_scale=3.0).shape == (1, TOKENS)


def test_janus_keeps_50_codes_unless_told_otherwise(janus, monkeypatch):
    theirs, ours = janus
    kept, draw = [], torch.multinomial

    def watched(probs, **options):
        kept.append(int((probs > 0).sum()))
        return draw(probs, **options)

    monkeypatch.setattr(torch, "multinomial", watched)
    theirs(do_sample=True, guidance_scale=1.5)
    assert kept == [50] * TOKENS

    laws = []
    verify = mmspec.verify.SeededMatch.verify

    def seen(rule, proposal, scores):
        laws.append((verdict := verify(rule, proposal, scores)).law_logits_BNV)
        return verdict

    monkeypatch.setattr(mmspec.verify.SeededMatch, "verify", seen)
    ours(guidance_scale=1.5, decoder="sequential")
    assert all(int(law.isfinite().sum()) == 64 for law in laws)


# -------------------------------------------------------------------------------------- Emu3
def test_assisted_decoding_of_emu3_is_silently_wrong_with_guidance():
    model = tiny_emu3()
    wrong = {1.0: 0, 3.0: 0}
    for seed in range(10):
        made = torch.Generator().manual_seed(seed)
        ids = torch.randint(10, 21, (1, 6), generator=made).repeat(1, 3)
        for scale in wrong:
            options = {"max_new_tokens": 24, "do_sample": False, "guidance_scale": scale}
            options |= {"attention_mask": torch.ones_like(ids)}
            plain = model.generate(ids, **options)
            assisted = model.generate(ids, prompt_lookup_num_tokens=4, **options)
            wrong[scale] += not torch.equal(assisted, plain)
            fast = mmspec.speculate("ngram", width=8, schedule="fixed")
            assert torch.equal(model.generate(ids, custom_generate=fast, **options), plain)
    assert wrong == {1.0: 0, 3.0: 10}


# --------------------------------------------------------------------------------- GLM-Image
def test_prompt_lookup_crashes_at_the_end_of_a_glm_image():
    model = glm_model(seed=4)
    ids = torch.tensor([[49, 50, 49, 50, 49, 50, START]])
    options = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "image_grid_thw": torch.tensor([[1, 6, 6], [1, 4, 4]]),
        "images_per_sample": torch.tensor([2]),
        "do_sample": False,
        "max_new_tokens": 6 * 6 + 4 * 4 + 1,  # the codes and the end mark, as diffusers asks for
    }
    plain = model.generate(**options)
    # A draft that reaches past the last known position gets none.
    with pytest.raises(RuntimeError, match="must match the size"):
        model.generate(**options, prompt_lookup_num_tokens=4)
    fast = mmspec.speculate("ngram", width=8, schedule="fixed")
    assert torch.equal(model.generate(**options, custom_generate=fast), plain)


# --------------------------------------------------------------------------------- Chameleon
def test_generate_draws_the_codes_of_chameleon_uniformly():
    model = tiny_chameleon()
    ids = [model.model.vocabulary_mapping.img2bpe[code] for code in range(NUM_CODES)]
    prompt = torch.tensor([[BOS, 8, 9, BOI]])
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=True,
        top_k=0,
        max_new_tokens=SIDE * SIDE,
        prefix_allowed_tokens_fn=lambda row, so_far: ids,
        return_dict_in_generate=True,
        output_scores=True,
    )
    for scores in output.scores:
        assert scores[0, ids].unique().numel() == 1
    greedy = {"temperature": 0.0, "output_type": "tokens", "guidance_scale": 1.0}
    pipe = quiet(SpeculativeImagePipeline.from_model(model, chameleon_processor()))
    assert pipe(PROMPTS[0], **greedy).tokens.unique().numel() > 1
