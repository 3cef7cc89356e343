"""Images per CPU-second: our download against img2dataset's, same URLs, same server, same size.

    python tests/benchmarks/bench_download.py                 # both over HTTP and HTTPS
    python tests/benchmarks/bench_download.py --rows 100000   # ours alone: memory over time

800 x 600 photo-like JPEGs become 256 px ones of quality 95. Each side runs as a process of its own;
what it spends to start is measured apart, on a few rows, and subtracted. The server is nginx where
there is one, else Python's. The last lines are JSON, one per scheme, HTTP at the very end.
"""

import argparse
import contextlib
import datetime
import functools
import http.server
import io
import ipaddress
import json
import os
import shutil
import socket
import ssl
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

NUM_IMAGES = 60
START_ROWS = 16
ROWS = {"http": 1600, "https": 320}
ROUNDS = {"http": 3, "https": 3}
NUM_THREADS = 32
SIZE_PX, QUALITY = 256, 95
SPARKS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Site:
    """A running server and the authority that its certificate is from."""

    name: str
    base_urls: dict[str, str]
    bundle: Path  # the system's authorities and ours
    authority: Path  # ours alone


def main() -> None:
    options = _parser().parse_args()
    if options.side:
        sides = {"ours": run_ours, "peer": run_peer}
        sides[options.side](options.list, options.out, options.authority, options.rows)
        return
    with tempfile.TemporaryDirectory(prefix="bench-download.") as name:
        folder = Path(name)
        if options.rows:
            measure_memory(folder, options.rows)
            return
        make_images(folder / "site", 800, 600)
        with serving(folder) as site:
            lines = [measure_speed(folder, site, scheme) for scheme in ("https", "http")]
    for line in lines:
        print(json.dumps(line))


# The two sides, each a process of its own


def run_ours(url_list: Path, out: Path, authority: Path | None, _: int) -> None:
    from pipeline.corpus import Corpus
    from pipeline.download import DownloadConfig, Downloader
    from pipeline.fetch import Fetcher
    from pipeline.sources.config import SourceConfig
    from pipeline.sources.shards import plan_shards, read_shard
    from pipeline.web.config import FetchConfig

    source = SourceConfig(name="bench", format="table", paths=(str(url_list),))
    config = DownloadConfig(image_size_px=SIZE_PX, encode_quality=QUALITY, num_threads=NUM_THREADS)
    web = FetchConfig(
        allowed_networks=("127.0.0.1/32",),
        allowed_ports="any",
        ca_file=str(authority) if authority else None,
        max_connections_per_host=NUM_THREADS,  # so that neither side waits more than the other
    )
    with Fetcher(web) as fetcher:
        downloader = Downloader(Corpus(str(out)), config, fetcher, fingerprint="bench")
        for plan in plan_shards(source, records_per_shard=config.rows_per_shard):
            done = downloader.download("bench", plan.index, read_shard(source, plan))
            assert done.record.counts.kept == plan.num_records, done.record.counts


def run_peer(url_list: Path, out: Path, _: Path | None, __: int) -> None:
    from img2dataset import download

    download(
        url_list=str(url_list),
        input_format="parquet",
        url_col="url",
        caption_col="caption",
        output_folder=str(out),
        output_format="webdataset",
        processes_count=1,
        thread_count=NUM_THREADS,
        image_size=SIZE_PX,
        resize_mode="keep_ratio",
        resize_only_if_bigger=True,
        encode_quality=QUALITY,
        compute_hash="sha256",
        enable_wandb=False,
    )


# Speed


def measure_speed(folder: Path, site: Site, scheme: str) -> dict[str, object]:
    rows, base_url = ROWS[scheme], site.base_urls[scheme]
    lists = {count: write_list(folder, base_url, count) for count in (START_ROWS, rows)}
    sides = {"ours": [], "peer": []}
    starts = {"ours": [], "peer": []}
    outputs = {}
    for number in range(ROUNDS[scheme]):
        for side, found in sides.items():
            if number < 2:
                starts[side].append(run_side(folder, side, lists[START_ROWS], site)[0])
            cpu_seconds, outputs[side] = run_side(folder, side, lists[rows], site)
            found.append(cpu_seconds)
    start_cpu = {side: statistics.mean(found) for side, found in starts.items()}
    for side, found in sides.items():
        found[:] = [(rows - START_ROWS) / (seconds - start_cpu[side]) for seconds in found]
    rates = {side: statistics.median(found) for side, found in sides.items()}
    ratio = rates["ours"] / rates["peer"]
    psnr = compare(outputs["ours"], outputs["peer"])
    print(f"{scheme} from {site.name}, {rows} images a round, in images per CPU-second:")
    for side, found in sides.items():
        shown = ", ".join(f"{rate:.1f}" for rate in found)
        print(f"  {side}: {rates[side]:.1f} (of {shown}); {start_cpu[side]:.1f} s to start")
    print(f"  ratio {ratio:.2f}; PSNR of ours to theirs {psnr[0]:.1f} dB, least {psnr[1]:.1f} dB")
    return {
        "name": f"download_{scheme}",
        "ours": round(rates["ours"], 1),
        "peer": round(rates["peer"], 1),
        "ratio": round(ratio, 2),
        "unit": "images/CPU-second",
        "psnr_db": round(psnr[0], 1),
    }


