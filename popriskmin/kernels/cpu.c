/* One step of PRM over a list of tensors on the CPU, in one pass over memory.
 *
 * A plain shared library: it knows neither Python nor torch, and gets addresses, sizes and types from cpu.py, which has
 * checked them. prm_step is its one entry. The arithmetic is in cpu_step.h; here are the numbers that depend on the step
 * count, the conversions of the narrow types, and the division of the work among threads.
 *
 * The work goes to the threads that torch itself computes with, where its OpenMP runtime is known (prm_use_pool): they
 * are awake, and while they wait for work they would keep others from the processor. Elsewhere, and in a forked child,
 * which has none of its parent's threads, threads are started for the call and joined before it returns: some 10
 * microseconds each where a step takes milliseconds.
 */
#include <float.h>
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* What takes its options as constants must be inlined, or the options become branches in the loop. */
#define INLINE static inline __attribute__((always_inline))

/* To be raised, here and in cpu.py, whenever a structure or a meaning below changes. */
#define ABI 4

#define TYPE_FLOAT32 0
#define TYPE_FLOAT64 1
#define TYPE_BFLOAT16 2
#define TYPE_FLOAT16 3

#define MASK_NONE 0
#define MASK_SNR 1
#define MASK_SOFT 2
#define MASK_HARD 3

#define ADVANCE 1
#define MOVE 2

/* Scalars that are converted and computed at a time: their buffers stay in the first cache. */
#define CHUNK 1024
/* Scalars of which the next ones are asked from memory while these are computed. The processor's own prefetching falls
 * behind on five arrays at a time; twice as many, or half, were slower. */
#define AHEAD 128
/* Threads meet at multiples of this many scalars, and means over large tensors are taken from sums over so many. */
#define BLOCK 16384
/* A tensor of at most so many scalars, or of a 16th of a thread's share, is not divided among threads. */
#define SMALL 65536
/* Scalars that are pooled and moved together, some 4 MB of weights and state. */
#define BATCH 262144
/* Fewer scalars than this are not worth a thread. */
#define WORTH_A_THREAD 32768

enum { COLUMN_P, COLUMN_G, COLUMN_M, COLUMN_V, COLUMN_S, COLUMN_MAXIMUM, COLUMN_Z, COLUMN_STEP, COLUMN_N, COLUMNS };

/* The options of a parameter group, as in popriskmin.mask.Hyperparameters. */
typedef struct {
    double lr, beta1, beta2, rho, eps, mask_eps, weight_decay, softness, coefficient, min_q;
    int64_t warmup_steps;
    int32_t mask, pooled, bias_correction, decoupled_weight_decay, maximize, debias, mask_decay, variance_given;
} options;

/* What follows from the options and a step count; see popriskmin.mask.corrections. */
typedef struct {
    double t;
    double sign, coupled_decay, beta1, beta2, one_minus_beta2, rho, blend, inv_centre, given_rho, given_blend;
    double inv_bias1, inv_bias_var, k, coefficient, softness, mask_eps, min_q;
    double keep, masked_decay, step_size, inv_root_bias2, eps;
    int mask, coupled;
    int usual; /* whether neither maximize, nor coupled nor masked decay, makes the loop longer */
    uint32_t key;
} numbers;

typedef struct job job;

typedef struct {
    void (*work)(const job *, int64_t index, int64_t begin, int64_t end, int what, double given, double *sums);
    double (*pooled_mask)(const job *, int64_t index, const double *sums);
} operations;

struct job {
    const int64_t *table; /* COLUMNS columns of `count` addresses and sizes */
    int64_t count;
    int p_type, g_type, m_type, s_type, z_type;
    int pooled;
    int64_t undivided; /* the most scalars that a tensor may have which is not divided among threads */
    const operations *operations;
    numbers *numbers;     /* one entry for every step count in turn */
    int32_t *which;       /* of each tensor: its entry in `numbers` */
    int64_t *before;      /* of each tensor: the scalars before it; count + 1 entries */
    int64_t *first_block; /* of each large tensor: its first entry in `sums` */
    double *sums;         /* of each block of a large tensor: the sums of m^2 and of s */
    double *q;            /* of each large tensor */
};

