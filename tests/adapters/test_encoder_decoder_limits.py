"""Encoder-decoders: what is refused by name, and where transformers alone is wrong."""

import pytest
import torch
import transformers
from encoder_decoders import (
    NUM_NEW,
    PAD,
    START,
    TEXTS,
    VOCAB,
    clone_of,
    decoded,
    fixed,
    made,
    request,
    tiny_encoder_decoder,
)
from tiny import tiny_model

# --------------------------------------------------------------------------- refusals


def t5():
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(vocab_size=VOCAB, decoder_start_token_id=0, **shape)
    return transformers.T5ForConditionalGeneration(config)


def captioner():
    tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    tower |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 4}
    decoder = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1
    )
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.ViTConfig(**tower), decoder
    )
    config.decoder_start_token_id = 0
    return transformers.VisionEncoderDecoderModel(config)


def test_other_encoder_decoders_are_refused_by_name():
    with pytest.raises(
        ValueError, match=r"T5ForConditionalGeneration .* not supported \(model type 't5'; known: b"
    ):
        decoded(t5(), {"input_ids": torch.tensor([[1, 2]])}, fixed("ngram"))
    with pytest.raises(ValueError, match=r"VisionEncoderDecoderModel has a decoder of type 'gpt2'"):
        decoded(captioner(), {"pixel_values": torch.rand(1, 3, 16, 16)}, fixed("ngram"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 3}, r"'beam_search' .* \(num_beams=3.*; pass num_beams=1"),
        ({"guidance_scale": 2.0}, "guidance_scale is not supported for models that read images"),
        ({"max_new_tokens": 96}, "context of 96"),
        (
            {
                "past_key_values": transformers.EncoderDecoderCache(
                    *[transformers.DynamicCache()] * 2
                )
            },
            "past_key_values of an earlier call are not supported for encoder-decoders",
        ),
    ],
    ids=["beams", "guidance", "context", "cache"],
)
def test_what_cannot_be_honoured_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        decoded(made("florence2"), request("florence2", TEXTS), fixed("ngram"), **options)


def drafter_of_another_image_token():
    model = tiny_encoder_decoder("florence2")
    model.config.image_token_id = 49
    return model


@pytest.mark.parametrize(
    ("drafter", "message"),
    [
        (lambda: made("bart"), "BartForConditionalGeneration does not read what Florence2For"),
        (
            drafter_of_another_image_token,
            "the drafter's image_token_id is 49, that of the target 50",
        ),
        (
            lambda: {"name": "model", "model": made("florence2"), "visual_tokens": "none"},
            "visual_tokens='none' is not possible for Florence2ForConditionalGeneration",
        ),
        (
            lambda: {"name": "model", "model": tiny_model("Llama"), "visual_tokens": "all"},
            "LlamaForCausalLM does not read what Florence2ForConditionalGeneration's encoder reads",
        ),
    ],
    ids=["family", "image token", "none", "all"],
)
def test_a_drafter_that_cannot_read_what_the_encoder_reads_is_refused(drafter, message):
    with pytest.raises(ValueError, match=message):
        decoded(made("florence2"), request("florence2", TEXTS), fixed(drafter()))


def test_encoder_outputs_alone_are_nothing_for_a_drafter_with_an_encoder():
    model = made("donut")
    outputs = model.encoder(request("donut", TEXTS)["pixel_values"])
    inputs = {"encoder_outputs": outputs}
    expected = decoded(model, request("donut", TEXTS))
    assert torch.equal(decoded(model, inputs, fixed("jacobi")), expected)
    with pytest.raises(ValueError, match="needs pixel_values, and `generate` was given encoder_ou"):
        decoded(model, inputs, fixed(clone_of(model)))


# --------------------------------------------------------------------------- transformers alone


def forwards_of(model):
    """Forwards of a model from now on."""
    counts = []
    model.register_forward_hook(lambda *_: counts.append(1))
    return counts


@pytest.mark.parametrize("name", ["donut", "florence2"])
def test_assisted_decoding_of_transformers_hardly_believes_a_clone(name):
    """It feeds Donut's prefix twice behind a filled cache, and shows Florence-2 no image."""
    model, assistant = (tiny_encoder_decoder(name) for _ in range(2))
    inputs = request(name, TEXTS[:1])
    expected = decoded(model, inputs)
    counts = forwards_of(model)
    settings = {"": 5, "_schedule": "constant"}
    for ending, value in settings.items():
        setattr(assistant.generation_config, f"num_assistant_tokens{ending}", value)
    assistant.generation_config.assistant_confidence_threshold = 0
    assert torch.equal(decoded(model, inputs, assistant_model=assistant), expected)
    assert len(counts) >= 2 * -(-NUM_NEW // 6)
    fast = fixed(clone_of(model))
    assert torch.equal(decoded(model, inputs, fast), expected)
    assert fast.stats.num_target_forwards == 1 + -(-NUM_NEW // 6)


def test_transformers_counts_padding_of_decoder_prompts_as_positions():
    model = made("nougat")
    inputs = request("nougat", TEXTS[:2])
    inputs["decoder_input_ids"] = torch.tensor([[START, 7, 8, 9], [PAD, PAD, START, 7]])
    inputs["decoder_attention_mask"] = (inputs["decoder_input_ids"] != PAD).long()
    alone = {
        "pixel_values": inputs["pixel_values"][1:],
        "decoder_input_ids": torch.tensor([[START, 7]]),
    }
    assert not torch.equal(decoded(model, inputs)[1:, 4:], decoded(model, alone)[:, 2:])


def test_transformers_counts_a_decoder_by_the_layers_of_the_encoder():
    model = tiny_encoder_decoder("donut", encoder_layers=1)
    inputs = request("donut", TEXTS)
    with pytest.raises(IndexError):
        decoded(model, inputs)
    plain = decoded(model, inputs, use_cache=False)
    for drafter in ("ngram", "jacobi", {"name": "early_exit", "num_layers": 1}):
        assert torch.equal(decoded(model, inputs, fixed(drafter)), plain)
