// SamplingParams, Sampler, top_logprobs.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>

#include "bindings/bindings.h"
#include "error.h"
#include "sampling/logprobs.h"
#include "sampling/sampler.h"

namespace py = pybind11;

namespace fixmin::bindings {
namespace {

using sampling::Sampler;
using sampling::SamplingParams;
using Logits = py::array_t<float, py::array::c_style>;
using Words = py::array_t<uint32_t, py::array::c_style>;

std::span<const float> row(const Logits& logits) {
    if (logits.ndim() != 1) {
        throw ArgumentError("logits must have one dimension, not " + std::to_string(logits.ndim()));
    }
    return {logits.data(), size_t(logits.size())};
}

const uint32_t* mask(const std::optional<Words>& allowed, size_t vocab_size) {
    if (!allowed) return nullptr;
    const size_t words = (vocab_size + 31) / 32;
    if (allowed->ndim() != 1 || size_t(allowed->size()) != words) {
        throw ArgumentError("allowed must have shape [" + std::to_string(words) + "]: a bit for each of " +
                            std::to_string(vocab_size) + " tokens");
    }
    return allowed->data();
}

py::tuple top_logprobs(const Logits& logits, uint32_t k, uint32_t chosen, const std::optional<std::string>& isa) {
    const kernels::Kernels& kernels = sampling::kernels_of(isa.value_or(""));
    const sampling::TopLogprobs result = sampling::top_logprobs(row(logits), k, chosen, kernels);
    std::vector<uint32_t> ids;
    std::vector<float> logprobs;
    for (const sampling::TokenLogprob& token : result.top) {
        ids.push_back(token.id);
        logprobs.push_back(token.logprob);
    }
    return py::make_tuple(result.chosen.logprob, result.rank, array(ids), array(logprobs));
}

/// SamplingParams(name=value, ...), and a property for each name. Never changed after that: requests share them.
class ParamsClass {
  public:
    explicit ParamsClass(py::module_& m)
        : class_(m, "SamplingParams", "How the next token is chosen; see csrc/sampling/sampling_params.h.") {
        const auto make = [setters = setters_](py::detail::value_and_holder& object, const py::kwargs& given) {
            SamplingParams& params = construct(object, std::make_shared<SamplingParams>());
            for (const auto& [key, value] : given) {
                const auto name = key.cast<std::string>();
                const auto setter = setters->find(name);
                if (setter == setters->end()) throw py::type_error("SamplingParams has no '" + name + "'");
                try {
                    setter->second(params, value);
                } catch (const py::cast_error&) {
                    throw py::type_error("SamplingParams cannot hold the " + name + " that was given");
                }
            }
        };
        class_.def("__init__", make, py::detail::is_new_style_constructor());
    }

    template <typename T>
    ParamsClass& field(const char* name, T SamplingParams::* member, const char* help = "") {
        class_.def_readonly(name, member, help);
        (*setters_)[name] = [member](SamplingParams& params, py::handle value) { params.*member = value.cast<T>(); };
        return *this;
    }

