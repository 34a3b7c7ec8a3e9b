// Calls of the CPU engines on fixed inputs, one thread, for callgrind to count: a dump per case. Prints a line per
// dump, in their order: name, elements. See tests/test_budgets_cpu.py.
#include <valgrind/callgrind.h>

#include <cstdio>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "common/half.h"
#include "cpu/cpu.h"
#include "cpu/kernels.h"

namespace {

using namespace pyalign;
using std::string;

constexpr Dtype kDtypes[] = {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16, Dtype::kFloat64};
constexpr Dtype kFloat = Dtype::kFloat32;

string name_of(Dtype dtype) {
    constexpr const char* kNames[] = {"float32", "bfloat16", "float16", "float64"};
    return kNames[static_cast<int>(dtype)];
}

Dtype accumulation(Dtype dtype) { return dtype == Dtype::kFloat64 ? Dtype::kFloat64 : kFloat; }

// The second call is counted: the first finds its scratch memory and its symbols.
template <class Call>
void count(const string& name, int64_t elements, Call call) {
    call();
    CALLGRIND_START_INSTRUMENTATION;
    CALLGRIND_ZERO_STATS;
    call();
    CALLGRIND_DUMP_STATS_AT(name.c_str());
    CALLGRIND_STOP_INSTRUMENTATION;
    std::printf("%s\t%lld\n", name.c_str(), static_cast<long long>(elements));
}

// ---- Inputs ----

class Random {
  public:
    explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}
    double uniform() {
        state_ = state_ * 6364136223846793005u + 1442695040888963407u;
        return static_cast<double>(state_ >> 11) * 0x1p-53;
    }
    double normal() {  // nearly, and the same on every machine
        double sum = -6;
        for (int i = 0; i < 12; ++i) sum += uniform();
        return sum;
    }

  private:
    uint64_t state_;
};

// Numbers that start at a cache line.
class Numbers {
  public:
    Numbers(Dtype dtype, int64_t count) : dtype_(dtype), bytes_(static_cast<size_t>(count) * size_of(dtype)) {
        data_.reset(static_cast<std::byte*>(::operator new[](bytes_ + 64, std::align_val_t(64))));
        std::memset(data_.get(), 0, bytes_ + 64);
    }
    Numbers(Dtype dtype, int64_t count, uint64_t seed) : Numbers(dtype, count) {
        Random random(seed);
        for (int64_t i = 0; i < count; ++i) set(i, random.normal());
    }
    void set(int64_t i, double x) {
        if (dtype_ == Dtype::kFloat64) reinterpret_cast<double*>(data_.get())[i] = x;
        if (dtype_ == Dtype::kFloat32) reinterpret_cast<float*>(data_.get())[i] = static_cast<float>(x);
        if (dtype_ == Dtype::kBFloat16)
            reinterpret_cast<uint16_t*>(data_.get())[i] = float_to_bfloat16(static_cast<float>(x));
        if (dtype_ == Dtype::kFloat16)
            reinterpret_cast<uint16_t*>(data_.get())[i] = float_to_float16(static_cast<float>(x));
    }
    void* data() const { return data_.get(); }
    Rows rows(int64_t width) const { return {data(), dtype_, int64_t{1} << 40, 0, width}; }

  private:
    struct Deleter {
        void operator()(std::byte* data) const { ::operator delete[](data, std::align_val_t(64)); }
    };
    Dtype dtype_;
    size_t bytes_;
    std::unique_ptr<std::byte[], Deleter> data_;
};

std::vector<int64_t> indices(int64_t count, int64_t bound, uint64_t seed) {
    Random random(seed);
    std::vector<int64_t> found(static_cast<size_t>(count));
    for (int64_t& index : found) index = static_cast<int64_t>(random.uniform() * static_cast<double>(bound));
    return found;
}

constexpr int64_t kRows = 2, kVocab = 32000, kLongVocab = 128256;

// ---- Distillation ----

struct DistillOutputs {
    Numbers gradient, loss, row_loss, denominator, entropy;
    std::vector<uint8_t> agreement;

