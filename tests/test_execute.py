"""papermill made strict: throwaway notebooks, each with one way to fail."""

import json
import os
import signal
import subprocess
import sys
import time

import nbformat
import pytest

from thesis_lib import execute, paths, results

ROW = '{"metric": "m", "value": 1.0, "unit": "1", "n": 1, "mixer": mixer}'
WRITE = f'from thesis_lib import results\npath = results.write([{ROW}], f"02_toy-{{mixer}}", profile=profile)'
# A result without the seconds that importing pandas takes.
TOUCH = (
    "import json, os, pathlib\nrun = json.loads(os.environ['THESIS_RUN'])\n"
    "pathlib.Path(run['staging'], '02_toy-mha.parquet').touch()"
)


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A profile t.yaml and a function that writes the notebook 02_toy with the given cells after its parameters."""
    monkeypatch.setattr(paths, "RESULTS", tmp_path / "data" / "results")
    section = "02_toy: {lr: 1.0e-3}\nvariants: {02_toy: {mixer: [mha, pool]}}\n"
    (tmp_path / "t.yaml").write_text(section)

    def make(*cells):
        notebook = nbformat.v4.new_notebook()
        first = 'profile = "demo"\nmixer = "mha"\nlr = 1e-4  # a = b\nsizes = [1, 2]\nlimit = None'
        notebook.cells = [nbformat.v4.new_code_cell(first, metadata={"tags": ["parameters"]})]
        notebook.cells += [nbformat.v4.new_code_cell(cell) for cell in cells]
        nbformat.write(notebook, tmp_path / "02_toy.ipynb")
        return tmp_path / "02_toy.ipynb"

    return make


def plan(notebook, **overrides):
    return execute.plan(notebook, str(notebook.with_name("t.yaml")), overrides)


def folder(notebook):
    return notebook.parent / "data" / "results" / "t"


def left(notebook):
    return sorted(str(p.relative_to(folder(notebook))) for p in folder(notebook).rglob("*") if p.is_file())


def test_a_run_is_named_after_its_variant_and_is_production_only_as_the_profile_says(house):
    notebook = house()
    run = plan(notebook)
    assert (run.name, run.production, run.results) == ("02_toy-mha", True, ("02_toy-mha",))
    assert run.parameters == {"lr": 1e-3, "profile": "t"}
    assert (plan(notebook, mixer="pool").name, plan(notebook, mixer="pool").production) == ("02_toy-pool", True)
    assert not plan(notebook, mixer="sra").production  # no variant of the profile
    assert plan(notebook, lr=1e-3).production and not plan(notebook, lr=1e-2).production


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"mixr": "pool"}, "no parameter 'mixr'; did you mean mixer"),
        ({"lr": "fast"}, "lr is float"),
        ({"sizes": 3}, r"write a list as '\[a, b\]'"),
        ({"mixer": True}, "mixer is str"),
        ({"lr": True}, "lr is float"),
    ],
)
def test_a_wrong_parameter_fails_before_anything_runs(house, overrides, message):
    with pytest.raises(ValueError, match=message):
        plan(house(), **overrides)


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ("02_toy: {lr: 1e-4}", "write 1.0e-4"),
        ("02_toy: {sizes: [2.5E8]}", r"write 2.5e\+8"),
        ("02_tyo: {}", "did you mean 02_toy"),
        ("02_toy: {learning: 1}", "no parameter 'learning'"),
        ("variants: {02_toy: {mixr: [mha]}}", "no parameter 'mixr'"),
    ],
)
def test_a_wrong_profile_fails_before_anything_runs(house, profile, message):
    notebook = house()
    notebook.with_name("t.yaml").write_text(profile)
    with pytest.raises(ValueError, match=message):
        plan(notebook)


def test_numbers_on_the_command_line_may_be_written_as_people_do(house, capsys):
    notebook = house()
    arguments = [str(notebook), "--profile", str(notebook.with_name("t.yaml")), "-p", "sizes", "1e-4"]
    assert execute.main(arguments) == 2  # a number, but sizes is a list
    assert "not 0.0001" in capsys.readouterr().err
    assert execute.main([*arguments[:3], "-p", "mixr", "pool"]) == 2
    assert "did you mean mixer" in capsys.readouterr().err
    assert execute.main([str(notebook.with_name("02_toi.ipynb"))]) == 2
    assert "did you mean 02_toy" in capsys.readouterr().err


def test_a_device_that_is_not_here_ends_before_the_notebook(house, capsys):
    notebook = house(WRITE)
    content = nbformat.read(notebook, as_version=4)
    content.cells[0].source += '\ndevice = "cpu"'
    nbformat.write(content, notebook)
    profile = str(notebook.with_name("t.yaml"))
    assert execute.main([str(notebook), "--profile", profile, "-p", "device", "cudda"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: no device 'cudda' here") and "-p device cpu" in error and error.count("\n") == 1
    assert left(notebook) == []


@pytest.mark.parametrize(
    ("text", "default", "value"),
    [
        ("1e-4", 0.1, 1e-4),
        ("no", "mha", "no"),
        ("", "x", ""),
        ("[a, b]", [], ["a", "b"]),
        ("null", 3, None),
        ("7", 3, 7),
    ],
)
def test_the_command_lines_values_are_read_as_the_default_wants_them(text, default, value):
    assert execute._value(text, default) == value


def test_success_moves_rows_with_their_provenance_and_the_executed_notebook(house, monkeypatch, tmp_path):
    # A kernel that a user has installed under the usual name, and that is no Python, must not be taken.
    other = tmp_path / "jupyter" / "kernels" / "python3"
    other.mkdir(parents=True)
    (other / "kernel.json").write_text(json.dumps({"argv": ["false"], "display_name": "x", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    before = dict(os.environ)
    notebook = house(WRITE, "import os, sys\nprint(sys.executable, os.getcwd(), lr)")
    output = execute.execute(plan(notebook, mixer="pool"))
    assert dict(os.environ) == before
    assert left(notebook) == ["02_toy-pool.parquet", "notebooks/02_toy-pool.ipynb"]
    printed = nbformat.read(output, as_version=4).cells[-1].outputs[0].text.split()
    assert printed == [sys.executable, str(tmp_path), "0.001"]
    made_by = results.provenance(folder(notebook) / "02_toy-pool.parquet")
    assert made_by["notebook"] == "02_toy.ipynb" and made_by["production"] is True
    everything = {"profile": "t", "mixer": "pool", "lr": 1e-3, "sizes": [1, 2], "limit": None}
    assert made_by["parameters"] == everything


def test_what_a_run_no_longer_writes_is_removed_and_no_other_runs(house):
    notebook = house(TOUCH)
    notebook.with_name("t.yaml").write_text("variants: {02_toy: {mixer: [mha, mha.big]}}\n")
    others = ["02_toy-mha.big.modes", "02_toy-mha.big", "02_toy-mha.own", "02_toy-mha.own.modes", "02_toy-mhax.modes"]
    (folder(notebook) / "notebooks").mkdir(parents=True)
    (folder(notebook) / "notebooks" / "02_toy-mha.own.ipynb").touch()  # a run with a value of one's own
    for name in [*others, "02_toy-mha", "02_toy-mha.modes"]:
        (folder(notebook) / f"{name}.parquet").write_bytes(b"older")
    execute.execute(plan(notebook))
    found = {path.stem: path.read_bytes() for path in folder(notebook).glob("*.parquet")}
    assert found == dict.fromkeys(others, b"older") | {"02_toy-mha": b""}


def test_an_executed_notebook_shows_its_own_run_alone(house):
    notebook = house(TOUCH)
    content = nbformat.read(notebook, as_version=4)
    tagged = nbformat.v4.new_markdown_cell("In the committed run ...", metadata={"tags": [execute.COMMITTED]})
    content.cells += [tagged, nbformat.v4.new_markdown_cell("What it means.")]
    nbformat.write(content, notebook)
    shown = nbformat.read(execute.execute(plan(notebook)), as_version=4).cells
    assert [cell.source for cell in shown if cell.cell_type == "markdown"] == ["What it means."]
    assert len(nbformat.read(notebook, as_version=4).cells) == len(content.cells)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ((TOUCH, "1 / 0", "x = 1"), r"In \[4\](.|\n)*----> 1 1 / 0(.|\n)*ZeroDivisionError"),
        ((TOUCH, "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"), r"kernel died(.|\n)*signal.SIGKILL"),
        ((TOUCH, "import sys\nsys.exit(0)", "x = 1"), r"SystemExit: 0(.|\n)*sys\.exit"),
        (("x = 1",), r"did not write 02_toy-mha \(it wrote nothing\)"),
        ((TOUCH, "raise OSError(28, 'No space left on device')"), r"disk of .* is full .* make room"),
    ],
    ids=["error", "dead kernel", "exit", "no result", "disk full"],
)
def test_a_failure_names_its_cause_and_leaves_older_results_as_they_were(house, cells, message):
    notebook = house(*cells)
    older = folder(notebook) / "02_toy-mha.parquet"
    older.parent.mkdir(parents=True)
    older.write_bytes(b"of an earlier run")
    with pytest.raises(RuntimeError, match=message):
        execute.execute(plan(notebook))
    assert older.read_bytes() == b"of an earlier run"
    assert left(notebook) == ["02_toy-mha.parquet", "notebooks/02_toy-mha.failed.ipynb"]


def test_ctrl_c_ends_the_kernel_and_leaves_nothing(house, tmp_path):
    notebook = house(
        TOUCH, "import os, pathlib, time\npathlib.Path('pid').write_text(str(os.getpid()))\ntime.sleep(60)"
    )
    environment = os.environ | {"THESIS_DATA": str(tmp_path / "data")}
    call = [sys.executable, "-m", "thesis_lib.execute", notebook, "--profile", tmp_path / "t.yaml"]
    process = subprocess.Popen(call, env=environment, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    pid = tmp_path / "pid"
    while process.poll() is None and not (pid.exists() and pid.read_text()):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130 and "the same command goes on" in error
    assert left(notebook) == []
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_another_rank_of_torchrun_runs_too_and_leaves_nothing(house, monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "1")
    notebook = house(TOUCH, "import os, pathlib\npathlib.Path('seen').write_text(os.environ['RANK'])")
    execute.execute(plan(notebook))
    assert (tmp_path / "seen").read_text() == "1"
    assert left(notebook) == []
