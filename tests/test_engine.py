"""Whatever plugs into the engine, its output is plain decoding, row by row."""

import dataclasses
import itertools

import pytest
import torch
from tiny import VOCAB, make_engine, make_rows, tiny_model
from toys import TableDrafter, chi_square_p, joint_law, random_table, run_toy

from mmspec.drafters.plain import root_only
from mmspec.law_config import LawConfig
from mmspec.noise import gumbel
from mmspec.records import Proposal
from mmspec.sampling import LawContext, build_law
from mmspec.tree import pack_chain, pack_trees

PROMPTS = [[1, 2, 3, 4], [5, 6, 7, 8, 9, 10, 11], [3]]
BUDGETS = [10, 7, 13]
CONFIGS = {
    "greedy": LawConfig(temperature=0.0),
    "sampled": LawConfig(temperature=1.0),
    "warped": LawConfig(temperature=0.7, top_k=8, repetition_penalty=1.3),
}
DRAFTERS = ["none", "jacobi", "model", "early_exit", "clone"]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def small():
    return tiny_model(num_hidden_layers=1, seed=5)


def reference(model, prompt, budget, key, config, eos=()) -> list[int]:
    """Plain decoding without a cache, a batch, or anything of the engine."""
    law, tokens = build_law(config), list(prompt)
    for _ in range(budget):
        with torch.no_grad():
            logits = model(torch.tensor([tokens]), use_cache=False).logits[:, -1:]
        one = torch.ones(1, 1, dtype=torch.long)
        context = LawContext(
            tokens_BN=one * tokens[-1],
            ancestors_BNN=one[..., None].bool(),
            depth_BN=one * 0,
            positions_BN=one * (len(tokens) - 1),
            history_BT=torch.tensor([tokens]),
            lengths_B=one[0] * len(tokens),
            prompt_lengths_B=one[0] * len(prompt),
        )
        scores = law(logits, context)
        if not config.is_greedy:
            scores = scores + gumbel(key[None], one * len(tokens), VOCAB)
        tokens.append(int(scores.argmax()))
        if tokens[-1] in eos:
            break
    return tokens[len(prompt) :]


@pytest.fixture(scope="module")
def expected(model):
    keys = make_rows(PROMPTS, BUDGETS).keys_B
    return {
        name: tuple(
            reference(model, prompt, budget, key, config)
            for prompt, budget, key in zip(PROMPTS, BUDGETS, keys, strict=True)
        )
        for name, config in CONFIGS.items()
    }


