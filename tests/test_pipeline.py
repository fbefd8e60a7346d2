"""The DAG and its two layers above: a house with the real Snakefile and package, and notebooks that do nothing."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import nbformat
import pandas as pd
import pytest

from thesis_lib import paths, pipeline, profiles, report, results

PROFILES = sorted(path.stem for path in paths.PROFILES.glob("*.yaml"))
SCORE = """{"metric": "2afc", "value": 0.5, "low": 0.4, "high": 0.6, "unit": "1", "n": 9, "split": "test",
    "mixer": mixer, "stage": "zero-shot"}"""
EVALUATE = f"""\
import os, pathlib, time
from thesis_lib import paths, results
with open(paths.ROOT / "ran", "a") as ran: print(mixer, file=ran)
while (paths.ROOT / f"wait-{{mixer}}").exists(): time.sleep(0.1)
name = f"02_attention_evaluation-{{mixer}}"
results.write([{SCORE}], name, profile=profile)
results.write_table(results.read(name, profile=profile), name + ".triplets", profile=profile)"""


@pytest.fixture
def house(tmp_path):
    """Copy what the pipeline needs; notebook 02 alone exists, for two mixers."""
    for name in ("Snakefile", "thesis_lib"):
        copy = shutil.copytree if (paths.ROOT / name).is_dir() else shutil.copy
        copy(paths.ROOT / name, tmp_path / name)
    for name in ("notebooks", "profiles"):
        (tmp_path / name).mkdir()
    notebook = nbformat.v4.new_notebook()
    defaults = 'profile = "demo"\nmixer = "mha"\ndevice = "cpu"'
    first = nbformat.v4.new_code_cell(defaults, metadata={"tags": ["parameters"]})
    notebook.cells = [first, nbformat.v4.new_code_cell(EVALUATE)]
    nbformat.write(notebook, tmp_path / "notebooks" / "02_attention_evaluation.ipynb")
    variants = "variants: {02_attention_evaluation: {mixer: [mha, pool]}}\n"
    (tmp_path / "profiles" / "demo.yaml").write_text(variants)
    return tmp_path


def start(house, *options):
    environment = {name: value for name, value in os.environ.items() if name not in ("THESIS_DATA", "THESIS_FIGURES")}
    call = [sys.executable, "-m", "thesis_lib.pipeline", *options]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(call, cwd=house, env=environment | {"PYTHONPATH": str(house)}, **pipe)


def finish(process):
    output, _ = process.communicate(timeout=120)
    return process.returncode, output


@pytest.mark.parametrize(("device", "first"), [("cpu", "05"), ("cuda", "02")])
def test_the_core_study_comes_first_where_a_gpu_is_shared(house, device, first):
    for name in ("05_attention_transfer", "07_image_classification"):
        shutil.copy(house / "notebooks/02_attention_evaluation.ipynb", house / f"notebooks/{name}.ipynb")
    (house / "profiles" / "demo.yaml").write_text(f"05_attention_transfer: {{device: {device}}}\n")
    code, output = finish(start(house, "-n"))
    assert code == 0, output
    found = re.findall(r"output: data/results/demo/(\d\d)_(?:(?!\nrule).)*?priority: (\d+)", output, re.DOTALL)
    assert len(found) > 1 and max(found, key=lambda job: int(job[1]))[0] == first, output


@pytest.mark.parametrize("drawn", [True, False])
def test_on_published_sets_studies_of_their_own_do_not_wait_for_the_drawing(house, drawn):
    parameters = "\n".join(['profile = "demo"', *(f"{name} = {{}}" for name in profiles.SYNTHETIC)])
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    nbformat.write(notebook, house / "notebooks" / "01_data_preparation.ipynb")
    for name in ("05_attention_transfer", "07_image_classification"):
        shutil.copy(house / "notebooks/02_attention_evaluation.ipynb", house / f"notebooks/{name}.ipynb")
    section = dict.fromkeys(profiles.SYNTHETIC, {}) | ({"synthetic_images": {"train": 3}} if drawn else {})
    (house / "profiles" / "demo.yaml").write_text(json.dumps({"01_data_preparation": section}))
    code, output = finish(start(house, "-n"))
    assert code == 0, output
    jobs = {job[0]: job[1] for job in re.findall(r"rule (\w+):\n    input: (.*)", output)}
    waiting = {name for name, needed in jobs.items() if "01_data_preparation.parquet" in needed}
    own = {"attention_transfer", "image_classification"}
    assert waiting & own == (own if drawn else set()) and "attention_evaluation" in waiting, output


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--bogus"], "unrecognized arguments: --bogus"),
        (["--jobs"], "argument --jobs/-j: expected one argument"),
        (["--forcerun", "distilation", "-n"], "unknown rule 'distilation': did you mean 'distillation'"),
        (["attention_evaluation"], "attention_evaluation is a rule of several runs"),
        (["--workflow-profile", "profiles/slrm"], "there is no workflow profile profiles/slrm"),
    ],
)
def test_wrong_options_are_one_line(options, said, capsys):
    assert pipeline.main(options) == 2
    assert capsys.readouterr().err.startswith(f"error: {said}")


@pytest.mark.parametrize("options", [["-n"], ["-nF"], ["--dry-run"], ["--list-rules"], ["--dag=dot"], ["--version"]])
def test_options_that_only_tell_are_known(options):
    pipeline.check_options(options)
    assert pipeline.only_tells(options) and not pipeline.only_tells(["--jobs", "2", "-j2", "--keep-going", "-k"])


def test_the_report_of_nothing_is_one_line():
    call = [sys.executable, "-m", "thesis_lib.report"]
    for name, said in (("demp", "no profile 'demp'"), ("smoke-gpu", "nothing has run for profile 'smoke-gpu'")):
        ran = subprocess.run([*call, name], capture_output=True, text=True, cwd=paths.ROOT)
        assert ran.returncode == 1 and ran.stderr.startswith(f"error: {said}") and ran.stderr.count("\n") == 1


def test_an_interrupted_run_is_resumed_without_doing_again_what_had_finished(house):
    (house / "wait-pool").touch()
    process = start(house)
    while not (house / "ran").exists() or (house / "ran").read_text().split() != ["mha", "pool"]:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    status, output = finish(process)
    assert status == 130 and "Interrupted" in output and "Traceback" not in output

    (house / "wait-pool").unlink()
    status, output = finish(start(house))
    assert status == 0, output
    assert (house / "ran").read_text().split() == ["mha", "pool", "pool"]
    assert "02_attention_evaluation-pool" in output and "50.0% [40.0%, 60.0%]" in output
    left = {p.name for p in (house / "data" / "results" / "demo").rglob("*") if p.is_file()}
    runs = ["02_attention_evaluation-mha", "02_attention_evaluation-pool"]
    assert left == {f"{run}{end}" for run in runs for end in (".parquet", ".triplets.parquet", ".ipynb")}


FIGURES = """\
import hashlib
import pandas as pd
from thesis_lib import paths, results
with open(paths.ROOT / "ran", "a") as ran: print("figures", file=ran)
figure = paths.FIGURES / profile / "a.tex"
figure.parent.mkdir(parents=True, exist_ok=True)
figure.write_text("made")
digest = hashlib.sha256(b"made").hexdigest()
files = pd.DataFrame({"path": [f"{profile}/a.tex"], "sha256": [digest]})
results.write_table(files, "09_thesis_figures", profile=profile)"""


def test_the_figures_are_made_again_when_one_is_gone_or_rows_of_other_hardware_come(house):
    notebook = nbformat.v4.new_notebook()
    first = nbformat.v4.new_code_cell('profile = "demo"', metadata={"tags": ["parameters"]})
    notebook.cells = [first, nbformat.v4.new_code_cell(FIGURES)]
    nbformat.write(notebook, house / "notebooks" / "09_thesis_figures.ipynb")
    ran, figure, measured = house / "ran", house / "figures" / "demo" / "a.tex", house / "data" / "measured"

    def again():
        before = ran.read_text().split() if ran.exists() else []
        status, output = finish(start(house))
        assert status == 0, output
        return ran.read_text().split()[len(before) :], output

    assert again()[0] == ["mha", "pool", "figures"]
    stray = house / "data" / "results" / "demo" / "02_attention_evaluation-sra.triplets.parquet"
    stray.touch()
    nothing, output = again()
    assert nothing == [] and f"warning: {stray.relative_to(house)} is of no run of this profile" in output
    assert output.count("warning:") == 1
    figure.unlink()
    assert again()[0] == ["figures"] and figure.exists()
    measured.mkdir()
    (measured / "efficiency-gpu.parquet").touch()
    os.utime(measured / "efficiency-gpu.parquet", (0, 0))  # as `cp -p` leaves it
    assert again()[0] == ["figures"]


def test_figures_that_are_not_those_of_this_run_are_forced_unless_the_user_forces_more(monkeypatch, tmp_path):
    monkeypatch.setattr(paths, "RESULTS", tmp_path)
    monkeypatch.setattr(paths, "FIGURES", tmp_path)
    forced = ["--forcerun", "thesis_figures"]
    assert "--forcerun" not in pipeline.command("demo", [])  # of a fresh clone, whose figures are committed
    files = pd.DataFrame({"path": ["a.tex"], "sha256": [hashlib.sha256(b"made").hexdigest()]})
    made = results.write_table(files, "09_thesis_figures", profile="demo")
    for content, differ in ((None, True), (b"another", True), (b"made", False)):
        if content:
            (tmp_path / "a.tex").write_bytes(content)
        call = pipeline.command(str(tmp_path / "demo.yaml"), [])
        assert call[call.index("--forcerun") :][:2] == forced if differ else "--forcerun" not in call
    made.write_bytes(b"damaged")
    assert "--forcerun" in pipeline.command("demo", [])
    assert pipeline.command("demo", ["-R", "attention_evaluation"]).count("--forcerun") == 0


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """Put a small Python program, run in an empty results folder, in snakemake's place."""
    monkeypatch.setattr(paths, "RESULTS", tmp_path)
    program = [sys.executable, "-c"]
    monkeypatch.setattr(pipeline, "command", lambda profile, options: program)
    return program


