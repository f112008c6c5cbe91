"""Vectors of texts by DoExchange with plain pyarrow: python examples/exchange.py TEXT...

Read answers while you write, or both sides wait for each other once the connection is full.
"""

import json
import sys
import threading

import pyarrow as pa
from pyarrow import flight

texts = sys.argv[1:] or ["play go against the computer", "a board game for two"]
address = "grpc://127.0.0.1:8815"
client = flight.connect(address)
command = json.dumps({"dtype": "float32"}).encode()
try:
    writer, reader = client.do_exchange(flight.FlightDescriptor.for_command(command))
except flight.FlightUnavailableError:
    sys.exit(f"nobody answers at {address}; start a server: fletcher-serve")
batch = pa.RecordBatch.from_pydict({"text": texts})


def write() -> None:
    writer.begin(batch.schema)
    writer.write_batch(batch)  # as many as there are
    writer.done_writing()


thread = threading.Thread(target=write)
thread.start()
for chunk in reader:  # one for each batch written, in the same order
    if chunk.data is None:
        break  # the call failed; `close` raises why
    for error in json.loads(chunk.app_metadata.to_pybytes())["errors"]:
        print("row", error["row"], "failed:", error["message"])
    for text, vector in zip(texts, chunk.data.column("vector").to_pylist(), strict=True):
        print(text, vector and [round(number, 4) for number in vector[:4]], "...")
thread.join()
writer.close()
