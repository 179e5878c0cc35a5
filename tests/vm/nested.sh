#!/bin/bash
# Runs test programs inside a machine with real KVM: QEMU emulates a processor with SVM, its Linux loads
# kvm-amd, and the guests of the tests run a stock Debian kernel.
#
#   nested.sh BIN_DIR TEST...
#
# BIN_DIR holds Gabion's programs and `examples/vhost_file`. A test is a program or a script. The last line
# counts those that passed, failed, did not finish, and what said that it skips; only if all of them passed
# and nothing was skipped is the exit status 0.
# The kernel package is kept in ${XDG_CACHE_HOME:-~/.cache}/gabion.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
bin_dir=$1
shift

for tool in qemu-system-x86_64 qemu-img busybox cpio dpkg-deb ldd jq nbdcopy ip; do
    command -v "$tool" >/dev/null || { echo "nested: $tool is not installed" >&2; exit 1; }
done
mke2fs=$(PATH=$PATH:/usr/sbin:/sbin command -v mke2fs) || { echo "nested: mke2fs is not installed" >&2; exit 1; }

cache=${XDG_CACHE_HOME:-$HOME/.cache}/gabion/kernel
if [ ! -e "$cache/ready" ]; then
    rm -rf "$cache" && mkdir -p "$cache"
    package=$(apt-cache depends linux-image-cloud-amd64 | awk '/Depends: linux-image/ { print $2; exit }')
    [ -n "$package" ] || { echo "nested: apt does not know linux-image-cloud-amd64" >&2; exit 1; }
    (cd "$cache" && apt-get -q download "$package" && dpkg-deb -x "$package"_*.deb . && rm ./*.deb)
    touch "$cache/ready"
fi
kernel=$(echo "$cache"/boot/vmlinuz-*)

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
module() { # NAME TO
    cp "$(find "$cache/lib/modules" -name "$1.ko" -print -quit)" "$2/"
}
initramfs() { # FROM TO
    (cd "$1" && find . | cpio --quiet -o -H newc >"$2")
}
with_libraries() { # PROGRAM TO ROOT
    cp "$1" "$3$2"
    # A program without libraries of its own is fine.
    { ldd "$1" 2>/dev/null || true; } | { grep -o '/[^ ]*' || true; } | while read -r library; do
        mkdir -p "$3$(dirname "$library")"
        [ -e "$3$library" ] || cp -L "$library" "$3$library"
    done
}

# The guest: an initrd that mounts the root disk, and that disk.
mkdir -p "$work"/initrd/{bin,dev,proc,root,modules} "$work"/root/{bin,dev,proc,sys,tmp,mnt,modules,boot}
busybox=$(command -v busybox)
cp "$busybox" "$work/initrd/bin/busybox"
cp "$busybox" "$work/root/bin/busybox"
cp "$here/guest-initrd.sh" "$work/initrd/init"
cp "$here/guest-init.sh" "$work/root/init"
for name in virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio_mmio virtio_blk; do
    module $name "$work/initrd/modules"
done
for name in button evdev failover net_failover virtio_net; do
    module $name "$work/root/modules"
done

# The host.
host=$work/host
mkdir -p "$host"/{bin,data,dev,proc,sys,tmp,modules,images,tests,lib64}
initramfs "$work/initrd" "$host/images/initrd"
cp "$kernel" "$host/images/vmlinuz"
"$mke2fs" -q -F -t ext4 -d "$work/root" "$host/images/root.ext4" 24M >/dev/null
# The same with a kernel of its own in /boot.
cp "$kernel" "$work/root/boot/"
cp "$host/images/initrd" "$work/root/boot/initrd.img-${kernel##*/vmlinuz-}"
"$mke2fs" -q -F -t ext4 -d "$work/root" "$host/images/boot.ext4" 48M >/dev/null
# Where the host keeps its data: O_DIRECT does not work in an initramfs.
"$mke2fs" -q -F -t ext4 "$work/data.raw" 6G >/dev/null
cp "$busybox" "$host/bin/busybox"
cp "$here/host-init.sh" "$host/init"
for name in irqbypass kvm kvm-amd tun virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio_blk; do
    module $name "$host/modules"
done
for program in "$bin_dir"/gabion{,-monitor,-osd,-gateway,-host,-vmm} "$bin_dir/examples/vhost_file" \
    "$(command -v jq)" "$(command -v nbdcopy)" "$(command -v qemu-img)" "$(command -v ip)"; do
    with_libraries "$program" "/bin/$(basename "$program")" "$host"
done
# Only to compare with.
if [ -n "${GABION_VM_QEMU:-}" ]; then
    with_libraries "$(command -v qemu-system-x86_64)" /bin/qemu-system-x86_64 "$host"
    mkdir -p "$host/qemu"
    for rom in bios-256k.bin bios-microvm.bin linuxboot_dma.bin pvh.bin kvmvapic.bin; do
        cp -L "/usr/share/qemu/$rom" "$host/qemu/" 2>/dev/null || cp -L "/usr/share/seabios/$rom" "$host/qemu/"
    done
fi
for test in "$@"; do
    with_libraries "$test" "/tests/$(basename "$test")" "$host"
done
initramfs "$host" "$work/host.cpio"

limit=${GABION_VM_TIMEOUT:-1500}
# The kernel's check of the timer fails when an emulated machine gets no processor time for a moment; its tests of
# its ciphers have been seen to go on for ever in one. Huge pages are off: with them, and with
# reports of stalls, the emulated host or its guest went down or hung now and then: seen, not understood.
timeout --kill-after=5 "$limit" qemu-system-x86_64 -accel tcg,thread=multi -machine q35 -cpu qemu64,+svm,+npt \
    -smp "${GABION_VM_CPUS:-2}" -m 3072 -drive "file=$work/data.raw,format=raw,if=virtio,cache=unsafe" -nographic -no-reboot -nodefaults -net none -serial stdio \
    -kernel "$kernel" -initrd "$work/host.cpio" -append "console=ttyS0 panic=-1 no_timer_check cryptomgr.notests rcupdate.rcu_cpu_stall_suppress=1 nowatchdog transparent_hugepage=never quiet" </dev/null |
    tee "$work/console" || echo "nested: QEMU did not end within $limit s"

passed=0 failed=0 unfinished=0
echo
for test in "$@"; do
    name=$(basename "$test")
    if grep -aqF "HOST: passed: $name." "$work/console"; then
        passed=$((passed + 1)) outcome=passed
    elif grep -aqF "HOST: FAILED: $name." "$work/console"; then
        failed=$((failed + 1)) outcome=FAILED
    else
        unfinished=$((unfinished + 1)) outcome="DID NOT FINISH"
    fi
    echo "  ${name%-????????????????}: $outcome"
done
skipped=$(grep -ac "SKIPPED" "$work/console" || true)
# Programs count their own tests: one that ran none has not passed.
cases=$({ grep -ao "test result: ok. [0-9]* passed" "$work/console" || true; } | awk '{ all += $4 } END { print all + 0 }')
if grep -aq "test result: ok. 0 passed" "$work/console"; then
    echo "nested: a test program ran no test" && failed=$((failed + 1))
fi
echo "test-vm: $passed passed ($cases cases in programs), $failed failed, $unfinished unfinished, $skipped skipped, in $SECONDS s"
[ "$passed" = $# ] && [ "$failed" = 0 ] && [ "$skipped" = 0 ]
