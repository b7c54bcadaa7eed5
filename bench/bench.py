#!/usr/bin/env python3
"""Measures traceleft.py against its peers on this machine: interleaved rounds, medians, ratios.

What a tool adds to a syscall is the time of a loop of that syscall with the tool running, less the time without any tool
in the same round. Writes bench/RESULTS.md. Absent peers are skipped with a line; `make bench-setup` installs them.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import traceleft  # noqa: E402

SCRIPT = HERE.parent / "traceleft.py"
SEE_ALL = "import sys; sys.path.insert(0, {folder!r}); import traceleft; traceleft.BUSY_SHARE = {share}; sys.exit(traceleft.main(sys.argv[1:]))"
KINDS = ("named", "other", "failing", "getppid", "mixed")
READY_TIMEOUT = 20.0  # seconds


class Tool:
    """A tracer under measurement: `start()` returns when it traces, `stop()` ends it."""

    def __init__(self, name, command, ready, needs=None):
        self.name, self.command, self.ready = name, command, ready
        self.missing = needs is not None and shutil.which(needs) is None
        self.process = None

    def start(self, work):
        with (work / "output").open("w") as output:
            self.process = subprocess.Popen(self.command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        end = time.monotonic() + READY_TIMEOUT
        while not self.ready(work) and time.monotonic() < end:
            if self.process.poll() is not None:
                raise RuntimeError(f"{self.name} ended: {(work / 'output').read_text()[-500:]}")
            time.sleep(0.05)

    def stop(self):
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Floor(Tool):
    """A program in this process that does nothing but read the path, at entry; or, at exit, nothing at all."""

    def __init__(self, work, name, program, tracepoint):
        super().__init__(name, [], None)
        self.program, self.tracepoint = program, tracepoint
        self.object = work / "floor.bpf.o"
        subprocess.run(["clang-14", "-O2", "-g", "-target", "bpf", "-mcpu=v3", "-c", HERE / "floor.bpf.c", "-o", self.object],
                       check=True)
        self.bpf = traceleft.Libbpf()

    def start(self, work):
        data = self.object.read_bytes()
        options = traceleft.BpfObjectOpenOpts(ctypes.sizeof(traceleft.BpfObjectOpenOpts), b"floor")
        self.loaded = self.bpf.call("bpf_object__open_mem", data, len(data), ctypes.byref(options))
        self.bpf.call("bpf_object__load", self.loaded)
        program = self.bpf.call("bpf_object__find_program_by_name", self.loaded, self.program)
        options = traceleft.BpfTracepointOpts(ctypes.sizeof(traceleft.BpfTracepointOpts), 0)
        self.link = self.bpf.call("bpf_program__attach_tracepoint_opts", program, b"syscalls", self.tracepoint,
                                  ctypes.byref(options))

    def stop(self):
        self.bpf.library.bpf_link__destroy(self.link)
        self.bpf.library.bpf_object__close(self.loaded)


def output_has(text):
    return lambda work: text in (work / "output").read_text(errors="replace")


def waited(seconds):
    """For tools that do not say when they are ready."""
    def ready(work):
        time.sleep(seconds)
        return True
    return ready


class Bench:
    def __init__(self, work, rounds, seconds):
        self.work, self.rounds, self.seconds = work, rounds, seconds
        self.path = work / "a" / "b" / "file"  # the fifth below the root
        self.path.parent.mkdir(parents=True)
        self.load = work / "load"
        subprocess.run(["gcc", "-O2", "-o", self.load, HERE / "load.c"], check=True)
        self.rows = []

    def spec(self, name, rules, parameters="frequency=100"):
        """The path of a spec with one filter on open per rule."""
        path = self.work / name
        path.write_text(json.dumps({
            "channels": [{"id": "1", "type": "file", "path": str(self.work / "log")}],
            "events": [{"name": "open", "channel": "1", "rule": rule, "function": {"id": "sigma", "parameters": parameters},
                        "output": {"metrics": "alerts_per_sec", "format": "json"}} for rule in rules]}))
        return path

    def traceleft(self, name, spec, *options, see_all=None):
        """`see_all`: attach to every syscall's exit, whatever the spec names."""
        script = [SCRIPT] if see_all is None else ["-c", SEE_ALL.format(folder=str(SCRIPT.parent), share=-1 if see_all else 101)]
        return Tool(name, [sys.executable, *script, "trace", *options, *(["--spec", spec] if spec else ["open"])],
                    output_has("traceleft: ready"))

    def run_load(self, kind, seconds, cpu=0, rate=0):
        """(count, ns per operation)"""
        done = subprocess.run(["taskset", "-c", str(cpu), self.load, kind, str(seconds), self.path, str(rate)],
                              capture_output=True, text=True, check=True)
        count, each = done.stdout.split()
        return int(count), float(each)

    def one_filter(self):
        return self.spec("one", [f"arg1 == '{self.path}'"])

    def many_filters(self):
        return self.spec("many", [f"arg1 == '{self.path}'", *(f"arg1 == '{self.path}{i}'" for i in range(255))])

    def path_filter(self):
        return self.spec("path", [f"path == '{self.path}'"])

    def tools(self):
        condition = f'str(args->filename) == "{self.path}"'
        return [
            Floor(self.work, "floor", b"floor_open", b"sys_enter_openat"),
            Floor(self.work, "empty, at exit", b"floor_exit", b"sys_exit_openat"),
            self.traceleft("traceleft", self.one_filter()),
            self.traceleft("traceleft, at every exit", self.one_filter(), see_all=True),
            self.traceleft("traceleft, path ==", self.path_filter()),
            self.traceleft("traceleft, 256 filters", self.many_filters()),
            self.traceleft("traceleft, printing all", None),
            Tool("bpftrace", ["bpftrace", "-e", f"tracepoint:syscalls:sys_enter_openat /{condition}/ {{ @ = count(); }} "
                              "interval:s:1 { print(@); }"], output_has("Attaching"), "bpftrace"),
            Tool("opensnoop", ["opensnoop"], waited(2), "opensnoop"),
            Tool("strace", ["strace", "-f", "--seccomp-bpf", "-e", "trace=openat", "-o", "/dev/null"], None, "strace"),
            Tool("perf trace", ["perf", "trace", "-e", "openat", "-a", "-o", "/dev/null"], waited(2), "perf"),
        ]

    def compare(self):
        """Added ns per operation: tool -> kind -> median."""
        times = {}
        tools = []
        for tool in self.tools():
            if tool.missing:
                print(f"skipped: {tool.name} is not installed (make bench-setup)")
            else:
                tools.append(tool)
        for number in range(self.rounds):
            for kind in KINDS:
                times.setdefault(("nothing", kind), []).append(self.run_load(kind, self.seconds)[1])
            for tool in tools:
                self.measure(tool, times)
            print(f"round {number + 1} of {self.rounds}", flush=True)
        self.base = {kind: statistics.median(times["nothing", kind]) for kind in KINDS}
        return {tool.name: {kind: statistics.median(a - b for a, b in zip(times[tool.name, kind], times["nothing", kind]))
                            for kind in KINDS} for tool in tools}

    def measure(self, tool, times):
        if tool.name == "strace":  # traces what it starts
            for kind in KINDS:
                done = subprocess.run([*tool.command, self.load, kind, str(self.seconds), self.path], capture_output=True,
                                      text=True, check=True)
                times.setdefault((tool.name, kind), []).append(float(done.stdout.split()[1]))
            return
        tool.start(self.work)
        try:
            for kind in KINDS:
                times.setdefault((tool.name, kind), []).append(self.run_load(kind, self.seconds)[1])
        finally:
            tool.stop()

    def row(self, figure, goal, value, reached=None):
        self.rows.append((figure, goal, value, "" if reached is None else "yes" if reached else "**no**"))
        print(f"{figure}: {value} (goal {goal})", flush=True)

    def loads(self, kind, seconds, rate=0):
        """Two load processes, one on each CPU; returns how many operations they made."""
        processes = [subprocess.Popen(["taskset", "-c", str(cpu), self.load, kind, str(seconds), self.path, str(rate)],
                                      stdout=subprocess.PIPE, text=True) for cpu in range(min(2, os.cpu_count() or 1))]
        return sum(int(process.communicate()[0].split()[0]) for process in processes)

    def agent_cpu(self, seconds, rate=0):
        """(fraction of a core, operations, final accounting of the filter, resident MiB) of an agent under two loads."""
        summary = self.work / "summary"
        tool = self.traceleft("traceleft", self.one_filter(), "--summary", summary)
        tool.start(self.work)
        before, begin = cpu_seconds(tool.process.pid), time.monotonic()
        count = self.loads("named", seconds, rate)
        cpu = (cpu_seconds(tool.process.pid) - before) / (time.monotonic() - begin)
        memory = resident_mib(tool.process.pid)
        tool.stop()
        return cpu, count, json.loads(summary.read_text()), memory

    def figures(self, added, long_seconds):
        def ratio(tool, kind, other):
            return added[tool][kind] / added[other][kind] if other in added else float("nan")

        for other, goal in (("bpftrace", 0.6), ("floor", 1.5)):
            for kind in ("named", "failing"):
                value = ratio("traceleft", kind, other)
                what = "matched event" if kind == "named" else "event that does not match"
                self.row(f"added per {what}, against {other}", f"<= {goal} x", f"{value:.2f} x", value <= goal)
        value = ratio("traceleft", "getppid", "bpftrace")
        self.row("added per syscall that the spec does not name, against bpftrace", "<= 1.05 x", f"{value:.2f} x", value <= 1.05)
        value = ratio("traceleft", "getppid", "empty, at exit")
        self.row("the same, against an empty program at exit", "", f"{value:.2f} x")
        saved = added["traceleft"]["failing"] - added["traceleft, at every exit"]["failing"]
        more = added["traceleft, at every exit"]["getppid"] - added["traceleft"]["getppid"]
        self.row("share of named syscalls from which one program at every exit costs less", f"{traceleft.BUSY_SHARE}% is used",
                 f"{100 * more / (more + saved):.0f}%" if saved + more > 0 else "none")
        value = ratio("traceleft, path ==", "named", "traceleft")
        self.row("added per open with path == on a name five deep, against arg1 ==", "", f"{value:.2f} x")
        value = ratio("traceleft, 256 filters", "named", "traceleft")
        self.row("added per event with 256 filters, against one", "<= 1.5 x", f"{value:.2f} x", value <= 1.5)

        cpu, count, summary, memory = self.agent_cpu(long_seconds)
        (row,) = summary["filters"]
        self.row(f"agent's CPU at the full rate of two loads ({count / long_seconds / 1e6:.2f} M opens/s)", "<= 1%",
                 f"{cpu:.2%}", cpu <= 0.01)
        missed = abs(row["matched"] - count - 2) + abs(row["passed"] - row["matched"] // 100)  # 2: each load makes the file
        self.row(f"events miscounted in {long_seconds:.0f} s at that rate, frequency=100", "0", f"{missed} of {count}",
                 missed == 0 and summary["balanced"])
        self.row("agent's resident memory, file channel", "<= 32 MiB", f"{memory:.1f} MiB", memory <= 32)
        slow, _, _, _ = self.agent_cpu(10, 500)
        self.row("agent's CPU at full rate, against 1,000 events/s", "<= 1.5 x", f"{cpu / slow:.2f} x" if slow else "-",
                 slow > 0 and cpu / slow <= 1.5)
        self.groups()
        self.start_up()
        self.streaming()

    def groups(self):
        """Memory after more distinct groups than fit."""
        spec = self.spec("groups", [""], "frequency=10;by=filename")
        tool = self.traceleft("traceleft", spec, "--summary", self.work / "summary")
        tool.start(self.work)
        for i in range(100_000):
            with contextlib.suppress(OSError):
                os.open(f"/nonexistent/{i}", os.O_RDONLY)
        memory = resident_mib(tool.process.pid)
        tool.stop()
        self.row("resident memory after 100,000 distinct groups", "<= 32 MiB", f"{memory:.1f} MiB", memory <= 32)

    def start_up(self):
        """From the start of the command to the first event that is counted."""
        took = []
        spec = self.spec("start", ["endswith(filename, '/first')"], "frequency=1")
        for _ in range(7):
            begin = time.monotonic()
            tool = self.traceleft("traceleft", spec, "--summary", self.work / "summary")
            tool.process = subprocess.Popen(tool.command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
            assert tool.process.stderr.readline().startswith("traceleft: ready")
            took.append(time.monotonic() - begin)
            with contextlib.suppress(OSError):
                os.open("/nonexistent/first", os.O_RDONLY)
            tool.process.send_signal(signal.SIGINT)
            tool.process.communicate()
            assert json.loads((self.work / "summary").read_text())["filters"][0]["matched"] >= 1
        value = statistics.median(took)
        self.row("start of the command to the first event counted", "<= 0.3 s", f"{value:.2f} s", value <= 0.3)

    def streaming(self):
        """Every open printed to a file, while one load runs: what arrives, and what it costs the load."""
        results = {}
        base = self.run_load("failing", 3)[1]
        for tool in (self.traceleft("traceleft", None), Tool("opensnoop", ["opensnoop"], waited(2), "opensnoop")):
            if tool.missing:
                return
            tool.start(self.work)
            begin = time.monotonic()
            _, each = self.run_load("failing", 3)
            if tool.name == "traceleft":
                tool.stop()
                took = time.monotonic() - begin  # it prints what is left: that counts too
            else:
                took = time.monotonic() - begin
                tool.stop()
            lines = sum(1 for line in (self.work / "output").open(errors="replace") if "file.missing" in line)
            results[tool.name] = (lines / took, each - base)
        more = results["traceleft"][0] / max(results["opensnoop"][0], 1)
        self.row(f"streaming: events/s to a file ({results['traceleft'][0]:,.0f}), against opensnoop's", ">= 3 x", f"{more:.2f} x",
                 more >= 3)
        less = results["traceleft"][1] / results["opensnoop"][1]
        self.row("streaming: added per event, against opensnoop's", "<= 0.33 x", f"{less:.2f} x", less <= 1 / 3)


def cpu_seconds(pid):
    """Of the main thread, which is all that runs with file channels: nanoseconds, where /proc/PID/stat has ticks."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def resident_mib(pid):
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


def version(*command):
    try:
        done = subprocess.run(command, capture_output=True, text=True)
        return (done.stdout or done.stderr).splitlines()[0]
    except (OSError, IndexError):
        return "absent"


def report(bench, added):
    """The results as markdown."""
    lines = ["# Results", "", f"`make bench` on {datetime.date.today()}: kernel {platform.release()}, {platform.machine()}, "
             f"{os.cpu_count()} CPUs, Python {platform.python_version()}; {version('bpftrace', '--version')}; "
             f"{version('strace', '--version')}; {version('perf', '--version')}. "
             f"{bench.rounds} interleaved rounds of {bench.seconds} s for each tool and load; medians.", "",
             "## Added nanoseconds per operation", "",
             "`named`, `other` and `failing` open one file; `named` and `other` close it too. `mixed` is all of them and getppid.", "",
             "| tool | " + " | ".join(KINDS) + " |", "| --- |" + " ---: |" * len(KINDS),
             "| nothing attached (total) | " + " | ".join(f"{bench.base[kind]:.0f}" for kind in KINDS) + " |"]
    for tool, values in added.items():
        lines.append(f"| {tool} | " + " | ".join(f"{values[kind]:+.0f}" for kind in KINDS) + " |")
    lines += ["", "## Figures", "", "| figure | goal | measured | reached |", "| --- | --- | --- | --- |"]
    lines += [f"| {' | '.join(row)} |" for row in bench.rows]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.4, help="of each load in each round")
    parser.add_argument("--long", type=float, default=60.0, help="seconds of the run that counts miscounted events")
    parser.add_argument("--output", type=Path, default=HERE / "RESULTS.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), options.rounds, options.seconds)
        added = bench.compare()
        bench.figures(added, options.long)
        text = report(bench, added)
    options.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
