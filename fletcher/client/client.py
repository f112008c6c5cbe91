"""`connect` and `Client`: calls to a Fletcher server from Python."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fletcher.client.connection import Connection, TlsOptions, TransferOptions
from fletcher.client.exchange import Exchange
from fletcher.client.files import ingest_files, source_options
from fletcher.client.messages import PutSummary, as_batches, messages
from fletcher.client.prompts import DOCUMENT_PROMPTS, QUERY_PROMPTS, default_prompt, served_model
from fletcher.client.put import OnAck, UploadSession
from fletcher.client.stream import DocumentStream
from fletcher.core.chunking import AGGREGATIONS, Chunking
from fletcher.core.command import EmbedCommand
from fletcher.errors import BY_CODE, InternalError, InvalidCommandError
from fletcher.readers import TextSource, open_source
from fletcher.util.closing import Closing

DEFAULT_TIMEOUT_S = 20.0
# Reading, compiling and warming up a large model takes minutes.
LOAD_TIMEOUT_S = 300.0
# The store may read all rows of a dataset to find those of the upload.
DELETE_TIMEOUT_S = 300.0
_EMBED_ROWS = 4096


def connect(
    uri: str,
    *,
    token: str | None = None,
    tls: TlsOptions | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    transfer: TransferOptions | None = None,
    compression: str | None = None,
) -> Client:
    """Connect to a server and check that it answers.

    Args:
        uri: `grpc://HOST:PORT` or `grpc+tls://HOST:PORT`.
        token: Bearer token, for servers that ask for one.
        tls: Certificates other than the system's, for `grpc+tls`.
        timeout_s: Longest wait for the connection, and for the answers of short calls.
        transfer: Sizes, windows and retries of uploads and exchanges.
        compression: Overrides `transfer.compression`: `none`, `lz4`, `zstd` or `auto`.

    Raises:
        InvalidCommandError: `uri` or `compression` is malformed, or a certificate cannot be read.
        UnavailableError: No server answers.
        UnauthenticatedError, UnauthorizedError: The token is missing or wrong.
    """
    transfer = transfer or TransferOptions()
    if compression is not None:
        transfer = replace(transfer, compression=compression)
    connection = Connection(uri, token=token, tls=tls, timeout_s=timeout_s, transfer=transfer)
    try:
        connection.check_server()
    except BaseException:
        connection.close()
        raise
    return Client(connection)


class Client(Closing):
    """A connection to a server; made by `connect`, closed by `close` or `with`.

    Thread-safe. Every method raises a FletcherError if the server refuses or fails.

    Attributes:
        address: The server's address, as given to `connect`.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.address = connection.address

    def __repr__(self) -> str:
        return f"<fletcher.Client of {self.address}>"

    def put(
        self,
        data: Any,
        options: EmbedCommand | str,
        *,
        row_offset: int = 0,
        end: bool = True,
        resume: bool = False,
        on_ack: OnAck | None = None,
    ) -> PutSummary:
        """Embed text into a dataset of the server's store.

        After a broken connection, the upload resumes after the rows that are durable on the server.
        To send the other rows again, the client keeps unacknowledged rows in memory, up to
        `TransferOptions.window_bytes`.

        Args:
            data: A RecordBatch, Table, RecordBatchReader, `fletcher.TextSource`, DataFrame of
                pandas or Polars, or an iterable of RecordBatches. `options` names the columns to
                use.
            options: Options of the upload, or the dataset's name.
            row_offset: Offset of the first row in the upload.
            end: Whether these are the upload's last rows. Only then can the upload become complete.
            resume: Whether to skip rows that the server already has from the upload
                `options.upload_id`.
            on_ack: Called on this thread, from time to time, with the newest acknowledgement.

        Returns:
            The upload's result. Failed rows are listed in its `errors` and raise no exception.
        """
        options = _as_options(options)
        if options.upload_id is None:
            options = replace(options, upload_id=uuid.uuid4().hex)
        if row_offset < 0:
            raise InvalidCommandError(f"`row_offset` is {row_offset}, expected 0 or more")
        upload = UploadSession(
            self._connection, data, options, row_offset=row_offset, end=end, on_ack=on_ack
        )
        return upload.send_rows(ask_first=resume)

    def ingest(
        self,
        source: TextSource | str | Path | Iterable[str | Path],
        options: EmbedCommand | str,
        *,
        on_ack: OnAck | None = None,
    ) -> PutSummary:
        """Embed files into a dataset, each in an upload named after its content.

        To resume after a crash, make the same call again: no row is stored twice. The same holds
        if a file was repaired or added since. With a `mode` other than append, and for standard
        input, all files are one upload.

        Args:
            source: A source from `fletcher.open_source`, or paths to open with the columns of
                `options`.
            options: Options of the upload, or the dataset's name. With `upload_id`, all files are
                one upload of that name. By default the name of a file's upload is a hash of its
                content and the dataset; for standard input it is random.
            on_ack: See `put`.
        """
        options = _as_options(options)
        if not isinstance(source, TextSource):
            id_column = None if options.id_column == "id" else options.id_column
            source = open_source(
                source,
                text_column=options.text_column,
                id_column=id_column,
                columns=options.columns,
            )
        return ingest_files(self.put, source, source_options(options, source.selection), on_ack)

    def exchange(self, data: Any, options: EmbedCommand | None = None) -> Exchange:
        """Embed text and return an iterator over batches with vectors.

        There is one result batch for each input batch that has rows, in the same order.

        Args:
            data: See `put`.
            options: Options of the exchange; None: the server's defaults. With `continuous`, rows
                are parts of documents, and the server returns a batch whenever chunks are complete.
        """
        schema, batches = as_batches(data)
        outgoing = messages(batches, max_bytes=self._connection.transfer.message_bytes)
        return Exchange(self._connection, schema, outgoing, options or EmbedCommand())

    def stream(
        self,
        pieces: Iterable[str | tuple[str, str] | None],
        *,
        chunking: str = "sentences:none",
        **options: Any,
    ) -> DocumentStream:
        """Cut documents that arrive in parts into chunks, and embed the chunks.

        Args:
            pieces: Parts of documents, cut anywhere. A part is a text, or (ID, text), where a new
                ID starts a new document. None ends a document, and so does the end of `pieces`.
                Documents without IDs are called "0", "1", and so on. Each part is sent immediately
                in a separate message, so join very short parts.
            chunking: Rule for cutting documents; its aggregation is `none`.
            **options: Fields of EmbedCommand, such as `model`, `prompt`, `dtype` (default float32)
                or `include_text` (default true).
        """
        given = {"dtype": "float32", "include_text": True, **options, "chunking": chunking}
        wanted = EmbedCommand.from_mapping({**given, "continuous": True})
        return DocumentStream(self._connection, pieces, wanted)

    def embed(self, texts: Iterable[str], **options: Any) -> npt.NDArray[Any]:
        """Embed texts and return their vectors.

        Args:
            texts: An iterable of Unicode texts; a single string is refused.
            **options: Fields of EmbedCommand, such as `model`, `prompt`, `dims`, `dtype` (default
                float32).

        Returns:
            Array [len(texts), dims] of `dtype`; for `ubinary`, uint8 [len(texts), dims / 8]. To
            convert int8 to float32, use `exchange`, which also returns the scales or ranges.

        Raises:
            FletcherError: A text has no vector; the message says which text and why.
        """
        if isinstance(texts, str):
            raise InvalidCommandError(
                "`texts` is one string, expected a list of them", field="texts"
            )
        wanted = EmbedCommand.from_mapping({"dtype": "float32", **options})
        chunking = Chunking.from_text(wanted.chunking or "none")
        if chunking is not None and chunking.rows:
            raise InvalidCommandError(
                f"`chunking` is {chunking}, which makes several vectors per text; use `exchange`",
                field="chunking",
                allowed=AGGREGATIONS[:-1],
            )
        try:
            column = pa.array(texts, pa.utf8())
        except (pa.ArrowException, TypeError, UnicodeError):
            raise InvalidCommandError(
                "`texts` holds a value that is not Unicode text", field="texts"
            ) from None
        table = pa.table({wanted.text_column: column})
        parts = []
        with self.exchange(table.to_reader(max_chunksize=_EMBED_ROWS), wanted) as exchange:
            for batch in exchange:
                if exchange.errors:
                    failed = exchange.errors[0]
                    kind = BY_CODE.get(failed.code, InternalError)
                    raise kind(f"text {failed.row}: {failed.message}")
                vectors = batch.column("vector")
                _check_one_each(vectors.type)
                if vectors.null_count:
                    raise InternalError("the server returned a null vector without an error")
                parts.append(vectors.flatten().to_numpy().reshape(len(vectors), -1))
            if not parts:
                vector = exchange.schema.field("vector").type
                _check_one_each(vector)
                return np.zeros((0, vector.list_size), vector.value_type.to_pandas_dtype())
        embeddings = np.concatenate(parts)
        if len(embeddings) != len(column):
            raise InternalError(f"{len(embeddings)} vectors came back for {len(column)} texts")
        return embeddings

    def upload_status(
        self, upload_id: str, dataset: str | None = None, store: str | None = None
    ) -> dict[str, Any]:
        """Progress of an upload: `rows_durable`, `ranges` (inclusive) and `complete`."""
        body = {"upload_id": upload_id} | ({} if dataset is None else {"dataset": dataset})
        body |= {} if store is None else {"store": store}
        return self._connection.action("upload_status", body)

    def delete_upload(self, upload_id: str, dataset: str, store: str | None = None) -> int:
        """Delete the rows of an upload from its store, and return their number.

        The upload must have ended. Afterwards the same id names a new upload.

        Raises:
            InvalidCommandError: The store cannot delete rows for good.
            UploadConflictError: The upload has a connection.
        """
        body = {"upload_id": upload_id, "dataset": dataset}
        body |= {} if store is None else {"store": store}
        return int(self._connection.action("delete_upload", body, DELETE_TIMEOUT_S)["rows_deleted"])

    def stats(self) -> dict[str, Any]:
        """The server's counters, durations, queues and workers."""
        return self._connection.action("stats")

    def list_models(self) -> list[dict[str, Any]]:
        """Model versions on the server, each with ModelInfo's fields (docs/wire.md)."""
        return list(self._connection.action("list_models").get("models", []))

    def aliases(self) -> dict[str, str]:
        """Aliases, with the traffic share of each model: `{"search": "a:0.9,b:0.1"}`."""
        return dict(self._connection.action("list_models").get("aliases", {}))

    def prompt_for(
        self, purpose: Literal["query", "document"], model: str | None = None
    ) -> str | None:
        """Name of a model's prompt for queries or documents; None if it has none.

        Pass the name as `prompt` to `embed` or EmbedCommand. `model` is `name` or `name@hash`;
        None: the server's default model.

        Raises:
            ModelMismatchError: The server does not serve the model.
        """
        names = {"query": QUERY_PROMPTS, "document": DOCUMENT_PROMPTS}[purpose]
        return default_prompt(served_model(self, model), names)

    def load_model(self, model: str, *, timeout_s: float = LOAD_TIMEOUT_S) -> str:
        """Load an installed model or version, and return its `name@hash`.

        `model` is `name` or `name@hash`. `timeout_s` is the longest wait until the model is ready.
        """
        return str(self._connection.action("load_model", {"model": model}, timeout_s)["model"])

    def swap_model(self, model: str, *, timeout_s: float = LOAD_TIMEOUT_S) -> str:
        """Switch a model's name to its newest installed version, or to `name@hash`.

        Running calls keep their version. New calls use the version that is returned as `name@hash`.
        """
        return str(self._connection.action("swap_model", {"model": model}, timeout_s)["model"])

    def unload_model(self, model: str, *, force: bool = False) -> str:
        """Unload a model and return its `name@hash`; `force` ends the calls that use it."""
        body = {"model": model, "force": force}
        return str(self._connection.action("unload_model", body)["model"])

    def set_alias(self, alias: str, models: Mapping[str, float] | None) -> dict[str, str]:
        """Divide calls for an alias among models, by weight; return all aliases.

        The alias `default` serves calls that name no model. Without `models`, the alias is deleted.
        """
        shares = ",".join(f"{name}:{weight:.12g}" for name, weight in (models or {}).items())
        answer = self._connection.action("set_alias", {"alias": alias, "models": shares})
        return dict(answer["aliases"])

    def health(self) -> dict[str, Any]:
        """The server's health; any answer means that its process is alive."""
        return self._connection.action("health")

    def ready(self) -> bool:
        """Whether the server accepts new calls."""
        return bool(self._connection.action("ready").get("ready"))

    def close(self) -> None:
        """Close the connection. Idempotent."""
        self._connection.close()


def _as_options(options: EmbedCommand | str) -> EmbedCommand:
    options = EmbedCommand(dataset=options) if isinstance(options, str) else options
    if options.dataset is None:
        raise InvalidCommandError("`dataset` is missing", field="dataset")
    return options


def _check_one_each(kind: pa.DataType) -> None:
    """Refuse sparse weights and several vectors per text."""
    if not pa.types.is_fixed_size_list(kind):
        raise InvalidCommandError(
            f"the model returns {kind} for each text, expected one vector; "
            "`exchange` returns such vectors"
        )
