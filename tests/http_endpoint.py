"""An HTTP endpoint in place of services: keeps the requests, and answers as the test says."""

import ssl
import subprocess
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


def make_certificate(path: Path) -> Path:
    """Write a self-signed certificate of 127.0.0.1, and its key."""
    subprocess.run(
        [
            "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
            "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", path, "-out", path,
        ],
        check=True, capture_output=True,
    )  # fmt: skip
    return path


class Endpoint:
    """`asked` has (method, path, headers, body) of each request; `answer` is the status and body of the next ones."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.asked: list[tuple[str, str, dict[str, str], bytes]] = []
        self.answer = (200, b"")
        self.silent = threading.Event()
        """If it is set, a request is read and never answered, until `released`."""
        self.entered = threading.Event()
        self.released = threading.Event()


@contextmanager
def endpoint(*, certificate: Path | None = None):
    """Give an Endpoint on a free port of 127.0.0.1; with a certificate, it speaks TLS."""

    class Answering(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            place.asked.append((self.command, self.path, dict(self.headers.items()), body))
            place.entered.set()
            if place.silent.is_set():
                place.released.wait()
                self.close_connection = True
                return
            status, content = place.answer
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_PUT = do_POST  # noqa: N815 - names that http.server looks for

        def log_message(self, *_args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answering)
    scheme = "http"
    if certificate is not None:
        scheme = "https"
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    place = Endpoint(f"{scheme}://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield place
    finally:
        place.released.set()
        server.shutdown()
        thread.join()
        server.server_close()
