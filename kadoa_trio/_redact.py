"""Secrets, and the parts of foreign text that may be shown, logged or stored.

A secret is a `Secret` from the place where it enters the program to the line
that sends it, so that no secret is in a traceback that shows local variables.
Text from outside (a server, a proxy, a file, the environment) passes
`presentable` before it reaches a terminal, a log or an exception.
"""

from __future__ import annotations

import json
import re
from typing import Final, NoReturn, final
from urllib.parse import quote, quote_plus, unquote_plus

_PLACEHOLDER: Final = "[secret]"
_FRAGMENT: Final = 8
MIN_SECRET: Final = 4
"""Minimum length of what is replaced, in characters. Shorter texts occur everywhere."""
_IN_URLS: Final = "/:?@!$&'()*+,;="


@final
class Secret:
    """A string that repr, str, format and pickle do not show; `reveal` returns it, for the line that sends it.

    Args:
        value: the secret.
        also: other texts that show it, such as its encoded form.

    A value of fewer than 4 characters is not replaced, because it occurs in every text.
    """

    __slots__ = ("_also", "_fragments", "_spellings", "_value")

    def __init__(self, value: str, *also: str) -> None:
        self._value = value
        self._also = also
        self._spellings: tuple[str, ...] | None = None
        self._fragments: frozenset[str] = frozenset()

    def reveal(self) -> str:
        """Return the secret itself. Pass it on without binding it to a name, because tracebacks show names."""
        return self._value

    def __repr__(self) -> str:
        return _PLACEHOLDER

    def __format__(self, _spec: str) -> str:
        return _PLACEHOLDER

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self._value == other._value

    def __hash__(self) -> int:
        return hash(self._value)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret cannot be pickled or copied")

    def hide(self, text: str) -> str:
        """Replace the secret in *text*: each of its spellings, and each run of 8 or more characters of one."""
        if self._spellings is None:
            self._prepare()
        assert self._spellings is not None
        for spelling in self._spellings:
            text = text.replace(spelling, _PLACEHOLDER)
        fragments = self._fragments
        if not fragments or len(text) < _FRAGMENT:
            return text
        kept: list[str] = []
        start = 0
        while start < len(text):
            end = start + _FRAGMENT
            if text[start:end] in fragments:
                while end < len(text) and text[end + 1 - _FRAGMENT : end + 1] in fragments:
                    end += 1
                kept.append(_PLACEHOLDER)
                start = end
            else:
                kept.append(text[start])
                start += 1
        return "".join(kept)

    def _prepare(self) -> None:
        found: set[str] = set()
        for value in (self._value, *self._also):
            found |= _spellings(value)
        # The longest first, so that no part of a spelling is replaced before the whole.
        self._spellings = tuple(sorted(found, key=lambda one: (-len(one), one)))
        self._fragments = frozenset(
            one[place : place + _FRAGMENT] for one in self._spellings for place in range(len(one) - _FRAGMENT + 1)
        )


def hidden(value: str | None) -> Secret | None:
    """Wrap an optional secret."""
    return None if value is None else Secret(value)


def revealed(secret: Secret | None) -> str | None:
    """Unwrap an optional secret, for a call that takes a plain one."""
    return None if secret is None else secret.reveal()


def _spellings(value: object) -> set[str]:
    """Return the ways in which servers and libraries write *value*: in URLs, JSON, reprs, and as Latin-1."""
    if not isinstance(value, str):
        return set()
    data = value.encode(errors="replace")
    quoted = {
        quote(value, safe="", errors="replace"),
        quote(value, safe=_IN_URLS, errors="replace"),
        quote_plus(value, errors="replace"),
    }
    found = {
        value,
        *quoted,
        *(re.sub("%[0-9A-F]{2}", lambda match: match[0].lower(), one) for one in quoted),
        unquote_plus(value),
        repr(value)[1:-1],
        json.dumps(value)[1:-1],
        repr(data)[2:-1],
        data.decode("latin-1"),
    }
    return {one for one in found if len(one) >= MIN_SECRET}


def censor(text: str, *secrets: Secret) -> str:
    """Replace *secrets* in *text*, and every run of eight or more characters of one."""
    for secret in secrets:
        text = secret.hide(text)
    return re.sub(r"(\[secret\])+", _PLACEHOLDER, text) if secrets else text


def presentable(text: str, limit: int, *secrets: Secret) -> str:
    """Make foreign text safe to show: one line, printable, maximum *limit* characters, without secrets.

    A server may repeat a part of the credential that it refuses, so every run
    of 8 or more characters of a secret is replaced.
    """
    text = text[: limit * 10]
    if not text.isprintable():
        text = "".join(c if c.isprintable() else " " for c in text)
    return censor(" ".join(text.split()), *secrets)[:limit]
