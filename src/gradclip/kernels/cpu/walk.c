#include "walk.h"

#include <string.h>

/* ---- lists ---- */

int list_leaves(list_t *list, leaf_t *leaves, int64_t count) {
    *list = (list_t){.leaves = leaves, .count = count};
    for (int64_t i = 0; i < count; i++) {
        list->has_f64 |= leaves[i].kind == F64;
        leaves[i].first = list->size;
        if (__builtin_add_overflow(list->size, leaves[i].size, &list->size)) return -1;
    }
    return 0;
}

uint64_t bytes_of(const list_t *list) {
    uint64_t bytes = 0;
    for (int64_t i = 0; i < list->count; i++)
        bytes += (uint64_t)list->leaves[i].size * (uint64_t)item_size(list->leaves[i].kind);
    return bytes;
}

/* ---- chunks ---- */

static int64_t leaf_holding(const list_t *list, int64_t element) {
    int64_t low = 0, high = list->count;
    while (high - low > 1) {
        int64_t middle = low + (high - low) / 2;
        if (list->leaves[middle].first <= element)
            low = middle;
        else
            high = middle;
    }
    return low;
}

int next_chunk(list_t *list, walk_t *walk) {
    int64_t chunk = atomic_fetch_add(&list->cursor, 1);
    walk->at = chunk * CHUNK;
    if (walk->at >= list->size) return 0;
    walk->end = list->size - walk->at < CHUNK ? list->size : walk->at + CHUNK;
    walk->leaf = leaf_holding(list, walk->at);
    return 1;
}

/* ---- elements ---- */

/* Copy elements between a contiguous block and their places in a strided leaf. */
static void move_strided(const leaf_t *leaf, int64_t begin, int64_t length, void *room,
                         int into_leaf) {
    enum { MAX_NDIM = 66 };
    char *block = room;
    int64_t size = item_size(leaf->kind), index[MAX_NDIM];
    int last = leaf->ndim - 1;
    char *at = leaf->data;
    for (int d = last; d >= 0; d--) {
        index[d] = begin % leaf->shape[d];
        begin /= leaf->shape[d];
        at += index[d] * leaf->strides[d];
    }
    for (int64_t i = 0; i < length; i++) {
        char item[8];
        const char *from = into_leaf ? block : at;
        char *to = into_leaf ? at : block;
        for (int64_t b = 0; b < size; b++) item[b] = from[leaf->swap ? size - 1 - b : b];
        memcpy(to, item, (size_t)size);
        block += size;
        at += leaf->strides[last];
        index[last]++;
        for (int d = last; d > 0 && index[d] == leaf->shape[d]; d--) {
            at += leaf->strides[d - 1] - index[d] * leaf->strides[d];
            index[d] = 0;
            index[d - 1]++;
        }
    }
}

void load(const leaf_t *leaf, int64_t begin, int length, void *room) {
    move_strided(leaf, begin, length, room, 0);
}

void store(const leaf_t *leaf, int64_t begin, int length, void *room) {
    move_strided(leaf, begin, length, room, 1);
}

const float *widen(const leaf_t *leaf, const void *x, int length, float *out) {
    if (leaf->kind == F16)
        blocks->load_f16(x, length, out);
    else if (leaf->kind == BF16)
        blocks->load_bf16(x, length, out);
    else
        for (int i = 0; i < length; i++) out[i] = leaf->decode[((const uint8_t *)x)[i]];
    return out;
}
