"""Progress is quiet and parseable in a log, and honest about what was already there."""

import io

from jobs.progress import StageCount, Stretch, stage_meter, stage_meters


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_line_says_how_far_how_fast_how_well_and_how_long():
    count = StageCount("download", 1_000, "rows")
    count.add(250, 200)
    assert count.line(10.0) == (
        "download: 250/1,000 rows (25%), 25.0 rows/s, 80.0% kept, 0:00:30 left"
    )


def test_rows_done_before_count_as_reached_but_not_towards_the_rate():
    count = StageCount("download", 1_000, "rows", resumed=500)
    count.add(100, 100)
    assert count.line(10.0) == (
        "download: 600/1,000 rows (60%), 10.0 rows/s, 100.0% kept, 0:00:40 left"
    )


def test_a_finished_or_empty_stage_has_no_time_left():
    assert StageCount("download", 0, "rows").line(0.0) == "download: 0/0 rows (100%), 0.0 rows/s"


def test_a_log_gets_one_last_line_and_no_control_characters():
    stream = io.StringIO()
    with stage_meter("download", 10, unit="rows", stream=stream) as meter:
        meter.advance(10, 9)
    (line,) = stream.getvalue().splitlines()
    assert line.startswith("download: 10/10 rows (100%), ")
    assert "\x1b" not in line


def test_a_terminal_gets_a_bar():
    stream = Terminal()
    with stage_meter("download", 10, unit="rows", stream=stream) as meter:
        meter.advance(10, 9)
    assert "10/10" in stream.getvalue()
    assert "90.0% kept" in stream.getvalue()


STAGES = [Stretch("download", 10, resumed=5), Stretch("score", 10)]


def test_several_stages_have_a_line_each_in_their_order():
    stream = io.StringIO()
    with stage_meters(STAGES, unit="rows", stream=stream) as meters:
        meters["score"].advance(2, 1)
        meters["download"].advance(5, 4)
    first, second = stream.getvalue().splitlines()
    assert first.startswith("download: 10/10 rows (100%), ")
    assert second.startswith("score: 2/10 rows (20%), ")


def test_several_stages_have_a_bar_each():
    stream = Terminal()
    with stage_meters(STAGES, unit="rows", stream=stream) as meters:
        meters["score"].advance(2, 1)
    assert "5/10" in stream.getvalue()
    assert "2/10" in stream.getvalue()


def test_rows_of_a_shard_that_came_to_nothing_are_taken_back():
    count = StageCount("download", 10, "rows")
    count.add(3, 2)
    count.add(-3, -2)
    assert count.line(1.0) == "download: 0/10 rows (0%), 0.0 rows/s"
