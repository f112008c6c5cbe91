"""One definition of every option; flag before environment before file before default."""

from __future__ import annotations

import dataclasses
import os
import re
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from fletcher.config.network import is_loopback
from fletcher.config.option import nearest, parse_milliseconds, parse_seconds, parse_size
from fletcher.config.resolution import resolve
from fletcher.config.server import (
    OPTIONS,
    PARTS,
    ServeConfig,
    fletcher_home,
)
from fletcher.errors import ConfigError
from fletcher.net.ports import check_port


def write(folder: Path, text: str) -> Path:
    path = folder / "fletcher.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_are_those_of_the_contract() -> None:
    config = resolve({}, {"HOME": "/nowhere"}).config
    assert (config.network.host, config.network.port) == ("127.0.0.1", 8815)
    assert config.model.default == "all-MiniLM-L6-v2"
    assert (config.limits.max_streams, config.limits.max_memory) == (256, 2 << 30)
    assert (config.limits.max_message_bytes, config.limits.max_row_bytes) == (64 << 20, 16 << 20)
    assert config.delivery.stores == ()
    assert not config.network.insecure


def test_every_field_is_an_option_with_help_that_fits_a_line_or_two() -> None:
    assert {*PARTS, "home"} == {spec.name for spec in dataclasses.fields(ServeConfig)}
    derived = {"commit_rows", "max_dedupe_bytes", "folder", "segment_bytes"}
    fields = [spec.name for part in PARTS.values() for spec in dataclasses.fields(part)]
    assert {one.field for one in OPTIONS.values()} == {*fields, "home"} - derived | {"folder"}
    assert len(OPTIONS) == len(fields) + 1 - len(derived)
    for option in OPTIONS.values():
        assert 15 < len(option.help) < 280, option.name
        assert option.help.endswith("."), option.name


def test_values_are_given_and_read_by_option_name() -> None:
    config = ServeConfig.from_options(port=0, drain_timeout=5, store=("none",))
    assert (config.network.port, config.limits.drain_timeout_s) == (0, 5)
    other = config.with_options(port=1)
    assert (other.value_of("port"), other.value_of("store")) == (1, ("none",))
    with pytest.raises(TypeError, match="did you mean drain_timeout"):
        ServeConfig.from_options(drain_timeout_s=5)


def test_what_components_derive_from_options_is_computed_once(tmp_path: Path) -> None:
    config = ServeConfig.from_options(home=tmp_path, group_rows=60_000, max_journal=800)
    assert config.journal.folder == tmp_path / "journal"
    assert config.journal.segment_bytes == 100
    assert (config.delivery.commit_rows, config.delivery.group_delay_s) == (60_000, 0.5)
    assert config.delivery.max_dedupe_bytes == (2 << 30) // 8
    assert config.limits.budget_bytes == 1 << 30


def test_names_derive_from_the_field() -> None:
    assert OPTIONS["drain_timeout"].flag == "--drain-timeout"
    assert OPTIONS["drain_timeout"].variable == "FLETCHER_DRAIN_TIMEOUT"
    assert OPTIONS["max_queue_delay_ms"].flag == "--max-queue-delay-ms"
    assert OPTIONS["store"].field == "stores"
    assert OPTIONS["home"].variable == "FLETCHER_HOME"


def test_precedence(tmp_path: Path) -> None:
    file = write(tmp_path, "port = 1\nmax_streams = 1\nmax_row_bytes = 1\n")
    environ = {"FLETCHER_PORT": "2", "FLETCHER_MAX_STREAMS": "2"}
    resolved = resolve({"port": "3"}, environ, file)
    config = resolved.config
    assert (config.network.port, config.limits.max_streams, config.limits.max_row_bytes) == (
        3,
        2,
        1,
    )
    assert config.limits.max_message_bytes == 64 << 20
    assert resolved.sources == {
        "port": "--port",
        "max_streams": "FLETCHER_MAX_STREAMS",
        "max_row_bytes": str(file),
    }


def test_the_file_may_be_named_by_the_environment(tmp_path: Path) -> None:
    file = write(tmp_path, "port = 4")
    assert resolve({}, {"FLETCHER_CONFIG": str(file)}).config.network.port == 4
    other = tmp_path / "other.toml"
    other.write_text("port = 5", encoding="utf-8")
    assert resolve({}, {"FLETCHER_CONFIG": str(file)}, other).config.network.port == 5


def test_only_takes_the_named_options_and_ignores_the_others() -> None:
    environ = {"FLETCHER_HOST": "0.0.0.0", "FLETCHER_DEVICE": "cpu"}
    config = resolve({}, environ, only={"device"}).config
    assert (config.network.host, config.engine.device) == ("127.0.0.1", "cpu")


def test_an_empty_variable_counts_as_unset() -> None:
    assert resolve({}, {"FLETCHER_PORT": ""}).config.network.port == 8815


