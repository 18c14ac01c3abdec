"""Questions of the task "capitals": the right one and three others of the same continent, always the same."""

import importlib.util
import random
from pathlib import Path
from typing import Any

from datasets import Dataset

FACTS = Path(__file__).resolve().parents[1] / "facts.py"


def dataset(**settings: Any) -> dict[str, Dataset]:
    """As the harness wants it: {"test": columns country, choices, answer (index)}."""
    spec = importlib.util.spec_from_file_location("demo_facts", FACTS)
    facts = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(facts)
    capitals: dict[str, list[str]] = {}
    for _, capital, continent, _ in facts.COUNTRIES:
        capitals.setdefault(continent, []).append(capital)
    rng, documents = random.Random(0), []
    for country, capital, continent, _ in facts.COUNTRIES:
        others = [other for other in capitals[continent] if other != capital]
        choices = [capital, *rng.sample(others, 3)]
        rng.shuffle(choices)
        choices = [f" {choice}" for choice in choices]
        documents.append({"country": country, "choices": choices, "answer": choices.index(f" {capital}")})
    return {"test": Dataset.from_list(documents)}
