// embedding_dropout with a norm (BERT): y = D(norm(token[id] + position[pos] + segment[seg])), and the gradient of
// the sum. norm.cuh has the norm's mathematics; the sum is that of embedding_dropout.cu, in f32.
//
// With h = kept ? dy * scale : +0:
//
//     forward:  y = kept ? norm(sum) * scale : +0, and the row's mean and rstd
//     backward: ds = the norm's gradient of g = h * weight, with the sum computed again from the tables
//
// A row with an id that is in no table has y = +0, mean 0 and rstd 0, and the smallest such row is left in `report`.
//
// ds and h * xhat go to a workspace in f32, from which the kernels of embedding_dropout.cu add up the gradients of the
// tables and of the norm's weight, the latter as a table with one entry that every row takes; that of the norm's bias
// is added up from dy in the same way.
//
// Bytes an element in 16-bit storage, beside the tables: forward 2; backward 2 read and 8 written, then 4 read for each
// table and for the weight, 2 for the bias.
//
// The shapes of the row kernels are those of team.cuh; in a wide one each pass reads the row again.

#include "embedding.cuh"
#include "norm.cuh"

template <typename T>
struct EmbeddingNormParams {
    Mask mask;
    Embeddings<T> embeddings;
    In<T> weight;
    In<T> norm_bias;       // forward; may be absent
    Out<T> y;              // forward
    Out<float> stats_out;  // forward: [rows, 2], mean and rstd; may be absent
    Out<unsigned> report;  // forward
    In<float> stats;       // backward
    In<T> dy;              // backward
    Out<float> ds;         // backward
    Out<float> slopes;     // backward: h * xhat; may be absent
    RowNorm norm;
    unsigned rows;  // of this launch, from local row mask.rows.offset on
};
static_assert(sizeof(EmbeddingNormParams<float>) == 384, "embedding_dropout.rs: NormParams");

/// One row, as the team that shares it sees it.
template <typename T, typename Walk>
struct EmbeddingRow {
    static constexpr bool aligned = Walk::aligned;

    const EmbeddingNormParams<T>& p;
    const Walk walk;
    unsigned local;  // local row
    Entries entries;
    Values sums[Walk::SLOTS];  // where the walk holds

    __device__ __forceinline__ EmbeddingRow(const EmbeddingNormParams<T>& p, const Walk& walk)
        : p(p),
          walk(walk),
          local(p.mask.rows.offset + walk.team.row),
          entries(p.embeddings.lookups, local) {}

    /// Index of an octet's first element.
    __device__ __forceinline__ unsigned long long at(Index octet) const {
        return local * p.embeddings.cols + octet.element();
    }

    __device__ __forceinline__ typename Embeddings<T>::Loaded load(Index octet, unsigned count) const {
        return p.embeddings.template load<aligned>(entries, 8ull * octet.sum(), count);
    }

    /// An octet of columns of a parameter of the norm.
    __device__ __forceinline__ Values parameter(const In<T>& values, Index octet,
                                                unsigned count) const {
        return unpack(values.template cached<aligned>(octet.element(), count));
    }

    /// Loads what is held. `beside(slot, octet, count)` loads what else is.
    template <typename Beside>
    __device__ __forceinline__ void hold(Beside beside) {
        if (!Walk::held) return;
        if (!aligned) {  // an octet alone is enough loads
            walk.each([&](unsigned slot, Index octet, unsigned count) {
                beside(slot, octet, count);
                sums[slot] = p.embeddings.sum(load(octet, count));
            });
            return;
        }
        typename Embeddings<T>::Loaded loaded[Walk::SLOTS];
        walk.each([&](unsigned slot, Index octet, unsigned count) {
            loaded[slot] = load(octet, count);
            beside(slot, octet, count);
        });
        __syncwarp();  // keeps the loads first; all threads are here
        walk.each([&](unsigned slot, Index, unsigned) {
            sums[slot] = p.embeddings.sum(loaded[slot]);
        });
    }

    /// The sum of an octet.
    __device__ __forceinline__ Values sum(unsigned slot, Index octet, unsigned count) const {
        return Walk::held ? sums[slot] : p.embeddings.sum(load(octet, count));
    }

    /// D of an octet.
    __device__ __forceinline__ Values drop(const Values& values, Index octet) const {
        const MaskReader<false> draws(p.mask);  // read late: it is not held beside the row
        const Kept keep = draws.kept(draws.lanes(draws.logical(walk.team.row), octet.sum()));
        Values dropped = {};
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            if (keep.at[j]) dropped.at[j] = __fmul_rn(values.at[j], draws.odds.scale);
        }
        return dropped;
    }
};

