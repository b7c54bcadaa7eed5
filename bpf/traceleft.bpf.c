// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * One program, attached to the sys_exit tracepoint of every syscall that the spec names. The attachment's cookie is the
 * row of `sources` that says how that syscall becomes an event, so syscall numbers do not matter and nothing here is
 * compiled for one architecture. At exit the result is known, the strings are resident because the kernel itself has
 * just read them, and the argument registers are still as they were at entry.
 */
#include "vmlinux.h"

#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>

#include "traceleft.h"

#define AT_FDCWD (-100) /* include/uapi/linux/fcntl.h */
#define REGISTERS 8     /* six and two unused: with a power of two, a mask is a bound that the verifier understands */
#define REGISTER_MASK (REGISTERS - 1)

/* Set by traceleft.py before loading. */
const volatile __u32 own_pid = 0;          /* never traced: the tracer's own writes would make a loop */
const volatile __u64 wakeup_bytes = 65536; /* wake the reader when this much is pending; it polls by time anyway */

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 20); /* set by traceleft.py */
} events SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MAX_SOURCES);
	__type(key, __u32);
	__type(value, struct source);
} sources SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_PROCESSES);
	__type(key, struct process_key);
	__type(value, __u64); /* program id */
} processes SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, MAX_SOURCES);
	__type(key, __u32);
	__type(value, struct counters); /* by event type */
} counters SEC(".maps");

/* A record is built here and not in the ring: bpf_ringbuf_reserve() wants a size that the verifier knows, so that every
 * record would be as long as the longest. The kernel runs one tracepoint program at a time on a CPU. */
struct record {
	struct event_header header;
	__u8 data[DATA_SIZE];
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct record);
} scratch SEC(".maps");

/* The context of syscalls/sys_exit_*: struct syscall_tp_t in kernel/trace/trace_syscalls.c. */
struct sys_exit_context {
	__u64 common;
	__s64 nr;
	__s64 ret;
};