def test_a_failed_run_ends_with_the_traceback_and_where_to_look(alone, tmp_path, capsys):
    path = tmp_path / "demo" / "notebooks" / "02_toy-pool.failed.ipynb"
    path.parent.mkdir(parents=True)
    text = json.dumps({"metadata": {"failure": "in In [4]\n" + "x\n" * 50 + "ValueError: what was wrong"}})
    begin = f"import os; os.mkdir({str(tmp_path / 'demo' / '.staging')!r})"
    alone.append(f"{begin}; open({str(path)!r}, 'w').write({text!r}); exit(3)")
    assert pipeline.run("demo", []) == 3
    error = capsys.readouterr().err
    assert "02_toy-pool failed" in error and "ValueError: what was wrong" in error and str(path) in error
    assert error.count("x\n") < 30 and "goes on from there" in error


def test_where_no_job_began_nothing_is_said_to_be_kept(alone, tmp_path, capsys):
    earlier = tmp_path / "demo" / ".staging"
    earlier.mkdir(parents=True)
    os.utime(earlier, (0, 0))
    alone.append("exit(2)")
    assert pipeline.run("demo", ["--dry"]) == 2
    assert capsys.readouterr().err == ""


def test_two_runs_do_not_fill_the_same_results(alone, tmp_path, capsys):
    alone.append(f"open({str(tmp_path / 'ran')!r}, 'w')")
    lock = f"lock = filelock.FileLock({str(tmp_path / '.lock')!r})"
    holder = f"import filelock; {lock}; lock.acquire(); print(flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", holder], **pipes) as other:
        other.stdout.readline()
        assert pipeline.run("demo", []) == 1
        assert "another run is filling" in capsys.readouterr().err
        assert not (tmp_path / "ran").exists()
        assert pipeline.run("demo", ["-n"]) == 0  # only tells
        other.kill()  # a run that died holds nothing
        other.wait()
        assert pipeline.run("demo", []) == 0 and (tmp_path / "ran").exists()
        assert "nothing has run" in capsys.readouterr().out


