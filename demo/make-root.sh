#!/bin/bash
# make-root.sh OUT.raw: a small, real Debian 12 root as an ext4 image (sparse, no partition table):
# Debian's kernel, initramfs-tools, systemd, and the demo's work order (demo/root/).
# Root is not needed where the kernel allows user namespaces. Cached by the content of its inputs.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
out=${1:?usage: make-root.sh OUT.raw}
cache=${GABION_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/gabion}
mirror=${GABION_DEBIAN_MIRROR:-http://deb.debian.org/debian}
size_mib=1228
export PATH=$PATH:/usr/sbin:/sbin

for tool in mmdebstrap mke2fs sha256sum tar; do
  command -v "$tool" >/dev/null || { echo "make-root: $tool is missing (packages mmdebstrap, e2fsprogs)" >&2; exit 1; }
done

# Anything that shapes the image is part of its name.
key=$(cat "$here/make-root.sh" "$here"/root/* | sha256sum | cut -c1-16)
image=$cache/debian-root-$key.raw
mkdir -p "$cache"

if [ ! -e "$image" ]; then
  work=$(mktemp -d "$cache/make-root.XXXXXX")
  # Files of other user ids (user namespaces) are not ours to remove outside the namespace.
  trap 'rm -rf "$work" 2>/dev/null || true' EXIT
  echo "make-root: bootstrapping Debian 12 (cached afterwards in $cache)" >&2

  mode=root
  [ "$(id -u)" = 0 ] || mode=unshare
  cat >"$work/before" <<'HOOK'
#!/bin/sh
set -e
mkdir -p "$1/etc/initramfs-tools/conf.d" "$1/usr/share/initramfs-tools/modules.d"
printf 'MODULES=list\nCOMPRESS=lz4\nFSTYPE=ext4\nRESUME=none\n' >"$1/etc/initramfs-tools/conf.d/gabion"
printf 'virtio_pci\nvirtio_blk\nvirtio_rng\next4\n' >"$1/usr/share/initramfs-tools/modules.d/gabion"
HOOK
  cat >"$work/after" <<'HOOK'
#!/bin/sh
set -e
echo gabion-demo >"$1/etc/hostname"
echo 'LABEL=gabion-root / ext4 noatime 0 0' >"$1/etc/fstab"
: >"$1/etc/machine-id"
install -m 755 "$GABION_DEMO_ROOT/gabion-demo" "$1/usr/local/sbin/gabion-demo"
install -m 644 "$GABION_DEMO_ROOT/gabion-demo.service" "$1/etc/systemd/system/gabion-demo.service"
mkdir -p "$1/etc/systemd/system/multi-user.target.wants"
ln -sf /etc/systemd/system/gabion-demo.service "$1/etc/systemd/system/multi-user.target.wants/gabion-demo.service"
ln -sf /lib/systemd/system/multi-user.target "$1/etc/systemd/system/default.target"
for unit in getty.target getty@tty1.service serial-getty@ttyS0.service systemd-pstore.service \
  systemd-journal-flush.service systemd-update-utmp.service systemd-update-utmp-runlevel.service \
  systemd-timesyncd.service systemd-networkd.service systemd-networkd-wait-online.service \
  systemd-firstboot.service systemd-hwdb-update.service systemd-machine-id-commit.service \
  systemd-binfmt.service modprobe@.service fstrim.timer e2scrub_all.timer e2scrub_reap.service \
  apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer systemd-tmpfiles-clean.timer; do
  ln -sf /dev/null "$1/etc/systemd/system/$unit"
done
rm -rf "$1"/var/cache/apt/* "$1"/var/lib/apt/lists/* "$1"/var/log/*.log
HOOK
  chmod +x "$work/before" "$work/after"

  GABION_DEMO_ROOT=$here/root mmdebstrap --quiet --mode=$mode --variant=essential --format=tar \
    --include=systemd-sysv,udev,kmod,initramfs-tools,lz4,linux-image-cloud-amd64 \
    --aptopt='APT::Install-Recommends "false"' \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/info/*' \
    --essential-hook="$work/before \"\$1\"" --customize-hook="$work/after \"\$1\"" \
    bookworm "$work/root.tar" "$mirror"

  pack='mkdir "$1/root" && tar -C "$1/root" --numeric-owner --exclude="./dev/*" -xf "$1/root.tar" &&
    truncate -s "$2M" "$1/root.raw" &&
    mke2fs -q -t ext4 -L gabion-root -m 0 -E lazy_itable_init=1,lazy_journal_init=1,root_owner=0:0 -d "$1/root" "$1/root.raw" &&
    rm -rf "$1/root" "$1/root.tar"'
  if [ "$mode" = root ]; then
    sh -ec "$pack" pack "$work" "$size_mib"
  else
    unshare --user --map-root-user --map-auto sh -ec "$pack" pack "$work" "$size_mib"
  fi
  mv "$work/root.raw" "$image"
fi

cp --sparse=always --reflink=auto "$image" "$out"
