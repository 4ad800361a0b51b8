#!/usr/bin/env bash
# down.sh [--purge] - stop the cluster that up.sh started: cancel its jobs,
# then end exactly the pids that up.sh recorded (start time checked, so a reused
# pid is never hit), then remove the network namespaces it made.  Idempotent.
# Logs stay in $SLURM_TEST_DIR/log unless --purge is given.
set -uo pipefail
D=${SLURM_TEST_DIR:-/tmp/slurm-test.$(id -u)}
say() { echo "cluster: $*" >&2; }
stat_of() { sed 's/^.*) //' "/proc/$1/stat" 2>/dev/null | awk '{print $1, $20}'; }
mine() { local s b; read -r s b < <(stat_of "$1") && [ "$s" != Z ] && [ "$b" = "$2" ]; }
[ -f "$D/.slurm-test" ] || { say "nothing in $D"; exit 0; }
[ ! -f "$D/env" ] || . "$D/env"
export SLURM_CONF=$D/slurm.conf
X=${SLURM_TEST_EXEC:-env}
rc=0

# 1. jobs first, so that no slurmstepd is orphaned
if [ -f "$SLURM_CONF" ] && timeout 5 $X scontrol ping 2>/dev/null | grep -q 'is UP'; then
  jobs=$(timeout 10 $X squeue -h -a -o %A 2>/dev/null | sort -un)
  if [ -n "$jobs" ]; then
    timeout 10 $X scancel $jobs 2>/dev/null
    for _ in $(seq 75); do [ -z "$(timeout 5 $X squeue -h -a 2>/dev/null)" ] && break; sleep 0.2; done
    left=$(timeout 5 $X squeue -h -a -o %A 2>/dev/null | tr '\n' ' ')
    [ -z "$left" ] || say "jobs still there: $left"
  fi
fi

# 2. daemons, in the reverse order of their start
while read -r name pid st; do
  mine "$pid" "$st" || continue
  kill -TERM "$pid" 2>/dev/null
  for _ in $(seq 50); do mine "$pid" "$st" || break; sleep 0.1; done
  if mine "$pid" "$st"; then say "$name ($pid) ignored TERM; KILL"; kill -KILL "$pid"; sleep 0.3; fi
  if mine "$pid" "$st"; then say "$name ($pid) still alive"; rc=1; fi
done < <(tac "$D/pids" 2>/dev/null)

# 3. what is left of a node (none, normally): its processes, known by its UTS namespace
own=$(readlink /proc/self/ns/uts)
for u in $(sort -u "$D/uts" 2>/dev/null); do
  [ "$u" != "$own" ] || continue
  for p in /proc/[0-9]*; do
    [ "$(readlink "$p/ns/uts" 2>/dev/null)" = "$u" ] || continue
    say "left over: ${p#/proc/} $(tr '\0' ' ' 2>/dev/null <"$p/cmdline" | cut -c1-80)"
    kill -KILL "${p#/proc/}" 2>/dev/null
  done
done

# 4. namespaces (their veths and the bridge go with them)
while read -r ns; do
  [ ! -e "/run/netns/$ns" ] || ip netns del "$ns" || rc=1
done < <(cat "$D/netns" 2>/dev/null)

rm -f "$D/pids" "$D/env" "$D/netns" "$D/uts"
[ "${1:-}" != --purge ] || rm -rf -- "$D"
say "down"
exit $rc
