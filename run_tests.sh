#!/usr/bin/env bash
# The tests: ./run_tests.sh [pytest options]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/tools/bootstrap.sh"
bootstrap pytest
cd "$ROOT"
exec "$PYTHON" -m pytest "$@"
