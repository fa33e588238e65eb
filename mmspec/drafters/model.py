"""A smaller causal language model as drafter: batched, ragged, with its own slot cache."""

import copy
import functools
import types
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from mmspec.cache import SlotCache
from mmspec.drafters.plain import root_only
from mmspec.forward import PromptExtras, SlotForward, as_law_dtype
from mmspec.noise import Salt, gumbel
from mmspec.records import Outcome, Plan, Proposal, Scores, Verdict
from mmspec.rows import TokenRows
from mmspec.sampling import Law, LawContext, sample
from mmspec.tree import pack_chain


def draw(
    rows: TokenRows, law: Law, law_logits_B1V: Tensor, depth: int, *, shared_noise: bool
) -> Tensor:
    """A guess from a draft law for the position ``depth`` behind each row's end, ``[B, 1]``.

    With shared noise it is drawn as the target draws its own choice, so that equal laws agree.
    """
    if law.is_greedy:
        return sample(law_logits_B1V, None)
    vocab_size = law_logits_B1V.shape[-1]
    if shared_noise:
        noise = rows.choice_noise(1, vocab_size, offset=depth)
    else:
        position = rows.lengths_B[:, None] + depth
        noise = gumbel(rows.keys_B, position, vocab_size, Salt.DRAFT, rows.step)
    return sample(law_logits_B1V, noise)


