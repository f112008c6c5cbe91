"""Worker processes that answer, refuse, break and die."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fletcher.errors import BackendError, InternalError, RowTooLargeError
from fletcher.workers import worker_handle
from fletcher.workers.health import Health
from fletcher.workers.jobs import Job
from fletcher.workers.messages import WorkerSpec
from fletcher.workers.pool import WorkerPool
from fletcher.workers.roster import PoolConfig, PoolEvents, Roster
from fletcher.workers.worker_handle import WorkerHandle
from tests.integration.processes import eventually


class QueueSource:
    """A pool's source of both kinds of jobs, whose tasks are their answers."""

    def __init__(self) -> None:
        self.jobs: queue.Queue[Job] = queue.Queue()
        self.urgent: deque[Job] = deque()

    def schedule(self, *, urgent: bool, timeout_s: float = 0.0) -> Job | None:
        if urgent:
            return self.urgent.popleft() if self.urgent else None
        try:
            return self.jobs.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def update(self, job: Job, result: Any, error: Exception | None) -> None:
        job.task(result, error)


class Answer:
    """A job and its outcome."""

    def __init__(self, payload: Any, *, urgent: bool = False, **fields: Any) -> None:
        self._settled = threading.Event()
        self.result: Any = None
        self.error: Exception | None = None
        self.calls = 0
        self.job = Job(payload, task=self._done, urgent=urgent, **fields)

    def _done(self, result: Any, error: Exception | None) -> None:
        self.calls += 1
        self.result, self.error = result, error
        self._settled.set()

    def wait(self) -> Any:
        assert self._settled.wait(30)
        if self.error is not None:
            raise self.error
        return self.result


@contextmanager
def running(
    num_workers: int = 1,
    *,
    concurrency: int = 1,
    events: PoolEvents | None = None,
    **options: Any,
) -> Iterator[tuple[WorkerPool, Callable[[Any], Answer]]]:
    source = QueueSource()
    specs = [
        WorkerSpec(f"echo-{n}", "tests.doubles.workers:load_echo", concurrency)
        for n in range(num_workers)
    ]
    pool = WorkerPool(PoolConfig("echo", specs, **options), source, events)
    pool.start()

    def submit(payload: Any) -> Answer:
        answer = Answer(payload)
        source.jobs.put(answer.job)
        return answer

    try:
        yield pool, submit
    finally:
        pool.close()


def test_answers_come_back_to_their_jobs() -> None:
    with running(2) as (_, submit):
        answers = [submit(n) for n in range(50)]
        assert [answer.wait() for answer in answers] == list(range(50))


def test_a_refusal_keeps_its_class_and_fields_across_the_process_boundary() -> None:
    with running() as (_, submit):
        with pytest.raises(RowTooLargeError) as caught:
            submit("refuse").wait()
        assert caught.value.field == "text"
        assert caught.value.allowed == ["less"]


def test_an_unexpected_error_gives_nothing_away() -> None:
    with running() as (_, submit):
        with pytest.raises(InternalError) as caught:
            submit("break").wait()
        assert "secret" not in str(caught.value)
        assert submit("still alive").wait() == "still alive"


def test_a_panic_of_a_library_fails_its_job_alone() -> None:
    # The worker's thread ended, and the job waited for an answer for minutes.
    with running() as (_, submit):
        with pytest.raises(InternalError, match="Panic"):
            submit("panic").wait()
        assert submit("still alive").wait() == "still alive"


@pytest.mark.parametrize("name", ["send", "encode", "finish_request", "take_request"])
def test_a_worker_that_cannot_answer_is_replaced_and_its_jobs_done_again(
    tmp_path: Path, name: str
) -> None:
    # Its thread ended, and the jobs waited for their answers for minutes.
    with running() as (_, submit):
        doomed = submit(("break once", name, str(tmp_path / "flag")))
        behind = submit("behind it")
        assert doomed.wait() == "survived"
        assert behind.wait() == "behind it"


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (WorkerHandle, "_announce"),
        (WorkerHandle, "_read"),
        (WorkerHandle, "_clear"),
        (WorkerHandle, "_retry_jobs"),
        (WorkerHandle, "_retry"),
        (Roster, "review"),
        (Health, "record_restart"),
    ],
    ids=lambda one: one if isinstance(one, str) else one.__name__,
)
def test_a_step_between_two_lives_of_a_worker_may_fail(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, owner: type, name: str
) -> None:
    # The thread that starts the worker ended, and with it the worker; nobody started another.
    step = getattr(owner, name)
    failed: list[bool] = []

    def fail_once(*args: Any) -> Any:
        if not failed:
            failed.append(True)
            raise MemoryError
        return step(*args)

    with running(max_attempts=3) as (_, submit):
        assert submit(0).wait() == 0
        monkeypatch.setattr(owner, name, fail_once)
        assert submit(("die once", str(tmp_path / "flag"))).wait() == "survived"
        assert submit(1).wait() == 1
    assert failed


