import pytest

from fletcher.errors import InvalidCommandError
from fletcher.net.address import FlightAddress, parse_address
from fletcher.net.channel import connect


@pytest.mark.parametrize(
    ("uri", "address", "plain"),
    [
        ("grpc://h:1", FlightAddress("h", 1), "grpc://h:1"),
        ("grpc+tcp://h:1/", FlightAddress("h", 1), "grpc://h:1"),
        ("grpcs://h:65535", FlightAddress("h", 65535, encrypted=True), "grpc+tls://h:65535"),
        ("grpc+tls://h:1", FlightAddress("h", 1, encrypted=True), "grpc+tls://h:1"),
        ("grpc://[::1]:1", FlightAddress("::1", 1), "grpc://[::1]:1"),
        ("grpc://h:1?a=b&c=", FlightAddress("h", 1, options={"a": "b", "c": ""}), "grpc://h:1"),
    ],
)
def test_an_address_is_parsed_and_written(uri, address, plain):
    parsed = FlightAddress.from_uri(uri)
    assert parsed == address
    assert parsed.uri == plain
    assert parsed.with_port(7).uri == plain.rsplit(":", 1)[0] + ":7"
    connect(parsed.uri).close()


@pytest.mark.parametrize(
    "uri",
    ["", "h:1", "http://h:1", "grpc:h:1", "grpc://h", "grpc://:1", "grpc://h:x", "grpc://h:0",
     "grpc://h:65536", "grpc://h:1/path", "grpc://me@h:1", "grpc://h:1#x", "grpc://h:1?a=1&a=2",
     "grpc://h:1?a", "grpc://[::1:1"],
)  # fmt: skip
def test_what_is_no_address_is_refused(uri):
    with pytest.raises(ValueError):  # noqa: PT011 - urllib words it
        FlightAddress.from_uri(uri)
    with pytest.raises(
        InvalidCommandError, match=r"`server` is .*expected grpc://HOST:PORT"
    ) as got:
        parse_address(uri, field="server")
    assert got.value.field == "server"
    assert ("did you mean grpc://h:1?" in got.value.message) == (uri == "h:1")


def test_a_server_address_has_no_options():
    assert parse_address("grpc://h:1").uri == "grpc://h:1"
    with pytest.raises(InvalidCommandError):
        parse_address("grpc://h:1?meta=2")
