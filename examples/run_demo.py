"""Answer the model cards' prompts and write a paragraph with the two demo checkpoints (`make demo` converts them).

    python examples/run_demo.py FOLDER       # with fixed.gguf and affine.gguf in it

The exit code says whether the answers were right.
"""

import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

from fixmin_cpp import Model

# From the cards of the two published checkpoints.
QUESTIONS = {
    "Question: What is the capital of France?\nAnswer:": "Paris",
    "Question: What is the capital of UK?\nAnswer:": "London",
}
STORY = "Once upon a time,"


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    console = Console(highlight=False)
    n_wrong = 0
    for variant in ("fixed", "affine"):
        with Model(Path(sys.argv[1]) / f"{variant}.gguf") as model:
            info = model.info
            console.print(
                f"\n{variant}: {info['code_width']}-bit codes, {info['block_count']} layers, width "
                f"{info['embedding_length']}; {info['isa']}, {info['n_threads']} threads"
            )
            for prompt, answer in QUESTIONS.items():
                # The cards ask for three tokens: an answer, and perhaps the beginning of a next line.
                text = model.generate(prompt, max_new_tokens=3, stop="\n").text
                right = text.strip().startswith(answer)
                n_wrong += not right
                console.print(Text(prompt), Text(text, "bold" if right else "red"), "" if right else " (wrong)", sep="")
            completion = model.generate(STORY, max_new_tokens=120, temperature=0.7, top_p=0.9, seed=1)
            console.print(Text("\n" + STORY), Text(completion.text, "bold"), sep="")
            console.print(
                f"({completion.timings.n_generated} tokens, {completion.timings.decode_tok_s:,.0f} per second)",
                style="dim",
            )
    return 1 if n_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
