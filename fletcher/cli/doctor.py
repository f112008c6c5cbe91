"""`fletcher doctor`: check this machine, and show a fix for each problem."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Literal

from fletcher.cli.command_line import command
from fletcher.cli.options import ConfigFlags, config_options, json_option
from fletcher.cli.progress import human
from fletcher.cli.terminal import counted, grouped, index_share, print_json, print_table, styled
from fletcher.config.option import GIB
from fletcher.config.server import ServeConfig
from fletcher.errors import FletcherError
from fletcher.telemetry.logs import set_up_logging

if TYPE_CHECKING:
    from fletcher.tuning.decision import Decision

# Free disk space for one model, its graph and temporary files.
NEEDED_DISK_BYTES = 1 * GIB
# Memory that the process needs in addition to `max_memory`: interpreter, libraries, one model.
OWN_MEMORY_BYTES = 1 * GIB
# Time in which the index of a store grows if rows are being indexed.
INDEX_GROWS_S = 3.0

_OPTIONS = (
    *("store", "model", "device", "backend", "precision", "threads", "max_batch_tokens", "home"),
    *("max_memory", "models"),
)

State = Literal["ok", "note", "broken"]
# The fields of a `Finding` except `part`.
_Found = tuple[str, State, str] | tuple[str, State, str, str]
MARKS: dict[State, tuple[str, str]] = {
    "ok": ("ok", "green"), "note": ("note", "yellow"), "broken": ("BROKEN", "bold red")
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Finding:
    """Result of one check, and how to fix a problem.

    The state `note` means that the thing works but could be better, or that it is optional.
    `broken` means that something needed does not work.
    """

    part: str
    name: str
    state: State
    value: str
    fix: str = ""


@command("doctor", "fletcher doctor", "fletcher doctor --store lance:vectors --json")
@json_option("Print one JSON object.")
@config_options(
    *_OPTIONS,
    text={
        "model": "Model to load.",
        "store": "Store to check, as NAME=ADDRESS or ADDRESS; repeatable. Without it no store is "
        "checked.",
        "models": "Further model that must be installed; repeatable.",
        "max_memory": "Memory that the server may take, to compare with the machine's.",
    },
    warn=False,
)
def cli(flags: ConfigFlags, as_json: bool) -> int:
    """Check hardware, engines, models and stores, and show fixes.

    The exit status is 1 if something that is needed does not work.
    """
    set_up_logging("error", "text")
    resolved = flags.resolve((*_OPTIONS, "max_message_bytes"))
    findings = list(examine(resolved.config, with_stores="store" in resolved.sources))
    findings += [Finding("home", "environment", "note", text) for text in resolved.warnings]
    broken = any(finding.state == "broken" for finding in findings)
    if as_json:
        found = [dataclasses.asdict(finding) for finding in findings]
        print_json({"ok": not broken, "findings": found}, indent=2)
    else:
        _print(findings)
    return 1 if broken else 0


def examine(config: ServeConfig, *, with_stores: bool) -> Iterator[Finding]:
    """Run all checks. A check that raises an error becomes a finding."""
    parts: dict[str, Callable[[ServeConfig], Iterator[_Found]]] = {
        "hardware": _hardware,
        "software": _software,
        "home": _home,
        "models": _models,
        "engine": _engine,
    }
    if with_stores:
        parts["stores"] = _stores
    for part, check in parts.items():
        try:
            for found in check(config):
                yield Finding(part, *found)
        except Exception as error:  # noqa: BLE001  (an error in one check must not hide the others)
            yield Finding(part, "check", "broken", f"{type(error).__name__}: {error}")


def _hardware(config: ServeConfig) -> Iterator[_Found]:
    from fletcher.inference.host import detect_host

    host = detect_host()
    yield "processor", "ok", host.cpu
    yield "cores", "ok", f"{host.cores} usable of {os.cpu_count()}"
    yield _memory(config, host.memory_bytes)
    yield "instructions", "ok", ", ".join(sorted(host.isa)) or "none that engines use"
    if host.num_numa_nodes > 1:
        yield "memory nodes", "ok", str(host.num_numa_nodes)
    if host.num_cuda_devices and not host.cuda_provider:
        fix = "pip uninstall onnxruntime; pip install 'longbow-fletcher[gpu]'"
        yield "CUDA devices", "note", f"{host.num_cuda_devices}, without an engine for them", fix
    else:
        yield "CUDA devices", "ok", str(host.num_cuda_devices)


def _memory(config: ServeConfig, available: int) -> _Found:
    value = f"{human(available)}B"
    wanted = config.limits.max_memory + OWN_MEMORY_BYTES
    if available and available < wanted:
        fitting = max(256, (available - OWN_MEMORY_BYTES) >> 20)
        fix = f"a busy server may take {human(wanted)}B: give --max-memory {fitting}MiB"
        return "memory", "note", value, fix
    return "memory", "ok", value


def _software(_: ServeConfig) -> Iterator[_Found]:
    yield "python", "ok", f"{platform.python_version()} ({sys.executable})"
    for name in ("longbow-fletcher", "pyarrow", "numpy", "tokenizers", "protobuf"):
        found = _version(name)
        fix = "" if found else "pip install longbow-fletcher"
        yield name, "ok" if found else "broken", found or "missing", fix
    yield from _engines()
    for name, extra, what in (
        ("lancedb", "lance", "lance: stores"),
        ("huggingface-hub", "hub", "models from the hub"),
        ("opentelemetry-exporter-otlp-proto-http", "otlp", "--otlp-endpoint"),
    ):
        found = _version(name)
        fix = "" if found else f"for {what}: pip install 'longbow-fletcher[{extra}]'"
        yield name, "ok" if found else "note", found or "missing", fix


def _engines() -> Iterator[_Found]:
    names = ("onnxruntime", "onnxruntime-gpu", "openvino")
    found = {name: version for name in names if (version := _version(name))}
    for name, version in found.items():
        yield name, "ok", version
    if found.keys() - {"openvino"}:
        from fletcher.inference.onnxruntime import providers

        yield "onnxruntime providers", "ok", ", ".join(providers())
    if "openvino" in found:
        from fletcher.inference.openvino import devices

        for name, abilities in devices().items():
            yield f"openvino {name}", "ok", ", ".join(abilities)
    if not found:
        fix = "pip install 'longbow-fletcher[cpu]', or [gpu] where there is an NVIDIA GPU"
        yield "engines", "broken", "neither onnxruntime nor openvino", fix
    if {"onnxruntime", "onnxruntime-gpu"} <= found.keys():
        fix = "pip uninstall onnxruntime onnxruntime-gpu, then install one of them"
        value = "onnxruntime and onnxruntime-gpu are one module and overwrite each other"
        yield "engines", "broken", value, fix


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _home(config: ServeConfig) -> Iterator[_Found]:
    home = config.home
    try:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=home):
            pass
    except OSError as error:
        value = f"{home} cannot be written: {error.strerror}"
        yield "folder", "broken", value, "give --home or set FLETCHER_HOME"
        return
    yield "folder", "ok", str(home)
    free = shutil.disk_usage(home).free
    fix = f"a model needs up to {human(NEEDED_DISK_BYTES)}B: make room"
    enough = free >= NEEDED_DISK_BYTES
    yield "free disk", "ok" if enough else "note", f"{human(free)}B", "" if enough else fix


def _models(config: ServeConfig) -> Iterator[_Found]:
    from fletcher.models.bundle.registry import DEFAULT_MODEL, Registry

    registry = Registry(config.home / "models")
    names = registry.names()
    for name in names:
        try:
            bundle = registry.verify_model(name)
        except FletcherError as error:
            fix = f"fletcher model remove {name}, then add it again"
            yield name, "broken", error.message, fix
        else:
            yield name, "ok", f"{bundle.qualified_name}, {bundle.dim} dimensions, checksums right"
    for name in dict.fromkeys((config.model.default, *config.model.models)):
        if name in names or any(name == bundle.qualified_name for bundle in registry.list_models()):
            continue
        if name == DEFAULT_MODEL:
            yield name, "note", "not installed", "it is downloaded on its first use"
        else:
            yield name, "broken", "not installed", "fletcher model add SOURCE"


def _engine(config: ServeConfig) -> Iterator[_Found]:
    """Load the model as a server would, since an installed engine may not work."""
    from fletcher.inference.host import detect_host
    from fletcher.models.bundle.registry import Registry
    from fletcher.tuning.decision import decide

    registry = Registry(config.home / "models")
    if config.model.default not in registry.names():
        return
    try:
        chosen = decide(
            config.home, config.engine, detect_host(), registry.get_model(config.model.default)
        )
    except FletcherError as error:
        yield config.model.default, "broken", error.message
        return
    yield config.model.default, "ok", chosen.reason
    yield from _self_check(config, chosen)
    if chosen.measured is not None:
        yield "chosen", "ok", f"by measurement, {chosen.measured.measured_at}"
    elif config.engine.backend != "null":
        fix = "fletcher tune measures what is fastest here, in about a minute for a small model"
        yield "chosen", "note", "by rule", fix
    # One replica per device is enough: replicas on the same device are alike.
    for device, one in {one.device: one for one in chosen.configs}.items():
        engine = import_module(f"fletcher.inference.{one.backend}")
        try:
            about = engine.load(one).describe()
        except FletcherError as error:
            yield device, "broken", error.message
            continue
        for name, value in about.items():
            yield name, "ok", value


def _self_check(config: ServeConfig, chosen: Decision) -> Iterator[_Found]:
    """Compare the chosen engine's vectors with float32, as a server does."""
    from fletcher.inference.host import detect_host
    from fletcher.models.bundle.registry import Registry
    from fletcher.tuning.self_check import SelfCheck

    bundle = Registry(config.home / "models").get_model(config.model.default)
    check = SelfCheck(config.home, detect_host())
    try:
        result = check.check_engine(chosen.configs[0], bundle)
        served = check.checked(chosen, config.engine, bundle)
    except FletcherError as error:
        yield "self-check", "broken", error.message
        return
    if served.configs != chosen.configs:
        yield "self-check", "note", served.reason, "report the model; float32 is right but slower"
    elif result is not None:
        yield "self-check", "ok", f"{result}, {result.checked_at}"


