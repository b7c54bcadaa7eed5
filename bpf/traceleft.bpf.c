// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * One program, attached to the sys_exit tracepoint of every syscall that the spec names. The syscall's number leads to
 * the rows of `sources` that say how it becomes an event; traceleft.py fills them, so nothing here is compiled for one
 * architecture. At exit the result is known, the strings are resident because the kernel itself has just read them, and
 * the argument registers are still as they were at entry.
 *
 * An event is fetched as far as the rules need it, matched, and counted here; a record crosses the ring buffer once a
 * second per filter, as a sample, or for filters whose rules need Python.
 *
 * Functions that are __noinline and not static are verified once each, for any arguments, and not anew for every call
 * in every iteration: with them the loops below cost the verifier thousands of instructions and not millions.
 */
#include "vmlinux.h"

#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>

#include "traceleft.h"

#define AT_FDCWD (-100) /* include/uapi/linux/fcntl.h */
#define NSEC_PER_SEC 1000000000ULL
#define REGISTERS 8 /* six and two unused: with a power of two, a mask is a bound that the verifier understands */
#define TEXT_SIZE 32768
#define TEXT_MASK (TEXT_SIZE - 1)
#define TEXT_WORDS (STRING_SIZE / 8)
#define NO_FILTER (~0U)

/* Places in a record's data, behind what is captured of the arguments, of texts that are built elsewhere first. A path
 * is built from its end to its begin. */
#define NAME_SIZE 256 /* NAME_MAX and one, include/uapi/linux/limits.h */
#define REGION_SIZE (PATH_SIZE + NAME_SIZE)
#define PATH_OFFSET DATA_SIZE
#define EXE_OFFSET (PATH_OFFSET + REGION_SIZE)
#define CGROUP_OFFSET (EXE_OFFSET + REGION_SIZE)
#define FILE_OFFSET (CGROUP_OFFSET + REGION_SIZE)
#define COMM_OFFSET (FILE_OFFSET + MAX_FILES * REGION_SIZE)
#define NAME_OFFSET (COMM_OFFSET + NAME_SIZE)
#define CLIMB 32      /* names that climb() reads */
#define MAX_CLIMBS 66 /* 2,048 names of one letter fill a path, and there are mount points */
#define MAX_CGROUPS 64

/* Set by traceleft.py before loading. */
const volatile __u32 own_pid = 0;          /* never traced: the tracer's own writes would make a loop */
const volatile __u32 wakeup_bytes = 65536; /* wake the reader when this much is pending; it polls by time anyway */
const volatile __u64 hash_seeds[2] = {};   /* random: nobody outside can make texts collide */
const volatile __u32 event_types = 1;      /* entries of `classes` for each class */
const volatile __u32 cpus = 1;
const volatile __u32 histogram_count = 1;
const volatile __u32 text_mask = 0;        /* entries of `texts` - 1, which are a power of two */

volatile struct run run = {};

/* What is known of the event at hand. A record is built here and not in the ring: bpf_ringbuf_reserve() wants a size
 * that the verifier knows, so that every record would be as long as the longest. */
struct record {
	__u64 values[FIELDS]; /* by enum field */
	__u64 registers[REGISTERS];
	__u32 done;   /* fields that have been fetched */
	__u32 used;   /* bytes of data */
	__u32 settled; /* texts that have been moved behind the others, a bit of each field */
	__u32 reserved;
	__u32 filter; /* the last one counted: rows of one filter are neighbours, and count once */
	__u32 flags;  /* enum event_flags */
	__u64 rows[MAX_WORDS]; /* those that are true so far */
	__u64 dentry, vfsmount, root_dentry, root_vfsmount; /* on the way from a file to the root */
	__u32 at;     /* where the path begins as far as it is built */
	__u32 begin;  /* where it may begin at the earliest */
	__u32 event;  /* type, and process, of a call that is between its entry and its exit */
	__u32 pid;
	struct owner owner; /* of a connection: here, since the stack is short */
	struct event_header header;
	__u8 data[TEXT_SIZE]; /* behind the header: both go into the ring at once */
	__u64 slack;          /* the last word of a text may be read beyond its end */
};

/* What is kept of a record between entry and exit: copying a long one takes a while, and few are. */
#define RECORD_HEAD __builtin_offsetof(struct record, data)
struct saved {
	__u8 bytes[RECORD_HEAD + SHORT_DATA_SIZE];
};
struct saved_long {
	__u8 bytes[RECORD_HEAD + DATA_SIZE];
};

#define MAP(name, kind, entries, key_type, value_type)                                                                 \
	struct {                                                                                                       \
		__uint(type, BPF_MAP_TYPE_##kind);                                                                     \
		__uint(max_entries, entries);                                                                          \
		__type(key, key_type);                                                                                 \
		__type(value, value_type);                                                                             \
	} name SEC(".maps")

/* traceleft.py writes the tables where it has mapped them: bpf() would switch the programs off on its CPU meanwhile
 * (bpf_disable_instrumentation() in kernel/bpf/syscall.c), also those of the generation that is running. */
#define TABLE(name, entries, value_type)                                                                               \
	struct {                                                                                                       \
		__uint(type, BPF_MAP_TYPE_ARRAY);                                                                      \
		__uint(max_entries, entries);                                                                          \
		__uint(map_flags, BPF_F_MMAPABLE);                                                                     \
		__type(key, __u32);                                                                                    \
		__type(value, value_type);                                                                             \
	} name SEC(".maps")

/* What has one entry here is sized by traceleft.py for the spec and the machine before loading. Of each generation: */
TABLE(sources, MAX_SOURCES, struct source);
TABLE(syscalls, MAX_SYSCALLS, struct syscall_rows);
TABLE(entry_rows, MAX_EVENTS, __u32);   /* event type that is read at entry -> row of `sources` + 1, or 0 */
TABLE(tcp_rows, 2 * TCP_EVENTS, __u32); /* row of `sources` + 1, or 0 */
TABLE(matchers, MAX_EVENTS, struct matcher);
TABLE(vectors, 1, struct vector);
TABLE(bounds, 1, __u64);
TABLE(texts, 1, struct text); /* open addressing: from the place that the hash says to the first that is free */
TABLE(literals, 1, __u64);    /* eight bytes each, the last padded with zeros */
TABLE(rows, 1, __u32);        /* row -> filter */
TABLE(filters, 1, struct filter);

/* Shared by the generations: what has been counted, and what the programs remember. */
TABLE(filter_states, 1, struct filter_state);
TABLE(filter_counts, 1, struct filter_counts); /* filter * CPUs + CPU */
MAP(processes, HASH, MAX_PROCESSES, __u32, struct process); /* by pid */
MAP(classes, ARRAY, 1, __u32, struct class_event); /* class * event_types + event */
MAP(pending, HASH, 1, __u64, struct saved);        /* task -> its call */
MAP(pending_long, HASH, 1, __u64, struct saved_long);
MAP(sockets, HASH, 1, __u64, struct owner);        /* struct sock -> whose it is */
MAP(uring, PERCPU_ARRAY, 256, __u32, __u64);       /* io_uring submissions by opcode */
MAP(scratch, ARRAY, 2, __u32, struct record);      /* one for each CPU, and one for what comes as softirq meanwhile */
MAP(synthetic, ARRAY, 1, __u32, struct record);    /* the event for the program `feed` */

/* filter -> the counts of its groups. A map for each: a filter that a new spec leaves as it is keeps its own. */
struct groups_of_filter {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__uint(key_size, sizeof(struct group_key)); /* clang describes no type that only an inner map names */
	__uint(value_size, sizeof(struct group));
};
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 1);
	__type(key, __u32);
	__array(values, struct groups_of_filter);
} groups SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, struct histogram);
} histograms SEC(".maps"); /* CPU * histogram_count + output_index */

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, struct top_slot);
} tops SEC(".maps"); /* (2 * output_index + second of two) * TOP_TABLE + slot */

/* Two, so that a flood of streamed events costs no filter its sample. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 4096);
} samples SEC(".maps"), events SEC(".maps");

/* The context of syscalls/sys_exit_*: struct syscall_tp_t in kernel/trace/trace_syscalls.c. That of sys_enter_* begins
 * alike. */
struct sys_exit_context {
	__u64 common;
	__s64 nr;
	__s64 ret;
};

/* A mask on the very register that is used next: verifiers before Linux 6.3 forget what a comparison says of a copy. */
#define BOUND(value, mask) asm volatile("%0 &= %1" : "+r"(value) : "i"(mask))

static __always_inline struct task_struct *current_task(void)
{
	return (void *)bpf_get_current_task_btf();
}

/* ---------------------------------------------------------------------------------------------------------------
 * Paths: what d_path() in fs/d_path.c says, which tracepoints may not call
 */

#define PIPEFS_MAGIC 0x50495045 /* include/uapi/linux/magic.h */
#define SOCKFS_MAGIC 0x534F434B
#define ANON_INODE_FS_MAGIC 0x09041934
#define NSFS_MAGIC 0x6e736673
#define PID_FS_MAGIC 0x50494446

static __always_inline void begin_path(struct record *record, __u32 region)
{
	record->at = region + REGION_SIZE;
	record->begin = region + NAME_SIZE;
}

static __always_inline __u64 end_path(struct record *record, __u32 region)
{
	return (region + REGION_SIZE - record->at) | (__u64)record->at << 32;
}

/* Puts up to 255 bytes before what there is of the path. Returns whether there was room. */
static __always_inline bool prepend(struct record *record, const void *text, __u32 length)
{
	__u32 at = record->at - length;

	if (length >= NAME_SIZE || at < record->begin || at > TEXT_SIZE - NAME_SIZE) {
		record->flags |= EVENT_PATH_INCOMPLETE;
		return false;
	}
	bpf_probe_read_kernel(&record->data[at], length & (NAME_SIZE - 1), text);
	record->at = at;
	return true;
}

#define PREPEND(record, literal) prepend(record, literal, sizeof(literal) - 1)

static __always_inline void prepend_number(struct record *record, __u64 number)
{
	char digit;

	for (int i = 0; i < 20; i++) {
		digit = '0' + number % 10;
		prepend(record, &digit, 1);
		number /= 10;
		if (!number)
			break;
	}
}

/* d_parent and d_name of struct dentry. */
struct dentry_name {
	struct dentry *parent;
	__u32 hash, length;
	const void *name;
};

#define BEHIND_PARENT(field) (bpf_core_field_offset(struct dentry, field) - bpf_core_field_offset(struct dentry, d_parent))

