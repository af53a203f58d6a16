import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import fs
from pyarrow import parquet as pq

from .s3_server import S3Server, s3_server


def put(store: fs.S3FileSystem, path: str, content: bytes) -> None:
    with store.open_output_stream(path) as stream:
        stream.write(content)


def get(store: fs.S3FileSystem, path: str) -> bytes:
    with store.open_input_file(path) as file:
        return bytes(file.read())


def test_what_is_put_is_listed_and_read(s3: S3Server) -> None:
    store = s3.filesystem()
    store.create_dir("basics")
    put(store, "basics/a/b c.bin", b"first")
    put(store, "basics/a/b c.bin", b"second")
    put(store, "basics/draw=0/empty", b"")

    listed = store.get_file_info(fs.FileSelector("basics", recursive=True))
    assert {(i.path, i.size) for i in listed if i.is_file} == {("basics/a/b c.bin", 6), ("basics/draw=0/empty", 0)}
    assert get(store, "basics/a/b c.bin") == b"second"
    assert get(store, "basics/draw=0/empty") == b""
    with pytest.raises(FileNotFoundError):
        store.open_input_file("basics/none")


def test_a_large_object_is_seen_whole_or_not_at_all_and_read_in_pieces(s3: S3Server) -> None:
    store = s3.filesystem()
    store.create_dir("large")
    content = os.urandom(12 << 20)  # pyarrow sends three parts

    with store.open_output_stream("large/object") as stream:
        stream.write(content[: 11 << 20])
        assert store.get_file_info("large/object").type == fs.FileType.NotFound
        stream.write(content[11 << 20 :])

    file = store.open_input_file("large/object")
    assert file.size() == len(content)
    starts = range(0, len(content), 300_001)
    with ThreadPoolExecutor(4) as pool:
        pieces = list(pool.map(lambda start: file.read_at(300_001, start), starts))
    assert b"".join(pieces) == content


def test_copied_moved_and_deleted_objects(s3: S3Server) -> None:
    store = s3.filesystem()
    store.create_dir("moves")
    put(store, "moves/one", b"1")
    store.copy_file("moves/one", "moves/deep/two")
    store.move("moves/one", "moves/three")
    assert get(store, "moves/deep/two") == get(store, "moves/three") == b"1"
    assert store.get_file_info("moves/one").type == fs.FileType.NotFound

    store.delete_file("moves/three")
    store.delete_dir("moves/deep")
    assert store.get_file_info(fs.FileSelector("moves", recursive=True)) == []


def test_parquet_with_large_binary_and_page_checksums(s3: S3Server) -> None:
    store = s3.filesystem()
    store.create_dir("tables")
    table = pa.table({"id": ["a", "b"], "layer_01": pa.array([os.urandom(50_000), b""], pa.large_binary())})
    pq.write_table(
        table, "tables/t.parquet", filesystem=store, row_group_size=1, compression="none", write_page_checksum=True
    )
    read = pq.read_table("tables/t.parquet", filesystem=store, page_checksum_verification=True)
    assert read.equals(table)


def test_environment_makes_plain_uris_mean_the_server(s3: S3Server) -> None:
    s3.filesystem().create_dir("by-environment")
    code = (
        "from pyarrow import fs; store, path = fs.FileSystem.from_uri('s3://by-environment/x'); "
        "stream = store.open_output_stream(path); stream.write(b'hello'); stream.close()"
    )
    rest = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    subprocess.run([sys.executable, "-c", code], env=rest | s3.environment(), check=True, timeout=60)
    assert get(s3.filesystem(), "by-environment/x") == b"hello"


def test_wrong_secret_and_missing_bucket_are_refused(s3: S3Server) -> None:
    put_somewhere = s3.filesystem()
    put_somewhere.create_dir("guarded")
    other_user = S3Server(s3.endpoint, s3.access_key, "another-secret").filesystem()
    with pytest.raises(OSError, match="SIGNATURE_DOES_NOT_MATCH"):
        put(other_user, "guarded/x", b"x")
    with pytest.raises(OSError, match="NO_SUCH_BUCKET"):
        put(put_somewhere, "never-made/x", b"x")


def test_a_server_that_cannot_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "weed"
    broken.write_text("#!/bin/sh\necho no room on this disk >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    with pytest.raises(RuntimeError, match=r"ended with status 3(.|\n)*no room on this disk"), s3_server(tmp_path):
        pass
