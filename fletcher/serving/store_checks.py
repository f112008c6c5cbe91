"""Checks of an upload's command against its store, before the first row."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from fletcher.core.chunking import AGGREGATIONS
from fletcher.core.command import EmbedCommand
from fletcher.errors import InvalidCommandError
from fletcher.models.bundle.bundle import NULL_PREFIX
from fletcher.pipeline.input.intake import Skip
from fletcher.serving.service import Service
from fletcher.serving.session import EmbedSession
from fletcher.stores.base import Store
from fletcher.stores.schemas import check_nanoseconds

log = logging.getLogger(__name__)


def checked_store(service: Service, command: EmbedCommand) -> Store:
    """Find the command's store, and refuse uploads that the store does not take."""
    if command.dataset is None:
        raise InvalidCommandError("`dataset` is missing", field="dataset")
    if command.continuous:
        raise InvalidCommandError(
            "`continuous` is true, but uploads store and resume rows that are whole texts; use "
            "DoExchange, or leave it out",
            field="continuous",
            allowed=["false"],
        )
    _, store = service.delivery.store(command.store)
    capabilities = store.capabilities
    if command.mode in ("upsert", "delta") and not capabilities.upsert:
        allowed = ["append", "overwrite"] if capabilities.overwrite else ["append"]
        raise InvalidCommandError(
            f"`mode` is {command.mode}, but this store does not replace rows; use "
            f"{' or '.join(allowed)}, or another store, such as `lance:`",
            field="mode",
            allowed=allowed,
        )
    if command.mode == "overwrite" and not capabilities.overwrite:
        raise InvalidCommandError(
            "`mode` is overwrite, but a Longbow brings deleted rows back when it restarts; write "
            "to a new dataset, or use another store, such as `lance:`",
            field="mode",
            allowed=["append"],
        )
    return store


def check_output(session: EmbedSession, store: Store) -> None:
    """Refuse kinds of vectors and chunks that a store does not take."""
    spec = session.spec
    if spec.output not in store.capabilities.outputs:
        raise InvalidCommandError(
            f"`model` {session.model.bundle.name} gives {spec.output} vectors, which this store "
            "does not take; `lance:`, `parquet:` and `fletcher store` do, and DoExchange returns "
            "them",
            field="model",
        )
    chunking = spec.chunking
    if chunking is not None and chunking.rows and store.capabilities.counts_groups:
        raise InvalidCommandError(
            f"`chunking` is {chunking}, which makes several rows of a text, but this store "
            "recognises a group by its number of rows; give each text one vector",
            field="chunking",
            allowed=[one for one in AGGREGATIONS if one != chunking.aggregation],
        )


def widened(command: EmbedCommand, dtypes: tuple[str, ...]) -> EmbedCommand:
    """The command with float32 instead of float16, for a store without that."""
    if command.dtype != "float16" or "float16" in dtypes or "float32" not in dtypes:
        return command
    log.info("`dtype` float16 is widened to float32, because the store does not search float16")
    return replace(command, dtype="float32")


def checking_times(schema: pa.Schema, skip: Skip | None) -> Skip | None:
    """A `skip` that also refuses carried times that nanoseconds cannot hold."""
    names = [one.name for one in schema if pa.types.is_timestamp(one.type)]

    def check_rows(rows: pa.RecordBatch, first: int) -> tuple[Any, Any]:
        for name in names:
            if (key := f"carried:{name}") in rows.schema.names:
                check_nanoseconds(rows.column(key), name, first)
        return (np.zeros(rows.num_rows, np.bool_), None) if skip is None else skip(rows, first)

    return check_rows if set(names) - {"timestamp"} else skip


def model_of(store: Store, dataset: str) -> str | None:
    """`name@hash` of the model whose vectors a dataset has; None if that is unknown."""
    schema = store.read_schema(dataset)
    name = (schema.metadata or {}).get(b"fletcher.model") if schema is not None else None
    return None if name is None else name.decode().removeprefix(NULL_PREFIX)
