"""Forwards are counted by what they are, and samples survive what happens to a run."""

import json

import pytest
import torch

from mmspec.bench.measure import (
    Budget,
    ForwardMeter,
    PhaseClock,
    Store,
    check_final_line,
    csv,
    final_line,
    in_turn,
    open_store,
    provenance,
    quartiles,
    rounded,
    slug,
    stem,
)
from mmspec.bench.report import Output, publish, table
from mmspec.bench.setups import generate_text, load_text, static_card, text_engine
from mmspec.bench.tasks import Task, Unavailable, left_out, run_tasks, samples_of
from mmspec.drafters.model import first_layers

PROMPTS = [list(range(40)), list(range(50, 80))]


@pytest.fixture(scope="module")
def tiny():
    return load_text("tiny", "float64")


def ours(tiny, drafter, prompts, temperature=0.0):
    return text_engine(
        tiny, prompts, drafter=drafter, max_new_tokens=12, temperature=temperature, seed=0
    )


@pytest.mark.parametrize("drafter", ["none", "ngram", "jacobi", "early_exit"])
def test_the_stats_agree_with_the_counted_forwards(tiny, drafter):
    with ForwardMeter(tiny.model) as meter:
        result = ours(tiny, drafter, PROMPTS).run()
    # Every step is one forward through all layers; the prefill is that of the first step.
    assert meter.num_full == result.stats.num_target_forwards == len(result.steps)
    if drafter == "none":
        assert meter.num_full == 12
    assert (meter.num_shallow > 0) == (drafter == "early_exit")
    row_steps = sum(sum(step.was_active) for step in result.steps)
    assert result.stats.tau == sum(map(len, result.units)) / row_steps
    assert 0 < meter.time_s < result.stats.wall_time_s


def test_plain_generate_takes_one_forward_per_token_and_gives_our_tokens(tiny):
    with ForwardMeter(tiny.model) as meter:
        tokens = generate_text(tiny, PROMPTS, max_new_tokens=12, temperature=0.0, seed=0)
    assert meter.num_full == 12
    assert tokens == list(ours(tiny, "none", PROMPTS).run().units)


def test_a_shallow_forward_of_the_same_weights_is_counted_apart(tiny):
    ids = torch.tensor([PROMPTS[0]])
    with ForwardMeter(tiny.model) as meter, torch.no_grad():
        first_layers(tiny.model, 2)(ids)
        tiny.model(ids)
        # As the early exit of transformers does it.
        tiny.model.config.num_hidden_layers = 1
        tiny.model(ids)
        tiny.model.config.num_hidden_layers = 4
    assert (meter.num_full, meter.num_shallow) == (1, 2)
    tiny.model(ids)
    assert meter.num_full == 1, "it still counts after it was left"


def test_a_phase_clock_changes_nothing_but_the_clock(tiny):
    plain = ours(tiny, "ngram", PROMPTS).run()
    engine, seconds = ours(tiny, "ngram", PROMPTS), {}
    engine.target = PhaseClock(engine.target, {"score": "score"}, seconds)
    assert engine.run().units == plain.units
    assert seconds["score"] > 0


def test_the_static_card_commits_nothing(tiny):
    engine = ours(tiny, "none", PROMPTS)
    engine.prefill()
    card = static_card(engine.target, (1, 4), repeats=1)
    assert [line["width"] for line in card] == [1, 4]
    assert card[0]["relative"] == card[0]["ceiling"] == 1.0
    assert engine.run().units == ours(tiny, "none", PROMPTS).run().units


# --------------------------------------------------------------------------- the store


def test_a_store_keeps_what_it_has_and_skips_half_a_line(tmp_path):
    path = tmp_path / "text.jsonl"
    Store(path, "here").add([{"key": "a", "value": 1}])
    with path.open("a", encoding="utf-8") as file:
        file.write('{"key": "b", "val')  # killed while writing
    store = Store(path, "here")
    assert store.samples.keys() == {"a"}
    store.add([{"key": "c"}])
    again = Store(path, "here")
    assert again.samples.keys() == {"a", "c"}
    assert again.has(["a", "c"])
    assert not again.has(["a", "b"])


def test_a_store_ignores_samples_of_other_conditions(tmp_path):
    path = tmp_path / "text.jsonl"
    Store(path, "there").add([{"key": "a"}])
    store = Store(path, "here")
    assert (len(store.samples), store.num_foreign) == (0, 1)


class Clock:
    """A budget that is spent after some questions."""

    elapsed_s = 0.0

    def __init__(self, tasks):
        self.tasks = tasks

    @property
    def is_spent(self):
        self.tasks -= 1
        return self.tasks < 0


