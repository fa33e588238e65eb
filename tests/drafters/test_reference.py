"""The reference drafter: how many forwards a text saves, and that no text can do harm."""

import math
import re
from collections import Counter

import pytest
import torch
from tiny import tiny_model
from vlm_processors import LETTERS, tokenizer

from mmspec.drafters.alignment import Alignment
from mmspec.drafters.reference import LateText, ReferenceDrafter
from mmspec.law_config import LawConfig
from mmspec.noise import row_keys
from mmspec.ocr import PageText, Word
from mmspec.records import Outcome, Plan
from mmspec.rows import TokenRows
from mmspec.sampling import build_law
from mmspec.speculation import Settings, build_engine

LETTER = tokenizer()
END = LETTER.eos_token_id
TRUTH = (
    "alice was beginning to get very tired of sitting by her sister on the bank, and of having "
    "nothing to do: once or twice she had peeped into the book her sister was reading"
)
FREE = {2**k: 0.0 for k in range(8)}


def rows_of(prompts, **options):
    return TokenRows(
        prompts,
        max_new_tokens=[1000] * len(prompts),
        keys_B=torch.zeros(len(prompts), dtype=torch.long),
        eos_token_ids=[END],
        **options,
    )


def forwards(reference, truth=TRUTH, width=16, resting=range(1), **options):
    """Forwards until a target that writes the truth has done so; some steps are plain."""
    rows = rows_of([LETTER.encode("=")])
    options = {"references": [reference], "tokenizer": LETTER, "branching": 1} | options
    drafter = ReferenceDrafter(rows, len(LETTER), **options)
    drafter.prefill()
    wanted = [*LETTER.encode(truth), END]
    count = 0
    while wanted:
        proposal = drafter.propose(Plan(width=1 if count in resting else width, prices=FREE))
        drafts = proposal.tokens_BN[0, 1 : 1 + proposal.num_drafted[0]].tolist()
        agreed = next(
            (i for i, (a, b) in enumerate(zip(drafts, wanted, strict=False)) if a != b), len(drafts)
        )
        new = wanted[: min(agreed, len(wanted) - 1) + 1]
        rows.host_tokens[0] += new
        wanted = wanted[len(new) :]
        drafter.commit(
            proposal,
            None,
            None,
            Outcome(
                new_units=(new,),
                num_accepted=(len(new) - 1,),
                done=(not wanted,),
                was_active=(True,),
            ),
        )
        count += 1
    return count


@pytest.mark.parametrize("width", [2, 4, 16, 64])
def test_a_reference_that_is_the_output_takes_a_forward_per_width(width):
    """The first step is plain; every later one brings its width, the end included."""
    # A chain needs some trust before it is drafted whole, and every draft has it at these prices.
    assert forwards(TRUTH, width=width) == 1 + math.ceil(len(TRUTH) / width)


@pytest.mark.parametrize("length", [8, 40])
def test_a_rest_says_nothing_about_a_reference(length):
    """Behind it drafts are as long as before; what was written meanwhile is read then."""
    rests = [0, *range(2, 2 + length)]
    assert forwards(TRUTH, width=64) == 4
    assert forwards(TRUTH, width=64, resting=rests) == 4 + length


def test_a_drafter_that_rests_to_the_end_reads_no_more(monkeypatch):
    read = []
    own = Alignment.extend

    def extend(alignment, text, **options):
        read.append(text)
        own(alignment, text, **options)

    monkeypatch.setattr(Alignment, "extend", extend)
    rests = [0, *range(3, 1000)]
    assert forwards(TRUTH, resting=rests) == 3 + len(TRUTH) + 1 - (1 + 2 * 16)
    assert "".join(read) == TRUTH[: 1 + 16]


def test_without_a_reference_there_is_retrieval_alone():
    alone = forwards(None)
    assert forwards("") == forwards(" . ") == forwards(PageText("")) == alone
    assert forwards(TRUTH) < alone < len(TRUTH)


@pytest.mark.parametrize(
    ("there", "in_reference"),
    [
        ("tired", "t1red"),
        ("tired", "weary and sleepy and tired"),
        (" ", "\n"),
        ("and of having ", ""),
    ],
)
def test_a_difference_costs_a_few_forwards(there, in_reference):
    """What the reference lacks must be written letter by letter; little is lost besides."""
    lacking = len(there) if not in_reference else 0
    fewest = forwards(TRUTH)
    assert fewest <= forwards(TRUTH.replace(there, in_reference)) <= fewest + lacking + 8


