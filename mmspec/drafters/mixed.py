"""One small model that reads every prompt in several ways, mixed by how well each foretold.

A drafter that sees the images is better on some answers, one that reads the text alone on others,
and which of them changes along an answer (TABED, arXiv:2601.20357). Both are the same weights: the
views of a row are rows of one batch, so a draft costs one forward however many there are.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmspec.checks import is_number, require
from mmspec.drafters.model import ModelDrafter
from mmspec.forward import PromptExtras
from mmspec.records import Outcome, Plan, Proposal, Scores, Verdict
from mmspec.rows import TokenRows
from mmspec.sampling import Law

#: A token that a view held to be impossible counts as this likely: no view is lost for ever.
FLOOR = 1e-3


class MixedDrafter(ModelDrafter):
    """Drafts from a weighted mean of the laws of several views of the prompts.

    The weight of a view in a row is ``softmax(rate * evidence)``, the evidence being the log
    likelihood that the view gave to the tokens that the target then chose, each step discounted by
    ``memory``.
    """

    name = "mixed"

    def __init__(
        self,
        model: Any,
        rows: TokenRows,
        vocab_size: int,
        law: Law,
        *,
        views: Callable[[], list[PromptExtras]],
        num_views: int,
        shared_noise: bool = True,
        rate: float = 1.0,
        memory: float = 0.9,
    ) -> None:
        """Wraps a model.

        Args:
            model: As in `ModelDrafter`.
            rows: As in `ModelDrafter`.
            vocab_size: As in `ModelDrafter`.
            law: As in `ModelDrafter`.
            views: What the model reads, in each view.
            num_views: How many views there are.
            shared_noise: As in `ModelDrafter`.
            rate: How fast evidence moves the weights; 0 leaves them equal.
            memory: What a step leaves of older evidence, 0 to 1.

        Raises:
            ValueError: If a number is out of its range.
        """
        require(is_number(rate) and rate >= 0, "rate", "a number >= 0", rate)
        is_part = is_number(memory) and 0 <= memory <= 1
        require(is_part, "memory", "a number between 0 and 1", memory)
        super().__init__(
            model,
            rows,
            vocab_size,
            law,
            shared_noise=shared_noise,
            view=lambda: stacked(views(), rows),
            num_views=num_views,
        )
        self._rate, self._memory = rate, memory
        self._evidence_MB = torch.zeros(num_views, rows.num_rows, device=rows.tokens_BT.device)
        self._drafted: list[Tensor] = []

    @property
    def weights_MB(self) -> Tensor:
        """Weight of each view in each row."""
        return (self._rate * self._evidence_MB).softmax(0)

    def propose(self, plan: Plan) -> Proposal:
        """A chain of ``plan.width - 1`` drafts per active row."""
        self._drafted = []
        return super().propose(plan)

    def commit(
        self, proposal: Proposal, scores: Scores, verdict: Verdict, outcome: Outcome
    ) -> None:
        """Weighs the views by what they thought of what was emitted."""
        super().commit(proposal, scores, verdict, outcome)
        if not self._drafted:
            return
        probs_MBDV = torch.stack(self._drafted, dim=2)
        num_drafts = probs_MBDV.shape[2]
        chosen_BD = verdict.emitted_BM[:, :num_drafts]
        index = chosen_BD[None, :, :, None].expand(len(probs_MBDV), -1, -1, -1)
        likelihood_MBD = probs_MBDV.gather(3, index)[..., 0].clamp(min=FLOOR).log()
        depth = torch.arange(num_drafts, device=chosen_BD.device)
        # Behind a rejected draft the views were asked about a text that is not there.
        is_told_BD = depth <= verdict.num_accepted_B[:, None]
        told_MB = (likelihood_MBD * is_told_BD).sum(2)
        self._evidence_MB = self._memory * self._evidence_MB + told_MB

    def _combined(self, laws: list[Tensor]) -> Tensor:
        probs_MBV = torch.stack([law[:, 0].softmax(-1) for law in laws])
        self._drafted.append(probs_MBV)
        return (self.weights_MB[..., None] * probs_MBV).sum(0).log()[:, None]


def stacked(views: Sequence[PromptExtras], rows: TokenRows) -> PromptExtras:
    """Views of the same rows as one view of their rows, one view behind the other.

    Args:
        views: The views.
        rows: The rows.
    """
    whole = [range(length) for length in rows.prompt_lengths]
    kept = [indices for view in views for indices in view.kept or whole]

    def place(slots_RN: Tensor) -> Tensor:
        parts = zip(views, slots_RN.chunk(len(views)), strict=True)
        placed = [part if view.place is None else view.place(part) for view, part in parts]
        num_axes = max(part.ndim for part in placed)
        shape = next(part.shape[:-2] for part in placed if part.ndim == num_axes)
        return torch.cat([part.expand(*shape, -1, -1) for part in placed], dim=-2)

    return PromptExtras(
        inputs=_stacked_inputs(views, [*map(len, kept)]),
        place=place if any(view.place for view in views) else None,
        kept=kept,
        num_target_forwards=max(view.num_target_forwards for view in views),
    )


def _stacked_inputs(views: Sequence[PromptExtras], counts: Sequence[int]) -> dict[str, Any]:
    """Inputs of all views, in the order of their rows, which have ``counts`` tokens."""
    encoded = [view.inputs.get("mm_encoder_outputs", {}) for view in views]
    modalities = dict.fromkeys(modality for outputs in encoded for modality in outputs)
    inputs: dict[str, Any] = {}
    if modalities:
        inputs["mm_encoder_outputs"] = {
            name: _joined([outputs[name] for outputs in encoded if name in outputs])
            for name in modalities
        }
    types = [view.inputs.get("token_type_ids") for view in views]
    padding = next(
        (v.padding for v, one in zip(views, types, strict=True) if one is not None), None
    )
    if padding is not None:
        num_rows = len(counts) // len(views)
        rows = [one[row] if one is not None else () for one in types for row in range(num_rows)]
        device = next(one.device for one in types if one is not None)
        inputs["token_type_ids"] = torch.full((len(counts), max(counts)), padding, device=device)
        for values, filled in zip(rows, inputs["token_type_ids"], strict=True):
            filled[: len(values)] = torch.as_tensor(values)
    return inputs


def _joined(outputs: Sequence[Any]) -> Any:
    """Features of several encoder outputs as those of one."""

    def join(features: Sequence[Any]) -> Any:
        flat = torch.cat([p.reshape(-1, p.shape[-1]) for parts in features for p in parts])
        return flat[None] if isinstance(features[0], Tensor) else [flat]

    fields = {"pooler_output": join([output.pooler_output for output in outputs])}
    layers = [getattr(output, "deepstack_features", None) for output in outputs]
    if layers[0] is not None:
        fields["deepstack_features"] = [join(layer) for layer in zip(*layers, strict=True)]
    return type(outputs[0])(**fields)
