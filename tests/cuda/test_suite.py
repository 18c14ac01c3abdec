"""Everything above the door on the emulated GPU: tests of its own, and the project's with FIXMIN_DEVICE=cuda.

Of the project's those are chosen that reach another part each, and that the emulator can do in seconds. Any file can be
run in the same way; what is about the CPU itself says so by device="cpu".
"""

import pytest
from emulation import ROOT, passed

pytestmark = pytest.mark.slow  # it compiles the package

#: Of files in tests/, what is run: an expression for -k.
PROJECT = {
    "engine/test_scheduler.py": "not together_as_alone and not scores_of_a_part and not random_cancels",
    "python/test_batching.py": "not nobody_uses and not event_loop",
    "python/test_candidates.py": "",
    "python/test_cli.py": "prompt_from or test_json or ids_guesses",
    "python/test_end_of_text.py": "not transformers",
    "python/test_evaluate.py": "not command and not perplexity",
    "python/test_generation.py": "not softmax and not oracle and not torch and not comes_back",
    "python/test_hf.py": "continues_from or ends_at_the_end or streamers",
    "python/test_loaded_bytes.py": "",
    "python/test_on_token.py": "",
    "serve/test_batch_answers.py": "means_the_same and chat or only_a_server",
    "serve/test_chat.py": "not template",
    "serve/test_constrained.py": "json_object or special_token_ends",
    "serve/test_endpoints.py": "not schemathesis",
    "serve/test_fairness.py": "small_request or take_turns",
    "serve/test_operation.py": "went_away or cache_holds",
    "convert/test_imatrix.py": "not demo and not oracle",
}


@pytest.mark.parametrize("step", ["graph", "persistent"])
@pytest.mark.parametrize("file", ["on_both_devices.py", "faults.py"])
def test_of_its_own(emulated, file, step):
    path = ROOT / "tests" / "cuda" / file
    assert passed(emulated("-m", "pytest", "-q", "-p", "no:cacheprovider", path, FIXMIN_CUDA_STEP=step)) >= 8


@pytest.mark.parametrize("file", PROJECT)
def test_of_the_project(emulated, file):
    path = ROOT / "tests" / file
    options = ["-q", "-p", "no:cacheprovider", "-m", "not slow and not external", "-k", PROJECT[file]]
    assert passed(emulated("-m", "pytest", *options, path, FIXMIN_DEVICE="cuda")) >= 2


@pytest.mark.external
def test_of_the_evaluation_harness(emulated):
    path = ROOT / "tests" / "python" / "test_lm_eval.py"
    options = ["-q", "-p", "no:cacheprovider", "-k", "by_hand or greedy_answers or sampling"]
    assert passed(emulated("-m", "pytest", *options, path, FIXMIN_DEVICE="cuda")) >= 2
