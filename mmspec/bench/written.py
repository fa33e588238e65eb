"""What the benchmarks of written tokens share: tasks over inputs of a kind, rows and tables.

tau is tokens per target forward and row, the bonus token included. The forward that reads the
prompt yields the first token, in our engine as in transformers, so it counts. Times are compared
per token, because outputs differ in length when sampled, and under bfloat16 also when greedy.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmspec.bench.measure import (
    Budget,
    ForwardMeter,
    Sample,
    csv,
    final_line,
    median,
    open_store,
    ratio,
)
from mmspec.bench.report import Output, Section, card_table, percent, publish, table
from mmspec.bench.tasks import System, Task, Unavailable, interleaved, run_tasks, samples_of
from mmspec.checks import require

Entry = Mapping[str, Any]

#: Phase -> the field of a sample. Those of our engine are in every sample of ours.
PHASES = {
    "OCR": "ocr_time_s",
    "vision": "vision_time_s",
    "setup": "setup_time_s",
    "prefill": "prefill_time_s",
    "draft": "draft_time_s",
    "verify": "verify_time_s",
    "other": "other_time_s",
}
_PROMPT = ("drafter_prompt_tokens", "drafter_prompt_time_s")
_COUNTS = (
    *("time_s", "num_steps", "num_row_steps", "num_drafted", "num_accepted"),
    *PHASES.values(),
    *_PROMPT,
)
_FIELDS = ("dtype", "temperature", "batch", "kind", "system")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """One configuration of the measurement.

    Attributes:
        loaded: The model, as the benchmark loads it.
        dtype: A name of `mmspec.bench.setups.DTYPES`.
        temperature: 0 is greedy.
        batch: Rows per call.
        seed: Of the sampled outputs; the repetition is added.
        max_new_tokens: Cap on the inputs' own budgets.
    """

    loaded: Any
    dtype: str
    temperature: float
    batch: int
    seed: int
    max_new_tokens: int | None

    @property
    def label(self) -> str:
        """In words."""
        return f"{self.dtype} T={self.temperature:g} batch {self.batch}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Inputs of one task, in the order in which a system takes them.

    Attributes:
        entries: The inputs.
        budget: Tokens of each row at most.
    """

    entries: Sequence[Entry]
    budget: int


