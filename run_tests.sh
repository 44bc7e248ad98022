#!/usr/bin/env bash
# Sets up, checks lint and format, runs the tests. Arguments go to pytest: bash run_tests.sh -k config
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
bash scripts/setup.sh
.venv/bin/ruff check .
.venv/bin/ruff format --check .
exec .venv/bin/python -m pytest "$@"
