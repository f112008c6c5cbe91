/* Counts the file calls of native libraries by call site, and makes one of them fail.

   Preloaded. A call site is a function, the caller's place in its library, and the path with its
   numbers and random parts left out. Python's own calls are passed on: the Python hook has those. */
#define _GNU_SOURCE
#include <ctype.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define SITES 1024
#define NAME 232

struct site { uint64_t hash; uint32_t count; uint32_t unused; char name[NAME]; };
struct control {
    uint32_t armed, fired, index, error;
    uint64_t hash;
    uint32_t num_sites, lock;
    char root[480];
    struct site sites[SITES];
};

static struct control *control;
static char role[16] = "front";

/* The path without what differs from run to run: digits, and random names. */
static void normalize(const char *path, char *out, size_t size) {
    size_t used = 0;
    while (*path && used + 2 < size) {
        if (!isalnum((unsigned char)*path)) { out[used++] = *path++; continue; }
        size_t length = 0, digits = 0;
        while (isalnum((unsigned char)path[length]) || path[length] == '-')
            digits += isdigit((unsigned char)path[length++]) != 0;
        if (digits || (length == 9 && !strncmp(path, "tmp", 3))) out[used++] = '#';
        else for (size_t i = 0; i < length && used + 2 < size; i++) out[used++] = path[i];
        path += length;
    }
    out[used] = 0;
}

/* The error that a call has to fail with; 0 to carry it out. */
static int fails(const char *function, const char *path, void *caller) {
    struct control *c = control;
    if (!c || !c->armed) return 0;
    size_t length = strlen(c->root);
    if (strncmp(path, c->root, length)) return 0;
    int saved = errno;
    Dl_info info;
    if (!dladdr(caller, &info) || !info.dli_fname) { errno = saved; return 0; }
    const char *library = strrchr(info.dli_fname, '/');
    library = library ? library + 1 : info.dli_fname;
    if (!strncmp(library, "python", 6) || !strncmp(library, "libpython", 9)) { errno = saved; return 0; }
    char place[128], name[NAME];
    normalize(path + length, place, sizeof place);
    snprintf(name, sizeof name, "%s %s %s+%lx %s", role, function, library,
             (unsigned long)((char *)caller - (char *)info.dli_fbase), place);
    uint64_t hash = 1469598103934665603ULL;
    for (const char *p = name; *p; p++) hash = (hash ^ (unsigned char)*p) * 1099511628211ULL;
    while (__atomic_exchange_n(&c->lock, 1, __ATOMIC_ACQUIRE)) {}
    uint32_t count = 0;
    struct site *s = c->sites, *end = c->sites + SITES;
    while (s < end && s->hash && s->hash != hash) s++;
    if (s < end) {
        if (!s->hash) { s->hash = hash; strcpy(s->name, name); c->num_sites++; }
        count = ++s->count;
    }
    int error = 0;
    if (c->hash == hash && count == c->index && !c->fired) { c->fired = 1; error = (int)c->error; }
    __atomic_store_n(&c->lock, 0, __ATOMIC_RELEASE);
    errno = saved;
    return error;
}

static int fails_fd(const char *function, int fd, void *caller) {
    if (!control || !control->armed || fd < 0) return 0;
    int saved = errno;
    char link[32], path[512];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    errno = saved;
    if (length <= 0) return 0;
    path[length] = 0;
    return fails(function, path, caller);
}

/* Map a run's control file; `as` is the process's role. */
int filecalls_attach(const char *path, const char *as) {
    snprintf(role, sizeof role, "%s", as);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0) return errno;
    void *where = mmap(NULL, sizeof(struct control), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (where == MAP_FAILED) return errno;
    control = where;
    return 0;
}

void filecalls_role(const char *as) { snprintf(role, sizeof role, "%s", as); }

#define REAL(result, name, ...) \
    static result (*real)(__VA_ARGS__); \
    if (!real) real = (result (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)
#define FAIL(error) do { int e_ = (error); if (e_) { errno = e_; return -1; } } while (0)
#define HERE __builtin_return_address(0)

#define OPEN(function) \
    int function(const char *path, int flags, ...) { \
        REAL(int, #function, const char *, int, ...); \
        mode_t mode = 0; \
        if (flags & (O_CREAT | __O_TMPFILE)) { va_list a; va_start(a, flags); mode = va_arg(a, mode_t); va_end(a); } \
        FAIL(fails("open", path, HERE)); \
        return real(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(function) \
    int function(int folder, const char *path, int flags, ...) { \
        REAL(int, #function, int, const char *, int, ...); \
        mode_t mode = 0; \
        if (flags & (O_CREAT | __O_TMPFILE)) { va_list a; va_start(a, flags); mode = va_arg(a, mode_t); va_end(a); } \
        FAIL(fails("open", path, HERE)); \
        return real(folder, path, flags, mode); \
    }
OPENAT(openat)
OPENAT(openat64)

ssize_t write(int fd, const void *data, size_t size) {
    REAL(ssize_t, "write", int, const void *, size_t);
    FAIL(fails_fd("write", fd, HERE));
    return real(fd, data, size);
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
    REAL(ssize_t, "writev", int, const struct iovec *, int);
    FAIL(fails_fd("write", fd, HERE));
    return real(fd, parts, count);
}

#define PWRITE(function) \
    ssize_t function(int fd, const void *data, size_t size, off64_t where) { \
        REAL(ssize_t, #function, int, const void *, size_t, off64_t); \
        FAIL(fails_fd("write", fd, HERE)); \
        return real(fd, data, size, where); \
    }
PWRITE(pwrite)
PWRITE(pwrite64)

#define SYNC(function) \
    int function(int fd) { \
        REAL(int, #function, int); \
        FAIL(fails_fd("fsync", fd, HERE)); \
        return real(fd); \
    }
SYNC(fsync)
SYNC(fdatasync)

int rename(const char *from, const char *to) {
    REAL(int, "rename", const char *, const char *);
    FAIL(fails("rename", to, HERE));
    return real(from, to);
}

int renameat(int a, const char *from, int b, const char *to) {
    REAL(int, "renameat", int, const char *, int, const char *);
    FAIL(fails("rename", to, HERE));
    return real(a, from, b, to);
}

int renameat2(int a, const char *from, int b, const char *to, unsigned flags) {
    REAL(int, "renameat2", int, const char *, int, const char *, unsigned);
    FAIL(fails("rename", to, HERE));
    return real(a, from, b, to, flags);
}

int link(const char *from, const char *to) {
    REAL(int, "link", const char *, const char *);
    FAIL(fails("rename", to, HERE));
    return real(from, to);
}

int linkat(int a, const char *from, int b, const char *to, int flags) {
    REAL(int, "linkat", int, const char *, int, const char *, int);
    FAIL(fails("rename", to, HERE));
    return real(a, from, b, to, flags);
}

#define MMAP(function) \
    void *function(void *at, size_t size, int protect, int flags, int fd, off64_t where) { \
        REAL(void *, #function, void *, size_t, int, int, int, off64_t); \
        int error = flags & MAP_ANONYMOUS ? 0 : fails_fd("mmap", fd, HERE); \
        if (error) { errno = error; return MAP_FAILED; } \
        return real(at, size, protect, flags, fd, where); \
    }
MMAP(mmap)
MMAP(mmap64)
