"""Checks of what users pass: a `ValueError` with the rule and the value got, before any forward."""

import sys
from collections.abc import Callable, Iterable
from typing import TypeGuard

from torch import Generator


def is_number(value: object) -> TypeGuard[float]:
    """A finite real number that fits a float; True and False are none."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    # One comparison refuses NaN, the infinities and integers that no float holds.
    return abs(value) <= sys.float_info.max


def is_integer(value: object) -> TypeGuard[int]:
    """An integer; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_list(value: object, is_good: Callable[[object], bool]) -> bool:
    """A list or tuple, empty ones included, of nothing but good entries."""
    return isinstance(value, list | tuple) and all(map(is_good, value))


def require(is_good: bool, name: str, rule: str, value: object) -> None:
    """Refuses a value.

    Args:
        is_good: It is as it must be.
        name: Of the argument.
        rule: What it must be, such as "a number >= 0".
        value: What it is.

    Raises:
        ValueError: With the three if not ``is_good``.
    """
    if not is_good:
        raise ValueError(f"{name} must be {rule}, got {value!r}")


def require_known(kind: str, value: object, known: Iterable[str]) -> None:
    """Refuses a name that is not in a table; lists the known ones.

    Raises:
        ValueError: With the name and the known ones.
    """
    names = list(known)
    # A list compares, where a table would want to hash what may be anything.
    if value not in names:
        raise ValueError(f"unknown {kind} {value!r}; known: {', '.join(names)}")


def reason_of(error: Exception) -> str:
    """What an error says, behind its kind where the words alone may say little: KeyError: 'image'.

    The path that an error of the operating system ends with is left out.
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    is_clear = isinstance(error, ValueError) or type(error) in (RuntimeError, OSError)
    kind, words = type(error).__name__, str(error)
    return words if words and is_clear else f"{kind}: {words}".removesuffix(": ")


def require_generator(value: object) -> None:
    """Refuses what is neither a generator, nor a list of them, nor None.

    Raises:
        ValueError: With the value.
    """
    is_one = value is None or isinstance(value, Generator)
    is_good = is_one or is_list(value, lambda one: isinstance(one, Generator))
    require(is_good, "generator", "None, a torch.Generator or a list with one per row", value)
