"""Denoising steps that are drafted and verified, for `benchmarks/denoising_steps.py`.

A stochastic sampler goes from step to step by a Gaussian whose mean comes from the model. Drafted
steps are verified in one forward of the target over all of them, and a refused step is reflected
instead of drawn again (De Bortoli et al. 2025, arXiv:2501.05370, algorithm 3): the guarantee is
`distribution`, relative to the target with the same stochastic sampler. The unit of the engine is
a denoising step.

Shape suffixes: B rows, N states given to the target in one forward (the current one and the
drafted ones), S steps of the sampler, D numbers of a state.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mmspec.engine import Engine
from mmspec.noise import Salt, gaussian, uniform
from mmspec.records import Guarantee, Outcome, Plan, StepRecord

#: Clean data as predicted from states ``[B, N, D]`` at noise levels ``[B, N]``.
Predict = Callable[[Tensor, Tensor], Tensor]
Couple = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
NOISES = ("ancestral", "full")


@dataclass(frozen=True, slots=True)
class Sampler:
    """Steps ``x_end = state_weight * x + clean_weight * clean(x) + std * noise``.

    States are ``(1 - level) * data + level * noise``. The last step has no noise.

    Attributes:
        levels: Of noise, ``[S + 1]``, from 1 to 0.
        state_weight_S: Of the state.
        clean_weight_S: Of the predicted data.
        std_S: Of the fresh noise.
    """

    levels: Tensor
    state_weight_S: Tensor
    clean_weight_S: Tensor
    std_S: Tensor

    @classmethod
    def make(cls, levels: Tensor, noise: str) -> "Sampler":
        """Makes a sampler.

        Args:
            levels: From 1 to 0, ``[S + 1]``.
            noise: "full" replaces all noise in every step (consistency sampling; diffusers'
                ``stochastic_sampling``). "ancestral" adds what the reversed process adds; no other
                amount leaves as small a distance, in deviations, between two predictions.
        """
        start, end = levels[:-1], levels[1:]
        std = end
        if noise == "ancestral":
            std = end * (1 - ((1 - start) * end / ((1 - end) * start)).square()).sqrt()
        state = (end.square() - std.square()).clamp(min=0).sqrt() / start
        return cls(levels, state, (1 - end) - state * (1 - start), std)

    @property
    def num_steps(self) -> int:
        """S."""
        return len(self.std_S)


def reflected(noise: Tensor, shift: Tensor, tests: Tensor) -> tuple[Tensor, Tensor]:
    """The reflection-maximal coupling of two Gaussians of the same deviation.

    A draft ``draft_mean + std * noise`` is accepted with probability min(1, target / draft). Else
    the state is ``target_mean + std * (noise - 2 <noise, e> e)`` with e along the shift. Either
    way its law is the target's, and ``2 * Phi(-|shift| / 2)`` of the drafts are accepted, which no
    coupling exceeds.

    Args:
        noise: Standard normal, ``[..., D]``.
        shift: ``(draft_mean - target_mean) / std``, ``[..., D]``.
        tests: Uniform, ``[...]``.

    Returns:
        Which drafts are accepted ``[...]``, and the noise about the target's mean where they are
        not, ``[..., D]``; without a shift that is the noise itself.
    """
    square = shift.square().sum(-1)
    along = (noise * shift).sum(-1)
    # log(target / draft) at the draft, which is noise + shift from the target's mean.
    is_accepted = tests.log() <= -along - square / 2
    factor = 2 * along / torch.where(square > 0, square, 1)
    return is_accepted, noise - factor[..., None] * shift


class StepRows:
    """States of a batch on their way from noise to data.

    Every step of a row has noise and a test of its own from the start: a step is decided once, and
    what is drafted behind a refused step decides nothing before it is drafted again.

    Attributes:
        sampler: The sampler.
        states_BD: Where the rows are.
        index_B: Steps taken.
        host_index: The same on the host.
    """

    def __init__(self, sampler: Sampler, start_BD: Tensor, keys_B: Tensor) -> None:
        """Starts at noise.

        Args:
            sampler: The sampler.
            start_BD: Standard normal.
            keys_B: Of `mmspec.noise.row_keys`.
        """
        self.sampler = sampler
        self.states_BD = start_BD
        self.index_B = torch.zeros_like(keys_B)
        self.host_index = [0] * len(keys_B)
        self._row_B1 = torch.arange(len(keys_B))[:, None]
        positions_BS = torch.arange(sampler.num_steps).expand(len(keys_B), -1)
        self._noise_BSD = gaussian(keys_B, positions_BS, start_BD.shape[1]).to(start_BD.dtype)
        self._tests_BS = uniform(keys_B, positions_BS, Salt.ACCEPT).to(start_BD.dtype)

    @property
    def remaining(self) -> list[int]:
        """Steps left of each row."""
        num_steps = self.sampler.num_steps
        return [num_steps - index for index in self.host_index]

    def steps_BN(self, num_nodes: int) -> Tensor:
        """The coming steps; those behind the end are the last."""
        span = torch.arange(num_nodes)
        return (self.index_B[:, None] + span).clamp(max=self.sampler.num_steps - 1)

    def levels_BN(self, num_nodes: int) -> Tensor:
        """Of noise, before each of the coming steps."""
        return self.sampler.levels[self.steps_BN(num_nodes)]

    def noise_BND(self, num_nodes: int) -> Tensor:
        """Of the coming steps."""
        return self._noise_BSD[self._row_B1, self.steps_BN(num_nodes)]

    def tests_BN(self, num_nodes: int) -> Tensor:
        """Of the coming steps."""
        return self._tests_BS[self._row_B1, self.steps_BN(num_nodes)]

    def taken(self, states: Tensor, clean: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
        """The states one step on, given what the data are predicted to be."""
        weights = (self.sampler.state_weight_S, self.sampler.clean_weight_S, self.sampler.std_S)
        state, data, std = (weight[steps][..., None] for weight in weights)
        return state * states + data * clean + std * noise


@dataclass(frozen=True, slots=True, kw_only=True)
class StepProposal:
    """Drafted states.

    Attributes:
        states_BND: The current state, then the drafted ones.
        clean_BND: The data as the drafter predicted them from each state but the last.
        num_drafted: Per row. The last step has no noise and is never drafted.
    """

    states_BND: Tensor
    clean_BND: Tensor
    num_drafted: tuple[int, ...]

    @property
    def num_levels(self) -> tuple[int, ...]:
        """As many as are drafted: a chain."""
        return self.num_drafted

    @property
    def width(self) -> int:
        """States per row in the target's forward."""
        return self.states_BND.shape[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepScores:
    """The data as the target predicts them from each state."""

    clean_BND: Tensor
    forward_time_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepVerdict:
    """Accepted drafts per row, and the state of each row one step behind them."""

    num_accepted_B: Tensor
    states_BD: Tensor


@dataclass(frozen=True, slots=True)
class StepRule:
    """Accepts a prefix of the drafted steps.

    Attributes:
        rows: The rows.
        couple: As `reflected`.
        guarantee: Of that coupling.
    """

    rows: StepRows
    couple: Couple = reflected
    guarantee: Guarantee = Guarantee.DISTRIBUTION

    def verify(self, proposal: StepProposal, scores: StepScores) -> StepVerdict:
        """Decides without a host read."""
        rows, width = self.rows, proposal.width
        steps_BN = rows.steps_BN(width)
        limits_B1 = torch.tensor(proposal.num_drafted)[:, None]
        is_drafted_BN = torch.arange(width) < limits_B1
        gap_BND = torch.zeros_like(scores.clean_BND)
        gap_BND[:, :-1] = proposal.clean_BND - scores.clean_BND[:, :-1]
        scale_BN = rows.sampler.clean_weight_S[steps_BN] / rows.sampler.std_S[steps_BN]
        shift_BND = torch.where(is_drafted_BN[..., None], scale_BN[..., None] * gap_BND, 0.0)
        noise_BND = rows.noise_BND(width)
        is_accepted_BN, noise_BND = self.couple(noise_BND, shift_BND, rows.tests_BN(width))
        num_accepted_B = (is_accepted_BN & is_drafted_BN).long().cumprod(1).sum(1)
        next_BND = rows.taken(proposal.states_BND, scores.clean_BND, noise_BND, steps_BN)
        row_B = torch.arange(len(num_accepted_B))
        return StepVerdict(num_accepted_B=num_accepted_B, states_BD=next_BND[row_B, num_accepted_B])


class StepTarget:
    """The model whose law is wanted."""

    def __init__(self, rows: StepRows, predict: Predict) -> None:
        """Runs nothing."""
        self._rows = rows
        self._predict = predict

    @property
    def is_done(self) -> bool:
        """True once every row is data."""
        return max(self._rows.remaining) == 0

    def prefill(self) -> None:
        """Does nothing: there is no prompt."""

    def score(self, proposal: StepProposal) -> StepScores:
        """Predicts from every state."""
        levels_BN = self._rows.levels_BN(proposal.width)
        return StepScores(clean_BND=self._predict(proposal.states_BND, levels_BN))

    def commit(self, proposal: StepProposal, verdict: StepVerdict) -> Outcome:
        """Takes the accepted steps and the one behind them."""
        rows = self._rows
        is_active_B = rows.index_B < rows.sampler.num_steps
        rows.states_BD = torch.where(is_active_B[:, None], verdict.states_BD, rows.states_BD)
        rows.index_B = rows.index_B + (verdict.num_accepted_B + 1) * is_active_B
        before, rows.host_index = rows.host_index, rows.index_B.tolist()
        pairs = list(zip(before, rows.host_index, strict=True))
        return Outcome(
            new_units=tuple(list(range(*pair)) for pair in pairs),
            num_accepted=tuple(max(after - start - 1, 0) for start, after in pairs),
            done=tuple(left == 0 for left in rows.remaining),
            was_active=tuple(after > start for start, after in pairs),
        )


class StepDrafter:
    """Drafts with a model, or with what the target said last ("frozen", or "free").

    Attributes:
        name: For the figures.
    """

    def __init__(self, rows: StepRows, predict: Predict | None = None) -> None:
        """Runs nothing.

        Args:
            rows: The rows.
            predict: The drafting model. Without one the data are taken to be what the target
                predicted in its last valid forward, and the first step is not drafted.
        """
        self.name = "frozen" if predict is None else "model"
        self._rows = rows
        self._predict = predict
        self._frozen_BD = rows.states_BD
        self._can_draft = predict is not None

    def prefill(self) -> None:
        """Does nothing: there is no prompt."""

    def propose(self, plan: Plan) -> StepProposal:
        """Drafts the coming steps of every row."""
        rows = self._rows
        limit = plan.width - 1 if self._can_draft else 0
        num_drafted = tuple(max(min(limit, left - 1), 0) for left in rows.remaining)
        width = max(num_drafted) + 1
        steps_BN, noise_BND = rows.steps_BN(width), rows.noise_BND(width)
        levels_BN = rows.levels_BN(width)
        states, clean = [rows.states_BD], []
        for node in range(width - 1):
            clean.append(self._clean(states[-1], levels_BN[:, node]))
            states.append(rows.taken(states[-1], clean[-1], noise_BND[:, node], steps_BN[:, node]))
        nothing = rows.states_BD.new_zeros(len(num_drafted), 0, rows.states_BD.shape[1])
        return StepProposal(
            states_BND=torch.stack(states, dim=1),
            clean_BND=torch.stack(clean, dim=1) if clean else nothing,
            num_drafted=num_drafted,
        )

    def _clean(self, states_BD: Tensor, levels_B: Tensor) -> Tensor:
        if self._predict is None:
            return self._frozen_BD
        return self._predict(states_BD[:, None], levels_B[:, None])[:, 0]

    def commit(
        self,
        proposal: StepProposal,
        scores: StepScores,
        verdict: StepVerdict,
        outcome: Outcome,
    ) -> None:
        """Keeps what the target said of the last state that was accepted.

        Later states are no source: they hold noise that is used again behind the refusal, and a
        draft that knew it would bias the rule.
        """
        row_B = torch.arange(len(verdict.num_accepted_B))
        self._frozen_BD = scores.clean_BND[row_B, verdict.num_accepted_B]
        self._can_draft = True


@dataclass(frozen=True, slots=True)
class SameWidth:
    """Plans the same width in every step."""

    width: int

    def plan(self) -> Plan:
        """Returns the plan of the next step."""
        return Plan(width=self.width)

    def observe(self, record: StepRecord) -> None:
        """Learns nothing."""


def step_engine(
    rows: StepRows,
    target: Predict,
    draft: Predict | None,
    window: int,
    couple: Couple = reflected,
) -> Engine[StepProposal, StepScores, StepVerdict]:
    """Wires the parts.

    Args:
        rows: The rows.
        target: The model whose law is wanted.
        draft: The drafting model; None is the frozen target.
        window: Steps drafted at most; 0 is plain sampling.
        couple: Decides what is accepted, as `reflected` does.
    """
    return Engine(
        StepTarget(rows, target),
        StepDrafter(rows, draft),
        StepRule(rows, couple),
        SameWidth(window + 1),
    )