typedef struct {
    void *p, *m, *v, *s, *maximum;
    const void *g, *z; /* z: the variance of the gradient, or NULL where s comes from the gradients */
    int64_t n;
    int numbers, pooled;
} tensor;

static tensor tensor_of(const job *job, int64_t i) {
    const int64_t *table = job->table, count = job->count;
    tensor t;
    t.p = (void *)(intptr_t)table[COLUMN_P * count + i];
    t.g = (const void *)(intptr_t)table[COLUMN_G * count + i];
    t.m = (void *)(intptr_t)table[COLUMN_M * count + i];
    t.v = (void *)(intptr_t)table[COLUMN_V * count + i];
    t.s = (void *)(intptr_t)table[COLUMN_S * count + i];
    t.maximum = (void *)(intptr_t)table[COLUMN_MAXIMUM * count + i];
    t.z = (const void *)(intptr_t)table[COLUMN_Z * count + i];
    t.n = table[COLUMN_N * count + i];
    t.numbers = job->which[i];
    t.pooled = job->pooled && job->numbers[t.numbers].mask != MASK_NONE;
    return t;
}

/* ---- Narrow types. Without branches, so that compilers turn loops over them into vector code. ---- */

INLINE float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

INLINE uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

INLINE float from_bfloat16(uint16_t x) { return float_of((uint32_t)x << 16); }

INLINE uint16_t to_bfloat16(float x) {
    uint32_t bits = bits_of(x);
    uint32_t nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : nearest);
}

INLINE float from_float16(uint16_t x) {
    uint32_t sign = (uint32_t)(x & 0x8000) << 16, rest = x & 0x7FFF;
    uint32_t normal = (rest << 13) + (112u << 23);
    uint32_t special = (rest << 13) + (224u << 23);
    uint32_t tiny = bits_of((float)(int32_t)rest * 0x1p-24f);
    return float_of(sign | (rest >= 0x7C00 ? special : rest < 0x400 ? tiny : normal));
}

INLINE uint16_t to_float16(float x) {
    uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7FFFFFFF;
    uint32_t normal = (rest - (112u << 23) + 0xFFF + (rest >> 13 & 1)) >> 13;
    /* Adding 1/2 rounds to multiples of 2^-24, the smallest number of this type. */
    uint32_t tiny = bits_of(float_of(rest) + 0.5f) - 0x3F000000;
    uint32_t value = rest < 0x38800000 ? tiny : normal;
    value = rest >= 0x477FF000 ? 0x7C00 : value;
    value = rest > 0x7F800000 ? 0x7E00 : value;
    return (uint16_t)(sign | value);
}

/* The hash and the rounding of popriskmin.rounding. */
INLINE uint32_t hash32(uint32_t x) {
    x = x * 0x9E3779B1u;
    x = (x ^ (x >> 15)) * 0x846CA68Bu;
    return x ^ (x >> 16);
}

/* The sum of any NaN that arithmetic makes and 16 bits could run over into a number; infinities are safe, for the lower
 * half of their bits is 0. */
INLINE float round_stochastically(float x, uint32_t bits16) {
    return float_of((bits_of(x) + (x == x ? bits16 : 0)) & 0xFFFF0000);
}

/* ---- The arithmetic, for each type and instruction set. ---- */

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE void fetch_array(const void *base, int64_t start, int64_t size) {
    const char *from = (const char *)base + start * size;
    for (int64_t i = 0; i < AHEAD * size; i += 64)
        __builtin_prefetch(from + i, 1, 3);
}

/* Ask for the AHEAD scalars from `start` on of the arrays that `what` needs; `size` and `narrow` are bytes a scalar.
 * Inlined always: gcc takes a function that only prefetches for one without effect, and drops its calls. */
