"""The commands over block-wise video: `mmspec video`, `mmspec calibrate`.

Registered in `mmspec.cli`. Nothing here imports torch until a command runs.
"""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from mmspec.cli_common import (
    KNOWN_VIDEO_MODELS,
    DebugOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    SeedOption,
    check_model_name,
    examples,
    loader,
    note,
    one_line_reasons,
)

VIDEO_EXAMPLES = examples(
    'mmspec video "a red boot moving left slowly" --out videos --timeline',
    'mmspec video "a red bag moving up slowly" "a blue boot moving left quickly" --num 4 \\',
    "    --router first-block --format webp",
    'mmspec video "a red bag moving up slowly" --router never --out exact',
    "mmspec video --file prompts.txt --out videos --router first-block+temporal:-0.03",
    'mmspec video "a cat on a lawn" --model OWNER/LARGE --drafter OWNER/SMALL --steps 4 \\',
    "    --frames 81 --height 480 --width 832 --dtype bfloat16 --device cuda",
    "mmspec video --show videos/0000-00.mp4",
    "",
    "A router says which drafted blocks stay: never (the large model writes all, to the bit),",
    "always, first-block, every:3, random:0.7, or one with a threshold, such as temporal:-0.03;",
    "`mmspec calibrate` finds the threshold. With '+' between, all of them must agree.",
    "temporal:-0.03,on=preview looks at cheap pictures of the latents (preview.safetensors in the",
    "model's folder): what it refuses is never decoded. noise:-0.02,pictures=2 scores two pictures",
    "of a block.",
    "",
    "A file has one prompt per line, or with .jsonl one object per line with `prompt` and",
    "optionally `negative_prompt`, `seed`, `height`, `width`. Video k (from 0) of a prompt uses",
    "the seed SEED + k. What is left out is as the model says.",
    "",
    "The folder has a file for each video (PROMPT-VIDEO.mp4, both from 0), and videos.jsonl with",
    "who made each block, its score and the seconds. Start the same command again after a kill:",
    "what is there is not made again. Other settings in the same folder are refused.",
)
CALIBRATE_EXAMPLES = examples(
    "mmspec calibrate --router first-block+temporal --prompts prompts.txt --accept-rate 0.7 \\",
    "    --out temporal.json",
    "mmspec calibrate --router temporal:see=seam --prompts prompts.txt --budget 0.02 \\",
    "    --out seam.json",
    'mmspec video "a red bag moving up slowly" \\',
    "    --router first-block+temporal:calibration=temporal.json",
    "",
    "The router is given without its threshold. Every draft of the sample is kept and its score",
    "written to NAME.scores.jsonl, video by video: start the same command again after a kill, or",
    "with another aim, and what is there is not made again. One more video, by the target alone,",
    "says what a block of it costs.",
    "",
    "--budget alone measures what a kept draft loses: the target writes the block too, behind the",
    "same drafts and from the same noise, and pixels are compared. NAME.losses.jsonl keeps it.",
    "",
    '--losses has a line for each drafted block: {"file": "0000-00", "block": 1, "loss": 0.02},',
    "the quality that is lost by a measure of yours. Names and blocks are those of",
    "NAME.scores.jsonl.",
)

ModelOption = Annotated[str, typer.Option(help=f"{KNOWN_VIDEO_MODELS}.")]
DrafterOption = Annotated[
    str | None,
    typer.Option(
        help="The small model, likewise; self: the target in fewer steps. Left out, the one that "
        "is bundled with the model, else self."
    ),
]
StepsOption = Annotated[int | None, typer.Option(min=1, help="Denoising steps of a block.")]
DrafterStepsOption = Annotated[
    int | None, typer.Option(min=1, help="Those of the drafter; left out, the same.")
]
GuidanceOption = Annotated[float | None, typer.Option(min=0.0, help="1 switches guidance off.")]
DrafterGuidanceOption = Annotated[
    float | None, typer.Option(min=0.0, help="That of the drafter; left out, the same.")
]
FramesOption = Annotated[int | None, typer.Option(min=1, help="Pictures of a video.")]
HeightOption = Annotated[int | None, typer.Option(min=1, help="Pixels.")]
WidthOption = Annotated[int | None, typer.Option(min=1, help="Pixels.")]
BlocksOption = Annotated[
    str | None, typer.Option(help="Latent frames of each block, such as 1,3,3.")
]
NegativeOption = Annotated[
    str | None, typer.Option(help="What guidance steers away from, for models that take one.")
]
AttentionOption = Annotated[
    str | None,
    typer.Option(help="dense: faster for small models on a CPU; flex: as in diffusers."),
]
NumOption = Annotated[int, typer.Option("--num", "--num-videos", min=1, help="Videos per prompt.")]
PromptsOption = Annotated[
    Path | None,
    typer.Option(
        "--prompts", "--file", exists=True, dir_okay=False, help="Prompts, .txt or .jsonl."
    ),
]


