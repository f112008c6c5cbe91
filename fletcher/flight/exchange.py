"""DoExchange: text in, vectors back, in the order of the client's batches."""

from __future__ import annotations

import functools
import uuid
from typing import Any

from pyarrow import flight

from fletcher.core.command import EmbedCommand
from fletcher.errors import CancelledError, FletcherError
from fletcher.flight.answers import Answers, AnswerWriter
from fletcher.flight.commands import refuse_unused
from fletcher.flight.middleware import embed_call
from fletcher.flight.reading import read_messages, read_schema, wait_first
from fletcher.serving.background import BackgroundTask
from fletcher.serving.callers import Caller
from fletcher.serving.service import Service
from fletcher.serving.session import EmbedSession
from fletcher.util.insist import insist


def exchange(
    service: Service, command: EmbedCommand, caller: Caller, reader: Any, writer: AnswerWriter
) -> None:
    """Answer one DoExchange call.

    The call's own thread reads and submits batches. A second thread writes answers.
    """
    refuse_unused("DoExchange", command.to_mapping())
    with EmbedSession(service, embed_call("do_exchange", command, caller)) as session:
        output = session.open_input(read_schema(reader))
        # Begin before the first batch arrives: a client may wait for the schema before it sends.
        compression = service.answers.for_call(caller.peer(), output, command.accept_compression)
        writer.begin(output, compression)
        # A client that sends nothing takes no stream.
        messages, first = wait_first(read_messages(reader, caller, continuous=command.continuous))
        if first is None and caller.is_cancelled():
            return
        bulk = first is not None and first.batch is not None and session.intake.is_bulk(first.batch)
        session.admit(bulk=bulk)
        answers = Answers(session, command, writer, caller)
        write_results = functools.partial(
            answers.write_results, command.upload_id or uuid.uuid4().hex
        )
        expected = (FletcherError, flight.FlightError)
        answering = BackgroundTask(
            "exchange-writer", write_results, answers.report_failure, expected
        )
        with answering:
            try:
                for message in messages:
                    service.admission.check_draining()
                    if message.batch is not None:
                        answers.check_size(message.batch.num_rows)
                        ends, row_first = message.metadata.document_end, message.row_first
                        session.submit_batch(
                            message.batch, message.batch_id, row_first, document_end=ends
                        )
                if not caller.is_cancelled():
                    session.submit_rest()
            finally:  # an error is raised after earlier batches are answered
                insist(functools.partial(_end_input, session, caller), "ending a call's input")
                answering.join()


def _end_input(session: EmbedSession, caller: Caller) -> None:
    if caller.is_cancelled():
        session.abandon(CancelledError("the client ended the exchange before its end"))
    session.end_input()
