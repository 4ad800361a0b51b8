#!/usr/bin/env bash
# up.sh - bring up a real, private, single-machine Slurm cluster of N virtual
# nodes, as root, without systemd and without touching /etc.  Idempotent: on a live
# cluster it only prints the exports again.  down.sh stops exactly what it started.
#
#   eval "$(./up.sh)"            # SLURM_CONF, SLURM_TEST_DIR, SLURM_TEST_EXEC
#   $SLURM_TEST_EXEC sinfo
#   $SLURM_TEST_EXEC sbatch --wait job.sh
#   ./down.sh
#
# Knobs (environment):
#   SLURM_TEST_DIR    state folder               (default /tmp/slurm-test.$UID)
#   SLURM_TEST_NODES  number of nodes            (default 2; named n1, n2, ...)
#   SLURM_TEST_CPUS   CPUs each node claims      (default 4; may exceed the real ones)
#   SLURM_TEST_MEM    MB each node claims        (default 8000)
#   SLURM_TEST_GPUS   fake GPUs each node claims (default 0; null devices as gres/gpu)
#   SLURM_TEST_PORT   slurmctld's port, slurmd i takes PORT+i (default: a free block)
#   SLURM_TEST_NETNS  1: each node in its own network namespace, 10.213.N.i/24, over a
#                     bridge in a namespace of slurmctld's own; SLURM_TEST_EXEC then
#                     enters that one.  0 (default): all on 127.0.0.1
#   SLURM_TEST_WAIT   seconds to wait for all nodes to be idle (default 30)
# In both modes a node has its own UTS name (hostname says n1), /etc/hosts and /dev/shm,
# so "scontrol show hostnames | head -n1" is an address that works inside a job.  A call
# with other knobs than the live cluster's stops that one and starts again.
# Only the exports go to stdout.
set -euo pipefail

D=${SLURM_TEST_DIR:-/tmp/slurm-test.$(id -u)}
N=${SLURM_TEST_NODES:-2} CPUS=${SLURM_TEST_CPUS:-4} MEM=${SLURM_TEST_MEM:-8000}
GPUS=${SLURM_TEST_GPUS:-0} PORT=${SLURM_TEST_PORT:-} NETNS=${SLURM_TEST_NETNS:-0}
WAIT=${SLURM_TEST_WAIT:-30}
SELF=$(dirname "$(readlink -f "$0")")
PIDS=$D/pids                                   # lines: name pid starttime

say() { echo "cluster: $*" >&2; }
die() { say "$*"; exit 1; }
stat_of() { sed 's/^.*) //' "/proc/$1/stat" 2>/dev/null | awk '{print $1, $20}'; }   # state start
alive() {                                      # the recorded NAME still runs
  local pid st s b
  read -r pid st < <(awk -v n="$1" '$1==n{p=$2; s=$3} END{if (p) print p, s}' "$PIDS" 2>/dev/null) || return 1
  read -r s b < <(stat_of "$pid") || return 1
  [ "$s" != Z ] && [ "$b" = "$st" ]
}
spawn() {                                      # spawn NAME CMD...; CMD must exec, not fork
  local name=$1 pid s b; shift
  setsid "$@" >>"$D/log/$name.out" 2>&1 </dev/null &
  pid=$!
  read -r s b < <(stat_of "$pid") || die "$name did not start: $(tail -n 5 "$D/log/$name.out")"
  echo "$name $pid $b" >>"$PIDS"
}
SIG="$N $CPUS $MEM $GPUS $NETNS"               # what a live cluster must have been made with
NAMES="munged slurmctld $(seq -f 'slurmd-n%g' -s ' ' "$N")"

[ "$(id -u)" = 0 ] || die "must run as root"
case $D in /|/tmp|/root|/etc|/usr|/var|/home) die "refusing SLURM_TEST_DIR=$D";; esac

# 1. packages -----------------------------------------------------------------------
need=""
for c in slurmctld:slurmctld slurmd:slurmd srun:slurm-client munged:munge ip:iproute2; do
  command -v "${c%%:*}" >/dev/null || need="$need ${c##*:}"
done
if [ -n "$need" ]; then
  say "installing$need"
  export DEBIAN_FRONTEND=noninteractive
  { apt-get update -qq && apt-get install -y -qq --no-install-recommends $need; } >&2
fi

