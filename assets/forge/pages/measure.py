"""Reads pages with a model that is being trained."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import Idefics3ForConditionalGeneration, PreTrainedTokenizerFast

from mmspec.assets.pages.rendering import draw_page

from .model import END_ID, FAKE_ID, GLOBAL_ID, IMAGE_ID, INSTRUCTIONS, NUM_IMAGE_TOKENS


@torch.no_grad()
def read_pages(
    model: Idefics3ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    pages: Sequence[str],
    *,
    blur: float = 0.0,
    noise: float = 0.0,
) -> list[str]:
    """Draws pages, page ``i`` with seed ``i``, and reads them greedily in one batch."""
    rngs = [np.random.default_rng(seed) for seed in range(len(pages))]
    drawn = [
        draw_page(page, rng, blur=blur, noise=noise) for page, rng in zip(pages, rngs, strict=True)
    ]
    pixels = torch.from_numpy(np.stack(drawn)).float() / 127.5 - 1
    pixels = pixels[:, None, None].expand(-1, 1, 3, -1, -1)
    instruction = tokenizer(INSTRUCTIONS[0])["input_ids"]
    image = [FAKE_ID, GLOBAL_ID, *[IMAGE_ID] * NUM_IMAGE_TOKENS, FAKE_ID]
    ids = torch.tensor([image + instruction + [END_ID]]).expand(len(pages), -1)
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=pixels,
        max_new_tokens=480,
        do_sample=False,
    )
    texts: list[str] = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    return texts
