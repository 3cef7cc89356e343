"""Names of models that keep a vision tower inside: one table for the model, one for the tower."""

from collections.abc import Mapping

from torch import Tensor

from model.names.rename import Rename, to_ours, to_theirs
from model.names.vision import VisionFormat, vision_to_ours, vision_to_theirs

Table = tuple[Rename, ...]

_OURS = "image_encoder."


def with_tower_to_ours(
    state: Mapping[str, Tensor], table: Table, tower: VisionFormat, prefix: str
) -> dict[str, Tensor]:
    """Return their weights under our names; the tower's stand below `prefix` in theirs.

    A name that neither table knows stays as it is, for the loader to report, unless it is below
    `prefix`: then it is a ValueError of `vision_to_ours`.
    """
    ours = {name: to_ours(name, table) for name in state}
    of_tower = {
        name.removeprefix(prefix): state[name]
        for name, known in ours.items()
        if known is None and name.startswith(prefix)
    }
    rest = {
        known or name: state[name]
        for name, known in ours.items()
        if known is not None or not name.startswith(prefix)
    }
    translated = vision_to_ours(of_tower, tower) if of_tower else {}
    return rest | {f"{_OURS}{name}": tensor for name, tensor in translated.items()}


def with_tower_to_theirs(
    state: Mapping[str, Tensor], table: Table, tower: VisionFormat, prefix: str
) -> dict[str, Tensor]:
    """Return our weights under their names, the tower's below `prefix`, if there is one.

    Raises ValueError that lists our names for which neither table has a place.
    """
    of_tower = {n.removeprefix(_OURS): t for n, t in state.items() if n.startswith(_OURS)}
    rest = {name: to_theirs(name, table) for name in state if not name.startswith(_OURS)}
    if homeless := sorted(name for name, known in rest.items() if known is None):
        raise ValueError(f"this format has no place for {', '.join(homeless)}")
    theirs = {known: state[name] for name, known in rest.items() if known is not None}
    translated = vision_to_theirs(of_tower, tower) if of_tower else {}
    return theirs | {f"{prefix}{name}": tensor for name, tensor in translated.items()}
