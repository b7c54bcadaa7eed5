// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * One program, attached to the sys_exit tracepoint of every syscall that the spec names. The attachment's cookie is the
 * row of `sources` that says how that syscall becomes an event, so syscall numbers do not matter and nothing here is
 * compiled for one architecture. At exit the result is known, the strings are resident because the kernel itself has
 * just read them, and the argument registers are still as they were at entry.
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
#define COMM_OFFSET DATA_SIZE /* comm has a place behind the data of records, so that texts are all found alike */
#define TEXT_SIZE (2 * DATA_SIZE)
#define TEXT_MASK (TEXT_SIZE - 1)
#define TEXT_WORDS (STRING_SIZE / 8)
#define NO_FILTER (~0U)

/* Set by traceleft.py before loading. */
const volatile __u32 own_pid = 0;          /* never traced: the tracer's own writes would make a loop */
const volatile __u32 wakeup_bytes = 65536; /* wake the reader when this much is pending; it polls by time anyway */
const volatile __u64 hash_seeds[2] = {};   /* random: nobody outside can make texts collide */

/* What is known of the event at hand. A record is built here and not in the ring: bpf_ringbuf_reserve() wants a size
 * that the verifier knows, so that every record would be as long as the longest. The kernel runs one tracepoint program
 * at a time on a CPU. */
struct record {
	__u64 values[FIELDS]; /* by enum field */
	__u64 registers[REGISTERS];
	__u32 done;            /* fields that have been fetched */
	__u32 used;            /* bytes of data */
	__u32 filter;          /* the last one counted: rows of one filter are neighbours, and count once */
	__u32 flags;           /* enum event_flags */
	__u64 rows[MAX_WORDS]; /* those that are true so far */
	struct event_header header;
	__u8 data[TEXT_SIZE]; /* behind the header: both go into the ring at once */
	__u64 slack;          /* the last word of a text may be read beyond its end */
};