/* On all kernels so far the two are neighbours, and one call reads them. */
static __always_inline void read_name(struct dentry *dentry, struct dentry_name *name)
{
	if (BEHIND_PARENT(d_name.len) == __builtin_offsetof(struct dentry_name, length) &&
	    BEHIND_PARENT(d_name.name) == __builtin_offsetof(struct dentry_name, name)) {
		bpf_probe_read_kernel(name, sizeof(*name),
				      (void *)dentry + bpf_core_field_offset(struct dentry, d_parent));
	} else {
		name->parent = BPF_CORE_READ(dentry, d_parent);
		name->length = BPF_CORE_READ(dentry, d_name.len);
		name->name = BPF_CORE_READ(dentry, d_name.name);
	}
}

/* A name of the file system, and the slash before it. */
static __always_inline bool prepend_name(struct record *record, const struct dentry_name *name)
{
	__u64 at;

	if (!prepend(record, name->name, name->length))
		return false;
	if (record->at <= record->begin) {
		record->flags |= EVENT_PATH_INCOMPLETE;
		return false;
	}
	at = --record->at;
	BOUND(at, TEXT_MASK);
	record->data[at] = '/'; /* a call of bpf_probe_read_kernel() costs as much as the rest */
	return true;
}

/* Files without a place in a file system: pipes, sockets, … Returns whether it is one. */
__noinline int name_pseudo_file(struct record *record)
{
	struct dentry *dentry;
	struct vfsmount *vfsmount;
	struct inode *inode;
	struct ns_common *ns;
	struct dentry_name dentry_name;
	char name[32] = {};
	__u64 magic;
	__s64 size;

	if (!record)
		return 0;
	dentry = (void *)record->dentry;
	vfsmount = (void *)record->vfsmount;
	if (!BPF_CORE_READ(dentry, d_op) || !BPF_CORE_READ(dentry, d_op, d_dname))
		return 0;
	if (BPF_CORE_READ(dentry, d_parent) == dentry && /* as a mount's root it has a path */
	    BPF_CORE_READ(vfsmount, mnt_root) == dentry)
		return 0;
	inode = BPF_CORE_READ(dentry, d_inode);
	magic = BPF_CORE_READ(dentry, d_sb, s_magic);
	if (magic == PIPEFS_MAGIC || magic == SOCKFS_MAGIC || magic == NSFS_MAGIC) {
		PREPEND(record, "]");
		prepend_number(record, BPF_CORE_READ(inode, i_ino));
		PREPEND(record, ":[");
		if (magic == NSFS_MAGIC) {
			ns = BPF_CORE_READ(inode, i_private);
			size = bpf_probe_read_kernel_str(name, sizeof(name), BPF_CORE_READ(ns, ops, name));
			prepend(record, name, size > 0 ? size - 1 : 0);
		} else if (magic == PIPEFS_MAGIC) {
			PREPEND(record, "pipe");
		} else {
			PREPEND(record, "socket");
		}
	} else if (magic == PID_FS_MAGIC) {
		PREPEND(record, "anon_inode:[pidfd]");
	} else if (magic == ANON_INODE_FS_MAGIC) {
		prepend(record, BPF_CORE_READ(dentry, d_name.name), BPF_CORE_READ(dentry, d_name.len));
		PREPEND(record, "anon_inode:");
	} else { /* memfd_create(), shared memory */
		PREPEND(record, " (deleted)");
		read_name(dentry, &dentry_name);
		prepend_name(record, &dentry_name);
	}
	return 1;
}

/* Goes up some names from record->dentry. Returns whether it has arrived at a root, or cannot go on. */
__noinline int climb(struct record *record)
{
	struct dentry *dentry, *mount_root;
	struct dentry_name name;
	struct vfsmount *vfsmount;
	struct mount *mount, *mount_parent;

	if (!record)
		return 1;
	dentry = (void *)record->dentry;
	vfsmount = (void *)record->vfsmount;
	mount_root = BPF_CORE_READ(vfsmount, mnt_root);
	for (int i = 0; i < CLIMB; i++) {
		if ((__u64)dentry == record->root_dentry && (__u64)vfsmount == record->root_vfsmount)
			return 1;
		read_name(dentry, &name);
		if (dentry == mount_root || dentry == name.parent) {
			mount = (void *)vfsmount - bpf_core_field_offset(struct mount, mnt);
			mount_parent = BPF_CORE_READ(mount, mnt_parent);
			if (dentry != mount_root || mount == mount_parent || !mount_parent)
				return 1; /* the root of all, or of a mount that is gone */
			dentry = BPF_CORE_READ(mount, mnt_mountpoint);
			vfsmount = (void *)mount_parent + bpf_core_field_offset(struct mount, mnt);
			mount_root = BPF_CORE_READ(vfsmount, mnt_root);
			continue;
		}
		if (!prepend_name(record, &name))
			return 1;
		dentry = name.parent;
	}
	record->dentry = (__u64)dentry;
	record->vfsmount = (__u64)vfsmount;
	return 0;
}

/* Puts the path of a file before what there is of the record's, up to the root that the record names. */
__noinline int prepend_path_below_root(struct record *record)
{
	struct dentry *dentry;
	__u32 end;

	if (!record)
		return 0;
	end = record->at;
	dentry = (void *)record->dentry;
	if (name_pseudo_file(record))
		return 0;
	if (!BPF_CORE_READ(dentry, d_hash.pprev) && BPF_CORE_READ(dentry, d_parent) != dentry) {
		PREPEND(record, " (deleted)");
		end = 0;
	}
	for (int i = 0; i < MAX_CLIMBS; i++)
		if (climb(record))
			break;
	if (record->at == end && (end >= TEXT_SIZE || record->data[end & TEXT_MASK] != '/'))
		PREPEND(record, "/"); /* the root itself */
	return 0;
}

/* The same, up to the root of the process. */
static __always_inline void prepend_path(struct record *record, __u64 dentry, __u64 vfsmount)
{
	struct task_struct *task = current_task();

	record->dentry = dentry;
	record->vfsmount = vfsmount;
	record->root_dentry = (__u64)BPF_CORE_READ(task, fs, root.dentry);
	record->root_vfsmount = (__u64)BPF_CORE_READ(task, fs, root.mnt);
	prepend_path_below_root(record);
}

static __always_inline struct file *descriptor_file(struct task_struct *task, __s32 fd)
{
	struct fdtable *table = BPF_CORE_READ(task, files, fdt);
	struct file *file = 0;

	if (table && (__u32)fd < BPF_CORE_READ(table, max_fds))
		bpf_probe_read_kernel(&file, sizeof(file), BPF_CORE_READ(table, fd) + (__u32)fd);
	return file;
}

static __always_inline __u64 file_path(struct record *record, struct file *file, __u32 region)
{
	begin_path(record, region);
	if (!file)
		return 0;
	prepend_path(record, (__u64)BPF_CORE_READ(file, f_path.dentry), (__u64)BPF_CORE_READ(file, f_path.mnt));
	return end_path(record, region);
}

/* The name that was passed, behind its directory when it is relative. */
static __always_inline __u64 joined_path(struct record *record, const struct source *source)
{
	struct task_struct *task = current_task();
	__u64 name = record->values[source->path_argument % MAX_SLOTS];
	__u32 length = name, offset = name >> 32, at;
	__s32 dfd = source->dfd == DFD_CWD ? AT_FDCWD : record->registers[source->dfd % REGISTERS];
	struct file *file;

	record->flags |= EVENT_PATH_UNRESOLVED;
	if (record->flags & EVENT_INCOMPLETE << source->path_argument % MAX_ARGS)
		record->flags |= EVENT_PATH_INCOMPLETE;
	begin_path(record, PATH_OFFSET);
	if (offset > DATA_SIZE || length > PATH_SIZE)
		return 0;
	at = record->at - length;
	if (at > TEXT_SIZE - 2 * PATH_SIZE)
		return 0;
	bpf_probe_read_kernel(&record->data[at], length & (2 * PATH_SIZE - 1), &record->data[offset]);
	record->at = at;
	if (length && record->data[offset] == '/')
		return end_path(record, PATH_OFFSET);
	if (length && !PREPEND(record, "/"))
		return end_path(record, PATH_OFFSET);
	if (dfd == AT_FDCWD) {
		prepend_path(record, (__u64)BPF_CORE_READ(task, fs, pwd.dentry), (__u64)BPF_CORE_READ(task, fs, pwd.mnt));
		return end_path(record, PATH_OFFSET);
	}
	file = descriptor_file(task, dfd);
	if (!file) {
		record->flags |= EVENT_PATH_UNKNOWN;
		return 0;
	}
	prepend_path(record, (__u64)BPF_CORE_READ(file, f_path.dentry), (__u64)BPF_CORE_READ(file, f_path.mnt));
	return end_path(record, PATH_OFFSET);
}

static __always_inline __u64 event_path(struct record *record, const struct source *source)
{
	struct task_struct *task = current_task();
	__s64 ret = record->values[FIELD_RET];
	struct file *file;

	if (source->path_kind == PATH_NONE)
		return 0;
	if (source->path_kind == PATH_AT || (ret < 0 && source->path_kind >= PATH_RETURN))
		return joined_path(record, source);
	if (source->path_kind == PATH_EXE)
		file = BPF_CORE_READ(task, mm, exe_file);
	else
		file = descriptor_file(task, source->path_kind == PATH_RETURN ? ret :
					     record->values[source->path_argument % MAX_SLOTS]);
	if (!file)
		record->flags |= EVENT_PATH_UNKNOWN;
	return file_path(record, file, PATH_OFFSET);
}

/* The path of the file or directory that descriptor argument `index` of the source is. */
static __always_inline __u64 argument_file(struct record *record, const struct source *source, __u32 index)
{
	struct task_struct *task = current_task();
	__u32 argument = source->files[index], region = FILE_OFFSET + index * REGION_SIZE;
	__s32 fd;

	if (argument >= MAX_ARGS)
		return 0;
	if (source->path_kind == PATH_FD && source->path_argument == argument)
		return 0; /* complete() takes the event's path */
	fd = record->values[argument % MAX_SLOTS];
	if (source->arguments[argument].kind != KIND_DFD || fd != AT_FDCWD)
		return file_path(record, descriptor_file(task, fd), region);
	begin_path(record, region);
	prepend_path(record, (__u64)BPF_CORE_READ(task, fs, pwd.dentry), (__u64)BPF_CORE_READ(task, fs, pwd.mnt));
	return end_path(record, region);
}

