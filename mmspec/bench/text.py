"""Text: tokens per forward and wall time beside transformers' own ways of decoding.

Everything runs in one process on one loaded model per dtype, in turn: the same weights, attention
and kind of cache. Prompts are tokenised outside the clock. Forwards are counted by a hook on the
model, whoever calls it.

tau is tokens per target forward and row, the bonus token included. The forward that reads the
prompt yields the first token, in our engine as in transformers, so it counts. Times are compared
per token, because outputs differ in length when sampled, and under bfloat16 also when greedy.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from mmspec.bench.measure import (
    Budget,
    ForwardMeter,
    Sample,
    csv,
    final_line,
    median,
    open_store,
    provenance,
    ratio,
    stem,
    timed,
)
from mmspec.bench.report import Output, card_table, percent, publish, table
from mmspec.bench.setups import (
    DTYPES,
    TextModel,
    generate_text,
    load_prompts,
    load_text,
    step_figures,
    text_card,
    text_engine,
)
from mmspec.bench.tasks import System, Task, Unavailable, interleaved, run_tasks, samples_of

KINDS = ("edit", "structured", "code", "chat")
#: transformers' modes -> their options for ``generate``; the layers of the early exit are added.
GENERATE: dict[str, dict[str, Any]] = {
    "generate": {},
    "prompt_lookup": {"prompt_lookup_num_tokens": 10},
    "hf_early_exit": {},
}
#: Our drafters, with the exact rule.
OURS = {"plain": "none", "ngram": "ngram", "early_exit": "early_exit", "jacobi": "jacobi"}
SYSTEMS = (*GENERATE, *OURS)
#: transformers decodes these one row at a time only.
SINGLE_ROW = ("prompt_lookup", "hf_early_exit")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """One configuration of the measurement."""

    loaded: TextModel
    dtype: str
    temperature: float
    batch: int
    seed: int
    max_new_tokens: int | None

    @property
    def label(self) -> str:
        """In words."""
        return f"{self.dtype} T={self.temperature:g} batch {self.batch}"


def run(
    model: Annotated[str, typer.Option(help="smollm2, or tiny, mid: random")] = "smollm2",
    kinds: Annotated[str, typer.Option(help="Kinds of prompts.")] = ",".join(KINDS),
    systems: Annotated[str, typer.Option(help="What to compare.")] = ",".join(SYSTEMS),
    dtype: Annotated[str, typer.Option(help="Of float32, bfloat16, ...")] = "float32,bfloat16",
    temperature: Annotated[str, typer.Option(help="0 is greedy.")] = "0,1",
    batch: Annotated[str, typer.Option(help="Rows per call.")] = "1,4,8",
    prompts: Annotated[int | None, typer.Option(help="Prompts of each kind; all if unset.")] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option("--max-new-tokens", "--tokens", help="Cap on the prompts' own budgets."),
    ] = None,
    repeats: Annotated[int, typer.Option(help="Repetitions of each input.")] = 3,
    minutes: Annotated[float | None, typer.Option(help="Stop then; run again to go on.")] = None,
    seed: Annotated[int, typer.Option(help="Of the sampled outputs.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder of samples and report.")] = Path("mmspec-bench"),
    label: Annotated[str, typer.Option(help="Part of the names of both files.")] = "",
    json_only: Annotated[bool, typer.Option("--json", help="Only the last line.")] = False,
) -> dict[str, Any]:
    """Measure text: tokens per forward and wall time beside transformers' generate.

    Returns:
        The object of the last line; see `mmspec.bench.measure.FINAL_LINE`.

    Raises:
        ValueError: If an option is out of range.
        typer.Exit: With code 1 if an exact output was not identical in float32 or float64.
    """
    stem("text", label)
    output, budget = Output(json_only=json_only), Budget(minutes)
    chosen = csv(systems, SYSTEMS)
    models = {name: load_text(model, name, device) for name in csv(dtype, list(DTYPES))}
    configs = [
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
    facts = provenance(torch.device(device), ["prompts"])
    card = [
        {"type": "card", "model": model, "dtype": name, "batch": size, **line}
        for name, loaded in models.items()
        for size in sorted({config.batch for config in configs})
        for line in text_card(loaded, size)
    ]
    output.show("Ceiling: what a forward costs", card_table(card))
    entries = load_prompts(csv(kinds, KINDS), prompts)
    built = [_tasks(config, entries, chosen, model) for config in configs]
    tasks = interleaved([group for group, _ in built])
    store = open_store(out, "text", label, facts)
    missing = run_tasks(tasks, repeats, store, budget, output.say)
    missing += [note for _, notes in built for note in notes]
    rows = summarise(samples_of(tasks, repeats, store))
    sections = [("Ceiling: what a forward costs", card_table(card)), *_sections(rows)]
    for title, text in sections[1:]:
        output.show(title, text)
    line = final_line(
        "text",
        facts,
        [*card, *rows],
        left_out=missing,
        failures=_failures(rows),
        time_s=budget.elapsed_s,
    )
    return publish(line, sections, out, output)


# --------------------------------------------------------------------------- tasks


def _tasks(
    config: Config, entries: Sequence[Mapping[str, Any]], systems: Sequence[str], model: str
) -> tuple[list[Task], list[str]]:
    """Groups of prompts of one kind, kinds in turn; and what was left out for not filling one."""
    by_kind: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for entry in entries:
        by_kind[entry["kind"]].append(entry)
    names = [n for n in systems if config.batch == 1 or n not in SINGLE_ROW]
    size, groups, notes = config.batch, [], []
    for kind, found in by_kind.items():
        whole = len(found) - len(found) % size
        groups.append(
            [_task(config, found[i : i + size], names, model) for i in range(0, whole, size)]
        )
        if whole < len(found):
            ids = ", ".join(str(entry["id"]) for entry in found[whole:])
            notes.append(f"{config.label}: {kind} prompts that do not fill a batch: {ids}")
    return interleaved(groups), notes


def _task(
    config: Config, entries: Sequence[Mapping[str, Any]], names: Sequence[str], model: str
) -> Task:
    prompts = [config.loaded.encode(entry["prompt"]) for entry in entries]
    budget = max(int(entry["max_new_tokens"]) for entry in entries)
    if config.max_new_tokens is not None:
        budget = min(budget, config.max_new_tokens)

    def warm_up() -> None:
        for name in names:
            try:
                _measure(config, name, prompts, 8, 0)
            except Unavailable:
                continue

    def system(name: str) -> System:
        return lambda repeat: _measure(config, name, prompts, budget, repeat)

    heat = f"{config.temperature:g}"
    ids = "+".join(str(entry["id"]) for entry in entries)
    return Task(
        key=f"text/{model}/{config.dtype}/T{heat}/b{config.batch}/n{budget}/s{config.seed}/{ids}",
        label=config.label,
        systems={name: system(name) for name in names},
        facts={
            "type": "sample",
            "model": model,
            "dtype": config.dtype,
            "temperature": config.temperature,
            "batch": config.batch,
            "kind": entries[0]["kind"],
            "input": ids,
        },
        warm_up=warm_up,
        finish=lambda samples: _compare(samples, is_greedy=config.temperature == 0),
    )


def _measure(
    config: Config, name: str, prompts: list[list[int]], budget: int, repeat: int
) -> Sample:
    loaded, seed = config.loaded, config.seed + repeat
    common: dict[str, Any] = {
        "max_new_tokens": budget,
        "temperature": config.temperature,
        "seed": seed,
    }
    with ForwardMeter(loaded.model) as meter:
        if name in OURS:
            result, time_s = timed(
                lambda: text_engine(loaded, prompts, drafter=OURS[name], **common).run(),
                loaded.device,
            )
            tokens, figures = list(result.units), step_figures(result)
        else:
            tokens, time_s = _generate(config, name, prompts, common)
            figures = _generate_figures(name, config, tokens, meter)
    return {
        "tokens": tokens,
        "num_units": sum(map(len, tokens)),
        "time_s": time_s,
        "num_forwards": meter.num_full,
        "num_shallow_forwards": meter.num_shallow,
        **figures,
    }


def _generate(
    config: Config, name: str, prompts: list[list[int]], common: Mapping[str, Any]
) -> tuple[list[list[int]], float]:
    options: dict[str, Any] = dict(GENERATE[name])
    if name == "hf_early_exit":
        depth = config.loaded.model.config.num_hidden_layers
        options["assistant_early_exit"] = max(1, depth // 3)  # as our own early exit
    try:
        return timed(
            lambda: generate_text(config.loaded, prompts, **common, **options),
            config.loaded.device,
        )
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        if name == "generate":
            raise
        raise Unavailable(f"{type(error).__name__}: {error}") from error


def _generate_figures(
    name: str, config: Config, tokens: list[list[int]], meter: ForwardMeter
) -> Sample:
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


def _compare(samples: Mapping[str, Sample], *, is_greedy: bool) -> None:
    """Replaces the tokens of each sample by how far they agree with the yardsticks."""
    outputs = {name: sample.pop("tokens") for name, sample in samples.items()}
    for name, sample in samples.items():
        sample["num_rows"] = len(outputs[name])
        sample["lengths"] = [len(row) for row in outputs[name]]
        if is_greedy and "generate" in outputs:
            sample["num_rows_equal"] = _num_equal(outputs[name], outputs["generate"])
        if name in OURS and "plain" in outputs:
            sample["num_rows_equal_plain"] = _num_equal(outputs[name], outputs["plain"])


def _num_equal(rows: list[list[int]], others: list[list[int]]) -> int:
    return sum(row == other for row, other in zip(rows, others, strict=True))


# --------------------------------------------------------------------------- rows


def summarise(samples: Sequence[Sample]) -> list[Sample]:
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
        fields = dict(zip(("dtype", "temperature", "batch", "kind", "system"), key, strict=True))
        rows.append(
            {"type": "row", **fields}
            | _figures(found)
            | {
                "speedup_median": _median_speedup(found, costs["generate"]),
                "speedup_total": ratio(totals.get((*key[:4], "generate")), totals[key]),
                "speedup_over_plain_median": _median_speedup(found, costs["plain"]),
            }
        )
    order = {name: i for i, name in enumerate((*KINDS, "all"))}
    rank = {name: i for i, name in enumerate(SYSTEMS)}

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
    first = samples[0]
    inputs = {s["input"] for s in samples}
    num_rows = sum(s["num_rows"] for s in samples)
    phases = ("prefill_time_s", "draft_time_s", "verify_time_s", "other_time_s")
    tried = _added([s.get("tried_at", []) for s in samples])
    held = _added([s.get("held_at", []) for s in samples])

    def share(name: str) -> float | None:
        if not all(name in s for s in samples):
            return None
        return sum(s[name] for s in samples) / num_rows

    return {
        "guarantee": first["guarantee"],
        "num_inputs": len(inputs),
        "num_samples": len(samples),
        "num_units": sum(s["num_units"] for s in samples),
        "tau": sum(s["num_units"] for s in samples) / sum(s["num_row_steps"] for s in samples),
        "tau_macro": sum(s["tau"] for s in samples) / len(samples),
        "ms_per_token": 1e3 * _time_per_unit(samples),
        "tokens_per_s": 1 / _time_per_unit(samples),
        "equal_generate": share("num_rows_equal"),
        "equal_plain": share("num_rows_equal_plain"),
        "acceptance_by_position": [h / t for h, t in zip(held, tried, strict=False) if t],
        "num_forwards": sum(s["num_forwards"] for s in samples),
        "num_shallow_forwards": sum(s["num_shallow_forwards"] for s in samples),
        "phases_s": {n: sum(s[n] for s in samples) for n in phases if all(n in s for s in samples)},
    }


def _added(lists: Sequence[Sequence[int]]) -> list[int]:
    longest = max(map(len, lists), default=0)
    return [sum(values[i] for values in lists if i < len(values)) for i in range(longest)]


def _failures(rows: Sequence[Sample]) -> list[str]:
    """Exactness is a promise where rounding does not decide: float32 and float64."""
    failures = []
    for row in rows:
        if row["system"] not in OURS or row["dtype"] not in ("float32", "float64"):
            continue
        for name, other in (("equal_generate", "generate"), ("equal_plain", "plain")):
            share = row[name]
            if row["kind"] != "all" and share is not None and share < 1:
                failures.append(
                    f"{row['dtype']} T={row['temperature']:g} batch {row['batch']} {row['kind']}: "
                    f"{row['system']} equals {other} in {percent(share)} of the outputs only"
                )
    return failures


def _sections(rows: Sequence[Sample]) -> list[tuple[str, str]]:
    groups: dict[tuple[Any, ...], list[Sample]] = defaultdict(list)
    for row in rows:
        groups[row["dtype"], row["temperature"], row["batch"]].append(row)
    sections = []
    for (dtype, temperature, batch), found in groups.items():
        title = f"{dtype}, temperature {temperature:g}, batch {batch}"
        sections.append((title, _speed_table(found)))
        sections.append((f"{title}: acceptance and seconds", _phase_table(found)))
    return sections


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
    headers = ["kind", "system", "prefill s", "draft s", "verify s", "other s"]
    headers += ["accepted at depth 1, 2, ... (conditional)"]
    lines = []
    for row in rows:
        if not row["phases_s"]:
            continue
        rates = " ".join(f"{rate:.2f}" for rate in row["acceptance_by_position"][:8])
        lines.append([row["kind"], row["system"], *row["phases_s"].values(), rates or "none"])
    return table(headers, lines)


if __name__ == "__main__":
    typer.run(run)
