.DEFAULT_GOAL := help
.PHONY: help demo test test-page test-cluster faults fuzz bench lint image

help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: ## Run a store with the proxy in front of it
	cargo build --profile demo --bin aegis-proxy --example demo
	$${CARGO_TARGET_DIR:-target}/demo/examples/demo

test: ## Run all tests, and say how long each part took (ARGS="--lib": a part of them)
	tests/run $(ARGS)

fuzz: ## Edit inputs of the scanners at random for SECONDS=60
	AEGIS_FUZZ=$(or $(SECONDS),60) cargo test --release --test fuzz

test-page: ## Test the page of the admin port in a real browser
	tests/page/run

test-cluster: ## Test the image, the charts, the manifests and the monitoring
	tests/cluster/run

faults: ## Measure what clients see of the platform's faults, into docs/PLATFORM-FAULTS.md
	tests/platform-faults

bench: ## Run the benchmarks (QUICK=1: check that they work)
	cargo bench --bench micro $(if $(QUICK),-- --sample-count 1 --sample-size 1)
	cargo bench --bench compare -- $(if $(QUICK),--quick)

lint: ## Check the format, the lints and the length of files
	cargo fmt --check
	@find src tests benches examples -name '*.rs' -exec wc -l {} + | \
	awk '$$2 != "total" && $$1 > 600 { print $$2 ": " $$1 " lines, and 600 are the limit"; long = 1 } END { exit long }'
	cargo clippy --all-targets -- -D warnings

ENGINE ?= docker
IMAGE ?= aegis-proxy:0.1.0
STORE_IMAGE ?= aegis-demo-store:0.1.0
# Other bases than those of the Dockerfile, where they are given.
BASES = $(foreach base,RUST_IMAGE RUNTIME_IMAGE,$(if $($(base)),--build-arg $(base)=$($(base))))

# The revision is not in the Dockerfile: a label that an argument changes is not always built anew.
image: ## Build the image, and that of the demo's store (ENGINE=podman, IMAGE=registry/name:tag)
	$(ENGINE) build $(BASES) --label org.opencontainers.image.revision=$$(git rev-parse HEAD) --target proxy --tag $(IMAGE) .
	$(ENGINE) build $(BASES) --target store --tag $(STORE_IMAGE) .
