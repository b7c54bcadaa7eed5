/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * What the kernel side and traceleft.py share. traceleft.py repeats these layouts as struct formats; a test compares
 * them with the BTF of the compiled object.
 */
#ifndef TRACELEFT_H
#define TRACELEFT_H

#define RECORD_VERSION 2

enum limits {
	MAX_ARGS = 6,        /* a syscall has at most six */
	COMM_SIZE = 16,      /* TASK_COMM_LEN, include/linux/sched.h */
	STRING_SIZE = 4097,  /* PATH_MAX with its NUL, and one byte more that tells "exactly that long" from "cut" */
	BUFFER_SIZE = 256,   /* of a buffer only its begin is worth a place in the ring */
	DATA_SIZE = 8192,    /* two whole paths: no event has more */
	MAX_SOURCES = 1024,  /* rows of the table of syscalls to listen to */
	MAX_PROCESSES = 65536,
	MAX_EVENTS = 512,    /* event types */
	MAX_DIMENSIONS = 32, /* look-ups for one event type */
	MAX_WORDS = 17,      /* of a bit vector: 1,024 filters, and the stream of those that need Python */
	MAX_BOUNDS_LOG2 = 16, /* steps of the binary search in one dimension */
	MAX_BY = 14,         /* all fields */
	MAX_RACES = 64,      /* tries to count an event in its second while other CPUs do the same */
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
	KIND_FD,         /* register, int: a file descriptor */
	KIND_DFD,        /* the same, or AT_FDCWD */
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

/* Fields that rules can test. A field is a bit of `needed` and `done`, and an index into struct record's `values`:
 * integers by value, texts as length | offset in `data` << 32. */
enum field {
	FIELD_ARGUMENT, /* 0 to 5 */
	FIELD_RET = MAX_ARGS,
	FIELD_PID,
	FIELD_TID,
	FIELD_PPID,
	FIELD_UID,
	FIELD_GID,
	FIELD_PROGRAM_ID,
	FIELD_COMM,
	FIELD_TIME, /* not for rules: the timestamp has been taken */
	FIELD_FILE, /* not for rules: the file of the descriptor argument has been looked up */
	FIELDS = 16,
};

/*
 * How the rules on one event type are evaluated (after T. V. Lakshman and D. Stiliadis, SIGCOMM 1998). Every rule is a
 * disjunction of rows, every row a conjunction with one condition per dimension. A dimension is one look-up of the
 * event: the interval that an integer lies in, or the entry of a text. It yields a bit vector of the rows that it
 * does not rule out. The AND of the vectors is the rows that are true, however many rules there are.
 */
enum dimension_kind {
	DIMENSION_INTEGER, /* (value & and_mask) ^ xor_mask, among sorted bounds */
	DIMENSION_WHOLE,   /* the whole text */
	DIMENSION_PREFIX,  /* its first `length` bytes */
	DIMENSION_SUFFIX,  /* its last `length` bytes */
};

struct dimension {
	__u8 kind;      /* enum dimension_kind */
	__u8 field;     /* enum field */
	__u16 length;   /* of a prefix or suffix; of a whole text when it is the only one */
	__u32 id;       /* of a text's dimension, for struct text_key */
	__u32 vector;   /* integer: of what lies below the first bound; text: of what has no entry */
	__u32 first;    /* integer: the first bound's place in `bounds`; bound i begins the interval of vector + i + 1.
			 * text: the place in `literals` of the only one, whose vector is vector + 1 */
	__u32 count;    /* how many bounds, or texts */
	__u32 reserved;
	__u64 and_mask;
	__u64 xor_mask;
};

struct matcher {
	__u32 words;      /* of this event type's bit vectors; 0: no filter wants it */
	__u32 needed;     /* fields that the dimensions and `by` read */
	__u32 vector;     /* all rows */
	__u32 first_row;  /* place in `rows` of bit 0 */
	__u32 dimension_count;
	__u32 reserved;
	struct dimension dimensions[MAX_DIMENSIONS];
};

struct vector {
	__u64 words[MAX_WORDS];
};

/* Key and value of the table of texts. The hash finds an entry, the comparison with its literal makes it certain. */
struct text_key {
	__u32 dimension;
	__u32 length;
	__u64 hash;
};

struct text {
	__u32 vector;
	__u32 literal; /* place in `literals` */
};

enum filter_flags {
	FILTER_STREAM = 1, /* not one filter: every event goes into the ring, for the filters that need Python */
};

struct filter {
	__u64 frequency;
	__u64 threshold;
	__u32 flags; /* enum filter_flags */
	__u32 max_groups;
	__u32 by_count;
	__u8 by[MAX_BY]; /* enum field */
	__u8 by_text[MAX_BY];
};

/* The counts of one `by` group. */
struct group {
	__u64 window;  /* second << 32 | events received in it */
	__u64 counted; /* events towards `frequency` */
};

struct group_key {
	__u32 filter;
	__u32 reserved;
	__u64 hash[2]; /* of the fields' values, with seeds that only this run knows */
};

struct filter_state {
	struct group group; /* without `by`; with it, of what has no place in `groups`: "other" */
	__u32 sampled;      /* the tick that has its sample already */
	__u32 groups;       /* how many groups this filter has */
	__u64 reserved[5];  /* a cache line of its own */
};

/* One filter's account on one CPU. matched = passed + folded. */
struct filter_counts {
	__u64 matched;
	__u64 passed;
	__u64 folded;
	__u64 submitted; /* records in the ring */
	__u64 ring_full; /* records that did not fit */
};

enum event_flags {
	EVENT_INCOMPLETE = 1,     /* bits 0 to 5: argument N could not be read whole */
	EVENT_CONTAINER = 1 << 8, /* the process is in a pid namespace other than the initial one */
	EVENT_HAS_FILE = 1 << 9,  /* file_inode and file_device are set */
};

/* A record of the ring buffer: this header, then the bytes of its texts. */
struct event_header {
	__u64 timestamp_ns; /* CLOCK_BOOTTIME */
	__s64 ret;
	__u64 program_id;
	__u64 args[MAX_ARGS]; /* integers by value; texts as length | offset behind the header << 32 */
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
	__u32 filter; /* whose sample it is, or a stream */
	__u32 tick;   /* the tick in which it was taken */
	char comm[COMM_SIZE];
};

_Static_assert(sizeof(struct argument) == 16, "traceleft.py: ARGUMENT");
_Static_assert(sizeof(struct source) == 16 + MAX_ARGS * 16, "traceleft.py: SOURCE");
_Static_assert(sizeof(struct dimension) == 40, "traceleft.py: DIMENSION");
_Static_assert(sizeof(struct filter) == 56, "traceleft.py: FILTER");
_Static_assert(sizeof(struct filter_state) == 64, "a cache line");
_Static_assert(sizeof(struct event_header) == 136, "traceleft.py: HEADER");
_Static_assert(FIELD_FILE < FIELDS, "`done` has a bit for each field");
#endif
