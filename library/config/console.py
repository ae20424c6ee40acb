"""Options about the messages on the console."""

from __future__ import annotations

from library.config.fields import EVERY_RUN, Group, option


class ConsoleOptions(Group):
    """Part of several groups: every run has these."""

    console_log_level: str | None = option(
        None,
        "how much is said (unset: INFO)",
        choices=["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"],
        acts=EVERY_RUN,
    )
    console_log_file: str | None = option(
        None, "write messages to this file instead of the console", path=True, acts=EVERY_RUN
    )
    console_log_simple: bool = option(False, "messages without time and level", acts=EVERY_RUN)
