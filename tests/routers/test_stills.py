"""Statistics of single pictures, and the pictures that encoders are shown."""

import math
import pickle

import numpy as np
import pytest
import torch
from blocks import noise_frames, scores_of, view
from PIL import Image
from scipy import ndimage, optimize, signal, special
from torch.nn import functional
from torchvision import transforms

from mmspec.routers import build_router
from mmspec.routers.brisque import NUM_FEATURES, BrisqueScorer, brisque_features
from mmspec.routers.preprocess import MEAN, STD, crop_to_square, normalized, pad_to_square
from mmspec.routers.sharpness import NoiseScorer, SharpnessScorer


def natural(height=96, width=120, seed=0):
    """Noise of many sizes, ``[1, 3, H, W]``: it has the spectrum of pictures, about."""
    layers = [
        functional.interpolate(noise_frames(1, height // k, width // k, seed + k), (height, width))
        for k in (1, 2, 4, 8, 24)
    ]
    return sum(layers) / len(layers)


def blurred(frames):
    return torch.from_numpy(ndimage.gaussian_filter(frames.numpy(), (0, 0, 1.5, 1.5)))


def test_sharpness_falls_with_blur():
    sharp, flat = natural(), torch.full((1, 3, 8, 8), 0.5)
    scorer = SharpnessScorer()
    assert scores_of(scorer, view(blurred(sharp))) < 0.2 * scores_of(scorer, view(sharp))
    assert scores_of(scorer, view(flat)).abs() < 1e-6


@pytest.mark.parametrize("sigma", [0.02, 0.1])
def test_noise_is_measured(sigma):
    frames = 0.5 + sigma * torch.randn(2, 1, 128, 128).expand(-1, 3, -1, -1)
    assert torch.allclose(-scores_of(NoiseScorer(), view(frames)), torch.tensor(sigma), rtol=0.05)


def brisque_by_scipy(grey):
    """The features of one scale, one picture, solved by scipy."""
    line = np.exp(-(np.arange(-3, 4) ** 2) / (2 * (7 / 6) ** 2))
    kernel = np.outer(line, line) / np.outer(line, line).sum()
    mean = signal.convolve2d(grey, kernel, "same")
    square = signal.convolve2d(grey**2, kernel, "same")
    mscn = (grey - mean) / (np.sqrt(np.abs(mean**2 - square)) + 1 / 255)

    def fit(x):
        left, right = np.mean(x[x < 0] ** 2), np.mean(x[x >= 0] ** 2)
        ratio = np.sqrt(left / right)
        moment = np.abs(x).mean() ** 2 / (x**2).mean()
        moment *= (ratio**3 + 1) * (ratio + 1) / (ratio**2 + 1) ** 2

        def gap(a):
            return special.gamma(2 / a) ** 2 / special.gamma(1 / a) / special.gamma(3 / a) - moment

        a = optimize.brentq(gap, 0.1, 10)
        scale = np.sqrt(special.gamma(1 / a) / special.gamma(3 / a))
        shift = special.gamma(2 / a) / special.gamma(1 / a) * scale
        return a, (np.sqrt(right) - np.sqrt(left)) * shift, left, right

    a, _, left, right = fit(mscn)
    found = [a, (left + right) / 2]
    for one, other in (
        (mscn[:, :-1], mscn[:, 1:]),
        (mscn[:-1], mscn[1:]),
        (mscn[:-1, :-1], mscn[1:, 1:]),
        (mscn[1:, :-1], mscn[:-1, 1:]),
    ):
        found.extend(fit(one * other))
    return found


def test_brisque_features_are_those_of_scipy():
    noisy = (natural() + 0.1 * torch.randn(1, 3, 96, 120)).clamp(0, 1)
    frames = torch.cat([natural(seed=1), noisy])
    found = brisque_features(frames)
    assert found.shape == (2, NUM_FEATURES)
    for frame, one in zip(frames.double().numpy(), found, strict=True):
        grey = np.tensordot([0.2125, 0.7154, 0.0721], frame, 1)
        expected = torch.tensor(brisque_by_scipy(grey), dtype=torch.float64)
        assert torch.allclose(one[:18], expected, rtol=1e-7, atol=1e-9)


@pytest.fixture
def regression(tmp_path):
    """Weights in the published layout: three support vectors, ranges of 0 to 4."""
    vectors = [[0.1 * k] * NUM_FEATURES for k in (-1, 0, 2)]
    lines = ["svm_type epsilon_svr", "kernel_type rbf", "gamma 0.05", "rho -50", "SV"]
    for weight, vector in zip((-10.0, 5.0, 20.0), vectors, strict=True):
        # LIBSVM leaves zeros out.
        entries = [f"{k + 1}:{value:g}" for k, value in enumerate(vector) if value]
        lines.append(" ".join([f"{weight:g}", *entries]))
    (tmp_path / "svm.txt").write_text("\n".join(lines) + "\n")
    ranges = {"min_": [0.0] * NUM_FEATURES, "max_": [4.0] * NUM_FEATURES}
    (tmp_path / "normalize.pickle").write_bytes(pickle.dumps(ranges))
    return tmp_path


def test_brisque_score_is_the_regression_of_the_features(regression):
    frames = torch.cat([natural(seed=1), noise_frames(1, 96, 120), natural(seed=2)])
    found = scores_of(BrisqueScorer(regression, batch_size=1), view(frames))
    for score, features in zip(found, brisque_features(frames).numpy(), strict=True):
        scaled = features / 2 - 1
        kernels = [np.exp(-0.05 * ((scaled - 0.1 * k) ** 2).sum()) for k in (-1, 0, 2)]
        assert score.item() == pytest.approx(-(np.dot([-10, 5, 20], kernels) + 50))


def test_a_flat_picture_is_not_judged(regression):
    judged = build_router(f"brisque:-inf,weights={regression}").judge(
        view(torch.zeros(2, 3, 32, 32))
    )
    assert math.isnan(judged.score)
    assert not judged.keep


def test_a_pickle_that_calls_something_is_refused(regression):
    (regression / "normalize.pickle").write_bytes(pickle.dumps(print))
    with pytest.raises(ValueError, match=r"cannot read its weights .* wants builtins\.print"):
        build_router(f"brisque:0,weights={regression}")


def test_the_package_brisque_is_an_extra(monkeypatch):
    monkeypatch.setattr("mmspec.routers.brisque.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="'brisque' has no weights: install the package brisque"):
        build_router("brisque:-40")


@pytest.mark.parametrize(("height", "width"), [(480, 832), (300, 224), (120, 90)])
def test_pictures_are_cropped_as_by_pil(height, width):
    bytes_ = (natural(height, width)[0].permute(1, 2, 0) * 255).byte()
    by_pil = transforms.Compose(
        [
            transforms.Resize(224, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )(Image.fromarray(bytes_.numpy()))
    ours = normalized(crop_to_square(bytes_.permute(2, 0, 1)[None].float() / 255, 224))[0]
    difference = (ours - by_pil).abs() * torch.tensor(STD)[:, None, None] * 255
    # PIL rounds to grey levels behind the columns and behind the rows.
    assert difference.max() < 1.6
    assert difference.mean() < 0.35


def test_padding_shows_the_whole_picture_on_black():
    padded = pad_to_square(torch.ones(1, 3, 40, 80), 32)
    assert padded.shape == (1, 3, 32, 32)
    column = torch.tensor([0.0] * 8 + [1.0] * 16 + [0.0] * 8)
    assert torch.allclose(padded[0, 0], column[:, None].expand(-1, 32))
    assert pad_to_square(torch.ones(1, 3, 81, 40), 32).shape == (1, 3, 32, 32)
