"""Looks at held-out samples while training goes on: retrieval, matching, captions.

Plain measures that need no library, to see whether training learns; the papers' metrics are those
of `capfilt evaluate`. Dims: N held-out pairs, Q query tokens, E joint width.
"""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from jobs.training.objectives import Batch, Look, Objective
from pipeline.roc import area_under_curve

RETRIEVAL, MATCHING, CAPTIONS = "retrieval_r1", "itm_auc", "caption_f1"


def probe(objective: Objective, batches: Sequence[Batch]) -> dict[str, float]:
    """Return what a model makes of held-out batches; it is left in training mode.

    `retrieval_r1` is the mean of both directions over all batches together, `itm_auc` how often a
    true pair is ranked above a false one, `caption_f1` the overlap of words with the caption.
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
        texts = [text for batch in batches for text in batch.texts]
        found[CAPTIONS] = sum(map(word_f1, written, texts)) / len(texts)
        found["num_distinct_captions"] = float(len(set(written)))
    return found


def score_of(found: dict[str, float]) -> float | None:
    """Return the one number by which the best checkpoint is kept, or None: the mean of all."""
    measured = [found[name] for name in (RETRIEVAL, MATCHING, CAPTIONS) if name in found]
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


def word_f1(written: str, reference: str) -> float:
    """Return the harmonic mean of precision and recall of words."""
    ours, theirs = Counter(written.lower().split()), Counter(reference.lower().split())
    common = (ours & theirs).total()
    return 2 * common / (ours.total() + theirs.total()) if common else 0.0


def _losses(looks: Sequence[Look]) -> dict[str, float]:
    found = {}
    for name in ("lm_seen", "lm_blind"):
        values = [value for look in looks if (value := getattr(look, name)) is not None]
        if values:
            found[name] = sum(values) / len(values)
    return found
