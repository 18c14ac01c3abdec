#include "sampling/candidates.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>

#include "kernels/kernels.h"

namespace fixmin::sampling {
namespace {

// A k of 40 then looks at 40 blocks of 32 values after one pass for the maxima.
constexpr size_t block = 32;
constexpr size_t lanes = 16;  // loops over so many independent values become vectors on every CPU
constexpr float lowest = std::numeric_limits<float>::lowest();
constexpr float infinity = std::numeric_limits<float>::infinity();

// Of [block] values.
float block_maximum(const float* x) {
    using Vector = float __attribute__((vector_size(16)));
    constexpr size_t n = block / 4;
    Vector m[n];
    std::memcpy(m, x, sizeof m);
    for (size_t half = n / 2; half > 0; half /= 2) {
        for (size_t i = 0; i < half; ++i) m[i] = m[i] > m[i + half] ? m[i] : m[i + half];
    }
    return std::max(std::max(m[0][0], m[0][1]), std::max(m[0][2], m[0][3]));
}

// Of n values, in one order on every CPU.
template <typename F>
double sum(size_t n, F f) {
    double parts[lanes] = {};
    size_t i = 0;
    for (; i + lanes <= n; i += lanes) {
        for (size_t l = 0; l < lanes; ++l) parts[l] += f(i + l);
    }
    for (size_t l = 0; i < n; ++i, ++l) parts[l] += f(i);
    for (size_t half = lanes / 2; half > 0; half /= 2) {
        for (size_t l = 0; l < half; ++l) parts[l] += parts[l + half];
    }
    return parts[0];
}

// The smallest float that is not below x.
float round_up(double x) {
    const float nearest = float(x);
    return double(nearest) < x ? std::nextafter(nearest, infinity) : nearest;
}

struct Share {
    double weight = 0;
    size_t n = 0;

