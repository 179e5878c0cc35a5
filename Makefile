# Entry points for people; `cargo xtask` and `.ci/` do the work.

.PHONY: build demo test test-vm packages

build:
	cargo build --locked --release --workspace --bins

demo:
	./demo/demo.sh

packages:
	.ci/packages

# Formatting, clippy, docs, licences, simulation and all tests; changes nothing in the checkout.
test: packages
	cargo xtask verify

# Guests of a stock kernel in gabion-vmm, in a nested machine with real KVM.
test-vm: packages
	cargo xtask test-vm
