#!/usr/bin/env python3
"""Whether the one file of `make dist` does its work on this host, as root: live_check.py FILE [--refused TEXT].

Runs `doctor`, the walk-through with exact counts, the event table (each call made once and looked for to the letter), and
the same walk-through with a rule that Python evaluates and, where grpcio is, over a grpc channel. With --refused it has to
say in one line, with TEXT in it, that this host lacks something. Needs nothing but Python 3.9, and a directory to write to (TMPDIR). Each
line of the report begins with `pass`, `FAIL` or `figure`; the exit code is 0 when nothing failed.
"""

import ctypes
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DEADLINE = 400.0  # seconds that anything may take: an emulated machine is slow
BURSTS, BURST = 3, 2000

if len(sys.argv) > 1:
    DIST = os.path.abspath(sys.argv[1])
    sys.path.insert(0, DIST)  # it is a library too
import traceleft  # noqa: E402

# ----------------------------------------------------------------------------------------------------------------------
# The child: makes every call of the table once, through libc's function of that name where there is one
# ----------------------------------------------------------------------------------------------------------------------

LIBC_NAMES = {"pread64": "pread", "pwrite64": "pwrite"}
# What musl's open(), openat(), creat() and fcntl(F_SETFL) add; 0 with glibc, which adds nothing on a 64-bit machine
LARGEFILE = os.O_LARGEFILE
AT_FDCWD = -100
NULL = 0


class Calls:
    """Makes calls and notes what has to be printed of each."""

    def __init__(self):
        self.libc = ctypes.CDLL(None, use_errno=True)
        # musl 1.2.6, which is told by its new renameat2(), makes pwritev2 of pwrite
        musl_1_2_6 = hasattr(self.libc, "renameat2") and not hasattr(self.libc, "gnu_get_libc_version")
        self.by_number = {"pwrite64"} if musl_1_2_6 else set()
        self.made = []
        self.kept = []  # what the addresses point to

    def address(self, data):
        """The address of bytes, which stay there."""
        self.kept.append(ctypes.create_string_buffer(data, max(len(data), 1)))
        return ctypes.addressof(self.kept[-1])

    def pointers(self, *texts):
        """The address of a NULL-terminated array of strings."""
        return self.address(struct.pack(f"{len(texts) + 1}P", *map(self.address, (t.encode() + b"\0" for t in texts)), 0))

    def note(self, event, result, *shown):
        self.made.append((event, result, shown))
        return result

    def call(self, event, *args, shown=None, function=None):
        """Calls it; strings are passed as such. `shown` are the arguments as they are printed, where they differ."""
        name = function or LIBC_NAMES.get(event, event)
        plain = [arg.encode() if isinstance(arg, str) else ctypes.c_long(arg) for arg in args]
        if hasattr(self.libc, name) and event not in self.by_number:
            call = getattr(self.libc, name)
        else:
            call, plain = self.libc.syscall, [ctypes.c_long(traceleft.syscall_number(event)), *plain]
        call.restype = ctypes.c_long if call is self.libc.syscall or event == "mmap" or event.startswith("p") else ctypes.c_int
        result = call(*plain)
        return self.note(event, -ctypes.get_errno() if result == -1 else result, *(args if shown is None else shown))


