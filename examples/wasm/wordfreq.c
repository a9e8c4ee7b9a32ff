/* wordfreq [-n N] [FILE...]: the N words that occur most often in the files, or in standard input.
 *
 * A plain C program, and as such a WASI command: it reads its arguments, standard input and files of its working
 * directory, and ends with 0, or with 1 when a file cannot be read. */
#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct word {
    char *text;
    long count;
    struct word *next;
};

#define BUCKETS 4096
static struct word *table[BUCKETS];
static size_t words;

static void count(const char *text) {
    unsigned hash = 5381;
    for (const char *at = text; *at; at++)
        hash = hash * 33 + (unsigned char)*at;
    struct word **place = &table[hash % BUCKETS];
    for (; *place; place = &(*place)->next)
        if (!strcmp((*place)->text, text)) {
            (*place)->count++;
            return;
        }
    struct word *made = malloc(sizeof *made);
    if (!made || !(made->text = strdup(text))) {
        fputs("wordfreq: out of memory\n", stderr);
        exit(2);
    }
    made->count = 1;
    made->next = NULL;
    *place = made;
    words++;
}

static void count_all(FILE *file) {
    char text[256];
    size_t length = 0;
    for (int c; (c = getc(file)) != EOF;) {
        if (isalnum(c) && length < sizeof text - 1) {
            text[length++] = (char)tolower(c);
        } else if (!isalnum(c) && length) {
            text[length] = 0;
            count(text);
            length = 0;
        }
    }
    if (length) {
        text[length] = 0;
        count(text);
    }
}

static int by_count(const void *a, const void *b) {
    const struct word *left = *(struct word *const *)a, *right = *(struct word *const *)b;
    if (left->count != right->count)
        return left->count < right->count ? 1 : -1;
    return strcmp(left->text, right->text);
}

int main(int argc, char **argv) {
    size_t most = 10;
    int first = 1, failed = 0;
    if (argc > 2 && !strcmp(argv[1], "-n")) {
        most = strtoul(argv[2], NULL, 10);
        first = 3;
    }
    if (first == argc)
        count_all(stdin);
    for (int i = first; i < argc; i++) {
        FILE *file = fopen(argv[i], "r");
        if (!file) {
            fprintf(stderr, "wordfreq: cannot read %s\n", argv[i]);
            failed = 1;
            continue;
        }
        count_all(file);
        fclose(file);
    }
    struct word **sorted = malloc((words ? words : 1) * sizeof *sorted), **end = sorted;
    if (!sorted)
        return 2;
    for (size_t i = 0; i < BUCKETS; i++)
        for (struct word *each = table[i]; each; each = each->next)
            *end++ = each;
    qsort(sorted, words, sizeof *sorted, by_count);
    for (size_t i = 0; i < words && i < most; i++)
        printf("%ld %s\n", sorted[i]->count, sorted[i]->text);
    return failed;
}
