"""Settings shared by all tests: repeatable examples, and where sample data may lie."""

import os
from pathlib import Path

import hypothesis
import pytest

hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of sample data that is not part of the project; tests that use it skip where it is absent."""
    beside = Path(__file__).resolve().parents[2] / "shared"
    data = Path(os.environ.get("BIOMAMBA_SHARED", beside)) / "data"
    if not data.is_dir():
        pytest.skip("no sample data: set BIOMAMBA_SHARED to the folder that holds data/")
    return data
