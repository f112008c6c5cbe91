"""The single-text path: short texts embedded on the thread that waits for them.

The ordinary path takes a text from the calling thread to a tokenizer process, to a replica process,
to the thread that reads its answers, and back. For one short text these hand-overs cost more than
the work. This path has none of them:

- `path.InteractivePath` tokenizes with a copy of the tokenizer in this process: saves a round trip
  to a tokenizer process.
- It runs a copy of the model in this process: saves a round trip to a replica, and the change to
  the thread that reads its answers.
- `EmbedStream.run_on_waiting_thread` computes the vectors on the thread that waits for them: saves
  a thread change.
- `single_row` reads and builds columns of one row from bytes: Arrow's and NumPy's functions for
  many rows take three times as long for one.

Two helpers lie with the code that they shorten: `Tokenizer.encode` skips steps over whole arrays
for a little text, and `workers.messages` sends small runs without pickle, which is for texts that
go to a replica after all.

Only short texts take this path, and only while the replicas and the scheduler are idle. All others,
and all texts under `--isolate-engine`, take the ordinary path. So does a text whose run fails here.
"""
