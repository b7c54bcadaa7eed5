"""Tests of traceleft.py, one class per section, in its order. Live tests trace this machine's kernel, as root."""

from __future__ import annotations

import ast
import binascii
import collections
import contextlib
import copy
import ctypes
import datetime
import errno
import fcntl
import functools
import http.server
import hashlib
import importlib
import itertools
import json
import mmap
import os
import platform
import pty
import random
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import zipfile
import urllib.parse
import urllib.request
from concurrent import futures
from pathlib import Path
from typing import NamedTuple

os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"  # its handlers abort, now and then, a child that Python 3.9's subprocess forks
import grpc
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import traceleft
from traceleft import EVENT_TYPES, Aggregator, RuleError, SpecError, make_event, parse_rule, parse_spec

HERE = Path(__file__).resolve().parent
SCRIPT = HERE / "traceleft.py"
DEADLINE = 30.0  # seconds that anything may take before it counts as hanging
CLEAN_ENVIRONMENT = {**os.environ}  # before any test changes it
del CLEAN_ENVIRONMENT["GRPC_ENABLE_FORK_SUPPORT"]
EXAMPLES = sorted(path for path in (HERE / "spec").glob("*.json") if not path.name.endswith(".schema.json"))

live = [pytest.mark.live,
        pytest.mark.skipif(os.geteuid() != 0 and os.environ.get("TRACELEFT_LIVE") != "1",
                           reason="needs root; TRACELEFT_LIVE=1 runs it all the same")]


# ----------------------------------------------------------------------------------------------------------------------
# Verbs
# ----------------------------------------------------------------------------------------------------------------------

OPEN = EVENT_TYPES["open"]


def an_open(filename="/tmp/a.txt", flags=577, mode=438, **fields):
    return make_event("open", filename, flags, mode, **fields)


def matches(rule, event):
    tree = parse_rule(rule, event.type)
    return tree is None or tree.matcher()(event)


def a_spec(rule="", parameters="frequency=1", format="json", name="open", channel=None, function="sigma", **more):
    return {"channels": [channel or {"id": "1", "type": "file", "path": "/nonexistent/log"}],
            "events": [{"name": name, "channel": "1", "stream": "s", "group": "g", "rule": rule,
                        "function": {"id": function, "parameters": parameters},
                        "output": {"metrics": "alerts_per_sec", "format": format}, **more}]}


def errors_of(value):
    with pytest.raises(SpecError) as caught:
        parse_spec(value)
    return caught.value.errors


class ListChannel:
    """Keeps what it is sent."""

    def __init__(self):
        self.alerts = []

    def send(self, alert):
        self.alerts.append(alert)


def wait_until(condition, what, timeout=DEADLINE):
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError(f"not within {timeout} s: {what}")


def run(*arguments, prefix=(), script=SCRIPT, python=sys.executable, env=None, timeout=DEADLINE, **more):
    """The finished process of one command of traceleft.py."""
    return subprocess.run([*map(str, prefix), python, str(script), *map(str, arguments)], capture_output=True,
                          text=True, timeout=timeout, env={**CLEAN_ENVIRONMENT, **(env or {})}, **more)


class Agent:
    """traceleft.py in the background, ready when the constructor returns; a context manager that ends it."""

    def __init__(self, *arguments, prefix=(), script=SCRIPT, python=sys.executable, stdout=subprocess.PIPE, env=None):
        self.process = subprocess.Popen([*map(str, prefix), python, str(script), *map(str, arguments)],
                                        stdout=stdout, stderr=subprocess.PIPE, text=True,
                                        env={**CLEAN_ENVIRONMENT, **(env or {})})
        self.stderr = []
        self.reader = threading.Thread(target=self.read_stderr)
        self.reader.start()
        try:
            wait_until(lambda: self.ready or self.process.poll() is not None, "traceleft: ready")
            assert self.ready, self.stderr
        except BaseException:
            self.process.kill()
            raise

    def read_stderr(self):
        for line in self.process.stderr:
            self.stderr.append(line.rstrip("\n"))

    @property
    def ready(self):
        return any(line.startswith("traceleft: ready") for line in self.stderr)

    def stop(self, number=signal.SIGINT):
        """Ends it as a user would; returns (exit code, stdout)."""
        self.process.send_signal(number)
        return self.finish()

    def finish(self):
        output = self.process.stdout.read() if self.process.stdout else None
        code = self.process.wait(DEADLINE)
        self.reader.join(DEADLINE)
        return code, output

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()
        self.reader.join(DEADLINE)
        self.process.stderr.close()


def write_spec(path, value):
    path.write_text(json.dumps(value))
    return path


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    """The C programs below, compiled: name -> path."""
    folder = tmp_path_factory.mktemp("programs")
    for name, source in C_PROGRAMS.items():
        subprocess.run(["gcc", "-O2", "-Wall", "-o", folder / name, "-x", "c", "-"], input=source, text=True, check=True)
    return {name: str(folder / name) for name in C_PROGRAMS}


C_PROGRAMS = {
    # opens a file N times: opens PATH N
    "opens": r"""
        #include <fcntl.h>
        #include <stdlib.h>
        #include <unistd.h>
        int main(int argc, char **argv)
        {
            for (long n = atol(argv[2]); n > 0; n--) {
                int fd = open(argv[1], O_WRONLY | O_CREAT | O_TRUNC, 0666);
                if (fd < 0)
                    return 1;
                close(fd);
            }
            return 0;
        }
    """,
    # waits for its standard input to end, then makes N processes, children and theirs, that open a file each: forks PATH N
    "forks": r"""
        #include <fcntl.h>
        #include <stdlib.h>
        #include <sys/prctl.h>
        #include <sys/wait.h>
        #include <unistd.h>
        int main(int argc, char **argv)
        {
            char byte;
            prctl(PR_SET_CHILD_SUBREAPER, 1);  /* wait() waits for orphans as well */
            while (read(0, &byte, 1) > 0)
                ;
            for (long left = atol(argv[2]); left > 0; left -= 2) {
                pid_t child = fork();
                if (child == 0) {
                    fork();
                    _exit(open(argv[1], O_WRONLY | O_CREAT, 0666) < 0);
                }
                if (child < 0 || left % 100 == 0)
                    while (wait(0) > 0)
                        ;
                if (child < 0)
                    left += 2;
            }
            while (wait(0) > 0)
                ;
            return 0;
        }
    """,
    # waits for its standard input to end, then makes each call once, in an empty directory: calls DIRECTORY
    "calls": r"""
        #define _GNU_SOURCE
        #include <fcntl.h>
        #include <linux/openat2.h>
        #include <string.h>
        #include <sys/stat.h>
        #include <sys/syscall.h>
        #include <unistd.h>
        int main(int argc, char **argv)
        {
            char buffer[300], big[300];
            struct open_how how = { .flags = O_RDONLY | O_CLOEXEC, .resolve = RESOLVE_NO_MAGICLINKS };
            memset(big, 'x', sizeof(big));
            if (chdir(argv[1]))
                return 1;
            while (read(0, buffer, 1) > 0)
                ;
            int fd = open("file", O_RDWR | O_CREAT, 0640);         /* 3 */
            int created = creat("created", 0600);                  /* 4 */
            int directory = open(".", O_RDONLY | O_DIRECTORY);     /* 5 */
            syscall(SYS_openat2, directory, "file", &how, sizeof(how)); /* 6 */
            open("missing", O_RDONLY);
            open("", O_RDONLY);
            open((char *)8, O_RDONLY);
            write(fd, "hello\n", 6);
            write(created, big, sizeof(big));
            write(-1, "lost", 4);
            lseek(fd, 0, SEEK_SET);
            read(fd, buffer, sizeof(buffer));
            read(fd, buffer, sizeof(buffer));
            mkdir("directory", 0750);
            mkdirat(directory, "other", 0700);
            mkdirat(AT_FDCWD, "directory", 0700);
            chmod("file", 04755);
            fchmod(fd, 0600);
            fchmodat(directory, "file", 0644, 0);
            chown("file", 1, 2);
            fchown(fd, 3, -1);
            fchownat(directory, "file", 5, 6, AT_SYMLINK_NOFOLLOW);
            close(fd);
            close(-1);
            return 0;
        }
    """,
    # opens what its shared name says while a thread changes it: race NAME OTHER HOW MODE; prints how many opens were of NAME
    "race": r"""
        #define _GNU_SOURCE
        #include <fcntl.h>
        #include <pthread.h>
        #include <stdio.h>
        #include <string.h>
        #include <sys/mman.h>
        #include <sys/stat.h>
        #include <unistd.h>
        static char *page;
        static char **names;
        static volatile int over;
        static void *flip(void *unused)
        {
            for (int i = 0; !over; i++)
                strcpy(page, names[1 + i % 2]);
            return unused;
        }
        static void *hide(void *unused)
        {
            while (!over) {
                mprotect(page, 4096, PROT_NONE);
                mprotect(page, 4096, PROT_READ | PROT_WRITE);
            }
            return unused;
        }
        int main(int argc, char **argv)
        {
            struct stat wanted, found;
            pthread_t thread;
            int count = 0;
            names = argv;
            page = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            strcpy(page, argv[1]);
            if (stat(argv[1], &wanted) || pthread_create(&thread, 0, argv[3][0] == 'f' ? flip : hide, 0))
                return 1;
            for (int i = 0; i < 20000; i++) {
                int fd = open(page, O_RDONLY);
                if (fd < 0)
                    continue;
                count += !fstat(fd, &found) && found.st_ino == wanted.st_ino;
                close(fd);
            }
            over = 1;
            pthread_join(thread, 0);
            printf("%d", count);
            return 0;
        }
    """,
    # system calls of the 32-bit table, whose numbers mean others in the 64-bit one: compat NAME
    "compat": r"""
        #include <string.h>
        #include <sys/mman.h>
        int main(int argc, char **argv)
        {
            long ret = -1;
        #ifdef __x86_64__
            char *low = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);
            strcpy(low, argv[1]);
            asm volatile("int $0x80" : "=a"(ret) : "a"(5L), "b"(low), "c"(0L), "d"(0L) : "memory");  /* open; fstat */
            asm volatile("int $0x80" : "=a"(ret) : "a"(83L), "b"(low), "c"(low), "d"(0L) : "memory"); /* symlink; mkdir */
        #endif
            return ret != 0;
        }
    """,
    # opens a file by io_uring alone: uring NAME
    "uring": r"""
        #define _GNU_SOURCE
        #include <fcntl.h>
        #include <linux/io_uring.h>
        #include <sys/mman.h>
        #include <sys/syscall.h>
        #include <unistd.h>
        int main(int argc, char **argv)
        {
            struct io_uring_params p = {};
            int fd = syscall(SYS_io_uring_setup, 4, &p);
            char *ring = mmap(0, 65536, PROT_READ | PROT_WRITE, MAP_SHARED, fd, IORING_OFF_SQ_RING);
            char *done = mmap(0, 65536, PROT_READ | PROT_WRITE, MAP_SHARED, fd, IORING_OFF_CQ_RING);
            struct io_uring_sqe *sqe = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, IORING_OFF_SQES);
            if (fd < 0 || ring == MAP_FAILED || done == MAP_FAILED || sqe == MAP_FAILED)
                return 1;
            sqe->opcode = IORING_OP_OPENAT;
            sqe->fd = AT_FDCWD;
            sqe->addr = (unsigned long)argv[1];
            *(unsigned *)(ring + p.sq_off.array) = 0;
            ++*(volatile unsigned *)(ring + p.sq_off.tail);
            if (syscall(SYS_io_uring_enter, fd, 1, 1, IORING_ENTER_GETEVENTS, 0, 0) != 1)
                return 2;
            return ((struct io_uring_cqe *)(done + p.cq_off.cqes))->res < 0 ? 3 : 0;
        }
    """,
    # a process with the same table of descriptors: shared NAME; the child opens it, the parent writes to it and closes it
    "shared": r"""
        #define _GNU_SOURCE
        #include <fcntl.h>
        #include <sched.h>
        #include <signal.h>
        #include <sys/syscall.h>
        #include <sys/wait.h>
        #include <unistd.h>
        int main(int argc, char **argv)
        {
            if (!syscall(SYS_clone, CLONE_FILES | SIGCHLD, 0, 0, 0, 0))
                _exit(open(argv[1], O_WRONLY | O_CREAT, 0600));
            int fd;
            wait(&fd);
            write(WEXITSTATUS(fd), "x", 1);
            return close(WEXITSTATUS(fd));
        }
    """,
}


# ----------------------------------------------------------------------------------------------------------------------


class TestImport:
    def test_needs_neither_libbpf_nor_grpc(self):
        code = ("import sys, ctypes\nctypes.CDLL = None\nimport traceleft\n"
                "assert not {'grpc', 'google.protobuf'} & set(sys.modules)")
        subprocess.run([sys.executable, "-c", code], check=True, cwd=HERE)

    def test_old_pythons_get_as_far_as_the_line_that_refuses_them(self):
        """As far as this Python can tell; a row of `make portability` runs each of them."""
        tree = ast.parse(SCRIPT.read_text(), feature_version=(3, 7))
        position = [isinstance(node, ast.If) for node in tree.body].index(True)
        assert ast.unparse(tree.body[position].test) == "sys.version_info < (3, 9)"
        assert [ast.unparse(node) for node in tree.body[1:position]] == ["import os", "import sys"]

    def test_runs_as_a_copy_without_its_folder(self, tmp_path):
        copy = shutil.copy(SCRIPT, tmp_path)
        assert run("check", HERE / "spec/aggregator-spec.json", script=copy).returncode == 0
        assert "copy the folder bpf/" in run("trace", "open", script=copy, prefix=()).stderr


@pytest.fixture(scope="session")
def dist(tmp_path_factory):
    """The one file that make dist makes."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, HERE / "bench/dist.py", folder], check=True, stdout=subprocess.DEVNULL)
    return folder / "traceleft"


class TestDist:
    """`make dist`."""

    def test_the_same_bytes_each_time(self, dist, tmp_path):
        subprocess.run([sys.executable, "-X", "utf8", HERE / "bench/dist.py", tmp_path], check=True, umask=0o077,
                       env={**CLEAN_ENVIRONMENT, "TZ": "Asia/Tokyo"}, stdout=subprocess.DEVNULL)
        assert (tmp_path / "traceleft").read_bytes() == dist.read_bytes()
        assert (tmp_path / "traceleft").stat().st_mode & 0o777 == 0o755

    def test_is_small_and_has_its_digest_beside_it(self, dist):
        assert dist.stat().st_size < 200 << 10
        subprocess.run(["sha256sum", "-c", "--quiet", "traceleft.sha256"], cwd=dist.parent, check=True)

    def test_runs_alone_by_any_path(self, dist, tmp_path):
        copy = Path(shutil.copy(dist, tmp_path / "tl"))
        (tmp_path / "link").symlink_to(copy)
        shown = {subprocess.run([path, "--version"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
                 for path in ("./tl", copy, tmp_path / "link")}
        assert shown == {run("--version").stdout}

    @pytest.mark.parametrize("closed, said", [(">&-", True), ("2>&-", False), ("<&- >&- 2>&-", False)])
    def test_closed_streams(self, dist, closed, said):
        done = subprocess.run(["sh", "-c", f"{sys.executable} {dist} check nope {closed}"], capture_output=True, text=True)
        assert (done.returncode, done.stdout, "nope: cannot read" in done.stderr) == (2, "", said)

    def test_is_a_library_too(self, dist):
        code = "import traceleft; print(len(traceleft.object_bytes()))"
        done = subprocess.run([sys.executable, "-c", code], env={**CLEAN_ENVIRONMENT, "PYTHONPATH": str(dist)}, cwd=dist.parent,
                              capture_output=True, text=True, check=True)
        assert int(done.stdout) == traceleft.OBJECT_PATH.stat().st_size

    @pytest.mark.parametrize("module", ["zlib", "termios", "_ctypes"])
    def test_a_python_without_a_part_of_its_library(self, dist, tmp_path, module):
        (tmp_path / "sitecustomize.py").write_text(f"import sys; sys.modules[{module!r}] = None")
        for script, said in ((dist, "traceleft: cannot start ("), (SCRIPT, "lacks a part of its standard library, the module " + module)):
            done = run("doctor", script=script, env={"PYTHONPATH": str(tmp_path)})
            assert (done.returncode, done.stderr.count("\n")) == (3, 1) and said in done.stderr  # doctor cannot run either
            assert "apt-get install python3" in done.stderr

    def test_a_damaged_copy(self, dist, tmp_path):
        """Wherever it is: one line that says so, and nothing is run."""
        data = dist.read_bytes()
        info = {info.filename: info for info in zipfile.ZipFile(dist).infolist()}
        for name in ("traceleft.py", f"bpf/{traceleft.OBJECT_PATH.name}.xz"):
            place = info[name].header_offset + info[name].compress_size // 2
            copy = tmp_path / "copy"
            copy.write_bytes(data[:place] + b"XXXX" + data[place + 4:])
            done = run("trace", "open", "--duration", "0.1", script=copy)
            assert (done.returncode, done.stderr.count("\n")) == (3, 1)
            assert "damaged" in done.stderr and "compare its SHA-256" in done.stderr

    def test_a_python_without_lzma(self, dist, tmp_path):
        (tmp_path / "lzma.py").write_text("raise ImportError")
        done = run("check", HERE / "spec/aggregator-spec.json", script=dist, env={"PYTHONPATH": str(tmp_path)})
        assert done.returncode == 0
        assert run("--version", script=dist, env={"PYTHONPATH": str(tmp_path)}).stdout.endswith(" object missing\n")


class TestCompanion:
    """The object goes into the kernel: nobody may have changed it who cannot change the script."""

    @pytest.fixture
    def companion(self, tmp_path, monkeypatch):
        """A script and an object in a folder of its own, as user 1000's checkout."""
        for name in ("script", "bpf/object"):
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(name)
            for changed in (path, path.parent):
                os.chown(changed, 1000, 1000)
        monkeypatch.setattr(traceleft, "__file__", str(tmp_path / "script"))
        return tmp_path / "bpf/object"

    @pytest.mark.skipif(os.geteuid() != 0, reason="gives files away")
    @pytest.mark.parametrize("script, folder, file, refused", [
        # (owner, mode) of each
        ((1000, 0o755), (1000, 0o755), (1000, 0o644), None),
        ((1000, 0o755), (0, 0o755), (0, 0o644), None),
        ((1000, 0o775), (1000, 0o775), (1000, 0o664), None),
        ((0, 0o755), (0, 0o755), (1000, 0o644), "object can be changed by user 1000"),
        ((0, 0o755), (1000, 0o755), (0, 0o644), "bpf can be changed by user 1000"),
        ((1000, 0o755), (1001, 0o755), (1000, 0o644), "bpf can be changed by user 1001"),
        ((1000, 0o755), (1000, 0o755), (1000, 0o664), "object can be changed by group 1000"),
        ((1000, 0o755), (1000, 0o755), (1000, 0o646), "object can be changed by everybody"),
        ((1000, 0o755), (1000, 0o757), (1000, 0o644), "bpf can be changed by everybody"),
        ((1000, 0o757), (1000, 0o757), (1000, 0o644), "bpf can be changed by everybody"),
        ((0, 0o755), (1000, 0o777), (0, 0o644), "bpf can be changed by everybody and group 1000 and user 1000"),
    ])
    def test_who_may_have_changed_it(self, companion, script, folder, file, refused):
        for path, (owner, mode) in ((Path(traceleft.__file__), script), (companion.parent, folder), (companion, file)):
            os.chown(path, owner, 1000)
            path.chmod(mode)
        if refused is None:
            assert traceleft.read_companion(companion) == b"bpf/object"
        else:
            with pytest.raises(traceleft.HostError, match=f"{refused}, .*chown root and chmod go-w"):
                traceleft.read_companion(companion)

    @pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
    def test_what_is_no_file(self, companion, make):
        companion.unlink()
        make(companion)
        with pytest.raises(OSError, match="regular file|directory"):
            traceleft.read_companion(companion)

    def test_modules_beside_the_script_and_in_the_current_directory_are_not_loaded(self, tmp_path):
        copy = shutil.copy(SCRIPT, tmp_path)
        for name in ("json", "signal", "argparse", "pwd", "traceleft"):
            (tmp_path / f"{name}.py").write_text("raise SystemExit(77)")
        (tmp_path / "traceleft.py").write_bytes(SCRIPT.read_bytes())
        for script in (copy, SCRIPT):
            assert run("events", "open", script=script, cwd=tmp_path).returncode == 0


class TestEventTable:
    def test_has_the_contracts_rows(self):
        connection = ["saddr", "daddr", "sport", "dport", "netns"]
        named = {name: [argument.name for argument in EVENT_TYPES[name].arguments] for name in list(EVENT_TYPES)[:18]}
        assert named == {
            **{f"{kind}_{family}": connection for kind in ("connect", "accept", "close") for family in ("v4", "v6")},
            "open": ["filename", "flags", "mode"], "close": ["fd"], "read": ["fd", "buf", "count"],
            "write": ["fd", "buf", "count"], "mkdir": ["pathname", "mode"], "mkdirat": ["dfd", "pathname", "mode"],
            "chmod": ["filename", "mode"], "fchmod": ["fd", "mode"], "fchmodat": ["dfd", "filename", "mode"],
            "chown": ["filename", "user", "group"], "fchown": ["fd", "user", "group"],
            "fchownat": ["dfd", "filename", "user", "group", "flag"]}

    @pytest.mark.parametrize("machine, event, names", [
        ("x86_64", "open", ["open", "creat", "openat", "openat2"]),
        ("aarch64", "open", ["openat", "openat2"]),
        ("x86_64", "mkdir", ["mkdir"]),
        ("aarch64", "mkdir", ["mkdirat"]),
        ("aarch64", "chmod", ["fchmodat"]),
        ("aarch64", "chown", ["fchownat"]),
        ("aarch64", "mkdirat", ["mkdirat"]),
        ("x86_64", "rename", ["rename"]),
        ("aarch64", "rename", ["renameat", "renameat2"]),
        ("aarch64", "rmdir", ["unlinkat"]),
        ("x86_64", "fork", ["fork", "clone"]),
        ("aarch64", "fork", ["clone"]),
        ("aarch64", "dup2", ["dup3"]),
        ("x86_64", "fchmodat", ["fchmodat", "fchmodat2"]),
        ("x86_64", "mknod", ["mknod", "mknodat"]),
        ("aarch64", "mknod", ["mknodat"]),
    ])
    def test_a_name_covers_what_libc_calls_on_an_architecture(self, monkeypatch, machine, event, names):
        monkeypatch.setattr(platform, "machine", lambda: machine)
        assert [syscall.name for syscall in traceleft.syscalls_here(EVENT_TYPES[event])] == names

    @pytest.mark.parametrize("event, index, only_fdcwd, path, condition", [
        # path: enum path_kind, argument, register of the directory (255: the current one)
        ("mkdir", 0, 0, (traceleft.PATH_AT, 0, 255), (6, 0)), ("mkdir", 1, 1, (traceleft.PATH_AT, 0, 255), (6, 0)),
        ("mkdirat", 0, 0, (traceleft.PATH_AT, 1, 0), (6, 0)), ("open", 0, 0, (traceleft.PATH_RETURN, 0, 255), (6, 0)),
        ("open", 2, 0, (traceleft.PATH_RETURN, 0, 0), (6, 0)), ("read", 0, 0, (traceleft.PATH_FD, 0, 255), (6, 0)),
        ("rename", 2, 5, (traceleft.PATH_AT, 0, 255), (4, 0)), ("rmdir", 1, 1, (traceleft.PATH_AT, 0, 255), (2, 512)),
        ("execveat", 0, 0, (traceleft.PATH_EXE, 1, 0), (6, 0)), ("symlinkat", 0, 0, (traceleft.PATH_AT, 2, 1), (6, 0)),
        ("exit_group", 0, 0, (traceleft.PATH_NONE, 0, 255), (6, 0)), ("mmap", 0, 0, (traceleft.PATH_FD, 4, 255), (6, 0)),
    ])
    def test_sources(self, event, index, only_fdcwd, path, condition):
        kind = EVENT_TYPES[event]
        packed = traceleft.Source(kind, kind.syscalls[index], traceleft.Wanted(any_process=True)).pack()
        _, _, fdcwd, *path_source, _, register, value, _ = traceleft.SOURCE.unpack_from(packed)
        assert (fdcwd, tuple(path_source), (register, value)) == (only_fdcwd, path, condition)

    def test_numbers_are_this_kernels(self):
        header = Path(f"/usr/include/{platform.machine()}-linux-gnu/asm/unistd_64.h").read_text()
        numbers = {name: int(number) for name, number in re.findall(r"#define __NR_(\w+)\s+(\d+)", header)}
        mine = {name: traceleft.syscall_number(name) for name in traceleft.SYSCALL_NUMBERS}
        assert len(numbers) > 300
        assert not {name: number for name, number in mine.items() if number is not None and numbers.get(name, number) != number}
        assert all(syscall.name in traceleft.SYSCALL_NUMBERS for kind in EVENT_TYPES.values() for syscall in kind.syscalls)

    @pytest.mark.parametrize("c_type, name, argument", [
        ("int ", "dfd", "dfd:dfd"), ("int ", "olddfd", "olddfd:dfd"), ("unsigned int ", "fd", "fd:fd"), ("int ", "epfd", "epfd:fd"),
        ("const char * ", "pathname", "pathname:path"), ("const char * ", "name", "name:string"), ("char * ", "buf", "buf:address"),
        ("struct stat * ", "statbuf", "statbuf:address"), ("const clockid_t ", "which_clock", "which_clock:int"),
        ("umode_t ", "mode", "mode:mode"), ("something_new ", "x", "x:ulong"), ("size_t ", "len", "len:size")])
    def test_types_from_tracefs(self, c_type, name, argument):
        assert traceleft.format_argument(c_type, name) == argument


class TestEvents:
    def test_prints_as_the_contract_says(self):
        event = an_open(ret=3, pid=4242)
        assert traceleft.format_event(event) == (
            f"name open pid 4242 program id 0 return value 3 hash {event.hash} "
            'Filename "/tmp/a.txt" Flags 577 Mode 438')

    @pytest.mark.parametrize("changes, text", [
        ({}, 'Fd 3<unknown> Buf "p" Count 1'),
        ({"path": "/proc/cpuinfo"}, 'Fd 3</proc/cpuinfo> Buf "p" Count 1'),
        ({"files": ("/proc/cpuinfo", "")}, 'Fd 3</proc/cpuinfo> Buf "p" Count 1'),
        ({"path": "/tmp/a>\nname open"}, r'Fd 3</tmp/a\x3e\nname open> Buf "p" Count 1'),
        ({"incomplete": 2}, 'Fd 3<unknown> Buf "p" [incomplete] Count 1'),
        ({"in_container": True}, 'Fd 3<unknown> Buf "p" Count 1 [container]'),
    ])
    def test_marks(self, changes, text):
        event = make_event("read", 3, "p", 1, **changes)
        assert traceleft.format_event(event).endswith(text)

    @pytest.mark.parametrize("text, shown", [
        ("a b", "a b"), ("é", "é"), ('"', '\\"'), ("\\", "\\\\"), ("\n", "\\n"), ("\x1b[2J", "\\x1b[2J"),
        ("\udcff", "\\xff"), ("\u202e", "\\u202e"), ("\x85", "\\u0085"), ("\U000e0001", "\\U000e0001"), ("\x7f", "\\x7f"),
    ])
    def test_escapes(self, text, shown):
        assert traceleft.escape(text) == shown

    @given(st.binary(max_size=50))
    def test_no_bytes_can_forge_a_line_or_leave_the_quotes(self, data):
        shown = traceleft.escape(traceleft.decode_text(data))
        assert shown.isprintable()
        assert not re.search(r'(?<!\\)(?:\\\\)*"', shown)

    def test_hash_is_the_same_in_every_run_and_on_every_host(self):
        assert an_open(ret=3, pid=4242).hash == 2326600242661130584

    @pytest.mark.parametrize("change", [
        {"ret": 4}, {"pid": 2}, {"program_id": 1}, {"filename": "/tmp/b.txt"}, {"flags": 0}, {"mode": 0}])
    def test_hash_covers(self, change):
        assert an_open(**change).hash != an_open().hash

    @pytest.mark.parametrize("change", [{"tid": 9}, {"timestamp_ns": 5}, {"comm": "x"}, {"path": "/x"}, {"uid": 1}])
    def test_hash_leaves_out(self, change):
        assert an_open(**change).hash == an_open().hash

    def test_hash_leaves_out_buffers(self):
        assert make_event("read", 3, "a", 1).hash == make_event("read", 3, "b", 1).hash
        assert make_event("read", 3, "a", 1).hash != make_event("write", 3, "a", 1).hash

    def record(self, name, args, texts=b"", flags=0, version=traceleft.RECORD_VERSION, path=0, files=(0, 0)):
        slots = [*args, *[0] * 8][:8]
        return traceleft.HEADER.pack(1000, -2, 7, *slots, path, 0, 0, *files, 10, 11, 12, 13, 14, 15, 16, 17, 18,
                                     traceleft.EVENT_IDS[name], flags, 0, version, 0, 0, b"sh\0junk") + texts

    def test_decodes_a_record(self):
        record = self.record("mkdirat", [2**64 - 100, 4 | 2 << 32, 0o755], b"..a\xff\nb/t/a\xff", 1 | traceleft.FLAG_CONTAINER |
                             traceleft.FLAG_PATH_UNRESOLVED, path=5 | 6 << 32, files=(2 | 6 << 32, 0))
        assert traceleft.decode_record(record, 500) == make_event(
            "mkdirat", -100, "a\udcff\nb", 0o755, ret=-2, timestamp_ns=1500, pid=10, tid=11, ppid=12, uid=13, gid=14, euid=15,
            mntns=16, netns=17, pidns=18, comm="sh", program_id=7, incomplete=1, in_container=True, path="/t/a\udcff",
            path_unresolved=True, files=("/t", ""))

    @given(st.data())
    def test_one_step_from_record_to_line_says_the_same(self, data):
        """format_record() is the hot path of what format_event(decode_record()) says in two readable steps."""
        name = data.draw(st.sampled_from(traceleft.EVENT_NAMES))
        texts, slots = b"", []
        for argument in traceleft.EVENT_TYPES[name].arguments:
            if argument.is_text:
                text = data.draw(st.binary(max_size=20))
                slots.append(len(text) | len(texts) << 32)
                texts += text
            else:
                most = 2**(argument.type.address_bits or 64) - 1
                slots += [data.draw(st.integers(0, min(most, 2**64 - 1))) for _ in range(2 if argument.type.bits > 64 else 1)]
        files = [0, 0]
        for i in range(data.draw(st.integers(0, 2))):
            files[i] = 3 | len(texts) << 32
            texts += data.draw(st.binary(min_size=3, max_size=3))
        flags = data.draw(st.sampled_from([0, 0, 0, 1, 2, traceleft.FLAG_CONTAINER, traceleft.FLAG_PATH_UNRESOLVED]))
        record = self.record(name, slots, texts, flags, files=files)
        assert traceleft.format_record(record) == traceleft.format_event(traceleft.decode_record(record))

    def test_decodes_a_connection(self):
        event = traceleft.decode_record(self.record("connect_v6", [0, 1, 0x20010DB8 << 32, 5, 1234, 443, 17]))
        assert event.named_args == {"saddr": "::1", "daddr": "2001:db8::5", "sport": 1234, "dport": 443, "netns": 17}
        assert traceleft.format_args(event) == "Saddr ::1 Daddr 2001:db8::5 Sport 1234 Dport 443 Netns 17"
        assert event.args == make_event("connect_v6", "::1", "2001:db8::5", 1234, 443, 17).args

    @pytest.mark.parametrize("data, shown", [
        (struct.pack("=H", 2) + b"\x01\xbb\x7f\0\0\1" + bytes(8), "127.0.0.1:443"),
        (struct.pack("=H", 10) + b"\0\x16" + bytes(4) + bytes(15) + b"\1" + bytes(4), "[::1]:22"),
        (struct.pack("=H", 1) + b"/run/x\0junk", "/run/x"), (struct.pack("=H", 1) + b"\0abc", "@abc"),
        (struct.pack("=H", 16) + bytes(10), "family 16"), (struct.pack("=H", 2) + b"\0", "family 2"), (b"", ""), (b"\2", "")])
    def test_decodes_a_socket_address(self, data, shown):
        assert traceleft.decode_sockaddr(data) == shown

    @pytest.mark.parametrize("cgroup, container", [
        ("/", ""), ("/user.slice/x.scope", ""), (f"/docker/{'ab' * 32}", "ab" * 32),
        (f"/kubepods.slice/pod1.slice/cri-containerd-{'0f' * 32}.scope", "0f" * 32), (f"/machine/libpod-{'1' * 64}.scope/c", "1" * 64)])
    def test_container(self, cgroup, container):
        assert an_open(cgroup=cgroup).container == container

    def test_a_record_of_another_version_is_refused(self):
        with pytest.raises(traceleft.TraceleftError, match="version 99"):
            traceleft.decode_record(self.record("open", [], version=99))

    def test_make_event_refuses_what_is_no_argument(self):
        with pytest.raises(ValueError, match="127.0.0.256"):
            make_event("connect_v4", "127.0.0.256")
        with pytest.raises(TypeError):
            make_event("close", 1, 2)
        with pytest.raises(TypeError):
            make_event("close", filename="x")


class TestRules:
    EVENT = an_open("/tmp/\udcff dir/a.txt", 577, 0o644, ret=-2, pid=10, tid=11, ppid=12, uid=0, gid=100, comm="bäsh",
                    program_id=2**64 - 1)

    @pytest.mark.parametrize("rule", [
        # fields and comparisons
        "arg1 == '/tmp/\\udcff dir/a.txt'", "filename != 'x'", "arg2 == 577", "flags == arg2", "ret < 0", "-3 < ret <= -2",
        "pid == 10 and tid == 11 and ppid == 12", "uid == 0", "gid >= 100", "program_id == 0xffffffffffffffff",
        "comm == 'bäsh'", "comm != filename", "flags > ret", "2 < flags",
        # lists
        "ret in (-2, -13)", "ret in [-ENOENT]", "ret in {-2}", "comm in ('a', 'bäsh')", "uid not in (1, 2)",
        "flags & 3 in (0, 1)",
        # bits and symbols
        "flags & O_CREAT", "not flags & O_APPEND", "flags | 0 == 577", "flags ^ 577 == 0", "~flags == -578",
        "ret == -ENOENT", "flags == O_WRONLY | O_CREAT | O_TRUNC", "mode & S_IRUSR", "not mode & S_ISUID",
        "ret != AT_FDCWD", "AF_INET != ret", "+577 == flags", "flags == ~-578",
        # text
        "startswith(filename, '/tmp/')", "endswith(arg1, '.txt')", "contains(filename, ' dir')", "'dir' in filename",
        "'x' not in comm", "glob(filename, '/tmp/*.txt')", "glob(filename, '/tmp/? dir/[a-c].txt')",
        "regex(filename, '^/tmp/.*\\.txt$')", "regex(comm, 'ä')",
        "'\\udcff' in filename", "'\udcff' in filename",
        # boolean
        "uid == 1 or gid == 100", "not (uid == 1)", "flags", "not uid", "(uid == 1 or gid == 100) and ret",
        "", "   ", "  uid == 0  ", "(uid ==\n 0)",
    ])
    def test_matches(self, rule):
        assert matches(rule, self.EVENT)

    @pytest.mark.parametrize("rule", [
        "arg1 == '/tmp/a.txt'", "ret == ENOENT", "uid", "flags & O_APPEND", "comm in ('a', 'b')", "glob(filename, '*.TXT')",
        "regex(filename, '^a.txt')", "'DIR' in filename", "-1 < ret < 1", "pid == 10 and tid == 10", "comm == 'b\\xe4s'",
    ])
    def test_does_not_match(self, rule):
        assert not matches(rule, self.EVENT)

    def test_bytes_that_make_up_a_character_are_that_character(self):
        assert matches("filename == '\\udcc3\\udca9'", an_open("é"))

    @pytest.mark.parametrize("rule, column, message", [
        # syntax of other languages
        ("uid == 0 && gid == 0", 9, "write 'and'"), ("uid || gid", 4, "write 'or'"), ("!uid", 0, "write 'not'"),
        ("uid = 0", 4, "write '=='"), ("comm == '&&' && uid", 13, "write 'and'"), ("uid == ", 6, "syntax error"),
        ("(uid", 0, "syntax error"), ("uid is 0", 7, "write '=='"), ("uid == 0 and", 12, "syntax error"),
        ("uid == 0 or ((gid) in [1]", 12, "'(' was never closed"), ("'é' == (comm pid", 7, "'(' was never closed"),
        ("(uid ==\n 0", 0, "'(' was never closed"), ("uid in [1, (2", 11, "'(' was never closed"), ("uid == 1)", 8, "unmatched ')'"),
        ("comm == 'a' or comm == 'b", 23, "unterminated string"), ('(comm == "a\'', 9, "unterminated string"),
        ("uid gid", 4, "syntax error"), ("uid == 0\nand gid", 9, "syntax error"), ("uid ==", 6, "syntax error"),
        # names
        ("flgs == 1", 0, "did you mean 'flags'"), ("uid == 0 and arg4 == 1", 13, "only 3 arguments"),
        ("ret == -ENOENTT", 8, "did you mean 'ENOENT'"), ("é == 1 or üid == 1", 0, "no field 'é'"),
        ("regx(comm, 'a')", 0, "did you mean 'regex'"), ("regex == 'a'", 0, "is a function"),
        # types
        ("comm == 1", 8, "cannot be compared"), ("1 == comm", 5, "cannot be compared"), ("uid == 'a'", 7, "cannot be"),
        ("uid in ('a', 1)", 8, "cannot be compared"), ("comm in ('a', 1)", 14, "cannot be compared"),
        ("comm & 1", 0, "needs an integer"), ("comm", 0, "is text"), ("not comm", 4, "is text"),
        ("startswith(uid, 'a')", 11, "needs a text field"), ("contains(comm, 1)", 15, "text in quotes"),
        ("comm < 'a'", 0, "needs integers"), ("(uid == 0) == 1", 1, "cannot compare a condition"),
        ("1 in uid", 0, "looks for text"), ("uid in comm", 0, "looks for text"), ("uid in (1)", 8, "is written (1,)"),
        ("comm in 'abc'", 8, "needs a list"), ("-uid == 1", 0, "sign"), ("-comm == 1", 1, "sign"),
        # constants
        ("1", 0, "a constant here"), ("'a'", 0, "a constant here"), ("O_CREAT", 0, "a constant here"),
        ("uid or 1", 7, "a constant here"), ("1 == 1", 0, "two constants"), ("uid == 0 or 'a' == 'b'", 12, "two constants"),
        ("True", 0, "neither an integer nor text"), ("uid == None", 7, "neither"), ("uid == 1.5", 7, "neither"),
        ("comm == b'a'", 8, "neither"), ("uid in ()", 7, "empty list"), ("1 in (1, 2)", 0, "needs a field"),
        ("startswith(comm, '')", 17, "always true"), ("'' in comm", 0, "always true"), ("uid in (1, gid)", 11, "literals"),
        # limits
        ("uid == 18446744073709551616", 7, "64 bits"), ("ret == -9223372036854775809", 7, "64 bits"),
        ("comm == 'a\\0b'", 8, "NUL"), ("comm == '\\ud800'", 8, "surrogate"),
        ("not " * 100 + "uid", 256, "nested too deeply"),
        # what is not part of the language
        ("uid + 1 == 2", 0, "arithmetic"), ("uid << 1", 0, "arithmetic"), ("comm.upper() == 'A'", 0, "not a function"),
        ("comm[0] == 'a'", 0, "Subscript"), ("[x for x in (1,)]", 0, "ListComp"), ("lambda: 1", 0, "Lambda"),
        ("uid if gid else ret", 0, "IfExp"), ("(a := 1)", 1, "NamedExpr"), ("__import__('os')", 0, "not a function"),
        ("f'{uid}' == comm", 0, "JoinedStr"), ("(uid, gid)", 0, "Tuple"), ("regex(comm, 'a', 'b')", 0, "takes a field"),
        ("regex(comm, pattern='b')", 0, "takes a field"),
        # patterns
        ("regex(comm, '(')", 12, "bad pattern"), ("regex(comm, '(a)\\\\1')", 12, "not supported"),
        ("regex(comm, '(?=a)')", 12, "not supported"), ("regex(comm, 'a{1000}')", 12, "too large"),
        ("regex(comm, '(?i)a')", 12, "flags"), ("regex(comm, '\\\\bfoo')", 12, "not supported"),
    ])
    def test_errors_are_located(self, rule, column, message):
        with pytest.raises(RuleError) as caught:
            parse_rule(rule, OPEN)
        assert message in str(caught.value)
        assert caught.value.column == column
        assert caught.value.with_caret().splitlines()[-1] == "  " + " " * column + "^"

    @pytest.mark.parametrize("rule", ["uid == 0\0", "(" * 3000 + "uid" + ")" * 3000, "a" * 70000, "~" * 60000 + "1",
                                      "uid == " + "9" * 5000, "-" * 5000 + "uid", "uid" + " and uid" * 8000 + " +"])
    def test_monsters_get_an_error_too(self, rule):
        with pytest.raises(RuleError):
            parse_rule(rule, OPEN)

    def test_a_long_list_is_fine(self):
        rule = "filename in (" + ", ".join(f"'/data/{i}'" for i in range(4000)) + ")"
        assert matches(rule, an_open("/data/3999"))
        assert not matches(rule, an_open("/data/4000"))


class TestSymbols:
    """What a rule can name has one value for all libcs."""

    def test_where_libcs_differ(self):
        assert traceleft.SYMBOLS["O_ACCMODE"] == os.O_RDONLY | os.O_WRONLY | os.O_RDWR == 3
        assert traceleft.SYMBOLS["O_LARGEFILE"] == {"x86_64": 0o100000, "aarch64": 0o400000}[os.uname().machine]
        rule = "flags & ~(O_LARGEFILE | O_CLOEXEC) == O_RDONLY"
        largefile = traceleft.SYMBOLS["O_LARGEFILE"]
        assert [matches(rule, an_open("/a", flags)) for flags in (0, largefile, largefile | os.O_CLOEXEC, 2, largefile | 2)] \
            == [True, True, True, False, False]

    def test_what_musl_lacks(self, monkeypatch):
        mine = dict(traceleft.SYMBOLS)
        names = ("O_FSYNC", "F_EXLCK", "F_SHLCK", "LOCK_MAND", "LOCK_READ", "LOCK_WRITE", "LOCK_RW", "SIGCLD")
        for name in names:
            for module in (os, fcntl, signal):
                monkeypatch.delattr(module, name, raising=False)
        assert {name: traceleft.symbols()[name] for name in names} == {name: mine[name] for name in names}


class TestRulesGenerated:
    """Rules are Python's own syntax, so Python's own eval() is an independent evaluation of those that are accepted."""

    TEXT_FIELDS = ("filename", "arg1", "comm")
    INT_FIELDS = ("flags", "arg2", "mode", "arg3", "ret", "pid", "tid", "ppid", "uid", "gid", "program_id")
    texts = st.text(st.sampled_from("ab/. é\n'\\\udcff\udc80*?["), max_size=6)
    literals = texts.map(repr)
    numbers = st.one_of(st.integers(-3, 3), st.sampled_from([-2**63, 2**63 - 1, 2**64 - 1, 577])).map(str)
    constants = st.one_of(numbers, st.sampled_from(["O_CREAT", "-ENOENT", "AT_FDCWD"]))
    ints = st.recursive(
        st.one_of(st.sampled_from(INT_FIELDS), constants),
        lambda inner: st.one_of(st.tuples(inner, st.sampled_from("&|^"), inner).map("({0[0]} {0[1]} {0[2]})".format),
                                inner.map("(~{})".format)), max_leaves=4)
    comparisons = st.one_of(
        st.tuples(ints, st.sampled_from(["==", "!=", "<", "<=", ">", ">="]), ints).map(" ".join),
        st.tuples(ints, st.sampled_from(["<", "<="]), ints, st.just("<"), ints).map(" ".join),
        st.tuples(ints, st.sampled_from([" in ", " not in "]), st.lists(constants, min_size=1, max_size=3)).map(
            lambda t: f"{t[0]}{t[1]}[{', '.join(t[2])}]"),
        st.tuples(st.sampled_from(TEXT_FIELDS), st.sampled_from(["==", "!="]), literals).map(" ".join),
        st.tuples(st.sampled_from(TEXT_FIELDS), st.sampled_from([" in ", " not in "]),
                  st.lists(literals, min_size=1, max_size=3)).map(lambda t: f"{t[0]}{t[1]}[{', '.join(t[2])}]"),
        st.tuples(literals, st.sampled_from([" in ", " not in "]), st.sampled_from(TEXT_FIELDS)).map("".join),
        st.tuples(st.sampled_from(["startswith", "endswith", "contains", "glob"]), st.sampled_from(TEXT_FIELDS),
                  literals).map("{0[0]}({0[1]}, {0[2]})".format), ints)
    rules = st.recursive(comparisons, lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from([" and ", " or "]), inner).map("({0[0]}{0[1]}{0[2]})".format),
        inner.map("(not {})".format)), max_leaves=5)
    names = st.one_of(texts.map(lambda t: traceleft.decode_text(traceleft.encode_text(t))), st.sampled_from(["a", "/a"]))
    int64 = st.one_of(st.integers(-3, 3), st.sampled_from([-2**63, 2**63 - 1, 577]))
    events = st.builds(an_open, names, int64, st.integers(0, 2**16 - 1), ret=int64, pid=st.integers(0, 3),
                       uid=st.integers(0, 2**32 - 1), comm=names,
                       program_id=st.sampled_from([0, 1, 2**63, 2**64 - 1]))

    @settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
    @given(rules, events)
    def test_accepted_rules_agree_with_python(self, rule, event):
        try:
            tree = parse_rule(rule, OPEN)
        except RuleError as error:
            assert 0 <= error.column <= len(error.rule)
            return
        fields = {name: getattr(event, name) for name in traceleft.COMMON_FIELDS}
        fields.update(zip(("arg1", "arg2", "arg3"), event.args), **event.named_args)
        functions = {"startswith": str.startswith, "endswith": str.endswith,
                     "contains": lambda text, part: part in text,
                     "glob": lambda text, pattern: importlib.import_module("fnmatch").fnmatchcase(text, pattern)}
        symbols = {"O_CREAT": os.O_CREAT, "ENOENT": 2, "AT_FDCWD": -100}
        normal = re.sub(STRING, lambda m: repr(traceleft.decode_text(traceleft.encode_text(eval(m[0])))), rule)
        assert tree.matcher()(event) == bool(eval(normal, {**fields, **functions, **symbols}))

    @settings(max_examples=1000, deadline=None)
    @given(st.one_of(st.text(max_size=60), st.text("() uidcomfarg=!&|~<>'\"0123,.in not\\", max_size=40)))
    @example("\\\n")
    @example("uid\r== 0")
    def test_any_text_is_accepted_or_gets_a_located_error(self, rule):
        try:
            tree = parse_rule(rule, OPEN)
        except RuleError as error:
            assert 0 <= error.column <= len(error.rule)
            assert str(error)
        else:
            assert tree is None or tree.matcher()(an_open()) in (True, False)


STRING = r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\""


class TestRegex:
    patterns = st.recursive(
        st.sampled_from(["a", "b", ".", "[ab]", "[^a]", "\\d", "\\w", "^", "$", "\n", "[a-c]", "\\.", "\\Z", "\\A", "\\s"]),
        lambda inner: st.one_of(
            st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "{2}", "{1,3}", "{0,2}"])).map("(?:{0[0]}){0[1]}".format),
            st.tuples(inner, inner).map("".join), st.tuples(inner, inner).map("({0[0]}|{0[1]})".format)), max_leaves=6)

    @settings(max_examples=1500, deadline=None, suppress_health_check=list(HealthCheck))
    @given(patterns, st.text("ab.1\n", max_size=8))
    def test_agrees_with_re(self, pattern, text):
        assert traceleft.Regex(pattern).search(text) == bool(re.search(pattern, text))

    @pytest.mark.parametrize("pattern", ["(a+)+$", "(a|a)*b", "(a*)*b", ".*a.*a.*a.*a.*a.*b", "(a|aa)+$b"])
    def test_hostile_text_costs_linear_time(self, pattern):
        regex = traceleft.Regex(pattern)
        steps = []
        regex.closure = lambda states, position, inner=regex.closure: steps.append(1) or inner(states, position)
        assert not regex.search("a" * 4095 + "!")
        assert len(steps) < 20 + 4096  # re would take longer than the universe has existed

    @pytest.mark.parametrize("pattern", ["a.{200}b$", "(a|b)*a(a|b){200}c", "(\\w*\\d){100}!", "((a|b|ab)+.?){20}c"])
    def test_no_text_costs_much(self, pattern):
        """Of texts of 4,096 characters of which none is like another, each takes a few milliseconds at most."""
        regex, source, times = traceleft.Regex(pattern), random.Random(1), []
        for _ in range(5):
            text = "".join(source.choices("ab1", k=4096))
            begin = time.perf_counter()
            assert not regex.search(text)
            times.append(time.perf_counter() - begin)
        assert min(times) < 0.05

    def test_the_caches_are_bounded(self):
        regex = traceleft.Regex("^.*[^x]{3}$|(y|z).{20}!")
        regex.search("".join(map(chr, range(100, 20000))) + "".join(random.Random(1).choices("yz", k=30000)))
        assert len(regex.cache) <= traceleft.MAX_REGEX_CACHE and len(regex.chars) <= traceleft.MAX_REGEX_CACHE


class TestSigma:
    def passing(self, count, seconds=1, events=None, **parameters):
        sigma = traceleft.Sigma(**parameters)
        passed = []
        for _ in range(seconds):
            passed.append([i for i in range(1, count + 1) if sigma.passes(events(i) if events else an_open())])
            sigma.tick()
        return passed

    @pytest.mark.parametrize("frequency, passed", [(0, [1, 2, 3, 4]), (1, [1, 2, 3, 4]), (2, [2, 4]), (3, [3]), (5, [])])
    def test_every_nth_passes(self, frequency, passed):
        assert self.passing(4, frequency=frequency) == [passed]

    def test_frequency_counts_across_seconds(self):
        assert self.passing(4, seconds=3, frequency=3) == [[3], [2], [1, 4]]

    def test_threshold_is_per_second(self):
        assert self.passing(4, seconds=2, threshold=3) == [[4], [4]]

    def test_what_is_held_back_does_not_count_towards_frequency(self):
        assert self.passing(6, seconds=2, threshold=3, frequency=2) == [[5], [4, 6]]
        assert self.passing(4, seconds=2, threshold=3, frequency=2) == [[], [4]]

    def test_by_keeps_count_per_value(self):
        by = traceleft.parse_by("comm,uid", OPEN)
        assert self.passing(6, frequency=2, by=by, events=lambda i: an_open(comm="ab"[i % 2])) == [[3, 4]]

    def test_groups_are_bounded_and_the_rest_is_one_group(self):
        sigma = traceleft.Sigma(frequency=2, by=traceleft.parse_by("pid", OPEN), max_groups=3)
        passed = [pid for pid in [1, 2, 3, 4, 5, 6, 7, 1] if sigma.passes(an_open(pid=pid))]
        assert passed == [5, 7, 1]  # 4 and 5, 6 and 7 share a count
        assert len(sigma.groups) == 3


class TestOtherReductions:
    """limit, distinct and backoff; the semantics are those that Suricata documents for thresholds of these names."""

    @staticmethod
    def passing(function, seconds, **parameters):
        """`seconds`: per second, the comms of its events. Returns the ordinals in each second that pass."""
        passed = []
        for comms in seconds:
            passed.append([i for i, comm in enumerate(comms, 1) if function.passes(an_open(comm=comm))])
            function.tick()
        return passed

    @pytest.mark.parametrize("parameters, passed", [
        ({}, [[1], [], [1], [1]]), ({"count": 2}, [[1, 2], [], [1, 2], [1, 2]]), ({"count": 9}, [[1, 2, 3], [], [1, 2, 3], [1, 2, 3]]),
        ({"count": 1, "seconds": 2}, [[1], [], [1], []]), ({"count": 4, "seconds": 3}, [[1, 2, 3], [], [1], [1, 2, 3]]),
    ])
    def test_limit(self, parameters, passed):
        assert self.passing(traceleft.Limit(**parameters), ["aaa", "", "aaa", "aaa"]) == passed

    def test_a_window_begins_with_its_first_event(self):
        assert self.passing(traceleft.Limit(seconds=3), ["", "", "a", "a", "a", "a"]) == [[], [], [1], [], [], [1]]

    def test_limit_by(self):
        limit = traceleft.Limit(count=2, by=traceleft.parse_by("comm", OPEN))
        assert self.passing(limit, ["aabab", "b"]) == [[1, 2, 3, 5], [1]]

    @pytest.mark.parametrize("seconds, passed", [(0, [[1, 2], [2], []]), (1, [[1, 2], [1, 2], [1]]), (2, [[1, 2], [2], [1]])])
    def test_distinct(self, seconds, passed):
        distinct = traceleft.Distinct(seconds=seconds, by=traceleft.parse_by("comm", OPEN))
        assert self.passing(distinct, ["abab", "ac", "a"]) == passed

    @pytest.mark.parametrize("parameters, passed", [
        ({}, [1, 10, 100]), ({"multiplier": 2}, [1, 2, 4, 8, 16, 32, 64]), ({"count": 3, "multiplier": 5}, [3, 15, 75]),
        ({"count": 100}, [100]), ({"count": 101}, [])])
    def test_backoff(self, parameters, passed):
        assert self.passing(traceleft.Backoff(**parameters), ["a" * 100]) == [passed]

    def test_backoff_goes_on_across_seconds(self):
        assert self.passing(traceleft.Backoff(multiplier=2), ["aaa", "a", "", "aaaa"]) == [[1, 2], [1], [], [4]]

    @pytest.mark.parametrize("function, parameters, error", [
        ("limit", "count=0", "count: expected an integer from 1 to 2147483647, not '0'"),
        ("limit", "frequency=2", "limit has no parameter 'frequency'; known: count, seconds, by"),
        ("limit", "seconds=0", "seconds: expected an integer from 1"), ("distinct", "seconds=-1", "seconds: expected an integer from 0"),
        ("distinct", "", "distinct needs the parameter 'by'"), ("backoff", "multiplier=1", "multiplier: expected an integer from 2"),
        ("backof", "", "did you mean 'backoff'")])
    def test_errors(self, function, parameters, error):
        assert error in "\n".join(errors_of(a_spec("", parameters, function=function)))


class TestOutputs:
    """top_per_sec and histogram; alerts_per_sec is tested with the aggregator."""

    @staticmethod
    def alerts(metrics, parameters, events, rule=""):
        channel = ListChannel()
        spec = a_spec(rule)
        spec["events"][0]["output"].update({"metrics": metrics, "parameters": parameters})
        aggregator = Aggregator(spec, {"1": channel})
        for event in events:
            aggregator.add(event)
        aggregator.flush(100.0)
        aggregator.flush(101.0)
        return channel.alerts

    def test_top(self):
        events = [an_open(comm=text[0], uid=int(text[1])) for text in ["a1", "b2", "a1", "c1", "c1", "c1", "a2"]]
        (alert,) = self.alerts("top_per_sec", "k=2;by=comm,uid", events)
        assert alert.detail.as_json() == {"top": [{"comm": "c", "uid": 1, "count": 3}, {"comm": "a", "uid": 1, "count": 2}], "other": 2}
        assert traceleft.format_text(alert).endswith('\nTOP: Comm "c" Uid 1 3, Comm "a" Uid 1 2, other 2\n\n')
        assert json.loads(traceleft.format_json(alert))["other"] == 2

    def test_top_is_of_what_passed_in_one_second(self):
        assert self.alerts("top_per_sec", "by=comm", []) == []
        (alert,) = self.alerts("top_per_sec", "by=comm", [an_open(comm="a", uid=1), an_open(comm="b")], "uid == 1")
        assert alert.detail.rows == (((("comm", "a"),), 1),)

    def test_top_of_more_groups_than_fit(self):
        (alert,) = self.alerts("top_per_sec", "by=pid", [an_open(pid=pid) for pid in [1, *range(1, 2000)]])
        assert alert.detail.rows[0] == ((("pid", 1),), 2) and len(alert.detail.rows) == 10
        assert alert.count == 2000 and alert.detail.other == 2000 - 11

    def test_a_name_cannot_forge_a_row(self):
        (alert,) = self.alerts("top_per_sec", "by=comm", [an_open(comm='a" 5, "\n')])
        assert 'TOP: Comm "a\\" 5, \\"\\n" 1, other 0\n' in traceleft.format_text(alert)

    def test_histogram(self):
        values = [-5, -1, 0, 1, 2, 3, 4, 7, 8, 2**62, 2**63 - 1]
        (alert,) = self.alerts("histogram", "field=ret", [an_open(ret=value) for value in values])
        assert alert.detail.as_json() == {"histogram": [
            {"to": -1, "count": 2}, {"from": 0, "to": 0, "count": 1}, {"from": 1, "to": 1, "count": 1}, {"from": 2, "to": 3, "count": 2},
            {"from": 4, "to": 7, "count": 2}, {"from": 8, "to": 15, "count": 1}, {"from": 2**62, "to": 2**63 - 1, "count": 2}]}
        assert "\nHISTOGRAM: To -1 2, From 0 To 0 1, From 1 To 1 1, From 2 To 3 2," in traceleft.format_text(alert)

    @pytest.mark.parametrize("metrics, parameters, error", [
        ("top_per_sec", "", "top_per_sec needs the parameter 'by'"), ("histogram", "", "needs the parameter 'field', as in 'field=count'"),
        ("histogram", "field=filename", "expected one integer field"), ("histogram", "field=mode,ret", "expected one integer field"),
        ("top_per_sec", "by=pid,tid,uid,gid", "expected up to 3 fields"), ("top_per_sec", "by=pid;k=0", "k: expected an integer from 1 to 100"),
        ("alerts_per_sec", "k=1", "alerts_per_sec has no parameter 'k'; known: none"), ("top_per_second", "", "did you mean 'top_per_sec'")])
    def test_errors(self, metrics, parameters, error):
        spec = a_spec()
        spec["events"][0]["output"].update({"metrics": metrics, "parameters": parameters})
        assert error in "\n".join(errors_of(spec))


class TestSpec:
    def test_the_example_is_the_contracts_to_the_letter(self):
        spec = traceleft.load_spec(HERE / "spec/aggregator-spec.json")
        assert spec.filters[0].id == "open-0"
        assert spec.filters[0].parameters == {"frequency": 100, "threshold": 0, "by": ()}
        assert spec.filters[0].rule == parse_rule("filename == '/tmp/a.txt'", OPEN)
        assert [channel.path for channel in spec.channels] == ["/tmp/traceleft.log", "localhost:50051"]
        assert "channel '2' is used by no filter" in spec.warnings[0]

    @pytest.mark.parametrize("rule, warned", [
        ("ret == ENOENT", ["a call that fails returns a negative number: ret == -ENOENT, not ENOENT"]),
        ("ret in (EACCES, -EPERM)", ["a call that fails returns a negative number: ret == -EACCES, not EACCES"]),
        ("ret == -ENOENT or ret > 2 or flags == O_CREAT", []),
        ("comm == 'a-thread-of-16-b'", ["'a-thread-of-16-b' is no comm: the kernel keeps 15 bytes of a thread's name"]),
        ("comm in ('sixteen-bytes-is', 'sh')", ["'sixteen-bytes-is' is no comm: the kernel keeps 15 bytes of a thread's name"]),
        ("comm == 'fifteen-bytes-i' and filename == 'sixteen-bytes-is'", []), ("", []),
    ])
    def test_what_is_hardly_meant_is_warned_of(self, rule, warned):
        assert [text.partition(": ")[2] for text in parse_spec(a_spec(rule)).warnings] == warned

    def test_defaults(self):
        value = a_spec()
        for key in ("stream", "group", "rule"):
            del value["events"][0][key]
        del value["events"][0]["function"]["parameters"]
        member = parse_spec(value).filters[0]
        assert (member.stream, member.group, member.rule) == ("", "", None)
        assert member.parameters == {"frequency": 1, "threshold": 0, "by": ()}

    @pytest.mark.parametrize("change, errors", [
        # shapes
        (lambda s: [], ["expected an object, not an array"]),
        (lambda s: {}, ["'channels' is missing", "'events' is missing"]),
        (lambda s: {**s, "event": []}, ["event: unknown key (did you mean 'events'?)"]),
        (lambda s: {**s, "events": {}}, ["events: expected an array, not an object"]),
        (lambda s: {**s, "events": []}, ["events: expected at least one filter"]),
        (lambda s: {**s, "events": [1]}, ["events[0]: expected an object, not a number"]),
        (lambda s: {**s, "channels": [None]}, ["channels[0]: expected an object, not null"]),
        (lambda s: {**s, "events": s["events"] * 1025}, ["1025 filters are too many"]),
        # channels
        (lambda s: edit(s, "channels", type="files"), ["channels[0].type: unknown channel type 'files' (did you mean 'file'"]),
        (lambda s: edit(s, "channels", path=""), ["channels[0].path: expected a text that is not empty"]),
        (lambda s: edit(s, "channels", path=1), ["channels[0].path: expected a string, not a number"]),
        (lambda s: edit(s, "channels", path="a\0b"), ["channels[0].path: a string with a NUL"]),
        (lambda s: edit(s, "channels", id=""), ["channels[0].id: expected a text"]),
        (lambda s: edit(s, "channels", id="9"), ["events[0].channel: unknown channel id '1'"]),
        (lambda s: {**s, "channels": s["channels"] * 2}, ["channels[1].id: '1' is already the id of channels[0]"]),
        (lambda s: {**s, "channels": [{"id": name, "type": "file", "path": "-"} for name in "12"]},
         ["channels[1].path: '-' is already the path of channels[0]"]),
        (lambda s: edit(s, "channels", type="grpc", path="nohost"), ["channels[0].path: expected HOST:PORT", "format"]),
        (lambda s: edit(s, "channels", type="grpc", path="h:99999"), ["channels[0].path: there is no port 99999", "format"]),
        (lambda s: edit(s, "channels", rotate={"max_byte": 1}), [
            "channels[0].rotate.max_byte: unknown key (did you mean 'max_bytes'?)", "rotate: 'max_bytes' is missing"]),
        (lambda s: edit(s, "channels", rotate={"max_bytes": 1, "keep": 0, "gzip": "yes"}), [
            "gzip: expected a boolean, not a string", "max_bytes: expected an integer from 4096 to", "keep: expected an integer from 1"]),
        (lambda s: edit(s, "channels", rotate={"max_bytes": True}), ["max_bytes: expected an integer, not a boolean"]),
        (lambda s: edit(s, "channels", path="-", rotate={"max_bytes": 10000}), ["channels[0].rotate: stdout cannot be rotated"]),
        (lambda s: edit(s, "channels", tls={}), ["channels[0].tls: unknown key; known: id, type, path, format, rotate"]),
        (lambda s: grpc_channel(s, tls={"cert": "c"}, gzip=1), ["gzip: expected a boolean", "tls: 'cert' and 'key' belong"]),
        (lambda s: grpc_channel(s, tls={"ca": ""}, spool={}), ["tls.ca: expected a text that is not empty", "spool: 'dir' is missing"]),
        (lambda s: {**grpc_channel(s), "channels": [{"id": name, "type": "grpc", "path": "h:1", "spool": {"dir": path}}
                                                    for name, path in (("1", "/s"), ("2", "/x/../s"))]},
         ["channels[1].spool.dir: '/s' is already the spool.dir of channels[0]"]),
        (lambda s: grpc_channel(s, token_file="", path="dns:///x"), ["token_file: expected a text", "expected HOST:PORT"]),
        # filters
        (lambda s: edit(s, "events", name="opne"), ["events[0].name: unknown event 'opne' (did you mean 'open'?)"]),
        (lambda s: edit(s, "events", channel="2"), ["events[0].channel: unknown channel id '2'"]),
        (lambda s: edit(s, "events", id=""), ["events[0].id: expected a text"]),
        (lambda s: edit(s, "events", id=None), ["events[0].id: expected a string, not null"]),
        (lambda s: {**s, "events": [{**s["events"][0], "id": "x"}] * 2}, ["events[1].id: 'x' is already the id"]),
        (lambda s: {**s, "events": [{**s["events"][0], "id": "open-1"}, s["events"][0]]}, ["events[1].id: 'open-1'"]),
        (lambda s: edit(s, "events", rules=""), ["events[0].rules: unknown key (did you mean 'rule'?)"]),
        (lambda s: edit(s, "events", rule=True), ["events[0].rule: expected a string, not a boolean"]),
        (lambda s: edit(s, "events", rule="flgs == 1"), ["events[0].rule: open has no field 'flgs' (did you mean 'flags'?)"]),
        (lambda s: edit(s, "events", function={"id": "sigm"}), ["events[0].function.id: unknown function 'sigm' (did you"]),
        (lambda s: edit(s, "events", function={}), ["events[0].function: 'id' is missing"]),
        (lambda s: edit(s, "events", output={"metrics": "a"}), ["events[0].output: 'format' is missing",
                                                               "events[0].output.metrics: unknown metrics 'a'"]),
        (lambda s: edit(s, "events", output={"metrics": "alerts_per_sec", "format": "jsn"}),
         ["events[0].output.format: unknown format for a file channel 'jsn' (did you mean 'json'?)"]),
        (lambda s: {**edit(s, "channels", type="grpc", path="h:1")}, ["format for a grpc channel 'json'"]),
        # parameters
        *[(lambda s, p=p: edit(s, "events", function={"id": "sigma", "parameters": p}), [f"events[0].function.parameters: {e}"])
          for p, e in [
              ("frequency", "expected NAME=VALUE"), ("frequency=", "frequency: expected an integer"),
              ("frequency=-1", "frequency: expected an integer"), ("frequency=1.5", "frequency: expected an integer"),
              ("frequency=99999999999999999999", "frequency: expected"), ("frequncy=1", "sigma has no parameter 'frequncy' ("),
              ("frequency=1;frequency=2", "parameter 'frequency' stands twice"), ("by=", "by: open has no field ''"),
              ("by=commm", "by: open has no field 'commm' (did you mean 'comm'?)"), ("by=uid,uid", "by: field 'uid' stands"),
              ("frequency=1;;threshold=1", "expected NAME=VALUE"), ("frequency=٣", "frequency: expected")]],
    ])
    def test_errors(self, change, errors):
        found = errors_of(change(a_spec()))
        assert len(found) == len(errors)
        for text, expected in zip(found, errors):
            assert expected in text

    def test_channel_options(self):
        spec = parse_spec(edit(a_spec(), "channels", rotate={"max_bytes": 10000, "gzip": True}))
        assert spec.channels[0].rotate == traceleft.RotateSpec(10000, 5, True)
        spec = parse_spec(grpc_channel(a_spec(), tls={"ca": "a", "server_name": "n"}, spool={"dir": "d"}, gzip=True))
        assert spec.channels[0] == traceleft.ChannelSpec(
            "1", "grpc", "dns:///h:1", "collector_spec_pb", None, traceleft.TlsSpec("a", "", "", "n"), "", True, traceleft.SpoolSpec("d"))

    def test_all_errors_are_reported(self):
        value = a_spec(rule="uid = 1", parameters="x=1;frequency=a", format="xml")
        value["events"].append({"name": "nope"})
        value["more"] = 1
        found = "\n".join(errors_of(value))
        for part in ("more: unknown key", "events[0].rule", "no parameter 'x'", "frequency: expected", "'xml'",
                     "events[1]: 'channel' is missing", "events[1]: 'function' is missing", "events[1].name"):
            assert part in found

    @pytest.mark.parametrize("data, message", [
        (b"", "empty"), (b" \n", "empty"), (b"{", "line 1 column 2"), (b'{"a": 1,\n "b" 2}', "line 2 column 6"),
        (b"\xff{}", "not UTF-8: byte 0xff at offset 0"), (b"[" * 100000, "nested too deeply"), (b"\xef\xbb\xbf[1]", "expected an object"),
        (b'{"a": 1, "a": 2}', "a: stands twice"), (b'{"events": NaN}', "NaN is no JSON value"), (b"[1" + b"1" * 5000 + b"]", ""),
        (b'{"channels": [], "events": []} x', "line 1 column 32"), (b'{\n  // mine\n}', "JSON has no comments"),
        (b'{"a": 1, # mine\n}', "JSON has no comments"), (b"{'a': 1}", "JSON's strings are in double quotes"),
        pytest.param(b'{"a": [1, 2,]}', "omma", id="a comma too many"),
    ])
    def test_what_is_not_a_spec(self, tmp_path, data, message):
        (tmp_path / "spec").write_bytes(data)
        with pytest.raises(SpecError) as caught:
            traceleft.load_spec(tmp_path / "spec")
        assert message in str(caught.value)
        assert all(text.startswith(f"{tmp_path}/spec: ") for text in caught.value.errors)

    @pytest.mark.parametrize("path, message", [("/nonexistent", "No such file"), ("/", "directory"), ("a\0b", "null byte")])
    def test_files_that_cannot_be_read(self, path, message):
        with pytest.raises(SpecError, match=message):
            traceleft.load_spec(path)

    json_values = st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5),
                  st.sampled_from(["open", "1", "sigma", "file", "alerts_per_sec", "uid == 0"])),
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(
            ["channels", "events", "id", "type", "path", "name", "channel", "rule", "function", "parameters", "output",
             "metrics", "format", "x"]), inner, max_size=5)), max_leaves=12)

    @settings(max_examples=500, deadline=None)
    @given(json_values, st.sampled_from([(), ("events",), ("channels",), ("events", 0), ("events", 0, "function"),
                                         ("events", 0, "output"), ("channels", 0), ("events", 0, "rule")]))
    def test_any_value_anywhere_is_accepted_or_refused(self, value, place):
        spec = a_spec()
        if place:
            at = spec
            for step in place[:-1]:
                at = at[step]
            at[place[-1]] = value
        with contextlib.suppress(SpecError):
            parse_spec(spec if place else value)

    def test_every_example_is_valid(self):
        assert len(EXAMPLES) >= 5
        done = run("check", *(HERE / "spec").glob("*.json"))
        assert done.returncode == 0
        assert sorted(done.stdout.splitlines()) == [f"{path}: ok" for path in EXAMPLES]
        assert "aggregator-spec.schema.json: a JSON Schema by its name, and not a spec: not checked\n" in done.stderr


def edit(spec, key, **changes):
    return {**spec, key: [{**spec[key][0], **changes}]}


def grpc_channel(spec, **options):
    """The spec with a grpc channel, and a format that it can have."""
    output = {"metrics": "alerts_per_sec", "format": "collector_spec_pb"}
    return edit(edit(spec, "channels", **{"type": "grpc", "path": "dns:///h:1", **options}), "events", output=output)


@pytest.fixture(scope="session")
def validator():
    """Of specs, by the schema."""
    jsonschema = importlib.import_module("jsonschema")
    schema = json.loads((HERE / "spec/aggregator-spec.schema.json").read_text())
    jsonschema.Draft7Validator.check_schema(schema)
    return jsonschema.Draft7Validator(schema)


class TestSchema:
    """What the validator accepts the schema accepts; what it refuses the schema refuses, where a schema can say so."""

    BEYOND = re.compile(  # what errors speak of that no schema can tell
        r"filters are too many|unknown channel id|is already the (id|path|spool)|stands (twice|in)|has no field|format for a (file|grpc) channel|"
        r"rule: (syntax|write)|expected HOST:PORT|there is no port")

    def test_the_file_is_what_the_program_prints(self):
        assert (HERE / "spec/aggregator-spec.schema.json").read_text() == run("schema").stdout, \
            "traceleft.py schema > spec/aggregator-spec.schema.json"

    @pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
    def test_accepts_every_example(self, validator, path):
        assert list(validator.iter_errors(json.loads(path.read_text()))) == []

    @pytest.mark.parametrize("change, errors", TestSpec.test_errors.pytestmark[0].args[1])
    def test_refuses_what_the_validator_refuses(self, validator, change, errors):
        value = change(a_spec())
        beyond = all(self.BEYOND.search(error) for error in errors_of(value))
        assert beyond or list(validator.iter_errors(value))

    @pytest.mark.parametrize("path", ["h", "h:", "h:123456", ":x"])
    def test_a_collectors_address(self, validator, path):
        value = grpc_spec(1)
        assert list(validator.iter_errors(value)) == []
        value["channels"][0]["path"] = path
        assert list(validator.iter_errors(value))

    @settings(max_examples=300, deadline=None)
    @given(TestSpec.json_values, st.sampled_from([("events",), ("channels",), ("events", 0), ("events", 0, "function"),
                                                  ("events", 0, "output"), ("channels", 0), ("$schema",)]))
    def test_accepts_what_the_validator_accepts(self, validator, value, place):
        spec = a_spec()
        at = spec
        for step in place[:-1]:
            at = at[step]
        at[place[-1]] = value
        try:
            parse_spec(spec)
        except SpecError:
            return
        assert list(validator.iter_errors(spec)) == []

    @settings(max_examples=300, deadline=None)
    @given(st.lists(st.sampled_from(["frequency=1", "threshold = 12", " by=uid", "by=uid,pid ", ";", ";", "x=1", "by", " "]), max_size=6))
    def test_parameters(self, validator, words):
        spec = a_spec(parameters="".join(words))
        try:
            parse_spec(spec)
        except SpecError as error:
            assert any("stands twice" in text or "has no field" in text for text in error.errors) or \
                list(validator.iter_errors(spec))
        else:
            assert list(validator.iter_errors(spec)) == []

    def test_knows_every_key_that_the_validator_knows(self, validator):
        """Also of objects in objects: the schema's properties at each place where the validator looks for keys."""
        known = {}

        class Listener(traceleft.SpecParser):
            def object(self, value, path, required, optional):
                known.setdefault(re.sub(r"\[\d+\]", "", path), set()).update(required, optional)
                return super().object(value, path, required, optional)

        for value in (a_spec(), grpc_spec(1), *(json.loads(path.read_text()) for path in EXAMPLES)):
            Listener().parse(value)
        for path, keys in known.items():
            at = validator.schema
            for step in filter(None, path.split(".")):
                at = at["properties"][step]
                at = at.get("items", at)
            assert set(at["properties"]) == keys, path or "the spec"
            assert all(described.get("description") for described in at["properties"].values())


class TestAggregator:
    def aggregate(self, spec, seconds):
        """Alerts of each second, given the events of each."""
        channel = ListChannel()
        aggregator = Aggregator(spec, {"1": channel})
        aggregator.tick(1000.0)
        alerts = []
        for second, events in enumerate(seconds, 1001):
            for event in events:
                aggregator.add(event)
            aggregator.tick(float(second))
            alerts.append([(alert.count, alert.matched, alert.sample) for alert in channel.alerts])
            channel.alerts.clear()
        return aggregator, alerts

    def test_one_alert_a_second_with_counts_of_that_second(self):
        a, b = an_open(pid=1), an_open(pid=2)
        _, alerts = self.aggregate(a_spec(parameters="frequency=2"), [[a, b, a, b, a], [], [b], [a, b]])
        assert alerts == [[(2, 5, b)], [], [(1, 1, b)], [(1, 2, b)]]

    def test_nothing_passed_is_no_alert_and_its_matches_are_not_carried_over(self):
        aggregator, alerts = self.aggregate(a_spec(parameters="threshold=2"), [[an_open()] * 2, [an_open()] * 3])
        assert [[alert[:2] for alert in second] for second in alerts] == [[], [(1, 3)]]
        assert aggregator.summary() == {"filters": [{"id": "open-0", "event": "open", "matched": 5, "passed": 1,
                                                     "folded": 4, "alerts": 1, "lost": {}}], "balanced": True}

    def test_a_second_ends_when_the_second_changes(self):
        channel = ListChannel()
        aggregator = Aggregator(a_spec(), {"1": channel})
        aggregator.tick(5.0)
        for now in (5.2, 5.9):
            aggregator.add(an_open())
            aggregator.tick(now)
        assert not channel.alerts
        aggregator.tick(6.0)
        assert [alert.count for alert in channel.alerts] == [2]
        aggregator.add(an_open())
        aggregator.tick(3.0)  # the clock was set back
        assert len(channel.alerts) == 2

    def test_every_filter_sees_every_event(self):
        spec = a_spec(rule="uid == 0")
        spec["events"] += [{**spec["events"][0], "rule": "flags & O_CREAT"}, {**spec["events"][0], "name": "close", "rule": ""}]
        aggregator, _ = self.aggregate(spec, [[an_open(), an_open(uid=1), make_event("close", 3)]])
        assert [account["matched"] for account in aggregator.summary()["filters"]] == [1, 2, 1]

    def test_alerts_times_frequency_recover_the_volume(self):
        aggregator, alerts = self.aggregate(a_spec(parameters="frequency=100"), [[an_open()] * 1234] * 10)
        passed = sum(alert[0] for second in alerts for alert in second)
        assert passed == 123 and abs(passed * 100 - 12340) < 100

    def test_specs_come_as_values_paths_and_records(self, tmp_path):
        spec = a_spec()
        for form in (spec, write_spec(tmp_path / "s", spec), str(tmp_path / "s"), parse_spec(spec)):
            assert Aggregator(form, {"1": ListChannel()}).spec == parse_spec(spec)

    def test_opens_no_channel_when_one_cannot_be_opened(self, tmp_path):
        spec = a_spec(channel={"id": "1", "type": "file", "path": str(tmp_path / "log")})
        spec["channels"].append({"id": "2", "type": "file", "path": str(tmp_path / "missing/log")})
        spec["events"].append({**spec["events"][0], "channel": "2"})
        with pytest.raises(traceleft.TraceleftError, match="channel '2'"):
            Aggregator(spec)
        assert open_files(tmp_path) == []


def open_files(folder):
    paths = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if os.path.lexists(link)]
    return [path for path in paths if path.startswith(str(folder))]


class TestFileChannel:
    def alerts(self, tmp_path, format, events, count=1):
        spec = a_spec(format=format, channel={"id": "1", "type": "file", "path": str(tmp_path / "log")},
                      parameters=f"frequency={count}")
        aggregator = Aggregator(spec)
        for second, event in enumerate(events):
            for _ in range(count):
                aggregator.add(event)
            aggregator.tick(float(second))
        aggregator.close()
        assert aggregator.summary()["balanced"]
        return (tmp_path / "log").read_bytes()

    @pytest.mark.parametrize("format", ["text", "collector_spec_pb"])
    def test_text_is_the_contracts_block(self, tmp_path, format):
        event = an_open(ret=3, pid=4242, timestamp_ns=1234)
        block = ("COUNT: 1\n"
                 f"EVENT: {{Timestamp:1234 ProgramID:0 Pid:4242 Ret:3 Name:open Hash:{event.hash} Flags:0}} "
                 'Filename "/tmp/a.txt" Flags 577 Mode 438\n\n')
        assert self.alerts(tmp_path, format, [event] * 2).decode() == block * 2

    @pytest.mark.parametrize("format", ["text", "json"])
    def test_no_event_can_forge_a_record(self, tmp_path, format):
        name = '/tmp/"\n\nCOUNT: 9\n\udcff\x1b[2J'
        data = self.alerts(tmp_path, format, [an_open(name, comm="a\nb")])
        assert data.count(b"\n") == (3 if format == "text" else 1)
        assert b"\x1b" not in data and b"\xff" not in data
        if format == "json":
            assert json.loads(data)["sample"]["args"]["filename"] == name

    def test_json_fields(self, tmp_path):
        event = an_open("/é", ret=-2, pid=5, tid=6, ppid=7, uid=8, gid=9, comm="sh", program_id=10, timestamp_ns=11)
        record = json.loads(self.alerts(tmp_path, "json", [event]))
        assert record == {
            "time": "1970-01-01T00:00:00.000Z", "host": socket.gethostname(), "filter": "open-0", "event": "open",
            "stream": "s", "group": "g", "metrics": "alerts_per_sec", "count": 1, "matched": 1, "lost": 0,
            "sample": {"timestamp_ns": 11, "pid": 5, "tid": 6, "ppid": 7, "uid": 8, "gid": 9, "comm": "sh",
                       "program_id": 10, "ret": -2, "hash": event.hash, "euid": 0, "exe": "", "cgroup": "",
                       "container": "", "mntns": 0, "netns": 0, "pidns": 0,
                       "args": {"filename": "/é", "flags": 577, "mode": 438}}}
        assert datetime.datetime.fromisoformat(record["time"].replace("Z", "+00:00")).timestamp() == 0

    def test_path_is_in_the_sample_where_it_is_known(self, tmp_path):
        spec = a_spec(name="close", channel={"id": "1", "type": "file", "path": str(tmp_path / "log")})
        aggregator = Aggregator(spec)
        aggregator.add(make_event("close", 3, path="/x"))
        aggregator.flush(1.0)
        assert json.loads((tmp_path / "log").read_text())["sample"]["path"] == "/x"
        aggregator.close()

    def test_is_created_private_and_appended_to(self, tmp_path):
        (tmp_path / "old").write_text("before\n")
        first = self.alerts(tmp_path, "text", [an_open()])
        assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600
        assert self.alerts(tmp_path, "text", [an_open()]) == first * 2

    def test_every_bad_channel_is_named_and_nothing_is_made(self, tmp_path):
        spec = a_spec(channel={"id": "1", "type": "file", "path": f"{tmp_path}/good"})
        for name, path in (("2", f"{tmp_path}/missing/log"), ("3", f"{tmp_path}")):
            spec["channels"].append({"id": name, "type": "file", "path": path})
            spec["events"].append({**spec["events"][0], "channel": name})
        with pytest.raises(traceleft.TraceleftError) as caught:
            Aggregator(spec)
        assert [error[:11] for error in caught.value.errors] == ["channel '2'", "channel '3'"]
        assert not list(tmp_path.iterdir())

    def test_only_regular_files(self, tmp_path):
        os.mkfifo(tmp_path / "fifo")
        for path in (f"{tmp_path}/fifo", "/dev/null"):
            with pytest.raises(traceleft.TraceleftError, match="not a regular file"):
                Aggregator(a_spec(channel={"id": "1", "type": "file", "path": path}))

    @pytest.mark.parametrize("path, message", [("missing/log", "No such file"), ("", "Is a directory"), ("file/log", "Not a")])
    def test_paths_that_cannot_be_opened(self, tmp_path, path, message):
        (tmp_path / "file").touch()
        with pytest.raises(traceleft.TraceleftError, match=message) as caught:
            Aggregator(a_spec(channel={"id": "1", "type": "file", "path": f"{tmp_path}/{path}"}))
        assert caught.value.exit_code == 1

    @contextlib.contextmanager
    def running(self, path, format="json", **options):
        """(a function that sends alerts of these counts, one a second, the aggregator), closed and balanced in the end."""
        aggregator = Aggregator(a_spec(format=format, channel={"id": "1", "type": "file", "path": str(path), **options}))
        seconds = itertools.count()

        def send(*counts):
            for count in counts:
                for _ in range(count):
                    aggregator.add(an_open())
                aggregator.flush(float(next(seconds)))
        yield send, aggregator
        aggregator.close()
        assert aggregator.summary()["balanced"]

    @staticmethod
    def counts(*paths):
        return [json.loads(line)["count"] for path in paths for line in path.read_text().splitlines()]

    def disk(self, monkeypatch):
        """A disk that takes as many bytes as the list returned has in it; None is no limit."""
        room, write = [None], os.write

        def limited(fd, data):
            if room[0] is None or fd <= 2:
                return write(fd, data)
            if not room[0]:
                raise OSError(28, "No space left on device")
            written = write(fd, data[:room[0]])
            room[0] -= written
            return written
        monkeypatch.setattr(os, "write", limited)
        return room

    def test_what_cannot_be_written_waits_until_it_can(self, tmp_path, monkeypatch, capsys):
        room = self.disk(monkeypatch)
        with self.running(tmp_path / "log") as (send, aggregator):
            send(1)
            room[0] = 20
            send(2, 3)
            assert self.counts(tmp_path / "log") == [1]  # the part that fitted has been taken back
            assert aggregator.channels["1"].figures()["queued"] == 2
            room[0] = None
            send(4)
            assert self.counts(tmp_path / "log") == [1, 2, 3, 4]
        assert aggregator.summary()["filters"][0]["lost"] == {}
        assert capsys.readouterr().err == (
            f"traceleft: cannot write to {tmp_path}/log: No space left on device; records are kept, and written when it "
            f"works again\ntraceleft: writing to {tmp_path}/log works again\n")

    def test_what_does_not_fit_into_memory_is_counted_in_the_next_record(self, tmp_path, monkeypatch):
        monkeypatch.setattr(traceleft, "MAX_QUEUE_BYTES", 2000)
        room = self.disk(monkeypatch)
        with self.running(tmp_path / "log") as (send, aggregator):
            room[0] = 0
            send(*[2] * 10)
            waiting = aggregator.channels["1"].figures()["queued"]
            assert 0 < waiting < 10 and aggregator.channels["1"].waiting_bytes <= 2000
            room[0] = None
            aggregator.flush(0.0)  # nothing passed: what waits is written, and nothing else
            send(5)
        records = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
        lost = 2 * (10 - waiting)
        assert [(record["count"], record["lost"]) for record in records] == [(2, 0)] * waiting + [(5, lost)]
        assert aggregator.summary()["filters"][0]["lost"] == {"queue_full": lost}

    def test_what_could_not_be_written_until_the_end_is_counted(self, tmp_path, monkeypatch, capsys):
        room = self.disk(monkeypatch)
        with self.running(tmp_path / "log") as (send, aggregator):
            room[0] = 0
            send(2, 3)
        assert aggregator.summary()["filters"][0]["lost"] == {"write_failed": 5}
        assert capsys.readouterr().err.endswith("2 records could not be written and are lost\n")

    def test_a_part_that_cannot_be_taken_back_is_a_line_of_its_own(self, tmp_path, monkeypatch):
        room = self.disk(monkeypatch)
        with self.running(tmp_path / "log") as (send, aggregator):
            room[0] = 20
            monkeypatch.setattr(traceleft.FileChannel, "take_back", lambda *_: False)  # another writer was faster
            send(1)
            room[0] = None
            send(2)
        torn, *lines = (tmp_path / "log").read_text().splitlines()
        assert len(torn) == 20 and [json.loads(line)["count"] for line in lines] == [1, 2]

    def test_each_record_is_one_write(self, tmp_path, monkeypatch):
        written, write = [], os.write
        with self.running(tmp_path / "log", format="text") as (send, _):
            monkeypatch.setattr(os, "write", lambda fd, data: (written.append(bytes(data)), write(fd, data))[1])
            send(1, 2)
            monkeypatch.undo()
        assert b"".join(written) == (tmp_path / "log").read_bytes()
        assert [data.endswith(b"\n\n") for data in written] == [True, True]

    def test_writers_do_not_mix(self, tmp_path):
        with self.running(tmp_path / "log") as (one, _), self.running(tmp_path / "log") as (other, _):
            threads = [threading.Thread(target=send, args=[1] * 300) for send in (one, other)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(DEADLINE)
        assert self.counts(tmp_path / "log") == [1] * 600

    def test_renamed_removed_truncated(self, tmp_path):
        log = tmp_path / "log"
        with self.running(log) as (send, aggregator):
            send(1, 2)
            log.rename(tmp_path / "log.1")
            send(3)
            assert (self.counts(tmp_path / "log.1"), self.counts(log)) == ([1, 2], [3])
            log.unlink()
            send(4)
            assert self.counts(log) == [4] and log.stat().st_mode & 0o777 == 0o600
            shutil.copy(log, tmp_path / "copy")
            os.truncate(log, 0)
            send(5)
            assert self.counts(log) == [5]
            (tmp_path / "elsewhere").mkdir()
            log.unlink()
            log.symlink_to(tmp_path / "elsewhere/log")  # nobody else can write here
            send(6)
            assert self.counts(tmp_path / "elsewhere/log") == [6]
            assert aggregator.channels["1"].figures()["reconnects"] == 3
            aggregator.reopen()  # SIGUSR1
            assert aggregator.channels["1"].figures()["reconnects"] == 4

    def test_removed_between_the_look_and_the_write(self, tmp_path, monkeypatch):
        follow = traceleft.FileChannel.follow_path

        def unlink_after(channel):
            follow(channel)
            (tmp_path / "log").unlink()
            monkeypatch.undo()
        with self.running(tmp_path / "log") as (send, _):
            monkeypatch.setattr(traceleft.FileChannel, "follow_path", unlink_after)
            send(1, 2)
        assert self.counts(tmp_path / "log") == [1, 2]

    def test_a_removed_directory_comes_back(self, tmp_path):
        (tmp_path / "d").mkdir()
        with self.running(tmp_path / "d/log") as (send, _):
            shutil.rmtree(tmp_path / "d")
            send(1, 2)
            (tmp_path / "d").mkdir()
            send(3)
        assert self.counts(tmp_path / "d/log") == [1, 2, 3]

    @pytest.mark.skipif(os.geteuid() != 0, reason="makes files of another user")
    @pytest.mark.parametrize("trap, message", [
        (lambda log, other: (log.symlink_to(other), os.lchown(log, 1, 1)), "'log' is another user's"),
        (lambda log, other: (log.touch(), os.chown(log, 1, 1)), "'log' is another user's"),
        (lambda log, other: os.link(other, log),
         "'log' has another name too"),
    ], ids=["symlink", "file", "hardlink"])
    def test_traps_in_a_directory_that_everybody_can_write_to(self, tmp_path, trap, message):
        tmp_path.chmod(0o1777)
        log, other = tmp_path / "log", tmp_path / "other"
        other.write_text("precious")
        trap(log, other)
        with pytest.raises(traceleft.TraceleftError, match=message):
            Aggregator(a_spec(channel={"id": "1", "type": "file", "path": str(log)}))
        log.unlink()
        with self.running(log) as (send, aggregator):
            send(1)
            log.rename(tmp_path / "moved")
            trap(log, other)
            send(2)  # refused, and kept
            assert aggregator.channels["1"].figures()["queued"] == 1
            log.unlink()
            send(3)
        assert (self.counts(tmp_path / "moved"), self.counts(log)) == ([1], [2, 3])
        assert other.read_text() == "precious"

    @pytest.mark.skipif(os.geteuid() != 0, reason="makes files of another user")
    def test_directories_on_the_way_are_checked_as_well(self, tmp_path):
        (tmp_path / "real").mkdir()
        (tmp_path / "open").mkdir()
        (tmp_path / "open").chmod(0o1777)
        (tmp_path / "open/link").symlink_to(tmp_path / "real")
        path = f"{tmp_path}/open/../open/./link/log"
        os.close(traceleft.open_log(path))  # root's own
        os.lchown(tmp_path / "open/link", 1, 1)
        with pytest.raises(OSError, match="'link' is another user's"):
            traceleft.open_log(path)

    @pytest.mark.skipif(os.geteuid() != 0, reason="makes files of another user")
    @pytest.mark.parametrize("kind", ["log", "spool", "summary", "recording"])
    def test_nobody_else_decides_where_root_writes(self, tmp_path, kind):
        """Whatever is written: no file, directory or link of another user in a place such as /tmp, nor a link in that user's own
        directory, leads there."""
        precious, shared, theirs = tmp_path / "precious", tmp_path / "shared", tmp_path / "theirs"
        (precious / "s").mkdir(parents=True)
        (precious / "s").chmod(0o700)
        (precious / "f").write_text("precious")
        for folder in (shared, theirs, shared / "their-folder"):
            folder.mkdir()
        shared.chmod(0o1777)
        name = "s" if kind == "spool" else "f"
        for link in (shared / "link", theirs / "link", shared / "their-folder/link"):
            link.symlink_to(precious / name)
        (shared / "folder-link").symlink_to(precious)
        (tmp_path / "groups").mkdir()
        os.chown(tmp_path / "groups", 0, 1)
        (tmp_path / "groups").chmod(0o775)
        (tmp_path / "groups/link").symlink_to(precious / name)
        os.lchown(tmp_path / "groups/link", 1, 1)
        if kind != "spool":
            (shared / "file").touch()
            os.link(precious / "f", theirs / "hard-link")
        for path in (theirs, *theirs.iterdir(), *shared.iterdir(), shared / "their-folder/link"):
            if path.name != "hard-link":
                os.lchown(path, 1, 1)

        def write(path):
            if kind == "log":
                os.close(traceleft.open_log(path))
            elif kind == "spool":
                os.close(traceleft.open_spool(path))
            elif kind == "summary":
                traceleft.check_summary(path)
                traceleft.write_summary(path, {})
            else:
                recorder = traceleft.Recorder(path)
                recorder.open()
                os.close(recorder.fd)

        traps = [tmp_path / "groups/link", shared / "link", theirs / "link", shared / "their-folder/link", shared / "their-folder/new", shared / f"folder-link/{name}"]
        for path in traps + ([] if kind == "spool" else [shared / "file", theirs / "hard-link"]):
            with pytest.raises((OSError, traceleft.TraceleftError), match="another user's|another name"):
                write(str(path))
        assert not (shared / "their-folder/new").exists() and not list((precious / "s").iterdir())
        assert (precious / "f").read_text() == "precious"
        write(str(shared / "new"))
        write(str(theirs / "new"))
        assert (shared / "new").stat().st_mode & 0o777 == (0o700 if kind == "spool" else 0o600)

    @pytest.mark.parametrize("target", ["loop", "a/../loop"])
    def test_symlinks_in_a_circle(self, tmp_path, target):
        (tmp_path / "a").mkdir()
        (tmp_path / "loop").symlink_to(target)
        with pytest.raises(OSError, match="Too many levels"):
            traceleft.open_log(str(tmp_path / "loop"))

    @pytest.mark.parametrize("gzip", [False, True])
    def test_rotates(self, tmp_path, gzip):
        log = tmp_path / "log"
        with self.running(log, rotate={"max_bytes": 4096, "keep": 3, "gzip": gzip}) as (send, aggregator):
            for number in range(1, 61):
                send(number)
                rotation = aggregator.channels["1"].rotation
                if rotation.thread:
                    rotation.thread.join(DEADLINE)
        old = [tmp_path / f"log.{n}{'.gz' if gzip else ''}" for n in (3, 2, 1)]
        assert {path.name for path in tmp_path.iterdir()} == {"log", *(path.name for path in old)}
        assert all(path.stat().st_mode & 0o777 == 0o600 for path in tmp_path.iterdir())
        texts = [importlib.import_module("gzip").decompress(path.read_bytes()).decode() if gzip else path.read_text()
                 for path in old] + [log.read_text()]
        assert all(len(text) <= 4096 for text in texts)
        counts = [json.loads(line)["count"] for text in texts for line in text.splitlines()]
        assert counts == list(range(61 - len(counts), 61)) and len(counts) > 20

    @pytest.mark.parametrize("gzip", [False, True])
    def test_two_agents_rotate_one_file(self, tmp_path, gzip):
        rotate = {"max_bytes": 4096, "keep": 1000, "gzip": gzip}
        with self.running(tmp_path / "log", rotate=rotate) as (one, _), \
                self.running(tmp_path / "log", rotate=rotate) as (other, _):
            threads = [threading.Thread(target=send, args=[1] * 200) for send in (one, other)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(DEADLINE)
        texts = [importlib.import_module("gzip").decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
                 for path in tmp_path.iterdir()]
        assert [json.loads(line)["count"] for text in texts for line in text.splitlines()] == [1] * 400
        assert not list(tmp_path.glob("*.tmp"))

    def test_a_log_that_is_renamed_while_it_is_compressed(self, tmp_path, monkeypatch):
        write = traceleft.write_compressed

        def slow(plain, raw):
            (tmp_path / "log.1").rename(tmp_path / "log.2")
            (tmp_path / "log.1").write_text("newer")
            write(plain, raw)
        (tmp_path / "log.1").write_text("older")
        monkeypatch.setattr(traceleft, "write_compressed", slow)
        traceleft.compress_log(f"{tmp_path}/log.1", "log.1")
        assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"log.1": "newer", "log.2": "older"}

    def test_what_another_agent_still_writes_is_compressed_too(self, tmp_path, monkeypatch):
        """It had looked at the path before the rename: it has the file locked, or finds it gone and writes again."""
        write, log = traceleft.write_compressed, tmp_path / "log"
        with self.running(log) as (send, aggregator):
            send(1)
            channel = aggregator.channels["1"]
            threads = []

            def meanwhile(plain, raw):
                write(plain, raw)
                if not threads:
                    assert traceleft.lock_log(channel.fd)
                    channel.append(b"late\n")
                    threads.append(threading.Timer(0.2, traceleft.unlock_log, (channel.fd,)))
                    threads[0].start()
                else:
                    assert not threads[0].is_alive()  # it has waited
            monkeypatch.setattr(traceleft, "write_compressed", meanwhile)
            log.rename(tmp_path / "log.1")
            monkeypatch.setattr(channel, "follow_path", lambda: None)  # it has looked already
            traceleft.compress_log(f"{tmp_path}/log.1", "log.1")
            send(2)
        text = importlib.import_module("gzip").decompress((tmp_path / "log.1.gz").read_bytes()).decode()
        assert text.endswith("late\n") and json.loads(text.splitlines()[0])["count"] == 1
        assert self.counts(log) == [2] and {path.name for path in tmp_path.iterdir()} == {"log", "log.1.gz"}

    def test_a_lock_that_somebody_else_holds_holds_up_nothing(self, tmp_path, monkeypatch, capsys):
        """On the log, which others can only take when they can read it; that on its directory, which all can, is none of ours."""
        monkeypatch.setattr(traceleft, "CLOSE_TIMEOUT", 0.2)
        monkeypatch.setattr(traceleft, "ROTATE_RETRY", 0.0)
        rotate = {"max_bytes": 4096, "keep": 3, "gzip": True}
        with self.running(tmp_path / "log", rotate=rotate) as (send, aggregator), contextlib.ExitStack() as stack:
            directory = os.open(tmp_path, os.O_RDONLY)
            stack.callback(os.close, directory)
            fcntl.flock(directory, fcntl.LOCK_EX)
            send(*[1] * 10)
            rotation = aggregator.channels["1"].rotation
            assert rotation.thread and not capsys.readouterr().err
            with (tmp_path / "log").open() as theirs:
                fcntl.flock(theirs, fcntl.LOCK_EX)
                begin = time.monotonic()
                send(*[1] * 200)
                assert time.monotonic() - begin < DEADLINE and self.counts(tmp_path / "log").count(1) > 200
            rotation.thread.join(DEADLINE)
            send(1)
            rotation.thread.join(DEADLINE)
        found = [importlib.import_module("gzip").decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
                 for path in tmp_path.iterdir()]
        assert sum(json.loads(line)["count"] for text in found for line in text.splitlines()) == 211
        assert capsys.readouterr().err == (f"traceleft: cannot rotate {tmp_path}/log: another process has locked it; it grows beyond "
                                           "its 4096 bytes until it can be\n")
        assert len(list(tmp_path.glob("log.*"))) == 2

    def numbered(self, folder, count):
        """Old logs, each with its number in it."""
        for number in range(1, count + 1):
            (folder / f"log.{number}").write_text(json.dumps({"count": number}) + "\n")

    @pytest.mark.parametrize("why", ["locked", "append-only"])
    def test_a_rotation_that_cannot_be_finished_removes_nothing(self, tmp_path, monkeypatch, capsys, why):
        monkeypatch.setattr(traceleft, "ROTATE_RETRY", 0.0)
        self.numbered(tmp_path, 5)
        with self.running(tmp_path / "log", rotate={"max_bytes": 4096, "keep": 5}) as (send, _), contextlib.ExitStack() as stack:
            send(6)
            if why == "locked":
                theirs = stack.enter_context((tmp_path / "log.1").open())
                fcntl.flock(theirs, fcntl.LOCK_SH)
            elif subprocess.run(["chattr", "+a", tmp_path / "log"], capture_output=True).returncode == 0:
                stack.callback(subprocess.run, ["chattr", "-a", tmp_path / "log"], check=True)
            else:  # a file system without it
                monkeypatch.setattr(fcntl, "ioctl", lambda fd, request, flags: flags.__setitem__(0, 0x20))
            send(*[7] * 40)
        assert self.counts(*(tmp_path / f"log.{number}" for number in range(5, 0, -1))) == [5, 4, 3, 2, 1]
        assert self.counts(tmp_path / "log") == [6, *[7] * 40] and capsys.readouterr().err.count("cannot rotate") == 1

    def test_a_number_that_is_free_is_used_before_anything_is_removed(self, tmp_path):
        """As after a kill -9 between two renames."""
        self.numbered(tmp_path, 5)
        (tmp_path / "log.3").unlink()
        with self.running(tmp_path / "log", rotate={"max_bytes": 4096, "keep": 5}) as (send, _):
            send(*[9] * 12)
            assert self.counts(*(tmp_path / f"log.{number}" for number in (5, 4, 3, 2))) == [5, 4, 2, 1]
            assert set(self.counts(tmp_path / "log.1")) == {9}

    def test_a_compressed_form_that_somebody_removes(self, tmp_path, monkeypatch, capsys):
        """Before it has its name: then the plain one stays."""
        lock = traceleft.lock_log

        def remove(fd, seconds=0.0):
            for path in tmp_path.glob("*.tmp"):
                path.unlink()
            return lock(fd, seconds)
        monkeypatch.setattr(traceleft, "lock_log", remove)
        (tmp_path / "log.1").write_text("precious")
        traceleft.compress_log(f"{tmp_path}/log.1", "log.1")
        assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"log.1": "precious"}
        assert "cannot compress log.1: No such file or directory; it stays as it is" in capsys.readouterr().err

    def test_without_a_thread_to_be_had(self, tmp_path, monkeypatch, capsys):
        """As under a pids.max: what threads do is done without, or left out and said."""
        def refuse(thread):
            raise RuntimeError("can't start new thread")
        monkeypatch.setattr(traceleft, "CLOSE_TIMEOUT", 0.2)
        with self.running(tmp_path / "log", rotate={"max_bytes": 4096, "keep": 3, "gzip": True}) as (send, aggregator):
            monkeypatch.setattr(threading.Thread, "start", refuse)
            send(*[1] * 10)
            other = parse_spec(a_spec(channel={"id": "1", "type": "file", "path": f"{tmp_path}/other"}))
            aggregator.reload(other, frozenset(), aggregator.open_channels(other), {})
            aggregator.retire(0.0)
            with pytest.raises(traceleft.TraceleftError, match="channel '1': can't start new thread"):
                aggregator.open_channels(parse_spec(grpc_spec(free_port(), {"spool": {"dir": f"{tmp_path}/spool"}})))
        assert self.counts(tmp_path / "log.1", tmp_path / "log") == [1] * 10 and aggregator.closing == []
        assert "there is no thread to be had; it stays as it is" in capsys.readouterr().err

    def test_a_reload_that_changes_its_rotation_keeps_what_waits(self, tmp_path, monkeypatch):
        room = self.disk(monkeypatch)
        with self.running(tmp_path / "log") as (send, aggregator):
            room[0] = 0
            send(1, 2, 3)
            channel = aggregator.channels["1"]
            for rotate in ({"max_bytes": 4096, "keep": 99}, {"max_bytes": 8192, "keep": 99}, None, {"max_bytes": 4096, "keep": 99}):
                spec = a_spec(format="json", channel={"id": "1", "type": "file", "path": f"{tmp_path}/log"})
                spec["channels"][0].update({"rotate": rotate} if rotate else {})
                aggregator.reload(parse_spec(spec), frozenset(), aggregator.open_channels(parse_spec(spec)), {})
                aggregator.retire(0.0)
                assert aggregator.channels["1"] is channel and (channel.rotation and channel.rotation.spec.max_bytes) == (
                    rotate and rotate["max_bytes"])
            room[0] = None
            send(*range(4, 30))
        assert sorted(self.counts(*tmp_path.iterdir())) == list(range(1, 30)) and (tmp_path / "log.2").exists()

    def test_a_directory_that_is_exchanged_by_a_link_leads_nowhere(self, tmp_path, monkeypatch):
        """Between the check and the renames: they are in the directory that was looked at."""
        folder, precious = tmp_path / "folder", tmp_path / "precious"
        folder.mkdir()
        precious.mkdir()
        for name in ("log", "log.1"):
            (precious / name).write_text("precious")
        shift = traceleft.Rotation.shift

        def exchange(rotation, path):
            folder.rename(tmp_path / "moved")
            folder.symlink_to(precious)
            try:
                return shift(rotation, path)
            finally:
                folder.unlink()
                (tmp_path / "moved").rename(folder)
        monkeypatch.setattr(traceleft.Rotation, "shift", exchange)
        with self.running(folder / "log", rotate={"max_bytes": 4096, "keep": 3}) as (send, _):
            send(*[1] * 40)
        assert {path.name for path in folder.iterdir()} == {"log", "log.1", "log.2", "log.3"}
        assert {path.name: path.read_text() for path in precious.iterdir()} == {"log": "precious", "log.1": "precious"}

    def test_a_file_system_without_locks(self, tmp_path, monkeypatch):
        monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(95, "Operation not supported")))
        with self.running(tmp_path / "log", rotate={"max_bytes": 4096, "keep": 100, "gzip": True}) as (send, aggregator):
            send(*[1] * 20)
            aggregator.channels["1"].rotation.thread.join(DEADLINE)
        assert (tmp_path / "log.1.gz").exists() and not (tmp_path / "log.1").exists()

    def test_an_old_file_that_is_locked_stays(self, tmp_path, monkeypatch, capsys):
        """Another agent is about to replace it by its compressed form."""
        monkeypatch.setattr(traceleft, "ROTATE_RETRY", 0.0)
        with self.running(tmp_path / "log", rotate={"max_bytes": 4096, "keep": 1}) as (send, _):
            send(*[1] * 9)
            old = (tmp_path / "log.1").read_text()
            with (tmp_path / "log.1").open() as theirs:
                fcntl.flock(theirs, fcntl.LOCK_EX)
                send(*[1] * 30)
                assert (tmp_path / "log.1").read_text() == old
            send(1)
            assert (tmp_path / "log.1").read_text() != old
        assert capsys.readouterr().err.count(f"cannot rotate {tmp_path}/log: another process has locked log.1; it grows") == 1

    def test_what_a_killed_agent_has_left_of_a_compression_is_removed(self, tmp_path):
        dead, alive = f"log.3.gz.{2**22 + 1}-7.tmp", f"log.3.gz.{os.getpid()}-7.tmp"
        for name in (dead, alive, "log.1", "log.x.gz.1-1.tmp"):
            (tmp_path / name).write_text("x")
        traceleft.compress_log(f"{tmp_path}/log.1", "log.1")
        assert {path.name for path in tmp_path.iterdir()} == {alive, "log.1.gz", "log.x.gz.1-1.tmp"}

    @pytest.mark.parametrize("written", [0, 30, None])
    def test_an_error_after_something_was_written(self, tmp_path, monkeypatch, written):
        """As on a file system that is synchronous: nothing doubled, nothing in halves."""
        write, failures = os.write, [1, 1]

        def fail(fd, data):
            if fd > 2 and failures:
                failures.pop()
                write(fd, data[:written])
                raise OSError(5, "Input/output error")
            return write(fd, data)
        with self.running(tmp_path / "log") as (send, _):
            send(1)
            monkeypatch.setattr(os, "write", fail)
            send(2, 3, 4)
        assert self.counts(tmp_path / "log") == [1, 2, 3, 4]

    def test_at_the_end_it_is_tried_as_long_as_it_helps(self, tmp_path, monkeypatch):
        write, turn = os.write, itertools.count()

        def every_other(fd, data):
            if fd > 2 and next(turn) % 2:
                raise OSError(5, "Input/output error")
            return write(fd, data)
        with self.running(tmp_path / "log") as (send, aggregator):
            monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data) if fd <= 2 else every_other(1000, b""))
            send(*range(1, 101))
            assert len(aggregator.channels["1"].waiting) == 100
            monkeypatch.setattr(os, "write", every_other)
        assert self.counts(tmp_path / "log") == list(range(1, 101))

    @pytest.mark.parametrize("gzip", [False, True])
    @pytest.mark.skipif(os.geteuid() != 0, reason="makes files of another user")
    def test_names_that_others_have_taken_are_left_out(self, tmp_path, monkeypatch, capsys, gzip):
        """A folder, and in a folder such as /tmp another user's file, which a root without CAP_FOWNER cannot rename."""
        folder = tmp_path / "shared"
        folder.mkdir()
        folder.chmod(0o1777)
        os.chown(folder, 1, 1)
        for name in ("log.1", "log.4"):
            (folder / name).mkdir()
            (folder / name / "inner").touch()
        for name in ("log.2.gz", "log.5"):
            (folder / name).write_text("theirs")
            os.chown(folder / name, 1, 1)
        with self.running(folder / "log", rotate={"max_bytes": 4096, "keep": 2, "gzip": gzip}) as (send, aggregator):
            for number in range(1, 61):
                send(number)
                rotation = aggregator.channels["1"].rotation
                if rotation.thread:
                    rotation.thread.join(DEADLINE)
        own = [f"log.{n}{'.gz' if gzip else ''}" for n in (6, 3)]
        assert {path.name for path in folder.iterdir()} == {"log", *own, "log.1", "log.4", "log.2.gz", "log.5"}
        texts = [importlib.import_module("gzip").decompress((folder / name).read_bytes()) if gzip else (folder / name).read_bytes()
                 for name in own] + [(folder / "log").read_bytes()]
        counts = [json.loads(line)["count"] for text in texts for line in text.splitlines()]
        assert counts == list(range(61 - len(counts), 61)) and len(counts) > 15
        assert capsys.readouterr().err == "" and (folder / "log.5").read_text() == "theirs"

    def test_without_a_name_that_is_free_it_is_said(self, tmp_path, capsys):
        for number in range(1, 3 + traceleft.MAX_TAKEN):
            (tmp_path / f"log.{number}").mkdir()
        with self.running(tmp_path / "log", rotate={"max_bytes": 4096, "keep": 2}) as (send, _):
            send(*[1] * 40)
        assert self.counts(tmp_path / "log") == [1] * 40
        assert capsys.readouterr().err == (f"traceleft: cannot rotate {tmp_path}/log: others have taken the names of its old files; "
                                           "it grows beyond its 4096 bytes until it can be\n")

    @pytest.mark.parametrize("gzip", [False, True])
    def test_rotates_what_a_symlink_leads_to(self, tmp_path, gzip):
        (tmp_path / "real").mkdir()
        (tmp_path / "log").symlink_to("real/file")
        with self.running(tmp_path / "log", rotate={"max_bytes": 4096, "keep": 100, "gzip": gzip}) as (send, aggregator):
            for number in range(1, 41):
                send(number)
                rotation = aggregator.channels["1"].rotation
                if rotation.thread:
                    rotation.thread.join(DEADLINE)
        texts = [importlib.import_module("gzip").decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
                 for path in (tmp_path / "real").iterdir()]
        assert sorted(json.loads(line)["count"] for text in texts for line in text.splitlines()) == list(range(1, 41))
        assert len(texts) > 3 and {path.name for path in tmp_path.iterdir()} == {"log", "real"} and (tmp_path / "log").is_symlink()

    def test_a_rotation_that_fails_loses_nothing(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(OSError(1, "not today")))
        with self.running(tmp_path / "log", rotate={"max_bytes": 4096}) as (send, _):
            send(*[1] * 40)
        assert self.counts(tmp_path / "log") == [1] * 40
        assert capsys.readouterr().err.count("cannot rotate") == 1

    def test_the_next_alert_says_what_was_lost(self):
        class Failing(ListChannel, traceleft.Channel):
            def send(self, alert):
                super().send(alert)
                account = self.accounts[alert.filter.id]
                if len(self.alerts) < 3:
                    account.lose_alert("test", alert.count, alert.lost)
                else:
                    account.deliver(alert.count)
        channel = Failing()
        aggregator = Aggregator(a_spec(), {"1": channel})
        channel.accounts = aggregator.accounts
        for second in range(4):
            aggregator.add(an_open())
            aggregator.tick(float(second))
        assert [alert.lost for alert in channel.alerts] == [0, 1, 2, 0]  # the second could not tell
        assert aggregator.summary()["balanced"]


class TestStdoutChannel:
    """The path `-`, in a process whose stdout is a pipe."""

    SENDER = """import sys, time, traceleft
        aggregator = traceleft.Aggregator({"channels": [{"id": "1", "type": "file", "path": "-"}], "events": [
            {"name": "open", "channel": "1", "function": {"id": "sigma"}, "output": {"metrics": "alerts_per_sec", "format": "json"}}]})
        for second in range(int(sys.argv[1])):
            aggregator.add(traceleft.make_event("open", "x" * 3000))
            aggregator.flush(float(second))
            if aggregator.ended:
                break
        aggregator.close()
        print(aggregator.summary(), second, file=sys.stderr)"""

    def sender(self, seconds, stdout=subprocess.PIPE):
        return subprocess.Popen([sys.executable, "-c", textwrap.dedent("        " + self.SENDER), str(seconds)], cwd=HERE,
                                stdout=stdout, stderr=subprocess.PIPE, text=True)

    def test_writes_all_to_a_slow_reader(self):
        process = self.sender(200)
        assert "its reader is slow" in process.stderr.readline()
        output, errors = process.communicate(timeout=DEADLINE)
        assert len([json.loads(line) for line in output.splitlines()]) == 200
        assert "'lost': {}" in errors

    def test_a_closed_pipe_ends_the_run(self):
        process = self.sender(1_000_000)
        process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read()
        process.stderr.close()
        assert process.wait(DEADLINE) == 0
        assert "nobody reads stdout any more: the run ends" in errors and "'balanced': True" in errors

    @pytest.mark.live
    @pytest.mark.skipif(live[1].args[0], reason=live[1].kwargs["reason"])
    def test_a_closed_pipe_ends_a_live_run(self, tmp_path):
        spec = a_spec(f"filename == '{tmp_path}/f'", channel={"id": "1", "type": "file", "path": "-"})
        with Agent("trace", "--spec", write_spec(tmp_path / "spec", spec)) as agent:
            (tmp_path / "f").touch()
            assert json.loads(agent.process.stdout.readline())["count"] == 1
            agent.process.stdout.close()
            assert agent.process.wait(DEADLINE) == 0
            wait_until(lambda: any("balanced" in line for line in agent.stderr), "the accounting")

    def test_a_file_gets_one_write_a_record(self, tmp_path):
        with (tmp_path / "out").open("w") as out:
            process = self.sender(5, out)
            assert "'lost': {}" in process.communicate(timeout=DEADLINE)[1]
        assert len([json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]) == 5


@pytest.fixture(scope="session")
def generated(tmp_path_factory):
    """What grpcio-tools makes of proto/ alone: (messages, services)."""
    folder = tmp_path_factory.mktemp("generated")
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", f"-I{HERE / 'proto'}", f"--python_out={folder}",
                    f"--grpc_python_out={folder}", "metric_collector.proto"], check=True)
    sys.path.insert(0, str(folder))
    yield importlib.import_module("metric_collector_pb2"), importlib.import_module("metric_collector_pb2_grpc")
    sys.path.remove(str(folder))


class ProtoServer:
    """A collector made from proto/ alone, such as others have."""

    def __init__(self, generated, port=0, credentials=None, delay=0.0, failures=0, delay_each=0.0):
        self.messages, services = generated
        self.streams, self.delay, self.failures, self.metadata, self.tried = [], delay, failures, [], 0
        outer = self

        class Servicer(services.MetricCollectorServicer):
            def Process(self, stream, context):
                outer.tried += 1
                outer.metadata.append(dict(context.invocation_metadata()))
                metrics = list(stream)
                time.sleep(outer.delay + delay_each * len(metrics))
                if outer.failures:
                    outer.failures -= 1
                    context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "not now")
                outer.streams.append(metrics)
                return outer.messages.Empty()

        self.server = grpc.server(futures.ThreadPoolExecutor(2), options=[("grpc.so_reuseport", 0)])
        services.add_MetricCollectorServicer_to_server(Servicer(), self.server)
        address = f"localhost:{port}"
        self.port = (self.server.add_secure_port(address, credentials) if credentials
                     else self.server.add_insecure_port(address))
        self.server.start()

    @property
    def metrics(self):
        return [metric for stream in self.streams for metric in stream]

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.server.stop(None).wait()


def grpc_spec(port, options=None, **more):
    channel = {"id": "1", "type": "grpc", "path": f"localhost:{port}", **(options or {})}
    return a_spec(format="collector_spec_pb", channel=channel, **more)


@pytest.fixture(scope="session")
def certificates(tmp_path_factory):
    """A folder of PEM files: two CAs, and what they have signed. NAME.pem has its key in NAME.key."""
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*arguments):
        subprocess.run(["openssl", *arguments], check=True, cwd=folder, capture_output=True)

    new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    for name in ("ca", "other-ca"):
        openssl("req", "-x509", *new_key, "-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN={name}")
    for name, host, days, ca in (("server", "localhost", 2, "ca"), ("expired", "localhost", -1, "ca"), ("elsewhere", "elsewhere.test", 2, "ca"),
                                 ("client", "client", 2, "ca"), ("foreign", "localhost", 2, "other-ca")):
        (folder / "extension").write_text(f"subjectAltName=DNS:{host}\n")
        openssl("req", *new_key, "-keyout", f"{name}.key", "-out", "request", "-subj", f"/CN={host}")
        openssl("x509", "-req", "-in", "request", "-CA", f"{ca}.pem", "-CAkey", f"{ca}.key", "-out", f"{name}.pem", "-days", str(days),
                "-extfile", "extension", "-CAcreateserial")
    return folder


def server_credentials(folder, name="server", clients=False):
    pair = (folder / f"{name}.key").read_bytes(), (folder / f"{name}.pem").read_bytes()
    return grpc.ssl_server_credentials([pair], (folder / "ca.pem").read_bytes() if clients else None, clients)


def free_port():
    with socket.socket() as reserved:
        reserved.bind(("localhost", 0))
        return reserved.getsockname()[1]


class Proxy:
    """Forwards connections to a port of this host, counting bytes; while it is frozen nothing comes through."""

    def __init__(self, port, frozen=False):
        self.port, self.frozen, self.bytes, self.connections = port, frozen, 0, 0
        self.mute = 0  # of so many connections, the first ones, no answer comes through
        self.listener = socket.create_server(("localhost", 0))
        self.address = self.listener.getsockname()[1]
        self.open = [self.listener]
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                self.connections += 1
                try:
                    server = socket.create_connection(("localhost", self.port))
                except OSError:
                    client.close()
                    continue
                self.open += [client, server]
                for source, target, number in ((client, server, sys.maxsize), (server, client, self.connections)):
                    threading.Thread(target=self.forward, args=(source, target, number), daemon=True).start()

    def forward(self, source, target, number):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                while self.frozen:
                    time.sleep(0.01)
                if number <= self.mute:
                    continue
                self.bytes += len(data)
                target.sendall(data)
        with contextlib.suppress(OSError):  # a reset ends it as well
            target.shutdown(socket.SHUT_RDWR)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for one in self.open:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


class TestWire:
    def test_the_readable_contract_and_the_built_one_are_the_same(self, generated):
        wire = traceleft.build_wire()
        built = wire["Metric"].DESCRIPTOR.file
        written = generated[0].DESCRIPTOR

        def shape(file):
            return {name: [(f.name, f.number, f.type, f.is_repeated, f.message_type.name if f.message_type else None)
                           for f in message.fields] for name, message in file.message_types_by_name.items()}

        assert shape(built) == shape(written)
        assert built.package == written.package == "tracer"
        method = written.services_by_name["MetricCollector"].methods_by_name["Process"]
        assert f"/{method.containing_service.full_name}/{method.name}" == traceleft.WIRE_METHOD
        assert (method.input_type.name, method.output_type.name) == ("Metric", "Empty")

    def test_the_contracts_numbers(self):
        fields = {f.name: f.number for f in traceleft.build_wire()["Metric"].DESCRIPTOR.fields if f.number < 100}
        assert fields == {
            "Count": 1, "CommonEvent": 2, "ConnectV4Event": 3, "ConnectV6Event": 4, "ChmodEvent": 5, "ChownEvent": 6,
            "CloseEvent": 7, "FchmodEvent": 8, "FchmodatEvent": 9, "FchownEvent": 10, "FchownatEvent": 11,
            "MkdirEvent": 12, "MkdiratEvent": 13, "OpenEvent": 14, "ReadEvent": 15, "WriteEvent": 16}

    EVENTS = [
        (make_event("open", "/\udcff", 577, 438), {"filename": b"/\xff", "flags": 577, "mode": 438}),
        (make_event("close", -1), {"fd": 2**64 - 1}),
        (make_event("read", 3, "\udc80x", 2**64 - 1), {"fd": 3, "buf": b"\x80x", "count": -1}),
        (make_event("write", 3, "x", 1), {"fd": 3, "buf": b"x", "count": 1}),
        (make_event("mkdir", "d", 0o755), {"pathname": b"d", "mode": 0o755}),
        (make_event("mkdirat", -100, "d", 0o755), {"dfd": -100, "pathname": b"d", "mode": 0o755}),
        (make_event("chmod", "f", 0o4755), {"filename": b"f", "mode": 0o4755}),
        (make_event("fchmod", 3, 0o600), {"fd": 3, "mode": 0o600}),
        (make_event("fchmodat", 5, "f", 0o600), {"dfd": 5, "filename": b"f", "mode": 0o600}),
        (make_event("chown", "f", 2**32 - 1, 2), {"filename": b"f", "user": 2**32 - 1, "group": 2}),
        (make_event("fchown", 3, 1, 2), {"fd": 3, "user": 1, "group": 2}),
        (make_event("fchownat", -100, "f", 1, 2, 256), {"dfd": -100, "filename": b"f", "user": 1, "group": 2, "flag": 256}),
        *((make_event(f"{kind}_v4", "127.0.0.1", "10.0.0.2", 5, 6, 7),  # as struct in_addr: in network byte order
           {"Saddr": struct.unpack("=I", socket.inet_aton("127.0.0.1"))[0],
            "Daddr": struct.unpack("=I", socket.inet_aton("10.0.0.2"))[0], "Sport": 5, "Dport": 6, "Netns": 7})
          for kind in ("connect", "accept", "close")),
        *((make_event(f"{kind}_v6", "::1", "2001:db8::2", 5, 6, 7),
           {"Saddr": "::1", "Daddr": "2001:db8::2", "Sport": 5, "Dport": 6, "Netns": 7}) for kind in ("connect", "accept", "close")),
    ]

    @pytest.mark.parametrize("event, fields", EVENTS, ids=[event.name for event, _ in EVENTS])
    def test_every_event_type(self, generated, event, fields):
        event = event._replace(ret=-2, pid=7, tid=8, ppid=9, uid=10, gid=11, comm="c\udcff", program_id=12,
                               timestamp_ns=13, incomplete=1, path="/p", path_unresolved=True, files=("/f", ""), euid=14,
                               exe="/e", cgroup="/docker/" + "a" * 64, mntns=15, netns=16, pidns=17)
        spec = parse_spec(grpc_spec(1, name=event.name)).filters[0]
        alert = traceleft.Alert(spec, 1.5, 20, 30, 40, event)
        metric = generated[0].Metric.FromString(traceleft.encode_metric(traceleft.build_wire(), alert, "agent/1", 50))
        message = getattr(metric, event.type.message.replace("Protobuf", ""))
        assert {name: getattr(message, name) for name in fields} == fields
        common = metric.CommonEvent
        assert (common.Timestamp, common.Pid, common.Ret, common.Name, common.Hash, common.Flags) == (
            13, 7, -2, event.name, event.hash, 1 | 8)
        assert (common.Tid, common.Ppid, common.Uid, common.Gid, common.Comm, common.ProgramID, common.Path) == (
            8, 9, 10, 11, b"c\xff", 12, b"/p")
        assert (common.Euid, common.Exe, common.Cgroup, common.Container, common.Mntns, common.Netns, common.Pidns) == (
            14, b"/e", b"/docker/" + b"a" * 64, "a" * 64, 15, 16, 17)
        assert list(common.Files) == [b"/f", b""][:len(event.type.descriptors)]
        assert (metric.Count, metric.Matched, metric.Lost, metric.Host, metric.Filter, metric.Stream, metric.Group,
                metric.Metrics, metric.Time, metric.Agent, metric.Sequence) == (
            20, 30, 40, socket.gethostname(), f"{event.name}-0", "s", "g", "alerts_per_sec", 1.5, "agent/1", 50)

    def test_an_alert_without_its_sample_says_so(self, generated):
        spec = parse_spec(grpc_spec(1)).filters[0]
        alert = traceleft.Alert(spec, 1.5, 20, 30, 0, None)
        metric = generated[0].Metric.FromString(traceleft.encode_metric(traceleft.build_wire(), alert, "a", 1))
        assert (metric.Count, metric.CommonEvent.Name, metric.CommonEvent.Flags, metric.CommonEvent.Pid) == (20, "open", 4, 0)
        assert json.loads(traceleft.format_json(alert))["sample"] is None
        assert traceleft.format_text(alert).splitlines()[1].startswith("EVENT: {Timestamp:0 ProgramID:0 Pid:0 Ret:0 Name:open Hash:")
        assert " Flags:4} " in traceleft.format_text(alert)

    def test_any_other_syscall_is_a_list_of_its_arguments(self, generated):
        event = make_event("prctl", 15, 2**64 - 1, 3, 4, 5)
        spec = parse_spec(grpc_spec(1, name="prctl")).filters[0]
        data = traceleft.encode_metric(traceleft.build_wire(), traceleft.Alert(spec, 1.5, 1, 1, 0, event), "a", 1)
        arguments = generated[0].Metric.FromString(data).SyscallEvent.Arguments
        assert [(a.Name, a.Integer) for a in arguments] == [("option", 15), ("arg2", -1), ("arg3", 3), ("arg4", 4), ("arg5", 5)]

    def test_every_event_type_with_a_message_is_in_the_table_above(self):
        assert {event.name for event, _ in self.EVENTS} == {kind.name for kind in EVENT_TYPES.values() if kind.metric_field}


def read_segment(path):
    """As read_spooled() of a file in a spool."""
    return traceleft.read_spooled(path.read_bytes(), bytes.fromhex(path.stem.partition("-")[2]))


class TestSpool:
    @staticmethod
    def entry(number, size=100):
        return traceleft.Queued(0, number, 0, bytes([number % 256]) * size)

    @contextlib.contextmanager
    def opened(self, path, max_bytes=1 << 20):
        spool = traceleft.Spool(str(path), max_bytes)
        spool.open()
        try:
            yield spool
        finally:
            spool.close()

    @staticmethod
    def numbers(spool, limit=10**6):
        return [entry.events for entry in spool.head(limit)]

    def test_first_in_first_out_across_runs(self, tmp_path):
        with self.opened(tmp_path / "s") as spool:
            assert all(spool.append(self.entry(number)) for number in range(5))
            assert self.numbers(spool) == [0, 1, 2, 3, 4]
            assert self.numbers(spool, 3) == [0, 1, 2]
            spool.pop(2)
        with self.opened(tmp_path / "s") as spool:
            assert spool.waiting == 3 and spool.append(self.entry(5))
            assert self.numbers(spool) == [2, 3, 4, 5]
            assert [entry.owner for entry in spool.head(9)] == [traceleft.EARLIER] * 3 + [0]
            assert dict(spool.pending) == {traceleft.EARLIER: 9, 0: 5}
            spool.pop(4)
            assert (spool.waiting, self.numbers(spool)) == (0, [])
        with self.opened(tmp_path / "s") as spool:
            assert spool.waiting == 0
        assert all(path.stat().st_mode & 0o777 == 0o600 for path in (tmp_path / "s").iterdir())
        assert (tmp_path / "s").stat().st_mode & 0o777 == 0o700

    def test_what_is_acknowledged_is_removed(self, tmp_path):
        with self.opened(tmp_path / "s", 65536) as spool:
            for number in range(5000):
                assert spool.append(self.entry(number))
                if number % 10 == 9:
                    spool.head(10)
                    spool.pop(10)
            assert spool.waiting == 0
        assert sum(path.stat().st_size for path in (tmp_path / "s").iterdir()) <= 65536 // 2

    def test_is_bounded(self, tmp_path):
        with self.opened(tmp_path / "s", 65536) as spool:
            taken = [spool.append(self.entry(number)) for number in range(1000)]
            assert taken.index(False) == 65536 // self.size and not any(taken[taken.index(False):])
            assert spool.waiting == sum(taken)
            assert len(list((tmp_path / "s").glob("*.spool"))) == 5  # also when it was asked again and again

    MARK = b"12345678"
    size = len(traceleft.pack_spooled(traceleft.Queued(0, 0, 0, bytes(100)), MARK))

    def test_a_record_that_was_cut_short_is_not_sent(self, tmp_path, capsys):
        """At every byte of the last of three records."""
        with self.opened(tmp_path / "s") as spool:
            for number in range(3):
                spool.append(self.entry(number))
        (segment,) = (tmp_path / "s").glob("*.spool")
        data = segment.read_bytes()
        assert len(data) == 3 * self.size
        for left in range(2 * self.size, 3 * self.size):
            segment.write_bytes(data[:left])
            with self.opened(tmp_path / "s") as spool:
                assert self.numbers(spool) == [0, 1]
            assert segment.stat().st_size == left  # what an earlier run has written stays as it is
        said = capsys.readouterr().err
        assert said.count("bytes behind the last whole record of a segment are left out") == self.size - 1 and "damaged" not in said

    @settings(max_examples=300, deadline=None)
    @given(st.integers(0, 3 * 132 - 1), st.integers(1, 255))
    def test_a_record_that_was_changed_is_not_sent(self, place, flip):
        """And the others are."""
        data = bytearray(b"".join(traceleft.pack_spooled(self.entry(number), self.MARK) for number in range(3)))
        data[place % len(data)] ^= flip
        found = [entry.events for _, entry in traceleft.read_spooled(bytes(data), self.MARK) if entry is not None]
        assert found == [number for number in range(3) if number != place % len(data) // self.size]

    @settings(max_examples=200, deadline=None)
    @given(st.binary(max_size=200))
    def test_any_bytes_can_be_read(self, data):
        assert [entry for _, entry in traceleft.read_spooled(self.MARK + data, self.MARK) if entry is not None] == []

    def test_zeros_that_a_crash_leaves_behind_are_no_records(self, tmp_path):
        assert list(traceleft.read_spooled(bytes(4096), self.MARK)) == []
        with self.opened(tmp_path / "s") as spool:
            spool.append(self.entry(7))
        (segment,) = (tmp_path / "s").glob("*.spool")
        segment.write_bytes(segment.read_bytes() + bytes(4096))
        with self.opened(tmp_path / "s") as spool:
            assert self.numbers(spool) == [7] and spool.sizes == {1: self.size}
            assert spool.append(self.entry(8)) and self.numbers(spool) == [7, 8]

    def test_a_damaged_record_is_left_out_and_said(self, tmp_path, capsys):
        """What is behind it is sent. A record that an event has in its data is none."""
        forged = traceleft.pack_spooled(self.entry(666), self.MARK)
        with self.opened(tmp_path / "s") as spool:
            for number in range(5):
                spool.append(self.entry(number)._replace(data=forged))
        (segment,) = (tmp_path / "s").glob("*.spool")
        data = bytearray(segment.read_bytes())
        for number in (1, 3):
            data[len(data) // 5 * number + 10] ^= 1
        segment.write_bytes(data)
        with self.opened(tmp_path / "s") as spool:
            assert self.numbers(spool) == [0, 2, 4] and dict(spool.pending) == {traceleft.EARLIER: 6}
            spool.pop(2)
            assert self.numbers(spool) == [4]
        with self.opened(tmp_path / "s") as spool:
            assert self.numbers(spool) == [4]
        assert capsys.readouterr().err == "".join(
            f"traceleft: {tmp_path}/s: {length} bytes between records of an earlier run are damaged, and are left out\n"
            for length in (2 * len(data) // 5, len(data) // 5))

    @pytest.mark.parametrize("place, length", [(0, 1), (0, 512), (0, 4096), (40000, 4096)])
    def test_damage_anywhere_costs_what_it_hits(self, tmp_path, place, length, capsys):
        with self.opened(tmp_path / "s") as spool:
            for number in range(500):
                spool.append(self.entry(number))
        (segment,) = (tmp_path / "s").glob("*.spool")
        data = segment.read_bytes()
        segment.write_bytes(data[:place] + bytes(length) + data[place + length:])
        hit = range(place // self.size, (place + length - 1) // self.size + 1)
        with self.opened(tmp_path / "s") as spool:
            assert self.numbers(spool) == [number for number in range(500) if number not in hit]
            assert spool.waiting == 500 - len(hit)
        assert f"{len(hit) * self.size} bytes between records of an earlier run are damaged" in capsys.readouterr().err

    def test_a_bound_that_is_lowered(self, tmp_path):
        """What is acknowledged then makes room, be it more than all that is allowed now."""
        with self.opened(tmp_path / "s", 1 << 22) as spool:
            for number in range(2000):
                spool.append(self.entry(number))
        with self.opened(tmp_path / "s", 65536) as spool:
            assert not spool.append(self.entry(1))
            spool.head(2000)
            spool.pop(1999)
            assert not spool.append(self.entry(1))
            spool.head(1)
            spool.pop(1)
            for number in range(600):
                assert spool.append(self.entry(number)) and self.numbers(spool) == [number]
                spool.pop(1)
            spool.append(self.entry(7))
        assert sum(path.stat().st_size for path in (tmp_path / "s").glob("*.spool")) <= 65536
        with self.opened(tmp_path / "s", 65536) as spool:
            assert self.numbers(spool) == [7]

    @pytest.mark.parametrize("what", ["a segment", "all of it", "unreadable"])
    def test_what_somebody_has_removed(self, tmp_path, monkeypatch, capsys, what):
        """The rest is sent, what is gone is counted, and what comes is spooled again."""
        monkeypatch.setattr(traceleft, "CLOSE_TIMEOUT", 5.0)
        monkeypatch.setattr(traceleft, "BACKOFF_MAX", 0.2)
        spec = grpc_spec(1, {"spool": {"dir": f"{tmp_path}/s", "max_bytes": 65536}})
        collector = traceleft.Collector("127.0.0.1:0")
        port = collector.port
        spec["channels"][0]["path"] = f"127.0.0.1:{port}"
        collector.stop()
        aggregator = Aggregator(spec, insecure=True)

        def opens(count):
            for second in range(count):
                aggregator.add(an_open())
                aggregator.flush(float(second))
        opens(200)
        segments = sorted((tmp_path / "s").glob("*.spool"))
        assert len(segments) >= 3
        gone = sum(1 for path in (segments if what == "all of it" else segments[1:2]) for _ in read_segment(path))
        if what == "unreadable":
            read = traceleft.Spool.read
            monkeypatch.setattr(traceleft.Spool, "read", lambda spool, segment, *more: read(spool, segment, *more) if segment != 2
                                else (_ for _ in ()).throw(OSError(5, "Input/output error")))
        elif what == "a segment":
            segments[1].unlink()
        else:
            shutil.rmtree(tmp_path / "s")
        opens(10)
        assert list((tmp_path / "s").glob("*.spool"))
        collector = traceleft.Collector(f"127.0.0.1:{port}")
        try:
            wait_until(lambda: not len(aggregator.channels["1"].backlog), "what is left")
            aggregator.close()
        finally:
            collector.stop()
        account = aggregator.accounts["open-0"]
        assert (account.delivered, account.lost) == (210 - gone, {"spool_damaged": gone}) and aggregator.summary()["balanced"]
        assert f"{gone} records are damaged or gone, and are lost" in capsys.readouterr().err

    def test_a_segment_that_cannot_be_read_at_the_start(self, tmp_path, monkeypatch, capsys):
        with self.opened(tmp_path / "s", 65536) as spool:
            for number in range(200):
                spool.append(self.entry(number))
        read = traceleft.Spool.read
        monkeypatch.setattr(traceleft.Spool, "read", lambda spool, segment, *more: read(spool, segment, *more) if segment != 1
                            else (_ for _ in ()).throw(OSError(5, "Input/output error")))
        with self.opened(tmp_path / "s", 65536) as spool:
            assert 0 < spool.waiting < 200 and self.numbers(spool)[-1] == 199
        assert "a segment cannot be read (Input/output error), and is left out" in capsys.readouterr().err

    def test_a_record_that_is_larger_than_all_of_it(self, tmp_path):
        with self.opened(tmp_path / "s", 65536) as spool:
            assert not spool.append(self.entry(1, 70000)) and spool.append(self.entry(2))

    def test_what_fails_while_it_is_opened_leaves_no_lock(self, tmp_path):
        (tmp_path / "s/cursor").mkdir(parents=True)
        (tmp_path / "s").chmod(0o700)
        spec = grpc_spec(free_port(), {"spool": {"dir": f"{tmp_path}/s"}})
        with pytest.raises(traceleft.TraceleftError, match="Is a directory") as caught:
            Aggregator(spec, insecure=True)
        (tmp_path / "s/cursor").rmdir()
        Aggregator(spec, insecure=True).close()
        assert caught  # whose traceback has the first one still

    def test_what_is_damaged_during_the_run_is_counted(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(traceleft, "CLOSE_TIMEOUT", 0.2)
        collector = traceleft.Collector("127.0.0.1:0")
        port, spec = collector.port, grpc_spec(1, {"spool": {"dir": f"{tmp_path}/s"}})
        spec["channels"][0]["path"] = f"127.0.0.1:{port}"
        collector.stop()
        aggregator = Aggregator(spec, insecure=True)
        for second in range(3):
            for _ in range(second + 1):
                aggregator.add(an_open())
            aggregator.flush(float(second))
        wait_until(lambda: aggregator.channels["1"].figures()["failures"], "an attempt")
        (segment,) = (tmp_path / "s").glob("*.spool")
        data = bytearray(segment.read_bytes())
        data[len(data) // 2] ^= 1
        segment.write_bytes(data)
        collector = traceleft.Collector(f"127.0.0.1:{port}")
        try:
            wait_until(lambda: not len(aggregator.channels["1"].backlog), "what is left")
            aggregator.close()
        finally:
            collector.stop()
        account = aggregator.accounts["open-0"]
        assert (account.delivered, account.lost) == (4, {"spool_damaged": 2}) and aggregator.summary()["balanced"]
        assert "1 records are damaged or gone, and are lost" in capsys.readouterr().err

    def test_a_torn_cursor_sends_twice_and_leaves_nothing_out(self, tmp_path):
        with self.opened(tmp_path / "s") as spool:
            for number in range(3):
                spool.append(self.entry(number))
            spool.head(2)
            spool.pop(2)
        cursor = (tmp_path / "s/cursor").read_bytes()
        for data in (b"", cursor[:-1], cursor[:-1] + b"!", bytes(20)):
            (tmp_path / "s/cursor").write_bytes(data)
            with self.opened(tmp_path / "s") as spool:
                assert self.numbers(spool) == [0, 1, 2]

    def test_a_full_disk_and_a_free_one(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(traceleft, "SPOOL_RETRY", 0.0)
        room = TestFileChannel().disk(monkeypatch)
        with self.opened(tmp_path / "s") as spool:
            assert spool.append(self.entry(1))
            room[0] = 50
            assert not spool.append(self.entry(2)) and not spool.append(self.entry(3))
            assert self.numbers(spool) == [1]
            room[0] = None
            assert spool.append(self.entry(4))
            assert self.numbers(spool) == [1, 4] and len(list((tmp_path / "s").glob("*.spool"))) == 1
        with self.opened(tmp_path / "s") as spool:
            assert self.numbers(spool) == [1, 4]
        assert capsys.readouterr().err == (
            f"traceleft: cannot write to the spool {tmp_path}/s: No space left on device; alerts are kept in memory, and written "
            f"when it works again\ntraceleft: writing to the spool {tmp_path}/s works again\n")

    def test_an_error_that_stays_is_not_met_for_every_alert(self, tmp_path, monkeypatch):
        with self.opened(tmp_path / "s") as spool:
            monkeypatch.setattr(spool, "write", lambda entry: (_ for _ in ()).throw(OSError(5, "Input/output error")))
            assert not spool.append(self.entry(1))
            monkeypatch.setattr(spool, "write", lambda entry: pytest.fail("tried again at once"))
            assert not spool.append(self.entry(2))

    @settings(max_examples=300, deadline=None)
    @given(st.lists(st.sampled_from(("append", "head", "pop", "fail", "work"))))
    def test_whatever_fails_in_between_the_order_stays(self, steps):
        """Memory and disk in turn, with a batch on its way from either."""
        with tempfile.TemporaryDirectory() as folder, self.opened(f"{folder}/s") as spool:
            backlog, write, sent, taken, number = traceleft.Backlog(spool), spool.write, [], [], 0
            for step in [*steps, "work", "append", "head", "pop", "head", "pop"]:
                spool.retry_at = None
                if step == "append":
                    number += 1
                    assert backlog.append(self.entry(number))
                elif step == "head":
                    taken = [entry.events for entry in backlog.head(3 if len(steps) % 2 else 1000)]
                elif step == "pop":
                    backlog.pop(len(taken))
                    sent, taken = sent + taken, []
                else:
                    def fail(_):
                        raise OSError(5, "Input/output error")
                    spool.write = fail if step == "fail" else write
            sent += [entry.events for entry in backlog.head(1000)]
            assert sent == list(range(1, number + 1)) and not backlog.memory

    def test_gets_to_the_disk_while_the_collector_is_away_and_at_the_end(self, tmp_path, monkeypatch):
        """All that has been written, for which the host may crash then."""
        synced, sync = [], os.fdatasync

        def segment():
            """Its size; there is one, after what an earlier run left."""
            return max(tmp_path.glob("*.spool")).stat().st_size

        def note(fd):
            if os.readlink(f"/proc/self/fd/{fd}").endswith(".spool"):
                synced.append(os.fstat(fd).st_size)
            sync(fd)

        monkeypatch.setattr(os, "fdatasync", note)
        monkeypatch.setattr(traceleft, "CLOSE_TIMEOUT", 0.0)
        aggregator = Aggregator(grpc_spec(free_port(), {"spool": {"dir": str(tmp_path)}}), insecure=True)
        for number in range(2):
            aggregator.add(an_open())
            aggregator.flush(number)
            wait_until(lambda: segment() in synced, "a sync")
        aggregator.close()
        with self.opened(tmp_path) as spool:
            spool.append(self.entry(0, 1000))
            assert segment() not in synced
        assert segment() in synced

    def test_belongs_to_one_process(self, tmp_path):
        with self.opened(tmp_path / "s"), pytest.raises(traceleft.TraceleftError, match="another agent or channel uses it"):
            Aggregator(grpc_spec(1, {"spool": {"dir": f"{tmp_path}/s"}}), insecure=True)

    def test_kill_9_while_writing(self, tmp_path):
        """Whole records in order, whenever it dies."""
        code = f"""if True:
            import traceleft
            spool = traceleft.Spool({str(tmp_path / "s")!r}, 1 << 30)
            spool.open()
            number = 0
            while True:
                spool.append(traceleft.Queued(0, number, 0, b"x" * 5000))
                number += 1
                if number == 100:
                    print("running", flush=True)"""
        for _ in range(3):
            process = subprocess.Popen([sys.executable, "-c", code], cwd=HERE, stdout=subprocess.PIPE)
            process.stdout.readline()
            process.kill()
            process.communicate(timeout=DEADLINE)
            with self.opened(tmp_path / "s", 1 << 30) as spool:
                numbers = self.numbers(spool)
                assert numbers == list(range(len(numbers))) and len(numbers) >= 100
                spool.pop(len(numbers))


class TestGrpcChannel:
    def run_seconds(self, port, seconds, spec=None):
        aggregator = Aggregator(spec or grpc_spec(port), insecure=True)
        for second in range(seconds):
            aggregator.add(an_open())
            aggregator.add(an_open())
            aggregator.tick(float(second))
        return aggregator

    def test_one_acknowledged_stream_a_tick(self, generated):
        with ProtoServer(generated) as server:
            aggregator = Aggregator(grpc_spec(server.port), insecure=True)
            for second in range(3):
                aggregator.add(an_open())
                aggregator.tick(float(second))
                wait_until(lambda wanted=second + 1: len(server.streams) == wanted, "a stream of its own")
            aggregator.close()
        assert [[metric.Count for metric in stream] for stream in server.streams] == [[1], [1], [1]]
        assert aggregator.summary()["balanced"] and aggregator.accounts["open-0"].delivered == 3

    def test_what_is_not_acknowledged_is_sent_again(self, generated, capsys):
        with ProtoServer(generated, failures=2) as server:
            aggregator = self.run_seconds(server.port, 3)
            wait_until(lambda: sum(metric.Count for metric in server.metrics) == 6, "all alerts")
            aggregator.close()
        assert aggregator.accounts["open-0"].delivered == 6 and aggregator.summary()["balanced"]
        err = capsys.readouterr().err
        assert "RESOURCE_EXHAUSTED: not now; alerts are kept and sent again" in err
        assert "acknowledges again" in err

    def test_a_collector_that_comes_late_gets_everything(self, generated):
        with socket.socket() as reserved:
            reserved.bind(("localhost", 0))
            port = reserved.getsockname()[1]
        aggregator = self.run_seconds(port, 5)
        assert aggregator.accounts["open-0"].delivered == 0
        with ProtoServer(generated, port) as server:
            aggregator.close()
            assert sum(metric.Count for metric in server.metrics) == 10
        assert aggregator.summary()["balanced"] and aggregator.accounts["open-0"].lost == {}

    def test_an_absent_collector_holds_up_nothing_and_its_alerts_are_counted(self, monkeypatch, capsys):
        monkeypatch.setattr(traceleft, "CLOSE_TIMEOUT", 0.5)
        begin = time.monotonic()
        aggregator = self.run_seconds(1, 100)
        assert time.monotonic() - begin < 5  # sending is in the background: 100 attempts would take longer
        aggregator.close()
        assert aggregator.accounts["open-0"].lost == {"not_acknowledged": 200}
        assert aggregator.summary()["balanced"]
        assert "100 alerts were not acknowledged" in capsys.readouterr().err

    def test_a_collector_that_only_accepts_is_given_up(self, monkeypatch, capsys):
        monkeypatch.setattr(traceleft, "CLOSE_TIMEOUT", 0.5)
        with socket.create_server(("localhost", 0)) as silent:
            aggregator = self.run_seconds(silent.getsockname()[1], 2)
            begin = time.monotonic()
            aggregator.close()
            assert time.monotonic() - begin < 5
        assert aggregator.accounts["open-0"].lost == {"not_acknowledged": 4} and aggregator.summary()["balanced"]
        assert "2 alerts were not acknowledged and are lost" in capsys.readouterr().err

    def test_a_collector_that_does_not_answer_is_given_up(self, generated, monkeypatch):
        monkeypatch.setattr(traceleft, "CLOSE_TIMEOUT", 0.5)
        with ProtoServer(generated, delay=3.0) as server:
            aggregator = self.run_seconds(server.port, 2)
            time.sleep(0.2)
            begin = time.monotonic()
            aggregator.close()
            assert time.monotonic() - begin < 5
        assert aggregator.accounts["open-0"].lost == {"not_acknowledged": 4}
        assert aggregator.summary()["balanced"]

    def test_the_queue_is_bounded(self, monkeypatch):
        monkeypatch.setattr(traceleft, "MAX_QUEUE_BYTES", 1000)
        monkeypatch.setattr(traceleft, "CLOSE_TIMEOUT", 0.2)
        aggregator = self.run_seconds(1, 50)
        assert aggregator.channels["1"].figures()["queued_bytes"] <= 1000
        aggregator.close()
        lost = aggregator.accounts["open-0"].lost
        assert lost["queue_full"] > 0 and sum(lost.values()) == 100
        assert aggregator.summary()["balanced"]

    def test_backoff_is_not_cut_short_by_ticks(self, generated):
        with ProtoServer(generated, failures=1000) as server:
            aggregator = Aggregator(grpc_spec(server.port), insecure=True)
            begin = time.monotonic()
            while server.tried < 4:
                assert time.monotonic() < begin + DEADLINE
                aggregator.add(an_open())
                aggregator.flush(1.0)
                time.sleep(0.02)
            assert time.monotonic() - begin > (0.2 + 0.4 + 0.8) / 2  # a half at most is left to chance
            server.failures = 0
            aggregator.close()
        assert aggregator.accounts["open-0"].lost == {}

    def test_a_slow_collector_gets_smaller_batches(self, generated, monkeypatch):
        """It needs 5 ms for each alert and the agent waits 0.3 s: a batch of all 100 would never succeed."""
        monkeypatch.setattr(traceleft, "ACK_TIMEOUT", 0.3)
        with ProtoServer(generated, delay_each=0.005) as server:
            aggregator = Aggregator(grpc_spec(server.port), insecure=True)
            for second in range(100):
                aggregator.add(an_open())
                for state in aggregator.states.values():
                    state.tick(float(second), aggregator.channels["1"])
            aggregator.flush(100.0)
            wait_until(lambda: aggregator.accounts["open-0"].delivered == 100, "all acknowledged")
            aggregator.close()
        numbers = [metric.Sequence for metric in server.metrics]
        assert set(numbers) == set(range(1, 101))

    def test_a_frozen_connection_is_left_for_a_new_one(self, generated, monkeypatch):
        monkeypatch.setattr(traceleft, "ACK_TIMEOUT", 0.5)
        with ProtoServer(generated) as server, Proxy(server.port) as proxy:
            aggregator = self.run_seconds(proxy.address, 1)
            wait_until(lambda: aggregator.accounts["open-0"].delivered == 2, "the first alert")
            frozen, proxy.frozen = proxy.connections, True
            aggregator.add(an_open())
            aggregator.flush(2.0)
            wait_until(lambda: proxy.connections > frozen, "another connection")
            proxy.frozen = False
            wait_until(lambda: aggregator.accounts["open-0"].delivered == 3, "the second alert")
            aggregator.close()
        assert aggregator.channels["1"].figures()["reconnects"] >= 1

    @pytest.mark.live
    @pytest.mark.skipif(os.geteuid() != 0, reason="puts a name into /etc/hosts, in a mount namespace of its own")
    def test_takes_turns_with_all_addresses_of_a_name(self, tmp_path):
        (tmp_path / "hosts").write_text("127.0.0.1 many\n127.0.0.2 many\n")
        collectors = [traceleft.Collector("127.0.0.1:0")]
        collectors.append(traceleft.Collector(f"127.0.0.2:{collectors[0].port}"))
        code = f"""if True:
            import traceleft
            aggregator = traceleft.Aggregator({grpc_spec(1)!r}, insecure=True)
            for second in range(10):
                aggregator.add(traceleft.make_event("open", "x"))
                aggregator.flush(float(second))
                while aggregator.accounts["open-0"].delivered <= second:
                    pass
            aggregator.close()""".replace("localhost:1", f"dns:///many:{collectors[0].port}")
        subprocess.run(["unshare", "-m", "sh", "-c", f'mount --bind {tmp_path}/hosts /etc/hosts && exec "$@"', "sh",
                        sys.executable, "-c", code], cwd=HERE, check=True, timeout=DEADLINE)
        counts = [count for collector in collectors for count, _ in collector.snapshot().values()]
        assert sum(counts) == 10 and min(counts) >= 3  # the first to be connected gets what comes before the other is
        for collector in collectors:
            collector.stop()

    @pytest.mark.live
    @pytest.mark.skipif(os.geteuid() != 0, reason="puts a name into /etc/hosts, in a mount namespace of its own")
    def test_a_collector_that_moves_is_found(self, tmp_path):
        (tmp_path / "hosts").write_text("127.0.0.1 wanders\n")
        old = traceleft.Collector("127.0.0.1:0")
        new = traceleft.Collector(f"127.0.0.2:{old.port}")
        code = f"""if True:
            import sys, threading, traceleft
            aggregator = traceleft.Aggregator({grpc_spec(1)!r}, insecure=True)
            for second in range(1000):
                aggregator.add(traceleft.make_event("open", "x"))
                aggregator.flush(float(second))
                if sys.stdin.readline() == "end\\n":
                    break
            aggregator.close()
            assert aggregator.accounts["open-0"].delivered == second + 1""".replace("localhost:1", f"wanders:{old.port}")
        agent = subprocess.Popen(["unshare", "-m", "sh", "-c", f'mount --bind {tmp_path}/hosts /etc/hosts && exec "$@"', "sh",
                                  sys.executable, "-c", code], cwd=HERE, stdin=subprocess.PIPE, text=True)
        try:
            wait_until(old.snapshot, "an alert")
            old.stop()
            (tmp_path / "hosts").write_text("127.0.0.2 wanders\n")
            agent.stdin.write("go on\n")
            agent.stdin.flush()
            wait_until(new.snapshot, "an alert at the new place")
            agent.communicate("end\n", timeout=DEADLINE)
            assert agent.returncode == 0
        finally:
            agent.kill()
            agent.wait()
            new.stop()

    def test_gzip(self, generated):
        sent = {}
        for gzip in (False, True):
            with ProtoServer(generated) as server, Proxy(server.port) as proxy:
                aggregator = Aggregator(grpc_spec(proxy.address, {"gzip": gzip}), insecure=True)
                for second in range(20):
                    aggregator.add(an_open("/" + "x" * 4000))
                    aggregator.flush(float(second))
                aggregator.close()
                sent[gzip] = proxy.bytes
                assert len(server.metrics) == 20
        assert sent[True] < sent[False] / 4

    def test_each_kind_of_problem_is_said_once(self, generated, capsys):
        with ProtoServer(generated, failures=2) as server:
            port = server.port
            aggregator = self.run_seconds(port, 1)
            wait_until(lambda: aggregator.accounts["open-0"].delivered == 2, "the first alert")
        aggregator.add(an_open())
        aggregator.flush(2.0)
        wait_until(lambda: aggregator.channels["1"].figures()["failures"] > 3, "two more failures")
        with ProtoServer(generated, port, failures=1):
            wait_until(lambda: aggregator.accounts["open-0"].delivered == 3, "the second alert")
            aggregator.close()
        said = [line.split(": ", 2)[2].partition(":")[0] if "sent again" in line else line[-18:] for line in capsys.readouterr().err.splitlines()]
        assert said == ["RESOURCE_EXHAUSTED", "acknowledges again", "UNAVAILABLE", "RESOURCE_EXHAUSTED", "acknowledges again"]

    def test_a_token_is_sent_and_read_anew(self, generated, certificates, tmp_path, capsys):
        token = tmp_path / "token"
        token.write_text("first\n")
        options = {"tls": {"ca": f"{certificates}/ca.pem"}, "token_file": str(token)}
        with ProtoServer(generated, credentials=server_credentials(certificates)) as server:
            aggregator = Aggregator(grpc_spec(server.port, options))
            for number, text in enumerate(("first", "second", None, None)):
                token.write_text(text) if text else token.unlink(missing_ok=True)
                aggregator.add(an_open())
                aggregator.flush(float(number))
                wait_until(lambda wanted=number + 1: aggregator.accounts["open-0"].delivered == wanted, "an alert")
            aggregator.close()
        assert [metadata["authorization"] for metadata in server.metadata] == ["Bearer first", *["Bearer second"] * 3]
        assert capsys.readouterr().err.count("No such file or directory; the token that was read is used") == 1

    def test_both_sides_show_certificates(self, generated, certificates):
        options = {"tls": {"ca": f"{certificates}/ca.pem", "cert": f"{certificates}/client.pem", "key": f"{certificates}/client.key",
                           "server_name": "elsewhere.test"}}
        with ProtoServer(generated, credentials=server_credentials(certificates, "elsewhere", clients=True)) as server:
            aggregator = Aggregator(grpc_spec(server.port, options))
            aggregator.add(an_open())
            aggregator.flush(1.0)
            aggregator.close()
        assert len(server.metrics) == 1 and aggregator.accounts["open-0"].delivered == 1

    def test_new_certificates_are_used_after_a_failure(self, generated, certificates, tmp_path):
        ca = tmp_path / "ca.pem"
        shutil.copy(certificates / "other-ca.pem", ca)
        with ProtoServer(generated, credentials=server_credentials(certificates)) as server:
            aggregator = Aggregator(grpc_spec(server.port, {"tls": {"ca": str(ca)}}))
            aggregator.add(an_open())
            aggregator.flush(1.0)
            wait_until(lambda: aggregator.channels["1"].figures()["failures"] > 0, "a handshake that fails")
            shutil.copy(certificates / "ca.pem", ca)
            wait_until(lambda: aggregator.accounts["open-0"].delivered == 1, "the alert")
            aggregator.close()

    @pytest.mark.parametrize("options, message", [
        ({"tls": {"ca": "missing.pem"}}, "tls: cannot use missing.pem: No such file"),
        ({"tls": {"ca": "junk"}}, "tls: cannot use junk: "),
        ({"tls": {"ca": "ca.pem", "cert": "client.pem", "key": "server.key"}}, "cannot use client.pem: KEY_VALUES_MISMATCH"),
        ({"tls": {"ca": "ca.pem", "cert": "client.pem", "key": "gone"}}, "tls: cannot use gone: No such file"),
        ({"tls": {"ca": "ca.pem"}, "token_file": "gone"}, "cannot read token_file gone: No such file"),
        ({"tls": {"ca": "ca.pem"}, "token_file": "two-lines"}, "cannot read token_file two-lines: it has to hold one line"),
        ({"tls": {"ca": "ca.pem"}, "spool": {"dir": "no/spool"}}, "cannot use spool.dir no/spool: No such file"),
        ({"tls": {"ca": "ca.pem"}, "spool": {"dir": "junk"}}, "cannot use spool.dir junk: Not a directory"),
        ({"tls": {"ca": "ca.pem"}, "spool": {"dir": "shared"}}, "cannot use spool.dir shared: it is another user's, or others can"),
    ])
    def test_files_that_cannot_be_used(self, certificates, tmp_path, monkeypatch, options, message):
        for path in certificates.iterdir():
            shutil.copy(path, tmp_path)
        (tmp_path / "junk").write_text("junk")
        (tmp_path / "two-lines").write_text("one\ntwo")
        (tmp_path / "shared").mkdir()
        (tmp_path / "shared").chmod(0o777)
        monkeypatch.chdir(tmp_path)
        with pytest.raises(traceleft.TraceleftError) as caught:
            Aggregator(grpc_spec(1, options))
        (error,) = caught.value.errors
        assert error.startswith("channel '1': ") and message in error

    def test_secrets_are_not_sent_in_the_clear(self, certificates):
        with pytest.raises(traceleft.UsageError, match="channel '1' has tls, and --collector-insecure would send in the clear"):
            Aggregator(grpc_spec(1, {"tls": {"ca": f"{certificates}/ca.pem"}}), insecure=True)

    def test_the_spool_survives_the_agent(self, generated, tmp_path, monkeypatch, capsys):
        """Two runs without a collector, then one with: everything arrives once, in order, run by run."""
        monkeypatch.setattr(traceleft, "CLOSE_TIMEOUT", 0.2)
        port = free_port()
        spec = grpc_spec(port, {"spool": {"dir": f"{tmp_path}/spool"}})
        for _ in range(2):
            aggregator = self.run_seconds(port, 5, spec)
            aggregator.close()
            assert aggregator.accounts["open-0"].lost == {"in_spool": 10} and aggregator.summary()["balanced"]
        assert "5 alerts of earlier runs are sent first\n" in capsys.readouterr().err
        monkeypatch.setattr(traceleft, "CLOSE_TIMEOUT", 10.0)
        with ProtoServer(generated, port) as server:
            aggregator = self.run_seconds(port, 3, spec)
            aggregator.close()
        assert aggregator.accounts["open-0"].delivered == 6 and aggregator.summary()["balanced"]
        runs = [[metric.Sequence for metric in group] for _, group in itertools.groupby(server.metrics, lambda metric: metric.Agent)]
        assert runs == [[1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [1, 2, 3]]
        aggregator = self.run_seconds(port, 0, spec)
        assert not len(aggregator.channels["1"].backlog)  # and nothing of it a second time
        aggregator.close()

    def test_what_a_spool_sends_again_counts_once(self, tmp_path):
        """The agent was killed after the acknowledgement and before it had noted that."""
        spec = grpc_spec(1, {"spool": {"dir": f"{tmp_path}/spool"}})
        collector = traceleft.Collector("127.0.0.1:0")
        spec["channels"][0]["path"] = f"127.0.0.1:{collector.port}"
        try:
            self.run_seconds(None, 3, spec).close()
            (tmp_path / "spool/cursor").write_bytes(b"")
            aggregator = self.run_seconds(None, 1, spec)
            wait_until(lambda: aggregator.accounts["open-0"].delivered == 2, "the new alert, behind the old ones")
            aggregator.close()
            assert aggregator.channels["1"].sends == 4 and list(collector.snapshot().values()) == [(8, 4)]
        finally:
            collector.stop()

    @pytest.mark.skipif(os.geteuid() != 0, reason="makes files of another user")
    def test_a_spool_is_not_where_another_user_put_it(self, tmp_path):
        (tmp_path / "shared").mkdir()
        (tmp_path / "shared").chmod(0o1777)
        (tmp_path / "real").mkdir()
        (tmp_path / "shared/link").symlink_to(tmp_path / "real")
        os.lchown(tmp_path / "shared/link", 1, 1)
        (tmp_path / "shared/theirs").mkdir()
        os.chown(tmp_path / "shared/theirs", 1, 1)
        for path in ("link", "link/spool", "theirs"):
            with pytest.raises(traceleft.TraceleftError, match="another user's"):
                Aggregator(grpc_spec(1, {"spool": {"dir": f"{tmp_path}/shared/{path}"}}), insecure=True)
        assert not list((tmp_path / "real").iterdir())

    def test_a_spool_that_is_full_overflows_into_memory(self, generated, tmp_path, monkeypatch):
        monkeypatch.setattr(traceleft, "MAX_QUEUE_BYTES", 20_000)
        port = free_port()
        aggregator = self.run_seconds(port, 700, grpc_spec(port, {"spool": {"dir": f"{tmp_path}/spool", "max_bytes": 65536}}))
        backlog = aggregator.channels["1"].backlog
        assert backlog.spool.waiting > 100 and len(backlog.memory) > 50
        assert sum(path.stat().st_size for path in (tmp_path / "spool").iterdir()) <= 65536 + 20
        dropped = aggregator.accounts["open-0"].lost["queue_full"]
        with ProtoServer(generated, port) as server:
            wait_until(lambda: not len(backlog), "all that was kept")
            aggregator.add(an_open())
            aggregator.flush(700.0)
            aggregator.close()
        numbers = [metric.Sequence for metric in server.metrics]
        assert numbers == [*range(1, len(numbers)), 701]
        assert sum(metric.Count for metric in server.metrics) == 1401 - dropped and server.metrics[-1].Lost == dropped
        assert aggregator.summary()["balanced"]

    def test_a_spool_that_works_again_takes_what_waits_in_memory(self, tmp_path, monkeypatch):
        """While the collector is away: an agent that is killed then loses none of it."""
        monkeypatch.setattr(traceleft, "SPOOL_RETRY", 0.0)
        monkeypatch.setattr(traceleft, "CLOSE_TIMEOUT", 0.2)
        room = TestFileChannel().disk(monkeypatch)
        aggregator = self.run_seconds(free_port(), 2, grpc_spec(1, {"spool": {"dir": f"{tmp_path}/spool"}}))
        backlog = aggregator.channels["1"].backlog
        wait_until(lambda: aggregator.channels["1"].figures()["failures"], "an attempt")
        for second in range(2, 6):
            room[0] = 0 if second < 4 else None
            aggregator.add(an_open())
            aggregator.flush(float(second))
            assert len(backlog.memory) == (second - 1 if second < 4 else 0)
        (segment,) = (tmp_path / "spool").glob("*.spool")
        assert len(list(read_segment(segment))) == 6
        aggregator.close()
        assert aggregator.accounts["open-0"].lost == {"in_spool": 8} and aggregator.summary()["balanced"]

    @pytest.mark.parametrize("format", ["collector_spec_pb", "otlp"])
    @pytest.mark.parametrize("spool", [False, True])
    def test_a_reload_moves_it(self, generated, tmp_path, monkeypatch, spool, format):
        """From a collector that is away to another, back, and there again, at once: what waits goes there, too."""
        monkeypatch.setattr(traceleft, "BACKOFF_MIN", 60.0)  # a move waits for none
        options = {"spool": {"dir": f"{tmp_path}/spool"}} if spool else {}
        if format == "otlp":
            options["format"] = format
        server = OtlpServer() if format == "otlp" else ProtoServer(generated)
        with server:
            specs = [parse_spec(grpc_spec(port, options)) for port in (free_port(), server.port)]
            aggregator = Aggregator(specs[0], insecure=True)
            channel = aggregator.channels["1"]
            for second, turn in enumerate((0, 0, 1, 0, 1, 1)):
                channels = aggregator.open_channels(specs[turn])
                aggregator.reload(specs[turn], frozenset(), channels, {})
                aggregator.retire(float(second))
                aggregator.add(an_open())
                aggregator.flush(float(second))
                assert aggregator.channels == {"1": channel} and channel.spec == specs[turn].channels[0]
            wait_until(lambda: aggregator.accounts["open-0"].delivered == 6, "all of them")
            aggregator.close()
        assert aggregator.accounts["open-0"].lost == {} and aggregator.summary()["balanced"]
        if format != "otlp":
            assert [metric.Sequence for metric in server.metrics] == [1, 2, 3, 4, 5, 6]

    def test_a_reload_takes_a_spool_over_from_a_channel_that_is_gone(self, tmp_path, monkeypatch):
        """Away and back within the seconds in which it still tries to deliver."""
        monkeypatch.setattr(traceleft, "CLOSE_TIMEOUT", 0.5)
        log = {"id": "2", "type": "file", "path": f"{tmp_path}/log"}
        with_spool = parse_spec(grpc_spec(free_port(), {"spool": {"dir": f"{tmp_path}/spool"}}))
        without = parse_spec(edit(a_spec(channel=log), "events", channel="2"))
        aggregator = Aggregator(with_spool, insecure=True)
        aggregator.add(an_open())
        aggregator.flush(1.0)
        for spec in (without, with_spool):
            aggregator.reload(spec, frozenset(), aggregator.open_channels(spec), {})
            aggregator.retire(2.0)
        assert aggregator.channels["1"].backlog.spool.waiting == 1
        assert aggregator.accounts["open-0"].lost == {"in_spool": 1}
        assert aggregator.accounts["open-0"].take_unreported() == 0  # it is not lost yet: the next alert must not say so
        aggregator.close()

    def test_certificates_that_are_being_written(self, generated, certificates, tmp_path, capsys):
        """grpcio 1.85 ends the process for an empty key."""
        for name in ("ca.pem", "client.pem", "client.key"):
            shutil.copy(certificates / name, tmp_path)
        options = {"tls": {"ca": f"{tmp_path}/ca.pem", "cert": f"{tmp_path}/client.pem", "key": f"{tmp_path}/client.key"}}
        port = free_port()
        aggregator = Aggregator(grpc_spec(port, options))
        (tmp_path / "client.key").write_text("")
        aggregator.add(an_open())
        aggregator.flush(1.0)
        wait_until(lambda: "client.key has no certificate or key in it" in capsys.readouterr().err, "it says so")
        shutil.copy(certificates / "client.key", tmp_path)
        with ProtoServer(generated, port, credentials=server_credentials(certificates, clients=True)):
            wait_until(lambda: aggregator.accounts["open-0"].delivered == 1, "the alert")
            aggregator.close()

    def test_without_a_thread_for_a_call(self, generated, monkeypatch, capsys):
        """grpcio needs one for each; to close such a connection hangs."""
        with ProtoServer(generated) as server, monkeypatch.context() as patch:
            aggregator = Aggregator(grpc_spec(server.port), insecure=True)
            channel = aggregator.channels["1"]

            def refuse(*_):
                raise RuntimeError("can't start new thread")
            patch.setattr(channel, "begin_call", refuse)
            first = channel.connection
            patch.setattr(first, "close", lambda: pytest.fail("closed"))
            aggregator.add(an_open())
            aggregator.flush(1.0)
            wait_until(lambda: "RuntimeError: can't start new thread; alerts are kept" in capsys.readouterr().err, "it says so")
            patch.setattr(channel, "begin_call", type(channel).begin_call.__get__(channel))
            wait_until(lambda: aggregator.accounts["open-0"].delivered == 1, "the alert")
            assert first in channel.abandoned
            aggregator.close()

    def test_what_waits_in_another_format_is_said(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(traceleft, "CLOSE_TIMEOUT", 0.2)
        spool = {"dir": f"{tmp_path}/spool"}
        for options in ({}, {"format": "otlp"}, {}):
            aggregator = Aggregator(grpc_spec(free_port(), {"spool": spool, **options}), insecure=True)
            aggregator.add(an_open())
            aggregator.flush(1.0)
            aggregator.close()
            assert aggregator.accounts["open-0"].lost == {"in_spool": 1}
            parts = getattr(aggregator.channels["1"], "parts", [aggregator.channels["1"]])
            assert sum(part.backlog.spool.max_bytes for part in parts) == traceleft.SpoolSpec("").max_bytes
        other = "records of earlier runs are in the channel's format of then, and stay there until it has it again"
        assert re.findall(r"\S+ \d+ \w+ of earlier.*", capsys.readouterr().err) == [
            f"{tmp_path}/spool: 1 {other}", f"{tmp_path}/spool: 1 alerts of earlier runs are sent first",
            f"{tmp_path}/spool/metrics: 1 {other}", f"{tmp_path}/spool/logs: 1 {other}"]

    def test_a_reload_with_files_that_are_no_good_leaves_it_where_it_was(self, tmp_path):
        spool = {"dir": f"{tmp_path}/spool"}
        aggregator = Aggregator(grpc_spec(free_port(), {"spool": spool}), insecure=True)
        with pytest.raises(traceleft.TraceleftError, match="cannot read token_file"):
            aggregator.insecure = False
            aggregator.open_channels(parse_spec(grpc_spec(1, {"spool": spool, "token_file": f"{tmp_path}/none",
                                                              "tls": {"server_name": "x"}})))
        assert aggregator.channels["1"].spec.token_file == ""
        aggregator.close()

    def test_a_reload_with_a_new_filter_sends_its_samples(self):
        with OtlpServer() as server:
            specs = [parse_spec(otlp_spec(server.port, id=name)) for name in ("a", "b")]
            aggregator = Aggregator(specs[0], insecure=True)
            aggregator.reload(specs[1], frozenset(), aggregator.open_channels(specs[1]), {})
            aggregator.retire(1.0)
            aggregator.add(an_open())
            aggregator.flush(2.0)
            aggregator.close()
        assert aggregator.accounts["b"].delivered == 1 and aggregator.channels["1"].samples["b"].delivered == 1

    def test_what_is_in_memory_at_the_end_goes_to_the_spool_if_it_fits(self, tmp_path, monkeypatch):
        monkeypatch.setattr(traceleft, "CLOSE_TIMEOUT", 0.2)
        aggregator = Aggregator(grpc_spec(1, {"spool": {"dir": f"{tmp_path}/spool"}}), insecure=True)
        spool = aggregator.channels["1"].backlog.spool
        with monkeypatch.context() as patch:
            patch.setattr(spool, "append", lambda entry: False)  # a full disk
            aggregator.add(an_open())
            aggregator.flush(1.0)
        assert len(aggregator.channels["1"].backlog.memory) == 1
        aggregator.close()
        assert aggregator.accounts["open-0"].lost == {"in_spool": 1} and aggregator.summary()["balanced"]


class OtlpServer:
    """An OpenTelemetry Collector's receiver, made from opentelemetry-proto's own service definitions.

    `answers` maps a signal to what its first requests are answered with: a status code, (code, seconds of a RetryInfo),
    or (number rejected, message) of a partial success.
    """

    def __init__(self, credentials=None, **answers):
        self.metadata = {}
        self.answers = {signal: list(values) for signal, values in answers.items()}
        self.requests = {"metrics": [], "logs": []}  # signal -> (time, request), whatever the answer was
        self.accepted = {"metrics": [], "logs": []}
        self.server = grpc.server(futures.ThreadPoolExecutor(4), options=[("grpc.so_reuseport", 0)])
        self.serve("metrics", "rejected_data_points")
        self.serve("logs", "rejected_log_records")
        self.port = (self.server.add_secure_port("localhost:0", credentials) if credentials else
                     self.server.add_insecure_port("localhost:0"))
        self.server.start()

    def serve(self, signal, rejected):
        package = f"opentelemetry.proto.collector.{signal}.v1.{signal}_service_pb2"
        messages, services = importlib.import_module(package), importlib.import_module(f"{package}_grpc")
        name = signal.capitalize()
        response = getattr(messages, f"Export{name}ServiceResponse")

        def export(servicer, request, context):
            self.requests[signal].append((time.monotonic(), request))
            self.metadata[signal] = dict(context.invocation_metadata())
            answer = self.answers[signal].pop(0) if self.answers.get(signal) else None
            if isinstance(answer, grpc.StatusCode):
                context.abort(answer, "not now")
            if isinstance(answer, tuple) and isinstance(answer[0], grpc.StatusCode):
                context.set_trailing_metadata((("grpc-status-details-bin", retry_info(answer[1])),))
                context.abort(answer[0], "not now")
            self.accepted[signal].append(request)
            return response(partial_success={rejected: answer[0], "error_message": answer[1]} if answer else None)

        servicer = type(name, (getattr(services, f"{name}ServiceServicer"),), {"Export": export})
        getattr(services, f"add_{name}ServiceServicer_to_server")(servicer(), self.server)

    @property
    def metrics(self):
        """(resource, metric) of what was accepted."""
        return [(part.resource, metric) for request in self.accepted["metrics"] for part in request.resource_metrics
                for scope in part.scope_metrics for metric in scope.metrics]

    @property
    def records(self):
        return [record for request in self.accepted["logs"] for part in request.resource_logs
                for scope in part.scope_logs for record in scope.log_records]

    def sums(self):
        """(filter, metric) -> sum of the points."""
        found = {}
        for _, metric in self.metrics:
            for point in metric.sum.data_points:
                key = attributes_of(point)["traceleft.filter"], metric.name.rpartition(".")[2]
                found[key] = found.get(key, 0) + point.as_int
        return found

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.server.stop(None).wait()


def retry_info(seconds):
    """A google.rpc.Status with a RetryInfo, serialized, by Google's own definitions."""
    status_pb2, details = importlib.import_module("google.rpc.status_pb2"), importlib.import_module("google.rpc.error_details_pb2")
    info = details.RetryInfo()
    info.retry_delay.FromNanoseconds(int(seconds * 1e9))
    status = status_pb2.Status(code=14)
    status.details.add().Pack(info)
    return status.SerializeToString()


def attributes_of(message):
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in message.attributes}


def otlp_spec(port, **more):
    spec = grpc_spec(port, **more)
    spec["channels"][0]["format"] = "otlp"
    return spec


class TestOtlp:
    def run_seconds(self, port, seconds, event=None, **more):
        aggregator = Aggregator(otlp_spec(port, **more), insecure=True)
        for second in range(1, seconds + 1):
            for _ in range(3):
                aggregator.add(event or an_open())
            aggregator.tick(float(second))
        return aggregator

    def test_counts_are_delta_sums_and_samples_log_records(self):
        event = an_open(filename="/tmp/\udcff", ret=-2, pid=7, tid=8, ppid=9, uid=10, gid=11, euid=14, comm="c", exe="/e",
                        cgroup="/docker/" + "a" * 64, path="/tmp/x", timestamp_ns=13, netns=16)
        with OtlpServer() as server:
            aggregator = Aggregator(otlp_spec(server.port, parameters="frequency=2"), insecure=True)
            for second in range(1, 5):
                for _ in range(3):
                    aggregator.add(event)
                aggregator.tick(float(second))
            aggregator.close()
        account = aggregator.accounts["open-0"]
        assert (account.matched, account.passed, account.delivered) == (12, 6, 6) and aggregator.summary()["balanced"]
        assert server.sums() == {("open-0", "matched"): 12, ("open-0", "passed"): 6, ("open-0", "lost"): 0}
        (resource, metric), = [pair for pair in server.metrics if pair[1].name == "traceleft.events.passed"][:1]
        assert (metric.unit, metric.sum.is_monotonic, metric.sum.aggregation_temporality) == ("{event}", True, 1)
        points = [point for _, metric in server.metrics if metric.name.endswith("passed") for point in metric.sum.data_points]
        assert [point.time_unix_nano for point in points] == [second * 10**9 for second in range(1, 5)]
        assert all(a.time_unix_nano == b.start_time_unix_nano for a, b in zip(points, points[1:]))  # no gap, no overlap
        assert attributes_of(points[0]) == {"traceleft.filter": "open-0", "traceleft.event": "open", "traceleft.stream": "s",
                                            "traceleft.group": "g"}
        about = attributes_of(resource)
        assert (about["service.name"], about["host.name"], about["os.type"]) == ("traceleft", socket.gethostname(), "linux")
        assert about["host.arch"] in ("amd64", "arm64") and about["service.instance.id"]
        assert len(server.records) == 4
        record = server.records[0]
        assert (record.time_unix_nano, record.observed_time_unix_nano, record.severity_number) == (13, 10**9, 9)
        assert record.body.string_value == traceleft.format_event(event)
        expected = {"process.pid": 7, "process.parent_pid": 9, "process.real_user.id": 10, "process.user.id": 14,
                    "process.executable.path": "/e", "process.linux.cgroup": "0::/docker/" + "a" * 64, "thread.id": 8,
                    "thread.name": "c", "container.id": "a" * 64, "file.path": "/tmp/x", "error.type": "ENOENT",
                    "traceleft.ret": -2, "traceleft.gid": 11, "traceleft.netns": 16, "traceleft.count": 1,
                    "traceleft.hash": str(event.hash), "traceleft.filter": "open-0", "traceleft.group": "g",
                    "traceleft.args.filename": "/tmp/\\udcff", "traceleft.args.flags": 577, "traceleft.args.mode": 438}
        found = attributes_of(record)
        assert {name: found.get(name) for name in expected} == expected

    @pytest.mark.parametrize("event", [event for event, _ in TestWire.EVENTS], ids=lambda event: event.name)
    def test_every_event_type(self, event):
        attributes = traceleft.sample_attributes(event)
        if event.type.is_tcp:
            assert (attributes["source.port"], attributes["destination.port"], attributes["network.transport"]) == (5, 6, "tcp")
            assert attributes["network.type"] == f"ip{event.name[-2:]}" and ":" in attributes["source.address"] * (
                event.name.endswith("v6")) or attributes["source.address"] == "127.0.0.1"
        else:
            given = {f"traceleft.args.{name}": value for name, value in event.named_args.items()}
            assert given.items() <= attributes.items() | {pair for pair in given.items() if pair[1] == ""}

    def test_a_seconds_alerts_are_one_request_with_one_resource(self):
        with OtlpServer() as server:
            spec = otlp_spec(server.port)
            spec["events"] += [{**spec["events"][0], "name": name} for name in ("close", "mkdir")]
            aggregator = Aggregator(spec, insecure=True)
            for event in (an_open(), make_event("close", 1), make_event("mkdir", "d", 0o700)):
                aggregator.add(event)
            aggregator.tick(1.0)
            wait_until(lambda: server.records, "log records")
            aggregator.close()
        assert [len(server.accepted[signal]) for signal in ("metrics", "logs")] == [1, 1]
        (request,) = server.accepted["metrics"]
        assert [[len(metric.sum.data_points) for metric in scope.metrics] for part in request.resource_metrics
                for scope in part.scope_metrics] == [[3, 3, 3]]
        assert {attributes_of(record)["traceleft.event"] for record in server.records} == {"open", "close", "mkdir"}

    RETRYABLE = ("CANCELLED", "DEADLINE_EXCEEDED", "ABORTED", "OUT_OF_RANGE", "UNAVAILABLE", "DATA_LOSS")

    @pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code.name != "OK"], ids=lambda code: code.name)
    def test_which_codes_are_retried(self, code, capsys):
        """The table of the OTLP specification."""
        with OtlpServer(metrics=[code]) as server:
            aggregator = self.run_seconds(server.port, 1)
            wait_until(lambda: aggregator.accounts["open-0"].balanced, "an answer that settles")
            aggregator.close()
        retried = code.name in self.RETRYABLE
        assert len(server.requests["metrics"]) == (2 if retried else 1)
        assert aggregator.accounts["open-0"].lost == ({} if retried else {"rejected": 3})
        assert len(server.records) == 1  # the sample is answered for itself
        assert ("sent again" in capsys.readouterr().err) and aggregator.summary()["balanced"]

    @pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED])
    def test_retry_info_is_waited_for(self, code):
        with OtlpServer(metrics=[(code, 0.7)]) as server:
            aggregator = self.run_seconds(server.port, 1)
            wait_until(lambda: server.accepted["metrics"], "the second request")
            aggregator.close()
        (first, _), (second, _) = server.requests["metrics"]
        assert second - first >= 0.7
        assert aggregator.accounts["open-0"].delivered == 3 and server.sums()["open-0", "passed"] == 3

    @pytest.mark.parametrize("works", [False, True])
    def test_a_long_retry_info_does_not_hold_up_the_end(self, monkeypatch, capsys, works):
        """Which tries once more; and whoever waits says why."""
        monkeypatch.setattr(traceleft, "CLOSE_TIMEOUT", 0.5)
        with OtlpServer(metrics=[(grpc.StatusCode.UNAVAILABLE, 10**11)] * (1 if works else 2)) as server:
            aggregator = self.run_seconds(server.port, 1)
            wait_until(lambda: "UNAVAILABLE: not now; alerts are kept and sent again" in capsys.readouterr().err, "the reason")
            begin = time.monotonic()
            aggregator.close()
            assert time.monotonic() - begin < DEADLINE
        assert len(server.requests["metrics"]) == 2
        assert aggregator.accounts["open-0"].lost == ({} if works else {"not_acknowledged": 3})

    def test_a_reload_does_not_wait_as_the_server_before_asked(self):
        with OtlpServer(metrics=[(grpc.StatusCode.UNAVAILABLE, 3600)]) as first, OtlpServer() as second:
            aggregator = self.run_seconds(first.port, 1)
            wait_until(lambda: first.requests["metrics"], "a request")
            spec = parse_spec(otlp_spec(second.port))
            aggregator.reload(spec, frozenset(), aggregator.open_channels(spec), {})
            wait_until(lambda: aggregator.accounts["open-0"].delivered == 3, "its answer")
            aggregator.close()
        assert second.sums()["open-0", "passed"] == 3 and len(first.requests["metrics"]) == 1

    def test_whatever_an_answer_brings_about_the_thread_goes_on(self, monkeypatch, capsys):
        with OtlpServer() as server, monkeypatch.context() as patch:
            patch.setattr(traceleft.OtlpSignal, "check_partial", lambda *_: 1 / 0)
            aggregator = self.run_seconds(server.port, 1)
            wait_until(lambda: "ZeroDivisionError: division by zero; alerts are kept" in capsys.readouterr().err, "what happened")
            patch.undo()
            wait_until(lambda: aggregator.accounts["open-0"].delivered == 3, "an answer")
            aggregator.close()

    def test_logs_that_fail_do_not_double_metrics(self):
        with OtlpServer(logs=[grpc.StatusCode.UNAVAILABLE] * 3) as server:
            aggregator = self.run_seconds(server.port, 2)
            wait_until(lambda: len(server.records) == 2, "both samples")
            aggregator.close()
        assert server.sums() == {("open-0", "matched"): 6, ("open-0", "passed"): 6, ("open-0", "lost"): 0}
        assert aggregator.accounts["open-0"].delivered == 6

    def test_what_is_rejected_in_part_is_not_sent_again(self, capsys):
        with OtlpServer(metrics=[(2, "too old")], logs=[(1, "too long")]) as server:
            aggregator = self.run_seconds(server.port, 1)
            wait_until(lambda: aggregator.accounts["open-0"].balanced, "an answer")
            aggregator.close()
        assert [len(server.requests[signal]) for signal in ("metrics", "logs")] == [1, 1]
        assert aggregator.accounts["open-0"].lost == {"rejected": 3}
        err = capsys.readouterr().err
        assert f"localhost:{server.port} (metrics): 2 data points were rejected: too old" in err
        assert f"localhost:{server.port}: samples lost, their counts being accounted for apart: 1 rejected" in err

    def test_a_warning_is_shown_and_loses_nothing(self, capsys):
        with OtlpServer(metrics=[(0, "you send\nmuch")]) as server:
            aggregator = self.run_seconds(server.port, 1)
            aggregator.close()
        assert aggregator.accounts["open-0"].delivered == 3 and len(server.requests["metrics"]) == 1
        assert "(metrics): you send\\nmuch" in capsys.readouterr().err

    def test_requests_stay_below_a_collectors_limit(self):
        """4 MiB, which the server has as grpc's default."""
        with OtlpServer() as server:
            aggregator = self.run_seconds(server.port, 500, an_open(filename="/" + "x" * 4000, path="/" + "x" * 4000))
            aggregator.close()
        assert len(server.records) == 500 and aggregator.accounts["open-0"].delivered == 1500
        assert len(server.accepted["logs"]) > 1

    def test_tls_token_and_gzip_are_as_for_any_grpc_channel(self, certificates, tmp_path):
        (tmp_path / "token").write_text("secret")
        credentials = grpc.ssl_server_credentials([((certificates / "server.key").read_bytes(), (certificates / "server.pem").read_bytes())])
        with OtlpServer(credentials) as server:
            spec = otlp_spec(server.port)
            spec["channels"][0].update(tls={"ca": f"{certificates}/ca.pem"}, token_file=f"{tmp_path}/token", gzip=True)
            aggregator = Aggregator(spec)
            aggregator.add(an_open())
            aggregator.tick(1.0)
            aggregator.close()
        assert server.sums()["open-0", "passed"] == 1 and len(server.records) == 1
        assert {metadata["authorization"] for metadata in server.metadata.values()} == {"Bearer secret"}

    def test_what_is_spooled_is_sent_by_the_next_run(self, tmp_path, monkeypatch):
        monkeypatch.setattr(traceleft, "CLOSE_TIMEOUT", 0.2)
        spec = otlp_spec(1)
        spec["channels"][0]["spool"] = {"dir": str(tmp_path / "spool")}
        aggregator = Aggregator(spec, insecure=True)
        aggregator.add(an_open())
        aggregator.tick(1.0)
        aggregator.close()
        assert aggregator.accounts["open-0"].lost == {"in_spool": 1} and aggregator.summary()["balanced"]
        monkeypatch.undo()
        with OtlpServer() as server:
            spec["channels"][0]["path"] = f"localhost:{server.port}"
            later = Aggregator(spec, insecure=True)
            later.add(an_open())
            later.tick(2.0)
            wait_until(lambda: len(server.records) == 2 and server.sums()["open-0", "passed"] == 2, "both runs' alerts")
            later.close()
        assert later.accounts["open-0"].delivered == 1
        assert len({attributes_of(resource)["service.instance.id"] for resource, _ in server.metrics}) == 2

    def test_histograms_and_heaviest_groups_are_metrics_too(self):
        with OtlpServer(metrics=[(grpc.StatusCode.UNAVAILABLE, 0.3)]) as server:  # so that both seconds are one request
            spec = otlp_spec(server.port)
            spec["events"] = [{**spec["events"][0], "output": {"metrics": metrics, "parameters": parameters, "format": "otlp"}}
                              for metrics, parameters in (("alerts_per_sec", ""), ("histogram", "field=ret"), ("top_per_sec", "by=comm;k=2"))]
            aggregator = Aggregator(spec, insecure=True)
            for second in (1.0, 2.0):
                for ret, comm in ((-2, "a"), (0, "b"), (3, "a"), (3, "c"), (1 << 40, "a"), (3, "b")):
                    aggregator.add(an_open(ret=ret, comm=comm))
                aggregator.tick(second)
            aggregator.close()
        assert server.sums()["open-0", "passed"] == server.sums()["open-1", "passed"] == server.sums()["open-2", "passed"] == 12
        points = [point for _, metric in server.metrics if metric.name == "traceleft.values" for point in metric.histogram.data_points]
        for point in points:
            assert attributes_of(point) == {"traceleft.filter": "open-1", "traceleft.event": "open", "traceleft.stream": "s",
                                            "traceleft.group": "g", "traceleft.field": "ret"}
            assert len(point.bucket_counts) == len(point.explicit_bounds) + 1 and point.count == 6
            assert list(point.explicit_bounds) == sorted(point.explicit_bounds)
            assert {bound: count for bound, count in zip(point.explicit_bounds, point.bucket_counts) if count} == {
                -1.0: 1, 0.0: 1, 3.0: 3, 2.0**41 - 1: 1}
        assert [point.time_unix_nano for point in points] == [10**9, 2 * 10**9]
        heaviest = [(point.as_int, attributes_of(point).get("traceleft.by.comm")) for _, metric in server.metrics
                    if metric.name == "traceleft.events.top" for point in metric.sum.data_points]
        assert heaviest == [(3, "a"), (2, "b"), (1, None)] * 2
        (request,) = server.accepted["metrics"]
        assert [len(part.scope_metrics[0].metrics) for part in request.resource_metrics] == [5]

    def test_a_clock_that_is_set_back(self):
        with OtlpServer() as server:
            aggregator = Aggregator(otlp_spec(server.port), insecure=True)
            for now in (1000.0, 500.0, 501.0):
                aggregator.add(an_open())
                aggregator.tick(now)
            aggregator.close()
        points = [point for _, metric in server.metrics for point in metric.sum.data_points]
        assert len(points) == 9 and all(point.start_time_unix_nano <= point.time_unix_nano for point in points)

    def test_an_alert_without_its_sample(self):
        with OtlpServer() as server:
            aggregator = Aggregator(otlp_spec(server.port), insecure=True)
            aggregator.states["open-0"].count(5, 5, 0, None)
            aggregator.tick(1.0)
            aggregator.close()
        assert server.sums()["open-0", "passed"] == 5 and server.records == []

    def test_without_opentelemetry_proto(self, monkeypatch):
        monkeypatch.setattr(traceleft, "OTLP_PROTO", "opentelemetry.absent")
        with pytest.raises(traceleft.HostError) as caught:
            Aggregator(otlp_spec(1), insecure=True)
        assert caught.value.exit_code == 3 and len(caught.value.errors) == 1
        assert "pip install opentelemetry-proto" in str(caught.value) and "\n" not in str(caught.value)

    @pytest.mark.parametrize("channel, formats, spoken", [
        ("otlp", ["collector_spec_pb", "otlp"], "otlp"),
        (None, ["otlp", "otlp"], "otlp"),
        (None, ["collector_spec_pb"], "collector_spec_pb"),
        ("collector_spec_pb", ["collector_spec_pb"], "collector_spec_pb"),
        (None, ["otlp", "collector_spec_pb"], "events[1].output.format: channel '1' speaks otlp already, and not collector_spec_pb"),
        ("collector_spec_pb", ["otlp"], "events[0].output.format: channel '1' speaks collector_spec_pb already"),
        ("oltp", ["otlp"], "channels[0].format: unknown format for a grpc channel 'oltp' (did you mean 'otlp'?)"),
    ])
    def test_a_channel_speaks_one_format(self, channel, formats, spoken):
        value = grpc_spec(1)
        if channel:
            value["channels"][0]["format"] = channel
        value["events"] = [{**value["events"][0], "output": {"metrics": "alerts_per_sec", "format": name}} for name in formats]
        if spoken in traceleft.FORMATS["grpc"]:
            spec = parse_spec(value)
            assert {member.format for member in spec.filters} | {spec.channels[0].format} == {spoken}
        else:
            (error,) = errors_of(value)
            assert error.startswith(spoken)

    def test_a_file_channel_has_no_format_of_its_own(self):
        (error,) = errors_of(a_spec(channel={"id": "1", "type": "file", "path": "/x", "format": "json"}))
        assert error.startswith("channels[0].format: a file channel has none of its own")


@pytest.mark.usefixtures("programs")
class TestOtlpLive:
    pytestmark = live

    def test_the_kernels_counts_arrive(self, programs, tmp_path):
        path = tmp_path / "file"
        with OtlpServer() as server:
            spec = write_spec(tmp_path / "spec", otlp_spec(server.port, rule=f"filename == '{path}'", parameters="frequency=10"))
            with Agent("trace", "--collector-insecure", "--spec", spec, "--summary", "-") as agent:
                subprocess.run([programs["opens"], path, "1000"], check=True)
                wait_until(lambda: server.records, "a sample")
                code, output = agent.stop()
        (row,) = json.loads(output)["filters"]
        assert (code, row["matched"], row["passed"], row["lost"]) == (0, 1000, 100, {})
        assert server.sums() == {("open-0", "matched"): 1000, ("open-0", "passed"): 100, ("open-0", "lost"): 0}
        assert attributes_of(server.records[0])["traceleft.args.filename"] == str(path)

    def test_without_opentelemetry_proto(self, tmp_path):
        (tmp_path / "opentelemetry").mkdir()
        (tmp_path / "opentelemetry/__init__.py").write_text("raise ImportError('not\\ninstalled')")
        done = run("trace", "--spec", write_spec(tmp_path / "spec", otlp_spec(1)), env={"PYTHONPATH": str(tmp_path)})
        assert_one_line(done, 3, "pip install opentelemetry-proto")
        assert len(done.stderr.splitlines()) == 1


@functools.cache
def object_btf():
    """The structs and sections in the object's BTF by name."""
    dump = json.loads(subprocess.run(["bpftool", "-j", "btf", "dump", "file", traceleft.OBJECT_PATH],
                                     capture_output=True, check=True).stdout)
    return {kind["name"]: kind for kind in dump["types"] if kind["kind"] in ("STRUCT", "DATASEC") and kind["name"] != "(anon)"}


def struct_record():
    return object_btf()["record"]


class Feeder:
    """Runs synthetic events through the kernel's matching and counting, with the program `feed`; a context manager."""

    event_offset = struct.calcsize("=" + "".join(code for name, code in itertools.takewhile(
        lambda field: field[0] != "event", traceleft.HEADER_FIELDS)))
    TEXT_OFFSETS = {"path": 8448, "exe": 8448 + 4352, "cgroup": 8448 + 2 * 4352, "comm": 8448 + 5 * 4352}

    def __init__(self, spec):
        self.tables = traceleft.Tables(spec.filters)
        self.tracer = traceleft.Tracer({name: traceleft.Wanted() for name in self.tables.matchers}, self.tables, 1 << 20)

    def __enter__(self):
        configure = self.tracer.configure

        def configure_with_feed():
            self.tracer.sources = [traceleft.Source(kind, kind.syscalls[-1] if kind.syscalls else None, traceleft.Wanted())
                                   for kind in EVENT_TYPES.values()]
            configure()
            for name in traceleft.PROGRAMS:
                self.tracer.bpf.call("bpf_program__set_autoload", self.tracer.program(name), name == "feed")
            self.tracer.attached = []

        self.tracer.configure = configure_with_feed
        self.tracer.load()
        self.fd = self.tracer.bpf.call("bpf_program__fd", self.tracer.program("feed"))
        self.map_fd = self.tracer.map_fd("synthetic")
        self.tracer.bpf.library.bpf_prog_test_run_opts.argtypes = (ctypes.c_int, ctypes.c_void_p)
        record = struct_record()
        self.offsets = {member["name"]: member["bits_offset"] // 8 for member in record["members"]}
        self.size = record["size"]
        return self

    def __exit__(self, *exception):
        self.tracer.close()

    def feed(self, event):
        record = bytearray(self.size)
        values, used, data_begin = [0] * 32, 0, self.offsets["data"]
        for argument, value in zip(event.type.arguments, event.args):
            if argument.type.is_text:
                data = traceleft.encode_text(value)
                record[data_begin + used:data_begin + used + len(data)] = data
                values[argument.slot] = len(data) | used << 32
                used += len(data)
            elif argument.type.bits > 64:
                values[argument.slot:argument.slot + 2] = value >> 64, value & traceleft.MASK64
            else:
                values[argument.slot] = value & traceleft.MASK64
        for name, field in traceleft.KERNEL_FIELDS.items():
            if name in self.TEXT_OFFSETS:
                data, at = traceleft.encode_text(getattr(event, name)), self.TEXT_OFFSETS[name]
                record[data_begin + at:data_begin + at + len(data)] = data
                values[field] = len(data) | at << 32
            elif name not in ("files", "files_1", "time"):
                values[field] = getattr(event, name) & traceleft.MASK64
        struct.pack_into("=Q", record, self.offsets["header"], event.timestamp_ns)
        struct.pack_into("=H", record, self.offsets["header"] + self.event_offset, traceleft.EVENT_IDS[event.name])
        struct.pack_into("=32Q", record, self.offsets["values"], *values)
        struct.pack_into("=II", record, self.offsets["done"], 0xFFFFFFFF, used)
        self.tracer.bpf.call("bpf_map_update_elem", self.map_fd, struct.pack("=I", 0), bytes(record), 0)
        options = struct.pack("=Q10Q", 88, *[0] * 10)  # struct bpf_test_run_opts (bpf/bpf.h): sz, and nothing set
        buffer = ctypes.create_string_buffer(options, 88)
        assert self.tracer.bpf.library.bpf_prog_test_run_opts(self.fd, buffer) == 0
        assert struct.unpack_from("=I", buffer, 56)[0] == 0  # retval

    def groups(self, index):
        """(number of groups, counted of `other`) of a filter: struct filter_state."""
        buffer = ctypes.create_string_buffer(64)
        self.tracer.bpf.call("bpf_map_lookup_elem", self.tracer.map_fd("filter_states"), struct.pack("=I", index), buffer)
        _, counted, _, number = struct.unpack_from("=QQII", buffer)
        return number, counted


class TestTwoEngines:
    """The kernel's tables against the Python model: the same random specs on the same random events."""

    pytestmark = live
    comparisons = 0
    kernel_filters = 0
    outputs_compared = 0

    short = st.text(st.sampled_from("ab/é\udcff\udcc3\udca9"), max_size=4)
    long = st.builds(lambda text, n, tail: text * n + tail, st.sampled_from(["/abcdefg", "x", "/é"]),
                     st.sampled_from([1, 2, 8, 9, 255, 511]), short)
    texts = st.one_of(short, long, st.just("")).map(
        lambda t: traceleft.decode_text(traceleft.encode_text(t)[:traceleft.MAX_TEXT]))
    decoded = short.map(lambda t: traceleft.decode_text(traceleft.encode_text(t)))  # bytes that are a character: as that
    int64 = st.one_of(st.integers(-3, 3), st.sampled_from([-2**63, 1 - 2**63, 2**63 - 1, 577, 2**32]), st.integers(-2**63, 2**63 - 1))
    uint32 = st.one_of(st.integers(0, 3), st.sampled_from([2**32 - 1, 2**31]))
    comms = st.text(st.sampled_from("ab é"), max_size=7)
    addresses = st.sampled_from(["::", "::1", "2001:db8::5", "2001:db8:0:1::5", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"])
    v4 = st.sampled_from(["0.0.0.0", "10.0.0.1", "10.0.0.255", "10.0.1.0", "255.255.255.255"])
    opens = st.builds(an_open, texts, int64, st.one_of(st.integers(0, 3), st.integers(0, 2**64 - 1)), ret=int64,
                      pid=uint32, tid=uint32, ppid=uint32, uid=uint32, gid=uint32, comm=comms,
                      program_id=st.sampled_from([0, 1, 2**63, 2**64 - 1]), timestamp_ns=st.just(0), path=texts, exe=decoded,
                      cgroup=decoded, euid=uint32, mntns=uint32, netns=uint32, pidns=uint32)
    others = st.one_of(
        st.builds(lambda *a: make_event("mkdirat", *a), int64, texts, uint32),
        st.builds(lambda fd, buf, count: make_event("read", fd, traceleft.decode_text(buf), count), int64,
                  st.binary(max_size=20), st.integers(0, 2**64 - 1)),
        st.builds(lambda *a: make_event("connect_v6", *a), addresses, addresses, st.integers(0, 3), st.integers(0, 3)),
        st.builds(lambda *a: make_event("close_v4", *a), v4, v4, st.integers(0, 3), st.integers(0, 3)))
    literal = st.one_of(texts, st.text(st.sampled_from("a/é"), min_size=1, max_size=3)).map(repr)
    literal_1 = literal.filter(lambda text: text != "''")
    number = st.one_of(st.integers(-3, 3), st.sampled_from([-2**63, 2**63 - 1, 2**64 - 1, 2**63, 577, 2**32 - 1])).map(str)
    ints = ("arg2", "mode", "ret", "pid", "tid", "ppid", "uid", "gid", "program_id", "euid", "mntns", "netns", "pidns")
    text_fields = st.sampled_from(["filename", "comm", "path", "exe", "cgroup"])
    expression = st.recursive(st.sampled_from(ints), lambda inner, number=number: st.one_of(
        st.tuples(inner, st.sampled_from("&|^"), number).map("({0[0]} {0[1]} {0[2]})".format),
        st.tuples(number, st.sampled_from("&|^"), inner).map("({0[0]} {0[1]} {0[2]})".format),
        inner.map("(~{})".format)), max_leaves=3)
    comparison = st.one_of(
        st.tuples(expression, st.sampled_from(["==", "!=", "<", "<=", ">", ">="]), number).map(" ".join),
        st.tuples(number, st.sampled_from(["<", "<="]), expression, st.just("<"), number).map(" ".join),
        st.tuples(expression, st.sampled_from([" in ", " not in "]), st.lists(number, min_size=1, max_size=4)).map(
            lambda t: f"{t[0]}{t[1]}[{', '.join(t[2])}]"),
        expression,
        st.tuples(text_fields, st.sampled_from(["==", "!="]), literal).map(" ".join),
        st.tuples(text_fields, st.sampled_from([" in ", " not in "]),
                  st.lists(literal, min_size=1, max_size=4)).map(lambda t: f"{t[0]}{t[1]}[{', '.join(t[2])}]"),
        st.tuples(st.sampled_from(["startswith", "endswith"]), text_fields, literal_1).map(
            "{0[0]}({0[1]}, {0[2]})".format))
    awkward = st.one_of(  # what needs Python, so that the prefilters are tested too
        st.tuples(st.sampled_from(["contains", "glob"]), st.sampled_from(["filename", "comm"]), literal_1).map(
            "{0[0]}({0[1]}, {0[2]})".format),
        st.sampled_from(["regex(filename, '^/a')", "glob(filename, '/a*é')", "uid == gid", "ret < mode", "comm == filename",
                         "container == ''", "path != filename"]))
    rule = st.recursive(st.one_of(comparison, comparison, comparison, awkward), lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from([" and ", " or "]), inner).map("({0[0]}{0[1]}{0[2]})".format),
        inner.map("(not {})".format)), max_leaves=6)
    parameters = st.one_of(
        st.builds("frequency={};threshold={}".format, st.sampled_from([0, 1, 2, 3, 7]), st.sampled_from([0, 0, 1, 2, 5])),
        st.builds("frequency={};threshold={};by={}".format, st.sampled_from([1, 2, 3]), st.sampled_from([0, 1]),
                  st.sampled_from(["comm", "filename", "ret,uid", "comm,filename,arg2", "pid", "path,exe", "cgroup", "container"])),
        st.sampled_from(["limit:", "limit:count=2;seconds=2", "limit:count=3;by=comm", "limit:seconds=3;by=filename", "distinct:by=comm",
                         "distinct:by=filename,uid;seconds=1", "distinct:by=container;seconds=2", "backoff:", "backoff:multiplier=2",
                         "backoff:count=3;multiplier=2;by=comm", "backoff:count=2;multiplier=3;by=pid"]))
    outputs = st.sampled_from([("alerts_per_sec", "")] * 4 + [
        ("histogram", "field=ret"), ("histogram", "field=mode"), ("histogram", "field=arg2"), ("top_per_sec", "by=comm"),
        ("top_per_sec", "by=filename,ret"), ("top_per_sec", "by=path,uid,program_id"), ("top_per_sec", "by=container")])
    open_filters = st.lists(st.tuples(st.just("open"), rule, parameters, outputs), min_size=1, max_size=12)
    other_filters = st.lists(st.sampled_from([
        ("mkdirat", "dfd == AT_FDCWD and startswith(pathname, '/')", "frequency=2"), ("mkdirat", "", "by=mode"),
        ("read", "buf == '' or count > 5", "threshold=1"), ("read", "fd < 0 and startswith(buf, 'a')", ""),
        ("connect_v6", "daddr == '2001:db8::5' or saddr in net('2001:db8::/48')", "by=daddr"), ("connect_v6", "saddr != daddr", ""),
        ("connect_v6", "daddr not in ('::1', net('2001:db8::/96')) and dport in (1, 2)", "by=saddr,dport"),
        ("close_v4", "daddr in net('10.0.0.0/24') and not saddr == '10.0.0.1'", "by=daddr"), ("close_v4", "saddr == daddr", ""),
        ("connect_v6", "", "", ("top_per_sec", "by=daddr,dport")), ("close_v4", "", "frequency=2", ("top_per_sec", "by=saddr")),
        ("read", "", "", ("histogram", "field=count")), ("read", "", "", ("top_per_sec", "by=fd")),
    ]), max_size=6)

    @settings(max_examples=220, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(open_filters, other_filters, st.lists(st.one_of(opens, opens, opens, others), min_size=20, max_size=40),
           st.lists(st.integers(0, 300), max_size=5), st.integers(1, 4))
    def test_agree(self, opens, others, events, seconds, max_groups):
        filters = []
        for name, text, parameters, *output in [*opens, *others]:
            with contextlib.suppress(RuleError):  # a constant, for example
                parse_rule(text, EVENT_TYPES[name])
                function, _, parameters = parameters.rpartition(":")
                filters.append({**a_spec(text, parameters, function=function or "sigma")["events"][0], "name": name})
                for metrics, output_parameters in output:
                    filters[-1]["output"] = {"metrics": metrics, "parameters": output_parameters, "format": "json"}
        if not filters:
            return
        spec = parse_spec({**a_spec(), "events": filters})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(traceleft, "MAX_GROUPS", max_groups)
            self.compare(spec, events * 9, seconds)

    def compare(self, spec, events, seconds):
        model = Aggregator(spec, {"1": ListChannel()})
        python = Aggregator(spec, {"1": ListChannel()})
        with Feeder(spec) as feeder:
            members = feeder.tables.filters
            python.by_event = {}
            for state in python.states.values():
                if state.spec.id in feeder.tables.python_ids:
                    python.by_event.setdefault(state.spec.event, []).append(state)
            second = 0
            for place, event in enumerate(events):
                if place in seconds:
                    second += 1
                    self.compare_outputs(model, feeder)
                    model.tick(float(second))
                    python.tick(float(second))
                event = event._replace(timestamp_ns=second * 10**9)
                if event.name not in feeder.tables.matchers:
                    continue
                model.add(event)
                feeder.feed(event)
                for streamed in feeder.tracer.poll():
                    python.add(streamed)
            self.compare_outputs(model, feeder)
            counts = feeder.tracer.read_counts()
            assert sum(count.ring_full for count in counts) == 0
            found = {member.spec.id: count[:3] for member, count in zip(members, counts) if member.spec}
            groups = {member.spec.id: feeder.groups(i) for i, member in enumerate(members) if member.spec}
            fed = sum(event.name in feeder.tables.matchers for event in events)
        for state in python.states.values():  # the rest of the filters, behind their prefilter
            if state.spec.id not in found:
                account = state.account
                found[state.spec.id] = (account.matched, account.passed, account.folded)
        for state in model.states.values():
            account, function = state.account, state.processing
            assert found[state.spec.id] == (account.matched, account.passed, account.folded), state.spec.rule_text
            if state.spec.id in groups and state.spec.parameters["by"]:
                number, counted = groups[state.spec.id]
                assert number == len(function.groups), state.spec
                other = function.other.counted if function.other else 0
                if state.spec.processing == "sigma":  # whose model counts from the last event that passed
                    frequency = function.packed.frequency
                    assert counted % frequency == other % frequency
                else:
                    assert counted == other
        type(self).comparisons += fed * len(spec.filters)
        type(self).kernel_filters += len(groups)

    def compare_outputs(self, model, feeder):
        """What the kernel side has counted for top_per_sec and histogram in the second that ends."""
        ended = feeder.tracer.next_tick()
        for index, member in enumerate(feeder.tables.filters):
            if member.spec is not None and member.spec.metrics != "alerts_per_sec":
                expected = collections.Counter()
                for key, count in model.states[member.spec.id].output.counts.items():
                    cut = key if isinstance(key, int) else tuple(traceleft.cut_text(v) if isinstance(v, str) else v for v in key)
                    expected[cut] += count
                assert feeder.tracer.read_output(index, ended) == expected, member.spec
                type(self).outputs_compared += sum(expected.values())

    def test_enough_was_compared(self):
        assert type(self).comparisons >= 100_000
        assert type(self).outputs_compared >= 5_000  # events, each in a kind
        assert type(self).kernel_filters >= 500

    def test_more_bounds_than_a_search_finds_are_pythons(self):
        """What would not be found in a fixed number of steps is not put where it would be searched for."""
        rules = [f"offset in ({', '.join(str(2 * i + n * 20_000) for i in range(7_000))})" for n in range(6)]
        spec = a_spec()
        spec["events"] = [{**spec["events"][0], "name": "lseek", "rule": rule} for rule in rules]
        parsed = parse_spec(spec)
        tables = traceleft.Tables(parsed.filters)
        steps = int(re.search(r"MAX_BOUNDS_LOG2 = (\d+)", (HERE / "bpf/traceleft.h").read_text())[1])
        assert 1 << steps == traceleft.MAX_BOUNDS
        assert [bool(placement.reasons) for placement in tables.placements] == [False] * 4 + [True] * 2
        assert max(traceleft.DIMENSION.unpack_from(matcher, traceleft.MATCHER.size)[6] for matcher in tables.matchers.values()
                   ) <= traceleft.MAX_BOUNDS
        events = [make_event("lseek", 3, offset, 0) for n in range(6) for offset in (n * 20_000, 13_998 + n * 20_000, 7_001 + n * 20_000)]
        self.compare(parsed, events, [])

    @pytest.mark.parametrize("rules", [
        [f"filename == '/data/{i}'" for i in range(1024)],
        [f"uid == {i}" for i in range(500)] + [f"startswith(filename, '/data/{i}')" for i in range(500)],
        [f"filename == '/{i}' and ret > {i}" for i in range(1023)] + ["'7' in filename"],
        ["filename in (" + ",".join(f"'/data/{i}'" for i in range(3000)) + ")", "filename == '/data/2999'"],
        [f"ret & {1 << i} and not mode & {1 << i}" for i in range(16)],
    ], ids=["1024 names", "500 + 500", "1023 and one for Python", "a list of 3000", "more dimensions than there is room for"])
    def test_many(self, rules):
        spec = a_spec()
        spec["events"] = [{**spec["events"][0], "rule": rule} for rule in rules]
        events = [an_open(f"{prefix}{i}", ret=r, uid=i, mode=i) for prefix in ("/", "/data/")
                  for i, r in ((0, 1), (7, 9), (499, 0), (999, 2000), (1023, -1), (2999, 5), (9999, 3))]
        self.compare(parse_spec(spec), events, [])

    def test_groups_that_differ_in_little(self):
        """Empty texts, bytes that move from one field to the next, and lengths that undo a byte: all are told apart."""
        spec = parse_spec({**a_spec(), "events": [
            {**a_spec("", "threshold=1;by=comm,filename,arg2")["events"][0]},
            {**a_spec("", "threshold=1;by=buf,count")["events"][0], "name": "read"}]})
        opens = [an_open(name, flags, comm=comm) for name in ("", "a", "ab", "b") for comm in ("", "a", "ab", "b") for flags in (0, 1)]
        reads = [make_event("read", 3, buf, count) for buf in ("", "a", "b\0", "a\0", "\0", "\0\0") for count in (0, 1, 2)]
        self.compare(spec, (opens + reads) * 2, [])

    @pytest.mark.parametrize("rule, matching, other", [
        ("glob(filename, '/tmp/*.so')", "/tmp/x.so", "/tmp/x.so.1"), ("glob(filename, '/a?c[de]')", "/abce", "/abcf"),
        ("glob(filename, 'plain')", "plain", "plains"), ("regex(filename, '^/etc/(a|b)')", "/etc/b", "/etc"),
        ("regex(filename, '^/ab*')", "/a", "/b"), ("regex(filename, 'b$|^a')", "xb", "xa"),
        ("contains(filename, 'x')", "axb", "ab"), ("startswith(filename, 'a\\udcc3')", "a\udcc3", "aé"),
        ("endswith(filename, '\\udca9b')", "\udca9b", "éb"), ("not glob(filename, '/tmp/*')", "/var", "/tmp/x"),
        ("not startswith(filename, 'a\\udcc3')", "aé", "a\udcc3")])
    def test_prefilters_let_through_what_matches(self, rule, matching, other):
        assert matches(rule, an_open(matching)) and not matches(rule, an_open(other))
        self.compare(parse_spec(a_spec(rule)), [an_open(matching), an_open(other), an_open("")], [])

    def test_texts_of_every_length(self):
        texts = ["/" + "abcdefgh" * 512][0]
        lengths = [0, 1, 7, 8, 9, 15, 16, 17, 63, 64, 255, 256, 257, 4087, 4088, 4089, 4094, 4095, 4096]
        rules = [f"filename == {texts[:n]!r}" for n in lengths]
        rules += [f"{f}(filename, {part!r})" for n in lengths if n for f, part in
                  (("startswith", texts[:n]), ("endswith", texts[4096 - n:4096]))][:24]
        spec = a_spec()
        spec["events"] = [{**spec["events"][0], "rule": rule} for rule in rules]
        near = [texts[:n - 1] + "!" for n in lengths if n] + ["!" + texts[1:n] for n in lengths if n > 1]
        self.compare(parse_spec(spec), [an_open(text) for text in [*(texts[:n] for n in lengths), *near]], [])


class TestSelectors:
    @pytest.mark.parametrize("text, selector", [
        ("open", traceleft.Selector(("open",))),
        ("open,close", traceleft.Selector(("open", "close"))),
        ("1:read", traceleft.Selector(("read",), (1,))),
        ("42:1234,1235:read", traceleft.Selector(("read",), (1234, 1235), 42)),
        ("42:0:read,open,read", traceleft.Selector(("read", "open"), (0,), 42)),
    ])
    def test_parses(self, text, selector):
        assert traceleft.parse_selector(text) == selector

    @pytest.mark.parametrize("text, message", [
        ("", "malformed"), (":open", "malformed"), ("1:2:3:open", "malformed"), ("a:open", "PID must be"), ("1:", "malformed"),
        ("-1:open", "PID must be"), ("99999999:open", "PID must be"), ("x:1:open", "PROGRAM_ID must"), ("1,:open", "PID must"),
        ("opne", "did you mean 'open'"), ("open,", "unknown event ''"), ("18446744073709551616:1:open", "PROGRAM_ID must"),
    ])
    def test_errors(self, text, message):
        with pytest.raises(traceleft.UsageError, match=message):
            traceleft.parse_selector(text)

    def test_contradictions_and_processes_that_do_not_exist(self):
        parse = traceleft.parse_selector
        with pytest.raises(traceleft.UsageError, match="two program ids, 1 and 2"):
            traceleft.plan_selectors([parse("1:1:open"), parse("2:1:open")])
        with pytest.raises(traceleft.UsageError, match="there is no process 4194304"):
            traceleft.plan_selectors([parse("4194304:open")])

    def test_a_spec_is_restricted(self):
        spec = parse_spec(a_spec())
        assert traceleft.plan_spec(spec, [])["open"].any_process
        plan = traceleft.plan_spec(spec, [traceleft.parse_selector("7:1:open")])
        assert plan == {"open": traceleft.Wanted(False, 0, {1: 7})}
        with pytest.raises(traceleft.UsageError, match="no filter of the spec uses"):
            traceleft.plan_spec(spec, [traceleft.parse_selector("close")])


class TestLibbpf:
    def test_every_function_has_been_there_since_1_0(self):
        """By the version that libbpf's own symbols carry: bpf_object__open_mem@@LIBBPF_0.0.1."""
        library = subprocess.run("ldconfig -p | awk '/libbpf.so.1 /{print $NF; exit}'", shell=True, capture_output=True, text=True,
                                 check=True).stdout.strip()
        symbols = subprocess.run(["readelf", "-W", "--dyn-syms", library], capture_output=True, text=True, check=True).stdout
        since = {name: tuple(map(int, version.split("."))) for name, version in re.findall(r"(\w+)@@LIBBPF_([\d.]+)", symbols)}
        assert {name for name in traceleft.PROTOTYPES if since[name] > (1, 0, 0)} == set()


class TestKernelSide:
    """The layouts that traceleft.py repeats, against the BTF of the object."""

    @pytest.fixture
    def btf(self):
        return object_btf()

    def offsets(self, kind):
        return {member["name"]: member["bits_offset"] // 8 for member in kind["members"]}

    def python_offsets(self, fields):
        offsets, at = {}, 0
        for name, code in fields:
            offsets[name] = at
            at += struct.calcsize("=" + code)
        return offsets, at

    def test_event_header(self, btf):
        offsets, size = self.python_offsets(traceleft.HEADER_FIELDS)
        assert offsets == self.offsets(btf["event_header"])
        assert size == traceleft.HEADER.size == btf["event_header"]["size"]

    @pytest.mark.parametrize("name, packed, fields", [
        ("argument", traceleft.ARGUMENT, "kind:B reg:B bits:B reserved:5x value:Q"),
        ("process", traceleft.PROCESS, "class:I reserved:4x from:Q to:Q"),
        ("class_event", traceleft.CLASS_EVENT, "program_id:Q wanted:I reserved:I"),
        ("syscall_rows", traceleft.SYSCALL_ROWS, "first:H count:H"),
        ("run", traceleft.RUN, "tick:I generation:I closed:I reserved:4x missed_calls:Q missed_owners:Q missed_children:Q uring:Q"),
        ("dimension", traceleft.DIMENSION, "kind:B field:B length:H id:I vector:I first:I count:I reserved:I and_mask:Q xor_mask:Q"),
        ("text", traceleft.TEXT, "hash:Q dimension:I length:I vector:I literal:I used:I reserved:4x"),
        ("filter", traceleft.FILTER, "frequency:Q threshold:Q flags:I max_groups:I fields:I by_count:I processing:I "
         "seconds:I output:I output_index:I output_count:B output_signed:B output_by:3s output_text:3s by:24s by_text:24s"),
        ("filter_state", traceleft.FILTER_STATE, "group:16s sampled:I groups:I reserved:40x"),
        ("filter_counts", traceleft.FILTER_COUNTS, "matched:Q passed:Q folded:Q submitted:Q ring_full:Q reserved:24x"),
    ])
    def test_tables(self, btf, name, packed, fields):
        offsets, size = self.python_offsets([field.split(":") for field in fields.split()])
        assert offsets == self.offsets(btf[name])
        assert "".join(field.split(":")[1] for field in fields.split()) == packed.format.strip("=")
        assert size == packed.size and size <= btf[name]["size"] < size + 8  # C pads the end

    def test_matcher_and_vector(self, btf):
        offsets = self.offsets(btf["matcher"])
        assert list(offsets) == ["words", "needed", "vector", "first_row", "dimension_count", "only_argument", "dimensions"]
        assert offsets["dimensions"] == traceleft.MATCHER.size
        assert btf["matcher"]["size"] == traceleft.MATCHER.size + traceleft.MAX_DIMENSIONS * traceleft.DIMENSION.size
        assert btf["vector"]["size"] == traceleft.VECTOR_SIZE
        assert btf["histogram"]["size"] == traceleft.HISTOGRAM.size
        assert btf["top_slot"]["size"] == traceleft.TOP_SLOT.size

    def test_settings(self):
        lines = subprocess.run(["readelf", "-sW", traceleft.OBJECT_PATH], capture_output=True, text=True, check=True).stdout
        symbols = {words[7]: (int(words[1], 16), int(words[2])) for words in map(str.split, lines.splitlines())
                   if len(words) == 8 and words[3] == "OBJECT"}
        names = ("own_pid", "wakeup_bytes", "hash_seeds", "event_types", "cpus", "histogram_count", "text_mask")
        assert [symbols[name] for name in names] == [(0, 4), (4, 4), (8, 16), (24, 4), (28, 4), (32, 4), (36, 4)]
        assert traceleft.SETTINGS.format == "=IIQQIIII"
        assert symbols["run"] == (0, traceleft.RUN.size)  # the only thing in .bss

    def test_tag(self, btf):
        offsets = self.offsets(btf["event_header"])
        assert (offsets["filter"], offsets["tick"]) == (traceleft.RECORD_TAG_OFFSET, traceleft.RECORD_TAG_OFFSET + 4)

    def test_source(self, btf):
        assert btf["source"]["size"] == traceleft.SOURCE.size + traceleft.MAX_ARGS * traceleft.ARGUMENT.size
        fields = ("event:H flags:B only_fdcwd:B path_kind:B path_argument:B dfd:B files:2s condition_register:B reserved:2x "
                  "condition:I program_id:Q")
        offsets, size = self.python_offsets([field.split(":") for field in fields.split()])
        assert {**offsets, "arguments": size} == self.offsets(btf["source"])
        assert size == traceleft.SOURCE.size

    def test_enums(self):
        """clang leaves enums that are only compared out of the BTF, so these are read from the header."""
        header = re.sub(r"/\*.*?\*/", "", (HERE / "bpf/traceleft.h").read_text(), flags=re.S)
        kinds = re.findall(r"KIND_\w+", re.search(r"enum argument_kind \{(.*?)\}", header, re.S)[1])
        assert [getattr(traceleft, name) for name in kinds] == list(range(11))
        paths = re.findall(r"PATH_\w+", re.search(r"enum path_kind \{(.*?)\}", header, re.S)[1])
        assert [getattr(traceleft, name) for name in paths] == list(range(5))
        names = (r"(SOURCE_\w+|EVENT_(?!PATH_UNKNOWN)\w+|MAX_ARGS|MAX_SLOTS|MAX_FILES|MAX_WORDS|MAX_DIMENSIONS|MAX_PROCESSES"
                 r"|MAX_SYSCALLS|MAX_PENDING|MAX_SOCKETS|MAX_PROBES|DFD_CWD|RECORD_VERSION|FILTER_[A-Z]+|PROCESSING_[A-Z]+|OUTPUT_[A-Z]+|BUCKETS"
                 r"|TOP_SLOTS|TOP_FIELDS|TOP_TEXT)"
                 r" ?=? ?(\d+(?: << \d+)?)")
        values = dict(re.findall(names, header))
        for name, value in values.items():
            mine = {"EVENT_INCOMPLETE": 1}.get(name, getattr(traceleft, name.replace("EVENT_", "FLAG_"), None))
            assert mine == eval(value), name
        assert len(values) >= 10
        fields = re.findall(r"FIELD_(\w+)", re.search(r"enum field \{(.*?)\}", header, re.S)[1])
        assert [name.lower().replace("file", "files") for name in fields[1:]] == list(traceleft.KERNEL_FIELDS)
        assert fields.index("TIME") + traceleft.MAX_SLOTS - 1 == traceleft.FIELD_TIME
        assert traceleft.KERNEL_FIELDS["ret"] == traceleft.FIELD_RET == traceleft.MAX_SLOTS
        dimensions = re.findall(r"DIMENSION_\w+", re.search(r"enum dimension_kind \{(.*?)\}", header, re.S)[1])
        assert [getattr(traceleft, name) for name in dimensions] == [0, 1, 2, 3]

    def test_prog_info(self):
        """struct bpf_prog_info against this kernel's own BTF."""
        dump = json.loads(subprocess.run(["bpftool", "-j", "btf", "dump", "file", "/sys/kernel/btf/vmlinux"],
                                         capture_output=True, check=True).stdout)
        info = next(k for k in dump["types"] if k["kind"] == "STRUCT" and k["name"] == "bpf_prog_info")
        assert self.offsets(info)["run_time_ns"] == traceleft.PROG_INFO_RUN_TIME
        assert self.offsets(info)["run_cnt"] == traceleft.PROG_INFO_RUN_COUNT
        assert self.offsets(info)["recursion_misses"] == traceleft.PROG_INFO_RECURSION_MISSES
        assert self.offsets(info)["verified_insns"] == traceleft.PROG_INFO_VERIFIED_INSNS


class TestOldestKernel:
    """The object uses nothing that Linux 5.15 lacks, since no such kernel is at hand to run it. What came when: bcc's
    docs/kernel-versions.md, include/uapi/linux/{bpf,btf}.h and Documentation/bpf/standardization/instruction-set.rst."""

    HELPERS = {  # those that the object calls
        "bpf_map_lookup_elem": (3, 19), "bpf_map_update_elem": (3, 19), "bpf_map_delete_elem": (3, 19),
        "bpf_get_smp_processor_id": (4, 1), "bpf_tail_call": (4, 2), "bpf_get_current_pid_tgid": (4, 2),
        "bpf_get_current_uid_gid": (4, 2), "bpf_get_current_comm": (4, 2), "bpf_probe_read_user": (5, 5),
        "bpf_probe_read_kernel": (5, 5), "bpf_probe_read_user_str": (5, 5), "bpf_probe_read_kernel_str": (5, 5),
        "bpf_ktime_get_boot_ns": (5, 8), "bpf_ringbuf_output": (5, 8), "bpf_ringbuf_query": (5, 8),
        "bpf_get_current_task_btf": (5, 11), "bpf_get_attach_cookie": (5, 15), "bpf_task_pt_regs": (5, 15)}
    LAST_HELPER = 175     # bpf_task_pt_regs; 176, bpf_get_branch_snapshot, is of 5.16
    LAST_MAP_TYPE = 29    # BPF_MAP_TYPE_TASK_STORAGE, 5.11; 30, BPF_MAP_TYPE_BLOOM_FILTER, is of 5.16
    MAP_FLAGS = 0x1fff    # up to BPF_F_INNER_MAP, 5.10; 0x2000, BPF_F_LINK, is of 6.0
    BTF_KINDS = {"INT", "PTR", "ARRAY", "STRUCT", "UNION", "ENUM", "FWD", "TYPEDEF", "VOLATILE", "CONST", "RESTRICT", "FUNC",
                 "FUNC_PROTO", "VAR", "DATASEC", "FLOAT"}  # FLOAT: 5.13; then DECL_TAG 5.16, TYPE_TAG 5.17, ENUM64 6.0
    SECTIONS = {"tp": (4, 7), "tp_btf": (5, 5), "iter/task_file": (5, 8), "syscall": (5, 14)}
    ATOMICS = {0x00, 0x01, 0x40, 0x41, 0x50, 0x51, 0xa0, 0xa1, 0xe1, 0xf1}  # all of 5.12; 0x100 and 0x110 are of 6.15

    @pytest.fixture
    def functions(self):
        """(section, function) -> its instructions: opcode, source register, offset, immediate."""
        text = subprocess.run(["llvm-objdump-14", "-d", traceleft.OBJECT_PATH], capture_output=True, text=True, check=True).stdout
        found, section, name = {}, None, None
        for line in text.splitlines():
            if line.startswith("Disassembly of section "):
                section = line.split()[-1].rstrip(":")
            elif match := re.match(r"[0-9a-f]{16} <(.+)>:$", line):
                name = match[1]
            elif match := re.match(r" *\d+:\t((?:[0-9a-f]{2}[ \t]){8,16})", line):
                opcode, registers, offset, immediate = struct.unpack("=BBhi", bytes.fromhex(match[1])[:8])
                found.setdefault((section, name), []).append((opcode, registers >> 4, offset, immediate))
        assert sum(map(len, found.values())) > 5000
        return found

    @pytest.fixture
    def types(self):
        return json.loads(subprocess.run(["bpftool", "-j", "btf", "dump", "file", traceleft.OBJECT_PATH],
                                         capture_output=True, check=True).stdout)["types"]

    @staticmethod
    def understood(opcode, offset, immediate):
        """Whether Linux 5.12 to 5.17 know the instruction."""
        kind, mode, code = opcode & 7, opcode & 0xe0, opcode & 0xf0
        if kind == 0:
            return opcode == 0x18
        if kind in (1, 2):  # 0x80: sign-extending loads, 6.6
            return mode == 0x60
        if kind == 3:
            return mode == 0x60 or mode == 0xc0 and opcode & 0x18 in (0, 0x18) and immediate in TestOldestKernel.ATOMICS
        if kind == 5:  # 0xe0: may_goto, 6.9
            return code <= 0xd0
        if kind == 6:  # 0x00: a jump of 32 bits, 6.6
            return code <= 0xd0 and code not in (0, 0x80, 0x90)
        return offset == 0 and code <= 0xd0 and opcode != 0xd7  # signed division and moves, and bswap, are of 6.6

    def test_what_is_not_understood(self):
        """What instruction set v4 and later ones have."""
        for instruction in [(0x06, 0, 9), (0x81, 0, 0), (0x91, 0, 0), (0xbf, 8, 0), (0x37, 1, 3), (0xd7, 0, 16), (0xe5, 0, 9),
                            (0xdb, 0, 0x100), (0xdb, 0, 0x110)]:
            assert not self.understood(*instruction)
        assert self.understood(0xdb, 0, 0xf1) and self.understood(0x05, 9, 0) and self.understood(0xbf, 0, 0)

    def test_instructions(self, functions):
        assert {instruction for code in functions.values() for instruction in code
                if not self.understood(instruction[0], *instruction[2:])} == set()

    def test_helpers(self, functions):
        """No kfunc (source 2), no helper that is newer; calls of the object's own functions have source 1."""
        calls = {(source, 0 if source == 1 else number) for code in functions.values() for opcode, source, _, number in code
                 if opcode == 0x85}
        header = Path("/usr/include/bpf/bpf_helper_defs.h").read_text()
        names = {int(number): name for name, number in re.findall(r"\(\*(bpf_\w+)\)\(.*\) = \(void \*\) ?(\d+);", header)}
        assert names[self.LAST_HELPER] == "bpf_task_pt_regs"
        assert {source for source, _ in calls} == {0, 1}
        assert {names[number] for source, number in calls if source == 0} == set(self.HELPERS)
        assert max(number for source, number in calls if source == 0) <= self.LAST_HELPER
        assert max(self.HELPERS.values()) <= (5, 15)

    def test_a_gate_calls_no_function(self, functions):
        """A program with both tail calls and functions is refused on aarch64 before 6.0: commit d4609a5d8c70."""
        gates = [code for code in functions.values() if (0x85, 0, 0, 12) in code]
        assert len(gates) == len(traceleft.GATES)
        assert not any(opcode == 0x85 and source == 1 for code in gates for opcode, source, *_ in code)

    def test_only_atomics_of_what_aarch64_knows_since_5_18(self, functions):
        """If the object no longer has any that return the old value, aarch64 can do with 5.15 as well."""
        returning = [i for code in functions.values() for i in code if i[0] & 0xe7 == 0xc3 and i[3] & 1]
        assert returning
        code = ("import platform; platform.machine = lambda: 'aarch64'; platform.release = lambda: '5.17.0-1-arm64'; import traceleft; "
                "print(traceleft.lacks_kernel()); platform.release = lambda: '5.18.0'; print(traceleft.lacks_kernel())")
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=HERE).stdout == \
            "kernel 5.17.0-1-arm64 is too old: it needs 5.18 or later on aarch64\n\n"

    def test_programs(self, functions):
        assert {section if section in self.SECTIONS else section.split("/")[0] for section, _ in functions} == {*self.SECTIONS, ".text"}
        assert max(self.SECTIONS.values()) <= (5, 15)

    def test_maps(self, types):
        by_id = {kind["id"]: kind for kind in types}
        section = next(kind for kind in types if kind["kind"] == "DATASEC" and kind["name"] == ".maps")
        maps = [by_id[by_id[variable["type_id"]]["type_id"]] for variable in section["vars"]]
        found = [{member["name"]: by_id[by_id[member["type_id"]]["type_id"]].get("nr_elems") for member in one["members"]} for one in maps]
        assert len(found) > 20 and all(one["type"] and one["type"] <= self.LAST_MAP_TYPE for one in found)
        assert not any((one.get("map_flags") or 0) & ~self.MAP_FLAGS for one in found)

    def test_btf(self, types):
        """libbpf would make older kinds of what the kernel does not know; it does not have to."""
        assert {kind["kind"] for kind in types} - self.BTF_KINDS == set()


class TestPrivileges:
    """What the process may do, as /proc says it, in every thread."""

    pytestmark = live

    BPF, PERFMON, DAC_OVERRIDE, DAC_READ_SEARCH = 1 << 39, 1 << 38, 1 << 1, 1 << 2
    NOBODY = 65534

    @pytest.fixture
    def folder(self):
        """A folder that nobody owns, where other users can reach it."""
        with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
            folder = Path(name) / "nobody"
            folder.mkdir()
            os.chown(folder, self.NOBODY, self.NOBODY)
            Path(name).chmod(0o755)
            yield folder

    def status(self, agent):
        """The lines of /proc/PID/task/*/status about privileges, which have to be the same for each thread."""
        names = ("Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs")
        found = set()
        for path in Path(f"/proc/{agent.process.pid}/task").glob("*/status"):
            lines = dict(line.split(":", 1) for line in path.read_text().splitlines())
            found.add(tuple(tuple(int(word, 16 if name.startswith("Cap") else 10) for word in lines[name].split())
                            for name in names))
        (values,) = found
        return dict(zip(names, values))

    def expected(self, kept, user=0, groups=None):
        return {"Uid": (user,) * 4, "Gid": (user,) * 4, "Groups": (user,) if groups is None else groups, "CapInh": (0,),
                "CapPrm": (kept,), "CapEff": (kept,), "CapBnd": (0,), "CapAmb": (0,), "NoNewPrivs": (1,)}

    def a_file_spec(self, path, log, **more):
        write_spec(path, a_spec(channel={"id": "1", "type": "file", "path": str(log)}, **more)).chmod(0o644)
        return path

    def test_printing_keeps_nothing(self):
        with Agent("trace", "mkdir", "-v") as agent:
            kept = 0 if traceleft.kernel_version() >= (5, 19) else self.BPF
            assert self.status(agent) == self.expected(kept, groups=tuple(os.getgroups()))
            code, _ = agent.stop()
        assert code == 0
        assert "traceleft: runs as user 0 with " + ("CAP_BPF" if kept else "no capability") in agent.stderr

    def test_a_spec_keeps_what_a_reload_takes(self, tmp_path):
        """With a grpc channel, whose threads have to have been started later."""
        spec = grpc_spec(1)
        spec["channels"].append({"id": "2", "type": "file", "path": f"{tmp_path}/log"})
        spec["events"].append({**spec["events"][0], "id": "file", "channel": "2"})
        with Agent("trace", "--collector-insecure", "--spec", write_spec(tmp_path / "spec", spec)) as agent:
            assert len(list(Path(f"/proc/{agent.process.pid}/task").iterdir())) > 1
            assert self.status(agent) == self.expected(self.BPF | self.PERFMON, groups=tuple(os.getgroups()))

    def test_another_user(self, folder, programs):
        spec = self.a_file_spec(folder / "spec", folder / "log", rule=f"arg1 == '{folder}/f'")
        with Agent("trace", "--user", "nobody", "--spec", spec, "--summary", folder / "summary") as agent:
            kept = self.BPF | self.PERFMON | self.DAC_READ_SEARCH  # tracefs is root's
            assert self.status(agent) == self.expected(kept, self.NOBODY)
            subprocess.run([programs["opens"], folder / "f", "1000"], check=True)
            code, _ = agent.stop()
        assert code == 0
        assert json.loads((folder / "summary").read_text())["filters"][0]["matched"] == 1000
        assert {(folder / name).stat().st_uid for name in ("log", "summary")} == {self.NOBODY}

    def test_root_keeps_what_writing_to_a_users_folder_takes(self, folder):
        """To create the file anew, once it has been rotated; and says so."""
        spec = self.a_file_spec(folder / "spec", folder / "log")
        with Agent("trace", "--spec", spec) as agent:
            assert self.status(agent)["CapEff"] == (self.BPF | self.PERFMON | self.DAC_OVERRIDE,)
        assert f"traceleft: keeps CAP_DAC_OVERRIDE: channel '1' writes to {folder}/log" in agent.stderr

    def with_only(self, capabilities):
        """A prefix that runs a command as nobody with these capabilities."""
        words = "-all" + "".join(f",+{name}" for name in capabilities)
        return ["setpriv", f"--reuid={self.NOBODY}", f"--regid={self.NOBODY}", "--clear-groups", f"--inh-caps={words}",
                f"--ambient-caps={words}", f"--bounding-set={words}"]

    def as_nobody(self, folder):
        """A copy of the script where nobody can read it, and the system's Python, which nobody can run."""
        shutil.copy(SCRIPT, folder)
        shutil.copytree(SCRIPT.parent / "bpf", folder / "bpf", ignore=shutil.ignore_patterns("*.[ch]"))
        return {"script": folder / "traceleft.py", "python": "/usr/bin/python3"}

    def test_starts_without_full_root(self, folder, programs):
        """Syscalls, connections and the BTF tracepoint for all syscalls: each takes no more than these three."""
        spec = a_spec(channel={"id": "1", "type": "file", "path": str(folder / "log")}, rule=f"arg1 == '{folder}/f'")
        names = ("read", "write", "futex", "connect_v4")
        spec["events"] += [{**spec["events"][0], "name": name, "rule": "pid == 0"} for name in names]
        prefix = self.with_only(["bpf", "perfmon", "dac_read_search"])
        with Agent("trace", "--spec", write_spec(folder / "spec", spec), "--summary", "-", prefix=prefix,
                   **self.as_nobody(folder)) as agent:
            assert self.status(agent)["CapEff"] == (self.BPF | self.PERFMON | self.DAC_READ_SEARCH,)
            assert "sys_exit, inet_sock_set_state" in agent.stderr[-1]
            subprocess.run([programs["opens"], folder / "f", "1000"], check=True)
            code, output = agent.stop()
        assert code == 0
        assert [row["matched"] for row in json.loads(output)["filters"]] == [1000, 0, 0, 0, 0]

    @pytest.mark.parametrize("capabilities, message", [
        ((), "missing privilege CAP_BPF and CAP_PERFMON"),
        (("bpf", "dac_read_search"), "missing privilege CAP_PERFMON"),
        (("perfmon", "dac_read_search"), "missing privilege CAP_BPF"),
        (("bpf", "perfmon"), "with CAP_DAC_READ_SEARCH too"),
    ])
    def test_says_which_capability_is_missing(self, folder, capabilities, message):
        assert_one_line(run("trace", "mkdir", prefix=self.with_only(capabilities), **self.as_nobody(folder)), 3, message)

    @pytest.mark.parametrize("prefix, name, code, message", [
        ((), "nosuchuser", 2, "there is no user 'nosuchuser'"),
        (("setpriv", "--bounding-set=-setuid"), "nobody", 3, "--user takes CAP_SETUID and CAP_SETGID"),
    ])
    def test_users_that_it_cannot_become(self, prefix, name, code, message):
        assert_one_line(run("trace", "mkdir", "--user", name, prefix=prefix), code, message)

    def test_a_user_who_may_not_write_there(self, tmp_path):
        spec = self.a_file_spec(tmp_path / "spec", tmp_path / "log")
        assert_one_line(run("trace", "--user", "nobody", "--spec", spec), 1, "Permission denied")
        assert {path.name for path in tmp_path.iterdir()} == {"spec"}


class TestReload:
    """SIGHUP: another spec without a gap, or the same when the new one is no good."""

    pytestmark = live

    def a_filter(self, tmp_path, id, parameters="frequency=1", rule=None, name="open", **more):
        rule = f"filename == '{tmp_path}/f'" if rule is None and name == "open" else rule or ""
        return a_spec(rule, parameters, name=name, id=id, **more)["events"][0]

    def write(self, tmp_path, *filters, channels=("log",)):
        """Puts a spec where the agent reads it, whole at any time."""
        value = {"channels": [{"id": str(i), "type": "file", "path": f"{tmp_path}/{name}"} for i, name in enumerate(channels, 1)],
                 "events": list(filters)}
        write_spec(tmp_path / "new", value).rename(tmp_path / "spec")
        return tmp_path / "spec"

    def reload(self, agent, said="traceleft: reloaded"):
        """Sends SIGHUP and waits for the answer; returns it."""
        before = len(agent.stderr)
        agent.process.send_signal(signal.SIGHUP)
        wait_until(lambda: any(said in line for line in agent.stderr[before:]) or agent.process.poll() is not None, said)
        return agent.stderr[before:]

    def counts(self, tmp_path):
        """Filter -> sum of the counts in the log."""
        found = {}
        for record in map(json.loads, (tmp_path / "log").read_text().splitlines()):
            found[record["filter"]] = found.get(record["filter"], 0) + record["count"]
        return found

    def test_in_a_loop_under_load(self, tmp_path):
        """Two processes open a file as fast as they can, and a third others a few thousand times a second, while each reload
        goes on. Each event is counted once: by filters that stay, with sigma's progress, by those that change and by those
        that end with each reload, in which the parts add up, and by those that need Python, which could not keep up with the
        two."""
        seconds, slow = length(0, 30), f"glob(filename, '{tmp_path}/p*') and ret >= 0"
        kept = [self.a_filter(tmp_path, "kept", "frequency=7"), self.a_filter(tmp_path, "by", "frequency=3;by=pid,comm"),
                self.a_filter(tmp_path, "python", "frequency=5", slow)]

        def turn(number):
            return self.a_filter(tmp_path, f"turn {number}"), self.a_filter(tmp_path, f"python turn {number}", rule=slow)

        variants = [[*kept, self.a_filter(tmp_path, "changed", "frequency=2"), *turn(0)],
                    [self.a_filter(tmp_path, "changed", "frequency=3"), *turn(1), *reversed(kept),
                     self.a_filter(tmp_path, "more", name="close", rule="fd == -1")],
                    [*turn(2), *kept, self.a_filter(tmp_path, "changed", "frequency=1;by=filename"),
                     self.a_filter(tmp_path, "tcp", name="connect_v4", rule="dport == 1")]]
        reloads, fewest = 0, []
        with Agent("trace", "--spec", self.write(tmp_path, *variants[0]), "--summary", "-") as agent:
            with Load(tmp_path / "f", processes=2) as flood, Load(tmp_path / "p1", tmp_path / "p2", pause=0.0002) as load:
                wait_until(lambda: flood.begun() and load.begun(), "opens")
                begin = time.monotonic()
                while reloads < 3 or time.monotonic() < begin + seconds:
                    reloads += 1
                    self.write(tmp_path, *variants[reloads % 3])
                    before = flood.begun(), load.begun()
                    for _ in range(20):  # at any time, and faster than they can be answered
                        agent.process.send_signal(signal.SIGHUP)
                        time.sleep(0.005)
                    self.reload(agent)
                    fewest.append((flood.begun() - before[0], load.begun() - before[1]))
                took = time.monotonic() - begin
            code, output = agent.stop()
        assert code == 0, agent.stderr
        assert all(fast > 100 and slow > 10 for fast, slow in fewest), fewest  # from the first signal to the answer
        rows = {row["id"]: row for row in json.loads(output)["filters"]}
        turns, python_turns = ([rows[f"{kind}turn {number}"] for number in range(3)] for kind in ("", "python "))
        assert set(rows) == {member["id"] for variant in variants for member in variant} and not any(row["lost"] for row in rows.values())
        assert [(rows[name]["matched"], rows[name]["passed"]) for name in ("kept", "by", "python")] == [
            (flood.opens, flood.opens // 7), (flood.opens, sum(notes[0] // 3 for notes in flood.notes)), (load.opens, load.opens // 5)]
        assert rows["changed"]["matched"] == flood.opens and flood.opens // 3 - 2 * reloads <= rows["changed"]["passed"] <= flood.opens
        for opens, parts in ((flood.opens, turns), (load.opens, python_turns)):
            assert sum(row["matched"] for row in parts) == sum(row["passed"] for row in parts) == opens and all(row["matched"] for row in parts)
        assert self.counts(tmp_path) == {name: row["passed"] for name, row in rows.items() if row["passed"]}
        figures(seconds=f"{took:.0f}", signals=21 * reloads, reloads=sum("traceleft: reloaded" in line for line in agent.stderr),
                opens=flood.opens, least_from_signal_to_answer=min(fewest), matched_and_passed={name: (row["matched"], row["passed"]) for
                name, row in rows.items()}, opens_for_the_filters_in_python=load.opens, lost=0)

    def test_other_events_other_channels(self, programs, tmp_path):
        """From opens in one file to mkdirs in another, and to what neither saw."""
        first = self.write(tmp_path, self.a_filter(tmp_path, "opens"))
        with Agent("trace", "--spec", first, "--summary", "-") as agent:
            subprocess.run([programs["opens"], tmp_path / "f", "100"], check=True)
            mkdir = self.a_filter(tmp_path, "mkdirs", name="mkdir", rule=f"startswith(pathname, '{tmp_path}/')")
            self.write(tmp_path, {**mkdir, "channel": "2"}, channels=("log", "other"))
            self.reload(agent, "1 filters, 0 of them as before")
            subprocess.run([programs["opens"], tmp_path / "f", "100"], check=True)
            subprocess.run(["mkdir", tmp_path / "a", tmp_path / "b"], check=True)
            wait_until(lambda: (tmp_path / "other").exists() and '"count": 2' in (tmp_path / "other").read_text(), "mkdirs")
            assert str(tmp_path / "log") not in [os.readlink(path) for path in Path(f"/proc/{agent.process.pid}/fd").iterdir()]
            code, output = agent.stop()
        assert code == 0
        assert [(row["id"], row["event"], row["matched"]) for row in json.loads(output)["filters"]] == [
            ("opens", "open", 100), ("mkdirs", "mkdir", 2)]
        assert self.counts(tmp_path) == {"opens": 100}

    def test_calls_that_are_under_way(self, tmp_path):
        """Begun under one spec and ended under the next: seen by it, with the arguments as they were."""
        lingers = """if True:
            import os, socket, struct, sys, threading
            server = socket.create_server(("127.0.0.1", 0))
            client = socket.create_connection(server.getsockname())
            peer, _ = server.accept()
            client.setblocking(False)
            try:
                while True:
                    client.send(bytes(65536))
            except BlockingIOError:
                client.setblocking(True)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 60))
            fd = client.detach()
            print(fd, flush=True)
            sys.stdin.readline()
            thread = threading.Thread(target=os.close, args=[fd])
            thread.start()
            print("closing", flush=True)
            sys.stdin.readline()
            peer.close()
            thread.join()"""
        with subprocess.Popen([sys.executable, "-c", lingers], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            closes = self.a_filter(tmp_path, "closes", name="close",
                                   rule=f"pid == {process.pid} and fd == {int(process.stdout.readline())} and 'socket' in path")
            with Agent("trace", "--spec", self.write(tmp_path, closes), "--summary", "-") as agent:
                process.stdin.write("\n")
                process.stdin.flush()
                process.stdout.readline()
                tasks = Path(f"/proc/{process.pid}/task")
                number = str(traceleft.syscall_number("close"))
                wait_until(lambda: number in [(task / "syscall").read_text().split()[0] for task in tasks.iterdir()], "close()")
                self.write(tmp_path, self.a_filter(tmp_path, "other", name="mkdir"), closes)
                self.reload(agent)
                process.stdin.write("\n")
                process.stdin.close()
                assert process.wait(DEADLINE) == 0
                _, output = agent.stop()
        assert {row["id"]: row["matched"] for row in json.loads(output)["filters"]}["closes"] == 1

    def test_a_collector_that_has_moved(self, programs, tmp_path):
        """Under load, with a spool: what waited for the one that is gone, and what comes, goes to the other, once."""
        ports, log = (free_port(), free_port()), tmp_path / "received"

        def write(port):
            spec = grpc_spec(port, {"spool": {"dir": f"{tmp_path}/spool"}})
            return write_spec(tmp_path / "new", {**spec, "events": [self.a_filter(tmp_path, "a", format="collector_spec_pb")]}).rename(
                tmp_path / "spec")
        with contextlib.ExitStack() as stack, Agent("trace", "--spec", write(ports[0]), "--collector-insecure", "--summary", "-") as agent:
            with Load(tmp_path / "f") as load:
                wait_until(lambda: list((tmp_path / "spool").glob("*.spool")), "something is spooled")
                sink = stack.enter_context(Sink(log, ports[1]))
                write(ports[1])
                self.reload(agent)
                wait_until(lambda: sink.received()[0], "an alert")
                before = sum(sink.received()[0].values())
            code, output = agent.stop()
            counts, doubles = sink.received()
        (row,) = json.loads(output)["filters"]
        assert (code, row["lost"], doubles) == (0, {}, 0) and load.opens == row["matched"] == sum(counts.values()) > before > 0
        assert sorted(sequence for _, sequence in counts) == list(range(1, len(counts) + 1))

    @pytest.mark.parametrize("text, error", [
        ("", "the file is empty"),
        ('{"channels": [], "events": [{"name": "opne"}]}', "unknown event 'opne' (did you mean 'open'?)"),
        (json.dumps(a_spec()), "cannot open /nonexistent/log"),
    ])
    def test_a_spec_that_is_no_good_changes_nothing(self, programs, tmp_path, text, error):
        with Agent("trace", "--spec", self.write(tmp_path, self.a_filter(tmp_path, "a", "frequency=7")), "--summary", "-") as agent:
            subprocess.run([programs["opens"], tmp_path / "f", "6"], check=True)
            (tmp_path / "spec").write_text(text)
            said = self.reload(agent, "was not loaded: the spec before goes on")
            assert any(error in line for line in said)
            subprocess.run([programs["opens"], tmp_path / "f", "1"], check=True)
            code, output = agent.stop()
        (row,) = json.loads(output)["filters"]
        assert (code, row["matched"], row["passed"]) == (0, 7, 1)

    def kernel_objects(self):
        """What this process holds of BPF and perf, and how often; pipes and sockets of earlier tests come and go."""
        links = []
        for path in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                links.append(os.readlink(path))
        return collections.Counter(link for link in links if re.match(r"anon_inode:.*(bpf|btf|perf)", link))

    def test_a_spec_that_came_through_a_pipe(self, programs, tmp_path):
        """It can be read once."""
        spec = self.write(tmp_path, self.a_filter(tmp_path, "a")).read_text()
        os.mkfifo(tmp_path / "pipe")
        writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=(spec,))
        writer.start()
        with Agent("trace", "--spec", tmp_path / "pipe", "--summary", "-") as agent:
            writer.join()
            said = self.reload(agent, "was not loaded: the spec before goes on")
            assert any("pipe is no regular file, and cannot be read a second time" in line for line in said)
            subprocess.run([programs["opens"], tmp_path / "f", "10"], check=True)
            code, output = agent.stop()
        assert (code, json.loads(output)["filters"][0]["matched"]) == (0, 10)

    @pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
    def test_signals_while_the_kernel_verifies(self, programs, tmp_path, number):
        """It gives up for a pending one, so none is let through: each reload works, however many signals come."""
        specs = [self.a_filter(tmp_path, "a", "frequency=7"), self.a_filter(tmp_path, "b", "frequency=2")]
        with Agent("trace", "--spec", self.write(tmp_path, specs[0]), "--summary", "-") as agent:
            for turn in range(4):
                self.write(tmp_path, specs[0], *specs[1:turn % 2 + 1])
                before = len(agent.stderr)
                agent.process.send_signal(signal.SIGHUP)
                while not any("traceleft: reloaded" in line for line in agent.stderr[before:]):
                    agent.process.send_signal(number)
                    time.sleep(0.005)
                    assert agent.process.poll() is None and not any("was not loaded" in line for line in agent.stderr)
            subprocess.run([programs["opens"], tmp_path / "f", "14"], check=True)
            code, output = agent.stop()
        assert (code, json.loads(output)["filters"][0]["passed"]) == (0, 2) and "refused" not in "".join(agent.stderr)

    def test_a_kernel_that_refuses_changes_nothing(self, programs, tmp_path, monkeypatch):
        """What was made by then is undone, and the next reload works."""
        tables = traceleft.Tables(parse_spec(a_spec(f"filename == '{tmp_path}/f'")).filters)
        plan = {"open": traceleft.Wanted(any_process=True)}
        with traceleft.Tracer(plan, tables, spare_filters=10) as tracer:
            more = parse_spec({**a_spec(), "events": [
                self.a_filter(tmp_path, "x"), self.a_filter(tmp_path, "y", name="mkdir", rule=f"pathname == '{tmp_path}/none'")]})
            new_plan = {**plan, "mkdir": traceleft.Wanted(any_process=True)}
            held = self.kernel_objects()
            assert {"anon_inode:bpf-map", "anon_inode:bpf-prog", "anon_inode:[perf_event]"} <= set(held)
            for place in ("fill_tables", "attach_one"):
                with monkeypatch.context() as patch:
                    def fail(*_):
                        raise traceleft.HostError("refused")
                    patch.setattr(traceleft.Tracer, place, fail)
                    with pytest.raises(traceleft.HostError, match="refused"):
                        tracer.reload(new_plan, traceleft.Tables(more.filters, previous=tracer.tables))
                assert self.kernel_objects() == held
                subprocess.run([programs["opens"], tmp_path / "f", "10"], check=True)
            assert tracer.read_counts()[0].matched == 20
            tracer.reload(new_plan, traceleft.Tables(more.filters, previous=tracer.tables))
            tracer.retire()
            subprocess.run([programs["opens"], tmp_path / "f", "10"], check=True)
            assert [count.matched for count in tracer.read_counts()] == [0, 10, 0]
            too_many = parse_spec({**a_spec(), "events": [self.a_filter(tmp_path, str(i)) for i in range(11)]})
            with pytest.raises(traceleft.TraceleftError, match="there is room for 11 filters"):
                tracer.reload(plan, traceleft.Tables(too_many.filters, previous=tracer.tables))

    def test_leaves_nothing_behind(self, tmp_path):
        """Neither descriptors nor programs nor memory pile up."""
        variants = [[self.a_filter(tmp_path, "a", f"frequency={n};by=pid")] for n in (1, 2)]
        with Agent("trace", "--spec", self.write(tmp_path, *variants[0])) as agent:
            figures = []
            for n in range(6):
                self.write(tmp_path, *variants[n % 2])
                self.reload(agent)
                if n % 2:
                    figures.append((len(os.listdir(f"/proc/{agent.process.pid}/fd")), resident_kib(agent.process.pid)))
            code, _ = agent.stop()
        assert code == 0
        assert len({descriptors for descriptors, _ in figures}) == 1
        assert figures[-1][1] - figures[0][1] < 4096


@pytest.mark.usefixtures("programs")
class TestTracer:
    pytestmark = live

    def trace_calls(self, programs, folder, selector, python=sys.executable):
        """The lines that `trace` prints for the program `calls`, its pid, and the exit code."""
        caller = subprocess.Popen([programs["calls"], folder], stdin=subprocess.PIPE)
        try:
            with Agent("trace", selector.format(pid=caller.pid), python=python) as agent:
                caller.stdin.close()
                assert caller.wait(DEADLINE) == 0
                code, output = agent.stop()
        finally:
            caller.kill()
            caller.wait()
        return output.splitlines(), caller.pid, code

    def expected(self, pid, program_id, path, name, ret, *args, incomplete=0):
        """Events are built from the table, so that the line is wrong if the table is."""
        event = make_event(name, *args, ret=ret, pid=pid, program_id=program_id, incomplete=incomplete, files=(path or "",))
        return traceleft.format_event(event)

    def test_every_named_syscall_to_the_letter(self, programs, tmp_path):
        lines, pid, code = self.trace_calls(programs, str(tmp_path), "42:{pid}:" + ",".join(list(EVENT_TYPES)[:12]))
        assert code == 0
        self.assert_calls(lines, pid, str(tmp_path))

    @pytest.mark.parametrize("see_all, program", [(True, "every_sys_exit"), (False, "sys_exit")])
    def test_both_ways_to_attach_see_the_same(self, programs, tmp_path, see_all, program):
        caller = subprocess.Popen([programs["calls"], tmp_path], stdin=subprocess.PIPE)
        with traceleft.Tracer(f"42:{caller.pid}:{','.join(list(EVENT_TYPES)[:12])}", see_all=see_all) as tracer:
            assert {"every_sys_exit", "sys_exit"} & {attachment.program for attachment in tracer.attached} == {program}
            caller.stdin.close()
            assert caller.wait(DEADLINE) == 0
            self.assert_calls([traceleft.format_event(event) for event in tracer.drain()], caller.pid, str(tmp_path))

    def assert_calls(self, lines, pid, here):
        """That these are the lines of the program `calls` in the directory `here`, traced as program 42."""
        lines = lines[lines.index(next(line for line in lines if '"file" Flags' in line)):]  # after its start-up

        def line(path, *call, **more):
            return self.expected(pid, 42, path, *call, **more)

        flags = os.O_RDWR | os.O_CREAT
        expected = [
            line(None, "open", 3, "file", flags, 0o640),
            line(None, "open", 4, "created", os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600),
            line(None, "open", 5, ".", os.O_RDONLY | os.O_DIRECTORY, 0),
            line(None, "open", 6, "file", os.O_RDONLY | os.O_CLOEXEC, 0),
            line(None, "open", -2, "missing", 0, 0),
            line(None, "open", -2, "", 0, 0),
            line(None, "open", -14, "", 0, 0, incomplete=1),
            line(f"{here}/file", "write", 6, 3, "hello\n", 6),
            line(f"{here}/created", "write", 300, 4, "x" * 256, 300),
            line(None, "write", -9, -1, "lost", 4),
            line(f"{here}/file", "read", 6, 3, "hello\n", 300),
            line(f"{here}/file", "read", 0, 3, "", 300),
            line(None, "mkdir", 0, "directory", 0o750),
            line(here, "mkdirat", 0, 5, "other", 0o700),
            line(here, "mkdirat", -17, -100, "directory", 0o700),
            line(None, "chmod", 0, "file", 0o4755),
            line(f"{here}/file", "fchmod", 0, 3, 0o600),
            line(here, "fchmodat", 0, 5, "file", 0o644),
            line(None, "chown", 0, "file", 1, 2),
            line(f"{here}/file", "fchown", 0, 3, 3, 2**32 - 1),
            line(here, "fchownat", 0, 5, "file", 5, 6, 0x100),
            line(f"{here}/file", "close", 0, 3),
            line(None, "close", -9, -1),
        ]
        assert lines == expected

    def test_a_descriptor_is_followed_by_its_path(self, tmp_path):
        reader = subprocess.Popen([sys.executable, "-c", "import sys,time\nf=open('/proc/cpuinfo','rb',0)\nsys.stdin.read()\n"
                                   "f.read(1)\ntime.sleep(30)"], stdin=subprocess.PIPE)
        try:
            wait_until(lambda: any(os.readlink(p) == "/proc/cpuinfo" for p in Path(f"/proc/{reader.pid}/fd").iterdir()), "open")
            with Agent("trace", f"{reader.pid}:read") as agent:
                reader.stdin.close()
                time.sleep(0.5)
                _, output = agent.stop()
        finally:
            reader.kill()
            reader.wait()
        assert re.search(r'Fd \d+</proc/cpuinfo> Buf "p" Count 1$', output, re.M)

    def test_selects_processes_and_reports_program_ids(self, programs, tmp_path):
        lines, pid, _ = self.trace_calls(programs, str(tmp_path), "7:{pid}:mkdir")
        assert [re.sub(r"hash \d+", "hash H", line) for line in lines] == [
            f'name mkdir pid {pid} program id 7 return value 0 hash H Pathname "directory" Mode 488']

    def test_without_pid_every_process_is_traced(self, programs, tmp_path):
        with Agent("trace", "mkdir,close") as agent:
            for i in range(3):
                subprocess.run(["mkdir", tmp_path / str(i)], check=True)
            code, output = agent.stop(signal.SIGTERM)
        assert code == 0
        for i in range(3):
            assert output.count(f'Pathname "{tmp_path}/{i}" Mode 511') == 1
        assert "name close" in output

    @pytest.mark.parametrize("length, whole", [(255, True), (3000, True), (4094, True), (4095, True), (4096, False)])
    def test_strings_are_captured_whole(self, length, whole):
        path = "/" + "x" * (length - 1)
        with traceleft.Tracer(f"{os.getpid()}:open") as tracer:
            libc = ctypes.CDLL(None, use_errno=True)
            libc.open(path.encode(), 0)
            tracer.detach()
            event = next(e for e in tracer.drain() if e.args[0].startswith("/xxx"))
        assert event.incomplete == (not whole)
        assert event.args[0] == path[:4096]
        assert event.ret == (-2 if length < 257 else -36)  # ENAMETOOLONG: names have at most 255 characters

    def test_a_short_path_costs_a_short_record(self):
        tables = traceleft.Tables((), ["mkdir"], traceleft.PRINTED_FIELDS)
        with traceleft.Tracer(traceleft.plan_selectors([traceleft.parse_selector(f"{os.getpid()}:mkdir")]), tables) as tracer:
            with contextlib.suppress(OSError):
                os.mkdir("/")
            tracer.detach()
            tracer.bpf.library.ring_buffer__consume(tracer.ring)
            assert [len(record) for record in tracer.records] == [traceleft.HEADER.size + len("/") + len("/")]  # name and path
            tracer.consumed += len(tracer.records)
            tracer.records.clear()

    def test_who_made_the_call(self, tmp_path):
        script = f"import os\nos.setresgid(5, 5, 5)\nos.setresuid(4, 4, 4)\nos.path.exists('x')\nopen('{tmp_path}/nope')"
        before = time.time_ns()
        with traceleft.Tracer("open") as tracer:
            child = subprocess.run([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
            tracer.detach()
            event = next(e for e in tracer.drain() if e.args[0] == f"{tmp_path}/nope")
        assert child.returncode == 1
        assert (event.ppid, event.uid, event.gid, event.ret) == (os.getpid(), 4, 5, -13)
        assert event.comm == Path(sys.executable).resolve().name[:15] or event.comm.startswith("python")
        assert event.pid == event.tid != os.getpid()
        assert before < event.timestamp_ns < time.time_ns()

    def test_threads_have_ids_of_their_own(self):
        with traceleft.Tracer(f"{os.getpid()}:mkdir") as tracer:
            def call():
                with contextlib.suppress(OSError):
                    os.mkdir("/")
                tids.append(threading.get_native_id())
            tids = []
            thread = threading.Thread(target=call)
            thread.start()
            thread.join()
            tracer.detach()
            events = list(tracer.drain())
        assert [(e.pid, e.tid) for e in events] == [(os.getpid(), tids[0])]

    def test_its_own_events_are_left_out(self):
        with Agent("trace", "write") as agent:  # printing an event is a write: a loop, if it saw itself
            time.sleep(1)
            pid = agent.process.pid
            _, output = agent.stop()
        assert f"pid {pid} " not in output

    def test_a_process_in_another_pid_namespace_is_in_a_container(self, tmp_path):
        with Agent("trace", "mkdir") as agent:
            subprocess.run(["unshare", "--pid", "--fork", "mkdir", tmp_path / "in"], check=True)
            subprocess.run(["mkdir", tmp_path / "out"], check=True)
            _, output = agent.stop()
        lines = [line for line in output.splitlines() if str(tmp_path) in line]
        assert [line.endswith(" [container]") for line in lines] == [True, False]

    def test_iterates(self):
        with traceleft.Tracer(f"{os.getpid()}:mkdir") as tracer:
            with contextlib.suppress(OSError):
                os.mkdir("/")
            assert next(iter(tracer)).args == ("/", 0o777)

    def only_this_file(self, tmp_path, rule):
        """A spec file for the opens of `f`, by a rule that needs Python or not."""
        spec = a_spec(rule, channel={"id": "1", "type": "file", "path": str(tmp_path / "log")})
        return write_spec(tmp_path / "spec", spec)

    def test_a_full_ring_is_counted_and_said(self, programs, tmp_path):
        spec = self.only_this_file(tmp_path, f"glob(filename, '{tmp_path}/f*')")
        with Agent("trace", "--spec", spec, "--ring-size", 4096, "--summary", "-") as agent:
            agent.process.send_signal(signal.SIGSTOP)
            subprocess.run([programs["opens"], tmp_path / "f", "1000"], check=True)
            agent.process.send_signal(signal.SIGCONT)
            code, output = agent.stop()
        summary = json.loads(output)
        (row,) = summary["filters"]
        assert code == 4 and not summary["balanced"]
        assert row["matched"] > 0 and row["lost"] == {"ring_full": 1000 - row["matched"]}
        assert any("does not add up" in line for line in agent.stderr)

    def test_a_backlog_at_the_end_is_read_to_its_last_event(self, programs, tmp_path):
        spec = self.only_this_file(tmp_path, f"glob(filename, '{tmp_path}/f*')")
        with Agent("trace", "--spec", spec, "--summary", "-") as agent:
            agent.process.send_signal(signal.SIGSTOP)
            subprocess.run([programs["opens"], tmp_path / "f", "150000"], check=True)
            agent.process.send_signal(signal.SIGINT)
            agent.process.send_signal(signal.SIGCONT)
            code, output = agent.finish()
        assert code == 0
        assert json.loads(output)["filters"][0]["matched"] == 150_000

    def test_thresholds_count_by_the_time_of_the_event(self, programs, tmp_path):
        """Read late, all of them at once, 3 bursts of 1000 in different seconds are each held back once."""
        spec = a_spec(f"glob(filename, '{tmp_path}/f*')", "threshold=900",
                      channel={"id": "1", "type": "file", "path": str(tmp_path / "log")})
        spec["events"].append({**spec["events"][0], "rule": f"filename == '{tmp_path}/f'"})
        with Agent("trace", "--spec", write_spec(tmp_path / "spec", spec), "--summary", "-") as agent:
            agent.process.send_signal(signal.SIGSTOP)
            for _ in range(3):
                time.sleep(1.1 - time.time() % 1)  # at the begin of a second
                subprocess.run([programs["opens"], tmp_path / "f", "1000"], check=True)
            agent.process.send_signal(signal.SIGCONT)
            code, output = agent.stop()
        python, kernel = json.loads(output)["filters"]
        assert (code, python["matched"], python["passed"]) == (0, 3000, 300)
        assert kernel["matched"] == 3000
        assert kernel["passed"] in (300, 200, 100)  # its seconds are those of another clock: a burst may lie in two

    def test_a_full_ring_costs_a_sample_and_no_count(self, programs, tmp_path):
        spec = a_spec(channel={"id": "1", "type": "file", "path": str(tmp_path / "log")})
        spec["events"] = [{**spec["events"][0], "id": str(i), "rule": f"filename == '{tmp_path}/f'"} for i in range(64)]
        with Agent("trace", "--spec", write_spec(tmp_path / "spec", spec), "--ring-size", 4096, "--summary", "-") as agent:
            subprocess.run([programs["opens"], tmp_path / "f", "1000"], check=True)
            code, output = agent.stop()
        summary = json.loads(output)
        assert code == 0 and summary["balanced"] and summary["samples_lost"] > 0
        assert [(row["matched"], row["passed"], row["lost"]) for row in summary["filters"]] == [(1000, 1000, {})] * 64
        records = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
        assert sum(record["count"] for record in records) == 64_000
        assert any(record["sample"] is None for record in records)
        assert any("went out without one" in line for line in agent.stderr)

    def test_a_flood_for_python_costs_the_others_nothing(self, programs, tmp_path):
        """One filter needs Python for every open and drowns; the one beside it has all its counts and samples."""
        spec = a_spec("'nowhere' in filename", channel={"id": "1", "type": "file", "path": str(tmp_path / "log")})
        spec["events"].append({**spec["events"][0], "id": "kernel", "rule": f"filename == '{tmp_path}/f'"})
        with Agent("trace", "--spec", write_spec(tmp_path / "spec", spec), "--ring-size", 65536, "--duration", "3",
                   "--summary", "-") as agent:
            begin = time.monotonic()
            floods = [subprocess.Popen([programs["opens"], tmp_path / "f", "700000"]) for _ in range(2)]
            code, output = agent.finish()
            assert time.monotonic() - begin < 10
            for flood in floods:
                flood.kill()
                flood.wait()
        summary = json.loads(output)
        python, kernel = summary["filters"]
        assert code == 4 and python["lost"]["ring_full"] > 0  # said, not hidden
        assert kernel["lost"] == {} and kernel["matched"] == kernel["passed"] > 0 and "samples_lost" not in summary
        assert all(json.loads(line)["sample"] for line in (tmp_path / "log").read_text().splitlines())

    def test_a_reader_that_stalls_does_not_hold_up_the_end(self, programs, tmp_path):
        with Agent("trace", "open", "--summary", tmp_path / "summary") as agent:
            subprocess.run([programs["opens"], tmp_path / "f", "20000"], check=True)  # more than a pipe takes
            time.sleep(0.5)
            agent.process.send_signal(signal.SIGTERM)
            assert agent.process.wait(DEADLINE) == 0
        summary = json.loads((tmp_path / "summary").read_text())
        assert summary["balanced"] and summary["filters"][0]["lost"]["not_written"] > 10_000

    def test_what_nobody_reads_is_lost_and_counted(self, programs, tmp_path):
        with Agent("trace", "open", "--summary", tmp_path / "summary") as agent:
            subprocess.run([programs["opens"], tmp_path / "f", "5000"], check=True)
            assert agent.process.stdout.readline().startswith("name open")
            agent.process.stdout.close()
            assert agent.process.wait(DEADLINE) == 0
        summary = json.loads((tmp_path / "summary").read_text())
        assert summary["balanced"] and summary["filters"][0]["lost"]["not_written"] > 0

    def test_the_verifier_is_far_from_its_limit(self):
        """One million instructions, and kernels differ in how many they need for one and the same program."""
        with traceleft.Tracer("open") as tracer:
            assert 0 < tracer.verified_instructions() < 200_000

    def test_attaches_only_to_what_is_named(self):
        with traceleft.Tracer("read,mkdir") as tracer:
            assert [source.syscall.name for source in tracer.sources] == ["mkdir", "read"]
            assert [attachment.place for attachment in tracer.attached if attachment.category == "syscalls"] == [
                "syscalls/sys_exit_mkdir", "syscalls/sys_exit_read"]

    def test_leaves_nothing_attached(self):
        with traceleft.Tracer("open"):
            own = program_ids("self")  # other tracers may come and go
            assert own and programs_left(own) == own
        wait_until(lambda: not programs_left(own), "the program is gone")


# ----------------------------------------------------------------------------------------------------------------------
# What is seen of a live kernel: paths, connections, processes, and every syscall
# ----------------------------------------------------------------------------------------------------------------------


def record(selectors, action, **options):
    """The events of selected processes that `action` makes. A name alone is an event of this process and its children."""
    selectors = " ".join(word if ":" in word else f"{os.getpid()}:{word}" for word in selectors.split())
    with traceleft.Tracer(selectors, **{"follow": True, **options}) as tracer:
        while tracer.poll():  # what attaching did
            pass
        action()
        return list(tracer.drain())


def python(script, *arguments, prefix=(), **more):
    """A Python process, which has to end with 0; returns what it printed."""
    command = [*map(str, prefix), sys.executable, "-I", "-S", "-c", script, *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=DEADLINE, **more).stdout


class TestPaths:
    pytestmark = live

    def test_descriptors_are_named_as_proc_does(self, tmp_path):
        """Files, deleted ones, pipes, sockets, anonymous inodes, namespaces, and copies of descriptors."""
        libc, here = ctypes.CDLL(None), os.fsencode(tmp_path)
        with contextlib.ExitStack() as stack:
            def keep(*fds):
                for fd in fds:
                    assert fd >= 0
                    stack.callback(os.close, fd)
                return list(fds)

            fds = keep(*os.pipe(), *(os.dup(one.fileno()) for one in socket.socketpair()))
            fds += keep(libc.memfd_create(b"some memory", 0), libc.eventfd(0, 0), libc.epoll_create1(0), libc.inotify_init(),
                        libc.timerfd_create(1, 0), os.pidfd_open(os.getpid()))
            fds += keep(*(os.open(name, os.O_RDONLY) for name in (
                "/", "/proc/self/ns/net", "/proc/self/ns/mnt", "/dev/null", "/proc/self/status", "/proc/self/fd", here)))
            for name in (b"file", b"gone", b"x" * 255, b"line\nbreak", b"not \xff utf-8", b"a (deleted)"):
                fds += keep(os.open(here + b"/" + name, os.O_RDWR | os.O_CREAT))
            os.unlink(here + b"/gone")
            fds += keep(os.dup(fds[-1]), fcntl.fcntl(fds[-1], fcntl.F_DUPFD_CLOEXEC, 200))

            def call():
                for fd in fds:
                    libc.fsync(fd)  # of any file: what comes of it does not matter
            events = record("fsync", call)
            names = [os.fsdecode(os.readlink(f"/proc/self/fd/{fd}")) for fd in fds]
        assert [(event.args[0], event.path) for event in events] == list(zip(fds, names))
        assert all(event.files[0] == event.path and not event.path_unresolved for event in events)
        assert {"pipe:", "socket:", "net:", "mnt:"} <= {name.partition("[")[0] for name in names}  # so it is what it says
        assert {"/memfd:some memory (deleted)", "anon_inode:[eventfd]", f"{tmp_path}/gone (deleted)", "/"} <= set(names)

    def test_what_is_no_descriptor_is_unknown(self):
        events = record("fsync", lambda: [ctypes.CDLL(None).fsync(fd) for fd in (-1, 1 << 30, 4000)])
        assert [traceleft.format_args(event) for event in events] == [
            "Fd -1<unknown>", "Fd 1073741824<unknown>", "Fd 4000<unknown>"]

    def test_short_lived_descriptors(self, tmp_path):
        """One number is another file a moment later."""
        def call():
            for i in range(50):
                fd = os.open(tmp_path / str(i), os.O_WRONLY | os.O_CREAT)
                os.write(fd, b"x")
                os.close(fd)
        events = record("write,close", call)
        assert [(e.name, e.path) for e in events] == [
            (name, f"{tmp_path}/{i}") for i in range(50) for name in ("write", "close")]
        assert len({e.args[0] for e in events}) == 1

    def test_inherited_descriptors(self, tmp_path):
        with (tmp_path / "inherited").open("wb") as file:
            events = record("write", lambda: subprocess.run(["sh", "-c", "echo text"], stdout=file, check=True))
        (line,) = [traceleft.format_args(e) for e in events if e.path == f"{tmp_path}/inherited"]
        assert line == f'Fd 1<{tmp_path}/inherited> Buf "text\\n" Count 5'

    def test_a_table_of_descriptors_that_two_processes_share(self, programs, tmp_path):
        events = record("open,write,close", lambda: subprocess.run([programs["shared"], tmp_path / "f"], check=True))
        found = [e for e in events if e.path == f"{tmp_path}/f"]
        assert [(e.name, e.ret) for e in found[1:]] == [("write", 1), ("close", 0)]
        assert found[0].name == "open" and found[0].pid != found[1].pid == found[2].pid

    def test_names_that_are_not_opened(self, tmp_path):
        """They are shown behind their directory, and said to be unresolved."""
        tries = (("no", False), ("no", True), ("/no", True), ("a/../no", False), ("./no", True), ("", True))
        directory, before, root = os.open(tmp_path, os.O_PATH), os.getcwd(), os.open("/", os.O_PATH)

        def call():
            os.chdir(tmp_path)
            for name, behind in tries:
                for function in (lambda name, dfd: os.open(name, 0, dir_fd=dfd), lambda name, dfd: os.chmod(name, 0, dir_fd=dfd)):
                    with contextlib.suppress(OSError):
                        function(name, directory if behind else None)
            os.chdir("/")
            for dfd in (None, root, 4000):
                with contextlib.suppress(OSError):
                    os.open("no", 0, dir_fd=dfd)
            os.chdir(before)
        events = record("open,chmod,fchmodat", call)
        os.close(directory)
        os.close(root)
        here = str(tmp_path)
        paths = [f"{here}/no", f"{here}/no", "/no", f"{here}/a/../no", f"{here}/./no", here]
        assert [(e.name, e.path) for e in events] == [
            *((name, path) for path, (_, behind) in zip(paths, tries) for name in ("open", "fchmodat" if behind else "chmod")),
            ("open", "/no"), ("open", "/no"), ("open", "")]
        assert all(e.path_unresolved and e.flags & 8 for e in events)

    def test_in_another_mount_namespace(self, tmp_path):
        """The path as the process sees it, in a root and with mounts of its own; `..` does not lead out of them."""
        script = """
import ctypes, os, sys
libc = ctypes.CDLL(None)
base = sys.argv[1]
os.makedirs(base + "/root/a/b")
assert libc.mount(b"none", (base + "/root").encode(), b"tmpfs", 0, None) == 0
os.makedirs(base + "/root/data/old")
os.makedirs(base + "/root/there")
assert libc.mount((base + "/root/data").encode(), (base + "/root/there").encode(), None, 4096, None) == 0
open(base + "/root/data/f", "w").close()
outside = os.open(base, os.O_RDONLY)
os.chdir(base + "/root")
os.mkdir("put")
assert libc.syscall(155, b".", b"put") == 0  # pivot_root
for name in ("/data/f", "/there/f", "../../there/../data/./f", "/put" + base + "/nothing", "f"):
    try:
        os.close(os.open(name, os.O_RDONLY))
    except OSError:
        os.chdir("there")
os.chroot("/data")
os.close(os.open("/f", os.O_RDONLY))
os.fsync(outside)
"""
        if platform.machine() == "aarch64":
            script = script.replace("155", "41")
        events = record("open,fsync", lambda: python(script, tmp_path, prefix=["unshare", "--mount", "--propagation", "private"]))
        pid = next(e.pid for e in events if e.name == "fsync")
        mine = [e for e in events if e.pid == pid]
        first = next(i for i, e in enumerate(mine) if e.args[0] == "/data/f")
        assert [(e.args[0], e.path, e.path_unresolved) for e in mine[first:-1]] == [
            ("/data/f", "/data/f", False), ("/there/f", "/there/f", False), ("../../there/../data/./f", "/data/f", False),
            (f"/put{tmp_path}/nothing", f"/put{tmp_path}/nothing", True), ("f", "/there/f", False), ("/f", "/f", False)]
        assert mine[-1].path == f"/put{tmp_path}"  # outside of its root, a file is named from the root of its mounts

    def test_paths_of_every_length(self, tmp_path):
        """Up to PATH_MAX whole, and beyond it without its begin, which is said."""
        deep, before = str(tmp_path), os.getcwd()
        paths = []

        def call():
            nonlocal deep
            os.chdir(tmp_path)
            while len(deep) < 4300:
                name = "d" * min(250, max(1, 4094 - len(deep)) if 3840 < len(deep) < 4095 else 250)
                os.mkdir(name)
                os.chdir(name)
                deep += "/" + name
                fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
                os.fsync(fd)
                os.close(fd)
                paths.append(deep)
        try:
            events = record("fsync", call)
        finally:
            os.chdir(before)
            shutil.rmtree(tmp_path)
        assert 4095 in map(len, paths) and len(paths[-1]) > 4096
        for event, path in zip(events, paths):
            assert event.path_incomplete == (len(path) > 4096), len(path)
            assert path == event.path if len(path) <= 4096 else path.endswith(event.path) and len(event.path) > 3840


@pytest.fixture(scope="class")
def watched(tmp_path_factory):
    """How often the rule was true for what a function does: called with it and a path, returns a number."""
    folder = tmp_path_factory.mktemp("evasions")
    (folder / "sub").mkdir()
    deep = folder / "/".join("d" * 200)
    deep.mkdir(parents=True)
    odd = os.fsencode(folder) + b"/new\nline \xff\xc3\xa9"
    names = [str(folder / "a.txt"), str(deep / "a.txt"), os.fsdecode(odd)]
    for name in names:
        Path(name).touch()
    rules = [*(f"path == {name!r}" for name in names), f"path == {names[0]!r} and ret >= 0"]
    spec = parse_spec({**a_spec(), "events": [a_spec(rule)["events"][0] for rule in rules]})
    plan = traceleft.plan_spec(spec, [traceleft.parse_selector("open"), traceleft.parse_selector(f"{os.getpid()}:open")])
    with traceleft.Tracer(plan, traceleft.Tables(spec.filters)) as tracer:
        assert not tracer.streams  # all of it in the kernel

        def count(action):
            before = [c.matched for c in tracer.read_counts()]
            result = action()
            return result, [c.matched - old for c, old in zip(tracer.read_counts(), before)]
        count.folder, count.names = folder, names
        yield count


class TestEvasions:
    """`path == TARGET` against every way to open that file. What is not matched, the README has to list."""

    pytestmark = live

    PRELUDE = """
import ctypes, os, sys
folder, target = sys.argv[1:]
libc = ctypes.CDLL(None, use_errno=True)
def opened(name, flags=os.O_RDONLY, dfd=None):
    fd = os.open(name, flags, dir_fd=dfd)
    assert os.fstat(fd).st_ino == os.stat(target).st_ino if target else True
    return fd
def openat2(dfd, name, resolve):
    how = (ctypes.c_uint64 * 3)(os.O_RDONLY, 0, resolve)
    fd = libc.syscall(437, dfd, name.encode(), how, 24)
    assert fd >= 0
def mount(source, place, flags=4096):
    assert libc.mount(source.encode(), place.encode(), None, flags, None) == 0
"""
    WAYS = {
        "absolute": "opened(target)",
        "relative": "os.chdir(folder); opened('a.txt')",
        "dots": "opened(folder + '/sub/..//./a.txt')",
        "a symlink": "os.symlink(target, folder + '/link'); opened(folder + '/link')",
        "a symlink to its directory": "os.symlink(folder, folder + '/here'); opened(folder + '/here/here/here/a.txt')",
        "a directory's descriptor": "opened('a.txt', dfd=os.open(folder, os.O_PATH))",
        "/proc/self/cwd": "os.chdir(folder + '/sub'); opened('/proc/self/cwd/../a.txt')",
        "/proc/self/fd/N": "opened(f'/proc/self/fd/{os.open(folder, os.O_PATH)}/a.txt')",
        "/proc/self/root": "opened('/proc/thread-self/root' + target)",
        "openat2": "openat2(os.open(folder, os.O_PATH), 'a.txt', 0)",
        "openat2 in a root of its own": "openat2(os.open(folder, os.O_PATH), '/../a.txt', 16)",
        "O_PATH": "opened(target, os.O_PATH)",
        "creat": "libc.creat(target.encode(), 0o600)",
        "a 3,000-character detour": "opened(folder + '/sub/..' * 420 + '/a.txt')",
        "a chroot that the current directory is outside of":
            "os.chdir(folder); os.chroot(folder + '/sub'); target = ''; opened('a.txt')",
        "a thread with a directory of its own": "import threading\ndef run(): libc.unshare(0x200); os.chdir(folder); opened('a.txt')\n"
                                                "t = threading.Thread(target=run); t.start(); t.join()",
    }
    UNSEEN = {
        # way -> what the README says of it
        "a hard link": ("os.link(target, folder + '/hard'); opened(folder + '/hard')", "hard link"),
        "a bind mount": ("libc.unshare(0x20000); mount('none', '/', 1 << 18 | 16384); mount(folder, folder + '/sub'); "
                         "opened(folder + '/sub/a.txt')", "bind mount"),
        "a chroot": ("os.chroot(folder); target = '/a.txt'; opened('/a.txt')", "chroot"),
        "another name": ("os.rename(folder + '/sub', folder + '/sup'); os.rename(target, folder + '/sup/b'); target = ''; "
                         "opened(folder + '/sup/b'); os.rename(folder + '/sup/b', folder + '/a.txt'); "
                         "os.rename(folder + '/sup', folder + '/sub')", "renamed"),
        "a handle": ("h = ctypes.create_string_buffer(136); h[0] = b'\\x80'; i = ctypes.c_int()\n"
                     "assert libc.name_to_handle_at(-100, target.encode(), h, ctypes.byref(i), 0) == 0\n"
                     "assert libc.open_by_handle_at(os.open(folder, os.O_RDONLY), h, 0) >= 0", "open_by_handle_at"),
    }

    def go(self, watched, script):
        _, counts = watched(lambda: python(self.PRELUDE + script, watched.folder, watched.names[0]))
        return counts[0]

    @pytest.mark.parametrize("way", WAYS)
    def test_matched(self, watched, way):
        assert self.go(watched, self.WAYS[way]) == 1

    @pytest.mark.parametrize("way", UNSEEN)
    def test_not_seen_and_said(self, watched, way):
        script, said = self.UNSEEN[way]
        assert self.go(watched, script) == 0
        assert said in (HERE / "README.md").read_text()

    def test_a_chain_of_200_directories(self, watched):
        deep = watched.names[1]

        def down():
            before = os.getcwd()
            for name in Path(deep).parts[:-1]:
                os.chdir(name)
            os.close(os.open("a.txt", os.O_RDONLY))
            os.chdir(before)
        assert watched(down)[1] == [0, 1, 0, 0]
        assert watched(lambda: os.close(os.open(deep, os.O_RDONLY)))[1] == [0, 1, 0, 0]

    def test_a_newline_and_bytes_that_are_no_text(self, watched):
        assert watched(lambda: os.close(os.open(watched.names[2], os.O_RDONLY)))[1] == [0, 0, 1, 0]

    @pytest.mark.parametrize("how", ["flip", "hide"])
    def test_a_name_that_is_changed_or_hidden_meanwhile(self, programs, watched, how):
        """What counts is the file that was opened, whatever the name says before or after."""
        other = watched.folder / "b.txt"
        other.touch()
        command = [programs["race"], watched.names[0], other, how]
        done, counts = watched(lambda: subprocess.run(command, check=True, stdout=subprocess.PIPE))
        assert counts[3] == int(done.stdout) > 0  # of the opens that succeed; others are shown by the name as it is then

    def test_rules_on_the_name_itself_are_evaded_so(self, tmp_path):
        """What `arg1 ==` is for: the name as it was passed."""
        (tmp_path / "a.txt").touch()
        events = record("open", lambda: python("import os, sys; os.chdir(sys.argv[1]); os.open('./a.txt', 0)", tmp_path))
        (event,) = [event for event in events if event.path == f"{tmp_path}/a.txt"]
        assert not matches(f"arg1 == '{tmp_path}/a.txt'", event) and matches(f"path == '{tmp_path}/a.txt'", event)
        assert matches("arg1 == './a.txt'", event)


class TestConnections:
    """Each script makes connections and says what has to be printed: event, addresses, ports, result and process."""

    pytestmark = live

    EVENTS = "connect_v4,accept_v4,close_v4,connect_v6,accept_v6,close_v6"
    PRELUDE = """
import json, os, select, signal, socket, struct, sys
expected = []
def listener(host="127.0.0.1", backlog=8):
    found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    found.bind((host, 0))
    found.listen(backlog)
    return found
def client(server, host=None):
    host = host or server.getsockname()[0]
    found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    found.bind(("::" if ":" in host else "0.0.0.0", 0))
    found.connect((host, server.getsockname()[1]))
    return found
def ends(one):
    (here, port), (there, other) = (name[:2] for name in (one.getsockname(), one.getpeername()))
    return [here.replace("::ffff:", ""), there.replace("::ffff:", ""), port, other]
def back(ends):
    return [ends[1], ends[0], ends[3], ends[2]]
def expect(name, ends, ret=0, pid=None):
    expected.append([name, ends, ret, pid or os.getpid()])
def eof(one):
    assert one.recv(1) == b""
def reset(one):
    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    one.close()
def pair(server):
    one = client(server)
    other, _ = server.accept()
    expect("connect", ends(one))
    expect("accept", ends(other))
    return one, other
"""
    CLOSING = """
for server in (listener(HOST),):
    one, other = pair(server)
    expect("close", ends(one))
    expect("close", ends(other))
    one.close()
    eof(other)
    other.close()
"""
    SCRIPTS = {
        "IPv4": CLOSING.replace("HOST", "'127.0.0.1'"),
        "IPv6": CLOSING.replace("HOST", "'::1'"),
        "the server closes first": """
one, other = pair(listener())
expect("close", ends(other))
expect("close", ends(one))
other.close()
eof(one)
one.close()
""",
        "IPv4 in IPv6 sockets": """
server = listener("::")
for host in ("127.0.0.1", "::ffff:127.0.0.1"):
    one = client(server, host)
    other, _ = server.accept()
    expect("connect", ends(one))
    expect("accept", ends(other))
    expect("close", ends(one))
    expect("close", ends(other))
    one.close()
    eof(other)
    other.close()
""",
        "does not wait": """
server = listener()
one = socket.socket()
one.setblocking(False)
assert one.connect_ex(server.getsockname()) == 115  # EINPROGRESS
select.select([], [one], [])
expect("connect", ends(one))
expect("close", ends(one))
one.close()
""",
        "the handshake ends in softirq": """
server = listener(backlog=0)
first = client(server)  # fills the queue: the kernel drops the next one's first packet, and sends it again after a second
expect("connect", ends(first))
one = socket.socket()
one.setblocking(False)
one.connect_ex(server.getsockname())
other, _ = server.accept()
expect("accept", ends(other))
select.select([], [one], [], 10)
expect("connect", ends(one))
late, _ = server.accept()
expect("accept", ends(late))
for two in ((first, other), (one, late)):
    for each in two:
        expect("close", ends(each))
    two[0].close()
    eof(two[1])
    two[1].close()
""",
        "refused": """
for host in ("127.0.0.1", "::1", "::ffff:127.0.0.1"):
    gone, one = listener(host), socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    address = gone.getsockname()
    gone.close()
    one.bind((host, 0))
    expect("connect", [host[-9:] if "f" in host else host] * 2 + [one.getsockname()[1], address[1]], -111)
    assert one.connect_ex(address) == 111
    one.close()
""",
        "given up": """
server = listener(backlog=0)
first = client(server)
expect("connect", ends(first))
one = socket.socket()
one.bind(("127.0.0.1", 0))
one.setblocking(False)
expect("connect", ["127.0.0.1", "127.0.0.1", one.getsockname()[1], server.getsockname()[1]], -103)
one.connect_ex(server.getsockname())
one.close()
expect("close", ends(first))
first.close()
""",
        "dies without a close": """
server = listener()
child = os.fork()
if not child:
    one = client(server)
    signal.pause()
other, _ = server.accept()
there = back(ends(other))
expect("connect", there, 0, child)
expect("accept", ends(other))
os.kill(child, signal.SIGKILL)
eof(other)
expect("close", there, 0, child)
expect("close", ends(other))
other.close()
os.waitpid(child, 0)
""",
        "reset by the peer": """
server = listener()
child = os.fork()
if not child:
    one = client(server)
    signal.pause()
other, _ = server.accept()
there = back(ends(other))
expect("connect", there, 0, child)
expect("accept", ends(other))
expect("close", ends(other))
expect("close", there, 0, child)
reset(other)
os.kill(child, signal.SIGKILL)
os.waitpid(child, 0)
""",
        "the child closes last": """
one, other = pair(listener())
there, here = ends(one), ends(other)
r, w = os.pipe()
child = os.fork()
if not child:
    other.close()
    os.read(r, 1)
    os._exit(0)
one.close()
os.write(w, b"x")
eof(other)
expect("close", there, 0, child)
expect("close", here)
other.close()
os.waitpid(child, 0)
""",
        "closed by halves": """
one, other = pair(listener())
expect("close", ends(one))
expect("close", ends(other))
one.shutdown(socket.SHUT_WR)
eof(other)
other.close()
eof(one)
one.close()
""",
        "nobody accepts it": """
server = listener()
one = client(server)
expect("connect", ends(one))
expect("close", ends(one))
server.close()
""",
        "reset before it is accepted": """
server = listener()
one = client(server)
there = ends(one)
expect("connect", there)
expect("close", there)
reset(one)
other, _ = server.accept()
expect("accept", back(there))
expect("close", back(there))
other.close()
""",
        "no connection": """
listener().close()
socket.socket().close()
one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
one.connect(("127.0.0.1", 9))
one.close()
""",
        "no route": """
assert socket.socket().connect_ex(("203.0.113.1", 9)) == 101  # ENETUNREACH
""",
        "before the start": """
server = listener()
child = os.fork()
if not child:
    one = client(server)
    signal.pause()
other, _ = server.accept()
print("connected", flush=True)
sys.stdin.read()
there = back(ends(other))
expect("close", ends(other))
expect("close", there, 0, child)
reset(other)
os.kill(child, signal.SIGKILL)
os.waitpid(child, 0)
""",
    }
    SCRIPTS["another network namespace"] = SCRIPTS["IPv4"] + SCRIPTS["IPv6"]
    EPILOGUE = """
print(json.dumps([expected, os.stat("/proc/self/ns/net").st_ino]))
"""
    PREFIX = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]

    def test_to_the_letter(self, tmp_path):
        """All at once, so that what belongs to one has to be told from what belongs to another."""
        running = {}

        def start(name):
            prefix = self.PREFIX if name in ("another network namespace", "no route") else []
            command = [*prefix, sys.executable, "-I", "-S", "-c", self.PRELUDE + self.SCRIPTS[name] + self.EPILOGUE]
            running[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            start("before the start")
            assert running["before the start"].stdout.readline() == "connected\n"
            with (tmp_path / "output").open("w") as output, Agent("trace", self.EVENTS, stdout=output) as agent:
                for name in self.SCRIPTS:
                    start(name) if name not in running else None
                said = {name: json.loads(process.communicate(timeout=DEADLINE)[0].splitlines()[-1])
                        for name, process in running.items()}
                code, _ = agent.stop()
        finally:
            for process in running.values():
                process.kill()
                process.wait()
        assert code == 0
        lines = (tmp_path / "output").read_text().splitlines()
        for name, (expected, netns) in said.items():
            pids = {running[name].pid, *(row[-1] for row in expected)}
            events = [make_event(f"{event}_v{6 if ':' in saddr else 4}", saddr, daddr, sport, dport, netns, ret=ret, pid=pid)
                      for event, (saddr, daddr, sport, dport), ret, pid in expected]
            assert [line for line in lines if int(line.split()[3]) in pids] == [
                traceleft.format_event(event) for event in events], name

    def test_rules_on_addresses_run_in_the_kernel(self):
        servers = [socket.create_server(("127.0.0.1", 0)), socket.create_server(("::1", 0), family=socket.AF_INET6)]
        v4, v6 = (server.getsockname()[1] for server in servers)
        rules = [
            # event, rule, how often it is true
            ("connect_v4", f"daddr == '127.0.0.1' and dport == {v4}", 3),
            ("connect_v4", f"daddr in net('127.0.0.0/8') and dport in ({v4}, {v4 ^ 1}) and ret == 0", 3),
            ("connect_v4", f"daddr not in (net('10.0.0.0/8'), '127.0.0.1') and dport == {v4}", 0),
            ("connect_v4", f"saddr == daddr and dport == {v4}", 3),
            ("accept_v4", f"sport == {v4} and exe == {os.path.realpath(sys.executable)!r}", 3),
            ("close_v4", f"dport == {v4} or sport == {v4}", 6),
            ("connect_v6", f"daddr in net('::/64') and daddr != '::2' and dport == {v6}", 2),
            ("connect_v6", f"daddr in (net('fe80::/10'), '::2') and dport == {v6}", 0),
            ("close_v6", f"saddr == '::1' and (dport == {v6} or sport == {v6})", 4),
        ]
        spec = parse_spec({**a_spec(), "events": [a_spec(rule, name=name)["events"][0] for name, rule, _ in rules]})
        events = ",".join(dict.fromkeys(name for name, _, _ in rules))
        plan = traceleft.plan_spec(spec, [traceleft.parse_selector(f"{os.getpid()}:{events}")])
        tables = traceleft.Tables(spec.filters)
        assert not tables.python_ids - {"connect_v4-3"}  # a comparison of two fields
        with traceleft.Tracer(plan, tables) as tracer:
            for server, times in zip(servers, (3, 2)):
                for _ in range(times):
                    with socket.create_connection(server.getsockname()[:2]), server.accept()[0]:
                        pass
                server.close()
            streamed = [event for event in tracer.drain() if matches(rules[3][1], event)]
            counts = {member.spec.id: count.matched for member, count in zip(tables.filters, tracer.read_counts()) if member.spec}
        counts["connect_v4-3"] = len(streamed)
        assert counts == {member.id: times for member, (_, _, times) in zip(spec.filters, rules)}


@pytest.fixture
def cgroups(request, tmp_path):
    """Makes control groups of version 2 below the root, which are removed afterwards; called with the parts of a path."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    root = next((mount[1] for mount in mounts if mount[2] == "cgroup2"), None)
    if root is None:
        root = tmp_path / "cgroup2"
        root.mkdir()
        subprocess.run(["mount", "-t", "cgroup2", "none", root], check=True)
        request.addfinalizer(lambda: subprocess.run(["umount", root], check=True))

    def remove(path):
        wait_until(lambda: not (path / "cgroup.procs").read_text(), "the group is empty")
        path.rmdir()

    def make(*names):
        path = Path(root, *names)
        path.mkdir()
        request.addfinalizer(lambda: remove(path))
        return path
    return make


def proc_who(pid):
    """What /proc says of a process, by the fields of an event."""
    status = dict(line.split(":\t") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    (uid, euid), gid = status["Uid"].split()[:2], status["Gid"].split()[0]
    (cgroup,) = re.findall("^0::(.*)$", Path(f"/proc/{pid}/cgroup").read_text(), re.M)
    return {"pid": int(pid), "ppid": int(status["PPid"]), "uid": int(uid), "gid": int(gid), "euid": int(euid),
            "comm": status["Name"], "exe": os.readlink(f"/proc/{pid}/exe"), "cgroup": cgroup,
            **{f"{kind}ns": os.stat(f"/proc/{pid}/ns/{kind}").st_ino for kind in ("mnt", "net", "pid")}}


class TestWho:
    pytestmark = live

    WAITS = """
import os, sys
os.setegid(8)
os.seteuid(7)
print(os.readlink("/proc/self"), flush=True)
sys.stdin.read()
try:
    os.mkdir("/nowhere/here")
except OSError:
    pass
"""

    @contextlib.contextmanager
    def waiting(self, *command):
        """A process that says its pid and goes on when its standard input is closed."""
        process = subprocess.Popen([*map(str, command)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            yield process, int(process.stdout.readline())
        finally:
            process.kill()
            process.wait()

    def test_of_a_process_that_ran_before_the_start(self, cgroups, tmp_path):
        """As /proc says it, matched in the kernel, and as JSON shows it; in namespaces and in a container's group."""
        container = os.urandom(32).hex()
        group = cgroups(f"docker-{container}.scope")
        namespaces = ["unshare", "--mount", "--net", "--uts", "--ipc", "--pid", "--fork"]
        with self.waiting(*namespaces, sys.executable, "-I", "-S", "-c", self.WAITS) as (process, pid):
            (group / "cgroup.procs").write_text(str(pid))
            who = proc_who(pid)
            rule = " and ".join(f"{name} == {who[name]!r}" for name in ("exe", "cgroup", "euid", "uid", "mntns", "netns", "pidns"))
            spec = a_spec(rule, name="mkdir", channel={"id": "1", "type": "file", "path": str(tmp_path / "log")})
            assert not traceleft.Tables(parse_spec(spec).filters).python_ids
            with Agent("trace", "--spec", write_spec(tmp_path / "spec", spec)) as agent:
                process.stdin.close()
                process.wait(DEADLINE)
                agent.stop()
        (record,) = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
        assert {**record["sample"], **who} == record["sample"]
        assert record["sample"]["container"] == container
        assert (who["euid"], who["uid"], who["cgroup"], who["ppid"]) == (7, 0, f"/{group.name}", process.pid)

    def test_of_a_process_outside_of_any_container(self, cgroups, tmp_path):
        """Its group is the host's, of several levels; its program has been deleted."""
        upper = cgroups(f"some-{os.getpid()}.slice")
        group = cgroups(upper.name, "some.service")
        copy = shutil.copy(shutil.which("sh"), tmp_path / "shell")
        with self.waiting(copy, "-c", f"echo $$; read line; : > {tmp_path}/f") as (process, pid):
            os.unlink(copy)
            (group / "cgroup.procs").write_text(str(pid))
            who = proc_who(pid)
            events = record(f"{pid}:open", lambda: (process.stdin.close(), process.wait(DEADLINE)))
        (event,) = [event for event in events if event.pid == pid]
        assert {name: getattr(event, name) for name in who} == who
        assert who["exe"] == f"{tmp_path}/shell (deleted)" and who["cgroup"] == f"/{upper.name}/some.service"
        assert event.container == "" and not event.in_container

    CONNECTS = """
import os, signal, socket, sys
os.seteuid(7)
print(os.getpid(), flush=True)
address = "127.0.0.1", int(sys.stdin.readline())
ones = [socket.socket() for _ in range(3)]
for one in ones:
    one.connect(address)
ones.pop().close()
signal.pause()
"""

    def test_of_connections(self, cgroups):
        """Also where another process's packet ends it, and when its process dies, which has left most of itself by then."""
        container = os.urandom(32).hex()
        group = cgroups(f"docker-{container}.scope")
        with socket.create_server(("127.0.0.1", 0)) as server, \
                self.waiting(sys.executable, "-I", "-S", "-c", self.CONNECTS) as (process, pid):
            (group / "cgroup.procs").write_text(str(pid))
            who = proc_who(pid)
            server.settimeout(DEADLINE)

            def connect():
                process.stdin.write(f"{server.getsockname()[1]}\n")
                process.stdin.flush()
                first, second, third = (server.accept()[0] for _ in range(3))
                assert third.recv(1) == b""
                first.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                first.close()  # with a reset, which is worked off here and now
                process.kill()
                process.wait(DEADLINE)
                assert second.recv(1) == b""
                second.close()
                third.close()
            events = record(f"{pid}:connect_v4,close_v4 accept_v4", connect)
        theirs = [event for event in events if event.pid == pid]
        assert [e.name for e in theirs] == ["connect_v4"] * 3 + ["close_v4"] * 3
        for event in theirs:
            assert {name: getattr(event, name) for name in who} == who
            assert event.container == container and matches(f"exe == {who['exe']!r}", event)
        own = proc_who(os.getpid())
        accepted = [event for event in events if event.name == "accept_v4"]
        assert len(accepted) == 3
        assert all(getattr(event, name) == own[name] for event in accepted for name in own if name != "comm")


class TestProcesses:
    """Which processes are traced, for what, and as which program; see TestSelectors for what a selector may be."""

    pytestmark = live

    @contextlib.contextmanager
    def shells(self, *scripts):
        """Shells that wait at `read line` and then run their script."""
        with contextlib.ExitStack() as stack:
            processes = []
            for script in scripts:
                process = subprocess.Popen(["sh", "-c", f"read line; {script}"], stdin=subprocess.PIPE)
                processes.append(process)
                stack.callback(process.wait)
                stack.callback(process.kill)
                stack.callback(process.stdin.close)
            yield processes

    @staticmethod
    def go(processes):
        for process in processes:
            process.stdin.close()
        for process in processes:
            assert process.wait(DEADLINE) == 0

    REUSE = """
#define _GNU_SOURCE
#include <linux/sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

int main(void)
{
	struct clone_args arguments = { .exit_signal = SIGCHLD, .set_tid_size = 1 };
	int ends[2];
	char byte;
	pid_t first, second;

	pipe(ends);
	first = fork();
	if (!first) {
		read(ends[0], &byte, 1);
		for (int i = 0; i < 10; i++)
			syscall(SYS_getppid);
		_exit(0);
	}
	printf("%d\\n", first);
	fflush(stdout);
	read(0, &byte, 1);
	write(ends[1], "x", 1);
	waitpid(first, 0, 0);
	arguments.set_tid = (uintptr_t)&first;
	second = syscall(SYS_clone3, &arguments, sizeof(arguments));
	if (!second) {
		for (int i = 0; i < 100000; i++)
			syscall(SYS_getppid);
		_exit(0);
	}
	waitpid(second, 0, 0);
	return second != first;
}
"""

    @pytest.mark.parametrize("parent_too, count", [(False, 10), (True, 100_010)], ids=["a stranger's", "a followed child's"])
    def test_a_number_that_another_process_gets_at_once(self, tmp_path, parent_too, count):
        (tmp_path / "reuse.c").write_text(self.REUSE)
        subprocess.run(["gcc", "-O2", "-w", "-o", tmp_path / "reuse", tmp_path / "reuse.c"], check=True)
        spec = write_spec(tmp_path / "spec", a_spec(name="getppid", channel={"id": "1", "type": "file", "path": str(tmp_path / "log")}))
        with subprocess.Popen([tmp_path / "reuse"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            first = process.stdout.readline().strip()
            chosen = f"{process.pid},{first}" if parent_too else first
            with Agent("trace", "--follow", "--spec", spec, f"{chosen}:getppid", "--summary", "-") as agent:
                process.communicate("x", DEADLINE)
                code, output = agent.stop()
        assert (process.returncode, code) == (0, 0)
        assert json.loads(output)["filters"][0]["matched"] == count

    def test_different_events_of_different_processes(self, tmp_path):
        """Several selectors on one line: each process is traced for its own events, as its own program."""
        script = f"cd {tmp_path}; umask 022; : > f; exec mkdir $$"
        with self.shells(script, script, script) as processes:
            a, b, c = (process.pid for process in processes)
            with Agent("trace", f"{2**64 - 1}:{a}:open", f"7:{a},{b}:mkdir", f"{c}:umask", "umask") as agent:
                self.go(processes)
                _, output = agent.stop()
        lines = [line.split() for line in output.splitlines()]
        assert {(words[3], words[6], words[1]) for words in lines if int(words[3]) in (a, b, c)} == {
            (str(a), str(2**64 - 1), "open"), (str(a), "7", "mkdir"), (str(b), "7", "mkdir"),
            *((str(pid), "0", "umask") for pid in (a, b, c))}
        assert output.count('Filename "f" Flags 577') == 1 and sum(words[1] == "mkdir" for words in lines) == 2

    FAMILY = "mkdir {0}/child & wait; (mkdir {0}/grandchild; : > {0}/subshell); exec mkdir {0}/self"

    @pytest.mark.parametrize("follow", [True, False])
    def test_children(self, tmp_path, follow):
        with self.shells(self.FAMILY.format(tmp_path), self.FAMILY.format(tmp_path / "other")) as (process, other):
            def run():
                process.stdin.close()
                process.wait(DEADLINE)
                other.stdin.close()
                other.wait(DEADLINE)
            events = record(f"5:{process.pid}:mkdir,open", run, follow=follow)
            found = {Path(event.args[0]).name: event.pid for event in events if str(tmp_path) in event.args[0]}
        assert set(found) == ({"child", "grandchild", "subshell", "self"} if follow else {"self"})
        assert found["self"] == process.pid and len(set(found.values())) == len(found)
        assert all(event.program_id == 5 for event in events)

    def test_that_a_process_has_ended_is_said(self):
        with self.shells("exit 0", "exit 0") as (first, second), Agent("trace", f"{first.pid},{second.pid}:open") as agent:
            self.go([first])
            wait_until(lambda: f"traceleft: process {first.pid} has ended" in agent.stderr, "the first has ended")
            self.go([second])
            wait_until(lambda: f"traceleft: process {second.pid} has ended: nothing is traced any more" in agent.stderr, "both have")
            assert agent.stop()[0] == 0

    def test_an_ended_process_is_dropped(self):
        """Its number may be another's soon. A thread that ends, or that runs a new program, ends nothing."""
        script = """
import os, sys, threading
thread = threading.Thread(target=os.getpid)
thread.start()
thread.join()
sys.stdin.readline()
threading.Thread(target=lambda: os.execv("/bin/sh", ["sh", "-c", "read line"])).start()
threading.Event().wait()
"""
        process = subprocess.Popen([sys.executable, "-I", "-S", "-c", script], stdin=subprocess.PIPE, text=True)
        try:
            with traceleft.Tracer(f"{process.pid}:execve") as tracer:
                def traced():
                    value = ctypes.create_string_buffer(traceleft.PROCESS.size)
                    return tracer.bpf.library.bpf_map_lookup_elem(
                        tracer.map_fd("processes"), struct.pack("=I", process.pid), value) == 0
                assert traced()
                process.stdin.write("\n")
                process.stdin.flush()
                wait_until(lambda: list(tracer.poll()), "the new program")
                assert traced()
                process.stdin.close()
                process.wait(DEADLINE)
                wait_until(lambda: not traced(), "it is dropped")
        finally:
            process.kill()
            process.wait()

    def test_processes_come_and_go_at_run_time(self):
        script = "import os, sys\nfor line in sys.stdin:\n    os.umask(int(line))\n    print(line, end='', flush=True)"
        process = subprocess.Popen([sys.executable, "-I", "-S", "-u", "-c", script], stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, text=True)
        try:
            with traceleft.Tracer(f"9:{os.getpid()}:umask,mkdir") as tracer:
                def masks(number):
                    process.stdin.write(f"{number}\n")
                    process.stdin.flush()
                    assert process.stdout.readline() == f"{number}\n"
                    os.umask(0o22)
                    return [(e.pid, e.program_id, e.args[0]) for e in tracer.drain()]

                own = (os.getpid(), 9, 0o22)
                assert masks(1) == [own]
                tracer.add_process(process.pid, 4, ["umask"])
                assert masks(2) == [(process.pid, 4, 2), own]
                tracer.remove_process(process.pid)
                assert masks(3) == [own]
                tracer.add_process(process.pid, 2**64 - 1)
                assert masks(4) == [(process.pid, 2**64 - 1, 4), own]
                for pid, events, message in ((2**22 - 1, None, "there is no process"), (process.pid, ["open"], "is not traced")):
                    with pytest.raises(traceleft.UsageError, match=message):
                        tracer.add_process(pid, 0, events)
                assert masks(5) == [(process.pid, 2**64 - 1, 5), own]  # as before
            with traceleft.Tracer("umask") as tracer, pytest.raises(traceleft.UsageError, match="traces every process"):
                tracer.add_process(process.pid)
        finally:
            process.kill()
            process.wait()


class TestEverySyscall:
    pytestmark = live

    LIBC = """
import ctypes, sys
libc = ctypes.CDLL(None)
time = (ctypes.c_long * 2)(0, 1000)
buffer = ctypes.create_string_buffer(256)
sys.stdin.read()
libc.stat(b"/etc/passwd", buffer)
libc.lstat(b"/proc/self", buffer)
libc.fstat(0, buffer)
libc.nanosleep(time, None)
libc.eventfd(7, 0o2000000)
libc.select(0, None, None, None, time)
"""

    def test_a_name_is_what_the_libc_function_of_that_name_does(self):
        """Whatever syscall it makes of it."""
        names = ("stat", "lstat", "fstat", "nanosleep", "eventfd", "select")
        with self.waiting(sys.executable, "-I", "-S", "-c", self.LIBC) as process:
            wait_until(lambda: "pipe_read" in Path(f"/proc/{process.pid}/stack").read_text(), "the program waits")
            with Agent("trace", f"{process.pid}:{','.join(names)}") as agent:
                process.stdin.close()
                process.wait(DEADLINE)
                _, output = agent.stop()
        lines = [re.sub(r" (Statbuf|Rqtp|Tvp) 0x\w+", "", re.sub(r" pid .* hash \d+", "", line)) for line in output.splitlines()]
        for wanted in ('name stat Filename "/etc/passwd"', 'name lstat Filename "/proc/self"', "name nanosleep Rmtp 0x0",
                       "name eventfd Count 7 Flags 524288", "name select N 0 Inp 0x0 Outp 0x0 Exp 0x0"):
            assert lines.count(wanted) == 1, (wanted, lines)
        assert any(re.fullmatch(r"name fstat Fd 0<pipe:\[\d+\]>", line) for line in lines)

    COLD = """
#include <sys/wait.h>
#include <unistd.h>

static void child(const char *name)
{
	char *arguments[] = { "not", "touched yet", 0 };

	if (!fork()) {
		execve(name, arguments, 0);
		_exit(1);
	}
	wait(0);
}

int main(void)
{
	char byte;

	read(0, &byte, 1);
	for (int i = 0; i < 5; i++) {
		child("/bin/true");
		child("/nowhere/at all");
	}
	return 0;
}
"""

    def test_a_program_whose_name_is_in_no_page_yet(self, tmp_path):
        """The names are in pages of the file that nothing has read when the calls begin."""
        (tmp_path / "cold.c").write_text(self.COLD)
        subprocess.run(["gcc", "-O2", "-w", "-o", tmp_path / "cold", tmp_path / "cold.c"], check=True)
        with self.waiting(tmp_path / "cold") as process, Agent("trace", "--follow", f"{process.pid}:execve") as agent:
            process.stdin.close()
            process.wait(DEADLINE)
            code, output = agent.stop()
        lines = [re.sub(r" Envp .*", "", line[line.index("return"):]) for line in output.splitlines()]
        lines = [re.sub(r" hash \d+", "", line) for line in lines]
        assert code == 0
        assert collections.Counter(lines) == {
            'return value 0 Filename "/bin/true" Argv "not touched yet"': 5,
            'return value -2 Filename "/nowhere/at all" Argv "not touched yet"': 5}

    EXECUTES = """
import ctypes, os, sys
sys.stdin.read()
os.chdir(sys.argv[1])
libc = ctypes.CDLL(None)
argv = (ctypes.c_char_p * 3)(b"one", b"two words", None)
def child(function, *arguments):
    if not os.fork():
        function(*arguments)
        os._exit(99)
    os.wait()
for path in ("/nowhere/program", "/tmp", "text"):
    try:
        os.execv(path, ["one", "two words"])
    except OSError:
        pass
child(os.execv, "./script", ["one", "two words"])
child(os.execv, "sub/../true", ["x", "", "y"])
child(os.execv, "true", ["t" * 4000, "u" * 95])
child(os.execv, "true", ["t" * 4000, "u" * 96])
child(os.execv, "true", ["t" * 5000])
child(os.execv, "true", ["t"] * 300)
directory, program = os.open(".", os.O_PATH | os.O_CLOEXEC), os.open("true", os.O_PATH)
child(libc.execveat, directory, b"true", argv, None, 0)
child(libc.execveat, program, b"", argv, None, 0x1000)
child(libc.execveat, directory, b"false", argv, None, 0)
child(libc.execve, b"true", ctypes.c_void_p(8), None)
child(libc.execve, ctypes.c_void_p(8), argv, None)
child(libc.execve, b"true", None, None)
os._exit(7)
"""

    @contextlib.contextmanager
    def waiting(self, *command):
        """A process that waits until its standard input is closed."""
        process = subprocess.Popen([*map(str, command)], stdin=subprocess.PIPE)
        try:
            yield process
        finally:
            process.kill()
            process.wait()
            process.stdin.close()

    @staticmethod
    def go(process, code=0):
        process.stdin.close()
        assert process.wait(DEADLINE) == code

    def test_programs_and_their_arguments(self, tmp_path):
        """Read before they are replaced, of calls that fail too; the path is that of the program that runs then."""
        here, shell = str(tmp_path), os.path.realpath("/bin/sh")
        shutil.copy(os.path.realpath(shutil.which("true")), tmp_path / "true")
        (tmp_path / "sub").mkdir()
        (tmp_path / "text").write_text("no program")
        (tmp_path / "script").write_text("#! /bin/sh\nexit 3\n")
        (tmp_path / "script").chmod(0o755)
        with self.waiting(sys.executable, "-I", "-S", "-c", self.EXECUTES, here) as process:
            events = record(f"{process.pid}:execve,execveat,exit_group", lambda: self.go(process, 7))
        words, true = "one two words", f"{here}/true"
        calls = [
            # result, name, arguments (text of them), path, whether it is unresolved, bits of what is incomplete
            (-2, "/nowhere/program", words, "/nowhere/program", True, 0),
            (-13, "/tmp", words, "/tmp", True, 0),
            (-13, "text", words, f"{here}/text", True, 0),
            (0, "./script", words, shell, False, 0),
            (0, "sub/../true", "x  y", true, False, 0),
            (0, "true", "t" * 4000 + " " + "u" * 95, true, False, 0),
            (0, "true", "t" * 4000 + " " + "u" * 95, true, False, 2),
            (0, "true", "t" * 4096, true, False, 2),
            (0, "true", " ".join("t" * 128), true, False, 2),
            (0, "true", words, true, False, 0),
            (0, "", words, true, False, 0),
            (-2, "false", words, f"{here}/false", True, 0),
            (-14, "true", "", true, True, 2),
            (-14, "", words, here, True, 1),
            (0, "true", "", true, False, 0),
        ]
        executed = [event for event in events if event.name.startswith("execve")]
        assert [(e.ret, *[value for value in e.args if isinstance(value, str)], e.path, e.path_unresolved, e.incomplete)
                for e in executed] == calls
        assert [(e.name, e.args[0], e.files[0], e.args[-1]) for e in executed if e.name == "execveat"] == [
            ("execveat", 3, here, 0), ("execveat", 4, true, 0x1000), ("execveat", 3, here, 0)]
        assert [(e.comm, e.exe) for e in executed[3:5]] == [("script", shell), ("true", true)]
        codes = [3, 0, 0, 0, 0, 0, 0, 0, 99, 99, 99, 0, 7]  # a call that never returns is seen all the same
        assert [(e.args[0], e.ret) for e in events if e.name == "exit_group"] == [(code, 0) for code in codes]
        assert all("name exit_group" in traceleft.format_event(e) for e in events if e.name == "exit_group")

    def test_a_thread_begins_a_program(self):
        script = """
import os, sys, threading
sys.stdin.read()
threading.Thread(target=lambda: os.execv("/bin/sh", ["sh", "-c", "exit 4"])).start()
threading.Event().wait()
"""
        with self.waiting(sys.executable, "-I", "-S", "-c", script) as process:
            events = record(f"{process.pid}:execve,exit_group", lambda: self.go(process, 4))
        assert [(e.name, e.pid, e.tid, e.args[:2]) for e in events] == [
            ("execve", process.pid, process.pid, ("/bin/sh", "sh -c exit 4")), ("exit_group", process.pid, process.pid, (4,))]

    @pytest.mark.skipif(platform.machine() != "x86_64", reason="int $0x80 is of x86 alone")
    @pytest.mark.parametrize("see_all", [True, False])
    def test_32_bit_calls_are_not_taken_for_others(self, programs, tmp_path, see_all):
        """Beginning a 32-bit program is a 64-bit call, and seen; its own calls are not, and mean others."""
        link = tmp_path / "link"
        code = bytes.fromhex("b853000000 bb00000000 b900000000 cd80  b801000000 bb07000000 cd80")  # mkdir in the other table; exit(7)
        header = struct.pack("<16sHHIIIIIHHHHHH", b"\x7fELF\1\1\1", 2, 3, 1, 0x8048054, 52, 0, 0, 52, 32, 1, 0, 0, 0)
        segment = struct.pack("<8I", 1, 0, 0x8048000, 0x8048000, 84 + len(code), 84 + len(code), 5, 4096)
        (tmp_path / "small").write_bytes(header + segment + code)
        (tmp_path / "small").chmod(0o755)
        done = []

        def call():
            done.append(subprocess.run([programs["compat"], link]).returncode)
            done.append(subprocess.run([tmp_path / "small", "argument"]).returncode)
        events = record("open,mkdir,symlink,fstat,exit,execve", call, see_all=see_all)
        assert done == [0, 7] and link.is_symlink()  # they did what the other table says
        assert not [e for e in events if e.name in ("mkdir", "symlink") or e.name == "open" and e.args[0] == str(link)]
        assert [(e.path, e.args[1]) for e in events if e.name == "execve" and e.ret == 0] == [
            (programs["compat"], f"{programs['compat']} {link}"), (f"{tmp_path}/small", f"{tmp_path}/small argument")]

    def test_io_uring_is_said_once(self, programs, tmp_path):
        (tmp_path / "f").touch()
        said = "warning: io_uring is in use on this host"
        with Agent("trace", "--follow", f"{os.getpid()}:open", "--summary", tmp_path / "summary") as agent:
            for _ in range(3):
                subprocess.run([programs["uring"], tmp_path / "f"], check=True)
                subprocess.run([programs["uring"], tmp_path / "missing"])
                wait_until(lambda: any(said in line for line in agent.stderr), "a word about io_uring")
            code, output = agent.stop()
        assert code == 0 and "libc.so" in output and str(tmp_path) not in output
        lines = [line for line in agent.stderr if "io_uring" in line]
        assert [said in line for line in lines] == [True, False]
        assert lines[-1] == "traceleft: not seen: what io_uring did on this host, 6 submissions: 6 of openat"
        assert json.loads((tmp_path / "summary").read_text())["io_uring"] == {"18": 6}

    def test_every_name_is_an_event(self):
        """All at once; those that this kernel lacks are one clear line each."""
        tracefs = traceleft.mounted_tracefs()
        names, problems = [], []
        for name in traceleft.event_names():
            try:
                traceleft.find_event(name)
                traceleft.plan_sources({name: traceleft.Wanted(True)}, tracefs)
                names.append(name)
            except traceleft.HostError as error:
                problems.append(str(error))
        assert len(names) > 300 and all("this kernel has no" in problem for problem in problems)
        with traceleft.Tracer(",".join(names)) as tracer:
            assert {source.event.name for source in tracer.sources} == set(names)
        here = {path.name[len("sys_enter_"):] for path in Path(tracefs, "events/syscalls").glob("sys_enter_*")}
        assert here <= {traceleft.TRACEPOINT_NAMES.get(name, name) for name in traceleft.event_names()}


def raw_record(name, args=(), texts=b"", at=0, pid=10, comm=b"sh", **places):
    """A record of the ring buffer; `at` in ns of the kernel's clock, `args` as its slots hold them."""
    values = {"timestamp_ns": at, "pid": pid, "tid": pid, "event": traceleft.EVENT_IDS[name], "comm": comm,
              "version": traceleft.RECORD_VERSION, **places}
    slots = [*args, *[0] * 8][:8]
    packed = [slots if field == "args" else (0, 0) if field == "files" else (values.get(field, 0),)
              for field, _ in traceleft.HEADER_FIELDS]
    return traceleft.HEADER.pack(*itertools.chain.from_iterable(packed)) + texts


def raw_open(path, **more):
    data = os.fsencode(path)
    return raw_record("open", [len(data), 577, 438], data, **more)


class TestRecordings:
    OFFSET = 1_700_000_000 * 10**9 + 123

    def make(self, path, blocks, max_bytes=traceleft.RECORD_MAX_BYTES, unseen=()):
        """A recording of records of opens; returns the Recorder."""
        recorder = traceleft.Recorder(str(path), max_bytes)
        recorder.open()
        for block in blocks:
            for record in block:
                recorder.take("open", record)
            recorder.flush(self.OFFSET)
        recorder.close(dict(unseen))
        return recorder

    def opens(self, seconds, each=3):
        """Some opens a second, as a block each."""
        return [[raw_open(f"/tmp/{n}", at=second * 10**9 + n, pid=n + 1) for n in range(each)] for second in range(seconds)]

    def replay(self, path, *arguments, **more):
        return run("replay", path, *arguments, **more)

    def test_what_was_recorded_is_read(self, tmp_path):
        self.make(tmp_path / "rec", self.opens(2))
        recording = traceleft.Recording(str(tmp_path / "rec"))
        assert recording.events == 6 and recording.end["recorded"] == {"open": 6}
        found = [event for _, events in recording.read() for event in events]
        assert found[4] == an_open("/tmp/1", ret=0, pid=2, tid=2, comm="sh", timestamp_ns=10**9 + 1 + self.OFFSET, files=("", ""))
        assert [offset for offset, _ in recording.read()] == [self.OFFSET] * 2
        assert (tmp_path / "rec").stat().st_mode & 0o777 == 0o600
        recording.close()

    def test_a_spec_over_it(self, tmp_path):
        self.make(tmp_path / "rec", self.opens(4, each=10))
        spec = a_spec("filename != '/tmp/0'", "frequency=2;threshold=3")
        done = self.replay(tmp_path / "rec", "--spec", write_spec(tmp_path / "spec", spec), "--summary", tmp_path / "sum")
        alerts = [json.loads(line) for line in done.stdout.splitlines()]
        assert done.returncode == 0 and "FILTER" in done.stderr
        assert [(alert["count"], alert["matched"]) for alert in alerts] == [(3, 9)] * 4
        # of each second 6 are counted; its alert's time is its end, by the kernel's clock
        assert alerts[0]["time"] == "2023-11-14T22:13:21.000Z" and alerts[0]["sample"]["args"]["filename"] == "/tmp/5"
        (row,) = json.loads((tmp_path / "sum").read_text())["filters"]
        assert (row["matched"], row["passed"], row["folded"], row["alerts"], row["lost"]) == (36, 12, 24, 4, {})
        assert not os.path.exists("/nonexistent/log")

    def test_deliver_sends_to_the_specs_channels(self, tmp_path):
        self.make(tmp_path / "rec", self.opens(2))
        spec = a_spec(channel={"id": "1", "type": "file", "path": str(tmp_path / "log")})
        done = self.replay(tmp_path / "rec", "--deliver", "--spec", write_spec(tmp_path / "spec", spec))
        assert (done.returncode, done.stdout, len((tmp_path / "log").read_text().splitlines())) == (0, "", 2)

    def test_what_does_not_go_together(self, tmp_path):
        assert_one_line(self.replay(tmp_path / "rec", "--deliver"), 2, "it needs --spec FILE")
        assert_one_line(self.replay(tmp_path / "rec", "--speed", "0"), 2, "invalid factor above 0")

    def test_without_a_spec_events_are_printed(self, tmp_path):
        self.make(tmp_path / "rec", self.opens(2))
        recording = traceleft.Recording(str(tmp_path / "rec"))
        expected = [traceleft.format_event(event) for _, events in recording.read() for event in events]
        recording.close()
        assert self.replay(tmp_path / "rec").stdout.splitlines() == expected

    def test_speed(self, tmp_path):
        self.make(tmp_path / "rec", [[raw_open("/a", at=7 * 10**9)], [raw_open("/b", at=11 * 10**9)]])
        begin = time.monotonic()
        assert self.replay(tmp_path / "rec", "--speed", "8").returncode == 0
        assert 0.5 <= time.monotonic() - begin < 3.5
        process = subprocess.Popen([sys.executable, SCRIPT, "replay", tmp_path / "rec", "--speed", "0.001"],
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert '"/a"' in process.stdout.readline()
        process.send_signal(signal.SIGINT)  # and the rest at once: it is there
        output, _ = process.communicate(timeout=DEADLINE)
        assert (process.returncode, '"/b"' in output) == (0, False)

    def test_bounded(self, tmp_path, capsys):
        recorder = self.make(tmp_path / "rec", self.opens(200, each=20), max_bytes=1 << 17)
        assert (tmp_path / "rec").stat().st_size <= 1 << 17
        recorded = sum(recorder.recorded.values())
        assert 0 < recorded < 4000 and recorder.causes() == {"recording_full": 4000 - recorded}
        assert capsys.readouterr().err.count("is not recorded") == 1
        recording = traceleft.Recording(str(tmp_path / "rec"))
        assert recording.events == recorded and recording.end["unrecorded"] == recorder.causes()
        recording.close()
        done = self.replay(tmp_path / "rec", "--spec", write_spec(tmp_path / "spec", a_spec()))
        assert f"not in the recording: {4000 - recorded} recording_full" in done.stderr

    def test_what_the_ring_had_no_room_for_is_said(self, tmp_path):
        self.make(tmp_path / "rec", self.opens(1), unseen={"open": {"ring_full": 5}})
        done = self.replay(tmp_path / "rec", "--spec", write_spec(tmp_path / "spec", a_spec()), "--summary", tmp_path / "sum")
        assert "not in the recording: 5 ring_full" in done.stderr
        assert json.loads((tmp_path / "sum").read_text())["unrecorded"] == {"ring_full": 5}

    def test_a_full_disk(self, tmp_path, monkeypatch, capsys):
        recorder = traceleft.Recorder(str(tmp_path / "rec"))
        recorder.open()
        recorder.take("open", raw_open("/a"))
        recorder.flush(self.OFFSET)
        size = recorder.size
        write = os.write
        monkeypatch.setattr(traceleft.os, "write", lambda fd, data: write(fd, data[:len(data) // 2]))
        recorder.take("open", raw_open("/b"))
        recorder.flush(self.OFFSET)
        assert os.stat(tmp_path / "rec").st_size == size  # nothing of a block that did not fit
        monkeypatch.undo()
        recorder.take("open", raw_open("/c"))
        recorder.close({})
        assert (dict(recorder.recorded), recorder.causes()) == ({"open": 1}, {"write_failed": 2})
        assert capsys.readouterr().err.count("No space left on device") == 1
        recording = traceleft.Recording(str(tmp_path / "rec"))
        assert recording.events == 1
        recording.close()

    def refused(self, path, **more):
        with pytest.raises(traceleft.UsageError) as caught:
            traceleft.Recording(str(path), **more)
        assert len(caught.value.errors) == 1 and "\n" not in str(caught.value)
        return str(caught.value)

    def test_cut_anywhere_it_is_refused_or_salvaged(self, tmp_path, capsys):
        self.make(tmp_path / "rec", self.opens(3))
        data = (tmp_path / "rec").read_bytes()
        cut = tmp_path / "cut"
        events = []
        ends = [at for at in range(len(data)) if data[at:at + 4] in (b"\1\0\0\0", b"\2\0\0\0", b"\3\0\0\0", b"\4\0\0\0")]
        near = {at + offset for at in ends for offset in (-1, 0, 1, 4, 8, 12)}
        for length in sorted({*range(0, len(data), 11), *near} & set(range(len(data)))):
            cut.write_bytes(data[:length])
            message = self.refused(cut)
            assert ("is torn: from byte" if length >= len(traceleft.RECORDING_MAGIC) else "is no recording") in message
            if "--salvage" in message:
                recording = traceleft.Recording(str(cut), salvage=True)
                events.append(sum(len(found) for _, found in recording.read()))
                assert f"replays the {events[-1]} events" in message
                recording.close()
        assert sorted(events) == events and set(events) == {0, 3, 6, 9}

    def test_a_flipped_bit_anywhere_is_found(self, tmp_path):
        self.make(tmp_path / "rec", self.opens(2, each=2))
        data = (tmp_path / "rec").read_bytes()
        for place in {*range(40), *range(0, len(data), 7)}:
            (tmp_path / "bad").write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1:])
            assert re.search("is torn|is no recording", self.refused(tmp_path / "bad"))
        (tmp_path / "bad").write_bytes(data + b"x")
        assert "is torn" in self.refused(tmp_path / "bad")

    @settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.lists(st.tuples(st.integers(0, 6), st.one_of(
        st.binary(max_size=400), st.builds(lambda fields, event, text, rest: struct.pack("<qI", 5, traceleft.HEADER.size + len(text)) + raw_record(
            event, fields[:8], text, fields[8], **dict(zip(("path", "exe", "flags"), fields[9:]))) + rest,
            st.lists(st.one_of(st.integers(0, 9), st.integers(0, 2**64 - 1)), min_size=10, max_size=11).map(
                lambda found: [*found, found[0] & 0xFFFF]), st.sampled_from(["open", "connect_v4"]), st.binary(max_size=30),
            st.binary(max_size=3)),
        st.recursive(st.none() | st.integers() | st.text(max_size=5), lambda v: st.dictionaries(
            st.sampled_from(["version", "record_version", "id", "name", "arguments", "unrecorded"]), v)).map(
                lambda value: json.dumps(value).encode()))), max_size=4))
    def test_blocks_that_somebody_made_up(self, tmp_path, blocks):
        """With right checksums: each is refused in one line, or read."""
        head = [(1, {"version": 1, "record_version": traceleft.RECORD_VERSION}),
                *((2, {"id": traceleft.EVENT_IDS[name], "name": name, "arguments": traceleft.row_of(EVENT_TYPES[name])})
                  for name in ("open", "connect_v4"))]
        blocks = [(kind, json.dumps(value).encode()) for kind, value in head] + blocks + [(4, b'{"unrecorded": {}}')]
        (tmp_path / "rec").write_bytes(traceleft.RECORDING_MAGIC + b"".join(
            traceleft.BLOCK.pack(kind, len(data), binascii.crc32(data)) + data for kind, data in blocks))
        with contextlib.suppress(traceleft.UsageError), contextlib.closing(
                traceleft.Recording(str(tmp_path / "rec"), salvage=True)) as recording:
            for _, events in recording.read():
                for event in events:
                    assert traceleft.format_event(event) and traceleft.sample_json(event)

    def test_other_versions_and_other_arguments(self, tmp_path, monkeypatch):
        monkeypatch.setattr(traceleft, "RECORDING_VERSION", 9)
        self.make(tmp_path / "rec", self.opens(1))
        monkeypatch.undo()
        assert self.refused(tmp_path / "rec").endswith("whose recordings have version 9: this one reads 1")
        monkeypatch.setattr(traceleft, "row_of", lambda found: "filename:path")
        self.make(tmp_path / "rec", self.opens(1))
        monkeypatch.undo()
        assert "event 'open' has the arguments filename:path, and not filename:path flags:int mode:mode" in self.refused(tmp_path / "rec")

    def test_a_recording_that_shrinks_while_it_is_read(self, tmp_path):
        self.make(tmp_path / "rec", self.opens(3))
        recording = traceleft.Recording(str(tmp_path / "rec"))
        os.truncate(tmp_path / "rec", (tmp_path / "rec").stat().st_size // 2)
        with pytest.raises(traceleft.TraceleftError, match="was changed while it was read"):
            list(recording.read())
        recording.close()

    def test_files_that_are_no_recordings(self, tmp_path):
        os.mkfifo(tmp_path / "fifo")
        for path, message in (("missing", "No such file"), (".", "Is a directory"), ("fifo", "not a regular file"),
                              (SCRIPT, "is no recording: 'traceleft.py trace --record FILE' makes one"),
                              ("/dev/zero", "not a regular file"), ("a\0b", "null")):
            assert message in self.refused(tmp_path / path)
        (tmp_path / "bad\n").write_text("")
        done = self.replay(tmp_path / "bad\n")
        assert_one_line(done, 2, "bad\\n is no recording")

    def test_only_recordings_are_overwritten(self, tmp_path):
        self.make(tmp_path / "rec", self.opens(2))
        self.make(tmp_path / "rec", self.opens(1))
        (tmp_path / "link").symlink_to(tmp_path / "rec")
        (tmp_path / "notes").write_text("mine")
        os.mkfifo(tmp_path / "fifo")
        self.make(tmp_path / "link", self.opens(1))
        for name, message in (("notes", "a file that is no recording"), ("fifo", "not a regular file"),
                              (".", "directory"), ("no/rec", "No such file")):
            with pytest.raises(traceleft.TraceleftError, match=message):
                traceleft.Recorder(str(tmp_path / name)).open()
        assert (tmp_path / "notes").read_text() == "mine"

    @pytest.mark.parametrize("text, value", [("64k", 65536), ("1M", 1 << 20), ("2G", 2 << 30), ("65536", 65536), ("1T", 1 << 40),
                                             ("1", None), ("63k", None), ("1m", None), ("", None), ("-1G", None)])
    def test_sizes(self, text, value):
        if value is None:
            with pytest.raises(ValueError):
                traceleft.parse_size(text)
        else:
            assert traceleft.parse_size(text) == value


@pytest.mark.usefixtures("programs")
class TestRecordingLive:
    pytestmark = live

    def test_the_same_counts_as_live(self, programs, tmp_path):
        """Filters that the kernel counts and filters that Python does; the replay runs without any privilege."""
        path = tmp_path / "file"
        spec = a_spec(channel={"id": "1", "type": "file", "path": str(tmp_path / "log")})
        first = spec["events"][0]
        rules = [("open", f"filename == '{path}'", "frequency=7;threshold=100"), ("open", f"regex(filename, '^{tmp_path}/')", "frequency=3;by=comm"),
                 ("open", "", "frequency=10;by=pid"), ("close", f"path != '{path}'", "frequency=2"), ("getppid", "", "threshold=2;by=pid"),
                 ("open", f"endswith(path, '/{path.name}') and flags & O_CREAT", "threshold=50;by=comm,uid")]
        spec["events"] = [{**first, "id": f"{name}-{i}", "name": name, "rule": rule, "function": {"id": "sigma", "parameters": parameters}}
                          for i, (name, rule, parameters) in enumerate(rules)]
        recording = tmp_path / "rec"
        with Agent("trace", "--spec", write_spec(tmp_path / "spec", spec), "--record", recording, "--summary", "-") as agent:
            for count in (3000, 500):
                subprocess.run([programs["opens"], path, str(count)], check=True)
                os.getppid()
            subprocess.run([sys.executable, "-c", "import os\nfor i in range(500): os.getppid()"], check=True)
            code, output = agent.stop()
        assert code == 0
        summary = json.loads(output)
        assert summary["recording"]["unrecorded"] == {} and summary["recording"]["bytes"] == recording.stat().st_size
        for place in (tmp_path, *tmp_path.parents):
            if place != place.parent and place != Path("/tmp"):
                place.chmod(place.stat().st_mode | 0o055)
        recording.chmod(0o644)
        done = run("replay", recording, "--spec", tmp_path / "spec", "--summary", "-", prefix=(
            "setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"),
            python="/usr/bin/python3", script=self.copy(tmp_path))
        assert done.returncode == 0, done.stderr
        replayed = json.loads(done.stdout.splitlines()[-1])
        names = ("id", "matched", "passed", "folded")
        assert [[row[name] for name in names] for row in replayed["filters"]] == [
            [row[name] for name in names] for row in summary["filters"]]
        assert [row["matched"] for row in replayed["filters"]][:2] == [3500, 3500] and all(row["passed"] for row in replayed["filters"])

    def copy(self, folder):
        """The script where nobody can read it."""
        (folder / "traceleft.py").write_bytes(SCRIPT.read_bytes())
        (folder / "traceleft.py").chmod(0o644)
        return folder / "traceleft.py"

    def test_recording_alone_ends_when_it_is_full(self, tmp_path):
        with Agent("trace", "--record", tmp_path / "rec", "--record-max-bytes", "1M", "--summary", "-",
                   f"{os.getpid()}:open") as agent:
            for _ in range(8000):
                os.close(os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT))
            code, output = agent.finish()
        assert code == 0 and (tmp_path / "rec").stat().st_size <= 1 << 20
        summary = json.loads(output)
        (row,) = summary["filters"]
        assert row["passed"] == summary["recording"]["events"] + row["lost"]["recording_full"] and summary["balanced"]
        done = run("replay", tmp_path / "rec", "--summary", tmp_path / "sum")
        assert done.stdout.count(f'"{tmp_path}/file"') > 1000
        assert json.loads((tmp_path / "sum").read_text())["filters"][0]["passed"] == summary["recording"]["events"]

    def test_a_kill_leaves_what_can_be_salvaged(self, programs, tmp_path):
        with Agent("trace", "--record", tmp_path / "rec", f"{os.getpid()}:mkdir") as agent:
            os.mkdir(tmp_path / "made")
            wait_until(lambda: b"/made" in (tmp_path / "rec").read_bytes(), "the event is recorded")
            agent.process.kill()
        done = run("replay", tmp_path / "rec")
        assert_one_line(done, 2, "is torn")
        assert f'Pathname "{tmp_path}/made"' in run("replay", tmp_path / "rec", "--salvage").stdout

    def test_where_it_cannot_be_written(self, tmp_path):
        assert_one_line(run("trace", "--record", tmp_path / "no/rec", "mkdir"), 1, "cannot record to")
        assert_one_line(run("trace", "--record", tmp_path / "rec", "--record-max-bytes", "1", "mkdir"), 2, "size of at least 64k")


class TestAgainstStrace:
    """Real programs under strace and under a tracer at once: the same calls with the same results on the same files."""

    pytestmark = live

    LINE = re.compile(r"(?P<tid>\d+) +(?P<name>\w+)\((?P<arguments>.*)\) += (?P<ret>\?|-?\w+)(?P<file><[^>]*>(\(deleted\))?)?"
                      r"(?: (?P<error>E\w+))?(?: .*)?")
    FILE = re.compile(r"(?:AT_FDCWD|\b\d+)<([^>]*)>(\(deleted\))?")
    TEXT = re.compile(r'"((?:[^"\\]|\\.)*)"')
    RESTARTS = {"ERESTARTSYS": 512, "ERESTARTNOINTR": 513, "ERESTARTNOHAND": 514, "ERESTART_RESTARTBLOCK": 516}
    # one event for each syscall: `open` has four of them, and the others are those that an event has its own name from
    FAMILY = {"open": "open", "creat": "open", "openat": "open", "openat2": "open", "faccessat2": "faccessat",
              "fchmodat2": "fchmodat"}
    # libc's names of calls that are compared as newfstatat, clock_nanosleep, eventfd2, pselect6 and mknodat
    LIBC_NAMES = {"stat", "lstat", "fstat", "nanosleep", "eventfd", "select", "mknod"}
    NOT_COMPARED = {"exit", "fork", *FAMILY, *LIBC_NAMES} - {"open"}

    def events(self):
        tracefs = traceleft.mounted_tracefs()
        names = []
        for name in set(traceleft.event_names()) - self.NOT_COMPARED:
            with contextlib.suppress(traceleft.HostError):
                if not traceleft.find_event(name).is_tcp:
                    traceleft.plan_sources({name: traceleft.Wanted(True)}, tracefs)
                    names.append(name)
        return names

    def parse(self, log):
        """(tid, event, result, file, name) of each call of strace's log."""
        pending = {}
        for line in log.splitlines():
            tid, _, rest = line.partition(" ")
            if line.endswith("<unfinished ...>"):
                pending[tid] = line[:-len("<unfinished ...>")].rstrip()
                continue
            resumed = re.match(r"\d+ +<\.\.\. \w+ resumed>(.*)", line)
            line = pending.pop(tid) + resumed[1] if resumed else line
            if not re.match(r"\d+ +\w+\(", line):
                continue  # signals and ends
            texts = self.TEXT.findall(line)
            match = self.LINE.fullmatch(self.TEXT.sub('""', line))
            assert match, line
            if match["name"] not in self.LIBC_NAMES:
                yield self.call(match, texts)
        for line in pending.values():
            yield self.call(self.LINE.fullmatch(self.TEXT.sub('""', line).rstrip(")") + ") = ?"), self.TEXT.findall(line))

    def call(self, match, texts):
        name = self.FAMILY.get(match["name"], match["name"])
        event = traceleft.find_event("umount2" if name == "umount" else name)
        if match["error"]:
            ret = -(self.RESTARTS.get(match["error"]) or getattr(errno, match["error"]))
        else:
            ret = None if match["ret"] == "?" else int(match["ret"], 0)
        found = self.FILE.search(match["arguments"]) if event.descriptors else None
        if name == "open":
            found = self.FILE.fullmatch("3" + match["file"]) if match["file"] else None
        path = found[1] + (" " + found[2] if found[2] else "") if found else ""
        names = [text for argument, text in zip((a for a in event.arguments if a.is_text), texts) if argument.type_name == "path"]
        return int(match["tid"]), event.name, ret, path, *names[:1]

    def ours(self, event):
        types = event.type.arguments
        names = [value for argument, value in zip(types, event.args) if argument.type_name == "path"]
        path = event.files[0] if event.type.descriptors else event.path if event.name == "open" and event.ret >= 0 else ""
        ret = event.ret & (1 << 64) - 1 if event.name in ("mmap", "brk", "mremap") and event.ret < -4095 else event.ret
        return event.tid, event.name, ret, path, *names[:1]

    @staticmethod
    def explained(calls, cut_off):
        """Without what only one of the two shows, each for a reason of its own."""
        calls = [call for call in calls if not (call[1] in ("clone", "clone3", "vfork") and call[2] == 0)]  # the child's side
        last = {call[0]: i for i, call in enumerate(calls)}
        for i, (tid, name, _, *rest) in enumerate(calls):
            # What goes on after a signal's handler has the value of a register as its result, which is none of the call.
            # The last call of a thread that is killed has a result for the kernel only, and exit_group has none.
            if name == "rt_sigreturn" or (tid, name) in cut_off and i == last[tid]:
                calls[i] = (tid, name, None, *rest)
        # a thread that is killed on its way into a call: the kernel does not make it, and strace does not hear of it
        return [call for i, call in enumerate(calls) if not (call[2] == -errno.ENOSYS and i == last[call[0]])]

    def compare(self, tmp_path, *command, cwd, only=None, **options):
        """Returns how many calls, of all syscalls or of those of some events, the program and its children made."""
        log = tmp_path / "strace.log"
        stub = ["sh", "-c", 'read line; exec "$@"', "sh", "strace", "-f", "-y", "-s", "4096", "-o", log, *command]
        process = subprocess.Popen([*map(str, stub)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, cwd=cwd)
        try:
            with traceleft.Tracer(f"{process.pid}:{','.join(only or self.events())}", follow=True, **options) as tracer:
                process.stdin.close()
                assert process.wait(DEADLINE) == 0
                events = list(tracer.drain())
        finally:
            process.kill()
            process.wait()
        calls = [call for call in self.parse(log.read_text()) if only is None or call[1] in only]
        cut_off = {call[:2] for call in calls if call[2] is None}
        theirs = self.explained(calls, cut_off)
        tids = {call[0] for call in theirs}  # and not strace itself
        mine = [self.ours(event) for event in events if event.tid in tids]
        begin = next(i for i, call in enumerate(mine) if call[:3] == (theirs[0][0], "execve", 0))
        mine = self.explained(mine[begin:], cut_off)  # before it runs the program, the first one is a part of strace
        missing, more = (collections.Counter(a) - collections.Counter(b) for a, b in ((theirs, mine), (mine, theirs)))
        assert (missing, more) == ({}, {})
        return len(theirs)

    def test_tar(self, tmp_path):
        (tmp_path / "in").mkdir()
        for i in range(20):
            (tmp_path / "in" / f"file {i}").write_text("x" * i * 1000)
        assert self.compare(tmp_path, "tar", "-czf", tmp_path / "a.tar.gz", "in", cwd=tmp_path) > 300

    def test_tar_with_a_program_at_each_syscall(self, tmp_path):
        only = ["open", "close", "read", "write", "newfstatat", "execve", "exit_group", "unlinkat", "mkdir", "rt_sigreturn"]
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "file").write_text("text")
        command = ["tar", "-cf", tmp_path / "a.tar", "--remove-files", "in"]
        assert self.compare(tmp_path, *command, cwd=tmp_path, only=only, see_all=False) > 30

    def test_git_status(self, tmp_path):
        repository = tmp_path / "repository"
        git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", repository]
        subprocess.run(["git", "init", "-q", repository], check=True)
        for i in range(20):
            (repository / f"file{i}").write_text(str(i))
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "-qm", "first"], check=True)
        (repository / "file3").write_text("changed")
        assert self.compare(tmp_path, "git", "status", cwd=repository) > 200

    def test_compileall(self, tmp_path):
        for i in range(5):
            (tmp_path / f"module{i}.py").write_text(f"x = {i}")
        assert self.compare(tmp_path, sys.executable, "-I", "-m", "compileall", "-q", ".", cwd=tmp_path) > 500

    def test_curl(self, tmp_path):
        handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
        (tmp_path / "file").write_bytes(b"x" * 100_000)
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            url = f"http://127.0.0.1:{server.server_port}/file"
            try:
                assert self.compare(tmp_path, "curl", "-s", "--noproxy", "*", "-o", "out", url, cwd=tmp_path) > 200
            finally:
                server.shutdown()
                thread.join()
        assert (tmp_path / "out").read_bytes() == (tmp_path / "file").read_bytes()

    def test_a_shell_with_threads_signals_and_restarts(self, tmp_path):
        """Children that are killed, calls that signals interrupt, a thread that dies with its process."""
        script = """
import os, signal, subprocess, threading, time
signal.signal(signal.SIGALRM, lambda *_: None)
signal.setitimer(signal.ITIMER_REAL, 0.05)
time.sleep(0.1)
child = subprocess.Popen(["sleep", "30"])
os.kill(child.pid, signal.SIGKILL)
child.wait()
threading.Thread(target=time.sleep, args=(30,), daemon=True).start()
os.chdir("/")
for name in ("nothing", "/proc/self/cwd", ""):
    try:
        os.close(os.open(name, os.O_RDONLY))
    except OSError:
        pass
os._exit(0)
"""
        assert self.compare(tmp_path, sys.executable, "-I", "-S", "-c", script, cwd=tmp_path) > 300


class TestSelfWatch:
    class FakeTracer:
        """A tracer whose ring fills as told, and whose main loop may hang in it."""

        held = ()
        uses = [0]
        hangs = 0.0
        lost = ()

        def ring_use(self):
            time.sleep(self.hangs)
            return {"events": (self.uses.pop(0) if len(self.uses) > 1 else self.uses[0], 100)}

        def lost_attachments(self):
            return list(self.lost)

    @pytest.fixture
    def tracer(self):
        return self.FakeTracer()

    @pytest.fixture
    def watch(self, tracer, monkeypatch):
        monkeypatch.setattr(traceleft, "STANDSTILL", 1.0)
        watch = traceleft.SelfWatch(tracer)
        yield watch
        watch.stop()
        assert not watch.thread.is_alive()

    def test_says_while_it_stands_still_and_where_and_afterwards_how_long(self, tracer, watch, capsys):
        tracer.hangs = 2.5
        watch.tick()
        (line,) = capsys.readouterr().err.splitlines()
        assert re.fullmatch(r"traceleft: stands still: no second has been closed for \d+ s; it is at watch_ring\(\), line \d+", line)
        tracer.hangs = 0
        watch.tick()
        watch.tick()
        (line,) = capsys.readouterr().err.splitlines()
        assert re.match(r"traceleft: stood still for \d+ s: ", line)

    def test_says_once_that_it_falls_behind(self, tracer, watch, capsys):
        tracer.uses = [10, 51, 90, 40, 60, 9, 0, 70, 70]
        for _ in range(9):
            watch.tick()
        assert [line.split(":")[1] for line in capsys.readouterr().err.splitlines()] == [
            " falls behind", " has caught up", " falls behind"]

    def test_says_once_what_is_not_attached_any_more(self, tracer, watch, capsys):
        tracer.lost = ["syscalls/sys_exit_open"]
        for _ in range(3 * traceleft.LINK_CHECK):
            watch.tick()
        (line,) = capsys.readouterr().err.splitlines()
        assert "is not attached to syscalls/sys_exit_open any more" in line


class TestSelfWatchLive:
    pytestmark = live

    @pytest.mark.parametrize("replaced", [False, True])
    def test_a_lost_attachment_is_found(self, replaced):
        with traceleft.Tracer("mkdir,connect_v4") as tracer:
            assert tracer.lost_attachments() == []
            for attachment, (link, _) in list(tracer.links.items()):
                if attachment.place in ("syscalls/sys_exit_mkdir", "tp_btf/inet_sock_set_state"):
                    fd = tracer.bpf.call("bpf_link__fd", link)
                    if replaced:
                        os.dup2(0, fd)
                    else:
                        os.close(fd)
            assert sorted(tracer.lost_attachments()) == ["syscalls/sys_exit_mkdir", "tp_btf/inet_sock_set_state"]
            if not replaced:  # close() closes them again, which must not hit what is another's by then
                for _ in range(2):
                    os.open(os.devnull, os.O_RDONLY)

    def test_a_stopped_agent_says_so_and_has_counted_everything(self, programs, tmp_path):
        spec = a_spec(f"filename == '{tmp_path}/f'", "frequency=10", channel={"id": "1", "type": "file", "path": f"{tmp_path}/log"})
        with Agent("trace", "--spec", write_spec(tmp_path / "spec", spec), "--summary", "-") as agent:
            agent.process.send_signal(signal.SIGSTOP)
            stopped = time.monotonic()
            subprocess.run([programs["opens"], tmp_path / "f", "50000"], check=True)
            wait_until(lambda: time.monotonic() > stopped + traceleft.STANDSTILL + 2, "a while")
            agent.process.send_signal(signal.SIGCONT)
            wait_until(lambda: any("still for" in line for line in agent.stderr), "it says so")
            code, output = agent.stop()
        (row,) = json.loads(output)["filters"]
        assert (code, row["matched"], row["passed"], row["lost"]) == (0, 50_000, 5_000, {})

    def test_an_agent_that_falls_behind_says_so_and_counts_everything(self, tmp_path):
        """While Python is busy with 45 events for more than a second, 75 others fill the larger part of the ring."""
        source = random.Random(2)
        names = [f"{tmp_path}/" + "".join(source.choices("ab", k=3900 - len(str(tmp_path)))) + "ab" for _ in range(120)]
        patterns = [f"regex(filename, '(a|b)*a(a|b){{{200 + number}}}c')" for number in range(50)]
        tests = [parse_rule(pattern, OPEN).matcher() for pattern in patterns[:5]]
        begin = time.perf_counter()
        assert not any(test(an_open(name)) for test in tests for name in names[:5])
        each = (time.perf_counter() - begin) / 25
        slow = " or ".join(patterns[:min(max(round(0.03 / each), 1), 50)])
        spec = a_spec(f"startswith(filename, '{tmp_path}/') and ({slow} or endswith(filename, 'ab'))",
                      channel={"id": "1", "type": "file", "path": f"{tmp_path}/log"})

        def opens(first, last):
            for name in names[first:last]:
                with contextlib.suppress(OSError):
                    os.open(name, os.O_RDONLY)

        with Agent("trace", "--spec", write_spec(tmp_path / "spec", spec), "--ring-size", 1 << 20, "--summary", "-") as agent:

            def said(what):
                return sum(line.startswith(f"traceleft: {what}") for line in agent.stderr)

            done = 0
            while not said("falls behind: ") and done < 10 * len(names):  # again when it was quicker, or slower, than that
                agent.process.send_signal(signal.SIGSTOP)  # so that all of the first ones are taken at once
                opens(0, 45)
                agent.process.send_signal(signal.SIGCONT)
                time.sleep(0.15)
                opens(45, None)
                done += len(names)
                wait_until(lambda: said("falls behind: ") or written(tmp_path / "log") == done, "either")  # noqa: B023
            wait_until(lambda: said("has caught up"), "it has caught up")
            code, output = agent.stop()
        (row,) = json.loads(output)["filters"]
        assert (code, row["matched"], row["passed"], row["lost"]) == (0, done, done, {})
        assert (said("falls behind: "), said("has caught up")) == (1, 1)

    def test_two_agents_do_not_disturb_each_other(self, programs, tmp_path):
        """One for some syscalls, the other for all of them and in Python too: both count every open."""
        rule = f"filename == '{tmp_path}/f'"
        specs = [a_spec(rule, "frequency=3", channel={"id": "1", "type": "file", "path": f"{tmp_path}/log{i}"}) for i in range(2)]
        specs[1]["events"] += [{**specs[1]["events"][0], "id": "python", "rule": f"glob(filename, '{tmp_path}/?')"},
                               {**a_spec("fd == -7", name="read")["events"][0], "id": "read"},
                               {**a_spec("fd == -7", name="write")["events"][0], "id": "write"},
                               {**a_spec("pid == 0", name="futex")["events"][0], "id": "futex"}]
        with contextlib.ExitStack() as stack:
            agents = [stack.enter_context(Agent("trace", "--spec", write_spec(tmp_path / f"spec{i}", spec), "--summary", "-"))
                      for i, spec in enumerate(specs)]
            assert [bool(re.search(r"\bsys_exit\b", agent.stderr[-1])) for agent in agents] == [False, True]
            opens = [subprocess.Popen([programs["opens"], tmp_path / "f", "20000"]) for _ in range(2)]
            assert [process.wait(DEADLINE) for process in opens] == [0, 0]
            code, output = agents[0].stop()  # the other one goes on
            assert code == 0 and json.loads(output)["filters"][0]["matched"] == 40_000
            subprocess.run([programs["opens"], tmp_path / "f", "1000"], check=True)
            code, output = agents[1].stop()
        assert code == 0
        assert [row["matched"] for row in json.loads(output)["filters"]] == [41_000, 41_000, 0, 0, 0]

    def test_explain_says_that_its_own_events_are_left_out(self):
        assert "never traced: the tracer's own events" in run("explain", HERE / "spec/aggregator-spec.json").stdout


class TestWalkThrough:
    pytestmark = live

    def test_exact_numbers(self, programs, tmp_path):
        """Each N through one agent of its own path, all at once, so that they cannot be confused either."""
        numbers = (1, 99, 100, 101, 250_000)
        spec = a_spec(channel={"id": "1", "type": "file", "path": str(tmp_path / "log")})
        spec["events"] = [{**spec["events"][0], "id": str(n), "rule": f"arg1 == '{tmp_path}/{n}'",
                           "function": {"id": "sigma", "parameters": "frequency=100;threshold=0"}} for n in numbers]
        with Agent("trace", "--spec", write_spec(tmp_path / "spec", spec), "--summary", "-") as agent:
            for n in numbers:
                subprocess.run([programs["opens"], tmp_path / str(n), str(n)], check=True)
            code, output = agent.stop()
        assert code == 0
        summary = json.loads(output)
        assert summary["balanced"]
        assert [(row["id"], row["matched"], row["passed"], row["folded"], row["lost"]) for row in summary["filters"]] == [
            (str(n), n, n // 100, n - n // 100, {}) for n in numbers]
        counts = {str(n): 0 for n in numbers}
        for line in (tmp_path / "log").read_text().splitlines():
            record = json.loads(line)
            counts[record["filter"]] += record["count"]
        assert counts == {str(n): n // 100 for n in numbers}

    def test_other_reductions_on_every_cpu(self, programs, tmp_path):
        """One group of both CPUs at full rate, and one of each: what passes is exact."""
        spec = a_spec(channel={"id": "1", "type": "file", "path": str(tmp_path / "log")})
        functions = {"backoff": "multiplier=10", "distinct": "by=filename", "limit": "count=5;seconds=600"}
        spec["events"] = [{**spec["events"][0], "rule": f"startswith(filename, '{tmp_path}/')", "id": name,
                           "function": {"id": name, "parameters": parameters}} for name, parameters in functions.items()]
        with Agent("trace", "--spec", write_spec(tmp_path / "spec", spec), "--summary", "-") as agent:
            loads = [subprocess.Popen([programs["opens"], tmp_path / name, "60000"]) for name in "ab"]
            assert [load.wait(DEADLINE) for load in loads] == [0, 0]
            code, output = agent.stop()
        assert code == 0
        assert [(row["id"], row["matched"], row["passed"]) for row in json.loads(output)["filters"]] == [
            ("backoff", 120_000, 6), ("distinct", 120_000, 2), ("limit", 120_000, 5)]  # 1, 10, 100, 1,000, 10,000, 100,000

    def test_kinds_add_up_on_every_cpu(self, programs, tmp_path):
        """Two groups, one per CPU at full rate: the kinds of all alerts add up to what was done, each to its own number."""
        spec = a_spec(channel={"id": "1", "type": "file", "path": str(tmp_path / "log")})
        spec["events"] = [{**spec["events"][0], "rule": f"startswith(filename, '{tmp_path}/')", "id": metrics,
                           "output": {"metrics": metrics, "parameters": parameters, "format": "json"}}
                          for metrics, parameters in (("top_per_sec", "by=filename"), ("histogram", "field=mode"))]
        numbers = {"a": 200_000, "b": 150_000}
        with Agent("trace", "--spec", write_spec(tmp_path / "spec", spec), "--summary", "-") as agent:
            loads = [subprocess.Popen([programs["opens"], tmp_path / name, str(number)]) for name, number in numbers.items()]
            assert [load.wait(DEADLINE) for load in loads] == [0, 0]
            code, output = agent.stop()
        assert code == 0 and [row["matched"] for row in json.loads(output)["filters"]] == [350_000, 350_000]
        kinds, other = collections.Counter(), 0
        for record in map(json.loads, (tmp_path / "log").read_text().splitlines()):
            for row in record.get("top", []):
                kinds[row["filename"]] += row["count"]
            for row in record.get("histogram", []):
                kinds[row["to"]] += row["count"]
            other += record.get("other", 0)
        assert kinds[f"{tmp_path}/a"] == 200_000 and kinds[f"{tmp_path}/b"] == 150_000 and other == 0
        assert sum(kinds.values()) == 700_000

    SHELL_LOOP = "trap 'echo $n; exit' TERM; n=0; while true; do echo -n > {path}; n=$((n+1)); done"

    def shell_loop(self, path, seconds):
        """Opens the file from a shell for a while; returns how often."""
        loop = subprocess.Popen(["bash", "-c", self.SHELL_LOOP.format(path=path)], stdout=subprocess.PIPE, text=True)
        time.sleep(seconds)
        loop.terminate()
        return int(loop.communicate(timeout=DEADLINE)[0])

    def test_one_block_a_second_whose_counts_recover_the_volume(self, tmp_path):
        spec = json.loads((HERE / "spec/aggregator-spec.json").read_text())
        spec["channels"][0]["path"] = str(tmp_path / "log")
        spec["events"][0]["rule"] = f"arg1 == '{tmp_path}/a.txt'"
        with Agent("trace", "--spec", write_spec(tmp_path / "spec", spec), "--summary", tmp_path / "summary") as agent:
            opens = self.shell_loop(tmp_path / "a.txt", 10)
            code, _ = agent.stop()
        assert code == 0
        blocks = (tmp_path / "log").read_text().split("\n\n")[:-1]
        counts = [int(re.match(r"COUNT: (\d+)\nEVENT: \{.*\} Filename \"(.*)\" Flags 577 Mode 438$", b)[1]) for b in blocks]
        assert 9 <= len(blocks) <= 12
        assert abs(sum(counts) * 100 - opens) <= 100
        assert json.loads((tmp_path / "summary").read_text())["balanced"]

    def test_the_same_over_grpc_with_collect(self, tmp_path):
        with Agent("collect", "--listen", "127.0.0.1:0") as collector:
            port = collector.stderr[-1].rpartition(":")[2]
            spec = grpc_spec(port, rule=f"arg1 == '{tmp_path}/a.txt'", parameters="frequency=100")
            with Agent("trace", "--collector-insecure", "--spec", write_spec(tmp_path / "spec", spec), "--summary", "-"
                       ) as agent:
                opens = self.shell_loop(tmp_path / "a.txt", 3)
                code, output = agent.stop()
            assert code == 0
            collected, lines = collector.stop()
        (row,) = json.loads(output)["filters"]
        assert abs(row["passed"] * 100 - opens) <= 100 and row["lost"] == {}
        last = lines.splitlines()[-1]
        assert collected == 0
        assert last == f"total {row['passed']} in {row['alerts']} alerts from 1 host(s)"
        assert re.search(rf"host {socket.gethostname()} event open count \d+ rate \d+/s total {row['passed']} ", lines)

    def test_flood_from_every_cpu_is_counted_exactly(self, programs, tmp_path):
        """Two processes at full rate, a ring buffer of one page: with and without `by`, and a threshold."""
        n = 400_000
        spec = a_spec(channel={"id": "1", "type": "file", "path": str(tmp_path / "log")})
        spec["events"] = [{**spec["events"][0], "id": name, "rule": f"filename == '{tmp_path}/f'",
                           "function": {"id": "sigma", "parameters": parameters}}
                          for name, parameters in (("all", ""), ("every 7th", "frequency=7"), ("by", "frequency=3;by=pid,comm"))]
        with Agent("trace", "--spec", write_spec(tmp_path / "spec", spec), "--ring-size", 4096, "--summary", "-") as agent:
            floods = [subprocess.Popen([programs["opens"], tmp_path / "f", str(n)]) for _ in range(2)]
            assert [flood.wait(DEADLINE) for flood in floods] == [0, 0]
            code, output = agent.stop()
        summary = json.loads(output)
        assert code == 0 and summary["balanced"]
        assert {row["id"]: (row["matched"], row["passed"]) for row in summary["filters"]} == {
            "all": (2 * n, 2 * n), "every 7th": (2 * n, 2 * n // 7), "by": (2 * n, 2 * (n // 3))}
        counts = dict.fromkeys(("all", "every 7th", "by"), 0)
        for record in map(json.loads, (tmp_path / "log").read_text().splitlines()):
            counts[record["filter"]] += record["count"]
        assert counts == {row["id"]: row["passed"] for row in summary["filters"]}

    def test_a_million_distinct_groups(self, tmp_path):
        """Every 10th of each group passes: none of the first MAX_GROUPS, which come once, and every 10th of `other`."""
        spec = a_spec(f"startswith(filename, '{tmp_path}/x')", "frequency=10;by=filename",
                      channel={"id": "1", "type": "file", "path": str(tmp_path / "log")})
        opens = f"""import os
for i in range(1_000_000):
    try: os.open('{tmp_path}/x%d' % i, 0)
    except OSError: pass"""
        with Agent("trace", "--spec", write_spec(tmp_path / "spec", spec), "--summary", "-") as agent:
            before = resident_kib(agent.process.pid)
            subprocess.run([sys.executable, "-c", opens], check=True)
            after = resident_kib(agent.process.pid)
            code, output = agent.stop()
        (row,) = json.loads(output)["filters"]
        assert code == 0 and row["matched"] == 1_000_000
        assert row["passed"] == (1_000_000 - traceleft.MAX_GROUPS) // 10
        assert after - before < 2048

    def test_selectors_restrict_a_spec(self, programs, tmp_path):
        spec = write_spec(tmp_path / "spec", a_spec(channel={"id": "1", "type": "file", "path": str(tmp_path / "log")}))
        caller = subprocess.Popen([programs["calls"], str(tmp_path)], stdin=subprocess.PIPE)
        with Agent("trace", "--spec", spec, f"9:{caller.pid}:open", "--summary", "-") as agent:
            subprocess.run([programs["opens"], tmp_path / "f", "50"], check=True)
            caller.stdin.close()
            caller.wait(DEADLINE)
            _, output = agent.stop()
        assert json.loads(output)["filters"][0]["matched"] == 7
        assert all(json.loads(line)["sample"]["program_id"] == 9 for line in (tmp_path / "log").read_text().splitlines())

    def test_duration_ends_it(self, tmp_path):
        spec = write_spec(tmp_path / "spec", a_spec(channel={"id": "1", "type": "file", "path": str(tmp_path / "log")}))
        done = run("trace", "--spec", spec, "--duration", "0.5")
        assert done.returncode == 0
        assert done.stderr.splitlines()[0].startswith("traceleft: ready")
        assert "FILTER  EVENT" in done.stderr

    @pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
    def test_every_example_runs(self, path, tmp_path):
        """As it stands, but for the places that it writes to."""
        value = json.loads(path.read_text())
        for i, channel in enumerate(value["channels"]):
            channel["path"] = f"{tmp_path}/log{i}" if channel["type"] == "file" else "localhost:1"
            for files in ("tls", "token_file"):
                channel.pop(files, None)
            if "spool" in channel:
                channel["spool"]["dir"] = f"{tmp_path}/spool{i}"
        uses_grpc = any(channel["type"] == "grpc" for channel in value["channels"]
                        if channel["id"] in {event["channel"] for event in value["events"]})
        done = run("trace", "--collector-insecure", "--spec", write_spec(tmp_path / path.name, value), "--duration", "1.2",
                   "--summary", "-")
        summary = json.loads(done.stdout)
        assert done.returncode == 0 and summary["balanced"]
        lost = sum(count for row in summary["filters"] for count in row["lost"].values())
        assert lost == 0 or uses_grpc

    def test_grpc_with_tls_trusts_the_systems_roots_and_nobody_else(self, generated, tmp_path):
        """In a mount namespace the system's roots are a CA of our own; outside of it they are not."""
        make_certificates(tmp_path)
        credentials = grpc.ssl_server_credentials([((tmp_path / "key.pem").read_bytes(), (tmp_path / "cert.pem").read_bytes())])
        with ProtoServer(generated, credentials=credentials) as server:
            rule = f"startswith(pathname, '{tmp_path}/')"
            spec = write_spec(tmp_path / "spec", grpc_spec(server.port, name="mkdir", rule=rule))
            with_ca = ["unshare", "-m", "sh", "-c", f"mount -t tmpfs t /etc/ssl/certs && cp {tmp_path}/ca.pem "
                       '/etc/ssl/certs/ca-certificates.crt && exec "$@"', "sh"]
            outcomes = {}
            for name, prefix in (("trusted", with_ca), ("not trusted", ())):
                if not prefix and not any(os.path.exists(path) for path in traceleft.CA_BUNDLES):
                    done = run("trace", "--spec", spec, "--duration", "1")
                    assert done.returncode == 3 and "no CA certificates" in done.stderr
                    continue
                with Agent("trace", "--spec", spec, "--summary", "-", prefix=prefix) as agent:
                    subprocess.run(["mkdir", tmp_path / name], check=True)
                    time.sleep(1.1)
                    code, output = agent.stop()
                (row,) = json.loads(output)["filters"]
                outcomes[name] = (code, row["matched"], sum(row["lost"].values()))
        assert outcomes["trusted"] == (0, 1, 0)
        assert outcomes.get("not trusted", (0, 1, 1)) == (0, 1, 1)
        assert [metric.MkdirEvent.pathname for metric in server.metrics] == [f"{tmp_path}/trusted".encode()]


def make_certificates(folder):
    """ca.pem, and cert.pem with key.pem for localhost, signed by it."""
    def openssl(*arguments):
        subprocess.run(["openssl", *arguments], check=True, cwd=folder, capture_output=True)
    openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=test CA")
    openssl("req", "-newkey", "rsa:2048", "-nodes", "-keyout", "key.pem", "-out", "csr.pem", "-subj", "/CN=localhost",
            "-addext", "subjectAltName=DNS:localhost")
    (folder / "ext").write_text("subjectAltName=DNS:localhost\n")
    openssl("x509", "-req", "-in", "csr.pem", "-CA", "ca.pem", "-CAkey", "ca.key", "-out", "cert.pem", "-extfile", "ext",
            "-CAcreateserial")


def resident_kib(pid):
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1])


class Served:
    """A MetricsServer in a thread that serves as the main loop does; a context manager."""

    def __init__(self, figures=None):
        self.server = traceleft.MetricsServer(("127.0.0.1", 0))
        self.server.figures = figures or (lambda: {"traceleft_lost_samples": [({}, 7)]})
        self.port = self.server.listener.getsockname()[1]
        self.stopping = False
        self.thread = threading.Thread(target=self.loop)

    def loop(self):
        while not self.stopping:
            select.select([self.server], [], [], 0.02)
            self.server.serve()

    def connect(self, data=b""):
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=DEADLINE)
        connection.sendall(data)
        return connection

    def ask(self, data):
        """(status, headers, body) of the response to some bytes."""
        with self.connect(data) as connection:
            response = b"".join(iter(lambda: connection.recv(65536), b""))
        head, _, body = response.partition(b"\r\n\r\n")
        status, *lines = head.decode().split("\r\n")
        return int(status.split()[1]), dict(line.split(": ", 1) for line in lines), body

    def get(self, path="/metrics", accept="", method="GET"):
        return self.ask(f"{method} {path} HTTP/1.1\r\nHost: x\r\naccept: {accept}\r\n\r\n".encode())

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *exception):
        self.stopping = True
        self.thread.join(DEADLINE)
        self.server.close()


@pytest.fixture(scope="session")
def prometheus_parsers():
    """prometheus_client's: text -> families."""
    return {openmetrics: importlib.import_module(f"prometheus_client.{name}parser").text_string_to_metric_families
            for openmetrics, name in ((False, ""), (True, "openmetrics."))}


class TestMetrics:
    PROMETHEUS_ACCEPTS = ("application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
                          "text/plain;version=0.0.4;q=0.5,*/*;q=0.1")
    HOSTILE = 'a"b\\c\nd\udcff\u2028é{}'

    def figures(self):
        account = traceleft.Account(self.HOSTILE, "open")
        account.matched, account.passed, account.folded, account.alerts = 2**63, 12, 3, 4
        account.deliver(10)
        account.lose("write_failed", 2)
        spec = parse_spec(a_spec(id="x", stream="é", group='"'))
        found = traceleft.collections.defaultdict(list, traceleft.process_figures())
        traceleft.filter_figures(found, account, spec.filters[0], "file")
        return found

    @pytest.mark.parametrize("openmetrics", [False, True])
    def test_others_read_it_so(self, prometheus_parsers, openmetrics):
        text = traceleft.format_metrics(self.figures(), openmetrics).decode()
        families = {family.name: family for family in prometheus_parsers[openmetrics](text)}
        (matched,) = families["traceleft_filter_matched_events"].samples
        assert matched.value == 2**63 and matched.name == "traceleft_filter_matched_events_total"
        assert matched.labels == {"filter": 'a"b\\c\nd\\udcff\u2028é{}', "event": "open", "channel": "1", "stream": "é", "group": '"'}
        assert {s.labels["cause"]: s.value for s in families["traceleft_filter_lost_events"].samples} == {"queue_full": 0, "write_failed": 2}
        if openmetrics:
            assert families["traceleft_build"].type == "info" and families["process_resident_memory_bytes"].unit == "bytes"
        assert all(family.documentation and family.type != "unknown" for family in families.values())

    def test_promtool_has_nothing_to_say(self):
        every = {name: [({"cause": "x"}, 1)] for name in traceleft.METRICS}
        done = subprocess.run(["promtool", "check", "metrics"], input=traceleft.format_metrics(every, False), capture_output=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")

    @pytest.mark.parametrize("accept, openmetrics", [
        ("", False), ("*/*", False), (PROMETHEUS_ACCEPTS, True), ("text/plain", False), ("application/openmetrics-text", True),
        ("application/openmetrics-text;q=0", False), ("application/openmetrics-text;q=0.3, text/plain;q=0.4", False),
        ("application/openmetrics-text; q=nope", False), (",;,;q=;=", False),
    ])
    def test_negotiates(self, accept, openmetrics):
        assert traceleft.prefers_openmetrics(accept) == openmetrics

    def test_serves(self):
        with Served() as served:
            status, headers, body = served.get()
            assert status == 200 and headers["Content-Type"].startswith("text/plain; version=0.0.4")
            assert b"traceleft_lost_samples_total 7\n" in body and int(headers["Content-Length"]) == len(body)
            status, headers, body = served.get(accept=self.PROMETHEUS_ACCEPTS)
            assert headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0") and body.endswith(b"# EOF\n")
            assert served.get(method="HEAD")[::2] == (200, b"")
            assert served.get("/?x=1")[0] == 200

    @pytest.mark.parametrize("request_, status", [
        (b"GET /x HTTP/1.1\r\n\r\n", 404), (b"POST /metrics HTTP/1.1\r\nContent-Length: 3\r\n\r\n", 405), (b"\r\n\r\n", 400),
        (b"GET /metrics\r\n\r\n", 400), (b"\x16\x03\x01\x02\x00\x01\x00\x01\n\n", 400), (b"GET / SMTP/1.1\n\n", 400),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * 8192, 431), (b"GET /metrics HTTP/1.0\n\n", 200),
    ])
    def test_requests(self, request_, status):
        with Served() as served:
            assert served.ask(request_)[0] == status

    def test_a_client_that_has_gone(self):
        with Served() as served:
            served.connect(b"GET /metrics").close()
            reset = served.connect(b"GET /metrics HTTP/1.1\r\n")
            reset.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            reset.close()
            assert served.get()[0] == 200
            wait_until(lambda: not served.server.clients, "both are forgotten")

    def test_slow_clients_hold_up_nobody(self, monkeypatch):
        """One byte a client, more clients than there is room for, and some that do not read a large answer."""
        monkeypatch.setattr(traceleft.MetricsServer, "CLIENT_TIMEOUT", 0.7)
        large = {"traceleft_lost_samples": [({"x": "y" * 1000}, n) for n in range(20_000)]}
        with Served(lambda: large) as served, contextlib.ExitStack() as stack:
            for _ in range(8):
                stack.enter_context(served.connect(b"GET /metrics HTTP/1.1\r\n\r\n"))
            slow = [stack.enter_context(served.connect(b"G")) for _ in range(40)]
            before = time.monotonic()
            assert len(served.get()[2]) > 20_000_000
            assert time.monotonic() - before < 5
            assert len(served.server.clients) <= traceleft.MetricsServer.MAX_CLIENTS
            wait_until(lambda: not served.server.clients, "all have had their time")
            assert slow[-1].recv(1) == b""

    def test_without_descriptors_the_oldest_client_makes_room(self):
        class Full:
            def accept(self):
                raise OSError(24, "EMFILE")

        server = traceleft.MetricsServer(("127.0.0.1", 0))
        listener = server.listener
        with socket.create_connection(listener.getsockname()) as client:
            wait_until(lambda: server.serve() or server.clients, "it has been accepted")
            server.listener = Full()
            server.accept()
            assert not server.clients and client.recv(1) == b""
        server.listener = listener
        server.close()

    def test_a_flood_of_requests_takes_the_figures_seldom(self):
        taken = []
        with Served(lambda: taken.append(1) or {}) as served:
            for _ in range(100):
                assert served.get()[0] == 200
        assert len(taken) <= 20

    def test_figures_that_cannot_be_had_are_said(self):
        def figures():
            raise OSError(1, "no")
        with Served(figures) as served:
            status, _, body = served.get()
            assert (status, body) == (500, b"[Errno 1] no\n") and served.get("/")[0] == 200

    def test_causes_of_loss_are_known(self):
        """All that the program can count as lost by a channel is said as 0 from the start."""
        named = set(re.findall(r"\.lose(?:_alert)?\(\s*\"(\w+)\"", SCRIPT.read_text()))
        assert {"write_failed", "queue_full", "not_acknowledged"} <= named
        assert named <= {cause for causes in traceleft.LOSS_CAUSES.values() for cause in causes}

    @pytest.mark.parametrize("address, message", [
        ("x", "invalid [HOST:]PORT value"), ("1:2:3", "invalid [HOST:]PORT value"), ("70000", "invalid [HOST:]PORT value")])
    def test_a_malformed_address(self, address, message):
        assert_one_line(run("trace", "open", "--metrics", address), 2, message)

    def test_a_taken_port_and_a_foreign_address(self):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            for address, message in ((taken.getsockname()[:2], "in use"), (("192.0.2.1", 1), "assign"), (("nope.invalid", 1), ""),
                                     (("a..b", 1), "no host's name")):
                with pytest.raises(traceleft.TraceleftError, match=f"cannot listen on {address[0]} port {address[1]}: .*{message}"):
                    traceleft.MetricsServer(address)

    @pytest.mark.parametrize("address, url, local", [
        (("127.0.0.1", 0), r"http://127\.0\.0\.1:\d+/metrics", True), (("::1", 0), r"http://\[::1\]:\d+/metrics", True),
        (("0.0.0.0", 0), r"http://0\.0\.0\.0:\d+/metrics", False)])
    def test_where_it_listens(self, address, url, local):
        server = traceleft.MetricsServer(address)
        assert re.fullmatch(url, server.url) and server.is_local == local
        server.close()


class TestMonitoring:
    """spec/monitoring, with Prometheus itself."""

    FOLDER = HERE / "spec/monitoring"

    def test_rules_are_valid(self):
        for what, name in (("rules", "alerts.yml"), ("config", "prometheus.yml")):
            done = subprocess.run(["promtool", "check", what, name], cwd=self.FOLDER, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr

    RULE_TEST = """
rule_files: [{folder}/alerts.yml]
evaluation_interval: 15s
tests:
  - interval: 15s
    input_series:
      - {{series: 'up{{job="traceleft",instance="down"}}', values: '1x4 0x40'}}
      - {{series: 'traceleft_filter_lost_events_total{{instance="a",filter="f",cause="queue_full"}}', values: '0x8 50x40'}}
      - {{series: 'traceleft_missed_total{{instance="a",cause="recursion_misses"}}', values: '0x8 3x40'}}
      - {{series: 'traceleft_channel_failures_total{{instance="a",channel="1",type="grpc"}}', values: '0+1x60'}}
      - {{series: 'traceleft_channel_queued{{instance="a",channel="1",type="grpc"}}', values: '9x60'}}
      - {{series: 'traceleft_ring_used_bytes{{instance="a",ring="events"}}', values: '60x60'}}
      - {{series: 'traceleft_ring_size_bytes{{instance="a",ring="events"}}', values: '100x60'}}
      - {{series: 'traceleft_filter_passed_events_total{{instance="a",filter="f",stream="security",group="g"}}', values: '0x8 1x40'}}
      - {{series: 'traceleft_filter_passed_events_total{{instance="a",filter="f",stream="other",group="g"}}', values: '0+9x40'}}
    promql_expr_test:
      - expr: count by (alertname) (ALERTS{{alertstate="firing"}})
        eval_time: 6m
        exp_samples: [{expected}]
"""

    def test_every_rule_fires_when_it_should(self, tmp_path):
        names = re.findall(r"alert: (\w+)", (self.FOLDER / "alerts.yml").read_text())
        assert len(names) >= 5
        expected = ", ".join(f"{{labels: '{{alertname=\"{name}\"}}', value: 1}}" for name in names)
        (tmp_path / "test.yml").write_text(self.RULE_TEST.format(folder=self.FOLDER, expected=expected))
        done = subprocess.run(["promtool", "test", "rules", tmp_path / "test.yml"], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    @live[0]
    @live[1]
    def test_prometheus_scrapes_a_run(self, programs, tmp_path):
        """Counts of a live run through Prometheus' API, and each query of the dashboard and of the rules."""
        n = 12_345
        spec = a_spec(f"filename == '{tmp_path}/f'", "frequency=100", id="opens", channel={"id": "1", "type": "file", "path": str(tmp_path / "log")})
        spec["events"].append({**spec["events"][0], "id": "in python", "rule": f"regex(filename, '^{tmp_path}/f$')"})
        with contextlib.ExitStack() as stack:
            agent = stack.enter_context(Agent("trace", "--spec", write_spec(tmp_path / "spec", spec), "--metrics", "0", "--summary", "-"))
            url = re.search(r"metrics: (http://(127\.0\.0\.1:\d+)/metrics)", "\n".join(agent.stderr))
            prometheus = stack.enter_context(Prometheus(tmp_path, url[2], self.FOLDER / "alerts.yml"))
            stats = traceleft.Libbpf().library.bpf_enable_stats(0)  # BPF_STATS_RUN_TIME, while the descriptor is open
            stack.callback(os.close, stats)
            subprocess.run([programs["opens"], tmp_path / "f", str(n)], check=True)
            matched = "traceleft_filter_matched_events_total"
            wait_until(lambda: prometheus.values(matched, "filter") == {"opens": n, "in python": n}, "Prometheus has seen all of them")
            assert prometheus.values("traceleft_filter_passed_events_total", "filter") == {"opens": n // 100, "in python": n // 100}
            assert prometheus.values("traceleft_build_info", "version") == {traceleft.VERSION: 1}
            assert prometheus.values("traceleft_filter_lost_events_total > 0", "cause") == {}
            wait_until(lambda: prometheus.values("traceleft_program_runs_total", "program").get("sys_exit", 0) >= n, "runs are counted")
            mean = prometheus.values("traceleft_program_run_seconds_total / traceleft_program_runs_total", "program")["sys_exit"]
            assert 1e-8 < mean < 1e-4
            assert prometheus.get("metadata")["traceleft_filter_lost_events"][0]["type"] == "counter"  # as OpenMetrics
            assert prometheus.get("targets")["activeTargets"][0]["lastError"] == ""
            assert len(prometheus.get("rules")["groups"][0]["rules"]) >= 5
            for query in self.queries():
                assert prometheus.query(query) is not None
            scraped = urllib.request.urlopen(url[1], timeout=DEADLINE).read().decode()
            assert subprocess.run(["promtool", "check", "metrics"], input=scraped, capture_output=True, text=True).stdout == ""
            code, output = agent.stop()
        assert code == 0 and [row["matched"] for row in json.loads(output)["filters"]] == [n, n]

    def queries(self):
        """The dashboard's, with Grafana's variables filled in; they name only metrics that there are."""
        dashboard = json.loads((self.FOLDER / "grafana-dashboard.json").read_text())
        queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
        assert len(queries) >= 8
        known = {name + traceleft.SUFFIXES[metric.kind] for name, metric in traceleft.METRICS.items()}
        rules = re.findall(r"expr: (.*)", (self.FOLDER / "alerts.yml").read_text())
        for query in [*queries, *rules]:
            assert set(re.findall(r"(?:traceleft|process)_\w+", query)) <= known
        return [query.replace("$__rate_interval", "1m").replace("$instance", ".*") for query in queries] + rules


class Prometheus:
    """Debian's, scraping one target each second; a context manager."""

    def __init__(self, folder, target, rules):
        (folder / "prometheus.yml").write_text(f"global: {{scrape_interval: 1s, evaluation_interval: 1s}}\nrule_files: [{rules}]\n"
                                               f"scrape_configs: [{{job_name: traceleft, static_configs: [{{targets: ['{target}']}}]}}]\n")
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        self.log = folder / "prometheus.log"
        self.process = subprocess.Popen(["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
                                         f"--web.listen-address={self.address}"], stdout=subprocess.DEVNULL, stderr=self.log.open("w"))

    def __enter__(self):
        def ready():
            assert self.process.poll() is None, self.log.read_text()
            with contextlib.suppress(OSError):
                return urllib.request.urlopen(f"http://{self.address}/-/ready", timeout=DEADLINE).status == 200
        try:
            wait_until(ready, "Prometheus is ready")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception):
        self.process.kill()
        self.process.wait()

    def get(self, path):
        answer = json.load(urllib.request.urlopen(f"http://{self.address}/api/v1/{path}", timeout=DEADLINE))
        assert answer["status"] == "success"
        return answer["data"]

    def query(self, text):
        return self.get("query?" + urllib.parse.urlencode({"query": text}))["result"]

    def values(self, text, label):
        """The value of each series, by one of its labels."""
        return {row["metric"].get(label, ""): float(row["value"][1]) for row in self.query(text)}


class Manager:
    """The receiving end of sd_notify(3); `environment` is what a service gets of it."""

    def __init__(self, address):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.settimeout(DEADLINE)
        self.socket.bind("\0" + address[1:] if address[0] == "@" else address)
        self.environment = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "30000000"}

    def receive(self):
        return dict(line.split("=", 1) for line in self.socket.recv(4096).decode().split("\n"))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.socket.close()


class TestServiceManager:
    @pytest.mark.parametrize("kind", ["path", "abstract"])
    @live[0]
    @live[1]
    def test_ready_alive_and_stopping(self, programs, tmp_path, kind):
        spec = a_spec(f"filename == '{tmp_path}/f'", channel={"id": "1", "type": "file", "path": str(tmp_path / "log")})
        with Manager(str(tmp_path / "notify") if kind == "path" else f"@traceleft-{os.getpid()}") as manager:
            with Agent("trace", "--spec", write_spec(tmp_path / "spec", spec), env=manager.environment) as agent:
                subprocess.run([programs["opens"], tmp_path / "f", "1000"], check=True)
                assert manager.receive() == {"READY": "1", "STATUS": "matched 0, passed 0, alerts 0, lost 0"}
                alive = manager.receive()
                while alive["STATUS"] == "matched 0, passed 0, alerts 0, lost 0":
                    assert alive["WATCHDOG"] == "1"
                    alive = manager.receive()
                assert re.fullmatch(r"matched \d+, passed \d+, alerts [12], lost 0", alive["STATUS"])
                agent.stop()
            last = manager.receive()
            while last.get("WATCHDOG"):
                last = manager.receive()
            assert last == {"STOPPING": "1"}

    @live[0]
    @live[1]
    def test_printing_and_collecting(self, tmp_path):
        with Manager(str(tmp_path / "notify")) as manager:
            for arguments in (("trace", "mkdir"), ("collect", "--listen", "127.0.0.1:0")):
                with Agent(*arguments, env=manager.environment) as agent:
                    assert manager.receive()["READY"] == "1"
                    agent.stop()
                while select.select([manager.socket], [], [], 0)[0]:
                    manager.receive()

    @pytest.mark.parametrize("address", ["", "/nonexistent/notify", "@nobody-listens", "vsock:2:1234"])
    def test_without_a_manager(self, monkeypatch, capsys, address):
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        manager = traceleft.ServiceManager()
        manager.send("READY=1")
        manager.close()
        assert "NOTIFY_SOCKET" not in os.environ
        assert ("only unix sockets are known" in capsys.readouterr().err) == address.startswith("vsock")

    def test_a_manager_that_does_not_read_is_not_waited_for(self, monkeypatch, tmp_path):
        with Manager(str(tmp_path / "notify")) as manager:
            monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
            sender = traceleft.ServiceManager()
            for _ in range(10_000):
                sender.send("WATCHDOG=1", "STATUS=\udcff")
            sender.close()
            assert manager.receive() == {"WATCHDOG": "1", "STATUS": "\\udcff"}

    @pytest.mark.parametrize("microseconds, warns", [("1000000", True), ("30000000", False), ("x", False)])
    def test_a_watchdog_that_is_too_fast(self, monkeypatch, capsys, microseconds, warns):
        monkeypatch.setenv("NOTIFY_SOCKET", "@nobody-listens")
        monkeypatch.setenv("WATCHDOG_USEC", microseconds)
        traceleft.ServiceManager().close()
        assert ("WatchdogSec= is less than 2 s" in capsys.readouterr().err) == warns


@pytest.fixture(scope="session")
def installed(tmp_path_factory):
    """What `make install` makes in a DESTDIR of its own."""
    folder = tmp_path_factory.mktemp("destination")
    make("install", DESTDIR=folder, PREFIX="/usr")
    return folder


def make(target, **variables):
    subprocess.run(["make", "-C", HERE, target, *(f"{name}={value}" for name, value in variables.items())], check=True,
                   capture_output=True, timeout=4 * DEADLINE)


class TestInstall:
    def files(self, folder):
        return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}

    def test_puts_everything_in_its_place(self, installed):
        files = self.files(installed)
        assert {"usr/bin/traceleft", "usr/share/man/man8/traceleft.8", "usr/lib/systemd/system/traceleft.service",
                "usr/share/bash-completion/completions/traceleft", "usr/share/zsh/site-functions/_traceleft",
                "usr/share/fish/vendor_completions.d/traceleft.fish", "etc/logrotate.d/traceleft", "etc/traceleft/spec.json",
                "usr/share/doc/traceleft/examples/monitoring/alerts.yml"} <= files
        assert all((installed / name).stat().st_size for name in files)
        done = subprocess.run([installed / "usr/bin/traceleft", "check", installed / "etc/traceleft/spec.json"], capture_output=True, text=True)
        assert done.stdout == f"{installed}/etc/traceleft/spec.json: ok\n" and done.stderr == ""
        unit = (installed / "usr/lib/systemd/system/traceleft.service").read_text()
        assert "ExecStart=/usr/bin/traceleft trace --spec /etc/traceleft/spec.json" in unit

    def test_elsewhere_and_beside_an_edited_spec(self, tmp_path):
        spec = tmp_path / "opt/etc/traceleft/spec.json"
        spec.parent.mkdir(parents=True)
        write_spec(spec, a_spec())
        options = {"DESTDIR": tmp_path, "PREFIX": "/opt/x", "SYSCONFDIR": "/opt/etc"}
        make("install", **options)
        assert "ExecStart=/opt/x/bin/traceleft trace --spec /opt/etc/traceleft/spec.json" in (
            tmp_path / "opt/x/lib/systemd/system/traceleft.service").read_text()
        make("uninstall", **options)
        assert self.files(tmp_path) == {"opt/etc/traceleft/spec.json"} and json.loads(spec.read_text()) == a_spec()

    def test_uninstall_leaves_nothing(self, installed, tmp_path):
        shutil.copytree(installed, tmp_path / "copy")
        make("uninstall", DESTDIR=tmp_path / "copy", PREFIX="/usr")
        assert self.files(tmp_path) == set()

    def test_the_unit_is_valid_and_hardened(self, installed, tmp_path):
        unit = (installed / "usr/lib/systemd/system/traceleft.service").read_text()
        path = tmp_path / "traceleft.service"
        path.write_text(unit.replace("/usr/bin/traceleft", str(installed / "usr/bin/traceleft")).replace("Documentation=", "#"))
        done = subprocess.run(["systemd-analyze", "verify", path], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        done = subprocess.run(["systemd-analyze", "security", "--offline=true", "--no-pager", "--threshold=30", path], capture_output=True, text=True)
        assert done.returncode == 0 and re.search(r"Overall exposure level for traceleft.service: [0-2]\.\d OK", done.stdout)

    @live[0]
    @live[1]
    def test_logrotate(self, programs, tmp_path):
        """The configuration as it is, but for its paths and for whom the signal reaches."""
        spec = a_spec(f"filename == '{tmp_path}/f'", channel={"id": "1", "type": "file", "path": str(tmp_path / "log.json")})
        text = (HERE / "spec/service/traceleft.logrotate").read_text()
        with Agent("trace", "--spec", write_spec(tmp_path / "spec", spec)) as agent:
            text = text.replace("/var/log/traceleft", str(tmp_path)).replace(
                "systemctl kill --kill-who=main --signal=USR1 traceleft.service", f"kill -USR1 {agent.process.pid}")
            (tmp_path / "logrotate").write_text(text)
            for _ in range(3):
                subprocess.run([programs["opens"], tmp_path / "f", "100"], check=True)
                wait_until(lambda: (tmp_path / "log.json").exists() and (tmp_path / "log.json").stat().st_size, "an alert is written")
                subprocess.run(["logrotate", "-f", "-s", tmp_path / "state", tmp_path / "logrotate"], check=True)
            agent.stop()
        files = sorted(path.name for path in tmp_path.glob("log.json*"))
        assert files[-3:] == ["log.json.1", "log.json.2.gz", "log.json.3.gz"]
        count = 0
        for name in files:
            content = subprocess.run(["gzip", "-dcf", tmp_path / name], capture_output=True, text=True, check=True).stdout
            count += sum(json.loads(line)["count"] for line in content.splitlines())
        assert count == 300


class TestCollector:
    def test_counts_per_event_and_host(self, tmp_path):
        with Agent("collect", "--listen", "localhost:0") as agent:
            port = agent.stderr[-1].rpartition(":")[2]
            spec = grpc_spec(port)
            spec["events"].append({**spec["events"][0], "name": "close"})
            aggregator = Aggregator(spec, insecure=True)
            for second in range(2):
                for _ in range(5):
                    aggregator.add(an_open())
                aggregator.add(make_event("close", 1))
                aggregator.tick(float(second))
            aggregator.close()
            assert aggregator.accounts["open-0"].delivered == 10
            time.sleep(1.2)
            code, output = agent.stop()
        host = socket.gethostname()
        lines = output.splitlines()
        assert code == 0 and lines[-1] == "total 12 in 4 alerts from 1 host(s)"
        assert re.fullmatch(rf"host {host} event close count 2 rate \d+/s total 2 alerts 2", lines[-3])
        assert re.fullmatch(rf"host {host} event open count 10 rate \d+/s total 10 alerts 2", lines[-2])

    def test_what_is_sent_again_counts_once(self, generated):
        """The acknowledgement is lost: a proxy of our own forwards the stream and then aborts."""
        collector = traceleft.Collector("127.0.0.1:0")
        messages, services = generated
        failures = [1]

        class Proxy(services.MetricCollectorServicer):
            def Process(self, stream, context):
                with grpc.insecure_channel(f"127.0.0.1:{collector.port}") as channel:
                    answer = services.MetricCollectorStub(channel).Process(iter(list(stream)))
                if failures:
                    failures.pop()
                    context.abort(grpc.StatusCode.UNAVAILABLE, "the answer got lost")
                return answer

        server = grpc.server(futures.ThreadPoolExecutor(2))
        services.add_MetricCollectorServicer_to_server(Proxy(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            aggregator = Aggregator(grpc_spec(port), insecure=True)
            for second in range(3):
                aggregator.add(an_open())
                aggregator.tick(float(second))
            aggregator.close()
            assert not failures and aggregator.accounts["open-0"].delivered == 3
            assert list(collector.snapshot().values()) == [(3, 3)]
        finally:
            server.stop(None).wait()
            collector.stop()

    def test_json_has_all_of_an_alert(self, generated):
        """Of agents as they are, of those that know the first contract alone, and of those that send what is no time."""
        messages, services = generated
        with Agent("collect", "--listen", "localhost:0", "--json") as agent:
            port = agent.stderr[-1].rpartition(":")[2]
            spec = grpc_spec(port)
            spec["events"][0]["output"] = {"metrics": "top_per_sec", "parameters": "k=1;by=comm,uid", "format": "collector_spec_pb"}
            aggregator = Aggregator(spec, insecure=True)
            for comm in ("a", "a", "b"):
                aggregator.add(an_open(comm=comm, pid=4242, ret=3))
            aggregator.flush(1.5)
            aggregator.close()
            with grpc.insecure_channel(f"localhost:{port}") as channel:
                services.MetricCollectorStub(channel).Process(iter([messages.Metric(Count=2), messages.Metric(Time=float("nan"), Host="x\n")]))
            code, output = agent.stop()
        first, old, strange = map(json.loads, output.splitlines())
        assert first == {
            "time": "1970-01-01T00:00:01.500Z", "agent": aggregator.channels["1"].agent, "sequence": 1, "host": socket.gethostname(),
            "filter": "open-0", "event": "open", "stream": "s", "group": "g", "metrics": "top_per_sec", "count": 3, "matched": 3, "lost": 0,
            "sample": 'pid 4242 a ret 3 filename "/tmp/a.txt" flags 577 mode 438', "kinds": [{"comm": "a", "uid": 0, "count": 2}], "other": 1}
        assert (old["count"], old["agent"], old["sequence"], old["time"]) == (2, "", 0, "1970-01-01T00:00:00.000Z")
        assert (strange["time"], strange["host"]) == ("", "x\n")
        assert code == 0 and agent.stderr[-1] == "total 5 in 3 alerts from 3 host(s)"

    def test_what_cannot_be_shown_is_not_acknowledged(self, generated):
        """Nobody reads a pipe, which is full then, and closes it."""
        messages, services = generated
        with Agent("collect", "--listen", "localhost:0", "--json") as agent:
            with grpc.insecure_channel(f"localhost:{agent.stderr[-1].rpartition(':')[2]}") as channel:
                call = services.MetricCollectorStub(channel).Process.future(iter([messages.Metric(Group="x" * 1000)] * 1000))
                wait_until(lambda: select.select([agent.process.stdout], [], [], 0)[0], "something was written")
                assert not call.done()
                agent.process.stdout.close()
                agent.process.stdout = None
                assert call.code() == grpc.StatusCode.UNAVAILABLE and call.details() == "the collector cannot write what it receives"
            assert agent.process.wait(DEADLINE) == 1

    def test_tls_client_certificates_and_a_token(self, certificates, tmp_path):
        (tmp_path / "token").write_text("secret")
        (tmp_path / "wrong").write_text("guess")
        files = [f"--{name}={certificates}/{path}" for name, path in (
            ("cert", "server.pem"), ("key", "server.key"), ("client-ca", "ca.pem"))]
        whole = {"tls": {"ca": f"{certificates}/ca.pem", "cert": f"{certificates}/client.pem", "key": f"{certificates}/client.key"},
                 "token_file": f"{tmp_path}/token"}
        with Agent("collect", "--listen", "localhost:0", *files, f"--token-file={tmp_path}/token") as agent:
            port = agent.stderr[-1].rpartition(":")[2]
            delivered = []
            for options in (whole, {**whole, "token_file": f"{tmp_path}/wrong"}, {"tls": {"ca": f"{certificates}/ca.pem"}}):
                aggregator = Aggregator(grpc_spec(port, options))
                aggregator.add(an_open())
                aggregator.flush(1.0)
                channel = aggregator.channels["1"]
                wait_until(lambda: channel.sends or channel.failures, "an outcome")  # noqa: B023
                channel.deadline = time.monotonic()
                aggregator.close()
                delivered.append(aggregator.accounts["open-0"].delivered)
            code, output = agent.stop()
        assert delivered == [1, 0, 0]
        assert (code, output.splitlines()[-1]) == (0, "total 1 in 1 alerts from 1 host(s)")

    @pytest.mark.parametrize("options, message", [
        (["--cert=server.pem"], "--cert and --key belong together"),
        (["--token-file=server.key"], "--client-ca and --token-file need TLS"),
        (["--cert=server.pem", "--key=client.key"], "KEY_VALUES_MISMATCH"),
        (["--cert=server.pem", "--key=gone"], "cannot use gone: No such file"),
    ])
    def test_options_that_do_not_go_together(self, certificates, options, message):
        assert_one_line(run("collect", *options, cwd=certificates), 2, message)

    def test_doubles_are_known_of_many_agents_and_after_others(self, monkeypatch):
        monkeypatch.setattr(traceleft, "MAX_RECEIVED_AGENTS", 3)
        collector = traceleft.Collector("127.0.0.1:0")
        try:
            assert [collector.is_double(*sent) for sent in (("a", 1), ("a", 2), ("b", 1), ("a", 1), ("a", 2), ("b", 2), ("", 0), ("", 0))
                    ] == [False, False, False, True, True, False, False, False]
            for number in range(10):
                collector.is_double(str(number), 1)
            assert len(collector.latest) == 3 and collector.is_double("9", 1)
        finally:
            collector.stop()

    def test_hostile_senders_are_bounded(self, generated, monkeypatch):
        for name, value in (("MAX_RECEIVED_ROWS", 3), ("MAX_RECEIVED_STREAM", 2000), ("MAX_STREAM_TIME", 0.2)):
            monkeypatch.setattr(traceleft, name, value)
        messages, services = generated
        collector = traceleft.Collector("127.0.0.1:0")
        try:
            with grpc.insecure_channel(f"127.0.0.1:{collector.port}") as channel:
                stub = services.MetricCollectorStub(channel)
                stub.Process(iter([messages.Metric(Host=f"{number}" + "x" * 300, Count=1) for number in range(5)]))
                rows = collector.snapshot()
                assert len(rows) == 4 and rows["other", "other"] == (2, 2) and all(len(host) <= 256 for host, _ in rows)
                with pytest.raises(grpc.RpcError, match="at most 2000 bytes"):
                    stub.Process(itertools.repeat(messages.Metric(Host="x" * 500), 10_000))
                endless = threading.Event()
                call = stub.Process.future(iter(lambda: endless.wait(DEADLINE) and None or messages.Metric(), 1))
                wait_until(lambda: collector.streams, "a stream that does not end")
                wait_until(lambda: collector.cancel_stalled() or call.done(), "its end")
                assert call.code() == grpc.StatusCode.CANCELLED
                wait_until(lambda: not collector.streams, "its thread is free")
                endless.set()
        finally:
            collector.stop()

    def test_names_cannot_forge_lines(self, generated):
        messages, services = generated
        with Agent("collect", "--listen", "127.0.0.1:0") as agent:
            with grpc.insecure_channel(f"127.0.0.1:{agent.stderr[-1].rpartition(':')[2]}") as channel:
                common = messages.ProtobufCommonEvent(Name="open\r\n\x1b]0;x\x07")
                services.MetricCollectorStub(channel).Process(iter([messages.Metric(
                    Host='h"\ntotal 9 in 9\u202e\x1b[2J', CommonEvent=common, Count=1)]))
            time.sleep(1.1)
            _, output = agent.stop()
        assert output.splitlines()[-1] == "total 1 in 1 alerts from 1 host(s)"
        assert not set(output) & set("\x1b\x07\r\u202e") and len([line for line in output.splitlines() if line.startswith("total")]) == 1

    def test_a_taken_port_is_one_clear_line(self):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            done = run("collect", "--listen", f"127.0.0.1:{taken.getsockname()[1]}")
        assert done.returncode == 1
        assert_one_line(done, 1, "cannot listen on 127.0.0.1")

    def test_a_malformed_address(self):
        done = run("collect", "--listen", "nowhere")
        assert done.returncode == 2
        assert done.stderr.startswith("traceleft: --listen: expected HOST:PORT")


class TestEstimate:
    def found(self, events=1000, matched=10, passed=0, alerts=0, peak=10, groups=None, reasons=(), **spec):
        account = traceleft.Account("f", "open")
        account.matched, account.passed, account.alerts = matched, passed, alerts
        (member,) = parse_spec(a_spec(**{"rule": "uid == 0", **spec})).filters
        return traceleft.FilterEstimate(member, events, account, peak, groups, 16384, None, reasons)

    @pytest.mark.parametrize("figures, warnings", [
        ({"passed": 10}, []), ({"events": 0, "matched": 0}, ["no open event came"]),
        ({"matched": 0}, ["the rule matched none of 1000 events"]),
        ({"events": 10, "passed": 10}, ["the rule matched every one of 10 events"]),
        ({"events": 10, "passed": 10, "rule": ""}, []),
        ({"parameters": "threshold=10"}, ["threshold=10 held back everything: no second had more than 10 matching events"]),
        ({"passed": 1, "parameters": "threshold=9"}, []),
        ({"parameters": "threshold=9;by=pid"}, ["sigma let none of 10 matching events through"]),
        ({"parameters": "frequency=11"}, ["frequency=11 let nothing through: only 10 events matched"]),
        ({"passed": 10, "parameters": "by=uid", "groups": 16384}, ["by: 16384 groups are as many as there can be; all later ones "
                                                                   "are counted as one"]),
        ({"passed": 10, "reasons": ("regex()", "regex()")}, ["the rule needs Python, for regex(): what the kernel cannot rule out "
                                                             "crosses the ring buffer"]),
    ])
    def test_warnings(self, figures, warnings):
        assert list(self.found(**figures).warnings()) == warnings

    def test_columns(self):
        assert self.found(events=3000, matched=30, passed=3, alerts=2, groups=7).columns(2.0, 2) == [
            "open-0", "open", "1500", "15", "1%", "1.5", "1", "7", "-"]

    @pytest.mark.parametrize("count, shown", [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (23_456_789, "23.5 MB"), (4e15, "4e+03 TB")])
    def test_bytes(self, count, shown):
        assert traceleft.format_bytes(count) == shown

    def run_during(self, dry_run, command):
        """A dry run that is stopped when a command has come to its end."""
        def work():
            wait_until(lambda: dry_run.tracer.links, "it has attached")
            subprocess.run(command, check=True)
            stop.stopped = True
        with traceleft.StopSignals() as stop, futures.ThreadPoolExecutor(1) as pool:
            done = pool.submit(work)
            dry_run.run(DEADLINE, stop)
            done.result(DEADLINE)

    @live[0]
    @live[1]
    def test_of_a_live_host(self, programs, tmp_path, generated):
        """Exact counts; and weights that are those of what would have been sent, of which nothing is."""
        n, path = 20_000, f"{tmp_path}/f"
        spec = a_spec(channel={"id": "1", "type": "file", "path": str(tmp_path / "log")})
        spec["channels"] += [{"id": "2", "type": "grpc", "path": "localhost:1"}, {"id": "3", "type": "grpc", "path": "localhost:1", "format": "otlp"}]
        spec["events"] = [{**spec["events"][0], "id": name, "rule": rule, "function": {"id": "sigma", "parameters": parameters}, **more}
                          for name, rule, parameters, more in (
                              ("kernel", f"filename == '{path}'", "frequency=100", {}), ("grouped", f"filename == '{path}'", "by=ret,uid", {}),
                              ("python", f"regex(filename, '^{path}$')", "by=filename", {}), ("none", f"filename == '{path}x'", "", {}),
                              ("over grpc", f"filename == '{path}'", "", {"channel": "2", "output": {"metrics": "alerts_per_sec", "format": "collector_spec_pb"}}),
                              ("as otlp", f"filename == '{path}'", "", {"channel": "3", "output": {"metrics": "alerts_per_sec", "format": "otlp"}}))]
        estimate = traceleft.Estimate(parse_spec(spec))
        self.run_during(estimate.counting, [programs["opens"], path, str(n)])
        self.run_during(estimate.timing, [programs["opens"], path, "1000"])
        found = {row.spec.id: row for row in estimate.filters()}
        assert {name: row.account.matched for name, row in found.items()} == {**dict.fromkeys(found, n), "none": 0}
        assert found["kernel"].account.passed == n // 100 and found["kernel"].events >= n
        assert {name: row.groups for name, row in found.items()} == {**dict.fromkeys(found), "grouped": 1, "python": 1}
        assert all(10 < row.added_ns < 100_000 for row in found.values())
        assert found["kernel"].peak <= n
        lines = list(estimate.report())
        assert lines[1].split() == list(traceleft.ESTIMATE_COLUMNS) and "kernel: sys_exit runs" in "\n".join(lines)
        for name, least in (("1", 300), ("2", 100), ("3", 400)):  # a JSON object; a Metric; metrics and a log record
            scale = estimate.scales[name]
            assert scale.records >= 1 and least < scale.bytes / scale.records < 5000
        assert "warning: none: the rule matched none of" in "\n".join(lines)
        assert not (tmp_path / "log").exists()

    @live[0]
    @live[1]
    def test_command(self, tmp_path):
        spec = write_spec(tmp_path / "spec", a_spec("comm == 'no such'", channel={"id": "1", "type": "file", "path": str(tmp_path / "log")}))
        done = run("explain", spec, "--estimate", "0.3")
        assert done.returncode == 0 and done.stdout.startswith("open-0: event open, channel 1\n")
        assert re.search(r"\nin 0\.\d s on this host, with nothing sent:\nFILTER  EVENT +EVENTS/S.*\nopen-0  open .*\n"
                         r"channel 1: about 0 B a day, in 0 records\n", done.stdout)
        assert {path.name for path in tmp_path.iterdir()} == {"spec"}

    def test_a_malformed_time(self):
        assert_one_line(run("explain", "x", "--estimate", "-1"), 2, "number of seconds above 0")


@pytest.fixture(scope="session")
def scripts(tmp_path_factory):
    """A folder with the completion scripts, _SHELL, and a file whose name has a space."""
    folder = tmp_path_factory.mktemp("completion")
    (folder / "spec one.json").touch()
    for shell in traceleft.COMPLETIONS:
        (folder / f"_{shell}").write_text(run("completion", shell).stdout)
    return folder


def tallies(*rows, received=0.0):
    """Tallies of (host, filter, count, lost)."""
    return [traceleft.Tally(host, "open", name, count, count, lost, received, 1, traceleft.escape(f"pid 1 {host} {name}"))
            for host, name, count, lost in rows]


class TestScreen:
    def view(self, *seconds, **more):
        view = traceleft.CollectorView("localhost:1", **more)
        for second, rows in enumerate(seconds):
            view.update(tallies(*rows, received=view.begin + second), view.begin + second)
        return view

    def lines(self, view, width=100, height=20):
        return [line.text for line in view.render(width, height)]

    def test_what_it_shows(self):
        rows = [("web", "keys", 100, 0), ("db", "keys", 30, 2), ("web", "logs", 5, 0)]
        lines = self.lines(self.view(rows, [(host, name, 2 * count, lost) for host, name, count, lost in rows]))
        assert lines[0].rstrip() == "traceleft collect on localhost:1: 2 hosts, 3 filters, up 1s"
        assert lines[1].startswith("135 events/s, 270 in 270 alerts, 2 lost ")
        assert lines[2].split() == ["HOST", "FILTER", "EVENT", "EVENTS/S", "LAST", "3", "MINUTES", "TOTAL", "ALERTS", "LOST", "AGO"]
        assert [line.split() for line in lines[3:6]] == [
            ["web", "keys", "open", "100", "█", "200", "200", "0", "0s"], ["db", "keys", "open", "30", "█", "60", "60", "2", "0s"],
            ["web", "logs", "open", "5", "█", "10", "10", "0", "0s"]]
        assert not any(line.strip() for line in lines[6:17])
        assert lines[17].startswith("latest sample of keys on web, 0s ago, one of 1:") and lines[18].strip() == "pid 1 web keys"
        assert lines[19].startswith("q quit  s sort: rate  r reverse")

    def test_rates_follow_the_time_that_has_passed(self):
        view = traceleft.CollectorView("h:1")
        for second in (1, 3, 5, 7, 9, 11):
            view.update(tallies(("a", "f", 50 * second, 0)), view.begin + second - 1)
        assert view.rows["a", "open", "f"].rate == 50.0

    def test_keys(self):
        view = self.view([("a", "x", 1, 9), ("b", "y", 3, 0), ("c", "z", 2, 0)])

        def order(*keys):
            for key in keys:
                view.press(key)
            return "".join(line[0] for line in self.lines(view)[3:6])

        assert order() == "bca" and order(b"r") == "acb" and order(b"r") == "bca"
        orders = {}
        for _ in traceleft.SORTS:
            orders[view.sort] = order()
            view.press(b"s")
        assert orders == {"rate": "bca", "total": "bca", "alerts": "bca", "lost": "abc", "latest": "abc", "host": "abc", "filter": "abc"}
        for keys, selected in (((b"j",), "b"), ((b"\x1b[B", b"\x1bOB"), "a"), ((b"j",), "a"), ((b"k", b"\x1b[A"), "b"), ((b"\x1b[5~",), "b"),
                               ((b"\x1b[6~",), "a"), ((b"\x1b",), None), ((b"k",), "a"), ((b"\x1b[H", b"x", b"\0"), "a")):
            for key in keys:
                view.press(key)
            assert (view.selected[0] if view.selected else None) == selected
        assert self.lines(view)[18].strip() == "pid 1 a x"
        assert [line.style for line in view.render(100, 20)][3:6] == [traceleft.PLAIN, traceleft.PLAIN, traceleft.SELECTED]
        assert not view.quit
        view.press(b"q")
        assert view.quit

    def test_the_selected_row_is_in_sight(self):
        view = self.view([(f"h{n:03}", "f", 1, 0) for n in range(100)])
        for _ in range(60):
            view.press(b"j")
        assert any(line.startswith("h059") for line in self.lines(view))
        view.update([*tallies(("h000", "f", 1000, 0))], view.now + 1)  # it is another one's turn to be first
        assert any(line.startswith("h059") for line in self.lines(view, height=12)) and view.selected[0] == "h059"

    @pytest.mark.parametrize("width", [1, 5, 19, 20, 33, 47, 60, 80, 100, 237])
    @pytest.mark.parametrize("height", [1, 4, 5, 9, 10, 24, 60])
    def test_every_size(self, width, height):
        rows = [("h\x1b[2J\n世界\u202e" + "x" * 300, "é\u0301\udcff" * 99, 10**15, 10**12), ("b", "", 0, 0)]
        for view in (self.view(), self.view(rows), self.view(*[rows] * 200)):
            view.messages.extend(["m" * width * 2] * (height % 2))
            lines = self.lines(view, width, height)
            assert len(lines) == height
            for line in lines:
                assert sum(map(traceleft.cell_width, line)) == width
                assert "\x1b" not in line and "\n" not in line and "\u202e" not in line

    def test_messages_are_shown(self):
        view = self.view()
        view.messages.append("something failed")
        assert self.lines(view)[-1].startswith("something failed")

    @pytest.mark.parametrize("values, width, shown", [
        ([], 4, "    "), ([0, 0], 180, " " * 180), ([1, 2, 4, 8], 180, " " * 176 + "▁▂▄█"), ([5] * 180, 3, "███"),
        ([0] * 60 + [4] * 60 + [8] * 60, 3, " ▄█"), ([7], 0, ""), ([1, 1e9], 180, " " * 178 + "▁█"),
    ])
    def test_sparklines(self, values, width, shown):
        assert traceleft.sparkline(values, width) == shown

    def test_bars_stand_still_until_they_move_on(self):
        history = traceleft.collections.deque(maxlen=traceleft.HISTORY_SECONDS)
        seen = []
        for tick in range(1, 400):
            history.append(1000 if tick == 100 else 500 if 110 < tick <= 120 else 0)
            seen.append(traceleft.sparkline(history, 18, ticks=tick).rstrip())
        assert len(set(seen)) < 60  # 40 places, and the bar that is filling
        assert traceleft.sparkline([0, 4, 8], 180, traceleft.ASCII_BARS).strip() == "=%"

    @pytest.mark.parametrize("value, width, shown", [(0, 4, "0"), (1234567, 9, "1,234,567"), (1234567, 8, "1.2M"), (999, 3, "999"),
                                                     (12345, 5, "12.3k"), (5e15, 6, "5.0P")])
    def test_numbers(self, value, width, shown):
        assert traceleft.short_number(value, width) == shown

    def test_ages(self):
        assert [traceleft.short_age(seconds) for seconds in (0, 59.9, 60, 3599, 3600, 86400, 864000)] == [
            "0s", "59s", "1m", "59m", "1h", "1d", "10d"]

    @pytest.mark.parametrize("event, shown", [
        (an_open("/tmp/\x1b\n\udcff", ret=3, pid=7, comm="c"), 'pid 7 c ret 3 filename "/tmp/\\x1b\\n\\xff" flags 577 mode 438'),
        (make_event("connect_v4", "10.0.0.1", "127.0.0.1", 5, 6, 7), "pid 1 ret 0 Saddr 10.0.0.1 Daddr 127.0.0.1 Sport 5 Dport 6 Netns 7"),
        (make_event("connect_v6", "::1", "::2", 5, 6, 7), "pid 1 ret 0 Saddr ::1 Daddr ::2 Sport 5 Dport 6 Netns 7"),
        (make_event("prctl", 15, 2, 3, 4, 5, ret=-1), "pid 1 ret -1 option 15 arg2 2 arg3 3 arg4 4 arg5 5"),
        (make_event("mkdirat", -100, "d" * 9999, 1), 'pid 1 ret 0 dfd -100 pathname "' + "d" * 469),
        (None, "none: there was no room for it"),
    ])
    def test_samples(self, event, shown):
        spec = parse_spec(grpc_spec(1, name=event.name if event else "open")).filters[0]
        wire = traceleft.build_wire()
        data = traceleft.encode_metric(wire, traceleft.Alert(spec, 1.5, 1, 1, 0, event), "a", 1)
        assert traceleft.format_metric(wire["Metric"].FromString(data)) == shown


class Tmux:
    """A shell in a terminal of 100 x 24 under tmux; a context manager that ends it."""

    def __init__(self, folder):
        self.socket = str(folder / "tmux")
        self.asked = 0
        self.run("-u", "-f", "/dev/null", "new-session", "-d", "-x", "100", "-y", "24", "env", "-i", f"PATH={os.environ['PATH']}",
                 "TERM=screen", "LC_ALL=C.UTF-8", "PS1=$ ", "bash", "--norc", "--noediting")
        self.run("set", "-g", "status", "off")
        wait_until(lambda: self.screen.startswith("$"), "a prompt")

    def run(self, *arguments):
        return subprocess.run(["tmux", "-S", self.socket, *arguments], check=True, capture_output=True, text=True, timeout=DEADLINE).stdout

    def keys(self, *keys):
        self.run("send-keys", *keys)

    def type(self, command):
        self.run("send-keys", "-l", command)
        self.keys("Enter")

    @property
    def screen(self):
        return self.run("capture-pane", "-p")

    @property
    def modes(self):
        """What a program can leave wrong: alternate screen, cursor, wrapping; and what stty says."""
        self.asked += 1
        self.type(f"clear; echo mo'des'{self.asked} $(stty -g)")
        found = re.search(rf"^modes{self.asked} ([0-9a-f:]+)$", self.wait(rf"^modes{self.asked} [0-9a-f:]+$"), re.M)
        return self.run("display-message", "-p", "#{alternate_on} #{cursor_flag} #{wrap_flag}").strip(), found[1]

    def wait(self, pattern):
        """The screen, once there is a match in it."""
        with contextlib.suppress(AssertionError):
            wait_until(lambda: re.search(pattern, self.screen, re.M), pattern)
        screen = self.screen
        assert re.search(pattern, screen, re.M), screen
        return screen

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.run("kill-server")


class TestScreenInTerminal:
    COLLECT = f"{sys.executable} {SCRIPT} collect --listen 127.0.0.1:0"

    @pytest.fixture
    def tmux(self, tmp_path):
        with Tmux(tmp_path) as tmux:
            yield tmux

    def start(self, tmux, command=COLLECT):
        """Starts a collector; returns its port."""
        tmux.type(command)
        return re.search(r"collect on 127.0.0.1:(\d+): 0 hosts", tmux.wait("collect on .*: 0 hosts"))[1]

    def pid(self, tmux):
        """Of what runs in the foreground."""
        shell = int(tmux.run("display-message", "-p", "#{pane_pid}"))
        return int(Path(f"/proc/{shell}/task/{shell}/children").read_text().split()[0])

    def feed(self, port, monkeypatch):
        for host in ("web", "db"):
            monkeypatch.setattr(traceleft, "HOSTNAME", host)
            aggregator = Aggregator(grpc_spec(port, id="keys"), insecure=True)
            for _ in range(3 if host == "db" else 4):
                aggregator.add(an_open(f"/home/{host}/.ssh/id_rsa", pid=42, comm="cat"))
            if host == "db":
                aggregator.accounts["keys"].lose("queue_full", 2)
            aggregator.tick(1.0)
            aggregator.close()

    def test_screen(self, tmux, monkeypatch):
        before = tmux.modes
        port = self.start(tmux)
        self.feed(port, monkeypatch)
        screen = tmux.wait("2 hosts, 2 filters").splitlines()
        assert re.match(r"\d events/s, 7 in 2 alerts, 2 lost", screen[1])
        assert screen[2].startswith("HOST ") and screen[2].endswith(" AGO")
        assert [line.split()[:3] for line in screen[3:5]] == [["web", "keys", "open"], ["db", "keys", "open"]]
        assert "latest sample of keys on db" in screen[21] and '"/home/db/.ssh/id_rsa"' in screen[22]
        tmux.keys("r")
        tmux.wait(r"sort: rate, reversed")
        assert [line.split()[0] for line in tmux.screen.splitlines()[3:5]] == ["db", "web"]
        tmux.keys("j", "j")
        tmux.wait(r"latest sample of keys on web")
        tmux.run("resize-window", "-x", "60", "-y", "12")
        screen = tmux.wait(r"^HOST +FILTER +EVENTS/S .* LOST$").splitlines()
        assert len(screen) == 12 and screen[11].startswith("q quit")
        tmux.run("resize-window", "-x", "120", "-y", "30")
        assert len(tmux.wait(r"^HOST .{112}AGO$").rstrip("\n").splitlines()) == 30
        tmux.keys("q")
        tmux.wait(r"^total 7 in 2 alerts from 2 host\(s\)$")
        assert "host db event open total 3 alerts 1" in tmux.screen
        assert tmux.modes == before

    @pytest.mark.parametrize("end, shown", [("C-c", "^total 0"), ("TERM", "^total 0"), (r"C-\\", "^total 0"), ("q", "^total 0"),
                                            ("TERM after a Ctrl-S", "^total 0"),
                                            ("exception", "^ZeroDivisionError")])
    def test_the_terminal_is_left_as_it_was(self, tmux, end, shown):
        before = tmux.modes
        if end == "exception":
            code = (f"import sys, shutil; sys.path.insert(0, '{HERE}'); import traceleft; "
                    "shutil.get_terminal_size = lambda: 1 / 0; traceleft.main(['collect', '--listen', '127.0.0.1:0'])")
            tmux.type(f'{sys.executable} -c "{code}"')
        else:
            self.start(tmux)
            if end.startswith("TERM"):
                if end.endswith("S"):
                    tmux.keys("C-s", "s")
                    tmux.wait("sort: total")
                os.kill(self.pid(tmux), signal.SIGTERM)
            else:
                tmux.keys(end.replace("\\\\", "\\"))
        tmux.wait(shown)
        assert tmux.modes == before

    def test_suspended_and_continued(self, tmux, monkeypatch):
        before = tmux.modes
        port = self.start(tmux)
        tmux.keys("C-z")
        tmux.wait(r"Stopped")
        assert tmux.modes == before
        tmux.type("fg")
        tmux.wait("collect on .*: 0 hosts")
        self.feed(port, monkeypatch)
        tmux.wait("2 hosts, 2 filters")
        tmux.keys("s")  # keys are still taken at once
        tmux.wait("sort: total")
        os.kill(self.pid(tmux), signal.SIGSTOP)  # nobody can do anything about that one
        tmux.wait("Stopped")
        tmux.type("fg")
        tmux.wait("2 hosts, 2 filters")
        tmux.keys("q")
        tmux.wait("^total 7")
        assert tmux.modes == before

    def test_ended_while_stopped(self, tmux):
        """SIGTERM to a stopped process, which runs on only to end."""
        before = tmux.modes
        for stop in (lambda: tmux.keys("C-z"), lambda: os.kill(self.pid(tmux), signal.SIGSTOP)):
            self.start(tmux)
            stop()
            tmux.wait("Stopped")
            pid = self.pid(tmux)
            os.kill(pid, signal.SIGTERM)
            os.kill(pid, signal.SIGCONT)
            wait_until(lambda pid=pid: not os.path.exists(f"/proc/{pid}/fd/0"), "its end")
            assert tmux.modes == before
            tmux.type("wait; clear")

    def test_a_terminal_that_goes_away(self, tmux):
        self.start(tmux)
        pid = self.pid(tmux)
        tmux.run("respawn-pane", "-k", "sleep 30")
        wait_until(lambda: not os.path.exists(f"/proc/{pid}/fd/0"), "its end")

    def test_lines_where_it_is_no_screen(self, tmux, monkeypatch):
        """A terminal that cannot be painted on, and a background process."""
        tmux.type(f"TERM=dumb {self.COLLECT}")
        port = re.search(r"listening on 127.0.0.1:(\d+)", tmux.wait("traceleft: ready"))[1]
        self.feed(port, monkeypatch)
        tmux.wait(r"^host web event open count 4 rate \d/s total 4 alerts 1$")
        tmux.keys("C-c")
        tmux.wait("total 7 in 2 alerts")
        tmux.type(f"clear; {self.COLLECT} & sleep 0.1")
        tmux.wait("traceleft: ready")
        tmux.type("clear; kill %1; wait; echo d'one'")
        assert "collect on" not in tmux.wait("^done")

    @live[0]
    @live[1]
    def test_trace_shows_a_status_line(self, tmux, tmp_path):
        before = tmux.modes
        spec = write_spec(tmp_path / "spec", a_spec(f"startswith(pathname, '{tmp_path}/d')", name="mkdir", channel={
            "id": "1", "type": "file", "path": str(tmp_path / "log")}))
        tmux.type(f"{sys.executable} {SCRIPT} trace --spec {spec}")
        tmux.wait("^matched 0/s  passed 0/s  alerts 0/s  lost 0/s$")
        for number in range(3):
            os.mkdir(tmp_path / f"d{number}")
        tmux.wait("^matched [1-9][0-9]*/s  passed [1-9]")
        tmux.keys("C-c")
        assert not re.search("^matched", tmux.wait("^traceleft: balanced"), re.M)
        assert tmux.modes == before


class TestCompletion:
    """Each in its shell, as the shell asks for it."""

    CASES = [
        (["tr"], {"trace"}), (["events", "--for"], {"--format"}), (["events", "--format", "m"], {"markdown"}),
        (["trace", "--ver"], {"--verbose"}), (["check", "{folder}/sp"], {"{folder}/spec one.json"}),
        (["trace", "--spec", "{folder}/sp"], {"{folder}/spec one.json"}), (["--vers"], {"--version"}),
        (["trace", "--follow", "42:7:open,clos"], {"close", "close_range", "close_v4", "close_v6"}),
        (["trace", "--duration", "1", "timerfd_c"], {"timerfd_create"}), (["completion", "z"], {"zsh"}), (["man", "x"], set()),
        (["trace", "--user", "nobod"], {"nobody"}),
    ]

    def check(self, scripts, found, wanted):
        assert found == {word.format(folder=scripts) for word in wanted}

    @pytest.mark.parametrize("words, wanted", CASES)
    def test_bash(self, scripts, words, wanted):
        words = ["traceleft", *(word.format(folder=scripts) for word in words)]
        typed = " ".join(f"'{word}'" for word in words)
        ask = f"source {scripts}/_bash; COMP_WORDBREAKS=${{COMP_WORDBREAKS//:}}; COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; " \
              "_traceleft; printf '%s\n' \"${COMPREPLY[@]}\""
        done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
        assert done.stderr == ""
        before = words[-1].rpartition(",")[0]  # of a selector, what stands already
        found = {line[len(before) + 1:] if before else line for line in done.stdout.splitlines() if line}
        self.check(scripts, found, wanted)

    def test_bash_where_a_colon_breaks_words(self, scripts):
        ask = f"source {scripts}/_bash; COMP_WORDS=(traceleft trace 42 : 7 :opene); COMP_CWORD=5; _traceleft; echo ${{COMPREPLY[@]}}"
        assert subprocess.run(["bash", "-c", ask.replace("opene", "openat2")], capture_output=True, text=True).stdout == "openat2\n"

    @pytest.mark.parametrize("words, wanted", CASES)
    def test_fish(self, scripts, words, wanted):
        words = [word.format(folder=scripts) for word in words]
        ask = f"source {scripts}/_fish; complete -C 'traceleft.py {' '.join(words)}'"
        done = subprocess.run(["fish", "--no-config", "-c", ask], capture_output=True, text=True, check=True)
        found = {line.split("\t")[0].replace("\\ ", " ") for line in done.stdout.splitlines()}
        before = words[-1].rpartition(",")[0]
        self.check(scripts, {word[len(before) + 1:] if before else word for word in found}, wanted)

    def test_zsh(self, scripts):
        """What TAB makes of a line, on a terminal."""
        assert subprocess.run(["zsh", "-n", scripts / "_zsh"], capture_output=True, text=True).stderr == ""
        lines = [" ".join(["traceleft.py", *(word.format(folder=scripts) for word in words)]) for words, _ in self.CASES]
        for (words, wanted), line, after in zip(self.CASES, lines, self.press_tab(scripts, lines)):
            before = line.rpartition(" ")[0] + " " + (words[-1].rpartition(",")[0] + "," if "," in words[-1] else "")
            common = os.path.commonprefix(sorted(wanted)).format(folder=scripts).replace(" ", "\\ ")
            assert after.rstrip() == (before + common if wanted else line)

    @staticmethod
    def press_tab(folder, lines):
        """An interactive zsh in which a key writes the line that stands there to a file."""
        (folder / "setup").write_text(f"""
autoload -U compinit; compinit -D -u; source {folder}/_zsh; number=0
keep() {{ print -r -- "$BUFFER" > {folder}/new && mv {folder}/new {folder}/line-$number; (( number++ )); BUFFER= }}
zle -N keep; bindkey '^T' keep; bindkey '^I' expand-or-complete; print > {folder}/set-up
""")
        master, slave = pty.openpty()
        process = subprocess.Popen(["zsh", "-f", "-i"], stdin=slave, stdout=slave, stderr=slave, cwd=folder,
                                   env={**CLEAN_ENVIRONMENT, "TERM": "dumb"}, start_new_session=True)
        os.close(slave)
        reader = threading.Thread(target=read_all, args=(master,))
        reader.start()
        try:
            os.write(master, f"source {folder}/setup\n".encode())
            wait_until((folder / "set-up").exists, "zsh is set up")
            for number, line in enumerate(lines):
                os.write(master, f"{line}\t\x14".encode())
                wait_until((folder / f"line-{number}").exists, f"zsh has completed {line}")
        finally:
            process.kill()
            process.wait()
            reader.join(DEADLINE)
            os.close(master)
        return [(folder / f"line-{number}").read_text().rstrip("\n") for number in range(len(lines))]


def read_all(fd):
    """Reads a terminal until nobody writes to it any more."""
    with contextlib.suppress(OSError):
        while os.read(fd, 65536):
            pass


class TestManPage:
    def test_is_well_formed(self, tmp_path):
        (tmp_path / "traceleft.8").write_text(run("man").stdout)
        done = subprocess.run(["mandoc", "-T", "lint", "-W", "warning", tmp_path / "traceleft.8"], capture_output=True, text=True)
        assert [line for line in done.stdout.splitlines() if "missing date" not in line] == []

    def test_says_what_the_parser_says(self, tmp_path):
        (tmp_path / "traceleft.8").write_text(run("man").stdout)
        shown = subprocess.run(["mandoc", "-T", "utf8", "-O", "width=500", tmp_path / "traceleft.8"], capture_output=True, text=True).stdout
        shown = " ".join(re.sub(".\b", "", shown).split())
        parser = traceleft.build_parser()
        for command in traceleft.parser_commands(parser):
            assert command.help in shown
            assert all(" ".join(option.help.split()) in shown for option in [*command.options, *command.positionals])
        assert "traceleft trace --spec" in shown and "4 the accounting did not add up" in shown


def assert_one_line(done, code, message):
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("traceleft: ")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert code != 3 or "doctor' tells" in done.stderr.splitlines()[0]
    assert [line for line in done.stderr.splitlines() if not line.startswith(("traceleft: ", "  "))] == []


class TestDoctor:
    """Bad hosts in a mount namespace of their own, so that nothing is left behind."""

    pytestmark = live

    @staticmethod
    def states(done):
        """What -> (state, the rest of the line)."""
        assert done.stderr == "" and {line[:5].strip() for line in done.stdout.splitlines()} <= set(traceleft.STATES)
        return {line[5:23].strip(): (line[:5].strip(), line[23:].strip()) for line in done.stdout.splitlines()}

    def test_a_good_host(self):
        done = run("doctor", timeout=2 * DEADLINE)
        states = self.states(done)
        assert done.returncode == 0 and "no" not in {state for state, _ in states.values()}, done.stdout
        assert set(states) >= {*traceleft.HOST_CHECKS, "Python", "libbpf", "tracefs", "BPF object", "event types", "grpcio",
                               "protobuf", *(trial.what for trial in traceleft.TRIALS)}
        for trial in traceleft.TRIALS:
            assert "an event came through the ring buffer" in states[trial.what][1]
        assert re.search(r"sys_exit \d{4,6} instructions verified", states["syscall exit"][1])
        assert states["kernel"][1] == platform.release() and grpc.__version__ in states["grpcio"][1]

    @pytest.mark.parametrize("what, command, found", [
        ("BTF", "mount -t tmpfs t /sys/kernel/btf", "CONFIG_DEBUG_INFO_BTF"),
        ("libbpf", "mount --bind /dev/null $(ldconfig -p | awk '/libbpf.so.1 /{print $NF; exit}')", "apt-get install libbpf1"),
        ("privilege", "", "CAP_BPF and CAP_PERFMON"),
        ("user namespace", None, "run it on the host itself"),
        ("lockdown", "mount -t tmpfs t /sys/kernel/security && echo 'none integrity [confidentiality]' "
                     ">/sys/kernel/security/lockdown", "lockdown=integrity"),
    ])
    def test_what_a_host_lacks(self, what, command, found):
        prefix = (TestBadHosts.without(command) if command else ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
                  if command is not None else ["unshare", "--user", "--map-root-user"])
        done = run("doctor", prefix=prefix)
        states = self.states(done)
        assert done.returncode == 3
        assert states[what][0] == "no" and found in states[what][1]
        assert states["tracing"] == ("no", "not tried, for what is missing above")
        assert states["Python"][0] == "ok" and states["grpcio"][0] == "ok"

    def test_without_proc(self):
        """Every line comes all the same."""
        done = run("doctor", prefix=TestBadHosts.without("umount -l /proc"))
        states = self.states(done)
        assert done.returncode == 3 and states["proc"] == ("no", "/proc is not mounted: mount -t proc proc /proc")
        assert states["libbpf"][0] == "ok" and states["grpcio"][0] == "ok"

    def test_a_tracefs_that_was_not_mounted_is_said(self):
        done = run("doctor", prefix=TestBadHosts.without("umount -l /sys/kernel/debug/tracing 2>/dev/null; umount -l /sys/kernel/debug "
                                                         "2>/dev/null; umount -l /sys/kernel/tracing"), timeout=2 * DEADLINE)
        assert self.states(done)["tracefs"] == ("ok", "/sys/kernel/tracing, which was not mounted before, and stays")

    def test_an_event_that_cannot_be_made_is_not_ok(self):
        """Without a network."""
        states = self.states(run("doctor", prefix=["unshare", "-n"], timeout=2 * DEADLINE))
        assert states["TCP connections"][0] == "-" and "could not be made here" in states["TCP connections"][1]

    def test_packages_that_do_not_work(self, tmp_path):
        """As protobuf 4 on Python 3.14: to import it raises a TypeError. And one that is imported, and cannot make messages."""
        for text in ("raise TypeError('Metaclasses are not\\nsupported')", "__version__ = '1'; __path__ = []"):
            (tmp_path / "google/protobuf").mkdir(parents=True, exist_ok=True)
            (tmp_path / "google/protobuf/__init__.py").write_text(text)
            environment = {"PYTHONPATH": str(tmp_path)}
            assert_one_line(run("collect", env=environment), 3, "-m pip install grpcio protobuf")
            states = self.states(run("doctor", env=environment, timeout=2 * DEADLINE))
            assert states["protobuf"][0] == "-" and "-m pip install" in states["protobuf"][1]

    def test_one_way_to_attach_that_is_missing(self, monkeypatch, capsys):
        trials = [trial._replace(programs=()) for trial in traceleft.TRIALS[:2]]
        monkeypatch.setattr(traceleft, "TRIALS", trials)
        call = traceleft.Libbpf.call

        def refuse_entries(self, name, *arguments):
            if name.startswith("bpf_program__attach") and b"sys_enter_close" in arguments:
                raise OSError(95, f"{name}: Operation not supported")
            return call(self, name, *arguments)

        monkeypatch.setattr(traceleft.Libbpf, "call", refuse_entries)
        assert traceleft.main(["doctor"]) == 3
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("no")]
        assert len(lines) == 1
        assert re.search(r"syscall entry +cannot attach to syscalls/sys_enter_close: .* \(for close, execve", lines[0])

    def test_optional_packages_are_optional(self, monkeypatch, capsys):
        monkeypatch.setattr(traceleft, "TRIALS", ())
        monkeypatch.setitem(sys.modules, "grpc", None)
        assert traceleft.main(["doctor"]) == 0
        assert re.search(f"^-    grpcio .*: {sys.executable} -m pip install grpcio protobuf$", capsys.readouterr().out, re.M)
        monkeypatch.setattr(sys, "prefix", "/usr")
        with pytest.raises(traceleft.HostError, match="apt-get install python3-grpcio python3-protobuf, or "):
            traceleft.import_optional("grpc")

    def test_how_alpine_installs(self, monkeypatch, tmp_path):
        (tmp_path / "apk").touch(mode=0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr(sys, "prefix", "/usr")
        monkeypatch.setitem(sys.modules, "grpc", None)
        monkeypatch.setattr(traceleft, "LIBBPF_NAME", "libbpf-missing.so")
        monkeypatch.setattr(traceleft, "CA_BUNDLES", ())
        for function, message in ((lambda: traceleft.import_optional("grpc"), "apk add py3-grpcio py3-protobuf, or "),
                                  (traceleft.Libbpf, ": apk add libbpf, or "), (traceleft.system_roots, ": apk add ca-certificates, or ")):
            with pytest.raises(traceleft.HostError, match=message):
                function()

    def test_sudo_only_where_it_is(self, monkeypatch, tmp_path):
        monkeypatch.setattr(traceleft, "capability_set", lambda name: 0)
        monkeypatch.setenv("PATH", str(tmp_path))
        assert traceleft.lacks_privilege() == "missing privilege CAP_BPF and CAP_PERFMON: run it as root"
        (tmp_path / "sudo").touch(mode=0o755)
        assert traceleft.lacks_privilege().endswith(f": run it as root, as in sudo {sys.argv[0]}")

    @pytest.mark.parametrize("mode, state", [("none", "ok  "), ("integrity", "ok  "), ("", "-   ")])
    def test_what_is_not_known_is_not_ok(self, monkeypatch, mode, state):
        monkeypatch.setattr(traceleft, "lockdown", lambda: mode)
        (line,) = [finding.format() for finding in traceleft.find_host() if finding.what == "lockdown"]
        assert line.startswith(state) and (mode or "not known: securityfs is not mounted") in line


class TestCommandLine:
    @pytest.mark.parametrize("arguments, message", [
        ((), "COMMAND"), (("trce",), "invalid choice"), (("trace",), "needs --spec FILE or a selector"),
        (("trace", "opne"), "did you mean 'open'"), (("trace", "1:2:3:open"), "malformed selector"),
        (("trace", "4194304:open"), "there is no process 4194304"), (("trace", "open", "--duration", "x"), "seconds above 0"),
        (("trace", "open", "--duration", "-1"), "seconds above 0"), (("trace", "open", "--duration", "nan"), "seconds above 0"),
        (("trace", "open", "--ring-size", "1000"), "power of two"), (("trace", "--spec"), "expected one argument"),
        (("trace", "--spec", "/nonexistent"), "/nonexistent: cannot read the spec: No such file"),
        (("trace", "--spec", "/"), "/: cannot read the spec: Is a directory"), (("check",), "required: SPEC"),
        (("check", "/nonexistent"), "cannot read the spec"), (("explain", "/nonexistent"), "cannot read the spec"),
        (("trace", "1234"), "stands before its events, as in 1234:open"), (("trace", "open:1"), "as in 1234:open"),
        (("trace", "OPEN"), "did you mean 'open'"), (("trace", "--follow", "open"), "--follow adds the children of selected"), (("trace", "--follow", "0:open"), "no selector names any"),
        (("events", "opne"), "did you mean 'open'"), (("trace", "--nope", "open"), "unrecognized arguments: --nope"),
    ])
    def test_usage_errors_are_one_line(self, arguments, message):
        assert_one_line(run(*arguments), 2, message)

    def test_help_shows_examples_and_exit_codes(self):
        shown = run("--help").stdout
        assert "trace --spec spec/aggregator-spec.json" in shown
        assert all(command in shown for command in ("trace", "collect", "check", "explain", "events", "doctor"))
        assert "4  the accounting did not add up" in run("trace", "--help").stdout

    def test_version(self):
        digest = hashlib.sha256(traceleft.OBJECT_PATH.read_bytes()).hexdigest()
        assert re.fullmatch(rf"traceleft.py {traceleft.VERSION} commit ([0-9a-f]{{12}}(-dirty)?|unknown) object {digest[:16]}\n",
                            run("--version").stdout)

    @pytest.mark.skipif(os.geteuid() != 0, reason="makes files of another user")
    def test_the_commit_of_another_users_checkout(self, tmp_path):
        """git refuses to tell it, which is about its configuration and not ours."""
        subprocess.run(["git", "init", "-q", tmp_path], check=True)
        shutil.copy(HERE / "traceleft.py", tmp_path)
        git = ["git", "-C", tmp_path, "-c", "user.name=n", "-c", "user.email=e"]
        subprocess.run([*git, "add", "traceleft.py"], check=True)
        subprocess.run([*git, "commit", "-q", "-m", "m"], check=True)
        subprocess.run(["chown", "-R", "1:1", tmp_path], check=True)
        shown = subprocess.run([sys.executable, tmp_path / "traceleft.py", "--version"], capture_output=True, text=True).stdout
        assert re.search(" commit [0-9a-f]{12} object missing$", shown)
        elsewhere = subprocess.run([sys.executable, tmp_path / "traceleft.py", "--version"], capture_output=True, text=True,
                                   env={**CLEAN_ENVIRONMENT, "GIT_DIR": str(HERE / ".git")}).stdout
        assert elsewhere == shown

    def test_a_file_without_an_end_is_no_spec(self):
        assert_one_line(run("check", "/dev/zero"), 2, f"/dev/zero: it is larger than {traceleft.MAX_SPEC_BYTES} bytes: is it a spec?")

    def test_the_alias_of_spec(self, tmp_path):
        assert "cannot read the spec" in run("trace", "--aggregation-spec", tmp_path / "x").stderr

    def test_check_says_ok_or_every_error(self, tmp_path):
        good = write_spec(tmp_path / "good", a_spec())
        bad = write_spec(tmp_path / "bad", a_spec(rule="uid = 1 and gid", parameters="x=1"))
        done = run("check", bad, good)
        assert done.returncode == 2
        assert done.stdout == f"{good}: ok\n"
        assert done.stderr.splitlines() == [
            f"traceleft: {bad}: events[0].function.parameters: sigma has no parameter 'x'; known: frequency, threshold, by",
            f"traceleft: {bad}: events[0].rule: write '==', not '='", "  uid = 1 and gid", "      ^"]

    def test_explain_says_what_runs_where(self):
        done = run("explain", HERE / "spec/aggregator-spec.json")
        assert done.returncode == 0
        assert re.search(r"open-0: event open.*\n  kernel: .*open, creat, openat, openat2\n  kernel: rule arg1", done.stdout)

    def test_explain_says_what_needs_python_and_why(self, tmp_path):
        rule = "glob(filename, '/tmp/*.so') and uid == 0 or 'x' in comm and filename in ('a', 'b')"
        done = run("explain", write_spec(tmp_path / "spec", a_spec(rule=rule)))
        assert done.stdout.splitlines()[2:] == [
            "  kernel: lets through (the begin of filename in ('/tmp/') and the end of filename in ('.so') and a test of uid) "
            "or (filename in ('a', 'b')); each such event crosses the ring buffer",
            f"  python: rule {rule}", "  python: sigma frequency=1; alerts_per_sec, as json",
            "  because: glob(), contains() cannot be evaluated in the kernel",
            "attached: one program to the exit of open, creat, openat, openat2: about 6% of a typical host's syscalls, and up to "
            "24% that costs less than one for every syscall",
            "never traced: the tracer's own events",
            "not seen: what io_uring does in place of syscalls (its submissions are counted, and said); 32-bit syscalls"]

    @pytest.mark.parametrize("names, lines", [
        (["read", "write", "open", "close"], [r"every syscall \(tp_btf/sys_exit\): about 35%", "at entry, where .* to close"]),
        (["connect_v4"], ["to tp_btf/inet_sock_set_state, and to the exit of accept, accept4"]),
        (["exit_group", "execve"], ["exit of execve: about 0%", "at entry, where .* to exit_group, execve|execve, exit_group",
                                    "to tp_btf/sched_process_exec"]),
    ])
    def test_explain_says_what_is_attached(self, names, lines):
        shown = traceleft.explain_attachments(names)
        assert len(shown) == len(lines) + 2
        for line, pattern in zip(shown, lines):
            assert re.match(rf"attached: .*({pattern})", line)

    def test_events(self):
        lines = run("events").stdout.splitlines()
        assert lines[0] == "open(filename, flags, mode)" and "connect_v4(saddr, daddr, sport, dport, netns)" in lines
        rest = lines.index("and, with the arguments that tracefs names:")
        kinds = [EVENT_TYPES[row[0]] for row in traceleft.EVENT_ROWS]  # the table itself has grown by what other tests name
        assert rest == len([kind for kind in kinds if kind.is_tcp or traceleft.syscalls_here(kind)])
        assert "timerfd_create" in " ".join(lines[rest + 1:]).split()
        detail = run("events", "open").stdout
        assert "arg1  filename" in detail and "openat2" in detail

    def test_events_as_json(self):
        described = {found["name"]: found for found in json.loads(run("events", "--format", "json").stdout)}
        assert set(described) >= {*EVENT_TYPES} - {name for name, kind in EVENT_TYPES.items()
                                                   if not kind.is_tcp and not traceleft.syscalls_here(kind)}
        opened = described["open"]
        assert [(a["field"], a["name"], a["type"]) for a in opened["arguments"]] == [
            ("arg1", "filename", "text"), ("arg2", "flags", "integer"), ("arg3", "mode", "integer")]
        assert "openat2" in opened["syscalls"] and {"ret", "comm", "path"} <= set(opened["fields"])
        assert described["connect_v6"]["kind"] == "connection" and described["connect_v6"]["syscalls"] == []
        assert described["connect_v6"]["arguments"][0]["type"] == "address"
        assert "timerfd_create" in described
        assert list(json.loads(run("events", "--format", "json", "read", "open").stdout)[0]) == list(opened)

    def test_events_as_markdown(self):
        lines = run("events", "close", "connect_v4", "--format", "markdown").stdout.splitlines()
        assert lines == ["| event | arguments | what it is here |", "| --- | --- | --- |", "| `close` | `fd` | `close` |",
                         "| `connect_v4` | `saddr`, `daddr`, `sport`, `dport`, `netns` | a change of a TCP connection |"]

    @pytest.mark.parametrize("_", range(5))
    def test_a_closed_pipe_is_no_error(self, _):
        done = subprocess.run(f"{sys.executable} {SCRIPT} events | true", shell=True, capture_output=True, text=True)
        assert done.stderr == ""

    def test_an_invalid_spec_touches_nothing(self, tmp_path):
        spec = a_spec(rule="nope", channel={"id": "1", "type": "file", "path": str(tmp_path / "log")})
        done = run("trace", "--spec", write_spec(tmp_path / "spec", spec), "--summary", tmp_path / "summary")
        assert_one_line(done, 2, "no field 'nope'")
        assert {path.name for path in tmp_path.iterdir()} == {"spec"}


class TestBadHosts:
    """Each in a mount namespace of its own, so that nothing is left behind."""

    pytestmark = live

    @staticmethod
    def without(command):
        return ["unshare", "-m", "sh", "-c", f'{command} && exec "$@"', "sh"]

    def test_no_capability(self):
        assert_one_line(run("trace", "open", prefix=["setpriv", "--bounding-set=-all", "--inh-caps=-all"]), 3,
                        "missing privilege CAP_BPF and CAP_PERFMON: run it as root")

    def test_not_root(self, tmp_path):
        folder = Path("/var/tmp") / f"traceleft-test-{os.getpid()}"
        folder.mkdir(mode=0o755)
        try:
            shutil.copy(SCRIPT, folder)
            done = run("trace", "open", script=folder / "traceleft.py", python="/usr/bin/python3",
                       prefix=["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"])
        finally:
            shutil.rmtree(folder)
        assert_one_line(done, 3, "missing privilege")

    def test_no_libbpf(self):
        library = subprocess.run("ldconfig -p | awk '/libbpf.so.1 /{print $NF; exit}'", shell=True, capture_output=True,
                                 text=True, check=True).stdout.strip()
        assert_one_line(run("trace", "open", prefix=self.without(f"mount --bind /dev/null {library}")), 3,
                        "cannot load libbpf.so.1")

    def test_a_libbpf_that_is_too_old(self, tmp_path):
        source = "unsigned libbpf_major_version(void) { return 0; } char *libbpf_version_string(void) { return \"v0.8\"; }"
        library = tmp_path / "libbpf.so.1"
        subprocess.run(["gcc", "-shared", "-o", library, "-x", "c", "-"], input=source, text=True, check=True)
        assert_one_line(run("trace", "open", env={"LD_LIBRARY_PATH": str(tmp_path)}), 3, "too old")

    def test_no_btf(self):
        assert_one_line(run("trace", "open", prefix=self.without("mount -t tmpfs t /sys/kernel/btf")), 3, "has no BTF")

    def test_tracefs_is_mounted_when_it_is_missing(self, tmp_path):
        hide = "umount -l /sys/kernel/tracing 2>/dev/null; umount -l /sys/kernel/debug 2>/dev/null; true"
        done = run("trace", "mkdir", "--duration", "0.3", prefix=self.without(hide))
        assert done.returncode == 0, done.stderr

    def test_a_tracepoint_that_the_kernel_lacks(self, monkeypatch):
        fake = traceleft.parse_event_row("nosuch", "fd:fd", "nosuchcall:0")
        monkeypatch.setitem(traceleft.EVENT_TYPES, "nosuch", fake)
        tracer = traceleft.Tracer({"nosuch": traceleft.Wanted(any_process=True)})
        with pytest.raises(traceleft.HostError, match="no tracepoint syscalls/sys_exit_nosuchcall"):
            tracer.load()

    @pytest.mark.parametrize("number, paranoid, hint", [(13, "3", True), (1, "4", True), (13, "2", False), (13, "", False), (2, "3", False)])
    def test_debians_paranoia_is_named(self, monkeypatch, tmp_path, number, paranoid, hint):
        (tmp_path / "paranoid").write_text(paranoid)
        monkeypatch.setattr(traceleft, "PARANOID_PATH", tmp_path / "paranoid")
        assert ("sysctl kernel.perf_event_paranoid=2" in traceleft.attach_hint(OSError(number, ""))) == hint

    @pytest.mark.parametrize("data, message", [(None, "copy the folder bpf/"), (b"junk", "is not a usable BPF object"),
                                               (b"", "is not a usable BPF object")])
    def test_object_missing_or_corrupt(self, tmp_path, data, message):
        shutil.copy(SCRIPT, tmp_path)
        if data is not None:
            (tmp_path / "bpf").mkdir()
            (tmp_path / "bpf/traceleft.bpf.o").write_bytes(data)
        assert_one_line(run("trace", "open", script=tmp_path / "traceleft.py"), 3, message)

    def test_a_truncated_object(self, tmp_path):
        shutil.copy(SCRIPT, tmp_path)
        (tmp_path / "bpf").mkdir()
        (tmp_path / "bpf/traceleft.bpf.o").write_bytes(traceleft.OBJECT_PATH.read_bytes()[:9000])
        assert_one_line(run("trace", "open", script=tmp_path / "traceleft.py"), 3, "BPF object")

    def test_another_user_namespace(self):
        """Whose root has every capability, and none that counts."""
        assert_one_line(run("trace", "open", prefix=["unshare", "--user", "--map-root-user"]), 3, "not the initial user namespace")

    def test_no_grpcio(self, tmp_path):
        (tmp_path / "grpc.py").write_text("raise ImportError('No module named grpc')")
        spec = write_spec(tmp_path / "spec", grpc_spec(1))
        environment = {"PYTHONPATH": str(tmp_path)}
        assert_one_line(run("trace", "--spec", spec, env=environment), 3, "grpcio")
        assert_one_line(run("collect", env=environment), 3, "-m pip install grpcio protobuf")
        unused = json.loads(spec.read_text())
        unused["channels"].append({"id": "f", "type": "file", "path": str(tmp_path / "log")})
        unused["events"][0]["channel"] = "f"
        assert run("trace", "--spec", write_spec(spec, unused), "--duration", "0.2", env=environment).returncode == 0

    @pytest.mark.parametrize("path, message", [("missing/log", "No such file"), ("", "Is a directory")])
    def test_channel_paths(self, tmp_path, path, message):
        spec = a_spec(channel={"id": "1", "type": "file", "path": f"{tmp_path}/{path}"})
        assert_one_line(run("trace", "--spec", write_spec(tmp_path / "spec", spec)), 1, message)

    @pytest.mark.parametrize("existing", [False, True])
    def test_a_read_only_file_system_is_said(self, tmp_path, existing):
        spec = write_spec(tmp_path / "spec", a_spec(channel={"id": "1", "type": "file", "path": f"{tmp_path}/log"}))
        if existing:
            (tmp_path / "log").touch()
        read_only = self.without(f"mount --bind {tmp_path} {tmp_path} && mount -o remount,ro,bind {tmp_path}")
        assert_one_line(run("trace", "--spec", spec, prefix=read_only), 1, "Read-only file system")

    def test_a_summary_that_cannot_be_written(self, tmp_path):
        assert_one_line(run("trace", "open", "--summary", tmp_path / "missing/s"), 1, "cannot write --summary")

    def test_a_summary_to_a_fifo_that_nobody_reads(self, tmp_path):
        os.mkfifo(tmp_path / "fifo")
        done = run("trace", "mkdir", "--duration", "0.2", "--summary", tmp_path / "fifo")
        assert done.returncode == 1 and "cannot write --summary" in done.stderr and '"balanced": true' in done.stderr

    def test_a_long_message_of_libbpf_is_whole(self):
        """The verifier's log is one, and says at its end what is wrong."""
        bpf = traceleft.Libbpf()
        bpf.library.bpf_object__open(b"/" + b"x" * 20_000)
        assert any("x" * 20_000 in line and line.endswith("File name too long") for line in bpf.log)

    def test_the_log_of_libbpf_is_shown_with_v(self):
        assert "libbpf:" in run("trace", "mkdir", "--duration", "0.2", "-v").stderr


class TestHostile:
    """Programs that want to forge records, to stall the tracer or to make it grow."""

    pytestmark = live

    NAMES = [b"a\nCOUNT: 9\nEVENT: {x}", b"\x1b]0;x\x07\x1b[2J", b"\xff\xfe", b'"}, {"count": 9}', "\u202egpj".encode(), b"\\n\\", b"'", b"\x7f\r",
             "\u009b2J".encode(), b"\x01" * 255, "\U000e0041".encode()]

    def test_names_can_forge_nothing(self, generated, tmp_path):
        """Each name through every kind of channel and printed, by a process whose own name is hostile as well."""
        paths = [os.fsencode(tmp_path) + b"/" + name for name in self.NAMES]
        with ProtoServer(generated) as server:
            spec = a_spec(name="mkdir")
            spec["channels"] = [{"id": kind, "type": "file", "path": f"{tmp_path}/{kind}.log"} for kind in ("text", "json")]
            spec["channels"].append({"id": "collector_spec_pb", "type": "grpc", "path": f"localhost:{server.port}"})
            spec["events"] = [{**spec["events"][0], "channel": kind, "rule": f"pathname == {os.fsdecode(path)!r}",
                               "output": {"metrics": "alerts_per_sec", "format": kind}}
                              for path in paths for kind in ("text", "json", "collector_spec_pb")]
            code = f"""if True:
                import os
                open("/proc/self/comm", "wb").write(b'c\\n"\\x1b[2J')
                input()
                for path in {paths!r}:
                    os.mkdir(path)"""
            maker = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
            with Agent("trace", "--spec", write_spec(tmp_path / "spec", spec), "--collector-insecure", "--summary", "-") as agent, \
                    Agent("trace", f"{maker.pid}:mkdir") as printer:
                maker.communicate(b"\n", timeout=DEADLINE)
                wait_until(lambda: all(os.path.isdir(path) for path in paths), "the directories")
                code, output = agent.stop()
                _, printed = printer.stop()
        count = len(paths)
        assert code == 0 and totals(output) == (3 * count, 3 * count, {})
        text = (tmp_path / "text.log").read_text()
        blocks = text.split("\n\n")[:-1]
        assert len(blocks) == count and all(re.fullmatch(r"COUNT: 1\nEVENT: \{.*\} Pathname \".*\" Mode 511", block) for block in blocks)
        records = [json.loads(line) for line in (tmp_path / "json.log").read_text().splitlines()]
        assert {os.fsencode(record["sample"]["args"]["pathname"]) for record in records} == set(paths)
        assert {(record["count"], record["sample"]["comm"]) for record in records} == {(1, 'c\n"\x1b[2J')}
        assert {metric.MkdirEvent.pathname for metric in server.metrics} == set(paths)
        assert {(metric.Count, metric.CommonEvent.Comm) for metric in server.metrics} == {(1, b'c\n"\x1b[2J')}
        lines = printed.splitlines()
        assert len(lines) == count and all(line.startswith("name mkdir pid ") for line in lines)
        for shown in (text, (tmp_path / "json.log").read_text(), printed, *agent.stderr):
            assert all(c.isprintable() or c == "\n" for c in shown)

    def test_a_slow_rule_holds_up_neither_other_filters_nor_the_end(self, tmp_path):
        """Events that are pending at once and take three seconds in Python, beside a filter that the kernel evaluates."""
        slow = " or ".join(f"regex(filename, '(a|b)*a(a|b){{{200 + number}}}c')" for number in range(25))
        text = "".join(random.Random(1).choices("ab", k=4000 - len(str(tmp_path))))
        test = parse_rule(slow, OPEN).matcher()
        begin = time.perf_counter()
        assert not any(test(an_open(text[number:])) for number in range(5))
        events = min(max(int(3 * 5 / (time.perf_counter() - begin)), 10), 1000)
        spec = a_spec(channel={"id": "1", "type": "file", "path": f"{tmp_path}/log"})
        spec["events"] = [{**spec["events"][0], "id": "slow", "rule": f"startswith(filename, '{tmp_path}/') and ({slow} or endswith(filename, 'ab'))"},
                          {**spec["events"][0], "id": "quick", "name": "mkdir", "rule": f"startswith(pathname, '{tmp_path}/')"}]
        opens = f"""if True:
            import os, random
            source = random.Random(2)
            for number in range({events}):
                try: os.open({str(tmp_path)!r} + "/" + "".join(source.choices("ab", k={len(text)})) + "ab", 0)
                except OSError: pass"""
        with Agent("trace", "--spec", write_spec(tmp_path / "spec", spec), "--summary", "-") as agent:
            subprocess.run([sys.executable, "-c", opens], check=True)
            for number in range(15):
                (tmp_path / str(number)).mkdir()
                time.sleep(0.15)
            code, output = agent.stop(signal.SIGTERM)
        rows = {row["id"]: row["matched"] for row in json.loads(output)["filters"]}
        assert (code, rows) == (0, {"slow": events, "quick": 15})
        quick = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines() if '"quick"' in line]
        assert len(quick) >= 3  # one a second, as ever

    def test_a_fork_bomb_is_counted_and_followed(self, programs, tmp_path):
        bomb = subprocess.Popen([programs["forks"], tmp_path / "f", "3000"], stdin=subprocess.PIPE)
        spec = a_spec(f"filename == '{tmp_path}/f'", "by=pid", channel={"id": "1", "type": "file", "path": f"{tmp_path}/log"})
        spec = write_spec(tmp_path / "spec", spec)
        with Agent("trace", "--spec", spec, "--follow", f"{bomb.pid}:open", "--summary", "-") as agent:
            before = resident_kib(agent.process.pid)
            bomb.communicate(timeout=DEADLINE)
            assert bomb.returncode == 0
            grown = resident_kib(agent.process.pid) - before
            code, output = agent.stop()
        assert (code, *totals(output)) == (0, 3000, 3000, {}) and grown < 1024
        assert logged((tmp_path / "log").read_text()) == (3000, 0)

    @pytest.mark.skipif(not os.access("/proc/sys/kernel/ns_last_pid", os.W_OK), reason="cannot choose the next pid")
    def test_a_reused_pid_is_another_process(self, tmp_path):
        ended = subprocess.Popen(["sleep", "100"])
        other = subprocess.Popen(["bash"], stdin=subprocess.PIPE, text=True)
        with Agent("trace", f"{ended.pid},{other.pid}:mkdir") as agent:
            ended.kill()
            ended.wait()
            time.sleep(0.3)  # the kernel frees it a moment later, see forget_process
            for _ in range(200):
                Path("/proc/sys/kernel/ns_last_pid").write_text(str(ended.pid - 1))
                again = subprocess.Popen(["mkdir", "-p", tmp_path / "again"])
                again.wait(DEADLINE)
                if again.pid == ended.pid:
                    break
            assert again.pid == ended.pid
            other.communicate(f"exec mkdir {tmp_path}/other", timeout=DEADLINE)
            _, output = agent.stop()
        assert re.findall(r'Pathname "([^"]*)"', output) == [f"{tmp_path}/other"]


# ----------------------------------------------------------------------------------------------------------------------
# What goes wrong, and what is promised then: the README's fault table. `make soak` runs the long forms
# ----------------------------------------------------------------------------------------------------------------------

SOAK = os.environ.get("TRACELEFT_SOAK") == "1"


def length(short, full):
    """Of a test's two forms."""
    return full if SOAK else short


def figures(**found):
    """What a test has found: a line of `make soak`, named after the test."""
    if SOAK:
        name = os.environ["PYTEST_CURRENT_TEST"].split("::")[-1].rpartition(" (")[0]
        print(f"\n  {name}: " + ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in found.items()), flush=True)


def with_constants(path, **values):
    """A script that is traceleft.py with other constants."""
    assert all(hasattr(traceleft, name) for name in values)
    lines = [f"traceleft.{name} = {value!r}" for name, value in values.items()]
    path.write_text("\n".join(["import sys", f"sys.path.insert(0, {str(HERE)!r})", "import traceleft", *lines, "sys.exit(traceleft.main())", ""]))
    return path


class Sink:
    """A collector of its own process, which notes every alert in a file before it acknowledges; `delay` seconds for each."""

    CODE = """if True:
        import os, sys, threading, time, traceleft
        log = os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        class Sink(traceleft.Collector):
            def is_double(self, agent, sequence):
                return False
            def count(self, metric, peer):
                time.sleep(float(sys.argv[3]))
                os.write(log, f"{metric.Agent} {metric.Sequence} {metric.Count} {metric.Time!r}\\n".encode())
        Sink(sys.argv[1])
        print("listening", flush=True)
        threading.Event().wait()"""

    def __init__(self, log, port, host="localhost", delay=0.0, prefix=()):
        self.log = log
        self.process = subprocess.Popen([*prefix, sys.executable, "-c", self.CODE, f"{host}:{port}", str(log), str(delay)], cwd=HERE,
                                        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self.process.stdout.readline() == "listening\n"

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.kill()

    def lines(self):
        return [line.split() for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def alerts(self):
        """(agent, sequence) -> (count, time)."""
        return {(agent, int(sequence)): (int(count), float(at)) for agent, sequence, count, at in self.lines()}

    def received(self):
        """((agent, sequence) -> count, how many came twice)."""
        counts = {key: count for key, (count, _) in self.alerts().items()}
        return counts, len(self.lines()) - len(counts)

    def total(self):
        """Sum of the counts, each alert's once."""
        return sum(self.received()[0].values())


class Load:
    """Processes that open files without end, until the block ends; `opens` is how many opens there were then.

    Meanwhile they note in shared memory how far they are.
    """

    SOURCE = """if True:
        import mmap, os, signal, sys, time
        over = []
        signal.signal(signal.SIGTERM, lambda *_: over.append(1))
        notes = memoryview(mmap.mmap(int(sys.argv[1]), 0)).cast("Q")
        count, start, pause, names = 0, int(sys.argv[2]), float(sys.argv[3]), sys.argv[4:]
        while not over:
            notes[1 + int(time.clock_gettime(time.CLOCK_BOOTTIME) * 16) - start] = count
            count += len(names)
            notes[0] = count
            for name in names:
                os.close(os.open(name, os.O_WRONLY | os.O_CREAT))
            if pause:
                time.sleep(pause)
        print(count)"""

    def __init__(self, *names, processes=1, pause=0):
        self.each_round, self.opens = processes * len(names), None
        self.start = int(traceleft.boot_time() * 16)
        self.notes = []
        self.processes = []
        for _ in range(processes):
            shared = os.memfd_create("notes")
            os.truncate(shared, 8 << 15)  # for half an hour
            self.notes.append(memoryview(mmap.mmap(shared, 0)).cast("Q"))
            arguments = shared, self.start, pause, *names
            self.processes.append(subprocess.Popen([sys.executable, "-S", "-c", self.SOURCE, *map(str, arguments)],
                                                   stdout=subprocess.PIPE, text=True, pass_fds=[shared]))
            os.close(shared)

    def begun(self):
        """Opens by now, with those that are under way: there are no more."""
        return sum(notes[0] for notes in self.notes)

    def done_by(self, boot_time):
        """Opens that had ended by then: there are no less."""
        return sum(max(notes[1:1 + max(int(boot_time * 16) - self.start, 0)], default=0) for notes in self.notes)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for process in self.processes:
            process.terminate()
        self.opens = sum(int(process.communicate(timeout=DEADLINE)[0]) for process in self.processes)
        assert self.begun() == self.opens


class Moment(NamedTuple):
    """Counts at one moment of a test: opens that the load has made, and events that have arrived of them."""

    opens: int
    arrived: int

    def __str__(self):
        return f"{self.arrived} of {self.opens}"


def moment(load, arrived, frequency=10):
    """Now: what had arrived a little earlier is of no more opens than there have been."""
    found = arrived()
    found = Moment(load.begun(), found)
    assert found.arrived * frequency <= found.opens, found
    return found


def program_ids(pid):
    """Of the BPF programs that a process holds."""
    found = set()
    for path in Path(f"/proc/{pid}/fdinfo").iterdir():
        with contextlib.suppress(OSError):
            found.update(re.findall(r"^prog_id:\s*(\d+)", path.read_text(), re.M))
    return {int(number) for number in found}


def programs_left(ids):
    shown = json.loads(subprocess.run(["bpftool", "-j", "prog"], capture_output=True, check=True).stdout)
    return {program["id"] for program in shown} & ids


def many_filters(spec, names, parameters="frequency=10"):
    """The spec with one filter for the opens of each of these files."""
    first = spec["events"][0]
    return {**spec, "events": [{**first, "rule": f"filename == '{name}'", "function": {"id": "sigma", "parameters": parameters}}
                               for name in names]}


def totals(output):
    """(matched, passed, lost by cause) of all filters of a balanced --summary."""
    summary = json.loads(output)
    assert summary["balanced"], summary
    lost = {}
    for row in summary["filters"]:
        for cause, count in row["lost"].items():
            lost[cause] = lost.get(cause, 0) + count
    return sum(row["matched"] for row in summary["filters"]), sum(row["passed"] for row in summary["filters"]), lost


def written(path, dir_fd=None):
    """Sum of count of the records in a log that is being written to."""
    with os.fdopen(os.open(path, os.O_RDONLY, dir_fd=dir_fd)) as file:
        return logged(file.read().rpartition("\n")[0])[0]


def logged(*texts):
    """(sum of count, sum of lost) of records of the format json."""
    records = [json.loads(line) for text in texts for line in text.splitlines()]
    return sum(record["count"] for record in records), sum(record["lost"] for record in records)


class TestFaults:
    pytestmark = live

    def files(self, tmp_path, count=10):
        return [tmp_path / f"f{number}" for number in range(count)]

    def test_the_collector_is_killed_in_the_middle_of_streams(self, tmp_path):
        """Each alert takes it 10 ms, so that it is killed with a part of a second's alerts counted, and none acknowledged."""
        port, names, log = free_port(), self.files(tmp_path, 20), tmp_path / "received"
        spec = write_spec(tmp_path / "spec", many_filters(grpc_spec(port), names))
        moments = []
        with Agent("trace", "--spec", spec, "--collector-insecure", "--summary", "-") as agent:
            with Load(*names) as load:
                for number in range(length(2, 30)):
                    with Sink(log, port, delay=0.01) as sink:
                        before = len(sink.alerts())
                        wait_until(lambda: len(sink.lines()) > before, "a stream")  # noqa: B023
                        time.sleep(random.uniform(0, 1.2 if number % 2 else 0.1))
                        moments.append(moment(load, sink.total))
            with Sink(log, port) as sink:
                code, output = agent.stop()
                counts, doubles = sink.received()
        matched, passed, lost = totals(output)
        assert (code, matched, lost) == (0, load.opens, {}) and doubles > 0
        assert 0 < moments[0].arrived <= moments[-1].arrived < sum(counts.values()) == passed
        figures(kills=len(moments), received_before_the_first=moments[0], before_the_last=moments[-1], opens=load.opens, matched=matched,
                passed=passed, received_once=sum(counts.values()), lost=0, alerts=len(counts), alerts_sent_twice=doubles)

    def test_collect_is_killed_and_started_again(self, tmp_path):
        """`collect --json` shows each alert before it acknowledges it: what it is killed in between comes again, to one that
        knows nothing of it. Killed just then, by a proxy that lets no acknowledgement through, and at random moments."""
        port, names, shown, moments = free_port(), self.files(tmp_path, 20), tmp_path / "shown", []

        def alerts():
            return [json.loads(line) for line in shown.read_bytes().rpartition(b"\n")[0].splitlines()]

        def counts():
            return {(alert["agent"], alert["sequence"]): alert["count"] for alert in alerts()}

        def more(than, what):
            wait_until(lambda: len(alerts()) > than, what)

        with Proxy(port) as proxy, shown.open("ab") as output, contextlib.ExitStack() as stack:
            spec = write_spec(tmp_path / "spec", many_filters(grpc_spec(proxy.address), names))
            agent = stack.enter_context(Agent("trace", "--spec", spec, "--collector-insecure", "--summary", "-"))
            with Load(*names) as load:
                for number in range(length(2, 30)):
                    with Agent("collect", "--json", "--listen", f"localhost:{port}", stdout=output) as collector:
                        more(len(alerts()), "alerts")
                        if number % 2:
                            time.sleep(random.uniform(0, 1.2))
                        else:
                            proxy.mute = proxy.connections
                            more(len(alerts()), "alerts that are not acknowledged")
                        moments.append(moment(load, lambda: sum(counts().values())))
                        collector.process.kill()
            with Agent("collect", "--json", "--listen", f"localhost:{port}", stdout=output) as collector:
                code, summary = agent.stop()
                assert collector.stop()[0] == 0
        matched, passed, lost = totals(summary)
        assert (code, matched, lost) == (0, load.opens, {})
        assert 0 < moments[0].arrived <= moments[-1].arrived < sum(counts().values()) == passed
        latest, again = {}, 0
        for alert in alerts():  # as README tells: what is not above the agent's latest sequence is a double
            again += alert["sequence"] <= latest.get(alert["agent"], 0)
            latest[alert["agent"]] = max(latest.get(alert["agent"], 0), alert["sequence"])
        assert again == len(alerts()) - len(counts()) > 0
        assert {sequence for _, sequence in counts()} == set(range(1, max(latest.values()) + 1)) and len(latest) == 1
        figures(kills=len(moments), shown_before_the_first=moments[0], before_the_last=moments[-1], opens=load.opens, matched=matched,
                passed=passed, shown_once=sum(counts().values()), alerts=len(counts()), shown_twice=again, lost=0)

    @pytest.mark.parametrize("how", ["a port that nobody serves", "a stream that is read"])
    def test_a_collector_that_accepts_and_never_answers(self, tmp_path, how):
        """In the place of one that does; to the end, and with that one in its place afterwards."""
        close_timeout = length(1.0, traceleft.CLOSE_TIMEOUT)
        short = SCRIPT if SOAK else with_constants(tmp_path / "script.py", CLOSE_TIMEOUT=close_timeout)
        for ends in (False, True):
            names, log, port = self.files(tmp_path, 5), tmp_path / f"received {ends}", free_port()
            spec = write_spec(tmp_path / "spec", many_filters(grpc_spec(port), names))
            with Agent("trace", "--spec", spec, "--collector-insecure", "--summary", "-", script=SCRIPT if ends else short) as agent, \
                    contextlib.ExitStack() as stack:
                with Load(*names) as load:
                    with Sink(log, port) as sink:
                        wait_until(lambda: sink.alerts(), "the first alerts")  # noqa: B023
                    before = moment(load, sink.total)
                    silent = socket.create_server(("localhost", port)) if how.startswith("a port") else \
                        Sink(tmp_path / "none", port, delay=1000)
                    stack.callback(silent.close if how.startswith("a port") else silent.kill)
                    time.sleep(length(1.5, 30))
                    during = moment(load, sink.total)
                if ends:
                    stack.close()
                    stack.enter_context(Sink(log, port))
                begin = time.monotonic()
                code, output = agent.stop()
                took = time.monotonic() - begin
                after = moment(load, sink.total)
            matched, passed, lost = totals(output)
            assert code == 0 and matched == load.opens and took < (traceleft.CLOSE_TIMEOUT if ends else close_timeout) + 3
            assert ends or took > close_timeout
            assert 0 < before.arrived == during.arrived and before.opens < during.opens
            assert passed == after.arrived + sum(lost.values())
            assert set(lost) <= {"not_acknowledged"} and bool(lost) == (not ends) == (after.arrived == before.arrived)
            assert any("were not acknowledged and are lost" in line for line in agent.stderr) != ends
            figures(replaced=ends, received_before=before, during=during, after=after, passed=passed, lost=lost, end_took=f"{took:.1f} s")

    def test_a_dead_connection_is_told_from_a_slow_collector(self, generated, monkeypatch, capsys):
        """By pings, which the one does not answer and the other does, and not by the time that a stream may take."""
        assert traceleft.KEEPALIVE_TIME_MS + traceleft.KEEPALIVE_TIMEOUT_MS < 1000 * traceleft.ACK_TIMEOUT
        for name, short in (("KEEPALIVE_TIME_MS", 300), ("KEEPALIVE_TIMEOUT_MS", 400), ("ACK_TIMEOUT", DEADLINE)):
            monkeypatch.setattr(traceleft, name, length(short, getattr(traceleft, name)))
        moments = []
        with ProtoServer(generated, delay=length(1.5, 9.5)) as server, Proxy(server.port) as proxy:
            aggregator = Aggregator(grpc_spec(proxy.address), insecure=True)
            channel = aggregator.channels["1"]
            for dead in (False, True, False):
                proxy.mute = proxy.connections if dead else 0
                aggregator.add(an_open())
                aggregator.flush(1.0)
                before = channel.figures()["failures"]
                wait_until(lambda: channel.figures()["failures"] > before if dead else not channel.figures()["queued"],  # noqa: B023
                           "an outcome")
                moments.append((aggregator.accounts["open-0"].delivered, channel.figures()["failures"]))
            aggregator.close()
        assert moments == [(1, 0), (1, 1), (3, 1)] and channel.batch_size == traceleft.MAX_STREAM_ALERTS
        dead, again = capsys.readouterr().err.splitlines()
        assert re.search(r": UNAVAILABLE: .*(ping|keepalive)", dead) and "acknowledges again" in again
        figures(answer_takes_seconds=length(1.5, 9.5), delivered_and_failures=moments, said=dead)

    def test_packets_are_dropped(self, tmp_path):
        """Two network namespaces; packets to the other's address go to nobody for a while, until streams have failed."""
        script = SCRIPT if SOAK else with_constants(tmp_path / "script.py", ACK_TIMEOUT=0.4, BACKOFF_MAX=traceleft.BACKOFF_MIN)
        names, addresses, log = self.files(tmp_path, 5), ("169.254.77.1", "169.254.77.2"), tmp_path / "received"
        holders = [subprocess.Popen(["unshare", "--net", "sleep", "1000"]) for _ in addresses]
        inside = [["nsenter", f"--net=/proc/{holder.pid}/ns/net"] for holder in holders]

        def ip(side, *arguments):
            subprocess.run([*inside[side], "ip", *arguments], check=True)

        try:
            for holder in holders:
                own = os.readlink("/proc/self/ns/net")
                wait_until(lambda holder=holder, own=own: os.readlink(f"/proc/{holder.pid}/ns/net") != own, "its namespace")
            ip(0, "link", "add", "v0", "type", "veth", "peer", "name", "v1", "netns", str(holders[1].pid))
            for side, address in enumerate(addresses):
                ip(side, "link", "set", "lo", "up")
                ip(side, "addr", "add", f"{address}/30", "dev", f"v{side}")
                ip(side, "link", "set", f"v{side}", "up")
            spec = grpc_spec(50051, {"path": f"{addresses[1]}:50051"})
            spec = write_spec(tmp_path / "spec", many_filters(spec, names))
            with Sink(log, 50051, addresses[1], prefix=inside[1]) as sink, \
                    Agent("trace", "--spec", spec, "--collector-insecure", "--summary", "-", prefix=inside[0], script=script) as agent:
                with Load(*names) as load:
                    wait_until(lambda: sink.received()[0], "the first alerts")
                    for side in (0, 1):
                        ip(side, "neigh", "replace", addresses[1 - side], "lladdr", "02:00:00:00:00:99", "dev", f"v{side}")
                    time.sleep(0.3)
                    before = moment(load, sink.total)
                    time.sleep(length(1.5, 30))
                    during = moment(load, sink.total)
                    assert any("are kept and sent again" in line for line in agent.stderr)  # TCP alone has not bridged it
                    for side in (0, 1):
                        ip(side, "neigh", "del", addresses[1 - side], "dev", f"v{side}")
                    wait_until(lambda: sink.total() > before.arrived, "an alert after that")
                code, output = agent.stop()
                counts, doubles = sink.received()
        finally:
            for holder in holders:
                holder.kill()
                holder.wait()
        matched, passed, lost = totals(output)
        assert (code, matched, lost) == (0, load.opens, {})
        assert 0 < before.arrived == during.arrived < sum(counts.values()) == passed and before.opens < during.opens
        figures(said=agent.stderr[1], seconds_without_packets=length(1.5, 30), received_before=before, during=during, opens=load.opens, matched=matched,
                passed=passed, received_once=sum(counts.values()), lost=0, alerts_sent_twice=doubles)

    @pytest.mark.parametrize("server, said", [
        ("foreign", "CERTIFICATE_VERIFY_FAILED"),
        ("expired", "certificate has expired|CERTIFICATE_VERIFY_FAILED"),  # as grpcio's version says it
        ("elsewhere", "Hostname Verification Check failed|not in peer certificate"),
        ("server with clients", "UNAVAILABLE"),
    ], ids=["wrong CA", "expired", "wrong name", "missing client certificate"])
    def test_tls(self, generated, certificates, monkeypatch, capsys, server, said):
        """All is well, then not, then well again, and at the end not."""
        monkeypatch.setattr(traceleft, "CLOSE_TIMEOUT", 0.3)
        monkeypatch.setattr(traceleft, "BACKOFF_MAX", traceleft.BACKOFF_MIN)
        name, _, clients = server.partition(" with ")
        port, received, moments = free_port(), 0, []
        aggregator = Aggregator(grpc_spec(port, {"tls": {"ca": f"{certificates}/ca.pem"}}))
        channel = aggregator.channels["1"]
        for good in (True, False, True, False):
            credentials = server_credentials(certificates) if good else server_credentials(certificates, name, bool(clients))
            with ProtoServer(generated, port, credentials) as receiver:
                failures = channel.figures()["failures"]
                for _ in range(3):
                    aggregator.add(an_open())
                    aggregator.flush(1.0)
                wait_until(lambda: not channel.figures()["queued"] if good else  # noqa: B023
                           channel.figures()["failures"] > failures + 1, "delivered" if good else "errors")  # noqa: B023
                received += len(receiver.metrics)
                moments.append((aggregator.accounts["open-0"].passed, received))
                if len(moments) == 4:
                    aggregator.close()
        assert moments == [(3, 3), (6, 3), (9, 9), (12, 9)] and aggregator.summary()["balanced"]
        assert aggregator.accounts["open-0"].lost == {"not_acknowledged": 3}
        first, well, again, end = capsys.readouterr().err.splitlines()
        assert re.search(said, first) and re.search(said, again)
        assert "acknowledges again" in well and "3 alerts were not acknowledged and are lost" in end
        figures(passed_and_received=moments, lost=aggregator.accounts["open-0"].lost, said=re.search(said, first)[0])

    def test_the_disk_is_full_and_then_free(self, tmp_path):
        names, disk = self.files(tmp_path, 5), tmp_path / "disk"
        disk.mkdir()
        spec = a_spec(channel={"id": "1", "type": "file", "path": f"{disk}/log"})
        mounted = ["unshare", "-m", "sh", "-c", f'mount -t tmpfs -o size=256k t {disk} && exec "$@"', "sh"]
        with Agent("trace", "--spec", write_spec(tmp_path / "spec", many_filters(spec, names)), "--summary", "-", prefix=mounted) as agent:
            folder = os.open(f"/proc/{agent.process.pid}/root{disk}", os.O_RDONLY)  # stays when the namespace is gone
            with Load(*names) as load:
                wait_until(lambda: os.stat("log", dir_fd=folder).st_size, "the first records")
                before = moment(load, lambda: written("log", folder))
                fill = os.open("fill", os.O_WRONLY | os.O_CREAT, dir_fd=folder)
                wait_until(lambda: self.fills(fill) and any("No space left on device" in line for line in agent.stderr), "a full disk")
                full = os.stat("log", dir_fd=folder).st_size
                begin = moment(load, lambda: written("log", folder))
                time.sleep(length(2, 30))
                during = moment(load, lambda: written("log", folder))
                assert os.stat("log", dir_fd=folder).st_size - full < 4096
                os.close(fill)
                os.unlink("fill", dir_fd=folder)
                wait_until(lambda: any("works again" in line for line in agent.stderr), "it works again")
            code, output = agent.stop()
            with os.fdopen(os.open("log", os.O_RDONLY, dir_fd=folder)) as file:
                count, told = logged(file.read())
            os.close(folder)
        matched, passed, lost = totals(output)
        assert (code, matched, count, told, lost) == (0, load.opens, passed, 0, {})
        assert 0 < before.arrived <= begin.arrived <= during.arrived < count and begin.opens < during.opens
        figures(seconds_full=length(2, 30), written_before=before, when_it_was_full=begin, at_the_end_of_that=during, opens=load.opens,
                matched=matched, passed=passed, written=count, lost=0)

    FAILING = r"""
        #define _GNU_SOURCE
        #include <dlfcn.h>
        #include <errno.h>
        #include <stdio.h>
        #include <stdlib.h>
        #include <string.h>
        #include <unistd.h>
        ssize_t write(int fd, const void *data, size_t size)
        {
            char link[32], path[4096] = "";
            snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
            if (!access(getenv("FAILS"), F_OK) && readlink(link, path, sizeof(path) - 1) > 0
                && !strncmp(path, getenv("FAILS_BELOW"), strlen(getenv("FAILS_BELOW")))) {
                errno = EIO;
                return -1;
            }
            return ((ssize_t (*)(int, const void *, size_t))dlsym(RTLD_NEXT, "write"))(fd, data, size);
        }
    """

    def test_the_disk_fails_and_then_works(self, tmp_path):
        """EIO, by a write(2) of our own between the agent and libc, for a log and a spool on one disk."""
        names, disk, fails, port = self.files(tmp_path, 5), tmp_path / "disk", tmp_path / "fails", free_port()
        disk.mkdir()
        library = tmp_path / "failing.so"
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, "-x", "c", "-", "-ldl"], input=self.FAILING, text=True, check=True)
        spec = many_filters(a_spec(channel={"id": "1", "type": "file", "path": f"{disk}/log"}), names)
        spec["channels"].append({**grpc_spec(port, {"id": "2", "spool": {"dir": f"{disk}/spool"}})["channels"][0]})
        spec["events"] += [{**member, "channel": "2", "output": {**member["output"], "format": "collector_spec_pb"}} for member in spec["events"]]
        environment = {"LD_PRELOAD": str(library), "FAILS": str(fails), "FAILS_BELOW": f"{disk}/"}

        def on_disk():
            return written(disk / "log"), sum(count for count, _ in self.spooled(disk / "spool").values())

        def both(load):
            log, spool = on_disk()
            return moment(load, lambda: log), moment(load, lambda: spool)

        def said(what):
            return [line for line in agent.stderr if what in line]

        with Agent("trace", "--spec", write_spec(tmp_path / "spec", spec), "--collector-insecure", "--summary", "-", env=environment) as agent:
            with Load(*names) as load:
                wait_until(lambda: all(on_disk()), "the first records")
                before = both(load)
                fails.touch()
                wait_until(lambda: len(said("Input/output error")) == 2, "both fail")
                begin = both(load)
                time.sleep(length(2.5, 30))
                during = both(load)
                fails.unlink()
                wait_until(lambda: len(said("traceleft: writing to")) == 2, "both work again")
            with Sink(tmp_path / "received", port) as sink:
                code, output = agent.stop()
            counts, doubles = sink.received()
        matched, passed, lost = totals(output)
        (log, told), received = logged((disk / "log").read_text()), sum(counts.values())
        assert (code, matched, lost, doubles, told) == (0, 2 * load.opens, {}, 0, 0) and passed == log + received and log == received
        for place, count in enumerate((log, received)):
            assert 0 < before[place].arrived <= begin[place].arrived == during[place].arrived < count and begin[place].opens < during[place].opens
        assert len(said("Input/output error")) == len(said("traceleft: writing to")) == 2
        figures(seconds=length(2.5, 30), written_before=before[0], spooled_before=before[1], log_while_it_fails=during[0],
                spool_while_it_fails=during[1], opens=load.opens, matched_by_two_filters_each=matched, passed=passed, written=log, received_from_the_spool=received)

    @staticmethod
    def fills(fd):
        """Writes until nothing more fits."""
        for size in (4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    os.write(fd, bytes(size))
        return True

    def test_the_log_is_renamed_removed_linked_and_truncated(self, tmp_path):
        folder = tmp_path / "logs"
        folder.mkdir()
        folder.chmod(0o1777)
        log, precious, names = folder / "log", tmp_path / "precious", self.files(tmp_path, 5)
        precious.write_text("")
        spec = a_spec(channel={"id": "1", "type": "file", "path": str(log)})
        texts, rounds, moments = [], length(1, 15), []

        def contents():
            for text in texts:
                if hasattr(text, "read"):
                    text.seek(0)
                yield text if isinstance(text, str) else text.read() if hasattr(text, "read") else text.read_text()

        def settled():
            """Between two seconds' records."""
            while True:
                size = log.stat().st_size if log.exists() else 0
                time.sleep(0.15)
                if log.exists() and log.stat().st_size > size > 0:
                    time.sleep(0.1)
                    return

        def rename():
            log.rename(folder / f"log.{len(texts)}")
            texts.append(folder / f"log.{len(texts)}")

        def remove():
            texts.append(log.open())
            log.unlink()

        def copy_and_truncate():
            texts.append(log.read_text())
            os.truncate(log, 0)

        def link():
            rename()
            log.symlink_to(precious)
            os.lchown(log, 1, 1)
            wait_until(lambda: any("another user's" in line for line in agent.stderr), "it is refused")
            log.unlink()

        def signal_it():
            rename()
            agent.process.send_signal(signal.SIGUSR1)

        steps = [*length((), (rename,)), remove, copy_and_truncate, link, signal_it] * rounds
        with Agent("trace", "--spec", write_spec(tmp_path / "spec", many_filters(spec, names)), "--summary", "-") as agent:
            with Load(*names) as load:
                for step in steps:
                    settled()
                    moments.append(moment(load, lambda: logged(log.read_text(), *contents())[0]))
                    step()
            code, output = agent.stop()
        matched, passed, lost = totals(output)
        count, told = logged(log.read_text(), *contents())
        for text in texts:
            text.close() if hasattr(text, "close") else None
        assert (code, matched, count, told, lost, precious.read_text()) == (0, load.opens, passed, 0, {}, "")
        arrived = [0, *(found.arrived for found in moments), count]
        assert all(before < after for before, after in zip(arrived, arrived[1:]))  # after each step something was written
        figures(steps=len(steps), written_before_the_first=moments[0], before_the_last=moments[-1], opens=load.opens, matched=matched,
                passed=passed, written=count, lost=0, through_the_link=0)

    def test_a_renamed_log_is_let_go_at_once_by_sigusr1(self, tmp_path):
        """Without one more record, before which the path would be looked at anyway."""
        log, name = tmp_path / "log", tmp_path / "f"
        spec = a_spec(f"filename == '{name}'", channel={"id": "1", "type": "file", "path": str(log)})
        with Agent("trace", "--spec", write_spec(tmp_path / "spec", spec)) as agent:
            descriptors = Path(f"/proc/{agent.process.pid}/fd")

            def opened():
                with contextlib.suppress(FileNotFoundError):
                    return {os.readlink(path) for path in descriptors.iterdir()} & {str(log), f"{log}.1"}

            name.touch()
            wait_until(lambda: log.exists() and written(log) == 1, "the record")
            log.rename(f"{log}.1")
            time.sleep(1.2)  # a tick does not do it
            assert opened() == {f"{log}.1"} and not log.exists()
            agent.process.send_signal(signal.SIGUSR1)
            wait_until(lambda: opened() == {str(log)}, "the new file is open, and the old one is not", 3)
            name.write_text("")
            code, _ = agent.stop()
        assert (code, written(log), written(f"{log}.1")) == (0, 1, 1)

    def test_sigterm_at_random_moments(self, tmp_path):
        names, moments = self.files(tmp_path, 5), length(3, 200)
        spec = write_spec(tmp_path / "spec", many_filters(a_spec(channel={"id": "1", "type": "file", "path": f"{tmp_path}/log"}), names, ""))
        found = [0, 0, 0, 0]
        with Load(*names) as load:
            for _ in range(moments):
                start = load.done_by(traceleft.boot_time())
                with Agent("trace", "--spec", spec, "--summary", "-") as agent:
                    ids, ready = program_ids(agent.process.pid), load.begun()
                    time.sleep(random.uniform(0, 1.5))
                    before, signalled = written(tmp_path / "log"), load.begun()
                    code, output = agent.stop(signal.SIGTERM)
                end = load.begun()
                matched, passed, lost = totals(output)
                count, told = logged((tmp_path / "log").read_text()) if matched else (0, 0)
                assert signalled - load.each_round - ready <= matched <= end - start and before <= signalled - start
                (tmp_path / "log").unlink()
                assert ids and (code, lost, count, told) == (0, {}, passed, 0)
                assert not any("Traceback" in line for line in agent.stderr)
                wait_until(lambda ids=ids: not programs_left(ids), "its programs are gone")
                for place, number in enumerate((max(signalled - ready, 0), before, matched, count)):
                    found[place] += number
        figures(moments=moments, opened_from_ready_to_signal=found[0], written_before_the_signal=found[1], matched=found[2], written=found[3],
                lost=0, programs_left_attached=0)

    @staticmethod
    def spooled(folder):
        """The alerts in a spool, as those of Sink.alerts(); those that are acknowledged may be among them."""
        found = {}
        for path in sorted(folder.glob("*.spool")):
            with contextlib.suppress(FileNotFoundError):  # acknowledged meanwhile
                for _, entry in read_segment(path):
                    if entry is None:  # torn
                        continue
                    metric = traceleft.build_wire()["Metric"].FromString(entry.data)
                    found[metric.Agent, metric.Sequence] = metric.Count, metric.Time
        return found

    @pytest.mark.parametrize("collects", [False, True], ids=["no collector", "a collector"])
    def test_kill_9_of_the_agent(self, tmp_path, collects):
        """What had been counted at a tick is in the spool or at the collector; what came after the last tick is gone. That
        there was a tick tells a file, in which the last filter's record of it is."""
        port, names, log, spool = free_port(), self.files(tmp_path, 20), tmp_path / "received", tmp_path / "spool"
        spec, witness = many_filters(grpc_spec(port, {"spool": {"dir": str(spool)}}), names, ""), tmp_path / "ticks"
        spec["channels"].append({"id": "2", "type": "file", "path": str(witness)})
        spec["events"].append({**a_spec(f"filename == '{names[0]}'")["events"][0], "channel": "2"})
        spec = write_spec(tmp_path / "spec", spec)
        kept, gone, latest = {}, 0, 0.0
        kills = length(1, 20)
        collector = Sink(log, port, delay=0.003) if collects else contextlib.nullcontext()
        to_boot = traceleft.boot_time() - time.time()
        with Load(*names) as load, collector as sink:

            def new():
                """What this run has brought to safety: first the spool, for what leaves it is at the collector."""
                found = self.spooled(spool)
                found.update(sink.alerts() if sink else {})
                return {key: alert for key, alert in found.items() if key not in kept}

            def ticks(alerts):
                """Of these alerts: when there is one of each filter, in order."""
                return sorted(at for at, count in collections.Counter(at for _, at in alerts.values()).items() if count == len(names))

            for _ in range(kills):
                start = load.done_by(traceleft.boot_time())
                with Agent("trace", "--spec", spec, "--collector-insecure") as agent:
                    ids, ready = program_ids(agent.process.pid), load.begun()
                    wait_until(lambda: len(ticks(new())) > 1, "two ticks")
                    time.sleep(random.uniform(0, 1.5))
                    agent.process.kill()
                    agent.process.wait()
                end, now = load.begun(), time.time()
                assert ids
                wait_until(lambda ids=ids: not programs_left(ids), "its programs are gone")
                alerts = new()
                numbers = sorted(sequence for _, sequence in alerts)
                assert len({name for name, _ in alerts}) == 1 and numbers == list(range(1, len(numbers) + 1))
                *earlier, before_last, last = ticks(alerts)
                assert 0 < witness.read_text().count("\n") <= len(earlier) + 2
                witness.unlink()
                count = sum(count for count, _ in alerts.values())
                assert load.done_by(before_last + to_boot) - ready <= count <= end - start
                kept.update(alerts)
                gone, latest = gone + end - load.done_by(last + to_boot), max(latest, now - last)
        with Sink(log, port) as sink, Agent("trace", "--spec", spec, "--collector-insecure", "--summary", "-") as agent:
            wait_until(lambda: kept.keys() <= sink.alerts().keys(), "all that was kept")
            code, output = agent.stop()
            received, doubles = sink.alerts(), sink.received()[1]
        own = {name for name, _ in received} - {name for name, _ in kept}
        assert code == 0 and totals(output)[2] == {} and len(own) <= 1 and (collects or not doubles)
        assert {key: alert for key, alert in received.items() if key[0] not in own} == kept
        assert len({name for name, _ in kept}) == kills
        figures(kills=kills, opens=load.opens, alerts_kept=len(kept), events_kept=sum(count for count, _ in kept.values()),
                received=sum(count for count, _ in received.values()), sent_twice=doubles, sequences_missing=0,
                opened_after_the_last_ticks=gone, longest_after_a_tick=f"{latest:.2f} s", programs_left_attached=0)

    def test_sigstop_under_load(self, tmp_path):
        names, seconds = self.files(tmp_path, 5), length(2, 10)
        spec = many_filters(a_spec(channel={"id": "1", "type": "file", "path": f"{tmp_path}/log"}), names)
        with Agent("trace", "--spec", write_spec(tmp_path / "spec", spec), "--summary", "-") as agent:
            with Load(*names, processes=2) as load:
                wait_until(lambda: written(tmp_path / "log"), "the first records")
                agent.process.send_signal(signal.SIGSTOP)
                time.sleep(0.1)
                before = moment(load, lambda: written(tmp_path / "log"))
                time.sleep(seconds)
                during = moment(load, lambda: written(tmp_path / "log"))
                agent.process.send_signal(signal.SIGCONT)
                time.sleep(0.5)
            code, output = agent.stop()
        matched, passed, lost = totals(output)
        count, told = logged((tmp_path / "log").read_text())
        assert (code, matched, count, told, lost) == (0, load.opens, passed, 0, {})
        assert 0 < before.arrived == during.arrived < count and before.opens < during.opens
        figures(seconds_stopped=seconds, written_before=before, at_the_end_of_it=during, opens=load.opens, matched=matched, passed=passed,
                written=count, lost=0)

    def test_memory_under_full_load(self, programs, tmp_path):
        """Two processes at full rate, groups included; what is held grows neither with the events nor with the ticks, of which
        the short form has ten a second."""
        n, seconds, script = length(15_000, 150_000), length(2.5, 600), SCRIPT
        if not SOAK:
            script = with_constants(tmp_path / "script.py")
            script.write_text(script.read_text().replace("sys.exit", """
import selectors
boot_time, select = traceleft.boot_time, selectors.DefaultSelector.select
traceleft.boot_time = lambda: 10 * boot_time()
selectors.DefaultSelector.select = lambda self, timeout=None: select(self, timeout and timeout / 10)
sys.exit"""))
        rotate = {"max_bytes": length(5_000, 100_000), "keep": 2, "gzip": True}
        spec = a_spec(channel={"id": "1", "type": "file", "path": f"{tmp_path}/log", "rotate": rotate})
        spec["events"] = [{**spec["events"][0], "id": name, "rule": f"filename == '{tmp_path}/f'",
                           "function": {"id": "sigma", "parameters": parameters}}
                          for name, parameters in (("all", "frequency=100"), ("by", "frequency=3;by=pid,comm"))]
        opens = 0

        def flood(seconds):
            """The sizes in between."""
            nonlocal opens
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                floods = [subprocess.Popen([programs["opens"], tmp_path / "f", str(n)]) for _ in range(2)]
                assert [process.wait(length(1, 10) * DEADLINE) for process in floods] == [0, 0]
                opens += 2 * n
                yield resident_kib(agent.process.pid)

        with Agent("trace", "--spec", write_spec(tmp_path / "spec", spec), "--summary", "-", script=script) as agent:
            subprocess.run([programs["opens"], tmp_path / "f", "1000"], check=True)
            time.sleep(1.2)
            before = Moment(1000, written(tmp_path / "log"))
            collections.deque(flood(1.0), 0)  # with the first rotations
            sizes = [resident_kib(agent.process.pid), *flood(seconds)]
            code, output = agent.stop()
        matched, _, lost = totals(output)
        assert (code, matched, lost) == (0, 2 * (opens + 1000), {}) and before.arrived == 1000 // 100 + 1000 // 3
        assert max(sizes) - sizes[0] < length(256, 2048) and (SOAK or (tmp_path / "log.2.gz").exists()), sizes
        figures(seconds=seconds, written_before=before, opens=opens + 1000, matched_by_each_of_two_filters=matched // 2,
                KiB_at_first=sizes[0], KiB_at_most=max(sizes), KiB_at_last=sizes[-1])

    @staticmethod
    def use(filters):
        """What is made of filters: tables for the kernel, and answers of this engine."""
        traceleft.Tables(filters)
        for member in filters:
            if member.rule is not None and member.event == "open":
                assert member.rule.matcher()(an_open()) in (True, False)

    def test_mutated_specs_and_rules(self, tmp_path):
        """Each is accepted, and then can be used; or is refused with located errors. One in twenty also by the command."""
        mutator, count, batch = Mutator(random.Random(20261124)), length(4000, 100_000), length(200, 500)
        outcomes, files, slowest = {"accepted": 0, "refused": 0, "by_the_command": 0}, {}, 0.0
        for number in range(count):
            data = mutator.spec()
            begin = time.monotonic()
            with no_hang(data):
                try:
                    spec = parse_spec(traceleft.parse_json(data))
                    self.use(spec.filters)
                    outcome = "accepted"
                except SpecError as error:
                    assert error.errors and all(error.errors), data
                    assert all(text.isprintable() for line in error.errors for text in line.split("\n")), data
                    outcome = "refused"
            slowest = max(slowest, time.monotonic() - begin)
            outcomes[outcome] += 1
            if number % 20 == 0:
                files[tmp_path / f"{number}.json"] = outcome
                (tmp_path / f"{number}.json").write_bytes(data)
            if len(files) == batch:
                self.check(files)
                outcomes["by_the_command"] += len(files)
                files.clear()
        assert min(outcomes.values()) > 50 and outcomes["by_the_command"] == count // 20
        figures(**outcomes, tracebacks=0, hangs=0, slowest=f"{slowest * 1000:.0f} ms")

    def check(self, files):
        """The command says the same of these files, with a line for each error and a caret under the place in a rule."""
        done = run("check", *files)
        errors = re.findall(r"(traceleft: (\S+\.json): (warning: )?.+\n(?:  .*\n +\^\n)?)", done.stderr)
        assert "".join(text for text, *_ in errors) == done.stderr and done.stderr.replace("\n", "").isprintable(), done.stderr
        refused = {path for _, path, warning in errors if not warning}
        assert {str(path): outcome for path, outcome in files.items()} == {
            **dict.fromkeys(refused, "refused"), **{line[:-len(": ok")]: "accepted" for line in done.stdout.splitlines()}}
        assert done.returncode == 2 and refused

    edits = st.lists(st.tuples(st.integers(0, 200), st.integers(0, 4), st.one_of(
        st.sampled_from(["", " ", "(", ")", " and ", " not ", " in ", "==", "<", "'", '"', "\\", "~", "&", ",", "[", "]", "0", "-", "ret", "comm",
                         "uid", "exe", "path", "glob(comm, '['", "regex(comm, '(a+)+$')", "0x", "1e9", "9" * 30, "{", "lambda: 0", "x if y else z",
                         ":=", "*", "\n", "\0", "\udcff", "\u202e", "é"]), st.text(max_size=3))), max_size=4)

    @settings(max_examples=length(200, 20_000), deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(TestRulesGenerated.rules, edits)
    def test_mutated_grammatical_rules(self, rule, edits):
        """Rules that the grammar makes, with some characters changed: accepted and of use, or refused with the place."""
        for at, length, text in edits:
            rule = rule[:at % (len(rule) + 1)] + text + rule[at % (len(rule) + 1) + length:]
        with no_hang(rule):
            try:
                self.use(parse_spec(a_spec(rule)).filters)
            except SpecError as error:
                (text,) = error.errors
                place, _, shown = text.partition("\n")
                assert place.startswith("events[0].rule: ") and text.replace("\n", "").isprintable()
                assert not shown or re.fullmatch(r"  .*\n +\^", shown)


@contextlib.contextmanager
def no_hang(data):
    """Fails, and shows the input, when the block takes longer than anything may."""
    def fail(number, frame):
        raise AssertionError(f"not done after {DEADLINE} s: {data!r}")

    before = signal.signal(signal.SIGALRM, fail)
    signal.setitimer(signal.ITIMER_REAL, DEADLINE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Mutator:
    """Makes specs out of the examples: a few changes each, in the text, in the structure or in a rule."""

    WORDS = ("and", "or", "not", "in", "==", "!=", "<", "<=", "(", ")", "[", "]", ",", "&", "|", "^", "~", "-", "'", '"', "\\", "%s",
             "filename", "flags", "arg1", "arg9", "ret", "pid", "comm", "path", "exe", "saddr", "0", "-1", "1 << 3", "O_CREAT", "ENOENT",
             "startswith(filename, '/')", "regex(filename, '(a+)+$')", "glob(comm, '[a-')", "'x' in comm", "net('10.0.0.0/8')", "lambda: 0",
             "__import__('os')", "\x00", "\n", "\t", "é", "\udcff", "\u202e", "9" * 30, "1e9", "None", "True", "'" * 3, "{}", "f'{x}'", "#",
             "filename.x", "x if y else z", "[i for i in x]", "print()", "a := 1", "*", "**", "@", ";", ":", "...")
    ENDS = (" and ret >= 0", " or not uid == 0", " and (flags & O_CREAT or comm in ('a', 'b'))", " and ret", " or", " and regex(comm, '^a*b')",
            " and not startswith(comm, '\\udcff')", " or ~ret & 7 == 7", " and 0 < pid <= 9 < tid", " and path == exe", " and ret == 'x'")
    VALUES = (None, True, False, 0, -1, 1.5, 1 << 70, "", "x", "\x00", "1", [], {}, [[]], [None], {"id": 1}, "file", "grpc", "otlp", "-", "open",
              "close", "connect_v4", "frequency=0", "by=pid;threshold=9", "localhost:1", "\u202e\x1b[2J", "a" * 5000)

    def __init__(self, source):
        self.random = source
        self.seeds = [json.loads(path.read_text()) for path in EXAMPLES]
        assert self.seeds

    def spec(self):
        value = json.loads(json.dumps(self.random.choice(self.seeds)))
        kind = self.random.randrange(4)
        if kind == 0:
            return self.bytes(json.dumps(value).encode())
        for _ in range(self.random.choice((1, 1, 1, 2, 3))):
            self.rule(value) if kind > 1 else self.structure(value)
        return json.dumps(value).encode()

    def bytes(self, data):
        """Some bytes changed, removed, doubled."""
        data = bytearray(data)
        for _ in range(self.random.randint(1, 5)):
            at = self.random.randrange(len(data))
            piece = self.random.choice((b"", bytes([self.random.randrange(256)]), bytes(data[at:at + 20]), b'"', b"{", b"]", b"\\u0000"))
            data[at:at + self.random.randint(0, 3)] = piece
        return bytes(data)

    def rule(self, value):
        """A rule's words exchanged, left out, put in."""
        event = self.random.choice(value["events"])
        words = re.findall(r"\w+|'[^']*'|\s+|.", event.get("rule", ""))
        for _ in range(self.random.choice((1, 1, 2, 4))):
            if self.random.random() < 0.5:
                words.append(self.random.choice(self.ENDS) if words else "ret >= 0")
                continue
            at = self.random.randint(0, len(words))
            words[at:at + self.random.randint(0, 2)] = [self.random.choice((" ", "")) + self.random.choice(self.WORDS) + " "]
        event["rule"] = "".join(words)

    def structure(self, value):
        """One member or element somewhere exchanged, left out, renamed or put in."""
        places = []

        def walk(at):
            for key in list(at) if isinstance(at, dict) else range(len(at)):
                places.append((at, key))
                if isinstance(at[key], (dict, list)):
                    walk(at[key])
        walk(value)
        if not places:
            return
        at, key = self.random.choice(places)
        what = self.random.randrange(4)
        if what == 0:
            at[key] = copy.deepcopy(self.random.choice(self.VALUES))
        elif what == 1:
            del at[key]
        elif isinstance(at, dict):
            at[key + "s" if what == 2 else self.random.choice(("id", "rule", "tls", "rotate", "spool", "format"))] = at[key]
        else:
            at.append(at[key])


class TestTerminal:
    pytestmark = live

    def on_terminal(self, *arguments, seconds):
        """What the command writes to a terminal as its stdout and stderr."""
        master, slave = pty.openpty()
        fcntl.ioctl(slave, 0x5414, struct.pack("HHHH", 24, 100, 0, 0))  # TIOCSWINSZ
        process = subprocess.Popen([sys.executable, SCRIPT, *map(str, arguments)], stdin=slave, stdout=slave, stderr=slave)
        os.close(slave)
        output, end = b"", time.monotonic() + seconds
        try:
            while time.monotonic() < end + DEADLINE:
                if select.select([master], [], [], 0.1)[0]:
                    try:
                        output += os.read(master, 65536)
                    except OSError:
                        break
                if time.monotonic() > end and process.poll() is None:
                    process.send_signal(signal.SIGINT)
                    end += DEADLINE
                if process.poll() is not None and not select.select([master], [], [], 0)[0]:
                    break
        finally:
            process.kill()
            process.wait()
            os.close(master)
        return output.decode(), process.returncode

    def test_status_line(self, tmp_path):
        spec = a_spec(name="mkdir", channel={"id": "1", "type": "file", "path": str(tmp_path / "log")})
        shown, code = self.on_terminal("trace", "--spec", write_spec(tmp_path / "spec", spec), seconds=3)
        assert code == 0
        assert re.search(r"\r\x1b\[Kmatched \d+/s  passed \d+/s  alerts \d+/s  lost \d+/s", shown)

    def test_printing_shows_no_status_line_in_between(self):
        shown, code = self.on_terminal("trace", f"{os.getpid()}:mkdir", seconds=2.5)
        assert code == 0 and "/s  passed" not in shown


class TestProject:
    def test_the_readmes_examples_are_valid(self):
        readme = (HERE / "README.md").read_text()
        blocks = re.findall(r"```json\n(.*?)```", readme, re.S)
        assert blocks
        for block in blocks:
            parse_spec(json.loads(block))
        code = re.findall(r"```python\n(.*?)```", readme, re.S)
        assert code
        for block in code:
            compile(block, "README.md", "exec")

    @pytest.mark.parametrize("arguments", [("events", "open"), ("explain", HERE / "spec" / "patterns.json")])
    def test_the_readme_shows_what_is_printed(self, arguments):
        shown = "".join(f"    {line}\n" for line in run(*arguments).stdout.splitlines())
        assert shown and shown in (HERE / "README.md").read_text()

    def test_rules_in_the_readme_parse(self):
        readme = (HERE / "README.md").read_text()
        rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \|", readme, re.M)
        assert len(rows) >= 6
        for event, rule in rows:
            parse_rule(rule.replace("\\|", "|"), EVENT_TYPES[event])

    def test_printing_to_a_stream_without_utf8(self, tmp_path):
        spec = write_spec(tmp_path / "é.json", a_spec(rule="filename == 'é'"))
        done = run("check", spec, env={"PYTHONIOENCODING": "ascii"})
        assert (done.returncode, done.stdout) == (0, f"{tmp_path}/\\xe9.json: ok\n")
        assert "rule filename == '\\xe9'" in run("explain", spec, env={"PYTHONIOENCODING": "ascii"}).stdout

    @pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
    def test_closed_streams(self, tmp_path, closed):
        spec = write_spec(tmp_path / "spec", a_spec(channel={"id": "1", "type": "file", "path": str(tmp_path / "log")}))
        trace = f"cd {tmp_path} && {sys.executable} {SCRIPT} trace --spec {spec} --summary - --duration 1 {closed}"
        assert subprocess.run(["sh", "-c", trace], timeout=DEADLINE).returncode == 0
        check = f"{sys.executable} {SCRIPT} check nope {closed}"
        assert subprocess.run(["sh", "-c", check], timeout=DEADLINE).returncode == 2
        assert {path.name for path in tmp_path.iterdir()} == {"spec", "log"}
        assert "traceleft: " not in (tmp_path / "log").read_text()

    @pytest.mark.parametrize("delay", [0.0, 0.02, 0.05, 0.1, 0.2, 0.4])
    def test_a_signal_during_start_up(self, delay):
        """From our first line on: before, the interpreter has not got so far, and that is not ours to change."""
        process = subprocess.Popen([sys.executable, SCRIPT, "trace", "mkdir"], stdout=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE, text=True)

        def handles_sigterm():
            caught = re.search(r"SigCgt:\s+(\w+)", Path(f"/proc/{process.pid}/status").read_text())[1]
            return int(caught, 16) >> (signal.SIGTERM - 1) & 1

        wait_until(handles_sigterm, "the first lines have run")
        time.sleep(delay)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=DEADLINE)
        assert "Traceback" not in errors
        assert process.returncode == 0
