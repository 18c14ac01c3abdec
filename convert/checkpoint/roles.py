"""Which stored tensor is which: by shape, name and place, without running any code.

Names are evidence, shapes are proof. What neither settles is returned as alternatives (`Roles.options`), never guessed.
"""

import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ...errors import CheckpointError
from ..spec import TensorRecipe
from .recipes import gather, stored_ref
from .source import Source, context_lengths, hyper, is_no_weight, some


def leftovers_error(source: Source, names: Iterable[str], why: str) -> CheckpointError:
    """The refusal of tensors that have no role."""
    listed = "; ".join(f"{n} {source.tensors[n].shape}" for n in sorted(names))
    return CheckpointError(
        f"tensors without a place in the model ({why}): {listed}. Give each a place in a --map FILE, or leave "
        "them out with --allow-unexpected NAME"
    )


# --- --map ---------------------------------------------------------------------------------------------------------


@dataclass
class Map:
    """A user's assignment. `places`: GGUF name -> (checkpoint tensor, transpose, first row, end row or None)."""

    places: dict[str, tuple[str, bool, int, int | None]] = field(default_factory=dict)
    ignored: set[str] = field(default_factory=set)


def read_map(source: Source, path: str | os.PathLike[str] | None) -> Map:
    """Read a --map file.

    Lines of the form

        blk.{i}.attn_q.weight = layers.{i}.attention.w1        # {i}: every block
        blk.{i}.attn_k.weight = layers.{i}.attention.w2 T      # T: stored [in, out]
        blk.{i}.attn_v.weight = layers.{i}.fused rows 128:192  # rows of the (transposed) matrix
        layers.{i}.scratch = ignore                            # no part of the model

    or a JSON object with the same left and right sides. CheckpointError for tensors that are not there.
    """
    result = Map()
    if path is None:
        return result
    try:
        text = Path(path).read_text(encoding="utf-8")
        pairs = _map_object(text) if text.lstrip().startswith("{") else _map_lines(text)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"--map {path}: {error}") from None
    for left, right in pairs:
        for i in range(len(source.tensors)) if "{i}" in left + right else [0]:
            gguf, words = left.replace("{i}", str(i)), right.replace("{i}", str(i)).split()
            if words == ["ignore"] and gguf in source.tensors:
                result.ignored.add(gguf)
                continue
            if not words or words[0] not in source.tensors:
                if "{i}" in left and i > 0:
                    break
                name = gguf if words == ["ignore"] else " ".join(words[:1])
                raise CheckpointError(f"--map {path}: the checkpoint has no tensor {name!r}")
            match = re.fullmatch(r"(T ?)?(rows (\d{1,18}):(\d{1,18}) ?)?(T ?)?", " ".join(words[1:]))
            if match is None or (match[1] and match[5]):
                said = " ".join(words[1:])
                raise CheckpointError(
                    f"--map {path}: {gguf}: expected 'T' or 'rows FIRST:END' after {words[0]}, not {said!r}"
                )
            if gguf in result.places:
                raise CheckpointError(f"--map {path}: {gguf} has two places")
            first, end = (int(match[3]), int(match[4])) if match[2] else (0, None)
            result.places[gguf] = (words[0], bool(match[1] or match[5]), first, end)
    return result


def _map_object(text: str) -> list[tuple[str, str]]:
    pairs = json.loads(text, object_pairs_hook=list)
    for name, value in pairs:
        if not isinstance(value, str):
            raise ValueError(f"{name}: {value!r} is not 'CHECKPOINT_NAME'")
    return pairs


def _map_lines(text: str) -> list[tuple[str, str]]:
    pairs = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.split("#")[0].strip()
        if line:
            left, equals, right = line.partition("=")
            if not equals:
                raise ValueError(f"line {number} is not 'GGUF_NAME = CHECKPOINT_NAME'")
            pairs.append((left.strip(), right.strip()))
    return pairs


