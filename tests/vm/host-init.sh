#!/bin/busybox sh
# Init of the outer machine: a host with real KVM that runs the tests and powers off.
/bin/busybox --install -s /bin
export PATH=/bin:/sbin:/usr/sbin HOME=/tmp TMPDIR=/tmp RUST_BACKTRACE=1
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/shm
mount -t tmpfs -o size=90% tmp /tmp
ip link set lo up
for module in virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio_blk irqbypass kvm kvm-amd tun; do
    insmod /modules/$module.ko
done
mount -t ext4 /dev/vda /data
[ -c /dev/kvm ] || echo "HOST: no /dev/kvm"
# Host's ends of guests' network cards, one a test.
for n in 0 1; do
    # The shell would take its own.
    /bin/ip tuntap add dev tap$n mode tap
    /bin/ip address add 10.9.$n.1/24 dev tap$n
    /bin/ip link set tap$n up
done
export GABION_VM_IMAGES=/images GABION_VMM=/bin/gabion-vmm GABION_VHOST_FILE=/bin/vhost_file
export GABION_VM_TAP=tap0 GABION_VM_NETWORK=10.9.0
ulimit -n 65536
# The outer machine's kernel may cut into a line: each of these is looked for anywhere in one.
for test in /tests/*; do
    echo "== ${test##*/}"
    case $test in
        *.sh) $test ;;
        *) $test --nocapture --test-threads=1 ;;
    esac
    case $? in
        0) echo "HOST: passed: ${test##*/}." ;;
        *) echo "HOST: FAILED: ${test##*/}." ;;
    esac
done
sync
poweroff -f
