"""Drafted denoising steps keep the law of the sampler; biased rules fail the same test."""

import importlib.util
import math
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from scipy.stats import chi2_contingency
from video import far_pipe

from mmspec.adapters.block_video import Context, Prompt
from mmspec.adapters.video_anyflow import FarFamily
from mmspec.bench.step_chain import (
    NOISES,
    Sampler,
    StepRows,
    reflected,
    step_engine,
)
from mmspec.noise import row_keys

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

PATH = Path(__file__).parents[2] / "benchmarks" / "denoising_steps.py"
SPEC = importlib.util.spec_from_file_location("denoising_steps", PATH)
bench = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = bench
SPEC.loader.exec_module(bench)

TARGET = bench.Mixture(torch.tensor([[-2.0], [0.5], [1.5]], dtype=torch.float64), 0.3)
WRONG = bench.Mixture(torch.tensor([[-1.5], [0.8], [2.0]], dtype=torch.float64), 0.4)
NUM_ROWS = 50_000


def accept_all(noise, shift, tests):
    return torch.ones_like(tests, dtype=torch.bool), noise


def draw_again(noise, shift, tests):
    """Draws a refused step from the target, which forgets why it was refused."""
    is_accepted, _ = reflected(noise, shift, tests)
    return is_accepted, torch.randn(noise.shape, generator=bench.seeded(8)).double()


def run(noise, draft, *, window=4, couple=reflected, num_rows=NUM_ROWS, only=None):
    """End states of a batch, or of one of its rows alone, and the steps of the engine."""
    start = torch.randn(num_rows, 1, generator=bench.seeded(0), dtype=torch.float64)
    keys = row_keys(bench.seeded(1), num_rows)
    if only is not None:
        start, keys = start[only : only + 1], keys[only : only + 1]
    rows = StepRows(Sampler.make(bench.levels_of(6, 2.0), noise), start, keys)
    steps = [step for step, _ in step_engine(rows, TARGET, draft, window, couple).stream()]
    return rows.states_BD, steps


def sequential(noise):
    """The sampler in a loop of its own, on other noise."""
    generator = bench.seeded(7)
    state = torch.randn(4 * NUM_ROWS, 1, generator=generator, dtype=torch.float64)
    levels = bench.levels_of(6, 2.0)
    for start, end in pairwise(levels):
        clean = TARGET(state[:, None], start.expand(len(state), 1))[:, 0]
        fresh = torch.randn(state.shape, generator=generator, dtype=torch.float64)
        variance = end**2
        if noise == "ancestral":
            # The posterior of a state at `end` between a state at `start` and the data.
            variance *= 1 - ((1 - start) * end / ((1 - end) * start)) ** 2
        old = (state - (1 - start) * clean) / start
        state = (1 - end) * clean + (end**2 - variance).clamp(min=0).sqrt() * old
        state = state + variance.sqrt() * fresh
    return state


def p_value(states, others):
    edges = others.flatten().quantile(torch.linspace(0, 1, 41, dtype=torch.float64))[1:-1]
    tables = [
        torch.bucketize(one.flatten(), edges).bincount(minlength=40) for one in (states, others)
    ]
    return chi2_contingency(torch.stack(tables).numpy()).pvalue


@pytest.mark.parametrize("noise", [NOISES[0], pytest.param(NOISES[1], marks=pytest.mark.slow)])
def test_the_law_is_that_of_the_sequential_sampler(noise):
    others = sequential(noise)
    for draft in (WRONG, None):
        states, steps = run(noise, draft)
        assert p_value(states, others) > 1e-3
        # The comparison is not one of plain sampling with itself: drafts were accepted and refused.
        assert 1.2 < 6 * NUM_ROWS / bench.counts(steps)["forwards"] < 5
    for couple in (accept_all, draw_again):
        states, _ = run(noise, WRONG, couple=couple)
        assert p_value(states, others) < 1e-6


@pytest.mark.parametrize("noise", NOISES)
def test_a_drafter_that_is_the_target_gives_the_very_sample(noise):
    plain, _ = run(noise, None, window=0, num_rows=64)
    for window in (1, 4, 9):
        states, steps = run(noise, TARGET, window=window, num_rows=64)
        assert torch.equal(states, plain)
        assert len(steps) == math.ceil(6 / (window + 1))


@pytest.mark.parametrize("draft", [None, WRONG])
def test_a_row_of_a_batch_equals_its_single_run(draft):
    states, steps = run("ancestral", draft, num_rows=8)
    assert any(len(set(step.num_accepted)) > 1 for step in steps)
    for row in range(8):
        alone, _ = run("ancestral", draft, num_rows=8, only=row)
        assert torch.equal(alone[0], states[row])


@pytest.mark.parametrize("noise", NOISES)
def test_forwards_are_those_of_the_closed_form(noise):
    sampler, gap, size, num_rows = Sampler.make(bench.levels_of(8, 5.0), noise), 0.5, 16, 4000
    start = torch.randn(num_rows, size, generator=bench.seeded(0), dtype=torch.float64)
    rows = StepRows(sampler, start, row_keys(bench.seeded(1), num_rows))
    engine = step_engine(
        rows, lambda states, _: states.sin(), lambda states, _: states.sin() + gap, 8
    )
    mean = bench.counts([step for step, _ in engine.stream()])["forwards"] / num_rows
    assert mean == pytest.approx(bench.expected_forwards(sampler, size, gap), abs=0.06)
    assert 2 < mean < 7


def test_one_step_of_a_flow_map_is_the_pipelines():
    pipe = far_pipe(0)
    layout = FarFamily(pipe).layout(13, 32, 32, None)
    model = FarFamily(pipe).model(layout, 1.0)
    noise = torch.randn(1, 1, 16, 4, 4, generator=bench.seeded(0))
    context = Context(Prompt(text=None, embeds=torch.ones(1, 8, 32)))
    predict = bench.FlowMapPredict(model, context, noise.shape, "full")
    with torch.no_grad():
        states = noise.flatten()[None, None].double()
        clean = predict(states, torch.ones(1, 1, dtype=torch.float64))
        first = noise.permute(0, 2, 1, 3, 4)
        wanted = model.denoise(context, first, num_steps=1, first=0, last=1)
    assert torch.allclose(clean.view(noise.shape).float(), wanted.permute(0, 2, 1, 3, 4), atol=1e-5)


def test_steps_of_a_video_are_counted():
    counts = bench.run_video(far_pipe(0), far_pipe(1), 3, "ancestral", 2, 32, ["", ""], {})
    assert counts["steps"] == 2 * 3 * 3
    assert counts["dims"] == 16 * 4 * 4
    assert counts["forwards"] <= counts["steps"] <= counts["states"]
    assert counts["steps"] == counts["accepted"] + counts["forwards"]
