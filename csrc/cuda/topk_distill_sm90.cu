// Distillation from a teacher's k entries on GPUs with thread-block clusters: loss and gradient for one read of each
// row and one write of the gradient. A cluster holds a row (cluster.cuh); every block has a bitmap of its own.
#include "cuda/cluster.cuh"
#include "cuda/topk_distill.cuh"

namespace pyalign::cuda {
namespace {

// Grid: clusters of any size up to kMostCluster. T is the logits' type, G the gradient's.
template <class T, class G>
__global__ void __launch_bounds__(kClusterThreads, kClusterBlocks)
    topk_distill_clusters(const TopKParams params, int stages, int capacity) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    extern __shared__ uint4 memory[];
    ClusterShared* const shared = reinterpret_cast<ClusterShared*>(memory);
    const LossParams& p = params.loss;
    const int words = int(Bitmap::words_for(p.vocab));
    uint4* const after = memory + sizeof(ClusterShared) / sizeof(uint4);
    uint32_t* const bits = reinterpret_cast<uint32_t*>(after);  // [words]
    for (int i = threadIdx.x; i < words; i += kClusterThreads) bits[i] = 0;

    const auto rows_of = [&](int64_t row, const TokenRow&, const T*(&rows)[1]) {
        rows[0] = row_pointer<const T>(p.student, row);
        return written_lead<T, G>(p, row, rows[0]);
    };
    each_row<T, G, 1>(p, shared, after + words / 4, stages, capacity, rows_of,
                      [&](int64_t row, const TokenRow& token, float target_logit, auto& part) {
                          topk_row<G>(params, row, token, target_logit, part.rows[0], part.slice.split.head, bits,
                                      part);
                      });
#endif
}

template <class T>
ClusterRoom room_for(int64_t vocab) {
    return {1, vocab, sizeof(T), sizeof(ClusterShared) + size_t(Bitmap::words_for(vocab)) * sizeof(uint32_t)};
}

}  // namespace

bool topk_distill_cluster(const TopKParams& params, Layout layout, cudaStream_t stream) {
    const LossParams& p = params.loss;
    bool launched = false;
    with_types(p.student, p.gradient, "topk_distill", [&](auto logits, auto gradient) {
        using T = decltype(logits);
        const auto kernel = topk_distill_clusters<T, decltype(gradient)>;
        const ClusterPlan plan =
            plan_clusters(current_device(), reinterpret_cast<const void*>(kernel), room_for<T>(p.vocab), layout);
        if (plan.cluster == 0) return;
        check(launch(launch_of(plan, p.tokens.count, stream), kernel, params, plan.stages, plan.capacity),
              "topk_distill_clusters");
        launched = true;
    });
    return launched;
}

std::vector<Layout> topk_distill_clusters_layouts(const Device& device, int64_t vocab, Dtype dtype) {
    std::vector<Layout> layouts;
    with_type(dtype, [&](auto type) {
        using T = decltype(type);
        const auto kernel = topk_distill_clusters<T, T>;
        layouts = layouts_of(device, reinterpret_cast<const void*>(kernel), room_for<T>(vocab));
    });
    return layouts;
}

}  // namespace pyalign::cuda