@pytest.mark.parametrize(
    ("drafter", "width"), [("none", 1), *itertools.product(DRAFTERS[1:], [1, 2, 8, 16])]
)
@pytest.mark.parametrize("law", CONFIGS)
def test_every_drafter_gives_plain_decoding(drafter, law, width, model, small, expected):
    rows = make_rows(PROMPTS, BUDGETS)
    made = make_engine(rows, model, drafter, small=small, config=CONFIGS[law], width=width).run()
    assert made.units == expected[law]
    assert [rows.new_tokens(r) for r in range(3)] == list(expected[law])
    if drafter == "clone" and width > 1:
        # The clone is right every time, so only the end of the rows can cut a step short.
        assert made.stats.acceptance_by_position[0] == 1.0
        assert made.stats.num_target_forwards <= -(-max(BUDGETS) // width) + 3


@pytest.mark.parametrize("drafter", ["jacobi", "model", "early_exit"])
@pytest.mark.parametrize("row", [0, 2])
def test_a_row_of_a_batch_is_its_single_run(drafter, row, model, small, expected):
    rows = make_rows([PROMPTS[row]], [BUDGETS[row]])
    rows.keys_B = make_rows(PROMPTS, BUDGETS).keys_B[row : row + 1]
    engine = make_engine(rows, model, drafter, small=small, config=CONFIGS["warped"])
    assert engine.run().units == (expected["warped"][row],)


# --------------------------------------------------------------------------- bad drafters


class Liar:
    """Calls a function for its proposal; knows nothing and learns nothing."""

    name = "liar"

    def __init__(self, rows, make):
        self.rows, self.make = rows, make

    def prefill(self):
        pass

    def propose(self, plan) -> Proposal:
        return self.make(self.rows, plan.width, torch.Generator().manual_seed(self.rows.step))

    def commit(self, proposal, scores, verdict, outcome):
        pass


def chain_of(low: int, high: int):
    def make(rows, width, generator):
        tokens = torch.randint(low, high, (rows.num_rows, width), generator=generator)
        tokens[:, 0] = rows.roots_B()
        counts = torch.randint(0, width, (rows.num_rows,), generator=generator).tolist()
        return pack_chain(tokens, counts, VOCAB)

    return make


def with_laws(fill):
    def make(rows, width, generator):
        proposal = chain_of(0, VOCAB)(rows, width, generator)
        laws = torch.rand(rows.num_rows, width, VOCAB, generator=generator)
        return dataclasses.replace(proposal, draft_probs_BNV=fill(laws))

    return make


def nan_laws(laws):
    laws[..., 3] = float("nan")
    return laws


def trees_of(low: int, high: int):
    def make(rows, width, generator):
        tokens, parents = [], []
        for _ in range(rows.num_rows):
            count = int(torch.randint(0, width, (), generator=generator))
            tokens.append(torch.randint(low, high, (count,), generator=generator).tolist())
            parents.append(
                [
                    int(torch.randint(-1, i, (), generator=generator)) if i else -1
                    for i in range(count)
                ]
            )
        return pack_trees(tokens, parents, rows.roots_B(), VOCAB, width)

    return make


def twins(rows, width, generator):
    token = torch.randint(0, VOCAB, (rows.num_rows,), generator=generator).tolist()
    count = width - 1
    tokens = [[t] * count for t in token]
    return pack_trees(tokens, [[-1] * count] * rows.num_rows, rows.roots_B(), VOCAB, width)


LIES = {
    "nothing": lambda rows, width, generator: root_only(rows),
    "padding only": lambda rows, width, generator: pack_chain(
        torch.full((rows.num_rows, width), -7), [0] * rows.num_rows, VOCAB
    ),
    "constant": chain_of(5, 6),
    "random": chain_of(0, VOCAB),
    "out of vocabulary": chain_of(VOCAB, 10**12),
    "negative": chain_of(-(10**9), 0),
    "all kinds": chain_of(-20, 2 * VOCAB),
    "laws of nan": with_laws(nan_laws),
    "laws of -inf": with_laws(lambda laws: laws - float("inf")),
    "laws of zero": with_laws(lambda laws: laws * 0),
    "laws of inf": with_laws(lambda laws: laws + float("inf")),
    "random trees": trees_of(0, 4),
    "garbage trees": trees_of(-50, 2 * VOCAB),
    "twins": twins,
}


def with_root(make):
    """A proposal whose root is right whatever its maker did to it."""

    def made(rows, width, generator):
        proposal = make(rows, width, generator)
        proposal.tokens_BN[:, 0] = rows.roots_B()
        return proposal

    return made


@pytest.mark.parametrize("law", ["greedy", "warped"])
@pytest.mark.parametrize("lie", LIES)
def test_a_wrong_draft_costs_speed_and_nothing_else(lie, law, model, expected):
    rows = make_rows(PROMPTS, BUDGETS)
    liar = Liar(rows, with_root(LIES[lie]))
    engine = make_engine(rows, model, lambda *_: liar, config=CONFIGS[law], width=6)
    assert engine.run().units == expected[law]


def hints(tokens_of_row, kind):
    """Right guesses hidden in a tree of wrong ones, so that trees are accepted and moved."""

    def make(rows, width, generator):
        tokens, parents = [], []
        for row in range(rows.num_rows):
            ahead = tokens_of_row[row][len(rows.new_tokens(row)) :][:3]
            wrong = torch.randint(0, VOCAB, (3,), generator=generator).tolist()
            tree_tokens, tree_parents, last = [], [], -1
            for right, noise in zip(ahead, wrong, strict=False):
                order = [noise, right] if kind == "late" else [right, noise]
                tree_tokens += order
                tree_parents += [last, last]
                last = tree_tokens.__len__() - (1 if kind == "late" else 2)
            tokens.append(tree_tokens[: width - 1])
            parents.append(tree_parents[: width - 1])
        return pack_trees(tokens, parents, rows.roots_B(), VOCAB, width)

    return make


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["late", "early"])
def test_trees_are_accepted_and_moved(kind, attention, expected):
    model = tiny_model(attention=attention)
    rows = make_rows(PROMPTS, BUDGETS)
    liar = Liar(rows, hints(expected["sampled"], kind))
    engine = make_engine(rows, model, lambda *_: liar, config=CONFIGS["sampled"], width=8)
    made = engine.run()
    assert made.units == expected["sampled"]
    assert made.stats.tau > 2


