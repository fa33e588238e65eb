"""What vision towers make of images and videos: by item, kept by content, cut by token.

Inputs of a batch are taken apart into items: an image (a tile of it, where a family cuts images
into tiles that take as many tokens each), or a video. Each item goes through the tower alone, so
its features do not depend on what else is asked in the same call, and a second question about it
does not run the tower again.

Shape suffixes as in `mmspec.records`, and
    R  rows of features, one for each placeholder     D  width of the language model
"""

import hashlib
import itertools
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mmspec.checks import is_integer, require
from mmspec.forward import text_device
from mmspec.rows import TokenRows

DEFAULT_CACHE_BYTES = 256 * 2**20

#: Modality -> the input that holds its pixels.
PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}

_numbers = itertools.count()
#: Model -> where its weights lie, and a number that no other model or place has had.
_MODELS: WeakKeyDictionary[Any, tuple[tuple[StorageWeakRef, ...], int]] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class Features:
    """Rows of features in the order of the placeholders that they stand for.

    Attributes:
        rows_RD: What is read in place of the placeholders' embeddings.
        deepstack: What is added to the hidden states behind the first layers, ``[R, D]`` each; None
            where the family has nothing of the kind.
        kind: Class of the tower's output.
        is_stacked: The model wants a tensor of items ``[items, R, D]``, otherwise a list of them.
        sizes: Rows of each item.
    """

    rows_RD: Tensor
    deepstack: tuple[Tensor, ...] | None
    kind: type
    is_stacked: bool
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, output: Any) -> "Features":
        """From what a model's ``get_image_features`` or ``get_video_features`` returns."""
        deepstack = output.get("deepstack_features")
        return cls(
            rows_RD=_flat(output.pooler_output),
            deepstack=None if deepstack is None else tuple(map(_flat, deepstack)),
            kind=type(output),
            is_stacked=isinstance(output.pooler_output, Tensor),
            sizes=tuple(map(len, output.pooler_output)),
        )

    @classmethod
    def joined(cls, parts: Sequence["Features"]) -> "Features":
        """The items of one behind those of the other."""
        first = parts[0]
        deepstack = None
        if first.deepstack is not None:
            layers = zip(*(part.deepstack or () for part in parts), strict=True)
            deepstack = tuple(map(torch.cat, layers))
        return cls(
            rows_RD=torch.cat([part.rows_RD for part in parts]),
            deepstack=deepstack,
            kind=first.kind,
            is_stacked=first.is_stacked,
            sizes=tuple(size for part in parts for size in part.sizes),
        )

    @property
    def size_bytes(self) -> int:
        """Memory that the rows take."""
        return sum(each.nbytes for each in (self.rows_RD, *(self.deepstack or ())))

    def take(self, index: Tensor) -> Any:
        """Some rows as one item, as the model's forward takes them."""
        index = index.to(self.rows_RD.device)
        return self._output([len(index)], lambda rows_RD: rows_RD[index])

    def whole(self) -> Any:
        """All items, as the model's tower returns them."""
        return self._output(self.sizes, lambda rows_RD: rows_RD)

    def _output(self, sizes: Sequence[int], picked: Callable[[Tensor], Tensor]) -> Any:
        def items(rows_RD: Tensor) -> list[Tensor]:
            return list(picked(rows_RD).split(list(sizes)))

        rows = picked(self.rows_RD).unflatten(0, (len(sizes), -1)) if self.is_stacked else None
        more = {}
        if self.deepstack is not None:
            more["deepstack_features"] = [items(layer) for layer in self.deepstack]
        return self.kind(pooler_output=items(self.rows_RD) if rows is None else rows, **more)


