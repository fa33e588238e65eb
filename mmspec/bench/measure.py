"""What every benchmark shares: clocks, counted forwards, provenance, and results that survive.

A benchmark is a list of tasks. A task runs several systems back to back in one process on the same
input; each system leaves one sample, a flat JSON object. Samples are appended to a file as soon as
their task is complete, and a later run of the same command skips what is there, so a killed run
keeps what it has.
"""

import hashlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import nn

from mmspec.assets import bundled_path

Sample = dict[str, Any]
T = TypeVar("T")

#: What the last line of a benchmark holds, with the types of the values.
FINAL_LINE = {
    "benchmark": str,
    "label": str,
    "command": str,
    "commands": list,
    "git_sha": str,
    "versions": dict,
    "device": str,
    "threads": int,
    "date": str,
    "fingerprint": str,
    "rows": list,
    "left_out": list,
    "failures": list,
    "time_s": float,
}

_ROOT = Path(__file__).resolve().parents[2]
_SOURCES = ("mmspec", "pipelines", "routers")
_PACKAGES = ("torch", "transformers", "mmspec")
# These change what is printed, not what is measured.
_NOT_MEASURED = (
    "training_log.jsonl",
    "__main__.py",
    "cli.py",
    "demo.py",
    "image_report.py",
    "jobs.py",
    "report.py",
    "support.py",
    "training",
    "video_figure.py",
    "video_report.py",
)


