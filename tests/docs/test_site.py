"""The documentation site: it builds strictly, lists every page and needs no other server."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.commands import ROOT
from tools import docs_site, docs_stage


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("documentation") / "site"
    docs_site.build(folder)
    return folder


def test_every_link_leads_somewhere_and_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    assert docs_site.problems(site) == []
    pages = {str(path.relative_to(site)) for path in site.rglob("*.html")}
    assert {"index.html", "reference/settings.html", "CHANGELOG.html"} <= pages


def test_linked_files_of_the_repository_are_pages(site: Path) -> None:
    shown = (site / "source/keel_megatron/architecture/residual.py.html").read_text()
    assert "hyper_connections" in shown


def test_every_page_is_in_the_navigation() -> None:
    assert docs_site.unlisted() == []
    nav = docs_site.CONFIG.read_text()
    assert docs_site.unlisted(nav.replace("      - Data: data.md\n", "")) == [
        "data.md is not in the nav of mkdocs.yml"
    ]
    assert docs_site.unlisted(nav + "      - Other: other.md\n      - data.md\n") == [
        "mkdocs.yml: data.md is listed twice",
        "mkdocs.yml: other.md does not exist",
    ]


def test_what_a_reader_would_find_broken_is_found(tmp_path: Path) -> None:
    (tmp_path / "there.html").write_text('<h2 id="here">Here</h2>')
    (tmp_path / "page.html").write_text(
        '<a href="there.html#here"></a><a href="there.html#gone"></a><a href="gone.html"></a>'
        '<a href="https://example.org"></a><img src="https://example.org/a.png">'
        '<script src="//cdn.example.org/a.js"></script><link rel="icon" href="gone.svg">'
    )
    (tmp_path / "page.css").write_text("a { background: url(https://example.org/b.png) }")
    assert docs_site.problems(tmp_path) == [
        "page.html: loads //cdn.example.org/a.js",
        "page.html: gone.html does not exist",
        "page.html: gone.svg does not exist",
        "page.html: loads https://example.org/a.png",
        "page.html: there.html#gone: no such heading",
        "page.css: loads https://example.org/b.png",
    ]


def test_an_error_of_the_builder_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page that links to one that does not exist, as the builder itself finds it."""

    def stage(out: Path) -> None:
        out.mkdir()
        (out / "index.md").write_text("# Title\n\n[a page](gone.md)\n")

    monkeypatch.setattr(docs_site, "stage", stage)
    with pytest.raises(SystemExit, match="gone"):
        docs_site.build(tmp_path / "site")


def test_a_list_after_a_paragraph_is_a_list(tmp_path: Path) -> None:
    """As on GitHub; the builder's Markdown wants a blank line."""
    text = "Some words:\n- one\n- two\n\n```\nwords\n- code\n```\n"
    assert docs_stage.with_lists(text) == text.replace(":\n- one", ":\n\n- one")


def test_the_root_of_the_repository_has_the_pages_that_are_listed() -> None:
    assert all((ROOT / name).is_file() for name in docs_stage.PROJECT)
