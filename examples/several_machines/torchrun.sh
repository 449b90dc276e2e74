#!/bin/sh
# The same on every machine; only the number differs: sh torchrun.sh 0 on the first, 1 on the second, ...
# MACHINES, PROCESSES (a machine) and FIRST (address of machine 0) may be set. After a failure add --resume on all.
set -eu
rank=$1
shift
exec torchrun --nnodes "${MACHINES:-2}" --node-rank "$rank" --nproc-per-node "${PROCESSES:-1}" \
    --master-addr "${FIRST:-127.0.0.1}" --master-port "${PORT:-29500}" \
    -m matryo train "$@"
