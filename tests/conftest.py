"""What all tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from megagpt.processes.local import warm_up

# In CI the same examples every time: a change must not fail for what another one broke. Locally it goes on searching.
settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("search", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "search")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Where some test runs ranks, let the fork server do its imports while the first tests run."""
    if any(hasattr(getattr(item, "module", None), "run_ranks") for item in session.items):
        warm_up("pytest")


@pytest.fixture(autouse=True)
def torch_settings() -> Iterator[None]:
    """Each test starts from the same seed, and what it changes of torch's settings ends with it.

    One thread: with tensors as small as those of tests, more only wait for each other.
    """
    n_threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(n_threads)
    torch.set_default_dtype(dtype)
