#!/usr/bin/env bash
# Makes two hosts, n0 and n1, on this machine: with a network between them, Slurm over both, and sshd on each.
#
#     bash tests/cluster/setup.sh            make them; at once if they are there; without root or apt: says why not, exit 0
#     bash tests/cluster/setup.sh down       end every process of both hosts and remove the state folder
#     bash tests/cluster/setup.sh on n0 sinfo        run a command on a host
#
# A host is a process in namespaces of its own (network, host name, mounts, processes); whatever runs on it dies with that
# process. Files are shared, as on a cluster with a network file system. Nothing of the machine is changed but that Debian's
# packages are installed: configuration, keys, sockets and logs live in LMCODE_BED (default /var/tmp/lmcode-bed).
set -euo pipefail

bed="${LMCODE_BED:-/var/tmp/lmcode-bed}"
packages=(slurmctld slurmd slurm-client munge pdsh openssh-server openssh-client iproute2)
export SLURM_CONF="$bed/slurm.conf"

# What the caller has open, such as a lock, is not for the daemons, which live on.
for descriptor in "/proc/$$/fd/"*; do
    number="${descriptor##*/}"
    if [ "$number" -gt 2 ] && [ "$number" -lt 255 ]; then eval "exec $number>&-"; fi
done

say() { printf 'two-host test bed: %s\n' "$*" >&2; }
give_up() { say "not set up: $*"; exit 0; }

# Runs a command on n0, n1 or switch.
on() {
    local node="$1"
    shift
    nsenter --target "$(cat "$bed/$node.pid")" --net --uts --mount --pid --wd="$PWD" "$@"
}

# Starts a daemon on a host and leaves it there.
daemon() {
    local node="$1" name="$2"
    shift 2
    on "$node" setsid --fork "$@" </dev/null >>"$bed/log/$name.$node" 2>&1
}

is_up() {
    [ -f "$bed/ready" ] && kill -0 "$(cat "$bed/n0.pid")" "$(cat "$bed/n1.pid")" 2>/dev/null &&
        on n0 scontrol ping 2>/dev/null | grep -q "is UP" && on n0 timeout 10 srun -N2 true 2>/dev/null
}

down() {
    local node
    for node in n0 n1 switch; do
        # The first process of the host's process namespace: the kernel ends all others with it.
        if [ -f "$bed/$node.pid" ]; then kill -KILL "$(cat "$bed/$node.pid")" 2>/dev/null || true; fi
    done
    if [ -f "$bed/munged.pid" ]; then
        local munged
        munged="$(cat "$bed/munged.pid")"
        # It writes a last file into the folder when it is told to end.
        for _ in $(seq 50); do kill "$munged" 2>/dev/null || break; sleep 0.1; done
    fi
    rm -rf "$bed"
}

have() {
    local tool
    for tool in "$@"; do command -v "$tool" >/dev/null 2>&1 || return 1; done
}

install_packages() {
    if have slurmctld slurmd sbatch munged pdsh sshd ssh-keygen ip; then return; fi
    have apt-get || give_up "there is no apt-get to install ${packages[*]}"
    say "installing ${packages[*]}"
    {
        apt-get update &&
            DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends "${packages[@]}"
    } >"$bed/log/apt" 2>&1 || give_up "apt-get failed: $(tail -n 1 "$bed/log/apt")"
}

