"""Autoregressive image models as targets: an image is a row of codebook tokens on a grid.

One forward serves the conditional and the unconditional rows of classifier-free guidance, and both
share every draft. What differs between model families is in `FAMILIES`.
"""

import importlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mmspec.adapters.guidance import Guidance
from mmspec.cache import SlotCache
from mmspec.forward import SlotForward
from mmspec.law_config import AllowedTokens
from mmspec.records import Outcome, Proposal, Scores, Verdict
from mmspec.rows import TokenRows


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageLayout:
    """How an image of one size lies in the new tokens of a row.

    Attributes:
        rows: Codes from top to bottom.
        columns: Codes from left to right.
        num_tokens: New tokens of a row, forced ones and other grids included.
        stride: Tokens from the code above to a code: one number where it is the same throughout,
            or one for each new token, ``[num_tokens]``, 0 where none is above.
        code_index: Which of the new tokens is each code, ``[rows * columns]``, int64, on the CPU.
        allowed: Which tokens may stand where; None where any code may.
        place: Positions as the backbone counts them, ``[..., B, N]``, of places in the rows
            ``[B, N]`` behind prompts of the lengths ``[B]``; None where they are the same.
    """

    rows: int
    columns: int
    num_tokens: int
    stride: int | Tensor
    code_index: Tensor
    allowed: AllowedTokens | None = None
    place: Callable[[Tensor, Tensor], Tensor] | None = None


def square_layout(name: str, side: int, height: int | None, width: int | None) -> ImageLayout:
    """The layout of a family that makes images of one size, of codes alone.

    Args:
        name: The family's name.
        side: Codes on a side.
        height: The height asked for, which must be None.
        width: The width asked for, likewise.

    Raises:
        ValueError: If a size is asked for.
    """
    if height is not None or width is not None:
        raise ValueError(
            f"{name} makes images of one size; leave height and width at None, got "
            f"height={height!r}, width={width!r}"
        )
    return ImageLayout(
        rows=side,
        columns=side,
        num_tokens=side * side,
        stride=side,
        code_index=torch.arange(side * side),
    )


class ImageCodes:
    """Where a vocabulary of text and images keeps its image codes."""

    def __init__(self, code_ids: Sequence[int], more_ids: Sequence[int] = ()) -> None:
        """Notes the places.

        Args:
            code_ids: Id of each code.
            more_ids: Ids of the tokens behind the codes, which the head is not asked for.
        """
        first = min(code_ids)
        # A slice copies nothing of the head; what it has out of order is sorted out in the logits.
        self._rows = slice(first, max(code_ids) + 1)
        order = [place - first for place in code_ids]
        self._order = None if order == list(range(len(order))) else torch.tensor(order)
        self._ids = torch.tensor([*code_ids, *more_ids])

    def ids(self, tokens: Tensor) -> Tensor:
        """Ids of the vocabulary, of tokens of a row."""
        self._ids = self._ids.to(tokens.device)
        return self._ids[tokens]

    def logits(self, head: Any, hidden: Tensor) -> Tensor:
        """Logits over the codes alone, by the rows of a head over the whole vocabulary."""
        if type(head) is torch.nn.Linear and not hasattr(head, "_hf_hook"):
            logits = torch.nn.functional.linear(hidden, head.weight[self._rows])
        else:  # quantised, or moved from device to device by accelerate
            logits = head(hidden)[..., self._rows]
        return logits if self._order is None else logits[..., self._order.to(logits.device)]


