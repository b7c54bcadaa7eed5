/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * What the kernel side and traceleft.py share. traceleft.py repeats these layouts as struct formats; a test compares
 * them with the BTF of the compiled object.
 */
#ifndef TRACELEFT_H
#define TRACELEFT_H

#define RECORD_VERSION 3

enum limits {
	MAX_ARGS = 6,        /* a syscall has at most six */
	MAX_SLOTS = 8,       /* values of an event's arguments: an IPv6 address takes two */
	COMM_SIZE = 16,      /* TASK_COMM_LEN, include/linux/sched.h */
	STRING_SIZE = 4097,  /* PATH_MAX with its NUL, and one byte more that tells "exactly that long" from "cut" */
	BUFFER_SIZE = 256,   /* of a buffer only its begin is worth a place in the ring */
	DATA_SIZE = 8448,    /* two whole strings: no event has more arguments of that length */
	PATH_SIZE = 4096,    /* of a path that the kernel side builds */
	MAX_FILES = 2,       /* descriptor arguments of an event whose paths are shown */
	RECORD_DATA_SIZE = 28928, /* arguments, path, exe, cgroup and the paths of two descriptors */
	MAX_SOURCES = 1024,  /* rows of the table of syscalls to listen to */
	MAX_SYSCALLS = 1024, /* numbers of syscalls: the highest known is below 600 */
	MAX_PROCESSES = 65536,
	MAX_CLASSES = 1024,  /* sets of processes that are traced alike */
	MAX_EVENTS = 1024,   /* event types */
	MAX_DIMENSIONS = 32, /* look-ups for one event type */
	MAX_WORDS = 17,      /* of a bit vector: 1,024 filters, and the stream of those that need Python */
	MAX_BOUNDS_LOG2 = 16, /* steps of the binary search in one dimension */
	MAX_BY = 24,         /* all fields */
	MAX_ROWS_OF_SYSCALL = 4, /* of `sources`: an event type and those that it stands in for */
	MAX_RACES = 64,      /* tries to count an event in its second while other CPUs do the same */
	MAX_ARGV = 128,      /* arguments of a new program that are shown */
	MAX_PENDING = 1024,  /* calls between their entry and their exit, of those whose arguments are read at entry */
	SHORT_DATA_SIZE = 512, /* of such a call, most often */
	MAX_SOCKETS = 65536, /* connections whose owner is known */
	BUCKETS = 66,        /* of a histogram: negative, zero, and one for each power of two */
	BUCKETS_SIZE = 72,   /* the same in whole cache lines */
	TOP_SLOTS = 512,     /* groups that are counted in one second; a power of two */
	TOP_TABLE = TOP_SLOTS + 1, /* the last one counts what finds no other */
	TOP_PROBES = 8,
	TOP_FIELDS = 3,      /* that a group is told by */
	TOP_TEXT = 128,      /* of a text that is shown; one byte less is used */
	MAX_PROBES = 32,     /* places that are looked at for a text */
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
	KIND_ARGV,       /* the strings that the array at the register's address points to, joined with spaces */
};

struct argument {
	__u8 kind;      /* enum argument_kind */
	__u8 reg;       /* 0 to 5 */
	__u8 bits;      /* 16, 32 or 64 */
	__u8 reserved[5];
	__u64 value;
};

enum source_flags {
	SOURCE_ANY_PROCESS = 1, /* processes without a class are wanted too, as program_id */
	SOURCE_BY_PROCESS = 2,  /* some processes have a class */
	SOURCE_AT_ENTRY = 4,    /* arguments and path are read at entry: at exit they are gone */
	SOURCE_NO_RETURN = 8,   /* the event happens at entry */
};

/* Where the event's `path` comes from. */
enum path_kind {
	PATH_NONE,
	PATH_FD,     /* the file of the descriptor in argument `path_argument` */
	PATH_AT,     /* the name in argument `path_argument`, behind the directory `dfd` */
	PATH_RETURN, /* the file of the descriptor that the call returned; as PATH_AT when it failed */
	PATH_EXE,    /* the program that the process runs; as PATH_AT when the call failed */
};

enum {
	DFD_CWD = 255, /* the current directory, and no register */
};

/* One row of the table that user space fills: how one syscall becomes one event type. */
struct source {
	__u16 event; /* index of the event type in traceleft.py's table */
	__u8 flags;  /* enum source_flags */
	__u8 only_fdcwd; /* bit N: only calls whose register N is AT_FDCWD, as mkdirat standing in for mkdir */
	__u8 path_kind;  /* enum path_kind */
	__u8 path_argument;
	__u8 dfd;        /* register of the directory's descriptor, or DFD_CWD */
	__u8 files[MAX_FILES];   /* arguments that are descriptors; MAX_ARGS and more: none */
	__u8 condition_register; /* only calls whose register has the low 32 bits `condition`; MAX_ARGS: all */
	__u8 reserved[2];
	__u32 condition;
	__u64 program_id;
	struct argument arguments[MAX_ARGS];
};