#: Runs a system on a job: (configuration, system, job, repetition). Leaves a sample with the rows'
#: ``tokens``, ``time_s``, ``num_forwards``, ``num_row_steps``, ``guarantee``, ...
Measure = Callable[[Config, str, Job, int], Sample]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """One benchmark.

    Attributes:
        name: Such as "text".
        model: Name of the model.
        kinds: Kinds of inputs, in the order of the tables.
        systems: Systems, in that order; "generate" and "plain" are the yardsticks.
        ours: Those that promise the tokens of plain decoding.
        single_row: Those that take one row at a time only.
        measure: Runs one.
        variant: Settings of ``measure`` that tell samples apart.
        inputs_per_task: Inputs that a system decodes one batch after the other; at least a batch.
    """

    name: str
    model: str
    kinds: Sequence[str]
    systems: Sequence[str]
    ours: Collection[str]
    single_row: Collection[str]
    measure: Measure
    variant: str = ""
    inputs_per_task: int = 1

    def __post_init__(self) -> None:
        """Refuses tasks of no input."""
        require(self.inputs_per_task >= 1, "inputs of a task", "at least 1", self.inputs_per_task)

    def group_size(self, batch: int) -> int:
        """Inputs of a task: whole batches."""
        return batch * max(1, self.inputs_per_task // batch)


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """What the options of a run say of its files and its length."""

    out: Path
    label: str
    repeats: int
    budget: Budget
    output: Output


def run_bench(
    bench: Bench,
    configs: Sequence[Config],
    entries: Sequence[Entry],
    facts: dict[str, Any],
    card: Sequence[Sample],
    session: Session,
    tables: Callable[[Sequence[Sample]], list[Section]] | None = None,
) -> dict[str, Any]:
    """Measures what is missing, writes the report and prints the tables.

    Args:
        bench: The benchmark.
        configs: Its configurations.
        entries: Its inputs: ``id``, ``kind``, ``max_new_tokens`` and what ``measure`` needs.
        facts: Of `mmspec.bench.measure.provenance`.
        card: What a forward costs, as `mmspec.bench.setups.static_card` says.
        session: The run.
        tables: More tables, made from the rows of one configuration each.

    Returns:
        The object of the last line.

    Raises:
        typer.Exit: With code 1 if an exact output was not identical in float32 or float64.
    """
    output = session.output
    sections = [("Ceiling: what a forward costs", card_table(card))]
    output.show(*sections[0])
    built = [_tasks(bench, config, entries) for config in configs]
    tasks = interleaved([group for group, _ in built])
    store = open_store(session.out, bench.name, session.label, facts)
    missing = run_tasks(tasks, session.repeats, store, session.budget, output.say)
    missing += [note for _, notes in built for note in notes]
    rows = summarise(bench, samples_of(tasks, session.repeats, store))
    for title, found in _by_config(rows).items():
        sections.append((title, _speed_table(found)))
        sections.append((f"{title}: acceptance and seconds", _phase_table(found)))
        sections += [(f"{title}: {name}", text) for name, text in (tables(found) if tables else [])]
    for title, text in sections[1:]:
        output.show(title, text)
    line = final_line(
        bench.name,
        facts,
        [*card, *rows],
        left_out=missing,
        failures=failures(bench, rows),
        time_s=session.budget.elapsed_s,
    )
    return publish(line, sections, session.out, output)


def make_configs(
    models: Mapping[str, Any],
    batch: str,
    temperature: str,
    *,
    seed: int,
    max_new_tokens: int | None,
) -> list[Config]:
    """Every combination of the loaded models (by dtype), batches and temperatures."""
    return [
        Config(
            loaded=loaded,
            dtype=name,
            temperature=float(heat),
            batch=int(size),
            seed=seed,
            max_new_tokens=max_new_tokens,
        )
        for size in csv(batch)
        for heat in csv(temperature)
        for name, loaded in models.items()
    ]


def make_card(
    configs: Sequence[Config], model: str, measure: Callable[[Any, int], list[Sample]]
) -> list[Sample]:
    """What a forward costs, once for every dtype and batch; ``measure`` as `text_card`."""
    sizes = sorted({config.batch for config in configs})
    loaded = {config.dtype: config.loaded for config in configs}
    return [
        {"type": "card", "model": model, "dtype": dtype, "batch": size, **line}
        for dtype, one in loaded.items()
        for size in sizes
        for line in measure(one, size)
    ]


# --------------------------------------------------------------------------- tasks


def _tasks(bench: Bench, config: Config, entries: Sequence[Entry]) -> tuple[list[Task], list[str]]:
    """Groups of inputs of one kind, kinds in turn; and what was left out for not filling one."""
    by_kind: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        by_kind[entry["kind"]].append(entry)
    size, groups, notes = bench.group_size(config.batch), [], []
    for kind, found in by_kind.items():
        whole = len(found) - len(found) % size
        groups.append([_task(bench, config, found[i : i + size]) for i in range(0, whole, size)])
        if whole < len(found):
            ids = ", ".join(str(entry["id"]) for entry in found[whole:])
            unit = "a batch" if size == config.batch else f"a document of {size}"
            notes.append(f"{config.label}: {kind} inputs that do not fill {unit}: {ids}")
    return interleaved(groups), notes


def _task(bench: Bench, config: Config, entries: Sequence[Entry]) -> Task:
    budget = max(int(entry["max_new_tokens"]) for entry in entries)
    if config.max_new_tokens is not None:
        budget = min(budget, config.max_new_tokens)
    names = [n for n in bench.systems if config.batch == 1 or n not in bench.single_row]
    job = Job(entries=entries, budget=budget)

    def warm_up() -> None:
        short = Job(entries=entries[: config.batch], budget=8)
        for name in names:
            try:
                bench.measure(config, name, short, 0)
            except Unavailable:
                continue

    def system(name: str) -> System:
        return lambda repeat: bench.measure(config, name, job, repeat)

    facts = {
        "model": bench.model,
        "dtype": config.dtype,
        "temperature": config.temperature,
        "batch": config.batch,
    }
    ids = "+".join(str(entry["id"]) for entry in entries)
    name = f"{bench.name}/{bench.variant}" if bench.variant else bench.name
    key = f"{name}/{bench.model}/{config.dtype}/T{config.temperature:g}/b{config.batch}"
    return Task(
        key=f"{key}/n{budget}/s{config.seed}/{ids}",
        label=config.label,
        systems={name: system(name) for name in names},
        facts={"type": "sample", **facts, "kind": entries[0]["kind"], "input": ids},
        warm_up=warm_up,
        finish=lambda samples: compare(samples, ours=bench.ours, is_greedy=config.temperature == 0),
    )


def generate_figures(
    name: str, config: Config, tokens: Sequence[Sequence[int]], meter: ForwardMeter
) -> Sample:
    """What a sample says of decoding by transformers."""
    num_units = sum(map(len, tokens))
    # A plain batched step gives one token to every row that is still active.
    num_row_steps = meter.num_full if config.batch == 1 else num_units
    is_exact = name == "generate" or config.temperature == 0
    return {
        "guarantee": "yardstick" if name == "generate" else "exact" if is_exact else "distribution",
        "num_steps": meter.num_full,
        "num_row_steps": num_row_steps,
        "tau": num_units / num_row_steps,
    }


def merged_figures(parts: Sequence[Sample], num_units: int) -> Sample:
    """The figures of several generations of one system, as of one.

    Args:
        parts: As `mmspec.bench.setups.step_figures` makes them.
        num_units: Tokens of all.
    """
    if len(parts) == 1:
        return parts[0]
    counts = {n: sum(part[n] for part in parts) for n in _COUNTS if n in parts[0]}
    lists = {name: _added([part[name] for part in parts]) for name in ("tried_at", "held_at")}
    return {**parts[0], **counts, **lists, "tau": num_units / counts["num_row_steps"]}


def compare(samples: Mapping[str, Sample], *, ours: Collection[str], is_greedy: bool) -> None:
    """Replaces the tokens of each sample by how far they agree with the yardsticks."""
    outputs = {name: sample.pop("tokens") for name, sample in samples.items()}
    for name, sample in samples.items():
        sample["num_rows"] = len(outputs[name])
        sample["lengths"] = [len(row) for row in outputs[name]]
        if is_greedy and "generate" in outputs:
            sample["num_rows_equal"] = num_equal(outputs[name], outputs["generate"])
        if name in ours and "plain" in outputs:
            sample["num_rows_equal_plain"] = num_equal(outputs[name], outputs["plain"])


def num_equal(rows: Sequence[Sequence[int]], others: Sequence[Sequence[int]]) -> int:
    """Rows that are the same in both."""
    return sum(list(row) == list(other) for row, other in zip(rows, others, strict=True))


# --------------------------------------------------------------------------- rows


def summarise(bench: Bench, samples: Sequence[Sample]) -> list[Sample]:
    """One row per configuration, kind (and all kinds together) and system."""
    costs = {
        name: {_pair(s): s["time_s"] / s["num_units"] for s in samples if s["system"] == name}
        for name in ("generate", "plain")
    }
    groups: dict[tuple[Any, ...], list[Sample]] = defaultdict(list)
    for s in samples:
        for kind in (s["kind"], "all"):
            groups[s["dtype"], s["temperature"], s["batch"], kind, s["system"]].append(s)
    totals = {key: _time_per_unit(found) for key, found in groups.items()}
    rows = []
    for key, found in groups.items():
        rows.append(
            {"type": "row", **dict(zip(_FIELDS, key, strict=True))}
            | _figures(found)
            | {
                "speedup_median": _median_speedup(found, costs["generate"]),
                "speedup_total": ratio(totals.get((*key[:4], "generate")), totals[key]),
                "speedup_over_plain_median": _median_speedup(found, costs["plain"]),
            }
        )
    order = {name: i for i, name in enumerate((*bench.kinds, "all"))}
    rank = {name: i for i, name in enumerate(bench.systems)}

    def place(row: Sample) -> tuple[Any, ...]:
        config = row["dtype"], row["temperature"], row["batch"]
        return *config, order[row["kind"]], rank[row["system"]]

    return sorted(rows, key=place)


def _pair(sample: Sample) -> tuple[str, int]:
    """Input, configuration and repetition: what two systems have in common."""
    return sample["key"].rsplit("/", 2)[0], sample["repeat"]


def _time_per_unit(samples: Sequence[Sample]) -> float:
    return sum(s["time_s"] for s in samples) / sum(s["num_units"] for s in samples)


def _median_speedup(
    samples: Sequence[Sample], base: Mapping[tuple[str, int], float]
) -> float | None:
    """Median over inputs of the median over repetitions of the ratio of seconds per token."""
    by_input: dict[str, list[float]] = defaultdict(list)
    for s in samples:
        if _pair(s) in base:
            by_input[_pair(s)[0]].append(base[_pair(s)] * s["num_units"] / s["time_s"])
    return median(median(found) or 0.0 for found in by_input.values())


def _figures(samples: Sequence[Sample]) -> Sample:
    inputs = {s["input"] for s in samples}
    tried = _added([s.get("tried_at", []) for s in samples])
    held = _added([s.get("held_at", []) for s in samples])

    def total(name: str) -> Any:
        """Over all samples; None where one lacks it."""
        return sum(s[name] for s in samples) if all(name in s for s in samples) else None

    figures = {
        "guarantee": samples[0]["guarantee"],
        "num_inputs": len(inputs),
        "num_samples": len(samples),
        "num_units": total("num_units"),
        "tau": total("num_units") / total("num_row_steps"),
        "tau_macro": sum(s["tau"] for s in samples) / len(samples),
        "ms_per_token": 1e3 * _time_per_unit(samples),
        "tokens_per_s": 1 / _time_per_unit(samples),
        "equal_generate": ratio(total("num_rows_equal"), total("num_rows")),
        "equal_plain": ratio(total("num_rows_equal_plain"), total("num_rows")),
        "acceptance_by_position": [h / t for h, t in zip(held, tried, strict=False) if t],
        "num_forwards": total("num_forwards"),
        "num_shallow_forwards": total("num_shallow_forwards"),
    }
    more = {name: total(name) for name in ("num_row_steps", "num_drafted", "num_accepted")}
    more |= {name: total(name) for name in _PROMPT if total(name) is not None}
    phases = {name: total(field) for name, field in PHASES.items() if total(field) is not None}
    return {**figures, **more, "phases_s": phases}


def _added(lists: Sequence[Sequence[int]]) -> list[int]:
    longest = max(map(len, lists), default=0)
    return [sum(values[i] for values in lists if i < len(values)) for i in range(longest)]


def failures(bench: Bench, rows: Sequence[Sample]) -> list[str]:
    """Exactness is a promise where rounding does not decide: float32 and float64."""
    found = []
    for row in rows:
        if row["system"] not in bench.ours or row["dtype"] not in ("float32", "float64"):
            continue
        for name, other in (("equal_generate", "generate"), ("equal_plain", "plain")):
            share = row[name]
            if row["kind"] != "all" and share is not None and share < 1:
                found.append(
                    f"{row['dtype']} T={row['temperature']:g} batch {row['batch']} {row['kind']}: "
                    f"{row['system']} equals {other} in {percent(share)} of the outputs only"
                )
    return found


# --------------------------------------------------------------------------- tables


def _by_config(rows: Sequence[Sample]) -> dict[str, list[Sample]]:
    groups: dict[str, list[Sample]] = defaultdict(list)
    for row in rows:
        title = f"{row['dtype']}, temperature {row['temperature']:g}, batch {row['batch']}"
        groups[title].append(row)
    return groups


def _speed_table(rows: Sequence[Sample]) -> str:
    headers = ["kind", "system", "guarantee", "inputs", "tau", "ms/token"]
    headers += ["× generate (median)", "× generate (total)", "× plain (median)"]
    headers += ["= generate", "= plain"]
    names = [
        *("kind", "system", "guarantee", "num_inputs", "tau", "ms_per_token"),
        *("speedup_median", "speedup_total", "speedup_over_plain_median"),
    ]
    return table(
        headers,
        [
            [row[n] for n in names] + [percent(row["equal_generate"]), percent(row["equal_plain"])]
            for row in rows
        ],
    )


def _phase_table(rows: Sequence[Sample]) -> str:
    own = [row for row in rows if row["phases_s"]]
    phases = [name for name in PHASES if any(name in row["phases_s"] for row in own)]
    headers = ["kind", "system", *(f"{name} s" for name in phases)]
    headers += ["accepted at depth 1, 2, ... (conditional)"]
    lines = []
    for row in own:
        rates = " ".join(f"{rate:.2f}" for rate in row["acceptance_by_position"][:8])
        seconds = [row["phases_s"].get(name) for name in phases]
        lines.append([row["kind"], row["system"], *seconds, rates or "none"])
    return table(headers, lines)
