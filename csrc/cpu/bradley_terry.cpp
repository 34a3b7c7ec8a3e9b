// Bradley-Terry fits by Newton's method, a sample of the battles (a bootstrap replicate) at a time, samples over
// threads.
//
// The log-likelihood is concave, and its third derivative along a step is at most R times the second, R being how far
// the step moves the log-odds of an edge. So a Newton step always rises by a fixed share of what its slope promises if
// it is shortened to log(1 + R) / R, or taken whole where R <= 1 (Bach 2010, Sun and Tran-Dinh 2019): convergence needs
// no line search and no values of the likelihood. Steps come from conjugate gradients, whose iterates keep s' H s = s'
// g, or where those would take long, from a Cholesky factor.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/bradley_terry_args.h"
#include "cpu/cpu.h"
#include "cpu/parallel.h"

namespace pyalign::cpu {
namespace {

constexpr int kMaxIterations = 200;
using Vector = std::vector<double>;

double dot(const double* x, const double* y, int64_t size) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; ++i) sum += x[i] * y[i];
    return sum;
}

double dot(const Vector& x, const Vector& y) { return dot(x.data(), y.data(), static_cast<int64_t>(x.size())); }

void add_multiple(double factor, const double* x, double* to, int64_t size) {
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) to[i] += factor * x[i];
}

// The lower triangle of a positive definite matrix to its Cholesky factor; false where it is none.
bool factorise(double* matrix, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        double* row = matrix + i * n;
        for (int64_t j = 0; j < i; ++j) row[j] = (row[j] - dot(row, matrix + j * n, j)) / matrix[j * n + j];
        const double pivot = row[i] - dot(row, row, i);
        if (!(pivot > 0)) return false;
        row[i] = std::sqrt(pivot);
    }
    return true;
}

// xoshiro256++ (Blackman and Vigna 2019), seeded through splitmix64.
class Random {
  public:
    Random(uint64_t seed, uint64_t stream) {
        uint64_t x = mix(seed) ^ mix(~stream);
        for (uint64_t& s : state_) s = mix(x += 0x9e3779b97f4a7c15u);
    }

    // Uniform on [0, bound), without bias (Lemire 2019).
    uint32_t below(uint32_t bound) {
        uint64_t product = uint64_t{half()} * bound;
        if (static_cast<uint32_t>(product) < bound) {
            const uint32_t least = -bound % bound;
            while (static_cast<uint32_t>(product) < least) product = uint64_t{half()} * bound;
        }
        return static_cast<uint32_t>(product >> 32);
    }

  private:
    static uint64_t mix(uint64_t x) {
        x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
        x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
        return x ^ (x >> 31);
    }

    static uint64_t rotate(uint64_t x, int by) { return (x << by) | (x >> (64 - by)); }

    uint32_t half() {
        if (kept_) {
            kept_ = false;
            return static_cast<uint32_t>(last_ >> 32);
        }
        last_ = rotate(state_[0] + state_[3], 23) + state_[0];
        const uint64_t t = state_[1] << 17;
        state_[2] ^= state_[0];
        state_[3] ^= state_[1];
        state_[1] ^= state_[2];
        state_[0] ^= state_[3];
        state_[2] ^= t;
        state_[3] = rotate(state_[3], 45);
        kept_ = true;
        return static_cast<uint32_t>(last_);
    }

    uint64_t state_[4], last_ = 0;
    bool kept_ = false;
};

class Fit {
  public:
    explicit Fit(const BradleyTerryArgs& args)
        : a_(args),
          n_(args.players + args.features + args.davidson),
          penalised_(args.players + args.features),
          wins_(args.edges),
          losses_(args.edges),
          ties_(args.davidson ? args.edges : 0),
          curve_(args.edges),
          mixed_(args.davidson ? args.edges : 0),
          theta_(n_),
          gradient_(n_),
          step_(n_),
          residual_(n_),
          z_(n_),
          direction_(n_),
          product_(n_),
          diagonal_(n_) {}

