"""The project itself: one version, a reference of every public name, and examples that run."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import operator
import re
import runpy
import signal
import sqlite3
import sys
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest
import trio
import trio.testing
from _processes import finished, running

import kadoa_trio
import kadoa_trio.consuming
import kadoa_trio.notices
import kadoa_trio.workspace
from kadoa_trio import ConfigurationError, SQLiteCursorStore
from kadoa_trio.testing import open_simulated_kadoa

T = TypeVar("T")

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(kadoa_trio.__file__).parent
PUBLIC = (kadoa_trio, kadoa_trio.consuming, kadoa_trio.notices, kadoa_trio.workspace)


def test_every_public_name_exists() -> None:
    for module in PUBLIC:
        for name in module.__all__:
            assert hasattr(module, name)
    assert len(kadoa_trio.__all__) < 50, (
        "the top level holds everyday names; other names belong to kadoa_trio.notices or kadoa_trio.workspace"
    )
    assert (PACKAGE / "py.typed").exists()


@pytest.mark.skipif(not (ROOT / "docs").exists(), reason="the documentation is not beside an installed package")
def test_changelog_begins_with_this_version() -> None:
    heading = re.search(r"^## (\S+)", (ROOT / "docs" / "changelog.md").read_text(), re.MULTILINE)
    assert heading is not None
    assert heading[1] == kadoa_trio.__version__


def test_rehearsal_example_runs() -> None:
    example = runpy.run_path(str(ROOT / "docs" / "examples" / "rehearsal.py"))
    got = trio.run(example["main"], clock=trio.testing.MockClock(autojump_threshold=0))
    assert got == ["workflow_failed", "workflow_recovered"]


@pytest.mark.parametrize("example", ["first", "workers", "service", "fan_out", "filters", "monitor"])
async def test_example_prints_events(
    example: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    code = runpy.run_path(str(ROOT / "docs" / "examples" / f"{example}.py"))
    async with open_simulated_kadoa(loopback=True) as kadoa:
        for name, value in kadoa.environment.items():
            monkeypatch.setenv(name, value)
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(code["main"])
                await kadoa.wait_subscribed(1)
                kadoa.publish("workflow_failed")
                text = ""
                while "failed" not in text:
                    await trio.sleep(0.01)  # no event reports new output
                    text += capsys.readouterr().out
                nursery.cancel_scope.cancel()


async def test_each_effect_happens_once_over_three_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code = runpy.run_path(str(ROOT / "docs" / "examples" / "transaction.py"))
    path = tmp_path / "mine.db"

    def effects() -> list[str]:
        with contextlib.closing(sqlite3.connect(path)) as database:
            return [row[0] for row in database.execute("SELECT event FROM failures ORDER BY rowid")]

    async with open_simulated_kadoa(loopback=True) as kadoa:
        for name, value in kadoa.environment.items():
            monkeypatch.setenv(name, value)
        for run in range(3):
            with trio.fail_after(30):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(code["main"], str(path))
                    await kadoa.wait_subscribed(run + 1)
                    kadoa.publish_many(5)
                    while len(effects()) < len(kadoa.published):  # noqa: ASYNC110  # a database has no event
                        await trio.sleep(0.02)
                    nursery.cancel_scope.cancel()
            kadoa.publish_many(2)  # while no program is running
        assert effects() == [event.id for event in kadoa.published[:-2]]


async def test_program_with_its_own_database_has_a_position_before_its_first_event(
    autojump_clock: trio.testing.MockClock, tmp_path: Path
) -> None:
    code = runpy.run_path(str(ROOT / "docs" / "examples" / "transaction.py"))
    path = tmp_path / "mine.db"
    async with open_simulated_kadoa() as kadoa:
        with kadoa.as_default():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(code["main"], str(path))
                await kadoa.wait_subscribed(1)
                await trio.sleep(1)
                nursery.cancel_scope.cancel()  # as a crash: nothing was committed since
    with contextlib.closing(sqlite3.connect(path)) as database:
        position = code["prepare"](database)
    assert position is not None
    assert position.cursor_at is not None


async def test_workspace_is_set_up_by_a_program(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = runpy.run_path(str(ROOT / "docs" / "examples" / "setup_workspace.py"))
    async with open_simulated_kadoa(loopback=True) as kadoa:
        kadoa.workspace.clear()
        with kadoa.as_default(), trio.fail_after(30):
            await code["main"]()
        assert "will make the WebSocket channel" in capsys.readouterr().out
        assert kadoa.workspace.streams("workflow_finished", None)


async def run_asyncio(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run an asyncio program in a thread."""
    return await trio.to_thread.run_sync(lambda: asyncio.run(main()), abandon_on_cancel=True)


