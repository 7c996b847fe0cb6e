"""The app that the benchmarks serve: plain Flask, the same under every server."""

from __future__ import annotations

import hashlib
import importlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flask import Flask, Response, request

PATTERN = bytes(range(256)) * 4096
"""1 MiB of known content, of which /big sends copies."""
THREADS = 4
"""Worker threads under every server, unless a benchmark chooses another number."""

VERSION = ""
"""The version of the served code; a module that stands for new code sets it."""

if _imported := os.environ.get("BENCHMARKS_IMPORTED"):
    with Path(_imported).open("a", encoding="ascii") as _file:
        _file.write(f"{os.getpid()}\n")

app = Flask(__name__)
_leaked: list[bytes] = []


@app.get("/")
def index() -> str:
    """Answer with the token that the client sent, so that it recognizes its answer."""
    return f"hello {request.args.get('token', '')}\n"


@app.get("/version")
def version() -> str:
    """Answer with the version of the code."""
    return VERSION


@app.get("/pid")
def pid() -> str:
    """Answer with the pid of the process, after some seconds."""
    time.sleep(min(60.0, float(request.args.get("seconds", "0"))))
    return str(os.getpid())


@app.get("/leak")
def leak() -> str:
    """Keep 1 MB for ever."""
    _leaked.append(b"x" * 1_000_000)
    return f"leaked {request.args.get('token', '')}\n"


@app.get("/compute")
def compute() -> str:
    """Use the CPU of this thread for some milliseconds."""
    until = time.thread_time() + min(1000.0, float(request.args.get("ms", "5"))) / 1000
    while time.thread_time() < until:
        hashlib.sha256(PATTERN[:1024]).digest()
    return "computed\n"


@app.get("/slow")
def slow() -> str:
    """Sleep for some seconds."""
    time.sleep(min(60.0, float(request.args.get("seconds", "1"))))
    return f"slow {request.args.get('token', '')}\n"


@app.get("/big")
def big() -> bytes:
    """Send some KiB or MiB; default: 3 MiB."""
    if kib := int(request.args.get("kib", "0")):
        return PATTERN[: kib * 1024]
    return PATTERN * min(64, int(request.args.get("mib", "3")))


@app.get("/stream")
def stream() -> Response:
    """Send some chunks, with pauses."""
    chunks, token = min(1000, int(request.args.get("chunks", "10"))), request.args.get("token", "")

    def produce() -> Iterator[str]:
        for number in range(chunks):
            time.sleep(0.002)
            yield f"chunk {number} {token}\n"

    return Response(produce(), mimetype="text/plain")


@app.post("/upload")
def upload() -> str:
    """Answer with the SHA-256 of the body."""
    return hashlib.sha256(request.get_data()).hexdigest() + "\n"


@app.post("/echo")
def echo() -> bytes:
    """Answer with the body."""
    return request.get_data()


def bare(_: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
    """Answer without Flask, so that a request costs only what the server needs."""
    start_response("200 OK", [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", "6")])
    return [b"hello\n"]


def noted(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterator[bytes]:
    """Serve the app, and write the begin and the end of each request to a file, which a killed process leaves."""
    request_line = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}?{environ.get('QUERY_STRING', '')}"
    _note("+", request_line)
    answer = app(environ, start_response)
    try:
        yield from answer
    finally:
        answer.close()  # type: ignore[attr-defined]
        _note("-", request_line)


def _note(sign: str, what: str) -> None:
    file = os.open(os.environ["BENCHMARKS_NOTES"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(file, f"{sign} {os.getpid()} {what}\n".encode())
    finally:
        os.close(file)


def hang(_: object) -> None:
    """Take a minute, which is too long for any stop; a cleanup policy of flaskd's."""
    time.sleep(60)


def asgi() -> Callable[..., Any]:
    """The served app in the form that uvicorn needs."""
    from a2wsgi import WSGIMiddleware  # noqa: PLC0415 - only if uvicorn is measured

    served = getattr(importlib.import_module(os.environ["BENCHMARKS_MODULE"]), os.environ["BENCHMARKS_APP"])
    return WSGIMiddleware(served, workers=int(os.environ["BENCHMARKS_THREADS"]))
