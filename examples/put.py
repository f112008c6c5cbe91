"""Text into a dataset by DoPut with plain pyarrow: python examples/put.py FILE DATASET [URI].

The server answers with acknowledgements while it stores, so one thread writes and one reads.
"""

import json
import sys
import threading

import pyarrow.parquet as pq
from pyarrow import flight

if len(sys.argv) not in (3, 4):
    sys.exit("usage: python examples/put.py FILE.parquet DATASET [grpc://HOST:PORT]")
path, dataset = sys.argv[1:3]
address = sys.argv[3] if len(sys.argv) > 3 else "grpc://127.0.0.1:8815"

# The upload's name makes it repeatable: the server does not store its rows again.
command = {
    "dataset": dataset,
    "upload_id": "example",
    "text_column": "body",
    "id_column": "package",
}
file = pq.ParquetFile(path)
schema = file.schema_arrow
client = flight.connect(address)
try:
    writer, replies = client.do_put(
        flight.FlightDescriptor.for_command(json.dumps(command).encode()), schema
    )
except flight.FlightUnavailableError:
    sys.exit(f"nobody answers at {address}; start a server: fletcher-serve")


def read_replies() -> None:
    while (reply := replies.read()) is not None:
        message = json.loads(reply.to_pybytes())
        print(
            message["type"], "durable:", message["rows_durable"], "failed:", message["rows_failed"]
        )
        if message["type"] == "summary" and not message["complete"]:
            print("incomplete:", message["errors"])


reader = threading.Thread(target=read_replies)
reader.start()
with writer:
    rows = 0
    for number, batch in enumerate(file.iter_batches(batch_size=1000)):
        metadata = {"batch_id": number, "row_offset": rows}
        writer.write_with_metadata(batch, json.dumps(metadata).encode())
        rows += batch.num_rows
    # Without this the server cannot tell a finished upload from an interrupted one.
    writer.write_metadata(json.dumps({"end": True, "rows": rows}).encode())
    writer.done_writing()
    reader.join()
