"""The noise is what it says: uniform, Gumbel, independent, and a function of where it stands."""

import random

import pytest
import torch
from scipy import stats

import mmspec.noise
from mmspec.noise import (
    NoiseWindow,
    Salt,
    _exponential,
    _unit_interval,
    gaussian,
    gumbel,
    row_keys,
    uniform,
)
from mmspec.sampling import sample

KEYS = row_keys(torch.Generator().manual_seed(3), 4)


def positions(num_rows: int, count: int, start: int = 0) -> torch.Tensor:
    return torch.arange(start, start + count).expand(num_rows, -1)


def test_uniforms_are_uniform_and_gumbels_are_gumbel():
    u = uniform(KEYS, positions(4, 20_000), Salt.ACCEPT).flatten().double().numpy()
    assert stats.kstest(u, "uniform").pvalue > 1e-3
    g = gumbel(KEYS, positions(4, 500), 100).flatten().double().numpy()
    assert stats.kstest(g, "gumbel_r").pvalue > 1e-3
    assert stats.kstest(g + 0.02, "gumbel_r").pvalue < 1e-6  # the test sees a small shift


def streams() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of noise that must know nothing of each other."""
    base = gumbel(KEYS, positions(4, 400), 64)
    wide = gumbel(KEYS + 1, positions(4, 400), 64)
    row = row_keys(torch.Generator().manual_seed(9), 1)
    counted = row + torch.arange(2000)  # keys that differ in their last bits only
    one = gumbel(counted, positions(2000, 1), 64)[:, 0]
    return {
        "tokens": (base[..., :-1], base[..., 1:]),
        "far tokens": (base[..., :32], base[..., 32:]),
        "positions": (base[:, :-1], base[:, 1:]),
        "keys": (base, wide),
        "rows": (one[:-1], one[1:]),
        "salts": (base, gumbel(KEYS, positions(4, 400), 64, Salt.RESIDUAL)),
        "steps": (base, gumbel(KEYS, positions(4, 400), 64, Salt.CHOICE, 1)),
        "diagonal": (base[:, :-1, :-1], base[:, 1:, 1:]),
    }


@pytest.mark.parametrize("kind", list(streams()))
def test_noise_is_independent(kind):
    first, second = (x.flatten().double().numpy() for x in streams()[kind])
    assert stats.pearsonr(first, second).pvalue > 1e-3
    # Which of the pair is larger is a fair coin, in the tails too (they decide every choice).
    high = first > 3
    assert stats.binomtest(int((second[high] > 0.36651).sum()), int(high.sum())).pvalue > 1e-3
    assert (first == second).mean() < 1e-3


def test_a_choice_has_its_law():
    law = torch.tensor([0.5, 0.25, 0.125, 0.1, 0.025])
    noise = gumbel(KEYS, positions(4, 10_000), 5)
    choices = sample(law.log().expand(4, 10_000, -1), noise).flatten()
    counts = torch.bincount(choices, minlength=5)
    assert stats.chisquare(counts.numpy(), (law * 40_000).numpy()).pvalue > 1e-3
    pairs = torch.bincount(choices[:-1] * 5 + choices[1:], minlength=25).double()
    expected = torch.outer(law, law).flatten().double() * (len(choices) - 1)
    assert stats.chisquare(pairs.numpy(), expected.numpy(), sum_check=False).pvalue > 1e-3


def test_noise_is_a_function_of_key_position_and_token_alone():
    whole = gumbel(KEYS, positions(4, 40, 7), 50)
    assert torch.equal(gumbel(KEYS[2:3], positions(1, 40, 7), 50)[0], whole[2])
    assert torch.equal(gumbel(KEYS.flip(0), positions(4, 3, 20), 50), whole.flip(0)[:, 13:16])
    assert torch.equal(gumbel(KEYS, positions(4, 40, 7), 20), whole[..., :20])
    ragged = torch.stack([torch.arange(5) + start for start in (7, 9, 30, 12)])
    for row, noise in enumerate(gumbel(KEYS, ragged, 50)):
        assert torch.equal(noise, whole[row][ragged[row] - 7])
    assert torch.equal(
        uniform(KEYS, ragged, Salt.ACCEPT, 5), uniform(KEYS, ragged, Salt.ACCEPT, torch.tensor(5))
    )


@pytest.mark.parametrize("bits", [0, -1, 2**31 - 1, -(2**31), 1, 2**31 - 64])
def test_extreme_hashes_stay_inside(bits):
    u = _unit_interval(torch.tensor([bits], dtype=torch.int32))
    assert 0 < float(u) < 1
    g = -(-torch.log1p(-u)).log()
    assert bool(g.isfinite().all())
    assert -2.9 < float(g) < 22.3


@pytest.mark.parametrize("key", [0, 1, -1, 2**63 - 1, -(2**63)])
def test_extreme_keys_and_positions_are_finite_and_fresh(key):
    keys = torch.tensor([key])
    at = torch.tensor([[0, 1, 2**31, 2**62, -1]])
    noise = gumbel(keys, at, 200)
    assert bool(noise.isfinite().all())
    assert len(noise.unique()) > 990


def test_row_keys_of_one_generator_and_of_many():
    made = row_keys(torch.Generator().manual_seed(5), 3)
    assert len(set(made.tolist())) == 3
    alone = [torch.Generator().manual_seed(s) for s in (5, 6)]
    assert int(row_keys(alone, 2)[0]) == int(made[0])
    torch.manual_seed(5)
    assert torch.equal(row_keys(None, 3), made)
    with pytest.raises(ValueError, match="list of 2 for 3 rows"):
        row_keys(alone, 3)


@pytest.mark.parametrize("value", [5, "ab", [torch.Generator(), 3], [None], {}, [[]]])
def test_what_is_no_generator_is_refused(value):
    with pytest.raises(ValueError, match=r"generator must be None, a torch\.Generator or a list"):
        row_keys(value, 2)


@pytest.mark.parametrize("vocab_size", [5, 40_000])
def test_a_window_gives_the_noise_of_every_position_whatever_was_asked_before(vocab_size):
    rng = random.Random(vocab_size)
    window = NoiseWindow(KEYS, vocab_size)
    lengths = [rng.randrange(1, 20) for _ in KEYS]
    for _ in range(25):
        count, offset = rng.choice([1, 1, 2, 5, 16, 33]), rng.choice([0, 0, 3])
        lengths_B = torch.tensor(lengths)
        noise = window.take(lengths_B, lengths, count, offset)
        at = lengths_B[:, None] + offset + torch.arange(count)
        assert torch.equal(noise, gumbel(KEYS, at, vocab_size))
        # A step commits at least one token and at most as many as were looked at.
        lengths = [n + rng.randint(1, count) for n in lengths]


@pytest.fixture
def made(monkeypatch):
    """Positions of each piece of noise that is made."""
    counts = []

    def counted(keys, positions, vocab_size, *args):
        counts.append(positions.shape[1])
        return gumbel(keys, positions, vocab_size, *args)

    monkeypatch.setattr(mmspec.noise, "gumbel", counted)
    return counts


def test_a_window_makes_each_position_once(made):
    window = NoiseWindow(KEYS, 50_000)
    for length in range(1, 101):
        window.take(torch.full((len(KEYS),), length), [length] * len(KEYS), 16)
    assert 0 <= sum(made) - (16 + 99) <= window._ahead


def test_a_window_that_is_verified_with_one_position_more_is_not_made_anew(made):
    window = NoiseWindow(KEYS[:1], 16_384)
    length = torch.tensor([5])
    window.take(length, [5], 14, offset=1)
    window.take(length, [5], 16)
    assert sum(made) <= 16 + 8


def test_no_noise_is_made_behind_the_end_of_the_rows(monkeypatch):
    made = []

    def counted(keys, positions, vocab_size, *args):
        made.append(positions)
        return gumbel(keys, positions, vocab_size, *args)

    monkeypatch.setattr(mmspec.noise, "gumbel", counted)
    window, end = NoiseWindow(KEYS, 300), 50
    for length in range(1, end):
        lengths_B = torch.full((len(KEYS),), length)
        noise = window.take(lengths_B, [length] * len(KEYS), 16, room=end - length)
        at = lengths_B[:, None] + torch.arange(min(16, end - length))
        assert torch.equal(noise[:, : at.shape[1]], gumbel(KEYS, at, 300))
    assert torch.equal(torch.cat(made, dim=1), torch.arange(1, end).expand(len(KEYS), -1))


def test_gaussian_noise_is_standard_normal_and_belongs_to_its_position():
    keys = row_keys(torch.Generator().manual_seed(0), 2)
    positions = torch.arange(300).expand(2, -1)
    noise = gaussian(keys, positions, 64)
    assert noise.isfinite().all()
    sample = noise.flatten().double()
    num = len(sample)
    # Four deviations of the estimates: sqrt(1/n), sqrt(2/n), and the law itself at 10 places.
    assert sample.mean().abs() < 4 * num**-0.5
    assert (sample.var() - 1).abs() < 4 * (2 / num) ** 0.5
    shares = torch.linspace(0.05, 0.95, 10, dtype=torch.float64)
    below = (sample[:, None] < torch.special.ndtri(shares)).double().mean(0)
    assert ((below - shares).abs() < 4 * (shares * (1 - shares) / num) ** 0.5).all()
    assert torch.equal(gaussian(keys[1:], positions[1:, 7:9], 64), noise[1:, 7:9])
    neighbours = (noise[:, 1:] * noise[:, :-1]).mean()
    assert neighbours.abs() < 4 * num**-0.5


def test_exponentials_are_exact_for_uniforms_of_any_size():
    """A relative error in an exponential is an absolute one in the Gumbel number."""
    near_powers = [2**size + step for size in range(31) for step in range(-40, 40)]
    bits = torch.tensor([*near_powers, *range(2000), *range(2**31 - 2000, 2**31)])
    bits = torch.cat([bits.clamp(0, 2**31 - 1), torch.randint(2**31, (100_000,))]).to(torch.int32)
    unit = _unit_interval(bits)
    made, wanted = _exponential(unit.clone()).double(), -torch.log1p(-unit.double())
    assert ((made - wanted).abs() <= 4 * 2.0**-24 * wanted).all()
