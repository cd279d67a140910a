"""The page of a deployment in a real browser: headless Chromium looks at the real server.

The nodes are mock nodes, so it is known which of them fail, and why.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

from kadeploy.rights import Right
from tests.support.deploy_web import Site, serving, token_for, write_site

COUNT = 60
STEP_S = 0.2
BOOT_S = 6.0
WAIT_S = 60.0
BROWSER, DRIVER = "chromium", "chromedriver"
# pc013 never comes up; the disk of pc042 is refused; every twentieth does not answer to ssh.
FAILED = ("pc007", "pc013", "pc027", "pc042", "pc047")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which(BROWSER) is None or shutil.which(DRIVER) is None,
        reason="not installed: chromium, chromium-driver",
    ),
]


@contextlib.contextmanager
def browsing(profile: Path) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which(BROWSER))
    for word in (
        "--headless=new",
        "--no-sandbox",  # tests may run as root
        "--disable-dev-shm-usage",
        "--window-size=1400,1000",
        f"--user-data-dir={profile}",
    ):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=str(shutil.which(DRIVER)))
    browser = webdriver.Chrome(options=options, service=service)
    try:
        yield browser
    finally:
        browser.quit()


class Page:
    """What a person does and sees."""

    def __init__(self, browser: webdriver.Chrome) -> None:
        self.browser = browser
        self._wait = WebDriverWait(browser, WAIT_S, poll_frequency=0.1)

    def get(self, selector: str) -> WebElement:
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        """What is seen in elements, all in one moment: the page changes all the time."""
        found: list[str] = self.browser.execute_script(
            "return [...document.querySelectorAll(arguments[0])]"
            ".filter((one) => one.checkVisibility()).map((one) => one.innerText)",
            selector,
        )
        return found

    def until_text(self, selector: str, text: str) -> None:
        def there(_: webdriver.Chrome) -> bool:
            return any(text in one for one in self.texts(selector))

        self._wait.until(there, f"{selector} never said {text!r}")

    def count(self, selector: str) -> int:
        found: int = self.browser.execute_script(
            "return document.querySelectorAll(arguments[0]).length", selector
        )
        return found

    def tile(self, name: str) -> WebElement:
        return self.get(f".tile[data-name={name}]")

    def log_in(self, site: Site, token: str) -> None:
        self.browser.get(f"{site.url}/")
        self.get("#token").send_keys("not a token", Keys.ENTER)
        self.until_text("#wrong", "not valid")
        self.get("#token").send_keys(token, Keys.ENTER)
        self.until_text("#user", "alice")

    def deploy(self, nodes: str) -> None:
        self.get("#new").click()
        self.until_text("#new-environment", "debian12")
        self.get("#new-nodes").send_keys(nodes)
        self.get("#new-go").click()


def test_a_deployment_is_begun_followed_and_explained_on_the_page(tmp_path: Path) -> None:
    site_directory = tmp_path / "site"
    site_directory.mkdir()
    found = write_site(site_directory, COUNT, STEP_S, BOOT_S)
    token = token_for(found, "alice", f"pc[001-{COUNT:03}]", Right.DEPLOY)
    with serving(site_directory, STEP_S) as site, browsing(tmp_path / "profile") as browser:
        page = Page(browser)
        page.log_in(site, token)
        page.deploy("pc[001-061]")
        page.until_text("#new-error", "alice may not deploy pc061")
        page.get("#new-nodes").clear()
        page.get("#new-nodes").send_keys(f"pc[001-{COUNT:03}]")
        page.get("#new-go").click()
        page.until_text("#title", "debian12 version 3")
        assert page.count(".tile") == COUNT
        page.until_text("#steps .macro", "BroadcastEnv")

        # While it runs: the fifty of a window; every tile has a mark and a word, not colour alone.
        page.until_text(".tile", "wait-deployment")
        assert all(page.texts(".tile .mark"))
        assert all(page.texts(".tile .what"))
        browser.save_screenshot(str(tmp_path / "running.png"))

        # To the end, without a reload.
        page.until_text("#times", "took")
        page.until_text(
            "#tally", f"{COUNT - len(FAILED)} of {COUNT} deployed, {len(FAILED)} failed"
        )
        assert page.count(".tile.deployed") == COUNT - len(FAILED)
        _look_at_failures(page)
        _use_the_keyboard(page)

        # Nothing was refused by the browser, and no secret is in what it shows.
        assert token not in browser.page_source
        assert browser.execute_script("return document.cookie") == ""
        log = [
            line for line in browser.get_log("browser") if line["level"] in ("SEVERE", "WARNING")
        ]
        # The one refusal that this test asked for.
        assert [line for line in log if "status of 403" not in line["message"]] == []


def _look_at_failures(page: Page) -> None:
    assert sorted(page.texts("#failures summary")) == [
        "pc007, pc027, pc047 failed: reboot: no answer to ssh",
        "pc013 failed: wait-deployment: no end in time",
        "pc042 failed: prepare-disks: disk system refused",
    ]
    page.get("#filters [data-state=failed]").click()
    seen = [one for one in page.all(".tile") if one.is_displayed()]
    assert [one.get_dom_attribute("data-name") for one in seen] == list(FAILED)
    page.tile("pc042").click()
    page.until_text("#log h3", "pc042")
    page.until_text("#log .failed", "prepare-disks")
    page.until_text("#log .failed", "disk system refused")
    page.get("#log button").click()
    assert not page.get("#log").is_displayed()
    page.get("#filters [data-state='']").click()


def _use_the_keyboard(page: Page) -> None:
    """One stop of the tab key leads into the grid; arrows move, Enter opens, Escape closes."""
    page.browser.execute_script("document.querySelector('.tile[tabindex=\"0\"]').focus()")

    def focused() -> str:
        return str(page.browser.switch_to.active_element.get_dom_attribute("data-name"))

    start = focused()
    page.browser.switch_to.active_element.send_keys(Keys.HOME)
    assert focused() == "pc001", start
    page.browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert focused() == "pc002"
    page.browser.switch_to.active_element.send_keys(Keys.ARROW_DOWN)
    below = page.browser.switch_to.active_element
    assert below.location["x"] == page.tile("pc002").location["x"]
    assert below.location["y"] > page.tile("pc002").location["y"]
    name = focused()
    below.send_keys(Keys.ENTER)
    page.until_text("#log h3", name)
    page.until_text("#log li", "boot-deployment")
    page.browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not page.get("#log").is_displayed()
    assert focused() == name
