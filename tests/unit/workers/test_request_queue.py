"""The order in which a worker's threads take what waits."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from fletcher.workers.messages import WorkerRequest
from fletcher.workers.request_queue import RequestQueue


def waiting(
    concurrency: int, *, urgent: Sequence[int] = (), others: Sequence[int] = ()
) -> RequestQueue:
    requests = RequestQueue(concurrency)
    for job_id in others:
        requests.add_request(WorkerRequest(job_id, None))
    for job_id in urgent:
        requests.add_request(WorkerRequest(job_id, None, urgent=True))
    return requests


def test_urgent_requests_overtake_others_that_wait() -> None:
    requests = waiting(1, others=[0, 1], urgent=[2, 3])
    assert [requests.take_request().job_id for _ in range(3)] == [2, 3, 0]


def test_others_get_every_ninth_turn_under_a_flood() -> None:
    requests = waiting(1, others=[-1, -2], urgent=range(20))
    taken = []
    for _ in range(18):
        request = requests.take_request()
        taken.append(request.job_id)
        requests.finish_request(request)
    assert taken == [*range(8), -1, *range(8, 16), -2]


def test_a_thread_is_left_for_urgent_ones() -> None:
    requests = waiting(1, others=[0, 1])
    assert requests.take_request().job_id == 0
    taken: list[int] = []
    second = threading.Thread(target=lambda: taken.append(requests.take_request().job_id))
    second.start()
    requests.add_request(WorkerRequest(2, None, urgent=True))
    second.join(10)
    assert taken == [2]  # not 1, which waits for the end of 0


def test_the_end_of_one_lets_the_next_begin() -> None:
    requests = waiting(1, others=[0, 1])
    first = requests.take_request()
    taken: list[int] = []
    second = threading.Thread(target=lambda: taken.append(requests.take_request().job_id))
    second.start()
    requests.finish_request(first)
    second.join(10)
    assert taken == [1]
