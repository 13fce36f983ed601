#include "party.h"

#include <Python.h>
#include <stdlib.h>

#include "ieee.h"

enum { CLOSED = 1 << 30 };
enum { TURNS = 2000 }; /* of waiting awake: some chunks are at an end by then */

/* It lives until the last that holds it has let go, which may be after its caller has left. */
struct party {
    share_t *walk;
    void *job;
    _Atomic int shares;     /* that have been begun */
    _Atomic int inside;     /* threads beside the caller that walk; CLOSED is added at the end */
    _Atomic int holders;
    PyThread_type_lock end; /* released by the last of those inside, if it is closed by then */
};

void take_share(share_t *walk, void *job, _Atomic int *shares) {
    fenv_t saved;
    set_ieee(&saved);
    walk(job, atomic_fetch_add(shares, 1));
    fesetenv(&saved);
}

party_t *new_party(share_t *walk, void *job) {
    party_t *party = malloc(sizeof *party);
    PyThread_type_lock end = party ? PyThread_allocate_lock() : NULL;
    if (!end) {
        free(party);
        return NULL;
    }
    PyThread_acquire_lock(end, WAIT_LOCK);
    *party = (party_t){walk, job, 0, 0, 1, end};
    return party;
}

void hold_party(party_t *party) { atomic_fetch_add(&party->holders, 1); }

void let_go_of_party(party_t *party) {
    if (atomic_fetch_sub(&party->holders, 1) > 1) return;
    PyThread_free_lock(party->end);
    free(party);
}

static int go_inside(party_t *party) {
    int inside = atomic_load(&party->inside);
    while (!(inside & CLOSED))
        if (atomic_compare_exchange_weak(&party->inside, &inside, inside + 1)) return 1;
    return 0;
}

void join_party(void *data) {
    party_t *party = data;
    if (go_inside(party)) {
        take_share(party->walk, party->job, &party->shares);
        if (atomic_fetch_sub(&party->inside, 1) == (CLOSED | 1)) PyThread_release_lock(party->end);
    }
    let_go_of_party(party);
}

int finish_party(party_t *party) {
    take_share(party->walk, party->job, &party->shares);
    int inside = atomic_fetch_or(&party->inside, CLOSED) | CLOSED;
    for (int turn = 0; inside != CLOSED && turn < TURNS; turn++) {
        pause_awake();
        inside = atomic_load(&party->inside);
    }
    /* One that has lost its processor meanwhile may need this one to go on. */
    if (inside != CLOSED) PyThread_acquire_lock(party->end, WAIT_LOCK);
    int shares = atomic_load(&party->shares);
    let_go_of_party(party);
    return shares;
}
