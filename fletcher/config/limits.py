"""Options that bound a server's memory, messages, calls and shutdown."""

from __future__ import annotations

from dataclasses import dataclass

from fletcher.config.option import GIB, MIB, SECONDS, SIZE, WHOLE, OptionGroup, option
from fletcher.errors import ConfigError

# Share of `max_memory` for data in flight; the rest is for code, libraries and their caches.
_BUDGET_SHARE = 0.5
# Share for dedupe indexes: by default some 15 million ids (17 bytes each), or 8 million with their
# texts (32).
_DEDUPE_SHARE = 0.125


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsConfig(OptionGroup):
    """Bounds on calls, memory and messages.

    Attributes:
        max_streams: Open calls at once. More callers are admitted, and each may hold one message in
            memory.
        max_memory: Memory for work in progress. With less, callers wait earlier.
        max_message_bytes: Largest decoded message. Each open call may hold one in memory.
        max_row_bytes: Largest text. The row of a longer text fails; other rows do not.
        drain_timeout_s: Time after SIGTERM for accepted rows to reach their stores.
    """

    max_streams: int = option(256, WHOLE, minimum=1)
    max_memory: int = option(2 * GIB, SIZE)
    max_message_bytes: int = option(64 * MIB, SIZE, minimum=1)
    max_row_bytes: int = option(16 * MIB, SIZE, minimum=1)
    drain_timeout_s: float = option(30, SECONDS)

    def _check_together(self) -> None:
        if self.max_row_bytes > self.max_message_bytes:
            raise ConfigError(
                f"`max_row_bytes` is {self.max_row_bytes}, more than `max_message_bytes` "
                f"({self.max_message_bytes}), in which a row must fit",
                field="max_row_bytes",
            )
        if self.max_message_bytes > self.max_memory:
            raise ConfigError(
                f"`max_message_bytes` is {self.max_message_bytes}, more than `max_memory` "
                f"({self.max_memory}), in which a message must fit",
                field="max_message_bytes",
            )

    @property
    def budget_bytes(self) -> int:
        """Memory for data in flight, in bytes."""
        return int(self.max_memory * _BUDGET_SHARE)

    @property
    def dedupe_bytes(self) -> int:
        """Memory for the dedupe indexes of all datasets, in bytes."""
        return int(self.max_memory * _DEDUPE_SHARE)
