.DEFAULT_GOAL := help
.PHONY: help demo test fuzz bench lint

help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-6s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: ## Run a store with the proxy in front of it
	cargo build --release --bin aegis-proxy --example demo
	$${CARGO_TARGET_DIR:-target}/release/examples/demo

test: ## Run all tests
	cargo test

fuzz: ## Edit inputs of the scanners at random for SECONDS=60
	AEGIS_FUZZ=$(or $(SECONDS),60) cargo test --release --test fuzz

bench: ## Run the benchmarks (QUICK=1: check that they work)
	cargo bench --bench micro $(if $(QUICK),-- --sample-count 1 --sample-size 1)
	cargo bench --bench compare -- $(if $(QUICK),--quick)

lint: ## Check the format and the lints
	cargo fmt --check
	cargo clippy --all-targets -- -D warnings
