#!/bin/bash
# A study on several machines under SLURM: one Ray node per machine, the driver on the first.
# Not run on a cluster by us; the two-node test (make test-ray) runs the same engine on one machine.
#SBATCH --job-name=glottoscope
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --gpus-per-node=4
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --output=glottoscope-%j.log
# Without GPUs remove the line --gpus-per-node.
set -euo pipefail

STUDY=${STUDY:-study.toml}
RUN=${RUN:-runs/study}               # on a file system that all nodes share
source "${VENV:-.venv}/bin/activate" # the same environment on all nodes

export RAY_USAGE_STATS_ENABLED=0
PORT=${PORT:-6379}
mapfile -t NODES < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
HEAD=${NODES[0]}
HEAD_IP=$(srun --nodes=1 --ntasks=1 --nodelist="$HEAD" hostname --ip-address | awk '{print $1}')
# Sockets need a short path; one folder per job, so that two jobs on a machine do not meet.
TEMP=/tmp/gr$SLURM_JOB_ID
RESOURCES=(--num-cpus "$SLURM_CPUS_PER_TASK" --num-gpus "${SLURM_GPUS_ON_NODE:-0}" --object-store-memory 200000000 --disable-usage-stats)

srun --nodes=1 --ntasks=1 --nodelist="$HEAD" --gpus-per-node="${SLURM_GPUS_ON_NODE:-0}" \
  ray start --block --head --node-ip-address="$HEAD_IP" --port="$PORT" --include-dashboard=false --temp-dir="$TEMP" \
  "${RESOURCES[@]}" &
sleep 15
for NODE in "${NODES[@]:1}"; do
  srun --nodes=1 --ntasks=1 --nodelist="$NODE" --gpus-per-node="${SLURM_GPUS_ON_NODE:-0}" \
    ray start --block --address="$HEAD_IP:$PORT" "${RESOURCES[@]}" &
done
sleep 15

# The driver runs on this script's node, which is the first. SLURM's signal reaches the script: hand it on, so that
# trainings keep their state, and wait for the end.
glottoscope run "$STUDY" --out "$RUN" --engine ray --address "$HEAD_IP:$PORT" --plain &
DRIVER=$!
trap 'kill -TERM $DRIVER; wait $DRIVER' TERM INT
CODE=0
wait $DRIVER || CODE=$?
kill $(jobs -p) 2>/dev/null || true
exit $CODE
