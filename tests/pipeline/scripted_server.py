"""A loopback server that answers with exactly the bytes a test scripts, however wrong they are."""

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Request:
    """A request as it came in."""

    path: str
    headers: dict[str, str]


Reply = bytes | Iterator[bytes]
"""Bytes leave the connection open; an iterator is sent piece by piece, then it is closed."""


def http(status: str = "200 OK", body: bytes = b"image", **headers: str) -> bytes:
    """A well-formed response; header names are written with underscores."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


@dataclass
class ScriptedServer:
    """Serves until closed; `script` is called on a thread per connection, for each request."""

    script: Callable[[Request], Reply]
    address: str = "127.0.0.1"
    tls: ssl.SSLContext | None = None
    requests: list[Request] = field(default_factory=list)
    num_connections: int = 0
    stopping: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> "ScriptedServer":
        family = socket.AF_INET6 if ":" in self.address else socket.AF_INET
        self._listener = socket.create_server((self.address, 0), family=family, backlog=128)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def url(self, path: str = "/") -> str:
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}{path}"

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return  # closed
            self.num_connections += 1
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection:
                if self.tls is not None:
                    connection = self.tls.wrap_socket(connection, server_side=True)
                with connection, connection.makefile("rb") as stream:
                    while self._answer(connection, stream) and not self.stopping.is_set():
                        pass
        except OSError:
            pass  # the client left, which most of these tests are about

    def _answer(self, connection: socket.socket, stream) -> bool:
        first = stream.readline()
        if not first:
            return False
        headers = {}
        while (line := stream.readline()) not in (b"\r\n", b""):
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        if not first.startswith(b"GET "):
            return False
        request = Request(first.decode("latin-1").split(" ")[1], headers)
        self.requests.append(request)
        reply = self.script(request)
        if isinstance(reply, bytes):
            connection.sendall(reply)
            return True
        for piece in reply:
            connection.sendall(piece)
        return False
