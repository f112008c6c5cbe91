"""Place of a job: the folder of its manifest, and the store of its rows."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

import click

from fletcher.cli.connection import EmbedTarget
from fletcher.config.server import ServeConfig
from fletcher.core.command import EmbedCommand
from fletcher.errors import UnknownDatasetError
from fletcher.jobs.checksums import COLUMNS, Checksums, sum_uploads
from fletcher.jobs.manifest import HOME_JOBS, STORE_JOBS
from fletcher.jobs.records import JobRecord
from fletcher.jobs.run import job_options
from fletcher.stores.base import Combination, Comparison, Filter, Store

# Most uploads that a filter names. For more, all rows of the dataset are read.
MAX_FILTERS = 40


@dataclass(frozen=True, slots=True)
class JobPlace:
    """Place of a job's manifest, and of its rows.

    Attributes:
        folder: Folder of the manifest.
        target: The server that embeds.
        config: Configuration of a server in this process.
        options: Options of the uploads.
    """

    folder: Path
    target: EmbedTarget
    config: ServeConfig
    options: EmbedCommand

    @classmethod
    def of(
        cls, given: Path | None, target: EmbedTarget, config: ServeConfig, options: EmbedCommand
    ) -> JobPlace:
        """The place `given`, or else the default one.

        A job that writes to a folder has its manifest in that folder, beside the dataset.
        """
        from fletcher.stores.address import folder_of

        assert options.dataset is not None
        if given is not None:
            return cls(given.absolute(), target, config, options)
        if target.server is None:
            address = next(iter(config.store_addresses.values()))
            if (folder := folder_of(address)) is not None:
                return cls(folder / STORE_JOBS / options.dataset, target, config, options)
        else:
            address = f"{target.server.uri} {options.store or ''}"
        name = f"{options.dataset}-{hashlib.sha256(address.encode()).hexdigest()[:12]}"
        return cls(config.home / HOME_JOBS / name, target, config, options)

    @property
    def address(self) -> str:
        """Address of the server that embeds, or of the store."""
        if self.target.server is not None:
            return self.target.server.uri
        return next(iter(self.config.store_addresses.values()))

    def record(self, model: str, options: EmbedCommand) -> JobRecord:
        """The first line of the job's manifest."""
        from fletcher.stores.address import folder_of

        server = self.target.server.uri if self.target.server else None
        store: str | None = options.store if server else self.address
        if not server and (folder := folder_of(self.address)) is not None:
            # A manifest beside its dataset stays right if both are moved.
            is_beside = self.folder.parent == folder / STORE_JOBS
            store = None if is_beside else f"{self.address.partition(':')[0]}:{folder}"
        assert options.dataset is not None
        return JobRecord(
            job=self.folder.name,
            dataset=options.dataset,
            store=store,
            server=server,
            options=job_options(options),
            model=model,
            command=list(click.get_current_context().find_root().obj),
            folder=str(Path.cwd()),
        )

    def sum_rows(self, upload_ids: Set[str]) -> dict[str, Checksums]:
        """Checksums of the stored rows of some uploads; of none if the store is a Longbow.

        Raises:
            FletcherError: The store cannot be read.
        """
        assert self.options.dataset is not None
        with self._open_store() as store:
            schema = store.read_schema(self.options.dataset)
            if schema is None or not store.capabilities.durable:
                return {}
            rows = store.scan(
                self.options.dataset,
                columns=[name for name in COLUMNS if name in schema.names],
                filters=upload_filters(upload_ids),
            )
            return sum_uploads(rows)

    def is_stored(self, upload_id: str) -> bool:
        """Whether the dataset has rows of an upload.

        Raises:
            FletcherError: The store or the server does not answer.
        """
        dataset = self.options.dataset
        assert dataset is not None
        with contextlib.suppress(UnknownDatasetError):
            if self.target.server:
                with self.target.open_client(self.config) as client:
                    status = client.upload_status(upload_id, dataset, self.options.store)
                    return bool(status.get("ranges"))
            from fletcher.stores.address import folder_of

            folder = folder_of(self.address)
            if folder is None or folder.is_dir():
                with self._open_store() as store:
                    return bool(store.stored_ranges(dataset, upload_id))
        return False

    def _open_store(self) -> contextlib.closing[Store]:
        """Context of the store that this process writes to."""
        from fletcher.stores.address import open_store

        timeout_s = self.config.delivery.store_timeout_s
        return contextlib.closing(open_store(self.address, timeout_s=timeout_s))


def upload_filters(upload_ids: Set[str]) -> list[Filter]:
    """Filters for the rows of some uploads; none if there are many."""
    if len(upload_ids) > MAX_FILTERS:
        return []
    ranges = [
        Combination(
            "and",
            (
                Comparison("batch_key", ">=", f"{one}:"),
                Comparison("batch_key", "<", f"{one};"),  # `;` follows `:`
            ),
        )
        for one in sorted(upload_ids)
    ]
    return [ranges[0] if len(ranges) == 1 else Combination("or", tuple(ranges))]
