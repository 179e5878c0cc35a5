#!/bin/sh
# The whole comparison on this machine: raw file, NBD and vhost-user on a fresh development cluster.
#   bench/run.sh [DIR] [options of `gabion-bench cluster`, such as --rounds 3 --secs 10 --json out.jsonl]
set -eu
cd "$(dirname "$0")/.."
dir=${1:-./.bench}
[ $# -eq 0 ] || shift
cargo build --release --bins
target=${CARGO_TARGET_DIR:-target}/release
PATH="$(cd "$target" && pwd):$PATH"
export PATH
exec gabion-bench cluster --dir "$dir" "$@"