class ModelDrafter:
    """Drafts a chain with a smaller model that shares the target's tokens.

    Of prompts with images it reads the text alone, unless it is told what it sees in their place.

    Attributes:
        forward: The model on its slot cache.
    """

    name = "model"

    def __init__(
        self,
        model: Any,
        rows: TokenRows,
        vocab_size: int,
        law: Law,
        *,
        shared_noise: bool = True,
        cache: SlotCache | None = None,
        placeholders: Collection[int] = (),
        extras: PromptExtras | None = None,
    ) -> None:
        """Wraps a model.

        Args:
            model: The smaller model. Its vocabulary may be padded differently from the target's.
            rows: The rows.
            vocab_size: The target's vocabulary.
            law: The target's law, applied to the drafter's logits as well.
            shared_noise: Draw with the target's own noise (Gumbel coupling, for the exact rule);
                otherwise sample freshly and report the law (for speculative sampling).
            cache: Share this cache instead of making one.
            placeholders: Tokens of a prompt that are left out of the drafter's own; the token that
                ends it is not.
            extras: What the prompts have for this model besides token ids; not together with
                ``placeholders``.
        """
        self._extras = extras
        self.forward = SlotForward(
            model,
            num_rows=rows.num_rows,
            capacity=rows.capacity,
            cache=cache,
            place=None if extras is None else extras.place,
        )
        self._rows = rows
        self._vocab_size = vocab_size
        self._own_vocab = model.get_output_embeddings().weight.shape[0]
        self._law = law
        self._shared_noise = shared_noise
        self._num_left_out, self._index_BT = [0] * rows.num_rows, None
        if placeholders:
            self._num_left_out, self._index_BT = _without(rows, frozenset(placeholders))
        self._num_cached = [0] * rows.num_rows
        self._root_slot: list[int] = []

    def prefill(self) -> None:
        """Reads prompts that have more than tokens; the first draft feeds any other."""
        if self._extras is None:
            return
        counts = self._rows.prompt_lengths
        ids = self._rows.tokens_BT[:, : max(counts)]
        inputs = {"input_ids": ids, **self._extras.inputs}
        self.forward.extend(inputs, [0] * len(counts), counts)
        self._num_cached = [count - 1 for count in counts]

    def propose(self, plan: Plan) -> Proposal:
        """A chain of ``plan.width - 1`` drafts per active row."""
        rows = self._rows
        num_drafts = plan.width - 1
        if num_drafts < 1:
            return root_only(rows)
        scratch = rows.tokens_BT.clone()
        self._root_slot = self._last_slots()
        laws = []
        for depth in range(num_drafts):
            law_logits = self._next_law(scratch, depth)
            token = draw(rows, self._law, law_logits, depth, shared_noise=self._shared_noise)
            scratch.scatter_(1, rows.lengths_B[:, None] + depth, token)
            laws.append(law_logits)
        start = rows.lengths_B[:, None] - 1
        ahead = torch.arange(plan.width, device=start.device)
        draft_probs = None
        if not self._shared_noise and not self._law.is_greedy:
            draft_probs = torch.cat(laws, dim=1).softmax(-1)
            draft_probs = nn.functional.pad(draft_probs, (0, 0, 0, 1))
        counts = [0 if done else num_drafts for done in rows.host_done]
        return pack_chain(scratch.gather(1, start + ahead), counts, self._vocab_size, draft_probs)

    def commit(
        self, proposal: Proposal, scores: Scores, verdict: Verdict, outcome: Outcome
    ) -> None:
        """Keeps the accepted drafts' keys; the rest is overwritten later."""
        if proposal.width == 1:
            return
        last_slots = self._last_slots()
        for row, accepted in enumerate(outcome.num_accepted):
            # The last draft was never fed, so at most width - 2 accepted drafts are cached.
            kept = self._root_slot[row] + 1 + min(accepted, proposal.width - 2)
            self._num_cached[row] = min(kept, last_slots[row])

    def _last_slots(self) -> list[int]:
        """Where the last token of each row stands among those that this model reads."""
        pairs = zip(self._rows.host_tokens, self._num_left_out, strict=True)
        return [len(tokens) - 1 - left_out for tokens, left_out in pairs]

    def _next_law(self, scratch_BT: Tensor, depth: int) -> Tensor:
        """Feeds what is missing up to ``depth`` behind the root; returns the law of the next.

        At depth 0 that is the root and whatever was committed since the last draft; afterwards the
        drafted token. It sits at the end of a scratch history, so every law sees it as a root.
        """
        rows = self._rows
        wanted = [slot + 1 + depth for slot in self._root_slot]
        counts = [n - cached for n, cached in zip(wanted, self._num_cached, strict=True)]
        cached_B = torch.tensor(self._num_cached, device=scratch_BT.device)
        num_fed = max(counts[row] for row in rows.active)
        ahead = torch.arange(num_fed, device=scratch_BT.device)
        index = (cached_B[:, None] + ahead).clamp(max=rows.capacity - 1)
        if self._index_BT is not None:
            index = self._index_BT.gather(1, index)
        ids = self._embeddable(scratch_BT.gather(1, index))
        logits = as_law_dtype(
            self.forward.extend({"input_ids": ids}, self._num_cached, counts, rows.active)
        )
        positions = rows.lengths_B[:, None] - 1 + depth
        self._num_cached = wanted
        zero = torch.zeros_like(positions)
        context = LawContext(
            tokens_BN=scratch_BT.gather(1, positions),
            ancestors_BNN=torch.ones_like(zero, dtype=torch.bool)[..., None],
            depth_BN=zero,
            positions_BN=positions,
            history_BT=scratch_BT,
            lengths_B=rows.lengths_B + depth,
            prompt_lengths_B=rows.prompt_lengths_B,
        )
        return self._law(self._aligned(logits), context)

    def _embeddable(self, tokens: Tensor) -> Tensor:
        """Target tokens that this model does not have become token 0; the guess is then poor."""
        return torch.where(tokens < self._own_vocab, tokens, 0)

    def _aligned(self, logits: Tensor) -> Tensor:
        """Logits over the target's vocabulary: padding cut off, missing tokens impossible."""
        logits = logits[..., : self._vocab_size]
        missing = self._vocab_size - logits.shape[-1]
        return nn.functional.pad(logits, (0, missing), value=float("-inf"))