def test_less_is_drafted_of_words_that_the_engine_doubts():
    """Once nodes have a price; the doubted words are all behind the first 20 letters."""
    ends = [match.end() for match in re.finditer(r"\S+", TRUTH)]
    priced = {2**k: 0.03 * 2**k for k in range(8)}

    def drafted(doubted):
        words = tuple(Word("", doubted if end > 20 else 0.97, (0, 0, 1, 1), end) for end in ends)
        rows = rows_of([LETTER.encode("=")])
        drafter = ReferenceDrafter(
            rows, len(LETTER), references=[PageText(TRUTH, words)], tokenizer=LETTER, branching=1
        )
        drafter.prefill()
        return int(drafter.propose(Plan(width=64, prices=priced)).num_drafted[0])

    counts = [drafted(confidence) for confidence in (0.97, 0.7, 0.4, 0.1)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > 2 * counts[-1]


def test_sources_are_counted():
    sources = [Counter()]
    count = forwards(TRUTH, sources=sources)
    assert sources[0]["target"] == count
    assert sources[0].total() == len(TRUTH) + 1
    assert sources[0]["reference"] > 0.9 * (sources[0].total() - count)


def after(count, reference=TRUTH):
    """A reference that comes when it is asked for once more than this."""
    asked = []

    def read():
        asked.append(len(asked))
        return PageText(reference) if len(asked) > count else None

    return read, asked


def test_a_reference_that_comes_with_the_prompts_is_one_that_was_there():
    read, asked = after(0)
    assert forwards(read) == forwards(TRUTH)
    assert asked == [0]


@pytest.mark.parametrize("count", [1, 2, 12, 60])
def test_a_late_reference_drafts_like_one_that_has_rested(count):
    """What was written before it came is read then, markup included."""
    read, asked = after(count)
    # Asked behind the prompts, and before each step.
    rests = range(count - 1)
    assert forwards(read, resting=rests) == forwards(TRUTH, resting=rests)
    assert asked == list(range(count + 1))


def test_a_reference_that_never_comes_is_none():
    read, asked = after(10**6)
    alone = forwards(None)
    assert forwards(read) == alone
    assert len(asked) == alone + 1


class Growing:
    """A reference whose parts come when it is asked for once more than a count each."""

    def __init__(self, counts, reference=TRUTH):
        size = -(-len(reference) // len(counts))
        self.counts = counts
        self.texts = [reference[: size * part] for part in range(1, len(counts) + 1)]
        self.verdicts = []
        self.asked = 0

    def __call__(self):
        self.asked += 1
        there = sum(self.asked > count for count in self.counts)
        if not there:
            return None
        text = self.texts[there - 1]
        return text if there == len(self.counts) else LateText(text, self.verdicts.append)


def test_a_reference_that_grows_in_time_is_one_that_was_there():
    """No end is drafted before it has come."""
    whole = forwards(TRUTH)
    for counts in ((0, 0, 0), (0, 4, 7), (0, 1, 2, 3, 4, 5, 6)):
        growing = Growing(counts)
        assert forwards(growing) <= whole + 1
        assert growing.verdicts in ([], [True])
        assert growing.asked == counts[-1] + 1


@pytest.mark.parametrize("resting", [range(1), range(40)])
def test_a_part_that_comes_late_is_found(resting):
    """What was written beyond the last part does not matter, nor that the drafter rests."""
    for counts in ((0, 60), (0, 60, 62), (30, 31, 60), (20, 25, 10**6)):
        growing = Growing(counts)
        num = forwards(growing, resting=resting)
        assert growing.verdicts == [True]
        assert num < forwards(None, resting=resting)
        if counts[-1] < 10**6:
            assert num <= forwards(after(60)[0], resting=resting)


@pytest.mark.parametrize("resting", [range(1), range(1000)])
def test_a_part_of_another_text_is_told_and_dropped(resting):
    lie = Growing((3, 10**6), "0123456789 qzx jvk wqq " * 6)
    alone = forwards(None, resting=resting)
    assert forwards(lie, resting=resting) <= alone + 12
    assert lie.verdicts == [False]
    # Asked until the output had as many letters as the part has.
    letters = sum(map(str.isalnum, lie.texts[0]))
    assert letters < lie.asked < letters + 32
    few = Growing((3, 10**6), "qzx " * 6)
    forwards(few, resting=range(1000))
    assert few.verdicts == [False]
    assert 32 < few.asked < 48


def test_a_schedule_wakes_when_a_part_is_seen_to_agree():
    rows = rows_of([LETTER.encode("=")])
    news, growing = [], Growing((0, 30))
    drafter = ReferenceDrafter(rows, len(LETTER), references=[growing], tokenizer=LETTER)
    drafter.on_arrival = lambda: news.append(len(rows.host_tokens[0]) - 1)
    drafter.prefill()
    for letter in LETTER.encode(TRUTH[:40]):
        proposal = drafter.propose(Plan(width=1))
        rows.host_tokens[0].append(letter)
        outcome = Outcome(
            new_units=([letter],), num_accepted=(0,), done=(False,), was_active=(True,)
        )
        drafter.commit(proposal, None, None, outcome)
    seen, grown = news
    assert 8 <= seen <= 12
    assert grown == 29


def test_a_reference_is_not_looked_at_for_a_row_that_has_ended():
    rows = rows_of([LETTER.encode("ab"), LETTER.encode("c")])
    rows.host_done[0] = True
    asked, news = [], []
    references = [lambda: asked.append(0), lambda: TRUTH]
    drafter = ReferenceDrafter(rows, len(LETTER), references=references, tokenizer=LETTER)
    drafter.on_arrival = lambda: news.append(1)
    drafter.prefill()
    drafter.propose(Plan(width=1))
    assert (asked, news) == ([], [1])


def test_a_wrong_reference_rests_until_the_output_agrees_with_it_again():
    """What agrees is seen without drafting."""
    lie, output = "qzx jvk wqq " * 12, "0123456789 " * 9 + TRUTH
    rows = rows_of([LETTER.encode("=")])
    drafter = ReferenceDrafter(rows, len(LETTER), references=[lie + TRUTH], tokenizer=LETTER)
    drafter.prefill()
    has_drafted = []
    for letter in LETTER.encode(output):
        proposal = drafter.propose(Plan(width=16, prices=FREE))
        has_drafted.append(len(drafter._found[0][0]) > 0)
        rows.host_tokens[0].append(letter)
        outcome = Outcome(
            new_units=([letter],), num_accepted=(0,), done=(False,), was_active=(True,)
        )
        drafter.commit(proposal, None, None, outcome)
    wrong, right = has_drafted[:99], has_drafted[99:]
    assert 1 <= sum(wrong) == sum(wrong[:20]) <= 15
    assert not any(right[:8])
    assert all(right[20:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"references": ["a", "b"]}, "references must hold one per row, 1"),
        ({"references": "a"}, "references must hold one per row, 1"),
        ({"references": [3]}, "a reference must be a text, a PageText or None, got 3"),
        ({"references": [None], "sources": []}, "sources must hold one per row, 1; got 0"),
    ],
)
def test_what_is_no_reference_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ReferenceDrafter(rows_of([[1]]), 50, **({"tokenizer": LETTER} | options))


