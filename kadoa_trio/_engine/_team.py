"""Whose stream it is: checked with each token, before anything is subscribed to."""

from __future__ import annotations

from .._errors import ConfigurationError, ProtocolError
from .._redact import presentable
from ._ledger import Ledger
from ._repair import Repairer
from ._saver import Saver


class TeamCheck:
    """Checks that every token is of the team of the position; with the first token, the position is loaded.

    Args:
        ledger: knows the team of the position.
        saver: loads the saved position; None without a cursor store.
        repairer: begins with the gaps of that position; None where gaps are not repaired.
    """

    def __init__(self, ledger: Ledger, saver: Saver | None, repairer: Repairer | None) -> None:
        self._ledger = ledger
        self._saver = saver
        self._repairer = repairer
        self.passed: bool = False
        """Whether a first token was checked: the position is loaded since."""

    async def check(self, team: str) -> None:
        """Check the team of a new token.

        Raises:
            ConfigurationError: the position to resume from is another team's.
            CursorStoreError: the saved position cannot be loaded; see `Saver.open`.
            ProtocolError: the tokens of one API key are of two teams.
        """
        ledger = self._ledger
        if not self.passed:
            if ledger.team is not None and ledger.team != team:
                raise ConfigurationError(
                    f"the position to resume from belongs to team {presentable(ledger.team, 80)}, the API key to team "
                    f"{presentable(team, 80)}; use a key of that team, or begin without resume_from"
                )
            if self._saver is not None:
                await self._saver.open(team)
            ledger.team = team
            self.passed = True
            if self._repairer is not None and ledger.gaps:
                self._repairer.position_changed()
        elif ledger.team != team:
            raise ProtocolError(
                "token",
                f"the token belongs to team {presentable(team, 80)}, the one before to team "
                f"{presentable(str(ledger.team), 80)}",
            )
