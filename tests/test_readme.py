"""What the README says is what the committed run printed, and what it links to exists."""

import re
import subprocess

import pytest

from thesis_lib import latex, paths, summary

README = (paths.ROOT / "README.md").read_text(encoding="utf-8")
STAGES = {"zero-shot": "ZeroShot", "LoRA": "Lora", "distilled": "Distilled"}


def test_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)#]+)", README)
    local = [target for target in targets if "://" not in target]
    assert local and not [target for target in local if not (paths.ROOT / target).exists()]


def test_files_named_in_the_text_exist():
    named = re.findall(r"`((?:figures|tests|data|profiles|notebooks|thesis_lib)/[\w./]+\.\w+)`", README)
    kept = [name for name in named if not name.startswith(("data/results", "data/raw"))]
    assert kept and not [name for name in kept if not (paths.ROOT / name).is_file()]


def test_the_table_is_that_of_the_committed_run():
    file = "figures/demo/numbers.tex"  # as git has it: a run writes its own, and another processor rounds otherwise
    staged = subprocess.run(["git", "show", f":{file}"], cwd=paths.ROOT, capture_output=True, check=False)
    text = staged.stdout.decode() or (paths.ROOT / file).read_text(encoding="utf-8")
    numbers = dict(re.findall(r"\\newcommand\{\\(\w+)\}\{(.*)\}", text))
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
