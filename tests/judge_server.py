"""A scripted judge: an OpenAI-compatible endpoint on localhost that says what a test tells it to."""

import json
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple


class Reply(NamedTuple):
    """What goes back: a text is wrapped into a chat completion, bytes go as they are."""

    content: str | bytes
    status: int = 200
    after: float = 0.0
    headers: tuple[tuple[str, str], ...] = ()
    usage: dict[str, int] | None = None


def completion(text, usage=None):
    message = {"role": "assistant", "content": text}
    usage = usage or {"prompt_tokens": 700, "completion_tokens": 20}
    return {"id": "x", "object": "chat.completion", "choices": [{"index": 0, "message": message}], "usage": usage}


class Judge:
    """Keeps what it was asked: bodies, headers and times."""

    def __init__(self, answer: Callable[[dict], Reply | str]) -> None:
        self.answer = answer
        self.asked: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.at_once = self._now = 0
        self.lock = threading.Lock()
        self.url = ""

    def reply(self, body: dict, headers: dict[str, str]) -> Reply:
        with self.lock:
            self.asked.append(body)
            self.headers.append(headers)
            self.times.append(time.monotonic())
            self._now += 1
            self.at_once = max(self.at_once, self._now)
        try:
            found = self.answer(body)
            found = Reply(found) if isinstance(found, str) else found
            time.sleep(found.after)
            return found
        finally:
            with self.lock:
                self._now -= 1


def question(body: dict) -> str:
    return body["messages"][-1]["content"]


@contextmanager
def serve(answer):
    """A running `Judge`."""
    judge = Judge(answer)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path != "/v1/chat/completions":
                self.send_error(404)
                return
            reply = judge.reply(body, dict(self.headers))
            data = reply.content
            if isinstance(data, str):
                data = json.dumps(completion(data, reply.usage)).encode()
            self.send_response(reply.status)
            for name, value in (("Content-Type", "application/json"), *reply.headers):
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    judge.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield judge
    finally:
        server.shutdown()
        server.server_close()