def cutter(
    features: Mapping[str, Features],
    tokens: Mapping[str, int],
    rows: TokenRows,
    num_cached: Sequence[int],
) -> Callable[[Sequence[int], Sequence[int]], dict[str, Any]]:
    """What says which features a part of the prompts reads.

    Args:
        features: By modality, those of all placeholders that are not cached, row by row.
        tokens: The placeholder of each modality.
        rows: The rows.
        num_cached: Tokens of each row that are cached.

    Returns:
        A function of the first token and the number of tokens of each row's part.

    Raises:
        ValueError: If there are not as many features as placeholders.
    """
    device = rows.tokens_BT.device
    column = torch.arange(rows.capacity, device=device)
    first_B1 = torch.tensor(num_cached, device=device)[:, None]
    is_new_BT = (column >= first_B1) & (column < rows.prompt_lengths_B[:, None])
    index_BT = {}
    for modality, own in features.items():
        mask_BT = is_new_BT & (rows.tokens_BT == tokens[modality])
        if int(mask_BT.sum()) != len(own.rows_RD):
            raise ValueError(
                f"the prompts have {int(mask_BT.sum())} {modality} tokens to be read, and the "
                f"{modality}s given fill {len(own.rows_RD)}"
            )
        order = mask_BT.flatten().cumsum(0).view_as(mask_BT) - 1
        index_BT[modality] = torch.where(mask_BT, order, -1)

    def part(starts: Sequence[int], counts: Sequence[int]) -> dict[str, Any]:
        node = torch.arange(max(counts), device=device)
        column_BN = torch.tensor(starts, device=device)[:, None] + node
        is_fed_BN = node < torch.tensor(counts, device=device)[:, None]
        read = {}
        for modality, own in features.items():
            index_BN = index_BT[modality].gather(1, column_BN.clamp(max=rows.capacity - 1))
            index_R = index_BN[is_fed_BN & (index_BN >= 0)]
            if len(index_R):
                read[modality] = own.take(index_R)
        return {"mm_encoder_outputs": read} if read else {}

    return part


# --------------------------------------------------------------------------- items


@dataclass(frozen=True, slots=True)
class VisualItem:
    """An image, a tile of one, or a video.

    Attributes:
        modality: "image" or "video".
        inputs: Arguments of the model's ``get_image_features`` or ``get_video_features``, or of its
            encoder where that reads images alone.
        num_tokens: Placeholders that it takes.
        digest: Hash of the inputs and of whatever else places its tokens.
    """

    modality: str
    inputs: Mapping[str, Tensor]
    num_tokens: int
    digest: bytes


def split(model: Any, inputs: Mapping[str, Any], tokens: Mapping[str, int]) -> list[VisualItem]:
    """Takes the images and videos of a batch apart.

    Args:
        model: The model.
        inputs: What its processor returned.
        tokens: The placeholder of each modality; none where images are read in no token's place.

    Returns:
        The images in the order of their placeholders, then the videos.

    Raises:
        ValueError: If they do not fill the placeholders.
    """
    items = []
    seconds = inputs.get("second_per_grid_ts")
    for modality, name in PIXELS.items():
        if inputs.get(name) is None:
            continue
        pieces = _SPLITTERS.get(model.config.model_type, _by_index)(model, modality, inputs)
        num_tokens = 0
        if modality in tokens:
            is_token_BP = inputs["attention_mask"].bool()
            num_tokens = int(((inputs["input_ids"] == tokens[modality]) & is_token_BP).sum())
        for index, (own, count) in enumerate(pieces):
            # The time between frames moves the positions of a video's tokens.
            apart = () if modality == "image" or seconds is None else (float(seconds[index]),)
            size = num_tokens // len(pieces) if count is None else count
            items.append(VisualItem(modality, own, size, _digest(modality, own, apart)))
        filled = sum(item.num_tokens for item in items if item.modality == modality)
        if filled != num_tokens:
            raise ValueError(
                f"the prompts have {num_tokens} {modality} tokens, and the {modality}s given fill "
                f"{filled}"
            )
    return items


_Piece = tuple[dict[str, Tensor], int | None]


def _by_index(model: Any, modality: str, inputs: Mapping[str, Any]) -> list[_Piece]:
    """Pixels ``[items, ...]``; every item takes as many tokens."""
    return [({PIXELS[modality]: one[None]}, None) for one in inputs[PIXELS[modality]]]


