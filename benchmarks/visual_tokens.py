"""What drafters gain from the visual tokens that they read, and what reading them costs.

    python benchmarks/visual_tokens.py --model PATH --drafter PATH --images FOLDER
    python benchmarks/visual_tokens.py --model qwen2_5_vl
    python benchmarks/visual_tokens.py --long-video

The first measures a model and a drafter on the pictures of a folder. A name of `TINY` in place of
a path is a random model and its clone: what is lost then is lost by the choice of tokens alone.
Its requests ask about a video; `--long-video` gives it 25 000 visual tokens.

A prefill is the tower and the forward that reads the prompt; for "attention" and "self" also the
question to the target. Seconds are CPU seconds of the process and bytes are those of tensors, which
the load of the machine moves little or not at all.
"""

import copy
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from PIL import Image

from mmspec.adapters import vision_language
from mmspec.bench.measure import Budget, Sample, csv, final_line, open_store, provenance
from mmspec.bench.memory import MIB, MadeTensors
from mmspec.bench.report import Output, publish, table
from mmspec.law_config import LawConfig
from mmspec.noise import row_keys
from mmspec.pipelines import SpeculativeVLMPipeline
from mmspec.rows import TokenRows
from mmspec.sampling import build_law
from mmspec.speculation import Settings, build_engine
from mmspec.visual_tokens import VisualTokens

LONG_OPTIONS = "all,uniform:0.1,reuse+uniform:0.1,attention:0.1,none,self:0.1"
IMAGE, START, END, VIDEO = 250, 251, 252, 253
#: Along a side of a frame, the visual tokens for Qwen2.5-VL, and the patches for LLaVA-OneVision.
SIDE = 16
TEXT = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 65536,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}


def qwen2_5_vl() -> Any:
    """Three axes of positions; a video has as many visual tokens as its grid says."""
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    tower = {
        "depth": 2,
        "num_heads": 2,
        "patch_size": 4,
        "hidden_size": 32,
        "intermediate_size": 64,
        "out_hidden_size": 64,
        "window_size": 32,
        "fullatt_block_indexes": [1],
    }
    config = transformers.Qwen2_5_VLConfig(
        text_config=TEXT | {"rope_parameters": rope},
        vision_config=tower,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=False,
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def llava_onevision() -> Any:
    """Counted positions; the tower's features of a frame are pooled to a quarter."""
    config = transformers.LlavaOnevisionConfig(
        text_config=transformers.Qwen2Config(**TEXT),
        vision_config=transformers.SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=4 * SIDE,
            patch_size=4,
            vision_use_head=False,
        ),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[4 * SIDE, 4 * SIDE]],
    )
    return transformers.LlavaOnevisionForConditionalGeneration(config)


TINY = {"llava_onevision": llava_onevision, "qwen2_5_vl": qwen2_5_vl}


def tiny(name: str) -> Any:
    """A random model whose next tokens depend on what it sees."""
    torch.manual_seed(0)
    model = TINY[name]()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1.5 * parameter.shape[-1] ** -0.5)
    return model.eval()


def film(name: str, num_tokens: int, seed: int) -> dict[str, Any]:
    """A question behind a random video that has at least so many visual tokens."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(0, 200, (36,), generator=generator).tolist()
    if name == "qwen2_5_vl":
        # A unit of time is two frames; 2 x 2 patches are a token.
        length = -(-num_tokens // SIDE**2)
        count = length * SIDE**2
        grid = torch.tensor([[length, 2 * SIDE, 2 * SIDE]])
        values = torch.randn(int(grid.prod()), 96, generator=generator)
        videos = {"pixel_values_videos": values, "video_grid_thw": grid}
        videos["second_per_grid_ts"] = torch.ones(1)
    else:
        # 2 x 2 patches are a token, and one token more ends the video.
        length = -(-(num_tokens - 1) // (SIDE // 2) ** 2)
        count = length * (SIDE // 2) ** 2 + 1
        values = torch.randn(1, length, 3, 4 * SIDE, 4 * SIDE, generator=generator)
        videos = {"pixel_values_videos": values}
    ids = torch.tensor([[*text[:4], START, *[VIDEO] * count, END, *text[4:]]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | videos
    if name == "qwen2_5_vl":
        inputs["mm_token_type_ids"] = 2 * (ids == VIDEO)
    return inputs


def pictures(pipe: SpeculativeVLMPipeline, folder: Path, question: str) -> list[dict[str, Any]]:
    """The question about each picture of a folder, as the model's processor writes it."""
    files = sorted(p for p in folder.iterdir() if p.suffix in (".png", ".jpg", ".jpeg"))
    if not files:
        raise typer.BadParameter(f"{folder} has no .png or .jpg files", param_hint="--images")
    parts = [{"type": "image"}, {"type": "text", "text": question}]
    text = f"{pipe.processor.image_token}{question}"
    if getattr(pipe.processor, "chat_template", None):
        chat = [{"role": "user", "content": parts}]
        text = pipe.processor.apply_chat_template(chat, add_generation_prompt=True)
    requests = []
    for file in files:
        image = Image.open(file).convert("RGB")
        encoded = pipe.processor(text=[text], images=[[image]], return_tensors="pt")
        requests.append(dict(encoded.to(pipe.device, pipe.dtype)))
    return requests


