"""Lists of variants, as people write them."""

import pytest

from fletcher.core.command import CHOICES
from fletcher.errors import InvalidCommandError
from fletcher.evaluation.variants import Engine, Variant, parse_variants, usual_variants

OWN, OTHER = Engine("openvino", "bfloat16"), Engine("onnxruntime", "float32")
MODEL = {"name": "m", "num_layers": 6, "layers": [3, 6], "dim": 384, "dims": [128, 384]}


def test_a_list_is_every_combination():
    assert parse_variants("dims=384,128 dtype=float32,float16", [OWN]) == [
        Variant(OWN, None, 384, "float32"),
        Variant(OWN, None, 384, "float16"),
        Variant(OWN, None, 128, "float32"),
        Variant(OWN, None, 128, "float16"),
    ]
    assert parse_variants("backend=onnxruntime precision=float32 layers=3", [OWN]) == [
        Variant(OTHER, 3)
    ]
    assert parse_variants("", [OWN]) == [Variant(OWN)]
    assert parse_variants("chunking=none,tokens:8/2:max,each-sentence:late", [OWN]) == [
        Variant(OWN),
        Variant(OWN, chunking="tokens:8/2:max"),
        Variant(OWN, chunking="each-sentence:mean:late"),
    ]
    on_gpu = Engine("onnxruntime", "float16", "cuda")
    assert parse_variants("precision=float32", [on_gpu]) == [
        Variant(Engine("onnxruntime", "float32", "cuda"))
    ]


def test_a_backend_without_a_precision_has_its_usual_one():
    both = [OWN, OTHER, Engine("openvino", "float32")]
    assert parse_variants("backend=openvino,onnxruntime layers=3", both) == [
        Variant(OWN, 3),
        Variant(OTHER, 3),
    ]
    # What cannot be had is asked for as it is, and refused with what can.
    assert parse_variants("backend=null", both) == [Variant(Engine("null", "bfloat16"))]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("dim=384", "did you mean dims.*backend, precision, layers, dims, dtype, chunking"),
        ("dims=", "'dims=', which leaves out a value"),
        ("dims=384,", "leaves out a value"),
        ("dims", "leaves out a value"),
        ("layers=six", "`layers` is 'six'"),
        ("dims=0", "`dims` is '0'"),
        ("chunking=tokens:8:none", "several vectors"),
        ("chunking=words:8", "unknown method 'words'"),
        ("dtype=float64", "`dtype` is 'float64'.*float32, float16"),
    ],
)
def test_what_is_no_list_is_refused_by_name(text, words):
    with pytest.raises(InvalidCommandError, match=words):
        parse_variants(text, [OWN])


def test_the_usual_variants_are_each_choice_alone_and_widths_with_types():
    found = usual_variants([OWN, OTHER], MODEL)
    assert found[:3] == [
        Variant(OWN, 6, 384, "float32"),
        Variant(OTHER, 6, 384, "float32"),
        Variant(OWN, 3, 384, "float32"),
    ]
    assert {(one.dims, one.dtype) for one in found[3:]} == {
        (dims, dtype) for dims in (128, 384) for dtype in CHOICES["dtype"]
    }
    odd = usual_variants([OWN], {**MODEL, "dim": 12, "dims": [12]})
    assert "ubinary" not in {one.dtype for one in odd}
