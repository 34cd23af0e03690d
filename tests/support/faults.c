/* Loaded before libc (LD_PRELOAD): makes the disk fail or slow, and the clock jump, for one process and its children.

   FAULT_PATH   calls on files whose path holds this text count; links are followed
   FAULT_CALLS  which calls: some of "open read write sync rename", by any separator
   FAULT_FROM   the first so many of them succeed (default 0); all further ones …
   FAULT_COUNT  … or so many of them …
   FAULT_ERRNO  … fail with this number (default 5, EIO); 0: they succeed
   FAULT_SLOW   milliseconds that each of the calls that count takes longer
   FAULT_LOG    a file that gets a line for each of the calls that count
   FAULT_CLOCK  seconds. With every tenth look at the wall clock it goes on by so much, goes back by as much, or is right
                again, in turn. The monotonic clock is left alone, as it is when a machine's clock is set. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static atomic_long calls, looks;

static long number(const char *name, long otherwise) {
    const char *text = getenv(name);
    return text && *text ? atol(text) : otherwise;
}

static void note(const char *call, const char *path) {
    const char *log = getenv("FAULT_LOG");
    char line[PATH_MAX + 16];
    if (!log) return;
    int file = (int)syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND, 0666);
    int size = snprintf(line, sizeof line, "%s %s\n", call, path);
    if (file >= 0) {
        syscall(SYS_write, file, line, size);
        syscall(SYS_close, file);
    }
}

/* Whether the call is to fail; errno is set then. */
static int fails(const char *call, const char *path) {
    const char *part = getenv("FAULT_PATH"), *wanted = getenv("FAULT_CALLS");
    if (!part || !wanted || !strstr(wanted, call) || !path || !strstr(path, part)) return 0;
    note(call, path);
    long now = atomic_fetch_add(&calls, 1), from = number("FAULT_FROM", 0), slow = number("FAULT_SLOW", 0);
    if (slow) {
        struct timespec pause = {slow / 1000, slow % 1000 * 1000000};
        nanosleep(&pause, NULL);
    }
    int code = (int)number("FAULT_ERRNO", EIO);
    if (!code || now < from || now - from >= number("FAULT_COUNT", LONG_MAX)) return 0;
    errno = code;
    return 1;
}

static int fails_at(const char *call, int descriptor) {
    if (!getenv("FAULT_PATH")) return 0;
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    int before = errno;
    ssize_t size = readlink(link, path, sizeof path - 1);
    errno = before;
    if (size < 0) return 0;
    path[size] = 0;
    return fails(call, path);
}

#define REAL(name) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define ON_FILE(call, type, name, parameters, arguments)         \
    type name parameters {                                       \
        REAL(name);                                              \
        return fails_at(call, descriptor) ? -1 : real arguments; \
    }

ON_FILE("read", ssize_t, read, (int descriptor, void *to, size_t size), (descriptor, to, size))
ON_FILE("read", ssize_t, pread, (int descriptor, void *to, size_t size, off_t at), (descriptor, to, size, at))
ON_FILE("read", ssize_t, pread64, (int descriptor, void *to, size_t size, off64_t at), (descriptor, to, size, at))
ON_FILE("read", ssize_t, preadv, (int descriptor, const struct iovec *to, int count, off_t at), (descriptor, to, count, at))
ON_FILE("write", ssize_t, write, (int descriptor, const void *from, size_t size), (descriptor, from, size))
ON_FILE("write", ssize_t, pwrite, (int descriptor, const void *from, size_t size, off_t at), (descriptor, from, size, at))
ON_FILE("write", ssize_t, pwrite64, (int descriptor, const void *from, size_t size, off64_t at), (descriptor, from, size, at))
ON_FILE("write", ssize_t, writev, (int descriptor, const struct iovec *from, int count), (descriptor, from, count))
ON_FILE("write", int, ftruncate, (int descriptor, off_t size), (descriptor, size))
ON_FILE("write", int, ftruncate64, (int descriptor, off64_t size), (descriptor, size))
ON_FILE("sync", int, fsync, (int descriptor), (descriptor))
ON_FILE("sync", int, fdatasync, (int descriptor), (descriptor))

#define OPENING(name)                                  \
    int name(const char *path, int flags, ...) {       \
        REAL(name);                                    \
        va_list rest;                                  \
        va_start(rest, flags);                         \
        mode_t mode = va_arg(rest, mode_t);            \
        va_end(rest);                                  \
        return fails("open", path) ? -1 : real(path, flags, mode); \
    }
OPENING(open)
OPENING(open64)

FILE *fopen(const char *path, const char *mode) {
    REAL(fopen);
    return fails("open", path) ? NULL : real(path, mode);
}

int rename(const char *from, const char *to) {
    REAL(rename);
    return fails("rename", to) ? -1 : real(from, to);
}

static time_t jump(void) {
    long by = number("FAULT_CLOCK", 0), turn = by ? atomic_fetch_add(&looks, 1) / 10 % 3 : 0;
    return turn == 1 ? by : turn == 2 ? -by : 0;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    REAL(clock_gettime);
    int result = real(clock, now);
    if (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE) now->tv_sec += jump();
    return result;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec precise;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &precise);
    now->tv_sec = precise.tv_sec;
    now->tv_usec = precise.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *seconds) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (seconds) *seconds = now.tv_sec;
    return now.tv_sec;
}
