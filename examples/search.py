"""Texts nearest to a question, with plain pyarrow: python examples/search.py DATASET QUESTION.

Fletcher (fletcher-serve) makes the vector; a store searches: fletcher store --path DIR, or Longbow.
"""

import json
import sys

import pyarrow as pa
from pyarrow import flight

if len(sys.argv) not in (3, 5):
    sys.exit("usage: python examples/search.py DATASET QUESTION [FLETCHER_URI STORE_URI]")
dataset, question = sys.argv[1:3]
addresses = sys.argv[3:] or ["grpc://127.0.0.1:8815", "grpc://127.0.0.1:3000"]


def call(address: str, action: str, body: dict[str, object]) -> list[flight.Result]:
    """Calls an action; without a server, exits with a one-line message."""
    try:
        return list(
            flight.connect(address).do_action(flight.Action(action, json.dumps(body).encode()))
        )
    except flight.FlightUnavailableError:
        sys.exit(f"nobody answers at {address}; it needs both fletcher-serve and a store")


(answer,) = call(addresses[0], "embed", {"texts": [question], "dtype": "float32"})
vector = json.loads(answer.body.to_pybytes())["embeddings"][0]

for result in call(addresses[1], "VectorSearch", {"dataset": dataset, "vector": vector, "k": 5}):
    table = pa.ipc.open_stream(result.body).read_all()
    for row in table.to_pylist():
        print(f"{row['score']:.3f}  {row['id']}")
