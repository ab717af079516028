#!/usr/bin/env bash
# One Ray head node on this machine, closed to everyone else:
#   cluster/local.sh start      in the background; prints the address to submit to
#   cluster/local.sh stop       this head and nothing else, by its process id
#   cluster/local.sh status     whether it runs
# Every port listens on 127.0.0.1, every request needs the token (made once, readable by you alone), nothing is reported home.
# Change by environment: PYTHON, DIFFPRUNE_HEAD (folder of pid, log and sessions), PORT (dashboard), CPUS, GPUS.
set -euo pipefail
umask 077
here=$(cd "$(dirname "$0")/.." && pwd)
asked=${PYTHON:-$here/.venv/bin/python}
PYTHON=$(command -v "$asked") || { echo "there is no $asked: set PYTHON to that of an environment with diffprune" >&2; exit 2; }
DIFFPRUNE_HEAD=${DIFFPRUNE_HEAD:-${TMPDIR:-/tmp}/diffprune-head-$(id -u)}
PORT=${PORT:-8265}
pidfile=$DIFFPRUNE_HEAD/pid
log=$DIFFPRUNE_HEAD/log
sessions=$DIFFPRUNE_HEAD/ray  # Ray opens this one to every user of the machine (0777), packages it runs included; its parent stays closed

export RAY_AUTH_MODE=token                  # without it Ray starts open to anyone when it finds no token
export RAY_USAGE_STATS_ENABLED=0
export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0  # this host only: all ports on 127.0.0.1, those for metrics too
export RAY_agent_register_timeout_ms=120000 # a busy machine needs more than Ray's 30 s, and the node dies with its agent
export RAY_ENABLE_UV_RUN_RUNTIME_ENV=0
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
unset RAY_ADDRESS
PATH=$(cd "$(dirname "$PYTHON")" && pwd):$PATH  # jobs are run with the PATH the head had
export PATH

# Whether the folder is ours alone: no link, and nobody else's, who could put a process id or packages of their own there.
own_folder() {
  [ -e "$DIFFPRUNE_HEAD" ] || [ -L "$DIFFPRUNE_HEAD" ] || (umask 077; mkdir -p "$DIFFPRUNE_HEAD")
  if [ -L "$DIFFPRUNE_HEAD" ] || [ ! -d "$DIFFPRUNE_HEAD" ] || [ ! -O "$DIFFPRUNE_HEAD" ]; then
    echo "$DIFFPRUNE_HEAD is a link, no folder, or belongs to another user: set DIFFPRUNE_HEAD to a folder of your own" >&2
    exit 2
  fi
  chmod 700 "$DIFFPRUNE_HEAD"
}

# Whether the process of the pid file is our head still; another may have its number by now.
running() { [ -s "$pidfile" ] && ps -ww -o args= -p "$(cat "$pidfile")" 2>/dev/null | grep -qF -- "--temp-dir $sessions"; }

free_ports() {  # $1 ports that nobody uses now, each once
  "$PYTHON" - "$1" <<'PY'
import socket, sys
held = [socket.create_server(("127.0.0.1", 0)) for _ in range(int(sys.argv[1]))]
print(*(s.getsockname()[1] for s in held))
PY
}

free() { "$PYTHON" -c 'import socket, sys; socket.create_server(("127.0.0.1", int(sys.argv[1])))' "$1" 2>/dev/null; }

start() {
  if running; then echo "a head is running already (process $(cat "$pidfile"), $DIFFPRUNE_HEAD)" >&2; exit 1; fi
  if [ "$PORT" -ge 10002 ] && [ "$PORT" -le 19999 ]; then echo "PORT $PORT is among Ray's worker ports (10002 to 19999): choose another" >&2; exit 2; fi
  if ! free "$PORT"; then echo "port $PORT is taken by another program: set PORT to another one" >&2; exit 1; fi
  (cd "$here" && "$PYTHON" -c "from diffprune.distributed.cluster import secure; secure()")
  read -r gcs agent agent_grpc environment metrics client <<<"$(free_ports 6)"
  local options=(--head --block --disable-usage-stats --node-ip-address 127.0.0.1 --port "$gcs"
    --dashboard-host 127.0.0.1 --dashboard-port "$PORT" --dashboard-agent-listen-port "$agent"
    --dashboard-agent-grpc-port "$agent_grpc" --runtime-env-agent-port "$environment" --metrics-export-port "$metrics"
    --ray-client-server-port "$client" --temp-dir "$sessions")
  [ -n "${CPUS:-}" ] && options+=(--num-cpus "$CPUS")
  [ -n "${GPUS:-}" ] && options+=(--num-gpus "$GPUS")
  nohup "$PYTHON" -m ray.scripts.scripts start "${options[@]}" >"$log" 2>&1 </dev/null &
  local pid=$!
  echo "$pid" >"$pidfile"
  for _ in $(seq 240); do  # not by `running`: until the shell's child has become Ray, its command line is the shell's
    kill -0 "$pid" 2>/dev/null || { echo "the head did not start:" >&2; tail -n 20 "$log" >&2; rm -f "$pidfile"; exit 1; }
    if answers; then echo "http://127.0.0.1:$PORT (process $(cat "$pidfile"), log $log)"; return; fi
    sleep 0.25
  done
  echo "the head does not answer on port $PORT after a minute, see $log" >&2
  stop
  exit 1
}

answers() {
  "$PYTHON" - "$PORT" <<'PY' 2>/dev/null
import sys, urllib.request
urllib.request.urlopen(f"http://127.0.0.1:{sys.argv[1]}/api/gcs_healthz", timeout=2)
PY
}

stop() {
  if ! running; then echo "no head is running in $DIFFPRUNE_HEAD"; rm -f "$pidfile"; return; fi
  local pid; pid=$(cat "$pidfile")
  kill "$pid"  # `ray start --block` takes its own children down; `ray stop` would take everybody's
  for _ in $(seq 480); do kill -0 "$pid" 2>/dev/null || { rm -f "$pidfile"; echo "stopped $pid"; return; }; sleep 0.25; done
  echo "process $pid does not end" >&2
  exit 1
}

case "${1:-}" in start | stop | status) own_folder ;; esac
case "${1:-}" in
  start) start ;;
  stop) stop ;;
  status) if running; then echo "running: process $(cat "$pidfile"), log $log"; else echo "not running"; exit 1; fi ;;
  *) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
