# Entry points for people; `cargo xtask` and `.ci/` do the work.

.PHONY: build demo test packages

build:
	cargo build --locked --release --workspace --bins

demo:
	./demo/demo.sh

packages:
	.ci/packages

# Formatting, clippy, docs, licences, simulation and all tests; changes nothing in the checkout.
test: packages
	cargo xtask verify
