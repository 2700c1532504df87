"""The playground page in a real browser. Skipped without selenium, chromium and chromedriver."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

from small_server import readable_model, serving

import serve
from data.sequences import SPECIALS
from data.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from selenium.webdriver.remote.webelement import WebElement

webdriver = pytest.importorskip("selenium.webdriver")
Keys = webdriver.Keys
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
if not CHROMIUM or not DRIVER:
    pytest.skip("needs chromium and chromedriver", allow_module_level=True)

FLAGS = (
    "headless no-sandbox disable-gpu disable-quic disable-dev-shm-usage no-first-run disable-background-networking "
    "disable-component-update disable-sync hide-scrollbars"
)


@pytest.fixture(scope="module")
def url(shards) -> Iterator[str]:
    """The address of a server whose model fills in the middle."""
    tokenizer = load_tokenizer(str(shards.path / "bpe.json"))
    with serving(readable_model(tokenizer), tokenizer.with_specials(SPECIALS), verify=serve.verify) as server:
        yield f"http://127.0.0.1:{server.port}/"


class Page:
    """The page in a browser, with the few things that tests do and ask."""

    def __init__(self, driver: webdriver.Chrome, url: str) -> None:
        self.driver, self.url = driver, url

    def open(self, width: int = 1280) -> None:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get(self.url)
        self.wait(lambda: "parameters" in self["model"].text)

    def __getitem__(self, name: str) -> WebElement:
        return self.driver.find_element("id", name)

    def wait(self, condition: Callable[[], object]) -> None:
        end = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < end, f"waited in vain; the page says {self['status'].text!r}"
            time.sleep(0.05)

    def run(self, script: str) -> object:
        return self.driver.execute_script(script)

    def type(self, *keys: str) -> None:
        self["editor"].send_keys(*keys)

    def wait_for_grey_text(self) -> str:
        self.wait(lambda: self["status"].text.startswith("Tab accepts"))
        return self["ghost"].get_property("textContent")

    @property
    def text(self) -> str:
        return self["editor"].get_property("value")

    @property
    def focused(self) -> WebElement:
        return self.driver.switch_to.active_element

    def complaints(self) -> list[str]:
        """What the console has said since last asked: exceptions and breaches of the policy. The browser notes each
        answer with an error status there, too; those do not count."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["source"] != "network"]


@pytest.fixture(scope="module")
def browser(url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    folder = tmp_path_factory.mktemp("playground")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS.split(), f"user-data-dir={folder / 'profile'}"]:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield Page(driver, url)
    driver.quit()


@pytest.fixture
def page(browser: Page) -> Iterator[Page]:
    """The page, freshly opened. Whatever a test does, it must leave no error in the console."""
    browser.open()
    yield browser
    assert browser.complaints() == []
    browser.run("localStorage.clear()")


def test_typing_shows_grey_text_and_tab_accepts_exactly_it(page: Page) -> None:
    page.type(Keys.CONTROL, Keys.END, Keys.NULL, "# add a and b\n    ")
    typed, grey = page.text, page.wait_for_grey_text()
    assert grey and page["sheet"].get_property("textContent") == typed + grey + "\n"
    page.type(Keys.TAB)
    assert page.text == typed + grey and page["ghost"].text == ""
    assert page.focused == page["editor"]
    page.type(Keys.CONTROL, "z", Keys.NULL)
    assert page.text == typed


def test_in_the_middle_of_the_text_the_grey_text_stands_at_the_cursor(page: Page) -> None:
    page.type(Keys.CONTROL, Keys.HOME, Keys.NULL, "x")
    typed, grey = page.text, page.wait_for_grey_text()
    assert page["sheet"].get_property("textContent") == "x" + grey + typed[1:] + "\n"
    page["accept"].click()
    assert page.text == "x" + grey + typed[1:]


