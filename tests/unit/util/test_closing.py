"""Closing of objects that nobody holds afterwards."""

from __future__ import annotations

import pytest

from fletcher.util.closing import close_for_good


@pytest.mark.parametrize("num_failures", [0, 1, 2])
def test_a_failed_attempt_is_repeated_once(
    num_failures: int, caplog: pytest.LogCaptureFixture
) -> None:
    errors: list[BaseException] = [MemoryError(), KeyboardInterrupt()][:num_failures]
    closed = []

    def close() -> None:
        if errors:
            raise errors.pop()
        closed.append(True)

    close_for_good(close, "the writer")
    assert len(closed) == (num_failures < 2)
    assert caplog.text.count("the writer cannot be closed") == num_failures
