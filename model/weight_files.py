"""Weights in files: reading what others wrote without trusting it, and loading all of it or none.

A tensor that is missing, unexpected or misshapen is an error that lists names. What may be missing
or left unused stands in a table, with the reason.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.vision import ImageEncoder, resize_positions

Reasons = Mapping[str, str]  # a regular expression of names -> why they may be missing or unused

_INDEX = "model.safetensors.index.json"
_MAX_JSON_BYTES = 64 * 2**20  # the index of the largest models has a few megabytes
_SHOWN = 12  # groups of names in a message; a file of another model would list thousands


class CheckpointError(ValueError):
    """A file of weights cannot be used: it is broken, hostile, or of another model."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file or folder, on the CPU, under the names that they have there.

    A `.safetensors` file, a folder as transformers saves it (`model.safetensors`, or an index and
    its shards), or a `.pth` file as LAVIS and BLIP save it, with the weights at the top or below
    "model". No code in a file is ever run. Raises CheckpointError when it holds anything else.
    """
    if path.is_dir():
        return _read_folder(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    return _read_pth(path)


def write_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors to a `.safetensors` file, whole or not at all; tied ones are written apart."""
    temporary = path.with_name(f"{path.name}.part")
    save_file(_apart(weights), temporary, metadata={"format": "pt"})
    temporary.replace(path)


def load_strictly(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    *,
    may_lack: Reasons | None = None,
    source: str = "the weights",
    resizes_positions: bool = False,
) -> None:
    """Load weights under the model's own names; nothing is loaded unless everything fits.

    Parameters that are tied count as present when one of their names is; what a file holds under
    several of them has to be equal. `may_lack` allows names to
    be missing. With `resizes_positions` the image encoder's position embeddings are interpolated to
    its resolution. Raises CheckpointError that lists what is missing, unexpected (with what it may
    have been meant for) or misshapen (with both shapes). A model on the meta device is only
    compared.
    """
    wanted = model.state_dict()
    found = dict(weights)
    if resizes_positions:
        found = _with_resized_positions(model, found)
    missing = wanted.keys() - found.keys() - _tied(model, found.keys())
    missing = {name for name in missing if not matches(name, may_lack or {})}
    unexpected = found.keys() - wanted.keys()
    misshapen = [
        f"{name} is {tuple(found[name].shape)}, the model has {tuple(wanted[name].shape)}"
        for name in sorted(wanted.keys() & found.keys())
        if found[name].shape != wanted[name].shape
    ]
    misshapen += _torn_apart(model, found)
    if missing or unexpected or misshapen:
        raise CheckpointError(_report(source, missing, unexpected, misshapen))
    if not any(tensor.is_meta for tensor in wanted.values()):
        model.load_state_dict(found, strict=False)


def without(weights: Mapping[str, Tensor], unused: Reasons) -> dict[str, Tensor]:
    """Return the weights but those whose names `unused` has."""
    return {name: tensor for name, tensor in weights.items() if not matches(name, unused)}


def matches(name: str, reasons: Reasons) -> bool:
    """Say whether one of the regular expressions describes all of `name`."""
    return any(re.fullmatch(pattern, name) for pattern in reasons)


def read_json(path: Path) -> dict[str, object]:
    """Return a JSON object. Raises CheckpointError when it is none, or absurdly large."""
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes; that is no index")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return content


def _read_folder(folder: Path) -> dict[str, Tensor]:
    if not (folder / _INDEX).is_file():
        if not (folder / "model.safetensors").is_file():
            raise CheckpointError(f"{folder} has neither model.safetensors nor {_INDEX}")
        return _read_safetensors(folder / "model.safetensors")
    places = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(n, str) for n in places.values()):
        raise CheckpointError(f"{folder / _INDEX} has no weight_map from names to files")
    weights: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        # A name, not a path: an index must not make us read what lies elsewhere.
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{folder / _INDEX} names {name!r}, which is no file beside it")
        weights |= _read_safetensors(folder / name)
    if strange := places.keys() ^ weights.keys():
        groups = ", ".join(_grouped(strange))
        raise CheckpointError(f"{folder / _INDEX} and its files differ in {groups}")
    return weights


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error


def _read_pth(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # What torch raises depends on where a file is broken; what it means here is one thing.
        raise CheckpointError(f"{path} cannot be read as plain tensors: {error}") from error
    weights = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(weights, dict):
        raise CheckpointError(f"{path} holds no weights by name, nor below 'model'")
    for name, tensor in weights.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(f"{path} holds {name!r}, which is no named tensor")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise CheckpointError(f"{path}: {name} is no plain tensor")
        # A few stored numbers can pose as any shape.
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise CheckpointError(f"{path}: {name} claims {tuple(tensor.shape)}, but stores less")
    return weights


def _apart(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights of which no two share memory; the first of those that did keeps it."""
    taken: set[int] = set()
    apart = {}
    for name, tensor in weights.items():
        plain = tensor.detach().contiguous()
        storage = plain.untyped_storage().data_ptr()
        apart[name] = plain.clone() if storage in taken else plain
        taken.add(storage)
    return apart


def _with_resized_positions(model: nn.Module, found: dict[str, Tensor]) -> dict[str, Tensor]:
    name = "image_encoder.positions"
    if name not in found:
        return found
    encoder = model.get_submodule("image_encoder")
    assert isinstance(encoder, ImageEncoder)
    side, align = (
        encoder.config.image_size // encoder.config.patch_size,
        encoder.config.align_corners,
    )
    return found | {name: resize_positions(found[name], side=side, align_corners=align)}


def _tied(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Return all names of the parameters that one of `names` is a name of."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    given = {id(parameters[name]) for name in names if name in parameters}
    return {name for name, parameter in parameters.items() if id(parameter) in given}


def _torn_apart(model: nn.Module, found: Mapping[str, Tensor]) -> list[str]:
    """Describe tensors that differ although they would become one parameter."""
    first: dict[int, str] = {}
    problems = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in found:
            continue
        other = first.setdefault(id(parameter), name)
        if not torch.equal(found[name], found[other]):
            problems.append(f"{name} differs from {other}, but the model ties them")
    return problems


def _report(source: str, missing: set[str], unexpected: set[str], misshapen: list[str]) -> str:
    lines = [f"{source} do not fit the model; nothing was loaded"]
    if missing:
        lines += ["missing:", *_grouped(missing)]
    if unexpected:
        lines += ["unexpected:"]
        for group in _grouped(unexpected):
            near = get_close_matches(group.split(" (")[0], _grouped(missing), n=1, cutoff=0.8)
            lines.append(f"{group}; did you mean {near[0]}?" if near else group)
    if misshapen:
        lines += ["of another kind:", *misshapen[:_SHOWN]]
        lines += [f"and {len(misshapen) - _SHOWN} more"] * (len(misshapen) > _SHOWN)
    return "\n  ".join(lines)


def _grouped(names: Iterable[str]) -> list[str]:
    """Return names with their numbers replaced by `*`, and how many each stands for."""
    groups = Counter(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in sorted(names))
    lines = [f"{group} ({n} of them)" if n > 1 else group for group, n in groups.items()]
    return [*lines[:_SHOWN], f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else lines
