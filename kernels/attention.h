// Causal attention of a few queries over caches in pages, split over the positions of a sequence.
//
// A block takes one token, some heads of a group, which share what they read, and one part of the positions. Eight lanes share a
// position: each has some columns of its key and value. Every eight lanes run a softmax of their own; those are joined at the end, the
// parts by `join_parts`. No size of a launch depends on how much a cache holds: parts that have no position write nothing.
#pragma once
#include "quant.h"
#include "reduce.h"

// Which positions a query sees, and how many of them each part takes.
struct Seen {
    int begin, end, each;
    DEVICE int parts() const { return (end - begin + each - 1) / each; }
};
template <int PARTS, int WINDOW, int LONGEST>
DEVICE Seen seen_by(int position, int length) {
    Seen seen;
    seen.end = least(least(position + 1, length), LONGEST);
    if (seen.end < 0) seen.end = 0;
    seen.begin = WINDOW > 0 && position + 1 > WINDOW ? position + 1 - WINDOW : 0;
    if (seen.begin > seen.end) seen.begin = seen.end;
    const int least_each = 64, each = (seen.end - seen.begin + PARTS - 1) / PARTS;
    seen.each = each < least_each ? least_each : each;
    return seen;
}

// What is needed of the shapes: `HEADS` query heads over `KV` cache heads of `D` columns; caches of `ROWS` rows in pages of `PAGE`,
// of which each of `SEQUENCES` sequences has up to `PAGES`.
template <int HEADS_, int KV_, int D_, int ROWS_, int PAGE_, int SEQUENCES_, int PAGES_, int WINDOW_, int PARTS_>
struct Shape {
    static constexpr int HEADS = HEADS_, KV = KV_, D = D_, ROWS = ROWS_, PAGE = PAGE_, SEQUENCES = SEQUENCES_, PAGES = PAGES_,
                         WINDOW = WINDOW_, PARTS = PARTS_;
    // Whether a part that has all positions stores the result: its heads are whole runs of 32 columns, or it is the only part.
    static constexpr bool JOINS_ALONE = D % 32 == 0 || PARTS == 1;
    // Floats of a part of a head: its maximum, the sum of its weights, and weighted values.
    static constexpr int PART = D + 2;
};

struct HalfCache : AsHalf {
    static constexpr int VECTOR = 8;
    static DEVICE void unpack(const Words& w, float* to) {
        for (int i = 0; i < 4; i++) to[2 * i] = half_to_float((u16)w.x[i]), to[2 * i + 1] = half_to_float((u16)(w.x[i] >> 16));
    }
    static DEVICE float one(u16 x) { return half_to_float(x); }
};
struct FloatCache : AsFloat {
    static constexpr int VECTOR = 4;
    static DEVICE void unpack(const Words& w, float* to) {
        for (int i = 0; i < 4; i++) to[i] = float_of(w.x[i]);
    }
    static DEVICE float one(float x) { return x; }
};

// The columns of a lane of eight: vectors of 16 bytes, if rows of eight lanes are whole ones, or single elements.
template <class C, int D>
struct Columns {
    static constexpr bool WHOLE = D % (8 * C::VECTOR) == 0;
    static constexpr int VECTOR = WHOLE ? C::VECTOR : 1, COUNT = (D + 8 * VECTOR - 1) / (8 * VECTOR), EACH = COUNT * VECTOR;
    static DEVICE int column(int i) { return (i / VECTOR * 8 + lane() % 8) * VECTOR + i % VECTOR; }
    static DEVICE bool is_there(int i) { return WHOLE || column(i) < D; }
    // Zeros of a row that is not `wanted`, which is not touched.
    static DEVICE void load(const typename C::Element* row, bool wanted, float (&to)[EACH]) {
        if constexpr (WHOLE) {
            for (int c = 0; c < COUNT; c++) {
                Words words = {};
                if (wanted) words = *(const Words*)(row + column(c * VECTOR));
                C::unpack(words, to + c * VECTOR);
            }
        } else {
            for (int i = 0; i < EACH; i++) to[i] = wanted && is_there(i) ? C::one(row[column(i)]) : 0.0f;
        }
    }
};

constexpr float LOWEST = -1e30f, LOG2_E = 1.44269504088896340736f;

// A softmax on its way: maximum, sum of weights, weighted values. Scores are scaled so that weights are powers of two.
template <int EACH>
struct Running {
    float most, sum, values[EACH];
    DEVICE void add(float weight, const float (&value)[EACH]) {
        sum += weight;
        for (int i = 0; i < EACH; i++) values[i] = fused(weight, value[i], values[i]);
    }
    DEVICE void scale_to(float to) {
        const float by = power_of_two(most - to);
        sum *= by;
        for (int i = 0; i < EACH; i++) values[i] *= by;
        most = to;
    }
};

