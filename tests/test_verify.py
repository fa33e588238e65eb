"""Every rule keeps the law it promises, and the test that says so has teeth."""

import functools

import pytest
import torch
from published import (
    BatchMinimum,
    CoupledBlock,
    StaleAccepted,
    StaleLaws,
    TargetForResidual,
    ThresholdReuse,
    UntoldBlock,
)
from toys import (
    TableDrafter,
    TableTreeDrafter,
    chi_square_p,
    joint_law,
    random_table,
    run_toy,
    toy_rows,
)

from mmspec import verify
from mmspec.drafters.jacobi import INITS, JacobiDrafter
from mmspec.drafters.mending import Mender
from mmspec.drafters.plain import PlainDrafter
from mmspec.law_config import LawConfig
from mmspec.records import Guarantee, Proposal, Scores
from mmspec.sampling import LawContext, build_law
from mmspec.tree import pack_chain, pack_trees
from mmspec.verify import (
    BlockVerification,
    IndependentRedraft,
    block_choices,
    build_rule,
    residual_choices,
)

V, LENGTH = 4, 3
#: A right rule fails this about once in two thousand seeds; the seeds are fixed.
SANE_P = 5e-4
#: Every biased rule below lands far under this.
BIASED_P = 1e-12
#: Samples of the slow tests, all rows of one batch.
MANY = 200_000


class TwinTreeDrafter(TableDrafter):
    """Sends one guess twice, each time with another guess behind it."""

    name = "twins"

    def propose(self, plan):
        num_rows = self.rows.num_rows
        if self.rows.max_remaining < 2:
            return super().propose(plan)
        root = self.rows.roots_B()
        first = self.table[root]
        token = (first + self.noise(0)).argmax(-1)
        behind = self.table[token]
        generator = torch.Generator().manual_seed(self.rows.step)
        pair = behind.softmax(-1).multinomial(2, replacement=True, generator=generator)
        tokens = torch.stack([root, token, token, pair[:, 0], pair[:, 1]], 1)
        laws = torch.stack([first, behind, behind, behind, behind], 1).softmax(-1)
        shape = pack_trees([[0] * 4], [[-1, -1, 0, 1]], root[:1], V, 5)
        return Proposal(
            tokens_BN=tokens,
            parents_BN=shape.parents_BN.expand(num_rows, -1),
            valid_BN=torch.ones_like(tokens, dtype=torch.bool),
            depth_BN=shape.depth_BN.expand(num_rows, -1),
            ancestors_BNN=shape.ancestors_BNN.expand(num_rows, -1, -1),
            is_chain=False,
            num_drafted=(4,) * num_rows,
            num_levels=(2,) * num_rows,
            branching=2,
            draft_probs_BNV=laws,
        )


