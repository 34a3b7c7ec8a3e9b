// How rows are laid out in clusters: by the rule, or as the caller says.
#include <map>
#include <mutex>
#include <tuple>

#include "cuda/cluster.cuh"

namespace pyalign::cuda {
namespace {

constexpr int64_t kLeastBytes = 8 << 10;  // a row shorter than this is one block's work

int64_t active_clusters(const Device& device, const void* kernel, int cluster, size_t shared) {
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
    config.blockDim = dim3(kClusterThreads);
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

// Of a given cluster size, whose blocks have room for `stages` times the rows.
ClusterPlan lay_out(const Device& device, const void* kernel, const ClusterRoom& room, Layout layout) {
    const auto [cluster, stages] = layout;
    const bool known = cluster >= 1 && cluster <= kMostCluster && (cluster & (cluster - 1)) == 0 && stages >= 1 &&
                       stages <= kMostStages;
    const int64_t bytes = room.vocab * room.element_size;
    if (!known || device.major < 9 || bytes < kLeastBytes) return {};
    const int64_t capacity = (bytes / 16 + cluster - 1) / cluster + 1;
    const int64_t shared = int64_t(room.fixed) + stages * room.rows * capacity * int64_t(sizeof(uint4));
    if (shared > device.shared_per_block) return {};
    const int64_t clusters = active_clusters(device, kernel, cluster, size_t(shared));
    if (clusters == 0) return {};
    return {cluster, stages, int(capacity), size_t(shared), clusters};
}

// The rule. Best are two blocks on a multiprocessor, each with a row at work and one on its way; the smallest such
// cluster, because barriers cost more the more blocks they join. Longer rows do without the one or the other.
ClusterPlan make_plan(const Device& device, const void* kernel, const ClusterRoom& room) {
    struct Wish {
        int blocks, stages;
    };
    for (const Wish wish : {Wish{2, 2}, Wish{2, 1}, Wish{1, 2}, Wish{1, 1}}) {
        for (int cluster = 1; cluster <= kMostCluster; cluster *= 2) {
            const ClusterPlan plan = lay_out(device, kernel, room, {cluster, wish.stages});
            const int64_t on_processor = wish.blocks * (int64_t(plan.shared) + device.shared_reserved);
            if (plan.cluster > 0 && on_processor <= device.shared_per_processor &&
                2 * plan.clusters * cluster >= int64_t{wish.blocks} * device.processors)
                return plan;
        }
    }
    return {};
}

}  // namespace

ClusterPlan plan_clusters(const Device& device, const void* kernel, const ClusterRoom& room, Layout layout) {
    static std::mutex mutex;
    static auto& plans = *new std::map<std::tuple<int, const void*, int64_t, int, int>, ClusterPlan>;
    const std::lock_guard<std::mutex> lock(mutex);
    const auto [place, is_new] = plans.try_emplace({device.index, kernel, room.vocab, layout.cluster, layout.stages});
    if (is_new)
        place->second =
            layout.cluster == Layout::kByRule ? make_plan(device, kernel, room) : lay_out(device, kernel, room, layout);
    return place->second;
}

std::vector<Layout> layouts_of(const Device& device, const void* kernel, const ClusterRoom& room) {
    std::vector<Layout> layouts{{Layout::kOneBlock, 0}};  // the rule's, where it wants no cluster
    const ClusterPlan rule = plan_clusters(device, kernel, room, Layout{});
    for (int cluster = 1; cluster <= kMostCluster; cluster *= 2) {
        for (int stages = kMostStages; stages >= 1; --stages) {
            if (plan_clusters(device, kernel, room, {cluster, stages}).cluster == 0) continue;
            const bool is_rule = cluster == rule.cluster && stages == rule.stages;
            layouts.insert(is_rule ? layouts.begin() : layouts.end(), Layout{cluster, stages});
        }
    }
    return layouts;
}

std::string describe(const ClusterPlan& plan) {
    return "a cluster of " + std::to_string(plan.cluster) + ", " + std::to_string(plan.stages) +
           (plan.stages == 1 ? " stage, " : " stages, ") + std::to_string(plan.shared) +
           " bytes of shared memory a block, " + std::to_string(plan.clusters) + " clusters at once";
}

}  // namespace pyalign::cuda
