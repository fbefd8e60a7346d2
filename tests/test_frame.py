"""What holds the house together: environment files, profiles, the form of notebooks and modules."""

import ast
import json
import re
import subprocess
import sys
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from thesis_lib import paths, profiles

NOTEBOOKS = sorted(paths.NOTEBOOKS.glob("*.ipynb"))
PROFILES = sorted(path.stem for path in paths.PROFILES.glob("*.yaml"))
CONDA_NAMES = {"torch": "pytorch"}
NOT_ON_CONDA_FORGE = {"snakemake", "playwright"}


def project():
    return tomllib.loads((paths.ROOT / "pyproject.toml").read_text())["project"]


def requirements():
    return [Requirement(line) for line in project()["dependencies"] + project()["optional-dependencies"]["test"]]


def tracked_texts():
    endings = {".py", ".sh", ".md", ".yaml", ".yml", ".toml", ".lock", ".cff", ".ipynb", ".tex"}
    folders = ["thesis_lib", "tests", "benchmarks", "notebooks", "profiles", "tools", "figures", ".ci"]
    files = [path for folder in folders for path in (paths.ROOT / folder).rglob("*")] + list(paths.ROOT.iterdir())
    return [path for path in files if path.is_file() and (path.suffix in endings or path.name in ("Snakefile", "run"))]


def test_the_conda_environment_has_pyprojects_ranges():
    environment = yaml.safe_load((paths.ROOT / "environment.yml").read_text())
    assert environment["channels"] == ["conda-forge", "nodefaults"]
    *packages, pip = environment["dependencies"]
    assert pip == {"pip": ["-e .[test]"]}
    assert packages[1] == "pip" and re.fullmatch(r"python=3\.\d+", packages[0])
    conda = {r.name: r.specifier for r in map(Requirement, packages[2:])}
    wanted = {CONDA_NAMES.get(r.name, r.name): r.specifier for r in requirements() if r.name not in NOT_ON_CONDA_FORGE}
    assert conda == wanted


