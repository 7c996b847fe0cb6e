"""Make the screenshots of the documents anew: the demo's page, and the page for people at the admin listener.

    .venv/bin/python docs/images/make.py [DIRECTORY]

It starts the demo with two workers, sends some requests, and takes both pages with Chromium, which playwright drives.
DIRECTORY is where the pictures go, this directory if none is given. With ``--looks`` each page is taken in four sizes,
light and dark, also in other states; these pictures are to be looked at, and are not for the documents.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

HERE = Path(__file__).resolve().parent
FLASKD = [sys.executable, "-m", "flaskd"]
SIZES = {"phone": (390, 844), "tablet": (768, 1024), "desktop": (1280, 800), "wide": (1920, 1080)}
CONFIG = """
server: {listen: "127.0.0.1:8000", workers: 2, threads: 6, instance: web-1}
admin: {listen: "127.0.0.1:9090"}
"""
SITE, ADMIN = "http://127.0.0.1:8000/", "http://127.0.0.1:9090/"
WIDTH = 900
_PATIENCE = 60.0


def ask(path: str) -> None:
    """Ask the app for a page; a drain may refuse it."""
    with contextlib.suppress(OSError), urllib.request.urlopen(SITE + path, timeout=_PATIENCE) as answer:
        answer.read()


def visit(over: threading.Event) -> None:
    """Be some visitors, now more and now fewer, until it is over."""
    while not over.wait(0.06 + 0.04 * math.sin(time.monotonic() / 4)):
        ask("count")


@contextlib.contextmanager
def demo() -> Iterator[Any]:
    """Serve the demo in a directory of its own; gives what runs commands of flaskd."""
    with tempfile.TemporaryDirectory(prefix="flaskd-pictures-") as directory:
        Path(directory, "flaskd.yaml").write_text(CONFIG, encoding="ascii")
        env = {name: value for name, value in os.environ.items() if not name.startswith("FLASK")}
        for name in ("run", "state"):
            Path(directory, name).mkdir(mode=0o700)
        env |= {"RUNTIME_DIRECTORY": f"{directory}/run", "STATE_DIRECTORY": f"{directory}/state"}
        serve = [*FLASKD, "serve", "flaskd.demo:app", "-c", "flaskd.yaml"]
        process = subprocess.Popen(serve, cwd=directory, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

        def run(*arguments: str) -> int:
            return subprocess.run(
                [*FLASKD, *arguments], cwd=directory, env=env, capture_output=True, check=False
            ).returncode

        try:
            until = time.monotonic() + _PATIENCE
            while run("ready") != 0:
                if process.poll() is not None or time.monotonic() > until:
                    raise SystemExit("the demo did not become ready; are the ports 8000 and 9090 free?")
            yield run
        finally:
            process.terminate()
            process.wait(_PATIENCE)


def look(page: Any, name: str, directory: Path) -> None:
    """Take a page in all sizes, light and dark."""
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for size, (width, height) in SIZES.items():
            page.set_viewport_size({"width": width, "height": height})
            page.wait_for_timeout(300)
            page.screenshot(path=directory / f"{name}-{size}-{scheme}.png", full_page=True)
    page.emulate_media(color_scheme="light")
    page.set_viewport_size({"width": WIDTH, "height": 720})


def take(page: Any, last: str, file: Path) -> None:
    """Take a page from its top to the end of one of its parts."""
    box = page.locator(last).bounding_box()
    height = box["y"] + box["height"] + 14
    page.screenshot(path=file, full_page=True, clip={"x": 0, "y": 0, "width": WIDTH, "height": height})


def main() -> None:
    """Take the pictures."""
    arguments = [each for each in sys.argv[1:] if each != "--looks"]
    directory = Path(arguments[0]) if arguments else HERE
    looks = "--looks" in sys.argv
    directory.mkdir(parents=True, exist_ok=True)
    over = threading.Event()
    threads = [threading.Thread(target=visit, args=[over]) for _ in range(3)]
    with demo() as flaskd, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        site, admin = (browser.new_page(viewport={"width": WIDTH, "height": 720}) for _ in range(2))
        admin.goto(ADMIN)
        for each in threads:
            each.start()
        threads += [threading.Thread(target=ask, args=[f"slow?seconds={each}"]) for each in (50, 52, 54)]
        for each in threads[3:]:
            each.start()
        site.goto(SITE)
        site.get_by_role("button").first.click()
        site.wait_for_timeout(40_000)  # so that the page for people has rates to draw
        take(site, "section:has-text('Upload')", directory / "demo.png")
        take(admin, "section:has-text('Requests in flight')", directory / "page.png")
        if looks:
            look(site, "demo", directory)
            look(admin, "ready", directory)
            flaskd("drain")
            admin.wait_for_selector("body[data-state=draining]")
            look(admin, "draining", directory)
        over.set()
        for each in threads:
            each.join()
        if looks:
            admin.wait_for_selector("body[data-state=drained]")
            look(admin, "drained", directory)
            look(site, "demo-drained", directory)
        browser.close()


if __name__ == "__main__":
    main()