class InsaneTable(TableDrafter):
    """Samples from its law and reports something that is none."""

    def __init__(self, rows, table, fill):
        super().__init__(rows, table)
        self.fill = fill

    def propose(self, plan):
        proposal = super().propose(plan)
        return dataclasses.replace(proposal, draft_probs_BNV=self.fill(proposal.draft_probs_BNV))


@pytest.mark.parametrize("rule", ["speculative", "block"])
@pytest.mark.parametrize(
    "fill", [nan_laws, lambda laws: laws * 0, lambda laws: laws + float("inf")]
)
def test_insane_draft_laws_keep_the_law(rule, fill):
    table = random_table(0, 2, 4)
    drafts = torch.randn(4, 4, dtype=torch.float64)
    made = run_toy(table, lambda rows: InsaneTable(rows, drafts, fill), rule, num_rows=8000)
    assert chi_square_p(made.outputs, joint_law(table)) > 5e-4


# --------------------------------------------------------------------------- ends


@pytest.mark.parametrize("drafter", ["none", "jacobi", "model", "clone", "early_exit"])
def test_an_end_inside_a_draft_drops_what_is_behind_it(drafter, model, small, expected):
    eos = expected["sampled"][2][4]
    cut = [
        list(units[: units.index(eos) + 1]) if eos in units else units
        for units in expected["sampled"]
    ]
    rows = make_rows(PROMPTS, BUDGETS, eos_token_ids=[eos])
    engine = make_engine(rows, model, drafter, small=small, config=CONFIGS["sampled"], width=8)
    made = engine.run()
    assert list(made.units) == cut
    assert [list(t) for t in rows.host_tokens] == [p + u for p, u in zip(PROMPTS, cut, strict=True)]
    assert rows.lengths_B.tolist() == [len(t) for t in rows.host_tokens]


@pytest.mark.parametrize("drafter", ["none", "jacobi", "clone", "early_exit"])
@pytest.mark.parametrize("keep", [0, 3, 5])
def test_a_stop_check_may_take_back_what_earlier_steps_gave(drafter, keep, model, expected):
    """A stop string that began in an earlier step: what is kept is shorter than what was shown."""

    def stop(row, output):
        return keep if row == 2 and len(output) >= 6 else None

    rows = make_rows(PROMPTS, BUDGETS, stop_check=stop)
    made = make_engine(rows, model, drafter, config=CONFIGS["sampled"], width=4).run()
    wanted = [*expected["sampled"][:2], expected["sampled"][2][:keep]]
    assert list(made.units) == wanted
    assert [rows.new_tokens(r) for r in range(3)] == wanted
    assert made.row_stats[2].num_units == keep


@pytest.mark.parametrize("keep", [-1, 99])
def test_a_stop_check_out_of_range_is_an_error(keep, model):
    rows = make_rows(PROMPTS, BUDGETS, stop_check=lambda row, output: keep)
    with pytest.raises(ValueError, match="stop_check"):
        make_engine(rows, model).run()


def test_streamed_units_come_in_order_and_add_up(model, small, expected):
    rows = make_rows(PROMPTS, BUDGETS)
    engine = make_engine(rows, model, "clone", config=CONFIGS["sampled"])
    streamed = [[], [], []]
    for index, (record, outcome) in enumerate(engine.stream()):
        assert record.index == index
        assert record.num_emitted == tuple(map(len, outcome.new_units))
        for row, new in enumerate(outcome.new_units):
            assert bool(new) == outcome.was_active[row]
            streamed[row] += new
            assert streamed[row] == expected["sampled"][row][: len(streamed[row])]
            assert outcome.done[row] == (len(streamed[row]) == BUDGETS[row])
    assert tuple(streamed) == expected["sampled"]


