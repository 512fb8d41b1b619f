/* The division of the work among threads.
 *
 * It goes to the threads that torch itself computes with, where its OpenMP runtime is known (prm_use_pool): they are
 * awake, and while they wait for work they would keep others from the processor. Elsewhere, and in a forked child, which
 * has none of its parent's threads, threads are started for the call and joined before it returns: some 10 microseconds
 * each where a step takes milliseconds.
 */
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>

/* Fewer scalars than this are not worth a thread. */
#define WORTH_A_THREAD 32768

typedef struct {
    const job *job;
    void (*pass)(const job *, int64_t index, int64_t begin, int64_t end);
    int64_t begin, end; /* scalars, in the common order of all tensors */
} share;

/* Move a place in the common order to the start of its block, or of its tensor where that is small. */
static int64_t meeting_point(const job *job, int64_t index, int64_t place) {
    int64_t start = job->before[index], n = job->before[index + 1] - start;
    if (place <= start || place >= start + n)
        return place;
    return n <= job->undivided ? start : start + (place - start) / BLOCK * BLOCK;
}

static void run_share(const share *mine) {
    const job *job = mine->job;
    for (int64_t i = 0; i < job->count; i++) {
        int64_t start = job->before[i], stop = job->before[i + 1];
        if (stop <= mine->begin)
            continue;
        if (start >= mine->end)
            break;
        int64_t begin = meeting_point(job, i, mine->begin), end = meeting_point(job, i, mine->end);
        begin = begin > start ? begin : start;
        end = smaller(end, stop);
        if (begin < end)
            mine->pass(job, i, begin - start, end - start);
    }
}

#define MOST_THREADS 256
/* More shares than threads: where another program takes a processor for a while, the other threads take over. */
#define SHARES_OF_A_THREAD 4
#define MOST_SHARES (MOST_THREADS * SHARES_OF_A_THREAD)

/* The shares of a pass; each thread takes the next one until none is left, so fewer threads than shares will do. */
typedef struct {
    share shares[MOST_SHARES];
    int count;
    atomic_int next;
} shares;

static void run_shares(void *argument) {
    shares *all = argument;
    for (int k = atomic_fetch_add(&all->next, 1); k < all->count; k = atomic_fetch_add(&all->next, 1))
        run_share(&all->shares[k]);
}

static void *run_shares_in_thread(void *argument) {
    run_shares(argument);
    return NULL;
}

/* GOMP_parallel of the OpenMP runtime that torch uses, or NULL. */
typedef void parallel_function(void (*function)(void *), void *data, unsigned threads, unsigned flags);
static parallel_function *pool;

static int worthwhile_threads(int64_t total, int threads) {
    threads = (int)smaller(smaller(threads, MOST_THREADS), total / WORTH_A_THREAD);
    return threads < 1 ? 1 : threads;
}

/* Run a pass over the tensors from `from` to before `to`. */
static void run(const job *job, int threads, int64_t from, int64_t to,
                void (*pass)(const struct job *, int64_t, int64_t, int64_t)) {
    shares all;
    int64_t first = job->before[from], total = job->before[to] - first;
    all.count = threads == 1 ? 1 : threads * SHARES_OF_A_THREAD;
    atomic_init(&all.next, 0);
    for (int k = 0; k < all.count; k++) {
        all.shares[k].job = job;
        all.shares[k].pass = pass;
        all.shares[k].begin = first + (int64_t)((double)total * k / all.count);
        all.shares[k].end = first + (k + 1 == all.count ? total : (int64_t)((double)total * (k + 1) / all.count));
    }
    if (threads > 1 && pool) {
        pool(run_shares, &all, (unsigned)threads, 0);
        return;
    }
    pthread_t started[MOST_THREADS];
    int count = 0;
    while (count < threads - 1 && pthread_create(&started[count], NULL, run_shares_in_thread, &all) == 0)
        count++; /* where the system gives fewer threads, the others take their shares */
    run_shares(&all);
    for (int k = 0; k < count; k++)
        pthread_join(started[k], NULL);
}