    void run(int64_t sample) {
        take_battles(sample);
        std::copy(a_.start, a_.start + n_, theta_.begin());
        std::fill(gradient_.begin(), gradient_.end(), 0.0);
        int iterations = 0;
        const FitStatus status = a_.check && !maximum_exists() ? FitStatus::kNoMaximum : newton(&iterations);
        centre(theta_);
        std::copy(theta_.begin(), theta_.end(), a_.parameters + sample * n_);
        if (a_.gradient) std::copy(gradient_.begin(), gradient_.end(), a_.gradient + sample * n_);
        a_.status[sample] = static_cast<int8_t>(status);
        a_.iterations[sample] = iterations;
    }

  private:
    // ---- The battles of a sample ----

    void take_battles(int64_t sample) {
        const int64_t* counts = a_.counts ? a_.counts + sample * a_.units : nullptr;
        if (!counts) {
            drawn_.assign(a_.units, 0);
            Random random(a_.seed, a_.first_sample + static_cast<uint64_t>(sample));
            for (int64_t i = 0; i < a_.battles; ++i)
                ++drawn_[a_.unit_of[random.below(static_cast<uint32_t>(a_.battles))]];
            counts = drawn_.data();
        }
        std::fill(wins_.begin(), wins_.end(), 0.0);
        std::fill(losses_.begin(), losses_.end(), 0.0);
        std::fill(ties_.begin(), ties_.end(), 0.0);
        for (int64_t u = 0; u < a_.units; ++u) {
            const double w = static_cast<double>(counts[u]) * a_.weight[u];
            const int64_t e = a_.edge[u];
            if (a_.outcome[u] == 0) {
                wins_[e] += w;
            } else if (a_.outcome[u] == 1) {
                losses_[e] += w;
            } else if (a_.davidson) {
                ties_[e] += w;
            } else {  // half a win on either side
                wins_[e] += 0.5 * w;
                losses_[e] += 0.5 * w;
            }
        }
    }

    // ---- Whether there is a maximum: players reach each other over wins and ties (Ford 1957), and what Davidson's
    // parameter and the covariates ask for beyond ----

    bool maximum_exists() {
        double decided = 0, tied = 0;
        bool both_ways = false;
        for (int64_t e = 0; e < a_.edges; ++e) {
            decided += wins_[e] + losses_[e];
            both_ways |= wins_[e] > 0 && losses_[e] > 0;
            if (a_.davidson) tied += ties_[e];
        }
        if (a_.davidson && !(decided > 0 && tied > 0)) return false;
        if (a_.prior > 0) return true;
        for (int64_t f = 0; f < a_.features; ++f) {
            bool there = false;
            for (int64_t e = 0; e < a_.edges && !there; ++e) there = a_.covariates[e * a_.features + f] != 0 && met(e);
            if (!there) return false;
        }
        if (!reaches_all(wins_, losses_) || !reaches_all(losses_, wins_)) return false;
        // A pair that each won of is a circle without ties, which settles it for most samples.
        return !a_.davidson || both_ways || !ties_dominate();
    }

    bool met(int64_t e) const { return wins_[e] > 0 || losses_[e] > 0 || tied(e); }
    bool tied(int64_t e) const { return a_.davidson && ties_[e] > 0; }

    // From player 0, first to second where `forth` is positive, second to first where `back` is.
    bool reaches_all(const Vector& forth, const Vector& back) {
        if (a_.players == 1) return true;
        make_neighbours();
        reached_.assign(a_.players, 0);
        queue_.assign(1, 0);
        reached_[0] = 1;
        for (size_t at = 0; at < queue_.size(); ++at) {
            const int64_t player = queue_[at];
            for (int64_t k = begins_[player]; k < begins_[player + 1]; ++k) {
                const int64_t e = neighbours_[k];
                const bool is_first = a_.first[e] == player;
                const int64_t other = is_first ? a_.second[e] : a_.first[e];
                if (reached_[other] || !((is_first ? forth[e] : back[e]) > 0 || tied(e))) continue;
                reached_[other] = 1;
                queue_.push_back(other);
            }
        }
        return static_cast<int64_t>(queue_.size()) == a_.players;
    }

