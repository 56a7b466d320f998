"""The page for trying adapters, as a browser shows it."""

import re
import shutil

import pytest

from tests.models import WITH_TOKENIZER
from tests.serving.harness import KEYS, client_of

BROWSER, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))


def test_the_page_needs_a_key_and_loads_nothing_from_elsewhere(served, client):
    for path, kind in (("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "text/javascript")):
        with client_of(served, "") as stranger:
            answer = stranger.get(path)
            assert answer.status_code == 401
            assert answer.headers["WWW-Authenticate"].startswith("Basic")
        answer = client.get(path)
        assert answer.headers["Content-Type"].startswith(kind)
        assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
        assert "http://" not in answer.text
        assert "https://" not in answer.text
    assert client.get("/page").status_code == 404
    assert client.get("/../serve.py").status_code == 404
    basic = client.get("/", headers={"Authorization": ""}, auth=("anybody", KEYS["one"]))
    assert basic.status_code == 200
    served[0].admission.wrong_keys.clear()


@pytest.fixture
def browser(tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium drives the browser")
    if not (BROWSER and DRIVER):
        pytest.skip("no chromium and chromedriver on the path")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-background-networking", "disable-sync"):
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path / 'profile'}")
    options.add_argument("--window-size=1200,1100")
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()
    driver.service.stop()


class Page:
    """The page in a browser, open on a server with a tenant's key."""

    def __init__(self, browser, url, key):
        from selenium.webdriver.common.by import By
        from selenium.webdriver.support.ui import WebDriverWait

        self.browser, self.by, self._wait = browser, By, WebDriverWait(browser, 60)
        browser.get(url.replace("http://", f"http://anybody:{key}@"))
        browser.get(url)  # a browser that was asked for the key has none in its address
        self.boxes = self._wait.until(lambda b: b.find_elements(By.CSS_SELECTOR, "#models input"))

    def choose(self, *models):
        for box in self.boxes:
            if box.is_selected() != (box.get_attribute("value") in models):
                box.click()

    def fill(self, name, text):
        field = self.browser.find_element(self.by.ID, name)
        if field.tag_name != "select":
            field.clear()
        field.send_keys(text)

    def press(self, name="send"):
        self.browser.find_element(self.by.ID, name).click()
        self._wait.until(lambda b: b.find_element(self.by.ID, "send").is_enabled())

    def texts(self, selector):
        return [found.text for found in self.browser.find_elements(self.by.CSS_SELECTOR, selector)]

    def no_problems(self):
        problems = [entry for entry in self.browser.get_log("browser") if entry["level"] == "SEVERE"]
        return [entry for entry in problems if "favicon" not in entry["message"]] == []


def test_two_adapters_answer_side_by_side_with_their_routes(served, browser):
    from selenium.webdriver.common.by import By

    page = Page(browser, served[1], KEYS["two"])
    assert [box.get_attribute("value") for box in page.boxes] == ["base", "art", "law", "math"]
    page.choose("art", "law")
    page.fill("prompt", "Compute 12 + 30.")  # the random model ends some answers early, not this one's
    page.fill("tokens", "12")
    page.fill("wording", "as it is")
    page.press()
    articles = browser.find_elements(By.TAG_NAME, "article")
    assert [article.find_element(By.TAG_NAME, "h2").text for article in articles] == ["art", "law"]
    for article in articles:
        assert article.find_element(By.CLASS_NAME, "text").text
        assert "12 tokens in" in article.find_element(By.CLASS_NAME, "used").text
        rows = article.find_elements(By.CSS_SELECTOR, "tbody tr")
        assert len(rows) == WITH_TOKENIZER.num_layers
        assert all(len(row.find_elements(By.TAG_NAME, "td")) == 7 for row in rows)
    assert page.no_problems()


def test_a_chat_goes_on_turn_by_turn(served, browser):
    """The second turn holds the first, and what the prefix cache had of it is told."""
    page = Page(browser, served[1], KEYS["many"])
    page.choose("base")
    page.fill("tokens", "2")
    page.fill("wording", "chat")
    questions = ["What is 3 * 9? " * 4 + "Well?", "2 * 2?"]
    for question in questions:
        page.fill("prompt", question)
        page.press()
    assert page.texts(".asked") == questions
    first, second = page.texts(".used")
    assert "cached" not in first
    assert re.search(r"; \d+ of \d+ prompt tokens cached", second)
    page.press("fresh")
    assert page.texts("article") == []
    assert page.no_problems()
