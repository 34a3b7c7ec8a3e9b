// Dense distillation on GPUs with thread-block clusters (Hopper and later): loss and gradient for one read of each row
// and one write of the gradient.
//
// A cluster holds a row pair in the shared memory of its blocks, each a slice of both rows. The bulk copy engine fills
// the slices and reports to an mbarrier; while one row is at work, the next is on its way into the other stage. States
// are merged by writing them into every block of the cluster and one cluster barrier. The grid is persistent: as many
// clusters as fit the device, each takes every n-th row.
//
// The copy engine wants addresses and sizes of whole 16 bytes, so it gets the vectors (common.cuh) and the few elements
// around them are read as in the general kernel.
#include <cooperative_groups.h>

#include <map>
#include <mutex>
#include <tuple>

#include "cuda/distill.cuh"

namespace pyalign::cuda {
namespace {

namespace cg = cooperative_groups;

constexpr int kThreads = 256, kWarps = kThreads / kWarp, kMostCluster = 16, kMostStages = 2;
constexpr int kBlocksPerProcessor = 2;
constexpr int kCopyBytes = 16 << 10;      // per copy command
constexpr int64_t kLeastBytes = 8 << 10;  // a row shorter than this is one block's work

// ---- mbarriers and bulk copies ----

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

__device__ __forceinline__ uint32_t shared_address(const void* x) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(x));
}

__device__ __forceinline__ void barrier_init(uint64_t* barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Makes initialised barriers known to the copy engine.
__device__ __forceinline__ void fence_barrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Arrives, and makes the phase wait for `bytes` from the copy engine.
__device__ __forceinline__ void barrier_expect(uint64_t* barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
    uint32_t done = 0;
    while (!done) {
        asm volatile(
            "{\n"
            ".reg .pred p;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;\n"
            "}"
            : "=r"(done)
            : "r"(shared_address(barrier)), "r"(parity)
            : "memory");
    }
}

// Shared memory that was read before goes to the copy engine, which writes it.
__device__ __forceinline__ void fence_before_copy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void copy_bulk(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(to)),
                 "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}

#endif

// ---- A cluster's part of a row pair ----

// Block `rank` of `size` has the vectors [start, start + count).
struct Slice {
    Split split;
    int start, count;
    int lanes[2];  // of student and teacher: where in 16 aligned bytes their vectors start

    __device__ __forceinline__ bool together() const { return (lanes[0] | lanes[1]) == 0; }
};

template <class T>
__device__ __forceinline__ Slice slice_row(const T* student, const T* teacher, int lead, int vocab, int rank,
                                           int size) {
    const bool together = misalignment(student) == lead && misalignment(teacher) == lead;
    const Split split = split_row<T>(vocab, lead, together);
    const int share = (split.vectors + size - 1) / size;
    const int start = min(rank * share, split.vectors);
    return {split,
            start,
            min(share, split.vectors - start),
            {misalignment(student + split.head), misalignment(teacher + split.head)}};
}

// What the thread that orders a row's copies tells the others.
struct Header {
    TokenRow token;
    float target_logit;
};

// Shared memory of a block; the stages follow: [stages, 2, capacity] vectors.
struct alignas(16) Shared {
    char slots[2][kMostCluster * kWarps * sizeof(Folded)];
    float edges[2][kWarp];
    Header headers[kMostStages];
    Note note;
    uint64_t arrived[kMostStages];
};
static_assert(sizeof(Shared) == 7520);  // tests and bench/predictions.py read it here

// Merges the states of all threads of a cluster; see BlockTeam.
struct ClusterTeam {
    Shared* shared;
    int rank, size;
    int turn = 0;

    template <class State, class Merger>
    __device__ __forceinline__ State merge(State state, const Merger& merger) {
        static_assert(sizeof(State) <= sizeof(Folded));
        const cg::cluster_group cluster = cg::this_cluster();
        State* const mine = reinterpret_cast<State*>(shared->slots[turn]);
        turn ^= 1;
        state = merger.warp(state);
        const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
        if (lane < size) *cluster.map_shared_rank(mine + rank * kWarps + warp, lane) = state;
        cluster.sync();
        State all{};
        for (int i = lane; i < size * kWarps; i += kWarp) all = merger(all, mine[i]);
        return merger.warp(all);
    }
};

template <class T>
struct ClusterPart {
    static constexpr int kWidth = kLanes<T>, kKept = 32 / kWidth;  // in 32 registers

    const T* rows[2];    // [vocab] student, teacher
    const uint4* stage;  // [2, capacity], shared
    int capacity;
    Slice slice;
    ClusterTeam& team;
    Note* note;

    // body(element, x) for vector i.
    template <bool kTogether, class Body>
    __device__ __forceinline__ void vector(int i, Body body) const {
        const uint4 *const student = stage + i, *const teacher = stage + capacity + i;
        uint4 s = *student, t = *teacher;
        if (!kTogether && slice.lanes[0]) s = realign<T>(s, student[1], slice.lanes[0]);
        if (!kTogether && slice.lanes[1]) t = realign<T>(t, teacher[1], slice.lanes[1]);
        float x[2][kWidth];
        unpack<T>(s, x[0]);
        unpack<T>(t, x[1]);
        body(slice.split.head + (slice.start + i) * kWidth, x);
    }

    template <bool kTogether, class Body>
    __device__ __forceinline__ void vectors(int begin, Body body) const {
        for (int i = begin + int(threadIdx.x); i < slice.count; i += kThreads) vector<kTogether>(i, body);
    }

    template <bool kFirst, class Body>
    __device__ __forceinline__ void pass(int begin, Body body) {
        if (slice.together())
            vectors<true>(begin, body);
        else
            vectors<false>(0, body);
        const int edge = team.rank == 0 ? slice.split.template edge<T>(threadIdx.x) : -1;
        if (edge < 0) return;
        float x[2][1];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float& here = team.shared->edges[r][threadIdx.x];
            if (kFirst) here = widen(rows[r][edge]);
            x[r][0] = here;
        }
        body(edge, x);
    }
    template <class Body>
    __device__ __forceinline__ void first(Body body) {
        pass<true>(0, body);
    }
    template <class Body>
    __device__ __forceinline__ void again(Body body) {
        pass<false>(0, body);
    }
    // body(i, element, x) for a thread's i-th vector, a constant once unrolled; none of rows that lie apart.
    template <int kVectors, class Body>
    __device__ __forceinline__ void held(Body body) const {
        if (!slice.together()) return;
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
            const int at = i * kThreads + int(threadIdx.x);
            if (at < slice.count) vector<true>(at, [&](int element, const auto& x) { body(i, element, x); });
        }
    }
    template <int kVectors, class Body>
    __device__ __forceinline__ void beyond(Body body) {
        pass<false>(kVectors * kThreads, body);
    }
    template <class State, class Merger>
    __device__ __forceinline__ State merge(const State& state, const Merger& merger) {
        return team.merge(state, merger);
    }
    __device__ __forceinline__ int thread() const { return team.rank * kThreads + int(threadIdx.x); }
    __device__ __forceinline__ int threads() const { return team.size * kThreads; }
};

