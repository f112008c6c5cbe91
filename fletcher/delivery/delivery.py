"""The store side of the house: uploads, and a lane for every dataset that is being written."""

from __future__ import annotations

import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from fletcher.delivery.lane import DeliveryConfig, Lane, Rows
from fletcher.delivery.upload import Upload
from fletcher.errors import InvalidCommandError, StoreUnavailableError, UploadConflictError
from fletcher.options import EmbedOptions
from fletcher.stores.base import Store, WriteMode
from fletcher.telemetry import Telemetry

# Finished uploads are remembered for `upload_status`; older ones are read from the store.
_REMEMBERED_UPLOADS = 1000


class Delivery:
    """Opens uploads and carries their rows to the stores.

    Args:
        stores: By name; the first is the default.
        config: Groups and retries.
        telemetry: Where counts, durations and spans go.
    """

    def __init__(
        self, stores: Mapping[str, Store], config: DeliveryConfig, telemetry: Telemetry
    ) -> None:
        self.stores = dict(stores)
        self._config = config
        self._telemetry = telemetry
        self._lock = threading.Lock()
        self._lanes: dict[tuple[str, str], Lane] = {}
        self._uploads: OrderedDict[tuple[str, str, str], Upload] = OrderedDict()
        self._closed = False
        telemetry.queue_depth.watch(self._depth, stage="rows")

    def store(self, name: str | None) -> tuple[str, Store]:
        """A store by its configured name; None: the default.

        Raises:
            InvalidCommandError: There is no such store, or none at all.
        """
        if not self.stores:
            raise InvalidCommandError(
                "this server has no store; use DoExchange, or start it with `--store`",
                field="store",
            )
        if name is None:
            name = next(iter(self.stores))
        if name not in self.stores:
            raise InvalidCommandError(
                f"`store` is {name!r}, expected the name of a configured store",
                field="store",
                allowed=list(self.stores),
            )
        return name, self.stores[name]

    def open(self, options: EmbedOptions, schema: pa.Schema) -> tuple[Upload, Lane]:
        """Opens or resumes an upload; `close` it for each `open`.

        Args:
            options: The command; `dataset` is set.
            schema: Of the rows to come, without `batch_key`.

        Raises:
            UploadConflictError: The upload is in progress with other options.
            ModelMismatchError, DimensionMismatchError, ColumnTypeError: The dataset differs.
            StoreUnavailableError: The store does not answer.
        """
        name, store = self.store(options.store)
        dataset = options.dataset
        assert dataset is not None
        upload_id = options.upload_id or uuid.uuid4().hex
        key = (name, dataset, upload_id)
        fingerprint = (schema, schema.metadata, options.mode, options.durability)
        lane = self._enter(key, store)
        try:
            upload = self._join(key, fingerprint)
            mode: WriteMode = options.mode  # type: ignore[assignment]
            if upload is not None:
                lane.open(schema, "append" if mode == "overwrite" else mode).result()
                return upload, lane
            stored: list[tuple[int, int]] = []
            if options.upload_id is not None and store.dataset(dataset) is not None:
                if key in self._uploads:
                    # It failed. What was being sent then must have arrived, or not, before we look.
                    lane.open(schema, "append").result()
                stored = store.stored_ranges(dataset, upload_id)
            if mode == "overwrite" and stored:
                mode = "append"
            lane.open(schema, mode).result()
            if mode == "overwrite":
                self._forget_dataset(name, dataset)
            new = Upload(
                dataset,
                upload_id,
                fingerprint=fingerprint,
                durable=options.durability != "memory",
                upsert=mode == "upsert",
                stored=stored,
            )
            return self._join(key, fingerprint, new) or new, lane
        except BaseException:
            self._leave(lane)
            raise

    def close(self, upload: Upload, lane: Lane) -> None:
        """One connection of an upload has ended."""
        with self._lock:
            upload.connections -= 1
        if upload.failure is not None:
            lane.drop_failed()
        self._leave(lane)

    def status(self, options: EmbedOptions) -> dict[str, Any]:
        """What is known of an upload: from memory, else from the store."""
        name, store = self.store(options.store)
        if options.upload_id is None:
            raise InvalidCommandError("`upload_id` is missing", field="upload_id")
        with self._lock:
            for (one_name, dataset, upload_id), upload in self._uploads.items():
                matches = upload_id == options.upload_id and one_name == name
                if matches and options.dataset in (None, dataset):
                    return upload.status()
        datasets = [options.dataset] if options.dataset else [one.name for one in store.datasets()]
        for dataset in datasets:
            stored = (
                store.stored_ranges(dataset, options.upload_id) if store.dataset(dataset) else []
            )
            if stored:
                return Upload(
                    dataset, options.upload_id, fingerprint=(), durable=True, stored=stored
                ).status()
        return {"rows_durable": 0, "ranges": [], "complete": False}

    def put(self, lane: Lane, rows: Rows) -> None:
        """Queues rows for their dataset."""
        lane.put(rows)

    def flush(self, timeout_s: float) -> bool:
        """Stores what is here now; False if it did not get done in time."""
        deadline = time.monotonic() + timeout_s
        for lane in self._all_lanes():
            lane.hurry()
            with lane._changed:
                left = max(0.0, deadline - time.monotonic())
                lane._changed.wait_for(lambda lane=lane: lane.idle, left)  # type: ignore[misc]
        return all(lane.idle for lane in self._all_lanes())

    def shut_down(self) -> None:
        """Ends all lanes and closes the stores. Idempotent."""
        with self._lock:
            self._closed = True
        lanes = self._all_lanes()
        for lane in lanes:
            lane.close()
        for lane in lanes:
            lane.thread.join(30.0)
        for store in self.stores.values():
            store.close()

    def _enter(self, key: tuple[str, str, str], store: Store) -> Lane:
        name, dataset, _ = key
        with self._lock:
            if self._closed:
                raise StoreUnavailableError("the server is shutting down")
            lane = self._lanes.get((name, dataset))
            if lane is None:
                lane = Lane(store, dataset, self._config, self._telemetry, self._retire)
                self._lanes[name, dataset] = lane
            lane.users += 1
            return lane

    def _leave(self, lane: Lane) -> None:
        with self._lock:
            lane.users -= 1

    def _join(
        self, key: tuple[str, str, str], fingerprint: tuple[Any, ...], new: Upload | None = None
    ) -> Upload | None:
        """The upload in progress, or `new` where there is none (or a failed one that all left)."""
        with self._lock:
            upload = self._uploads.get(key)
            if upload is None or (upload.failure is not None and not upload.connections):
                if new is None:
                    return None
                upload = self._uploads[key] = new
                self._forget()
            elif upload.fingerprint != fingerprint:
                raise UploadConflictError(
                    f"upload {key[2]!r} into `{key[1]}` was begun with another schema, model, "
                    "mode or durability; finish it as begun, or choose another `upload_id`",
                    field="upload_id",
                )
            upload.connections += 1
            self._uploads.move_to_end(key)
            return upload

    def _forget(self) -> None:
        if len(self._uploads) > _REMEMBERED_UPLOADS:
            for old, one in self._uploads.items():
                if not one.connections and not one.in_flight:
                    del self._uploads[old]
                    break

    def _forget_dataset(self, name: str, dataset: str) -> None:
        """The dataset was emptied: what earlier uploads stored is there no more."""
        with self._lock:
            for key, one in list(self._uploads.items()):
                if key[:2] == (name, dataset) and not one.connections:
                    del self._uploads[key]

    def _retire(self, lane: Lane) -> bool:
        with self._lock:
            if lane.users or not lane.idle:
                return False
            for key, one in list(self._lanes.items()):
                if one is lane:
                    del self._lanes[key]
            return True

    def _all_lanes(self) -> list[Lane]:
        with self._lock:
            return list(self._lanes.values())

    def _depth(self) -> int:
        return sum(lane.depth() for lane in self._all_lanes())