def make_tasks(calls):
    def system(name, task):
        def measure(repeat):
            calls.append((task, name, repeat))
            if name == "never":
                raise Unavailable("it cannot")
            return {"time_s": 1.0}

        return measure

    return [
        Task(
            key=task,
            label="all",
            systems={name: system(name, task) for name in ("one", "two", "never")},
            facts={"input": task},
            repeats=1 if task == "z" else None,
        )
        for task in ("x", "y", "z")
    ]


def test_a_run_that_is_stopped_goes_on_and_says_what_is_missing(tmp_path):
    path, calls = tmp_path / "a.jsonl", []
    said = run_tasks(make_tasks(calls), 2, Store(path, "here"), Clock(2), lambda text: None)
    assert [call[0] for call in calls] == ["x"] * 3 + ["y"] * 3
    assert said[:2] == [
        "all: 1 of 3 inputs not measured",
        "all: 2 of 3 inputs have fewer than 2 repetitions (at least 1)",
    ]
    assert said[2:] == ["all: never not measured: it cannot"]

    calls.clear()
    tasks, store = make_tasks(calls), Store(path, "here")
    said = run_tasks(tasks, 2, store, Clock(99), lambda text: None)
    assert said == ["all: never not measured: it cannot"]
    assert [call[0] for call in calls] == ["z"] * 3 + ["x"] * 3 + ["y"] * 3
    # Forth and back, so that a drift hits all systems alike.
    assert [call[1] for call in calls[3:6]] == ["never", "two", "one"]
    found = samples_of(tasks, 2, store)
    assert len(found) == 2 * 5
    assert {sample["system"] for sample in found} == {"one", "two"}

    calls.clear()
    run_tasks(make_tasks(calls), 2, Store(path, "here"), Clock(99), lambda text: None)
    assert calls == []
    assert left_out(make_tasks([]), 3, Store(path, "here"))[0].endswith("(at least 2)")


# --------------------------------------------------------------------------- small things


def test_the_final_line_has_its_schema():
    facts = provenance(torch.device("cpu"))
    line = final_line("core", facts, [{"a": 1 / 3}], left_out=[], failures=[], time_s=1.0)
    check_final_line(json.loads(json.dumps(line)))
    assert line["rows"] == [{"a": 0.33333}]
    with pytest.raises(ValueError, match="git_sha must be str, got None"):
        check_final_line(line | {"git_sha": None})
    with pytest.raises(ValueError, match="rows must be objects"):
        check_final_line(line | {"rows": [1]})


def test_a_fingerprint_depends_on_the_threads():
    before = provenance(torch.device("cpu"))["fingerprint"]
    assert provenance(torch.device("cpu"))["fingerprint"] == before
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert provenance(torch.device("cpu"))["fingerprint"] != before
    finally:
        torch.set_num_threads(threads)


def test_small_helpers():
    assert slug("Intel(R) Xeon(R) Processor, 2 cores") == "intel-xeon-2-cores"
    assert rounded({"a": [123456.789, 1, "x"]}) == {"a": [123460.0, 1, "x"]}
    assert in_turn(["a", "b"], 0) == ["a", "b"]
    assert in_turn(["a", "b"], 1) == ["b", "a"]
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 4.0)
    assert quartiles([7.0]) == (7.0, 7.0)
    assert not Budget(None).is_spent
    assert Budget(0).is_spent
    assert table(["x"], [[None]]).splitlines()[-1] == "|   – |"


def test_a_label_is_part_of_the_names_of_both_files(tmp_path):
    facts = provenance(torch.device("cpu"))
    store = open_store(tmp_path, "text", "batch8", facts)
    store.add([{"key": "a"}])
    line = final_line("text", facts, [], left_out=[], failures=[], time_s=1.0)
    publish(line, [], tmp_path, Output(json_only=True))
    names = [path.name for path in sorted(tmp_path.iterdir())]
    assert names[0] == "text_batch8.jsonl"
    assert names[1].startswith("text_batch8_")
    assert stem("text", "") == "text"
    with pytest.raises(ValueError, match="a label has letters"):
        stem("text", "../x")


def test_an_unknown_entry_of_a_list_is_named():
    assert csv("a, b") == ["a", "b"]
    with pytest.raises(ValueError, match="unknown entry 'c'; known: a, b"):
        csv("a,c", ["a", "b"])
    with pytest.raises(ValueError, match="at least one entry"):
        csv(" ,")
