"""Every relative link of the pages leads somewhere, and pages and code cite only what a reader can open."""

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "recipes/**/README.md", "experiments/**/*.md", "stages/**/*.md")
    for path in ROOT.glob(pattern)
)
SOURCES = sorted(
    path
    for folder in ("model", "stages", "pipeline", "recipes", "data_manifests", "benchmarks", "experiments", "tests")
    for suffix in ("py", "yaml", "html")
    for path in (ROOT / folder).rglob(f"*.{suffix}")
)
# Working notes that no user has, as files or as bare words of a citation.
NOTES = re.compile(r"\b(?:FACTS|DESIGN|MEASURED)\b|\b(?:HOUSE|BENCHMARKS)\.md\b")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def prose_of(text):
    """A page without its code, fenced or between backticks, and without its indented blocks."""
    text = re.sub(r"^(```|~~~).*?^\1", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"(?<=\n\n)(?: {4}.*\n)+", "", text)
    return re.sub(r"`[^`]*`", "", text)


def slugs_of(text):
    """The anchors that GitHub gives a page's headings."""
    without_code = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    slugs, seen = [], Counter()
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", without_code, flags=re.MULTILINE):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", shown).replace(" ", "-")
        slugs.append(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return slugs


def problem_with(page, target):
    """What is wrong with a link of a page, None if it leads somewhere or out of the project."""
    if re.match(r"[a-z]+:", target):
        return None
    name, _, anchor = target.partition("#")
    there = (page.parent / name).resolve() if name else page
    if not there.exists():
        return "no such file"
    if ROOT not in (there, *there.parents):
        return "leads out of the project"
    if anchor and anchor not in slugs_of(there.read_text(encoding="utf-8")):
        return "no such heading"
    return None


def name_of(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_leads_somewhere(page):
    targets = LINK.findall(prose_of(page.read_text(encoding="utf-8")))
    assert [(target, why) for target in targets if (why := problem_with(page, target))] == []


def test_a_link_to_nowhere_is_found(tmp_path):
    page = ROOT / "docs" / "cache.md"
    assert problem_with(page, "no-such-page.md") == "no such file"
    assert problem_with(page, "cache.md#no-such-heading") == "no such heading"
    assert problem_with(page, str(tmp_path)) == "leads out of the project"
    assert problem_with(page, "#the-feature-cache") is None
    assert problem_with(page, "https://example.org/#anything") is None


def test_headings_become_githubs_anchors():
    page = "# `cache verify`, and *more*\n```\n# no heading\n```\n## Stop & go\n## One [link](x.md)\n## Stop & go\n"
    assert slugs_of(page) == ["cache-verify-and-more", "stop--go", "one-link", "stop--go-1"]


def test_nothing_cites_notes_that_no_user_has():
    cited = [
        f"{name_of(path)}: {found.group()}"
        for path in (*PAGES, *SOURCES)
        if path != Path(__file__)
        for found in NOTES.finditer(path.read_text(encoding="utf-8"))
    ]
    assert cited == []


def test_modules_that_the_architecture_names_exist():
    modules = [f"/{name_of(path)}" for path in SOURCES]
    named = re.findall(r"`([\w/]+\.py)`", (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"))
    assert named
    assert [name for name in named if not any(module.endswith(f"/{name}") for module in modules)] == []


def test_pages_that_code_cites_exist():
    cited = {
        (name_of(path), page)
        for path in SOURCES
        for page in re.findall(r"\b(?:docs|recipes|experiments)/[\w/-]+\.md\b", path.read_text(encoding="utf-8"))
    }
    assert cited
    assert [where for where in sorted(cited) if not (ROOT / where[1]).is_file()] == []