    // Edges by player; the same for all samples.
    void make_neighbours() {
        if (!begins_.empty()) return;
        begins_.assign(a_.players + 2, 0);
        for (int64_t e = 0; e < a_.edges; ++e) ++begins_[a_.first[e] + 2], ++begins_[a_.second[e] + 2];
        for (int64_t i = 2; i < a_.players + 2; ++i) begins_[i] += begins_[i - 1];
        neighbours_.resize(2 * a_.edges);
        for (int64_t e = 0; e < a_.edges; ++e) {
            neighbours_[begins_[a_.first[e] + 1]++] = e;
            neighbours_[begins_[a_.second[e] + 1]++] = e;
        }
    }

    // The likelihood rises forever as log nu and the gaps grow together unless some circle holds more wins than ties,
    // a negative cycle of u_loser <= u_winner - 1, |u_i - u_j| <= 1: Bellman and Ford.
    bool ties_dominate() {
        std::vector<int64_t> u(a_.players, 0);
        for (int64_t round = 0; round < a_.players; ++round) {
            bool changed = false;
            const auto lower = [&](int64_t from, int64_t to, int64_t cost) {
                if (u[from] + cost < u[to]) u[to] = u[from] + cost, changed = true;
            };
            for (int64_t e = 0; e < a_.edges; ++e) {
                const int64_t i = a_.first[e], j = a_.second[e];
                if (wins_[e] > 0) lower(i, j, -1);
                if (losses_[e] > 0) lower(j, i, -1);
                if (ties_[e] > 0) lower(i, j, 1), lower(j, i, 1);
            }
            if (!changed) return true;
        }
        return false;
    }

    // ---- Derivatives ----

    // How far `x` moves the log-odds of an edge.
    double log_odds(int64_t e, const Vector& x) const {
        double u = x[a_.first[e]] - x[a_.second[e]];
        const double* z = a_.covariates + e * a_.features;
        for (int64_t f = 0; f < a_.features; ++f) u += z[f] * x[a_.players + f];
        return u;
    }

    void add(int64_t e, double value, Vector& to) const {
        to[a_.first[e]] += value;
        to[a_.second[e]] -= value;
        const double* z = a_.covariates + e * a_.features;
        for (int64_t f = 0; f < a_.features; ++f) to[a_.players + f] += z[f] * value;
    }

    void add_squares(int64_t e, double value) {
        diagonal_[a_.first[e]] += value;
        diagonal_[a_.second[e]] += value;
        const double* z = a_.covariates + e * a_.features;
        for (int64_t f = 0; f < a_.features; ++f) diagonal_[a_.players + f] += z[f] * z[f] * value;
    }

    // First and second derivatives of an edge's log-likelihood; the curvatures are negated. The probabilities are exact
    // however small, and nothing cancels.
    struct Derivatives {
        double u, log_nu = 0, uu, mixed = 0, ties = 0;
    };

    Derivatives differentiate(int64_t e, double u, double log_nu) const {
        const double w = wins_[e], l = losses_[e];
        Derivatives d;
        if (!a_.davidson) {
            const double x = std::exp(-std::fabs(u)), large = 1 / (1 + x), small = x * large;
            d.u = u >= 0 ? w * small - l * large : w * large - l * small;
            d.uu = (w + l) * (large * small);
            return d;
        }
        const double half = 0.5 * u, top = std::max(std::fabs(half), log_nu), t = ties_[e], total = w + l + t;
        double win = std::exp(half - top), loss = std::exp(-half - top), tie = std::exp(log_nu - top);
        const double scale = 1 / (win + loss + tie);
        win *= scale, loss *= scale, tie *= scale;
        d.u = w * (loss + 0.5 * tie) - l * (win + 0.5 * tie) - 0.5 * t * (win - loss);
        d.log_nu = t * (win + loss) - (w + l) * tie;
        d.uu = total * (win * loss + 0.25 * tie * (win + loss));
        d.mixed = -0.5 * total * (win - loss) * tie;
        d.ties = total * tie * (win + loss);
        return d;
    }

