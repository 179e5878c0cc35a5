#!/bin/bash
# run.sh [BINARIES]: deploys Gabion with Ansible on real systemd machines (systemd-nspawn) from nothing,
# breaks it, grows it and takes it off again. As root. Everything that it makes is gone afterwards.
#
# With GABION_DEBS=DIR the packages there are used instead of new ones from BINARIES.
# With GABION_KEEP=1 a failure leaves the machines up until Enter is pressed (or input ends).
set -Eeuo pipefail

here=$(cd "$(dirname "$0")" && pwd)
top=$(cd "$here/../.." && pwd)
binaries=${1:-$top/target/release}
export PATH=$PATH:/usr/sbin:/sbin LC_ALL=C.UTF-8

[ "$(id -u)" = 0 ] || { echo "test-ansible: this test boots machines and needs root" >&2; exit 1; }

# shellcheck source=tests/ansible/prepare.sh
. "$here/prepare.sh"
# shellcheck source=tests/ansible/nodes.sh
. "$here/nodes.sh"

work=$(mktemp -d /tmp/gabion-ansible.XXXXXX)
id=gb$$
loop=
checks=0

clean_up() {
    local status=$?
    trap - EXIT INT TERM ERR
    set +e
    if [ $status -ne 0 ]; then
        echo "test-ansible: FAILED in: ${current:-preparing}" >&2
        if [ -n "${GABION_KEEP:-}" ]; then
            echo "kept: ip netns exec $id-c ssh -F $work/ssh_config node1; Enter cleans up" >&2
            read -r _
        fi
        diagnose >&2
    fi
    nodes_down
    [ -z "$loop" ] || losetup -d "$loop"
    rm -rf --one-file-system "$work"
    exit $status
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'echo "test-ansible: line $LINENO: $BASH_COMMAND" >&2' ERR

diagnose() {
    local n
    for n in "${nodes[@]}"; do
        echo "--- node$n"
        tail -n 5 "$work/node$n/console.log"
        timeout 20 ip netns exec "$id-c" ssh -F "$work/ssh_config" "node$n" \
            'systemctl --failed --no-legend; journalctl --no-pager -n 40 -u "gabion-*"'
    done
    timeout 20 ip netns exec "$id-c" ssh -F "$work/ssh_config" node1 'gabion status; gabion health; gabion osd tree'
}

step() {
    current=$1
    printf '== [%4d s] %s\n' $SECONDS "$1"
}

# check WHAT COMMAND...
check() {
    local what=$1
    shift
    "$@" || { echo "test-ansible: not so: $what" >&2; return 1; }
    checks=$((checks + 1))
    echo "   ok: $what"
}

# play LOG PLAYBOOK [ARGUMENTS]
play() {
    local log=$work/$1.log
    shift
    (cd "$top/ansible" && ANSIBLE_SSH_ARGS="-F $work/ssh_config -o ControlMaster=auto -o ControlPersist=60s -o ControlPath=$work/cm-%C" \
        ANSIBLE_NOCOLOR=1 in_control "$ansible/ansible-playbook" --inventory "$work/inventory.yml" "$@") >"$log" 2>&1 ||
        { echo "$*: see below" >&2; tail -n 60 "$log" >&2; return 1; }
}

# refused LOG SENTENCE PLAYBOOK [ARGUMENTS]: fails, says so, and changed nothing.
refused() {
    local log=$work/$1.log sentence=$2
    if play "$1" "${@:3}" 2>"$work/refused.err"; then
        echo "$1 was not refused" >&2
        return 1
    fi
    grep -q -- "$sentence" "$log" || { cat "$work/refused.err" >&2; return 1; }
    recap "$log" | grep -q . && ! recap "$log" | grep -v ' changed=0 ' >&2
}

# Lines as: node1 : ok=10 changed=0 unreachable=0 failed=0 ...
recap() {
    sed -n '/^PLAY RECAP/,$p' "$1" | grep '^node'
}

unchanged() {
    recap "$1" | grep -q . || return 1
    if recap "$1" | grep -v ' changed=0 .*failed=0 ' >&2; then
        grep -B 40 '^changed' "$1" | grep -E '^(TASK|changed)' >&2
        return 1
    fi
}

gabion() {
    on_node 1 gabion "$@"
}

# is FILTER COMMAND...: whether jq's FILTER holds for what `gabion -o json COMMAND` answers.
is() {
    local filter=$1
    shift
    gabion -o json "$@" | jq -e "$filter" >/dev/null
}

# Bytes of a volume as a machine reads them, as a checksum.
volume_sum() {
    on_node "$1" "nbdcopy '$2' - | sha256sum" | cut -d' ' -f1
}

inventory() {
    cat >"$work/inventory.yml" <<YAML
all:
  children:
    gabion:
      children:
        gabion_monitors: {hosts: {node1: , node2: , node3: }}
        gabion_osds: {hosts: {node1: , node2: , node3: $1}}
        gabion_gateways: {hosts: {node1: , node2: , node3: $1}}
        gabion_hypervisors: {hosts: {node1: }}
        gabion_clients: {hosts: {node1: , node2: , node3: $1}}
      vars:
        gabion_packages_dir: $work/debs
        gabion_osds_here: [{name: a, size: 768M}, {name: b, size: 768M}]
        gabion_down_out_secs: 15
  hosts:
    node1: {gabion_cluster_address: 10.77.0.11}
    node2: {gabion_cluster_address: 10.77.0.12}
    node3: {gabion_cluster_address: 10.77.0.13}
YAML
    [ $# -lt 2 ] || cat >>"$work/inventory.yml" <<YAML
    node4:
      gabion_cluster_address: 10.77.0.14
      gabion_osds_here: [{name: a, size: 768M}, {name: disk, size: 768M, device: $2}]
YAML
}

step "packages, Ansible, the nodes' root"
prepare_packages
prepare_ansible
prepare_node_root
if [ -n "${GABION_DEBS:-}" ]; then
    cp -r "$GABION_DEBS" "$work/debs"
else
    "$top/packaging/build-debs.sh" "$binaries" "$work/debs"
fi

step "three bare machines"
network_up
for n in 1 2 3; do
    node_create $n
    node_on $n
done
for n in 1 2 3; do
    node_await $n
done
inventory ""

step "what is refused before anything is changed"
check "an unknown variable is refused" \
    refused unknown 'unknown variable gabion_osd_prot; known are' site.yml --extra-vars gabion_osd_prot=7100
check "an address that no node has is refused" \
    refused address 'gabion_cluster_address 192.0.2.1 is not an address of this node' site.yml --extra-vars gabion_cluster_address=192.0.2.1

step "site.yml"
bare=$SECONDS
play site site.yml
check "every OSD is up and in, and the cluster is healthy" is '.osds == 6 and .osds_up == 6 and .osds_in == 6 and .health != "error"' status
check "three monitors vote" is '[.monitors[] | select(.voter and .up)] | length == 3' monitor ls
check "the three nodes serve volumes" is '[.hosts[] | select(.gateway_up)] | length == 3' host ls
check "the host agent reports" is '[.hosts[] | select(.agent_up) | .name] == ["node1"]' host ls
for n in 1 2 3; do
    check "node$n listens on its cluster address only" \
        on_node $n "ss -Hlntp | grep gabion | awk '{print \$4}' | grep -v ^10.77.0.1$n: | wc -l | grep -qx 0 && ss -Hlntp | grep -q gabion-osd"
done

on_node 1 'echo "monitors = [\"10.77.0.11:7000\"]" >/root/plain.toml'
check "who shows no certificate is refused" \
    on_node 1 'GABION_CONFIG=/root/plain.toml gabion status 2>&1 | grep -q "TLS: it speaks TLS, this process is configured without"'
check "the CA's key is on node1 alone, and no key is for everybody" \
    on_node 1 'test -s /etc/gabion/ca/ca.key && ! find /etc/gabion -name "*.key" -perm /o+r | grep .'
for n in 2 3; do
    check "node$n has its own certificates and no CA" on_node $n '! test -e /etc/gabion/ca && test -s /etc/gabion/tls/osd.crt'
done
scrape() {
    on_node 1 "python3 -c 'import sys, urllib.request; sys.stdout.write(urllib.request.urlopen(sys.argv[1]).read().decode())' http://$1/metrics"
}
for daemon in 11:7300 11:7301 11:7302 11:7310 12:7311 13:7301; do
    check "10.77.0.$daemon serves metrics" grep -q '^gabion_build_info' <(scrape "10.77.0.$daemon")
done

step "a volume on it"
gabion pool create rep3 --replicas 3
gabion volume create vol1 --size 32M --pool rep3
uri=$(gabion -o json export add vol1 --nbd --host node1 | jq -r .uri)
on_node 1 'head -c 32M /dev/urandom >/root/pattern'
on_node 1 "nbdcopy --flush /root/pattern '$uri'"
sum=$(on_node 1 sha256sum /root/pattern | cut -d' ' -f1)
bare=$((SECONDS - bare))
check "node 1 reads what it wrote" [ "$(volume_sum 1 "$uri")" = "$sum" ]
gabion --yes export rm vol1
uri=$(gabion -o json export add vol1 --nbd --host node2 | jq -r .uri)
check "node 3 reads the same bytes through node 2" [ "$(volume_sum 3 "$uri")" = "$sum" ]

step "site.yml again"
play again site.yml
check "a second run changes nothing" unchanged "$work/again.log"

step "a guest on node 1 writes to a disk attached while it runs"
"$top/demo/make-root.sh" "$work/guest.raw"
cp --sparse=always "$work/guest.raw" "$work/node1/root/root/guest.raw"
gabion volume create guest --size 1228M --pool rep3
gabion volume create extra --size 16M --pool rep3
guest_uri=$(gabion -o json export add guest --nbd --host node1 | jq -r .uri)
on_node 1 "nbdcopy --flush /root/guest.raw '$guest_uri' && rm /root/guest.raw"
rm "$work/guest.raw"
gabion --yes export rm guest
# The root's own default target wins over the one that systemd.run= makes, so the target is named.
# The guest's only work: it waits for a second disk, fills it, says so and powers off.
cat >"$work/node1/root/root/kernel-args" <<'ARGS'
quiet systemd.unit=kernel-command-line.target systemd.run="/bin/sh -c 'echo GUEST-RUNS >/dev/ttyS0; until test -b /dev/vdb; do sleep 0.2; done; yes gabion | dd of=/dev/vdb bs=1M count=16 iflag=fullblock oflag=direct conv=fsync && echo GUEST-WROTE >/dev/ttyS0'"
ARGS
on_node 1 'gabion vm create guest --cpus 1 --memory 512M --disk guest --host node1 --kernel-args "$(cat /root/kernel-args)" && gabion vm start guest --timeout-secs 120'
await 300 "the guest runs" on_node 1 'grep -aq GUEST-RUNS /run/gabion/host/vms/guest/console.log'
gabion vm attach guest extra
await 300 "the guest wrote" on_node 1 'grep -aq GUEST-WROTE /run/gabion/host/vms/guest/console.log'
await 120 "the guest is off" is '.state == "stopped"' vm show guest
gabion vm detach guest extra || true
gabion --yes vm rm guest
guest_uri=$(gabion -o json export add extra --nbd --host node2 | jq -r .uri)
check "node 3 reads through node 2 what the guest wrote on node 1" \
    [ "$(volume_sum 3 "$guest_uri")" = "$(head -c 16M < <(yes gabion) | sha256sum | cut -d' ' -f1)" ]
gabion --yes export rm extra
gabion --yes volume rm extra
gabion --yes volume rm guest

step "node 3 loses power"
is '.pgs_by_state | keys == ["active+clean"]' status
node_cut 3
await 60 "the monitors see it" is '.osds_up == 4' status
check "the bytes are still there" [ "$(volume_sum 1 "$uri")" = "$sum" ]
check "two monitors of three go on" is '[.monitors[] | select(.up)] | length == 2' monitor ls
await 60 "it is out" is '.osds_in == 4' status
# Three copies on three hosts: with one gone the honest answer is degraded, not clean.
check "with two hosts left the cluster calls itself degraded" is '.pgs_not_clean > 0' rebuild status
on_node 1 'head -c 16M /dev/urandom | dd of=/root/pattern conv=notrunc status=none'
on_node 1 "nbdcopy --flush /root/pattern '$uri'"
sum=$(on_node 1 sha256sum /root/pattern | cut -d' ' -f1)
check "writes go on with two of three copies" [ "$(volume_sum 2 "$uri")" = "$sum" ]

step "add-node.yml: a fourth node takes its place"
truncate -s 1200M "$work/disk"
loop=$(losetup --show --find "$work/disk")
node_create 4
node_on 4 --bind="$loop"
node_await 4
inventory ", node4: " "$loop"
mkfs.ext4 -q -L precious "$loop"
check "a disk with a file system is refused" \
    refused foreign "$loop for OSD disk already holds ext4; it is left alone" add-node.yml --limit node4
check "and still has it" [ "$(blkid --probe --match-tag LABEL --output value "$loop")" = precious ]
wipefs --all --quiet "$loop"
check "new nodes must be named" refused unnamed 'name the new nodes' add-node.yml --limit node1
play add add-node.yml --limit node4
check "the rebuild has ended clean, on three hosts again" is '.pgs_not_clean == 0 and .degraded_objects == 0' rebuild status
check "node 4 holds data" is '[.osds[] | select(.host == "node4" and .pgs > 0)] | length == 2' osd ls
check "the bytes are the last ones written" [ "$(volume_sum 4 "$uri")" = "$sum" ]

step "node 3 comes back"
node_on 3
node_await 3
await 60 "its OSDs are up by themselves" is '.osds_up == 8' status
gabion -o json osd ls | jq -r '.osds[] | select(.in | not) | .id' | while read -r osd; do
    gabion osd in "$osd" </dev/null
done
timeout 300 ip netns exec "$id-c" ssh -F "$work/ssh_config" node1 gabion rebuild watch
check "three monitors vote again" is '[.monitors[] | select(.voter and .up)] | length == 3' monitor ls
check "everything is clean on four hosts" is '.pgs_not_clean == 0' rebuild status
check "the bytes are the same" [ "$(volume_sum 3 "$uri")" = "$sum" ]

step "a machine with a monitor reboots"
on_node 1 'systemctl reboot' || true
await 60 "it is down" bash -c "grep -q 'node ended with 133' '$work/node1/console.log'"
node_await 1
await 60 "the cluster serves" is '.osds_up == 8' status
timeout 300 ip netns exec "$id-c" ssh -F "$work/ssh_config" node1 gabion rebuild watch
check "the bytes are the same" [ "$(volume_sum 1 "$uri")" = "$sum" ]

step "a new configuration: OSDs restart one by one"
sed -i 's/gabion_down_out_secs: 15/gabion_down_out_secs: 600\n        gabion_osd_port: 7150/' "$work/inventory.yml"
play ports site.yml
check "every OSD listens where it should" is '[.osds[].addr | split(":")[1]] | unique == ["7150", "7151"]' osd ls
check "the bytes are the same" [ "$(volume_sum 1 "$uri")" = "$sum" ]
play ports-again site.yml
check "then a run changes nothing" unchanged "$work/ports-again.log"

step "purge.yml"
check "purge asks to be meant" refused unmeant 'say -e gabion_purge_confirm=purge' purge.yml
play purge purge.yml --extra-vars gabion_purge_confirm=purge
for n in 1 2 3 4; do
    check "node$n has no packages and no daemons any more, and its data" \
        on_node $n '! dpkg-query -W "gabion*" 2>/dev/null | grep . && ! pgrep gabion && test -s /var/lib/gabion/osd/a/block'
done
play restore site.yml
await 60 "the gateways serve" is '[.hosts[] | select(.gateway_up)] | length == 4' host ls
uri=$(gabion -o json export ls | jq -r '.exports[0].uri')
check "packages that come back find the same cluster and the same bytes" [ "$(volume_sum 1 "$uri")" = "$sum" ]
play wipe purge.yml --extra-vars '{"gabion_purge_confirm": "purge", "gabion_purge_data": true}'
for n in 1 2 3 4; do
    check "nothing of it is left on node$n" \
        on_node $n '! dpkg-query -W "gabion*" 2>/dev/null | grep . && ! pgrep gabion && ! ls -d /etc/gabion /var/lib/gabion /run/gabion 2>/dev/null'
done
check "and its disk is blank" [ -z "$(wipefs --no-act --noheadings "$loop")" ]

current=
printf 'test-ansible: %d checks passed in %d s; from three bare machines to a written volume: %d.%d minutes\n' \
    "$checks" $SECONDS $((bare / 60)) $((bare % 60 * 10 / 60))
