// Runs models where there is no Python: under an emulator. Driven by tests/native/test_isas_under_qemu.py.
//
// logits_main isas: one line per instruction set of this build, "NAME usable" or "NAME missing"; then "isa NAME", the
// one chosen.
//
// logits_main logits: reads one run per line from standard input and writes its logits. A line is
//
//   ISA THREADS CHUNK KV MODEL OUT ID ID ...
//
// ISA "-" takes the default, KV is f32, f16 or q8_0, OUT gets [T][V] float32 as they lie in memory.
#include <algorithm>
#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <numeric>
#include <sstream>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "error.h"
#include "kernels/isa.h"

namespace {

using namespace fixmin;

void print_isas() {
    for (const kernels::Isa& isa : kernels::isas()) {
        std::cout << isa.name << (isa.supported ? " usable\n" : " missing\n");
    }
    std::cout << "isa " << kernels::default_kernels().name << "\n";
}

void run_line(const std::string& line) {
    std::istringstream in(line);
    engine::EngineOptions all;
    model::BackendOptions& options = all.backend;
    std::string kv, model, out;
    in >> options.isa >> options.n_threads >> options.n_batch >> kv >> model >> out;
    const auto is_named = [&](quant::KvType type) { return kv == quant::name(type); };
    const auto* type = std::find_if(std::begin(quant::all_kv_types), std::end(quant::all_kv_types), is_named);
    if (!in || type == std::end(quant::all_kv_types)) throw ArgumentError("this line is not a run: " + line);
    if (options.isa == "-") options.isa.clear();
    options.kv_type = *type;
    std::vector<uint32_t> ids;
    for (uint32_t id; in >> id;) ids.push_back(id);

    engine::Engine engine(gguf::GgufFile::open(model), all, [](double) {});
    std::vector<float> logits(ids.size() * engine.hyperparams().vocab_size);
    engine::RequestOptions wanted;
    wanted.generate = false;
    wanted.logit_rows.resize(ids.size());
    std::iota(wanted.logit_rows.begin(), wanted.logit_rows.end(), 0);
    wanted.logits = logits.data();
    const auto request = engine.submit(ids, std::move(wanted));
    while (!request->wait_end(1)) {
    }
    if (const auto error = request->result().error) std::rethrow_exception(error);
    std::ofstream file(out, std::ios::binary);
    file.write(reinterpret_cast<const char*>(logits.data()), std::streamsize(logits.size() * sizeof(float)));
    if (!file.flush()) throw Error("cannot write " + out);
}

}  // namespace

int main(int argc, char** argv) {
    const std::string mode = argc == 2 ? argv[1] : "";
    try {
        if (mode == "isas") {
            print_isas();
        } else if (mode == "logits") {
            for (std::string line; std::getline(std::cin, line);) run_line(line);
        } else {
            std::cerr << "usage: logits_main isas | logits < RUNS\n";
            return 2;
        }
    } catch (const std::exception& error) {
        std::cerr << error.what() << "\n";
        return 1;
    }
}
