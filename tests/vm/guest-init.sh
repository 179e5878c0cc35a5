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
echo "GUEST: ready"
while :; do
    sh
done
