from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from msgspec.structs import replace

from fletcher.config.model import OutputConfig
from fletcher.core.chunking import Chunking
from fletcher.core.command import EmbedCommand
from fletcher.core.quantization import Ranges
from fletcher.errors import DimensionMismatchError, InvalidCommandError
from fletcher.models.bundle.calibration import Calibration, Cut
from fletcher.pipeline.vector_spec import check_late, vector_spec

ALL = ("float32", "float16", "int8", "ubinary")
RULES = OutputConfig()
LAX = OutputConfig(allow_undeclared=True)


@pytest.fixture
def model(tiny_bundle):
    """Dims 16 and 32; ranges for 32."""
    cut = Cut(layers=2, dims=32, normalized=True)
    ranges = Ranges.between(np.full(32, -1, np.float32), np.ones(32, np.float32))
    return replace(tiny_bundle, dims=(16, 32), calibration=Calibration(500, {cut: ranges}))


def ask(model, rules=RULES, dtypes=ALL, **fields):
    return vector_spec(model, EmbedCommand(**fields), dtypes, rules)


def test_what_is_not_asked_is_the_models(model):
    spec = ask(model)
    assert (spec.dims, spec.dtype, spec.layers, spec.normalized) == (32, "float16", 2, True)
    assert ask(model, dtypes=("float32",)).dtype == "float32"


def test_declared_dims_are_given(model):
    assert ask(model, dims=16).dims == 16


@pytest.mark.parametrize("dims", [8, 17, 31])
def test_undeclared_dims_are_refused_or_let_through(model, dims):
    with pytest.raises(DimensionMismatchError, match=r"declares: 16, 32; .*--allow-und") as no:
        ask(model, dims=dims)
    assert (no.value.field, no.value.allowed) == ("dims", ["16", "32"])
    assert ask(model, LAX, dims=dims).dims == dims


def test_more_dims_than_there_are_cannot_be_let_through(model):
    for rules in (RULES, LAX):
        with pytest.raises(DimensionMismatchError, match=r"at most 32"):
            ask(model, rules, dims=33)


def test_dims_that_8_does_not_divide_cannot_be_bits(model):
    assert ask(model, dims=16, dtype="ubinary").num_bytes == 2
    with pytest.raises(InvalidCommandError, match=r"`dims` is 12, expected a multiple of 8") as no:
        ask(model, LAX, dims=12, dtype="ubinary")
    assert (no.value.field, no.value.allowed) == ("dtype", ["float32", "float16", "int8"])


def test_a_store_says_what_it_takes(model):
    with pytest.raises(InvalidCommandError, match=r"the store takes: float32") as no:
        ask(model, dtypes=("float32",), dtype="int8")
    assert (no.value.field, no.value.allowed) == ("dtype", ["float32"])


def test_int8_takes_ranges_where_there_are_some(model):
    assert ask(model, dtype="int8").ranges is not None
    assert ask(model, dtype="int8", dims=16).ranges is None
    assert ask(model, dtype="int8", normalize=False).ranges is None
    assert ask(model, dtype="float32").ranges is None
    assert ask(model, OutputConfig(int8="row"), dtype="int8").ranges is None
    assert ask(model, OutputConfig(int8="ranges"), dtype="int8").ranges is not None


def test_missing_ranges_are_refused_where_a_server_wants_them(model):
    rules = OutputConfig(int8="ranges")
    with pytest.raises(InvalidCommandError, match=r"has none for 16 dims.*only for: 32 dims") as no:
        ask(model, rules, dtype="int8", dims=16)
    assert (no.value.field, no.value.allowed) == ("dtype", ["float32", "float16", "ubinary"])
    with pytest.raises(InvalidCommandError, match=r"only for: none.*model calibrate tiny"):
        ask(replace(model, calibration=Calibration()), rules, dtype="int8")
    assert ask(model, rules, dtype="float16", dims=16).dims == 16


def test_an_exit_that_is_not_there_is_refused(model):
    with pytest.raises(InvalidCommandError, match=r"`layers` is 7.* only .* layer 2$") as no:
        ask(model, layers=7)
    assert (no.value.field, no.value.allowed) == ("layers", ["2"])
    with pytest.raises(InvalidCommandError, match=r"`layers` is 1.* with --exits makes others"):
        ask(model, LAX, layers=1)


def test_an_exit_that_is_there_is_given(model):
    deep = replace(model, num_layers=6, layers=(2, 4, 6))
    assert [ask(deep, layers=one).layers for one in (None, 2, 4, 6)] == [6, 2, 4, 6]
    with pytest.raises(InvalidCommandError, match=r"`layers` is 7.* after layers 2, 4, 6$") as no:
        ask(deep, layers=7)
    assert (no.value.field, no.value.allowed) == ("layers", ["2", "4", "6"])


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"pooling": "cls"}, "pools by cls, expected mean"),
        ({"family": "onnx"}, "a foreign ONNX graph"),
        ({"layers": (1, 2)}, "without --exits"),
        ({}, "add it again"),
    ],
)
def test_late_chunking_is_refused_where_there_is_no_graph_for_it(model, fields, said):
    late = Chunking("tokens", 8, aggregation="none", late=True)
    check_late(model, late, 2)
    without = replace(model, late=None, **fields)
    check_late(without, dataclasses.replace(late, late=False), 2)
    with pytest.raises(InvalidCommandError, match=said) as no:
        check_late(without, late, 2)
    assert (no.value.field, no.value.allowed) == ("chunking", ["tokens:8/0:none"])
