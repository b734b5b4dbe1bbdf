"""``python -m kadoa_trio``: the same as the command ``kadoa-trio``."""

from .cli import main

raise SystemExit(main())