@pytest.mark.parametrize(
    ("text", "value"),
    [("512MiB", 512 << 20), ("1GB", 10**9), ("4096", 4096), ("1.5k", 1536), ("2 gib", 2 << 30)],
)
def test_sizes(text: str, value: int) -> None:
    assert parse_size(text) == value


@pytest.mark.parametrize("text", ["-1", "1XB", "MiB", "1e3", "nan", "1 2"])
def test_bad_quantities(text: str) -> None:
    for parse in (parse_size, parse_seconds, parse_milliseconds):
        with pytest.raises(ValueError, match=re.escape(text)):
            parse(text)
        with pytest.raises(ValueError):  # noqa: PT011  (nothing to match)
            parse("")


def test_durations() -> None:
    assert parse_seconds("30") == 30
    assert parse_seconds("200ms") == pytest.approx(0.2)
    assert parse_seconds("2m") == 120
    assert parse_milliseconds("5") == pytest.approx(5)
    assert parse_milliseconds("2s") == pytest.approx(2000)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("port", "65536", "from 0 to 65535"),
        ("port", "http", "a whole number"),
        ("max_streams", "0", "at least 1"),
        ("max_memory", "lots", "512MiB"),
        ("drain_timeout", "soon", "seconds"),
        ("drain_timeout", "99999999", "from 0 to 86400"),
        ("device", "cuda:x", "cuda:N"),
        ("device", "gpu", "auto, cpu"),
        ("backend", "tensorflow", "onnxruntime"),
        ("insecure", "maybe", "true or false"),
        ("log_format", "xml", "text, json"),
        ("otlp_endpoint", "localhost:4318", "http://"),
    ],
)
def test_a_bad_value_names_option_source_value_and_what_is_allowed(
    tmp_path: Path, name: str, value: str, allowed: str
) -> None:
    option = OPTIONS[name]
    file = write(tmp_path, f'{name} = "{value}"')
    for flags, environ, path, source in (
        ({name: value}, {}, None, option.flag),
        ({}, {option.variable: value}, None, option.variable),
        ({}, {}, file, str(file)),
    ):
        with pytest.raises(ConfigError) as caught:
            resolve(flags, environ, path)
        assert caught.value.field == name
        for part in (f"`{name}`", repr(value), source, allowed):
            assert part in caught.value.message


@pytest.mark.parametrize(
    "line",
    [
        "port = true",
        "port = 1.5",
        "port = [1]",
        "insecure = 1",
        "model = 3",
        "drain_timeout = nan",
        "drain_timeout = inf",
        'host = ""',
        "store = {a = 1}",
    ],
)
def test_toml_values_of_the_wrong_type(tmp_path: Path, line: str) -> None:
    with pytest.raises(ConfigError, match=f"`{line.partition(' ')[0]}`"):
        resolve({}, {}, write(tmp_path, line))


def test_toml_types(tmp_path: Path) -> None:
    text = 'max_memory = "1GiB"\ndrain_timeout = 1.5\ninsecure = true\n'
    config = resolve({}, {}, write(tmp_path, text)).config
    assert (config.limits.max_memory, config.limits.drain_timeout_s) == (1 << 30, 1.5)
    assert config.network.insecure is True


def test_an_unknown_key_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`max_stream`.*did you mean max_streams"):
        resolve({}, {}, write(tmp_path, "max_stream = 1"))


def test_the_file_to_begin_with_is_one() -> None:
    config = resolve({}, {}, Path(__file__).parents[3] / "deploy" / "fletcher.toml").config
    assert config.telemetry.log_format == "json"


def test_a_table_in_the_file_is_refused_as_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`server` in .* the file has no tables"):
        resolve({}, {}, write(tmp_path, "[server]\nport = 1"))


def test_a_broken_and_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"not TOML.*line 1"):
        resolve({}, {}, write(tmp_path, "port = = 1"))
    with pytest.raises(ConfigError, match="nested too deep"):
        resolve({}, {}, write(tmp_path, "port = " + "[" * 9999))
    with pytest.raises(ConfigError, match="No such file"):
        resolve({}, {}, tmp_path / "none.toml")


def test_a_misspelt_variable_is_a_warning_and_a_foreign_one_is_not() -> None:
    environ = {"FLETCHER_MAX_STREAM": "9", "FLETCHER_NOTHING_LIKE_IT": "1"}
    (warning,) = resolve({}, environ).warnings
    assert warning == "FLETCHER_MAX_STREAM is not an option; did you mean FLETCHER_MAX_STREAMS?"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org"])
def test_a_public_host_needs_tokens_or_insecure(tmp_path: Path, host: str) -> None:
    with pytest.raises(ConfigError, match="--token-file"):
        resolve({"host": host}, {})
    assert resolve({"host": host, "insecure": "true"}, {}).config.network.host == host
    tokens = tmp_path / "tokens"
    tokens.write_text("secret\n", encoding="utf-8")
    assert (
        resolve({"host": host, "token_file": str(tokens)}, {}).config.network.token_file == tokens
    )