def test_the_lock_pins_all_within_the_ranges_and_names_no_address():
    lines = [line for line in (paths.ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    assert lines and not any(re.search(r"://|^-|@|/", line) for line in lines)
    pins = {canonicalize_name(r.name): next(iter(r.specifier)) for r in map(Requirement, lines)}
    assert all(pin.operator == "==" for pin in pins.values())
    for requirement in requirements():
        pin = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pin.version), f"{requirement} is pinned to {pin}"


def test_core_packages_have_upper_bounds():
    bounded = {r.name for r in requirements() if any(s.operator == "<" for s in r.specifier)}
    assert {"torch", "torchvision", "timm", "peft", "numpy", "pandas"} <= bounded


@pytest.mark.parametrize("profile", PROFILES)
def test_profiles_name_parameters_of_the_notebooks_with_values_of_their_types(profile):
    content = profiles.load(profile)
    numbered = [path.stem for path in NOTEBOOKS if path.stem[0].isdigit()]
    assert [section for section in content if section not in profiles.RESERVED] == numbered
    for name in numbered:
        notebook = paths.NOTEBOOKS / f"{name}.ipynb"
        profiles.check(content[name] | {"profile": profile}, notebook)
        for parameter, values in content["variants"].get(name, {}).items():
            for value in values:
                profiles.check({parameter: value}, notebook)


@pytest.mark.parametrize("profile", ["demo-gpu", "smoke-gpu", "thesis"])
def test_on_a_gpu_every_notebook_that_knows_devices_computes_there(profile):
    content = profiles.load(profile)
    for notebook in NOTEBOOKS:
        if notebook.stem[0].isdigit() and "device" in profiles.defaults(notebook):
            assert content[notebook.stem]["device"] == "cuda", notebook.stem


def test_a_profile_extends_another_and_says_what_differs(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "extends: thesis\n02_attention_evaluation: {dataset_root: /nights}\nvariants: {04_distillation: {}}"
    )
    (tmp_path / "ours.yaml").write_text("extends: mine.yaml\njobs: {threads: 3}")
    ours, thesis = profiles.load(str(tmp_path / "ours.yaml")), profiles.load("thesis")
    assert ours["02_attention_evaluation"] == thesis["02_attention_evaluation"] | {"dataset_root": "/nights"}
    assert ours["jobs"] == thesis["jobs"] | {"threads": 3} and ours["variants"]["04_distillation"] == {}
    rest = set(thesis) - {"02_attention_evaluation", "jobs", "variants"}
    assert {name: ours[name] for name in rest} == {name: thesis[name] for name in rest} and "extends" not in ours
    mine.write_text("extends: ours.yaml")
    with pytest.raises(ValueError, match="mine.yaml extends itself: mine.yaml > ours.yaml > mine.yaml"):
        profiles.load(str(mine))
    mine.write_text("extends: tesis")
    with pytest.raises(FileNotFoundError, match="no profile 'tesis': there are demo, demo-gpu"):
        profiles.load(str(mine))


def test_the_notebooks_own_defaults_are_the_demo_profile():
    content = profiles.load("demo")
    for notebook in NOTEBOOKS:
        defaults = profiles.defaults(notebook)
        assert defaults["profile"] == "demo"
        for name, value in content.get(notebook.stem, {}).items():
            assert defaults[name] == value, f"{notebook.stem}: {name}"
        for name, values in content["variants"].get(notebook.stem, {}).items():
            assert defaults[name] in values


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_short_and_stripped(notebook):
    content = json.loads(notebook.read_text())
    for cell in content["cells"]:
        assert "papermill" not in cell["metadata"]
        assert "injected-parameters" not in cell["metadata"].get("tags", [])
        if cell["cell_type"] == "code":
            assert cell["execution_count"] is None and cell["outputs"] == []
    assert content["cells"][0]["cell_type"] == "markdown" and "papermill" not in content["metadata"]
    code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert len(code) <= 15
    for cell in code:
        source = "".join(cell["source"])
        # A parameters cell has a line for each name that people know from the original scripts.
        assert len(source.splitlines()) <= 15 or "parameters" in cell["metadata"].get("tags", []), source
        for node in ast.walk(ast.parse(re.sub(r"^\s*[%!].*$", "", source, flags=re.MULTILINE))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                assert node.end_lineno - node.lineno < 3, f"{node.name} belongs into thesis_lib"


def test_modules_are_short():
    long = {
        path.name: n
        for path in (paths.ROOT / "thesis_lib").rglob("*.py")
        if (n := len(path.read_text().splitlines())) > 300
    }
    assert not long


def leaks(line: str, root: str) -> bool:
    home = r"(?<![\w.~$}])/(home|Users|work|root|farm|mnt|scratch)/\w"
    registry = r"(files\.)?pyth" + r"onhosted\.org|py" + r"pi\.org/simple|--(extra-)?index-url"
    here = rf"(?<![\w.~$}}-]){re.escape(root)}(?![\w.-])"  # of a checkout at /thesis, profiles/thesis.yaml is no path
    return any(re.search(expression, line) for expression in (home, registry, here))


def test_no_path_of_a_machine_and_no_registry_is_in_any_file():
    found = [
        f"{path.relative_to(paths.ROOT)}:{number}: {line.strip()[:100]}"
        for path in tracked_texts()
        if path.name != "test_frame.py"
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if leaks(line, str(paths.ROOT))
    ]
    assert not found
    assert leaks("in /thesis/data", "/thesis") and leaks("cd /thesis", "/thesis")
    assert not leaks("profiles/thesis.yaml of /thesis2", "/thesis")


def test_importing_the_package_and_its_frame_does_not_import_torch():
    modules = "thesis_lib.results, thesis_lib.pipeline, thesis_lib.report"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=paths.ROOT).returncode == 0


@pytest.mark.parametrize("script", ["run_all.sh", "run_tests.sh", "tools/bootstrap.sh", ".ci/run"])
def test_shell_scripts_parse(script):
    assert subprocess.run(["bash", "-n", paths.ROOT / script]).returncode == 0