// Queries that another kernel turned, as it appended the keys and values of the step.
template <class S>
struct Stored {
    // Keys of the step that are not in the cache yet.
    static constexpr int COUNT = 0;
    const float* q;
    DEVICE void begin(int, int, bool, int, int, const i32*) { wait_for_previous(); }
    DEVICE float query(int token, int head, int, int column) const { return q[((u64)token * S::HEADS + head) * S::D + column]; }
    DEVICE bool meets(int) { return false; }
    DEVICE int times(int) const { return 0; }
    template <class K, class V>
    DEVICE void load(int, K&, V&) const {}
};

// The part `block_x()` of the positions, for `GROUP` heads from `block_y() * GROUP` on and token `block_z()`. `step` has the queries,
// and what of the caches is not there yet.
template <int THREADS, int GROUP, class S, class KC, class VC, class Step, class Out>
DEVICE void attend_part(Step step, const typename KC::Element* k, const typename VC::Element* v, const i32* tables,
                        const i32* lengths, const i32* sequences, const i32* positions, float scale, float* parts, Out out) {
    typedef Columns<KC, S::D> QK;
    typedef Columns<VC, S::D> PV;
    constexpr int AT_ONCE = THREADS / 8, KEYS = 2;
    const int part = block_x(), head = block_y() * GROUP, token = block_z();
    const int sequence = load_index(sequences + token, S::SEQUENCES);
    const Seen seen = seen_by<S::PARTS, S::WINDOW, S::PAGES * S::PAGE>(load_step(positions + token), load_step(lengths + sequence));
    const int from = seen.begin + part * seen.each, to = least(from + seen.each, seen.end);
    step.begin(token, head, part == 0, from, to, tables + sequence * S::PAGES);
    if (S::PARTS > 1 && from >= to) return;
    const int kv = head / (S::HEADS / S::KV);

    float query[GROUP][QK::EACH];
    Running<PV::EACH> run[GROUP];
    for (int h = 0; h < GROUP; h++) {
        for (int i = 0; i < QK::EACH; i++) {
            query[h][i] = QK::is_there(i) ? step.query(token, head + h, h, QK::column(i)) * (scale * LOG2_E) : 0.0f;
        }
        run[h].most = LOWEST, run[h].sum = 0;
        for (int i = 0; i < PV::EACH; i++) run[h].values[i] = 0;
    }
    // The pages of the next keys are looked up while these are met.
    const auto page_of = [&](int position) {
        return load_index(tables + sequence * S::PAGES + (position < to ? position : from) / S::PAGE, S::ROWS / S::PAGE);
    };
    int pages[KEYS];
#pragma unroll
    for (int n = 0; n < KEYS; n++) pages[n] = page_of(from + n * AT_ONCE + thread() / 8);
    for (int first = from; first < to; first += AT_ONCE * KEYS) {
        float key[KEYS][QK::EACH], value[KEYS][PV::EACH];
        bool is_there[KEYS];
#pragma unroll
        for (int n = 0; n < KEYS; n++) {
            const int position = first + n * AT_ONCE + thread() / 8;
            const int row = pages[n] * S::PAGE + position % S::PAGE;
            is_there[n] = position < to && !step.meets(row);
            QK::load(k + ((u64)row * S::KV + kv) * S::D, is_there[n], key[n]);
            PV::load(v + ((u64)row * S::KV + kv) * S::D, is_there[n], value[n]);
        }
#pragma unroll
        for (int n = 0; n < KEYS; n++) pages[n] = page_of(first + (KEYS + n) * AT_ONCE + thread() / 8);
        float score[GROUP][KEYS], most[GROUP];
        bool is_higher = false;
#pragma unroll
        for (int h = 0; h < GROUP; h++) {
            most[h] = run[h].most;
#pragma unroll
            for (int n = 0; n < KEYS; n++) {
                float dot = 0;
                for (int i = 0; i < QK::EACH; i++) dot = fused(query[h][i], key[n][i], dot);
                dot = sum_of_lanes<8>(dot);
                score[h][n] = is_there[n] ? dot : -INFINITE;
                most[h] = largest(most[h], score[h][n]);
            }
            is_higher |= most[h] > run[h].most;
        }
        // The longer, the rarer is a score above all before. One maximum for the warp makes it rarer still.
        if (any_of_warp(is_higher)) {
#pragma unroll
            for (int h = 0; h < GROUP; h++) {
                for (int mask = 8; mask < WARP; mask *= 2) most[h] = largest(most[h], exchange(most[h], mask));
                run[h].scale_to(most[h]);
            }
        }
#pragma unroll
        for (int h = 0; h < GROUP; h++) {
#pragma unroll
            for (int n = 0; n < KEYS; n++) run[h].add(power_of_two(score[h][n] - run[h].most), value[n]);
        }
    }
#pragma unroll
    for (int t = 0; t < Step::COUNT; t++) {
        const int times = step.times(t);
        if (!any_of_warp(times > 0)) continue;
        float key[QK::EACH], value[PV::EACH];
        step.load(t, key, value);
        for (int h = 0; h < GROUP; h++) {
            float dot = 0;
            for (int i = 0; i < QK::EACH; i++) dot = fused(query[h][i], key[i], dot);
            dot = sum_of_lanes<8>(dot);
            const float score = times > 0 ? dot : -INFINITE;
            run[h].scale_to(largest(run[h].most, score));
            run[h].add(times * power_of_two(score - run[h].most), value);
        }
    }
    // The eights of a warp, then the warps.
    constexpr int WARPS = THREADS / WARP;
    __shared__ float room[WARPS][GROUP][S::PART];
    for (int h = 0; h < GROUP; h++) {
        for (int mask = 8; mask < WARP; mask *= 2) {
            const float most = largest(run[h].most, exchange(run[h].most, mask));
            run[h].scale_to(most);
            run[h].sum += exchange(run[h].sum, mask);
            for (int i = 0; i < PV::EACH; i++) run[h].values[i] += exchange(run[h].values[i], mask);
        }
        if (lane() < 8) {
            float* mine = room[warp()][h];
            if (lane() == 0) mine[0] = run[h].most, mine[1] = run[h].sum;
            for (int i = 0; i < PV::EACH; i++) {
                if (PV::is_there(i)) mine[2 + PV::column(i)] = run[h].values[i];
            }
        }
    }
    barrier();
    for (int i = thread(); i < GROUP * S::D; i += THREADS) {
        const int h = i / S::D, column = i % S::D;
        float most = LOWEST, sum = 0, value = 0;
        for (int w = 0; w < WARPS; w++) most = largest(most, room[w][h][0]);
        for (int w = 0; w < WARPS; w++) {
            const float by = power_of_two(room[w][h][0] - most);
            sum = fused(by, room[w][h][1], sum);
            value = fused(by, room[w][h][2 + column], value);
        }
        if (S::PARTS == 1 || (S::JOINS_ALONE && seen.parts() == 1)) {
            // A query that sees nothing gets nothing.
            const float result[1] = {sum > 0 ? value / sum : 0.0f};
            out.store(token, (head + h) * S::D + column, result);
            continue;
        }
        float* to_part = parts + (((u64)token * S::HEADS + head + h) * S::PARTS + part) * S::PART;
        to_part[2 + column] = value;
        if (column == 0) to_part[0] = most, to_part[1] = sum;
    }
}