# --------------------------------------------------------------------------- exactness


LIES = {
    "none": None,
    "empty": "",
    "other": "a text of which nothing comes true, 123",
    "unknown": "漢字ß\x00\udfff\ufffd<image><pad><end>" * 5,
    "long": "ab " * 2000,
}
PROMPTS = ["abc", "the lazy dog", "12"]


@pytest.fixture(scope="module")
def model():
    return tiny_model("Llama", vocab_size=len(LETTERS) + 11)


def written(model, drafter, count, rule="exact", schedule="fixed"):
    rows = TokenRows(
        [LETTER.encode(prompt) for prompt in PROMPTS[:count]],
        max_new_tokens=[40] * count,
        keys_B=row_keys(torch.Generator().manual_seed(0), count),
    )
    settings = Settings(drafter=drafter, width=16, rule=rule, schedule=schedule)
    result = build_engine(model, rows, build_law(LawConfig()), settings).run()
    return [rows.new_tokens(row) for row in range(count)], result.stats


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("lie", LIES)
def test_lies_do_not_change_the_output(model, lie, count):
    plain, _ = written(model, "none", count)
    references = [LIES[lie], LETTER.decode(plain[-1]), None][:count]
    drafter = {"name": "reference", "references": references, "tokenizer": LETTER}
    assert written(model, drafter, count)[0] == plain
    assert written(model, drafter, count, rule="block")[0] == plain


@pytest.mark.parametrize("schedule", ["fixed", "adaptive"])
def test_references_of_a_batch_come_one_by_one(model, schedule):
    plain, _ = written(model, "none", 3)
    right = [LETTER.decode(tokens, skip_special_tokens=False) for tokens in plain]
    drafter = {"name": "reference", "tokenizer": LETTER}
    forwards = []
    for counts in ((0, 0, 0), (0, 1, 5), (5, 10**6, 9), (10**6,) * 3):
        late = [after(count, text)[0] for count, text in zip(counts, right, strict=True)]
        out, fast = written(model, {**drafter, "references": late}, 3, schedule=schedule)
        assert out == plain
        forwards.append(fast.num_target_forwards)
    if schedule == "fixed":
        _, there = written(model, {**drafter, "references": right}, 3)
        assert forwards[0] == there.num_target_forwards < forwards[-1]
        assert forwards[0] <= forwards[1] <= forwards[2] <= forwards[3]


def test_a_late_reference_wakes_the_schedule(model):
    read, _ = after(3)
    rows = TokenRows(
        [LETTER.encode("abc")], max_new_tokens=[40], keys_B=torch.zeros(1, dtype=torch.long)
    )
    drafter = {"name": "reference", "references": [read], "tokenizer": LETTER}
    settings = Settings(drafter=drafter, width=16, schedule="adaptive")
    engine = build_engine(model, rows, build_law(LawConfig()), settings)
    engine.prefill()
    engine.step()
    engine.schedule._wakes_at = 100
    rests = []
    for _ in range(3):
        engine.step()
        rests.append(engine.schedule._wakes_at == 100)
    assert rests == [True, False, False]


def test_each_row_has_its_own_reference(model):
    plain, stats = written(model, "none", 3)
    right = [LETTER.decode(tokens, skip_special_tokens=False) for tokens in plain]
    drafter = {"name": "reference", "tokenizer": LETTER}
    out, fast = written(model, {**drafter, "references": right}, 3)
    mixed, slow = written(model, {**drafter, "references": right[::-1]}, 3)
    assert out == mixed == plain
    assert fast.num_target_forwards < slow.num_target_forwards <= stats.num_target_forwards
