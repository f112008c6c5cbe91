"""Names of staged datasets, and the incarnation of a dataset.

An upload with `mode: overwrite` writes to a staged dataset. At its end the staged dataset replaces
the dataset, and readers see the old rows until then.

An incarnation is one life of a dataset, from its creation or replacement to the next one or to its
end. Each has a random name in the schema's metadata, so that an upload can tell whether its rows
are still there. Datasets of a Longbow and of earlier releases have none.
"""

from __future__ import annotations

import hashlib
import re
import secrets

import pyarrow as pa

from fletcher.core.command import check_dataset

INCARNATION = b"fletcher.incarnation"

_STAGED = re.compile(r"([A-Za-z0-9][A-Za-z0-9_-]{0,127})\.staged-([0-9a-f]{16})")


def staged_name(dataset: str, upload_id: str) -> str:
    """Name of the staged dataset of an upload."""
    return f"{dataset}.staged-{_digest(upload_id)}"


def staged_for(name: str) -> str | None:
    """The dataset that a staged dataset is to replace; None for other names."""
    found = _STAGED.fullmatch(name)
    return found and found[1]


def check_stored(name: str) -> None:
    """Refuse a name that is neither a dataset's nor a staged dataset's."""
    if staged_for(name) is None:
        check_dataset(name)


def with_incarnation(name: str, schema: pa.Schema) -> pa.Schema:
    """The schema for a new dataset, with the name of its incarnation."""
    staged = _STAGED.fullmatch(name)
    token = f"{staged[2]}-{secrets.token_hex(8)}" if staged else secrets.token_hex(16)
    return schema.with_metadata({**(schema.metadata or {}), INCARNATION: token.encode()})


def incarnation_of(schema: pa.Schema) -> str:
    """Name of a dataset's incarnation; empty if it has none."""
    token: bytes = (schema.metadata or {}).get(INCARNATION, b"")
    return token.decode(errors="replace")


def is_replaced_by(incarnation: str | None, upload_id: str) -> bool:
    """Whether an incarnation began when this upload replaced the dataset."""
    return (incarnation or "").startswith(f"{_digest(upload_id)}-")


def _digest(upload_id: str) -> str:
    return hashlib.sha256(upload_id.encode()).hexdigest()[:16]
