"""Jacobi windows: the target's own guesses of the coming tokens, refined in every forward.

What the rule chose behind the accepted path becomes the next guess (and the law it was chosen by
its draft law). New positions at the end of the window have no guess yet; they are drawn from the
law of a neighbour, above in a grid or the last known one (or of both, see `INITS`), never from a
one-hot guess, because a one-hot guess is accepted with the probability of one token only. Where the
target's law goes by position (line ends, the end of an image), the neighbour's law is cut to what
may stand there, so that a forced token is always guessed and never costs a rejection.

Sources: speculative Jacobi decoding (arXiv 2410.01699); shared noise per position goes back to
predictive sampling (Wiggers and Hoogeboom 2020).
"""

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mmspec.checks import require_known
from mmspec.drafters.mending import Mender, above_positions
from mmspec.drafters.plain import root_only
from mmspec.noise import Salt, gumbel
from mmspec.records import Outcome, Plan, Proposal, Scores, Verdict
from mmspec.rows import TokenRows
from mmspec.sampling import Allowed, sample
from mmspec.tree import pack_chain

#: Law of a new position, from the law above it and the last known one ("left"): either of them,
#: their arithmetic mean, their normalised geometric mean, or above + left - (above the left one),
#: which is what lossless image coders predict values by.
INITS = ("above", "left", "mean", "product", "corner")


