"""Bytes of weights that the emulated GPU reads for a token, beside those of all matrices, as JSON: {type: [read, all]}.

python weight_reads.py FOLDER
"""

import json
import sys
from pathlib import Path

import emulated_state
import numpy as np
from gguf_factory import make_model

from fixmin_cpp import _core

N_TOKENS = 3


def main() -> None:
    found = {}
    for kind in ("Q8_0", "Q4_0", "Q4_K", "Q6_K"):
        sizes = dict(embedding_length=256, feed_forward_length=1024, head_count=8, vocab_size=1000)
        path = make_model(Path(sys.argv[1]) / "model.gguf", weight_type=kind, **sizes)
        engine = _core.Engine(str(path), device="cuda", n_batch=1, n_threads=1)
        emulated_state.count_weights()
        engine.logits(np.arange(N_TOKENS, dtype=np.uint32), prefix_cache=False)
        found[kind] = [emulated_state.weight_bytes() / N_TOKENS, engine.info["weight_bytes"]]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
