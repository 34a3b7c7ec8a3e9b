// Dense distillation, one block per row pair: the kernel for every GPU and every length.
//
// Loss and gradient from one kernel: a row pair is read from memory once, as far as shared memory holds it, and what it
// doesn't hold is read again through L2, which plan_rows tries to make room in.
#include "cuda/distill.cuh"

namespace pyalign::cuda {
namespace {

constexpr int kMostThreads = 512;
constexpr int kFixedBytes = BlockTeam::kBytes + BlockRows<float, 2>::kEdgeBytes + sizeof(uint4);

// One block's row pair, and the block that works on it.
template <class T>
struct BlockPart {
    static constexpr int kWidth = kLanes<T>, kKept = 0;  // of a long row a block's threads could keep next to nothing

    BlockRows<T, 2> rows;
    BlockTeam& team;

    template <class Body>
    __device__ __forceinline__ void first(Body body) {
        rows.template pass<true, 2>(body);
    }
    template <class Body>
    __device__ __forceinline__ void again(Body body) {
        rows.template pass<false, 1>(body);
    }
    template <int kVectors, class Body>
    __device__ __forceinline__ void held(Body) {}
    template <int kVectors, class Body>
    __device__ __forceinline__ void beyond(Body body) {
        again(body);
    }
    template <class State, class Merger>
    __device__ __forceinline__ State merge(const State& state, const Merger& merger) {
        return team.merge(state, merger);
    }
    __device__ __forceinline__ int thread() const { return threadIdx.x; }
    __device__ __forceinline__ int threads() const { return blockDim.x; }
};

// Grid: any number of blocks, each takes every gridDim.x-th row. `kept` vectors of both rows stay in shared memory. T
// is the logits' type, G the gradient's.
template <class T, class G, class D>
__global__ void __launch_bounds__(kMostThreads, 1) distill_rows(const DistillParams params, int kept) {
    extern __shared__ uint4 shared[];
    char* const fixed = reinterpret_cast<char*>(shared);
    BlockTeam team{fixed};
    float* const edges = reinterpret_cast<float*>(fixed + BlockTeam::kBytes);  // [2, 32]
    Note* const note = reinterpret_cast<Note*>(fixed + kFixedBytes - sizeof(uint4));
    uint4* const cache = shared + kFixedBytes / sizeof(uint4);  // [2, kept]
    const LossParams& p = params.loss;

    for (int64_t row = blockIdx.x; row < p.tokens.count; row += gridDim.x) {
        const TokenRow token = read_token(p, row);
        if (token.kind != Token::kCounted) {
            write_lossless<G>(p, row, token.kind, threadIdx.x, blockDim.x);
            continue;
        }
        const T* const student = row_pointer<const T>(p.student, row);                 // [vocab]
        const T* const teacher = row_pointer<const T>(params.teacher, token.teacher);  // [vocab]
        const int lead = written_lead<T, G>(p, row, student);
        const float target_logit = token.target < 0 ? 0.f : widen(student[token.target]);
        BlockPart<T> part{{{student, teacher}, p.vocab, lead, edges, cache, kept}, team};
        distill_row<G, D>(params, row, token, target_logit, part, note);
    }
}

template <class T, class G, class D>
void launch_rows(const DistillParams& params, cudaStream_t stream) {
    const LossParams& p = params.loss;
    const RowPlan plan =
        plan_rows(current_device(), 2, p.vocab, sizeof(T), {1, kMostThreads}, kFixedBytes, p.tokens.count);
    check(launch({plan.blocks, plan.threads, plan.shared, stream}, distill_rows<T, G, D>, params, plan.kept),
          "distill_rows");
}

}  // namespace

void distill(const DistillArgs& args, cudaStream_t stream) {
    if (args.teacher.dtype != args.student.dtype)
        throw std::invalid_argument("distill: student and teacher logits must have one dtype on a GPU");
    const DistillParams params{prepare_loss(args.student, args.tokens, args.out, args.options, stream), args.teacher};
    const bool by_cluster = args.tokens.count > 0 && args.layout.cluster != Layout::kOneBlock &&
                            distill_cluster(params, args.layout, stream);
    if (args.tokens.count > 0 && !by_cluster) {
        refuse_cluster(args.layout, "distill", params.loss.vocab);
        with_types(args.student, args.out.gradient, "distill", [&](auto logits, auto gradient) {
            with_divergence(args.options.divergence, params.loss.beta, [&](auto divergence) {
                launch_rows<decltype(logits), decltype(gradient), decltype(divergence)>(params, stream);
            });
        });
    }
    reduce_loss(params.loss, args.out, stream);
}

std::vector<Layout> distill_layouts(int64_t vocab, Dtype dtype, Divergence divergence, int index) {
    element_size(dtype, "distill_layouts");
    return on_device(index, "distill_layouts",
                     [&](const Device& device) { return distill_clusters_layouts(device, vocab, dtype, divergence); });
}

std::string explain_distill(int64_t vocab, Dtype dtype, Layout layout, int index) {
    const Device& device = device_at(index);
    const std::string cluster = on_device(index, "explain_distill", [&](const Device& where) {
        return layout.cluster == Layout::kOneBlock ? std::string() : explain_cluster(where, vocab, dtype, layout);
    });
    if (!cluster.empty()) return cluster;
    const int size = element_size(dtype, "distill");
    const RowPlan plan = plan_rows(device, 2, vocab, size, {1, kMostThreads}, kFixedBytes, int64_t{1} << 40);
    const int64_t kept = int64_t{plan.kept} * 16 * 2, all = 2 * vocab * size;
    return "distill_rows: a block of " + std::to_string(plan.threads) + " threads per row pair, " +
           std::to_string(plan.blocks_per_processor) + " per multiprocessor, " +
           std::to_string(100 * (kept < all ? kept : all) / all) + " % of it in shared memory";
}

#if !defined(PYALIGN_HAVE_SM90)
bool distill_cluster(const DistillParams&, Layout, cudaStream_t) { return false; }
std::string explain_cluster(const Device&, int64_t, Dtype, Layout) { return {}; }
std::vector<Layout> distill_clusters_layouts(const Device&, int64_t, Dtype, Divergence) {
    return {{Layout::kOneBlock, 0}};
}
#endif

}  // namespace pyalign::cuda
