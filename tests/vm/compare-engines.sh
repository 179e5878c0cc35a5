#!/bin/busybox sh
# In the outer machine, on request: gabion-vmm beside QEMU, the same kernel, initrd and vhost-user disk, in turns.
# Prints the seconds from the start of the process to the guest's init on its root disk, and what the process
# holds beside guest memory (which is shared memory in all of them).
set -eu
export PATH=/bin:/sbin
dir=/data/e
mkdir -p $dir
cp /images/root.ext4 $dir/root
rounds=${GABION_VM_ROUNDS:-3}
append="console=ttyS0 panic=-1 cryptomgr.notests quiet"
disk="-object memory-backend-memfd,id=mem,size=256M,share=on -chardev socket,id=c0,path=$dir/disk.sock"
qemu="qemu-system-x86_64 -L /qemu -cpu host -smp 2 -m 256M -nodefaults -no-user-config -no-reboot -display none -serial file:$dir/console.log -kernel /images/vmlinuz -initrd /images/initrd"
cat >$dir/vmm.json <<END
{"name": "e", "vcpus": 2, "memory_bytes": 268435456, "kernel": "/images/vmlinuz", "initrd": "/images/initrd",
 "kernel_args": "$append", "disks": [{"volume": "root", "socket": "$dir/disk.sock"}], "dir": "$dir"}
END
# Hundredths of a second since the start of this machine.
now() { tr -d . </proc/uptime | cut -d' ' -f1; }
one() { # NAME
    rm -f $dir/console.log $dir/*.sock
    vhost_file $dir/disk.sock $dir/root >/dev/null &
    gateway=$!
    until [ -S $dir/disk.sock ]; do sleep 0.01; done
    began=$(now)
    case $1 in
        gabion-vmm) gabion-vmm --config $dir/vmm.json 2>$dir/log & ;;
        qemu-microvm)
            # Else its transport is the one of before virtio 1.0, which our vhost-user back ends do not speak, and its
            # rings of 1,024 entries outgrow the record of requests in flight, of which queue-size is the length.
            $qemu -machine microvm,accel=kvm,memory-backend=mem,rtc=off -global virtio-mmio.force-legacy=false $disk \
                -device vhost-user-blk,chardev=c0,num-queues=2,queue-size=1024 -append "$append" 2>$dir/log &
            ;;
        qemu-q35)
            $qemu -machine q35,accel=kvm,memory-backend=mem,vmport=off $disk \
                -device vhost-user-blk-pci,chardev=c0,num-queues=2 -append "$append" 2>$dir/log &
            ;;
    esac
    vmm=$!
    end=$((began + 30000))
    until grep -aq "GUEST: ready" $dir/console.log 2>/dev/null; do
        if [ "$(now)" -gt $end ] || ! [ -d /proc/$vmm ]; then
            echo "compare: $1 did not boot"
            cat $dir/log $dir/console.log
            exit 1
        fi
        sleep 0.02
    done
    took=$(($(now) - began))
    # Guest memory is the memfd; of the rest, what is the process's own, and with the programs' files (which lie in
    # memory here).
    memory=$(awk '/^[0-9a-f]+-/ { guest = /memfd:/ } /^Rss:/ && !guest { rss += $2 } /^Private_Dirty:/ && !guest { own += $2 }
        END { print own " KiB own, " rss " KiB resident" }' /proc/$vmm/smaps)
    threads=$(ls /proc/$vmm/task | wc -l)
    kill -9 $vmm $gateway
    wait $vmm $gateway 2>/dev/null || true
    echo "compare: $1: boot $((took / 100)).$(printf %02d $((took % 100))) s; $memory; threads $threads"
}
for round in $(seq 1 "$rounds"); do
    for machine in gabion-vmm qemu-microvm qemu-q35; do one $machine; done
done
