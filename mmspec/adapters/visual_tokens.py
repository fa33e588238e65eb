"""The images of a request as its drafters see them: some of their tokens, by whichever tower.

The rows that a drafter reads are the target's with some placeholders left out. What stays keeps
the position that it has in the whole row, so that text and images are as far apart as they are for
the target; a drafter that reads no image at all counts its text from 0.

Shape suffixes as in `mmspec.records`, and
    F  visual tokens of all rows, in their order     P  columns of the padded prompts
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmspec.attention_scores import attention_scores
from mmspec.forward import PromptExtras, SlotForward
from mmspec.rows import TokenRows
from mmspec.visual_tokens import (
    VisualTokens,
    cells,
    evenly,
    most_attended,
    place_in_whole,
    places_of,
    text_behind,
    text_of,
    without,
)

#: What two configurations may differ in although their towers make the same features.
_NOT_OF_THE_TOWER = frozenset(
    {
        "architectures",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "pad_token_id",
        "text_config",
        "tie_word_embeddings",
        "transformers_version",
        "use_cache",
    }
)


class PromptImages:
    """The images of a request: where they stand, and how other models come by them."""

    def __init__(
        self,
        model: Any,
        rows: TokenRows,
        own: PromptExtras,
        *,
        load: Callable[[Any], Callable[[], PromptExtras]],
        has_pictures: bool,
    ) -> None:
        """Notes what the target has; runs nothing.

        Args:
            model: The target.
            rows: The rows.
            own: What the target reads.
            load: Refuses another model, or returns what runs its own tower.
            has_pictures: The pictures are there for another tower to look at.
        """
        self._model = model
        self._rows = rows
        self._own = own
        self._load = load
        self._has_pictures = has_pictures

    @functools.cached_property
    def _places(self) -> list[list[int]]:
        """Where the visual tokens of each row stand; not looked up where no drafter asks."""
        return places_of(self._rows, self._own.placeholders)

    def seen_by(
        self, other: Any, sights: Sequence[VisualTokens], forward: SlotForward
    ) -> Callable[[], list[PromptExtras]]:
        """What another model reads of the prompts, for each choice of visual tokens.

        Args:
            other: The other model.
            sights: The choices.
            forward: The target's.

        Returns:
            To be called once the target has read the prompts.

        Raises:
            ValueError: If the other model cannot read these images, or not in this way.
        """
        shown = [sight for sight in sights if sight.choice != "none"]
        towers: dict[bool, Callable[[], PromptExtras]] = {}
        for sight in shown:
            towers[sight.reuse] = self._tower(other, sight)
        squares = {
            sight: self._cells(sight.side)
            for sight in shown
            if sight.choice == "pool" and any(self._places)
        }

        def views() -> list[PromptExtras]:
            # Once for all views, and kept no longer than they are made.
            whole = functools.cache(lambda reuse: towers[reuse]())
            scores = functools.cache(lambda: self._scores(forward))
            return [
                self._view(whole(sight.reuse), sight, scores, squares.get(sight))
                if sight in shown
                else text_of(self._rows, self._own.placeholders)
                for sight in sights
            ]

        return views

    def _tower(self, other: Any, sight: VisualTokens) -> Callable[[], PromptExtras]:
        """What makes the features for another model."""
        if sight.reuse:
            _check_same_tower(self._model, other, sight)
            return lambda: self._own
        if not self._has_pictures and any(self._places):
            raise ValueError(
                f"visual_tokens={str(sight)!r} needs the pixel_values of images, and none are given"
            )
        return self._load(other)

    def _view(
        self,
        whole: PromptExtras,
        sight: VisualTokens,
        scores: Callable[[], list[Tensor]],
        squares: list[Tensor] | None,
    ) -> PromptExtras:
        """The whole prompts without the visual tokens that are not chosen."""
        if sight.choice == "all" or not any(self._places):
            return whole
        counts = [len(places) for places in self._places]
        if squares is not None:
            chosen = [_firsts(cell) for cell in squares]
        elif sight.choice == "uniform":
            chosen = [evenly(count, sight.num_kept(count)) for count in counts]
        else:
            chosen = [most_attended(row, sight.num_kept(len(row))) for row in scores()]
        left_out = [
            set(places) - {places[index] for index in indices.tolist()}
            for places, indices in zip(self._places, chosen, strict=True)
        ]
        kept = without(self._rows, left_out)
        return PromptExtras(
            inputs=self._fewer(whole.inputs, kept, squares),
            place=place_in_whole(self._rows, kept, whole.place),
            kept=kept,
            padding=whole.padding,
            num_target_forwards=int(sight.choice == "attention"),
        )

    def _fewer(
        self, inputs: Mapping[str, Any], kept: list[list[int]], squares: list[Tensor] | None
    ) -> dict[str, Any]:
        """The inputs of shortened rows."""
        is_kept_F = torch.tensor(
            [
                index in stays
                for places, stays in zip(self._places, map(frozenset, kept), strict=True)
                for index in places
            ]
        )
        cell_F = None if squares is None else _numbered_on(squares)
        pairs = zip(self._rows.host_tokens, self._places, strict=True)
        tokens_F = torch.tensor([prompt[index] for prompt, places in pairs for index in places])
        features = {}
        for modality, output in inputs["mm_encoder_outputs"].items():
            mine_F = tokens_F == getattr(self._model.config, f"{modality}_token_id")
            if bool(is_kept_F[mine_F].any()):
                cell = None if cell_F is None else cell_F[mine_F]
                features[modality] = _features(output, is_kept_F[mine_F], cell)
        fewer: dict[str, Any] = {"mm_encoder_outputs": features}
        types_BP = inputs.get("token_type_ids")
        if types_BP is not None:
            rows = [row[indices] for row, indices in zip(types_BP, kept, strict=True)]
            fewer["token_type_ids"] = pad_sequence(
                rows, batch_first=True, padding_value=self._own.padding
            )
        return fewer

    def _scores(self, forward: SlotForward) -> list[Tensor]:
        """The target's attention to the visual tokens of each row."""
        starts = text_behind(self._rows, self._places)
        scores_BP = attention_scores(forward, self._rows, starts).cpu()
        return [row[places] for row, places in zip(scores_BP, self._places, strict=True)]

    def _cells(self, side: int) -> list[Tensor]:
        """The square of each visual token, by row."""
        return [cells(grid, side) if len(grid) else grid[:, 0] for grid in self._grids()]

    def _grids(self) -> list[Tensor]:
        """Image, time, row and column of each visual token, by row.

        Raises:
            ValueError: If the images are not grids, or their sizes are not known.
        """
        name = type(self._model).__name__
        if any(key.endswith("image_newline") for key, _ in self._model.named_parameters()):
            raise ValueError(
                f"visual_tokens='pool' is not supported for {name}: a visual token at the end of "
                "each row of an image is no part of its picture; use 'uniform' or 'attention'"
            )
        runs = [_runs(places) for places in self._places]
        if self._own.place is not None:
            longest = max(self._rows.prompt_lengths)
            index_BP = torch.arange(longest, device=self._rows.tokens_BT.device)
            axes = self._own.place(index_BP.expand(self._rows.num_rows, -1)).cpu()
            if axes.ndim == 3:
                pairs = zip(axes.unbind(1), self._places, runs, strict=True)
                return [_placed(row[:, places], run) for row, places, run in pairs]
        return [_square(self._images(row, run), name) for row, run in enumerate(runs)]

    def _images(self, row: int, run: Tensor) -> Tensor:
        """Which image each visual token of a row belongs to."""
        outputs = self._own.inputs["mm_encoder_outputs"]
        features = next(iter(outputs.values())).pooler_output
        if not isinstance(features, Tensor) or features.ndim != 3 or len(outputs) > 1:
            return run
        before = sum(map(len, self._places[:row]))
        return (before + torch.arange(len(run))) // features.shape[1]


