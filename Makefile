# The front door. `make` alone lists what there is; docs/building.md says more.
#
# Every target sees to its own tools (tools/setup), and builds what it needs.
#   V=1         show what cargo does
#   ARGS='...'  arguments for the program that run, test, shell or bench starts

.DEFAULT_GOAL := help
.NOTPARALLEL:
SHELL := bash
.SHELLFLAGS := -o pipefail -c
MAKEFLAGS += --no-builtin-rules --no-print-directory

TARGET := $(or $(TIDEMARK_TARGET),target)
TRIPLE := aarch64-unknown-none-softfloat
EL2    := $(TARGET)/el2/$(TRIPLE)/release
HOST   := tools/cargo host
IMAGE  := tools/cargo image
MKIMAGE := $(TARGET)/debug/mkimage
Q      := $(if $(V),,--quiet)
# Most crates have binaries or documentation without tests; cargo reports each of them.
BRIEF  := $(if $(V),cat,awk '/^running 0 tests$$/ { skip = 1; next } \
	skip && /^$$/ { next } skip && /^test result: ok. 0 passed; 0 failed/ { skip = 0; next } \
	{ skip = 0; if ($$0 != "" || last != "") print; last = $$0; fflush() }')
say    = @printf '\n== %s\n'

.PHONY: help run test image guests tools shell bench check fmt clippy doc clean setup \
	toolchain qemu lint host-test loom plants soak serial-test

help: ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 18

# The two commands, and the other things one does with a finished build

run: qemu image guests tools ## the demo: boot Debian's Linux, track its dirty pages, results in target/demo/
	$(say) "demo"
	@$(HOST) run $(Q) --bin demo -- $(ARGS)

test: host-test loom serial-test lock-test ## every test: the crates here, then the image in QEMU over its serial line

# One test of each kind over the serial line
QUICK_TESTS := linux_two_vcpus_to_shell oracle_max_adaptive oracle_a72_page uboot_to_prompt session_ends_amid hostile_max_one_cpu

.PHONY: quick
quick: fmt-check rooms qemu image guests tools ## what tells most in three minutes: lints of the image, the crates' tests cut short, one serial test of each kind
	$(say) "lints: image"
	@$(IMAGE) clippy $(Q) --release -p tidemark -- -D warnings
	$(say) "tests of the crates on this machine, cut short"
	@TIDEMARK_INTERRUPTIONS=1 TIDEMARK_SEQUENCES=50 $(HOST) test $(Q) --no-fail-fast 2>&1 | $(BRIEF)
	$(say) "tests over the serial line, one of each kind"
	@for name in $(QUICK_TESTS); do $(HOST) test $(Q) --test serial -- $$name || exit 1; done 2>&1 | $(BRIEF)

shell: qemu image guests tools ## boot the guests and give you the machine's serial line
	@$(HOST) run $(Q) --bin shell -- $(ARGS)

bench: qemu image guests tools ## measure inside EL2, results in target/bench/el2.json
	$(say) "bench"
	@$(HOST) run $(Q) --bin bench -- $(ARGS)

.PHONY: setup-test
setup-test:
	$(say) "tests of tools/lib"
	@tools/test-setup

host-test: toolchain setup-test
	$(say) "tests of the crates on this machine"
	@$(HOST) test $(Q) --no-fail-fast 2>&1 | $(BRIEF)
	@$(HOST) test $(Q) --no-fail-fast --lib -p tidemark-guests 2>&1 | $(BRIEF)

loom: toolchain
	$(say) "models under loom"
	@tools/loom 2>&1 | $(BRIEF)

plants: toolchain ## plant known bugs in the stage-2 engine: its tests must catch each (PLANTS=names: only those). Not in test; CI runs both
	$(say) "planted bugs"
	@tools/plants $(PLANTS)

soak: toolchain ## look for what the tests have not found yet, by other seeds (SOAK=seconds, 300 without it)
	$(say) "soak"
	@tools/soak $(or $(SOAK),300)

serial-test: qemu image guests tools
	$(say) "tests over the serial line"
	@$(HOST) test $(Q) --test serial -- $(ARGS)

# Some of the same tests on an image that checks the order of its locks at each that is taken (arch/lock.rs)
LOCK_TESTS := hostile_max_one_cpu session_ends slots_ copy_of_flash linux_reset

