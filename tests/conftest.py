"""Settings that every test needs before torch or huggingface_hub is imported."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator

# Two test processes that each spin on all cores are 40 times slower than two with one thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = os.environ.get("HF_HUB_OFFLINE", "1")
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["DO_NOT_TRACK"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# A worker looks for work every third second (prefect.toml), and dozens of tests wait for it.
os.environ.setdefault("PREFECT_WORKER_QUERY_SECONDS", "0.5")

import pytest
from hypothesis import settings

from smoltulu.tasks.engine import warm
from tests.copies import second_copies

# Else every test would start a server of its own: pytest names the test in the environment.
warm.OWN_VARIABLES = (*warm.OWN_VARIABLES, "PYTEST_CURRENT_TEST")

# A machine that others use as well stalls now and then; speed is measured in benchmarks/.
settings.register_profile("tests", deadline=None)
settings.load_profile("tests")


@pytest.fixture(scope="session", autouse=True)
def no_module_is_there_twice() -> Iterator[None]:
    """Whatever the tests of this process imported: see tests/test_copies.py."""
    yield
    assert second_copies() == []


@pytest.fixture(scope="module", autouse=True)
def what_is_imported_is_no_garbage() -> None:
    """Trainings collect garbage, and would go through the million objects of the libraries each time: half a second."""
    if "torch" in sys.modules:
        gc.collect()
        gc.freeze()
