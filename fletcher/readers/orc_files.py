"""Reader of ORC files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa

from fletcher.readers.arrays import check_arrays, cut
from fletcher.readers.columns import Selection, arrow_paths, take_paths
from fletcher.readers.source_files import SourceFile
from fletcher.readers.tables import BatchesWithShare, selected_schema


def orc_schema(table: SourceFile, name: str, selection: Selection) -> pa.Schema:
    """Types of the selected columns of an ORC file."""
    return selected_schema(_open(table).schema, name, selection)


def read_orc(table: SourceFile, name: str, selection: Selection) -> BatchesWithShare:
    """Batches of an ORC file, each with the share of the rows read so far, 0 to 1.

    The selected columns of a stripe are read at once.
    """
    file = _open(table)
    paths = arrow_paths(selection, file.schema, name)
    tops = list(dict.fromkeys(top for top, *_ in paths.values()))
    done, total = 0, max(1, file.nrows)
    for number in range(file.nstripes):
        batch = take_paths(file.read_stripe(number, columns=tops), paths)
        check_arrays(batch, name, done)
        for part in cut(batch, selection.batch_rows):
            done += part.num_rows
            yield part, done / total


def _open(table: SourceFile) -> Any:
    from pyarrow import orc  # takes time to import

    opened = table.open_table()
    return orc.ORCFile(str(opened) if isinstance(opened, Path) else opened)
