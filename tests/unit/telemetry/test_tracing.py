"""Instruments and their export, against a real collector stand-in over HTTP."""

from __future__ import annotations

import builtins
import gzip
import json
import logging
import subprocess
import sys
import threading
import time
from collections import Counter as Counts
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import FrameType

import pytest
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from fletcher.errors import ConfigError
from fletcher.telemetry.metrics import Counter, Instruments
from fletcher.telemetry.tracing import ExportTiming, configure

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = f"00-{TRACE_ID}-b7ad6b7169203331-01"


class Collector:
    """Keeps the bodies that were posted to it, by path."""

    def __init__(self) -> None:
        self.bodies: dict[str, list[bytes]] = {"/v1/traces": [], "/v1/metrics": []}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                outer.bodies[self.path].append(body)
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def spans(self) -> dict[str, object]:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
            ExportTraceServiceRequest,
        )

        found = {}
        for body in self.bodies["/v1/traces"]:
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                for scope in resource.scope_spans:
                    found |= {span.name: span for span in scope.spans}
        return found

    def metrics(self) -> tuple[dict[str, object], dict[str, str]]:
        """Metrics of the last export by name, and the resource's attributes."""
        from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
            ExportMetricsServiceRequest,
        )

        (resource,) = ExportMetricsServiceRequest.FromString(
            self.bodies["/v1/metrics"][-1]
        ).resource_metrics
        found = {one.name: one for scope in resource.scope_metrics for one in scope.metrics}
        return found, {one.key: one.value.string_value for one in resource.resource.attributes}


@pytest.fixture
def collector() -> Iterator[Collector]:
    one = Collector()
    yield one
    one.close()


def test_counter_sums_by_label_and_from_many_threads() -> None:
    counter = Counter("tokens", "{token}", "Tokens", "device")

    def count() -> None:
        for _ in range(5000):
            counter.add(2, device="cpu:0")

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counter.add(1, device="cuda:0")
    assert counter.values() == {("cpu:0",): 40_000, ("cuda:0",): 1}


@pytest.mark.parametrize("attributes", [{}, {"stage": "x"}, {"device": "x", "stage": "y"}])
def test_a_label_that_is_not_the_instruments_own_is_refused(attributes: dict[str, str]) -> None:
    counter = Counter("tokens", "{token}", "Tokens", "device")
    with pytest.raises(TypeError, match="takes the labels"):
        counter.add(1, **attributes)


def test_histogram_percentiles_are_near_the_truth() -> None:
    instruments = Instruments()
    for milliseconds in range(1, 1001):
        instruments.stage_duration.record(milliseconds / 1000, stage="tokenize")
    summary = instruments.snapshot()["fletcher.stage.duration"]["tokenize"]
    assert summary["count"] == 1000
    assert summary["sum"] == pytest.approx(500.5)
    assert summary["p50"] == pytest.approx(0.500, rel=0.02)
    assert summary["p95"] == pytest.approx(0.950, rel=0.02)
    assert summary["p99"] == pytest.approx(0.990, rel=0.02)


@pytest.mark.parametrize("seconds", [0.0, 0.00002, 0.0301, 900.0])
def test_one_record_is_its_own_percentiles(seconds: float) -> None:
    instruments = Instruments()
    instruments.stage_duration.record(seconds, stage="append")
    assert instruments.snapshot()["fletcher.stage.duration"]["append"] == {
        "count": 1, "sum": seconds, "p50": seconds, "p95": seconds, "p99": seconds,
    }  # fmt: skip


def test_time_records_a_body_that_raises() -> None:
    instruments = Instruments()
    with pytest.raises(KeyError), instruments.stage_duration.time(stage="append"):
        raise KeyError
    assert instruments.snapshot()["fletcher.stage.duration"]["append"]["count"] == 1


def test_gauge_asks_its_last_callback_each_time() -> None:
    instruments = Instruments()
    gauge = instruments.queue_depth
    depth = [3]
    remove_first = gauge.observe(lambda: 99, stage="append")
    remove = gauge.observe(lambda: depth[0], stage="append")
    assert instruments.snapshot()["fletcher.queue.depth"] == {"append": 3}
    depth[0] = 4
    remove_first()
    assert instruments.snapshot()["fletcher.queue.depth"] == {"append": 4}
    remove()
    assert instruments.snapshot()["fletcher.queue.depth"] == {}


