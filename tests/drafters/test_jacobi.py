"""What a Jacobi window remembers, forgets, and hands on."""

import itertools
import types

import pytest
import torch
from tiny import VOCAB, make_engine, make_rows, tiny_model
from toys import TableTarget, random_table, run_toy, toy_rows

from mmspec.drafters import build_drafter
from mmspec.drafters.jacobi import INITS, JacobiDrafter, default_window
from mmspec.law_config import LawConfig
from mmspec.records import Outcome, Plan, Scores, Verdict
from mmspec.sampling import build_law
from mmspec.speculation import Settings
from mmspec.verify import SeededMatch

V = 5


def make(rows, **options) -> JacobiDrafter:
    return JacobiDrafter(rows, V, **({"max_width": 8, "keep_laws": True} | options))


def teach(drafter, rows, first: int, guesses: list[int]) -> torch.Tensor:
    """One finished step: guesses for the positions from ``first`` on, with peaked laws."""
    num = len(guesses)
    choices = torch.tensor([guesses])
    laws = torch.zeros(1, num, V).scatter(2, choices[..., None], 30.0)
    drafter.commit(
        None,
        Scores(
            logits_BNV=laws,
            positions_BN=torch.arange(first - 1, first - 1 + num)[None],
            forward_time_s=0.0,
        ),
        Verdict(
            choices_BN=choices,
            path_BM=choices,
            emitted_BM=choices,
            num_accepted_B=torch.zeros(1).long(),
            law_logits_BNV=laws,
        ),
        Outcome(new_units=([],), num_accepted=(0,), done=(False,), was_active=(True,)),
    )
    return laws


def test_the_first_step_drafts_nothing():
    drafter = make(toy_rows(1, 9, seed=0))
    assert drafter.propose(Plan(width=6)).num_drafted == (0,)


def test_guesses_come_back_at_their_positions_with_their_laws():
    rows = toy_rows(1, 9, seed=0)  # two tokens of prompt: the next position is 2
    drafter = make(rows)
    laws = teach(drafter, rows, 2, [3, 1, 4])
    proposal = drafter.propose(Plan(width=4))
    assert proposal.tokens_BN.tolist() == [[int(rows.roots_B()), 3, 1, 4]]
    torch.testing.assert_close(proposal.draft_probs_BNV[:, :3], laws.softmax(-1))
    assert bool((proposal.draft_probs_BNV[:, 3] == 0).all())


def test_new_positions_are_drawn_from_the_last_law_or_from_the_row_above():
    for stride, wanted in [(None, [3, 1, 4, 4, 4]), (2, [3, 1, 4, 1, 4])]:
        rows = toy_rows(1, 12, seed=0)
        drafter = make(rows, stride=stride)
        teach(drafter, rows, 2, [3, 1, 4])
        assert drafter.propose(Plan(width=6)).tokens_BN[0, 1:].tolist() == wanted


def test_guesses_behind_a_narrow_step_are_kept():
    rows = toy_rows(1, 12, seed=0)
    drafter = make(rows)
    laws = teach(drafter, rows, 2, [3, 1, 4])
    teach(drafter, rows, 2, [2])
    proposal = drafter.propose(Plan(width=5))
    assert proposal.tokens_BN[0, 1:].tolist() == [2, 1, 4, 4]
    torch.testing.assert_close(proposal.draft_probs_BNV[:, 1:3], laws[:, 1:].softmax(-1))


def test_a_plan_wider_than_the_window_is_clamped():
    """A ring that wraps would hand out laws that are not the guesses' own."""
    rows = toy_rows(1, 60, seed=0, slack=70)
    drafter = make(rows, max_width=4)
    teach(drafter, rows, 2, [3, 1, 4])
    assert drafter.propose(Plan(width=64)).width == 4


def test_a_row_that_begins_anew_knows_what_follows_its_prompt_and_nothing_else():
    rows = make_rows([[1, 2], [3, 4, 0]], [9, 9], num_rows=1)
    drafter = make(rows)
    teach(drafter, rows, 2, [3, 1, 4, 1])
    rows.host_done[0] = True
    rows.admit(0)
    choice = torch.tensor([[2]])
    laws = torch.zeros(1, 1, V).scatter(2, choice[..., None], 30.0)
    verdict = Verdict(
        choices_BN=choice,
        path_BM=choice,
        emitted_BM=choice,
        num_accepted_B=torch.zeros(1).long(),
        law_logits_BNV=laws,
    )
    drafter.admit([0], verdict)
    # The new positions behind the first guess look at its law, the last one known.
    assert drafter.propose(Plan(width=4)).tokens_BN.tolist() == [[0, 2, 2, 2]]