in_ns() {                                      # in_ns NAME HOST CMD...: UTS name, hosts file of its own
  local name=$1 h=$2 enter=env; shift 2
  [ ! -f "$D/netns" ] || enter="ip netns exec $(grep -e "-$h\$" "$D/netns")"
  spawn "$name" $enter unshare --uts --mount sh -c \
    'hostname "$0" && mount --bind "$1" /etc/hosts && mount -t tmpfs shm /dev/shm && shift && exec "$@"' \
    "$h" "$D/hosts" "$@"
}
start_node() { in_ns "slurmd-n$1" "n$1" slurmd -D -N "n$1" -f "$D/slurm.conf"; }
wait_idle() {                                  # until all N nodes are idle (or busy, when restoring)
  local end=$((SECONDS+WAIT)) n
  until [ "$(timeout 5 $EXEC sinfo -h -N -p debug -o '%T' 2>/dev/null | grep -cxE 'idle|mixed|allocated')" = "$N" ]; do
    for n in $NAMES; do alive "$n" || die "$n died"; done
    [ $SECONDS -lt $end ] || die "nodes not up after ${WAIT}s: $($EXEC sinfo -h -N -o '%N=%T' 2>&1 | tr '\n' ' ')"
    sleep 0.1
  done
  # a node's UTS namespace tells its processes: down.sh ends what is left in it
  for n in $(seq -f 'slurmd-n%g' "$N"); do
    readlink "/proc/$(awk -v n="$n" '$1==n{p=$2} END{print p}' "$PIDS")/ns/uts"
  done >>"$D/uts"
}

# 2. already up? a dead slurmd alone is just started again --------------------------
if [ -s "$D/env" ] && [ "$(cat "$D/.slurm-test")" = "$SIG" ] && alive munged && alive slurmctld; then
  . "$D/env"; EXEC=$SLURM_TEST_EXEC
  if timeout 5 $EXEC scontrol ping 2>/dev/null | grep -q 'is UP'; then
    for i in $(seq "$N"); do alive "slurmd-n$i" || { say "starting n$i again"; start_node "$i"; }; done
    wait_idle
    say "already up in $D"; cat "$D/env"; exit 0
  fi
fi
[ ! -e "$D" ] || [ -f "$D/.slurm-test" ] || die "$D exists and is not ours"
if [ -f "$D/.slurm-test" ]; then               # dead or half-dead: stop the rest, start clean
  SLURM_TEST_DIR=$D "$SELF/down.sh" --purge >&2
