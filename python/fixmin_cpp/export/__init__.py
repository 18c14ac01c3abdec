"""Files for other programs: `llama_cpp` (fixmin export). Needs fixmin-cpp[quantize].

architecture  which of llama.cpp's architectures computes what a model computes
fold          the bias of the output projection, where that architecture has none
tensors       that architecture's tensors, read from the model's
bpe           the tokenizer as llama.cpp's byte-level BPE, and what llama.cpp makes of a text with it
graph         that architecture's forward pass in float64
certificate   the exported file beside its source: logits and token ids
llama_cpp     all of it in one call
programs      what llama.cpp, Ollama, LM Studio and Docker Model Runner are told
"""
