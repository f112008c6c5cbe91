"""The documents' Python, run as it stands beside a server."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fletcher.runtime import Runtime

ROOT = Path(__file__).parents[2]
# The tiny model reads 32 tokens.
FITTING = {"sentences:128:none": "sentences:16:none"}


@pytest.mark.parametrize(
    ("name", "num_blocks"), [("README.md", 3), ("docs/python.md", 8), ("docs/tutorial.md", 1)]
)
def test_python_runs(
    name: str, num_blocks: int, server: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / name).read_text(encoding="utf-8")
    for shown, here in {"grpc://127.0.0.1:8815": server.address, **FITTING}.items():
        text = text.replace(shown, here)
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))
    assert len(blocks) == num_blocks
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks:
        line = text.count("\n", 0, block.start(1))
        exec(compile("\n" * line + block[1], str(ROOT / name), "exec"), names)
