"""The n-gram drafter: how much of what it found it hands over, and what it learns from."""

import pytest
import torch

from mmspec.drafters.drafts import Calibration, Draft
from mmspec.drafters.ngram import NgramDrafter
from mmspec.records import Outcome, Plan
from mmspec.rows import TokenRows

COPY = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 1, 2, 3]


def drafter_of(*prompts, **options):
    rows = TokenRows(
        prompts,
        max_new_tokens=[50] * len(prompts),
        keys_B=torch.zeros(len(prompts), dtype=torch.long),
    )
    drafter = NgramDrafter(rows, 100, **options)
    drafter.prefill()
    return drafter, rows


def commit(drafter, rows, *new):
    for row, tokens in enumerate(new):
        rows.host_tokens[row] += tokens
    count = len(new)
    drafter.commit(
        None,
        None,
        None,
        Outcome(
            new_units=new,
            num_accepted=tuple(len(tokens) - 1 for tokens in new),
            done=(False,) * count,
            was_active=(True,) * count,
        ),
    )


def width(drafter, most, prices=None):
    return drafter.propose(Plan(width=most, prices=prices or {})).width


def test_nothing_is_drafted_where_nothing_is_asked_for():
    drafter, _ = drafter_of(COPY)
    assert width(drafter, 1) == 1


@pytest.mark.parametrize("most", [2, 8, 20])
def test_free_nodes_are_all_taken(most):
    drafter, _ = drafter_of(COPY)
    assert width(drafter, most, dict.fromkeys((2, 4, 8, 16, 20), 0.0)) == most


def test_placeholders_are_not_drafted():
    """What follows the match is text, though an image stands between."""
    image = 50
    prompt = [1, 2, 3, *[image] * 20, 4, 5, 6, 1, 2, 3]
    proposals = []
    for placeholders in ((), (image,)):
        drafter, _ = drafter_of(prompt, branching=1, placeholders=placeholders)
        proposals.append(drafter.propose(Plan(width=4, prices=dict.fromkeys((2, 4), 0.0))))
    assert [proposal.tokens_BN[0].tolist() for proposal in proposals] == [
        [3, image, image, image],
        [3, 4, 5, 6],
    ]
    drafter_of([image, image], placeholders=(image,))


def test_a_step_is_as_wide_as_pays():
    drafter, _ = drafter_of(COPY)
    assert width(drafter, 16, {2: 0.0, 4: 0.01, 8: 9.0, 16: 9.0}) == 4
    assert width(drafter, 16, {2: 9.0, 4: 9.0, 8: 0.0, 16: 9.0}) == 8
    assert width(drafter, 16, dict.fromkeys((2, 4, 8, 16), 9.0)) == 1


def test_unmeasured_nodes_have_a_default_price():
    """A good match is drafted before anything is measured, and a poor one is not far."""
    long, _ = drafter_of([*range(1, 40), *range(1, 17)])
    short, _ = drafter_of([*range(1, 40)])
    assert width(long, 16) == 16
    assert width(short, 16) == 1


def test_rows_share_the_width_that_pays_for_all():
    prices = {2: 0.4, 4: 9.0, 8: 9.0}
    alone, _ = drafter_of(COPY)
    beside, _ = drafter_of(COPY, [20, 21, 22, 23])
    assert width(alone, 8, prices) == 2
    assert width(beside, 8, prices) == 1


def test_what_a_row_ahead_would_gain_counts_for_half():
    """A batch ends with its slowest row, but every row that ends makes its steps shorter."""
    prices = {2: 0.4, 4: 1.0, 8: 2.0}
    drafter, rows = drafter_of(COPY, [20, 21, 22, 23])
    assert width(drafter, 1) == 1
    commit(drafter, rows, [4, 5, 6, 7, 8, 9], [31])
    assert width(drafter, 8, prices) == 1
    assert width(drafter, 8, dict.fromkeys((2, 4, 8), 0.0)) == 8
    ahead, other = drafter_of(COPY, [20, 21, 22, 23])
    assert width(ahead, 1) == 1
    commit(ahead, other, [4], [31, 32, 33, 34, 35, 36])
    assert width(ahead, 8, prices) == 4


def test_drafts_that_fail_are_soon_not_worth_it():
    drafter, rows = drafter_of([*range(1, 10)] * 2)
    prices = {2: 0.5, 4: 0.6, 8: 0.8}
    assert width(drafter, 8, prices) == 8
    for token in range(50, 80):
        drafter.propose(Plan(width=8, prices=prices))
        commit(drafter, rows, [token, 1, 2, 3])
    assert width(drafter, 8, prices) == 1


def test_a_chain_is_silent_without_a_match_and_a_tree_is_not():
    free = {2: 0.0, 4: 0.0}
    chain, _ = drafter_of([1, 2, 3, 4], branching=1)
    tree, _ = drafter_of([1, 2, 3, 4])
    assert width(chain, 4, free) == 1
    assert width(tree, 4, free) == 4


def test_calibration_learns_from_what_followed():
    calibration = Calibration()
    assert calibration.survival(0.5) == 0.5
    draft = Draft([7, 8, 9], [-1, 0, 0], 1, [0.5, 0.25, 0.12])
    for _ in range(200):
        calibration.learn(draft, [7, 9, 1])
    assert calibration.survival(0.5) > 0.9
    assert calibration.survival(0.25) < 0.1
    assert calibration.survival(0.12) > 0.8
    assert calibration.survival(0.03) == 0.03


def test_calibration_does_not_learn_what_it_cannot_know():
    """A node behind the end of the emitted tokens may have held or not."""
    calibration = Calibration()
    for _ in range(50):
        calibration.learn(Draft([7, 8, 9], [-1, 0, 1], 1, [0.5, 0.2, 0.1]), [7])
    assert calibration.survival(0.2) == 0.2
    assert calibration.survival(0.1) == 0.1
