#!/usr/bin/env bash
# Sets up, checks lint and format, runs the tests. Arguments go to pytest: bash run_tests.sh -k config
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
bash scripts/setup.sh
.venv/bin/ruff check .
.venv/bin/ruff format --check .
# One worker a core, each with whole files (files share costly fixtures); more threads than cores slow torch several times.
export OMP_NUM_THREADS=1
exec .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
