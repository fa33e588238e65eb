"""The original ImageReward network at tiny size: its names and its arithmetic."""

import torch
from torch.nn import functional

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "a",
    "red",
    "cat",
    "dog",
    "on",
    "the",
    "lawn",
]
VISION, TEXT, LAYERS, PATCH, SIDE, POSITIONS = 192, 128, 2, 8, 16, 64
VISION_HEADS, TEXT_HEADS = 3, 2
HEAD_LAYERS = (0, 2, 4, 6, 7)


class _Weights:
    """Random weights by name."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)
        self.state = {}

    def table(self, name, *shape, scale=1.0, shift=0.0):
        self.state[name] = shift + scale * torch.randn(*shape, generator=self.generator)

    def linear(self, name, num_in, num_out):
        self.table(f"{name}.weight", num_out, num_in, scale=num_in**-0.5)
        self.table(f"{name}.bias", num_out, scale=0.3)

    def norm(self, name, size):
        self.table(f"{name}.weight", size, scale=0.3, shift=1.0)
        self.table(f"{name}.bias", size, scale=0.3)


def official_state(seed=0):
    """Random weights under the names of the published file, at tiny size."""
    made = _Weights(seed)
    _fill_vision(made)
    _fill_text(made)
    made.linear("blip.vision_proj", VISION, 16)
    made.linear("blip.text_proj", TEXT, 16)
    # Dropout has the numbers between.
    sizes = (TEXT, 64, 32, 16, 8, 1)
    for number, num_in, num_out in zip(HEAD_LAYERS, sizes, sizes[1:], strict=False):
        made.linear(f"mlp.layers.{number}", num_in, num_out)
    return made.state


def _fill_vision(made):
    eye = "blip.visual_encoder"
    made.table(f"{eye}.cls_token", 1, 1, VISION)
    made.table(f"{eye}.pos_embed", 1, (SIDE // PATCH) ** 2 + 1, VISION)
    made.table(f"{eye}.patch_embed.proj.weight", VISION, 3, PATCH, PATCH, scale=1 / 14)
    made.table(f"{eye}.patch_embed.proj.bias", VISION)
    for layer in range(LAYERS):
        block = f"{eye}.blocks.{layer}"
        made.norm(f"{block}.norm1", VISION)
        made.linear(f"{block}.attn.qkv", VISION, 3 * VISION)
        made.linear(f"{block}.attn.proj", VISION, VISION)
        made.norm(f"{block}.norm2", VISION)
        made.linear(f"{block}.mlp.fc1", VISION, 2 * VISION)
        made.linear(f"{block}.mlp.fc2", 2 * VISION, VISION)
    made.norm(f"{eye}.norm", VISION)


def _fill_text(made):
    words = "blip.text_encoder.embeddings"
    made.table(f"{words}.word_embeddings.weight", len(WORDS) + 2, TEXT)
    made.table(f"{words}.position_embeddings.weight", POSITIONS, TEXT)
    made.norm(f"{words}.LayerNorm", TEXT)
    made.state[f"{words}.position_ids"] = torch.arange(POSITIONS)[None]
    for layer in range(LAYERS):
        block = f"blip.text_encoder.encoder.layer.{layer}"
        for part, num_in in (("attention", TEXT), ("crossattention", VISION)):
            made.linear(f"{block}.{part}.self.query", TEXT, TEXT)
            made.linear(f"{block}.{part}.self.key", num_in, TEXT)
            made.linear(f"{block}.{part}.self.value", num_in, TEXT)
            made.linear(f"{block}.{part}.output.dense", TEXT, TEXT)
            made.norm(f"{block}.{part}.output.LayerNorm", TEXT)
        made.linear(f"{block}.intermediate.dense", TEXT, 2 * TEXT)
        made.linear(f"{block}.output.dense", 2 * TEXT, TEXT)
        made.norm(f"{block}.output.LayerNorm", TEXT)


class Original:
    """timm's ViT, BLIP's BERT with cross-attention and the head of five layers, one by one."""

    def __init__(self, state):
        self.state = {name: value.double() for name, value in state.items()}

    def linear(self, name, x):
        return functional.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def norm(self, name, x, eps):
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        return functional.layer_norm(x, x.shape[-1:], weight, bias, eps)

    def attend(self, query, key, value, num_heads, mask=0.0):
        query, key, value = (
            x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (query, key, value)
        )
        scores = query @ key.mT / query.shape[-1] ** 0.5 + mask
        return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)

    def see(self, pixels):
        eye = "blip.visual_encoder"
        weight, bias = (self.state[f"{eye}.patch_embed.proj.{n}"] for n in ("weight", "bias"))
        x = functional.conv2d(pixels, weight, bias, stride=PATCH).flatten(2).mT
        x = torch.cat([self.state[f"{eye}.cls_token"].expand(len(x), -1, -1), x], 1)
        x = x + self.state[f"{eye}.pos_embed"]
        for layer in range(LAYERS):
            block = f"{eye}.blocks.{layer}"
            qkv = self.linear(f"{block}.attn.qkv", self.norm(f"{block}.norm1", x, 1e-6))
            mixed = self.attend(*qkv.chunk(3, -1), VISION_HEADS)
            x = x + self.linear(f"{block}.attn.proj", mixed)
            hidden = self.linear(f"{block}.mlp.fc1", self.norm(f"{block}.norm2", x, 1e-6))
            x = x + self.linear(f"{block}.mlp.fc2", functional.gelu(hidden))
        return self.norm(f"{eye}.norm", x, 1e-6)

    def layer_attention(self, block, x, seen, mask):
        query, key, value = (
            self.linear(f"{block}.self.{name}", by)
            for name, by in (("query", x), ("key", seen), ("value", seen))
        )
        mixed = self.attend(query, key, value, TEXT_HEADS, mask)
        return self.norm(
            f"{block}.output.LayerNorm", self.linear(f"{block}.output.dense", mixed) + x, 1e-12
        )

    def reward(self, pixels, ids, mask):
        """Of one picture, as the original scores it."""
        seen = self.see(pixels.double())
        words = "blip.text_encoder.embeddings"
        x = self.state[f"{words}.word_embeddings.weight"][ids]
        x = x + self.state[f"{words}.position_embeddings.weight"][: ids.shape[1]]
        x = self.norm(f"{words}.LayerNorm", x, 1e-12)
        padding = (1.0 - mask[:, None, None].double()) * -10000.0
        for layer in range(LAYERS):
            block = f"blip.text_encoder.encoder.layer.{layer}"
            x = self.layer_attention(f"{block}.attention", x, x, padding)
            x = self.layer_attention(f"{block}.crossattention", x, seen, 0.0)
            hidden = functional.gelu(self.linear(f"{block}.intermediate.dense", x))
            out = self.linear(f"{block}.output.dense", hidden)
            x = self.norm(f"{block}.output.LayerNorm", out + x, 1e-12)
        reward = x[:, 0]
        for number in HEAD_LAYERS:
            reward = self.linear(f"mlp.layers.{number}", reward)
        return ((reward - 0.16717362830052426) / 1.0333394966054072)[0, 0]
