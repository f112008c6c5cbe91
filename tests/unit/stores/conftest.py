from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

# `rows` is shared with tests/integration; tests are no package, so it is loaded by its path.
_spec = importlib.util.spec_from_file_location("store_rows", Path(__file__).with_name("rows.py"))
assert _spec is not None
assert _spec.loader is not None
if "store_rows" not in sys.modules:
    _module = importlib.util.module_from_spec(_spec)
    sys.modules["store_rows"] = _module
    _spec.loader.exec_module(_module)
