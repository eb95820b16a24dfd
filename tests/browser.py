"""A real browser for pages: Chromium, driven by Playwright, or by its own command line."""

import shutil
from contextlib import contextmanager

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt-get install chromium)")


@contextmanager
def start_browser():
    """Chromium, without a window."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # As root, as CI is, it doesn't start with its sandbox.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def watched_page(browser, **settings):
    """A page that may neither complain, nor open a dialog, nor ask anything of the network, by the end of the block."""
    page = browser.new_page(**settings)
    complaints = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: (complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda request: is_local(request.url) or complaints.append(f"network: {request.url}"))
    try:
        yield page
        assert complaints == []
    finally:
        page.close()


def is_local(url):
    return url.startswith(("file:", "data:", "http://127.0.0.1:", "http://localhost:"))