static __always_inline void read_registers(struct task_struct *task, __u64 registers[REGISTERS])
{
	struct pt_regs *regs = (struct pt_regs *)bpf_task_pt_regs(task);

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

static __always_inline struct inode *descriptor_inode(struct task_struct *task, __s32 fd)
{
	struct file *file = 0;
	struct fdtable *table;

	if (fd == AT_FDCWD)
		return BPF_CORE_READ(task, fs, pwd.dentry, d_inode);
	table = BPF_CORE_READ(task, files, fdt);
	if (!table || (__u32)fd >= BPF_CORE_READ(table, max_fds))
		return 0;
	bpf_probe_read_kernel(&file, sizeof(file), BPF_CORE_READ(table, fd) + (__u32)fd);
	return file ? BPF_CORE_READ(file, f_inode) : 0;
}

static __always_inline void note_file(struct event_header *header, struct task_struct *task, __s32 fd)
{
	struct inode *inode = descriptor_inode(task, fd);

	if (!inode)
		return;
	header->file_inode = BPF_CORE_READ(inode, i_ino);
	header->file_device = BPF_CORE_READ(inode, i_sb, s_dev);
	header->flags |= EVENT_HAS_FILE;
}

/* The value of an argument that is not in memory. */
static __always_inline __u64 scalar(const struct argument *argument, const __u64 registers[REGISTERS])
{
	__u64 value = registers[argument->reg & REGISTER_MASK];
	__u32 unused_bits = (64 - argument->bits) & 63; /* the ABI leaves them undefined */

	if (argument->kind == KIND_SIGNED || argument->kind == KIND_FD)
		return (__s64)(value << unused_bits) >> unused_bits;
	if (argument->kind == KIND_UNSIGNED)
		return value << unused_bits >> unused_bits;
	return argument->value;
}

/* Copies the string or buffer to data + offset. Returns the number of bytes kept, *whole tells whether that is all. */
static __always_inline __u32 capture(struct record *record, __u32 offset, const struct argument *argument,
				     const void *address, __u64 wanted, bool *whole)
{
	__s64 size;

	if (offset > DATA_SIZE - STRING_SIZE)
		return 0;
	if (argument->kind == KIND_STRING) {
		size = bpf_probe_read_user_str(&record->data[offset], STRING_SIZE, address);
		*whole = size > 0 && size < STRING_SIZE;
		if (size <= 0)
			return 0;
		return (__u32)(size - 1) & 0x1fff; /* the mask tells the verifier what the helper promises */
	}
	if (wanted > BUFFER_SIZE)
		wanted = BUFFER_SIZE;
	*whole = !bpf_probe_read_user(&record->data[offset], (__u32)wanted & 0x1ff, address);
	return *whole ? (__u32)wanted & 0x1ff : 0;
}

static __always_inline bool wanted_process(const struct source *source, __u32 pid, __u64 *program_id)
{
	*program_id = source->program_id;
	if (source->flags & SOURCE_BY_PROCESS) {
		struct process_key key = { .pid = pid, .event = source->event };
		__u64 *id = bpf_map_lookup_elem(&processes, &key);

		if (id) {
			*program_id = *id;
			return true;
		}
	}
	return source->flags & SOURCE_ANY_PROCESS;
}

static __always_inline void describe_task(struct event_header *header, struct task_struct *task)
{
	__u64 uid_gid = bpf_get_current_uid_gid();

	header->tid = (__u32)bpf_get_current_pid_tgid();
	header->ppid = BPF_CORE_READ(task, real_parent, tgid);
	header->uid = (__u32)uid_gid;
	header->gid = uid_gid >> 32;
	if (BPF_CORE_READ(task, thread_pid, level) > 0)
		header->flags |= EVENT_CONTAINER;
	bpf_get_current_comm(header->comm, sizeof(header->comm));
}

static __always_inline void submit(struct record *record, __u32 data_size)
{
	__u64 pending = bpf_ringbuf_query(&events, BPF_RB_AVAIL_DATA);
	__u64 wakeup = pending >= wakeup_bytes ? BPF_RB_FORCE_WAKEUP : BPF_RB_NO_WAKEUP;
	__u32 event = record->header.event;
	struct counters *count = bpf_map_lookup_elem(&counters, &event);

	if (data_size > DATA_SIZE) /* never: for the verifier, which has lost the sum's bounds */
		return;
	if (!bpf_ringbuf_output(&events, record, sizeof(record->header) + data_size, wakeup)) {
		if (count)
			count->submitted++;
	} else if (count) {
		count->lost[LOST_RING_FULL]++;
	}
}

SEC("tp")
int sys_exit(struct sys_exit_context *context)
{
	__u32 pid = bpf_get_current_pid_tgid() >> 32, row = bpf_get_attach_cookie(context), zero = 0, used = 0;
	struct task_struct *task = (void *)bpf_get_current_task_btf();
	struct source *source = bpf_map_lookup_elem(&sources, &row);
	struct record *record = bpf_map_lookup_elem(&scratch, &zero);
	__u64 registers[REGISTERS] = {}, program_id;
	struct event_header *header;

	if (!source || !record || pid == own_pid || !wanted_process(source, pid, &program_id))
		return 0;
	read_registers(task, registers);
	if (source->flags & SOURCE_ONLY_FDCWD && (__s32)registers[0] != AT_FDCWD)
		return 0;

	header = &record->header;
	header->timestamp_ns = bpf_ktime_get_boot_ns();
	header->ret = context->ret;
	header->program_id = program_id;
	header->pid = pid;
	header->event = source->event;
	header->flags = 0;
	header->version = RECORD_VERSION;
	describe_task(header, task);

	for (int i = 0; i < MAX_ARGS; i++) {
		const struct argument *argument = &source->arguments[i];
		const void *address = (void *)registers[argument->reg & REGISTER_MASK];
		bool whole = false;

		if (argument->kind == KIND_NONE)
			break;
		if (argument->kind == KIND_MEMORY) {
			whole = !bpf_probe_read_user(&header->args[i], sizeof(__u64), address + argument->value);
		} else if (argument->kind >= KIND_STRING && argument->kind <= KIND_BUFFER_OUT) {
			__u64 wanted = argument->kind == KIND_BUFFER_IN ? registers[argument->value & REGISTER_MASK] :
				       context->ret > 0			? context->ret :
									  0;
			header->args[i] = capture(record, used, argument, address, wanted, &whole);
			used += header->args[i];
		} else {
			header->args[i] = scalar(argument, registers);
			whole = true;
			if (argument->kind == KIND_FD)
				note_file(header, task, header->args[i]);
		}
		if (!whole)
			header->flags |= EVENT_INCOMPLETE << i;
	}
	submit(record, used);
	return 0;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
