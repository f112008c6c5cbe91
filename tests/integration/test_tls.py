"""Encrypted servers, bearer tokens and client certificates, with certificates made on the spot."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from pyarrow import flight

import fletcher
from fletcher.client import TlsOptions
from fletcher.errors import ConfigError, UnauthenticatedError, UnavailableError
from fletcher.runtime import Runtime
from tests.integration.conftest import StartServer
from tests.integration.numbered import SCHEMA, rows

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl command")

TOKEN = "a-token-of-this-test"
TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Pair:
    """Files of a certificate and its key."""

    cert: Path
    key: Path


@dataclass(frozen=True)
class Certificates:
    """A CA, what it signed, and a CA that nobody knows."""

    ca: Pair
    server: Pair
    client: Pair
    stranger_ca: Pair
    stranger: Pair


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    folder = tmp_path_factory.mktemp("certificates")
    ca, stranger_ca = authority(folder, "ca"), authority(folder, "stranger-ca")
    return Certificates(
        ca,
        signed(folder, "server", ca),
        signed(folder, "client", ca),
        stranger_ca,
        signed(folder, "stranger", stranger_ca),
    )


def openssl(*argv: object) -> None:
    done = subprocess.run(
        ["openssl", *map(str, argv)], capture_output=True, text=True, check=False, timeout=30
    )
    assert done.returncode == 0, done.stderr


def authority(folder: Path, name: str) -> Pair:
    pair = Pair(folder / f"{name}.pem", folder / f"{name}.key")
    openssl(
        *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
        *("-days", 2, "-subj", f"/CN={name}", "-out", pair.cert, "-keyout", pair.key),
    )
    return pair


def signed(folder: Path, name: str, ca: Pair, host: str = "localhost") -> Pair:
    """A certificate for 127.0.0.1 and a host, signed by the CA."""
    pair = Pair(folder / f"{name}.pem", folder / f"{name}.key")
    request, extensions = folder / f"{name}.csr", folder / f"{name}.ext"
    extensions.write_text(f"subjectAltName=DNS:{host},IP:127.0.0.1\n", encoding="utf-8")
    openssl(
        *("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
        *("-subj", f"/CN={name}", "-out", request, "-keyout", pair.key),
    )
    openssl(
        *("x509", "-req", "-in", request, "-CA", ca.cert, "-CAkey", ca.key, "-set_serial", 7),
        *("-days", 2, "-extfile", extensions, "-out", pair.cert),
    )
    return pair


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "tokens"
    path.write_text(f"another\n{TOKEN}\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def secure(start_server: StartServer, certificates: Certificates, tokens: Path) -> Runtime:
    pair = certificates.server
    return start_server(tls_cert=pair.cert, tls_key=pair.key, token_file=tokens)


@pytest.fixture(scope="module")
def mutual(start_server: StartServer, certificates: Certificates) -> Runtime:
    pair, ca = certificates.server, certificates.ca
    return start_server(tls_cert=pair.cert, tls_key=pair.key, tls_client_ca=ca.cert)


def test_text_travels_encrypted_with_a_token(secure: Runtime, certificates: Certificates) -> None:
    assert secure.address.startswith("grpc+tls://127.0.0.1:")
    tls = TlsOptions(ca=certificates.ca.cert)
    with fletcher.connect(secure.address, token=TOKEN, tls=tls) as client:
        summary = client.put(rows(0, 100), "secret")
        assert summary.complete
        assert summary.rows_stored == 100
        assert client.embed(["a word"]).shape == (1, 32)


@pytest.mark.parametrize("token", [None, "wrong", TOKEN[:-1]])
def test_without_the_token_nobody_is_let_in(
    secure: Runtime, certificates: Certificates, token: str | None
) -> None:
    with pytest.raises(UnauthenticatedError) as caught:
        fletcher.connect(secure.address, token=token, tls=TlsOptions(ca=certificates.ca.cert))
    assert TOKEN[:-1] not in str(caught.value)


def test_a_server_that_an_unknown_ca_signed_is_refused(
    secure: Runtime, certificates: Certificates
) -> None:
    tls = TlsOptions(ca=certificates.stranger_ca.cert)
    with pytest.raises(UnavailableError) as caught:
        fletcher.connect(secure.address, token=TOKEN, tls=tls, timeout_s=TIMEOUT_S)
    assert str(caught.value).endswith("name the CA of its certificate (`tls`, --tls-ca)")


def test_plain_callers_get_nothing(secure: Runtime) -> None:
    plain = secure.address.replace("grpc+tls", "grpc")
    with pytest.raises(UnavailableError, match=r"if the server uses TLS, .* grpc\+tls://"):
        fletcher.connect(plain, token=TOKEN, timeout_s=TIMEOUT_S)


def test_a_client_certificate_lets_in(mutual: Runtime, certificates: Certificates) -> None:
    own = certificates.client
    tls = TlsOptions(ca=certificates.ca.cert, cert=own.cert, key=own.key)
    with fletcher.connect(mutual.address, tls=tls) as client:
        assert client.ready()


def test_an_upload_belongs_to_the_subject_of_its_certificate(
    mutual: Runtime, certificates: Certificates, tmp_path: Path
) -> None:
    another = signed(tmp_path, "another", certificates.ca, "another.example")
    options = fletcher.EmbedCommand(dataset="owned", upload_id="nightly")
    found = []
    for pair in (certificates.client, another, certificates.client):
        tls = TlsOptions(ca=certificates.ca.cert, cert=pair.cert, key=pair.key)
        with fletcher.connect(mutual.address, tls=tls) as client:
            found.append(client.upload_status("nightly", "owned")["rows_durable"])
            client.put(rows(0, 100), options)
    assert found == [0, 0, 100]


@pytest.mark.parametrize("who", ["nobody", "stranger"])
def test_other_client_certificates_do_not(
    mutual: Runtime, certificates: Certificates, who: str
) -> None:
    own = certificates.stranger if who == "stranger" else None
    tls = TlsOptions(
        ca=certificates.ca.cert, cert=own.cert if own else None, key=own.key if own else None
    )
    with pytest.raises(UnavailableError):
        fletcher.connect(mutual.address, tls=tls, timeout_s=TIMEOUT_S)


def test_a_key_that_is_none(start_server: StartServer, certificates: Certificates) -> None:
    pair = certificates.server
    with pytest.raises(ConfigError) as caught:
        start_server(tls_cert=pair.cert, tls_key=pair.cert)
    assert caught.value.field is not None


def test_plain_pyarrow_uses_the_same_words(secure: Runtime, certificates: Certificates) -> None:
    roots = certificates.ca.cert.read_bytes()
    options = flight.FlightCallOptions(
        timeout=20, headers=[(b"authorization", f"Bearer {TOKEN}".encode())]
    )
    with flight.connect(secure.address, tls_root_certs=roots) as client:
        writer, reader = client.do_exchange(flight.FlightDescriptor.for_command(b"{}"), options)
        writer.begin(SCHEMA)
        writer.write_batch(rows(0, 3))
        writer.done_writing()
        assert reader.read_chunk().data.num_rows == 3
        writer.close()
