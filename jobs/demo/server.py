"""Serves a synthetic web's folder on loopback, as well and as badly as its plan says.

In this process:  with WebServer(folder) as server: fetch(server.base_url + path)
In its own:       python -m jobs.demo.server --root FOLDER --port 8437

One asyncio loop in one thread answers everything, so a page that hangs costs no thread, and
stopping needs no waiting for it. Only 127.0.0.1 is bound. The Host that a client names does not
matter: a web that is listed under another base URL is the same web.
"""

import argparse
import asyncio
import os
import signal
import socket
import struct
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from http import HTTPStatus
from pathlib import Path
from types import FrameType, TracebackType
from typing import BinaryIO
from urllib.parse import urlsplit

from jobs.demo.answers import (
    ROBOTS_TXT,
    Answer,
    Ending,
    Request,
    ServerConfig,
    answer,
    error,
    find_page,
    plain_text,
)
from jobs.demo.site import files_of, read_site

HOST = "127.0.0.1"
_IDLE_SECONDS = 60.0  # a kept-alive connection without a request is closed
_MAX_HEAD_BYTES = 64 * 1024
_BACKLOG = 512
_NUM_PORTS_TRIED = 50


class WebServer:
    """A running web, as a context manager; a stopped server can be started again."""

    def __init__(self, root: Path, *, port: int = 0, config: ServerConfig | None = None) -> None:
        """`root` is a folder that `build_web` made; port 0 lets the system choose."""
        self._root = root
        self._pages = read_site(root)
        self._wanted_port = port
        self._config = config or ServerConfig()
        self._counts: Counter[str] = Counter()
        self._conversations: set[asyncio.Task[None]] = set()
        self._thread: threading.Thread | None = None
        self._port: int | None = None
        self._loop: asyncio.AbstractEventLoop
        self._stopping: asyncio.Event
        self._files: BinaryIO

    @property
    def port(self) -> int:
        """The port in use. Raises RuntimeError while the server is stopped."""
        if self._port is None:
            raise RuntimeError("the demo's web server is not running; call start() first")
        return self._port

    @property
    def base_url(self) -> str:
        """What to put before a path: scheme, host and port, without a closing slash."""
        return f"http://{HOST}:{self.port}"

    def num_requests(self, path: str | None = None) -> int:
        """Return how often `path`, or anything at all, was asked for since the server was made."""
        return self._counts.total() if path is None else self._counts[path]

    def start(self) -> "WebServer":
        """Listen and answer in a thread. Raises OSError when the port is taken."""
        listener = socket.create_server((HOST, self._wanted_port), backlog=_BACKLOG)
        started: Future[asyncio.AbstractEventLoop] = Future()
        self._port = listener.getsockname()[1]
        self._files = files_of(self._root).open("rb")
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._serve(listener, started)), name="demo-web", daemon=True
        )
        self._thread.start()
        self._loop = started.result()
        return self

    def stop(self) -> None:
        """Drop all connections and return once the port is free; does nothing when stopped."""
        if self._thread is None:
            return
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()
        self._files.close()
        self._thread = self._port = None

    def __enter__(self) -> "WebServer":
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        raised: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    async def _serve(
        self, listener: socket.socket, started: Future[asyncio.AbstractEventLoop]
    ) -> None:
        self._stopping = asyncio.Event()
        server = await asyncio.start_server(self._converse, sock=listener, limit=_MAX_HEAD_BYTES)
        started.set_result(asyncio.get_running_loop())
        await self._stopping.wait()
        server.close()
        for conversation in self._conversations:
            conversation.cancel()
        await asyncio.gather(*self._conversations, return_exceptions=True)

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        conversation = asyncio.current_task()
        assert conversation is not None
        self._conversations.add(conversation)
        try:
            while await self._answer_one(reader, writer):
                pass
        except (OSError, EOFError, TimeoutError, asyncio.LimitOverrunError):
            pass  # the client has gone, fell asleep, or does not speak HTTP: nothing to tell it
        except asyncio.CancelledError:
            # Only stop() cancels, and asyncio's stream callback would log it as an error.
            assert self._stopping.is_set()
        finally:
            self._conversations.discard(conversation)
            writer.close()

    async def _answer_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; False when the connection is to be closed."""
        async with asyncio.timeout(_IDLE_SECONDS):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.split("\r\n")
        method, target, version = (*first.split(" "), "", "", "")[:3]
        fields = {name.strip().lower(): value.strip() for name, _, value in _split(lines)}
        reply = self._reply(method, _path(target), fields.get("host", HOST))
        if reply.ending is Ending.SILENCE:
            await asyncio.sleep(self._config.silence_seconds)
        if reply.ending in (Ending.SILENCE, Ending.RESET):
            _reset(writer)
            return False
        writer.write(reply.head if method == "HEAD" else reply.head + reply.body)
        await writer.drain()
        wants_more = version == "HTTP/1.1" and fields.get("connection", "").lower() != "close"
        return wants_more and reply.ending is Ending.KEEP

    def _reply(self, method: str, path: str, host: str) -> Answer:
        if method not in ("GET", "HEAD"):
            return error(HTTPStatus.METHOD_NOT_ALLOWED)
        self._counts[path] += 1
        if path == "/robots.txt":
            return plain_text(ROBOTS_TXT)
        found = find_page(path, self._pages)
        if found is None:
            return error(HTTPStatus.NOT_FOUND)
        own_path, page = found
        data = os.pread(self._files.fileno(), page.num_bytes, page.offset)
        return answer(Request(path, host, self._counts[path]), own_path, page, data, self._config)


def free_port(preferred: int) -> int:
    """Return the first port from `preferred` on that can be listened on now; 0 for any.

    Raises OSError when none of the next ports is free.
    """
    for port in range(preferred, preferred + _NUM_PORTS_TRIED) if preferred else (0,):
        try:
            with socket.create_server((HOST, port)) as listener:
                return int(listener.getsockname()[1])
        except OSError:
            continue
    raise OSError(
        f"ports {preferred} to {preferred + _NUM_PORTS_TRIED - 1} of {HOST} are all taken; "
        "choose another start with the demo's `port`"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGINT or SIGTERM; the first line of output is the base URL."""
    options = _parser().parse_args(argv)
    config = ServerConfig(
        recovery=options.recovery,
        retry_after_seconds=options.retry_after_seconds,
        silence_seconds=options.silence_seconds,
    )
    ended = threading.Event()

    def end(_signal: int, _frame: FrameType | None) -> None:
        ended.set()

    signal.signal(signal.SIGINT, end)
    signal.signal(signal.SIGTERM, end)
    with WebServer(options.root, port=options.port, config=config) as server:
        sys.stdout.write(f"{server.base_url}\n")
        sys.stdout.flush()
        ended.wait()
    return 0


def _split(lines: Sequence[str]) -> list[tuple[str, str, str]]:
    return [line.partition(":") for line in lines if line]


def _path(target: str) -> str:
    """Return the path of `/path` or `http://host/path`; of anything else, one that no page has."""
    try:
        return urlsplit(target).path
    except ValueError:
        return ""


def _reset(writer: asyncio.StreamWriter) -> None:
    """Make the close that follows send RST: what the other side sees of a crashed peer."""
    linger = struct.pack("ii", 1, 0)  # on, for no time
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()


def _parser() -> argparse.ArgumentParser:
    defaults = ServerConfig()
    parser = argparse.ArgumentParser(
        prog="python -m jobs.demo.server", description="Serve a synthetic web on loopback."
    )
    parser.add_argument("--root", type=Path, required=True, help="folder that build_web made")
    parser.add_argument("--port", type=int, default=0, help="0 (the default): any free one")
    parser.add_argument("--recovery", choices=("once", "alternate"), default=defaults.recovery)
    parser.add_argument("--retry-after-seconds", type=int, default=defaults.retry_after_seconds)
    parser.add_argument("--silence-seconds", type=float, default=defaults.silence_seconds)
    return parser


if __name__ == "__main__":
    sys.exit(main())