static __always_inline struct kernfs_node *kernfs_parent(struct kernfs_node *node)
{
	if (bpf_core_field_exists(node->parent))
		return BPF_CORE_READ(node, parent);
	return BPF_CORE_READ((struct kernfs_node___6_15 *)node, __parent);
}

/* The path of a cgroup of version 2. */
__noinline __u64 cgroup_path(struct record *record, __u64 cgroup)
{
	struct kernfs_node *node = (void *)cgroup, *parent;
	__s64 size;

	if (!record)
		return 0;
	begin_path(record, CGROUP_OFFSET);
	for (int i = 0; i < MAX_CGROUPS && node; i++) {
		parent = kernfs_parent(node);
		if (!parent)
			break;
		size = bpf_probe_read_kernel_str(&record->data[NAME_OFFSET], NAME_SIZE, BPF_CORE_READ(node, name));
		if (size <= 0 || !prepend(record, &record->data[NAME_OFFSET], size - 1) || !PREPEND(record, "/"))
			break;
		node = parent;
	}
	if (record->at == CGROUP_OFFSET + REGION_SIZE && cgroup)
		PREPEND(record, "/");
	return end_path(record, CGROUP_OFFSET);
}

/* ---------------------------------------------------------------------------------------------------------------
 * Fetching: from registers and memory to struct record
 */

static __always_inline const struct pt_regs *task_registers(struct task_struct *task)
{
	return (void *)bpf_task_pt_regs(task);
}

static __always_inline void read_registers(const struct pt_regs *regs, __u64 *registers)
{
	barrier_var(regs); /* else clang moves the offsets of the architecture that this is not out of the branch */
	if (bpf_core_field_exists(struct pt_regs___x86_64, di)) {
		struct pt_regs___x86_64 *x86 = (void *)regs;

		registers[0] = x86->di;
		registers[1] = x86->si;
		registers[2] = x86->dx;
		registers[3] = x86->r10;
		registers[4] = x86->r8;
		registers[5] = x86->r9;
	} else {
		struct user_pt_regs___aarch64 *arm = (void *)regs;

		registers[0] = BPF_CORE_READ((struct pt_regs___aarch64 *)regs, orig_x0);
		bpf_probe_read_kernel(&registers[1], 5 * sizeof(__u64), &arm->regs[1]);
	}
}

/* The value of an argument that is not in memory. */
static __always_inline __u64 scalar(const struct argument *argument, __u64 value)
{
	__u32 unused_bits = (64 - argument->bits) & 63; /* the ABI leaves them undefined */

	if (argument->kind == KIND_SIGNED || argument->kind >= KIND_FD)
		return (__s64)(value << unused_bits) >> unused_bits;
	if (argument->kind == KIND_UNSIGNED)
		return value << unused_bits >> unused_bits;
	return argument->value;
}

/* Copies the string or buffer behind what is in `data` already. Returns the value of its field. */
static __always_inline __u64 capture(struct record *record, const struct argument *argument, const void *address,
				     __u64 wanted, bool *whole)
{
	__u64 offset = record->used;
	__s64 size;

	*whole = false;
	if (offset > DATA_SIZE - STRING_SIZE)
		return 0;
	BOUND(offset, 8191);
	if (argument->kind == KIND_STRING) {
		size = bpf_probe_read_user_str(&record->data[offset], STRING_SIZE, address);
		*whole = size > 0 && size < STRING_SIZE;
		size = size > 0 ? size - 1 : 0;
	} else {
		size = wanted > BUFFER_SIZE ? BUFFER_SIZE : wanted;
		BOUND(size, 0x1ff);
		*whole = !bpf_probe_read_user(&record->data[offset], size, address);
		size = *whole ? size : 0;
	}
	record->used = offset + (__u32)size;
	return (__u32)size | offset << 32;
}

/* The strings of a NULL-terminated array of pointers, joined with spaces. */
__noinline __u64 capture_argv(struct record *record, __u32 index, __u64 array)
{
	__u32 begin, at;
	__u64 string = array; /* the one that has not been read: 0 when all have */
	__s64 size;
	int i = 0;

	if (!record || record->used > DATA_SIZE - STRING_SIZE)
		return 0;
	begin = at = record->used;
	for (; i < MAX_ARGV; i++) {
		if (bpf_probe_read_user(&string, sizeof(string), (void *)(array + i * sizeof(string)))) {
			string = array;
			break;
		}
		if (!string || at >= begin + PATH_SIZE)
			break;
		if (at > TEXT_SIZE - STRING_SIZE)
			break;
		size = bpf_probe_read_user_str(&record->data[at], STRING_SIZE, (void *)string);
		if (size <= 0)
			break;
		at += size; /* the NUL counts: it becomes the space */
		record->data[(at - 1) & TEXT_MASK] = ' ';
		if (size == STRING_SIZE)
			break;
		string = 0;
	}
	if (i == MAX_ARGV || string || at > begin + PATH_SIZE + 1)
		record->flags |= EVENT_INCOMPLETE << (index & 7);
	if (at > begin)
		at--;
	if (at > begin + PATH_SIZE)
		at = begin + PATH_SIZE;
	record->used = at;
	return (at - begin) | (__u64)begin << 32;
}

#define ALL_ARGUMENTS ((1U << MAX_SLOTS) - 1)
#define INCOMPLETE_ARGUMENTS ((EVENT_INCOMPLETE << MAX_ARGS) - EVENT_INCOMPLETE) /* the same bits as the arguments */

static __always_inline void fetch_argument(struct record *record, const struct source *source, __u32 i)
{
	const struct argument *argument = &source->arguments[i];
	__u64 value = record->registers[argument->reg % REGISTERS];
	bool whole = true;

	if (argument->kind == KIND_MEMORY) {
		whole = !bpf_probe_read_user(&record->values[i], sizeof(__u64), (void *)value + argument->value);
	} else if (argument->kind >= KIND_STRING && argument->kind <= KIND_BUFFER_OUT) {
		__s64 ret = record->values[FIELD_RET];
		__u64 wanted = ret; /* of what was to be written, too: the rest may not be readable */

		if (ret < 0 || argument->bits) /* bits: the length is what the register says, whatever came of the call */
			wanted = argument->kind == KIND_BUFFER_IN ? record->registers[argument->value % REGISTERS] : 0;

		record->values[i] = capture(record, argument, (void *)value, wanted, &whole);
	} else if (argument->kind == KIND_ARGV) {
		record->values[i] = capture_argv(record, i, value);
	} else {
		record->values[i] = scalar(argument, value);
	}
	if (!whole)
		record->flags |= EVENT_INCOMPLETE << i;
}

static __always_inline __u32 pid_namespace(struct task_struct *task)
{
	struct pid *pid = BPF_CORE_READ(task, thread_pid);
	__u32 level = BPF_CORE_READ(pid, level);
	struct upid upid = {};

	bpf_core_read(&upid, sizeof(upid), &pid->numbers[level]);
	return BPF_CORE_READ(upid.ns, ns.inum);
}

/* Fetches the fields of the mask that have not been yet: what was matched is what is shown. */
__noinline int fetch(struct record *record, const struct source *source, __u32 mask)
{
	if (!record || !source)
		return 0;
	mask &= ~record->done;
	record->done |= mask;
	for (int i = 0; i < MAX_ARGS; i++)
		if (mask >> i & 1 && source->arguments[i].kind != KIND_NONE)
			fetch_argument(record, source, i);
	if (mask >> FIELD_TID & 1)
		record->values[FIELD_TID] = (__u32)bpf_get_current_pid_tgid();
	if (mask >> FIELD_UID & 1 || mask >> FIELD_GID & 1) {
		__u64 uid_gid = bpf_get_current_uid_gid();

		record->values[FIELD_UID] = (__u32)uid_gid;
		record->values[FIELD_GID] = uid_gid >> 32;
	}
	if (mask >> FIELD_COMM & 1) {
		__u32 length = 0;

		bpf_get_current_comm(&record->data[COMM_OFFSET], COMM_SIZE);
		for (; length < COMM_SIZE - 1 && record->data[COMM_OFFSET + length]; length++)
			;
		record->values[FIELD_COMM] = length | (__u64)COMM_OFFSET << 32;
	}
	if (mask >> FIELD_TIME & 1)
		record->header.timestamp_ns = bpf_ktime_get_boot_ns();
	return 0;
}

/* The same for the fields that are farther away: apart, since few rules need them. */
__noinline int fetch_more(struct record *record, const struct source *source, __u32 mask)
{
	struct task_struct *task = current_task();

	if (!record || !source)
		return 0;
	mask &= ~record->done;
	record->done |= mask;
	if (mask >> FIELD_PPID & 1)
		record->values[FIELD_PPID] = (__u32)BPF_CORE_READ(task, real_parent, tgid);
	if (mask >> FIELD_EUID & 1)
		record->values[FIELD_EUID] = BPF_CORE_READ(task, cred, euid.val);
	if (mask >> FIELD_MNTNS & 1)
		record->values[FIELD_MNTNS] = BPF_CORE_READ(task, nsproxy, mnt_ns, ns.inum);
	if (mask >> FIELD_NETNS & 1)
		record->values[FIELD_NETNS] = BPF_CORE_READ(task, nsproxy, net_ns, ns.inum);
	if (mask >> FIELD_PIDNS & 1) {
		record->values[FIELD_PIDNS] = pid_namespace(task);
		if (BPF_CORE_READ(task, thread_pid, level) > 0)
			record->flags |= EVENT_CONTAINER;
	}
	if (mask >> FIELD_PATH & 1)
		record->values[FIELD_PATH] = event_path(record, source);
	if (mask >> FIELD_EXE & 1)
		record->values[FIELD_EXE] = file_path(record, BPF_CORE_READ(task, mm, exe_file), EXE_OFFSET);
	if (mask >> FIELD_CGROUP & 1)
		record->values[FIELD_CGROUP] = cgroup_path(record, (__u64)BPF_CORE_READ(task, cgroups, dfl_cgrp, kn));
	for (int i = 0; i < MAX_FILES; i++)
		if (mask >> (FIELD_FILE + i) & 1)
			record->values[FIELD_FILE + i] = argument_file(record, source, i);
	return 0;
}

/* Fields that fetch_more() fetches. */
#define MORE_FIELDS                                                                                                    \
	(1U << FIELD_PPID | 1U << FIELD_EUID | 1U << FIELD_MNTNS | 1U << FIELD_NETNS | 1U << FIELD_PIDNS |             \
	 1U << FIELD_PATH | 1U << FIELD_EXE | 1U << FIELD_CGROUP | 1U << FIELD_FILE | 1U << FIELD_FILE_1)

