"""How much of what was found is worth verifying: the calibrated width of retrieval drafters."""

from collections.abc import Sequence

from mmspec.drafters.drafts import Draft
from mmspec.drafters.plain import root_only
from mmspec.records import Plan, Proposal
from mmspec.rows import TokenRows
from mmspec.schedule import rows_behind
from mmspec.tree import BUCKETS, pack_trees

#: Units that a node must bring until it has been measured what nodes cost.
DEFAULT_NODE_PRICE = 0.05


def propose_worthwhile(
    drafts: Sequence[Draft], rows: TokenRows, plan: Plan, vocab_size: int
) -> Proposal:
    """Packs the first nodes of each row's draft, as many as pay.

    Args:
        drafts: Of each row; the scores are the chances that nodes are accepted.
        rows: The rows.
        plan: Most nodes, and what a step of each width must bring.
        vocab_size: The target's vocabulary.
    """
    width = worthwhile_width([draft.scores for draft in drafts], rows, plan)
    if width == 1:
        return root_only(rows)
    return pack_trees(
        [draft.tokens[: width - 1] for draft in drafts],
        [draft.parents[: width - 1] for draft in drafts],
        rows.roots_B(),
        vocab_size,
        width,
    )


def worthwhile_width(survivals: Sequence[Sequence[float]], rows: TokenRows, plan: Plan) -> int:
    """The width whose drafts bring most beyond what they cost; 1 where none pays.

    Half of what counts is what they bring all rows that go on, and half is what they bring the rows
    that are behind: a batch ends with those, but its steps get shorter whenever a row ends.
    """
    made = [len(rows.new_tokens(row)) for row in range(rows.num_rows)]
    active = [row for row, done in enumerate(rows.host_done) if not done]
    behind = rows_behind(made, [not done for done in rows.host_done])
    longest = max((len(survivals[row]) for row in active), default=0)
    best_width, best_gain = 1, 0.0
    for width in _widths(plan.width) if longest else ():
        brought = {row: sum(survivals[row][: width - 1]) for row in active}
        gain = 0.5 * sum(brought.values()) / len(active)
        gain += 0.5 * sum(brought[row] for row in behind) / len(behind)
        gain -= _price(plan, width)
        if gain > best_gain:
            best_width, best_gain = width, gain
        if width > longest:
            break
    return best_width


def least_score(plan: Plan) -> float:
    """Score of a node that can hardly be worth its price in a step of any width.

    Half of the least that a node more costs between two widths: scores are guesses.
    """
    steps = [0.0, *(_price(plan, width) for width in _widths(plan.width))]
    sizes = [1, *_widths(plan.width)]
    nodes = zip(steps, steps[1:], sizes, sizes[1:], strict=False)
    return max(0.5 * min((b - a) / (to - from_) for a, b, from_, to in nodes), 0.0)


def _price(plan: Plan, width: int) -> float:
    return plan.prices.get(width, DEFAULT_NODE_PRICE * (width - 1))


def _widths(widest: int) -> list[int]:
    """The widths to choose from: a step costs what its bucket costs, so rows fill one."""
    return [width for width in BUCKETS if 1 < width < widest] + [widest]
