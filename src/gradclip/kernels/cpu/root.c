/* The root of an exact sum. */
#include <string.h>

#include "cpu.h"

enum { MOST_WORDS = 160 };

static int bit_at(const int64_t *words, int64_t place) {
    return (int)(words[place >> 5] >> (place & 31) & 1);
}

static int any_below(const int64_t *words, int64_t place) {
    for (int64_t j = 0; j < place >> 5; j++)
        if (words[j]) return 1;
    return (words[place >> 5] & (((int64_t)1 << (place & 31)) - 1)) != 0;
}

/* Where the highest bit is, counted from 1; 0 if there is none. */
static int64_t length_of(const int64_t *words, int count) {
    int64_t length = 32 * count;
    while (length && !bit_at(words, length - 1)) length--;
    return length;
}

/* The root of the bits from `first` on, of which there are less than `length`, rounded down: digit
 * by digit, two bits at a time. The rest is at most twice the root, of 54 bits. */
static uint64_t root_down(const int64_t *words, int64_t first, int64_t length, uint64_t *rest) {
    uint64_t root = 0;
    int64_t place = first + (length > first ? (length - first) / 2 * 2 : 0);
    *rest = 0;
    for (; place >= first; place -= 2) {
        *rest = *rest << 2 | (uint64_t)(bit_at(words, place + 1) << 1 | bit_at(words, place));
        uint64_t trial = root << 2 | 1;
        root <<= 1;
        if (*rest >= trial) {
            *rest -= trial;
            root |= 1;
        }
    }
    return root;
}

/* places * 2^last, of 53 bits. */
static void put(uint64_t places, int64_t last, int64_t root[2]) {
    while (places && places < (uint64_t)1 << 52) {
        places <<= 1;
        last--;
    }
    while (places >> 53) { /* a carry out of 53 bits: the last is 0 */
        places >>= 1;
        last++;
    }
    root[0] = (int64_t)places;
    root[1] = places ? last : 0;
}

void exact_root(const int64_t *words, int count, int precision, int lowest, int64_t root[2]) {
    int64_t sum[MOST_WORDS + 1] = {0};
    memcpy(sum, words, (size_t)count * sizeof *sum);
    carry(sum, count + 1);
    int64_t length = length_of(sum, count + 1);
    root[0] = root[1] = 0;
    if (!length) return;
    int64_t last = (length + 1) / 2 + WIDE_UNIT / 2 - precision;
    if (last < lowest) last = lowest;
    /* In halves of the last place, whose square is bit `first`. */
    int64_t first = 2 * (last - 1) - WIDE_UNIT;
    uint64_t rest, halves = root_down(sum, first, length, &rest);
    int inexact = rest != 0 || any_below(sum, first);
    uint64_t places = halves >> 1;
    put(places + (halves & 1 && (inexact || places & 1)), last, root);
}