class EarlyExitDrafter(ModelDrafter):
    """The target's own first layers and its head; needs no weights and no second prefill.

    It shares the target's cache: the keys of committed tokens in the first layers are the very
    ones it needs, and the slots of its drafts are overwritten when the target verifies them.
    """

    name = "early_exit"

    def __init__(
        self,
        target: SlotForward,
        rows: TokenRows,
        vocab_size: int,
        law: Law,
        *,
        num_layers: int,
        shared_noise: bool = True,
    ) -> None:
        """Cuts the target after ``num_layers`` layers.

        Raises:
            ValueError: If ``num_layers`` is not between 1 and the target's depth less one.
        """
        shallow = first_layers(target.model, num_layers)
        super().__init__(
            shallow,
            rows,
            vocab_size,
            law,
            shared_noise=shared_noise,
            cache=target.cache,
            extras=PromptExtras(place=target.place),
        )
        self._target_cache = target.cache
        self._num_layers = num_layers

    def prefill(self) -> None:
        """Takes over the first layers of the target's cache, which is prefilled by now."""
        self.forward.cache = self._target_cache.first_layers(self._num_layers)
        self._num_cached = [len(tokens) - 1 for tokens in self._rows.host_tokens]

    def commit(
        self, proposal: Proposal, scores: Scores, verdict: Verdict, outcome: Outcome
    ) -> None:
        """The target's verification has cached everything."""
        self._num_cached = [len(tokens) - 1 for tokens in self._rows.host_tokens]


def _without(rows: TokenRows, left_out: frozenset[int]) -> tuple[list[int], Tensor | None]:
    """How many tokens of each prompt are left out, and which token of a row stands where then.

    Returns:
        The counts, and ``[B, T]`` indices; None where nothing is left out.
    """
    counts, table = [], []
    for prompt in rows.host_tokens:
        kept = [index for index, token in enumerate(prompt[:-1]) if token not in left_out]
        counts.append(len(prompt) - 1 - len(kept))
        behind = range(len(prompt) - 1, rows.capacity)
        table.append([*kept, *behind, *[rows.capacity - 1] * counts[-1]])
    if not any(counts):
        return counts, None
    return counts, torch.tensor(table, device=rows.tokens_BT.device)


def first_layers(model: Any, num_layers: int) -> Any:
    """A model that shares all weights of another and stops after its first layers.

    Raises:
        ValueError: If ``num_layers`` is out of range, or the layers cannot be found.
    """
    text = model.config.get_text_config(decoder=True)
    depth = text.num_hidden_layers
    if not 1 <= num_layers < depth:
        raise ValueError(f"early exit must be after layer 1 to {depth - 1}, got {num_layers}")
    # The towers of other modalities have stacks as well.
    decoder = model if text is model.config else model.get_decoder()
    layers = [
        module
        for module in decoder.modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    stacks = [name for name, module in model.named_modules() if any(module is s for s in layers)]
    if len(stacks) != 1:
        raise ValueError(f"{type(model).__name__} has {len(stacks)} stacks of {depth} layers")
    *owners, last = stacks[0].split(".")
    shallow = node = _shell(model, num_layers)
    for owner in owners:
        child = _shell(getattr(node, owner), num_layers)
        node._modules[owner] = child
        node = child
    node._modules[last] = getattr(node, last)[:num_layers]
    return shallow


def _cut(config: Any, num_layers: int) -> Any:
    """A copy of a configuration with fewer layers of text."""
    cut, text = copy.copy(config), config.get_text_config(decoder=True)
    if text is config:
        cut.num_hidden_layers = num_layers
        return cut
    for name in config.sub_configs:
        if getattr(config, name, None) is text:
            setattr(cut, name, _cut(text, num_layers))
    return cut


def _shell(module: Any, num_layers: int) -> Any:
    """A copy of one module object that shares its parameters and children."""
    shell = copy.copy(module)
    shell.__dict__ = dict(module.__dict__)
    shell._modules = dict(module._modules)
    shell.__dict__.pop("_mmspec_compiled_forward", None)
    if hasattr(module, "config"):
        shell.config = _cut(module.config, num_layers)
    hooked = shell.__dict__.get("forward")
    if isinstance(hooked, functools.partial) and "_old_forward" in shell.__dict__:
        # accelerate's hooks are bound to the module they were put on; bind them to the copy.
        shell.forward = functools.update_wrapper(functools.partial(hooked.func, shell), hooked)
        shell._old_forward = types.MethodType(module._old_forward.__func__, shell)
    return shell
