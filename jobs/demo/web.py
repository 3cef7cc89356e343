"""Builds the synthetic web: image files, the server's plan, URL lists, and the truth kept apart.

    web = build_web(Path("demo/web"), WebConfig())
    with web.serve() as server:
        ...  # the URLs in web.lists can be fetched

The folder holds everything and is built once:

    laion.parquet cc3m.tsv      the noisy lists, as published
    human.json test.json        COCO captions: by people (to fine-tune on), and held out
    files.bin site.json         the bytes behind each URL, and what the server does with them
    truth.parquet               scene, noise and behaviour of each image, for measurement only
    web.json                    config and port, written last: the web exists once this file does

**Ports and fingerprints.** A URL holds a port, and a corpus holds URLs, so a changing port would
change its bytes. The port is therefore part of the web: it is chosen when the web is built (the
config's, or the next free one where that is taken), recorded in web.json, and every later `serve`
listens on the recorded one or says that it is taken. An unchanged config gives equal lists in any
folder as long as its port is free, and a resumed run always sees the lists that it began with. The
truth and the server's plan know paths only and never depend on the port. Where another base URL is
wanted (a second server, a proxy), `write_lists` writes the same lists for it.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2

from jobs.demo import lists
from jobs.demo.answers import ServerConfig
from jobs.demo.behaviours import Behaviour
from jobs.demo.drawing import draw_scene
from jobs.demo.encodings import encode
from jobs.demo.lists import UrlLists
from jobs.demo.plan import PlannedImage, Stream, WebConfig, plan_web, scene_index, stream
from jobs.demo.server import HOST, WebServer, free_port
from jobs.demo.site import write_site
from jobs.demo.truth import read_truth, write_truth

_MARKER = "web.json"
_FORMAT = 1  # raised when the same config no longer gives the same bytes


@dataclass(frozen=True, slots=True)
class SyntheticWeb:
    """A web that was built in a folder."""

    folder: Path
    config: WebConfig
    port: int

    @property
    def base_url(self) -> str:
        """What all URLs of its lists begin with."""
        return f"http://{HOST}:{self.port}"

    @property
    def lists(self) -> UrlLists:
        """Its URL lists, as the job reads them."""
        return UrlLists.in_folder(self.folder)

    @property
    def truth_file(self) -> Path:
        """One row per image with all that is known of it; not for training."""
        return self.folder / "truth.parquet"

    def truth(self) -> dict[str, PlannedImage]:
        """Return what is known of each image, by the path of its URL; not for training."""
        return read_truth(self.truth_file)

    def serve(self, config: ServerConfig | None = None) -> WebServer:
        """Return a server for the URLs of its lists, to be used as a context manager.

        Starting it raises OSError while another program listens on the port.
        """
        return WebServer(self.folder, port=self.port, config=config)

    def write_lists(self, folder: Path, base_url: str) -> UrlLists:
        """Write the same lists into `folder` for a server at another `base_url`."""
        return lists.write_lists(folder, plan_web(self.config), base_url)


def build_web(
    folder: Path,
    config: WebConfig | None = None,
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> SyntheticWeb:
    """Return the web in `folder`, building it where it is missing or was left unfinished.

    `on_progress` is called with (images done, images in all). Raises ValueError when the folder
    holds a web of another config.
    """
    config = config or WebConfig()
    if (folder / _MARKER).exists():
        return _existing(folder, config)
    folder.mkdir(parents=True, exist_ok=True)
    web = SyntheticWeb(folder, config, free_port(config.port))
    planned = plan_web(config)
    write_site(folder, _pages(planned, config, on_progress))
    lists.write_lists(folder, planned, web.base_url)
    write_truth(web.truth_file, planned)
    marker = {"format": _FORMAT, "port": web.port, "config": config.model_dump(mode="json")}
    (folder / _MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
    return web


def render(planned: PlannedImage, config: WebConfig) -> bytes:
    """Return the bytes of an image's file."""
    picture = draw_scene(planned.scene, width=planned.width, height=planned.height)
    index = scene_index(config, planned.split, planned.row)
    return encode(picture, planned.file_kind, stream(config, Stream.PICTURE, index))


def _pages(
    planned: Sequence[PlannedImage],
    config: WebConfig,
    on_progress: Callable[[int, int], None] | None,
) -> Iterator[tuple[str, bytes, str, Behaviour]]:
    num_threads = cv2.getNumThreads()
    cv2.setNumThreads(1)  # pictures this small take longer when they are shared out
    try:
        for number, each in enumerate(planned, start=1):
            yield each.path, render(each, config), each.file_kind.content_type, each.behaviour
            if on_progress:
                on_progress(number, len(planned))
    finally:
        cv2.setNumThreads(num_threads)


def _existing(folder: Path, config: WebConfig) -> SyntheticWeb:
    marker = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
    was, now = marker["config"], config.model_dump(mode="json")
    changed = [key for key in now if was.get(key) != now[key]]
    differing = [f"{key} was {was.get(key)}, is {now[key]}" for key in changed]
    if marker["format"] != _FORMAT:
        differing.append(f"format was {marker['format']}, is {_FORMAT}")
    if differing:
        raise ValueError(
            f"{folder} holds a web of another config ({'; '.join(differing)}); "
            "choose another folder, or delete this one"
        )
    return SyntheticWeb(folder, config, marker["port"])
