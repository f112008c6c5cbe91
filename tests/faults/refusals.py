"""Rows that a store refuses by their value, for as long as a file says so."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fletcher.errors import NotFiniteError
from fletcher.stores.lance.writer import LanceWriter
from fletcher.stores.parquet import ParquetWriter
from tests.faults.ledger import FOREIGN, MOST_ROWS

MESSAGE = "these rows are refused"


def install(path: Path, datasets: Sequence[str]) -> None:
    """Make the embedded stores of this process refuse the rows that `path` names."""
    for writer, method in ((LanceWriter, "write_rows"), (ParquetWriter, "append")):
        setattr(writer, method, _refusing(getattr(writer, method), path, frozenset(datasets)))


def begin(path: Path, number: int) -> str:
    """Refuse some rows from now on; `number` chooses them. Returns their description."""
    chance = random.Random(number)
    every = chance.choice([2, 17, 101, 401])
    rule = {"every": every, "at": chance.randrange(every)}
    new = path.with_suffix(".new")
    new.write_text(json.dumps(rule))
    new.replace(path)
    return f"each row {rule['at']} of {every} is refused"


def end(path: Path) -> None:
    """Take all rows from now on."""
    path.unlink(missing_ok=True)


def _refusing(
    write: Callable[..., Any], path: Path, datasets: frozenset[str]
) -> Callable[..., Any]:
    def refusing(writer: Any, batches: Sequence[pa.RecordBatch], **options: Any) -> Any:
        if writer.dataset in datasets and path.exists():
            rule = json.loads(path.read_text())
            for batch in batches:
                uploads, rows = np.divmod(batch.column("n").to_numpy(), MOST_ROWS)
                if np.any((uploads != FOREIGN) & (rows % rule["every"] == rule["at"])):
                    raise NotFiniteError(MESSAGE, field="n")
        return write(writer, batches, **options)

    return refusing
