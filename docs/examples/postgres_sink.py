"""Write events into PostgreSQL, in batches. Each event is written exactly once, even if the program is killed."""

import contextlib
import os

import psycopg
import trio

from kadoa_trio import Event, Position, open_realtime, stopping_on_signals


class Sink:
    def __init__(self, dsn: str) -> None:
        self.database = psycopg.connect(dsn, autocommit=True)  # a transaction is a block, as in write()
        self.database.execute("CREATE TABLE IF NOT EXISTS events (id TEXT PRIMARY KEY, type TEXT, workflow TEXT)")
        self.database.execute("CREATE TABLE IF NOT EXISTS position (consumer TEXT PRIMARY KEY, json TEXT NOT NULL)")
        self.saved = self.load()

    def load(self) -> str | None:
        row = self.database.execute("SELECT json FROM position WHERE consumer = 'sink' FOR UPDATE").fetchone()
        return None if row is None else str(row[0])

    def write(self, position: Position, events: tuple[Event, ...] = ()) -> None:
        json = position.to_json()
        with self.database.transaction(), self.database.cursor() as cursor:
            if self.load() != self.saved:  # the row is locked: another process waits here until the commit
                raise RuntimeError("another process has written events, so this one ends")
            rows = [(event.id, event.type, event.workflow_id) for event in events]
            cursor.executemany("INSERT INTO events VALUES (%s, %s, %s)", rows)
            cursor.execute(
                "INSERT INTO position VALUES ('sink', %s) ON CONFLICT (consumer) DO UPDATE SET json = EXCLUDED.json",
                (json,),
            )
        self.saved = json


async def main(dsn: str) -> None:
    sink = await trio.to_thread.run_sync(Sink, dsn)
    with contextlib.closing(sink.database):
        resume_from = None if sink.saved is None else Position.from_json(sink.saved)
        async with open_realtime(resume_from=resume_from) as realtime, stopping_on_signals(realtime):
            await trio.to_thread.run_sync(sink.write, realtime.position)
            with contextlib.suppress(trio.EndOfChannel):  # raised when the client was stopped
                while True:
                    # If the transaction fails, the program ends, because the commit may have succeeded.
                    async with realtime.events.batch(max_events=500, within=0.2) as batch:
                        await trio.to_thread.run_sync(sink.write, batch.position, batch.events)


if __name__ == "__main__":
    trio.run(main, os.environ["DATABASE_URL"], restrict_keyboard_interrupt_to_checkpoints=True)
