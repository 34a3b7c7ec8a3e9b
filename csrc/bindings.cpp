// pyalign._C: pointers, sizes and strides in, nothing of torch. One registration function per system and engine.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <cstdlib>
#include <sstream>
#include <string>
#include <vector>

#include "cpu/cpu.h"
#if defined(PYALIGN_WITH_CUDA)
#include "cuda/cuda.h"
#endif

namespace py = pybind11;

namespace {

using namespace pyalign;

// ---- Python tuples to argument structs; pyalign/_native.py makes them ----

template <class T>
T* pointer(py::handle address) {
    return reinterpret_cast<T*>(address.cast<uintptr_t>());
}

Rows rows(const py::tuple& t) {  // (pointer, dtype, inner, outer_stride, inner_stride)
    return {pointer<void>(t[0]), static_cast<Dtype>(t[1].cast<int>()), t[2].cast<int64_t>(), t[3].cast<int64_t>(),
            t[4].cast<int64_t>()};
}

// (count, mask, labels, teacher_rows, weight, targets, ignore_index, teacher_count, reduction, num_items, upstream)
Tokens tokens(const py::tuple& t) {
    Tokens x;
    x.count = t[0].cast<int64_t>();
    x.mask = pointer<const uint8_t>(t[1]);
    x.labels = pointer<const int64_t>(t[2]);
    x.teacher_rows = pointer<const int64_t>(t[3]);
    x.weight = pointer<const void>(t[4]);
    x.targets = pointer<const int64_t>(t[5]);
    x.ignore_index = t[6].cast<int64_t>();
    x.teacher_count = t[7].cast<int64_t>();
    x.reduction = static_cast<Reduction>(t[8].cast<int>());
    x.num_items = pointer<const void>(t[9]);
    x.upstream = pointer<const void>(t[10]);
    return x;
}

// (gradient rows, width, loss, row_loss, denominator, entropy, agreement)
Outputs outputs(const py::tuple& t) {
    return {rows(t[0]),          t[1].cast<int64_t>(), pointer<void>(t[2]),   pointer<void>(t[3]),
            pointer<void>(t[4]), pointer<void>(t[5]),  pointer<uint8_t>(t[6])};
}

// (vocab, divergence, beta, temperature, temperature_squared, hard_weight)
DistillOptions options(const py::tuple& t) {
    return {t[0].cast<int64_t>(), static_cast<Divergence>(t[1].cast<int>()),
            t[2].cast<double>(),  t[3].cast<double>(),
            t[4].cast<bool>(),    t[5].cast<double>()};
}

// (stage, states, sums)
Split split(const py::tuple& t) {
    return {static_cast<Stage>(t[0].cast<int>()), pointer<double>(t[1]), pointer<double>(t[2])};
}

// logits, (count, vocab, k, mask, indices, temperature), (states, exponentials, values), gradient, width
OutsideArgs outside_args(const py::tuple& logits, const py::tuple& t, const py::tuple& in_out,
                         const py::tuple& gradient, int64_t width) {
    return {rows(logits),
            t[0].cast<int64_t>(),
            t[1].cast<int64_t>(),
            t[2].cast<int64_t>(),
            pointer<const uint8_t>(t[3]),
            pointer<const int64_t>(t[4]),
            t[5].cast<double>(),
            pointer<double>(in_out[0]),
            pointer<const double>(in_out[1]),
            pointer<const double>(in_out[2]),
            rows(gradient),
            width};
}

// (k, logprobs, indices, residual, dtype, residual_dtype, wide_indices)
TopK top_k(const py::tuple& t) {
    return {t[0].cast<int64_t>(),
            pointer<const void>(t[1]),
            pointer<const void>(t[2]),
            pointer<const void>(t[3]),
            static_cast<Dtype>(t[4].cast<int>()),
            static_cast<Dtype>(t[5].cast<int>()),
            t[6].cast<bool>()};
}

// The same functions over either engine; `Execution` is a thread count or a stream.
template <class Execution, class Distill, class TopKDistill, class TopKFunction, class Scale>
void register_distill(py::module_& m, Distill distill, TopKDistill topk_distill, TopKFunction topk, Scale scale) {
    const auto execution = [](uintptr_t x) { return (Execution)x; };
    m.def("distill", [=](const py::tuple& student, const py::tuple& teacher, const py::tuple& token,
                         const py::tuple& out, const py::tuple& option, uintptr_t on) {
        const DistillArgs args{rows(student),   rows(teacher), tokens(token), outputs(out),
                               options(option), Split{},       Layout{}};
        py::gil_scoped_release release;
        distill(args, execution(on));
    });
    m.def("topk_distill", [=](const py::tuple& student, const py::tuple& teacher, int tail, const py::tuple& token,
                              const py::tuple& out, const py::tuple& option, uintptr_t on) {
        const TopKDistillArgs args{rows(student), top_k(teacher), static_cast<Tail>(tail),
                                   tokens(token), outputs(out),   options(option),
                                   Layout{}};
        py::gil_scoped_release release;
        topk_distill(args, execution(on));
    });
    m.def("topk", [=](const py::tuple& logits, int64_t count, int64_t vocab, int64_t k, double temperature,
                      uintptr_t logprobs, uintptr_t indices, uintptr_t residual, uintptr_t on) {
        const TopKArgs args{rows(logits),
                            count,
                            vocab,
                            k,
                            temperature,
                            reinterpret_cast<void*>(logprobs),
                            reinterpret_cast<int64_t*>(indices),
                            reinterpret_cast<void*>(residual)};
        py::gil_scoped_release release;
        topk(args, execution(on));
    });
    m.def("scale", [=](const py::tuple& matrix, int64_t count, int64_t width, uintptr_t factor, uintptr_t on) {
        const Rows x = rows(matrix);
        py::gil_scoped_release release;
        scale(x, count, width, reinterpret_cast<const void*>(factor), execution(on));
    });
}

// ---- Ranking ----

// (loss, scale, margin, label_smoothing, center, tau, delta, positive_weight, negative_weight)
PairOptions pair_options(const py::tuple& t) {
    const double smoothing = t[3].cast<double>();
    return {static_cast<PairLoss>(t[0].cast<int>()),
            t[1].cast<double>(),
            t[2].cast<double>(),
            smoothing,
            t[4].cast<double>(),
            t[5].cast<double>(),
            t[6].cast<double>(),
            t[7].cast<double>(),
            t[8].cast<double>(),
            std::log1p(-smoothing),
            std::log(smoothing)};
}

// (count, dtype, first, second, first_reference, second_reference, margin, labels, weight, mask, num_items,
//  margin_stride, reduction), options, (loss, denominator, first_gradient, second_gradient, first_reward,
//  second_reward, block_sums, ticket)
PairArgs pair_args(const py::tuple& t, const py::tuple& option, const py::tuple& out) {
    return {t[0].cast<int64_t>(),         static_cast<Dtype>(t[1].cast<int>()),
            pointer<const void>(t[2]),    pointer<const void>(t[3]),
            pointer<const void>(t[4]),    pointer<const void>(t[5]),
            pointer<const void>(t[6]),    t[11].cast<int64_t>(),
            pointer<const uint8_t>(t[7]), pointer<const void>(t[8]),
            pointer<const uint8_t>(t[9]), static_cast<Reduction>(t[12].cast<int>()),
            pointer<const void>(t[10]),   pair_options(option),
            pointer<void>(out[0]),        pointer<void>(out[1]),
            pointer<void>(out[2]),        pointer<void>(out[3]),
            pointer<void>(out[4]),        pointer<void>(out[5]),
            pointer<void>(out[6]),        pointer<int32_t>(out[7])};
}

// (groups, size, count, dtype, scores, ranks, offsets, reduction, num_items),
// (method, scale, margin, label_smoothing, over_groups), (loss, denominator, gradient, group_loss,
// rows, stages, sorted, counters)
RankArgs rank_args(const py::tuple& t, const py::tuple& o, const py::tuple& out) {
    return {t[0].cast<int64_t>(),
            t[1].cast<int64_t>(),
            t[2].cast<int64_t>(),
            static_cast<Dtype>(t[3].cast<int>()),
            pointer<const void>(t[4]),
            pointer<const int64_t>(t[5]),
            pointer<const int64_t>(t[6]),
            static_cast<Reduction>(t[7].cast<int>()),
            pointer<const void>(t[8]),
            {static_cast<RankMethod>(o[0].cast<int>()), o[1].cast<double>(), o[2].cast<double>(), o[3].cast<double>(),
             o[4].cast<bool>()},
            pointer<void>(out[0]),
            pointer<void>(out[1]),
            pointer<void>(out[2]),
            pointer<void>(out[3]),
            pointer<void>(out[4]),
            pointer<void>(out[5]),
            pointer<void>(out[6]),
            pointer<int32_t>(out[7])};
}

// (count, groups, size, dtype, gradient, second_gradient, upstream, per_group, offsets, denominator, result,
//  second_result)
ScoreGradientArgs score_gradient_args(const py::tuple& t) {
    return {t[0].cast<int64_t>(),         t[1].cast<int64_t>(),
            t[2].cast<int64_t>(),         static_cast<Dtype>(t[3].cast<int>()),
            pointer<const void>(t[4]),    pointer<const void>(t[5]),
            pointer<const void>(t[6]),    t[7].cast<bool>(),
            pointer<const int64_t>(t[8]), pointer<const void>(t[9]),
            pointer<void>(t[10]),         pointer<void>(t[11])};
}

template <class Execution, class PairLossFunction, class RankedLoss, class ScoreGradient>
void register_ranking(py::module_& m, PairLossFunction pair_loss, RankedLoss ranked_loss,
                      ScoreGradient score_gradient) {
    const auto execution = [](uintptr_t x) { return (Execution)x; };
    m.def("pair_loss", [=](const py::tuple& in, const py::tuple& option, const py::tuple& out, uintptr_t on) {
        const PairArgs args = pair_args(in, option, out);
        py::gil_scoped_release release;
        pair_loss(args, execution(on));
    });
    m.def("ranked_loss", [=](const py::tuple& in, const py::tuple& option, const py::tuple& out, uintptr_t on) {
        const RankArgs args = rank_args(in, option, out);
        py::gil_scoped_release release;
        ranked_loss(args, execution(on));
    });
    m.def("score_gradient", [=](const py::tuple& in, uintptr_t on) {
        const ScoreGradientArgs args = score_gradient_args(in);
        py::gil_scoped_release release;
        score_gradient(args, execution(on));
    });
}

// ---- Log-probs ----

// logits, gradient, (count, targets, ignore_index, given_state, upstream_logprob, upstream_entropy, factor),
// (vocab, temperature, softcap, label_smoothing, z_loss, whole_vocab), (logprob, entropy, state, row_loss, above)
LogprobArgs logprob_args(const py::tuple& logits, const py::tuple& gradient, const py::tuple& t, const py::tuple& o,
                         const py::tuple& out) {
    return {rows(logits),
            rows(gradient),
            t[0].cast<int64_t>(),
            pointer<const int64_t>(t[1]),
            t[2].cast<int64_t>(),
            pointer<const void>(t[3]),
            pointer<const void>(t[4]),
            pointer<const void>(t[5]),
            pointer<const void>(t[6]),
            {o[0].cast<int64_t>(), o[1].cast<double>(), o[2].cast<double>(), o[3].cast<double>(), o[4].cast<double>(),
             o[5].cast<int64_t>()},
            pointer<void>(out[0]),
            pointer<void>(out[1]),
            pointer<void>(out[2]),
            pointer<void>(out[3]),
            pointer<void>(out[4])};
}

template <class Execution, class Logprob>
void register_logprob(py::module_& m, Logprob logprob) {
    m.def("logprob", [=](const py::tuple& logits, const py::tuple& gradient, const py::tuple& in,
                         const py::tuple& option, const py::tuple& out, uintptr_t on) {
        const LogprobArgs args = logprob_args(logits, gradient, in, option, out);
        py::gil_scoped_release release;
        logprob(args, (Execution)on);
    });
}

// ---- Scoring ----

// hidden, (count, width, sequences, heads, offsets, mask, length, head, bias), (last, scores)
RewardArgs reward_args(const py::tuple& hidden, const py::tuple& t, const py::tuple& out) {
    return {rows(hidden),
            t[0].cast<int64_t>(),
            t[1].cast<int64_t>(),
            t[2].cast<int64_t>(),
            t[3].cast<int64_t>(),
            pointer<const int64_t>(t[4]),
            pointer<const uint8_t>(t[5]),
            t[6].cast<int64_t>(),
            pointer<const void>(t[7]),
            pointer<const void>(t[8]),
            pointer<int64_t>(out[0]),
            pointer<void>(out[1])};
}

// hidden, (dtype, count, width, sequences, heads, last, head, upstream), (hidden, head, bias gradients)
RewardGradientArgs reward_gradient_args(const py::tuple& hidden, const py::tuple& t, const py::tuple& out) {
    return {rows(hidden),
            static_cast<Dtype>(t[0].cast<int>()),
            t[1].cast<int64_t>(),
            t[2].cast<int64_t>(),
            t[3].cast<int64_t>(),
            t[4].cast<int64_t>(),
            pointer<const int64_t>(t[5]),
            pointer<const void>(t[6]),
            pointer<const void>(t[7]),
            pointer<void>(out[0]),
            pointer<void>(out[1]),
            pointer<void>(out[2])};
}

// (op, groups, size, count, dtype, scores, offsets, blocks, scale, upstream, result)
GroupArgs group_args(const py::tuple& t) {
    return {static_cast<GroupOp>(t[0].cast<int>()),
            t[1].cast<int64_t>(),
            t[2].cast<int64_t>(),
            t[3].cast<int64_t>(),
            static_cast<Dtype>(t[4].cast<int>()),
            pointer<const void>(t[5]),
            pointer<const int64_t>(t[6]),
            pointer<const int64_t>(t[7]),
            t[8].cast<double>(),
            pointer<const void>(t[9]),
            pointer<void>(t[10])};
}

// (count, categories, bins, dtype, chosen, rejected, margins, weight, mask, category, scale, margin, pieces, table)
MetricArgs metric_args(const py::tuple& t) {
    return {t[0].cast<int64_t>(),         t[1].cast<int64_t>(),
            t[2].cast<int64_t>(),         static_cast<Dtype>(t[3].cast<int>()),
            pointer<const void>(t[4]),    pointer<const void>(t[5]),
            pointer<const void>(t[6]),    pointer<const void>(t[7]),
            pointer<const uint8_t>(t[8]), pointer<const int64_t>(t[9]),
            t[10].cast<double>(),         t[11].cast<double>(),
            t[12].cast<int64_t>(),        pointer<double>(t[13])};
}

template <class Execution, class Reward, class RewardGradient, class Groups, class Metrics>
void register_scoring(py::module_& m, Reward reward_scores, RewardGradient reward_gradient, Groups score_groups,
                      Metrics preference_metrics) {
    const auto execution = [](uintptr_t x) { return (Execution)x; };
    m.def("reward_scores", [=](const py::tuple& hidden, const py::tuple& in, const py::tuple& out, uintptr_t on) {
        const RewardArgs args = reward_args(hidden, in, out);
        py::gil_scoped_release release;
        reward_scores(args, execution(on));
    });
    m.def("reward_gradient", [=](const py::tuple& hidden, const py::tuple& in, const py::tuple& out, uintptr_t on) {
        const RewardGradientArgs args = reward_gradient_args(hidden, in, out);
        py::gil_scoped_release release;
        reward_gradient(args, execution(on));
    });
    m.def("score_groups", [=](const py::tuple& in, uintptr_t on) {
        const GroupArgs args = group_args(in);
        py::gil_scoped_release release;
        score_groups(args, execution(on));
    });
    m.def("preference_metrics", [=](const py::tuple& in, uintptr_t on) {
        const MetricArgs args = metric_args(in);
        py::gil_scoped_release release;
        preference_metrics(args, execution(on));
    });
}

// ---- Bradley-Terry ----

// (players, edges, first, second, covariates, features, davidson), (units, edge, outcome, weight), (counts, unit_of,
// battles, seed, first_sample), (prior, tolerance, dense_limit, start, check), (samples, parameters, gradient, status,
// iterations)
BradleyTerryArgs bradley_terry_args(const py::tuple& design, const py::tuple& units, const py::tuple& draw,
                                    const py::tuple& option, const py::tuple& out) {
    BradleyTerryArgs a;
    a.players = design[0].cast<int64_t>();
    a.edges = design[1].cast<int64_t>();
    a.first = pointer<const int64_t>(design[2]);
    a.second = pointer<const int64_t>(design[3]);
    a.covariates = pointer<const double>(design[4]);
    a.features = design[5].cast<int64_t>();
    a.davidson = design[6].cast<bool>();
    a.units = units[0].cast<int64_t>();
    a.edge = pointer<const int64_t>(units[1]);
    a.outcome = pointer<const int8_t>(units[2]);
    a.weight = pointer<const double>(units[3]);
    a.counts = pointer<const int64_t>(draw[0]);
    a.unit_of = pointer<const int32_t>(draw[1]);
    a.battles = draw[2].cast<int64_t>();
    a.seed = draw[3].cast<uint64_t>();
    a.first_sample = draw[4].cast<uint64_t>();
    a.prior = option[0].cast<double>();
    a.tolerance = option[1].cast<double>();
    a.dense_limit = option[2].cast<int64_t>();
    a.start = pointer<const double>(option[3]);
    a.check = option[4].cast<bool>();
    a.samples = out[0].cast<int64_t>();
    a.parameters = pointer<double>(out[1]);
    a.gradient = pointer<double>(out[2]);
    a.status = pointer<int8_t>(out[3]);
    a.iterations = pointer<int32_t>(out[4]);
    return a;
}

// ---- Modules ----

void register_cpu(py::module_ m) {
    register_ranking<int>(m, cpu::pair_loss, cpu::ranked_loss, cpu::score_gradient);
    register_distill<int>(m, cpu::distill, cpu::topk_distill, cpu::topk, cpu::scale);
    register_logprob<int>(m, cpu::logprob);
    register_scoring<int>(m, cpu::reward_scores, cpu::reward_gradient, cpu::score_groups, cpu::preference_metrics);
    m.def("split_distill", [](const py::tuple& student, const py::tuple& teacher, const py::tuple& token,
                              const py::tuple& out, const py::tuple& option, const py::tuple& parts, int threads) {
        const DistillArgs args{rows(student),   rows(teacher), tokens(token), outputs(out),
                               options(option), split(parts),  Layout{}};
        py::gil_scoped_release release;
        cpu::distill(args, threads);
    });
    m.def("outside", [](const py::tuple& logits, const py::tuple& set, const py::tuple& in_out,
                        const py::tuple& gradient, int64_t width, int threads) {
        const OutsideArgs args = outside_args(logits, set, in_out, gradient, width);
        py::gil_scoped_release release;
        cpu::outside(args, threads);
    });
    m.def("widen", [](const py::tuple& matrix, int64_t count, int64_t width, uintptr_t a, uintptr_t b, int dtype,
                      bool add, int threads) {
        const Rows out = rows(matrix);
        py::gil_scoped_release release;
        cpu::widen(out, count, width, reinterpret_cast<const void*>(a), reinterpret_cast<const void*>(b),
                   static_cast<Dtype>(dtype), add, threads);
    });
    m.def("bradley_terry", [](const py::tuple& design, const py::tuple& units, const py::tuple& draw,
                              const py::tuple& option, const py::tuple& out, int threads) {
        const BradleyTerryArgs args = bradley_terry_args(design, units, draw, option, out);
        py::gil_scoped_release release;
        cpu::bradley_terry(args, threads);
    });
    m.def("invert", [](uintptr_t matrix, int64_t n) { return cpu::invert(reinterpret_cast<double*>(matrix), n); });
    m.def("isa", cpu::isa);
    m.def("isas", cpu::isas);
}

#if defined(PYALIGN_WITH_CUDA)
void register_cuda(py::module_ m) {
    register_ranking<cudaStream_t>(m, cuda::pair_loss, cuda::ranked_loss, cuda::score_gradient);
    register_distill<cudaStream_t>(m, cuda::distill, cuda::topk_distill, cuda::topk, cuda::scale);
    register_logprob<cudaStream_t>(m, cuda::logprob);
    register_scoring<cudaStream_t>(m, cuda::reward_scores, cuda::reward_gradient, cuda::score_groups,
                                   cuda::preference_metrics);
    m.attr("pair_blocks") = kPairBlocks;
    m.attr("shared_entries") = kSharedEntries;
    m.attr("sorted_bytes") = kSortedBytes;
    const auto layout = [](const py::tuple& t) { return Layout{t[0].cast<int>(), t[1].cast<int>()}; };
    m.def("laid_out_distill", [=](const py::tuple& student, const py::tuple& teacher, const py::tuple& token,
                                  const py::tuple& out, const py::tuple& option, const py::tuple& how, uintptr_t on) {
        const DistillArgs args{rows(student),   rows(teacher), tokens(token), outputs(out),
                               options(option), Split{},       layout(how)};
        py::gil_scoped_release release;
        cuda::distill(args, (cudaStream_t)on);
    });
    m.def("laid_out_topk_distill",
          [=](const py::tuple& student, const py::tuple& teacher, int tail, const py::tuple& token,
              const py::tuple& out, const py::tuple& option, const py::tuple& how, uintptr_t on) {
              const TopKDistillArgs args{rows(student), top_k(teacher), static_cast<Tail>(tail),
                                         tokens(token), outputs(out),   options(option),
                                         layout(how)};
              py::gil_scoped_release release;
              cuda::topk_distill(args, (cudaStream_t)on);
          });
    const auto pairs = [](const std::vector<Layout>& layouts) {
        std::vector<std::pair<int, int>> found;
        for (const Layout& x : layouts) found.emplace_back(x.cluster, x.stages);
        return found;
    };
    m.def("distill_layouts", [=](int64_t vocab, int dtype, int divergence, int device) {
        return pairs(
            cuda::distill_layouts(vocab, static_cast<Dtype>(dtype), static_cast<Divergence>(divergence), device));
    });
    m.def("topk_distill_layouts", [=](int64_t vocab, int dtype, int device) {
        return pairs(cuda::topk_distill_layouts(vocab, static_cast<Dtype>(dtype), device));
    });
    m.def("explain_distill", [=](int64_t vocab, int dtype, const py::tuple& how, int device) {
        return cuda::explain_distill(vocab, static_cast<Dtype>(dtype), layout(how), device);
    });
}
#endif

py::dict build_info() {
    py::dict info;
    info["version"] = PYALIGN_VERSION;
#if defined(__clang__)
    info["compiler"] = __VERSION__;
#else
    info["compiler"] = "g++ " __VERSION__;
#endif
#if defined(_OPENMP)
    info["openmp"] = true;
#else
    info["openmp"] = false;
#endif
    std::vector<std::string> targets;  // "90", or "120+PTX"
#if defined(PYALIGN_WITH_CUDA)
    info["cuda"] = PYALIGN_CUDA_VERSION;
    std::istringstream list(PYALIGN_CUDA_ARCHS);
    for (std::string target; std::getline(list, target, ';');) targets.push_back(target);
#else
    info["cuda"] = py::none();
#endif
    info["cuda_archs"] = targets;
    return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.def("build_info", build_info);
    m.def("getenv", [](const char* name) -> const char* { return std::getenv(name); });
    register_cpu(m.def_submodule("cpu"));
#if defined(PYALIGN_WITH_CUDA)
    register_cuda(m.def_submodule("cuda"));
#endif
}
