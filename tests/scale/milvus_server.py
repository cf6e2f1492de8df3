"""A real Milvus server from pip alone: PyPI's `milvus` in an environment of its own, on free ports of this machine.

Standalone with its own etcd and queue; nobody needs to log in, so it is for tests only. Its parts are told to use the
loopback interface; those that listen to everybody anyway are named by `open_ports`.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

PYTHON = Path(
    os.environ.get("ALIGNMENT_MILVUS_PYTHON") or Path(__file__).resolve().parents[2] / ".venv-milvus/bin/python"
)

_PREPARE = """
import sys
from pathlib import Path
import milvus
data, login, ports = sys.argv[1], sys.argv[2] == "login", iter(sys.argv[3:])
config = milvus.MilvusServerConfig(data_dir=data)
config.update(**{key: next(ports) for key in config.configurable_items if key.endswith("_port")})
for part in ("rootCoord", "proxy", "queryCoord", "queryNode", "indexNode", "indexCoord", "dataCoord", "dataNode"):
    config.set(f"{part}.ip", "127.0.0.1")
config.set("authorization_enabled", login)
config.resolve()
milvus._initialize_data_files(config.base_data_dir)
# Its etcd takes the usual ports unless it is told otherwise, and then there is only one server to a machine.
clients, peers = (f"http://127.0.0.1:{next(ports)}" for _ in range(2))
etcd, written = Path(data, "configs", "etcd.yaml"), Path(data, "configs", "milvus.yaml")
etcd.write_text(
    f"name: default\\nlisten-client-urls: {clients}\\nadvertise-client-urls: {clients}\\nlisten-peer-urls: {peers}\\n"
    f"initial-advertise-peer-urls: {peers}\\ninitial-cluster: default={peers}\\n"
)
written.write_text(written.read_text().replace("\\netcd:\\n", f"\\netcd:\\n  config:\\n    path: {etcd}\\n", 1))
print(config.get("proxy_port"))
"""


class MilvusServer:
    """A server with its data in a folder; started, killed and started again.

    Attributes:
        data: the folder.
        uri: where it answers.
        process: the running one.
    """

    process: subprocess.Popen[bytes] | None

    def __init__(self, data: Path, token: str = "") -> None:
        """Lay out configuration and binaries.

        Args:
            data: the folder.
            token: "root:Milvus" for a server that asks who one is; nobody has to say so by default.

        Raises:
            FileNotFoundError: when there is no environment with the server in it.
        """
        if not PYTHON.is_file():
            raise FileNotFoundError(f"There is no {PYTHON}; `make test-scale` makes it.")
        self.data, self.process, self.token = data, None, token
        command = [str(PYTHON), "-c", _PREPARE, str(data), "login" if token else "", *map(str, _free_ports(15))]
        prepared = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if prepared.returncode:
            raise RuntimeError(f"The Milvus server could not be laid out: {prepared.stderr[-2000:]}")
        self.uri = f"http://127.0.0.1:{prepared.stdout.split()[-1]}"
        self._metrics = _free_ports(1)[0]

    def start(self, patience: float = 240) -> float:
        """Start it and wait until it answers; returns the seconds that took."""
        start = time.monotonic()
        binaries = self.data / "bin"
        env = {
            **os.environ,
            "DEPLOY_MODE": "STANDALONE",
            "METRICS_PORT": str(self._metrics),
            "MILVUS_RUN_DIR": str(self.data / "run"),
            "LD_LIBRARY_PATH": str(binaries),
        }
        with (self.data / "logs" / "output.log").open("ab") as log:
            command = [str(binaries / "milvus"), "run", "standalone"]
            self.process = subprocess.Popen(
                command,
                cwd=self.data,
                env=env,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_die_with_the_tests,
            )
        while not self._answers():
            if self.process.poll() is not None:
                raise RuntimeError(f"The Milvus server ended with {self.process.returncode}; see {self.data / 'logs'}")
            if time.monotonic() - start > patience:
                self.kill()
                raise TimeoutError(f"The Milvus server did not answer within {patience:g} seconds.")
            time.sleep(0.2)
        return time.monotonic() - start

    def _answers(self) -> bool:
        import grpc
        from pymilvus import MilvusClient, MilvusException

        try:
            client = MilvusClient(uri=self.uri, token=self.token, timeout=2, dedicated=True)
        except (MilvusException, grpc.RpcError):
            return False
        try:
            client.list_collections(timeout=2)
        except (MilvusException, grpc.RpcError):
            return False
        finally:
            client.close()
        return True

    def kill(self) -> None:
        """End it and all that it started, at once and without a word."""
        self._signal(signal.SIGKILL)

    def stop(self) -> None:
        """Ask it to end; after a while it is made to."""
        self._signal(signal.SIGTERM, 5)
        self.kill()

    def _signal(self, number: int, patience: float = 10) -> None:
        if self.process is None or self.process.poll() is not None:
            return
        try:
            os.killpg(self.process.pid, number)
            self.process.wait(patience)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            pass

    def resident(self) -> int:
        """Bytes of memory that it occupies."""
        assert self.process is not None
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        raise ValueError("There is no VmRSS.")

    def on_disk(self) -> dict[str, int]:
        """Bytes of files by their folder below `data/data`."""
        sizes: dict[str, int] = {}
        for path in (self.data / "data").rglob("*"):
            if path.is_file():
                top = path.relative_to(self.data / "data").parts[0]
                sizes[top] = sizes.get(top, 0) + path.stat().st_size
        return sizes

    def open_ports(self) -> list[int]:
        """Ports on which it listens to other machines."""
        assert self.process is not None
        inodes = set()
        for handle in Path(f"/proc/{self.process.pid}/fd").iterdir():
            try:
                inodes.add(os.readlink(handle))
            except FileNotFoundError:
                continue
        ports = set()
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/{self.process.pid}/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                address, _, port = fields[1].rpartition(":")
                local = address in ("0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000")
                if fields[3] == "0A" and not local and f"socket:[{fields[9]}]" in inodes:
                    ports.add(int(port, 16))
        return sorted(ports)


def _die_with_the_tests() -> None:
    """Have Linux kill the server when these tests are killed themselves and cannot."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
