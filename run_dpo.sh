#!/usr/bin/env bash
# Stage 3, LoRA direct preference optimisation: prepares the data in one process, then launches one rank per GPU.
#   CONFIG=configs/qilin_med_7b.json bash run_dpo.sh [key.path=value ...] [--dry-run] [--restart]
# Several machines: NODES, NODE_RANK, MASTER_ADDR (and MASTER_PORT) on each, or HOSTFILE on the first (docs/scaling.md).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
[ -x .venv/bin/python ] || bash scripts/setup.sh
exec .venv/bin/python dpo_training.py --config "${CONFIG:-configs/demo.json}" "$@"
