"""Write events into a database, in batches. Each event is written exactly once, even if the program is killed."""

import contextlib
import sqlite3

import trio

from kadoa_trio import Event, Position, open_realtime, stopping_on_signals


def prepare(database: sqlite3.Connection) -> Position | None:
    database.execute("CREATE TABLE IF NOT EXISTS events (id TEXT PRIMARY KEY, type TEXT, workflow TEXT)")
    database.execute("CREATE TABLE IF NOT EXISTS position (one INTEGER PRIMARY KEY CHECK (one = 1), json TEXT)")
    row = database.execute("SELECT json FROM position").fetchone()
    return None if row is None else Position.from_json(row[0])


def write(database: sqlite3.Connection, position: Position, events: tuple[Event, ...] = ()) -> None:
    with database:  # commits the events and the position, or neither
        database.executemany("INSERT INTO events VALUES (?, ?, ?)", [(e.id, e.type, e.workflow_id) for e in events])
        database.execute("INSERT OR REPLACE INTO position VALUES (1, ?)", (position.to_json(),))


async def main(path: str = "sink.db") -> None:
    with contextlib.closing(sqlite3.connect(path)) as database:
        async with open_realtime(resume_from=prepare(database)) as realtime, stopping_on_signals(realtime):
            write(database, realtime.position)  # so that a run that is killed early shows what it may have missed
            while True:
                try:
                    async with realtime.events.batch(max_events=500, within=0.2) as batch:
                        write(database, batch.position, batch.events)
                except sqlite3.OperationalError as exc:
                    print("the batch was not written; its events are delivered again after a wait:", exc)
                except trio.EndOfChannel:  # the client was stopped
                    break


if __name__ == "__main__":
    trio.run(main, restrict_keyboard_interrupt_to_checkpoints=True)
