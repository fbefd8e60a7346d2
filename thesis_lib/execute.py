"""Run one notebook strictly: `python -m thesis_lib.execute NOTEBOOK --profile P [-p name value]...`

papermill executes; here an unknown parameter, a dead kernel, a cell that was never reached or a result that was not
written is a failure with the cell's traceback. Results and the executed notebook wait aside and are moved when the
notebook has succeeded; a failed run leaves <run>.failed.ipynb to look at, and whatever older results there were.
Cells tagged `committed` tell what the demo in git showed: an executed notebook shows its own run and has none of them.
Under torchrun every rank executes the notebook, and what rank 0 wrote is kept.
"""

import argparse
import ast
import contextlib
import json
import logging
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import papermill
import psutil
import yaml
from jupyter_core.utils import ensure_event_loop
from papermill.exceptions import PapermillExecutionError

from thesis_lib import gpu, paths, profiles
from thesis_lib.processes import KEEP_MEMORY

COMMITTED = "committed"
RESUME = "what had finished is kept: the same command goes on from there"


@dataclass(frozen=True)
class Run:
    """One execution of a notebook: `name` is the notebook's, with the variant's value where it has variants."""

    notebook: Path
    profile: str
    name: str
    parameters: dict[str, Any]
    production: bool
    results: tuple[str, ...]
    siblings: tuple[str, ...]  # the profile's other runs of this notebook

    @property
    def folder(self) -> Path:
        return paths.RESULTS / self.profile

    @property
    def executed(self) -> Path:
        return self.folder / "notebooks" / f"{self.name}.ipynb"


def plan(notebook: str | Path, profile: str, overrides: dict[str, Any], results: list[str] | None = None) -> Run:
    """Resolve a notebook's parameters: its profile section, then overrides, then `profile`; check every name and type.

    `production` stays true only if nothing but the value of a variant's parameter, one of those listed, was overridden.
    """
    path = find(notebook)
    content = profiles.load(profile, folder=path.parent)
    section, variants = content.get(path.stem, {}), content["variants"].get(path.stem, {})
    parameters = section | overrides | {"profile": Path(profile).stem}
    profiles.check({name: None for name in variants} | parameters, path)
    known = profiles.defaults(path)
    values = [parameters.get(name, known[name]) for name in variants]
    production = all(
        value in variants.get(name, []) or (name not in variants and value == section.get(name, known[name]))
        for name, value in overrides.items()
    )
    name = "-".join([path.stem, *map(str, values)])
    siblings = tuple(profiles.runs(content, path.stem).keys() - {name})
    return Run(path.resolve(), Path(profile).stem, name, parameters, production, tuple(results or [name]), siblings)


def find(notebook: str | Path) -> Path:
    """Return the path of a notebook, given by path or by its name in notebooks/; FileNotFoundError if there is none."""
    path = Path(notebook) if Path(notebook).suffix == ".ipynb" else paths.NOTEBOOKS / f"{notebook}.ipynb"
    if not path.is_file():
        known = [other.stem for other in path.parent.glob("*.ipynb")]
        raise FileNotFoundError(f"no notebook {path}{profiles.near(path.stem, known)}")
    return path


def execute(run: Run, output: Path | None = None) -> Path:
    """Execute a run and return the executed notebook (`output`, or the run's own place), outputs included.

    Raises RuntimeError with the cell's traceback if it did not succeed, KeyboardInterrupt if it was interrupted.
    """
    rank = int(os.environ.get("RANK", "0"))
    output = Path(output or run.executed).resolve()
    working = output.with_name(f".{output.stem}.rank{rank}.ipynb")
    failed = output.with_name(f"{output.stem}.failed.ipynb")
    staging = run.folder / ".staging" / f"{run.name}.rank{rank}"
    shutil.rmtree(staging, ignore_errors=True)
    for folder in (staging, output.parent):
        folder.mkdir(parents=True, exist_ok=True)
    defaults = {name: v for name, v in profiles.defaults(run.notebook).items() if not isinstance(v, ast.AST)}
    about = {"notebook": run.notebook.name, "profile": run.profile, "parameters": defaults | run.parameters}
    about |= {"production": run.production, "staging": str(staging)}
    try:
        with _environment(THESIS_RUN=json.dumps(about), **KEEP_MEMORY):
            problem = _execute(run, working)
        problem = problem or _unfinished(run, working, staging)
        if working.is_file():
            _leave_out_committed(working)
        if problem and rank == 0:
            _keep_failed(working, failed, problem)
        if problem:
            where = f"\nthe notebook as far as it came: {failed}" if rank == 0 and failed.is_file() else ""
            raise RuntimeError(f"{run.name} failed: {problem}{where}")
        if rank == 0:
            for path in _left_over(run, staging):
                path.unlink()
            last = f"{run.name}.parquet"  # what the DAG waits for is moved when all else is in its place
            for path in sorted(staging.glob("*.parquet"), key=lambda path: path.name == last):
                os.replace(path, run.folder / path.name)
            os.replace(working, output)
            failed.unlink(missing_ok=True)
        return output
    finally:
        working.unlink(missing_ok=True)
        shutil.rmtree(staging, ignore_errors=True)