# --------------------------------------------------------------------------- clocks


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def timed(call: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """Runs something; returns its result and the seconds until the device was done."""
    synchronize(device)
    started = time.perf_counter()
    result = call()
    synchronize(device)
    return result, time.perf_counter() - started


def in_turn(names: Sequence[str], repeat: int) -> list[str]:
    """The order of one repetition: forth and back, so that a drift hits all systems alike."""
    return list(names) if repeat % 2 == 0 else list(reversed(names))


class Budget:
    """Minutes that a benchmark may take."""

    def __init__(self, minutes: float | None) -> None:
        """Starts the clock; None is no limit."""
        self._started = time.perf_counter()
        self._seconds = float("inf") if minutes is None else 60 * minutes

    @property
    def is_spent(self) -> bool:
        """True once the time is over. Asked before a task, never during one."""
        return self.elapsed_s >= self._seconds

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._started


class ForwardMeter:
    """Counts and clocks the forwards of a model, whoever calls them.

    A forward counts as full when the model's configuration names its whole depth at that moment.
    Early exit, ours and that of transformers, calls the same weights with fewer layers; those
    forwards are counted apart.

    Attributes:
        num_full: Forwards through every layer.
        num_shallow: Forwards through fewer layers.
        time_s: Seconds inside the model (and ``heads``); exact on a GPU only if ``exact_clock``.
    """

    def __init__(
        self, model: nn.Module, heads: Sequence[nn.Module] = (), *, exact_clock: bool = False
    ) -> None:
        """Prepares to watch.

        Args:
            model: A transformers model; its own ``forward`` is counted, not that of its parts.
            heads: Modules that run before or after the model; clocked, not counted.
            exact_clock: Wait for the device around each forward.
        """
        self._model = model
        self._heads = heads
        # On a CPU there is nothing to wait for, and finding the device of a module takes 3 us.
        self._waits = exact_clock and any(p.device.type != "cpu" for p in model.parameters())
        self._depth = _depth(model)
        self._handles: list[Any] = []
        self._started: list[float] = []
        self.num_full = 0
        self.num_shallow = 0
        self.time_s = 0.0

    def __enter__(self) -> "ForwardMeter":
        """Starts counting."""
        self._handles = [self._model.register_forward_pre_hook(self._count)]
        for module in (self._model, *self._heads):
            self._handles.append(module.register_forward_pre_hook(self._start))
            self._handles.append(module.register_forward_hook(self._stop))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stops counting."""
        for handle in self._handles:
            handle.remove()

    def _count(self, module: nn.Module, _: object) -> None:
        if _depth(module) == self._depth:
            self.num_full += 1
        else:
            self.num_shallow += 1

    def _start(self, module: nn.Module, _: object) -> None:
        self._wait(module)
        self._started.append(time.perf_counter())

    def _stop(self, module: nn.Module, _: object, __: object) -> None:
        self._wait(module)
        self.time_s += time.perf_counter() - self._started.pop()

    def _wait(self, module: nn.Module) -> None:
        if self._waits:
            synchronize(next(module.parameters()).device)


def _depth(model: Any) -> int:
    return model.config.get_text_config(decoder=True).num_hidden_layers


class PhaseClock:
    """Stands in for a part of the engine and adds up the seconds of its calls."""

    def __init__(self, part: object, phases: Mapping[str, str], seconds: dict[str, float]) -> None:
        """Wraps a part.

        Args:
            part: A target, drafter, rule, schedule or ledger.
            phases: Method -> name of the phase.
            seconds: Where the seconds of each phase are added up.
        """
        self._part = part
        self._phases = phases
        self._seconds = seconds

    def __getattr__(self, name: str) -> Any:
        """The part's attribute, clocked if it is a phase."""
        value = getattr(self._part, name)
        phase = self._phases.get(name)
        if phase is None:
            return value

        def clocked(*args: object, **kwargs: object) -> object:
            started = time.perf_counter()
            try:
                return value(*args, **kwargs)
            finally:
                elapsed = time.perf_counter() - started
                self._seconds[phase] = self._seconds.get(phase, 0.0) + elapsed

        return clocked


# --------------------------------------------------------------------------- provenance


def command_line() -> str:
    """The command that started this process, without the folder it lies in."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = Path(sys.argv[0]).name
    if spec is not None:
        program = "python -m " + spec.name.removesuffix(".__main__")
    return " ".join([program, *sys.argv[1:]])


def git_sha() -> str:
    """The commit of the checkout, with ``-dirty`` if files of the package differ from it."""
    if not (_ROOT / ".git").exists():
        return "no checkout"
    sha = _git("rev-parse", "--short=12", "HEAD")
    dirty = _git("status", "--porcelain", "--", *_SOURCES, "assets")
    return f"{sha}-dirty" if dirty else sha or "unknown"


def _git(*args: str) -> str:
    try:
        answer = subprocess.run(
            ["git", "-C", str(_ROOT), *args], capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return answer.stdout.strip()


def code_hash(bundles: Sequence[str] = ()) -> str:
    """Fingerprint of what is measured, so that an uncommitted change or a new model shows.

    Args:
        bundles: Bundled folders whose files are part of it.
    """
    paths = [path for folder in _SOURCES for path in sorted((_ROOT / folder).rglob("*.py"))]
    for name in bundles:
        found = sorted(bundled_path(name).rglob("*"))
        paths += [path for path in found if path.suffix in (".safetensors", ".jsonl", ".py")]
    digest = hashlib.sha256()
    for path in paths:
        if not set(path.relative_to(_ROOT).parts) & set(_NOT_MEASURED):
            digest.update(path.relative_to(_ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def device_name(device: torch.device) -> str:
    """The hardware in words, such as ``Intel(R) Xeon(R) Processor, 2 cores``."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()}, {os.cpu_count()} cores" + (" (mps)" if device.type == "mps" else "")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def slug(text: str) -> str:
    """Words for a file name: ``Intel(R) Xeon(R) Processor, 2 cores`` -> ``intel-xeon-2-cores``."""
    text = re.sub(r"\((R|TM|C)\)|processor|cpu\b|@.*?(?=,|$)", " ", text, flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "unknown"


def provenance(device: torch.device, bundles: Sequence[str] = ()) -> dict[str, Any]:
    """What a reader needs in order to repeat a number; ``bundles`` as in `code_hash`."""
    facts: dict[str, Any] = {
        "versions": versions(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "code": code_hash(bundles),
    }
    fingerprint = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    return {
        "command": command_line(),
        "git_sha": git_sha(),
        **facts,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "fingerprint": fingerprint,
    }


# --------------------------------------------------------------------------- results


class Store:
    """Samples in a file of JSON lines, by key.

    Only samples of the same fingerprint count: the same source, versions, device and threads.
    Others stay in the file and are left alone.

    Attributes:
        samples: Key -> sample.
        num_foreign: Samples in the file that were taken under other conditions.
        commands: The commands that took the samples.
    """

    def __init__(self, path: Path, fingerprint: str, command: str = "") -> None:
        """Reads the file if there is one; a line that a killed run left half is skipped."""
        self.path = path
        self.samples: dict[str, Sample] = {}
        self.num_foreign = 0
        self.commands: list[str] = []
        self._stamp = {"fingerprint": fingerprint, "command": command}
        self._needs_newline = False
        if path.exists():
            text = path.read_text(encoding="utf-8")
            self._needs_newline = bool(text) and not text.endswith("\n")
            for line in text.splitlines():
                self._read(line)

    def __contains__(self, key: str) -> bool:
        return key in self.samples

    def has(self, keys: Iterable[str]) -> bool:
        """True if every key is there."""
        return all(key in self.samples for key in keys)

    def add(self, samples: Sequence[Sample]) -> None:
        """Appends the samples of one task, in one write."""
        stamped = [sample | self._stamp for sample in samples]
        lines = "".join(json.dumps(sample) + "\n" for sample in stamped)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" * self._needs_newline + lines)
        self._needs_newline = False
        for sample in stamped:
            self._keep(sample)

    def _read(self, line: str) -> None:
        try:
            sample = json.loads(line)
        except json.JSONDecodeError:
            return
        if not isinstance(sample, dict) or "key" not in sample:
            return
        if sample.get("fingerprint") == self._stamp["fingerprint"]:
            self._keep(sample)
        else:
            self.num_foreign += 1

    def _keep(self, sample: Sample) -> None:
        self.samples[sample["key"]] = sample
        command = sample.get("command")
        if command and command not in self.commands:
            self.commands.append(command)


def stem(benchmark: str, label: str) -> str:
    """What the files of a run begin with: ``text``, or ``text_batch8`` with a label.

    Raises:
        ValueError: If the label is not made of letters, digits, ``-``, ``.`` and ``_``.
    """
    if not re.fullmatch(r"[A-Za-z0-9._-]*", label):
        raise ValueError(f"a label has letters, digits, '-', '.' and '_' only, got {label!r}")
    return f"{benchmark}_{label}" if label else benchmark


def open_store(out: Path, benchmark: str, label: str, facts: dict[str, Any]) -> Store:
    """The store of a run; from now on ``facts["commands"]`` are the commands of its samples.

    Args:
        out: Its folder.
        benchmark: Which benchmark.
        label: As in `stem`; also noted in the facts.
        facts: Of `provenance`.
    """
    path = out / f"{stem(benchmark, label)}.jsonl"
    store = Store(path, facts["fingerprint"], facts["command"])
    facts["commands"], facts["label"] = store.commands, label
    return store


def final_line(
    benchmark: str,
    facts: Mapping[str, Any],
    rows: Sequence[Sample],
    *,
    left_out: Sequence[str],
    failures: Sequence[str],
    time_s: float,
) -> dict[str, Any]:
    """The object of a benchmark's last line; see `FINAL_LINE`."""
    return {
        "benchmark": benchmark,
        "label": "",
        "commands": [],
        **{name: value for name, value in facts.items() if name != "code"},
        "rows": [rounded(row) for row in rows],
        "left_out": list(left_out),
        "failures": list(failures),
        "time_s": round(time_s, 3),
    }


def check_final_line(line: Mapping[str, Any]) -> None:
    """Refuses an object that is not a final line.

    Raises:
        ValueError: Naming what is missing or of another type.
    """
    for name, kind in FINAL_LINE.items():
        if not isinstance(line.get(name), kind):
            raise ValueError(f"{name} must be {kind.__name__}, got {line.get(name)!r}")
    if not all(isinstance(row, dict) for row in line["rows"]):
        raise ValueError("rows must be objects")


# --------------------------------------------------------------------------- small figures


def rounded(value: Any) -> Any:
    """The same JSON value with floats cut to five significant digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {name: rounded(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(entry) for entry in value]
    return value


def median(values: Iterable[float]) -> float | None:
    """The median, None of nothing."""
    found = list(values)
    return statistics.median(found) if found else None


def quartiles(values: Iterable[float]) -> tuple[float, float]:
    """What a quarter of the values lies below, and a quarter above; one value is both."""
    found = list(values)
    if len(found) < 2:
        return found[0], found[0]
    low, _, high = statistics.quantiles(found, n=4, method="inclusive")
    return low, high


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    """A quotient, None where it has none."""
    return numerator / denominator if numerator is not None and denominator else None


def csv(text: str, known: Sequence[str] | None = None) -> list[str]:
    """Splits a comma-separated option.

    Raises:
        ValueError: If an entry is not among the known ones, or there is none.
    """
    entries = [entry.strip() for entry in text.split(",") if entry.strip()]
    if not entries:
        raise ValueError(f"at least one entry is needed, got {text!r}")
    for entry in entries:
        if known is not None and entry not in known:
            raise ValueError(f"unknown entry {entry!r}; known: {', '.join(known)}")
    return entries
