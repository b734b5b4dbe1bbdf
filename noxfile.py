"""What is checked, and how. ``nox -l`` lists the sessions."""

import json
import re
import shutil
import tarfile
import zipfile
from pathlib import Path

import nox

nox.options.sessions = ["lint", "typing", "docs", "coverage", "tests", "package", "minimum", "interop", "chaos"]
nox.options.error_on_missing_interpreters = False
nox.options.default_venv_backend = "venv"

PYPROJECT = nox.project.load_toml("pyproject.toml")
PYTHONS = nox.project.python_versions(PYPROJECT)


PARALLEL = ("-n", "auto")
IN_MEMORY = ("-m", "not sockets", "--ignore", "tests/test_crashes.py", "--ignore", "tests/test_chaos.py")
"""For sessions beside those that run everything: without the tests that take real time or processes of their own."""
BUILT: list[Path] = []
"""The sdist and the wheel of this run of nox: built once, for every session."""


def build(session: nox.Session) -> tuple[str, str]:
    """Build the sdist, and from it the wheel; give both paths."""
    if not BUILT:
        out = Path(session.create_tmp()).resolve() / "built"
        shutil.rmtree(out, ignore_errors=True)
        session.install("build")
        session.run("python", "-m", "build", "--outdir", str(out), silent=True)
        BUILT.extend([next(out.glob("*.tar.gz")), next(out.glob("*.whl"))])
    return str(BUILT[0]), str(BUILT[1])


def wheel(session: nox.Session) -> str:
    return build(session)[1]


def groups(session: nox.Session, *names: str) -> None:
    session.install(*nox.project.dependency_groups(PYPROJECT, *names))


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """The tests in random order, against the built wheel."""
    groups(session, "order")
    session.install(f"{wheel(session)}[test]")
    # -P keeps the tree off the path: the wheel is what is tested.
    # Ctrl-C at every place of the programs, not at a sample: what a coroutine leaves behind differs between Pythons.
    environment = {"PYTHONPATH": "tests", "KADOA_TRIO_CTRL_C_STRIDE": "1"}
    session.run("python", "-P", "-m", "pytest", *PARALLEL, *session.posargs, env=environment)


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff, and the rules of flake8-async that it lacks."""
    groups(session, "lint")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    # What is left out, and why:
    # 109, 127: a protocol's time-out is a setting; this project stays with httpx, imported in one module.
    # 114, 128: startable methods are found by name only, and one passes its task_status on.
    # 122: about Trio before 0.27, which is not supported.
    # 124: the demo's scenes share one shape. 910 to 913: loops that have always met a checkpoint.
    ignored = "ASYNC109,ASYNC127,ASYNC114,ASYNC128,ASYNC122,ASYNC124,ASYNC910,ASYNC911,ASYNC912,ASYNC913"
    decorators = "async_context,sync_context"  # ours, in place of contextlib's
    options = ("--extend-ignore", ignored, f"--transform-async-generator-decorators={decorators}")
    session.run("flake8", "--select", "ASYNC", *options, "kadoa_trio", "noxfile.py")


@nox.session
def typing(session: nox.Session) -> None:
    """Mypy, pyright, and the completeness of the public types."""
    groups(session, "typing")
    session.install("-e", ".[test]")
    session.run("mypy")
    session.run("pyright")
    answer = session.run(
        "pyright", "--verifytypes", "kadoa_trio", "--ignoreexternal", "--outputjson", silent=True, success_codes=[0, 1]
    )
    report = json.loads(str(answer))["typeCompleteness"]
    score = report["completenessScore"]
    session.log(f"public types known: {score:.2%}")
    if score < 1:
        for symbol in report["symbols"]:
            if symbol["isExported"] and not symbol["isTypeKnown"]:
                session.warn(f"{symbol['name']}: {[d['message'] for d in symbol['diagnostics']]}")
        session.error("the public types are not complete")


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation; every warning is an error."""
    groups(session, "docs")
    session.install(".[cli,testing]")
    session.run("sphinx-build", "-n", "-W", "--keep-going", "-b", "html", "docs", "docs/_build/html")


@nox.session
def coverage(session: nox.Session) -> None:
    """Branch coverage of the ledger, of positions and of the frame filter, by their own tests: complete."""
    groups(session, "coverage")
    session.install("-e", ".[test]")
    about = session.posargs or ["tests/test_ledger.py", "tests/test_stores.py", "tests/test_frames.py"]
    session.run("coverage", "run", "-m", "pytest", *about)
    complete = "*/_engine/_ledger.py,*/_engine/_cursors.py,*/kadoa_trio/_position.py,*/_net/_frames.py"
    session.run("coverage", "report", "--show-missing", f"--include={complete}", "--fail-under=100")


