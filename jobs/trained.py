"""The models that a run trained itself: a recipe calls them 'trained', stages need their folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from jobs.corpus_root import open_corpus
from jobs.errors import UserError
from jobs.training.config import TRAINED, Stage
from jobs.training.exports import opened_export, read_card, stage_folder
from pipeline.model_configs import ModelConfig

Config = TypeVar("Config", bound=ModelConfig)


@contextmanager
def found_model(config: Config, root: str, stage: Stage) -> Iterator[Config]:
    """Give the configuration with a folder in place of 'trained'; others as they are.

    The folder is local for as long as the context lasts. Raises UserError when the run has not
    trained the model yet, or its files are not those that it handed over.
    """
    if config.name != TRAINED:
        yield config
        return
    store = open_corpus(root).store
    card = read_card(store, stage)
    if card is None:
        raise UserError(
            f"the recipe asks for the {stage} that this run trains, but {store.url}/"
            f"{stage_folder(stage)}/export is not there; train it first: "
            f"capfilt pretrain RECIPE --stage {stage}"
        )
    with opened_export(store, stage, card) as folder:
        yield config.model_copy(update={"name": str(folder)})
