"""Run a checkpoint's own code: build its class, load the weights, ask it for logits, traces and inputs of block 0.

Published code was written for other versions of transformers, so the class is imported and constructed here, on the CPU
in float32, and its tensors are filled one by one; `from_pretrained` is the second way. Nothing stays registered: the
modules are imported under a package of their own and forgotten, and the registries of transformers are put back.
"""

import contextlib
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...errors import CheckpointError
from ..checkpoint.own_code import library_class, local_reference, needs_trust, own_class
from ..checkpoint.source import Source, is_no_weight, some
from .containment import contained, random_state
from .memory import InitialValuesUsed, Unwritten, give_back, map_weights
from .own_modules import PACKAGE, forget_modules, import_package
from .tape import Tape, model_tensors

Log = Callable[[str], None]

_WRAPPERS = ("_orig_mod.", "module.")  # left in names by torch.compile and DistributedDataParallel


class _Stop(BaseException):
    """Ends a forward pass whose rest is not wanted; no `except Exception` of the checkpoint's code may catch it."""


class _FinalError(CheckpointError):
    """What is wrong with the files themselves, so that no other way of loading them may be tried."""


class OwnModel:
    """A checkpoint's model, run by its own code. Tensors are CPU float32; ids are sequences of their own, [T]."""

    def __init__(self, model: nn.Module, source: Source, file_name: dict[str, str], log: Log) -> None:
        self.model = model
        self.log, self._told = log, set[str]()
        self.put_back: Callable[[], None] = lambda: None  # restores what whoever called had, see `load_own_model`
        self.source = source
        self.file_name = file_name  # name in the model -> name in the file
        self.vocab_size = 0  # known after the first logits
        self._call_style: Callable[[Tensor], Any] | None = None
        self._last_only = False
        self._tap: tuple[Any, Any] = (None, None)  # a module and its argument, or "operation" and its number

    # --- logits --------------------------------------------------------------------------------------------------

    def logits(self, ids: NDArray[Any]) -> NDArray[np.float32]:
        """ids [T] -> float32 [T, V]."""
        with self._running():
            out = self._forward(ids)
            if self._last_only and len(ids) > 1:
                out = torch.cat([self._forward(ids[:n])[-1:] for n in range(1, len(ids))] + [out[-1:]])
        return out.numpy().astype(np.float32)

    def trace(self, ids: NDArray[Any], inputs_of: Collection[int] | None = None) -> tuple[Tape, Tensor]:
        """Run ids [T] under a tape. The logits are [T, V], or [1, V] from code that returns only the last ones."""
        with self._running():
            if self._call_style is None:
                self._forward(ids)
            tape = Tape(self.model, inputs_of)
            with tape:
                logits = self._forward(ids)
        give_back(cycles=False)
        return tape, logits

    def _forward(self, ids: NDArray[Any]) -> Tensor:
        tokens = torch.as_tensor(np.asarray(ids, dtype=np.int64))[None]
        if self._call_style is not None:
            return self._logits_of(self._call_style(tokens), len(ids))
        failures = []
        for call in _call_styles(self.model):
            try:
                logits = self._logits_of(call(tokens), len(ids))
            except Exception as error:
                failures.append(f"{type(error).__name__}: {error}".splitlines()[0])
                continue
            if self._call_style is None or logits.shape[0] == len(ids):
                self._call_style, self._last_only = call, logits.shape[0] < len(ids)
                result = logits
            if not self._last_only:
                break
        if self._call_style is None:
            raise CheckpointError(f"the checkpoint's forward failed: {'; '.join(dict.fromkeys(failures))}")
        self.vocab_size = result.shape[1]
        return result

    @staticmethod
    def _logits_of(output: Any, length: int) -> Tensor:
        """The logits [T, V] or [1, V] in whatever forward returned."""
        if hasattr(output, "logits"):
            output = output.logits
        elif isinstance(output, dict) and "logits" in output:
            output = output["logits"]
        candidates = output if isinstance(output, (tuple, list)) else [output]
        for tensor in candidates:
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.ndim in (2, 3):
                tensor = tensor[0] if tensor.ndim == 3 else tensor
                if tensor.shape[0] in (length, 1):
                    return tensor.detach().float()
        raise TypeError("forward returned no tensor of logits [1, T, V]")

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        """No gradients, no fused encoder layers, no compilation: every operation reaches the dispatcher."""
        fastpath = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with contained(self._printed), torch.no_grad(), torch.compiler.set_stance("force_eager"):
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fastpath)

    def _printed(self, line: str) -> None:
        if line not in self._told:  # every forward pass prints it again
            self._told.add(line)
            self.log(line)

    # --- the input of the first block ----------------------------------------------------------------------------

    def tap(self, ids: NDArray[Any], rows: Tensor, order: int) -> None:
        """Find where `rows` [T, D], computed by operation number `order`, can be intercepted for other ids."""
        found: list[tuple[nn.Module, Any]] = []

        def look(module: nn.Module, args: Any, kwargs: Any) -> None:
            for key, value in [*enumerate(args), *kwargs.items()]:
                fits = isinstance(value, Tensor) and value.numel() == rows.numel() and value.ndim >= 2
                if not found and fits and torch.equal(value.detach().reshape(rows.shape).float(), rows):
                    found.append((module, key))

        handles = [m.register_forward_pre_hook(look, with_kwargs=True) for m in self.model.modules()]
        try:
            with self._running():
                self._forward(ids)
        finally:
            for handle in handles:
                handle.remove()
        self._tap = found[0] if found else ("operation", order)
        self._tap_length = len(ids)

    def input_rows(self, ids: NDArray[Any]) -> NDArray[np.float32]:
        """What enters block 0 for one sequence of ids [T], float32 [T, D]. `tap` comes first."""
        if isinstance(self._tap[0], nn.Module):
            return self._hooked_rows(ids, *self._tap)
        # No module sees them: count operations, with sequences of the length that was counted.
        length, parts = self._tap_length, []
        for start in range(0, len(ids), length):
            part = np.resize(np.asarray(ids)[start : start + length], length)
            parts.append(self._counted_rows(part, self._tap[1]))
        return np.concatenate(parts)[: len(ids)]

    def _hooked_rows(self, ids: NDArray[Any], module: nn.Module, key: Any) -> NDArray[np.float32]:
        seen: list[Tensor] = []

        def stop(_: nn.Module, args: Any, kwargs: Any) -> None:
            seen.append((args[key] if isinstance(key, int) else kwargs[key]).detach().float())
            raise _Stop

        handle = module.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with self._running(), contextlib.suppress(_Stop):
                self._forward(ids)
        finally:
            handle.remove()
        return seen[0].reshape(len(ids), -1).numpy()

    def _counted_rows(self, ids: NDArray[Any], order: int) -> NDArray[np.float32]:
        class StopAt(Tape):
            rows: Tensor

            def _after(self, op: str, out: Tensor, *rest: Any) -> None:
                super()._after(op, out, *rest)
                if self.order == order:
                    self.rows = out.detach().float().clone()
                    raise _Stop

        tape = StopAt(self.model)
        with self._running(), contextlib.suppress(_Stop), tape:
            self._forward(ids)
        return tape.rows.reshape(len(ids), -1).numpy()

    def close(self) -> None:
        """Forget the model and the modules of its code."""
        self.model = nn.Module()
        self._call_style, self._tap = None, (None, None)  # they hold the model too
        forget_modules(self.source.directory)
        self.put_back()