    double log_nu(const Vector& x) const { return a_.davidson ? x[n_ - 1] : 0; }

    // Gradient, curvature and the Hessian's diagonal at theta.
    void differentiate() {
        std::fill(gradient_.begin(), gradient_.end(), 0.0);
        std::fill(diagonal_.begin(), diagonal_.end(), 0.0);
        double of_ties = 0;
        curve_of_ties_ = 0;
        for (int64_t e = 0; e < a_.edges; ++e) {
            const Derivatives d = differentiate(e, log_odds(e, theta_), log_nu(theta_));
            add(e, d.u, gradient_);
            add_squares(e, d.uu);
            curve_[e] = d.uu;
            if (a_.davidson) {
                mixed_[e] = d.mixed;
                of_ties += d.log_nu;
                curve_of_ties_ += d.ties;
            }
        }
        if (a_.davidson) gradient_[n_ - 1] = of_ties, diagonal_[n_ - 1] = curve_of_ties_;
        for (int64_t i = 0; i < penalised_; ++i) {
            gradient_[i] -= a_.prior * theta_[i];
            diagonal_[i] += a_.prior;
        }
        for (double& d : diagonal_)
            if (!(d > 0)) d = 1;
    }

    // The slope of the log-likelihood along the step, at `length` times the step.
    double slope(double length) const {
        double sum = 0;
        for (int64_t e = 0; e < a_.edges; ++e) {
            const double moved = log_odds(e, step_);
            const double nu = log_nu(theta_) + length * log_nu(step_);
            const Derivatives d = differentiate(e, log_odds(e, theta_) + length * moved, nu);
            sum += d.u * moved + d.log_nu * log_nu(step_);
        }
        for (int64_t i = 0; i < penalised_; ++i) sum -= a_.prior * (theta_[i] + length * step_[i]) * step_[i];
        return sum;
    }

    // product = H x
    void multiply(const Vector& x, Vector& product) const {
        std::fill(product.begin(), product.end(), 0.0);
        double of_ties = 0;
        for (int64_t e = 0; e < a_.edges; ++e) {
            const double u = log_odds(e, x);
            double q = curve_[e] * u;
            if (a_.davidson) {
                q += mixed_[e] * x[n_ - 1];
                of_ties += mixed_[e] * u;
            }
            add(e, q, product);
        }
        if (a_.davidson) product[n_ - 1] = of_ties + curve_of_ties_ * x[n_ - 1];
        for (int64_t i = 0; i < penalised_; ++i) product[i] += a_.prior * x[i];
    }

    void centre(Vector& x) const {
        double mean = 0;
        for (int64_t i = 0; i < a_.players; ++i) mean += x[i];
        mean /= static_cast<double>(a_.players);
        for (int64_t i = 0; i < a_.players; ++i) x[i] -= mean;
    }

    // z = residual / diagonal, centred: the Hessian does not see a shift of all strengths.
    double precondition() {
        for (int64_t i = 0; i < n_; ++i) z_[i] = residual_[i] / diagonal_[i];
        centre(z_);
        return dot(residual_, z_);
    }

    // ---- Steps ----

