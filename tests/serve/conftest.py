"""The server's tests need what the server does."""

from __future__ import annotations

import importlib.util

import pytest

from megagpt.serve import NEEDED

missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
if missing:
    pytest.skip(f"{', '.join(missing)} missing: pip install 'megagpt[serve]'", allow_module_level=True)