/* The rows of `sources` that belong to a syscall number: for the program that sees all syscalls. */
struct syscall_rows {
	__u16 first;
	__u16 count;
};

/* A process that is traced, as those of its class are: it began in these nanoseconds of CLOCK_BOOTTIME. */
struct process {
	__u32 class;
	__u32 reserved;
	__u64 from, to;
};

/* What a class of processes is traced for. */
struct class_event {
	__u64 program_id;
	__u32 wanted;
	__u32 reserved;
};

/* Fields that rules can test. A field is a bit of `needed` and `done`, and an index into struct record's `values`:
 * integers by value, texts as length | offset in `data` << 32. */
enum field {
	FIELD_ARGUMENT, /* 0 to 7 */
	FIELD_RET = MAX_SLOTS,
	FIELD_PID,
	FIELD_TID,
	FIELD_PPID,
	FIELD_UID,
	FIELD_GID,
	FIELD_PROGRAM_ID,
	FIELD_COMM,
	FIELD_EUID,
	FIELD_MNTNS,
	FIELD_NETNS,
	FIELD_PIDNS,
	FIELD_PATH,
	FIELD_EXE,
	FIELD_CGROUP,
	FIELD_FILE, /* MAX_FILES of them; not for rules */
	FIELD_FILE_1,
	FIELD_TIME, /* not for rules: the timestamp has been taken */
	FIELDS = 32,
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
	__u32 only_argument; /* all that is needed; MAX_ARGS: more or other */
	struct dimension dimensions[MAX_DIMENSIONS];
};

struct vector {
	__u64 words[MAX_WORDS];
};

/* An entry of the table of texts. The hash finds it, the comparison with its literal makes it certain. */
struct text {
	__u64 hash;
	__u32 dimension;
	__u32 length;
	__u32 vector;
	__u32 literal; /* place in `literals` */
	__u32 used;    /* 0: free, and the end of a search */
	__u32 reserved;
};

enum filter_flags {
	FILTER_STREAM = 1,  /* not one filter: every event goes into the ring, for the filters that need Python */
	FILTER_GENERAL = 2, /* is counted by more than `frequency` */
};

/* Which matched events pass: traceleft.py's classes of these names say how. */
enum processing {
	PROCESSING_SIGMA,
	PROCESSING_LIMIT, /* `distinct`, too */
	PROCESSING_BACKOFF,
};

/* What is counted of the events that pass, beside their number. */
enum output {
	OUTPUT_NONE,
	OUTPUT_HISTOGRAM, /* of one integer field */
	OUTPUT_TOP,       /* each group of some fields */
};

struct filter {
	__u64 frequency; /* backoff: `multiplier` */
	__u64 threshold; /* limit, backoff: `count` */
	__u32 flags; /* enum filter_flags */
	__u32 max_groups;
	__u32 fields; /* what its records show: a bit of each enum field */
	__u32 by_count;
	__u32 processing; /* enum processing */
	__u32 seconds;    /* of the window in which `threshold` counts; 0: for ever */
	__u32 output;     /* enum output */
	__u32 output_index; /* which of `histograms` or `tops` */
	__u8 output_count;
	__u8 output_signed;
	__u8 output_by[TOP_FIELDS]; /* enum field */
	__u8 output_text[TOP_FIELDS];
	__u8 by[MAX_BY]; /* enum field */
	__u8 by_text[MAX_BY];
};

/* The counts of one `by` group. */
struct group {
	__u64 window;  /* second that it begins with << 32 | events received in it; 0: none yet */
	__u64 counted; /* events towards `frequency` */
};

struct group_key {
	__u64 hash[2]; /* of the fields' values, with seeds that only this run knows */
};

struct filter_state {
	struct group group; /* without `by`; with it, of what has no place in `groups`: "other" */
	__u32 sampled;      /* the tick that has its sample already */
	__u32 groups;       /* how many groups this filter has */
	__u64 reserved[5];  /* a cache line of its own */
};

/* One filter's account on one CPU. matched = passed + folded. traceleft.py maps them: a lookup by bpf() would switch the
 * programs off on its CPU meanwhile (bpf_disable_instrumentation() in kernel/bpf/syscall.c). */
