// Rows held by thread-block clusters (Hopper and later): a row, or one of each operand, is read from memory once, into
// the shared memory of a cluster's blocks.
//
// Each block has a slice of every row. The bulk copy engine fills the slices and reports to an mbarrier; while one row
// is at work, the next is on its way into the other stage. States are merged by writing them into every block of the
// cluster and one cluster barrier. The grid is persistent: as many clusters as fit the device, each takes every n-th
// row.
//
// The copy engine wants addresses and sizes of whole 16 bytes, so it gets the vectors (common.cuh) and the few elements
// around them are read as in the general kernels.
#pragma once

#include <cooperative_groups.h>

#include <vector>

#include "cuda/losses.cuh"

namespace pyalign::cuda {

// ---- Layout ----

constexpr int kClusterThreads = 256, kClusterWarps = kClusterThreads / kWarp;  // of a block
constexpr int kMostCluster = 16, kMostStages = 2;
constexpr int kClusterBlocks = 2;  // on a multiprocessor

struct ClusterPlan {
    int cluster = 0, stages = 0, capacity = 0;  // cluster 0: can't. capacity: vectors of a slice
    size_t shared = 0;
    int64_t clusters = 0;  // that fit the device at once
};

// What a cluster's kernel wants room for: `rows` rows of `vocab` elements at once, and `fixed` bytes in every block.
struct ClusterRoom {
    int rows;
    int64_t vocab;
    int element_size;
    size_t fixed;
};

// Of a layout, by the rule or given; kept for the kernel and this vocabulary. `kernel` is the address of a __global__
// function of kClusterThreads threads a block.
ClusterPlan plan_clusters(const Device& device, const void* kernel, const ClusterRoom& room, Layout layout);

// All layouts that fit, and one block; the first is the rule's.
std::vector<Layout> layouts_of(const Device& device, const void* kernel, const ClusterRoom& room);

// How a plan's blocks are launched for `count` rows.
inline Launch launch_of(const ClusterPlan& plan, int64_t count, cudaStream_t stream) {
    const int64_t clusters = plan.clusters < count ? plan.clusters : count;
    return {clusters * plan.cluster, kClusterThreads, plan.shared, stream, plan.cluster};
}

// "a cluster of 8, 2 stages, ..."
std::string describe(const ClusterPlan& plan);

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

// ---- A cluster's part of its rows ----

// Block `rank` of `size` has the vectors [start, start + count) of its rows.
struct Slice {
    Split split;
    int start, count;
    uint32_t lanes;  // a byte for each row: where in 16 aligned bytes its vectors start

    __device__ __forceinline__ bool together() const { return lanes == 0; }
    __device__ __forceinline__ int lanes_of(int row) const { return int(lanes >> 8 * row & 0xff); }
};

template <class T, int kRows>
__device__ __forceinline__ Slice slice_rows(const T* const (&rows)[kRows], int lead, int vocab, int rank, int size) {
    Slice slice{};
    bool together = true;
#pragma unroll
    for (int r = 0; r < kRows; ++r) together = together && misalignment(rows[r]) == lead;
    slice.split = split_row<T>(vocab, lead, together);
    const int share = (slice.split.vectors + size - 1) / size;
    slice.start = min(rank * share, slice.split.vectors);
    slice.count = min(share, slice.split.vectors - slice.start);
#pragma unroll
    for (int r = 0; r < kRows; ++r) slice.lanes |= uint32_t(misalignment(rows[r] + slice.split.head)) << 8 * r;
    return slice;
}

// What the thread that orders a row's copies tells the others. It stays in shared memory: registers are scarce.
struct Header {
    TokenRow token;
    Slice slice;
    float target_logit;
};

// Shared memory of a block; what a kernel wants besides follows, then the stages: [stages, rows, capacity] vectors.
struct alignas(16) ClusterShared {
    char of_warps[kClusterWarps * BlockTeam::kSlotBytes], of_blocks[2][kMostCluster * BlockTeam::kSlotBytes];
    float edges[2][kWarp];
    Header headers[kMostStages];
    Note note;
    uint64_t arrived[kMostStages];
};
static_assert(sizeof(ClusterShared) == 1680);  // tests read it here

// Merges the states of all threads of a cluster; see BlockTeam. Where a row is cut into many slices a block's part of
// it is short, so one warp joins the block's states, and one state goes to every block. Two sets of slots take turns.
struct ClusterTeam {
    ClusterShared* shared;
    int rank, size;
    int turn = 0;

    template <class State, class Merger>
    __device__ __forceinline__ State merge(State state, const Merger& merger) {
        static_assert(sizeof(State) <= BlockTeam::kSlotBytes);
        const cooperative_groups::cluster_group cluster = cooperative_groups::this_cluster();
        State* const of_warps = reinterpret_cast<State*>(shared->of_warps);
        State* const of_blocks = reinterpret_cast<State*>(shared->of_blocks[turn]);
        turn ^= 1;
        const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
        state = merger.warp(state);
        if (lane == 0) of_warps[warp] = state;
        __syncthreads();
        if (warp == 0) {
            State block{};
            if (lane < kClusterWarps) block = of_warps[lane];
            block = merger.warp(block);
            if (lane < size) *cluster.map_shared_rank(of_blocks + rank, lane) = block;
        }
        cluster.sync();
        State all{};
        if (lane < size) all = of_blocks[lane];
        return merger.warp(all);
    }
};

template <class T, int kRows>
struct ClusterPart {
    static constexpr int kWidth = kLanes<T>, kKept = 32 / kWidth;  // in 32 registers
    static constexpr bool kSkips = false;

