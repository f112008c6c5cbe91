import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
from google.protobuf.json_format import MessageToDict
from pyarrow import flight

from fletcher.core.command import FIELD_NAMES, MAX_ANSWER_BYTES, EmbedCommand
from fletcher.errors import InvalidCommandError, UnknownFieldError
from fletcher.flight.actions import encode_models, run_action
from fletcher.flight.commands import (
    UNUSED_FIELDS,
    parse_command,
    parse_descriptor,
    parse_list_models,
)
from fletcher.flight.embed_action import _cut
from fletcher.flight.exchange import exchange
from fletcher.flight.put import put
from fletcher.flight.requests import MAX_BODY_BYTES
from fletcher.v1 import embed_pb2

FULL = EmbedCommand(
    dataset="d",
    upload_id="u-1",
    model="m",
    text_column="body",
    id_column="package",
    prompt="Frage: ü",
    dims=64,
    layers=3,
    dtype="float16",
    normalize=False,
    truncate="error",
    columns=("a", "b"),
    include_text=False,
    on_error="abort",
    mode="upsert",
    durability="memory",
    priority="interactive",
    store="s",
)


def encode_command(options):
    return embed_pb2.EmbedCommand(**options.to_mapping()).SerializeToString()


def test_message_and_options_have_the_same_fields():
    assert {spec.name for spec in embed_pb2.EmbedCommand.DESCRIPTOR.fields} == set(FIELD_NAMES)


@pytest.mark.parametrize("options", [FULL, EmbedCommand(), EmbedCommand(dataset="x")])
def test_both_encodings_say_the_same(options):
    assert parse_command(encode_command(options)) == options
    assert parse_command(options.to_json()) == options


def test_a_binary_command_never_looks_like_json():
    for field in embed_pb2.EmbedCommand.DESCRIPTOR.fields:
        for wire_type in (0, 1, 2, 5):  # 3 and 4 are groups, which proto3 has not
            assert (field.number << 3 | wire_type) != ord("{")


def test_presence_survives_the_binary_form():
    assert parse_command(encode_command(EmbedCommand(normalize=False))).normalize is False
    assert parse_command(encode_command(EmbedCommand())).normalize is None


def test_descriptors():
    path = flight.FlightDescriptor.for_path("corpus")
    assert parse_descriptor(path) == EmbedCommand(dataset="corpus")
    command = flight.FlightDescriptor.for_command(FULL.to_json())
    assert parse_descriptor(command) == FULL


@pytest.mark.parametrize(
    ("descriptor", "said"),
    [
        (flight.FlightDescriptor.for_path(), "0 parts"),
        (flight.FlightDescriptor.for_path("a", "b"), "2 parts"),
        (flight.FlightDescriptor.for_path("a/b"), "`dataset`"),
        (flight.FlightDescriptor.for_path(b"\xff"), "not UTF-8"),
        (SimpleNamespace(descriptor_type=0, path=[], command=b""), "neither a path nor a command"),
    ],
)
def test_other_descriptors_are_refused(descriptor, said):
    with pytest.raises(InvalidCommandError, match=said):
        parse_descriptor(descriptor)


@pytest.mark.parametrize(
    ("command", "kind", "said"),
    [
        (b'{"dataset": "d", "colour": 1}', UnknownFieldError, "`colour`"),
        (b'{"textColumn": "t"}', UnknownFieldError, "`textColumn`"),
        (b'{"dataset": "a", "dataset": "b"}', InvalidCommandError, "`dataset` is given twice"),
        (b'{"dims": 1,}', InvalidCommandError, "not JSON"),
        (b'{"dims": NaN}', InvalidCommandError, "NaN"),
        (b'{"dims": ' + b"9" * 5000 + b"}", InvalidCommandError, "too long"),
        (b'{"dims": ' + b"[" * 100000, InvalidCommandError, "nested too deep"),
        (b"{", InvalidCommandError, "not JSON"),
        (b'{"model": "\xff"}', InvalidCommandError, "not UTF-8"),
        (b'{"model": "\\ud800"}', InvalidCommandError, "surrogate"),
        (b'{"\\ud800": 1}', UnknownFieldError, "not a field"),
        (b"{" + b" " * MAX_BODY_BYTES + b"}", InvalidCommandError, "at most"),
        (b"\x0a" + b"x" * (MAX_BODY_BYTES + 1), InvalidCommandError, "at most"),
        (b"VectorSearch", InvalidCommandError, "neither JSON"),
        (b"[1]", InvalidCommandError, "neither JSON|field number"),
        (b"\xa8\x06\x01", UnknownFieldError, "field number 101"),
        # dims (7) as a string instead of an integer
        (b"\x3a\x01x", UnknownFieldError, "field number 7"),
        # dataset (1) that is not UTF-8
        (b"\x0a\x01\xff", InvalidCommandError, "neither JSON"),
    ],
)
def test_nonsense_is_refused_by_name(command, kind, said):
    with pytest.raises(kind, match=said) as caught:
        parse_command(command)
    caught.value.to_json()