def test_a_profile_that_does_not_exist_is_refused_with_those_there_are(capsys):
    assert pipeline.main(["--profile", "demp"]) == 2
    assert f"there are {', '.join(PROFILES)}, or the path" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ("01_data_preparation: {dataset_rot: /x}", "no parameter 'dataset_rot'; did you mean dataset_root?"),
        ("10_proposed_model: {rounds: many}", "10_proposed_model.ipynb: rounds is int"),
        ("10_proposed_model: {3: 4}", "no parameter 3"),
        ("variants: {02_attention_evaluation: {mixr: [mha]}}", "no parameter 'mixr'"),
        ("variants: {02_attention_evaluation: {attention_module: [mha, 3]}}", "attention_module is str"),
        ("- demo", "mine.yaml holds no sections"),
        ("demo", "mine.yaml holds no sections"),
        ("jobs: [1", "mine.yaml is not readable as YAML"),
        ("jobs:\n\tthreads: 1", "mine.yaml is not readable as YAML"),
        (b"jobs: {threads: \xff}", "mine.yaml is not readable as YAML"),
        ("extends: [demo]", "mine.yaml: extends: ['demo'] is not"),
        ("01_data_preparation: 5", "mine.yaml: 01_data_preparation: 5 is no mapping"),
        ("jobs: 4", "mine.yaml: jobs: 4 is no mapping"),
        ("1: {}", "mine.yaml: section 1 is no notebook's name"),
        ("variants: [mha]", "mine.yaml: variants: ['mha'] is no mapping"),
        ("variants: {02_attention_evaluation: [mha]}", "variants: 02_attention_evaluation: ['mha'] is no mapping"),
        ("variants: {02_attention_evaluation: {attention_module: mha}}", "is no mapping"),  # not of three letters
        ("jobs: {threads: 1}\njobs: {threads: 2}", "the key jobs stands twice"),
        ("01_data_preparation: {seed: 1, seed: 2}", "the key seed stands twice"),
    ],
)
def test_a_profile_is_checked_before_anything_starts(monkeypatch, tmp_path, capsys, profile, message):
    path = tmp_path / "mine.yaml"
    path.write_bytes(profile if isinstance(profile, bytes) else profile.encode())
    monkeypatch.setattr(pipeline, "run", lambda profile, options: pytest.fail("it started"))
    assert pipeline.main(["--profile", str(path)]) == 2
    assert message in capsys.readouterr().err


