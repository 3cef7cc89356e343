"""A loopback web of pictures, in as few lines as a test of lists needs."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import cv2
import numpy as np


@dataclass(frozen=True)
class Web:
    """A server on loopback."""

    port: int

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"


@contextmanager
def pictures(side: int = 300) -> Iterator[Web]:
    """Serve a noisy JPEG at every path that ends in .jpg, its name the seed; 404 elsewhere."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:  # noqa: N802 (the name that http.server calls)
            found = self.path.endswith(".jpg")
            body = picture(self.path, side) if found else b"gone"
            self.send_response(200 if found else 404)
            self.send_header("Content-Type", "image/jpeg" if found else "text/plain")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield Web(server.server_port)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def picture(path: str, side: int) -> bytes:
    """Return the JPEG of a path, the same each time."""
    seed = sum(path.encode())
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    pixels = cv2.resize(small, (side, side), interpolation=cv2.INTER_CUBIC)
    return bytes(cv2.imencode(".jpg", pixels)[1])
