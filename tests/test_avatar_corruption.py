"""What the fine-tuning of the denoising avatars does to embeddings, by arithmetic."""

import math

import pytest
import torch

from mmspec.denoiser import Denoiser

forge = pytest.importorskip("mmspec.assets.forge.avatars_denoise.corrupt")


def test_noisy_embeddings_have_the_stated_mean_and_deviation():
    torch.manual_seed(0)
    denoiser = Denoiser(6)
    denoiser.measure(3 + 2 * torch.randn(50, 6))
    num, sigma = 40_000, 3.0
    embeds = torch.tensor([1.0, 3.0, 7.0, -2.0, 0.5, 4.0])
    noisy = forge.corrupted(denoiser, embeds.expand(1, num, -1), torch.full((1, num), sigma))[0]
    signal = 1 / math.sqrt(1 + sigma**2)
    mean = denoiser.mean_H + signal * (embeds - denoiser.mean_H)
    deviation = sigma * signal * denoiser.std_H
    assert ((noisy.mean(0) - mean).abs() < 4 * deviation / num**0.5).all()
    assert ((noisy.std(0) / deviation - 1).abs() < 4 / (2 * num) ** 0.5).all()


def test_clean_places_stay_as_they_are_and_the_level_is_added_to_noisy_ones():
    torch.manual_seed(0)
    denoiser = Denoiser(6)
    embeds = torch.randn(2, 9, 6)
    sigma = torch.zeros(2, 9)
    sigma[1, 4:] = 2.0
    state = torch.get_rng_state()
    without = forge.corrupted(denoiser, embeds, sigma)
    torch.nn.init.normal_(denoiser.encoder[2].bias)
    torch.set_rng_state(state)
    added = forge.corrupted(denoiser, embeds, sigma) - without
    assert torch.equal(without[sigma == 0], embeds[sigma == 0])
    assert (added[sigma == 0] == 0).all()
    torch.testing.assert_close(added[sigma > 0], denoiser.encoder[2].bias.expand(5, -1))


def test_levels_lie_in_their_range_and_rise_within_a_segment():
    torch.manual_seed(0)
    sigma = forge.draw_levels(2000, 255)
    is_clean = (sigma == 0).all(1).float().mean()
    assert (
        abs(is_clean - forge.CLEAN_ROWS)
        < 4 * (forge.CLEAN_ROWS * (1 - forge.CLEAN_ROWS) / 2000) ** 0.5
    )
    noisy = sigma[sigma > 0]
    assert noisy.min() >= forge.LEAST_SIGMA * 0.999
    assert noisy.max() <= forge.LARGEST_SIGMA * 1.001
    inside = (sigma[:, 1:] > 0) & (sigma[:, :-1] > 0)
    assert (sigma.diff(dim=1)[inside] >= -1e-4 * forge.LARGEST_SIGMA).all()
    # Every place is trained with noise and without.
    share = (sigma > 0).float().mean(0)
    assert (share > 0.1).all()
    assert (share < 0.75).all()
