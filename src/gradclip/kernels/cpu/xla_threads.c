/* Walks on XLA's threads. */
#include "xla_threads.h"

/* Handing work to a thread that sleeps takes as long as one needs to read so much. */
enum { BYTES_PER_THREAD = 1 << 21 };

static void forget(const frame_t *frame, void *error) {
    destroy_args_t destroy = {sizeof destroy, NULL, error};
    frame->api->destroy_error(&destroy);
}

int threads_worth(const frame_t *frame, uint64_t bytes) {
    int64_t threads = 1, worth = (int64_t)(bytes / BYTES_PER_THREAD);
    threads_args_t args = {sizeof args, NULL, frame->context, &threads};
    void *failed = frame->api->count_threads(&args);
    if (failed) {
        forget(frame, failed);
        return 1;
    }
    if (threads > worth) threads = worth;
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    return threads > 1 ? (int)threads : 1;
}

int walk_on_xla(const frame_t *frame, share_t *walk, void *job, int threads) {
    if (threads < 2) {
        walk(job, 0);
        return 1;
    }
    party_t *party = new_party(walk, job);
    if (!party) return -1;
    for (int i = 1; i < threads; i++) {
        schedule_args_t args = {sizeof args, NULL, frame->context, join_party, party};
        hold_party(party);
        void *failed = frame->api->schedule(&args);
        if (failed) { /* nobody will come: this thread does all the work */
            forget(frame, failed);
            let_go_of_party(party);
        }
    }
    return finish_party(party);
}