def engine_for(
    model: Any, inputs: dict[str, Any], drafter: Any, num_new: int, width: int, temperature: float
) -> tuple[Any, float]:
    """The engine that the pipeline would wire, and the seconds in the target's tower."""
    (ids,) = inputs["input_ids"].tolist()
    rows = TokenRows(
        [ids],
        max_new_tokens=[num_new],
        keys_B=row_keys(torch.Generator().manual_seed(0), 1),
        eos_token_ids=_ends(model),
        device=model.device,
    )
    started = time.process_time()
    prepared = vision_language.prepare(model, inputs)
    tower_s = time.process_time() - started
    is_token = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    extras = vision_language.extras_in_generate(model, rows, prepared, is_token, inputs)
    settings = Settings(drafter=drafter, width=width, schedule="fixed")
    law = build_law(LawConfig(temperature=temperature))
    return build_engine(model, rows, law, settings, extras=extras), tower_s


def _ends(model: Any) -> list[int]:
    ends = model.generation_config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def prefilled(engine: Any) -> Sample:
    """Reads the prompts; returns what it cost the target and the drafter."""
    sample: Sample = {}
    for name, part in (("target", engine.target), ("drafter", engine.drafter)):
        made, started = MadeTensors(), time.process_time()
        with torch.no_grad(), made:
            part.prefill()
        sample[f"{name}_prefill_s"] = time.process_time() - started
        sample[f"{name}_peak_bytes"] = made.peak_bytes
    # What is read twice would be counted twice.
    engine._is_prefilled = True
    engine.ledger.num_extra_forwards = engine.drafter.num_target_forwards
    return sample


def cache_bytes(engine: Any, part: str) -> int:
    """Bytes of the keys and values of the target or the drafter."""
    layers = getattr(engine, part).forward.cache.layers
    return sum(buffer.nbytes for layer in layers for buffer in layer.buffers)


def measured(engine: Any, *, counted: bool) -> Sample:
    """Runs one request.

    Args:
        engine: Its engine.
        counted: Give the drafter positions counted from 0 instead of those of the whole rows.
    """
    if counted:
        view = engine.drafter._view
        engine.drafter._view = lambda: replace(view(), place=None)
    sample = prefilled(engine)
    stats = engine.run().stats
    return sample | {
        "num_prompt_tokens": engine.target.rows.prompt_lengths[0],
        "num_read": sum(engine.drafter.num_prompt_tokens),
        "num_units": stats.num_units,
        "num_forwards": stats.num_target_forwards,
        "num_steps": len(engine.ledger.steps),
        "num_accepted": stats.num_accepted,
        "num_drafted": stats.num_drafted,
        "target_cache_bytes": cache_bytes(engine, "target"),
        "drafter_cache_bytes": cache_bytes(engine, "drafter"),
    }


def main(
    model: Annotated[str, typer.Option(help=f"A folder, a hub id, or {', '.join(TINY)}.")] = "",
    drafter: Annotated[str, typer.Option(help="The same; empty is a clone of the model.")] = "",
    images: Annotated[Path | None, typer.Option(help="Folder of pictures.")] = None,
    question: Annotated[str, typer.Option(help="Asked about each picture.")] = "Read this page.",
    options: Annotated[str, typer.Option(help="visual_tokens; with & between them, mixed.")] = (
        "all,uniform:0.5,uniform:0.2,uniform:0.1,uniform:0.05,uniform:0.01,attention:0.5,"
        "attention:0.2,attention:0.1,attention:0.05,attention:0.01,pool:2,pool:4,none,all&none,"
        "self:0.5,self:0.2,self:0.1,self:0.05,self:0.01"
    ),
    counted: Annotated[bool, typer.Option(help="Also with positions counted from 0.")] = False,
    long_video: Annotated[bool, typer.Option(help="25 000 visual tokens.")] = False,
    visual: Annotated[int, typer.Option(help="Visual tokens of random requests.")] = 0,
    requests: Annotated[int, typer.Option(help="Random requests, or most pictures.")] = 4,
    tokens: Annotated[int, typer.Option(help="New tokens of each request.")] = 64,
    width: Annotated[int, typer.Option(help="Tokens per forward.")] = 8,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    minutes: Annotated[float | None, typer.Option(help="Stop then; run again to go on.")] = None,
    label: Annotated[str, typer.Option(help="Part of the files' names.")] = "",
    out: Annotated[Path, typer.Option(help="Folder of samples and report.")] = Path("mmspec-bench"),
) -> None:
    """Measures what is missing and writes the report."""
    if not model and not long_video:
        raise typer.BadParameter("is needed, or --long-video", param_hint="--model")
    models = csv(model or ",".join(TINY))
    if long_video:
        options, visual, requests = LONG_OPTIONS, visual or 25000, 1
    cases = [
        (option, scheme)
        for option in csv(options)
        for scheme in (("true", "counted") if counted and _is_shortened(option) else ("true",))
    ]
    budget, output = Budget(minutes), Output(json_only=False)
    facts = provenance(torch.device("cpu"))
    store = open_store(out, "visual_tokens", label, facts)
    rows: list[Sample] = []
    missing: list[str] = []
    for name in models:
        target, small, inputs = loaded(name, drafter, images, question, visual or 1024, requests)
        for option, scheme in cases:
            keys = []
            for index, one in enumerate(inputs):
                what = f"{name}/{drafter}/{images}/{question}/{option}/{scheme}/v{visual}/{index}"
                key = f"{what}/n{tokens}/w{width}/t{temperature:g}"
                if key not in store and not budget.is_spent:
                    engine, tower_s = engine_for(
                        target, one, _spec(option, small), tokens, width, temperature
                    )
                    sample = measured(engine, counted=scheme == "counted")
                    store.add([{"key": key, "target_tower_s": tower_s} | sample])
                (keys if key in store else missing).append(key)
            if keys:
                rows.append(summed(name, option, scheme, [store.samples[key] for key in keys]))
                output.say(f"{name} {option} {scheme}: tau {rows[-1]['tau']:.2f}")
    line = final_line(
        "visual_tokens", facts, rows, left_out=missing, failures=[], time_s=budget.elapsed_s
    )
    sections = [("Acceptance by visual tokens", _accepted(rows)), ("What it costs", _costs(rows))]
    publish(line, sections, out, output)


