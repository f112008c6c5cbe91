"""The texts nearest to a question, with plain pyarrow: python examples/search.py DATASET QUESTION.

Fletcher (fletcher-serve) makes the vector; a store searches: fletcher store --path DIR, or Longbow.
"""

import json
import sys

import pyarrow as pa
from pyarrow import flight

dataset, question = sys.argv[1:3]
fletcher = flight.connect("grpc://127.0.0.1:8815")
store = flight.connect("grpc://127.0.0.1:3000")

body = json.dumps({"texts": [question], "dtype": "float32"}).encode()
(answer,) = fletcher.do_action(flight.Action("embed", body))
vector = json.loads(answer.body.to_pybytes())["embeddings"][0]

search = json.dumps({"dataset": dataset, "vector": vector, "k": 5}).encode()
for result in store.do_action(flight.Action("VectorSearch", search)):
    table = pa.ipc.open_stream(result.body).read_all()
    for row in table.to_pylist():
        print(f"{row['score']:.3f}  {row['id']}")
