"""A headless Chromium for the tests that look at pages; skips, with the reason, where there is none."""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


@contextmanager
def chromium():
    """A playwright browser: the one that ``I2AM_BROWSER`` names, the first on the path, or playwright's own."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install i2am[test]")
    program = os.environ.get("I2AM_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)
    with sync_api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        except sync_api.Error as error:
            pytest.skip(f"no Chromium: {str(error).splitlines()[0]}")
        yield browser
        browser.close()
