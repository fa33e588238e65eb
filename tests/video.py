"""Tiny random video pipelines of the real classes, and what a call of diffusers gives."""

import json

import torch
from diffusers import (
    AnyFlowFARPipeline,
    AnyFlowFARTransformer3DModel,
    AutoencoderKLWan,
    FlowMapEulerDiscreteScheduler,
    HeliosPipeline,
    HeliosScheduler,
    HeliosTransformer3DModel,
)
from supported import Supported
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from mmspec.block_records import Judgement
from mmspec.records import Guarantee

FAR = Supported(
    family="AnyFlow-FAR",
    class_name="AnyFlowFARPipeline",
    adapter="video_anyflow",
    pipeline="SpeculativeVideoPipeline",
)
HELIOS = Supported(
    family="Helios",
    class_name="HeliosPipeline",
    adapter="video_helios",
    pipeline="SpeculativeVideoPipeline",
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


@torch.no_grad()
def eager(pipes, plan, *, num_steps, seed=0):
    """A slow reference out of diffusers' own methods: both models read every block at once.

    Args:
        pipes: Name -> pipeline.
        plan: For each block the names of the models that take its steps, in order.
        num_steps: Steps of a block.
        seed: Of the noise.
    """
    noise = torch.randn(1, 16, sum(BLOCKS), SIDE // 8, SIDE // 8, generator=seeded(seed))
    noise = noise.permute(0, 2, 1, 3, 4)
    output, caches = torch.zeros_like(noise), {}
    for name, pipe in pipes.items():
        pipe._guidance_scale, pipe._attention_kwargs = 1.0, None
        caches[name] = ({}, {"num_cached_chunks": 0, "is_cache_step": False})
        config = pipe.transformer.config
        shape = (2, 1, config.num_attention_heads, 64, config.attention_head_dim)
        for layer in range(config.num_layers):
            kinds = ("full_cache", "compressed_cache")
            caches[name][0][layer] = {kind: torch.zeros(shape) for kind in kinds}
    for index, names in enumerate(plan):
        start, stop = sum(BLOCKS[:index]), sum(BLOCKS[: index + 1])
        state = noise[:, start:stop]
        for step, name in enumerate(names):
            state = _eager_step(pipes[name], caches[name], state, index, step, num_steps)
        output[:, start:stop] = state
        for name, pipe in pipes.items():
            pipe.encode_kv_cache(
                *caches[name], chunk_partition=BLOCKS[: index + 1], chunk_idx=index,
                output=output, prompt_embeds=embeds(), negative_prompt_embeds=None,
            )  # fmt: skip
    return output.permute(0, 2, 1, 3, 4)


def _eager_step(pipe, cache, state, index, step, num_steps):
    scheduler = pipe.scheduler
    scheduler.set_timesteps(num_steps)
    frames = torch.ones(1, state.shape[1], dtype=torch.float64)
    velocity, _ = pipe.transformer(
        hidden_states=state, timestep=scheduler.timesteps[step] * frames,
        r_timestep=scheduler.sigmas[step + 1] * 1000 * frames,
        encoder_hidden_states=embeds(), chunk_partition=list(BLOCKS[: index + 1]),
        kv_cache=cache[0], kv_cache_flag=dict(cache[1]), return_dict=False,
    )  # fmt: skip
    return scheduler.step(velocity, scheduler.timesteps[step], state, return_dict=False)[0]


class Scripted:
    """A router that does as it is told, by block; looks at nothing unless it is asked to."""

    name = "scripted"
    guarantee = Guarantee.LOSSY
    needs_prompt = False

    def __init__(self, keep, *, score=0.0, wants=None, look=False):
        self.kept, self.score, self.look = keep, score, look
        self.wants = wants or [True] * len(keep)
        self.views = []

    def wants_draft(self, place):
        return self.wants[place.index]

    def judge(self, block):
        self.views.append(block)
        if self.look:
            block.frames()
        return Judgement(score=self.score, keep=self.kept[block.place.index])


def with_text(pipe):
    """The same pipeline with a tiny text encoder and its tokenizer."""
    words = ["a", "cat", "dog", "runs", "sleeps", "on", "the", "lawn"]
    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(4)
    config = UMT5Config(
        vocab_size=16, d_model=TEXT_DIM, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
    )  # fmt: skip
    pipe.register_modules(
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        ),
        text_encoder=UMT5EncoderModel(config).eval(),
    )
    return pipe


def helios_pipe(seed, *, num_layers=1):
    """A pipeline without a text encoder, without a cache and with guidance."""
    torch.manual_seed(seed)
    transformer = HeliosTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16,
        text_dim=TEXT_DIM, freq_dim=64, ffn_dim=32, num_layers=num_layers, rope_dim=(4, 4, 4),
    ).eval()  # fmt: skip
    scheduler = HeliosScheduler(stages=1, use_dynamic_shifting=True)
    pipe = HeliosPipeline(
        tokenizer=None, text_encoder=None, vae=wan_vae(), scheduler=scheduler,
        transformer=transformer,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


#: What `save_pair` writes into the target's folder: two blocks, 1 + 4 pictures.
DEFAULTS = {
    "num_frames": 5, "height": 16, "width": 16, "block_sizes": [1, 1], "num_inference_steps": 2,
    "drafter_steps": 1, "guidance_scale": 1.0, "router": "first-block", "max_sequence_length": 8,
    "fps": 8,
}  # fmt: skip


def save_pair(folder):
    """A target with its text encoder and defaults, and a drafter beside it; gives both folders."""
    target, drafter = folder / "target", folder / "target-drafter"
    with_text(far_pipe(1)).save_pretrained(target)
    (target / "defaults.json").write_text(json.dumps(DEFAULTS))
    far_pipe(2).save_pretrained(drafter)
    return target, drafter