def test_instruments_without_a_value_are_in_the_snapshot_too() -> None:
    snapshot = Instruments().snapshot()
    assert snapshot["fletcher.rows.stored"] == 0
    assert snapshot["fletcher.device.tokens"] == {}
    assert snapshot["fletcher.streams.open"] is None
    assert snapshot["fletcher.stage.duration"] == {}


def test_a_callback_may_count_while_it_is_read() -> None:
    instruments = Instruments()

    def read() -> float:
        instruments.rows_failed.add()
        return 1.0

    instruments.streams_open.observe(read)
    assert instruments.snapshot()["fletcher.streams.open"] == 1.0


def test_a_reader_can_be_attached_beside_the_one_in_memory() -> None:
    reader = InMemoryMetricReader()
    instruments = Instruments([reader])
    instruments.rows_received.add(3)
    assert instruments.snapshot()["fletcher.rows.received"] == 3
    (resource,) = reader.get_metrics_data().resource_metrics
    found = {one.name: one for scope in resource.scope_metrics for one in scope.metrics}
    assert found["fletcher.rows.received"].data.data_points[0].value == 3


def test_snapshot_has_every_instrument_and_is_json() -> None:
    instruments = Instruments()
    instruments.rows_received.add(5)
    instruments.errors.add(1, code="overloaded")
    instruments.stage_duration.record(0.5, stage="append")
    snapshot = json.loads(json.dumps(instruments.snapshot()))
    assert set(snapshot) == {one.name for one in instruments.all()}
    assert len(snapshot) == len(instruments.all())
    assert snapshot["fletcher.rows.received"] == 5
    assert snapshot["fletcher.rows.stored"] == 0
    assert snapshot["fletcher.errors"] == {"overloaded": 1}
    assert snapshot["fletcher.stage.duration"]["append"]["p50"] == 0.5


def test_two_processes_worth_of_telemetry_share_nothing() -> None:
    one, other = configure(), configure()
    one.rows_received.add(7)
    assert other.snapshot()["fletcher.rows.received"] == 0


def test_without_an_endpoint_spans_are_one_object_that_does_nothing() -> None:
    telemetry = configure()
    assert telemetry.extract({"traceparent": [TRACEPARENT]}) is None
    with telemetry.span("do_put") as call, telemetry.span("tokenize", parent=call, rows=3) as span:
        span.set_attributes(tokens=8)
        assert span is call
        assert span.headers() == {}


