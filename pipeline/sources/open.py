"""The reader for each form that sources are published in."""

from pipeline.sources.config import SourceConfig, SourceFormat, TableFormat
from pipeline.sources.documents import (
    DocumentReader,
    coco_rows,
    sbu_document,
    sbu_text_files,
    visual_genome_rows,
)
from pipeline.sources.files import find_files, plain_suffix
from pipeline.sources.images import FolderReader, WebDatasetReader
from pipeline.sources.img2dataset import Img2DatasetReader
from pipeline.sources.parquet import ParquetReader
from pipeline.sources.reader import Reader
from pipeline.sources.rows import SourceError
from pipeline.sources.text_tables import TextTableReader

_TABLE_SUFFIXES = {
    ".csv": TableFormat.CSV,
    ".tsv": TableFormat.TSV,
    ".jsonl": TableFormat.JSONL,
    ".ndjson": TableFormat.JSONL,
    ".parquet": TableFormat.PARQUET,
}


def open_reader(config: SourceConfig) -> Reader:
    """Return the reader of a source; raises SourceError when its files are not there."""
    match config.format:
        case SourceFormat.FOLDER:
            return FolderReader(config)
        case SourceFormat.WEBDATASET:
            return WebDatasetReader(config)
        case SourceFormat.IMG2DATASET:
            return Img2DatasetReader(config)
        case SourceFormat.SBU:
            return _open_sbu(config)
        case SourceFormat.COCO:
            return DocumentReader(config, find_files(config.paths, (".json",)), coco_rows)
        case SourceFormat.VISUAL_GENOME:
            return DocumentReader(config, find_files(config.paths, (".json",)), visual_genome_rows)
        case _:
            return _open_table(config)


def _open_sbu(config: SourceConfig) -> Reader:
    files = find_files(config.paths, (".json",))
    if all(plain_suffix(file) == ".json" for file in files):
        return DocumentReader(config, files, sbu_document)
    if len(config.paths) != 2 or len(files) != 2:
        raise SourceError(
            f"{config.name}: SBU is a .json file, or two text files: URLs, then captions"
        )
    return DocumentReader(config, files[:1], sbu_text_files)


def _open_table(config: SourceConfig) -> Reader:
    files = find_files(config.paths, tuple(_TABLE_SUFFIXES))
    kinds = {config.table_format or _kind(file) for file in files}
    if len(kinds) > 1:
        names = ", ".join(sorted(kinds))
        raise SourceError(f"{config.name}: files of several kinds ({names}); make them two sources")
    kind = kinds.pop()
    if kind is TableFormat.PARQUET:
        return ParquetReader(config, files)
    return TextTableReader(config, files, kind)


def _kind(file: str) -> TableFormat:
    kind = _TABLE_SUFFIXES.get(plain_suffix(file))
    if kind is None:
        known = ", ".join(_TABLE_SUFFIXES)
        raise SourceError(f"{file}: what kind of table is it? Set table_format, or name it {known}")
    return kind
