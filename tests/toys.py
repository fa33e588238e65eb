"""Small targets and drafters whose law is known by arithmetic, and the tests' chi-square.

Everything here follows the protocols of `mmspec.protocols` with a table in the place of a network,
so tens of thousands of rows run at once and the law of the output can be enumerated.
"""

import itertools
from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor

from mmspec.engine import Engine
from mmspec.law_config import LawConfig
from mmspec.noise import Salt, gumbel, row_keys
from mmspec.records import Proposal, Scores
from mmspec.rows import TokenRows
from mmspec.sampling import build_law
from mmspec.schedule import FixedSchedule
from mmspec.tree import ancestors, pack_chain
from mmspec.verify import build_rule

PROMPT = [0, 1]


class TableTarget:
    """A target whose law depends on the position and the last two tokens."""

    def __init__(self, rows: TokenRows, table: Tensor) -> None:
        self.rows = rows
        self.table = table  # [position in the output, token before last, last token, V]
        self.vocab_size = table.shape[-1]

    @property
    def is_done(self) -> bool:
        return self.rows.is_done

    def prefill(self) -> None:
        pass

    def score(self, proposal: Proposal) -> Scores:
        rows = self.rows
        positions = rows.positions(proposal.depth_BN)
        before_root = rows.tokens_BT.gather(1, rows.lengths_B[:, None] - 2)
        parents = proposal.tokens_BN.gather(1, proposal.parents_BN)
        before = torch.where(proposal.depth_BN == 0, before_root, parents)
        output = (positions + 1 - rows.prompt_lengths_B[:, None]).clamp(max=len(self.table) - 1)
        logits = self.table[output, before, proposal.tokens_BN]
        return Scores(logits_BNV=logits, positions_BN=positions, forward_time_s=0.0)

    def commit(self, proposal, verdict):
        return self.rows.commit(verdict)


class TableDrafter:
    """Samples a chain from a table of its own, position by position, and reports the law."""

    name = "table"

    def __init__(self, rows: TokenRows, table: Tensor, *, shared_noise: bool = False) -> None:
        self.rows = rows
        self.table = table  # [V, V]: law after the last token
        self.shared_noise = shared_noise

    def prefill(self) -> None:
        pass

    def noise(self, depth: int) -> Tensor:
        rows = self.rows
        salt, step = (Salt.CHOICE, 0) if self.shared_noise else (Salt.DRAFT, rows.step)
        position = rows.lengths_B[:, None] + depth
        return gumbel(rows.keys_B, position, self.table.shape[-1], salt, step)[:, 0]

    def propose(self, plan) -> Proposal:
        tokens, laws = [self.rows.roots_B()], []
        for depth in range(plan.width - 1):
            logits = self.table[tokens[-1]]
            laws.append(logits.softmax(-1))
            tokens.append((logits + self.noise(depth)).argmax(-1))
        laws.append(torch.zeros_like(self.table[tokens[0]]))
        counts = [0 if done else plan.width - 1 for done in self.rows.host_done]
        probs = None if self.shared_noise else torch.stack(laws, 1)
        return pack_chain(torch.stack(tokens, 1), counts, self.table.shape[-1], probs)

    def commit(self, proposal, scores, verdict, outcome) -> None:
        pass


class TableTreeDrafter(TableDrafter):
    """Samples siblings without replacement (Gumbel top-k) at every node of a fixed tree."""

    name = "table-tree"
    #: Parent of each drafted node, -1 for the root: uneven, three levels, up to three siblings.
    PARENTS = (-1, -1, -1, 0, 0, 1, 3)

    def propose(self, plan) -> Proposal:
        num_rows, vocab_size = self.rows.num_rows, self.table.shape[-1]
        parents = [0] + [p + 1 for p in self.PARENTS]
        width = len(parents)
        depths = [0] * width
        for node in range(1, width):
            depths[node] = depths[parents[node]] + 1
        tokens = torch.zeros(num_rows, width, dtype=torch.long)
        tokens[:, 0] = self.rows.roots_B()
        laws = torch.zeros(num_rows, width, vocab_size, dtype=self.table.dtype)
        for node in range(width):
            children = [n for n in range(1, width) if parents[n] == node]
            if not children:
                continue
            logits = self.table[tokens[:, node]]
            laws[:, node] = logits.softmax(-1)
            # Fresh noise per node: siblings' subtrees must not share their draws.
            noise = -(-torch.rand(num_rows, vocab_size).clamp(1e-30, 1 - 1e-7).log()).log()
            tokens[:, children] = (logits + noise).topk(len(children), dim=-1).indices
        parents_BN = torch.tensor(parents).expand(num_rows, -1)
        active = torch.tensor([not done for done in self.rows.host_done])
        valid = torch.ones(num_rows, width, dtype=torch.bool)
        valid[:, 1:] = active[:, None]
        drafted = tuple(0 if done else width - 1 for done in self.rows.host_done)
        return Proposal(
            tokens_BN=tokens,
            parents_BN=parents_BN,
            valid_BN=valid,
            depth_BN=torch.tensor(depths).expand(num_rows, -1),
            ancestors_BNN=ancestors(parents_BN, max(depths)),
            is_chain=False,
            num_drafted=drafted,
            num_levels=tuple(max(depths) if n else 0 for n in drafted),
            branching=max(parents[1:].count(p) for p in parents),
            draft_probs_BNV=laws,
        )


