#!/bin/busybox sh
# Init on the guest's root disk: a shell on the console, and off at the press of the power button.
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs tmp /tmp
insmod /modules/button.ko
insmod /modules/evdev.ko
for module in failover net_failover virtio_net; do insmod /modules/$module.ko; done
stty -echo
# The power button is the only input device; any of its events is a press.
(dd if=/dev/input/event0 of=/dev/null bs=24 count=1 2>/dev/null && echo "GUEST: power button" && sync && poweroff -f) &
# 4 MiB of a round: different at every place, and from round to round.
content() { # ROUND
    tail -c +$(($1 * 65536 + 1)) /tmp/base
    head -c $(($1 * 65536)) /tmp/base
}
# A load on a disk that comes while we run: rounds of writes, each read back before the next. Then the
# disk is to grow, to go, and to come again as it went.
load() { # ROUNDS
    seq 1000000 1524287 >/tmp/base
    echo "GUEST: load waits for its disk"
    while ! [ -b /dev/vdb ]; do sleep 1; done
    for round in $(seq 1 $1); do
        content $round >/tmp/written
        if ! dd if=/tmp/written of=/dev/vdb bs=64k oflag=direct 2>/tmp/error; then
            echo "GUEST: FAILED to write round $round: $(cat /tmp/error)"
            return
        fi
        same "round $round" || return
        echo "GUEST: round $round done"
    done
    size=$(cat /sys/block/vdb/size)
    echo "GUEST: load done"
    while [ "$(cat /sys/block/vdb/size)" = "$size" ]; do sleep 1; done
    echo "GUEST: its disk has $(cat /sys/block/vdb/size) sectors now"
    while [ -b /dev/vdb ]; do sleep 1; done
    echo "GUEST: detached"
    while ! [ -b /dev/vdb ]; do sleep 1; done
    same "the disk that came again" && echo "GUEST: attached again with its data"
}
same() { # WHAT
    if ! dd if=/dev/vdb bs=64k count=64 iflag=direct 2>/tmp/error | cmp - /tmp/written; then
        echo "GUEST: FAILED to read back $1: $(cat /tmp/error)"
        return 1
    fi
}
for word in $(cat /proc/cmdline); do
    case $word in
        gabion.ip=*) ifconfig eth0 "${word#*=}" netmask 255.255.255.0 up || echo "GUEST: FAILED: no network card" ;;
        gabion.load=*) load "${word#*=}" & ;;
    esac
done
echo "GUEST: ready"
while :; do
    sh
done