    DistillOutputs(Dtype dtype, int64_t rows, int64_t vocab)
        : gradient(dtype, rows * vocab),
          loss(accumulation(dtype), 1),
          row_loss(accumulation(dtype), rows),
          denominator(accumulation(dtype), 1),
          entropy(accumulation(dtype), rows),
          agreement(static_cast<size_t>(rows)) {}

    Outputs outputs(int64_t vocab, bool with_gradient, bool with_metrics) {
        Outputs out;
        if (with_gradient) out.gradient = gradient.rows(vocab);
        out.width = vocab;
        out.loss = loss.data(), out.row_loss = row_loss.data(), out.denominator = denominator.data();
        if (with_metrics) out.entropy = entropy.data(), out.agreement = agreement.data();
        return out;
    }
};

struct DistillCase {
    bool gradient = true, full = false;  // full: temperature, hard term, metrics
    bool stream = false;                 // as gradients beyond the caches are written
    int64_t rows = kRows, vocab = kVocab;
};

void count_distill(const string& name, Dtype dtype, Divergence divergence, DistillCase how) {
    const int64_t rows = how.rows, vocab = how.vocab;
    const Numbers student(dtype, rows * vocab, 1), teacher(dtype, rows * vocab, 2);
    DistillOutputs out(dtype, rows, vocab);
    const std::vector<int64_t> targets = indices(rows, vocab, 3);
    DistillArgs args;
    args.student = student.rows(vocab), args.teacher = teacher.rows(vocab);
    args.tokens.count = args.tokens.teacher_count = rows;
    args.out = out.outputs(vocab, how.gradient, how.full);
    args.options.vocab = vocab, args.options.divergence = divergence;
    if (how.full) args.options.temperature = 2, args.options.hard_weight = 0.5, args.tokens.targets = targets.data();
    const string full_name = "distill " + name + " " + name_of(dtype);
    if (!how.stream) return count(full_name, rows * vocab, [&] { cpu::distill(args, 1); });
    const cpu::Kernels& kernels = cpu::kernels();
    const Numbers scratch(Dtype::kFloat64, static_cast<int64_t>(kernels.distill_scratch(args) / 8 + 1));
    const cpu::Span span{0, rows, static_cast<std::byte*>(scratch.data()), true};
    count(full_name, rows * vocab, [&] { kernels.distill(args, 1.0, out.row_loss.data(), span); });
}

void count_split(Dtype dtype, Stage stage, const string& name) {
    const Numbers student(dtype, kRows * kVocab, 1), teacher(dtype, kRows * kVocab, 2);
    DistillOutputs out(dtype, kRows, kVocab);
    std::vector<double> states(5 * kRows), sums(2 * kRows);
    DistillArgs args;
    args.student = student.rows(kVocab), args.teacher = teacher.rows(kVocab);
    args.tokens.count = args.tokens.teacher_count = kRows;
    args.tokens.reduction = Reduction::kNone;
    args.out = out.outputs(kVocab, true, false);
    args.out.loss = args.out.row_loss, args.out.row_loss = nullptr;
    args.options.vocab = kVocab, args.options.divergence = Divergence::kJensenShannon;
    for (const Stage before : {Stage::kFold, Stage::kSum, Stage::kMap}) {
        args.split = {before, states.data(), sums.data()};
        if (before == stage) break;
        cpu::distill(args, 1);
    }
    count("distill split " + name + " " + name_of(dtype), kRows * kVocab, [&] { cpu::distill(args, 1); });
}

// A teacher's k entries per row, all over the vocabulary, and log-probs that fall.
struct StoredTeacher {
    Numbers logprobs, residual;
    std::vector<int64_t> places;

    StoredTeacher(int64_t k, int64_t vocab) : logprobs(kFloat, kRows * k), residual(kFloat, kRows) {
        for (int64_t row = 0; row < kRows; ++row) {
            for (int64_t i = 0; i < k; ++i) {
                places.push_back((i * 7919 + row * 31) % vocab);
                logprobs.set(row * k + i, -2 - 0.1 * static_cast<double>(i));
            }
            residual.set(row, -1);
        }
    }
};

