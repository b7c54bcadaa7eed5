#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Trace syscalls with eBPF and reduce them, as an aggregation spec says, to about one record per second and filter.

examples:
  traceleft.py trace --spec spec/aggregator-spec.json   trace, reduce and send as the spec says
  traceleft.py trace open,close                         print every open and close of every process
  traceleft.py trace 42:1234,1235:read                  print the reads of two processes, as program 42
  traceleft.py check spec/*.json                        validate specs, without root
  traceleft.py explain SPEC --estimate 10               what a spec brings and costs on this host, sending nothing
  traceleft.py collect                                  receive what a grpc channel sends
  traceleft.py events open                              arguments of an event type and the syscalls behind it
  traceleft.py doctor                                   what this host has and lacks
"""

import os
import sys

# Python 3.6 to 3.8 parse this file and get so far: it has no `from __future__ import annotations`, which 3.6 does not
# know, so an annotation quotes the name of what is defined further down. Python 2 parses it up to the line below that
# says why, and shows that one.
if sys.version_info < (3, 9):  # noqa: UP036
    _python = ".".join(map(str, sys.version_info[:2]))
    sys.stderr.write(f"traceleft: Python {_python} is too old: it needs 3.9 or later\n")
    sys.exit(3)
if __name__ == "__main__":  # the imports below take a tenth of a second: a signal by then finds nothing to undo
    while True:  # neither a channel nor a library that ctypes loads (libffi) must get the descriptor of a closed stream
        _null = os.open(os.devnull, os.O_RDWR)
        if _null > 2:
            os.close(_null)
            break
    # A module is never one that lies beside the script or in the current directory: somebody may have put it there.
    sys.path = [_path for _path in sys.path if _path not in ("", os.path.dirname(os.path.abspath(__file__)))]
    import signal
    for _number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(_number, lambda *_: os._exit(0))
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # logrotate's: there is no file to open again yet
    if "_relaunched" in globals():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
    elif sys.argv[1:2] in (["trace"], ["collect"]) and sys.executable and os.path.isfile(__file__):
        # Python keeps the parse tree of a script as long as it runs: 20 MB, half of what it would take. So what runs
        # for long goes on in the same process with the code that it has been compiled to, and nothing else.
        import marshal
        _code = os.memfd_create("traceleft", 0)
        os.write(_code, marshal.dumps(sys._getframe().f_code))
        os.lseek(_code, 0, os.SEEK_SET)
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))  # until there are handlers again
        _flags = getattr(sys, "orig_argv", ["", *sys.argv])[1:-len(sys.argv)]
        os.execv(sys.executable, [
            sys.executable, *_flags, "-c", "import marshal, os, sys; _relaunched = int(sys.argv[1]); del sys.argv[:2]; "
            "__file__ = sys.argv[0]; exec(marshal.load(os.fdopen(_relaunched, 'rb')))", str(_code), *sys.argv])

try:
    import argparse
    import ast
    import binascii
    import collections
    import contextlib
    import ctypes
    import dataclasses
    import datetime
    import difflib
    import errno
    import fcntl
    import fnmatch
    import functools
    import importlib
    import ipaddress
    import itertools
    import json
    import math
    import mmap
    import operator
    import platform
    import re
    import selectors
    import select
    import shutil
    import signal
    import socket
    import stat
    import struct
    import termios
    import textwrap
    import threading
    import time
    import uuid
    import warnings
    import zlib
    from dataclasses import dataclass, field, replace
    from pathlib import Path
    from typing import (Any, Callable, ClassVar, Counter, Deque, Dict, FrozenSet, Iterable, Iterator, List, Mapping,
                        NamedTuple, NoReturn, Optional, Sequence, Set, TextIO, Tuple, Type, Union)

    try:
        from _blake2 import blake2b  # hashlib has the same, but loads OpenSSL with it: 3 MB
    except ImportError:
        from hashlib import blake2b
except ImportError as _error:  # python3-minimal of Debian, say
    if __name__ != "__main__":
        raise
    sys.stderr.write(f"traceleft: this Python ({sys.executable}) lacks a part of its standard library, the module "
                     f"{_error.name}: install all of it, as with apt-get install python3\n")
    sys.exit(3)

VERSION = "0.1.0"

# ======================================================================================================================
# Errors: each class knows its exit code; only main() turns one into a line on stderr
# ======================================================================================================================


class TraceleftError(Exception):
    """Something failed at run time. `errors` are lines that say what to do, one for each thing that is wrong."""

    exit_code = 1

    def __init__(self, *errors: str) -> None:
        super().__init__("\n".join(errors))
        self.errors = errors


class UsageError(TraceleftError):
    """The command line or the spec is wrong."""

    exit_code = 2


class SpecError(UsageError):
    """An aggregation spec is invalid; `errors` has one text per error found, the whole spec having been read."""


class RuleError(UsageError):
    """A rule is invalid; `column` is a 0-based offset into `rule`, the text as it was parsed."""

    def __init__(self, message: str, rule: str = "", column: int = 0) -> None:
        super().__init__(message)
        self.rule, self.column = rule, column

    def with_caret(self, indent: str = "  ") -> str:
        """The message, then the rule, then a caret under the place; control characters are shown as `?`."""
        shown = "".join(c if c.isprintable() else "?" for c in self.rule)
        return f"{self}\n{indent}{shown}\n{indent}{' ' * self.column}^"


class HostError(TraceleftError):
    """The host lacks a privilege, a library, a kernel feature or an optional package."""

    exit_code = 3


class BalanceError(TraceleftError):
    """The accounting did not add up: events were lost before a filter could count them."""

    exit_code = 4


def start_thread(target: Callable[..., None], *args: Any) -> Optional[threading.Thread]:
    """A thread that the end of the process does not wait for; None when there is none to be had, as for pids.max."""
    thread = threading.Thread(target=target, args=args, daemon=True)
    try:
        thread.start()
    except RuntimeError:
        return None
    return thread


def say(message: str) -> None:
    """One line on stderr, in one write, so that lines of threads do not mix."""
    if SAY_SINKS:
        SAY_SINKS[-1](message)
        return
    with contextlib.suppress(OSError, ValueError):  # nobody is there to read it
        sys.stderr.write(f"{CLEAR_LINE if sys.stderr.isatty() else ''}traceleft: {message}\n")
        sys.stderr.flush()


CLEAR_LINE = "\r\x1b[K"
SAY_SINKS: List[Callable[[str], None]] = []  # the last one takes what is said: while a screen is shown


def suggest(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the known name nearest to `name`, or nothing when none is near."""
    near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6)
    return f" (did you mean '{near[0]}'?)" if near else ""


# ======================================================================================================================
# What comes along: beside the script in a checkout, inside the one file that `make dist` makes
# ======================================================================================================================

IS_ARCHIVE = not os.path.isfile(__file__)  # the script is a member of a zip archive
HOME = os.path.dirname(__file__ if IS_ARCHIVE else os.path.realpath(__file__))
OBJECT_PATH = Path(HOME, "bpf", "traceleft.bpf.o")
COMMIT_NAME = "commit"  # a member of the archive


def read_companion(path: Union[str, os.PathLike[str]]) -> bytes:
    """The content of a file that came along, by its path below HOME. Raises OSError and, for a file that somebody can
    change who cannot change this script, HostError."""
    return __loader__.get_data(os.path.relpath(path, HOME)) if IS_ARCHIVE else read_trusted(path)  # type: ignore


def read_trusted(path: Union[str, os.PathLike[str]]) -> bytes:
    """The content of a regular file that, like its directory, only those can change who can change the script.

    What is checked is what is read: file and directory are opened first.
    """
    folder, name = os.path.split(os.fspath(path))
    directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with os.fdopen(os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=directory), "rb") as file:
            trusted = writers(os.stat(os.path.realpath(__file__))) | {"root", "group 0", f"user {os.geteuid()}"}
            for what, status in ((folder, os.fstat(directory)), (os.fspath(path), os.fstat(file.fileno()))):
                strangers = sorted(writers(status) - trusted | writers(status) & {"everybody"})
                if strangers:
                    raise HostError(f"{what} can be changed by {' and '.join(strangers)}, and what is in it is loaded "
                                    f"into the kernel: chown root and chmod go-w it")
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError(errno.EINVAL, "it is no regular file")
            return file.read()
    finally:
        os.close(directory)


def writers(status: os.stat_result) -> Set[str]:
    """Who can write to a file: its owner, and by its mode its group and everybody."""
    return ({"root" if status.st_uid == 0 else f"user {status.st_uid}"}
            | ({f"group {status.st_gid}"} if status.st_mode & stat.S_IWGRP else set())
            | ({"everybody"} if status.st_mode & stat.S_IWOTH else set()))


def object_bytes() -> bytes:
    """The BPF object, which is packed in the archive. Raises OSError and HostError."""
    if not IS_ARCHIVE:
        return read_companion(OBJECT_PATH)
    try:
        lzma = importlib.import_module("lzma")
    except ImportError:
        raise HostError("this Python has no module lzma, which the one file needs: use another Python, or copy "
                        "traceleft.py and the folder bpf/ instead") from None
    try:
        return bytes(lzma.decompress(read_companion(f"{OBJECT_PATH}.xz")))
    except (lzma.LZMAError, zlib.error, EOFError) as error:
        raise HostError(f"this copy of {escape(HOME)} is damaged ({error}): copy it again, and compare its SHA-256"
                        ) from None


def commit() -> str:
    """The git commit that this is, with `-dirty` when a file was changed since; `unknown` for a copied script."""
    if IS_ARCHIVE:
        return read_companion(f"{HOME}/{COMMIT_NAME}").decode().strip()
    if not os.path.exists(f"{HOME}/.git"):
        return "unknown"
    subprocess = importlib.import_module("subprocess")  # nothing else needs it
    try:
        done = subprocess.run(["git", "-c", f"safe.directory={HOME}", "-c", "core.fsmonitor=", "-C", HOME, "describe",
                               "--always", "--dirty", "--exclude=*", "--abbrev=40"], capture_output=True, text=True,
                              env={name: value for name, value in os.environ.items() if not name.startswith("GIT_")})
    except OSError:
        return "unknown"
    return str(done.stdout).strip() or "unknown"


def version_text() -> str:
    """`traceleft.py VERSION commit HASH object HASH`: what a report of a problem should name."""
    try:
        digest = importlib.import_module("hashlib").sha256(object_bytes()).hexdigest()[:16]
    except (OSError, HostError):
        digest = "missing"
    name, _, changed = commit().partition("-")
    return f"traceleft.py {VERSION} commit {name[:12]}{'-' + changed if changed else ''} object {digest}"


# ======================================================================================================================
# Event table: one row per event type; decoding, rule fields, protobuf messages and printed names come from it
# ======================================================================================================================

# enum argument_kind in bpf/traceleft.h
(KIND_NONE, KIND_SIGNED, KIND_UNSIGNED, KIND_CONSTANT, KIND_MEMORY,
 KIND_STRING, KIND_BUFFER_IN, KIND_BUFFER_OUT, KIND_FD, KIND_DFD, KIND_ARGV) = range(11)
MAX_ARGS = 6
MAX_SLOTS = 8  # values of an event's arguments: an IPv6 address takes two
MAX_FILES = 2  # descriptor arguments whose paths are shown
AT_FDCWD = -100  # include/uapi/linux/fcntl.h
TRACEFS_PATHS = ("/sys/kernel/tracing", "/sys/kernel/debug/tracing")


class ArgumentType(NamedTuple):
    """How an argument of this type is fetched in the kernel, decoded here, and sent."""

    kind: int
    bits: int  # width of the C type in the syscall's prototype; the rest of its register is undefined
    wire: str  # protobuf scalar type in the wire contract
    show: Callable[[Any], str] = str
    address_bits: int = 0   # of an IP address: 32 or 128
    is_cooked: bool = False  # text that is made here of what the kernel side captured

    @property
    def is_text(self) -> bool:
        """Whether the value is a str (bytes decoded with surrogateescape) and not an int."""
        return KIND_STRING <= self.kind <= KIND_BUFFER_OUT or self.kind == KIND_ARGV

    @property
    def is_signed(self) -> bool:
        """Whether the value is a signed 64-bit integer, and not an unsigned one."""
        return self.kind in (KIND_SIGNED, KIND_FD, KIND_DFD)

    @property
    def is_descriptor(self) -> bool:
        """Whether it is printed with the path of its file."""
        return self.kind in (KIND_FD, KIND_DFD)

    @property
    def is_buffer(self) -> bool:
        """Whether it is the begin of what was read or written."""
        return self.kind in (KIND_BUFFER_IN, KIND_BUFFER_OUT) and not self.is_cooked


def show_ipv4(value: int) -> str:
    return socket.inet_ntop(socket.AF_INET, value.to_bytes(4, "big"))


def show_ipv6(value: int) -> str:
    return socket.inet_ntop(socket.AF_INET6, value.to_bytes(16, "big"))


ARGUMENT_TYPES: Dict[str, ArgumentType] = {
    # name                   kind            bits  wire       C type in the kernel's prototypes
    "int":      ArgumentType(KIND_SIGNED,     32, "int64"),   # int; in a struct, a u64
    "uint":     ArgumentType(KIND_UNSIGNED,   32, "uint64"),  # unsigned int
    "long":     ArgumentType(KIND_SIGNED,     64, "int64"),   # long, loff_t
    "ulong":    ArgumentType(KIND_UNSIGNED,   64, "uint64"),  # unsigned long
    "mode":     ArgumentType(KIND_UNSIGNED,   16, "uint64"),  # umode_t
    "id":       ArgumentType(KIND_UNSIGNED,   32, "uint32"),  # uid_t, gid_t
    "size":     ArgumentType(KIND_UNSIGNED,   64, "int64"),   # size_t
    "address":  ArgumentType(KIND_UNSIGNED,   64, "uint64", hex),  # a pointer that is not followed
    "fd":       ArgumentType(KIND_FD,         32, "uint64"),  # unsigned int, an int to libc
    "dfd":      ArgumentType(KIND_DFD,        32, "int64"),   # int: a directory's descriptor or AT_FDCWD
    "path":     ArgumentType(KIND_STRING,      0, "bytes"),   # const char *: a file's name, behind the dfd before it
    "string":   ArgumentType(KIND_STRING,      0, "bytes"),   # const char *
    "argv":     ArgumentType(KIND_ARGV,        0, "bytes"),   # const char *const *: joined with spaces
    "written":  ArgumentType(KIND_BUFFER_IN,   0, "bytes"),   # const void *, as long as the argument `count`
    "filled":   ArgumentType(KIND_BUFFER_OUT,  0, "bytes"),   # void *, as long as the return value
    "sockaddr": ArgumentType(KIND_BUFFER_IN,  64, "bytes", is_cooked=True),  # as long as the argument behind it
    "ipv4":     ArgumentType(KIND_UNSIGNED,   32, "uint32", show_ipv4, 32),
    "ipv6":     ArgumentType(KIND_UNSIGNED,  128, "string", show_ipv6, 128),
    "port":     ArgumentType(KIND_UNSIGNED,   16, "uint32"),
    "inode":    ArgumentType(KIND_UNSIGNED,   32, "uint32"),  # of a namespace
}


class Argument(NamedTuple):
    """One named argument of an event type. What follows from name and type stands here too: it is read per event."""

    name: str
    type_name: str
    type: ArgumentType
    label: str  # the name as it is printed: CamelCase
    slot: int   # place of its value, or of the first of two, in a record
    is_text: bool
    is_signed: bool


class Syscall(NamedTuple):
    """One syscall behind an event type: where each argument is found, and when it counts."""

    name: str
    sources: Tuple[str, ...]  # per argument `N` (register), `=N` (constant) or `*N+M` (u64 at register N, offset M)
    stands_in: bool           # only on architectures that lack the event's own syscall
    only_fdcwd: Tuple[int, ...]  # registers that have to be AT_FDCWD
    dfd: Optional[int]        # register of the descriptor that the path is relative to, where it is no argument
    condition: Optional[Tuple[int, int]]  # register and the value that it has to have

    @property
    def tracepoint(self) -> str:
        """Its name in syscalls/sys_enter_* and sys_exit_*: that of the kernel's function."""
        return TRACEPOINT_NAMES.get(self.name, self.name)


@dataclass(frozen=True)
class EventType:
    """One row of the event table."""

    name: str
    arguments: Tuple[Argument, ...]
    syscalls: Tuple[Syscall, ...]
    traits: FrozenSet[str]  # of TRAITS
    metric_field: int = 0   # number of this event's message in the wire contract's Metric; 0: it has none of its own

    @property
    def message(self) -> str:
        """Name of this event's protobuf message."""
        family = self.name.rpartition("_")[2]
        return f"ProtobufConnect{family.upper()}Event" if self.is_tcp else f"Protobuf{camel_case(self.name)}Event"

    @property
    def is_tcp(self) -> bool:
        """Whether it is an event of a TCP connection, and not a syscall."""
        return "tcp" in self.traits

    @property
    def path_argument(self) -> Optional[int]:
        """The argument that `path` comes from: a name, or else a descriptor."""
        for kinds in (("path",), ("fd", "dfd")):
            for index, argument in enumerate(self.arguments):
                if argument.type_name in kinds:
                    return index
        return None

    @property
    def descriptors(self) -> List[int]:
        """The arguments whose files are shown."""
        return [i for i, argument in enumerate(self.arguments) if argument.type.is_descriptor][:MAX_FILES]


TRAITS = {
    "entry":   "arguments and path are read at entry: at exit they are gone",
    "silent":  "the call does not return, or not to where it was made: it is an event at entry",
    "opens":   "the file is that of the returned descriptor",
    "exec":    "the file is the program that the process runs afterwards",
    "tcp":     "no syscall: a change of a TCP connection's state",
}


def camel_case(name: str) -> str:
    """`connect_v4` to `ConnectV4`."""
    return "".join(part.capitalize() for part in name.split("_"))


SYSCALL_WORD = re.compile(r"(?P<name>\w+)((?P<mark>[!~])(?P<cwd>\d*))?(@(?P<dfd>\d))?(\[(?P<reg>\d)=(?P<value>\d+)\])?"
                          r"(:(?P<sources>\S+))?")


def parse_syscall(word: str, arguments: int) -> Syscall:
    """`NAME`, and `!`: only where the event's own is lacking, `!0`: with AT_FDCWD in register 0, `~0`: so everywhere,
    `@0`: dfd, `[2=0]`: condition, `:SOURCES`."""
    match = SYSCALL_WORD.fullmatch(word)
    assert match, word
    sources = match["sources"].split(",") if match["sources"] else [str(i) for i in range(arguments)]
    return Syscall(match["name"], tuple(sources), match["mark"] == "!", tuple(map(int, match["cwd"] or "")),
                   int(match["dfd"]) if match["dfd"] else None,
                   (int(match["reg"]), int(match["value"])) if match["reg"] else None)


def parse_arguments(words: str) -> Tuple[Argument, ...]:
    """`fd:fd count:size` as Arguments."""
    named: List[Argument] = []
    slot = 0
    for word in words.split():
        name, type_name = word.split(":")
        kind = ARGUMENT_TYPES[type_name]
        named.append(Argument(name, type_name, kind, camel_case(name), slot, kind.is_text, kind.is_signed))
        slot += 2 if kind.bits > 64 else 1
    return tuple(named)


def parse_event_row(name: str, arguments: str, syscalls: str = "", traits: str = "", metric_field: int = 0
                    ) -> EventType:
    """An EventType from the columns of EVENT_ROWS."""
    named = parse_arguments(arguments)
    parsed = tuple(parse_syscall(word, len(named)) for word in (syscalls or name).split())
    return EventType(name, named, () if traits == "tcp" else parsed, frozenset(traits.split()), metric_field)


CONNECTION_V4 = "saddr:ipv4 daddr:ipv4 sport:port dport:port netns:inode"
CONNECTION_V6 = CONNECTION_V4.replace("ipv4", "ipv6")

# The syscalls are those behind the libc function of that name; without any, the one of that name with the arguments in
# its order. parse_syscall() says how each is written.
EVENT_ROWS = (
    # name          arguments                                                syscalls, traits, field in Metric
    ("open",        "filename:path flags:int mode:mode",                     # 577: O_CREAT|O_WRONLY|O_TRUNC
     "open creat:0,=577,1 openat@0:1,2,3 openat2@0:1,*2+0,*2+8", "opens", 14),
    ("close",       "fd:fd",                                                 "", "entry", 7),
    ("read",        "fd:fd buf:filled count:size",                           "", "", 15),
    ("write",       "fd:fd buf:written count:size",                          "", "", 16),
    ("mkdir",       "pathname:path mode:mode",                               "mkdir mkdirat!0:1,2", "", 12),
    ("mkdirat",     "dfd:dfd pathname:path mode:mode",                       "", "", 13),
    ("chmod",       "filename:path mode:mode",                               "chmod fchmodat!0:1,2", "", 5),
    ("fchmod",      "fd:fd mode:mode",                                       "", "", 8),
    ("fchmodat",    "dfd:dfd filename:path mode:mode",                       "fchmodat fchmodat2", "", 9),
    ("chown",       "filename:path user:id group:id",                        "chown fchownat!0[4=0]:1,2,3", "", 6),
    ("fchown",      "fd:fd user:id group:id",                                "", "", 10),
    ("fchownat",    "dfd:dfd filename:path user:id group:id flag:int",       "", "", 11),
    ("connect_v4",  CONNECTION_V4,                                           "", "tcp", 3),
    ("accept_v4",   CONNECTION_V4,                                           "", "tcp", 3),
    ("close_v4",    CONNECTION_V4,                                           "", "tcp", 3),
    ("connect_v6",  CONNECTION_V6,                                           "", "tcp", 4),
    ("accept_v6",   CONNECTION_V6,                                           "", "tcp", 4),
    ("close_v6",    CONNECTION_V6,                                           "", "tcp", 4),
    # programs and processes
    ("execve",      "filename:path argv:argv envp:address",                  "", "entry exec"),
    ("execveat",    "dfd:dfd pathname:path argv:argv envp:address flags:int", "", "entry exec"),
    ("exit",        "status:int",                                            "exit exit_group", "silent"),
    ("exit_group",  "status:int",                                            "", "silent"),
    ("rt_sigreturn", "",                                                     "", "silent"),  # its exit has no number
    ("fork",        "",                                                      "fork clone[0=18874385]"),  # as libc does
    ("vfork",       "",                                                      "vfork clone![0=16657]"),
    ("clone",       "flags:ulong stack:address parent_tid:address"),
    ("clone3",      "flags:ulong size:size",                                 "clone3:*0+0,1"),
    ("kill",        "target:int sig:int"),
    ("tkill",       "target:int sig:int"),
    ("tgkill",      "group:int target:int sig:int"),
    ("ptrace",      "request:long target:long addr:address data:ulong"),
    ("prctl",       "option:int arg2:ulong arg3:ulong arg4:ulong arg5:ulong"),
    ("unshare",     "flags:ulong"),
    ("setns",       "fd:fd flags:int"),
    ("seccomp",     "op:uint flags:uint args:address"),
    ("bpf",         "cmd:int attr:address size:uint"),
    ("init_module", "image:address len:size param:string"),
    ("finit_module", "fd:fd param:string flags:int"),
    ("delete_module", "name_user:string flags:uint"),
    ("nanosleep",   "rqtp:address rmtp:address",                             "nanosleep clock_nanosleep~[0=0]:2,3"),
    ("eventfd",     "count:uint flags:int",                                  "eventfd:0,=0 eventfd2~"),
    ("select",      "n:int inp:address outp:address exp:address tvp:address", "select pselect6~[5=0]"),
    # users
    ("setuid",      "user:id"),
    ("setgid",      "group:id"),
    ("setreuid",    "ruser:id euser:id"),
    ("setregid",    "rgroup:id egroup:id"),
    ("setresuid",   "ruser:id euser:id suser:id"),
    ("setresgid",   "rgroup:id egroup:id sgroup:id"),
    ("setfsuid",    "user:id"),
    ("setfsgid",    "group:id"),
    ("setgroups",   "size:int list:address"),
    # names
    ("unlink",      "pathname:path",                                         "unlink unlinkat!0[2=0]:1"),
    ("unlinkat",    "dfd:dfd pathname:path flag:int"),
    ("rmdir",       "pathname:path",                                         "rmdir unlinkat!0[2=512]:1"),
    ("rename",      "oldname:path newname:path",
     "rename renameat!02:1,3 renameat2!02[4=0]:1,3"),
    ("renameat",    "olddfd:dfd oldname:path newdfd:dfd newname:path",       "renameat renameat2![4=0]:0,1,2,3"),
    ("renameat2",   "olddfd:dfd oldname:path newdfd:dfd newname:path flags:uint"),
    ("link",        "oldname:path newname:path",                             "link linkat!02[4=0]:1,3"),
    ("linkat",      "olddfd:dfd oldname:path newdfd:dfd newname:path flags:int"),
    ("symlink",     "target:string linkpath:path",                           "symlink symlinkat!1:0,2"),
    ("symlinkat",   "target:string newdfd:dfd linkpath:path"),
    ("readlink",    "pathname:path buf:filled bufsiz:int",                   "readlink readlinkat!0:1,2,3"),
    ("readlinkat",  "dfd:dfd pathname:path buf:filled bufsiz:int"),
    ("mknod",       "filename:path mode:mode dev:uint",                      "mknod mknodat~0:1,2,3"),  # glibc >= 2.33
    ("mknodat",     "dfd:dfd filename:path mode:mode dev:uint"),
    ("access",      "filename:path mode:int",                                "access faccessat!0:1,2"),
    ("faccessat",   "dfd:dfd filename:path mode:int",                        "faccessat faccessat2"),
    ("lchown",      "filename:path user:id group:id",                        "lchown fchownat!0[4=256]:1,2,3"),
    ("stat",        "filename:path statbuf:address",                         "stat newfstatat~0[3=0]:1,2"),
    ("lstat",       "filename:path statbuf:address",                         "lstat newfstatat~0[3=256]:1,2"),
    ("fstat",       "fd:fd statbuf:address",                                 "fstat newfstatat~[3=4096]:0,2"),
    ("truncate",    "filename:path length:long"),
    ("ftruncate",   "fd:fd length:ulong"),
    ("fallocate",   "fd:fd mode:int offset:long len:long"),
    ("utimensat",   "dfd:dfd filename:path times:address flags:int"),
    ("setxattr",    "pathname:path name:string value:address size:size flags:int"),
    ("removexattr", "pathname:path name:string"),
    # directories and mounts
    ("chdir",       "filename:path"),
    ("fchdir",      "fd:fd"),
    ("chroot",      "filename:path"),
    ("pivot_root",  "new_root:path put_old:path"),
    ("mount",       "dev_name:string dir_name:path fstype:string flags:ulong data:address"),
    ("umount2",     "name:path flags:int"),
    # descriptors
    ("pread64",     "fd:fd buf:filled count:size pos:long"),
    ("pwrite64",    "fd:fd buf:written count:size pos:long"),
    ("dup",         "fildes:fd"),
    ("dup2",        "oldfd:fd newfd:fd",                                     "dup2 dup3![2=0]:0,1"),
    ("dup3",        "oldfd:fd newfd:fd flags:int"),
    ("fcntl",       "fd:fd cmd:uint arg:ulong"),
    ("ioctl",       "fd:fd cmd:uint arg:ulong"),
    ("fsync",       "fd:fd"),
    ("flock",       "fd:fd cmd:uint"),
    ("getdents64",  "fd:fd dirent:address count:uint"),
    ("sendfile",    "out_fd:fd in_fd:fd offset:address count:size"),
    ("memfd_create", "name:string flags:uint"),
    # memory
    ("mmap",        "addr:address length:size prot:ulong flags:ulong fd:fd offset:ulong"),
    ("mprotect",    "addr:address length:size prot:ulong"),
    ("munmap",      "addr:address length:size"),
    # sockets
    ("socket",      "family:int type:int protocol:int"),
    ("connect",     "fd:fd addr:sockaddr addrlen:int"),
    ("bind",        "fd:fd addr:sockaddr addrlen:int"),
    ("listen",      "fd:fd backlog:int"),
    ("accept",      "fd:fd addr:address addrlen:address"),
    ("accept4",     "fd:fd addr:address addrlen:address flags:int"),
    ("shutdown",    "fd:fd how:int"),
    ("sendto",      "fd:fd buf:written count:size flags:uint addr:sockaddr addrlen:int"),
    ("recvfrom",    "fd:fd buf:filled count:size flags:uint addr:address addrlen:address"),
)
EVENT_TYPES: Dict[str, EventType] = {row[0]: parse_event_row(*row) for row in EVENT_ROWS}  # grows, see event_type()
EVENT_IDS: Dict[str, int] = {name: index for index, name in enumerate(EVENT_TYPES)}
EVENT_NAMES: List[str] = list(EVENT_TYPES)

assert len(EVENT_TYPES) == len(EVENT_ROWS), "event names are unique"
assert all(len(s.sources) == len(e.arguments) <= MAX_ARGS for e in EVENT_TYPES.values() for s in e.syscalls)
assert all(len({a.name for a in e.arguments}) == len(e.arguments) for e in EVENT_TYPES.values())
assert all(e.traits <= set(TRAITS) for e in EVENT_TYPES.values())

# Fields that every event has: name -> whether it is text. pid is the process (the kernel's tgid), tid the thread.
COMMON_FIELDS: Dict[str, bool] = {
    "ret": False, "pid": False, "tid": False, "ppid": False, "uid": False, "gid": False, "euid": False, "comm": True,
    "program_id": False, "mntns": False, "netns": False, "pidns": False, "exe": True, "cgroup": True, "container": True,
}

# The syscalls by name, with their numbers on x86_64 and on aarch64 where they have one: arch/x86/entry/syscalls/
# syscall_64.tbl and include/uapi/asm-generic/unistd.h.
SYSCALL_NUMBERS_TEXT = """
    read:0:63 write:1:64 open:2 close:3:57 stat:4 fstat:5:80 lstat:6 poll:7 lseek:8:62 mmap:9:222 mprotect:10:226
    munmap:11:215 brk:12:214 rt_sigaction:13:134 rt_sigprocmask:14:135 rt_sigreturn:15:139 ioctl:16:29
    pread64:17:67 pwrite64:18:68 readv:19:65 writev:20:66 access:21 pipe:22 select:23 sched_yield:24:124
    mremap:25:216 msync:26:227 mincore:27:232 madvise:28:233 shmget:29:194 shmat:30:196 shmctl:31:195 dup:32:23
    dup2:33 pause:34 nanosleep:35:101 getitimer:36:102 alarm:37 setitimer:38:103 getpid:39:172 sendfile:40:71
    socket:41:198 connect:42:203 accept:43:202 sendto:44:206 recvfrom:45:207 sendmsg:46:211 recvmsg:47:212
    shutdown:48:210 bind:49:200 listen:50:201 getsockname:51:204 getpeername:52:205 socketpair:53:199
    setsockopt:54:208 getsockopt:55:209 clone:56:220 fork:57 vfork:58 execve:59:221 exit:60:93 wait4:61:260
    kill:62:129 uname:63:160 semget:64:190 semop:65:193 semctl:66:191 shmdt:67:197 msgget:68:186 msgsnd:69:189
    msgrcv:70:188 msgctl:71:187 fcntl:72:25 flock:73:32 fsync:74:82 fdatasync:75:83 truncate:76:45 ftruncate:77:46
    getdents:78 getcwd:79:17 chdir:80:49 fchdir:81:50 rename:82 mkdir:83 rmdir:84 creat:85 link:86 unlink:87
    symlink:88 readlink:89 chmod:90 fchmod:91:52 chown:92 fchown:93:55 lchown:94 umask:95:166 gettimeofday:96:169
    getrlimit:97:163 getrusage:98:165 sysinfo:99:179 times:100:153 ptrace:101:117 getuid:102:174 syslog:103:116
    getgid:104:176 setuid:105:146 setgid:106:144 geteuid:107:175 getegid:108:177 setpgid:109:154 getppid:110:173
    getpgrp:111 setsid:112:157 setreuid:113:145 setregid:114:143 getgroups:115:158 setgroups:116:159
    setresuid:117:147 getresuid:118:148 setresgid:119:149 getresgid:120:150 getpgid:121:155 setfsuid:122:151
    setfsgid:123:152 getsid:124:156 capget:125:90 capset:126:91 rt_sigpending:127:136 rt_sigtimedwait:128:137
    rt_sigqueueinfo:129:138 rt_sigsuspend:130:133 sigaltstack:131:132 utime:132 mknod:133 personality:135:92
    ustat:136 statfs:137:43 fstatfs:138:44 sysfs:139 getpriority:140:141 setpriority:141:140 sched_setparam:142:118
    sched_getparam:143:121 sched_setscheduler:144:119 sched_getscheduler:145:120 sched_get_priority_max:146:125
    sched_get_priority_min:147:126 sched_rr_get_interval:148:127 mlock:149:228 munlock:150:229 mlockall:151:230
    munlockall:152:231 vhangup:153:58 modify_ldt:154 pivot_root:155:41 prctl:157:167 arch_prctl:158
    adjtimex:159:171 setrlimit:160:164 chroot:161:51 sync:162:81 acct:163:89 settimeofday:164:170 mount:165:40
    umount2:166:39 swapon:167:224 swapoff:168:225 reboot:169:142 sethostname:170:161 setdomainname:171:162 iopl:172
    ioperm:173 init_module:175:105 delete_module:176:106 quotactl:179:60 gettid:186:178 readahead:187:213
    setxattr:188:5 lsetxattr:189:6 fsetxattr:190:7 getxattr:191:8 lgetxattr:192:9 fgetxattr:193:10 listxattr:194:11
    llistxattr:195:12 flistxattr:196:13 removexattr:197:14 lremovexattr:198:15 fremovexattr:199:16 tkill:200:130
    time:201 futex:202:98 sched_setaffinity:203:122 sched_getaffinity:204:123 set_thread_area:205 io_setup:206:0
    io_destroy:207:1 io_getevents:208:4 io_submit:209:2 io_cancel:210:3 get_thread_area:211 epoll_create:213
    remap_file_pages:216:234 getdents64:217:61 set_tid_address:218:96 restart_syscall:219:128 semtimedop:220:192
    fadvise64:221:223 timer_create:222:107 timer_settime:223:110 timer_gettime:224:108 timer_getoverrun:225:109
    timer_delete:226:111 clock_settime:227:112 clock_gettime:228:113 clock_getres:229:114 clock_nanosleep:230:115
    exit_group:231:94 epoll_wait:232 epoll_ctl:233:21 tgkill:234:131 utimes:235 mbind:237:235 set_mempolicy:238:237
    get_mempolicy:239:236 mq_open:240:180 mq_unlink:241:181 mq_timedsend:242:182 mq_timedreceive:243:183
    mq_notify:244:184 mq_getsetattr:245:185 kexec_load:246:104 waitid:247:95 add_key:248:217 request_key:249:218
    keyctl:250:219 ioprio_set:251:30 ioprio_get:252:31 inotify_init:253 inotify_add_watch:254:27
    inotify_rm_watch:255:28 migrate_pages:256:238 openat:257:56 mkdirat:258:34 mknodat:259:33 fchownat:260:54
    futimesat:261 newfstatat:262:79 unlinkat:263:35 renameat:264:38 linkat:265:37 symlinkat:266:36
    readlinkat:267:78 fchmodat:268:53 faccessat:269:48 pselect6:270:72 ppoll:271:73 unshare:272:97
    set_robust_list:273:99 get_robust_list:274:100 splice:275:76 tee:276:77 sync_file_range:277:84 vmsplice:278:75
    move_pages:279:239 utimensat:280:88 epoll_pwait:281:22 signalfd:282 timerfd_create:283:85 eventfd:284
    fallocate:285:47 timerfd_settime:286:86 timerfd_gettime:287:87 accept4:288:242 signalfd4:289:74 eventfd2:290:19
    epoll_create1:291:20 dup3:292:24 pipe2:293:59 inotify_init1:294:26 preadv:295:69 pwritev:296:70
    rt_tgsigqueueinfo:297:240 perf_event_open:298:241 recvmmsg:299:243 fanotify_init:300:262 fanotify_mark:301:263
    prlimit64:302:261 name_to_handle_at:303:264 open_by_handle_at:304:265 clock_adjtime:305:266 syncfs:306:267
    sendmmsg:307:269 setns:308:268 getcpu:309:168 process_vm_readv:310:270 process_vm_writev:311:271 kcmp:312:272
    finit_module:313:273 sched_setattr:314:274 sched_getattr:315:275 renameat2:316:276 seccomp:317:277
    getrandom:318:278 memfd_create:319:279 kexec_file_load:320:294 bpf:321:280 execveat:322:281 userfaultfd:323:282
    membarrier:324:283 mlock2:325:284 copy_file_range:326:285 preadv2:327:286 pwritev2:328:287
    pkey_mprotect:329:288 pkey_alloc:330:289 pkey_free:331:290 statx:332:291 io_pgetevents:333:292 rseq:334:293
    uretprobe:335 uprobe:336 pidfd_send_signal:424:424 io_uring_setup:425:425 io_uring_enter:426:426
    io_uring_register:427:427 open_tree:428:428 move_mount:429:429 fsopen:430:430 fsconfig:431:431 fsmount:432:432
    fspick:433:433 pidfd_open:434:434 clone3:435:435 close_range:436:436 openat2:437:437 pidfd_getfd:438:438
    faccessat2:439:439 process_madvise:440:440 epoll_pwait2:441:441 mount_setattr:442:442 quotactl_fd:443:443
    landlock_create_ruleset:444:444 landlock_add_rule:445:445 landlock_restrict_self:446:446 memfd_secret:447:447
    process_mrelease:448:448 futex_waitv:449:449 set_mempolicy_home_node:450:450 cachestat:451:451
    fchmodat2:452:452 futex_wake:454:454 futex_wait:455:455 futex_requeue:456:456 statmount:457:457
    listmount:458:458 lsm_get_self_attr:459:459 lsm_set_self_attr:460:460 lsm_list_modules:461:461 mseal:462:462
    setxattrat:463:463 getxattrat:464:464 listxattrat:465:465 removexattrat:466:466 open_tree_attr:467:467
    file_getattr:468:468 file_setattr:469:469
"""
ARCHITECTURES = ("x86_64", "aarch64")
SYSCALL_NUMBERS: Dict[str, Tuple[str, ...]] = {
    words[0]: (*words[1:], "")[:2] for words in (word.split(":") for word in SYSCALL_NUMBERS_TEXT.split())}
TRACEPOINT_NAMES = {  # where the kernel's function has another name
    "stat": "newstat", "fstat": "newfstat", "lstat": "newlstat", "uname": "newuname", "umount2": "umount",
    "sendfile": "sendfile64"}


def syscall_number(name: str) -> Optional[int]:
    """The syscall's number on this architecture; None where it has none, or when it is newer than this table."""
    numbers = SYSCALL_NUMBERS.get(name)
    if numbers is None:
        return None
    number = numbers[1 if platform.machine() == "aarch64" else 0]
    return int(number) if number else None


def syscalls_here(event_type: EventType) -> List[Syscall]:
    """The syscalls that make up the event type on this architecture."""
    has_own = syscall_number(event_type.name) is not None
    return [s for s in event_type.syscalls
            if not (s.stands_in and has_own) and (syscall_number(s.name) is not None or s.name not in SYSCALL_NUMBERS)]


C_TYPES = {
    # C type in a format file -> ours; every pointer that is not here is an address
    "int": "int", "pid_t": "int", "clockid_t": "int", "timer_t": "int", "mqd_t": "int", "key_t": "int", "rwf_t": "int",
    "key_serial_t": "int", "qid_t": "uint", "unsigned int": "uint", "unsigned": "uint", "u32": "uint", "__u32": "uint",
    "umode_t": "mode", "uid_t": "id", "gid_t": "id", "size_t": "size", "long": "long", "loff_t": "long",
    "off_t": "long", "const char *": "string", "char *": "string",
}
DIRECTORY_NAMES = re.compile(r"(old|new|to_|from_)?dfd")
FILE_NAMES = re.compile(r"(path|file|old|new|dir_?|to_path|from_path|special)(name|file)?|library")


def format_argument(c_type: str, name: str) -> str:
    """`NAME:TYPE` for a field of a tracepoint's format file."""
    plain = re.sub(r"^const (?!char)", "", c_type.strip())
    kind = C_TYPES.get(plain, "address" if "*" in plain else "ulong")
    if kind == "string":
        kind = "path" if FILE_NAMES.fullmatch(name) else "string" if "const" in c_type else "address"
    elif plain in ("int", "unsigned int") and DIRECTORY_NAMES.fullmatch(name):
        kind = "dfd"
    elif plain in ("int", "unsigned int") and re.fullmatch(r"fd|fd_(in|out)|[a-z]+_?fd", name):
        kind = "fd"
    return f"{name}:{kind}"


def read_format(tracefs: str, tracepoint: str) -> Optional[List[str]]:
    """`NAME:TYPE` of a syscall's arguments, from tracefs; None where there is no such tracepoint or it is hidden."""
    try:
        text = Path(tracefs, "events/syscalls", f"sys_enter_{tracepoint}", "format").read_text()
    except OSError:
        return None
    fields = re.findall(r"field:(.*?)(\w+);\s*offset:(\d+);", text)
    return [format_argument(c_type, name) for c_type, name, offset in fields
            if int(offset) >= 16]  # before: what all tracepoints have, and the syscall's number


def event_type(name: str) -> EventType:
    """The event type of that name: a row of the table, or else a syscall as tracefs describes it.

    Raises KeyError for what is no syscall of this architecture, and HostError when tracefs cannot be read.
    """
    if name in EVENT_TYPES:
        return EVENT_TYPES[name]
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise KeyError(name)
    tracepoint = TRACEPOINT_NAMES.get(name, name)
    for tracefs in TRACEFS_PATHS:
        words = read_format(tracefs, tracepoint)
        if words is not None:
            return learn_event(parse_event_row(name, " ".join(dict.fromkeys(words))))
    if syscall_number(name) is None:
        raise KeyError(name)
    raise HostError(f"the arguments of event '{name}' stand in tracefs only, which cannot be read, or this kernel has "
                    f"no such syscall: run it as root, and see that {TRACEFS_PATHS[0]} is mounted")


def learn_event(found: EventType) -> EventType:
    """Adds an event type to the table."""
    EVENT_IDS[found.name] = len(EVENT_NAMES)
    EVENT_NAMES.append(found.name)
    EVENT_TYPES[found.name] = found
    return found


def event_names() -> List[str]:
    """All names that are an event type here: the table's, then the other syscalls'."""
    return [*EVENT_NAMES, *(name for name in SYSCALL_NUMBERS
                            if name not in EVENT_TYPES and syscall_number(name) is not None)]


# ======================================================================================================================
# Events: the records of the ring buffer decoded, hashed and shown
# ======================================================================================================================

# struct event_header in bpf/traceleft.h; a test compares it with the object's BTF
HEADER_FIELDS = (
    ("timestamp_ns", "Q"), ("ret", "q"), ("program_id", "Q"), ("args", "8Q"), ("path", "Q"), ("exe", "Q"),
    ("cgroup", "Q"), ("files", "2Q"), ("pid", "I"), ("tid", "I"), ("ppid", "I"), ("uid", "I"), ("gid", "I"),
    ("euid", "I"), ("mntns", "I"), ("netns", "I"), ("pidns", "I"), ("event", "H"), ("flags", "H"), ("reserved", "I"),
    ("version", "I"), ("filter", "I"), ("tick", "I"), ("comm", "16s"),
)
HEADER = struct.Struct("=" + "".join(code for _, code in HEADER_FIELDS))
RECORD_VERSION = 3
INCOMPLETE_MASK = (1 << MAX_ARGS) - 1  # enum event_flags: bit N is argument N
FLAG_CONTAINER, FLAG_PATH_INCOMPLETE, FLAG_PATH_UNRESOLVED = 1 << 8, 1 << 9, 1 << 10

Value = Union[int, str]


class Event(NamedTuple):
    """One occurrence in the kernel. Text is decoded as UTF-8 with surrogateescape, so that any byte can be in it."""

    name: str
    args: Tuple[Value, ...]            # in the order of the event table; IP addresses are integers
    ret: int
    timestamp_ns: int                  # nanoseconds since the Unix epoch
    pid: int                           # the process (tgid)
    tid: int
    ppid: int
    uid: int
    gid: int
    comm: str
    program_id: int
    incomplete: int = 0                # bit N: argument N could not be read whole
    in_container: bool = False         # in a pid namespace other than the initial one
    path: str = ""                     # of the file, absolute as the process sees it; "" where it is not known
    path_incomplete: bool = False      # its begin did not fit
    path_unresolved: bool = False      # a name as it was passed, behind its directory
    files: Tuple[str, ...] = ()        # paths of the descriptor arguments; "" where there is no such file
    exe: str = ""                      # the program that the process runs
    cgroup: str = ""                   # of version 2
    euid: int = 0
    mntns: int = 0                     # inodes of the process's namespaces
    netns: int = 0
    pidns: int = 0

    @property
    def type(self) -> EventType:
        return EVENT_TYPES[self.name]

    @property
    def named_args(self) -> Dict[str, Value]:
        """Arguments by the names of the event table, IP addresses as text."""
        return {argument.name: argument.type.show(value) if argument.type.address_bits else value
                for argument, value in zip(self.type.arguments, self.args)}

    @property
    def container(self) -> str:
        """The id of the container that the cgroup is named after; "" outside of one."""
        match = CONTAINER_ID.search(self.cgroup)
        return match[1] if match else ""

    @property
    def flags(self) -> int:
        """As in the wire contract: 1 something is incomplete, 2 in a container, 8 the path is not resolved."""
        return ((1 if self.incomplete or self.path_incomplete else 0) | (2 if self.in_container else 0)
                | (8 if self.path_unresolved else 0))

    @property
    def hash(self) -> int:
        """64 bits over event type, program id, pid, ret and the arguments other than buffers, equal on every host."""
        packed = [self.name.encode() + b"\0", HASHED.pack(self.pid, self.ret, self.program_id)]
        for argument, value in zip(EVENT_TYPES[self.name].arguments, self.args):
            if isinstance(value, int):
                packed.append((value & ADDRESS_MASK).to_bytes(16, "little") if argument.type.bits > 64 else
                              (value & 0xFFFF_FFFF_FFFF_FFFF).to_bytes(8, "little"))
            elif not argument.type.is_buffer:
                packed.append(encode_text(value) + b"\0")
        return int.from_bytes(blake2b(b"".join(packed), digest_size=8).digest(), "little")


HASHED = struct.Struct("<IqQ")
ADDRESS_MASK = (1 << 128) - 1
CONTAINER_ID = re.compile(r"([0-9a-f]{64})(?:\.scope)?(?:/[^/]*)*$")  # of Docker, containerd, CRI-O, Podman


def decode_text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def encode_text(text: str) -> bytes:
    """The bytes of `text`; the inverse of decode_text(). Raises UnicodeEncodeError for surrogates that are no byte."""
    return text.encode("utf-8", "surrogateescape")


def make_event(name: str, *args: Value, **fields: Any) -> Event:
    """A synthetic event: `make_event("open", "/tmp/a.txt", 577, 438, ret=3, pid=4242)`.

    Arguments are given in order or by name, IP addresses also as text; what is not given is 0 or "". Raises KeyError
    for an unknown event type, TypeError for an unknown argument and ValueError for a malformed address.
    """
    arguments = event_type(name).arguments
    if len(args) > len(arguments):
        raise TypeError(f"{name} has {len(arguments)} arguments, not {len(args)}")
    values: List[Value] = list(args)
    for argument in arguments[len(args):]:
        common = argument.name in COMMON_FIELDS
        empty = "" if argument.type.is_text else 0
        values.append(fields.get(argument.name, empty) if common else fields.pop(argument.name, empty))
    values = [int(ipaddress.ip_address(value)) if argument.type.address_bits and isinstance(value, str) else value
              for argument, value in zip(arguments, values)]
    defaults: Dict[str, Any] = {"ret": 0, "timestamp_ns": 0, "pid": 1, "tid": fields.get("pid", 1), "ppid": 0, "uid": 0,
                                "gid": 0, "comm": "", "program_id": 0}
    if fields.get("path") and "files" not in fields and event_type(name).path_argument in event_type(name).descriptors:
        fields["files"] = (fields["path"],)
    return Event(name=name, args=tuple(values), **{**defaults, **fields})


def decode_sockaddr(data: bytes) -> str:
    """`127.0.0.1:80`, `[::1]:80`, a unix socket's path, `@` and an abstract name, or `family N` (struct sockaddr)."""
    if len(data) < 2:
        return ""
    family = int.from_bytes(data[:2], sys.byteorder)
    if family == socket.AF_INET and len(data) >= 8:
        return f"{socket.inet_ntop(family, data[4:8])}:{int.from_bytes(data[2:4], 'big')}"
    if family == socket.AF_INET6 and len(data) >= 24:
        return f"[{socket.inet_ntop(family, data[8:24])}]:{int.from_bytes(data[2:4], 'big')}"
    if family == socket.AF_UNIX:
        name = data[2:]
        return decode_text(b"@" + name[1:] if name[:1] == b"\0" and len(name) > 1 else name.split(b"\0", 1)[0])
    return f"family {family}"


def record_text(record: bytes, place: int) -> str:
    """The text at `place` of a record: its length and, in the upper half, its offset behind the header."""
    if not place:
        return ""
    begin = HEADER.size + (place >> 32)
    return record[begin:begin + (place & 0xFFFF_FFFF)].decode("utf-8", "surrogateescape")


def decode_argument(record: bytes, slots: Sequence[int], argument: Argument) -> Value:
    raw = slots[argument.slot]
    if argument.is_text:
        if argument.type.is_cooked:
            return decode_sockaddr(encode_text(record_text(record, raw)))
        return record_text(record, raw)
    if argument.type.bits > 64:
        return raw << 64 | slots[argument.slot + 1]
    return raw - (1 << 64) if raw >> 63 and argument.is_signed else raw


def decode_record(record: bytes, clock_offset_ns: int = 0, name: str = "") -> Event:
    """An Event from one record of the ring buffer; `clock_offset_ns` is what turns CLOCK_BOOTTIME into Unix time.

    `name` is that of its event type, where the record's number is that of another run.
    Raises TraceleftError when the record is of another version than this script.
    """
    (timestamp_ns, ret, program_id, a0, a1, a2, a3, a4, a5, a6, a7, path, exe, cgroup, file, file_1,
     pid, tid, ppid, uid, gid, euid, mntns, netns, pidns, event_id, flags, _reserved, version, _filter, _tick,
     comm) = HEADER.unpack_from(record)
    if version != RECORD_VERSION:
        raise TraceleftError(f"the object's records are of version {version}, not {RECORD_VERSION}: run 'make bpf'")
    name = name or EVENT_NAMES[event_id]
    slots = (a0, a1, a2, a3, a4, a5, a6, a7)
    return Event(name, tuple([decode_argument(record, slots, argument) for argument in EVENT_TYPES[name].arguments]),
                 ret, timestamp_ns + clock_offset_ns, pid, tid, ppid, uid, gid,
                 comm.split(b"\0", 1)[0].decode("utf-8", "surrogateescape"), program_id,
                 flags & INCOMPLETE_MASK, flags & FLAG_CONTAINER != 0, record_text(record, path),
                 flags & FLAG_PATH_INCOMPLETE != 0, flags & FLAG_PATH_UNRESOLVED != 0,
                 (record_text(record, file), record_text(record, file_1)), record_text(record, exe),
                 record_text(record, cgroup), euid, mntns, netns, pidns)


ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def escape_character(c: str) -> str:
    """Bytes that are no text and ASCII controls as \\xNN, other unprintable characters as \\uNNNN."""
    code = ord(c)
    if c in ESCAPES:
        return ESCAPES[c]
    if c.isprintable():
        return c
    if 0xDC80 <= code <= 0xDCFF:  # surrogateescape
        return f"\\x{code - 0xDC00:02x}"
    if code < 0x80:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def escape(text: str, also: str = "") -> str:
    """`text` on one line, with nothing in it that a terminal acts on; the characters of `also` become \\xNN."""
    if text.isprintable() and '"' not in text and "\\" not in text and not (also and any(c in text for c in also)):
        return text
    return "".join(f"\\x{ord(c):02x}" if c in also else escape_character(c) for c in text)


def format_args(event: Event) -> str:
    """`Filename "/tmp/a.txt" Flags 577 Mode 438`."""
    words = []
    files = iter(event.files)
    for argument, value in zip(EVENT_TYPES[event.name].arguments, event.args):
        if isinstance(value, str):
            words.append(f'{argument.label} "{escape(value)}"')
        elif argument.type.is_descriptor:
            words.append(f"{argument.label} {value}<{escape(next(files, ''), '<>') or 'unknown'}>")
        else:
            words.append(f"{argument.label} {argument.type.show(value)}")
    if event.incomplete:
        words = [word + " [incomplete]" if event.incomplete >> i & 1 else word for i, word in enumerate(words)]
    return " ".join(words)


def format_event(event: Event) -> str:
    """The line that `trace` without a spec prints."""
    words = (f"name {event.name} pid {event.pid} program id {event.program_id} return value {event.ret} "
             f"hash {event.hash}", format_args(event), "[container]" if event.in_container else "")
    return " ".join(filter(None, words))


HEADER_OFFSETS = {name: struct.calcsize("=" + "".join(code for _, code in HEADER_FIELDS[:index]))
                  for index, (name, _) in enumerate(HEADER_FIELDS)}


class LineFormat:
    """format_event(decode_record(record)) in one step for records of one event type: the hot path of printing all.

    Integers go from the record into the line as they are; so there are steps only for the other arguments. What is
    hashed are pieces of the record, since both are little-endian.
    """

    UNCOMMON_FLAGS = INCOMPLETE_MASK | FLAG_CONTAINER
    RET, ARGS, PID = (HEADER_OFFSETS[name] for name in ("ret", "args", "pid"))

    def __init__(self, event: EventType) -> None:
        arguments = event.arguments
        self.is_plain = all(argument.slot == i and not argument.type.is_cooked for i, argument in enumerate(arguments))
        codes = "".join("q" if argument.is_signed else "Q" for argument in arguments)
        # of struct event_header: args, files, pid, event, flags, version, and before them ret and program_id
        self.values = struct.Struct(f"=8xqQ{codes}{8 * (MAX_SLOTS - len(codes))}x24x2QI32xHH4xI")
        self.template = f"name {event.name} pid %d program id %d return value %d hash %d" + "".join(
            f' {argument.label} "%s"' if argument.is_text else f" {argument.label} %s" for argument in arguments)
        self.head = event.name.encode() + b"\0"
        self.texts, begin = [], self.RET
        for i, argument in enumerate(arguments):
            if argument.is_text:
                place = self.ARGS + 8 * i
                self.texts.append((i, slice(begin, place), argument.type.is_buffer))
                begin = place + 8
        self.rest = slice(begin, self.ARGS + 8 * len(arguments))
        self.shown = [(i, argument.type.show) for i, argument in enumerate(arguments)
                      if not argument.is_text and argument.type.show is not str]
        self.descriptors = [i for i, argument in enumerate(arguments) if argument.type.is_descriptor]

    def format(self, record: bytes) -> str:
        ret, program_id, *args, file, file_1, pid, _, flags, version = self.values.unpack_from(record)
        if flags & self.UNCOMMON_FLAGS or version != RECORD_VERSION or not self.is_plain:
            return format_event(decode_record(record))
        hashed = [self.head, record[self.PID:self.PID + 4]]
        for i, before, is_buffer in self.texts:
            begin = HEADER.size + (args[i] >> 32)
            text = record[begin:begin + (args[i] & 0xFFFF_FFFF)]
            hashed.append(record[before])
            if not is_buffer:
                hashed.append(text + b"\0")
            args[i] = escape(text.decode("utf-8", "surrogateescape"))
        hashed.append(record[self.rest])
        for i, show in self.shown:
            args[i] = show(args[i])
        for i in self.descriptors:
            args[i] = f"{args[i]}<{escape(record_text(record, file), '<>') or 'unknown'}>"
            file = file_1
        digest = blake2b(b"".join(hashed), digest_size=8).digest()
        return self.template % (pid, program_id, ret, int.from_bytes(digest, "little"), *args)


EVENT_OF_RECORD = struct.Struct("=H")
line_formats: Dict[int, LineFormat] = {}  # event id -> its format, once it is needed


def record_event(record: bytes) -> int:
    """The place of a record's event type in EVENT_NAMES."""
    event_id: int = EVENT_OF_RECORD.unpack_from(record, HEADER_OFFSETS["event"])[0]
    return event_id


def format_record(record: bytes) -> str:
    """The line that `trace` without a spec prints, from a record of the ring buffer."""
    event_id = record_event(record)
    if event_id not in line_formats:
        line_formats[event_id] = LineFormat(EVENT_TYPES[EVENT_NAMES[event_id]])
    return line_formats[event_id].format(record)


# ======================================================================================================================
# Rules: the typed tree of a rule. It is the one model that this engine and the kernel's tables follow
# ======================================================================================================================

Matcher = Callable[[Event], bool]
Getter = Callable[[Event], Any]


@dataclass(frozen=True)
class Const:
    """An integer literal, symbol, or expression of these."""

    value: int

    def getter(self) -> Getter:
        value = self.value
        return lambda event: value


@dataclass(frozen=True)
class Field:
    """A field of an event: argument `index`, or for index -1 the common field `name`.

    An IPv6 address is two integers for the kernel side: each `half` of it is a field, too.
    """

    name: str
    index: int
    is_text: bool
    is_signed: bool = False
    slot: int = 0          # of the argument's value in a record
    address_bits: int = 0  # of an IP address: 32 or 128
    half: str = ""         # "high" or "low"
    is_derived: bool = False  # a text that Python makes of what the kernel side captured

    def getter(self) -> Getter:
        if self.index < 0:
            return operator.attrgetter(self.name)
        index = self.index
        if self.half:
            shift = 64 if self.half == "high" else 0
            return lambda event: int(event.args[index]) >> shift & MASK64
        return lambda event: event.args[index]

    @property
    def halves(self) -> "Tuple[Field, ...]":
        """The integers that it is for the kernel side."""
        if self.address_bits <= 64:
            return (self,)
        return replace(self, half="high", address_bits=0), replace(self, half="low", slot=self.slot + 1, address_bits=0)


@dataclass(frozen=True)
class BitOp:
    """`&`, `|` or `^` of integers, on two's complement of unlimited width, as in Python."""

    op: str
    left: "IntExpr"
    right: "IntExpr"

    def getter(self) -> Getter:
        compute, left, right = BIT_OPERATORS[self.op], self.left.getter(), self.right.getter()
        return lambda event: compute(left(event), right(event))


@dataclass(frozen=True)
class Invert:
    """`~` of an integer."""

    operand: "IntExpr"

    def getter(self) -> Getter:
        operand = self.operand.getter()
        return lambda event: ~operand(event)


IntExpr = Union[Const, Field, BitOp, Invert]
MASK64 = (1 << 64) - 1
BIT_OPERATORS: Dict[str, Callable[[int, int], int]] = {"&": operator.and_, "|": operator.or_, "^": operator.xor}
COMPARISONS: Dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}


@dataclass(frozen=True)
class Compare:
    """A comparison of two integers, or `==` of two text fields."""

    op: str
    left: IntExpr
    right: IntExpr

    def matcher(self) -> Matcher:
        compare, left, right = COMPARISONS[self.op], self.left.getter(), self.right.getter()
        if isinstance(self.right, Const):
            value = self.right.value
            return lambda event: compare(left(event), value)
        return lambda event: compare(left(event), right(event))


@dataclass(frozen=True)
class IsIn:
    """Membership of an integer in integers, or of a text field in texts; `==` with one text is this too."""

    operand: IntExpr
    values: FrozenSet[Value]

    def matcher(self) -> Matcher:
        get, values = self.operand.getter(), self.values
        if len(values) == 1:
            (only,) = values
            return lambda event: get(event) == only
        return lambda event: get(event) in values


@dataclass(frozen=True)
class TextTest:
    """startswith, endswith, contains, glob or regex of a text field with a literal."""

    function: str
    field: Field
    literal: str

    def matcher(self) -> Matcher:
        get, test = self.field.getter(), TEXT_TESTS[self.function](self.literal)
        return lambda event: test(get(event))


@dataclass(frozen=True)
class Not:
    operand: "Condition"

    def matcher(self) -> Matcher:
        operand = self.operand.matcher()
        return lambda event: not operand(event)


@dataclass(frozen=True)
class And:
    operands: "Tuple[Condition, ...]"

    def matcher(self) -> Matcher:
        operands = [operand.matcher() for operand in self.operands]
        return lambda event: all(operand(event) for operand in operands)


@dataclass(frozen=True)
class Or:
    operands: "Tuple[Condition, ...]"

    def matcher(self) -> Matcher:
        operands = [operand.matcher() for operand in self.operands]
        return lambda event: any(operand(event) for operand in operands)


Condition = Union[Compare, IsIn, TextTest, Not, And, Or]


# ======================================================================================================================
# Rule language: text to that tree
# ======================================================================================================================

MAX_RULE_LENGTH = 65536
MAX_RULE_DEPTH = 64


def parse_rule(rule: str, event_type: EventType) -> Optional[Condition]:
    """The typed tree of `rule` for events of this type, None for a blank rule (every event). Raises RuleError."""
    source = rule.encode("utf-8", "backslashreplace").decode().strip()  # ast refuses lone surrogates, but not \udcNN
    if not source:
        return None
    if len(source) > MAX_RULE_LENGTH:
        raise RuleError(f"a rule of {len(source)} characters is too long (at most {MAX_RULE_LENGTH})")
    try:
        tree = parse_expression(source)
    except SyntaxError as error:
        raise syntax_error(source, error) from None
    except (ValueError, RecursionError, MemoryError) as error:
        reason = "a NUL character" if "null" in str(error) else "nesting that is too deep"
        raise RuleError(f"the rule has {reason}", source) from None
    return RuleParser(source, event_type).parse(tree.body)


def parse_expression(source: str) -> ast.Expression:
    """Raises what ast.parse() does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # '\d' in a pattern is no news
        return ast.parse(source, mode="eval")


MAX_COMM = 15  # bytes of a comm: TASK_COMM_LEN in include/linux/sched.h, without the NUL


def doubts(rule: str) -> Iterator[str]:
    """What a valid rule says and hardly means."""
    source = rule.encode("utf-8", "backslashreplace").decode().strip()
    for node in ast.walk(parse_expression(source or "0")):
        if not isinstance(node, ast.Compare):
            continue
        operands = [node.left, *node.comparators]
        fields = {operand.id for operand in operands if isinstance(operand, ast.Name)}
        for value in itertools.chain.from_iterable(getattr(operand, "elts", [operand]) for operand in operands):
            if "ret" in fields and isinstance(value, ast.Name) and value.id in vars(errno):
                yield f"a call that fails returns a negative number: ret == -{value.id}, not {value.id}"
            if "comm" in fields and isinstance(value, ast.Constant) and len(encode_text(str(value.value))) > MAX_COMM:
                yield f"'{escape(str(value.value))}' is no comm: the kernel keeps {MAX_COMM} bytes of a thread's name"


OPERATOR_HINTS = (
    # pattern, what to write instead
    (r"&&", "write 'and', not '&&'"),
    (r"\|\|", "write 'or', not '||'"),
    (r"!(?!=)", "write 'not', not '!'"),
    (r"(?<![=!<>])=(?!=)", "write '==', not '='"),
)
STRING_LITERAL = r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\""


def syntax_error(source: str, error: SyntaxError) -> RuleError:
    """A RuleError with a hint where the rule has an operator of another language outside of a string."""
    blanked = re.sub(STRING_LITERAL, lambda match: "_" * len(match[0]), source)
    for pattern, hint in OPERATOR_HINTS:
        match = re.search(pattern, blanked)
        if match:
            return RuleError(hint, source, match.start())
    message, column = error.msg, len(source)  # where Python gives no place, the rule ends too early
    if message.startswith(("unexpected EOF", "EOL ")):  # Python 3.9 does not say what the rule leaves open
        message, column = left_open(blanked) or (message, column)
    if message == error.msg and error.lineno and error.offset:
        lines = source.split("\n")
        place = sum(len(line) + 1 for line in lines[:error.lineno - 1]) + error.offset - 1
        if place + 1 < column or "EOF" not in message:  # 3.9's place of the end is the last character
            column = min(column, place)
    return RuleError(f"syntax error: {message}", source, column)


def left_open(blanked: str) -> Optional[Tuple[str, int]]:
    """What is wrong, and where, in a rule without its whole strings that ends within a string or brackets."""
    opened = []
    for match in re.finditer(r"""['"([{)\]}]""", blanked):
        if match[0] in "'\"":
            return "unterminated string literal", match.start()
        if match[0] in "([{":
            opened.append(match)
        elif opened:
            opened.pop()
    return (f"'{opened[-1][0]}' was never closed", opened[-1].start()) if opened else None


def symbols() -> Dict[str, int]:
    """Names such as O_CREAT, ENOENT and AF_INET with their values on this machine, from the standard library, whatever
    libc that was built with."""
    found = dict(OTHER_SYMBOLS)
    for module, pattern in ((os, "O_"), (stat, "S_"), (socket, "AF_|SOCK_|IPPROTO_"), (signal, "SIG[^_]"),
                            (errno, "E[A-Z0-9]+$"), (mmap, "PROT_|MAP_"), (fcntl, "F_|LOCK_")):
        for name in dir(module):
            if re.match(pattern, name) and isinstance(getattr(module, name), int):
                found[name] = int(getattr(module, name))
    return {**found, **KERNEL_SYMBOLS}


OTHER_SYMBOLS = {  # what the standard library lacks, the same on x86_64 and aarch64. Sources: include/uapi/linux/*.h
    # fcntl.h, and what socket has under another name only
    "AT_FDCWD": AT_FDCWD, "AT_SYMLINK_NOFOLLOW": 0x100, "AT_EACCESS": 0x200, "AT_REMOVEDIR": 0x200,
    "AT_SYMLINK_FOLLOW": 0x400, "AT_NO_AUTOMOUNT": 0x800, "AT_EMPTY_PATH": 0x1000, "AF_LOCAL": socket.AF_UNIX,
    # sched.h
    "CLONE_VM": 0x100, "CLONE_FS": 0x200, "CLONE_FILES": 0x400, "CLONE_VFORK": 0x4000, "CLONE_THREAD": 0x10000,
    "CLONE_NEWNS": 0x20000, "CLONE_NEWCGROUP": 0x2000000, "CLONE_NEWUTS": 0x4000000, "CLONE_NEWIPC": 0x8000000,
    "CLONE_NEWUSER": 0x10000000, "CLONE_NEWPID": 0x20000000, "CLONE_NEWNET": 0x40000000,
    # ptrace.h, mount.h, prctl.h, bpf.h
    "PTRACE_TRACEME": 0, "PTRACE_PEEKTEXT": 1, "PTRACE_PEEKDATA": 2, "PTRACE_POKETEXT": 4, "PTRACE_POKEDATA": 5,
    "PTRACE_CONT": 7, "PTRACE_ATTACH": 16, "PTRACE_DETACH": 17, "PTRACE_SEIZE": 0x4206,
    "MS_RDONLY": 1, "MS_NOSUID": 2, "MS_NODEV": 4, "MS_NOEXEC": 8, "MS_REMOUNT": 32, "MS_BIND": 4096, "MS_MOVE": 8192,
    "MNT_FORCE": 1, "MNT_DETACH": 2, "PR_SET_NAME": 15, "PR_SET_SECCOMP": 22, "PR_SET_NO_NEW_PRIVS": 38,
    "BPF_MAP_CREATE": 0, "BPF_PROG_LOAD": 5, "RENAME_NOREPLACE": 1, "RENAME_EXCHANGE": 2,
    # fcntl.h and signal.h: glibc's names, which musl lacks
    "O_FSYNC": os.O_SYNC, "F_EXLCK": 4, "F_SHLCK": 8, "LOCK_MAND": 32, "LOCK_READ": 64, "LOCK_WRITE": 128,
    "LOCK_RW": 192, "SIGCLD": signal.SIGCHLD,
}
# What is in the kernel's arguments, where a libc says otherwise: musl's O_ACCMODE has O_PATH in it, and O_LARGEFILE,
# which musl's open() sets, is 0 for glibc. Sources: asm-generic/fcntl.h, and asm/fcntl.h of arm64, in include/uapi
KERNEL_SYMBOLS = {"O_ACCMODE": 3, "O_LARGEFILE": 0o400000 if platform.machine() == "aarch64" else 0o100000}
SYMBOLS = symbols()


def event_fields(event_type: EventType) -> Dict[str, Field]:
    """Every field that a rule on this event type can name; an argument never hides what all events have."""
    fields = {}
    for index, argument in enumerate(event_type.arguments):
        fields[argument.name] = fields[f"arg{index + 1}"] = Field(
            argument.name, index, argument.is_text, argument.is_signed, argument.slot, argument.type.address_bits,
            is_derived=argument.type.is_cooked)
    common = dict(COMMON_FIELDS)
    if event_type.path_argument is not None:
        common["path"] = True
    fields.update({name: Field(name, -1, text, name == "ret", is_derived=name == "container")
                   for name, text in common.items()})
    return fields


AST_OPERATORS: Dict[type, str] = {
    ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.In: "in",
    ast.NotIn: "not in", ast.BitAnd: "&", ast.BitOr: "|", ast.BitXor: "^",
}
Node = Union[Const, Field, BitOp, Invert, str, Condition]  # str: a text literal
CONDITIONS = (Compare, IsIn, TextTest, Not, And, Or)


class RuleParser:
    """From Python's syntax tree to ours: checks names and types, folds constants, places each error."""

    def __init__(self, source: str, event_type: EventType) -> None:
        self.source, self.event_type = source, event_type
        self.fields = event_fields(event_type)
        self.depth = 0

    def parse(self, node: ast.expr) -> Condition:
        return self.condition(node)

    def error(self, node: ast.AST, message: str) -> RuleError:
        line, offset = getattr(node, "lineno", 1), getattr(node, "col_offset", 0)  # the offset is in UTF-8 bytes
        lines = self.source.split("\n")
        column = sum(len(text) + 1 for text in lines[:line - 1]) + len(lines[line - 1].encode()[:offset].decode())
        return RuleError(message, self.source, column)

    def visit(self, node: ast.expr) -> Node:
        """Dispatches by node type, see VISITORS."""
        visitor = VISITORS.get(type(node))
        if visitor is None:
            raise self.error(node, f"{type(node).__name__} is not part of the rule language")
        if self.depth >= MAX_RULE_DEPTH:
            raise self.error(node, f"the rule is nested too deeply (at most {MAX_RULE_DEPTH} levels)")
        self.depth += 1
        try:
            return visitor(self, node)
        finally:
            self.depth -= 1

    def condition(self, node: ast.expr) -> Condition:
        """The node as something true or false: an integer is true when it is not 0."""
        value = self.visit(node)
        if isinstance(value, CONDITIONS):
            return value
        if isinstance(value, (str, Const)):
            raise self.error(node, "a constant here is always true or always false: compare a field with it")
        if isinstance(value, Field) and (value.is_text or value.address_bits):
            what = "text" if value.is_text else "an address"
            raise self.error(node, f"'{value.name}' is {what} and not a condition: compare it, as in "
                                   f"{value.name} == '…'")
        return Compare("!=", value, Const(0))

    def integer(self, node: ast.expr, what: str) -> IntExpr:
        value = self.visit(node)
        if isinstance(value, (Const, BitOp, Invert)) or \
                isinstance(value, Field) and not value.is_text and not value.address_bits:
            return value
        raise self.error(node, f"{what} needs an integer, not {describe_node(value)}")

    def constant(self, node: ast.Constant) -> Node:
        value = node.value
        if isinstance(value, str):
            return self.text(node, value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(node, f"{value!r:.40} is neither an integer nor text")
        return self.int_const(node, value)

    def int_const(self, node: ast.AST, value: int) -> Const:
        if not -(1 << 63) <= value < 1 << 64:
            raise self.error(node, "the integer does not fit into 64 bits")
        return Const(value)

    def text(self, node: ast.AST, value: str) -> str:
        """The literal as an event would carry it, so that '\\udcc3\\udca9' and 'é' are the same name."""
        if "\0" in value:
            raise self.error(node, "a string with a NUL can never match: the kernel's strings end at it")
        try:
            return decode_text(encode_text(value))
        except UnicodeEncodeError:
            raise self.error(node, "a surrogate that stands for no byte can never match; "
                                   "bytes that are no UTF-8 are written '\\udc80' to '\\udcff'") from None

    def name(self, node: ast.Name) -> Node:
        if node.id in self.fields:
            return self.fields[node.id]
        if node.id in SYMBOLS:
            return Const(SYMBOLS[node.id])
        event = self.event_type
        if re.fullmatch(r"arg[1-9]", node.id):
            count = len(event.arguments)
            raise self.error(node, f"{event.name} has only {count} argument{'s' if count > 1 else ''}")
        if node.id in RULE_FUNCTIONS:
            raise self.error(node, f"{node.id} is a function: write {node.id}(field, '…')")
        near = suggest(node.id, [*self.fields, *SYMBOLS])
        raise self.error(node, f"{event.name} has no field '{escape(node.id)}'{near}; "
                               f"fields: {', '.join(self.known_fields())}")

    def known_fields(self) -> List[str]:
        return [name for name in self.fields if not re.fullmatch(r"arg[1-6]", name)]

    def bit_operation(self, node: ast.BinOp) -> Node:
        op = AST_OPERATORS.get(type(node.op))
        if op is None:
            raise self.error(node, f"arithmetic ({type(node.op).__name__}) is not part of the rule language; "
                                   "& | ^ ~ are")
        left, right = self.integer(node.left, f"'{op}'"), self.integer(node.right, f"'{op}'")
        if isinstance(left, Const) and isinstance(right, Const):
            return self.int_const(node, BIT_OPERATORS[op](left.value, right.value))
        return BitOp(op, left, right)

    def unary(self, node: ast.UnaryOp) -> Node:
        if isinstance(node.op, ast.Not):
            return Not(self.condition(node.operand))
        if isinstance(node.op, ast.Invert):
            operand = self.integer(node.operand, "'~'")
            return self.int_const(node, ~operand.value) if isinstance(operand, Const) else Invert(operand)
        operand = self.integer(node.operand, "a sign")
        if not isinstance(operand, Const):
            raise self.error(node, "a sign can only stand before a literal or a symbol")
        return self.int_const(node, -operand.value if isinstance(node.op, ast.USub) else operand.value)

    def boolean(self, node: ast.BoolOp) -> Condition:
        operands = tuple(self.condition(value) for value in node.values)
        return And(operands) if isinstance(node.op, ast.And) else Or(operands)

    def comparison(self, node: ast.Compare) -> Condition:
        """`a < b < c` is `a < b and b < c`."""
        operands = [node.left, *node.comparators]
        parts = tuple(self.compare_two(left, AST_OPERATORS.get(type(op), type(op).__name__.lower()), right)
                      for left, op, right in zip(operands, node.ops, operands[1:]))
        return parts[0] if len(parts) == 1 else And(parts)

    def compare_two(self, left: ast.expr, op: str, right: ast.expr) -> Condition:
        if op in ("in", "not in"):
            found = self.membership(left, right)
            return found if op == "in" else Not(found)
        if op not in COMPARISONS:
            raise self.error(right, "'is' is not part of the rule language: write '=='")
        a, b = self.operand(left, op), self.operand(right, op)
        if isinstance(a, (str, Const)) and isinstance(b, (str, Const)):
            raise self.error(left, "a comparison of two constants is always true or always false")
        if is_address(a) or is_address(b):
            return self.compare_addresses((left, a), op, (right, b))
        if is_text(a) != is_text(b):
            raise self.error(right, f"{describe_node(a)} cannot be compared with {describe_node(b)}")
        if not is_text(a):
            return Compare(op, a, b)  # type: ignore[arg-type]
        if op not in ("==", "!="):
            raise self.error(left, f"'{op}' needs integers; text has ==, !=, in, startswith, endswith, contains, "
                                   "glob and regex")
        if isinstance(a, str):
            a, b = b, a
        assert isinstance(a, Field)
        equal: Condition = IsIn(a, frozenset((b,))) if isinstance(b, str) else Compare("==", a, b)  # type: ignore
        return equal if op == "==" else Not(equal)

    def compare_addresses(self, left: Tuple[ast.expr, Node], op: str, right: Tuple[ast.expr, Node]) -> Condition:
        """`==` and `!=` of an address with a text or with another one."""
        (node, a), (other, b) = (left, right) if is_address(left[1]) else (right, left)
        assert isinstance(a, Field)
        if op not in ("==", "!="):
            raise self.error(node, f"'{op}' needs integers; an address has ==, != and in, as in "
                                   f"{a.name} in net('10.0.0.0/8')")
        if isinstance(b, str):
            equal = self.address_in(a, [self.network(other, a, b, "address")])
        elif isinstance(b, Field) and b.address_bits == a.address_bits:
            equal = all_conditions([Compare("==", one, two) for one, two in zip(a.halves, b.halves)])
        else:
            raise self.error(other, f"{describe_node(a)} cannot be compared with {describe_node(b)}: "
                                    "an address is written as text, as in '10.0.0.1'")
        return equal if op == "==" else Not(equal)

    def network(self, node: ast.AST, member: Field, text: str, what: str) -> Tuple[int, int]:
        """The first and the last address of an IP address or network of the field's family."""
        try:
            network = ipaddress.ip_network(text)
        except ValueError as error:
            raise self.error(node, f"'{escape(text)}' is no IP {what}: {error}") from None
        if network.max_prefixlen != member.address_bits:
            raise self.error(node, f"{member.name} of {self.event_type.name} is never an IPv{network.version} {what}")
        if what == "address" and network.num_addresses > 1:
            raise self.error(node, f"a network is written net('{escape(text)}'), after 'in'")
        return int(network.network_address), int(network.broadcast_address)

    @staticmethod
    def address_in(member: Field, ranges: Sequence[Tuple[int, int]]) -> Condition:
        """That an address lies in one of the ranges, in terms of the integers that it is for the kernel side."""
        return any_condition([all_conditions([
            in_range(half, first >> shift & MASK64, last >> shift & MASK64)
            for half, shift in zip(member.halves, (64, 0) if member.address_bits > 64 else (0,))
        ]) for first, last in ranges])

    def address_membership(self, member: Field, right: ast.expr) -> Condition:
        """`address in net('10.0.0.0/8')`, or in a list of these and of addresses."""
        elements = right.elts if isinstance(right, (ast.Tuple, ast.List, ast.Set)) else [right]
        if not elements:
            raise self.error(right, "nothing is in an empty list")
        ranges = []
        for element in elements:
            is_net = isinstance(element, ast.Call) and isinstance(element.func, ast.Name) and element.func.id == "net"
            literal = element.args[0] if is_net and len(element.args) == 1 else element  # type: ignore[attr-defined]
            if not isinstance(literal, ast.Constant) or not isinstance(literal.value, str):
                raise self.error(element, f"'{member.name} in' needs net('10.0.0.0/8'), or a list of these and of "
                                          "texts such as '10.0.0.1'")
            ranges.append(self.network(literal, member, literal.value, "network" if is_net else "address"))
        return self.address_in(member, ranges)

    def operand(self, node: ast.expr, op: str) -> Node:
        value = self.visit(node)
        if isinstance(value, CONDITIONS):
            raise self.error(node, f"'{op}' cannot compare a condition: use and, or, not")
        return value

    def membership(self, left: ast.expr, right: ast.expr) -> Condition:
        """`field in (literals)`, or `'x' in field`."""
        named = self.fields.get(left.id) if isinstance(left, ast.Name) else None
        if named is not None and named.address_bits:
            return self.address_membership(named, right)
        if not isinstance(right, (ast.Tuple, ast.List, ast.Set)):
            return self.substring(left, right)
        operand = self.operand(left, "in")
        if isinstance(operand, (str, Const)):
            raise self.error(left, "'in' with a list needs a field before it, not a constant")
        if not right.elts:
            raise self.error(right, "nothing is in an empty list")
        values: Set[Value] = set()
        for element in right.elts:
            literal = self.visit(element)
            if not isinstance(literal, (str, Const)):
                raise self.error(element, "a list can only hold literals and symbols")
            if is_text(literal) != is_text(operand):
                raise self.error(element, f"{describe_node(operand)} cannot be compared with {describe_node(literal)}")
            values.add(literal if isinstance(literal, str) else literal.value)
        return IsIn(operand, frozenset(values))  # type: ignore[arg-type]

    def substring(self, left: ast.expr, right: ast.expr) -> Condition:
        needle, haystack = self.operand(left, "in"), self.operand(right, "in")
        if isinstance(needle, str) and isinstance(haystack, Field) and haystack.is_text:
            return TextTest("contains", haystack, self.not_empty(left, needle))
        if isinstance(haystack, (str, Const)):
            raise self.error(right, "'in' needs a list, as in (1, 2), or a text field after it; "
                                    "a list of one is written (1,)")
        raise self.error(left, "'in' with a field after it looks for text: write 'x' in field")

    def not_empty(self, node: ast.AST, literal: str) -> str:
        if not literal:
            raise self.error(node, "every text contains the empty one: the test is always true")
        return literal

    def call(self, node: ast.Call) -> Condition:
        if isinstance(node.func, ast.Name) and node.func.id == "net":
            raise self.error(node, "net() stands behind 'in': daddr in net('10.0.0.0/8')")
        if not isinstance(node.func, ast.Name) or node.func.id not in RULE_FUNCTIONS:
            name = node.func.id if isinstance(node.func, ast.Name) else "this"
            raise self.error(node, f"'{escape(name)}' is not a function{suggest(name, RULE_FUNCTIONS)}; "
                                   f"functions: {', '.join(RULE_FUNCTIONS)}")
        name = node.func.id
        if len(node.args) != 2 or node.keywords:
            raise self.error(node, f"{name} takes a field and a text: {name}(field, '…')")
        subject, literal = self.visit(node.args[0]), self.visit(node.args[1])
        if not isinstance(subject, Field) or not subject.is_text:
            raise self.error(node.args[0], f"{name} needs a text field, not {describe_node(subject)}")
        if not isinstance(literal, str):
            raise self.error(node.args[1], f"{name} needs a text in quotes, not {describe_node(literal)}")
        if name in ("startswith", "endswith", "contains"):
            self.not_empty(node.args[1], literal)
        try:
            TEXT_TESTS[name](literal)
        except ValueError as error:
            raise self.error(node.args[1], str(error)) from None
        return TextTest(name, subject, literal)


def is_text(value: Node) -> bool:
    return isinstance(value, str) or isinstance(value, Field) and value.is_text


def is_address(value: Node) -> bool:
    return isinstance(value, Field) and value.address_bits > 0


def all_conditions(parts: Sequence[Condition]) -> Condition:
    return parts[0] if len(parts) == 1 else And(tuple(parts))


def any_condition(parts: Sequence[Condition]) -> Condition:
    return parts[0] if len(parts) == 1 else Or(tuple(parts))


def in_range(member: Field, first: int, last: int) -> Condition:
    if first == last:
        return Compare("==", member, Const(first))
    return And((Compare(">=", member, Const(first)), Compare("<=", member, Const(last))))


def describe_node(value: Node) -> str:
    if isinstance(value, CONDITIONS):
        return "a condition"
    if is_address(value):
        return "an address"
    if isinstance(value, Field):
        return f"{'text' if value.is_text else 'integer'} field '{value.name}'"
    return "a text" if isinstance(value, str) else "an integer"


VISITORS: Dict[type, Callable[[RuleParser, Any], Node]] = {
    ast.Constant: RuleParser.constant, ast.Name: RuleParser.name, ast.BinOp: RuleParser.bit_operation,
    ast.UnaryOp: RuleParser.unary, ast.BoolOp: RuleParser.boolean, ast.Compare: RuleParser.comparison,
    ast.Call: RuleParser.call,
}


# ======================================================================================================================
# Text tests: regex takes Python's syntax but runs in time linear in the text, whatever the pattern
# ======================================================================================================================

MAX_REGEX_STATES = 512
MAX_REGEX_CACHE = 4096
ASSERT_BEGIN, ASSERT_END, ASSERT_LINE_END = 1, 2, 4  # at position 0; at the end; there or before a final newline
REGEX_ASSERTIONS = {"AT_BEGINNING": ASSERT_BEGIN, "AT_BEGINNING_STRING": ASSERT_BEGIN,
                    "AT_END": ASSERT_LINE_END, "AT_END_STRING": ASSERT_END}
REGEX_CATEGORIES = {"CATEGORY_DIGIT": r"\d", "CATEGORY_NOT_DIGIT": r"\D", "CATEGORY_SPACE": r"\s",
                    "CATEGORY_NOT_SPACE": r"\S", "CATEGORY_WORD": r"\w", "CATEGORY_NOT_WORD": r"\W"}
CharTest = Callable[[str], bool]


def parse_regex(pattern: str) -> Any:
    """The standard library's own parse tree of a pattern, so that syntax and meaning are those of `re`."""
    try:
        parser = importlib.import_module("re._parser")
    except ImportError:  # before Python 3.11
        parser = importlib.import_module("sre_parse")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return parser.parse(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"bad pattern: {error}") from None


class Regex:
    """`re.search` as a boolean, by simulating all alternatives at once (K. Thompson, 1968), with the steps cached.

    Backtracking, as `re` does it, takes exponential time on patterns such as (a+)+$ and hostile text. The alternatives
    are a set of edges that read a character, which is an integer of one bit each, so that a step that is not in the
    cache is a few shifts: edges of a pattern mostly lead to their neighbours. Raises
    ValueError for what is no regular expression in the strict sense (backreferences, lookaround) and for \\b, flags,
    and patterns of more than MAX_REGEX_STATES characters once {m,n} is written out.
    """

    def __init__(self, pattern: str) -> None:
        tree = parse_regex(pattern)
        if tree.state.flags & ~re.UNICODE:
            raise ValueError("flags such as (?i) are not supported in a rule's regex")
        self.free: List[List[int]] = [[]]                    # state -> states reached without reading
        self.guarded: List[List[Tuple[int, int]]] = [[]]     # state -> (assertion, state)
        self.reading: List[List[Tuple[CharTest, int]]] = [[]]  # state -> (test of a character, state)
        self.tests: Dict[str, CharTest] = {}                 # by what they test, so that each is made once
        self.final = self.build(tree, 0)
        self.number_edges()

    def state(self) -> int:
        if len(self.free) >= MAX_REGEX_STATES:
            raise ValueError(f"the pattern is too large (more than {MAX_REGEX_STATES} states)")
        self.free.append([])
        self.guarded.append([])
        self.reading.append([])
        return len(self.free) - 1

    def build(self, tree: Any, start: int) -> int:
        """Adds the tree's parts one behind the other, from state `start`; returns the state after the last one."""
        for op, value in tree:
            name = str(op)
            if name in ("MAX_REPEAT", "MIN_REPEAT"):
                start = self.repeat(value[0], value[1], value[2], start)
            elif name == "BRANCH":
                end = self.state()
                for alternative in value[1]:
                    self.free[self.build(alternative, start)].append(end)
                start = end
            elif name == "SUBPATTERN" and not value[1] and not value[2]:
                start = self.build(value[3], start)
            elif name == "AT" and str(value) in REGEX_ASSERTIONS:
                end = self.state()
                self.guarded[start].append((REGEX_ASSERTIONS[str(value)], end))
                start = end
            else:
                end = self.state()
                self.reading[start].append((self.tests.setdefault(f"{name} {value}", char_test(name, value)), end))
                start = end
        return start

    def number_edges(self) -> None:
        """From here on a set of edges is an integer, a bit each; what follows an edge is so many bits away from it."""
        edges = [(state, test, target) for state, found in enumerate(self.reading) for test, target in found]
        self.targets = [target for _, _, target in edges]
        self.leaving = [0] * len(self.reading)                  # state -> the edges that begin there
        self.readers: Dict[CharTest, int] = dict.fromkeys(self.tests.values(), 0)  # test -> the edges that have it
        for number, (state, test, _) in enumerate(edges):
            self.leaving[state] |= 1 << number
            self.readers[test] |= 1 << number
        self.start, _ = self.enter((0,), 0)                     # where a match can begin, which is anywhere
        self.accepting = 0                                      # the edges that complete a match
        moves: Dict[int, int] = collections.defaultdict(int)    # distance -> the edges that it leads from
        for number, target in enumerate(self.targets):
            following, accepts = self.enter((target,), 0)
            self.accepting |= accepts << number
            for bit in bits_of(following):
                moves[bit - number] |= 1 << number
        self.moves = tuple(moves.items())
        self.chars: Dict[str, int] = {}   # character -> the edges that read it
        self.cache: Dict[int, int] = {}   # edges that have read -> edges that may read next

    def repeat(self, least: int, most: int, tree: Any, start: int) -> int:
        """Adds the tree `least` to `most` times; `most` is a constant of re's parser when there is no limit."""
        unlimited = str(most) == "MAXREPEAT"
        for _ in range(least):
            start = self.build(tree, start)
        if unlimited:
            begin, end = self.state(), self.state()
            self.free[start].append(begin)
            self.free[self.build(tree, begin)].append(begin)
            self.free[begin].append(end)
            return end
        end = self.state()
        for _ in range(most - least):
            self.free[start].append(end)
            begin = self.state()  # of its own, so that a loop inside cannot lead back before it
            self.free[start].append(begin)
            start = self.build(tree, begin)
        self.free[start].append(end)
        return end

    def closure(self, states: Iterable[int], position: int) -> FrozenSet[int]:
        """The states and all that can be reached from them without reading, at a position with these assertions."""
        pending, seen = list(states), set(states)
        while pending:
            at = pending.pop()
            for target in itertools.chain(self.free[at], (s for need, s in self.guarded[at] if need & position)):
                if target not in seen:
                    seen.add(target)
                    pending.append(target)
        return frozenset(seen)

    def enter(self, states: Iterable[int], position: int) -> Tuple[int, bool]:
        """The edges that may read next, and whether a match is complete."""
        reached, edges = self.closure(states, position), 0
        for state in reached:
            edges |= self.leaving[state]
        return edges, self.final in reached

    def classify(self, c: str) -> int:
        """The edges that read the character."""
        if len(self.chars) >= MAX_REGEX_CACHE:
            self.chars.clear()
        edges = 0
        for test, readers in self.readers.items():
            if test(c):
                edges |= readers
        self.chars[c] = edges
        return edges

    def step(self, active: int) -> int:
        """The edges that may read after these have read, where no assertion holds."""
        edges = self.start
        for distance, leaving in self.moves:
            moving = active & leaving
            if moving:
                edges |= moving << distance if distance >= 0 else moving >> -distance
        if len(self.cache) >= MAX_REGEX_CACHE:
            self.cache.clear()
        self.cache[active] = edges
        return edges

    def search(self, text: str) -> bool:
        last = len(text)
        newline = last - 1 if text.endswith("\n") else last
        edges, found = self.enter((0,), ASSERT_BEGIN | self.end_assertions(0, last, newline))
        for position, c in enumerate(text, 1):
            if found:
                return True
            readers = self.chars.get(c)
            active = edges & (self.classify(c) if readers is None else readers)
            if position >= newline:
                targets = [self.targets[edge] for edge in bits_of(active)]
                edges, found = self.enter((0, *targets), self.end_assertions(position, last, newline))
                continue
            if active & self.accepting:
                return True
            following = self.cache.get(active)
            edges = self.step(active) if following is None else following
        return found

    @staticmethod
    def end_assertions(position: int, last: int, newline: int) -> int:
        return (ASSERT_END if position == last else 0) | (ASSERT_LINE_END if position in (last, newline) else 0)


def bits_of(number: int) -> Iterator[int]:
    """The places of the bits that are set."""
    while number:
        lowest = number & -number
        yield lowest.bit_length() - 1
        number ^= lowest


def char_test(name: str, value: Any) -> CharTest:
    """The test of one character that a leaf of the parse tree means."""
    if name == "LITERAL":
        literal = chr(value)
        return lambda c: c == literal
    if name == "NOT_LITERAL":
        literal = chr(value)
        return lambda c: c != literal
    if name == "ANY":
        return lambda c: c != "\n"
    if name == "RANGE":
        low, high = chr(value[0]), chr(value[1])
        return lambda c: low <= c <= high
    if name == "CATEGORY" and str(value) in REGEX_CATEGORIES:
        category = re.compile(REGEX_CATEGORIES[str(value)])
        return lambda c: category.match(c) is not None
    if name == "IN":
        negated = str(value[0][0]) == "NEGATE"
        tests = [char_test(str(op), item) for op, item in value[negated:]]
        return lambda c: any(test(c) for test in tests) != negated
    raise ValueError(f"{name.lower().replace('_', ' ')} is not supported in a rule's regex: "
                     "only what can be matched in linear time is")


def compile_glob(pattern: str) -> Callable[[str], bool]:
    """The test of a shell pattern on the whole text; `*` matches `/` too. fnmatch's translation does not backtrack."""
    try:
        match = re.compile(fnmatch.translate(pattern)).match
    except re.error as error:  # such as [b-a] on older Pythons
        raise ValueError(f"bad pattern: {error}") from None
    return lambda text: match(text) is not None


TEXT_TESTS: Dict[str, Callable[[str], Callable[[str], bool]]] = {
    # each takes the literal and returns the test; ValueError for a literal that is none
    "startswith": lambda literal: lambda text: text.startswith(literal),
    "endswith": lambda literal: lambda text: text.endswith(literal),
    "contains": lambda literal: lambda text: literal in text,
    "glob": lambda literal: compile_glob(literal),
    "regex": lambda literal: Regex(literal).search,
}
RULE_FUNCTIONS = tuple(TEXT_TESTS)


# ======================================================================================================================
# Processing functions: which of the matched events pass. Another one is one class here
# ======================================================================================================================

MAX_GROUPS = 16384       # distinct `by` values of one filter; what comes later is counted together, as `other`
MAX_ALL_GROUPS = 262144  # of all filters
MAX_COUNT = (1 << 63) - 1
NSEC_PER_SEC = 1_000_000_000


class Parameter(NamedTuple):
    """One `NAME=VALUE` of a function's parameters: its default, and how the value is parsed."""

    default: Any  # None: it has to be given
    parse: Callable[[str, EventType], Any]  # raises ValueError


def parse_count(text: str, event_type: EventType) -> int:
    if not re.fullmatch(r"[0-9]{1,19}", text) or int(text) > MAX_COUNT:
        raise ValueError(f"expected an integer from 0 to 2^63-1, not '{escape(text)}'")
    return int(text)


def number_parser(lowest: int, highest: int) -> Callable[[str, EventType], int]:
    def parse(text: str, event_type: EventType) -> int:
        if not re.fullmatch(r"[0-9]{1,10}", text) or not lowest <= int(text) <= highest:
            raise ValueError(f"expected an integer from {lowest} to {highest}, not '{escape(text)}'")
        return int(text)

    return parse


NEEDED_EXAMPLES = {"by": "filename", "field": "count"}
MAX_NUMBER = (1 << 31) - 1  # of events or seconds in a window
parse_positive, parse_seconds, parse_multiplier = (number_parser(lowest, MAX_NUMBER) for lowest in (1, 0, 2))


def parse_by(text: str, event_type: EventType) -> Tuple[Field, ...]:
    fields, known = [], event_fields(event_type)
    for name in text.split(","):
        name = name.strip()
        if name not in known:
            raise ValueError(f"{event_type.name} has no field '{escape(name)}'{suggest(name, known)}")
        if known[name] in fields:
            raise ValueError(f"field '{name}' stands twice")
        fields.append(known[name])
    return tuple(fields)


class Group:
    """The state of one `by` group."""

    __slots__ = ("second", "received", "counted")

    def __init__(self) -> None:
        self.second = 0    # with which the window of `received` begins
        self.received = 0  # events in that window
        self.counted = 0   # events since the last one that passed


PROCESSING_SIGMA, PROCESSING_LIMIT, PROCESSING_BACKOFF = range(3)  # enum processing in bpf/traceleft.h


class Packed(NamedTuple):
    """What a processing function is to the kernel side: members of struct filter."""

    processing: int  # enum processing
    frequency: int = 1
    threshold: int = 0
    seconds: int = 1

    @property
    def uses_time(self) -> bool:
        return self.processing != PROCESSING_BACKOFF and self.threshold > 0


class Processing:
    """Base of the processing functions: keeps the groups of `by`.

    A function says in `parameters` what it takes, in passes_in() which events pass, and in pack() what it is to the
    kernel side.
    """

    name: ClassVar[str]
    parameters: ClassVar[Dict[str, Parameter]]

    def __init__(self, by: Tuple[Field, ...] = (), max_groups: int = MAX_GROUPS, event_time: bool = False,
                 **parameters: int) -> None:
        """With `event_time` an event's second is that of its timestamp, else it is the one between two ticks.

        The seconds of timestamps are those of the kernel's clock, which `clock_offset_ns` is behind Unix time.
        """
        self.max_groups, self.event_time = max_groups, event_time
        self.clock_offset_ns = 0
        self.getters = [member.getter() for member in by]
        self.groups: Dict[Tuple[Value, ...], Group] = {}
        self.other: Optional[Group] = None  # all groups beyond max_groups
        self.second = 0
        self.packed = self.pack(**parameters)

    @staticmethod
    def pack(**parameters: int) -> Packed:
        raise NotImplementedError

    def group(self, event: Event) -> Group:
        key = tuple([get(event) for get in self.getters])
        group = self.groups.get(key)
        if group is None:
            if len(self.groups) < self.max_groups:
                group = self.groups[key] = Group()
            else:
                group = self.other = self.other or Group()
        return group

    def passes(self, event: Event) -> bool:
        """Counts a matched event and says whether it passes."""
        second = (event.timestamp_ns - self.clock_offset_ns) // NSEC_PER_SEC if self.event_time else self.second
        return self.passes_in(self.group(event), second)

    def passes_in(self, group: Group, second: int) -> bool:
        raise NotImplementedError

    def count_in_window(self, group: Group, second: int) -> int:
        """How many events the group has received in the window, this one included. It begins with its first event."""
        seconds = self.packed.seconds
        if not group.received or (seconds and second >= group.second + seconds) or second < group.second - 1:
            group.second, group.received = second, 0  # but an event that is a little late counts in what has begun
        group.received += 1
        return group.received

    def tick(self) -> None:
        """The second is over."""
        self.second += 1


class Sigma(Processing):
    """`frequency=N`: every N-th event passes. `threshold=T`: the first T of a second are held back, not counted."""

    name = "sigma"
    parameters = {
        "frequency": Parameter(1, parse_count),
        "threshold": Parameter(0, parse_count),
        "by": Parameter((), parse_by),
    }

    @staticmethod
    def pack(frequency: int = 1, threshold: int = 0) -> Packed:  # type: ignore[override]
        return Packed(PROCESSING_SIGMA, max(frequency, 1), threshold)

    def passes_in(self, group: Group, second: int) -> bool:
        if self.packed.threshold and self.count_in_window(group, second) <= self.packed.threshold:
            return False
        group.counted += 1
        if group.counted < self.packed.frequency:
            return False
        group.counted = 0
        return True


class Limit(Processing):
    """`count=N`, `seconds=S`: the first N events pass, and no other in the S seconds that begin with the first's."""

    name = "limit"
    parameters = {
        "count": Parameter(1, parse_positive),
        "seconds": Parameter(1, parse_positive),
        "by": Parameter((), parse_by),
    }

    @staticmethod
    def pack(count: int = 1, seconds: int = 1) -> Packed:  # type: ignore[override]
        return Packed(PROCESSING_LIMIT, threshold=count, seconds=seconds)

    def passes_in(self, group: Group, second: int) -> bool:
        return self.count_in_window(group, second) <= self.packed.threshold


class Distinct(Limit):
    """`by=FIELD`: the first event of each value passes, and no other in `seconds` that begin with its own; 0: never."""

    name = "distinct"
    parameters = {"seconds": Parameter(0, parse_seconds), "by": Parameter(None, parse_by)}

    @staticmethod
    def pack(seconds: int = 0) -> Packed:  # type: ignore[override]
        return Packed(PROCESSING_LIMIT, threshold=1, seconds=seconds)


class Backoff(Processing):
    """`count=N`, `multiplier=M`: the events number N, N x M, N x M x M and so on pass."""

    name = "backoff"
    parameters = {
        "count": Parameter(1, parse_positive),
        "multiplier": Parameter(10, parse_multiplier),
        "by": Parameter((), parse_by),
    }

    @staticmethod
    def pack(count: int = 1, multiplier: int = 10) -> Packed:  # type: ignore[override]
        return Packed(PROCESSING_BACKOFF, frequency=multiplier, threshold=count)

    def passes_in(self, group: Group, second: int) -> bool:
        group.counted += 1
        power, rest = divmod(group.counted, self.packed.threshold)
        while not rest and power > 1:
            power, rest = divmod(power, self.packed.frequency)
        return not rest and power == 1


PROCESSING: Dict[str, Type[Processing]] = {function.name: function for function in (Sigma, Limit, Distinct, Backoff)}


# ======================================================================================================================
# Output functions: what reaches a channel of the events that passed. Another one is one class here
# ======================================================================================================================


OUTPUT_NONE, OUTPUT_HISTOGRAM, OUTPUT_TOP = range(3)  # enum output in bpf/traceleft.h
BUCKETS, TOP_SLOTS, TOP_FIELDS, TOP_TEXT = 66, 512, 3, 128  # enum limits
TOP_TABLE = TOP_SLOTS + 1  # the last slot counts what finds no other
OTHER = ()                 # is that group's name
MAX_TOPS = 64  # filters with top_per_sec that the kernel side counts: each takes half a MiB


class Detail(NamedTuple):
    """What an alert says of its events beside their number: how many were of each kind."""

    name: str  # its key in JSON
    rows: Tuple[Tuple[Tuple[Tuple[str, Value], ...], int], ...]  # ((name, value), …) of a kind, and how many events
    other: Optional[int] = None  # events of no kind that is named; None where there are no such

    def as_json(self) -> Dict[str, Any]:
        shown: Dict[str, Any] = {self.name: [{**dict(labels), "count": count} for labels, count in self.rows]}
        return {**shown, "other": self.other} if self.other is not None else shown

    def format(self) -> str:
        """`TOP: Comm "sh" 45, Comm "cat" 3, other 7`."""
        rows = [" ".join(f'{camel_case(name)} "{escape(value)}"' if isinstance(value, str) else
                         f"{camel_case(name)} {value}" for name, value in labels) + f" {count}"
                for labels, count in self.rows]
        return f"{self.name.upper()}: " + ", ".join(rows + ([f"other {self.other}"] if self.other is not None else []))


class PackedOutput(NamedTuple):
    """What an output function is to the kernel side: members of struct filter."""

    output: int  # enum output
    fields: Tuple[Field, ...] = ()


@dataclass(frozen=True)
class Alert:
    """One record for a channel. `lost` is how many of the filter's passed events were lost since the alert before."""

    filter: "Filter"
    time: float  # seconds since the Unix epoch
    count: int
    matched: int
    lost: int
    sample: Optional[Event]  # None when the ring buffer had no room for it
    detail: Optional[Detail] = None


class AlertsPerSec:
    """At the end of a second in which something passed, one alert with the first event that did as its sample.

    Base of the other output functions too: these count more of the events in observe(), or take from the kernel side
    what it has counted, and say it in detail().
    """

    name: ClassVar[str] = "alerts_per_sec"
    parameters: ClassVar[Dict[str, Parameter]] = {}

    def __init__(self) -> None:
        self.matched = self.passed = 0
        self.sample: Optional[Event] = None

    @classmethod
    def pack(cls, **parameters: Any) -> PackedOutput:
        return PackedOutput(OUTPUT_NONE)

    def add(self, matched: int, passed: int, sample: Optional[Event]) -> None:
        """Some events, and one of those that passed."""
        self.matched += matched
        self.passed += passed
        if self.sample is None and sample is not None:
            self.sample = sample

    def observe(self, event: Event) -> None:
        """An event that passed, beside add()."""

    def take(self, counted: Mapping[Any, int]) -> None:
        """What the kernel side has counted of the events that passed, beside add()."""

    def detail(self) -> Optional[Detail]:
        """What is to be said of the second that ends; it begins anew."""
        return None

    def tick(self, filter: "Filter", now: float, lost: int) -> Optional[Alert]:
        """The alert of the second that ends, if any; `lost` as in Alert."""
        if not self.passed:
            self.matched = 0
            return None
        alert = Alert(filter, now, self.passed, self.matched, lost, self.sample, self.detail())
        self.matched = self.passed = 0
        self.sample = None
        return alert


parse_k = number_parser(1, 100)


def parse_integer_field(text: str, event_type: EventType) -> Field:
    (found, *more) = parse_by(text, event_type)
    if more or found.is_text or found.address_bits:
        raise ValueError(f"expected one integer field, not '{escape(text)}'")
    return found


def parse_top_by(text: str, event_type: EventType) -> Tuple[Field, ...]:
    found = parse_by(text, event_type)
    if sum(len(member.halves) for member in found) > TOP_FIELDS:
        raise ValueError(f"expected up to {TOP_FIELDS} fields, an IPv6 address counts twice, not '{escape(text)}'")
    return found


class CountsKinds(AlertsPerSec):
    """Base of those that count kinds: what the kernel side counts of them is what an alert's count is made of, so that
    its kinds add up to it. `matched` comes from the filter's own counts, which are read a moment later."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[Any] = collections.Counter()
        self.takes = False  # from the kernel side, instead of observing events

    def take(self, counted: Mapping[Any, int]) -> None:
        self.takes = True
        self.counts.update(counted)
        self.passed += sum(counted.values())

    def add(self, matched: int, passed: int, sample: Optional[Event]) -> None:
        super().add(matched, 0 if self.takes else passed, sample)

    def tick(self, filter: "Filter", now: float, lost: int) -> Optional[Alert]:
        self.takes = False
        return super().tick(filter, now, lost)


class Histogram(CountsKinds):
    """alerts_per_sec, and how many of the events that passed had which values of `field`, by powers of two."""

    name = "histogram"
    parameters = {"field": Parameter(None, parse_integer_field)}

    def __init__(self, field: Field) -> None:
        super().__init__()
        self.field, self.get = field, field.getter()

    @classmethod
    def pack(cls, field: Field) -> PackedOutput:  # type: ignore[override]
        return PackedOutput(OUTPUT_HISTOGRAM, (field,))

    @staticmethod
    def bucket(value: int) -> int:
        """As bucket() in bpf/traceleft.bpf.c: 0 negative, 1 zero, and N from 2^(N-2) to 2^(N-1) - 1."""
        return 0 if value < 0 else value.bit_length() + 1

    def observe(self, event: Event) -> None:
        self.counts[self.bucket(int(self.get(event)))] += 1

    @staticmethod
    def bounds(index: int) -> Tuple[Tuple[str, int], ...]:
        if index < 2:
            return (("to", -1),) if index == 0 else (("from", 0), ("to", 0))
        return ("from", 1 << index - 2), ("to", (1 << index - 1) - 1)

    def detail(self) -> Detail:
        rows = tuple((self.bounds(index), count) for index, count in sorted(self.counts.items()) if count)
        self.counts = collections.Counter()
        return Detail("histogram", rows)


def cut_text(text: str) -> str:
    """As much of a text as the kernel side keeps of what a group is told by."""
    return decode_text(encode_text(text)[:TOP_TEXT - 1])


class TopPerSec(CountsKinds):
    """alerts_per_sec, and the `k` values of `by` that most of the events had that passed, with their counts."""

    name = "top_per_sec"
    parameters = {"k": Parameter(10, parse_k), "by": Parameter(None, parse_top_by)}

    def __init__(self, k: int, by: Tuple[Field, ...]) -> None:
        super().__init__()
        self.k, self.by = k, by
        self.getters = [member.getter() for member in by]

    @classmethod
    def pack(cls, k: int, by: Tuple[Field, ...]) -> PackedOutput:  # type: ignore[override]
        return PackedOutput(OUTPUT_TOP, by)

    def observe(self, event: Event) -> None:
        key = tuple([get(event) for get in self.getters])
        self.counts[key if key in self.counts or len(self.counts) < TOP_SLOTS else OTHER] += 1

    def detail(self) -> Detail:
        self.counts.pop(OTHER, None)  # it is in the difference
        # by count; values break ties, so that equal seconds look equal
        heaviest = sorted(self.counts.items(), key=lambda item: (-item[1], [str(value) for value in item[0]]))[:self.k]
        rows = tuple((tuple((member.name, self.show(member, value)) for member, value in zip(self.by, key)), count)
                     for key, count in heaviest)
        self.counts = collections.Counter()
        return Detail("top", rows, self.passed - sum(count for _, count in rows))

    @staticmethod
    def show(member: Field, value: Value) -> Value:
        if isinstance(value, str):
            return cut_text(value)
        return {32: show_ipv4, 128: show_ipv6}[member.address_bits](value) if member.address_bits else value


OUTPUTS: Dict[str, Type[AlertsPerSec]] = {
    function.name: function for function in (AlertsPerSec, TopPerSec, Histogram)}


# ======================================================================================================================
# Spec: JSON to validated records, with every error found
# ======================================================================================================================

MAX_FILTERS = 1024
FORMATS = {"file": ("collector_spec_pb", "text", "json"), "grpc": ("collector_spec_pb", "otlp")}


@dataclass(frozen=True)
class RotateSpec:
    """`rotate` of a file channel: past `max_bytes` the file becomes PATH.1, and PATH.1 becomes PATH.2, up to `keep`."""

    max_bytes: int
    keep: int = 5
    gzip: bool = False


@dataclass(frozen=True)
class TlsSpec:
    """`tls` of a grpc channel: paths of PEM files, and the name that the collector's certificate has to have."""

    ca: str = ""    # "": the host's CA certificates
    cert: str = ""  # with `key`: what the channel shows to the collector
    key: str = ""
    server_name: str = ""


@dataclass(frozen=True)
class SpoolSpec:
    """`spool` of a grpc channel: a directory of its own, for what has not been acknowledged."""

    dir: str
    max_bytes: int = 64 << 20


@dataclass(frozen=True)
class ChannelSpec:
    """One entry of `channels`."""

    id: str
    type: str  # key of FORMATS
    path: str
    format: str = ""  # of a grpc channel: what it speaks, one of FORMATS["grpc"]
    rotate: Optional[RotateSpec] = None
    tls: Optional[TlsSpec] = None
    token_file: str = ""
    gzip: bool = False
    spool: Optional[SpoolSpec] = None


# Channel type -> its options and what they are in JSON; a class stands for an object of its fields
CHANNEL_OPTIONS: Dict[str, Dict[str, type]] = {
    "file": {"format": str, "rotate": RotateSpec},
    "grpc": {"format": str, "tls": TlsSpec, "token_file": str, "gzip": bool, "spool": SpoolSpec},
}
OPTION_RANGES = {  # of the integers in these objects
    ("rotate", "max_bytes"): (4096, 1 << 40), ("rotate", "keep"): (1, 1000), ("spool", "max_bytes"): (65536, 1 << 40),
}
ALL_CHANNEL_OPTIONS = {name: kind for options in CHANNEL_OPTIONS.values() for name, kind in options.items()}


def option_fields(record: Any) -> Tuple[Dict[str, type], Dict[str, type]]:
    """The required and the optional members of an option that is an object."""
    kinds: Dict[str, Any] = {field.name: field.type for field in dataclasses.fields(record)}
    required = {field.name for field in dataclasses.fields(record) if field.default is dataclasses.MISSING}
    return ({name: kind for name, kind in kinds.items() if name in required},
            {name: kind for name, kind in kinds.items() if name not in required})


@dataclass(frozen=True)
class Filter:
    """One entry of `events`."""

    id: str
    event: str
    channel: str
    stream: str
    group: str
    rule_text: str
    rule: Optional[Condition]  # None: every event matches
    processing: str            # key of PROCESSING
    parameters: Mapping[str, Any] = field(hash=False)
    metrics: str               # key of OUTPUTS
    output_parameters: Mapping[str, Any] = field(hash=False)
    format: str

    @property
    def packed(self) -> Packed:
        """What the processing function is to the kernel side."""
        parameters = {name: value for name, value in self.parameters.items() if name != "by"}
        return PROCESSING[self.processing].pack(**parameters)

    @property
    def packed_output(self) -> PackedOutput:
        """What the output function is to the kernel side."""
        return OUTPUTS[self.metrics].pack(**self.output_parameters)

    def counts_as(self, other: "Optional[Filter]") -> bool:
        """Whether both are one filter, and match and count alike, whatever becomes of the alerts."""
        return other is not None and all(getattr(self, name) == getattr(other, name) for name in (
            "id", "event", "rule_text", "processing", "parameters", "metrics",
            "output_parameters"))


@dataclass(frozen=True)
class Spec:
    """A valid aggregation spec. `warnings` are texts about what is allowed but hardly meant."""

    channels: Tuple[ChannelSpec, ...]
    filters: Tuple[Filter, ...]
    warnings: Tuple[str, ...] = ()

    @property
    def ids(self) -> List[str]:
        return [member.id for member in self.filters]

    @property
    def used_channels(self) -> List[ChannelSpec]:
        used = {member.channel for member in self.filters}
        return [channel for channel in self.channels if channel.id in used]


MAX_SPEC_BYTES = 128 << 20  # MAX_FILTERS rules of MAX_RULE_LENGTH, written with escapes


def load_spec(path: Union[str, os.PathLike[str]]) -> Spec:
    """The spec in a file. Raises SpecError with every error in it, each beginning with the file's name."""
    name = escape(os.fspath(path))
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_SPEC_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise SpecError(f"{name}: cannot read the spec: {reason}") from None
    if len(data) > MAX_SPEC_BYTES:
        raise SpecError(f"{name}: it is larger than {MAX_SPEC_BYTES} bytes: is it a spec?")
    try:
        return parse_spec(parse_json(data))
    except SpecError as error:
        raise SpecError(*(f"{name}: {text}" for text in error.errors)) from None


def parse_json(data: bytes) -> Any:
    """The JSON value in `data`. Raises SpecError with line and column."""
    try:
        text = data.decode("utf-8-sig")  # Windows' editors put a mark at the begin
    except UnicodeDecodeError as error:
        raise SpecError(f"not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}") from None
    if not text.strip():
        raise SpecError("the file is empty; a spec is a JSON object with 'channels' and 'events'")
    try:
        return json.loads(text, object_pairs_hook=unique_keys, parse_constant=refuse_constant)
    except json.JSONDecodeError as error:
        place = text[:error.pos].rstrip()[-1:] + text[error.pos:error.pos + 2]
        hint = next((hint for pattern, hint in JSON_HINTS if re.match(pattern, place, re.S)), "")
        raise SpecError(f"not JSON: line {error.lineno} column {error.colno}: {error.msg}{hint}") from None
    except RecursionError:
        raise SpecError("not a spec: nested too deeply") from None
    except ValueError as error:  # refuse_constant, and integers of thousands of digits
        raise SpecError(f"not JSON: {str(error).split(';')[0]}") from None


JSON_HINTS = (  # the character before the place of an error and what stands there, what to do
    (r".?(//|/\*|#)", "; JSON has no comments"), (r".?'", "; JSON's strings are in double quotes"),
    (r",[]}]", "; remove the comma before it"),
)


def refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")


def unique_keys(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
    """An object whose repeated keys are kept under DUPLICATES, to be reported where the path is known."""
    value = dict(pairs)
    if len(value) < len(pairs):
        counts = collections.Counter(key for key, _ in pairs)
        value[DUPLICATES] = [key for key, count in counts.items() if count > 1]
    return value


DUPLICATES = "\0duplicates"  # no spec key: a NUL in one is refused as unknown


def parse_spec(value: Any) -> Spec:
    """A Spec from a JSON value. Raises SpecError with every error in it."""
    return SpecParser().parse(value)


class SpecParser:
    """Walks a JSON value and collects errors: each says the JSON path, what was expected, and the nearest name."""

    def __init__(self) -> None:
        self.errors: List[str] = []
        self.warnings: List[str] = []

    def error(self, path: str, message: str) -> None:
        self.errors.append(f"{path}: {message}" if path else message)

    def parse(self, value: Any) -> Spec:
        top = self.object(value, "", {"channels": list, "events": list}, {"$schema": str})
        channels = [self.channel(item, f"channels[{i}]") for i, item in enumerate(top.get("channels", []))]
        known = {channel.id: channel for channel in channels if channel}
        self.unique("channels", "id", [channel.id if channel else None for channel in channels])
        self.unique("channels", "path", ["-" if channel and channel.path == "-" else None for channel in channels])
        self.unique("channels", "spool.dir", [os.path.abspath(channel.spool.dir) if channel and channel.spool else None
                                              for channel in channels])
        events = top.get("events", [])
        if "events" in top and not events:
            self.error("events", "expected at least one filter")
        if len(events) > MAX_FILTERS:
            self.error("events", f"{len(events)} filters are too many (at most {MAX_FILTERS})")
        filters = [self.filter(item, i, known, len(known) == len(channels)) for i, item in enumerate(events)]
        self.unique("events", "id", [member.id if member else None for member in filters])
        spoken = self.spoken_formats(known, filters)
        if self.errors:
            raise SpecError(*self.errors)
        spec = Spec(tuple(replace(c, format=spoken.get(c.id, c.format)) for c in channels if c),
                    tuple(replace(f, format=spoken.get(f.channel, f.format)) for f in filters if f))
        unused = set(known) - {channel.id for channel in spec.used_channels}
        self.warnings += [f"channel '{escape(name)}' is used by no filter and is not opened" for name in known
                          if name in unused]
        self.warnings += [f"events[{i}].rule can never be true: {escape(member.rule_text)}"
                          for i, member in enumerate(spec.filters) if rule_rows(member.rule) == Rows([])]
        self.warnings += [f"events[{i}].rule: {doubt}" for i, member in enumerate(spec.filters)
                          for doubt in doubts(member.rule_text)]
        return Spec(spec.channels, spec.filters, tuple(self.warnings))

    def object(self, value: Any, path: str, required: Dict[str, type], optional: Dict[str, type]) -> Dict[str, Any]:
        """The members of a JSON object that have the right type; the others are errors."""
        if not isinstance(value, dict):
            self.error(path, f"expected an object, not {json_type(value)}")
            return {}
        members = {**required, **optional}
        prefix = path + "." if path else ""
        for key in value.get(DUPLICATES, ()):
            self.error(f"{prefix}{escape(key)}", "stands twice in the same object")
        for key in value:
            if key not in members and key != DUPLICATES:
                self.error(prefix + escape(key), f"unknown key{suggest(key, members)}; known: {', '.join(members)}")
        for key in required:
            if key not in value:
                self.error(path, f"'{key}' is missing")
        found = {}
        for key, expected in members.items():
            if key in value and self.has_type(value[key], expected, prefix + key):
                found[key] = value[key]
        return found

    def has_type(self, value: Any, expected: type, path: str) -> bool:
        if not isinstance(value, expected) or isinstance(value, bool) and expected is not bool:
            self.error(path, f"expected {'an integer' if expected is int else json_type(expected())}, "
                             f"not {json_type(value)}")
            return False
        if isinstance(value, str) and "\0" in value:
            self.error(path, "a string with a NUL cannot be used here")
            return False
        return True

    def known(self, path: str, what: str, name: Optional[str], names: Iterable[str]) -> Optional[str]:
        """`name` when it is one of `names`; None, and an error, when it is not."""
        names = list(names)
        if name is None or name in names:
            return name
        names = [escape(known) for known in names]
        self.error(path, f"unknown {what} '{escape(name)}'{suggest(name, names)}; known: {', '.join(names)}")
        return None

    def unique(self, path: str, key: str, values: Sequence[Optional[str]]) -> None:
        first: Dict[str, int] = {}
        for index, value in enumerate(values):
            if value is not None and first.setdefault(value, index) != index:
                self.error(f"{path}[{index}].{key}", f"'{escape(value)}' is already the {key} of "
                                                     f"{path}[{first[value]}]")

    def channel(self, value: Any, path: str) -> Optional[ChannelSpec]:
        named = value.get("type") if isinstance(value, dict) else None
        options = CHANNEL_OPTIONS.get(named if isinstance(named, str) else "", ALL_CHANNEL_OPTIONS)
        objects = {name: kind for name, kind in options.items() if kind not in (str, bool)}
        members = self.object(value, path, {"id": str, "type": str, "path": str},
                              {name: dict if name in objects else kind for name, kind in options.items()})
        kind = self.known(f"{path}.type", "channel type", members.get("type"), FORMATS)
        for name, record in objects.items():
            if name in members:
                members[name] = self.option(name, members[name], f"{path}.{name}", record)
        if members.get("path") == "-" and "rotate" in members:
            self.error(f"{path}.rotate", "stdout cannot be rotated")
        if members.get("token_file") == "":
            self.error(f"{path}.token_file", "expected a text that is not empty")
        if members.get("id") == "":
            self.error(f"{path}.id", "expected a text that is not empty")
        if members.get("path") == "":
            self.error(f"{path}.path", "expected a text that is not empty")
        elif kind == "grpc" and "path" in members:
            try:
                parse_target(members["path"])
            except ValueError as error:
                self.error(f"{path}.path", str(error))
        if kind == "file" and "format" in members:
            self.error(f"{path}.format", "a file channel has none of its own: it stands in events[].output.format")
        spoken = self.known(f"{path}.format", "format for a grpc channel", members.get("format"), FORMATS["grpc"]) \
            if kind == "grpc" else None
        if not members.get("id") or not kind or not members.get("path"):
            return None
        return ChannelSpec(**{**members, "format": spoken or ""})

    def option(self, name: str, value: Dict[str, Any], path: str, record: Any) -> Any:
        """An object such as `tls` as its record, whose fields without a default are required; None after an error."""
        before = len(self.errors)
        members = self.object(value, path, *option_fields(record))
        for key, member in members.items():
            least, most = OPTION_RANGES.get((name, key), (0, 0))
            if isinstance(member, str) and not member:
                self.error(f"{path}.{key}", "expected a text that is not empty")
            elif most and not least <= member <= most:
                self.error(f"{path}.{key}", f"expected an integer from {least} to {most}, not {member}")
        if record is TlsSpec and ("cert" in members) != ("key" in members):
            self.error(path, "'cert' and 'key' belong together")
        return record(**members) if len(self.errors) == before else None

    def filter(self, value: Any, index: int, channels: Dict[str, ChannelSpec], all_known: bool) -> Optional[Filter]:
        path, before = f"events[{index}]", len(self.errors)
        members = self.object(value, path, {"name": str, "channel": str, "function": dict, "output": dict},
                              {"id": str, "stream": str, "group": str, "rule": str})
        if members.get("id") == "":
            self.error(f"{path}.id", "expected a text that is not empty")
        event_type = self.event_type(members.get("name"), f"{path}.name")
        channel = members.get("channel")
        if all_known or channel in channels:  # else the error stands at the channel already
            channel = self.known(f"{path}.channel", "channel id", channel, channels)
        function = self.function(members.get("function", {}), f"{path}.function", event_type,
                                 "function" in members)
        output = self.output(members.get("output", {}), f"{path}.output",
                             channels[channel].type if channel in channels else None, event_type,
                             "output" in members)
        rule = self.rule(members.get("rule", ""), f"{path}.rule", event_type)
        if len(self.errors) > before or not event_type or not channel or not function or not output:
            return None
        return Filter(members.get("id", f"{event_type.name}-{index}"), event_type.name, channel,
                      members.get("stream", ""), members.get("group", ""), members.get("rule", ""), rule,
                      function[0], function[1], output[0], output[1], output[2])

    def spoken_formats(self, channels: Mapping[str, ChannelSpec], filters: Sequence[Optional[Filter]]
                       ) -> Dict[str, str]:
        """Grpc channel id -> the one format that it speaks: its own `format`, or else that of its filters."""
        spoken = {channel.id: channel.format for channel in channels.values() if channel.format}
        for index, member in enumerate(filters):
            channel = channels.get(member.channel) if member else None
            if member is None or channel is None or channel.type != "grpc":
                continue
            format_name = spoken.setdefault(channel.id, member.format)
            if member.format not in (format_name, "collector_spec_pb" if channel.format else format_name):
                self.error(f"events[{index}].output.format", f"channel '{escape(channel.id)}' speaks {format_name} "
                           f"already, and not {member.format}: a grpc channel has one format")
        return spoken

    def event_type(self, name: Optional[str], path: str) -> Optional[EventType]:
        try:
            return event_type(name) if name is not None else None
        except KeyError:
            self.error(path, f"unknown event '{escape(name or '')}'{suggest(name or '', event_names())}; "
                             "'traceleft.py events' lists them")
        except HostError as error:
            self.error(path, str(error))
        return None

    def rule(self, text: str, path: str, event_type: Optional[EventType]) -> Optional[Condition]:
        if event_type is not None:
            try:
                return parse_rule(text, event_type)
            except RuleError as error:
                self.error(path, error.with_caret() if error.rule else str(error))
        return None

    def function(self, value: Any, path: str, event_type: Optional[EventType],
                 present: bool) -> Optional[Tuple[str, Dict[str, Any]]]:
        if not present:
            return None
        members = self.object(value, path, {"id": str}, {"parameters": str})
        name = self.known(f"{path}.id", "function", members.get("id"), PROCESSING)
        if name is None or event_type is None:
            return None
        return name, self.parameters(members.get("parameters", ""), f"{path}.parameters", name,
                                     PROCESSING[name].parameters, event_type)

    def parameters(self, text: str, path: str, function: str, known: Mapping[str, Parameter],
                   event_type: EventType) -> Dict[str, Any]:
        """`frequency=100;threshold=0` as a dict of all the function's parameters."""
        values: Dict[str, Any] = {}
        parts = text.split(";")
        for part in parts if parts[-1].strip() else parts[:-1]:  # a `;` at the end is no mistake
            name, equals, value = (word.strip() for word in part.partition("="))
            if not equals:
                self.error(path, f"expected NAME=VALUE, not '{escape(part)}'")
            elif name not in known:
                self.error(path, f"{function} has no parameter '{escape(name)}'{suggest(name, known)}; "
                                 f"known: {', '.join(known) or 'none'}")
            elif name in values:
                self.error(path, f"parameter '{name}' stands twice")
            else:
                try:
                    values[name] = known[name].parse(value, event_type)
                except ValueError as error:
                    self.error(path, f"{name}: {error}")
        for name, parameter in known.items():
            if parameter.default is None and not re.search(rf"(^|;)\s*{name}\s*=", text):
                self.error(path, f"{function} needs the parameter '{name}', as in '{name}={NEEDED_EXAMPLES[name]}'")
        return {**{name: parameter.default for name, parameter in known.items()}, **values}

    def output(self, value: Any, path: str, channel_type: Optional[str], event_type: Optional[EventType],
               present: bool) -> Optional[Tuple[str, Dict[str, Any], str]]:
        if not present:
            return None
        members = self.object(value, path, {"metrics": str, "format": str}, {"parameters": str})
        metrics = self.known(f"{path}.metrics", "metrics", members.get("metrics"), OUTPUTS)
        formats = FORMATS[channel_type] if channel_type else sorted({f for known in FORMATS.values() for f in known})
        format_name = self.known(f"{path}.format", f"format for a {channel_type or 'file or grpc'} channel",
                                 members.get("format"), formats)
        if not metrics or not format_name or event_type is None:
            return None
        return metrics, self.parameters(members.get("parameters", ""), f"{path}.parameters", metrics,
                                        OUTPUTS[metrics].parameters, event_type), format_name


def json_type(value: Any) -> str:
    """What JSON calls a value, with its article."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    names: Dict[type, str] = {dict: "an object", list: "an array", str: "a string"}
    return names.get(type(value), "a number")


def parse_target(text: str) -> Tuple[str, int]:
    """Where a grpc channel connects to: `HOST:PORT`, or `dns:///HOST:PORT` for all of its addresses; or ValueError."""
    return parse_address(text[len(DNS_SCHEME):] if text.startswith(DNS_SCHEME) else text)


DNS_SCHEME = "dns:///"


def parse_address(text: str) -> Tuple[str, int]:
    """`HOST:PORT`, an IPv6 address in brackets. Raises ValueError."""
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.%\w]+\]|[^\s:/\[\]]+):([0-9]{1,5})", text)
    if not match:
        raise ValueError(f"expected HOST:PORT, as in localhost:50051, not '{escape(text)}'")
    if int(match[2]) > 65535:
        raise ValueError(f"there is no port {match[2]} (at most 65535) in '{escape(text)}'")
    return match[1].strip("[]"), int(match[2])


# ======================================================================================================================
# Kernel tables: the spec's rules and counters as what the BPF program evaluates at the tracepoint
# ======================================================================================================================

# enum field, enum dimension_kind, enum filter_flags and enum limits in bpf/traceleft.h
FIELD_RET = MAX_SLOTS
KERNEL_FIELDS: Dict[str, int] = {name: FIELD_RET + index for index, name in enumerate(
    ("ret", "pid", "tid", "ppid", "uid", "gid", "program_id", "comm", "euid", "mntns", "netns", "pidns", "path", "exe",
     "cgroup", "files", "files_1", "time"))}
FIELD_TIME = KERNEL_FIELDS["time"]
ALL_FIELDS = (1 << FIELD_TIME + 1) - 1
PRINTED_FIELDS = (1 << MAX_SLOTS) - 1 | sum(1 << KERNEL_FIELDS[name] for name in (
    "ret", "pid", "program_id", "pidns", "path", "files", "files_1", "time"))  # those of format_event()
DIMENSION_INTEGER, DIMENSION_WHOLE, DIMENSION_PREFIX, DIMENSION_SUFFIX = range(4)
FILTER_STREAM, FILTER_GENERAL = 1, 2
MAX_DIMENSIONS = 32
MAX_WORDS = 17                # MAX_FILTERS rows, and room for the stream of those that Python evaluates
MAX_BOUNDS = 1 << 16  # in one dimension: 1 << MAX_BOUNDS_LOG2 in bpf/traceleft.h
MAX_ROWS = 64 * MAX_WORDS     # of all filters of one event type
MAX_FILTER_ROWS = 64          # of one filter: a rule that needs more is left to Python
MAX_TEXT = 4096               # bytes of a text that the kernel side captures: PATH_MAX
SIGN64 = 1 << 63

# struct dimension, the begin of struct matcher, struct vector, struct text and struct filter
DIMENSION = struct.Struct("=BBHIIIIIQQ")
MATCHER = struct.Struct("=IIIIII")
VECTOR_SIZE = 8 * MAX_WORDS
TEXT = struct.Struct("=QIIIII4x")
MAX_PROBES = 32               # entries of the table of texts that are looked at for one
FILTER = struct.Struct("=QQIIIIIIIIBB3s3s24s24s")
HISTOGRAM = struct.Struct(f"={BUCKETS}Q48x")
TOP_SLOT = struct.Struct("=QQ" + f"Q{TOP_TEXT}s" * TOP_FIELDS)


class Dimension(NamedTuple):
    """One look-up of an event: `(value & and_mask) ^ xor_mask` among ranges, or a text (or a part of it) in a set."""

    kind: int
    field: int       # enum field
    length: int = 0  # bytes of a prefix or suffix
    and_mask: int = 0
    xor_mask: int = 0


@dataclass(frozen=True)
class Ranges:
    """A set of unsigned 64-bit integers, as disjoint ascending (first, last) with gaps between them."""

    ranges: Tuple[Tuple[int, int], ...]

    @staticmethod
    def of(pairs: Iterable[Tuple[int, int]]) -> "Ranges":
        """The union of (first, last), of which those with first > last are empty."""
        merged: List[Tuple[int, int]] = []
        for first, last in sorted((max(first, 0), min(last, MASK64)) for first, last in pairs):
            if first > last:
                continue
            if merged and first <= merged[-1][1] + 1:
                merged[-1] = (merged[-1][0], max(merged[-1][1], last))
            else:
                merged.append((first, last))
        return Ranges(tuple(merged))

    def __invert__(self) -> "Ranges":
        edges = [-1, *itertools.chain.from_iterable(self.ranges), MASK64 + 1]
        return Ranges.of((before + 1, after - 1) for before, after in zip(edges[::2], edges[1::2]))

    def __or__(self, other: "Ranges") -> "Ranges":
        return Ranges.of((*self.ranges, *other.ranges))

    def __and__(self, other: "Ranges") -> "Ranges":
        return ~(~self | ~other)

    @property
    def is_empty(self) -> bool:
        return not self.ranges

    @property
    def is_full(self) -> bool:
        return self.ranges == ((0, MASK64),)


@dataclass(frozen=True)
class Texts:
    """A set of texts: these, or with `all_but` all but these."""

    texts: FrozenSet[bytes]
    all_but: bool = False

    def __invert__(self) -> "Texts":
        return Texts(self.texts, not self.all_but)

    def __and__(self, other: "Texts") -> "Texts":
        if self.all_but and other.all_but:
            return Texts(self.texts | other.texts, True)
        if self.all_but:
            return Texts(other.texts - self.texts)
        return Texts(self.texts - other.texts if other.all_but else self.texts & other.texts)

    def __or__(self, other: "Texts") -> "Texts":
        return ~(~self & ~other)

    @property
    def is_empty(self) -> bool:
        return not self.texts and not self.all_but

    @property
    def is_full(self) -> bool:
        return not self.texts and self.all_but


Constraint = Union[Ranges, Texts]
Row = Dict[Dimension, Constraint]  # a conjunction; an empty one is always true


class Rows(NamedTuple):
    """A rule as a disjunction of rows. `reasons` say what the kernel cannot decide; then they let too much through."""

    rows: List[Row]
    reasons: Tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        return not self.reasons


EVERYTHING: List[Row] = [{}]


def rule_rows(node: Optional[Condition], negate: bool = False) -> Rows:
    """The rows of a rule, or of its negation."""
    if node is None:
        return Rows(EVERYTHING)
    if isinstance(node, Not):
        return rule_rows(node.operand, not negate)
    if isinstance(node, (And, Or)):
        parts = [rule_rows(operand, negate) for operand in node.operands]
        return all_of(parts) if isinstance(node, And) != negate else any_of(parts)
    derived = node.operand if isinstance(node, IsIn) else node.field if isinstance(node, TextTest) else None
    if isinstance(derived, Field) and derived.is_derived:
        return Rows(EVERYTHING, (f"{derived.name}, which is made of what the kernel side captures,",))
    if isinstance(node, Compare):
        found = compare_constraint(node)
    elif isinstance(node, IsIn):
        found = membership_constraint(node)
    else:
        return text_rows(node, negate)
    if found is None:
        what = "text fields" if isinstance(node, Compare) and is_text(node.left) else "integers that are not constant"
        return Rows(EVERYTHING, (f"a comparison of two {what}",))
    dimension, constraint = found
    return Rows(simplify({dimension: ~constraint if negate else constraint}))


def simplify(row: Row) -> List[Row]:
    """[row] without what is always true, or [] when it is never true."""
    if any(constraint.is_empty for constraint in row.values()):
        return []
    return [{dimension: constraint for dimension, constraint in row.items() if not constraint.is_full}]


def both(a: Row, b: Row) -> List[Row]:
    """The conjunction of two rows."""
    row = dict(a)
    for dimension, constraint in b.items():
        row[dimension] = row[dimension] & constraint if dimension in row else constraint  # type: ignore[operator]
    return simplify(row)


def all_of(parts: Sequence[Rows]) -> Rows:
    """The conjunction of disjunctions, multiplied out."""
    rows = EVERYTHING
    reasons = tuple(itertools.chain.from_iterable(part.reasons for part in parts))
    for part in parts:
        product = unite(itertools.chain.from_iterable(both(a, b) for a in rows for b in part.rows))
        if len(product) > MAX_FILTER_ROWS:  # leaving a condition out lets too much through, and is sound
            reasons += (f"alternatives that multiply to more than {MAX_FILTER_ROWS}",)
        else:
            rows = product
    return Rows(rows, reasons)


def any_of(parts: Sequence[Rows]) -> Rows:
    rows = unite(itertools.chain.from_iterable(part.rows for part in parts))
    reasons = tuple(itertools.chain.from_iterable(part.reasons for part in parts))
    if len(rows) > MAX_FILTER_ROWS:
        return Rows(EVERYTHING, (*reasons, f"more than {MAX_FILTER_ROWS} alternatives"))
    return Rows(rows, reasons)


def unite(rows: Iterable[Row]) -> List[Row]:
    """The rows without repetitions, those on one and the same dimension as one."""
    united: Dict[Any, Row] = {}
    for row in rows:
        if not row:
            return EVERYTHING
        key = next(iter(row)) if len(row) == 1 else frozenset(row.items())
        if key in united and len(row) == 1:
            (dimension, constraint), = row.items()
            row = {dimension: united[key][dimension] | constraint}  # type: ignore[operator]
            if row[dimension].is_full:
                return EVERYTHING
        united[key] = row
    return list(united.values())


def kernel_field(member: Field) -> int:
    """The field's number in the kernel side: its enum field."""
    return member.slot if member.index >= 0 else KERNEL_FIELDS[member.name]


def kernel_fields(members: Iterable[Field]) -> List[Tuple[int, bool]]:
    """(enum field, is text) of each; an IPv6 address is two."""
    return [(kernel_field(part), part.is_text) for member in members for part in member.halves]


class BitFunction(NamedTuple):
    """(field & and_mask) ^ xor_mask, on two's complement of unlimited width: what & | ^ ~ with constants amount to."""

    field: Optional[Field]
    and_mask: int
    xor_mask: int


def bit_function(node: IntExpr) -> Optional[BitFunction]:
    """The node as a BitFunction of at most one field; None when it has two."""
    if isinstance(node, Const):
        return BitFunction(None, 0, node.value)
    if isinstance(node, Field):
        return BitFunction(node, -1 if node.is_signed else MASK64, 0)
    if isinstance(node, Invert):
        inner = bit_function(node.operand)
        return inner and inner._replace(xor_mask=~inner.xor_mask)
    left, right = bit_function(node.left), bit_function(node.right)
    if left is None or right is None or left.field and right.field:
        return None
    inner, constant = (left, right.xor_mask) if left.field else (right, left.xor_mask)
    if node.op == "&":
        return BitFunction(inner.field, inner.and_mask & constant, inner.xor_mask & constant)
    if node.op == "|":
        return BitFunction(inner.field, inner.and_mask & ~constant, inner.xor_mask & ~constant ^ constant)
    return inner._replace(xor_mask=inner.xor_mask ^ constant)


def integer_dimension(node: IntExpr) -> Optional[Tuple[Dimension, int]]:
    """The dimension of an expression, and the value that its key 0 stands for: keys are in the values' order."""
    function = bit_function(node)
    if function is None or function.field is None:
        return None
    _, and_mask, xor_mask = function
    bias, base = 0, 0 if xor_mask >= 0 else -1 << 64
    if and_mask < 0:  # the sign comes through: flipping the sign bit puts negative values before the others
        if and_mask < -SIGN64 or not -SIGN64 <= xor_mask < SIGN64:
            return None
        bias, base = SIGN64, -SIGN64
    dimension = Dimension(DIMENSION_INTEGER, kernel_field(function.field), 0, and_mask & MASK64,
                          xor_mask & MASK64 ^ bias)
    return dimension, base


MIRRORED = {"==": "==", "!=": "!=", "<": ">", "<=": ">=", ">": "<", ">=": "<="}


def compare_constraint(node: Compare) -> Optional[Tuple[Dimension, Constraint]]:
    op, left, right = node.op, node.left, node.right
    if isinstance(left, Const):
        op, left, right = MIRRORED[op], right, left
    found = integer_dimension(left) if isinstance(right, Const) and not is_text(left) else None
    if found is None:
        return None
    dimension, base = found
    assert isinstance(right, Const)
    key = right.value - base
    ranges = {"==": (key, key), "!=": (key, key), "<": (0, key - 1), "<=": (0, key), ">": (key + 1, MASK64),
              ">=": (key, MASK64)}[op]
    constraint = Ranges.of([ranges])
    return dimension, ~constraint if op == "!=" else constraint


def membership_constraint(node: IsIn) -> Optional[Tuple[Dimension, Constraint]]:
    if isinstance(node.operand, Field) and node.operand.is_text:
        texts = frozenset(encode_text(value) for value in node.values if isinstance(value, str))
        return Dimension(DIMENSION_WHOLE, kernel_field(node.operand)), Texts(texts)
    found = integer_dimension(node.operand)
    if found is None:
        return None
    dimension, base = found
    return dimension, Ranges.of((value - base, value - base) for value in node.values if isinstance(value, int))


GLOB_SPECIAL = re.compile(r"[*?[]")


def text_rows(node: TextTest, negate: bool) -> Rows:
    """startswith and endswith as rows; for the others, what every text that passes must begin and end with."""
    prefix = suffix = ""
    reasons: Tuple[str, ...] = (f"{node.function}()",)
    if node.function == "startswith":
        prefix = node.literal
        # '\\udcc3' is the begin of no text that has an é there; the kernel side compares bytes, and would say it is
        reasons = ("a prefix that ends in a part of a character",) if has_surrogate(prefix[-3:]) else ()
    elif node.function == "endswith":
        suffix = node.literal
        reasons = ("a suffix that begins in a part of a character",) if has_surrogate(suffix[:1]) else ()
    elif node.function == "glob":
        pieces = GLOB_SPECIAL.split(node.literal)
        prefix, suffix = pieces[0], "" if "[" in node.literal else pieces[-1]
    elif node.function == "regex":
        prefix = regex_prefix(node.literal)
    if negate and reasons:
        return Rows(EVERYTHING, reasons)
    row: Row = {}
    for kind, literal in ((DIMENSION_PREFIX, encode_text(prefix)), (DIMENSION_SUFFIX, encode_text(suffix))):
        if literal:
            texts = Texts(frozenset((literal,)) if len(literal) <= MAX_TEXT else frozenset())
            row[Dimension(kind, kernel_field(node.field), len(literal))] = ~texts if negate else texts
    return Rows(simplify(row), reasons)


def has_surrogate(text: str) -> bool:
    return any("\udc80" <= c <= "\udcff" for c in text)


def regex_prefix(pattern: str) -> str:
    """What every text must begin with that the pattern is found in: the literals behind a ^."""
    tree = list(parse_regex(pattern))
    if not tree or str(tree[0][0]) != "AT" or str(tree[0][1]) not in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
        return ""
    literals = itertools.takewhile(lambda item: str(item[0]) == "LITERAL" and not 0xD800 <= item[1] <= 0xDFFF, tree[1:])
    return "".join(chr(value) for _, value in literals)


class KernelFilter(NamedTuple):
    """One entry of the kernel's table `filters`: a filter, or for None the stream of an event type."""

    event: str
    spec: Optional[Filter]


UNUSED = KernelFilter("", None)


@dataclass
class Placement:
    """Where one filter is evaluated, for `explain`."""

    spec: Filter
    rows: Rows
    reasons: Tuple[str, ...]  # why Python is needed; none: all of it runs in the kernel


class Tables:
    """The contents of the kernel's maps for a set of filters, or for event types that are streamed whole."""

    def __init__(self, filters: Sequence[Filter], streamed: Iterable[str] = (), shown: int = ALL_FIELDS,
                 previous: "Optional[Tables]" = None) -> None:
        """`streamed`: events that are streamed whole, beside what the filters count of them.

        `shown`: the fields that records carry, a bit of each enum field. With `previous`, filters that are in both have
        the same number in both; the others have one that is free. Those that are no more keep theirs until retire().
        """
        self.shown = shown
        self.seeds: Tuple[int, ...] = previous.seeds if previous else struct.unpack("=QQ", os.urandom(16))
        self.filters: List[KernelFilter] = list(previous.filters) if previous else []  # by their numbers
        self.live: Set[int] = set()  # numbers of those that these tables use
        self.before = {member.spec.id: i for i, member in enumerate(self.filters) if member.spec is not None}
        self.free = collections.deque(i for i, member in enumerate(self.filters) if member is UNUSED)
        self.placements: List[Placement] = []
        self.matchers: Dict[str, bytes] = {}
        self.dimensions: Dict[str, List[Dimension]] = {}
        self.vectors: List[bytes] = []
        self.bounds: List[int] = []
        self.texts: Dict[Tuple[int, int, int], Tuple[int, int]] = {}  # hash, dimension, length -> vector, literal
        self.literals: List[int] = []
        self.literal_places: Dict[bytes, int] = {}
        self.rows: List[int] = []
        self.output_places: Dict[str, int] = {}  # filter id -> place among the histograms, or the tops
        self.output_counts = collections.Counter({OUTPUT_HISTOGRAM: 0, OUTPUT_TOP: 0})
        self.max_groups = groups_per_filter(filters)
        by_event: Dict[str, List[Filter]] = {name: [] for name in streamed}
        for member in filters:
            by_event.setdefault(member.event, []).append(member)
        whole = set(streamed)
        for event, members in by_event.items():
            self.add_event(event, members, event in whole)

    @property
    def python_ids(self) -> FrozenSet[str]:
        """Ids of the filters that Python evaluates."""
        return frozenset(placement.spec.id for placement in self.placements if placement.reasons)

    def add_event(self, event: str, members: Sequence[Filter], whole: bool) -> None:
        """One event type: its filters' rows, those of the filters that need Python as one stream, or all of it."""
        rows: List[Row] = []
        streamed: List[Row] = EVERYTHING if whole else []
        dimensions: Set[Dimension] = set()
        bounds: Counter[Dimension] = collections.Counter()
        first_row, fields = len(self.rows), 0
        for member in members:
            compiled = rule_rows(member.rule)
            used = dimensions.union(*compiled.rows)
            reasons = compiled.reasons + derived_groups(member) + self.output_reasons(member)
            more_bounds = bounds + count_bounds(compiled.rows)
            if (len(rows) + len(streamed) + len(compiled.rows) >= MAX_ROWS or len(used) > MAX_DIMENSIONS
                    or max(more_bounds.values(), default=0) > MAX_BOUNDS):
                compiled, reasons = Rows(EVERYTHING), ("this event type's tables, which are full",)
            else:
                dimensions, bounds = used, more_bounds
            self.placements.append(Placement(member, compiled, reasons))
            if reasons:
                streamed = unite([*streamed, *compiled.rows])
                continue
            rows += compiled.rows
            self.rows += [self.number(KernelFilter(event, member))] * len(compiled.rows)
            self.add_output(member)
            fields |= self.filter_fields(member)
        if streamed:
            rows += streamed
            self.rows += [self.number(KernelFilter(event, None))] * len(streamed)
        self.dimensions[event] = sorted(set().union(*rows) if rows else set())
        self.matchers[event] = self.pack_matcher(event, rows, first_row, fields)

    def output_reasons(self, member: Filter) -> Tuple[str, ...]:
        """Why the kernel side cannot count what the filter's output function wants."""
        output = member.packed_output
        derived = tuple(f"{member.metrics} of {field.name}" for field in output.fields if field.is_derived)
        full = output.output == OUTPUT_TOP and self.output_counts[OUTPUT_TOP] >= MAX_TOPS
        return (*derived, *((f"more than {MAX_TOPS} filters with top_per_sec",) if full else ()))

    def add_output(self, member: Filter) -> None:
        output = member.packed_output.output
        if output != OUTPUT_NONE:
            self.output_places[member.id] = self.output_counts[output]
            self.output_counts[output] += 1

    def number(self, member: KernelFilter) -> int:
        """The filter's number: that of the one which it goes on for, or else one that is free.

        A stream never goes on: by the number, records of before a new spec are told from those after it.
        """
        number = self.before.get(member.spec.id, -1) if member.spec is not None else -1
        if number < 0 or not member.spec or not member.spec.counts_as(self.filters[number].spec):
            number = self.free.popleft() if self.free else len(self.filters)
        self.filters[number:number + 1] = [member]
        self.live.add(number)
        return number

    def retire(self) -> Set[int]:
        """Frees the numbers that only the previous tables used, and returns them."""
        retired = {i for i, member in enumerate(self.filters) if member is not UNUSED} - self.live
        for number in retired:
            self.filters[number] = UNUSED
        return retired

    @staticmethod
    def filter_fields(member: Filter) -> int:
        """Fields that counting for the filter reads, as a bit mask."""
        read = (*member.parameters.get("by", ()), *member.packed_output.fields)
        fields = functools.reduce(operator.or_, (1 << number for number, _ in kernel_fields(read)), 0)
        return fields | (1 << FIELD_TIME if member.packed.uses_time else 0)

    def pack_matcher(self, event: str, rows: Sequence[Row], first_row: int, fields: int) -> bytes:
        """struct matcher; integers come first, since a text has to be read and hashed."""
        packed = b""
        for dimension in self.dimensions[event]:
            fields |= 1 << dimension.field
            packed += (self.pack_integers if dimension.kind == DIMENSION_INTEGER else self.pack_texts)(dimension, rows)
        words = (len(rows) + 63) // 64
        only = next((i for i in range(MAX_ARGS) if fields == 1 << i), MAX_ARGS)
        head = MATCHER.pack(words, fields, self.vector((1 << len(rows)) - 1), first_row, len(self.dimensions[event]),
                            only)
        return (head + packed).ljust(MATCHER.size + MAX_DIMENSIONS * DIMENSION.size, b"\0")

    def vector(self, bits: int) -> int:
        """Adds a bit vector; returns its place."""
        self.vectors.append(bits.to_bytes(VECTOR_SIZE, "little"))
        return len(self.vectors) - 1

    def pack_integers(self, dimension: Dimension, rows: Sequence[Row]) -> bytes:
        """Sweeps over the line of keys: at each bound some rows begin to be true and some cease to."""
        bits = 0
        changes: Dict[int, int] = {}
        for index, row in enumerate(rows):
            constraint = row.get(dimension)
            if constraint is None:
                bits |= 1 << index
                continue
            assert isinstance(constraint, Ranges)
            for first, last in constraint.ranges:
                for edge in (first, last + 1):
                    changes[edge] = changes.get(edge, 0) ^ 1 << index
        bits ^= changes.pop(0, 0)
        changes.pop(MASK64 + 1, None)
        first_bound, below = len(self.bounds), self.vector(bits)
        for bound in sorted(changes):
            bits ^= changes[bound]
            self.bounds.append(bound)
            self.vector(bits)
        return DIMENSION.pack(dimension.kind, dimension.field, 0, 0, below, first_bound,
                              len(self.bounds) - first_bound, 0, dimension.and_mask, dimension.xor_mask)

    def pack_texts(self, dimension: Dimension, rows: Sequence[Row]) -> bytes:
        others = 0  # rows that are true for a text without an entry
        changes: Dict[bytes, int] = {}
        for index, row in enumerate(rows):
            constraint = row.get(dimension)
            if constraint is None:
                others |= 1 << index
                continue
            assert isinstance(constraint, Texts)
            others |= constraint.all_but << index
            for text in constraint.texts:
                if len(text) <= MAX_TEXT:
                    changes[text] = changes.get(text, 0) | 1 << index
        number, default = len(self.vectors), self.vector(others)
        if len(changes) == 1:
            (text, bits), = changes.items()
            self.vector(others ^ bits)
            return DIMENSION.pack(dimension.kind, dimension.field, len(text), number, default, self.literal(text), 1,
                                  0, 0, 0)
        for text, bits in changes.items():
            key = (hash_text(text, self.seeds[0]), number, len(text))
            assert key not in self.texts  # 2^-64 for each pair
            self.texts[key] = (self.vector(others ^ bits), self.literal(text))
        return DIMENSION.pack(dimension.kind, dimension.field, dimension.length, number, default, 0, len(changes),
                              0, 0, 0)

    def literal(self, text: bytes) -> int:
        """Adds the words of a literal; returns their place."""
        if text not in self.literal_places:
            self.literal_places[text] = len(self.literals)
            self.literals += text_words(text)
        return self.literal_places[text]

    def text_table(self) -> List[bytes]:
        """The entries of the kernel's table of texts: a power of two, so many that every text is found soon."""
        size = 1
        while True:
            size *= 2
            table: List[bytes] = [bytes(TEXT.size)] * size
            if size >= 2 * len(self.texts) and all(self.place_text(table, *item) for item in self.texts.items()):
                return table

    @staticmethod
    def place_text(table: List[bytes], key: Tuple[int, int, int], value: Tuple[int, int]) -> bool:
        """Puts a text where find_text() in bpf/traceleft.bpf.c looks for it. Returns whether there was room."""
        for probe in range(MAX_PROBES):
            place = (key[0] + probe) % len(table)
            if not any(table[place]):
                table[place] = TEXT.pack(*key, *value, 1)
                return True
        return False

    def pack_filter(self, member: KernelFilter) -> bytes:
        """struct filter."""
        if member is UNUSED:
            return bytes(FILTER.size)
        if member.spec is None:
            return FILTER.pack(1, 0, FILTER_STREAM, 0, self.shown, 0, PROCESSING_SIGMA, 0, OUTPUT_NONE, 0, 0, 0, b"",
                               b"", b"", b"")
        by = kernel_fields(member.spec.parameters["by"])
        packed, output = member.spec.packed, member.spec.packed_output
        shown = kernel_fields(output.fields)
        is_general = by or packed.processing != PROCESSING_SIGMA or packed.threshold or output.output != OUTPUT_NONE
        return FILTER.pack(packed.frequency, packed.threshold, FILTER_GENERAL if is_general else 0, self.max_groups,
                           self.shown, len(by), packed.processing, packed.seconds, output.output,
                           self.output_places.get(member.spec.id, 0), len(shown),
                           any(read.is_signed for read in output.fields), bytes(number for number, _ in shown),
                           bytes(is_text for _, is_text in shown), bytes(number for number, _ in by),
                           bytes(is_text for _, is_text in by))


def count_bounds(rows: Iterable[Row]) -> Counter[Dimension]:
    """How many bounds the rows bring to each dimension of integers, at the most."""
    counts: Counter[Dimension] = collections.Counter()
    for dimension, constraint in itertools.chain.from_iterable(row.items() for row in rows):
        if isinstance(constraint, Ranges):
            counts[dimension] += 2 * len(constraint.ranges)
    return counts


def derived_groups(member: Filter) -> Tuple[str, ...]:
    """Why the kernel cannot count the filter's groups."""
    return tuple(f"by={field.name}" for field in member.parameters.get("by", ()) if field.is_derived)


def text_words(text: bytes) -> Tuple[int, ...]:
    """The text as unsigned 64-bit words in this machine's byte order, the last padded with zeros."""
    padded = text.ljust((len(text) + 7) // 8 * 8, b"\0")
    return struct.unpack(f"={len(padded) // 8}Q", padded)


def hash_text(text: bytes, seed: int) -> int:
    """As hash_text() in bpf/traceleft.bpf.c."""
    value = seed
    for word in (len(text), *text_words(text)):
        value = (value ^ word) * 0x9E3779B97F4A7C15 & MASK64
        value ^= value >> 32
    return value


def groups_per_filter(filters: Sequence[Filter]) -> int:
    """How many `by` groups each filter may have, in both engines: fewer when many filters share the memory."""
    sharing = sum(1 for member in filters if member.parameters["by"])
    return min(MAX_GROUPS, MAX_ALL_GROUPS // max(sharing, 1))


# ======================================================================================================================
# Accounting: what became of every matched event
# ======================================================================================================================


class Account:
    """One filter's totals. Channels settle alerts from a thread of their own."""

    def __init__(self, name: str, event: str) -> None:
        self.id, self.event = name, event
        self.matched = self.passed = self.folded = self.alerts = 0
        self.delivered = 0                 # sum of count over delivered alerts
        self.lost: Dict[str, int] = {}     # cause -> passed events
        self.unreported = 0                # of these, what no alert has carried yet
        self.lock = threading.Lock()

    def deliver(self, count: int) -> None:
        with self.lock:
            self.delivered += count

    def lose(self, cause: str, count: int) -> None:
        with self.lock:
            self.lost[cause] = self.lost.get(cause, 0) + count
            if cause != "in_spool":  # which will be delivered yet
                self.unreported += count

    def lose_alert(self, cause: str, count: int, lost: int) -> None:
        """An alert with these numbers is not delivered: what it would have said was lost, the next one has to say."""
        self.lose(cause, count)
        self.report_later(lost)

    def report_later(self, lost: int) -> None:
        with self.lock:
            self.unreported += lost

    def take_unreported(self) -> int:
        with self.lock:
            unreported, self.unreported = self.unreported, 0
            return unreported

    @property
    def balanced(self) -> bool:
        return self.matched == self.passed + self.folded and self.passed == self.delivered + sum(self.lost.values())

    def as_json(self) -> Dict[str, Any]:
        return {"id": self.id, "event": self.event, "matched": self.matched, "passed": self.passed,
                "folded": self.folded, "alerts": self.alerts, "lost": dict(sorted(self.lost.items()))}


def summarize(accounts: Sequence[Account]) -> Dict[str, Any]:
    """The accounting as `--summary` writes it."""
    return {"filters": [account.as_json() for account in accounts],
            "balanced": all(account.balanced for account in accounts)}


def sum_accounts(accounts: Iterable[Account]) -> Dict[str, int]:
    """The totals of all filters, for people who look at a run."""
    accounts = list(accounts)
    found = {name: sum(getattr(account, name) for account in accounts) for name in ("matched", "passed", "alerts")}
    return {**found, "lost": sum(sum(list(account.lost.values())) for account in accounts)}


def format_totals(totals: Mapping[str, int]) -> str:
    """`matched 80124, passed 801, alerts 1, lost 0`."""
    return ", ".join(f"{name} {count}" for name, count in totals.items())


def format_accounting(accounts: Sequence[Account]) -> List[str]:
    """The accounting as a table, one line per filter."""
    rows = [("FILTER", "EVENT", "MATCHED", "PASSED", "FOLDED", "ALERTS", "LOST")]
    for account in accounts:
        lost = ", ".join(f"{count} {cause}" for cause, count in sorted(account.lost.items())) or "0"
        rows.append((escape(account.id), account.event, str(account.matched), str(account.passed),
                     str(account.folded), str(account.alerts), lost))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return ["  ".join([row[0].ljust(widths[0]), row[1].ljust(widths[1]),
                       *(row[i].rjust(widths[i]) for i in range(2, len(widths))), row[-1]]) for row in rows]


# ======================================================================================================================
# Log files: opened so that nobody else decides where root writes, and rotated
# ======================================================================================================================

LOCK_SECONDS = 0.05  # to wait for another agent, which has a file for as long as a record or some renames take
ROTATE_RETRY = 1.0  # seconds after a rotation that failed until another is tried
COMPRESSING = 8     # old files, of which others may compress one at the moment: the newest
FS_IOC_GETFLAGS, FS_IMMUTABLE_FL, FS_APPEND_FL = 0x80086601, 0x10, 0x20  # include/uapi/linux/fs.h
MAX_TAKEN = 100  # names of old files that others may have taken, and that are left out
MAX_LINKS = 40  # symlinks in one path, as MAXSYMLINKS in include/linux/namei.h
LOG_FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOCTTY | os.O_NOFOLLOW | os.O_NONBLOCK


def check_trusted(name: str, found: os.stat_result, directory: os.stat_result) -> None:
    """Raises OSError for what leads root elsewhere, or to what others read: where everybody can write, such as /tmp,
    another user's file, directory or link; in a directory of another user or group others' links."""
    trusted = (0, os.geteuid())
    shared = bool(directory.st_mode & stat.S_IWOTH)
    a_groups = directory.st_mode & stat.S_IWGRP and directory.st_gid not in (0, os.getegid())
    if not shared and not a_groups and directory.st_uid in trusted:
        return
    if found.st_uid not in trusted and (shared or stat.S_ISLNK(found.st_mode)):
        raise OSError(errno.EACCES, f"'{escape(name)}' is another user's, in a directory that "
                                    + ("everybody can write to" if shared else "others can write to"))
    if stat.S_ISREG(found.st_mode) and found.st_nlink > 1:
        raise OSError(errno.EACCES, f"'{escape(name)}' has another name too, and is in a directory that others "
                                    "can write to")


def open_parent(path: str) -> Tuple[int, str, Optional[os.stat_result]]:
    """A descriptor of the directory that the path ends in, the name there, and what has it, which is no symlink.

    Symlinks are followed here, one by one, and only where check_trusted() lets them. Raises OSError.
    """
    directory, links = os.open("/" if path.startswith("/") else ".", os.O_PATH | os.O_CLOEXEC), 0
    names = path.split("/")[::-1]
    try:
        while names:
            name = names.pop()
            if name in ("", ".") and names:
                continue
            found = stat_at(name or ".", directory)
            if found is not None and stat.S_ISLNK(found.st_mode):
                links += 1
                if links > MAX_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
                check_trusted(name, found, os.fstat(directory))
                target = os.readlink(name, dir_fd=directory)
                names += target.split("/")[::-1]
                if not target.startswith("/"):
                    continue
                name = "/"
            elif not names:
                return directory, name or ".", found
            inner = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
            outer, directory = directory, inner
            try:
                if name not in ("/", ".."):
                    check_trusted(name, os.fstat(inner), os.fstat(outer))
            finally:
                os.close(outer)
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
    except BaseException:
        os.close(directory)
        raise


def stat_at(name: str, directory: int) -> Optional[os.stat_result]:
    try:
        return os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return None


def check_log(name: str, found: os.stat_result, directory: int, regular: bool = True) -> None:
    """Raises OSError for what is no regular file, or not to be trusted."""
    if stat.S_ISDIR(found.st_mode):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
    if regular and not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file")
    check_trusted(name, found, os.fstat(directory))


def check_writable(path: str, regular: bool = True) -> None:
    """Raises OSError when open_log() would fail; nothing is made or changed."""
    directory, name, found = open_parent(path)
    try:
        if found is not None:
            check_log(name, found, directory, regular)
        mode = os.W_OK if found is not None else os.W_OK | os.X_OK
        if not os.access(name if found is not None else ".", mode, dir_fd=directory, effective_ids=True):
            code = errno.EROFS if os.fstatvfs(directory).f_flag & os.ST_RDONLY else errno.EACCES
            raise OSError(code, os.strerror(code))
    finally:
        os.close(directory)


def open_log(path: str, flags: int = LOG_FLAGS, regular: bool = True) -> int:
    """A descriptor for appending to the file, which is made with mode 0600 when it is missing. Raises OSError."""
    directory, name, found = open_parent(path)
    try:
        if found is not None:  # before it is opened: to open some devices is to use them
            check_log(name, found, directory, regular)
        fd = os.open(name, flags | os.O_CREAT, 0o600, dir_fd=directory)
        try:
            check_log(name, os.fstat(fd), directory, regular)  # what was opened, whatever has been put there since
        except OSError:
            os.close(fd)
            raise
        return fd
    finally:
        os.close(directory)


def lock_log(fd: int, seconds: float = 0.0) -> bool:
    """Whether flock(2) took the file within so many seconds, or its file system has no locks. Who can read a file can
    lock it, too."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.001)
        except OSError:
            return True
        else:
            return True


def unlock_log(fd: int) -> None:
    with contextlib.suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_UN)


class Rotation:
    """Keeps a file below a size: it becomes PATH.1, PATH.1 becomes PATH.2, and so on, compressed in the background.

    A number whose name somebody else has taken is left out. Behind a symlink, it is its target that is renamed.
    """

    def __init__(self, path: str, spec: RotateSpec) -> None:
        self.path, self.spec = path, spec
        self.thread: Optional[threading.Thread] = None
        self.directory = -1  # of the latest rotation, whatever its name leads to since
        self.failing = False
        self.retry_at = 0.0  # monotonic seconds

    def is_due(self, fd: int, more: int) -> bool:
        """Whether `more` bytes would make it too large. An empty file is never too small for a record."""
        size = os.fstat(fd).st_size
        return (size > 0 and size + more > self.spec.max_bytes and time.monotonic() >= self.retry_at
                and not (self.thread and self.thread.is_alive()))

    def rotate(self, fd: int) -> bool:
        """Whether it was done, or another process has done it: then the path has to be opened again."""
        newest = ""
        try:
            self.close_directory()
            self.directory, name, found = open_parent(self.path)
            if not lock_log(fd, 0.0 if self.failing else LOCK_SECONDS):
                raise OSError(errno.EBUSY, "another process has locked it")
            try:
                found = stat_at(name, self.directory) if found is not None else None
                if found is not None and os.path.samestat(os.fstat(fd), found):
                    check_movable(fd)
                    newest = self.shift(f"/proc/self/fd/{self.directory}/{name}")
            finally:
                unlock_log(fd)
        except OSError as error:
            if not self.failing:
                say(f"cannot rotate {escape(self.path)}: {error.strerror}; it grows beyond its {self.spec.max_bytes} "
                    "bytes until it can be")
            self.failing, self.retry_at = True, time.monotonic() + ROTATE_RETRY
            return False
        self.failing = False
        if newest and self.spec.gzip:
            shown = f"{self.path}.{newest.rpartition('.')[2]}"
            self.thread = start_thread(compress_log, newest, shown)
            if self.thread is None:
                say(f"cannot compress {escape(shown)}: there is no thread to be had; it stays as it is")
        return True

    def shift(self, path: str) -> str:
        """Renames from the first number that is free, or else from the oldest, which is removed."""
        names = [path, *self.free_names(path)]
        if len(names) == 1:
            raise OSError(errno.EEXIST, "others have taken the names of its old files")
        empty = next((place for place, name in enumerate(names) if not any(map(os.path.lexists, (name, f"{name}.gz")))),
                     len(names))
        moves = list(zip(names[1:empty], [*names[2:empty + 1], ""]))[::-1]  # from and to; the oldest is to go
        with contextlib.ExitStack() as stack:
            for old, _ in moves[-COMPRESSING:]:  # before anything is changed
                hold_old(old, stack)
            for old, new in moves:
                for suffix in ("", ".gz"):
                    with contextlib.suppress(FileNotFoundError):
                        os.rename(old + suffix, new + suffix) if new else os.unlink(old + suffix)
            os.rename(path, names[1])
        return names[1]

    def free_names(self, path: str) -> List[str]:
        """PATH.1, PATH.2 and so on, as many as are kept; not where a folder is, or a file that we may not rename."""
        directory = os.stat(os.path.dirname(path))
        own = not directory.st_mode & stat.S_ISVTX or directory.st_uid == os.geteuid()

        def is_free(name: str) -> bool:
            with contextlib.suppress(FileNotFoundError):
                found = os.lstat(name)
                return not stat.S_ISDIR(found.st_mode) and (own or found.st_uid == os.geteuid())
            return True

        names = (f"{path}.{number}" for number in range(1, self.spec.keep + MAX_TAKEN + 1))
        return list(itertools.islice((name for name in names if is_free(name) and is_free(f"{name}.gz")),
                                     self.spec.keep))

    def close(self) -> None:
        if self.thread is not None:
            self.thread.join(CLOSE_TIMEOUT)  # without it the file stays as it is
        self.close_directory()

    def close_directory(self) -> None:
        if self.directory >= 0 and not (self.thread and self.thread.is_alive()):
            os.close(self.directory)
            self.directory = -1


def hold_old(old: str, stack: contextlib.ExitStack) -> None:
    """Keeps another agent from replacing an old file by its compressed form. Raises OSError when it is about to."""
    try:
        fd = os.open(old, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:  # it is not there; or cannot be read, and then nobody like us compresses it
        return
    stack.callback(os.close, fd)
    if not lock_log(fd, LOCK_SECONDS):
        raise OSError(errno.EBUSY, f"another process has locked {escape(os.path.basename(old))}")


def check_movable(fd: int) -> None:
    """Raises OSError for a file that chattr(1) has made append-only or immutable."""
    flags = bytearray(8)
    with contextlib.suppress(OSError):  # a file system without such flags
        fcntl.ioctl(fd, FS_IOC_GETFLAGS, flags)
    if int.from_bytes(flags[:4], sys.byteorder) & (FS_APPEND_FL | FS_IMMUTABLE_FL):
        raise OSError(errno.EPERM, "it cannot be renamed before chattr -ai")


def compress_log(path: str, shown: str) -> None:
    """Replaces the file by PATH.gz. On failure, or when it has been renamed meanwhile, it stays as it is."""
    temporary = f"{path}.gz.{os.getpid()}-{threading.get_ident()}.tmp"
    try:
        remove_leftovers(path)
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as plain:
            target = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(target, "wb", 0) as raw:
                write_compressed(plain, raw)
                if not lock_log(plain.fileno(), CLOSE_TIMEOUT):
                    raise OSError(errno.EBUSY, "another process has locked it")
                if os.path.samestat(os.stat(path), os.fstat(plain.fileno())):  # hold_old() has to wait now
                    write_compressed(plain, raw)  # what another agent has written meanwhile
                    if not os.path.samestat(os.stat(temporary), os.fstat(target)):
                        raise OSError(errno.ESTALE, "another process has exchanged its compressed form")
                    os.rename(temporary, f"{path}.gz")
                    os.unlink(path)
    except OSError as error:
        say(f"cannot compress {escape(shown)}: {error.strerror}; it stays as it is")
    with contextlib.suppress(OSError):
        os.unlink(temporary)


def remove_leftovers(path: str) -> None:
    """Removes what an agent that was killed has left of the compression of old files. Raises OSError."""
    directory, name = os.path.split(path)
    pattern = re.compile(re.escape(name.rpartition(".")[0]) + r"\.\d+\.gz\.(\d+)-\d+\.tmp")
    for found in os.listdir(directory):
        match = pattern.fullmatch(found)
        if match and not os.path.exists(f"/proc/{match[1]}"):
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(directory, found))


def write_compressed(plain: Any, raw: Any) -> None:
    """Adds the rest of an open file to another. Raises OSError."""
    gzip = importlib.import_module("gzip")
    with gzip.GzipFile("", "wb", 6, raw) as compressed:
        shutil.copyfileobj(plain, compressed, 1 << 20)


# ======================================================================================================================
# Channels: where alerts go. Each alert that is sent is settled once, as delivered or as lost with a cause
# ======================================================================================================================

HOSTNAME = socket.gethostname()
MAX_QUEUE_BYTES = 8 << 20  # of one channel: alerts that wait in memory
CLOSE_TIMEOUT = 5.0        # seconds that the end of a run may take to deliver what is pending
FILE_CLOSE_TIMEOUT = 0.5   # the same, for a file that could not be written


class Channel:
    """A place that alerts are sent to. `accounts` maps filter ids to where the outcome is counted."""

    ended = False  # nobody will ever read again: the run is over

    def __init__(self, spec: ChannelSpec, accounts: Mapping[str, Account]) -> None:
        self.spec, self.accounts = spec, accounts

    def problem(self) -> Optional[str]:
        """Why the channel could not be opened, found out without changing anything. Raises HostError."""
        return None

    def open(self) -> None:
        """Raises TraceleftError when the channel cannot be used; nothing is open then."""

    def prepare(self) -> None:
        """Readies messages for encode(). Raises HostError."""

    def encode(self, alert: Alert) -> bytes:
        """What becomes of an alert."""
        raise NotImplementedError

    def weigh(self, alert: Alert) -> int:
        """Bytes of an alert, once prepare() has been called; it is not sent."""
        return len(self.encode(alert))

    def send(self, alert: Alert) -> None:
        """Takes one alert; it is settled now or later."""
        raise NotImplementedError

    def flush(self) -> None:
        """All alerts of this tick have been sent."""

    def reopen(self) -> None:
        """What is written from now on goes to what the path names now."""

    def moves_to(self, spec: ChannelSpec) -> bool:
        """Whether move() takes it to what another spec says; else another channel takes its place."""
        return False

    def move(self, spec: ChannelSpec) -> None:
        """What is pending and what comes goes where the spec says, in which problem() has found nothing."""

    def figures(self) -> Dict[str, int]:
        """The channel at work, for metrics: what waits now, and totals of what was tried."""
        return {}

    def begin_close(self) -> None:
        """No more alerts will come: begins to deliver what is pending, for a bounded time."""

    def close(self) -> None:
        """Waits until what is pending is delivered, or the time is over; the rest is settled as lost."""


FLAG_NO_SAMPLE = 4  # in the wire contract's and the text block's flags


def shown_event(alert: Alert) -> Tuple[Event, int]:
    """The alert's sample and its flags; without one, an event of which nothing but the type is known."""
    if alert.sample is not None:
        return alert.sample, alert.sample.flags
    return make_event(alert.filter.event, pid=0), FLAG_NO_SAMPLE


def format_text(alert: Alert) -> str:
    """The block of the formats `text` and `collector_spec_pb` on a file channel."""
    event, flags = shown_event(alert)
    return (f"COUNT: {alert.count}\n"
            f"EVENT: {{Timestamp:{event.timestamp_ns} ProgramID:{event.program_id} Pid:{event.pid} Ret:{event.ret} "
            f"Name:{event.name} Hash:{event.hash} Flags:{flags}}} {format_args(event)}".rstrip()
            + f"{' [container]' if event.in_container else ''}\n"
            + (f"{alert.detail.format()}\n" if alert.detail is not None else "") + "\n")


def format_time(at: float) -> str:
    """RFC 3339, UTC; nothing for what is no time."""
    try:
        moment = datetime.datetime.fromtimestamp(at, datetime.timezone.utc)
    except (ValueError, OverflowError, OSError):  # as a stranger has sent it
        return ""
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def format_json(alert: Alert) -> str:
    """One object on one line. Bytes that are no UTF-8 appear as \\udc80 to \\udcff."""
    return json.dumps({
        "time": format_time(alert.time), "host": HOSTNAME,
        "filter": alert.filter.id, "event": alert.filter.event, "stream": alert.filter.stream,
        "group": alert.filter.group, "metrics": alert.filter.metrics, "count": alert.count, "matched": alert.matched,
        "lost": alert.lost, **(alert.detail.as_json() if alert.detail is not None else {}),
        "sample": None if alert.sample is None else sample_json(alert.sample)}) + "\n"


def sample_json(event: Event) -> Dict[str, Any]:
    sample: Dict[str, Any] = {name: getattr(event, name) for name in (
        "timestamp_ns", "pid", "tid", "ppid", "uid", "gid", "euid", "comm", "program_id", "ret", "hash", "exe",
        "cgroup", "container", "mntns", "netns", "pidns")}
    sample["args"] = event.named_args
    for name in ("path", "path_unresolved", "flags"):
        if getattr(event, name):
            sample[name] = getattr(event, name)
    files = {event.type.arguments[i].name: path for i, path in zip(event.type.descriptors, event.files) if path}
    if files:
        sample["files"] = files
    return sample


FILE_FORMATS: Dict[str, Callable[[Alert], str]] = {
    "text": format_text, "collector_spec_pb": format_text, "json": format_json,
}


class Waiting(NamedTuple):
    """One record that is to be written, and who is told of its outcome."""

    account: Account
    events: int  # the alert's count
    lost: int
    data: bytes


class FileChannel(Channel):
    """Appends each alert to a file with one write. What cannot be written waits, in order and in bounded memory."""

    CONSEQUENCE = "records are kept, and written when it works again"
    fd = -1
    torn = False   # a part of a record may stand at the file's end, and could not be taken back
    alone = False  # no other agent writes to it now
    patience = LOCK_SECONDS

    def __init__(self, spec: ChannelSpec, accounts: Mapping[str, Account]) -> None:
        super().__init__(spec, accounts)
        self.waiting: Deque[Waiting] = collections.deque()
        self.waiting_bytes = 0
        self.failing = False
        self.writes = self.failures = self.reopened = 0
        self.rotation: Optional[Rotation] = None
        self.name = escape(spec.path) if spec.path != "-" else "stdout"

    def problem(self) -> Optional[str]:
        try:
            check_writable(self.spec.path)
        except OSError as error:
            return self.cannot_open(error)
        return None

    def cannot_open(self, error: OSError) -> str:
        return (f"channel '{escape(self.spec.id)}': cannot open {escape(self.spec.path)}: {error.strerror}; "
                "it takes a file in a directory that exists and is writable, or - for stdout")

    def open(self) -> None:
        try:
            self.fd = open_log(self.spec.path)
        except OSError as error:
            raise TraceleftError(self.cannot_open(error)) from None
        if self.spec.rotate is not None:
            self.rotation = Rotation(self.spec.path, self.spec.rotate)

    def moves_to(self, spec: ChannelSpec) -> bool:
        return (spec.type, spec.path) == ("file", self.spec.path)

    def move(self, spec: ChannelSpec) -> None:
        self.spec = spec
        if self.rotation is not None and spec.rotate is not None:
            self.rotation.spec = spec.rotate
        else:
            self.rotation = Rotation(spec.path, spec.rotate) if spec.rotate is not None else None

    def figures(self) -> Dict[str, int]:
        return {"queued": len(self.waiting), "queued_bytes": self.waiting_bytes, "sends": self.writes,
                "failures": self.failures, "reconnects": self.reopened}

    def encode(self, alert: Alert) -> bytes:
        return FILE_FORMATS[alert.filter.format](alert).encode("utf-8", "backslashreplace")

    def send(self, alert: Alert) -> None:
        account = self.accounts[alert.filter.id]
        data = self.encode(alert)
        if self.waiting_bytes + len(data) > MAX_QUEUE_BYTES or self.ended:
            account.lose_alert("write_failed" if self.ended else "queue_full", alert.count, alert.lost)
            return
        self.waiting.append(Waiting(account, alert.count, alert.lost, data))
        self.waiting_bytes += len(data)
        if not self.failing:  # else flush() tries, once a tick
            self.flush()

    def flush(self) -> None:
        """Writes what waits."""
        try:
            while self.waiting:
                self.write(self.waiting[0].data)
                written = self.waiting.popleft()
                self.waiting_bytes -= len(written.data)
                self.writes += 1
                written.account.deliver(written.events)
        except OSError as error:
            self.failures += 1
            if not self.failing:
                say(f"cannot write to {self.name}: {error.strerror}; {self.CONSEQUENCE}")
            self.failing = True
        else:
            if self.failing:
                say(f"writing to {self.name} works again")
            self.failing = False

    def write(self, data: bytes) -> None:
        """All of `data`, or OSError and nothing: a record that was cut short is taken back."""
        self.follow_path()
        if self.rotation is not None and self.rotation.is_due(self.fd, len(data)) and self.rotation.rotate(self.fd):
            self.reopen()
        self.alone = lock_log(self.fd, self.patience)
        if not self.alone:
            self.follow_path()  # perhaps another agent has renamed it, and compresses it now
            self.alone = lock_log(self.fd)
        self.patience = LOCK_SECONDS if self.alone else 0.0
        try:
            self.append(data)
            if os.fstat(self.fd).st_nlink == 0:  # removed since we looked: what was written now is in no file
                self.reopen()
                self.append(data)
        finally:
            unlock_log(self.fd)

    def append(self, data: bytes) -> None:
        """One write."""
        data = b"\n" + data if self.torn else data
        size = os.fstat(self.fd).st_size
        try:
            written = os.write(self.fd, data)
            if written < len(data):  # the disk is full: the kernel wrote what fitted
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            self.torn = self.torn or not self.take_back(size)
            raise
        self.torn = False

    def take_back(self, size: int) -> bool:
        """Whether nothing stands behind what the file was before a write that failed, or it could be cut off."""
        with contextlib.suppress(OSError):
            if os.fstat(self.fd).st_size > size and self.alone:
                os.ftruncate(self.fd, size)
            return os.fstat(self.fd).st_size <= size
        return False

    def follow_path(self) -> None:
        """Opens the path anew when it does not name our file any more, as after logrotate."""
        try:
            current = os.path.samestat(os.stat(self.spec.path), os.fstat(self.fd))
        except PermissionError:  # a directory that we may not search any more: the file is open all the same
            current = True
        except OSError:
            current = False
        if not current:
            self.reopen()

    def reopen(self) -> None:
        """Raises OSError, and keeps the old file, when the path cannot be opened."""
        fd = open_log(self.spec.path)
        os.close(self.fd)
        self.fd, self.torn, self.alone = fd, False, False
        self.reopened += 1

    def close(self) -> None:
        if self.fd >= 0:
            self.flush_for(FILE_CLOSE_TIMEOUT)
            self.lose_waiting()
            os.close(self.fd)
            self.fd = -1
        if self.rotation is not None:
            self.rotation.close()

    def flush_for(self, seconds: float) -> None:
        """Tries again and again, as long as something waits, and at once as long as it helps."""
        deadline, left = time.monotonic() + seconds, -1
        while len(self.waiting) != left or time.monotonic() < deadline:
            if len(self.waiting) == left:
                time.sleep(0.05)
            left = len(self.waiting)
            self.flush()
            if not self.waiting:
                return

    def lose_waiting(self) -> None:
        """What could not be written until the end."""
        if self.waiting:
            say(f"{self.name}: {len(self.waiting)} records could not be written and are lost")
        for record in self.waiting:
            record.account.lose_alert("write_failed", record.events, record.lost)
        self.waiting.clear()
        self.waiting_bytes = 0


class StdoutChannel(FileChannel):
    """The path `-`. A reader that is slow holds up nothing; when there is none any more, the run ends."""

    CHUNK = select.PIPE_BUF  # as much as a pipe that select() calls writable takes without blocking

    def problem(self) -> Optional[str]:
        return None

    def open(self) -> None:
        self.fd = 1
        self.poller = select.poll()
        self.poller.register(1, 0)  # errors only: there is no reader any more

    def flush(self) -> None:
        if self.poller.poll(0) and not self.ended:
            self.ended = True
            say("nobody reads stdout any more: the run ends")
        if self.ended:
            self.lose_waiting()
        else:
            super().flush()

    def write(self, data: bytes) -> None:
        """Writes as much as is taken at once; raises BlockingIOError when something is left, which stays first."""
        regular = stat.S_ISREG(os.fstat(1).st_mode)
        try:
            while data and select.select([], [1], [], 0)[1]:
                data = data[os.write(1, data if regular else data[:self.CHUNK]):]
        finally:
            self.keep(data)
        if data:
            raise BlockingIOError(errno.EAGAIN, "its reader is slow")

    def keep(self, left: bytes) -> None:
        """Of the first record this much is not written yet."""
        self.waiting_bytes -= len(self.waiting[0].data) - len(left)
        self.waiting[0] = self.waiting[0]._replace(data=left)

    def reopen(self) -> None:
        pass

    def close(self) -> None:
        deadline = time.monotonic() + CLOSE_TIMEOUT
        self.flush()
        while self.waiting and not self.ended and time.monotonic() < deadline:
            select.select([], [1], [], deadline - time.monotonic())
            self.flush()
        self.lose_waiting()


# ======================================================================================================================
# Wire contract: protobuf messages, built at run time because generated code ties a script to one protobuf version
# ======================================================================================================================

WireField = Tuple[str, int, str]  # name, number, scalar type or message name
WIRE_CONNECTION_V4: Tuple[WireField, ...] = (("Saddr", 1, "uint32"), ("Daddr", 2, "uint32"), ("Sport", 3, "uint32"),
                                             ("Dport", 4, "uint32"), ("Netns", 5, "uint32"))
WIRE_CONNECTION_V6: Tuple[WireField, ...] = (("Saddr", 1, "string"), ("Daddr", 2, "string"), *WIRE_CONNECTION_V4[2:])
COMMON_EVENT: Tuple[WireField, ...] = (
    ("Timestamp", 1, "uint64"), ("Pid", 2, "int64"), ("Ret", 3, "int64"), ("Name", 4, "string"), ("Hash", 5, "uint64"),
    ("Flags", 6, "uint64"),
    # from 100 up: not in the original contract
    ("Tid", 100, "int64"), ("Ppid", 101, "int64"), ("Uid", 102, "uint32"), ("Gid", 103, "uint32"),
    ("Comm", 104, "bytes"), ("ProgramID", 105, "uint64"), ("Path", 106, "bytes"), ("Euid", 107, "uint32"),
    ("Exe", 108, "bytes"), ("Cgroup", 109, "bytes"), ("Container", 110, "string"), ("Mntns", 111, "uint32"),
    ("Netns", 112, "uint32"), ("Pidns", 113, "uint32"), ("Files", 114, "repeated bytes"),
)
SYSCALL_ARGUMENT: Tuple[WireField, ...] = (("Name", 1, "string"), ("Integer", 2, "int64"), ("Text", 3, "bytes"))
SYSCALL_EVENT: Tuple[WireField, ...] = (("Arguments", 1, "repeated ProtobufSyscallArgument"),)
METRIC_EXTENSIONS: Tuple[WireField, ...] = (
    ("Matched", 100, "uint64"), ("Lost", 101, "uint64"), ("Host", 102, "string"), ("Filter", 103, "string"),
    ("Stream", 104, "string"), ("Group", 105, "string"), ("Metrics", 106, "string"), ("Time", 107, "double"),
    ("Agent", 108, "string"), ("Sequence", 109, "uint64"), ("SyscallEvent", 110, "ProtobufSyscallEvent"),
    ("Kinds", 111, "repeated ProtobufKind"), ("Other", 112, "uint64"),
)
KIND: Tuple[WireField, ...] = (("Fields", 1, "repeated ProtobufSyscallArgument"), ("Count", 2, "uint64"))
WIRE_PACKAGE = "tracer"
WIRE_METHOD = f"/{WIRE_PACKAGE}.MetricCollector/Process"


def wire_messages() -> Dict[str, Tuple[WireField, ...]]:
    """Every message of the contract with its fields; the syscalls' messages follow from the event table."""
    messages = {"ProtobufCommonEvent": COMMON_EVENT, "ProtobufConnectV4Event": WIRE_CONNECTION_V4,
                "ProtobufConnectV6Event": WIRE_CONNECTION_V6, "ProtobufSyscallArgument": SYSCALL_ARGUMENT,
                "ProtobufSyscallEvent": SYSCALL_EVENT, "ProtobufKind": KIND}
    metric: List[WireField] = [("Count", 1, "uint64"), ("CommonEvent", 2, "ProtobufCommonEvent"),
                               ("ConnectV4Event", 3, "ProtobufConnectV4Event"),
                               ("ConnectV6Event", 4, "ProtobufConnectV6Event")]
    for event_type in sorted(EVENT_TYPES.values(), key=lambda event_type: event_type.metric_field):
        number = event_type.metric_field
        if not number or event_type.is_tcp:
            continue
        messages[event_type.message] = tuple((argument.name, i, argument.type.wire)
                                             for i, argument in enumerate(event_type.arguments, 1))
        metric.append((f"{camel_case(event_type.name)}Event", number, event_type.message))
    return {**messages, "Metric": (*metric, *METRIC_EXTENSIONS), "Empty": ()}


def install_command(debian: str, alpine: str) -> str:
    """What installs a distribution's packages."""
    return f"apk add {alpine}" if shutil.which("apk") else f"apt-get install {debian}"


def import_optional(module: str) -> Any:
    """An optional package. Raises HostError that says how to get it."""
    os.environ["GRPC_VERBOSITY"] = "NONE"  # the library's own lines on stderr: ours say what matters
    try:
        return importlib.import_module(module)
    except Exception as error:  # of a version that does not go with this Python, of whatever type
        packages = ("python3-grpcio python3-protobuf", "py3-grpcio py3-protobuf")
        packaged = f"{install_command(*packages)}, or " if sys.prefix == "/usr" else ""
        reason = escape(str(error)).splitlines()[0] if str(error) else type(error).__name__
        raise HostError(f"a grpc channel and 'collect' need the Python packages grpcio and protobuf ({reason}): "
                        f"{packaged}{sys.executable} -m pip install grpcio protobuf") from None


def build_wire() -> Dict[str, Any]:
    """Message name -> class, of the contract. Raises HostError without protobuf."""
    return build_messages("metric_collector.proto", WIRE_PACKAGE, wire_messages(), "MetricCollector")


def build_messages(file_name: str, package: str, messages: Mapping[str, Tuple[WireField, ...]],
                   service_name: str = "") -> Dict[str, Any]:
    """Message name -> class. Works with any protobuf since 3.12. Raises HostError without protobuf."""
    descriptor_pb2 = import_optional("google.protobuf.descriptor_pb2")
    descriptor_pool = import_optional("google.protobuf.descriptor_pool")
    message_factory = import_optional("google.protobuf.message_factory")
    file = descriptor_pb2.FileDescriptorProto(name=file_name, package=package, syntax="proto3")
    field_type = descriptor_pb2.FieldDescriptorProto
    for message, fields in messages.items():
        described = file.message_type.add(name=message)
        for name, number, kind in fields:
            repeated, kind = kind.startswith("repeated "), kind.rpartition(" ")[2]
            scalar = not kind[0].isupper()
            described.field.add(name=name, number=number,
                                label=field_type.LABEL_REPEATED if repeated else field_type.LABEL_OPTIONAL,
                                type=field_type.Type.Value(f"TYPE_{kind.upper()}" if scalar else "TYPE_MESSAGE"),
                                type_name=None if scalar else f".{package}.{kind}")
    if service_name:
        file.service.add(name=service_name).method.add(
            name="Process", input_type=f".{package}.Metric", output_type=f".{package}.Empty", client_streaming=True)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file) if not hasattr(pool, "AddSerializedFile") else pool.AddSerializedFile(file.SerializeToString())
    if hasattr(message_factory, "GetMessageClass"):
        get_class = message_factory.GetMessageClass
    else:  # before protobuf 4.22
        get_class = message_factory.MessageFactory(pool).GetPrototype
    return {name: get_class(pool.FindMessageTypeByName(f"{package}.{name}")) for name in messages}


INT_RANGES = {"int64": (64, True), "uint64": (64, False), "uint32": (32, False)}


def wrap_int(value: int, kind: str) -> int:
    """`value` modulo the wire type's range, as a C cast does it: -1 in a uint64 is 2^64-1."""
    bits, signed = INT_RANGES[kind]
    value &= (1 << bits) - 1
    return value - (1 << bits) if signed and value >> (bits - 1) else value


def encode_arguments(wire: Mapping[str, Any], event: Event) -> Dict[str, Any]:
    """The event's own message, by its name in Metric: that of the contract, or the one of all other syscalls."""
    event_type = event.type
    if not event_type.metric_field:
        message = wire["ProtobufSyscallEvent"]()
        for argument, value in zip(event_type.arguments, event.args):
            if isinstance(value, str):
                message.Arguments.add(Name=argument.name, Text=encode_text(value))
            else:
                message.Arguments.add(Name=argument.name, Integer=wrap_int(value, "int64"))
        return {"SyscallEvent": message}
    message = wire[event_type.message]()
    for argument, value in zip(event_type.arguments, event.args):
        name = camel_case(argument.name) if event_type.is_tcp else argument.name
        setattr(message, name, encode_argument(argument, value))
    return {event_type.message.replace("Protobuf", ""): message}


def encode_argument(argument: Argument, value: Value) -> Union[int, str, bytes]:
    if isinstance(value, str):
        return encode_text(value)
    if argument.type.address_bits == 128:
        return argument.type.show(value)
    if argument.type.address_bits == 32:  # as struct in_addr has it: in network byte order
        return int.from_bytes(value.to_bytes(4, "big"), sys.byteorder)
    return wrap_int(value, argument.type.wire)


def encode_detail(wire: Mapping[str, Any], detail: Optional[Detail]) -> Dict[str, Any]:
    if detail is None:
        return {}
    argument, kind = wire["ProtobufSyscallArgument"], wire["ProtobufKind"]
    return {"Other": detail.other or 0, "Kinds": [
        kind(Count=count, Fields=[argument(Name=name, Text=encode_text(value)) if isinstance(value, str) else
                                  argument(Name=name, Integer=wrap_int(value, "int64")) for name, value in labels])
        for labels, count in detail.rows]}


def encode_metric(wire: Mapping[str, Any], alert: Alert, agent: str, sequence: int) -> bytes:
    """The serialized Metric of one alert, the `sequence`-th of this agent."""
    event, flags = shown_event(alert)
    common = wire["ProtobufCommonEvent"](
        Timestamp=event.timestamp_ns, Pid=event.pid, Ret=event.ret, Name=event.name, Hash=event.hash,
        Flags=flags, Tid=event.tid, Ppid=event.ppid, Uid=event.uid, Gid=event.gid, Comm=encode_text(event.comm),
        ProgramID=event.program_id, Path=encode_text(event.path), Euid=event.euid, Exe=encode_text(event.exe),
        Cgroup=encode_text(event.cgroup), Container=event.container, Mntns=event.mntns, Netns=event.netns,
        Pidns=event.pidns, Files=[encode_text(path) for path in event.files[:len(event.type.descriptors)]])
    metric = wire["Metric"](
        Count=alert.count, CommonEvent=common, Matched=alert.matched, Lost=alert.lost, Host=HOSTNAME,
        Filter=wire_text(alert.filter.id), Stream=wire_text(alert.filter.stream), Group=wire_text(alert.filter.group),
        Metrics=alert.filter.metrics, Time=alert.time, Agent=agent, Sequence=sequence, **encode_arguments(wire, event),
        **encode_detail(wire, alert.detail))
    data: bytes = metric.SerializeToString()
    return data


def wire_text(text: str) -> str:
    """`text` as proto3 strings must be: valid UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


# ======================================================================================================================
# Backlog: alerts that wait for their acknowledgement, in memory or in a spool directory that survives the agent
# ======================================================================================================================

EARLIER = -1                          # owner of what an earlier run has left behind
SPOOL_MARK_BYTES = 8                  # random ones before each record of a segment: no event can forge them
SPOOL_RECORD = struct.Struct("<II")   # bytes of the body, and their CRC-32
SPOOL_BODY = struct.Struct("<iQQ")    # owner, count and lost, before the data
SPOOL_CURSOR = struct.Struct("<QQI")  # segment, offset, and the CRC-32 of these two
SPOOL_SEGMENT_BYTES = 1 << 20         # a segment is removed as a whole, so that no more than this is kept for nothing
SPOOL_TRIES = 5                       # to read a segment that gives an error, before its records are lost
SPOOL_RETRY = 1.0                     # seconds after a failed write until another is tried
SPOOL_FLAGS = os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
SEGMENT_NAME = re.compile(rf"([0-9]{{12}})-([0-9a-f]{{{2 * SPOOL_MARK_BYTES}}})\.spool")


class Queued(NamedTuple):
    """One alert that waits."""

    owner: int    # index in the channel's `owners`, or EARLIER
    events: int   # the alert's count
    lost: int
    data: bytes   # as it is sent


def pack_spooled(entry: Queued, mark: bytes) -> bytes:
    """A record of a segment, which has the mark before each of them."""
    body = SPOOL_BODY.pack(entry.owner, entry.events, entry.lost) + entry.data
    return mark + SPOOL_RECORD.pack(len(body), zlib.crc32(body)) + body


def segment_name(number: int, mark: bytes) -> str:
    return f"{number:012}-{mark.hex()}.spool"


def read_spooled(data: bytes, mark: bytes) -> Iterator[Tuple[int, Optional[Queued]]]:
    """A segment's records, each with the offset of its end; None for one that is not whole, which has none.

    `mark` is the segment's, which its name has.
    """
    offset = data.find(mark)
    while offset >= 0:
        end, entry = read_record(data, offset + len(mark))
        yield end, entry
        offset = data.find(mark, end)


def read_record(data: bytes, begin: int) -> Tuple[int, Optional[Queued]]:
    """The record behind a mark and the offset of its end; None and `begin` when it is not whole."""
    body_begin = begin + SPOOL_RECORD.size
    if body_begin <= len(data):
        length, checksum = SPOOL_RECORD.unpack_from(data, begin)
        body = data[body_begin:body_begin + length]
        if SPOOL_BODY.size <= length == len(body) and zlib.crc32(body) == checksum:
            owner, events, lost = SPOOL_BODY.unpack_from(body)
            return body_begin + length, Queued(owner, events, lost, body[SPOOL_BODY.size:])
    return begin, None


def check_spool(found: os.stat_result) -> None:
    """Raises OSError when others could write to the directory."""
    if not stat.S_ISDIR(found.st_mode):
        raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    if found.st_uid not in (0, os.geteuid()) or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise OSError(errno.EACCES, "it is another user's, or others can write to it: chmod 700")


def check_unlocked(path: str) -> None:
    """Raises OSError when another agent has the spool; it may come between this and lock_spool()."""
    with contextlib.suppress(FileNotFoundError):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            lock_spool(fd)
        finally:
            os.close(fd)


def lock_spool(fd: int) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OSError(errno.EBUSY, "another agent or channel uses it") from None


def check_spool_path(path: str) -> None:
    """Raises OSError when open_spool() would fail; nothing is made."""
    parent, _, found = open_parent(path.rstrip("/"))
    try:
        if found is not None:
            check_spool(found)
            check_unlocked(f"{path}/lock")
        elif not os.access(".", os.W_OK | os.X_OK, dir_fd=parent, effective_ids=True):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
    finally:
        os.close(parent)


def open_spool(path: str) -> int:
    """A descriptor of the directory, which is made with mode 0700 when it is missing. Raises OSError."""
    parent, name, found = open_parent(path)
    try:
        if found is None:
            os.mkdir(name, 0o700, dir_fd=parent)
        directory = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        try:
            check_spool(os.fstat(directory))
        except OSError:
            os.close(directory)
            raise
        return directory
    finally:
        os.close(parent)


def sync_and_close(fd: int) -> None:
    """Brings to the disk what has been written: it may have to last."""
    if fd >= 0:
        with contextlib.suppress(OSError):
            os.fdatasync(fd)
        os.close(fd)


class Spool:
    """Records in numbered files, the segments; the file `cursor` says how far they have been acknowledged.

    What was written survives the agent, and after a crash of the host what the disk has got of it. A record that is not
    whole is never sent. One process has it at a time.
    """

    def __init__(self, path: str, max_bytes: int) -> None:
        self.path, self.max_bytes = path, max_bytes
        self.sizes: Dict[int, int] = {}  # segment -> bytes up to the end of its last whole record, ascending
        self.marks: Dict[int, bytes] = {}
        self.unreadable: Dict[int, int] = collections.defaultdict(int)  # segment -> how often
        self.waiting = 0                 # records behind the cursor
        self.pending: Dict[int, int] = collections.defaultdict(int)  # owner -> sum of count of these
        self.cursor = (0, 0)             # segment and offset of the oldest record that waits
        self.ends: List[Tuple[int, int, Queued]] = []  # of what head() has returned: segment, end, entry
        self.directory = self.lock = self.writer = self.cursor_file = -1
        self.retry_at: Optional[float] = None  # after a failed write, monotonic seconds

    def enter(self) -> None:
        """Makes the directory ours. Raises OSError."""
        self.directory = open_spool(self.path)
        self.lock = os.open("lock", os.O_RDWR | SPOOL_FLAGS, 0o600, dir_fd=self.directory)
        lock_spool(self.lock)
        self.cursor_file = os.open("cursor", os.O_RDWR | SPOOL_FLAGS, 0o600, dir_fd=self.directory)

    def open(self) -> None:
        """Takes over what an earlier run has left behind. Raises OSError."""
        self.enter()
        self.cursor = self.read_cursor()
        for name in sorted(os.listdir(self.directory)):
            match = SEGMENT_NAME.fullmatch(name)
            if match:
                self.marks[int(match[1])] = bytes.fromhex(match[2])
                self.take_over(int(match[1]))
        self.own = max([self.cursor[0], *self.sizes]) + 1  # the first segment of this run
        self.forget_segments(self.cursor[0])

    def read_cursor(self) -> Tuple[int, int]:
        data = os.pread(self.cursor_file, SPOOL_CURSOR.size, 0)
        if len(data) == SPOOL_CURSOR.size:
            segment, offset, checksum = SPOOL_CURSOR.unpack(data)
            if zlib.crc32(data[:16]) == checksum:
                return segment, offset
        return 0, 0  # then something is sent twice, and nothing is left out

    def take_over(self, segment: int) -> None:
        """Notes what waits in a segment, and says what is damaged."""
        self.sizes[segment] = 0
        try:
            data = self.read(segment, 0)
        except OSError as error:
            say(f"{escape(self.path)}: a segment cannot be read ({error.strerror}), and is left out")
            return
        end = damaged = 0
        for record_end, entry in read_spooled(data, self.marks[segment]):
            if entry is None:
                continue
            if (segment, record_end) > self.cursor:
                self.waiting += 1
                self.pending[EARLIER] += entry.events
                damaged += record_end - len(pack_spooled(entry, self.marks[segment])) - end
            end = record_end
        if damaged:
            say(f"{escape(self.path)}: {damaged} bytes between records of an earlier run are damaged, and are left out")
        if end < len(data):
            say(f"{escape(self.path)}: {len(data) - end} bytes behind the last whole record of a segment are left out")
        self.sizes[segment] = end

    def open_segment(self, segment: int, flags: int) -> int:
        return os.open(segment_name(segment, self.marks[segment]), flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600,
                       dir_fd=self.directory)

    def read(self, segment: int, offset: int, size: Optional[int] = None) -> bytes:
        """What is in a segment from the offset on, at most up to `size`."""
        fd = self.open_segment(segment, os.O_RDONLY)
        try:
            return os.pread(fd, (os.fstat(fd).st_size if size is None else size) - offset, offset)
        finally:
            os.close(fd)

    def append(self, entry: Queued) -> bool:
        """Whether it is on disk now; not, when the directory is full or cannot be written."""
        if self.retry_at is not None and time.monotonic() < self.retry_at:
            return False
        try:
            if not self.write(entry):
                return False
        except OSError as error:
            if self.retry_at is None:
                say(f"cannot write to the spool {escape(self.path)}: {error.strerror}; alerts are kept in memory, and "
                    "written when it works again")
            self.retry_at = time.monotonic() + SPOOL_RETRY
            return False
        if self.retry_at is not None:
            say(f"writing to the spool {escape(self.path)} works again")
        self.retry_at = None
        self.waiting += 1
        self.pending[entry.owner] += entry.events
        return True

    def write(self, entry: Queued) -> bool:
        """Whether there was room. Raises OSError, and then no more than a part is written, which is never read."""
        if self.writer >= 0 and os.fstat(self.writer).st_nlink == 0:  # somebody has removed it
            self.close_writer()
        if os.fstat(self.directory).st_nlink == 0:  # and the directory as well
            self.leave()
            self.enter()
        last = max(self.sizes, default=self.cursor[0])
        record = pack_spooled(entry, self.marks.get(last) or b"")
        segment_bytes = min(SPOOL_SEGMENT_BYTES, self.max_bytes // 4)
        if self.writer < 0 or self.sizes[last] + len(record) > segment_bytes:
            last, mark = max(last + 1, self.own), os.urandom(SPOOL_MARK_BYTES)
            record = pack_spooled(entry, mark)
            self.close_writer()
        if sum(self.sizes.values()) + len(record) > self.max_bytes:
            if self.waiting or len(record) > self.max_bytes:
                return False
            self.forget_segments(last)  # what is acknowledged, and was kept for its number's sake
        if self.writer < 0:
            self.marks[last] = mark
            self.writer = self.open_segment(last, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND)
            self.sizes[last] = 0
        try:
            written = os.write(self.writer, record)
            if written < len(record):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            try:
                os.ftruncate(self.writer, self.sizes[last])
            except OSError:  # the next record begins another segment, whatever is at the end of this one
                self.close_writer()
            raise
        self.sizes[last] += len(record)
        return True

    def duplicate_writer(self) -> int:
        """A descriptor of its own of the segment that is written to, for sync_and_close(); -1: there is none."""
        with contextlib.suppress(OSError):
            return os.dup(self.writer) if self.writer >= 0 else -1
        return -1

    def close_writer(self) -> None:
        if self.writer >= 0:
            os.close(self.writer)
            self.writer = -1

    def head(self, limit: int) -> List[Queued]:
        """The oldest records that wait and are whole. Raises OSError when they cannot be read."""
        self.ends = []
        segment, offset = self.cursor
        for segment in [number for number in self.sizes if number >= segment]:
            begin = offset if segment == self.cursor[0] else 0
            if begin >= self.sizes[segment]:
                continue
            for end, entry in read_spooled(self.read_again(segment, begin), self.marks[segment]):
                if entry is None:
                    continue
                if segment < self.own:
                    entry = entry._replace(owner=EARLIER)
                self.ends.append((segment, begin + end, entry))
                if len(self.ends) == limit:
                    return [entry for _, _, entry in self.ends]
        return [entry for _, _, entry in self.ends]

    def read_again(self, segment: int, begin: int) -> bytes:
        """What is in a segment from there on, or nothing when it has been removed, or cannot be read again and again.
        Raises OSError."""
        try:
            return self.read(segment, begin, self.sizes[segment])
        except OSError as error:
            self.unreadable[segment] += 1
            if error.errno != errno.ENOENT and self.unreadable[segment] < SPOOL_TRIES:
                raise
        self.sizes[segment] = 0
        return b""

    def give_up(self) -> Dict[int, int]:
        """Leaves out what waits and head() does not find any more. Returns owner -> sum of count of these."""
        say(f"{escape(self.path)}: {self.waiting} records are damaged or gone, and are lost")
        missing, self.pending, self.waiting = self.pending, collections.defaultdict(int), 0
        self.cursor = max(self.sizes.items())
        return missing

    def pop(self, count: int) -> None:
        """The first `count` of what head() has returned are acknowledged."""
        for segment, end, entry in self.ends[:count]:
            self.cursor = segment, end
            self.waiting -= 1
            self.pending[entry.owner] -= entry.events
        packed = struct.pack("<QQ", *self.cursor)
        with contextlib.suppress(OSError):  # then it is sent twice after a restart
            os.pwrite(self.cursor_file, packed + struct.pack("<I", zlib.crc32(packed)), 0)
        self.forget_segments(self.cursor[0])

    def forget_segments(self, before: int) -> None:
        """Removes the segments of lower numbers."""
        for segment in [number for number in self.sizes if number < before]:
            with contextlib.suppress(OSError):
                os.unlink(segment_name(segment, self.marks[segment]), dir_fd=self.directory)
            del self.sizes[segment], self.marks[segment]

    def close(self) -> None:
        sync_and_close(self.duplicate_writer())
        self.close_writer()
        self.leave()

    def leave(self) -> None:
        """Closes the directory."""
        for fd in (self.cursor_file, self.lock, self.directory):
            if fd >= 0:
                os.close(fd)
        self.cursor_file = self.lock = self.directory = -1


class Backlog:
    """Alerts in strict order: a receiver takes a Sequence below the latest one for something that was sent again.

    They are on disk as long as a spool takes them, the later ones in memory, up to MAX_QUEUE_BYTES, until it
    does again.
    """

    def __init__(self, spool: Optional[Spool] = None) -> None:
        self.spool = spool
        self.memory: Deque[Queued] = collections.deque()
        self.bytes = 0
        self.from_spool = False  # where head() has taken from what pop() settles

    def __len__(self) -> int:
        return len(self.memory) + self.spooled

    @property
    def spooled(self) -> int:
        """How many are on disk."""
        return self.spool.waiting if self.spool is not None else 0

    def append(self, entry: Queued) -> bool:
        """Whether there was room for it."""
        if self.from_spool:  # else what is in memory may be on its way
            self.spill()
        if self.spool is not None and not self.memory and self.spool.append(entry):
            return True
        if self.bytes + len(entry.data) > MAX_QUEUE_BYTES:
            return False
        self.memory.append(entry)
        self.bytes += len(entry.data)
        return True

    def head(self, limit: int) -> List[Queued]:
        """The oldest ones; none, though some wait, when these are all damaged. Raises OSError when it cannot read."""
        self.spill()
        self.from_spool = self.spooled > 0
        if self.spool is not None and self.from_spool:
            return self.spool.head(limit)
        return list(itertools.islice(self.memory, limit))

    def pop(self, count: int) -> None:
        """The first `count` of what head() has returned are settled."""
        if self.spool is not None and self.from_spool:
            self.spool.pop(count)
            return
        for _ in range(count):
            self.bytes -= len(self.memory.popleft().data)

    def spill(self) -> None:
        """Brings to the disk what is in memory, as far as there is room."""
        while self.spool is not None and self.memory and self.spool.append(self.memory[0]):
            self.bytes -= len(self.memory.popleft().data)


# ======================================================================================================================
# gRPC channel: a thread sends, so that a slow or absent collector never holds up reading
# ======================================================================================================================

MAX_STREAM_ALERTS = 1000
ACK_TIMEOUT = 10.0                # seconds until a stream without an acknowledgement counts as failed
BACKOFF_MIN, BACKOFF_MAX = 0.2, 10.0  # seconds
# Pings while a stream is open, at other times servers forbid it: they tell a dead connection from a slow collector
# before ACK_TIMEOUT is over. Two fit into that; a server that has sent nothing meanwhile hangs up after some more.
KEEPALIVE_TIME_MS, KEEPALIVE_TIMEOUT_MS = 4_000, 5_000
CA_BUNDLES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/ca-bundle.pem",
              "/etc/ssl/cert.pem", "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem")


def system_roots() -> bytes:
    """The host's CA certificates, PEM. Raises HostError without any."""
    for path in CA_BUNDLES:
        try:
            return Path(path).read_bytes()
        except OSError:
            continue
    install = install_command("ca-certificates", "ca-certificates")
    raise HostError(f"no CA certificates found to check the collector's: {install}, or use --collector-insecure for a "
                    "collector without TLS")


def read_token(path: str) -> str:
    """The bearer token in a file. Raises OSError, also for what is no token."""
    with Path(path).open("rb") as file:
        token = file.read(65537).strip()
    if not re.fullmatch(rb"[\x21-\x7e]{1,65536}", token):
        raise OSError(errno.EINVAL, "it has to hold one line of printable characters without spaces")
    return token.decode("ascii")


def read_pem(path: str) -> Optional[bytes]:
    """A file's content, when there is a path. Raises OSError, also for what is being written: grpcio would abort."""
    data = Path(path).read_bytes() if path else None
    if data is not None and b"-----END " not in data:
        raise OSError(errno.EINVAL, f"{escape(path)} has no certificate or key in it")
    return data


def check_certificates(tls: TlsSpec) -> None:
    """Raises OSError when the files cannot be used; grpcio itself would only say so when it connects."""
    ssl: Any = importlib.import_module("ssl")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    loads: Tuple[Tuple[str, Callable[[], Any]], ...] = (
        (tls.ca, lambda: context.load_verify_locations(tls.ca)), (tls.key, lambda: None),
        (tls.cert, lambda: context.load_cert_chain(tls.cert, tls.key, password="")))
    for path, load in loads:
        try:
            if path:
                Path(path).read_bytes()
                load()
        except OSError as error:  # ssl.SSLError is one
            reason = getattr(error, "reason", None) or error.strerror
            raise OSError(error.errno, f"cannot use {escape(path)}: {reason}") from None


class GrpcChannel(Channel):
    """Queues alerts and sends them in short streams; what a collector does not acknowledge is sent again."""

    noun: ClassVar[str] = "alerts"  # in messages: what is in the queue
    spool_part: ClassVar[str] = ""  # directory below that of the spool
    spool_parts: ClassVar[int] = 1  # among which the spool's max_bytes are divided

    def __init__(self, spec: ChannelSpec, accounts: Mapping[str, Account], insecure: bool = False) -> None:
        super().__init__(spec, accounts)
        self.name = self.title(spec)
        self.insecure = insecure
        self.owners: List[Account] = []
        self.owner_numbers: Dict[Account, int] = {}
        self.backlog = Backlog(Spool(os.path.join(spec.spool.dir, self.spool_part).rstrip("/"),
                                     spec.spool.max_bytes // self.spool_parts) if spec.spool is not None else None)
        self.agent = wire_text(f"{uuid.uuid4()}/{spec.id}")  # of this run: what is sent again can be told from new
        self.sequence = 0
        self.changed = threading.Condition()
        self.flushed = False              # the thread may send what is in the queue
        self.deadline: Optional[float] = None  # set by close(), monotonic seconds
        self.batch_size = MAX_STREAM_ALERTS
        self.call: Any = None
        self.token = ""
        self.stale = False                # the token file cannot be read any more
        self.moved = False                # the thread has to connect anew, as the spec says now
        self.abandoned: List[Any] = []    # connections that cannot be closed
        self.asked = 0.0                  # seconds that the collector has asked to wait
        self.said: Set[str] = set()       # kinds of problems that have been said since the last acknowledgement
        self.sends = self.failures = self.reconnects = 0
        self.thread = threading.Thread(target=self.run, name=f"grpc-{spec.id}", daemon=True)

    def problem(self) -> Optional[str]:
        import_optional("grpc")
        import_optional("google.protobuf")
        tls, token = self.spec.tls, self.spec.token_file
        if self.insecure and (tls or token):
            raise UsageError(f"channel '{escape(self.spec.id)}' has {'tls' if tls else 'token_file'}, and "
                             "--collector-insecure would send in the clear: leave out one of them")
        if not self.insecure and not (tls and tls.ca):
            system_roots()
        for what, check in self.file_checks():
            try:
                check()
            except OSError as error:
                return f"channel '{escape(self.spec.id)}': {what}: {error.strerror}"
        return None

    def file_checks(self) -> Iterator[Tuple[str, Callable[[], Any]]]:
        """What to try of the files that the spec names, each with what to say when it raises OSError."""
        spec = self.spec
        if spec.tls is not None:
            yield "tls", functools.partial(check_certificates, spec.tls)
        if spec.token_file:
            yield f"cannot read token_file {escape(spec.token_file)}", functools.partial(read_token, spec.token_file)
        if spec.spool is not None:
            yield f"cannot use spool.dir {escape(spec.spool.dir)}", functools.partial(check_spool_path, spec.spool.dir)

    def open(self) -> None:
        self.grpc = import_optional("grpc")
        with contextlib.ExitStack() as undo:
            try:
                self.connection = self.connect()
                undo.callback(self.connection.close)
                if self.backlog.spool is not None:
                    undo.callback(self.backlog.spool.close)
                    self.open_spool(self.backlog.spool)
            except OSError as error:
                raise TraceleftError(f"channel '{escape(self.spec.id)}': {error.strerror}") from None
            self.prepare()
            self.bind()
            try:
                self.thread.start()
            except RuntimeError as error:
                raise TraceleftError(f"channel '{escape(self.spec.id)}': {error}") from None
            undo.pop_all()

    def open_spool(self, spool: Spool) -> None:
        try:
            if self.spool_part:
                os.close(open_spool(os.path.dirname(spool.path)))
            spool.open()
        except OSError as error:
            raise OSError(error.errno, f"cannot use spool.dir {escape(spool.path)}: {error.strerror}") from None
        self.flushed = spool.waiting > 0
        if spool.waiting:
            say(f"{escape(spool.path)}: {spool.waiting} {self.noun} of earlier runs are sent first")
        for path in self.other_spools(spool.path):
            with contextlib.suppress(OSError), contextlib.closing(Spool(path, spool.max_bytes)) as other:
                other.open()
                if other.waiting:
                    say(f"{escape(path)}: {other.waiting} records of earlier runs are in the channel's format of then, "
                        "and stay there until it has it again")

    def other_spools(self, path: str) -> List[str]:
        """Where a channel of another format has its spools when it is given the same directory."""
        return [found for found in (f"{path}/metrics", f"{path}/logs") if os.path.exists(f"{found}/cursor")]

    def connect(self) -> Any:
        """A new connection, for which names are resolved and certificates read anew. Raises OSError."""
        options: List[Tuple[str, Any]] = [
            ("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1),
            ("grpc.keepalive_time_ms", KEEPALIVE_TIME_MS), ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
            ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_MS),  # what newer versions go by: a minute by default
            ("grpc.service_config_disable_resolution", 1)]
        if self.spec.gzip:
            options.append(("grpc.default_compression_algorithm", int(self.grpc.Compression.Gzip)))
        if self.spec.path.startswith(DNS_SCHEME):
            options.append(("grpc.lb_policy_name", "round_robin"))
        if self.insecure:
            return self.grpc.insecure_channel(self.spec.path, options)
        tls = self.spec.tls or TlsSpec()
        if tls.server_name:
            options.append(("grpc.ssl_target_name_override", tls.server_name))
        roots, key, cert = map(read_pem, (tls.ca, tls.key, tls.cert))
        credentials = self.grpc.ssl_channel_credentials(roots or system_roots(), key, cert)
        return self.grpc.secure_channel(self.spec.path, credentials, options)

    def reconnect(self) -> None:
        """After a failure: the collector may have moved, its connection may be dead, certificates may be new."""
        try:
            connection = self.connect()
        except (OSError, TraceleftError) as error:
            self.report(f"cannot read certificates, and goes on with the old ones: {error}")
            return
        if self.connection not in self.abandoned:
            self.connection.close()
        self.connection = connection
        self.reconnects += 1
        self.bind()

    def metadata(self) -> Optional[Tuple[Tuple[str, str], ...]]:
        """What goes with each call; a token file that cannot be read now leaves the token as it was."""
        if not self.spec.token_file:
            return None
        try:
            self.token, self.stale = read_token(self.spec.token_file), False
        except OSError as error:
            if not self.stale:
                say(f"cannot read {escape(self.spec.token_file)}: {error.strerror}; the token that was read is used")
            self.stale = True
        return (("authorization", f"Bearer {self.token}"),)

    # What the protocol consists of: another one overrides these

    def prepare(self) -> None:
        """Readies messages."""
        self.wire = build_wire()

    def bind(self) -> None:
        """Readies the rpc for a new connection."""
        self.process = self.connection.stream_unary(WIRE_METHOD, request_serializer=bytes,
                                                    response_deserializer=self.wire["Empty"].FromString)

    def encode(self, alert: Alert) -> bytes:
        """What is queued of an alert; empty when there is nothing to send."""
        self.sequence += 1
        return encode_metric(self.wire, alert, self.agent, self.sequence)

    def worth(self, alert: Alert) -> int:
        """What is settled with an alert."""
        return alert.count

    def take_batch(self) -> List[Queued]:
        """The begin of the queue that is sent at once."""
        return self.backlog.head(self.batch_size)

    def begin_call(self, batch: List[bytes], timeout: float) -> Any:
        """Sends; returns the future of the answer."""
        return self.process.future(iter(batch), **self.call_options(timeout))

    def settle(self, account: Account, entry: Queued) -> None:
        """An alert that has been answered."""
        account.deliver(entry.events)

    def call_options(self, timeout: float) -> Dict[str, Any]:
        return {"timeout": timeout, "metadata": self.metadata()}

    def send(self, alert: Alert) -> None:
        account = self.accounts[alert.filter.id]
        data = self.encode(alert)
        if not data:
            return
        owner = self.owner_numbers.setdefault(account, len(self.owners))
        if owner == len(self.owners):
            self.owners.append(account)
        entry = Queued(owner, self.worth(alert), alert.lost, data)
        with self.changed:
            taken = self.backlog.append(entry)
        if not taken:
            account.lose_alert("queue_full", entry.events, entry.lost)

    def flush(self) -> None:
        with self.changed:
            self.flushed = len(self.backlog) > 0
            self.changed.notify()

    def figures(self) -> Dict[str, int]:
        with self.changed:
            return {"queued": len(self.backlog), "queued_bytes": self.backlog.bytes, "sends": self.sends,
                    "failures": self.failures, "reconnects": self.reconnects}

    def moves_to(self, spec: ChannelSpec) -> bool:
        return (spec.type, spec.format, spec.spool and spec.spool.dir) == (
            self.spec.type, self.spec.format, self.spec.spool and self.spec.spool.dir) and (
            spec.spool is not None or spec.id == self.spec.id)

    def move(self, spec: ChannelSpec) -> None:
        with self.changed:
            self.spec, self.name, self.moved = spec, self.title(spec), True
            if spec.spool is not None and self.backlog.spool is not None:
                self.backlog.spool.max_bytes = spec.spool.max_bytes // self.spool_parts
            self.said.clear()
            self.changed.notify()
        if self.call is not None:
            self.call.cancel()  # what it was sending is sent again

    def title(self, spec: ChannelSpec) -> str:
        """The channel in messages."""
        return spec.path

    def run(self) -> None:
        """The thread: one stream per flush; after a failure it waits, longer each time, and sends again."""
        backoff = BACKOFF_MIN
        while True:
            batch, problem = self.next_batch()
            if not batch and not problem:
                return
            if self.moved:
                self.moved, self.batch_size, backoff = False, MAX_STREAM_ALERTS, BACKOFF_MIN
                self.reconnect()
            self.asked = 0.0
            problem = problem or self.try_stream([entry.data for entry in batch])
            if not problem:
                self.acknowledged(batch)
                backoff = BACKOFF_MIN
                continue
            if self.moved:
                continue
            self.failures += 1
            self.report(problem)
            wait = backoff * (0.5 + os.urandom(1)[0] / 510)  # so that a host's agents do not come all at once
            self.back_off(max(wait, self.asked))
            backoff = min(2 * backoff, BACKOFF_MAX if self.deadline is None else BACKOFF_MIN)
            if problem.startswith("DEADLINE_EXCEEDED"):
                self.batch_size = max(self.batch_size // 4, 1)
            self.reconnect()

    def try_stream(self, batch: List[bytes]) -> str:
        """Why the batch was not acknowledged, or nothing."""
        try:
            return self.send_stream(batch) or ""
        except Exception as error:  # whatever an answer has brought about: the thread goes on
            if isinstance(error, RuntimeError):  # no thread for the call: closed in this state, a connection hangs
                self.abandoned.append(self.connection)
            return f"{type(error).__name__}: {error}"

    def next_batch(self) -> Tuple[List[Queued], str]:
        """What to send, once there is something; or why it cannot be read. Neither: it is time to end."""
        with self.changed:
            while True:
                self.changed.wait_for(lambda: self.flushed or self.deadline is not None)
                if not len(self.backlog) or self.remaining() <= 0:
                    if self.deadline is not None:
                        return [], ""
                    self.flushed = False
                    continue
                try:
                    batch = self.take_batch()
                except OSError as error:
                    return [], error.strerror or "the spool cannot be read"
                if batch or self.backlog.spool is None:
                    return batch, ""
                self.lose_spooled("spool_damaged", self.backlog.spool.give_up())

    def lose_spooled(self, cause: str, counts: Mapping[int, int]) -> None:
        """Accounts for what is in the spool; `counts` are those of Spool.pending."""
        for owner, count in counts.items():
            if count and owner != EARLIER:
                self.owners[owner].lose(cause, count)

    def back_off(self, seconds: float) -> None:
        """Waits, but not any more when the end of the run begins; meanwhile what is spooled gets to the disk."""
        if self.backlog.spool is not None:
            with self.changed:
                written = self.backlog.spool.duplicate_writer()
            sync_and_close(written)  # without the lock: it may take long
        with self.changed:
            closing = self.deadline is not None
            self.changed.wait_for(lambda: self.moved or self.deadline is not None and not closing,
                                  min(seconds, max(self.remaining(), 0)))

    def remaining(self) -> float:
        """Seconds that are left to deliver."""
        return float("inf") if self.deadline is None else self.deadline - time.monotonic()

    def send_stream(self, batch: List[bytes]) -> Optional[str]:
        """One stream, until its acknowledgement. Returns None, or why there was none."""
        try:
            self.call = self.begin_call(batch, max(min(ACK_TIMEOUT, self.remaining()), 0.01))
            self.call.result()
        except self.grpc.FutureCancelledError:
            return "no answer in time"
        except self.grpc.RpcError as error:
            return f"{error.code().name}: {error.details()}" if hasattr(error, "code") else str(error)
        return None

    def acknowledged(self, batch: List[Queued]) -> None:
        with self.changed:
            self.backlog.pop(len(batch))
            self.sends += len(batch)
            if not len(self.backlog):
                self.flushed = False
        for entry in batch:
            if entry.owner != EARLIER:
                self.settle(self.owners[entry.owner], entry)
        self.batch_size = min(2 * self.batch_size, MAX_STREAM_ALERTS)
        if self.said:
            say(f"{escape(self.name)} acknowledges again")
        self.said.clear()

    def report(self, problem: str) -> None:
        """Says each kind of problem once, until an acknowledgement; at the end, only what is new altogether."""
        kind = problem.partition(":")[0]
        if kind not in self.said and not (self.said and self.deadline is not None):
            hint = "" if self.insecure or "SSL" not in problem else \
                "; --collector-insecure is for a collector without TLS"
            say(f"{escape(self.name)}: {escape(problem)}; {self.noun} are kept and sent again{hint}")
        self.said.add(kind)

    def begin_close(self) -> None:
        with self.changed:
            self.deadline = self.deadline or time.monotonic() + CLOSE_TIMEOUT
            self.changed.notify()

    def close(self) -> None:
        self.begin_close()
        if self.thread.ident is not None:
            self.thread.join(max(self.remaining(), 0.0))
            if self.thread.is_alive() and self.call is not None:
                self.call.cancel()
            self.thread.join(CLOSE_TIMEOUT)
        if not self.thread.is_alive() and not self.abandoned:
            self.connection.close()
        else:  # which may hang, also when Python ends and takes it away
            for connection in (*self.abandoned, self.connection):
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))
        with self.changed:
            self.leave()

    def leave(self) -> None:
        """Accounts for what is left: in the spool for the next run, or lost."""
        spool, memory = self.backlog.spool, self.backlog.memory
        if spool is not None:
            spool.retry_at = None  # now or never
            self.backlog.spill()
            if spool.waiting:
                say(f"{escape(self.name)}: {spool.waiting} {self.noun} were not acknowledged, and wait in "
                    f"{escape(spool.path)} for the next run")
            self.lose_spooled("in_spool", spool.pending)
            spool.close()
        if memory:
            say(f"{escape(self.name)}: {len(memory)} {self.noun} were not acknowledged and are lost")
        for entry in memory:
            self.owners[entry.owner].lose_alert("not_acknowledged", entry.events, entry.lost)
        memory.clear()


# ======================================================================================================================
# OpenTelemetry: a grpc channel of format otlp speaks OTLP/gRPC to any OpenTelemetry Collector
# ======================================================================================================================

OTLP_PROTO = "opentelemetry.proto"
OTLP_SCHEMA = "https://opentelemetry.io/schemas/1.37.0"  # the semantic conventions that name the attributes below
MAX_REQUEST_BYTES = 3 << 20  # a collector takes 4 MiB, and refuses for good what is larger
RETRYABLE_CODES = frozenset(("CANCELLED", "DEADLINE_EXCEEDED", "ABORTED", "OUT_OF_RANGE", "UNAVAILABLE", "DATA_LOSS"))
HOST_ARCHES = {"x86_64": "amd64", "aarch64": "arm64"}
STATUS_DETAILS = "grpc-status-details-bin"
MAX_RETRY_DELAY = 600.0  # seconds: a server that asks for more is asked again
RPC_MESSAGES: Dict[str, Tuple[WireField, ...]] = {  # google/rpc/status.proto, google/rpc/error_details.proto
    "Any": (("type_url", 1, "string"), ("value", 2, "bytes")),
    "Status": (("code", 1, "int32"), ("message", 2, "string"), ("details", 3, "repeated Any")),
    "Duration": (("seconds", 1, "int64"), ("nanos", 2, "int32")),
    "RetryInfo": (("retry_delay", 1, "Duration"),),
}
Attributes = Dict[str, Union[str, int]]

SAMPLE_ATTRIBUTES: Tuple[Tuple[str, Callable[[Event], Union[str, int]]], ...] = (
    ("process.pid", lambda event: event.pid), ("process.parent_pid", lambda event: event.ppid),
    ("process.real_user.id", lambda event: event.uid), ("process.user.id", lambda event: event.euid),
    ("process.executable.path", lambda event: event.exe),
    ("process.linux.cgroup", lambda event: event.cgroup and f"0::{event.cgroup}"),  # as in /proc/PID/cgroup
    ("thread.id", lambda event: event.tid), ("thread.name", lambda event: event.comm),
    ("container.id", lambda event: event.container), ("file.path", lambda event: event.path),
    ("error.type", lambda event: errno.errorcode.get(-event.ret, "") if event.ret < 0 else ""),
    # what the conventions have no name for
    ("traceleft.ret", lambda event: event.ret), ("traceleft.gid", lambda event: event.gid),
    ("traceleft.program_id", lambda event: event.program_id), ("traceleft.hash", lambda event: str(event.hash)),
    ("traceleft.flags", lambda event: event.flags), ("traceleft.mntns", lambda event: event.mntns),
    ("traceleft.netns", lambda event: event.netns), ("traceleft.pidns", lambda event: event.pidns),
)
CONNECTION_ATTRIBUTES = {"saddr": "source.address", "sport": "source.port", "daddr": "destination.address",
                         "dport": "destination.port", "netns": "traceleft.netns"}


def sample_attributes(event: Event) -> Attributes:
    """The attributes of a sample's log record; texts that are empty are not known and left out."""
    found: Attributes = {name: get(event) for name, get in SAMPLE_ATTRIBUTES}
    named = event.named_args
    if event.type.is_tcp:
        found.update({CONNECTION_ATTRIBUTES[name]: value for name, value in named.items()})
        found.update({"network.transport": "tcp", "network.type": f"ip{event.name.rpartition('_')[2]}"})
    else:
        found.update({f"traceleft.args.{name}": value for name, value in named.items()})
    found.update({f"traceleft.files.{event.type.arguments[index].name}": path
                  for index, path in zip(event.type.descriptors, event.files)})
    return {name: value for name, value in found.items() if value != ""}


def detail_attributes(alert: Alert) -> Dict[str, str]:
    """What the output function says beside the count, as JSON."""
    if alert.detail is None:
        return {}
    return {f"traceleft.{alert.detail.name}": wire_text(json.dumps(alert.detail.as_json()))}


def filter_attributes(member: Filter) -> Attributes:
    """The attributes that tell a filter's data points and log records from others'."""
    found: Attributes = {"traceleft.filter": member.id, "traceleft.event": member.event,
                         "traceleft.stream": member.stream, "traceleft.group": member.group}
    return {name: value for name, value in found.items() if value}


def resource_attributes(instance: str) -> Attributes:
    """The attributes of this host and this run."""
    try:
        machine = Path("/etc/machine-id").read_text().strip()
    except OSError:
        machine = ""
    found: Attributes = {
        "service.name": "traceleft", "service.version": VERSION, "service.instance.id": instance,
        "host.name": HOSTNAME, "host.id": machine, "host.arch": HOST_ARCHES.get(platform.machine(), ""),
        "os.type": "linux", "os.version": platform.release()}
    return {name: value for name, value in found.items() if value}


def import_otlp(module: str) -> Any:
    """A module of opentelemetry-proto. Raises HostError without it, or when it does not go with this protobuf."""
    import_optional("google.protobuf")
    try:
        return importlib.import_module(f"{OTLP_PROTO}.{module}")
    except Exception as error:  # generated code: a protobuf that is too old shows as one of many types
        raise HostError("a grpc channel of format otlp needs the Python package opentelemetry-proto "
                        f"({escape(str(error)).splitlines()[0]}): pip install opentelemetry-proto") from None


class OtlpSignal(GrpcChannel):
    """Metrics or logs of an OTLP channel: each has a queue and a thread, since each is answered for itself."""

    spool_parts = 2                 # metrics and logs
    signal: ClassVar[str]           # as in the names of packages and files
    service: ClassVar[str]          # of collector/SIGNAL/v1
    rejected_field: ClassVar[str]   # in the answer's partial_success
    items: ClassVar[str]            # what that counts

    def __init__(self, spec: ChannelSpec, accounts: Mapping[str, Account], insecure: bool, instance: str) -> None:
        super().__init__(spec, accounts, insecure)
        self.instance = instance  # of this run, in the resource: both signals have the same
        self.refusal = ""      # why the server refused the latest request for good, or a part of it
        self.refusing = False  # it has been said

    def title(self, spec: ChannelSpec) -> str:
        return f"{spec.path} ({self.signal})"

    def other_spools(self, path: str) -> List[str]:
        parent = os.path.dirname(path)
        return [parent] if os.path.exists(f"{parent}/cursor") and self.spool_part == "metrics" else []

    def problem(self) -> Optional[str]:
        problem = super().problem()
        import_otlp(f"collector.{self.signal}.v1.{self.signal}_service_pb2")
        return problem

    def prepare(self) -> None:
        service = import_otlp(f"collector.{self.signal}.v1.{self.signal}_service_pb2")
        self.common = import_otlp("common.v1.common_pb2")
        self.messages = import_otlp(f"{self.signal}.v1.{self.signal}_pb2")
        self.rpc = build_messages("status.proto", "traceleft.rpc", RPC_MESSAGES)
        self.request = getattr(service, f"Export{self.service}Request")
        self.response = getattr(service, f"Export{self.service}Response")
        resource = import_otlp("resource.v1.resource_pb2").Resource
        self.resource = resource(attributes=self.attributes(resource_attributes(self.instance)))
        self.scope = self.common.InstrumentationScope(name="traceleft", version=VERSION)

    def bind(self) -> None:
        self.process = self.connection.unary_unary(
            f"/{OTLP_PROTO}.collector.{self.signal}.v1.{self.service}/Export",
            request_serializer=self.request.SerializeToString, response_deserializer=self.response.FromString)

    def attributes(self, values: Attributes) -> List[Any]:
        """KeyValues; bytes that are no UTF-8 appear as \\udc80 to \\udcff, as in the format json."""
        any_value = self.common.AnyValue
        return [self.common.KeyValue(key=key, value=any_value(string_value=wire_text(value)) if isinstance(value, str)
                                     else any_value(int_value=wrap_int(value, "int64")))
                for key, value in values.items()]

    def take_batch(self) -> List[Queued]:
        batch = super().take_batch()
        sizes = itertools.accumulate(len(entry.data) for entry in batch)
        return batch[:max(sum(size <= MAX_REQUEST_BYTES for size in sizes), 1)]

    def begin_call(self, batch: List[bytes], timeout: float) -> Any:
        return self.process.future(self.merge(self.request.FromString(b"".join(batch))),
                                   **self.call_options(timeout))

    def merge(self, request: Any) -> Any:
        """A request of many alerts, each with a resource of its own, with what they share said once."""
        raise NotImplementedError

    def send_stream(self, batch: List[bytes]) -> Optional[str]:
        """One request. Returns why it is to be sent again; a refusal is an answer, and stands in `refusal`."""
        self.refusal = ""
        try:
            self.call = self.begin_call(batch, max(min(ACK_TIMEOUT, self.remaining()), 0.01))
            self.check_partial(self.call.result().partial_success)
        except self.grpc.FutureCancelledError:
            return "no answer in time"
        except self.grpc.RpcError as error:
            problem, delay = f"{error.code().name}: {error.details()}", self.retry_delay(error)
            if error.code().name not in RETRYABLE_CODES and not (error.code().name == "RESOURCE_EXHAUSTED" and delay):
                self.refuse(f"{problem}; nothing of it is sent again")
                return None
            self.asked = delay
            return problem
        if self.refusing and not self.refusal:
            say(f"{escape(self.name)} accepts again")
            self.refusing = False
        return None

    def check_partial(self, partial: Any) -> None:
        """A part that was rejected must not be sent again; the server does not say which part it was."""
        rejected, message = getattr(partial, self.rejected_field), escape(partial.error_message)
        if rejected:
            self.refuse(f"{rejected} {self.items} were rejected: {message}; it does not say which, "
                        "so the whole request counts as lost")
        elif message and not self.refusing:
            say(f"warning: {escape(self.name)}: {message}")

    def refuse(self, why: str) -> None:
        self.refusal = why
        if not self.refusing:
            say(f"{escape(self.name)}: {escape(why)}")
        self.refusing = True

    def settle(self, account: Account, entry: Queued) -> None:
        if self.refusal:
            account.lose_alert("rejected", entry.events, entry.lost)
        else:
            account.deliver(entry.events)

    def retry_delay(self, error: Any) -> float:
        """The seconds that the server asks to wait, at most MAX_RETRY_DELAY, by a RetryInfo in its status' details; 0
        when it does not."""
        for key, value in error.trailing_metadata() or ():
            if key == STATUS_DETAILS:
                with contextlib.suppress(Exception):  # what cannot be decoded asks for nothing
                    for detail in self.rpc["Status"].FromString(value).details:
                        if detail.type_url.endswith("/google.rpc.RetryInfo"):
                            delay = self.rpc["RetryInfo"].FromString(detail.value).retry_delay
                            return min(max(float(delay.seconds + delay.nanos / 1e9), 0.0), MAX_RETRY_DELAY)
        return 0.0


class OtlpMetrics(OtlpSignal):
    """Counts as delta sums. The sums of a filter's points are its totals up to the latest alert."""

    spool_part = "metrics"
    signal, service, rejected_field, items = "metrics", "MetricsService", "rejected_data_points", "data points"
    METRICS = (
        ("traceleft.events.matched", "Events that matched the filter's rule."),
        ("traceleft.events.passed", "Events that the processing function let through."),
        ("traceleft.events.lost", "Passed events that were lost on the way to a collector."),
    )

    def prepare(self) -> None:
        super().prepare()
        self.since: Dict[str, Tuple[float, int]] = {}  # filter -> time and matched of its latest point
        self.begin = time.time()

    def encode(self, alert: Alert) -> bytes:
        matched = self.accounts[alert.filter.id].matched
        begin, before = self.since.get(alert.filter.id, (max(min(self.begin, alert.time - 1), 0.0), 0))
        begin = min(begin, alert.time)  # the clock may have been set back
        self.since[alert.filter.id] = alert.time, matched
        window = {"start_time_unix_nano": int(begin * 1e9), "time_unix_nano": int(alert.time * 1e9)}
        labels = filter_attributes(alert.filter)
        metrics = [self.delta_sum(name, description, window, [(labels, value)])
                   for (name, description), value in zip(self.METRICS, (matched - before, alert.count, alert.lost))]
        if alert.detail is not None:
            metrics.append(self.DETAILS[alert.detail.name](self, alert, window, labels))
        scope = self.messages.ScopeMetrics(scope=self.scope, metrics=metrics, schema_url=OTLP_SCHEMA)
        data: bytes = self.request(resource_metrics=[self.messages.ResourceMetrics(
            resource=self.resource, scope_metrics=[scope], schema_url=OTLP_SCHEMA)]).SerializeToString()
        return data

    def delta_sum(self, name: str, description: str, window: Mapping[str, int],
                  values: Iterable[Tuple[Attributes, int]]) -> Any:
        return self.messages.Metric(name=name, description=description, unit="{event}", sum=self.messages.Sum(
            aggregation_temporality=self.messages.AGGREGATION_TEMPORALITY_DELTA, is_monotonic=True,
            data_points=[self.messages.NumberDataPoint(attributes=self.attributes(labels), as_int=value, **window)
                         for labels, value in values]))

    def top(self, alert: Alert, window: Mapping[str, int], labels: Attributes) -> Any:
        """The heaviest groups, each a point, and the rest as one more without what tells groups apart."""
        assert alert.detail is not None
        groups: List[Tuple[Attributes, int]] = [
            ({**labels, **{f"traceleft.by.{name}": value for name, value in key}}, count)
            for key, count in alert.detail.rows]
        return self.delta_sum("traceleft.events.top", "Passed events of the groups that had most of them.", window,
                              [*groups, (labels, alert.detail.other or 0)])

    def histogram(self, alert: Alert, window: Mapping[str, int], labels: Attributes) -> Any:
        assert alert.detail is not None
        counts = {dict(bounds)["to"]: count for bounds, count in alert.detail.rows}
        field_name = alert.filter.output_parameters["field"].name
        return self.messages.Metric(
            name="traceleft.values", description="Values of a field of the events that passed.",
            histogram=self.messages.Histogram(
                aggregation_temporality=self.messages.AGGREGATION_TEMPORALITY_DELTA,
                data_points=[self.messages.HistogramDataPoint(
                    attributes=self.attributes({**labels, "traceleft.field": field_name}), count=sum(counts.values()),
                    explicit_bounds=self.BOUNDS, bucket_counts=[*(counts.get(to, 0) for to in self.BOUNDS), 0],
                    **window)]))

    BOUNDS = (-1, *((1 << bits) - 1 for bits in range(65)))  # as Histogram.bounds(): the last values of its buckets
    DETAILS: ClassVar[Dict[str, Callable[[Any, Alert, Mapping[str, int], Attributes], Any]]] = {
        "top": top, "histogram": histogram}

    def merge(self, request: Any) -> Any:
        merged = self.request()
        known: Dict[str, Any] = {}  # metrics of the latest resource, by name
        for one in request.resource_metrics:
            if not merged.resource_metrics or merged.resource_metrics[-1].resource != one.resource:
                merged.resource_metrics.append(one)
                known = {metric.name: metric for metric in merged.resource_metrics[-1].scope_metrics[0].metrics}
                continue
            for metric in one.scope_metrics[0].metrics:
                if metric.name not in known:
                    known[metric.name] = merged.resource_metrics[-1].scope_metrics[0].metrics.add()
                    known[metric.name].CopyFrom(metric)
                else:
                    known[metric.name].MergeFrom(self.messages.Metric(**self.points_of(metric)))
        return merged

    def points_of(self, metric: Any) -> Dict[str, Any]:
        """The metric's points, and nothing else of it."""
        kind = metric.WhichOneof("data")
        return {kind: type(getattr(metric, kind))(data_points=getattr(metric, kind).data_points)}


class OtlpLogs(OtlpSignal):
    """Samples as log records."""

    noun = "samples"
    spool_part = "logs"
    signal, service, rejected_field, items = "logs", "LogsService", "rejected_log_records", "log records"

    def prepare(self) -> None:
        super().prepare()
        known = self.messages.LogRecord.DESCRIPTOR.fields_by_name
        self.event_name = {"event_name": "traceleft.sample"} if "event_name" in known else {}  # since OTLP 1.5

    def encode(self, alert: Alert) -> bytes:
        sample, time_ns = alert.sample, int(alert.time * 1e9)
        if sample is None and alert.detail is None:
            return b""
        attributes = {**filter_attributes(alert.filter), "traceleft.count": alert.count, **detail_attributes(alert),
                      **(sample_attributes(sample) if sample is not None else {})}
        body = format_event(sample) if sample is not None else "no sample: there was no room for it"
        record = self.messages.LogRecord(
            time_unix_nano=sample.timestamp_ns if sample is not None else time_ns, observed_time_unix_nano=time_ns,
            severity_number=self.messages.SEVERITY_NUMBER_INFO, attributes=self.attributes(attributes),
            body=self.common.AnyValue(string_value=wire_text(body)), **self.event_name)
        scope = self.messages.ScopeLogs(scope=self.scope, log_records=[record], schema_url=OTLP_SCHEMA)
        data: bytes = self.request(resource_logs=[self.messages.ResourceLogs(
            resource=self.resource, scope_logs=[scope], schema_url=OTLP_SCHEMA)]).SerializeToString()
        return data

    def worth(self, alert: Alert) -> int:
        return 1

    def merge(self, request: Any) -> Any:
        merged = self.request()
        for one in request.resource_logs:
            if not merged.resource_logs or merged.resource_logs[-1].resource != one.resource:
                merged.resource_logs.append(one)
            else:
                merged.resource_logs[-1].scope_logs[0].log_records.extend(one.scope_logs[0].log_records)
        return merged


class OtlpChannel(Channel):
    """Sends an alert's counts as metrics, whose outcome is the alert's, and its sample as a log record."""

    def __init__(self, spec: ChannelSpec, accounts: Mapping[str, Account], insecure: bool = False) -> None:
        super().__init__(spec, accounts)
        self.samples: Dict[str, Account] = {}  # filter -> what became of its samples
        instance = str(uuid.uuid4())
        self.parts = (OtlpMetrics(spec, accounts, insecure, instance),
                      OtlpLogs(spec, self.samples, insecure, instance))

    def problem(self) -> Optional[str]:
        return next(filter(None, (part.problem() for part in self.parts)), None)

    def prepare(self) -> None:
        for part in self.parts:
            part.prepare()

    def weigh(self, alert: Alert) -> int:
        return sum(part.weigh(alert) for part in self.parts)

    def open(self) -> None:
        metrics, logs = self.parts
        metrics.open()
        try:
            logs.open()
        except TraceleftError:
            metrics.close()
            raise

    def moves_to(self, spec: ChannelSpec) -> bool:
        return self.parts[0].moves_to(spec)

    def move(self, spec: ChannelSpec) -> None:
        self.spec = spec
        for part in self.parts:
            part.move(spec)

    def send(self, alert: Alert) -> None:
        self.samples.setdefault(alert.filter.id, Account(alert.filter.id, alert.filter.event))
        for part in self.parts:
            part.send(alert)

    def flush(self) -> None:
        for part in self.parts:
            part.flush()

    def figures(self) -> Dict[str, int]:
        figures = [part.figures() for part in self.parts]
        return {name: sum(part[name] for part in figures) for name in figures[0]}

    def begin_close(self) -> None:
        for part in self.parts:
            part.begin_close()

    def close(self) -> None:
        self.begin_close()
        for part in self.parts:
            part.close()
        causes: Dict[str, int] = collections.Counter()
        for account in self.samples.values():
            for cause, count in account.lost.items():
                causes[cause] += count
        if causes:
            say(f"{escape(self.spec.path)}: samples lost, their counts being accounted for apart: "
                + ", ".join(f"{count} {cause}" for cause, count in sorted(causes.items())))


def make_channel(spec: ChannelSpec, accounts: Mapping[str, Account], insecure: bool) -> Channel:
    if spec.type == "grpc":
        return (OtlpChannel if spec.format == "otlp" else GrpcChannel)(spec, accounts, insecure)
    return (StdoutChannel if spec.path == "-" else FileChannel)(spec, accounts)


# ======================================================================================================================
# Aggregator: events and time in, alerts out
# ======================================================================================================================


class FilterState:
    """One filter at work: the reference model of rule, processing function and output function."""

    def __init__(self, spec: Filter, account: Account, max_groups: int, event_time: bool) -> None:
        self.spec, self.account = spec, account
        self.matches = spec.rule.matcher() if spec.rule is not None else None
        self.processing = PROCESSING[spec.processing](**spec.parameters, max_groups=max_groups, event_time=event_time)
        self.output = OUTPUTS[spec.metrics](**spec.output_parameters)

    def add(self, event: Event) -> None:
        """One event, matched and counted here."""
        if self.matches is not None and not self.matches(event):
            return
        if self.processing.passes(event):
            self.count(1, 1, 0, event)
            self.output.observe(event)
        else:
            self.count(1, 0, 1, None)

    def count(self, matched: int, passed: int, folded: int, sample: Optional[Event]) -> None:
        """Events that have been matched and counted, here or in the kernel."""
        self.account.matched += matched
        self.account.passed += passed
        self.account.folded += folded
        self.output.add(matched, passed, sample)

    def tick(self, now: float, channel: Channel) -> None:
        self.processing.tick()
        lost = self.account.take_unreported()
        alert = self.output.tick(self.spec, now, lost)
        if alert is None:
            self.account.report_later(lost)
        else:
            self.account.alerts += 1
            channel.send(alert)
            if not isinstance(channel, Channel):  # a caller's own: it cannot settle, so taking is delivering
                self.account.deliver(alert.count)


class Aggregator:
    """Runs a spec over events.

    `spec` is a Spec, a spec's JSON value, or the path of one. `channels` maps channel ids to objects with a method
    `send(alert)`; without it the spec's own channels are opened. Without a live kernel:

        aggregator = Aggregator("spec.json", {"1": channel})
        aggregator.add(make_event("open", "/tmp/a.txt", 577, 438, pid=4242))
        aggregator.tick(time.time())  # ends the second: alerts are sent

    `counted_elsewhere` are ids of filters that the kernel matches and counts: their numbers come through
    `states[id].count()` and not through `add()`. With `event_time`, thresholds count by the seconds of the events'
    timestamps and not of the ticks, which come late for events that had to wait in the ring buffer.
    """

    def __init__(self, spec: Union[Spec, Mapping[str, Any], str, os.PathLike[str]],
                 channels: Optional[Mapping[str, Any]] = None, insecure: bool = False,
                 counted_elsewhere: FrozenSet[str] = frozenset(), event_time: bool = False) -> None:
        if not isinstance(spec, Spec):
            spec = parse_spec(spec) if isinstance(spec, Mapping) else load_spec(spec)
        self.spec, self.event_time, self.insecure = spec, event_time, insecure
        self.accounts = {member.id: Account(member.id, member.event) for member in spec.filters}
        self.second: Optional[int] = None
        self.clock_offset_ns = 0
        self.states: Dict[str, FilterState] = {}
        self.by_event: Dict[str, List[FilterState]] = {}
        self.counted_elsewhere = counted_elsewhere
        self.set_filters(spec, counted_elsewhere)
        self.retiring: List[Tuple[FilterState, Any]] = []  # filters of the spec before, and their channels
        self.leaving: List[Any] = []                       # its channels that are not used any more
        self.closing: List[Tuple[Any, threading.Thread]] = []
        self.earlier: Dict[int, List[FilterState]] = {}    # numbers of that spec's streams -> the filters that see them
        self.channels: Dict[str, Any] = dict(channels) if channels is not None else self.open_channels(spec)

    def set_filters(self, spec: Spec, counted_elsewhere: FrozenSet[str]) -> List[FilterState]:
        """Takes the spec's filters; those that are as before, and evaluated where they were, go on. Returns the others
        that were before."""
        before, self.states = self.states, {}
        max_groups = groups_per_filter(spec.filters)
        for member in spec.filters:
            state = before.get(member.id)
            account = self.accounts.setdefault(member.id, Account(member.id, member.event))
            moved = (member.id in counted_elsewhere) != (member.id in self.counted_elsewhere)
            if state is None or moved or not member.counts_as(state.spec):
                state = FilterState(member, account, max_groups, self.event_time)
            state.spec, account.event = member, member.event
            self.states[member.id] = state
        self.counted_elsewhere = counted_elsewhere
        self.by_event = {}
        for state in self.states.values():
            if state.spec.id not in counted_elsewhere:
                self.by_event.setdefault(state.spec.event, []).append(state)
        self.set_clock(self.clock_offset_ns)
        return [state for state in before.values() if state not in self.states.values()]

    def reload(self, spec: Spec, counted_elsewhere: FrozenSet[str], channels: Mapping[str, Any],
               streams: Mapping[int, str]) -> None:
        """Goes on with another spec and its channels, see open_channels().

        Filters that are as before count on, and those of the same id in the same account. `streams`, number -> event,
        are the streams of the spec before: their events are for its filters, until retire().
        """
        self.earlier = {number: self.by_event.get(event, []) for number, event in streams.items()}
        before, self.channels, self.spec = self.channels, dict(channels), spec
        for member in spec.used_channels:
            if isinstance(self.channels[member.id], Channel) and self.channels[member.id].spec != member:
                self.channels[member.id].move(member)
        channel_of = {state.spec.id: before[state.spec.channel] for state in self.states.values()}
        self.retiring = [(state, channel_of[state.spec.id]) for state in self.set_filters(spec, counted_elsewhere)]
        self.leaving = [channel for channel in before.values() if channel not in self.channels.values()]

    def retire(self, now: float) -> None:
        """Ends what only the spec before had: the last of its events has been added."""
        for state, channel in self.retiring:
            state.tick(now, channel)
        self.retiring, self.earlier = [], {}
        self.closing = [(channel, thread) for channel, thread in self.closing if thread.is_alive()]
        for channel in self.leaving:
            getattr(channel, "flush", lambda: None)()
            getattr(channel, "begin_close", lambda: None)()
            closing = start_thread(channel.close)  # which may wait for a collector
            if closing is not None:
                self.closing.append((channel, closing))
            else:
                channel.close()
        self.leaving = []

    def open_channels(self, spec: Spec) -> Dict[str, Any]:
        """The channels that the spec's filters use, those that are open already as they are, also when reload() will
        move them; all, or none is opened and a TraceleftError names every bad one."""
        going_on = self.match_channels(spec.used_channels)
        channels: Dict[str, Any] = {}
        problems, new = [], []
        for member in spec.used_channels:
            channel = going_on.get(member.id) or make_channel(member, self.accounts, self.insecure)
            channels[member.id] = channel
            if member.id not in going_on:
                self.wait_for_spool(member)
                new.append(channel)
                problems.append(channel.problem())
            elif channel.spec != member:  # whose spool is in use already
                problems.append(make_channel(replace(member, spool=None), {}, self.insecure).problem())
        if any(problems):
            raise TraceleftError(*filter(None, problems))
        opened: List[Channel] = []
        for channel in new:
            try:
                channel.open()
            except TraceleftError:
                self.close_channels(opened)
                raise
            opened.append(channel)
        return channels

    def match_channels(self, wanted: Sequence[ChannelSpec]) -> Dict[str, Channel]:
        """Which of the open channels are those that are wanted, or can be moved to be."""
        free = [channel for channel in getattr(self, "channels", {}).values() if isinstance(channel, Channel)]
        matched: Dict[str, Channel] = {}
        is_it: Callable[[Channel, ChannelSpec], bool]
        for is_it in (lambda channel, member: channel.spec == member, lambda channel, member: channel.moves_to(member)):
            for member in wanted:
                found = next((channel for channel in free if is_it(channel, member)), None)
                if member.id not in matched and found is not None:
                    matched[member.id] = found
                    free.remove(found)
        return matched

    def wait_for_spool(self, wanted: ChannelSpec) -> None:
        """Until a channel that another spec has taken away has left the spool, which is after CLOSE_TIMEOUT seconds."""
        for channel, thread in getattr(self, "closing", ()):
            if wanted.spool is not None and channel.spec.spool and channel.spec.spool.dir == wanted.spool.dir:
                thread.join(CLOSE_TIMEOUT + 1.0)

    def close_channels(self, channels: Iterable[Any]) -> None:
        """Closes those of them that are not in use."""
        for channel in channels:
            if channel not in getattr(self, "channels", {}).values():
                channel.close()

    def set_clock(self, offset_ns: int) -> None:
        """Says how far the clock whose seconds count with `event_time` is behind Unix time."""
        self.clock_offset_ns = offset_ns
        for state in self.states.values():
            state.processing.clock_offset_ns = offset_ns

    def add(self, event: Event, stream: int = -1) -> None:
        """One event, for every filter of its type that is not counted elsewhere; `stream` is what it came through."""
        earlier = self.earlier.get(stream) if self.earlier else None
        for state in self.by_event.get(event.name, ()) if earlier is None else earlier:
            state.add(event)

    def tick(self, now: float) -> None:
        """Tells the time, in seconds since the Unix epoch. When a second has ended, its alerts are sent."""
        if int(now // 1) != self.second:
            self.second = int(now // 1)
            self.flush(now)

    def flush(self, now: float) -> None:
        """Ends the current second, whatever the time is."""
        for state in self.states.values():
            state.tick(now, self.channels[state.spec.channel])
        for state, channel in self.retiring:
            state.tick(now, channel)
        for channel in self.channels.values():
            getattr(channel, "flush", lambda: None)()

    def reopen(self) -> None:
        """Channels open their paths again, for what follows."""
        for channel in self.channels.values():
            with contextlib.suppress(OSError):  # it says so when it writes
                getattr(channel, "reopen", lambda: None)()

    @property
    def ended(self) -> bool:
        """Whether a channel has nobody left to write to."""
        return any(getattr(channel, "ended", False) for channel in self.channels.values())

    def close(self) -> None:
        """Delivers what is pending; afterwards the accounting is final."""
        for method in ("begin_close", "close"):  # all channels at once
            for channel in self.channels.values():
                getattr(channel, method, lambda: None)()
        for _, closing in self.closing:
            closing.join()

    def summary(self) -> Dict[str, Any]:
        """The accounting as JSON."""
        return summarize(list(self.accounts.values()))


# ======================================================================================================================
# Selectors: which processes and events are traced
# ======================================================================================================================


@dataclass(frozen=True)
class Selector:
    """`[[PROGRAM_ID:]PID[,PID...]:]EVENT[,EVENT...]`; PID 0 is every process."""

    events: Tuple[str, ...]
    pids: Tuple[int, ...] = (0,)
    program_id: int = 0


def parse_selector(text: str) -> Selector:
    """Raises UsageError."""
    parts = text.split(":")
    if len(parts) > 3 or not all(parts):
        raise UsageError(f"malformed selector '{escape(text)}': expected [[PROGRAM_ID:]PID[,PID...]:]EVENT[,EVENT...], "
                         "as in open,close or 42:1234,1235:read")
    events = tuple(dict.fromkeys(parts[-1].split(",")))
    for name in events:
        find_event(name, f" in selector '{escape(text)}'")
    words = parts[-2].split(",") if len(parts) > 1 else ["0"]
    pids = tuple(parse_number(word, "PID", text, 1 << 22) for word in words)
    program_id = parse_number(parts[0], "PROGRAM_ID", text, (1 << 64) - 1) if len(parts) > 2 else 0
    return Selector(events, pids, program_id)


def find_event(name: str, where: str = "") -> EventType:
    """The event type of that name. Raises UsageError for an unknown one, and HostError as event_type() does."""
    try:
        return event_type(name)
    except KeyError:
        hint = "the process stands before its events, as in 1234:open; " if name.isdigit() else ""
        raise UsageError(f"unknown event '{escape(name)}'{where}{suggest(name.lower(), event_names())}; {hint}"
                         "'traceleft.py events' lists them") from None


def parse_number(word: str, what: str, text: str, most: int) -> int:
    if not re.fullmatch(r"[0-9]{1,20}", word) or int(word) > most:
        raise UsageError(f"malformed selector '{escape(text)}': {what} must be an integer from 0 to {most}, "
                         f"not '{escape(word)}'")
    return int(word)


@dataclass
class Wanted:
    """The processes that one event type is traced for: `pids` maps each to its program id."""

    any_process: bool = False
    program_id: int = 0  # of processes that are not in pids
    pids: Dict[int, int] = field(default_factory=dict)

    def add(self, pid: int, program_id: int, event: str) -> None:
        if pid == 0:
            before = self.program_id if self.any_process else program_id
            self.any_process, self.program_id = True, program_id
        else:
            before = self.pids.setdefault(pid, program_id)
        if before != program_id:
            raise UsageError(f"{event} of {f'process {pid}' if pid else 'every process'} is selected with two program "
                             f"ids, {before} and {program_id}")


def check_process(pid: int) -> None:
    """Raises UsageError when there is no such process."""
    if pid and not os.path.exists(f"/proc/{pid}/task/{pid}"):  # /proc/TID exists too, for threads
        raise UsageError(f"there is no process {pid}")


def plan_selectors(selectors: Sequence[Selector]) -> Dict[str, Wanted]:
    """Event name -> processes. Raises UsageError for contradictions and for processes that do not exist."""
    plan: Dict[str, Wanted] = {}
    for selector in selectors:
        for pid in selector.pids:
            check_process(pid)
            for event in selector.events:
                plan.setdefault(event, Wanted()).add(pid, selector.program_id, event)
    return plan


def plan_spec(spec: Spec, selectors: Sequence[Selector], running: Optional[Mapping[str, Wanted]] = None
              ) -> Dict[str, Wanted]:
    """The spec's events, restricted to the selectors' processes when there are any. Raises UsageError.

    `running` is the plan of the selectors in a run that has begun, whose processes may have ended by now.
    """
    wanted = {member.event for member in spec.filters}
    if not selectors:
        return {name: Wanted(any_process=True) for name in sorted(wanted, key=EVENT_IDS.__getitem__)}
    plan = dict(running) if running is not None else plan_selectors(selectors)
    for name in plan:
        if name not in wanted:
            raise UsageError(f"a selector names '{name}', which no filter of the spec uses; "
                             f"its events: {', '.join(sorted(wanted))}")
    for name in sorted(wanted - set(plan)):
        say(f"warning: no selector names '{name}': its filters will see nothing")
    return plan


# ======================================================================================================================
# libbpf through ctypes
# ======================================================================================================================

# The callbacks and options of libbpf's API. Sources: bpf/libbpf.h of libbpf 1.0, include/uapi/linux/bpf.h
PrintCallback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
SampleCallback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


class BpfObjectOpenOpts(ctypes.Structure):
    """The first members of struct bpf_object_open_opts (bpf/libbpf.h); `sz` tells libbpf that there are no more."""

    _fields_ = [("sz", ctypes.c_size_t), ("object_name", ctypes.c_char_p), ("relaxed_maps", ctypes.c_bool),
                ("pin_root_path", ctypes.c_char_p), ("removed", ctypes.c_uint32), ("kconfig", ctypes.c_char_p),
                ("btf_custom_path", ctypes.c_char_p)]


class BpfTracepointOpts(ctypes.Structure):
    """struct bpf_tracepoint_opts (bpf/libbpf.h)."""

    _fields_ = [("sz", ctypes.c_size_t), ("bpf_cookie", ctypes.c_uint64)]


_pointer, _int, _size, _text = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t, ctypes.c_char_p
PROTOTYPES: Dict[str, Tuple[Any, Tuple[Any, ...]]] = {
    # function                            result    arguments
    "libbpf_major_version":               (ctypes.c_uint32, ()),
    "libbpf_version_string":              (_text,    ()),
    "libbpf_set_print":                   (_pointer, (PrintCallback,)),
    "libbpf_num_possible_cpus":           (_int,     ()),
    "bpf_object__open_mem":               (_pointer, (_pointer, _size, ctypes.POINTER(BpfObjectOpenOpts))),
    "bpf_object__load":                   (_int,     (_pointer,)),
    "bpf_object__close":                  (None,     (_pointer,)),
    "bpf_object__find_program_by_name":   (_pointer, (_pointer, _text)),
    "bpf_object__find_map_by_name":       (_pointer, (_pointer, _text)),
    "bpf_program__fd":                    (_int,     (_pointer,)),
    "bpf_program__set_autoload":          (_int,     (_pointer, ctypes.c_bool)),
    "bpf_program__attach_tracepoint_opts": (_pointer, (_pointer, _text, _text, ctypes.POINTER(BpfTracepointOpts))),
    "bpf_program__attach":                (_pointer, (_pointer,)),
    "bpf_program__attach_iter":           (_pointer, (_pointer, _pointer)),
    "bpf_link__fd":                       (_int,     (_pointer,)),
    "bpf_link__destroy":                  (_int,     (_pointer,)),
    "bpf_iter_create":                    (_int,     (_int,)),
    "bpf_enable_stats":                   (_int,     (_int,)),
    "bpf_map__fd":                        (_int,     (_pointer,)),
    "bpf_map__set_max_entries":           (_int,     (_pointer, ctypes.c_uint32)),
    "bpf_map__set_initial_value":         (_int,     (_pointer, _pointer, _size)),
    "bpf_map__reuse_fd":                  (_int,     (_pointer, _int)),
    "bpf_map_create":                     (_int,     (_int, _text, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_uint32,
                                                      _pointer)),
    "bpf_map_delete_elem":                (_int,     (_int, _pointer)),
    "bpf_map_update_elem":                (_int,     (_int, _pointer, _pointer, ctypes.c_uint64)),
    "bpf_map_lookup_elem":                (_int,     (_int, _pointer, _pointer)),
    "bpf_obj_get_info_by_fd":             (_int,     (_int, _pointer, ctypes.POINTER(ctypes.c_uint32))),
    "ring_buffer__new":                   (_pointer, (_int, SampleCallback, _pointer, _pointer)),
    "ring_buffer__add":                   (_int,     (_pointer, _int, SampleCallback, _pointer)),
    "ring_buffer__epoll_fd":              (_int,     (_pointer,)),
    "ring_buffer__consume":               (_int,     (_pointer,)),
    "ring_buffer__free":                  (None,     (_pointer,)),
}
LIBBPF_NAME = "libbpf.so.1"


@contextlib.contextmanager
def no_signals() -> Iterator[None]:
    """Signals that come to this thread meanwhile are handled afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


MAX_LOG_LINES = 2000


class Libbpf:
    """The system's libbpf: `call()` checks what its functions return, `log` holds its latest lines."""

    def __init__(self, verbose: bool = False) -> None:
        """Raises HostError when the library is missing or too old."""
        install = f"{install_command('libbpf1', 'libbpf')}, or the distribution's package of libbpf 1.0 or later"
        try:
            self.library = ctypes.CDLL(LIBBPF_NAME, use_errno=True)
        except OSError as error:
            raise HostError(f"cannot load {LIBBPF_NAME} ({error}): {install}") from None
        for name, (restype, argtypes) in PROTOTYPES.items():
            try:
                function = getattr(self.library, name)
            except AttributeError:
                raise HostError(f"{LIBBPF_NAME} is too old: it has no {name}; {install}") from None
            function.restype, function.argtypes = restype, argtypes
        self.verbose = verbose
        self.log: Deque[str] = collections.deque(maxlen=MAX_LOG_LINES)
        self.libc = ctypes.CDLL(None)
        self.libc.vsnprintf.argtypes = (ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_void_p)
        self.print_callback = PrintCallback(self.print_line)  # referenced as long as libbpf may call it
        self.library.libbpf_set_print(self.print_callback)

    def print_line(self, level: int, template: bytes, arguments: int) -> int:
        """libbpf's print callback; a va_list is passed on as the pointer that it is on x86_64 and aarch64."""
        # The verifier's log is one message of up to 16 MB, and says why at its end. What a va_list points to is used up
        # by reading it: its size is found with a copy, of 24 bytes on x86_64 and 32 on aarch64.
        size = self.libc.vsnprintf(None, 0, template, ctypes.create_string_buffer(ctypes.string_at(arguments, 32), 32))
        buffer = ctypes.create_string_buffer(max(size, 0) + 1)
        self.libc.vsnprintf(buffer, len(buffer), template, arguments)
        for line in decode_text(buffer.value).splitlines():
            self.log.append(line)
            if self.verbose:
                say(escape(line))
        return 0

    def call(self, name: str, *arguments: Any) -> Any:
        """Calls a function; NULL and negative results raise OSError with the errno that libbpf left."""
        result = getattr(self.library, name)(*arguments)
        if result is None and PROTOTYPES[name][0] is _pointer:
            code = ctypes.get_errno()
            raise OSError(code, f"{name}: {os.strerror(code)}")
        if isinstance(result, int) and result < 0:
            raise OSError(-result, f"{name}: {os.strerror(-result)}")
        return result

    def log_tail(self, count: int = 12) -> str:
        """The log's last lines that say something, each on a line of its own, indented."""
        telling = [line for line in self.log if not line.startswith(("-- ", "processed ")) and line.strip()]
        return "".join(f"\n  {escape(line)}" for line in telling[-count:])


# ======================================================================================================================
# Privileges: what the process may do at the start, and what it keeps once it has attached
# ======================================================================================================================

# include/uapi/linux/capability.h
CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_SETGID, CAP_SETUID, CAP_SETPCAP, CAP_SYS_ADMIN = 1, 2, 6, 7, 8, 21
CAP_PERFMON, CAP_BPF = 38, 39
CAPABILITY_NAMES = {CAP_DAC_OVERRIDE: "CAP_DAC_OVERRIDE", CAP_DAC_READ_SEARCH: "CAP_DAC_READ_SEARCH",
                    CAP_PERFMON: "CAP_PERFMON", CAP_BPF: "CAP_BPF"}
START_CAPABILITIES = (  # what starting may take; those that the process does not have are missed where they are needed
    CAP_BPF, CAP_PERFMON,  # load and attach
    CAP_DAC_READ_SEARCH,   # tracefs, for a user other than root
    CAP_SYS_ADMIN,         # mount tracefs
    CAP_SETPCAP)           # empty the bounding set
CAPABILITY_HEADER = struct.pack("=Ii", 0x20080522, 0)  # struct __user_cap_header_struct: version 3, this thread
PR_SET_KEEPCAPS, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 8, 24, 38  # include/uapi/linux/prctl.h
PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
BPF_WITHOUT_CAPABILITY = (5, 19)  # before, with unprivileged BPF disabled, even the figures of a program took CAP_BPF
SYS_FACCESSAT2, AT_EACCESS = 439, 0x200  # on every architecture; before 2.33 glibc guesses, for root always yes


def libc_call(name: str, *arguments: Any) -> int:
    """Calls a function of libc with integers and bytes. Raises OSError."""
    function = getattr(ctypes.CDLL(None, use_errno=True), name)
    result = function(*(ctypes.c_ulong(argument) if isinstance(argument, int) else argument for argument in arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return int(result)


def capability_set(name: str) -> int:
    """A bit mask of /proc/self/status: CapEff, CapPrm, …"""
    match = re.search(rf"^{name}:\s*([0-9a-f]+)", Path("/proc/self/status").read_text(), re.M)
    return int(match[1], 16) if match else 0


def set_capabilities(effective: Iterable[int], permitted: Optional[Iterable[int]] = None) -> None:
    """Sets this thread's capabilities, of those that it has; no program that it executes inherits any.

    `permitted`, which it may make effective again: without it the effective ones. Raises OSError.
    """
    have = capability_set("CapPrm")
    masks = [sum(1 << bit for bit in set(bits)) & have
             for bits in (effective, effective if permitted is None else permitted)]
    words = [mask >> half & 0xFFFF_FFFF for half in (0, 32) for mask in (*masks, 0)]  # struct __user_cap_data_struct
    libc_call("capset", CAPABILITY_HEADER, struct.pack("=6I", *words))


def may_access(path: str, mode: int) -> bool:
    """Whether the effective user and capabilities allow it (os.R_OK, …)."""
    try:
        return libc_call("syscall", SYS_FACCESSAT2, AT_FDCWD, os.fsencode(path), mode, AT_EACCESS) == 0
    except OSError:
        return False


def become_user(name: str) -> None:
    """Takes on a user's ids and groups, and keeps what starting takes. Raises UsageError and HostError."""
    try:
        user = importlib.import_module("pwd").getpwnam(name)
    except (KeyError, ValueError):
        raise UsageError(f"--user: there is no user '{escape(name)}'") from None
    if (os.getresuid(), os.getresgid()) == ((user.pw_uid,) * 3, (user.pw_gid,) * 3):
        return
    try:
        libc_call("prctl", PR_SET_KEEPCAPS, 1, 0, 0, 0)
        os.setgroups(os.getgrouplist(name, user.pw_gid))
        os.setresgid(user.pw_gid, user.pw_gid, user.pw_gid)
        os.setresuid(user.pw_uid, user.pw_uid, user.pw_uid)
        set_capabilities(START_CAPABILITIES)
    except OSError as error:
        raise HostError(f"cannot become user '{escape(name)}' ({error.strerror}): --user takes CAP_SETUID and "
                        "CAP_SETGID, which root has") from None


class Reopened(NamedTuple):
    """A path that is opened again during the run."""

    path: str
    mode: int  # os.R_OK or os.W_OK
    why: str

    @property
    def capability(self) -> int:
        return CAP_DAC_OVERRIDE if self.mode & os.W_OK else CAP_DAC_READ_SEARCH

    def allowed(self) -> bool:
        """Whether it takes no capability. To write is to create it again, too: after a rotation it is gone."""
        folder = os.path.dirname(os.path.abspath(self.path))
        if not may_access(folder, os.X_OK):
            return False
        if os.path.exists(self.path) and not may_access(self.path, self.mode):
            return False
        special = os.path.exists(self.path) and not os.path.isfile(self.path)  # is not rotated
        return not self.mode & os.W_OK or special or may_access(folder, os.W_OK)


def drop_privileges(reloads: bool, reopened: Sequence[Reopened] = ()) -> List[int]:
    """Gives up, for good, every capability that the rest of the run does not need, and the way to get new ones.

    What is needed is found out: to load again, with `reloads`, and what access to the paths takes, which is said.
    Returns what is kept. Capabilities are a thread's: this is for the one that calls it, and those that it starts
    later. Raises HostError.
    """
    kept = [CAP_BPF, CAP_PERFMON] if reloads else [CAP_BPF] if kernel_version() < BPF_WITHOUT_CAPABILITY else []
    try:
        for path in reopened:
            set_capabilities([*kept, CAP_SETPCAP], range(64))  # those that are tried to do without can be taken back
            if not path.allowed() and capability_set("CapPrm") >> path.capability & 1:
                kept.append(path.capability)
                say(f"keeps {CAPABILITY_NAMES[path.capability]}: {path.why}")
        empty_bounding_set()
        libc_call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        libc_call("prctl", PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
        set_capabilities(kept)
    except OSError as error:
        raise HostError(f"cannot give up privileges: {error.strerror}") from None
    return kept


def empty_bounding_set() -> None:
    """Of those that programs which it executes can have. Without CAP_SETPCAP it stays: no_new_privs means the same."""
    if capability_set("CapEff") >> CAP_SETPCAP & 1:
        for capability in range(64):
            if capability_set("CapBnd") >> capability & 1:
                libc_call("prctl", PR_CAPBSET_DROP, capability, 0, 0, 0)


# ======================================================================================================================
# Tracer: loads, attaches and reads the kernel side
# ======================================================================================================================

BTF_PATH = "/sys/kernel/btf/vmlinux"
# aarch64's compiler of BPF has atomics that return the old value only since 5.18: commit 1902472b4fa9
MIN_KERNEL = (5, 18) if platform.machine() == "aarch64" else (5, 15)
STREAM_RING_BYTES = 64 << 20   # where events are streamed: a burst of 170,000 records of short paths
SAMPLE_RING_BYTES = 1 << 20    # for samples: those of a second, of 1,000 filters and 800-byte paths
BATCH = 4096                   # records read at once: between two batches the loop sees signals and the time
DRAIN_TIMEOUT = 1.0            # seconds for programs that were running at the time of the detach to finish

# struct source, struct argument, struct class_event, struct syscall_rows, struct filter_counts, the read-only settings,
# struct run and the enums in bpf/traceleft.h and bpf/traceleft.bpf.c; a test compares them with the object's BTF
ARGUMENT = struct.Struct("=BBB5xQ")
SOURCE = struct.Struct("=HBBBBB2sB2xIQ")
CLASS_EVENT = struct.Struct("=QII")
PROCESS = struct.Struct("=I4xQQ")
SYSCALL_ROWS = struct.Struct("=HH")
FILTER_COUNTS = struct.Struct("=QQQQQ24x")
FILTER_STATE = struct.Struct("=16sII40x")
GROUP_KEY_SIZE = GROUP_SIZE = 16
MATCHER_SIZE = MATCHER.size + MAX_DIMENSIONS * DIMENSION.size
SETTINGS = struct.Struct("=IIQQIIII")
RUN = struct.Struct("=III4xQQQQ")
BPF_MAP_TYPE_HASH = 1  # include/uapi/linux/bpf.h
SYS_MEMBARRIER, MEMBARRIER_CMD_GLOBAL = {"x86_64": 324, "aarch64": 283}, 1  # include/uapi/linux/membarrier.h
RECORD_TAG = struct.Struct("=II")  # filter and tick in struct event_header
RECORD_TAG_OFFSET = HEADER.size - 16 - RECORD_TAG.size
SOURCE_ANY_PROCESS, SOURCE_BY_PROCESS, SOURCE_AT_ENTRY, SOURCE_NO_RETURN = 1, 2, 4, 8
PATH_NONE, PATH_FD, PATH_AT, PATH_RETURN, PATH_EXE = range(5)
DFD_CWD = 255
TCP_EVENTS = ("connect", "accept", "close")  # enum tcp_event: with _v4, then with _v6
MAX_SYSCALLS = 1024
MAX_PROCESSES = 65536
MAX_CLASSES = 256              # sets of processes that are traced alike
MAX_PENDING = 1024             # calls between entry and exit, of those that are read at entry
MAX_SOCKETS = 65536            # TCP connections whose owner is known
URING_OPCODES = 256
WAKEUP_BYTES = 64 << 10
PROG_INFO_SIZE = 232             # struct bpf_prog_info up to verified_insns, include/uapi/linux/bpf.h
LINK_INFO_SIZE = 64              # more than the members that all kinds of struct bpf_link_info have
PROG_INFO_RUN_TIME, PROG_INFO_RUN_COUNT, PROG_INFO_RECURSION_MISSES, PROG_INFO_VERIFIED_INSNS = 192, 200, 208, 216

PROC_PID_INIT_INO, PROC_USER_INIT_INO = 0xEFFFFFFC, 0xEFFFFFFD  # inodes of the initial ones, include/linux/proc_ns.h


def kernel_version() -> Tuple[int, int]:
    """(6, 18) for 6.18.44-generic; (0, 0) for what is no version."""
    match = re.match(r"(\d+)\.(\d+)", platform.release())
    return (int(match[1]), int(match[2])) if match else (0, 0)


def lacks_proc() -> str:
    return "" if os.path.exists("/proc/self/status") else "/proc is not mounted: mount -t proc proc /proc"


def lacks_privilege() -> str:
    capabilities = capability_set("CapEff")
    if capabilities >> CAP_SYS_ADMIN & 1:
        return ""
    missing = [name for name, bit in (("CAP_BPF", CAP_BPF), ("CAP_PERFMON", CAP_PERFMON))
               if not capabilities >> bit & 1]
    how = f", as in sudo {sys.argv[0]}" if shutil.which("sudo") else ""
    return f"missing privilege {' and '.join(missing)}: run it as root{how}" if missing else ""


def lacks_initial_namespace() -> str:
    if os.stat("/proc/self/ns/pid").st_ino == PROC_PID_INIT_INO:
        return ""
    return ("this is not the initial pid namespace, whose PIDs the kernel side sees: run it on the host itself, or in "
            "a container with the host's pid namespace (docker run --pid=host)")


def lacks_initial_users() -> str:
    if os.stat("/proc/self/ns/user").st_ino == PROC_USER_INIT_INO:
        return ""
    return ("this is not the initial user namespace, whose capabilities alone let load BPF programs: run it on the "
            "host itself, or in a privileged container without a user namespace")


def lacks_architecture() -> str:
    if platform.machine() in ARCHITECTURES and struct.calcsize("P") == 8:
        return ""
    return f"a 64-bit Python on {' or '.join(ARCHITECTURES)} is needed; this is {struct.calcsize('P') * 8}-bit on " \
           f"{platform.machine()}"


def lacks_kernel() -> str:
    if kernel_version() >= MIN_KERNEL or kernel_version() == (0, 0):
        return ""
    return f"kernel {platform.release()} is too old: it needs {'.'.join(map(str, MIN_KERNEL))} or later on " \
           f"{platform.machine()}"


def lacks_btf() -> str:
    if os.path.exists(BTF_PATH):
        return ""
    return f"this kernel has no BTF ({BTF_PATH} is missing): boot one built with CONFIG_DEBUG_INFO_BTF"


def lacks_access() -> str:
    return "" if lockdown() != "confidentiality" else (
        "this kernel is locked down (confidentiality), and lets no BPF program read its memory: boot it with "
        "lockdown=integrity or less")


def lockdown() -> str:
    """The kernel's lockdown mode, `none` among them; empty where securityfs does not tell."""
    try:
        match = re.search(r"\[(\w+)\]", Path("/sys/kernel/security/lockdown").read_text())
    except OSError:
        return ""
    return match[1] if match else ""


# What a host has to have before anything is loaded: each returns what is missing and what to do, or nothing
HOST_CHECKS: Dict[str, Callable[[], str]] = {
    "proc": lacks_proc, "privilege": lacks_privilege, "user namespace": lacks_initial_users,
    "pid namespace": lacks_initial_namespace, "architecture": lacks_architecture,
    "kernel": lacks_kernel, "BTF": lacks_btf, "lockdown": lacks_access,
}


def check_host() -> None:
    """Raises HostError when this host or this user cannot load the object, saying what is missing."""
    for lacks in HOST_CHECKS.values():
        missing = lacks()
        if missing:
            raise HostError(missing)


def mounted_tracefs() -> str:
    """The path of tracefs, which is mounted when it is not yet. Raises HostError."""
    for path in TRACEFS_PATHS:
        if os.path.isdir(f"{path}/events/syscalls"):
            return path
    path = TRACEFS_PATHS[0]
    if os.path.ismount(path) and not os.access(path, os.R_OK | os.X_OK):
        raise HostError(f"{path} cannot be read by this user: run it as root, or with CAP_DAC_READ_SEARCH too")
    libc = ctypes.CDLL(None, use_errno=True)
    nosuid_nodev_noexec = 2 | 4 | 8  # MS_NOSUID, MS_NODEV, MS_NOEXEC in include/uapi/linux/mount.h
    if libc.mount(b"tracefs", path.encode(), b"tracefs", ctypes.c_ulong(nosuid_nodev_noexec), None) < 0:
        raise HostError(f"cannot mount tracefs, which takes CAP_SYS_ADMIN: {os.strerror(ctypes.get_errno())}; "
                        f"mount it: mount -t tracefs tracefs {path}")
    if not os.path.isdir(f"{path}/events/syscalls"):
        raise HostError("this kernel has no syscall tracepoints: it needs one built with CONFIG_FTRACE_SYSCALLS")
    return path


class Source(NamedTuple):
    """One row of the kernel's table `sources`: a syscall, or for None a connection's change, that becomes an event."""

    event: EventType
    syscall: Optional[Syscall]
    wanted: Wanted

    @property
    def at_entry(self) -> bool:
        """Whether its arguments are read at the syscall's entry."""
        return "entry" in self.event.traits

    @property
    def silent(self) -> bool:
        """Whether the event happens at the syscall's entry."""
        return "silent" in self.event.traits

    def place(self) -> Tuple[str, bool, bool]:
        """What the rows have in common that one attachment serves."""
        return self.syscall.name if self.syscall else "", self.at_entry, self.silent

    def pack(self) -> bytes:
        """struct source."""
        flags = ((SOURCE_ANY_PROCESS if self.wanted.any_process else 0)
                 | (SOURCE_BY_PROCESS if self.wanted.pids else 0)
                 | (SOURCE_AT_ENTRY if self.at_entry else 0) | (SOURCE_NO_RETURN if self.silent else 0))
        files = bytes([*self.event.descriptors, MAX_ARGS, MAX_ARGS][:MAX_FILES])
        register, value = (self.syscall and self.syscall.condition) or (MAX_ARGS, 0)
        only_fdcwd = sum(1 << number for number in self.syscall.only_fdcwd) if self.syscall else 0
        packed = SOURCE.pack(EVENT_IDS[self.event.name], flags, only_fdcwd, *self.path_source(), files, register, value,
                             self.wanted.program_id)
        for index in range(MAX_ARGS):
            packed += self.pack_argument(index) if self.syscall and index < len(self.event.arguments) else \
                ARGUMENT.pack(0, 0, 0, 0)
        return packed

    def path_source(self) -> Tuple[int, int, int]:
        """enum path_kind, its argument, and the register of the directory's descriptor."""
        argument = self.event.path_argument
        if argument is None or self.syscall is None:
            return PATH_NONE, 0, DFD_CWD
        arguments = self.event.arguments
        if arguments[argument].type_name != "path":
            return PATH_FD, argument, DFD_CWD
        dfd = DFD_CWD if self.syscall.dfd is None else self.syscall.dfd
        if argument and arguments[argument - 1].type_name == "dfd":
            dfd = int(self.syscall.sources[argument - 1])
        traits = self.event.traits
        return PATH_RETURN if "opens" in traits else PATH_EXE if "exec" in traits else PATH_AT, argument, dfd

    def pack_argument(self, index: int) -> bytes:
        """struct argument, from the event's type of the argument and the syscall's place of it."""
        assert self.syscall is not None
        place, kind = self.syscall.sources[index], self.event.arguments[index].type
        if place.startswith("="):
            return ARGUMENT.pack(KIND_CONSTANT, 0, 64, int(place[1:]))
        if place.startswith("*"):
            register, offset = place[1:].split("+")
            return ARGUMENT.pack(KIND_MEMORY, int(register), 64, int(offset))
        length_register = int(self.syscall.sources[index + 1]) if kind.kind == KIND_BUFFER_IN else 0
        return ARGUMENT.pack(kind.kind, int(place), kind.bits, length_register)


def plan_sources(plan: Mapping[str, Wanted], tracefs: str) -> List[Source]:
    """What to listen to. Raises HostError for an event that this kernel cannot give."""
    sources: List[Source] = []
    for name, wanted in plan.items():
        event, before = EVENT_TYPES[name], len(sources)
        missing: List[str] = []
        for syscall in syscalls_here(event):
            if os.path.isdir(f"{tracefs}/events/syscalls/sys_exit_{syscall.tracepoint}"):
                sources.append(Source(event, syscall, wanted))
            else:
                missing.append(syscall.tracepoint)
        if event.is_tcp:
            sources.append(Source(event, None, wanted))
        elif len(sources) == before:
            raise HostError(f"event '{name}': this kernel has no tracepoint "
                            f"{' or '.join(f'syscalls/sys_exit_{word}' for word in missing) or 'for it'}")
    # the rows that one attachment serves are neighbours: struct syscall_rows
    return sorted(sources, key=Source.place)


# How many of a host's syscalls are of this name, in percent, roughly: of the mean of a web server, a database, a
# compiler and a shell. Only the sum of those that a spec names matters, and on which side of BUSY_SHARE it lies.
TYPICAL_SHARES = {
    "read": 14, "write": 8, "futex": 14, "close": 7, "openat": 6, "epoll_wait": 5, "recvfrom": 5, "sendto": 4,
    "mmap": 4, "fstat": 4, "newfstatat": 4, "lseek": 3, "rt_sigaction": 3, "rt_sigprocmask": 3, "fcntl": 2, "ioctl": 2,
    "poll": 2, "munmap": 2, "mprotect": 2, "pread64": 2, "writev": 2, "getdents64": 1, "access": 1, "brk": 1,
}
BUSY_SHARE = 24  # percent, measured in bench/: above it one program for all costs less than one for each that is named


def typical_share(sources: Iterable[Source]) -> int:
    """The share of a typical host's syscalls that are listened to, in percent."""
    return sum(TYPICAL_SHARES.get(name, 0) for name in {source.syscall.name for source in sources if source.syscall})


def sees_all_syscalls(sources: Sequence[Source]) -> bool:
    """Whether one BTF tracepoint at every syscall's exit is to be used, and not one tracepoint for each syscall."""
    return typical_share(sources) > BUSY_SHARE and all(
        source.syscall is None or source.silent or syscall_number(source.syscall.name) is not None
        for source in sources)


class Attachment(NamedTuple):
    """A program and where it is attached."""

    program: str
    category: str = ""  # of the tracepoint; empty: as the program's section says
    name: str = ""
    cookie: int = 0

    @property
    def place(self) -> str:
        return f"{self.category}/{self.name}" if self.category else BTF_PROGRAMS[self.program]


BTF_PROGRAMS = {
    # program that is attached -> the BTF tracepoint that its section names
    "every_sys_exit": "tp_btf/sys_exit", "tcp_state": "tp_btf/inet_sock_set_state",
    "follow_fork": "tp_btf/sched_process_fork", "forget_process": "tp_btf/sched_process_free",
    "new_program": "tp_btf/sched_process_exec",
}
GATES: Dict[str, Tuple[str, int]] = {
    # program that is attached -> table of programs and, there, twice the place of the program behind it, on_NAME
    "sys_exit": ("tracepoints", 0), "sys_enter": ("tracepoints", 1), "tcp_accept": ("tracepoints", 2),
    "every_sys_exit": ("every_exits", 0), "new_program": ("new_programs", 0), "tcp_state": ("tcp_states", 0),
}
PROGRAMS = (*GATES, *(f"on_{name}" for name in GATES), "follow_fork", "forget_process", "uring_submit", "tcp_owners",
            "feed")
# Maps that a new generation takes over: those that both need, with what the programs remember of calls and connections,
# and those that hold the counts and what belongs to the run
TAKEN_OVER_IF_USED = ("events", "pending", "pending_long", "sockets")
TAKEN_OVER = (".bss", "filter_states", "filter_counts", "groups", "processes", "classes", "uring", "scratch", "samples",
              *dict.fromkeys(table for table, _ in GATES.values()))
SPARE_FILTERS = 512            # numbers for the filters of new specs, beside twice those of the first
URING_TRACEPOINTS = ("io_uring_submit_req", "io_uring_submit_sqe")  # since Linux 6.4, and before


def field_offset(path: str, name: str) -> Optional[int]:
    """Where a field of a tracepoint's record is, by its format file; None where either is not there."""
    try:
        match = re.search(rf"\b{name};\s*offset:(\d+);", Path(path).read_text())
    except OSError:
        return None
    return int(match[1]) if match else None


class FilterCounts(NamedTuple):
    """struct filter_counts, summed over the CPUs."""

    matched: int
    passed: int
    folded: int
    submitted: int  # records that the kernel put into the ring buffer
    ring_full: int  # records that did not fit


class Histograms:
    """Reads struct histogram of each CPU and filter: `mapped` is the kernel side's array."""

    def __init__(self, mapped: mmap.mmap, tables: Tables) -> None:
        self.mapped, self.tables = mapped, tables
        self.before: Dict[str, Tuple[int, ...]] = {}

    def read(self, member: Filter, ended: int) -> Dict[int, int]:
        """Bucket -> events since the last call."""
        # as native 64-bit words: each is read at once, while the kernel side counts on
        words = memoryview(self.mapped).cast("Q").tolist()
        each, count = HISTOGRAM.size // 8, self.tables.output_counts[OUTPUT_HISTOGRAM]
        first = self.tables.output_places[member.id] * each
        now = tuple(sum(words[first + bucket::count * each]) for bucket in range(BUCKETS))
        before, self.before[member.id] = self.before.get(member.id, (0,) * BUCKETS), now
        return {bucket: new - old for bucket, (new, old) in enumerate(zip(now, before)) if new != old}

    def close(self) -> None:
        self.mapped.close()


class Tops:
    """Reads struct top_slot of each filter: in two tables, of the tick that is counted in and of the one that ended."""

    def __init__(self, mapped: mmap.mmap, tables: Tables) -> None:
        self.mapped, self.tables = mapped, tables
        self.read_before: Dict[Tuple[str, int], Dict[Any, int]] = {}  # filter and table -> what has been read of it
        self.late: Dict[str, Dict[Any, int]] = {}

    def read(self, member: Filter, ended: int) -> Dict[Tuple[Value, ...], int]:
        """Group -> events of the tick that has ended, and those that were late for the tick before it."""
        found = self.table(member, ended & 1)
        self.read_before[member.id, ended & 1] = found
        counts = collections.Counter(self.late.pop(member.id, {}))
        counts.update(found)
        return counts

    def clear(self, tick: int) -> None:
        """Makes room for a tick that begins. What was counted too late for the tick that had the table is kept."""
        for member in (self.tables.filters[number].spec for number in self.tables.live):
            if member is None or member.packed_output.output != OUTPUT_TOP:
                continue
            late = collections.Counter(self.table(member, tick & 1))
            late.subtract(self.read_before.pop((member.id, tick & 1), {}))
            self.late[member.id] = dict(+late)
            begin, end = self.place(member, tick & 1)
            self.mapped[begin:end] = bytes(end - begin)

    def place(self, member: Filter, table: int) -> Tuple[int, int]:
        size = TOP_TABLE * TOP_SLOT.size
        begin = (2 * self.tables.output_places[member.id] + table) * size
        return begin, begin + size

    def table(self, member: Filter, table: int) -> Dict[Tuple[Value, ...], int]:
        found: Dict[Tuple[Value, ...], int] = collections.Counter()
        begin, end = self.place(member, table)
        for hash_, count, *parts in TOP_SLOT.iter_unpack(self.mapped[begin:end]):
            if count:
                found[self.group(member, parts) if hash_ else OTHER] += count
        return found

    @staticmethod
    def group(member: Filter, parts: List[Any]) -> Tuple[Value, ...]:
        """The values of a group from the members of struct top_field; texts are cut."""
        values: List[Value] = []
        for shown in member.packed_output.fields:
            number, text, *parts = parts
            if shown.is_text:
                values.append(decode_text(text[:min(number, TOP_TEXT - 1)]))
            elif shown.address_bits > 64:
                low, _, *parts = parts
                values.append(number << 64 | low)
            else:
                values.append(number - (1 << 64) if shown.is_signed and number >> 63 else number)
        return tuple(values)

    def close(self) -> None:
        self.mapped.close()


class Tracer:
    """Yields the events of a live kernel.

    `selectors` are texts such as "open,close" or "42:1234:read", Selectors, or a plan from plan_spec(). A context
    manager: entering loads and attaches, leaving detaches. Needs root. Raises UsageError for a bad selector and
    HostError when the host cannot do it:

        with Tracer("open,close") as tracer:
            for event in tracer:
                print(format_event(event))

    The process that traces is left out, unless a selector names its PID. With `tables` only the events that their
    filters stream are yielded; the others are counted in the kernel, see read_counts() and take_sample(). With `follow`
    the children of the processes that the selectors name are traced like them. `see_all` chooses between one program at
    every syscall's exit and one for each syscall; None: as explain says. reload() changes the tables while it traces,
    with up to `spare_filters` filters more; `previous` is for its use.
    """

    def __init__(self, selectors: Union[str, Iterable[Union[str, Selector]], Mapping[str, Wanted]],
                 tables: Optional[Tables] = None, ring_bytes: Optional[int] = None, verbose: bool = False,
                 follow: bool = False, see_all: Optional[bool] = None, spare_filters: int = 0,
                 previous: "Optional[Tracer]" = None) -> None:
        if isinstance(selectors, Mapping):
            self.plan = dict(selectors)
        else:
            texts = selectors.split() if isinstance(selectors, str) else selectors
            self.plan = plan_selectors([parse_selector(s) if isinstance(s, str) else s for s in texts])
        self.tables = tables if tables is not None else Tables((), self.plan)
        self.previous = previous
        self.streams = any(member.spec is None for member in self.tables.filters if member is not UNUSED)
        self.samples_expected = any(member.spec is not None for member in self.tables.filters)
        self.ring_bytes = ring_bytes or (STREAM_RING_BYTES if self.streams else os.sysconf("SC_PAGE_SIZE"))
        self.sample_ring_bytes = min(ring_bytes or SAMPLE_RING_BYTES, SAMPLE_RING_BYTES)
        self.ring_bytes_given = ring_bytes
        if previous is not None:  # it can only grow: records may be in it
            self.ring_bytes = max(self.ring_bytes, previous.ring_bytes)
        self.verbose, self.follow, self.see_all = verbose, follow, see_all
        self.attached: List[Attachment] = []
        self.classes: Dict[Tuple[Tuple[str, int], ...], int] = {}  # (event, program id) of a process -> its class
        self.tick = 1          # tags samples: each filter takes one a tick
        self.samples: Dict[int, List[Tuple[int, Event]]] = {}  # filter -> (tick, sample), at most two
        self.records: List[bytes] = []
        self.consumed = 0      # records read so far
        self.more = False      # the last poll() left records in the ring
        self.held: Deque[bytes] = collections.deque()  # streamed records that have been read and not yet evaluated
        self.object: Any = None
        self.ring: Any = None
        self.run: Any = None   # struct run, mapped
        self.counts: Any = None  # struct filter_counts of each CPU and filter, mapped
        self.histograms: Any = None
        self.tops: Any = None
        self.rings: Dict[str, Any] = {}  # the ring buffers' consumer and producer positions, mapped
        self.states: Any = None  # struct filter_state of each filter, mapped
        self.generation: int = previous.generation + 1 if previous else 0
        self.sizes: Dict[str, int] = {}  # entries of maps
        self.links: Dict[Attachment, Tuple[Any, int]] = {}  # -> struct bpf_link, descriptor of the program
        self.linked: Dict[Attachment, Optional[int]] = {}   # -> id of the program that the kernel says the link has
        self.program_fds: Dict[int, str] = {}  # programs that are attached: those of earlier generations may be, too
        self.misses_before = 0  # of programs that are no more
        self.submitted_before = self.lost_samples_before = 0  # of filters that are no more
        self.last_outputs: Dict[int, Mapping[Any, int]] = {}  # filter -> what read_output() missed of the tables before
        self.retiring_streams: Dict[int, str] = {}  # number -> event, of the tables before
        self.event_types: int = previous.event_types if previous else len(EVENT_NAMES)  # of `classes`, for each class
        self.max_filters: int = previous.max_filters if previous else len(self.tables.filters) + spare_filters
        self.clock_offset_ns = 0
        self.callback_error: Optional[BaseException] = None
        self.sample_callback = SampleCallback(self.take_record)  # referenced as long as libbpf may call it

    def __enter__(self) -> "Tracer":
        try:
            self.load()
            self.attach()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Event]:
        """Every event until detach(); blocks while there is none."""
        while self.links or self.more:
            events = self.poll()
            yield from events
            if not events and self.links:
                self.wait(POLL_INTERVAL)

    def load(self) -> None:
        """Opens and loads the object and fills its tables; nothing is attached yet."""
        check_host()
        self.bpf: Libbpf = self.previous.bpf if self.previous else Libbpf(self.verbose)
        self.tracefs = mounted_tracefs()
        self.sources = plan_sources(self.plan, self.tracefs)
        self.sees_all = sees_all_syscalls(self.sources) if self.see_all is None else self.see_all
        self.object_bytes = read_object()
        # Named as if it was not the kernel's own, its BTF is not looked for in modules too: that takes CAP_SYS_ADMIN
        options = BpfObjectOpenOpts(ctypes.sizeof(BpfObjectOpenOpts), b"traceleft", btf_custom_path=BTF_PATH.encode())
        try:
            self.object = self.bpf.call("bpf_object__open_mem", self.object_bytes, len(self.object_bytes),
                                        ctypes.byref(options))
        except OSError as error:
            raise HostError(f"{OBJECT_PATH} is not a usable BPF object ({error.strerror}): copy it again"
                            f"{self.bpf.log_tail(3)}") from None
        try:
            self.configure()
            with no_signals():  # the verifier gives up for one
                self.bpf.call("bpf_object__load", self.object)
        except OSError as error:
            raise HostError(f"the kernel refused the BPF object ({error.strerror}){load_hint(error)}"
                            f"{self.bpf.log_tail()}") from None
        self.run = mmap.mmap(self.map_fd(".bss"), mmap.PAGESIZE)  # struct run
        self.counts = self.mapped("filter_counts", self.max_filters * self.cpus * FILTER_COUNTS.size)
        self.states = self.mapped("filter_states", self.max_filters * FILTER_STATE.size)
        self.histograms = Histograms(self.mapped("histograms", self.sizes["histograms"] * HISTOGRAM.size), self.tables)
        self.tops = Tops(self.mapped("tops", self.sizes["tops"] * TOP_SLOT.size), self.tables)
        if hasattr(self.bpf.libc, "malloc_trim"):  # musl has none
            self.bpf.libc.malloc_trim(0)  # libbpf has read the kernel's BTF: 5 to 10 MB that it needs no more
        self.fill_tables()
        if self.previous is None:
            self.open_gates()
            self.open_ring()

    def mapped(self, name: str, size: int) -> mmap.mmap:
        """A map of the kernel side as memory."""
        return mmap.mmap(self.map_fd(name), -(-max(size, 1) // mmap.PAGESIZE) * mmap.PAGESIZE)

    def attachments(self) -> List[Attachment]:
        """What will be attached, in this order."""
        found = []
        for _, (source, *_) in ((place, list(rows)) for place, rows in itertools.groupby(self.sources, Source.place)):
            cookie = self.syscall_place(source.syscall) if source.syscall else 0
            numbered = source.syscall is not None and syscall_number(source.syscall.name) is not None
            if source.syscall is not None and (source.at_entry or source.silent):
                found.append(Attachment("sys_enter", "syscalls", f"sys_enter_{source.syscall.tracepoint}", cookie))
            if source.syscall is not None and not source.silent and not (
                    self.sees_all and numbered):
                found.append(Attachment("sys_exit", "syscalls", f"sys_exit_{source.syscall.tracepoint}", cookie))
        if self.sees_all:
            found.append(Attachment("every_sys_exit"))
        if any("exec" in source.event.traits for source in self.sources):
            found.append(Attachment("new_program"))
        if any(source.event.is_tcp for source in self.sources):
            found.append(Attachment("tcp_state"))
            found += [Attachment("tcp_accept", "syscalls", f"sys_exit_{name}") for name in ("accept", "accept4")
                      if os.path.isdir(f"{self.tracefs}/events/syscalls/sys_exit_{name}")]
        if self.follow:
            found.append(Attachment("follow_fork"))
        if self.follow or any(wanted.pids for wanted in self.plan.values()):
            found.append(Attachment("forget_process"))
        for name in URING_TRACEPOINTS:
            offset = field_offset(f"{self.tracefs}/events/io_uring/{name}/format", "opcode")
            if offset is not None:
                found.append(Attachment("uring_submit", "io_uring", name, offset))
        return list(dict.fromkeys(found))

    def configure(self) -> None:
        """What has to be set between opening and loading."""
        own_pid = 0 if any(os.getpid() in wanted.pids for wanted in self.plan.values()) else os.getpid()
        self.cpus: int = self.bpf.call("libbpf_num_possible_cpus")
        texts = self.tables.text_table()
        settings = SETTINGS.pack(own_pid, WAKEUP_BYTES, *self.tables.seeds, self.event_types, self.cpus,
                                 self.tables.output_counts[OUTPUT_HISTOGRAM], len(texts) - 1)
        self.bpf.call("bpf_map__set_initial_value", self.map(".rodata"), settings, len(settings))
        self.attached = self.attachments()
        needed = {attachment.program for attachment in self.attached}
        needed |= {f"on_{name}" for name in needed & set(GATES)} | ({"tcp_owners"} if "tcp_state" in needed else set())
        for name in PROGRAMS:
            self.bpf.call("bpf_program__set_autoload", self.program(name), name in needed)
        for name, entries in self.map_sizes(needed, len(texts)).items():
            self.bpf.call("bpf_map__set_max_entries", self.map(name), max(entries, 1))
        for name in self.taken_over():
            assert self.previous is not None
            self.bpf.call("bpf_map__reuse_fd", self.map(name), self.previous.map_fd(name))

    def map_sizes(self, needed: Set[str], texts: int) -> Dict[str, int]:
        """Map -> its entries, for these programs and a table of so many texts."""
        tables, by_process = self.tables, "forget_process" in needed
        pending = MAX_PENDING if any(source.at_entry for source in self.sources) else 1
        self.sizes = {
            "events": self.ring_bytes, "samples": self.sample_ring_bytes, "sources": len(self.sources),
            "processes": MAX_PROCESSES if by_process else 1,
            "classes": MAX_CLASSES * self.event_types if by_process else 1,
            "matchers": len(EVENT_NAMES), "entry_rows": len(EVENT_NAMES), "vectors": len(tables.vectors),
            "bounds": len(tables.bounds), "texts": texts, "literals": len(tables.literals), "rows": len(tables.rows),
            "filters": len(tables.filters), "filter_states": self.max_filters, "groups": self.max_filters,
            "filter_counts": self.cpus * self.max_filters, "tops": 2 * TOP_TABLE * tables.output_counts[OUTPUT_TOP],
            "histograms": self.cpus * tables.output_counts[OUTPUT_HISTOGRAM], "scratch": 2 * self.cpus,
            "pending": pending, "pending_long": pending, "sockets": MAX_SOCKETS if "tcp_state" in needed else 1}
        return self.sizes

    def taken_over(self) -> List[str]:
        """The maps that are those of the generation before."""
        if self.previous is None:
            return []
        before = self.previous.sizes
        used = [name for name in TAKEN_OVER_IF_USED if before[name] == self.sizes[name] and before[name] > 1]
        return [*TAKEN_OVER, *used]

    def program(self, name: str) -> Any:
        return self.bpf.call("bpf_object__find_program_by_name", self.object, name.encode())

    def map(self, name: str) -> Any:
        return self.bpf.call("bpf_object__find_map_by_name", self.object, name.encode())

    def map_fd(self, name: str) -> int:
        fd: int = self.bpf.call("bpf_map__fd", self.map(name))
        return fd

    def update(self, name: str, entries: Iterable[Tuple[bytes, bytes]]) -> None:
        """Sets entries, key and value, of a map."""
        fd = self.map_fd(name)
        for key, value in entries:
            self.bpf.call("bpf_map_update_elem", fd, key, value, 0)

    def fill(self, name: str, values: Iterable[bytes]) -> None:
        """Sets the entries of one of the tables in their order."""
        packed = [value.ljust((len(value) + 7) & ~7, b"\0") for value in values]  # as the kernel places them
        if packed:
            with self.mapped(name, len(packed) * len(packed[0])) as memory:
                memory[:len(packed) * len(packed[0])] = b"".join(packed)

    def fill_numbered(self, name: str, values: Mapping[int, int], entries: int) -> None:
        """The same for a table of 32-bit integers: number -> value, of which the others are 0."""
        self.fill(name, (struct.pack("=I", values.get(number, 0)) for number in range(entries)))

    def fill_tables(self) -> None:
        tables = self.tables
        self.fill("sources", (source.pack() for source in self.sources))
        rows = self.syscall_rows()
        self.fill("syscalls", (SYSCALL_ROWS.pack(*rows.get(number, (0, 0))) for number in range(MAX_SYSCALLS)))
        at_entry = {EVENT_IDS[source.event.name]: row + 1 for row, source in enumerate(self.sources) if source.at_entry}
        self.fill_numbered("entry_rows", at_entry, len(EVENT_NAMES))
        tcp = {source.event.name: row + 1 for row, source in enumerate(self.sources) if source.event.is_tcp}
        names = [f"{name}_{family}" for family in ("v4", "v6") for name in TCP_EVENTS]
        self.fill_numbered("tcp_rows", {i: tcp.get(name, 0) for i, name in enumerate(names)}, len(names))
        self.fill("vectors", tables.vectors)
        self.fill("bounds", (struct.pack("=Q", bound) for bound in tables.bounds))
        self.fill("texts", tables.text_table())
        self.fill("literals", (struct.pack("=Q", word) for word in tables.literals))
        self.fill("rows", (struct.pack("=I", row) for row in tables.rows))
        self.fill("filters", map(tables.pack_filter, tables.filters))
        matchers = {EVENT_IDS[name]: matcher for name, matcher in tables.matchers.items()}
        self.fill("matchers", (matchers.get(number, bytes(MATCHER_SIZE)) for number in range(len(EVENT_NAMES))))
        for number in sorted(tables.live):
            self.make_groups(number)
        if self.previous is None:
            self.set_tick()
            for pid in sorted(set().union(*(wanted.pids for wanted in self.plan.values()))):
                self.classify(pid)

    def make_groups(self, number: int) -> None:
        """The map of a filter's groups, unless it has one already."""
        spec = self.tables.filters[number].spec
        known = self.previous is not None and number in self.previous.tables.live
        if spec is None or not spec.parameters["by"] or known:
            return
        fd = self.bpf.call("bpf_map_create", BPF_MAP_TYPE_HASH, b"groups", GROUP_KEY_SIZE, GROUP_SIZE,
                           self.tables.max_groups, None)
        self.update("groups", [(struct.pack("=I", number), struct.pack("=I", fd))])
        os.close(fd)

    def syscall_rows(self) -> Dict[int, Tuple[int, int]]:
        """The entries of the map `syscalls`: place -> first row of `sources`, and how many."""
        rows: Dict[int, List[int]] = {}
        for row, source in enumerate(self.sources):
            if source.syscall is not None:
                rows.setdefault(self.syscall_place(source.syscall), []).append(row)
        return {place: (found[0], len(found)) for place, found in rows.items()}

    @staticmethod
    def syscall_place(syscall: Syscall) -> int:
        """Its place in the map `syscalls`: its number, or for one that is newer than our table one at the map's end."""
        number = syscall_number(syscall.name)
        if number is not None:
            return number
        return MAX_SYSCALLS - 1 - UNNUMBERED.setdefault(syscall.name, len(UNNUMBERED))

    def classify(self, pid: int) -> None:
        """Puts a process into the class of those that are traced alike."""
        wanted = tuple((name, wanted.pids[pid]) for name, wanted in self.plan.items() if pid in wanted.pids)
        if wanted not in self.classes:
            if len(self.classes) >= MAX_CLASSES:
                raise UsageError(f"more than {MAX_CLASSES} sets of processes that are traced differently")
            number = self.classes[wanted] = len(self.classes)
            self.update("classes", ((struct.pack("=I", number * self.event_types + EVENT_IDS[name]),
                                     CLASS_EVENT.pack(program_id, 1, 0)) for name, program_id in wanted))
        now_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)  # what begins later is another process of that number
        self.update("processes", [(struct.pack("=I", pid), PROCESS.pack(self.classes[wanted], 0, now_ns))])

    def add_process(self, pid: int, program_id: int = 0, events: Optional[Iterable[str]] = None) -> None:
        """Traces one more process, for `events`, or for all that this tracer listens to.

        Works for a tracer whose selectors named processes. Raises UsageError when they did not, for an event that is
        not listened to and for a process that does not exist.
        """
        if "forget_process" not in {attachment.program for attachment in self.attached}:
            raise UsageError("this tracer traces every process: name some in its selectors")
        for name in events if events is not None else list(self.plan):
            if name not in self.plan:
                raise UsageError(f"event '{escape(name)}' is not traced; traced: {', '.join(self.plan)}")
            check_process(pid)
            self.plan[name].pids[pid] = program_id
        self.fill("sources", (source.pack() for source in self.sources))
        self.classify(pid)

    def remove_process(self, pid: int) -> None:
        """Traces a process no longer, unless every process is traced; nothing happens when it was not."""
        for wanted in self.plan.values():
            wanted.pids.pop(pid, None)
        self.bpf.library.bpf_map_delete_elem(self.map_fd("processes"), struct.pack("=I", pid))

    def open_ring(self) -> None:
        # samples first: libbpf reads the rings in this order, and stops in the second when a batch is full
        self.ring = self.bpf.call("ring_buffer__new", self.map_fd("samples"), self.sample_callback, None, None)
        self.epoll = select.epoll.fromfd(os.dup(self.bpf.call("ring_buffer__epoll_fd", self.ring)))
        self.rings["samples"] = mmap.mmap(self.map_fd("samples"), 2 * mmap.PAGESIZE, prot=mmap.PROT_READ)
        self.add_ring(self.map_fd("events"))

    def add_ring(self, fd: int) -> None:
        """Begins to read the ring of streamed events."""
        self.bpf.call("ring_buffer__add", self.ring, fd, self.sample_callback, None)
        # Level-triggered, the descriptor is ready whenever a single record is pending, although the kernel side wakes
        # only when many are: edge-triggered, it is ready when it was woken.
        self.epoll.modify(fd, select.EPOLLIN | select.EPOLLET)
        self.rings["events"] = mmap.mmap(fd, 2 * mmap.PAGESIZE, prot=mmap.PROT_READ)

    def attach(self) -> None:
        """Attaches to all that the plan needs. Raises HostError; what was attached by then is detached by close()."""
        self.set_clock()
        self.shut(True)
        for attachment in self.attached:
            self.attach_one(attachment)
        if any(attachment.program == "tcp_state" for attachment in self.attached):
            self.find_owners()
        self.shut(False)

    def shut(self, closed: bool) -> None:
        """Lets no event through, so that all attachments begin at one moment, and end at one."""
        struct.pack_into("=I", self.run, 8, closed)

    def attach_one(self, attachment: Attachment) -> None:
        program = self.program(attachment.program)
        options = BpfTracepointOpts(ctypes.sizeof(BpfTracepointOpts), attachment.cookie)
        try:
            if attachment.category:
                link = self.bpf.call("bpf_program__attach_tracepoint_opts", program, attachment.category.encode(),
                                     attachment.name.encode(), ctypes.byref(options))
            else:  # where it attaches stands in its section's name
                link = self.bpf.call("bpf_program__attach", program)
        except OSError as error:
            raise HostError(f"cannot attach to {attachment.place}: {error.strerror}{attach_hint(error)}"
                            f"{self.bpf.log_tail(3)}") from None
        if attachment.program not in self.program_fds.values():
            self.program_fds[os.dup(self.bpf.call("bpf_program__fd", program))] = attachment.program
        fd = next(fd for fd, name in self.program_fds.items() if name == attachment.program)
        self.links[attachment] = link, fd
        self.linked[attachment] = self.attached_program(link)

    def open_gates(self) -> None:
        """Puts this generation's programs behind the gates that are attached: from set_generation() on they see the
        events."""
        for name, (table, place) in GATES.items():
            if any(attachment.program == name for attachment in self.attached):
                fd = self.bpf.call("bpf_program__fd", self.program(f"on_{name}"))
                self.update(table, [(struct.pack("=I", 2 * place + self.generation % 2), struct.pack("=I", fd))])

    def close_gates(self) -> None:
        """The opposite: lets go of the programs of a generation that sees no events any more."""
        for table, place in GATES.values():
            self.bpf.library.bpf_map_delete_elem(self.map_fd(table),
                                                 struct.pack("=I", 2 * place + self.generation % 2))

    def reload(self, plan: Mapping[str, Wanted], tables: Tables) -> None:
        """Changes over to tables that were made with the present ones as `previous`.

        Every event is seen by one generation. Filters that are in both count on. The others' last records are in
        `held` afterwards, and their last counts in read_counts() until retire(). Raises HostError and TraceleftError;
        then everything is as it was.
        """
        if len(tables.filters) > self.max_filters:
            raise TraceleftError(f"there is room for {self.max_filters} filters during this run, new ones beside those "
                                 f"that they replace, and not for {len(tables.filters)}: start it again")
        new = Tracer(plan, tables, self.ring_bytes_given, self.verbose, self.follow, self.sees_all, previous=self)
        try:
            new.load()
            new.open_gates()
            for attachment in new.attached:
                if attachment not in self.links:
                    new.attach_one(attachment)
        except BaseException:
            if new.run is not None:
                new.close_gates()
            new.close()
            raise
        self.succeed(new)

    def succeed(self, new: "Tracer") -> None:
        """Lets another generation see the events, and takes its place."""
        before = self.tables
        finds_owners = "sockets" not in new.taken_over() and any(a.program == "tcp_state" for a in new.attached)
        struct.pack_into("=I", self.run, 4, new.generation & 0xFFFF_FFFF)  # here one ends and the other begins
        wait_for_programs()
        self.tops.clear(self.tick + 1)  # finds what came late for the tick before
        self.last_outputs = {number: self.read_output(number, self.tick) for number in before.live
                             if before.filters[number].spec is not None}
        self.close_gates()
        self.links.update(new.links)
        self.linked.update(new.linked)
        self.program_fds.update(new.program_fds)
        for attachment in set(self.links) - set(new.attached):
            self.bpf.library.bpf_link__destroy(self.links.pop(attachment)[0])
        if "events" not in new.taken_over():
            self.add_ring(new.map_fd("events"))
        self.release()
        for name in OF_A_GENERATION:
            setattr(self, name, getattr(new, name))
        self.forget_programs()
        self.hold_records()
        self.retiring_streams = {number: member.event for number, member in enumerate(before.filters)
                                 if number in before.live and member.spec is None}
        if finds_owners:
            self.find_owners()

    def forget_programs(self) -> None:
        """Closes those that are not attached any more, and keeps their figures."""
        for fd in set(self.program_fds) - {fd for _, fd in self.links.values()}:
            self.misses_before += self.misses_of(fd, self.program_fds.pop(fd))
            os.close(fd)

    def hold_records(self) -> None:
        """Reads what is in the ring by now into `held`."""
        held, self.held = self.held, collections.deque()  # while there is any, records are read one by one
        records: List[bytes] = []
        pending = self.submitted()
        deadline = time.monotonic() + DRAIN_TIMEOUT
        while self.consumed < pending and time.monotonic() < deadline:
            records += self.poll_records()
        self.held = held
        self.held.extend(records)

    def retire(self) -> None:
        """Forgets the filters of the previous tables: the last of their records has been read."""
        counts = self.read_counts()
        members = list(self.tables.filters)
        self.last_outputs, self.retiring_streams = {}, {}
        for number in self.tables.retire():
            spec = members[number].spec
            self.submitted_before += counts[number].submitted
            self.lost_samples_before += counts[number].ring_full if spec is not None else 0
            self.samples.pop(number, None)
            for memory, size in ((self.counts, self.cpus * FILTER_COUNTS.size), (self.states, FILTER_STATE.size)):
                memory[number * size:(number + 1) * size] = bytes(size)
            if spec is not None and spec.parameters["by"]:
                self.bpf.library.bpf_map_delete_elem(self.map_fd("groups"), struct.pack("=I", number))

    def find_owners(self) -> None:
        """Runs the iterator over all open files once: whose the connections are that are there already."""
        try:
            link = self.bpf.call("bpf_program__attach_iter", self.program("tcp_owners"), None)
            fd = self.bpf.call("bpf_iter_create", self.bpf.call("bpf_link__fd", link))
        except OSError as error:
            raise HostError(f"cannot iterate over open files: {error.strerror}{self.bpf.log_tail(3)}") from None
        while os.read(fd, 4096):  # it writes nothing: reading makes it run
            pass
        os.close(fd)
        self.bpf.library.bpf_link__destroy(link)

    def set_clock(self) -> None:
        """Notes how far CLOCK_BOOTTIME is from Unix time: the wall clock may have been set since."""
        self.clock_offset_ns = time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME)

    def fileno(self) -> int:
        """A descriptor that is readable when much is pending; poll() every POLL_INTERVAL for the rest."""
        return self.epoll.fileno()

    def wait(self, timeout: float) -> None:
        """Waits until much is pending, at most `timeout` seconds."""
        select.select([self], [], [], timeout)

    def take_record(self, context: int, data: int, size: int) -> int:
        """libbpf's sample callback. An exception in it would be swallowed: poll() raises it. Negative stops reading."""
        try:
            self.records.append(ctypes.string_at(data, size))
            full = len(self.records) >= BATCH or self.held and self.is_streamed(self.records[-1])
            return -errno.EAGAIN if full else 0
        except BaseException as error:
            self.callback_error = error
            return -errno.EIO

    def is_streamed(self, record: bytes) -> bool:
        """Whether it is an event for Python, and not a sample of a filter that the kernel evaluates."""
        index, _ = RECORD_TAG.unpack_from(record, RECORD_TAG_OFFSET)
        return self.tables.filters[index].spec is None

    def poll(self) -> List[Event]:
        """The streamed events that are pending, see poll_records()."""
        return [self.decode(record) for record in self.poll_records()]

    def decode(self, record: bytes) -> Event:
        """The event of a streamed record, its time in Unix time."""
        return decode_record(record, self.clock_offset_ns)

    def poll_records(self) -> List[bytes]:
        """The records that are pending of streamed events; `more` says whether there are others. Never blocks.

        At most BATCH records are read; samples among them are kept for take_sample().
        """
        self.epoll.poll(0)  # takes the edge
        status = self.bpf.library.ring_buffer__consume(self.ring)
        if self.callback_error is not None:
            raise self.callback_error
        if status < 0 and status not in (-errno.EAGAIN, -errno.EINTR):
            raise TraceleftError(f"cannot read the ring buffer: {os.strerror(-status)}")
        self.more = status == -errno.EAGAIN
        records, self.records = self.records, []
        self.consumed += len(records)
        if not self.samples_expected:
            return records
        streamed = []
        for record in records:
            index, tick = RECORD_TAG.unpack_from(record, RECORD_TAG_OFFSET)
            if self.tables.filters[index].spec is None:
                streamed.append(record)
            else:
                self.samples[index] = [*self.samples.get(index, ())[-1:], (tick, self.decode(record))]
        return streamed

    def drain(self) -> Iterator[Event]:
        """After detach(): the events that are left, to the last one that the kernel has counted."""
        for records in self.drain_records():
            yield from map(self.decode, records)

    def drain_records(self) -> Iterator[List[bytes]]:
        """The same as records, some at a time."""
        deadline = time.monotonic() + DRAIN_TIMEOUT
        while self.consumed < self.submitted() and time.monotonic() < deadline:
            before = self.consumed
            yield self.poll_records()
            if self.consumed > before:  # the time is for programs that are still running, not for a long backlog
                deadline = time.monotonic() + DRAIN_TIMEOUT

    def submitted(self) -> int:
        """Records that the kernel has put into the ring buffer."""
        return sum(counts.submitted for counts in self.read_counts()) + self.submitted_before

    def read_counts(self) -> List[FilterCounts]:
        """What the kernel has counted so far, for each entry of tables.filters."""
        # as native 64-bit words: each is read at once, while the kernel side counts on
        step, filters = FILTER_COUNTS.size // 8, len(self.tables.filters)
        words = memoryview(self.counts)[:filters * self.cpus * FILTER_COUNTS.size].cast("Q").tolist()
        of_filter = self.cpus * step
        return [FilterCounts(*(sum(words[begin + word:begin + of_filter:step])
                               for word in range(len(FilterCounts._fields))))
                for begin in range(0, filters * of_filter, of_filter)]

    def next_tick(self) -> int:
        """Lets every filter take a new sample. Returns the tick that has ended."""
        self.tick += 1
        self.tops.clear(self.tick)
        self.set_tick()
        return self.tick - 1

    def set_tick(self) -> None:
        """Writes the tick into struct run, which the kernel side reads."""
        struct.pack_into("=I", self.run, 0, self.tick & 0xFFFF_FFFF)

    def read_output(self, index: int, ended: int) -> Mapping[Any, int]:
        """What the kernel side has counted for a filter's output function in the tick that has ended."""
        member = self.tables.filters[index].spec
        if member is None or index not in self.tables.live:
            return {}
        reader = {OUTPUT_HISTOGRAM: self.histograms.read, OUTPUT_TOP: self.tops.read}.get(member.packed_output.output)
        return reader(member, ended) if reader is not None else {}

    def missed(self) -> Dict[str, int]:
        """What the kernel side could not follow, by cause; it stays readable after detach()."""
        _, _, _, calls, owners, children, _ = RUN.unpack_from(self.run)
        found = {"missed_calls": calls, "missed_owners": owners, "missed_children": children,
                 "recursion_misses": self.recursion_misses()}
        return {cause: count for cause, count in found.items() if count}

    def uring_counts(self) -> Dict[int, int]:
        """io_uring submissions since the start by opcode, of all processes: what they do is seen by no syscall."""
        if not RUN.unpack_from(self.run)[-1]:
            return {}
        return {opcode: count for opcode, count in enumerate(self.per_cpu_sums("uring", URING_OPCODES)) if count}

    def per_cpu_sums(self, name: str, entries: int) -> List[int]:
        fd, cpus = self.map_fd(name), self.bpf.call("libbpf_num_possible_cpus")
        buffer = ctypes.create_string_buffer(8 * cpus)
        sums = []
        for index in range(entries):
            self.bpf.call("bpf_map_lookup_elem", fd, struct.pack("=I", index), buffer)
            sums.append(sum(struct.unpack(f"={cpus}Q", buffer.raw)))
        return sums

    def take_sample(self, index: int, tick: int) -> Optional[Event]:
        """A filter's sample of a tick that has ended, or one of the tick after it that has already come.

        The counts are read just after the tick: an event in between is counted with the old tick and carries the new
        one. It stays, since it may be the only one of the new tick.
        """
        kept = [(number, event) for number, event in self.samples.pop(index, ()) if number >= tick]
        if not kept:
            return None
        self.samples[index] = [(number, event) for number, event in kept if number > tick]
        return kept[0][1]

    def program_info(self, fd: int, offset: int, code: str) -> int:
        """One member of struct bpf_prog_info of a program's descriptor; 0 where the kernel does not know it yet."""
        info, size = ctypes.create_string_buffer(PROG_INFO_SIZE), ctypes.c_uint32(PROG_INFO_SIZE)
        self.bpf.call("bpf_obj_get_info_by_fd", fd, info, ctypes.byref(size))
        value: int = struct.unpack_from(code, info, offset)[0]
        return value

    def recursion_misses(self) -> int:
        """Events for which the kernel itself skipped a program, of whatever type."""
        return self.misses_before + sum(self.misses_of(fd, name) for fd, name in self.program_fds.items())

    def misses_of(self, fd: int, name: str) -> int:
        return self.program_info(fd, PROG_INFO_RECURSION_MISSES, "=Q") if name != "uring_submit" else 0

    def verified_instructions(self, name: str = "sys_exit") -> int:
        """Instructions that the verifier walked through for a program, or for that behind a gate; its limit is
        1,000,000. From Linux 5.16 on."""
        program = self.program(f"on_{name}" if name in GATES else name)
        return self.program_info(self.bpf.call("bpf_program__fd", program), PROG_INFO_VERIFIED_INSNS, "=I")

    def unseen(self) -> Dict[str, Dict[str, int]]:
        """Event type -> cause -> streamed events that no filter has seen."""
        streams = [number for number in self.tables.live if self.tables.filters[number].spec is None]
        not_read = self.submitted() - self.consumed + len(self.held)
        causes = {number: {**found, "not_read": not_read} for number, found in self.unseen_streams(streams).items()}
        return {self.tables.filters[number].event: {cause: count for cause, count in found.items() if count}
                for number, found in causes.items()}

    def lost_attachments(self) -> List[str]:
        """Places whose link is not the one that was made: its descriptor was closed, or is of something else."""
        return [attachment.place for attachment, (link, _) in list(self.links.items())
                if self.attached_program(link) != self.linked[attachment]]

    def attached_program(self, link: Any) -> Optional[int]:
        """The id of the program that a link has attached; None when it is no link."""
        info, size = ctypes.create_string_buffer(LINK_INFO_SIZE), ctypes.c_uint32(LINK_INFO_SIZE)
        with contextlib.suppress(OSError):
            self.bpf.call("bpf_obj_get_info_by_fd", self.bpf.call("bpf_link__fd", link), info, ctypes.byref(size))
            return int(struct.unpack_from("=III", info)[2])  # struct bpf_link_info: type, id, prog_id
        return None

    def unseen_streams(self, numbers: Iterable[int]) -> Dict[int, Dict[str, int]]:
        """Number of a stream -> cause -> events that did not fit into its ring."""
        counts = self.read_counts()
        return {number: {"ring_full": counts[number].ring_full} for number in numbers}

    def run_times(self) -> Dict[str, Tuple[float, int]]:
        """Attached program -> seconds that it ran and how often, since BPF stats are on; empty when they never were."""
        found: Dict[str, Tuple[float, int]] = {}
        for fd, name in self.program_fds.items():
            seconds, runs = found.get(name, (0.0, 0))
            found[name] = (seconds + self.program_info(fd, PROG_INFO_RUN_TIME, "=Q") / 1e9,
                           runs + self.program_info(fd, PROG_INFO_RUN_COUNT, "=Q"))
        return found if any(runs for _, runs in found.values()) else {}

    def ring_use(self) -> Dict[str, Tuple[int, int]]:
        """Ring buffer -> bytes that wait in it, and its size."""
        found = {}
        for name, mapped in self.rings.items():
            consumed, = struct.unpack_from("=Q", mapped)
            produced, = struct.unpack_from("=Q", mapped, mmap.PAGESIZE)
            found[name] = (produced - consumed, self.sizes[name])
        return found

    def group_counts(self) -> Dict[str, int]:
        """Filter -> distinct `by` values that the kernel side has counted. After detach(): it looks into a map."""
        fd, state, counts = self.map_fd("filter_states"), ctypes.create_string_buffer(FILTER_STATE.size), {}
        for index, member in enumerate(self.tables.filters):
            if member.spec is not None:
                self.bpf.call("bpf_map_lookup_elem", fd, struct.pack("=I", index), state)
                counts[member.spec.id] = FILTER_STATE.unpack(state.raw)[-1]
        return counts

    def lost_samples(self) -> int:
        """Samples that did not fit into the ring buffer."""
        return self.lost_samples_before + sum(
            counts.ring_full for member, counts in zip(self.tables.filters, self.read_counts())
            if member.spec is not None)

    def detach(self) -> None:
        """Stops tracing; what is in the ring can still be read."""
        if self.run is not None and self.links:
            self.shut(True)
        with contextlib.suppress(KeyError):  # and not `while self.links`: another thread may be at it too
            while True:
                link, _ = self.links.popitem()[1]  # before self.bpf is looked at, which there may not be yet
                self.bpf.library.bpf_link__destroy(link)

    def release(self) -> None:
        """Frees this generation's object, and what is mapped of it."""
        for mapped in (self.run, self.counts, self.states, self.histograms, self.tops):
            if mapped is not None:
                mapped.close()
        self.run = self.counts = self.states = self.histograms = self.tops = None
        if self.object is not None:
            self.bpf.library.bpf_object__close(self.object)
            self.object = None

    def close(self) -> None:
        """Detaches and frees everything; can be called twice."""
        self.detach()
        if self.ring is not None:
            self.epoll.close()
            self.bpf.library.ring_buffer__free(self.ring)
            self.ring = None
        for mapped in self.rings.values():
            mapped.close()
        self.rings = {}
        for fd in self.program_fds:
            os.close(fd)
        self.program_fds = {}
        self.release()


# What reload() brings anew; the rest of a Tracer is for the whole run
OF_A_GENERATION = ("plan", "tables", "streams", "samples_expected", "ring_bytes", "sources", "attached", "sizes",
                   "object_bytes", "object", "run", "counts", "states", "histograms", "tops", "generation")
UNNUMBERED: Dict[str, int] = {}  # syscalls that are newer than SYSCALL_NUMBERS_TEXT, in the order of their first use


def wait_for_programs() -> None:
    """Returns when every BPF program has ended that was running at the call."""
    try:
        libc_call("syscall", SYS_MEMBARRIER["aarch64" if platform.machine() == "aarch64" else "x86_64"],
                  MEMBARRIER_CMD_GLOBAL, 0, 0)
    except OSError:  # not with nohz_full=, and not built into every kernel
        time.sleep(1)  # they cannot be preempted, and last for microseconds


def numbered(values: Iterable[bytes]) -> Iterator[Tuple[bytes, bytes]]:
    """The entries of an array map."""
    return ((struct.pack("=I", index), value) for index, value in enumerate(values))


def read_object() -> bytes:
    """The BPF object. Raises HostError."""
    try:
        return object_bytes()
    except OSError as error:
        raise HostError(f"cannot read {OBJECT_PATH}: {error.strerror}; copy the folder bpf/ along with the script, or "
                        "take the one file that 'make dist' makes") from None


def load_hint(error: OSError) -> str:
    """The likely cause of a load failure."""
    return {
        errno.EPERM: ": a capability is missing, or the kernel is locked down",
        errno.EACCES: ": its verifier did not accept a program",
        errno.EINVAL: ": its verifier did not accept a program, or it lacks a feature of "
                      f"{'.'.join(map(str, MIN_KERNEL))}",
        errno.ENOMEM: ": not enough memory; try a smaller --ring-size",
        errno.ESRCH: ": its BTF lacks a type that the object needs",
    }.get(error.errno or 0, "")


PARANOID_PATH = Path("/proc/sys/kernel/perf_event_paranoid")


def attach_hint(error: OSError) -> str:
    """The likely cause when a tracepoint cannot be attached to."""
    try:
        paranoid = int(PARANOID_PATH.read_text())
    except (OSError, ValueError):
        return ""
    if error.errno not in (errno.EACCES, errno.EPERM) or paranoid <= 2:
        return ""
    return (f": kernel.perf_event_paranoid is {paranoid}, and above 2, which is only on kernels such as Debian's, it "
            "takes CAP_SYS_ADMIN: run it as root, or sysctl kernel.perf_event_paranoid=2")


# ======================================================================================================================
# Recordings: raw events in a file, which a spec can be run over later, on another host and without root
# ======================================================================================================================

# A recording is RECORDING_MAGIC, then blocks to the end of the file: BLOCK (kind, bytes that follow, their CRC-32) and
# these bytes. The first block is the head, the last one the end; an event's type comes before its first event. Integers
# are little-endian. Head, type and end are JSON; events are the offset from CLOCK_BOOTTIME to Unix time in ns (i64),
# then records of the ring buffer (struct event_header of version RECORD_VERSION), a u32 with its length before each.
RECORDING_MAGIC = b"traceleft recording\n"
RECORDING_VERSION = 1
BLOCK = struct.Struct("<III")
BLOCK_HEAD, BLOCK_TYPE, BLOCK_EVENTS, BLOCK_END = 1, 2, 3, 4
CLOCK_OFFSET = struct.Struct("<q")
RECORD_LENGTH = struct.Struct("<I")
TIMESTAMP = struct.Struct("=Q")  # the first field of a record
VERSION_FIELD = struct.Struct("=I")
MAX_BLOCK_BYTES = 1 << 20       # of events: what a reader has to hold
MAX_RECORD_BYTES = 1 << 17      # texts of six arguments, of paths, exe and cgroup
END_RESERVE = 16 << 10          # kept free for types and the end
RECORD_MAX_BYTES = 1 << 30


def row_of(found: EventType) -> str:
    """The arguments of an event type as EVENT_ROWS writes them."""
    return " ".join(f"{argument.name}:{argument.type_name}" for argument in found.arguments)


def is_shown(event: Event) -> bool:
    """Whether the event's addresses are some: what comes from a file may be anything."""
    return all(not argument.type.address_bits or int(value) >> argument.type.address_bits == 0
               for argument, value in zip(event.type.arguments, event.args))


class Recorder:
    """Writes a recording, at most `max_bytes` of it; what is not recorded is counted by cause."""

    def __init__(self, path: str, max_bytes: int = RECORD_MAX_BYTES) -> None:
        self.path, self.max_bytes = path, max_bytes
        self.fd = -1
        self.size = 0                         # of what is written
        self.pending = bytearray()            # records of the block that is being filled
        self.waiting: List[str] = []          # their events
        self.types: Set[str] = set()
        self.recorded: Dict[str, int] = collections.Counter()               # event -> records written
        self.unrecorded: Dict[Tuple[str, str], int] = collections.Counter()  # (event, cause) -> not written
        self.stopped = ""                     # the cause for which nothing more is written
        self.begin = time.monotonic()

    def open(self) -> None:
        """Raises TraceleftError when it cannot be written there; of what exists only a recording is overwritten."""
        try:
            self.fd = open_log(self.path, LOG_FLAGS & ~os.O_WRONLY | os.O_RDWR)
            if os.pread(self.fd, len(RECORDING_MAGIC), 0) not in (b"", RECORDING_MAGIC):
                raise OSError(errno.EEXIST, "there is a file that is no recording")
            os.ftruncate(self.fd, 0)
            if os.fstat(self.fd).st_uid == os.geteuid():
                os.fchmod(self.fd, 0o600)  # it holds what others' processes have written and read
        except OSError as error:
            if self.fd >= 0:
                os.close(self.fd)
                self.fd = -1
            raise TraceleftError(f"cannot record to {escape(self.path)}: {error.strerror}") from None
        self.write(RECORDING_MAGIC)
        self.write_json(BLOCK_HEAD, {
            "version": RECORDING_VERSION, "record_version": RECORD_VERSION, "program": VERSION, "host": HOSTNAME,
            "kernel": platform.release(), "machine": platform.machine(), "time": time.time()})

    def add(self, records: Iterable[bytes], tracer: Tracer) -> None:
        """Records that the tracer has just read."""
        for record in records:
            index, _ = RECORD_TAG.unpack_from(record, RECORD_TAG_OFFSET)
            self.take(tracer.tables.filters[index].event, record)
        self.flush(tracer.clock_offset_ns)

    def take(self, event: str, record: bytes) -> None:
        """One record of the ring buffer; flush() writes it."""
        size = RECORD_LENGTH.size + len(record)
        if not self.stopped and self.size + len(self.pending) + size > self.max_bytes - END_RESERVE:
            self.stop("recording_full", f"{escape(self.path)} has {self.max_bytes} bytes (--record-max-bytes)")
        if self.stopped:
            self.unrecorded[event, self.stopped] += 1
            return
        if event not in self.types:
            self.types.add(event)
            found = EVENT_TYPES[event]
            self.write_json(BLOCK_TYPE, {"id": EVENT_IDS[event], "name": event, "arguments": row_of(found)})
        self.pending += RECORD_LENGTH.pack(len(record)) + record
        self.waiting.append(event)

    def flush(self, clock_offset_ns: int) -> None:
        """Writes the records taken so far, whose time is `clock_offset_ns` before Unix time."""
        if not self.waiting:
            return
        waiting, data = self.waiting, bytes(self.pending)
        self.waiting, self.pending = [], bytearray()
        begin = 0
        counts = collections.Counter(waiting)
        while begin < len(data) and not self.stopped:
            end = begin
            while end < len(data) and end - begin < MAX_BLOCK_BYTES:
                end += RECORD_LENGTH.size + RECORD_LENGTH.unpack_from(data, end)[0]
            self.write_block(BLOCK_EVENTS, CLOCK_OFFSET.pack(clock_offset_ns) + data[begin:end])
            begin = end
        for event, count in counts.items():
            if self.stopped:
                self.unrecorded[event, self.stopped] += count
            else:
                self.recorded[event] += count

    def write_json(self, kind: int, value: Dict[str, Any]) -> None:
        self.write_block(kind, json.dumps(value).encode())

    def write_block(self, kind: int, data: bytes) -> None:
        self.write(BLOCK.pack(kind, len(data), binascii.crc32(data)) + data)

    def write(self, data: bytes) -> None:
        """All of `data`, or nothing and the end of the recording."""
        try:
            written = os.write(self.fd, data)
            if written < len(data):
                os.ftruncate(self.fd, self.size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.size += written
        except OSError as error:
            self.stop("write_failed", f"cannot write to {escape(self.path)}: {error.strerror}")

    def stop(self, cause: str, why: str) -> None:
        if not self.stopped:
            say(f"{why}: what comes now is not recorded, and counted")
        self.stopped = cause

    def close(self, unseen: Mapping[str, Mapping[str, int]]) -> None:
        """Ends the recording; `unseen` are events that did not even get here, by event type and cause."""
        for event, causes in unseen.items():
            for cause, count in causes.items():
                self.unrecorded[event, cause] += count
        if self.fd >= 0:
            self.write_json(BLOCK_END, {"recorded": dict(self.recorded), "unrecorded": self.causes(),
                                        "seconds": round(time.monotonic() - self.begin, 3)})
            os.close(self.fd)
            self.fd = -1

    def settle(self, accounts: Mapping[str, Account]) -> None:
        """Brings what was recorded of each event type, and what not, to its account."""
        for name, account in accounts.items():
            account.lost = {cause: count for (event, cause), count in self.unrecorded.items() if event == name}
            account.delivered = self.recorded.get(name, 0)
            account.matched = account.passed = account.delivered + sum(account.lost.values())

    def causes(self) -> Dict[str, int]:
        """Events that were not recorded, by cause."""
        found: Dict[str, int] = collections.Counter()
        for (_, cause), count in self.unrecorded.items():
            found[cause] += count
        return dict(sorted(found.items()))

    def summary(self) -> Dict[str, Any]:
        return {"path": self.path, "bytes": self.size, "events": sum(self.recorded.values()),
                "unrecorded": self.causes()}


class Block(NamedTuple):
    """One block of a recording."""

    kind: int
    data: bytes


class Recording:
    """A recording to read. The constructor reads all of it once, so that a bad one is refused before it is used.

    Raises UsageError for what is no recording, is torn, or was made by a version that this one cannot read. With
    `salvage` what is whole of a torn one can be read.
    """

    def __init__(self, path: str, salvage: bool = False) -> None:
        self.path = path
        self.names: Dict[int, str] = {}  # event id of the recording -> name
        self.end: Dict[str, Any] = {}
        self.events = 0
        try:
            # O_NONBLOCK: a FIFO that nobody writes to is an error
            self.file = os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb")
            if not stat.S_ISREG(os.fstat(self.file.fileno()).st_mode):
                raise OSError(errno.EINVAL, "not a regular file")
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise UsageError(f"cannot read {escape(path)}: {reason}") from None
        self.limit = os.fstat(self.file.fileno()).st_size
        if self.file.read(len(RECORDING_MAGIC)) != RECORDING_MAGIC:
            raise UsageError(f"{escape(path)} is no recording: 'traceleft.py trace --record FILE' makes one")
        whole = self.scan()
        if not self.end:
            if not salvage or not self.names:
                rest = f"; --salvage replays the {self.events} events before that" if self.names else ""
                raise UsageError(f"{escape(path)} is torn: from byte {whole} on it is cut off or damaged{rest}")
            say(f"warning: {escape(path)} is torn: from byte {whole} on it is cut off or damaged")
            self.limit = whole

    def scan(self) -> int:
        """Reads all blocks once; returns the offset up to which the recording is whole."""
        whole, expected = len(RECORDING_MAGIC), {BLOCK_HEAD}
        for block in self.blocks():
            if block.kind not in expected:
                break
            try:
                self.take[block.kind](self, block)
            except (ValueError, KeyError, TypeError, AttributeError, AssertionError, RecursionError, struct.error):
                break
            whole = self.file.tell()
            expected = set() if block.kind == BLOCK_END else {BLOCK_TYPE, BLOCK_EVENTS, BLOCK_END}
        else:
            if whole == self.limit:
                return whole
        self.end = {}
        return whole

    def take_head(self, block: Block) -> None:
        head = self.json(block)
        for key, mine in (("version", RECORDING_VERSION), ("record_version", RECORD_VERSION)):
            if head[key] != mine:
                raise UsageError(f"{escape(self.path)} was made by traceleft.py {escape(str(head.get('program')))}, "
                                 f"whose recordings have {key} {escape(str(head[key]))}: this one reads {mine}")

    def take_type(self, block: Block) -> None:
        """A type of the recording's events: one of the table, or else one that its host's tracefs described."""
        row = self.json(block)
        name, arguments = row["name"], row["arguments"]
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise ValueError(name)
        if name not in EVENT_TYPES:
            found = parse_event_row(name, arguments)
            if len(found.arguments) > MAX_ARGS:
                raise ValueError(arguments)
            learn_event(found)
        if row_of(EVENT_TYPES[name]) != arguments:
            raise UsageError(f"{escape(self.path)} was made where event '{name}' has the arguments "
                             f"{escape(arguments)}, and not {row_of(EVENT_TYPES[name])}: "
                             "replay it with the traceleft.py of that host")
        self.names[row["id"]] = name

    def take_events(self, block: Block) -> None:
        self.events += sum(1 for _ in self.records(block))

    def take_end(self, block: Block) -> None:
        self.end = self.json(block)
        if not all(isinstance(count, int) for count in self.end["unrecorded"].values()):
            raise ValueError

    take: ClassVar[Dict[int, Callable[["Recording", "Block"], None]]] = {
        BLOCK_HEAD: take_head, BLOCK_TYPE: take_type, BLOCK_EVENTS: take_events, BLOCK_END: take_end}

    def blocks(self) -> Iterator[Block]:
        """The blocks up to the end, or to the first that is not whole."""
        self.file.seek(len(RECORDING_MAGIC))
        while self.file.tell() < self.limit:
            head = self.file.read(BLOCK.size)
            if len(head) < BLOCK.size:
                return
            kind, length, crc = BLOCK.unpack(head)
            if length > MAX_BLOCK_BYTES + MAX_RECORD_BYTES:
                return
            data = self.file.read(length)
            if len(data) < length or binascii.crc32(data) != crc:
                return
            yield Block(kind, data)

    @staticmethod
    def json(block: Block) -> Dict[str, Any]:
        value = json.loads(block.data)
        if not isinstance(value, dict):
            raise ValueError
        return value

    def records(self, block: Block) -> Iterator[Tuple[str, bytes]]:
        """Event name and record of each event of a block. Raises struct.error, ValueError or KeyError for none."""
        (offset,) = CLOCK_OFFSET.unpack_from(block.data)
        at = CLOCK_OFFSET.size
        while at < len(block.data):
            (length,) = RECORD_LENGTH.unpack_from(block.data, at)
            at += RECORD_LENGTH.size
            record = block.data[at:at + length]
            if not HEADER.size <= len(record) == length:
                raise ValueError
            name = self.names[record_event(record)]
            (time_ns,) = TIMESTAMP.unpack_from(record)
            (version,) = VERSION_FIELD.unpack_from(record, HEADER_OFFSETS["version"])
            if version != RECORD_VERSION or not 0 <= time_ns + offset < 1 << 63:
                raise ValueError
            if EVENT_TYPES[name].is_tcp and not is_shown(decode_record(record, offset, name)):
                raise ValueError
            yield name, record
            at += length

    def read(self) -> Iterator[Tuple[int, List[Event]]]:
        """Clock offset in ns and events, block by block. Raises TraceleftError when they are not there any more."""
        left = self.events
        for block in self.blocks():
            if block.kind == BLOCK_EVENTS:
                (offset,) = CLOCK_OFFSET.unpack_from(block.data)
                events = [decode_record(record, offset, name) for name, record in self.records(block)]
                left -= len(events)
                yield offset, events
        if left:
            raise TraceleftError(f"{escape(self.path)} was changed while it was read")

    def close(self) -> None:
        self.file.close()


# ======================================================================================================================
# Main loop: the ring buffer, signals and the one-second tick in one select loop
# ======================================================================================================================

MAX_HOLD = 0.2       # seconds for which rules are evaluated until signals and the time are looked at again
STOP_TIMEOUT = 30.0  # seconds for which rules are evaluated after the end
STANDSTILL = 5.0     # seconds without a tick that are worth a line
LINK_CHECK = 10      # ticks from one look at the attachments to the next
POLL_INTERVAL = 0.1  # seconds after which the ring is read although little is pending


class StopSignals:
    """SIGINT and SIGTERM as a readable descriptor, others as flags; a context manager for the main thread."""

    def __init__(self) -> None:
        self.stopped = False
        self.reopen = False  # SIGUSR1 came: log files are to be opened again
        self.reload = False  # SIGHUP came: the spec is to be read again
        self.has_terminal = sys.stderr.isatty()
        self.reader, self.writer = socket.socketpair()
        self.reader.setblocking(False)
        self.writer.setblocking(False)  # as signal.set_wakeup_fd() demands

    def __enter__(self) -> "StopSignals":
        self.old_handlers = {number: signal.signal(number, self.stop) for number in (signal.SIGINT, signal.SIGTERM)}
        self.old_handlers[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, self.request_reopen)
        self.old_handlers[signal.SIGHUP] = signal.signal(signal.SIGHUP, self.request_reload)
        self.old_fd = signal.set_wakeup_fd(self.writer.fileno(), warn_on_full_buffer=False)
        return self

    def __exit__(self, *exception: object) -> None:
        signal.set_wakeup_fd(self.old_fd)
        for number, handler in self.old_handlers.items():
            signal.signal(number, handler)
        self.reader.close()
        self.writer.close()

    def stop(self, number: int, frame: object) -> None:
        self.stopped = True

    def request_reopen(self, number: int, frame: object) -> None:
        self.reopen = True
        self.sleep_on()

    def request_reload(self, number: int, frame: object) -> None:
        """SIGHUP comes, too, when the terminal has gone: then it ends the run."""
        if self.has_terminal and not sys.stderr.isatty():
            self.stopped = True
        else:
            self.reload = True
            self.sleep_on()

    def sleep_on(self) -> None:
        with contextlib.suppress(BlockingIOError):  # it is no reason to wake up
            self.reader.recv(4096)

    def drain(self) -> None:
        """What has come is known by now."""
        with contextlib.suppress(BlockingIOError):
            self.reader.recv(4096)

    def fileno(self) -> int:
        return self.reader.fileno()


def boot_time() -> float:
    """CLOCK_BOOTTIME in seconds: the kernel side's clock, by whose seconds `threshold` counts and the loop ticks."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def run_loop(tracer: Tracer, handle: Callable[[List[bytes]], None], tick: Callable[[], None], stop: StopSignals,
             duration: Optional[float], watchers: "Watchers") -> None:
    """Hands over records, calls `tick` as each second ends, until stopped; then detaches and hands over the rest."""
    end = time.monotonic() + duration if duration is not None else float("inf")
    second = boot_time() // 1
    watch = SelfWatch(tracer)
    with selectors.DefaultSelector() as selector:
        selector.register(tracer, selectors.EVENT_READ)
        selector.register(stop, selectors.EVENT_READ)
        if watchers.server is not None:
            selector.register(watchers.server, selectors.EVENT_READ)
        while not stop.stopped and time.monotonic() < end:
            if not tracer.more and not tracer.held:
                interval = POLL_INTERVAL if tracer.streams else 1.0
                selector.select(max(0.0, min(interval, second + 1 - boot_time(), end - time.monotonic())))
            handle([] if tracer.held else tracer.poll_records())
            watchers.serve()
            if boot_time() // 1 != second:
                second = boot_time() // 1
                tracer.set_clock()
                tick()
                watchers.tick()
                watch.tick()
    watch.stop()
    watchers.stopping()
    detaching = start_thread(tracer.detach)  # takes a while, in which the ring should not fill
    if detaching is None:
        tracer.detach()
    while detaching is not None and detaching.is_alive():
        handle([] if tracer.held else tracer.poll_records())
        if not tracer.more and not tracer.held:
            detaching.join(0.01)
    deadline = time.monotonic() + STOP_TIMEOUT
    for records in itertools.chain([[]], tracer.drain_records()):
        handle(records)
        while tracer.held and time.monotonic() < deadline:
            handle([])
        if tracer.held:  # not_read, with what is in the ring
            break


class KernelCounts:
    """Brings what the kernel has counted to an aggregator, as differences from tick to tick."""

    def __init__(self, tracer: Tracer, aggregator: Aggregator) -> None:
        self.tracer, self.aggregator = tracer, aggregator
        self.states: Dict[int, FilterState] = {}  # by the filters' numbers
        self.before: List[FilterCounts] = []
        self.set_filters()

    def set_filters(self) -> None:
        """Takes the tables' filters, beside those that retire() ends."""
        filters = self.tracer.tables.filters
        for number in self.tracer.tables.live:
            spec = filters[number].spec
            if spec is not None:
                self.states[number] = self.aggregator.states[spec.id]
        self.before += [NO_COUNTS] * (len(filters) - len(self.before))

    def tick(self, handle: Callable[[List[bytes]], None]) -> None:
        """Ends the tick; `handle` takes the streamed records that are read along with the samples."""
        ended = self.tracer.next_tick()
        for number, state in self.states.items():  # first, so that what is counted here is in the counts, too
            state.output.take(self.tracer.read_output(number, ended))
        self.count(ended, handle)

    def count(self, ended: int, handle: Callable[[List[bytes]], None]) -> None:
        """Counts what has been added since the last time, with samples of a tick or later."""
        counts = self.tracer.read_counts()
        handle(self.tracer.poll_records())
        for number, state in self.states.items():
            new, old = counts[number], self.before[number]
            if new.matched != old.matched:
                state.count(new.matched - old.matched, new.passed - old.passed, new.folded - old.folded,
                            self.tracer.take_sample(number, ended) if new.passed != old.passed else None)
        self.before = counts

    def reload(self) -> None:
        """After the tracer's and the aggregator's: what the tables before have counted for output functions, which the
        new ones do not hold."""
        for number, counted in self.tracer.last_outputs.items():
            self.states[number].output.take(counted)
        self.set_filters()

    def retire(self) -> None:
        """Before the tracer's and the aggregator's: the last counts of the filters that end."""
        counts = self.tracer.read_counts()
        for number in set(self.states) - self.tracer.tables.live:
            state, new, old = self.states.pop(number), counts[number], self.before[number]
            state.count(new.matched - old.matched, new.passed - old.passed, new.folded - old.folded,
                        self.tracer.take_sample(number, 0))
            self.before[number] = NO_COUNTS
        for number, member in enumerate(self.tracer.tables.filters):
            if member.spec is None:
                self.before[number] = NO_COUNTS


NO_COUNTS = FilterCounts(0, 0, 0, 0, 0)


class SelfWatch:
    """Says when the agent does not keep up: that it stands still, that it stood still, that its ring fills up, and that
    it is not attached any more. A thread watches the main loop, which cannot speak while it stands still."""

    def __init__(self, tracer: Tracer) -> None:
        self.tracer = tracer
        self.last_tick = time.monotonic()
        self.ticks = 0
        self.told = False     # of the standstill that goes on
        self.behind = False
        self.detached: Set[str] = set()
        self.loop = threading.get_ident()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.watch, name="self-watch", daemon=True)
        self.thread.start()

    def watch(self) -> None:
        """The thread."""
        while not self.ended.wait(1.0):
            late = time.monotonic() - self.last_tick
            if late > STANDSTILL and not self.told:
                self.told = True
                say(f"stands still: no second has been closed for {late:.0f} s; it is at {self.place()}")

    def place(self) -> str:
        """The function of ours that the main loop is in."""
        frame = sys._current_frames().get(self.loop)
        while frame is not None and frame.f_code.co_filename != __file__:
            frame = frame.f_back
        return f"{frame.f_code.co_name}(), line {frame.f_lineno}" if frame is not None else "its start"

    def tick(self) -> None:
        """A second is over, and its alerts are handed over."""
        now = time.monotonic()
        late, self.last_tick, self.told = now - self.last_tick, now, False
        if late > STANDSTILL:
            say(f"stood still for {late:.0f} s: what was counted meanwhile is in one alert for each filter")
        self.ticks += 1
        self.watch_ring()
        if self.ticks % LINK_CHECK == 0:
            self.watch_links()

    def watch_ring(self) -> None:
        """Once when it is half full, and again when it had been almost empty in between."""
        waiting, size = self.tracer.ring_use()["events"]
        if waiting > size // 2 and not self.behind:
            self.behind = True
            say(f"falls behind: {100 * waiting // size}% of the ring buffer wait; fewer events or cheaper rules in "
                "Python help, and for a burst a larger --ring-size")
        elif self.behind and waiting < size // 10 and not self.tracer.held:
            self.behind = False
            say("has caught up")

    def watch_links(self) -> None:
        for place in self.tracer.lost_attachments():
            if place not in self.detached:
                self.detached.add(place)
                say(f"is not attached to {place} any more: its events are not seen; start it again")

    def stop(self) -> None:
        self.ended.set()
        self.thread.join()


def is_there(pid: int) -> bool:
    """Whether there is such a process; /proc may hide it, once the capabilities are gone."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


class HostWatch:
    """Says once that io_uring is in use, since what it does is seen as no syscall, and that a selected process ends."""

    def __init__(self, tracer: Tracer) -> None:
        self.tracer, self.said = tracer, False
        self.pids = {pid for wanted in tracer.plan.values() for pid in wanted.pids}

    def tick(self) -> None:
        ended = {pid for pid in self.pids if not is_there(pid)}
        self.pids -= ended
        for pid in sorted(ended):
            say(f"process {pid} has ended" + ("" if self.pids or self.tracer.follow or any(
                wanted.any_process for wanted in self.tracer.plan.values()) else ": nothing is traced any more"))
        counts = {} if self.said else self.tracer.uring_counts()
        if counts:
            self.said = True
            say(f"warning: io_uring is in use on this host ({format_opcodes(counts)} so far): what it does is not seen "
                "as syscalls")


def format_opcodes(counts: Mapping[int, int]) -> str:
    """`5 submissions: 3 of opcode 18, 2 of opcode 22` (enum io_uring_op, include/uapi/linux/io_uring.h)."""
    names = ", ".join(f"{count} of {URING_OPCODE_NAMES.get(opcode, f'opcode {opcode}')}"
                      for opcode, count in sorted(counts.items(), key=lambda item: -item[1])[:4])
    return f"{sum(counts.values())} submissions: {names}"


URING_OPCODE_NAMES = {  # those that have a syscall of their own
    1: "readv", 2: "writev", 3: "fsync", 9: "sendmsg", 10: "recvmsg", 13: "accept", 16: "connect", 18: "openat",
    19: "close", 21: "statx", 22: "read", 23: "write", 26: "send", 27: "recv", 28: "openat2", 34: "shutdown",
    35: "renameat", 36: "unlinkat", 37: "mkdirat", 38: "symlinkat", 39: "linkat",
}


class Rates:
    """Totals to per-second rates, for the status line."""

    def __init__(self) -> None:
        self.before: Dict[str, int] = {}
        self.since = time.monotonic()

    def format(self, totals: Mapping[str, int]) -> str:
        """`matched 80124/s  passed 801/s  alerts 1/s  lost 0/s`."""
        now = time.monotonic()
        elapsed, self.since = max(now - self.since, 0.001), now
        shown = "  ".join(f"{name} {(count - self.before.get(name, 0)) / elapsed:.0f}/s"
                          for name, count in totals.items())
        self.before = dict(totals)
        return shown


class StatusLine:
    """One line on a terminal's stderr, rewritten each second; nothing when stderr is no terminal.

    With `prints`, stdout is for people too: on one and the same terminal they would get in each other's way.
    """

    def __init__(self, totals: Callable[[], Mapping[str, int]], prints: bool = False) -> None:
        self.totals, self.rates = totals, Rates()
        self.enabled = sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and not (prints and os.isatty(1))

    def tick(self) -> None:
        if self.enabled:
            with contextlib.suppress(OSError):  # the terminal is gone
                width = os.get_terminal_size(2).columns - 1
                sys.stderr.write(CLEAR_LINE + self.rates.format(self.totals())[:max(width, 0)])
                sys.stderr.flush()

    def clear(self) -> None:
        if self.enabled:
            sys.stderr.write(CLEAR_LINE)
            sys.stderr.flush()


class Printer:
    """Events to stdout, one line each, in the accounting of their event type."""

    CHUNK = 4096  # PIPE_BUF: as much as a pipe that select() calls writable takes without blocking
    BATCH = 64    # lines that are delivered or lost together

    def __init__(self, names: Iterable[str], stop: StopSignals) -> None:
        self.accounts = {name: Account(name, name) for name in names}
        self.stop = stop
        self.failed = False  # nobody reads any more

    def print_records(self, records: List[bytes]) -> None:
        """Stops the run when nobody reads any more; what is not written by then is lost."""
        for begin in range(0, len(records), self.BATCH):
            batch = records[begin:begin + self.BATCH]
            text = "\n".join(map(format_record, batch)) + "\n"
            events = collections.Counter(map(record_event, batch))
            self.settle({EVENT_NAMES[number]: count for number, count in events.items()},
                        self.write(text.encode("utf-8", "backslashreplace")))

    def settle(self, counts: Mapping[str, int], written: bool) -> None:
        for name, count in counts.items():
            account = self.accounts[name]
            account.matched += count
            account.passed += count
            account.alerts += count
            if written:
                account.deliver(count)
            else:
                account.lose("not_written", count)

    def write(self, data: bytes) -> bool:
        """Whether all of it was written; a reader that stalls is waited for until a signal stops the run."""
        while data and not self.failed:
            try:
                if select.select([], [1], [], POLL_INTERVAL)[1]:
                    data = data[os.write(1, data[:self.CHUNK]):]
                elif self.stop.stopped:
                    self.failed = True
            except OSError as error:
                if error.errno != errno.EPIPE:
                    say(f"cannot write to stdout: {error.strerror}")
                self.failed = self.stop.stopped = True
        return not data


# ======================================================================================================================
# Metrics: Prometheus' text format and OpenMetrics over HTTP, served from the main loop
# ======================================================================================================================

Labels = Dict[str, str]
Figures = Dict[str, List[Tuple[Labels, float]]]  # key of METRICS -> values


class Metric(NamedTuple):
    """One metric family. A counter's values are named `NAME_total`, an info's `NAME_info`."""

    kind: str  # counter, gauge or info
    unit: str  # which the name ends in
    help: str


METRICS: Dict[str, Metric] = {
    # family                                 kind       unit       help
    "traceleft_build":                Metric("info",    "",        "The program that is running."),
    "traceleft_filter_matched_events": Metric("counter", "events", "Events that the filter's rule is true for."),
    "traceleft_filter_passed_events": Metric("counter", "events",  "Events that its processing function let through."),
    "traceleft_filter_folded_events": Metric("counter", "events",  "Events that matched, but did not pass."),
    "traceleft_filter_delivered_events": Metric("counter", "events", "Events that delivered alerts stand for."),
    "traceleft_filter_lost_events":   Metric("counter", "events",  "Events that passed but were not delivered."),
    "traceleft_filter_alerts":        Metric("counter", "",        "Records that were handed to the filter's channel."),
    "traceleft_unseen_events":        Metric("counter", "events",  "Events that no filter in Python has seen."),
    "traceleft_missed":               Metric("counter", "",        "What the kernel side could not follow."),
    "traceleft_lost_samples":         Metric("counter", "",        "Alerts whose sample did not fit into the ring."),
    "traceleft_ring_size_bytes":      Metric("gauge",   "bytes",   "Size of a ring buffer."),
    "traceleft_ring_used_bytes":      Metric("gauge",   "bytes",   "What is in a ring buffer and has not been read."),
    "traceleft_program_runs":         Metric("counter", "",        "Runs of a BPF program, while BPF stats are on."),
    "traceleft_program_run_seconds":  Metric("counter", "seconds", "Time of a BPF program, while BPF stats are on."),
    "traceleft_channel_queued":       Metric("gauge",   "",        "Alerts that wait for a channel."),
    "traceleft_channel_queued_bytes": Metric("gauge",   "bytes",   "Size of the alerts that wait for a channel."),
    "traceleft_channel_sends":        Metric("counter", "",        "Writes or streams that succeeded."),
    "traceleft_channel_failures":     Metric("counter", "",        "Writes or streams that failed."),
    "traceleft_channel_reconnects":   Metric("counter", "",        "Times that a channel was opened again."),
    "process_cpu_seconds":            Metric("counter", "seconds", "Time on a CPU, of the agent itself."),
    "process_resident_memory_bytes":  Metric("gauge",   "bytes",   "Resident memory of the agent."),
    "process_open_fds":               Metric("gauge",   "",        "Open descriptors of the agent."),
    "process_start_time_seconds":     Metric("gauge",   "seconds", "When it started, in seconds since 1970."),
}
SUFFIXES = {"counter": "_total", "gauge": "", "info": "_info"}
FILTER_FIGURES = ("matched", "passed", "folded", "delivered")
CHANNEL_FIGURES = ("queued", "queued_bytes", "sends", "failures", "reconnects")  # of Channel.figures()
# What a channel's alerts can be lost for: said from the start as 0, so that a query sees the first one as an increase.
LOSS_CAUSES = {"file": ("queue_full", "write_failed"),
               "grpc": ("queue_full", "not_acknowledged", "rejected", "in_spool", "spool_damaged"),
               "": ("not_written",)}  # printing

assert all(name.endswith(f"_{metric.unit}") for name, metric in METRICS.items() if metric.unit)


def filter_figures(figures: Figures, account: Account, spec: Optional[Filter], channel_type: str) -> None:
    """Adds one account's values."""
    labels = {"filter": account.id, "event": account.event}
    if spec is not None:
        labels.update(channel=spec.channel, stream=spec.stream, group=spec.group)
    with account.lock:
        lost = {**dict.fromkeys(LOSS_CAUSES.get(channel_type, ()), 0), **account.lost}
        for name in FILTER_FIGURES:
            figures[f"traceleft_filter_{name}_events"].append((labels, getattr(account, name)))
    figures["traceleft_filter_alerts"].append((labels, account.alerts))
    figures["traceleft_filter_lost_events"] += [({**labels, "cause": cause}, count) for cause, count in lost.items()]


def tracer_figures(figures: Figures, tracer: Tracer) -> None:
    """Adds what the kernel side says."""
    for event, causes in tracer.unseen().items():
        labels = {"event": event, "cause": "ring_full"}
        figures["traceleft_unseen_events"].append((labels, causes.get("ring_full", 0)))
    figures["traceleft_lost_samples"].append(({}, tracer.lost_samples()))
    missed = tracer.missed()
    figures["traceleft_missed"] += [({"cause": cause}, missed.get(cause, 0)) for cause in MISSED]
    for ring, (used, size) in tracer.ring_use().items():
        figures["traceleft_ring_used_bytes"].append(({"ring": ring}, used))
        figures["traceleft_ring_size_bytes"].append(({"ring": ring}, size))
    for program, (seconds, runs) in tracer.run_times().items():
        figures["traceleft_program_runs"].append(({"program": program}, runs))
        figures["traceleft_program_run_seconds"].append(({"program": program}, seconds))


def process_figures() -> Figures:
    """The agent itself, and what it is."""
    build = {"version": VERSION, "python": platform.python_version(), "kernel": platform.release(),
             "machine": platform.machine()}
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
    return {"traceleft_build": [(build, 1)], "process_cpu_seconds": [({}, time.process_time())],
            "process_resident_memory_bytes": [({}, resident)],
            "process_open_fds": [({}, len(os.listdir("/proc/self/fd")))],
            "process_start_time_seconds": [({}, started_at())]}


@functools.lru_cache(None)
def started_at() -> float:
    """When this process started, in Unix time: found out once, so that it is the same in every answer."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return round(time.time() - boot_time() + ticks / os.sysconf("SC_CLK_TCK"), 2)


def run_figures(tracer: Tracer, accounts: Iterable[Account], spec: Optional[Spec] = None,
                channels: Optional[Mapping[str, Any]] = None) -> Figures:
    """All that there is to say of a run: `channels` are the spec's."""
    figures: Figures = collections.defaultdict(list, process_figures())
    filters = {member.id: member for member in spec.filters} if spec else {}
    types = {channel.id: channel.type for channel in spec.channels} if spec else {}
    for account in accounts:
        member = filters.get(account.id)
        filter_figures(figures, account, member, types[member.channel] if member else "")
    tracer_figures(figures, tracer)
    for name, channel in (channels or {}).items():
        found = channel.figures()
        for figure in CHANNEL_FIGURES:
            if figure in found:
                figures[f"traceleft_channel_{figure}"].append(({"channel": name, "type": types[name]}, found[figure]))
    return figures


LABEL_ESCAPES = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n"})


def format_labels(labels: Labels) -> str:
    shown = ",".join(f'{name}="{wire_text(value).translate(LABEL_ESCAPES)}"' for name, value in labels.items())
    return f"{{{shown}}}" if shown else ""


def format_metrics(figures: Figures, openmetrics: bool) -> bytes:
    """The text format, version 0.0.4, or OpenMetrics 1.0.0, in the order of METRICS."""
    lines = []
    for name, metric in METRICS.items():
        if name not in figures:
            continue
        sample = name + SUFFIXES[metric.kind]
        family, kind = (name, metric.kind) if openmetrics else (sample, metric.kind.replace("info", "gauge"))
        lines.append(f"# HELP {family} {metric.help}")
        lines.append(f"# TYPE {family} {kind}")
        if openmetrics and metric.unit:
            lines.append(f"# UNIT {family} {metric.unit}")
        lines += [f"{sample}{format_labels(labels)} {value}" for labels, value in figures[name]]
    return "".join(line + "\n" for line in [*lines, *(["# EOF"] if openmetrics else [])]).encode()


# Content types, without and with OpenMetrics
TEXT_TYPES = ("text/plain; version=0.0.4; charset=utf-8", "application/openmetrics-text; version=1.0.0; charset=utf-8")


def prefers_openmetrics(accept: str) -> bool:
    """Whether an Accept header weighs OpenMetrics at least as much as plain text, and at all."""
    weights = {"application/openmetrics-text": 0.0, "text/plain": 0.0}
    for part in accept.split(","):
        kind, *parameters = (word.strip() for word in part.split(";"))
        quality = next((word[2:] for word in parameters if word.startswith("q=")), "1")
        if kind in weights and re.fullmatch(r"[01](\.\d{0,3})?", quality):
            weights[kind] = max(weights[kind], float(quality))
    return weights["application/openmetrics-text"] >= max(weights["text/plain"], 0.001)


@dataclass
class HttpClient:
    """One connection: what has come so far, and then what is left to send."""

    socket: socket.socket
    deadline: float  # monotonic seconds
    received: bytes = b""
    response: Sequence[memoryview] = ()


class MetricsServer:
    """An HTTP server that never blocks: `fileno()` is readable when serve() has something to do.

    However many clients there are and whatever they do, it holds MAX_CLIENTS connections, reads MAX_REQUEST bytes of
    each, gives it CLIENT_TIMEOUT seconds in all, and takes the figures at most once in MAX_AGE seconds.
    """

    MAX_CLIENTS, MAX_REQUEST = 16, 8192
    CLIENT_TIMEOUT, MAX_AGE = 10.0, 0.5  # seconds
    INDEX = b"traceleft.py: the metrics are at /metrics\n"

    def __init__(self, address: Tuple[str, int]) -> None:
        """Listens. Raises TraceleftError when it cannot listen there."""
        self.figures: Callable[[], Figures] = dict  # set when there are some
        self.clients: Dict[socket.socket, HttpClient] = {}  # the oldest first
        self.rendered: Dict[bool, Tuple[float, bytes]] = {}  # OpenMetrics or not -> when, and the text
        try:
            family, _, _, _, place = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0]
            self.listener = socket.create_server(place[:2], family=family, backlog=self.MAX_CLIENTS)
        except (OSError, UnicodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "that is no host's name"
            raise TraceleftError(f"--metrics: cannot listen on {escape(address[0])} port {address[1]}: {reason}; "
                                 "'ss -ltnp' tells who has a port") from None
        self.listener.setblocking(False)
        self.selector = selectors.EpollSelector()
        self.selector.register(self.listener, selectors.EVENT_READ)

    @property
    def url(self) -> str:
        host, port = self.listener.getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/metrics"

    @property
    def is_local(self) -> bool:
        """Whether only this host's users reach it."""
        return ipaddress.ip_address(self.listener.getsockname()[0].partition("%")[0]).is_loopback

    def fileno(self) -> int:
        return self.selector.fileno()

    def serve(self) -> None:
        """Does what can be done at once."""
        for key, _ in self.selector.select(0):
            if key.fileobj is self.listener:
                self.accept()
            else:
                self.advance(key.data)
        now = time.monotonic()
        for client in list(itertools.takewhile(lambda client: client.deadline < now, self.clients.values())):
            self.drop(client)

    def accept(self) -> None:
        try:
            connection, _ = self.listener.accept()
        except OSError as error:  # it has gone again
            if error.errno in (errno.EMFILE, errno.ENFILE) and self.clients:  # else the loop would not rest
                self.drop(next(iter(self.clients.values())))
            return
        if len(self.clients) >= self.MAX_CLIENTS:
            self.drop(next(iter(self.clients.values())))
        connection.setblocking(False)
        client = self.clients[connection] = HttpClient(connection, time.monotonic() + self.CLIENT_TIMEOUT)
        self.selector.register(connection, selectors.EVENT_READ, client)

    def advance(self, client: HttpClient) -> None:
        """Reads or writes once."""
        if client.socket not in self.clients:  # dropped for another one that came in the same round
            return
        try:
            done = self.send(client) if client.response else self.receive(client)
        except BlockingIOError:
            return
        except OSError:
            done = True
        if done:
            self.drop(client)

    def receive(self, client: HttpClient) -> bool:
        """Whether the client is through with."""
        data = client.socket.recv(self.MAX_REQUEST)
        client.received += data
        if b"\r\n\r\n" not in client.received and b"\n\n" not in client.received:
            if len(client.received) <= self.MAX_REQUEST:
                return not data
            client.response = http_response("431 Request Header Fields Too Large")
        else:
            client.response = self.answer(client.received)
        self.selector.modify(client.socket, selectors.EVENT_WRITE, client)
        return False

    @staticmethod
    def send(client: HttpClient) -> bool:
        """Whether all of the response has been sent."""
        first, *rest = client.response
        first = first[client.socket.send(first):]
        client.response = [first, *rest] if first else rest
        return not client.response

    def answer(self, request: bytes) -> Sequence[memoryview]:
        """The response to a request's head."""
        lines = request.decode("latin-1").splitlines()
        words = lines[0].split(" ") if lines else []
        if len(words) != 3 or not words[2].startswith("HTTP/1."):
            return http_response("400 Bad Request")
        method, path = words[0], words[1].partition("?")[0]
        if method not in ("GET", "HEAD"):
            return http_response("405 Method Not Allowed", headers="Allow: GET, HEAD\r\n")
        if path not in ("/", "/metrics"):
            return http_response("404 Not Found")
        if path == "/":
            return http_response("200 OK", self.INDEX, head_only=method == "HEAD")
        accept = ",".join(line.partition(":")[2] for line in lines if line.lower().startswith("accept:"))
        openmetrics = prefers_openmetrics(accept)
        try:
            text = self.text(openmetrics)
        except OSError as error:  # of /proc, or of the kernel's figures of a program: no reason to stop tracing
            return http_response("500 Internal Server Error", f"{error}\n".encode())
        return http_response("200 OK", text, TEXT_TYPES[openmetrics], head_only=method == "HEAD")

    def text(self, openmetrics: bool) -> bytes:
        """The metrics, at most MAX_AGE seconds old."""
        now = time.monotonic()
        when, text = self.rendered.get(openmetrics, (-self.MAX_AGE, b""))
        if now - when >= self.MAX_AGE:
            text = format_metrics(self.figures(), openmetrics)
            self.rendered[openmetrics] = now, text
        return text

    def drop(self, client: HttpClient) -> None:
        del self.clients[client.socket]
        self.selector.unregister(client.socket)
        client.socket.close()

    def close(self) -> None:
        for client in list(self.clients.values()):
            self.drop(client)
        self.selector.close()
        self.listener.close()


def http_response(status: str, body: Optional[bytes] = None, content_type: str = "text/plain; charset=utf-8",
                  headers: str = "", head_only: bool = False) -> Sequence[memoryview]:
    """Head and body, the body without a copy; without one, it is the status."""
    body = f"{status}\n".encode() if body is None else body
    head = (f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n{headers}"
            "Connection: close\r\n\r\n").encode()
    return [memoryview(head)] if head_only or not body else [memoryview(head), memoryview(body)]


# ======================================================================================================================
# Who watches a run from outside: Prometheus, and the service manager by sd_notify(3)
# ======================================================================================================================


class ServiceManager:
    """Sends datagrams to $NOTIFY_SOCKET, as systemd gives it to services of Type=notify; without it, none.

    A manager that does not take them is no reason to stop tracing: what cannot be sent at once is left out.
    """

    def __init__(self) -> None:
        self.address = os.environ.pop("NOTIFY_SOCKET", "")
        self.socket: Optional[socket.socket] = None
        if self.address[:1] in ("/", "@"):
            self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self.socket.setblocking(False)
            self.address = self.address.replace("@", "\0", 1) if self.address[0] == "@" else self.address
        elif self.address:
            say(f"warning: NOTIFY_SOCKET is {escape(self.address)}, and only unix sockets are known (/… and @…)")
        watchdog = os.environ.get("WATCHDOG_USEC", "")
        if self.socket is not None and watchdog.isdigit() and int(watchdog) < 2_000_000:
            say("warning: WatchdogSec= is less than 2 s, and the sign of life comes once a second")

    def send(self, *assignments: str) -> None:
        """Texts such as `READY=1`, in one datagram."""
        if self.socket is not None:
            with contextlib.suppress(OSError):
                self.socket.sendto("\n".join(assignments).encode("utf-8", "backslashreplace"), self.address)

    def close(self) -> None:
        if self.socket is not None:
            self.socket.close()


class Watchers:
    """Both, as the commands use them. They are told of each second, so that a loop that stalls is found out."""

    def __init__(self, metrics: Optional[Tuple[str, int]] = None) -> None:
        """`metrics`: where to serve them, if at all. Raises TraceleftError when that cannot be."""
        self.server = None if metrics is None else MetricsServer(metrics)
        self.manager = ServiceManager()
        self.status: Callable[[], str] = lambda: ""  # one line for people
        if self.server is not None:
            say(f"metrics: {self.server.url}")
            if not self.server.is_local:
                say("warning: whoever reaches this host can read the metrics: there is no authentication")

    def ready(self) -> None:
        self.manager.send("READY=1", f"STATUS={self.status()}")

    def tick(self) -> None:
        """A second is over, and its alerts are handed over: the watchdog's sign of life."""
        self.manager.send("WATCHDOG=1", f"STATUS={self.status()}")

    def stopping(self) -> None:
        self.manager.send("STOPPING=1")

    def serve(self) -> None:
        if self.server is not None:
            self.server.serve()

    def close(self) -> None:
        if self.server is not None:
            self.server.close()
        self.manager.close()


# ======================================================================================================================
# Collector: the receiving end of a grpc channel
# ======================================================================================================================


class Received(NamedTuple):
    """One line of the collector's table: who and what."""

    host: str
    event: str


@dataclass(frozen=True)
class Tally:
    """What has come from one filter of one host."""

    host: str
    event: str
    filter: str            # "" from an agent that does not say
    count: int = 0         # events: the sum of Count
    alerts: int = 0
    lost: int = 0          # passed events that the agent has lost, as it says
    received: float = 0.0  # when its latest alert came, monotonic seconds
    last_count: int = 0
    sample: str = ""       # of that alert, as text of one line

    @property
    def key(self) -> Tuple[str, str, str]:
        return self.host, self.event, self.filter


MAX_RECEIVED_STREAM = 64 << 20  # bytes of one stream, more than an agent's whole queue
MAX_STREAM_TIME = 30.0         # seconds that one stream may take: an agent gives up after a third of that
MAX_RECEIVED_AGENTS = 65536    # whose latest Sequence is known
MAX_RECEIVED_ROWS = 10000      # what comes later is counted together, as `other`
MAX_RECEIVED_NAME = 256        # characters of a host's or an event's name


class CollectorTls(NamedTuple):
    """What a collector with TLS needs, as the content of PEM files."""

    cert: bytes
    key: bytes
    client_ca: Optional[bytes] = None  # with it, only clients with a certificate that it has signed are let in


def agent_digest(agent: str) -> bytes:
    """What is kept of the name, which may be long."""
    return blake2b(agent.encode(), digest_size=16).digest()


class Collector:
    """Counts received Metrics per host and event name; its server runs in threads of grpcio."""

    def __init__(self, address: str, tls: Optional[CollectorTls] = None, token: str = "",
                 show: Optional[Callable[[bytes], bool]] = None) -> None:
        """Listens. Raises HostError without grpcio and TraceleftError when it cannot listen there.

        With a token, only streams that carry it are accepted. `show` takes alerts as lines of JSON; what it has not
        taken is not acknowledged.
        """
        self.show = show
        self.grpc = import_optional("grpc")
        self.wire = build_wire()
        self.lock = threading.Lock()
        self.rows: Dict[Tuple[str, str, str], Tally] = {}
        self.keeps_samples = False  # somebody looks at them
        self.latest: Dict[bytes, int] = collections.OrderedDict()  # digest of an agent -> its latest Sequence
        self.token = f"Bearer {token}".encode() if token else b""
        self.streams: Dict[Any, float] = {}  # under way -> since when, monotonic seconds
        futures = importlib.import_module("concurrent.futures")
        self.server = self.grpc.server(futures.ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
        handler = self.grpc.stream_unary_rpc_method_handler(
            self.process, request_deserializer=self.wire["Metric"].FromString,
            response_serializer=lambda message: message.SerializeToString())
        service, method = WIRE_METHOD[1:].split("/")
        self.server.add_generic_rpc_handlers((self.grpc.method_handlers_generic_handler(service, {method: handler}),))
        try:
            if tls is None:
                self.port = self.server.add_insecure_port(address)
            else:
                self.port = self.server.add_secure_port(address, self.grpc.ssl_server_credentials(
                    [(tls.key, tls.cert)], tls.client_ca, tls.client_ca is not None))
        except RuntimeError:
            self.port = 0
        if not self.port:
            raise TraceleftError(f"cannot listen on {address}: the port is taken ('ss -ltnp' tells by whom) or the "
                                 "address is not this host's; --listen HOST:PORT takes another")
        self.server.start()

    def process(self, stream: Iterable[Any], context: Any) -> Any:
        """The rpc: counts a stream's metrics once it is complete, since an incomplete one is sent again."""
        self.check_token(context)
        metrics = self.read_stream(stream, context)
        with self.lock:
            before = {agent: self.latest.get(agent, 0) for agent in map(agent_digest, {one.Agent for one in metrics})}
            new = [metric for metric in metrics if not self.is_double(metric.Agent, metric.Sequence)]
            shown = self.show is None or self.show(b"".join(metric_json(metric, context.peer()) for metric in new))
            for metric in new if shown else ():
                self.count(metric, context.peer())
            if not shown:  # when they come again, they are no doubles
                self.latest.update(before)
        if not shown:
            context.abort(self.grpc.StatusCode.UNAVAILABLE, "the collector cannot write what it receives")
        return self.wire["Empty"]()

    def read_stream(self, stream: Iterable[Any], context: Any) -> List[Any]:
        """All of a stream; ends the rpc of one that is too large."""
        metrics, size = [], 0
        self.streams[context] = time.monotonic()
        try:
            for metric in stream:
                metrics.append(metric)
                size += metric.ByteSize()
                if size > MAX_RECEIVED_STREAM:
                    context.abort(self.grpc.StatusCode.RESOURCE_EXHAUSTED,
                                  f"a stream has at most {MAX_RECEIVED_STREAM} bytes")
        finally:
            del self.streams[context]
        return metrics

    def check_token(self, context: Any) -> None:
        """Ends the rpc when it does not carry the token."""
        given = dict(context.invocation_metadata()).get("authorization", "")
        compare = importlib.import_module("hmac").compare_digest  # in a time that tells nothing
        if self.token and not compare(given.encode("utf-8", "replace"), self.token):
            context.abort(self.grpc.StatusCode.UNAUTHENTICATED, "the token is missing or wrong")

    def is_double(self, agent: str, sequence: int) -> bool:
        """Whether it has been counted: it was sent again, because our acknowledgement did not arrive."""
        if not agent:
            return False  # of an agent that does not number what it sends
        digest = agent_digest(agent)
        latest = self.latest.pop(digest, 0)
        self.latest[digest] = max(latest, sequence)  # those that sent last are last
        if len(self.latest) > MAX_RECEIVED_AGENTS:
            del self.latest[next(iter(self.latest))]
        return sequence <= latest

    def count(self, metric: Any, peer: str) -> None:
        names = (metric.Host or peer, metric.CommonEvent.Name, metric.Filter)
        host, event, filter_id = (name[:MAX_RECEIVED_NAME] for name in names)
        if (host, event, filter_id) not in self.rows and len(self.rows) >= MAX_RECEIVED_ROWS:
            host, event, filter_id = "other", "other", ""
        tally = self.rows.get((host, event, filter_id)) or Tally(host, event, filter_id)
        self.rows[tally.key] = replace(
            tally, count=tally.count + metric.Count, alerts=tally.alerts + 1, lost=tally.lost + metric.Lost,
            received=time.monotonic(), last_count=metric.Count,
            sample=format_metric(metric) if self.keeps_samples else "")

    def cancel_stalled(self) -> None:
        """Ends streams whose sender does not go on: each holds one of the threads. To be called now and then."""
        for context, since in list(self.streams.items()):
            if time.monotonic() - since > MAX_STREAM_TIME:
                context.cancel()

    def snapshot(self) -> Dict[Received, Tuple[int, int]]:
        """Per host and event: (sum of Count, number of alerts)."""
        found: Dict[Received, Tuple[int, int]] = {}
        for tally in sorted(self.tallies(), key=lambda tally: tally.key):
            count, alerts = found.get(Received(tally.host, tally.event), (0, 0))
            found[Received(tally.host, tally.event)] = count + tally.count, alerts + tally.alerts
        return found

    def tallies(self) -> List[Tally]:
        """Per host, event and filter."""
        with self.lock:
            return list(self.rows.values())

    def stop(self) -> None:
        """Lets streams that are under way finish."""
        self.server.stop(1.0).wait()


def format_received(before: Mapping[Received, Tuple[int, int]], after: Mapping[Received, Tuple[int, int]],
                    seconds: float, with_rates: bool = True) -> List[str]:
    """One line per host and event that something came for."""
    lines = []
    for key, (count, alerts) in after.items():
        new = count - before.get(key, (0, 0))[0]
        rate = f"count {new} rate {new / seconds:.0f}/s " if with_rates else ""
        if (count, alerts) != before.get(key):
            lines.append(f"host {escape(key.host)} event {escape(key.event)} {rate}total {count} alerts {alerts}")
    return lines


def format_metric(metric: Any) -> str:
    """`pid 4242 sh ret 3 filename "/tmp/a.txt" flags 577 mode 438`, of at most MAX_SHOWN_SAMPLE characters."""
    common = metric.CommonEvent
    if common.Flags & FLAG_NO_SAMPLE:
        return "none: there was no room for it"
    words = [f"pid {common.Pid}", escape(decode_text(common.Comm)), f"ret {common.Ret}"]
    for member, message in metric.ListFields():
        if member.name.endswith("Event") and member.name not in ("CommonEvent", "SyscallEvent"):
            words += [f"{part.name} {format_wire(part.name, getattr(message, part.name))}"
                      for part in message.DESCRIPTOR.fields]
        elif member.name == "SyscallEvent":
            words += [f"{escape(part.Name)} {format_wire('', part.Text or part.Integer)}" for part in message.Arguments]
    return " ".join(filter(None, words))[:MAX_SHOWN_SAMPLE]


def metric_json(metric: Any, peer: str) -> bytes:
    """An alert as one object on one line. What is not above the latest `sequence` of its `agent` was sent again."""
    shown = {
        "time": format_time(metric.Time), "agent": metric.Agent, "sequence": metric.Sequence,
        "host": metric.Host or peer, "filter": metric.Filter, "event": metric.CommonEvent.Name,
        "stream": metric.Stream, "group": metric.Group, "metrics": metric.Metrics, "count": metric.Count,
        "matched": metric.Matched, "lost": metric.Lost, "sample": format_metric(metric)}
    if metric.Kinds:
        shown["kinds"] = [{**{part.Name: decode_text(part.Text) or part.Integer for part in kind.Fields},
                           "count": kind.Count} for kind in metric.Kinds]
        shown["other"] = metric.Other
    return f"{json.dumps(shown)}\n".encode()


def format_wire(name: str, value: Any) -> str:
    """A value of a wire message; addresses of four bytes are in network byte order."""
    if isinstance(value, bytes):
        return f'"{escape(decode_text(value[:MAX_SHOWN_SAMPLE]))}"'
    if name in ("Saddr", "Daddr") and isinstance(value, int):
        return socket.inet_ntop(socket.AF_INET, value.to_bytes(4, sys.byteorder))
    return escape(str(value))


MAX_SHOWN_SAMPLE = 500


def run_lines(collector: Collector, stop: StopSignals, output: TextIO) -> None:
    """Each second a line for each host and event that something came for."""
    before: Dict[Received, Tuple[int, int]] = {}
    last = time.monotonic()
    while not stop.stopped:
        select.select([stop], [], [], 1.0)
        now, after = time.monotonic(), collector.snapshot()
        collector.cancel_stalled()
        output.write("".join(line + "\n" for line in format_received(before, after, max(now - last, 0.001))))
        output.flush()
        before, last = after, now


# ======================================================================================================================
# Screen: what collect shows on a terminal. CollectorView makes lines of text, Terminal brings them to the screen
# ======================================================================================================================

HISTORY_SECONDS = 180
RATE_SECONDS = 5               # a row's rate is the mean over these
BARS, ASCII_BARS = " ▁▂▃▄▅▆▇█", " .:-=+*#%"
MIN_TERMINAL = (20, 5)         # columns and rows of which something is made
KEYS = re.compile(rb"\x1b[\[O][0-9;]*[A-Za-z~]|[\x00-\x7f]")
ENTER_SCREEN = b"\x1b[?1049h\x1b[?25l\x1b[?7l\x1b[2J"  # alternate screen, no cursor, no wrapping
LEAVE_SCREEN = b"\x1b[?7h\x1b[?25h\x1b[?1049l"
PLAIN, TITLE, SELECTED, ALARM = "", "\x1b[1m", "\x1b[7m", "\x1b[31m"


class Line(NamedTuple):
    """One line of a screen, without anything in its text that a terminal acts on."""

    text: str
    style: str = PLAIN


def cell_width(c: str) -> int:
    """The columns of a terminal that a printable character takes."""
    if c < "\u0300":
        return 1
    unicodedata = importlib.import_module("unicodedata")  # a megabyte that most hosts' names do without
    if unicodedata.combining(c) or unicodedata.category(c) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(c) in "WF" else 1


def fit(text: str, width: int, align_right: bool = False) -> str:
    """`text` in exactly `width` columns, cut with a … where it is longer."""
    taken = sum(map(cell_width, text))
    if taken > width:
        kept, taken = [], 0
        for c in text:
            if taken + cell_width(c) >= width:
                break
            kept.append(c)
            taken += cell_width(c)
        text, taken = "".join(kept) + "…" * (width > 0), taken + (width > 0)
    padding = " " * (width - taken)
    return padding + text if align_right else text + padding


def short_number(value: float, width: int) -> str:
    """`1,234,567`, or `1.2M` where that is too wide."""
    text = f"{value:,.0f}"
    for unit in "kMGTPE" if len(text) > width else "":
        value /= 1000
        text = f"{value:.1f}{unit}"
        if value < 1000:
            break
    return text


def short_age(seconds: float) -> str:
    """`3s`, `5m`, `2h` or `4d`."""
    for unit, size in (("s", 60), ("m", 60), ("h", 24)):
        if seconds < size:
            return f"{int(seconds)}{unit}"
        seconds /= size
    return f"{int(seconds)}d"


def sparkline(history: Iterable[float], width: int, bars: str = BARS, ticks: int = 0) -> str:
    """The latest values on `width` columns, each the mean of as many values; the highest is a full bar.

    `ticks` is how many values there have been: the bars then keep what they stand for until they move on.
    """
    values = list(history)
    if width <= 0 or not values:
        return " " * max(width, 0)
    size = max(-(-HISTORY_SECONDS // width), 1)
    means: List[float] = []
    end, begin = len(values), len(values) - (ticks % size or size)
    while end > 0 and len(means) < width:
        part = values[max(begin, 0):end]
        means.append(sum(part) / len(part))
        end, begin = begin, begin - size
    top = max(means) or 1.0
    # rounded up: only nothing is shown as nothing
    return "".join(bars[math.ceil(mean / top * (len(bars) - 1))] for mean in reversed(means)).rjust(width)


class ScreenRow:
    """One host's filter on the screen."""

    def __init__(self, tally: Tally) -> None:
        self.tally = tally
        self.history: Deque[float] = collections.deque(maxlen=HISTORY_SECONDS)  # events per second

    def update(self, tally: Tally, elapsed: float) -> None:
        self.history.append((tally.count - (self.tally.count if self.history else 0)) / elapsed)
        self.tally = tally

    @property
    def rate(self) -> float:
        latest = list(itertools.islice(reversed(self.history), RATE_SECONDS))
        return sum(latest) / len(latest)


class Column(NamedTuple):
    """One column of the table: columns that can do without are left out from the end of DROPPED on."""

    title: str
    least: int
    most: int
    show: Callable[["ScreenRow", int, "CollectorView"], str]
    align_right: bool = True


COLUMNS = (
    Column("HOST", 6, 24, lambda row, width, view: escape(row.tally.host), False),
    Column("FILTER", 8, 24, lambda row, width, view: escape(row.tally.filter or row.tally.event), False),
    Column("EVENT", 6, 14, lambda row, width, view: escape(row.tally.event), False),
    Column("EVENTS/S", 8, 10, lambda row, width, view: short_number(row.rate, width)),
    Column("LAST 3 MINUTES", 15, 60, lambda row, width, view: sparkline(row.history, width, view.bars, view.ticks)),
    Column("TOTAL", 9, 15, lambda row, width, view: short_number(row.tally.count, width)),
    Column("ALERTS", 7, 9, lambda row, width, view: short_number(row.tally.alerts, width)),
    Column("LOST", 6, 9, lambda row, width, view: short_number(row.tally.lost, width)),
    Column("AGO", 4, 4, lambda row, width, view: short_age(view.now - row.tally.received)),
)
DROPPED = ("EVENT", "ALERTS", "AGO", "LAST 3 MINUTES", "HOST", "LOST", "TOTAL")
SORTS: Dict[str, Callable[[ScreenRow], Any]] = {
    # what the key s goes through; names upwards, numbers downwards
    "rate": lambda row: -row.rate, "total": lambda row: -row.tally.count, "alerts": lambda row: -row.tally.alerts,
    "lost": lambda row: -row.tally.lost, "latest": lambda row: -row.tally.received,
    "host": lambda row: row.tally.host, "filter": lambda row: row.tally.filter,
}


def lay_out(width: int) -> List[Tuple[Column, int]]:
    """The columns that have room, with their widths."""
    columns, dropped = list(COLUMNS), list(DROPPED)
    while dropped and sum(column.least + 1 for column in columns) - 1 > width:
        name = dropped.pop(0)
        columns = [column for column in columns if column.title != name]
    widths = [column.least for column in columns]
    spare = width - sum(widths) - len(columns) + 1
    while spare > 0 and any(have < column.most for have, column in zip(widths, columns)):
        for index, column in enumerate(columns):
            if spare > 0 and widths[index] < column.most:
                widths[index] += 1
                spare -= 1
    return list(zip(columns, widths))


class CollectorView:
    """What the screen shows of a collector: a table that can be sorted, totals, and a sample."""

    def __init__(self, where: str, bars: str = BARS) -> None:
        self.where = where
        self.bars: str = bars
        self.rows: Dict[Tuple[str, str, str], ScreenRow] = {}
        self.total: Deque[float] = collections.deque(maxlen=HISTORY_SECONDS)
        self.messages: Deque[str] = collections.deque(maxlen=100)
        self.now: float = time.monotonic()
        self.begin, self.before = self.now, self.now - 1
        self.sort, self.reverse, self.quit = "rate", False, False
        self.selected: Optional[Tuple[str, str, str]] = None
        self.page = 1  # rows of the table that are shown
        self.ticks: int = 0  # updates so far

    def update(self, tallies: Iterable[Tally], now: float) -> None:
        """What the collector has at the monotonic time `now`: once a second."""
        elapsed = max(now - self.before, 0.001)
        self.before = self.now = now
        for tally in tallies:
            row = self.rows.setdefault(tally.key, ScreenRow(tally))
            row.update(tally, elapsed)
        self.ticks += 1
        self.total.append(sum(row.history[-1] for row in self.rows.values()))

    def press(self, key: bytes) -> None:
        """One key; those without a meaning have none."""
        if key in (b"q", b"Q"):
            self.quit = True
        elif key == b"s":
            names = list(SORTS)
            self.sort = names[(names.index(self.sort) + 1) % len(names)]
        elif key == b"r":
            self.reverse = not self.reverse
        elif key in SELECTING:
            self.select(SELECTING[key] * (self.page if key in PAGING else 1))
        elif key == b"\x1b":
            self.selected = None

    def select(self, step: int) -> None:
        keys = [row.tally.key for row in self.sorted_rows()]
        if keys:
            at = keys.index(self.selected) + step if self.selected in keys else 0 if step > 0 else len(keys) - 1
            self.selected = keys[min(max(at, 0), len(keys) - 1)]

    def sorted_rows(self) -> List[ScreenRow]:
        by_name = sorted(self.rows.values(), key=lambda row: row.tally.key)
        return sorted(by_name, key=SORTS[self.sort], reverse=self.reverse)

    def render(self, width: int, height: int) -> List[Line]:
        """The lines of a screen of this size: as many as it has, and all as wide as it is."""
        if width < MIN_TERMINAL[0] or height < MIN_TERMINAL[1]:
            return [Line(fit("too small", width)), *[Line(fit("", width))] * (height - 1)]
        rows = self.sorted_rows()
        sample = self.render_sample(rows, width) if height >= 10 else []
        self.page = max(height - 4 - len(sample), 1)
        columns = lay_out(width)
        titles = " ".join(fit(column.title, size, column.align_right) for column, size in columns)
        lines = [*self.render_head(rows, width), Line(fit(titles, width), SELECTED)]
        lines += [self.render_row(row, columns, width) for row in self.visible(rows)]
        lines += [Line(fit("", width))] * (height - 1 - len(sample) - len(lines))
        order = f"{self.sort}{', reversed' if self.reverse else ''}"
        help_line = f"q quit  s sort: {order}  r reverse  ↑↓ select" if self.bars == BARS else \
            f"q quit  s sort: {order}  r reverse  j k select"
        return [*lines, *sample, Line(fit(self.messages[-1] if self.messages else help_line, width), TITLE)]

    def render_head(self, rows: Sequence[ScreenRow], width: int) -> List[Line]:
        hosts = len({row.tally.host for row in rows})
        events, alerts, lost = (sum(getattr(row.tally, name) for row in rows) for name in ("count", "alerts", "lost"))
        first = (f"traceleft collect on {self.where}: {counted(hosts, 'host')}, {counted(len(rows), 'filter')}, "
                 f"up {short_age(self.now - self.begin)}")
        latest = list(itertools.islice(reversed(self.total), RATE_SECONDS))
        rate = sum(latest) / len(latest) if latest else 0.0
        second = f"{rate:,.0f} events/s, {events:,} in {counted(alerts, 'alert')}, {lost:,} lost  "
        spark = sparkline(self.total, min(max(width - len(second), 0), 60), self.bars, self.ticks)
        return [Line(fit(first, width), TITLE), Line(fit(second + spark, width), ALARM if lost else PLAIN)]

    def render_row(self, row: ScreenRow, columns: Sequence[Tuple[Column, int]], width: int) -> Line:
        text = " ".join(fit(column.show(row, size, self), size, column.align_right) for column, size in columns)
        style = SELECTED if row.tally.key == self.selected else ALARM if row.tally.lost else PLAIN
        return Line(fit(text, width), style)

    def visible(self, rows: Sequence[ScreenRow]) -> Sequence[ScreenRow]:
        """The rows that there is room for, with the selected one among them."""
        at = next((index for index, row in enumerate(rows) if row.tally.key == self.selected), 0)
        begin = min(max(at - self.page // 2, 0), max(len(rows) - self.page, 0))
        return rows[begin:begin + self.page]

    def render_sample(self, rows: Sequence[ScreenRow], width: int) -> List[Line]:
        """The latest sample of the selected row, or else of all."""
        row = self.rows.get(self.selected) if self.selected else max(
            rows, key=lambda row: row.tally.received, default=None)
        if row is None:
            return [Line(fit("nothing has come yet", width)), Line(fit("", width))]
        tally = row.tally
        what = (f"latest sample of {escape(tally.filter or tally.event)} on {escape(tally.host)}, "
                f"{short_age(self.now - tally.received)} ago, one of {tally.last_count:,}:")
        return [Line(fit(what, width), TITLE), Line(fit(f"  {tally.sample}", width))]


SELECTING = {b"\x1b[A": -1, b"\x1bOA": -1, b"k": -1, b"\x1b[B": 1, b"\x1bOB": 1, b"j": 1, b"\x1b[5~": -1, b"\x1b[6~": 1}
PAGING = (b"\x1b[5~", b"\x1b[6~")


def counted(number: int, noun: str) -> str:
    """`1 host`, `2 hosts`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


class Terminal:
    """The terminal of stdout and stdin, as a screen while the context lasts; it is left as it was, however that ends.

    What is said meanwhile goes to `say_line`; after the end it stands on stderr.
    """

    def __init__(self, stop: StopSignals, say_line: Callable[[str], None]) -> None:
        self.stop, self.say_line = stop, say_line
        self.said: List[str] = []
        self.saved: Optional[List[Any]] = None  # of termios; None: stdin is no terminal
        self.reads_keys = os.isatty(0)
        self.suspended = self.entered = False
        self.stale = True    # the terminal may be as somebody else wants it
        self.size = (0, 0)  # of what was painted

    def __enter__(self) -> "Terminal":
        # a Ctrl-\\ would else leave the screen as it is
        handlers = {signal.SIGWINCH: self.wake, signal.SIGCONT: self.resume, signal.SIGTSTP: self.suspend,
                    signal.SIGQUIT: self.stop.stop}
        self.old_handlers = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        SAY_SINKS.append(self.hear)
        try:
            self.enter()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.leave()
        SAY_SINKS.remove(self.hear)
        for number, handler in self.old_handlers.items():
            signal.signal(number, handler)
        for message in self.said:
            say(message)

    def wake(self, number: int, frame: object) -> None:
        """The wake-up descriptor ends wait(); then everything is painted anew."""

    def resume(self, number: int, frame: object) -> None:
        self.stale = True

    def suspend(self, number: int, frame: object) -> None:
        self.suspended = True

    def hear(self, message: str) -> None:
        self.said.append(message)
        self.say_line(message)

    def enter(self) -> None:
        self.entered, self.stale = True, False
        if self.reads_keys:
            self.saved = self.saved or termios.tcgetattr(0)
            mode = termios.tcgetattr(0)
            mode[0] &= ~termios.IXON  # after a Ctrl-S a write would not return
            mode[3] &= ~(termios.ICANON | termios.ECHO)
            mode[6][termios.VMIN], mode[6][termios.VTIME] = 1, 0
            termios.tcsetattr(0, termios.TCSADRAIN, mode)
        self.write(ENTER_SCREEN)

    def leave(self) -> None:
        if not self.entered:
            return
        self.entered = False
        with contextlib.suppress(OSError):  # the terminal is gone
            self.write(LEAVE_SCREEN)
        with contextlib.suppress(OSError, termios.error):
            # in the background it is the shell's by now, and would stop this process
            if self.saved is not None and os.tcgetpgrp(0) == os.getpgrp():
                termios.tcsetattr(0, termios.TCSADRAIN, self.saved)

    def write(self, data: bytes) -> None:
        while data:
            data = data[os.write(1, data):]

    def paint(self, lines: Sequence[Line]) -> None:
        """Writes over what is there, since clearing would flicker. Ends the run when there is no terminal any more."""
        size = len(lines), len(lines[0].text)
        cleared, self.size = "\x1b[2J" if size != self.size else "", size
        shown = "\r\n".join(f"{line.style}{line.text}\x1b[m" if line.style else line.text for line in lines)
        try:
            if self.stale or not self.entered:
                self.enter()
            self.write(f"{cleared}\x1b[H{shown}".encode(sys.stdout.encoding or "ascii", "replace"))
        except (OSError, termios.error):
            self.stop.stopped = True

    def wait(self, seconds: float) -> List[bytes]:
        """Waits for keys, a signal, or that long; returns the keys."""
        watched: List[Any] = [self.stop, 0] if self.reads_keys else [self.stop]
        found = select.select(watched, [], [], max(seconds, 0.0))[0]
        self.stop.drain()
        if self.suspended:
            self.stop_here()
        if 0 not in found:
            return []
        try:
            data = os.read(0, 1024)
        except OSError:
            data = b""
        self.reads_keys = bool(data)  # nothing: the other end is gone
        return KEYS.findall(data)

    def stop_here(self) -> None:
        """What the terminal's Ctrl-Z would have done, had nothing to be put back before."""
        self.suspended = False
        self.leave()
        handler = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)  # returns when the process is continued
        signal.signal(signal.SIGTSTP, handler)


def is_screen(output: TextIO) -> bool:
    """Whether it is a terminal that can be painted on, and this the process that it is for."""
    try:
        return output.isatty() and os.environ.get("TERM", "dumb") != "dumb" and output.fileno() == 1 and \
            os.tcgetpgrp(1) == os.getpgrp()
    except (OSError, ValueError):
        return False


def run_screen(collector: Collector, stop: StopSignals, where: str) -> None:
    """Shows what is received until stopped, or until somebody quits."""
    bars = BARS if (sys.stdout.encoding or "").lower().startswith("utf") else ASCII_BARS
    view = CollectorView(escape(where), bars)
    collector.keeps_samples = True
    with Terminal(stop, view.messages.append) as terminal:
        due = time.monotonic()
        while not stop.stopped and not view.quit:
            now = time.monotonic()
            if now >= due:
                view.update(collector.tallies(), now)
                collector.cancel_stalled()
                due = max(due + 1, now)
            size = shutil.get_terminal_size()
            terminal.paint(view.render(size.columns, size.lines))
            for key in terminal.wait(due - time.monotonic()):
                view.press(key)


def run_collector(collector: Collector, stop: StopSignals, output: TextIO, where: str) -> None:
    """Shows what is received until stopped, on a screen or as lines each second or alert; then the total."""
    if collector.show is not None:
        output = sys.stderr  # for the total
        while not stop.stopped:
            select.select([stop], [], [], 1.0)
            collector.cancel_stalled()
    elif is_screen(output):
        run_screen(collector, stop, where)
        output.write("".join(line + "\n" for line in format_received({}, collector.snapshot(), 1.0, False)))
    else:
        run_lines(collector, stop, output)
    collector.stop()
    totals = collector.snapshot()
    hosts = len({key.host for key in totals})
    output.write(f"total {sum(count for count, _ in totals.values())} in "
                 f"{sum(alerts for _, alerts in totals.values())} alerts from {hosts} host(s)\n")
    output.flush()


# ======================================================================================================================
# Estimate: a spec run live with nothing sent, so that one knows before what it will cost and bring
# ======================================================================================================================

SECONDS_A_DAY = 86400
MAX_TIMING = 2.0  # seconds for the programs' times
ESTIMATE_COLUMNS = ("FILTER", "EVENT", "EVENTS/S", "MATCHED/S", "SHARE", "PASSED/S", "ALERTS/S", "GROUPS", "NS/EVENT")
BPF_STATS_RUN_TIME = 0  # enum bpf_stats_type, include/uapi/linux/bpf.h


class Scale:
    """Stands in for a channel: weighs the alerts, and sends nothing."""

    def __init__(self, spec: ChannelSpec) -> None:
        self.spec = spec
        self.channel: Optional[Channel] = None
        self.records = self.bytes = 0
        self.problem = ""  # why it cannot weigh them

    def prepare(self, accounts: Mapping[str, Account]) -> None:
        try:
            self.channel = make_channel(self.spec, accounts, insecure=True)
            self.channel.prepare()
        except HostError as error:
            self.channel, self.problem = None, error.errors[0]

    def send(self, alert: Alert) -> None:
        self.records += 1
        if self.channel is not None:
            self.bytes += self.channel.weigh(alert)


class FilterEstimate(NamedTuple):
    """What one filter did in the time."""

    spec: Filter
    events: int           # of its type, whether they matched or not
    account: Account
    peak: int             # matched events in the second that had most of them
    groups: Optional[int]  # distinct `by` values; None without `by`
    max_groups: int
    added_ns: Optional[float]  # mean time of the programs behind an event of its type
    reasons: Tuple[str, ...]  # why Python is needed

    def columns(self, seconds: float, ticks: int) -> List[str]:
        """For ESTIMATE_COLUMNS. An alert is of a second that may have begun before, or end after, the run."""
        account = self.account
        share = f"{100 * account.matched / self.events:.3g}%" if self.events else "-"
        return [escape(self.spec.id), self.spec.event,
                *(format_rate(count / seconds) for count in (self.events, account.matched)), share,
                format_rate(account.passed / seconds), format_rate(account.alerts / ticks),
                "-" if self.groups is None else str(self.groups),
                "-" if self.added_ns is None or not self.events else f"{self.added_ns:.0f}"]

    def warnings(self) -> Iterator[str]:
        """What is hardly meant, or costs more than it need."""
        account, parameters = self.account, self.spec.parameters
        threshold, frequency = parameters.get("threshold", 0), parameters.get("frequency", 1)
        if not self.events:
            yield f"no {self.spec.event} event came"
        elif not account.matched:
            yield f"the rule matched none of {self.events} events"
        elif not account.passed and threshold >= self.peak:
            yield f"threshold={threshold} held back everything: no second had more than {self.peak} matching events"
        elif not account.passed and frequency > account.matched:
            yield f"frequency={frequency} let nothing through: only {account.matched} events matched"
        elif not account.passed:
            yield f"{self.spec.processing} let none of {account.matched} matching events through"
        if self.spec.rule is not None and 0 < self.events == account.matched:
            yield f"the rule matched every one of {self.events} events"
        if self.groups is not None and self.groups >= self.max_groups:
            yield f"by: {self.groups} groups are as many as there can be; all later ones are counted as one"
        if self.reasons:
            yield (f"the rule needs Python, for {', '.join(dict.fromkeys(self.reasons))}: what the kernel cannot rule "
                   "out crosses the ring buffer")


def format_rate(value: float) -> str:
    return f"{value:.0f}" if value >= 100 or value == int(value) else f"{value:.2g}"


def format_bytes(count: float) -> str:
    """`1.5 MB`."""
    power = 0
    while count >= 1000 and power < 4:
        count, power = count / 1000, power + 1
    return f"{count:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


class Stopwatch(Watchers):
    """Takes the time until a run is stopped: reading what is left of it can take as long again."""

    def __init__(self) -> None:
        super().__init__()
        self.begin = time.monotonic()
        self.seconds = 0.0

    def stopping(self) -> None:
        self.seconds = time.monotonic() - self.begin


class DryRun:
    """A spec run live, with nothing sent."""

    def __init__(self, spec: Spec, channels: Mapping[str, Any]) -> None:
        """Raises HostError and UsageError."""
        self.tables = Tables(spec.filters)
        self.tracer = Tracer(plan_spec(spec, ()), self.tables)
        self.aggregator = Aggregator(spec, channels, event_time=True,
                                     counted_elsewhere=frozenset(spec.ids) - self.tables.python_ids)
        self.ticks = 0
        self.seconds = 0.0  # that it ran
        self.peaks: Dict[str, int] = {}  # filter -> matched events in the second that had most of them
        self.before: Dict[str, int] = {}
        self.groups: Dict[str, int] = {}  # as Tracer.group_counts()
        self.times: Dict[str, Tuple[float, int]] = {}  # as Tracer.run_times()
        self.timed = False  # this user may have the times
        self.problems: List[str] = []

    def handle(self, records: List[bytes]) -> None:
        self.tracer.held.extend(records)
        deadline = time.monotonic() + MAX_HOLD
        while self.tracer.held and time.monotonic() < deadline:
            self.aggregator.add(self.tracer.decode(self.tracer.held.popleft()))

    def tick(self) -> None:
        self.ticks += 1
        self.aggregator.set_clock(self.tracer.clock_offset_ns)
        self.counts.tick(self.handle)
        self.aggregator.flush(time.time())
        for name, account in self.aggregator.accounts.items():
            self.peaks[name] = max(self.peaks.get(name, 0), account.matched - self.before.get(name, 0))
            self.before[name] = account.matched

    def run(self, seconds: float, stop: StopSignals) -> None:
        """Traces for so long, or until stopped. Raises HostError."""
        tracer = self.tracer
        try:
            tracer.load()
            self.counts = KernelCounts(tracer, self.aggregator)
            with bpf_stats(tracer.bpf) as self.timed:
                tracer.attach()
                self.aggregator.set_clock(tracer.clock_offset_ns)
                watch = Stopwatch()
                run_loop(tracer, self.handle, self.tick, stop, seconds, watch)
            self.tick()
            self.seconds, self.groups, self.times = watch.seconds, tracer.group_counts(), tracer.run_times()
            self.problems = [f"{count} {MISSED[cause]}" for cause, count in tracer.missed().items()] + [
                f"{count} {name} events did not reach Python ({cause}): the figures of rules that need it are too low"
                for name, causes in tracer.unseen().items() for cause, count in causes.items()]
        finally:
            tracer.close()


class Estimate:
    """Two dry runs of a spec: one for what it brings, with another filter for each event type, which every event
    matches; and one of the spec alone for what it costs, since those filters make an event dearer."""

    EVERY = "\0"  # no id of a spec has it

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.scales = {channel.id: Scale(channel) for channel in spec.used_channels}
        parameters = {name: parameter.default for name, parameter in Sigma.parameters.items()}
        events = dict.fromkeys(member.event for member in spec.filters)
        every = [Filter(self.EVERY + name, name, self.EVERY, "", "", "", None, Sigma.name, parameters,
                        AlertsPerSec.name, {}, "text") for name in events]
        self.counting = DryRun(Spec(spec.channels, (*spec.filters, *every)),
                               {**self.scales, self.EVERY: Scale(spec.channels[0])})
        for scale in self.scales.values():
            scale.prepare(self.counting.aggregator.accounts)
        self.timing = DryRun(spec, {channel.id: Scale(channel) for channel in spec.used_channels})

    def run(self, seconds: float, stop: StopSignals) -> None:
        """Raises HostError."""
        self.counting.run(seconds, stop)
        self.timing.run(min(seconds, MAX_TIMING), stop)

    def added_ns(self, event: EventType) -> Optional[float]:
        """The mean times of the programs that an event of this type runs, together."""
        source = Source(event, None, Wanted())
        names = ["tcp_state"] if event.is_tcp else [
            *(["sys_enter"] if source.at_entry or source.silent else []),
            *([] if source.silent else ["every_sys_exit" if self.timing.tracer.sees_all else "sys_exit"])]
        found = [self.timing.times[name] for name in names if self.timing.times.get(name, (0.0, 0))[1]]
        return sum(1e9 * seconds / runs for seconds, runs in found) if found else None

    def filters(self) -> Iterator[FilterEstimate]:
        """In the spec's order."""
        run = self.counting
        reasons = {placement.spec.id: placement.reasons for placement in run.tables.placements}
        for member in self.spec.filters:
            groups = run.groups.get(member.id, len(run.aggregator.states[member.id].processing.groups))
            yield FilterEstimate(member, run.aggregator.accounts[self.EVERY + member.event].matched,
                                 run.aggregator.accounts[member.id], run.peaks.get(member.id, 0),
                                 groups if member.parameters.get("by") else None, run.tables.max_groups,
                                 self.added_ns(EVENT_TYPES[member.event]), reasons[member.id])

    def report(self) -> Iterator[str]:
        """The lines for people: a table of the filters, the channels, the kernel's part, and what is hardly meant."""
        filters, seconds, ticks = list(self.filters()), self.counting.seconds, self.counting.ticks
        yield f"in {seconds:.1f} s on this host, with nothing sent:"
        yield from align([ESTIMATE_COLUMNS, *(found.columns(seconds, ticks) for found in filters)])
        for name, scale in self.scales.items():
            size = format_bytes(scale.bytes / ticks * SECONDS_A_DAY) if scale.channel else "an unknown size"
            more = ", before compression" if scale.spec.type == "grpc" else ""
            yield (f"channel {escape(name)}: about {size} a day, in {scale.records / ticks * SECONDS_A_DAY:.0f} "
                   f"records{more}")
        yield from self.report_times()
        yield from (f"warning: channel {escape(name)}: {scale.problem}" for name, scale in self.scales.items()
                    if scale.problem)
        yield from (f"warning: {problem}" for problem in self.counting.problems)
        for found in filters:
            yield from (f"warning: {escape(found.spec.id)}: {text}" for text in found.warnings())

    def report_times(self) -> Iterator[str]:
        run = self.timing
        if not run.timed:
            yield "kernel: times unknown: BPF stats take CAP_SYS_ADMIN"
        for program, (spent, runs) in sorted(run.times.items()):
            if runs:
                yield (f"kernel: {program} runs {format_rate(runs / run.seconds)}/s, {1e9 * spent / runs:.0f} ns each, "
                       f"{100 * spent / run.seconds:.2g}% of one CPU")


def align(rows: Sequence[Sequence[str]], left: int = 2) -> List[str]:
    """Columns, the first `left` of them to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(word.ljust(width) if i < left else word.rjust(width)
                      for i, (word, width) in enumerate(zip(row, widths))).rstrip() for row in rows]


@contextlib.contextmanager
def bpf_stats(bpf: Libbpf) -> Iterator[bool]:
    """Lets the kernel measure its BPF programs' times meanwhile, and says whether this user may."""
    try:
        fd = bpf.call("bpf_enable_stats", BPF_STATS_RUN_TIME)
    except OSError:
        yield False
        return
    try:
        yield True
    finally:
        os.close(fd)


# ======================================================================================================================
# Schema: the spec's JSON Schema, for editors. It says no to less than SpecParser, and to nothing that that accepts
# ======================================================================================================================

SCHEMA_DIALECT = "http://json-schema.org/draft-07/schema#"  # the one that every editor knows
NO_NUL = "^[^\\u0000]*$"
PARAMETER_PATTERNS: Dict[Callable[[str, EventType], Any], str] = {
    parse_count: r"\s*[0-9]{1,19}\s*",
    parse_by: r"[^;=]*[^;=\s][^;=]*",
    parse_positive: r"\s*0*[1-9][0-9]{0,9}\s*",
    parse_seconds: r"\s*[0-9]{1,10}\s*",
    parse_multiplier: r"\s*0*([2-9]|[1-9][0-9]{1,9})\s*",
    parse_k: r"\s*0*([1-9][0-9]?|100)\s*",
    parse_integer_field: r"\s*[a-z0-9_]+\s*",
    parse_top_by: r"[^;=]*[^;=\s][^;=]*",
}


def schema_text(description: str, least: int = 0, **more: Any) -> Dict[str, Any]:
    """A string; every text of a spec is refused that has a NUL."""
    return {"type": "string", "description": description, **({"minLength": least} if least else {}),
            "pattern": NO_NUL, **more}


def schema_object(description: str, required: Sequence[str], properties: Dict[str, Any]) -> Dict[str, Any]:
    return {"type": "object", "description": description, "properties": properties, "required": list(required),
            "additionalProperties": False}


def schema_when(key: str, value: str, properties: Dict[str, Any]) -> Dict[str, Any]:
    """What else holds when a member has a value."""
    return {"if": {"properties": {key: {"const": value}}, "required": [key]}, "then": {"properties": properties}}


def schema_parameters(key: str, function: str, known: Mapping[str, Parameter]) -> Dict[str, Any]:
    """The text `NAME=VALUE;NAME=VALUE` of a processing or output function, which the member `key` names."""
    pairs = "|".join(rf"\s*{name}\s*={PARAMETER_PATTERNS.get(parameter.parse, '[^;]*')}"
                     for name, parameter in known.items())
    needed = [name for name, parameter in known.items() if parameter.default is None]
    ahead = "".join(rf"(?=(.*;)?\s*{name}\s*=)" for name in needed)
    pattern = rf"^{ahead}(({pairs})(;({pairs}))*;?)?\s*$" if known else r"^\s*$"
    condition = schema_when(key, function, {"parameters": {
        "pattern": pattern, "description": f"NAME=VALUE, separated by ';'. Parameters of {function}: "
                                           f"{', '.join(known) or 'none'}"}})
    if needed:
        condition["then"]["required"] = ["parameters"]
    return condition


def schema_channel() -> Dict[str, Any]:
    channel = schema_object("where alerts go; one that no filter uses is not opened", ("id", "type", "path"), {
        "id": schema_text("a unique name, for events[].channel", 1),
        "type": schema_text("file: appends to a file; grpc: sends to a collector", enum=list(FORMATS)),
        "path": schema_text("of a file channel, the file; of a grpc channel, HOST:PORT", 1),
        "format": schema_text("of a grpc channel, what it speaks; default: what its filters' output.format says",
                              enum=list(FORMATS["grpc"])),
    })
    channel["properties"].update({name: schema_option(name, kind) for name, kind in ALL_CHANNEL_OPTIONS.items()
                                  if name not in channel["properties"]})
    others = {kind: dict.fromkeys(set(ALL_CHANNEL_OPTIONS) - set(options), False)
              for kind, options in CHANNEL_OPTIONS.items()}
    return {**channel, "allOf": [
        schema_when("type", "grpc", {"path": {"pattern": ":[0-9]{1,5}$"}, **dict(sorted(others["grpc"].items()))}),
        schema_when("type", "file", {"format": False, **dict(sorted(others["file"].items()))}),
        schema_when("path", "-", {"rotate": False})]}


OPTION_DESCRIPTIONS = {
    ("rotate", ""): "of a file channel: what becomes of a file that has grown large",
    ("rotate", "max_bytes"): "a record that would make it larger goes to a new file",
    ("rotate", "keep"): "how many old files there are, PATH.1 being the latest; default 5",
    ("rotate", "gzip"): "compress old files; default false",
    ("tls", ""): "of a grpc channel: certificates, other than the host's CAs",
    ("tls", "ca"): "PEM file of the CAs that may have signed the collector's certificate; default: the host's",
    ("tls", "cert"): "PEM file of the certificate that is shown to the collector",
    ("tls", "key"): "PEM file of its key",
    ("tls", "server_name"): "the name in the collector's certificate; default: the host of path",
    ("token_file", ""): "of a grpc channel: file of a token that is sent as bearer, read anew for each stream",
    ("gzip", ""): "of a grpc channel: compress what is sent; the collector has to support it",
    ("spool", ""): "of a grpc channel: where alerts wait that are not acknowledged, also across restarts",
    ("spool", "dir"): "a directory of this channel's own; it is made when it is missing",
    ("spool", "max_bytes"): "how large it may become; default 64 MiB",
}


def schema_option(name: str, kind: type, of: str = "") -> Dict[str, Any]:
    """An option of a channel, or with `of` a member of that option."""
    described = OPTION_DESCRIPTIONS[(of, name) if of else (name, "")]
    if kind is str:
        return schema_text(described, 1)
    if kind is bool:
        return {"type": "boolean", "description": described}
    if kind is int:
        least, most = OPTION_RANGES[of, name]
        return {"type": "integer", "description": described, "minimum": least, "maximum": most}
    required, optional = option_fields(kind)
    option = schema_object(described, list(required), {
        member: schema_option(member, inner, name) for member, inner in {**required, **optional}.items()})
    return {**option, "dependencies": {"cert": ["key"], "key": ["cert"]}} if kind is TlsSpec else option


def schema_filter() -> Dict[str, Any]:
    every_name = sorted({*(row[0] for row in EVENT_ROWS), *SYSCALL_NUMBERS})  # of every architecture
    formats = dict.fromkeys(itertools.chain.from_iterable(FORMATS.values()))
    function = schema_object("which of the matched events pass", ("id",), {
        "id": schema_text("the processing function's name", enum=list(PROCESSING)),
        "parameters": schema_text("NAME=VALUE, separated by ';'"),
    })
    output = schema_object("what is sent of the events that passed", ("metrics", "format"), {
        "metrics": schema_text("alerts_per_sec: one alert for each second in which something passed; top_per_sec and "
                               "histogram: the same, and how many of the events were of which kind",
                               enum=list(OUTPUTS)),
        "parameters": schema_text("NAME=VALUE, separated by ';'"),
        "format": schema_text("file: " + ", ".join(FORMATS["file"]) + "; grpc: " + ", ".join(FORMATS["grpc"]),
                              enum=list(formats)),
    })
    return schema_object("one filter: which events match, which of them pass, and what is sent of those",
                         ("name", "channel", "function", "output"), {
        "id": schema_text("a unique name; default NAME-INDEX, as in open-0", 1),
        "name": schema_text("the event type; 'traceleft.py events' lists them", enum=every_name),
        "channel": schema_text("id of the channel that gets the alerts", 1),
        "stream": schema_text("a label that travels with every alert"),
        "group": schema_text("a label that travels with every alert"),
        "rule": schema_text("which events match, as in: arg1 == '/tmp/a.txt' and ret >= 0; absent or empty: all"),
        "function": {**function, "allOf": [schema_parameters("id", name, known.parameters)
                                           for name, known in PROCESSING.items()]},
        "output": {**output, "allOf": [schema_parameters("metrics", name, known.parameters)
                                       for name, known in OUTPUTS.items()]},
    })


def spec_schema() -> Dict[str, Any]:
    """The JSON Schema of an aggregation spec, the same on every host."""
    top = schema_object("traceleft.py: which syscalls of a host are counted, and where the counts go",
                        ("channels", "events"), {
        "$schema": schema_text("this file's place, for editors"),
        "channels": {"type": "array", "description": "where alerts go", "items": schema_channel()},
        "events": {"type": "array", "description": "the filters; every filter sees every event", "minItems": 1,
                   "maxItems": MAX_FILTERS, "items": schema_filter()},
    })
    return {"$schema": SCHEMA_DIALECT, "title": "aggregation spec", **top}


# ======================================================================================================================
# Shell completion and the man page, from the argument parser's own words
# ======================================================================================================================

COMPLETED = {"FILE": "files", "SPEC": "files", "SELECTOR": "events", "NAME": "events"}  # by metavar; others: nothing
COMPLETED_OPTIONS = {"--user": "users"}
PROGRAMS_COMPLETED = ("traceleft", "traceleft.py")


class Option(NamedTuple):
    """One option or positional argument (which has no names)."""

    names: Tuple[str, ...]
    metavar: str  # empty: it takes no value
    help: str
    choices: Tuple[str, ...]
    repeats: bool

    @property
    def kind(self) -> str:
        """What is offered for its value: files, events, users, words or nothing."""
        named = [COMPLETED_OPTIONS[name] for name in self.names if name in COMPLETED_OPTIONS]
        return "words" if self.choices else named[0] if named else COMPLETED.get(self.metavar, "")


class Command(NamedTuple):
    """One subcommand as the parser knows it."""

    name: str
    help: str
    options: List[Option]
    positionals: List[Option]
    usage: str
    epilog: str


def parser_options(parser: argparse.ArgumentParser) -> List[Option]:
    """What a parser takes, in its order."""
    found = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            continue
        flag = bool(action.option_strings) and action.nargs == 0
        metavar = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
        found.append(Option(tuple(action.option_strings), "" if flag else metavar, (action.help or "") % {
            "default": action.default, "prog": parser.prog}, tuple(map(str, action.choices or ())),
            action.nargs in ("*", "+")))
    return found


def parser_commands(parser: argparse.ArgumentParser) -> List[Command]:
    """Its subcommands."""
    (action,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
    commands = []
    for name, command in action.choices.items():
        options = parser_options(command)
        usage = " ".join(command.format_usage().split()[1:])
        commands.append(Command(name, helps[name], [o for o in options if o.names], [o for o in options if not o.names],
                                usage, command.epilog or ""))
    return commands


def bash_words(option: Option) -> str:
    """The command that offers an option's values."""
    return {"files": "_traceleft_files", "events": "_traceleft_events", "users": "_traceleft_users", "": ":",
            "words": f"_traceleft_words '{' '.join(option.choices)}'"}[option.kind]


def complete_bash(parser: argparse.ArgumentParser) -> str:
    commands = parser_commands(parser)
    cases = []
    for command in commands:
        values = "".join(f"      {command.name},{name}) {bash_words(option)}; return ;;\n"
                         for option in command.options if option.metavar for name in option.names)
        cases.append(values)
    defaults = []
    for command in commands:
        names = " ".join(name for option in command.options for name in option.names)
        positional = bash_words(command.positionals[0]) if command.positionals else ":"
        defaults.append(f"      {command.name},-*) _traceleft_words '{names}' ;;\n"
                        f"      {command.name},*) {positional} ;;\n")
    top = " ".join(name for option in parser_options(parser) for name in option.names)
    return f"""# bash completion of traceleft.py; source it, or install it as completions/traceleft
_traceleft_words() {{ mapfile -t COMPREPLY < <(compgen -W "$1" -- "$current"); }}
_traceleft_files() {{ compopt -o filenames 2>/dev/null; mapfile -t COMPREPLY < <(compgen -f -- "$current"); }}
_traceleft_users() {{ mapfile -t COMPREPLY < <(compgen -u -- "$current"); }}
_traceleft_events() {{  # of a selector, what is behind the last comma or colon
    [[ $COMP_WORDBREAKS == *:* ]] && current=${{current##*:}}
    local before=${{current%"${{current##*[,:]}}"}}
    mapfile -t COMPREPLY < <(compgen -P "$before" -W "{' '.join(event_names())}" -- "${{current##*[,:]}}")
}}
_traceleft() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} command='' word
    COMPREPLY=()
    if [[ $current == = ]]; then current=''; else [[ $before == = ]] && before=${{COMP_WORDS[COMP_CWORD-2]}}; fi
    for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do [[ $word != -* ]] && {{ command=$word; break; }}; done
    case $command,$before in
{''.join(cases)}    esac
    case $command,$current in
      ,-*) _traceleft_words '{top}' ;;
      ,*) _traceleft_words '{' '.join(command.name for command in commands)}' ;;
{''.join(defaults)}    esac
}}
complete -F _traceleft {' '.join(PROGRAMS_COMPLETED)}
"""


def zsh_quote(text: str) -> str:
    """In single quotes; in an explanation or a message brackets and colons have a meaning."""
    return "'" + text.replace("'", "'\\''") + "'"


def zsh_escape(text: str) -> str:
    return re.sub(r"([\[\]:\\])", r"\\\1", text)


def zsh_argument(option: Option) -> List[str]:
    """The arguments of _arguments for an option, one for each of its names."""
    action = {"files": "_files", "events": "_traceleft_events", "users": "_users", "": " ",
              "words": f"({' '.join(option.choices)})"}[option.kind]
    value = f":{zsh_escape(option.metavar)}:{action}" if option.metavar else ""
    if not option.names:
        return [zsh_quote(("*" if option.repeats else "1") + value)]
    others = f"({' '.join(option.names)})" if len(option.names) > 1 else ""
    return [zsh_quote(f"{others}{name}[{zsh_escape(option.help)}]{value}") for name in option.names]


def complete_zsh(parser: argparse.ArgumentParser) -> str:
    commands = parser_commands(parser)
    described = "\n".join("    " + zsh_quote(f"{command.name}:{command.help}") for command in commands)
    cases = "".join(f"    {command.name}) _arguments " + " ".join(
        word for option in [*command.options, *command.positionals] for word in zsh_argument(option)) + " ;;\n"
        for command in commands)
    top = " ".join(word for option in parser_options(parser) for word in zsh_argument(option))
    return f"""#compdef {' '.join(PROGRAMS_COMPLETED)}
# zsh completion of traceleft.py; source it after compinit, or install it as _traceleft in a folder of $fpath
_traceleft_events() {{  # of a selector, what is behind the last comma or colon
  local -a events
  events=({' '.join(event_names())})
  compset -P '*[,:]'
  compadd -S '' -a events
}}
_traceleft() {{
  local context state state_descr line
  typeset -A opt_args
  local -a commands
  commands=(
{described}
  )
  _arguments -C {top} '1:COMMAND:->command' '*::argument:->argument'
  case $state in
  command) _describe command commands ;;
  argument)
    case $words[1] in
{cases}    esac ;;
  esac
}}
if [[ $funcstack[1] == _traceleft ]]; then _traceleft "$@"; else compdef _traceleft {' '.join(PROGRAMS_COMPLETED)}; fi
"""


def fish_quote(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def fish_option(condition: str, option: Option) -> str:
    """The line for an option, or for a positional argument's values."""
    names = " ".join(f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in option.names)
    values = {"files": "-r -F", "events": "-x -a '(__traceleft_events)'", "users": "-x -a '(__fish_complete_users)'",
              "": "-x", "words": f"-x -a {fish_quote(' '.join(option.choices))}"}[option.kind]
    words = ["  complete -c $program -n", fish_quote(condition), names, values if option.metavar else "",
             f"-d {fish_quote(option.help if option.names else option.metavar)}"]
    return " ".join(word for word in words if word)


def complete_fish(parser: argparse.ArgumentParser) -> str:
    lines = [fish_option("__fish_use_subcommand", option) for option in parser_options(parser)]
    for command in parser_commands(parser):
        lines.append(f"  complete -c $program -n __fish_use_subcommand -a {command.name} -d {fish_quote(command.help)}")
        lines += [fish_option(f"__fish_seen_subcommand_from {command.name}", option)
                  for option in [*command.options, *command.positionals]]
    rules = "\n".join(lines)
    return f"""# fish completion of traceleft.py; source it, or install it in vendor_completions.d
function __traceleft_events  # of a selector, what is behind the last comma or colon
  set -l before (string replace -r '[^,:]*$' '' -- (commandline -ct))
  for name in {' '.join(event_names())}
    echo $before$name
  end
end
for program in {' '.join(PROGRAMS_COMPLETED)}
  complete -c $program -f
{rules}
end
"""


COMPLETIONS: Dict[str, Callable[[argparse.ArgumentParser], str]] = {
    "bash": complete_bash, "zsh": complete_zsh, "fish": complete_fish,
}


def roff(text: str) -> str:
    """Text for man(7): no character of it is a request, an escape or a typographic hyphen."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    return "\n".join("\\&" + line if line[:1] in (".", "'") else line for line in escaped.split("\n"))


def roff_option(option: Option) -> str:
    """A tagged paragraph."""
    value = f" \\fI{roff(option.metavar)}\\fR" if option.metavar else ""
    names = ", ".join(f"\\fB{roff(name)}\\fR{value}" for name in option.names) or value.strip()
    choices = f" ({', '.join(option.choices)})" if option.choices else ""
    return f".TP\n{names}\n{roff(option.help + choices)}\n"


def roff_command(command: Command) -> str:
    listed = "".join(roff_option(option) for option in [*command.positionals, *command.options]
                     if "--help" not in option.names)
    return f".SS {roff(command.name)}\n{roff(command.usage)}\n.PP\n{roff(command.help)}.\n{listed}"


def man_page(parser: argparse.ArgumentParser) -> str:
    """The manual page, section 8, from the parser's own text."""
    name = parser.prog.rpartition(".")[0] or parser.prog
    commands = parser_commands(parser)
    examples = (parser.epilog or "").partition("\n")[2].strip("\n")
    codes = next(command.epilog for command in commands if command.epilog).partition("\n")[2]
    statuses = "".join(f".TP\n{code}\n{roff(meaning)}\n" for code, meaning in re.findall(r"(\d)  (.*)", codes))
    options = "".join(roff_option(option) for option in parser_options(parser))
    description = (parser.description or "").rstrip(".")
    page = f""".TH {name.upper()} 8 "" "{name} {VERSION}"
.SH NAME
{name} \\- {roff(description[:1].lower() + description[1:])}
.SH SYNOPSIS
.B {name}
\\fICOMMAND\\fR [\\fIoption\\fR ...] [\\fIargument\\fR ...]
.SH DESCRIPTION
{roff(DESCRIPTION)}
.SH OPTIONS
{options}.SH COMMANDS
{"".join(roff_command(command) for command in commands)}.SH EXIT STATUS
{statuses}.SH EXAMPLES
.nf
{roff(textwrap.dedent(examples))}
.fi
"""
    return page.replace(roff(parser.prog), name)


DESCRIPTION = """An aggregation spec says which events of a host are counted, how many of them pass, and which channel
gets a record about them each second. Rules and counters run in the kernel, as an eBPF program; what could not be
delivered is counted, too. Without a spec, every event of the selectors is a line on standard output."""


# ======================================================================================================================
# Doctor: what this host has and lacks, and which feature that is about
# ======================================================================================================================

TRIAL_TIMEOUT = 15.0  # seconds for an event to come: an emulated machine is slow


class Finding(NamedTuple):
    """One line of the report."""

    state: str  # of STATES
    what: str
    found: str
    needed_for: str = ""

    def format(self) -> str:
        return f"{self.state:5}{self.what:18} {escape(self.found)}{f' ({self.needed_for})' if self.needed_for else ''}"


HAS, LACKS, OPTIONAL = STATES = ("ok", "no", "-")  # OPTIONAL: lacks it, and only the features named need it


def open_and_close() -> None:
    os.close(os.open(os.devnull, os.O_RDONLY))


def connect_to_self() -> None:
    with socket.socket() as listening, socket.socket() as connecting:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        connecting.connect(listening.getsockname())


def begin_program() -> None:
    os.execv("/proc/self/exe", [sys.executable, "-I", "-S", "-c", ""])


class Trial(NamedTuple):
    """One way to attach, tried on its own: with one event type, and an event that a child makes."""

    what: str
    event: str
    programs: Tuple[str, ...]  # whose verifier figures are shown
    needed_for: str
    make_event: Callable[[], None] = open_and_close
    see_all: bool = False
    follow: bool = False


TRIALS = (
    Trial("syscall exit", "open", ("on_sys_exit",), "for open and most other events"),
    Trial("syscall entry", "close", ("on_sys_enter", "on_sys_exit"), "for close, execve, execveat and exit"),
    Trial("programs", "execve", ("on_new_program",), "for execve and execveat", begin_program),
    Trial("every syscall", "open", ("on_every_sys_exit",), "for specs that name most of a host's calls", see_all=True),
    Trial("TCP connections", "connect_v4", ("on_tcp_state", "on_tcp_accept"),
          "for connect_v4, accept_v4, close_v4 and the same of _v6", connect_to_self),
    Trial("processes", "open", ("follow_fork", "forget_process"), "for selectors with PIDs, and --follow",
          follow=True),
)


def run_in_child(action: Callable[[], None]) -> Tuple[int, bool]:
    """The child's pid, and whether it worked; it is over by then."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    return pid, os.waitpid(pid, 0)[1] == 0


def comes_through(tracer: Tracer, pid: int) -> bool:
    """Whether an event of the process comes through the ring buffer in time."""
    end = time.monotonic() + TRIAL_TIMEOUT
    while time.monotonic() < end:
        if any(event.pid == pid for event in tracer.poll()):
            return True
        tracer.wait(POLL_INTERVAL)
    return False


def try_trial(trial: Trial) -> Finding:
    """Loads, attaches and sees an event, or says what went wrong."""
    selector = f"{os.getpid()}:{trial.event}" if trial.follow else trial.event
    begin = time.monotonic()
    try:
        with Tracer(selector, follow=trial.follow, see_all=trial.see_all) as tracer:
            found = [f"loaded in {time.monotonic() - begin:.2f} s"]
            pid, made = run_in_child(trial.make_event)
            if made and not comes_through(tracer, pid):
                raise HostError("attached, but no event comes through the ring buffer")
            found.append("an event came through the ring buffer" if made else
                         "attached, but its event could not be made here, and so none was seen")
            figures = [(name, tracer.verified_instructions(name)) for name in trial.programs]
    except (TraceleftError, OSError) as error:
        return Finding(LACKS, trial.what, str(error).partition("\n")[0], trial.needed_for)
    found += [f"{name} {count} instructions verified" for name, count in figures if count]
    return Finding(HAS if made else OPTIONAL, trial.what, ", ".join(found), trial.needed_for)


def find_host() -> Iterator[Finding]:
    """The checks that need nothing loaded; HOST_CHECKS, with what is there where nothing lacks."""
    there: Dict[str, Callable[[], str]] = {
        "architecture": platform.machine, "kernel": platform.release, "BTF": lambda: BTF_PATH,
        "lockdown": lockdown, "proc": lambda: "/proc",
        "privilege": lambda: "CAP_BPF and CAP_PERFMON", "user namespace": lambda: "the initial one",
        "pid namespace": lambda: "the initial one"}
    for what, lacks in HOST_CHECKS.items():
        try:
            missing = lacks()
        except OSError as error:
            missing = str(error)
        found = missing or there[what]()
        yield Finding(LACKS if missing else HAS if found else OPTIONAL, what,
                      found or "not known: securityfs is not mounted at /sys/kernel/security")


def find_libraries() -> Iterator[Finding]:
    """Python, libbpf, tracefs and the object."""
    yield Finding(HAS, "Python", f"{platform.python_version()}, {sys.executable}")
    for what, find in (("libbpf", find_libbpf), ("tracefs", find_tracefs), ("BPF object", find_object)):
        try:
            yield Finding(HAS, what, find())
        except (HostError, OSError) as error:
            yield Finding(LACKS, what, str(error))


def find_libbpf() -> str:
    """Its version and file. Raises HostError."""
    version: bytes = Libbpf().call("libbpf_version_string")
    maps = Path("/proc/self/maps").read_text("utf-8", "surrogateescape") if not lacks_proc() else ""
    mapped = re.search(r"(/\S*/libbpf\.so\S*)", maps)
    return f"{decode_text(version).lstrip('v')}, {mapped[1] if mapped else LIBBPF_NAME}"


def find_tracefs() -> str:
    """Where it is mounted, as `trace` does it when it is not. Raises HostError."""
    before = [path for path in TRACEFS_PATHS if os.path.isdir(f"{path}/events/syscalls")]
    return mounted_tracefs() + ("" if before else ", which was not mounted before, and stays")


def find_object() -> str:
    """What version_text() says of it. Raises HostError."""
    read_object()
    return version_text()


def find_events(tracefs: str) -> Finding:
    """Event types of the table that this kernel has no tracepoint for."""
    missing = []
    for name in EVENT_TYPES:
        try:
            plan_sources({name: Wanted(any_process=True)}, tracefs)
        except HostError:
            missing.append(name)
    return Finding(OPTIONAL if missing else HAS, "event types",
                   f"no tracepoint for {', '.join(missing)}: specs that name them are refused" if missing else
                   f"all {len(EVENT_TYPES)} of the table")


def find_uring(tracefs: str) -> Finding:
    """Whether io_uring's submissions can be counted."""
    names = [name for name in URING_TRACEPOINTS if os.path.isdir(f"{tracefs}/events/io_uring/{name}")]
    return Finding(HAS if names else OPTIONAL, "io_uring", names[0] if names else "this kernel has no tracepoint",
                   "for the warning when a program uses it in place of syscalls")


def find_packages() -> Iterator[Finding]:
    """The optional packages with their versions, and the CA certificates."""
    for module, package, works in (("google.protobuf", "protobuf", build_wire), ("grpc", "grpcio", dict)):
        try:
            version = import_optional(module).__version__
            works()
            yield Finding(HAS, package, version, "for grpc channels and collect")
        except HostError as error:
            yield Finding(OPTIONAL, package, str(error))
    try:
        system_roots()
        yield Finding(HAS, "CA certificates", "the system's", "for grpc channels with TLS")
    except HostError as error:
        yield Finding(OPTIONAL, "CA certificates", str(error))


def examine() -> Iterator[Finding]:
    """Every finding, as it is found."""
    lacking = False
    for finding in itertools.chain(find_host(), find_libraries()):
        lacking = lacking or finding.state == LACKS
        yield finding
    if lacking:
        yield Finding(LACKS, "tracing", "not tried, for what is missing above")
    else:
        tracefs = mounted_tracefs()
        yield find_events(tracefs)
        yield find_uring(tracefs)
        yield from map(try_trial, TRIALS)
    yield from find_packages()


def command_doctor(options: argparse.Namespace) -> int:
    lacking = False
    for finding in examine():
        lacking = lacking or finding.state == LACKS
        print(finding.format(), flush=True)
    return HostError.exit_code if lacking else 0


# ======================================================================================================================
# Command line
# ======================================================================================================================


def command_trace(options: argparse.Namespace) -> int:
    if options.spec is None and not options.selectors:
        raise UsageError("trace needs --spec FILE or a selector, as in: traceleft.py trace open,close")
    chosen = [parse_selector(text) for text in options.selectors]
    if options.follow and not any(any(selector.pids) for selector in chosen):
        raise UsageError("--follow adds the children of selected processes, and no selector names any, as in: "
                         "traceleft.py trace --follow 1234:open")
    spec = load_spec(options.spec) if options.spec is not None else None
    plan = plan_spec(spec, chosen) if spec else plan_selectors(chosen)
    for warning in spec.warnings if spec else ():
        say(f"warning: {warning}")
    with StopSignals() as stop:
        if options.user is not None:
            become_user(options.user)
        recorder = Recorder(options.record, options.record_max_bytes) if options.record is not None else None
        tables = Tables(spec.filters if spec else (), plan if recorder or not spec else (),
                        ALL_FIELDS if recorder or spec else PRINTED_FIELDS)
        spare = len(tables.filters) + SPARE_FILTERS if spec else 0
        tracer = Tracer(plan, tables, options.ring_size, options.verbose, options.follow, spare_filters=spare)
        watchers = None
        try:
            check_summary(options.summary)
            watchers = Watchers(options.metrics)
            tracer.load()
            if spec is not None:
                return trace_spec(tracer, spec, stop, options, watchers, recorder)
            if recorder is not None:
                return trace_record(tracer, recorder, stop, options, watchers)
            return trace_print(tracer, stop, options, watchers)
        finally:
            tracer.close()
            if watchers is not None:
                watchers.close()


SHELL_PATHS = ("/dev/fd/", "/dev/std", "/dev/tty", "/dev/null", "/proc/self/fd/")  # what is open already, or nothing


def check_summary(path: Optional[str]) -> None:
    """Raises TraceleftError when --summary could not be written at the end."""
    if path in (None, "-") or path is None or path.startswith(SHELL_PATHS):
        return
    try:
        check_writable(path, regular=False)
    except OSError as error:
        raise TraceleftError(f"cannot write --summary {escape(path)}: {error.strerror}") from None


def write_summary(path: Optional[str], result: Dict[str, Any]) -> None:
    """A file is made or overwritten by the rules of a log's."""
    text = json.dumps(result) + "\n"
    if path == "-":
        sys.stdout.write(text)
        sys.stdout.flush()
    elif path is not None:
        flags = os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC | os.O_NONBLOCK  # a FIFO that nobody reads is an error
        try:
            fd = os.open(path, flags) if path.startswith(SHELL_PATHS) else \
                open_log(path, flags | os.O_NOFOLLOW, regular=False)
            with os.fdopen(fd, "w", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise TraceleftError(f"cannot write --summary {escape(path)}: {error.strerror}; it is: {text.strip()}"
                                 ) from None


def say_ready(tracer: Tracer, what: str) -> None:
    names = dict.fromkeys(attachment.place.rpartition("/")[2] for attachment in tracer.attached
                          if attachment.program != "uring_submit")
    say(f"ready: {what}; attached to {', '.join(names)}")


class SpecRun:
    """A spec at work: what the main loop calls, and what SIGHUP changes."""

    def __init__(self, tracer: Tracer, spec: Spec, stop: StopSignals, options: argparse.Namespace,
                 recorder: Optional[Recorder]) -> None:
        self.tracer, self.stop, self.options, self.recorder = tracer, stop, options, recorder
        self.aggregator = Aggregator(spec, insecure=options.collector_insecure,
                                     counted_elsewhere=frozenset(spec.ids) - tracer.tables.python_ids, event_time=True)
        self.counts, self.uring = KernelCounts(tracer, self.aggregator), HostWatch(tracer)
        self.status = StatusLine(lambda: sum_accounts(self.accounts))
        self.left = 0  # records of the spec before that are held
        self.aggregator.set_clock(tracer.clock_offset_ns)

    @property
    def accounts(self) -> List[Account]:
        return list(self.aggregator.accounts.values())

    def figures(self) -> Figures:
        return run_figures(self.tracer, self.accounts, self.aggregator.spec, self.aggregator.channels)

    def handle(self, records: List[bytes]) -> None:
        """Streamed records, some of which wait when their rules take long."""
        if self.recorder is not None:
            self.recorder.add(records, self.tracer)
        if self.tracer.tables.python_ids or self.left:  # else what is streamed is for the recording only
            self.tracer.held.extend(records)
        deadline, held = time.monotonic() + MAX_HOLD, self.tracer.held
        while held and time.monotonic() < deadline:
            record = held.popleft()
            self.aggregator.add(self.tracer.decode(record), RECORD_TAG.unpack_from(record, RECORD_TAG_OFFSET)[0])
            self.left -= 1

    def tick(self) -> None:
        if self.stop.reopen:
            self.stop.reopen = False
            self.aggregator.reopen()
        self.aggregator.set_clock(self.tracer.clock_offset_ns)
        self.counts.tick(self.handle)
        self.retire_when_done()
        self.aggregator.flush(time.time())
        self.stop.stopped = self.stop.stopped or self.aggregator.ended
        self.uring.tick()
        self.status.tick()
        if self.stop.reload and not self.is_reloading:
            self.stop.reload = False
            self.reload()

    is_reloading = False  # the spec before has records that have not been evaluated

    def reload(self) -> None:
        """Goes on with what the spec's file says now; when it is no valid spec, or cannot be had, as before."""
        try:
            if self.recorder is not None:
                raise UsageError("what is recorded is for the spec that --record began with")
            if os.path.exists(self.options.spec) and not os.path.isfile(self.options.spec):
                raise UsageError(f"{escape(self.options.spec)} is no regular file, and cannot be read a second time")
            spec = load_spec(self.options.spec)
            plan = plan_spec(spec, [parse_selector(text) for text in self.options.selectors], self.tracer.plan)
            self.change_over(spec, plan)
        except TraceleftError as error:
            self.status.clear()
            for text in error.errors:
                say(text)
            say(f"{escape(self.options.spec)} was not loaded: the spec before goes on")

    def change_over(self, spec: Spec, plan: Mapping[str, Wanted]) -> None:
        """Raises TraceleftError, and then nothing has changed."""
        tracer, aggregator = self.tracer, self.aggregator
        same = sum(1 for member in spec.filters if member in aggregator.spec.filters)
        channels = aggregator.open_channels(spec)
        tables = Tables(spec.filters, previous=tracer.tables)
        try:
            tracer.reload(plan, tables)
        except TraceleftError:
            aggregator.close_channels(channels.values())
            raise
        self.left, self.is_reloading = len(tracer.held), True
        aggregator.reload(spec, frozenset(spec.ids) - tables.python_ids, channels, tracer.retiring_streams)
        self.counts.reload()
        self.status.clear()
        for warning in spec.warnings:
            say(f"warning: {warning}")
        say(f"reloaded {escape(self.options.spec)}: {len(spec.filters)} filters, {same} of them as before")
        self.handle([])
        self.retire_when_done()

    def retire_when_done(self) -> None:
        if self.is_reloading and self.left <= 0:
            self.retire()

    def retire(self) -> None:
        """Ends what only the spec before had."""
        self.is_reloading = False
        for number, causes in self.tracer.unseen_streams(self.tracer.retiring_streams).items():
            for state in self.aggregator.earlier.get(number, ()):
                for cause, count in causes.items():
                    if count:
                        state.account.lose(cause, count)
        self.counts.retire()
        self.aggregator.retire(time.time())
        self.tracer.retire()

    def close(self) -> None:
        """Delivers what is pending."""
        if self.is_reloading:
            self.retire()
        self.aggregator.close()
        self.status.clear()


def trace_spec(tracer: Tracer, spec: Spec, stop: StopSignals, options: argparse.Namespace,
               watchers: Watchers, recorder: Optional[Recorder]) -> int:
    """Runs a spec until stopped; everything is found valid by now."""
    check_channels(spec, options.collector_insecure)
    if recorder is not None:
        recorder.open()
    tracer.attach()
    # before the channels start threads, which would keep what they had
    report_privileges(drop_privileges(True, reopened_paths(spec, tracer, options)), options)
    run = SpecRun(tracer, spec, stop, options, recorder)
    try:
        if watchers.server is not None:
            watchers.server.figures = run.figures
        watchers.status = lambda: format_totals(sum_accounts(run.accounts))
        say_ready(tracer, f"{len(spec.filters)} filter{'s' if len(spec.filters) > 1 else ''}")
        watchers.ready()
        run_loop(tracer, run.handle, run.tick, stop, options.duration, watchers)
        stop.reload = False
        run.tick()
    finally:
        run.close()
    return report(tracer, run.accounts, options.summary, recorder)


def check_channels(spec: Spec, insecure: bool) -> None:
    """Raises TraceleftError that names every channel which could not be opened; nothing is opened."""
    channels = [make_channel(channel, {}, insecure) for channel in spec.used_channels]
    problems = [problem for problem in (channel.problem() for channel in channels) if problem]
    if problems:
        raise TraceleftError(*problems)


def reopened_paths(spec: Spec, tracer: Tracer, options: argparse.Namespace) -> List[Reopened]:
    """What a run of the spec opens again when files are rotated, a collector comes back, on SIGHUP, and at the end."""
    paths = summary_path(options)
    for channel in spec.used_channels:
        name = f"channel '{escape(channel.id)}'"
        if channel.type == "file" and channel.path != "-":
            paths.append(Reopened(channel.path, os.W_OK, f"{name} writes to {escape(channel.path)}"))
        if channel.spool is not None:
            paths.append(Reopened(channel.spool.dir, os.W_OK, f"{name} writes to {escape(channel.spool.dir)}"))
        tls = channel.tls or TlsSpec()
        for read in filter(None, (channel.token_file, tls.ca, tls.cert, tls.key)):
            paths.append(Reopened(read, os.R_OK, f"{name} reads {escape(read)}"))
    return [*paths, Reopened(options.spec, os.R_OK, f"SIGHUP reads {escape(options.spec)}"),
            Reopened(f"{tracer.tracefs}/events/syscalls", os.R_OK, f"SIGHUP reads {tracer.tracefs}")]


def summary_path(options: argparse.Namespace) -> List[Reopened]:
    path = options.summary
    return [] if path in (None, "-") else [Reopened(path, os.W_OK, f"--summary writes to {escape(path)}")]


def report_privileges(kept: Sequence[int], options: argparse.Namespace) -> None:
    """With -v, says what the process may still do."""
    if options.verbose:
        names = ", ".join(CAPABILITY_NAMES[capability] for capability in kept) or "no capability"
        say(f"runs as user {os.getuid()} with {names}")


def trace_print(tracer: Tracer, stop: StopSignals, options: argparse.Namespace,
                watchers: Watchers) -> int:
    """Prints every event until stopped, or until nobody reads."""
    printer = Printer(tracer.plan, stop)
    tracer.attach()
    report_privileges(drop_privileges(False, summary_path(options)), options)
    if watchers.server is not None:
        watchers.server.figures = lambda: run_figures(tracer, printer.accounts.values())
    watchers.status = lambda: format_totals(sum_accounts(printer.accounts.values()))
    status, uring = StatusLine(lambda: sum_accounts(printer.accounts.values()), True), HostWatch(tracer)

    def tick() -> None:
        uring.tick()
        status.tick()

    say_ready(tracer, "printing every event")
    watchers.ready()
    try:
        run_loop(tracer, printer.print_records, tick, stop, options.duration, watchers)
    finally:
        status.clear()
    return report(tracer, list(printer.accounts.values()), options.summary)


def trace_record(tracer: Tracer, recorder: Recorder, stop: StopSignals, options: argparse.Namespace,
                 watchers: Watchers) -> int:
    """Records every event until stopped, or until the recording is full."""
    accounts = {name: Account(name, name) for name in tracer.plan}
    status, uring = StatusLine(lambda: {"events": sum(recorder.recorded.values()), "bytes": recorder.size}), \
        HostWatch(tracer)

    def handle(records: List[bytes]) -> None:
        recorder.add(records, tracer)
        stop.stopped = stop.stopped or bool(recorder.stopped)

    def tick() -> None:
        recorder.settle(accounts)
        uring.tick()
        status.tick()

    recorder.open()
    tracer.attach()
    report_privileges(drop_privileges(False, summary_path(options)), options)
    if watchers.server is not None:
        watchers.server.figures = lambda: run_figures(tracer, accounts.values())
    watchers.status = lambda: format_totals(sum_accounts(accounts.values()))
    say_ready(tracer, f"recording to {escape(recorder.path)}")
    watchers.ready()
    try:
        run_loop(tracer, handle, tick, stop, options.duration, watchers)
    finally:
        status.clear()
    recorder.settle(accounts)
    return report(tracer, list(accounts.values()), options.summary, recorder)


MISSED = {
    "recursion_misses": "times the kernel skipped a program, for events of whatever type: no filter has seen them",
    "missed_calls": f"calls were not seen: more than {MAX_PENDING} were between their entry and their exit",
    "missed_owners": f"connections have no owner: there are more than {MAX_SOCKETS}",
    "missed_children": f"children are not followed: more than {MAX_PROCESSES} processes are traced",
}


def report(tracer: Tracer, accounts: List[Account], summary: Optional[str], recorder: Optional[Recorder] = None) -> int:
    """Prints the accounting; returns the exit code. Raises BalanceError when it does not add up."""
    for name, causes in tracer.unseen().items():
        for account in accounts:
            if account.event == name and (account.id in tracer.tables.python_ids or not tracer.tables.placements):
                for cause, count in causes.items():
                    account.lose(cause, count)
    result = summarize(accounts)
    if recorder is not None:
        result["recording"] = end_recording(tracer, recorder)
    lost_samples, missed = tracer.lost_samples(), tracer.missed()
    if lost_samples:
        result["samples_lost"] = lost_samples
        say(f"{lost_samples} samples did not fit into the ring buffer: their alerts went out without one")
    for cause, count in missed.items():
        result[cause], result["balanced"] = count, False
        say(f"{count} {MISSED[cause]}")
    uring = tracer.uring_counts()
    if uring:
        result["io_uring"] = uring
        say(f"not seen: what io_uring did on this host, {format_opcodes(uring)}")
    for line in format_accounting(accounts):
        say(line)
    if result["balanced"]:
        say("balanced: matched = passed + folded, passed = delivered + lost")
    write_summary(summary, result)
    if not result["balanced"]:
        raise BalanceError("the accounting does not add up: events were lost before the filters could count them; "
                           "a larger --ring-size or fewer events help")
    return 0


def collector_credentials(options: argparse.Namespace) -> Tuple[Optional[CollectorTls], str]:
    """What collect's --cert, --key, --client-ca and --token-file name. Raises UsageError."""
    if bool(options.cert) != bool(options.key):
        raise UsageError("--cert and --key belong together")
    if not options.cert and (options.client_ca or options.token_file):
        raise UsageError("--client-ca and --token-file need TLS: --cert and --key")
    try:
        token = read_token(options.token_file) if options.token_file else ""
        if not options.cert:
            return None, token
        check_certificates(TlsSpec(options.client_ca or "", options.cert, options.key))
        return CollectorTls(Path(options.cert).read_bytes(), Path(options.key).read_bytes(),
                            Path(options.client_ca).read_bytes() if options.client_ca else None), token
    except OSError as error:
        raise UsageError(f"--cert, --key, --client-ca or --token-file: {error.strerror}") from None


def end_recording(tracer: Tracer, recorder: Recorder) -> Dict[str, Any]:
    """Ends the recording and says what is in it; returns the same for --summary."""
    recorder.close(tracer.unseen())
    done = recorder.summary()
    say(f"recorded {done['events']} events, {done['bytes']} bytes, to {escape(recorder.path)}")
    if done["unrecorded"]:
        say("not recorded: " + ", ".join(f"{count} {cause}" for cause, count in done["unrecorded"].items()))
    return done


class Replay:
    """Runs the events of a recording by their own time."""

    def __init__(self, recording: Recording, stop: StopSignals, speed: float) -> None:
        self.recording, self.stop, self.speed = recording, stop, speed
        self.begin: Optional[Tuple[float, int]] = None  # monotonic seconds, and the kernel's ns then

    def run(self, handle: Callable[[int, Event], None], tick: Callable[[float], None]) -> None:
        """Hands over clock offset and event; `tick` gets the Unix time of each second's end in which something was."""
        second = -1
        offset = 0
        for offset, events in self.recording.read():
            for event in events:
                at = event.timestamp_ns - offset
                if at // NSEC_PER_SEC > second:
                    if second >= 0:
                        self.wait((second + 1) * NSEC_PER_SEC)
                        tick(second + 1 + offset / NSEC_PER_SEC)
                    second = at // NSEC_PER_SEC
                self.wait(at)
                if self.stop.stopped:
                    break
                handle(offset, event)
            if self.stop.stopped:
                break
        if second >= 0:
            tick(second + 1 + offset / NSEC_PER_SEC)

    def wait(self, at: int) -> None:
        """Waits until the event of the kernel's time `at` is due."""
        if not self.speed or self.stop.stopped:
            return
        if self.begin is None:
            self.begin = time.monotonic(), at
        due = self.begin[0] + (at - self.begin[1]) / NSEC_PER_SEC / self.speed
        while due > time.monotonic() and not self.stop.stopped:
            select.select([self.stop], [], [], due - time.monotonic())


class ReplayChannel(Channel):
    """Alerts on stdout, as fast as it takes them: in the filter's format, or as JSON where that is no file's."""

    def __init__(self, spec: ChannelSpec, accounts: Mapping[str, Account], stop: StopSignals) -> None:
        super().__init__(spec, accounts)
        self.printer = Printer((), stop)

    def send(self, alert: Alert) -> None:
        text = FILE_FORMATS.get(alert.filter.format, format_json)(alert)
        if self.printer.write(text.encode("utf-8", "backslashreplace")):
            self.accounts[alert.filter.id].deliver(alert.count)
        else:
            self.accounts[alert.filter.id].lose_alert("not_written", alert.count, alert.lost)


def command_replay(options: argparse.Namespace) -> int:
    if options.deliver and options.spec is None:
        raise UsageError("--deliver sends to a spec's channels: it needs --spec FILE")
    recording = Recording(options.recording, options.salvage)
    spec = load_spec(options.spec) if options.spec is not None else None
    check_summary(options.summary)
    with StopSignals() as stop, contextlib.closing(recording):
        replay = Replay(recording, stop, options.speed)
        return replay_spec(replay, spec, options) if spec is not None else replay_print(replay, options)


def replay_spec(replay: Replay, spec: Spec, options: argparse.Namespace) -> int:
    for warning in spec.warnings:
        say(f"warning: {warning}")
    for name in sorted({member.event for member in spec.filters} - set(replay.recording.names.values())):
        say(f"warning: there is no '{name}' in the recording: its filters see nothing")
    # first without channels: those for stdout need its accounts
    aggregator = Aggregator(spec, None if options.deliver else {}, insecure=options.collector_insecure, event_time=True)
    if not options.deliver:
        aggregator.channels = {channel.id: ReplayChannel(channel, aggregator.accounts, replay.stop)
                               for channel in spec.used_channels}
    clock = 0

    def handle(offset: int, event: Event) -> None:
        nonlocal clock
        if offset != clock:
            clock = offset
            aggregator.set_clock(offset)
        aggregator.add(event)

    try:
        replay.run(handle, aggregator.flush)
    finally:
        aggregator.close()
    return report_replay(replay.recording, list(aggregator.accounts.values()), options.summary)


def replay_print(replay: Replay, options: argparse.Namespace) -> int:
    """Prints every event until all are printed, until stopped, or until nobody reads."""
    printer = Printer(replay.recording.names.values(), replay.stop)
    waiting: List[Event] = []

    def handle(offset: int, event: Event) -> None:
        waiting.append(event)
        if replay.speed or len(waiting) >= Printer.BATCH:
            flush()

    def flush(now: float = 0.0) -> None:
        text = "".join(f"{format_event(event)}\n" for event in waiting)
        printer.settle(collections.Counter(event.name for event in waiting),
                       printer.write(text.encode("utf-8", "backslashreplace")))
        waiting.clear()

    replay.run(handle, flush)
    return report_replay(replay.recording, list(printer.accounts.values()), options.summary)


def report_replay(recording: Recording, accounts: List[Account], summary: Optional[str]) -> int:
    """Prints the accounting; returns the exit code. Raises BalanceError when it does not add up."""
    result = summarize(accounts)
    unrecorded = recording.end.get("unrecorded")
    if unrecorded:
        result["unrecorded"] = unrecorded
        say("not in the recording: " + ", ".join(f"{count} {escape(cause)}" for cause, count in unrecorded.items()))
    for line in format_accounting(accounts):
        say(line)
    write_summary(summary, result)
    if not result["balanced"]:
        raise BalanceError("the accounting does not add up")
    return 0


def command_collect(options: argparse.Namespace) -> int:
    try:
        host, _ = parse_address(options.listen)
    except ValueError as error:
        raise UsageError(f"--listen: {error}") from None
    tls, token = collector_credentials(options)
    with StopSignals() as stop:
        printer = Printer((), stop)
        collector = Collector(options.listen, tls, token, printer.write if options.json else None)
        say(f"ready: listening on {options.listen.rpartition(':')[0]}:{collector.port}")
        manager = ServiceManager()
        manager.send("READY=1")
        run_collector(collector, stop, sys.stdout, f"{options.listen.rpartition(':')[0]}:{collector.port}")
        manager.close()
    return 1 if printer.failed else 0


def command_check(options: argparse.Namespace) -> int:
    code = 0
    for path in options.specs:
        if path.endswith(".schema.json"):  # one of spec/*.json
            say(f"{escape(path)}: a JSON Schema by its name, and not a spec: not checked")
            continue
        try:
            spec = load_spec(path)
        except SpecError as error:
            code = error.exit_code
            sys.stdout.flush()
            for text in error.errors:
                say(text)
            continue
        for warning in spec.warnings:
            say(f"{escape(path)}: warning: {warning}")
        print(f"{escape(path)}: ok", flush=True)
    return code


def command_explain(options: argparse.Namespace) -> int:
    """Per filter: what runs in the kernel and what does not, and why."""
    spec = load_spec(options.spec)
    for warning in spec.warnings:
        say(f"warning: {warning}")
    tables = Tables(spec.filters)
    for placement in sorted(tables.placements, key=lambda placement: spec.ids.index(placement.spec.id)):
        print("\n".join(explain_filter(placement)))
    print("\n".join(explain_attachments({member.event for member in spec.filters})), flush=True)
    if options.estimate is not None:
        with StopSignals() as stop:
            estimate = Estimate(spec)
            estimate.run(options.estimate, stop)
        print("\n".join(estimate.report()))
    return 0


def explain_attachments(names: Iterable[str]) -> List[str]:
    """What is attached for these events, and why so; and what is never seen."""
    events = [EVENT_TYPES[name] for name in sorted(names, key=EVENT_IDS.__getitem__)]
    sources = [Source(event, syscall, Wanted(any_process=True)) for event in events for syscall in syscalls_here(event)]
    at_exit = dict.fromkeys(source.syscall.name for source in sources if source.syscall and not source.silent)
    at_entry = dict.fromkeys(source.syscall.name for source in sources
                             if source.syscall and (source.at_entry or source.silent))
    share = typical_share(source for source in sources if not source.silent)
    lines = []
    if sees_all_syscalls(sources):
        lines.append(f"attached: one program to the exit of every syscall (tp_btf/sys_exit): about {share}% of a "
                     f"typical host's syscalls are named, and above {BUSY_SHARE}% that costs less")
    elif at_exit:
        lines.append(f"attached: one program to the exit of {', '.join(at_exit)}: about {share}% of a typical host's "
                     f"syscalls, and up to {BUSY_SHARE}% that costs less than one for every syscall")
    if at_entry:
        lines.append(f"attached: at entry, where what they are about is still there, to {', '.join(at_entry)}")
    if any("exec" in event.traits for event in events):
        lines.append("attached: to tp_btf/sched_process_exec, where a new program begins")
    if any(event.is_tcp for event in events):
        lines.append("attached: to tp_btf/inet_sock_set_state, and to the exit of accept, accept4")
    return [*lines, "never traced: the tracer's own events", "not seen: " + "; ".join(NOT_SEEN)]


NOT_SEEN = ("what io_uring does in place of syscalls (its submissions are counted, and said)", "32-bit syscalls")


def explain_filter(placement: Placement) -> List[str]:
    """The lines of one filter."""
    member = placement.spec
    names = ", ".join(syscall.name for syscall in syscalls_here(EVENT_TYPES[member.event]))
    processing, output = (
        " ".join([name, "; ".join(f"{key}={format_parameter(value)}" for key, value in parameters.items() if value)])
        .rstrip() for name, parameters in ((member.processing, member.parameters),
                                           (member.metrics, member.output_parameters)))
    rule = f"rule {escape(member.rule_text.strip())}" if member.rule is not None else "every event matches"
    counting = f"{processing}; {output}"
    lines = [f"{escape(member.id)}: event {member.event}, channel {escape(member.channel)}",
             "  kernel: listens to " + (names or "changes of TCP connections")]
    if not placement.reasons:
        return [*lines, f"  kernel: {rule}", f"  kernel: {counting}", "  python: one record a second as "
                f"{member.format}"]
    shown = " or ".join(describe_row(row, EVENT_TYPES[member.event]) for row in placement.rows.rows) or "nothing"
    return [*lines, f"  kernel: lets through {shown}; each such event crosses the ring buffer",
            f"  python: {rule}", f"  python: {counting}, as {member.format}",
            f"  because: {', '.join(dict.fromkeys(placement.reasons))} cannot be evaluated in the kernel"]


def describe_row(row: Row, event_type: EventType) -> str:
    """`(startswith(filename, '/tmp/') and …)`, in words where a rule would be hard to read."""
    names = [argument.name for argument in event_type.arguments]
    parts = []
    for dimension, constraint in row.items():
        name = next((name for name, number in KERNEL_FIELDS.items() if number == dimension.field), "") or \
            names[dimension.field]
        if isinstance(constraint, Ranges):
            parts.append(f"a test of {name}")
            continue
        what = {DIMENSION_WHOLE: "", DIMENSION_PREFIX: "the begin of ", DIMENSION_SUFFIX: "the end of "}[dimension.kind]
        texts = ", ".join(f"'{escape(decode_text(text))}'" for text in sorted(constraint.texts)[:3])
        more = ", …" if len(constraint.texts) > 3 else ""
        parts.append(f"{what}{name} {'not in' if constraint.all_but else 'in'} ({texts}{more})")
    return f"({' and '.join(parts)})" if parts else "every event"


def format_parameter(value: Any) -> str:
    fields = value if isinstance(value, tuple) else (value,)
    return ",".join(member.name if isinstance(member, Field) else str(member) for member in fields)


def command_events(options: argparse.Namespace) -> int:
    chosen = [find_event(name) for name in options.names]
    print("\n".join(EVENT_FORMATS[options.format](chosen)))
    return 0


def events_text(chosen: Sequence[EventType]) -> Iterator[str]:
    if chosen:
        yield from itertools.chain.from_iterable(map(describe_event, chosen))
        return
    yield from (f"{found.name}({', '.join(argument.name for argument in found.arguments)})" for found in events_here())
    yield "and, with the arguments that tracefs names:"
    yield textwrap.fill(" ".join(event_names()[len(EVENT_NAMES):]), 118, initial_indent="  ", subsequent_indent="  ")


def events_here() -> List[EventType]:
    """The table's event types that there are on this architecture."""
    return [found for found in EVENT_TYPES.values() if found.is_tcp or syscalls_here(found)]


def described_events(chosen: Sequence[EventType]) -> Iterator[Dict[str, Any]]:
    """The chosen event types, or else all, as JSON objects; arguments are null where tracefs cannot be asked."""
    known = {found.name: found for found in chosen or events_here()}
    for name in known if chosen else [*known, *event_names()[len(EVENT_NAMES):]]:
        try:
            yield event_json(known.get(name) or event_type(name))
        except (HostError, KeyError):
            yield {"name": name, "kind": "syscall", "arguments": None, "syscalls": [name], "fields": None}


def event_json(found: EventType) -> Dict[str, Any]:
    arguments = [{"field": f"arg{index}", "name": argument.name, "type": argument_kind(argument),
                  "holds": argument.type_name} for index, argument in enumerate(found.arguments, 1)]
    return {"name": found.name, "kind": "connection" if found.is_tcp else "syscall", "arguments": arguments,
            "syscalls": [syscall.name for syscall in syscalls_here(found)], "fields": common_fields(found)}


def events_json(chosen: Sequence[EventType]) -> Iterator[str]:
    """One array, an event type a line."""
    yield "["
    yield ",\n".join(f"  {json.dumps(described)}" for described in described_events(chosen))
    yield "]"


def events_markdown(chosen: Sequence[EventType]) -> Iterator[str]:
    yield "| event | arguments | what it is here |"
    yield "| --- | --- | --- |"
    for described in described_events(chosen):
        arguments = described["arguments"]
        shown = ", ".join(f"`{argument['name']}`" for argument in arguments or ())
        syscalls = ", ".join(f"`{name}`" for name in described["syscalls"])
        yield (f"| `{described['name']}` | {'as tracefs names them' if arguments is None else shown} | "
               f"{syscalls or 'a change of a TCP connection'} |")


EVENT_FORMATS: Dict[str, Callable[[Sequence[EventType]], Iterator[str]]] = {
    "text": events_text, "json": events_json, "markdown": events_markdown,
}


def argument_kind(argument: Argument) -> str:
    """What a rule sees in it."""
    return "text" if argument.is_text else "address" if argument.type.address_bits else "integer"


def common_fields(found: EventType) -> List[str]:
    """The fields of a rule on this event type that are no arguments."""
    return [name for name in event_fields(found) if not re.fullmatch(r"arg[1-6]", name)][len(found.arguments):]


def describe_event(found: EventType) -> List[str]:
    """The lines that `events NAME` prints."""
    lines = [f"{found.name}({', '.join(argument.name for argument in found.arguments)})"]
    for index, argument in enumerate(found.arguments, 1):
        lines.append(f"  arg{index}  {argument.name:10} {argument.type_name:8} {argument_kind(argument)}")
    lines.append(f"  and: {', '.join(common_fields(found))}")
    syscalls = ", ".join(syscall.name for syscall in syscalls_here(found)) or "none"
    lines.append("  a TCP connection's change of state" if found.is_tcp else f"  syscalls here: {syscalls}")
    return lines


def command_schema(options: argparse.Namespace) -> int:
    print(json.dumps(spec_schema(), indent=2))
    return 0


def command_completion(options: argparse.Namespace) -> int:
    print(COMPLETIONS[options.shell](build_parser()), end="")
    return 0


def command_man(options: argparse.Namespace) -> int:
    print(man_page(build_parser()), end="")
    return 0


class Parser(argparse.ArgumentParser):
    """Errors become UsageError, so that they look and exit like all others."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see '{self.prog} --help'")


class VersionAction(argparse.Action):
    """--version: found out only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(version_text(), flush=True)
        parser.exit()


def parse_duration(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e9:
        raise ValueError
    return value


def parse_speed(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e9:
        raise ValueError
    return value


def parse_size(text: str) -> int:
    match = re.fullmatch(r"([0-9]{1,15})([kMGT]?)", text)
    value = int(match[1]) << " kMGT".index(match[2] or " ") * 10 if match else 0
    if value < 64 << 10:
        raise ValueError
    return value


def parse_ring_size(text: str) -> int:
    value = int(text)
    if value < 4096 or value > 1 << 31 or value & (value - 1):
        raise ValueError
    return value


def parse_metrics_address(text: str) -> Tuple[str, int]:
    """`[HOST:]PORT`; without a host, this one only."""
    return parse_address(text if ":" in text else f"127.0.0.1:{text}")


parse_metrics_address.__name__ = "[HOST:]PORT"
parse_duration.__name__ = "number of seconds above 0"  # argparse names the type in its error
parse_speed.__name__ = "factor above 0"
parse_size.__name__ = "size of at least 64k, as in 512M"
parse_ring_size.__name__ = "power of two from 4096 to 2147483648"


def build_parser() -> Parser:
    examples = (__doc__ or "").partition("examples:")[2]
    parser = Parser(prog="traceleft.py", description=(__doc__ or "").partition("\n")[0], epilog="examples:" + examples,
                    formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--version", action=VersionAction, nargs=0, help="show version, git commit and object's hash")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    trace = commands.add_parser("trace", help="trace this host, as a spec says or printing every event",
                                allow_abbrev=False, epilog=EXIT_CODES,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    trace.add_argument("selectors", nargs="*", metavar="SELECTOR",
                       help="[[PROGRAM_ID:]PID[,PID...]:]EVENT[,EVENT...]; without PID, or with PID 0, every process")
    trace.add_argument("--spec", "--aggregation-spec", metavar="FILE", help="aggregation spec (JSON)")
    trace.add_argument("--duration", type=parse_duration, metavar="SECONDS", help="stop after this time")
    trace.add_argument("--collector-insecure", action="store_true", help="grpc channels without TLS")
    trace.add_argument("--follow", action="store_true", help="children of the selected processes too")
    trace.add_argument("--summary", metavar="FILE", help="write the accounting as JSON at the end; - is stdout")
    trace.add_argument("--user", metavar="NAME", help="run as this user, with only the capabilities that it takes")
    trace.add_argument("--ring-size", type=parse_ring_size, metavar="BYTES",
                       help=f"ring buffer, a power of two (default {STREAM_RING_BYTES} where events are printed or a "
                            f"rule needs Python; for samples at most {SAMPLE_RING_BYTES})")
    trace.add_argument("--metrics", type=parse_metrics_address, metavar="[HOST:]PORT",
                       help="serve Prometheus metrics; without HOST to this host only (port 0 takes a free one)")
    trace.add_argument("-v", "--verbose", action="store_true", help="show libbpf's log")
    trace.set_defaults(run=command_trace)

    trace.add_argument("--record", metavar="FILE",
                       help="write the events themselves to FILE, for replay; without --spec nothing is printed")
    trace.add_argument("--record-max-bytes", type=parse_size, default=RECORD_MAX_BYTES, metavar="SIZE",
                       help="the size of the recording, as in 512M or 4G (default 1G)")
    replay = commands.add_parser("replay", help="run a spec over a recording, without root", allow_abbrev=False)
    replay.add_argument("recording", metavar="FILE", help="what 'trace --record FILE' has written")
    replay.add_argument("--spec", "--aggregation-spec", metavar="FILE",
                        help="aggregation spec (JSON); without it every event is printed")
    replay.add_argument("--speed", type=parse_speed, default=0.0, metavar="FACTOR",
                        help="1 replays as it was, 10 ten times as fast (default: as fast as possible)")
    replay.add_argument("--deliver", action="store_true",
                        help="send alerts to the spec's channels (default: write them to stdout)")
    replay.add_argument("--collector-insecure", action="store_true", help="grpc channels without TLS")
    replay.add_argument("--salvage", action="store_true", help="replay what is whole of a torn recording")
    replay.add_argument("--summary", metavar="FILE", help="write the accounting as JSON at the end; - is stdout")
    replay.set_defaults(run=command_replay)

    collect = commands.add_parser("collect", help="receive what grpc channels send", allow_abbrev=False)
    collect.add_argument("--listen", default="127.0.0.1:50051", metavar="HOST:PORT",
                         help="where to listen (default %(default)s; port 0 takes a free one)")
    collect.add_argument("--cert", metavar="FILE", help="PEM file of the certificate; without it there is no TLS")
    collect.add_argument("--key", metavar="FILE", help="PEM file of its key")
    collect.add_argument("--client-ca", metavar="FILE",
                         help="PEM file of the CAs one of which must have signed the certificate of each agent")
    collect.add_argument("--token-file", metavar="FILE", help="file of the token that each agent must send")
    collect.add_argument("--json", action="store_true",
                         help="write each alert to stdout as a line of JSON, before it is acknowledged")
    collect.set_defaults(run=command_collect)

    check = commands.add_parser("check", help="validate specs", allow_abbrev=False)
    check.add_argument("specs", nargs="+", metavar="SPEC", help="an aggregation spec")
    check.set_defaults(run=command_check)

    explain = commands.add_parser("explain", help="say per filter what runs in the kernel and what does not",
                                  allow_abbrev=False)
    explain.add_argument("spec", metavar="SPEC", help="an aggregation spec")
    explain.add_argument("--estimate", type=parse_duration, metavar="SECONDS",
                         help="run it on this host for so long, send nothing, and say what it costs and brings")
    explain.set_defaults(run=command_explain)

    doctor = commands.add_parser("doctor", help="say what this host has and lacks, and for which feature",
                                 allow_abbrev=False)
    doctor.set_defaults(run=command_doctor)

    events = commands.add_parser("events", help="list event types and their arguments", allow_abbrev=False)
    events.add_argument("names", nargs="*", metavar="NAME", help="an event type (default: all)")
    events.add_argument("--format", choices=tuple(EVENT_FORMATS), default="text", help="default %(default)s")
    events.set_defaults(run=command_events)

    schema = commands.add_parser("schema", help="print the JSON Schema of a spec, for editors", allow_abbrev=False)
    schema.set_defaults(run=command_schema)

    completion = commands.add_parser("completion", help="print a shell's completion script", allow_abbrev=False)
    completion.add_argument("shell", choices=tuple(COMPLETIONS), help="which shell")
    completion.set_defaults(run=command_completion)

    man = commands.add_parser("man", help="print the manual page (roff)", allow_abbrev=False)
    man.set_defaults(run=command_man)
    return parser


EXIT_CODES = """exit codes:
  0  done
  1  runtime failure
  2  usage or invalid spec
  3  missing privilege, library, kernel feature or optional package
  4  the accounting did not add up"""


def open_streams() -> None:
    """Makes stdout and stderr usable where they were closed, and so are /dev/null, or cannot show every character."""
    for name, fd in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, open(fd, "w", closefd=False))  # noqa: PTH123, SIM115
        if hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="backslashreplace")


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Runs one command; returns the exit code."""
    try:
        open_streams()
        options = build_parser().parse_args(argv)
        code: int = options.run(options)
        sys.stdout.flush()  # here, where a closed pipe can still be caught
        return code
    except HostError as error:
        line, newline, log = str(error).partition("\n")
        say(f"{line}; '{escape(sys.argv[0])} doctor' tells what this host has and lacks{newline}{log}")
        return error.exit_code
    except TraceleftError as error:
        for text in error.errors:
            say(text)
        return error.exit_code
    except BrokenPipeError:  # of `events | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is buffered has nowhere to go
        return 0
    except KeyboardInterrupt:
        return 0
    except (OSError, MemoryError) as error:
        say(str(error) or "there is not enough memory")
        return 1


if __name__ == "__main__":
    sys.exit(main())