def test_without_an_endpoint_neither_exporter_nor_tracing_is_imported() -> None:
    code = (
        "import sys; from fletcher.telemetry.tracing import configure; t = configure()\n"
        "t.rows_received.add(1); t.span('x').__enter__(); t.close()\n"
        "unwanted = ('opentelemetry.exporter', 'opentelemetry.sdk.trace')\n"
        "print([name for name in sys.modules if name.startswith(unwanted)])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "code",
    [
        "import fletcher; fletcher.connect",
        "import fletcher.workers.child",
        "from fletcher.cli import main; sys.argv = ['fletcher', '--help']; main()",
    ],
)
def test_help_clients_and_workers_do_without_opentelemetry(code: str) -> None:
    run = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", f"import sys; {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "fletcher" in run.stderr
    assert "opentelemetry" not in run.stderr


def test_counting_is_near_free() -> None:
    # Calls are counted: a time would be that of the tests beside this one.
    telemetry = configure()
    assert _calls_of(lambda: telemetry.device_tokens.add(512, model="m", device="cpu:0")) <= 4


def _calls_of(action: Callable[[], object]) -> int:
    """The number of Python functions called by `action`, itself among them."""
    called: list[str] = []

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            called.append(frame.f_code.co_qualname)

    action()
    previous = sys.getprofile()
    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(previous)
    return len(called)


def test_export_of_spans_carries_the_callers_trace(collector: Collector) -> None:
    telemetry = configure(collector.address)
    parent = telemetry.extract({"traceparent": [TRACEPARENT], "authorization": ["x"]})
    with telemetry.span("do_put", parent=parent) as call:
        with telemetry.span("tokenize", parent=call, rows=3) as work:
            work.set_attributes(tokens=8)
            headers = work.headers()
        with pytest.raises(ValueError, match="boom"), telemetry.span("append", parent=call):
            raise ValueError("boom")
    with telemetry.span("warm_up"):
        pass
    telemetry.close()

    spans = collector.spans()
    assert spans["do_put"].trace_id.hex() == TRACE_ID
    assert spans["do_put"].parent_span_id.hex() == "b7ad6b7169203331"
    assert spans["tokenize"].parent_span_id == spans["do_put"].span_id
    assert {one.key: one.value.int_value for one in spans["tokenize"].attributes} == {
        "rows": 3,
        "tokens": 8,
    }
    assert headers["traceparent"] == f"00-{TRACE_ID}-{spans['tokenize'].span_id.hex()}-01"
    assert spans["append"].status.message == "boom"
    assert [event.name for event in spans["append"].events] == ["exception"]
    assert spans["warm_up"].parent_span_id == b""
    assert spans["warm_up"].trace_id.hex() != TRACE_ID


def test_export_of_metrics_agrees_with_the_snapshot(collector: Collector) -> None:
    telemetry = configure(collector.address, **{"instance.id": "north-1"})
    telemetry.rows_received.add(500)
    telemetry.device_tokens.add(40, model="m", device="cpu:0")
    telemetry.device_tokens.add(2, model="m", device="cpu:1")
    telemetry.queue_depth.observe(lambda: 6, stage="inference")
    telemetry.stage_duration.record(0.25, stage="append")
    snapshot = telemetry.snapshot()
    telemetry.close()

    metrics, resource = collector.metrics()
    assert resource["service.name"] == "fletcher"
    assert resource["service.instance.id"] == "north-1"
    rows = metrics["fletcher.rows.received"]
    assert (rows.unit, rows.sum.is_monotonic) == ("{row}", True)
    assert rows.sum.data_points[0].as_int == snapshot["fletcher.rows.received"] == 500
    tokens = {
        ",".join(sorted(one.value.string_value for one in point.attributes)[::-1]): point.as_int
        for point in metrics["fletcher.device.tokens"].sum.data_points
    }
    assert tokens == snapshot["fletcher.device.tokens"] == {"m,cpu:0": 40, "m,cpu:1": 2}
    assert metrics["fletcher.queue.depth"].gauge.data_points[0].as_int == 6
    (durations,) = metrics["fletcher.stage.duration"].histogram.data_points
    assert (durations.count, durations.sum) == (1, 0.25)
    assert durations.attributes[0].value.string_value == "append"


def test_metrics_are_exported_without_being_closed(collector: Collector) -> None:
    telemetry = configure(collector.address, timing=ExportTiming(interval_s=0.05))
    exported = threading.Event()
    reads = []

    def read() -> float:
        reads.append(1)
        if len(reads) == 2:
            exported.set()
        return 1.0

    telemetry.streams_open.observe(read)
    assert exported.wait(10)
    telemetry.close()
    assert "fletcher.streams.open" in collector.metrics()[0]


def test_closing_twice_and_with_no_collector_ends_soon() -> None:
    gone = Collector()
    gone.close()
    telemetry = configure(gone.address, timing=ExportTiming(timeout_s=1.0))
    with telemetry.span("do_put"):
        telemetry.rows_received.add(1)
    started = time.monotonic()
    telemetry.close()
    telemetry.close()
    assert time.monotonic() - started < 6
    with telemetry.span("after"):
        telemetry.rows_received.add(1)
    assert telemetry.snapshot()["fletcher.rows.received"] == 2


def test_a_collector_that_is_away_is_told_of_now_and_then(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gone = Collector()
    gone.close()
    for one in ("metric_exporter", "trace_exporter"):
        monkeypatch.setattr(
            logging.getLogger(f"opentelemetry.exporter.otlp.proto.http.{one}"), "filters", []
        )
    telemetry = configure(gone.address, timing=ExportTiming(timeout_s=1.0))
    configure(gone.address).close()  # another server of this process
    with telemetry.span("do_put"):
        telemetry.rows_received.add(1)
    telemetry.close()
    by_exporter = Counts(record.name for record in caplog.records)
    assert set(by_exporter.values()) == {1}
    assert len(by_exporter) == 2


@pytest.mark.parametrize("endpoint", ["127.0.0.1:4318", "grpc://127.0.0.1:4317", ""])
def test_an_endpoint_that_is_no_http_address_is_refused(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="`otlp_endpoint`") as caught:
        configure(endpoint)
    assert caught.value.field == "otlp_endpoint"


def test_a_missing_exporter_is_answered_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real_import = builtins.__import__

    def without_exporter(name: str, *rest: object, **more: object) -> object:
        if name.startswith("opentelemetry.exporter"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real_import(name, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without_exporter)
    with pytest.raises(ConfigError, match=r"pip install 'longbow-fletcher\[otlp\]'"):
        configure("http://127.0.0.1:4318")