def video(
    prompt: Annotated[list[str] | None, typer.Argument(help="What to show; several.")] = None,
    file: PromptsOption = None,
    out: Annotated[Path, typer.Option(help="A folder.")] = Path("videos"),
    file_format: Annotated[
        str,
        typer.Option(
            "--format",
            help="mp4 (needs imageio-ffmpeg), gif, webp (lossless), or frames: folders of PNG.",
        ),
    ] = "mp4",
    num: NumOption = 1,
    model: ModelOption = "bundled:clips",
    drafter: DrafterOption = None,
    router: Annotated[
        str | None, typer.Option(help="Who keeps drafts; left out, as the model says, else never.")
    ] = None,
    stitch: Annotated[
        str | None,
        typer.Option(help="Share the steps of the target's blocks: k, drafter:k or target:k."),
    ] = None,
    steps: StepsOption = None,
    drafter_steps: DrafterStepsOption = None,
    guidance: GuidanceOption = None,
    drafter_guidance: DrafterGuidanceOption = None,
    negative_prompt: NegativeOption = None,
    frames: FramesOption = None,
    height: HeightOption = None,
    width: WidthOption = None,
    block_sizes: BlocksOption = None,
    attention: AttentionOption = None,
    fps: Annotated[
        float | None, typer.Option(help="Pictures a second; left out, as the model says, else 16.")
    ] = None,
    scale: Annotated[int, typer.Option(min=1, help="Enlarge, keeping pixels square.")] = 1,
    timeline: Annotated[
        bool, typer.Option("--timeline", help="Also draw who made which block.")
    ] = False,
    show: Annotated[
        Path | None, typer.Option(exists=True, help="Print how a video was made, and stop.")
    ] = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    seed: SeedOption = 0,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Make videos of prompts, block by block: a small model drafts, the large one redoes some.

    With the router `never` they are those of the large model to the bit. With any other one,
    quality is the router's affair, and the last line says `lossy`.
    """
    if show is not None:
        with one_line_reasons(debug):
            _show_video(show, as_json)
        return
    if bool(prompt) == (file is not None):
        raise typer.BadParameter("give either prompts or --file, and not both", param_hint="PROMPT")
    with one_line_reasons(debug):
        from mmspec.jobs.video import VideoRun, VideoSettings, run_videos

        settings = VideoSettings(
            model=model,
            drafter=drafter,
            dtype=dtype,
            options=_options(
                router=router,
                stitch=int(stitch) if stitch is not None and stitch.isdecimal() else stitch,
                num_inference_steps=steps,
                drafter_steps=drafter_steps,
                guidance_scale=guidance,
                drafter_guidance_scale=drafter_guidance,
                num_frames=frames,
                height=height,
                width=width,
                block_sizes=_block_sizes(block_sizes),
                attention=attention,
            ),
            format=file_format,
            fps=fps,
            scale=scale,
        )
        summary = run_videos(
            VideoRun(
                load=_loader(model, drafter, dtype, device),
                requests=_requests(prompt, file, negative_prompt, seed),
                out=out,
                num=num,
                settings=settings,
                timeline=timeline,
                report=note,
            )
        )
        typer.echo(json.dumps(summary.to_dict()) if as_json else summary.line())


def calibrate(
    router: Annotated[str, typer.Option(help="The router, without its threshold.")],
    prompts: Annotated[
        Path,
        typer.Option(
            "--prompts", "--file", exists=True, dir_okay=False, help="The sample, .txt or .jsonl."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The calibration, a .json.")] = Path("calibration.json"),
    accept_rate: Annotated[
        float | None, typer.Option(help="Share of the drafts to keep, such as 0.7.")
    ] = None,
    budget: Annotated[
        float | None, typer.Option(help="Instead: the mean loss allowed per block, such as 0.02.")
    ] = None,
    losses: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="With --budget: the loss of each block by a measure of your own, .jsonl; left "
            "out: how far a draft's pixels (0 to 1) are from what the target makes there.",
        ),
    ] = None,
    num: NumOption = 1,
    model: ModelOption = "bundled:clips",
    drafter: DrafterOption = None,
    steps: StepsOption = None,
    drafter_steps: DrafterStepsOption = None,
    guidance: GuidanceOption = None,
    drafter_guidance: DrafterGuidanceOption = None,
    negative_prompt: NegativeOption = None,
    frames: FramesOption = None,
    height: HeightOption = None,
    width: WidthOption = None,
    block_sizes: BlocksOption = None,
    attention: AttentionOption = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    seed: SeedOption = 0,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Find the threshold of a video router from a sample of prompts.

    Prints the threshold, the share of drafts that it keeps, the seconds to expect, and how many
    blocks have which score.
    """
    with one_line_reasons(debug):
        from mmspec.jobs.calibration import Aim, CalibrationRun, read_losses, run_calibration

        options = _options(
            num_inference_steps=steps,
            drafter_steps=drafter_steps,
            guidance_scale=guidance,
            drafter_guidance_scale=drafter_guidance,
            num_frames=frames,
            height=height,
            width=width,
            block_sizes=_block_sizes(block_sizes),
            attention=attention,
        )
        summary = run_calibration(
            CalibrationRun(
                load=_loader(model, drafter, dtype, device),
                requests=_requests(None, prompts, negative_prompt, seed),
                num=num,
                router=router,
                settings={"model": model, "drafter": drafter, "dtype": dtype, "options": options},
                aim=Aim(
                    accept_rate=accept_rate,
                    budget=budget,
                    losses=None if losses is None else read_losses(losses),
                ),
                out=out,
                report=note,
            )
        )
        typer.echo(json.dumps(summary.to_dict()) if as_json else summary.text())


def _options(**given: Any) -> dict[str, Any]:
    """The options that were given; the others are the model's own."""
    return {name: value for name, value in given.items() if value is not None}


def _block_sizes(text: str | None) -> list[int] | None:
    """Reads ``--block-sizes``.

    Raises:
        ValueError: If it is no list of counts.
    """
    if text is None:
        return None
    from mmspec.checks import require

    parts = text.split(",")
    require(all(map(str.isdecimal, parts)), "--block-sizes", "counts such as 1,3,3", text)
    return list(map(int, parts))


def _requests(
    prompts: list[str] | None, file: Path | None, negative_prompt: str | None, seed: int
) -> Any:
    """Requests of the arguments or of a file.

    Raises:
        ValueError: If a prompt is empty or a line cannot be used.
    """
    from mmspec.jobs.requests import VisualRequest, read_requests
    from mmspec.pipelines.base import as_list

    shared: dict[str, Any] = {"negative_prompt": negative_prompt, "seed": seed}
    if file is not None:
        return read_requests(file, shared)
    return [VisualRequest(prompt=prompt, **shared) for prompt in as_list(prompts or [])]


def _loader(model: str, drafter: str | None, dtype: str, device: str) -> Callable[[], Any]:
    """Loads at the first call, without the bars and notes of diffusers."""
    load = loader(
        "SpeculativeVideoPipeline", model, KNOWN_VIDEO_MODELS, dtype, device, drafter=drafter
    )

    def load_quietly() -> Any:
        if drafter is not None and drafter != "self":
            check_model_name(drafter, f"self, {KNOWN_VIDEO_MODELS}")
        from diffusers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        # Said to those who could compile the model; a command cannot.
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        return load()

    return load_quietly


def _show_video(path: Path, as_json: bool) -> None:
    """Prints the metadata of a video."""
    from mmspec.video_files import read_video_metadata

    found = read_video_metadata(path)
    if found is None:
        raise ValueError(f"{path} is no video that says how it was made")
    if as_json:
        typer.echo(json.dumps(found, ensure_ascii=False))
    else:
        typer.echo("\n".join(f"{name}: {value}" for name, value in found.items()))