def test_escape_drops_the_grey_text_and_tab_then_leaves_the_editor(page: Page) -> None:
    page.type("x")
    page.wait_for_grey_text()
    typed = page.text
    page.type(Keys.ESCAPE)
    assert page["ghost"].get_property("textContent") == ""
    page.type(Keys.TAB)
    assert page.text == typed and page.focused != page["editor"]


def test_dark_mode_is_remembered_after_a_reload(page: Page) -> None:
    def colour() -> str:
        return page.run("return getComputedStyle(document.body).backgroundColor")

    before = colour()
    assert page["theme"].text == "Dark mode"
    page["theme"].click()
    after = colour()
    assert after != before and page["theme"].text == "Light mode"
    page.open()
    assert colour() == after


def test_an_error_appears_at_the_setting_it_is_about_and_is_announced_below_the_button(page: Page) -> None:
    page.open(375)
    page["temperature"].clear()
    page["temperature"].send_keys("9")
    page["complete"].click()
    page.wait(lambda: page.driver.find_elements("class name", "error"))
    error, said = page["temperature-error"], page["status"]
    assert "temperature" in error.text and said.text == error.text
    assert said.get_attribute("role") == "status"
    assert page["temperature"].get_attribute("aria-describedby") == error.get_attribute("id")
    assert 0 < error.rect["y"] - page["temperature"].rect["y"] < 60
    assert 0 < said.rect["y"] - page["complete"].rect["y"] < 150
    page["temperature"].send_keys(Keys.BACKSPACE, "1")
    assert not page.driver.find_elements("class name", "error") and not said.text
    page["complete"].click()
    assert page.wait_for_grey_text()


@pytest.mark.parametrize("n_lines", [5, 60])
def test_grey_text_below_the_fold_is_scrolled_into_view_unless_that_hides_the_cursor(page: Page, n_lines: int) -> None:
    grey = "".join(f"\n    line {i}" for i in range(n_lines))
    page.run(f"chunks = async function* () {{ yield {{ choices: [{{ index: 0, text: {grey!r} }}] }}; }}")
    page["auto"].click()
    page.type(Keys.CONTROL, Keys.END, Keys.NULL, "x = 1\n" * 60 + "y")
    page["complete"].click()
    assert page.wait_for_grey_text() == grey
    lines = "const lines = [...document.getElementById('ghost').getClientRects()];"
    box = "const box = document.getElementById('paper').getBoundingClientRect();"
    above, below = page.run(f"{lines} {box} return [lines[0].top - box.top, box.bottom - lines.at(-1).bottom]")
    assert above >= 0 and (below >= 0 if n_lines == 5 else above < 10)


def test_keyboard_alone_reaches_the_alternatives_of_a_token(page: Page) -> None:
    page.type("x")
    page.wait_for_grey_text()
    page.type(Keys.ESCAPE)
    for _ in range(10):
        page.focused.send_keys(Keys.TAB)
        if page.focused.get_attribute("role") == "option":
            break
    first = page.focused
    first.send_keys(Keys.ARROW_RIGHT)
    assert page.focused != first and page.focused.get_attribute("aria-describedby") == "tip"
    assert page["tip"].is_displayed() and page["tip"].text.count("%") > 2
    page.focused.send_keys(Keys.ESCAPE)
    assert not page["tip"].is_displayed()


@pytest.mark.parametrize("width", [375, 768, 1280])
def test_nothing_overflows_horizontally(page: Page, width: int) -> None:
    page.open(width)
    page.run("document.getElementById('n').value = 3")
    page["complete"].click()
    page.wait_for_grey_text()
    page.run("[...document.querySelectorAll('.token')].at(-1).focus()")
    assert page["tip"].is_displayed()
    assert page.run("return document.scrollingElement.scrollWidth") == width
    # nothing is cut off either: all but the editor, which scrolls, ends within the window
    wide = "e => !e.closest('#paper') && e.getBoundingClientRect().right > innerWidth"
    assert page.run(f"return [...document.body.querySelectorAll('*')].filter({wide}).length") == 0
