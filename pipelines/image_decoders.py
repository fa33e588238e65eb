"""The decoders of image pipelines: their names, and how an engine is wired for each."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmspec.adapters.image_seats import ImageSeats
from mmspec.adapters.token_image import ImageFamily, ImageLayout, TokenImageTarget
from mmspec.checks import is_number, require
from mmspec.denoiser import Denoiser
from mmspec.drafters import build_drafter
from mmspec.drafters.jacobi import default_window
from mmspec.engine import Engine
from mmspec.lossy import GroupedAcceptance, OverlappingRows
from mmspec.pipelines.base import check_positive
from mmspec.rows import TokenRows
from mmspec.sampling import Law
from mmspec.schedule import FixedSchedule
from mmspec.tree import BUCKETS
from mmspec.verify import build_rule
from mmspec.window_schedule import WindowSchedule, window_schedule

#: Makes a drafter for a call: called with ``target``, ``rows``, ``law``, ``max_width`` and
#: ``shared_noise``, as `mmspec.drafters.build_drafter` is behind its ``spec``.
DrafterMaker = Callable[..., Any]

DENOISE = "jacobi-denoise"
#: Decoder -> rule. "sequential" is plain decoding through the same code, the yardstick.
DECODERS = {
    "sequential": "exact",
    "exact": "exact",
    "coupled": "coupled",
    "sjd": "sjd",
    DENOISE: "exact",
    "lossy-grouped": "lossy-grouped",
    "lossy-rows": "lossy-rows",
}
#: Rules that change the law, with a ``lenience``; see `mmspec.lossy`.
LOSSY = ("lossy-grouped", "lossy-rows")


def check_lenience(lenience: Any, rule: str) -> None:
    """Refuses a lenience out of its range, or for a rule that has none.

    Raises:
        ValueError: With the value.
    """
    if lenience is None:
        return
    if rule not in LOSSY:
        raise ValueError(f"lenience is for {' and '.join(LOSSY)} only, got {lenience!r}")
    is_good = is_number(lenience) and 0 <= lenience <= 1
    require(is_good, "lenience", "None or a number between 0 and 1", lenience)


def check_drafter(drafter: DrafterMaker | None, decoder: str) -> None:
    """Refuses a drafter of the user's own that is none, or beside a decoder that brings its own.

    Raises:
        ValueError: With the drafter, or the decoder.
    """
    if drafter is None:
        return
    require(callable(drafter), "drafter", "None or a function that makes one", drafter)
    require(decoder == "exact", "the decoder beside drafter=", "'exact'", decoder)


def check_batch_size(batch_size: int | None, decoder: str, num_images: int) -> None:
    """Refuses rows that are given to other images by rules for which an image would notice.

    Raises:
        ValueError: With the decoder, or a batch size that is none.
    """
    if batch_size is None:
        return
    check_positive("batch_size", batch_size)
    if batch_size < num_images and not refills(decoder):
        names = ", ".join(filter(refills, DECODERS))
        raise ValueError(
            f"batch_size below the number of images is for the decoders {names}, got {batch_size} "
            f"for {num_images} images with {decoder!r}"
        )


def refills(decoder: str) -> bool:
    """Whether images of this decoder may begin while others are under way.

    The noise of other rules counts the steps of a batch, so an image depends on when it began.
    """
    return DECODERS[decoder] == "exact"


def image_engine(
    family: ImageFamily,
    layout: ImageLayout,
    prompts: Sequence[Sequence[int]],
    *,
    rule: str,
    law: Law,
    window: int | None,
    guidance_scale: float,
    keys_B: Tensor,
    device: torch.device,
    negatives: Sequence[Sequence[int]] | None = None,
    denoiser: Denoiser | None = None,
    lenience: float | None = None,
    compile: bool = False,
    num_rows: int | None = None,
    make_drafter: DrafterMaker | None = None,
) -> tuple[Engine, TokenRows]:
    """Wires the engine that writes one image per prompt; runs nothing.

    Args:
        family: The model.
        layout: How an image lies in the new tokens of a row.
        prompts: Token ids of each prompt.
        rule: A name of `mmspec.verify.RULES` or `LOSSY`.
        law: The law that tokens are drawn from.
        window: Tokens per image and forward; 1 is plain decoding, None chooses: while running
            for the exact rule, by the grid and the batch for others and for compiled forwards.
        guidance_scale: As in `TokenImageTarget`.
        keys_B: Noise keys, one per image.
        device: Where the model takes its input.
        negatives: As in `TokenImageTarget`.
        denoiser: Makes new positions of the window noisy; None leaves them clean.
        lenience: Of a lossy rule; None is its own.
        compile: Compile the model's forward.
        num_rows: Images that are under way together, with a rule for which `refills` holds; None
            is all.
        make_drafter: A drafter instead of the Jacobi window, for the exact rule; None is that.

    Raises:
        ValueError: If a row does not fit the model's context, or a drafter cannot begin rows anew
            where there are fewer rows than images.
    """
    rows = TokenRows(
        prompts,
        max_new_tokens=[layout.num_tokens] * len(prompts),
        keys_B=keys_B,
        device=device,
        num_rows=num_rows,
    )
    # Other rules would follow the clock with their tokens, and a compiled forward compile anew.
    # What the window schedule knows of settling guesses is not true of other drafters.
    if window is None and (rule != "exact" or compile or make_drafter is not None):
        window = default_window(layout.num_tokens, rows.num_rows)
    schedule: WindowSchedule | FixedSchedule
    if window is None:
        noise = None if denoiser is None else denoiser.schedule
        kind = (guidance_scale, law.is_greedy, family.backbone.dtype, str(device), noise)
        schedule = window_schedule(family.backbone, kind, rows)
    else:
        schedule = FixedSchedule(window, lambda: rows.max_remaining)
    target = TokenImageTarget(
        family,
        rows,
        guidance_scale=guidance_scale,
        negatives=negatives,
        place=layout.place,
        compile=compile,
    )
    spec: dict[str, Any] = {"name": "jacobi", "stride": layout.stride}
    if denoiser is not None:
        spec |= {"name": "denoise", "denoiser": denoiser, "embed": family.embed_image}
    if make_drafter is None or window == 1:
        make_drafter = partial(build_drafter, "none" if window == 1 else spec)
    drafter = make_drafter(
        target=target,
        rows=rows,
        law=law,
        max_width=BUCKETS[-1] if window is None else window,
        shared_noise=rule in ("exact", "lossy-rows"),
    )
    made = _build_rule(rule, law, rows, family, layout, lenience)
    seats = None
    if rows.num_waiting:
        rule_of_seats = "one with admit() where batch_size is below the number of images"
        require(hasattr(drafter, "admit"), "drafter", rule_of_seats, type(drafter).__name__)
        seats = ImageSeats(target, drafter, made)
    return Engine(target, drafter, made, schedule, seats), rows


def _build_rule(
    name: str,
    law: Law,
    rows: TokenRows,
    family: ImageFamily,
    layout: ImageLayout,
    lenience: float | None,
) -> Any:
    """A rule by name; lossy ones are told what codes look like, or where they stand."""
    options: dict[str, Any] = {} if lenience is None else {"lenience": float(lenience)}
    if name == "lossy-grouped":
        codes = torch.arange(family.codebook_size, device=rows.lengths_B.device)
        codes_VH = family.embed_image(codes).detach().float()
        return GroupedAcceptance(law, rows, codes_VH=codes_VH, **options)
    if name == "lossy-rows":
        first, below = layout.code_index[[0, layout.columns]].tolist()
        return OverlappingRows(law=law, rows=rows, stride=below - first, first=first, **options)
    return build_rule(name, law, rows)
