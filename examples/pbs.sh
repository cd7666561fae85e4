#!/bin/bash
# A study on several machines under PBS: one Ray node per machine, the driver on the first.
# Its steps were run with a stand-in for pbs_tmrsh on one machine, never on a cluster: see docs/cluster.md.
#PBS -N glottoscope
#PBS -l select=4:ncpus=32:ngpus=4:mpiprocs=1
#PBS -l walltime=24:00:00
#PBS -j oe
# Without GPUs remove :ngpus=4 and set GPUS=0.
set -euo pipefail
cd "$PBS_O_WORKDIR"

STUDY=${STUDY:-study.toml}
RUN=${RUN:-runs/study}           # on a file system that all nodes share
VENV=${VENV:-$PWD/.venv}         # a full path: the same environment on all nodes
STOP_AFTER=${STOP_AFTER:-1435m}  # five minutes before the walltime: trainings keep their state
CPUS=${CPUS:-${NCPUS:-32}}
GPUS=${GPUS:-4}
source "$VENV/bin/activate"

mapfile -t NODES < <(sort -u "$PBS_NODEFILE")
# Some systems give a machine's own name to 127.0.1.1, where no other node could reach it.
HEAD_IP=${HEAD_IP:-$(getent ahostsv4 "$(hostname)" | awk '$1 !~ /^127\./ {print $1; exit}' || true)}
if [[ -z $HEAD_IP ]]; then
  echo "$(hostname) has no address that other nodes can reach: set HEAD_IP to that of the cluster's network" >&2
  exit 1
fi
# A port and a folder of the job's own: two jobs on a machine do not meet. Sockets need a short path.
JOB=${PBS_JOBID%%[^0-9]*}
PORT=${PORT:-$((20000 + 10#$JOB % 10000))}
TEMP=/tmp/gr$JOB
# Worker ports as the system likes, not from one range for all clusters on a machine.
NODE_OPTIONS=(--block --num-cpus "$CPUS" --num-gpus "$GPUS" --object-store-memory 200000000
  --min-worker-port 0 --max-worker-port 0)
export RAY_USAGE_STATS_ENABLED=0
# Only who can read the job's token can send work to its cluster. It lies where all nodes see it.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$PWD/.ray-token-$JOB
(umask 077 && python -c 'import secrets; print(secrets.token_hex(32))' >"$RAY_AUTH_TOKEN_PATH")
trap 'kill $(jobs -p) 2>/dev/null || true; rm -f "$RAY_AUTH_TOKEN_PATH"' EXIT

ray start --head --node-ip-address="$HEAD_IP" --port="$PORT" --include-dashboard=false --temp-dir="$TEMP" "${NODE_OPTIONS[@]}" &
for ((i = 0; i < 60; i++)); do
  (: <"/dev/tcp/$HEAD_IP/$PORT") 2>/dev/null && break
  sleep 2
done
for NODE in "${NODES[@]}"; do
  [[ ${NODE%%.*} == "$(hostname -s)" ]] && continue
  # PBS keeps count of processes that pbsdsh or pbs_tmrsh start, not of those of ssh. No shell, no quotes to get lost.
  pbs_tmrsh "$NODE" /usr/bin/env RAY_USAGE_STATS_ENABLED=0 RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$RAY_AUTH_TOKEN_PATH" \
    PATH="$PATH" "$VENV/bin/ray" start --address="$HEAD_IP:$PORT" "${NODE_OPTIONS[@]}" &
done
# Groups of layers are made for the nodes that are there when the driver starts.
python - "$HEAD_IP:$PORT" "${#NODES[@]}" <<'END'
import sys, time
import ray
ray.init(sys.argv[1], log_to_driver=False, logging_level="ERROR")
limit = time.time() + 300
while (there := sum(n["Alive"] for n in ray.nodes())) < int(sys.argv[2]) and time.time() < limit:
    time.sleep(2)
print(there, "of", sys.argv[2], "Ray nodes are there", flush=True)
END

timeout --foreground --signal=TERM --preserve-status "$STOP_AFTER" \
  glottoscope run "$STUDY" --out "$RUN" --engine ray --address "$HEAD_IP:$PORT" --plain &
DRIVER=$!
trap 'kill -TERM $DRIVER 2>/dev/null || true' TERM INT
CODE=0
while kill -0 $DRIVER 2>/dev/null; do # a signal ends `wait`, not the driver
  CODE=0
  wait $DRIVER || CODE=$?
done
exit $CODE