/* The arguments that the paths among these fields are made of. */
static __always_inline __u32 path_arguments(const struct record *record, const struct source *source, __u32 mask)
{
	bool by_result = source->path_kind >= PATH_RETURN && (__s64)record->values[FIELD_RET] >= 0;
	__u32 arguments = 0;

	if (mask >> FIELD_PATH & 1 && source->path_kind != PATH_NONE && !by_result)
		arguments |= 1U << source->path_argument % MAX_SLOTS;
	for (int i = 0; i < MAX_FILES; i++)
		if (mask >> (FIELD_FILE + i) & 1 && source->files[i] < MAX_ARGS)
			arguments |= 1U << source->files[i] % MAX_SLOTS;
	return arguments;
}

static __always_inline void fetch_all(struct record *record, const struct source *source, __u32 mask)
{
	if (mask & MORE_FIELDS)
		mask |= path_arguments(record, source, mask);
	fetch(record, source, mask & ~MORE_FIELDS);
	if (mask & MORE_FIELDS)
		fetch_more(record, source, mask & MORE_FIELDS);
}

/* Moves a text that was built elsewhere behind the others, where it goes into the ring. */
__noinline int settle_text(struct record *record, __u32 field)
{
	__u32 length, offset, used;
	__u64 value;

	if (!record)
		return 0;
	value = record->values[field % FIELDS];
	length = value;
	offset = value >> 32;
	used = record->used;
	if (record->settled >> (field % FIELDS) & 1 || !length)
		return 0;
	if (offset > COMM_OFFSET || length > PATH_SIZE || used > RECORD_DATA_SIZE - PATH_SIZE)
		return 0;
	record->settled |= 1U << (field % FIELDS);
	/* to a lower address, in ascending order: the two may overlap */
	bpf_probe_read_kernel(&record->data[used], length & (2 * PATH_SIZE - 1), &record->data[offset]);
	record->values[field % FIELDS] = length | (__u64)used << 32;
	record->used = used + length;
	return 0;
}

/* ---------------------------------------------------------------------------------------------------------------
 * Matching
 */

/* Eight bytes of a text. The mask is a bound without a branch: in a loop, branches multiply what the verifier walks. */
static __always_inline __u64 text_word(const struct record *record, __u32 offset)
{
	return *(const __u64 *)&record->data[offset & TEXT_MASK];
}

/* The last `size` bytes, 1 to 7, as a word whose other bytes are 0. */
static __always_inline __u64 text_tail(const struct record *record, __u32 offset, __u32 size)
{
	return text_word(record, offset) & ((1ULL << (size * 8 & 63)) - 1);
}

static __always_inline __u64 mix(__u64 hash, __u64 word)
{
	hash = (hash ^ word) * 0x9e3779b97f4a7c15ULL;
	return hash ^ hash >> 32;
}

/* traceleft.py computes the same: hash_text(). */
__noinline __u64 hash_text(const struct record *record, __u32 offset, __u32 length, __u64 seed)
{
	__u32 words = length / 8, tail = length & 7;
	__u64 hash = mix(seed, length);

	if (!record)
		return 0;
	for (__u32 i = 0; i < TEXT_WORDS; i++) {
		if (i >= words)
			break;
		hash = mix(hash, text_word(record, offset + i * 8));
	}
	return tail ? mix(hash, text_tail(record, offset + words * 8, tail)) : hash;
}

__noinline int equals_literal(const struct record *record, __u32 offset, __u32 length, __u32 literal)
{
	__u32 words = length / 8, tail = length & 7, place;
	__u64 *word;

	if (!record)
		return 0;
	for (__u32 i = 0; i < TEXT_WORDS; i++) {
		if (i >= words)
			break;
		place = literal + i;
		word = bpf_map_lookup_elem(&literals, &place);
		if (!word || *word != text_word(record, offset + i * 8))
			return 0;
	}
	if (!tail)
		return 1;
	place = literal + words;
	word = bpf_map_lookup_elem(&literals, &place);
	return word && *word == text_tail(record, offset + words * 8, tail);
}

/* The vector of a text among those of a dimension. */
__noinline __u32 find_text(const struct record *record, __u32 offset, __u32 length, const struct dimension *dimension)
{
	__u32 place;
	struct text *text;
	__u64 hash;

	if (!record || !dimension)
		return 0;
	hash = hash_text(record, offset, length, hash_seeds[0]);
	for (__u32 i = 0; i < MAX_PROBES; i++) {
		place = ((__u32)hash + i) & text_mask;
		text = bpf_map_lookup_elem(&texts, &place);
		if (!text || !text->used)
			break;
		if (text->hash == hash && text->length == length && text->dimension == dimension->id &&
		    equals_literal(record, offset, length, text->literal))
			return text->vector;
	}
	return dimension->vector;
}

/* The vector that the event's text has in a dimension. */
static __always_inline __u32 text_vector(const struct record *record, const struct dimension *dimension)
{
	__u64 value = record->values[dimension->field % FIELDS];
	__u32 length = value, offset = value >> 32;

	if (dimension->kind != DIMENSION_WHOLE) {
		if (length < dimension->length)
			return dimension->vector;
		if (dimension->kind == DIMENSION_SUFFIX)
			offset += length - dimension->length;
		length = dimension->length;
	}
	if (dimension->count == 1) /* one text needs no table */
		return dimension->vector + (length == dimension->length &&
					    equals_literal(record, offset, length, dimension->first));
	return find_text(record, offset, length, dimension);
}

/* The vector of the interval that the event's integer lies in: binary search for the first bound above it. */
__noinline __u32 integer_vector(const struct record *record, const struct dimension *dimension)
{
	__u32 low = 0, high;
	__u64 value;

	if (!record || !dimension)
		return 0;
	value = (record->values[dimension->field % FIELDS] & dimension->and_mask) ^ dimension->xor_mask;
	high = dimension->count;

	for (int step = 0; step <= MAX_BOUNDS_LOG2 && low < high; step++) {
		__u32 middle = (low + high) / 2, place = dimension->first + middle;
		__u64 *bound = bpf_map_lookup_elem(&bounds, &place);

		if (!bound)
			break;
		if (*bound <= value)
			low = middle + 1;
		else
			high = middle;
	}
	return dimension->vector + low;
}

static __always_inline struct vector *dimension_vector(const struct record *record, const struct dimension *dimension)
{
	__u32 place = dimension->kind == DIMENSION_INTEGER ? integer_vector(record, dimension) :
							     text_vector(record, dimension);

	return bpf_map_lookup_elem(&vectors, &place);
}

/* Keeps the rows that the dimension does not rule out. Returns whether there are any. */
__noinline int match_dimension(struct record *record, const struct matcher *matcher, __u32 index)
{
	struct vector *vector;
	__u64 any = 0;

	if (!record || !matcher || index >= MAX_DIMENSIONS)
		return 0;
	vector = dimension_vector(record, &matcher->dimensions[index]);
	if (!vector)
		return 0;
	for (__u32 i = 0; i < MAX_WORDS; i++) {
		if (i >= matcher->words)
			break;
		record->rows[i] &= vector->words[i];
		any |= record->rows[i];
	}
	return any != 0;
}

__noinline int match_dimensions(struct record *record, const struct matcher *matcher)
{
	struct vector *vector;
	__u32 place;

	if (!record || !matcher)
		return 0;
	place = matcher->vector;
	vector = bpf_map_lookup_elem(&vectors, &place);
	if (!vector)
		return 0;
	for (__u32 i = 0; i < MAX_WORDS; i++) {
		if (i >= matcher->words)
			break;
		record->rows[i] = vector->words[i];
	}
	for (__u32 i = 0; i < MAX_DIMENSIONS; i++) {
		if (i >= matcher->dimension_count)
			break;
		if (!match_dimension(record, matcher, i))
			return 0;
	}
	return 1;
}

/* Leaves the rows that are true in the record. The short way is for what most specs are: few rows, one condition. */
static __always_inline bool match(struct record *record, const struct matcher *matcher)
{
	struct vector *vector;

	if (matcher->words != 1 || matcher->dimension_count != 1)
		return match_dimensions(record, matcher);
	vector = dimension_vector(record, &matcher->dimensions[0]);
	record->rows[0] = vector ? vector->words[0] : 0;
	return record->rows[0];
}

/* ---------------------------------------------------------------------------------------------------------------
 * Counting
 */

/* How many events the group has received in the window, this one included. The window begins with the second of its first
 * event and never goes back: a CPU that is late counts in the one that has begun. */
static __always_inline __u64 count_in_window(struct group *group, const struct filter *filter, const struct record *record)
{
	__u64 second = record->header.timestamp_ns / NSEC_PER_SEC;

	for (int i = 0; i < MAX_RACES; i++) {
		__u64 old = *(volatile __u64 *)&group->window, new = old + 1;

		if (!old || (filter->seconds && (old >> 32) + filter->seconds <= second))
			new = second << 32 | 1;
		else if (!(__u32)new)
			return (__u32)old; /* so many that the count would run over */
		if (__sync_val_compare_and_swap(&group->window, old, new) == old)
			return (__u32)new;
	}
	return 0; /* held back, as if it was among the first; of a limit, let through */
}

static __always_inline bool every_nth(struct group *group, const struct filter *filter)
{
	return filter->frequency <= 1 ||
	       (__sync_fetch_and_add(&group->counted, 1) + 1) % filter->frequency == 0;
}

static __always_inline bool sigma(struct group *group, const struct filter *filter, const struct record *record)
{
	if (filter->threshold && count_in_window(group, filter, record) <= filter->threshold)
		return false;
	return every_nth(group, filter);
}

static __always_inline bool limit(struct group *group, const struct filter *filter, const struct record *record)
{
	return count_in_window(group, filter, record) <= filter->threshold;
}

/* The events number N, N x M, N x M x M, … pass. */
static __always_inline bool backoff(struct group *group, const struct filter *filter)
{
	__u64 number = __sync_fetch_and_add(&group->counted, 1) + 1, power = number / filter->threshold;

	if (number % filter->threshold)
		return false;
	for (int i = 0; i < 64; i++) { /* M is 2 at least */
		if (power <= 1 || power % filter->frequency)
			break;
		power /= filter->frequency;
	}
	return power == 1;
}

static __always_inline bool passes(struct group *group, const struct filter *filter, const struct record *record)
{
	if (filter->processing == PROCESSING_LIMIT)
		return limit(group, filter, record);
	if (filter->processing == PROCESSING_BACKOFF)
		return backoff(group, filter);
	return sigma(group, filter, record);
}

