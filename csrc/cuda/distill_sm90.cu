// Dense distillation on GPUs with thread-block clusters: loss and gradient for one read of each row and one write of
// the gradient. A cluster holds a row pair (cluster.cuh).
#include "cuda/cluster.cuh"
#include "cuda/distill.cuh"

namespace pyalign::cuda {
namespace {

// Grid: clusters of any size up to kMostCluster. T is the logits' type, G the gradient's.
template <class T, class G, class D>
__global__ void __launch_bounds__(kClusterThreads, kClusterBlocks)
    distill_clusters(const DistillParams params, int stages, int capacity) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    extern __shared__ uint4 memory[];
    ClusterShared* const shared = reinterpret_cast<ClusterShared*>(memory);
    const LossParams& p = params.loss;
    const auto rows_of = [&](int64_t row, const TokenRow& token, const T*(&rows)[2]) {
        rows[0] = row_pointer<const T>(p.student, row);
        rows[1] = row_pointer<const T>(params.teacher, token.teacher);
        return written_lead<T, G>(p, row, rows[0]);
    };
    each_row<T, G, 2>(p, shared, memory + sizeof(ClusterShared) / sizeof(uint4), stages, capacity, rows_of,
                      [&](int64_t row, const TokenRow& token, float target_logit, auto& part) {
                          distill_row<G, D>(params, row, token, target_logit, part, &shared->note);
                      });
#endif
}

using Kernel = void (*)(DistillParams, int, int);

template <class T, class G>
Kernel kernel_for(Divergence divergence) {
    return with_divergence(divergence, 0.5f, [](auto d) -> Kernel { return distill_clusters<T, G, decltype(d)>; });
}

template <class T>
ClusterRoom room_for(int64_t vocab) {
    return {2, vocab, sizeof(T), sizeof(ClusterShared)};
}

template <class T>
ClusterPlan plan_for(const Device& device, Kernel kernel, int64_t vocab, Layout layout) {
    return plan_clusters(device, reinterpret_cast<const void*>(kernel), room_for<T>(vocab), layout);
}

}  // namespace

bool distill_cluster(const DistillParams& params, Layout layout, cudaStream_t stream) {
    const LossParams& p = params.loss;
    bool launched = false;
    with_types(p.student, p.gradient, "distill", [&](auto logits, auto gradient) {
        using T = decltype(logits);
        const Kernel kernel = kernel_for<T, decltype(gradient)>(p.divergence);
        const ClusterPlan plan = plan_for<T>(current_device(), kernel, p.vocab, layout);
        if (plan.cluster == 0) return;
        check(launch(launch_of(plan, p.tokens.count, stream), kernel, params, plan.stages, plan.capacity),
              "distill_clusters");
        launched = true;
    });
    return launched;
}

std::vector<Layout> distill_clusters_layouts(const Device& device, int64_t vocab, Dtype dtype, Divergence divergence) {
    std::vector<Layout> layouts;
    with_type(dtype, [&](auto type) {
        using T = decltype(type);
        const Kernel kernel = kernel_for<T, T>(divergence);
        layouts = layouts_of(device, reinterpret_cast<const void*>(kernel), room_for<T>(vocab));
    });
    return layouts;
}

std::string explain_cluster(const Device& device, int64_t vocab, Dtype dtype, Layout layout) {
    std::string text;
    with_type(dtype, [&](auto type) {
        using T = decltype(type);
        const ClusterPlan plan = plan_for<T>(device, kernel_for<T, T>(Divergence::kForwardKL), vocab, layout);
        if (plan.cluster > 0) text = "distill_clusters: a row pair held by " + describe(plan);
    });
    return text;
}

}  // namespace pyalign::cuda
