"""The page of a real run: every section, every value from the run's files, no text that becomes markup."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser

import pytest
import yaml
from report_pages import HOSTILE, change, copy_of, spoil

from distill.config import load_config
from distill.report import write_report
from distill.report.__main__ import main
from distill.report.page import breakable
from distill.run.files import read_json

SECTIONS = ["results", "training", "neighbours", "data", "cost", "recipe", "reproduce"]


class Page(HTMLParser):
    """What a browser would make of it: tags with their attributes, and the text of each section."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, str] = {"": ""}
        self.section = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "section":
            self.section = dict(attrs)["id"]
            self.text[self.section] = ""

    def handle_data(self, data):
        self.text[self.section] += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def run(finished, tmp_path_factory):
    config = copy_of(finished, tmp_path_factory.mktemp("reported"))
    write_report(config)
    return config


@pytest.fixture(scope="module")
def page(run):
    return Page((run.run_dir / "report.html").read_text())


def test_the_evaluate_stage_leaves_the_page(finished):
    assert (finished[1] / "report.html").stat().st_size < 3_000_000


def test_every_section_is_there_and_has_text(page):
    assert [section["id"] for section in page.all("section")] == SECTIONS
    assert {link["href"].removeprefix("#") for link in page.all("a") if link["href"].startswith("#")} == {*SECTIONS}
    for name in SECTIONS:
        assert len(page.text[name].split()) > 20, name
    assert "Not recorded" not in "".join(page.text.values())


def test_the_tables_show_the_values_of_results_json(run, page):
    results = read_json(run.run_dir / "evaluate/results.json")
    shown = page.text["results"].replace("\N{MINUS SIGN}", "-")
    for name, row in results.items():
        if name == "version":
            continue
        low, high = row["sts_ci"]["AVG"]
        assert f"{row['sts']['AVG']:.2f}" in shown and f"{low:.2f} to {high:.2f}" in shown, name
        for metric in ("spearman", "spearman_top50", "top10"):
            assert f"{row['fidelity'][metric]:.3f}" in shown
        assert f"{row['params']:,}" in shown and f"{row['texts_per_second']:,.0f}" in shown
    assert "STS to teacher" in shown and "STS12" in shown and "STS13" not in shown
    rows = re.findall(r'<th scope="row">([^<]*)</th>', (run.run_dir / "report.html").read_text())
    assert rows[:5] == ["teacher", "ckd", "finetune", "hpd", "hpd-8"]
    (teacher,) = [attributes for attributes in page.all("tr") if attributes.get("class") == "teacher"][:1]
    assert teacher and any("best" in attributes.get("class", "").split() for attributes in page.all("td"))


def test_every_training_stage_has_its_curves(run, page):
    titles = re.findall(r"<figcaption>(.*?)</figcaption>", (run.run_dir / "report.html").read_text())
    for stage in ("ckd", "finetune", "hpd"):
        assert f"{stage}: loss" in titles and f"{stage}: fidelity on dev texts" in titles
        steps = read_json(run.run_dir / stage / "DONE.json")["results"]["steps"]
        assert f"{steps} steps" in page.text["training"]
    assert {"Quality against bytes per vector", "Quality against speed", "Lengths of the texts kept"} <= {*titles}
    assert len(titles) == len({*titles})


def test_data_cost_and_recipe_are_those_of_the_runs_files(run, page):
    counts = read_json(run.precompute_dir / "text/manifest.json")["counts"]
    assert f"{counts['kept']:,}" in page.text["data"] and "text.txt" in page.text["data"]
    for stage in run.stages:
        assert stage in page.text["cost"]
    (session,) = [json.loads(line) for line in (run.run_dir / "ckd/sessions.jsonl").read_text().splitlines()]
    assert session["ranks"] == 2 and f"2 \N{MULTIPLICATION SIGN} {session['device']}" in page.text["cost"]
    for package, version in session["versions"].items():
        assert package in page.text["reproduce"] and version in page.text["reproduce"]


def test_the_short_recipe_is_the_whole_config(run, page, tmp_path):
    recipe = re.search(r"<pre[^>]*>(.*?)</pre>", (run.run_dir / "report.html").read_text(), re.DOTALL)[1]
    (tmp_path / "recipe.yaml").write_text(recipe.replace("&#39;", "'").replace("&gt;", ">").replace("&lt;", "<"))
    assert load_config(tmp_path / "recipe.yaml") == run
    assert len(yaml.safe_load(recipe)) < len(type(run).model_fields)