/* The hash of the values of the filter's `by` fields. */
__noinline __u64 hash_group(const struct record *record, const struct filter *filter, __u64 seed)
{
	__u64 hash = seed;

	if (!record || !filter)
		return 0;
	for (__u32 i = 0; i < MAX_BY; i++) {
		__u64 value = record->values[filter->by[i] % FIELDS];

		if (i >= filter->by_count)
			break;
		hash = filter->by_text[i] ? hash_text(record, value >> 32, (__u32)value, hash) : mix(hash, value);
	}
	return hash;
}

/* The event's group; NULL when all the filter may have are taken. */
static __always_inline struct group *find_group(const struct record *record, const struct filter *filter, __u32 index,
						struct filter_state *state)
{
	struct group *group, empty = {};
	struct group_key key;
	void *own = bpf_map_lookup_elem(&groups, &index);

	if (!own)
		return 0;
	key.hash[0] = hash_group(record, filter, hash_seeds[0]);
	key.hash[1] = hash_group(record, filter, hash_seeds[1]);
	group = bpf_map_lookup_elem(own, &key);
	if (group || *(volatile __u32 *)&state->groups >= filter->max_groups)
		return group;
	if (__sync_fetch_and_add(&state->groups, 1) >= filter->max_groups ||
	    bpf_map_update_elem(own, &key, &empty, BPF_NOEXIST))
		__sync_fetch_and_add(&state->groups, -1); /* full, or another CPU was faster */
	return bpf_map_lookup_elem(own, &key);
}

/* Where a histogram counts the value: negative, zero, and by the highest bit. */
static __always_inline __u32 bucket(__u64 value, bool is_signed)
{
	__u32 bit = 0;

	if (is_signed && (__s64)value < 0)
		return 0;
	if (!value)
		return 1;
	for (int step = 32; step; step /= 2) {
		if (value >> step) {
			value >>= step;
			bit += step;
		}
	}
	return bit + 2;
}

__noinline int count_histogram(const struct record *record, const struct filter *filter)
{
	__u32 place, index;
	struct histogram *histogram;

	if (!record || !filter)
		return 0;
	place = bpf_get_smp_processor_id() * histogram_count + filter->output_index;
	histogram = bpf_map_lookup_elem(&histograms, &place);
	index = bucket(record->values[filter->output_by[0] % FIELDS], filter->output_signed);
	if (histogram && index < BUCKETS)
		histogram->buckets[index]++;
	return 0;
}

static __always_inline __u64 hash_output(const struct record *record, const struct filter *filter)
{
	__u64 hash = hash_seeds[0];

	for (__u32 i = 0; i < TOP_FIELDS; i++) {
		__u64 value = record->values[filter->output_by[i] % FIELDS];

		if (i >= filter->output_count)
			break;
		hash = filter->output_text[i] ? hash_text(record, value >> 32, (__u32)value, hash) : mix(hash, value);
	}
	return hash | 1; /* 0 is a free slot */
}

/* Says in a new slot which group it is of. */
static __always_inline void describe(struct top_slot *slot, const struct record *record, const struct filter *filter)
{
	for (__u32 i = 0; i < TOP_FIELDS; i++) {
		__u64 value = record->values[filter->output_by[i] % FIELDS];
		__u32 length = value;

		if (i >= filter->output_count)
			break;
		slot->fields[i].value = filter->output_text[i] ? length : value;
		if (!filter->output_text[i])
			continue;
		if (length > TOP_TEXT - 1)
			length = TOP_TEXT - 1;
		bpf_probe_read_kernel(slot->fields[i].text, length & (TOP_TEXT - 1), &record->data[value >> 32 & TEXT_MASK]);
	}
}

/* Counts the event in its group, or in the slot behind the others. */
__noinline int count_top(const struct record *record, const struct filter *filter)
{
	__u32 base, place;
	__u64 hash, found;
	struct top_slot *slot;

	if (!record || !filter)
		return 0;
	hash = hash_output(record, filter);
	base = (filter->output_index * 2 + (run.tick & 1)) * TOP_TABLE;
	for (__u32 i = 0; i < TOP_PROBES; i++) {
		place = base + (((__u32)(hash >> 8) + i) & (TOP_SLOTS - 1));
		slot = bpf_map_lookup_elem(&tops, &place);
		if (!slot)
			break;
		found = *(volatile __u64 *)&slot->hash;
		if (!found) {
			found = __sync_val_compare_and_swap(&slot->hash, 0, hash);
			if (!found) {
				describe(slot, record, filter);
				found = hash;
			}
		}
		if (found == hash) {
			__sync_fetch_and_add(&slot->count, 1);
			return 0;
		}
	}
	place = base + TOP_SLOTS;
	slot = bpf_map_lookup_elem(&tops, &place);
	if (slot)
		__sync_fetch_and_add(&slot->count, 1);
	return 0;
}

/* Completes the record. */
static __always_inline void complete(struct record *record, const struct source *source, const struct filter *filter,
				     __u32 index)
{
	struct event_header *header = &record->header;

	fetch_all(record, source, filter->fields);
	settle_text(record, FIELD_PATH);
	settle_text(record, FIELD_EXE);
	settle_text(record, FIELD_CGROUP);
	for (int i = 0; i < MAX_FILES; i++) {
		if (source->path_kind == PATH_FD && source->files[i] == source->path_argument) {
			header->files[i] = record->values[FIELD_PATH];
			continue;
		}
		settle_text(record, FIELD_FILE + i);
		header->files[i] = record->values[FIELD_FILE + i];
	}
	for (int i = 0; i < MAX_SLOTS; i++)
		header->args[i] = record->values[i];
	header->ret = record->values[FIELD_RET];
	header->program_id = record->values[FIELD_PROGRAM_ID];
	header->path = record->values[FIELD_PATH];
	header->exe = record->values[FIELD_EXE];
	header->cgroup = record->values[FIELD_CGROUP];
	header->pid = record->values[FIELD_PID];
	header->tid = record->values[FIELD_TID];
	header->ppid = record->values[FIELD_PPID];
	header->uid = record->values[FIELD_UID];
	header->gid = record->values[FIELD_GID];
	header->euid = record->values[FIELD_EUID];
	header->mntns = record->values[FIELD_MNTNS];
	header->netns = record->values[FIELD_NETNS];
	header->pidns = record->values[FIELD_PIDNS];
	__builtin_memcpy(header->comm, &record->data[COMM_OFFSET], COMM_SIZE);
	header->event = source->event;
	header->flags = record->flags;
	header->version = RECORD_VERSION;
	header->filter = index;
	header->tick = run.tick;
}

/* Puts the record into the ring of samples, which is read each second, or of streamed events. */
static __always_inline void submit(struct record *record, const struct filter *filter, struct filter_counts *counts)
{
	__u32 size = sizeof(record->header) + record->used;
	__u64 pending;
	long full;

	if (size > sizeof(record->header) + RECORD_DATA_SIZE) /* never: for the verifier */
		return;
	if (filter->flags & FILTER_STREAM) {
		/* Only the record that crosses the mark wakes the reader: behind it, it is awake and has not caught up. */
		pending = bpf_ringbuf_query(&events, BPF_RB_AVAIL_DATA);
		full = bpf_ringbuf_output(&events, &record->header, size,
					  pending < wakeup_bytes && pending + size >= wakeup_bytes ? BPF_RB_FORCE_WAKEUP :
												     BPF_RB_NO_WAKEUP);
	} else {
		full = bpf_ringbuf_output(&samples, &record->header, size, BPF_RB_NO_WAKEUP);
	}
	if (full)
		counts->ring_full++;
	else
		counts->submitted++;
}

/* The event as a record in the ring. */
__noinline int give(struct record *record, const struct source *source, const struct filter *filter, __u32 index)
{
	__u32 place = index * cpus + bpf_get_smp_processor_id();
	struct filter_counts *counts = bpf_map_lookup_elem(&filter_counts, &place);

	if (!record || !source || !filter || !counts)
		return 0;
	complete(record, source, filter, index);
	submit(record, filter, counts);
	return 0;
}

/* Counts the event for the filter of a row that is true. */
__noinline int count_row(struct record *record, const struct source *source, __u32 row);

static __always_inline int count_inline(struct record *record, const struct source *source, __u32 row, bool plain)
{
	__u32 *index = bpf_map_lookup_elem(&rows, &row), filter_index, place, now = run.tick;
	struct filter_counts *counts;
	struct filter_state *state;
	struct group *group;
	struct filter *filter;

	if (!index || *index == record->filter)
		return 0;
	filter_index = *index;
	filter = bpf_map_lookup_elem(&filters, &filter_index);
	state = bpf_map_lookup_elem(&filter_states, &filter_index);
	place = filter_index * cpus + bpf_get_smp_processor_id();
	counts = bpf_map_lookup_elem(&filter_counts, &place);
	if (!filter || !state || !counts)
		return 0;
	if (plain && filter->flags & FILTER_GENERAL)
		return count_row(record, source, row);
	record->filter = filter_index;
	counts->matched++;
	if (!(filter->flags & FILTER_STREAM)) {
		group = !plain && filter->by_count ? find_group(record, filter, filter_index, state) : 0;
		if (plain ? !every_nth(&state->group, filter) : !passes(group ? group : &state->group, filter, record)) {
			counts->folded++;
			return 0;
		}
		counts->passed++;
		if (!plain && filter->output == OUTPUT_HISTOGRAM)
			count_histogram(record, filter);
		else if (!plain && filter->output == OUTPUT_TOP)
			count_top(record, filter);
		if (state->sampled == now || __sync_lock_test_and_set(&state->sampled, now) == now)
			return 0;
	}
	give(record, source, filter, filter_index);
	return 0;
}

__noinline int count_row(struct record *record, const struct source *source, __u32 row)
{
	return record && source ? count_inline(record, source, row, false) : 0;
}

/* The place of the lowest bit that is set; value is not 0. BPF has no instruction for it. */
static __always_inline __u32 lowest_bit(__u64 value)
{
	value = (value & -value) - 1; /* as many ones as there are zeros below it: count them */
	value -= value >> 1 & 0x5555555555555555ULL;
	value = (value & 0x3333333333333333ULL) + (value >> 2 & 0x3333333333333333ULL);
	value = (value + (value >> 4)) & 0x0f0f0f0f0f0f0f0fULL;
	return value * 0x0101010101010101ULL >> 56;
}

__noinline int count_word(struct record *record, const struct source *source, __u32 first_row, __u64 word)
{
	for (int i = 0; i < 64 && word; i++) {
		count_row(record, source, first_row + lowest_bit(word));
		word &= word - 1;
	}
	return 0;
}

