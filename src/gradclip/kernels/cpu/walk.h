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

/* Go on to the next block; 0 if there is none left that nobody has taken. */
int next_block(list_t *list, walk_t *walk);

/* A block's elements, contiguous and native: where they lie, or a copy in `room`. */
const void *fetch(const leaf_t *leaf, int64_t begin, int length, void *room);

/* The same as float32, which holds every kind of 32 bits or fewer exactly. */
const float *fetch_f32(const leaf_t *leaf, int64_t begin, int length, void *room, float *out);

/* Write a block to a strided leaf. */
void store(const leaf_t *leaf, int64_t begin, int length, void *room);

#endif