struct filter_counts {
	__u64 matched;
	__u64 passed;
	__u64 folded;
	__u64 submitted; /* records in the ring */
	__u64 ring_full; /* records that did not fit */
	__u64 reserved[3]; /* a cache line of its own */
};

/* One filter's histogram on one CPU. traceleft.py maps these, and the groups below, as it does struct filter_counts. */
struct histogram {
	__u64 buckets[BUCKETS_SIZE];
};

struct top_field {
	__u64 value; /* of an integer; the length of a text */
	__u8 text[TOP_TEXT];
};

/* A group and how many events of the second were in it. A filter has two tables of them: one for the second that it is,
 * and one that traceleft.py reads and then clears. */
struct top_slot {
	__u64 hash; /* 0: free */
	__u64 count;
	struct top_field fields[TOP_FIELDS];
};

/* Who a connection belongs to: what softirq, where a handshake or a connection may end, cannot tell. The program and the
 * group are noted as the kernel's structures, and named when an event is reported: their paths are long. */
struct owner {
	__u64 exe_dentry, exe_vfsmount;
	__u64 exe_inode; /* by which the dentry is known to be the same still */
	__u64 root_dentry, root_vfsmount;
	__u64 cgroup, cgroup_id; /* struct kernfs_node, and its id for the same purpose */
	__u64 started; /* when the process began, in nanoseconds of CLOCK_BOOTTIME */
	__u32 pid, tid, ppid, uid, gid, euid, mntns, pidns;
	__u32 in_container;
	__u32 established; /* has been reported as connected or accepted */
	char comm[COMM_SIZE];
};

/* What the programs and traceleft.py tell each other during a run. */
struct run {
	__u32 tick;       /* set each second: a filter takes one sample in each */
	__u32 generation; /* of the tables, which a new spec brings: its lowest bit says which programs see an event */
	__u32 closed;     /* not all is attached yet, or any more: no event is seen */
	__u32 reserved;
	__u64 missed_calls;    /* not seen because `pending` was full */
	__u64 missed_owners;   /* connections without an owner because `sockets` was full */
	__u64 missed_children; /* not followed because `processes` was full */
	__u64 uring;           /* io_uring submissions */
};

enum tcp_event {
	TCP_CONNECT,
	TCP_ACCEPT,
	TCP_CLOSED,
	TCP_EVENTS, /* rows of `tcp_rows`: each of these for IPv4, then each for IPv6 */
};

enum event_flags {
	EVENT_INCOMPLETE = 1,          /* bits 0 to 5: argument N could not be read whole */
	EVENT_CONTAINER = 1 << 8,      /* the process is in a pid namespace other than the initial one */
	EVENT_PATH_INCOMPLETE = 1 << 9, /* the path is longer than PATH_SIZE, or a part of it could not be read */
	EVENT_PATH_UNRESOLVED = 1 << 10, /* the path is a name as it was passed, behind its directory */
	EVENT_PATH_UNKNOWN = 1 << 11,  /* there is no such descriptor */
};

/* A record of the ring buffer: this header, then the bytes of its texts. */
struct event_header {
	__u64 timestamp_ns; /* CLOCK_BOOTTIME */
	__s64 ret;
	__u64 program_id;
	__u64 args[MAX_SLOTS]; /* integers by value; texts as length | offset behind the header << 32 */
	__u64 path, exe, cgroup; /* texts */
	__u64 files[MAX_FILES];  /* texts: paths of descriptor arguments */
	__u32 pid; /* the process: the kernel's tgid */
	__u32 tid;
	__u32 ppid;
	__u32 uid;
	__u32 gid;
	__u32 euid;
	__u32 mntns, netns, pidns; /* inode numbers of the namespaces */
	__u16 event;
	__u16 flags; /* enum event_flags */
	__u32 reserved;
	__u32 version;
	__u32 filter; /* whose sample it is, or a stream */
	__u32 tick;   /* the tick in which it was taken */
	char comm[COMM_SIZE];
};

_Static_assert(sizeof(struct argument) == 16, "traceleft.py: ARGUMENT");
_Static_assert(sizeof(struct source) == 24 + MAX_ARGS * 16, "traceleft.py: SOURCE");
_Static_assert(sizeof(struct dimension) == 40, "traceleft.py: DIMENSION");
_Static_assert(sizeof(struct filter) == 104, "traceleft.py: FILTER");
_Static_assert(sizeof(struct filter_state) == 64, "a cache line");
_Static_assert(sizeof(struct filter_counts) == 64, "a cache line");
_Static_assert(sizeof(struct event_header) == 200, "traceleft.py: HEADER");
_Static_assert(FIELD_TIME < FIELDS, "`done` has a bit for each field");
#endif
