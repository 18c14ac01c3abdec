"""Compare a converted file with its checkpoint run by PyTorch in float32: logits and greedy tokens.

    python bench/against_pytorch.py CHECKPOINT_DIR FILE.gguf [--prompts 20] [--steps 64] [--length 48] [--text FILE]

Prompts are slices of the text (tokenised with the checkpoint's tokenizer) or, without one, random ids. Printed per
file: the largest and the mean relative difference ||fixmin - pytorch|| / ||pytorch|| of all logits of a prompt, and on
how many prompts greedy decoding gives the same `steps` tokens. The checkpoint's own code is executed.
"""

import argparse
import json

import numpy as np
import torch
from peers.worker import kept
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from fixmin_cpp import Model


def prompts_of(arguments: argparse.Namespace, vocab_size: int) -> list[np.ndarray]:
    """[prompts][length] token ids."""
    rng = np.random.default_rng(0)
    if not arguments.text:
        return list(rng.integers(0, vocab_size, (arguments.prompts, arguments.length)))
    tokenizer = Tokenizer.from_file(f"{arguments.checkpoint}/tokenizer.json")
    with open(arguments.text, encoding="utf-8") as file:
        ids = np.array(tokenizer.encode(file.read(), add_special_tokens=False).ids)
    starts = rng.integers(0, len(ids) - arguments.length, arguments.prompts)
    return [ids[s : s + arguments.length] for s in starts]


def greedy_pytorch(model: torch.nn.Module, ids: np.ndarray, steps: int) -> list[int]:
    """The next `steps` tokens, with the model's KV cache; no end-of-text."""
    out = model(torch.from_numpy(ids)[None], use_cache=True)
    tokens: list[int] = []
    for _ in range(steps):
        tokens.append(int(out.logits[0, -1].argmax()))
        out = model(torch.tensor([[tokens[-1]]]), **kept(model, out), use_cache=True)
    return tokens


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("gguf")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--length", type=int, default=48, help="tokens of a prompt")
    parser.add_argument("--text", help="text file that the prompts are cut from")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()

    reference = AutoModelForCausalLM.from_pretrained(arguments.checkpoint, trust_remote_code=True, dtype=torch.float32)
    reference.eval()
    differences, same = [], 0
    with Model(arguments.gguf, kv_type="f32") as model:
        for ids in prompts_of(arguments, model.info["vocab_size"]):
            expected = reference(torch.from_numpy(ids)[None]).logits[0].double().numpy()
            got = model.logits(ids)
            differences.append(float(np.linalg.norm(got - expected) / np.linalg.norm(expected)))
            tokens = model.generate(ids, max_new_tokens=arguments.steps, ignore_eos=True).token_ids
            same += tokens == greedy_pytorch(reference, ids, arguments.steps)
    result = {
        "file": arguments.gguf,
        "prompts": arguments.prompts,
        "relative_difference_max": max(differences),
        "relative_difference_mean": float(np.mean(differences)),
        "greedy_steps": arguments.steps,
        "greedy_identical": same,
    }
    if arguments.json:
        print(json.dumps(result))
    else:
        for key, value in result.items():
            print(f"{key:26} {value:.3g}" if isinstance(value, float) else f"{key:26} {value}")


if __name__ == "__main__":
    main()