def call_names(do, call):
    """Calls that are about names, in the current directory."""
    fd = call("open", "file", os.O_RDWR | os.O_CREAT, 0o640, shown=("file", os.O_RDWR | os.O_CREAT | LARGEFILE, 0o640))
    created = call("open", "created", 0o600, function="creat",
                   shown=("created", os.O_CREAT | os.O_WRONLY | os.O_TRUNC | LARGEFILE, 0o600))
    directory = call("open", AT_FDCWD, ".", os.O_RDONLY | os.O_DIRECTORY, function="openat",
                     shown=(".", os.O_RDONLY | os.O_DIRECTORY | LARGEFILE, 0))
    call("open", "missing", 0, 0, shown=("missing", LARGEFILE, 0))
    call("mkdir", "directory", 0o750)
    call("mkdirat", directory, "other", 0o700)
    call("chmod", "file", 0o4755)
    call("fchmod", fd, 0o600)
    call("fchmodat", directory, "file", 0o644, 0, shown=(directory, "file", 0o644))
    call("chown", "file", 1, 2)
    call("fchown", fd, 3, -1, shown=(fd, 3, 2**32 - 1))
    call("fchownat", directory, "file", 5, 6, 0x100)
    call("lchown", "file", 0, 0)
    call("access", "file", 4)
    call("faccessat", directory, "file", 4, 0, shown=(directory, "file", 4))
    call("truncate", "file", 0)
    call("ftruncate", fd, 6)
    call("fallocate", fd, 0, 0, 4096)
    call("utimensat", directory, "file", NULL, 0)
    call("setxattr", "missing", "user.x", NULL, 0, 0)
    call("removexattr", "missing", "user.x")
    call("link", "file", "linked")
    call("linkat", directory, "file", directory, "linked2", 0)
    call("symlink", "file", "symbolic")
    call("symlinkat", "file", directory, "symbolic2")
    space = do.address(b"\0" * 64)
    call("readlink", "symbolic", space, 64, shown=("symbolic", "file", 64))
    call("readlinkat", directory, "symbolic2", space, 64, shown=(directory, "symbolic2", "file", 64))
    call("rename", "linked", "renamed")
    call("renameat", directory, "linked2", directory, "renamed2")
    call("renameat2", directory, "renamed2", directory, "renamed3", 1)
    call("mknod", "fifo", 0o10600, 0)
    call("mknodat", directory, "fifo2", 0o10600, 0)
    call("unlink", "renamed")
    call("unlinkat", directory, "renamed3", 0)
    call("rmdir", "other")
    call("chdir", "directory")
    call("fchdir", directory)
    call("chroot", "missing")
    call("pivot_root", "missing", "missing")
    call("mount", "none", "missing", "tmpfs", 0, NULL)
    call("umount2", "missing", 0)
    call("fsync", fd)
    call("flock", fd, 8)
    call("close", created)
    call("close", -1)
    return fd, directory


def call_data(do, call, fd, directory):
    """Calls that are about data, memory and descriptors."""
    hello, space = do.address(b"hello\n"), do.address(b"\0" * 512)
    call("write", fd, hello, 6, shown=(fd, "hello\n", 6))
    call("pwrite64", fd, hello, 6, 6, shown=(fd, "hello\n", 6, 6))
    call("pread64", fd, space, 4, 1, shown=(fd, "ello", 4, 1))
    call("read", fd, space, 3, shown=(fd, "hel", 3))
    call("read", -1, space, 3, shown=(-1, "", 3))
    call("getdents64", directory, space, 512)
    call("sendfile", fd, fd, NULL, 0)
    call("fcntl", fd, 1, 0)
    call("ioctl", fd, 0x5413, space)
    copy = call("dup", fd)
    call("dup2", fd, copy)
    call("dup3", fd, copy, os.O_CLOEXEC)
    call("memfd_create", "memory", 1)
    page = call("mmap", NULL, 4096, 3, 0x22, -1, 0)
    call("mprotect", page, 4096, 1)
    call("munmap", page, 4096)


def call_sockets(do, call):
    """Calls on sockets, and the events of a connection over each family that the loopback has."""
    space = do.address(b"\0" * 64)
    here = call("socket", 1, 1, 0)
    name = do.address(struct.pack("=H", 1) + b"s.sock\0")
    call("bind", here, name, 9, shown=(here, "s.sock", 9))
    call("listen", here, 5)
    call("fcntl", here, 4, os.O_NONBLOCK, shown=(here, 4, os.O_NONBLOCK | LARGEFILE))
    call("accept", here, NULL, NULL)
    call("accept4", here, NULL, NULL, socket.SOCK_CLOEXEC)  # without flags musl calls accept
    other = call("socket", 1, 1, 0)
    call("connect", other, name, 9, shown=(other, "s.sock", 9))
    call("sendto", other, do.address(b"ping"), 4, 0, NULL, 0, shown=(other, "ping", 4, 0, "", 0))
    call("shutdown", other, 2)
    datagrams = call("socket", 2, 2, 0)
    target = do.address(struct.pack("=H", 2) + struct.pack(">H", 9) + socket.inet_aton("127.0.0.1") + b"\0" * 8)
    call("sendto", datagrams, do.address(b"ping"), 4, 0, target, 16, shown=(datagrams, "ping", 4, 0, "127.0.0.1:9", 16))
    call("recvfrom", datagrams, space, 64, 0x40, NULL, NULL, shown=(datagrams, "", 64, 0x40, NULL, NULL))
    for family, host, kind in ((socket.AF_INET, "127.0.0.1", "v4"), (socket.AF_INET6, "::1", "v6")):
        call_tcp(do, family, host, kind)


