#!/usr/bin/env bash
# A real Slurm on loopback, for tests: as root, without systemd or cgroups. One node, named as this machine; with NODES=2
# two, n1 and n2, both on this machine.
#
#   start_slurm.sh FOLDER         installs Debian's slurm-wlm and munge if they are missing, then starts; does nothing
#                                 if the Slurm of FOLDER already answers
#   start_slurm.sh FOLDER stop    cancels its jobs and ends its daemons
#
# Everything but the packages lies in FOLDER: configuration, key, state, logs. Clients find it by
# SLURM_CONF=FOLDER/slurm.conf. Exit code 3: this machine cannot have it, with the reason in one line.
set -euo pipefail
shopt -s inherit_errexit

EXIT_CANNOT=3
START_TRIES=240 STOP_TRIES=120 TRY_S=0.25

cannot() {
    echo "start_slurm.sh: $*" >&2
    exit "$EXIT_CANNOT"
}

folder=$(realpath -m "${1:?usage: start_slurm.sh FOLDER [stop]}")
export SLURM_CONF=$folder/slurm.conf
host=$(hostname -s)
nodes=("$host")
((${NODES:-1} == 1)) || mapfile -t nodes < <(seq -f 'n%g' "$NODES")

install_packages() {
    [[ -z $(type -P slurmctld slurmd munged sbatch | sed -n 4p) ]] || return 0
    type -P apt-get >/dev/null || cannot "no Slurm here, and no apt-get to install it with"
    export DEBIAN_FRONTEND=noninteractive
    flock /tmp/tests-apt.lock apt-get update -qq || cannot "apt-get update failed"
    flock /tmp/tests-apt.lock apt-get install -qq --no-install-recommends slurm-wlm munge >/dev/null || cannot "apt-get could not install slurm-wlm"
}

free_port() {
    python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

write_configuration() {
    local controller_port node
    controller_port=$(free_port)
    install -d "$folder/state" "$folder/munge"
    [[ -s $folder/munge/key ]] || (umask 077 && head -c 1024 /dev/urandom > "$folder/munge/key")
    # cred_expire is also what a requeued job waits before it starts again: 120 s by default.
    cat > "$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$controller_port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket,cred_expire=10
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
MailProg=/bin/true
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
ReturnToService=2
SchedulerParameters=batch_sched_delay=1,sched_interval=5
KillWait=30
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd-%n.log
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL Default=NO MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
CONF
    for node in "${nodes[@]}"; do
        echo "NodeName=$node NodeHostname=$host NodeAddr=127.0.0.1 Port=$(free_port) CPUs=4 RealMemory=4000 State=UNKNOWN"
        install -d "$folder/spool-$node"
    done >> "$SLURM_CONF"
    echo "CgroupAutomount=no" > "$folder/cgroup.conf"
}

start() {
    local try node
    [[ $EUID == 0 ]] || cannot "Slurm's daemons need root"
    install_packages
    if [[ -f $SLURM_CONF ]] && timeout 5 sinfo --noheader --format=%T 2>/dev/null | grep -Eq 'idle|mixed|allocated'; then
        return
    fi
    write_configuration
    # --force: it runs as root here, and its folder may lie in one that others can write, such as /tmp.
    munged --force --socket="$folder/munge/socket" --key-file="$folder/munge/key" --pid-file="$folder/munge/pid" \
        --log-file="$folder/munge/log" --seed-file="$folder/munge/seed" 2>"$folder/munge/start.log" ||
        cannot "munged does not start: $(tail -n 1 "$folder/munge/start.log")"
    slurmctld -c
    for node in "${nodes[@]}"; do slurmd -N "$node"; done
    for ((try = 0; try < START_TRIES; try++)); do
        if [[ $(sinfo --noheader --partition=main --states=idle --format=%D 2>/dev/null) == "${#nodes[@]}" ]]; then return; fi
        sleep "$TRY_S"
    done
    tail -n 20 "$folder"/*.log >&2
    cannot "the nodes did not become idle"
}

# Ends the daemon whose process id stands in a file, and waits for it.
end_daemon() {
    local pid try
    [[ -s $1 ]] || return 0
    pid=$(< "$1")
    kill "$pid" 2>/dev/null || return 0
    for ((try = 0; try < STOP_TRIES; try++)); do
        kill -0 "$pid" 2>/dev/null || return 0
        sleep "$TRY_S"
    done
    kill -KILL "$pid"
}

stop() {
    local try file
    [[ -f $SLURM_CONF ]] || return 0
    timeout 10 scancel --user=root || true # the controller may be gone
    for ((try = 0; try < STOP_TRIES; try++)); do
        [[ -n $(timeout 5 squeue --noheader 2>/dev/null) ]] || break
        sleep "$TRY_S"
    done
    for file in "$folder"/slurmd-*.pid; do end_daemon "$file"; done
    end_daemon "$folder/slurmctld.pid"
    end_daemon "$folder/munge/pid"
}

case ${2:-start} in
    start) start ;;
    stop) stop ;;
    *) echo "usage: start_slurm.sh FOLDER [stop]" >&2 && exit 2 ;;
esac
