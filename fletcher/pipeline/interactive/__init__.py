"""Interactive path: embeds short texts on the thread that waits for their vectors.

On the ordinary path, a text goes from the calling thread to a tokenizer process and then to a
replica process. The result goes to the thread that reads the replica's answers, and back to the
calling thread. For one short text these hand-overs cost more than the work. The interactive path
avoids all of them:

- `path.InteractivePath` tokenizes with a copy of the tokenizer in the front process. This saves a
  round trip to a tokenizer process.
- `path.InteractivePath` runs a copy of the model in the front process. This saves a round trip to a
  replica, and the change to the thread that reads the replica's answers.
- `EmbedStream.run_on_waiting_thread` computes the vectors on the thread that waits for them. This
  saves a thread change.
- `single_row` reads and builds columns of one row from bytes. Arrow's and NumPy's functions, made
  for many rows, take three times as long for one row.

Two shortcuts for short texts are elsewhere, with the code that they speed up. `Tokenizer.encode`
skips its operations on whole arrays. `workers.messages` sends small runs without pickle, for short
texts that go to a replica.

Only short texts take this path, and only while the scheduler and all replicas are idle. All other
texts, and all texts under `--isolate-engine`, take the ordinary path. A text whose run fails on
this path is run again on the ordinary path.
"""