    // H step = gradient to a relative error in the preconditioner's norm; false if it is not reached.
    bool conjugate_gradients(double relative, int64_t most) {
        std::fill(step_.begin(), step_.end(), 0.0);
        double size = dot(residual_, z_);
        const double goal = relative * relative * size;
        direction_ = z_;
        for (int64_t k = 0; k < most && size > goal; ++k) {
            multiply(direction_, product_);
            const double along = dot(direction_, product_);
            if (!(along > 0)) return false;
            const double rate = size / along;
            for (int64_t i = 0; i < n_; ++i) {
                step_[i] += rate * direction_[i];
                residual_[i] -= rate * product_[i];
            }
            const double before = size;
            size = precondition();
            for (int64_t i = 0; i < n_; ++i) direction_[i] = z_[i] + size / before * direction_[i];
        }
        return !(size > goal);
    }

    // The same through a Cholesky factor; false where the Hessian is singular to working precision.
    bool cholesky() {
        matrix_.assign(n_ * n_, 0.0);  // lower triangle
        double trace = 0;
        for (int64_t e = 0; e < a_.edges; ++e) {
            const int64_t i = a_.first[e], j = a_.second[e];
            const double c = curve_[e], *z = a_.covariates + e * a_.features;
            matrix_[i * n_ + i] += c;
            matrix_[j * n_ + j] += c;
            matrix_[std::max(i, j) * n_ + std::min(i, j)] -= c;
            for (int64_t f = 0; f < a_.features; ++f) {
                double* row = &matrix_[(a_.players + f) * n_];
                row[i] += c * z[f];
                row[j] -= c * z[f];
                for (int64_t g = 0; g <= f; ++g) row[a_.players + g] += c * z[f] * z[g];
            }
            if (a_.davidson) {
                double* row = &matrix_[(n_ - 1) * n_];
                row[i] += mixed_[e];
                row[j] -= mixed_[e];
                for (int64_t f = 0; f < a_.features; ++f) row[a_.players + f] += mixed_[e] * z[f];
            }
        }
        if (a_.davidson) matrix_[n_ * n_ - 1] = curve_of_ties_;
        for (int64_t i = 0; i < penalised_; ++i) matrix_[i * n_ + i] += a_.prior;
        for (int64_t i = 0; i < a_.players; ++i) trace += matrix_[i * n_ + i];
        const double along_a_shift = trace / static_cast<double>(a_.players * a_.players);
        for (int64_t i = 0; i < a_.players; ++i)
            for (int64_t j = 0; j <= i; ++j) matrix_[i * n_ + j] += along_a_shift;

        if (!factorise(matrix_.data(), n_)) return false;
        for (int64_t i = 0; i < n_; ++i)
            step_[i] = (gradient_[i] - dot(&matrix_[i * n_], step_.data(), i)) / matrix_[i * n_ + i];
        for (int64_t i = n_ - 1; i >= 0; --i) {
            step_[i] /= matrix_[i * n_ + i];
            for (int64_t j = 0; j < i; ++j) step_[j] -= matrix_[i * n_ + j] * step_[i];
        }
        centre(step_);
        return true;
    }

