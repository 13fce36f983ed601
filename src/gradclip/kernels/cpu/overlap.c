/* Leaves that share memory, found by sorting them by their addresses. */
#include <stdlib.h>
#include <string.h>

#include "layout.h"

/* A leaf, small: to visit the leaves themselves in another order than they are in takes long. */
typedef struct {
    uint64_t address;
    uint32_t leaf;
    uint32_t bytes; /* from the first to the last; MANY: ask the leaf */
} place_t;

static const uint32_t MANY = UINT32_MAX;

/* Sort what is nearly in order, as memory that was taken in one go is. Returns 0 if it is not;
 * what has the same address stays in its order in any case. */
static int sort_by_insertion(place_t *places, int64_t count) {
    int64_t moves = count / 8 + 512;
    for (int64_t i = 1; i < count; i++) {
        place_t place = places[i];
        int64_t at = i;
        for (; at && places[at - 1].address > place.address && moves; at--, moves--)
            places[at] = places[at - 1];
        places[at] = place;
    }
    return moves > 0;
}

/* Sort by some bits after the other, the lowest first; returns where the result is. */
static place_t *sort_by_digits(place_t *places, place_t *spare, int64_t count) {
    enum { MOST_BITS = 11 };
    int bits = count < 1024 ? 8 : MOST_BITS;
    uint64_t differ = 0, mask = ((uint64_t)1 << bits) - 1;
    for (int64_t i = 1; i < count; i++) differ |= places[i].address ^ places[0].address;
    for (int shift = __builtin_ctzll(differ); shift < 64 && differ >> shift; shift += bits) {
        int64_t begin[(1 << MOST_BITS) + 1];
        memset(begin, 0, (mask + 2) * sizeof *begin);
        for (int64_t i = 0; i < count; i++) begin[(places[i].address >> shift & mask) + 1]++;
        for (uint64_t digit = 1; digit <= mask; digit++) begin[digit] += begin[digit - 1];
        for (int64_t i = 0; i < count; i++)
            spare[begin[places[i].address >> shift & mask]++] = places[i];
        place_t *sorted = spare;
        spare = places;
        places = sorted;
    }
    return places;
}

static int same_memory(const leaf_t *a, const leaf_t *b) {
    if (a->data != b->data || a->kind != b->kind || a->size != b->size || a->swap != b->swap ||
        a->ndim != b->ndim)
        return 0;
    size_t bytes = (size_t)a->ndim * sizeof(int64_t);
    return !bytes || (!memcmp(a->shape, b->shape, bytes) && !memcmp(a->strides, b->strides, bytes));
}

/* From the first byte of a leaf to behind the last. */
static uint64_t extent(const leaf_t *leaf) {
    int64_t item = item_size(leaf->kind), bytes = leaf->ndim ? item : leaf->size * item;
    for (int d = 0; d < leaf->ndim; d++) bytes += (leaf->shape[d] - 1) * leaf->strides[d];
    return (uint64_t)bytes;
}


/* As drop_repeats, of leaves in the order of their addresses. */
static int drop_sorted(leaf_t *leaves, const place_t *places, int64_t count) {
    const place_t *first = places; /* of those at one address */
    uint64_t end = 0;
    int crowded = 0;
    for (const place_t *place = places; place < places + count; place++) {
        if (place->address != first->address) {
            first = place;
        } else if (place != first && same_memory(&leaves[first->leaf], &leaves[place->leaf])) {
            leaves[place->leaf].size = 0;
            continue;
        }
        crowded |= place->address < end;
        uint64_t bytes = place->bytes == MANY ? extent(&leaves[place->leaf]) : place->bytes;
        end = place->address + bytes; /* the furthest yet, where none are crowded */
    }
    return crowded;
}

int drop_repeats(leaf_t *leaves, int64_t count) {
    place_t *places = malloc(2 * ((size_t)count + 1) * sizeof *places), *sorted = places;
    if (!places) return -1;
    int64_t filled = 0;
    for (int64_t i = 0; i < count; i++) {
        if (!leaves[i].size) continue;
        uint64_t bytes = extent(&leaves[i]);
        places[filled++] = (place_t){(uintptr_t)leaves[i].data, (uint32_t)i,
                                     bytes < MANY ? (uint32_t)bytes : MANY};
    }
    if (!sort_by_insertion(places, filled))
        sorted = sort_by_digits(places, places + filled, filled);
    int crowded = drop_sorted(leaves, sorted, filled);
    free(places);
    return crowded;
}
