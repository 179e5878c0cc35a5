#!/bin/bash
# build-debs.sh BINARIES OUT: Debian packages from the binaries that cargo built. Takes the manual pages
# and completions from the binaries themselves, and the versions of libraries from dpkg-shlibdeps.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
top=$(dirname "$here")
binaries=$(cd "${1:?usage: build-debs.sh BINARIES OUT}" && pwd)
mkdir -p "${2:?usage: build-debs.sh BINARIES OUT}"
out=$(cd "$2" && pwd)

for tool in dpkg-deb dpkg-shlibdeps strip gzip; do
    command -v "$tool" >/dev/null || { echo "build-debs: $tool is missing (packages dpkg-dev, binutils)" >&2; exit 1; }
done
for binary in gabion gabion-monitor gabion-osd gabion-gateway gabion-host gabion-vmm; do
    [ -x "$binaries/$binary" ] || { echo "build-debs: $binaries/$binary is missing: build it first" >&2; exit 1; }
done

# Version and date are the commit's: the same tree gives the same packages.
version=$(sed -n 's/^version = "\(.*\)"$/\1/p' "$top/Cargo.toml" | head -1)
SOURCE_DATE_EPOCH=$(date +%s)
if commit=$(git -C "$top" log -1 --format='%ct %h' 2>/dev/null); then
    SOURCE_DATE_EPOCH=${commit% *}
    version+="~git$(date -u -d "@$SOURCE_DATE_EPOCH" +%Y%m%d%H%M%S).${commit#* }"
    if [ -n "$(git -C "$top" status --porcelain --untracked-files=no)" ]; then
        version+=".changed$(date +%s)"
    fi
fi
export SOURCE_DATE_EPOCH
arch=$(dpkg --print-architecture)

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/shlibs/debian"
printf 'Source: gabion\n\nPackage: gabion\nArchitecture: any\n' >"$work/shlibs/debian/control"

# put MODE FILE DIRECTORY [NAME]
put() {
    install -D -m "$1" "$2" "$root/$3/${4:-$(basename "$2")}"
}

script() {
    local file=$root/DEBIAN/$1
    sed -e "s|@PACKAGE@|$package|g" -e "s|@UNITS@|$units|g" -e "s|@CONFIG@|$config|g" -e "s|@DATA@|$data|g" \
        "$here/scripts/$1" >"$file"
    chmod 755 "$file"
}

# package NAME DESCRIPTION DEPENDS RECOMMENDS UNITS CONFIG DATA
package() {
    package=$1
    local description=$2 depends=$3 recommends=$4
    units=$5 config=$6 data=$7
    root=$work/$package
    mkdir -p "$root/DEBIAN"
    local libraries programs=("$package")
    [ "$package" != gabion-host ] || programs+=(gabion-vmm)
    put 755 "$binaries/$package" usr/bin
    if [ "$package" = gabion-host ]; then put 755 "$binaries/gabion-vmm" usr/bin; fi
    strip --strip-debug "${programs[@]/#/$root/usr/bin/}"
    libraries=$(cd "$work/shlibs" && dpkg-shlibdeps -O "${programs[@]/#/-e$root/usr/bin/}" 2>"$work/shlibs.err") ||
        { cat "$work/shlibs.err" >&2; exit 1; }
    depends="${libraries#shlibs:Depends=}${depends:+, $depends}"

    for unit in "$here/systemd/$package".service "$here/systemd/$package"@.service "$here/systemd/$package".target; do
        if [ -e "$unit" ]; then put 644 "$unit" lib/systemd/system; fi
    done
    if [ -e "$here/$package.sysusers" ]; then put 644 "$here/$package.sysusers" usr/lib/sysusers.d "$package.conf"; fi
    if [ -e "$here/$package.tmpfiles" ]; then put 644 "$here/$package.tmpfiles" usr/lib/tmpfiles.d "$package.conf"; fi
    put 644 "$here/examples/${example:?}" "usr/share/doc/$package/examples"
    put 644 "$here/copyright" "usr/share/doc/$package"
    put 644 "$top/CHANGELOG.md" "usr/share/doc/$package"
    if [ "$package" = gabion ]; then
        mkdir -p "$root/usr/share/man/man1"
        "$binaries/gabion" manual "$root/usr/share/man/man1"
        "$binaries/gabion" completions bash >"$work/bash"
        "$binaries/gabion" completions zsh >"$work/zsh"
        "$binaries/gabion" completions fish >"$work/fish"
        put 644 "$work/bash" usr/share/bash-completion/completions gabion
        put 644 "$work/zsh" usr/share/zsh/vendor-completions _gabion
        put 644 "$work/fish" usr/share/fish/vendor_completions.d gabion.fish
    else
        "$binaries/$package" --manual | sed '/^\.TH /s/ 1 / 8 /' >"$work/manual"
        put 644 "$work/manual" usr/share/man/man8 "$package.8"
    fi
    find "$root/usr/share/man" -type f -exec gzip -9n {} +
    gzip -9n "$root/usr/share/doc/$package/CHANGELOG.md"

    {
        echo "Package: $package"
        echo "Version: $version"
        echo "Architecture: $arch"
        echo "Maintainer: The Gabion contributors <gabion@localhost>"
        echo "Section: admin"
        echo "Priority: optional"
        echo "Installed-Size: $(du -sk --exclude=DEBIAN "$root" | cut -f1)"
        echo "Depends: $depends"
        if [ -n "$recommends" ]; then echo "Recommends: $recommends"; fi
        echo "Description: $description"
        echo " Part of Gabion, replicated block storage for virtual machines on the local"
        echo " disks of ordinary servers."
    } >"$root/DEBIAN/control"
    for each in postinst prerm postrm; do
        script "$each"
    done
    chmod -R go-w "$root"
    dpkg-deb --root-owner-group -Zxz -z1 --build "$root" "$out/${package}_${version}_$arch.deb" >/dev/null
    echo "$out/${package}_${version}_$arch.deb"
}

# Of earlier versions: whoever installs *.deb from here means these.
rm -f "$out"/gabion_*.deb "$out"/gabion-{monitor,osd,gateway,host}_*.deb

base="gabion (= $version)"
example=client.toml package gabion "command line, user and directories of Gabion" \
    "systemd" "qemu-utils, libnbd-bin" "" /etc/gabion/client.toml ""
example=monitor.toml package gabion-monitor "cluster map and configuration of Gabion" \
    "$base" "" gabion-monitor.service /etc/gabion/monitor.toml /var/lib/gabion/monitor
example=osd.toml package gabion-osd "storage daemon of Gabion, one per disk" \
    "$base" "" 'gabion-osd@*.service' '/etc/gabion/osd/*.toml' /var/lib/gabion/osd
example=gateway.toml package gabion-gateway "volumes of Gabion over NBD and vhost-user-blk" \
    "$base" "" gabion-gateway.service /etc/gabion/gateway.toml ""
example=host.toml package gabion-host "virtual machines of Gabion on this machine" \
    "$base, gabion-gateway (= $version), qemu-system-x86" "" gabion-host.service /etc/gabion/host.toml ""
