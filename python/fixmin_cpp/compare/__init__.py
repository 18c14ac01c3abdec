"""Models beside each other on one held-out text: `fixmin compare`, and what it is made of.

    found = compare(["fixed.gguf", "affine.gguf", "learned.gguf"], Path("heldout.txt").read_text(), "out")
    print(markdown(found))

Data flows `models`, `corpus` -> `measure`, `tasks` -> `comparison` -> `report`; `results` says what is found, `store`
keeps it between runs.
"""

from .comparison import compare
from .corpus import Mixture
from .report import REPORT_FILES, csv_table, latex, markdown, plot, write_report
from .results import Comparison, Difference, Figure, ModelFacts, Row, Speed, TaskScore, TextFacts, TextScore

__all__ = [
    "REPORT_FILES",
    "Comparison",
    "Difference",
    "Figure",
    "Mixture",
    "ModelFacts",
    "Row",
    "Speed",
    "TaskScore",
    "TextFacts",
    "TextScore",
    "compare",
    "csv_table",
    "latex",
    "markdown",
    "plot",
    "write_report",
]
