"""An expression is one repeatable condition over a caption, or an error before the run."""

import duckdb
import pytest
from select_corpora import (
    commit,
    human,
    kept_of,
    ledger_of,
    raw_row,
    reasons_of,
    synthetic,
    web,
)

from pipeline.corpus import Corpus
from pipeline.sample import ShardError
from pipeline.select import MissingScoresError, Selector
from pipeline.selection.config import SelectConfig
from pipeline.selection.expression import COLUMNS, ExpressionError, SqlCondition

CAPTIONS = [
    web("a red car", itm=0.4, itc=0.30, clip=0.31),
    synthetic("a car", 0, itm=0.9, itc=0.35, clip=0.22),
    synthetic("the side of a red car", 1, itm=0.7, itc=0.25, clip=0.28),
]


def judge(folder, expression, captions=CAPTIONS, **row):
    corpus = Corpus(str(folder))
    raw, scored = commit(corpus, [(raw_row("000000000", **row), captions)])
    selector = Selector(corpus, SelectConfig(policy="expression", expression=expression))
    (found,) = ledger_of(corpus, selector.select(raw, scored).record)
    return found


@pytest.mark.parametrize(
    ("expression", "kept"),
    [
        ("itm >= 0.5", ["a car", "the side of a red car"]),
        ("itm > 0.3 AND clip > 0.25", ["the side of a red car", "a red car"]),
        ("origin = 'web'", ["a red car"]),
        ('"index" = 1', ["the side of a red car"]),
        ("index = 0", ["a car", "a red car"]),
        ("text LIKE '%red%' OR itc BETWEEN 0.34 AND 0.36",
         ["a car", "the side of a red car", "a red car"]),
        ("text NOT LIKE '%red%'", ["a car"]),
        ("length(text) > 5 AND text ~ '^a .*car$'", ["a red car"]),
        ("num_tokens = 7", ["a car", "the side of a red car"]),
        ("CASE WHEN origin = 'web' THEN clip > 0.3 ELSE itm > 0.8 END", ["a car", "a red car"]),
        ("itm >= 0.5 -- and a remark", ["a car", "the side of a red car"]),
        ("itm >= 0.5 /* and\n another */\n", ["a car", "the side of a red car"]),
        ("width >= 256 AND original_height = 600 AND itm > 0.8", ["a car"]),
        ("extra->>'$.LICENSE' = 'cc0' AND itm > 0.8", ["a car"]),
        ("json_extract_string(extra, '$.LICENSE') IN ('cc0', 'cc1') AND itm > 0.8", ["a car"]),
        ("CAST(extra->>'$.similarity' AS DOUBLE) > 0.2 AND itm > 0.8", ["a car"]),
        ("source = 'web' AND url LIKE 'http://host/%' AND key = '000000000' AND itm > 0.8",
         ["a car"]),
        ("NULL::BOOLEAN", []),
        ("itm > NULL", []),
        ("true", ["a car", "the side of a red car", "a red car"]),
    ],
)  # fmt: skip
def test_a_caption_is_kept_where_the_condition_is_true(tmp_path, expression, kept):
    row = judge(tmp_path, expression, extra={"LICENSE": "cc0", "similarity": 0.25})
    assert kept_of(row) == kept
    others = {each["text"] for each in CAPTIONS} - set(kept)
    assert reasons_of(row) == dict.fromkeys(others, "expression_not_true")


def test_human_captions_pass_every_expression(tmp_path):
    assert kept_of(judge(tmp_path, "itm > 0.99", [human("h", itm=0.1)])) == ["h"]


def test_what_is_compared_is_what_would_be_kept(tmp_path):
    row = judge(tmp_path, "text = 'mail <EMAIL>'", [web("mail a@b.de")])
    assert kept_of(row) == ["mail <EMAIL>"]


