"""`capfilt calibrate`: how well the corpus's scores tell right captions from wrong ones."""

from contextlib import ExitStack

from jobs.corpus_root import open_corpus
from jobs.errors import UserError
from jobs.recipe import Recipe
from jobs.trained import found_model
from pipeline.models import ModelError
from pipeline.report.calibrate import Calibration, CalibrationConfig, calibrate
from pipeline.report.labels import read_labels
from pipeline.scorer import Scorer


def calibrate_corpus(
    recipe: Recipe, labels: str | None, config: CalibrationConfig, *, is_shuffled: bool = True
) -> Calibration:
    """Score captions of the corpus with images that they do not belong to, and compare.

    `labels` is a table of looked-at captions besides (CSV, Parquet or JSON lines; the columns are
    those of `read_labels`). Without `is_shuffled` they alone are used, and no model is loaded.
    Raises UserError.
    """
    try:
        pairs = read_labels(labels) if labels else []
    except ValueError as error:
        raise UserError(str(error)) from error
    corpus = open_corpus(recipe.root)
    with ExitStack() as stack:
        scorer = None
        if is_shuffled:
            if recipe.scorer is None:
                raise UserError("the recipe has no `scorer`, by which shuffled pairs are scored")
            models = recipe.scorer
            if models.filter is not None:
                own = stack.enter_context(found_model(models.filter, recipe.root, "filter"))
                models = models.model_copy(update={"filter": own})
            try:
                scorer = Scorer.load(models)
            except ModelError as error:
                raise UserError(str(error)) from error
        try:
            return calibrate(corpus, pairs, scorer=scorer, config=config)
        except ValueError as error:
            raise UserError(f"{corpus.root}: {error}") from error
