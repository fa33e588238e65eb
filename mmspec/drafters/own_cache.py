"""The target as its own drafter, over a small part of its own cache.

The keys of all text and of a few visual tokens are copied behind the target's prefill; drafts
attend to them alone. What the target verifies is copied after it, so nothing is computed twice but
the drafts (StD, arXiv:2505.19155: the top of the cache drafts, all of it verifies).

A reader's next words need the visual tokens that it reads next, so the choice moves: each
verification shows where the last verified token looked, and the keys of those places and of what
follows them take the room of the old ones.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmspec.attention_scores import attention_of, attention_scores
from mmspec.drafters.model import ModelDrafter
from mmspec.forward import PromptExtras, SlotForward
from mmspec.queries import Noted, noted_queries
from mmspec.records import Outcome, Proposal, Scores, Verdict
from mmspec.rows import TokenRows
from mmspec.sampling import Law
from mmspec.visual_tokens import (
    VisualTokens,
    around_peak,
    place_in_whole,
    places_of,
    without,
)


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
        self._places = places_of(rows, placeholders)
        self._num_kept = [sight.num_kept(len(places)) for places in self._places]
        self._num_taken = [0] * rows.num_rows
        self._notes: Mapping[int, Noted] = {}
        device = rows.tokens_BT.device
        self._places_BV = _table(self._places, rows.capacity - 1).to(device)
        self._counts_B = torch.tensor([*map(len, self._places)], device=device)
        self._kept_B = torch.tensor(self._num_kept, device=device)

    def prefill(self) -> None:
        """Copies what is chosen of the target's cache."""
        self._look()
        self._take_over()
        if not any(self._places):
            return
        roots = [length - 1 for length in self._rows.prompt_lengths]
        self._show(attention_scores(self._target, self._rows, roots))
        self.num_target_forwards = 1
        # A compiled forward cannot be listened to; the choice for the prompt's end then stays.
        if not self._target.is_compiled:
            self._target.around = self._listening

    def commit(
        self, proposal: Proposal, scores: Scores, verdict: Verdict, outcome: Outcome
    ) -> None:
        """Takes over what the target has verified, and turns to where it looked last."""
        self._take_over()
        if self._notes:
            cache = self._target.cache
            fed_R = torch.tensor(cache.fed, device=verdict.num_accepted_B.device)
            last_R1 = verdict.num_accepted_B[fed_R, None]
            attention_RS = attention_of(
                self._notes, cache, last_R1, torch.ones_like(last_R1, dtype=torch.bool)
            )
            self._show(self._target.spread(attention_RS))
            self._notes = {}

    @contextmanager
    def _listening(self) -> Iterator[None]:
        with noted_queries(self._target.model) as self._notes:
            yield

    def _chosen(self) -> PromptExtras:
        """The rows with room for as many visual tokens as are kept; which ones changes."""
        if not any(self._places):
            return PromptExtras(place=self._target.place)
        pairs = [*zip(self._places, self._num_kept, strict=True)]
        kept = without(self._rows, [places[num_kept:] for places, num_kept in pairs])
        shown = [frozenset(places[:num_kept]) for places, num_kept in pairs]
        room = [
            [slot for slot, index in enumerate(indices) if index in own]
            for indices, own in zip(kept, shown, strict=True)
        ]
        device = self._rows.tokens_BT.device
        self._room_BK = _table(room, self._rows.capacity).to(device)
        return PromptExtras(kept=kept, place=place_in_whole(self._rows, kept, self._target.place))

    def _show(self, attention_BS: Tensor) -> None:
        """Copies the keys of the visual tokens around where the target looks."""
        last = attention_BS.shape[1] - 1
        scores_BV = attention_BS.gather(1, self._places_BV.clamp(max=last))
        most = max(self._num_kept)
        chosen_BK = around_peak(scores_BV, self._counts_B, self._kept_B, most)
        self.forward.cache.copy_slots(
            self._target.cache, self._places_BV.gather(1, chosen_BK), self._room_BK
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


def _table(lists: Sequence[Sequence[int]], padding: int) -> Tensor:
    """Lists of indices as one tensor."""
    rows = [torch.tensor(one, dtype=torch.long) for one in lists]
    return pad_sequence(rows, batch_first=True, padding_value=padding)