async def test_asyncio_program_receives_again_what_it_had_not_handled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code = runpy.run_path(str(ROOT / "docs" / "examples" / "asyncio_bridge.py"))
    store = SQLiteCursorStore(tmp_path / "positions.db")

    async def receive(count: int) -> list[str]:
        received: list[str] = []
        async with contextlib.aclosing(code["receive_events"](cursor_store=store)) as events:
            async for event in events:
                received.append(event.id)
                if len(received) == count:
                    break  # this event is not marked as handled
        return received

    async with open_simulated_kadoa(loopback=True) as kadoa:
        for name, value in kadoa.environment.items():
            monkeypatch.setenv(name, value)
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:

                async def publish() -> None:
                    await kadoa.wait_subscribed(1)
                    kadoa.publish_many(5)

                nursery.start_soon(publish)
                first = await run_asyncio(lambda: receive(3))
            ids = [event.id for event in kadoa.published]
            assert first == ids[:3]
            assert await run_asyncio(lambda: receive(3)) == ids[2:]


async def test_asyncio_program_gets_the_error_of_the_client() -> None:
    code = runpy.run_path(str(ROOT / "docs" / "examples" / "asyncio_bridge.py"))

    async def receive() -> None:
        async for _event in code["receive_events"](resume_from=""):
            pass

    with trio.fail_after(60), pytest.raises(ConfigurationError, match="resume_from"):
        await run_asyncio(receive)


@pytest.mark.parametrize("cancelled", [True, False])
async def test_asyncio_program_whose_threads_are_all_busy_is_not_blocked(cancelled: bool) -> None:
    code = runpy.run_path(str(ROOT / "docs" / "examples" / "asyncio_bridge.py"))

    async def receive() -> None:
        async for _event in code["receive_events"](resume_from=""):
            pass

    async def run() -> None:
        loop, free = asyncio.get_running_loop(), threading.Event()
        loop.set_default_executor(ThreadPoolExecutor(1))
        busy = loop.run_in_executor(None, free.wait, 5)
        task = asyncio.create_task(receive())
        await asyncio.sleep(0)
        if cancelled:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError, ConfigurationError):
            await task
        assert not busy.done()
        free.set()
        assert await busy

    with trio.fail_after(60):
        await run_asyncio(run)


async def test_monitor_alerts_of_a_gap_and_of_a_long_outage(
    autojump_clock: trio.testing.MockClock, capsys: pytest.CaptureFixture[str]
) -> None:
    code = runpy.run_path(str(ROOT / "docs" / "examples" / "monitor.py"))
    async with open_simulated_kadoa() as kadoa, trio.open_nursery() as nursery:
        with kadoa.as_default():
            nursery.start_soon(code["main"])
            await kadoa.wait_subscribed(1)
        await trio.sleep(30)
        kadoa.newest.reset()  # without a cursor to resume from
        await trio.sleep(60)
        kadoa.faults.refuse_connections = True
        kadoa.newest.reset()
        await trio.sleep(300)
        nursery.cancel_scope.cancel()
    text = capsys.readouterr().out
    assert "ALERT possible gap" in text
    assert "ALERT not healthy for 120 s: no connection is live for" in text
    assert "live=1" in text
    assert "live=0" in text


@pytest.mark.skipif(not (ROOT / "docs").exists(), reason="the documentation is not beside an installed package")
def test_every_example_is_shown_and_run() -> None:
    pages = "".join(page.read_text() for page in (ROOT / "docs").rglob("*.md"))
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for example in (ROOT / "docs" / "examples").rglob("*.py"):
        assert f"examples/{example.relative_to(ROOT / 'docs' / 'examples')}" in pages
        assert example.parent.name == "pager" or f'"{example.stem}"' in tests or f'"{example.name}"' in tests


@pytest.mark.skipif(not (ROOT / "docs").exists(), reason="the documentation is not beside an installed package")
def test_every_link_of_the_readme_leads_to_a_file() -> None:
    links = re.findall(r"\]\(((?!https?:)[^)#]+)", (ROOT / "README.md").read_text())
    assert len(links) > 15
    assert not [link for link in links if not (ROOT / link).exists()]


@pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="the README is not beside an installed package")
async def test_program_in_the_readme_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = re.search(r"```python\n(import trio.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert program is not None
    path = tmp_path / "program.py"
    path.write_text(re.sub(r"^trio\.run\(.*\)$", "", program[1], flags=re.MULTILINE))
    code = runpy.run_path(str(path))
    async with open_simulated_kadoa(loopback=True) as kadoa:
        with kadoa.as_default(), trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(code["main"])
                await kadoa.wait_subscribed(1)
                kadoa.publish("workflow_failed", workflow_id="wf_5")
                kadoa.publish("workflow_data_change")
                text = ""
                while "1 records differ" not in text:
                    await trio.sleep(0.01)
                    text += capsys.readouterr().out
                assert "wf_5 failed: The page has changed" in text
                nursery.cancel_scope.cancel()


@pytest.mark.skipif(not (ROOT / "docs").exists(), reason="the documentation is not beside an installed package")
def test_every_public_name_is_in_the_reference() -> None:
    text = (ROOT / "docs" / "reference.md").read_text()
    for name in {*kadoa_trio.__all__, *kadoa_trio.workspace.__all__} - {"__version__"}:
        assert re.search(rf"\b{name}\b", text), name
    # Documented as whole modules.
    assert "automodule:: kadoa_trio.notices\n   :members:\n" in text
    assert "automodule:: kadoa_trio.testing\n" in text
    assert "automodule:: kadoa_trio.testing.strategies\n" in text


@pytest.mark.skipif(not (ROOT / "docs").exists(), reason="the documentation is not beside an installed package")
def test_page_on_monitoring_says_what_every_notice_means() -> None:
    text = (ROOT / "docs" / "howto" / "monitoring.md").read_text()
    for name in set(kadoa_trio.notices.__all__) - {"ConnectionStatus", "Notice", "State"}:
        assert f"`{name}`" in text, name


@pytest.mark.skipif(not (ROOT / "docs").exists(), reason="the documentation is not beside an installed package")
def test_every_step_of_the_design_names_a_function_that_exists() -> None:
    text = (ROOT / "docs" / "design.md").read_text()
    steps = re.findall(r"^\| .* \| `([\w.]+)` \| `([\w.]+)` \|$", text, re.MULTILINE)
    assert len(steps) > 20
    for module, function in steps:
        operator.attrgetter(function)(importlib.import_module(f"kadoa_trio.{module}"))


@pytest.mark.skipif(not (ROOT / "docs").exists(), reason="the documentation is not beside an installed package")
def test_every_file_that_contributors_are_sent_to_exists() -> None:
    text = (ROOT / "docs" / "contributing.md").read_text()
    named = set(re.findall(r"`((?:kadoa_trio|tests|docs)/[\w./]+)`", text))
    assert len(named) > 20
    assert not [path for path in named if not (ROOT / path).exists()]


@pytest.mark.skipif(not (ROOT / "docs").exists(), reason="the documentation is not beside an installed package")
def test_every_program_of_the_documentation_keeps_ctrl_c_out_of_spawning() -> None:
    programs = [(ROOT / "README.md").read_text(), *(page.read_text() for page in (ROOT / "docs").rglob("*.md"))]
    examples = (path for path in (ROOT / "docs" / "examples").rglob("*.py") if not path.stem.startswith("test_"))
    programs += [path.read_text() for path in examples]
    runs = 0
    for text in programs:
        for call in re.findall(r"^ *(?:print\()?\s*trio\.run\([^#`]*?\)\n", text, re.MULTILINE):
            assert "restrict_keyboard_interrupt_to_checkpoints=" in call, call
            runs += 1
    assert runs > 10


@pytest.mark.skipif(not (ROOT / "docs").exists(), reason="the documentation is not beside an installed package")
async def test_program_with_the_known_problem_of_trio_hangs(tmp_path: Path) -> None:
    program = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "known-problems.md").read_text(), re.DOTALL)
    assert program is not None
    path = tmp_path / "program.py"
    path.write_text(program[1])
    async with running([sys.executable, str(path)]) as run:
        await run.until(lambda: b"interrupted; the nursery waits" in run.out)
        run.process.send_signal(signal.SIGINT)
        with trio.move_on_after(0.2):
            await run.process.wait()
        # The program hangs. If it ends, Trio has fixed the problem, and the page can be removed.
        assert run.process.returncode is None
    done = await finished([sys.executable, str(path), "checkpoints"])
    assert b"interrupted" not in done.stdout
    assert b"KeyboardInterrupt" in done.stderr
