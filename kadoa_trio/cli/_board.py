"""The picture of a client: its generations in time, rates, latency, buffer, events, notices.

`Board` records events and notices, and needs no terminal; `Board.lines` draws
the picture in a given size.
"""

from __future__ import annotations

import statistics
from collections import deque
from typing import Final

import attrs
from rich.text import Text

from .. import EventChannelStatistics
from .._client import Realtime, RealtimeStatistics
from .._events import Event
from .._redact import presentable
from ..notices import AttemptStarted, Draining, Live, Lost, Notice, Replaced, Retrying, State, Subscribed
from ._output import event_line, is_for_people

MIN_SPAN: Final = 15.0
MAX_SPAN: Final = 120.0
"""Minimum and maximum span of the timeline, in seconds; between them it spans the life of the client."""
_MAX_GENERATIONS: Final = 50
_MAX_LINES: Final = 200
_MAX_ARRIVALS: Final = 100_000
_SPARKS: Final = "▁▂▃▄▅▆▇█"
_STATES: Final = {
    State.CONNECTING: "yellow",
    State.LIVE: "green",
    State.REPLACING: "cyan",
    State.STOPPED: "bright_black",
    State.FAILED: "red",
}


@attrs.define(eq=False)
class _Generation:
    number: int
    began: float
    live: float | None = None
    draining: float | None = None
    ended: float | None = None
    how: str = ""

    def during(self, since: float, until: float) -> str:
        """Return the last state that the generation reached between two times, as one character."""
        if until <= self.began or (self.ended is not None and since >= self.ended):
            return " "
        if self.draining is not None and until > self.draining:
            return "▒"
        return "█" if self.live is not None and until > self.live else "·"


