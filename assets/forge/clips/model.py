"""The two models of the clips, and the attention that they are trained with."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AnyFlowFARTransformer3DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from mmspec.assets.clips.prompts import COLOURS, DIRECTIONS, OBJECTS, SPEEDS

from .train_vae import LATENT_CHANNELS

#: Blocks of one latent frame: one picture, then eight times four.
NUM_BLOCKS = 9
BLOCKS = (1,) * NUM_BLOCKS
#: Places of a latent frame after patches of 2 x 2.
TOKENS_PER_FRAME = 16
TEXT_DIM, TEXT_TOKENS = 64, 12
#: Layers, heads and channels per head.
SIZES = {"target": (4, 4, 30), "drafter": (2, 4, 30)}


def make_transformer(size: str) -> AnyFlowFARTransformer3DModel:
    """A model with random weights; "target" or "drafter"."""
    num_layers, num_heads, head_dim = SIZES[size]
    return AnyFlowFARTransformer3DModel(
        num_attention_heads=num_heads,
        attention_head_dim=head_dim,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=64,
        ffn_dim=4 * num_heads * head_dim,
        num_layers=num_layers,
        rope_max_seq_len=32,
        chunk_partition=BLOCKS,
        # One more than there are blocks: all of the past stays in full resolution.
        full_chunk_limit=NUM_BLOCKS + 1,
    )


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each word of the prompts."""
    words = ["a", "an", "moving", *COLOURS, *OBJECTS, *SPEEDS]
    words += sorted({word for direction in DIRECTIONS for word in direction.split()})
    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def make_text_encoder() -> UMT5EncoderModel:
    """A small text encoder. Its weights are random and stay so: they tell three dozen words apart.

    Both models learn to read it, so that they can be trained side by side.
    """
    torch.manual_seed(7)
    config = UMT5Config(
        vocab_size=len(make_tokenizer()), d_model=TEXT_DIM, d_kv=16, d_ff=128, num_layers=2,
        num_heads=4, dropout_rate=0.0,
    )  # fmt: skip
    return UMT5EncoderModel(config).eval().requires_grad_(False)


def encode_prompts(prompts: list[str]) -> Tensor:
    """Embeddings ``[N, tokens, channels]``; as in the pipeline, zero behind the end of a prompt."""
    encoded = make_tokenizer()(
        prompts, padding="max_length", max_length=TEXT_TOKENS, return_tensors="pt"
    )
    mask = encoded["attention_mask"]
    states = make_text_encoder()(encoded["input_ids"], mask).last_hidden_state
    return states * mask[..., None]


def training_mask() -> Tensor:
    """Who sees whom, ``[1, 1, tokens, 1 + tokens]`` to be added to the scores of attention.

    The sequence is all blocks noised, then all blocks clean. A noised block sees itself and the
    clean blocks before it, a clean one itself and those before. In generation diffusers pads the
    keys of a noised block with zeros up to a multiple of 128 tokens and lets them take part in
    the softmax; the first column stands for all of these.
    """
    num_tokens = NUM_BLOCKS * TOKENS_PER_FRAME
    block = torch.arange(NUM_BLOCKS).repeat_interleave(TOKENS_PER_FRAME)
    same, before = block[:, None] == block, block[:, None] > block
    noised = torch.cat([same, before], dim=1)
    clean = torch.cat([torch.zeros_like(same), same | before], dim=1)
    mask = torch.zeros(2 * num_tokens, 1 + 2 * num_tokens)
    mask[:, 1:].masked_fill_(~torch.cat([noised, clean]), -math.inf)
    mask[:num_tokens, 0] = math.log(-TOKENS_PER_FRAME % 128)
    mask[num_tokens:, 0] = -math.inf
    return mask[None, None]


class DenseAttention:
    """The processor of training: what flex attention computes, by a mask that is a tensor."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: dict[str, tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """Attends; arguments as those of diffusers' processor."""
        query, key, value = (
            part.unflatten(2, (attn.heads, -1)).transpose(1, 2)
            for part in (
                attn.norm_q(attn.to_q(hidden_states)),
                attn.norm_k(attn.to_k(hidden_states)),
                attn.to_v(hidden_states),
            )
        )
        query, key = (_rotated(part, *rotary_emb["turns"]) for part in (query, key))
        nothing = torch.zeros_like(key[:, :, :1])
        mixed = F.scaled_dot_product_attention(
            query.to(value.dtype),
            torch.cat([nothing, key], dim=2).to(value.dtype),
            torch.cat([nothing.to(value.dtype), value], dim=2),
            attn_mask=attention_mask.to(value.dtype),
        )
        mixed = mixed.transpose(1, 2).flatten(2, 3)
        return attn.to_out[1](attn.to_out[0](mixed))


def _rotated(part: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    even, odd = part.float().unflatten(3, (-1, 2)).unbind(-1)
    return torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1).flatten(3)


class RealTurns(nn.Module):
    """Turns of the positions as cosines and sines: complex numbers do not compile."""

    def __init__(self, turns: nn.Module) -> None:
        """Keeps diffusers' module, which has no weights."""
        super().__init__()
        self.turns = turns

    def forward(self, **arguments: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """As diffusers' module, under another name."""
        turns = self.turns(**arguments)["query"]
        return {"turns": (turns.real.float(), turns.imag.float())}


class Trainable(nn.Module):
    """A transformer that is trained on all blocks of a clip at once.

    Attributes:
        transformer: The model.
    """

    def __init__(self, size: str) -> None:
        """Random weights; "target" or "drafter"."""
        super().__init__()
        self.transformer = make_transformer(size)
        self.transformer.rope = RealTurns(self.transformer.rope)
        for block in self.transformer.blocks:
            block.attn1.set_processor(DenseAttention())
            block.compile()
        self.register_buffer("mask", training_mask(), persistent=False)

    def forward(
        self, noised: Tensor, clean: Tensor, time: Tensor, end: Tensor, text: Tensor
    ) -> Tensor:
        """The mean velocity of each block from its time to its end.

        Args:
            noised: ``[N, blocks, C, H, W]``.
            clean: The same without noise.
            time: ``[N, blocks]`` in 0 .. 1.
            end: The same.
            text: ``[N, tokens, channels]``.
        """
        return self.transformer(
            hidden_states=noised,
            timestep=time * 1000,
            r_timestep=end * 1000,
            encoder_hidden_states=text,
            chunk_partition=list(BLOCKS),
            attention_mask=self.mask,
            clean_hidden_states=clean,
            clean_timestep=torch.zeros_like(time),
            return_dict=False,
        )[0]