class ImageFamily(Protocol):
    """What a family of image models has to say; all tensors are batch first.

    A *token* is what a row holds: one of ``codebook_size`` ids, image codes first. Most families
    have no others; forced tokens (line ends, the end of the image) come behind the codes.
    """

    backbone: Any
    codebook_size: int

    def layout(self, height: int | None, width: int | None) -> ImageLayout:
        """The layout of images of this size in pixels; None is the family's own size.

        Raises:
            ValueError: With the rule, if the family makes no images of this size.
        """

    def prompt(self, processor: Any, text: str, layout: ImageLayout) -> list[int]:
        """Token ids of a prompt, the token that begins the image last."""

    def negative(self, processor: Any, text: str, layout: ImageLayout) -> list[int]:
        """The same for a negative prompt.

        Raises:
            ValueError: If the family takes none.
        """

    def unconditional(self, prompt: Sequence[int]) -> list[int]:
        """The prompt that guidance steers away from where none is given.

        Args:
            prompt: The prompt, without the token that begins the image; so is the answer.
        """

    def embed_text(self, ids: Tensor) -> Tensor:
        """Prompt tokens to embeddings ``[..., hidden]``."""

    def embed_image(self, codes: Tensor) -> Tensor:
        """Tokens of a row to embeddings ``[..., hidden]``."""

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states to logits over the ``codebook_size`` tokens."""

    def decode(self, codes: Tensor, layout: ImageLayout) -> Tensor:
        """Codes ``[B, rows * columns]`` to pixels ``[B, height, width, 3]`` in [0, 1]."""

    # A family without guidance or without a pixel decoder says why in `no_guidance`, `no_pixels`.


class JanusFamily:
    """`transformers.JanusForConditionalGeneration`: a fixed square grid and no end token."""

    def __init__(self, model: Any) -> None:
        """Takes the model apart.

        Raises:
            ValueError: If the generation config does not name the begin-of-image token.
        """
        self._model = model
        self.backbone = model.model.language_model
        self.num_image_tokens = model.model.vision_model.config.num_image_tokens
        self.grid_width = round(self.num_image_tokens**0.5)
        self.codebook_size = model.model.vqmodel.config.num_embeddings
        config = model.generation_config
        kwargs = getattr(config, "generation_kwargs", None) or {}
        self.boi_token_id: Any = kwargs.get("boi_token_id")
        if self.boi_token_id is None:
            raise ValueError(
                "the model's generation_config.generation_kwargs must hold 'boi_token_id', the "
                "token that begins an image"
            )
        self._kept = {config.bos_token_id, self.boi_token_id}
        self._pad = config.pad_token_id

    def layout(self, height: int | None, width: int | None) -> ImageLayout:
        """The one grid there is.

        Raises:
            ValueError: If a size is asked for.
        """
        return square_layout("Janus", self.grid_width, height, width)

    def prompt(self, processor: Any, text: str, layout: ImageLayout) -> list[int]:
        """Token ids of a prompt by its chat template if it has one; begin-of-image last."""
        if hasattr(processor, "image_processor"):
            if getattr(processor, "chat_template", None):
                content = [{"type": "text", "text": text}]
                text = processor.apply_chat_template(
                    [{"role": "user", "content": content}], add_generation_prompt=True
                )
            ids = processor(text=[text], generation_mode="image")["input_ids"][0]
        else:
            ids = processor(text)["input_ids"]
        ids = [int(token) for token in ids]
        return ids if ids[-1] == self.boi_token_id else [*ids, self.boi_token_id]

    def negative(self, processor: Any, text: str, layout: ImageLayout) -> list[int]:
        """Refused: Janus is steered away from padding."""
        raise ValueError(
            "negative_prompt is not supported by Janus, whose guidance steers away from padding"
        )

    def unconditional(self, prompt: Sequence[int]) -> list[int]:
        """Everything but the begin tokens becomes padding, as transformers does it."""
        if self._pad is None:
            raise ValueError("guidance needs generation_config.pad_token_id, got None")
        return [token if token in self._kept else self._pad for token in prompt]

    def embed_text(self, ids: Tensor) -> Tensor:
        """Prompt tokens to embeddings."""
        return self._model.get_input_embeddings()(ids)

    def embed_image(self, codes: Tensor) -> Tensor:
        """Image codes to embeddings."""
        return self._model.prepare_embeddings_for_image_generation(codes)

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states to logits over the codebook."""
        return self._model.model.generation_head(hidden)

    def decode(self, codes: Tensor, layout: ImageLayout) -> Tensor:
        """Codes to pixels in [0, 1]."""
        pixels = self._model.decode_image_tokens(codes)
        return (pixels.float() * 0.5 + 0.5).clamp(0, 1)


