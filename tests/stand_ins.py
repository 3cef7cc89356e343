"""What stands in for the world: a web of pictures on loopback, each published list in small."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

FILES = {
    "coco": "coco.json",
    "visual_genome": "regions.json",
    "cc3m": "cc3m.tsv",
    "cc12m": "cc12m.tsv",
    "sbu": "sbu.json",
    "laion": "laion.parquet",
}


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


def write_lists(folder: Path, urls: list[str]) -> None:
    """Write all of `FILES`, and image_data.json, with one row of each URL."""
    images = [{"id": n, "coco_url": url} for n, url in enumerate(urls)]
    captions = [{"image_id": n, "caption": f"picture {n}"} for n in range(len(urls))]
    (folder / FILES["coco"]).write_text(json.dumps({"images": images, "annotations": captions}))
    regions = [{"id": n, "regions": [{"phrase": f"picture {n}"}]} for n in range(len(urls))]
    (folder / FILES["visual_genome"]).write_text(json.dumps(regions))
    data = [{"image_id": n, "url": url} for n, url in enumerate(urls)]
    (folder / "image_data.json").write_text(json.dumps(data))
    (folder / FILES["cc3m"]).write_text("".join(f"picture\t{url}\n" for url in urls))
    (folder / FILES["cc12m"]).write_text("".join(f"{url}\tpicture\n" for url in urls))
    sbu = {"image_urls": urls, "captions": ["picture"] * len(urls)}
    (folder / FILES["sbu"]).write_text(json.dumps(sbu))
    write_laion(folder / FILES["laion"], urls, [480] * len(urls))


def write_laion(path: Path, urls: list[str], heights: list[int]) -> None:
    """Write a list as LAION-400M has it."""
    columns = {
        "SAMPLE_ID": list(range(len(urls))),
        "URL": urls,
        "TEXT": ["picture"] * len(urls),
        "HEIGHT": heights,
        "WIDTH": [640] * len(urls),
        "LICENSE": ["?"] * len(urls),
        "NSFW": ["UNLIKELY"] * len(urls),
        "similarity": [0.33] * len(urls),
    }
    pq.write_table(pa.table(columns), path)
