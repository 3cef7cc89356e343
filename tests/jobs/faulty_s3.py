"""An S3 server behind a proxy that can be told to fail, as the real one does now and then."""

import http.client
import itertools
import random
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import boto3
from moto.server import ThreadedMotoServer

BUCKET = "chaos"
HOP_BY_HOP = {"connection", "transfer-encoding", "content-length", "content-encoding"}
ANSWERS = {
    500: b"<Error><Code>InternalError</Code><Message>We had an error</Message></Error>",
    503: b"<Error><Code>SlowDown</Code><Message>Reduce your rate</Message></Error>",
}


class FaultyS3:
    """Forwards to moto, but for the requests whose numbers an outage covers."""

    def __init__(self):
        self._moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._moto.start()
        self._host, self._port = self._moto.get_host_and_port()
        self._numbers = itertools.count()
        self._outages = []
        self._rng = random.Random(0)
        self.num_refused = 0
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self):
                proxy.answer(self)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer  # noqa: N815

            def log_message(self, *args):
                """Say nothing."""

        self._proxy = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._proxy.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._proxy.server_address[1]}"
        boto3.client(
            "s3", **self.client("aws_access_key_id", "aws_secret_access_key")
        ).create_bucket(Bucket=BUCKET)

    def client(self, key="key", secret="secret"):
        return {key: "test", secret: "test", "endpoint_url": self.url, "region_name": "us-east-1"}

    @property
    def environment(self):
        """What a process needs to find it; clients give up soon, so that failures come through."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "1",
        }

    def fail(self, after, requests, seed):
        """Refuse so many requests, once so many more have been served."""
        now = next(self._numbers)
        self._rng = random.Random(seed)
        self._outages = [range(now + after, now + after + requests)]
        self.num_refused = 0

    def heal(self):
        self._outages = []

    def answer(self, handler):
        number = next(self._numbers)
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        if any(number in outage for outage in self._outages):
            self.num_refused += 1
            self._refuse(handler)
            return
        upstream = http.client.HTTPConnection(self._host, self._port)
        upstream.request(handler.command, handler.path, body, dict(handler.headers))
        reply = upstream.getresponse()
        data = reply.read()
        handler.send_response(reply.status)
        for name, value in reply.getheaders():
            if name.lower() not in HOP_BY_HOP:
                handler.send_header(name, value)
        length = reply.getheader("Content-Length") if handler.command == "HEAD" else len(data)
        handler.send_header("Content-Length", str(length or 0))
        handler.end_headers()
        handler.wfile.write(data)
        upstream.close()

    def _refuse(self, handler):
        how = self._rng.choice([500, 503, "hang up"])
        if how == "hang up":
            handler.close_connection = True
            handler.connection.shutdown(socket.SHUT_RDWR)
            return
        handler.send_response(how)
        handler.send_header("Content-Length", str(len(ANSWERS[how])))
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(ANSWERS[how])

    def close(self):
        self._proxy.shutdown()
        self._proxy.server_close()
        self._moto.stop()
