"""Tasks in an order that survives: every input once before any input twice."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from mmspec.bench.measure import Budget, Sample, Store, in_turn

#: A measured system: called with the repetition, returns its sample.
System = Callable[[int], Sample]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Several systems on one input, to be run back to back.

    Attributes:
        key: Names input and configuration, such as ``bfloat16/T0/b1/edit-01``.
        label: The configuration in words, for messages.
        systems: Name -> what runs it. The first is the yardstick.
        facts: Fields that every sample of the task gets.
        warm_up: Run once per label and process before its first task.
        finish: Looks at all samples of one repetition and adds fields that compare them.
        repeats: How often it is repeated whatever is asked for; None is as often as asked.
    """

    key: str
    label: str
    systems: Mapping[str, System]
    facts: Mapping[str, object]
    warm_up: Callable[[], None] | None = None
    finish: Callable[[Mapping[str, Sample]], None] | None = None
    repeats: int | None = None

    def num_repeats(self, wanted: int) -> int:
        """Repetitions of this task where ``wanted`` are asked for."""
        return wanted if self.repeats is None else self.repeats

    def keys(self, repeat: int) -> list[str]:
        """Keys of the samples of one repetition."""
        return [f"{self.key}/{name}/r{repeat}" for name in self.systems]


class Unavailable(Exception):
    """A system that cannot run this task; the message says why and is reported."""


def run_tasks(
    tasks: Sequence[Task],
    repeats: int,
    store: Store,
    budget: Budget,
    say: Callable[[str], None],
) -> list[str]:
    """Runs what is not in the store yet, until all is done or the time is over.

    Args:
        tasks: In the order of importance; interleave configurations, so that a short run has
            something of each.
        repeats: Repetitions of each task; the first of all tasks before the second of any.
        store: Where samples go, one task at a time.
        budget: Asked before each task.
        say: Told the progress.

    Returns:
        What was left out, in words; empty if nothing was.
    """
    warmed: set[str] = set()
    for repeat in range(max((task.num_repeats(repeats) for task in tasks), default=0)):
        for number, task in enumerate(tasks):
            if budget.is_spent:
                return left_out(tasks, repeats, store)
            if repeat >= task.num_repeats(repeats) or store.has(task.keys(repeat)):
                continue
            if task.warm_up is not None and task.label not in warmed:
                task.warm_up()
            warmed.add(task.label)
            store.add(_run(task, repeat))
            say(
                f"[{budget.elapsed_s:6.0f} s] repetition {repeat + 1}/{task.num_repeats(repeats)}, "
                f"task {number + 1}/{len(tasks)}: {task.key}"
            )
    return left_out(tasks, repeats, store)


def _run(task: Task, repeat: int) -> list[Sample]:
    found: dict[str, Sample] = {}
    for name in in_turn(list(task.systems), repeat):
        try:
            found[name] = task.systems[name](repeat)
        except Unavailable as error:
            found[name] = {"unavailable": str(error)}
    if task.finish is not None:
        task.finish({name: s for name, s in found.items() if "unavailable" not in s})
    return [
        {"key": key, **task.facts, "system": name, "repeat": repeat, **found[name]}
        for key, name in zip(task.keys(repeat), task.systems, strict=True)
    ]


def left_out(tasks: Iterable[Task], repeats: int, store: Store) -> list[str]:
    """Which repetitions are missing, by configuration, and which systems could not run."""
    never: Counter[str] = Counter()
    partly: dict[str, list[int]] = defaultdict(list)
    most: Counter[str] = Counter()
    total: Counter[str] = Counter()
    reasons: dict[tuple[str, str], str] = {}
    for task in tasks:
        wanted = task.num_repeats(repeats)
        done = [repeat for repeat in range(wanted) if store.has(task.keys(repeat))]
        total[task.label] += 1
        most[task.label] = max(most[task.label], wanted)
        if not done:
            never[task.label] += 1
        elif len(done) < wanted:
            partly[task.label].append(len(done))
        for repeat in done:
            for key, name in zip(task.keys(repeat), task.systems, strict=True):
                if "unavailable" in store.samples[key]:
                    reasons[task.label, name] = store.samples[key]["unavailable"]
    words = []
    for label, count in total.items():
        if never[label]:
            words.append(f"{label}: {never[label]} of {count} inputs not measured")
        if partly[label]:
            words.append(
                f"{label}: {len(partly[label])} of {count} inputs have fewer than {most[label]} "
                f"repetitions (at least {min(partly[label])})"
            )
    words += [f"{label}: {name} not measured: {why}" for (label, name), why in reasons.items()]
    return words


def samples_of(tasks: Iterable[Task], repeats: int, store: Store) -> list[Sample]:
    """The samples that belong to these tasks, those of systems that could not run left out."""
    keys: list[str] = []
    for task in tasks:
        for repeat in range(task.num_repeats(repeats)):
            keys += task.keys(repeat)
    found = [store.samples[key] for key in keys if key in store]
    return [sample for sample in found if "unavailable" not in sample]


def interleaved(groups: Sequence[Sequence[Task]]) -> list[Task]:
    """The first of each group, then the second of each, and so on."""
    longest = max(map(len, groups), default=0)
    return [group[i] for i in range(longest) for group in groups if i < len(group)]
