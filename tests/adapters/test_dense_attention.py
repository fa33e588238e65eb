"""Attention as matrix products: flex attention to rounding, and nobody else's models change."""

import pytest
import torch
from diffusers.models.transformers import transformer_anyflow_far
from video import NUM_FRAMES, SIDE, embeds, far_pipe, helios_pipe, plain, seeded

from mmspec.adapters import dense_attention
from mmspec.adapters.dense_attention import DenseAttention
from mmspec.pipelines import SpeculativeVideoPipeline

pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]
STEPS = 2
#: How far results may be off: latents are of the size of 1.
ROUNDING = 1e-5


@pytest.fixture
def pipe():
    # Heads of 24 are wide enough for flex attention, those of 12 are padded by diffusers.
    target = far_pipe(1, num_layers=2, attention_head_dim=24)
    pipe = SpeculativeVideoPipeline.from_model(target, drafter=far_pipe(2))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe, **options):
    size = {"height": SIDE, "width": SIDE, "num_frames": NUM_FRAMES, "num_inference_steps": STEPS}
    given = {"prompt_embeds": embeds(), "generator": seeded(), "output_type": "latent"}
    return pipe(**size | given | options).frames


def count_flex(monkeypatch):
    """Calls of flex attention from here on."""
    own = transformer_anyflow_far.dispatch_attention_fn
    calls = []

    def counting(*arguments, backend=None, **options):
        calls.extend(["flex"] * (backend == "flex"))
        return own(*arguments, backend=backend, **options)

    monkeypatch.setattr(transformer_anyflow_far, "dispatch_attention_fn", counting)
    return calls


@pytest.mark.parametrize("router", ["never", "always", "every:2"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_dense_attention_is_flex_attention_to_rounding(pipe, router, guidance, monkeypatch):
    options = {"router": router, "guidance_scale": guidance, "negative_prompt_embeds": embeds(3)}
    flex = call(pipe, **options, attention="flex")
    assert torch.equal(call(pipe, **options), flex)
    calls = count_flex(monkeypatch)
    dense = call(pipe, **options, attention="dense")
    assert calls == []
    torch.testing.assert_close(dense, flex, atol=ROUNDING, rtol=0)
    call(pipe, **options)
    assert calls


def test_without_drafts_it_is_the_target_with_the_same_attention_to_the_bit(pipe):
    dense = call(pipe, attention="dense")
    flex = plain(pipe.target, num_steps=STEPS)
    assert torch.equal(call(pipe), flex)
    with DenseAttention(pipe.target.transformer):
        expected = plain(pipe.target, num_steps=STEPS)
    assert torch.equal(dense, expected)
    assert torch.equal(plain(pipe.target, num_steps=STEPS), flex)


def test_models_are_given_back_as_they_were(pipe):
    models = (pipe.target.transformer, pipe.drafter.transformer)

    def state():
        return [
            (
                [block.attn1.processor for block in model.blocks],
                "build_attention_mask" in vars(model),
            )
            for model in models
        ]

    before = state()
    stream = pipe.stream(
        prompt_embeds=embeds(), generator=seeded(), router="every:2", attention="dense",
        output_type="latent", height=SIDE, width=SIDE, num_frames=NUM_FRAMES,
        num_inference_steps=STEPS,
    )  # fmt: skip
    for _ in stream:
        assert state() == before

    def fail(*_, **__):
        raise ArithmeticError("no")

    models[0].proj_out.register_forward_pre_hook(fail)
    with pytest.raises(ArithmeticError):
        call(pipe, attention="dense")
    assert state() == before


def test_blocks_of_many_tokens():
    """Readings and steps above the 128 tokens that diffusers pads to a multiple of."""
    pipe = SpeculativeVideoPipeline.from_model(far_pipe(1))
    pipe.set_progress_bar_config(disable=True)
    for side in (64, 96):
        flex, dense = (
            call(pipe, height=side, width=side, attention=name) for name in ("flex", "dense")
        )
        torch.testing.assert_close(dense, flex, atol=ROUNDING, rtol=0)


def test_what_a_family_does_not_have_is_refused(pipe):
    with pytest.raises(ValueError, match="attention must be None or 'flex' or 'dense' for AnyFl"):
        call(pipe, attention="fast")
    helios = SpeculativeVideoPipeline.from_model(helios_pipe(1))
    with pytest.raises(ValueError, match="attention must be None for HeliosPipeline, got 'dense'"):
        call(helios, attention="dense", num_frames=33)


def test_masks_are_built_once_as_far_as_they_are_small(pipe, monkeypatch):
    built = []

    def building(*arguments, **options):
        built.append(1)
        return create_mask(*arguments, **options)

    create_mask = dense_attention.create_mask
    monkeypatch.setattr(dense_attention, "create_mask", building)
    first = call(pipe, router="never", attention="dense")
    num_built = len(built)
    assert num_built > 0
    assert torch.equal(call(pipe, router="never", attention="dense"), first)
    assert len(built) == num_built
    monkeypatch.setattr(dense_attention, "KEPT_BYTES", 1)
    assert torch.equal(call(pipe, router="never", attention="dense"), first)
    assert len(dense_attention._MASKS[pipe.target.transformer]) == 1
