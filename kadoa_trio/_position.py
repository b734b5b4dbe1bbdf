"""Where another run resumes, and where events may be missing: `Position` and `Gap`."""

from __future__ import annotations

import enum
import json
from datetime import datetime
from typing import Final

import attrs

_VERSION: Final = 1


class GapReason(enum.Enum):
    """Why the client cannot exclude that events were missed."""

    NO_CURSOR = "there was no cursor to resume from"
    NOT_PROMISED = "the server announced that it does not resume"
    NOT_REPLAYED = "the server took the cursor and did not replay"
    CURSOR_DROPPED = "the server refused the cursor again and again"
    UNPROVED = "no connection lived long enough to be relied on"
    UNREAD = "a connection was closed while events on it were not read"


@attrs.frozen(kw_only=True)
class Gap:
    """A span of time in which events may have been missed."""

    since: datetime | None
    """The time up to which no event is missing, by this machine's clock; None if that is not known.

    If the clock was set meanwhile, the earlier reading counts.
    """
    until: datetime
    """When the connection that continues the stream delivered its first event, or when the gap was found without one.

    Not when its first frame came: a heartbeat may come before the subscription has taken effect. Never before `since`.
    """
    reason: GapReason
    """Why the client cannot exclude that events were missed."""
    cursor: str | None = None
    """The resume cursor before the gap, if there was one."""


@attrs.frozen(kw_only=True)
class Position:
    """How far a program has *processed* the stream: where another run resumes.

    A position never passes an event that is not settled. Give it to
    ``open_realtime(resume_from=...)``, or use a cursor store, which saves and
    loads it.
    """

    team: str | None = None
    """The team whose stream it belongs to; None before the first connection."""
    cursor: str | None = None
    """The cursor to resume from; None if the server has sent none."""
    settled: tuple[str, ...] = ()
    """Settled ids that the server may send again after a resumption from `cursor`, oldest first."""
    recent: tuple[str, ...] = ()
    """The newest settled ids beside those, maximum 1,000, because a replay may start earlier than asked."""
    cursor_at: datetime | None = None
    """The time up to which no event is missing, by this machine's clock.

    If nothing is replayed from `cursor`, events after that time may be missing. Without
    a cursor, the time of the last settled event, or of the first start.
    """
    last_life: datetime | None = None
    """When the last frame from the server came."""
    promised: bool = True
    """False if the server announced that it does not resume from `cursor`: the next run then reports a possible gap."""
    gaps: tuple[Gap, ...] = ()
    """Possible gaps that no repair has closed, oldest first, maximum 100."""
    unproved: tuple[str, ...] = ()
    """Those of `settled` that came on a connection that had repeated none of the events delivered before it.

    If the server sends one of them again, that does not show that it sends
    again everything after `cursor`.
    """

    def to_json(self) -> str:
        """Return the position as JSON, for a store of your own. People can read it, and it has a version."""
        return json.dumps(
            {
                "version": _VERSION,
                "team": self.team,
                "cursor": self.cursor,
                "cursor_at": _write_time(self.cursor_at),
                "last_life": _write_time(self.last_life),
                "promised": self.promised,
                "gaps": [
                    {
                        "since": _write_time(gap.since),
                        "until": _write_time(gap.until),
                        "reason": gap.reason.name,
                        "cursor": gap.cursor,
                    }
                    for gap in self.gaps
                ],
                "settled": self.settled,
                "unproved": self.unproved,
                "recent": self.recent,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Position:
        """Return the position that `to_json` has written as *text*.

        Raises:
            ValueError: *text* is something else, or of a newer version.
        """
        data = json.loads(text)
        if not isinstance(data, dict) or not isinstance(data.get("version"), int):
            raise ValueError("not a position")
        if data["version"] > _VERSION:
            raise ValueError(f"a position of version {data['version']}; this library knows version {_VERSION}")
        try:
            return cls(
                team=_text(data["team"]),
                cursor=_text(data["cursor"]),
                settled=_texts(data["settled"]),
                recent=_texts(data["recent"]),
                cursor_at=_read_time(data.get("cursor_at")),
                last_life=_read_time(data["last_life"]),
                promised=data.get("promised", True) is not False,
                gaps=tuple(map(_read_gap, data["gaps"])),
                unproved=_texts(data.get("unproved", [])),
            )
        except (KeyError, TypeError, ValueError) as exc:
            raise ValueError(f"not a position: {type(exc).__name__} in its {exc}") from None


def _write_time(time: datetime | None) -> str | None:
    return None if time is None else time.isoformat()


def _read_time(text: object) -> datetime | None:
    if text is None:
        return None
    time = datetime.fromisoformat(_text(text) or "")
    if time.tzinfo is None:
        raise ValueError("a time without its offset")
    return time


def _text(value: object) -> str | None:
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} where a string belongs")
    return value


def _texts(values: object) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TypeError("list of ids")
    return tuple(values)


def _read_gap(data: dict[str, object]) -> Gap:
    until = _read_time(data["until"])
    if until is None:
        raise TypeError("gap without an end")
    return Gap(
        since=_read_time(data["since"]),
        until=until,
        reason=GapReason[_text(data["reason"]) or ""],
        cursor=_text(data["cursor"]),
    )
