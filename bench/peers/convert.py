"""Make a peer's own model files; runs in the environment of that peer.

    convert.py llama      IN.gguf OUT.gguf q4_k_m    # llama.cpp's own quantisation of a float16 file
    convert.py openvino   HF_DIR  OUT_DIR  int8      # or int4: weights only, by optimum-intel and nncf
    convert.py ctranslate2 HF_DIR OUT_DIR  int8

HF_DIR is what bench/export_gptneox.py --outtype hf writes.
"""

import sys
from pathlib import Path


def llama(source: str, out: str, form: str) -> None:
    import ctypes

    import llama_cpp

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{form.upper()}")
    if llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(options)) != 0:
        raise SystemExit(f"llama.cpp did not quantise {source}")


def openvino(source: str, out: str, form: str) -> None:
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    how = OVWeightQuantizationConfig(bits={"int8": 8, "int4": 4}[form])
    model = OVModelForCausalLM.from_pretrained(source, export=True, compile=False, quantization_config=how)
    keep_last_logits(model.model)
    model.save_pretrained(out)


def keep_last_logits(graph) -> None:
    """Compute logits for the last position only, as OpenVINO GenAI does with an exported model when it loads it."""
    import numpy as np
    import openvino.opset13 as ops

    node = graph.output("logits").get_node()
    while node.get_type_name() != "MatMul":
        node = node.input_value(0).get_node()
    last = ops.slice(node.input_value(0), *(np.array([x]) for x in (-1, np.iinfo(np.int64).max, 1, 1)))
    node.input(0).replace_source_output(last.output(0))
    graph.validate_nodes_and_infer_types()


def ctranslate2(source: str, out: str, form: str) -> None:
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(source).convert(out, quantization=form, force=True)


if __name__ == "__main__":
    if len(sys.argv) != 5 or sys.argv[1] not in ("llama", "openvino", "ctranslate2"):
        raise SystemExit(__doc__)
    peer, source, out, form = sys.argv[1:]
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    globals()[peer](source, out, form)
