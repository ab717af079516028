#!/usr/bin/env bash
#SBATCH --job-name=diffprune
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --gpus-per-node=4
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# One job on a Ray that lives as long as this allocation:
#   SHARED=/scratch/$USER/diffprune sbatch cluster/slurm.sh demo --gpus 1 [further options of diffprune run]
# SHARED  folder on storage that all nodes reach: results in $SHARED/runs, the hub's cache, the token (required)
# PYTHON  interpreter of an environment with diffprune, on the same storage [the one on PATH]
# IFNAME  network interface between the nodes [that of the default route]
# Whole nodes (--exclusive) are needed: Ray's own command refuses a node that runs a Ray, and ends with a `ray stop` of all.
set -euo pipefail
umask 077

[ $# -ge 1 ] || { echo "name a job: sbatch cluster/slurm.sh demo --gpus 1" >&2; exit 2; }
[ -n "${SHARED:-}" ] || { echo "SHARED is not set: name a folder on storage that all nodes reach" >&2; exit 2; }
asked=${PYTHON:-python}
PYTHON=$(command -v "$asked") || { echo "there is no $asked: set PYTHON to that of an environment with diffprune" >&2; exit 2; }
mkdir -p "$SHARED/runs"

IFNAME=${IFNAME:-$(ip -o -4 route show default | awk '{ for (i = 1; i < NF; i++) if ($i == "dev") { print $(i + 1); exit } }')}
[ -n "$IFNAME" ] || { echo "this node has no default route: set IFNAME to the interface between the nodes" >&2; exit 2; }
head_ip=$(ip -o -4 addr show dev "$IFNAME" 2>/dev/null | awk '{ sub("/.*", "", $4); print $4; exit }' || :)  # we are on the first node
[ -n "$head_ip" ] || { echo "interface $IFNAME has no IPv4 address: set IFNAME" >&2; exit 2; }
port=$((20000 + SLURM_JOB_ID % 10000))  # outside Ray's worker ports (10002 to 19999) and Linux's ephemeral ones

PATH=$(cd "$(dirname "$PYTHON")" && pwd):$PATH
export PATH
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$SHARED/auth_token RAY_USAGE_STATS_ENABLED=0
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=${RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT:-600}  # Ray's 30 s are less than an import takes
export RAY_agent_register_timeout_ms=120000 RAY_enable_metrics_collection=0                  # metrics ports: off
export AUTOSCALER_METRIC_PORT=-1 DASHBOARD_METRIC_PORT=-1
export GLOO_SOCKET_IFNAME=$IFNAME NCCL_SOCKET_IFNAME=$IFNAME  # else gloo may take 127.0.0.1 and never meet
export HF_HOME=${HF_HOME:-$SHARED/huggingface} DIFFPRUNE_DATA=${DIFFPRUNE_DATA:-$SHARED/data} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
unset RAY_ADDRESS RAY_AUTH_TOKEN
"$PYTHON" -c "from diffprune.distributed.cluster import secure; secure()"  # makes the token where it is missing, 0600

# Ray opens its folder to every user of the node, so it lies in one that is ours alone: `mkdir` fails where the name is taken.
# By the variable, not by --temp-dir: the `ray.init()` of Ray's own command, too, looks there for the cluster that it has started.
export RAY_TMPDIR=/tmp/dp-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
# The inner --address matters: the command is a plain process and would start a Ray of its own. Where Ray does not start, its command
# says so and ends well: hence the note of the job that has begun. --cpu-bind: srun takes no --cpus-per-task over from sbatch, and
# would bind Ray to one core where the site binds tasks.
# shellcheck disable=SC2016  # expanded on each node
srun --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 bash -c '
  set -e
  mkdir -m 700 "$RAY_TMPDIR"
  trap "rm -rf \"$RAY_TMPDIR\"" EXIT
  trap : TERM  # of scancel, which Ray has been sent as well: it ends first, or it would lose its folder, and put files there again
  ray symmetric-run --address "$1" --min-nodes "$SLURM_NNODES" \
    --num-cpus "${SLURM_CPUS_ON_NODE:-1}" --num-gpus "${SLURM_GPUS_ON_NODE:-0}" -- \
    sh -c "touch \"\$RAY_TMPDIR/began\"; exec \"\$@\"" _ "${@:2}"
  [ "$SLURM_NODEID" != 0 ] || [ -e "$RAY_TMPDIR/began" ] || { echo "Ray did not start on the first node, see above" >&2; exit 1; }
' _ "$head_ip:$port" "$PYTHON" -m diffprune run "$@" --address "$head_ip:$port" --out "$SHARED/runs"
