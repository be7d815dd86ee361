# takuma's commands. `make demo` and `make test` do all set-up themselves.
.DEFAULT_GOAL := help
.PHONY: help demo build test image test-compose bench soak sim planted lint fmt clean setup
# The parts of a target depend on each other, and cargo uses all cores by itself.
.NOTPARALLEL:

CARGO := cargo
RELEASE := $(or $(CARGO_TARGET_DIR),target)/release

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 22

demo: build ## train on synthetic faces with two local workers, and show the result
	@$(RELEASE)/takuma demo

build: setup ## leave takuma, takuma-coordinator and takuma-worker in target/release
	@$(CARGO) build --release --locked --workspace --bins

test: build ## run all tests
	@$(CARGO) test --release --locked --workspace

image: build ## make the container image takuma:latest for deploy/compose.yaml
	@scripts/build-image.sh

test-compose: build ## train in containers with an S3 server; needs a Docker engine
	@scripts/test-compose.sh

bench: build ## seconds per iteration beside PyTorch's, on this machine
	@bench/run.sh

soak: build ## kill and stop workers, and the coordinator, for minutes beside an undisturbed run (SOAK_S, SOAK_EVERY_S); prints a table
	@$(CARGO) test --release --locked --workspace --test soak -- --ignored --nocapture

# None of them needs libtorch.
sim: ## the coordinator's decisions in SEEDS random schedules and SEEDS simulated clusters (default 20000), and behind gRPC in NET_SEEDS simulated networks (default 300)
	@TAKUMA_SIM_SEEDS=$(or $(SEEDS),20000) TAKUMA_SIM_WORLDS=$(or $(SEEDS),20000) \
		$(CARGO) test --release --locked -p takuma-core --test properties --test simulation -- --nocapture
	@TAKUMA_NET_SEEDS=$(or $(NET_SEEDS),300) \
		$(CARGO) test --release --locked -p takuma-coordinator --test network -- --nocapture

planted: ## plant bugs in copies of the coordinator's core: each must be caught by the simulation
	@scripts/planted-bugs.sh

lint: setup ## format, clippy, arrows and file sizes
	@$(CARGO) fmt --all --check
	@$(CARGO) clippy --release --locked --workspace --all-targets --quiet -- -D warnings
	@scripts/check-arrows.sh
	@scripts/check-arrows.sh --self-test
	@scripts/check-size.sh

fmt: ## format all Rust code
	@$(CARGO) fmt --all

clean: ## remove everything that was built, libtorch included
	@rm -rf target .libtorch

setup:
	@scripts/check-tools.sh
	@scripts/setup-libtorch.sh
