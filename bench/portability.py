#!/usr/bin/env python3
"""make portability: runs the one file of `make dist` on every Python, libbpf, kernel and userland that we claim.

Each row of the table runs bench/live_check.py somewhere, or sees that the file refuses to run there in one clear line. Prints
the table, renews what has passed of it in bench/PORTABILITY.md (not with --ci), and exits 1 when a cell is red.

    portability.py [--ci] [--list] [ROW ...]    only the rows of CI's subset; only those with one of these texts in the name
"""

import argparse
import atexit
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple

HERE = Path(__file__).resolve().parent.parent
BENCH = HERE / "bench"
CACHE = Path(os.environ.get("VMCACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "traceleft-vm"))
PYENV = Path.home() / ".pyenv/versions"
RESULTS = BENCH / "PORTABILITY.md"
MANY = 800_000   # verified instructions that turn a row red: the kernel's limit is 1,000,000
TIMEOUT = 1800   # seconds for one command of a row
NEWEST = 7 * 86400   # seconds that what was the newest package stays that
# Not TestDist: a row that is done changes PORTABILITY.md, and so whether the commit is `-dirty`, while it compares.
UNIT_TESTS = ["-m", "not live", "--deselect", "test_traceleft.py::TestDist", "test_traceleft.py"]
# By class, so that a name that there is no more is an error. Left out is what is long and not about Python.
LIVE_TESTS = ["-m", "live", "-k", "not (TestReload and loop)", *(f"test_traceleft.py::{name}" for name in (
    "TestTracer", "TestWalkThrough", "TestReload", "TestHostile", "TestBadHosts", "TestDoctor", "TestPaths", "TestProcesses",
    "TestWho", "TestConnections", "TestRecordingLive", "TestOtlpLive", "TestTerminal", "TestGrpcChannel"))]


class Result(NamedTuple):
    """What a row's run printed, and whether it was what it should be."""

    passed: bool
    output: str


class Row(NamedTuple):
    """One line of the table."""

    name: str
    run: Callable[[], Result]
    in_ci: bool = False
    expects_grpc: bool = False


# ----------------------------------------------------------------------------------------------------------------------
# Ways to run
# ----------------------------------------------------------------------------------------------------------------------

dist = Path(tempfile.mkdtemp(prefix="traceleft-portability-"))
atexit.register(shutil.rmtree, dist, ignore_errors=True)
cache_lock = threading.RLock()
results_lock = threading.Lock()
host_lock = threading.Lock()  # rows on this machine's own kernel run one at a time, virtual machines beside them


def sh(command, timeout=TIMEOUT, **more):
    try:
        done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout,
                              errors="replace", **more)
    except subprocess.TimeoutExpired as error:
        return Result(False, f"{(error.stdout or b'').decode(errors='replace')}\nFAIL {shlex.join(map(str, command))}: {timeout} s\n")
    return Result(done.returncode == 0, done.stdout)


def live_check(python, *arguments, env=None):
    """On this machine's kernel."""
    with host_lock:
        return sh([python, BENCH / "live_check.py", dist / "traceleft", *arguments], env={**os.environ, **(env or {})})


def virtual_machine(kernel, arch, *arguments, suite="bookworm", python="", before="", boot=()):
    """In a virtual machine of Debian's kernel and userland; `before` is shell, `boot` are the kernel's arguments.

    `python` is such as python3.15, where it is not the suite's default.
    """
    folder = Path(tempfile.mkdtemp(dir=dist))
    for file in (dist / "traceleft", BENCH / "live_check.py"):
        shutil.copy(file, folder)
    check = shlex.join(["python3", "live_check.py", "traceleft", *arguments])
    (folder / "run").write_text(f"set -e\n{before}\n{check}\n")
    return sh([BENCH / "vm.sh", kernel, arch, folder, *boot], env={**os.environ, "SUITE": suite, "PYTHON": python})


def cached(name, make):
    """A folder of the cache, made by `make(folder)` when it is missing."""
    folder = CACHE / name
    with cache_lock:
        if not folder.exists():
            fresh = Path(tempfile.mkdtemp(dir=CACHE))
            try:
                make(fresh)
                fresh.rename(folder)
            finally:
                shutil.rmtree(fresh, ignore_errors=True)
    return folder


def check_call(command, **more):
    done = sh(command, **more)
    if not done.passed:
        raise RuntimeError(f"{shlex.join(map(str, command))}: {done.output[-2000:]}")
    return done.output


# ----------------------------------------------------------------------------------------------------------------------
# Pythons, and the optional packages
# ----------------------------------------------------------------------------------------------------------------------


def pythons() -> Dict[str, Path]:
    """Version -> interpreter: those of pyenv, and this machine's own where it is another minor version; oldest first."""
    found = {}
    for path in [*PYENV.glob("*/bin/python"), Path("/usr/bin/python3")]:
        done = subprocess.run([path, "-c", "import platform; print(platform.python_version())"], capture_output=True, text=True)
        if done.returncode == 0 and (PYENV in path.parents or all(version(done.stdout)[:2] != version(name)[:2] for name in found)):
            found.setdefault(done.stdout.strip(), path)
    return dict(sorted(found.items(), key=lambda item: version(item[0])))


def version(text):
    return tuple(map(int, re.findall(r"\d+", text)))


def environment(python: Path, name, packages):
    """A virtual environment of the cache; the packages are binary wheels. Returns its interpreter."""
    def make(folder):
        # the newest Pythons need the newest pip, which the oldest cannot run
        pip = environment(Path(sys.executable), "pip", ["pip"]) if CACHE in python.parents else sys.executable
        check_call([python, "-m", "venv", "--without-pip", folder])
        check_call([pip, "-m", "pip", "--python", folder / "bin/python", "install", "-q", "--only-binary=:all:",
                    "--disable-pip-version-check", *packages])
    name = re.sub(r"[^\w.]+", "-", f"venv-{name}-{'-'.join(packages)}")[:120]
    with cache_lock:
        if (CACHE / name).exists() and (CACHE / name).stat().st_mtime < time.time() - NEWEST and not all("==" in p for p in packages):
            shutil.rmtree(CACHE / name)
    return cached(name, make) / "bin/python"


def unstable_python(name):
    """The interpreter `name` of Debian unstable, which runs here beside its own libc, and this machine's libbpf."""
    def make(folder):
        base = check_call([BENCH / "vm.sh", "newest", "amd64", "-"], env={**os.environ, "SUITE": "sid", "PYTHON": name}).split()[-1]
        check_call(["sh", "-c", f"gzip -dc {shlex.quote(base)} | cpio -idm --quiet"], cwd=folder)
        for library in folder.glob("usr/lib/x86_64-linux-gnu/libbpf*"):
            library.unlink()  # tests hide this machine's
        libraries = CACHE / f"{name}-sid/usr/lib/x86_64-linux-gnu"
        check_call(["patchelf", "--set-interpreter", libraries / "ld-linux-x86-64.so.2", "--force-rpath", "--set-rpath", libraries,
                    folder / "usr/bin" / name])
    return cached(f"{name}-sid", make) / "usr/bin" / name


def test_packages():
    """The `test` group of pyproject.toml, without what only `make lint` needs."""
    text = (HERE / "pyproject.toml").read_text()
    group = re.search(r"^test = \[(.*?)^\]", text, re.S | re.M)[1]
    return [package for package in re.findall(r'"(.+?)"', group) if not package.startswith(("mypy", "ruff"))]


def run_python(python, name):
    """Unit tests, a subset of the live ones, and the check, with the newest packages for this Python; none may be skipped."""
    inner = environment(python, f"tests-{name}", test_packages())
    env = {**os.environ, "TRACELEFT_LIVE": "1"}
    done = []
    for options in (UNIT_TESTS, LIVE_TESTS):
        with host_lock if options is LIVE_TESTS else nullcontext():
            result = sh([inner, "-X", "faulthandler", "-m", "pytest", "-q", "-ra", "--tb=short", *options], cwd=HERE, env=env)
        done.append(Result(result.passed and not re.search(r"\d+ (skipped|xfailed|xpassed)", result.output), result.output))
    done.append(live_check(inner))
    return Result(all(one.passed for one in done), "\n".join(one.output for one in done))


def run_old_python(python, name):
    """The one file and the script say in one line that it is too old. Python 2, which cannot parse the script, shows that line."""
    said = []
    for file in (dist / "traceleft", HERE / "traceleft.py"):
        for arguments in (["trace", "open"], ["--version"]):
            done = subprocess.run([python, file, *arguments], capture_output=True, text=True)
            unparsed = version(name) < (3,) and file.suffix == ".py"
            lines = done.stderr.splitlines()
            if unparsed:
                passed = done.returncode == 1 and len(lines) == 4 and lines[3].startswith("SyntaxError")
            else:
                passed = done.returncode == 3 and len(lines) == 1
            if not passed or "is too old: it needs 3.9 or later" not in lines[unparsed] or done.stdout:
                return Result(False, f"{file.name} {arguments}: exit {done.returncode}\n{done.stdout}{done.stderr}")
            said.append(f"script {'in a SyntaxError' if unparsed else 'too'}\n" if file.suffix else f"{lines[0]}\n")
    return Result(True, "".join(said))


# The oldest grpcio that has a wheel for that Python. Debian 11's protobuf is the oldest that is tried, on each of them.
OLDEST_GRPCIO = {(3, 9): "1.33.1", (3, 10): "1.41.0", (3, 11): "1.49.0", (3, 12): "1.59.0", (3, 13): "1.66.2", (3, 14): "1.75.1",
                 (3, 15): "1.84.0"}
OLDEST_PROTOBUF = "3.12.4"
UNSTABLE = ("python3.14", "python3.15")  # Debian unstable's, newer than what is here
MIXED = ((3, 9), (3, 13))  # where the oldest of each is run with the newest of the other, too


def run_packages(python, name, packages):
    return live_check(environment(python, name, packages))


# ----------------------------------------------------------------------------------------------------------------------
# libbpf
# ----------------------------------------------------------------------------------------------------------------------


def source_apt():
    """Debian's lists of source packages, in a root of their own; returns apt's configuration."""
    def make(root):
        for folder in ("etc/apt/apt.conf.d", "etc/apt/preferences.d", "var/lib/apt/lists/partial", "var/cache/apt/archives/partial",
                       "var/lib/dpkg"):
            (root / folder).mkdir(parents=True)
        (root / "var/lib/dpkg/status").touch()
        listed = check_call(["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE)", "Created-By: Packages"])
        code = re.search(r"^VERSION_CODENAME=(\S+)", Path("/etc/os-release").read_text(), re.M)[1]
        mirror = next(line.split()[0] for line in listed.splitlines() if line.split()[1] == code)
        key = "[signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]"
        (root / "etc/apt/sources.list").write_text("".join(
            f"deb-src {key} {mirror} {suite} main\n" for suite in ("bookworm", "trixie", "sid")))
    root = cached("apt-source", make)
    configuration = root / "apt.conf"
    configuration.write_text(f'Dir "{root}/";\nDir::State::status "{root}/var/lib/dpkg/status";\nAPT::Sandbox::User "root";\n'
                             'Acquire::Languages "none";\nAcquire::Check-Valid-Until "false";\n')  # a mirror may lag behind
    env = {**os.environ, "APT_CONFIG": str(configuration)}
    check_call(["apt-get", "update", "-qq"], env=env)
    return env


def source(package, suite, folder):
    """Unpacks a suite's source package as it comes from its authors; returns where."""
    check_call(["apt-get", "source", "-qq", "--download-only", f"{package}/{suite}"], env=source_apt(), cwd=folder)
    check_call(["tar", "-xf", *folder.glob("*.orig.tar.*z"), "-C", folder])
    return next(path for path in folder.iterdir() if path.is_dir())


def originals(packages, folder):
    """Debian's source packages, as in zlib/bookworm, without Debian's own changes; downloads their archives."""
    check_call(["apt-get", "source", "-qq", "--download-only", "--tar-only", *packages], env=source_apt(), cwd=folder)


def libbpf_of_linux():
    """The folder of libbpf.so.1 as Linux 6.1 has it, some weeks after libbpf 1.0: the oldest 1.x that Debian has."""
    def make(folder):
        check_call(["apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", "linux-source-6.1"], cwd=folder)
        check_call(["sh", "-c", "dpkg-deb --fsys-tarfile *.deb | tar -xO --wildcards '*/linux-source-6.1.tar.xz' >linux.tar.xz"],
                   cwd=folder)
        parts = "tools/lib", "tools/include", "tools/scripts", "tools/build", "tools/arch", "include/uapi", "scripts/bpf_doc.py"
        check_call(["tar", "-xf", "linux.tar.xz", *(f"linux-source-6.1/{part}" for part in parts)], cwd=folder)
        (folder / "built").mkdir()
        check_call(["make", "-s", "-C", "linux-source-6.1/tools/lib/bpf", f"OUTPUT={folder}/built/"], cwd=folder)
        version = (folder / "linux-source-6.1/tools/lib/bpf/libbpf_version.h").read_text()
        assert re.findall(r"LIBBPF_\w+_VERSION (\d+)", version) == ["1", "1"], version
        check_call(["sh", "-c", "rm -r *.deb linux.tar.xz linux-source-6.1"], cwd=folder)
    return cached("libbpf-linux-6.1", make) / "built"


def libbpf(suite):
    """The folder of libbpf.so.1, built from the suite's source package."""
    def make(folder):
        check_call(["make", "-s", "-C", source("libbpf", suite, folder) / "src", "BUILD_STATIC_ONLY=", f"OBJDIR={folder}/built"])
    return cached(f"libbpf-{suite}", make) / "built"


def run_libbpf(folder):
    """With that libbpf, which doctor has to name."""
    done = live_check(sys.executable, env={"LD_LIBRARY_PATH": str(folder)})
    if str(folder.resolve()) not in done.output:
        return Result(False, f"{done.output}\nFAIL another libbpf was loaded than that in {folder}\n")
    return done


# ----------------------------------------------------------------------------------------------------------------------
# musl
# ----------------------------------------------------------------------------------------------------------------------

MUSL_SOURCES = ["busybox/bookworm", "elfutils/bookworm", "libbpf/bookworm", "libffi/bookworm", "musl/sid", "python3.11/bookworm",
                "xz-utils/bookworm", "zlib/bookworm"]

# Run in a mount namespace of its own: mounts what a host has, and nothing that can be written to but /run
MUSL_ROOT = """
set -e
mount --bind "$root" "$root"
[ -z "$libc" ] || mount --bind "$libc" "$root/lib/ld-musl-x86_64.so.1"
mount -t proc proc "$root/proc"
mount -t sysfs sysfs "$root/sys"
mount -t tmpfs tmpfs "$root/dev"
for name in null zero urandom; do touch "$root/dev/$name"; mount --bind "/dev/$name" "$root/dev/$name"; done
mount -t tmpfs tmpfs "$root/run"
mount --bind "$program" "$root/p"
[ -z "$packages" ] || { mkdir "$root/run/packages"; mount --bind "$packages" "$root/run/packages"; }
for name in "" /dev /p; do mount -o remount,ro,bind "$root$name"; done
exec chroot "$root" /bin/busybox env -i PATH=/bin:/usr/bin TMPDIR=/run ${packages:+PYTHONPATH=/run/packages} /bin/sh -ec "$1"
"""

# What it is has to be so, and the file has to start by its `#!` line
MUSL_CHECK = """
set -- $(/lib/ld-musl-x86_64.so.1 2>&1 || :)
[ "$1 $2" = "musl libc" ]
echo "musl $5"
[ "$5" = "$VERSION" ]
if (: >/tmp/file) 2>/dev/null; then echo "FAIL /tmp can be written to"; exit 1; fi
if command -v sudo || command -v bash || command -v apt-get; then echo "FAIL not busybox alone"; exit 1; fi
[ "$(readlink -f "$(command -v ls)")" = /bin/busybox ]
cd /p
./traceleft --version
python3 -c 'import os, sys; os.setuid(65534); os.execvp("python3", ["python3", *sys.argv[1:]])' \
    traceleft trace open 2>/run/refused && exit 1
case $(cat /run/refused) in
"traceleft: missing privilege CAP_BPF and CAP_PERFMON: run it as root; 'traceleft doctor' tells what this host has and lacks")
	echo "pass another user is told so, and of no sudo" ;;
*) echo "FAIL another user: $(cat /run/refused)"; exit 1 ;;
esac
exec python3 live_check.py traceleft
"""


def musl_userland():
    """A folder with `root`, all of musl's and busybox's, and `libc.so`, a newer musl; see bench/musl.sh."""
    def make(folder):
        sources = Path(tempfile.mkdtemp(dir=dist))
        originals(MUSL_SOURCES, sources)
        check_call([BENCH / "musl.sh", sources, folder])
    return cached("musl", make)


def musl_wheels(packages):
    """A folder of packages from PyPI as they are built for musl."""
    def make(folder):
        check_call([sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--target", folder,
                    "--platform", "musllinux_1_2_x86_64", "--platform", "musllinux_1_1_x86_64", "--python-version", "3.11",
                    "--implementation", "cp", "--only-binary=:all:", *packages])
    return cached(f"musl-{'-'.join(packages)}", make)


def run_musl(libc, packages=()):
    """On this machine's kernel, in a folder that is the root of the file system; `libc` is another than it is built with."""
    userland = musl_userland()
    folder = Path(tempfile.mkdtemp(dir=dist))
    folder.chmod(0o755)  # the other user, too, has to get at it
    for file in (dist / "traceleft", BENCH / "live_check.py"):
        shutil.copy(file, folder)
    env = {"root": str(userland / "root"), "libc": libc and str(userland / libc), "program": str(folder),
           "packages": str(musl_wheels(packages)) if packages else ""}
    check = f"VERSION={'1.2.6' if libc else '1.2.3'}\n{MUSL_CHECK}"
    with host_lock:
        return sh(["unshare", "--mount", "--propagation", "private", "sh", "-c", MUSL_ROOT, "sh", check],
                  env={**os.environ, **env})


# ----------------------------------------------------------------------------------------------------------------------
# The table
# ----------------------------------------------------------------------------------------------------------------------


REQUIRED = [(3, minor) for minor in range(9, 14)]  # a run without one of these has a red row


def python_rows() -> List[Row]:
    rows, places = [], []  # places: what it is called, how to get its interpreter
    for name, python in pythons().items():
        if version(name) < (3, 9):
            rows.append(Row(f"Python {name}: refused", lambda python=python, name=name: run_old_python(python, name)))
        else:
            places.append((name, lambda python=python: python))
    if platform.machine() == "x86_64":
        places += [(f"{name[6:]} of Debian unstable", lambda name=name: unstable_python(name)) for name in UNSTABLE]
    there = {version(name)[:2] for name in pythons()}
    for minor in REQUIRED:
        if minor not in there:
            why = f"there is no Python {minor[0]}.{minor[1]} here, as in {PYENV}\n"
            rows.append(Row(f"Python {minor[0]}.{minor[1]}: missing", lambda why=why: Result(False, why)))
    for name, get in places:
        rows.append(Row(f"Python {name}: unit tests, live subset, newest packages",
                        lambda name=name, get=get: run_python(get(), name), expects_grpc=True))
        for what, packages in package_choices(version(name)[:2]).items():
            rows.append(Row(f"Python {name}: {what}",
                            lambda name=name, get=get, packages=packages: run_packages(get(), name, packages), expects_grpc=True))
    return rows


def package_choices(python) -> Dict[str, List[str]]:
    """What is run of old packages, and those packages."""
    if python not in OLDEST_GRPCIO:
        return {}
    protobuf, grpcio = f"protobuf=={OLDEST_PROTOBUF}", f"grpcio=={OLDEST_GRPCIO[python]}"
    choices = {"oldest packages": [protobuf, grpcio]}
    if python in MIXED:
        choices.update({"oldest protobuf, newest grpcio": [protobuf, "grpcio"], "newest protobuf, oldest grpcio": ["protobuf", grpcio]})
    return choices


def kernel_rows() -> List[Row]:
    def booted(name, *arguments, in_ci=False, **more):
        return Row(name, lambda: virtual_machine(*arguments, **more), in_ci)

    return [
        booted("amd64, kernel 6.1", "6.1", "amd64", in_ci=True),
        booted("amd64, kernel 6.12", "6.12", "amd64", in_ci=True),
        booted("amd64, newest kernel", "newest", "amd64", in_ci=True),
        booted("arm64, kernel 6.1", "6.1", "arm64", in_ci=True),
        booted("arm64, kernel 6.12", "6.12", "arm64", in_ci=True),
        booted("arm64, newest kernel", "newest", "arm64"),
        booted("amd64, newest kernel, Debian 13's userland", "newest", "amd64", suite="trixie"),
        booted("arm64, kernel 6.12, Debian 13's userland", "6.12", "arm64", suite="trixie"),
        booted("amd64, newest kernel, Debian unstable's userland", "newest", "amd64", suite="sid"),
        booted("amd64, newest kernel, Debian unstable's userland, Python 3.15", "newest", "amd64", suite="sid", python="python3.15"),
        booted("amd64, kernel 5.10: refused", "5.10", "amd64", "--refused", "it needs 5.15 or later"),
        booted("arm64, kernel 5.10: refused", "5.10", "arm64", "--refused", "it needs 5.18 or later"),
        booted("amd64, kernel 6.1, Debian 11's userland (libbpf 0.3): refused", "6.1", "amd64", "--refused",
               "cannot load libbpf.so.1", suite="bullseye"),
        booted("amd64, kernel 6.1, locked down: refused", "6.1", "amd64", "--refused", "locked down (confidentiality)",
               boot=["lsm=lockdown,capability,bpf", "lockdown=confidentiality"]),
        booted("amd64, kernel 6.1, lockdown=integrity", "6.1", "amd64", boot=["lsm=lockdown,capability,bpf", "lockdown=integrity"]),
        booted("amd64, kernel 6.1, busybox only, /tmp read-only", "6.1", "amd64",
               before="mount -o remount,ro /tmp; export TMPDIR=/run"),
    ]


def all_rows() -> List[Row]:
    return [*kernel_rows(),
            Row("libbpf of Linux 6.1, between 1.0 and 1.1, built from source", lambda: run_libbpf(libbpf_of_linux())),
            Row("libbpf of Debian 12, built from source", lambda: run_libbpf(libbpf("bookworm"))),
            Row("libbpf of Debian 13, built from source", lambda: run_libbpf(libbpf("trixie"))),
            Row("libbpf of Debian unstable, built from source", lambda: run_libbpf(libbpf("sid"))),
            Row("musl 1.2.3 and busybox userland, nothing else, / and /tmp read-only", lambda: run_musl("")),
            Row("musl 1.2.6 and busybox userland, newest grpcio and protobuf",
                lambda: run_musl("libc.so", ["grpcio", "protobuf"]), expects_grpc=True),
            *python_rows()]


class Cells(NamedTuple):
    """What is shown of a row's output."""

    kernel: str
    python: str
    libbpf: str
    grpc: str
    instructions: int
    load: str
    checks: str


def cells(output: str) -> Cells:
    def found(pattern, otherwise="-"):
        match = re.search(pattern, output, re.M)
        return match[1] if match else otherwise

    failed = re.findall(r"^(?:FAILED|ERROR) \S*?::(\S+)|^FAIL (?!live check)([^:\n]*)|^(SKIPPED|Fatal Python error)", output, re.M)
    passed = len(re.findall(r"^pass (?!live check)", output, re.M))
    tests = sum(map(int, re.findall(r"(\d+) passed", output)))
    refused = found(r"^pass refused: exit 3, traceleft: (.*?)(?:; '|$)", found(r"^traceleft: (Python .*?)(?:, as in|$)", ""))
    refused += found(r"^(script .*)", "") and f" ({found(r'^(script .*)')})"
    return Cells(found(r"^(\d+\.\d+\S* \w+) Python"), found(r"^\d+\.\d+\S* \w+ Python (\S+)"), found(r"^  ok +libbpf +([\d.]+)"),
                 found(r"protobuf (\S+, grpcio [\d.]+)").replace("grpcio ", ""), int(found(r"^figure instructions (\d+)", "0")),
                 found(r"^figure load ([\d.]+)"), refused or f"{passed} checks" + (f", {tests} tests" if tests else "")
                 + "".join(f", FAILED {''.join(name)}" for name in failed))


def format_row(row: Row, result: Result, seconds: float) -> str:
    shown = cells(result.output)
    figures = f"{shown.instructions:,} | {shown.load} s" if shown.instructions else "- | -"
    return (f"| {'yes' if result.passed else '**NO**'} | {row.name} | {shown.kernel} | {shown.python} | {shown.libbpf} | "
            f"{shown.grpc} | {figures} | {shown.checks} | {seconds:.0f} s | {commit(result.output)} |")


def commit(output: str) -> str:
    """The commit that the output names, that of the checkout where it does not; `-dirty` when files were changed."""
    match = re.search(r"commit ([0-9a-f]{12}(-dirty)?)", output)
    return match[1] if match else check_call(
        ["git", "-C", HERE, "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]).strip()


def is_of_this_object(line: str) -> bool:
    """Whether a row of the table was run with the BPF object that is committed now, or with none."""
    _, found, _, _, _, _, _, instructions, *_, made_of, _ = line.split("|")
    if instructions.strip() == "-" or "**NO**" in found:
        return True
    name = "bpf/traceleft.bpf.o"
    now, then = (subprocess.run(["git", "-C", HERE, "rev-parse", f"{made}:{name}"], capture_output=True, text=True).stdout
                 for made in ("HEAD", made_of.strip().partition("-")[0]))
    return now == then


HEADER = """| works | row | kernel | Python | libbpf | protobuf, grpcio | instructions verified | load | what was seen | took | commit |
| --- | --- | --- | --- | --- | --- | ---: | ---: | --- | ---: | --- |"""


def judge(row: Row, result: Result) -> Result:
    """Red, too, when the verifier comes near its limit, and when a check that the row is about did not run."""
    shown = cells(result.output)
    if shown.instructions > MANY:
        return Result(False, result.output + f"\nFAIL {shown.instructions} instructions verified: the limit is 1,000,000\n")
    if row.expects_grpc and shown.grpc == "-":
        return Result(False, result.output + "\nFAIL the grpc check did not run\n")
    return result


def run_row(row: Row, renew: bool):
    begin = time.monotonic()
    try:
        result = judge(row, row.run())
    except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:
        result = Result(False, f"{error}\n")
    line = format_row(row, result, time.monotonic() - begin)
    print(line + ("" if result.passed else f"\n{result.output}"), flush=True)
    if renew:
        with results_lock:
            renew_results({row.name: line})
    return result.passed


def renew_results(lines: Dict[str, str]) -> None:
    """Puts the lines, by the names of their rows, in place of those that bench/PORTABILITY.md has; the others stay."""
    before = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    kept = {line.split(" | ")[1]: line for line in before if line.startswith(("| yes", "| **NO**"))}
    kept.update(lines)
    known = [row.name for row in all_rows()]
    names = [name for name in known if name in kept] + [name for name in kept if name not in known]
    RESULTS.write_text(f"""# Where it works

Written by `make portability`, on a machine with {os.cpu_count()} CPUs, Linux {platform.release()}. The rows of amd64 and arm64 ran
under qemu without KVM, whose times are 10 to 30 times those of a real machine; protobuf and grpcio are not in them. The
verifier's limit is 1,000,000 instructions; the largest program's count is shown.

{HEADER}
""" + "".join(f"{kept[name]}\n" for name in names))
    old = [name for name in names if not is_of_this_object(kept[name])]
    if old:
        print(f"of another BPF object than the committed one, and to be run again: {'; '.join(old)}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--ci", action="store_true")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    CACHE.mkdir(parents=True, exist_ok=True)
    rows = [row for row in all_rows() if (row.in_ci or not options.ci)
            and (not options.names or any(name in row.name for name in options.names))]
    if options.list:
        print("\n".join(row.name for row in rows))
        return 0
    if not rows:
        sys.exit("portability: no such row")
    built = check_call([sys.executable, BENCH / "dist.py", dist])
    print(f"{built}{HEADER}", flush=True)
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda row: run_row(row, not options.ci), rows))
    passed = sum(done)
    print(f"{passed} passed, {len(done) - passed} failed")
    return 0 if passed == len(done) else 1


if __name__ == "__main__":
    sys.exit(main())