def test_loopback() -> None:
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "localhost.example.org"))


def test_options_that_need_each_other(tmp_path: Path) -> None:
    pem = tmp_path / "some.pem"
    pem.write_text("x", encoding="utf-8")
    with pytest.raises(ConfigError, match="`tls_cert` needs `tls_key`"):
        ServeConfig.from_options(tls_cert=pem)
    with pytest.raises(ConfigError, match="`tls_key` needs `tls_cert`"):
        ServeConfig.from_options(tls_key=pem)
    with pytest.raises(ConfigError, match="`tls_client_ca` needs"):
        ServeConfig.from_options(tls_client_ca=pem)
    with pytest.raises(ConfigError, match="which is not a file"):
        ServeConfig.from_options(token_file=tmp_path / "none")
    with pytest.raises(ConfigError, match="`max_row_bytes`"):
        ServeConfig.from_options(max_message_bytes=1 << 20)
    with pytest.raises(ConfigError, match="`max_message_bytes`"):
        ServeConfig.from_options(max_memory=1 << 20)
    with pytest.raises(ConfigError, match=r"`tokenizer` is 'null'.*give --backend null"):
        ServeConfig.from_options(tokenizer="null")


def test_values_are_checked_without_resolve_too() -> None:
    with pytest.raises(ConfigError, match="`port` is -1"):
        ServeConfig.from_options(port=-1)
    with pytest.raises(ConfigError, match="`device`"):
        ServeConfig.from_options(device="tpu")


def test_stores_have_names_and_addresses_may_hold_commas_and_equals_signs() -> None:
    with pytest.raises(ConfigError, match="NAME=ADDRESS"):
        resolve({}, {"FLETCHER_STORE": "lance:/a,b/c,grpc://h:1?meta=2"})
    config = resolve({}, {"FLETCHER_STORE": "lance:/a,b/c,far=grpc://h:1?meta=2"}).config
    assert config.store_addresses == {"default": "lance:/a,b/c", "far": "grpc://h:1?meta=2"}
    config = resolve({"store": ["near=lance:/x", "parquet:/y"]}, {}).config
    assert list(config.store_addresses.items()) == [("near", "lance:/x"), ("default", "parquet:/y")]


def test_without_a_store_vectors_go_to_the_home_folder(tmp_path: Path) -> None:
    config = resolve({}, {"FLETCHER_HOME": str(tmp_path)}).config
    assert config.store_addresses == {"default": f"lance:{tmp_path}/vectors"}
    assert resolve({"store": ["none"]}, {}).config.store_addresses == {}


def test_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/users/u")
    assert fletcher_home({"FLETCHER_HOME": "/f", "XDG_DATA_HOME": "/x"}) == Path("/f")
    assert fletcher_home({"XDG_DATA_HOME": "/x"}) == Path("/x/fletcher")
    assert fletcher_home({"XDG_DATA_HOME": "x"}) == Path("/users/u/.local/share/fletcher")
    assert fletcher_home({}) == Path("/users/u/.local/share/fletcher")
    assert fletcher_home({"FLETCHER_HOME": "~/f"}) == Path("/users/u/f")


def test_the_printed_file_reads_back_as_the_same_configuration(tmp_path: Path) -> None:
    flags = {"store": ["a=lance:/x", 'b=lance:/"y"'], "max_memory": "3GiB", "home": str(tmp_path)}
    resolved = resolve(flags, {"FLETCHER_DEVICE": "cuda:0,1"})
    text = resolved.to_toml()
    assert 'device = "cuda:0,1"  # FLETCHER_DEVICE' in text
    assert "port = 8815  # default" in text
    assert "# token_file is not set" in text
    assert len(tomllib.loads(text)) == len(OPTIONS) - text.count("is not set")
    assert resolve({}, {}, write(tmp_path, text)).config == resolved.config


def test_nearest() -> None:
    assert nearest("sevre", ["serve", "store"]) == "; did you mean serve?"
    assert nearest("xyz", ["serve", "store"]) == ""


def test_the_environment_is_not_read_at_import() -> None:
    code = (
        "import os\n"
        "class Closed(dict):\n"
        "    def __getitem__(self, key): raise SystemExit(key)\n"
        "    get = __contains__ = __getitem__\n"
        "import dataclasses, tomllib, ipaddress, json, difflib, pathlib\n"
        "os.environ = Closed()\n"
        "import fletcher.config.server\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        capture_output=True,
        text=True,
        env=dict(os.environ),
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid"])
def test_a_host_that_is_not_here_is_told_from_a_port_that_is_taken(host: str) -> None:
    with pytest.raises(ConfigError, match="`host` is not an address of this machine"):
        check_port(host, 8815)
    said = pytest.raises(ConfigError, match="choose another `port`, or 0")
    with socket.create_server(("127.0.0.1", 0)) as taken, said:
        check_port("127.0.0.1", taken.getsockname()[1])
