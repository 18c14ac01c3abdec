"""`fixmin serve`: an OpenAI-compatible server on the engine. Needs fixmin-cpp[serve]; docs/serving.md describes it."""

from .app import create_app
from .server import run
from .settings import ServeSettings

__all__ = ["ServeSettings", "create_app", "run"]