void count_topk_distill(Dtype dtype, Tail tail, Divergence divergence, const string& name) {
    constexpr int64_t k = 50;
    const Numbers student(dtype, kRows * kVocab, 1);
    const StoredTeacher stored(k, kVocab);
    DistillOutputs out(dtype, kRows, kVocab);
    TopKDistillArgs args;
    args.student = student.rows(kVocab);
    args.teacher = {k, stored.logprobs.data(), stored.places.data(), stored.residual.data(), kFloat, kFloat, true};
    args.tail = tail;
    args.tokens.count = args.tokens.teacher_count = kRows;
    args.out = out.outputs(kVocab, true, false);
    args.options.vocab = kVocab, args.options.divergence = divergence;
    count("topk_distill " + name + " " + name_of(dtype), kRows * kVocab, [&] { cpu::topk_distill(args, 1); });
}

void count_topk(Dtype dtype, int64_t k, int64_t vocab) {
    const Numbers logits(dtype, kRows * vocab, 1);
    const Numbers logprobs(accumulation(dtype), kRows * k), residual(accumulation(dtype), kRows);
    std::vector<int64_t> places(static_cast<size_t>(kRows * k));
    const TopKArgs args{logits.rows(vocab), kRows, vocab, k, 1.0, logprobs.data(), places.data(), residual.data()};
    count("topk " + std::to_string(k) + " of " + std::to_string(vocab) + " " + name_of(dtype), kRows * vocab,
          [&] { cpu::topk(args, 1); });
}

void count_outside(Dtype dtype, bool gradient) {
    constexpr int64_t k = 50;
    const Numbers logits(dtype, kRows * kVocab, 1), out(dtype, kRows * kVocab);
    std::vector<int64_t> places;
    for (int64_t i = 0; i < kRows * k; ++i) places.push_back(i % k * 600);
    std::vector<double> states(3 * kRows), exponentials(4 * kRows, 0.5), values(kRows * k, 0.25);
    OutsideArgs args;
    args.logits = logits.rows(kVocab), args.count = kRows, args.vocab = args.width = kVocab, args.k = k;
    args.indices = places.data();
    if (gradient)
        args.gradient = out.rows(kVocab), args.exponentials = exponentials.data(), args.values = values.data();
    else
        args.states = states.data();
    count(string("outside ") + (gradient ? "gradient " : "states ") + name_of(dtype), kRows * kVocab,
          [&] { cpu::outside(args, 1); });
}

void count_elementwise(Dtype dtype) {
    const Numbers x(dtype, kRows * kVocab, 1), factor(accumulation(dtype), 1, 2), wide(kFloat, kRows * kVocab);
    count("scale " + name_of(dtype), kRows * kVocab,
          [&] { cpu::scale(x.rows(kVocab), kRows, kVocab, factor.data(), 1); });
    if (size_of(dtype) != 2) return;
    const Numbers rest(dtype, kRows * kVocab, 2);
    for (const bool add : {false, true})
        count(string("widen ") + (add ? "added " : "") + name_of(dtype), kRows * kVocab,
              [&] { cpu::widen(wide.rows(kVocab), kRows, kVocab, x.data(), rest.data(), dtype, add, 1); });
}

