"""The benchmarks run, with very few events. How fast the client is decides no test."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
from bench.__main__ import main
from bench._figures import EVENTS, FIGURES, PEERS
from bench._processes import opened
from bench._server import Feed

DOCS = Path(__file__).resolve().parent.parent / "docs"

pytestmark = pytest.mark.sockets


def test_every_part_of_the_benchmarks_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results.json"
    options = ["--all", "--peers", "--clients", "5", "--rounds", "1", "--scale", "0.0002", "--json", str(file)]
    main(options, isolated=False, patience=200)
    printed = capsys.readouterr().out
    (parts,) = json.loads(file.read_text()).values()

    for part, figures in (("table", FIGURES), ("peers", PEERS)):
        for figure in figures:
            one = parts[part]["figures"][figure.name]
            assert figure.name in printed
            if "skipped" in one:
                assert "no batches" in one["skipped"] or "kadoa-sdk is not installed" in one["skipped"]
            else:
                assert one["low"] <= one["wall" if figure.latency else "cpu"] <= one["high"]

    assert {name: one["skipped"] for name, one in parts["profile"].items() if "skipped" in one} == {}
    assert parts["profile"]["sum of the stages"]["value"] > parts["profile"]["checkpoint"]["value"] > 0
    assert parts["open"]["import and first client, wall"]["value"] > parts["open"]["first client, wall"]["value"] > 0
    assert parts["clients"]["failures"]["value"] == 0
    (acknowledged,) = (one for name, one in parts["acks"].items() if name.startswith("acknowledged, of"))
    assert acknowledged["value"] == acknowledged["limit"]
    assert "skipped" in parts["memory"] or parts["memory"]["growth after the first tenth"]["value"] >= 0


def test_each_case_is_measured_in_a_process_of_its_own() -> None:
    with opened(None, patience=120) as bench:
        result = bench.run(EVENTS.loop, Feed(warm=3, count=20))
    assert result["events"] == 20
    assert result["cpu"] > 0


@pytest.mark.skipif(not (DOCS / "figures.py").exists(), reason="the documentation is not beside an installed package")
def test_page_shows_the_figures_of_the_file() -> None:
    script = runpy.run_path(str(DOCS / "figures.py"))
    page = (DOCS / "performance.md").read_text()
    assert page == script["fill"](page, script["read"]()), "run: python docs/figures.py"
    assert {name for name in script["TABLES"] if f"<!-- figures: {name} -->" not in page} == set()
