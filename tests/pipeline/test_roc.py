"""The area under the ROC curve against its definition."""

from statistics import fmean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.roc import area_under_curve

SCORES = st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75]) | st.floats(-1, 1), max_size=20)


@given(SCORES, SCORES)
def test_it_is_the_share_of_pairs_in_the_right_order_and_half_of_ties(right, wrong):
    found = area_under_curve(np.array(right), np.array(wrong))
    if not right or not wrong:
        assert found is None
    else:
        wanted = fmean((a > b) + (a == b) / 2 for a in right for b in wrong)
        assert found == pytest.approx(wanted)


def test_a_case_worked_out_by_hand():
    assert area_under_curve(np.array([0.9, 0.5]), np.array([0.1, 0.5])) == 3.5 / 4
