"""Import of LanceDB, for every module that uses it."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Iterator
from typing import Any

from fletcher.errors import StoreError
from fletcher.util.allocator import keep_large_blocks

# LanceDB reads ahead 2 GiB per scan by default. That is more memory than `--max-memory` allows.
SCAN_BUFFER_BYTES = 64 << 20
# LanceDB decodes 8,192 rows at a time by default. To rewrite 500 MB in rows of 64 kB it then took
# 800 MB, and 280 MB with 1,024 rows at a time. Searches took as long as before.
SCAN_BATCH_ROWS = 1024

_importing = threading.Lock()


def import_lancedb() -> Any:
    """The module `lancedb`. Thread-safe.

    Raises:
        StoreError: LanceDB is not installed.
    """
    # Lance reads these variables once, when its library is loaded.
    os.environ.setdefault("LANCE_DEFAULT_IO_BUFFER_SIZE", str(SCAN_BUFFER_BYTES))
    os.environ.setdefault("LANCE_DEFAULT_BATCH_SIZE", str(SCAN_BATCH_ROWS))
    try:
        with _importing, _models_built_at_first_use():
            import lancedb
    except ImportError as error:
        raise StoreError(
            "a `lance:` store needs LanceDB, which is not installed; run: "
            "pip install 'longbow-fletcher[lance]'",
            field="store",
        ) from error
    keep_large_blocks()
    return lancedb


@contextlib.contextmanager
def _models_built_at_first_use() -> Iterator[None]:
    """Have pydantic build models and validators at their first use.

    LanceDB imports a client of Lance's REST catalogs, which Fletcher does not use. Building
    its hundreds of models and validators took half of the import's 1.8 s.
    """
    import pydantic

    validate_call, settings = pydantic.validate_call, pydantic.BaseModel.model_config
    deferred = pydantic.ConfigDict(defer_build=True)
    pydantic.validate_call = functools.partial(  # type: ignore[assignment]
        validate_call, config=deferred
    )
    pydantic.BaseModel.model_config = settings | deferred
    try:
        yield
    finally:
        pydantic.validate_call, pydantic.BaseModel.model_config = validate_call, settings
