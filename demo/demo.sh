#!/bin/bash
# The main job in one command: a replicated volume, a guest that boots from it, a disk daemon killed
# for good while the guest writes, its data rebuilt on the others, and not one byte lost.
#
# GABION_DEMO_MIB (200): how much the guest writes. GABION_DEMO_KEEP=1: leaves the cluster running.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
top=$(dirname "$here")
mib=${GABION_DEMO_MIB:-200}
case $mib in '' | *[!0-9]*) echo "demo: GABION_DEMO_MIB=$mib is not a number" >&2; exit 2 ;; esac
export PATH=$top/target/release:$PATH:/usr/sbin:/sbin
export NO_COLOR=1
cd "$top"

step=preparing
say() { printf '\n== %s\n' "$*"; }
fail() {
  echo "demo: $*" >&2
  exit 1
}
now() { date +%s.%N; }
since() { awk -v a="$1" -v b="$(now)" 'BEGIN { printf "%.1f s", b - a }'; }

# Short, because Unix sockets lie under it.
dir=$(mktemp -d /tmp/gabion-demo.XXXXXX)
up=
stop() {
  status=$?
  trap - EXIT INT TERM
  [ "$status" = 0 ] || echo "demo: FAILED while $step" >&2
  if [ -n "$up" ] && [ -n "${GABION_DEMO_KEEP:-}" ]; then
    echo "demo: the cluster runs on in $dir/c; stop it with: gabion dev down --dir $dir/c --wipe" >&2
    exit "$status"
  fi
  if [ -n "$up" ]; then
    gabion vm kill demo >/dev/null 2>&1 || true
    if [ "$status" != 0 ] && [ -d "$dir/c/log" ]; then
      kept=$top/target/demo-failed
      rm -rf "$kept"
      mkdir -p "$kept"
      cp -r "$dir/c/log" "$kept/" || true
      [ -z "${log:-}" ] || cp "$log" "$kept/" 2>/dev/null || true
      echo "demo: logs are in $kept" >&2
    fi
    gabion dev down --dir "$dir/c" --wipe >/dev/null 2>&1 || echo "demo: could not stop the cluster in $dir/c" >&2
  fi
  rm -rf "$dir"
  exit "$status"
}
trap stop EXIT
trap 'exit 130' INT TERM

step="installing packages"
[ ! -x .ci/packages ] || .ci/packages
for tool in jq nbdcopy debugfs qemu-system-x86_64 mmdebstrap; do
  command -v "$tool" >/dev/null || fail "$tool is missing"
done
step="building"
say "building"
# The daemons and the command only: no tests, no benchmarks.
cargo build --locked --release --bins -p gabion-cli -p gabion-monitor -p gabion-osd -p gabion-gateway -p gabion-vmm-shim

start=$(now)
step="making the Debian root"
say "a Debian root (cached after the first time)"
t=$(now)
"$here/make-root.sh" "$dir/root.raw"
time_root=$(since "$t")

step="starting the cluster"
say "1 monitor and 4 OSDs on 4 simulated hosts"
t=$(now)
up=1
gabion dev up --dir "$dir/c" --osds 4 --hosts 4 --osd-size 2G --no-restart
export GABION_CONFIG=$dir/c/client.toml
gabion pool create demo --replicas 3 --failure-domain host
time_up=$(since "$t")

step="importing the root"
say "importing the root into a volume with three copies"
t=$(now)
gabion volume import "$dir/root.raw" demo --pool demo --format raw
rm "$dir/root.raw"
time_import=$(since "$t")

step="booting the guest"
say "a guest that boots from it"
t=$(now)
run_dir=$(gabion -o json dev status --dir "$dir/c" | jq -er '.daemons[] | select(.kind == "host") | .data_dir' | head -1)
log=$run_dir/vms/demo/console.log
gabion vm create demo --cpus 2 --memory 512M --disk demo --kernel-args "quiet gabion.demo_mib=$mib"
gabion vm start demo

# Waits for a marker on the guest's console: marker PATTERN SECONDS
marker() {
  local end=$((SECONDS + $2))
  until grep -aq "GABION-DEMO: $1" "$log" 2>/dev/null; do
    if grep -a "GABION-DEMO: FAILED" "$log" 2>/dev/null; then fail "the guest failed"; fi
    [ "$SECONDS" -lt "$end" ] || fail "the guest did not print '$1' within $2 s; its console ends: $(tail -c 400 "$log" 2>/dev/null)"
    sleep 0.2
  done
}
marker writing 120
time_boot=$(since "$t")

step="killing a disk"
victim=$(gabion -o json dev status --dir "$dir/c" | jq -c '[.daemons[] | select(.kind == "osd")][1]')
pid=$(jq -er .pid <<<"$victim") && id=$(jq -er .id <<<"$victim")
marker "round 1 done" 120
say "kill -9 of osd.$id while the guest writes; it never comes back"
t=$(now)
kill -9 "$pid"
! grep -aq 'GABION-DEMO: done' "$log" || fail "the guest was done before the disk died; raise GABION_DEMO_MIB"
step="rebuilding"
gabion osd out "$id"
marker done 240
time_guest=$(since "$t")
# The three that are left must hold three copies again.
timeout 180 gabion rebuild watch || fail "not clean in time"
time_rebuild=$(since "$t")
[ "$(gabion -o json pg ls --not-clean | jq '[.. | objects | select(has("acting"))] | length')" = 0 ] ||
  fail "some placement groups are not clean"
! kill -0 "$pid" 2>/dev/null || fail "osd.$id came back"

step="waiting for the guest to power off"
end=$((SECONDS + 60))
until [ "$(gabion -o json vm show demo | jq -r .state)" = stopped ]; do
  [ "$SECONDS" -lt "$end" ] || fail "the guest did not power off"
  sleep 0.3
done

step="comparing"
say "reading everything back on the host, through NBD"
t=$(now)
uri=$(gabion -o json export add demo --nbd --read-only | jq -er .uri)
nbdcopy "$uri" "$dir/back.raw"
mkdir "$dir/back"
debugfs -R "rdump /srv/demo $dir/back" "$dir/back.raw" >/dev/null 2>"$dir/debugfs.err" || fail "$(cat "$dir/debugfs.err")"
said=$(grep -a 'GABION-DEMO: manifest SHA256' "$log" | tr -d '\r' | awk '{print $NF}')
(cd "$dir/back/demo" && echo "$said  manifest.sha256" | sha256sum --quiet -c - && sha256sum --quiet -c manifest.sha256) ||
  fail "the data differs from what the guest wrote"
files=$(wc -l <"$dir/back/demo/manifest.sha256")
[ "$files" -gt 0 ] || fail "the manifest is empty"
time_compare=$(since "$t")

step="summing up"
say "summary"
cat <<END
  Debian root                         $time_root
  cluster up, pool                    $time_up
  import, three copies                $time_import
  guest boots, until it writes        $time_boot
  osd.$id killed -> guest done         $time_guest
  osd.$id killed -> clean on three     $time_rebuild
  read back by NBD, compared          $time_compare
  all of it                           $(since "$start")

  $files files ($mib MiB asked for) written by the guest while osd.$id died: every checksum matches.
END
step="stopping"