def run_side(folder: Path, side: str, url_list: Path, site: Site) -> tuple[float, dict[str, bytes]]:
    """Run one side; return its CPU seconds, children included, and its images by key."""
    out = Path(tempfile.mkdtemp(dir=folder, prefix=f"{side}."))
    command = [sys.executable, __file__, "--side", side, "--list", url_list, "--out", out]
    environment = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1", "SSL_CERT_FILE": str(site.bundle)}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*map(str, command), "--authority", str(site.authority)],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{side} failed:\n{(folder / 'log').read_text()[-3000:]}")
    images = {}
    for path in sorted(out.rglob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar.getmembers():
                if member.name.endswith(".jpg"):
                    images[member.name] = tar.extractfile(member).read()
    shutil.rmtree(out)
    return usage.ru_utime + usage.ru_stime, images


def compare(ours: dict[str, bytes], peer: dict[str, bytes]) -> tuple[float, float]:
    """Return mean and least PSNR in dB over the images both stored; they must be the same ones."""
    assert ours.keys() == peer.keys(), (len(ours), len(peer))
    found = []
    for name in sorted(ours)[: 2 * NUM_IMAGES]:
        one, other = (
            cv2.imdecode(np.frombuffer(images[name], np.uint8), cv2.IMREAD_COLOR).astype(np.float64)
            for images in (ours, peer)
        )
        assert one.shape == other.shape, (name, one.shape, other.shape)
        found.append(10 * np.log10(255**2 / max(np.square(one - other).mean(), 1e-9)))
    return float(np.mean(found)), float(np.min(found))


# Memory


def measure_memory(folder: Path, rows: int) -> None:
    """Download many tiny images and show the process's memory over time."""
    make_images(folder / "site", 64, 48)
    with serving(folder) as site:
        url_list = write_list(folder, site.base_urls["http"], rows)
        command = [sys.executable, __file__, "--side", "ours", "--list", url_list]
        started_at, samples = time.monotonic(), []
        process = subprocess.Popen([*map(str, command), "--out", str(folder / "out")])
        while process.poll() is None:
            with contextlib.suppress(OSError, IndexError):
                statm = Path(f"/proc/{process.pid}/statm").read_text().split()
                samples.append(int(statm[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20)
            time.sleep(0.25)
    seconds = time.monotonic() - started_at
    if process.returncode:
        raise SystemExit(f"the download failed with code {process.returncode}")
    print(f"{rows:,} rows in {seconds:.0f} s ({rows / seconds:.0f} a second) from {site.name}")
    # The first tenth holds imports and the first images in every thread.
    settled = samples[len(samples) // 10 :]
    print(f"RSS  {sparkline(samples)}  {settled[0]:.0f} to {settled[-1]:.0f} MiB")
    growth = max(settled) - settled[0]
    print(f"after the first tenth it grew by {growth:.1f} MiB at most; peak {max(samples):.0f} MiB")
    print(json.dumps({"name": "download_memory", "rows": rows, "growth_mib": round(growth, 1)}))


def sparkline(samples: list[float], width: int = 60) -> str:
    """Return the samples as a line of small bars from zero to the largest."""
    groups = np.array_split(np.array(samples), min(width, len(samples)))
    top = max(samples)
    return "".join(SPARKS[int(group.mean() / top * (len(SPARKS) - 1))] for group in groups)


# The web


def make_images(folder: Path, width: int, height: int) -> None:
    folder.mkdir()
    for number in range(NUM_IMAGES):
        pixels = photo(width, height, np.random.default_rng(number))
        options = [cv2.IMWRITE_JPEG_QUALITY, 88]
        if number % 4 == 3:  # about the web's share
            options += [cv2.IMWRITE_JPEG_PROGRESSIVE, 1]
        data = cv2.imencode(".jpg", pixels, options)[1].tobytes()
        (folder / f"{number:03d}.jpg").write_bytes(data)


def photo(width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    """Return noise that falls off with frequency as photographs do, with soft-edged discs in it."""
    pixels = np.full((height, width, 3), 118.0, np.float32)
    for cells, contrast in ((4, 60), (16, 40), (64, 25), (256, 8), (800, 5)):
        noise = rng.standard_normal((max(2, cells * height // width), cells, 3), np.float32)
        noise = 0.7 * noise.mean(axis=2, keepdims=True) + 0.3 * noise  # mostly light, less colour
        pixels += contrast * cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    for _ in range(12):
        centre = int(rng.integers(width)), int(rng.integers(height))
        disc = np.zeros((height, width), np.float32)
        radius = int(rng.integers(width // 40, width // 5))
        cv2.circle(disc, centre, radius, 0.6, -1, cv2.LINE_AA)
        colour = rng.integers(0, 256, 3).astype(np.float32)
        pixels += disc[..., None] * (colour - pixels)
    return np.clip(pixels, 0, 255).astype(np.uint8)


def write_list(folder: Path, base_url: str, rows: int) -> Path:
    path = folder / f"{base_url.partition(':')[0]}-{rows}.parquet"
    urls = [f"{base_url}/{n % NUM_IMAGES:03d}.jpg?n={n}" for n in range(rows)]
    pq.write_table(pa.table({"url": urls, "caption": [f"image {n}" for n in range(rows)]}), path)
    return path


NGINX = """
daemon off; pid {folder}/nginx.pid; worker_processes 1; error_log {folder}/nginx.log;
events {{ worker_connections 1024; }}
http {{
  access_log off; sendfile on; tcp_nopush on; types {{ image/jpeg jpg; }}
  client_body_temp_path {folder}/t1; proxy_temp_path {folder}/t2; fastcgi_temp_path {folder}/t3;
  uwsgi_temp_path {folder}/t4; scgi_temp_path {folder}/t5;
  server {{
    listen 127.0.0.1:{http}; listen 127.0.0.1:{https} ssl; root {folder}/site;
    ssl_certificate {folder}/server.pem; ssl_certificate_key {folder}/server.pem;
  }}
}}
"""


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Site]:
    authority, bundle = make_certificates(folder)
    ports = {"http": free_port(), "https": free_port()}
    urls = {scheme: f"{scheme}://127.0.0.1:{port}" for scheme, port in ports.items()}
    nginx = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if nginx is None:
        with serving_with_python(folder, ports):
            yield Site("Python's server", urls, bundle, authority)
        return
    folder.chmod(0o755)  # its worker runs as another user when we are root
    (folder / "nginx.conf").write_text(NGINX.format(folder=folder, **ports))
    process = subprocess.Popen([nginx, "-c", str(folder / "nginx.conf"), "-p", str(folder)])
    try:
        wait_until_open(ports["https"], process)
        yield Site("nginx", urls, bundle, authority)
    finally:
        process.terminate()
        process.wait()


class _Handler(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def serving_with_python(folder: Path, ports: dict[str, int]) -> Iterator[None]:
    handler = functools.partial(_Handler, directory=str(folder / "site"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem")
    with contextlib.ExitStack() as stack:
        for scheme, port in ports.items():
            server = http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)
            stack.callback(server.server_close)
            stack.callback(server.shutdown)
            if scheme == "https":
                server.socket = context.wrap_socket(server.socket, server_side=True)
            threading.Thread(target=server.serve_forever, daemon=True).start()
        yield


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def wait_until_open(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    raise SystemExit("nginx did not start")


def make_certificates(folder: Path) -> tuple[Path, Path]:
    """Write a server certificate and its authority; return the authority, alone and with others.

    The bundle has the system's authorities in it as well, for loading those is what a TLS context
    costs, and a bundle of one would flatter whoever builds many.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    def certificate(name, key, signer_name, signer, *extensions):
        now = datetime.datetime.now(datetime.UTC)
        builder = x509.CertificateBuilder(
            issuer_name=x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, signer_name)]),
            subject_name=x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]),
            public_key=key.public_key(),
            serial_number=x509.random_serial_number(),
            not_valid_before=now - datetime.timedelta(days=1),
            not_valid_after=now + datetime.timedelta(days=2),
        )
        for extension, is_critical in extensions:
            builder = builder.add_extension(extension, is_critical)
        signed = builder.sign(signer, hashes.SHA256())
        return signed.public_bytes(serialization.Encoding.PEM)

    root_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    loopback = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    usage = x509.KeyUsage(*[False] * 5, True, True, False, False)
    root = certificate(
        "bench root", root_key, "bench root", root_key,
        (x509.BasicConstraints(True, None), True), (usage, True),
        (x509.SubjectKeyIdentifier.from_public_key(root_key.public_key()), False),
    )  # fmt: skip
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(root_key.public_key())
    leaf = certificate(
        "127.0.0.1", key, "bench root", root_key,
        (x509.SubjectAlternativeName([loopback]), False), (issuer, False),
    )  # fmt: skip
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    (folder / "server.pem").write_bytes(leaf + private)
    (folder / "root.pem").write_bytes(root)
    with io.BytesIO() as stream:
        stream.write(Path(system_bundle()).read_bytes() + b"\n" + root)
        (folder / "bundle.pem").write_bytes(stream.getvalue())
    return folder / "root.pem", folder / "bundle.pem"


def system_bundle() -> str:
    paths = ssl.get_default_verify_paths()
    for path in (paths.cafile, paths.openssl_cafile, "/etc/ssl/certs/ca-certificates.crt"):
        if path and os.path.exists(path):
            return path
    import certifi

    return certifi.where()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=0, help="measure memory over so many rows")
    parser.add_argument("--side", choices=("ours", "peer"), help=argparse.SUPPRESS)
    parser.add_argument("--list", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--authority", type=Path, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
