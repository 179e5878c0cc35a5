# Sourced: what the test needs on this machine, each made once and cached in $cache.
# Afterwards $ansible is the directory of Ansible's commands and $node_root the root that nodes start from.

cache=${GABION_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/gabion}
mirror=${GABION_DEBIAN_MIRROR:-http://deb.debian.org/debian}
mkdir -p "$cache"

prepare_packages() {
    local wanted=(jq systemd-container mmdebstrap iproute2 openssh-client dpkg-dev binutils qemu-utils) missing=() package
    for package in "${wanted[@]}"; do
        [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)" = installed ] || missing+=("$package")
    done
    [ ${#missing[@]} -eq 0 ] && return
    echo "installing ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    apt-get -q -y install --no-install-recommends "${missing[@]}" ||
        { apt-get -q update && apt-get -q -y install --no-install-recommends "${missing[@]}"; }
}

# prepare_ansible: a virtual environment per set of versions.
prepare_ansible() {
    local key venv
    key=$(sha256sum "$here/requirements.txt" | cut -c1-16)
    venv=$cache/ansible-$key
    ansible=$venv/bin
    [ -e "$venv/complete" ] && return
    rm -rf "$venv"
    python3 -m venv "$venv"
    "$ansible/python" -m pip install --quiet --requirement "$here/requirements.txt"
    touch "$venv/complete"
}

# What the packages depend on is in the root: nodes have no way out to a repository.
node_packages=systemd-sysv,dbus,udev,iproute2,openssh-server,python3,python3-apt,procps,e2fsprogs,librocksdb7.8,qemu-utils,libnbd-bin,qemu-system-x86

prepare_node_root() {
    local key work
    key=$(sha256sum <"$here/prepare.sh" | cut -c1-16)
    node_root=$cache/node-root-$key
    [ -d "$node_root" ] && return
    echo "bootstrapping Debian 12 for the nodes (cached afterwards in $cache)"
    work=$(mktemp -d "$cache/node-root.XXXXXX")
    mmdebstrap --quiet --mode=root --variant=minbase --format=tar --include="$node_packages" \
        --aptopt='APT::Install-Recommends "false"' \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
        bookworm "$work/root.tar" "$mirror"
    mkdir "$work/root"
    tar -C "$work/root" --numeric-owner -xf "$work/root.tar"
    # A first boot that asks, waits for a network or phones home is no use here.
    rm -f "$work/root/etc/machine-id" "$work/root/etc/resolv.conf"
    : >"$work/root/etc/resolv.conf"
    local unit
    for unit in apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer fstrim.timer \
        systemd-networkd-wait-online.service systemd-timesyncd.service console-getty.service systemd-udevd.service; do
        ln -sf /dev/null "$work/root/etc/systemd/system/$unit"
    done
    rm -f "$work/root.tar"
    mv "$work/root" "$node_root"
    rmdir "$work"
}
