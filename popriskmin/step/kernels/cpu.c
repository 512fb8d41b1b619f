/* One step of PRM over a list of tensors on the CPU, in one pass over memory.
 *
 * A plain shared library: it knows neither Python nor torch, and gets addresses, sizes and types from cpu.py, which has
 * checked them. prm_step is its one entry. The types of numbers are in cpu_types.h, the arithmetic in cpu_step.h, the
 * 8-bit state in cpu_codes.h, the threads in cpu_threads.h; here are the numbers that depend on the step count, and the order of the work.
 */
#include <float.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "cpu_types.h"

/* To be raised, here and in cpu.py, whenever a structure or a meaning below changes. */
#define ABI 11

#define MASK_NONE 0
#define MASK_SNR 1
#define MASK_SOFT 2
#define MASK_HARD 3
#define MASK_THRESHOLD 4 /* options.debias is set with it: it needs k and the unbiased variance */

#define ADVANCE 1
#define MOVE 2
/* How a loop of the step pulls: to zero or to the first weights. */
#define PULLS_TO_ZERO 1
#define PULLS_TO_START 2

/* Scalars that are converted and computed at a time: their buffers stay in the first cache. */
#define CHUNK 1024
/* Scalars of which the next ones are asked from memory while these are computed, where `asks_ahead`. On Intel's Xeons the
 * processor's own prefetching falls behind on five arrays at a time; twice as many, or half, were slower. */
#define AHEAD 128
/* Whether to ask: on AMD's Zen 4 such bursts cost a third of the time, and what was not tried does without. */
static int asks_ahead = 0;
/* Threads meet at multiples of this many scalars, and means over large tensors are taken from sums over so many. */
#define BLOCK 16384
/* A tensor of at most so many scalars, or of a 16th of a thread's share, is not divided among threads. */
#define SMALL 65536
/* Scalars that are pooled and moved together, some 4 MB of weights and state. */
#define BATCH 262144

enum { COLUMN_P, COLUMN_G, COLUMN_M, COLUMN_V, COLUMN_S, COLUMN_MAXIMUM, COLUMN_Z, COLUMN_ORIGIN, COLUMN_STEP, COLUMN_N, COLUMNS };

/* What stands in the column of origins where shrinkage leaves a tensor alone, or pulls it to zero; else the address of the
 * weights that it pulls to. */
#define LEFT_ALONE 0
#define TO_ZERO 1

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* The options of a parameter group, as in popriskmin.mask.Hyperparameters. */
typedef struct {
    double lr, beta1, beta2, rho, eps, mask_eps, weight_decay, softness, coefficient, min_q, shrinkage,
        mean_coefficient;
    int64_t warmup_steps;
    int32_t mask, pooled, bias_correction, decoupled_weight_decay, maximize, debias, mask_decay, variance_given,
        stochastic_rounding;
} options;

/* What follows from the options and a step count; see popriskmin.mask.corrections. */
typedef struct {
    double t;
    double sign, coupled_decay, beta1, beta2, one_minus_beta2, rho, blend, inv_centre, given_rho, given_blend;
    double inv_bias1, inv_bias_var, k, coefficient, softness, mask_eps, min_q;
    double keep, masked_decay, step_size, inv_root_bias2, eps, lr, loading;
    int mask, coupled, pulls;
    int usual; /* whether neither maximize, nor coupled nor masked decay, makes the loop longer */
    uint32_t key, param_key; /* of the random bits of v and s, and of the parameter */
} numbers;

typedef struct job job;

typedef struct {
    void (*work)(const job *, int64_t index, int64_t begin, int64_t end, int what, double given, double *sums);
    double (*pooled_mask)(const job *, int64_t index, const double *sums);
} operations;

