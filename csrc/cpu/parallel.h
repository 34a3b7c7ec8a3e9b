// Work split over threads, and their scratch memory. Not for code that is compiled per instruction set.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <sys/mman.h>
#endif

namespace pyalign::cpu {

// The pool's threads don't survive a fork, and waiting for them would hang: a child works alone.
inline std::atomic<bool> forked{false};

[[maybe_unused]] inline const bool watching_forks = [] {
#if defined(__unix__) || defined(__APPLE__)
    pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif
    return true;
}();

struct Deleter {
    void operator()(std::byte* data) const { ::operator delete[](data, std::align_val_t(64)); }
};

// This thread's scratch memory, kept for the next call.
inline std::byte* scratch(size_t bytes) {
    thread_local std::unique_ptr<std::byte[], Deleter> memory;
    thread_local size_t size = 0;
    if (size < bytes) {
        memory.reset(static_cast<std::byte*>(::operator new[](bytes, std::align_val_t(64))));
        size = bytes;
    }
    return memory.get();
}

// Rows per piece: enough for balance between threads (rows may be masked), and long, so that a row is being fetched
// while the one before it is worked on.
inline int64_t grain_of(int64_t rows, int64_t work_per_row, int threads) {
    const int64_t least = 1 + 65536 / (work_per_row + 1), fair = rows / (32 * threads);
    return fair > least ? fair : least;
}

// Asks for huge pages where a large result lies. Of a fresh one the system clears every page when it is first written,
// and in pages of 4 KiB that takes longer than the result; memory that is in use already stays as it is.
inline void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(MADV_HUGEPAGE)
    constexpr uintptr_t kPage = uintptr_t{2} << 20;
    const uintptr_t start = reinterpret_cast<uintptr_t>(data);
    const uintptr_t begin = (start + kPage - 1) / kPage * kPage, end = (start + bytes) / kPage * kPage;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Calls body(begin, end, scratch) for pieces of [0, rows), `grain` rows each. An exception can't leave a parallel
// region: the only one possible, of memory, is thrown again outside.
template <class Body>
void parallel(int64_t rows, int64_t grain, int64_t work_per_row, size_t scratch_bytes, int threads, Body body) {
    constexpr int64_t kWorthAThread = 16384;
    const int64_t pieces = (rows + grain - 1) / grain;
    if (forked || rows * work_per_row < kWorthAThread) threads = 1;
    if (threads > pieces) threads = static_cast<int>(pieces);
    std::atomic<bool> out_of_memory{false};
    const auto piece = [&](int64_t i) {
        try {
            const int64_t end = (i + 1) * grain;
            body(i * grain, end < rows ? end : rows, scratch(scratch_bytes));
        } catch (const std::bad_alloc&) {
            out_of_memory = true;
        }
    };
    if (threads <= 1) {
        for (int64_t i = 0; i < pieces; ++i) piece(i);
    } else {
#if defined(_OPENMP)
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
#endif
        for (int64_t i = 0; i < pieces; ++i) piece(i);
    }
    if (out_of_memory) throw std::bad_alloc();
}

}  // namespace pyalign::cpu