#: Model type -> (module, class), imported on demand. Other models are refused by name.
FAMILIES = {
    "chameleon": ("mmspec.adapters.image_chameleon", "ChameleonFamily"),
    "emu3": ("mmspec.adapters.image_emu3", "Emu3Family"),
    "glm_image": ("mmspec.adapters.image_glm", "GlmImageFamily"),
    "janus": ("mmspec.adapters.token_image", "JanusFamily"),
}


def image_family(model: Any) -> ImageFamily:
    """The family of a model.

    Raises:
        ValueError: If the model is of no known family; lists the known ones.
    """
    kind = model.config.model_type
    if kind not in FAMILIES:
        raise ValueError(
            f"{type(model).__name__} ({kind}) is not a known image model; "
            f"known: {', '.join(sorted(FAMILIES))}"
        )
    module, name = FAMILIES[kind]
    return getattr(importlib.import_module(module), name)(model)


class TokenImageTarget:
    """An image model over token rows: the prompt is text, everything after it image tokens.

    Attributes:
        rows: The committed tokens.
        forward: The backbone on its slot cache; with guidance it has two rows per image.
        vocab_size: Ids that a row's new tokens can have.
    """

    def __init__(
        self,
        family: ImageFamily,
        rows: TokenRows,
        *,
        guidance_scale: float = 1.0,
        negatives: Sequence[Sequence[int]] | None = None,
        place: Callable[[Tensor, Tensor], Tensor] | None = None,
        compile: bool = False,
    ) -> None:
        """Wraps a model.

        Args:
            family: The model.
            rows: The rows; the last prompt token begins the image.
            guidance_scale: ``s`` in ``uncond + s * (cond - uncond)``; at 1 the unconditional rows
                are left out.
            negatives: The unconditional prompt to each prompt of the rows, the token that begins
                the image last; None leaves it to the family.
            place: As in `ImageLayout`.
            compile: Compile the step's forward.

        Raises:
            ValueError: If the scale is negative, the family has no guidance, a row does not fit
                the context, or a negative prompt ends otherwise than its row's own.
        """
        no_guidance = getattr(family, "no_guidance", None)
        if no_guidance is not None and guidance_scale != 1:
            raise ValueError(f"{no_guidance}, got {guidance_scale}")
        if guidance_scale == 1.0:
            negatives = None
        elif negatives is None:
            negatives = [[*family.unconditional(ids), begin] for *ids, begin in rows.prompts]
        for negative, tokens in zip(negatives or (), rows.prompts, strict=False):
            if negative[-1:] != tokens[-1:]:
                raise ValueError("a negative prompt must end with the token that begins the image")
        self.rows = rows
        self.vocab_size = family.codebook_size
        self._family = family
        self._guidance = Guidance(rows, guidance_scale, negatives)
        self._guidance.check_fits(family.backbone)
        self.forward = SlotForward(
            family.backbone,
            num_rows=self._guidance.num_rows,
            capacity=self._guidance.capacity,
            compile=compile,
            place=None if place is None else self._placed,
        )
        self._place = place
        self._first_logits: Tensor | None = None

    @property
    def is_done(self) -> bool:
        """True once every image is complete."""
        return self.rows.is_done

    def prefill(self) -> None:
        """Caches every prompt and keeps the logits behind it, which answer a first plain step."""
        hidden = self._guidance.prefill(self.forward, self._embedded)
        self._first_logits = self._guided(self._family.head(hidden))

    def read(self, requests: Sequence[int]) -> tuple[SlotCache, Tensor]:
        """Reads prompts that wait for a row into a cache of their own.

        Args:
            requests: Numbers of the prompts, R of them.

        Returns:
            A cache with a row for each prompt, and with guidance R more behind them; and the
            logits behind each prompt, ``[R, 1, V]``.
        """
        prompts = self._guidance.prompts(requests)
        lengths = [len(prompt) for prompt in prompts]
        lengths_G = torch.tensor(lengths, device=self.rows.lengths_B.device)
        place = self._place
        ahead = SlotForward(
            self._family.backbone,
            num_rows=len(prompts),
            capacity=max(lengths),
            place=None if place is None else lambda index: place(index, lengths_G),
        )
        hidden = self._guidance.prefill(ahead, self._embedded, requests)
        return ahead.cache, self._guided(self._family.head(hidden))

    def admit(self, row: int, cache: SlotCache, place: int) -> None:
        """Lets a row begin anew with a prompt that was read.

        Args:
            row: The row.
            cache: The one that `read` returned.
            place: Which of its prompts the row continues now.
        """
        self._guidance.follow()
        num_halves = self._guidance.num_rows // self.rows.num_rows
        num_read = cache.cursor.num_rows // num_halves
        self.forward.cache.copy_rows(
            cache,
            [place + half * num_read for half in range(num_halves)],
            [row + half * self.rows.num_rows for half in range(num_halves)],
        )

    def score(self, proposal: Proposal) -> Scores:
        """One forward over the drafts of the images that go on; none for a plain first step."""
        positions_BN = self.rows.positions(proposal.depth_BN)
        first, self._first_logits = self._first_logits, None
        if first is not None and proposal.width == 1:
            return Scores(logits_BNV=first, positions_BN=positions_BN, forward_time_s=0.0)
        started = time.perf_counter()
        embeds = self._guidance.twice(self._embed(proposal))
        output = self.forward.run(
            {"inputs_embeds": embeds}, **self._guidance.run_arguments(proposal, positions_BN)
        )
        logits = self.forward.spread(self._family.head(output.last_hidden_state))
        elapsed = time.perf_counter() - started
        logits = self._guided(logits)
        return Scores(logits_BNV=logits, positions_BN=positions_BN, forward_time_s=elapsed)

    def commit(self, proposal: Proposal, verdict: Verdict) -> Outcome:
        """Appends the survivors and moves a tree path's keys into place."""
        return self._guidance.commit(self.forward.cache, proposal, verdict)

    def _embedded(self, ids_GN: Tensor) -> dict[str, Tensor]:
        return {"inputs_embeds": self._family.embed_text(ids_GN)}

    def _placed(self, positions_GN: Tensor) -> Tensor:
        prompt_lengths_G = self._guidance.shifted(self.rows.prompt_lengths_B)
        return self._place(positions_GN, prompt_lengths_G)  # type: ignore[misc]

    def _guided(self, logits: Tensor) -> Tensor:
        """One law per image, ``[B, N, V]``, from the logits of both halves."""
        return self._guidance.mixed(logits.to(self.rows.lengths_B.device))

    def _embed(self, proposal: Proposal) -> Tensor:
        """Roots of fresh rows are text, everything else is image; drafts are always tokens."""
        tokens_BN = proposal.tokens_BN
        codes = tokens_BN.clamp(max=self.vocab_size - 1)
        embeds = self._family.embed_image(codes)
        if proposal.noisy_BNH is not None:
            embeds = torch.where(proposal.valid_BN[..., None], embeds, proposal.noisy_BNH)
        lengths = zip(map(len, self.rows.host_tokens), self.rows.prompt_lengths, strict=True)
        fresh = [row for row, (length, prompt) in enumerate(lengths) if length == prompt]
        if fresh:
            fresh_R = torch.tensor(fresh, device=embeds.device)
            embeds[fresh_R, 0] = self._family.embed_text(tokens_BN[fresh_R, 0])
        return embeds