@pytest.mark.parametrize("drafter", ["none", "jacobi", "model", "early_exit"])
@pytest.mark.parametrize("rule", ["exact", "coupled"])
def test_a_run_may_be_interrupted_and_resumed(drafter, rule, model, small):
    def engine():
        rows = make_rows(PROMPTS, BUDGETS)
        return make_engine(rows, model, drafter, small=small, config=CONFIGS["sampled"], rule=rule)

    whole = engine().run()
    parts = engine()
    first = parts.run(lambda record, outcome: record.index == 2)
    assert first.interrupted
    assert len(first.steps) == 3
    for done, full in zip(first.units, whole.units, strict=True):
        assert done == full[: len(done)]
    rest = parts.run()
    assert not rest.interrupted
    assert rest.units == whole.units
    assert len(rest.steps) == len(whole.steps)


def test_interrupting_at_the_last_step_is_a_finish(model):
    engine = make_engine(make_rows([[1]], [1]), model)
    assert not engine.run(lambda *_: True).interrupted


@pytest.mark.parametrize("drafter", ["jacobi", "early_exit"])
def test_restarting_from_the_output_with_the_same_key_continues(drafter, model, expected):
    full = expected["sampled"]
    prompts = [p + u[:4] for p, u in zip(PROMPTS, full, strict=True)]
    rows = make_rows(prompts, [b - 4 for b in BUDGETS])
    made = make_engine(rows, model, drafter, config=CONFIGS["sampled"]).run()
    assert list(made.units) == [u[4:] for u in full]


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_prompts_of_one_token(drafter, model, small):
    """Nothing to prefill: no cache exists when the first step begins."""
    config = CONFIGS["sampled"]
    rows = make_rows([[7], [9]], [5, 3])
    expected = [
        reference(model, p, b, k, config)
        for p, b, k in zip([[7], [9]], [5, 3], rows.keys_B, strict=True)
    ]
    made = make_engine(rows, model, drafter, small=small, config=config).run()
    assert list(made.units) == expected


def test_the_last_position_of_the_context_can_be_filled(expected):
    model = tiny_model(max_position_embeddings=17)
    rows = make_rows([PROMPTS[0]], [13])
    config = CONFIGS["greedy"]
    made = make_engine(rows, model, "jacobi", config=config, width=16).run()
    assert list(made.units) == [reference(model, PROMPTS[0], 13, rows.keys_B[0], config)]
    with pytest.raises(ValueError, match="context of 17"):
        make_engine(make_rows([PROMPTS[0]], [14]), model)


# --------------------------------------------------------------------------- host reads


READS = ["tolist", "item", "__bool__", "__int__", "__float__", "__index__", "numpy", "cpu"]


@pytest.mark.parametrize("law", ["greedy", "warped", "all"])
@pytest.mark.parametrize("drafter", ["none", "jacobi", "model", "early_exit"])
def test_a_step_reads_the_device_once(drafter, law, model, small, monkeypatch):
    config = CONFIGS.get(law) or LawConfig(
        top_p=0.9,
        min_p=0.01,
        presence_penalty=0.1,
        bad_words=((3, 4), (5,)),
        min_new_tokens=3,
        eos_token_ids=(1,),
    )
    rows = make_rows(PROMPTS, BUDGETS, eos_token_ids=[1])
    engine = make_engine(rows, model, drafter, small=small, config=config)
    engine.prefill()
    reads = []

    def counting(name, real):
        def read(self, *args, **kwargs):
            reads.append(name)
            return real(self, *args, **kwargs)

        return read

    for name in READS:
        monkeypatch.setattr(torch.Tensor, name, counting(name, getattr(torch.Tensor, name)))
    steps = 0
    while not engine.target.is_done:
        reads.clear()
        engine.step()
        steps += 1
        assert reads == ["tolist"]
    assert steps > 2
