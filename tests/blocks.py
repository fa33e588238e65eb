"""Blocks of video as a router sees them, made of given pictures."""

import torch

from mmspec.block_records import BlockPlace, BlockView, Judgement


def place(index=1, *, num_blocks=9, seed=0, prompt="a red cat", scores=()):
    history = tuple(None if one is None else Judgement(score=one, keep=True) for one in scores)
    return BlockPlace(index=index, num_blocks=num_blocks, seed=seed, prompt=prompt, history=history)


def view(frames, previous=None, **arguments):
    return BlockView(
        place=place(**arguments),
        latents_FCHW=torch.zeros(1, 1, 1, 1),
        frames=lambda: frames,
        previous_frames=lambda: previous,
    )


def noise_frames(count=3, height=24, width=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, height, width, generator=generator)


def scores_of(scorer, block):
    """Of all pictures, in the order in which they are scored."""
    with torch.no_grad():
        return torch.cat(list(scorer.batches(block)))
