#!/bin/bash
#SBATCH --job-name=matryo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --requeue
#SBATCH --open-mode=append
# One torchrun a machine. A job that is put back in the queue goes on from its newest checkpoint.
set -eu
out=${OUT:-runs/big}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
resume=
for checkpoint in "$out"/checkpoints/checkpoint-*; do
    [ -d "$checkpoint" ] && resume=--resume
done
export first out resume
# Quoted once more, so that every machine fills in its own number.
if srun --kill-on-bad-exit=1 bash -c 'torchrun --nnodes "$SLURM_JOB_NUM_NODES" --node-rank "$SLURM_NODEID" \
    --nproc-per-node "${PROCESSES:-8}" --master-addr "$first" --master-port "${PORT:-29500}" \
    -m matryo train "${PAIRS:-pairs.parquet}" --config "${CONFIG:-train.yaml}" --out "$out" $resume'; then
    exit 0
fi
[ "${SLURM_RESTART_COUNT:-0}" -lt "${RESTARTS:-3}" ] && scontrol requeue "$SLURM_JOB_ID"
exit 1
