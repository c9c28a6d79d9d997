"""Training jobs in processes of their own, which end with the test file."""

import pytest
from jobs import Jobs


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    started = Jobs(tmp_path_factory.mktemp("jobs") / "root")
    yield started
    started.close()
