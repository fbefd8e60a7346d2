#!/usr/bin/env bash
# Everything: the environment (once), then every notebook, table and figure.
#   ./run_all.sh                                  the demo
#   ./run_all.sh --profile smoke                  every cell on a few samples; `thesis` for the real data
#   ./run_all.sh -n                               what would run; any snakemake option may follow
#   ./run_all.sh --profile thesis --workflow-profile profiles/slurm      on a Slurm cluster
# (--profile is ours; snakemake's own option of that name is reached as --workflow-profile.)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/tools/bootstrap.sh"
bootstrap
exec "$PYTHON" -m thesis_lib.pipeline "$@"
