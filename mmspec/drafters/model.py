"""A smaller causal language model as drafter: batched, ragged, with its own slot cache."""

import copy
import functools
import types
from collections.abc import Callable
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
from mmspec.visual_tokens import index_table


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

    A row that it reads is the target's, or some indices of it: of prompts with images it may be
    shown a part. It may read every row in several such views at once; then its rows are those of
    the first view, those of the second, and so on, and a subclass says what they amount to.

    Attributes:
        forward: The model on its slot cache.
        num_prompt_tokens: Tokens of each prompt that it reads, by view and row.
        num_target_forwards: Forwards of the target that it took to choose them.
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
        view: Callable[[], PromptExtras] = PromptExtras,
        num_views: int = 1,
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
            view: Asked before the prompts are read, and after the target has read them: what this
                model reads of them, for the rows of all views. The default is all their tokens.
            num_views: How often each row is read.
        """
        self.forward = SlotForward(
            model, num_rows=rows.num_rows * num_views, capacity=rows.capacity, cache=cache
        )
        self.num_target_forwards = 0
        self._rows = rows
        self._vocab_size = vocab_size
        self._own_vocab = model.get_output_embeddings().weight.shape[0]
        self._law = law
        self._shared_noise = shared_noise
        self._view = view
        self._num_views = num_views
        self.num_prompt_tokens = [*rows.prompt_lengths] * num_views
        self._index_RT: Tensor | None = None
        self._num_cached = [0] * (rows.num_rows * num_views)
        self._root_slot: list[int] = []

    def prefill(self) -> None:
        """Reads prompts that have more than tokens; the first draft feeds any other."""
        view = self._look()
        if not view.inputs:
            return
        counts = self.num_prompt_tokens
        ids = self._repeated(self._rows.tokens_BT)
        if self._index_RT is not None:
            ids = ids.gather(1, self._index_RT)
        inputs = {"input_ids": ids[:, : max(counts)], **view.inputs}
        self.forward.extend(inputs, [0] * len(counts), counts)
        self._num_cached = [count - 1 for count in counts]

    def _look(self) -> PromptExtras:
        """Asks what to read, and makes room for no more."""
        view = self._view()
        self.num_target_forwards = view.num_target_forwards
        self.forward.place = view.place
        if view.kept is not None:
            self.num_prompt_tokens = [*map(len, view.kept)]
            self._index_RT = index_table(self._rows, view.kept)
            shorter = min(self._num_left_out())
            self.forward.cache = SlotCache(len(view.kept), self._rows.capacity - shorter)
        return view

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
        for row, accepted in enumerate(outcome.num_accepted * self._num_views):
            # The last draft was never fed, so at most width - 2 accepted drafts are cached.
            kept = self._root_slot[row] + 1 + min(accepted, proposal.width - 2)
            self._num_cached[row] = min(kept, last_slots[row])

    def _num_left_out(self) -> list[int]:
        """Tokens of each prompt that this model does not read."""
        whole = self._rows.prompt_lengths * self._num_views
        return [n - read for n, read in zip(whole, self.num_prompt_tokens, strict=True)]

    def _last_slots(self) -> list[int]:
        """Where the last token of each row stands among those that this model reads."""
        pairs = zip(self._rows.host_tokens * self._num_views, self._num_left_out(), strict=True)
        return [len(tokens) - 1 - left_out for tokens, left_out in pairs]

    def _repeated(self, values_BT: Tensor) -> Tensor:
        """A value of each row for each time that it is read."""
        return values_BT if self._num_views == 1 else values_BT.repeat(self._num_views, 1)

    def _next_law(self, scratch_BT: Tensor, depth: int) -> Tensor:
        """Feeds what is missing up to ``depth`` behind the root; returns the law of the next.

        At depth 0 that is the root and whatever was committed since the last draft; afterwards the
        drafted token. It sits at the end of a scratch history, so every law sees it as a root.
        """
        rows = self._rows
        wanted = [slot + 1 + depth for slot in self._root_slot]
        counts = [n - cached for n, cached in zip(wanted, self._num_cached, strict=True)]
        cached_B = torch.tensor(self._num_cached, device=scratch_BT.device)
        active = [
            view * rows.num_rows + row for view in range(self._num_views) for row in rows.active
        ]
        num_fed = max(counts[row] for row in active)
        ahead = torch.arange(num_fed, device=scratch_BT.device)
        index = (cached_B[:, None] + ahead).clamp(max=rows.capacity - 1)
        if self._index_RT is not None:
            index = self._index_RT.gather(1, index)
        ids = self._embeddable(self._repeated(scratch_BT).gather(1, index))
        logits = as_law_dtype(
            self.forward.extend({"input_ids": ids}, self._num_cached, counts, active)
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
        views = self._aligned(logits).chunk(self._num_views)
        return self._combined([self._law(view, context) for view in views])

    def _combined(self, laws: list[Tensor]) -> Tensor:
        """The law to draft from, from that of each view, ``[B, 1, V]``."""
        (law,) = laws
        return law

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
        )
        self.forward.place = target.place
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
