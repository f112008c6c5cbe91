"""Small Flight servers for the client's tests: one that behaves, and ways not to."""

from __future__ import annotations

import dataclasses
import json
import threading

import pyarrow as pa
from pyarrow import flight

from fletcher.core.command import WIRE_VERSION
from fletcher.errors import UnknownDatasetError
from fletcher.net.flight_errors import handler_errors


def limit(client, **fields):
    """Changes bounds inside the client's calls; see `CallLimits`."""
    client._connection.limits = dataclasses.replace(client._connection.limits, **fields)


def ack(upload_id, batch_id, first, last, durable):
    return {
        "type": "ack",
        "upload_id": upload_id,
        "batch_id": batch_id,
        "row_first": first,
        "row_last": last,
        "rows_received": last + 1,
        "rows_stored": last + 1,
        "rows_failed": 0,
        "rows_durable": durable,
    }


class Behaving(flight.FlightServerBase):
    """Stores texts by row offset, as the contract wants it; subclasses misbehave."""

    def __init__(self, location="grpc://127.0.0.1:0", **options):
        super().__init__(location, **options)
        self.uri = f"grpc://127.0.0.1:{self.port}"
        self.rows = {}
        self.calls = 0
        self.commands = []
        self.sizes = []
        self.sent_again = 0
        self.announced = None

    def do_action(self, context, action):
        if action.type == "upload_status":
            with handler_errors(context):
                return [json.dumps(self.status(json.loads(action.body.to_pybytes()))).encode()]
        return [json.dumps({"status": "ok", "wire": WIRE_VERSION}).encode()]

    def status(self, body):
        if not self.rows:
            raise UnknownDatasetError("there is no such dataset")
        ranges = [[row, row] for row in sorted(self.rows)]
        merged = []
        for first, last in ranges:
            if merged and merged[-1][1] + 1 == first:
                merged[-1][1] = last
            else:
                merged.append([first, last])
        complete = self.announced == len(self.rows)
        return {"rows_durable": self.durable(), "ranges": merged, "complete": complete}

    def durable(self):
        row = 0
        while row in self.rows:
            row += 1
        return row

    def do_put(self, context, descriptor, reader, writer):
        self.calls += 1
        command = json.loads(descriptor.command)
        self.commands.append(command)
        upload_id = command["upload_id"]
        for chunk in reader:
            fields = json.loads(chunk.app_metadata.to_pybytes())
            if chunk.data is not None:
                self.before(fields)
                first = fields["row_offset"]
                self.sizes.append(chunk.data.nbytes)
                for row, text in enumerate(chunk.data.column("text").to_pylist(), first):
                    self.sent_again += row in self.rows
                    self.rows[row] = text
                last = first + chunk.data.num_rows - 1
                self.reply(writer, ack(upload_id, fields["batch_id"], first, last, self.durable()))
                self.after(fields)
            if fields.get("end"):
                self.announced = fields["rows"]
        self.finish(writer, upload_id)

    def before(self, fields):
        pass

    def after(self, fields):
        pass

    def finish(self, writer, upload_id):
        summary = {
            "type": "summary",
            "upload_id": upload_id,
            "complete": self.announced == len(self.rows) == self.durable(),
            "rows_received": len(self.rows),
            "rows_stored": len(self.rows),
            "rows_failed": 0,
            "rows_durable": self.durable(),
            "rows_deduplicated": 0,
            "model": "m@h",
            "errors": [{"row": 1, "id": "x", "code": "row_too_large", "message": "too large"}],
            "errors_truncated": False,
        }
        self.reply(writer, summary)

    def reply(self, writer, message):
        writer.write(pa.py_buffer(json.dumps(message).encode()))


class Waiting(Behaving):
    """Holds calls until `released`, or until the client is gone."""

    def __init__(self, **options):
        super().__init__(**options)
        self.released = threading.Event()

    def hold(self, context):
        while not (self.released.wait(0.01) or context.is_cancelled()):
            pass

    def __exit__(self, *args):
        self.released.set()
        return super().__exit__(*args)