void distill_cases() {
    constexpr const char* kDivergences[] = {"forward_kl", "reverse_kl", "jsd", "tvd"};
    constexpr const char* kTails[] = {"bucket", "renormalize", "drop"};
    constexpr Divergence kForward = Divergence::kForwardKL, kJsd = Divergence::kJensenShannon;
    for (const Dtype dtype : kDtypes) {
        for (int i = 0; i < 4; ++i) count_distill(kDivergences[i], dtype, static_cast<Divergence>(i), {});
        count_distill("forward_kl, loss alone,", dtype, kForward, {false});
        count_distill("jsd, full,", dtype, kJsd, {true, true});
        count_distill("forward_kl, 128256,", dtype, kForward, {true, false, false, 1, kLongVocab});
        count_distill("forward_kl, streamed,", dtype, kForward, {true, false, true});
        for (int i = 0; i < 3; ++i) count_topk_distill(dtype, static_cast<Tail>(i), kForward, kTails[i]);
        count_topk(dtype, 50, kVocab);
        count_elementwise(dtype);
    }
    count_topk_distill(kFloat, Tail::kBucket, kJsd, "bucket jsd");
    count_topk(kFloat, 256, kLongVocab);
    for (const Dtype dtype : {kFloat, Dtype::kBFloat16}) {
        count_split(dtype, Stage::kFold, "fold");
        count_split(dtype, Stage::kSum, "sum");
        count_split(dtype, Stage::kMap, "map");
        count_outside(dtype, false);
        count_outside(dtype, true);
    }
}

// ---- Log-probs ----

struct LogprobCase {
    const char* name;
    bool entropy, given_state, loss;
    double softcap, smoothing, z_loss;
};

void count_logprob(Dtype dtype, const LogprobCase& how) {
    const Dtype wide = accumulation(dtype);
    const Numbers logits(dtype, kRows * kVocab, 1), gradient(dtype, kRows * kVocab), state(wide, 3 * kRows);
    const Numbers upstream(wide, kRows, 2), logprob(wide, kRows), entropy(wide, kRows), row_loss(wide, kRows);
    const std::vector<int64_t> targets = indices(kRows, kVocab, 3);
    LogprobArgs args;
    args.logits = logits.rows(kVocab), args.count = kRows, args.targets = targets.data();
    args.options = {kVocab, 1.0, how.softcap, how.smoothing, how.z_loss, kVocab};
    args.logprob = logprob.data(), args.state = state.data();
    if (how.entropy) args.entropy = entropy.data();
    if (how.given_state) {
        cpu::logprob(args, 1);
        args.logprob = args.entropy = args.state = nullptr;
        args.given_state = state.data(), args.gradient = gradient.rows(kVocab);
        args.upstream_logprob = upstream.data();
        if (how.entropy) args.upstream_entropy = upstream.data();
    }
    if (how.loss) {
        args.logprob = args.state = nullptr;
        args.row_loss = row_loss.data(), args.gradient = gradient.rows(kVocab);
    }
    count(string("logprob ") + how.name + " " + name_of(dtype), kRows * kVocab, [&] { cpu::logprob(args, 1); });
}

void logprob_cases() {
    for (const Dtype dtype : kDtypes) {
        count_logprob(dtype, {"forward", false, false, false, 0, 0, 0});
        count_logprob(dtype, {"forward with entropy", true, false, false, 0, 0, 0});
        count_logprob(dtype, {"gradient", false, true, false, 0, 0, 0});
        count_logprob(dtype, {"gradient with entropy", true, true, false, 0, 0, 0});
        count_logprob(dtype, {"cross_entropy", false, false, true, 0, 0, 0});
        count_logprob(dtype, {"cross_entropy, full,", false, false, true, 30, 0.1, 1e-4});
    }
}

// ---- Ranking ----

constexpr int64_t kPairs = 8192;

void count_pairs(Dtype dtype, PairLoss loss, const string& name, bool full) {
    const Dtype wide = accumulation(dtype);
    const Numbers first(dtype, kPairs, 1), second(dtype, kPairs, 2), other(wide, kPairs, 3);
    const Numbers first_gradient(wide, kPairs), second_gradient(wide, kPairs), results(wide, 2);
    const Numbers first_reward(wide, kPairs), second_reward(wide, kPairs);
    std::vector<uint8_t> ones(kPairs, 1);
    PairArgs args;
    args.count = kPairs, args.dtype = dtype, args.first = first.data();
    if (loss < PairLoss::kBinary)
        args.second = second.data(), args.second_gradient = second_gradient.data();
    else
        args.labels = ones.data();
    args.options.loss = loss, args.options.label_smoothing = 0.1;
    args.options.log_chosen = -0.10536051565782628, args.options.log_rejected = -2.3025850929940455;
    args.options.scale = 0.5, args.options.tau = 0.05;
    args.loss = results.data(), args.first_gradient = first_gradient.data();
    args.denominator = static_cast<std::byte*>(results.data()) + size_of(wide);
    if (full) {
        args.first_reference = second.data(), args.second_reference = first.data();
        args.margin = args.weight = other.data(), args.mask = ones.data(), args.options.center = 0.1;
        args.first_reward = first_reward.data(), args.second_reward = second_reward.data();
    }
    count("pair_loss " + name + " " + name_of(dtype), kPairs, [&] { cpu::pair_loss(args, 1); });
}

