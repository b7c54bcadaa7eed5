// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* The floor of the comparison: a program that does nothing but read the path of an open, and one that does nothing. */
#include "../bpf/vmlinux.h"

#include <bpf/bpf_helpers.h>

struct buffer {
	char name[4096];
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct buffer);
} scratch SEC(".maps");

struct sys_enter_context {
	__u64 common;
	__s64 nr;
	__u64 args[6];
};

SEC("tp/syscalls/sys_enter_openat")
int floor_open(struct sys_enter_context *context)
{
	__u32 zero = 0;
	struct buffer *path = bpf_map_lookup_elem(&scratch, &zero);

	if (path)
		bpf_probe_read_user_str(path->name, sizeof(path->name), (void *)context->args[1]);
	return 0;
}

SEC("tp/syscalls/sys_exit_openat")
int floor_exit(void *context __attribute__((unused)))
{
	return 0;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
