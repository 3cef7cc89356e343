import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.masks import Objective, caption_mask, columns_mask, self_attention_mask


@st.composite
def sizes(draw):
    """Query count and texts whose first token is real, padded on the right or full of holes."""
    num_queries = draw(st.integers(1, 5))
    num_text, batch = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    holes = st.lists(st.booleans(), min_size=num_text - 1, max_size=num_text - 1)
    rows = draw(st.lists(holes, min_size=batch, max_size=batch))
    return num_queries, torch.tensor([[True, *row] for row in rows], dtype=torch.bool)


def rule(objective, row, column, num_queries, is_real):
    """BLIP-2's Fig. 2 for one pair of positions, in plain words."""
    if column >= num_queries and not is_real[column - num_queries]:
        return False
    row_is_text, column_is_text = row >= num_queries, column >= num_queries
    if objective is Objective.ITC:
        return row_is_text == column_is_text
    if objective is Objective.ITM:
        return True
    return column <= row if row_is_text else not column_is_text


@pytest.mark.parametrize("objective", list(Objective))
@given(sizes())
def test_every_entry_follows_the_paper(objective, case):
    num_queries, text_is_real = case
    mask = self_attention_mask(objective, num_queries, text_is_real)
    total = num_queries + text_is_real.shape[1]
    expected = [
        [[rule(objective, i, j, num_queries, real) for j in range(total)] for i in range(total)]
        for real in text_is_real.tolist()
    ]
    assert mask.tolist() == expected


@pytest.mark.parametrize("objective", list(Objective))
@given(sizes())
def test_no_row_is_left_with_nothing_to_attend_to(objective, case):
    assert self_attention_mask(objective, *case).any(dim=-1).all()


@given(sizes())
def test_matching_and_text_passes_use_the_same_masks_in_short(case):
    num_queries, text_is_real = case
    whole = self_attention_mask(Objective.ITM, num_queries, text_is_real)
    short = columns_mask(num_queries, text_is_real)[:, 0]
    assert torch.equal(short.expand_as(whole), whole)
    whole = self_attention_mask(Objective.ITC, num_queries, text_is_real)
    text = whole[:, num_queries:, num_queries:]
    assert torch.equal(columns_mask(0, text_is_real)[:, 0].expand_as(text), text)


@given(sizes())
def test_query_pass_needs_no_mask(case):
    num_queries, text_is_real = case
    for objective in (Objective.ITC, Objective.ITG):
        mask = self_attention_mask(objective, num_queries, text_is_real)
        assert mask[:, :num_queries, :num_queries].all()
        assert not mask[:, :num_queries, num_queries:].any()


@given(sizes())
def test_cached_captioning_uses_the_text_rows_of_the_itg_mask(case):
    num_queries, text_is_real = case
    whole = self_attention_mask(Objective.ITG, num_queries, text_is_real)
    assert torch.equal(caption_mask(num_queries, text_is_real)[:, 0], whole[:, num_queries:])
