"""The page in a real browser: it chats, reads files, stops, copies, repeats, and asks no other host."""

import json
import time

import pytest
import served
from browser import browser
from served import PATIENCE, held, until

from longlora.serving import server

By = pytest.importorskip("selenium.webdriver.common.by", reason="the page is tested by selenium").By
Keys = pytest.importorskip("selenium.webdriver.common.keys").Keys


@pytest.fixture(scope="module")
def driver():
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    with served.serving(tmp_path_factory.mktemp("page") / "tiny", temperature=0.0) as found:
        yield found


@pytest.fixture
def page(driver, running):
    driver.get(running.url)
    wait(lambda: "of 512 tokens" in find(driver, "#used").text)
    yield driver
    problems = [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
    assert [problem for problem in problems if "status of 400" not in problem] == []


def find(driver, selector):
    return driver.find_element(By.CSS_SELECTOR, selector)


def every(driver, selector):
    return driver.find_elements(By.CSS_SELECTOR, selector)


def wait(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.02)


def ask(driver, text, answers=1):
    find(driver, "#text").send_keys(text, Keys.ENTER)
    wait(lambda: len(every(driver, "article.assistant .actions")) == answers)


def limit(driver, tokens):
    find(driver, "#settings").click()
    find(driver, "#longest").send_keys(str(tokens))
    find(driver, "#options .ends button").click()


def test_a_conversation_goes_on_repeats_and_begins_anew(page):
    limit(page, 5)
    ask(page, "hello")
    assert page.switch_to.active_element.get_attribute("id") == "text"  # the next question can be typed
    first = find(page, "#used").text
    ask(page, "and again", 2)
    assert int(first.split()[0]) < int(find(page, "#used").text.split()[0]) < 60
    assert [node.text for node in every(page, "article.user .said")] == ["hello", "and again"]
    assert find(page, "#status").get_attribute("textContent") == "The answer is complete."
    find(page, ".again").click()
    wait(lambda: len(every(page, ".again")) == 1 and not every(page, "[aria-busy]"))
    assert len(every(page, "article")) == 4
    find(page, "#fresh").click()
    assert not every(page, "article") and find(page, "#used").text.startswith("0 of")


def test_a_button_and_a_key_stop_an_answer(page, running, monkeypatch):
    held(monkeypatch, running)
    for stop in (lambda: find(page, "#stop").click(), lambda: find(page, "#text").send_keys(Keys.ESCAPE)):
        find(page, "#text").send_keys("hello", Keys.ENTER)
        until(running, running=1)
        stop()
        until(running, running=0)
        wait(lambda: find(page, "#send").is_displayed())


def test_files_become_material(page, tmp_path):
    limit(page, 2)
    (tmp_path / "facts.md").write_text("Ann is five. " * 10)
    find(page, "#pick").send_keys(str(tmp_path / "facts.md"))
    wait(lambda: every(page, "#files .file"))
    assert find(page, "#files .file").text.split("\n") == ["facts.md", "130 characters"]
    ask(page, "How old is Ann?")
    assert find(page, "article.user .file b").text == "facts.md" and not every(page, "#files .file")
    assert int(find(page, "#used").text.split()[0]) > 130
    (tmp_path / "no.txt").write_bytes(b"\xff\xfe\x00")
    find(page, "#pick").send_keys(str(tmp_path / "no.txt"))
    wait(lambda: every(page, ".error"))
    assert find(page, ".error p").text == "No.txt is not UTF-8 text"


def test_a_conversation_that_is_too_long_drops_its_oldest_turns(page):
    limit(page, 2)
    ask(page, "x" * 300)
    find(page, "#text").send_keys("y" * 300, Keys.ENTER)
    wait(lambda: every(page, ".error"))
    assert "maximum context length of 512 tokens" in find(page, ".error p").text
    find(page, ".error button").click()  # leaves out the oldest turns
    wait(lambda: len(every(page, "article.assistant .actions")) == 2)
    find(page, "#text").send_keys("z" * 600, Keys.ENTER)
    wait(lambda: every(page, ".error"))
    every(page, ".error button")[-1].click()  # take the question back
    assert find(page, "#text").get_attribute("value") == "z" * 600 and len(every(page, "article")) == 4


def test_html_in_an_answer_stays_text(page):
    """Markdown becomes elements, HTML does not."""
    said = "# Title\n\na **bold** `code` <img src=x onerror=alert(1)>\n\n- one\n- two\n\n```\n<b>x</b>\n```"
    page.execute_script("render(arguments[0], arguments[1])", find(page, "#talk"), said)
    tags = [node.tag_name for node in every(page, "#talk *")]
    assert tags == ["h3", "p", "strong", "code", "ul", "li", "li", "pre", "code"]
    assert "<img src=x onerror=alert(1)>" in find(page, "#talk p").text


def test_keyboard_and_screen_reader_reach_everything(page):
    """Every control has a name, the keyboard reaches it, and a reader announces the conversation."""
    assert page.switch_to.active_element.get_attribute("id") == "text"
    for node in every(page, "button, input:not([hidden]), textarea, progress"):
        name = node.accessible_name
        assert name or not node.is_displayed(), node.get_attribute("outerHTML")
    seen = set()
    for _ in range(8):
        page.switch_to.active_element.send_keys(Keys.TAB)
        seen.add(page.switch_to.active_element.get_attribute("id"))
    assert {"settings", "attach", "text"} <= seen
    assert find(page, "#talk").get_attribute("role") == "log" and find(page, "#talk").aria_role == "log"


def test_the_page_asks_no_other_host(page, running, tmp_path):
    ask(page, "hello")
    urls = set()
    for entry in page.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            urls.add(message["params"]["request"]["url"])
    ours = {url for url in urls if url.startswith(running.url)}
    assert f"{running.url}/v1/chat/completions" in ours
    assert all(url.startswith(("data:", "chrome")) for url in urls - ours), urls - ours


def test_the_page_asks_for_the_key(driver, tmp_path):
    with served.serving(tmp_path / "tiny", api_key="secret") as other:
        driver.get(other.url)
        wait(lambda: find(driver, "#locked").is_displayed())
        for key in ("wrong", "secret"):
            find(driver, "#key").send_keys(key, Keys.ENTER)
        wait(lambda: "of 512 tokens" in find(driver, "#used").text)
    driver.get_log("browser")


def test_the_policy_allows_only_its_own_script():
    page, policy = server._page()
    assert b" on" + b"click=" not in page and b" style=" not in page and b"unsafe" not in policy.encode()
    assert policy.count("sha256-") == 2 and "default-src 'none'" in policy and "connect-src 'self'" in policy
