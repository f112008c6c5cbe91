"""`connect` and the Client: every call of a Fletcher server, as Python people would have it."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fletcher.client.connection import Connection, TlsOptions, TransferOptions
from fletcher.client.exchange import Exchange
from fletcher.client.messages import PutSummary, RowError, as_batches, messages
from fletcher.client.prompts import (
    DOCUMENT_PROMPTS,
    QUERY_PROMPTS,
    default_prompt,
    served_model,
)
from fletcher.client.put import OnAck, UploadSession
from fletcher.client.stream import DocumentStream
from fletcher.core.chunking import AGGREGATIONS, Chunking
from fletcher.core.command import EmbedCommand
from fletcher.errors import BY_CODE, InternalError, InvalidCommandError
from fletcher.readers import TextSource, open_source

DEFAULT_TIMEOUT_S = 20.0
# A large model takes its time to be read, compiled and warmed up.
LOAD_TIMEOUT_S = 300.0
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
    """Connects to a server and makes sure that it answers.

    Args:
        uri: `grpc://HOST:PORT` or `grpc+tls://HOST:PORT`.
        token: Bearer token, for servers that ask for one.
        tls: Certificates other than the system's, for `grpc+tls`.
        timeout_s: Longest wait for the connection, and for the answers of short calls.
        transfer: Sizes, windows and retries of uploads and exchanges.
        compression: In place of `transfer.compression`: `none`, `lz4`, `zstd` or `auto`.

    Raises:
        InvalidCommandError: `uri` is no such address, `compression` no such word, or a certificate
            cannot be read.
        UnavailableError: Nobody answers there.
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


