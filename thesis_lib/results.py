"""Result rows: what was measured, its value and unit, the protocol in columns, provenance in the file.

A file is RESULTS/<profile>/<name>.parquet. While `thesis_lib.execute` runs a notebook, its files wait in a staging
folder (read first by that notebook) and are moved when the notebook has succeeded: what a reader finds is finished.
"""

import contextlib
import datetime
import difflib
import functools
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from thesis_lib import __version__, gpu, paths

COLUMNS = {
    "metric": pa.string(),
    "value": pa.float64(),
    "unit": pa.string(),
    "low": pa.float64(),
    "high": pa.float64(),
    "n": pa.int64(),
    "profile": pa.string(),
    "dataset": pa.string(),
    "split": pa.string(),
    "backbone": pa.string(),
    "mixer": pa.string(),
    "stage": pa.string(),
    "image_size": pa.int64(),
    "dtype": pa.string(),
    "device": pa.string(),
    "batch": pa.int64(),
    "seed": pa.int64(),
}
REQUIRED = ("metric", "value", "unit", "n", "profile")
LIBRARIES = ("torch", "torchvision", "timm", "peft", "accelerate", "numpy", "pandas", "pillow", "pyarrow", "scipy")
KEY = b"thesis_lib"  # of the provenance in the parquet schema's metadata


def write(rows: Iterable[Mapping] | pd.DataFrame, name: str, *, profile: str, folder: Path | None = None) -> Path:
    """Write long-form rows as RESULTS/<profile>/<name>.parquet (or in `folder`) and return the path.

    Protocol columns (COLUMNS) that the rows lack are null; other columns are kept. Raises ValueError if there is no
    row, a required column is missing or null, or a value is NaN and the row's `note` does not say why.
    """
    frame = pd.DataFrame(rows if isinstance(rows, pd.DataFrame) else list(rows)).reset_index(drop=True)
    if frame.empty:
        raise ValueError(f"no rows to write for {name!r}")
    frame["profile"] = frame["profile"].fillna(profile) if "profile" in frame else profile
    if (others := set(frame["profile"]) - {profile}) and others:
        raise ValueError(f"{name!r}: rows of profile {sorted(others)} cannot be written as {profile!r}")
    if absent := [column for column in REQUIRED if column not in frame]:
        raise ValueError(f"{name!r}: a row needs the columns {', '.join(REQUIRED)}; missing: {', '.join(absent)}")
    unexplained = frame["value"].isna() & (frame["note"].isna() if "note" in frame else True)
    empty = frame[[column for column in REQUIRED if column != "value"]].isna().any(axis=1)
    for wrong, why in (
        (unexplained, "has no value and no `note` that says why"),
        (empty, "has an empty required column"),
    ):
        if wrong.any():
            row = frame[wrong].iloc[0].dropna().to_dict()
            raise ValueError(f"{name!r}: {wrong.sum()} of {len(frame)} rows cannot be kept; this one {why}: {row}")
    for column, kind in COLUMNS.items():
        values = frame[column] if column in frame else [None] * len(frame)
        try:
            frame[column] = pd.Series(
                pa.array(values, kind, from_pandas=True), dtype=pd.ArrowDtype(kind), index=frame.index
            )
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise ValueError(f"{name!r}: column {column!r} is not all {kind}: {error}") from error
    columns = [*COLUMNS, *(column for column in frame if column not in COLUMNS)]
    return write_table(frame[columns], name, profile=profile, folder=folder)


def write_table(frame: pd.DataFrame, name: str, *, profile: str, folder: Path | None = None) -> Path:
    """Write any table (one row a triplet, say) beside the rows, with the same provenance, and return the path."""
    if re.fullmatch(r"[\w.\-]+", name) is None:
        raise ValueError(f"a result's name has letters, digits, '_', '-' and '.' only, not {name!r}")
    try:
        table = pa.Table.from_pandas(frame, preserve_index=False)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ValueError(f"{name!r}: a column mixes types: {error}") from error
    table = table.replace_schema_metadata({KEY: json.dumps(_provenance())})
    folder = folder or (Path(_run()["staging"]) if "staging" in _run() else paths.RESULTS / profile)
    folder.mkdir(parents=True, exist_ok=True)
    write_parquet = functools.partial(pq.write_table, table, compression="zstd")
    return paths.write_whole(folder / f"{name}.parquet", write_parquet)


def read(pattern: str, *, profile: str) -> pd.DataFrame:
    """Read one result by name, or all that match a glob (its `*` does not cross a dot), as one table.

    Raises FileNotFoundError that says which notebook makes it, RuntimeError if a file is damaged.
    """
    found = _files(profile)
    expression = re.compile(re.escape(pattern).replace(r"\*", r"[^.]*"))
    names = sorted(name for name in found if expression.fullmatch(name))
    if not names:
        notebook = re.match(r"\d\d_\w+", pattern)
        maker = f"notebooks/{notebook[0]}.ipynb makes it" if notebook else "no notebook's name is in it"
        near = difflib.get_close_matches(pattern, found)
        hint = f" (there is {', '.join(near)})" if near else ""
        raise FileNotFoundError(
            f"no result {pattern!r} of profile {profile!r} in {paths.RESULTS / profile}{hint}: {maker}; "
            f"./run_all.sh --profile {profile} makes all"
        )
    # Without the metadata: provenance differs from file to file, and stands in the way of concatenation.
    tables = [_load(found[name]).replace_schema_metadata(None) for name in names]
    return pa.concat_tables(tables, promote_options="permissive").to_pandas()