@attrs.define(eq=False)
class Board:
    """The recorded events and notices. All times are in seconds, of one clock."""

    started: float
    generations: deque[_Generation] = attrs.field(factory=lambda: deque(maxlen=_MAX_GENERATIONS))
    events: deque[Text] = attrs.field(factory=lambda: deque(maxlen=_MAX_LINES))
    notices: deque[Text] = attrs.field(factory=lambda: deque(maxlen=_MAX_LINES))
    arrivals: deque[tuple[float, float | None]] = attrs.field(factory=lambda: deque(maxlen=_MAX_ARRIVALS))
    """Arrival time and age of each recent event."""
    total: int = 0
    captions: deque[Text] = attrs.field(factory=lambda: deque(maxlen=_MAX_LINES))
    """Further lines, such as those of the demo."""

    # ---- recording ---------------------------------------------------------------------------------------------

    def event(self, event: Event, now: float, wall: float) -> None:
        """Record an event that arrived at *now*, when the wall clock showed *wall*."""
        self.total += 1
        age = None if event.timestamp is None or event.from_log else max(0.0, wall - event.timestamp.timestamp())
        self.arrivals.append((now, age))
        while self.arrivals and self.arrivals[0][0] < now - MAX_SPAN:
            self.arrivals.popleft()
        self.events.append(Text(event_line(event), no_wrap=True))

    def notice(self, notice: Notice, now: float) -> None:
        """Record a notice."""
        match notice:
            case AttemptStarted(generation=number):
                self.generations.append(_Generation(number, now))
            case Subscribed() | Live() | Draining() | Lost() | Replaced() | Retrying():
                self._follow(notice, now)
            case _:
                pass
        if is_for_people(notice):
            style = "red" if notice.level >= 40 else "yellow" if notice.level >= 30 else ""
            self.notices.append(
                Text(f"{notice.at.astimezone():%H:%M:%S}  {presentable(str(notice), 300)}", style=style, no_wrap=True)
            )

    def _follow(self, notice: Subscribed | Live | Draining | Lost | Replaced | Retrying, now: float) -> None:
        one = next((one for one in reversed(self.generations) if one.number == notice.generation), None)
        if one is None:
            return
        match notice:
            case Live():
                one.live = now
            case Draining():
                one.draining = now
            case Lost(how=how) | Replaced(how=how):
                one.ended, one.how = now, how
            case Retrying(why=why):
                one.ended, one.how = now, why

    def caption(self, text: str, style: str = "") -> None:
        """Record a line that is shown unchanged."""
        self.captions.append(Text(text, style=style, no_wrap=True))

    # ---- drawing -----------------------------------------------------------------------------------------------

    def lines(self, realtime: Realtime, now: float, width: int, height: int) -> list[Text]:
        """Draw *height* lines of at most *width* columns. The most important lines come first."""
        client, channel = realtime.statistics(), realtime.events.statistics()
        found = [self._header(client, now)]
        found += self._timeline(now, width, rows=max(1, min(6, height // 4)))
        found.append(self._rates(now, width))
        found.append(_buffers(client, channel))
        left = height - len(found)
        captions = list(self.captions)[-min(len(self.captions), max(0, left // 2)) :] if self.captions else []
        found += [Text(""), *captions] if captions else []
        left = height - len(found)
        if left >= 5:
            news = list(self.notices)[-max(1, (left - 2) // 3) :]
            events = list(self.events)[-(left - 2 - len(news)) :] if left - 2 > len(news) else []
            found += [_rule("events", width), *events, _rule("notices", width), *news]
        elif left > 0 and not captions:
            found += list(self.events)[-left:]
        # Cut copies, so that the whole lines are still available for a wider window.
        found = [line.copy() for line in found[:height]]
        for line in found:
            line.truncate(width, overflow="ellipsis")
        return found + [Text("")] * (height - len(found))

    def _header(self, client: RealtimeStatistics, now: float) -> Text:
        text = Text(no_wrap=True)
        text.append(f" {client.state.value.upper()} ", style=f"bold reverse {_STATES[client.state]}")
        text.append(f"  up {_duration(now - self.started)}   {self.total} events   ")
        text.append(f"{client.opened} connections, {client.drains} drains, {client.lost} lost")
        if client.gap_count:
            text.append(f"   {client.gap_count} possible gaps", style="bold yellow")
        return text

    def _timeline(self, now: float, width: int, rows: int) -> list[Text]:
        span = min(max(now - self.started, MIN_SPAN), MAX_SPAN)
        recent = [one for one in self.generations if one.ended is None or one.ended > now - span][-rows:]
        columns = max(10, width - 7)
        step = span / columns
        found = []
        for one in recent:
            text = Text(f"{one.number:>5}  ", style="bright_black", no_wrap=True)
            for column in range(columns):
                character = one.during(now - span + column * step, now - span + (column + 1) * step)
                text.append(character, style={"█": "green", "▒": "cyan", "·": "yellow"}.get(character, ""))
            found.append(text)
        found += [Text("")] * (rows - len(found))
        left, right = f"{span:.0f} s ago", "now"
        key = "█ live  ▒ draining  · opening"
        gap = columns - len(left) - len(right) - len(key)
        middle = f"{' ' * (gap // 2)}{key}{' ' * (gap - gap // 2)}" if gap >= 2 else " " * max(1, gap + len(key))
        found.append(Text(f"{'':7}{left}{middle}{right}", style="bright_black", no_wrap=True))
        return found

    def _rates(self, now: float, width: int) -> Text:
        """Draw the rate of events and their latency."""
        minute = [(at, age) for at, age in self.arrivals if at > now - 60]
        ten = sum(at > now - 10 for at, _ in minute) / 10
        text = Text(f"events/s  {ten:.1f} (10 s)  {len(minute) / 60:.1f} (1 min)  ", no_wrap=True)
        ages = [age for _at, age in minute if age is not None]
        if ages:
            high = statistics.quantiles(ages, n=20)[-1] if len(ages) > 1 else ages[0]
            text.append(f"latency  {_short(statistics.median(ages))} median, {_short(high)} for 95 %  ")
        buckets = [0] * min(30, max(0, width - text.cell_len))
        if buckets:
            for at, _ in minute:
                buckets[min(len(buckets) - 1, int((at - now + 60) / 60 * len(buckets)))] += 1
            most = max(buckets)
            text.append("".join(_SPARKS[count * 7 // most] if most else _SPARKS[0] for count in buckets), style="green")
        return text


def _buffers(client: RealtimeStatistics, channel: EventChannelStatistics) -> Text:
    text = Text(no_wrap=True)
    full = channel.buffered_events / channel.max_buffered_events
    text.append(
        f"buffer  {channel.buffered_events} of {channel.max_buffered_events}", style="yellow" if full > 0.5 else ""
    )
    text.append(f"   unsettled  {channel.unsettled} of {channel.max_unsettled}")
    if channel.tasks_waiting_space:
        text.append("   READING PAUSED", style="bold red")
    if client.unsaved:
        text.append(f"   unsaved  {client.unsaved}")
    text.append(f"   repeated  {client.repeated}")
    if client.repaired:
        text.append(f"   repaired  {client.repaired}")
    return text


def _rule(title: str, width: int) -> Text:
    return Text(f"── {title} " + "─" * max(0, width - len(title) - 4), style="bright_black", no_wrap=True)


def _duration(seconds: float) -> str:
    minutes, seconds_left = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days} d {hours:02}:{minutes:02}" if days else f"{hours}:{minutes:02}:{seconds_left:02}"


def _short(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s" if seconds < 100 else _duration(seconds)
