#!/bin/busybox sh
# Init on the guest's root disk: a shell on the console, and off at the press of the power button.
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs tmp /tmp
insmod /modules/button.ko
insmod /modules/evdev.ko
stty -echo
# The power button is the only input device; any of its events is a press.
(dd if=/dev/input/event0 of=/dev/null bs=24 count=1 2>/dev/null && echo "GUEST: power button" && sync && poweroff -f) &
# A load on a disk that comes while we run: rounds of writes, each read back before the next. Then the
# disk is to go.
load() {
    while ! [ -b /dev/vdb ]; do sleep 1; done
    for round in $(seq 1 $1); do
        yes "round $round" | head -c 4194304 >/tmp/written
        if ! dd if=/tmp/written of=/dev/vdb bs=64k oflag=direct 2>/tmp/error; then
            echo "GUEST: FAILED to write round $round: $(cat /tmp/error)"
            return
        fi
        if ! dd if=/dev/vdb bs=64k count=64 iflag=direct 2>/tmp/error | cmp - /tmp/written; then
            echo "GUEST: FAILED to read round $round back: $(cat /tmp/error)"
            return
        fi
        echo "GUEST: round $round done"
    done
    echo "GUEST: load done"
    while [ -b /dev/vdb ]; do sleep 1; done
    echo "GUEST: detached"
}
for word in $(cat /proc/cmdline); do
    case $word in
        gabion.load=*) load "${word#*=}" & ;;
    esac
done
echo "GUEST: ready"
while :; do
    sh
done
