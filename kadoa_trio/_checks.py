"""Checks of options: each refuses a value that cannot be used, and says what was given and what is wanted."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TypeGuard

from ._errors import ConfigurationError


def refusal(name: str, wanted: str, value: object) -> ConfigurationError:
    """Make the error for the option *name*, which must be *wanted* and is *value*.

    Numbers are shown. Of anything else only the type is: a string that was
    given for the wrong option may be a secret.
    """
    kind = type(value).__name__
    if value is None:
        given = "None"
    elif isinstance(value, float) or (isinstance(value, int) and abs(value) <= sys.maxsize):
        given = f"{value!r} ({kind})"
    elif isinstance(value, type):
        given = f"the class {value.__name__}"
    else:
        given = kind
    return ConfigurationError(f"{name} must be {wanted}, not {given}")


def check_seconds(name: str, value: object, *, unlimited: bool = False) -> None:
    """Refuse what is not a positive, finite number; with *unlimited*, `math.inf` is one, too."""
    if not (_is_finite(value) and value > 0) and not (unlimited and value == float("inf")):
        wanted = "a positive number of seconds, or math.inf" if unlimited else "a positive, finite number of seconds"
        raise refusal(name, wanted, value)


def check_delay(name: str, value: object, *, unlimited: bool = False) -> None:
    """Refuse what is not a finite number from 0 on; with *unlimited*, `math.inf` is one, too."""
    if not (_is_finite(value) and value >= 0) and not (unlimited and value == float("inf")):
        wanted = "a number of seconds from 0 on" if unlimited else "a finite number of seconds that is not negative"
        raise refusal(name, wanted, value)


def check_rate(name: str, value: object) -> None:
    """Refuse what is not a positive, finite number."""
    if not _is_finite(value) or value <= 0:
        raise refusal(name, "a positive, finite number", value)


def _is_finite(value: object) -> TypeGuard[float]:
    """Whether *value* is a number that is finite as a float. True and False are none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return -sys.float_info.max <= value <= sys.float_info.max


def check_count(name: str, value: object) -> None:
    """Refuse what is not a whole number from 1 on."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= sys.maxsize:
        raise refusal(name, f"a whole number from 1 to {sys.maxsize}", value)


def check_port(name: str, value: object) -> None:
    """Refuse what is not a whole number from 0 to 65535."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 65_535:
        raise refusal(name, "a whole number from 0 to 65535", value)


def check_flag(name: str, value: object) -> None:
    """Refuse what is neither True nor False: a string such as ``"no"`` would count as true."""
    if not isinstance(value, bool):
        raise refusal(name, "True or False", value)


def check_instance(name: str, value: object, kind: type) -> None:
    """Refuse what is neither None nor an instance of *kind*."""
    if value is not None and not isinstance(value, kind):
        article = "an" if kind.__name__[0] in "AEIO" else "a"
        module = "ssl." if kind.__module__ == "ssl" else ""
        raise refusal(name, f"{article} {module}{kind.__name__} or None", value)


def check_callable(name: str, value: object) -> None:
    """Refuse what is neither None nor callable."""
    if value is not None and not callable(value):
        raise refusal(name, "a function or None", value)


def check_hook(name: str, value: object) -> None:
    """Refuse what is neither None nor a function to call; a coroutine of an async function would never be awaited."""
    check_callable(name, value)
    if inspect.iscoroutinefunction(value):
        raise refusal(name, "a function that is not async, or None", value)


def check_async(name: str, value: object) -> None:
    """Refuse what is neither None nor an async function, or an object that can be called like one."""
    if value is not None and (not callable(value) or isinstance(value, type)):
        raise refusal(name, "a string, an async function that returns one, or None", value)


def check_text(name: str, value: object) -> None:
    """Refuse what is not a non-empty string that UTF-8 can encode."""
    if not isinstance(value, str):
        raise refusal(name, "a non-empty string", value)
    if not value:
        raise ConfigurationError(f"{name} must not be empty")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ConfigurationError(f"{name} must be a string that UTF-8 can encode, without lone surrogates")


def path_of(name: str, value: object) -> Path:
    """Give a path that was given as a string or a path object."""
    if not isinstance(value, (str, os.PathLike)):
        raise refusal(name, "a path: a string or a pathlib.Path", value)
    text = os.fspath(value)
    if not isinstance(text, str):
        raise refusal(name, "a path of text", text)
    if not text or "\0" in text:
        raise ConfigurationError(f"{name} must be a path that is not empty and holds no NUL character")
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        raise ConfigurationError(f"{name} must be a path that the file system can encode") from None
    return Path(text)


def strings_of(name: str, values: Iterable[str] | None) -> frozenset[str] | None:
    """Give the strings of a collection that has at least one; None, which means all, stays None."""
    if values is None:
        return None
    wanted = "a collection of one or more non-empty strings, or None for all"
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise refusal(name, wanted, values)
    chosen = list(values)
    for value in chosen:
        check_text(f"each item of {name}", value)
    if not chosen:
        raise ConfigurationError(f"{name} must be {wanted}; it is empty")
    return frozenset(chosen)
