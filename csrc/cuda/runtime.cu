// The host's side of every launch: device properties, errors, the layout of row kernels.
#include <algorithm>
#include <mutex>
#include <vector>

#include "cuda/common.cuh"

namespace pyalign::cuda {

void check(cudaError_t status, const std::string& what, const char* file, int line) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // a launch that failed leaves the runtime usable
    throw CudaError(what + ": " + cudaGetErrorString(status) + " (" + cudaGetErrorName(status) + ", " + file + ":" +
                    std::to_string(line) + ")");
}

int element_size(Dtype dtype, const char* op) {
    if (dtype == Dtype::kFloat32) return 4;
    if (dtype == Dtype::kBFloat16 || dtype == Dtype::kFloat16) return 2;
    throw std::invalid_argument(std::string(op) + ": float64 logits have no CUDA kernel; use the reference backend");
}

void refuse_cluster(const Layout& layout, const char* op, int64_t vocab) {
    if (layout.cluster == Layout::kByRule || layout.cluster == Layout::kOneBlock) return;
    throw std::invalid_argument(std::string(op) + ": layout: got a cluster of " + std::to_string(layout.cluster) +
                                " with stages " + std::to_string(layout.stages) + "; wanted one of " + op +
                                "_layouts() for rows of " + std::to_string(vocab));
}

const Device& device_at(int index) {
    static std::mutex mutex;
    static std::vector<Device*> devices;  // never freed: launches may outlive static destruction
    const std::lock_guard<std::mutex> lock(mutex);
    if (index >= int(devices.size())) devices.resize(size_t(index) + 1, nullptr);
    if (!devices[size_t(index)]) {
        Device device{};
        device.index = index;
        const auto read = [index](int& value, cudaDeviceAttr attribute) {
            check(cudaDeviceGetAttribute(&value, attribute, index), "device properties");
        };
        read(device.major, cudaDevAttrComputeCapabilityMajor);
        read(device.processors, cudaDevAttrMultiProcessorCount);
        read(device.l2, cudaDevAttrL2CacheSize);
        read(device.shared_per_processor, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
        read(device.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
        read(device.shared_reserved, cudaDevAttrReservedSharedMemoryPerBlock);
        devices[size_t(index)] = new Device(device);
    }
    return *devices[size_t(index)];
}

const Device& current_device() {
    int index = 0;
    check(cudaGetDevice(&index), "current device");
    return device_at(index);
}

namespace {

// The least power of two that leaves a thread no more than 12 vectors, in a range.
int threads_for(int64_t vectors, ThreadRange range) {
    int threads = 64;
    while (threads < range.most && (threads < range.least || threads * int64_t{12} < vectors)) threads *= 2;
    return threads;
}

}  // namespace

// Short rows: several blocks of a few warps on every multiprocessor. Long rows: fewer and larger blocks, so that what
// the blocks at work don't keep in shared memory stays in L2 until it is read again.
RowPlan plan_rows(const Device& device, int rows, int64_t vocab, int element_size, ThreadRange threads, size_t fixed,
                  int64_t count) {
    const int64_t vectors = vocab * element_size / 16 + 1;
    RowPlan plan{};
    plan.threads = threads_for(vectors, threads);

    int64_t kept = 0, room = 0;
    for (;; plan.threads *= 2) {
        plan.blocks_per_processor = std::min(threads.most / plan.threads, 16);
        room = std::min<int64_t>(device.shared_per_block,
                                 device.shared_per_processor / plan.blocks_per_processor - device.shared_reserved) -
               int64_t(fixed);
        if (room < 0 && plan.threads < threads.most) continue;
        kept = std::clamp<int64_t>(room / (16 * rows), 0, vectors);
        const int64_t in_flight = int64_t{device.processors} * plan.blocks_per_processor;
        const int64_t again = in_flight * (vectors - kept) * rows * 16;
        if (plan.threads == threads.most || again <= device.l2 / 2) break;
    }
    plan.kept = int(kept);
    plan.shared = fixed + size_t(kept) * size_t(rows) * 16;
    plan.blocks = std::min(count, int64_t{device.processors} * plan.blocks_per_processor);
    return plan;
}

RowPlan plan_stream(const Device& device, int64_t vocab, int element_size, ThreadRange threads, int per_processor,
                    SharedBytes shared, int64_t count) {
    RowPlan plan{};
    plan.threads = threads_for(vocab * element_size / 16 + 1, threads);
    plan.shared = shared.fixed + shared.per_thread * size_t(plan.threads);
    const int fit = device.shared_per_processor / (int(plan.shared) + device.shared_reserved);
    plan.blocks_per_processor = std::min({per_processor / plan.threads, 16, fit});
    plan.blocks = std::min(count, int64_t{device.processors} * plan.blocks_per_processor);
    return plan;
}

}  // namespace pyalign::cuda
