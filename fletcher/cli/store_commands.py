"""Opening of the stores that a command is told, and of one dataset in them."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fletcher.config.option import nearest
from fletcher.config.server import ServeConfig
from fletcher.errors import ConfigError, RequestError, UnknownDatasetError

if TYPE_CHECKING:
    import pyarrow as pa

    from fletcher.stores.base import Store
    from fletcher.stores.lance.store import LanceStore


def open_stores(config: ServeConfig) -> Iterator[tuple[str, Store]]:
    """Address and store of each configured store, one open at a time.

    A folder that does not exist is left out, as opening it would create it.
    """
    from fletcher.stores.address import folder_of, open_store

    for address in config.store_addresses.values():
        folder = folder_of(address)
        if folder is not None and not folder.is_dir():
            continue
        with contextlib.closing(
            open_store(address, timeout_s=config.delivery.store_timeout_s)
        ) as store:
            yield address, store


@contextlib.contextmanager
def open_dataset_store(config: ServeConfig, name: str) -> Iterator[tuple[str, Store]]:
    """Address and store of a dataset.

    Raises:
        UnknownDatasetError: No store has the dataset.
        ConfigError: Several stores have a dataset of that name.
    """
    from fletcher.core.command import check_dataset

    check_dataset(name)
    names: list[str] = []
    found: list[str] = []
    for address, store in open_stores(config):
        if store.read_schema(name) is not None:
            found.append(address)
        else:
            names += [info.name for info in store.datasets()]
    if not found:
        addresses = ", ".join(config.store_addresses.values()) or "any store"
        hint = nearest(name, names) or f"; known: {', '.join(names[:20]) or 'no dataset'}"
        raise UnknownDatasetError(
            f"there is no dataset {name!r} in {addresses}{hint}", field="dataset"
        )
    if len(found) > 1:
        raise ConfigError(
            f"`store` names several that have a dataset {name!r}: {', '.join(found)}; give one",
            field="store",
        )
    for address, store in open_stores(config):
        if address == found[0]:
            yield address, store
            return


@contextlib.contextmanager
def open_maintained(config: ServeConfig, name: str, *, foreign: bool) -> Iterator[LanceStore]:
    """The LanceDB store of a dataset that is to be indexed or compacted.

    Raises:
        RequestError: The dataset is in a store of another kind, or another program wrote it and
            `foreign` is off.
        UnknownDatasetError, ConfigError: As `open_dataset_store`.
    """
    from fletcher.stores.lance.store import LanceStore

    with open_dataset_store(config, name) as (address, store):
        if not isinstance(store, LanceStore):
            raise RequestError(
                f"{address} cannot be indexed or compacted by Fletcher, only a `lance:` store can; "
                "for a `fletcher store`, stop it and name its folder as lance:PATH",
                field="store",
            )
        schema = store.read_schema(name)
        if schema is not None and is_foreign(schema) and not foreign:
            raise foreign_refusal(name, address, "change")
        yield store


def is_foreign(schema: pa.Schema) -> bool:
    """Whether another program wrote a dataset of this schema."""
    return not any(key.startswith(b"fletcher.") for key in schema.metadata or ())


def foreign_refusal(name: str, address: str, verb: str) -> RequestError:
    """The error for a table of another program."""
    return RequestError(
        f"`{name}` in {address} was written by another program than Fletcher; to {verb} it all "
        "the same, give --foreign",
        field="foreign",
    )


@contextlib.contextmanager
def removing_journal(root: Path, address: str, name: str) -> Iterator[bool]:
    """Context that deletes a dataset; its journal is deleted after that.

    The value tells whether there is a journal. It is kept if the block fails.

    Raises:
        ConfigError: A server uses the journal.
    """
    from fletcher.delivery.journal.root import folder_name, lock_journal

    folder = root / folder_name(address) / name
    if not folder.exists():
        yield False
        return
    with lock_journal(root):
        yield True
        shutil.rmtree(folder)