def mapped_recipes(source: Source, mapping: Map) -> dict[str, TensorRecipe]:
    """GGUF name -> recipe of a user's map."""
    recipes = {}
    for gguf, (name, transpose, first, end) in mapping.places.items():
        shape = source.tensors[name].shape
        shape = shape[::-1] if transpose else shape
        end = shape[0] if end is None else end
        if not shape or not first < end <= shape[0]:
            raise CheckpointError(f"--map: {gguf}: rows {first}:{end} of {name} {shape}")
        view = (lambda a: a.T) if transpose else (lambda a: a)
        recipes[gguf] = gather([stored_ref(source, name, shape, view)], np.arange(first, end))
    return recipes


# --- roles by name and shape ---------------------------------------------------------------------------------------

# The end of a tensor's path in its block, in lower case; the first pattern that fits counts. Words of a second pattern
# must occur before it.
_MATRIX_NAMES: tuple[tuple[str, str, str], ...] = (
    ("attn_qkv", r"(c_attn|qkv(_proj)?|w_?qkv|query_key_value|in_proj|w_?pack|to_qkv|attn_qkv|qkv_linear)", ""),
    ("attn_q", r"(q|q_?proj|query(_proj|_net|_layer)?|w_?q|to_q|q_?lin(ear)?|queries|wq)", ""),
    ("attn_k", r"(k|k_?proj|key(_proj|_net|_layer)?|w_?k|to_k|k_?lin(ear)?|keys|wk)", ""),
    ("attn_v", r"(v|v_?proj|value(_proj|_net|_layer)?|w_?v|to_v|v_?lin(ear)?|values|wv)", ""),
    ("ffn_gate_up", r"(gate_up(_proj)?|w12|gate_and_up|up_gate(_proj)?)", ""),
    ("ffn_gate", r"(gate(_proj)?|w_?gate|ffn_gate|gate_?lin(ear)?)", ""),
    ("ffn_up", r"(up(_proj)?|w_?up|ffn_up|c_fc|fc_?1|fc_?in|dense_h_to_4h|lin(ear)?_?1|expand|w_?in)", ""),
    ("ffn_up", r"intermediate\.dense", ""),
    ("ffn_down", r"(down(_proj)?|w_?down|ffn_down|fc_?2|fc_?out|dense_4h_to_h|lin(ear)?_?2|shrink|contract)", ""),
    ("ffn_down", r"(c_proj|w_?out|out(_proj)?|proj|dense|output\.dense)", r"(mlp|ffn?|feed_?forward)"),
    ("attn_output", r"(o|o_?proj|out(_proj|_lin|put|_linear)?|w_?o|to_out(\.0)?|c_proj|proj(ection)?|dense|wo)", ""),
)  # fmt: skip
_ATTN_NORM = re.compile(
    r"((^|[._])(ln|norm|layer_?norm|rms|rms_?norm)_?(1|attn|attention)|input_?(layer_?)?norm|(pre_?)?attn_?(layer_?)?norm|"
    r"(pre_?)?attention_?(layer_?)?norm|pre_?attn|pre_?attention)([._]|$)"
)
_FFN_NORM = re.compile(
    r"((^|[._])(ln|norm|layer_?norm|rms|rms_?norm)_?(2|mlp|ffn?|feed_?forward)|post_?attention_?(layer_?)?norm|"
    r"(pre_?)?(ffn?|mlp|feed_?forward)_?(layer_?)?norm|pre_?(ffn?|mlp|feed_?forward))([._]|$)"
)
_OUTPUT = re.compile(
    r"(^|[._])(lm_?head|head|output|embed_out|to_logits|unembed(ding)?|logits|decoder|out_proj|proj_out)"
)
_EMBEDDING = re.compile(r"(^|[._])(wte|tok\w*|embed\w*|word\w*|emb)([._]|$)")


@dataclass
class Part:
    """A weight and perhaps its bias, by their names in the checkpoint."""

    weight: str
    bias: str | None = None


