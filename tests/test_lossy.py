"""Lossy rules say so, are lossless at lenience 0, and break on no draft."""

import functools

import pytest
import torch
from toys import chi_square, chi_square_p, joint_law, random_table, run_toy, toy_rows

from mmspec.drafters.jacobi import JacobiDrafter
from mmspec.law_config import LawConfig
from mmspec.lossy import GroupedAcceptance, OverlappingRows, settled_in_rows
from mmspec.records import Guarantee, Scores
from mmspec.sampling import build_law
from mmspec.tree import pack_chain, pack_trees
from mmspec.verify import MaximalCoupling, SeededMatch

V, LENGTH, STRIDE = 4, 6, 3
#: Codes on a line: two close pairs far from each other.
CODES = torch.tensor([[0.0], [0.2], [3.0], [3.2]])
RULES = {
    "grouped": functools.partial(GroupedAcceptance, codes_VH=CODES),
    "rows": lambda law, rows, **o: OverlappingRows(law=law, rows=rows, stride=STRIDE, **o),
}
LOSSLESS = {"grouped": MaximalCoupling, "rows": SeededMatch}


class FuzzDrafter(JacobiDrafter):
    """Any tokens, in the vocabulary or not, with laws that are none."""

    def propose(self, plan):
        generator = torch.Generator().manual_seed(self._rows.step)
        shape = (self._rows.num_rows, plan.width)
        tokens = torch.randint(-2, V + 2, shape, generator=generator)
        tokens[:, 0] = self._rows.roots_B()
        laws = torch.randn(*shape, V, generator=generator)
        laws[::3] = float("nan")
        laws[1::3] = laws[1::3].softmax(-1)
        counts = [0 if done else plan.width - 1 for done in self._rows.host_done]
        return pack_chain(tokens, counts, V, laws)


def window(rule: str, rows, cls=JacobiDrafter):
    is_seeded = rule == "rows"
    return cls(rows, V, max_width=6, stride=STRIDE, shared_noise=is_seeded, keep_laws=not is_seeded)


def run(rule: str, made, *, drafter=JacobiDrafter, length=LENGTH, **options):
    table = random_table(3, length, V)
    return run_toy(table, lambda rows: window(rule, rows, drafter), made, **options)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("width", [2, 4, 6])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_lenience_zero_is_the_lossless_rule(rule, width, temperature):
    options = {
        "num_rows": 3000, "width": width, "seed": 5,
        "config": LawConfig(temperature=temperature),
    }  # fmt: skip
    strict = run(rule, functools.partial(RULES[rule], lenience=0.0), **options)
    assert strict.guarantee == Guarantee.LOSSY
    assert torch.equal(strict.outputs, run(rule, LOSSLESS[rule], **options).outputs)


@pytest.mark.parametrize("rule", RULES)
def test_lenience_costs_the_law_and_saves_forwards(rule):
    lenient = run(rule, functools.partial(RULES[rule], lenience=1.0), width=6)
    lossless = run(rule, LOSSLESS[rule], width=6)
    law = joint_law(random_table(3, LENGTH, V))
    assert lenient.guarantee == Guarantee.LOSSY
    assert chi_square_p(lenient.outputs, law) < 1e-12
    assert chi_square_p(lossless.outputs, law) > 5e-4
    assert lenient.tau > lossless.tau


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_the_default_lenience_changes_the_law_and_none_does_not(rule):
    law = joint_law(random_table(3, LENGTH, V))

    def found(**options):
        made = functools.partial(RULES[rule], **options)
        return chi_square(run(rule, made, width=6, num_rows=200_000).outputs, law)

    default = found()
    assert found(lenience=0.0)[2] > 5e-4
    assert default[2] < 1e-12
    if rule == "rows":  # at 0.75 a code waits for one column more than at 1
        assert default[0] < found(lenience=1.0)[0]


@pytest.mark.parametrize("rule", RULES)
def test_no_draft_breaks_a_lossy_rule(rule):
    made = functools.partial(RULES[rule], lenience=1.0)
    fuzzed = run(rule, made, drafter=FuzzDrafter, num_rows=600, width=6)
    assert bool(((fuzzed.outputs >= 0) & (fuzzed.outputs < V)).all())
    if rule == "rows":  # settles nothing but what it chose itself
        plain = run(rule, SeededMatch, num_rows=600, width=1)
        assert torch.equal(fuzzed.outputs, plain.outputs)


