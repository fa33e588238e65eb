"""Text: tokens per forward and wall time beside transformers' own ways of decoding.

Everything runs in one process on one loaded model per dtype, in turn: the same weights, attention
and kind of cache. Prompts are tokenised outside the clock. Forwards are counted by a hook on the
model, whoever calls it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from mmspec.bench.measure import Budget, ForwardMeter, Sample, csv, provenance, stem, timed
from mmspec.bench.report import Output
from mmspec.bench.setups import (
    DTYPES,
    generate_text,
    load_prompts,
    load_text,
    step_figures,
    text_card,
    text_engine,
)
from mmspec.bench.tasks import Unavailable
from mmspec.bench.written import (
    Bench,
    Config,
    Job,
    Session,
    generate_figures,
    make_card,
    make_configs,
    run_bench,
)

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
    configs = make_configs(models, batch, temperature, seed=seed, max_new_tokens=max_new_tokens)
    facts = provenance(torch.device(device), ["prompts"])
    card = make_card(configs, model, text_card)
    bench = Bench(
        name="text",
        model=model,
        kinds=KINDS,
        systems=[name for name in SYSTEMS if name in chosen],
        ours=OURS,
        single_row=SINGLE_ROW,
        measure=_measure,
    )
    session = Session(out=out, label=label, repeats=repeats, budget=budget, output=output)
    entries = load_prompts(csv(kinds, KINDS), prompts)
    return run_bench(bench, configs, entries, facts, card, session)


def _measure(config: Config, name: str, job: Job, repeat: int) -> Sample:
    loaded, seed = config.loaded, config.seed + repeat
    prompts = [loaded.encode(entry["prompt"]) for entry in job.entries]
    common: dict[str, Any] = {
        "max_new_tokens": job.budget,
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
            figures = generate_figures(name, config, tokens, meter)
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


if __name__ == "__main__":
    typer.run(run)