// The unit is the work: pairs of entries, or entries.
void count_ranks(Dtype dtype, RankMethod method, const string& name, int64_t groups, int64_t size, bool packed) {
    const Dtype wide = accumulation(dtype);
    const int64_t entries = groups * size;
    const Numbers scores(dtype, entries, 1), gradient(wide, entries), results(wide, 2);
    std::vector<int64_t> ranks, offsets;
    for (int64_t i = 0; i < entries; ++i) ranks.push_back(i % size * 7 % size);
    for (int64_t g = 0; g <= groups; ++g) offsets.push_back(g * size);
    RankArgs args;
    args.groups = groups, args.size = size, args.count = entries, args.dtype = dtype;
    args.scores = scores.data(), args.ranks = ranks.data(), args.offsets = packed ? offsets.data() : nullptr;
    args.options.method = method, args.options.over_groups = method != RankMethod::kPairwise;
    args.loss = results.data(), args.gradient = gradient.data();
    args.denominator = static_cast<std::byte*>(results.data()) + size_of(wide);
    const int64_t work = method == RankMethod::kPairwise ? entries * (size - 1) / 2 : entries;
    count("ranked_loss " + name + " " + std::to_string(groups) + "x" + std::to_string(size) + " " + name_of(dtype),
          work, [&] { cpu::ranked_loss(args, 1); });
}

void count_score_gradient(Dtype dtype, bool per_group) {
    const Dtype wide = accumulation(dtype);
    constexpr int64_t kSize = 16, kGroups = kPairs / kSize;
    const Numbers gradient(wide, kPairs, 1), upstream(wide, kGroups, 2), denominator(wide, 1, 3);
    const Numbers result(dtype, kPairs), second(dtype, kPairs);
    ScoreGradientArgs args;
    args.count = kPairs, args.groups = kGroups, args.size = kSize, args.dtype = dtype;
    args.gradient = gradient.data(), args.upstream = upstream.data(), args.per_group = per_group;
    args.denominator = denominator.data(), args.result = result.data();
    if (!per_group) args.second_result = second.data();
    count(string("score_gradient ") + (per_group ? "of groups " : "of pairs ") + name_of(dtype), kPairs,
          [&] { cpu::score_gradient(args, 1); });
}

void ranking_cases() {
    constexpr const char* kLosses[] = {"logistic", "hinge",    "exponential", "ipo",    "robust",
                                       "exo",      "nca",      "bco",         "sppo",   "apo_zero",
                                       "apo_down", "discopop", "odds_ratio",  "binary", "kto"};
    for (int i = 0; i < 15; ++i) count_pairs(kFloat, static_cast<PairLoss>(i), kLosses[i], false);
    for (const Dtype dtype : kDtypes) {
        count_pairs(dtype, PairLoss::kLogistic, "logistic, full,", true);
        count_ranks(dtype, RankMethod::kPairwise, "pairwise", 512, 16, false);
        count_ranks(dtype, RankMethod::kBreslow, "breslow", 512, 16, false);
        count_score_gradient(dtype, false);
        count_score_gradient(dtype, true);
    }
    for (const Dtype dtype : {Dtype::kBFloat16, Dtype::kFloat64}) {
        count_pairs(dtype, PairLoss::kLogistic, "logistic", false);
        count_ranks(dtype, RankMethod::kEfron, "efron", 512, 16, false);
    }
    for (const RankMethod method : {RankMethod::kPairwise, RankMethod::kEfron}) {
        const string name = method == RankMethod::kPairwise ? "pairwise" : "efron";
        count_ranks(kFloat, method, name + ", packed,", 512, 16, true);
        count_ranks(kFloat, method, name, 8, 128, false);
        count_ranks(kFloat, method, name, 1, 1024, false);
    }
}

