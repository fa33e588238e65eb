"""The target as its own drafter, over a small part of its own cache.

The keys of all text and of the visual tokens that the prompt's text attends to most are copied
once, behind the target's prefill; drafts attend to them alone. What the target verifies is copied
after it, so nothing is computed twice but the drafts (StD, arXiv:2505.19155: the top of the cache
drafts, all of it verifies).
"""

from collections.abc import Collection

import torch

from mmspec.attention_scores import attention_scores
from mmspec.drafters.model import ModelDrafter
from mmspec.forward import PromptExtras, SlotForward
from mmspec.records import Outcome, Proposal, Scores, Verdict
from mmspec.rows import TokenRows
from mmspec.sampling import Law
from mmspec.visual_tokens import VisualTokens, place_in_whole, places_of, text_behind, without


class OwnCacheDrafter(ModelDrafter):
    """Drafts with the target's own weights; needs no second model and no second prefill."""

    name = "self"

    def __init__(
        self,
        target: SlotForward,
        rows: TokenRows,
        vocab_size: int,
        law: Law,
        *,
        sight: VisualTokens,
        placeholders: Collection[int],
        shared_noise: bool = True,
    ) -> None:
        """Wraps the target.

        Args:
            target: The target on its cache.
            rows: The rows.
            vocab_size: The target's vocabulary.
            law: The target's law.
            sight: The share of visual tokens to keep.
            placeholders: Token ids of visual tokens.
            shared_noise: As in `ModelDrafter`.

        Raises:
            ValueError: If the target reads no images.
        """
        if not placeholders:
            raise ValueError(
                f"visual_tokens={str(sight)!r} needs a target that reads images; "
                f"{type(target.model).__name__} has no visual tokens to leave out"
            )
        super().__init__(
            target.model, rows, vocab_size, law, shared_noise=shared_noise, view=self._chosen
        )
        self._target = target
        self._sight = sight
        self._places = places_of(rows, placeholders)
        self._num_taken = [0] * rows.num_rows

    def prefill(self) -> None:
        """Copies what is chosen of the target's cache."""
        self._look()
        self._take_over()

    def commit(
        self, proposal: Proposal, scores: Scores, verdict: Verdict, outcome: Outcome
    ) -> None:
        """Takes over what the target has verified."""
        self._take_over()

    def _chosen(self) -> PromptExtras:
        """The rows without the visual tokens that the text hardly looks at."""
        if not any(self._places):
            return PromptExtras(place=self._target.place)
        starts = text_behind(self._rows, self._places)
        scores_BP = attention_scores(self._target, self._rows, starts).cpu()
        left_out = []
        for scores_P, places in zip(scores_BP, self._places, strict=True):
            order = scores_P[places].argsort(descending=True, stable=True)
            left_out.append({places[i] for i in order[self._sight.num_kept(len(places)) :]})
        kept = without(self._rows, left_out)
        return PromptExtras(
            kept=kept,
            place=place_in_whole(self._rows, kept, self._target.place),
            num_target_forwards=1,
        )

    def _take_over(self) -> None:
        """Copies the keys of all committed tokens but the root that are not copied yet."""
        wanted, taken = self._last_slots(), self._num_taken
        counts = [max(end - start, 0) for start, end in zip(taken, wanted, strict=True)]
        if max(counts) > 0:
            device = self._rows.tokens_BT.device
            node = torch.arange(max(counts), device=device)
            slots_BN = torch.tensor(taken, device=device)[:, None] + node
            is_new = node < torch.tensor(counts, device=device)[:, None]
            index_BN = slots_BN
            if self._index_RT is not None:
                last = self._rows.capacity - 1
                index_BN = self._index_RT.gather(1, slots_BN.clamp(max=last))
            nowhere = self.forward.cache.capacity
            to_BN = slots_BN.masked_fill(~is_new, nowhere)
            self.forward.cache.copy_slots(self._target.cache, index_BN, to_BN)
        self._num_taken = self._num_cached = wanted
