// How the next token of a request is chosen. Names, defaults and order are llama.cpp's: docs/sampling.md.
#pragma once
#include <cstdint>
#include <map>
#include <vector>

namespace fixmin::sampling {

struct SamplingParams {
    // Changes of single logits, in this order; they count for greedy too.
    std::vector<uint32_t> allowed_ids;     // if any: nothing else is drawn
    std::vector<uint32_t> banned_ids;      // never drawn
    uint32_t min_new_tokens = 0;           // before so many no stop id is drawn
    std::map<uint32_t, float> logit_bias;  // added; -infinity: never drawn
    float repeat_penalty = 1;              // divides positive logits of recent tokens, multiplies negative ones
    float frequency_penalty = 0;           // subtracted for every time a token came up recently
    float presence_penalty = 0;            // subtracted once if it did
    int32_t repeat_last_n = 64;            // recent: so many tokens, prompt included; -1: all
    // Whether frequency and presence are counted over all generated tokens and nothing of the prompt, as OpenAI does.
    bool openai_penalties = false;
    float dry_multiplier = 0;  // above 0: a token that would continue a repetition of n tokens loses
    float dry_base = 1.75f;    //   multiplier * base ^ (n - allowed_length) if n >= allowed_length
    uint32_t dry_allowed_length = 2;
    int32_t dry_penalty_last_n = -1;                           // repetitions in the last so many tokens; -1: in all
    std::vector<std::vector<uint32_t>> dry_sequence_breakers;  // a repetition does not reach across one of these

    // Which tokens are left, in this order.
    float top_n_sigma = -1;     // logits within so many standard deviations of the largest; <= 0: all
    uint32_t top_k = 40;        // the k largest; 0: all
    float typical_p = 1;        // this share of the probability, nearest to the entropy first; 1: all
    float top_p = 0.95f;        // this share of the probability, largest first; 1: all
    float min_p = 0.05f;        // what is at least this probable in relation to the largest; 0: all
    float xtc_probability = 0;  // how often all but the last of the tokens above xtc_threshold are removed
    float xtc_threshold = 0.1f;
    uint32_t min_keep = 0;  // typical_p, top_p, min_p and XTC leave at least so many

    uint32_t mirostat = 0;      // 1 or 2: this in place of those
    float mirostat_tau = 5;     // surprise aimed at, bits
    float mirostat_eta = 0.1f;  // how fast it is corrected

    // The draw.
    float temperature = 0;        // 0: greedy, for which nothing of the above matters but the changes of logits
    float dynatemp_range = 0;     // above 0: the temperature lies within +- range, by the entropy
    float dynatemp_exponent = 1;  // how it depends on it
    uint64_t seed = 0;

    // When generation ends.
    uint32_t max_new_tokens = 128;
    std::vector<uint32_t> stop_ids;  // generation ends at one of these; it is not part of the result
};

/// Throws ArgumentError, naming what is out of range or not a number.
void check(const SamplingParams& params);

}  // namespace fixmin::sampling
