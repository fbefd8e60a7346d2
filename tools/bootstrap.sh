# Sourced by run_all.sh and run_tests.sh: sets PYTHON to an interpreter whose thesis_lib is this checkout.
#
# An active environment (venv, conda, or whatever `python` is) that imports thesis_lib from here is used as it is.
# Otherwise .venv, active or not, is made with the pins of requirements.lock, by uv where it is installed, else or where
# uv fails by pip. An interrupted attempt is made again from nothing, and other pins than those of its stamp bring it up
# to date.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV="$ROOT/.venv"
STAMP="$VENV/.thesis_lib"
UNFINISHED="$ROOT/.venv.unfinished" # holds the process id of who is making it

fail() {
  echo "error: $*" >&2
  exit 1
}

# Nothing is imported. -P keeps the current directory out of sys.path, or any interpreter would find thesis_lib here.
serves() {
  "$1" -P - "$ROOT" "${@:2}" <<'PYTHON' 2>/dev/null
import importlib.util, pathlib, sys
root, *names = sys.argv[1:]
spec = importlib.util.find_spec("thesis_lib")
here = spec and spec.origin and pathlib.Path(spec.origin).resolve().parent.parent == pathlib.Path(root).resolve()
sys.exit(not (here and all(map(importlib.util.find_spec, ("torch", "timm", "papermill", "snakemake", *names)))))
PYTHON
}

# Of a Python that is newer than the pins some packages have no build.
pinned() {
  "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null
}

pins() {
  cat "$ROOT/requirements.lock" "$ROOT/pyproject.toml" | cksum
}

find_python() {
  local name
  for name in python3 python python3.13 python3.12 python3.11 python3.14; do
    if pinned "$name"; then
      command -v "$name"
      return
    fi
  done
  return 1
}

# An older uv knows no --clear, a newer one stops at what is there.
uv_makes() {
  command -v uv >/dev/null || return
  { [ -x "$VENV/bin/python" ] || { rm -rf "$VENV" && uv venv --quiet --python '>=3.11,<3.15' "$VENV"; }; } &&
    uv pip install --quiet --python "$VENV/bin/python" -r "$ROOT/requirements.lock" &&
    uv pip install --quiet --python "$VENV/bin/python" --no-deps -e "$ROOT" && return
  echo "uv could not make .venv (see above): trying pip ..." >&2
  return 1
}

pip_makes() {
  local base
  if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then # nothing there, or what uv made, which has no pip
    rm -rf "$VENV"
    base=$(find_python) || fail "Python 3.11 to 3.14 is needed, for which requirements.lock has packages; \
here is $(python3 --version 2>&1 || echo none). Install one of them, or install uv, which brings its own"
    "$base" -c 'import venv, ensurepip' 2>/dev/null ||
      fail "$base cannot make environments: install its venv module (Debian, Ubuntu: apt install python3-venv), or uv"
    "$base" -m venv "$VENV" || fail "$base could not make .venv"
  fi
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -r "$ROOT/requirements.lock" &&
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps -e "$ROOT"
}

make_venv() {
  [ -f "$UNFINISHED" ] && kill -0 "$(cat "$UNFINISHED")" 2>/dev/null &&
    fail "process $(cat "$UNFINISHED") is making .venv at this moment: wait for it (or remove .venv.unfinished)"
  if [ -f "$UNFINISHED" ]; then
    echo "The last attempt to make .venv was interrupted: making it again." >&2
    rm -rf "$VENV"
  fi
  echo $$ >"$UNFINISHED"
  rm -f "$STAMP"
  echo "Making .venv with the pins of requirements.lock (once; some minutes and 6 GB with CUDA's libraries) ..." >&2
  uv_makes || pip_makes || fail "the packages could not be installed (see above); the same command tries again"
  serves "$VENV/bin/python" || fail ".venv does not import thesis_lib from $ROOT: remove .venv and try again"
  pins >"$STAMP"
  rm -f "$UNFINISHED"
}

# The names given as arguments must be importable as well (pytest, for the tests).
bootstrap() {
  local active
  active=$(command -v python || command -v python3 || true)
  [ "${active%/*}" -ef "$VENV/bin" ] && active="" # activated, ours is still checked against its stamp
  if [ -n "$active" ] && serves "$active" "$@"; then
    PYTHON=$active
  elif [ -n "$active" ] && serves "$active"; then
    fail "the active environment ($active) lacks one of: $*. Run: python -m pip install -e '.[test]'"
  else
    # A .venv without a stamp was made by hand: good as it is if it serves.
    if [ -f "$UNFINISHED" ] || ! serves "$VENV/bin/python" "$@" ||
      { [ -f "$STAMP" ] && [ "$(cat "$STAMP")" != "$(pins)" ]; }; then
      make_venv
    fi
    PYTHON="$VENV/bin/python"
  fi
}