def test_rows_refuse_trees():
    rows = toy_rows(1, 4, seed=0)
    proposal = pack_trees([[1, 2, 3]], [[-1, -1, 0]], rows.roots_B(), V, 4)
    scores = Scores(
        logits_BNV=torch.zeros(1, 4, V),
        positions_BN=rows.positions(proposal.depth_BN),
        forward_time_s=0.0,
    )
    with pytest.raises(ValueError, match="chain"):
        RULES["rows"](build_law(LawConfig()), rows).verify(proposal, scores)


def scaled_test(lenience, target, draft, token, codes=CODES):
    """The scaled test of one draft, from a test of 1."""
    rows = toy_rows(1, 4, seed=0)
    rule = GroupedAcceptance(build_law(LawConfig()), rows, codes_VH=codes, lenience=lenience)
    arguments = (torch.tensor([[target]]), torch.tensor([[draft]]), torch.tensor([[[token]]]))
    base = MaximalCoupling.tests(rule, *arguments, torch.tensor([[2]]))
    return float(rule.tests(*arguments, torch.tensor([[2]])) / base)


def test_a_cluster_is_near_in_embedding_and_in_probability():
    # 0 and 1 stand for each other: 0.3 + 0.25 against 0.5 + 0.1, instead of 0.3 against 0.5.
    target, draft = [0.3, 0.25, 0.25, 0.2], [0.5, 0.1, 0.2, 0.2]
    assert scaled_test(0.5, target, draft, 0) == pytest.approx((0.6 / 0.55) / (0.5 / 0.3))
    assert scaled_test(0.0, target, draft, 0) == 1.0
    # At 0.15 apart in probability they are not near any more.
    assert scaled_test(0.5, [0.4, 0.2, 0.2, 0.2], draft, 0) == 1.0
    # All codes are near with a radius above the largest distance, here 3.2 of a scale of 2.1.
    assert scaled_test(1.6, target, draft, 0) == pytest.approx((1.0 / 1.0) / (0.5 / 0.3))


def test_a_cluster_reaches_seven_ranks():
    codes = torch.zeros(20, 1)
    codes[0] = 100.0  # not a scale of zero
    target = [1 / 20] * 20
    draft = [0.0] * 10 + [0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.2, 0.3, 0.0]
    # Token 10 has rank 10: ranks 3 to 17 count, so the 0.2 of token 17, not the 0.3 of token 18.
    wanted = (0.7 / 0.5) / ((15 / 20) / (1 / 20))
    assert scaled_test(0.5, target, draft, 10, codes) == pytest.approx(wanted)


def test_a_forbidden_draft_is_refused_whatever_its_cluster():
    rows = toy_rows(200, 4, seed=0)
    laws = torch.tensor([0.5, 0.3, 0.1, 0.1]).expand(200, 2, V)
    tokens = torch.tensor([[1, 1]]).expand(200, -1)
    proposal = pack_chain(tokens, [1] * 200, V, laws)
    logits = torch.tensor([0.6, 0.0, 0.2, 0.2]).log().expand(200, 2, V)
    scores = Scores(
        logits_BNV=logits, positions_BN=rows.positions(proposal.depth_BN), forward_time_s=0.0
    )
    rule = GroupedAcceptance(build_law(LawConfig()), rows, codes_VH=CODES, lenience=1.0)
    assert not bool((rule.verify(proposal, scores).emitted_BM[:, 0] == 1).any())


def slowly_settled(holds, begin, stride, lookahead):
    """The definition, code by code: which choices had all they need in the forward."""
    known, settled = {}, []

    def has_all(place):
        line, column = divmod(place, stride)
        needed = [line * stride + column - 1] if column else []
        needed += [(line - 1) * stride + min(column + lookahead, stride - 1)]
        return all(at < begin or known.get(at, False) for at in needed)

    for node, is_held in enumerate(holds):
        place = begin + node
        settled.append(has_all(place))
        known[place] = settled[-1] and is_held
    return settled


@pytest.mark.parametrize("stride", [1, 3, 5])
def test_settled_choices_are_those_with_settled_neighbours(stride):
    generator = torch.Generator().manual_seed(stride)
    for lookahead in range(stride + 1):
        holds = torch.rand(40, 17, generator=generator) < 0.8
        begin = torch.randint(0, 3 * stride, (40,), generator=generator)
        got = settled_in_rows(holds, begin, stride, lookahead)
        wanted = [
            slowly_settled(row.tolist(), int(at), stride, lookahead)
            for row, at in zip(holds, begin, strict=True)
        ]
        assert got.tolist() == wanted
    assert not settled_in_rows(holds, begin - 100, stride, 0).any()
