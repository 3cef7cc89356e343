"""Each rule drops what it says, masks what it says, and leaves human captions alone."""

import pytest
from pydantic import ValidationError
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
from pipeline.select import Selector
from pipeline.selection.config import RulesConfig, SelectConfig

GOOD = "two dogs run on the beach"


def judge(folder, captions, rules, policy="web_only", **row):
    """Return the clean ledger's row of an image with these captions."""
    corpus = Corpus(str(folder))
    raw, scored = commit(corpus, [(raw_row("000000000", **row), captions)])
    config = SelectConfig(policy=policy, rules=rules)
    (found,) = ledger_of(corpus, Selector(corpus, config).select(raw, scored).record)
    return found


def reason_of(folder, text, rules):
    """Return why a caption of the web is dropped, empty where it is kept."""
    return judge(folder, [web(text)], rules)["captions"][0]["reason"]


TABLES = {
    "length": (
        {"min_words": 3, "max_words": 6, "min_chars": 8, "max_chars": 40},
        {
            "a big dog": "",
            "a dog": "too_short",
            "a b c": "too_short",
            "  a\tdog\n ": "too_short",
            "one two three four five six": "",
            "one two three four five six seven": "too_long",
            "three very-long-words-that-have-far-too-many characters": "too_long",
        },
    ),
    "boilerplate": (
        {},
        {
            GOOD: "",
            "IMG_1234.JPG": "file_name",
            "dsc_0042": "file_name",
            "DSC00042.jpeg": "file_name",
            "my holiday photo (1).png": "file_name",
            "Screenshot 2020-01-02 10.30.40": "file_name",
            "WhatsApp Image 2021-03-04 at 10.30.11 AM": "file_name",
            "photo 12": "file_name",
            "000001234": "file_name",
            "d41d8cd98f00b204e9800998ecf8427e": "file_name",
            "123e4567-e89b-12d3-a456-426614174000": "file_name",
            "12 / 2019": "file_name",
            "Image": "boilerplate",
            "  [LOGO]  ": "boilerplate",
            "Stock photo.": "boilerplate",
            "Click to enlarge the picture of a dog": "boilerplate",
            "Image may contain: dog, outdoor": "boilerplate",
            "NO   IMAGE  AVAILABLE": "boilerplate",
            "a dog in front of a logo": "",
            "the photo of a dog 12": "",
            "clicking here and there": "",
            "a scanned page": "",
            "decade facade accede": "",
        },
    ),
    "characters": (
        {},
        {
            GOOD: "",
            "Zwei Hunde rennen über den Strand": "",
            "две собаки бегут по пляжу": "other_script",
            "两只狗在海滩上奔跑": "other_script",
            "a dog 两只狗在海滩上奔跑": "other_script",
            "two dogs 狗": "",
            "$$$ 50% OFF 1999-2020 #1": "few_letters",
            "12345": "few_letters",
            "!!!": "few_letters",
            "❤️🐶❤️🐶": "few_letters",
            "हिन्दी में एक वाक्य": "other_script",
        },
    ),
    "repetition": (
        {},
        {
            GOOD: "",
            "dog dog dog dog": "repetition",
            "Dog dog DOG cat": "repetition",
            "dog cat dog cat": "",
            "dog dog dog": "",
            "wow!!!!!": "",
            "wow!!!!!!": "repetition",
            "a line ---------- of dashes": "repetition",
            "spaces      are no run": "",
            "哈哈哈哈哈哈": "repetition",
        },
    ),
}


@pytest.mark.parametrize("rule", TABLES)
def test_a_rule_drops_what_its_table_says_and_nothing_else(tmp_path, rule):
    parameters, table = TABLES[rule]
    captions = [web(text, index=number) for number, text in enumerate(table)]
    row = judge(tmp_path, captions, {rule: parameters, "pii": None})
    assert {each["text"]: each["reason"] for each in row["captions"]} == table


@pytest.mark.parametrize("rule", TABLES)
def test_a_rule_that_is_off_drops_nothing(tmp_path, rule):
    captions = [web(text, index=number) for number, text in enumerate(TABLES[rule][1])]
    row = judge(tmp_path, captions, {"pii": None})
    assert kept_of(row) == list(TABLES[rule][1])


