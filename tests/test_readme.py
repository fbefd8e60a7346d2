"""What the README and the notebooks say of the committed run is what it printed, and what they link to exists."""

import itertools
import json
import re
import shutil
import subprocess

import pytest

from thesis_lib import execute, latex, paths, summary

README = (paths.ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = ["README.md", "benchmarks/README.md", "data/README.md", "figures/README.md"]
STAGES = {"zero-shot": "ZeroShot", "LoRA": "Lora", "distilled": "Distilled"}
CLAIM = re.compile(r"(-?\d[\d.]*)(?:\s(?:%|times|tokens|points))?\s(\[-?\d[^\]]*\])(?!\()")  # 90.2 % [87.9, 92.4]


def told(notebook) -> list[str]:
    """What a notebook's cells tell of the committed run."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if execute.COMMITTED in cell["metadata"].get("tags", [])]


NOTEBOOKS = {path.stem: told(path) for path in sorted(paths.NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))}


def committed(file: str) -> str:
    """A file of figures/demo as git has it: a run writes its own, and another processor rounds otherwise."""
    file = f"figures/demo/{file}"
    staged = b""
    if shutil.which("git"):
        staged = subprocess.run(["git", "show", f":{file}"], cwd=paths.ROOT, capture_output=True, check=False).stdout
    return staged.decode() or (paths.ROOT / file).read_text(encoding="utf-8")


def plain(text: str) -> str:
    text = re.sub(r"\\bfseries|\\%|[$~]", "", text.replace("\N{MINUS SIGN}", "-").replace(r"\\", ""))
    return re.sub(r"\s+", " ", text).strip()


@pytest.fixture(scope="module")
def numbers() -> dict[str, str]:
    return dict(re.findall(r"\\newcommand\{\\(\w+)\}\{(.*)\}", committed("numbers.tex")))


@pytest.fixture(scope="module")
def printed(numbers) -> set[str]:
    """Every number with its interval that stands in the committed numbers and tables: "90.2 [87.9, 92.4]"."""
    found = {f"{value} {numbers[f'{name}Interval']}" for name, value in numbers.items() if f"{name}Interval" in numbers}
    found = {plain(text) for text in found | set(numbers.values())}
    for path in sorted((paths.ROOT / "figures" / "demo" / "tables").glob("*.tex")):
        for line in committed(f"tables/{path.name}").splitlines():
            cells = [plain(cell) for cell in line.split("&")]
            found |= {f"{value} {ends}" for value, ends in itertools.pairwise(cells) if ends.startswith("[")}
    return {f"{value} {ends}" for text in found for value, ends in CLAIM.findall(text)}


def unsaid(text: str, printed: set[str]) -> list[str]:
    claims = [f"{value} {ends}" for value, ends in CLAIM.findall(plain(text))]
    return [claim for claim in claims if claim not in printed]


def test_without_git_the_files_there_are_count(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert committed("numbers.tex") == (paths.ROOT / "figures" / "demo" / "numbers.tex").read_text(encoding="utf-8")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere_and_files_named_exist(document):
    text = (paths.ROOT / document).read_text(encoding="utf-8")
    local = [target for target in re.findall(r"\]\(([^)#]+)", text) if "://" not in target]
    assert not [target for target in local if not ((paths.ROOT / document).parent / target).exists()]
    named = re.findall(r"`((?:figures|tests|data|profiles|notebooks|thesis_lib|benchmarks)/[\w./]+\.\w+)`", text)
    kept = [name for name in named if not name.startswith(("data/results", "data/raw"))]
    assert not [name for name in kept if not (paths.ROOT / name).is_file()]
    assert document != "README.md" or (len(local) > 10 and len(kept) > 3)


def test_every_number_with_an_interval_is_one_that_the_committed_run_printed(printed):
    assert len(printed) > 200 and len(CLAIM.findall(README)) > 50
    for document in DOCUMENTS:
        assert unsaid((paths.ROOT / document).read_text(encoding="utf-8"), printed) == [], document
    assert unsaid("99.9 % [1.0, 2.0]", printed) == ["99.9 [1.0, 2.0]"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_each_notebook_tells_what_the_committed_run_showed(name, printed):
    cell, *more = NOTEBOOKS[name]
    assert not more and cell.startswith("**What came out**")
    assert unsaid(cell, printed) == []
    linked = re.findall(r"\]\(([^)#]+)", cell)
    assert linked and not [target for target in linked if not (paths.NOTEBOOKS / target).is_file()]


def test_the_table_is_that_of_the_committed_run(numbers):
    header, *rows = [line for line in README.splitlines() if line.startswith("| mixer |") or line.startswith("| **")]
    columns = [cell.strip() for cell in header.strip("|").split("|")]
    assert rows
    for row in rows:
        cells = dict(zip(columns, (cell.strip() for cell in row.strip("|").split("|")), strict=True))
        mixer = next(name for name in summary.MIXERS if f"**{summary.label(name)}**" == cells["mixer"])
        for column, stage in STAGES.items():
            name = latex.macro(mixer) + stage
            assert (cells[column] == "–") == (name not in numbers), (mixer, column)
            if name in numbers:
                assert cells[column].split()[0] == numbers[name], (mixer, column)


@pytest.mark.parametrize("name", ["run_all.sh", "run_tests.sh", ".ci/run"])
def test_commands_are_executable(name):
    assert (paths.ROOT / name).stat().st_mode & 0o111
