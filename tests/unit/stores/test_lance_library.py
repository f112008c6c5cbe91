"""The import of LanceDB leaves the rest of the process as it was."""

from __future__ import annotations

import subprocess
import sys

CHECK = """
import pydantic
import sys
before = pydantic.validate_call, pydantic.BaseModel.model_config, "lancedb" in sys.modules
from fletcher.stores.lance.library import import_lancedb
lancedb = import_lancedb()
assert before == (pydantic.validate_call, pydantic.BaseModel.model_config, False)
from lance_namespace import DescribeTableRequest
assert not DescribeTableRequest.__pydantic_complete__
assert DescribeTableRequest(id=["a"]).to_dict()["id"] == ["a"]
try:
    DescribeTableRequest(id=7)
except pydantic.ValidationError:
    print("checked")
class Mine(pydantic.BaseModel):
    number: int
assert Mine.__pydantic_complete__
"""


def test_models_of_lancedb_are_built_at_first_use_and_all_others_at_once() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHECK], capture_output=True, text=True, check=False, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "checked\n"), done.stderr
