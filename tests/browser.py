"""A headless Chromium, and TensorBoard to look at with it: what people see is what a test finds."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from commands import environment
from reference_times import hang_limit

OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--enable-unsafe-swiftshader",  # the projector draws with WebGL
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SIZE = {"width": 1500, "height": 1100}


def chromium() -> str:
    """Where it is; the test that asks is skipped where there is none."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no chromium here (apt-get install chromium)")
    return found


@contextmanager
def browser() -> Iterator[object]:
    """A fresh page of a fresh browser."""
    program = chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=program, args=OPTIONS)
        try:
            yield running.new_page(viewport=SIZE)
        finally:
            running.close()


@contextmanager
def tensorboard(logdir: Path) -> Iterator[str]:
    """Its address, on a port of its own choice."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--port", "0", "--host", "127.0.0.1"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment())
    try:
        printed = ""
        while not (address := re.search(r"http://127\.0\.0\.1:\d+", printed)):
            line = server.stdout.readline()
            assert line, f"TensorBoard ended:\n{printed}"
            printed += line
        yield address.group()
    finally:
        server.terminate()
        server.wait(hang_limit())


VISIBLE_TEXT = """() => {
  const found = [], walk = node => {
    const parent = node.parentElement;
    if (node.nodeType === Node.TEXT_NODE && parent && !["STYLE", "SCRIPT"].includes(parent.tagName)) {
      const text = node.textContent.trim();
      if (text && parent.checkVisibility()) found.push(text);
    }
    if (node.shadowRoot) walk(node.shadowRoot);
    node.childNodes.forEach(walk);
  };
  walk(document.body);
  return found;
}"""


def until_visible(frame: object, wanted: set[str], ready: Callable[[list[str]], bool] = lambda found: True) -> list[str]:
    """All visible pieces of text of a page or frame, in shadow roots too, once they are `ready` and have what is wanted."""
    deadline = time.monotonic() + hang_limit()
    while True:
        found = frame.evaluate(VISIBLE_TEXT)
        if wanted <= set(found) and ready(found):
            return found
        assert time.monotonic() < deadline, f"not to be seen or not ready: {wanted - set(found)}; but {found}"
        time.sleep(0.2)


def keep_screenshot(page: object, name: str, folder: Path) -> None:
    """Takes one into the folder that DISTILL_SCREENSHOTS names, else into `folder`, and says where."""
    place = Path(os.environ.get("DISTILL_SCREENSHOTS", folder))
    place.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=str(place / f"{name}.png"))
    print(f"screenshot: {place / f'{name}.png'} ({time.strftime('%H:%M:%S')})")