class Client:
    """A connection to a Fletcher server; made by `connect`, closed by `close` or `with`.

    Threads may share it. Every method raises a FletcherError where the server refuses or fails.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @property
    def address(self) -> str:
        """Where the server is, as given to `connect`."""
        return self._connection.address

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
        """Embeds text into a dataset of the server's store.

        After a broken connection it goes on by itself where the server's durable rows end. What is
        not acknowledged yet is kept in memory for this, up to `TransferOptions.window_bytes`.

        Args:
            data: A RecordBatch, Table, RecordBatchReader, `fletcher.TextSource`, DataFrame of
                pandas or Polars, or an iterable of RecordBatches; columns as `options` names them.
            options: What to do, or just the dataset's name.
            row_offset: Offset of the first row in the upload, where this is not its beginning.
            end: These are the last rows of the upload: it can be complete.
            resume: Ask first which rows of `options.upload_id` the server has, and skip those.
            on_ack: Called now and then, in this thread, with the newest acknowledgement.

        Returns:
            What became of the rows; rows that failed are in `errors`, and no exception.
        """
        options = _with_upload_id(_as_options(options))
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
        """Embeds files into a dataset, once: the upload is named after their contents.

        Running it again, after a crash or for no reason, stores no row twice.

        Args:
            source: From `fletcher.readers.open_source`, or paths to open by it with the columns
                that `options` names.
            options: What to do, or just the dataset's name. Without an `upload_id` it is made of
                the files' contents and the options; of standard input it is random.
            on_ack: As in `put`.
        """
        options = _as_options(options)
        if not isinstance(source, TextSource):
            source = open_source(
                source,
                text_column=options.text_column,
                id_column=None if options.id_column == "id" else options.id_column,
                columns=options.columns,
            )
        chosen = source.selection
        options = replace(
            options,
            text_column=chosen.text,
            id_column=chosen.id or "id",
            columns=chosen.carried,
        )
        if options.upload_id is None:
            options = replace(options, upload_id=ingest_id(source, options))
        return self.put(source, options, resume=True, on_ack=on_ack)

    def exchange(self, data: Any, options: EmbedCommand | None = None) -> Exchange:
        """Embeds text and gives the vectors back: a batch for each batch with rows, in order.

        Args:
            data: As for `put`.
            options: What to do; None: the server's defaults. With `continuous` rows are pieces of
                documents, and batches of chunks come as these are complete.
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
        """Cuts documents that come in pieces into chunks, and gives each when it is complete.

        Args:
            pieces: Texts, cut anywhere, that are joined; None ends the document at hand, and so
                does the end. In place of a text (ID, text), where another ID begins another
                document; without, documents are called "0", "1", and so on. Each travels as soon
                as it is there, by itself: where there are many, join some.
            chunking: How documents are cut; its aggregation is `none`.
            **options: Fields of EmbedCommand, such as `model`, `prompt`, `dtype` (float32 unless
                given), or `include_text` (true unless given).
        """
        given = {"dtype": "float32", "include_text": True, **options, "chunking": chunking}
        wanted = EmbedCommand.from_mapping({**given, "continuous": True})
        return DocumentStream(self._connection, pieces, wanted)

    def embed(self, texts: Iterable[str], **options: Any) -> npt.NDArray[Any]:
        """Vectors of some texts.

        Args:
            texts: The texts.
            **options: Fields of EmbedCommand, such as `model`, `prompt`, `dims`, `dtype` (float32
                unless given).

        Returns:
            [len(texts), dims] of `dtype`; for `ubinary` uint8 [len(texts), dims / 8]. What int8
            means takes the rows' `scale` or the schema's ranges: `exchange` gives both.

        Raises:
            FletcherError: A text has no vector; the message says which and why.
        """
        if isinstance(texts, str):
            raise InvalidCommandError(
                "`texts` is one string, expected a list of them", field="texts"
            )
        wanted = EmbedCommand.from_mapping({"dtype": "float32", **options})
        chunking = Chunking.from_text(wanted.chunking or "none")
        if chunking is not None and chunking.rows:
            raise InvalidCommandError(
                f"`chunking` is {chunking}, which gives a text several vectors; use `exchange`",
                field="chunking",
                allowed=AGGREGATIONS[:-1],
            )
        try:
            column = pa.array(texts, pa.utf8())
        except (pa.ArrowException, TypeError, UnicodeError):
            raise InvalidCommandError(
                "`texts` holds something that is no Unicode text", field="texts"
            ) from None
        table = pa.table({wanted.text_column: column})
        batches = table.to_batches(max_chunksize=_EMBED_ROWS)
        parts = []
        with self.exchange(pa.Table.from_batches(batches, table.schema), wanted) as exchange:
            for batch in exchange:
                if exchange.errors:
                    raise _row_failure(exchange.errors[0])
                vectors = batch.column("vector")
                _check_one_each(vectors.type)
                if vectors.null_count:
                    raise InternalError("the server left out a vector and did not say why")
                parts.append(vectors.flatten().to_numpy().reshape(len(vectors), -1))
            if not parts:
                kind = exchange.schema.field("vector").type
                _check_one_each(kind)
                return np.zeros((0, kind.list_size), kind.value_type.to_pandas_dtype())
        embeddings = np.concatenate(parts)
        if len(embeddings) != len(column):
            raise InternalError(f"{len(embeddings)} vectors came back for {len(column)} texts")
        return embeddings

    def upload_status(self, upload_id: str, dataset: str | None = None) -> dict[str, Any]:
        """`rows_durable`, `ranges` (inclusive) and `complete` of an upload."""
        body = {"upload_id": upload_id}
        if dataset is not None:
            body["dataset"] = dataset
        return self._connection.action("upload_status", body)

    def stats(self) -> dict[str, Any]:
        """The server's counters, durations, queues and workers."""
        return self._connection.action("stats")

    def list_models(self) -> list[dict[str, Any]]:
        """The versions of models that the server has: the fields of ModelInfo."""
        return list(self._connection.action("list_models").get("models", []))

    def aliases(self) -> dict[str, str]:
        """Names that stand for several models, and their shares: `{"search": "a:0.9,b:0.1"}`."""
        return dict(self._connection.action("list_models").get("aliases", {}))

    def prompt_for(
        self, purpose: Literal["query", "document"], model: str | None = None
    ) -> str | None:
        """The name of a model's prompt for texts that search, or for those that are found.

        Args:
            purpose: `query` or `document`.
            model: As in `embed`; None: the server's default.

        Returns:
            What `embed` and EmbedCommand take as `prompt`; None: the model has none for it.

        Raises:
            ModelMismatchError: The server does not serve that model.
        """
        names = {"query": QUERY_PROMPTS, "document": DOCUMENT_PROMPTS}[purpose]
        return default_prompt(served_model(self, model), names)

    def load_model(self, model: str, *, timeout_s: float = LOAD_TIMEOUT_S) -> str:
        """Has the server load a model that is installed there.

        Args:
            model: Its name, or one version as `name@hash`.
            timeout_s: Longest wait until it is ready.

        Returns:
            `name@hash` of what is ready now.
        """
        return str(self._connection.action("load_model", {"model": model}, timeout_s)["model"])

    def swap_model(self, model: str, *, timeout_s: float = LOAD_TIMEOUT_S) -> str:
        """Has a name stand for the version that is installed under it now, or for `name@hash`.

        Calls that run end with the version that they began with.

        Returns:
            `name@hash` of what new calls get.
        """
        return str(self._connection.action("swap_model", {"model": model}, timeout_s)["model"])

    def unload_model(self, model: str, *, force: bool = False) -> str:
        """Takes a model out of service; `force` cuts off the calls that hold it.

        Returns:
            `name@hash` of what retires.
        """
        body = {"model": model, "force": force}
        return str(self._connection.action("unload_model", body)["model"])

    def set_alias(self, alias: str, models: Mapping[str, float] | None) -> dict[str, str]:
        """Divides calls for a name among models, by weight.

        Args:
            alias: What callers ask for; `default` is for those that name no model.
            models: Weights by model; none: the alias goes.

        Returns:
            All aliases.
        """
        shares = ",".join(f"{name}:{weight:.12g}" for name, weight in (models or {}).items())
        answer = self._connection.action("set_alias", {"alias": alias, "models": shares})
        return dict(answer["aliases"])

    def health(self) -> dict[str, Any]:
        """Answers if the server's process is alive."""
        return self._connection.action("health")

    def ready(self) -> bool:
        """Whether the server lets new calls in."""
        return bool(self._connection.action("ready").get("ready"))

    def close(self) -> None:
        """Closes the connection. Idempotent."""
        self._connection.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def ingest_id(source: TextSource, options: EmbedCommand) -> str:
    """The `upload_id` of files with options: the same for the same, random where unrepeatable.

    A delta asks of every row anyway what is stored. Under one name, files that were changed and
    changed back would count as sent, while the store has what came between.
    """
    if not source.reiterable or options.mode == "delta":
        return uuid.uuid4().hex
    digest = hashlib.sha256(source.content_hash().encode())
    digest.update(replace(options, upload_id=None, priority=None).to_json())
    return digest.hexdigest()[:40]


def _as_options(options: EmbedCommand | str) -> EmbedCommand:
    options = EmbedCommand(dataset=options) if isinstance(options, str) else options
    if options.dataset is None:
        raise InvalidCommandError("`dataset` is missing", field="dataset")
    return options


def _with_upload_id(options: EmbedCommand) -> EmbedCommand:
    if options.upload_id is not None:
        return options
    return replace(options, upload_id=uuid.uuid4().hex)


def _check_one_each(kind: pa.DataType) -> None:
    """Refuses sparse weights and several vectors a text."""
    if not pa.types.is_fixed_size_list(kind):
        raise InvalidCommandError(
            f"the model gives {kind} for each text, which is no array; "
            "`exchange` gives such vectors"
        )


def _row_failure(error: RowError) -> Exception:
    kind = BY_CODE.get(error.code, InternalError)
    return kind(f"text {error.row}: {error.message}")