  private:
    using Setters = std::map<std::string, std::function<void(SamplingParams&, py::handle)>>;
    std::shared_ptr<Setters> setters_ = std::make_shared<Setters>();
    py::class_<SamplingParams, std::shared_ptr<SamplingParams>> class_;
};

void bind_params(py::module_& m) {
    ParamsClass(m)
        .field("temperature", &SamplingParams::temperature, "0: greedy")
        .field("dynatemp_range", &SamplingParams::dynatemp_range, "0: off")
        .field("dynatemp_exponent", &SamplingParams::dynatemp_exponent)
        .field("top_n_sigma", &SamplingParams::top_n_sigma, "0 or less: off")
        .field("top_k", &SamplingParams::top_k, "0: off")
        .field("typical_p", &SamplingParams::typical_p, "1: off")
        .field("top_p", &SamplingParams::top_p, "1: off")
        .field("min_p", &SamplingParams::min_p, "0: off")
        .field("xtc_probability", &SamplingParams::xtc_probability, "0: off")
        .field("xtc_threshold", &SamplingParams::xtc_threshold, "above 0.5: off")
        .field("min_keep", &SamplingParams::min_keep)
        .field("mirostat", &SamplingParams::mirostat, "0: off; 1; 2")
        .field("mirostat_tau", &SamplingParams::mirostat_tau, "bits")
        .field("mirostat_eta", &SamplingParams::mirostat_eta)
        .field("seed", &SamplingParams::seed)
        .field("logit_bias", &SamplingParams::logit_bias, "id -> what is added")
        .field("banned_ids", &SamplingParams::banned_ids)
        .field("allowed_ids", &SamplingParams::allowed_ids, "empty: all")
        .field("min_new_tokens", &SamplingParams::min_new_tokens)
        .field("repeat_penalty", &SamplingParams::repeat_penalty, "1: off")
        .field("frequency_penalty", &SamplingParams::frequency_penalty, "0: off")
        .field("presence_penalty", &SamplingParams::presence_penalty, "0: off")
        .field("repeat_last_n", &SamplingParams::repeat_last_n, "tokens; -1: all")
        .field("openai_penalties", &SamplingParams::openai_penalties,
               "whether frequency and presence count all generated tokens and nothing of the prompt")
        .field("dry_multiplier", &SamplingParams::dry_multiplier, "0: off")
        .field("dry_base", &SamplingParams::dry_base)
        .field("dry_allowed_length", &SamplingParams::dry_allowed_length, "tokens")
        .field("dry_penalty_last_n", &SamplingParams::dry_penalty_last_n, "tokens; -1: all")
        .field("dry_sequence_breakers", &SamplingParams::dry_sequence_breakers, "sequences of ids")
        .field("max_new_tokens", &SamplingParams::max_new_tokens)
        .field("stop_ids", &SamplingParams::stop_ids);
}

}  // namespace

void bind_sampler(py::module_& m) {
    bind_params(m);

    // Keeps the GIL: a step takes microseconds, and a sampler is no object for several threads.
    py::class_<Sampler> sampler(m, "Sampler",
                                "Chooses the tokens of one request from logits; see csrc/sampling/sampler.h.");
    def_init(
        sampler,
        [](const std::shared_ptr<SamplingParams>& params, const std::vector<uint32_t>& prompt_ids,
           const std::optional<std::string>& isa) {
            return Sampler(params, {}, prompt_ids, sampling::kernels_of(isa.value_or("")));
        },
        py::arg("params").none(false), py::arg("prompt_ids") = std::vector<uint32_t>(), py::arg("isa") = py::none())
        .def(
            "sample",
            [](Sampler& self, const Logits& logits, uint64_t step, const std::optional<Words>& allowed) {
                const auto x = row(logits);
                return self.sample(x, step, mask(allowed, x.size()));
            },
            py::arg("logits"), py::arg("step"), py::arg("allowed") = py::none(),
            "The token of this step; accept() it before the next one. allowed: bit set, uint32 [ceil(V/32)].")
        .def("accept", &Sampler::accept, py::arg("id"), "The token that the request goes on with.")
        .def(
            "probabilities",
            [](Sampler& self, const Logits& logits, uint64_t step, const std::optional<Words>& allowed) {
                const auto x = row(logits);
                const Sampler::Distribution result = self.probabilities(x, step, mask(allowed, x.size()));
                return py::make_tuple(array(result.ids), array(result.probabilities));
            },
            py::arg("logits"), py::arg("step"), py::arg("allowed") = py::none(),
            "What sample() draws from: ids uint32 [n], probabilities float64 [n].")
        .def_property_readonly("mirostat_mu", &Sampler::mirostat_mu, "Largest surprise that is let through, bits.");

    m.def("top_logprobs", &top_logprobs, py::arg("logits"), py::arg("k"), py::arg("chosen"),
          py::arg("isa") = py::none(),
          "(log-probability of `chosen`, its rank, ids uint32 [k], log-probabilities float32 [k]) of logits [V]");
}

}  // namespace fixmin::bindings
