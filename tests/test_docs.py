"""Docs that must not go stale: links, names of files, commands, figures that stand twice, the tree and its layers."""

from __future__ import annotations

import importlib.util
import re
import runpy
import shlex
import statistics
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from PIL import Image

from pipeline import cli
from pipeline.config.load import load_job
from tests.test_examples import NEW

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
JOBS = sorted((ROOT / "jobs").glob("*.yaml"))
README, RESULTS = (path.read_text() for path in (ROOT / "README.md", ROOT / "docs" / "results.md"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FIGURE = r"\d+\.\d+"
pages = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)


def test_every_setting_is_in_the_docs_as_declared() -> None:
    """If this fails, run `python docs/make_configuration.py`."""
    written = (ROOT / "docs" / "configuration.md").read_text()
    assert written == runpy.run_path(str(ROOT / "docs" / "make_configuration.py"))["page"]()


# ---- the README is for three minutes -----------------------------------------------------------------------


def test_the_readme_has_at_most_900_words() -> None:
    assert len(README.split()) <= 900


def test_the_readme_shows_one_command() -> None:
    assert "python -m pipeline" not in README and "noisy-lambda run" in README


# ---- links, files, commands --------------------------------------------------------------------------------


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, heading = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        assert not heading or heading in headings(file), target


def headings(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pages
def test_files_that_the_docs_name_are_there(page: Path) -> None:
    folders = "pipeline|models|jobs|conf|docs|tests|benchmarks"
    named = set(re.findall(rf"`((?:{folders})/[\w./-]+\.\w+)`", page.read_text())) - set(NEW)
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_commands_that_the_docs_show_are_ones() -> None:
    """Those with … for arguments are not looked at."""
    verbs = "run|plan|status|review|sweep|submit|clean|ui|export|prepare"
    shown = [
        (page.name, match[1].strip())
        for page in [*PAGES, *JOBS]
        for match in re.finditer(rf"(?:-m pipeline|noisy-lambda) ((?:{verbs}) [^`#\n|]*)", page.read_text())
    ]
    assert len(shown) > 30
    for name, words in shown:
        if words.endswith("\\") or "…" in words:  # alternatives in a table
            continue
        words = re.split(r"  +(?:or|\()", words)[0]
        try:
            cli._parse(shlex.split(words))
        except SystemExit:
            pytest.fail(f"{name} shows: noisy-lambda {words}")


@pages
def test_jobs_and_code_that_the_docs_show_are_whole(page: Path, tmp_path: Path) -> None:
    for code in re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
        compile(code, page.name, "exec")
    for text in re.findall(r"^```yaml\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
        parts = {"name": "x", "data": {"root": "."}, "teacher": {"model": "lambda_resnet_tiny"}} | yaml.safe_load(text)
        job = tmp_path / "job.yaml"
        job.write_text(yaml.safe_dump(parts))
        load_job(str(job))


def test_modules_that_the_docs_start_are_there() -> None:
    for page in PAGES:
        for module in re.findall(r"python -m ((?:benchmarks|models|pipeline)[\w.]*)", page.read_text()):
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), f"{page.name}: {module}"


def test_imports_in_code_that_is_text_find_what_they_name() -> None:
    """Code that a test hands to another process, which fails late and far away."""
    imports = r"^ *from ((?:pipeline|models)[\w.]*) import ([\w, ]+)$"
    found = [
        (path.name, module, name.split(" as ")[0].strip())
        for folder in ("tests", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        for module, names in re.findall(imports, path.read_text(), re.MULTILINE)
        for name in names.split(",")
    ]
    assert len(found) > 300
    for file, module, name in found:
        known = hasattr(importlib.import_module(module), name) or importlib.util.find_spec(f"{module}.{name}")
        assert known, f"{file}: from {module} import {name}"


# ---- figures stand in docs/results.md ----------------------------------------------------------------------


def table(title: str) -> dict[str, list[str]]:
    """A table of docs/results.md by column; its last row is that of mean and standard deviation."""
    section = RESULTS.split(f"\n## {title}\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    return {name: [row[column] for row in rows[2:]] for column, name in enumerate(rows[0])}


def averages(title: str) -> Iterator[tuple[str, float, float]]:
    """(column, mean, standard deviation) of the figures above the last row."""
    for name, cells in table(title).items():
        if name != "seed":
            values = [float(cell) for cell in cells[:-1]]
            yield name, statistics.mean(values), statistics.stdev(values)


@pytest.mark.parametrize("title", ["Handwritten digits", "CIFAR-10"])
def test_means_are_those_of_their_table(title: str) -> None:
    for name, mean, deviation in averages(title):
        assert table(title)[name][-1] == f"{mean:.2f} ± {deviation:.2f}", name


@pytest.mark.parametrize(("row", "title"), [("digits", "Handwritten digits"), ("CIFAR-10", "CIFAR-10")])
def test_the_readmes_results_are_those_of_the_docs(row: str, title: str) -> None:
    [line] = [line for line in README.splitlines() if line.startswith(f"| {row}")]
    cells = [cell.strip() for cell in line.strip("|").split("|")[1:]]
    assert [cell for cell in cells if cell] == [column[-1] for column in list(table(title).values())[1:]]


def test_job_headers_expect_what_was_measured() -> None:
    digits, cifar = ({name: (m, s) for name, m, s in averages(title)} for title in ("Handwritten digits", "CIFAR-10"))
    (teacher, spread), (control, control_spread) = digits["teacher"], digits["control"]
    students = [digits["student 1"], digits["student 2"]]
    expected = {
        "noisy_student": [teacher, spread, *students[0], *students[1]],
        "digits_control": [control, control_spread, teacher, students[1][0]],
        "cifar10": [cifar[name][0] for name in ("teacher", "student 1", "student 2", "student 3", "control")],
        "cifar10_control": [float(cell) for cell in table("CIFAR-10")["control"][:-1]],
    }
    for job, figures in expected.items():
        header = (ROOT / "jobs" / f"{job}.yaml").read_text().split("# Expect")[1].split("\nname:")[0]
        assert re.findall(FIGURE, header) == [f"{figure:.1f}" for figure in figures], job


def block(text: str) -> list[str]:
    """The demo's output, which docs/make_report_picture.py writes."""
    return text.split("docs/make_report_picture.py writes it -->\n```\n")[1].split("\n```\n")[0].splitlines()


def test_the_readme_shows_lines_of_the_demos_output() -> None:
    assert [line for line in block(README) if line not in ("…", *block(RESULTS))] == []
    assert len(block(README)) > 5


def test_the_picture_is_of_the_same_run() -> None:
    """A picture from before docs/make_report_picture.py wrote its accuracies into it is not looked at."""
    with Image.open(ROOT / "docs" / "report.png") as picture:
        shown = picture.info.get("top1")
    tested = [line for line in block(README) if line.startswith("gen")]
    assert shown in (None, " ".join(re.findall(rf"{FIGURE}(?= %)", line)[0] for line in tested))


def test_every_other_figure_of_the_readme_stands_in_a_page() -> None:
    prose = re.sub(r"```.*?```|\(http[^)]*\)|^\|.*?$", "", README, flags=re.DOTALL | re.MULTILINE)
    pages_ = " ".join((ROOT / "docs" / f"{name}.md").read_text() for name in ("results", "scale", "lambda_layer"))
    python = PROJECT["project"]["requires-python"].removeprefix(">=")
    known = {*re.findall(FIGURE, pages_), python, "6.5", "2.0"}  # .venv, in the Makefile's comment; Apache's version
    assert set(re.findall(FIGURE, prose)) <= known
    scale = (ROOT / "docs" / "scale.md").read_text()
    assert "takes 8.6 s" in " ".join(prose.split()) and "8.6 s against" in scale


def test_the_readmes_claim_of_the_lambda_layer_is_its_table() -> None:
    rows = re.findall(r"forward \+ backward \|.*?([\d.]+)×", (ROOT / "docs" / "lambda_layer.md").read_text())
    faster = sorted(float(row) for row in rows)
    assert f"{faster[0]} to {faster[-1]} times as fast" in README


def test_the_papers_figures_are_those_of_code_and_tests() -> None:
    from tests.models.test_family import ABLATION, MILLIONS
    from tests.test_recipe import TABLE

    text = (ROOT / "docs" / "paper.md").read_text()
    for (depth, size), (supervised, pseudo, magnitude, dropout, rate) in TABLE.items():
        cells = [supervised or "", pseudo or "", magnitude, dropout, f"{rate:g}"]
        row = re.search(rf"^\| {depth} @ {size} \| [\d.]+ \| (.*) \|$", text, re.MULTILINE)
        assert row and [cell.strip() for cell in row[1].split("|")] == [str(cell) for cell in cells], (depth, size)
    for (k, h, u), millions in ABLATION.items():
        assert re.search(rf"^\| {k} \| {h} \| {u} \| [\d.]+ \| {millions:.2f} \|", text, re.MULTILINE), (k, h, u)
    for name, millions in MILLIONS.items():
        assert f"{millions:g}" in text or f"{millions:.2f}" in text or name == "resnet_50", name
    for entry in yaml.safe_load((ROOT / "conf" / "measure" / "published_accuracy.yaml").read_text()):
        for name, top1, *_ in entry["top1"]:
            assert f"{top1:.1f}" in text, name


# ---- the map is the land -----------------------------------------------------------------------------------

ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()


def test_the_tree_has_every_module_and_no_other() -> None:
    """If this fails, write the module's name into the tree of docs/architecture.md, in its room."""
    lines = ARCHITECTURE.split("## The tree\n\n```\n")[1].split("```")[0].split("pipeline/\n")[1].splitlines()
    drawn: dict[str, set[str]] = {"": set()}
    room = ""
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if indent == 0:
            break
        if indent == 2 and (found := re.match(r"  (\w+)/ ", line)):
            room = found[1]
            drawn[room] = set()
        elif indent == 2:
            drawn[""] |= (
                set(re.split(r"  +", line.strip())[:1]) if not line.startswith("  malloc") else set(line.split())
            )
        else:
            drawn[room] |= set(line.split())
    code: dict[str, set[str]] = {}
    for path in (ROOT / "pipeline").rglob("*.py"):
        if not path.stem.startswith("__"):
            code.setdefault("/".join(path.relative_to(ROOT / "pipeline").parts[:-1]), set()).add(path.stem)
    assert drawn == code


def test_the_layers_are_those_that_are_checked() -> None:
    [contract] = [found for found in PROJECT["tool"]["importlinter"]["contracts"] if found["type"] == "layers"]
    drawn = ARCHITECTURE.split("## Who may import whom")[1].split("```\n")[1].splitlines()
    assert drawn == contract["layers"]


def test_the_run_folder_is_drawn_as_in_the_code() -> None:
    from pipeline.plan import stage

    text = (ROOT / "docs" / "run_folder.md").read_text()
    for name in re.findall(r"[├└]── (\S+)", stage.__doc__ or ""):
        assert name in text, name


def test_label_file_docs_name_every_column() -> None:
    from pipeline.data import label_files
    from pipeline.selection import select

    text = (ROOT / "docs" / "label_files.md").read_text()
    for field in [*label_files.SCHEMA, *select.SCHEMA]:
        assert f"`{field.name}`" in text


def test_ci_runs_what_developers_run_on_the_oldest_python_and_on_the_newest() -> None:
    [job] = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"].values()
    assert job["steps"][-1] == {"run": ".ci/run"}
    oldest = PROJECT["project"]["requires-python"].removeprefix(">=")
    assert job["strategy"]["matrix"]["python"][0] == oldest


def test_the_citation_names_both_papers() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert [entry["identifiers"][0]["value"] for entry in citation["references"]] == [
        "arXiv:2102.08602",
        "arXiv:1911.04252",
    ]
    assert f"## {citation['version']} ({citation['date-released']})" in (ROOT / "CHANGELOG.md").read_text()
