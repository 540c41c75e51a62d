#!/usr/bin/env bash
# A real SLURM with two nodes and accounting on the loopback address, for tests and for trying things out.
#
#   tests/slurm/cluster.sh up [FOLDER]     starts it and prints what to export; FOLDER (a new one) gets its files
#   tests/slurm/cluster.sh down FOLDER     stops its processes, by their ids
#   tests/slurm/cluster.sh node FOLDER n2  starts the daemon of one node again
#
# As root it installs what is missing (Debian packages). Partitions: main; low, whose jobs are preempted by high.
set -euo pipefail

nodes=(n1 n2)
node_ports=(17001 17002)
controller_port=16817
accounting_port=16819
database_port=13306

main() {
  case "${1:-}" in
    up) up "${2:-$(mktemp -d "${TMPDIR:-/tmp}/r1p-slurm-XXXXXX")}" ;;
    down) down "${2:?which folder?}" ;;
    node) start_node "${2:?which folder?}" "${3:?which node?}" ;;
    *) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 2 ;;
  esac
}

up() {
  local folder
  mkdir -p "$1"
  folder=$(cd "$1" && pwd)
  install_missing >&2
  add_hosts
  trap 'down "$folder"' ERR
  write_configuration "$folder"
  export SLURM_CONF=$folder/slurm.conf
  munged --force --socket="$folder/munge.socket" --key-file="$folder/munge.key" --pid-file="$folder/munged.pid" \
    --log-file="$folder/munged.log" --seed-file="$folder/munge.seed" 2>>"$folder/munged.log"
  start_database "$folder"
  start "$folder" slurmdbd env SLURM_CONF="$folder/slurmdbd.conf" slurmdbd -D
  wait_for "$folder" "slurmdbd answers" sacctmgr -i --noheader list cluster
  sacctmgr -i --quiet add cluster loopback >&2
  sacctmgr -i --quiet add account default >&2
  sacctmgr -i --quiet add user "$(id -un)" account=default >&2
  start "$folder" slurmctld slurmctld -D -f "$folder/slurm.conf"
  for node in "${nodes[@]}"; do start_node "$folder" "$node"; done
  wait_for "$folder" "both nodes are idle" two_nodes_idle
  trap - ERR
  echo "export SLURM_CONF=$folder/slurm.conf"
}

down() {
  local folder=$1 pid
  # jobs end before the daemons that would end them
  SLURM_CONF=$folder/slurm.conf timeout 10 scancel --me --signal=KILL --full 2>/dev/null || true
  for file in "$folder"/*.pid; do
    if [ -e "$file" ]; then kill "$(cat "$file")" 2>/dev/null || true; fi
  done
  for file in "$folder"/*.pid; do
    [ -e "$file" ] || continue
    pid=$(cat "$file")
    for _ in $(seq 50); do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
    kill -9 "$pid" 2>/dev/null || true
    rm -f "$file"
  done
}

install_missing() {
  local missing=()
  command -v slurmctld >/dev/null || missing+=(slurm-wlm)
  command -v munged >/dev/null || missing+=(munge)
  command -v slurmdbd >/dev/null || missing+=(slurmdbd)
  command -v mariadbd >/dev/null || missing+=(mariadb-server)
  ((${#missing[@]})) || return 0
  if ((EUID != 0)) || ! command -v apt-get >/dev/null; then
    echo "error: missing and not installable here: ${missing[*]}; as root: apt-get install ${missing[*]}" >&2
    exit 77
  fi
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
}

# Ranks find the first node by its name.
add_hosts() {
  local name
  for name in "${nodes[@]}"; do
    getent hosts "$name" >/dev/null || echo "127.0.0.1 $name" >>/etc/hosts
  done
}

write_configuration() {
  local folder=$1 user processors memory
  user=$(id -un)
  processors=$(getconf _NPROCESSORS_ONLN) # nproc listens to OMP_NUM_THREADS
  memory=$(($(sed -n 's/^MemTotal: *\([0-9]*\) kB/\1/p' /proc/meminfo) / 1024))
  mkdir -p "$folder"/{state,spool-n1,spool-n2}
  head -c 1024 /dev/urandom >"$folder/munge.key"
  chmod 600 "$folder/munge.key"
  cat >"$folder/slurm.conf" <<CONF
ClusterName=loopback
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmctldPort=$controller_port
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
# a job that was queued again waits until its credential has expired
AuthInfo=socket=$folder/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
SlurmctldPidFile=$folder/slurmctld.own
SlurmdPidFile=$folder/slurmd-%n.own
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SlurmdTimeout=15
KillWait=30
MinJobAge=60
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$accounting_port
AccountingStoragePass=$folder/munge.socket
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
NodeName=${nodes[0]} NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=${node_ports[0]} CPUs=$processors RealMemory=$memory
NodeName=${nodes[1]} NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=${node_ports[1]} CPUs=$processors RealMemory=$memory
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=OFF
PartitionName=low Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=9 PreemptMode=OFF
CONF
  cat >"$folder/slurmdbd.conf" <<CONF
DbdHost=$(hostname)
DbdAddr=127.0.0.1
DbdPort=$accounting_port
SlurmUser=$user
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$database_port
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm
LogFile=$folder/slurmdbd.log
PidFile=$folder/slurmdbd.own
CONF
  chmod 600 "$folder/slurmdbd.conf"
}

start_database() {
  local folder=$1 user
  user=$(id -un)
  mariadb-install-db --no-defaults --auth-root-authentication-method=socket --skip-test-db \
    --user="$user" --datadir="$folder/database" >"$folder/database.log" 2>&1
  start "$folder" database mariadbd --no-defaults --user="$user" --datadir="$folder/database" \
    --socket="$folder/database.socket" --bind-address=127.0.0.1 --port=$database_port --pid-file="$folder/database.own" \
    --innodb-buffer-pool-size=64M --innodb-lock-wait-timeout=900
  wait_for "$folder" "the database answers" mariadb --no-defaults --socket="$folder/database.socket" -e 'select 1'
  mariadb --no-defaults --socket="$folder/database.socket" -e "
    create database if not exists slurm;
    create user if not exists slurm@127.0.0.1 identified by 'slurm';
    create user if not exists slurm@localhost identified by 'slurm';
    grant all on slurm.* to slurm@127.0.0.1;
    grant all on slurm.* to slurm@localhost;"
}

start_node() {
  export SLURM_CONF=$1/slurm.conf
  start "$1" "slurmd-$2" slurmd -D -f "$1/slurm.conf" -N "$2"
}

# Starts a program as a process of its own that survives this script, and keeps its id.
start() {
  local folder=$1 name=$2
  shift 2
  setsid "$@" </dev/null >>"$folder/$name.out" 2>&1 &
  echo $! >"$folder/$name.pid"
}

wait_for() {
  local folder=$1 what=$2
  shift 2
  for _ in $(seq 200); do
    if [[ $(type -t "$1") == function ]]; then "$1" && return 0; else timeout 10 "$@" >/dev/null 2>&1 && return 0; fi
    sleep 0.2
  done
  echo "error: waited 60 s until $what; see the logs in $folder" >&2
  return 1
}

two_nodes_idle() {
  [ "$(timeout 10 sinfo --noheader --partition=main --states=idle --Format=nodes | tr -d ' ')" = 2 ]
}

main "$@"
