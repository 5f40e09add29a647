#!/usr/bin/env bash
#SBATCH --job-name=tagsmith
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@600
#SBATCH --open-mode=append
# One run on several machines under Slurm: one torchrun on each, one rank on each of its GPUs.
#   sbatch scripts/slurm_train.sh configs/mine.yaml [section.key=value ...]
# The run is runs/<recipe>. Ten minutes before the time is over it is asked to stop by a STOP file (a signal would leave
# it the 30 s that torchrun gives), saves a checkpoint and ends. Submit it again, with any number of machines, and it goes
# on from there. Images, index and runs must lie on storage that all machines see.
set -euo pipefail
if [ $# -lt 1 ]; then
    echo "usage: sbatch scripts/slurm_train.sh RECIPE [section.key=value ...]" >&2
    exit 2
fi
recipe="$1"
shift
name="$(basename "$recipe" .yaml)"
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}"
first="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
# A port of the job's own, so that two jobs may share a machine.
port=$((20000 + SLURM_JOB_ID % 20000))
training=""
interrupted=false
# Before the run's folder is there, nothing would be lost: then the signal itself goes on to the training.
# shellcheck disable=SC2329 # the trap calls it
stop() {
    interrupted=true
    if ! touch "runs/$name/STOP" 2> /dev/null; then
        if [ -z "$training" ]; then
            exit 143
        fi
        kill -TERM "$training" || true
    fi
}
trap stop TERM
# srun does not take --cpus-per-task over from the job by itself since Slurm 22.05.
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" .venv/bin/python -m torch.distributed.run \
    --nnodes="$SLURM_JOB_NUM_NODES" \
    --nproc-per-node="${SLURM_GPUS_ON_NODE:-gpu}" \
    --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$first:$port" \
    --max-restarts=0 \
    train_direct.py --config "$recipe" --resume auto "$@" run.output_dir=runs run.name="$name" &
training=$!
code=0
while :; do # a signal ends a wait, the training goes on
    interrupted=false
    code=0
    wait "$training" || code=$?
    "$interrupted" || break
done
exit "$code"
