"""A smaller language model that has another tokenizer.

Two methods (Timor et al. 2025, arXiv 2502.05202):

* ``string``: the drafter writes on in its own tokens, the text is encoded with the target's
  tokenizer, and the target checks it by exact match. Any pair of tokenizers will do.
* ``shared``: the drafter is confined to the tokens that both vocabularies spell alike, so each
  draft is a target token with a known law. Works with rules that need the law.

The context is re-encoded in every step and compared with what the drafter has cached, so that a
boundary which the tokenizers cut differently costs a few tokens of re-reading and nothing else.
Both methods read the host (they handle text), unlike drafters that share the target's tokens.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from mmspec.drafters.model import draw
from mmspec.drafters.plain import root_only
from mmspec.forward import SlotForward, as_law_dtype
from mmspec.records import Outcome, Plan, Proposal, Scores, Verdict
from mmspec.rows import TokenRows
from mmspec.sampling import Law
from mmspec.tree import bucket, pack_chain, pack_trees

METHODS = ("string", "shared")
# Target tokens re-encoded together with a draft, so that the draft is cut as in running text.
_TAIL = 8


class CrossTokenizerDrafter:
    """Drafts text, not tokens.

    Attributes:
        forward: The smaller model on its slot cache.
        shared_share: Share of the target's vocabulary that the drafter can spell (``shared``).
    """

    name = "cross_tokenizer"

    def __init__(
        self,
        model: Any,
        rows: TokenRows,
        vocab_size: int,
        law: Law,
        *,
        tokenizer: Any,
        target_tokenizer: Any,
        method: str = "string",
        shared_noise: bool = True,
        placeholders: Collection[int] = (),
    ) -> None:
        """Wraps a model and both tokenizers.

        Args:
            model: The smaller model.
            rows: The rows, in the target's tokens.
            vocab_size: The target's vocabulary.
            law: The target's law (used by ``shared``).
            tokenizer: The smaller model's tokenizer.
            target_tokenizer: The target's tokenizer.
            method: "string" or "shared".
            shared_noise: As in `mmspec.drafters.model.ModelDrafter`.
            placeholders: Tokens that are no text; they are left out of what the drafter reads.

        Raises:
            ValueError: If the method is unknown or the vocabularies share nothing.
        """
        if method not in METHODS:
            raise ValueError(f"method must be one of {METHODS}, got {method!r}")
        self.forward = SlotForward(model, num_rows=rows.num_rows, capacity=rows.capacity)
        self._rows = rows
        self._vocab_size = vocab_size
        self._law = law
        self._own, self._target = tokenizer, target_tokenizer
        self._method = method
        self._shared_noise = shared_noise
        self._placeholders = frozenset(placeholders)
        self._cached: list[list[int]] = [[] for _ in range(rows.num_rows)]
        own_vocab = model.get_output_embeddings().weight.shape[0]
        pairs = shared_vocabulary(target_tokenizer, tokenizer)
        pairs = [(t, o) for t, o in pairs if t < vocab_size and o < own_vocab]
        if method == "shared" and not pairs:
            raise ValueError("the two vocabularies share no token; use method='string'")
        self.shared_share = len(pairs) / vocab_size
        index = torch.tensor(pairs, device=rows.tokens_BT.device).view(-1, 2)
        self._target_ids, self._own_ids = index[:, 0], index[:, 1]
        self._own_of_target = torch.zeros(vocab_size, dtype=torch.long, device=index.device)
        self._own_of_target[self._target_ids] = self._own_ids

    def prefill(self) -> None:
        """Reads nothing: the first draft reads the context."""

    def propose(self, plan: Plan) -> Proposal:
        """A chain per row."""
        num_drafts = plan.width - 1
        if num_drafts < 1:
            return root_only(self._rows)
        logits, contexts = self._read_context(num_drafts)
        if self._method == "shared":
            return self._draft_shared(logits, contexts, num_drafts)
        return self._draft_string(logits, contexts, num_drafts)

    def commit(
        self, proposal: Proposal, scores: Scores, verdict: Verdict, outcome: Outcome
    ) -> None:
        """Learns nothing: the next draft compares the text."""

    def _read_context(self, num_drafts: int) -> tuple[Tensor, list[list[int]]]:
        """Caches the context in the drafter's tokens; returns the logits behind it, ``[B, 1, V]``.

        What the re-encoded context shares with the cached tokens is kept, but at least the last
        token is fed again, because its logits are wanted.
        """
        contexts = [self._encode_own(tokens) for tokens in self._rows.host_tokens]
        kept = [
            min(_common_prefix(old, new), len(new) - 1)
            for old, new in zip(self._cached, contexts, strict=True)
        ]
        self.forward.cache.reserve(max(map(len, contexts)) + num_drafts + 1)
        chunks = [new[n:] for new, n in zip(contexts, kept, strict=True)]
        width = max(map(len, chunks))
        device = self._rows.tokens_BT.device
        ids = torch.tensor([chunk + [0] * (width - len(chunk)) for chunk in chunks], device=device)
        counts = [len(chunk) for chunk in chunks]
        logits = as_law_dtype(self.forward.extend({"input_ids": ids}, kept, counts))
        self._cached = contexts
        return logits, contexts

    def _feed(self, token_B1: Tensor, num_cached: list[int]) -> Tensor:
        counts = [1] * len(num_cached)
        return as_law_dtype(self.forward.extend({"input_ids": token_B1}, num_cached, counts))

    def _draft_string(self, logits: Tensor, contexts: list[list[int]], num_drafts: int) -> Proposal:
        drafted = [logits.argmax(-1)]
        for depth in range(num_drafts - 1):
            logits = self._feed(drafted[-1], [len(context) + depth for context in contexts])
            drafted.append(logits.argmax(-1))
        own_drafts = torch.cat(drafted, dim=1).tolist()
        drafts = [
            [] if done else self._to_target(row, context, own)[:num_drafts]
            for row, (context, own, done) in enumerate(
                zip(contexts, own_drafts, self._rows.host_done, strict=True)
            )
        ]
        # The drafts' keys stay cached: where they were right, the next context finds them.
        self._cached = [c + own[:-1] for c, own in zip(contexts, own_drafts, strict=True)]
        width = bucket(max(map(len, drafts)) + 1)
        parents = [list(range(-1, len(draft) - 1)) for draft in drafts]
        return pack_trees(drafts, parents, self._rows.roots_B(), self._vocab_size, width)

    def _draft_shared(self, logits: Tensor, contexts: list[list[int]], num_drafts: int) -> Proposal:
        rows = self._rows
        tokens, laws = [rows.roots_B()[:, None]], []
        root = rows.positions(torch.zeros_like(tokens[0]))
        for depth in range(num_drafts):
            over_target = logits.new_full((rows.num_rows, 1, self._vocab_size), float("-inf"))
            over_target[..., self._target_ids] = logits[..., self._own_ids]
            law = self._law(over_target, self._context(tokens[-1], root + depth))
            tokens.append(draw(rows, self._law, law, depth, shared_noise=self._shared_noise))
            laws.append(law)
            if depth + 1 < num_drafts:
                own = self._own_of_target[tokens[-1]]
                logits = self._feed(own, [len(context) + depth for context in contexts])
        draft_probs = None
        if not self._shared_noise and not self._law.is_greedy:
            draft_probs = nn.functional.pad(torch.cat(laws, 1).softmax(-1), (0, 0, 0, 1))
        counts = [0 if done else num_drafts for done in rows.host_done]
        return pack_chain(torch.cat(tokens, dim=1), counts, self._vocab_size, draft_probs)

    def _context(self, token: Tensor, position: Tensor) -> Any:
        """The law's context for a drafted token; penalties see the committed tokens only."""
        return self._rows.context(
            pack_chain(token, [0] * self._rows.num_rows, self._vocab_size), position
        )

    def _encode_own(self, target_tokens: list[int]) -> list[int]:
        text = [token for token in target_tokens if token not in self._placeholders]
        ids = self._own.encode(_text(self._target, text), add_special_tokens=False)
        bos = self._own.bos_token_id
        if bos is not None and (not ids or ids[0] != bos):
            ids = [bos, *ids]
        return ids or [0]

    def _to_target(self, row: int, context: list[int], own_draft: list[int]) -> list[int]:
        """The drafted text in the target's tokens, cut as if it stood behind the row's tail."""
        before = _text(self._own, context[-_TAIL:])
        after = _text(self._own, context[-_TAIL:] + own_draft)
        if not after.startswith(before):
            return []
        drafted = after[len(before) :]
        tail = self._rows.host_tokens[row][-_TAIL:]
        together = self._target.encode(
            _text(self._target, tail) + drafted, add_special_tokens=False
        )
        if together[: len(tail)] == tail:
            return together[len(tail) :]
        return self._target.encode(drafted, add_special_tokens=False)


def shared_vocabulary(target_tokenizer: Any, tokenizer: Any) -> list[tuple[int, int]]:
    """Pairs (target id, own id) of tokens that both vocabularies spell alike.

    Byte-level and sentencepiece vocabularies mark a leading space by different signs.
    """

    def spelled(vocabulary: dict[str, int]) -> dict[str, int]:
        return {token.replace("Ġ", "▁"): index for token, index in vocabulary.items()}

    own = spelled(tokenizer.get_vocab())
    theirs = spelled(target_tokenizer.get_vocab())
    return sorted((index, own[token]) for token, index in theirs.items() if token in own)


def _common_prefix(left: list[int], right: list[int]) -> int:
    for index, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return index
    return min(len(left), len(right))


def _text(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
