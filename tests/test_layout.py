"""The layout: every module has its place in the map of the package, and no import runs upwards or through a wall.

The map stands as a comment in ``kadoa_trio/__init__.py``. Imports for type
checking count, too.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import kadoa_trio

PACKAGE = Path(kadoa_trio.__file__).parent


def order() -> list[str]:
    """Give the names of the map from the bottom to the top, those inside of a package in its place."""
    text = (PACKAGE / "__init__.py").read_text()
    top, *inner = re.split(r"^# (\w+), each building on those above it:$", text, flags=re.MULTILINE)
    names = re.findall(r"^#   (\w+)  +\S", top, re.MULTILINE)
    inside = {
        package: re.findall(r"^#   (\w+)  +\S", part, re.MULTILINE)
        for package, part in zip(inner[::2], inner[1::2], strict=True)
    }
    return [
        whole
        for name in names
        for whole in ([f"{name}.{module}" for module in inside[name]] if name in inside else [name])
    ]


ORDER = order()


def modules() -> Iterator[tuple[str, Path]]:
    """Give each module that has code: its name below ``kadoa_trio``, and its file."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] not in ("__init__", "__main__", "_version", "_plugin"):
            yield ".".join(parts), path


FILES = dict(modules())


def ours(base: list[str], alias: str) -> str | None:
    """Give the module that ``from base import alias`` imports; None for a public name of the package itself."""
    whole = ".".join([*base, alias])
    if whole in FILES or f"{whole}.__init__" in FILES:
        return whole
    return ".".join(base) or None


def imports(name: str, path: Path) -> set[str]:
    """Give what a file imports, anywhere in it: ours below ``kadoa_trio``, as ``.name``; others by their first name."""
    package = name.split(".")[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                module = node.module.split(".") if node.module else []
                base = package[: len(package) - node.level + 1] + module
                found |= {f".{one}" for alias in node.names if (one := ours(base, alias.name)) is not None}
            else:
                found.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
    return found


def place(name: str) -> int:
    """Give the place of a module in the map; a module of a package without a list of its own has the package's."""
    return ORDER.index(name if name in ORDER else name.split(".")[0])


IMPORTS = {name: imports(name, path) for name, path in FILES.items()}


def test_every_module_is_in_the_map_and_the_map_has_no_other() -> None:
    named = {name if name in ORDER else name.split(".")[0] for name in IMPORTS if not name.endswith(".__init__")}
    assert named == set(ORDER)
    assert len(ORDER) == len(set(ORDER))


@pytest.mark.parametrize("name", sorted(IMPORTS))
def test_no_import_runs_upwards(name: str) -> None:
    package = name.split(".")[0]
    if name.endswith(".__init__"):
        return  # it gives out what is below it
    for imported in sorted(one.lstrip(".") for one in IMPORTS[name] if one.startswith(".") and one != "._version"):
        if imported.split(".")[0] == package and f"{package}." not in "".join(ORDER):
            continue  # inside of a package: see the next test
        assert place(imported) < place(name), f"{name} imports {imported}"


def test_no_package_has_a_circle_of_imports() -> None:
    waiting: dict[str, set[str]] = {}
    for name, found in IMPORTS.items():
        names = {one.lstrip(".") for one in found}
        waiting[name] = (names | {f"{one}.__init__" for one in names}) & set(IMPORTS)
    while waiting:
        free = {name for name, needs in waiting.items() if not needs & set(waiting)}
        assert free, f"these import each other: {sorted(waiting)}"
        waiting = {name: needs for name, needs in waiting.items() if name not in free}


WALLS = {
    "_net": {"_engine", "workspace", "notices", "_client"},
    "workspace": {"_engine"},
    "_forward": {"_engine"},
    "testing": {"_engine", "_net"},
    "_engine": {"_client"},
    "cli": {"_engine"},
}
"""What no module of each package imports, whatever the order says."""


@pytest.mark.parametrize("package", WALLS)
def test_no_import_goes_through_a_wall(package: str) -> None:
    for name, found in IMPORTS.items():
        if name.split(".")[0] == package:
            through = {one for one in found if one.lstrip(".").split(".")[0] in WALLS[package] and one.startswith(".")}
            assert not through, f"{name} imports {sorted(through)}"


@pytest.mark.parametrize(("library", "module"), [("httpx", "_net._http"), ("trio_websocket", "_net._socket")])
def test_library_is_imported_in_one_module_of_the_client(library: str, module: str) -> None:
    assert {name for name, found in IMPORTS.items() if library in found and not name.startswith("testing.")} == {module}


def test_no_module_imports_the_package_by_its_name() -> None:
    # Such an import would be in none of the checks of this file.
    assert not {name for name, found in IMPORTS.items() if "kadoa_trio" in found}


def test_ledger_has_no_trio_no_clock_and_no_randomness() -> None:
    for name in ("_engine._ledger", "_engine._cursors", "_position"):
        assert not IMPORTS[name] & {"trio", "time", "random"}
        for node in ast.walk(ast.parse(FILES[name].read_text())):
            assert not (isinstance(node, ast.Attribute) and node.attr in ("now", "utcnow", "today")), name


def test_simulator_shares_no_habits_with_the_client() -> None:
    # Builders and strategies make the client's events; the simulator itself shares only these with it.
    for name, found in IMPORTS.items():
        if name.startswith("testing.") and name.split(".")[1] not in ("_builders", "strategies"):
            above = {one for one in found if one.startswith(".") and not one.startswith(".testing")}
            assert above <= {"._settings", "._exits", "._contexts", "._checks", "._dead_letters"}, name