def _execute(run: Run, working: Path) -> str | None:
    """Run papermill in a thread, so that signals reach us and not its event loop; return what went wrong."""
    outcome: list[Exception] = []

    def work() -> None:
        loop = ensure_event_loop()  # nbclient takes this thread's, and leaves it open
        try:
            papermill.execute_notebook(
                *(str(path).replace("{", "{{").replace("}", "}}") for path in (run.notebook, working)),
                parameters=run.parameters,
                kernel_name="python3",
                language="python",
                cwd=str(run.notebook.parent),
                progress_bar=sys.stderr.isatty(),
                start_timeout=180,
                shutdown_kernel="immediate",  # all is written, and taking torch down by the book takes two seconds
            )
        except Exception as error:
            outcome.append(error)
        finally:
            loop.close()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.2)
    except BaseException:
        children = psutil.Process().children(recursive=True)
        for child in children:
            child.kill()
        psutil.wait_procs(children, timeout=10)
        thread.join(10)
        raise
    if not outcome:
        return None
    error = outcome[0]
    if isinstance(error, PapermillExecutionError):
        text = f"in In [{error.exec_count}]\n" + re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback))
    else:
        text = f"{type(error).__name__}: {error}"
    if re.search(r"No space left on device|disk is full|Disk quota exceeded", text):
        free = shutil.disk_usage(run.folder).free / 2**20
        return f"the disk of {run.folder} is full ({free:.0f} MiB left): make room, then run the same command again"
    if "Kernel died" in text:
        started = [cell for cell in (_code(working) if working.is_file() else []) if cell.metadata.papermill.start_time]
        why = "the kernel died: too little memory, a crash in a library, or an exit"
        text = f"{why}; it was in this cell:\n{started[-1].source}" if started else f"{why}, before the first cell"
    return text


def _unfinished(run: Run, working: Path, staging: Path) -> str | None:
    """Return what is wrong with a run that papermill takes for a success."""
    for cell in _code(working):
        errors = [out for out in cell.outputs if out.output_type == "error"]
        if errors:
            return f"{errors[0].ename}: {errors[0].evalue}, in this cell:\n{cell.source}"
        if cell.source.strip() and cell.execution_count is None:
            return f"this cell was never reached:\n{cell.source}"
    missing = [name for name in run.results if not (staging / f"{name}.parquet").is_file()]
    if missing:
        written = ", ".join(path.stem for path in staging.glob("*.parquet")) or "nothing"
        return f"it did not write {', '.join(missing)} (it wrote {written})"
    return None


def _left_over(run: Run, staging: Path) -> list[Path]:
    """Return the run's older files that it did not write again: the tables would take them for its own."""
    names = [run.name, *run.siblings, *(path.stem for path in run.executed.parent.glob("*.ipynb"))]
    older = [path for path in run.folder.glob(f"{run.name}.*.parquet") if not (staging / path.name).exists()]
    return [path for path in older if profiles.owner(path.stem, names) == run.name]


def _leave_out_committed(working: Path) -> None:
    notebook = nbformat.read(working, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if COMMITTED not in cell.metadata.get("tags", [])]
    nbformat.write(notebook, working)


def _keep_failed(working: Path, failed: Path, problem: str) -> None:
    if working.is_file():
        notebook = nbformat.read(working, as_version=4)
        notebook.metadata["failure"] = problem
        nbformat.write(notebook, working)
        os.replace(working, failed)


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Set environment variables, and a kernelspec python3 that is this interpreter, found before any installed one."""
    with tempfile.TemporaryDirectory() as folder:
        kernel = Path(folder) / "kernels" / "python3" / "kernel.json"
        kernel.parent.mkdir(parents=True)
        argv = [sys.executable, "-m", "ipykernel_launcher", "--log-level=CRITICAL", "-f", "{connection_file}"]
        kernel.write_text(json.dumps({"argv": argv, "display_name": "Python 3 (ipykernel)", "language": "python"}))
        before = dict(os.environ)
        search = os.pathsep.join(filter(None, [folder, before.get("JUPYTER_PATH")]))
        os.environ.update(variables, JUPYTER_PATH=search)
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


def _code(notebook: Path) -> list:
    return [cell for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]


def _value(text: str, default: Any) -> Any:
    """Read a value from the command line: as it stands where text is wanted, else YAML (but 1e-4 is a number)."""
    if isinstance(default, str):
        return text
    try:
        return float(text) if re.fullmatch(r"[-+]?\d+\.?\d*[eE][-+]?\d+", text) else yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _terminate(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; 0 if the notebook succeeded, 1 if it failed, 2 if it could not start, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m thesis_lib.execute", description="Run one notebook strictly.")
    parser.add_argument("notebook", help="02_attention_evaluation, or the path of a notebook")
    parser.add_argument("--profile", default="demo", help="a name in profiles/, or the path of a .yaml file")
    parser.add_argument("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    parser.add_argument(
        "--results", action="append", metavar="NAME", help="a result it must write (default: the run's)"
    )
    parser.add_argument("--gpu", action="store_true", help="hold one GPU alone, waiting until one is free")
    parser.add_argument("--output", type=Path, help="the executed notebook (default: RESULTS/<profile>/notebooks/)")
    options = parser.parse_args(arguments)
    logging.getLogger("papermill").setLevel(logging.ERROR)  # its progress lines
    signal.signal(signal.SIGTERM, _terminate)
    start = time.monotonic()
    try:
        defaults = profiles.defaults(find(options.notebook))
        overrides = {name: _value(value, defaults.get(name)) for name, value in options.parameter}
        run = plan(options.notebook, options.profile, overrides, options.results)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    device = run.parameters.get("device", defaults.get("device")) or "cpu"
    print(f"{run.name} ...", flush=True)
    try:
        with gpu.one() if options.gpu else contextlib.nullcontext():
            if why := gpu.absent(device):
                say = "run it where there is one, or with `-p device cpu`, or set `device` in a profile of your own"
                print(f"error: no device {device!r} here ({why}): {say}", file=sys.stderr)
                return 2
            output = execute(run, options.output)
    except (RuntimeError, OSError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{run.name} interrupted; {RESUME}", file=sys.stderr)
        return 130
    print(f"{run.name}: {time.monotonic() - start:.0f} s, {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
