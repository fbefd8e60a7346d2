"""Say what a profile's run made, where it is, and the headline numbers: `python -m thesis_lib.report [PROFILE]`."""

import json
import sys
from pathlib import Path

import pandas as pd

from thesis_lib import paths, profiles, results, summary

ACCURACIES = ("02_attention_evaluation-*", "04_distillation-*")


def describe(profile: str) -> str:
    """Return the notebooks that ran with their times, the folders of rows and figures, and the headline, as text."""
    folder, figures = paths.RESULTS / profile, paths.FIGURES / profile
    notebooks = sorted(p for p in (folder / "notebooks").glob("[0-9]*.ipynb") if not p.name.endswith(".failed.ipynb"))
    if not notebooks:
        raise FileNotFoundError(f"nothing has run for profile {profile!r}: ./run_all.sh --profile {profile}")
    lines = [f"Profile {profile}"]
    for path in notebooks:
        metadata = json.loads(path.read_text())["metadata"]
        lines.append(f"  {path.stem:<36}{minutes(metadata['papermill']['duration']):>12}   {short(path)}")
    tables, pictures = (sorted(figures.glob(pattern)) for pattern in ("tables/*.tex", "*.pdf"))
    lines += [f"  result rows                   {short(folder)}/*.parquet"]
    lines += [f"  {len(tables)} tables, {len(pictures)} figures, numbers.tex   {short(figures)}"] if tables else []
    rows = [results.read(pattern, profile=profile) for pattern in ACCURACIES if list(folder.glob(f"{pattern}.parquet"))]
    return "\n".join(lines + (["", headline(pd.concat(rows, ignore_index=True))] if rows else []))


def strays(profile: str) -> list[Path]:
    """Return the result files of no run of a profile (its name, or the path of its file), which tables read as well."""
    content = profiles.load(profile)
    runs = [run for path in paths.NOTEBOOKS.glob("[0-9][0-9]_*.ipynb") for run in profiles.runs(content, path.stem)]
    found = (paths.RESULTS / Path(profile).stem).glob("[0-9][0-9]_*.parquet")
    return sorted(path for path in found if not profiles.owner(path.stem, runs))


def headline(rows: pd.DataFrame) -> str:
    """Return the accuracy of every mixer and stage on the test triplets, with its interval, as a small text table."""
    scores = summary.scores(rows)
    text = [f"{row.value:.1%} [{row.low:.1%}, {row.high:.1%}]" for row in scores.itertuples()]
    cells = scores.assign(text=text, mixer=scores["mixer"].map(summary.label))
    table = cells.pivot_table("text", "mixer", "stage", aggfunc="first", sort=False, fill_value="")
    table = table[[stage for stage in summary.STAGES if stage in table]].rename_axis(index=None, columns=None)
    counts = " or ".join(str(int(n)) for n in sorted(scores["n"].unique()))
    return f"Agreement with the judges (2AFC), {counts} test triplets, 95 % intervals\n{table.to_string()}"


def minutes(seconds: float) -> str:
    """Return a duration as "42 s" or "3 min 5 s"."""
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60} s"


def short(path: Path) -> Path:
    """Return the path relative to the current directory where it lies below."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


if __name__ == "__main__":
    try:
        asked = sys.argv[1] if len(sys.argv) > 1 else "demo"
        profiles.load(asked)  # a typo ends here
        print(describe(Path(asked).stem))
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
