"""Image-text retrieval: a fast look at all pairs, then a careful one at the best (BLIP-2, 4.4).

N images, M texts, k candidates of a query.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_CUTS = (1, 5, 10)
_NEVER = -100.0  # below every logit: what was not among the candidates

Rerank = Callable[[int, Tensor], Tensor]
"""ITM logits of one image (its number) with some texts (their numbers, (n,)): (n,) float32."""


@dataclass(frozen=True, slots=True)
class Retrieval:
    """Shares of queries whose right answer is among the first 1, 5 and 10; 0 to 1.

    `text` asks with an image (TR), `image` with a text (IR).
    """

    text: dict[int, float]
    image: dict[int, float]

    def to_json(self) -> dict[str, float]:
        """Return the figures by their names in the papers."""
        found = {f"TR@{cut}": share for cut, share in self.text.items()}
        return found | {f"IR@{cut}": share for cut, share in self.image.items()}


def retrieval(
    similarity: Tensor, image_of_text: Tensor, rerank: Rerank | None, num_candidates: int
) -> Retrieval:
    """Return how well pairs find each other by (N, M) similarities.

    With `rerank`, the `num_candidates` nearest of every query are ranked by ITM logit plus
    similarity, and nothing else has a chance. Each image is looked at once, with all texts that it
    is a candidate for or that are candidates for it. Fewer candidates than that are all taken.
    """
    by_image = by_text = similarity
    if rerank is not None:
        by_image = _best(similarity, num_candidates)
        by_text = _best(similarity.t(), num_candidates).t()
        logits = _logits(by_image | by_text, rerank)
        by_image, by_text = (
            torch.where(is_candidate, logits + similarity, _NEVER)
            for is_candidate in (by_image, by_text)
        )
    is_right = image_of_text == torch.arange(len(similarity))[:, None]  # (N, M)
    return Retrieval(_recalls(by_image, is_right), _recalls(by_text.t(), is_right.t()))


def _best(similarity: Tensor, count: int) -> Tensor:
    """Return which columns are among the best of each row, bool of the same shape."""
    best = similarity.topk(min(count, similarity.shape[1]), dim=1).indices
    return torch.zeros_like(similarity, dtype=torch.bool).scatter_(1, best, value=True)


def _logits(is_wanted: Tensor, rerank: Rerank) -> Tensor:
    found = torch.full(is_wanted.shape, _NEVER)
    for image, row in enumerate(is_wanted):
        texts = row.nonzero()[:, 0]
        if len(texts):
            found[image, texts] = rerank(image, texts)
    return found


def _recalls(scores: Tensor, is_right: Tensor) -> dict[int, float]:
    """Return the share of rows that have a right column among their first ones.

    Ties are broken against the model: a right column comes after wrong ones of its score, so that
    one that gives all pairs the same score finds nothing.
    """
    best_right = scores.masked_fill(~is_right, -torch.inf).max(dim=1, keepdim=True).values
    num_before = ((scores >= best_right) & ~is_right).sum(dim=1)
    return {cut: float((num_before < cut).float().mean()) for cut in _CUTS}