def _check_same_tower(target: Any, other: Any, sight: VisualTokens) -> None:
    """Refuses to show a model the features of a tower that is not its own.

    Raises:
        ValueError: Naming what differs.
    """

    def settings(model: Any) -> dict[str, Any]:
        config = model.config.to_dict()
        config.get("vision_config", {}).pop("dtype", None)
        return {
            key: value
            for key, value in config.items()
            if key not in _NOT_OF_THE_TOWER and not key.startswith("_")
        }

    def weights(model: Any) -> dict[str, Tensor]:
        text = {id(p) for p in model.get_decoder().parameters()}
        text |= {id(p) for p in model.get_output_embeddings().parameters()}
        return {name: p for name, p in model.named_parameters() if id(p) not in text}

    def same(one: Any, two: Any) -> bool:
        if not isinstance(one, Tensor) or not isinstance(two, Tensor):
            return bool(one == two)
        is_alike = one.shape == two.shape and one.dtype == two.dtype
        return one is two or (is_alike and torch.equal(one, two.to(one.device)))

    for part in (settings, weights):
        mine, theirs = part(target), part(other)
        for name in sorted(mine.keys() | theirs.keys()):
            if not same(mine.get(name), theirs.get(name)):
                raise ValueError(
                    f"visual_tokens={str(sight)!r} needs a drafter with the target's own tower; "
                    f"{type(target).__name__} and {type(other).__name__} differ in {name}; leave "
                    "'reuse' out, and the drafter's tower runs"
                )


