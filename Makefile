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
LLVM_OBJCOPY ?= llvm-objcopy-14
BPF_OBJECT := bpf/traceleft.bpf.o
BPF_SOURCE := bpf/traceleft.bpf.c
BPF_CFLAGS := -O2 -g -Wall -Wextra -Werror -target bpf -mcpu=v3 -fdebug-compilation-dir=.

RUN_PACKAGES  := python3 libbpf1
TEST_PACKAGES := $(RUN_PACKAGES) python3-venv clang-14 llvm-14 libbpf-dev bpftool binutils gcc libc6-dev util-linux procps iproute2 openssl tmux strace git curl \
                 fish logrotate mandoc prometheus systemd zsh

# what portability needs: emulators, what libbpf and a userland of musl are built with, and what runs another Debian's Python
VM_PACKAGES := qemu-system-x86 qemu-system-arm busybox-static cpio git gcc make libelf-dev zlib1g-dev patchelf musl-tools binutils \
               bzip2 xz-utils

help: ## show this list
	$(Q)sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 24

run: install-run ## trace this host with SPEC (default spec/aggregator-spec.json) until Ctrl-C
	$(Q)exec ./traceleft.py trace --spec $(SPEC) $(OPTIONS)

demo: $(VENV)/ok install-test ## collector, tracer and a shell loop that opens a file for ten seconds
	$(Q)PYTHON=$(PYTHON) ./bench/demo.sh

test: $(VENV)/ok install-test lint bpf-check ## run every test, live ones included
	$(Q)TRACELEFT_LIVE=1 $(PYTHON) -m pytest -q test_traceleft.py $(TEST_OPTIONS)

soak: $(VENV)/ok install-test ## the long forms of the fault tests, with figures (about 40 minutes)
	$(Q)TRACELEFT_SOAK=1 TRACELEFT_LIVE=1 $(PYTHON) -m pytest -q -s test_traceleft.py -k 'TestFaults or TestReload and loop' $(SOAK_OPTIONS)

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

# Debug information is stripped, with the relocations and local symbols of what is left of it, which nobody reads; BTF and
# its CO-RE relocations, which libbpf needs, stay.
compile_bpf = $(CLANG) $(BPF_CFLAGS) -c $(BPF_SOURCE) -o $(1) && \
  $(LLVM_OBJCOPY) -g --remove-section=.rel.BTF.ext --remove-section=.llvm_addrsig --wildcard --strip-symbol='LBB*' $(1)

dist: ## one self-contained executable file, dist/traceleft, and its SHA-256
	$(Q)python3 bench/dist.py

portability: install-portability install-test ## run the one file on every Python, libbpf, kernel and userland claimed (about 40 minutes)
	$(Q)python3 bench/portability.py $(ROWS)

portability-ci: install-portability ## its rows of five kernels in virtual machines of both architectures (5 to 8 minutes)
	$(Q)python3 bench/portability.py --ci

install-portability:
	$(Q)$(call install_missing,$(RUN_PACKAGES) $(VM_PACKAGES))

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

# Where `make install` puts what; a package sets DESTDIR, and PREFIX=/usr.
DESTDIR    ?=
PREFIX     ?= /usr/local
SYSCONFDIR ?= /etc
BINDIR     := $(PREFIX)/bin
SHAREDIR   := $(PREFIX)/share
UNITDIR    ?= $(PREFIX)/lib/systemd/system
CONFIG     := $(SYSCONFDIR)/traceleft/spec.json
DOCDIR     := $(SHAREDIR)/doc/traceleft
INSTALLED  := $(BINDIR)/traceleft $(SHAREDIR)/man/man8/traceleft.8 $(UNITDIR)/traceleft.service \
              $(SYSCONFDIR)/logrotate.d/traceleft $(SHAREDIR)/bash-completion/completions/traceleft \
              $(SHAREDIR)/zsh/site-functions/_traceleft $(SHAREDIR)/fish/vendor_completions.d/traceleft.fish

install: dist ## program, manual page, completions, systemd unit and examples, below DESTDIR, PREFIX (/usr/local) and SYSCONFDIR
	$(Q)install -D -m 755 dist/traceleft "$(DESTDIR)$(BINDIR)/traceleft"
	$(Q)for pair in man:man/man8/traceleft.8 completion,bash:bash-completion/completions/traceleft \
	    completion,zsh:zsh/site-functions/_traceleft completion,fish:fish/vendor_completions.d/traceleft.fish; do \
	  target="$(DESTDIR)$(SHAREDIR)/$${pair#*:}"; command=$${pair%%:*}; \
	  install -D -m 644 /dev/null "$$target" && dist/traceleft $${command/,/ } >"$$target" || exit 1; done
	$(Q)install -D -m 644 spec/service/traceleft.service "$(DESTDIR)$(UNITDIR)/traceleft.service"
	$(Q)sed -i 's|/usr/local/bin|$(BINDIR)|; s|/etc/|$(SYSCONFDIR)/|' "$(DESTDIR)$(UNITDIR)/traceleft.service"
	$(Q)install -D -m 644 spec/service/traceleft.logrotate "$(DESTDIR)$(SYSCONFDIR)/logrotate.d/traceleft"
	$(Q)[ -e "$(DESTDIR)$(CONFIG)" ] || install -D -m 644 spec/service/spec.json "$(DESTDIR)$(CONFIG)"
	$(Q)install -d "$(DESTDIR)$(DOCDIR)/examples"
	$(Q)cp -R spec/*.json spec/monitoring proto "$(DESTDIR)$(DOCDIR)/examples"
	$(Q)install -m 644 README.md CHANGELOG.md LICENSE "$(DESTDIR)$(DOCDIR)"

uninstall: ## remove what install has put there; a spec.json that was edited stays
	$(Q)for path in $(INSTALLED); do rm -f "$(DESTDIR)$$path"; done
	$(Q)rm -rf "$(DESTDIR)$(DOCDIR)"
	$(Q)if cmp -s spec/service/spec.json "$(DESTDIR)$(CONFIG)"; then rm "$(DESTDIR)$(CONFIG)"; fi
	$(Q)rmdir "$(DESTDIR)$(SYSCONFDIR)/traceleft" 2>/dev/null || true

man: ## show the manual page
	$(Q)./traceleft.py man | man -l -

clean: ## remove what make has built, but not the BPF object
	$(Q)rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis __pycache__ dist

.PHONY: help run demo test soak lint bpf bpf-check bpf-stats bench bench-setup dist portability portability-ci install-portability install-run install-test install uninstall man clean
