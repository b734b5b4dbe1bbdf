"""Programs: what the server does, how the client is configured, and what happens when.

A program is data. It is drawn from a `Draw`, which is a seeded generator or
Hypothesis, so that both drivers run the same programs.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import attrs

T = TypeVar("T")

FEATURES: dict[str, str] = {
    # The server's style.
    "opaque": "cursors that cannot be compared",
    "no_cursors": "no event has a cursor",
    "some_cursors": "some events have no cursor",
    "grouped": "neighbours share a cursor; a replay begins with the whole group",
    "live_first": "live events come before the replay",
    "interleaved": "live events come between the pages of a replay",
    "late_replay": "a replay after live events begins later than stable_after",
    "paged": "a replay comes in pages, with seconds between them",
    "coarse": "a replay begins earlier than asked",
    "inclusive": "a replay begins with the event of the cursor",
    "truncated": "the oldest events are forgotten, and left out of replays without a word",
    "forgotten": "the oldest events are forgotten, and their cursors refused",
    "lag": "a subscription takes effect seconds after it was sent",
    "duplicates": "an event comes twice on one connection",
    "odd_ids": "ids that are integers, empty, missing, huge, null, or hold a lone surrogate",
    "spellings": "the spellings of the SDKs and of webhooks",
    "big_events": "events of many kilobytes",
    "no_heartbeats": "a server that sends no heartbeats",
    "fragments": "bytes arrive a few at a time",
    # The server's faults.
    "drains": "drain notices, followed by a close or not",
    "unpromised": "drain notices with resumeSupported false, after which older cursors are ignored",
    "closes": "closes with every code",
    "resets": "resets",
    "silence": "half-open connections",
    "deaf": "a connection that has lost its subscription and keeps its heartbeats",
    "token_faults": "token requests: 5xx, 408, 429, garbage, hangs, refused connections",
    "token_4xx": "token requests: 400, 401, 403, 404, 405, 409, 421, 431, 451",
    "handshake_faults": "handshakes: statuses, garbage, hangs, closes",
    "connect_faults": "refused and hanging TCP connections",
    "refused": "connections that ask to resume are closed for minutes",
    "replay_down": "connections that ask to resume are closed for up to 45 s",
    "short_lives": "every connection is dropped seconds after it was opened",
    "garbage": "frames that are no JSON, of unknown types, or of odd shapes",
    # The client's side.
    "stalls": "a program that stops receiving for a while",
    "slow": "a program that needs time for every event",
    "small_buffers": "small limits of the client",
    "failing": "deliveries that fail",
    "workers": "several workers",
    "filters": "event_types",
    "own_position": "position_after() in the program's own transaction, in place of a store",
    "no_store": "no store",
    "stop": "stop() and a new process",
    "leave": "a process that is left at a random step of the scheduler",
    "crash": "a process that dies at a random step of the scheduler",
    "start_cut": "a process that is left or dies while it starts",
    "store_faults": "stores that fail, hang, lie, raise oddly, or are owned",
    "wall_jumps": "wall clocks that jump",
    "blocked": "an event loop that is blocked",
    "repair": "repair_gaps, with a log that lags",
    "long": "hours",
    "secrets": "DEBUG logs are searched, and the server repeats the token",
    "short_log": "the server's log also has rows of other channels",
}


class Draw(Protocol):
    """A source of decisions. The first choice is the simplest, for shrinking."""

    def integer(self, low: int, high: int) -> int: ...


class Seeded:
    """Decisions of a seed."""

    def __init__(self, seed: int | str) -> None:
        self._rng = random.Random(f"chaos {seed}")

    def integer(self, low: int, high: int) -> int:
        return self._rng.randint(low, high)


class FromHypothesis:
    """Decisions that Hypothesis makes, and shrinks."""

    def __init__(self, draw: Callable[..., Any]) -> None:
        self._draw = draw

    def integer(self, low: int, high: int) -> int:
        from hypothesis import strategies as st

        value: int = self._draw(st.integers(low, high))
        return value


@attrs.frozen(kw_only=True)
class Style:
    """How a server behaves all the time."""

    cursors: str = "ordered"
    order: str = "before"
    page: int = 0
    """Events in a page of a replay; 0 for all at once."""
    pause: float = 0.0
    replay_delay: float = 0.0
    coarse: int = 0
    inclusive: bool = False
    retention: int = 0
    """Events that are held; 0 for all."""
    on_forgotten: str = "truncate"
    lag: float = 0.0
    heartbeat: float = 15.0
    """Seconds between heartbeats; 0 for none."""
    greets: bool = True
    """A heartbeat comes as soon as the subscription is received."""
    duplicates: bool = False
    odd_ids: bool = False
    spellings: bool = False
    chunk: int = 0
    window: int = 65_536
    """Bytes that the network holds."""
    drop_unread: bool = False
    """A reset destroys what has arrived and was not read."""
    latency: float = 0.0
    log_lag: float = 0.0
    foreign_rows: bool = False


@attrs.frozen(kw_only=True)
class Options:
    """How a program uses the client."""

    position: str = "store"
    consumer: str = "loop"
    workers: int = 1
    work: float = 0.0
    buffered: int = 1_000
    buffered_bytes: int = 64 * 1024 * 1024
    unsettled: int = 10_000
    unsaved: int = 10_000
    filters: bool = False
    repair: bool = False
    acknowledge: bool = True
    auth_grace: float = 300.0
    debug: bool = False


@attrs.frozen(repr=False, init=False)
class Step:
    """Something that happens, *after* so many seconds."""

    after: float
    op: str
    args: tuple[Any, ...]

    def __init__(self, after: float, op: str, *args: Any) -> None:
        self.__attrs_init__(after, op, args)  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        return f"Step({', '.join(map(repr, (self.after, self.op, *self.args)))})"


@attrs.frozen(kw_only=True)
class Program:
    """A whole test."""

    seed: int = 0
    """Of Trio's scheduler and of the client's jitter."""
    style: Style = attrs.field(factory=Style)
    options: Options = attrs.field(factory=Options)
    steps: tuple[Step, ...] = ()

    def __str__(self) -> str:
        steps = "".join(f"        {step!r},\n" for step in self.steps)
        return (
            f"Program(\n    seed={self.seed},\n    style={_changes(self.style)},\n"
            f"    options={_changes(self.options)},\n    steps=(\n{steps}    ),\n)"
        )


def _changes(value: Any) -> str:
    """Write an object with only what differs from its defaults."""
    plain = type(value)()
    changed = [
        f"{field.name}={getattr(value, field.name)!r}"
        for field in attrs.fields(type(value))
        if getattr(value, field.name) != getattr(plain, field.name)
    ]
    return f"{type(value).__name__}({', '.join(changed)})"


class _Maker:
    """Draws one program."""

    def __init__(self, draw: Draw, features: frozenset[str]) -> None:
        self.draw = draw
        self.features = features
        self.style: dict[str, Any] = {}
        self.options: dict[str, Any] = {}
        self.steps: list[Step] = []

    # ---- decisions ---------------------------------------------------------------------------------------------

    def chance(self, percent: int) -> bool:
        return self.draw.integer(0, 99) >= 100 - percent

    def integer(self, low: int, high: int) -> int:
        return self.draw.integer(low, high)

    def seconds(self, low: float, high: float) -> float:
        return self.draw.integer(round(low * 1000), round(high * 1000)) / 1000

    def choice(self, options: Sequence[T]) -> T:
        return options[self.draw.integer(0, len(options) - 1)]

    def on(self, feature: str, percent: int = 100) -> bool:
        """Decide for a feature; the decision is drawn even where the feature is switched off."""
        assert feature in FEATURES, feature
        return self.chance(percent) and feature in self.features

    def step(self, after: float, op: str, *args: Any) -> None:
        self.steps.append(Step(round(after, 3), op, *args))

    # ---- the server and the client -----------------------------------------------------------------------------

    def make(self) -> Program:
        seed = self.integer(0, 1 << 30)
        self.make_style()
        self.make_options()
        motifs: list[Callable[[], None]] = [
            getattr(self, f"motif_{name}") for name, needs in MOTIFS.items() if needs <= self.features
        ]
        self.step(self.seconds(0, 12), "emit", self.integer(1, 5), 0.1)
        for _ in range(self.integer(1, 3)):
            for _ in range(self.integer(0, 3)):
                self.one()
            if motifs:
                self.choice(motifs)()
        for _ in range(self.integer(0, 4)):
            self.one()
        return Program(seed=seed, style=Style(**self.style), options=Options(**self.options), steps=tuple(self.steps))

    def make_style(self) -> None:
        style = self.style
        for cursors, feature, percent in (
            ("opaque", "opaque", 15),
            ("none", "no_cursors", 12),
            ("some", "some_cursors", 12),
            ("grouped", "grouped", 10),
        ):
            if self.on(feature, percent):
                style["cursors"] = cursors
                break
        if self.on("live_first", 25):
            style["order"] = "live_first"
            style["replay_delay"] = self.choice((0.0, 0.5, 3.0))
            if self.on("late_replay", 20):
                style["replay_delay"] = 12.0
        elif self.on("interleaved", 25):
            style["order"] = "interleaved"
        if self.on("paged", 30):
            style["page"] = self.integer(1, 12)
            style["pause"] = self.choice((0.5, 1.0, 3.0, 6.0))
        if self.on("coarse", 15):
            style["coarse"] = self.integer(1, 20)
        if self.on("inclusive", 15):
            style["inclusive"] = True
        if self.on("truncated", 6):
            style["retention"] = self.integer(3, 20)
        elif self.on("forgotten", 6):
            style["retention"] = self.integer(3, 20)
            style["on_forgotten"] = "refuse"
        if self.on("lag", 15):
            style["lag"] = self.choice((0.05, 1.0, 3.0))
        style["duplicates"] = self.on("duplicates", 15)
        style["odd_ids"] = self.on("odd_ids", 25)
        style["spellings"] = self.on("spellings", 20)
        if self.on("no_heartbeats", 4):
            style["heartbeat"] = 0.0
        elif self.chance(30):
            style["heartbeat"] = self.choice((5.0, 25.0))
        style["greets"] = not self.chance(25)
        if self.on("fragments", 10):
            style["chunk"] = self.choice((5, 37, 100))
        if self.on("small_buffers", 20):
            style["window"] = self.choice((1_024, 8_192))
        style["drop_unread"] = self.chance(25)
        style["latency"] = self.choice((0.0, 0.0, 0.02, 0.3))

    def make_options(self) -> None:
        options = self.options
        if self.on("no_store", 15):
            options["position"] = "none"
        elif self.on("own_position", 12):
            options["position"] = "own"
        if self.on("failing", 15):
            options["consumer"] = self.choice(("delivery", "batches", "process"))
            options["workers"] = self.integer(1, 4)
        elif self.on("workers", 12) and options.get("position") != "own":
            options["consumer"] = "workers"
            options["workers"] = self.integer(2, 4)
        if self.on("slow", 15):
            options["work"] = self.choice((0.01, 0.2, 1.0))
        if self.on("small_buffers", 25):
            options["buffered"] = self.integer(1, 8)
            if self.chance(40):
                options["unsettled"] = self.integer(1, 12)
            if self.chance(40):
                options["unsaved"] = self.integer(1, 12)
            if self.on("big_events", 30):
                options["buffered_bytes"] = 20_000
        options["filters"] = self.on("filters", 8)
        options["acknowledge"] = not self.chance(60)
        if self.on("repair", 10):
            self.make_repair()
        options["debug"] = self.on("secrets", 15)

    def make_repair(self) -> None:
        self.options["repair"] = True
        self.style["log_lag"] = self.choice((0.0, 30.0, 90.0))
        self.style["foreign_rows"] = self.on("short_log", 40)

    # ---- single steps ------------------------------------------------------------------------------------------

    def pause(self) -> float:
        return self.choice((0.0, 0.05, 1.0, 4.0, 11.0, 20.0)) + self.seconds(0, 0.5)

    def one(self) -> None:
        """Draw a single step."""
        kinds = [kind for kind, (_, needs) in STEPS.items() if needs <= self.features]
        kind = self.choice([name for name in kinds for _ in range(STEPS[name][0])])
        getattr(self, f"one_{kind}")(self.pause())

    def one_emit(self, after: float) -> None:
        self.step(after, "emit", self.integer(1, 12), self.choice((0.0, 0.1, 0.7)))

    def one_big(self, after: float) -> None:
        self.step(after, "emit", self.integer(1, 4), 0.1, self.choice((5_000, 60_000)))

    def one_close(self, after: float) -> None:
        self.step(after, "close", self.choice(CLOSE_CODES), self.chance(70), self.choice(("all", "newest", "oldest")))

    def one_reset(self, after: float) -> None:
        self.step(after, "reset", self.choice(("all", "newest", "oldest")))

    def one_silence(self, after: float) -> None:
        self.step(after, "silence", self.choice(("all", "newest", "oldest")))

    def one_drain(self, after: float) -> None:
        promised = self.choice((True, None)) if not self.on("unpromised", 30) else False
        advice = self.choice((500, 0, 5_000, None, 1e12, -3, "soon"))
        close_after = self.choice((1.0, 0.1, 6.0, 40.0, 90.0, None))
        self.step(after, "drain", advice, promised, close_after, self.choice(("all", "newest")))
        if self.chance(25):
            self.step(self.seconds(0, 3), "drain", advice, promised, close_after, "all")

    def one_token(self, after: float) -> None:
        kind = self.choice(("503", "500", "429", "408", "302", "garbage", "hang", "reset"))
        self.step(after, "token", kind, self.choice((1.0, 20.0, 90.0)), self.choice((None, 2, 500)))

    def one_token_4xx(self, after: float) -> None:
        kind = self.choice(("401", "403", "404", "400", "405", "409", "421", "431", "451"))
        self.step(after, "token", kind, self.choice((1.0, 5.0)), None)

    def one_handshake(self, after: float) -> None:
        kind = self.choice(("503", "502", "429", "401", "404", "200", "garbage", "hang", "close", "reset"))
        self.step(after, "handshake", kind, self.choice((1.0, 20.0)), self.choice((None, 2, 500)))

    def one_connect(self, after: float) -> None:
        self.step(after, "connect", self.choice(("refuse", "hang")), self.choice((1.0, 25.0)))

    def one_garbage(self, after: float) -> None:
        self.step(after, "garbage", self.integer(0, len(GARBAGE) - 1))

    def one_stall(self, after: float) -> None:
        self.step(after, "stall", self.choice((2.0, 15.0, 45.0)))

    def one_fail(self, after: float) -> None:
        self.step(after, "fail", self.integer(1, 3))

    def one_stop(self, after: float) -> None:
        self.step(after, "stop", self.choice((0.0, 1.0, 10.0)))

    def one_leave(self, after: float) -> None:
        self.step(after, "leave", self.integer(0, 120), self.choice((0.0, 1.0, 10.0)))

    def one_crash(self, after: float) -> None:
        self.step(after, "crash", self.integer(0, 120), self.choice((0.0, 1.0, 10.0)))

    def one_store(self, after: float) -> None:
        kind = self.choice(("fail", "odd", "hang", "slow", "lie_failed", "lie_done"))
        self.step(after, "store", kind, self.choice((1.0, 12.0, 40.0)))

    def one_wall(self, after: float) -> None:
        self.step(after, "wall", self.choice((-5.0, 5.0, -3_600.0, 3_600.0)))

    def one_block(self, after: float) -> None:
        self.step(after, "block", self.choice((5.0, 31.0, 45.0, 100.0)))

    # ---- motifs: what defects were found with, with other times ------------------------------------------------------

    def motif_outage(self) -> None:
        """Nothing can be reached for a while, and events are sent meanwhile."""
        length = self.choice((3.0, 20.0, 60.0))
        how, asked = self.choice((("503", None), ("reset", None), ("hang", None), ("503", 500), ("429", 20)))
        self.step(self.pause(), "token", how, length, asked)
        self.step(0, "reset", "all")
        self.step(self.seconds(0, length / 2), "emit", self.integer(1, 20), 0.1)
        self.step(length / 2, "emit", self.integer(0, 5), 0.1)

    def motif_backlog(self) -> None:
        """A backlog is replayed, with live events meanwhile, and the connection breaks in the middle of it."""
        self.motif_outage()
        for _ in range(self.integer(2, 8)):
            self.step(self.seconds(0.5, 4), "emit", self.integer(1, 3), 0.3)
        self.step(self.seconds(0, 4), "reset", "all")
        if self.chance(50) and "crash" in self.features:
            self.step(self.seconds(0, 2), "crash", self.integer(0, 100), 0.0)
        self.step(self.seconds(0, 3), "emit", 2, 0.1)

    def motif_slow_page(self) -> None:
        """A replay that takes longer than stable_after, with live events between its pages."""
        self.style["page"] = self.integer(3, 10)
        self.style["pause"] = self.choice((3.0, 2.0, 5.0))
        self.style["order"] = "interleaved"
        self.motif_backlog()

    def motif_short_lives(self) -> None:
        """A backlog, and connections that live for seconds."""
        self.style["page"] = self.integer(4, 12)
        self.style["pause"] = 1.0
        if "interleaved" in self.features:
            self.style["order"] = self.choice(("before", "interleaved"))
        self.step(self.pause(), "token", "503", 30.0, None)
        self.step(0, "reset", "all")
        self.step(1.0, "emit", 150, 0.1)
        self.step(15.0, "lives", self.seconds(3, 9), self.seconds(240, 360), self.choice(("reset", "close")))
        for _ in range(6):
            self.step(40.0, "emit", 3, 1.0)

    def motif_refused(self) -> None:
        """The cursor is refused for minutes, in changing ways."""
        if self.chance(50) and {"small_buffers", "stalls"} <= self.features:
            self.options["buffered"] = self.integer(1, 4)
        self.step(self.pause(), "refuse", 600.0, self.choice((1008, 1011, 1000, 4000)), self.chance(50))
        self.step(0, "reset", "all")
        for _ in range(self.integer(2, 8)):
            self.step(self.seconds(2, 15), "emit", self.integer(1, 6), 0.2)
            if self.chance(40) and "stalls" in self.features:
                self.step(0, "stall", self.seconds(5, 40))
            if self.chance(40):
                self.step(self.seconds(0, 6), "reset", self.choice(("oldest", "newest", "all")))
        self.step(self.seconds(0, 60), "emit", 3, 0.5)

    def motif_check_stuck(self) -> None:
        """A probe connection is well, and connections with the cursor fail in ways that say nothing about it."""
        self.step(self.pause(), "refuse", self.seconds(8, 25), 1011, False)
        self.step(0, "reset", "all")
        for _ in range(self.integer(1, 3)):
            self.step(self.seconds(1, 8), "emit", 2, 0.2)
        how = self.choice(("token", "handshake", "refuse"))
        if how == "refuse":
            self.step(self.seconds(0, 6), "refuse", 900.0, "reset", True)
        else:
            self.step(self.seconds(0, 6), how, "503", 900.0, None)
        for _ in range(12):
            self.step(self.choice((20.0, 45.0)), "emit", 1, 0.1)

    def motif_probe_reset(self) -> None:
        """The probe connection of a cursor check is reset while its events wait for space."""
        self.options["buffered"] = self.integer(1, 3)
        self.options["consumer"] = "loop"
        self.step(self.pause(), "refuse", 600.0, self.choice((1011, 1008)), False)
        self.step(0, "reset", "all")
        self.step(self.seconds(1, 6), "emit", 4, 0.5)
        self.step(0, "stall", 90.0)
        for _ in range(6):
            self.step(self.seconds(1, 5), "emit", 4, 0.3)
        for _ in range(self.integer(1, 4)):
            self.step(self.seconds(3, 15), "reset", self.choice(("oldest", "newest", "all")))

    def motif_replay_down(self) -> None:
        """The replay service is down, shorter than a cursor may be given up for."""
        length = self.choice((20.0, 8.0, 40.0))
        self.step(self.pause(), "refuse", length, self.choice((1011, 1013)), self.chance(30))
        self.step(0, "reset", "all")
        self.step(self.seconds(0, 3), "emit", self.integer(3, 20), 0.1)
        self.step(self.seconds(5, 20), "emit", self.integer(1, 5), 0.3)
        if self.chance(40):
            # The candidate is given its replay, and closed.
            self.step(self.seconds(0, 10), "sick", self.seconds(1, 20))

    def motif_spans(self) -> None:
        """A loss that no resumption fills: its time must lie in the gap."""
        if "no_cursors" in self.features and self.chance(60):
            self.style["cursors"] = "none"
        elif "unpromised" in self.features:
            self.step(self.pause(), "drain", 500, False, self.choice((0.1, 1.0)), "all")
        if self.chance(30) and "wall_jumps" in self.features:
            self.step(self.seconds(0, 5), "wall", self.choice((-3_600.0, -20.0, 20.0)))
        how = self.choice(("reset", "silence", "token"))
        if how == "token":
            self.step(self.pause(), "token", "503", self.seconds(2, 40), None)
            self.step(0, "reset", "all")
        else:
            self.step(self.pause(), how, "all")
        self.step(self.seconds(0, 1), "emit", self.integer(1, 5), 0.2)
        self.step(self.seconds(0, 20), "emit", self.integer(0, 3), 0.2)

    def motif_span_pause(self) -> None:
        """A connection dies while the client does not read: the time of its own pause is no sign of life."""
        if "no_cursors" in self.features:
            self.style["cursors"] = "none"
        self.options["buffered"] = self.integer(1, 4)
        self.step(self.pause(), "stall", self.seconds(20, 60))
        self.step(0.1, "emit", 8, 0.0)
        self.step(self.seconds(0.5, 3), "silence", "all")
        self.step(self.seconds(0.5, 10), "emit", 3, 1.0)
        self.step(60.0, "emit", 1, 0.1)

    def motif_span_crash(self) -> None:
        """A process dies long after the last frame, and what was sent between cannot be replayed."""
        if "no_cursors" in self.features:
            self.style["cursors"] = "none"
        self.step(self.pause(), "silence", "all")
        self.step(self.seconds(0.5, 8), "emit", 3, 0.5)
        self.step(self.seconds(3, 12), "crash" if self.chance(50) else "leave", self.integer(0, 50), 0.0)

    def motif_unpromised_young(self) -> None:
        """No resumption is promised, and the replacement dies young."""
        self.step(self.pause(), "drain", 500, False, self.choice((0.1, 1.0, 3.0)), "all")
        self.step(self.seconds(0.6, 4), "reset", "all")
        self.step(self.seconds(0, 0.2), "emit", self.integer(2, 5), 0.0)
        if self.chance(40):
            self.step(self.seconds(0.1, 3), "reset", "all")
            self.step(0, "emit", 2, 0.0)

    def motif_busy_overlap(self) -> None:
        """A busy program: the old connection has unread events when its overlap ends."""
        self.options["buffered"] = self.integer(1, 4)
        self.options["consumer"] = "loop"
        if "no_cursors" in self.features and self.chance(50):
            self.style["cursors"] = "none"
        self.step(self.pause(), "drain", 3_000, False, None, "all")
        self.step(self.seconds(0.1, 1), "stall", self.choice((75.0, 100.0, 20.0)))
        self.step(0.1, "emit", self.integer(10, 40), 0.01)
        if self.chance(50):
            self.step(self.seconds(0, 3), "emit", 3, 0.2)
        self.step(self.seconds(5, 20), "emit", self.integer(0, 3), 0.2)
        self.step(90.0, "emit", 1, 0.1)

    def motif_4xx_live(self) -> None:
        """A client that was live meets a 4xx of the token endpoint, single or in an outage that is otherwise 503."""
        self.step(self.pause(), "emit", 1, 0.1)
        self.options["auth_grace"] = 60.0
        if self.chance(50):
            self.step(self.seconds(1, 14), "token", self.choice(FATAL_STATUSES), self.seconds(0.5, 10), None)
            self.step(0, "reset", "all")
            self.step(15.0, "emit", 1, 0.1)
        else:
            self.step(12.0, "token", self.choice(("401", "403")), 4.0, None)
            self.step(0, "reset", "all")
            self.step(4.0, "token", "503", self.choice((80.0, 120.0)), None)
            self.step(self.choice((70.0, 100.0)), "token", self.choice(("401", "403")), 25.0, None)
            self.step(30.0, "emit", 1, 0.1)

    def motif_blocked(self) -> None:
        """The program blocks the event loop; the server was well all the time."""
        self.step(self.pause() + 12, "emit", 1, 0.1)
        self.step(self.seconds(1, 5), "block", self.choice((31.0, 45.0, 100.0)))
        self.step(self.seconds(0, 5), "emit", 1, 0.1)

    def motif_repair(self) -> None:
        """A gap that the log can fill, where the log lags or nothing was delivered near it."""
        if not self.options.get("repair"):
            self.make_repair()
        self.style["cursors"] = "none"
        quiet = self.chance(40)
        self.step(200.0 if quiet else self.pause(), "token", "503", self.choice((10.0, 40.0)), None)
        self.step(0, "reset", "all")
        self.step(self.seconds(1, 8), "emit", self.integer(1, 5), 0.2)
        self.step(200.0 if quiet else self.seconds(8, 40), "emit", 1, 0.1)

    def motif_deaf(self) -> None:
        """A connection loses its subscription, and keeps its heartbeats."""
        self.style["heartbeat"] = 25.0
        self.step(self.pause() + 12, "deaf", "all")
        self.step(1.0, "emit", 3, 0.5)

    def motif_start_cut(self) -> None:
        """A later start is cut short, or its position cannot be read."""
        how = self.choice(("slow", "unreadable", "hang", "newer", "fail"))
        self.step(self.pause() + 12, "emit", 3, 0.1)
        self.step(2.0, "store", how, self.choice((20.0, 3.0)))
        self.step(0, "cut", self.choice(("leave", "crash")), self.seconds(0, 3))
        self.step(0, "leave", 0, 0.0)
        self.step(self.seconds(0, 5), "emit", 3, 0.1)

    def motif_store(self) -> None:
        """A store fails for a while, and the process ends in the middle."""
        kind = self.choice(("fail", "odd", "hang", "slow", "lie_failed", "lie_done", "owned", "lost", "vanish"))
        self.step(self.pause(), "store", kind, self.choice((5.0, 40.0, 90.0)))
        self.step(0.2, "emit", self.integer(3, 30), 0.05)
        if "crash" in self.features and self.chance(60):
            self.step(self.seconds(0, 5), "crash", self.integer(0, 100), 1.0)
        elif "leave" in self.features:
            self.step(self.seconds(0, 5), "leave", self.integer(0, 100), 1.0)
        self.step(1.0, "emit", 3, 0.05)

    def motif_failing(self) -> None:
        """Deliveries that fail."""
        if self.options.get("position") == "own":
            del self.options["position"]
        self.options["consumer"] = self.choice(("delivery", "workers", "batches", "process"))
        self.options["workers"] = 2
        self.step(self.pause(), "fail", self.integer(1, 4))
        self.step(0.1, "emit", self.integer(1, 8), self.choice((0.0, 0.3)))

    def motif_crashes(self) -> None:
        """Crashes, one after the other, while events come."""
        for _ in range(self.integer(1, 4)):
            self.step(self.seconds(0, 3), "emit", self.integer(1, 10), self.choice((0.0, 0.02)))
            op = "crash" if "crash" in self.features and self.chance(70) else "leave"
            self.step(self.seconds(0, 0.4), op, self.integer(0, 150), self.choice((0.0, 0.0, 3.0)))

    def motif_drains(self) -> None:
        """Chained drains."""
        for _ in range(self.integer(1, 5)):
            self.step(
                self.seconds(0, 6), "drain", self.choice((500, 100, None)), True, self.choice((0.6, 2.0, None)), "all"
            )
            self.step(self.seconds(0, 1), "emit", self.integer(0, 5), 0.1)

    def motif_progress(self) -> None:
        """Connections that bring new events and are reset, several times."""
        for _ in range(self.integer(5, 9)):
            self.step(self.seconds(1.0, 2.0), "emit", 2, 0.05)
            self.step(self.seconds(0.5, 1.0), "reset", "all")


CLOSE_CODES = (1000, 1001, 1002, 1003, 1006, 1007, 1008, 1009, 1011, 1012, 1013, 1014, 3000, 4001, 4401, 4999, None)
FATAL_STATUSES = ("404", "400", "405", "409", "421", "431", "451", "401", "403")
GARBAGE: tuple[str, ...] = (
    "",
    "nonsense",
    "[]",
    "null",
    "{}",
    '{"type":"control.unheard_of","x":1}',
    '{"type":"subscribed","channel":"team"}',
    '{"type":"error","code":7}',
    '{"eventType":7,"id":"x"}',
    '{"eventType":"","message":{}}',
    '{"type":null,"eventType":null,"id":null}',
    '{"type":"heartbeat","eventType":"heartbeat"}',
    "[" * 2_000,
    '{"type":"\\ud800"}',
    '{"type":"control.draining","eventType":"control.draining","connectionId":7,"retryAfterMs":[]}',
)
"""Frames that are no event. The last one is a drain notice that names itself twice."""

STEPS: dict[str, tuple[int, frozenset[str]]] = {
    "emit": (8, frozenset()),
    "big": (1, frozenset({"big_events"})),
    "close": (3, frozenset({"closes"})),
    "reset": (3, frozenset({"resets"})),
    "silence": (2, frozenset({"silence"})),
    "drain": (4, frozenset({"drains"})),
    "token": (2, frozenset({"token_faults"})),
    "token_4xx": (1, frozenset({"token_4xx"})),
    "handshake": (2, frozenset({"handshake_faults"})),
    "connect": (1, frozenset({"connect_faults"})),
    "garbage": (1, frozenset({"garbage"})),
    "stall": (2, frozenset({"stalls"})),
    "fail": (1, frozenset({"failing"})),
    "stop": (1, frozenset({"stop"})),
    "leave": (1, frozenset({"leave"})),
    "crash": (2, frozenset({"crash"})),
    "store": (2, frozenset({"store_faults"})),
    "wall": (1, frozenset({"wall_jumps"})),
    "block": (1, frozenset({"blocked"})),
}
MOTIFS: dict[str, frozenset[str]] = {
    "outage": frozenset({"token_faults"}),
    "backlog": frozenset({"token_faults", "resets"}),
    "crashes": frozenset({"crash"}),
    "drains": frozenset({"drains"}),
    "slow_page": frozenset({"token_faults", "resets", "paged", "interleaved"}),
    "short_lives": frozenset({"short_lives", "token_faults", "paged"}),
    "refused": frozenset({"refused", "resets"}),
    "check_stuck": frozenset({"refused", "replay_down", "token_faults", "handshake_faults"}),
    "probe_reset": frozenset({"refused", "stalls", "small_buffers"}),
    "replay_down": frozenset({"replay_down"}),
    "spans": frozenset({"resets", "silence"}),
    "span_pause": frozenset({"silence", "stalls", "small_buffers", "no_cursors"}),
    "span_crash": frozenset({"silence", "crash", "no_cursors"}),
    "unpromised_young": frozenset({"unpromised", "resets"}),
    "busy_overlap": frozenset({"unpromised", "stalls", "small_buffers"}),
    "4xx_live": frozenset({"token_4xx", "resets"}),
    "blocked": frozenset({"blocked"}),
    "repair": frozenset({"repair", "no_cursors"}),
    "deaf": frozenset({"deaf", "long"}),
    "start_cut": frozenset({"start_cut", "store_faults"}),
    "store": frozenset({"store_faults"}),
    "progress": frozenset({"resets"}),
    "failing": frozenset({"failing", "workers"}),
}
"""Motifs, and the features that they need."""

ALL = frozenset(FEATURES)


def generate(draw: Draw, features: frozenset[str] = ALL) -> Program:
    """Draw a program that uses these features."""
    return _Maker(draw, features).make()


def of_seed(seed: int, features: frozenset[str] = ALL) -> Program:
    """Give the program of a seed."""
    return generate(Seeded(seed), features)


def simpler(program: Program) -> Iterator[Program]:
    """Give programs that are a little simpler than this one, the simplest first."""
    steps = program.steps
    size = len(steps) // 2
    while size >= 1:
        for start in range(0, len(steps), size):
            yield attrs.evolve(program, steps=steps[:start] + steps[start + size :])
        size //= 2
    for part in ("style", "options"):
        value = getattr(program, part)
        plain = type(value)()
        for field in attrs.fields(type(value)):
            default = getattr(plain, field.name)
            if getattr(value, field.name) != default:
                yield attrs.evolve(program, **{part: attrs.evolve(value, **{field.name: default})})
    for place, step in enumerate(steps):
        for after in {0.0, float(round(step.after))}:
            if after < step.after:
                changed = Step(after, step.op, *step.args)
                yield attrs.evolve(program, steps=(*steps[:place], changed, *steps[place + 1 :]))


def shrink(program: Program, fails: Callable[[Program], bool], tries: int = 400) -> Program:
    """Give a program that fails, too, and that no single step makes simpler, within so many tries."""
    while True:
        for candidate in simpler(program):
            tries -= 1
            if tries < 0:
                return program
            if fails(candidate):
                program = candidate
                break
        else:
            return program
