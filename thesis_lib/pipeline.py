"""Run the DAG and say what it made: `python -m thesis_lib.pipeline [--profile P] [snakemake options]`.

This is what run_all.sh calls. All other options go to snakemake: -n shows what would run, --jobs N bounds the cores,
--forcerun RULE makes something again, `--workflow-profile profiles/slurm` runs on a cluster.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import filelock
import psutil

from thesis_lib import gpu, paths, profiles
from thesis_lib.datasets.missing import choose

# With these snakemake only tells, and runs nothing.
TELLS = {
    *("--dry-run", "--dryrun", "--dag", "--rulegraph", "--filegraph", "--d3dag", "--list", "--list-rules", "-l"),
    *("--list-target-rules", "--summary", "-S", "--detailed-summary", "-D", "--lint", "--unlock", "--version", "-v"),
}
KEPT = "What had finished is kept: the same command goes on from there."


def command(profile: str, options: list[str]) -> list[str]:
    """Return the snakemake command: the user's options, and defaults where they say nothing."""
    given = {option.split("=")[0] if option.startswith("--") else option[:2] for option in options if option[:1] == "-"}
    call = [sys.executable, "-m", "snakemake", "--snakefile", str(paths.ROOT / "Snakefile"), *options]
    # The Snakefile says what makes a result stale. Locking is done here, see run().
    call += ["--rerun-triggers", "mtime", "input", "params", "--rerun-incomplete", "--nolock"]
    # Whatever else the user forces comes before the figures, which follow by themselves.
    if not {"--forcerun", "-R"} & given and _figures_differ(profile):
        call += ["--forcerun", "thesis_figures"]
    cluster = {"--executor", "-e", "--workflow-profile"} & given
    if not {"--quiet", "-q", "--verbose"} & given:
        # Where "rules" is quiet, so is what a cluster says to a job that it refuses.
        call += ["--quiet", "host", "reason", *([] if cluster or only_tells(options) else ["rules"])]
    if not cluster:
        if not {"--cores", "-c", "--jobs", "-j"} & given:
            call += ["--cores", "all"]
        if not {"--resources", "--res"} & given:
            gpus = len(gpu.visible())  # without one, `gpu` bounds nothing
            call += [
                "--resources",
                f"mem_mb={psutil.virtual_memory().total // 2**20}",
                *([f"gpu={gpus}"] if gpus else []),
            ]
    return [*call, "--config", f"profile={profile}"]


def only_tells(options: list[str]) -> bool:
    """Say whether snakemake runs nothing with these options; -n may stand among other letters."""
    return any(option.split("=")[0] in TELLS or re.fullmatch(r"-[A-Za-z]*n[A-Za-z]*", option) for option in options)


def check_options(options: list[str]) -> None:
    """Raise ValueError in one line for options that snakemake refuses, and for rules and profiles that are not there.

    By itself it answers a misspelt option with all of its usage, and a misspelt workflow profile not at all.
    """
    from snakemake.cli import get_argument_parser  # not waited for where there are no options

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            found = get_argument_parser().parse_args(options)
    except SystemExit as error:
        if error.code:
            raise ValueError(said.getvalue().strip().splitlines()[-1].partition("error: ")[2]) from None
        return
    rules = [path.stem[3:] for path in paths.NOTEBOOKS.glob("[0-9][0-9]_*.ipynb")]
    named = [*(found.forcerun or []), *(found.until or []), *(found.omit_from or [])]
    for name in map(str, named):
        if not {"/", "."} & set(name):  # others are files
            choose(name, [*rules, "all"], "rule")
    if wrong := [str(target) for target in found.targets if str(target) in rules]:
        raise ValueError(f"{wrong[0]} is a rule of several runs: --until {wrong[0]}, or --forcerun {wrong[0]}")
    if found.workflow_profile not in (None, "none") and not (paths.ROOT / found.workflow_profile).exists():
        raise ValueError(f"there is no workflow profile {found.workflow_profile}: profiles/slurm is one")


