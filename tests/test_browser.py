"The site of the tiny book in a real browser, each page visited once."

import functools
import http.server
import os
import shutil
import threading

import pytest
from bs4 import BeautifulSoup
from build_site import number
from common import listed, rooms

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
BACK_MATTER = ["book/glossary", "book/references"]
PAGES = ["index", *(f"nbs/{name}" for name in listed()), *BACK_MATTER]
NUMBERED_ROOMS = [room for room in rooms() if number(room)]
FIGURES = """async () => {
    const images = [...document.querySelectorAll('article img')];
    images.forEach(image => image.loading = 'eager');
    await Promise.all(images.map(image => image.decode().catch(() => {})));
    return images.map(image => image.naturalWidth) }"""
PHONE = """() => [
    document.documentElement.scrollWidth,
    parseFloat(getComputedStyle(document.querySelector('article p')).fontSize)]"""

SEARCH = """words => {  // again on the same page, without the summary of each page found
    document.getElementById('search-results').replaceChildren();
    DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
    Search.performSearch(words) }"""


@pytest.fixture(scope="module")
def address(tiny):
    "The site behind a web server on this machine."

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=tiny / "_build" / "html")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def chromium():
    if not CHROMIUM:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(
            "no Chromium on this machine: install chromium to test the site in a browser"
        )
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--disable-background-networking",
            ],
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def tab(chromium, address):
    """A tab; when the last test has used it, no error was logged and nothing was asked from
    elsewhere."""
    context = chromium.new_context(viewport={"width": 1280, "height": 900})
    page, wrong = context.new_page(), []
    page.on(
        "console",
        lambda message: wrong.append(message.text) if message.type == "error" else None,
    )
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on(
        "requestfailed",
        lambda request: (
            wrong.append(f"failed: {request.url}")
            if "ERR_ABORTED" not in str(request.failure)
            else None
        ),
    )
    page.on(
        "request",
        lambda request: (
            wrong.append(f"elsewhere: {request.url}")
            if not request.url.startswith((address, "data:", "blob:"))
            else None
        ),
    )
    yield page
    context.close()
    assert not wrong


@pytest.fixture
def browse(tab, address):
    "A function that opens a page."

    def visit(path, width=1280):
        tab.set_viewport_size({"width": width, "height": 900})
        tab.goto(f"{address}/{path}", wait_until="load")
        return tab

    return visit


@pytest.fixture(scope="module")
def tour(tab, address) -> dict[str, dict]:  # page -> what was seen there
    "From the landing page through the book by its `next` links, wide and on a phone."
    seen = {}
    tab.goto(f"{address}/index.html", wait_until="load")
    while True:
        tab.set_viewport_size({"width": 1280, "height": 900})
        figures = tab.evaluate(FIGURES)
        formulas = tab.locator("span.math, div.math").count()
        if formulas:
            tab.wait_for_selector("mjx-container", timeout=20_000)
        tab.set_viewport_size({"width": 390, "height": 900})
        width, letters = tab.evaluate(PHONE)
        path = tab.url.removeprefix(f"{address}/").removesuffix(".html")
        assert path not in seen, f"{path}: the book goes round in a circle"
        seen[path] = {"figures": figures, "formulas": formulas,
                      "width": width, "letters": letters}
        if not tab.locator("a.right-next").count():
            return seen
        with tab.expect_navigation(wait_until="load"):
            tab.locator("a.right-next").click()


def test_next_leads_through_the_book(tour):
    assert list(tour) == PAGES


def test_figures_load_and_formulas_are_set(tour):
    assert all(all(seen["figures"]) for seen in tour.values()), tour
    assert sum(len(seen["figures"]) for seen in tour.values()) >= 15
    assert any(seen["formulas"] for seen in tour.values())


def test_no_page_scrolls_sideways_on_a_phone(tour):
    assert {path: seen["width"] for path, seen in tour.items() if seen["width"] > 390} == {}
    small = {path: seen["letters"] for path, seen in tour.items() if seen["letters"] < 14}
    assert small == {}, "letters that nobody can read"


def test_previous_leads_back(browse, address):
    tab = browse(f"{BACK_MATTER[-1]}.html")
    tab.click("a.left-prev")
    tab.wait_for_url(f"{address}/{BACK_MATTER[-2]}.html")


def test_a_long_file_name_is_wrapped_on_a_phone(browse):
    tab = browse("nbs/03_transfer.html", width=390)
    widest = tab.evaluate("""Math.max(...[
        ...document.querySelectorAll('article .cell_output :is(p, li)')].map(text => {
        text.append(' mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_224_no_top.h5')
        return text.scrollWidth - text.clientWidth
    }))""")
    assert widest == 0


def test_search_finds_a_word(browse):
    tab = browse("search.html?q=quantization")
    tab.wait_for_selector("#search-results li a", timeout=20_000)
    assert any("07" in text for text in tab.locator("#search-results li a").all_text_contents())


def test_search_finds_each_room_by_its_title(browse, tiny):
    tab = browse("search.html?q=quantization")
    tab.wait_for_selector("#search-results li a", timeout=20_000)
    assert NUMBERED_ROOMS
    for name in NUMBERED_ROOMS:
        page = (tiny / "_build" / "html" / "nbs" / f"{name}.html").read_text()
        title = BeautifulSoup(page, "html.parser").select_one("article h1").find(string=True)
        assert title.startswith(f"{number(name)} · ")
        tab.evaluate(SEARCH, title.partition(" · ")[2])
        tab.wait_for_selector(f"#search-results li a[href*='{name}.html']", timeout=20_000)


def test_folded_code_opens(browse):
    tab = browse("nbs/10_report.html")
    folded = tab.locator("details.hide").first
    assert not folded.locator("pre").first.is_visible()
    folded.locator("summary").click()
    assert folded.locator("pre").first.is_visible()


def test_confusion_matrix_answers_below_itself(browse):
    for width in (1280, 390):
        tab = browse("nbs/05_evaluation.html", width=width)
        tab.mouse.move(0, 0)
        assert tab.locator("table.cm td > span:visible").count() == 0
        tab.locator("table.cm td:has(span)").last.hover()
        answer, matrix = (
            tab.locator("table.cm td > span:visible"),
            tab.locator("table.cm:has(td > span)").last,
        )
        assert answer.count() == 1 and " called " in answer.inner_text()
        assert (
            answer.bounding_box()["y"]
            >= matrix.bounding_box()["y"] + matrix.bounding_box()["height"] - 1
        ), "it hides no cell"