INLINE void fetch_ahead(const tensor *t, int64_t start, int64_t size, int64_t narrow, int what) {
    fetch_array(t->m, start, size);
    fetch_array(t->v, start, narrow);
    if (what & MOVE)
        fetch_array(t->p, start, size);
    if (what & ADVANCE) {
        fetch_array(t->g, start, size);
        fetch_array(t->s, start, narrow);
        if (t->z)
            fetch_array(t->z, start, size);
    }
}

#define REAL float
#define REAL_TYPE TYPE_FLOAT32
#define REAL_TINY FLT_MIN
#define REAL_MAX FLT_MAX
#define SQRT sqrtf
#define TARGET
#define DOUBLES 4
#define NAME(x) x##_float_baseline
#include "cpu_step.h"
#undef TARGET
#undef DOUBLES
#undef NAME
#if defined(__x86_64__)
#define AVX2 __attribute__((target("avx2")))
#if defined(__clang__)
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#else
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")))
#endif
#define TARGET AVX2
#define DOUBLES 4
#define NAME(x) x##_float_avx2
#include "cpu_step.h"
#undef TARGET
#undef DOUBLES
#undef NAME
#define TARGET AVX512
#define DOUBLES 8
#define NAME(x) x##_float_avx512
#include "cpu_step.h"
#undef TARGET
#undef DOUBLES
#undef NAME
#endif
#undef REAL
#undef REAL_TYPE
#undef REAL_TINY
#undef REAL_MAX
#undef SQRT

#define REAL double
#define REAL_TYPE TYPE_FLOAT64
#define REAL_TINY DBL_MIN
#define REAL_MAX DBL_MAX
#define SQRT sqrt
#define TARGET
#define DOUBLES 4
#define NAME(x) x##_double_baseline
#include "cpu_step.h"
#undef TARGET
#undef DOUBLES
#undef NAME
#if defined(__x86_64__)
#define TARGET AVX2
#define DOUBLES 4
#define NAME(x) x##_double_avx2
#include "cpu_step.h"
#undef TARGET
#undef DOUBLES
#undef NAME
#define TARGET AVX512
#define DOUBLES 8
#define NAME(x) x##_double_avx512
#include "cpu_step.h"
#undef TARGET
#undef DOUBLES
#undef NAME
#endif

/* ---- The numbers of a step. ---- */

/* Variance of the mean after t steps; see popriskmin.mask.variance_of_mean. */
static double variance_of_mean(double beta1, double t) {
    double one_minus_power = 1 - pow(beta1, t);
    return (1 - beta1) / (1 + beta1) * (2 - one_minus_power) / one_minus_power;
}

static numbers numbers_of(const options *o, double t) {
    numbers x;
    double bias1 = 1, bias2 = 1, bias_var = 1, centre = 1, k = 0, blend = 1 - o->rho, rho = o->rho;
    int open = o->mask == MASK_NONE || t <= (double)o->warmup_steps;
    if (o->bias_correction) {
        bias1 = 1 - pow(o->beta1, t);
        bias2 = 1 - pow(o->beta2, t);
        bias_var = 1 - pow(o->rho, t);
    }
    if (o->debias)
        k = variance_of_mean(o->beta1, t);
    if (o->variance_given) {
        /* The loops leave s alone: it is brought on before them. */
        blend = 0;
        rho = 1;
    } else if (o->debias) {
        double last = t > 1 ? t - 1 : 1;
        bias_var = 1 - pow(o->rho, last);
        centre = 1 - pow(o->beta1, last);
        /* The first step has no deviation from a mean: s stays, and the mask is open. */
        blend = t > 1 ? blend / (1 + variance_of_mean(o->beta1, last)) : 0;
        rho = t > 1 ? rho : 1;
        open = open || t <= 1;
    }
    x.t = t;
    x.sign = o->maximize ? -1 : 1;
    x.coupled_decay = o->decoupled_weight_decay ? 0 : o->weight_decay;
    x.beta1 = o->beta1;
    x.beta2 = o->beta2;
    x.one_minus_beta2 = 1 - o->beta2;
    x.rho = rho;
    x.blend = blend;
    x.given_rho = o->rho;
    x.given_blend = 1 - o->rho;
    x.inv_centre = 1 / centre;
    x.inv_bias1 = 1 / bias1;
    x.inv_bias_var = 1 / bias_var;
    x.k = k;
    x.coefficient = o->coefficient;
    x.softness = o->softness;
    x.mask_eps = o->mask_eps;
    x.min_q = o->min_q;
    double decay = o->decoupled_weight_decay ? o->lr * o->weight_decay : 0;
    x.keep = o->mask_decay ? 1 : 1 - decay;
    x.masked_decay = o->mask_decay ? decay : 0;
    x.step_size = o->lr / bias1;
    x.inv_root_bias2 = 1 / sqrt(bias2);
    x.eps = o->eps;
    x.mask = open ? MASK_NONE : o->mask;
    x.coupled = x.coupled_decay != 0;
    x.usual = !o->maximize && !x.coupled && !o->mask_decay;
    x.key = hash32((uint32_t)(int64_t)t);
    return x;
}