.PHONY: lock-test
lock-test: qemu image guests tools
	$(say) "tests over the serial line, the order of locks checked"
	@$(IMAGE) build $(Q) --profile checked -p tidemark
	@$(MKIMAGE) $(TARGET)/el2/$(TRIPLE)/checked/tidemark $(TARGET)/image/checked.img
	@for name in $(LOCK_TESTS); do \
		TIDEMARK_IMAGE=image/checked.img $(HOST) test $(Q) --test serial -- $$name || exit 1; \
	done 2>&1 | $(BRIEF)

# What is built

image: toolchain ## the hypervisor: target/image/tidemark.{elf,img}
	$(say) "image: $(TARGET)/image/tidemark.img"
	@$(HOST) build $(Q) --bin mkimage
	@$(IMAGE) build $(Q) --release -p tidemark
	@mkdir -p $(TARGET)/image
	@cp $(EL2)/tidemark $(TARGET)/image/tidemark.elf
	@$(MKIMAGE) $(TARGET)/image/tidemark.elf $(TARGET)/image/tidemark.img

guests: toolchain ## what it runs: target/guests/ (Linux, U-Boot, and our own payloads)
	$(say) "guests: $(TARGET)/guests/"
	@tools/setup guests
	@$(HOST) build $(Q) --bin mkimage
	@$(IMAGE) build $(Q) --release -p tidemark-guests
	@for guest in oracle bench hostile; do \
		$(MKIMAGE) --flat $(EL2)/$$guest $(TARGET)/guests/$$guest.img || exit 1; \
	done
	@cp $(EL2)/load $(EL2)/cntvct $(TARGET)/guests/
	@tools/mkinitramfs $(MKIMAGE)

tools: toolchain ## the host's programs: target/debug/{tidectl,mkimage}
	$(say) "host programs: $(TARGET)/debug/tidectl"
	@$(HOST) build $(Q) --bins

# What is checked

check: lint fmt-check rooms clippy doc-check package-check host-test ## formatting, rooms, lints, documentation, the package of crates/stage2, tests of the crates

.PHONY: fmt-check doc-check package-check rooms
fmt-check: toolchain
	$(say) "formatting"
	@$(HOST) fmt --all -- --check
	@for script in .ci/run tools/cargo tools/bare-root tools/loom tools/plants tools/soak tools/setup tools/test-setup tools/mkinitramfs tools/lib/*.sh; do bash -n $$script || exit 1; done

rooms: toolchain
	$(say) "rooms: who uses whom"
	@$(HOST) run $(Q) -p xtask -- rooms

fmt: lint ## put every source file into its form
	@$(HOST) fmt --all

# The guests by themselves: beside the image they would get what it wants of `dtoolkit`, which needs a heap.
clippy: lint ## lints of everything, warnings are errors
	$(say) "lints: crates of this machine"
	@$(HOST) clippy $(Q) --all-targets -- -D warnings
	@$(HOST) clippy $(Q) --test serial -- -D warnings
	$(say) "lints: image and guests"
	@$(IMAGE) clippy $(Q) --release -p tidemark -- -D warnings
	@$(IMAGE) clippy $(Q) --release -p tidemark-guests -- -D warnings

doc-check: toolchain
	$(say) "documentation: crates of this machine"
	@RUSTDOCFLAGS=-Dwarnings $(HOST) doc $(Q) --no-deps
	$(say) "documentation: image and guests"
	@$(IMAGE) doc $(Q) --no-deps -p tidemark -p tidemark-guests

# As it would go to a registry: it builds by itself, without the workspace.
package-check: toolchain
	$(say) "package: crates/stage2"
	@$(HOST) package --quiet -p tidemark-stage2 --all-features --allow-dirty

doc: doc-check ## the crates' documentation
	@echo "open $(TARGET)/doc/tidemark_stage2/index.html (crates) and $(TARGET)/el2/$(TRIPLE)/doc/tidemark/index.html (image)"

# Tools

setup: ## fetch everything that building and running need, and nothing that is there
	@tools/setup all

toolchain:
	@tools/setup toolchain

lint:
	@tools/setup lint

qemu:
	@tools/setup qemu

# By name: TIDEMARK_TARGET may be a directory that holds other things too.
clean: ## remove what was built (downloads stay in the cache)
	@rm -rf $(addprefix $(TARGET)/,debug release doc tmp el2 image guests tests demo bench shell \
		toolchain.env toolchain.toml setup.log .rustc_info.json .rustdoc_fingerprint.json)
