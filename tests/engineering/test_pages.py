"""The built pages in a real browser, on a desktop and on a phone, without a network.

They need Chromium on PATH (`apt-get install chromium`). Without it the tests are skipped.
"""

import functools
import http.server
import shutil
import threading

import pytest
from playwright.sync_api import sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WIDTHS = {"desktop": (1280, 900), "phone": (390, 844)}

# What a reader would stumble over: a page wider than the screen, a picture that is missing, raw mathematics, a link to
# an anchor that the page does not have.
FAULTS = r"""() => {
  const faults = [], root = document.documentElement;
  if (root.scrollWidth > root.clientWidth) faults.push(`wider than the screen: ${root.scrollWidth}`);
  for (const image of document.images) {
    image.loading = "eager";
    if (!image.complete || !image.naturalWidth) faults.push(`no picture: ${image.src}`);
  }
  for (const math of document.querySelectorAll("math")) {
    if (/\\/.test(math.textContent) || !math.getBoundingClientRect().width) faults.push(`raw: ${math.textContent}`);
  }
  const prose = document.querySelector("article").cloneNode(true);
  prose.querySelectorAll("pre, code, math").forEach((node) => node.remove());
  if (/\$[^$]+\$|\\\(|\\\[/.test(prose.textContent)) faults.push("mathematics that was not rendered");
  return faults;
}"""
LINKS = "() => [...document.querySelectorAll('a[href]')].map((a) => a.href)"
ANCHORS = "() => [...document.querySelectorAll('[id]')].map((node) => node.id)"


@pytest.fixture(scope="module")
def site(built_docs):
    """The address of the pages, served on this machine."""
    handler = functools.partial(Quiet, directory=str(built_docs))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format, *args):
        """Nothing is logged."""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH")
def test_every_page_in_a_browser(site, built_docs):
    """No overflow, no broken link or anchor, no missing picture, no raw formula, no request to another host."""
    faults, links, anchors, elsewhere = {}, {}, {}, set()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for device, (width, height) in WIDTHS.items():
            page = browser.new_page(viewport={"width": width, "height": height})
            page.on("request", lambda request: request.url.startswith(site) or elsewhere.add(request.url))
            for file in sorted(built_docs.rglob("*.html")):
                address = f"{site}/{file.relative_to(built_docs)}"
                if file.parent.parts[-1] == "_modules" or "_modules" in file.parts or file.name == "search.html":
                    continue
                page.goto(address)
                if found := page.evaluate(FAULTS):
                    faults[device, file.name] = found
                links[address], anchors[address] = page.evaluate(LINKS), set(page.evaluate(ANCHORS))
        browser.close()
    assert not faults
    assert not {url for url in elsewhere if not url.startswith("data:")}
    for address, targets in links.items():
        for target in targets:
            if not target.startswith(site):
                continue
            path, _, anchor = target.partition("#")
            file = built_docs / path.removeprefix(f"{site}/")
            assert (file / "index.html" if file.is_dir() else file).exists(), f"{address}: {target}"
            if anchor and path in anchors:
                assert anchor in anchors[path], f"{address}: {target}"