static __always_inline void count(struct record *record, const struct source *source, const struct matcher *matcher)
{
	__u64 word = record->rows[0];

	record->filter = NO_FILTER;
	if (matcher->words == 1 && !(word & (word - 1))) {
		count_inline(record, source, matcher->first_row + lowest_bit(word), true);
		return;
	}
	for (__u32 i = 0; i < MAX_WORDS; i++) {
		if (i >= matcher->words)
			break;
		if (record->rows[i])
			count_word(record, source, matcher->first_row + i * 64, record->rows[i]);
	}
}

/* The event that the record holds, for all filters of its type. What most specs need is inline: where a CPU's mitigations
 * make returns slow, a call costs as much as ten look-ups in a table. */
static __always_inline void deliver(struct record *record, const struct source *source, const struct matcher *matcher)
{
	__u32 missing = matcher->needed & ~record->done, only = matcher->only_argument;

	if (missing && only < MAX_ARGS) {
		record->done |= missing;
		fetch_argument(record, source, only);
	} else if (missing) {
		fetch_all(record, source, missing);
	}
	if (match(record, matcher))
		count(record, source, matcher);
}

/* ---------------------------------------------------------------------------------------------------------------
 * Programs for syscalls
 */

/* Whether the entry is of the process that began then, and not of another that had, or has got, its number. */
static __always_inline bool is_process(const struct process *process, __u64 started)
{
	return process->from <= started && started <= process->to;
}

static __always_inline bool wanted_process(const struct source *source, __u32 pid, __u64 started, __u64 *program_id)
{
	struct class_event *wanted;
	struct process *process;
	__u32 place;

	if (pid == own_pid)
		return false;
	*program_id = source->program_id;
	if (source->flags & SOURCE_BY_PROCESS) {
		process = bpf_map_lookup_elem(&processes, &pid);
		if (process && is_process(process, started ? started : current_task()->group_leader->start_boottime)) {
			place = process->class * event_types + source->event;
			wanted = bpf_map_lookup_elem(&classes, &place);
			if (wanted && wanted->wanted) {
				*program_id = wanted->program_id;
				return true;
			}
		}
	}
	return source->flags & SOURCE_ANY_PROCESS;
}

static __always_inline struct record *own_record(__u32 first)
{
	__u32 place = first + bpf_get_smp_processor_id();

	return bpf_map_lookup_elem(&scratch, &place);
}

static __always_inline void begin_record(struct record *record, __u64 ret, __u32 pid, __u64 program_id)
{
	record->done = 1U << FIELD_RET | 1U << FIELD_PID | 1U << FIELD_PROGRAM_ID;
	record->used = record->flags = record->settled = 0;
	record->values[FIELD_RET] = ret;
	record->values[FIELD_PID] = pid;
	record->values[FIELD_PROGRAM_ID] = program_id;
}

/* Takes up what was read at the entry of the call that the task is in. Returns whether there is any. */
static __always_inline bool resume_call(struct record *record, __u32 pid)
{
	__u64 task = (__u64)current_task();
	struct saved *saved = bpf_map_lookup_elem(&pending, &task);
	struct saved_long *saved_long;

	if (saved) {
		bpf_probe_read_kernel(record, sizeof(*saved), saved);
		bpf_map_delete_elem(&pending, &task);
	} else {
		saved_long = bpf_map_lookup_elem(&pending_long, &task);
		if (!saved_long)
			return false;
		bpf_probe_read_kernel(record, sizeof(*saved_long), saved_long);
		bpf_map_delete_elem(&pending_long, &task);
	}
	return record->pid == pid; /* else it is what a task left behind that had its address */
}

/* One of the event types that the call becomes. Its registers are in the record. */
static __always_inline int syscall(struct record *record, __u32 row, __u32 pid, __s64 ret, bool at_entry)
{
	struct source *source = bpf_map_lookup_elem(&sources, &row);
	struct matcher *matcher;
	__u64 program_id, key;
	__u32 event, again;

	if (!source || !wanted_process(source, pid, 0, &program_id))
		return 0;
	if (at_entry ? !(source->flags & (SOURCE_AT_ENTRY | SOURCE_NO_RETURN)) : source->flags & SOURCE_NO_RETURN)
		return 0;
	event = source->event;
	matcher = bpf_map_lookup_elem(&matchers, &event);
	if (!matcher)
		return 0;
	if (!at_entry && source->flags & SOURCE_AT_ENTRY) {
		if (!resume_call(record, pid) || record->event != event)
			return 0; /* it began before we did, or has begun a program */
		record->values[FIELD_RET] = ret;
		if (source->path_kind == PATH_EXE) {
			record->done &= ~(1U << FIELD_PATH);
			again = record->flags & INCOMPLETE_ARGUMENTS;
			if (again) { /* what was not resident by then, the kernel has read since */
				record->flags &= ~again;
				record->done &= ~again;
				fetch(record, source, again);
			}
		}
		deliver(record, source, matcher);
		return 0;
	}
	for (int i = 0; i < MAX_ARGS; i++)
		if (source->only_fdcwd >> i & 1 && (__s32)record->registers[i] != AT_FDCWD)
			return 0;
	if (source->condition_register < MAX_ARGS &&
	    (__u32)record->registers[source->condition_register % REGISTERS] != source->condition)
		return 0;
	begin_record(record, ret, pid, program_id);
	if (at_entry && source->flags & SOURCE_AT_ENTRY) {
		record->event = event;
		record->pid = pid;
		fetch(record, source, ALL_ARGUMENTS);
		if (source->path_kind == PATH_FD) {
			fetch_more(record, source, 1U << FIELD_PATH);
			settle_text(record, FIELD_PATH);
		} else if (source->files[0] < MAX_ARGS) { /* a new program may not have it any more: O_CLOEXEC */
			fetch_more(record, source, 1U << FIELD_FILE);
			settle_text(record, FIELD_FILE);
		}
		key = (__u64)current_task();
		if (record->used <= SHORT_DATA_SIZE ? bpf_map_update_elem(&pending, &key, record, BPF_ANY) :
						      bpf_map_update_elem(&pending_long, &key, record, BPF_ANY))
			__sync_fetch_and_add(&run.missed_calls, 1);
		return 0;
	}
	deliver(record, source, matcher);
	return 0;
}

/* The record is looked up anew: before Linux 6.2 one that came as an argument may not be put into a map. */
__noinline int other_row(__u32 row, __u32 pid, __s64 ret, int at_entry)
{
	struct record *record = own_record(0);

	return record ? syscall(record, row, pid, ret, at_entry) : 0;
}

/* The event types that one syscall becomes, mostly one. */
static __always_inline int syscall_rows(const struct syscall_rows *found, struct task_struct *task,
					const struct pt_regs *regs, __s64 ret, bool at_entry)
{
	struct record *record = own_record(0);
	__u32 pid = task->tgid; /* read so, it costs no call */

	if (!record)
		return 0;
	read_registers(regs, record->registers);
	syscall(record, found->first, pid, ret, at_entry);
	for (__u32 i = 1; i < MAX_ROWS_OF_SYSCALL; i++) {
		if (i >= found->count)
			break;
		other_row(found->first + i, pid, ret, at_entry);
	}
	return 0;
}

static __always_inline int syscall_tracepoint(struct sys_exit_context *context, __s64 ret, bool at_entry)
{
	__u32 number = context->nr;
	struct syscall_rows *found = bpf_map_lookup_elem(&syscalls, &number);
	struct task_struct *task = current_task();

	if (!found || !found->count) { /* newer than traceleft.py's table of numbers: the cookie stands for it */
		number = bpf_get_attach_cookie(context);
		found = number ? bpf_map_lookup_elem(&syscalls, &number) : 0;
		if (!found || !found->count)
			return 0;
	}
	return syscall_rows(found, task, task_registers(task), ret, at_entry);
}

/* Of syscalls/sys_exit_* of each syscall that is named. */
SEC("tp")
int on_sys_exit(struct sys_exit_context *context)
{
	return syscall_tracepoint(context, context->ret, false);
}

/* The same for syscalls/sys_enter_*, where the arguments do not outlive the call, or it does not return. */
SEC("tp")
int on_sys_enter(struct sys_exit_context *context)
{
	return syscall_tracepoint(context, 0, true);
}

/* What was not resident when the call began, from what the kernel has copied for the new program. */
__noinline int complete_program(struct record *record, const struct source *source, __u64 filename)
{
	struct task_struct *task = current_task();
	__u32 index, begin, at;
	__u64 start, end;
	__s64 size;

	if (!record || !source)
		return 0;
	index = source->path_argument;
	if (index < MAX_ARGS && record->flags & EVENT_INCOMPLETE << (index & 7) && record->used <= DATA_SIZE - STRING_SIZE) {
		begin = record->used;
		size = bpf_probe_read_kernel_str(&record->data[begin & TEXT_MASK & 8191], STRING_SIZE, (void *)filename);
		if (size > 0 && size < STRING_SIZE) {
			record->values[index & 7] = (__u32)(size - 1) | (__u64)begin << 32;
			record->used = begin + (__u32)size - 1;
			record->flags &= ~(EVENT_INCOMPLETE << (index & 7));
		}
	}
	for (index = 0; index < MAX_ARGS; index++)
		if (source->arguments[index].kind == KIND_ARGV && record->flags & EVENT_INCOMPLETE << index)
			break;
	if (index >= MAX_ARGS || record->used > DATA_SIZE - STRING_SIZE)
		return 0;
	start = BPF_CORE_READ(task, mm, arg_start);
	end = BPF_CORE_READ(task, mm, arg_end);
	begin = at = record->used;
	for (int i = 0; i < MAX_ARGV && start < end && at < begin + PATH_SIZE; i++) {
		if (at > TEXT_SIZE - STRING_SIZE)
			break;
		__u64 place = at; /* below DATA_SIZE + PATH_SIZE */

		BOUND(place, 16383);
		size = bpf_probe_read_user_str(&record->data[place], STRING_SIZE, (void *)start);
		if (size <= 0)
			break;
		start += size;
		at += size;
		record->data[(at - 1) & TEXT_MASK] = ' ';
	}
	if (at > begin)
		at--;
	if (at > begin + PATH_SIZE)
		at = begin + PATH_SIZE;
	else if (start >= end)
		record->flags &= ~(EVENT_INCOMPLETE << (index & 7));
	record->used = at;
	record->values[index & 7] = (at - begin) | (__u64)begin << 32;
	return 0;
}

