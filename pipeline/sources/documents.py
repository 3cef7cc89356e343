"""Sources that are published as documents: SBU, COCO captions, Visual Genome regions."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice, zip_longest
from urllib.parse import urlsplit

from pipeline.sources.cells import clean_text, row_of_cells
from pipeline.sources.config import SourceConfig
from pipeline.sources.files import lines, opened
from pipeline.sources.json_stream import JsonItem, items_of
from pipeline.sources.reader import Piece, chosen, cut_by_count
from pipeline.sources.rows import (
    MalformedReason,
    MalformedRow,
    RecordError,
    SourceError,
    SourceRow,
)

Rows = Iterator[SourceRow | MalformedRow]


class DocumentReader:
    """Reads files that must be read from their beginning; a piece is found by counting."""

    def __init__(
        self, config: SourceConfig, files: Sequence[str], rows: Callable[[SourceConfig, str], Rows]
    ) -> None:
        """`rows` yields all rows of one file, the same at every call."""
        self._config = config
        self._files = list(files)
        self._rows = rows

    def files(self) -> list[str]:
        """Return the files in reading order."""
        return self._files

    def cut(self, file: str, first: int, then: int) -> Iterator[Piece]:
        """Read the file once to count its records, and yield its pieces."""
        num_records = sum(1 for _ in self._rows(self._config, file))
        yield from cut_by_count(file, num_records, first, then)

    def read(self, piece: Piece) -> Rows:
        """Yield the rows of a piece."""
        rows = islice(self._rows(self._config, piece.file), piece.first_record, None)
        yield from chosen(rows, piece)


def sbu_document(config: SourceConfig, file: str) -> Rows:
    """Yield the pairs of SBU's JSON: the arrays `image_urls` and `captions` in step."""
    urls = items_of(file, "image_urls", max_item_bytes=config.max_record_bytes)
    captions = items_of(file, "captions", max_item_bytes=config.max_record_bytes)
    for url, caption in zip_longest(urls, captions):
        line = (url or caption or JsonItem(1, None)).line
        yield _pair(
            config, file, line, (url.value,) if url else None, (caption.value,) if caption else None
        )


def sbu_text_files(config: SourceConfig, url_file: str) -> Rows:
    """Yield the pairs of SBU's two text files: line n of the URLs with line n of the captions."""
    _, caption_file = config.paths
    limit = config.max_record_bytes
    with opened(url_file) as url_stream, opened(caption_file) as caption_stream:
        pairs = zip_longest(
            lines(url_stream, max_bytes=limit), lines(caption_stream, max_bytes=limit)
        )
        for number, (url, caption) in enumerate(pairs, start=1):
            if (url and url.data is None) or (caption and caption.data is None):
                reason = MalformedReason.RECORD_TOO_LONG
                yield _malformed(config, url_file, number, reason, "the line is too long")
            else:
                cells = ((one.data,) if one else None for one in (url, caption))
                yield _pair(config, url_file, number, *cells)


def _pair(
    config: SourceConfig,
    file: str,
    line: int,
    url: tuple[object] | None,
    caption: tuple[object] | None,
) -> SourceRow | MalformedRow:
    """Return the row of two cells, each in a tuple; None where one list is over."""
    if url is None or caption is None:
        missing = "URL" if url is None else "caption"
        return _malformed(config, file, line, MalformedReason.UNMATCHED, f"no {missing} beside it")
    return _row(config, file, line, partial(row_of_cells, config, url[0], caption[0], {}))


def coco_rows(config: SourceConfig, file: str) -> Rows:
    """Yield one row per image of a COCO captions file, in Karpathy's or the original form."""
    images = items_of(file, "images", max_item_bytes=config.max_record_bytes)
    first = next(images, None)
    images.close()
    if first is not None and isinstance(first.value, dict) and "sentences" in first.value:
        return _karpathy_rows(config, file)
    return _instance_rows(config, file)


def _karpathy_rows(config: SourceConfig, file: str) -> Rows:
    for item in items_of(file, "images", max_item_bytes=config.max_record_bytes):
        yield _row(config, file, item.line, partial(_karpathy_row, config, item))


def _karpathy_row(config: SourceConfig, item: JsonItem) -> SourceRow:
    image = _object(item.value, "image")
    folder, name = _text(config, image, "filepath"), _text(config, image, "filename")
    captions = [_object(one, "sentence").get("raw") for one in _list(image.get("sentences"))]
    extra = {key: image[key] for key in ("cocoid", "imgid", "split") if key in image}
    return row_of_cells(config, f"{folder}/{name}" if folder else name, captions, extra)


