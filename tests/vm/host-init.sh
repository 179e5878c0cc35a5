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
for module in virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio_blk irqbypass kvm kvm-amd; do
    insmod /modules/$module.ko
done
mount -t ext4 /dev/vda /data
[ -c /dev/kvm ] || echo "HOST: no /dev/kvm"
export GABION_VM_IMAGES=/images GABION_VMM=/bin/gabion-vmm GABION_VHOST_FILE=/bin/vhost_file
ulimit -n 65536
failed=0
for test in /tests/*; do
    echo "== ${test##*/}"
    $test --nocapture --test-threads=1 || failed=1
done
[ $failed = 0 ] && echo "HOST: all tests passed"
sync
poweroff -f