def _stores(config: ServeConfig) -> Iterator[_Found]:
    from fletcher.stores.address import folder_of, open_store
    from fletcher.stores.base import total_rows
    from fletcher.stores.longbow_trouble import index_trouble

    for name, address in config.store_addresses.items():
        folder = folder_of(address)
        if folder is not None and not folder.exists():
            fix = "the first rows create it; if it should hold rows, correct the address"
            yield name, "note", f"{address}: does not exist yet", fix
            continue
        try:
            with contextlib.closing(open_store(address, timeout_s=10.0)) as store:
                datasets = store.datasets()
                earlier = {info.name: info for info in datasets}
                if any(index_trouble(None, info) for info in datasets):
                    time.sleep(INDEX_GROWS_S)
                    datasets = store.datasets()
        except FletcherError as error:
            fix = "start the store, or correct its address"
            yield name, "broken", f"{address}: {error.message}", fix
        else:
            rows = counted(total_rows(datasets), "rows")
            yield name, "ok", f"{address}: {len(datasets)} datasets, {rows}"
            for info in datasets:
                trouble = index_trouble(earlier.get(info.name), info)
                if trouble is not None:
                    share = index_share(info.num_rows, info.num_indexed)
                    yield f"{name}/{info.name}", "note", share, trouble


def _print(findings: list[Finding]) -> None:
    rows: list[tuple[object, ...]] = []
    for one in findings:
        rows.append((one.part, styled(*MARKS[one.state]), one.name, one.value))
        if one.fix:
            rows.append((one.part, "", "", f"-> {one.fix}"))
    print_table(grouped(rows))
    fixes = sum(finding.state == "broken" for finding in findings)
    print(f"{fixes} to fix" if fixes else "everything needed works")
