"""tools/bootstrap.sh, with a uv and a python that only write down what they are asked."""

import os
import shutil
import subprocess
import sys

import pytest

from thesis_lib import paths

UV = """#!/bin/sh
echo "uv $*" >> calls
[ -f broken ] && exit 1
case "$*" in *--clear*) echo "error: unexpected argument '--clear'" >&2; exit 2; esac # as before uv 0.8
if [ "$1" = venv ]; then for venv; do :; done; mkdir -p "$venv/bin"; cp "$(dirname "$0")/serving" "$venv/bin/python"; fi
exit 0
"""


def script(path, text):
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def checkout(tmp_path):
    """A checkout with the script alone, and a PATH on which uv is a stand-in and no python imports thesis_lib."""
    (tmp_path / "tools").mkdir()
    (tmp_path / "bin").mkdir()
    shutil.copy(paths.ROOT / "tools" / "bootstrap.sh", tmp_path / "tools")
    for name in ("requirements.lock", "pyproject.toml"):
        (tmp_path / name).write_text("1")
    for tool in ("bash", "cat", "cksum", "dirname", "rm", "mkdir", "cp"):
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    script(tmp_path / "bin" / "uv", UV)
    script(tmp_path / "bin" / "serving", "#!/bin/sh\nexit 0\n")
    script(tmp_path / "bin" / "python3", "#!/bin/sh\nexit 1\n")
    return tmp_path


def bootstrap(folder, *names, **environment):
    real = "make_venv() { fail 'no test fills the checkout'; };" if folder == paths.ROOT else ""
    call = ["bash", "-euc", f"source tools/bootstrap.sh; {real} bootstrap {' '.join(names)}; echo $PYTHON"]
    environment = {"PATH": str(folder / "bin")} | environment
    return subprocess.run(call, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


def calls(folder):
    log = folder / "calls"
    return [" ".join(line.split()[:3]) for line in log.read_text().splitlines()] if log.exists() else []


MADE = ["uv venv --quiet", "uv pip install", "uv pip install"]


def test_the_environment_is_made_once_and_brought_up_to_date_when_the_pins_change(checkout):
    python = str(checkout / ".venv" / "bin" / "python")
    first, again = bootstrap(checkout), bootstrap(checkout)
    assert first.stdout.strip() == again.stdout.strip() == python, first.stderr
    assert calls(checkout) == MADE
    (checkout / "requirements.lock").write_text("2")
    assert bootstrap(checkout).stdout.strip() == python
    assert calls(checkout) == MADE + MADE[1:]


def test_an_interrupted_environment_is_not_trusted(checkout):
    (checkout / "broken").touch()
    failed = bootstrap(checkout)
    assert failed.returncode == 1 and "uv could not make .venv" in failed.stderr
    assert "Python 3.11 to 3.14 is needed" in failed.stderr
    (checkout / "broken").unlink()
    half = checkout / ".venv" / "bin" / "python"  # it would answer that all is well
    half.parent.mkdir(parents=True)
    script(half, "#!/bin/sh\nexit 0\n")
    (checkout / ".venv" / "half").touch()
    assert bootstrap(checkout).returncode == 0
    assert not (checkout / ".venv" / "half").exists() and not (checkout / ".venv.unfinished").exists()
    assert calls(checkout)[1:] == MADE


BASE = """#!/bin/sh
[ "$1" = -P ] && exit 1
if [ "$1 $2" = "-m venv" ]; then mkdir -p "$3/bin"; cp "${0%/*}/serving" "$3/bin/python"; echo >"$3/of-pip"; fi
"""


def test_where_uv_fails_pip_goes_on(checkout):
    (checkout / "broken").touch()
    script(checkout / "bin" / "python3", BASE)
    made = bootstrap(checkout)
    assert made.returncode == 0 and "uv could not make .venv (see above): trying pip" in made.stderr
    assert (checkout / ".venv" / "of-pip").exists() and not (checkout / ".venv.unfinished").exists()
    assert calls(checkout) == MADE[:1]


def test_the_projects_own_environment_is_held_to_its_stamp_when_it_is_active(checkout):
    bootstrap(checkout)
    active = {"PATH": f"{checkout}/.venv/bin{os.pathsep}{checkout}/bin"}
    assert bootstrap(checkout, **active).returncode == 0 and calls(checkout) == MADE
    (checkout / "requirements.lock").write_text("2")
    assert bootstrap(checkout, **active).stdout.strip() == str(checkout / ".venv" / "bin" / "python")
    assert calls(checkout) == MADE + MADE[1:]
    (checkout / ".venv.unfinished").touch()
    assert "was interrupted" in bootstrap(checkout, **active).stderr
    assert calls(checkout) == MADE + MADE[1:] + MADE


def test_two_do_not_make_it_at_once(checkout):
    (checkout / ".venv.unfinished").write_text(str(os.getpid()))
    busy = bootstrap(checkout)
    assert busy.returncode == 1 and f"process {os.getpid()} is making .venv" in busy.stderr
    assert calls(checkout) == []


PYTHON = """#!{executable}
import sys
if sys.argv[1] == "--version":
    print("Python {version}")
elif sys.argv[1] == "-c" and "version_info" in sys.argv[2]:
    sys.version_info = tuple(map(int, "{version}".split(".")))
    exec(sys.argv[2])
else:
    sys.exit("the Python that is taken")
"""


@pytest.mark.parametrize("version", ["3.9.2", "3.10.14", "3.15.0", "4.0.0"])
def test_without_uv_a_python_that_the_pins_are_not_for_is_refused(checkout, version):
    (checkout / "bin" / "uv").unlink()
    script(checkout / "bin" / "python3", PYTHON.format(executable=sys.executable, version=version))
    refused = bootstrap(checkout)
    assert refused.returncode == 1 and f"here is Python {version}. Install one of them" in refused.stderr


@pytest.mark.parametrize(
    ("others", "taken"), [({"python3": "3.11.0"}, "python3"), ({"python3.14": "3.14.2"}, "python3.14")]
)
def test_without_uv_a_python_that_suits_is_taken_before_a_newer_one(checkout, others, taken):
    (checkout / "bin" / "uv").unlink()
    for name, version in {"python3": "3.15.0", **others}.items():
        script(checkout / "bin" / name, PYTHON.format(executable=sys.executable, version=version))
    assert f"{checkout}/bin/{taken} cannot make environments" in bootstrap(checkout).stderr


def test_an_active_environment_is_used_as_it_is_if_it_has_what_is_needed(tmp_path):
    script(tmp_path / "python", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')  # this one may be the checkout's own
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    active = bootstrap(paths.ROOT, "pytest", **environment)
    assert active.stdout.strip() == str(tmp_path / "python"), active.stderr
    lacks = bootstrap(paths.ROOT, "no_such_module", **environment)
    assert lacks.returncode == 1 and "lacks one of: no_such_module" in lacks.stderr
