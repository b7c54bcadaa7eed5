/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * What the kernel side and traceleft.py share. traceleft.py repeats these layouts as struct formats (section "Decoding"
 * and "Tracer"); a test compares them with the BTF of the compiled object.
 */
#ifndef TRACELEFT_H
#define TRACELEFT_H

#define RECORD_VERSION 1

enum limits {
	MAX_ARGS = 6,       /* a syscall has at most six */
	COMM_SIZE = 16,     /* TASK_COMM_LEN, include/linux/sched.h */
	STRING_SIZE = 4097, /* PATH_MAX with its NUL, and one byte more that tells "exactly that long" from "cut" */
	BUFFER_SIZE = 256,  /* of a buffer only its begin is worth a place in the ring */
	DATA_SIZE = 8192,   /* two whole paths: no event has more */
	MAX_SOURCES = 1024, /* rows of the table of syscalls to listen to */
	MAX_PROCESSES = 65536,
};

/* Where an argument's value is found; struct source says it per syscall, so that a new syscall needs no new object. */
enum argument_kind {
	KIND_NONE,       /* behind the last argument */
	KIND_SIGNED,     /* register, sign-extended from `bits` */
	KIND_UNSIGNED,   /* register, zero-extended from `bits` */
	KIND_CONSTANT,   /* `value`: what the syscall implies, as creat does its flags */
	KIND_MEMORY,     /* the u64 at the register's address + `value`: a field of a struct, as openat2's open_how */
	KIND_STRING,     /* the NUL-terminated string at the register's address */
	KIND_BUFFER_IN,  /* the bytes at the register's address; register `value` holds how many */
	KIND_BUFFER_OUT, /* the same, filled by the kernel: the return value says how many */
	KIND_FD,         /* register, int: a file descriptor or AT_FDCWD */
};

struct argument {
	__u8 kind;      /* enum argument_kind */
	__u8 reg;       /* 0 to 5 */
	__u8 bits;      /* 16, 32 or 64 */
	__u8 reserved[5];
	__u64 value;
};

enum source_flags {
	SOURCE_ANY_PROCESS = 1,   /* processes without an entry of their own are wanted too, as program_id */
	SOURCE_BY_PROCESS = 2,    /* some processes have an entry of their own in `processes` */
	SOURCE_ONLY_FDCWD = 4,    /* only calls whose register 0 is AT_FDCWD: mkdirat standing in for mkdir */
};

/* One row of the table that user space fills: how one syscall becomes one event type. */
struct source {
	__u16 event; /* index of the event type in traceleft.py's table */
	__u16 flags; /* enum source_flags */
	__u32 reserved;
	__u64 program_id;
	struct argument arguments[MAX_ARGS];
};

struct process_key {
	__u32 pid;
	__u32 event;
};

enum event_flags {
	EVENT_INCOMPLETE = 1,     /* bits 0 to 5: argument N could not be read whole */
	EVENT_CONTAINER = 1 << 8, /* the process is in a pid namespace other than the initial one */
	EVENT_HAS_FILE = 1 << 9,  /* file_inode and file_device are set */
};

/* A record of the ring buffer: this header, then the bytes of its strings and buffers in the order of the arguments. */
struct event_header {
	__u64 timestamp_ns; /* CLOCK_BOOTTIME */
	__s64 ret;
	__u64 program_id;
	__u64 args[MAX_ARGS]; /* integers by value; strings and buffers as the number of bytes behind the header */
	__u64 file_inode;     /* of the file behind the descriptor argument, to prove a path that is looked up later */
	__u32 file_device;
	__u32 pid; /* the process: the kernel's tgid */
	__u32 tid;
	__u32 ppid;
	__u32 uid;
	__u32 gid;
	__u16 event;
	__u16 flags; /* enum event_flags */
	__u32 version;
	char comm[COMM_SIZE];
};

enum lost_cause {
	LOST_RING_FULL,
	LOST_CAUSES,
};

/* One event type's account on one CPU. */
struct counters {
	__u64 submitted;
	__u64 lost[LOST_CAUSES];
};

_Static_assert(sizeof(struct argument) == 16, "traceleft.py: ARGUMENT");
_Static_assert(sizeof(struct source) == 16 + MAX_ARGS * 16, "traceleft.py: SOURCE");
_Static_assert(sizeof(struct event_header) == 128, "traceleft.py: HEADER");
_Static_assert(DATA_SIZE >= STRING_SIZE, "a whole path fits");
#endif
