"""Opens the corpus that a recipe or a command names, or says why it cannot be opened."""

from jobs.errors import UserError
from pipeline.corpus import Corpus


def open_corpus(root: str) -> Corpus:
    """Return the corpus at a root URL, without looking whether there is one yet.

    Raises UserError for an unknown protocol, or one whose extra is not installed.
    """
    try:
        return Corpus(root)
    except ImportError as error:
        extra = {"s3": "s3", "gs": "gcs", "gcs": "gcs"}.get(root.partition("://")[0])
        hint = f"pip install 'capfilt[{extra}]'" if extra else "install that package"
        raise UserError(f"{root}: {error}; {hint}") from error
    except ValueError as error:
        raise UserError(f"{root}: {error}") from error