/* ---- The work of one thread: all tensors, from one place in their common order to another. ---- */

static int needs_two_passes(const job *job, const tensor *t) { return t->pooled && t->n > job->undivided; }

/* Bring a stretch of a pooled tensor on. Sums go block by block, whoever adds them up: the number of threads must not
 * change the result. */
static void advance_blocks(const job *job, int64_t i, int64_t begin, int64_t end, double *sums, int64_t stride) {
    for (; begin < end; begin += BLOCK, sums += stride) {
        double block[2] = {0, 0};
        job->operations->work(job, i, begin, smaller(begin + BLOCK, end), ADVANCE, 1, block);
        sums[0] += block[0];
        sums[1] += block[1];
    }
}

static void first_pass(const job *job, int64_t i, int64_t begin, int64_t end) {
    const operations *ops = job->operations;
    const tensor t = tensor_of(job, i);
    if (!t.pooled) {
        ops->work(job, i, begin, end, ADVANCE | MOVE, 1, NULL);
    } else if (!needs_two_passes(job, &t)) {
        double sums[2] = {0, 0};
        advance_blocks(job, i, begin, end, sums, 0);
        ops->work(job, i, begin, end, MOVE, ops->pooled_mask(job, i, sums), NULL);
    } else {
        advance_blocks(job, i, begin, end, job->sums + 2 * (job->first_block[i] + begin / BLOCK), 2);
    }
}

static void second_pass(const job *job, int64_t i, int64_t begin, int64_t end) {
    const tensor t = tensor_of(job, i);
    if (needs_two_passes(job, &t))
        job->operations->work(job, i, begin, end, MOVE, job->q[i], NULL);
}

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

/* ---- The entry. ---- */

int prm_abi(void) { return ABI; }

/* Use torch's threads from now on; NULL: start threads for each call. */
void prm_use_pool(parallel_function *parallel) { pool = parallel; }

/* The best instruction set here: 0 the compiler's baseline, 1 AVX2, 2 AVX-512. */
int prm_best_level(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return 2;
    if (__builtin_cpu_supports("avx2"))
        return 1;
#endif
    return 0;
}

static const operations *operations_of(int is_double, int level) {
#if defined(__x86_64__)
    if (level >= 2)
        return is_double ? &operations_double_avx512 : &operations_float_avx512;
    if (level == 1)
        return is_double ? &operations_double_avx2 : &operations_float_avx2;
#endif
    (void)level;
    return is_double ? &operations_double_baseline : &operations_float_baseline;
}

/* Count the steps up and work out the numbers of each count; returns 0 when memory is short. */
static int count_up(job *job, const options *o) {
    int64_t room = 0, used = 0;
    for (int64_t i = 0; i < job->count; i++) {
        float *step = (float *)(intptr_t)job->table[COLUMN_STEP * job->count + i];
        double t = (double)*step + 1;
        if (used == 0 || job->numbers[used - 1].t != t) {
            if (used == room) {
                room = 2 * room + 1;
                numbers *more = realloc(job->numbers, (size_t)room * sizeof *more);
                if (!more)
                    return 0;
                job->numbers = more;
            }
            job->numbers[used++] = numbers_of(o, t);
        }
        job->which[i] = (int32_t)(used - 1);
    }
    return 1;
}

