"""The page in a real browser: it asks the network nothing, nothing hostile acts, all works."""

import contextlib
import json
import re
import shutil
from pathlib import Path

import pytest
from report_corpora import HOSTILE, build

from pipeline.corpus import Corpus
from pipeline.report.build import build_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
MAX_PAGE_BYTES = 5 * 2**20

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium here (apt-get install chromium)"
)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A corpus of three sources whose captions, hosts and files beside it are hostile too."""
    folder = tmp_path_factory.mktemp("page")
    made, _ = build(
        folder / "pets", {"laion": [120, 90], "cc3m": [60], "coco": [30]}, texts=HOSTILE
    )
    other, _ = build(folder / "strict", {"laion": [120, 90], "cc3m": [60]}, threshold=0.8)
    (folder / "pets/report").mkdir()
    (folder / "pets/report/ablation.json").write_text(
        json.dumps({"description": HOSTILE[0], "rows": [{HOSTILE[1]: HOSTILE[2], "TR@1": 0.5}]})
    )
    (folder / "pets/train/stage1").mkdir(parents=True)
    (folder / "pets/train/stage1/metrics.jsonl").write_text(
        "".join(
            json.dumps({"step": s, "loss": 9 / (s + 1), HOSTILE[0]: s}) + "\n" for s in range(9)
        )
    )
    build_report(made, compare=other)
    return made


class Visit:
    """A page that is open, and what it complained of or asked for."""

    def __init__(self, page, path):
        self.page, self.problems, self.requests = page, [], []
        page.on("console", lambda message: self.problems.append(message.text))
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("request", self._note)
        page.on("dialog", lambda dialog: (self.problems.append("dialog"), dialog.dismiss()))
        page.goto(f"file://{path}")
        page.wait_for_function("document.querySelectorAll('.plot > svg').length > 3")

    def _note(self, request):
        if not request.url.startswith("data:"):
            self.requests.append(request.url)


@contextlib.contextmanager
def visit(browser, corpus, width=1280, height=900, **options):
    context = browser.new_context(viewport={"width": width, "height": height}, **options)
    context.set_default_timeout(60_000)
    try:
        yield Visit(context.new_page(), f"{corpus.root}/report/index.html")
    finally:
        context.close()


@pytest.fixture(scope="module")
def opened(browser, corpus):
    with visit(browser, corpus) as visited:
        yield visited


@pytest.fixture
def page(opened):
    opened.page.reload()
    opened.page.wait_for_function("document.querySelectorAll('.plot > svg').length > 3")
    return opened.page


def test_the_page_loads_without_complaint_and_asks_the_network_nothing(browser, corpus):
    with visit(browser, corpus) as opened:
        assert opened.problems == []
        assert opened.requests == [f"file://{corpus.root}/report/index.html"]


def test_every_chart_is_drawn(page):
    empty = page.eval_on_selector_all(
        "[data-chart]",
        "all => all.filter(c => c.clientWidth && !c.querySelector('svg'))"
        ".map(c => c.dataset.chart)",
    )
    assert empty == []


def test_the_page_is_small_enough_to_send(corpus):
    assert Path(corpus.root, "report/index.html").stat().st_size < MAX_PAGE_BYTES


def test_nothing_hostile_ran_and_all_of_it_is_text(page):
    assert page.evaluate("window.pwned") is None
    text = page.locator("body").text_content()
    for shown in (
        "<script>window.pwned = 1</script>",
        '"><img src=x onerror="window.pwned = 1">',
        "{{ 7 * 7 }} {% include '/etc/passwd' %}",
        "javascript:window.pwned=1",
        "<!-- comment --> ]]> &lt;b&gt;",
        "nul ⟨U+0000⟩ bell ⟨U+0007⟩ escape ⟨U+001B⟩[31mred",
        "a cat ⟨U+202E⟩gnp.exe⟨U+202C⟩",
        "line⟨U+2028⟩separator⟨U+2029⟩paragraph⏎break⇥tab",
    ):
        assert shown in text, shown


def test_no_character_of_a_stranger_can_hide_or_turn_text_around(corpus):
    html = Path(corpus.root, "report/index.html").read_text(encoding="utf-8")
    outside_of_libraries = re.sub(r"(?s)<script>.*?</script>", "", html)
    bad = "[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]"
    assert re.findall(bad, outside_of_libraries) == []


def test_elements_are_ours_alone(page):
    """No tag, handler, style or link of a stranger became one."""
    assert (
        page.locator("img:not(.picture img), iframe, object, embed, base, form[action]").count()
        == 0
    )
    assert page.locator("script").count() == 2
    handlers = page.evaluate(
        "[...document.querySelectorAll('*')].flatMap(e => [...e.attributes])"
        ".filter(a => a.name.startsWith('on')).length"
    )
    assert handlers == 0
    links = page.eval_on_selector_all("a", "all => all.map(a => a.getAttribute('href'))")
    assert all(re.match(r"#[a-z]+$|https?://[a-z]", link) for link in links)


def test_the_policy_stops_a_script_that_slipped_in(page):
    """What the escaping is for, should it ever fail: nothing but our own block may run."""
    policy = page.get_attribute("meta[http-equiv]", "content")
    assert "unsafe" not in policy
    assert policy.startswith("default-src 'none'")
    page.evaluate(
        "() => { const s = document.createElement('script'); s.textContent = 'window.pwned = 1';"
        "document.body.append(s);"
        "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.pwned=1\">');"
        "return new Promise(r => setTimeout(r, 200)); }"
    )
    assert page.evaluate("window.pwned") is None


def kept_by(cells, origins, itm, clip):
    return sum(
        count
        for _, origin, i, c, count in cells
        if origins[origin] == "human" or (i >= itm and c >= clip)
    )


@pytest.fixture
def joint(corpus):
    return json.loads(Path(corpus.root, "report/report.json").read_text())["explorer"]


def result_of(page):
    return int(re.search(r"([\d,]+) of", page.inner_text("#t-result"))[1].replace(",", ""))


def test_the_explorer_counts_by_keyboard(page, joint):
    page.focus("#t-itm")
    for _ in range(7):
        page.keyboard.press("ArrowRight")
    page.focus("#t-clip")
    for _ in range(12):
        page.keyboard.press("ArrowRight")
    lowest = min(cell[3] for cell in joint["cells"])
    assert page.inner_text("#o-itm") == "0.64"
    assert page.inner_text("#o-clip") == f"{(lowest + 12) / 100:.2f}"
    assert result_of(page) == kept_by(joint["cells"], joint["origins"], 32, lowest + 12)


def test_the_explorer_counts_one_source_and_origin(page, joint):
    page.select_option("#t-source", label="laion")
    for origin in joint["origins"]:
        if origin != "web":
            page.get_by_role("checkbox", name=origin).uncheck()
    laion, web = joint["sources"].index("laion"), joint["origins"].index("web")
    cells = [cell for cell in joint["cells"] if cell[0] == laion and cell[1] == web]
    assert result_of(page) == kept_by(cells, joint["origins"], 25, -100)
    assert f"of {sum(c[-1] for c in cells):,} captions" in page.inner_text("#t-result")


def test_the_explorer_follows_a_click_into_its_map(page, joint):
    chart = page.locator("[data-chart=explorer] svg")
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    page.mouse.click(box["x"] + 0.75 * box["width"], box["y"] + 0.5 * box["height"])
    itm, clip = (float(page.inner_text(f"#{name}")) for name in ("o-itm", "o-clip"))
    assert 0.6 < itm < 0.85
    expected = kept_by(joint["cells"], joint["origins"], round(itm * 50), round(clip * 100))
    assert result_of(page) == expected


def test_the_gallery_is_filtered_by_keyboard_and_by_words(page):
    items = "#gallery-list > li:visible"
    page.get_by_role("radio", name="all").focus()
    page.keyboard.press("ArrowRight")
    assert page.is_checked("input[name=group][value=kept]")
    assert {i.get_attribute("data-group") for i in page.locator(items).all()} == {"kept"}
    page.get_by_role("radio", name="dropped").check()
    dropped = page.locator(items).count()
    assert dropped
    assert page.inner_text("#g-count").startswith(f"{dropped} ")
    page.get_by_role("radio", name="all").check()
    page.fill("#g-text", "window.PWNED script")
    shown = page.locator(items).all_text_contents()
    assert shown
    assert all("window.pwned" in text and "script" in text for text in shown)
    page.fill("#g-text", "no caption says this")
    assert page.locator(items).count() == 0
    assert page.inner_text("#g-count") == "0 shown"


def test_more_of_the_gallery_is_shown_on_request(page):
    before = page.locator("#gallery-list > li:visible").count()
    page.click("#g-more")
    after = page.locator("#gallery-list > li:visible").count()
    assert after > before
    assert page.evaluate("document.activeElement.parentElement.id") == "gallery-list"


def test_thumbnails_are_pictures(page):
    widths = page.eval_on_selector_all(".picture img", "all => all.map(i => i.naturalWidth)")
    assert len(widths) > 20
    assert all(0 < width <= 176 for width in widths)


def test_the_theme_can_be_chosen(page):
    colour = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(colour)
    page.click("#theme")
    assert page.evaluate(colour) == light
    page.click("#theme")
    assert page.inner_text("#theme") == "Theme: dark"
    assert page.evaluate(colour) != light


@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (1600, "light")])
def test_it_is_accessible_and_fits_with_all_its_details_open(browser, corpus, width, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="no axe here")
    with visit(browser, corpus, width, color_scheme=scheme) as opened:
        page = opened.page
        page.eval_on_selector_all("details", "all => all.forEach(d => { d.open = true; })")
        found = axe.Axe().run(page).response["violations"]
        assert [(v["id"], v["nodes"][0]["html"][:200]) for v in found] == []
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert opened.problems == []


def test_it_prints_in_light_colours_without_its_controls(browser, corpus):
    with visit(browser, corpus, color_scheme="dark") as opened:
        opened.page.emulate_media(media="print", color_scheme="dark")
        colour = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert colour == "rgb(255, 255, 255)"
        assert not opened.page.is_visible("nav")
        assert not opened.page.is_visible("#gallery-form")


def test_every_section_of_the_contents_is_there(page):
    targets = page.eval_on_selector_all("nav a", "all => all.map(a => a.hash.slice(1))")
    assert len(targets) > 9
    assert [t for t in targets if page.locator(f"section#{t}").count() != 1] == []


@pytest.mark.parametrize("stages", [1, 2])
def test_a_partial_corpus_loads_without_complaint(browser, tmp_path, stages):
    corpus, _ = build(tmp_path / "partial", {"laion": [20]}, stages=stages)
    build_report(corpus)
    with visit(browser, corpus) as opened:
        assert opened.problems == []
        assert "Not all is there" in opened.page.inner_text("main")


def test_an_empty_corpus_loads_without_complaint(browser, tmp_path):
    corpus = Corpus(str(tmp_path / "empty"))
    build_report(corpus)
    context = browser.new_context()
    page, problems = context.new_page(), []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(f"file://{corpus.root}/report/index.html")
    assert "No shard has been downloaded yet." in page.inner_text("main")
    context.close()
    assert problems == []
