"""The report in a real browser: nothing in the console, nothing asked of the network, no page wider than a phone."""

import re
from dataclasses import replace

import pytest

from pipeline.commands import report
from stages.evaluate.scoring import Prediction
from tests.browser import Browser, find_browser
from tests.made_runs import EVIL, LABELS, add_evaluation, make_run, six_answers

pytestmark = pytest.mark.skipif(find_browser() is None, reason="no Chromium is installed (apt-get install chromium)")

PHONE_PX, DESKTOP_PX = 400, 1200
LVU_TASKS = ["relationship", "way_speaking", "scene", "director", "genre", "writer", "year"]
LONG = "a-name-without-any-place-where-a-line-could-be-broken-" * 3


def many_answers():
    """Forty windows of ten videos, with long texts from the data in every place that shows some."""
    for index in range(40):
        gold = LABELS[index % 3]
        answers = (LABELS[index % 2], LONG if index % 5 == 0 else "two people", gold, "", "friend")
        yield Prediction(
            f"{LONG}{index}",
            f"{LONG}{index % 10}",
            "relation",
            f"who? {EVIL}",
            gold,
            answers,
            (-0.1 - index, *[-50.0] * 4),
        )


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(find_browser(), tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Two runs beside each other and the paper, one of them with a long name."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [make_run(folder, name, missing=("v7",)) for name in ("first", LONG[:120])]
    for run in runs:
        add_evaluation(run, predictions=list(many_answers()))
        add_evaluation(run, "val")
    return report.run([run.path for run in runs], folder / "report.html", paper=True)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [PHONE_PX, DESKTOP_PX])
def test_the_page_is_quiet_asks_for_nothing_and_fits(browser, page, theme, width):
    browser.open(page, width=width, theme=theme)
    assert browser.complaints() == []
    # Besides the page itself, only what it carries within: its icon and pictures.
    assert [url for url in browser.requests() if not url.startswith("data:")] == [page.as_uri()]
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    assert browser.evaluate("document.title").endswith("Diff-LMM report")


def test_what_is_too_wide_scrolls_inside_its_own_frame(browser, page):
    browser.open(page, width=PHONE_PX)
    frames = browser.evaluate(
        "[...document.querySelectorAll('.scroll')].map(one => [one.scrollWidth, one.clientWidth, one.tabIndex])"
    )
    assert all(shown <= PHONE_PX for _, shown, _ in frames)
    assert any(whole > shown for whole, shown, _ in frames)
    assert all(index == 0 for _, _, index in frames)  # so that the keyboard can scroll it
    outside = browser.evaluate(
        "[...document.querySelectorAll('main *')].filter(one => !one.closest('.scroll, pre, svg')"
        f" && one.getBoundingClientRect().right > {PHONE_PX} + 1).map(one => one.outerHTML.slice(0, 80))"
    )
    assert outside == []


def test_the_name_of_a_task_is_one_line_beside_its_numbers(browser, tmp_path):
    run = make_run(tmp_path, "first")
    rows = [replace(row, task=task, sample=task + row.sample) for task in LVU_TASKS for row in six_answers()]
    add_evaluation(run, predictions=rows, labels=dict.fromkeys(LVU_TASKS, LABELS))
    browser.open(report.run([run.path], tmp_path / "report.html"), width=PHONE_PX)
    lines = browser.evaluate(
        "[...document.querySelectorAll('#accuracy .numbers tbody th')].map(name => { const range = new Range();"
        " range.selectNodeContents(name); return [name.innerText, range.getClientRects().length]; })"
    )
    assert lines == [[task, 1] for task in LVU_TASKS]


COLOURS = """(selector => {
  const inked = document.querySelector(selector);
  let behind = inked;
  while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
  const ink = getComputedStyle(inked), filled = inked.closest("svg") ? ink.fill : ink.color;
  return [filled, getComputedStyle(behind).backgroundColor];
})"""


def test_light_and_dark_look_different_and_both_can_be_read(browser, page):
    pictures = {}
    for theme, is_dark in (("light", False), ("dark", True)):
        browser.open(page, width=DESKTOP_PX, theme=theme)
        pictures[theme] = browser.screenshot()
        assert (luminance(browser.evaluate("getComputedStyle(document.body).backgroundColor")) < 0.1) == is_dark
        for selector in (
            "p",
            ".detail",
            "nav a",
            ".eyebrow",
            "figure text",
            ".notrun small",
            ".notices",
            ".card dt",
            "pre",
        ):
            ink, behind = map(luminance, browser.evaluate(f"{COLOURS}({selector!r})"))
            contrast = (max(ink, behind) + 0.05) / (min(ink, behind) + 0.05)
            assert contrast >= 4.5, (theme, selector, contrast)  # WCAG 2, level AA
    assert pictures["light"] != pictures["dark"]


def test_hostile_text_is_shown_and_not_run(browser, page):
    browser.open(page, width=DESKTOP_PX)
    assert browser.evaluate("document.scripts.length") == 0
    assert EVIL in browser.evaluate("document.querySelector('.confusion').innerText")
    assert EVIL in browser.evaluate("document.querySelector('.examples').innerText")


def test_the_browser_would_notice_what_these_tests_forbid(browser, page, tmp_path):
    """A page that does all of it: complains, asks the network, and is too wide."""
    source = page.read_text(encoding="utf-8")
    source = re.sub(r"<meta http-equiv[^>]*>", "", source)
    bad = "<script>console.error('oh')</script><img src='http://127.0.0.1:9/x.png'><div style='width: 3000px'>x</div>"
    (tmp_path / "bad.html").write_text(source.replace("</main>", bad + "</main>"), encoding="utf-8")
    browser.open(tmp_path / "bad.html", width=PHONE_PX)
    assert any("oh" in str(one) for one in browser.complaints())
    assert "http://127.0.0.1:9/x.png" in browser.requests()
    assert browser.evaluate("document.documentElement.scrollWidth") > PHONE_PX


def luminance(colour):
    """Relative luminance of a CSS `rgb(r, g, b)`, 0 to 1 (WCAG 2)."""
    shares = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (share / 12.92 if share <= 0.03928 else ((share + 0.055) / 1.055) ** 2.4 for share in shares)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
