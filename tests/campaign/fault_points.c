/* Faults at the k-th change of a file: LD_PRELOAD library for tests/campaign/worker.py.

   Every call that changes a regular file or a folder is a point: open for writing, write, rename, mkdir, link, fsync ...
   Native code (safetensors, OpenVINO, libstdc++) calls the same functions, so its writes are points too.

   faults_arm(mode, at): COUNT counts, with deletions if `at` is 0; KILL_BEFORE and KILL_AFTER send SIGKILL at point `at` (a write is then cut in
   half); FULL_DISK fails with ENOSPC from point `at` on; ENOSPC_ONCE at point `at` only; SNAPSHOT copies a folder
   before every point (faults_snapshots): the states that a SIGKILL at any of them would leave. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

enum { OFF, COUNT, KILL_BEFORE, KILL_AFTER, FULL_DISK, ENOSPC_ONCE, SNAPSHOT };
static volatile long mode = OFF, at = 0, points = 0;

void faults_arm(long new_mode, long new_at) { points = 0; at = new_at; mode = new_mode; }
static char source[4096], target[4096];
void faults_snapshots(const char *from, const char *to) { strcpy(source, from); strcpy(target, to); }
long faults_count(void) { return points; }

static int regular(int fd) {
    struct stat found;
    return fstat(fd, &found) == 0 && S_ISREG(found.st_mode);
}

static void die(void) { kill(getpid(), SIGKILL); for (;;) pause(); }

static void snapshot(long number) {
    char copy[4200];
    snprintf(copy, sizeof copy, "%s/%06ld", target, number);
    pid_t child = fork();
    if (child == 0) { execl("/bin/cp", "cp", "-a", source, copy, (char *)NULL); _exit(1); }
    waitpid(child, NULL, 0);
}

/* 1 if this call must fail, 2 if it must be killed after its effect */
static int point(void) {
    if (mode == OFF) return 0;
    long number = __sync_add_and_fetch(&points, 1);
    if (mode == FULL_DISK && number >= at) return 1;
    if (mode == SNAPSHOT) snapshot(number);
    if (number != at) return 0;
    if (mode == KILL_BEFORE) die();
    return mode == KILL_AFTER ? 2 : mode == ENOSPC_ONCE;
}

#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define FAIL_IF(condition, failed) int fault = (condition) ? point() : 0; if (fault == 1) { errno = ENOSPC; return failed; }
#define RETURN(value) do { __typeof__(value) result = (value); if (fault == 2) die(); return result; } while (0)

#define OPEN(name, ...) \
    mode_t access = 0; \
    if (flags & (O_CREAT | O_TMPFILE)) { va_list list; va_start(list, flags); access = va_arg(list, mode_t); va_end(list); } \
    REAL(name); FAIL_IF(flags & (O_CREAT | O_TRUNC), -1) RETURN(real(__VA_ARGS__, flags, access));
int open(const char *path, int flags, ...) { OPEN(open, path) }
int open64(const char *path, int flags, ...) { OPEN(open64, path) }
int openat(int folder, const char *path, int flags, ...) { OPEN(openat, folder, path) }
int openat64(int folder, const char *path, int flags, ...) { OPEN(openat64, folder, path) }
FILE *fopen(const char *path, const char *how) { REAL(fopen); FAIL_IF(strpbrk(how, "wa"), NULL) RETURN(real(path, how)); }
FILE *fopen64(const char *path, const char *how) { REAL(fopen64); FAIL_IF(strpbrk(how, "wa"), NULL) RETURN(real(path, how)); }

ssize_t write(int fd, const void *data, size_t size) {
    REAL(write); FAIL_IF(regular(fd), -1)
    RETURN(real(fd, data, fault == 2 && size > 1 ? size / 2 : size));
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) { REAL(pwrite); FAIL_IF(regular(fd), -1) RETURN(real(fd, data, size, offset)); }
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) { REAL(pwrite64); FAIL_IF(regular(fd), -1) RETURN(real(fd, data, size, offset)); }
ssize_t writev(int fd, const struct iovec *parts, int count) { REAL(writev); FAIL_IF(regular(fd), -1) RETURN(real(fd, parts, count)); }
ssize_t sendfile(int fd, int in, off_t *offset, size_t size) { REAL(sendfile); FAIL_IF(regular(fd), -1) RETURN(real(fd, in, offset, size)); }
ssize_t sendfile64(int fd, int in, off64_t *offset, size_t size) { REAL(sendfile64); FAIL_IF(regular(fd), -1) RETURN(real(fd, in, offset, size)); }
ssize_t copy_file_range(int in, off64_t *a, int fd, off64_t *b, size_t size, unsigned flags) {
    REAL(copy_file_range); FAIL_IF(regular(fd), -1) RETURN(real(in, a, fd, b, size, flags));
}
int ftruncate(int fd, off_t size) { REAL(ftruncate); FAIL_IF(regular(fd), -1) RETURN(real(fd, size)); }
int ftruncate64(int fd, off64_t size) { REAL(ftruncate64); FAIL_IF(regular(fd), -1) RETURN(real(fd, size)); }
int fsync(int fd) { REAL(fsync); FAIL_IF(regular(fd), -1) RETURN(real(fd)); }

int rename(const char *from, const char *to) { REAL(rename); FAIL_IF(1, -1) RETURN(real(from, to)); }
int renameat(int a, const char *from, int b, const char *to) { REAL(renameat); FAIL_IF(1, -1) RETURN(real(a, from, b, to)); }
int mkdir(const char *path, mode_t access) { REAL(mkdir); FAIL_IF(1, -1) RETURN(real(path, access)); }
int link(const char *from, const char *to) { REAL(link); FAIL_IF(1, -1) RETURN(real(from, to)); }
int symlink(const char *from, const char *to) { REAL(symlink); FAIL_IF(1, -1) RETURN(real(from, to)); }

/* A full disk can still delete: only killed here. */
#define DELETES ((mode == COUNT && at == 0) || mode == KILL_BEFORE || mode == KILL_AFTER || mode == SNAPSHOT)
int unlink(const char *path) { REAL(unlink); FAIL_IF(DELETES, -1) RETURN(real(path)); }
int unlinkat(int folder, const char *path, int flags) { REAL(unlinkat); FAIL_IF(DELETES, -1) RETURN(real(folder, path, flags)); }
int rmdir(const char *path) { REAL(rmdir); FAIL_IF(DELETES, -1) RETURN(real(path)); }
