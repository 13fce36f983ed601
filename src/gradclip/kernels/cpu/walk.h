/* How a thread goes through a list: blocks of what it takes, contiguous and native. */
#ifndef GRADCLIP_WALK_H
#define GRADCLIP_WALK_H

#include "cpu.h"
#include "targets.h"

enum { BLOCK = 4096, BLOCK_F64 = 2048 };

/* Room for a block. */
typedef union {
    ALIGNED double wide[BLOCK_F64];
    float narrow[BLOCK];
} room_t;

/* Where a thread stands: it takes a chunk of the list's elements, then block after block in it,
 * none across two leaves. */
typedef struct {
    int64_t at, end;     /* elements of the list: the next one, and the end of the chunk */
    int64_t leaf;
    int64_t begin;       /* the block: its first element within the leaf, and its length */
    int length;
    int new_chunk;
} walk_t;

/* Take the next chunk that no thread has taken; 0 if there is none. */
int next_chunk(list_t *list, walk_t *walk);

/* Go on to the next block; 0 if there is none left that no thread has taken. To be inlined: a list
 * may be of thousands of leaves of a few numbers. */
static inline int next_block(list_t *list, walk_t *walk) {
    walk->new_chunk = walk->at >= walk->end;
    if (walk->new_chunk && !next_chunk(list, walk)) return 0;
    const leaf_t *leaf = &list->leaves[walk->leaf];
    while (walk->at - leaf->first >= leaf->size) leaf = &list->leaves[++walk->leaf];
    walk->begin = walk->at - leaf->first;
    int64_t length = leaf->size - walk->begin;
    int64_t most = leaf->kind == F64 ? BLOCK_F64 : BLOCK;
    if (length > walk->end - walk->at) length = walk->end - walk->at;
    if (length > most) length = most;
    walk->length = (int)length;
    walk->at += length;
    /* The processor reads ahead within an array, not on to the next: that is asked for here. */
    if (length == leaf->size - walk->begin && walk->leaf + 1 < list->count)
        for (int line = 0; line < 8; line++) __builtin_prefetch(leaf[1].data + 64 * line);
    return 1;
}

/* Read a block of a strided leaf, or write one. */
void load(const leaf_t *leaf, int64_t begin, int length, void *room);
void store(const leaf_t *leaf, int64_t begin, int length, void *room);

/* A block's elements, contiguous and native: where they lie, or a copy in `room`. */
static inline const void *fetch(const leaf_t *leaf, int64_t begin, int length, void *room) {
    if (!leaf->ndim) return leaf->data + begin * item_size(leaf->kind);
    load(leaf, begin, length, room);
    return room;
}

/* The elements of another kind than float32 as such, in `out`. */
const float *widen(const leaf_t *leaf, const void *x, int length, float *out);

/* As fetch, but as float32, which holds every kind of 32 bits or fewer exactly. */
static inline const float *fetch_f32(const leaf_t *leaf, int64_t begin, int length, void *room,
                                     float *out) {
    const void *x = fetch(leaf, begin, length, room);
    return leaf->kind == F32 ? x : widen(leaf, x, length, out);
}

#endif