def test_ended_rows_draft_nothing():
    rows = toy_rows(2, 9, seed=0)
    drafter = make(rows)
    run = Verdict(
        choices_BN=torch.zeros(2, 1).long(),
        path_BM=torch.zeros(2, 1).long(),
        emitted_BM=torch.zeros(2, 1).long(),
        num_accepted_B=torch.zeros(2).long(),
        law_logits_BNV=torch.zeros(2, 1, V),
    )
    scores = Scores(
        logits_BNV=torch.zeros(2, 1, V), positions_BN=torch.ones(2, 1).long(), forward_time_s=0.0
    )
    kept = Outcome(
        new_units=([], []), num_accepted=(0, 0), done=(True, False), was_active=(True, True)
    )
    drafter.commit(None, scores, run, kept)
    rows.host_done[0] = True
    proposal = drafter.propose(Plan(width=4))
    assert proposal.num_drafted == (0, 3)
    assert proposal.valid_BN.tolist() == [[True, False, False, False], [True] * 4]


def test_kept_guesses_save_steps_on_a_target_that_hardly_looks_back():
    table = random_table(0, 12, 3, scale=0.3) + 3 * torch.randn(12, 1, 1, 3, dtype=torch.float64)
    tau = {
        width: run_toy(
            table, lambda rows: JacobiDrafter(rows, 3, max_width=8), num_rows=300, width=width
        ).tau
        for width in (1, 2, 8)
    }
    assert tau[1] == 1.0
    assert tau[1] < tau[2] < tau[8]


def test_greedy_windows_converge_in_fewer_steps_than_tokens():
    model = tiny_model()
    made = make_engine(make_rows([[1, 2]], [40]), model, "jacobi", width=16).run()
    assert made.stats.num_target_forwards < 40
    assert made.stats.tau > 1.05
    assert max(made.units[0]) < VOCAB


@pytest.mark.parametrize(
    "stride", [None, 3, torch.tensor([0, 0, 0, 3, 3, 2] * 4)], ids=["none", "one", "each"]
)
@pytest.mark.parametrize("init", INITS)
def test_laws_that_no_new_position_looks_at_need_not_be_stored(init, stride):
    """The exact rule stores the end of each window only, and guesses as with all laws at hand."""
    table = random_table(1, 24, V) + 2 * torch.randn(24, 1, 1, V, dtype=torch.float64)
    drafted = []
    for keep_laws in (True, False):
        rows = toy_rows(3, 24, seed=2)
        target, rule = TableTarget(rows, table), SeededMatch(build_law(LawConfig()), rows)
        drafter = make(rows, stride=stride, init=init, keep_laws=keep_laws)
        widths, tokens = itertools.cycle((8, 1, 2, 8, 6)), []
        while not rows.is_done:
            proposal = drafter.propose(Plan(width=next(widths)))
            scores = target.score(proposal)
            verdict = rule.verify(proposal, scores)
            # Behind a row's limit nobody looks at a guess.
            counts = proposal.valid_BN & (proposal.depth_BN <= rows.room_B[:, None])
            tokens.append(proposal.tokens_BN.where(counts, -1).tolist())
            drafter.commit(proposal, scores, verdict, target.commit(proposal, verdict))
        drafted.append(tokens)
    assert drafted[0] == drafted[1]


def test_options():
    with pytest.raises(ValueError, match="stride must be >= 1"):
        make(toy_rows(1, 4, seed=0), stride=0)
    with pytest.raises(ValueError, match="unknown init 'below'; known: above, left"):
        make(toy_rows(1, 4, seed=0), init="below")
    assert [default_window(n) for n in (16, 256, 576, 1024, 4096)] == [8, 32, 64, 64, 64]
    assert [default_window(256, rows) for rows in (1, 4, 8, 16, 64)] == [32, 16, 8, 8, 8]
    assert default_window(256) == 32


def test_noise_in_the_window_is_refused_without_a_denoiser():
    rows = toy_rows(1, 4, seed=0)
    target = types.SimpleNamespace(vocab_size=V)
    with pytest.raises(ValueError, match="needs the denoiser of a fine-tuned image model"):
        build_drafter(
            "denoise",
            target=target,
            rows=rows,
            law=build_law(LawConfig()),
            max_width=8,
            shared_noise=True,
        )
    with pytest.raises(ValueError, match="rule 'block' works with"):
        Settings(drafter="denoise", rule="block")
