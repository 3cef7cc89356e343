"""What a source is: its published form, its files, its columns, who wrote its captions."""

from enum import StrEnum
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from pipeline.sources.rows import Origin


class SourceFormat(StrEnum):
    """The forms that sources are published in."""

    LAION400M = "laion400m"
    CC3M = "cc3m"
    CC12M = "cc12m"
    SBU = "sbu"
    COCO = "coco"
    VISUAL_GENOME = "visual_genome"
    TABLE = "table"
    FOLDER = "folder"
    WEBDATASET = "webdataset"
    IMG2DATASET = "img2dataset"


class TableFormat(StrEnum):
    """The forms of a table's files."""

    CSV = "csv"
    TSV = "tsv"
    JSONL = "jsonl"
    PARQUET = "parquet"


_HUMAN = frozenset({SourceFormat.COCO, SourceFormat.VISUAL_GENOME})


class SourceConfig(BaseModel):
    """One source of image-caption pairs; the column settings serve `table` and fill in by format.

    LAION-400M, CC3M and CC12M are tables whose columns are known. Paths are files, folders or
    globs, local or any fsspec URL, read in the given order and sorted within each.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
    """Names the source's folder in the corpus: a-z, 0-9, _ and -."""
    format: SourceFormat
    """The form it is published in."""
    paths: Annotated[tuple[str, ...], Field(min_length=1)]
    """SBU as text: the file of URLs, then the file of captions."""
    origin: Origin = Origin.WEB
    """Human by default for COCO and Visual Genome."""
    table_format: TableFormat | None = None
    """None goes by each file's name, with or without .gz or .zst."""
    url_column: str = "url"
    """The column of the URLs, or of the file names below `image_root`."""
    caption_column: str | None = "caption"
    """A list of texts in one cell (JSONL, Parquet) gives several captions; None gives none."""
    extra_columns: tuple[str, ...] = ()
    """Columns that are kept beside the row, one value each."""
    column_names: tuple[str, ...] | None = None
    """For CSV and TSV without a header line; None reads the header."""
    is_quoted: bool | None = None
    """Whether CSV or TSV cells may be in double quotes; None means yes for CSV and no for TSV."""
    base_url: str | None = None
    """What relative URLs are relative to."""
    image_root: str | None = None
    """Folder, fsspec URL or zip that holds the images already; file names are looked up in it."""
    image_data: str | None = None
    """Visual Genome: image_data.json, which holds the URLs."""
    one_in: Annotated[int, Field(ge=1)] = 1
    """Reads the first of every so many records, so that a rehearsal sees all of the list."""
    max_caption_chars: Annotated[int, Field(ge=1)] = 10_000
    """A record with a longer caption is malformed."""
    max_url_chars: Annotated[int, Field(ge=16)] = 8192
    """A record with a longer URL is malformed."""
    max_record_bytes: Annotated[int, Field(ge=1024)] = 16 * 2**20
    """The longest line, CSV record or JSON item that is looked at."""

    def content(self) -> dict[str, Any]:
        """Return the settings that decide what the rows hold, for a corpus's fingerprint.

        Where the lists and images lie is not among them: a corpus may be continued on a machine
        that keeps them elsewhere.
        """
        content = self.model_dump(mode="json", exclude={"paths", "image_root", "image_data"})
        if self.one_in == 1:
            del content["one_in"]  # so that whole lists are called what they always were
        return content

    @model_validator(mode="before")
    @classmethod
    def _fill_in_by_format(cls, values: object) -> object:
        if not isinstance(values, dict):
            return values
        known = _BY_FORMAT.get(str(values.get("format")), {})
        return {**known, **values}

    @model_validator(mode="after")
    def _fits_format(self) -> Self:
        if self.format is SourceFormat.IMG2DATASET and (self.image_root or self.base_url):
            raise ValueError("img2dataset's images are in its tars: leave out image_root, base_url")
        if self.format is SourceFormat.VISUAL_GENOME and not (self.image_data or self.image_root):
            raise ValueError(
                "visual_genome keeps its URLs in image_data.json: set image_data, or image_root"
            )
        columns = [self.url_column, self.caption_column, *self.extra_columns]
        if self.column_names is not None:
            missing = [name for name in columns if name and name not in self.column_names]
            if missing:
                raise ValueError(f"column_names lacks {', '.join(missing)}")
        return self


_BY_FORMAT: dict[str, dict[str, object]] = {
    SourceFormat.LAION400M: {
        "table_format": TableFormat.PARQUET,
        "url_column": "URL",
        "caption_column": "TEXT",
        "extra_columns": (
            "SAMPLE_ID",
            "HEIGHT",
            "WIDTH",
            "LICENSE",
            "NSFW",
            "similarity",
        ),
    },
    SourceFormat.CC3M: {
        "table_format": TableFormat.TSV,
        "column_names": ("caption", "url"),
        "is_quoted": False,
    },
    SourceFormat.CC12M: {
        "table_format": TableFormat.TSV,
        "column_names": ("url", "caption"),
        "is_quoted": False,
    },
    SourceFormat.IMG2DATASET: {
        "table_format": TableFormat.PARQUET,
        "extra_columns": ("key",),  # theirs, for ours is another
    },
    SourceFormat.COCO: {
        "origin": Origin.HUMAN,
        "base_url": "http://images.cocodataset.org/",
    },
    SourceFormat.VISUAL_GENOME: {"origin": Origin.HUMAN},
}