def _instance_rows(config: SourceConfig, file: str) -> Rows:
    """Yield the images with the captions that name them, then the annotations that name none.

    Annotations come in any order, so all captions of the file are held: some 100 bytes each.
    """
    captions: dict[object, list[str]] = {}
    first_lines: dict[object, int] = {}
    refused: list[MalformedRow] = []
    for item in items_of(file, "annotations", max_item_bytes=config.max_record_bytes):
        try:
            image_id, caption = _annotation(config, item)
            captions.setdefault(image_id, []).append(caption)
            first_lines.setdefault(image_id, item.line)
        except RecordError as error:
            refused.append(_malformed(config, file, item.line, error.reason, error.detail))
    seen: set[object] = set()
    for item in items_of(file, "images", max_item_bytes=config.max_record_bytes):
        yield _row(config, file, item.line, partial(_instance_row, config, item, captions, seen))
    for image_id in captions.keys() - seen:
        refused += [
            _malformed(
                config,
                file,
                first_lines[image_id],
                MalformedReason.UNMATCHED,
                f"no image {image_id!r}",
            )
            for _ in captions[image_id]
        ]
    yield from sorted(refused, key=lambda row: (row.line, row.detail))


def _annotation(config: SourceConfig, item: JsonItem) -> tuple[object, str]:
    annotation = _object(item.value, "annotation")
    image_id = _image_id(annotation.get("image_id"))
    caption = clean_text(annotation.get("caption"), "caption", config.max_caption_chars)
    if not caption:
        raise RecordError(MalformedReason.WRONG_TYPE, "an annotation without a caption")
    return image_id, caption


def _instance_row(
    config: SourceConfig,
    item: JsonItem,
    captions: Mapping[object, list[str]],
    seen: set[object],
) -> SourceRow:
    image = _object(item.value, "image")
    image_id = _image_id(image.get("id"))
    if image_id in seen:
        raise RecordError(MalformedReason.BROKEN_RECORD, f"image {image_id!r} stands there twice")
    seen.add(image_id)
    keys = ("file_name",) if config.image_root else ("coco_url", "file_name")
    url = next((image[key] for key in keys if image.get(key)), None)
    extra = {key: image[key] for key in ("id", "width", "height") if key in image}
    return row_of_cells(config, url, captions.get(image_id, []), extra)


def visual_genome_rows(config: SourceConfig, file: str) -> Rows:
    """Yield one row per image of region_descriptions.json, its phrases as the captions."""
    urls = _visual_genome_urls(config)
    for item in items_of(file, None, max_item_bytes=config.max_record_bytes):
        yield _row(config, file, item.line, partial(_genome_row, config, item, urls))


def _genome_row(
    config: SourceConfig, item: JsonItem, urls: Mapping[object, object] | None
) -> SourceRow:
    image = _object(item.value, "image")
    image_id = _image_id(image.get("id"))
    phrases = [_object(one, "region").get("phrase") for one in _list(image.get("regions"))]
    if urls is None:
        return row_of_cells(config, f"{image_id}.jpg", phrases, {"id": image_id})
    if image_id not in urls:
        raise RecordError(MalformedReason.UNMATCHED, f"image_data has no image {image_id!r}")
    url = urls[image_id]
    if config.image_root is not None:  # the zips hold VG_100K/1.jpg and VG_100K_2/2.jpg
        text = clean_text(url, "url", config.max_url_chars)
        url = "/".join(urlsplit(text).path.split("/")[-2:])
    return row_of_cells(config, url, phrases, {"id": image_id})


def _visual_genome_urls(config: SourceConfig) -> Mapping[object, object] | None:
    if config.image_data is None:
        return None
    urls: dict[object, object] = {}
    for item in items_of(config.image_data, None, max_item_bytes=config.max_record_bytes):
        if isinstance(item.value, dict) and isinstance(item.value.get("image_id"), int):
            urls[item.value["image_id"]] = item.value.get("url")
    if not urls:
        raise SourceError(f"{config.image_data}: no images; is it Visual Genome's image_data.json?")
    return urls


def _row(
    config: SourceConfig, file: str, line: int, make: Callable[[], SourceRow]
) -> SourceRow | MalformedRow:
    try:
        return make()
    except RecordError as error:
        return _malformed(config, file, line, error.reason, error.detail)


def _malformed(
    config: SourceConfig, file: str, line: int, reason: MalformedReason, detail: str
) -> MalformedRow:
    return MalformedRow(source=config.name, file=file, line=line, reason=reason, detail=detail)


def _object(value: object, name: str) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise RecordError(MalformedReason.WRONG_TYPE, f"{name} is no JSON object")
    return value


def _list(value: object) -> Sequence[object]:
    if not isinstance(value, list):
        raise RecordError(MalformedReason.WRONG_TYPE, "captions are no JSON array")
    return value


def _text(config: SourceConfig, image: Mapping[str, object], key: str) -> str:
    return clean_text(image.get(key), "url", config.max_url_chars)


def _image_id(value: object) -> int | str:
    if isinstance(value, str):
        return clean_text(value, "image id", 1000)
    if isinstance(value, int):
        return value
    raise RecordError(MalformedReason.WRONG_TYPE, "no image id")