def _features(output: Any, is_kept: Tensor, cell: Tensor | None) -> Any:
    """Features of fewer visual tokens, in the containers in which models want them.

    Args:
        output: What the tower said, with features before some layers of the decoder if it has any.
        is_kept: Which to keep, in the order of the placeholders.
        cell: Of which group each is to be the mean.
    """

    def fewer(features: Any) -> Any:
        flat = torch.cat([part.reshape(-1, part.shape[-1]) for part in features])
        if cell is not None:
            group = cell.unique(return_inverse=True)[1].to(flat.device)
            counts = group.bincount()[:, None].to(flat.dtype)
            sums = flat.new_zeros(len(counts), flat.shape[1]).index_add_(0, group, flat)
            flat = (sums / counts)[group]
        flat = flat[is_kept.to(flat.device)]
        return flat[None] if isinstance(features, Tensor) else [flat]

    fields = {"pooler_output": fewer(output.pooler_output)}
    layers = getattr(output, "deepstack_features", None)
    if layers is not None:
        fields["deepstack_features"] = [fewer(layer) for layer in layers]
    return type(output)(**fields)


def _firsts(cell: Tensor) -> Tensor:
    """The first visual token of each cell; cells are numbered in their order."""
    newest = torch.cat([torch.tensor([-1]), cell.cummax(0)[0][:-1]]) if len(cell) else cell
    return (cell > newest).nonzero()[:, 0]


def _numbered_on(cells_by_row: Sequence[Tensor]) -> Tensor:
    """Cells of all rows, none of which share a number."""
    counts = [int(cell.max()) + 1 if len(cell) else 0 for cell in cells_by_row]
    return torch.cat([cell + sum(counts[:row]) for row, cell in enumerate(cells_by_row)])


def _runs(places: Sequence[int]) -> Tensor:
    """Number of the unbroken run of placeholders that each belongs to."""
    index = torch.tensor(places)
    return torch.nn.functional.pad((index.diff() != 1).cumsum(0), (min(len(places), 1), 0))


def _placed(axes_AN: Tensor, run: Tensor) -> Tensor:
    """A grid from positions in time, height and width, ``[n, 4]``."""
    if not len(run):
        return torch.zeros(0, 4, dtype=torch.long)
    _, frame = torch.stack([run, axes_AN[0]], 1).unique(dim=0, return_inverse=True)
    grid = torch.stack([run, axes_AN[0], *axes_AN[1:]], dim=1)
    for axis in (2, 3):
        start = torch.full((int(frame.max()) + 1,), int(grid.max())).scatter_reduce_(
            0, frame, grid[:, axis], "amin"
        )
        grid[:, axis] -= start[frame]
    return grid


def _square(image: Tensor, name: str) -> Tensor:
    """A grid for images that are squares, ``[n, 4]``.

    Raises:
        ValueError: If an image has not as many visual tokens as a square.
    """
    grid = torch.zeros(len(image), 4, dtype=torch.long)
    for number in image.unique():
        (mine,) = (image == number).nonzero(as_tuple=True)
        side = round(len(mine) ** 0.5)
        if side * side != len(mine):
            raise ValueError(
                f"visual_tokens='pool' needs square images; an image of {name} has {len(mine)} "
                "visual tokens. Use 'uniform' or 'attention'"
            )
        step = torch.arange(len(mine))
        grid[mine] = torch.stack(
            [number.expand(len(mine)), torch.zeros_like(step), step // side, step % side], dim=1
        )
    return grid