static int is_divided(const job *job, int64_t i) {
    const tensor t = tensor_of(job, i);
    return needs_two_passes(job, &t);
}

/* Both passes over a few divided tensors at a time, whose state then is still in a cache for the second. Between them
 * tensors of which each is one thread's, as many as there are. */
static void run_in_batches(job *job, int threads) {
    int64_t enough = BATCH > threads * WORTH_A_THREAD ? BATCH : threads * WORTH_A_THREAD;
    for (int64_t from = 0, to = 0; from < job->count; from = to) {
        int divided = is_divided(job, from);
        while (to < job->count && is_divided(job, to) == divided &&
               !(divided && job->before[to] - job->before[from] >= enough))
            to++;
        run(job, threads, from, to, first_pass);
        if (!divided)
            continue;
        for (int64_t i = from; i < to; i++) {
            int64_t blocks = (job->before[i + 1] - job->before[i] + BLOCK - 1) / BLOCK;
            double sums[2] = {0, 0};
            for (int64_t b = 0; b < blocks; b++) {
                sums[0] += job->sums[2 * (job->first_block[i] + b)];
                sums[1] += job->sums[2 * (job->first_block[i] + b) + 1];
            }
            job->q[i] = job->operations->pooled_mask(job, i, sums);
        }
        run(job, threads, from, to, second_pass);
    }
}

static int step_with(job *job, const options *o, int threads) {
    size_t count = (size_t)job->count;
    job->which = malloc(count * sizeof *job->which);
    job->before = malloc((count + 1) * sizeof *job->before);
    job->first_block = malloc(count * sizeof *job->first_block);
    job->q = malloc(count * sizeof *job->q);
    if (!job->which || !job->before || !job->first_block || !job->q || !count_up(job, o))
        return 0;
    int64_t blocks = 0;
    job->before[0] = 0;
    for (int64_t i = 0; i < job->count; i++)
        job->before[i + 1] = job->before[i] + job->table[COLUMN_N * job->count + i];
    int64_t total = job->before[job->count];
    threads = worthwhile_threads(total, threads);
    job->undivided = threads == 1 ? total : total / (16 * threads) > SMALL ? total / (16 * threads) : SMALL;
    for (int64_t i = 0; i < job->count; i++) {
        const tensor t = tensor_of(job, i);
        job->first_block[i] = blocks;
        blocks += needs_two_passes(job, &t) ? (t.n + BLOCK - 1) / BLOCK : 0;
    }
    if (blocks > 0 && !(job->sums = calloc(2 * (size_t)blocks, sizeof *job->sums)))
        return 0;

    /* From here on nothing can fail: a step is taken whole or not at all. */
    for (int64_t i = 0; i < job->count; i++)
        *(float *)(intptr_t)job->table[COLUMN_STEP * job->count + i] += 1;
    if (blocks == 0)
        run(job, threads, 0, job->count, first_pass);
    else
        run_in_batches(job, threads);
    return 1;
}

/* Take one step. Returns 0, or 1 when memory is short, and then nothing has changed. */
int prm_step(const options *o, const int64_t *table, int64_t count, int p_type, int g_type, int m_type, int s_type,
             int z_type, int threads, int level) {
    int is_double = p_type == TYPE_FLOAT64 || m_type == TYPE_FLOAT64 || s_type == TYPE_FLOAT64;
    job job = {0};
    job.table = table;
    job.count = count;
    job.p_type = p_type;
    job.g_type = g_type;
    job.m_type = m_type;
    job.s_type = s_type;
    job.z_type = z_type;
    job.pooled = o->pooled;
    job.operations = operations_of(is_double, level);
    int done = count == 0 || step_with(&job, o, threads);
    free(job.which);
    free(job.before);
    free(job.first_block);
    free(job.q);
    free(job.numbers);
    free(job.sums);
    return done ? 0 : 1;
}