@pytest.mark.parametrize("sts", [True, False])
def test_a_space_separates_the_sentences_below_the_table(finished, tmp_path, sts):
    config = copy_of(finished, tmp_path)
    if not sts:
        change(config.run_dir / "evaluate/results.json", drop_sts)
    text = Page(write_report(config).read_text()).text["results"]
    assert "The last three columns are fidelity" in text and not re.search(r"[a-z)]\.[A-Z]", text)


def drop_sts(results):
    for model in results.values():
        if isinstance(model, dict):
            model |= {"sts": {}, "sts_ci": {}}


def test_charts_have_titles_and_tables_have_headers_with_scope(page):
    svgs = [svg for svg in page.all("svg") if svg.get("role") == "img"]
    assert len(svgs) >= 9
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len({*ids})
    for svg in svgs:
        assert {*svg["aria-labelledby"].split()} <= {*ids}
    assert all("scope" in header for header in page.all("th")) and len(page.all("caption")) == len(page.all("table"))
    assert page.all("html")[0]["lang"] == "en" and len(page.all("h1")) == 1


def test_nothing_is_fetched(page):
    assert not re.search(r"https?://", "".join(str(attributes) for _, attributes in page.tags))
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "img", "iframe", "object", "embed", "base", "form"})
    (policy,) = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv")]
    assert "default-src 'none'" in policy


def test_the_same_run_gives_the_same_page(run):
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


def test_hostile_text_is_only_text(finished, page, tmp_path):
    config = copy_of(finished, tmp_path)
    spoil(config.run_dir)
    found = Page(write_report(config).read_text())
    assert {tag for tag, _ in found.tags} == {tag for tag, _ in page.tags} | {"wbr"}, "a name is broken at its slashes alone"
    assert {name for _, attributes in found.tags for name in attributes} == {
        name for _, attributes in page.tags for name in attributes
    }
    for section in ("results", "neighbours", "data", "cost", "reproduce"):
        assert HOSTILE[:60] in found.text[section] and HOSTILE[-20:] in found.text[section], section


def test_long_texts_are_cut_and_the_page_stays_small(finished, tmp_path):
    config = copy_of(finished, tmp_path)
    change(config.run_dir / "evaluate/neighbours.json", lambda found: found["agree"][0].update(query="long " * 1_000_000))
    assert write_report(config).stat().st_size < 1_000_000


def test_the_page_of_a_run_of_an_earlier_version_shows_what_is_missing(finished, tmp_path):
    config = copy_of(finished, tmp_path)
    copy = config.run_dir
    for path in [*copy.rglob("sessions.jsonl"), copy / "evaluate/neighbours.json", copy / "precompute/text/manifest.json"]:
        path.unlink()
    shutil.rmtree(copy / "tensorboard")
    found = Page(write_report(config).read_text())
    assert [section["id"] for section in found.all("section")] == SECTIONS
    assert "Not recorded" in found.text["neighbours"] and "Not recorded" in found.text["reproduce"]


def test_the_command_writes_the_page_of_a_run_wherever_it_lies(run, tmp_path, capsys):
    shutil.copytree(run.run_dir, tmp_path / "moved")
    (tmp_path / "moved/report.html").unlink()
    assert main([str(tmp_path / "moved")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "moved/report.html")
    assert "<h1>moved</h1>" in (tmp_path / "moved/report.html").read_text()


def test_what_cannot_be_reported_is_an_error_of_one_line(run, tmp_path, capsys):
    assert main([str(tmp_path)]) == 2 and "has no config.yaml" in capsys.readouterr().err
    shutil.copy(run.run_dir / "config.yaml", tmp_path)
    assert main([str(tmp_path)]) == 2 and "run its evaluate stage first" in capsys.readouterr().err


def test_a_name_may_be_broken_after_a_separator_and_is_only_text():
    assert breakable("data/my_text.txt") == "data/<wbr>my_<wbr>text.txt" and breakable("finetune") == "finetune"
    assert breakable("<b>/&") == "&lt;b&gt;/<wbr>&amp;"
