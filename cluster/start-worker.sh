#!/usr/bin/env bash
# Joins this machine to a Ray cluster as a place for workers of one role.
#
#   cluster/start-worker.sh --head 10.0.0.5:6379 --role rollout             as many places as GPUs, or else as CPUs
#   cluster/start-worker.sh --head 10.0.0.5:6379 --role reward --places 2   two
#   cluster/start-worker.sh --head 10.0.0.5:6379 --role learner --places 1 -- --block    what follows -- goes to `ray start`
#
# ROLE is rollout, reward or learner: a custom resource of that name, so that a run whose runtime.ROLE.resources is
# {ROLE: 1} has its workers here. Copy the head's token file first, to RAY_AUTH_TOKEN_PATH (default ~/.ray/auth_token), mode 0600.
# Ray listens on the network here: a firewall should admit this cluster's machines alone. Ends with Ctrl-C under --block, or with `ray stop`.
set -euo pipefail

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; }

head='' role='' places='' cpus='' gpus='' node_ip='' metrics_port=8080
while (($#)); do
  case $1 in
    --head) head=${2:?--head needs HOST:PORT}; shift 2 ;;
    --role) role=${2:?--role needs a name}; shift 2 ;;
    --places) places=${2:?--places needs a number}; shift 2 ;;
    --cpus) cpus=${2:?--cpus needs a number}; shift 2 ;;
    --gpus) gpus=${2:?--gpus needs a number}; shift 2 ;;
    --node-ip) node_ip=${2:?--node-ip needs an address}; shift 2 ;;
    --metrics-port) metrics_port=${2:?--metrics-port needs a number}; shift 2 ;;
    -h | --help) usage; exit 0 ;;
    --) shift; break ;;
    *) echo "start-worker.sh: unknown argument $1; see --help" >&2; exit 2 ;;
  esac
done
if [[ $head != *:* ]]; then
  echo "start-worker.sh: --head must be HOST:PORT, got '$head'" >&2
  exit 2
fi
case $role in
  rollout | reward | learner) ;;
  *) echo "start-worker.sh: --role must be rollout, reward or learner, got '$role'" >&2; exit 2 ;;
esac

# shellcheck source=ray-env.sh
source "$(dirname "${BASH_SOURCE[0]}")/ray-env.sh"
rlalign_require_token
if rlalign_is_loopback "${head%:*}"; then
  echo "start-worker.sh: --head $head is a loopback address, which no worker can join; start the head with" \
    "--node-ip ADDRESS, or give the head places itself: start-head.sh --cpus 8 --resources '{\"rollout\": 4}'" >&2
  exit 2
fi

export no_proxy=$no_proxy,${head%:*} NO_PROXY=$no_proxy,${head%:*}

cpus=${cpus:-$(rlalign_cpus)}
gpus=${gpus:-$(rlalign_gpus)}
places=${places:-$((gpus > 0 ? gpus : cpus))}
if [[ ! $places =~ ^[1-9][0-9]*$ ]]; then
  echo "start-worker.sh: --places must be a whole number >= 1, got '$places'" >&2
  exit 2
fi
exec ray start --address "$head" ${node_ip:+--node-ip-address "$node_ip"} \
  --num-cpus "$cpus" --num-gpus "$gpus" --resources "{\"$role\": $places}" --labels "rlalign/role=$role" \
  --metrics-export-port "$metrics_port" --disable-usage-stats "$@"
