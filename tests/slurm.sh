#!/usr/bin/env bash
# A Slurm of one node on this machine, without systemd: `slurm.sh start FOLDER` and `slurm.sh stop FOLDER`, as root.
# Everything it writes is in FOLDER. Then SLURM_CONF=FOLDER/slurm.conf leads to it.
set -euo pipefail
verb=$1 folder=$2
PATH=$PATH:/usr/sbin:/sbin

start() {
    mkdir -p "$folder"/{munge,state,spool}
    chmod -R u=rwX,go=rX "$folder"
    head -c 128 /dev/urandom > "$folder/munge/key"
    chmod 400 "$folder/munge/key"
    munged --force --key-file="$folder/munge/key" --pid-file="$folder/munge/pid" --seed-file="$folder/munge/seed" \
        --log-file="$folder/munge/log" --socket="$folder/munge/socket"
    cat > "$folder/slurm.conf" <<EOF
ClusterName=one
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort=$((20000 + $$ % 20000))
SlurmdPort=$((20001 + $$ % 20000))
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket,cred_expire=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
KillWait=20
SchedulerParameters=batch_sched_delay=0,sched_interval=2
SlurmctldParameters=enable_configless
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
NodeName=$(hostname) NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=9
EOF
    export SLURM_CONF=$folder/slurm.conf
    slurmctld
    slurmd
    for _ in $(seq 100); do
        if [[ $(sinfo --noheader --format=%T 2> /dev/null) == idle ]]; then return; fi
        sleep 0.2
    done
    tail -n 20 "$folder"/*.log "$folder/munge/log" >&2
    return 1
}

stop() {
    for file in "$folder/slurmd.pid" "$folder/slurmctld.pid" "$folder/munge/pid"; do
        if [[ ! -s $file ]]; then continue; fi
        pid=$(cat "$file")
        kill "$pid" 2> /dev/null || true
        for _ in $(seq 100); do kill -0 "$pid" 2> /dev/null && sleep 0.1 || break; done
    done
}

"$verb"
