# Sourced: machines with a real systemd in network namespaces. $work is this run's directory, $id its
# short unique name. Everything made here is recorded by name or process id and taken down by
# nodes_down, which may be called at any time.
#
#   node1 .. nodeN   namespace $id-N, 10.77.0.1N, a veth into the bridge of the control namespace
#   $id-c            control namespace, 10.77.0.1: Ansible and ssh run in it

declare -A node_runner=()
nodes=()

in_control() {
    ip netns exec "$id-c" "$@"
}

network_up() {
    ip netns add "$id-c"
    ip -n "$id-c" link set lo up
    ip -n "$id-c" link add br0 type bridge
    ip -n "$id-c" addr add 10.77.0.1/24 dev br0
    ip -n "$id-c" link set br0 up
    ssh-keygen -q -t ed25519 -N '' -f "$work/key"
    cat >"$work/ssh_config" <<SSH
Host node*
    User root
    IdentityFile $work/key
    StrictHostKeyChecking yes
    UserKnownHostsFile $work/known_hosts
    ConnectTimeout 5
    LogLevel ERROR
    ServerAliveInterval 3
    ServerAliveCountMax 2
SSH
}

# node_create N: root, namespace and identity, but no power.
node_create() {
    local n=$1 name=node$1 ns=$id-$1
    mkdir -p "$work/$name/upper" "$work/$name/work" "$work/$name/root"
    mount -t overlay overlay -o "lowerdir=$node_root,upperdir=$work/$name/upper,workdir=$work/$name/work" "$work/$name/root"
    local root=$work/$name/root
    tr -d - </proc/sys/kernel/random/uuid >"$root/etc/machine-id"
    echo "$name" >"$root/etc/hostname"
    mkdir -p -m 700 "$root/root/.ssh"
    cp "$work/key.pub" "$root/root/.ssh/authorized_keys"
    rm -f "$root"/etc/ssh/ssh_host_*
    ssh-keygen -q -t ed25519 -N '' -f "$root/etc/ssh/ssh_host_ed25519_key"
    echo "10.77.0.1$n $(cut -d' ' -f1,2 "$root/etc/ssh/ssh_host_ed25519_key.pub")" >>"$work/known_hosts"
    printf 'Host %s\n    HostName 10.77.0.1%s\n' "$name" "$n" | cat - "$work/ssh_config" >"$work/ssh_config.new"
    mv "$work/ssh_config.new" "$work/ssh_config"

    ip netns add "$ns"
    ip link add "gb$n" netns "$ns" type veth peer name "port$n" netns "$id-c"
    ip -n "$ns" link set "gb$n" name eth0
    ip -n "$ns" addr add "10.77.0.1$n/24" dev eth0
    ip -n "$ns" link set lo up
    ip -n "$ns" link set eth0 up
    ip -n "$id-c" link set "port$n" master br0
    ip -n "$id-c" link set "port$n" up
    nodes+=("$n")
}

# node_on N [nspawn arguments]: power on. A reboot (exit status 133) starts it again.
node_on() {
    local n=$1 name=node$1 group
    shift
    rm -f "$work/$name/off"
    (
        trap - EXIT ERR
        set +e
        for group in systemd unified freezer; do
            mkdir -p "/sys/fs/cgroup/$group/$id-$n"
            echo "$BASHPID" >"/sys/fs/cgroup/$group/$id-$n/cgroup.procs"
        done
        status=133
        while [ "$status" -eq 133 ] && [ ! -e "$work/$name/off" ]; do
            systemd-nspawn -q -D "$work/$name/root" -b -M "$id-$n" --hostname="$name" --register=no --keep-unit --console=pipe \
                --network-namespace-path="/run/netns/$id-$n" --resolv-conf=off --link-journal=no \
                --capability=CAP_NET_ADMIN --bind=/dev/fuse --bind=/dev/kvm "$@" </dev/null &
            echo $! >"$work/$name/nspawn.pid"
            wait $!
            status=$?
            echo "node ended with $status"
        done
    ) >>"$work/$name/console.log" 2>&1 &
    node_runner[$n]=$!
}

# The host's process id of the node's init.
node_init() {
    local nspawn
    nspawn=$(cat "$work/node$1/nspawn.pid") || return 1
    cat "/proc/$nspawn/task/$nspawn/children" 2>/dev/null | tr ' ' '\n' | grep -m1 .
}

# node_cut N: the power goes. Nothing gets to flush anything of its own.
node_cut() {
    touch "$work/node$1/off"
    kill -KILL "$(node_init "$1")"
    wait "${node_runner[$1]}"
    unset "node_runner[$1]"
}

on_node() {
    local n=$1
    shift
    in_control ssh -F "$work/ssh_config" "node$n" "$@"
}

# await SECONDS WHAT COMMAND...: until the command succeeds.
await() {
    local end=$((SECONDS + $1)) what=$2
    shift 2
    until "$@" >/dev/null 2>&1; do
        [ $SECONDS -lt $end ] || { echo "gave up waiting until $what" >&2; return 1; }
        sleep 0.3
    done
}

node_await() {
    await 120 "node$1 answers ssh" on_node "$1" 'systemctl is-system-running --wait >/dev/null; systemctl is-active multi-user.target'
}

nodes_down() {
    local n pid tries group
    for n in "${nodes[@]}"; do
        if [ -n "${node_runner[$n]:-}" ]; then
            touch "$work/node$n/off"
            pid=$(node_init "$n" || true)
            [ -z "$pid" ] || kill -KILL "$pid" 2>/dev/null || true
            pid=$(cat "$work/node$n/nspawn.pid" 2>/dev/null || true)
            for tries in $(seq 100); do
                [ -n "$pid" ] && [ -e "/proc/$pid" ] || break
                [ "$tries" -lt 50 ] || kill -KILL "$pid" 2>/dev/null || true
                sleep 0.1
            done
            wait "${node_runner[$n]}" || true
        fi
        rmdir "/run/systemd/nspawn/propagate/$id-$n" 2>/dev/null || true
        for group in systemd unified freezer; do
            if [ -d "/sys/fs/cgroup/$group/$id-$n" ]; then
                find "/sys/fs/cgroup/$group/$id-$n" -depth -type d -exec rmdir {} + 2>/dev/null || true
            fi
        done
        umount "$work/node$n/root" 2>/dev/null || umount -l "$work/node$n/root" 2>/dev/null || true
        ip netns del "$id-$n" 2>/dev/null || true
    done
    ip netns del "$id-c" 2>/dev/null || true
    nodes=()
}
