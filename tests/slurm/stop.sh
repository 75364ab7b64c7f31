#!/bin/bash
# Stop the cluster that start.sh started in FOLDER, by its pid files: stop.sh FOLDER
D=$1
export PATH=$PATH:/usr/sbin:/sbin SLURM_CONF=$D/slurm.conf
alive() { [ -e "/proc/$1" ] && ! grep -q '^State:[[:space:]]*Z' "/proc/$1/status" 2>/dev/null; }
stop() { # daemon [tenths of a second]
  local file=$D/$1.pid pid; [ -s "$file" ] || return 0; pid=$(cat "$file"); rm -f "$file"
  case $(cat "/proc/$pid/comm" 2>/dev/null) in "${1%%-*}"*) ;; *) return 0;; esac      # that number is no longer ours
  kill "$pid"; for _ in $(seq "${2:-100}"); do alive "$pid" || return 0; sleep 0.1; done
  kill -9 "$pid"
}
if [ -s "$D/slurmctld.pid" ]; then
  scancel --state=PENDING -u root; scancel --signal=KILL --full -u root; scancel -u root
  for _ in $(seq 100); do [ -z "$(squeue -h)" ] && break; sleep 0.1; done
fi 2>/dev/null
stop slurmctld
for file in "$D"/slurmd-*.pid; do [ -e "$file" ] && stop "$(basename "$file" .pid)"; done
stop slurmdbd; stop mariadbd 200; stop munged
for group in /sys/fs/cgroup/freezer/slurm_n*; do
  [ -d "$group" ] && find "$group" -depth -type d -exec rmdir {} \; 2>/dev/null
done
exit 0
