#!/usr/bin/env bash
# Starts the head of a Ray cluster on this machine, without a cluster manager.
#
#   cluster/start-head.sh                          loopback only: nothing outside this machine reaches it
#   cluster/start-head.sh --node-ip 10.0.0.5       other machines of a private network may join
#   cluster/start-head.sh --node-ip 10.0.0.5 -- --block    what follows -- goes to `ray start`
#
# The token is made on the first start, in RAY_AUTH_TOKEN_PATH (default ~/.ray/auth_token), mode 0600. The dashboard and its
# jobs interface are on 127.0.0.1 always; from elsewhere: ssh -L 8265:127.0.0.1:8265 HEAD. The head takes no work itself
# (--num-cpus 0) unless told: --cpus N, --gpus N, --resources JSON. Ends with Ctrl-C under --block, or with `ray stop`.
set -euo pipefail

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; }

node_ip=127.0.0.1 port=6379 dashboard_port=8265 metrics_port=8080 cpus=0 gpus=0 resources='{}'
while (($#)); do
  case $1 in
    --node-ip) node_ip=${2:?--node-ip needs an address}; shift 2 ;;
    --port) port=${2:?--port needs a number}; shift 2 ;;
    --dashboard-port) dashboard_port=${2:?--dashboard-port needs a number}; shift 2 ;;
    --metrics-port) metrics_port=${2:?--metrics-port needs a number}; shift 2 ;;
    --cpus) cpus=${2:?--cpus needs a number}; shift 2 ;;
    --gpus) gpus=${2:?--gpus needs a number}; shift 2 ;;
    --resources) resources=${2:?--resources needs a JSON object}; shift 2 ;;
    -h | --help) usage; exit 0 ;;
    --) shift; break ;;
    *) echo "start-head.sh: unknown argument $1; see --help" >&2; exit 2 ;;
  esac
done

# shellcheck source=ray-env.sh
source "$(dirname "${BASH_SOURCE[0]}")/ray-env.sh"
rlalign_new_token
rlalign_require_token

if rlalign_is_loopback "$node_ip"; then
  export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 # Ray's switch for "this machine alone": every server keeps to loopback
else
  unset RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER
  echo "start-head.sh: listening on the network; let a firewall admit this cluster's machines alone. The token guards" \
    "the cluster and its jobs; the metrics port $metrics_port has no guard" >&2
fi
exec ray start --head --node-ip-address "$node_ip" --port "$port" \
  --num-cpus "$cpus" --num-gpus "$gpus" --resources "$resources" \
  --dashboard-host 127.0.0.1 --dashboard-port "$dashboard_port" --metrics-export-port "$metrics_port" \
  --disable-usage-stats "$@"
