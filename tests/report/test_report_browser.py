"""The page in a real browser, from disk and without a network: on a narrow screen, in dark mode, printed."""

from __future__ import annotations

import json
import re
import subprocess

import browser
import pytest
from browser import OPTIONS
from reference_times import hang_limit
from report_pages import copy_of, spoil

from distill.report import write_report

pytestmark = pytest.mark.slow
FLAGS = [
    "--headless",
    *OPTIONS,
    "--allow-file-access-from-files",
    "--enable-logging=stderr",
]  # the frame reads the page and logs
FRAME = """<!DOCTYPE html><meta name="color-scheme" content="light dark"><iframe src="file://{page}" width="{width}"></iframe>
<script>
addEventListener("load", () => {{
  const page = document.querySelector("iframe").contentDocument, root = page.documentElement;
  console.log("looked at");
  document.title = JSON.stringify({{
    width: root.clientWidth,
    overflow: root.scrollWidth - root.clientWidth,
    headings: [...page.querySelectorAll("h2")].map(heading => heading.textContent),
    scripts: page.querySelectorAll("script, img, [onload], [onerror]").length,
    charts: [...page.querySelectorAll("figure > svg")].map(svg => svg.getBoundingClientRect().width),
    tables: [...page.querySelectorAll(".wide")].map(table => [
      table.scrollWidth > table.clientWidth, (table.querySelector(".more") || {{offsetHeight: 0}}).offsetHeight > 0
    ]),
    names: [...page.querySelectorAll("#results tbody th")].map(name => {{
      const range = page.createRange();
      range.selectNodeContents(name);
      return [name.textContent, new Set([...range.getClientRects()].map(line => line.top)).size];
    }}),
    background: getComputedStyle(root).backgroundColor,
    chartBackground: getComputedStyle(page.querySelector("figure > svg path")).fill,
    text: getComputedStyle(page.querySelector("svg text")).fill,
  }});
}});
</script>"""


@pytest.fixture(scope="module")
def run(finished, tmp_path_factory):
    return copy_of(finished, tmp_path_factory.mktemp("looked-at"))


@pytest.fixture
def chromium(tmp_path):
    """Runs the browser on a page; returns its output and the lines of its console."""
    program = browser.chromium()

    def run(*arguments):
        command = [program, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=hang_limit())
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    return run


@pytest.fixture
def look(chromium, tmp_path):
    def in_a_frame(page, width, *options):
        (tmp_path / "frame.html").write_text(FRAME.format(page=page, width=width))
        printed, console = chromium(*options, "--dump-dom", f"file://{tmp_path / 'frame.html'}")
        assert len(console) == 1 and "looked at" in console[0], console
        title = re.search(r"<title>(.*?)</title>", printed)[1]
        return json.loads(title.replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))

    return in_a_frame


@pytest.mark.parametrize("width, scheme, is_dark", [(320, 0, True), (400, 1, False)])
def test_it_opens_from_disk_on_a_narrow_screen_in_light_and_dark(look, run, width, scheme, is_dark):
    found = look(write_report(run), width, f"--blink-settings=preferredColorScheme={scheme}")
    assert found["headings"] == ["Results", "Training", "Nearest neighbours", "Data", "Cost", "Recipe", "Reproduce"]
    assert found["width"] <= width and found["overflow"] == 0
    assert all(0.8 * width < each < width for each in found["charts"]) and len(found["charts"]) >= 9
    assert found["chartBackground"] == found["background"]
    assert found["tables"][0] == [True, True], "a hint that the table goes on"
    assert {lines for name, lines in found["names"] if name in ("teacher", "ckd", "finetune", "hpd")} == {1}
    assert all(goes_on for goes_on, has_hint in found["tables"] if has_hint)
    background, text = (sum(map(int, re.findall(r"\d+", found[name])[:3])) for name in ("background", "text"))
    assert (background < 200 and text > 450) if is_dark else (background > 700 and text < 330)


def test_hostile_text_is_inert(look, finished, tmp_path):
    config = copy_of(finished, tmp_path)
    spoil(config.run_dir)
    found = look(write_report(config), 400)
    assert found["scripts"] == 0 and found["overflow"] == 0 and len(found["headings"]) == 7


def test_it_prints_on_a_few_light_pages(chromium, run, tmp_path):
    chromium("--no-pdf-header-footer", f"--print-to-pdf={tmp_path / 'page.pdf'}", f"file://{write_report(run)}")
    pdf = (tmp_path / "page.pdf").read_bytes()
    assert "orphans: 3; widows: 3" in write_report(run).read_text()
    assert pdf.startswith(b"%PDF") and 5 <= len(re.findall(rb"/Type /Page\b(?!s)", pdf)) <= 20