class JacobiDrafter:
    """Keeps the choices and laws of the last forward, by position."""

    name = "jacobi"

    def __init__(
        self,
        rows: TokenRows,
        vocab_size: int,
        *,
        max_width: int,
        stride: int | Tensor | None = None,
        init: str = "above",
        is_greedy: bool = False,
        shared_noise: bool = True,
        keep_laws: bool = False,
        allowed: Allowed | None = None,
        mend: bool = False,
    ) -> None:
        """Makes an empty window.

        Args:
            rows: The rows.
            vocab_size: V.
            max_width: Largest window, root included.
            stride: Positions in a grid row: a new position looks at the law ``stride`` back. Or
                one for each new token of a row, ``[T]``, 0 where none is above. None looks at the
                last known law.
            init: How a new position guesses its law from its neighbours', one of `INITS`; without
                a stride all are "left".
            is_greedy: The rule takes the argmax, so guesses do too.
            shared_noise: Draw new positions with the noise of the target's own choice (for the
                exact rule); otherwise with fresh noise (for rules that keep only the law).
            keep_laws: Hand the laws of the guesses to the rule.
            allowed: The stage of the target's law that says which tokens may stand where.
            mend: Replace stale guesses by what was seen beside the same neighbours before
                (`mmspec.drafters.mending`), in a grid.

        Raises:
            ValueError: If the stride is below 1 or the way to begin unknown, or if guesses are to
                be mended without a stride.
        """
        require_known("init", init, INITS)
        if isinstance(stride, int) and stride < 1:
            raise ValueError(f"stride must be >= 1, got {stride}")
        if mend and stride is None:
            raise ValueError("mend needs a stride: what stands above a code is looked at")
        if isinstance(stride, Tensor):
            stride = stride.to(rows.lengths_B.device)
        longest = int(stride.max()) if isinstance(stride, Tensor) else stride or 0
        self._rows = rows
        self._vocab_size = vocab_size
        self._stride = stride
        self._init = init
        self._max_width = max_width
        self._is_greedy = is_greedy
        self._shared_noise = shared_noise
        self._keep_laws = keep_laws and not is_greedy
        self._allowed = allowed
        # Laws are kept in a ring by position: far enough back for the row above, far enough ahead
        # for the window.
        self._ring = 2 * max_width + longest + 1
        self._mender = None
        if mend and stride is not None:
            self._mender = Mender(rows, vocab_size, stride=stride, allowed=allowed)
        self._above_BT = None if stride is None else above_positions(rows, stride)
        # New positions look no further back from the end of the known ones.
        self._num_looked_at = longest + 1
        self._laws_BRV: Tensor | None = None
        self._guesses_BT = torch.zeros_like(rows.tokens_BT)
        self._settled_BT: Tensor | None = None
        self._known_B = rows.lengths_B.clone()  # laws are known for positions below this
        self._host_known = [len(tokens) for tokens in rows.host_tokens]  # the same on the host
        self._row_B1 = torch.arange(rows.num_rows, device=rows.lengths_B.device)[:, None]
        self._ahead = torch.arange(max_width, device=rows.lengths_B.device)

    def prefill(self) -> None:
        """Reads nothing."""

    def admit(self, rows: Sequence[int], verdict: Verdict) -> None:
        """Forgets what it knew of rows that begin anew; knows what follows their prompts.

        Args:
            rows: These rows.
            verdict: What the rule chooses behind their prompts; meaningless in all other rows.
        """
        for row in rows:
            length = len(self._rows.host_tokens[row])
            self._known_B[row] = self._host_known[row] = length + 1
            self._laws_BRV[row, length % self._ring] = verdict.law_logits_BNV[row, 0]  # type: ignore[index]
            self._guesses_BT[row, length] = verdict.choices_BN[row, 0]
        if self._stride is not None:
            self._above_BT = above_positions(self._rows, self._stride)
        if self._mender is not None:
            self._mender.follow(rows)

    def propose(self, plan: Plan) -> Proposal:
        """A chain of guesses behind each root."""
        rows = self._rows
        width = min(plan.width, self._max_width)
        if self._laws_BRV is None or width == 1:
            # Before the first forward nothing is known that could be accepted.
            return root_only(rows)
        position = rows.last_B[:, None] + self._ahead[1:width]
        # Rules that compare tokens need no laws, and only new positions have none to guess by.
        num_known = 0 if self._keep_laws else self._num_known(width - 1)
        guesses, laws = self._guesses_at(position, num_known)
        drafts = laws.softmax(-1) if self._keep_laws else None
        if self._mender is not None:
            guesses, is_mended = self._mender.mended(guesses, position)
            if drafts is not None:
                one_hot = torch.nn.functional.one_hot(guesses, self._vocab_size)
                drafts = torch.where(is_mended[..., None], one_hot.to(drafts.dtype), drafts)
        if drafts is not None:
            # The law of a child is stored at its parent; the last node has no child.
            drafts = torch.nn.functional.pad(drafts, (0, 0, 0, 1))
        num_drafts = [0 if done else width - 1 for done in rows.host_done]
        tokens = torch.cat([rows.roots_B()[:, None], guesses], dim=1)
        proposal = pack_chain(tokens, num_drafts, None, drafts)
        if self._settled_BT is None:
            return proposal
        settled = self._settled_BT.gather(1, position)
        settled &= position < self._known_B[:, None]
        settled = torch.nn.functional.pad(settled, (1, 0))
        return dataclasses.replace(proposal, settled_BN=settled)

    def commit(
        self, proposal: Proposal, scores: Scores, verdict: Verdict, outcome: Outcome
    ) -> None:
        """Stores the choice and the law of every position behind a node."""
        laws = verdict.law_logits_BNV
        if self._laws_BRV is None:
            num_rows = laws.shape[0]
            # Unknown laws are uniform, which keeps them laws.
            self._laws_BRV = laws.new_zeros(num_rows, self._ring, self._vocab_size)
        if self._mender is not None:
            self._mender.note(proposal.tokens_BN, scores.positions_BN, verdict.choices_BN)
        next_BN = scores.positions_BN + 1
        pairs = zip(self._rows.host_tokens, outcome.new_units, strict=True)
        roots = [len(tokens) - len(new) - 1 for tokens, new in pairs]
        self._store(laws, next_BN, roots)
        self._guesses_BT.scatter_(1, next_BN, verdict.choices_BN)
        if verdict.settled_BN is not None:
            if self._settled_BT is None:
                self._settled_BT = torch.zeros_like(self._guesses_BT, dtype=torch.bool)
            self._settled_BT.scatter_(1, next_BN, verdict.settled_BN)
        # Guesses behind a narrow step stay: they are older, but better than a neighbour's.
        self._known_B = torch.maximum(self._known_B, next_BN.amax(1) + 1)
        for row, root in enumerate(roots):
            last = min(root + laws.shape[1] - 1, self._rows.host_limits[row] - 1)
            self._host_known[row] = max(self._host_known[row], last + 2)

    def _store(self, laws: Tensor, next_BN: Tensor, roots: list[int]) -> None:
        """Puts the laws into the ring; nodes past a row's limit may fall anywhere behind it."""
        if not self._keep_laws and laws.shape[1] > self._num_looked_at:
            # The others are laws of positions with a guess, which only some rules ask for.
            roots = [root + laws.shape[1] - self._num_looked_at for root in roots]
            laws, next_BN = laws[:, -self._num_looked_at :], next_BN[:, -self._num_looked_at :]
        ring, num_nodes = self._laws_BRV, laws.shape[1]
        if len(set(roots)) > 1:
            # Whole laws by index: a scatter would go number by number.
            ring[self._row_B1, next_BN % self._ring] = laws  # type: ignore[index]
            return
        # Rows of one length are stored in one piece, or in two at the end of the ring.
        first = (roots[0] + 1) % self._ring
        num_before = min(num_nodes, self._ring - first)
        ring[:, first : first + num_before] = laws[:, :num_before]  # type: ignore[index]
        if num_before < num_nodes:
            ring[:, : num_nodes - num_before] = laws[:, num_before:]  # type: ignore[index]

    def _num_known(self, num_ahead: int) -> int:
        """How many of the next positions have a guess in every row that goes on."""
        rows = self._rows
        known = (self._host_known[row] - len(rows.host_tokens[row]) for row in rows.active)
        return max(min(num_ahead, *known), 0)

    def _guesses_at(self, position: Tensor, num_known: int) -> tuple[Tensor, Tensor]:
        """Guess and law for each position: stored where known, a neighbour's where new.

        Args:
            position: Positions ``[B, N]`` behind the rows' ends.
            num_known: How many of the first ones are known in all rows; their laws are left out.
        """
        stored = self._guesses_BT.gather(1, position)
        known, stored = stored[:, :num_known], stored[:, num_known:]
        position = position[:, num_known:]
        is_known = position < self._known_B[:, None]
        source = self._neighbour(position)
        if self._keep_laws:
            source = torch.where(is_known, position, source)
        laws = self._laws_at(source)
        if self._init != "above" and self._stride is not None:
            laws = torch.where(is_known[..., None], laws, self._mixed(laws))
        if self._allowed is not None:
            # Stored laws are cut already, and stay as they are.
            laws = self._allowed.restricted(laws, position, self._rows.prompt_lengths_B)
        drawn = sample(laws, None if self._is_greedy else self._noise(position, num_known))
        guesses = torch.where(is_known, stored, drawn)
        return torch.cat([known, guesses], dim=1), laws

    def _laws_at(self, position: Tensor) -> Tensor:
        return self._laws_BRV[self._row_B1, position % self._ring]  # type: ignore[index]

    def _mixed(self, above: Tensor) -> Tensor:
        """Laws of new positions from those above them and the last known one."""
        left = self._laws_at(self._known_B[:, None] - 1)
        if self._init == "left":
            return left.expand_as(above)
        above, left = above.log_softmax(-1), left.log_softmax(-1)
        if self._init == "product":
            return (above + left) / 2
        if self._init == "corner":
            corner = self._laws_at(self._neighbour(self._known_B[:, None] - 1)).softmax(-1)
            return (above.exp() + left.exp() - corner).clamp(min=1e-4).log()
        return torch.logaddexp(above, left)

    def _noise(self, position: Tensor, offset: int) -> Tensor:
        if self._shared_noise:
            return self._rows.choice_noise(position.shape[1], self._vocab_size, offset)
        step = self._rows.step + 1
        return gumbel(self._rows.keys_B, position, self._vocab_size, Salt.DRAFT, step)

    def _neighbour(self, position: Tensor) -> Tensor:
        last = self._known_B[:, None] - 1
        if self._above_BT is None:
            return last.expand_as(position)
        return torch.minimum(self._above_BT.gather(1, position), last)


def default_window(num_tokens: int, num_rows: int = 1) -> int:
    """A window where the user names none and it must not be chosen by the clock.

    Two grid rows for one image and less for a batch, because the rows of a batch fill the forward
    and a wide window then costs more than it brings (8 was best for 8 images on two cores).

    Args:
        num_tokens: Tokens of an image.
        num_rows: Images made together.
    """
    wide = 2 * math.sqrt(num_tokens) / num_rows ** (2 / 3)
    return max(8, min(64, 2 ** round(math.log2(wide))))
