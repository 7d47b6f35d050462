/* Edge coverage for engine.py. Modules built with -fsanitize-coverage=trace-pc call the function below at every branch;
 * an edge is the pair of two places in a row, as in AFL. Preloaded, so that Python and the modules see one map.
 *
 *   cc -O2 -shared -fPIC -o libcoverage.so coverage.c
 */

#include <stdint.h>
#include <string.h>

#define SIZE 65536

static unsigned char now[SIZE];
static unsigned char seen[SIZE];
static uintptr_t before;

void __sanitizer_cov_trace_pc(void)
{
    uintptr_t here = (uintptr_t)__builtin_return_address(0);
    unsigned place = (unsigned)(here * 0x9E3779B97F4A7C15ull >> 48);
    unsigned char *count = &now[(place ^ (unsigned)before) % SIZE];
    if (*count < 255)
        ++*count;
    before = place >> 1;
}

void coverage_begin(void)
{
    memset(now, 0, SIZE);
    before = 0;
}

/* How many edges since coverage_begin were never taken before, or never so often (1, 2, 3, 4-7, 8-15, 16-31, 32-127,
 * 128 and more). */
int coverage_new(void)
{
    int fresh = 0;
    for (int i = 0; i < SIZE; ++i) {
        unsigned char n = now[i];
        unsigned char kind;
        if (!n)
            continue;
        kind = n == 1 ? 1 : n == 2 ? 2 : n == 3 ? 4 : n < 8 ? 8 : n < 16 ? 16 : n < 32 ? 32 : n < 128 ? 64 : 128;
        if (!(seen[i] & kind)) {
            seen[i] |= kind;
            ++fresh;
        }
    }
    return fresh;
}

void coverage_forget(void)
{
    memset(seen, 0, SIZE);
}

int coverage_edges(void)
{
    int edges = 0;
    for (int i = 0; i < SIZE; ++i)
        edges += seen[i] != 0;
    return edges;
}
