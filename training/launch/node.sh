#!/usr/bin/env bash
# One torchrun on this host. Run it on every host of a run, with the same words:
#
#   NODES=4 HEAD=10.0.0.1 bash training/launch/node.sh large_1b @training/launch/4_nodes.args \
#     --output-dir /shared/runs/a --data.files '/shared/pairs/*.parquet'
#
# The first word is the preset, @FILE stands for the settings in FILE, everything else goes to training.pretrain.
# When a process or a host fails, all processes start again from the newest checkpoint; a host that was started anew
# joins by the same command. Only HEAD must stay: it keeps the list of who is there.
#
# NODES         number of hosts (1). MIN:MAX goes on with fewer, where the settings can be divided among them
# HEAD          a host's name or address, by which all can reach it; needed for more than one host
# PORT          of HEAD (29500)
# RUN_ID        the same on all hosts, different for runs that share a HEAD and a PORT (m2encoder)
# GPUS_PER_NODE processes per host (gpu: one for each GPU)
# MAX_RESTARTS  failures after which the run ends (3)
# RDZV_CONF     more for torchrun's --rdzv_conf, such as join_timeout=3600: seconds to wait for a lost host (600)
# PYTHON        the interpreter (python)
# Where a host has several networks, NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME name the one to use.
set -euo pipefail

PYTHON=${PYTHON:-python}
NODES=${NODES:-1}
PORT=${PORT:-29500}

if [ $# -eq 0 ] || [ "${1#-}" != "$1" ]; then
  echo "usage: [NODES=N HEAD=ADDRESS] bash $0 PRESET [@SETTINGS_FILE] [--setting VALUE ...]" >&2
  exit 2
fi
preset=$1
shift
settings=()
for word in "$@"; do
  if [ "${word#@}" != "$word" ]; then
    # Split at blanks and lines, as the shell would have split what was typed.
    mapfile -t words < <(tr -s '[:space:]' '\n' <"${word#@}" | sed '/^$/d')
    [ ${#words[@]} -gt 0 ] || { echo "no settings in ${word#@}" >&2; exit 2; }
    settings+=("${words[@]}")
  else
    settings+=("$word")
  fi
done

rendezvous=(--standalone)
if [ "$NODES" != 1 ]; then
  if [ -z "${HEAD:-}" ]; then
    echo "HEAD is not set: $NODES hosts need the address of one of them to meet at." >&2
    exit 2
  fi
  # torchrun finds out whether this host is HEAD by its host name, which fails in containers and with several networks
  # (then nobody keeps the list, and all wait): the address that can be bound is ours. The other one is that by which
  # this host reaches HEAD; its processes are told to the others under it.
  mapfile -t found < <("$PYTHON" - "$HEAD" "$PORT" <<'PY'
import socket
import sys

family, _, _, _, address = socket.getaddrinfo(sys.argv[1], int(sys.argv[2]), type=socket.SOCK_DGRAM)[0]
with socket.socket(family, socket.SOCK_DGRAM) as probe:
    try:
        probe.bind((address[0], 0))
        is_head = 1
    except OSError:
        is_head = 0
with socket.socket(family, socket.SOCK_DGRAM) as probe:
    probe.connect(address)  # sends nothing
    print(is_head, probe.getsockname()[0], sep="\n")
PY
  )
  if [ ${#found[@]} -ne 2 ]; then
    echo "HEAD $HEAD cannot be resolved or reached from this host." >&2
    exit 2
  fi
  rendezvous=(
    --nnodes "$NODES" --rdzv_backend c10d --rdzv_endpoint "$HEAD:$PORT" --rdzv_id "${RUN_ID:-m2encoder}"
    --rdzv_conf "is_host=${found[0]}${RDZV_CONF:+,$RDZV_CONF}" --local_addr "${found[1]}"
  )
  # torch 2.13 lets rank 0's agent keep its store from one start to the next and tell nobody its address again: a host
  # that was started anew waits for it for ever. Without this sharing every start has a store of its own.
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
fi

# A later setting wins: --resume of the caller over this one.
exec "$PYTHON" -m torch.distributed.run "${rendezvous[@]}" \
  --nproc_per_node "${GPUS_PER_NODE:-gpu}" --max_restarts "${MAX_RESTARTS:-3}" \
  -m training.pretrain "$preset" --resume auto "${settings[@]}"
