"""Plans of uploads and faults, each drawn from its seed."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

from tests.faults.ledger import Upload
from tests.faults.overwrites import Overwrites
from tests.faults.rewrites import Rewrites

STORES = ("lance", "fletcher", "longbow", "parquet")
_FAULTS = {
    "kill the server": 4,
    "end the server": 1,
    "kill a worker": 3,
    "kill a client": 3,
    "resume": 3,
    "send again": 3,
    "check": 2,
}
_STORE_FAULTS = {
    "lance": {},
    "fletcher": {"kill the store": 3, "stop the store": 2},
    "longbow": {"break the store's call": 4, "stall the store": 2},
    "parquet": {},
}
# Further kinds of faults: the share of schedules that have the kind, and the most faults of the
# kind in one schedule. Each kind is drawn by itself, so that a new kind does not change the draws
# of the others.
_MORE_FAULTS = {
    "drop a dataset": (0.25, 2),
    "make a dataset anew": (0.25, 2),
    "damage a file": (0.25, 1),
    "leave a call": (0.5, 4),
    "kill the overwriter": (0.3, 3),
    "drop the overwrite": (0.2, 1),
    "answer nonsense": (0.4, 3),
    "refuse rows": (0.4, 2),
}
_NOT_FOR = {
    "lance": {"answer nonsense"},
    "fletcher": set(),
    "longbow": set(_MORE_FAULTS) - {"leave a call"},
    "parquet": {"answer nonsense"},
}
# Changes by another program are not synced, so a power cut would undo them.
_NOT_WITH_POWER = {"make a dataset anew", "damage a file"}


@dataclass(frozen=True)
class Event:
    """A fault, `pause_s` after the last one; `number` chooses its victim."""

    pause_s: float
    kind: str
    number: int


@dataclass(frozen=True)
class Schedule:
    """Uploads, faults and options of one seed."""

    seed: int
    store: str
    power: bool
    uploads: tuple[Upload, ...]
    options: dict[str, str]
    constants: dict[str, int]
    transfer: dict[str, Any]
    pause_s: float
    events: tuple[Event, ...]
    model: str = "tiny"
    backend: str = "null"
    rewrites: Rewrites | None = None
    overwrites: Overwrites | None = None

    def has(self, kind: str) -> bool:
        return any(event.kind == kind for event in self.events)


def with_model(schedule: Schedule, model: str) -> Schedule:
    """The schedule with default sizes and a real model, which fails on no text."""
    uploads = tuple(replace(upload, poisoned=False) for upload in schedule.uploads)
    return replace(schedule, uploads=uploads, model=model, backend="auto", constants={})


def draw(seed: int, store: str, *, power: bool = False, more: bool = True) -> Schedule:
    """The schedule of a seed.

    Args:
        seed: Any number.
        store: One of STORES.
        power: Each kill is a power cut.
        more: Whether to add the further kinds of faults.
    """
    chance = random.Random(f"{seed} {store} {power}")
    datasets = ["d0", "d1"][: chance.randint(1, 2)]
    uploads = tuple(
        Upload(
            number,
            chance.choice(datasets),
            num_rows=(num_rows := round(10 ** chance.uniform(1, 3.3))),
            batch_rows=max(1, round(num_rows * 10 ** chance.uniform(-1.7, 0))),
            durability=chance.choice(["journal", "journal", "journal", "store", "memory"]),
            flawed=chance.random() < 0.3,
        )
        for number in range(chance.randint(1, 4))
    )
    most_rows = max(upload.num_rows for upload in uploads)
    faults = dict(_FAULTS) | _STORE_FAULTS[store]
    if power:
        faults["cut the power"] = faults.pop("kill the server")
        if "kill the store" in faults:
            faults["cut the store's power"] = faults.pop("kill the store")
    kinds = chance.choices(list(faults), list(faults.values()), k=chance.randint(2, 6))
    schedule = Schedule(
        seed,
        store,
        power,
        _poisoned(seed, store, uploads) if more else uploads,
        options={
            "group-rows": str(_some(most_rows, chance)),
            "group-delay-ms": str(chance.choice([1, 20, 100, 500])),
            "max-journal": chance.choice(["256KiB", "1MiB", "1MiB", "64MiB"]),
            "store-retry": chance.choice(["1s", "30s"]),
            "store-timeout": chance.choice(["1s", "10s"]),
        },
        constants={
            "fletcher.config.delivery._COMMIT_ROWS": _some(most_rows, chance),
            "fletcher.delivery.journal.writer._SYNC_ROWS": _some(most_rows, chance),
            "fletcher.stores.lance.writer.COMPACT_FRAGMENTS": chance.choice([3, 20]),
        },
        transfer={
            "message_bytes": round(10 ** chance.uniform(3, 5)),
            "window_bytes": round(10 ** chance.uniform(3.5, 6)),
            "max_retries": chance.choice([0, 2, 30]),
            "backoff_s": 0.02,
            "max_backoff_s": 0.2,
            "stall_timeout_s": 60.0,
        },
        pause_s=chance.choice([0.0, 0.001, 0.005]),
        events=tuple(
            Event(chance.choice([0.0, 0.02, 0.1, 0.2]), kind, chance.randrange(1 << 16))
            for kind in kinds
        ),
        # Longbow and Parquet files replace no rows.
        rewrites=None if store in ("longbow", "parquet") else _rewrites(chance),
    )
    return _with_more_faults(schedule) if more else schedule


def _with_more_faults(schedule: Schedule) -> Schedule:
    """The schedule with further kinds of faults between its events."""
    events = list(schedule.events)
    for kind, (share, most) in _MORE_FAULTS.items():
        chance = random.Random(f"{schedule.seed} {schedule.store} {schedule.power} {kind}")
        if chance.random() >= share or kind in _NOT_FOR[schedule.store]:
            continue
        if schedule.power and kind in _NOT_WITH_POWER:
            continue
        for _ in range(chance.randint(1, most)):
            event = Event(chance.choice([0.0, 0.02, 0.1, 0.2]), kind, chance.randrange(1 << 16))
            # The uploads must still have rows that the store can refuse.
            most_before = min(1, len(events)) if kind == "refuse rows" else len(events)
            events.insert(chance.randint(0, most_before), event)
    schedule = replace(schedule, events=tuple(events))
    if schedule.has("kill the overwriter") or schedule.has("drop the overwrite"):
        chance = random.Random(f"{schedule.seed} {schedule.store} overwrites")
        sizes = tuple(round(10 ** chance.uniform(0.5, 2.3)) for _ in range(chance.randint(2, 5)))
        overwrites = Overwrites(
            sizes,
            tuple(chance.choice(["journal", "journal", "store"]) for _ in sizes),
            batch_rows=max(1, max(sizes) // chance.choice([3, 10, 30])),
            pause_s=chance.choice([0.0, 0.02, 0.1]),
        )
        schedule = replace(schedule, overwrites=overwrites)
    return schedule


def _poisoned(seed: int, store: str, uploads: tuple[Upload, ...]) -> tuple[Upload, ...]:
    """The uploads, some with rows that the model fails on or that stores may refuse."""
    chance = random.Random(f"{seed} {store} poison")
    return tuple(
        replace(
            upload,
            poisoned=chance.random() < 0.25,
            points=chance.random() < 0.25 and store != "longbow",
        )
        for upload in uploads
    )


def _rewrites(chance: random.Random) -> Rewrites:
    durabilities = chance.choices(["journal", "store"], k=chance.randint(2, 8))
    return Rewrites(round(10 ** chance.uniform(0.3, 2.3)), tuple(durabilities))


def _some(most_rows: int, chance: random.Random) -> int:
    """A number of rows that an upload reaches several times."""
    return max(1, round(most_rows * 10 ** chance.uniform(-1.7, 0.3)))