/* A new program runs. The exit of its call does not tell: on x86 that of execveat is called execve, and that of a call
 * which begins a 32-bit program is one of the 32-bit table (set_personality_64bit() and its like). */
SEC("tp_btf/sched_process_exec")
int on_new_program(__u64 *context)
{
	struct linux_binprm *bprm = (void *)context[2];
	__u32 pid = bpf_get_current_pid_tgid() >> 32, *row, index, event;
	struct record *record = own_record(0);
	struct matcher *matcher;
	struct source *source;

	if (!record || !resume_call(record, pid))
		return 0;
	event = record->event;
	row = bpf_map_lookup_elem(&entry_rows, &event);
	if (!row || !*row)
		return 0;
	index = *row - 1;
	source = bpf_map_lookup_elem(&sources, &index);
	if (!source || source->path_kind != PATH_EXE)
		return 0;
	matcher = bpf_map_lookup_elem(&matchers, &event);
	if (!matcher)
		return 0;
	record->values[FIELD_RET] = 0;
	record->done &= ~(1U << FIELD_PATH);
	if (record->flags & INCOMPLETE_ARGUMENTS)
		complete_program(record, source, (__u64)BPF_CORE_READ(bprm, filename));
	deliver(record, source, matcher);
	return 0;
}

/* Whether the task is in a call of the 32-bit table: its numbers mean other syscalls. */
static __always_inline bool in_compat_syscall(struct task_struct *task)
{
	struct thread_info___x86_64 *info = (void *)&task->thread_info;

	if (bpf_core_field_exists(struct pt_regs___x86_64, di))
		return info->status & 2; /* TS_COMPAT, arch/x86/include/asm/thread_info.h */
	return task->thread_info.flags >> 22 & 1; /* TIF_32BIT, arch/arm64/include/asm/thread_info.h */
}

/* Instead of sys_exit where most of a host's syscalls are named: one program for all of them. */
SEC("tp_btf/sys_exit")
int on_every_sys_exit(__u64 *context)
{
	struct pt_regs *regs = (void *)context[0];
	struct syscall_rows *found;
	struct task_struct *task;
	__u32 number;

	if (bpf_core_field_exists(struct pt_regs___x86_64, di))
		number = ((struct pt_regs___x86_64 *)regs)->orig_ax;
	else
		number = BPF_CORE_READ((struct pt_regs___aarch64 *)regs, syscallno);
	found = bpf_map_lookup_elem(&syscalls, &number); /* x32 calls have numbers beyond it */
	if (!found || !found->count)
		return 0;
	task = current_task(); /* not before: every call of a function shows in what is added to every syscall */
	if (in_compat_syscall(task))
		return 0;
	return syscall_rows(found, task, regs, context[1], false);
}

/* ---------------------------------------------------------------------------------------------------------------
 * Programs for TCP
 */

#define AF_INET 2 /* include/linux/socket.h */
#define AF_INET6 10
#define IPPROTO_TCP 6
#define ECONNABORTED 103
#define PF_KTHREAD 0x00200000 /* include/linux/sched.h */
#define SHUTDOWN_MASK 3       /* include/net/sock.h */
#define S_IFMT 0170000
#define S_IFSOCK 0140000

enum { /* include/net/tcp_states.h */
	TCP_ESTABLISHED = 1,
	TCP_SYN_SENT,
	TCP_SYN_RECV,
	TCP_FIN_WAIT1,
	TCP_CLOSE = 7,
	TCP_CLOSE_WAIT,
	TCP_LAST_ACK,
};

static __always_inline void fill_owner(struct owner *owner, struct task_struct *task)
{
	struct kernfs_node *cgroup;
	struct file *exe;

	owner->pid = BPF_CORE_READ(task, tgid);
	owner->tid = BPF_CORE_READ(task, pid);
	owner->ppid = BPF_CORE_READ(task, real_parent, tgid);
	owner->uid = BPF_CORE_READ(task, cred, uid.val);
	owner->gid = BPF_CORE_READ(task, cred, gid.val);
	owner->euid = BPF_CORE_READ(task, cred, euid.val);
	owner->mntns = BPF_CORE_READ(task, nsproxy, mnt_ns, ns.inum);
	owner->pidns = pid_namespace(task);
	owner->in_container = BPF_CORE_READ(task, thread_pid, level) > 0;
	owner->established = 0;
	owner->started = BPF_CORE_READ(task, group_leader, start_boottime);
	bpf_core_read(&owner->comm, sizeof(owner->comm), &task->comm);
	exe = BPF_CORE_READ(task, mm, exe_file);
	owner->exe_dentry = (__u64)BPF_CORE_READ(exe, f_path.dentry);
	owner->exe_vfsmount = (__u64)BPF_CORE_READ(exe, f_path.mnt);
	owner->exe_inode = (__u64)BPF_CORE_READ(exe, f_inode);
	owner->root_dentry = (__u64)BPF_CORE_READ(task, fs, root.dentry);
	owner->root_vfsmount = (__u64)BPF_CORE_READ(task, fs, root.mnt);
	cgroup = BPF_CORE_READ(task, cgroups, dfl_cgrp, kn);
	owner->cgroup = (__u64)cgroup;
	owner->cgroup_id = BPF_CORE_READ(cgroup, id);
}

/* A dying process leaves its memory and its namespaces before its files are closed: what was known of it by then. */
static __always_inline void remember_owner(struct owner *owner, const struct owner *known)
{
	if (known->pid != owner->pid)
		return;
	if (!owner->mntns)
		owner->mntns = known->mntns;
	if (owner->exe_dentry || *(__u64 *)owner->comm != *(__u64 *)known->comm ||
	    *(__u64 *)&owner->comm[8] != *(__u64 *)&known->comm[8]) /* it runs another program by now */
		return;
	owner->exe_dentry = known->exe_dentry;
	owner->exe_vfsmount = known->exe_vfsmount;
	owner->exe_inode = known->exe_inode;
	owner->root_dentry = known->root_dentry;
	owner->root_vfsmount = known->root_vfsmount;
}

/* The paths of the owner's program and group, which is not always the current task. */
__noinline int fetch_owner(struct record *record)
{
	struct kernfs_node *cgroup;
	struct dentry *dentry;

	if (!record)
		return 0;
	begin_path(record, EXE_OFFSET);
	dentry = (void *)record->owner.exe_dentry;
	if (dentry && (__u64)BPF_CORE_READ(dentry, d_inode) == record->owner.exe_inode) {
		record->dentry = (__u64)dentry;
		record->vfsmount = record->owner.exe_vfsmount;
		record->root_dentry = record->owner.root_dentry;
		record->root_vfsmount = record->owner.root_vfsmount;
		prepend_path_below_root(record);
	}
	record->values[FIELD_EXE] = end_path(record, EXE_OFFSET);
	cgroup = (void *)record->owner.cgroup;
	record->values[FIELD_CGROUP] = 0;
	if (cgroup && BPF_CORE_READ(cgroup, id) == record->owner.cgroup_id)
		record->values[FIELD_CGROUP] = cgroup_path(record, (__u64)cgroup);
	return 0;
}

static __always_inline __u64 host_order(const __be32 *words)
{
	return (__u64)__builtin_bswap32(words[0]) << 32 | __builtin_bswap32(words[1]);
}

/* Fills in the arguments. Returns whether the connection is of IPv6. */
static __always_inline bool read_connection(struct sock *sock, __u64 *values)
{
	struct in6_addr from = {}, to = {};
	__u64 *ports = values + 2;
	bool v6 = false;

	if (BPF_CORE_READ(sock, __sk_common.skc_family) == AF_INET6) {
		BPF_CORE_READ_INTO(&from, sock, __sk_common.skc_v6_rcv_saddr);
		BPF_CORE_READ_INTO(&to, sock, __sk_common.skc_v6_daddr);
		v6 = to.in6_u.u6_addr32[0] || to.in6_u.u6_addr32[1] || to.in6_u.u6_addr32[2] != __builtin_bswap32(0xffff);
	}
	if (v6) {
		values[0] = host_order(&from.in6_u.u6_addr32[0]);
		values[1] = host_order(&from.in6_u.u6_addr32[2]);
		values[2] = host_order(&to.in6_u.u6_addr32[0]);
		values[3] = host_order(&to.in6_u.u6_addr32[2]);
		ports = values + 4;
	} else {
		values[0] = __builtin_bswap32(BPF_CORE_READ(sock, __sk_common.skc_rcv_saddr));
		values[1] = __builtin_bswap32(BPF_CORE_READ(sock, __sk_common.skc_daddr));
	}
	ports[0] = __builtin_bswap16(BPF_CORE_READ((struct inet_sock *)sock, inet_sport));
	ports[1] = __builtin_bswap16(BPF_CORE_READ(sock, __sk_common.skc_dport));
	ports[2] = BPF_CORE_READ(sock, __sk_common.skc_net.net, ns.inum);
	return v6;
}

/* Delivers an event of a connection whose owner the record holds. */
__noinline int tcp_event(struct record *record, __u64 sock, __u32 kind, __u64 ret)
{
	__u32 place, *row, index, length = 0, event;
	struct source *source;
	struct matcher *matcher;
	struct owner *owner;
	__u64 program_id;

	if (!record || kind >= TCP_EVENTS)
		return 0;
	owner = &record->owner;
	place = kind + (read_connection((void *)sock, record->values) ? TCP_EVENTS : 0);
	row = bpf_map_lookup_elem(&tcp_rows, &place);
	if (!row || !*row)
		return 0;
	index = *row - 1;
	source = bpf_map_lookup_elem(&sources, &index);
	if (!source || !wanted_process(source, owner->pid, owner->started, &program_id))
		return 0;
	event = source->event;
	matcher = bpf_map_lookup_elem(&matchers, &event);
	if (!matcher)
		return 0;
	begin_record(record, ret, owner->pid, program_id);
	record->done = ~0U;
	record->flags = owner->in_container ? EVENT_CONTAINER : 0;
	record->values[FIELD_TID] = owner->tid;
	record->values[FIELD_PPID] = owner->ppid;
	record->values[FIELD_UID] = owner->uid;
	record->values[FIELD_GID] = owner->gid;
	record->values[FIELD_EUID] = owner->euid;
	record->values[FIELD_MNTNS] = owner->mntns;
	record->values[FIELD_PIDNS] = owner->pidns;
	record->values[FIELD_NETNS] = BPF_CORE_READ((struct sock *)sock, __sk_common.skc_net.net, ns.inum);
	fetch_owner(record);
	record->values[FIELD_PATH] = 0;
	record->values[FIELD_FILE] = record->values[FIELD_FILE_1] = 0;
	__builtin_memcpy(&record->data[COMM_OFFSET], owner->comm, COMM_SIZE);
	for (; length < COMM_SIZE - 1 && record->data[COMM_OFFSET + length]; length++)
		;
	record->values[FIELD_COMM] = length | (__u64)COMM_OFFSET << 32;
	record->header.timestamp_ns = bpf_ktime_get_boot_ns();
	deliver(record, source, matcher);
	return 0;
}