// ---- Scoring ----

void count_reward(Dtype dtype, int64_t heads) {
    constexpr int64_t kSequences = 32, kLength = 8, kWidth = 1024;
    const Dtype wide = accumulation(dtype);
    const Numbers hidden(dtype, kSequences * kLength * kWidth, 1), head(wide, heads * kWidth, 2);
    const Numbers bias(wide, heads, 3), scores(wide, kSequences * heads), upstream(wide, kSequences * heads, 4);
    const Numbers hidden_gradient(dtype, kSequences * kLength * kWidth), head_gradient(wide, heads * kWidth);
    const Numbers bias_gradient(wide, heads);
    std::vector<int64_t> last(kSequences), offsets;
    for (int64_t b = 0; b <= kSequences; ++b) offsets.push_back(b * kLength);
    RewardArgs args;
    args.hidden = hidden.rows(kWidth), args.count = kSequences * kLength, args.width = kWidth;
    args.sequences = kSequences, args.heads = heads, args.offsets = offsets.data();
    args.head = head.data(), args.bias = bias.data(), args.last = last.data(), args.scores = scores.data();
    const string of = " of " + std::to_string(heads) + (heads > 1 ? " heads " : " head ") + name_of(dtype);
    const int64_t work = kSequences * kWidth * heads;
    count("reward scores" + of, work, [&] { cpu::reward_scores(args, 1); });
    RewardGradientArgs backward{args.hidden, dtype,       args.count,  kWidth,         kSequences,
                                heads,       last.data(), head.data(), upstream.data()};
    RewardGradientArgs of_head = backward;
    backward.hidden_gradient = hidden_gradient.data();
    count("reward gradient of hidden states" + of, work, [&] { cpu::reward_gradient(backward, 1); });
    of_head.head_gradient = head_gradient.data(), of_head.bias_gradient = bias_gradient.data();
    count("reward gradient of the head" + of, work, [&] { cpu::reward_gradient(of_head, 1); });
}

// The unit is an entry of the matrices; for the best, of the scores.
void count_groups(Dtype dtype, GroupOp op, const string& name, int64_t groups, int64_t size) {
    const int64_t entries = groups * size, pairs = entries * size;
    const bool matrix = op == GroupOp::kWinProbabilities || op == GroupOp::kWinProbabilitiesGradient;
    const Numbers scores(dtype, entries, 1), upstream(accumulation(dtype), matrix ? pairs : entries, 2);
    const Numbers result(Dtype::kFloat64, matrix ? pairs : entries);  // whatever the dtype of the result is
    GroupArgs args;
    args.op = op, args.groups = groups, args.size = size, args.count = entries, args.dtype = dtype;
    args.scores = scores.data(), args.upstream = upstream.data(), args.result = result.data();
    count(name + " " + std::to_string(groups) + "x" + std::to_string(size) + " " + name_of(dtype),
          op == GroupOp::kBest ? entries : pairs, [&] { cpu::score_groups(args, 1); });
}

void count_metrics(Dtype dtype, int64_t categories) {
    const Numbers chosen(dtype, kPairs, 1), rejected(dtype, kPairs, 2);
    const std::vector<int64_t> category = indices(kPairs, categories, 3);
    MetricArgs args;
    args.count = kPairs, args.categories = categories, args.dtype = dtype;
    args.chosen = chosen.data(), args.rejected = rejected.data();
    if (categories > 1) args.category = category.data();
    std::vector<double> table(static_cast<size_t>(args.cells() * kStatistics));
    args.table = table.data();
    count("preference_metrics, " + std::to_string(categories) + (categories > 1 ? " slices " : " slice ") +
              name_of(dtype),
          kPairs, [&] { cpu::preference_metrics(args, 1); });
}