// ---- Kernel ----

// One thread of each block: reads the row's token and orders this block's slices of it.
template <class T, class G>
__device__ __forceinline__ void request_row(const DistillParams& params, int64_t row, const ClusterTeam& team,
                                            uint4* stage, int capacity, Header* header, uint64_t* arrived) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    const LossParams& p = params.loss;
    const TokenRow token = read_token(p, row);
    if (token.kind != Token::kCounted) {
        *header = {token, 0.f};
        barrier_expect(arrived, 0);
        return;
    }
    const T* const student = row_pointer<const T>(p.student, row);
    const T* const teacher = row_pointer<const T>(params.teacher, token.teacher);
    const Slice slice = slice_row(student, teacher, written_lead<T, G>(p, row, student), p.vocab, team.rank, team.size);
    const T* const rows[2] = {student, teacher};
    uint32_t bytes[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        bytes[r] = slice.count > 0 ? 16u * uint32_t(slice.count + (slice.lanes[r] != 0)) : 0u;
    }
    fence_before_copy();
    *header = {token, token.target < 0 ? 0.f : widen(student[token.target])};
    barrier_expect(arrived, bytes[0] + bytes[1]);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const char* const from =
            reinterpret_cast<const char*>(Vectors<T>(rows[r] + slice.split.head).aligned + slice.start);
        char* const to = reinterpret_cast<char*>(stage + r * capacity);
        for (uint32_t done = 0; done < bytes[r]; done += kCopyBytes)
            copy_bulk(to + done, from + done, min(bytes[r] - done, uint32_t(kCopyBytes)), arrived);
    }
#endif
}