def provenance(path: str | Path) -> dict:
    """Return who made a result file: revision, versions, hardware, notebook, parameters, production, time (UTC).

    `production` is true only if every parameter was the profile's; `synthetic` is what stand_ins() says of them.
    Raises ValueError for a file of another maker.
    """
    metadata = _load(Path(path), pq.read_schema).metadata or {}
    if KEY not in metadata:
        raise ValueError(f"{path} carries no provenance: it was not written by thesis_lib.results")
    return json.loads(metadata[KEY])


def origins(profile: str) -> dict:
    """Say where the rows come from that the tables read: `revisions`, `by_hand`, `synthetic`, the first two as `text`.

    by_hand: the files made in JupyterLab, by other software, or with other parameters than the profile's.
    synthetic: the formats of the data sets that were synthetic stand-ins.
    """
    files = {name: path for name, path in _files(profile).items() if re.match(r"(?!09)\d\d_", name)}
    files |= {path.stem: path for path in paths.MEASURED.glob("efficiency-*.parquet")}
    made = {name: {"revision": None, "dirty": None, "production": False} for name in sorted(files)}
    for name in made:
        with contextlib.suppress(ValueError):
            made[name] = provenance(files[name])
    revisions = sorted({(by["revision"] or "unknown")[:10] + "+" * bool(by["dirty"]) for by in made.values()})
    by_hand = [name for name, by in made.items() if not by["production"]]
    # Older files do not say what was synthetic.
    formats = [by.get("synthetic", stand_ins(by.get("parameters"))) or [] for by in made.values()]
    text = f"rows measured at revision{'s' * (len(revisions) > 1)} {', '.join(revisions)}"
    if by_hand:
        text += f"; made by hand, or with other parameters than the profile's: {', '.join(by_hand)}"
    return {"revisions": revisions, "by_hand": by_hand, "synthetic": sorted(set().union(*formats)), "text": text}


def stand_ins(parameters: Mapping | None) -> list[str] | None:
    """Return the formats of the data sets that a run's parameters point to and that are synthetic; None: not known."""
    if parameters is None:
        return None
    found, values = set(), [parameters]
    while values:
        value = values.pop()
        if isinstance(value, str):
            # Most texts are no folder, and some cannot be one.
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                found.add(str(json.loads((paths.DATA / value / "synthetic.json").read_text())["format"]))
        elif isinstance(value, Mapping | list | tuple):
            values += value.values() if isinstance(value, Mapping) else value
    return sorted(found)


def _load(path: Path, read: Callable[[Path], Any] = pq.read_table) -> Any:
    try:
        return read(path)
    except FileNotFoundError:
        raise
    except (pa.ArrowInvalid, OSError) as error:
        raise RuntimeError(f"{path} is damaged ({error}): delete it and run its notebook again") from error


def _files(profile: str) -> dict[str, Path]:
    folders = [paths.RESULTS / profile, *([Path(_run()["staging"])] if "staging" in _run() else [])]
    return {path.stem: path for folder in folders for path in folder.glob("[!.]*.parquet")}


def _run() -> dict:
    return json.loads(os.environ.get("THESIS_RUN", "{}"))  # set by thesis_lib.execute


def _provenance() -> dict:
    run = {"notebook": None, "parameters": None, "production": False} | _run()
    run.pop("staging", None)
    run["synthetic"] = stand_ins(run["parameters"])
    return _machine() | run | {"time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}


@functools.cache
def _machine() -> dict:
    versions = {"python": platform.python_version(), "thesis_lib": __version__}
    for library in LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            versions[library] = None
    hardware = {
        "cpu": _cpu(),
        "cores": psutil.cpu_count(logical=True),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": gpu.query("name"),
        "system": platform.platform(terse=True),
    }
    return _revision() | {"versions": versions, "hardware": hardware}


def _revision() -> dict:
    top, _, revision = (_output("git", "rev-parse", "--show-toplevel", "HEAD") or "").partition("\n")
    if not revision or Path(top).resolve() != paths.ROOT.resolve():  # unpacked in a repository of something else
        return {"revision": None, "dirty": None}
    # Figures are what a run changes, not what it was made from.
    changes = _output("git", "status", "-s", "-uno", "--", ".", ":!figures")
    return {"revision": revision, "dirty": None if changes is None else bool(changes)}


def _cpu() -> str:
    if sys.platform == "darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
    info = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return model[1] if model else platform.processor() or platform.machine()


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(
            command, cwd=paths.ROOT, capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
