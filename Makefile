# Entry points for people; `cargo xtask` and `.ci/` do the work.

.PHONY: build demo test soak test-faults test-vm test-ansible packages deb

# Without the tests, which switch on what only they may have (the simulator's mutations).
build:
	cargo build --locked --release --bins -p gabion-cli -p gabion-monitor -p gabion-osd -p gabion-gateway -p gabion-vmm-shim -p gabion-bench

demo:
	./demo/demo.sh

# Debian packages in target/debs.
deb: packages build
	packaging/build-debs.sh target/release target/debs

packages:
	.ci/packages

# Formatting, clippy, docs, licences, simulation and all tests; changes nothing in the checkout.
test: packages
	cargo xtask verify

# The simulator, for as long as you like: make soak MINUTES=60
soak:
	cargo xtask soak $(if $(MINUTES),--minutes $(MINUTES))

# Real daemons that stand still for 80 s, and networks that fall apart; the latter as root.
test-faults: packages
	cargo xtask test-faults

# Guests of a stock kernel in gabion-vmm, in a nested machine with real KVM.
test-vm: packages
	cargo xtask test-vm

# Ansible on real systemd machines, from nothing; needs root.
test-ansible: packages build
	tests/ansible/run.sh target/release
