"""Training jobs in processes of their own, which end with the test file."""

import pytest
from jobs import Jobs, JobServer


@pytest.fixture(scope="session")
def job_server():
    server = JobServer()
    yield server
    server.close()


@pytest.fixture(scope="module")
def jobs(job_server, tmp_path_factory):
    started = Jobs(job_server, tmp_path_factory.mktemp("jobs") / "root")
    yield started
    started.close()
