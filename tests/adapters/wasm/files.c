/* Tries the file calls of WASI preview 1 and says what came of each. The test runs it twice, with clawnet's own calls
 * and with those of the engine, and the two must say the same.
 *
 *   clang --target=wasm32-wasi -Oz -Wall -Wl,--strip-all -o files.wasm files.c
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static void say(const char *what, long result) {
    printf("%-28s %ld %s\n", what, result, result < 0 ? strerror(errno) : "");
}

static int by_name(const struct dirent **a, const struct dirent **b) { return strcmp((*a)->d_name, (*b)->d_name); }

static void list(const char *path) {
    struct dirent **found;
    int count = scandir(path, &found, NULL, by_name);
    printf("%s has %d:", path, count);
    for (int i = 0; i < count; i++)
        printf(" %s/%d", found[i]->d_name, found[i]->d_type);
    printf("\n");
}

static void show(const char *path) {
    char text[256];
    int fd = open(path, O_RDONLY);
    say(path, fd < 0 ? -1 : 0);
    if (fd < 0)
        return;
    ssize_t size = read(fd, text, sizeof text - 1);
    if (size >= 0) {
        text[size] = 0;
        printf("    [%s]\n", text);
    } else
        say("    read", size);
    close(fd);
}

int main(int argc, char **argv) {
    struct stat info;
    char text[64];
    printf("%d arguments, last [%s], HOME=%s COLOUR=%s\n", argc, argv[argc - 1], getenv("HOME"), getenv("COLOUR"));
    list(".");
    list("tree");
    show("tree/inner.txt");
    show("tree/link.txt");
    show("tree/none.txt");
    show("tree/");
    show("note.txt/");
    show("../etc/passwd");
    show("tree/../../etc/passwd");
    show("/note.txt");
    show("./tree/../note.txt");
    say("open directory to write", open("tree", O_WRONLY));
    say("open absent", open("absent", O_RDWR));
    say("open not a directory", open("note.txt", O_RDONLY | O_DIRECTORY));
    say("make exclusively over", open("note.txt", O_RDWR | O_CREAT | O_EXCL, 0600));

    int fd = open("made.txt", O_RDWR | O_CREAT | O_EXCL, 0600);
    say("make", fd < 0 ? -1 : 0);
    say("write", write(fd, "0123456789", 10));
    say("seek", lseek(fd, -4, SEEK_END));
    say("write", write(fd, "abcdefgh", 8));
    say("seek set", lseek(fd, 2, SEEK_SET));
    say("read", read(fd, text, 5));
    printf("    [%.5s]\n", text);
    say("seek before", lseek(fd, -1, SEEK_SET));
    say("pwrite beyond", pwrite(fd, "!", 1, 20));
    say("pread", pread(fd, text, 10, 12));
    say("stat", fstat(fd, &info));
    printf("    size %lld, regular %d\n", (long long)info.st_size, S_ISREG(info.st_mode));
    say("truncate", ftruncate(fd, 4));
    say("lengthen", ftruncate(fd, 6));
    say("seek end", lseek(fd, 0, SEEK_END));
    say("close", close(fd));
    say("close again", close(fd));
    fd = open("made.txt", O_WRONLY | O_APPEND);
    say("append", write(fd, "end", 3));
    say("read what is write only", read(fd, text, 1));
    close(fd);
    fd = open("made.txt", O_RDONLY);
    say("write what is read only", write(fd, "x", 1));
    say("stat", fstat(fd, &info));
    printf("    size %lld\n", (long long)info.st_size);
    say("unlink while open", unlink("made.txt"));
    say("read what is gone", read(fd, text, 4));
    close(fd);
    show("made.txt");

    fd = open("note.txt", O_RDWR);
    say("change an input", write(fd, "NOTE", 4));
    close(fd);
    show("note.txt");
    fd = open("tree/inner.txt", O_WRONLY | O_TRUNC);
    say("write anew", write(fd, "new", 3));
    close(fd);
    show("tree/inner.txt");

    say("mkdir", mkdir("a", 0700));
    say("mkdir again", mkdir("a", 0700));
    say("mkdir below", mkdir("a/b", 0700));
    say("mkdir nowhere", mkdir("x/y", 0700));
    say("rmdir full", rmdir("a"));
    say("rmdir file", rmdir("note.txt"));
    say("unlink directory", unlink("a"));
    say("rename directory", rename("a/b", "a/c"));
    say("rename into itself", rename("a", "a/c/d"));
    say("rename file over directory", rename("note.txt", "a"));
    say("rename absent", rename("absent", "b"));
    say("rename file", rename("note.txt", "a/note.txt"));
    list(".");
    list("a");
    say("hard link", link("a/note.txt", "again.txt"));
    show("again.txt");
    say("symlink", symlink("a/note.txt", "soft.txt"));
    show("soft.txt");
    memset(text, 0, sizeof text);
    say("readlink", readlink("soft.txt", text, sizeof text - 1));
    printf("    [%s]\n", text);
    say("readlink of a file", readlink("again.txt", text, sizeof text));
    say("lstat", lstat("soft.txt", &info));
    printf("    link %d\n", S_ISLNK(info.st_mode));
    say("stat through", stat("soft.txt", &info));
    printf("    regular %d size %lld\n", S_ISREG(info.st_mode), (long long)info.st_size);
    say("symlink loop", symlink("loop", "loop"));
    say("open loop", open("loop", O_RDONLY));
    say("symlink out", symlink("../../../etc/passwd", "out"));
    say("open out", open("out", O_RDONLY));
    say("open absolute", (symlink("/etc/passwd", "abs"), open("abs", O_RDONLY)));

    DIR *directory = opendir("a");
    int seen = 0;
    for (struct dirent *entry; (entry = readdir(directory));)
        seen++;
    rewinddir(directory);
    for (struct dirent *entry; (entry = readdir(directory));)
        seen++;
    say("entries, twice", seen);
    closedir(directory);
    for (int i = 0; i < 300; i++) {
        snprintf(text, sizeof text, "a/c/file-number-%d-with-a-long-name", i);
        close(open(text, O_WRONLY | O_CREAT, 0600));
    }
    directory = opendir("a/c");
    seen = 0;
    for (struct dirent *entry; (entry = readdir(directory));)
        if (entry->d_name[0] != '.') {
            snprintf(text, sizeof text, "a/c/%s", entry->d_name);
            seen += !unlink(text);
        }
    closedir(directory);
    say("removed while listing", seen);
    list("a/c");

    struct timespec before, after, rest = {0, 2000000};
    say("clock", clock_gettime(CLOCK_MONOTONIC, &before));
    say("sleep", nanosleep(&rest, NULL));
    clock_gettime(CLOCK_MONOTONIC, &after);
    say("time went on by the sleep",
        (after.tv_sec - before.tv_sec) * 1000000000L + after.tv_nsec - before.tv_nsec >= 2000000L);
    struct pollfd poll_in = {.fd = 1, .events = POLLOUT};
    say("poll", poll(&poll_in, 1, 1000));
    say("entropy", getentropy(text, sizeof text));
    say("stdout is a terminal", isatty(1));
    errno = 0;
    fprintf(stderr, "done\n");
    return 7;
}