    void operator+=(const Candidate& c) { weight += c.weight, ++n; }
    Share operator+(const Share& other) const { return {weight + other.weight, n + other.n}; }
};

// The order of rising keys, among equal ones that of `before`.
template <typename Key>
auto by(Key key) {
    return [key](const Candidate& a, const Candidate& b) {
        const double left = key(a.logit), right = key(b.logit);
        return left != right ? left < right : before(a, b);
    };
}

// Of n candidates at(i), taken in the order of by(key): the first with which suffices(Share taken) is true, or the very
// last. key(logit) >= 0. Nothing is sorted but the bucket of keys in which that happens. If all_above is not `lowest`,
// others with logits below it are unknown, and keys rise as logits fall: nothing if it might be one of them.
template <typename At, typename Key, typename Suffices>
std::optional<Candidate> last_of_share(size_t n, At at, Key key, Suffices suffices, float all_above) {
    constexpr size_t n_buckets = 4096;
    constexpr double per_nat = 64;  // the last bucket takes what is improbable beyond 1e-27
    std::vector<Share> buckets(n_buckets);
    const auto bucket_of = [&](float logit) { return size_t(std::min(key(logit) * per_nat, n_buckets - 1.0)); };
    size_t last = 0;  // bucket that holds anything
    for (size_t i = 0; i < n; ++i) {
        const Candidate c = at(i);
        if (c.logit < lowest) continue;
        const size_t b = bucket_of(c.logit);
        buckets[b] += c;
        last = std::max(last, b);
    }
    Share taken;
    size_t b = 0;
    while (b < last && !suffices(taken + buckets[b])) taken = taken + buckets[b++];
    if (all_above > lowest && b >= std::min(last, bucket_of(all_above))) return {};

    std::vector<Candidate> inside;
    for (size_t i = 0; i < n; ++i) {
        const Candidate c = at(i);
        if (c.logit >= lowest && bucket_of(c.logit) == b) inside.push_back(c);
    }
    std::sort(inside.begin(), inside.end(), by(key));
    for (const Candidate& c : inside) {
        taken += c;
        if (suffices(taken)) return c;
    }
    return inside.back();
}

}  // namespace

// ---- Row ------------------------------------------------------------------------------------------------------------

void Row::set(std::span<const float> x) {
    x_ = x;
    maxima_.clear();
}

void Row::index() {
    if (!maxima_.empty()) return;
    maxima_.resize((x_.size() + block - 1) / block);
    const size_t full = x_.size() / block;
    for (size_t b = 0; b < full; ++b) maxima_[b] = block_maximum(x_.data() + b * block);
    if (full < maxima_.size()) maxima_[full] = *std::max_element(x_.begin() + full * block, x_.end());
}

void Row::collect(float floor, std::vector<Candidate>& out) {
    index();
    floor = std::max(floor, lowest);
    out.clear();
    for (size_t b = 0; b < maxima_.size(); ++b) {
        if (maxima_[b] < floor) continue;
        const size_t end = std::min(x_.size(), (b + 1) * block);
        for (size_t i = b * block; i < end; ++i) {
            if (x_[i] >= floor) out.push_back({x_[i], uint32_t(i), 0});
        }
    }
}

void Row::largest(size_t k, std::vector<Candidate>& out) {
    index();
    // The k-th largest maximum of a block is at most the k-th largest value.
    float floor = lowest;
    if (k < maxima_.size()) {
        scratch_ = maxima_;
        std::nth_element(scratch_.begin(), scratch_.begin() + k - 1, scratch_.end(), std::greater<float>());
        floor = scratch_[k - 1];
    }
    collect(floor, out);
    if (out.size() > k) {
        std::nth_element(out.begin(), out.begin() + k, out.end(), before);
        out.resize(k);
    }
    std::sort(out.begin(), out.end(), before);
}

// ---- Candidates -----------------------------------------------------------------------------------------------------

void Candidates::reset(std::span<const float> row, float highest) {
    row_.set(row);
    highest_ = highest;
    extract_ = nullptr;
    lacking_ = false;
    whole_ = true;
    list_.clear();
}

void Candidates::reset(const numerics::Extract& extract) {
    extract_ = &extract;
    lacking_ = false;
    highest_ = extract.highest;
    whole_ = true;
    list_.clear();
    for (const numerics::Logit& x : extract.largest) list_.push_back({x.logit, x.id, 0});
}

// Goes on with any candidates, so that nothing else has to ask.
bool Candidates::lacks(bool more_than_known) {
    if (!more_than_known) return false;
    lacking_ = true;
    whole_ = sorted_ = false;
    return true;
}

void Candidates::to_list() {
    if (!whole_) return;
    if (!extract_) row_.collect(lowest, list_);
    whole_ = sorted_ = false;
}

size_t Candidates::count_at_least(float floor) const {
    const auto counts = [floor](float logit) { return logit >= std::max(floor, lowest); };
    if (whole_ && !extract_) return size_t(std::count_if(row_.values().begin(), row_.values().end(), counts));
    return size_t(std::count_if(list_.begin(), list_.end(), [&](const Candidate& c) { return counts(c.logit); }));
}

// Those with a logit of at least `floor`, but no fewer than min_keep of the first and no fewer than one.
void Candidates::keep_at_least(double floor, size_t min_keep) {
    const float rounded = round_up(std::min(floor, double(highest_)));
    if (of_extract() && lacks(!extract_->complete && rounded < extract_->floor)) return;
    if (min_keep > 1 && count_at_least(rounded) < min_keep) return top_k(min_keep);
    if (whole_ && !extract_) {
        row_.collect(rounded, list_);
        whole_ = sorted_ = false;
    } else {
        to_list();
        std::erase_if(list_, [=](const Candidate& c) { return c.logit < rounded; });
    }
}

void Candidates::top_n_sigma(float n) {
    const std::span<const float> x = row_.values();
    const double count = double(count_at_least(lowest));
    const double mean = sum(x.size(), [=](size_t i) { return x[i] < lowest ? 0.0 : double(x[i]); }) / count;
    const double squares = sum(x.size(), [=](size_t i) {
        const double d = x[i] < lowest ? 0.0 : x[i] - mean;
        return d * d;
    });
    keep_at_least(highest_ - double(n) * std::sqrt(squares / count), 1);
}

void Candidates::top_k(size_t k) {
    if (of_extract() && lacks(!extract_->complete && k > list_.size())) return;
    if (whole_ && !extract_) {
        row_.largest(k, list_);
        whole_ = false;
    } else {
        to_list();
        if (!sorted_ && k < list_.size()) std::nth_element(list_.begin(), list_.begin() + k, list_.end(), before);
        list_.resize(std::min(k, list_.size()));
        if (!sorted_) std::sort(list_.begin(), list_.end(), before);
    }
    sorted_ = true;
}

template <typename Key, typename Suffices>
void Candidates::keep_share(Key key, Suffices suffices) {
    const std::span<const float> x = row_.values();
    const auto of_row = [&](size_t i) { return Candidate{x[i], uint32_t(i), weights_[i]}; };
    const auto of_list = [&](size_t i) { return list_[i]; };
    const float all_above = of_extract() && !extract_->complete ? extract_->floor : lowest;
    const auto last = whole_ && !extract_ ? last_of_share(x.size(), of_row, key, suffices, lowest)
                                          : last_of_share(list_.size(), of_list, key, suffices, all_above);
    if (lacks(!last)) return;
    to_list();
    const auto less = by(key);
    std::erase_if(list_, [&](const Candidate& c) { return less(*last, c); });
}

// Surprise is log(total) - (logit - highest): a distance from the entropy is one from the logit whose surprise it is.
void Candidates::typical(float p, size_t min_keep) {
    const double total = weigh(1);
    const double centre = highest_ + std::log(total) - entropy(total);
    keep_share([=](float logit) { return std::abs(logit - centre); },
               [=](Share taken) { return taken.weight > double(p) * total && taken.n >= min_keep; });
    highest_ = std::min_element(list_.begin(), list_.end(), before)->logit;
}

void Candidates::top_p(float p, size_t min_keep) {
    const double wanted = double(p) * weigh(1);
    keep_share([highest = double(highest_)](float logit) { return highest - logit; },
               [=](Share taken) { return taken.weight >= wanted && taken.n >= min_keep; });
}

void Candidates::min_p(float p, size_t min_keep) { keep_at_least(highest_ + std::log(double(p)), min_keep); }

void Candidates::xtc(float threshold, size_t min_keep) {
    const float floor = round_up(highest_ + std::log(double(threshold) * weigh(1)));
    if (count_at_least(floor) < 2) return;
    to_list();
    const Candidate* last = nullptr;  // of those that are probable enough
    size_t n_probable = 0;
    for (const Candidate& c : list_) {
        if (c.logit < floor) continue;
        ++n_probable;
        if (!last || before(*last, c)) last = &c;
    }
    if (list_.size() - (n_probable - 1) < min_keep) return;
    const Candidate kept = *last;
    std::erase_if(list_, [=](const Candidate& c) { return before(c, kept); });
    highest_ = kept.logit;
}

// The exponent of a Zipf distribution is fitted to the first 100 tokens; it says how many to keep for a surprise of mu.
void Candidates::mirostat_1(double mu, float temperature) {
    std::vector<Candidate> head;
    row_.largest(100, head);
    double numerator = 0, denominator = 0;
    for (size_t i = 0; i + 1 < head.size(); ++i) {
        const double t = std::log(double(i + 2) / double(i + 1));
        numerator += t * ((double(head[i].logit) - head[i + 1].logit) / temperature);
        denominator += t * t;
    }
    double k = 1;
    if (denominator > 0) {
        const double exponent = numerator / denominator, epsilon = exponent - 1;
        const double n = double(row_.values().size());
        const double scale = epsilon == 0 ? 1 / std::log(n) : -epsilon / std::expm1(-epsilon * std::log(n));
        const double base = scale * std::exp2(mu);
        // A flat head has an exponent of 0: the limit is everything or nothing.
        k = exponent > 0 ? std::min(n, std::pow(base, 1 / exponent)) : base >= 1 ? n : 1;
    }
    top_k(std::max<size_t>(1, size_t(std::max(k, 0.0))));
}

void Candidates::mirostat_2(double mu, float temperature) {
    const double floor = highest_ + temperature * (std::log(weigh(temperature)) - mu * std::log(2.0));
    if (floor > highest_)
        top_k(1);
    else
        keep_at_least(floor, 1);
}

// Of the weights at temperature 1, in nats: the mean of log(total) - (logit - highest).
double Candidates::entropy(double total) const {
    const auto term = [&](float logit, float weight) {
        return weight > 0 ? double(weight) * (double(logit) - highest_) : 0.0;
    };
    const std::span<const float> x = row_.values();
    const double mean = whole_ ? sum(x.size(), [&](size_t i) { return term(x[i], weights_[i]); })
                               : sum(list_.size(), [&](size_t i) { return term(list_[i].logit, list_[i].weight); });
    return std::log(total) - mean / total;
}

float Candidates::dynamic_temperature(float temperature, float range, float exponent) {
    const size_t n = whole_ ? count_at_least(lowest) : list_.size();
    if (n < 2) return temperature;
    const double share = std::max(0.0, entropy(weigh(1)) / std::log(double(n)));
    const double low = std::max(0.0, double(temperature) - range), high = double(temperature) + range;
    return float(std::min(low + (high - low) * std::pow(share, double(exponent)), double(-lowest)));
}

double Candidates::weigh(float temperature) {
    if (temperature == 0) {
        top_k(1);
        list_[0].weight = 1;
        return total_ = 1;
    }
    const bool of_row = whole_ && !extract_;
    const std::span<const float> x = row_.values();
    const size_t n = of_row ? x.size() : list_.size();
    weights_.resize(n);
    if (of_row) {
        for (size_t i = 0; i < n; ++i) weights_[i] = (x[i] - highest_) / temperature;
    } else {
        for (size_t i = 0; i < n; ++i) weights_[i] = (list_[i].logit - highest_) / temperature;
    }
    kernels_.exp_minus(weights_.data(), uint32_t(n), 0.0f, weights_.data());
    if (!of_row) {
        for (size_t i = 0; i < n; ++i) list_[i].weight = weights_[i];
        if (whole_) return total_ = extract_->total;
        return total_ = sum(n, [&](size_t i) { return double(weights_[i]); });
    }
    // Blocks, so that a draw looks at the sums and at the values of one block.
    block_sums_.clear();
    for (size_t begin = 0; begin < n; begin += block * block) {
        const float* w = weights_.data() + begin;
        block_sums_.push_back(sum(std::min(n - begin, block * block), [w](size_t i) { return double(w[i]); }));
    }
    total_ = 0;
    for (const double s : block_sums_) total_ += s;
    return total_;
}

Candidate Candidates::draw(double uniform) const {
    double rest = uniform * total_;
    if (!whole_) {
        const Candidate* chosen = nullptr;  // rounding may leave nothing for the last one: then it is the last
        for (const Candidate& c : list_) {
            if (c.weight == 0) continue;
            chosen = &c;
            rest -= c.weight;
            if (rest < 0) break;
        }
        return *chosen;
    }
    size_t last_block = block_sums_.size() - 1;
    while (block_sums_[last_block] == 0) --last_block;
    size_t b = 0;
    while (b < last_block && rest >= block_sums_[b]) rest -= block_sums_[b++];
    const size_t begin = b * block * block, end = std::min(weights_.size(), begin + block * block);
    size_t chosen = begin;
    for (size_t i = begin; i < end; ++i) {
        if (weights_[i] == 0) continue;
        chosen = i;
        rest -= weights_[i];
        if (rest < 0) break;
    }
    return {row_.values()[chosen], uint32_t(chosen), weights_[chosen]};
}

std::vector<Candidate> Candidates::list() const {
    if (!whole_) return list_;
    std::vector<Candidate> all;
    for (size_t i = 0; i < row_.values().size(); ++i) {
        if (row_.values()[i] >= lowest) all.push_back({row_.values()[i], uint32_t(i), weights_[i]});
    }
    return all;
}

}  // namespace fixmin::sampling
