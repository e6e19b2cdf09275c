#!/usr/bin/env bash
# Tells Ray when the cloud is going to take this machine away, so that what works here leaves it in time (docs/cluster.md).
#
#   cluster/spot-notice.sh --cloud aws &      beside `ray start`, on each spot machine; or gcp, azure
#
# Asks the machine's own metadata every two seconds, without an account; ends when it has told. Kubernetes needs none of this:
# the end of a pod is told by Ray itself.
set -euo pipefail

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; }

cloud='' address=auto
while (($#)); do
  case $1 in
    --cloud) cloud=${2:?--cloud needs a name}; shift 2 ;;
    --address) address=${2:?--address needs HOST:PORT}; shift 2 ;;
    -h | --help) usage; exit 0 ;;
    *) echo "spot-notice.sh: unknown argument $1; see --help" >&2; exit 2 ;;
  esac
done

# shellcheck source=ray-env.sh
source "$(dirname "${BASH_SOURCE[0]}")/ray-env.sh"

# where a machine of this cloud asks, and how long the notice is
metadata=${RLALIGN_METADATA:-http://169.254.169.254}
case $cloud in
  aws) seconds=120 ;;
  gcp | azure) seconds=30 ;;
  *) echo "spot-notice.sh: --cloud must be aws, gcp or azure, got '$cloud'" >&2; exit 2 ;;
esac

# ask PATH CURL_OPTIONS...: what the metadata answers; nothing where it has no answer.
ask() { curl --silent --fail --noproxy '*' --max-time 2 "${@:2}" "$metadata/$1" || true; }

# is_called: whether the cloud has said that this machine goes.
is_called() {
  case $cloud in
    aws)
      local session
      session=$(ask latest/api/token --request PUT --header 'X-aws-ec2-metadata-token-ttl-seconds: 60')
      [[ -n $(ask latest/meta-data/spot/instance-action --header "X-aws-ec2-metadata-token: $session") ]]
      ;;
    gcp) [[ $(ask computeMetadata/v1/instance/preempted --header 'Metadata-Flavor: Google') == TRUE ]] ;;
    azure) [[ $(ask 'metadata/scheduledevents?api-version=2020-07-01' --header 'Metadata: true') == *'"Preempt"'* ]] ;;
  esac
}

until is_called; do sleep 2; done
echo "spot-notice.sh: $cloud takes this machine away within $seconds s" >&2
# two seconds may have passed since, and it takes some to say so
exec ray drain-node --address "$address" --reason DRAIN_NODE_REASON_PREEMPTION --reason-message "$cloud takes it away" \
  --deadline-remaining-seconds $((seconds - 5))