// Grid: clusters of any size up to 16, of kThreads threads a block. T is the logits' type, G the gradient's.
template <class T, class G, class D>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    distill_clusters(const DistillParams params, int stages, int capacity) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    extern __shared__ uint4 memory[];
    Shared* const shared = reinterpret_cast<Shared*>(memory);
    uint4* const vectors = memory + sizeof(Shared) / sizeof(uint4);  // [stages, 2, capacity]
    const cg::cluster_group cluster = cg::this_cluster();
    ClusterTeam team{shared, int(cluster.block_rank()), int(cluster.num_blocks())};
    const LossParams& p = params.loss;
    const int64_t clusters = gridDim.x / team.size, count = p.tokens.count;
    int64_t row = blockIdx.x / team.size;

    const auto request = [&](int64_t wanted, int stage) {
        if (wanted < count)
            request_row<T, G>(params, wanted, team, vectors + stage * 2 * capacity, capacity, &shared->headers[stage],
                              &shared->arrived[stage]);
    };
    if (threadIdx.x == 0) {
        for (uint64_t& barrier : shared->arrived) barrier_init(&barrier, 1);
        fence_barrier_init();
    }
    cluster.sync();  // nobody may write into a block that has not started
    if (threadIdx.x == 0)
        for (int stage = 0; stage < stages; ++stage) request(row + stage * clusters, stage);

    int stage = 0;
    uint32_t parity = 0;
    for (; row < count; row += clusters) {
        barrier_wait(&shared->arrived[stage], parity);
        const TokenRow token = shared->headers[stage].token;
        if (token.kind != Token::kCounted) {
            write_lossless<G>(p, row, token.kind, team.rank * kThreads + int(threadIdx.x), team.size * kThreads);
        } else {
            const T* const student = row_pointer<const T>(p.student, row);                 // [vocab]
            const T* const teacher = row_pointer<const T>(params.teacher, token.teacher);  // [vocab]
            const Slice slice =
                slice_row(student, teacher, written_lead<T, G>(p, row, student), p.vocab, team.rank, team.size);
            ClusterPart<T> part{{student, teacher}, vectors + stage * 2 * capacity, capacity, slice, team,
                                &shared->note};
            distill_row<G, D>(params, row, token, shared->headers[stage].target_logit, part);
        }
        __syncthreads();  // everybody is done with the stage
        if (threadIdx.x == 0) request(row + stages * clusters, stage);
        if (++stage == stages) stage = 0, parity ^= 1;
    }
    cluster.sync();  // nobody may leave while others write into its shared memory
#endif
}

// ---- Layout and launch ----

struct ClusterPlan {
    int cluster = 0, stages = 0, capacity = 0;  // cluster 0: can't
    size_t shared = 0;
    int64_t clusters = 0;  // that fit the device at once
};

using Kernel = void (*)(DistillParams, int, int);

int64_t active_clusters(const Device& device, Kernel kernel, int cluster, size_t shared) {
    if (allow_shared(kernel, device) != cudaSuccess ||
        (cluster > 8 &&
         cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) != cudaSuccess)) {
        cudaGetLastError();
        return 0;
    }
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = unsigned(cluster);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(unsigned(cluster));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = shared;
    config.attrs = &attribute;
    config.numAttrs = 1;
    int clusters = 0;
    if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) != cudaSuccess) {
        cudaGetLastError();
        return 0;
    }
    return clusters;
}

// Of a given cluster size, whose blocks have room for `stages` row pairs.
ClusterPlan lay_out(const Device& device, Kernel kernel, int64_t vocab, int size, Layout layout) {
    const auto [cluster, stages] = layout;
    const bool known = cluster >= 1 && cluster <= kMostCluster && (cluster & (cluster - 1)) == 0 && stages >= 1 &&
                       stages <= kMostStages;
    if (!known || device.major < 9 || vocab * size < kLeastBytes) return {};
    const int64_t vectors = vocab * size / 16, capacity = (vectors + cluster - 1) / cluster + 1;
    const int64_t shared = int64_t(sizeof(Shared)) + stages * 2 * capacity * int64_t(sizeof(uint4));
    if (shared > device.shared_per_block) return {};
    const int64_t clusters = active_clusters(device, kernel, cluster, size_t(shared));
    if (clusters == 0) return {};
    return {cluster, stages, int(capacity), size_t(shared), clusters};
}

