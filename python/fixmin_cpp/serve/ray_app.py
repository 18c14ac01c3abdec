"""The same server on Ray Serve: replicas of the model on one machine or many. Needs fixmin-cpp[serve,ray].

    serve run fixmin_cpp.serve.ray_app:app model=/path/model.gguf max_replicas=4 n_threads=8

or from Python, `ray.serve.run(build(ServeSettings(model=...), max_replicas=4))`. Every node must have the file at that
path. host, port, read_timeout and write_timeout are those of Ray's proxy: see ray.serve.start().
"""

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any

from ray import serve

from ..arguments import as_int, as_threads
from ..errors import ArgumentError
from ..load_options import on_ray
from .app import create_app
from .settings import ServeSettings

__all__ = ["app", "build"]


class _Replica:
    """A model and its application; Ray starts one for each replica."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = ServeSettings(**settings)

    def __serve_build_asgi_app__(self) -> Any:
        # Requests come when the model is there: a replica that cannot load it has failed to start.
        return create_app(self._settings, load_first=True)


def build(
    settings: ServeSettings, *, min_replicas: int = 1, max_replicas: int = 1, target_ongoing_requests: int | None = None
) -> serve.Application:
    """An application for ray.serve.run().

    Args:
        settings: of each replica; with device="cuda" Ray gives each a GPU.
        min_replicas, max_replicas: Ray adds replicas when each has more than target_ongoing_requests, and removes them.
        target_ongoing_requests: None: settings.n_parallel, what a replica computes at a time.

    Raises:
        ArgumentError: a number is out of range.
    """
    as_int("min_replicas", min_replicas, 1)
    as_int("max_replicas", max_replicas, 1)
    if max_replicas < min_replicas:
        raise ArgumentError(f"max_replicas is {max_replicas}, below min_replicas, which is {min_replicas}")
    device, n_gpus = on_ray(settings.device, None)
    settings = replace(settings, device=device)  # type: ignore[call-arg]  # a field that is made of a table
    target = settings.n_parallel if target_ongoing_requests is None else target_ongoing_requests
    deployment = serve.deployment(
        name="fixmin",
        # The replica itself answers 429 when its queue is full; Ray must not hold requests back before.
        max_ongoing_requests=settings.max_sequences + 100,
        autoscaling_config={
            "min_replicas": min_replicas,
            "max_replicas": max_replicas,
            "target_ongoing_requests": as_int("target_ongoing_requests", target, 1),
        },
        ray_actor_options={"num_cpus": as_threads(settings.n_threads) or 1, "num_gpus": n_gpus},
        graceful_shutdown_timeout_s=settings.shutdown_timeout,
    )
    return deployment(serve.ingress()(_Replica)).bind(asdict(settings))


def app(arguments: Mapping[str, str]) -> serve.Application:
    """For `serve run`: names of ServeSettings and of build() with their values; several keys separated by commas.

    Raises:
        ArgumentError: a name is unknown, or a value is out of range.
    """
    kinds = {field.name: str(field.type) for field in fields(ServeSettings)}
    own: dict[str, Any] = {}
    replicas: dict[str, int] = {}
    for name, text in arguments.items():
        if name in ("min_replicas", "max_replicas", "target_ongoing_requests"):
            replicas[name] = _number(name, text, int)
        elif name not in kinds:
            raise ArgumentError(f"there is no setting {name!r}: {', '.join(kinds)}")
        elif "tuple" in kinds[name]:
            own[name] = tuple(text.split(","))
        elif "float" in kinds[name] or "int" in kinds[name]:
            own[name] = _number(name, text, float if "float" in kinds[name] else int)
        else:
            own[name] = text
    if "model" not in own:
        raise ArgumentError("model is missing: model=/path/model.gguf")
    return build(ServeSettings(**own), **replicas)


def _number(name: str, text: Any, kind: type) -> Any:
    try:
        return kind(text)
    except (TypeError, ValueError):
        raise ArgumentError(f"{name} must be a number, got {text!r}") from None
