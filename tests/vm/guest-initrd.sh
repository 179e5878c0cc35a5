#!/bin/busybox sh
# Init of the guest's initrd: brings up the disk and goes on from it.
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t devtmpfs dev /dev
for module in virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio_mmio virtio_blk; do
    /bin/busybox insmod /modules/$module.ko
done
/bin/busybox mount -t ext4 /dev/vda /root || { echo "GUEST: no root disk"; /bin/busybox poweroff -f; }
/bin/busybox umount /proc
/bin/busybox mount -o move /dev /root/dev
exec /bin/busybox switch_root /root /init
