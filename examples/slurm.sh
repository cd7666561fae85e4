#!/bin/bash
# A study on several machines under SLURM: one Ray node per machine, the driver on the first.
# Its steps were run with stand-ins for scontrol and srun on one machine, never on a cluster: see docs/cluster.md.
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

mapfile -t NODES < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
HEAD=${NODES[0]}
# Some systems give a machine's own name to 127.0.1.1, where no other node could reach it.
HEAD_IP=${HEAD_IP:-$(getent ahostsv4 "$HEAD" | awk '$1 !~ /^127\./ {print $1; exit}' || true)}
if [[ -z $HEAD_IP ]]; then
  echo "$HEAD has no address that other nodes can reach: set HEAD_IP to that of the cluster's network" >&2
  exit 1
fi
# A port and a folder of the job's own: two jobs on a machine do not meet. Sockets need a short path.
PORT=${PORT:-$((20000 + SLURM_JOB_ID % 10000))}
TEMP=/tmp/gr$SLURM_JOB_ID
GPUS=${SLURM_GPUS_ON_NODE:-0}
STEP=(srun --nodes=1 --ntasks=1)
((GPUS)) && STEP+=(--gpus-per-node="$GPUS")
# Worker ports as the system likes, not from one range for all clusters on a machine.
NODE_OPTIONS=(--block --num-cpus "$SLURM_CPUS_PER_TASK" --num-gpus "$GPUS" --object-store-memory 200000000
  --min-worker-port 0 --max-worker-port 0)
export RAY_USAGE_STATS_ENABLED=0
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # since SLURM 22.05 srun does not take it from sbatch
# Only who can read the job's token can send work to its cluster. It lies where all nodes see it.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$PWD/.ray-token-$SLURM_JOB_ID
(umask 077 && python -c 'import secrets; print(secrets.token_hex(32))' >"$RAY_AUTH_TOKEN_PATH")
trap 'kill $(jobs -p) 2>/dev/null || true; rm -f "$RAY_AUTH_TOKEN_PATH"' EXIT

"${STEP[@]}" --nodelist="$HEAD" \
  ray start --head --node-ip-address="$HEAD_IP" --port="$PORT" --include-dashboard=false --temp-dir="$TEMP" "${NODE_OPTIONS[@]}" &
for ((i = 0; i < 60; i++)); do
  (: <"/dev/tcp/$HEAD_IP/$PORT") 2>/dev/null && break
  sleep 2
done
for NODE in "${NODES[@]:1}"; do
  "${STEP[@]}" --nodelist="$NODE" ray start --address="$HEAD_IP:$PORT" "${NODE_OPTIONS[@]}" &
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

# The driver runs on this script's node, which is the first. SLURM's signal reaches the script: hand it on, so that
# trainings keep their state, and wait for the end.
glottoscope run "$STUDY" --out "$RUN" --engine ray --address "$HEAD_IP:$PORT" --plain &
DRIVER=$!
trap 'kill -TERM $DRIVER 2>/dev/null || true' TERM INT
CODE=0
while kill -0 $DRIVER 2>/dev/null; do # a signal ends `wait`, not the driver
  CODE=0
  wait $DRIVER || CODE=$?
done
exit $CODE