@pytest.mark.parametrize(
    ("expression", "problem"),
    [
        ("", "SELECT clause without selection list"),
        ("itm >", "syntax error"),
        ("itm > 0.5)", "syntax error"),
        ("itm > 0.5; DROP TABLE captions", "Only SELECT statements"),
        ("true; SELECT true", "more than one statement"),
        ("DELETE FROM captions", "more than an expression"),
        ("true, false", "more than an expression"),
        ("true AS kept", "more than an expression"),
        ("true FROM read_csv('/etc/passwd')", "more than an expression"),
        ("true FROM captions", "more than an expression"),
        ("true WHERE true", "more than an expression"),
        ("true LIMIT 1", "more than an expression"),
        ("true UNION SELECT true", "more than an expression"),
        ("DISTINCT true", "more than an expression"),
        ("(SELECT true)", "subquery is not allowed"),
        ("itm > (SELECT max(itm) FROM captions)", "subquery is not allowed"),
        ("text IN (SELECT content FROM read_text('/etc/passwd'))", "subquery is not allowed"),
        ("EXISTS (SELECT 1)", "subquery is not allowed"),
        ("*", "star is not allowed"),
        ("itm > ?", "parameter is not allowed"),
        ("itm > $limit", "parameter is not allowed"),
        ("row_number() OVER () > 1", "window is not allowed"),
        ("sum(itm) > 1", r"sum\(\) is no function of one row's values"),
        ("random() < itm", r"random\(\) is no function"),
        ("now() > '2020-01-01'", r"now\(\) is no function"),
        ("read_text('/etc/passwd') IS NOT NULL", r"read_text\(\) is no function"),
        ("getenv('HOME') = ''", r"getenv\(\) is no function"),
        ("current_setting('memory_limit') = ''", r"current_setting\(\) is no function"),
        ("nextval('s') > 1", r"nextval\(\) is no function"),
        ("itmm > 0.5", '"itmm" not found'),
        ("captioner = 'x'", '"captioner" not found'),
        ("other.itm > 0.5", '"other" not found'),
        ("itm", "it gives FLOAT, not true or false"),
        ("text", "it gives VARCHAR, not true or false"),
        ("NULL", 'it gives "NULL", not true or false'),
        ("42", "it gives INTEGER, not true or false"),
        ("text > 0.5 + 'x'", "explicit cast is required"),
    ],
)
def test_what_is_no_condition_is_refused_with_the_columns_there_are(expression, problem):
    with pytest.raises(ExpressionError, match=problem) as caught:
        SqlCondition(expression)
    assert all(name in str(caught.value) for name in COLUMNS)


def test_it_is_refused_when_the_selector_is_made(tmp_path):
    config = SelectConfig(policy="expression", expression="itmm > 0.5")
    with pytest.raises(ExpressionError):
        Selector(Corpus(str(tmp_path)), config)


def test_it_knows_which_columns_it_reads():
    condition = SqlCondition("ITM > 0.5 AND (clip IS NULL OR length(text) > 3)")
    assert condition.columns == {"itm", "clip", "text"}
    assert condition.scores == ("itm", "clip")


def test_a_score_that_was_never_given_is_named(tmp_path):
    with pytest.raises(MissingScoresError, match="has no itc scores, which policy 'expression'"):
        judge(tmp_path, "itc > 0.3", [web("w", itm=0.9)])


def test_a_score_that_is_missing_here_and_there_is_the_expressions_to_bear(tmp_path):
    captions = [web("w", itm=0.9), synthetic("s")]
    assert kept_of(judge(tmp_path / "1", "itm > 0.5", captions)) == ["w"]
    assert kept_of(judge(tmp_path / "2", "itm > 0.5 OR itm IS NULL", captions)) == ["w", "s"]


def test_a_value_that_makes_it_fail_fails_the_shard_and_names_it(tmp_path):
    with pytest.raises(
        ShardError, match=r"captions/web/00000, samples 000000000 .*Conversion Error"
    ):
        judge(tmp_path, "CAST(text AS DOUBLE) > 1", [web("no number")])


def test_what_evaluates_it_can_reach_nothing():
    connection = SqlCondition("true")._connection
    for statement in (
        "SELECT * FROM read_text('/etc/passwd')",
        "COPY (SELECT 1) TO '/tmp/x.csv'",
        "ATTACH '/tmp/x.db'",
        "INSTALL httpfs",
        "SET threads = 4",
        "SET enable_external_access = true",
    ):
        with pytest.raises(duckdb.Error):
            connection.execute(statement)