template <typename T, typename Walk>
__device__ __forceinline__ void embedding_norm_forward(const EmbeddingNormParams<T>& p) {
    constexpr bool aligned = Walk::aligned;
    __shared__ NormScratch<Walk> scratch;
    const Walk walk = {{}, p.embeddings.cols};
    if (walk.team.row >= p.rows) return;  // the whole team
    EmbeddingRow<T, Walk> row(p, walk);
    const bool writes_stats = walk.team.rank == 0 && p.stats_out.present();
    if (!row.entries.exist) {  // the whole team
        if (walk.team.rank == 0) p.report.lower(0, row.local);
        if (writes_stats) {
            p.stats_out.cached(2ull * row.local, 0.0f);
            p.stats_out.cached(2ull * row.local + 1, 0.0f);
        }
        walk.each([&](unsigned, Index octet, unsigned count) {
            p.y.template cached<aligned>(row.at(octet), count, {});
        });
        return;
    }
    row.hold([](unsigned, Index, unsigned) {});
    const auto sum_of = [&](unsigned slot, Index octet, unsigned count) {
        return row.sum(slot, octet, count);
    };
    Values centred[Walk::SLOTS];
    const Normal normal = normal_of(p.norm, walk, scratch, sum_of, centred);
    if (writes_stats) {
        p.stats_out.cached(2ull * row.local, normal.mean);
        p.stats_out.cached(2ull * row.local + 1, normal.standard.rstd);
    }
    walk.each([&](unsigned slot, Index octet, unsigned count) {
        const float pivot = normal.standard.pivot;
        const Values d = Walk::held ? centred[slot] : less(sum_of(slot, octet, count), pivot);
        const Values weight = row.parameter(p.weight, octet, count);
        Values bias = {};
        if (p.norm_bias.present()) bias = row.parameter(p.norm_bias, octet, count);
        const Values y = normalised(normal.standard, d, weight, bias);
        p.y.template cached<aligned>(row.at(octet), count, pack<T>(row.drop(y, octet)));
    });
}

template <typename T, typename Walk>
__device__ __forceinline__ void embedding_norm_backward(const EmbeddingNormParams<T>& p) {
    constexpr bool aligned = Walk::aligned;
    __shared__ NormScratch<Walk> scratch;
    const Walk walk = {{}, p.embeddings.cols};
    if (walk.team.row >= p.rows) return;  // the whole team
    EmbeddingRow<T, Walk> row(p, walk);
    // The whole team. Nobody reads what is not written here: the row takes nothing.
    if (!row.entries.exist) return;
    const auto load_dy = [&](Index octet, unsigned count) -> Octet<T> {
        return p.dy.template cached<aligned>(row.at(octet), count);
    };
    Octet<T> dy[Walk::SLOTS];
    row.hold([&](unsigned slot, Index octet, unsigned count) { dy[slot] = load_dy(octet, count); });
    Values held_h[Walk::SLOTS];
    if (Walk::held) {
        walk.each([&](unsigned slot, Index octet, unsigned) {
            held_h[slot] = row.drop(unpack(dy[slot]), octet);
        });
    }
    const auto h_of = [&](unsigned slot, Index octet, unsigned count) -> Values {
        return Walk::held ? held_h[slot] : row.drop(unpack(load_dy(octet, count)), octet);
    };
    const auto weighed = [&](const Values& s, const Values& h, Index octet, unsigned count) {
        NormPair pair = {s, h};
        const Values weight = row.parameter(p.weight, octet, count);
#pragma unroll
        for (int j = 0; j < 8; ++j) pair.g.at[j] = __fmul_rn(h.at[j], weight.at[j]);
        return pair;
    };
    const auto pair_of = [&](unsigned slot, Index octet, unsigned count) -> NormPair {
        const Values h = h_of(slot, octet, count);
        return weighed(row.sum(slot, octet, count), h, octet, count);
    };
    const NormGradient gradient =
        norm_gradient(p.norm, walk, p.stats.cached(2ull * row.local),
                      p.stats.cached(2ull * row.local + 1), scratch, pair_of);
    walk.each([&](unsigned slot, Index octet, unsigned count) {
        const Values h = h_of(slot, octet, count);
        const NormPair pair = weighed(row.sum(slot, octet, count), h, octet, count);
        Values out;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            out.at[j] = gradient.add_to(0.0f, pair.s.at[j], pair.g.at[j]);
        }
        p.ds.template cached<aligned>(row.at(octet), count, pack<float>(out));
        if (!p.slopes.present()) return;
        const Standard& standard = gradient.standard;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            out.at[j] = __fmul_rn(h.at[j], standard.xhat(standard.centred(pair.s.at[j])));
        }
        p.slopes.template cached<aligned>(row.at(octet), count, pack<float>(out));
    });
}

#define FD_EMBEDDING_NORM(shape, Walk, T, type)                                                    \
    FD_KERNEL(embedding_dropout_norm_forward_##shape##_##type, EmbeddingNormParams<T>, Walk::BLOCK, \
              embedding_norm_forward<T, Walk>)                                                     \
    FD_KERNEL(embedding_dropout_norm_backward_##shape##_##type, EmbeddingNormParams<T>, Walk::BLOCK, \
              embedding_norm_backward<T, Walk>)
/// Without their bound those of unaligned rows spill on sm_80.
#define FD_EMBEDDING_NORM_UNALIGNED(shape, Walk, T, type)                                          \
    FD_KERNEL_BLOCKS(embedding_dropout_norm_forward_##shape##_##type, EmbeddingNormParams<T>,      \
                     Walk::BLOCK, 512 / Walk::BLOCK, embedding_norm_forward<T, Walk>)              \
    FD_KERNEL_BLOCKS(embedding_dropout_norm_backward_##shape##_##type, EmbeddingNormParams<T>,     \
                     Walk::BLOCK, 512 / Walk::BLOCK, embedding_norm_backward<T, Walk>)

FD_ROW_SHAPES(FD_EMBEDDING_NORM)
FD_UNALIGNED_ROW_SHAPES(FD_EMBEDDING_NORM_UNALIGNED)
