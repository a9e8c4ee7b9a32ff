/* Writes files until there is no room, makes room, and writes again.
 *
 *   clang --target=wasm32-wasi -Oz -Wall -Wl,--strip-all -o fills.wasm fills.c
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static char megabyte[1 << 20];

static int fill(const char *name) {
    int fd = open(name, O_WRONLY | O_CREAT | O_TRUNC, 0600), done = 0;
    while (write(fd, megabyte, sizeof megabyte) == sizeof megabyte)
        done++;
    close(fd);
    return done;
}

int main(void) {
    int done = fill("one");
    printf("full after %d MiB: %s\n", done, strerror(errno));
    for (int i = 0; i < 5; i++) {
        int fd = open("one", O_RDONLY);
        link("one", "two");
        unlink("one");
        unlink("two"); /* still open: its room is taken until it is closed */
        if (fill("three"))
            printf("there was room where there is none\n");
        unlink("three");
        close(fd);
        if (fill("one") != done)
            printf("not all the room came back\n");
    }
    printf("full again after %d MiB\n", fill("one"));
    return 0;
}