#define MAP(name, kind, entries, key_type, value_type)                                                                 \
	struct {                                                                                                       \
		__uint(type, BPF_MAP_TYPE_##kind);                                                                     \
		__uint(max_entries, entries);                                                                          \
		__type(key, key_type);                                                                                 \
		__type(value, value_type);                                                                             \
	} name SEC(".maps")

/* What has one entry here is sized by traceleft.py for the spec before loading. */
MAP(sources, ARRAY, MAX_SOURCES, __u32, struct source);
MAP(processes, HASH, MAX_PROCESSES, struct process_key, __u64); /* program id */
MAP(matchers, ARRAY, MAX_EVENTS, __u32, struct matcher);
MAP(vectors, ARRAY, 1, __u32, struct vector);
MAP(bounds, ARRAY, 1, __u32, __u64);
MAP(texts, HASH, 1, struct text_key, struct text);
MAP(literals, ARRAY, 1, __u32, __u64); /* eight bytes each, the last padded with zeros */
MAP(rows, ARRAY, 1, __u32, __u32);     /* row -> filter */
MAP(filters, ARRAY, 1, __u32, struct filter);
MAP(filter_states, ARRAY, 1, __u32, struct filter_state);
MAP(filter_counts, PERCPU_ARRAY, 1, __u32, struct filter_counts);
MAP(groups, HASH, 1, struct group_key, struct group);
MAP(ticks, ARRAY, 1, __u32, __u32); /* set by traceleft.py each second */
MAP(scratch, PERCPU_ARRAY, 1, __u32, struct record);
MAP(synthetic, ARRAY, 1, __u32, struct record); /* the event for the program `feed` */

/* Two, so that a flood of streamed events costs no filter its sample. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 4096);
} samples SEC(".maps"), events SEC(".maps");

/* The context of syscalls/sys_exit_*: struct syscall_tp_t in kernel/trace/trace_syscalls.c. */
struct sys_exit_context {
	__u64 common;
	__s64 nr;
	__s64 ret;
};

/* ---------------------------------------------------------------------------------------------------------------
 * Fetching: from registers and memory to struct record
 */

static __always_inline void read_registers(struct task_struct *task, __u64 *registers)
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

static __always_inline struct inode *descriptor_inode(struct task_struct *task, __u8 kind, __s32 fd)
{
	struct file *file = 0;
	struct fdtable *table;

	if (kind == KIND_DFD && fd == AT_FDCWD)
		return BPF_CORE_READ(task, fs, pwd.dentry, d_inode);
	table = BPF_CORE_READ(task, files, fdt);
	if (!table || (__u32)fd >= BPF_CORE_READ(table, max_fds))
		return 0;
	bpf_probe_read_kernel(&file, sizeof(file), BPF_CORE_READ(table, fd) + (__u32)fd);
	return file ? BPF_CORE_READ(file, f_inode) : 0;
}

static __always_inline void note_file(struct record *record, struct task_struct *task, __u8 kind, __s32 fd)
{
	struct inode *inode = descriptor_inode(task, kind, fd);

	if (!inode)
		return;
	record->header.file_inode = BPF_CORE_READ(inode, i_ino);
	record->header.file_device = BPF_CORE_READ(inode, i_sb, s_dev);
	record->flags |= EVENT_HAS_FILE;
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
	__u32 offset = record->used;
	__s64 size;

	if (offset > DATA_SIZE - STRING_SIZE)
		return 0;
	if (argument->kind == KIND_STRING) {
		size = bpf_probe_read_user_str(&record->data[offset], STRING_SIZE, address);
		*whole = size > 0 && size < STRING_SIZE;
		size = size > 0 ? size - 1 : 0;
	} else {
		size = wanted > BUFFER_SIZE ? BUFFER_SIZE : wanted;
		*whole = !bpf_probe_read_user(&record->data[offset], (__u32)size & 0x1ff, address);
		size = *whole ? size : 0;
	}
	record->used = offset + (__u32)size;
	return (__u32)size | (__u64)offset << 32;
}

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

		if (ret < 0)
			wanted = argument->kind == KIND_BUFFER_IN ? record->registers[argument->value % REGISTERS] : 0;

		record->values[i] = capture(record, argument, (void *)value, wanted, &whole);
	} else {
		record->values[i] = scalar(argument, value);
	}
	if (!whole)
		record->flags |= EVENT_INCOMPLETE << i;
}

