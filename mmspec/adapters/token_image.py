"""Autoregressive image models as targets: an image is a row of codebook tokens on a grid.

One forward serves the conditional and the unconditional rows of classifier-free guidance, and both
share every draft. What differs between model families is in `FAMILIES`.
"""

import time
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from mmspec.adapters.causal_lm import check_fits
from mmspec.forward import SlotForward, as_law_dtype
from mmspec.records import Outcome, Proposal, Scores, Verdict
from mmspec.rows import TokenRows


class ImageFamily(Protocol):
    """What a family of image models has to say; all tensors are batch first."""

    backbone: Any
    num_image_tokens: int
    grid_width: int
    codebook_size: int

    def embed_text(self, ids: Tensor) -> Tensor:
        """Prompt tokens to embeddings ``[..., hidden]``."""

    def embed_image(self, codes: Tensor) -> Tensor:
        """Image codes to embeddings ``[..., hidden]``."""

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states to logits over the codebook."""

    def unconditional(self, prompt: Sequence[int]) -> list[int]:
        """The prompt that guidance steers away from, of the same length."""

    def decode(self, codes: Tensor) -> Tensor:
        """Codes ``[B, num_image_tokens]`` to pixels ``[B, height, width, 3]`` in [0, 1]."""


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
        self.boi_token_id = kwargs.get("boi_token_id")
        if self.boi_token_id is None:
            raise ValueError(
                "the model's generation_config.generation_kwargs must hold 'boi_token_id', the "
                "token that begins an image"
            )
        self._kept = {config.bos_token_id, self.boi_token_id}
        self._pad = config.pad_token_id

    def embed_text(self, ids: Tensor) -> Tensor:
        """Prompt tokens to embeddings."""
        return self._model.get_input_embeddings()(ids)

    def embed_image(self, codes: Tensor) -> Tensor:
        """Image codes to embeddings."""
        return self._model.prepare_embeddings_for_image_generation(codes)

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states to logits over the codebook."""
        return self._model.model.generation_head(hidden)

    def unconditional(self, prompt: Sequence[int]) -> list[int]:
        """Everything but the begin tokens becomes padding, as transformers does it."""
        if self._pad is None:
            raise ValueError("guidance needs generation_config.pad_token_id, got None")
        return [token if token in self._kept else self._pad for token in prompt]

    def decode(self, codes: Tensor) -> Tensor:
        """Codes to pixels in [0, 1]."""
        pixels = self._model.decode_image_tokens(codes)
        return (pixels.float() * 0.5 + 0.5).clamp(0, 1)


#: Model type -> family. Other classes are refused by name.
FAMILIES = {"janus": JanusFamily}


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
    return FAMILIES[kind](model)


