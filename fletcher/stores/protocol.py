"""Protocol of the Flight store and `fletcher store`, beyond Longbow's calls.

Bodies are JSON. Unknown fields are ignored, as in Longbow.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from fletcher.stores.base import WriteMode

# First part of the path of a DoExchange that stores rows and acknowledges them.
INGEST = "ingest"

# Actions that Longbow lacks. A store that answers `capabilities` also has the others.
CAPABILITIES = "capabilities"
MISSING_KEYS = "missing-keys"
STORED_RANGES = "stored-ranges"
REPLACE_DATASET = "replace-dataset"
DELETE_UPLOAD = "delete-upload"

# Answer of the action `replace-dataset`.
REPLACED = b"replaced"

# Criteria of a ListFlights call that asks for staged datasets.
STAGED = b"staged"


class CapabilitiesAnswer(msgspec.Struct, kw_only=True):
    """Answer of the action `capabilities`; see `StoreCapabilities`."""

    server: str = ""
    dtypes: tuple[str, ...]
    null_vectors: bool
    upsert: bool
    drops_repeated_keys: bool
    durable: bool
    outputs: tuple[str, ...] = ("dense",)
    deletes_uploads: bool = False
    meta_port: int | None = None


class MissingKeysRequest(msgspec.Struct):
    """Body of the action `missing-keys`."""

    dataset: str
    batch_keys: list[str]


class MissingKeysAnswer(msgspec.Struct):
    """The requested keys that are not stored, in the order of the request."""

    missing: list[str]


class StoredRangesRequest(msgspec.Struct):
    """Body of the action `stored-ranges`."""

    dataset: str
    upload_id: str


class StoredRangesAnswer(msgspec.Struct):
    """Stored row offsets of an upload: inclusive (first, last), sorted, merged."""

    ranges: list[tuple[int, int]]


class ReplaceDatasetRequest(msgspec.Struct):
    """Body of the action `replace-dataset`; see `Store.replace_dataset`."""

    dataset: str
    staged: str


class DeleteUploadRequest(msgspec.Struct):
    """Body of the action `delete-upload`; see `Store.delete_upload`."""

    dataset: str
    upload_id: str


class DeleteUploadAnswer(msgspec.Struct):
    """Number of deleted rows."""

    rows: Annotated[int, msgspec.Meta(ge=0)]


class GroupHeader(msgspec.Struct):
    """Metadata of a message that contains rows.

    Attributes:
        group_rows: Number of rows in the group that the message belongs to; None: unknown.
        mode: Write mode of the group.
    """

    group_rows: Annotated[int, msgspec.Meta(ge=0)] | None = None
    mode: WriteMode = "append"
