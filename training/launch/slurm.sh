#!/usr/bin/env bash
#SBATCH --job-name=m2encoder
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#
# From the root of the clone, with its environment active, and --output-dir and the data on a shared file system:
#
#   sbatch --nodes 32 training/launch/slurm.sh large_1b @training/launch/32_nodes.args \
#     --output-dir /shared/runs/a --data.files '/shared/pairs/*.parquet'
#
# One torchrun on each node (node.sh). A failed process is started again by torchrun; for a failed node SLURM puts the
# job back into the queue, and the run goes on from its newest checkpoint.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?run this with sbatch}"

# All of it first: under pipefail `head` would end scontrol early and with it this script.
names=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export HEAD=${names%%$'\n'*}
export NODES=$SLURM_JOB_NUM_NODES
export GPUS_PER_NODE=${SLURM_GPUS_ON_NODE:-gpu}
# A port and a name of its own for each job and each of its restarts, so that no process of an old one can join.
export PORT=$((29500 + SLURM_JOB_ID % 1000))
export RUN_ID=$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}

# --kill-on-bad-exit: when one torchrun gives up, the others would wait for it until their time is over.
exec srun --ntasks-per-node=1 --kill-on-bad-exit=1 bash training/launch/node.sh "$@"
