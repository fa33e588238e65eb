"""What making a picture takes in memory, in bytes of tensors.

Every tensor that a call makes is noted when it is made and when it is let go, so the figures are
the same on any machine and in any repetition. Not counted are the weights, which are there before,
and scratch memory that a kernel takes and gives back inside one operation.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmspec.bench.measure import Sample
from mmspec.bench.quality import grouped, title_of
from mmspec.bench.report import Section, table

MIB = 2**20


class MadeTensors(TorchDispatchMode):
    """Adds up the bytes of the storages that operations make while it is active.

    Attributes:
        live_bytes: Of the storages made so far and still alive.
        peak_bytes: The largest value of ``live_bytes``.
    """

    def __init__(self) -> None:
        """Has seen nothing."""
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Runs an operation and notes the storages that only its output has."""
        given = {s._cdata for s in _storages((args, kwargs))}
        answer = func(*args, **(kwargs or {}))
        for storage in _storages(answer):
            address = storage._cdata
            if address not in given and address not in self._known:
                self._known.add(address)
                self.live_bytes += storage.nbytes()
                weakref.finalize(storage, self._let_go, address, storage.nbytes())
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        return answer

    def _let_go(self, address: int, num_bytes: int) -> None:
        self._known.discard(address)
        self.live_bytes -= num_bytes


def _storages(tree: Any) -> list[Any]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class MemoryMeter:
    """Watches a call: what it holds at once, and what it keeps from one forward to the next.

    Attributes:
        kept_bytes: Largest sum that is alive when a forward of the backbone begins: the cache, the
            laws and noise that a drafter keeps, the tokens.
        cache_bytes: Of these the keys and values; None if the forwards are given no cache whose
            layers can be looked at.
    """

    def __init__(self, backbone: nn.Module) -> None:
        """Prepares to watch the forwards of a backbone."""
        self._backbone = backbone
        self._made = MadeTensors()
        self.kept_bytes = 0
        self.cache_bytes: int | None = None

    @property
    def peak_bytes(self) -> int:
        """Largest sum alive at any moment."""
        return self._made.peak_bytes

    def __enter__(self) -> "MemoryMeter":
        """Starts watching."""
        self._handle = self._backbone.register_forward_pre_hook(self._look, with_kwargs=True)
        self._made.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stops watching."""
        self._made.__exit__(kind, error, trace)
        self._handle.remove()

    def _look(self, _: nn.Module, __: object, kwargs: Mapping[str, Any]) -> None:
        self.kept_bytes = max(self.kept_bytes, self._made.live_bytes)
        layers = getattr(kwargs.get("past_key_values"), "layers", None)
        if layers is not None:
            held = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
            sizes = {s._cdata: s.nbytes() for s in _storages(held)}
            self.cache_bytes = max(self.cache_bytes or 0, sum(sizes.values()))


def measured_memory(backbone: nn.Module, call: Callable[[], Any]) -> tuple[Any, Sample]:
    """Runs something; returns its result and the bytes that it took."""
    with MemoryMeter(backbone) as meter:
        result = call()
    return result, {
        "peak_bytes": meter.peak_bytes,
        "kept_bytes": meter.kept_bytes,
        "cache_bytes": meter.cache_bytes,
    }


def summarise_memory(samples: Sequence[Sample]) -> list[Sample]:
    """One row per configuration and system: MiB per image."""
    rows = []
    for _, systems in sorted(grouped(samples).items()):
        for found in systems.values():
            sample = found[0]
            names = ("model", "dtype", "temperature", "guidance", "batch", "system", "guarantee")
            rows.append({"type": "memory", **{name: sample[name] for name in names}})
            for name in ("peak", "kept", "cache"):
                size = sample[f"{name}_bytes"]
                per_image = None if size is None else size / sample["num_images"] / MIB
                rows[-1][f"{name}_mib_per_image"] = per_image
    return rows


def memory_sections(rows: Sequence[Sample]) -> list[Section]:
    """One table of all configurations."""
    if not rows:
        return []
    names = [f"{name}_mib_per_image" for name in ("peak", "kept", "cache")]
    lines = [
        [title_of(row), row["system"], row["guarantee"], *(row[name] for name in names)]
        for row in rows
    ]
    headers = ["configuration", "system", "guarantee", "peak", "kept between forwards"]
    return [("Memory, MiB per image, weights left out", table([*headers, "of it cache"], lines))]
