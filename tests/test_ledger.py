"""Figures of a generation, against numbers worked out by hand."""

import json
from types import SimpleNamespace

import pytest

from mmspec.ledger import Ledger, conditional_acceptance
from mmspec.records import Guarantee, Outcome


def step(ledger, drafted, accepted, new, active=(True, True), retracted=(), requests=()):
    ledger.record(
        SimpleNamespace(width=4, num_drafted=drafted, num_levels=drafted),
        SimpleNamespace(forward_time_s=2.0),
        Outcome(
            new_units=new,
            num_accepted=accepted,
            done=(False, False),
            was_active=active,
            num_retracted=retracted,
            requests=requests,
        ),
        draft_time_s=1.0,
        wall_time_s=3.5,
    )


@pytest.fixture
def ledger():
    ledger = Ledger(drafter="toy", guarantee=Guarantee.EXACT)
    ledger.prefill_time_s = 0.25
    step(ledger, (3, 3), (3, 1), ([1, 2, 3, 4], [5, 6]))
    step(ledger, (3, 0), (0, 0), ([7], [8]))
    step(ledger, (2, 0), (2, 0), ([9, 9], []), active=(True, False))
    return ledger


def test_figures_by_hand(ledger):
    made = ledger.generation()
    assert made.units == ([1, 2, 3, 4, 7, 9, 9], [5, 6, 8])
    stats = made.stats
    assert (stats.num_units, stats.num_target_forwards) == (10, 3)
    assert stats.tau == 10 / 5  # five row-steps: row 1 had no part in the last
    assert (stats.num_drafted, stats.num_accepted) == (11, 6)
    assert stats.accepted_histogram == [2, 1, 1, 1]
    # Depth 1: 3 of 4 drafts; depth 2: 2 of the 3 behind them; depth 3: the only one left.
    assert stats.acceptance_by_position == [3 / 4, 2 / 3, 1.0]
    assert (stats.draft_time_s, stats.verify_time_s, stats.other_time_s) == (3.0, 6.0, 1.5)
    assert stats.wall_time_s == 0.25 + 10.5
    assert sum(s.wall_time_s for s in made.steps) == 10.5


def test_figures_of_a_row(ledger):
    row = ledger.generation().row_stats[1]
    assert (row.num_units, row.num_target_forwards, row.tau) == (3, 2, 1.5)
    assert row.acceptance_by_position == [1.0, 0.0]
    assert row.accepted_histogram == [1, 1]


def test_steps_belong_to_the_requests_that_the_rows_continued():
    ledger = Ledger(drafter="toy", guarantee=Guarantee.EXACT, num_requests=4)
    step(ledger, (0, 0), (0, 0), ([1], [2]), requests=(0, 1))
    step(ledger, (3, 3), (2, 0), ([3, 3, 3], [4]), requests=(0, 1))
    ledger.later_reads.append(range(2, 4))
    step(ledger, (3, 3), (1, 1), ([], [6, 6]), requests=(0, 2), active=(False, True))
    made = ledger.generation()
    assert made.units == ([1, 3, 3, 3], [2, 4], [6, 6], [])
    assert made.emitted == ([1, 3], [1, 1], [2], [])
    # The forward that read two prompts is one of the batch, and one of each of their own.
    assert [row.num_target_forwards for row in made.row_stats] == [2, 2, 2, 1]
    assert (made.stats.num_target_forwards, made.stats.tau) == (4, 8 / 7)
    alone = ledger.generation(requests=[2])
    assert (alone.units, alone.stats) == (([6, 6],), made.row_stats[2])
    assert alone.stats.num_accepted == 1


def test_retracted_units_leave_the_output(ledger):
    step(ledger, (0, 0), (0, 0), ([], []), active=(True, False), retracted=(2, 0))
    made = ledger.generation()
    assert made.units == ([1, 2, 3, 4, 7], [5, 6, 8])
    assert made.stats.num_units == 8


def test_an_empty_ledger():
    made = Ledger(drafter="toy", guarantee=Guarantee.LOSSY).generation(interrupted=True)
    assert (made.units, made.stats.tau, made.interrupted) == ((), 0.0, True)


def test_the_generation_is_a_copy(ledger):
    made = ledger.generation()
    made.units[0].append(-1)
    step(ledger, (0, 0), (0, 0), ([5], [5]))
    assert made.units[0][-1] == -1
    assert ledger.generation().units[0][-1] == 5


def test_stats_are_json(ledger):
    figures = json.loads(json.dumps(ledger.generation().stats.to_dict()))
    assert figures["guarantee"] == "exact"
    assert figures["drafter"] == "toy"
    assert figures["tau"] == 2.0


@pytest.mark.parametrize(
    ("accepted", "levels", "rates"),
    [
        ([3, 1], [3, 3], [1.0, 0.5, 1.0]),
        ([0, 0], [2, 2], [0.0]),
        ([], [], []),
        ([0], [0], []),
        ([1, 2], [1, 2], [1.0, 1.0]),
    ],
)
def test_conditional_acceptance(accepted, levels, rates):
    assert conditional_acceptance(accepted, levels) == rates