@dataclass
class Roles:
    """What every tensor is. `blocks[i]`: role ("attn_q", "ffn_gate_up", "attn_norm", ...) -> tensors."""

    width: int
    blocks: list[dict[str, Part]]
    top: dict[str, Part]  # "output", "output_norm", and one of "token_embd", "code_table", or "matrix" and "shift"
    transposed: bool | None  # matrices are stored [in, out]; None: shapes do not tell
    options: list[tuple[str, list[tuple[str, list[dict[str, Part]]]]]]  # (what is open, [(label, blocks)])
    ignored: dict[str, str]  # tensors that are no part of the model, and why


def assign_roles(source: Source, mapping: Map, vocab_size: int | None, transposed: bool | None = None) -> Roles:
    """Give every tensor of a checkpoint a role. CheckpointError for what has none, with names and shapes.

    transposed: whether matrices are stored [in, out], if the user says so.
    """
    ignored = dict.fromkeys(mapping.ignored, "--map")
    mapped = {name for name, *_ in mapping.places.values()}
    names = []
    # A causal mask is as long as the context or longer; a matrix of the code is much smaller.
    least = min(context_lengths(source.config).values(), default=0)
    for name, tensor in source.tensors.items():
        square = len(tensor.shape) >= 2 and tensor.shape[-1] == tensor.shape[-2] and tensor.shape[-1] > 1
        square = square and tensor.size == tensor.shape[-1] ** 2
        values = source.read_raw(name) if square and tensor.shape[-1] >= least else None
        if name not in ignored and is_no_weight(name, values):
            ignored[name] = "a mask or a table of positions"
        elif name not in ignored and name not in mapped and source.allow_unexpected(name):
            ignored[name] = "--allow-unexpected"
        elif name not in ignored and name not in mapped:
            names.append(name)
    if not mapping.places:
        names += complete_blocks(source, names)
    placed = {int(m[1]) for gguf in mapping.places if (m := re.match(r"blk\.(\d{1,9})\.", gguf))}
    try:
        blocks_at, rest = split_blocks(source, names)
    except CheckpointError:
        if not placed or placed != set(range(len(placed))):
            raise
        blocks_at, rest = [{} for _ in range(max(placed) + 1)], names  # the map says it all
    width = model_width(source, blocks_at[0], mapping)
    transposed = orientation(source, blocks_at[0], width) if transposed is None else transposed
    blocks, alternatives, left = [], [], []
    for block in blocks_at:
        parts, unsure, unknown = block_roles(source, block, width, transposed)
        blocks.append(parts)
        alternatives.append(unsure)
        left += unknown
    top, unknown = top_roles(source, rest, width, vocab_size)
    if left or unknown:
        why = "their names and shapes do not say what they are"
        if transposed is None:
            why += ", nor whether matrices are stored [out, in] or [in, out], which --transposed settles"
        raise leftovers_error(source, [*left, *unknown], why)
    norms = [[r for r in ("attn_norm", "ffn_norm") if r in b or f"blk.{i}.{r}.weight" in mapping.places]
             for i, b in enumerate(blocks)]  # fmt: skip
    if len({tuple(n) for n in norms}) > 1 or len(norms[0]) == 1:
        raise CheckpointError(
            "only one of the two norms of a block is stored, or not in every block (shared between them?): name the "
            "other in a --map FILE (blk.{i}.ffn_norm.weight = ...)"
        )
    options = []
    for what in alternatives[0] if alternatives else {}:
        labels = [label for label, _ in alternatives[0][what]]
        choices = [(label, [{**b, **a[what][n][1]} for b, a in zip(blocks, alternatives, strict=True)])
                   for n, label in enumerate(labels)]  # fmt: skip
        options.append((what, choices))
    return Roles(width, blocks, top, transposed, options, ignored)


