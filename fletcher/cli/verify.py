"""`fletcher verify`: compare a dataset with what a job stored."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from fletcher.cli.command_line import command, option
from fletcher.cli.connection import EmbedTarget, target_options
from fletcher.cli.jobs import job_folder
from fletcher.cli.options import json_option
from fletcher.cli.terminal import cut, print_json, printable, terminal_width
from fletcher.config.delivery import NO_STORE
from fletcher.errors import ConfigError, UnknownDatasetError
from fletcher.jobs.manifest import JobState, read_manifest

if TYPE_CHECKING:
    import pyarrow as pa

    from fletcher.stores.base import Store

# Least cosine of a vector that is computed again. float16 and another engine cost less.
MIN_COSINE = 0.999
_SHOWN = 20


@command(
    "verify",
    "fletcher verify articles --store lance:vectors",
    "fletcher verify articles --store lance:vectors --canaries 0 --json",
)
@click.argument("job", metavar="JOB")
@option("--canaries N", default=20)
@json_option("Print the result as JSON.")
@target_options("store", "model")
def cli(target: EmbedTarget, job: str, canaries: int, as_json: bool) -> int:
    """Compare the rows of a job with its manifest, and some vectors with new ones.

    All rows are read, and nothing is changed. The exit status is 1 if a row is missing, stored
    twice or altered, or if a vector differs from that of its text.

    Args:
        job: Name of the job, or folder of its manifest; fletcher jobs list names them. A job of a
            store that is a folder has the name of its dataset.
        canaries: Number of random rows of the dataset whose texts are embedded again.
    """
    from fletcher.stores.address import open_store

    config = target.resolve(own_store=True)
    state = read_manifest(job_folder(config, job))
    if state.job is None:
        raise ConfigError(f"`job` is {job!r}, which has stored nothing", field="job")
    sample: list[dict[str, Any]] = []
    with contextlib.closing(open_store(next(iter(config.store_addresses.values())))) as store:
        faults = list(_compare(store, state, sample, canaries))
    checked = 0
    if sample:
        with target.open_client(config.with_options(store=(NO_STORE,))) as client:
            wrong = _wrong_vectors(client, state, sample)
        checked = len(sample)
        faults += [f"row {one!r}: its vector is not that of its text" for one in wrong]
    rows = sum(state.states[one.id].rows_stored for one in state.current())
    unchecked = sum(
        state.state(one) == "done" and one.id not in state.checksums for one in state.current()
    )
    report = {
        "job": job,
        "dataset": state.job.dataset,
        "rows": rows,
        "fragments_without_checksums": unchecked,
        "canaries": checked,
        "faults": faults,
    }
    if as_json:
        print_json(report)
    else:
        _print(report)
    return 1 if faults else 0


def _compare(
    store: Store, state: JobState, sample: list[dict[str, Any]], canaries: int
) -> Iterator[str]:
    """Faults of the stored rows. Fills `sample` with random rows that have a text."""
    from fletcher.jobs.checksums import COLUMNS, differences, sum_uploads

    assert state.job is not None
    dataset = state.job.dataset
    schema = store.read_schema(dataset)
    if schema is None:
        raise UnknownDatasetError(f"there is no dataset {dataset!r} in {store.address}")
    names = [name for name in COLUMNS if name in schema.names]
    known: dict[str, tuple[int, str]] = {}
    paths = {}
    for one in state.current():
        if state.state(one) == "done":
            sums = state.checksums.get(one.id)
            rows = sums.rows if sums else state.states[one.id].rows_stored
            known[one.upload_id] = rows, sums.checksums if sums else ""
            paths[one.upload_id] = one.files[0].path
    is_plain = state.job.options.get("chunking") in (None, "none") and "text" in names
    wanted = canaries if is_plain and _is_float(schema) else 0
    rows_read = store.scan(dataset, columns=names)
    found = sum_uploads(_sampling(rows_read, sample, wanted))
    for upload_id, fault in differences(known, found):
        yield f"{paths[upload_id]}: {fault}"
    others = sum(sums.num_rows for name, sums in found.items() if name not in known)
    replaced = sum(state.state(one) == "replaced" for one in state.fragments.values())
    if others and replaced:
        yield f"{others:,} rows are of changed files, whose former rows are not deleted yet"


def _is_float(schema: pa.Schema) -> bool:
    import pyarrow as pa

    kind = schema.field("vector").type
    return bool(pa.types.is_fixed_size_list(kind) and pa.types.is_floating(kind.value_type))


def _sampling(
    batches: Iterator[pa.RecordBatch], sample: list[dict[str, Any]], size: int
) -> Iterator[pa.RecordBatch]:
    """The batches; `sample` gets random rows that have a text and a vector."""
    chance = random.Random(0)  # noqa: S311 - the same rows in each run
    seen = 0
    for batch in batches:
        yield batch
        for place in range(batch.num_rows if size else 0):
            seen += 1
            at = len(sample) if len(sample) < size else chance.randrange(seen)
            if at >= size:
                continue
            row = batch.slice(place, 1).to_pylist()[0]
            if row["text"] is None or row["vector"] is None:
                continue
            sample[at : at + 1] = [row]


def _wrong_vectors(client: Any, state: JobState, sample: list[dict[str, Any]]) -> list[Any]:
    """Ids of rows whose vector is not that of their text."""
    import numpy as np

    assert state.job is not None
    names = ("prompt", "dims", "layers", "normalize", "truncate")
    options = {name: state.job.options[name] for name in names if name in state.job.options}
    model = state.job.model.partition("@")[0]
    vectors = client.embed([one["text"] for one in sample], model=model, **options)
    wrong = []
    for row, vector in zip(sample, vectors, strict=True):
        stored = np.asarray(row["vector"], np.float32)
        size = float(np.linalg.norm(stored) * np.linalg.norm(vector))
        if not size or float(stored @ vector) / size < MIN_COSINE:
            wrong.append(row.get("id"))
    return wrong


def _print(report: dict[str, Any]) -> None:
    for fault in report["faults"][:_SHOWN]:
        print(cut(printable(fault), terminal_width()))
    more = len(report["faults"]) - _SHOWN
    if more > 0:
        print(f"and {more:,} more; --json lists all")
    state = f"{len(report['faults']):,} faults" if report["faults"] else "no fault"
    print(f"{report['rows']:,} rows, {report['canaries']:,} vectors computed again: {state}")
    if number := report["fragments_without_checksums"]:
        print(f"{number:,} fragments have no checksums: only their numbers of rows were compared")