def draft_table(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(V, V, generator=generator, dtype=torch.float64)


def make_drafter(kind: str, seed: int):
    options = {"max_width": 4, "shared_noise": False, "keep_laws": True}
    table = draft_table(seed)
    return {
        "plain": lambda rows: PlainDrafter(rows, V),
        "chain": lambda rows: TableDrafter(rows, table),
        "tree": lambda rows: TableTreeDrafter(rows, table),
        "twins": lambda rows: TwinTreeDrafter(rows, table),
        "jacobi": lambda rows: JacobiDrafter(rows, V, **options),
        "jacobi-grid": lambda rows: JacobiDrafter(rows, V, stride=2, **options),
        # Above is the left again, so that what stands there repeats itself in five tokens.
        "jacobi-mended": lambda rows: JacobiDrafter(rows, V, stride=1, mend=True, **options),
        # One line, which goes on with its last code.
        "jacobi-line": lambda rows: JacobiDrafter(rows, V, stride=9, mend=True, **options),
        "jacobi-shared": lambda rows: JacobiDrafter(rows, V, max_width=4),
        "jacobi-gumbel": lambda rows: JacobiDrafter(rows, V, max_width=4, keep_laws=True),
        "stale": lambda rows: StaleLaws(rows, V, **options),
        "stale-accepted": lambda rows: StaleAccepted(rows, V, **options),
    }[kind]


#: Rules that have no name of their own.
GUMBEL = functools.partial(IndependentRedraft, shared_noise=True)


def p_value(kind: str, rule, seed: int = 0, **options) -> float:
    # A Jacobi guess is tested twice before it shows, so a fault needs one more position to do so.
    is_window = kind.startswith(("jacobi", "stale"))
    table = random_table(seed, LENGTH + is_window, V)
    made = run_toy(table, make_drafter(kind, seed), rule, seed=seed, **options)
    assert made.guarantee == (Guarantee.EXACT if rule == "exact" else Guarantee.DISTRIBUTION)
    if kind != "plain":
        assert made.num_ends > 1, "the rows of the batch went in step"
        assert made.num_accepted > 0.1 * len(made.outputs), "the rule was hardly used"
    return chi_square_p(made.outputs, joint_law(table))


LAWFUL = [
    ("plain", "exact"),
    ("chain", "speculative"),
    ("tree", "speculative"),
    ("twins", "speculative"),
    ("chain", "block"),
    ("jacobi", "block"),
    ("jacobi", "coupled"),
    ("jacobi", CoupledBlock),
    ("jacobi", "sjd"),
    ("jacobi-mended", "coupled"),
    ("jacobi-mended", "sjd"),
    ("jacobi-line", "coupled"),
    ("jacobi-line", "sjd"),
    ("jacobi-gumbel", GUMBEL),
]


@pytest.mark.parametrize(("kind", "rule"), LAWFUL)
def test_joint_law_of_all_positions(kind, rule):
    assert p_value(kind, rule) > SANE_P


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["coupled", CoupledBlock, "sjd", "block"])
def test_joint_law_of_a_grid_window(rule):
    assert p_value("jacobi-grid", rule, seed=4, num_rows=MANY) > SANE_P


@pytest.mark.slow
@pytest.mark.parametrize("seed", [11, 12, 13])
@pytest.mark.parametrize(("kind", "rule"), [*LAWFUL, ("jacobi", "speculative")])
def test_joint_law_in_200_000_rows_of_one_batch(kind, rule, seed):
    assert p_value(kind, rule, seed, num_rows=MANY) > SANE_P


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "rule"),
    [
        ("stale", "coupled"),
        ("stale-accepted", BatchMinimum),
        ("jacobi", TargetForResidual),
        ("jacobi", ThresholdReuse),
    ],
)
def test_published_rules_that_do_not_keep_the_law_fail_the_same_test(kind, rule):
    assert p_value(kind, rule, 11, num_rows=MANY) < BIASED_P


@pytest.mark.slow
def test_a_block_whose_end_tells_nothing_fails_the_same_test():
    assert p_value("jacobi", UntoldBlock, 12, num_rows=MANY) < BIASED_P


@pytest.mark.slow
@pytest.mark.parametrize("init", INITS)
def test_joint_law_however_new_positions_begin(init):
    def window(rows):
        return JacobiDrafter(
            rows, V, max_width=4, stride=2, shared_noise=False, keep_laws=True, init=init
        )

    table = random_table(4, LENGTH + 1, V)
    for rule in ("coupled", "sjd"):
        made = run_toy(table, window, rule, num_rows=MANY, seed=4)
        assert chi_square_p(made.outputs, joint_law(table)) > SANE_P
    plain = run_toy(table, make_drafter("plain", 4), num_rows=3000, seed=4)
    fast = run_toy(
        table, lambda rows: JacobiDrafter(rows, V, max_width=4, stride=2, init=init),
        num_rows=3000, seed=4,
    )  # fmt: skip
    assert torch.equal(fast.outputs, plain.outputs)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["chain", "jacobi"])
def test_joint_law_under_warpers(kind):
    config = LawConfig(temperature=0.7, top_k=3)
    table = random_table(5, LENGTH, V)
    law = build_law(config)

    # Warpers do not look at the path.
    nothing = torch.zeros(1, 1, dtype=torch.long)
    context = LawContext(
        tokens_BN=nothing,
        ancestors_BNN=nothing[..., None].bool(),
        depth_BN=nothing,
        positions_BN=nothing,
        history_BT=nothing,
        lengths_B=nothing[0],
        prompt_lengths_B=nothing[0],
    )

    def law_of(logits):
        return law(logits.flatten(0, 1), context).view_as(logits).softmax(-1)

    made = run_toy(
        table, make_drafter(kind, 5), "speculative", num_rows=MANY, seed=5, config=config
    )
    assert chi_square_p(made.outputs, joint_law(table, law_of)) > SANE_P


