import pytest

from fletcher.util.backoff import Backoff


def test_delays_double_up_to_the_longest():
    backoff = Backoff(first_s=0.5, longest_s=3.0)
    assert [backoff.delay_s(failures, 1.0) for failures in range(6)] == [0, 0.5, 1, 2, 3, 3]


@pytest.mark.parametrize(("jitter", "least", "middle"), [(0.5, 1.0, 1.5), (1.0, 0.0, 1.0)])
def test_jitter_is_the_random_share_of_a_delay(jitter, least, middle):
    backoff = Backoff(first_s=2.0, longest_s=9.0, jitter=jitter)
    assert backoff.delay_s(1, 0.0) == least
    assert backoff.delay_s(1, 0.5) == middle
    assert backoff.delay_s(1, 1.0) == 2.0


def test_a_server_can_ask_for_a_longer_delay_but_not_for_a_shorter_one():
    backoff = Backoff(first_s=0.1, longest_s=1.0, jitter=0.0)
    assert backoff.delay_s(1, 0.0, at_least_ms=700) == 0.7
    assert backoff.delay_s(1, 0.0, at_least_ms=7) == 0.1
    assert backoff.delay_s(1, 0.0, at_least_ms=None) == 0.1


def test_failures_without_end_do_not_overflow():
    assert Backoff(0.1, 10.0).delay_s(10**6, 1.0) == 10.0
