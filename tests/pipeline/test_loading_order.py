"""The order of samples: every pass a permutation, every step the same for any world."""

import tracemalloc
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.loading.draws import draw, hash63, permutation
from pipeline.loading.order import Order, SourceSize

SEEDS = st.integers(0, 2**63 - 1)
SHARES = st.fractions(Fraction(1, 10), 3, max_denominator=20)


@st.composite
def source_sizes(draw_from, shares=SHARES):
    sources = []
    for number in range(draw_from(st.integers(1, 4))):
        sizes = draw_from(st.lists(st.integers(0, 12), min_size=1, max_size=7).filter(any))
        sources.append(SourceSize(f"source{number}", tuple(sizes), draw_from(shares)))
    return sources


@st.composite
def orders(draw_from, shares=SHARES):
    sources = draw_from(source_sizes(shares))
    order_of = {"seed": draw_from(SEEDS), "group_shards": draw_from(st.integers(1, 8))}
    try:
        return sources, Order(sources, **order_of)
    except ValueError:  # a first epoch of nothing at all
        sources[0] = SourceSize("source0", sources[0].shard_records)
        return sources, Order(sources, **order_of)


def records_of(sources):
    return {
        (number, shard, record)
        for number, source in enumerate(sources)
        for shard, count in enumerate(source.shard_records)
        for record in range(count)
    }


def identities(refs):
    return [row[:3] for row in refs.rows()]


WHOLE = st.just(Fraction(1))


@given(orders(shares=WHOLE), st.integers(0, 5))
def test_every_epoch_is_a_permutation_of_all_records(made, epoch):
    sources, order = made
    refs = order.records(order.epoch_start(epoch), order.epoch_start(epoch + 1))
    assert Counter(identities(refs)) == Counter(records_of(sources))
    assert set(refs.visit.tolist()) == {epoch}


@given(orders(), st.integers(1, 60))
def test_no_record_of_a_source_is_seen_twice_before_all_others_were_seen(made, num_epochs):
    sources, order = made
    end = min(order.epoch_start(num_epochs), 400)
    rows = order.records(0, end).rows()
    assert len(set(rows)) == end  # the same record never with the same visit
    for number, source in enumerate(sources):
        seen = Counter(row[:3] for row in rows if row[0] == number)
        times = [seen[record] for record in records_of(sources) if record[0] == number]
        assert max(times) - min(times) <= 1, source


@given(orders(), st.integers(0, 12))
def test_an_epoch_holds_each_sources_share(made, epoch):
    sources, order = made
    refs = order.records(order.epoch_start(epoch), order.epoch_start(epoch + 1))
    for number, source in enumerate(sources):
        count = int((refs.source == number).sum())
        assert abs(count - source.passes_per_epoch * source.num_records) < 1


@given(orders(), st.data())
def test_any_cut_of_the_order_gives_the_same_records(made, data):
    _, order = made
    whole = order.records(0, 150).rows()
    cuts = sorted(data.draw(st.lists(st.integers(0, 150), max_size=6)))
    parts = [
        row
        for start, stop in zip([0, *cuts], [*cuts, 150], strict=True)
        if start < stop
        for row in order.records(start, stop).rows()
    ]
    assert parts == whole


@given(orders(), st.integers(0, 400))
def test_a_position_lies_in_its_epoch(made, position):
    _, order = made
    epoch = order.epoch_of(position)
    assert order.epoch_start(epoch) <= position < order.epoch_start(epoch + 1)


@given(orders(), st.integers(0, 200), st.integers(1, 60))
def test_the_groups_named_for_a_stretch_cover_it_and_what_follows(made, start, length):
    _, order = made
    named = {
        (source, shard)
        for source, shards in order.groups(start, start + length)
        for shard in shards
    }
    assert {row[:2] for row in order.records(start, start + length).rows()} <= named


@given(source_sizes(shares=WHOLE), SEEDS, SEEDS)
def test_another_source_leaves_the_order_within_a_source_alone(sources, seed, other):
    alone = Order(sources[:1], seed=seed, group_shards=2)
    extra = SourceSize("extra", (5, 3))
    joined = Order([extra, *sources], seed=seed, group_shards=2)
    epoch = joined.records(0, joined.epoch_start(1)).rows()
    assert [row[1:] for row in epoch if row[0] == 1] == [
        row[1:] for row in alone.records(0, alone.epoch_start(1)).rows()
    ]


def test_sources_are_dealt_out_evenly():
    sources = [SourceSize("small", (100,)), SourceSize("large", (900,))]
    order = Order(sources, seed=0, group_shards=1)
    for start in range(0, 1000, 50):
        owners = order.records(start, start + 50).source
        assert 4 <= (owners == 0).sum() <= 6


def test_a_fifth_an_epoch_goes_through_everything_once_in_five():
    source = SourceSize("laion", (7, 11, 5, 9), Fraction(1, 5))
    order = Order([source], seed=3, group_shards=2)
    refs = order.records(0, order.epoch_start(5))
    assert Counter(identities(refs)) == Counter(records_of([source]))


def test_epochs_and_seeds_have_orders_of_their_own():
    sources = [SourceSize("web", (40, 40, 40))]
    first, second = (Order(sources, seed=seed, group_shards=2) for seed in (0, 1))
    epochs = [identities(o.records(s, s + 120)) for o in (first, second) for s in (0, 120)]
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert len({tuple(sorted(epoch)) for epoch in epochs}) == 1


def test_samples_are_shuffled_over_the_shards_of_a_group():
    sources = [SourceSize("web", (100,) * 8)]
    refs = Order(sources, seed=0, group_shards=4).records(0, 800)
    halves = [set(refs.shard[:400].tolist()), set(refs.shard[400:].tolist())]
    assert [len(half) for half in halves] == [4, 4]
    assert not halves[0] & halves[1]
    assert len(set(refs.shard[:20].tolist())) == 4


def test_a_billion_records_cost_no_table():
    source = SourceSize("web", (10_000,) * 100_000)
    tracemalloc.start()
    order = Order([source], seed=0, group_shards=16)
    refs = order.records(700_000_000, 700_002_880)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(refs.rows())) == 2880
    assert peak < 100 * 2**20


def test_a_source_without_records_is_refused():
    with pytest.raises(ValueError, match="'web' has no records"):
        Order([SourceSize("web", (0, 0))], seed=0, group_shards=1)


# The numbers that draws give are part of what a resumed run relies on.


def test_draws_belong_to_their_subject_for_ever():
    assert draw(2, "sample", 7, "key").tolist() == [0.4512698246079857, 0.9314820931201354]
    assert permutation(6, "records", 0).tolist() == [5, 4, 0, 2, 3, 1]
    assert hash63("image", "web", "000000001") == 8431006862086247447


def test_draws_are_uniform():
    numbers = np.concatenate([draw(50, "sample", number) for number in range(2000)])
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts, _ = np.histogram(numbers, bins=20, range=(0, 1))
    assert np.abs(counts - 5000).max() < 5 * 70  # five standard deviations
