// Draws tokens from rows of logits and from the emulated device's extracts of them. Driven by test_extracts.py.
//
//   extracts_main V ROWS MASKS < SAMPLES
//
// ROWS: [n][V] float32, MASKS: [m][V / 32 rounded up] uint32, as they lie in memory. A sample is a line of name=value:
// row=, step=, seed=, mask= (none without), ban= (ids below it), only= (its multiples) and the names of sampling
// parameters. All are extracted at once. For each a line comes back with two words: the token drawn from the row, or
// "error"; the token drawn from the extract, "unasked" (the sampler wants the row) or "lacking" (the extract is not
// enough).
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "cuda/extracts.h"
#include "error.h"
#include "sampling/sampler.h"

namespace {

using namespace fixmin;

template <typename T>
std::vector<T> read_all(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    const std::string bytes{std::istreambuf_iterator<char>(file), {}};
    std::vector<T> values(bytes.size() / sizeof(T));
    bytes.copy(reinterpret_cast<char*>(values.data()), values.size() * sizeof(T));
    return values;
}

struct Sample {
    std::shared_ptr<sampling::SamplingParams> params = std::make_shared<sampling::SamplingParams>();
    uint32_t row = 0, step = 0;
    int mask = -1;
};

Sample parse(const std::string& line, uint32_t v) {
    Sample sample;
    sampling::SamplingParams& p = *sample.params;
    const std::map<std::string, float*> floats = {{"temperature", &p.temperature},
                                                  {"top_p", &p.top_p},
                                                  {"min_p", &p.min_p},
                                                  {"typical_p", &p.typical_p},
                                                  {"top_n_sigma", &p.top_n_sigma},
                                                  {"xtc_probability", &p.xtc_probability},
                                                  {"xtc_threshold", &p.xtc_threshold},
                                                  {"dynatemp_range", &p.dynatemp_range},
                                                  {"presence_penalty", &p.presence_penalty}};
    const std::map<std::string, uint32_t*> numbers = {{"row", &sample.row},      {"step", &sample.step},
                                                      {"top_k", &p.top_k},       {"min_keep", &p.min_keep},
                                                      {"mirostat", &p.mirostat}, {"min_new_tokens", &p.min_new_tokens}};
    std::istringstream in(line);
    for (std::string word; in >> word;) {
        const std::string name = word.substr(0, word.find('=')), value = word.substr(word.find('=') + 1);
        if (name == "mask")
            sample.mask = std::stoi(value);
        else if (name == "ban")
            for (uint32_t id = 0; id < std::stoul(value); ++id) p.banned_ids.push_back(id);
        else if (name == "only")
            for (uint32_t id = 0; id < v; id += uint32_t(std::stoul(value))) p.allowed_ids.push_back(id);
        else if (name == "seed")
            p.seed = std::stoull(value);
        else if (floats.contains(name))
            *floats.at(name) = float(std::strtod(value.c_str(), nullptr));
        else
            *numbers.at(name) = uint32_t(std::stoul(value));
    }
    p.stop_ids = {0};  // of which min_new_tokens is
    return sample;
}

}  // namespace

int main(int, char** argv) {
    const uint32_t v = uint32_t(std::stoul(argv[1]));
    const auto rows = read_all<float>(argv[2]);
    const auto masks = read_all<uint32_t>(argv[3]);
    const kernels::Kernels& kernels = sampling::kernels_of("");
    std::vector<Sample> samples;
    for (std::string line; std::getline(std::cin, line);) samples.push_back(parse(line, v));

    const auto device = cuda::open_device(0);
    cuda::Arena arena(*device);
    cuda::Part logits;
    cuda::Extracts extracts(v);
    if (!extracts.possible()) return 3;
    arena.add(logits, rows.size() * sizeof(float));
    extracts.add_to(arena);
    arena.allocate("a test");
    device->upload(logits.data(), rows.data(), logits.size());

    const auto allowed = [&](const Sample& s) {
        return s.mask < 0 ? nullptr : &masks[size_t(s.mask) * ((v + 31) / 32)];
    };
    const auto sampler = [&](const Sample& s) {
        return std::make_unique<sampling::Sampler>(s.params, std::nullopt, std::vector<uint32_t>{1, 2, 1}, kernels);
    };
    std::vector<std::unique_ptr<sampling::Sampler>> of_extracts;
    std::vector<numerics::ExtractQuery> queries;
    std::vector<int> asked(samples.size(), -1);
    for (size_t i = 0; i < samples.size(); ++i) {
        of_extracts.push_back(sampler(samples[i]));
        auto query = of_extracts[i]->query(v, samples[i].step, allowed(samples[i]));
        if (!query) continue;
        query->row = samples[i].row;
        asked[i] = int(queries.size());
        queries.push_back(*query);
    }
    std::vector<numerics::Extract> answers(queries.size());
    extracts.take(*device, logits.as<float>(), queries, answers.data());
    for (size_t i = 0; i < samples.size(); ++i) {
        const Sample& s = samples[i];
        try {
            std::cout << sampler(s)->sample(std::span(rows).subspan(size_t(s.row) * v, v), s.step, allowed(s)) << " ";
        } catch (const Error&) {
            std::cout << "error ";
        }
        if (asked[i] < 0) {
            std::cout << "unasked\n";
            continue;
        }
        const auto id = of_extracts[i]->sample(answers[size_t(asked[i])], v, s.step);
        std::cout << (id ? std::to_string(*id) : "lacking") << "\n";
    }
}
