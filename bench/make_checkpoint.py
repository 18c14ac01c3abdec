"""Write a random checkpoint of any shape in Hugging Face layout, by default as large as the published models.

    python bench/make_checkpoint.py out/full --variant affine

Nothing was trained, but the weights are scaled so that activations, attention and logits have the magnitudes of a
trained model (biases are not zero, norm weights not one), so that a wrong convention shows. Tensors are made and
written one after the other: peak memory is that of PyTorch and the largest tensor, not that of the model.
"""

import json
import math
import shutil
import sys
import zlib
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the reference model, without the need to build the native engine

from reference.configuration_fixmin import FixMinConfig  # noqa: E402
from reference.modeling_fixmin import FixMinForCausalLM  # noqa: E402

# The names of the types in a safetensors header.
DTYPES = {"float32": (torch.float32, "F32"), "float16": (torch.float16, "F16"), "bfloat16": (torch.bfloat16, "BF16")}


def tensor_shapes(config: FixMinConfig) -> dict[str, torch.Size]:
    """Name -> shape of everything a checkpoint stores, in the order of the state dict. Allocates nothing."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in FixMinForCausalLM(config).state_dict().items()}


def random_invertible(width: int, generator: torch.Generator) -> torch.Tensor:
    """A random matrix [K, K] of 0/1 that is invertible over GF(2): a product of unit lower and upper triangles,
    rows permuted."""
    noise = torch.randint(0, 2, (2, width, width), generator=generator)
    one = torch.eye(width, dtype=torch.long)
    product = (noise[0].tril(-1) + one) @ (noise[1].triu(1) + one) % 2
    return product[torch.randperm(width, generator=generator)].to(torch.uint8)


def make_tensor(name: str, shape: torch.Size, config: FixMinConfig, seed: int) -> torch.Tensor:
    """One tensor, float32 or uint8. Depends on its name and the seed only: not on the sharding or the order."""
    # Hashed together: PyTorch's CPU generator reads 32 bits of its seed.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    if name == "model.code.matrix":
        return random_invertible(config.code_width, generator)
    if name == "model.code.shift":
        return torch.randint(0, 2, shape, generator=generator, dtype=torch.uint8)
    if name == "model.code.table":
        # Distinct rows that no affine map gives: a random permutation of the ids' bits.
        ids = torch.randperm(2**config.code_width, generator=generator)[: shape[0]]
        return (ids[:, None] >> torch.arange(shape[1]) & 1).to(torch.uint8)
    tensor = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return tensor.mul_(0.1).add_(1.0) if name.endswith("norm.weight") else tensor.mul_(0.1)
    # Inputs of a projection are normed: gain / sqrt(in) makes outputs with a standard deviation of about `gain`.
    gain = 0.64  # 0.02 at width 1024
    if "attn_q" in name or "attn_k" in name:
        gain = 1.5  # scores vary by about 2: attention is neither uniform nor a copy of one token
    elif "attn_output" in name or "ffn_down" in name:
        gain = 1.0 / math.sqrt(2 * config.num_hidden_layers)  # the sum over all layers keeps the size of one
    elif name == "lm_head.weight":
        gain = 2.0  # logits vary by about 2
    elif name == "model.token_embd.weight":
        return tensor.mul_(0.5)
    return tensor.mul_(gain / math.sqrt(shape[1]))


def split(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Names in order, cut into groups of at most `limit` bytes (0: one group)."""
    groups: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if limit and groups[-1] and used + size > limit:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    return groups