def loaded(
    name: str, drafter: str, images: Path | None, question: str, visual: int, requests: int
) -> tuple[Any, Any, list[dict[str, Any]]]:
    """Target, drafter and requests."""
    if name in TINY:
        target = tiny(name)
        small = tiny(drafter) if drafter else copy.deepcopy(target)
        return target, small, [film(name, visual, seed) for seed in range(requests)]
    if images is None:
        raise typer.BadParameter(f"is needed for {name}", param_hint="--images")
    pipe = SpeculativeVLMPipeline.from_pretrained(name, dtype=torch.float32)
    small = copy.deepcopy(pipe.model)
    if drafter:
        small = SpeculativeVLMPipeline.from_pretrained(drafter, dtype=torch.float32).model
    return pipe.model, small, pictures(pipe, images, question)[:requests]


def _spec(option: str, small: Any) -> dict[str, Any]:
    if "&" in option:
        return {"name": "mixed", "model": small, "members": option.split("&")}
    spec = {"name": "model", "visual_tokens": option}
    return spec if option.startswith("self") else spec | {"model": small}


def _is_shortened(option: str) -> bool:
    return "&" not in option and VisualTokens.parse(option).choice in (
        "uniform",
        "attention",
        "pool",
    )


def summed(name: str, option: str, scheme: str, samples: Sequence[Sample]) -> Sample:
    """One line of the report."""

    def total(key: str) -> Any:
        return sum(sample[key] for sample in samples)

    return {
        "type": "row",
        "model": name,
        "visual_tokens": option,
        "positions": scheme,
        "num_requests": len(samples),
        "tau": total("num_units") / total("num_forwards"),
        "accepted": total("num_accepted") / max(total("num_steps") - len(samples), 1),
        "num_prompt_tokens": total("num_prompt_tokens") / len(samples),
        "num_read": total("num_read") / len(samples),
        "share_read": total("num_read") / total("num_prompt_tokens"),
        "target_prefill_s": (total("target_tower_s") + total("target_prefill_s")) / len(samples),
        "drafter_prefill_s": total("drafter_prefill_s") / len(samples),
        **{
            f"{part}_{what}": max(sample[f"{part}_{what}_bytes"] for sample in samples) / MIB
            for part in ("target", "drafter")
            for what in ("peak", "cache")
        },
    }


def _accepted(rows: Sequence[Sample]) -> str:
    headers = ["model", "visual tokens", "positions", "requests", "prompt tokens read", "of", "tau"]
    return table(
        [*headers, "accepted per draft"],
        [
            [
                *(row[key] for key in ("model", "visual_tokens", "positions", "num_requests")),
                *(f"{row[key]:.0f}" for key in ("num_read", "num_prompt_tokens")),
                *(row[key] for key in ("tau", "accepted")),
            ]
            for row in rows
        ],
    )


def _costs(rows: Sequence[Sample]) -> str:
    names = ("prefill_s", "peak", "cache")
    headers = [
        "target: prefill, CPU s",
        "drafter: prefill, CPU s",
        "target: peak without tower, MiB",
        "drafter: peak with tower, MiB",
        "target: cache, MiB",
        "drafter: cache, MiB",
    ]
    return table(
        ["model", "visual tokens", "positions", *headers],
        [
            [
                *(row[key] for key in ("model", "visual_tokens", "positions")),
                *(row[f"{part}_{name}"] for name in names for part in ("target", "drafter")),
            ]
            for row in rows
        ],
    )


if __name__ == "__main__":
    typer.run(main)
