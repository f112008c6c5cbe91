"""Chunks of text as it arrives, with plain pyarrow: tail -f FILE | python examples/stream.py [URI].

The lines of standard input are pieces of a document; an empty line ends it. Each chunk is printed
as soon as no later text can change it. With --whole each document is one row of an ordinary
exchange: the chunks are the same and come later.
"""

import json
import sys
import threading

import pyarrow as pa
from pyarrow import flight

whole = "--whole" in sys.argv
arguments = [one for one in sys.argv[1:] if one != "--whole"]
if len(arguments) > 1:
    sys.exit("usage: python examples/stream.py [--whole] [grpc://HOST:PORT] < FILE")
address = arguments[0] if arguments else "grpc://127.0.0.1:8815"
command = {
    "chunking": "sentences:32:none",  # none: each chunk is a row, without a mean of their vectors
    "include_text": True,
    "continuous": not whole,  # consecutive rows of one id are pieces of a document
}
schema = pa.schema([("id", pa.int64()), ("text", pa.utf8())])
client = flight.connect(address)
try:
    writer, reader = client.do_exchange(
        flight.FlightDescriptor.for_command(json.dumps(command).encode())
    )
except flight.FlightUnavailableError:
    sys.exit(f"nobody answers at {address}; start a server: fletcher-serve")


def send(document: int, text: str, metadata: dict[str, bool]) -> None:
    batch = pa.RecordBatch.from_pydict({"id": [document], "text": [text]}, schema)
    writer.write_with_metadata(batch, json.dumps(metadata).encode())


def write() -> None:
    writer.begin(schema)
    document, text = 0, ""
    for line in sys.stdin:
        if whole:
            text += line
        else:  # another id or the end of the exchange also end a document
            send(document, line, {"document_end": not line.strip()})
        if not line.strip():
            if whole:
                send(document, text, {})
            document, text = document + 1, ""
    if text:
        send(document, text, {})
    writer.done_writing()


thread = threading.Thread(target=write, daemon=True)  # otherwise it keeps a failed call open
thread.start()
columns = ["id", "chunk_index", "chunk_start", "chunk_end", "text"]
for chunk in reader:  # any number for each batch written; the last one has "last": true
    if chunk.data is None:
        reader.cancel()
        sys.exit("the call failed: " + json.loads(chunk.app_metadata.to_pybytes())["message"])
    for error in json.loads(chunk.app_metadata.to_pybytes())["errors"]:
        print("document", error["id"], "failed:", error["message"])
    for row in chunk.data.select(columns).to_pylist():
        print(*row.values(), flush=True)
thread.join()
writer.close()