def test_characters_may_be_of_several_scripts(tmp_path):
    rules = {"characters": {"scripts": ["Latin", "Cyrillic"]}}
    assert reason_of(tmp_path / "1", "две собаки", rules) == ""
    assert reason_of(tmp_path / "2", "两只狗在海滩上奔跑", rules) == "other_script"


MASKED = {
    "write to jane.doe+x@mail.example.org now": ("write to <EMAIL> now", "email"),
    "MAIL@HOST.COM": ("<EMAIL>", "email"),
    "call +49 (30) 1234567 today": ("call <PHONE> today", "phone"),
    "call +1-555-123-4567": ("call <PHONE>", "phone"),
    "Tel. 555-123-4567": ("Tel. <PHONE>", "phone"),
    "(555) 123-4567 plumbers": ("<PHONE> plumbers", "phone"),
    "Tel 030 1234 5678": ("Tel <PHONE>", "phone"),
    "0049 170 1234567": ("<PHONE>", "phone"),
    "a@b.de or 555.123.4567": ("<EMAIL> or <PHONE>", "email,phone"),
    "a@b.de, c@d.fr": ("<EMAIL>, <EMAIL>", "email"),
    # No one's address or number.
    "@handle and a @ b": ("@handle and a @ b", ""),
    "1920 x 1080 pixels": ("1920 x 1080 pixels", ""),
    "season 2019-2020": ("season 2019-2020", ""),
    "on 2020-01-02 at 10:30": ("on 2020-01-02 at 10:30", ""),
    "$1,000,000 for 3.14159": ("$1,000,000 for 3.14159", ""),
    "ISBN 978-3-16-148410-0": ("ISBN 978-3-16-148410-0", ""),
    "model 1234567890": ("model 1234567890", ""),
}


def test_addresses_and_numbers_are_masked_and_nothing_else(tmp_path):
    captions = [web(text, index=number) for number, text in enumerate(MASKED)]
    row = judge(tmp_path, captions, {})
    found = [(each["text"], each["masked"]) for each in row["captions"]]
    assert found == list(MASKED.values())
    assert row["num_kept"] == len(MASKED)


def test_masking_can_be_switched_off_in_part_and_whole(tmp_path):
    text = "a@b.de or 555.123.4567"
    phones = judge(tmp_path / "1", [web(text)], {"pii": {"are_emails_masked": False}})
    assert kept_of(phones) == ["a@b.de or <PHONE>"]
    assert kept_of(judge(tmp_path / "2", [web(text)], {"pii": None})) == [text]


def test_duplicates_are_those_of_what_is_kept(tmp_path):
    captions = [web("mail a@b.de", clip=0.3), synthetic("mail c@d.de", clip=0.2)]
    row = judge(tmp_path, captions, {}, policy="blip2")
    assert kept_of(row) == ["mail <EMAIL>"]
    assert reasons_of(row) == {"mail <EMAIL>": "duplicate"}


@pytest.mark.parametrize(
    ("rule", "columns", "reason"),
    [
        ({"image_size": {"min_side_px": 600}}, {}, ""),
        ({"image_size": {"min_side_px": 601}}, {}, "image_too_small"),
        ({"image_size": {"min_side_px": 200}}, {"original_width": None, "original_height": None},
         "image_too_small"),
        ({"image_size": {"max_aspect": 1.34}}, {}, ""),
        ({"image_size": {"max_aspect": 1.33}}, {}, "aspect_too_large"),
        ({"image_size": {"max_aspect": 2.0}}, {"original_height": 2000}, "aspect_too_large"),
        ({"nsfw": {}}, {"extra": {"NSFW": "NSFW"}}, "nsfw"),
        ({"nsfw": {}}, {"extra": {"NSFW": "nsfw "}}, "nsfw"),
        ({"nsfw": {}}, {"extra": {"NSFW": "UNSURE"}}, ""),
        ({"nsfw": {"refused": ["NSFW", "UNSURE"]}}, {"extra": {"NSFW": "UNSURE"}}, "nsfw"),
        ({"nsfw": {}}, {"extra": {"punsafe": 0.51}}, "nsfw"),
        ({"nsfw": {}}, {"extra": {"punsafe": "0.51"}}, "nsfw"),
        ({"nsfw": {}}, {"extra": {"punsafe": 0.5}}, ""),
        ({"nsfw": {}}, {"extra": {"nsfw": True}}, "nsfw"),
        ({"nsfw": {}}, {"extra": {"nsfw": None, "NSFW": ""}}, ""),
        ({"nsfw": {}}, {"extra": None}, ""),
        ({"nsfw": {"columns": ["adult"]}}, {"extra": {"NSFW": "NSFW"}}, ""),
        ({"watermark": {}}, {"extra": {"pwatermark": 0.9}}, "watermark"),
        ({"watermark": {}}, {"extra": {"pwatermark": 0.8}}, ""),
        ({"watermark": {}}, {"extra": {"NSFW": "NSFW"}}, ""),
    ],
)  # fmt: skip
def test_an_image_is_dropped_by_its_size_or_by_what_its_source_says(
    tmp_path, rule, columns, reason
):
    row = judge(tmp_path, [web(GOOD), web("and more", index=1)], rule, **columns)
    assert {each["reason"] for each in row["captions"]} == {reason}
    assert row["reason"] == reason


