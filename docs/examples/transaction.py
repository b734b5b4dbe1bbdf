"""Commit the effect of an event and the position together, so that each event has its effect exactly once."""

import contextlib
import sqlite3

import trio

from kadoa_trio import Position, open_realtime, stopping_on_signals


def prepare(database: sqlite3.Connection) -> Position | None:
    with database:
        database.execute("CREATE TABLE IF NOT EXISTS failures (event TEXT PRIMARY KEY, type TEXT)")
        database.execute("CREATE TABLE IF NOT EXISTS position (one INTEGER PRIMARY KEY CHECK (one = 1), json TEXT)")
    row = database.execute("SELECT json FROM position").fetchone()
    return None if row is None else Position.from_json(row[0])


def save(database: sqlite3.Connection, position: Position) -> None:
    database.execute("INSERT OR REPLACE INTO position VALUES (1, ?)", (position.to_json(),))


async def main(path: str = "mine.db") -> None:
    with contextlib.closing(sqlite3.connect(path)) as database:
        async with open_realtime(resume_from=prepare(database)) as realtime, stopping_on_signals(realtime):
            # Before the first event: after a crash without any position, the next run could not know what it missed.
            with database:
                save(database, realtime.position)
            async for event in realtime.events:
                with database:  # commits both, or neither
                    database.execute("INSERT INTO failures VALUES (?, ?)", (event.id, event.type))
                    save(database, realtime.position_after(event))


if __name__ == "__main__":
    trio.run(main, restrict_keyboard_interrupt_to_checkpoints=True)