@nox.session
def chaos(session: nox.Session) -> None:
    """Random programs of the whole client, against a server written after the specification: 500 in all."""
    session.install("-e", ".[test]")
    session.run("python", "-m", "tests.chaos", *(session.posargs or ["--seeds", "10000:10500", "--jobs", "1"]))


@nox.session
def package(session: nox.Session) -> None:
    """What is built: its metadata, its contents, the sdist's own tests, the command without its extra."""
    sdist, built = build(session)
    session.install("twine")
    session.run("twine", "check", "--strict", sdist, built)
    names = set(zipfile.ZipFile(built).namelist())
    assert {"kadoa_trio/py.typed", "_kadoa_trio_pytest.py"} <= names, names
    strange = {
        name
        for name in names
        if not re.match(r"kadoa_trio/|_kadoa_trio_pytest\.py$|kadoa_trio-[^/]+\.dist-info/", name)
    }
    assert not strange, strange
    assert any(name.endswith("licenses/LICENSE.MIT") for name in names), names
    size = sum(one.file_size for one in zipfile.ZipFile(built).infolist())
    session.log(f"the wheel: {Path(built).stat().st_size / 1024:.0f} KiB, {size / 1024:.0f} KiB installed")

    # Alone: without an extra, with the oldest thing that a user can do wrong.
    session.install(built)
    session.run("python", "-c", "import kadoa_trio, kadoa_trio.testing")
    session.run("kadoa-trio", "listen", success_codes=[2])

    unpacked = Path(session.create_tmp()).resolve() / "unpacked"
    shutil.rmtree(unpacked, ignore_errors=True)
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked, filter="data")
    (tree,) = unpacked.iterdir()
    session.chdir(tree)
    session.install(".[test]")
    # The wheel is made of this sdist, and tested as a whole; here, that the tests came along and find what they need.
    session.run("python", "-m", "pytest", "tests/test_project.py", "tests/test_wire.py", "tests/test_ledger.py")


@nox.session(python="3.11")
def minimum(session: nox.Session) -> None:
    """The tests with the oldest version of every dependency that the metadata allows."""
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"]
    wanted = project["dependencies"] + [one for extra in extras.values() for one in extra]
    oldest = [one.replace(">=", "==") for one in wanted if ">=" in one]
    constraints = Path(session.create_tmp()).resolve() / "oldest.txt"
    constraints.write_text("\n".join(oldest) + "\n")
    session.install(f"{wheel(session)}[test]", "--constraint", str(constraints))
    # Examples that a newer Hypothesis has kept mean nothing to an old one.
    kept = str(Path(session.create_tmp()).resolve() / "hypothesis")
    environment = {"PYTHONPATH": "tests", "HYPOTHESIS_STORAGE_DIRECTORY": kept}
    session.run("python", "-P", "-m", "pytest", *PARALLEL, *IN_MEMORY, *session.posargs, env=environment)


@nox.session(python="3.12")
def interop(session: nox.Session) -> None:
    """Kadoa's official SDK, and a client after Kadoa's documentation, against the simulated Kadoa."""
    session.install(f"{wheel(session)}[test]", "kadoa-sdk==0.20.*", "requests>=2.32", "websocket-client>=1.8")
    session.run("python", "-P", "-m", "pytest", "tests/interop", *session.posargs)


def measure(session: nox.Session, *options: str) -> None:
    """Run the benchmarks; with ``-- --docs`` completely, and put the figures into docs/performance.md."""
    given = [one for one in session.posargs if one != "--docs"]
    docs = len(given) < len(session.posargs)
    file = ["--json", "docs/performance.json"] if docs else []
    session.run("python", "-m", "tests.bench", *options, *(["--all"] if docs and not options else []), *file, *given)
    if docs:
        session.run("python", "docs/figures.py")


@nox.session(python=["3.11", "3.13"])
def bench(session: nox.Session) -> None:
    """What the client costs, as ratios to a bare trio-websocket loop; see docs/performance.md."""
    groups(session, "bench")
    session.install("-e", ".")
    measure(session)


@nox.session(name="bench-peers", python="3.12")
def bench_peers(session: nox.Session) -> None:
    """The same, as ratios to Kadoa's official SDK, unmodified."""
    groups(session, "bench")
    session.install("-e", ".", "kadoa-sdk==0.20.*")
    measure(session, "--peers")


@nox.session(python="3.11")
def fuzz(session: nox.Session) -> None:
    """Coverage-guided fuzzing of the frame filter, for a minute or the given seconds."""
    groups(session, "fuzz")
    session.install("-e", ".[test]")
    found = Path(session.create_tmp()).resolve() / "frames"
    found.mkdir(exist_ok=True)
    session.run("python", "tests/fuzz/frames.py", *(session.posargs or ["60"]), str(found))