def complete_blocks(source: Source, names: list[str]) -> list[str]:
    """Refuse a block that lacks what the others have, or fill it where the user allows it; returns what was filled.

    A bias or a norm that one block alone lacks is not one that its author left out.
    """
    members = max(_families(names).values(), default={}, key=lambda m: _size(source, m))
    period = 1 if _regularity(members, 1) >= _regularity(members, 2) else 2
    filled, lacking = [], []
    for phase in range(period):
        group = {i: paths for i, paths in members.items() if i % period == phase}
        counts = Counter(suffix for paths in group.values() for suffix in paths)
        for suffix in [s for s, n in counts.items() if len(group) / 2 <= n < len(group)]:
            like = next(paths[suffix] for paths in group.values() if suffix in paths)
            number = next(i for i, paths in group.items() if suffix in paths)
            for i in sorted(i for i, paths in group.items() if suffix not in paths):
                name = _renumbered(like, number, i, suffix)
                shape = source.tensors[like].shape
                if len(shape) == 1 and source.allow_missing(name):
                    value = 0.0 if _is_bias(suffix) else 1.0
                    source.fill(name, shape, value)
                    source.warn(f"not in the files, so filled with {value:g}: {name} (--allow-missing)")
                    filled.append(name)
                else:
                    lacking.append(f"{name} {shape}")
    gaps = sorted(set(range(min(members, default=0), max(members, default=-1) + 1)) - set(members))
    if gaps and not lacking:
        like = next(iter(members[min(members)].values()))
        lacking = [f"all of block {i} (as {_renumbered(like, min(members), i, '')})" for i in gaps]
    if lacking and len(members) > 1:
        raise CheckpointError(
            f"the files lack weights that other blocks have: {some(lacking)}. Vectors that are zero (biases) or one "
            "(gains) may be left out with --allow-missing NAME (or a pattern with *)"
        )
    return filled


def _families(names: Iterable[str]) -> dict[str, dict[int, dict[str, str]]]:
    """What stands before a number in the names -> number -> what stands behind it -> name."""
    families: dict[str, dict[int, dict[str, str]]] = {}
    for name in names:
        for match in re.finditer(r"\d+", name):
            suffix = name[match.end() :].lstrip("._")
            families.setdefault(name[: match.start()], {}).setdefault(int(match[0]), {})[suffix] = name
    return families


def _size(source: Source, members: Mapping[int, Mapping[str, str]]) -> int:
    return sum(source.tensors[n].size for paths in members.values() for n in paths.values()) if len(members) > 1 else 0


def _regularity(members: Mapping[int, Mapping[str, str]], period: int) -> float:
    """Fraction of the tensors that most blocks of the same phase have."""
    regular = 0
    for phase in range(period):
        group = [paths for i, paths in members.items() if i % period == phase]
        counts = Counter(suffix for paths in group for suffix in paths)
        regular += sum(n for n in counts.values() if n > len(group) / 2)
    return regular / max(sum(map(len, members.values())), 1)


def _renumbered(name: str, number: int, new: int, suffix: str) -> str:
    """The name of the same tensor in another block."""
    end = len(name) - len(suffix)
    start = name.rindex(str(number), 0, end)
    return name[:start] + str(new) + name[start + len(str(number)) :]


def split_blocks(source: Source, names: list[str]) -> tuple[list[dict[str, str]], list[str]]:
    """(per block: path in the block -> tensor name, all other names).

    The number of the block is the one in the names that repeats the most weights. Sequences that alternate between
    attention and MLP count as blocks in pairs; then paths begin with "0." or "1.".
    """
    families = _families(names)
    best: tuple[int, list[dict[str, str]]] = (0, [])
    for members in families.values():
        shape_of = {i: {(s, source.tensors[n].shape) for s, n in paths.items()} for i, paths in members.items()}
        for period in (1, 2):
            for start in members:
                run: list[dict[str, str]] = []
                while all(start + len(run) * period + j in members for j in range(period)):
                    at = start + len(run) * period
                    # What a block has beyond the first one stays over and is reported.
                    if any(not shape_of[start + j] <= shape_of[at + j] for j in range(period)):
                        break
                    prefix = (lambda j: f"{j}.") if period == 2 else (lambda j: "")
                    first = [members[start + j] for j in range(period)]
                    run.append({prefix(j) + s: members[at + j][s] for j in range(period) for s in first[j]})
                two_d = [sum(len(source.tensors[n].shape) == 2 for n in b.values()) for b in run[:1]]
                size = sum(source.tensors[n].size for b in run for n in b.values())
                if run and two_d[0] >= 3 and size > best[0]:
                    best = (size, run)
    if not best[1]:
        raise CheckpointError("no numbered sequence of blocks with at least three matrices each among the tensor names")
    taken = {n for block in best[1] for n in block.values()}
    return best[1], [n for n in names if n not in taken]