def test_a_killed_worker_is_replaced_and_its_jobs_done_again(tmp_path: Path) -> None:
    restarted: list[str] = []
    with running(events=PoolEvents(on_restart=restarted.append)) as (_, submit):
        doomed = submit(("die once", str(tmp_path / "flag")))
        behind = submit("behind it")
        assert doomed.wait() == "survived"
        assert behind.wait() == "behind it"
        assert (doomed.calls, behind.calls) == (1, 1)
        assert restarted == ["echo-0"]


def test_a_job_that_kills_its_workers_fails_alone() -> None:
    with running(2, prefetch=0) as (pool, submit):
        poison = submit("die")
        with pytest.raises(InternalError, match="died 2 times"):
            poison.wait()
        assert [submit(n).wait() for n in range(10)] == list(range(10))
        assert sum(one["restarts"] for one in pool.statistics()) == 2


def test_a_job_that_kills_its_workers_takes_none_of_its_company_with_it() -> None:
    with running(2, concurrency=2, prefetch=1) as (_, submit):
        answers = [submit("die" if n in (7, 20) else n) for n in range(40)]
        for n, answer in enumerate(answers):
            if n in (7, 20):
                with pytest.raises(InternalError, match="died 2 times"):
                    answer.wait()
            else:
                assert answer.wait() == n
            assert answer.calls == 1