    const T* rows[kRows];  // [vocab]
    const uint4* stage;    // [kRows, capacity], shared
    int capacity;
    const Slice& slice;
    ClusterTeam& team;

    // body(element, x) for vector i.
    template <bool kTogether, class Body>
    __device__ __forceinline__ void vector(int i, Body body) const {
        float x[kRows][kWidth];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const uint4* const from = stage + r * capacity + i;
            uint4 raw = *from;
            if (!kTogether && slice.lanes_of(r)) raw = realign<T>(raw, from[1], slice.lanes_of(r));
            unpack<T>(raw, x[r]);
        }
        body(slice.split.head + (slice.start + i) * kWidth, x);
    }

    template <bool kTogether, class Body>
    __device__ __forceinline__ void vectors(int begin, Body body) const {
        for (int i = begin + int(threadIdx.x); i < slice.count; i += kClusterThreads) vector<kTogether>(i, body);
    }

    template <bool kFirst, class Body>
    __device__ __forceinline__ void pass(int begin, Body body) {
        if (slice.together())
            vectors<true>(begin, body);
        else
            vectors<false>(0, body);
        const int edge = is_first() ? slice.split.template edge<T>(threadIdx.x) : -1;
        if (edge < 0) return;
        float x[kRows][1];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
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
            const int at = i * kClusterThreads + int(threadIdx.x);
            if (at < slice.count) vector<true>(at, [&](int element, const auto& x) { body(i, element, x); });
        }
    }
    template <int kVectors, class Body>
    __device__ __forceinline__ void beyond(Body body) {
        pass<false>(kVectors * kClusterThreads, body);
    }
    template <class State, class Merger>
    __device__ __forceinline__ State merge(const State& state, const Merger& merger) {
        return team.merge(state, merger);
    }
    __device__ __forceinline__ bool is_first() const { return team.rank == 0; }  // of the blocks at the row
    __device__ __forceinline__ int thread() const { return team.rank * kClusterThreads + int(threadIdx.x); }
    __device__ __forceinline__ int threads() const { return team.size * kClusterThreads; }
};

// ---- Kernels ----

constexpr int kCopyBytes = 16 << 10;  // per copy command

// One thread of each block: orders this block's slices of a token's rows, unless they aren't read.
template <class T, int kRows>
__device__ __forceinline__ void request_rows(const T* const (&rows)[kRows], int lead, const TokenRow& token, int vocab,
                                             const ClusterTeam& team, uint4* stage, int capacity, Header* header,
                                             uint64_t* arrived) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    if (token.kind != Token::kCounted) {
        *header = {token, {}, 0.f};
        barrier_expect(arrived, 0);
        return;
    }
    const Slice slice = slice_rows(rows, lead, vocab, team.rank, team.size);
    uint32_t bytes[kRows], all = 0;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        bytes[r] = slice.count > 0 ? 16u * uint32_t(slice.count + (slice.lanes_of(r) != 0)) : 0u;
        all += bytes[r];
    }
    fence_before_copy();
    *header = {token, slice, token.target < 0 ? 0.f : widen(rows[0][token.target])};
    barrier_expect(arrived, all);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        const char* const from =
            reinterpret_cast<const char*>(Vectors<T>(rows[r] + slice.split.head).aligned + slice.start);
        char* const to = reinterpret_cast<char*>(stage + r * capacity);
        for (uint32_t done = 0; done < bytes[r]; done += kCopyBytes)
            copy_bulk(to + done, from + done, min(bytes[r] - done, uint32_t(kCopyBytes)), arrived);
    }
#endif
}

// A cluster's way through its rows. rows_of(row, token, rows) says where a token's rows lie, the student's first, and
// returns the lead_of<T> of what is written; work(row, token, target logit, part) is all that happens to a counted one.
// T is the logits' type, G the gradient's.
template <class T, class G, int kRows, class RowsOf, class Work>
__device__ __forceinline__ void each_row(const LossParams& p, ClusterShared* shared, uint4* memory, int stages,
                                         int capacity, RowsOf rows_of, Work work) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    const cooperative_groups::cluster_group cluster = cooperative_groups::this_cluster();
    ClusterTeam team{shared, int(cluster.block_rank()), int(cluster.num_blocks())};
    const int64_t clusters = gridDim.x / team.size, count = p.tokens.count;
    int64_t row = blockIdx.x / team.size;

    const auto request = [&](int64_t wanted, int stage) {
        if (wanted >= count) return;
        const TokenRow token = read_token(p, wanted);
        const T* rows[kRows] = {};
        const int lead = token.kind == Token::kCounted ? rows_of(wanted, token, rows) : 0;
        request_rows(rows, lead, token, p.vocab, team, memory + stage * kRows * capacity, capacity,
                     &shared->headers[stage], &shared->arrived[stage]);
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
        const Header& header = shared->headers[stage];
        if (header.token.kind != Token::kCounted) {
            write_lossless<G>(p, row, header.token.kind, team.rank * kClusterThreads + int(threadIdx.x),
                              team.size * kClusterThreads);
        } else {
            const T* rows[kRows];
            rows_of(row, header.token, rows);
            ClusterPart<T, kRows> part{{}, memory + stage * kRows * capacity, capacity, header.slice, team};
#pragma unroll
            for (int r = 0; r < kRows; ++r) part.rows[r] = rows[r];
            work(row, header.token, header.target_logit, part);
        }
        __syncthreads();  // everybody is done with the stage
        if (threadIdx.x == 0) request(row + stages * clusters, stage);
        if (++stage == stages) stage = 0, parity ^= 1;
    }
    cluster.sync();  // nobody may leave while others write into its shared memory
#endif
}

}  // namespace pyalign::cuda