def call_tcp(do, family, host, kind):
    try:
        server = socket.socket(family)
        server.bind((host, 0))
    except OSError:  # a host without IPv6
        return
    server.listen()
    client = socket.socket(family)
    client.connect(server.getsockname())
    accepted, _ = server.accept()
    netns = os.stat("/proc/self/ns/net").st_ino
    address = int.from_bytes(socket.inet_pton(family, host), "big")
    near, far = client.getsockname()[1], server.getsockname()[1]
    client.close()
    assert accepted.recv(1) == b""
    accepted.close()
    do.note(f"connect_{kind}", 0, address, address, near, far, netns)
    do.note(f"accept_{kind}", 0, address, address, far, near, netns)
    do.note(f"close_{kind}", 0, address, address, near, far, netns)
    do.note(f"close_{kind}", 0, address, address, far, near, netns)


def call_processes(do, call):
    """Calls that are about processes and users."""
    pid = os.getpid()
    call("execve", "missing", do.pointers("a", "b c"), NULL, shown=("missing", "a b c", NULL))
    call("execveat", AT_FDCWD, "missing", do.pointers("a"), NULL, 0, shown=(AT_FDCWD, "missing", "a", NULL, 0))
    call("kill", pid, 0)
    call("tkill", pid, 0)
    call("tgkill", pid, pid, 0)
    call("ptrace", 999, 0, NULL, 0)
    call("prctl", 3, 0, 0, 0, 0)
    call("unshare", 0)
    call("setns", -1, 0)
    call("seccomp", 99, 0, NULL)
    call("bpf", 999, NULL, 0)
    call("setuid", 0)
    call("setgid", 0)
    call("setreuid", 0, -1, shown=(0, 2**32 - 1))
    call("setregid", 0, -1, shown=(0, 2**32 - 1))
    call("setresuid", 0, 0, -1, shown=(0, 0, 2**32 - 1))
    call("setresgid", 0, 0, -1, shown=(0, 0, 2**32 - 1))
    call("setfsuid", 0)
    call("setfsgid", 0)
    call("setgroups", 0, NULL)
    forked = do.libc.fork()
    if not forked:
        os._exit(7)
    os.waitpid(forked, 0)
    do.note("fork", forked)
    call("lseek", 0, 0, 0)  # one that tracefs describes