def _figures_differ(profile: str) -> bool:
    """Say whether a file that notebook 09 made is gone or another by now: the DAG knows its rows alone."""
    made = paths.RESULTS / Path(profile).stem / "09_thesis_figures.parquet"
    if not made.is_file():
        return False
    import pyarrow.parquet  # not waited for before

    try:
        files = pyarrow.parquet.read_table(made).to_pydict()
        found = [hashlib.sha256((paths.FIGURES / path).read_bytes()).hexdigest() for path in files["path"]]
        return found != files["sha256"]
    except (OSError, ValueError, KeyError):  # gone, damaged, of an older notebook
        return True


def run(profile: str, options: list[str]) -> int:
    """Run snakemake, one at a time per results folder, and report; return its exit status, 130 after Ctrl-C."""
    start, tells = time.time(), only_tells(options)
    with contextlib.ExitStack() as stack:
        if not tells:
            paths.RESULTS.mkdir(parents=True, exist_ok=True)
            # The system releases this lock however we die; snakemake's own would have to be removed by hand.
            try:
                stack.enter_context(filelock.FileLock(paths.RESULTS / ".lock").acquire(timeout=0))
            except filelock.Timeout:
                print(f"error: another run is filling {paths.RESULTS}: wait for it, or stop it", file=sys.stderr)
                return 1
        status = _supervise(command(profile, options))
    if status == 130:
        print(f"\nInterrupted. {KEPT}", file=sys.stderr)
    elif status:
        _report_failures(paths.RESULTS / Path(profile).stem / "notebooks", start)
    elif not tells:
        from thesis_lib import report  # not needed, and pandas not waited for, before

        try:
            print(f"\n{report.describe(Path(profile).stem)}\n")
        except FileNotFoundError as error:  # an option that runs nothing, or a single file
            print(error)
            return status
        for path in report.strays(profile):
            print(f"warning: {report.short(path)} is of no run of this profile, yet in the tables: delete it")
        print(f"Done in {report.minutes(time.time() - start)}.")
    return status


def _supervise(call: list[str]) -> int:
    """Run in a process group of its own, which hears of the first Ctrl-C (or TERM, or a closed terminal) just once."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)
    process = subprocess.Popen(call, cwd=paths.ROOT, start_new_session=True)
    interrupts = 0
    while True:
        try:
            status = process.wait()
            return 130 if interrupts else status
        except KeyboardInterrupt:
            interrupts += 1
            if interrupts == 1:
                print("\nStopping ...", file=sys.stderr)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGINT if interrupts == 1 else signal.SIGKILL)


def _report_failures(folder: Path, start: float) -> None:
    for path in sorted(p for p in folder.glob("*.failed.ipynb") if p.stat().st_mtime >= start):
        failure = json.loads(path.read_text())["metadata"]["failure"]
        name = path.name.removesuffix(".failed.ipynb")
        print(f"\n{name} failed: " + "\n".join(failure.splitlines()[-25:]), file=sys.stderr)
        print(f"the notebook as far as it came: {path}", file=sys.stderr)
    begun = folder.parent / ".staging"  # every job makes its folder there; without one, snakemake has said why
    if begun.is_dir() and begun.stat().st_mtime >= start:
        print(f"\nNot finished. {KEPT}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    """Split the profile from snakemake's options, check it before anything starts, and run."""
    parser = argparse.ArgumentParser(prog="./run_all.sh", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    known = profiles.names()
    text = f"{', '.join(known)} (default: demo), or the path of a .yaml file"
    parser.add_argument("--profile", default="demo", help=text)
    options, rest = parser.parse_known_args(arguments)
    if options.profile.endswith((".yaml", ".yml")) and Path(options.profile).exists():
        options.profile = str(Path(options.profile).resolve())  # snakemake runs in another directory
    try:
        if meant := [word for word in rest if word in known]:
            raise ValueError(f"{meant[0]} is a profile: did you mean --profile {meant[0]}?")
        profiles.check_all(profiles.load(options.profile))
        if rest:
            check_options(rest)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return run(options.profile, rest)


if __name__ == "__main__":
    sys.exit(main())
