"""Chameleon in the image pipeline, against a loop by hand over its decoder and head."""

import random

import pytest
import torch
from chameleon import (
    BOI,
    BOS,
    CHAMELEON,
    NUM_CODES,
    PROMPTS,
    SEP,
    SIDE,
    image_decoder,
    tiny_chameleon,
    tiny_processor,
)
from transformers import DynamicCache

from mmspec.pipelines import SpeculativeImagePipeline

NEGATIVES = [None, "lowres", ["lowres hair and glasses", "a", "", "blue"]]


def make_pipe(model, processor, **options) -> SpeculativeImagePipeline:
    pipe = SpeculativeImagePipeline.from_model(model, processor, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def model():
    return tiny_chameleon()


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture
def pipe(model, processor) -> SpeculativeImagePipeline:
    return make_pipe(model, processor, image_decoder=image_decoder)


def seeds(*values: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(value) for value in values]


def run(pipe, prompt=PROMPTS, **options):
    count = 1 if isinstance(prompt, str) else len(prompt)
    options = {"generator": seeds(*range(count)), "output_type": "tokens"} | options
    return pipe(prompt, **options)


@torch.no_grad()
def by_hand(model, ids, negative_ids, guidance) -> list[int]:
    """Greedy codes of one prompt: the decoder, the head over everything, the codes kept."""
    code_ids = [model.model.vocabulary_mapping.img2bpe[code] for code in range(NUM_CODES)]
    inputs = [torch.tensor([prompt]) for prompt in (ids, negative_ids)]
    caches = [DynamicCache(), DynamicCache()]
    codes = []
    for _ in range(SIDE * SIDE):
        logits, negative = (
            model.lm_head(model.model(x, past_key_values=c).last_hidden_state)[0, -1, code_ids]
            for x, c in zip(inputs, caches, strict=True)
        )
        codes.append(int((negative + guidance * (logits - negative)).argmax()))
        inputs = [torch.tensor([[code_ids[codes[-1]]]])] * 2
    return codes


@pytest.mark.supports("greedy", CHAMELEON)
@pytest.mark.supports("processor", CHAMELEON)
@pytest.mark.parametrize("guidance", [1.0, 3.0, 0.5])
@pytest.mark.parametrize("negative", [None, "lowres hair"])
@pytest.mark.parametrize("change", [None, "is_shuffled", "swin_norm"])
def test_greedy_is_that_of_the_decoder_and_the_head(guidance, negative, change):
    model = tiny_chameleon(**({change: True} if change else {}))
    processor = tiny_processor(is_shuffled=change == "is_shuffled")
    options = {"guidance_scale": guidance, "negative_prompt": negative, "temperature": 0.0}
    ours = run(make_pipe(model, processor), window=8, **options).tokens
    for row, text in enumerate(PROMPTS):
        ids = [*processor.tokenizer(text)["input_ids"], SEP, BOI]
        other = [BOS, BOI]  # Chameleon's own code leaves the prompt out
        if negative is not None:
            other = [*processor.tokenizer(negative)["input_ids"], SEP, BOI]
        assert ids[0] == BOS
        assert ours[row].tolist() == by_hand(model, ids, other, guidance)


@pytest.mark.supports("sampled", CHAMELEON)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("window", [1, 2, 7, 16, 64])
def test_exact_is_sequential_for_every_window(pipe, guidance, temperature, window):
    options = {"guidance_scale": guidance, "temperature": temperature}
    plain = run(pipe, decoder="sequential", **options)
    fast = run(pipe, window=window, **options)
    assert torch.equal(fast.tokens, plain.tokens)
    assert plain.stats.num_target_forwards == SIDE * SIDE
    if window > 2:
        assert fast.stats.num_accepted > 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(50))
def test_exact_is_sequential_for_random_settings(pipe, seed):
    dice = random.Random(seed)
    count = dice.randint(1, 4)
    prompts = dice.sample(PROMPTS, count)
    options = {
        "negative_prompt": dice.choice([None, "lowres", ["lowres hair", "a", "", "b"][:count]]),
        "guidance_scale": dice.choice([1.0, 0.0, 1.5, 3.0, 7.5]),
        "temperature": dice.choice([0.0, 0.5, 1.0, 1.3]),
        "top_k": dice.choice([None, 3, 12]),
        "top_p": dice.choice([None, 0.8]),
    }
    plain = run(pipe, prompts, decoder="sequential", **options)
    for window in (1, 2, 3, 7, 16, 33, 64, None):
        assert torch.equal(run(pipe, prompts, window=window, **options).tokens, plain.tokens)


@pytest.mark.supports("batches", CHAMELEON)
@pytest.mark.parametrize("decoder", ["sequential", "exact", "coupled", "sjd"])
def test_row_of_a_batch_is_its_single_run(pipe, decoder):
    options = {"decoder": decoder, "window": 8}
    batch = run(pipe, negative_prompt=NEGATIVES[2], **options).tokens
    for row, (prompt, negative) in enumerate(zip(PROMPTS, NEGATIVES[2], strict=True)):
        options["generator"] = seeds(row)
        single = run(pipe, prompt, negative_prompt=negative, **options).tokens
        assert torch.equal(batch[row], single[0])


def test_a_supplied_decoder_makes_the_pixels(pipe):
    out = run(pipe, output_type="pt", window=8)
    assert out.images.shape == (len(PROMPTS), 3, 2 * SIDE, 2 * SIDE)
    read_back = (out.images[:, 0, ::2, ::2] * (NUM_CODES - 1)).round().long()
    assert torch.equal(read_back.flatten(1), out.tokens)
    assert [image.size for image in run(pipe, output_type="pil").images] == [(8, 8)] * len(PROMPTS)


@pytest.mark.parametrize("returned", [None, torch.zeros(4, 8, 8, 3), torch.zeros(1, 3, 8, 8)])
def test_a_decoder_that_returns_something_else_is_named(model, processor, returned):
    pipe = make_pipe(model, processor, image_decoder=lambda codes: returned)
    with pytest.raises(ValueError, match=r"image_decoder returns must be of the shape \[4, 3, "):
        run(pipe, output_type="pil")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_type": "pil"}, "Chameleon has no pixel decoder.*image_decoder="),
        ({"height": 8}, "Chameleon makes images of one size"),
        ({"negative_prompt": "a " * 60}, "has a context of 64"),
    ],
)
def test_bad_options_are_refused_before_any_forward(
    model, processor, monkeypatch, options, message
):
    def fail(*args, **kwargs):
        raise AssertionError("a forward ran before the arguments were checked")

    monkeypatch.setattr(model.model, "forward", fail)
    with pytest.raises(ValueError, match=message):
        run(make_pipe(model, processor), **options)


def test_what_does_not_fit_is_refused(model, processor):
    with pytest.raises(ValueError, match="Chameleon needs its ChameleonProcessor"):
        run(make_pipe(model, processor.tokenizer))
    with pytest.raises(ValueError, match="image_decoder must be None or callable, got 3"):
        make_pipe(model, processor, image_decoder=3)
    broken = tiny_chameleon()
    del broken.model.vocabulary_mapping.vocab_map["<racm3:break>"]
    with pytest.raises(ValueError, match="and no <racm3:break>"):
        make_pipe(broken, processor)