MODEL = SimpleNamespace(
    name="m",
    hash="abc",
    family="bert",
    dim=384,
    max_length=256,
    pooling="mean",
    normalize=True,
    num_layers=6,
    layers=(6,),
    dims=(384,),
    prompts={"query": "query: "},
    output="dense",
)


def test_models_in_both_formats():
    running = {"is_default": True, "state": "ready", "is_current": True, "calls": 2}
    models, aliases = [(MODEL, {**running, "memory_bytes": 3, "more": 1})], {"both": "m:1,n:2"}
    as_json = json.loads(encode_models(models, aliases))
    as_binary = embed_pb2.ListModelsResult.FromString(
        encode_models(models, aliases, format_name="protobuf")
    )
    assert as_json["models"][0]["dim"] == 384
    assert as_json["models"][0]["is_default"] is True
    assert as_json["aliases"] == aliases
    assert as_json["models"][0].pop("memory_bytes") == 3  # protobuf's JSON has texts for int64
    in_binary = MessageToDict(as_binary, preserving_proto_field_name=True)
    assert in_binary["models"][0].pop("memory_bytes") == "3"
    assert in_binary == as_json


@pytest.mark.parametrize(
    ("body", "format_name"),
    [
        (b"", "json"),
        (b"{}", "json"),
        (b'{"format": "protobuf"}', "protobuf"),
        (embed_pb2.ListModelsCommand(format="protobuf").SerializeToString(), "protobuf"),
    ],
)
def test_the_format_of_list_models(body, format_name):
    assert parse_list_models(body).format == format_name


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b'{"form": 1}', UnknownFieldError),
        (b'{"format": "xml"}', InvalidCommandError),
        (b'{"format": 1}', InvalidCommandError),
        (b"\x12\x01x", UnknownFieldError),
    ],
)
def test_other_bodies_of_list_models_are_refused(body, kind):
    with pytest.raises(kind):
        parse_list_models(body)


def test_generated_code_is_current():
    if importlib.util.find_spec("grpc_tools") is None:
        pytest.skip("grpcio-tools is not installed")
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, root / "scripts" / "proto", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


TREATMENT = {"model", "prompt", "dims", "layers", "dtype", "normalize", "truncate", "output"}
ROWS = {"text_column", "id_column", "columns", "include_text", "chunking", "on_error"}
CALL = {"upload_id", "priority"}
STORING = {"dataset", "mode", "dedupe", "durability", "store"}
USED = {
    "DoPut": TREATMENT | ROWS | CALL | STORING,
    "DoExchange": TREATMENT | ROWS | CALL | {"continuous", "answer_bytes", "accept_compression"},
    "embed": TREATMENT | CALL | {"on_error"},  # an alias chooses by `upload_id`
    "upload_status": {"upload_id", "dataset", "store"},
}
VALUES = {
    **FULL.to_mapping(),
    "chunking": "tokens:8:none",
    "dedupe": "id",
    "mode": "overwrite",
    "continuous": True,
    "output": "dense",
    "answer_bytes": 0,
    "accept_compression": ["lz4"],
}


@pytest.mark.parametrize("call", USED)
@pytest.mark.parametrize("field", FIELD_NAMES)
def test_a_call_refuses_every_field_that_it_does_not_use(call, field):
    # `embed` took `mode` and `durability`, DoExchange `mode`, `dataset` and `durability`, and
    # `upload_status` took all: they did nothing.
    service, fields = MagicMock(), {field: VALUES[field]}
    if field in USED[call]:
        assert field not in UNUSED_FIELDS.get(call, ())
        return
    if field == "continuous" and call != "embed":
        fields["chunking"] = VALUES["chunking"]
    with pytest.raises(InvalidCommandError, match=f"`{field}`") as refused:
        if call == "DoPut":
            caller = MagicMock(peer_identity=lambda: "")
            caller.get_middleware.return_value = None
            put(service, EmbedCommand(dataset="d", **fields), caller, MagicMock(), MagicMock())
        elif call == "DoExchange":
            exchange(service, EmbedCommand(**fields), *[MagicMock()] * 3)
        else:
            body = json.dumps({"texts": ["a"], **fields} if call == "embed" else fields)
            run_action(service, call, body.encode(), MagicMock())
    assert refused.value.field == field


def test_embed_cannot_go_on_after_a_failed_text():
    body = b'{"texts": ["a"], "on_error": "continue"}'
    with pytest.raises(InvalidCommandError, match="all texts or none"):
        run_action(MagicMock(), "embed", body, MagicMock())


def test_vectors_that_take_much_come_in_several_results():
    # One result of more than 4 MiB is refused by the default limit of clients in Go and Rust.
    numbers = [0.123456789] * 1024
    answer = {"embeddings": [numbers] * 100, "token_count": list(range(100))}
    assert len(_cut("m", answer)) == 1
    answer["embeddings"] = [numbers * 8] * 100
    parts = [json.loads(one) for one in _cut("m", answer)]
    assert len(parts) > 2
    assert [row for one in parts for row in one["token_count"]] == list(range(100))
    assert sum(len(one["embeddings"]) for one in parts) == 100
    assert {one["model"] for one in parts} == {"m"}
    assert all(len(one) <= MAX_ANSWER_BYTES for one in _cut("m", answer))
