"""Token rows: what is committed in each row of a batch, and when a row has ended.

Rows advance and end independently. Everything the device needs lives in preallocated tensors; the
host keeps its own copy of the tokens, filled by the one read of a step, so that drafters that work
on the host, streams and stop strings never ask the device again.

There may be more prompts than rows. Those behind the first ones wait, and a row that has ended is
given to the next of them (`TokenRows.admit`).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mmspec.noise import NoiseWindow, gumbel
from mmspec.records import Outcome, Proposal, Verdict
from mmspec.sampling import LawContext

StopCheck = Callable[[int, list[int]], int | None]


class TokenRows:
    """The committed tokens of a batch.

    Attributes:
        tokens_BT: Prompt and output of each row, left-aligned, int64.
        lengths_B: Committed tokens of each row, int64.
        limits_B: Length at which each row ends.
        prompt_lengths_B: Length of each prompt.
        keys_B: Noise key of each row.
        room_B: Tokens that each row may still get; 0 where it has ended.
        host_tokens: The same tokens as lists, prompt included.
        host_done: The same flags.
        step: Steps committed so far.
        prompts: All prompts, those that wait among them.
        budgets: Budget of each prompt.
        requests: Which prompt each row continues.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: Sequence[int],
        keys_B: Tensor,
        eos_token_ids: Sequence[int] = (),
        stop_check: StopCheck | None = None,
        device: torch.device | str = "cpu",
        slack: int = 128,
        num_rows: int | None = None,
    ) -> None:
        """Lays the prompts out.

        Args:
            prompts: Token ids of each row, at least one each.
            max_new_tokens: Budget of each row, at least one each.
            keys_B: Noise keys, one per row.
            eos_token_ids: Tokens that end a row (kept in its output).
            stop_check: Called with (prompt, new tokens so far), the prompt by its number; returns
                how many of them to keep if the row must end there, else None.
            device: Where the target's embedding lives.
            slack: Spare columns, so that a draft may run past a row's limit.
            num_rows: B, if there are more prompts than that; None is a row for each.

        Raises:
            ValueError: On an empty batch, an empty prompt, a budget below 1, or a mismatch.
        """
        if not prompts:
            raise ValueError("at least one prompt is needed, got an empty batch")
        if len(max_new_tokens) != len(prompts) or keys_B.shape[0] != len(prompts):
            raise ValueError(
                f"one budget and one key per row are needed: {len(prompts)} rows, "
                f"{len(max_new_tokens)} budgets, {keys_B.shape[0]} keys"
            )
        for row, (prompt, budget) in enumerate(zip(prompts, max_new_tokens, strict=True)):
            if len(prompt) == 0:
                raise ValueError(f"prompt {row} is empty; a row needs at least one token")
            if budget < 1:
                raise ValueError(f"max_new_tokens must be >= 1, got {budget} for row {row}")
        self.prompts = [[int(token) for token in prompt] for prompt in prompts]
        self.budgets = list(max_new_tokens)
        self._all_keys = keys_B
        limits = [len(p) + budget for p, budget in zip(prompts, max_new_tokens, strict=True)]
        self.capacity = max(limits) + slack
        prompts = self.prompts[:num_rows]
        limits, keys_B = limits[: len(prompts)], keys_B[: len(prompts)]
        self.requests = list(range(len(prompts)))
        lengths = [len(prompt) for prompt in prompts]
        host = torch.zeros(len(prompts), self.capacity, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            host[row, : len(prompt)] = torch.tensor(prompt)
        self.tokens_BT = host.to(device)
        self.lengths_B = torch.tensor(lengths, device=device)
        self.limits_B = torch.tensor(limits, device=device)
        self.prompt_lengths_B = self.lengths_B.clone()
        self.keys_B = keys_B.to(device, copy=True)
        self.room_B = self.limits_B - self.lengths_B
        self.eos_E = torch.tensor(sorted(set(eos_token_ids)), dtype=torch.long, device=device)
        self.host_tokens = [list(prompt) for prompt in prompts]
        self.host_limits = limits
        self.host_done = [False] * len(prompts)
        self.prompt_lengths = lengths
        self.step = 0
        self._last: tuple[Tensor, Tensor] | None = None
        self._noise: dict[int, NoiseWindow] = {}
        self._stop_check = stop_check

    @property
    def num_rows(self) -> int:
        """B."""
        return len(self.host_tokens)

    @property
    def num_waiting(self) -> int:
        """Prompts that no row has begun yet."""
        return len(self.prompts) - 1 - max(self.requests)

    @property
    def vacant(self) -> list[int]:
        """The rows that have ended, as many as prompts wait for one."""
        ended = [row for row, done in enumerate(self.host_done) if done]
        return ended[: self.num_waiting]

    @property
    def is_done(self) -> bool:
        """True once every row has ended and no prompt waits."""
        return all(self.host_done) and not self.num_waiting

    @property
    def active(self) -> list[int]:
        """The rows that go on; all of them once none does."""
        going_on = [row for row, done in enumerate(self.host_done) if not done]
        return going_on or list(range(self.num_rows))

    @property
    def max_length(self) -> int:
        """Length of the longest row."""
        return max(map(len, self.host_tokens))

    @property
    def max_remaining(self) -> int:
        """Largest number of tokens that an active row may still get."""
        return max(
            (
                limit - len(tokens)
                for limit, tokens, done in zip(
                    self.host_limits, self.host_tokens, self.host_done, strict=True
                )
                if not done
            ),
            default=0,
        )

    @property
    def last_B(self) -> Tensor:
        """Index of each row's last committed token; made once per step."""
        if self._last is None or self._last[0] is not self.lengths_B:
            self._last = self.lengths_B, self.lengths_B - 1
        return self._last[1]

    def roots_B(self) -> Tensor:
        """The last committed token of each row."""
        return self.tokens_BT.gather(1, self.last_B[:, None]).squeeze(1)

    def positions(self, depth_BN: Tensor) -> Tensor:
        """Absolute position of each node; never past a row's last legal position."""
        root_B1 = self.last_B[:, None]
        if depth_BN.shape[1] == 1:
            return root_B1
        return torch.minimum(root_B1 + depth_BN, self.limits_B[:, None] - 1)

    def choice_noise(self, num_positions: int, vocab_size: int, offset: int = 0) -> Tensor:
        """Gumbel noise of the target's choices behind each row's end, ``[B, N, V]``.

        Args:
            num_positions: N.
            vocab_size: V; noise of a smaller vocabulary is the first part of a larger one's.
            offset: Positions to skip behind the end.
        """
        if torch.compiler.is_compiling():
            # A compiled rule has no state on the host, and fuses the noise into what uses it.
            span = torch.arange(offset, offset + num_positions, device=self.lengths_B.device)
            return gumbel(self.keys_B, self.lengths_B[:, None] + span, vocab_size)
        window = self._noise.get(vocab_size)
        if window is None:
            window = self._noise[vocab_size] = NoiseWindow(self.keys_B, vocab_size)
        host_lengths = [len(tokens) for tokens in self.host_tokens]
        return window.take(
            self.lengths_B, host_lengths, num_positions, offset, max(self.max_remaining, 1)
        )

    def admit(self, row: int) -> None:
        """Lets the next prompt that waits begin in a row that has ended."""
        request = max(self.requests) + 1
        prompt = self.prompts[request]
        length, budget = len(prompt), self.budgets[request]
        self.requests[row] = request
        self.host_tokens[row] = list(prompt)
        self.host_limits[row] = length + budget
        self.host_done[row] = False
        self.prompt_lengths[row] = length
        self.tokens_BT[row, :length] = torch.tensor(prompt, device=self.tokens_BT.device)
        # A new tensor, because `last_B` knows the old one.
        self.lengths_B = self.lengths_B.clone()
        self.lengths_B[row] = self.prompt_lengths_B[row] = length
        self.limits_B[row] = length + budget
        self.room_B[row] = budget
        self.keys_B[row] = self._all_keys[request]
        for window in self._noise.values():
            window.restart(row, length)

    def new_tokens(self, row: int) -> list[int]:
        """The output of a row so far."""
        return self.host_tokens[row][self.prompt_lengths[row] :]

    def context(self, proposal: Proposal, positions_BN: Tensor) -> LawContext:
        """What a law may look at for these nodes."""
        return LawContext(
            tokens_BN=proposal.tokens_BN,
            ancestors_BNN=proposal.ancestors_BNN,
            depth_BN=proposal.depth_BN,
            positions_BN=positions_BN,
            history_BT=self.tokens_BT,
            lengths_B=self.lengths_B,
            prompt_lengths_B=self.prompt_lengths_B,
        )

    def commit(self, verdict: Verdict) -> Outcome:
        """Appends what the verdict emitted, cut at ends and limits. The step's one host read."""
        count_B, self.room_B = _cut(
            verdict.emitted_BM, verdict.num_accepted_B, self.room_B, self.eos_E
        )
        _append(self.tokens_BT, verdict.emitted_BM, self.lengths_B)
        self.lengths_B = self.lengths_B + count_B
        figures_B3 = torch.stack([count_B, self.room_B, verdict.num_accepted_B], dim=1)
        self.step += 1
        return self._read(torch.cat([figures_B3, verdict.emitted_BM], dim=1).tolist())

    def _read(self, packed: list[list[int]]) -> Outcome:
        was_active = tuple(not done for done in self.host_done)
        new_units: list[list[int]] = []
        num_accepted: list[int] = []
        num_retracted: list[int] = []
        for row, (count, room, accepted, *emitted) in enumerate(packed):
            new = emitted[:count]
            self.host_tokens[row].extend(new)
            self.host_done[row] = room == 0
            dropped = self._stop_here(row) if new else 0
            new_units.append(new[: max(count - dropped, 0)])
            num_accepted.append(accepted if was_active[row] else 0)
            num_retracted.append(max(dropped - count, 0))
        return Outcome(
            new_units=tuple(new_units),
            num_accepted=tuple(num_accepted),
            done=tuple(self.host_done),
            was_active=was_active,
            num_retracted=tuple(num_retracted) if any(num_retracted) else (),
            requests=tuple(self.requests) if len(self.prompts) > self.num_rows else (),
        )

    def _stop_here(self, row: int) -> int:
        """Asks the stop check and cuts the row if it says so; returns how many tokens go."""
        if self._stop_check is None:
            return 0
        output = self.new_tokens(row)
        keep = self._stop_check(self.requests[row], output)
        if keep is None:
            return 0
        if not 0 <= keep <= len(output):
            raise ValueError(f"stop_check must keep 0 to {len(output)} tokens, got {keep}")
        del self.host_tokens[row][self.prompt_lengths[row] + keep :]
        self.host_done[row] = True
        self.room_B[row] = 0
        # A new tensor, because `last_B` knows the old one.
        self.lengths_B = self.lengths_B.clone()
        self.lengths_B[row] = len(self.host_tokens[row])
        return len(output) - keep


def _cut(
    emitted_BM: Tensor, num_accepted_B: Tensor, room_B: Tensor, eos_E: Tensor
) -> tuple[Tensor, Tensor]:
    """How many emitted tokens each row keeps, and how many it may still get after them.

    The cut comes after verification, so an end inside a draft loses the drafts behind it.
    """
    longest = emitted_BM.shape[1]
    count_B = room_B.clamp(max=1) if longest == 1 else torch.minimum(num_accepted_B + 1, room_B)
    if not eos_E.shape[0]:
        return count_B, room_B - count_B
    slot = torch.arange(longest, device=emitted_BM.device)
    is_end = (emitted_BM[..., None] == eos_E).any(-1) & (slot < count_B[:, None])
    first_end_B = torch.where(is_end, slot, longest).amin(1)
    count_B = torch.minimum(count_B, first_end_B + 1)
    return count_B, (room_B - count_B).masked_fill(first_end_B < longest, 0)


def _append(tokens_BT: Tensor, emitted_BM: Tensor, lengths_B: Tensor) -> None:
    """Writes what was emitted at each row's own end, in place.

    What a row does not keep is written as well: it lies behind the row's length, where nobody
    looks, until later tokens take its place.
    """
    slots = lengths_B[:, None]
    if emitted_BM.shape[1] > 1:
        slots = slots + torch.arange(emitted_BM.shape[1], device=emitted_BM.device)
    tokens_BT.scatter_(1, slots, emitted_BM)