/* Fetches the fields of the mask that have not been yet: what was matched is what is shown. */
__noinline int fetch(struct record *record, const struct source *source, __u32 mask)
{
	struct task_struct *task = (void *)bpf_get_current_task_btf();

	if (!record || !source)
		return 0;
	mask &= ~record->done;
	record->done |= mask;
	for (int i = 0; i < MAX_ARGS; i++)
		if (mask >> i & 1 && source->arguments[i].kind != KIND_NONE)
			fetch_argument(record, source, i);
	if (mask >> FIELD_TID & 1)
		record->values[FIELD_TID] = (__u32)bpf_get_current_pid_tgid();
	if (mask >> FIELD_PPID & 1)
		record->values[FIELD_PPID] = (__u32)BPF_CORE_READ(task, real_parent, tgid);
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
	if (mask >> FIELD_FILE & 1) {
		for (int i = 0; i < MAX_ARGS; i++)
			if (source->arguments[i].kind >= KIND_FD)
				note_file(record, task, source->arguments[i].kind, record->values[i]);
		if (BPF_CORE_READ(task, thread_pid, level) > 0)
			record->flags |= EVENT_CONTAINER;
	}
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

/* The vector that the event's text has in a dimension. */
static __always_inline __u32 text_vector(const struct record *record, const struct dimension *dimension)
{
	__u64 value = record->values[dimension->field % FIELDS];
	__u32 length = value, offset = value >> 32;
	struct text_key key = { .dimension = dimension->id };
	struct text *text;

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
	key.length = length;
	key.hash = hash_text(record, offset, length, hash_seeds[0]);
	text = bpf_map_lookup_elem(&texts, &key);
	if (text && equals_literal(record, offset, length, text->literal))
		return text->vector;
	return dimension->vector;
}

/* The vector of the interval that the event's integer lies in: binary search for the first bound above it. */
static __always_inline __u32 integer_vector(const struct record *record, const struct dimension *dimension)
{
	__u64 value = (record->values[dimension->field % FIELDS] & dimension->and_mask) ^ dimension->xor_mask;
	__u32 low = 0, high = dimension->count;

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

/* Keeps the rows that the dimension does not rule out. Returns whether there are any. */
__noinline int match_dimension(struct record *record, const struct matcher *matcher, __u32 index)
{
	const struct dimension *dimension;
	struct vector *vector;
	__u64 any = 0;
	__u32 place;

	if (!record || !matcher || index >= MAX_DIMENSIONS)
		return 0;
	dimension = &matcher->dimensions[index];
	place = dimension->kind == DIMENSION_INTEGER ? integer_vector(record, dimension) :
						       text_vector(record, dimension);
	vector = bpf_map_lookup_elem(&vectors, &place);
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

static __always_inline bool match(struct record *record, const struct matcher *matcher)
{
	__u32 place = matcher->vector;
	struct vector *vector = bpf_map_lookup_elem(&vectors, &place);

	if (!vector)
		return false;
	for (__u32 i = 0; i < MAX_WORDS; i++) {
		if (i >= matcher->words)
			break;
		record->rows[i] = vector->words[i];
	}
	for (__u32 i = 0; i < MAX_DIMENSIONS; i++) {
		if (i >= matcher->dimension_count)
			break;
		if (!match_dimension(record, matcher, i))
			return false;
	}
	return true;
}

/* ---------------------------------------------------------------------------------------------------------------
 * Counting
 */

/* How many events the group has received in the event's second, this one included. A second never goes back: a CPU that
 * is late counts in the one that has begun. */
static __always_inline __u64 count_in_second(struct group *group, __u64 second)
{
	for (int i = 0; i < MAX_RACES; i++) {
		__u64 old = *(volatile __u64 *)&group->window, new = old + 1;

		if (old >> 32 < second)
			new = second << 32 | 1;
		if (__sync_val_compare_and_swap(&group->window, old, new) == old)
			return (__u32)new;
	}
	return 0; /* held back, as if it was among the first */
}

/* sigma. traceleft.py's class Sigma is the model. */
static __always_inline bool passes(struct group *group, const struct filter *filter, const struct record *record)
{
	if (filter->threshold &&
	    count_in_second(group, record->header.timestamp_ns / NSEC_PER_SEC) <= filter->threshold)
		return false;
	if (filter->frequency <= 1)
		return true;
	return (__sync_fetch_and_add(&group->counted, 1) + 1) % filter->frequency == 0;
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
	struct group_key key = { .filter = index };
	struct group *group, empty = {};

	key.hash[0] = hash_group(record, filter, hash_seeds[0]);
	key.hash[1] = hash_group(record, filter, hash_seeds[1]);
	group = bpf_map_lookup_elem(&groups, &key);
	if (group || *(volatile __u32 *)&state->groups >= filter->max_groups)
		return group;
	if (__sync_fetch_and_add(&state->groups, 1) >= filter->max_groups ||
	    bpf_map_update_elem(&groups, &key, &empty, BPF_NOEXIST))
		__sync_fetch_and_add(&state->groups, -1); /* full, or another CPU was faster */
	return bpf_map_lookup_elem(&groups, &key);
}

/* Completes the record, but for its data. */
static __always_inline void complete(struct record *record, const struct source *source, __u32 filter, __u32 tick)
{
	struct event_header *header = &record->header;

	fetch(record, source, ~0U);
	for (int i = 0; i < MAX_ARGS; i++)
		header->args[i] = record->values[i];
	header->ret = record->values[FIELD_RET];
	header->program_id = record->values[FIELD_PROGRAM_ID];
	header->pid = record->values[FIELD_PID];
	header->tid = record->values[FIELD_TID];
	header->ppid = record->values[FIELD_PPID];
	header->uid = record->values[FIELD_UID];
	header->gid = record->values[FIELD_GID];
	__builtin_memcpy(header->comm, &record->data[COMM_OFFSET], COMM_SIZE);
	header->event = source->event;
	header->flags = record->flags;
	header->version = RECORD_VERSION;
	header->filter = filter;
	header->tick = tick;
}

/* Puts the record into the ring of samples, which is read each second, or of streamed events. */
static __always_inline void submit(struct record *record, const struct filter *filter, struct filter_counts *counts)
{
	__u32 size = sizeof(record->header) + record->used;
	__u64 pending;
	long full;

	if (size > sizeof(record->header) + DATA_SIZE) /* never: for the verifier */
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

/* Counts the event for the filter of a row that is true. */
__noinline int count_row(struct record *record, const struct source *source, __u32 row)
{
	__u32 *index = bpf_map_lookup_elem(&rows, &row), *tick, zero = 0, filter_index;
	struct filter_counts *counts;
	struct filter_state *state;
	struct group *group;
	struct filter *filter;

	if (!record || !source || !index || *index == record->filter)
		return 0;
	filter_index = record->filter = *index;
	filter = bpf_map_lookup_elem(&filters, &filter_index);
	state = bpf_map_lookup_elem(&filter_states, &filter_index);
	counts = bpf_map_lookup_elem(&filter_counts, &filter_index);
	tick = bpf_map_lookup_elem(&ticks, &zero);
	if (!filter || !state || !counts || !tick)
		return 0;
	counts->matched++;
	if (!(filter->flags & FILTER_STREAM)) {
		group = filter->by_count ? find_group(record, filter, filter_index, state) : 0;
		if (!passes(group ? group : &state->group, filter, record)) {
			counts->folded++;
			return 0;
		}
		counts->passed++;
		if (state->sampled == *tick || __sync_lock_test_and_set(&state->sampled, *tick) == *tick)
			return 0;
	}
	complete(record, source, filter_index, *tick);
	submit(record, filter, counts);
	return 0;
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
	record->filter = NO_FILTER;
	for (__u32 i = 0; i < MAX_WORDS; i++) {
		if (i >= matcher->words)
			break;
		if (record->rows[i])
			count_word(record, source, matcher->first_row + i * 64, record->rows[i]);
	}
}

/* ---------------------------------------------------------------------------------------------------------------
 * Programs
 */

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

SEC("tp")
int sys_exit(struct sys_exit_context *context)
{
	__u32 pid = bpf_get_current_pid_tgid() >> 32, row = bpf_get_attach_cookie(context), zero = 0, event;
	struct source *source = bpf_map_lookup_elem(&sources, &row);
	struct record *record = bpf_map_lookup_elem(&scratch, &zero);
	struct matcher *matcher;
	__u64 program_id;

	if (!source || !record || pid == own_pid || !wanted_process(source, pid, &program_id))
		return 0;
	event = source->event;
	matcher = bpf_map_lookup_elem(&matchers, &event);
	if (!matcher)
		return 0;
	read_registers((void *)bpf_get_current_task_btf(), record->registers);
	if (source->flags & SOURCE_ONLY_FDCWD && (__s32)record->registers[0] != AT_FDCWD)
		return 0;

	record->done = record->used = record->flags = 0;
	record->values[FIELD_RET] = context->ret;
	record->values[FIELD_PID] = pid;
	record->values[FIELD_PROGRAM_ID] = program_id;
	fetch(record, source, matcher->needed);
	if (match(record, matcher))
		count(record, source, matcher);
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
	if (match(record, matcher))
		count(record, source, matcher);
	return 0;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