def test_a_file_that_would_write_into_the_results_of_another_profile_is_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(pipeline, "run", lambda profile, options: 0)
    (tmp_path / "demo.yaml").write_text("extends: demo\n")
    assert pipeline.main(["--profile", str(tmp_path / "demo.yaml")]) == 2
    assert "results of profiles/demo.yaml: rename it" in capsys.readouterr().err
    assert pipeline.main(["--profile", str(paths.PROFILES / "demo.yaml")]) == 0


@pytest.mark.parametrize("words", [["smoke"], ["-n", "smoke"], ["--profil", "smoke"]])
def test_a_profile_without_its_option_is_asked_after(monkeypatch, capsys, words):
    monkeypatch.setattr(pipeline, "run", lambda profile, options: pytest.fail("it started"))
    assert pipeline.main(words) == 2
    assert "did you mean --profile smoke?" in capsys.readouterr().err


def test_help_lists_the_profiles_there_are(capsys):
    with pytest.raises(SystemExit):
        pipeline.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert ", ".join(PROFILES) in text


@pytest.mark.parametrize("name", ["mine.yaml", "mine.yml"])
def test_a_profiles_path_starts_where_the_user_is(monkeypatch, tmp_path, name):
    (tmp_path / name).write_text("variants: {}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline, "run", lambda profile, options: (profile, options))
    assert pipeline.main(["--profile", name, "-n"]) == (str(tmp_path / name), ["-n"])
    assert pipeline.main([]) == ("demo", [])


def test_the_users_options_come_before_our_defaults(monkeypatch):
    monkeypatch.setattr(pipeline.gpu, "visible", lambda: ["0", "1"])
    ours = pipeline.command("demo", [])
    assert ours[ours.index("--cores") + 1] == "all" and "gpu=2" in ours and ours[-1] == "profile=demo"
    assert "--cores" not in pipeline.command("demo", ["--jobs", "3"])
    assert "--cores" not in pipeline.command("demo", ["-j3"])
    cluster = pipeline.command("thesis", ["--executor", "slurm", "--jobs=8"])
    assert "--cores" not in cluster and "--resources" not in cluster


@pytest.mark.parametrize(("device", "gpus"), [("cuda", 1), ("cpu", 0)])
def test_a_cluster_is_asked_for_a_gpu_only_where_the_profile_computes_on_one(house, device, gpus):
    pytest.importorskip("snakemake_executor_plugin_slurm")
    shutil.copytree(paths.ROOT / "profiles" / "slurm", house / "profiles" / "slurm")
    (house / "profiles" / "demo.yaml").write_text(f"variants: {{}}\n02_attention_evaluation: {{device: {device}}}\n")
    call = [sys.executable, "-m", "thesis_lib.pipeline", "--workflow-profile", "profiles/slurm", "-np"]
    told = subprocess.run(call, cwd=house, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(house)})
    assert told.returncode == 0, told.stdout + told.stderr  # also: no rule asks how many cores this machine has
    assert f"gpu={gpus}" in told.stdout and ("--gpu" in told.stdout) == bool(gpus)


def test_the_headline_has_every_mixer_and_stage_with_its_interval():
    row = {"metric": "2afc", "split": "test", "n": 9, "low": 0.1, "high": 0.9}
    scores = [("pool", "distilled", 0.8), ("pool", "zero-shot", 0.5), ("mha", "zero-shot", 0.9)]
    rows = pd.DataFrame([row | {"mixer": m, "stage": s, "value": v} for m, s, v in scores])
    lines = report.headline(rows).splitlines()
    assert "9 test triplets" in lines[0]
    assert [line.split()[0] for line in lines[2:]] == ["MHA", "Pool"]
    assert lines[3].index("50.0% [10.0%, 90.0%]") < lines[3].index("80.0% [10.0%, 90.0%]")


def test_nothing_has_run():
    with pytest.raises(FileNotFoundError, match=r"run_all\.sh --profile never"):
        report.describe("never")