def residual_is_target(monkeypatch):
    monkeypatch.setattr(verify, "_normalised", lambda weights, fallback: fallback)


def draft_tested_twice(monkeypatch):
    once = verify.uniform

    def best_of_two(keys, positions, salt, step=0):
        return torch.minimum(once(keys, positions, salt, step), once(keys, positions, 77, step))

    monkeypatch.setattr(verify, "uniform", best_of_two)


def tests_reused_in_later_steps(monkeypatch):
    fresh = verify.uniform
    monkeypatch.setattr(verify, "uniform", lambda k, p, salt, step=0: fresh(k, p, salt, 0))


def mended_beside_their_old_laws(monkeypatch):
    mended = Mender.mended

    def silent(*arguments):
        guesses, is_mended = mended(*arguments)
        return guesses, torch.zeros_like(is_mended)

    monkeypatch.setattr(Mender, "mended", silent)


def twins_kept(monkeypatch):
    from mmspec import tree

    monkeypatch.setattr(tree, "_repeats", lambda _, fits: torch.zeros_like(fits))


def nothing(monkeypatch):
    pass


@pytest.mark.parametrize(
    ("kind", "rule", "fault"),
    [
        ("stale", "coupled", nothing),
        ("chain", "speculative", residual_is_target),
        ("chain", "block", draft_tested_twice),
        ("jacobi", "coupled", tests_reused_in_later_steps),
        ("twins", "speculative", twins_kept),
    ],
)
def test_a_biased_rule_fails_the_same_test(kind, rule, fault, monkeypatch):
    fault(monkeypatch)
    assert p_value(kind, rule) < BIASED_P


@pytest.mark.slow
def test_mended_guesses_beside_their_old_laws_fail_the_same_test(monkeypatch):
    mended_beside_their_old_laws(monkeypatch)
    assert p_value("jacobi-mended", "coupled", num_rows=MANY) < BIASED_P


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tree", "jacobi"])
@pytest.mark.parametrize("fault", [residual_is_target, draft_tested_twice])
def test_more_biased_rules_fail_the_same_test(kind, fault, monkeypatch):
    fault(monkeypatch)
    assert p_value(kind, "speculative") < BIASED_P


@pytest.mark.parametrize("kind", ["chain", "tree", "twins", "jacobi-shared", "jacobi-grid"])
@pytest.mark.parametrize("width", [2, 4])
def test_seeded_match_reproduces_plain_decoding(kind, width):
    table = random_table(0, LENGTH, V)
    plain = run_toy(table, make_drafter("plain", 0), num_rows=3000, seed=7)
    fast = run_toy(table, make_drafter(kind, 0), num_rows=3000, seed=7, width=width)
    assert torch.equal(fast.outputs, plain.outputs)
    assert fast.tau > 1.05


def test_shared_noise_accepts_more_than_independent_noise():
    table = random_table(1, LENGTH, V)
    drafts = draft_table(1)
    taus = [
        run_toy(table, lambda r, s=s: TableDrafter(r, drafts, shared_noise=s), num_rows=5000).tau
        for s in (True, False)
    ]
    assert taus[0] > taus[1] + 0.1


# --------------------------------------------------------------------------- one node


