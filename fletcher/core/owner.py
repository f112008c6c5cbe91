"""Owners of uploads, and the ids that their uploads have in journal and stores.

An upload belongs to its caller: the holder of a bearer token, the name in a client certificate, or
anonymous. pyarrow gives a server only a certificate's first alternative name, or else its common
name. A caller whose certificate has neither is anonymous. An id of a caller has no dot, so
the id with the owner's name after a dot cannot be another caller's. Anonymous uploads keep their
plain id, as all uploads of earlier releases do.
"""

from __future__ import annotations

import hashlib

# Enough of a SHA-256 that no other token has it, and short enough for a file's name.
_OWNER_DIGITS = 24


def token_owner(token: bytes) -> str:
    """The owner of uploads that are sent with a bearer token."""
    return hashlib.sha256(token).hexdigest()[:_OWNER_DIGITS]


def certificate_owner(name: bytes) -> str:
    """The owner of uploads that are sent with a client certificate."""
    return hashlib.sha256(b"certificate:" + name).hexdigest()[:_OWNER_DIGITS]


def owned_id(upload_id: str, owner: str) -> str:
    """The id of an owner's upload in journal and stores; empty `owner`: anonymous."""
    return f"{upload_id}.{owner}" if owner else upload_id


def plain_id(upload_id: str) -> str:
    """The id of an upload as its caller knows it."""
    return upload_id.partition(".")[0]
