"""Tiny random video pipelines of the real classes, and what a call of diffusers gives."""

import torch
from diffusers import (
    AnyFlowFARPipeline,
    AnyFlowFARTransformer3DModel,
    AutoencoderKLWan,
    FlowMapEulerDiscreteScheduler,
)

#: Blocks of the tiny videos in latent frames: 13 pictures, 1 + 8 + 4.
BLOCKS = (1, 2, 1)
NUM_FRAMES, SIDE = 13, 32
TEXT_DIM, TEXT_TOKENS = 32, 8


def wan_vae(*, seed=0, **settings) -> AutoencoderKLWan:
    torch.manual_seed(seed)
    config = {
        "base_dim": 3, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1,
        "temperal_downsample": [False, True, True],
    } | settings  # fmt: skip
    return AutoencoderKLWan(**config).eval()


def far_pipe(seed, *, num_layers=1, vae=None, **settings):
    """A pipeline without a text encoder; older blocks are compressed from the third on."""
    torch.manual_seed(seed)
    config = {
        "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 16,
        "out_channels": 16, "text_dim": TEXT_DIM, "freq_dim": 64, "ffn_dim": 32,
        "num_layers": num_layers, "rope_max_seq_len": 32, "chunk_partition": BLOCKS,
        "full_chunk_limit": 2,
    } | settings  # fmt: skip
    transformer = AnyFlowFARTransformer3DModel(**config).eval()
    pipe = AnyFlowFARPipeline(
        tokenizer=None,
        text_encoder=None,
        transformer=transformer,
        vae=vae or wan_vae(),
        scheduler=FlowMapEulerDiscreteScheduler(shift=5.0),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def embeds(seed=0, num_rows=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, TEXT_TOKENS, TEXT_DIM, generator=generator)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def plain(pipe, *, num_steps, seed=0, output_type="latent", **arguments):
    """The video that diffusers' own call makes."""
    arguments = {"prompt_embeds": embeds(), "generator": seeded(seed)} | arguments
    return pipe(
        height=SIDE, width=SIDE, num_frames=NUM_FRAMES, num_inference_steps=num_steps,
        output_type=output_type, **arguments,
    ).frames  # fmt: skip
