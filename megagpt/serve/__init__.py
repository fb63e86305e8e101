"""A server over the inference engine that speaks OpenAI's API: `python examples/serve.py --load RUN`."""

from __future__ import annotations

import importlib.util

from megagpt.errors import UserError

NEEDED = ("starlette", "uvicorn", "prometheus_client", "jinja2")


def check_installed() -> None:
    """Raises UserError where the extra that the server needs is not installed."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"the server needs {', '.join(missing)}; run: pip install 'megagpt[serve]'")