    FitStatus newton(int* iterations) {
        const bool dense = n_ <= a_.dense_limit;
        const bool separable = a_.prior == 0 && a_.features > 0;  // without covariates maximum_exists() has settled it
        // As many products as a factorisation costs.
        const int64_t most = dense ? 10 + n_ * n_ * n_ / (24 * (a_.edges + n_)) : 10 * n_ + 100;
        double first_decrement = 0, previous = std::numeric_limits<double>::infinity();
        for (int iteration = 1; iteration <= kMaxIterations; ++iteration) {
            *iterations = iteration;
            differentiate();
            residual_ = gradient_;
            const double decrement = precondition();
            if (iteration == 1) first_decrement = decrement;
            // Tighter as the maximum comes near, so that convergence stays faster than linear.
            const double relative = decrement > 0 ? std::sqrt(decrement / first_decrement) : 1;
            const bool solved = conjugate_gradients(std::min(0.1, std::max(1e-5, relative)), most);
            if (!solved && dense && !cholesky())
                return separable && recedes(1e-3) ? FitStatus::kNoMaximum : FitStatus::kNotConverged;
            double reach = 0, largest = 0, farthest = 0;
            for (int64_t e = 0; e < a_.edges; ++e) {
                reach = std::max(reach, std::fabs(log_odds(e, step_)));
                farthest = std::max(farthest, std::fabs(log_odds(e, theta_)));
            }
            if (a_.davidson) reach = std::max(reach, 0.5 * reach + std::fabs(step_[n_ - 1]));
            for (double s : step_) largest = std::max(largest, std::fabs(s));
            if (!std::isfinite(reach + largest)) return FitStatus::kNotConverged;
            double length = 1;
            if (reach > 1) {
                // Longer where that does not pass the maximum along the step, if it no more than doubles the log-odds.
                const double sure = std::log1p(reach) / reach;
                length = std::min(1.0, (1 + farthest) / reach);
                while (length > sure && !(slope(length) >= 0)) length *= 0.5;
                length = std::max(length, sure);
            }
            for (int64_t i = 0; i < n_; ++i) theta_[i] += length * step_[i];
            const bool at_rounding = largest < 1e-6 && largest > 0.5 * previous;
            if (largest <= a_.tolerance || at_rounding) return FitStatus::kConverged;
            previous = largest;
            if (separable && iteration >= 10 && reach > 0.1 && recedes(1e-6 * reach)) return FitStatus::kNoMaximum;
        }
        return FitStatus::kNotConverged;
    }

    // Whether the likelihood does not fall however far one goes along the step: no outcome that was observed loses.
    bool recedes(double slack) const {
        for (int64_t e = 0; e < a_.edges; ++e) {
            const double half = 0.5 * log_odds(e, step_);
            double top = std::fabs(half);
            if (a_.davidson) top = std::max(top, step_[n_ - 1]);
            if (wins_[e] > 0 && half < top - slack) return false;
            if (losses_[e] > 0 && -half < top - slack) return false;
            if (a_.davidson && ties_[e] > 0 && step_[n_ - 1] < top - slack) return false;
        }
        return true;
    }

    const BradleyTerryArgs& a_;
    const int64_t n_, penalised_;
    Vector wins_, losses_, ties_, curve_, mixed_;                                     // [E]
    Vector theta_, gradient_, step_, residual_, z_, direction_, product_, diagonal_;  // [n]
    Vector matrix_;                                                                   // [n, n]
    double curve_of_ties_ = 0;
    std::vector<int64_t> drawn_;                        // [U]
    std::vector<int64_t> begins_, neighbours_, queue_;  // edges by player
    std::vector<uint8_t> reached_;
};

}  // namespace

bool invert(double* matrix, int64_t n) {
    if (!factorise(matrix, n)) return false;
    Vector inverse(n * n, 0.0);  // of the factor, by rows
    for (int64_t i = 0; i < n; ++i) {
        double* row = &inverse[i * n];
        for (int64_t k = 0; k < i; ++k) add_multiple(-matrix[i * n + k], &inverse[k * n], row, k + 1);
        for (int64_t j = 0; j < i; ++j) row[j] /= matrix[i * n + i];
        row[i] = 1 / matrix[i * n + i];
    }
    std::fill(matrix, matrix + n * n, 0.0);
    for (int64_t k = 0; k < n; ++k)
        for (int64_t i = 0; i <= k; ++i) add_multiple(inverse[k * n + i], &inverse[k * n], matrix + i * n, i + 1);
    for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < i; ++j) matrix[j * n + i] = matrix[i * n + j];
    return true;
}

void bradley_terry(const BradleyTerryArgs& args, int threads) {
    const int64_t share = (args.samples + 4 * threads - 1) / (4 * threads);
    const int64_t grain = std::max<int64_t>(1, std::min<int64_t>(16, share));
    parallel(args.samples, grain, 100 * args.edges, 0, threads, [&](int64_t begin, int64_t end, std::byte*) {
        Fit fit(args);
        for (int64_t sample = begin; sample < end; ++sample) fit.run(sample);
    });
}

}  // namespace pyalign::cpu