def child():
    """Waits for a line on stdin, makes the calls in the current directory and prints them as JSON."""
    do = Calls()
    os.umask(0)
    print("waiting", flush=True)
    sys.stdin.readline()
    fd, directory = call_names(do, do.call)
    call_data(do, do.call, fd, directory)
    call_sockets(do, do.call)
    call_processes(do, do.call)
    print(json.dumps(do.made), flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# The parent: runs the file and compares
# ----------------------------------------------------------------------------------------------------------------------

failures = 0


def report(passed, what, detail=""):
    global failures
    failures += not passed
    print(f"{'pass' if passed else 'FAIL'} {what}{': ' + detail if detail else ''}", flush=True)


class Agent:
    """`FILE trace ...` in the background, ready when the constructor returns."""

    def __init__(self, folder, *arguments):
        self.output, self.errors = Path(folder, "trace.out"), Path(folder, "trace.err")
        self.summary = Path(folder, "summary")
        self.process = subprocess.Popen([sys.executable, DIST, "trace", *arguments, "--summary", self.summary],
                                        stdout=self.output.open("wb"), stderr=self.errors.open("wb"))
        end = time.monotonic() + DEADLINE
        while "traceleft: ready" not in self.errors.read_text():
            if self.process.poll() is not None or time.monotonic() > end:
                self.process.kill()
                raise SystemExit(f"FAIL trace {arguments}: {self.errors.read_text()}")
            time.sleep(0.05)

    def stop(self):
        """Ends it as a user would; returns the summary, with its exit code."""
        self.process.send_signal(signal.SIGINT)
        code = self.process.wait(DEADLINE)
        return {**json.loads(self.summary.read_text()), "code": code, "stderr": self.errors.read_text()}


def check_doctor():
    begin = time.monotonic()
    done = subprocess.run([sys.executable, DIST, "doctor"], capture_output=True, text=True, timeout=DEADLINE)
    for line in done.stdout.splitlines():
        print(f"  {line}")
    report(done.returncode == 0 and not done.stderr, "doctor", f"exit {done.returncode} {done.stderr}".strip())
    counts = {name: int(count) for name, count in re.findall(r"(\w+) (\d+) instructions verified", done.stdout)}
    times = [float(seconds) for seconds in re.findall(r"loaded in ([\d.]+) s", done.stdout)]
    name = max(counts, key=counts.__getitem__, default="?")
    print(f"figure instructions {counts.get(name, 0)} {name}")
    print(f"figure load {max(times, default=0):.2f}")
    print(f"figure doctor {time.monotonic() - begin:.1f}")


def section5_spec(folder, path, rule=None, **more):
    """The spec of spec/aggregator-spec.json with a file and a channel of our own."""
    return {"channels": [{"id": "1", "type": "file", "path": f"{folder}/traceleft.log"}],
            "events": [{"name": "open", "channel": "1", "stream": "filesystem", "group": "system_metrics",
                        "rule": rule or f"arg1 == '{path}'",
                        "function": {"id": "sigma", "parameters": "frequency=100;threshold=0"},
                        "output": {"metrics": "alerts_per_sec", "format": "collector_spec_pb"}, **more}]}


def open_often(path):
    """BURSTS times BURST opens by another process, each burst in another second. Returns how many."""
    code = f"""
import os, time
for burst in range({BURSTS}):
    for _ in range({BURST}):
        os.close(os.open({path!r}, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666))
    time.sleep(1.1)
"""
    subprocess.run([sys.executable, "-S", "-c", code], check=True, timeout=DEADLINE)
    return BURSTS * BURST


def check_walk_through(folder):
    path = f"{folder}/a.txt"
    spec = section5_spec(folder, path)
    spec["events"].append({**spec["events"][0], "function": {"id": "sigma", "parameters": "frequency=7;by=pid,ret"}})
    Path(folder, "spec").write_text(json.dumps(spec))
    agent = Agent(folder, "--spec", f"{folder}/spec")
    made = open_often(path)
    summary = agent.stop()
    rows = summary["filters"]
    text = Path(folder, "traceleft.log").read_text()
    counts = [int(count) for count in re.findall(r"^COUNT: (\d+)$", text, re.M)]
    block = re.search(r'^EVENT: {Timestamp:\d+ ProgramID:0 Pid:\d+ Ret:\d+ Name:open Hash:\d+ Flags:0} '
                      rf'Filename "{re.escape(path)}" Flags {577 | os.O_CLOEXEC | LARGEFILE} Mode 438$', text, re.M)
    expected = [(made, made // 100, made - made // 100), (made, made // 7, made - made // 7)]
    found = [(row["matched"], row["passed"], row["folded"]) for row in rows]
    report(summary["code"] == 0 and summary["balanced"] and found == expected and not any(row["lost"] for row in rows)
           and sum(counts) == sum(row["passed"] for row in rows) and len(counts) == sum(row["alerts"] for row in rows)
           and bool(block), "walk-through", f"{made} opens, {found}, {len(counts)} alerts, balanced {summary['balanced']}"
           + ("" if summary["code"] == 0 else f", exit {summary['code']}: {summary['stderr']}"))


def check_python_rules(folder):
    path = f"{folder}/b.txt"
    spec = section5_spec(folder, path, rule=f"regex(filename, '^{re.escape(folder)}/b.txt$')")
    Path(folder, "spec").write_text(json.dumps(spec))
    agent = Agent(folder, "--spec", f"{folder}/spec")
    made = open_often(path)
    summary = agent.stop()
    row = summary["filters"][0]
    report(summary["code"] == 0 and summary["balanced"] and (row["matched"], row["passed"]) == (made, made // 100),
           "rules in Python", f"{made} opens, {row['matched']} matched, balanced {summary['balanced']}"
           + ("" if summary["code"] == 0 else f", exit {summary['code']}: {summary['stderr']}"))


def check_grpc(folder):
    """The walk-through over a grpc channel, to `FILE collect`."""
    try:
        grpc, protobuf = traceleft.import_optional("grpc"), traceleft.import_optional("google.protobuf")
    except traceleft.HostError:
        print("none grpc: no grpcio here")
        return
    received = Path(folder, "received")
    with received.open("wb") as output:
        collector = subprocess.Popen([sys.executable, DIST, "collect", "--listen", "127.0.0.1:0"], stdout=output,
                                     stderr=subprocess.PIPE, text=True)
    try:
        port = collector.stderr.readline().rpartition(":")[2].strip()
        path = f"{folder}/c.txt"
        spec = section5_spec(folder, path)
        spec["channels"] = [{"id": "1", "type": "grpc", "path": f"localhost:{port}"}]
        Path(folder, "spec").write_text(json.dumps(spec))
        agent = Agent(folder, "--spec", f"{folder}/spec", "--collector-insecure")
        made = open_often(path)
        summary = agent.stop()
    finally:
        collector.send_signal(signal.SIGINT)
        errors = collector.communicate(timeout=DEADLINE)[1]
    row, text = summary["filters"][0], received.read_text()
    report(summary["code"] == 0 and summary["balanced"] and row["matched"] == made and not row["lost"] and not errors
           and f"\ntotal {made // 100} in {row['alerts']} alerts from 1 host(s)\n" in f"\n{text}",
           "grpc", f"{made} opens, {text.splitlines()[-1:]} received, protobuf {protobuf.__version__}, "
           f"grpcio {grpc.__version__}{errors}")


def check_refused(text):
    """trace and doctor both have to end with exit code 3, the first with one line that has the text in it."""
    done = subprocess.run([sys.executable, DIST, "trace", "open"], capture_output=True, text=True, timeout=DEADLINE)
    report(done.returncode == 3 and done.stderr.count("\n") == 1 and text in done.stderr, "refused",
           f"exit {done.returncode}, {done.stderr.strip()}")
    done = subprocess.run([sys.executable, DIST, "doctor"], capture_output=True, text=True, timeout=DEADLINE)
    for line in done.stdout.splitlines():
        print(f"  {line}")
    report(done.returncode == 3 and text in done.stdout and not done.stderr, "doctor", f"exit {done.returncode}")


def expected_line(pid, event, result, shown):
    """What `trace` prints of a call, without the paths of descriptors."""
    made = traceleft.make_event(event, *shown, ret=result, pid=pid, program_id=42)
    return re.sub(r"<[^>]*>", "", traceleft.format_event(made)).rstrip()


def check_events(folder, what, names):
    """Every call of the child to the letter, hash and all, once and in order per event type."""
    place = Path(folder, what.replace(" ", "-"))
    place.mkdir()
    process = subprocess.Popen([sys.executable, "-S", os.path.abspath(__file__)], cwd=place, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": DIST})
    process.stdout.readline()
    agent = Agent(folder, "--follow", f"42:{process.pid}:{','.join(names)}")
    attached = agent.errors.read_text().count(",") + 1
    output, _ = process.communicate("go\n", timeout=DEADLINE)
    summary = agent.stop()
    lines = [re.sub(r"<[^>]*>", "", line).rstrip() for line in agent.output.read_text().splitlines()]
    calls = [(event, result, shown) for event, result, shown in json.loads(output) if event in names]
    place_of, missing = {}, []
    for event, result, shown in calls:
        line = expected_line(process.pid, event, result, shown)
        try:
            place_of[event] = lines.index(line, place_of.get(event, -1) + 1)
        except ValueError:
            missing.append(line)
    for line in missing:
        event = line.split()[1]
        print(f"  expected {line}")
        for other in [other for other in lines if other.split()[1] == event][:6]:
            print(f"   printed {other}")
    exits = any(" Status 7" in line and "exit_group" in line for line in lines)  # of the child's child
    if "exit_group" in names and not exits:
        missing.append("exit_group of a followed child")
        print("  the exit of a followed child was not printed")
    report(process.returncode == 0 and summary["code"] == 0 and summary["balanced"] and not missing and len(calls) > 20,
           what, f"{len(calls) - len(missing)} of {len(calls)} calls of {len({call[0] for call in calls})} event types to the "
           f"letter, {attached} attached, balanced {summary['balanced']}"
           + ("" if summary["code"] == 0 else f", exit {summary['code']}: {summary['stderr']}"))


def check_all(folder):
    check_doctor()
    tracefs = traceleft.mounted_tracefs()
    named = [name for name, kind in traceleft.EVENT_TYPES.items()
             if kind.is_tcp or any(os.path.isdir(f"{tracefs}/events/syscalls/sys_exit_{syscall.tracepoint}")
                                   for syscall in traceleft.syscalls_here(kind))]
    traceleft.event_type("lseek")
    calm = [name for name in named if name not in ("read", "write", "close", "recvfrom", "sendto", "mmap", "fcntl")]
    check_walk_through(folder)
    check_python_rules(folder)
    check_grpc(folder)
    check_events(folder, "events by tp_btf", [*named, "lseek"])
    check_events(folder, "events by tracepoint", calm)


def main():
    print(f"{os.uname().release} {os.uname().machine} Python {sys.version.split()[0]}")
    print(subprocess.run([sys.executable, DIST, "--version"], capture_output=True, text=True).stdout.strip())
    folder = tempfile.mkdtemp(prefix="traceleft-check-")
    try:
        if "--refused" in sys.argv:
            check_refused(sys.argv[sys.argv.index("--refused") + 1])
        else:
            check_all(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{'pass' if not failures else 'FAIL'} live check: {failures} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main() if len(sys.argv) > 1 else child())