def _by_size(model: Any, modality: str, inputs: Mapping[str, Any]) -> list[_Piece]:
    """LLaVA: as `_by_index`, but a tower for images of any size (Pixtral) is told their sizes."""
    sizes = inputs.get("image_sizes")
    if sizes is None:
        return _by_index(model, modality, inputs)
    patch = model.config.vision_config.patch_size
    return [
        (
            {"pixel_values": pixels[None], "image_sizes": size[None]},
            int((size // patch).prod()),
        )
        for pixels, size in zip(inputs["pixel_values"], sizes, strict=True)
    ]


def _by_grid(model: Any, modality: str, inputs: Mapping[str, Any]) -> list[_Piece]:
    """Patches of all items in one list, and the grid of each item."""
    name = f"{modality}_grid_thw"
    sizes = inputs[name].prod(-1).tolist()
    merged = model.config.vision_config.spatial_merge_size**2
    pieces = inputs[PIXELS[modality]].split(sizes)
    return [
        ({PIXELS[modality]: pixels, name: grid[None]}, size // merged)
        for pixels, grid, size in zip(pieces, inputs[name], sizes, strict=True)
    ]


def _by_row(model: Any, modality: str, inputs: Mapping[str, Any]) -> list[_Piece]:
    """Tiles by row of the batch, ``[B, tiles, 3, height, width]``; black ones are padding."""
    names = [name for name in ("pixel_values", "pixel_attention_mask") if name in inputs]
    values = inputs["pixel_values"]
    places = itertools.product(range(values.shape[0]), range(values.shape[1]))
    return [
        ({name: inputs[name][row : row + 1, tile : tile + 1] for name in names}, None)
        for row, tile in places
        if bool((values[row, tile] != 0).any())
    ]


def _with_thumbnail(model: Any, modality: str, inputs: Mapping[str, Any]) -> list[_Piece]:
    """LLaVA-OneVision: a thumbnail and tiles, or in a row of several images the thumbnail alone."""
    if modality == "video":
        return _by_index(model, modality, inputs)
    # The model has to say how many tokens an image of a size takes; any values of the right shape
    # tell, so the tower is not needed.
    base, tower = model.base_model, model.config.vision_config
    length = (tower.image_size // tower.patch_size) ** 2
    pieces: list[_Piece] = []
    given = inputs.get("batch_num_images")
    in_row = [1] * len(inputs["image_sizes"]) if given is None else given.repeat_interleave(given)
    for pixels, size, beside in zip(
        inputs["pixel_values"], inputs["image_sizes"], in_row, strict=True
    ):
        tiles = pixels[: _num_tiles(model.config, size)] if int(beside) == 1 else pixels[:1]
        packed, _ = base.pack_image_features(
            [torch.zeros(len(tiles), length, 1)], size[None], image_newline=torch.zeros(1)
        )
        own = {"pixel_values": tiles[None], "image_sizes": size[None]}
        own["batch_num_images"] = torch.tensor([int(beside)])
        pieces.append((own, len(packed[0])))
    return pieces


def _num_tiles(config: Any, size: Tensor) -> int:
    from transformers.models.llava_onevision import modeling_llava_onevision as onevision

    num_tiles: int = onevision.image_size_to_num_patches(
        size, config.image_grid_pinpoints, config.vision_config.image_size
    )
    return num_tiles


#: Model type -> how its inputs are taken apart; `_by_index` where none is named.
_SPLITTERS: dict[str, Callable[[Any, str, Mapping[str, Any]], list[_Piece]]] = {
    "glm_ocr": _by_grid,
    "idefics3": _by_row,
    "llava": _by_size,
    "llava_onevision": _with_thumbnail,
    "paddleocr_vl": _by_grid,
    "qwen2_5_vl": _by_grid,
    "qwen2_vl": _by_grid,
    "qwen3_vl": _by_grid,
    "smolvlm": _by_row,
}


def _digest(modality: str, inputs: Mapping[str, Tensor], more: tuple[float, ...]) -> bytes:
    found = hashlib.sha256(repr((modality, more)).encode())
    for name, values in sorted(inputs.items()):
        found.update(repr((name, values.dtype, tuple(values.shape))).encode())
        # Not every type of torch has one in numpy.
        found.update(values.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.digest()


# --------------------------------------------------------------------------- cache


class FeatureCache:
    """Features of images and videos by their content, least recently used ones dropped first.

    An item is found again wherever it stands and whatever stands beside it. Features belong to a
    model in its type, on its device, with its weights as they are; weights that are changed in
    place behind torch's back (through ``.data``, or in inference mode) ask for `clear`.

    Attributes:
        max_bytes: Most bytes to keep; 0 keeps nothing.
        size_bytes: Bytes kept.
        num_hits: Items that were found.
        num_misses: Items that went through a tower.
    """

    def __init__(self, max_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        """Makes an empty cache.

        Raises:
            ValueError: If ``max_bytes`` is not an integer >= 0.
        """
        rule = "an integer >= 0"
        require(is_integer(max_bytes) and max_bytes >= 0, "max_bytes", rule, max_bytes)
        self.max_bytes = max_bytes
        self.size_bytes = self.num_hits = self.num_misses = 0
        self._kept: OrderedDict[tuple[object, ...], Features] = OrderedDict()

    def __len__(self) -> int:
        """Items kept."""
        return len(self._kept)

    def clear(self) -> None:
        """Drops everything; the counters of hits and misses go on."""
        self._kept.clear()
        self.size_bytes = 0

    def features(self, model: Any, items: Sequence[VisualItem]) -> list[Features]:
        """Features of items, from the tower if they are not here."""
        identity = _identity(model)
        return [self._features(model, identity, item) for item in items]

    def _features(self, model: Any, identity: tuple[object, ...], item: VisualItem) -> Features:
        key = (*identity, item.digest)
        found = self._kept.get(key)
        if found is not None:
            self.num_hits += 1
            self._kept.move_to_end(key)
            return found
        self.num_misses += 1
        made = _encoded(model, item)
        if made.size_bytes <= self.max_bytes:
            self._kept[key] = made
            self.size_bytes += made.size_bytes
        while self.size_bytes > self.max_bytes:
            self.size_bytes -= self._kept.popitem(last=False)[1].size_bytes
        return made


def encode(model: Any, items: Sequence[VisualItem], cache: FeatureCache) -> dict[str, Features]:
    """Features of items, by modality, in their order."""
    made: dict[str, list[Features]] = {}
    for item, features in zip(items, cache.features(model, items), strict=True):
        made.setdefault(item.modality, []).append(features)
    return {modality: Features.joined(parts) for modality, parts in made.items()}


def _encoded(model: Any, item: VisualItem) -> Features:
    device = text_device(model)
    inputs = {
        # A drafter may be of another type than the target, for which pixels were made.
        name: values.to(device, model.dtype if values.is_floating_point() else None)
        for name, values in item.inputs.items()
    }
    if model.config.model_type == "vision-encoder-decoder":
        states = model.encoder(**inputs, return_dict=True).last_hidden_state
        return Features.of(BaseModelOutputWithPooling(pooler_output=states))
    encoder = getattr(model.base_model, f"get_{item.modality}_features")
    return Features.of(encoder(**inputs, return_dict=True))


def _identity(model: Any) -> tuple[object, ...]:
    """What tells a model and its present weights from others."""
    weights = list(model.parameters())
    # A cast gives a parameter other memory, and as long as a weak reference is held no other
    # storage is taken for the old one. Offloaded weights have no memory between two forwards.
    places = tuple(StorageWeakRef(one.untyped_storage()) for one in weights if not one.is_meta)
    if model not in _MODELS or _MODELS[model][0] != places:
        _MODELS[model] = places, next(_numbers)
    # Every change in place counts up the version of a tensor; those of inference mode have none.
    versions = sum(0 if one.is_inference() else one._version for one in weights)
    return _MODELS[model][1], model.dtype, model.device, versions


def _flat(features: Any) -> Tensor:
    """Features of several items as one list of rows."""
    return torch.cat([one.reshape(-1, one.shape[-1]) for one in features])
