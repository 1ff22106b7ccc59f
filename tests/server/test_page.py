"""The page's files: what they are served with, and what they must not contain."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from server.auth import PUBLIC_PATHS
from server.page_routes import FOLDER, PAGE
from tests.server.conftest import MakeClient

TEXTS = {name: (FOLDER / name).read_text() for name in PAGE.values()}
SCRIPTS = {name: text for name, text in TEXTS.items() if name.endswith(".js")}
# Ways to make markup or code of a text.
DANGEROUS = re.compile(
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|\bFunction\(|"
    r"createContextualFragment|setTimeout\(\s*[\"'`]|srcdoc|javascript:|setHTML"
)
OUTSIDE = re.compile(r"(?:https?:)?//[\w.-]+\.\w+")


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


TAGS = Tags(TEXTS["index.html"]).found
IDS = {attributes["id"] for _, attributes in TAGS if "id" in attributes}


async def test_every_file_comes_without_a_key_and_with_a_strict_policy(
    make_client: MakeClient,
) -> None:
    client = make_client(api_keys=("first-key",))
    for path, name in PAGE.items():
        response = await client.get(path)
        assert response.text == TEXTS[name]
        policy = response.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; ")
        assert "unsafe" not in policy and "*" not in policy and "http" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"
    assert (await client.get("/")).headers["content-type"] == "text/html; charset=utf-8"
    assert (await client.get("/page/app.js")).headers["content-type"].startswith("text/javascript")
    assert (await client.get("/status")).status_code == 401
    for path in ("/page", "/page/", "/page/../auth.py", "/page/index.html"):
        assert (await client.get(path)).status_code == 401


def test_every_file_of_the_folder_is_served_and_nothing_else_is_public() -> None:
    assert {file.name for file in FOLDER.iterdir()} == set(PAGE.values())
    assert PUBLIC_PATHS - PAGE.keys() == {"/live", "/ready", "/health", "/ping"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_texts_never_become_markup(name: str) -> None:
    assert DANGEROUS.search(SCRIPTS[name]) is None


@pytest.mark.parametrize("name", [name for name in TEXTS if name != "icon.svg"])
def test_nothing_is_fetched_from_elsewhere(name: str) -> None:
    assert OUTSIDE.search(TEXTS[name]) is None


def test_the_document_keeps_to_its_own_policy() -> None:
    for tag, attributes in TAGS:
        assert not any(name.startswith("on") or name == "style" for name in attributes), tag
        assert tag != "style"
        assert tag != "script" or attributes["src"] in PAGE
        if tag == "link":
            assert attributes["href"] in PAGE


def test_every_field_and_meter_has_a_name() -> None:
    labelled = {attributes["for"] for tag, attributes in TAGS if tag == "label"}
    for tag, attributes in TAGS:
        if tag in {"input", "textarea", "select"}:
            assert attributes["id"] in labelled
        if tag in {"meter", "progress"}:
            assert attributes["aria-label"]


def test_scripts_speak_of_what_is_there() -> None:
    for name, text in SCRIPTS.items():
        for asked in re.findall(r'(?:byId|say|showMeter)\("([^"]+)"', text):
            assert asked in IDS, (name, asked)
        for module in re.findall(r'from "\./([^"]+)"', text):
            assert f"/page/{module}" in PAGE, (name, module)