class TokenImageTarget:
    """An image model over token rows: the prompt is text, everything after it image codes.

    Attributes:
        rows: The committed tokens.
        forward: The backbone on its slot cache; with guidance it has two rows per image.
        vocab_size: Size of the codebook.
    """

    def __init__(
        self,
        family: ImageFamily,
        rows: TokenRows,
        *,
        guidance_scale: float = 1.0,
        compile: bool = False,
    ) -> None:
        """Wraps a model.

        Args:
            family: The model.
            rows: The rows; the last prompt token begins the image.
            guidance_scale: ``s`` in ``uncond + s * (cond - uncond)``; at 1 the unconditional rows
                are left out.
            compile: Compile the step's forward.

        Raises:
            ValueError: If the scale is negative or a row does not fit the context.
        """
        if not guidance_scale >= 0:
            raise ValueError(f"guidance_scale must be >= 0, got {guidance_scale}")
        check_fits(family.backbone, rows)
        self.rows = rows
        self.vocab_size = family.codebook_size
        self._family = family
        self._scale = guidance_scale
        self._is_guided = guidance_scale != 1.0
        self._copies = 2 if self._is_guided else 1
        self.forward = SlotForward(
            family.backbone,
            num_rows=rows.num_rows * self._copies,
            capacity=rows.capacity,
            compile=compile,
        )
        self._first_logits: Tensor | None = None

    @property
    def is_done(self) -> bool:
        """True once every image is complete."""
        return self.rows.is_done

    def prefill(self) -> None:
        """Caches every prompt and keeps the logits behind it, which answer a first plain step."""
        prompts = self.rows.host_tokens
        if self._is_guided:
            prompts = prompts + [
                [*self._family.unconditional(tokens), begin] for *tokens, begin in prompts
            ]
        counts = [len(prompt) for prompt in prompts]
        padded = [prompt + [0] * (max(counts) - len(prompt)) for prompt in prompts]
        ids = torch.tensor(padded, device=self.rows.tokens_BT.device)
        embeds = self._family.embed_text(ids)
        hidden = self.forward.extend({"inputs_embeds": embeds}, [0] * len(counts), counts)
        self._first_logits = self._guided(self._family.head(hidden))

    def score(self, proposal: Proposal) -> Scores:
        """One forward over the drafts of the images that go on; none for a plain first step."""
        rows = self.rows
        positions_BN = rows.positions(proposal.depth_BN)
        first, self._first_logits = self._first_logits, None
        if first is not None and proposal.width == 1:
            return Scores(logits_BNV=first, positions_BN=positions_BN, forward_time_s=0.0)
        embeds = self._embed(proposal.tokens_BN)
        started = time.perf_counter()
        output = self.forward.run(
            {"inputs_embeds": self._copied(embeds)},
            cached_B=self._copied(rows.lengths_B - 1),
            host_cached=[len(tokens) - 1 for tokens in rows.host_tokens] * self._copies,
            depth_BN=self._copied(proposal.depth_BN),
            ancestors_BNN=self._copied(proposal.ancestors_BNN),
            positions_BN=self._copied(positions_BN),
            is_chain=proposal.is_chain,
            rows=self._fed(),
        )
        logits = self.forward.spread(self._family.head(output.last_hidden_state))
        elapsed = time.perf_counter() - started
        logits = self._guided(logits)
        return Scores(logits_BNV=logits, positions_BN=positions_BN, forward_time_s=elapsed)

    def commit(self, proposal: Proposal, verdict: Verdict) -> Outcome:
        """Appends the survivors and moves a tree path's keys into place."""
        cached_B = self._copied(self.rows.lengths_B - 1)
        outcome = self.rows.commit(verdict)
        longest = max(outcome.num_accepted)
        if not proposal.is_chain and longest > 0:
            self.forward.cache.commit_path(
                self._copied(verdict.path_BM[:, : longest + 1]), cached_B
            )
        return outcome

    def _guided(self, logits: Tensor) -> Tensor:
        """One law per image, ``[B, N, V]``, from the logits of all copies."""
        logits = as_law_dtype(logits).to(self.rows.lengths_B.device)
        if not self._is_guided:
            return logits
        conditional, unconditional = logits.chunk(2)
        return unconditional + self._scale * (conditional - unconditional)

    def _embed(self, tokens_BN: Tensor) -> Tensor:
        """Roots of fresh rows are text, everything else is image."""
        codes = tokens_BN.clamp(max=self.vocab_size - 1)
        embeds = self._family.embed_image(codes)
        is_fresh = [
            len(tokens) == prompt
            for tokens, prompt in zip(self.rows.host_tokens, self.rows.prompt_lengths, strict=True)
        ]
        if any(is_fresh):
            root = self._family.embed_text(tokens_BN[:, :1])
            fresh_B = torch.tensor(is_fresh, device=embeds.device)[:, None]
            embeds[:, 0] = torch.where(fresh_B, root[:, 0], embeds[:, 0])
        return embeds

    def _fed(self) -> list[int]:
        """Rows of the forward that go on: each image's own and its guidance copy."""
        rows = self.rows
        return [copy * rows.num_rows + row for copy in range(self._copies) for row in rows.active]

    def _copied(self, tensor: Tensor) -> Tensor:
        """Once per guidance copy, conditional rows first."""
        return torch.cat([tensor] * self._copies) if self._is_guided else tensor
