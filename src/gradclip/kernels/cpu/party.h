/* A walk that other threads may join until its caller has come to the end. Nobody waits for a thread
 * that has not begun: on a busy machine it may not get a processor for a long time. */
#ifndef GRADCLIP_PARTY_H
#define GRADCLIP_PARTY_H

#include "cpu.h"

enum { MOST_THREADS = 64 };

/* Begin the next share of a walk, by the arithmetic of IEEE. */
void take_share(share_t *walk, void *job, _Atomic int *shares);

typedef struct party party_t;

/* NULL if memory runs out. */
party_t *new_party(share_t *walk, void *job);

/* Hold it for a thread that is asked to join; let go where none could be asked. */
void hold_party(party_t *party);
void let_go_of_party(party_t *party);

/* What a thread does that was asked: a share, if there may be one left to begin; then it lets go. */
void join_party(void *party);

/* What the caller does: a share, then it waits for those that have begun one, and lets go. Returns
 * how many shares there were: at most one for each thread that was asked, and its own. */
int finish_party(party_t *party);

/* Wait awake, for a moment. */
static inline void pause_awake(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

#endif