def model_width(source: Source, block: dict[str, str], mapping: Map) -> int:
    """D: the size that every matrix of a block has on one side."""
    names = [*block.values(), *(name for g, (name, *_) in mapping.places.items() if g.startswith("blk.0."))]
    shapes = [source.tensors[n].shape for n in names if len(source.tensors[n].shape) == 2]
    common = set.intersection(*(set(s) for s in shapes)) if shapes else set()
    declared = hyper(source.config, "embedding_length")
    if declared in common:
        return int(declared)
    vectors = Counter(source.tensors[n].shape[0] for n in names if len(source.tensors[n].shape) == 1)
    ranked = sorted(common, key=lambda n: -vectors[n])
    if not ranked:
        raise CheckpointError("the matrices of a block have no side in common: the embedding length cannot be read")
    return ranked[0]


def orientation(source: Source, block: dict[str, str], width: int) -> bool | None:
    """Whether matrices are stored [in, out], from biases and from roles whose names and shapes are clear."""
    votes = set()
    for path, name in block.items():
        shape = source.tensors[name].shape
        if len(shape) != 2 or shape[0] == shape[1]:
            continue
        stem = _stem(path)
        for other, bias in block.items():
            if other != path and _stem(other) == stem and len(source.tensors[bias].shape) == 1:
                votes.add(source.tensors[bias].shape[0] == shape[1])
        role = role_by_name(stem)
        if role in ("attn_qkv", "attn_k", "attn_v", "ffn_up", "ffn_gate", "ffn_gate_up"):
            votes.add(shape[0] == width)
        elif role in ("ffn_down", "attn_output"):
            votes.add(shape[1] == width)
    return votes.pop() if len(votes) == 1 else None


def role_by_name(stem: str) -> str | None:
    """Role of a matrix by the end of its path in the block."""
    low = re.sub(r"([a-z])([A-Z])", r"\1_\2", stem).lower()
    for role, ending, context in _MATRIX_NAMES:
        match = re.search(rf"(^|\.)(?P<place>(self_)?att(entio)?n_|(mlp|ffn?|feed_?forward)_)?{ending}$", low)
        if not match:
            continue
        place = match["place"] or ""  # "attn_" of "attn_q", "ffn_" of "ffn_out"
        fits = not place or role.startswith("attn") == ("att" in place)
        if fits and (not context or re.search(context, low[: match.start()] + place)):
            return role
    return None


def block_roles(
    source: Source, block: Mapping[str, str], width: int, transposed: bool | None
) -> tuple[dict[str, Part], dict[str, list[tuple[str, dict[str, Part]]]], list[str]]:
    """(role -> tensors, what is open -> [(label, roles that differ)], names without a role) of one block."""
    parts, vectors = _pair_biases(source, block)
    roles: dict[str, Part] = {}
    unnamed: list[tuple[str, Part]] = []
    for stem, part in parts.items():
        role = role_by_name(stem)
        if role is None or role in roles:
            unnamed.append((stem, part))
        else:
            roles[role] = part
    options: dict[str, list[tuple[str, dict[str, Part]]]] = {}
    left = [name for name in block.values() if not source.tensors[name].shape]  # a scale, which the format lacks
    left += _by_shape(source, roles, unnamed, width, transposed, options)
    left += _norm_roles(source, roles, vectors, block, width, options)
    return roles, options, left


