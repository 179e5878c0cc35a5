#!/bin/busybox sh
# In the outer machine: a whole cluster, and a guest that boots from a replicated volume's own /boot in
# gabion-vmm. A disk comes while it runs; its gateway and then an OSD are killed under load that the
# guest verifies; the disk goes; the guest is powered off; every byte is read back through NBD.
set -eu
export PATH=/bin:/sbin NO_COLOR=1
# Short, because Unix sockets lie under it.
dir=/data/c
log=
rounds=8
fail() {
    echo "cluster: $*"
    [ -z "$log" ] || tail -c 3000 "$log"
    tail -n 5 $dir/log/*.log 2>/dev/null
    exit 1
}
# Waits for a line on the guest's console: console PATTERN SECONDS
console() {
    end=$(($(date +%s) + $2))
    until grep -aq "GUEST: $1" "$log" 2>/dev/null; do
        ! grep -aq "GUEST: FAILED" "$log" 2>/dev/null || fail "the guest failed"
        [ "$(date +%s)" -lt $end ] || fail "the guest did not print '$1' in time"
        sleep 1
    done
    echo "cluster: guest: $1"
}
gabion dev up --dir $dir --osds 3 --hosts 3 --osd-size 512M --timeout-secs 600 || fail "no cluster"
export GABION_CONFIG=$dir/client.toml
gabion pool create p --replicas 3 --failure-domain host
gabion volume import /images/boot.ext4 root --pool p --format raw
gabion volume create data --size 64M --pool p
host=$(gabion -o json host ls | jq -r '.hosts[0].name')

echo "== what this host offers"
gabion host check || fail "it cannot run guests"
[ "$(gabion -o json host check | jq -r .engine)" = native ] || fail "the native engine is not the default"

echo "== guests that do not fit are refused"
cores=$(gabion -o json host check | jq .cpus)
refused() { # WHY ARGUMENTS
    why=$1
    shift
    if gabion vm create big --disk root --host "$host" "$@" 2>/tmp/refused; then fail "accepted: $*"; fi
    cat /tmp/refused
    grep -q "$why" /tmp/refused || fail "not refused for '$why'"
}
refused "the host has $cores cores" --cpus $((cores + 1)) --memory 256M
refused "it keeps 2048" --cpus 1 --memory 3G

echo "== a guest on a replicated volume, with the engine that suits the host"
gabion vm create g --cpus 2 --cpu kvm64 --memory 256M --disk root --host "$host" --nic tap=tap1 \
    --kernel-args "quiet cryptomgr.notests gabion.load=$rounds gabion.ip=10.9.1.2"
gabion vm start g --timeout-secs 600 || fail "it does not start: $(gabion vm show g)"
log=$(find $dir -path "*/vms/g/console.log")
[ "$(gabion -o json vm show g | jq -r .engine)" = "native (kvm)" ] || fail "the engine is not the native one"
console ready 600
ping -c 1 -W 100 10.9.1.2 || fail "the guest does not answer on its network card"
gabion vm create second --cpus 1 --memory 256M --disk data --host "$host"
if gabion vm start second 2>/tmp/refused; then fail "cores were given twice"; fi
cat /tmp/refused
grep -q "running guests have 2 of the $cores" /tmp/refused || fail "not refused for its CPUs"
gabion vm rm second

gabion vm attach g data --timeout-secs 600
console "round 2 " 600
echo "== kill -9 of the gateway"
gabion dev kill "gateway.$(gabion -o json dev status --dir $dir | jq -r '[.daemons[] | select(.kind == "gateway")][0].id')" --dir $dir
console "round 4 " 600
echo "== kill -9 of an OSD"
gabion dev kill "osd.$(gabion -o json dev status --dir $dir | jq -r '[.daemons[] | select(.kind == "osd")][1].id')" --dir $dir
console "load done" 600
echo "== its disk grows while it runs"
gabion volume resize data --size 80M
console "its disk has 163840 sectors now" 100
gabion vm detach g data --timeout-secs 600
console detached 600
gabion vm attach g data --timeout-secs 600
console "attached again with its data" 600

echo "== power button"
gabion vm stop g --timeout-secs 600
console "power button" 100
[ "$(gabion -o json vm show g | jq -r .state)" = stopped ] || fail "it is not stopped: $(gabion vm show g)"

echo "== reading back round $rounds"
uri=$(gabion -o json export add data --nbd --read-only | jq -r .uri)
nbdcopy "$uri" /data/back || fail "cannot read back"
seq 1000000 1524287 >/data/base
{ tail -c +$((rounds * 65536 + 1)) /data/base && head -c $((rounds * 65536)) /data/base; } >/data/expected
truncate -s 80M /data/expected
cmp /data/back /data/expected || fail "the data is not what the guest wrote"
gabion dev down --dir $dir --wipe
echo "cluster: passed"
