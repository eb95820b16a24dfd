"""Shows a folder to the browsers of this machine, and to nobody else."""

from functools import partial
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from fastcache.errors import InputError

ADDRESS = "127.0.0.1"


class _Handler(SimpleHTTPRequestHandler):
    """Gives files below its folder, without listings or a log."""

    def send_head(self) -> Any:
        """Refuse a page elsewhere that has its own name resolve to this machine (DNS rebinding)."""
        host = self.headers.get("Host", "").partition(":")[0]
        if host not in ("localhost", ADDRESS):
            self.send_error(HTTPStatus.FORBIDDEN)
            return None
        return super().send_head()

    def list_directory(self, path: Any) -> None:
        """Folders without a page aren't shown."""
        self.send_error(HTTPStatus.NOT_FOUND)

    def end_headers(self) -> None:
        """The types are those that are told; no page elsewhere may frame this one or read its data."""
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("X-Frame-Options", "DENY")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


def make_server(folder: Path, port: int) -> ThreadingHTTPServer:
    """A server of `folder` on localhost; raises `InputError` where the port is taken."""
    try:
        return ThreadingHTTPServer((ADDRESS, port), partial(_Handler, directory=str(folder)))
    except OSError as error:
        raise InputError(
            f"Port {port} of localhost can't be used ({error.strerror}). Take another by --port."
        ) from error
