# Settings that every Ray process of a cluster needs; sourced by start-head.sh, start-worker.sh and slurm.sbatch.
# A value that is already in the environment stays. No secret is in here: the token is a file, and only its path is named.
# shellcheck shell=bash

# Who may use the cluster: whoever holds the token. Said explicitly, because Ray turns it on by itself in some cases only.
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}

# How soon a lost node is noticed: at worst failure_threshold * (period + timeout) = 4.5 s, 15 s with Ray's own values.
# Read by the head; a network that stalls for longer than this costs nodes, so raise them where that happens.
export RAY_health_check_initial_delay_ms=${RAY_health_check_initial_delay_ms:-1000}
export RAY_health_check_period_ms=${RAY_health_check_period_ms:-500}
export RAY_health_check_timeout_ms=${RAY_health_check_timeout_ms:-1000}
export RAY_health_check_failure_threshold=${RAY_health_check_failure_threshold:-3}

export RAY_USAGE_STATS_ENABLED=${RAY_USAGE_STATS_ENABLED:-0}
export RAY_ENABLE_UV_RUN_RUNTIME_ENV=${RAY_ENABLE_UV_RUN_RUNTIME_ENV:-0} # would ship the working directory

# Ray's own clients (`ray list nodes`, Ray Train, metrics) ask unencrypted, with the token: no proxy may come between them and this
# machine's own addresses.
no_proxy=${no_proxy:+$no_proxy,}${NO_PROXY:+$NO_PROXY,}localhost,127.0.0.1,::1$({ hostname -I 2>/dev/null || true; } | sed 's/ *$//; s/  */,/g; s/^/,/')
export no_proxy NO_PROXY=$no_proxy

# Ray's sockets lie in RAY_TMPDIR, or else TMPDIR, and no socket's path is longer than 107 bytes: the TMPDIR of a batch job often
# leaves no room. What lies there then goes to a folder of the user's own.
batch_tmpdir=${TMPDIR:-}
if [[ -z ${RAY_TMPDIR:-} && ${#batch_tmpdir} -gt 32 ]]; then
  export RAY_TMPDIR=/tmp/rlalign-$(id -u)
  (umask 077 && mkdir -p "$RAY_TMPDIR")
  if [[ ! -d $RAY_TMPDIR || -L $RAY_TMPDIR || ! -O $RAY_TMPDIR ]]; then
    echo "RAY_TMPDIR: $RAY_TMPDIR is not this user's own; name a short folder that is" >&2
    exit 2
  fi
  export TMPDIR=$RAY_TMPDIR
fi

# rlalign_require_token: the token's file must exist, hold something, and be its owner's alone.
rlalign_require_token() {
  if [[ ! -s $RAY_AUTH_TOKEN_PATH ]]; then
    echo "RAY_AUTH_TOKEN_PATH: no token at $RAY_AUTH_TOKEN_PATH; copy the head's file there, mode 0600" >&2
    return 2
  fi
  local mode
  mode=$(stat -Lc %a "$RAY_AUTH_TOKEN_PATH")
  if [[ $mode != 600 && $mode != 400 ]]; then
    echo "RAY_AUTH_TOKEN_PATH: $RAY_AUTH_TOKEN_PATH must have mode 0600 or 0400, got 0$mode; chmod 600 it" >&2
    return 2
  fi
}

# rlalign_new_token: writes 32 random bytes in hexadecimal, unless there is a token already.
rlalign_new_token() {
  [[ -s $RAY_AUTH_TOKEN_PATH ]] && return 0
  (
    umask 077
    mkdir -p "$(dirname "$RAY_AUTH_TOKEN_PATH")"
    od -An -v -tx1 -N32 /dev/urandom | tr -d ' \n' >"$RAY_AUTH_TOKEN_PATH"
  )
}

# rlalign_is_loopback ADDRESS: whether nothing outside this machine can reach it.
rlalign_is_loopback() { [[ $1 == 127.* || $1 == localhost ]]; }

# rlalign_cpus: the CPUs that this process may use; nproc would otherwise answer with OpenMP's settings.
rlalign_cpus() { env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc; }

# rlalign_gpus: the GPUs that this process sees.
rlalign_gpus() { nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true; }
