"""The processes of a run: two servers for as long as it takes, and a fresh one for each thing that is measured."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import attrs
import trustme

from ._loops import Servers
from ._server import AUTHORITY, CERTIFICATE, Feed
from ._worker import do

assert __package__ is not None
TOP: Final = Path(__file__).resolve().parents[len(__package__.split("."))]
"""The folder from which this package is imported: of the project, or of its tests."""
PATIENCE: Final = 900.0


@attrs.frozen
class Bench:
    """Measures things, each in a fresh process."""

    servers: Servers
    package: str | None
    """The folder that holds the kadoa_trio to measure; None for the one that is imported without."""
    isolated: bool = True
    """Whether each is measured in a fresh process; else in this one, for a test of the benchmarks."""
    patience: float = PATIENCE
    """How long one measurement may take, in seconds."""

    def run(self, what: str, feed: Feed | None = None, **options: Any) -> dict[str, Any]:
        """Measure one thing."""
        task = {
            "package": self.package,
            "servers": attrs.asdict(self.servers),
            "what": what,
            "patience": self.patience,
            **options,
        }
        if feed is not None:
            task["feed"] = attrs.asdict(feed)
        if not self.isolated:
            return do(task)
        done = subprocess.run(
            [sys.executable, "-m", f"{__package__}._worker", json.dumps(task)],
            cwd=TOP,
            stdout=subprocess.PIPE,
            timeout=self.patience + 10,
            check=True,
        )
        result: dict[str, Any] = json.loads(done.stdout)
        return result


@contextlib.contextmanager
def opened(package: str | None, *, isolated: bool = True, patience: float = PATIENCE) -> Iterator[Bench]:
    """Start the servers for the length of a block. The arguments are those of `Bench`."""
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        authority = trustme.CA(key_type=trustme.KeyType.ECDSA)
        authority.cert_pem.write_to_path(folder / AUTHORITY)
        certificate = authority.issue_cert("127.0.0.1", key_type=trustme.KeyType.ECDSA)
        certificate.private_key_and_cert_chain_pem.write_to_path(folder / CERTIFICATE)
        ports: list[int] = []
        for _ in range(2):
            process = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-m", f"{__package__}._server", name],
                    cwd=TOP,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            stack.callback(process.kill)
            assert process.stdout is not None
            ports += json.loads(process.stdout.readline())
        yield Bench(Servers(name, ports[0], ports[1], ports[2]), package, isolated, patience)
