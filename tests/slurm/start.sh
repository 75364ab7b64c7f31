#!/bin/bash
# A real SLURM cluster on this machine, as root: slurmctld, slurmd for nodes n1 n2 ..., munged, mariadbd and slurmdbd.
#   start.sh FOLDER [NODES [PORT]]      then: export SLURM_CONF=FOLDER/slurm.conf; ends with: stop.sh FOLDER
# FOLDER holds everything and is made anew; every folder above it must be open to all (munged insists). Each node has a
# host name of its own (127.0.1.1, ...), 8 invented CPUs and 8 fake GPUs. FOLDER/node.sh n2 starts a node's daemon again.
# Debian: apt-get install --no-install-recommends slurmctld slurmd slurm-client munge slurmdbd mariadb-server-core
# mariadb-client-core
set -euo pipefail
D=$1; N=${2:-3}; P=${3:-16800}
export PATH=$PATH:/usr/sbin:/sbin SLURM_CONF=$D/slurm.conf
if compgen -G "$D/*.pid" >/dev/null; then echo "there are pid files in $D: is it running?" >&2; exit 1; fi
if [ -d "$D" ] && [ -n "$(ls -A "$D")" ] && [ ! -e "$D/slurm.conf" ]; then echo "$D is not empty" >&2; exit 1; fi
rm -rf "$D"; umask 022; mkdir -p "$D"/{state,spool,log,dev,db}
until_true() { for _ in $(seq 900); do "$@" >/dev/null 2>&1 && return; sleep 0.1; done; echo "no answer: $*" >&2; exit 1; }

head -c 1024 /dev/urandom > "$D/munge.key"; chmod 600 "$D/munge.key"
munged --socket="$D/munge.sock" --key-file="$D/munge.key" --pid-file="$D/munged.pid" --log-file="$D/log/munged.log" \
       --seed-file="$D/munge.seed"

HOST=$(hostname -s)
{ echo "127.0.0.1 localhost $HOST"; for i in $(seq "$N"); do echo "127.0.1.$i n$i"; done; } > "$D/hosts"
for i in $(seq 0 7); do mknod "$D/dev/gpu$i" c 1 3; done           # plain files do not count as GPUs
echo "NodeName=n[1-$N] Name=gpu File=$D/dev/gpu[0-7]" > "$D/gres.conf"
# With cgroups, as on most clusters, only the first process of a task gets a signal; else every process of the job does.
if [ "${PROCTRACK:-cgroup}" = cgroup ] && [ -w /sys/fs/cgroup/freezer/cgroup.procs ]; then
  TRACK=cgroup; printf 'CgroupPlugin=cgroup/v1\nCgroupMountpoint=/sys/fs/cgroup\n' > "$D/cgroup.conf"
else TRACK=linuxproc; fi
# Short times: cred_expire (a requeued job waits that long, 120 s by default), KillWait (30), SlurmdTimeout (300).
# A long one: MessageTimeout (10). An order to end a job that was not answered in time, on a busy machine, is given again
# and would end the job's next attempt.
# FirstJobId: job ids must not come again, since submitit would read an old result.
cat > "$D/slurm.conf" <<C
ClusterName=test
SlurmctldHost=$HOST(127.0.0.1)
SlurmctldPort=$P
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$D/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation=$D/state
SlurmdSpoolDir=$D/spool/%n
SlurmctldPidFile=$D/slurmctld.pid
SlurmdPidFile=$D/slurmd-%n.pid
SlurmctldLogFile=$D/log/slurmctld.log
SlurmdLogFile=$D/log/slurmd-%n.log
ProctrackType=proctrack/$TRACK
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=100
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
JobRequeue=1
KillWait=10
SlurmdTimeout=20
SlurmctldTimeout=10
MessageTimeout=60
InactiveLimit=0
FirstJobId=$(( $(date +%s) % 10000000 ))
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStoragePort=$((P + 1))
AccountingStoragePass=$D/munge.sock
$(for i in $(seq "$N"); do
  echo "NodeName=n$i NodeHostname=n$i NodeAddr=127.0.1.$i Port=$((P + 1 + i)) CPUs=8 RealMemory=512000 Gres=gpu:8"; done)
PartitionName=low      Nodes=ALL Default=YES PriorityTier=1
PartitionName=lowgrace Nodes=ALL PriorityTier=1 GraceTime=20
PartitionName=high     Nodes=ALL PriorityTier=10 PreemptMode=OFF
C
cat > "$D/slurmdbd.conf" <<C
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=$((P + 1))
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$D/munge.sock
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm
LogFile=$D/log/slurmdbd.log
PidFile=$D/slurmdbd.pid
C
chmod 600 "$D/slurmdbd.conf"

mariadb-install-db --no-defaults --user=root --datadir="$D/db" --auth-root-authentication-method=normal --skip-test-db \
    --skip-name-resolve > "$D/log/mariadb-install.log" 2>&1
setsid mariadbd --no-defaults --user=root --datadir="$D/db" --socket="$D/mysql.sock" --pid-file="$D/mariadbd.pid" \
    --skip-networking --skip-grant-tables --innodb-buffer-pool-size=64M --innodb-log-file-size=16M \
    --innodb-lock-wait-timeout=900 --innodb-flush-log-at-trx-commit=0 --log-error="$D/log/mariadbd.log" \
    </dev/null >/dev/null 2>&1 &
until_true mariadb --no-defaults -S "$D/mysql.sock" -e 'select 1'
MYSQL_UNIX_PORT=$D/mysql.sock slurmdbd
until_true timeout 20 sacctmgr -nP show cluster
timeout 60 sacctmgr -i add cluster test >/dev/null

slurmctld -f "$SLURM_CONF"
cat > "$D/node.sh" <<C
#!/bin/bash
export SLURM_CONF=$SLURM_CONF
mkdir -p "$D/spool/\$1"
exec unshare --mount --uts --propagation private bash -c '
  hostname "\$1"; mount --bind "$D/hosts" /etc/hosts; exec slurmd -f "$SLURM_CONF" -N "\$1"' _ "\$1"
C
chmod +x "$D/node.sh"
for i in $(seq "$N"); do "$D/node.sh" "n$i"; done
all_idle() { [ "$(sinfo -h -N -o '%N %t' | sort -u | grep -c ' idle$')" = "$N" ]; }
until_true all_idle
