"""Linear previews: a linear decoder is recovered, and what does not fit is refused."""

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

from mmspec.assets import bundled_path
from mmspec.latent_preview import PREVIEW_FILE, LinearPreview

CHANNELS, SCALE, PER_FRAME = 3, 4, 2


class LinearDecoder:
    """A VAE that is linear: one picture of the first latent frame, two of every other."""

    def __init__(self):
        torch.manual_seed(0)
        size = 3 * SCALE**2
        self.first, self.later = (
            torch.nn.Conv2d(CHANNELS, num * size, 1) for num in (1, PER_FRAME)
        )
        for one in (self.first, self.later):
            # So small that no picture is clipped.
            torch.nn.init.normal_(one.weight, std=0.01)
            torch.nn.init.constant_(one.bias, 0.5)

    @torch.no_grad()
    def __call__(self, latents, *, is_start):
        maps = [self.first if is_start and not k else self.later for k in range(len(latents))]
        made = []
        for one, frame in zip(maps, latents, strict=True):
            pixels = functional.pixel_shuffle(one(frame[None]), SCALE)[0]
            made += pixels.split(3)
        return torch.stack(made)


def latents(seed, num_frames=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_frames, CHANNELS, 5, 6, generator=generator)


def blocks(decoder, seeds, starts=(True, False)):
    for seed in seeds:
        for is_start in starts:
            one = latents(2 * seed + is_start)
            yield one, decoder(one, is_start=is_start), is_start


def fitted():
    return LinearPreview.fit(blocks(LinearDecoder(), range(8)), ridge=1e-12)


@pytest.mark.parametrize("is_start", [True, False])
@pytest.mark.parametrize("num_frames", [1, 3])
def test_a_linear_decoder_is_recovered(is_start, num_frames):
    decoder, preview = LinearDecoder(), fitted()
    assert (preview.channels, preview.scale, preview.pictures_per_frame) == (3, 4, 2)
    other = latents(99, num_frames)
    made, wanted = (one(other, is_start=is_start) for one in (preview, decoder))
    assert made.shape == (2 * num_frames - is_start, 3, 20, 24)
    torch.testing.assert_close(made, wanted, atol=1e-5, rtol=0)


def test_a_preview_is_read_back_and_clipped(tmp_path):
    preview = fitted()
    preview.save(tmp_path / PREVIEW_FILE)
    again = LinearPreview.load(tmp_path / PREVIEW_FILE)
    other = 100 * latents(5)
    made = preview(other, is_start=True)
    assert torch.equal(again(other, is_start=True), made)
    assert (made.min(), made.max()) == (0, 1)


def test_latents_that_are_no_numbers_give_none():
    assert fitted()(torch.full((1, 3, 2, 2), torch.nan), is_start=True).isnan().all()


def test_blocks_that_cannot_be_fitted_are_refused():
    decoder = LinearDecoder()
    with pytest.raises(ValueError, match=r"with first latent frames and later ones, got .*first"):
        LinearPreview.fit(blocks(decoder, [0], starts=(False,)))
    one = latents(0)
    pictures = decoder(one, is_start=False)
    for wrong in (pictures[:-1], pictures[..., :-1], pictures[:, :1]):
        with pytest.raises(ValueError, match="pictures of a preview must be whole pictures"):
            LinearPreview.fit([(one, wrong, False)])
    with pytest.raises(ValueError, match="blocks of a preview must be as before: 4 inputs"):
        LinearPreview.fit([(one, pictures, False), (one[:, :2], pictures, False)])


def test_files_that_are_none_are_refused(tmp_path):
    path = tmp_path / PREVIEW_FILE
    with pytest.raises(ValueError, match="cannot read the preview"):
        LinearPreview.load(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="cannot read the preview"):
        LinearPreview.load(path)
    for tensors in (
        {"first.weight": torch.zeros(48, 3)},
        {"first.weight": torch.zeros(0, 3), "later.weight": torch.zeros(0, 3)},
        {
            "first.weight": torch.zeros(48, 3), "first.bias": torch.zeros(48),
            "later.weight": torch.zeros(96, 4), "later.bias": torch.zeros(96),
        },
    ):  # fmt: skip
        save_file(tensors, path)
        with pytest.raises(ValueError, match="a preview must be weights and biases"):
            LinearPreview.load(path)


def test_the_bundled_preview_is_of_the_bundled_latents():
    preview = LinearPreview.load(bundled_path("clips") / PREVIEW_FILE)
    assert (preview.channels, preview.scale, preview.pictures_per_frame) == (8, 4, 4)
