/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The few kernel types that the programs touch, by hand and with only the fields used. Offsets come from the running
 * kernel: preserve_access_index makes clang emit a CO-RE relocation for each access, so order and size here say nothing.
 */
#ifndef TRACELEFT_VMLINUX_H
#define TRACELEFT_VMLINUX_H

typedef unsigned char __u8;
typedef unsigned short __u16;
typedef unsigned int __u32;
typedef unsigned long long __u64;
typedef signed char __s8;
typedef short __s16;
typedef int __s32;
typedef long long __s64;
typedef _Bool bool;
enum { false = 0, true = 1 };
typedef __u16 __be16;
typedef __u32 __be32;
typedef __u32 __wsum;

/* include/uapi/linux/bpf.h */
enum bpf_map_type {
	BPF_MAP_TYPE_HASH = 1,
	BPF_MAP_TYPE_ARRAY = 2,
	BPF_MAP_TYPE_PERCPU_ARRAY = 6,
	BPF_MAP_TYPE_RINGBUF = 27,
};

enum {
	BPF_NOEXIST = 1, /* for bpf_map_update_elem() */
};

enum {
	BPF_RB_NO_WAKEUP = 1ULL << 0,
	BPF_RB_FORCE_WAKEUP = 1ULL << 1,
	BPF_RB_AVAIL_DATA = 0, /* for bpf_ringbuf_query() */
};

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct super_block {
	__u32 s_dev;
};

struct inode {
	unsigned long i_ino;
	struct super_block *i_sb;
};

struct dentry {
	struct inode *d_inode;
};

struct path {
	struct dentry *dentry;
};

struct fs_struct {
	struct path pwd;
};

struct file {
	struct inode *f_inode;
};

struct fdtable {
	unsigned int max_fds;
	struct file **fd;
};

struct files_struct {
	struct fdtable *fdt;
};

struct pid {
	unsigned int level; /* depth of the pid namespace, 0 in the initial one */
};

struct task_struct {
	__s32 tgid;
	struct task_struct *real_parent;
	struct pid *thread_pid;
	struct fs_struct *fs;
	struct files_struct *files;
};

/*
 * struct pt_regs differs by architecture. The part of a name behind ___ is ignored when it is looked up in the kernel's
 * BTF ("flavor"), so both can stand in one object; bpf_core_field_exists() tells at load time which one this kernel has.
 */
struct pt_regs___x86_64 { /* arch/x86/include/asm/ptrace.h */
	unsigned long di, si, dx, r10, r8, r9;
};

struct user_pt_regs___aarch64 { /* arch/arm64/include/uapi/asm/ptrace.h; struct pt_regs begins with it */
	__u64 regs[31];
};

struct pt_regs___aarch64 { /* arch/arm64/include/asm/ptrace.h */
	__u64 orig_x0; /* regs[0] at entry: at exit regs[0] is the return value */
};

#pragma clang attribute pop

struct pt_regs; /* only ever handled as a pointer */

#endif
