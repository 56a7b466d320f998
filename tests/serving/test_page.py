"""The page for trying adapters, as a browser shows it."""

import shutil

import pytest

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


def test_two_adapters_answer_side_by_side_with_their_routes(served, browser):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get(served[1].replace("http://", f"http://anybody:{KEYS['two']}@"))
    browser.get(served[1])  # a browser that was asked for the key has none in its address
    wait = WebDriverWait(browser, 60)
    boxes = wait.until(lambda b: b.find_elements(By.CSS_SELECTOR, "#models input"))
    assert [box.get_attribute("value") for box in boxes] == ["base", "art", "law", "math"]
    for box in boxes:
        if box.is_selected() != (box.get_attribute("value") in ("art", "law")):
            box.click()
    prompt = browser.find_element(By.ID, "prompt")
    prompt.clear()
    prompt.send_keys("Compute 12 + 30.")  # the random model ends some answers early, not this one's
    browser.find_element(By.ID, "tokens").clear()
    browser.find_element(By.ID, "tokens").send_keys("12")
    wording = browser.find_element(By.ID, "wording")
    wording.send_keys("as it is")
    browser.find_element(By.ID, "send").click()
    wait.until(lambda b: len(b.find_elements(By.CSS_SELECTOR, "table.route:not([hidden])")) == 2)
    wait.until(lambda b: b.find_element(By.ID, "send").is_enabled())
    articles = browser.find_elements(By.TAG_NAME, "article")
    assert [article.find_element(By.TAG_NAME, "h2").text for article in articles] == ["art", "law"]
    for article in articles:
        assert article.find_element(By.CLASS_NAME, "text").text
        assert "12 tokens in" in article.find_element(By.CLASS_NAME, "used").text
        rows = article.find_elements(By.CSS_SELECTOR, "tbody tr")
        assert len(rows) == 4
        assert all(len(row.find_elements(By.TAG_NAME, "td")) == 7 for row in rows)
    problems = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert [entry for entry in problems if "favicon" not in entry["message"]] == []