// The rule. Best are two blocks on a multiprocessor, each with a row at work and one on its way; the smallest such
// cluster, because barriers cost more the more blocks they join. Longer rows do without the one or the other.
ClusterPlan make_plan(const Device& device, Kernel kernel, int64_t vocab, int size) {
    struct Wish {
        int blocks, stages;
    };
    for (const Wish wish : {Wish{2, 2}, Wish{2, 1}, Wish{1, 2}, Wish{1, 1}}) {
        for (int cluster = 1; cluster <= kMostCluster; cluster *= 2) {
            const ClusterPlan plan = lay_out(device, kernel, vocab, size, {cluster, wish.stages});
            const int64_t on_processor = wish.blocks * (int64_t(plan.shared) + device.shared_reserved);
            if (plan.cluster > 0 && on_processor <= device.shared_per_processor &&
                2 * plan.clusters * cluster >= int64_t{wish.blocks} * device.processors)
                return plan;
        }
    }
    return {};
}

ClusterPlan plan_clusters(const Device& device, Kernel kernel, int64_t vocab, int size, Layout layout) {
    static std::mutex mutex;
    static auto& plans = *new std::map<std::tuple<int, Kernel, int64_t, int, int>, ClusterPlan>;
    const std::lock_guard<std::mutex> lock(mutex);
    const auto [place, is_new] = plans.try_emplace({device.index, kernel, vocab, layout.cluster, layout.stages});
    if (is_new)
        place->second = layout.cluster == Layout::kByRule ? make_plan(device, kernel, vocab, size)
                                                          : lay_out(device, kernel, vocab, size, layout);
    return place->second;
}

template <class T, class G>
Kernel kernel_for(Divergence divergence) {
    return with_divergence(divergence, 0.5f, [](auto d) -> Kernel { return distill_clusters<T, G, decltype(d)>; });
}

}  // namespace

bool distill_cluster(const DistillParams& params, Layout layout, cudaStream_t stream) {
    const LossParams& p = params.loss;
    bool launched = false;
    with_types(p.student, p.gradient, "distill", [&](auto logits, auto gradient) {
        using T = decltype(logits);
        const Kernel kernel = kernel_for<T, decltype(gradient)>(p.divergence);
        const ClusterPlan plan = plan_clusters(current_device(), kernel, p.vocab, sizeof(T), layout);
        if (plan.cluster == 0) return;
        const int64_t clusters = plan.clusters < p.tokens.count ? plan.clusters : p.tokens.count;
        check(launch({clusters * plan.cluster, kThreads, plan.shared, stream, plan.cluster}, kernel, params,
                     plan.stages, plan.capacity),
              "distill_clusters");
        launched = true;
    });
    return launched;
}

std::vector<Layout> all_layouts(const Device& device, int64_t vocab, Dtype dtype, Divergence divergence) {
    std::vector<Layout> layouts{{Layout::kOneBlock, 0}};  // the rule's, where it wants no cluster
    with_type(dtype, [&](auto type) {
        using T = decltype(type);
        const Kernel kernel = kernel_for<T, T>(divergence);
        const ClusterPlan rule = plan_clusters(device, kernel, vocab, sizeof(T), Layout{});
        for (int cluster = 1; cluster <= kMostCluster; cluster *= 2) {
            for (int stages = kMostStages; stages >= 1; --stages) {
                if (plan_clusters(device, kernel, vocab, sizeof(T), {cluster, stages}).cluster == 0) continue;
                const bool is_rule = cluster == rule.cluster && stages == rule.stages;
                layouts.insert(is_rule ? layouts.begin() : layouts.end(), Layout{cluster, stages});
            }
        }
    });
    return layouts;
}

std::string explain_cluster(const Device& device, int64_t vocab, Dtype dtype, Layout layout) {
    std::string text;
    with_type(dtype, [&](auto type) {
        using T = decltype(type);
        const Kernel kernel = kernel_for<T, T>(Divergence::kForwardKL);
        const ClusterPlan plan = plan_clusters(device, kernel, vocab, sizeof(T), layout);
        if (plan.cluster == 0) return;
        text = "distill_clusters: a row pair held by a cluster of " + std::to_string(plan.cluster) + ", " +
               std::to_string(plan.stages) + (plan.stages == 1 ? " stage, " : " stages, ") +
               std::to_string(plan.shared) + " bytes of shared memory a block, " + std::to_string(plan.clusters) +
               " clusters at once";
    });
    return text;
}

}  // namespace pyalign::cuda
