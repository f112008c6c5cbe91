"""DoPut: text in, vectors to the store, acknowledgements back."""

from __future__ import annotations

import json
import logging
from typing import Any

import pyarrow as pa
from pyarrow import flight

from fletcher.core.command import EmbedCommand
from fletcher.errors import CancelledError, DrainingError
from fletcher.flight.commands import refuse_unused
from fletcher.flight.middleware import embed_call, upload_owner
from fletcher.flight.reading import read_messages, read_schema, wait_first
from fletcher.serving.background import BackgroundTask
from fletcher.serving.callers import Caller
from fletcher.serving.service import Service
from fletcher.serving.store_session import StoreSession

log = logging.getLogger(__name__)


def put(service: Service, command: EmbedCommand, caller: Caller, reader: Any, writer: Any) -> None:
    """Answer one DoPut call.

    The call's own thread reads and submits batches. A second thread writes acknowledgements.
    """
    refuse_unused("DoPut", command.to_mapping())
    command = command.owned_by(upload_owner(caller))
    with StoreSession(service, embed_call("do_put", command, caller)) as session:
        session.open_input(read_schema(reader))
        # Wait first: a client that sends nothing takes no stream and creates no dataset.
        messages, first = wait_first(read_messages(reader, caller))
        if first is None and caller.is_cancelled():
            return
        session.admit()
        upload = session.upload
        answering = BackgroundTask(
            "put-acknowledge",
            lambda: _acknowledge(session, caller, writer),
            lambda _: session.close(),
        )
        refusal: Exception | None = None
        with answering:
            try:
                try:
                    for message in messages:
                        service.admission.check_draining()
                        if upload.failure is not None:
                            break
                        if message.batch is not None:
                            session.submit_batch(message.batch, message.batch_id, message.row_first)
                        if message.metadata.end and message.metadata.rows is not None:
                            upload.announce_total(message.metadata.rows)
                except Exception as error:  # noqa: BLE001 - raised once accepted rows are safe
                    refusal = error
                if caller.is_cancelled():
                    session.abandon(CancelledError("the client ended the upload before its end"))
                # After a refusal, rows that were submitted before it still go to the store.
                session.end_input()
            except BaseException:
                session.fail()
                raise
        answering.join()
        if refusal is not None and not isinstance(refusal, DrainingError):
            raise refusal
        if upload.failure is not None:
            raise upload.failure
        if refusal is not None and not upload.complete:
            raise refusal


def _acknowledge(session: StoreSession, caller: Caller, writer: Any) -> None:
    """Write acknowledgements and the summary until the client is gone.

    Raises:
        CancelledError: The client is gone.
    """
    client_gone = False
    for message in session.acknowledgements():
        if client_gone:
            continue
        try:
            with caller.writing():
                writer.write(pa.py_buffer(json.dumps(message, ensure_ascii=False).encode()))
        except (flight.FlightError, pa.ArrowException, OSError) as error:
            log.info("upload %s: the client is gone (%s)", message["upload_id"], error)
            client_gone = True
    if client_gone:
        raise CancelledError("the client is gone")
