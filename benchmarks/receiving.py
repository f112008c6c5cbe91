"""Server that receives texts as Fletcher does and drops them, in a separate process.

    python -m benchmarks.receiving

Prints `listening on ADDRESS`. `DoPut` answers with the number of rows.
"""

from __future__ import annotations

from typing import Any

from pyarrow import flight

from fletcher.core.command import EmbedCommand
from fletcher.pipeline.input.intake import Intake, TextTreatment
from fletcher.pipeline.input.limits import IntakeLimits

# Limits of a server with default options and a model of 384 dims.
LIMITS = IntakeLimits(
    max_message_bytes=64 << 20,
    max_row_bytes=16 << 20,
    slice_rows=157,
    slice_bytes=128 << 10,
    table_values=21_845,
    bytes_per_row=3328,
)


class Receiver(flight.FlightServerBase):
    """Reads, checks and slices all input."""

    def do_put(self, _context: Any, _descriptor: Any, reader: Any, writer: Any) -> None:
        """Answers with the number of rows in the row slices."""
        source = intake(reader.schema)
        num_rows = 0
        for chunk in reader:
            for row_slice in source.row_slices(chunk.data, 0, num_rows):
                num_rows += row_slice.num_rows
        writer.write(str(num_rows).encode())


def intake(schema: Any) -> Intake:
    """Returns the intake of an upload."""
    return Intake(
        schema,
        EmbedCommand(dataset="bench"),
        LIMITS,
        TextTreatment(),
        carry_text=True,
        small_is_interactive=False,
    )


def main() -> None:
    server = Receiver("grpc://127.0.0.1:0")
    print(f"listening on grpc://127.0.0.1:{server.port}", flush=True)
    server.serve()


if __name__ == "__main__":
    main()