def _pair_biases(source: Source, block: Mapping[str, str]) -> tuple[dict[str, Part], dict[str, Part]]:
    """(stem -> matrix with bias, stem -> vector with bias) of a block."""
    parts: dict[str, Part] = {}
    vectors: dict[str, Part] = {}
    for path, name in block.items():
        if len(source.tensors[name].shape) >= 2:
            parts[_stem(path)] = Part(name)
        elif len(source.tensors[name].shape) == 1 and not _is_bias(path):
            vectors[_stem(path)] = Part(name)
    for path, name in block.items():
        if len(source.tensors[name].shape) == 1 and _is_bias(path):
            owner = parts.get(_stem(path)) or vectors.get(_stem(path))
            if owner is not None:
                owner.bias = name
            else:
                vectors[path] = Part(name)
    return parts, vectors


def _stem(path: str) -> str:
    return re.sub(r"[._]?(weight|bias|kernel|scale|gain|gamma|beta)$", "", path)


def _is_bias(path: str) -> bool:
    return re.search(r"(^|[._])(bias|beta)$", path) is not None


def _by_shape(
    source: Source, roles: dict[str, Part], unnamed: list[tuple[str, Part]], width: int, transposed: bool | None,
    options: dict[str, list[tuple[str, dict[str, Part]]]],
) -> list[str]:  # fmt: skip
    """Fill roles from shapes where names do not say; several possible orders become an option."""

    def side(part: Part) -> tuple[int, int] | None:
        """(out, in), as far as the orientation is known."""
        shape = source.tensors[part.weight].shape
        if len(shape) != 2 or (shape[0] != shape[1] and transposed is None):
            return None
        return (shape[1], shape[0]) if transposed else (shape[0], shape[1])

    left, squares, ups = [], [], []
    square = sum(side(part) == (width, width) for _, part in unnamed)
    for stem, part in sorted(unnamed, key=lambda entry: entry[0]):
        shape = side(part)
        if shape is None or width not in shape:
            left.append(part.weight)
        elif shape == (width, width):
            squares.append((stem, part))
        elif shape[0] == width and "ffn_down" not in roles:
            roles["ffn_down"] = part
        elif shape == (3 * width, width) and not {"attn_qkv", "attn_q", "attn_k"} & roles.keys() and square <= 1:
            roles["attn_qkv"] = part
        elif shape[1] == width:
            ups.append((stem, part))
        else:
            left.append(part.weight)
    wanted = [r for r in ("attn_q", "attn_k", "attn_v", "attn_output") if r not in roles]
    if "attn_qkv" in roles:
        wanted = [r for r in wanted if r == "attn_output"]
    left += _permute(roles, squares, wanted, "which of the square matrices is which", options)
    gated = "ffn_gate" in roles or "ffn_up" in roles or len(ups) == 2
    wanted = [r for r in ("ffn_gate", "ffn_up") if r not in roles] if gated else ["ffn_up"]
    if "ffn_gate_up" not in roles:
        left += _permute(roles, ups, wanted[: len(ups)], "which feed-forward matrix is the gate", options)
    else:
        left += [p.weight for _, p in ups]
    return left


def _permute(
    roles: dict[str, Part], parts: list[tuple[str, Part]], wanted: list[str], what: str,
    options: dict[str, list[tuple[str, dict[str, Part]]]],
) -> list[str]:  # fmt: skip
    """Give parts the wanted roles; with more than one the orders become an option. Returns what does not fit."""
    if len(parts) != len(wanted):
        return [p.weight for _, p in parts]
    orders = list(itertools.permutations(parts))
    roles.update({role: part for role, (_, part) in zip(wanted, orders[0], strict=True)})
    if len(orders) > 1:
        options[what] = [
            (
                ", ".join(f"{role} = {stem}" for role, (stem, _) in zip(wanted, order, strict=True)),
                {role: part for role, (_, part) in zip(wanted, order, strict=True)},
            )
            for order in orders
        ]
    return []