static __always_inline void set_owner(__u64 sock, const struct owner *owner)
{
	if (bpf_map_update_elem(&sockets, &sock, owner, BPF_ANY))
		__sync_fetch_and_add(&run.missed_owners, 1);
}

SEC("tp_btf/inet_sock_set_state")
int on_tcp_state(__u64 *context)
{
	struct record *record = own_record(cpus); /* in a softirq, or when one may come: not that of the syscalls */
	__s32 old = context[1], new = context[2];
	struct task_struct *task = current_task();
	struct owner *owner, *known;
	struct sock *sock;
	__s32 error;
	__u64 key;

	/* read as memory it is a number, and not a pointer, which the verifier lets no function of its own take */
	if (!record || bpf_probe_read_kernel(&key, sizeof(key), &context[0]))
		return 0;
	sock = (void *)key;
	owner = &record->owner;
	if (BPF_CORE_READ(sock, sk_protocol) != IPPROTO_TCP)
		return 0;
	if (new == TCP_SYN_SENT) { /* in connect(): the one place where a new connection's owner is certain */
		fill_owner(owner, task);
		set_owner(key, owner);
		return 0;
	}
	known = bpf_map_lookup_elem(&sockets, &key);
	if (known)
		__builtin_memcpy(owner, known, sizeof(*owner));
	if (known && !owner->established) {
		if (new == TCP_ESTABLISHED) {
			known->established = 1;
			tcp_event(record, key, TCP_CONNECT, 0);
		} else if (new == TCP_CLOSE) {
			error = BPF_CORE_READ(sock, sk_err);
			bpf_map_delete_elem(&sockets, &key);
			tcp_event(record, key, TCP_CONNECT, error ? -error : -ECONNABORTED);
		}
		return 0;
	}
	if (old != TCP_ESTABLISHED && old != TCP_CLOSE_WAIT)
		return 0;
	if (new == TCP_FIN_WAIT1 || new == TCP_LAST_ACK || BPF_CORE_READ(sock, sk_shutdown) == SHUTDOWN_MASK) {
		/* by the process that closes: not always the one that opened, after fork() */
		if (new != TCP_CLOSE && new != TCP_FIN_WAIT1 && new != TCP_LAST_ACK)
			return 0;
		if (!(BPF_CORE_READ(task, flags) & PF_KTHREAD))
			fill_owner(owner, task);
		else if (!known)
			return 0;
		if (known)
			remember_owner(owner, known);
	} else if (new != TCP_CLOSE || !known) { /* reset by the peer; nobody has accepted it */
		return 0;
	}
	bpf_map_delete_elem(&sockets, &key);
	tcp_event(record, key, TCP_CLOSED, 0);
	return 0;
}

static __always_inline struct sock *tcp_sock(struct file *file)
{
	struct socket *socket;
	struct sock *sock;

	if (!file || (BPF_CORE_READ(file, f_inode, i_mode) & S_IFMT) != S_IFSOCK)
		return 0;
	socket = BPF_CORE_READ(file, private_data);
	sock = BPF_CORE_READ(socket, sk);
	return sock && BPF_CORE_READ(sock, sk_protocol) == IPPROTO_TCP ? sock : 0;
}

/* Of sys_exit_accept and sys_exit_accept4. */
SEC("tp")
int on_tcp_accept(struct sys_exit_context *context)
{
	struct record *record = own_record(0);
	struct sock *sock = context->ret >= 0 ? tcp_sock(descriptor_file(current_task(), context->ret)) : 0;

	if (!record || !sock)
		return 0;
	fill_owner(&record->owner, current_task());
	record->owner.established = 1;
	tcp_event(record, (__u64)sock, TCP_ACCEPT, 0);
	if (BPF_CORE_READ(sock, __sk_common.skc_state) == TCP_CLOSE) /* reset before it was accepted */
		tcp_event(record, (__u64)sock, TCP_CLOSED, 0);
	else
		set_owner((__u64)sock, &record->owner);
	return 0;
}

/* Run once after attaching: the owners of the connections that are there already. */
SEC("iter/task_file")
int tcp_owners(struct bpf_iter__task_file *context)
{
	struct task_struct *task = context->task;
	struct file *file = context->file;
	struct owner owner = {};
	struct sock *sock;
	__u64 key;
	__u8 state;

	if (!task || !file)
		return 0;
	sock = tcp_sock(file);
	if (!sock)
		return 0;
	state = BPF_CORE_READ(sock, __sk_common.skc_state);
	if (state != TCP_ESTABLISHED && state != TCP_SYN_SENT && state != TCP_CLOSE_WAIT)
		return 0;
	fill_owner(&owner, task);
	owner.established = state != TCP_SYN_SENT;
	key = (__u64)sock;
	bpf_map_update_elem(&sockets, &key, &owner, BPF_NOEXIST);
	return 0;
}

/* ---------------------------------------------------------------------------------------------------------------
 * Gates: what is attached. A new spec comes as another set of tables and programs, loaded beside those that run; which
 * of the two see an event is read here, once, so that none is seen by both or by neither.
 */

#define GATE(context, programs, kind)                                                                                  \
	do {                                                                                                           \
		if (run.closed)                                                                                        \
			return 0;                                                                                      \
		if (run.generation & 1)                                                                                \
			bpf_tail_call_static(context, &programs, 2 * (kind) + 1);                                      \
		else                                                                                                   \
			bpf_tail_call_static(context, &programs, 2 * (kind));                                          \
		return 0;                                                                                              \
	} while (0)

/* The kernel wants the programs of one table to be of one type, and attached to the same place. */
#define PROGRAMS(name, count)                                                                                          \
	struct {                                                                                                       \
		__uint(type, BPF_MAP_TYPE_PROG_ARRAY);                                                                 \
		__uint(max_entries, 2 * (count));                                                                      \
		__type(key, __u32);                                                                                    \
		__type(value, __u32);                                                                                  \
	} name SEC(".maps")

enum { GATE_SYS_EXIT, GATE_SYS_ENTER, GATE_TCP_ACCEPT, TRACEPOINT_GATES };

PROGRAMS(tracepoints, TRACEPOINT_GATES);
PROGRAMS(every_exits, 1);
PROGRAMS(new_programs, 1);
PROGRAMS(tcp_states, 1);

SEC("tp")
int sys_exit(void *context)
{
	GATE(context, tracepoints, GATE_SYS_EXIT);
}

SEC("tp")
int sys_enter(void *context)
{
	GATE(context, tracepoints, GATE_SYS_ENTER);
}

/* Attached to sys_exit_accept and sys_exit_accept4. */
SEC("tp")
int tcp_accept(void *context)
{
	GATE(context, tracepoints, GATE_TCP_ACCEPT);
}

SEC("tp_btf/sys_exit")
int every_sys_exit(void *context)
{
	GATE(context, every_exits, 0);
}

SEC("tp_btf/sched_process_exec")
int new_program(void *context)
{
	GATE(context, new_programs, 0);
}

SEC("tp_btf/inet_sock_set_state")
int tcp_state(void *context)
{
	GATE(context, tcp_states, 0);
}

/* ---------------------------------------------------------------------------------------------------------------
 * Programs around these
 */

/* --follow: a child is traced as its parent is. */
SEC("tp_btf/sched_process_fork")
int follow_fork(__u64 *context)
{
	struct task_struct *parent = (void *)context[0], *child = (void *)context[1];
	__u32 from = BPF_CORE_READ(parent, tgid), to = BPF_CORE_READ(child, tgid);
	struct process *known, process = {};

	known = bpf_map_lookup_elem(&processes, &from);
	if (!known || from == to /* a thread */ || !is_process(known, BPF_CORE_READ(parent, group_leader, start_boottime)))
		return 0;
	process.class = known->class;
	process.from = process.to = BPF_CORE_READ(child, start_boottime);
	if (bpf_map_update_elem(&processes, &to, &process, BPF_ANY))
		__sync_fetch_and_add(&run.missed_children, 1);
	return 0;
}

/* A process that is gone is no longer traced: its number will be another's, or is already, since this comes late. Its last
 * files are closed by now. */
SEC("tp_btf/sched_process_free")
int forget_process(__u64 *context)
{
	struct task_struct *task = (void *)context[0];
	__u32 pid = BPF_CORE_READ(task, pid);
	struct process *known = bpf_map_lookup_elem(&processes, &pid);

	if (known && pid == (__u32)BPF_CORE_READ(task, tgid) && is_process(known, BPF_CORE_READ(task, start_boottime)))
		bpf_map_delete_elem(&processes, &pid);
	return 0;
}

/* Attached to io_uring/io_uring_submit_*, whose `opcode` is where the cookie says. These calls are not seen otherwise. */
SEC("tp")
int uring_submit(void *context)
{
	__u8 fields[64] = {}; /* the begin of the tracepoint's record: a context cannot be read at a variable offset */
	__u64 *count;
	__u32 key;

	if (bpf_probe_read_kernel(fields, sizeof(fields), context))
		return 0;
	key = fields[bpf_get_attach_cookie(context) % sizeof(fields)];
	count = bpf_map_lookup_elem(&uring, &key);
	if (count)
		++*count;
	__sync_fetch_and_add(&run.uring, 1);
	return 0;
}

/* Matches and counts the event in `synthetic`, for tests: run by bpf_prog_test_run_opts(), attached to nothing. */
SEC("syscall")
int feed(void *context __attribute__((unused)))
{
	__u32 zero = 0, event;
	struct record *given = bpf_map_lookup_elem(&synthetic, &zero), *record = bpf_map_lookup_elem(&scratch, &zero);
	struct matcher *matcher;
	struct source *source;

	if (!given || !record || bpf_probe_read_kernel(record, sizeof(*record), given))
		return 1;
	event = record->header.event; /* in the test, each event type has one source, in the same place */
	source = bpf_map_lookup_elem(&sources, &event);
	matcher = bpf_map_lookup_elem(&matchers, &event);
	if (!source || !matcher)
		return 1;
	deliver(record, source, matcher);
	return 0;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