def test_kill_9_from_outside_while_working(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with running() as (pool, submit):
        waiting = submit(("wait for", str(gate)))
        deadline = time.monotonic() + 10
        while pool.statistics()[0]["in_flight"] == 0 and time.monotonic() < deadline:
            threading.Event().wait(0.005)
        (pid,) = pool.process_ids()
        os.kill(pid, signal.SIGKILL)
        gate.touch()
        assert waiting.wait() == ("wait for", str(gate))


def test_requests_run_at_once_up_to_the_workers_concurrency(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with running(concurrency=2, prefetch=0) as (_, submit):
        blocked = submit(("wait for", str(gate)))
        assert submit("passes").wait() == "passes"
        gate.touch()
        blocked.wait()


@contextmanager
def running_both(
    factory: str = "load_express", **options: Any
) -> Iterator[tuple[WorkerPool, Callable[..., Answer]]]:
    """A pool, and a function that submits jobs of both kinds to it."""
    source = QueueSource()
    spec = WorkerSpec("echo-0", f"tests.doubles.workers:{factory}", 1)
    pool = WorkerPool(PoolConfig("echo", [spec], **options), source)
    pool.start()

    def submit(payload: Any, *, urgent: bool = False, **fields: Any) -> Answer:
        answer = Answer(payload, urgent=urgent, **fields)
        if urgent:
            source.urgent.append(answer.job)
            pool.dispatch_urgent()
        else:
            source.jobs.put(answer.job)
        return answer

    try:
        yield pool, submit
    finally:
        pool.close()


def test_urgent_jobs_run_beside_a_worker_that_is_full(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with running_both() as (pool, submit):
        blocked = [submit(("wait for", str(gate))) for _ in range(3)]
        eventually(lambda: pool.statistics()[0]["in_flight"] == 2, "it is full")
        urgent = [submit(n, urgent=True) for n in range(20)]
        assert [one.wait() for one in urgent] == list(range(20))
        assert not any(one.calls for one in blocked)
        gate.touch()
        for one in blocked:
            one.wait()


def test_urgent_jobs_overtake_what_waits_in_a_worker_without_room_for_more(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    ends: list[str] = []
    with running_both("load_echo") as (pool, submit):
        first = submit(("wait for", str(gate)))
        eventually(Path(f"{gate}.begun").exists, "it has begun")
        second, urgent = submit("other"), submit("urgent", urgent=True)
        for answer in (second, urgent):
            note_end(answer, ends)
        eventually(lambda: pool.statistics()[0]["in_flight"] == 3, "it has all")
        gate.touch()
        for answer in (first, second, urgent):
            answer.wait()
        assert ends == ["urgent", "other"]


def test_other_jobs_go_on_under_a_flood_of_urgent_ones() -> None:
    with running_both("load_echo") as (_, submit):
        ends: list[str] = []
        others = [submit(f"other {n}") for n in range(5)]
        stop = threading.Event()

        def flood() -> None:
            answers = [submit(("pause", 0.001), urgent=True) for _ in range(4)]
            while not stop.is_set():
                answers.pop(0).wait()
                answers.append(submit(("pause", 0.001), urgent=True))
            for answer in answers:
                answer.wait()

        for answer in others:
            note_end(answer, ends)
        flooding = threading.Thread(target=flood)
        flooding.start()
        try:
            assert [answer.wait() for answer in others] == [f"other {n}" for n in range(5)]
        finally:
            stop.set()
            flooding.join(30)


def test_urgent_jobs_survive_their_worker(tmp_path: Path) -> None:
    with running_both() as (pool, submit):
        doomed = submit(("die once", str(tmp_path / "flag")), urgent=True)
        behind = [submit(n, urgent=True) for n in range(5)]
        assert doomed.wait() == "survived"
        assert [one.wait() for one in behind] == list(range(5))
        assert sum(one["restarts"] for one in pool.statistics()) == 1


def note_end(answer: Answer, ends: list[str]) -> None:
    """Has a job's result noted when it comes."""
    done = answer.job.task

    def noted(result: Any, error: Exception | None) -> None:
        ends.append(result)
        done(result, error)

    answer.job.task = noted


def test_a_worker_that_cannot_load_stops_the_start_with_its_reason() -> None:
    specs = [
        WorkerSpec("good", "tests.doubles.workers:load_echo", 1),
        WorkerSpec("bad", "tests.doubles.workers:load_broken", "no such device; install one"),
    ]
    pool = WorkerPool(PoolConfig("echo", specs), QueueSource())
    with pytest.raises(BackendError, match="no such device; install one"):
        pool.start()
    assert pool.process_ids() == []


def test_a_worker_that_exits_while_loading_is_named() -> None:
    spec = WorkerSpec("cpu-0", "tests.doubles.workers:load_dying", None)
    with pytest.raises(BackendError, match=r"cpu-0 ended while it loaded \(exit status 7\)"):
        WorkerPool(PoolConfig("echo", [spec]), QueueSource()).start()


@pytest.mark.parametrize("payload", ["answer unsendable", "answer unreadable", lambda: None])
def test_what_cannot_cross_the_pipe_fails_alone(payload: Any) -> None:
    # It ended the thread that met it: a job, or the whole pool, was never heard of again.
    with running() as (_, submit):
        with pytest.raises(InternalError):
            submit(payload).wait()
        assert submit("still there").wait() == "still there"


def test_a_worker_that_restarts_while_the_pool_closes_is_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # It was started after `close` had killed all there were, and nobody ended it.
    starting, killed = threading.Event(), threading.Event()
    begin = subprocess.Popen

    def late(*args: Any, **options: Any) -> subprocess.Popen[bytes]:
        starting.set()
        assert killed.wait(10)
        return begin(*args, **options)

    with running() as (pool, submit):
        submit("still there").wait()
        monkeypatch.setattr(subprocess, "Popen", late)
        os.kill(pool.process_ids()[0], signal.SIGKILL)
        assert starting.wait(10)
        (handle,) = pool._roster.all
        kill = handle.kill

        def kill_and_tell() -> None:
            kill()
            killed.set()

        monkeypatch.setattr(handle, "kill", kill_and_tell)
        pool.close()
        handle.thread.join(10)
        assert not handle.thread.is_alive()


def test_close_leaves_no_process() -> None:
    with running(3) as (pool, _):
        pids = pool.process_ids()
        assert len(pids) == 3
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_workers_die_with_a_killed_parent() -> None:
    program = textwrap.dedent("""
        import sys, time
        from tests.unit.workers.test_pool import running
        with running(2) as (pool, submit):
            print(*pool.process_ids(), flush=True)
            time.sleep(60)
    """)
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    with parent:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 2
        parent.kill()
    deadline = time.monotonic() + 10
    while any(_alive(pid) for pid in pids) and time.monotonic() < deadline:
        threading.Event().wait(0.01)
    assert not any(_alive(pid) for pid in pids)


def _alive(pid: int) -> bool:
    try:
        # A zombie that nobody reaps (no init in a container) is dead enough.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_worker_is_idle_only_while_no_worker_has_a_job(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with running_both() as (pool, submit):
        assert pool.idle_worker() == "echo-0"
        other = submit(("wait for", str(gate)))
        eventually(Path(f"{gate}.begun").exists, "it has begun")
        assert pool.idle_worker() is None
        gate.touch()
        other.wait()
        assert pool.idle_worker() == "echo-0"
    assert pool.idle_worker() is None  # it is closed


def test_a_pool_does_not_start_if_what_loads_meanwhile_fails() -> None:
    def broken() -> None:
        raise BackendError("no such model")

    spec = WorkerSpec("echo-0", "tests.doubles.workers:load_express", 1)
    pool = WorkerPool(PoolConfig("echo", [spec]), QueueSource())
    with pytest.raises(BackendError, match="no such model"):
        pool.start(broken)
    assert pool.process_ids() == []


@pytest.mark.parametrize("urgent", [False, True])
def test_a_job_is_not_lost_when_the_step_that_sends_it_fails(
    monkeypatch: pytest.MonkeyPatch, urgent: bool
) -> None:
    # The job had left its queue before it was sent, so nobody heard of it again.
    send = WorkerPool._send_first
    failed: list[bool] = []

    def fail_once(pool: WorkerPool, *args: Any) -> None:
        if not failed:
            failed.append(True)
            raise MemoryError
        send(pool, *args)

    monkeypatch.setattr(WorkerPool, "_send_first", fail_once)
    with running_both() as (_, submit):
        answer = submit("work", urgent=urgent)
        assert answer.wait() == "work"
        assert answer.calls == 1
    assert failed


def test_a_job_is_not_lost_when_its_failure_cannot_be_logged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    send, failed = WorkerHandle.send_job, []

    def fail_once(handle: WorkerHandle, job: Job) -> None:
        if not failed:
            failed.append(job)
            raise MemoryError
        send(handle, job)

    def failing(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(WorkerHandle, "send_job", fail_once)
    monkeypatch.setattr("fletcher.workers.pool.log.exception", failing)
    with running() as (_, submit):
        answer = submit("work")
        assert answer.wait() == "work"
        assert answer.calls == 1


@pytest.mark.parametrize("error", [OSError(12, "no memory"), BrokenPipeError(), MemoryError()])
def test_a_request_that_cannot_be_sent_is_retried_once(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    # A worker that was alive was waited for; without memory for the log, the job ran twice.
    send, errors = worker_handle.send, [error]

    def fail_once(*args: Any) -> None:
        if errors and threading.current_thread().name != "echo-0-reader":
            raise errors.pop()
        send(*args)

    def failing(*_: object) -> None:
        raise MemoryError

    with running() as (_, submit):
        assert submit(0).wait() == 0
        monkeypatch.setattr(worker_handle, "send", fail_once)
        monkeypatch.setattr(worker_handle.log, "exception", failing)
        answer = submit("work")
        assert answer.wait() == "work"
        assert (answer.calls, answer.job.attempts) == (1, 1)
    assert not errors


@pytest.mark.parametrize("restarted", [False, True])
def test_a_worker_goes_on_when_urgent_jobs_cannot_be_sent_after_its_answer(
    monkeypatch: pytest.MonkeyPatch, restarted: bool
) -> None:
    # The thread that reads the worker's answers ended, and its next job was waited for for ever.
    dispatch = WorkerPool.dispatch_urgent
    failed: list[bool] = []

    def fail_once(pool: WorkerPool) -> None:
        if threading.current_thread().name == "echo-0-reader" and not failed:
            failed.append(True)
            raise MemoryError
        dispatch(pool)

    with running_both() as (pool, submit):
        assert submit(0).wait() == 0
        monkeypatch.setattr(WorkerPool, "dispatch_urgent", fail_once)
        if restarted:
            os.kill(pool.process_ids()[0], signal.SIGKILL)
        assert [submit(n).wait() for n in range(1, 4)] == [1, 2, 3]
    assert failed