// Joins the parts of column `column` of `HEADS * D` of a token, and stores it.
template <class S, class Out>
DEVICE void join_parts(const float* parts, const i32* lengths, const i32* sequences, const i32* positions, int token, int column,
                       Out out) {
    if (column >= S::HEADS * S::D) return;
    const int sequence = load_index(sequences + token, S::SEQUENCES);
    const Seen seen = seen_by<S::PARTS, S::WINDOW, S::PAGES * S::PAGE>(load_step(positions + token), load_step(lengths + sequence));
    // Whoever waits for this one waits for the parts too.
    wait_for_previous();
    if (S::JOINS_ALONE && seen.parts() == 1) return;
    const float* of_head = parts + ((u64)token * S::HEADS + column / S::D) * S::PARTS * S::PART;
    const int count = seen.parts();
    constexpr int AT_ONCE = S::PARTS < 8 ? S::PARTS : 8;
    float most = LOWEST, sum = 0, value = 0;
    for (int first = 0; first < count; first += AT_ONCE) {
        float mosts[AT_ONCE], sums[AT_ONCE], values[AT_ONCE], now = most;
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            const float* part = of_head + least(first + i, count - 1) * S::PART;
            mosts[i] = part[0], sums[i] = part[1], values[i] = part[2 + column % S::D];
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) now = largest(now, mosts[i]);
        const float by = power_of_two(most - now);
        most = now, sum *= by, value *= by;
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            const float of_part = first + i < count ? power_of_two(mosts[i] - now) : 0.0f;
            sum = fused(of_part, sums[i], sum);
            value = fused(of_part, values[i], value);
        }
    }
    // A query that sees nothing gets nothing.
    const float result[1] = {sum > 0 ? value / sum : 0.0f};
    out.store(token, column, result);
}
