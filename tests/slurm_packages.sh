#!/usr/bin/env bash
# A real Slurm for the tests, from Debian's packages: what tests/slurm.py starts privately.
#
# `make test` runs this. It installs only where that disturbs nobody (root, apt, no Slurm of the
# site's own, nothing to remove), starts no daemon, and never fails: without Slurm its tests are
# skipped, and pytest says so.
set -uo pipefail
PATH=$PATH:/usr/sbin:/sbin
slurm="slurmctld slurmd slurm-client munge"
accounting="slurmdbd slurm-wlm-mysql-plugin mariadb-server-core"
by_hand="to run the tests on a real Slurm (Debian, Ubuntu): apt-get install --no-install-recommends $slurm $accounting"

say() { echo "slurm: $*" >&2; }
have() { command -v "$@" >/dev/null; }
whole() { for name in "$@"; do have "$name" || return 1; done; }

whole slurmctld slurmd sbatch munged slurmdbd mariadbd && exit 0
if [ -n "${SLURM_CONF:-}" ] || [ -e /etc/slurm/slurm.conf ] || { have sbatch && ! have slurmctld; }; then
  say "this machine has a Slurm of its own; nothing is installed beside it. Elsewhere, $by_hand"
  exit 0
elif ! have apt-get || [ "$(id -u)" != 0 ]; then
  say "not installed. $by_hand"
  exit 0
fi

# Debian starts what it installs unless this file forbids it; what was there comes back.
policy=/usr/sbin/policy-rc.d kept=$(mktemp -d)
[ -e $policy ] && cp -p $policy "$kept/"
restore() {
  if [ -e "$kept/policy-rc.d" ]; then cp -p "$kept/policy-rc.d" $policy; else rm -f $policy; fi
  rm -rf "$kept"
}
trap restore EXIT
printf '#!/bin/sh\nexit 101\n' >$policy && chmod +x $policy
units=$(for unit in slurmctld slurmd slurmdbd; do have $unit || echo $unit; done; have munged || echo munge)

install() {
  say "installing Debian's packages for the tests: $* …"
  local apt="apt-get -q -o Acquire::Retries=0 -o Acquire::http::Timeout=20 -o DPkg::Lock::Timeout=60"
  local get="$apt install -y --no-install-recommends --no-remove $*" log=$kept/log
  export DEBIAN_FRONTEND=noninteractive
  $get >"$log" 2>&1 || { $apt update && $get; } >"$log" 2>&1 && return
  say "COULD NOT INSTALL $*: $(grep -m1 '^E:' "$log" || tail -n1 "$log")"
  say "the tests that need it will be skipped. Later, $by_hand"
}
# shellcheck disable=SC2086  # lists of words
{
  whole slurmctld slurmd sbatch munged || install $slurm # 3 MB
  whole slurmdbd mariadbd || install $accounting         # 8 MB; binaries alone, no database
  [ -d /run/systemd/system ] && systemctl --quiet disable $units 2>/dev/null # nor at boot
}
exit 0
