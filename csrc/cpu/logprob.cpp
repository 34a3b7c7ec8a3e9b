// Log-probs, entropies and cross-entropies of rows of logits on the CPU: the split of rows over threads, the check of
// targets.
#include "cpu/cpu.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace pyalign::cpu {

void logprob(const LogprobArgs& args, int threads) {
    const int64_t count = args.count, vocab = args.options.vocab;
    for (int64_t row = 0; row < count; ++row) {
        const int64_t target = args.targets[row];
        if (target == args.ignore_index || target == kElsewhere) continue;
        if (target < 0 || target >= vocab) refuse("targets", row, target, vocab);
    }
    const bool stream = begin_stream(args.gradient, args.logits, count * vocab);
    parallel(count, grain_of(count, vocab, threads), vocab, kernels().logprob_scratch(args), threads,
             [&](int64_t begin, int64_t end, std::byte* memory) {
                 kernels().logprob(args, Span{begin, end, memory, stream});
             });
}

}  // namespace pyalign::cpu