struct job {
    const int64_t *table; /* COLUMNS columns of `count` addresses and sizes */
    int64_t count;
    int p_type, g_type, m_type, s_type, z_type, step_type;
    int pooled, rounds_p;
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
    const void *start; /* the weights to shrink to, or NULL where those are zeros */
    int64_t n;
    int numbers, pooled, pulled;
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
    int64_t origin = table[COLUMN_ORIGIN * count + i];
    t.start = origin == LEFT_ALONE || origin == TO_ZERO ? NULL : (const void *)(intptr_t)origin;
    t.n = table[COLUMN_N * count + i];
    t.numbers = job->which[i];
    t.pulled = origin != LEFT_ALONE && job->numbers[t.numbers].pulls;
    t.pooled = job->pooled && job->numbers[t.numbers].mask != MASK_NONE;
    return t;
}

/* ---- The arithmetic, for each type and instruction set. ---- */

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
    if ((what & ADVANCE) || t->pulled)
        fetch_array(t->s, start, narrow);
    if (what & ADVANCE) {
        fetch_array(t->g, start, size);
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
    x.lr = o->lr;
    x.loading = o->shrinkage * sqrt(o->mean_coefficient);
    x.pulls = o->shrinkage > 0 && t > 1;
    x.mask = open ? MASK_NONE : o->mask;
    x.coupled = x.coupled_decay != 0;
    x.usual = !o->maximize && !x.coupled && !o->mask_decay;
    x.key = hash32((uint32_t)(int64_t)t);
    x.param_key = hash32(x.key);
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

#include "cpu_threads.h"

/* ---- The entry. ---- */

int prm_abi(void) { return ABI; }

/* Whether memory is asked ahead of the step: 1, 0, or -1 for what suits the processor. Returns what then holds; results do
 * not depend on it. */
int prm_ask_ahead(int whether) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    asks_ahead = whether < 0 ? !!__builtin_cpu_is("intel") : whether;
#else
    asks_ahead = whether > 0;
#endif
    return asks_ahead;
}

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

/* The addresses of the counters. */
static const int64_t *steps_of(const job *job) { return job->table + COLUMN_STEP * job->count; }

static double steps_taken(int64_t address, int type) {
    const void *step = (const void *)(intptr_t)address;
    return type == TYPE_FLOAT64 ? *(const double *)step : (double)*(const float *)step;
}

/* Count a step, and return the count. */
static double take_step(int64_t address, int type) {
    void *step = (void *)(intptr_t)address;
    return type == TYPE_FLOAT64 ? (*(double *)step += 1) : (double)(*(float *)step += 1);
}

/* Count the steps up and work out the numbers of each count; returns 0 when memory is short. */
static int count_up(job *job, const options *o) {
    int64_t room = 0, used = 0;
    for (int64_t i = 0; i < job->count; i++) {
        double t = steps_taken(steps_of(job)[i], job->step_type) + 1;
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
        take_step(steps_of(job)[i], job->step_type);
    if (blocks == 0)
        run(job, threads, 0, job->count, first_pass);
    else
        run_in_batches(job, threads);
    return 1;
}

/* Add 1 to counters of one type on the host. Returns their count if it is one for all, else NaN. */
double prm_count_up(const int64_t *steps, int64_t count, int step_type) {
    double first = NAN;
    int same = 1;
    for (int64_t i = 0; i < count; i++) {
        double t = take_step(steps[i], step_type);
        first = i == 0 ? t : first;
        same = same && t == first;
    }
    return same ? first : NAN;
}

/* Take one step. Returns 0, or 1 when memory is short, and then nothing has changed. */
int prm_step(const options *o, const int64_t *table, int64_t count, int p_type, int g_type, int m_type, int s_type,
             int z_type, int step_type, int threads, int level) {
    int is_double = p_type == TYPE_FLOAT64 || m_type == TYPE_FLOAT64 || s_type == TYPE_FLOAT64;
    job job = {0};
    job.table = table;
    job.count = count;
    job.p_type = p_type;
    job.g_type = g_type;
    job.m_type = m_type;
    job.s_type = s_type;
    job.z_type = z_type;
    job.step_type = step_type;
    job.pooled = o->pooled;
    job.rounds_p = o->stochastic_rounding && (p_type == TYPE_BFLOAT16 || p_type == TYPE_FLOAT16);
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
