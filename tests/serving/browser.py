"""Chromium without a window, driven by selenium. Tests that need it are skipped where it is missing."""

import contextlib
import shutil

import pytest

PROGRAMS = ("chromium", "chromedriver")


@contextlib.contextmanager
def browser(width=1100, height=760, dark=False):
    webdriver = pytest.importorskip("selenium.webdriver", reason="the page is tested by selenium")
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        pytest.skip(f"the page is tested in a browser: {', '.join(missing)} is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    flags = ["--headless=new", "--no-sandbox", "--disable-dev-shm-usage", f"--window-size={width},{height}"]
    for flag in [*flags, "--hide-scrollbars", *["--force-dark-mode"] * dark]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()
