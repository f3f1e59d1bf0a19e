"What the site is told: its pages, its bar, its colours."

import re

from conftest import ROOT
from house import NBS, PAGES, markdown, quarto, settings


def listed(contents):
    for entry in contents:
        if isinstance(entry, str):
            yield entry
        elif "href" in entry:
            yield entry["href"]
        else:
            yield from listed(entry["contents"])


def test_the_site_lists_every_page_once():
    assert (NBS / "_quarto.yml").resolve() == ROOT / "_quarto.yml"
    website = quarto()["website"]
    entries = [page for sidebar in website["sidebar"] for page in listed(sidebar["contents"])]
    assert sorted(entries) == sorted(PAGES), (
        f"_quarto.yml lacks {sorted(set(PAGES) - set(entries))}, has in excess {sorted(set(entries) - set(PAGES))}"
    )
    assert {entry["href"] for entry in website["navbar"]["left"]} <= set(PAGES)


def test_the_site_agrees_with_settings():
    website, ours = quarto()["website"], settings()
    assert [website["title"], website["description"], website["repo-url"], website["repo-branch"]] == [
        ours[k] for k in ("title", "description", "git_url", "branch")
    ]
    assert quarto()["project"]["output-dir"] == ours["doc_path"]


def test_the_bar_leads_to_what_a_reader_wants():
    website = quarto()["website"]
    assert [entry["text"] for entry in website["navbar"]["left"]] == ["Start", "Use", "Paper", "Results", "API"]
    assert all(sidebar["collapse-level"] == 1 for sidebar in website["sidebar"])
    assert website["sidebar"][-1]["contents"][-1]["section"] == "Internals"


def test_styles_fetch_nothing():
    style = (NBS / "styles.css").read_text(encoding="utf-8")
    assert not re.findall(r"@import|url\(", style)


def test_pictures_of_the_gallery_lead_to_their_pages():
    text = markdown("gallery.ipynb")
    pictures = re.findall(r"\[!\[([^]]+)\]\(([^)]+)\)\]\(([^)]+)\)", text)
    assert len(pictures) > 9 and text.count("![") == len(pictures)
    assert all((NBS / picture).is_file() and page in PAGES for _, picture, page in pictures)