def write_checkpoint(
    folder: Path, config: FixMinConfig, dtype: str = "float32", shard_bytes: int = 0, seed: int = 1
) -> int:
    """Write config.json, the model's code and the weights into `folder`; return the bytes of all weights.

    The safetensors header is written here because the library's writer wants all tensors in memory: 8 bytes with the
    length of the header, the header (JSON), then the tensors in the order of the header.
    """
    torch_type, type_name = DTYPES[dtype]
    folder.mkdir(parents=True, exist_ok=True)
    config.architectures = ["FixMinForCausalLM"]
    config.dtype = dtype
    config.auto_map = {
        "AutoConfig": "configuration_fixmin.FixMinConfig",
        "AutoModelForCausalLM": "modeling_fixmin.FixMinForCausalLM",
    }
    (folder / "config.json").write_text(config.to_json_string(), encoding="utf-8")
    for name in ("configuration_fixmin.py", "modeling_fixmin.py"):
        shutil.copyfile(ROOT / "reference" / name, folder / name)

    shapes = tensor_shapes(config)
    is_code = {name: name.startswith("model.code.") for name in shapes}
    sizes = {n: math.prod(shape) * (1 if is_code[n] else torch_type.itemsize) for n, shape in shapes.items()}
    groups = split(sizes, shard_bytes)
    weight_map = {}
    columns = (BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task("", total=sum(sizes.values()))
        for number, names in enumerate(groups, 1):
            single = len(groups) == 1
            file = "model.safetensors" if single else f"model-{number:05}-of-{len(groups):05}.safetensors"
            header: dict[str, object] = {"__metadata__": {"format": "pt"}}
            end = 0
            for name in names:
                entry_type = "U8" if is_code[name] else type_name
                header[name] = {"dtype": entry_type, "shape": [*shapes[name]], "data_offsets": [end, end + sizes[name]]}
                end += sizes[name]
                weight_map[name] = file
            text = json.dumps(header).encode()
            text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
            with (folder / file).open("wb") as out:
                out.write(len(text).to_bytes(8, "little") + text)
                for name in names:
                    tensor = make_tensor(name, shapes[name], config, seed)
                    if not is_code[name]:
                        tensor = tensor.to(torch_type)
                    out.write(memoryview(tensor.view(-1).view(torch.uint8).numpy()))
                    progress.advance(bar, sizes[name])
    if len(groups) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return sum(sizes.values())


def main(
    folder: Annotated[Path, typer.Argument(help="where the checkpoint goes")],
    variant: Annotated[str, typer.Option(help="fixed, affine, table or learned")] = "fixed",
    layers: Annotated[int, typer.Option(help="blocks")] = 32,
    width: Annotated[int, typer.Option(help="width of the residual stream")] = 1024,
    heads: Annotated[int, typer.Option(help="attention heads")] = 32,
    vocab_size: Annotated[int, typer.Option(help="number of token ids")] = 65536,
    mlp: Annotated[int | None, typer.Option(help="width of the feed-forward layer (default: 4 × width)")] = None,
    context: Annotated[int, typer.Option(help="context length in tokens")] = 1024,
    option: Annotated[
        list[str] | None,
        typer.Option("--set", help='any other field of FixMinConfig as NAME=JSON, e.g. activation="swiglu"'),
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16")] = "float32",
    shard_mb: Annotated[int, typer.Option(help="largest file in MB (0: one file)", min=0)] = 0,
    seed: Annotated[int, typer.Option(help="of all weights", min=0)] = 1,
    tokenizer: Annotated[
        Path | None, typer.Option(help="a tokenizer.json to copy", exists=True, dir_okay=False)
    ] = None,
) -> None:
    """Write a random checkpoint."""
    if dtype not in DTYPES:
        raise typer.BadParameter(f"{dtype!r} is not one of {', '.join(DTYPES)}", param_hint="--dtype")
    fields = {}
    for text in option or []:
        name, _, value = text.partition("=")
        try:
            fields[name] = json.loads(value)
        except json.JSONDecodeError:
            fields[name] = value  # a bare word is a string
    try:
        config = FixMinConfig(
            vocab_size=vocab_size,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=mlp,
            max_position_embeddings=context,
            code_kind=variant,
            **fields,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    size = write_checkpoint(folder, config, dtype, shard_mb * 1_000_000, seed)
    if tokenizer:
        shutil.copyfile(tokenizer, folder / "tokenizer.json")
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context}, indent=2) + "\n",
            encoding="utf-8",
        )
    typer.echo(f"{folder}: {size / 1e9:.3f} GB of weights")


if __name__ == "__main__":
    typer.run(main)
