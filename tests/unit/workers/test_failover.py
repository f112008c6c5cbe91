"""Workers that slow down, fail, hang and are all gone, and what becomes of their jobs."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fletcher.errors import BackendError, InternalError, OverloadedError
from fletcher.workers import worker_handle
from fletcher.workers.messages import Failure, Ready, Response, WorkerSpec
from fletcher.workers.pool import WorkerPool
from fletcher.workers.roster import PoolConfig, PoolEvents, PoolTiming
from fletcher.workers.worker_handle import WorkerHandle
from tests.integration.processes import eventually
from tests.unit.workers.test_pool import Answer, QueueSource

DOUBLES = "tests.doubles.workers"


def spec(name: str, factory: str, config: Any) -> WorkerSpec:
    return WorkerSpec(name, f"{DOUBLES}:{factory}", config)


@contextmanager
def running(
    specs: list[WorkerSpec],
    *,
    source: QueueSource | None = None,
    on_state: Callable[[str, str], None] = lambda _name, _state: None,
    **options: Any,
) -> Iterator[tuple[WorkerPool, Callable[[Any], Answer]]]:
    source = source or QueueSource()
    events = PoolEvents(on_state=on_state)
    pool = WorkerPool(PoolConfig("replica", specs, **options), source, events)
    pool.start()

    def submit(payload: Any) -> Answer:
        answer = Answer(payload)
        answer.job.cost = 100
        source.jobs.put(answer.job)
        return answer

    try:
        yield pool, submit
    finally:
        pool.close()


def state_of(pool: WorkerPool, name: str) -> str:
    return next(one["state"] for one in pool.statistics() if one["name"] == name)


def kill_all(pool: WorkerPool) -> None:
    for pid in pool.process_ids():
        os.kill(pid, signal.SIGKILL)


def test_a_worker_made_five_times_slower_gets_less_within_seconds(tmp_path: Path) -> None:
    paces = [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    for pace in paces:
        pace.write_text("0.004")
    specs = [spec(f"cuda-{n}", "load_paced", str(pace)) for n, pace in enumerate(paces)]
    with running(specs) as (pool, submit):

        def jobs_by_worker(num_jobs: int) -> Counter[str]:
            """One at a time: with all workers idle, only the choice decides."""
            given: Counter[str] = Counter()
            for n in range(num_jobs):
                answer = submit(n)
                assert answer.wait() == n
                given[answer.job.worker] += 1
            return given

        assert min(jobs_by_worker(60).values()) >= 10
        paces[2].write_text("0.02")
        jobs_by_worker(120)
        given = jobs_by_worker(90)
        assert 1 <= given["cuda-2"] < given["cuda-0"] / 2
        assert given["cuda-2"] < given["cuda-1"] / 2
        rates = {one["name"]: one["rate"] for one in pool.statistics()}
        assert rates["cuda-2"] < rates["cuda-0"] / 2


def test_a_device_with_a_fault_is_ejected_and_replaced_and_loses_no_job(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fault = tmp_path / "fault"
    states: list[tuple[str, str]] = []
    specs = [spec("cuda-0", "load_sticky", str(fault)), spec("cuda-1", "load_echo", 1)]
    caplog.set_level(logging.INFO)
    with running(
        specs, probe="probe", on_state=lambda name, state: states.append((name, state))
    ) as (pool, submit):
        fault.touch()

        def ejected() -> bool:
            answers = [submit(n) for n in range(20)]
            assert [answer.wait() for answer in answers] == list(range(20))
            return ("cuda-0", "ejected") in states

        eventually(ejected, "it is ejected")
        fault.unlink()
        eventually(lambda: state_of(pool, "cuda-0") == "healthy", "a new process is healthy")
        assert ("cuda-1", "ejected") not in states
    lines = [line for line in caplog.messages if "cuda-0 is ejected" in line]
    assert len(lines) == states.count(("cuda-0", "ejected"))


def test_bad_jobs_eject_no_worker_for_good(tmp_path: Path) -> None:
    states: list[str] = []
    with running(
        [spec("cuda-0", "load_echo", 1)],
        probe="probe",
        on_state=lambda _, state: states.append(state),
    ) as (pool, submit):
        answers = [submit("break" if n < 4 else n) for n in range(40)]
        for n, answer in enumerate(answers):
            if n < 4:
                with pytest.raises(InternalError):
                    answer.wait()
            else:
                assert answer.wait() == n
        assert states[:3] == ["healthy", "ejected", "degraded"]
        assert sum(one["restarts"] for one in pool.statistics()) == 0


def test_a_worker_that_hangs_is_replaced_and_its_jobs_go_elsewhere() -> None:
    specs = [spec(f"cuda-{n}", "load_echo", 1) for n in range(2)]
    with running(specs, timing=PoolTiming(answer_timeout_s=1.0)) as (pool, submit):
        hung = pool.process_ids()[0]
        os.kill(hung, signal.SIGSTOP)
        answers = [submit(n) for n in range(20)]
        assert [answer.wait() for answer in answers] == list(range(20))
        eventually(lambda: len(pool.process_ids()) == 2, "it is replaced")
        assert hung not in pool.process_ids()


@pytest.mark.parametrize(
    "nonsense",
    [
        None,
        Ready(1, 0, {}),
        Response(1 << 40, 2, 0.1),
        Response("0", 2, 0.1),  # type: ignore[arg-type]
        Response(1, 2, "soon"),  # type: ignore[arg-type]
        Failure(1, "a text", ""),  # type: ignore[arg-type]
    ],
)
def test_an_answer_that_makes_no_sense_costs_only_its_worker(
    monkeypatch: pytest.MonkeyPatch, nonsense: Any
) -> None:
    receive, armed = worker_handle.receive, threading.Event()

    def receive_nonsense(connection: Any) -> Any:
        message = receive(connection)
        if armed.is_set() and isinstance(message, Response):
            armed.clear()
            return nonsense
        return message

    monkeypatch.setattr(worker_handle, "receive", receive_nonsense)
    with running([spec("cuda-0", "load_echo", 1)]) as (pool, submit):
        assert submit("a").wait() == "a"
        before = pool.process_ids()
        armed.set()
        assert submit("b").wait() == "b"
        assert pool.process_ids() != before


def test_urgent_work_does_not_wait_for_a_worker_that_reads_nothing() -> None:
    source, timing = QueueSource(), PoolTiming(answer_timeout_s=4.0)
    specs = [spec("cuda-0", "load_echo", 1)]
    with running(specs, source=source, timing=timing) as (pool, submit):
        os.kill(pool.process_ids()[0], signal.SIGSTOP)
        large = submit(b"x" * (4 << 20))  # more than a pipe holds
        eventually(lambda: pool.statistics()[0]["in_flight"] == 1, "it is being sent")
        answers = [Answer(n, urgent=True) for n in range(3)]
        for answer in answers:
            source.urgent.append(answer.job)
            before = time.monotonic()
            pool.dispatch_urgent()
            assert time.monotonic() - before < 3.0
        assert [answer.wait() for answer in answers] == [0, 1, 2]
        assert len(large.wait()) == 4 << 20


def test_with_all_workers_gone_jobs_fail_clearly_and_recover(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    specs = [spec(f"cuda-{n}", "load_unless", str(gone)) for n in range(2)]
    with running(specs) as (pool, submit):
        assert (pool.usable, pool.gone) == (True, False)
        gone.touch()
        kill_all(pool)
        eventually(lambda: pool.gone, "all are gone")
        with pytest.raises(OverloadedError, match="no replica worker is running") as caught:
            submit("work").wait()
        assert caught.value.retry_after_ms
        assert {one["state"] for one in pool.statistics()} == {"down"}
        gone.unlink()
        eventually(lambda: pool.usable, "they are back")
        assert submit("work").wait() == "work"


def test_the_standby_takes_over_and_goes(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    regular = [spec(f"cuda-{n}", "load_unless", str(gone)) for n in range(2)]
    with running(regular, standby=[spec("cpu-2", "load_echo", 1)]) as (pool, submit):
        assert state_of(pool, "cpu-2") == "standby"
        gone.touch()
        kill_all(pool)
        answers = [submit(n) for n in range(20)]
        assert [answer.wait() for answer in answers] == list(range(20))
        assert state_of(pool, "cpu-2") == "healthy"
        assert {answer.job.worker for answer in answers[5:]} == {"cpu-2"}
        gone.unlink()
        eventually(lambda: state_of(pool, "cpu-2") == "standby", "it goes when others are back")
        last = submit("work")
        assert last.wait() == "work"
        assert last.job.worker.startswith("cuda")
        assert pool.statistics()[-1]["restarts"] == 0


def test_a_standby_lets_the_pool_start_without_its_regular_workers(tmp_path: Path) -> None:
    regular = [spec("cuda-0", "load_broken", "no such device")]
    with running(regular, standby=[spec("cpu-1", "load_echo", 1)]) as (_, submit):
        assert submit("work").wait() == "work"


def test_a_worker_that_dies_at_every_start_causes_no_storm_of_restarts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # It was started again every half second, for ever.
    waits: list[float] = []
    enough = threading.Event()
    with running([spec("cuda-0", "load_echo", 1)]) as (pool, submit):
        assert submit("work").wait() == "work"
        wait = pool.closing.wait

        def waited(timeout: float | None = None) -> bool:
            if threading.current_thread().name == "cuda-0-reader":
                waits.append(timeout or 0.0)
                if len(waits) == 8:
                    enough.set()
                return wait(0 if not enough.is_set() else timeout)
            return wait(timeout)

        def cannot_start(handle: WorkerHandle) -> Any:
            raise BackendError("no such device")

        monkeypatch.setattr(pool.closing, "wait", waited)
        monkeypatch.setattr(WorkerHandle, "_start", cannot_start)
        kill_all(pool)
        assert enough.wait(30)
    assert waits[0] == 0
    assert waits[1] < waits[2] < waits[3] < waits[4] < waits[5] < waits[6]
    assert waits[7] >= 15
