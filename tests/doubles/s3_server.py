"""S3Proxy: an S3 server whose objects are files of a folder, so that they outlive it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import filelock
import psutil
import pytest

VERSION = "4.1.0"
ACCESS_KEY, SECRET_KEY = "local-access", "local-secret-key"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": ACCESS_KEY,
    "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
    "AWS_REGION": "us-east-1",
}
BUCKET = "bucket"
# Maven would choose annotations that are too old for the server's other libraries.
_POM = f"""<project xmlns="http://maven.apache.org/POM/4.0.0">
<modelVersion>4.0.0</modelVersion><groupId>s3</groupId><artifactId>server</artifactId>
<version>1</version><dependencies><dependency><groupId>org.gaul</groupId>
<artifactId>s3proxy</artifactId><version>{VERSION}</version></dependency>
<dependency><groupId>com.fasterxml.jackson.core</groupId>
<artifactId>jackson-annotations</artifactId><version>2.21</version></dependency>
</dependencies></project>
"""
_COPY = "org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy-dependencies"
_DOWNLOAD_S = 300
_START_S = 60


def library_folder() -> Path:
    """The folder of the server's libraries, downloaded at need. Skips the test without them."""
    java, maven = shutil.which("java"), shutil.which("mvn")
    if java is None:
        pytest.skip("S3Proxy needs java, which is not installed")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fletcher-tests"
    folder = cache / f"s3proxy-{VERSION}"
    cache.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(cache / "s3proxy.lock"):
        if folder.exists():
            return folder
        if maven is None:
            pytest.skip(f"S3Proxy is not in {folder}, and mvn is not installed")
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            Path(temporary, "pom.xml").write_text(_POM)
            command = [maven, "-q", "-B", _COPY, "-DincludeScope=runtime", "-DoutputDirectory=lib"]
            try:
                subprocess.run(
                    command, cwd=temporary, check=True, capture_output=True, timeout=_DOWNLOAD_S
                )
            except subprocess.SubprocessError as error:
                pytest.skip(f"S3Proxy cannot be downloaded from Maven Central: {error}")
            Path(temporary, "lib").rename(folder)
    return folder


class S3Server:
    """A server on a port of its choice.

    Attributes:
        folder: Folder of the bucket's objects.
        port: Its port.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / BUCKET
        self.folder.mkdir(parents=True, exist_ok=True)
        settings = folder / "s3proxy.conf"
        settings.write_text(
            "s3proxy.endpoint=http://127.0.0.1:0\n"
            "s3proxy.authorization=aws-v2-or-v4\n"
            f"s3proxy.identity={ACCESS_KEY}\n"
            f"s3proxy.credential={SECRET_KEY}\n"
            "jclouds.provider=filesystem-nio2\n"
            f"jclouds.filesystem.basedir={folder}\n"
        )
        classes = f"{library_folder()}/*"
        command = ["java", "-cp", classes, "org.gaul.s3proxy.Main", "--properties", str(settings)]
        self._log = (folder / "s3proxy.log").open("wb")
        self.process = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT)
        self.port = self._find_port()

    @property
    def environment(self) -> dict[str, str]:
        """Variables of a client's environment."""
        return CREDENTIALS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}"}

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self._log.close()

    def _find_port(self) -> int:
        ends_at = time.monotonic() + _START_S
        while time.monotonic() < ends_at and self.process.poll() is None:
            for one in psutil.Process(self.process.pid).net_connections("tcp"):
                if one.status == psutil.CONN_LISTEN:
                    return int(one.laddr.port)
            time.sleep(0.05)
        self.kill()
        raise AssertionError(f"S3Proxy did not start; see {self._log.name}")


@contextlib.contextmanager
def serve_s3(folder: Path) -> Iterator[S3Server]:
    server = S3Server(folder)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.kill()
