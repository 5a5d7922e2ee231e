"""One line in the log for what may go wrong a thousand times in a run."""

import logging
from typing import Any


class LogOnce:
    """Logs the first message of each kind, and no later one."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._logged: set[str] = set()

    def __call__(
        self, kind: str, message: str, *args: Any, level: int = logging.WARNING, exc_info: bool = False
    ) -> None:
        """Logs the message, unless one of this kind was logged. `exc_info` adds the traceback that is being handled."""
        if kind not in self._logged:
            self._logged.add(kind)
            self._logger.log(level, message, *args, exc_info=exc_info)

    def __contains__(self, kind: str) -> bool:
        return kind in self._logged

    def traceback(self, message: str, *args: Any) -> None:
        """Logs the exception that is being handled, if it is the first one."""
        self("traceback", message, *args, exc_info=True)

    def failed(self, what: str) -> None:
        """Logs the exception that is being handled, if it is the first one: `what` costs verdicts and not the run."""
        self.traceback(
            "%s. What it was asked about counts as an abstention; further failures are counted in the metric "
            "`sgpo/abstain_rate` and not shown.",
            what,
        )
