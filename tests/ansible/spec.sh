#!/bin/bash
# spec.sh: the playbooks parse, and what an inventory may say is checked: every flaw is refused with one
# sentence, before anything is changed. Touches no machine. Exit status 77: Ansible is not installed.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
top=$(cd "$here/../.." && pwd)
cache=${GABION_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/gabion}
key=$(sha256sum "$here/requirements.txt" | cut -c1-16)
PATH=$cache/ansible-$key/bin:$PATH
command -v ansible-playbook >/dev/null || { echo "spec: no ansible-playbook here (make test-ansible installs it)"; exit 77; }

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$top/ansible"
export ANSIBLE_NOCOLOR=1 ANSIBLE_ANY_ERRORS_FATAL=0 ANSIBLE_LOCAL_TEMP=$work

ansible-playbook --inventory inventories/three-nodes.yml --syntax-check site.yml add-node.yml purge.yml >"$work/syntax" 2>&1 ||
    { cat "$work/syntax"; exit 1; }

# One host per flaw. Each fails on its own, long before anything would be done.
cat >"$work/inventory.yml" <<'YAML'
all:
  children:
    gabion:
      children:
        gabion_monitors: {hosts: {unknown: }}
        gabion_osds:
          hosts: {misspelt: , wrongtype: , nosize: , badsize: , twice: }
      vars:
        ansible_connection: local
        ansible_python_interpreter: "{{ ansible_playbook_python }}"
        gabion_cluster_address: 127.0.0.1
        gabion_osds_here: [{name: a, size: 1G}]
  hosts:
    unknown: {gabion_osd_prot: 7100}
    misspelt: {gabion_osds_here: [{name: a, size: 1G, devise: /dev/sdb}]}
    wrongtype: {gabion_osd_port: high}
    nosize: {gabion_osds_here: [{name: a}]}
    badsize: {gabion_osds_here: [{name: a, size: 1.5G}]}
    twice: {gabion_osds_here: [{name: a, size: 1G}, {name: a, size: 2G}]}
YAML
if ansible-playbook --inventory "$work/inventory.yml" site.yml >"$work/log" 2>&1; then
    cat "$work/log"
    echo "spec: an inventory full of flaws was accepted"
    exit 1
fi

failed=0
# said HOST PATTERN
said() {
    grep -A 12 "^fatal: \[$1\]\|^\[ERROR\]: .*$1" "$work/log" | grep -q -- "$2" ||
        grep -q "^fatal: \[$1\].*$2" "$work/log" || { echo "spec: host $1 was not refused with \"$2\""; failed=1; }
}
said unknown 'unknown variable gabion_osd_prot; known are'
said misspelt 'devise'
said wrongtype 'gabion_osd_port'
said nosize 'missing required arguments: size'
said badsize 'its size is a number with K, M, G or T'
said twice 'unique on its node'
if [ $failed -ne 0 ]; then cat "$work/log"; exit 1; fi
if grep -E '^[a-z]+ +: .*changed=[1-9]' "$work/log"; then
    echo "spec: something was changed"
    exit 1
fi
echo "spec: 3 playbooks parse, 6 flaws refused"