def _norm_roles(
    source: Source, roles: dict[str, Part], vectors: dict[str, Part], block: Mapping[str, str], width: int,
    options: dict[str, list[tuple[str, dict[str, Part]]]],
) -> list[str]:  # fmt: skip
    path_of = {name: path for path, name in block.items()}
    heads = {
        path_of[p.weight].split(".")[0]: r.split("_")[0] for r, p in roles.items() if r.startswith(("attn_", "ffn_"))
    }
    left, unnamed = [], []
    for stem, part in sorted(vectors.items(), key=lambda entry: entry[0]):
        low = stem.lower()
        if source.tensors[part.weight].shape != (width,):
            left.append(part.weight)
        elif _FFN_NORM.search(low) and "ffn_norm" not in roles:
            roles["ffn_norm"] = part
        elif _ATTN_NORM.search(low) and "attn_norm" not in roles:
            roles["attn_norm"] = part
        elif len(set(heads.values())) == 2 and heads.get(stem.split(".")[0], "") + "_norm" in ("attn_norm", "ffn_norm"):
            role = heads[stem.split(".")[0]] + "_norm"  # in the same submodule as the matrices it belongs to
            if role in roles:
                left.append(part.weight)
            roles.setdefault(role, part)
        else:
            unnamed.append((stem, part))
    wanted = [r for r in ("attn_norm", "ffn_norm") if r not in roles]
    return left + _permute(roles, unnamed, wanted, "which norm comes before attention", options)


def top_roles(
    source: Source, names: list[str], width: int, vocab_size: int | None
) -> tuple[dict[str, Part], list[str]]:
    """(role -> tensors, names without one) of what lies outside of the blocks."""
    top: dict[str, Part] = {}
    left: list[str] = []
    tables = [n for n in names if len(source.tensors[n].shape) == 2]
    narrow = [n for n in tables if source.tensors[n].shape[1] < min(width, 65)]
    codes = [n for n in narrow if len(np.unique(source.read_raw(n))) == 2]
    wide = [n for n in tables if width in source.tensors[n].shape and n not in codes]
    outputs = [n for n in wide if _OUTPUT.search(n.lower()) and not _EMBEDDING.search(n.lower())] or [
        n for n in wide if _OUTPUT.search(n.lower())
    ]
    embeddings = [n for n in wide if n not in outputs]
    if not outputs and len(embeddings) == 1:
        outputs = embeddings  # table-free, or one matrix for both ends
        if _EMBEDDING.search(embeddings[0].lower()):
            top["token_embd"] = Part(embeddings[0])
        embeddings = []
    if len(outputs) == 1:
        top["output"] = Part(outputs[0])
    else:
        left += outputs
    if len(embeddings) == 1:
        top["token_embd"] = Part(embeddings[0])
    else:
        left += embeddings
    for name in tables:
        rows, columns = source.tensors[name].shape
        if name in codes and rows == columns and "matrix" not in top:
            top["matrix"] = Part(name)
        elif name in codes and (vocab_size is None or rows >= vocab_size) and "code_table" not in top:
            top["code_table"] = Part(name)
        elif name not in wide:
            left.append(name)
    for name in names:
        shape = source.tensors[name].shape
        if len(shape) == 2:
            continue
        output = top.get("output")
        if shape == (width,) and "output_norm" not in top and not _is_bias(name):
            top["output_norm"] = Part(name)
        elif output and _is_bias(name) and _stem(name) == _stem(output.weight):
            output.bias = name
        elif "matrix" in top and "shift" not in top and shape == source.tensors[top["matrix"].weight].shape[:1]:
            top["shift"] = Part(name)
        elif not _is_bias(name) or shape != (width,):
            left.append(name)
    for name in names:
        if source.tensors[name].shape == (width,) and _is_bias(name):
            norm = top.get("output_norm")
            if norm is not None and norm.bias is None and _stem(name) == _stem(norm.weight):
                norm.bias = name
            elif name not in {p.bias for p in top.values()}:
                left.append(name)
    return top, left
