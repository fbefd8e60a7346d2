#!/usr/bin/env bash
# The tests, a process a core (four at most) and a file of tests at a time: ./run_tests.sh [pytest options]
# One after the other, for a debugger: ./run_tests.sh -n 0
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/tools/bootstrap.sh"
bootstrap pytest xdist
cd "$ROOT"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # processes that share cores are slower with more threads each
exec "$PYTHON" -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