write_configuration() {
    printf '127.0.0.1 localhost\n10.77.0.10 n0\n10.77.0.11 n1\n' >"$bed/hosts"
    dd if=/dev/urandom of="$bed/munge.key" bs=128 count=1 status=none
    chmod 600 "$bed/munge.key"
    ssh-keygen -q -t ed25519 -N '' -f "$bed/key"
    ssh-keygen -q -t ed25519 -N '' -f "$bed/host_key"
    cat >"$bed/sshd_config" <<SSHD
HostKey $bed/host_key
AuthorizedKeysFile $bed/key.pub
PidFile none
StrictModes no
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
SSHD
    cat >"$bed/ssh_config" <<SSH
IdentityFile $bed/key
UserKnownHostsFile /dev/null
StrictHostKeyChecking no
ConnectTimeout 5
LogLevel ERROR
SSH
    cat >"$SLURM_CONF" <<SLURM
ClusterName=bed
SlurmctldHost=n0(10.77.0.10)
SlurmUser=root
AuthInfo=socket=$bed/munge.socket,cred_expire=5
StateSaveLocation=$bed/state
SlurmdSpoolDir=$bed/spool.%n
SlurmctldPidFile=$bed/slurmctld.pid
SlurmdPidFile=$bed/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SlurmdParameters=config_overrides
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
SlurmdTimeout=300
NodeName=n0 NodeAddr=10.77.0.10 CPUs=16
NodeName=n1 NodeAddr=10.77.0.11 CPUs=16
PartitionName=bed Nodes=n0,n1 Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
SLURM
    mkdir -p "$bed/state" "$bed/spool.n0" "$bed/spool.n1" "$bed/bin"
}

# A host: first process, loopback, its own /etc/hosts and ssh settings. The mounts are private to it. It outlives the caller.
make_host() {
    local node="$1"
    # shellcheck disable=SC2016
    setsid unshare --net --uts --mount --pid --fork --mount-proc --propagation private sh -c '
        hostname "$2"; ip link set lo up; mount --bind "$1/hosts" /etc/hosts
        mkdir -p /run/sshd; mount --bind "$1/ssh_config" /etc/ssh/ssh_config
        exec sleep infinity' "$node" "$bed" "$node" </dev/null >>"$bed/log/host.$node" 2>&1 &
    # The child of unshare, not unshare itself, is the first process of the new process namespace.
    for _ in $(seq 50); do
        pgrep --parent "$!" >"$bed/$node.pid" && [ "$(on "$node" hostname 2>/dev/null)" = "$node" ] && return
        sleep 0.1
    done
    give_up "a host could not be made: $(cat "$bed/log/host.$node")"
}

# The interfaces are named differently on each host, as they may be on a real cluster.
plug_in() {
    local node="$1" interface="$2" address="$3"
    ip link add "$interface" netns "$(cat "$bed/$node.pid")" type veth \
        peer name "to-$node" netns "$(cat "$bed/switch.pid")"
    on "$node" ip address add "$address/24" dev "$interface"
    on "$node" ip link set "$interface" up
    on switch ip link set "to-$node" master bridge0 up
}

start_daemons() {
    munged --force --key-file="$bed/munge.key" --socket="$bed/munge.socket" --pid-file="$bed/munged.pid" \
        --log-file="$bed/log/munged" --seed-file="$bed/munge.seed"
    local node
    for node in n0 n1; do daemon "$node" sshd "$(command -v sshd)" -D -f "$bed/sshd_config" -E "$bed/log/sshd.$node"; done
    daemon n0 slurmctld "$(command -v slurmctld)" -D
    for node in n0 n1; do daemon "$node" slurmd "$(command -v slurmd)" -D -N "$node"; done
}

up() {
    [ "$(id -u)" -eq 0 ] || give_up "needs root"
    have unshare nsenter pgrep || give_up "needs unshare and nsenter (util-linux)"
    if is_up; then say "ready"; return; fi
    down
    mkdir -p "$bed/log"
    install_packages
    write_configuration
    make_host switch
    on switch ip link add bridge0 type bridge || give_up "the kernel has no bridges"
    on switch ip link set bridge0 up
    make_host n0
    make_host n1
    plug_in n0 left0 10.77.0.10
    plug_in n1 right0 10.77.0.11
    start_daemons
    touch "$bed/ready"
    for _ in $(seq 30); do
        if is_up; then say "ready: hosts n0 and n1, state in $bed"; return; fi
        sleep 1
    done
    rm "$bed/ready"
    give_up "Slurm did not come up: $(tail -n 3 "$bed"/log/slurmctld.n0 2>/dev/null)"
}

case "${1:-up}" in
    up) up ;;
    down) down ;;
    on) shift; on "$@" ;;
    *) echo "usage: setup.sh [up | down | on HOST COMMAND ...]" >&2; exit 2 ;;
esac
