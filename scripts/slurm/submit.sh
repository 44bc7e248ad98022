#!/usr/bin/env bash
# Hands the three stages to Slurm; each starts when the one before has finished.
#   CONFIG=configs/qilin_med_7b.json NODES=2 bash scripts/slurm/submit.sh [key.path=value ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# What depends on the cluster:
export CONFIG=${CONFIG:-configs/qilin_med_7b.json}
NODES=${NODES:-1}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
CPUS_PER_NODE=${CPUS_PER_NODE:-64}
TIME=${TIME:-24:00:00}         # of one run of a job; a stage that takes longer is requeued and continues
SBATCH_OPTIONS=${SBATCH_OPTIONS:-}  # for example "--partition=gpu --account=lab"
STAGES=${STAGES:-pt sft dpo}

case " $* " in *" --restart "*) echo "error: --restart would begin anew at every requeue; move the old folder aside first" >&2; exit 2 ;; esac
mkdir -p runs/slurm
after=()
for stage in $STAGES; do
  # shellcheck disable=SC2086  # several options in one variable
  job=$(sbatch --parsable --job-name="qilin-med-$stage" --nodes="$NODES" --gpus-per-node="$GPUS_PER_NODE" \
    --cpus-per-task="$CPUS_PER_NODE" --time="$TIME" $SBATCH_OPTIONS "${after[@]}" \
    scripts/slurm/stage.sbatch "run_$stage.sh" "$@")
  job=${job%%;*}
  after=(--dependency="afterok:$job" --kill-on-invalid-dep=yes)
  echo "$stage: job $job, log runs/slurm/qilin-med-$stage-$job.log"
done
