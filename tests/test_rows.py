"""Rows advance, end and are cut on their own."""

import pytest
import torch
from tiny import make_rows

from mmspec.records import Verdict
from mmspec.rows import TokenRows


def verdict(emitted: list[list[int]], accepted: list[int]) -> Verdict:
    tokens = torch.tensor(emitted)
    path = torch.arange(tokens.shape[1]).expand_as(tokens)
    return Verdict(
        choices_BN=tokens,
        path_BM=path,
        emitted_BM=tokens,
        num_accepted_B=torch.tensor(accepted),
        law_logits_BNV=torch.zeros(*tokens.shape, 1),
    )


def test_a_row_that_has_ended_is_given_to_the_next_prompt():
    prompts, budgets = [[1, 2], [3], [4, 5, 6], [7]], [9, 2, 4, 30]
    rows = make_rows(prompts, budgets, num_rows=2)
    alone = make_rows(prompts, budgets)
    assert (rows.num_rows, rows.num_waiting, rows.capacity) == (2, 2, alone.capacity)
    rows.choice_noise(3, 11)
    outcome = rows.commit(verdict([[5, 6], [5, 6]], [1, 1]))
    assert (outcome.requests, outcome.ended) == ((0, 1), [1])
    assert rows.vacant == [1]
    rows.admit(1)
    assert (rows.requests, rows.vacant, rows.num_waiting) == ([0, 2], [], 1)
    assert rows.host_tokens == [[1, 2, 5, 6], [4, 5, 6]]
    for name in ("lengths_B", "limits_B", "prompt_lengths_B", "room_B", "keys_B"):
        assert getattr(rows, name)[1] == getattr(alone, name)[2], name
    assert rows.roots_B().tolist() == [6, 6]
    assert torch.equal(rows.choice_noise(3, 11)[1], alone.choice_noise(3, 11)[2])
    outcome = rows.commit(verdict([[8, 8, 8, 8]] * 2, [3, 3]))
    assert (outcome.requests, outcome.done, outcome.ended) == ((0, 2), (False, True), [2])
    rows.admit(1)
    assert (rows.num_waiting, rows.max_remaining, rows.is_done) == (0, 30, False)


def test_commit_by_hand():
    rows = make_rows([[1, 2], [3], [4, 5, 6]], [9, 2, 9], eos_token_ids=[0, 7])
    outcome = rows.commit(verdict([[5, 6, 8], [5, 6, 8], [5, 7, 8]], [2, 2, 2]))
    assert outcome.new_units == ([5, 6, 8], [5, 6], [5, 7])  # kept; cut by budget; by the end
    assert outcome.num_accepted == (2, 2, 2)
    assert outcome.done == (False, True, True)
    assert outcome.was_active == (True, True, True)
    assert rows.lengths_B.tolist() == [5, 3, 5]
    assert rows.host_tokens == [[1, 2, 5, 6, 8], [3, 5, 6], [4, 5, 6, 5, 7]]
    for row, tokens in enumerate(rows.host_tokens):
        assert rows.tokens_BT[row, : len(tokens)].tolist() == tokens
    assert rows.roots_B().tolist() == [8, 6, 7]
    assert (rows.max_length, rows.max_remaining, rows.step) == (5, 6, 1)

    outcome = rows.commit(verdict([[7, 1, 1], [9, 9, 9], [9, 9, 9]], [0, 2, 1]))
    assert outcome.new_units == ([7], [], [])
    assert outcome.num_accepted == (0, 0, 0)
    assert outcome.was_active == (True, False, False)
    assert rows.is_done
    assert rows.max_remaining == 0
    assert rows.host_tokens == [[1, 2, 5, 6, 8, 7], [3, 5, 6], [4, 5, 6, 5, 7]]
    assert rows.new_tokens(0) == [5, 6, 8, 7]


def test_an_end_behind_the_accepted_part_does_not_count():
    rows = make_rows([[1]], [9], eos_token_ids=[7])
    assert rows.commit(verdict([[5, 7, 7]], [0])).new_units == ([5],)
    assert not rows.is_done


def test_an_end_in_the_prompt_does_not_count():
    rows = make_rows([[7, 7]], [3], eos_token_ids=[7])
    assert not rows.is_done
    assert rows.commit(verdict([[5]], [0])).done == (False,)


def test_a_stop_check_sees_each_row_once_per_step_and_only_while_it_runs():
    seen = []

    def stop(row, output):
        seen.append((row, list(output)))
        return 1 if row == 0 and len(output) >= 3 else None

    rows = make_rows([[1], [2]], [9, 2], stop_check=stop)
    rows.commit(verdict([[5, 6], [5, 6]], [1, 1]))
    outcome = rows.commit(verdict([[8, 9], [8, 9]], [1, 1]))
    assert seen == [(0, [5, 6]), (1, [5, 6]), (0, [5, 6, 8, 9])]
    assert outcome.new_units == ([], [])
    assert outcome.num_retracted == (1, 0)
    assert rows.host_tokens == [[1, 5], [2, 5, 6]]
    assert rows.lengths_B.tolist() == [2, 3]
    assert rows.room_B.tolist() == [0, 0]


def test_positions_stay_inside_a_row():
    rows = make_rows([[1, 2], [3]], [3, 9])
    depth = torch.arange(6).expand(2, -1)
    assert rows.positions(depth).tolist() == [[1, 2, 3, 4, 4, 4], [0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize(
    ("prompts", "budgets", "message"),
    [
        ([], [], "prompt"),
        ([[1], []], [2, 2], "prompt 1 is empty"),
        ([[1]], [0], "max_new_tokens must be >= 1, got 0 for row 0"),
        ([[1]], [2, 2], "."),
    ],
)
def test_rows_that_make_no_sense_are_refused(prompts, budgets, message):
    with pytest.raises(ValueError, match=message):
        TokenRows(prompts, max_new_tokens=budgets, keys_B=torch.zeros(len(prompts)).long())


def test_keys_must_be_one_per_row():
    with pytest.raises(ValueError, match="key"):
        TokenRows([[1], [2]], max_new_tokens=[2, 2], keys_B=torch.zeros(3).long())