fi
undo() {                                       # on any failure: show the logs, stop what was started
  local rc=$?
  trap - EXIT
  [ $rc != 0 ] || return 0
  say "failed (rc $rc); the logs' ends, then down"
  tail -n 8 "$D"/log/* >&2 2>/dev/null || true
  SLURM_TEST_DIR=$D "$SELF/down.sh" >&2 || true
  exit $rc
}
trap undo EXIT

mkdir -p "$D"/{log,munge,state,spool,gpu}
chmod 755 "$D"; chmod 711 "$D/munge"; echo "$SIG" >"$D/.slurm-test"; : >"$PIDS"

# 3. addresses, ports, namespaces ---------------------------------------------------
free_block() {                                 # a free run of N+1 ports, off the ephemeral range
  local p i busy
  busy=" $(ss -Hltn 2>/dev/null | awk '{sub(/.*:/,"",$4); print $4}' | tr '\n' ' ') "
  for p in $(seq 26817 50 32000); do
    for i in $(seq 0 "$N"); do case $busy in *" $((p+i)) "*) continue 2;; esac; done
    echo "$p"; return
  done
}
if [ "$NETNS" = 1 ]; then
  : "${PORT:=26817}"
  TAG=slt$(( $(printf %s "$D" | cksum | cut -d' ' -f1) % 1000 ))
  OCT=$(( $(printf %s "$D" | cksum | cut -d' ' -f1) % 250 ))
  addr() { echo "10.213.$OCT.$1"; }            # 1..N the nodes, 254 the controller
  CTL=$(addr 254)
  echo "$TAG-ctl" >"$D/netns"
  ip netns add "$TAG-ctl"
  ip -n "$TAG-ctl" link set lo up
  ip -n "$TAG-ctl" link add br0 type bridge
  ip -n "$TAG-ctl" addr add "$CTL/24" dev br0
  ip -n "$TAG-ctl" link set br0 up
  for i in $(seq "$N"); do
    echo "$TAG-n$i" >>"$D/netns"
    ip netns add "$TAG-n$i"
    ip -n "$TAG-n$i" link set lo up
    ip -n "$TAG-n$i" link add eth0 type veth peer name "n$i" netns "$TAG-ctl"
    ip -n "$TAG-ctl" link set "n$i" master br0 up
    ip -n "$TAG-n$i" addr add "$(addr "$i")/24" dev eth0
    ip -n "$TAG-n$i" link set eth0 up
  done
  EXEC="nsenter --net=/run/netns/$TAG-ctl"
else
  : "${PORT:=$(free_block)}"
  addr() { echo 127.0.0.1; }
  CTL=127.0.0.1
  EXEC="env"
fi
{ echo "127.0.0.1 localhost"; echo "$CTL ctl"
  for i in $(seq "$N"); do echo "$(addr "$i") n$i"; done; } >"$D/hosts"

# 4. munge: own key, own socket -----------------------------------------------------
( umask 077; head -c 1024 /dev/urandom >"$D/munge/key" )
spawn munged munged --foreground --key-file="$D/munge/key" --socket="$D/munge/s" \
  --pid-file="$D/munge/pid" --log-file="$D/log/munged.log" --seed-file="$D/munge/seed"
for _ in $(seq 50); do [ -S "$D/munge/s" ] && break; sleep 0.1; done
munge -S "$D/munge/s" -n </dev/null | unmunge -S "$D/munge/s" >/dev/null

# 5. slurm.conf, gres.conf ----------------------------------------------------------
GRES=""
if [ "$GPUS" -gt 0 ]; then
  GRES=" Gres=gpu:$GPUS"
  for i in $(seq "$N"); do for g in $(seq 0 $((GPUS-1))); do
    mknod "$D/gpu/n${i}g$g" c 1 3           # a null device stands in for the GPU
    echo "NodeName=n$i Name=gpu File=$D/gpu/n${i}g$g Flags=nvidia_gpu_env"
  done; done >"$D/gres.conf"
fi
# cgroups are not used, but slurmd looks for them unless told which kind it need not find
echo "CgroupPlugin=cgroup/v1" >"$D/cgroup.conf"
cat >"$D/slurm.conf" <<CONF
ClusterName=slurmtest
SlurmctldHost=ctl($CTL)
SlurmctldPort=$PORT
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits before it starts again (120 by default)
AuthInfo=socket=$D/munge/s,cred_expire=5
StateSaveLocation=$D/state
SlurmdSpoolDir=$D/spool/%n
# the pmix plugin keeps per-step folders here; nodes that share /tmp would collide
TmpFS=$D/tmp/%n
SlurmctldPidFile=$D/slurmctld.pid
SlurmdPidFile=$D/slurmd-%n.pid
SlurmctldLogFile=$D/log/slurmctld.log
SlurmdLogFile=$D/log/slurmd-%n.log
MailProg=/bin/true
# no cgroups, no binding; config_overrides lets a node claim more than the machine has
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=500
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0,requeue_delay=1
# no database; finished jobs stay visible to scontrol for an hour
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/filetxt
JobCompLoc=$D/log/jobcomp.txt
MinJobAge=3600
# quick failure detection, quick kill
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=10
KillWait=5
JobRequeue=1
PropagateResourceLimits=NONE
# a job in "high" preempts (requeues) one in "debug"; the victim first gets its
# --signal (or TERM) and has GraceTime seconds
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
$([ "$GPUS" -gt 0 ] && echo GresTypes=gpu)
CONF
for i in $(seq "$N"); do
  echo "NodeName=n$i NodeHostname=n$i NodeAddr=$(addr "$i") Port=$((PORT+i)) CPUs=$CPUS RealMemory=$MEM$GRES State=UNKNOWN"
done >>"$D/slurm.conf"
cat >>"$D/slurm.conf" <<CONF
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=10
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
CONF
cat >"$D/env.new" <<ENV
export SLURM_CONF='$D/slurm.conf';
export SLURM_TEST_DIR='$D';
export SLURM_TEST_EXEC='$EXEC';
ENV
export SLURM_CONF=$D/slurm.conf

# 6. daemons, in the foreground under their own pids ---------------------------------
in_ns slurmctld ctl slurmctld -D -c -f "$D/slurm.conf"
for i in $(seq "$N"); do mkdir -p "$D/spool/n$i" "$D/tmp/n$i"; start_node "$i"; done
wait_idle
trap - EXIT
mv "$D/env.new" "$D/env"
say "up: $N nodes x $CPUS CPUs, netns=$NETNS, SLURM_CONF=$SLURM_CONF"
cat "$D/env"
