"""The Korean guide is in step with its English source: headings, code, figures, pictures."""

import re

import pytest

from test_docs import ROOT, blocks, prose

TRANSLATED = sorted((ROOT / "docs/ko").glob("*.md"))
LANGUAGES = ("python", "bash", "console")


def slug(heading):
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def source(path):
    return ROOT / "docs" / path.name


def table_rows(path):
    rows = re.findall(r"^\|(.*)\|$", prose(path), re.M)
    return [re.findall(r"[+−-]?\d[\d.,]*\d|\d", row) for row in rows]


def test_what_the_guide_has():
    names = {path.name for path in TRANSLATED}
    assert names == {"index.md", "alpha.md", "cost.md", "theory-in-brief.md"}


@pytest.mark.parametrize("path", TRANSLATED, ids=lambda path: path.name)
def test_headings_stand_under_the_names_of_the_english_ones(path):
    english = re.findall(r"^(##+) (.*)$", prose(source(path)), re.M)
    korean = re.findall(r'^<a id="([^"]+)"></a>\n(##+) .*[가-힣]', prose(path), re.M)
    assert korean == [(slug(heading), level) for level, heading in english]
    assert len(re.findall(r"^##+ ", prose(path), re.M)) == len(korean)


@pytest.mark.parametrize("path", TRANSLATED, ids=lambda path: path.name)
@pytest.mark.parametrize("language", LANGUAGES)
def test_code_is_the_same(path, language):
    assert blocks(path, language) == blocks(source(path), language)


@pytest.mark.parametrize("path", TRANSLATED, ids=lambda path: path.name)
def test_figures_of_tables_are_the_same(path):
    # The last table of the start leads to pages, and may lead to others.
    if path.name != "index.md":
        assert table_rows(path) == table_rows(source(path))


@pytest.mark.parametrize("path", TRANSLATED, ids=lambda path: path.name)
def test_pictures_are_the_same(path):
    pictures = r"!\[[^]]*\]\((?:\.\./)?([^)]*)\)"
    found = re.findall(pictures, prose(path))
    assert found == re.findall(pictures, prose(source(path)))


@pytest.mark.parametrize("path", TRANSLATED, ids=lambda path: path.name)
def test_as_many_paragraphs(path):
    def paragraphs(page):
        text = re.sub(r"^<a id=.*\n", "", prose(page), flags=re.M)
        return len([part for part in re.split(r"\n\n+", text.strip()) if part])

    assert paragraphs(path) == paragraphs(source(path))


@pytest.mark.parametrize("path", TRANSLATED, ids=lambda path: path.name)
def test_it_is_korean(path):
    text = re.sub(r"^(\||<a).*$|`[^`]*`|\([^)]*\)", "", prose(path), flags=re.M)
    assert len(re.findall(r"[가-힣]", text)) > len(re.findall(r"[A-Za-z]", text))
