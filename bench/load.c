// SPDX-License-Identifier: Apache-2.0
/*
 * Makes one kind of syscall as fast as it can and reports how many it made and how long one took.
 *   load KIND SECONDS PATH [OPS_PER_SECOND]
 * KIND: named (opens and closes PATH), other (opens and closes PATH.other), failing (opens PATH.missing), getppid,
 * mixed (all four in turn). Prints: COUNT NANOSECONDS_PER_OPERATION
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum kind { NAMED, OTHER, FAILING, GETPPID, MIXED };
static const char *const kinds[] = { "named", "other", "failing", "getppid", "mixed" };
static char paths[3][4200];

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec * 1e-9;
}

static void operation(enum kind kind)
{
	if (kind == GETPPID) {
		syscall(SYS_getppid);
	} else {
		int fd = open(paths[kind], O_RDONLY);

		if (fd >= 0)
			close(fd);
	}
}

int main(int argc, char **argv)
{
	int kind = NAMED;
	double seconds, begin, end;
	long count = 0, rate;

	while (argc > 3 && kind <= MIXED && strcmp(argv[1], kinds[kind]))
		kind++;
	if (argc < 4 || kind > MIXED) {
		fprintf(stderr, "usage: load named|other|failing|getppid|mixed SECONDS PATH [OPS_PER_SECOND]\n");
		return 2;
	}
	seconds = atof(argv[2]);
	rate = argc > 4 ? atol(argv[4]) : 0;
	snprintf(paths[NAMED], sizeof(paths[0]), "%s", argv[3]);
	snprintf(paths[OTHER], sizeof(paths[0]), "%s.other", argv[3]);
	snprintf(paths[FAILING], sizeof(paths[0]), "%s.missing", argv[3]);
	for (int i = NAMED; i <= OTHER; i++)
		close(open(paths[i], O_CREAT | O_WRONLY, 0600));
	begin = now();
	end = begin + seconds;
	while (now() < end) {
		int batch = rate ? 10 : 1000;

		for (int i = 0; i < batch; i++, count++)
			operation(kind == MIXED ? count % MIXED : (enum kind)kind);
		if (rate)
			usleep(batch * 1000000L / rate);
	}
	end = now();
	printf("%ld %.1f\n", count, (end - begin) * 1e9 / count);
	return 0;
}
