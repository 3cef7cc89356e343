"""Looks at held-out samples while training goes on: retrieval, matching, captions.

Small measures that show whether training learns; the papers' are those of `capfilt evaluate`, of
which CIDEr is the same. Dims: N held-out pairs, Q query tokens, E joint width.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from jobs.evaluation.captions import cider
from jobs.training.objectives import Batch, Look, Objective
from pipeline.roc import area_under_curve

RETRIEVAL, MATCHING, CAPTIONS = "retrieval_r1", "itm_auc", "cider"
_MOST_CIDER = 10.0


def probe(objective: Objective, batches: Sequence[Batch]) -> dict[str, float]:
    """Return what a model makes of held-out batches; it is left in training mode.

    `retrieval_r1` is the mean of both directions over all batches together, `itm_auc` how often a
    true pair is ranked above a false one, `cider` how close one caption an image comes to all that
    the batches say of it, 0 to 10.
    """
    objective.model.eval()
    looks = [objective.look(batch) for batch in batches]
    objective.model.train()
    found = _losses(looks)
    if looks[0].image_feats is not None:
        ids = torch.cat([batch.image_ids for batch in batches])
        found[RETRIEVAL] = retrieval_at_1(
            torch.cat([look.image_feats for look in looks if look.image_feats is not None]),
            torch.cat([look.text_feats for look in looks if look.text_feats is not None]),
            ids,
        )
    if looks[0].matches is not None:
        pairs = [look.matches for look in looks if look.matches is not None]
        true, false = (torch.cat(side) for side in zip(*pairs, strict=True))
        area = area_under_curve(*(side.float().cpu().numpy() for side in (true, false)))
        assert area is not None, "every batch has pairs"
        found[MATCHING] = area
    if looks[0].captions is not None:
        written = [caption for look in looks for caption in look.captions or ()]
        found[CAPTIONS] = _cider(written, batches)
        found["num_distinct_captions"] = float(len(set(written)))
    return found


def score_of(found: dict[str, float]) -> float | None:
    """Return the one number by which the best checkpoint is kept, or None: the mean of all.

    Each is a share of what can be reached.
    """
    most = {RETRIEVAL: 1.0, MATCHING: 1.0, CAPTIONS: _MOST_CIDER}
    measured = [found[name] / most[name] for name in most if name in found]
    return sum(measured) / len(measured) if measured else None


def retrieval_at_1(images: Tensor, texts: Tensor, image_ids: Tensor) -> float:
    """Return the share of images and texts whose nearest is their own, of (N, [Q,] E) and (N, E).

    A text of the same image counts as its own.
    """
    queries = images if images.dim() == 3 else images[:, None]  # (N, Q, E)
    # One image at a time: N x N x Q similarities would not fit for long.
    similarity = torch.stack([(q @ texts.t()).max(dim=0).values for q in queries.float()])  # (N, N)
    same = image_ids[:, None] == image_ids
    row = torch.arange(len(image_ids), device=image_ids.device)
    hits = [same[row, similarity.argmax(dim=1)], same[similarity.argmax(dim=0), row]]
    return float(torch.stack(hits).float().mean())


def _cider(written: Sequence[str], batches: Sequence[Batch]) -> float:
    """Return the CIDEr of each image's caption; an image that came several times counts once."""
    ids = [number for batch in batches for number in batch.image_ids.tolist()]
    texts = [text for batch in batches for text in batch.texts]
    captions, references = dict(zip(ids, written, strict=True)), defaultdict(list)
    for number, text in zip(ids, texts, strict=True):
        references[number].append(text)
    return cider(list(captions.values()), [references[number] for number in captions])


def _losses(looks: Sequence[Look]) -> dict[str, float]:
    told = [look.lm for look in looks if look.lm is not None]
    if not told:
        return {}
    return {
        f"lm_{name}": sum(getattr(each, name) for each in told) / len(told)
        for name in ("seen", "blind", "blank")
    }
