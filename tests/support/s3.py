"""A real S3 server (SeaweedFS) on loopback, which a test can kill and start again."""

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import s3fs

ACCESS_KEY, SECRET_KEY = "test-access-key", "test-secret-key"


def claim_ports() -> tuple[int, socket.socket]:
    """Return a port B such that B to B+4 and B+10000 to B+10004 (for gRPC) are free, and the claim to it.

    Processes that start servers side by side must not choose the same ports, nor those of a server that is
    down for a while: whoever holds UDP port B has the claim, until it closes the socket or dies.
    """
    # All lie below 32768, from where the kernel takes ports of outgoing connections.
    for base in range(21_000, 22_750, 10):
        claim = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            claim.bind(("127.0.0.1", base))
        except OSError:
            claim.close()
            continue
        if all(_is_free(base + i) and _is_free(base + 10_000 + i) for i in range(5)):
            return base, claim
        claim.close()
    raise RuntimeError("no free ports")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


class S3Server:
    """`weed mini` over one folder; `start` may follow `kill`, with all objects still there."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder
        self._options = options
        self.base, self._claim = claim_ports()
        self.endpoint = f"http://127.0.0.1:{self.base}"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to reach the server."""
        return {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def start(self) -> None:
        weed = shutil.which(
            "weed", path=os.pathsep.join([str(Path(os.sys.executable).parent), os.environ["PATH"]])
        )
        if weed is None:
            raise RuntimeError("weed is missing; install the extra `dev`")
        self.folder.mkdir(parents=True, exist_ok=True)
        ports = [f"-s3.port={self.base}"]
        ports += [
            f"-{name}.port={self.base + i + 1}"
            for i, name in enumerate(("master", "volume", "filer", "admin"))
        ]
        # Each listens at a port that all servers of this machine would share.
        ports += ["-s3.port.iceberg=0", "-s3.port.lance=0"]
        self._process = subprocess.Popen(
            [
                weed,
                "mini",
                f"-dir={self.folder}",
                "-ip=127.0.0.1",
                "-ip.bind=127.0.0.1",
                *ports,
                "-webdav=false",
                "-admin.ui=false",
                "-master.telemetry=false",
                "-bucket=corpus,out",
                *self._options,
            ],
            env={**os.environ, "AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY},
            stdout=(self.folder.parent / "weed.log").open("ab"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._wait_ready()

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + 60
        while True:
            fs = self.filesystem()
            try:
                fs.pipe_file("out/ready", b"1", mode="overwrite")
                fs.rm_file("out/ready")
            except Exception:  # whatever a starting server answers
                if time.monotonic() > deadline or self._process.poll() is not None:
                    raise
                time.sleep(0.2)
            else:
                return

    def kill(self) -> None:
        """Kill the server as a power cut would."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def filesystem(self) -> s3fs.S3FileSystem:
        """Return a client of its own, without caches."""
        return s3fs.S3FileSystem(
            key=ACCESS_KEY,
            secret=SECRET_KEY,
            endpoint_url=self.endpoint,
            use_listings_cache=False,
            skip_instance_cache=True,
        )
