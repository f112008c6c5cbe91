"""Addresses that Fletcher does not know, and signals and variables that it does not use."""

from __future__ import annotations

import logging
import signal
from pathlib import Path

import pytest

from fletcher.cli import main
from fletcher.cli.shutdown import Signals
from fletcher.errors import ConfigError, InvalidCommandError
from fletcher.readers import open_source
from fletcher.stores.address import folder_of

SEARCH = ("search", "a", "--dataset", "d")


@pytest.mark.parametrize(
    ("argv", "field"),
    [
        ((*SEARCH, "--store", "lance:s3://bucket/x"), "store"),
        ((*SEARCH, "--store", "parquet:gs://bucket/x"), "store"),
        ((*SEARCH, "--store", "s3://bucket/x"), "store"),
        ((*SEARCH, "--store", "file:///tmp/x"), "store"),
        ((*SEARCH, "--home", "s3://bucket/x"), "home"),
        (("ingest", "ftp://bucket/a.csv", "--dataset", "d"), "paths"),
        (("ingest", "a.csv", "--dataset", "d", "--server", "https://host:1"), "server"),
        (("embed", "a", "--output", "gs://bucket/x"), "output"),
        (("similar", "a", "--candidates", "http://host/x"), "candidates"),
        (("eval", "hdfs://a", "--query", "q", "--document", "d"), "paths"),
        (("eval", "a", "--query", "q", "--document", "d", "--plot", "s3://x/y.png"), "plot"),
        (("model", "add", "s3://bucket/x"), "source"),
        (("model", "add", "a.onnx", "--tokenizer", "s3://bucket/x"), "tokenizer"),
        (("store", "--path", "s3://bucket/x"), "path"),
        (("serve", "--tls-cert", "vault://x"), "tls_cert"),
        (("serve", "--embedding-cache-dir", "redis://x"), "embedding_cache_dir"),
    ],
)
def test_a_uri_is_never_taken_for_a_path(
    argv: tuple[str, ...],
    field: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLETCHER_HOME", str(tmp_path))
    assert main(argv) in (1, 2)
    error = capsys.readouterr().err
    assert f"`{field}` is '" in error or f"`{field}` has a URI of" in error
    assert "unexpected" not in error
    assert [path.name for path in tmp_path.iterdir()] in ([], ["models"])


def test_a_uri_is_refused_in_python_too() -> None:
    with pytest.raises((ConfigError, InvalidCommandError), match="a URI of ftp://"):
        open_source("ftp://bucket/a.parquet")
    with pytest.raises(ConfigError, match="abfs:// is not supported"):
        folder_of("lance:abfs://container/x")
    assert folder_of("lance:/a:b//c") is not None


def test_a_misspelt_variable_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FLETCHER_HOME", str(tmp_path))
    monkeypatch.setenv("FLETCHER_MAX_STREEMS", "3")
    assert main(["model", "list"]) == 0
    error = capsys.readouterr().err
    assert error.count("FLETCHER_MAX_STREEMS is not an option; did you mean") == 1


def test_sighup_is_logged_and_ignored(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), Signals(logging.getLogger("fletcher.serve")) as signals:
        # `os.kill` may signal another thread, and two such signals may become one.
        signal.raise_signal(signal.SIGHUP)  # before the start has ended, too
        signals.mark_ready()
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGTERM)
        assert signals.stop.wait(30)
    assert signals.received == signal.SIGTERM
    assert caplog.text.count("SIGHUP ignored") == 2


def test_help_does_not_offer_the_null_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--help"]) == 0
    assert "null" not in capsys.readouterr().out
    assert main(["serve", "--backend", "nul"]) == 2
    assert "one of auto, onnxruntime, openvino\n" in capsys.readouterr().err
