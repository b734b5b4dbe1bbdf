"""Sphinx configuration."""

import sys
from pathlib import Path

import kadoa_trio

sys.path.insert(0, str(Path(__file__).parent))

project = "kadoa_trio"
author = project_copyright = "the kadoa_trio contributors"
version = release = kadoa_trio.__version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_parser"]
html_theme = "furo"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
default_role = "any"
exclude_patterns = ["_build", "_pictures"]
myst_heading_anchors = 2
# Objects of other projects: their inventories would need the network during the build.
nitpick_ignore_regex = [
    (
        r"py:.*",
        r"(trio|httpx|ssl|os|signal|itertools|pathlib|hypothesis|datetime|collections|typing|enum|logging|contextlib|attrs|attr|cattrs)(\..*)?",
    ),
    (
        r"py:.*",
        r"(bool|bytes|dict|float|frozenset|int|list|object|str|tuple|type|None|optional|Any|Literal|Final|ClassVar)",
    ),
    (r"py:.*", r"Secret"),  # of constructors that are not public
    (r"py:.*", r"(ValueError|OSError|LookupError|KeyboardInterrupt|BaseException|Exception|SystemExit|TracebackType)"),
    (r"py:.*", r"(Iterable|AsyncIterator|Mapping|Callable|Awaitable|AbstractAsyncContextManager|SSLContext)"),
    # Names as annotations of private modules spell them; the public name is documented.
    (r"py:.*", r"kadoa_trio\._.*"),
    (r"py:.*", r"kadoa_trio\.testing\._.*"),
    (
        r"py:.*",
        r"(HttpClient|KadoaApi|Server|Path|FaultKind|FaultyStream|Entry|Buffer|BufferedEvent|Admission|ConnectionContext|Saver|Acknowledger|Repairer|Supervisor|_Assembly|_Webhook|_Action|IdSource|Step|Spelling|Message|Gap|GapReason|State|Event)",
    ),
]
suppress_warnings = ["ref.any"]


def setup(app: object) -> None:
    """Draw the pictures before anything refers to them."""
    import pictures

    pictures.draw_all(Path(__file__).parent / "_pictures")
