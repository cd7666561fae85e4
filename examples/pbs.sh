#!/bin/bash
# A study on several machines under PBS: one Ray node per machine, the driver on the first.
# Not run on a cluster by us; the two-node test (make test-ray) runs the same engine on one machine.
#PBS -N glottoscope
#PBS -l select=4:ncpus=32:ngpus=4:mpiprocs=1
#PBS -l walltime=24:00:00
#PBS -j oe
# Without GPUs remove :ngpus=4 and set GPUS=0.
set -euo pipefail
cd "$PBS_O_WORKDIR"

STUDY=${STUDY:-study.toml}
RUN=${RUN:-runs/study} # on a file system that all nodes share
VENV=${VENV:-$PWD/.venv}
source "$VENV/bin/activate"

CPUS=${CPUS:-32}
GPUS=${GPUS:-4}
PORT=${PORT:-6379}
export RAY_USAGE_STATS_ENABLED=0
mapfile -t NODES < <(sort -u "$PBS_NODEFILE")
HEAD_IP=$(hostname --ip-address | awk '{print $1}')
# Sockets need a short path; one folder per job, so that two jobs on a machine do not meet.
TEMP=/tmp/gr${PBS_JOBID%%.*}
RESOURCES="--num-cpus $CPUS --num-gpus $GPUS --object-store-memory 200000000 --disable-usage-stats"

# $RESOURCES is several words.
ray start --head --node-ip-address="$HEAD_IP" --port="$PORT" --include-dashboard=false --temp-dir="$TEMP" $RESOURCES
trap 'ray stop' EXIT
for NODE in "${NODES[@]}"; do
  # PBS keeps count of processes that pbsdsh or pbs_tmrsh start, not of those of ssh.
  [[ $NODE == "$(hostname)"* || "$(hostname)" == "$NODE"* ]] && continue
  pbs_tmrsh "$NODE" bash -c "source $VENV/bin/activate; RAY_USAGE_STATS_ENABLED=0 ray start --block --address=$HEAD_IP:$PORT $RESOURCES" &
done
sleep 30

glottoscope run "$STUDY" --out "$RUN" --engine ray --address "$HEAD_IP:$PORT" --plain &
DRIVER=$!
trap 'kill -TERM $DRIVER; wait $DRIVER; ray stop' TERM INT
CODE=0
wait $DRIVER || CODE=$?
kill $(jobs -p) 2>/dev/null || true
exit $CODE
