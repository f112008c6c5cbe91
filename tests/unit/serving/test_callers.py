"""Callers that leave or fall silent: their work is dropped, and their places are given back."""

from __future__ import annotations

from typing import Any

import pytest

from fletcher.errors import CancelledError, FletcherError, OverloadedError
from fletcher.net.connections import Peer, ServerConnections
from fletcher.serving.callers import Caller, CallWatch

PEERS: dict[str, Peer] = {
    "ipv4:127.0.0.1:1": ("127.0.0.1", 1),
    "ipv4:127.0.0.1:2": ("127.0.0.1", 2),
}


class Context:
    """A call's context, which says that the client left once `cancelled` is set."""

    def __init__(self, peer: str = "ipv4:127.0.0.1:1") -> None:
        self.cancelled = self.ended = False
        self._peer = peer

    def is_cancelled(self) -> bool:
        assert not self.ended, "used after its call"
        return self.cancelled

    def peer(self) -> str:
        assert not self.ended, "used after its call"
        return self._peer


class Work:
    idle = False

    def __init__(self) -> None:
        self.errors: list[FletcherError] = []

    def abandon(self, error: FletcherError) -> None:
        self.errors.append(error)


class Connections(ServerConnections):
    def __init__(self) -> None:
        super().__init__()
        self.kept_alive: list[set[Peer]] = []
        self.ended: list[set[Peer]] = []

    def keep_alive(self, peers: Any) -> None:
        self.kept_alive.append(set(peers))

    def shut_down(self, peers: Any) -> None:
        if peers:
            self.ended.append(set(peers))


class Watched:
    """A watch on a clock of its own."""

    def __init__(self, idle_timeout_s: float = 60.0) -> None:
        self.now = 0.0
        self.connections = Connections()
        self.watch = CallWatch(idle_timeout_s, self.connections, clock=lambda: self.now)

    def after(self, seconds: float) -> None:
        self.now += seconds
        self.watch.look()


def bound(caller: Caller) -> Work:
    work = Work()
    caller.bind(work)
    return work


def test_the_work_of_a_caller_that_left_is_dropped_in_whatever_it_waits() -> None:
    watched, context = Watched(), Context()
    with watched.watch.watch(context) as caller:
        work = bound(caller)
        watched.after(1)
        assert not work.errors
        context.cancelled = True
        watched.after(0)
        assert isinstance(work.errors[0], CancelledError)
        # Work that is bound later is dropped at once.
        assert isinstance(bound(caller).errors[0], CancelledError)
    context.ended = True
    watched.after(1)  # asks no context whose call has ended


@pytest.mark.parametrize("waits", ["reading", "writing"])
def test_a_silent_caller_gives_its_place_back_and_its_connection_ends(waits: str) -> None:
    watched = Watched()
    with watched.watch.watch(Context()) as caller:
        work = bound(caller)
        work.idle = waits == "reading"
        watched.after(100)  # the handler works
        with getattr(caller, waits)():
            watched.after(59)
            assert not work.errors
            watched.after(1)
            assert isinstance(work.errors[0], OverloadedError)
            assert not watched.connections.ended  # the client gets the error first
            watched.after(1)
            assert watched.connections.ended == [{("127.0.0.1", 1)}]


def test_a_caller_that_waits_for_its_vectors_is_not_silent() -> None:
    watched = Watched()
    with watched.watch.watch(Context()) as caller, caller.reading():
        work = bound(caller)
        for _ in range(10):
            watched.after(59)
        work.idle = True  # answered now: its silence begins
        watched.after(59)
        assert not work.errors
        watched.after(2)
        assert work.errors


def test_a_connection_of_other_calls_is_not_ended() -> None:
    watched = Watched()
    silent, other = Context(), Context()
    with watched.watch.watch(silent) as caller, caller.reading():
        work = bound(caller)
        work.idle = True
        with watched.watch.watch(other):
            watched.after(61)
            watched.after(5)
            assert work.errors
            assert not watched.connections.ended
        watched.after(1)
        assert watched.connections.ended == [{("127.0.0.1", 1)}]


def test_no_timeout_means_no_end() -> None:
    watched = Watched(idle_timeout_s=0)
    with watched.watch.watch(Context()) as caller, caller.reading():
        work = bound(caller)
        work.idle = True
        watched.after(1e6)
        assert not work.errors


def test_connections_of_calls_that_last_are_kept_alive_once() -> None:
    watched = Watched()
    with watched.watch.watch(Context()):
        watched.after(0.5)
        assert not watched.connections.kept_alive
        watched.after(2)
        watched.after(2)
        assert watched.connections.kept_alive == [{("127.0.0.1", 1)}]
        with watched.watch.watch(Context("ipv4:127.0.0.1:2")):
            watched.after(2)
        assert watched.connections.kept_alive[1:] == [{("127.0.0.1", 2)}]


def test_closing_ends_the_connections_of_all_calls() -> None:
    watched = Watched()
    contexts = [Context(peer) for peer in PEERS]
    with watched.watch.watch(contexts[0]), watched.watch.watch(contexts[1]):
        watched.watch.close()
    assert watched.connections.ended == [set(PEERS.values())]
