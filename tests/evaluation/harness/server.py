"""A small OpenAI-compatible server over one of our runtimes, with switches for what real servers lack."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from compress.runtime.protocol import SamplingParams
from compress.runtime.transformers_backend import TransformersRuntime


@dataclass
class Server:
    """`lacks`: what it does not give. `failures`: statuses that the next answers have. `begin`: whether its tokenizer
    puts a begin token before each prompt, as vLLM does for tokenizers that want one."""

    runtime: TransformersRuntime
    models: list[str] = field(default_factory=lambda: ["tales"])
    lacks: set[str] = field(default_factory=set)
    failures: list[int] = field(default_factory=list)
    begin: bool = True
    key: str | None = None
    asked: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def completion(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt = body["prompt"]
        prefix = [0] if self.begin else []
        ids = [*prefix, *self.runtime.encode(prompt)]
        params = SamplingParams(max_tokens=body["max_tokens"], stop=tuple(body.get("stop", ())))
        answer = self.runtime.generate([ids], params)[0]
        text = self.runtime.decode(answer.token_ids)
        for stop in params.stop:
            text = text.split(stop)[0]
        if not body.get("echo") or "echo" in self.lacks:
            return {"text": text}
        choice: dict[str, Any] = {"text": prompt + text}
        if "logprobs" not in self.lacks:
            choice["logprobs"] = self.logprobs([*ids, *answer.token_ids], len(prefix))
        return choice

    def logprobs(self, ids: list[int], begin: int) -> dict[str, Any]:
        table = self.runtime.score(torch.tensor([ids]))[0].log_softmax(-1)
        texts = ["" if number < begin else self.runtime.decode([token]) for number, token in enumerate(ids)]
        values = [None, *(float(table[i - 1, ids[i]]) for i in range(1, len(ids)))]
        best = [None, *({self.runtime.decode([int(table[i - 1].argmax())]): float(table[i - 1].max())}
                        for i in range(1, len(ids)))]  # fmt: skip
        offsets = [sum(map(len, texts[:number])) for number in range(len(ids))]
        found: dict[str, Any] = {
            "tokens": texts,
            "token_logprobs": values,
            "top_logprobs": best,
            "text_offset": offsets,
        }
        for name in self.lacks & set(found):
            del found[name]
        return found


def handler(server: Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

        def reply(self, status: int, value: Any) -> None:
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            if self.path == "/v1/models":
                self.reply(200, {"data": [{"id": name} for name in server.models]})
            else:
                self.reply(404, {"error": {"message": "no such path"}})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                server.asked.append(body)
                status = server.failures.pop(0) if server.failures else 200
                if server.key is not None and self.headers.get("Authorization") != f"Bearer {server.key}":
                    status = 401
                if status != 200:
                    self.reply(status, {"error": {"message": f"failure {status}"}})
                elif "json" in server.lacks:
                    self.reply(200, b"<html>")
                elif body.get("echo") and "permission" in server.lacks:
                    self.reply(400, {"error": {"message": "echo is not supported"}})
                else:
                    self.reply(200, {"choices": [server.completion(body)]})

    return Handler


@contextmanager
def serving(runtime: TransformersRuntime, **switches: Any) -> Iterator[Server]:
    """A server on a free port of this machine, for as long as the block runs."""
    server = Server(runtime, **switches)
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler(server))
    server.url = f"http://127.0.0.1:{http.server_port}/v1"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        thread.join()
        http.server_close()
