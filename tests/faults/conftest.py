"""The integration tests' servers, for tests that break them."""

from __future__ import annotations

from tests.integration.conftest import server, start_server, tiny_home

__all__ = ["server", "start_server", "tiny_home"]