EVERY_RULE = {name: {} for name in RulesConfig.model_fields} | {"image_size": {"min_side_px": 5000}}


def test_human_captions_pass_every_rule_unchanged(tmp_path):
    texts = ["x", "IMG_1.jpg", "dog dog dog dog", "a@b.de", "собака", "", "!!!!!!!!"]
    captions = [human(text, index) for index, text in enumerate(texts)]
    row = judge(tmp_path, captions, EVERY_RULE, policy="blip2", extra={"NSFW": "NSFW"})
    assert kept_of(row) == texts
    assert {each["masked"] for each in row["captions"]} == {""}
    assert row["verdict"] == "kept"


def test_a_sample_is_dropped_for_the_last_check_that_a_caption_of_it_came_to(tmp_path):
    rules = {"length": {}, "boilerplate": {}, "repetition": {}}
    captions = [web("x", itm=0.9), synthetic("no no no no no", itm=0.9)]
    row = judge(tmp_path / "rules", captions, rules, policy="blip")
    assert row["reason"] == "repetition"
    captions.append(synthetic(GOOD, 1, itm=0.1))
    row = judge(tmp_path / "policy", captions, rules, policy="blip")
    assert row["reason"] == "itm_below_threshold"
    assert {each["reason"] for each in row["captions"]} == {
        "too_short",
        "repetition",
        "itm_below_threshold",
    }


def test_rules_come_before_the_policy_so_that_what_they_drop_takes_no_place(tmp_path):
    captions = [
        web("x", clip=0.9),
        synthetic(GOOD, 0, clip=0.2),
        synthetic("a third one", 1, clip=0.1),
    ]
    row = judge(tmp_path, captions, {"length": {}}, policy="blip2")
    assert kept_of(row) == [GOOD, "a third one"]


def test_hostile_texts_are_judged_in_time_that_is_linear_in_them(tmp_path):
    texts = [
        "a" * 200_000,
        "a@" * 100_000,
        "+1" * 100_000,
        "(0" * 100_000,
        "\u202e\0\x1b[2J" * 20_000,
    ]
    captions = [web(text, index=number) for number, text in enumerate(texts)]
    row = judge(tmp_path, captions, EVERY_RULE | {"image_size": None})
    assert row["num_captions"] == len(texts)


@pytest.mark.parametrize(
    "rules",
    [
        {"lenght": {}},
        {"length": {"min_word": 3}},
        {"length": {"min_words": -1}},
        {"characters": {"scripts": ["latin)"]}},
        {"characters": {"scripts": []}},
        {"nsfw": {"max_probability": 2}},
        {"image_size": {"max_aspect": 0.5}},
    ],
)
def test_wrong_rules_are_refused(rules):
    with pytest.raises(ValidationError):
        SelectConfig(rules=rules)


def test_what_decides_the_bytes_is_listed_and_nothing_else():
    assert SelectConfig(policy="web_only", rules={"pii": None}, top_k=7).content() == {
        "policy": "web_only",
        "rules": {},
    }
    content = SelectConfig(policy="blip2", rules={"length": {"min_words": 4}}).content()
    assert content["top_k"] == 2
    assert content["rules"]["length"]["min_words"] == 4
