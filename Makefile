# Every habit of the project is a target here. `make run` and `make test` install what they need (Debian, as root).
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
Q := $(if $(V),,@)
SHELL := /bin/bash

VENV    := .venv
PYTHON  := $(VENV)/bin/python
SPEC    ?= spec/aggregator-spec.json
OPTIONS ?=

CLANG      ?= clang-14
LLVM_STRIP ?= llvm-strip-14
BPF_OBJECT := bpf/traceleft.bpf.o
BPF_SOURCE := bpf/traceleft.bpf.c
BPF_CFLAGS := -O2 -g -Wall -Wextra -Werror -target bpf -mcpu=v3 -fdebug-compilation-dir=.

RUN_PACKAGES  := python3 libbpf1
TEST_PACKAGES := $(RUN_PACKAGES) python3-venv clang-14 llvm-14 libbpf-dev bpftool binutils gcc libc6-dev util-linux procps iproute2 openssl \
                 fish mandoc prometheus zsh

help: ## show this list
	$(Q)sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

run: install-run ## trace this host with SPEC (default spec/aggregator-spec.json) until Ctrl-C
	$(Q)exec ./traceleft.py trace --spec $(SPEC) $(OPTIONS)

demo: $(VENV)/ok install-test ## collector, tracer and a shell loop that opens a file for ten seconds
	$(Q)PYTHON=$(PYTHON) ./bench/demo.sh

test: $(VENV)/ok install-test lint bpf-check ## run every test, live ones included
	$(Q)TRACELEFT_LIVE=1 $(PYTHON) -m pytest -q test_traceleft.py $(TEST_OPTIONS)

lint: $(VENV)/ok ## ruff, and mypy --strict on traceleft.py
	$(Q)$(VENV)/bin/ruff check .
	$(Q)$(VENV)/bin/mypy --strict traceleft.py

bpf: install-test $(BPF_OBJECT) ## compile the BPF object

$(BPF_OBJECT): $(BPF_SOURCE) bpf/traceleft.h bpf/vmlinux.h Makefile
	$(Q)$(call compile_bpf,$@)

bpf-check: install-test ## compile the BPF object again and compare it with the committed one
	$(Q)scratch=$$(mktemp -d); trap 'rm -rf "$$scratch"' EXIT; \
	  $(call compile_bpf,$$scratch/traceleft.bpf.o) && \
	  { cmp $$scratch/traceleft.bpf.o $(BPF_OBJECT) || { echo "$(BPF_OBJECT) is not what its sources make: run 'make bpf'"; exit 1; }; }

# Debug information is stripped; BTF and its relocations, which libbpf needs, stay.
compile_bpf = $(CLANG) $(BPF_CFLAGS) -c $(BPF_SOURCE) -o $(1) && $(LLVM_STRIP) -g $(1)

dist: ## one self-contained executable file, dist/traceleft, and its SHA-256
	$(Q)python3 bench/dist.py

install-run:
	$(Q)$(call install_missing,$(RUN_PACKAGES))

install-test:
	$(Q)$(call install_missing,$(TEST_PACKAGES))

# apt-get only when something is missing, so that everything works offline afterwards
install_missing = missing=$$(for p in $(1); do dpkg-query -Wf '$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || echo $$p; done); \
  if [ -n "$$missing" ]; then echo "installing" $$missing; \
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null; } || exit 1; fi

$(VENV)/ok: pyproject.toml | install-test
	$(Q)python3 -m venv $(VENV)
	$(Q)$(PYTHON) -m pip install -q --disable-pip-version-check --upgrade 'pip>=25.1'
	$(Q)$(PYTHON) -m pip install -q --disable-pip-version-check --group test
	$(Q)touch $@

bpf-stats: $(VENV)/ok install-test ## what the verifier says of each program: instructions, load time
	$(Q)$(PYTHON) bench/bpf_stats.py

bench: $(VENV)/ok install-test ## measure against peers (about ten minutes); writes bench/RESULTS.md
	$(Q)$(PYTHON) bench/bench.py $(BENCH_OPTIONS)

bench-setup: ## install the peers that bench compares with
	$(Q)$(call install_missing,bpftrace libbpf-tools strace linux-perf)

clean: ## remove what make has built, but not the BPF object
	$(Q)rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis __pycache__ dist

.PHONY: help run demo test lint bpf bpf-check bpf-stats bench bench-setup dist install-run install-test clean
