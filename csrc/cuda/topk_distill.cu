// Distillation from a teacher's k entries, one block per row: the kernel for every GPU. A row is read from memory once,
// as far as shared memory holds it, and what it doesn't hold is read again through L2, which plan_rows tries to make
// room in.
#include "cuda/topk_distill.cuh"

namespace pyalign::cuda {
namespace {

constexpr int kMostThreads = 512;

struct alignas(16) Shared {
    char slots[BlockTeam::kBytes];
    float edges[kWarp];
};

// One block's row, and the block that works on it.
template <class T>
struct BlockPart {
    static constexpr bool kSkips = true;

    BlockRows<T, 1> rows;
    BlockTeam& team;

    template <class Body>
    __device__ __forceinline__ void first(Body body) {
        rows.template pass<true, 2>(body);
    }
    template <class Body>
    __device__ __forceinline__ void again(Body body) {
        rows.template pass<false, 1>(body);
    }
    template <class Body>
    __device__ __forceinline__ void positions(Body body) const {
        rows.positions(body);
    }
    template <class State, class Merger>
    __device__ __forceinline__ State merge(const State& state, const Merger& merger) {
        return team.merge(state, merger);
    }
    __device__ __forceinline__ bool is_first() const { return true; }
    __device__ __forceinline__ int thread() const { return threadIdx.x; }
    __device__ __forceinline__ int threads() const { return blockDim.x; }
};

// Grid: any number of blocks, each takes every gridDim.x-th row. `kept` vectors of the row stay in shared memory. T is
// the logits' type, G the gradient's.
template <class T, class G>
__global__ void __launch_bounds__(kMostThreads, 1) topk_distill_rows(const TopKParams params, int kept) {
    extern __shared__ uint4 memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const LossParams& p = params.loss;
    const int words = int(Bitmap::words_for(p.vocab));
    uint32_t* const bits = reinterpret_cast<uint32_t*>(memory + sizeof(Shared) / sizeof(uint4));  // [words]
    uint4* const cache = memory + sizeof(Shared) / sizeof(uint4) + words / 4;                     // [kept]
    BlockTeam team{shared.slots};
    for (int i = threadIdx.x; i < words; i += blockDim.x) bits[i] = 0;

    for (int64_t row = blockIdx.x; row < p.tokens.count; row += gridDim.x) {
        const TokenRow token = read_token(p, row);
        if (token.kind != Token::kCounted) {
            write_lossless<G>(p, row, token.kind, threadIdx.x, blockDim.x);
            continue;
        }
        const T* const student = row_pointer<const T>(p.student, row);  // [vocab]
        const float target_logit = token.target < 0 ? 0.f : widen(student[token.target]);
        BlockPart<T> part{{{student}, p.vocab, written_lead<T, G>(p, row, student), shared.edges, cache, kept}, team};
        topk_row<G>(params, row, token, target_logit, student, part.rows.split.head, bits, part);
    }
}

}  // namespace

void topk_distill(const TopKDistillArgs& args, cudaStream_t stream) {
    const TopKParams params{prepare_loss(args.student, args.tokens, args.out, args.options, stream), args.teacher,
                            args.tail};
    const Device& device = current_device();
    const int64_t fixed = int64_t(sizeof(Shared)) + Bitmap::words_for(args.options.vocab) * 4;
    if (fixed > device.shared_per_block)
        throw std::invalid_argument("vocab: got " + std::to_string(args.options.vocab) +
                                    "; this GPU's shared memory marks " + "the entries of at most " +
                                    std::to_string((device.shared_per_block - int64_t(sizeof(Shared)) - 32) * 8));
    // Without a row to hold, one block writes it, whatever the layout.
    const bool reads = reads_row(params.loss, args.tail, params.loss.hard_weight > 0);
    const bool by_cluster = args.tokens.count > 0 && reads && args.layout.cluster != Layout::kOneBlock &&
                            topk_distill_cluster(params, args.layout, stream);
    if (args.tokens.count > 0 && !by_cluster) {
        if (reads) refuse_cluster(args.layout, "topk_distill", params.loss.vocab);
        with_types(args.student, args.out.gradient, "topk_distill", [&](auto logits, auto gradient) {
            using T = decltype(logits);
            const RowPlan plan = plan_rows(device, 1, args.options.vocab, sizeof(T), {64, kMostThreads}, size_t(fixed),
                                           args.tokens.count);
            check(launch({plan.blocks, plan.threads, plan.shared, stream}, topk_distill_rows<T, decltype(gradient)>,
                         params, plan.kept),
                  "topk_distill_rows");
        });
    }
    reduce_loss(params.loss, args.out, stream);
}

std::vector<Layout> topk_distill_layouts(int64_t vocab, Dtype dtype, int index) {
    element_size(dtype, "topk_distill_layouts");
    return on_device(index, "topk_distill_layouts",
                     [&](const Device& device) { return topk_distill_clusters_layouts(device, vocab, dtype); });
}

#if !defined(PYALIGN_HAVE_SM90)
bool topk_distill_cluster(const TopKParams&, Layout, cudaStream_t) { return false; }
std::vector<Layout> topk_distill_clusters_layouts(const Device&, int64_t, Dtype) { return {{Layout::kOneBlock, 0}}; }
#endif

}  // namespace pyalign::cuda
