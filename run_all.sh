#!/usr/bin/env bash
# The whole pipeline on a fresh machine: setup, demo data and base model, three stages, evaluation, report.
#   bash run_all.sh                                      the demo, minutes on two CPU cores
#   SEED=8 bash run_all.sh seed=8                        the same in another world, with rows in another order
#   CONFIG=configs/qilin_med_7b.json bash run_all.sh     the paper, with data/processed and models/baichuan-7b in place
#   bash run_all.sh --dry-run                            check all of it, and stop (scripts/check.py; --gpus 8 --gpu a100-80g)
# Run it again after any interruption: finished steps are skipped, an interrupted one continues.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
export CONFIG=${CONFIG:-configs/demo.json}
[[ " $* " == *" --dry-run "* ]] && is_dry=yes || is_dry=
[ "$CONFIG" = configs/demo.json ] && is_demo=yes || is_demo=

bash scripts/setup.sh                                                          # 2 min the first time
if [ "$is_demo" ] && [ ! "$is_dry" ]; then
  .venv/bin/python scripts/make_demo.py --seed "${SEED:-7}"                     # 2 min: invented raw files, base model
  .venv/bin/python scripts/build_chimed.py configs/demo_chimed.json            # 15 s: clean, deduplicated training sets
fi
.venv/bin/python scripts/check.py --config "$CONFIG" ${is_demo:+--made-first data/demo --made-first runs/demo-base} "$@"
[ ! "$is_dry" ] || exit 0
bash run_pt.sh "$@"
bash run_sft.sh "$@"
bash run_dpo.sh "$@"
.venv/bin/python scripts/evaluate.py --config "$CONFIG" "$@"
if [ "$is_demo" ]; then
  .venv/bin/python scripts/build_index.py --config "$CONFIG" "$@"
  .venv/bin/python scripts/evaluate.py --config "$CONFIG" --retrieval --models sft --tasks cmexam_options,unseen "$@"
fi
.venv/bin/python scripts/report.py --config "$CONFIG" "$@"