def laws(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A pair of target and draft laws over five tokens."""
    target = torch.tensor([0.4, 0.3, 0.2, 0.1, 0.0], dtype=torch.float64)
    draft = {
        "generic": torch.tensor([0.1, 0.2, 0.2, 0.2, 0.3]),
        "equal": target,
        "almost equal": target + torch.tensor([1e-12, -1e-12, 0, 0, 0]),
        "disjoint": torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0]),
        "one-hot": torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0]),
        "zeros": torch.zeros(5),
        "nan": torch.tensor([0.5, float("nan"), 0.5, 0.0, 0.0]),
        "inf": torch.tensor([float("inf"), 0.0, 0.0, 0.0, 0.0]),
        "negative": torch.tensor([1.5, -0.5, 0.0, 0.0, 0.0]),
        "not a law": torch.tensor([0.5, 0.1, 0.0, 0.0, 0.0]),
    }[kind]
    return target, draft.double()


INSANE = ("zeros", "nan", "inf", "negative", "not a law")
KINDS = ("generic", "equal", "almost equal", "disjoint", "one-hot", *INSANE)


def drawn_from(law: torch.Tensor, shape: tuple[int, ...], kind: str) -> torch.Tensor:
    if kind in INSANE:
        return torch.randint(5, shape)
    return law.expand(shape[0], -1).multinomial(shape[1], replacement=True)


def gumbel_noise(*shape: int) -> torch.Tensor:
    return -(-torch.rand(*shape, dtype=torch.float64).clamp(min=1e-300).log()).log()


@pytest.mark.parametrize("kind", KINDS)
def test_one_draft_keeps_the_law(kind):
    target, draft = laws(kind)
    num = 20_000
    tokens = drawn_from(draft, (num, 1), kind)[:, None]
    choices = residual_choices(
        target.expand(num, 1, -1),
        draft.expand(num, 1, -1),
        tokens,
        torch.ones_like(tokens, dtype=torch.bool),
        torch.rand(num, 1, 1),
        gumbel_noise(num, 1, 5),
    )
    assert chi_square_p(choices, target) > SANE_P
    if kind not in INSANE:
        kept = (choices == tokens[..., 0]).double().mean()
        # A refused draft is never drawn again: the residual has no mass there.
        assert kept == pytest.approx(float(torch.minimum(target, draft).sum()), abs=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_two_drafts_in_a_block_keep_the_law(kind):
    target, draft = laws(kind)
    second = torch.tensor([0.1, 0.1, 0.1, 0.2, 0.5], dtype=torch.float64)
    num = 40_000
    drafted = drawn_from(draft, (num, 2), kind)
    tokens = torch.cat([torch.zeros(num, 1, dtype=torch.long), drafted], 1)
    emitted, accepted = block_choices(
        torch.stack([target, second, target]).expand(num, -1, -1),
        torch.stack([draft, draft, draft]).expand(num, -1, -1),
        tokens,
        torch.ones_like(tokens, dtype=torch.bool),
        torch.rand(num, 3),
        gumbel_noise(num, 3, 5),
    )
    assert chi_square_p(emitted[:, :1], target) > SANE_P
    # Where one draft or more was accepted, the second token must follow the second law too; in the
    # whole that is P(a) P(b), completed here by the plain draw where the block ended at once.
    fill = second.expand(num, -1).multinomial(1).squeeze(1)
    pairs = torch.stack([emitted[:, 0], torch.where(accepted > 0, emitted[:, 1], fill)], 1)
    assert chi_square_p(pairs, torch.outer(target, second).flatten()) > SANE_P
    if kind in INSANE:
        assert int(accepted.max()) == 0


def test_a_token_that_the_target_forbids_is_never_emitted():
    target = torch.tensor([0.0, 1.0, 0.0])
    num = 3000
    tokens = torch.randint(3, (num, 1, 2))
    for draft in (torch.tensor([0.4, 0.3, 0.3]), torch.tensor([1.0, 0.0, 0.0])):
        choices = residual_choices(
            target.expand(num, 1, -1),
            draft.expand(num, 1, -1),
            tokens,
            torch.ones_like(tokens, dtype=torch.bool),
            torch.rand(num, 1, 2) * 1e-30,
            gumbel_noise(num, 1, 3),
        )
        assert bool((choices == 1).all())


@pytest.mark.parametrize("seed", [0, 1])
def test_block_verification_accepts_more_than_single_tests(seed):
    table = random_table(seed, LENGTH, V)
    taus = {
        rule: run_toy(table, make_drafter("chain", seed), rule, num_rows=10_000, seed=seed).tau
        for rule in ("speculative", "block")
    }
    assert taus["block"] > taus["speculative"]


def scored(proposal, rows, table) -> Scores:
    logits = table[0][proposal.tokens_BN, proposal.tokens_BN]
    return Scores(
        logits_BNV=logits, positions_BN=rows.positions(proposal.depth_BN), forward_time_s=0.0
    )


@pytest.mark.parametrize(("rule", "is_lawful"), [(CoupledBlock, True), (UntoldBlock, False)])
def test_guesses_behind_a_block_that_ended_early_have_the_targets_law(rule, is_lawful):
    """The drafts' laws are the target's in another order, and no law looks at the path."""
    num, depth = 40_000, 3
    target, _ = laws("generic")
    drafts = torch.stack([target[[4, 0, 1, 2, 3]], target[[1, 2, 3, 0, 4]], target.flip(0)])
    drafts = 0.9 * drafts + 0.02
    rows = toy_rows(num, depth + 2, seed=1)
    torch.manual_seed(0)
    tokens = torch.cat([rows.roots_B()[:, None], drafts.multinomial(num, True).T], 1)
    probs = torch.nn.functional.pad(drafts, (0, 0, 0, 1)).expand(num, -1, -1)
    proposal = pack_chain(tokens, [depth] * num, 5, probs)
    scores = Scores(
        logits_BNV=target.log().expand(num, depth + 1, -1),
        positions_BN=rows.positions(proposal.depth_BN),
        forward_time_s=0.0,
    )
    made = rule(build_law(LawConfig()), rows).verify(proposal, scores)
    ended = made.num_accepted_B == 0
    assert int(ended.sum()) > 3000
    joint = torch.einsum("i,j,k->ijk", target, target, target).flatten()
    # The choice behind the root comes from the residual, since the block ended there.
    p = chi_square_p(made.choices_BN[ended, 1:], joint)
    assert p > SANE_P if is_lawful else p < BIASED_P


def test_block_verification_refuses_trees():
    rows = toy_rows(1, 4, seed=0)
    proposal = pack_trees([[1, 2, 3]], [[-1, -1, 0]], rows.roots_B(), V, 4)
    rule = BlockVerification(build_law(LawConfig()), rows)
    with pytest.raises(ValueError, match="chain"):
        rule.verify(proposal, scored(proposal, rows, random_table(0, 4, V)))


def test_unknown_rule_names_the_known_ones():
    rows = toy_rows(1, 4, seed=0)
    with pytest.raises(ValueError, match="block, coupled, exact, sjd, speculative"):
        build_rule("magic", build_law(LawConfig()), rows)


@pytest.mark.parametrize("rule", ["exact", "speculative", "block", "coupled", "sjd"])
def test_greedy_rules_take_the_argmax_even_with_draft_laws(rule):
    table = random_table(3, LENGTH, V)
    greedy = LawConfig(temperature=0.0)
    plain = run_toy(table, make_drafter("plain", 3), num_rows=1, config=greedy)
    fast = run_toy(table, make_drafter("chain", 3), rule, num_rows=200, config=greedy)
    assert torch.equal(fast.outputs, plain.outputs.expand(200, -1))


@pytest.mark.parametrize("rule", ["exact", "speculative", "block", "coupled", "sjd"])
def test_a_root_outside_the_vocabulary_is_harmless(rule):
    """In image generation the first root is a text token of another vocabulary."""
    rows = toy_rows(2, 4, seed=0)
    rows.tokens_BT[:, 1] = 10**6
    probs = torch.full((2, 3, V), 1 / V)
    proposal = pack_chain(torch.tensor([[10**6, 1, 2], [10**6, 3, 0]]), [2, 1], V, probs)
    law = build_law(LawConfig(repetition_penalty=1.3, presence_penalty=0.5))
    scores = Scores(
        logits_BNV=torch.randn(2, 3, V),
        positions_BN=rows.positions(proposal.depth_BN),
        forward_time_s=0.0,
    )
    verdict = build_rule(rule, law, rows).verify(proposal, scores)
    assert bool((verdict.num_accepted_B <= torch.tensor([2, 1])).all())
    assert bool(((verdict.emitted_BM >= 0) & (verdict.emitted_BM < V)).all())