def random_table(seed: int, length: int, vocab_size: int, scale: float = 1.5) -> Tensor:
    """Conditional logits of a toy target."""
    generator = torch.Generator().manual_seed(seed)
    shape = (length, vocab_size, vocab_size, vocab_size)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def toy_rows(num_rows: int, length: int, seed: int, slack: int = 16) -> TokenRows:
    return TokenRows(
        [PROMPT] * num_rows,
        max_new_tokens=[length] * num_rows,
        keys_B=row_keys(torch.Generator().manual_seed(seed), num_rows),
        slack=slack,
    )


def joint_law(table: Tensor, law_of=lambda logits: logits.softmax(-1)) -> Tensor:
    """Probability of every output, by enumeration, flattened in lexicographic order."""
    length, vocab_size = table.shape[0], table.shape[-1]
    law = law_of(table)
    probs = []
    for output in itertools.product(range(vocab_size), repeat=length):
        path, p = [*PROMPT, *output], 1.0
        for i, token in enumerate(output):
            p *= float(law[i, path[i], path[i + 1], token])
        probs.append(p)
    return torch.tensor(probs, dtype=torch.float64)


def chi_square(outcomes: Tensor, law: Tensor) -> tuple[float, int, float]:
    """Statistic, degrees of freedom and p-value of the joint counts.

    Cells with fewer than five expected are pooled.

    Args:
        outcomes: Tokens ``[samples, positions]``.
        law: Probability of every outcome, as `joint_law` orders them.
    """
    length = outcomes.shape[1]
    vocab_size = round(len(law) ** (1 / length))
    weights = vocab_size ** torch.arange(length - 1, -1, -1)
    counts = torch.bincount((outcomes * weights).sum(1), minlength=len(law)).double()
    expected = law * len(outcomes)
    assert float(counts[law == 0].sum()) == 0, "an impossible output was generated"
    small = expected < 5
    observed = torch.cat([counts[~small], counts[small].sum()[None]])
    wanted = torch.cat([expected[~small], expected[small].sum()[None]])
    keep = wanted > 1e-9
    found = stats.chisquare(observed[keep].numpy(), wanted[keep].numpy(), sum_check=False)
    return float(found.statistic), int(keep.sum()) - 1, float(found.pvalue)


def chi_square_p(outcomes: Tensor, law: Tensor) -> float:
    """P-value of `chi_square`."""
    return chi_square(outcomes, law)[2]


@dataclass(frozen=True, kw_only=True)
class ToyRun:
    """What came out of an engine over many toy rows."""

    outputs: Tensor  # [rows, length]
    tau: float
    num_accepted: int
    num_ends: int  # different steps in which rows ended: rows of a batch go on by themselves
    guarantee: str


class EagerSchedule(FixedSchedule):
    """Drafts in the very first step too, so that a rule is tested at every position."""

    def __init__(self, width, remaining):
        super().__init__(width, remaining)
        self._has_begun = True


def run_toy(
    table: Tensor,
    make_drafter,
    rule="exact",
    *,
    num_rows: int = 50_000,
    width: int = 4,
    seed: int = 0,
    config: LawConfig | None = None,
) -> ToyRun:
    """Runs the engine on a toy.

    Args:
        table: Of the target.
        make_drafter: Gets the rows.
        rule: A name, or what makes a rule of a law and rows.
        num_rows: Samples, all rows of one batch.
        width: Nodes per row and step.
        seed: Of the noise.
        config: Of the law.
    """
    rows = toy_rows(num_rows, len(table), seed)
    law = build_law(config or LawConfig())
    schedule = EagerSchedule(width, lambda: rows.max_remaining)
    made = rule(law, rows) if callable(rule) else build_rule(rule, law, rows)
    engine = Engine(TableTarget(rows, table), make_drafter(rows), made, schedule)
    # The statistics of tens of thousands of single rows would cost more than the run.
    steps = [record for record, _ in engine.stream()]
    return ToyRun(
        outputs=rows.tokens_BT[:, len(PROMPT) : len(PROMPT) + len(table)],
        tau=num_rows * len(table) / sum(sum(step.was_active) for step in steps),
        num_accepted=sum(sum(step.num_accepted) for step in steps),
        num_ends=len({sum(step.was_active) for step in steps}),
        guarantee=made.guarantee,
    )