void scoring_cases() {
    constexpr const char* kOps[] = {"win_probabilities", "win_probabilities_gradient", "win_rates",
                                    "win_rates_gradient", "best_of_n"};
    for (const Dtype dtype : kDtypes) {
        count_reward(dtype, 1);
        for (int i = 0; i < 5; ++i) count_groups(dtype, static_cast<GroupOp>(i), kOps[i], 256, 16);
        count_metrics(dtype, 1);
    }
    count_reward(kFloat, 4);
    for (int i = 0; i < 4; ++i) count_groups(kFloat, static_cast<GroupOp>(i), kOps[i], 1, 512);
    count_metrics(kFloat, 20);
}

// ---- Bradley-Terry ----

void bradley_terry_cases() {
    constexpr int64_t kPlayers = 40, kEdges = kPlayers * (kPlayers - 1) / 2, kSamples = 2;
    std::vector<int64_t> first, second, edge, counts;
    std::vector<int8_t> outcome;
    std::vector<double> weight;
    for (int64_t i = 0; i < kPlayers; ++i)
        for (int64_t j = 0; j < i; ++j) {
            for (const int8_t who : {0, 1}) {
                edge.push_back(static_cast<int64_t>(first.size()));
                outcome.push_back(who);
                weight.push_back(1);
                counts.push_back(1 + (who == 0 ? (i * 7 + j) % 5 : (j * 3 + i) % 4));
            }
            first.push_back(i), second.push_back(j);
        }
    const int64_t units = static_cast<int64_t>(edge.size());
    for (int64_t i = 0; i < units; ++i) counts.push_back(counts[static_cast<size_t>(i)] % 3 + 1);
    std::vector<double> start(kPlayers), parameters(kSamples * kPlayers), gradient(kSamples * kPlayers);
    std::vector<int8_t> status(kSamples);
    std::vector<int32_t> iterations(kSamples);
    BradleyTerryArgs a{};
    a.players = kPlayers, a.edges = kEdges, a.first = first.data(), a.second = second.data();
    a.units = units, a.edge = edge.data(), a.outcome = outcome.data(), a.weight = weight.data();
    a.counts = counts.data(), a.tolerance = 1e-9, a.dense_limit = 1000, a.start = start.data(), a.check = true;
    a.samples = kSamples, a.parameters = parameters.data(), a.gradient = gradient.data();
    a.status = status.data(), a.iterations = iterations.data();
    count("bradley_terry fit", kSamples * kEdges, [&] { cpu::bradley_terry(a, 1); });
    if (status[0] != 0 || status[1] != 0) std::abort();
    std::vector<int32_t> unit_of;
    for (int64_t i = 0; i < units; ++i)
        for (int64_t n = 0; n < counts[static_cast<size_t>(i)]; ++n) unit_of.push_back(static_cast<int32_t>(i));
    a.counts = nullptr, a.unit_of = unit_of.data(), a.battles = static_cast<int64_t>(unit_of.size());
    count("bradley_terry bootstrap", kSamples * kEdges, [&] { cpu::bradley_terry(a, 1); });
    constexpr int64_t n = 64;
    std::vector<double> matrix(n * n);
    count("bradley_terry invert", n * n * n, [&] {
        for (int64_t i = 0; i < n * n; ++i) matrix[static_cast<size_t>(i)] = i % (n + 1) == 0 ? 4 : 1 / (1.0 + i % 7);
        for (int64_t i = 0; i < n; ++i) matrix[static_cast<size_t>(i * n + i)] = 100;
        if (!cpu::invert(matrix.data(), n)) std::abort();
    });
}

}  // namespace

int main() {
    distill_cases();
    logprob_cases();
    ranking_cases();
    scoring_cases();
    bradley_terry_cases();
    return 0;
}