def _call_styles(model: nn.Module) -> Iterator[Callable[[Tensor], Any]]:
    """Ways to call a model with tokens [1, T], the most explicit first."""
    parameters = inspect.signature(model.forward).parameters
    named = [p for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    first = named[0].name if named else None

    def value_of(name: str, tokens: Tensor) -> Any:
        counts = parameters[name].annotation in (int, "int") or re.search(r"start|offset|past_len", name)
        if counts and "mask" not in name:
            return 0
        if "mask" in name:
            return torch.ones_like(tokens)
        if "pos" in name:
            return torch.arange(tokens.shape[1])[None]
        return {"use_cache": False, "return_dict": True, "training": False, "train": False}.get(name)

    required = [p.name for p in named[1:] if p.default is p.empty]
    optional = [p.name for p in named[1:] if p.name in ("use_cache", "return_dict")]
    targets = [p.name for p in named[1:] if p.name in ("targets", "labels", "target", "y")]

    def call(tokens: Tensor, names: list[str], with_targets: bool = False) -> Any:
        kwargs = {name: value_of(name, tokens) for name in names}
        kwargs |= dict.fromkeys(targets[:1], tokens) if with_targets else {}
        return model(**{first: tokens}, **kwargs) if first else model(tokens, **kwargs)

    yield lambda tokens: call(tokens, required + optional)
    yield lambda tokens: call(tokens, required)
    if any(p.kind == p.VAR_KEYWORD for p in parameters.values()):
        yield lambda tokens: model(input_ids=tokens)
    yield lambda tokens: model(tokens)
    if targets:  # some code computes all logits only if it is asked for a loss
        yield lambda tokens: call(tokens, required + optional, with_targets=True)


# --- loading -------------------------------------------------------------------------------------------------


def load_own_model(source: Source, log: Log) -> OwnModel:
    """Build the checkpoint's model by its own code, with the weights of the files, in evaluation mode.

    Raises CheckpointError if the code cannot be run, if weights it needs are missing or have other shapes, or if it
    draws tensors at random that no file holds.
    """
    if "quantization_config" in source.config:
        raise CheckpointError("config.json: a quantized checkpoint; convert the original weights instead")
    put_back = random_state()
    lines: list[str] = []
    try:
        try:
            with _unregistered(), contained(log):
                torch.set_default_dtype(torch.float32)
                own = _load(source, lines.append)
        finally:
            for line in lines:
                log(line)
        own.put_back, own.log = put_back, log
        return own
    except BaseException:
        forget_modules(source.directory)
        raise
    finally:
        put_back()


def _load(source: Source, log: Log) -> OwnModel:
    try:
        return _load_by_constructor(source, log)
    except _FinalError:
        raise
    except Exception as error:
        first = error
        log(f"own code: constructing the class failed ({_line(error)}); trying from_pretrained")
    try:
        return _load_by_from_pretrained(source, log)
    except Exception as error:
        if isinstance(first, CheckpointError):
            raise first from None
        raise CheckpointError(
            f"the checkpoint's own code could not be loaded: {_line(first)} (and from_pretrained: {_line(error)})."
            f"{_advice(first, source)} Without --trust-remote-code it is not run, and what the files leave open can be "
            "stated on the command line"
        ) from first


def _advice(error: BaseException, source: Source) -> str:
    """What to do about code that cannot be imported or constructed: a package that is missing, another transformers."""
    import transformers

    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith(("transformers", "fixmin_")):
        package = error.name.split(".")[0]
        if (source.directory / f"{package}.py").is_file() or error.name.startswith(PACKAGE):
            return ""
        return f" It imports the package {package}, which is not installed: pip install {package}."
    text, origin = str(error), _origin(error)
    written = source.config.get("transformers_version")
    strange = isinstance(error, (ImportError, AttributeError, TypeError, KeyError, RuntimeError, NotImplementedError))
    if strange and ("transformers" in text or "transformers" in origin or "meta tensor" in text):
        said = f"; config.json says {written}" if isinstance(written, str) else ""
        wanted = written.split(".")[0] if isinstance(written, str) else "4"
        return (
            f" It seems to be written for another release of transformers ({transformers.__version__} is installed"
            f"{said}): convert it in an environment of its own, with pip install 'transformers=={wanted}.*'."
        )
    return ""


def _origin(error: BaseException) -> str:
    """The file in which an error was raised."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame.f_code.co_filename.replace("\\", "/") if trace is not None else ""


def _load_by_constructor(source: Source, log: Log) -> OwnModel:
    make = _constructor(source)
    try:
        return _load_made(lambda: _make_unwritten(make, source), source, log)
    except InitialValuesUsed:
        return _load_made(make, source, log)


def _load_made(make: Callable[[], nn.Module], source: Source, log: Log) -> OwnModel:
    torch.manual_seed(1)
    first_draw = {}
    model = make()
    file_name, _, _ = _match_names(model, source)
    for name, tensor in model_tensors(model):
        if name not in file_name:
            first_draw[name] = tensor.detach().clone()
    del model, tensor
    give_back()
    torch.manual_seed(2)
    return _filled(make(), source, first_draw, log)


def _make_unwritten(make: Callable[[], nn.Module], source: Source) -> nn.Module:
    """`make()` without writing the large parameters that the files hold; InitialValuesUsed if others depend on them."""
    with Unwritten() as mode:
        model = make()
    file_name, _, _ = _match_names(model, source)
    in_file = {t.untyped_storage().data_ptr() for name, t in model_tensors(model) if name in file_name}
    if not mode.alive() <= in_file:
        raise InitialValuesUsed("an unwritten tensor that no file holds")
    return model


def _load_by_from_pretrained(source: Source, log: Log) -> OwnModel:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    bars, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # what is missing is said here, by name
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source.directory, trust_remote_code=needs_trust(source), dtype=torch.float32, local_files_only=True
        )
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
    # Built on the meta device: what the constructor computes and no file holds has been left unwritten.
    if computed := [name for name in _unsaved(model) if not is_no_weight(name)]:
        raise CheckpointError(f"from_pretrained leaves {some(computed)} without the values of the constructor")
    return _filled(model, source, {}, log)


def _filled(model: nn.Module, source: Source, first_draw: dict[str, Tensor], log: Log) -> OwnModel:
    """Copy the tensors of the files into the model and check what they leave open."""
    model.eval().requires_grad_(False).float()
    file_name, missing, unknown = _match_names(model, source)
    state = model.state_dict(keep_vars=True)
    if not first_draw:
        _match_values(state, source, file_name, missing, unknown)
    for name, stored in file_name.items():
        shape = source.tensors[stored].shape
        if tuple(state[name].shape) != shape:
            raise CheckpointError(f"tensor {stored}: {shape} in the file, {tuple(state[name].shape)} in the code")
    _check_tied(model, source, file_name, state)
    mapped = map_weights(model, source, file_name)
    for name, stored in file_name.items():
        if name not in mapped:
            _copy(source, stored, state[name])
    loaded = {state[name].data_ptr() for name in file_name}
    if missing and getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        missing = _tie_output(model, missing, file_name)
    missing = [n for n in missing if state[n].numel() and state[n].data_ptr() not in loaded]
    _check_missing(model, source, missing, unknown, state)
    for name, tensor in model_tensors(model):
        drawn = first_draw.get(name)
        if drawn is not None and name in missing + _unsaved(model) and not _same(drawn, tensor):
            raise CheckpointError(
                f"the checkpoint's code draws {name} {tuple(tensor.shape)} at random and no file holds it: "
                "what the model computes differs from run to run"
            )
    return OwnModel(model, source, file_name, log)


def _copy(source: Source, stored: str, target: Tensor) -> None:
    """Fill a tensor of the model. _FinalError for values that its type would change otherwise than by rounding."""
    values = torch.from_numpy(source.read_raw(stored))
    whole = not (target.is_floating_point() or target.is_complex() or is_no_weight(stored))
    if (values.is_complex() and not target.is_complex()) or (
        whole and not torch.equal(values.to(target.dtype).to(values.dtype), values)
    ):
        raise _FinalError(
            f"tensor {stored} {tuple(values.shape)} has type {source.tensors[stored].dtype} and values that are lost "
            f"as {target.dtype}, which the checkpoint's code has there"
        )
    target.copy_(values)


def _check_missing(
    model: nn.Module, source: Source, missing: list[str], unknown: list[str], state: Mapping[str, Tensor]
) -> None:
    """CheckpointError for what the code reads from the files and no file holds, unless it is no weight or allowed.

    A constructor's value in its place would be certified: the file would compute what the checkpoint does not hold.
    """
    ignorable = [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_missing", None) or []]
    lacking, allowed = [], []
    for name in missing:
        if is_no_weight(name, state[name].detach().numpy() if state[name].ndim >= 2 else None):
            continue  # a mask or a table of positions: the constructor's is the right one
        if source.allow_missing(name):
            allowed.append(f"{name} (--allow-missing)")
        elif any(p.search(name) for p in ignorable):
            allowed.append(f"{name} (its code says so: _keys_to_ignore_on_load_missing)")
        else:
            lacking.append(f"{name} {tuple(state[name].shape)}")
    if lacking:
        error = CheckpointError if unknown else _FinalError  # transformers may know the unknown ones by other names
        raise error(
            f"the files lack weights that the checkpoint's code needs: {some(lacking)}. If the values that its "
            "constructor gives them are right, say so with --allow-missing NAME (or a pattern with *)"
        )
    for text in allowed:
        source.warn(f"not in the files, so as the constructor makes it: {text}")


def _check_tied(model: nn.Module, source: Source, file_name: Mapping[str, str], state: Mapping[str, Tensor]) -> None:
    """CheckpointError where the code has one tensor and the files two, with different values."""
    groups: dict[Any, list[str]] = {}
    for name in file_name:
        groups.setdefault((state[name].data_ptr(), tuple(state[name].shape)), []).append(name)
    pairs = [(names[0], other) for (_, shape), names in groups.items() if 0 not in shape for other in names[1:]]
    if getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        pairs += _ends(model, file_name, state)
    for one, other in pairs:
        a, b = file_name[one], file_name[other]
        same = source.tensors[a].shape == source.tensors[b].shape
        if a != b and not (same and np.array_equal(source.read_raw(a), source.read_raw(b))):
            raise _FinalError(
                f"the checkpoint's code shares one tensor between {one} and {other}, but the files hold different "
                f"values for them: which of the two counts depends on who loads it"
            )


def _ends(model: nn.Module, file_name: Mapping[str, str], state: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """The names of the input and the output embedding, if the files hold both."""
    try:
        ends = [model.get_input_embeddings(), model.get_output_embeddings()]  # type: ignore[operator]
    except (AttributeError, NotImplementedError, TypeError):
        return []
    weights = [getattr(end, "weight", None) for end in ends]
    names = [next((n for n in file_name if state[n] is weight), None) for weight in weights]
    return [(names[0], names[1])] if names[0] and names[1] and names[0] != names[1] else []


def _match_values(
    state: dict[str, Tensor], source: Source, file_name: dict[str, str], missing: list[str], unknown: list[str]
) -> None:
    """Find tensors that transformers renamed while it loaded them, by their values; updates the last three."""
    for name in list(missing):
        for stored in [u for u in unknown if source.tensors[u].shape == tuple(state[name].shape)]:
            if torch.equal(torch.from_numpy(source.read_raw(stored)).float(), state[name].float()):
                file_name[name] = stored
                missing.remove(name)
                unknown.remove(stored)
                break


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(torch.equal(torch.nan_to_num(a.float()), torch.nan_to_num(b.float())))


def _unsaved(model: nn.Module) -> list[str]:
    """Names of tensors that a state dictionary leaves out."""
    saved = set(model.state_dict().keys())
    return [name for name, _ in model_tensors(model) if name not in saved]


def _tie_output(model: nn.Module, missing: list[str], file_name: dict[str, str]) -> list[str]:
    """Share the embedding with the output projection, as transformers would; returns what is still missing."""
    try:
        output, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return missing
    if output is None or getattr(embedding, "weight", None) is None:
        return missing
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter is output.weight and name in missing and output.weight.shape == embedding.weight.shape:
            output.weight = embedding.weight
            return [n for n in missing if n != name]
    return missing


def _match_names(model: nn.Module, source: Source) -> tuple[dict[str, str], list[str], list[str]]:
    """(name in the model -> name in the file, names the file lacks, names the model lacks), up to a common prefix."""
    wanted = list(model.state_dict().keys())
    best: dict[str, str] = {}
    for strip in _prefixes(source.tensors):
        for add in _prefixes(wanted):
            stored: dict[str, str] = {}
            for name in source.tensors:
                short = name.removeprefix(strip)
                for wrapper in _WRAPPERS if add == "" else ():
                    short = short.replace(wrapper, "")
                stored.setdefault(add + short, name)  # a second one stays over, and is reported
            match = {name: stored[name] for name in wanted if name in stored}
            plain = {name: name for name in wanted if name in source.tensors} if not strip and not add else {}
            match = plain if len(plain) >= len(match) and plain else match
            if len(match) > len(best):
                best = match
    if not best:
        raise CheckpointError("no tensor of the files has a name that the checkpoint's code knows")
    taken = set(best.values())
    return best, [n for n in wanted if n not in best], [n for n in source.tensors if n not in taken]


def _prefixes(names: Any) -> list[str]:
    """The empty prefix and every dotted prefix of the first name that most names share."""
    names = list(names)
    result = [""]
    for start in {n.split(".")[0] for n in names}:
        prefix = start + "."
        while sum(n.startswith(prefix) for n in names) > len(names) / 2 and len(result) < 8:
            result.append(prefix)
            rest = next(n for n in names if n.startswith(prefix))[len(prefix) :]
            if "." not in rest:
                break
            prefix += rest.split(".")[0] + "."
    return result


# --- classes -------------------------------------------------------------------------------------------------


def _constructor(source: Source) -> Callable[[], nn.Module]:
    """A function that builds the model from config.json."""
    fields = {k: v for k, v in source.config.items() if k not in ("torch_dtype", "dtype")}
    own = own_class(source)
    if own is None:
        import transformers

        name = library_class(source)
        if name is None:
            raise CheckpointError("no code for this checkpoint: neither in its directory nor in transformers")
        model_class = getattr(transformers, name)
        return lambda: model_class(_config(model_class.config_class, fields))
    package = import_package(source.directory)
    model_class = _named(importlib.import_module(f"{package}.{own[0]}"), own)
    for ancestor in model_class.__mro__:
        # transformers 4 listed the names of tied weights; transformers 5 wants a mapping and trips over a list.
        if isinstance(vars(ancestor).get("_tied_weights_keys"), (list, set, tuple)):
            ancestor._tied_weights_keys = None
    auto_map = source.config.get("auto_map") or {}
    reference = local_reference(source.directory, auto_map.get("AutoConfig"))
    if reference is not None:
        config_class = _named(importlib.import_module(f"{package}.{reference[0]}"), reference)
    else:
        config_class = getattr(model_class, "config_class", None)
    return lambda: model_class(_config(config_class, fields))


def _named(module: ModuleType, reference: tuple[str, str]) -> Any:
    if not hasattr(module, reference[1]):
        raise CheckpointError(f"config.json names the class {reference[1]}, which {reference[0]}.py does not define")
    return getattr(module, reference[1])


def _config(config_class: Any, fields: dict[str, Any]) -> Any:
    from transformers import PretrainedConfig

    config_class = config_class or PretrainedConfig
    if hasattr(config_class, "from_dict"):
        return config_class.from_dict(dict(fields))
    accepted = inspect.signature(config_class).parameters
    return config_class(**{k: v for k, v in fields.items() if k in accepted})


@contextlib.contextmanager
def _unregistered() -> Iterator[None]:
    """Undo what imported code registers in transformers, so that the next checkpoint may register it again."""
    import transformers.models.auto.configuration_auto as configuration_auto
    import transformers.models.auto.modeling_auto as modeling_auto

    mappings = [
        value._extra_content
        for module in (configuration_auto, modeling_auto)
        for value in vars(module).values()
        if isinstance(getattr(value, "_extra_content", None), dict)
    ]
    before = [dict(m) for m in mappings]
    path = list(sys.path)
    try:
        yield
    finally:
        sys.path[:] = path
        for mapping, content in zip(mappings, before, strict=True):
            mapping.clear()
            mapping.update(content)


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
